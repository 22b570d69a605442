//! Sessions and streams: what carries TCP through the mixnet.
//!
//! A [`ClientSession`] and a [`ProviderSession`] exchange numbered packets. The client's travel in
//! packets of their own, the provider's on the SURBs that the client sends. Neither knows a clock, a
//! socket or a key.
//!
//! Contents of a packet, client to provider:
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 1 | 1, [`PacketKind::Session`] |
//! | 1 | 16 | session id |
//! | 17 | 1–8 | packet number, varint |
//! | | 1–8 | how far below it the lowest number is that still matters, varint |
//! | | | frames, see [`frame`] |
//!
//! Provider to client:
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 1 | 2, [`PacketKind::Reply`] |
//! | 1 | 1–8 | reply number, varint |
//! | | 1–8 | how far below it the lowest number is that still matters, varint |
//! | | 4 | time of sending in µs since the session began, modulo 2^32 |
//! | | | frames, see [`frame`] |

mod access;
mod client;
pub(crate) mod estimate;
mod flight;
pub mod frame;
mod halves;
mod outcome;
mod provider;
mod ranges;
mod received;
mod stock;
mod streams;
mod surb_window;
mod table;
#[cfg(test)]
mod tests;
mod transport;

pub use access::{
    ACCESS_TOKEN_LEN, AccessToken, AccessTokenHash, AccessTokens, MAX_ACCESS_TOKENS,
    PresentedToken, TooManyAccessTokens,
};
pub use client::{
    ClientSession, FIRST_KEEPALIVE, KEEPALIVE, ReplyError, SESSION_SILENCE, SessionId, StreamReset,
    SurbSource,
};
pub use halves::{
    INITIAL_WINDOW_BYTES, MAX_GAPS, MAX_HELD_BYTES, MAX_WINDOW_BYTES, SEND_AHEAD_BYTES,
    StreamViolation,
};
pub use outcome::OpenOutcome;
pub use provider::{PacketError, ProviderSession};
pub use ranges::RangeSet;
pub use received::{ACK_AFTER_PACKETS, ACK_DELAY, MAX_NUMBER_SPAN};
pub use stock::{MAX_STOCK_SURBS, RESERVE_SURBS};
pub use streams::{MAX_STREAMS, StreamEvent, Violation, WINDOW_POOL_BYTES};
pub use table::{
    Dropped, Handled, MAX_REMEMBERED, MAX_SESSIONS, MAX_START_AGE, ProviderSessions, START_STEP,
    start_time_ms,
};

use frame::FrameError;

/// Bytes of a session id.
pub const SESSION_ID_LEN: usize = 16;

/// The first byte of what a recipient finds in a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PacketKind {
    /// 1: a packet of a session, client to provider.
    Session = 1,
    /// 2: a reply of a session, provider to client.
    Reply = 2,
}

impl PacketKind {
    fn take(self, input: &mut &[u8]) -> Result<(), FrameError> {
        match input.split_off_first() {
            Some(&kind) if kind == self as u8 => Ok(()),
            Some(&kind) => Err(FrameError::UnknownType(kind)),
            None => Err(FrameError::Truncated),
        }
    }
}
