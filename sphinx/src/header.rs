//! Headers as their sender builds them: one multiplication of a point per hop.
//!
//! The paper's sender multiplies each hop's key by its secret and by every blinding factor before
//! that hop, one after the other: 15 multiplications for five hops. All of them are scalars, so we
//! multiply the scalars instead, and the point once. For a key of the prime-order subgroup, which
//! every key that was made as RFC 7748 says belongs to, the results are equal: multiples of such a
//! point depend on the scalar modulo the group's order alone. Another key's holder could not read
//! what was sent to it; that is its own loss.

use aes::Aes128;
use aes::cipher::{KeyIvInit, StreamCipher};
use ctr::Ctr64BE;
use curve25519_dalek::scalar::{Scalar, clamp_integer};
use curve25519_dalek::{EdwardsPoint, MontgomeryPoint};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use rand::CryptoRng;
use sha2::Sha256;
use sphinx_packet::constants::{
    BLINDING_FACTOR_SIZE, EXPANDED_SHARED_SECRET_HKDF_INFO, EXPANDED_SHARED_SECRET_HKDF_SALT,
    HEADER_INTEGRITY_MAC_SIZE, INTEGRITY_MAC_KEY_SIZE, PAYLOAD_KEY_SEED_SIZE, PAYLOAD_KEY_SIZE,
};
use sphinx_packet::crypto::STREAM_CIPHER_KEY_SIZE;
use sphinx_packet::header::routing::{FINAL_HOP, FORWARD_HOP};
use zeroize::{Zeroize, Zeroizing};

use crate::{HEADER_LEN, MAX_HOPS, Route, VERSION};

/// Bytes of routing information that one hop takes off.
const STEP: usize = ROUTING_LEN / MAX_HOPS;
const ROUTING_LEN: usize = HEADER_LEN - 32 - HEADER_INTEGRITY_MAC_SIZE;
/// Key stream for a header and the step that a hop appends.
const STREAM_LEN: usize = ROUTING_LEN + STEP;

const PADDING_INFO: &[u8] = b"mixsocks sphinx padding v1";

/// Offsets in what a shared secret is expanded to.
const MAC_KEY_AT: usize = STREAM_CIPHER_KEY_SIZE;
const SEED_AT: usize = MAC_KEY_AT + INTEGRITY_MAC_KEY_SIZE;
const BLINDING_AT: usize = SEED_AT + PAYLOAD_KEY_SIZE;
const EXPANDED_LEN: usize = BLINDING_AT + BLINDING_FACTOR_SIZE;

/// A header, and the seed of each hop's payload key in the order of the route.
pub(crate) struct Header {
    pub(crate) bytes: Box<[u8; HEADER_LEN]>,
    pub(crate) seeds: Zeroizing<Vec<[u8; PAYLOAD_KEY_SEED_SIZE]>>,
}

/// What one hop derives from its shared secret.
type Expanded = Zeroizing<[u8; EXPANDED_LEN]>;

/// Builds the header of a route. Takes 32 bytes of `rng`, which decide all of it.
pub(crate) fn build_header<R: CryptoRng + ?Sized>(rng: &mut R, route: &Route) -> Header {
    let mut secret = Zeroizing::new([0; 32]);
    rng.fill_bytes(secret.as_mut());
    let (group_element, expanded) = expand(&secret, route);
    let streams: Vec<_> = expanded.iter().map(stream).collect();

    let mut routing = last_routing(&secret, route, &streams);
    let (last, forwarding) = expanded.split_last().expect("a route has a hop");
    let mut mac = mac(last, &routing);
    let hops = route.nodes().iter().skip(1).zip(route.delays()).zip(forwarding).zip(&streams);
    for (((next, delay), keys), stream) in hops.rev() {
        routing.copy_within(..ROUTING_LEN - STEP, STEP);
        write_forward(&mut routing, &next.address.to_bytes(), &delay.to_bytes(), &mac);
        xor(&mut routing, stream);
        mac = self::mac(keys, &routing);
    }

    let mut bytes = Box::new([0; HEADER_LEN]);
    bytes[..32].copy_from_slice(&group_element);
    bytes[32..32 + HEADER_INTEGRITY_MAC_SIZE].copy_from_slice(&mac);
    bytes[32 + HEADER_INTEGRITY_MAC_SIZE..].copy_from_slice(&routing);
    let seeds = expanded.iter().map(|keys| array(&keys[SEED_AT..])).collect();
    Header { bytes, seeds: Zeroizing::new(seeds) }
}

/// The first group element, and what each hop derives.
fn expand(secret: &[u8; 32], route: &Route) -> ([u8; 32], Vec<Expanded>) {
    let group_element = EdwardsPoint::mul_base_clamped(*secret).to_montgomery().to_bytes();
    let mut product = Scalar::from_bytes_mod_order(clamp_integer(*secret));
    let expanded = route
        .nodes()
        .iter()
        .map(|node| {
            let shared =
                Zeroizing::new((MontgomeryPoint(node.pub_key.to_bytes()) * product).to_bytes());
            let hkdf = Hkdf::<Sha256>::new(Some(EXPANDED_SHARED_SECRET_HKDF_SALT), shared.as_ref());
            let mut keys = Zeroizing::new([0; EXPANDED_LEN]);
            hkdf.expand(EXPANDED_SHARED_SECRET_HKDF_INFO, keys.as_mut())
                .expect("HKDF-SHA256 gives up to 8,160 bytes");
            product *= Scalar::from_bytes_mod_order(clamp_integer(array(&keys[BLINDING_AT..])));
            keys
        })
        .collect();
    product.zeroize();
    (group_element, expanded)
}

/// What the last hop finds: flag, version, destination, identifier, padding, all encrypted; and
/// behind it what the hops before it will have appended.
fn last_routing(
    secret: &[u8; 32],
    route: &Route,
    streams: &[[u8; STREAM_LEN]],
) -> [u8; ROUTING_LEN] {
    let (last, forwarding) = streams.split_last().expect("a route has a hop");
    let own_len = ROUTING_LEN - STEP * forwarding.len();
    let mut routing = [0; ROUTING_LEN];
    let destination = route.destination();
    let fields = [
        &[FINAL_HOP][..],
        &VERSION.to_bytes(),
        destination.address.as_bytes_ref(),
        &destination.identifier,
    ]
    .concat();
    routing[..fields.len()].copy_from_slice(&fields);
    // Random padding (Kuhn et al.), from the packet's secret: to everyone else it is random.
    Hkdf::<Sha256>::new(None, secret)
        .expand(PADDING_INFO, &mut routing[fields.len()..own_len])
        .expect("HKDF-SHA256 gives up to 8,160 bytes");
    xor(&mut routing[..own_len], last);

    // Each hop appends a step of zeros and decrypts; the filler is what becomes of those steps.
    let mut filler = Vec::with_capacity(STEP * forwarding.len());
    for stream in forwarding {
        filler.extend_from_slice(&[0; STEP]);
        let from = STREAM_LEN - filler.len();
        xor(&mut filler, &stream[from..]);
    }
    routing[own_len..].copy_from_slice(&filler);
    routing
}

fn write_forward(
    routing: &mut [u8; ROUTING_LEN],
    next: &[u8; 32],
    delay: &[u8; 8],
    mac: &[u8; HEADER_INTEGRITY_MAC_SIZE],
) {
    let step = [&[FORWARD_HOP][..], &VERSION.to_bytes(), next, delay, mac].concat();
    routing[..STEP].copy_from_slice(&step);
}

fn stream(keys: &Expanded) -> [u8; STREAM_LEN] {
    let mut stream = [0; STREAM_LEN];
    let key: [u8; STREAM_CIPHER_KEY_SIZE] = array(&keys[..]);
    Ctr64BE::<Aes128>::new(&key.into(), &[0; 16].into()).apply_keystream(&mut stream);
    stream
}

fn mac(keys: &Expanded, routing: &[u8; ROUTING_LEN]) -> [u8; HEADER_INTEGRITY_MAC_SIZE] {
    let tag = Hmac::<Sha256>::new_from_slice(&keys[MAC_KEY_AT..SEED_AT])
        .expect("HMAC takes keys of any length")
        .chain_update(routing)
        .finalize()
        .into_bytes();
    array(&tag)
}

fn xor(bytes: &mut [u8], stream: &[u8]) {
    for (byte, key) in bytes.iter_mut().zip(stream) {
        *byte ^= key;
    }
}

/// The first `N` bytes.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    *bytes.first_chunk().expect("offsets are constants that leave enough bytes")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use sphinx_packet::header::keys::KeyMaterial;

    use super::*;
    use crate::{Hop, SecretKey};

    #[test]
    fn one_multiplication_per_hop_gives_the_secrets_of_the_chain() {
        let mut rng = StdRng::seed_from_u64(1);
        for hops in 1..=MAX_HOPS {
            for _ in 0..20 {
                let mut hop = || Hop {
                    address: [1; 32],
                    key: SecretKey::generate(&mut rng).public_key(),
                    delay: Duration::ZERO,
                };
                let hops: Vec<Hop> = (0..hops).map(|_| hop()).collect();
                let route = Route::new(&hops, [2; 32], [3; 16]).expect("a route");
                let mut secret = [0; 32];
                rand::Rng::fill_bytes(&mut rng, &mut secret);
                let chain = KeyMaterial::derive(route.nodes(), &secret.into());
                let (group_element, expanded) = expand(&secret, &route);
                assert_eq!(group_element, chain.initial_shared_secret.to_bytes());
                for (ours, theirs) in expanded.iter().zip(&chain.expanded_shared_secrets) {
                    assert_eq!(&ours[SEED_AT..SEED_AT + 16], theirs.payload_key_seed());
                }
                assert_eq!(expanded.len(), chain.expanded_shared_secrets.len());
            }
        }
    }
}
