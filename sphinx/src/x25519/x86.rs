//! Lanes in the vector registers of x86-64.
//!
//! The types of lanes are private: values of them exist only inside of the two ladders, which demand
//! the instructions from their caller. What is generic over lanes is inlined into functions that are
//! compiled with the instructions enabled.

#![expect(unsafe_code, reason = "vector instructions")]

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, __m512i, _mm256_add_epi64, _mm256_and_si256, _mm256_mul_epu32, _mm256_set1_epi64x,
    _mm256_sllv_epi64, _mm256_srlv_epi64, _mm256_sub_epi64, _mm256_xor_si256, _mm512_add_epi64,
    _mm512_and_si512, _mm512_madd52hi_epu64, _mm512_madd52lo_epu64, _mm512_set1_epi64,
    _mm512_sllv_epi64, _mm512_srlv_epi64, _mm512_sub_epi64, _mm512_xor_si512,
};
use std::mem::transmute;

use super::field25::{self, Field25, Limbs25};
use super::field51::{self, Field51, Limbs51};
use super::ladder::ladder;
use super::lanes::{Lanes, Multiply32, Multiply52};

/// See [`ladder`].
#[target_feature(enable = "avx2")]
pub(super) fn ladder_avx2(scalars: &[[u8; 32]; 4], points: &[[u8; 32]; 4]) -> [[u8; 32]; 4] {
    ladder::<Field25<Avx2>, 4>(scalars, points)
}

/// See [`ladder`].
#[target_feature(enable = "avx512f,avx512ifma")]
pub(super) fn ladder_avx512(scalars: &[[u8; 32]; 8], points: &[[u8; 32]; 8]) -> [[u8; 32]; 8] {
    ladder::<Field51<Avx512>, 8>(scalars, points)
}

#[derive(Clone, Copy)]
struct Avx2(__m256i);

#[derive(Clone, Copy)]
struct Avx512(__m512i);

impl Lanes<4> for Avx2 {
    #[inline(always)]
    fn from_array(numbers: [u64; 4]) -> Self {
        // SAFETY: array and vector have the same size, and any bits are a value of either.
        Self(unsafe { transmute::<[u64; 4], __m256i>(numbers) })
    }

    #[inline(always)]
    fn to_array(self) -> [u64; 4] {
        // SAFETY: as above.
        unsafe { transmute::<__m256i, [u64; 4]>(self.0) }
    }

    #[inline(always)]
    fn splat(number: u64) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_set1_epi64x(number.cast_signed()) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_add_epi64(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_sub_epi64(self.0, other.0) })
    }

    #[inline(always)]
    fn negate(self) -> Self {
        Self::splat(0).sub(self)
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_and_si256(self.0, other.0) })
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_xor_si256(self.0, other.0) })
    }

    #[inline(always)]
    fn shift_left(self, bits: u64) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_sllv_epi64(self.0, Self::splat(bits).0) })
    }

    #[inline(always)]
    fn shift_right(self, bits: u64) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_srlv_epi64(self.0, Self::splat(bits).0) })
    }
}

impl Multiply32<4> for Avx2 {
    #[inline(always)]
    fn multiply(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { _mm256_mul_epu32(self.0, other.0) })
    }

    #[inline(always)]
    fn pin(self) -> Self {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        Self(unsafe { pin_avx2(self.0) })
    }

    #[inline(always)]
    fn multiply_elements(product: &mut Limbs25<Self>, a: &Limbs25<Self>, b: &Limbs25<Self>) {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        unsafe { multiply_avx2(product, a, b) };
    }

    #[inline(always)]
    fn square_element(square: &mut Limbs25<Self>, a: &Limbs25<Self>, times: usize) {
        // SAFETY: the CPU has AVX2, as the module's documentation says.
        unsafe { square_avx2(square, a, times) };
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn pin_avx2(mut number: __m256i) -> __m256i {
    // SAFETY: there is no instruction, and the register keeps what is in it.
    unsafe { asm!("/* {0} */", inout(ymm_reg) number, options(nomem, nostack, preserves_flags)) };
    number
}

#[inline(never)]
#[target_feature(enable = "avx2")]
fn multiply_avx2(product: &mut Limbs25<Avx2>, a: &Limbs25<Avx2>, b: &Limbs25<Avx2>) {
    field25::multiply(product, a, b);
}

#[inline(never)]
#[target_feature(enable = "avx2")]
fn square_avx2(square: &mut Limbs25<Avx2>, a: &Limbs25<Avx2>, times: usize) {
    field25::square(square, a, times);
}

impl Lanes<8> for Avx512 {
    #[inline(always)]
    fn from_array(numbers: [u64; 8]) -> Self {
        // SAFETY: array and vector have the same size, and any bits are a value of either.
        Self(unsafe { transmute::<[u64; 8], __m512i>(numbers) })
    }

    #[inline(always)]
    fn to_array(self) -> [u64; 8] {
        // SAFETY: as above.
        unsafe { transmute::<__m512i, [u64; 8]>(self.0) }
    }

    #[inline(always)]
    fn splat(number: u64) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_set1_epi64(number.cast_signed()) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_add_epi64(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_sub_epi64(self.0, other.0) })
    }

    #[inline(always)]
    fn negate(self) -> Self {
        Self::splat(0).sub(self)
    }

    #[inline(always)]
    fn and(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_and_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_xor_si512(self.0, other.0) })
    }

    #[inline(always)]
    fn shift_left(self, bits: u64) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_sllv_epi64(self.0, Self::splat(bits).0) })
    }

    #[inline(always)]
    fn shift_right(self, bits: u64) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { _mm512_srlv_epi64(self.0, Self::splat(bits).0) })
    }
}

impl Multiply52<8> for Avx512 {
    #[inline(always)]
    fn add_product_low(self, a: Self, b: Self) -> Self {
        // SAFETY: the CPU has AVX-512 IFMA, as the module's documentation says.
        Self(unsafe { _mm512_madd52lo_epu64(self.0, a.0, b.0) })
    }

    #[inline(always)]
    fn add_product_high(self, a: Self, b: Self) -> Self {
        // SAFETY: the CPU has AVX-512 IFMA, as the module's documentation says.
        Self(unsafe { _mm512_madd52hi_epu64(self.0, a.0, b.0) })
    }

    #[inline(always)]
    fn pin(self) -> Self {
        // SAFETY: the CPU has AVX-512F, as the module's documentation says.
        Self(unsafe { pin_avx512(self.0) })
    }

    #[inline(always)]
    fn multiply_elements(product: &mut Limbs51<Self>, a: &Limbs51<Self>, b: &Limbs51<Self>) {
        // SAFETY: the CPU has AVX-512 IFMA, as the module's documentation says.
        unsafe { multiply_avx512(product, a, b) };
    }

    #[inline(always)]
    fn multiply_pairs(
        results: [&mut Limbs51<Self>; 2],
        first: [&Limbs51<Self>; 2],
        second: [&Limbs51<Self>; 2],
    ) {
        // SAFETY: the CPU has AVX-512 IFMA, as the module's documentation says.
        unsafe { multiply_pairs_avx512(results, first, second) };
    }

    #[inline(always)]
    fn square_element(square: &mut Limbs51<Self>, a: &Limbs51<Self>, times: usize) {
        // SAFETY: the CPU has AVX-512 IFMA, as the module's documentation says.
        unsafe { square_avx512(square, a, times) };
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pin_avx512(mut number: __m512i) -> __m512i {
    // SAFETY: there is no instruction, and the register keeps what is in it.
    unsafe {
        asm!("/* {0} */", inout(zmm_reg) number, options(pure, nomem, nostack, preserves_flags))
    };
    number
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512ifma")]
fn multiply_avx512(product: &mut Limbs51<Avx512>, a: &Limbs51<Avx512>, b: &Limbs51<Avx512>) {
    field51::multiply(product, a, b);
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512ifma")]
fn multiply_pairs_avx512(
    results: [&mut Limbs51<Avx512>; 2],
    first: [&Limbs51<Avx512>; 2],
    second: [&Limbs51<Avx512>; 2],
) {
    field51::multiply_pairs(results, first, second);
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512ifma")]
fn square_avx512(square: &mut Limbs51<Avx512>, a: &Limbs51<Avx512>, times: usize) {
    field51::square(square, a, times);
}
