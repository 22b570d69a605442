//! What sender and hop derive from the secret that they share, and the header's two ciphers.

use aes::Aes128;
use aes::cipher::{KeyIvInit, StreamCipher};
use ctr::Ctr64BE;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use sphinx_packet::constants::{
    BLINDING_FACTOR_SIZE, EXPANDED_SHARED_SECRET_HKDF_INFO, EXPANDED_SHARED_SECRET_HKDF_SALT,
    EXPANDED_SHARED_SECRET_LENGTH, HEADER_INTEGRITY_MAC_SIZE, INTEGRITY_MAC_KEY_SIZE,
    PAYLOAD_KEY_SIZE,
};
use sphinx_packet::crypto::STREAM_CIPHER_KEY_SIZE;
use zeroize::ZeroizeOnDrop;

use crate::payload_layers::Seed;
use crate::wiped::Wiped;
use crate::{HEADER_LEN, MAX_HOPS, REPLAY_TAG_LEN, hkdf};

pub(crate) const GROUP_ELEMENT_LEN: usize = 32;
pub(crate) const MAC_LEN: usize = HEADER_INTEGRITY_MAC_SIZE;
/// Encrypted routing information.
pub(crate) const ROUTING_LEN: usize = HEADER_LEN - GROUP_ELEMENT_LEN - MAC_LEN;
/// Bytes of routing information that one hop takes off.
pub(crate) const STEP: usize = ROUTING_LEN / MAX_HOPS;
/// Key stream for a header and the step that a hop appends.
pub(crate) const STREAM_LEN: usize = ROUTING_LEN + STEP;

/// Offsets in what a shared secret is expanded to.
const MAC_KEY_AT: usize = STREAM_CIPHER_KEY_SIZE;
const SEED_AT: usize = MAC_KEY_AT + INTEGRITY_MAC_KEY_SIZE;
const BLINDING_AT: usize = SEED_AT + PAYLOAD_KEY_SIZE;
const REPLAY_TAG_AT: usize = BLINDING_AT + BLINDING_FACTOR_SIZE;
const LEN: usize = REPLAY_TAG_AT + REPLAY_TAG_LEN;

const _: () = assert!(LEN == EXPANDED_SHARED_SECRET_LENGTH);

/// What one hop derives from its shared secret. Wiped when dropped; moving it leaves no copy behind.
pub(crate) struct HopSecrets(Box<Wiped<LEN>>);

impl HopSecrets {
    /// What each shared secret gives.
    pub(crate) fn derive(shared_secrets: &[[u8; 32]]) -> Vec<Self> {
        let secrets: Vec<_> = shared_secrets.iter().map(|secret| &secret[..]).collect();
        let derived: Vec<Wiped<LEN>> = hkdf::derive(
            EXPANDED_SHARED_SECRET_HKDF_SALT,
            &secrets,
            EXPANDED_SHARED_SECRET_HKDF_INFO,
        );
        // Not by value: what is moved out of the vector would stay there unwiped.
        let boxed = derived.iter().map(|derived| {
            let mut secrets = Box::new(Wiped::zero());
            secrets.copy_from_slice(&derived[..]);
            Self(secrets)
        });
        boxed.collect()
    }

    /// Fills `stream` with what routing information is encrypted with.
    pub(crate) fn write_stream(&self, stream: &mut [u8; STREAM_LEN]) {
        let key: &[u8; STREAM_CIPHER_KEY_SIZE] = self.part(0);
        stream.fill(0);
        Ctr64BE::<Aes128>::new(key.into(), &[0; 16].into()).apply_keystream(stream);
    }

    pub(crate) fn mac(&self, routing: &[u8; ROUTING_LEN]) -> [u8; MAC_LEN] {
        let tag = self.hmac(routing).finalize().into_bytes();
        *tag.first_chunk().expect("a tag is longer than a MAC")
    }

    /// Whether the MAC is right; how long that takes does not depend on where it is wrong.
    pub(crate) fn verify(&self, routing: &[u8; ROUTING_LEN], mac: &[u8; MAC_LEN]) -> bool {
        self.hmac(routing).verify_truncated_left(mac).is_ok()
    }

    /// What the key of the payload's layer is made from.
    pub(crate) fn payload_seed(&self) -> &Seed {
        self.part(SEED_AT)
    }

    /// What the group element is multiplied by for the next hop.
    pub(crate) fn blinding_factor(&self) -> &[u8; BLINDING_FACTOR_SIZE] {
        self.part(BLINDING_AT)
    }

    pub(crate) fn replay_tag(&self) -> &[u8; REPLAY_TAG_LEN] {
        self.part(REPLAY_TAG_AT)
    }

    fn hmac(&self, routing: &[u8; ROUTING_LEN]) -> Hmac<Sha256> {
        Hmac::new_from_slice(&self.0[MAC_KEY_AT..SEED_AT])
            .expect("HMAC takes keys of any length")
            .chain_update(routing)
    }

    fn part<const N: usize>(&self, offset: usize) -> &[u8; N] {
        self.0[offset..].first_chunk().expect("offsets are constants that leave enough bytes")
    }
}

/// The bytes inside wipe themselves.
impl ZeroizeOnDrop for HopSecrets {}

pub(crate) fn xor(bytes: &mut [u8], stream: &[u8]) {
    for (byte, key) in bytes.iter_mut().zip(stream) {
        *byte ^= key;
    }
}
