//! What packets of messages hold: the part that gateways read, and acknowledgements.
//!
//! Contents of a message packet, as long as the packet has room for:
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 396 | SURB for the acknowledgement |
//! | 396 | the rest | box, a fragment that is sealed for the recipient |
//!
//! The gateway of the recipient keeps the box and answers by the SURB. A box:
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 32 | ephemeral X25519 public key |
//! | 32 | [`MessageSizes::fragment_bytes`] | fragment, encrypted |
//! | the rest | 16 | authentication tag |
//!
//! Contents of a reply packet, as long:
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 396 | SURB for the acknowledgement |
//! | 396 | [`MessageSizes::fragment_bytes`] | fragment |
//! | the rest | 48 | zeros |
//!
//! Contents of an acknowledgement:
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 1 | 1, the version of this layout |
//! | 1 | 1 | status, [`AckStatus`] |

use mixsocks_sphinx::{SURB_LEN, Surb, SurbError};

use super::fragment::FRAGMENT_HEADER_LEN;

/// Bytes of the ephemeral key at the beginning of a box.
pub const EPHEMERAL_KEY_LEN: usize = 32;

/// Bytes of the authentication tag at the end of a box.
pub const BOX_TAG_LEN: usize = 16;

/// Bytes of a box that are not fragment.
pub const BOX_OVERHEAD: usize = EPHEMERAL_KEY_LEN + BOX_TAG_LEN;

/// Bytes of an acknowledgement.
pub const ACK_LEN: usize = 2;

/// Version of the layout of acknowledgements.
const ACK_VERSION: u8 = 1;

/// How long the parts of a packet are in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageSizes {
    contents_bytes: usize,
}

impl MessageSizes {
    /// The fewest bytes of contents: the longest body must not need more fragments than can be
    /// numbered.
    pub const MIN_CONTENTS_BYTES: usize = SURB_LEN + BOX_OVERHEAD + FRAGMENT_HEADER_LEN + 263;

    /// The most bytes of contents: a fragment says in 16 bits how long it is.
    pub const MAX_CONTENTS_BYTES: usize = u16::MAX as usize;

    /// The sizes in a network whose packets hold `contents_bytes`; `None` if those are fewer than
    /// [`MessageSizes::MIN_CONTENTS_BYTES`] or more than [`MessageSizes::MAX_CONTENTS_BYTES`]: then
    /// it carries no messages.
    pub fn new(contents_bytes: usize) -> Option<Self> {
        (Self::MIN_CONTENTS_BYTES..=Self::MAX_CONTENTS_BYTES)
            .contains(&contents_bytes)
            .then_some(Self { contents_bytes })
    }

    /// Bytes of the contents of a packet.
    pub fn contents_bytes(self) -> usize {
        self.contents_bytes
    }

    /// Bytes of a box.
    pub fn box_bytes(self) -> usize {
        self.contents_bytes - SURB_LEN
    }

    /// Bytes of a fragment with its header and padding.
    pub fn fragment_bytes(self) -> usize {
        self.box_bytes() - BOX_OVERHEAD
    }

    /// Bytes of a body that a full fragment carries.
    pub fn fragment_data_bytes(self) -> usize {
        self.fragment_bytes() - FRAGMENT_HEADER_LEN
    }
}

/// Why bytes are not the contents of a message packet. Its sender is at fault; it is dropped and
/// counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ContentsError {
    /// They are not exactly as long as they must be.
    #[error("contents of {len} bytes are not {expected}")]
    Length {
        /// Bytes that there are.
        len: usize,
        /// Bytes that there must be.
        expected: usize,
    },
    /// The SURB for the acknowledgement is none.
    #[error(transparent)]
    Surb(#[from] SurbError),
    /// A reply has bytes behind its fragment that are not zero.
    #[error("padding of a reply is not zero")]
    Padding,
}

/// The contents of a message packet, as the recipient's gateway finds them.
#[derive(Debug)]
pub struct MessageContents<'a> {
    /// How the sender wants to hear of it.
    pub ack_surb: Surb,
    /// What is kept for the recipient: [`MessageSizes::box_bytes`].
    pub sealed_box: &'a [u8],
}

impl<'a> MessageContents<'a> {
    /// Reads the contents of a packet.
    ///
    /// # Errors
    /// See [`ContentsError`].
    pub fn parse(contents: &'a [u8], sizes: MessageSizes) -> Result<Self, ContentsError> {
        let (ack_surb, sealed_box) = split_ack_surb(contents, sizes)?;
        Ok(Self { ack_surb, sealed_box })
    }

    /// The contents with these parts.
    pub fn compose(&self) -> Vec<u8> {
        [self.ack_surb.as_bytes(), self.sealed_box].concat()
    }
}

/// The contents of a reply packet, as the recipient finds them.
#[derive(Debug)]
pub struct ReplyContents<'a> {
    /// How the replier wants to hear of it.
    pub ack_surb: Surb,
    /// The fragment: [`MessageSizes::fragment_bytes`].
    pub fragment: &'a [u8],
}

impl<'a> ReplyContents<'a> {
    /// Reads the contents of a packet.
    ///
    /// # Errors
    /// See [`ContentsError`].
    pub fn parse(contents: &'a [u8], sizes: MessageSizes) -> Result<Self, ContentsError> {
        let (ack_surb, rest) = split_ack_surb(contents, sizes)?;
        let (fragment, padding) = rest.split_at(sizes.fragment_bytes());
        if padding.iter().any(|&byte| byte != 0) {
            return Err(ContentsError::Padding);
        }
        Ok(Self { ack_surb, fragment })
    }

    /// The contents with these parts.
    pub fn compose(&self) -> Vec<u8> {
        [self.ack_surb.as_bytes(), self.fragment, &[0; BOX_OVERHEAD]].concat()
    }
}

fn split_ack_surb(contents: &[u8], sizes: MessageSizes) -> Result<(Surb, &[u8]), ContentsError> {
    let expected = sizes.contents_bytes();
    let wrong_length = ContentsError::Length { len: contents.len(), expected };
    if contents.len() != expected {
        return Err(wrong_length);
    }
    let (surb, rest) = contents.split_first_chunk().ok_or(wrong_length)?;
    Ok((Surb::from_bytes(surb)?, rest))
}

/// What became of a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AckStatus {
    /// 0: the gateway has stored the box durably, or the recipient of a reply has the fragment.
    Stored = 0,
    /// 1: refused, the recipient's share of the gateway's store is full.
    ShareFull = 1,
    /// 2: refused, no such client is registered at the gateway.
    UnknownClient = 2,
    /// 3: refused, the gateway's store is full or fails.
    StoreUnavailable = 3,
}

/// Why bytes are not an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// They are not exactly [`ACK_LEN`].
    #[error("an acknowledgement of {0} bytes")]
    Length(usize),
    /// The first byte is none that this version knows.
    #[error("acknowledgement version {0} is not {ACK_VERSION}")]
    Version(u8),
    /// The second byte is none that this version knows.
    #[error("acknowledgement status {0} is unknown")]
    Status(u8),
}

impl AckStatus {
    /// The contents of an acknowledgement that says this.
    pub fn to_bytes(self) -> [u8; ACK_LEN] {
        [ACK_VERSION, self as u8]
    }

    /// Reads the contents of an acknowledgement.
    ///
    /// # Errors
    /// See [`AckError`].
    pub fn from_bytes(contents: &[u8]) -> Result<Self, AckError> {
        let &[version, status] = contents else { return Err(AckError::Length(contents.len())) };
        if version != ACK_VERSION {
            return Err(AckError::Version(version));
        }
        match status {
            0 => Ok(Self::Stored),
            1 => Ok(Self::ShareFull),
            2 => Ok(Self::UnknownClient),
            3 => Ok(Self::StoreUnavailable),
            _ => Err(AckError::Status(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_BODY_BYTES, fragment::MAX_FRAGMENTS};
    use super::*;

    /// What packets hold by default.
    const CONTENTS: usize = 2031;

    fn sizes() -> MessageSizes {
        MessageSizes::new(CONTENTS).unwrap()
    }

    /// A SURB whose last byte tells it from others.
    fn surb(last: u8) -> Surb {
        let mut bytes = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        bytes[0] = 9;
        bytes[SURB_LEN - 1] = last;
        Surb::from_bytes(&bytes).unwrap()
    }

    #[test]
    fn default_packets_have_the_documented_sizes() {
        assert_eq!(sizes().box_bytes(), 1635);
        assert_eq!(sizes().fragment_bytes(), 1587);
        assert_eq!(sizes().fragment_data_bytes(), 1561);
    }

    #[test]
    fn the_longest_body_can_be_numbered_in_the_shortest_packets_and_in_none_that_are_shorter() {
        let least = MessageSizes::MIN_CONTENTS_BYTES;
        let data = MessageSizes::new(least).unwrap().fragment_data_bytes();
        assert!(MAX_BODY_BYTES.div_ceil(data) <= MAX_FRAGMENTS);
        assert_eq!(MessageSizes::new(least - 1), None);
        assert!(MAX_BODY_BYTES.div_ceil(data - 1) > MAX_FRAGMENTS);
        let most = MessageSizes::MAX_CONTENTS_BYTES;
        assert!(MessageSizes::new(most).is_some());
        assert_eq!(MessageSizes::new(most + 1), None);
    }

    #[test]
    fn contents_are_the_surb_and_the_box() {
        let sealed_box = [7; 1635];
        let bytes = MessageContents { ack_surb: surb(5), sealed_box: &sealed_box }.compose();
        let mut expected = vec![0; CONTENTS];
        expected[0] = 9;
        expected[395] = 5;
        expected[396..].fill(7);
        assert_eq!(bytes, expected);
        let parsed = MessageContents::parse(&bytes, sizes()).unwrap();
        assert_eq!(parsed.ack_surb.as_bytes(), surb(5).as_bytes());
        assert_eq!(parsed.sealed_box, sealed_box);
    }

    #[test]
    fn a_reply_is_the_surb_the_fragment_and_zeros() {
        let bytes = ReplyContents { ack_surb: surb(5), fragment: &[7; 1587] }.compose();
        let mut expected = vec![0; CONTENTS];
        expected[0] = 9;
        expected[395] = 5;
        expected[396..1983].fill(7);
        assert_eq!(bytes, expected);
        let parsed = ReplyContents::parse(&bytes, sizes()).unwrap();
        assert_eq!(parsed.ack_surb.as_bytes(), surb(5).as_bytes());
        assert_eq!(parsed.fragment, [7; 1587]);
        for at in 1983..CONTENTS {
            let mut bytes = bytes.clone();
            bytes[at] = 1;
            let error = ReplyContents::parse(&bytes, sizes()).unwrap_err();
            assert_eq!(error, ContentsError::Padding, "at {at}");
        }
    }

    #[test]
    fn contents_of_another_length_are_refused() {
        let mut bytes = vec![9; CONTENTS];
        for len in (0..CONTENTS).chain([CONTENTS + 1]) {
            bytes.resize(len, 9);
            let expected = ContentsError::Length { len, expected: CONTENTS };
            assert_eq!(MessageContents::parse(&bytes, sizes()).unwrap_err(), expected);
            assert_eq!(ReplyContents::parse(&bytes, sizes()).unwrap_err(), expected);
        }
    }

    #[test]
    fn a_surb_that_is_none_is_refused() {
        let bytes = vec![0; CONTENTS];
        let expected = ContentsError::Surb(SurbError::LowOrderPoint);
        assert_eq!(MessageContents::parse(&bytes, sizes()).unwrap_err(), expected);
        assert_eq!(ReplyContents::parse(&bytes, sizes()).unwrap_err(), expected);
    }

    #[test]
    fn acknowledgements_are_two_bytes() {
        let all = [
            AckStatus::Stored,
            AckStatus::ShareFull,
            AckStatus::UnknownClient,
            AckStatus::StoreUnavailable,
        ];
        for (status, code) in all.into_iter().zip(0..) {
            assert_eq!(status.to_bytes(), [1, code]);
            assert_eq!(AckStatus::from_bytes(&[1, code]), Ok(status));
        }
        for code in 4..=255 {
            assert_eq!(AckStatus::from_bytes(&[1, code]), Err(AckError::Status(code)));
        }
        for version in [0, 2, 255] {
            assert_eq!(AckStatus::from_bytes(&[version, 0]), Err(AckError::Version(version)));
        }
        for len in [0, 1, 3, 2031] {
            assert_eq!(AckStatus::from_bytes(&vec![1; len]), Err(AckError::Length(len)));
        }
    }
}
