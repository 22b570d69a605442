//! All ladders against the RFC, against x25519-dalek, and at the edges.

use curve25519_dalek::constants::EIGHT_TORSION;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::field25::Field25;
use super::field51::Field51;
use super::ladder::{Field, ladder};
use super::lanes::Emulated;
use super::*;

type Ladder = Box<dyn Fn(&[([u8; 32], [u8; 32])]) -> Vec<[u8; 32]>>;

/// Everything that multiplies: each backend of this machine, each ladder over emulated lanes (with
/// lanes left over), and what a backend does one at a time.
fn ladders() -> Vec<(String, Ladder)> {
    type Numbers<const N: usize> = [[u8; 32]; N];
    fn lanes<const N: usize>(ladder: fn(&Numbers<N>, &Numbers<N>) -> Numbers<N>) -> Ladder {
        Box::new(move |operations| {
            let mut products = Vec::new();
            in_lanes(&borrow(operations), 1, &mut products, ladder);
            products
        })
    }
    let mut ladders: Vec<(String, Ladder)> = vec![
        ("emulated AVX2".to_owned(), lanes::<4>(ladder::<Field25<Emulated<4>>, 4>)),
        ("emulated AVX-512".to_owned(), lanes::<8>(ladder::<Field51<Emulated<8>>, 8>)),
    ];
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "vector instructions")]
    {
        if has_avx2() {
            // SAFETY: the CPU has AVX2.
            ladders.push(("AVX2".to_owned(), lanes::<4>(|s, p| unsafe { x86::ladder_avx2(s, p) })));
        }
        if has_avx512() {
            // SAFETY: the CPU has AVX-512F and AVX-512 IFMA.
            let avx512 = lanes::<8>(|s, p| unsafe { x86::ladder_avx512(s, p) });
            ladders.push(("AVX-512".to_owned(), avx512));
        }
    }
    for backend in Backend::available() {
        let run: Ladder = Box::new(move |operations| {
            backend.scope(|| x25519(&borrow(operations)).to_vec()).expect("it is available")
        });
        ladders.push((backend.to_string(), run));
    }
    ladders
}

fn borrow(operations: &[([u8; 32], [u8; 32])]) -> Vec<(&[u8; 32], &[u8; 32])> {
    operations.iter().map(|(scalar, point)| (scalar, point)).collect()
}

fn expected(operations: &[([u8; 32], [u8; 32])]) -> Vec<[u8; 32]> {
    operations.iter().map(|(scalar, point)| x25519_dalek::x25519(*scalar, *point)).collect()
}

fn check(operations: &[([u8; 32], [u8; 32])]) {
    let expected = expected(operations);
    for (name, ladder) in ladders() {
        assert_eq!(ladder(operations), expected, "{name}");
    }
}

fn hex(text: &str) -> [u8; 32] {
    std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("hexadecimal"))
}

/// Section 5.2, the two vectors.
#[test]
fn products_are_those_of_rfc_7748() {
    let operations = [
        (
            hex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"),
            hex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"),
        ),
        (
            hex("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d"),
            hex("e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493"),
        ),
    ];
    let products = [
        hex("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"),
        hex("95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957"),
    ];
    for (name, ladder) in ladders() {
        assert_eq!(ladder(&operations), products, "{name}");
    }
}

/// Section 5.2, the iteration, in a batch of three.
#[test]
fn a_thousand_iterations_are_those_of_rfc_7748() {
    let mut start = [0; 32];
    start[0] = 9;
    for (name, ladder) in ladders() {
        let mut operations = [(start, start); 3];
        for _ in 0..1000 {
            let products = ladder(&operations);
            for ((scalar, point), product) in operations.iter_mut().zip(products) {
                (*scalar, *point) = (product, *scalar);
            }
        }
        let end = hex("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51");
        assert_eq!(operations.map(|(scalar, _)| scalar), [end; 3], "{name}");
    }
}

#[test]
fn edge_points_are_multiplied_as_elsewhere() {
    let near_p = |low: u8| {
        let mut point = [0xff; 32];
        (point[0], point[31]) = (low, 0x7f);
        point
    };
    let mut points: Vec<[u8; 32]> =
        EIGHT_TORSION.iter().map(|point| point.to_montgomery().to_bytes()).collect();
    // Every number from 0 to 20 and from p − 20 to 2^255 − 1: the last 19 of these are p or more.
    points.extend((0..=20).map(|low| {
        let mut point = [0; 32];
        point[0] = low;
        point
    }));
    points.extend((0xd9..=0xff).map(near_p));
    // Limbs that are full, and limbs that are full but for one bit.
    points.extend([[0x55; 32], [0xaa; 32]]);
    points.extend((0..255).step_by(25).map(|bit| {
        let mut point = near_p(0xff);
        point[bit / 8] ^= 1 << (bit % 8);
        point
    }));
    let with_top_bit = points.clone().into_iter().map(|mut point| {
        point[31] |= 0x80;
        point
    });
    points.extend(with_top_bit.collect::<Vec<_>>());

    let mut scalars = vec![[0; 32], [0xff; 32], [0x55; 32], [0xaa; 32]];
    let mut random = [0; 32];
    StdRng::seed_from_u64(1).fill_bytes(&mut random);
    scalars.push(random);
    for scalar in scalars {
        check(&points.iter().map(|point| (scalar, *point)).collect::<Vec<_>>());
    }
}

#[test]
fn every_size_of_a_batch_has_its_products_in_order() {
    let mut rng = StdRng::seed_from_u64(2);
    for size in 0..=17_u8 {
        let mut operations = vec![([0; 32], [0; 32]); size.into()];
        for (scalar, point) in &mut operations {
            rng.fill_bytes(scalar);
            rng.fill_bytes(point);
        }
        check(&operations);
        // The same scalar in all lanes.
        let scalar = [size; 32];
        check(&operations.iter().map(|(_, point)| (scalar, *point)).collect::<Vec<_>>());
    }
}

#[test]
fn public_keys_are_products_of_the_base_point() {
    let mut base = [0; 32];
    base[0] = 9;
    let mut rng = StdRng::seed_from_u64(3);
    for _ in 0..50 {
        let mut secret = [0; 32];
        rng.fill_bytes(&mut secret);
        assert_eq!(public_key(&secret), x25519_dalek::x25519(secret, base));
    }
}

/// The largest limbs that an element may have, through every operation: emulated lanes panic when
/// anything does not fit. Products are compared with those of the same numbers, reduced.
fn check_bounds<F: Field<4>>(largest: F, one: F) {
    let [mut sum, mut difference, mut least, mut product] = [one; 4];
    sum.add(&largest, &largest);
    difference.subtract(&largest, &F::small(0));
    least.subtract(&F::small(0), &largest);
    for a in [sum, difference, least] {
        product.square(&a, 1);
        let square = product.encode();
        product.multiply(&a, &a);
        assert_eq!(product.encode(), square);
        for b in [sum, difference, least] {
            product.multiply(&a, &b);
            let direct = product.encode();
            let [mut reduced_a, mut reduced_b] = [one; 2];
            reduced_a.multiply(&a, &one);
            reduced_b.multiply(&b, &one);
            product.multiply(&reduced_a, &reduced_b);
            assert_eq!(product.encode(), direct);
            let [mut both, mut twice, mut nothing] = [one; 3];
            F::multiply_pairs([&mut both, &mut nothing], [&a, &b], [&b, &a]);
            twice.add(&product, &product);
            assert_eq!(both.encode(), twice.encode());
            assert_eq!(nothing.encode(), [[0; 32]; 4]);
        }
        product.add_small_multiple(&largest, (1 << 17) - 1, &a);
        let direct = product.encode();
        let mut multiple = one;
        multiple.multiply(&a, &F::small((1 << 17) - 1));
        sum.add(&multiple, &largest);
        product.multiply(&sum, &one);
        assert_eq!(product.encode(), direct);
    }
}

#[test]
fn the_largest_limbs_fit() {
    check_bounds(Field25::<Emulated<4>>::largest(), Field::small(1));
    check_bounds(Field51::<Emulated<4>>::largest(), Field::small(1));
}

#[test]
fn numbers_are_encoded_below_p() {
    for low in 0..=u8::MAX {
        let mut number = [0xff; 32];
        number[0] = low;
        let mut small = [0; 32];
        // 2^255 − 19 is ff…ed.
        match low.checked_sub(0xed) {
            Some(rest) => small[0] = rest,
            None => {
                small = number;
                small[31] = 0x7f;
            }
        }
        assert_eq!(Field25::<Emulated<4>>::decode(&[number; 4]).encode(), [small; 4]);
        assert_eq!(Field51::<Emulated<4>>::decode(&[number; 4]).encode(), [small; 4]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn products_are_those_of_x25519_dalek(
        operations in prop::collection::vec((any::<[u8; 32]>(), any::<[u8; 32]>()), 1..=24),
    ) {
        check(&operations);
    }
}
