//! Fragments: the numbered pieces that a body is sent in.
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 16 | message id |
//! | 16 | 4 | hour u32 in which the message was sent, since 1970; of replies zero |
//! | 20 | 2 | index u16, from 0 |
//! | 22 | 2 | count u16, how many fragments the body has |
//! | 24 | 2 | length u16, bytes of the body in this fragment |
//! | 26 | length | bytes of the body |
//! | the rest | | zeros |
//!
//! Each fragment but the last is full; none is empty. So the index says where in the body it belongs,
//! and one body is cut in one way only.

use std::fmt;

use super::packet::MessageSizes;
use crate::topology::UnixTime;

/// Bytes of a fragment before those of the body.
pub const FRAGMENT_HEADER_LEN: usize = MESSAGE_ID_LEN + 10;

/// Bytes of a [`MessageId`].
pub const MESSAGE_ID_LEN: usize = 16;

/// Most fragments of a body: as many as can be counted.
pub const MAX_FRAGMENTS: usize = u16::MAX as usize;

/// Names a message for its sender and its recipient: 16 random bytes, drawn for each message.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(pub [u8; MESSAGE_ID_LEN]);

/// Shows the first four bytes in hexadecimal.
impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "MessageId({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

/// An hour, counted since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Hour(pub u32);

impl Hour {
    /// The hour of this time; of what cannot be counted the last one.
    pub fn of(time: UnixTime) -> Self {
        Self(u32::try_from(time.0 / 3600).unwrap_or(u32::MAX))
    }

    /// The hour that follows; the last one is followed by itself.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A piece of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment<'a> {
    /// The message.
    pub id: MessageId,
    /// When the message was sent, by its sender's clock; one and the same in all its pieces.
    pub hour: Hour,
    /// Which piece, from 0.
    pub index: u16,
    /// How many pieces there are.
    pub count: u16,
    /// Bytes of the body.
    pub bytes: &'a [u8],
}

/// Why bytes are not a fragment. Its sender is at fault; it is dropped and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FragmentError {
    /// They are not exactly as long as they must be.
    #[error("a fragment of {len} bytes is not one of {expected}")]
    Length {
        /// Bytes that there are.
        len: usize,
        /// Bytes that there must be.
        expected: usize,
    },
    /// The index is not below the count.
    #[error("fragment {index} of {count}")]
    Index {
        /// The index.
        index: u16,
        /// The count.
        count: u16,
    },
    /// It holds no bytes, more than it has room for, or fewer although it is not the last.
    #[error("fragment {index} of {count} holds {length} bytes")]
    Bytes {
        /// The index.
        index: u16,
        /// The count.
        count: u16,
        /// How many bytes it says that it holds.
        length: u16,
    },
    /// The bytes behind those of the body are not zero.
    #[error("padding of a fragment is not zero")]
    Padding,
}

impl<'a> Fragment<'a> {
    /// Reads a fragment.
    ///
    /// # Errors
    /// See [`FragmentError`].
    pub fn parse(input: &'a [u8], sizes: MessageSizes) -> Result<Self, FragmentError> {
        let expected = sizes.fragment_bytes();
        let wrong_length = FragmentError::Length { len: input.len(), expected };
        if input.len() != expected {
            return Err(wrong_length);
        }
        let (id, rest) = input.split_first_chunk().ok_or(wrong_length)?;
        let (&hour, rest) = rest.split_first_chunk().ok_or(wrong_length)?;
        let (&[i0, i1, c0, c1, l0, l1], rest) = rest.split_first_chunk().ok_or(wrong_length)?;
        let hour = Hour(u32::from_be_bytes(hour));
        let index = u16::from_be_bytes([i0, i1]);
        let count = u16::from_be_bytes([c0, c1]);
        let length = u16::from_be_bytes([l0, l1]);
        if index >= count {
            return Err(FragmentError::Index { index, count });
        }
        let is_last = index == count - 1;
        let len = usize::from(length);
        if len == 0 || len > rest.len() || (!is_last && len < rest.len()) {
            return Err(FragmentError::Bytes { index, count, length });
        }
        let (bytes, padding) = rest.split_at(len);
        if padding.iter().any(|&byte| byte != 0) {
            return Err(FragmentError::Padding);
        }
        Ok(Self { id: MessageId(*id), hour, index, count, bytes })
    }

    /// The bytes of the fragment, padded to their fixed length.
    ///
    /// # Panics
    /// When it holds more than [`MessageSizes::fragment_data_bytes`].
    pub fn to_bytes(&self, sizes: MessageSizes) -> Vec<u8> {
        assert!(self.bytes.len() <= sizes.fragment_data_bytes(), "a fragment holds too much");
        let length = u16::try_from(self.bytes.len()).expect("fragments are shorter than 64 KiB");
        let mut out = Vec::with_capacity(sizes.fragment_bytes());
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.hour.0.to_be_bytes());
        out.extend_from_slice(&self.index.to_be_bytes());
        out.extend_from_slice(&self.count.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(self.bytes);
        out.resize(sizes.fragment_bytes(), 0);
        out
    }

    /// Fragment `index` of the body with this id and hour; `None` beyond the last.
    pub fn of_body(
        (id, hour): (MessageId, Hour),
        body: &'a [u8],
        index: u16,
        sizes: MessageSizes,
    ) -> Option<Self> {
        let data_bytes = sizes.fragment_data_bytes();
        let count = fragment_count(body.len(), sizes)?;
        let bytes = body.chunks(data_bytes).nth(index.into())?;
        Some(Self { id, hour, index, count, bytes })
    }
}

/// How many fragments a body of so many bytes has; `None` if those cannot be counted.
pub fn fragment_count(body_bytes: usize, sizes: MessageSizes) -> Option<u16> {
    u16::try_from(body_bytes.div_ceil(sizes.fragment_data_bytes())).ok()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const ID: MessageId = MessageId([3; MESSAGE_ID_LEN]);
    const HOUR: Hour = Hour(0x0007_a120);

    fn sizes() -> MessageSizes {
        MessageSizes::new(2031).unwrap()
    }

    /// The bytes of a fragment with these fields, put together by hand.
    fn composed(index: u16, count: u16, length: u16, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1587];
        bytes[..16].fill(3);
        bytes[16..20].copy_from_slice(&[0, 7, 0xa1, 0x20]);
        bytes[20..22].copy_from_slice(&index.to_be_bytes());
        bytes[22..24].copy_from_slice(&count.to_be_bytes());
        bytes[24..26].copy_from_slice(&length.to_be_bytes());
        bytes[26..26 + data.len()].copy_from_slice(data);
        bytes
    }

    #[test]
    fn a_fragment_has_the_documented_bytes() {
        let fragment = Fragment { id: ID, hour: HOUR, index: 0x0102, count: 0x0103, bytes: b"end" };
        let bytes = composed(0x0102, 0x0103, 3, b"end");
        assert_eq!(fragment.to_bytes(sizes()), bytes);
        assert_eq!(Fragment::parse(&bytes, sizes()), Ok(fragment));
    }

    #[test]
    fn an_index_that_is_not_below_the_count_is_refused() {
        for (index, count) in [(0, 0), (1, 1), (5, 4), (u16::MAX, u16::MAX)] {
            let bytes = composed(index, count, 1, &[1]);
            let error = FragmentError::Index { index, count };
            assert_eq!(Fragment::parse(&bytes, sizes()), Err(error));
        }
    }

    #[test]
    fn a_fragment_that_is_empty_too_full_or_not_full_in_the_middle_is_refused() {
        for (index, count, length) in [(0, 1, 0), (0, 1, 1562), (0, 1, u16::MAX), (0, 2, 1560)] {
            let bytes = composed(index, count, length, &[1; 1]);
            let error = FragmentError::Bytes { index, count, length };
            assert_eq!(Fragment::parse(&bytes, sizes()), Err(error));
        }
        assert!(Fragment::parse(&composed(0, 2, 1561, &[1]), sizes()).is_ok());
        assert!(Fragment::parse(&composed(1, 2, 1, &[1]), sizes()).is_ok());
    }

    #[test]
    fn padding_that_is_not_zero_is_refused() {
        for at in [27, 100, 1586] {
            let mut bytes = composed(0, 1, 1, &[1]);
            bytes[at] = 1;
            assert_eq!(Fragment::parse(&bytes, sizes()), Err(FragmentError::Padding));
        }
    }

    #[test]
    fn fragments_of_another_length_are_refused() {
        for len in [0, 15, 25, 26, 1586, 1588] {
            let mut bytes = composed(0, 1, 1, &[1]);
            bytes.resize(len, 0);
            let error = FragmentError::Length { len, expected: 1587 };
            assert_eq!(Fragment::parse(&bytes, sizes()), Err(error));
        }
    }

    proptest! {
        #[test]
        fn a_body_is_its_fragments(body in vec(any::<u8>(), 1..5000)) {
            let count = fragment_count(body.len(), sizes()).unwrap();
            let mut joined = Vec::new();
            for index in 0..count {
                let fragment = Fragment::of_body((ID, HOUR), &body, index, sizes()).unwrap();
                let bytes = fragment.to_bytes(sizes());
                prop_assert_eq!(Fragment::parse(&bytes, sizes()), Ok(fragment));
                joined.extend_from_slice(fragment.bytes);
            }
            prop_assert_eq!(Fragment::of_body((ID, HOUR), &body, count, sizes()), None);
            prop_assert_eq!(joined, body);
        }

        #[test]
        fn whatever_parses_is_written_the_same_way(
            mut bytes in vec(any::<u8>(), 1587),
            index in 0u16..4,
            count in 0u16..4,
            length in 0u16..1600,
        ) {
            bytes[20..22].copy_from_slice(&index.to_be_bytes());
            bytes[22..24].copy_from_slice(&count.to_be_bytes());
            bytes[24..26].copy_from_slice(&length.to_be_bytes());
            let end = (26 + usize::from(length)).min(1587);
            bytes[end..].fill(0);
            if let Ok(fragment) = Fragment::parse(&bytes, sizes()) {
                prop_assert_eq!(fragment.to_bytes(sizes()), bytes);
            }
        }
    }
}
