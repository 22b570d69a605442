//! Field elements of ten limbs for lanes that multiply 32-bit numbers.
//!
//! Limb `i` stands for itself times 2^⌈25.5 · i⌉: even limbs have 26 bits, odd ones 25.
//!
//! Bounds: in a reduced element, even limbs are less than 2^26 + 2^15 and odd ones than
//! 2^25 + 2^15. A sum of two is less than double that; a difference, to which 2p is added so that no
//! limb becomes negative, less than three times 2^26 or 2^25 and a little. So 38 times an odd and 19
//! times an even limb of a difference fit 32 bits, and the ten products that make a limb of a product
//! fit 64: of two differences, they are less than 5 · 2^58.5 + 5 · 2^59.5 < 2^62.5.

#![expect(clippy::absurd_extreme_comparisons, reason = "some of the constants are zero")]

use super::field::{self, Place};
use super::ladder::Field;
use super::lanes::Multiply32;
#[cfg(test)]
use super::lanes::{Emulated, Lanes};

const LIMBS: usize = 10;
const PLACES: [Place; LIMBS] = [
    (0, 26),
    (26, 25),
    (51, 26),
    (77, 25),
    (102, 26),
    (128, 25),
    (153, 26),
    (179, 25),
    (204, 26),
    (230, 25),
];

pub(super) type Limbs25<L> = [L; LIMBS];

#[derive(Clone, Copy)]
pub(super) struct Field25<L>(Limbs25<L>);

/// The block once for each limb, whose number is a constant in it. A loop would leave it to the
/// compiler whether to unroll, and it does not.
macro_rules! each_limb {
    ($i:ident => $block:block) => {
        each_limb!($i => $block, 0 1 2 3 4 5 6 7 8 9)
    };
    ($i:ident => $block:block, $($number:literal)*) => {
        $({
            const $i: usize = $number;
            $block
        })*
    };
}

/// Bits of a limb.
const fn bits(limb: usize) -> usize {
    PLACES[limb].1
}

/// A limb of 2p.
const fn double_p(limb: usize) -> u64 {
    let low = if limb == 0 { 38 } else { 2 };
    (2 << bits(limb)) - low
}

impl<L: Multiply32<N>, const N: usize> Field<N> for Field25<L> {
    type Lanes = L;

    #[inline(always)]
    fn small(number: u64) -> Self {
        Self(field::small(number))
    }

    #[inline(always)]
    fn decode(numbers: &[[u8; 32]; N]) -> Self {
        Self(field::decode(numbers, &PLACES))
    }

    #[inline(always)]
    fn encode(&self) -> [[u8; 32]; N] {
        field::encode(&self.0, &PLACES)
    }

    #[inline(always)]
    fn add(&mut self, a: &Self, b: &Self) {
        each_limb!(I => {
            self.0[I] = a.0[I].add(b.0[I]);
        });
    }

    #[inline(always)]
    fn subtract(&mut self, a: &Self, b: &Self) {
        each_limb!(I => {
            self.0[I] = a.0[I].add(L::splat(double_p(I))).sub(b.0[I]);
        });
    }

    #[inline(always)]
    fn multiply(&mut self, a: &Self, b: &Self) {
        L::multiply_elements(&mut self.0, &a.0, &b.0);
    }

    #[inline(always)]
    fn multiply_pairs(results: [&mut Self; 2], [a, b]: [&Self; 2], [c, d]: [&Self; 2]) {
        let [sum, difference] = results;
        let (mut ab, mut cd) = (*a, *c);
        ab.multiply(a, b);
        cd.multiply(c, d);
        sum.add(&ab, &cd);
        difference.subtract(&ab, &cd);
    }

    #[inline(always)]
    fn square(&mut self, a: &Self, times: usize) {
        L::square_element(&mut self.0, &a.0, times);
    }

    #[inline(always)]
    fn add_small_multiple(&mut self, a: &Self, factor: u64, b: &Self) {
        let factor = L::splat(factor);
        let mut sums = a.0;
        each_limb!(I => {
            sums[I] = sums[I].add(b.0[I].multiply(factor));
        });
        self.0 = reduce(sums);
    }

    #[inline(always)]
    fn select(&mut self, mask: L, a: &Self, b: &Self) {
        each_limb!(I => {
            self.0[I] = a.0[I].xor(a.0[I].xor(b.0[I]).and(mask));
        });
    }
}

#[inline(always)]
pub(super) fn multiply<L: Multiply32<N>, const N: usize>(
    product: &mut Limbs25<L>,
    a: &Limbs25<L>,
    b: &Limbs25<L>,
) {
    // What would go beyond the last limb counts 19 times.
    let mut b19 = [L::splat(0); LIMBS];
    each_limb!(I => {
        b19[I] = b[I].multiply(L::splat(19)).pin();
    });
    let mut sums = [L::splat(0); LIMBS];
    each_limb!(I => {
        let double = a[I].add(a[I]);
        each_limb!(J => {
            // An odd limb times an odd one is worth double.
            let left = if I % 2 == 1 && J % 2 == 1 { double } else { a[I] };
            let right = if I + J >= LIMBS { b19[J] } else { b[J] };
            sums[(I + J) % LIMBS] = sums[(I + J) % LIMBS].add(left.multiply(right)).pin();
        });
    });
    *product = reduce(sums);
}

#[inline(always)]
pub(super) fn square<L: Multiply32<N>, const N: usize>(
    square: &mut Limbs25<L>,
    a: &Limbs25<L>,
    times: usize,
) {
    let mut power = *a;
    for _ in 0..times {
        power = square_once(&power);
    }
    *square = power;
}

#[inline(always)]
fn square_once<L: Multiply32<N>, const N: usize>(a: &Limbs25<L>) -> Limbs25<L> {
    let mut a19 = [L::splat(0); LIMBS];
    each_limb!(I => {
        a19[I] = a[I].multiply(L::splat(19)).pin();
    });
    let mut sums = [L::splat(0); LIMBS];
    each_limb!(I => {
        let double = a[I].add(a[I]);
        let quadruple = double.add(double);
        each_limb!(J => {
            if I <= J {
                // Different limbs meet twice.
                let left = match (I < J, I % 2 == 1 && J % 2 == 1) {
                    (true, true) => quadruple,
                    (false, false) => a[I],
                    _ => double,
                };
                let right = if I + J >= LIMBS { a19[J] } else { a[J] };
                sums[(I + J) % LIMBS] = sums[(I + J) % LIMBS].add(left.multiply(right)).pin();
            }
        });
    });
    reduce(sums)
}

/// Carries from limb to limb, in two chains that a CPU runs side by side.
#[inline(always)]
fn reduce<L: Multiply32<N>, const N: usize>(mut limbs: Limbs25<L>) -> Limbs25<L> {
    for i in 0..LIMBS / 2 {
        carry(&mut limbs, i);
        carry(&mut limbs, i + 4);
    }
    carry(&mut limbs, 9);
    carry(&mut limbs, 0);
    limbs
}

/// Keeps the bits of a limb and adds the rest to the next one; 2^255 is 19.
#[inline(always)]
fn carry<L: Multiply32<N>, const N: usize>(limbs: &mut Limbs25<L>, i: usize) {
    let rest = limbs[i].shift_right(bits(i) as u64);
    limbs[i] = limbs[i].and(L::splat((1 << bits(i)) - 1));
    let next = (i + 1) % LIMBS;
    limbs[next] = limbs[next].add(if next == 0 {
        rest.add(rest.shift_left(1)).add(rest.shift_left(4))
    } else {
        rest
    });
}

#[cfg(test)]
impl<const N: usize> Field25<Emulated<N>> {
    /// The largest limbs of a reduced element.
    pub(super) fn largest() -> Self {
        Self(std::array::from_fn(|i| Emulated::splat((1 << bits(i)) + (1 << 15) - 1)))
    }
}
