//! Packets as bytes on a link, and the payload that comes out at the end of a route.

use std::fmt;

use thiserror::Error;

use crate::payload_layers::{self, SEED_LEN, Seed};
use crate::secrets::GROUP_ELEMENT_LEN;
use crate::wiped::Wiped;
use crate::{HEADER_LEN, MIN_PAYLOAD_LEN, PAYLOAD_OVERHEAD};

/// Zero bytes at the start of a payload that arrived unchanged.
const LEADING_ZEROS: usize = PAYLOAD_OVERHEAD - 1;

/// The longest plaintext in bytes that a payload of `payload_len` bytes can carry; 0 for payloads
/// too short to carry any.
#[must_use]
pub const fn max_plaintext(payload_len: usize) -> usize {
    payload_len.saturating_sub(PAYLOAD_OVERHEAD)
}

/// A packet between two hops: [`HEADER_LEN`] bytes of header, then the payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Packet(Vec<u8>);

/// Why bytes are no [`Packet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PacketError {
    /// The network's payloads are shorter than [`MIN_PAYLOAD_LEN`]: the caller's fault.
    #[error("a payload of {payload_len} bytes is shorter than {MIN_PAYLOAD_LEN}")]
    PayloadTooShort {
        /// The length of payloads that the caller asked for.
        payload_len: usize,
    },
    /// The packet does not have the one length of its network: the sender's fault.
    #[error("a packet of {len} bytes instead of {expected}")]
    WrongLength {
        /// The length of the packet.
        len: usize,
        /// The length that it should have.
        expected: usize,
    },
}

impl Packet {
    /// Takes a packet of a network with payloads of `payload_len` bytes. Nothing but the length is
    /// looked at.
    ///
    /// # Errors
    ///
    /// See [`PacketError`].
    pub fn from_bytes(bytes: impl Into<Vec<u8>>, payload_len: usize) -> Result<Self, PacketError> {
        if payload_len < MIN_PAYLOAD_LEN {
            return Err(PacketError::PayloadTooShort { payload_len });
        }
        let bytes = bytes.into();
        let expected = HEADER_LEN.saturating_add(payload_len);
        if bytes.len() != expected {
            return Err(PacketError::WrongLength { len: bytes.len(), expected });
        }
        Ok(Self(bytes))
    }

    /// The bytes for a link.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes for a link.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// A packet whose payload is `plaintext` with its padding, still without a layer.
    ///
    /// # Panics
    ///
    /// Panics if the plaintext is longer than [`max_plaintext`] allows.
    pub(crate) fn new(header: &[u8; HEADER_LEN], payload_len: usize, plaintext: &[u8]) -> Self {
        assert!(plaintext.len() <= max_plaintext(payload_len));
        let len = HEADER_LEN + payload_len;
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(&[0; LEADING_ZEROS]);
        bytes.extend_from_slice(plaintext);
        bytes.push(1);
        bytes.resize(len, 0);
        Self(bytes)
    }

    pub(crate) fn header(&self) -> &[u8; HEADER_LEN] {
        self.0.first_chunk().expect("a packet is longer than a header")
    }

    pub(crate) fn header_mut(&mut self) -> &mut [u8; HEADER_LEN] {
        self.0.first_chunk_mut().expect("a packet is longer than a header")
    }

    /// The u-coordinate that the header begins with.
    pub(crate) fn group_element(&self) -> &[u8; GROUP_ELEMENT_LEN] {
        self.0.first_chunk().expect("a packet is longer than a group element")
    }

    /// The plaintext of a payload without layers.
    pub(crate) fn into_plaintext(self) -> Result<Vec<u8>, PayloadError> {
        const START: usize = HEADER_LEN + LEADING_ZEROS;
        let mut bytes = self.0;
        let (zeros, padded) = bytes[HEADER_LEN..].split_at(LEADING_ZEROS);
        if zeros.iter().any(|byte| *byte != 0) {
            return Err(PayloadError::LeadingZeros);
        }
        let end = padded.iter().rposition(|byte| *byte != 0);
        let len = end.filter(|end| padded[*end] == 1).ok_or(PayloadError::Padding)?;
        bytes.truncate(START + len);
        bytes.drain(..START);
        Ok(bytes)
    }

    pub(crate) fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.0[HEADER_LEN..]
    }
}

/// Shows the length only.
impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet").field("len", &self.0.len()).finish_non_exhaustive()
    }
}

/// What arrives at the last hop of a route.
///
/// The layer of the last hop is still on it, and taken off when it is read: by [`open_payloads`] or
/// [`Payload::into_plaintext`] if it came in a packet of [`crate::build_packets`]; by
/// [`crate::recover_replies`], which need not take it off, if it came on a SURB.
pub struct Payload {
    /// The header, which means nothing any more, is left before it: that saves moving the payload.
    packet: Packet,
    /// Of the layer that is still on it; moving the payload leaves no copy of it behind.
    seed: Box<Wiped<SEED_LEN>>,
}

/// Why a payload holds no plaintext: somebody changed it on the way, or it is a reply, which only
/// its recovery opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PayloadError {
    /// The first 16 bytes are not all zero.
    #[error("the payload does not start with zeros: it was changed on the way")]
    LeadingZeros,
    /// The plaintext is not followed by one byte 1 and zeros to the end.
    #[error("the payload does not end in padding")]
    Padding,
}

#[expect(clippy::len_without_is_empty, reason = "no payload is empty")]
impl Payload {
    pub(crate) fn new(packet: Packet, seed: &Seed) -> Self {
        let mut own = Box::new(Wiped::zero());
        own.copy_from_slice(seed);
        Self { packet, seed: own }
    }

    /// The length in bytes: that of all payloads of the network.
    #[must_use]
    pub fn len(&self) -> usize {
        self.packet.0.len() - HEADER_LEN
    }

    /// Takes the plaintext out: 0 to [`max_plaintext`] bytes. For several at once, see
    /// [`open_payloads`].
    ///
    /// # Errors
    ///
    /// See [`PayloadError`].
    pub fn into_plaintext(self) -> Result<Vec<u8>, PayloadError> {
        open_payloads(vec![self]).remove(0)
    }

    /// The payload without the last hop's layer, as the crate below hands it out.
    pub(crate) fn remove_layer(self) -> Vec<u8> {
        let Self { mut packet, seed } = self;
        payload_layers::remove([(&**seed, packet.payload_mut())]);
        packet.0.split_off(HEADER_LEN)
    }

    /// The same again: for measurements only, as a payload is read once.
    pub(crate) fn copy(&self) -> Self {
        Self::new(self.packet.clone(), &self.seed)
    }

    /// The packet without a thought for the layer that is still on its payload.
    pub(crate) fn into_packet(self) -> Packet {
        self.packet
    }
}

/// Takes the plaintexts out of payloads that are no replies: 0 to [`max_plaintext`] bytes each.
///
/// # Errors
///
/// Per payload: see [`PayloadError`].
pub fn open_payloads(mut payloads: Vec<Payload>) -> Vec<Result<Vec<u8>, PayloadError>> {
    payload_layers::remove(
        payloads.iter_mut().map(|Payload { packet, seed }| (&***seed, packet.payload_mut())),
    );
    payloads.into_iter().map(|payload| payload.packet.into_plaintext()).collect()
}

/// Shows the length only.
impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Payload").field("len", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn plaintext(start: &[u8], end: &[u8]) -> Result<Vec<u8>, PayloadError> {
        let mut bytes = vec![0xcd; HEADER_LEN + 64];
        let payload = &mut bytes[HEADER_LEN..];
        payload.fill(0);
        payload[..start.len()].copy_from_slice(start);
        payload[64 - end.len()..].copy_from_slice(end);
        Packet::from_bytes(bytes, 64).unwrap().into_plaintext()
    }

    #[test]
    fn a_packet_has_one_length() {
        for len in [0, HEADER_LEN, HEADER_LEN + 63, HEADER_LEN + 65] {
            assert_eq!(
                Packet::from_bytes(vec![0; len], 64),
                Err(PacketError::WrongLength { len, expected: 412 })
            );
        }
        let packet = Packet::from_bytes(vec![3; 412], 64).unwrap();
        assert_eq!(packet.as_bytes(), [3; 412]);
        assert_eq!(packet.into_bytes(), [3; 412]);
    }

    #[test]
    fn a_payload_is_longer_than_a_block_of_the_cipher() {
        for payload_len in [0, 16, 32] {
            assert_eq!(
                Packet::from_bytes(vec![0; HEADER_LEN + payload_len], payload_len),
                Err(PacketError::PayloadTooShort { payload_len })
            );
        }
        assert!(Packet::from_bytes(vec![0; HEADER_LEN + 33], 33).is_ok());
        assert!(Packet::from_bytes(vec![], usize::MAX).is_err());
        assert_eq!([max_plaintext(0), max_plaintext(17)], [0, 0]);
        assert_eq!([max_plaintext(33), max_plaintext(2048)], [16, 2031]);
    }

    #[test]
    fn padding_is_taken_off() {
        let zeros = [0; 16];
        let start = |rest: &[u8]| [&zeros[..], rest].concat();
        assert_eq!(plaintext(&start(&[1]), &[]).unwrap(), []);
        assert_eq!(plaintext(&start(&[1, 1]), &[]).unwrap(), [1]);
        assert_eq!(plaintext(&start(&[0, 0, 1]), &[]).unwrap(), [0, 0]);
        assert_eq!(plaintext(&start(&[8, 9, 1]), &[]).unwrap(), [8, 9]);
        assert_eq!(plaintext(&[], &[1]).unwrap(), [0; 47]);
    }

    #[test]
    fn padding_is_put_on() {
        let packet = Packet::new(&[9; HEADER_LEN], 33, b"abc");
        let expected = [&[9; HEADER_LEN][..], &[0; 16], b"abc\x01", &[0; 13]].concat();
        assert_eq!(packet.as_bytes(), expected);
        assert_eq!(packet.into_plaintext().unwrap(), b"abc");
        let full = Packet::new(&[9; HEADER_LEN], 33, &[7; 16]);
        assert_eq!(full.into_plaintext().unwrap(), [7; 16]);
    }

    #[test]
    fn wrong_padding_is_refused() {
        assert_eq!(plaintext(&[], &[]), Err(PayloadError::Padding));
        assert_eq!(plaintext(&[], &[1, 2]), Err(PayloadError::Padding));
        assert_eq!(plaintext(&[], &[1, 0, 0x80]), Err(PayloadError::Padding));
        for position in 0..LEADING_ZEROS {
            let mut start = [0; 16];
            start[position] = 1;
            assert_eq!(plaintext(&start, &[1]), Err(PayloadError::LeadingZeros));
        }
    }

    #[test]
    fn packets_and_payloads_show_their_length_only() {
        let packet = Packet::from_bytes(vec![0xab; 412], 64).unwrap();
        assert_eq!(format!("{packet:?}"), "Packet { len: 412, .. }");
        let payload = Payload::new(packet, &[0xab; 16]);
        assert_eq!(format!("{payload:?}"), "Payload { len: 64, .. }");
    }
}
