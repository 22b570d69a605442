//! Single-use reply blocks: headers made in advance, which let others reply without knowing where.
//!
//! The creator of a SURB is the last hop of its route. It keeps a [`ReplyRecovery`], hands out the
//! [`Surb`], and finds the reply by the identifier that the last hop is given. The holder seals its
//! plaintext with the one seed in the SURB; each hop, the last included, then takes a layer "off";
//! the creator, who alone knows the seeds of all hops, puts those layers back and opens the seal.
//!
//! The seal is that of the last hop alone, so a last hop other than the creator could open replies:
//! never let a gateway be the last hop of a SURB. On a route of a single hop its layer and the seal
//! cancel out: that hop reads the reply without the recovery.

use std::fmt;

use rand::CryptoRng;
use sphinx_packet::SurbReplyRecovery;
use thiserror::Error;
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::header::{Header, build_headers};
use crate::key::is_low_order;
use crate::payload_layers::{self, Seed};
use crate::{
    BuildError, HEADER_LEN, HOP_ADDRESS_LEN, HopAddress, IDENTIFIER_LEN, Identifier,
    MIN_PAYLOAD_LEN, Packet, Payload, PayloadError, Route, SURB_LEN, max_plaintext,
};

/// A block that lets its holder send one reply. Wiped when dropped, and used only once: using it
/// twice would let hops link the replies (and the second one is dropped as a replay).
///
/// | offset | length | field |
/// |--:|--:|---|
/// | 0 | 348 | header |
/// | 348 | 32 | address of the first hop |
/// | 380 | 16 | seed of the key that the reply is sealed with |
pub struct Surb(Box<Zeroizing<[u8; SURB_LEN]>>);

/// Why bytes are no [`Surb`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SurbError {
    /// The group element of its header is a point of low order.
    #[error("the SURB's group element is a point of low order")]
    LowOrderPoint,
}

/// Why a SURB cannot be used. It is the caller's fault, and the SURB is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UseSurbError {
    /// The network's payloads are shorter than [`MIN_PAYLOAD_LEN`].
    #[error("a payload of {payload_len} bytes is shorter than {MIN_PAYLOAD_LEN}")]
    PayloadTooShort {
        /// The length of payloads that the caller asked for.
        payload_len: usize,
    },
    /// The plaintext does not fit the payload.
    #[error("a plaintext of {len} bytes is longer than {max}")]
    PlaintextTooLong {
        /// The length of the plaintext.
        len: usize,
        /// The longest plaintext that fits.
        max: usize,
    },
}

/// What the creator of a SURB keeps in order to read the reply. Wiped when dropped.
pub struct ReplyRecovery {
    identifier: Identifier,
    /// Of the payload's layers, in the order of the route.
    seeds: Zeroizing<Vec<Seed>>,
}

/// Why a reply cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecoverError {
    /// It was changed on the way, is malformed, or belongs to another SURB.
    #[error("the reply cannot be opened")]
    Unreadable(#[from] PayloadError),
}

impl Surb {
    /// Takes the bytes of a SURB. Whether its header is worth anything only the hops can tell.
    ///
    /// # Errors
    ///
    /// See [`SurbError`].
    pub fn from_bytes(bytes: &[u8; SURB_LEN]) -> Result<Self, SurbError> {
        let group_element = bytes.first_chunk().expect("a SURB starts with a header");
        if is_low_order(group_element) {
            return Err(SurbError::LowOrderPoint);
        }
        Ok(Self(Box::new(Zeroizing::new(*bytes))))
    }

    /// The bytes to hand to whoever is to reply.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; SURB_LEN] {
        &self.0
    }

    /// The address of the hop that the reply is to be sent to.
    #[must_use]
    pub fn first_hop(&self) -> HopAddress {
        *self.0[HEADER_LEN..]
            .first_chunk::<HOP_ADDRESS_LEN>()
            .expect("the address of the first hop follows the header")
    }

    fn header(&self) -> &[u8; HEADER_LEN] {
        self.0.first_chunk().expect("a SURB starts with a header")
    }

    fn seed(&self) -> &Seed {
        self.0.last_chunk().expect("a SURB ends with a seed")
    }
}

/// The bytes inside wipe themselves.
impl ZeroizeOnDrop for Surb {}

/// Shows nothing of the SURB.
impl fmt::Debug for Surb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surb").finish_non_exhaustive()
    }
}

impl ReplyRecovery {
    /// The identifier that the last hop, which is the creator, is given with the reply.
    #[must_use]
    pub fn identifier(&self) -> Identifier {
        self.identifier
    }

    /// The same again: for measurements only, as a reply is read once.
    pub(crate) fn copy(&self) -> Self {
        Self { identifier: self.identifier, seeds: self.seeds.clone() }
    }

    /// The same for the crate `sphinx-packet`.
    pub(crate) fn to_reference(&self) -> SurbReplyRecovery {
        let bytes = [&self.identifier[..], self.seeds.as_flattened()].concat();
        SurbReplyRecovery::from_bytes(&Zeroizing::new(bytes))
            .expect("an identifier and a seed for each hop")
    }
}

/// The recovery inside wipes itself.
impl ZeroizeOnDrop for ReplyRecovery {}

/// Shows nothing of the recovery.
impl fmt::Debug for ReplyRecovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyRecovery").finish_non_exhaustive()
    }
}

/// Builds one SURB for each route, which must end at the caller.
///
/// Each SURB takes exactly 32 bytes from `rng`; see the [crate's documentation](crate) for what
/// they decide and what they do not.
///
/// # Errors
///
/// Per route: [`BuildError::ZeroIdentifier`].
pub fn build_surbs<R: CryptoRng + ?Sized>(
    rng: &mut R,
    routes: &[Route],
) -> Vec<Result<(Surb, ReplyRecovery), BuildError>> {
    let is_named = |route: &&Route| route.identifier() != [0; IDENTIFIER_LEN];
    let named: Vec<_> = routes.iter().filter(is_named).collect();
    let mut headers = build_headers(rng, &named).into_iter();
    routes
        .iter()
        .map(|route| {
            if !is_named(&route) {
                return Err(BuildError::ZeroIdentifier);
            }
            Ok(surb(route, headers.next().expect("one for each that is named")))
        })
        .collect()
}

fn surb(route: &Route, header: Header) -> (Surb, ReplyRecovery) {
    let mut inline = Box::new(Zeroizing::new([0; SURB_LEN]));
    inline[..HEADER_LEN].copy_from_slice(&header.bytes[..]);
    inline[HEADER_LEN..HEADER_LEN + HOP_ADDRESS_LEN].copy_from_slice(&route.first_hop());
    let seed = header.seeds.last().expect("a route has a hop");
    inline[HEADER_LEN + HOP_ADDRESS_LEN..].copy_from_slice(seed);
    (Surb(inline), ReplyRecovery { identifier: route.identifier(), seeds: header.seeds })
}

/// Makes one reply packet of each SURB and plaintext, with payloads of `payload_len` bytes, and
/// says which hop to send it to.
///
/// The SURB is spent even if its request is refused; [`max_plaintext`] tells what fits.
///
/// # Errors
///
/// Per request: see [`UseSurbError`].
pub fn use_surbs(
    payload_len: usize,
    requests: Vec<(Surb, &[u8])>,
) -> Vec<Result<(HopAddress, Packet), UseSurbError>> {
    let mut used: Vec<_> = requests
        .into_iter()
        .map(|(surb, plaintext)| {
            check_lengths(payload_len, plaintext)?;
            let packet = Packet::new(surb.header(), payload_len, plaintext);
            Ok((surb, packet))
        })
        .collect();
    let mut payloads: Vec<_> = used
        .iter_mut()
        .flatten()
        .map(|(surb, packet)| (std::slice::from_ref(surb.seed()), packet.payload_mut()))
        .collect();
    payload_layers::add(&mut payloads);
    used.into_iter().map(|used| used.map(|(surb, packet)| (surb.first_hop(), packet))).collect()
}

fn check_lengths(payload_len: usize, plaintext: &[u8]) -> Result<(), UseSurbError> {
    if payload_len < MIN_PAYLOAD_LEN {
        return Err(UseSurbError::PayloadTooShort { payload_len });
    }
    let max = max_plaintext(payload_len);
    if plaintext.len() > max {
        return Err(UseSurbError::PlaintextTooLong { len: plaintext.len(), max });
    }
    Ok(())
}

/// Opens replies with what was kept of their SURBs.
///
/// Each hop took off a layer of its own; the last hop, which is the caller, has left its layer
/// where it was. So the others are put back, the last one first, and then the seal is open to view:
/// one pass of the cipher per hop.
///
/// # Errors
///
/// Per request: see [`RecoverError`].
pub fn recover_replies(
    requests: Vec<(ReplyRecovery, Payload)>,
) -> Vec<Result<Vec<u8>, RecoverError>> {
    let (recoveries, mut packets): (Vec<_>, Vec<_>) =
        requests.into_iter().map(|(recovery, payload)| (recovery, payload.into_packet())).unzip();
    let (seals, mut layers): (Vec<_>, Vec<_>) = recoveries
        .iter()
        .zip(&mut packets)
        .map(|(recovery, packet)| {
            let (seal, others) = recovery.seeds.split_last().expect("a route has a hop");
            (seal, (others, packet.payload_mut()))
        })
        .unzip();
    payload_layers::add(&mut layers);
    payload_layers::remove(seals.into_iter().zip(layers.into_iter().map(|(_, payload)| payload)));
    packets.into_iter().map(|packet| Ok(packet.into_plaintext()?)).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use sphinx_packet::SURB;

    use super::*;
    use crate::{Hop, SecretKey};

    const fn assert_wiped<T: ZeroizeOnDrop>() {}
    const _: () = assert_wiped::<Zeroizing<[u8; SURB_LEN]>>();
    const _: () = assert_wiped::<Zeroizing<Vec<Seed>>>();

    fn route(identifier: Identifier) -> Route {
        let hop = Hop {
            address: [0xcd; 32],
            key: SecretKey::from_bytes([7; 32]).public_key(),
            delay: Duration::ZERO,
        };
        Route::new(&[hop], [0; 32], identifier).unwrap()
    }

    #[test]
    fn a_zero_identifier_is_refused_and_its_neighbours_are_not() {
        let mut rng = StdRng::seed_from_u64(1);
        let routes = [route([1; 16]), route([0; 16]), route([2; 16])];
        let [first, second, third] = build_surbs(&mut rng, &routes).try_into().unwrap();
        assert_eq!(first.unwrap().1.identifier(), [1; 16]);
        assert_eq!(second.unwrap_err(), BuildError::ZeroIdentifier);
        assert_eq!(third.unwrap().1.identifier(), [2; 16]);
    }

    #[test]
    fn a_surb_survives_its_bytes() {
        let mut rng = StdRng::seed_from_u64(2);
        let surbs = build_surbs(&mut rng, &[route([1; 16])]);
        let (surb, _) = surbs.into_iter().next().unwrap().unwrap();
        let read = Surb::from_bytes(surb.as_bytes()).unwrap();
        assert_eq!(read.as_bytes(), surb.as_bytes());
        assert_eq!(read.first_hop(), [0xcd; 32]);
        // The layout is that of the crate below.
        let same = SURB::from_bytes(surb.as_bytes()).unwrap();
        assert_eq!(same.first_hop().to_bytes(), [0xcd; 32]);
        assert_eq!(same.materials_count(), 1);
    }

    #[test]
    fn using_a_surb_gives_the_packet_of_the_crate_below() {
        let mut rng = StdRng::seed_from_u64(3);
        let surbs = build_surbs(&mut rng, &[route([1; 16])]);
        let (surb, _) = surbs.into_iter().next().unwrap().unwrap();
        let (expected, _) =
            SURB::from_bytes(surb.as_bytes()).unwrap().use_surb(b"a reply", 64).unwrap();
        let (_, packet) = use_surbs(64, vec![(surb, b"a reply")]).remove(0).unwrap();
        assert_eq!(packet.into_bytes(), expected.to_bytes());
    }

    #[test]
    fn a_group_element_of_low_order_is_refused() {
        let mut bytes = [0; SURB_LEN];
        assert_eq!(Surb::from_bytes(&bytes).unwrap_err(), SurbError::LowOrderPoint);
        bytes[31] = 0x80;
        assert_eq!(Surb::from_bytes(&bytes).unwrap_err(), SurbError::LowOrderPoint);
        bytes[0] = 9;
        assert!(Surb::from_bytes(&bytes).is_ok());
    }

    #[test]
    fn secrets_show_nothing() {
        let mut rng = StdRng::seed_from_u64(4);
        let surbs = build_surbs(&mut rng, &[route([0xab; 16])]);
        let (surb, recovery) = surbs.into_iter().next().unwrap().unwrap();
        assert_eq!(format!("{surb:?}"), "Surb { .. }");
        assert_eq!(format!("{recovery:?}"), "ReplyRecovery { .. }");
    }
}
