//! Headers as their sender builds them: one multiplication of a point per hop.
//!
//! The paper's sender multiplies each hop's key by its secret and by every blinding factor before
//! that hop, one after the other: 15 multiplications for five hops. We multiply the scalars instead,
//! and the point once. That gives the same because
//!
//! - a multiple of a point of the prime-order subgroup depends on the scalar modulo the group's
//!   prime order ℓ alone, so the product of the scalars may be reduced; [`PublicKey`](crate::PublicKey)
//!   refuses every other point;
//! - X25519 computes in u-coordinates, which a point shares with its negative, so the product may
//!   have the other sign;
//! - of a number s modulo ℓ and its negative, one has an eightfold, taken as a number below 8ℓ, that
//!   X25519's clamping leaves as it is: a multiple of 8 of 255 bits. So we keep an eighth of the
//!   product modulo ℓ.
//!
//! The hops of one packet follow each other, because the product needs the blinding factors of the
//! hops before. So a batch does the first hops of all packets, then the second ones, and so on.

use curve25519_dalek::scalar::{Scalar, clamp_integer};
use hkdf::Hkdf;
use rand::CryptoRng;
use sha2::Sha256;
use sphinx_packet::header::routing::{FINAL_HOP, FORWARD_HOP};
use subtle::{Choice, ConditionallySelectable};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::payload_layers::Seed;
use crate::secrets::{GROUP_ELEMENT_LEN, HopSecrets, MAC_LEN, ROUTING_LEN, STEP, STREAM_LEN, xor};
use crate::wiped::Wiped;
use crate::x25519::{self, x25519};
use crate::{Backend, HEADER_LEN, Route, VERSION, reference};

const PADDING_INFO: &[u8] = b"mixsocks sphinx padding v1";

/// A header, and the seed of each hop's payload key in the order of the route. Wiped when dropped;
/// moving it leaves no copy behind.
pub(crate) struct Header {
    pub(crate) bytes: Box<Wiped<HEADER_LEN>>,
    pub(crate) seeds: Zeroizing<Vec<Seed>>,
}

/// The parts inside wipe themselves.
impl ZeroizeOnDrop for Header {}

/// Builds the header of each route. Takes 32 bytes of `rng` for each, which decide all of it.
pub(crate) fn build_headers<R: CryptoRng + ?Sized>(rng: &mut R, routes: &[&Route]) -> Vec<Header> {
    let mut secrets = Zeroizing::new(vec![[0; 32]; routes.len()]);
    secrets.iter_mut().for_each(|secret| rng.fill_bytes(secret));
    let requests = secrets.iter().zip(routes.iter().copied());
    if Backend::current() == Backend::Reference {
        return requests.map(|(secret, route)| reference::build_header(secret, route)).collect();
    }
    let hops = derive_secrets(&secrets, routes);
    requests.zip(hops).map(|((secret, route), hops)| wrap(secret, route, &hops)).collect()
}

/// What each hop of each route derives, in the order of the routes.
fn derive_secrets(secrets: &[[u8; 32]], routes: &[&Route]) -> Vec<Vec<HopSecrets>> {
    let mut products: Vec<_> = secrets.iter().map(Product::new).collect();
    let mut derived: Vec<Vec<HopSecrets>> =
        routes.iter().map(|route| Vec::with_capacity(route.nodes().len())).collect();
    let longest = routes.iter().map(|route| route.nodes().len()).max().unwrap_or(0);
    for hop in 0..longest {
        let scalars: Vec<_> = products.iter().map(Product::to_scalar).collect();
        let (numbers, operations): (Vec<_>, Vec<_>) = routes
            .iter()
            .enumerate()
            .filter_map(|(number, route)| {
                let node = route.nodes().get(hop)?;
                Some((number, (&*scalars[number], node.pub_key.as_bytes())))
            })
            .unzip();
        for (number, secrets) in numbers.into_iter().zip(HopSecrets::derive(&x25519(&operations))) {
            products[number].multiply(secrets.blinding_factor());
            derived[number].push(secrets);
        }
    }
    derived
}

/// A product of clamped scalars: an eighth of it modulo the group's order. Wiped when dropped.
struct Product(Scalar);

impl Product {
    fn new(secret: &[u8; 32]) -> Self {
        let mut clamped = Zeroizing::new(clamp_integer(*secret));
        // A clamped scalar is a multiple of 8.
        for i in 0..32 {
            let next = clamped.get(i + 1).map_or(0, |next| next << 5);
            clamped[i] = clamped[i] >> 3 | next;
        }
        Self(Scalar::from_bytes_mod_order(*clamped))
    }

    fn multiply(&mut self, factor: &[u8; 32]) {
        self.0 *= Scalar::from_bytes_mod_order(clamp_integer(*factor));
    }

    /// The product, or its negative, as a scalar that clamping does not change.
    fn to_scalar(&self) -> Zeroizing<[u8; 32]> {
        // ℓ is 2^252 and a little, so bit 251 is set in a number or its negative modulo ℓ, and the
        // next ones are not. (Or it lies below that little or above 2^252: one in 2^126 does.)
        let bit_251 = self.0.as_bytes()[31] >> 3 & 1;
        let mut eighth = Scalar::conditional_select(&-self.0, &self.0, Choice::from(bit_251));
        let mut scalar = Zeroizing::new(eighth.to_bytes());
        eighth.zeroize();
        for i in (0..32).rev() {
            let before = if i == 0 { 0 } else { scalar[i - 1] >> 5 };
            scalar[i] = scalar[i] << 3 | before;
        }
        scalar
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl ZeroizeOnDrop for Product {}

/// Wraps what each hop is told into the layers of the hops before.
fn wrap(secret: &[u8; 32], route: &Route, hops: &[HopSecrets]) -> Header {
    let mut streams = Zeroizing::new(vec![[0; STREAM_LEN]; hops.len()]);
    for (stream, secrets) in streams.iter_mut().zip(hops) {
        secrets.write_stream(stream);
    }
    let mut routing = last_routing(secret, route, &streams);
    let (last, forwarding) = hops.split_last().expect("a route has a hop");
    let mut mac = last.mac(&routing);
    let steps = route.nodes().iter().skip(1).zip(route.delays()).zip(forwarding).zip(&*streams);
    for (((next, delay), secrets), stream) in steps.rev() {
        routing.copy_within(..ROUTING_LEN - STEP, STEP);
        write_forward(&mut routing, &next.address.to_bytes(), &delay.to_bytes(), &mac);
        xor(&mut routing, stream);
        mac = secrets.mac(&routing);
    }

    let mut bytes = Box::new(Wiped::<HEADER_LEN>::zero());
    bytes[..GROUP_ELEMENT_LEN].copy_from_slice(&x25519::public_key(secret));
    bytes[GROUP_ELEMENT_LEN..][..MAC_LEN].copy_from_slice(&mac);
    bytes[GROUP_ELEMENT_LEN + MAC_LEN..].copy_from_slice(&routing);
    let mut seeds = Zeroizing::new(vec![Seed::default(); hops.len()]);
    for (seed, secrets) in seeds.iter_mut().zip(hops) {
        seed.copy_from_slice(secrets.payload_seed());
    }
    Header { bytes, seeds }
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
    mac: &[u8; MAC_LEN],
) {
    let step = [&[FORWARD_HOP][..], &VERSION.to_bytes(), next, delay, mac].concat();
    routing[..STEP].copy_from_slice(&step);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use curve25519_dalek::constants::ED25519_BASEPOINT_POINT;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use sphinx_packet::header::keys::KeyMaterial;

    use super::*;
    use crate::{Hop, MAX_HOPS, SecretKey};

    const fn assert_wiped<T: ZeroizeOnDrop>() {}
    const _: () = assert_wiped::<Product>();

    #[test]
    fn one_multiplication_per_hop_gives_the_secrets_of_the_chain() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..20 {
            // Routes of all lengths in one batch.
            let routes: Vec<_> = (1..=MAX_HOPS)
                .map(|hops| {
                    let mut hop = || Hop {
                        address: [1; 32],
                        key: SecretKey::generate(&mut rng).public_key(),
                        delay: Duration::ZERO,
                    };
                    let hops: Vec<Hop> = (0..hops).map(|_| hop()).collect();
                    Route::new(&hops, [2; 32], [3; 16]).expect("a route")
                })
                .collect();
            let mut secrets = vec![[0; 32]; routes.len()];
            secrets.iter_mut().for_each(|secret| rng.fill_bytes(secret));
            let derived = derive_secrets(&secrets, &routes.iter().collect::<Vec<_>>());
            for ((secret, route), ours) in secrets.iter().zip(&routes).zip(derived) {
                let chain = KeyMaterial::derive(route.nodes(), &(*secret).into());
                assert_eq!(x25519::public_key(secret), chain.initial_shared_secret.to_bytes());
                assert_eq!(ours.len(), chain.expanded_shared_secrets.len());
                for (ours, theirs) in ours.iter().zip(&chain.expanded_shared_secrets) {
                    assert_eq!(ours.payload_seed(), theirs.payload_key_seed());
                    assert_eq!(ours.replay_tag(), theirs.replay_tag());
                }
            }
        }
    }

    #[test]
    fn a_product_is_clamped_and_up_to_its_sign_the_product() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut signs = [false; 2];
        for _ in 0..200 {
            let mut factors = [[0; 32]; 3];
            factors.iter_mut().for_each(|factor| rng.fill_bytes(factor));
            let mut product = Product::new(&factors[0]);
            product.multiply(&factors[1]);
            product.multiply(&factors[2]);
            let scalar = *product.to_scalar();
            assert_eq!(clamp_integer(scalar), scalar);
            let expected: Scalar = factors
                .iter()
                .map(|factor| Scalar::from_bytes_mod_order(clamp_integer(*factor)))
                .product();
            let scalar = Scalar::from_bytes_mod_order(scalar);
            assert!(scalar == expected || scalar == -expected);
            signs[usize::from(scalar == expected)] = true;
            assert_eq!(
                (ED25519_BASEPOINT_POINT * scalar).to_montgomery(),
                (ED25519_BASEPOINT_POINT * expected).to_montgomery()
            );
        }
        assert_eq!(signs, [true; 2]);
    }
}
