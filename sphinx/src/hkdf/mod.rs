//! HKDF-SHA256 (RFC 5869) for several secrets in step.

mod sha256;

use zeroize::Zeroize;

use crate::wiped::Wiped;
use sha256::{BLOCK_LEN, Block, State};

/// Length of a digest in bytes.
const DIGEST_LEN: usize = 32;

/// Longest info in bytes: what version 260 needs.
const MAX_INFO_LEN: usize = 97;

/// Derives a key of `LEN` bytes from each secret. Secrets are equally long, and neither they nor
/// the salt are longer than 64 bytes; the info has at most [`MAX_INFO_LEN`].
pub(crate) fn derive<const LEN: usize>(
    salt: &[u8],
    secrets: &[&[u8]],
    info: &[u8],
) -> Vec<Wiped<LEN>> {
    const {
        assert!(LEN <= 255 * DIGEST_LEN);
    }
    let mut keys: Vec<_> = std::iter::repeat_with(Wiped::zero).take(secrets.len()).collect();
    for (secrets, keys) in secrets.chunks(4).zip(keys.chunks_mut(4)) {
        match *secrets {
            [one] => derive_in_step(salt, [one], info, keys),
            [one, two] => derive_in_step(salt, [one, two], info, keys),
            [one, two, three] => derive_in_step(salt, [one, two, three, three], info, keys),
            [one, two, three, four] => derive_in_step(salt, [one, two, three, four], info, keys),
            _ => {}
        }
    }
    keys
}

/// Writes the first keys of `N` to `keys`.
fn derive_in_step<const N: usize, const LEN: usize>(
    salt: &[u8],
    secrets: [&[u8]; N],
    info: &[u8],
    keys: &mut [Wiped<LEN>],
) {
    let Hmac { inner: [inner], outer: [outer] } = &Hmac::new([salt]);
    let extract = Hmac { inner: [*inner; N], outer: [*outer; N] };
    let mut tags = [(); N].map(|()| Wiped::zero());
    extract.tags(secrets, &mut tags);
    let expand = Hmac::new(tags.each_ref().map(|tag| &tag[..]));

    // The tag before (but for the first), the info, a counter.
    let mut messages = [(); N].map(|()| Wiped::<{ DIGEST_LEN + MAX_INFO_LEN + 1 }>::zero());
    let counter_at = DIGEST_LEN + info.len();
    for message in &mut messages {
        message[DIGEST_LEN..counter_at].copy_from_slice(info);
    }
    for at in (0..LEN).step_by(DIGEST_LEN) {
        messages.iter_mut().for_each(|message| message[counter_at] += 1);
        let start = if at == 0 { DIGEST_LEN } else { 0 };
        expand.tags(messages.each_ref().map(|message| &message[start..=counter_at]), &mut tags);
        for (key, tag) in keys.iter_mut().zip(&tags) {
            let part = &mut key[at..LEN.min(at + DIGEST_LEN)];
            part.copy_from_slice(&tag[..part.len()]);
        }
        for (message, tag) in messages.iter_mut().zip(&tags) {
            message[..DIGEST_LEN].copy_from_slice(&tag[..]);
        }
    }
}

/// HMAC-SHA256 (RFC 2104) under `N` keys, which are taken into the states already.
struct Hmac<const N: usize> {
    inner: [State; N],
    outer: [State; N],
}

impl<const N: usize> Hmac<N> {
    /// Keys have at most 64 bytes.
    fn new(keys: [&[u8]; N]) -> Self {
        let mut hmac = Self { inner: [sha256::INITIAL; N], outer: [sha256::INITIAL; N] };
        for (mask, states) in [(0x36, &mut hmac.inner), (0x5c, &mut hmac.outer)] {
            let mut blocks = [(); N].map(|()| Wiped::<BLOCK_LEN>::zero());
            for (block, key) in blocks.iter_mut().zip(keys) {
                block.fill(mask);
                block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
            }
            sha256::compress(states, blocks.each_ref().map(|block| &**block));
        }
        hmac
    }

    /// Writes the tags of messages of one length.
    fn tags(&self, messages: [&[u8]; N], tags: &mut [Wiped<DIGEST_LEN>; N]) {
        let mut digests = [(); N].map(|()| Wiped::zero());
        finish(&self.inner, messages, &mut digests);
        finish(&self.outer, digests.each_ref().map(|digest| &digest[..]), tags);
    }
}

/// Wipes the states.
impl<const N: usize> Drop for Hmac<N> {
    fn drop(&mut self) {
        self.inner.as_flattened_mut().zeroize();
        self.outer.as_flattened_mut().zeroize();
    }
}

/// Hashes the rest of messages of one length, the first block of which is in the states.
fn finish<const N: usize>(
    start: &[State; N],
    messages: [&[u8]; N],
    digests: &mut [Wiped<DIGEST_LEN>; N],
) {
    let mut states = *start;
    let len = messages[0].len();
    let whole = len / BLOCK_LEN;
    for block in 0..whole {
        let blocks = messages.map(|message| {
            let block: &Block = message[block * BLOCK_LEN..].first_chunk().expect("a whole block");
            block
        });
        sha256::compress(&mut states, blocks);
    }
    // FIPS 180-4 section 5.1.1: a one bit, zeros, the length in bits; in one block or two.
    let mut ends = [(); N].map(|()| Wiped::<{ 2 * BLOCK_LEN }>::zero());
    let last = usize::from(len % BLOCK_LEN + 9 > BLOCK_LEN);
    let bits = 8 * (BLOCK_LEN + len) as u64;
    for (end, message) in ends.iter_mut().zip(messages) {
        let rest = &message[whole * BLOCK_LEN..];
        end[..rest.len()].copy_from_slice(rest);
        end[rest.len()] = 0x80;
        end.as_chunks_mut::<BLOCK_LEN>().0[last][BLOCK_LEN - 8..]
            .copy_from_slice(&bits.to_be_bytes());
    }
    for block in 0..=last {
        sha256::compress(&mut states, ends.each_ref().map(|end| &end.as_chunks().0[block]));
    }
    for (digest, state) in digests.iter_mut().zip(&states) {
        for (bytes, word) in digest.as_chunks_mut().0.iter_mut().zip(state) {
            *bytes = word.to_be_bytes();
        }
    }
    states.as_flattened_mut().zeroize();
}

#[cfg(test)]
mod tests {
    use hkdf::Hkdf;
    use proptest::prelude::*;
    use sha2::Sha256;

    use super::*;

    fn check<const LEN: usize>(salt: &[u8], secrets: &[Vec<u8>], info: &[u8]) {
        let borrowed: Vec<_> = secrets.iter().map(|secret| &secret[..]).collect();
        let keys = derive::<LEN>(salt, &borrowed, info);
        assert_eq!(keys.len(), secrets.len());
        for (key, secret) in keys.iter().zip(secrets) {
            let mut expected = [0; LEN];
            Hkdf::<Sha256>::new(Some(salt), secret).expand(info, &mut expected).expect("short");
            assert_eq!(**key, expected);
        }
    }

    proptest! {
        #[test]
        fn keys_are_those_of_hkdf(
            salt in prop::collection::vec(any::<u8>(), 0..=64),
            secrets in (0..=64_usize).prop_flat_map(|len| {
                prop::collection::vec(prop::collection::vec(any::<u8>(), len), 0..=9)
            }),
            info in prop::collection::vec(any::<u8>(), 0..=MAX_INFO_LEN),
        ) {
            check::<1>(&salt, &secrets, &info);
            check::<32>(&salt, &secrets, &info);
            check::<192>(&salt, &secrets, &info);
            check::<288>(&salt, &secrets, &info);
        }
    }
}
