//! Messages on their way in: reassembly, duplicates, and when the gateway may forget a delivery.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::SenderTag;
use super::fragment::{Fragment, Hour, MessageId};
use super::packet::MessageSizes;
use super::remembered::{TakenId, TakenIds, TakenReplies, oldest_remembered};
use super::stopwatch::Stopwatch;
use crate::address::Address;

/// Most bytes of fragments, of messages that are incomplete or that the application has not taken: as many
/// as the gateway keeps for a client, so that whatever it keeps can be put together. Replies, which the
/// gateway does not keep, have as much for themselves.
pub const MAX_HELD_BYTES: usize = 64 * 1024 * 1024;

/// Most replies of which fragments are missing. Messages that the gateway keeps have no such bound: whoever
/// filled it with pieces would keep out all others, and their bytes are bounded.
pub const MAX_INCOMPLETE_REPLIES: usize = 4096;

/// Whoever replies may hold so many times what is left of the room for replies, in bytes and in messages
/// that are incomplete: one has four fifths at most, two have four ninths each, and whoever comes next
/// finds some. Nothing that was acknowledged has to go for that.
const SHARE_OF_REST: usize = 4;

/// A message of which nothing more came for so long, while the gateway had handed over all else, is given
/// up: three times as long as its sender tries by default.
pub const INCOMPLETE_AGE: Duration = Duration::from_secs(30 * 60);

/// The same when pieces were dropped that the gateway still has: they come again when there is room, and
/// room there must be at last.
pub const DROPPED_AGE: Duration = Duration::from_secs(2 * 60 * 60);

/// How old a message may become that is incomplete still, since its first fragment came, whatever comes of
/// it: this, and [`TIME_PER_FRAGMENT`] more for each fragment that came. Its sender has given up half an hour
/// before, by the same arithmetic.
pub(super) const WHOLE_AGE: Duration = Duration::from_secs(2 * 60 * 60);

/// See [`WHOLE_AGE`]: some 1 kB/s, and 4½ hours for the longest message.
pub(super) const TIME_PER_FRAGMENT: Duration = Duration::from_millis(1500);

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

/// Where a fragment came from. Messages of different origins have nothing to do with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Origin {
    /// The gateway, from anybody.
    Gateway,
    /// Whoever was given SURBs by messages to this address.
    Replier(Address),
}

pub(super) type Key = (Origin, MessageId);

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

#[derive(Debug)]
struct Incomplete {
    count: u16,
    hour: Hour,
    fragments: BTreeMap<u16, Zeroizing<Vec<u8>>>,
    numbers: BTreeSet<u64>,
    /// Counts up, to tell the newest.
    begun: u64,
    /// When the first fragment came and the last one, by the stopwatch of its shelf.
    first_came: Duration,
    last_news: Duration,
}

impl Incomplete {
    /// When it has become too old, if nothing was dropped that the gateway still has.
    fn whole_age_ends(&self) -> Duration {
        let fragments = u32::try_from(self.fragments.len()).unwrap_or(u32::MAX);
        self.first_came + WHOLE_AGE + TIME_PER_FRAGMENT.saturating_mul(fragments)
    }
}

/// A message that is complete, until the application has taken it.
#[derive(Debug)]
struct Complete {
    hour: Hour,
    numbers: BTreeSet<u64>,
    held_bytes: usize,
}

/// A body that is complete.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) key: Key,
    pub(super) hour: Hour,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// What is known of a fragment's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    New,
    /// It is there. `is_known` tells that it came as a delivery of which the number is kept.
    Taken {
        is_known: bool,
    },
    Conflict,
}

/// For how long messages may be incomplete.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Since something came of it.
    age: Duration,
    /// In all, beyond its own time, as pieces were dropped that the gateway still has.
    dropped: Duration,
}

impl Patience {
    const USUAL: Self = Self { age: INCOMPLETE_AGE, dropped: Duration::ZERO };
    const DROPPED: Self = Self { age: DROPPED_AGE, dropped: DROPPED_AGE };
}

/// What one origin holds.
#[derive(Debug, Default)]
struct Share {
    incomplete: usize,
    held_bytes: usize,
}

/// Messages of one kind of origin, from the gateway or from repliers. Each kind has room of its own, so
/// that neither keeps the other out.
#[derive(Debug, Default)]
struct Shelf {
    incomplete: BTreeMap<Key, Incomplete>,
    by_begun: BTreeMap<u64, Key>,
    by_news: BTreeSet<(Duration, Key)>,
    /// By [`Incomplete::whole_age_ends`].
    by_age: BTreeSet<(Duration, Key)>,
    /// Goes while more can be expected at once of whatever is incomplete.
    watch: Stopwatch,
    begun: u64,
    complete: BTreeMap<Key, Complete>,
    held_bytes: usize,
    shares: BTreeMap<Origin, Share>,
}

impl Shelf {
    fn place(&self, key: &Key, number: Option<u64>, fragment: &Fragment<'_>) -> Place {
        let taken = |numbers: &BTreeSet<u64>| Place::Taken {
            is_known: number.is_some_and(|number| numbers.contains(&number)),
        };
        if let Some(complete) = self.complete.get(key) {
            return taken(&complete.numbers);
        }
        match self.incomplete.get(key) {
            Some(incomplete)
                if (incomplete.count, incomplete.hour) != (fragment.count, fragment.hour) =>
            {
                Place::Conflict
            }
            Some(incomplete) if incomplete.fragments.contains_key(&fragment.index) => {
                taken(&incomplete.numbers)
            }
            _ => Place::New,
        }
    }

    fn insert(&mut self, now: Instant, key: Key, number: Option<u64>, fragment: &Fragment<'_>) {
        let now = self.watch.look(now);
        let share = self.shares.entry(key.0).or_default();
        let incomplete = self.incomplete.entry(key).or_insert_with(|| {
            share.incomplete += 1;
            self.begun += 1;
            self.by_begun.insert(self.begun, key);
            Incomplete {
                count: fragment.count,
                hour: fragment.hour,
                fragments: BTreeMap::new(),
                numbers: BTreeSet::new(),
                begun: self.begun,
                first_came: now,
                last_news: now,
            }
        });
        self.by_age.remove(&(incomplete.whole_age_ends(), key));
        self.by_news.remove(&(incomplete.last_news, key));
        self.by_news.insert((now, key));
        incomplete.last_news = now;
        incomplete.numbers.extend(number);
        incomplete.fragments.insert(fragment.index, Zeroizing::new(fragment.bytes.to_vec()));
        self.by_age.insert((incomplete.whole_age_ends(), key));
    }

    /// A piece came once more that is there already: its sender still tries. That does not make the
    /// message any younger.
    fn touch(&mut self, now: Instant, key: &Key) {
        let now = self.watch.look(now);
        if let Some(incomplete) = self.incomplete.get_mut(key) {
            self.by_news.remove(&(incomplete.last_news, *key));
            self.by_news.insert((now, *key));
            incomplete.last_news = now;
        }
    }

    /// The message that is given up first, and when.
    fn given_up_first(&self, patience: Patience) -> Option<(Duration, Key)> {
        let silent = self.by_news.first().map(|(last_news, key)| (*last_news + patience.age, *key));
        let old = self.by_age.first().map(|(ends, key)| (*ends + patience.dropped, *key));
        silent.into_iter().chain(old).min()
    }

    /// Takes out a message that nothing more came of for too long, or that is too old.
    fn give_up(
        &mut self,
        now: Instant,
        patience: Patience,
        fragment_bytes: usize,
    ) -> Option<Incomplete> {
        let now = self.watch.look(now);
        let (at, key) = self.given_up_first(patience)?;
        if !self.watch.is_running() || at > now {
            return None;
        }
        self.remove(&key, fragment_bytes)
    }

    fn is_whole(&self, key: &Key) -> bool {
        self.incomplete
            .get(key)
            .is_some_and(|message| message.fragments.len() == usize::from(message.count))
    }

    fn remove(&mut self, key: &Key, fragment_bytes: usize) -> Option<Incomplete> {
        let incomplete = self.incomplete.remove(key)?;
        self.by_begun.remove(&incomplete.begun);
        self.by_news.remove(&(incomplete.last_news, *key));
        self.by_age.remove(&(incomplete.whole_age_ends(), *key));
        self.release(&key.0, incomplete.fragments.len() * fragment_bytes);
        if let Some(share) = self.shares.get_mut(&key.0) {
            share.incomplete -= 1;
        }
        self.forget_empty_share(&key.0);
        Some(incomplete)
    }

    fn hold(&mut self, origin: Origin, bytes: usize) {
        self.held_bytes += bytes;
        self.shares.entry(origin).or_default().held_bytes += bytes;
    }

    fn release(&mut self, origin: &Origin, bytes: usize) {
        self.held_bytes -= bytes;
        if let Some(share) = self.shares.get_mut(origin) {
            share.held_bytes -= bytes;
        }
    }

    fn forget_empty_share(&mut self, origin: &Origin) {
        if self.shares.get(origin).is_some_and(|share| share.held_bytes + share.incomplete == 0) {
            self.shares.remove(origin);
        }
    }

    /// Whether this origin may hold so many bytes more and, if the fragment begins a message of several,
    /// another incomplete one.
    fn has_share(&self, origin: &Origin, bytes: usize, is_begun: bool) -> bool {
        let (held, incomplete) =
            self.shares.get(origin).map_or((0, 0), |share| (share.held_bytes, share.incomplete));
        let fits = |own: usize, all: usize, max: usize| {
            max.checked_sub(all).is_some_and(|left| own <= SHARE_OF_REST * left)
        };
        fits(held, self.held_bytes + bytes, MAX_HELD_BYTES)
            && (!is_begun || fits(incomplete, self.incomplete.len() + 1, MAX_INCOMPLETE_REPLIES))
    }
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
mod tests {
    use proptest::prelude::*;

    use super::super::remembered::MAX_REMEMBERED;
    use super::super::testing::address;
    use super::*;

    fn sizes() -> MessageSizes {
        MessageSizes::new(2031).unwrap()
    }

    const HOUR: Hour = Hour(500_000);

    fn id(number: u32) -> MessageId {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        MessageId(id)
    }

    fn inbox(now: Instant) -> Inbox {
        let mut inbox = Inbox::new(sizes(), now, TakenIds::default());
        inbox.set_receiving(now, true);
        inbox.caught_up(now);
        inbox
    }

    /// Lets time pass as a shell does, and no longer than until then; how many were given up.
    fn wait(inbox: &mut Inbox, until: Instant) -> usize {
        let mut given_up = 0;
        while let Some(at) = inbox.poll_timeout().filter(|at| *at <= until) {
            given_up += inbox.handle_timeout(at);
            assert!(inbox.poll_timeout().is_none_or(|next| next > at), "due means now");
        }
        given_up + inbox.handle_timeout(until)
    }

    fn fragment(message: u32, index: u16, count: u16) -> Fragment<'static> {
        Fragment { id: id(message), hour: HOUR, index, count, bytes: b"piece" }
    }

    fn handle(inbox: &mut Inbox, now: Instant, number: u64, fragment: &Fragment<'_>) -> Kept {
        inbox.handle((now, HOUR), Origin::Gateway, Some(number), fragment)
    }

    #[test]
    fn a_delivery_is_confirmed_only_when_its_message_was_taken() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        assert_eq!(handle(&mut inbox, now, 1, &fragment(0, 0, 2)), Kept::Yes);
        assert_eq!(handle(&mut inbox, now, 2, &fragment(0, 1, 2)), Kept::Complete);
        let arrived = inbox.assemble((Origin::Gateway, id(0))).unwrap();
        assert_eq!(arrived.body[..], *b"piecepiece");
        assert_eq!(inbox.confirmations(), []);
        // The same deliveries again, and a copy that the sender sent again.
        assert_eq!(handle(&mut inbox, now, 1, &fragment(0, 0, 2)), Kept::Yes);
        assert_eq!(inbox.confirmations(), []);
        assert_eq!(handle(&mut inbox, now, 3, &fragment(0, 0, 2)), Kept::Yes);
        assert_eq!(inbox.confirmations(), [3]);
        inbox.taken(arrived.key);
        assert_eq!(inbox.confirmations(), [3, 1, 2]);
        assert_eq!(handle(&mut inbox, now, 4, &fragment(0, 1, 2)), Kept::Yes);
        assert_eq!(inbox.confirmations(), [3, 1, 2, 4]);
        assert_eq!(inbox.counts(), (0, 0, 0, 1));
    }

    #[test]
    fn copies_of_fragments_of_incomplete_messages_are_confirmed_but_not_the_first_one() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        for number in [1, 1, 2] {
            assert_eq!(handle(&mut inbox, now, number, &fragment(0, 0, 2)), Kept::Yes);
        }
        assert_eq!(inbox.confirmations(), [2]);
    }

    #[test]
    fn a_fragment_with_another_count_is_dropped_and_harms_nothing() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        handle(&mut inbox, now, 1, &fragment(0, 0, 2));
        assert_eq!(handle(&mut inbox, now, 2, &fragment(0, 1, 3)), Kept::Conflict);
        assert_eq!(inbox.confirmations(), [2]);
        assert_eq!(handle(&mut inbox, now, 3, &fragment(0, 1, 2)), Kept::Complete);
    }

    #[test]
    fn ids_that_were_known_at_the_start_are_not_received_again() {
        let now = Instant::now();
        let mut known = TakenIds::default();
        known.insert(TakenId { hour: HOUR, id: id(7) });
        let mut inbox = Inbox::new(sizes(), now, known);
        assert_eq!(handle(&mut inbox, now, 1, &fragment(7, 0, 1)), Kept::Yes);
        assert_eq!((inbox.confirmations(), inbox.counts().1), (vec![1], 0));
    }

    /// Takes a message of one fragment, if it may be.
    fn take(inbox: &mut Inbox, hour: u32, message: u32) -> Kept {
        let (id, number) = (id(message), u64::from(message));
        let fragment = Fragment { id, hour: Hour(hour), index: 0, count: 1, bytes: b"m" };
        let now = Instant::now();
        let kept = inbox.handle((now, HOUR), Origin::Gateway, Some(number), &fragment);
        if kept == Kept::Complete {
            let arrived = inbox.assemble((Origin::Gateway, id)).unwrap();
            inbox.taken(arrived.key);
        }
        kept
    }

    /// Somebody fills the memory with messages of one hour, and a gateway hands old boxes over again.
    #[test]
    fn a_full_memory_refuses_only_the_hour_that_fills_it_and_nothing_is_taken_twice() {
        let many = u32::try_from(MAX_REMEMBERED).unwrap();
        for full in [HOUR.0 - 5, HOUR.0, HOUR.0 + MAX_HOURS_AHEAD] {
            let mut inbox = inbox(Instant::now());
            let others = [HOUR.0 - 9, HOUR.0 - 1, HOUR.0 + 1];
            for hour in others {
                assert_eq!(take(&mut inbox, hour, hour), Kept::Complete);
            }
            for message in 0..many {
                let kept = take(&mut inbox, full, message);
                let is_room = usize::try_from(message).unwrap() + others.len() <= MAX_REMEMBERED;
                assert_eq!(kept, if is_room { Kept::Complete } else { Kept::Misdated });
            }
            assert_eq!(take(&mut inbox, full, 0), Kept::Misdated);
            for hour in others {
                assert_eq!(take(&mut inbox, hour, hour), Kept::Yes, "it is remembered");
                assert_eq!(take(&mut inbox, hour, 999_999), Kept::Complete, "it waited");
            }
            assert!(inbox.taken.len() <= MAX_REMEMBERED);
        }
    }

    #[test]
    fn messages_that_are_older_than_what_is_remembered_are_refused() {
        let mut inbox = inbox(Instant::now());
        let oldest = oldest_remembered(HOUR).0;
        assert_eq!(take(&mut inbox, oldest - 1, 1), Kept::Misdated);
        assert_eq!(take(&mut inbox, oldest, 2), Kept::Complete);
        assert_eq!(inbox.confirmations(), [1, 2]);
    }

    #[test]
    fn messages_from_the_future_wait_at_the_gateway_until_their_hour() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        let latest = HOUR.0 + MAX_HOURS_AHEAD;
        let good = Fragment { hour: Hour(latest), ..fragment(0, 0, 2) };
        assert_eq!(handle(&mut inbox, now, 1, &good), Kept::Yes);
        let early = Fragment { hour: Hour(latest + 2), ..fragment(1, 0, 1) };
        assert_eq!(handle(&mut inbox, now, 2, &early), Kept::TooEarly);
        let never = Fragment { hour: Hour(HOUR.0 + MAX_HOURS_WAITING + 1), ..fragment(2, 0, 1) };
        assert_eq!(handle(&mut inbox, now, 3, &never), Kept::Misdated);
        let other = Fragment { hour: HOUR, ..fragment(0, 1, 2) };
        let kept = handle(&mut inbox, now, 4, &other);
        assert_eq!(kept, Kept::Conflict, "pieces of one are of one hour");
        assert_eq!(inbox.confirmations(), [3, 4]);
        let hour = Hour(HOUR.0 + 2);
        assert_eq!(inbox.waits_for_hour(), Some(hour));
        assert!(!inbox.wants_again(HOUR.next()) && inbox.wants_again(hour));
        inbox.set_receiving(now, true);
        let kept = inbox.handle((now, hour), Origin::Gateway, Some(2), &early);
        assert_eq!((kept, inbox.wants_again(hour)), (Kept::Complete, false));
    }

    #[test]
    fn what_waits_for_its_hour_is_bounded_and_does_not_wait_for_room() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        let max = MAX_HELD_BYTES / sizes().fragment_bytes();
        for index in 0..u16::try_from(max).unwrap() {
            handle(&mut inbox, now, index.into(), &fragment(0, index, u16::MAX));
        }
        let later = HOUR.0 + MAX_HOURS_AHEAD + 1;
        for message in 1..=u32::try_from(MAX_WAITING_FOR_HOUR).unwrap() {
            assert_eq!(take(&mut inbox, later, 100_000 + message), Kept::TooEarly);
        }
        assert_eq!(take(&mut inbox, later, 200_000), Kept::Misdated);
        assert_eq!(take(&mut inbox, later, 100_001), Kept::TooEarly, "it waits already");
        assert_eq!(inbox.confirmations(), [200_000]);
        assert!(!inbox.wants_again(HOUR) && inbox.wants_again(HOUR.next()));
    }

    #[test]
    fn the_newest_messages_make_room_and_are_asked_for_again() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        let max = u32::try_from(MAX_HELD_BYTES / sizes().fragment_bytes()).unwrap();
        let big = u16::MAX;
        // The first message and a second one fill all the room together.
        for index in 0..u16::try_from(max / 2).unwrap() {
            handle(&mut inbox, now, index.into(), &fragment(0, index, big));
        }
        let mut index = 0;
        while handle(&mut inbox, now, 50_000 + u64::from(index), &fragment(1, index, big))
            == Kept::Yes
        {
            index += 1;
        }
        assert!(inbox.counts().2 <= MAX_HELD_BYTES);
        assert_eq!(u32::from(index) + max / 2, max);
        assert_eq!(handle(&mut inbox, now, 99_000, &fragment(2, 0, 1)), Kept::NoRoom);
        assert!(!inbox.wants_again(HOUR), "there is no room");
        let first = u16::try_from(max / 2).unwrap();
        assert_eq!(handle(&mut inbox, now, 99_001, &fragment(0, first, big)), Kept::Yes);
        assert_eq!(inbox.counts().0, 1, "the second has made room");
        assert_eq!(inbox.confirmations(), [], "what was dropped is at the gateway still");
        assert!(!inbox.wants_again(HOUR));
        let almost = now + DROPPED_AGE - Duration::from_millis(1);
        assert_eq!(wait(&mut inbox, almost), 0, "more may be at the gateway");
        assert_eq!(wait(&mut inbox, now + DROPPED_AGE), 1);
    }

    /// Whoever sends pieces of messages that never become whole keeps nobody out.
    #[test]
    fn thousands_of_half_messages_leave_room_for_a_whole_one() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        for message in 0..10_000 {
            let half = fragment(message, 0, 2);
            assert_eq!(handle(&mut inbox, now, message.into(), &half), Kept::Yes);
        }
        assert_eq!(handle(&mut inbox, now, 20_000, &fragment(20_000, 0, 2)), Kept::Yes);
        assert_eq!(handle(&mut inbox, now, 20_001, &fragment(20_000, 1, 2)), Kept::Complete);
        assert!(inbox.assemble((Origin::Gateway, id(20_000))).is_some());
        assert!(!inbox.wants_again(HOUR));
        assert_eq!(wait(&mut inbox, now + INCOMPLETE_AGE), 10_000);
    }

    #[test]
    fn half_replies_are_bounded_in_number_and_keep_out_neither_whole_ones_nor_deliveries() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        let mut begun = 0;
        let mut begin = |inbox: &mut Inbox, origin| {
            begun += 1;
            inbox.handle((now, HOUR), origin, None, &fragment(begun, 0, 2))
        };
        for _ in 0..7 {
            let origin = Origin::Replier(address(&mut rand::rng()));
            assert_eq!(begin(&mut inbox, origin), Kept::Yes, "others leave some room");
            while begin(&mut inbox, origin) == Kept::Yes {}
        }
        assert!(inbox.counts().0 <= MAX_INCOMPLETE_REPLIES);
        assert!(!inbox.wants_again(HOUR), "the gateway has nothing of it");
        let origin = Origin::Replier(address(&mut rand::rng()));
        let whole = inbox.handle((now, HOUR), origin, None, &fragment(99_001, 0, 1));
        assert_eq!(whole, Kept::Complete);
        assert!(inbox.assemble((origin, id(99_001))).is_some());
        assert_eq!(handle(&mut inbox, now, 1, &fragment(99_002, 0, 2)), Kept::Yes);
        let incomplete = inbox.counts().0;
        assert_eq!(wait(&mut inbox, now + INCOMPLETE_AGE), incomplete);
        assert_eq!(inbox.replies.shares.len(), 1, "what is complete is held still");
    }

    /// Whoever begins replies and ends none, or sends long ones, keeps nobody else out.
    #[test]
    fn one_replier_leaves_room_for_the_replies_of_others() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        let [greedy, other] = [(); 2].map(|()| Origin::Replier(address(&mut rand::rng())));
        let mut pieces = 0;
        while inbox.handle((now, HOUR), greedy, None, &fragment(0, pieces, u16::MAX)) == Kept::Yes {
            pieces += 1;
        }
        let body_pieces = super::super::MAX_BODY_BYTES.div_ceil(sizes().fragment_data_bytes());
        assert!(usize::from(pieces) > 2 * body_pieces, "there is room for the longest messages");
        let kept =
            [0, 1].map(|index| inbox.handle((now, HOUR), other, None, &fragment(1, index, 2)));
        assert_eq!(kept, [Kept::Yes, Kept::Complete]);
        assert!(inbox.counts().2 <= MAX_HELD_BYTES);
    }

    /// Asking again does not keep pieces for ever, and pieces that were dropped do not either.
    #[test]
    fn what_was_dropped_delays_giving_up_but_does_not_prevent_it() {
        let start = Instant::now();
        let mut inbox = inbox(start);
        let max = MAX_HELD_BYTES / sizes().fragment_bytes();
        for index in 0..u16::try_from(max).unwrap() {
            handle(&mut inbox, start, index.into(), &fragment(0, index, u16::MAX));
        }
        assert_eq!(handle(&mut inbox, start, 99_000, &fragment(1, 0, 2)), Kept::NoRoom);
        assert_eq!(wait(&mut inbox, start + INCOMPLETE_AGE), 0);
        inbox.set_receiving(start + INCOMPLETE_AGE, true);
        inbox.caught_up(start + INCOMPLETE_AGE);
        assert_eq!(wait(&mut inbox, start + INCOMPLETE_AGE), 1, "nothing is dropped now");
        assert_eq!(inbox.counts().2, 0);
    }

    #[test]
    fn incomplete_messages_are_given_up_only_while_the_gateway_has_handed_over_all_else() {
        let start = Instant::now();
        let mut inbox = inbox(start);
        handle(&mut inbox, start, 1, &fragment(0, 0, 2));
        let half = start + INCOMPLETE_AGE / 2;
        assert_eq!(wait(&mut inbox, half), 0);
        inbox.set_receiving(half, false);
        assert_eq!(inbox.poll_timeout(), None);
        inbox.caught_up(half);
        assert_eq!(wait(&mut inbox, half + 9 * INCOMPLETE_AGE), 0, "it was said before the cut");
        let again = half + 10 * INCOMPLETE_AGE;
        inbox.set_receiving(again, true);
        let caught_up = again + 10 * INCOMPLETE_AGE;
        assert_eq!(wait(&mut inbox, caught_up), 0, "other deliveries come first");
        inbox.caught_up(caught_up);
        let almost = caught_up + INCOMPLETE_AGE / 2 - Duration::from_millis(1);
        assert_eq!(wait(&mut inbox, almost), 0);
        assert_eq!(wait(&mut inbox, caught_up + INCOMPLETE_AGE / 2), 1);
        assert_eq!((inbox.confirmations(), inbox.counts()), (vec![1], (0, 0, 0, 0)));
        assert_eq!(inbox.poll_timeout(), None);
    }

    #[test]
    fn the_gateway_is_asked_again_when_it_was_missed_that_all_has_come() {
        let now = Instant::now();
        let mut inbox = inbox(now);
        handle(&mut inbox, now, 1, &fragment(0, 0, 2));
        inbox.set_receiving(now, false);
        inbox.caught_up(now);
        assert!(!inbox.wants_again(HOUR), "there is no connection");
        inbox.set_receiving(now, true);
        assert_eq!((inbox.wants_again(HOUR), inbox.poll_timeout()), (true, None));
        inbox.set_receiving(now, true);
        assert!(!inbox.wants_again(HOUR), "it was asked");
        inbox.caught_up(now);
        assert_eq!(wait(&mut inbox, now + INCOMPLETE_AGE), 1);
    }

    #[test]
    fn a_copy_of_a_piece_shows_that_its_sender_still_tries() {
        let start = Instant::now();
        let mut inbox = inbox(start);
        handle(&mut inbox, start, 1, &fragment(0, 0, 2));
        let half = start + INCOMPLETE_AGE / 2;
        assert_eq!(wait(&mut inbox, half), 0);
        assert_eq!(handle(&mut inbox, half, 2, &fragment(0, 0, 2)), Kept::Yes);
        assert_eq!(handle(&mut inbox, half + INCOMPLETE_AGE / 4, 1, &fragment(0, 0, 2)), Kept::Yes);
        assert_eq!(wait(&mut inbox, start + INCOMPLETE_AGE), 0);
        assert_eq!(wait(&mut inbox, half + INCOMPLETE_AGE), 1);
    }

    /// Whoever sends one piece again and again holds its bytes no longer than a bound.
    #[test]
    fn copies_keep_no_message_for_ever_and_new_pieces_give_their_time() {
        let start = Instant::now();
        let mut inbox = inbox(start);
        for index in [0, 1] {
            handle(&mut inbox, start, index.into(), &fragment(0, index, 4));
        }
        let (mut now, mut number) = (start, 2);
        let mut give_up = |inbox: &mut Inbox, until: Instant| {
            while now < until {
                now = until.min(now + INCOMPLETE_AGE / 2);
                number += 1;
                if wait(inbox, now) > 0 {
                    return true;
                }
                handle(inbox, now, number, &fragment(0, 0, 4));
            }
            false
        };
        assert!(!give_up(&mut inbox, start + WHOLE_AGE));
        handle(&mut inbox, start + WHOLE_AGE, 1000, &fragment(0, 2, 4));
        let ends = start + WHOLE_AGE + 3 * TIME_PER_FRAGMENT;
        assert!(!give_up(&mut inbox, ends - Duration::from_millis(1)));
        assert!(give_up(&mut inbox, ends));
        assert_eq!(inbox.counts(), (0, 0, 0, 0));
        assert!(inbox.deliveries.by_age.is_empty() && inbox.deliveries.by_news.is_empty());
    }

    /// The clock of some systems goes on while the machine sleeps, and the connection seems to be there.
    #[test]
    fn nothing_is_given_up_because_the_machine_slept() {
        let start = Instant::now();
        let mut inbox = inbox(start);
        handle(&mut inbox, start, 1, &fragment(0, 0, 2));
        assert_eq!(inbox.handle_timeout(start + 20 * INCOMPLETE_AGE), 0);
        assert_eq!(
            handle(&mut inbox, start + 20 * INCOMPLETE_AGE, 2, &fragment(0, 1, 2)),
            Kept::Complete
        );
    }

    #[test]
    fn confirmations_that_nobody_fetches_are_bounded() {
        let mut inbox = inbox(Instant::now());
        for number in 0..=MAX_CONFIRMATIONS as u64 {
            inbox.confirm(Some(number));
        }
        assert_eq!(inbox.confirmations().len(), MAX_CONFIRMATIONS);
        assert_eq!(inbox.poll_confirmation(), Some(1));
    }

    proptest! {
        #[test]
        fn a_body_arrives_once_in_whatever_order_with_whatever_duplicates(
            body in proptest::collection::vec(any::<u8>(), 1..12_000),
            order in proptest::collection::vec(any::<u16>(), 0..40),
        ) {
            let now = Instant::now();
            let mut inbox = inbox(now);
            let count = super::super::fragment::fragment_count(body.len(), sizes()).unwrap();
            let order = order.into_iter().map(|index| index % count).chain((0..count).rev());
            let mut arrived = Vec::new();
            for (number, index) in (0..).zip(order) {
                let fragment = Fragment::of_body((id(0), HOUR), &body, index, sizes()).unwrap();
                if handle(&mut inbox, now, number, &fragment) == Kept::Complete {
                    arrived.extend(inbox.assemble((Origin::Gateway, id(0))));
                }
            }
            prop_assert_eq!(arrived.len(), 1);
            prop_assert_eq!(&*arrived[0].body, &body);
            prop_assert_eq!(inbox.counts().2, usize::from(count) * 1587);
        }
    }
}
