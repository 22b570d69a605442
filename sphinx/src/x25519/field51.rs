//! Field elements of five limbs for lanes that multiply 52-bit numbers and add.
//!
//! Limb `i` stands for itself times 2^(51 · i). Every operation carries once, so every limb that it
//! returns is less than 2^51 + 2^15, and fits the 52 bits that a product takes of it.
//!
//! A sum of products in front of the carry is less than 2^56 in the low half and, as that of the high
//! half counts 19 times, less than 20 · 2^56 < 2^61 in all; so a carry is less than 2^10, or
//! 19 · 2^10 < 2^15 into the lowest limb. Where the sum or difference of two such sums is carried, it
//! is less than 20 · 2^56 + 2^61 < 1.7 · 2^61, and its carry into the lowest limb less than 2^15, too.

#![expect(clippy::needless_range_loop, reason = "limbs of several elements go together")]

use super::field::{self, Place};
use super::ladder::Field;
use super::lanes::Multiply52;
#[cfg(test)]
use super::lanes::{Emulated, Lanes};

const LIMBS: usize = 5;
const BITS: usize = 51;
const PLACES: [Place; LIMBS] = [(0, BITS), (51, BITS), (102, BITS), (153, BITS), (204, BITS)];

pub(super) type Limbs51<L> = [L; LIMBS];

#[derive(Clone, Copy)]
pub(super) struct Field51<L>(Limbs51<L>);

/// A limb of 2p.
const fn double_p(limb: usize) -> u64 {
    let low = if limb == 0 { 38 } else { 2 };
    (2 << BITS) - low
}

impl<L: Multiply52<N>, const N: usize> Field<N> for Field51<L> {
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
        let mut sum = a.0;
        for i in 0..LIMBS {
            sum[i] = sum[i].add(b.0[i]);
        }
        self.0 = carry(sum);
    }

    #[inline(always)]
    fn subtract(&mut self, a: &Self, b: &Self) {
        let mut difference = a.0;
        for i in 0..LIMBS {
            difference[i] = difference[i].add(L::splat(double_p(i))).sub(b.0[i]);
        }
        self.0 = carry(difference);
    }

    #[inline(always)]
    fn multiply(&mut self, a: &Self, b: &Self) {
        L::multiply_elements(&mut self.0, &a.0, &b.0);
    }

    #[inline(always)]
    fn multiply_pairs(results: [&mut Self; 2], first: [&Self; 2], second: [&Self; 2]) {
        let [sum, difference] = results;
        L::multiply_pairs(
            [&mut sum.0, &mut difference.0],
            first.map(|a| &a.0),
            second.map(|a| &a.0),
        );
    }

    #[inline(always)]
    fn square(&mut self, a: &Self, times: usize) {
        L::square_element(&mut self.0, &a.0, times);
    }

    #[inline(always)]
    fn add_small_multiple(&mut self, a: &Self, factor: u64, b: &Self) {
        let factor = L::splat(factor);
        let mut sums = a.0;
        // The high half of the last limb counts 2 · 19 times in the first, as a number of 17 bits.
        let top = L::splat(0).add_product_high(b.0[LIMBS - 1], factor);
        sums[0] = sums[0].add_product_low(top, L::splat(2 * 19)).add_product_low(b.0[0], factor);
        for i in 1..LIMBS {
            let high = L::splat(0).add_product_high(b.0[i - 1], factor);
            sums[i] = sums[i].add(double(high)).add_product_low(b.0[i], factor);
        }
        self.0 = carry(sums);
    }

    #[inline(always)]
    fn select(&mut self, mask: L, a: &Self, b: &Self) {
        for i in 0..LIMBS {
            self.0[i] = a.0[i].xor(a.0[i].xor(b.0[i]).and(mask));
        }
    }
}

#[inline(always)]
pub(super) fn multiply<L: Multiply52<N>, const N: usize>(
    product: &mut Limbs51<L>,
    a: &Limbs51<L>,
    b: &Limbs51<L>,
) {
    *product = carry(raw_product(a, b));
}

/// The sum and the difference of the products of two pairs, which share their carries.
#[inline(always)]
pub(super) fn multiply_pairs<L: Multiply52<N>, const N: usize>(
    [sum, difference]: [&mut Limbs51<L>; 2],
    [a, b]: [&Limbs51<L>; 2],
    [c, d]: [&Limbs51<L>; 2],
) {
    let (ab, cd) = (raw_product(a, b), raw_product(c, d));
    let (mut sums, mut differences) = (ab, ab);
    for i in 0..LIMBS {
        sums[i] = sums[i].add(cd[i]);
        // A multiple of p whose limbs are more than those of a product.
        differences[i] = differences[i].add(L::splat(double_p(i) << 9)).sub(cd[i]);
    }
    *sum = carry(sums);
    *difference = carry(differences);
}

/// A product before the carry.
#[inline(always)]
fn raw_product<L: Multiply52<N>, const N: usize>(a: &Limbs51<L>, b: &Limbs51<L>) -> Limbs51<L> {
    // The limbs from 2^255 on first, because each counts 19 times in one of those below. A high half
    // is worth 2^52: double in the limb after that of its low half.
    let (mut high, mut low) = ([L::splat(0); LIMBS], [L::splat(0); LIMBS]);
    for i in 0..LIMBS {
        for j in LIMBS - 1 - i..LIMBS {
            let place = i + j + 1 - LIMBS;
            high[place] = high[place].add_product_high(a[i], b[j]);
        }
    }
    for place in 0..LIMBS {
        high[place] = double(high[place]);
    }
    for i in 0..LIMBS {
        for j in LIMBS - i..LIMBS {
            let place = i + j - LIMBS;
            high[place] = high[place].add_product_low(a[i], b[j]);
        }
    }
    for place in 0..LIMBS {
        // 19 is 2 · (8 + 1) + 1, and what is doubled below is doubled together.
        low[place] = high[place].add(high[place].shift_left(3).pin());
    }
    for i in 0..LIMBS - 1 {
        for j in 0..LIMBS - 1 - i {
            low[i + j + 1] = low[i + j + 1].add_product_high(a[i], b[j]);
        }
    }
    for place in 0..LIMBS {
        low[place] = double(low[place]).add(high[place]);
    }
    for i in 0..LIMBS {
        for j in 0..LIMBS - i {
            low[i + j] = low[i + j].add_product_low(a[i], b[j]);
        }
    }
    low
}

#[inline(always)]
pub(super) fn square<L: Multiply52<N>, const N: usize>(
    square: &mut Limbs51<L>,
    a: &Limbs51<L>,
    times: usize,
) {
    let mut power = *a;
    for _ in 0..times {
        power = square_once(&power);
    }
    *square = power;
}

#[inline(always)]
fn square_once<L: Multiply52<N>, const N: usize>(a: &Limbs51<L>) -> Limbs51<L> {
    // Different limbs meet twice, and high halves count twice once more.
    let mut sums = [L::splat(0); 2 * LIMBS];
    for i in 0..LIMBS {
        for j in i + 1..LIMBS {
            sums[i + j + 1] = sums[i + j + 1].add_product_high(a[i], a[j]);
        }
    }
    for sum in &mut sums {
        *sum = double(*sum);
    }
    for i in 0..LIMBS {
        sums[2 * i + 1] = sums[2 * i + 1].add_product_high(a[i], a[i]);
        for j in i + 1..LIMBS {
            sums[i + j] = sums[i + j].add_product_low(a[i], a[j]);
        }
    }
    for i in LIMBS..2 * LIMBS {
        sums[i] = double(sums[i]);
        if i % 2 == 0 {
            sums[i] = sums[i].add_product_low(a[i / 2], a[i / 2]);
        }
    }
    let mut limbs = [L::splat(0); LIMBS];
    for i in 0..LIMBS {
        let high = sums[i + LIMBS];
        // 19 is 2 · (8 + 1) + 1, and what is doubled here is doubled together.
        limbs[i] = double(sums[i].add(high).add(high.shift_left(3).pin())).add(high);
        if i % 2 == 0 {
            limbs[i] = limbs[i].add_product_low(a[i / 2], a[i / 2]);
        }
    }
    carry(limbs)
}

/// Keeps 51 bits of each limb and adds the rest to the next one.
#[inline(always)]
fn carry<L: Multiply52<N>, const N: usize>(limbs: Limbs51<L>) -> Limbs51<L> {
    let mask = L::splat((1 << BITS) - 1);
    let mut carried = limbs;
    for i in 0..LIMBS {
        carried[i] = limbs[i].and(mask);
    }
    for i in 0..LIMBS - 1 {
        carried[i + 1] = carried[i + 1].add(limbs[i].shift_right(51));
    }
    carried[0] = carried[0].add_product_low(limbs[LIMBS - 1].shift_right(51), L::splat(19));
    carried
}

#[inline(always)]
fn double<L: Multiply52<N>, const N: usize>(number: L) -> L {
    number.add(number)
}

#[cfg(test)]
impl<const N: usize> Field51<Emulated<N>> {
    /// The largest limbs of a reduced element.
    pub(super) fn largest() -> Self {
        Self([Emulated::splat((1 << BITS) + (1 << 15) - 1); LIMBS])
    }
}
