//! Vectors of 64-bit numbers: all that the arithmetic knows of a CPU.

use super::field25::{self, Limbs25};
use super::field51::{self, Limbs51};

/// `N` numbers of 64 bits, which every operation treats alike and independently.
///
/// Operations are one instruction each, so they must be inlined into a function that has the
/// instructions enabled: implementations, and whatever is generic over them, are
/// `#[inline(always)]`, down to the loops, which take no closures.
pub(super) trait Lanes<const N: usize>: Copy {
    fn from_array(numbers: [u64; N]) -> Self;
    fn to_array(self) -> [u64; N];
    /// The same number in all lanes.
    fn splat(number: u64) -> Self;
    /// The sum modulo 2^64.
    fn add(self, other: Self) -> Self;
    /// The difference modulo 2^64.
    fn sub(self, other: Self) -> Self;
    /// Zero minus the number modulo 2^64.
    fn negate(self) -> Self;
    fn and(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    /// `bits` is a constant at every call.
    fn shift_left(self, bits: u64) -> Self;
    /// `bits` is a constant at every call.
    fn shift_right(self, bits: u64) -> Self;
}

/// Lanes that multiply 32-bit numbers.
pub(super) trait Multiply32<const N: usize>: Lanes<N> {
    /// The product of the low 32 bits of both.
    fn multiply(self, other: Self) -> Self;

    /// The same number, of which the compiler knows nothing: it keeps those that are pinned in their
    /// order. Left to itself it sorts a hundred products and sums by its own rules, and then moves
    /// most of them between registers and memory, which takes half as long again.
    #[inline(always)]
    fn pin(self) -> Self {
        self
    }

    /// See [`field25::multiply`]. For lanes of a CPU this is a function of its own, because all that
    /// a step does, written out, does not fit a CPU's cache of decoded instructions.
    #[inline(always)]
    fn multiply_elements(product: &mut Limbs25<Self>, a: &Limbs25<Self>, b: &Limbs25<Self>) {
        field25::multiply(product, a, b);
    }

    /// See [`field25::square`] and above.
    #[inline(always)]
    fn square_element(square: &mut Limbs25<Self>, a: &Limbs25<Self>, times: usize) {
        field25::square(square, a, times);
    }
}

/// Lanes that multiply 52-bit numbers and add ("integer fused multiply-add").
pub(super) trait Multiply52<const N: usize>: Lanes<N> {
    /// `self` plus the low 52 bits of the product of the low 52 bits of `a` and `b`.
    fn add_product_low(self, a: Self, b: Self) -> Self;
    /// `self` plus the high 52 bits of the product of the low 52 bits of `a` and `b`.
    fn add_product_high(self, a: Self, b: Self) -> Self;

    /// The same number, of which the compiler knows nothing: it does not turn shifts and sums into the
    /// product that they make, for which the CPU has no instruction as fast.
    #[inline(always)]
    fn pin(self) -> Self {
        self
    }

    /// See [`field51::multiply`], and why it is here at [`Multiply32::multiply_elements`].
    #[inline(always)]
    fn multiply_elements(product: &mut Limbs51<Self>, a: &Limbs51<Self>, b: &Limbs51<Self>) {
        field51::multiply(product, a, b);
    }

    /// See [`field51::multiply_pairs`] and above.
    #[inline(always)]
    fn multiply_pairs(
        results: [&mut Limbs51<Self>; 2],
        first: [&Limbs51<Self>; 2],
        second: [&Limbs51<Self>; 2],
    ) {
        field51::multiply_pairs(results, first, second);
    }

    /// See [`field51::square`] and above.
    #[inline(always)]
    fn square_element(square: &mut Limbs51<Self>, a: &Limbs51<Self>, times: usize) {
        field51::square(square, a, times);
    }
}

/// Lanes in plain Rust: with them, the arithmetic is tested on machines that lack the instructions.
///
/// They are stricter than a CPU: they panic when a sum, a difference or an operand of a product
/// does not fit, which the arithmetic never relies on.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(super) struct Emulated<const N: usize>([u64; N]);

#[cfg(test)]
impl<const N: usize> Emulated<N> {
    fn zip(self, other: Self, operation: impl Fn(u64, u64) -> u64) -> Self {
        Self(std::array::from_fn(|lane| operation(self.0[lane], other.0[lane])))
    }

    fn product<const BITS: u32>(a: u64, b: u64) -> u128 {
        assert!(a >> BITS == 0 && b >> BITS == 0, "an operand of a product has over {BITS} bits");
        u128::from(a) * u128::from(b)
    }
}

#[cfg(test)]
impl<const N: usize> Lanes<N> for Emulated<N> {
    fn from_array(numbers: [u64; N]) -> Self {
        Self(numbers)
    }

    fn to_array(self) -> [u64; N] {
        self.0
    }

    fn splat(number: u64) -> Self {
        Self([number; N])
    }

    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a.checked_add(b).expect("the sum fits"))
    }

    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a.checked_sub(b).expect("the difference is not negative"))
    }

    fn negate(self) -> Self {
        Self(self.0.map(u64::wrapping_neg))
    }

    fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    fn xor(self, other: Self) -> Self {
        self.zip(other, |a, b| a ^ b)
    }

    fn shift_left(self, bits: u64) -> Self {
        Self(self.0.map(|number| number << bits))
    }

    fn shift_right(self, bits: u64) -> Self {
        Self(self.0.map(|number| number >> bits))
    }
}

#[cfg(test)]
impl<const N: usize> Multiply32<N> for Emulated<N> {
    fn multiply(self, other: Self) -> Self {
        self.zip(other, |a, b| {
            u64::try_from(Self::product::<32>(a, b)).expect("32 and 32 bits make 64")
        })
    }

    #[inline(never)]
    fn multiply_elements(product: &mut Limbs25<Self>, a: &Limbs25<Self>, b: &Limbs25<Self>) {
        field25::multiply(product, a, b);
    }

    #[inline(never)]
    fn square_element(square: &mut Limbs25<Self>, a: &Limbs25<Self>, times: usize) {
        field25::square(square, a, times);
    }
}

#[cfg(test)]
impl<const N: usize> Multiply52<N> for Emulated<N> {
    fn add_product_low(self, a: Self, b: Self) -> Self {
        self.add(a.zip(b, |a, b| {
            let low = Self::product::<52>(a, b) & ((1 << 52) - 1);
            u64::try_from(low).expect("52 bits fit")
        }))
    }

    fn add_product_high(self, a: Self, b: Self) -> Self {
        self.add(
            a.zip(b, |a, b| u64::try_from(Self::product::<52>(a, b) >> 52).expect("52 bits fit")),
        )
    }

    #[inline(never)]
    fn multiply_elements(product: &mut Limbs51<Self>, a: &Limbs51<Self>, b: &Limbs51<Self>) {
        field51::multiply(product, a, b);
    }

    #[inline(never)]
    fn multiply_pairs(
        results: [&mut Limbs51<Self>; 2],
        first: [&Limbs51<Self>; 2],
        second: [&Limbs51<Self>; 2],
    ) {
        field51::multiply_pairs(results, first, second);
    }

    #[inline(never)]
    fn square_element(square: &mut Limbs51<Self>, a: &Limbs51<Self>, times: usize) {
        field51::square(square, a, times);
    }
}
