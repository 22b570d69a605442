//! What each message should come to, and what it has come to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mixsocks_common::address::Address;
use mixsocks_common::message::fragment::MessageId;
use mixsocks_common::message::{FailReason, GIVE_UP_AFTER, ReceivedId, Sender, SenderTag};
use rand::RngExt;
use rand::rngs::StdRng;

/// Bytes that say which message it is, at the beginning of each that has as many.
pub(crate) const NAME_LEN: usize = 8;

/// How a message is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    /// With so many SURBs.
    Anonymous(usize),
    /// To whoever gave SURBs.
    Reply,
    /// To a client that its gateway does not know.
    ToStranger,
}

/// What its sender was told of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    UnderWay,
    Delivered,
    Failed(FailReason),
    /// Its sender was killed: nobody tells.
    Abandoned,
}

/// A message.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) kind: Kind,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// How often its sender had been killed before.
    life: u32,
    length: usize,
    at: Instant,
    pub(crate) fate: Fate,
    pub(crate) received: u32,
}

/// All messages of a run.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) sent: Vec<Sent>,
    ids: BTreeMap<MessageId, usize>,
    /// Who has shown a tag to whom, and the tag that is shown.
    tags: BTreeMap<SenderTag, Conversation>,
    shown: BTreeMap<Conversation, SenderTag>,
}

/// A sender, how often it was killed, and a recipient.
type Conversation = (usize, u32, usize);

/// How long a message is: from one byte to several hundred KiB, mostly short.
pub(crate) fn draw_length(rng: &mut StdRng) -> usize {
    let longest = match rng.random_range(0..100) {
        0..30 => 16,
        30..80 => 3000,
        80..98 => 30_000,
        _ => 400_000,
    };
    rng.random_range(1..=longest)
}

/// The bytes of a message.
fn bytes(number: usize, length: usize) -> Vec<u8> {
    let name = (number as u64).to_be_bytes();
    // Differs from message to message, and from place to place.
    let rest = (number..).map(|at| (at.wrapping_mul(167) >> 3).to_le_bytes()[0]);
    name.into_iter().chain(rest).take(length).collect()
}

impl Model {
    /// The next message: its number and bytes. Replies say their names, as nothing else tells them apart.
    pub(crate) fn next(&self, kind: Kind, length: usize) -> (usize, Vec<u8>) {
        let length = if kind == Kind::Reply { length.max(NAME_LEN) } else { length };
        (self.sent.len(), bytes(self.sent.len(), length))
    }

    /// It was taken in.
    pub(crate) fn on_sent(
        &mut self,
        id: MessageId,
        at: Instant,
        (from, life, to): Conversation,
        kind: Kind,
        message: &[u8],
    ) {
        self.ids.insert(id, self.sent.len());
        let (length, fate) = (message.len(), Fate::UnderWay);
        self.sent.push(Sent { kind, from, to, life, length, at, fate, received: 0 });
    }

    /// The sender of these messages was killed.
    pub(crate) fn on_killed(&mut self, client: usize) {
        let is_open = |sent: &&mut Sent| sent.from == client && sent.fate == Fate::UnderWay;
        for sent in self.sent.iter_mut().filter(is_open) {
            sent.fate = Fate::Abandoned;
        }
    }

    /// A sender is told what became of a message.
    pub(crate) fn on_outcome(
        &mut self,
        now: Instant,
        client: usize,
        id: &MessageId,
        fate: Fate,
    ) -> Result<(), String> {
        let number = *self.ids.get(id).ok_or("an outcome of a message that nobody sent")?;
        let sent = &mut self.sent[number];
        if sent.from != client || sent.fate != Fate::UnderWay {
            return Err(format!("{client} is told {fate:?} of message {number}: {sent:?}"));
        }
        if let Fate::Failed(reason) = fate {
            // Others have time until it is over; so has whoever cannot ask about a stranger.
            let is_right = match reason {
                FailReason::UnknownClient => sent.kind == Kind::ToStranger,
                // Clocks are compared in seconds.
                _ => now + Duration::from_secs(1) >= sent.at + GIVE_UP_AFTER,
            };
            if !is_right {
                return Err(format!("message {number} has failed, {reason:?}: {sent:?}"));
            }
        }
        sent.fate = fate;
        Ok(())
    }

    /// A client's application gets a message; its number.
    pub(crate) fn on_received(
        &mut self,
        client: usize,
        received: &ReceivedId,
        message: &[u8],
    ) -> Result<usize, String> {
        let number = match received.to_remember() {
            Some(taken) => self.ids.get(&taken.id).copied(),
            None => message.first_chunk().and_then(|name| {
                usize::try_from(u64::from_be_bytes(*name)).ok().filter(|at| *at < self.sent.len())
            }),
        };
        let number = number.ok_or("a message comes that nobody sent")?;
        let sent = &mut self.sent[number];
        sent.received += 1;
        if sent.received > 1 || sent.to != client || message != bytes(number, sent.length) {
            return Err(format!("message {number} comes to {client} and may not: {sent:?}"));
        }
        Ok(number)
    }

    /// Whether a message tells of its sender what it may.
    pub(crate) fn check_sender(
        &mut self,
        number: usize,
        sender: &Sender,
        address: impl Fn(usize) -> Address,
    ) -> Result<(), String> {
        let sent = &self.sent[number];
        let is_right = match (sent.kind, sender) {
            (Kind::Plain, Sender::Unknown) => true,
            (Kind::Reply, Sender::Replier(replier)) => *replier == address(sent.from),
            (Kind::Anonymous(_), Sender::Anonymous(tag)) => {
                let who = (sent.from, sent.life, sent.to);
                *self.tags.entry(*tag).or_insert(who) == who
                    && *self.shown.entry(who).or_insert(*tag) == *tag
            }
            _ => false,
        };
        if is_right { Ok(()) } else { Err(format!("{sender:?} of message {number}: {sent:?}")) }
    }

    /// At the end: what was delivered has come, and everybody was told. `may_fail` says of which
    /// messages it is no wonder that they failed.
    pub(crate) fn check_end(&self, may_fail: impl Fn(&Sent) -> bool) -> Result<(), String> {
        for (number, sent) in self.sent.iter().enumerate() {
            let is_right = match sent.fate {
                Fate::UnderWay => false,
                Fate::Delivered => sent.received == 1,
                Fate::Failed(_) => sent.kind == Kind::ToStranger || may_fail(sent),
                Fate::Abandoned => true,
            };
            if !is_right {
                return Err(format!("message {number} at the end: {sent:?}"));
            }
        }
        Ok(())
    }

    /// How many messages were sent, and delivered.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let is_delivered = |sent: &&Sent| sent.fate == Fate::Delivered;
        (self.sent.len(), self.sent.iter().filter(is_delivered).count())
    }
}
