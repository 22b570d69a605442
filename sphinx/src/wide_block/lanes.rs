//! Vectors of 64-bit words, one lane for each of several messages that are hashed side by side.

use super::blake2b::Block;

/// `N` words that are computed with as one.
pub(super) trait Lanes<const N: usize>: Copy {
    /// The same word in every lane.
    fn splat(word: u64) -> Self;
    /// Word `i` of every block in vector `i`; words are little-endian.
    fn load(blocks: [&Block; N]) -> [Self; 16];
    /// The word of each lane.
    fn store(self) -> [u64; N];
    /// Modulo 2^64.
    fn add(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    /// `BITS` is 32, 24, 16 or 63: the rotations of BLAKE2b.
    fn rotate_right<const BITS: u32>(self) -> Self;
}

impl Lanes<1> for u64 {
    #[inline(always)]
    fn splat(word: u64) -> Self {
        word
    }

    #[inline(always)]
    fn load([block]: [&Block; 1]) -> [Self; 16] {
        let (words, _) = block.as_chunks();
        std::array::from_fn(|i| u64::from_le_bytes(words[i]))
    }

    #[inline(always)]
    fn store(self) -> [u64; 1] {
        [self]
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.wrapping_add(other)
    }

    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self ^ other
    }

    #[inline(always)]
    fn rotate_right<const BITS: u32>(self) -> Self {
        self.rotate_right(BITS)
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "vector instructions; their operands are values, never pointers kept"
)]
pub(super) mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512i, _mm256_add_epi64, _mm256_loadu_si256, _mm256_permute2x128_si256,
        _mm256_set1_epi64x, _mm256_setr_epi8, _mm256_setzero_si256, _mm256_shuffle_epi8,
        _mm256_shuffle_epi32, _mm256_srli_epi64, _mm256_unpackhi_epi64, _mm256_unpacklo_epi64,
        _mm256_xor_si256, _mm512_add_epi64, _mm512_loadu_si512, _mm512_ror_epi64,
        _mm512_set1_epi64, _mm512_setzero_si512, _mm512_shuffle_i64x2, _mm512_unpackhi_epi64,
        _mm512_unpacklo_epi64, _mm512_xor_si512,
    };
    use std::mem::transmute;

    use super::{Block, Lanes};

    /// Four lanes. Only functions that require AVX2 of the CPU may make one.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256i);

    /// Eight lanes. Only functions that require AVX-512F of the CPU may make one.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512i);

    impl Lanes<4> for Avx2 {
        #[inline(always)]
        fn splat(word: u64) -> Self {
            // SAFETY: the CPU has AVX2, see `Avx2`.
            Self(unsafe { _mm256_set1_epi64x(word.cast_signed()) })
        }

        #[inline(always)]
        fn load(blocks: [&Block; 4]) -> [Self; 16] {
            // SAFETY: the CPU has AVX2, see `Avx2`; 32 bytes from 32 times 0, 1, 2 and 3 are inside
            // a block of 128, and need not be aligned.
            unsafe {
                let mut words = [_mm256_setzero_si256(); 16];
                for (quarter, words) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let rows = blocks
                        .map(|block| _mm256_loadu_si256(block.as_ptr().add(32 * quarter).cast()));
                    // Words 0 and 2, then words 1 and 3, of two rows each.
                    let even = [0, 2].map(|i| _mm256_unpacklo_epi64(rows[i], rows[i + 1]));
                    let odd = [0, 2].map(|i| _mm256_unpackhi_epi64(rows[i], rows[i + 1]));
                    *words = [
                        _mm256_permute2x128_si256::<0x20>(even[0], even[1]),
                        _mm256_permute2x128_si256::<0x20>(odd[0], odd[1]),
                        _mm256_permute2x128_si256::<0x31>(even[0], even[1]),
                        _mm256_permute2x128_si256::<0x31>(odd[0], odd[1]),
                    ];
                }
                words.map(Self)
            }
        }

        #[inline(always)]
        fn store(self) -> [u64; 4] {
            // SAFETY: both are 32 bytes, and any bits are words.
            unsafe { transmute(self.0) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the CPU has AVX2, see `Avx2`.
            Self(unsafe { _mm256_add_epi64(self.0, other.0) })
        }

        #[inline(always)]
        fn xor(self, other: Self) -> Self {
            // SAFETY: the CPU has AVX2, see `Avx2`.
            Self(unsafe { _mm256_xor_si256(self.0, other.0) })
        }

        #[inline(always)]
        fn rotate_right<const BITS: u32>(self) -> Self {
            // SAFETY: the CPU has AVX2, see `Avx2`.
            Self(unsafe {
                match BITS {
                    32 => _mm256_shuffle_epi32::<0xb1>(self.0),
                    24 => _mm256_shuffle_epi8(
                        self.0,
                        _mm256_setr_epi8(
                            3, 4, 5, 6, 7, 0, 1, 2, 11, 12, 13, 14, 15, 8, 9, 10, //
                            3, 4, 5, 6, 7, 0, 1, 2, 11, 12, 13, 14, 15, 8, 9, 10,
                        ),
                    ),
                    16 => _mm256_shuffle_epi8(
                        self.0,
                        _mm256_setr_epi8(
                            2, 3, 4, 5, 6, 7, 0, 1, 10, 11, 12, 13, 14, 15, 8, 9, //
                            2, 3, 4, 5, 6, 7, 0, 1, 10, 11, 12, 13, 14, 15, 8, 9,
                        ),
                    ),
                    63 => {
                        let doubled = _mm256_add_epi64(self.0, self.0);
                        _mm256_xor_si256(_mm256_srli_epi64::<63>(self.0), doubled)
                    }
                    _ => unreachable!(),
                }
            })
        }
    }

    impl Lanes<8> for Avx512 {
        #[inline(always)]
        fn splat(word: u64) -> Self {
            // SAFETY: the CPU has AVX-512F, see `Avx512`.
            Self(unsafe { _mm512_set1_epi64(word.cast_signed()) })
        }

        #[inline(always)]
        fn load(blocks: [&Block; 8]) -> [Self; 16] {
            // SAFETY: the CPU has AVX-512F, see `Avx512`; 64 bytes from 0 and from 64 are inside a
            // block of 128, and need not be aligned.
            unsafe {
                let mut words = [_mm512_setzero_si512(); 16];
                for (half, words) in words.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    let rows = blocks
                        .map(|block| _mm512_loadu_si512(block.as_ptr().add(64 * half).cast()));
                    // Words 0, 2, 4 and 6, then words 1, 3, 5 and 7, of two rows each.
                    let even = [0, 2, 4, 6].map(|i| _mm512_unpacklo_epi64(rows[i], rows[i + 1]));
                    let odd = [0, 2, 4, 6].map(|i| _mm512_unpackhi_epi64(rows[i], rows[i + 1]));
                    for (parity, pairs) in [even, odd].into_iter().enumerate() {
                        // Words 0 and 4, then words 2 and 6 (or one more), of four rows each.
                        let low =
                            [0, 2].map(|i| _mm512_shuffle_i64x2::<0x88>(pairs[i], pairs[i + 1]));
                        let high =
                            [0, 2].map(|i| _mm512_shuffle_i64x2::<0xdd>(pairs[i], pairs[i + 1]));
                        words[parity] = _mm512_shuffle_i64x2::<0x88>(low[0], low[1]);
                        words[2 + parity] = _mm512_shuffle_i64x2::<0x88>(high[0], high[1]);
                        words[4 + parity] = _mm512_shuffle_i64x2::<0xdd>(low[0], low[1]);
                        words[6 + parity] = _mm512_shuffle_i64x2::<0xdd>(high[0], high[1]);
                    }
                }
                words.map(Self)
            }
        }

        #[inline(always)]
        fn store(self) -> [u64; 8] {
            // SAFETY: both are 64 bytes, and any bits are words.
            unsafe { transmute(self.0) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the CPU has AVX-512F, see `Avx512`.
            Self(unsafe { _mm512_add_epi64(self.0, other.0) })
        }

        #[inline(always)]
        fn xor(self, other: Self) -> Self {
            // SAFETY: the CPU has AVX-512F, see `Avx512`.
            Self(unsafe { _mm512_xor_si512(self.0, other.0) })
        }

        #[inline(always)]
        fn rotate_right<const BITS: u32>(self) -> Self {
            // SAFETY: the CPU has AVX-512F, see `Avx512`.
            Self(unsafe {
                match BITS {
                    32 => _mm512_ror_epi64::<32>(self.0),
                    24 => _mm512_ror_epi64::<24>(self.0),
                    16 => _mm512_ror_epi64::<16>(self.0),
                    63 => _mm512_ror_epi64::<63>(self.0),
                    _ => unreachable!(),
                }
            })
        }
    }
}
