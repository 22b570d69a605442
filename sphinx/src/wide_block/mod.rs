//! LIONESS, the wide-block cipher of payloads, for several payloads at once.
//!
//! R. Anderson and E. Biham, "Two Practical and Provably Secure Block Ciphers: BEAR and LION"
//! (1996), section 6: a Feistel network of four rounds over a block with a left part of 32 bytes
//! and a right part of the rest. A stream cipher whose key hangs on the left part encrypts the
//! right part; a keyed hash of the right part masks the left part; and both once more. So each bit
//! of the block hangs on each other one. The stream cipher is ChaCha20 (RFC 8439) with a zero nonce
//! from block 0, the hash BLAKE2b (RFC 7693) with keys of 64 and digests of 32 bytes.
//!
//! The work is the same whatever the keys and the blocks: no branch and no address depends on them.

mod blake2b;
mod lanes;

use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher};

#[cfg(test)]
use crate::self_check::Fault;
use crate::wiped::Wiped;
use blake2b::{BLOCK_LEN, DIGEST_LEN, MAX_LANES};

/// Length of the key in bytes.
pub(crate) const KEY_LEN: usize = 2 * (STREAM_KEY_LEN + blake2b::KEY_LEN);
/// Shortest block in bytes: the right part must not be empty.
pub(crate) const MIN_BLOCK_LEN: usize = DIGEST_LEN + 1;
/// Blocks that share vectors: batches should be multiples of it.
pub(crate) const WIDTH: usize = MAX_LANES;

const STREAM_KEY_LEN: usize = 32;

/// The key of one block. Wiped when dropped.
///
/// | offset | length | part |
/// |--:|--:|---|
/// | 0 | 32 | key of the first stream |
/// | 32 | 64 | key of the first hash |
/// | 96 | 32 | key of the second stream |
/// | 128 | 64 | key of the second hash |
pub(crate) struct Key {
    streams: [Wiped<STREAM_KEY_LEN>; 2],
    /// Padded with zeros, as they go into the hash.
    hashes: [Wiped<BLOCK_LEN>; 2],
}

impl Key {
    pub(crate) fn from_bytes(bytes: &[u8; KEY_LEN]) -> Self {
        let mut key = Self {
            streams: [(); 2].map(|()| Wiped::zero()),
            hashes: [(); 2].map(|()| Wiped::zero()),
        };
        for (half, bytes) in bytes.chunks(KEY_LEN / 2).enumerate() {
            let (stream, hash) = bytes.split_at(STREAM_KEY_LEN);
            key.streams[half].copy_from_slice(stream);
            key.hashes[half][..blake2b::KEY_LEN].copy_from_slice(hash);
        }
        key
    }
}

/// A block that is changed in place, at least [`MIN_BLOCK_LEN`] bytes long, and its key.
pub(crate) type Keyed<'a> = (&'a Key, &'a mut [u8]);

/// Encrypts each block.
pub(crate) fn encrypt(blocks: &mut [Keyed<'_>]) {
    for_each_group(blocks, |group| {
        stream_round(group, 0);
        hash_round(group, 0);
        stream_round(group, 1);
        hash_round(group, 1);
    });
}

/// Decrypts each block.
pub(crate) fn decrypt(blocks: &mut [Keyed<'_>]) {
    for_each_group(blocks, |group| {
        hash_round(group, 1);
        stream_round(group, 1);
        hash_round(group, 0);
        stream_round(group, 0);
    });
}

/// Blocks of one length, at most [`WIDTH`] of them so that they stay in the nearest cache.
fn for_each_group(blocks: &mut [Keyed<'_>], mut rounds: impl FnMut(&mut [Keyed<'_>])) {
    for same in blocks.chunk_by_mut(|(_, one), (_, other)| one.len() == other.len()) {
        same.chunks_mut(WIDTH).for_each(&mut rounds);
    }
}

/// Encrypts the right parts with a stream that hangs on the left parts.
fn stream_round(blocks: &mut [Keyed<'_>], round: usize) {
    for (key, block) in blocks {
        let (left, right) = split(block);
        let mut stream_key = Wiped::zero();
        *stream_key = *key.streams[round];
        xor(&mut stream_key, left);
        let mut cipher = ChaCha20::new((&*stream_key).into(), &[0; 12].into());
        apply(&mut cipher, right);
    }
}

/// Masks the left parts with a hash of the right parts.
fn hash_round(blocks: &mut [Keyed<'_>], round: usize) {
    let mut digests = [[0; DIGEST_LEN]; WIDTH];
    let digests = &mut digests[..blocks.len()];
    let mut messages: [blake2b::Keyed<'_>; WIDTH] = [(&[0; BLOCK_LEN], &[]); WIDTH];
    for (message, (key, block)) in messages.iter_mut().zip(&*blocks) {
        *message = (&key.hashes[round], &block[DIGEST_LEN..]);
    }
    blake2b::digests(&messages[..blocks.len()], digests);
    #[cfg(test)]
    if Fault::Hash.is_injected() {
        digests[0][0] ^= 1;
    }
    for ((_, block), digest) in blocks.iter_mut().zip(digests) {
        xor(split(block).0, digest);
    }
}

fn split(block: &mut [u8]) -> (&mut [u8; DIGEST_LEN], &mut [u8]) {
    block.split_first_chunk_mut().expect("blocks have their shortest length")
}

/// Encrypts `bytes`. The cipher makes its stream at least 256 bytes at a time, but falls back to
/// single blocks at the end, so the end gets a buffer of that length.
fn apply(cipher: &mut ChaCha20, bytes: &mut [u8]) {
    let (whole, end) = bytes.split_at_mut(bytes.len() - bytes.len() % 256);
    cipher.apply_keystream(whole);
    let mut buffer = [0; 256];
    buffer[..end.len()].copy_from_slice(end);
    cipher.apply_keystream(&mut buffer);
    end.copy_from_slice(&buffer[..end.len()]);
}

fn xor(bytes: &mut [u8; 32], mask: &[u8; 32]) {
    for (byte, mask) in bytes.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sphinx_packet::payload::Payload;

    use super::*;

    /// The block as the crate `sphinx-packet` encrypts it.
    fn reference(key: &[u8; KEY_LEN], block: &[u8]) -> Vec<u8> {
        let payload = Payload::from_bytes(block).expect("long enough");
        payload.add_encryption_layer(key).expect("long enough").into_bytes()
    }

    fn key() -> impl Strategy<Value = [u8; KEY_LEN]> {
        prop::collection::vec(any::<u8>(), KEY_LEN)
            .prop_map(|key| key.try_into().expect("its length"))
    }

    fn blocks() -> impl Strategy<Value = Vec<([u8; KEY_LEN], Vec<u8>)>> {
        let len = prop_oneof![
            2 => MIN_BLOCK_LEN..=600,
            1 => prop::sample::select(vec![1024_usize, 2048, 16384, 32768]),
        ];
        // Mostly of one length; now and then of two.
        (len.clone(), len, 1..=19_usize).prop_flat_map(|(most, other, count)| {
            let block = prop_oneof![9 => Just(most), 1 => Just(other)].prop_flat_map(|len| {
                (key(), any::<[u8; 32]>()).prop_map(move |(key, seed)| {
                    (
                        key,
                        seed.iter()
                            .copied()
                            .cycle()
                            .zip(0_u8..=250)
                            .map(|(a, b)| a ^ b)
                            .cycle()
                            .take(len)
                            .collect(),
                    )
                })
            });
            prop::collection::vec(block, count)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn blocks_are_encrypted_as_by_the_reference_and_decrypted_again(plain in blocks()) {
            let keys: Vec<_> = plain.iter().map(|(key, _)| Key::from_bytes(key)).collect();
            let mut ours: Vec<_> = plain.iter().map(|(_, block)| block.clone()).collect();
            let mut jobs: Vec<_> = keys.iter().zip(ours.iter_mut().map(|b| &mut b[..])).collect();
            encrypt(&mut jobs);
            for ((key, plain), ours) in plain.iter().zip(&ours) {
                prop_assert!(reference(key, plain) == *ours);
            }
            let mut jobs: Vec<_> = keys.iter().zip(ours.iter_mut().map(|b| &mut b[..])).collect();
            decrypt(&mut jobs);
            for ((_, plain), ours) in plain.iter().zip(&ours) {
                prop_assert!(plain == ours);
            }
        }
    }

    /// RFC 8439 section 2.3, with a nonce of zeros. Both crates' ciphers are one in a build, so that
    /// comparing them would not show a fault.
    fn chacha20_block(key: &[u8; 32], counter: u32) -> [u8; 64] {
        const ROUNDS: [[usize; 4]; 8] = [
            [0, 4, 8, 12],
            [1, 5, 9, 13],
            [2, 6, 10, 14],
            [3, 7, 11, 15],
            [0, 5, 10, 15],
            [1, 6, 11, 12],
            [2, 7, 8, 13],
            [3, 4, 9, 14],
        ];
        let words = |bytes: &[u8]| -> Vec<u32> {
            bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
        };
        let mut start = words(b"expand 32-byte k");
        start.extend(words(key));
        start.extend([counter, 0, 0, 0]);
        let mut state = start.clone();
        for [a, b, c, d] in [ROUNDS; 10].into_iter().flatten() {
            for (left, right) in [(16, 12), (8, 7)] {
                state[a] = state[a].wrapping_add(state[b]);
                state[d] = (state[d] ^ state[a]).rotate_left(left);
                state[c] = state[c].wrapping_add(state[d]);
                state[b] = (state[b] ^ state[c]).rotate_left(right);
            }
        }
        let mut block = [0; 64];
        for ((out, word), start) in block.as_chunks_mut().0.iter_mut().zip(state).zip(start) {
            *out = word.wrapping_add(start).to_le_bytes();
        }
        block
    }

    #[test]
    fn streams_of_all_lengths_are_those_of_the_rfc() {
        let key = std::array::from_fn(|i| u8::try_from(i).expect("a key is short"));
        let stream: Vec<u8> = (0..600).flat_map(|i| chacha20_block(&key, i)).collect();
        for len in (1..2100).chain([16_352, 32_736]) {
            let mut bytes = vec![0; len];
            apply(&mut ChaCha20::new(&key.into(), &[0; 12].into()), &mut bytes);
            assert!(bytes == stream[..len], "{len} bytes");
        }
    }

    #[test]
    fn no_block_is_fine() {
        encrypt(&mut []);
        decrypt(&mut []);
    }
}
