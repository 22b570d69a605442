//! Messages: from an application to another one, also while that one is away.
//!
//! [`Messages`] is the core of both ends. It cuts a [`Body`] into [fragments](fragment), says which
//! packet is to be sent next, and sends again what is not acknowledged; and it puts together what
//! comes in, once, and says what the gateway may forget. Boxes are sealed and opened by the shell
//! ([`sealed_box`]). The rules and their reasons are in `docs/messages.md`.

mod awaited;
mod body;
mod clock;
mod conversations;
mod core;
mod credit;
mod exchange;
pub mod fragment;
mod inbox;
mod lane;
mod outbox;
pub mod packet;
mod remembered;
mod replies;
pub mod sealed_box;
mod shelf;
#[cfg(test)]
mod simulation;
mod stopwatch;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use awaited::{AckSurbs, MadeSurb};
pub use body::{Body, BodyError, ReplySurbs, SENDER_TAG_LEN, SenderTag};
pub use conversations::{MAX_CONVERSATIONS, REFILL_ALLOWANCE, REFILL_FACTOR};
pub use core::{
    GIVE_UP_AFTER, MAX_AWAITED_ACKS, MAX_AWAITED_REPLIES, MAX_GIVE_UP_AFTER, MAX_OWED_ACKS,
    Messages,
};
pub use exchange::{
    Counts, Dropped, MessageEvent, MessageOptions, Purpose, Received, ReceivedId, Refill, Transmit,
};
pub use inbox::{
    MAX_CONFIRMATIONS, MAX_HOURS_AHEAD, MAX_HOURS_WAITING, MAX_WAITING_FOR_HOUR, Sender,
};
pub use outbox::{MAX_OUTGOING_BYTES, MAX_OUTGOING_MESSAGES, MAX_UNDER_WAY};
pub use remembered::{
    MAX_REFUSED_HOURS, MAX_REMEMBERED, REMEMBERED_FOR, TakenId, TakenIds, oldest_remembered,
};
pub use replies::{MAX_REPLY_SURBS_KEPT, MAX_SENDERS, MAX_SURBS_PER_SENDER, RESERVED_FOR_REQUESTS};
pub use shelf::{DROPPED_AGE, INCOMPLETE_AGE, MAX_HELD_BYTES, MAX_INCOMPLETE_REPLIES};

use mixsocks_sphinx::SURB_LEN;

/// Longest message, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Most SURBs that go with one message.
pub const MAX_REPLY_SURBS: usize = 1024;

/// Bytes of a body before its SURBs: kind, sender_tag, key epoch and their number.
const BODY_HEADER_LEN: usize = 1 + SENDER_TAG_LEN + 8 + 2;

/// Longest body: the longest message with as many SURBs as may go with it.
pub const MAX_BODY_BYTES: usize = BODY_HEADER_LEN + MAX_REPLY_SURBS * SURB_LEN + MAX_MESSAGE_BYTES;

/// Why a message is not taken in. The caller is at fault, or must wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// It has no bytes.
    #[error("an empty message cannot be sent")]
    Empty,
    /// It is longer than [`MAX_MESSAGE_BYTES`].
    #[error("a message of {0} bytes is longer than {MAX_MESSAGE_BYTES}")]
    TooLong(usize),
    /// More than [`MAX_REPLY_SURBS`] were to go with it.
    #[error("{0} SURBs are more than {MAX_REPLY_SURBS}")]
    TooManySurbs(usize),
    /// So much waits that it has to wait until something is delivered or has failed.
    #[error("too many messages wait to be sent")]
    Full,
    /// No gateway of the network has the identity in the recipient's address.
    #[error(
        "the recipient's gateway is not in this network: the address is wrong, or of another network"
    )]
    UnknownGateway,
    /// There is no route to the client itself, so that it can give no SURBs away.
    #[error("replies could not come: there is no route to this client")]
    NoRoute,
    /// The client has stopped.
    #[error("the client has stopped")]
    Stopped,
    /// Nobody with this sender_tag gave SURBs, or they are long ago.
    #[error("the sender cannot be answered")]
    UnknownSender,
}

/// Why a message was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FailReason {
    /// Not all of it was acknowledged in time. It may have arrived.
    #[error("the message was not confirmed in time; it may have arrived")]
    NotConfirmed,
    /// The recipient's share of its gateway's store was full all the time.
    #[error("the gateway keeps no more for the recipient")]
    ShareFull,
    /// The store of the recipient's gateway was full or failed all the time.
    #[error("the recipient's gateway could store nothing")]
    StoreUnavailable,
    /// The recipient is not registered at its gateway.
    #[error("the recipient is not known at its gateway")]
    UnknownClient,
    /// There was no way to the recipient's gateway.
    #[error("there is no route to the recipient's gateway")]
    NoRoute,
    /// There were no SURBs for a reply.
    #[error("there are no SURBs to reply with")]
    NoSurbs,
}
