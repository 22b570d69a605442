//! Messages: from an application to another one, also while that one is away.

mod body;
pub mod fragment;
pub mod packet;
pub mod sealed_box;

pub use body::{Body, BodyError, ReplySurbs, SENDER_TAG_LEN, SenderTag};

use mixsocks_sphinx::SURB_LEN;

/// Longest message, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Most SURBs that go with one message.
pub const MAX_REPLY_SURBS: usize = 1024;

/// Bytes of a body before its SURBs: kind, sender_tag, key epoch and their number.
const BODY_HEADER_LEN: usize = 1 + SENDER_TAG_LEN + 8 + 2;

/// Longest body: the longest message with as many SURBs as may go with it.
pub const MAX_BODY_BYTES: usize = BODY_HEADER_LEN + MAX_REPLY_SURBS * SURB_LEN + MAX_MESSAGE_BYTES;
