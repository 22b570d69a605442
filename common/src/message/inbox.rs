//! Messages on their way in: reassembly, duplicates, and when the gateway may forget a delivery.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use zeroize::Zeroizing;

use super::SenderTag;
use super::fragment::{Fragment, Hour};
use super::packet::MessageSizes;
use super::remembered::{TakenId, TakenIds, TakenReplies, oldest_remembered};
use super::shelf::{Complete, Incomplete, Key, MAX_HELD_BYTES, Origin, Patience, Place, Shelf};
use super::stopwatch::Stopwatch;
use crate::address::Address;

/// How far in the future a message may have been sent that is taken in. What is dated later waits at the
/// gateway.
pub const MAX_HOURS_AHEAD: u32 = 2;

/// How far in the future a message may have been sent that waits: nobody is further ahead whose clock is
/// held within the validity of the network's documents. What is dated later is refused.
pub const MAX_HOURS_WAITING: u32 = 24;

/// Most deliveries from the future that wait at the gateway, an eighth of the number and a fifth of the
/// bytes that it keeps for a client. More are refused: they would keep out what is dated right.
pub const MAX_WAITING_FOR_HOUR: usize = 8 * 1024;

/// Most numbers of deliveries that wait to be confirmed. Older ones come again, and are confirmed then.
pub const MAX_CONFIRMATIONS: usize = 64 * 1024;

/// What became of a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// It is kept, or was already: whoever sent it may stop.
    Yes,
    /// It makes its message complete.
    Complete,
    /// There is no room for it: it must come again.
    NoRoom,
    /// Its message has another count of fragments, or another hour.
    Conflict,
    /// Its message was sent in the future: it must come again.
    TooEarly,
    /// Its message was sent so long ago that it may have been taken, or far in the future.
    Misdated,
}

/// A body that is complete.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) key: Key,
    pub(super) hour: Hour,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// Everything that comes in.
#[derive(Debug)]
pub(super) struct Inbox {
    sizes: MessageSizes,
    deliveries: Shelf,
    replies: Shelf,
    taken: TakenIds,
    taken_replies: TakenReplies,
    confirmations: VecDeque<u64>,
    /// Deliveries were dropped that are at the gateway still.
    has_dropped: bool,
    /// Deliveries from the future that are at the gateway still, and the hour from which on some of them
    /// may be taken in.
    too_early: BTreeSet<u64>,
    waits_for_hour: Option<Hour>,
    /// The gateway was asked for what it keeps, over the present connection.
    is_receiving: bool,
    /// It was said that all has come, while no connection was known: over an earlier one, or over the
    /// present one before that was known.
    has_missed_caught_up: bool,
}

impl Inbox {
    pub(super) fn new(sizes: MessageSizes, now: Instant, taken: TakenIds) -> Self {
        Self {
            sizes,
            deliveries: Shelf::default(),
            replies: Shelf { watch: Stopwatch::started(now), ..Shelf::default() },
            taken,
            taken_replies: TakenReplies::default(),
            confirmations: VecDeque::new(),
            has_dropped: false,
            too_early: BTreeSet::new(),
            waits_for_hour: None,
            is_receiving: false,
            has_missed_caught_up: false,
        }
    }

    /// Incomplete messages, complete ones that were not taken, bytes of both, and ids remembered.
    pub(super) fn counts(&self) -> (usize, usize, usize, usize) {
        let shelves = [&self.deliveries, &self.replies];
        let sum = |count: fn(&Shelf) -> usize| shelves.into_iter().map(count).sum();
        (
            sum(|shelf| shelf.incomplete.len()),
            sum(|shelf| shelf.complete.len()),
            sum(|shelf| shelf.held_bytes),
            self.taken.len() + self.taken_replies.len(),
        )
    }

    fn shelf(&mut self, origin: &Origin) -> &mut Shelf {
        match origin {
            Origin::Gateway => &mut self.deliveries,
            Origin::Replier(_) => &mut self.replies,
        }
    }

    /// The gateway was asked for all that it keeps, or there is no connection with it any more. In both
    /// cases pieces may be there that come much later, behind others: until [`Inbox::caught_up`] no time
    /// passes.
    pub(super) fn set_receiving(&mut self, now: Instant, is_receiving: bool) {
        self.deliveries.watch.look(now);
        self.deliveries.watch.stop();
        let was_receiving = std::mem::replace(&mut self.is_receiving, is_receiving);
        self.has_missed_caught_up &= !(was_receiving && is_receiving);
        if is_receiving {
            self.has_dropped = false;
            self.too_early.clear();
            self.waits_for_hour = None;
        }
    }

    /// All that the gateway kept when it was asked has come, and what it keeps from now on comes at once.
    pub(super) fn caught_up(&mut self, now: Instant) {
        match self.is_receiving {
            true => self.deliveries.watch.start(now),
            false => self.has_missed_caught_up = true,
        }
    }

    /// Whether all has come that the gateway kept when it was asked last.
    pub(super) fn is_caught_up(&self) -> bool {
        self.deliveries.watch.is_running()
    }

    /// Whether the gateway is to be asked once more for what it keeps: there is room now for what was
    /// dropped, the hour has come for what was too early, or it is not known whether all has come.
    pub(super) fn wants_again(&self, hour: Hour) -> bool {
        let has_room = self.deliveries.held_bytes <= MAX_HELD_BYTES / 2;
        let is_hour = self.waits_for_hour.is_some_and(|next| next <= hour);
        self.is_receiving && (self.has_missed_caught_up || is_hour || self.has_dropped && has_room)
    }

    /// The hour from which on something may be taken in that was too early.
    pub(super) fn waits_for_hour(&self) -> Option<Hour> {
        self.waits_for_hour
    }

    fn is_taken(&self, key: &Key, hour: Hour) -> bool {
        match key {
            (Origin::Gateway, id) => self.taken.contains(&TakenId { hour, id: *id }),
            (Origin::Replier(_), _) => self.taken_replies.contains(key),
        }
    }

    /// Whether a message that begins may be taken in, so that it will be remembered when it is taken.
    fn check_date(&mut self, this_hour: Hour, number: Option<u64>, hour: Hour) -> Result<(), Kept> {
        let oldest = oldest_remembered(this_hour);
        self.taken.forget_before(oldest);
        let hours_ahead = hour.0.saturating_sub(this_hour.0);
        if hour < oldest || self.taken.refuses(hour) || hours_ahead > MAX_HOURS_WAITING {
            return Err(Kept::Misdated);
        }
        if hours_ahead <= MAX_HOURS_AHEAD {
            return Ok(());
        }
        self.too_early.extend(number);
        if self.too_early.len() > MAX_WAITING_FOR_HOUR
            && let Some(number) = number
        {
            self.too_early.remove(&number);
            return Err(Kept::Misdated);
        }
        let taken_in = Hour(hour.0 - MAX_HOURS_AHEAD);
        self.waits_for_hour = Some(self.waits_for_hour.map_or(taken_in, |at| at.min(taken_in)));
        Err(Kept::TooEarly)
    }

    /// Takes in a fragment, which came as delivery `number` if it is from the gateway.
    pub(super) fn handle(
        &mut self,
        (now, this_hour): (Instant, Hour),
        origin: Origin,
        number: Option<u64>,
        fragment: &Fragment<'_>,
    ) -> Kept {
        let key = (origin, fragment.id);
        if self.is_taken(&key, fragment.hour) {
            self.confirm(number);
            return Kept::Yes;
        }
        match self.shelf(&origin).place(&key, number, fragment) {
            // The delivery whose number is known is confirmed when the message is taken.
            Place::Taken { is_known: true } => return Kept::Yes,
            Place::Taken { is_known: false } => {
                self.shelf(&origin).touch(now, &key);
                self.confirm(number);
                return Kept::Yes;
            }
            Place::Conflict => {
                self.confirm(number);
                return Kept::Conflict;
            }
            Place::New => {}
        }
        if origin == Origin::Gateway
            && !self.deliveries.incomplete.contains_key(&key)
            && let Err(kept) = self.check_date(this_hour, number, fragment.hour)
        {
            if kept == Kept::Misdated {
                self.confirm(number);
            }
            return kept;
        }
        if !self.make_room(&key, fragment.count) {
            self.has_dropped |= number.is_some();
            return Kept::NoRoom;
        }
        let fragment_bytes = self.sizes.fragment_bytes();
        let shelf = self.shelf(&origin);
        shelf.hold(origin, fragment_bytes);
        shelf.insert(now, key, number, fragment);
        if shelf.is_whole(&key) { Kept::Complete } else { Kept::Yes }
    }

    /// Whether one more fragment of this message of `count` may be kept. Older messages come first: what
    /// there is room for is completed, instead of a part of everything.
    fn make_room(&mut self, key: &Key, count: u16) -> bool {
        let fragment_bytes = self.sizes.fragment_bytes();
        if let (origin @ Origin::Replier(_), _) = key {
            // Fragments of replies were acknowledged: none makes room for another one.
            let is_begun = count > 1 && !self.replies.incomplete.contains_key(key);
            return self.replies.has_share(origin, fragment_bytes, is_begun);
        }
        let shelf = &mut self.deliveries;
        let begun = shelf.incomplete.get(key).map(|incomplete| incomplete.begun);
        while shelf.held_bytes + fragment_bytes > MAX_HELD_BYTES {
            match (shelf.by_begun.last_key_value().map(|(at, key)| (*at, *key)), begun) {
                (Some((newest, key)), Some(begun)) if newest > begun => {
                    self.has_dropped = true;
                    shelf.remove(&key, fragment_bytes);
                }
                _ => return false,
            }
        }
        true
    }

    /// Puts a complete message together. It stays held until [`Inbox::taken`].
    pub(super) fn assemble(&mut self, key: Key) -> Option<Arrived> {
        let fragment_bytes = self.sizes.fragment_bytes();
        let shelf = self.shelf(&key.0);
        let incomplete = shelf.remove(&key, fragment_bytes)?;
        let held_bytes = incomplete.fragments.len() * fragment_bytes;
        shelf.hold(key.0, held_bytes);
        let mut body = Zeroizing::new(Vec::with_capacity(held_bytes));
        for bytes in incomplete.fragments.values() {
            body.extend_from_slice(bytes);
        }
        let Incomplete { hour, numbers, .. } = incomplete;
        shelf.complete.insert(key, Complete { hour, numbers, held_bytes });
        Some(Arrived { key, hour, body })
    }

    /// The application has the message: it is remembered, and kept no longer.
    pub(super) fn taken(&mut self, key: Key) {
        let Some(hour) = self.discard(key) else { return };
        match key {
            (Origin::Gateway, id) => self.taken.insert(TakenId { hour, id }),
            (Origin::Replier(_), _) => self.taken_replies.insert(key),
        }
    }

    /// The complete message is kept no longer, and its deliveries are confirmed; when it was sent.
    pub(super) fn discard(&mut self, key: Key) -> Option<Hour> {
        let shelf = self.shelf(&key.0);
        let complete = shelf.complete.remove(&key)?;
        shelf.release(&key.0, complete.held_bytes);
        shelf.forget_empty_share(&key.0);
        complete.numbers.into_iter().for_each(|number| self.confirm(Some(number)));
        Some(complete.hour)
    }

    /// The gateway may forget this delivery.
    pub(super) fn confirm(&mut self, number: Option<u64>) {
        self.confirmations.extend(number);
        if self.confirmations.len() > MAX_CONFIRMATIONS {
            self.confirmations.pop_front();
        }
    }

    pub(super) fn poll_confirmation(&mut self) -> Option<u64> {
        self.confirmations.pop_front()
    }

    /// When [`Inbox::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let shelves = [(&self.deliveries, self.patience()), (&self.replies, Patience::USUAL)];
        let due = |(shelf, patience): (&Shelf, _)| {
            let (at, _) = shelf.given_up_first(patience)?;
            shelf.watch.due(at)
        };
        shelves.into_iter().filter_map(due).min()
    }

    /// With deliveries.
    fn patience(&self) -> Patience {
        if self.has_dropped { Patience::DROPPED } else { Patience::USUAL }
    }

    /// Gives up what nothing more comes of, or what is too old; returns how many messages that were.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> usize {
        let (patience, fragment_bytes) = (self.patience(), self.sizes.fragment_bytes());
        let mut given_up = 0;
        while let Some(incomplete) = self.deliveries.give_up(now, patience, fragment_bytes) {
            incomplete.numbers.into_iter().for_each(|number| self.confirm(Some(number)));
            given_up += 1;
        }
        while self.replies.give_up(now, Patience::USUAL, fragment_bytes).is_some() {
            given_up += 1;
        }
        given_up
    }

    #[cfg(test)]
    pub(super) fn confirmations(&self) -> Vec<u64> {
        self.confirmations.iter().copied().collect()
    }
}

/// What the application gets about the origin of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// Nobody can tell, and nobody can answer.
    Unknown,
    /// Somebody who can be answered by [`super::Messages::reply`].
    Anonymous(SenderTag),
    /// Whoever answers for this address.
    Replier(Address),
}

#[cfg(test)]
mod tests;
