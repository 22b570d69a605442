//! Peeling: what a hop does with a packet, in two phases.
//!
//! [`open_headers`] does one X25519 and checks the MAC. It yields the [`ReplayTag`], by which the
//! caller drops packets that it has seen before. [`finish`] does the rest for those that are left:
//! the second X25519, and the payload. So a forged or replayed packet costs half of a good one.

use std::fmt;
use std::time::Duration;

use sphinx_packet::header::routing::{FINAL_HOP, FORWARD_HOP};
use sphinx_packet::header::shared_secret::ExpandedSharedSecret;
use thiserror::Error;

use crate::key::is_low_order;
use crate::payload_layers::Seed;
use crate::secrets::{GROUP_ELEMENT_LEN, HopSecrets, MAC_LEN, ROUTING_LEN, STEP, STREAM_LEN, xor};
use crate::wiped::Wiped;
use crate::x25519::{is_zero, x25519};
use crate::{
    Backend, HEADER_LEN, HopAddress, Identifier, Packet, Payload, REPLAY_TAG_LEN, SecretKey,
    VERSION, payload_layers, reference,
};

/// What a packet is recognised by when it comes again: 32 bytes that only the hop can compute.
///
/// It is derived from the secret shared by sender and hop, so it depends neither on the payload nor
/// on how the group element is encoded. Tags of different keys of a hop have nothing in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReplayTag([u8; REPLAY_TAG_LEN]);

impl ReplayTag {
    /// A tag of these bytes: for simulations, in which packets have tags of their own.
    #[must_use]
    pub fn from_bytes(bytes: [u8; REPLAY_TAG_LEN]) -> Self {
        Self(bytes)
    }

    /// All bytes of the tag.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; REPLAY_TAG_LEN] {
        &self.0
    }

    /// The first 8 bytes of the tag, big-endian, for tables that keep no more.
    #[must_use]
    pub fn prefix(&self) -> u64 {
        let first = self.0.first_chunk().expect("a tag has 32 bytes");
        u64::from_be_bytes(*first)
    }
}

/// A packet with a valid MAC, whose replay tag is to be checked before [`finish`].
pub struct OpenedPacket {
    packet: Packet,
    secrets: Secrets,
}

/// What the hop shares with the sender.
enum Secrets {
    Ours(HopSecrets),
    Reference(Box<ExpandedSharedSecret>),
}

impl Secrets {
    fn payload_seed(&self) -> &Seed {
        match self {
            Self::Ours(secrets) => secrets.payload_seed(),
            Self::Reference(secrets) => secrets.payload_key_seed(),
        }
    }
}

impl OpenedPacket {
    /// What to recognise the packet by when it comes again.
    #[must_use]
    pub fn replay_tag(&self) -> ReplayTag {
        ReplayTag(match &self.secrets {
            Secrets::Ours(secrets) => *secrets.replay_tag(),
            Secrets::Reference(secrets) => *secrets.replay_tag(),
        })
    }
}

/// Shows nothing: what it holds is the secret shared with the sender.
impl fmt::Debug for OpenedPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenedPacket").finish_non_exhaustive()
    }
}

/// What a hop is to do with a packet.
pub enum Peeled {
    /// Pass it on.
    Forward {
        /// Where to.
        next_hop: HopAddress,
        /// How long to hold it before, as the sender chose it: the caller caps it.
        delay: Duration,
        /// The packet for the next hop.
        packet: Packet,
    },
    /// This hop is the last one of the route.
    Final {
        /// Whom the payload is for.
        destination: HopAddress,
        /// What the sender added; for a reply, the identifier of its SURB.
        identifier: Identifier,
        /// The payload.
        payload: Payload,
    },
}

/// Shows which of them it is: where packets go, and when, belongs into no log.
impl fmt::Debug for Peeled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Forward { .. } => "Forward",
            Self::Final { .. } => "Final",
        };
        f.debug_struct(name).finish_non_exhaustive()
    }
}

/// Why a packet cannot be peeled. All of it is the fault of whoever sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PeelError {
    /// The group element is a point of low order.
    #[error("the packet's group element is a point of low order")]
    LowOrderPoint,
    /// The MAC is wrong: the header was changed, or made for another key.
    #[error("the packet's MAC is wrong")]
    BadMac,
    /// The sender used another version of the format; the MAC was right.
    #[error("version {0} of the packet format is unknown")]
    UnknownVersion(u16),
    /// The sender's routing information says neither forward nor final; the MAC was right.
    #[error("the packet's routing information is malformed")]
    BadRouting,
}

/// Phase 1: computes the shared secrets and checks the MACs.
///
/// # Errors
///
/// Per packet: [`PeelError::LowOrderPoint`], [`PeelError::BadMac`].
pub fn open_headers(key: &SecretKey, packets: Vec<Packet>) -> Vec<Result<OpenedPacket, PeelError>> {
    if Backend::current() == Backend::Reference {
        return packets.into_iter().map(|packet| check_with_reference(key, packet)).collect();
    }
    // Points of low order cost a multiplication too: they are too rare to sort out.
    let secret = key.secret().as_bytes();
    let operations: Vec<_> =
        packets.iter().map(|packet| (secret, packet.group_element())).collect();
    let shared = x25519(&operations);
    let secrets = HopSecrets::derive(&shared);
    packets
        .into_iter()
        .zip(shared.iter())
        .zip(secrets)
        .map(|((packet, shared), secrets)| check(packet, shared, secrets))
        .collect()
}

fn check(
    packet: Packet,
    shared: &[u8; 32],
    secrets: HopSecrets,
) -> Result<OpenedPacket, PeelError> {
    if is_zero(shared) {
        return Err(PeelError::LowOrderPoint);
    }
    let (mac, routing) = mac_and_routing(packet.header());
    if !secrets.verify(routing, mac) {
        return Err(PeelError::BadMac);
    }
    Ok(OpenedPacket { packet, secrets: Secrets::Ours(secrets) })
}

fn check_with_reference(key: &SecretKey, packet: Packet) -> Result<OpenedPacket, PeelError> {
    if is_low_order(packet.group_element()) {
        return Err(PeelError::LowOrderPoint);
    }
    let secrets = Secrets::Reference(Box::new(reference::open_header(key, &packet)?));
    Ok(OpenedPacket { packet, secrets })
}

/// Phase 2: reads the routing information, blinds the group element and takes one layer off the
/// payload.
///
/// # Errors
///
/// Per packet: [`PeelError::UnknownVersion`], [`PeelError::BadRouting`].
pub fn finish(opened: Vec<OpenedPacket>) -> Vec<Result<Peeled, PeelError>> {
    let (secrets, mut peeled): (Vec<_>, Vec<_>) = opened
        .into_iter()
        .map(|OpenedPacket { packet, secrets }| {
            let peeled = match &secrets {
                Secrets::Ours(secrets) => read_routing(packet, secrets),
                Secrets::Reference(secrets) => reference::read_header(packet, secrets),
            };
            (secrets, peeled)
        })
        .unzip();
    // The last hop's layer stays on, see `Payload`.
    let mut forwarded: Vec<_> = secrets
        .iter()
        .zip(&mut peeled)
        .filter_map(|(secrets, peeled)| match peeled {
            Ok(Peeled::Forward { packet, .. }) => Some((secrets, packet)),
            _ => None,
        })
        .collect();
    blind(&mut forwarded);
    payload_layers::remove(
        forwarded
            .into_iter()
            .map(|(secrets, packet)| (secrets.payload_seed(), packet.payload_mut())),
    );
    peeled
}

/// Reads what the hop is told. A packet to forward comes with the MAC and the routing information
/// for the next hop, but still with this hop's group element and payload.
fn read_routing(mut packet: Packet, secrets: &HopSecrets) -> Result<Peeled, PeelError> {
    let mut routing = Wiped::zero();
    secrets.write_stream(&mut routing);
    let (_, encrypted) = mac_and_routing(packet.header());
    xor(&mut routing[..], encrypted);

    let flag = routing[0];
    if flag != FORWARD_HOP && flag != FINAL_HOP {
        return Err(PeelError::BadRouting);
    }
    // The first byte of the version does not count.
    let version = u16::from_be_bytes([routing[2], routing[3]]);
    if version != VERSION.value() {
        return Err(PeelError::UnknownVersion(version));
    }
    if flag == FINAL_HOP {
        return Ok(Peeled::Final {
            destination: field(&routing, 4),
            identifier: field(&routing, 36),
            payload: Payload::new(packet, secrets.payload_seed()),
        });
    }
    packet.header_mut()[GROUP_ELEMENT_LEN..].copy_from_slice(&routing[STEP - MAC_LEN..]);
    Ok(Peeled::Forward {
        next_hop: field(&routing, 4),
        delay: Duration::from_nanos(u64::from_be_bytes(field(&routing, 36))),
        packet,
    })
}

/// Makes the group elements of the next hops.
fn blind(forwarded: &mut [(&Secrets, &mut Packet)]) {
    let mut ours: Vec<_> = forwarded
        .iter_mut()
        .filter_map(|(secrets, packet)| match secrets {
            Secrets::Ours(secrets) => Some((secrets, packet)),
            Secrets::Reference(_) => None,
        })
        .collect();
    let operations: Vec<_> = ours
        .iter()
        .map(|(secrets, packet)| (secrets.blinding_factor(), packet.group_element()))
        .collect();
    let blinded = x25519(&operations);
    for ((_, packet), group_element) in ours.iter_mut().zip(blinded.iter()) {
        packet.header_mut()[..GROUP_ELEMENT_LEN].copy_from_slice(group_element);
    }
}

/// MAC and encrypted routing information.
fn mac_and_routing(header: &[u8; HEADER_LEN]) -> (&[u8; MAC_LEN], &[u8; ROUTING_LEN]) {
    let (mac, routing) = header[GROUP_ELEMENT_LEN..].split_first_chunk().expect(LAYOUT);
    (mac, routing.try_into().expect(LAYOUT))
}

const LAYOUT: &str = "the parts of a header have constant lengths";

fn field<const N: usize>(routing: &[u8; STREAM_LEN], offset: usize) -> [u8; N] {
    *routing[offset..].first_chunk().expect("offsets are constants that leave enough bytes")
}

#[cfg(test)]
mod tests {
    use zeroize::ZeroizeOnDrop;

    use super::*;

    const fn assert_wiped<T: ZeroizeOnDrop>() {}
    const _: () = assert_wiped::<ExpandedSharedSecret>();
    const _: () = assert_wiped::<HopSecrets>();

    #[test]
    fn the_prefix_of_a_tag_is_its_first_8_bytes() {
        let mut bytes = [0xff; REPLAY_TAG_LEN];
        bytes[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let tag = ReplayTag(bytes);
        assert_eq!(tag.prefix(), 0x0102_0304_0506_0708);
        assert_eq!(tag.as_bytes(), &bytes);
    }
}
