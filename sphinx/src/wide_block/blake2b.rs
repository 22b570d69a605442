//! Keyed BLAKE2b (RFC 7693) with digests of 32 bytes, for messages of one length side by side.

use super::lanes::Lanes;
use crate::Backend;

/// What one compression takes in.
pub(super) type Block = [u8; BLOCK_LEN];
/// What a message is hashed to.
pub(super) type Digest = [u8; DIGEST_LEN];

/// Length of a block in bytes.
pub(super) const BLOCK_LEN: usize = 128;
/// Length of a digest in bytes.
pub(super) const DIGEST_LEN: usize = 32;
/// Length of a key in bytes, the longest that BLAKE2b takes.
pub(super) const KEY_LEN: usize = 64;

/// Most messages that are hashed side by side.
pub(super) const MAX_LANES: usize = 8;

/// A message and its key, padded with zeros to a block: that is how it goes into the hash.
pub(super) type Keyed<'a> = (&'a Block, &'a [u8]);

/// Hashes up to [`MAX_LANES`] messages of one length, which is not zero.
pub(super) fn digests(messages: &[Keyed<'_>], digests: &mut [Digest]) {
    debug_assert!(messages.len() == digests.len() && messages.len() <= MAX_LANES);
    debug_assert!(messages.iter().all(|(_, text)| text.len() == messages[0].1.len()));
    #[cfg(target_arch = "x86_64")]
    if messages.len() > 1 {
        let backend = Backend::current();
        if messages.len() > 4 && backend == Backend::Avx512 {
            return x86::avx512(messages, digests);
        }
        if matches!(backend, Backend::Avx2 | Backend::Avx512) {
            for (messages, digests) in messages.chunks(4).zip(digests.chunks_mut(4)) {
                match messages {
                    [message] => digests[0] = one(*message),
                    _ => x86::avx2(messages, digests),
                }
            }
            return;
        }
    }
    for (message, digest) in messages.iter().zip(digests) {
        *digest = one(*message);
    }
}

fn one(message: Keyed<'_>) -> Digest {
    let [digest] = hash::<u64, 1>([message]);
    digest
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "calls of functions that need instructions of certain CPUs")]
mod x86 {
    use super::super::lanes::x86::{Avx2, Avx512};
    use super::{Digest, Keyed, hash};

    /// Hashes 1 to 4 messages; lanes that are left over hash the first one again.
    pub(super) fn avx2(messages: &[Keyed<'_>], digests: &mut [Digest]) {
        assert!(is_x86_feature_detected!("avx2"));
        #[target_feature(enable = "avx2")]
        fn hash_four(messages: [Keyed<'_>; 4]) -> [Digest; 4] {
            hash::<Avx2, 4>(messages)
        }
        // SAFETY: the CPU has AVX2.
        let hashed = unsafe { hash_four(fill(messages)) };
        digests.copy_from_slice(&hashed[..messages.len()]);
    }

    /// Hashes 1 to 8 messages; lanes that are left over hash the first one again.
    pub(super) fn avx512(messages: &[Keyed<'_>], digests: &mut [Digest]) {
        assert!(is_x86_feature_detected!("avx512f"));
        #[target_feature(enable = "avx512f")]
        fn hash_eight(messages: [Keyed<'_>; 8]) -> [Digest; 8] {
            hash::<Avx512, 8>(messages)
        }
        // SAFETY: the CPU has AVX-512F.
        let hashed = unsafe { hash_eight(fill(messages)) };
        digests.copy_from_slice(&hashed[..messages.len()]);
    }

    fn fill<'a, const N: usize>(messages: &[Keyed<'a>]) -> [Keyed<'a>; N] {
        std::array::from_fn(|lane| *messages.get(lane).unwrap_or(&messages[0]))
    }
}

/// RFC 7693 section 2.6.
const IV: [u64; 8] = [
    0x6a09_e667_f3bc_c908,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1,
    0x9b05_688c_2b3e_6c1f,
    0x1f83_d9ab_fb41_bd6b,
    0x5be0_cd19_137e_2179,
];

/// Length of digest and key, and that it is no tree of hashes (section 2.5).
const PARAMETERS: u64 = 0x0101_0000 | (KEY_LEN as u64) << 8 | DIGEST_LEN as u64;

/// Section 3.3, for messages that are not empty.
#[inline(always)]
fn hash<V: Lanes<N>, const N: usize>(messages: [Keyed<'_>; N]) -> [Digest; N] {
    let mut state = IV.map(V::splat);
    state[0] = V::splat(IV[0] ^ PARAMETERS);
    compress(&mut state, messages.map(|(key, _)| key), BLOCK_LEN, false);

    let len = messages[0].1.len();
    let last_at = len.saturating_sub(1) / BLOCK_LEN * BLOCK_LEN;
    for at in (0..last_at).step_by(BLOCK_LEN) {
        let blocks = messages.map(|(_, text)| {
            text[at..].first_chunk().expect("blocks before the last one are whole")
        });
        compress(&mut state, blocks, 2 * BLOCK_LEN + at, false);
    }
    let last = messages.map(|(_, text)| {
        let mut block = [0; BLOCK_LEN];
        block[..len - last_at].copy_from_slice(&text[last_at..]);
        block
    });
    compress(&mut state, last.each_ref(), BLOCK_LEN + len, true);

    let words = state.map(V::store);
    let mut digests = [[0; DIGEST_LEN]; N];
    for (lane, digest) in digests.iter_mut().enumerate() {
        for (bytes, word) in digest.as_chunks_mut().0.iter_mut().zip(&words) {
            *bytes = word[lane].to_le_bytes();
        }
    }
    digests
}

/// The compression function, section 3.2; `counted` bytes went in, those of this block included.
#[inline(always)]
fn compress<V: Lanes<N>, const N: usize>(
    state: &mut [V; 8],
    blocks: [&Block; N],
    counted: usize,
    is_last: bool,
) {
    let m = V::load(blocks);
    let [h0, h1, h2, h3, h4, h5, h6, h7] = *state;
    let mut upper = IV;
    upper[4] ^= counted as u64;
    upper[6] ^= if is_last { u64::MAX } else { 0 };
    let [u0, u1, u2, u3, u4, u5, u6, u7] = upper.map(V::splat);
    let mut v = [h0, h1, h2, h3, h4, h5, h6, h7, u0, u1, u2, u3, u4, u5, u6, u7];

    macro_rules! round {
        ($($s:literal)*) => { round(&mut v, [$(m[$s]),*]) };
    }
    // Section 2.7. Written out, so that every index is a constant: three times as fast as a loop.
    round!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(14 10 4 8 9 15 13 6 1 12 0 2 11 7 5 3);
    round!(11 8 12 0 5 2 15 13 10 14 3 6 7 1 9 4);
    round!(7 9 3 1 13 12 11 14 2 6 5 10 4 0 15 8);
    round!(9 0 5 7 2 4 10 15 14 1 11 12 6 8 3 13);
    round!(2 12 6 10 0 11 8 3 4 13 7 5 15 14 1 9);
    round!(12 5 1 15 14 13 4 10 0 7 6 3 9 2 8 11);
    round!(13 11 7 14 12 1 3 9 5 0 15 4 8 6 2 10);
    round!(6 15 14 9 11 3 0 8 12 2 13 7 1 4 10 5);
    round!(10 2 8 4 7 6 1 5 15 11 9 14 3 12 13 0);
    round!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(14 10 4 8 9 15 13 6 1 12 0 2 11 7 5 3);

    for (i, word) in state.iter_mut().enumerate() {
        *word = word.xor(v[i]).xor(v[i + 8]);
    }
}

#[inline(always)]
fn round<V: Lanes<N>, const N: usize>(v: &mut [V; 16], m: [V; 16]) {
    mix(v, [0, 4, 8, 12], m[0], m[1]);
    mix(v, [1, 5, 9, 13], m[2], m[3]);
    mix(v, [2, 6, 10, 14], m[4], m[5]);
    mix(v, [3, 7, 11, 15], m[6], m[7]);
    mix(v, [0, 5, 10, 15], m[8], m[9]);
    mix(v, [1, 6, 11, 12], m[10], m[11]);
    mix(v, [2, 7, 8, 13], m[12], m[13]);
    mix(v, [3, 4, 9, 14], m[14], m[15]);
}

/// Section 3.1.
#[inline(always)]
fn mix<V: Lanes<N>, const N: usize>(v: &mut [V; 16], [a, b, c, d]: [usize; 4], x: V, y: V) {
    v[a] = v[a].add(v[b]).add(x);
    v[d] = v[d].xor(v[a]).rotate_right::<32>();
    v[c] = v[c].add(v[d]);
    v[b] = v[b].xor(v[c]).rotate_right::<24>();
    v[a] = v[a].add(v[b]).add(y);
    v[d] = v[d].xor(v[a]).rotate_right::<16>();
    v[c] = v[c].add(v[d]);
    v[b] = v[b].xor(v[c]).rotate_right::<63>();
}

#[cfg(test)]
mod tests {
    use blake2::Blake2bMac;
    use blake2::digest::consts::U32;
    use blake2::digest::{KeyInit, Mac};

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn padded(key: &[u8; KEY_LEN]) -> Block {
        let mut block = [0; BLOCK_LEN];
        block[..KEY_LEN].copy_from_slice(key);
        block
    }

    fn expected(key: &[u8; KEY_LEN], text: &[u8]) -> Digest {
        let mac = <Blake2bMac<U32> as KeyInit>::new(&(*key).into()).chain_update(text);
        mac.finalize().into_bytes().into()
    }

    /// Each number of messages up to `most`, of lengths around those of blocks.
    fn check(hash: impl Fn(&[Keyed<'_>], &mut [Digest]), most: usize) {
        let mut rng = StdRng::seed_from_u64(1);
        for len in [1, 2, 31, 127, 128, 129, 255, 256, 257, 2016] {
            for count in 1..=most {
                let mut keys = vec![[0; KEY_LEN]; count];
                keys.iter_mut().for_each(|key| rng.fill_bytes(key));
                let mut texts = vec![vec![0; len]; count];
                texts.iter_mut().for_each(|text| rng.fill_bytes(text));

                let blocks: Vec<_> = keys.iter().map(padded).collect();
                let messages: Vec<_> =
                    blocks.iter().zip(&texts).map(|(key, text)| (key, &text[..])).collect();
                let mut digests = vec![[0; DIGEST_LEN]; count];
                hash(&messages, &mut digests);
                for ((digest, key), text) in digests.iter().zip(&keys).zip(&texts) {
                    assert_eq!(*digest, expected(key, text), "{count} messages of {len} bytes");
                }
            }
        }
    }

    #[test]
    fn digests_are_those_of_blake2() {
        check(digests, MAX_LANES);
    }

    #[test]
    fn every_width_gives_the_digests_of_blake2() {
        check(|messages, digests| digests[0] = one(messages[0]), 1);
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                check(x86::avx2, 4);
            }
            if is_x86_feature_detected!("avx512f") {
                check(x86::avx512, 8);
            }
        }
    }
}
