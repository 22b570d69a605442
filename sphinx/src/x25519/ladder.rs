//! The Montgomery ladder over lanes: one multiplication of a point in each.
//!
//! Every lane does the same operations in the same order, whatever its numbers are: no branch and
//! no address depends on them.

use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};

use super::lanes::Lanes;

/// An element of the field of 2^255 − 19 in each of `N` lanes.
///
/// What [`Field::multiply`], [`Field::square`], [`Field::add_small_multiple`] and
/// [`Field::decode`] give is *reduced*; what [`Field::add`] and [`Field::subtract`] make of
/// reduced elements may be selected and multiplied, but neither added nor subtracted again.
///
/// Operations write their result where it is wanted: elements are too large to be passed around.
pub(super) trait Field<const N: usize>: Copy {
    type Lanes: Lanes<N>;

    /// The same number, less than 2^25, in all lanes.
    fn small(number: u64) -> Self;
    /// Takes numbers of 255 bits, little-endian; the top bit is ignored, and p or more is fine.
    fn decode(numbers: &[[u8; 32]; N]) -> Self;
    /// The numbers, reduced before, little-endian and less than p.
    fn encode(&self) -> [[u8; 32]; N];
    fn add(&mut self, a: &Self, b: &Self);
    fn subtract(&mut self, a: &Self, b: &Self);
    fn multiply(&mut self, a: &Self, b: &Self);
    /// The sum and the difference of the products of the first and of the second pair.
    fn multiply_pairs(results: [&mut Self; 2], first: [&Self; 2], second: [&Self; 2]);
    /// Squares `a` `times` times, at least once.
    fn square(&mut self, a: &Self, times: usize);
    /// `a`, reduced, plus `factor`, less than 2^17, times `b`.
    fn add_small_multiple(&mut self, a: &Self, factor: u64, b: &Self);
    /// `b` in the lanes where `mask` is all ones, `a` where it is zero.
    fn select(&mut self, mask: Self::Lanes, a: &Self, b: &Self);
}

/// All that is secret.
struct State<F, L> {
    /// The bits of the scalars, the next one on top of its word.
    scalars: [L; 4],
    /// All ones where the two points of the ladder are exchanged.
    swapped: L,
    x2: F,
    z2: F,
    x3: F,
    z3: F,
    /// Whatever a step, or the division at the end, computes in between.
    scratch: [F; CHAIN.len() + 2],
}

/// Multiplies each point, a u-coordinate, by the low 255 bits of its scalar (RFC 7748 section 5,
/// without clamping). Both are little-endian; the products are less than p.
#[inline(always)]
pub(super) fn ladder<F: Field<N>, const N: usize>(
    scalars: &[[u8; 32]; N],
    points: &[[u8; 32]; N],
) -> [[u8; 32]; N] {
    let x1 = F::decode(points);
    let mut state = State::<F, F::Lanes> {
        scalars: words(scalars),
        swapped: F::Lanes::splat(0),
        x2: F::small(1),
        z2: F::small(0),
        x3: x1,
        z3: F::small(1),
        scratch: [F::small(0); CHAIN.len() + 2],
    };
    // Bit 255 does not count.
    state.scalars[3] = state.scalars[3].shift_left(1);
    for (word, bits) in [(3, 63), (2, 64), (1, 64), (0, 64)] {
        for _ in 0..bits {
            step(&mut state, &x1, word);
        }
    }
    let products = quotient(&mut state).encode();
    wipe(&mut state);
    products
}

/// One bit of the scalars, in the names of RFC 7748.
#[inline(always)]
fn step<F: Field<N>, const N: usize>(state: &mut State<F, F::Lanes>, x1: &F, word: usize) {
    let State { scalars, swapped, x2, z2, x3, z3, scratch } = state;
    let [a, b, c, d, sum, difference, aa, bb, e, t, ..] = scratch;
    let bit = scalars[word].shift_right(63).negate();
    scalars[word] = scalars[word].shift_left(1);
    let swap = bit.xor(*swapped);
    *swapped = bit;

    a.add(x2, z2);
    b.subtract(x2, z2);
    c.add(x3, z3);
    d.subtract(x3, z3);
    // A swap exchanges DA and CB, which changes nothing of their sum and no more than the sign of
    // their difference. So all that depends on it is which of the two points is doubled.
    F::multiply_pairs([sum, difference], [d, a], [c, b]);
    t.select(swap, a, c);
    aa.square(t, 1);
    t.select(swap, b, d);
    bb.square(t, 1);
    x3.square(sum, 1);
    e.square(difference, 1);
    z3.multiply(e, x1);
    x2.multiply(aa, bb);
    e.subtract(aa, bb);
    // AA + a24 · E is BB + (a24 + 1) · E.
    t.add_small_multiple(bb, 121_666, e);
    z2.multiply(e, t);
}

/// The scalars' words, least first.
#[inline(always)]
fn words<L: Lanes<N>, const N: usize>(scalars: &[[u8; 32]; N]) -> [L; 4] {
    let mut words = [L::splat(0); 4];
    for (i, word) in words.iter_mut().enumerate() {
        let mut lanes = [0; N];
        for (lane, scalar) in lanes.iter_mut().zip(scalars) {
            let bytes = scalar[8 * i..].first_chunk().expect("a scalar has four words");
            *lane = u64::from_le_bytes(*bytes);
        }
        *word = L::from_array(lanes);
    }
    words
}

/// How to compute z^(p − 2), the inverse of z or zero for zero. Each step squares a power as often
/// as stated and multiplies it by another one. Powers are named by their places: z, z², and then the
/// results of the steps.
const CHAIN: [(usize, usize, usize); 11] = [
    (1, 2, 0),   // z^9
    (2, 0, 1),   // z^11
    (3, 1, 2),   // z^(2^5 − 1)
    (4, 5, 4),   // z^(2^10 − 1)
    (5, 10, 5),  // z^(2^20 − 1)
    (6, 20, 6),  // z^(2^40 − 1)
    (7, 10, 5),  // z^(2^50 − 1)
    (8, 50, 8),  // z^(2^100 − 1)
    (9, 100, 9), // z^(2^200 − 1)
    (10, 50, 8), // z^(2^250 − 1)
    (11, 5, 3),  // z^(2^255 − 21)
];

/// The u-coordinate of the first of the two points.
#[inline(always)]
fn quotient<F: Field<N>, const N: usize>(state: &mut State<F, F::Lanes>) -> F {
    let State { swapped, x2, z2, x3, z3, scratch: powers, .. } = state;
    powers[0].select(*swapped, z2, z3);
    let z = powers[0];
    powers[1].square(&z, 1);
    for (i, (base, squarings, factor)) in CHAIN.into_iter().enumerate() {
        let (base, factor) = (powers[base], powers[factor]);
        let mut power = base;
        power.square(&base, squarings);
        powers[i + 2].multiply(&power, &factor);
    }
    z2.select(*swapped, x2, x3);
    x2.multiply(z2, &powers[CHAIN.len() + 1]);
    *x2
}

/// Overwrites the state where it lies, which the compiler may not leave out. What it has put into
/// registers or elsewhere on the stack in between, is out of reach.
#[inline(always)]
fn wipe<F: Field<N>, const N: usize>(state: &mut State<F, F::Lanes>) {
    let zero = F::small(0);
    let nothing = State {
        scalars: [F::Lanes::splat(0); 4],
        swapped: F::Lanes::splat(0),
        x2: zero,
        z2: zero,
        x3: zero,
        z3: zero,
        scratch: [zero; CHAIN.len() + 2],
    };
    // SAFETY: the pointer comes from an exclusive reference, so it is valid, aligned and not shared;
    // a state has nothing to drop.
    #[expect(unsafe_code, reason = "there is no other way to write what nobody reads")]
    unsafe {
        ptr::write_volatile(state, nothing);
    }
    compiler_fence(Ordering::SeqCst);
}
