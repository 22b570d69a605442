//! Peeling: what a hop does with a packet, in two phases.
//!
//! [`open_headers`] does one X25519 and checks the MAC. It yields the [`ReplayTag`], by which the
//! caller drops packets that it has seen before. [`finish`] does the rest for those that are left:
//! the second X25519, and the payload. So a forged or replayed packet costs half of a good one.

use std::fmt;
use std::time::Duration;

use sphinx_packet::header::SphinxHeader;
use sphinx_packet::header::shared_secret::ExpandedSharedSecret;
use sphinx_packet::{ErrorKind, ProcessedPacketData, SphinxPacket};
use thiserror::Error;

use crate::key::is_low_order;
use crate::{
    HopAddress, Identifier, MIN_PAYLOAD_LEN, Packet, Payload, REPLAY_TAG_LEN, SecretKey, VERSION,
    payload_layers,
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
    header: SphinxHeader,
    /// Wiped when dropped.
    secret: ExpandedSharedSecret,
}

impl OpenedPacket {
    /// What to recognise the packet by when it comes again.
    #[must_use]
    pub fn replay_tag(&self) -> ReplayTag {
        ReplayTag(*self.secret.replay_tag())
    }
}

/// Shows nothing: what it holds is the secret shared with the sender.
impl fmt::Debug for OpenedPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenedPacket").finish_non_exhaustive()
    }
}

/// What a hop is to do with a packet.
#[derive(Debug)]
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
    packets.into_iter().map(|packet| open_header(key, packet)).collect()
}

fn open_header(key: &SecretKey, packet: Packet) -> Result<OpenedPacket, PeelError> {
    let header = SphinxHeader::from_bytes(packet.header()).expect("a header has its length");
    if is_low_order(header.shared_secret.as_bytes()) {
        return Err(PeelError::LowOrderPoint);
    }
    let secret = header.compute_expanded_shared_secret(key.secret());
    header.ensure_header_integrity(&secret).map_err(|_| PeelError::BadMac)?;
    Ok(OpenedPacket { packet, header, secret })
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
        .map(|OpenedPacket { packet, header, secret }| {
            let peeled = read_header(packet, header, &secret);
            (secret, peeled)
        })
        .unzip();
    // The last hop's layer stays on, see `Payload`.
    let forwarded = secrets.iter().zip(&mut peeled).filter_map(|(secret, peeled)| match peeled {
        Ok(Peeled::Forward { packet, .. }) => {
            Some((secret.payload_key_seed(), packet.payload_mut()))
        }
        _ => None,
    });
    payload_layers::remove(forwarded);
    peeled
}

/// All of phase 2 but for the payload.
fn read_header(
    mut packet: Packet,
    header: SphinxHeader,
    secret: &ExpandedSharedSecret,
) -> Result<Peeled, PeelError> {
    // The crate below reads a header only along with a payload.
    let payload = sphinx_packet::payload::Payload::from_bytes(&[0; MIN_PAYLOAD_LEN])
        .expect("it has the shortest length");
    let processed =
        SphinxPacket { header, payload }.process_with_expanded_secret(secret).map_err(|error| {
            match error.kind() {
                ErrorKind::InvalidHeader => PeelError::BadMac,
                _ => PeelError::BadRouting,
            }
        })?;
    if processed.version != VERSION {
        return Err(PeelError::UnknownVersion(processed.version.value()));
    }
    Ok(match processed.data {
        ProcessedPacketData::ForwardHop { next_hop_packet, next_hop_address, delay } => {
            packet.set_header(&next_hop_packet.header);
            Peeled::Forward {
                next_hop: next_hop_address.to_bytes(),
                delay: delay.to_duration(),
                packet,
            }
        }
        ProcessedPacketData::FinalHop { destination, identifier, .. } => Peeled::Final {
            destination: destination.as_bytes(),
            identifier,
            payload: Payload::new(packet, secret.payload_key_seed()),
        },
    })
}

#[cfg(test)]
mod tests {
    use zeroize::ZeroizeOnDrop;

    use super::*;

    const fn assert_wiped<T: ZeroizeOnDrop>() {}
    const _: () = assert_wiped::<ExpandedSharedSecret>();

    #[test]
    fn the_prefix_of_a_tag_is_its_first_8_bytes() {
        let mut bytes = [0xff; REPLAY_TAG_LEN];
        bytes[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let tag = ReplayTag(bytes);
        assert_eq!(tag.prefix(), 0x0102_0304_0506_0708);
        assert_eq!(tag.as_bytes(), &bytes);
    }
}
