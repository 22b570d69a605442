//! Bodies: a message and what goes with it.
//!
//! | kind | allowed in | offset | bytes | field |
//! |--:|---|--:|--:|---|
//! | 0 plain | both | 1 | the rest | message |
//! | 1 with SURBs | messages | 1 | 16 | sender_tag |
//! | | | 17 | 8 | key epoch u64 of the SURBs |
//! | | | 25 | 2 | count u16, 1 to [`MAX_REPLY_SURBS`] |
//! | | | 27 | 396 each | SURBs |
//! | | | | the rest | message |
//! | 2 SURBs only | messages | 1 | | as kind 1, without a message |
//! | 3 request | replies | 1 | 2 | how many SURBs are asked for, u16, not zero |
//!
//! The kind is the first byte. A message has 1 to [`MAX_MESSAGE_BYTES`].

use std::fmt;

use mixsocks_sphinx::SURB_LEN;

use super::{BODY_HEADER_LEN, MAX_MESSAGE_BYTES, MAX_REPLY_SURBS};

/// Bytes of a [`SenderTag`].
pub const SENDER_TAG_LEN: usize = 16;

const PLAIN: u8 = 0;
const WITH_SURBS: u8 = 1;
const SURBS_ONLY: u8 = 2;
const REQUEST: u8 = 3;

/// Names an anonymous sender for one recipient: 16 random bytes, from nothing else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SenderTag(pub [u8; SENDER_TAG_LEN]);

/// Shows the first four bytes in hexadecimal: whoever knows all of them can take replies over.
impl fmt::Debug for SenderTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "SenderTag({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

/// SURBs for replies, and whose they are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ReplySurbs<'a> {
    /// The sender.
    pub sender_tag: SenderTag,
    /// The key epoch whose keys their headers were made for; the earliest, if they differ.
    pub key_epoch: u64,
    /// The SURBs, not parsed yet.
    pub surbs: &'a [[u8; SURB_LEN]],
}

impl fmt::Debug for ReplySurbs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReplySurbs({:?}, {} of {})", self.sender_tag, self.surbs.len(), self.key_epoch)
    }
}

/// What the fragments of a message are when they are put together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// A message.
    Plain(&'a [u8]),
    /// A message that may be answered.
    WithSurbs(ReplySurbs<'a>, &'a [u8]),
    /// More SURBs for a sender whose SURBs run out.
    Surbs(ReplySurbs<'a>),
    /// The replier asks for so many SURBs.
    Request(u16),
}

/// Shows nothing of a message.
impl fmt::Debug for Body<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(message) => write!(f, "Plain({} bytes)", message.len()),
            Self::WithSurbs(surbs, message) => {
                write!(f, "WithSurbs({surbs:?}, {} bytes)", message.len())
            }
            Self::Surbs(surbs) => write!(f, "Surbs({surbs:?})"),
            Self::Request(number) => write!(f, "Request({number})"),
        }
    }
}

/// Why bytes are not a body. Its sender is at fault; it is dropped and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It needs more bytes than there are.
    #[error("a body is cut short")]
    Truncated,
    /// A kind that this version does not know.
    #[error("body kind {0} is unknown")]
    Kind(u8),
    /// No SURBs, or more than [`MAX_REPLY_SURBS`].
    #[error("a body with {0} SURBs")]
    Surbs(u16),
    /// An empty message, or one of more than [`MAX_MESSAGE_BYTES`].
    #[error("a message of {0} bytes")]
    Message(usize),
    /// It asks for no SURBs.
    #[error("a request for nothing")]
    Request,
    /// Bytes follow where none may.
    #[error("{0} bytes too many in a body")]
    Trailing(usize),
}

impl<'a> Body<'a> {
    /// Reads a body.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub fn parse(input: &'a [u8]) -> Result<Self, BodyError> {
        let (&kind, rest) = input.split_first().ok_or(BodyError::Truncated)?;
        match kind {
            PLAIN => Ok(Self::Plain(check_message(rest)?)),
            WITH_SURBS => {
                let (surbs, message) = take_surbs(rest)?;
                Ok(Self::WithSurbs(surbs, check_message(message)?))
            }
            SURBS_ONLY => match take_surbs(rest)? {
                (surbs, []) => Ok(Self::Surbs(surbs)),
                (_, rest) => Err(BodyError::Trailing(rest.len())),
            },
            REQUEST => match *rest {
                [0, 0] => Err(BodyError::Request),
                [a, b] => Ok(Self::Request(u16::from_be_bytes([a, b]))),
                [] | [_] => Err(BodyError::Truncated),
                [_, _, ref rest @ ..] => Err(BodyError::Trailing(rest.len())),
            },
            kind => Err(BodyError::Kind(kind)),
        }
    }

    /// The bytes of the body.
    ///
    /// # Panics
    /// When there are more SURBs than can be counted.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Plain(message) => [&[PLAIN], *message].concat(),
            Self::WithSurbs(surbs, message) => surbs.to_bytes(WITH_SURBS, message),
            Self::Surbs(surbs) => surbs.to_bytes(SURBS_ONLY, &[]),
            Self::Request(number) => {
                let [a, b] = number.to_be_bytes();
                vec![REQUEST, a, b]
            }
        }
    }
}

impl ReplySurbs<'_> {
    fn to_bytes(self, kind: u8, message: &[u8]) -> Vec<u8> {
        let count = u16::try_from(self.surbs.len()).expect("no more SURBs than can be counted");
        let surbs = self.surbs.as_flattened();
        let mut out = Vec::with_capacity(BODY_HEADER_LEN + surbs.len() + message.len());
        out.push(kind);
        out.extend_from_slice(&self.sender_tag.0);
        out.extend_from_slice(&self.key_epoch.to_be_bytes());
        out.extend_from_slice(&count.to_be_bytes());
        out.extend_from_slice(surbs);
        out.extend_from_slice(message);
        out
    }
}

fn take_surbs(input: &[u8]) -> Result<(ReplySurbs<'_>, &[u8]), BodyError> {
    let (&tag, input) = input.split_first_chunk().ok_or(BodyError::Truncated)?;
    let (&key_epoch, input) = input.split_first_chunk().ok_or(BodyError::Truncated)?;
    let (&count, input) = input.split_first_chunk().ok_or(BodyError::Truncated)?;
    let count = u16::from_be_bytes(count);
    let surbs = usize::from(count);
    if surbs == 0 || surbs > MAX_REPLY_SURBS {
        return Err(BodyError::Surbs(count));
    }
    let (bytes, rest) = input.split_at_checked(surbs * SURB_LEN).ok_or(BodyError::Truncated)?;
    let (surbs, _) = bytes.as_chunks();
    let key_epoch = u64::from_be_bytes(key_epoch);
    Ok((ReplySurbs { sender_tag: SenderTag(tag), key_epoch, surbs }, rest))
}

fn check_message(message: &[u8]) -> Result<&[u8], BodyError> {
    if message.is_empty() || message.len() > MAX_MESSAGE_BYTES {
        return Err(BodyError::Message(message.len()));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn surbs(surbs: &[[u8; SURB_LEN]]) -> ReplySurbs<'_> {
        ReplySurbs { sender_tag: SenderTag([4; 16]), key_epoch: 0x0102, surbs }
    }

    /// Kind, tag and epoch as above, the count, and so many SURBs of sevens.
    fn composed(kind: u8, count: u16, surbs: usize) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend([4; 16]);
        bytes.extend([0, 0, 0, 0, 0, 0, 1, 2]);
        bytes.extend(count.to_be_bytes());
        bytes.resize(27 + surbs * SURB_LEN, 7);
        bytes
    }

    #[test]
    fn bodies_have_the_documented_bytes() {
        let two = [[7; SURB_LEN]; 2];
        let with_message = [composed(1, 2, 2), b"hello".to_vec()].concat();
        let cases = [
            (Body::Plain(b"hello"), b"\0hello".to_vec()),
            (Body::WithSurbs(surbs(&two), b"hello"), with_message),
            (Body::Surbs(surbs(&two)), composed(2, 2, 2)),
            (Body::Request(0x0203), vec![3, 2, 3]),
        ];
        for (body, bytes) in cases {
            assert_eq!(body.to_bytes(), bytes);
            assert_eq!(Body::parse(&bytes), Ok(body));
        }
    }

    #[test]
    fn counts_of_surbs_are_bounded() {
        for count in [0, 1025, u16::MAX] {
            let bytes = composed(2, count, 2);
            assert_eq!(Body::parse(&bytes), Err(BodyError::Surbs(count)));
        }
        assert!(Body::parse(&composed(2, 1024, 1024)).is_ok());
        assert_eq!(Body::parse(&composed(2, 3, 2)), Err(BodyError::Truncated));
        assert_eq!(Body::parse(&composed(2, 1, 2)), Err(BodyError::Trailing(SURB_LEN)));
    }

    #[test]
    fn messages_are_neither_empty_nor_too_long() {
        assert_eq!(Body::parse(&[0]), Err(BodyError::Message(0)));
        assert_eq!(Body::parse(&composed(1, 2, 2)), Err(BodyError::Message(0)));
        let mut longest = vec![0; 1 + MAX_MESSAGE_BYTES];
        assert!(Body::parse(&longest).is_ok());
        longest.push(0);
        assert_eq!(Body::parse(&longest), Err(BodyError::Message(MAX_MESSAGE_BYTES + 1)));
    }

    #[test]
    fn unknown_kinds_and_odd_requests_are_refused() {
        assert_eq!(Body::parse(&[]), Err(BodyError::Truncated));
        for kind in 4..=255 {
            assert_eq!(Body::parse(&[kind, 1, 1]), Err(BodyError::Kind(kind)));
        }
        assert_eq!(Body::parse(&[3, 0, 0]), Err(BodyError::Request));
        assert_eq!(Body::parse(&[3, 1]), Err(BodyError::Truncated));
        assert_eq!(Body::parse(&[3, 1, 1, 1]), Err(BodyError::Trailing(1)));
    }

    #[test]
    fn debug_shows_nothing_of_a_message() {
        assert_eq!(format!("{:?}", Body::Plain(b"secret")), "Plain(6 bytes)");
    }

    proptest! {
        #[test]
        fn whatever_parses_is_written_the_same_way(
            kind in 0u8..5, count in 0u16..3, rest in vec(any::<u8>(), 0..900),
        ) {
            let mut bytes = composed(kind, count, 0);
            bytes.extend(rest);
            if let Ok(body) = Body::parse(&bytes) {
                prop_assert_eq!(body.to_bytes(), bytes);
            }
        }
    }
}
