//! The compression function of SHA-256 (FIPS 180-4) for several messages in step.
//!
//! Each SHA instruction waits for the one before it, so that a single message leaves the unit idle
//! half of the time: four in step take half as long per block as one after the other.

/// A chaining value.
pub(super) type State = [u32; 8];
/// What one compression takes in.
pub(super) type Block = [u8; BLOCK_LEN];

/// Length of a block in bytes.
pub(super) const BLOCK_LEN: usize = 64;

/// FIPS 180-4 section 5.3.3.
pub(super) const INITIAL: State = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Takes one block into each state.
pub(super) fn compress<const N: usize>(states: &mut [State; N], blocks: [&Block; N]) {
    // A single message is faster there.
    #[cfg(target_arch = "x86_64")]
    if N > 1 && is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1") {
        #[expect(unsafe_code, reason = "a function that needs instructions of certain CPUs")]
        // SAFETY: the CPU has both.
        return unsafe { x86::compress(states, blocks) };
    }
    portable(states, blocks);
}

fn portable<const N: usize>(states: &mut [State; N], blocks: [&Block; N]) {
    for (state, block) in states.iter_mut().zip(blocks) {
        sha2::block_api::compress256(state, std::slice::from_ref(block));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_loadu_si128, _mm_set_epi64x,
        _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32,
        _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_storeu_si128,
    };

    use super::{Block, State};

    /// FIPS 180-4 section 4.2.2, four rounds to a vector.
    const K: [[u32; 4]; 16] = [
        [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5],
        [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
        [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3],
        [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174],
        [0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc],
        [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
        [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7],
        [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967],
        [0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13],
        [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
        [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3],
        [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070],
        [0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5],
        [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
        [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208],
        [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2],
    ];

    /// As `compress`.
    #[target_feature(enable = "sha,sse4.1")]
    pub(super) fn compress<const N: usize>(states: &mut [State; N], blocks: [&Block; N]) {
        let mut schedules = blocks.map(|block| load_block(block));
        // The instructions want the words A, B, E, F and C, D, G, H in a vector each.
        let mut halves = states.each_ref().map(|state| load_state(state));
        let before = halves;
        for (round, k) in K.iter().enumerate() {
            for (schedule, [abef, cdgh]) in schedules.iter_mut().zip(&mut halves) {
                let words = next_words(schedule, round);
                let sums = _mm_add_epi32(words, load_words(k));
                *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, sums);
                *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0x0e>(sums));
            }
        }
        for ((state, after), before) in states.iter_mut().zip(halves).zip(before) {
            store_state(
                state,
                [_mm_add_epi32(after[0], before[0]), _mm_add_epi32(after[1], before[1])],
            );
        }
    }

    /// The four words of the schedule for this round of four.
    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn next_words(schedule: &mut [__m128i; 4], round: usize) -> __m128i {
        let [oldest, second, third, newest] = [0, 1, 2, 3].map(|i| schedule[(round + i) % 4]);
        if round < 4 {
            return oldest;
        }
        let between = _mm_alignr_epi8::<4>(newest, third);
        let partial = _mm_add_epi32(_mm_sha256msg1_epu32(oldest, second), between);
        schedule[round % 4] = _mm_sha256msg2_epu32(partial, newest);
        schedule[round % 4]
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn load_block(block: &Block) -> [__m128i; 4] {
        let big_endian = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        let mut words = [_mm_setzero_si128(); 4];
        for (words, bytes) in words.iter_mut().zip(block.as_chunks::<16>().0) {
            #[expect(unsafe_code, reason = "loads go through pointers")]
            // SAFETY: it reads the 16 bytes behind the reference, which need not be aligned.
            let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            *words = _mm_shuffle_epi8(bytes, big_endian);
        }
        words
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn load_words(words: &[u32; 4]) -> __m128i {
        #[expect(unsafe_code, reason = "loads go through pointers")]
        // SAFETY: it reads the 16 bytes behind the reference, which need not be aligned.
        unsafe {
            _mm_loadu_si128(words.as_ptr().cast())
        }
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn load_state(state: &State) -> [__m128i; 2] {
        let [a, b, c, d, e, f, g, h] = *state;
        [load_words(&[f, e, b, a]), load_words(&[h, g, d, c])]
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn store_state(state: &mut State, halves: [__m128i; 2]) {
        let [[f, e, b, a], [h, g, d, c]] = halves.map(|half| store_words(half));
        *state = [a, b, c, d, e, f, g, h];
    }

    #[inline]
    #[target_feature(enable = "sha,sse4.1")]
    fn store_words(vector: __m128i) -> [u32; 4] {
        let mut words = [0; 4];
        #[expect(unsafe_code, reason = "stores go through pointers")]
        // SAFETY: it writes the 16 bytes behind the reference, which need not be aligned.
        unsafe {
            _mm_storeu_si128(words.as_mut_ptr().cast(), vector);
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, RngExt, SeedableRng};

    use super::*;

    fn compresses_as_portable<const N: usize>(rng: &mut StdRng) {
        let mut ours: [State; N] = std::array::from_fn(|_| rng.random());
        let mut blocks = [[0; BLOCK_LEN]; N];
        blocks.iter_mut().for_each(|block| rng.fill_bytes(block));
        let mut expected = ours;
        compress(&mut ours, blocks.each_ref());
        portable(&mut expected, blocks.each_ref());
        assert_eq!(ours, expected);
    }

    #[test]
    fn messages_in_step_are_compressed_as_one_by_one() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..100 {
            compresses_as_portable::<1>(&mut rng);
            compresses_as_portable::<2>(&mut rng);
            compresses_as_portable::<4>(&mut rng);
        }
    }
}
