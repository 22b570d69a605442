//! Boxes: fragments sealed for their recipient, so that the gateway that keeps them reads nothing.
//!
//! The key is used once, so the nonce is zero. It is HKDF-SHA256 (RFC 5869) of
//!
//! - the secret X25519(ephemeral secret, recipient's encryption key), which is never zero,
//! - an empty salt,
//! - the info `"mixsocks message box v1\0"` ‖ ephemeral key ‖ recipient's encryption key.
//!
//! The cipher is AES-256-GCM without additional data. The ephemeral key is part of the info as it is
//! spelled, so that one box cannot be spelled in two ways.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use mixsocks_sphinx::{SecretKey, x25519};
use rand::CryptoRng;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::packet::{BOX_OVERHEAD, BOX_TAG_LEN, EPHEMERAL_KEY_LEN};
use crate::keys::EncryptionKey;

const LABEL: &[u8] = b"mixsocks message box v1\0";

/// The u-coordinate of the base point (RFC 7748 section 4.1).
const BASE_POINT: [u8; 32] = {
    let mut point = [0; 32];
    point[0] = 9;
    point
};

/// Why a box cannot be opened. Whoever made it is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenBoxError {
    /// It is shorter than a box of nothing.
    #[error("a box of {0} bytes")]
    TooShort(usize),
    /// The ephemeral key is a point of low order: anybody would know the key.
    #[error("the ephemeral key of a box is a point of low order")]
    LowOrder,
    /// It was changed, or is for somebody else.
    #[error("a box cannot be opened")]
    Tag,
}

/// Seals each fragment for its recipient, in their order. Several at once cost less each.
pub fn seal_boxes(rng: &mut impl CryptoRng, fragments: &[(EncryptionKey, &[u8])]) -> Vec<Vec<u8>> {
    let secrets: Vec<_> = fragments.iter().map(|_| SecretKey::generate(rng).to_bytes()).collect();
    let operations: Vec<_> = secrets
        .iter()
        .zip(fragments)
        .flat_map(|(secret, (recipient, _))| {
            [(&**secret, &BASE_POINT), (&**secret, recipient.as_bytes())]
        })
        .collect();
    let products = x25519(&operations);
    let (pairs, _) = products.as_chunks();
    pairs
        .iter()
        .zip(fragments)
        .map(|([ephemeral, shared], (recipient, fragment))| {
            seal(&box_key(shared, ephemeral, recipient.as_bytes()), ephemeral, fragment)
        })
        .collect()
}

/// Opens boxes that are for the key, in their order.
pub fn open_boxes(
    key: &SecretKey,
    boxes: &[&[u8]],
) -> Vec<Result<Zeroizing<Vec<u8>>, OpenBoxError>> {
    let secret = key.to_bytes();
    let public = key.public_key();
    let split: Vec<_> = boxes.iter().map(|sealed| split_box(sealed)).collect();
    let operations: Vec<_> =
        split.iter().flatten().map(|(ephemeral, _)| (&*secret, *ephemeral)).collect();
    let products = x25519(&operations);
    let mut products = products.iter();
    split
        .iter()
        .map(|split| {
            let (ephemeral, sealed) = (*split)?;
            let shared = products.next().expect("one for each box that is long enough");
            if bool::from(shared.ct_eq(&[0; 32])) {
                return Err(OpenBoxError::LowOrder);
            }
            open(&box_key(shared, ephemeral, public.as_bytes()), sealed)
        })
        .collect()
}

fn split_box(sealed: &[u8]) -> Result<(&[u8; EPHEMERAL_KEY_LEN], &[u8]), OpenBoxError> {
    let too_short = OpenBoxError::TooShort(sealed.len());
    if sealed.len() < BOX_OVERHEAD {
        return Err(too_short);
    }
    sealed.split_first_chunk().ok_or(too_short)
}

fn box_key(shared: &[u8; 32], ephemeral: &[u8; 32], recipient: &[u8; 32]) -> LessSafeKey {
    let info: &[&[u8]] = &[LABEL, ephemeral, recipient];
    let secret = Salt::new(HKDF_SHA256, &[]).extract(shared);
    let key = secret
        .expand(info, &AES_256_GCM)
        .map(UnboundKey::from)
        .expect("the length of an AES key can be derived");
    LessSafeKey::new(key)
}

/// The key is used once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn seal(key: &LessSafeKey, ephemeral: &[u8; 32], fragment: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(fragment.len() + BOX_OVERHEAD);
    out.extend_from_slice(ephemeral);
    out.extend_from_slice(fragment);
    let tag = key
        .seal_in_place_separate_tag(nonce(), Aad::empty(), &mut out[EPHEMERAL_KEY_LEN..])
        .expect("a fragment is shorter than what the cipher can take");
    out.extend_from_slice(tag.as_ref());
    out
}

fn open(key: &LessSafeKey, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, OpenBoxError> {
    let mut bytes = Zeroizing::new(sealed.to_vec());
    key.open_in_place(nonce(), Aad::empty(), &mut bytes).map_err(|_| OpenBoxError::Tag)?;
    let len = bytes.len() - BOX_TAG_LEN;
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn pair(seed: u8) -> (SecretKey, EncryptionKey) {
        let secret = SecretKey::from_bytes([seed; 32]);
        let public = EncryptionKey::from_bytes(*secret.public_key().as_bytes()).unwrap();
        (secret, public)
    }

    fn sealed(public: EncryptionKey, fragment: &[u8]) -> Vec<u8> {
        seal_boxes(&mut StdRng::seed_from_u64(1), &[(public, fragment)]).remove(0)
    }

    #[test]
    fn several_boxes_are_sealed_and_opened_at_once() {
        let (secret, public) = pair(1);
        let (other_secret, other_public) = pair(2);
        let fragments: [(_, &[u8]); 3] = [(public, b"one"), (other_public, b"two"), (public, b"")];
        let boxes = seal_boxes(&mut StdRng::seed_from_u64(1), &fragments);
        let lens: Vec<_> = boxes.iter().map(Vec::len).collect();
        assert_eq!(lens, [51, 51, 48]);
        let boxes: Vec<_> = boxes.iter().map(Vec::as_slice).collect();
        let opened = open_boxes(&secret, &boxes);
        let expected = [Ok(b"one".to_vec()), Err(OpenBoxError::Tag), Ok(vec![])];
        assert_eq!(opened, expected.map(|opened| opened.map(Zeroizing::new)));
        assert_eq!(open_boxes(&other_secret, &boxes)[1].as_deref(), Ok(&b"two".to_vec()));
    }

    /// The key by HKDF as RFC 5869 spells it, with HMAC as RFC 2104 does.
    #[test]
    fn the_key_is_derived_as_documented() {
        use sha2::{Digest, Sha256};
        let hmac = |key: &[u8], message: &[u8]| -> Vec<u8> {
            let mut block = [0u8; 64];
            block[..key.len()].copy_from_slice(key);
            let inner = Sha256::digest([&block.map(|b| b ^ 0x36)[..], message].concat());
            Sha256::digest([&block.map(|b| b ^ 0x5c)[..], &inner[..]].concat()).to_vec()
        };
        let (secret, public) = pair(1);
        let bytes = sealed(public, b"fragment");
        let (ephemeral, rest) = bytes.split_at(32);
        let shared = x25519(&[(&secret.to_bytes(), ephemeral.try_into().unwrap())])[0];
        let info = [b"mixsocks message box v1\0", ephemeral, public.as_bytes(), &[1]].concat();
        let key = hmac(&hmac(&[], &shared), &info);
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap());
        let mut rest = rest.to_vec();
        assert_eq!(key.open_in_place(nonce(), Aad::empty(), &mut rest).unwrap(), b"fragment");
    }

    #[test]
    fn a_box_that_was_changed_anywhere_does_not_open() {
        let (secret, public) = pair(1);
        let bytes = sealed(public, b"fragment");
        for at in 0..bytes.len() {
            for bit in [1, 0x80] {
                let mut bytes = bytes.clone();
                bytes[at] ^= bit;
                assert_eq!(open_boxes(&secret, &[&bytes]), [Err(OpenBoxError::Tag)], "{at}");
            }
        }
    }

    #[test]
    fn a_key_of_low_order_and_boxes_that_are_too_short_are_refused() {
        let (secret, public) = pair(1);
        let mut low = sealed(public, b"fragment");
        low[..32].fill(0);
        assert_eq!(open_boxes(&secret, &[&low]), [Err(OpenBoxError::LowOrder)]);
        for len in 0..48 {
            let short = vec![9; len];
            assert_eq!(open_boxes(&secret, &[&short]), [Err(OpenBoxError::TooShort(len))]);
        }
    }

    #[test]
    fn no_two_boxes_are_alike() {
        let (_, public) = pair(1);
        let boxes =
            seal_boxes(&mut StdRng::seed_from_u64(1), &[(public, b"same"), (public, b"same")]);
        assert_ne!(boxes[0], boxes[1]);
    }
}
