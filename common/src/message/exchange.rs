//! What the core of messages is told, and what it tells: packets to send, news for the application, and
//! how much it holds.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use mixsocks_sphinx::{Identifier, Surb};
use zeroize::Zeroizing;

use super::FailReason;
use super::fragment::{Hour, MessageId};
use super::inbox::Sender;
use super::outbox::Piece;
use super::packet::MessageSizes;
use super::remembered::{TakenId, TakenIds};
use super::shelf::{Key, Origin};
use crate::address::Address;
use crate::topology::UnixTime;

/// What a core is told at its start.
#[derive(Debug, Clone)]
pub struct MessageOptions {
    /// The sizes of the network.
    pub sizes: MessageSizes,
    /// How long after its last progress a message is given up; more than [`super::MAX_GIVE_UP_AFTER`] is that.
    pub give_up_after: Duration,
    /// What the wall clock shows.
    pub wall: UnixTime,
    /// How long the network's document is valid: see [`super::Messages::set_validity`].
    pub validity: RangeInclusive<UnixTime>,
    /// Longest time (p99.9) that the mixes of a reply hold it, whose delays the replier does not know.
    pub unknown_delays: Duration,
    /// Messages that the application has had, also before the last start.
    pub known: TakenIds,
}

/// Something to send. Boxes are sealed and SURBs used by the shell.
#[derive(Debug)]
pub enum Transmit {
    /// A fragment for somebody whose address is known. The shell says by [`super::Messages::sent`] which delays
    /// it chose, or by [`super::Messages::unsent`] that there is no route.
    Message {
        /// To whom; also the encryption key of the box.
        recipient: Address,
        /// The fragment, not sealed yet.
        fragment: Zeroizing<Vec<u8>>,
        /// For the acknowledgement.
        ack_surb: Surb,
        /// Names that.
        ack: Identifier,
    },
    /// A fragment for somebody who gave a SURB.
    Reply {
        /// What it is sent by.
        surb: Surb,
        /// The fragment.
        fragment: Zeroizing<Vec<u8>>,
        /// For the acknowledgement.
        ack_surb: Surb,
    },
    /// An acknowledgement of a reply: [`super::packet::AckStatus::Stored`].
    Acknowledgement {
        /// What it is sent by.
        surb: Surb,
    },
}

/// Names a message that the application was given, until it has taken it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceivedId {
    pub(super) key: Key,
    pub(super) hour: Hour,
}

impl ReceivedId {
    /// The id to be written down before the application gets the message, so that it is not received
    /// once more after a restart. Replies need none: nobody keeps them, and their SURBs are forgotten.
    pub fn to_remember(&self) -> Option<TakenId> {
        let ReceivedId { key: (origin, id), hour } = *self;
        (origin == Origin::Gateway).then_some(TakenId { hour, id })
    }
}

/// What the application is told.
#[derive(Clone, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "it is handed over at once, and most are the largest"
)]
pub enum MessageEvent {
    /// A message came. [`super::Messages::taken`] is to be called when the application has it.
    Received {
        /// Names it.
        received: ReceivedId,
        /// The message.
        message: Vec<u8>,
        /// Where it is from.
        sender: Sender,
    },
    /// All of the message is stored durably for its recipient: it will arrive.
    Delivered(MessageId),
    /// The message was given up.
    Failed(MessageId, FailReason),
}

/// A message that came. [`super::Messages::taken`] is to be called when the application has it.
#[derive(PartialEq, Eq)]
pub struct Received {
    /// Names it.
    pub received: ReceivedId,
    /// The message.
    pub message: Vec<u8>,
    /// Where it is from.
    pub sender: Sender,
}

/// Shows nothing of the message.
impl std::fmt::Debug for Received {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Received({} bytes, {:?})", self.message.len(), self.sender)
    }
}

impl From<Received> for MessageEvent {
    fn from(Received { received, message, sender }: Received) -> Self {
        Self::Received { received, message, sender }
    }
}

/// Shows nothing of a message.
impl std::fmt::Debug for MessageEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Received { message, sender, .. } => {
                write!(f, "Received({} bytes, {sender:?})", message.len())
            }
            Self::Delivered(id) => write!(f, "Delivered({id:?})"),
            Self::Failed(id, reason) => write!(f, "Failed({id:?}, {reason:?})"),
        }
    }
}

/// A recipient that is to be given SURBs because it asked for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refill {
    /// Who.
    pub recipient: Address,
    /// How many.
    pub surbs: usize,
}

/// What a SURB was for by which something came.
#[derive(Debug)]
pub struct Purpose(pub(super) PurposeKind);

impl Purpose {
    /// When that left which is acknowledged; `None` if it is a reply.
    pub fn sent(&self) -> Option<Instant> {
        match &self.0 {
            PurposeKind::Ack(_, piece) => Some(piece.sent),
            PurposeKind::Reply(_) => None,
        }
    }
}

#[derive(Debug)]
pub(super) enum PurposeKind {
    Ack(Identifier, Piece),
    Reply(Address),
}

/// What was dropped, in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Boxes, fragments, bodies and acknowledgements that are none.
    pub malformed: u64,
    /// Fragments whose message has another count.
    pub conflicting: u64,
    /// Fragments of messages that were sent too long ago, in an hour that is refused, or far in the future.
    pub misdated: u64,
    /// Fragments of messages from the future, which wait at the gateway.
    pub too_early: u64,
    /// Fragments that there was no room for.
    pub no_room: u64,
    /// Messages of which not all came.
    pub incomplete: u64,
    /// SURBs that are none, too many, or lead to nowhere.
    pub surbs: u64,
    /// Acknowledgements of replies that could not be sent soon enough.
    pub owed_acks: u64,
}

/// How much a core holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Messages that are not delivered yet, bytes of their bodies, fragments under way.
    pub outgoing: (usize, usize, usize),
    /// Incomplete messages, complete ones that were not taken, bytes of both, ids that are remembered.
    pub incoming: (usize, usize, usize, usize),
    /// Acknowledgements and replies that are awaited.
    pub awaited: (usize, usize),
    /// SURBs for replies, and how many senders gave them.
    pub reply_surbs: (usize, usize),
    /// Recipients that were given SURBs.
    pub conversations: usize,
}
