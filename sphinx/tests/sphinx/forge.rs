//! Headers with valid MACs around anything: what a hostile sender can make.

use aes::Aes128;
use aes::cipher::{KeyIvInit, StreamCipher};
use ctr::Ctr64BE;
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use mixsocks_sphinx::{HEADER_LEN, Packet, SecretKey};
use sha2::Sha256;
use sphinx_packet::constants::{
    EXPANDED_SHARED_SECRET_HKDF_INFO, EXPANDED_SHARED_SECRET_HKDF_SALT,
};

pub(crate) const ROUTING_LEN: usize = 300;
pub(crate) const FORWARD: u8 = 1;
pub(crate) const FINAL: u8 = 2;

/// A packet for `hop` with the given group element and routing information, whose payload is zero.
pub(crate) fn packet(
    hop: &SecretKey,
    group_element: [u8; 32],
    routing: &[u8; ROUTING_LEN],
) -> Packet {
    let shared = x25519_dalek::x25519(*hop.to_bytes(), group_element);
    let hkdf = Hkdf::<Sha256>::new(Some(EXPANDED_SHARED_SECRET_HKDF_SALT), &shared);
    let mut keys = [0; 32];
    hkdf.expand(EXPANDED_SHARED_SECRET_HKDF_INFO, &mut keys).unwrap();
    let (stream_key, mac_key) = keys.split_at(16);

    let mut encrypted = *routing;
    Ctr64BE::<Aes128>::new_from_slices(stream_key, &[0; 16])
        .unwrap()
        .apply_keystream(&mut encrypted);
    let mac = Hmac::<Sha256>::new_from_slice(mac_key)
        .unwrap()
        .chain_update(encrypted)
        .finalize()
        .into_bytes();

    let bytes = [&group_element[..], &mac[..16], &encrypted, &[0; 64]].concat();
    Packet::from_bytes(bytes, 64).unwrap()
}

/// Routing information with a flag and the three bytes of a version; the rest is zero.
pub(crate) fn routing(flag: u8, version: [u8; 3]) -> [u8; ROUTING_LEN] {
    let mut routing = [0; ROUTING_LEN];
    routing[0] = flag;
    routing[1..4].copy_from_slice(&version);
    routing
}

const _: () = assert!(HEADER_LEN == 32 + 16 + ROUTING_LEN);
