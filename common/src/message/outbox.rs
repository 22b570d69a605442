//! Messages on their way out: fragments, windows, resending, and when to give up.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_sphinx::Identifier;
use zeroize::Zeroizing;

use super::awaited::MadeSurb;
use super::credit::AckCredits;
use super::fragment::{Fragment, Hour, MessageId, fragment_count};
use super::lane::{Lane, Obstacle};
use super::packet::{AckStatus, MessageSizes};
use super::shelf::{TIME_PER_FRAGMENT, WHOLE_AGE};
use super::{FailReason, SendError, SenderTag};
use crate::address::Address;

/// Most messages that wait to be delivered.
pub const MAX_OUTGOING_MESSAGES: usize = 1024;

/// Most bytes of their bodies: several of the longest.
pub const MAX_OUTGOING_BYTES: usize = 64 * 1024 * 1024;

/// Most fragments under way to all destinations: four of the largest windows.
pub const MAX_UNDER_WAY: usize = 8192;

/// How long a message is tried at most, however slowly it goes on: this, and [`TIME_PER_FRAGMENT`] more for
/// each of its fragments that was acknowledged. Of these the recipient has had at least as many, so that it
/// waits for half an hour longer.
pub(super) const WHOLE_TIME: Duration = Duration::from_secs(90 * 60);
const _: () = assert!(WHOLE_TIME.as_secs() + 30 * 60 <= WHOLE_AGE.as_secs());

/// How long a message is tried anew after its machine slept, or its clock was set forward, for so long that
/// it would have failed: until something is acknowledged.
pub(super) const TRY_AFTER_SLEEP: Duration = Duration::from_secs(60);

/// Packets with which a message begins that somebody else has asked for, and which is to be no burst;
/// each acknowledgement lets two more go.
const SLOW_BEGINNING: usize = 4;

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Destination {
    /// Somebody whose address is known.
    Recipient(Address),
    /// Somebody who gave SURBs.
    Sender(SenderTag),
}

/// A fragment that was sent, and what its acknowledgement is judged by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) message: MessageId,
    pub(super) index: u16,
    pub(super) destination: Destination,
    pub(super) sent: Instant,
    /// How long the machine had slept before.
    slept: Duration,
    /// The delays that are known, of the packet and of the SURB.
    pub(super) delays: Duration,
    due: Instant,
}

/// What became of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Delivered,
    Failed(FailReason),
}

impl Piece {
    fn position(&self) -> usize {
        self.index.into()
    }
}

#[derive(Debug)]
struct Outgoing {
    destination: Destination,
    /// When it was sent; of replies zero.
    hour: Hour,
    body: Zeroizing<Vec<u8>>,
    acked: Vec<bool>,
    unacked: usize,
    /// The first fragment that was never sent, and those that must be sent again.
    next: u16,
    lost: BTreeSet<u16>,
    /// It is among those that wait in its lane: it has something to send, and may.
    is_waiting: bool,
    begins_slowly: bool,
    under_way: usize,
    /// When it was sent and when it is given up, as if no time that the machine has slept were missing.
    pushed: Instant,
    give_up_at: Instant,
    /// How long the machine had slept in all when the message was begun anew: acknowledgements of what left
    /// before do not count.
    slept_before: Duration,
}

impl Outgoing {
    fn count(&self) -> u16 {
        u16::try_from(self.acked.len()).expect("made from a count of 16 bits")
    }

    fn has_unsent(&self) -> bool {
        !self.lost.is_empty() || self.next < self.count()
    }

    /// Whether a fragment may leave now.
    fn may_send(&self) -> bool {
        let acked = self.acked.len() - self.unacked;
        self.has_unsent() && (!self.begins_slowly || self.under_way < SLOW_BEGINNING + acked)
    }

    /// The latest time at which it is given up.
    fn whole_time_ends(&self) -> Instant {
        let acked = u32::try_from(self.acked.len() - self.unacked).unwrap_or(u32::MAX);
        self.pushed + WHOLE_TIME + TIME_PER_FRAGMENT.saturating_mul(acked)
    }

    /// Nothing was sent yet.
    fn begin_anew(&mut self) {
        self.acked.fill(false);
        self.unacked = self.acked.len();
        self.next = 0;
        self.lost.clear();
    }

    fn unsent(&self) -> usize {
        self.lost.len() + usize::from(self.count() - self.next)
    }

    fn take_unsent(&mut self) -> Option<u16> {
        if let Some(index) = self.lost.pop_first() {
            return Some(index);
        }
        let index = self.next;
        (index < self.count()).then(|| {
            self.next += 1;
            index
        })
    }
}

/// All messages on their way out.
#[derive(Debug)]
pub(super) struct Outbox {
    sizes: MessageSizes,
    give_up_after: Duration,
    unknown_delays: Duration,
    /// How long the machine has slept in all.
    slept: Duration,
    messages: BTreeMap<MessageId, Outgoing>,
    bytes: usize,
    lanes: BTreeMap<Destination, Lane>,
    credits: AckCredits,
    /// The destination that is asked first for the next packet.
    turns: BTreeMap<u64, Destination>,
    next_turn: u64,
    under_way: HashMap<Identifier, Piece>,
    by_due: BTreeSet<(Instant, Identifier)>,
    by_give_up: BTreeSet<(Instant, MessageId)>,
    outcomes: VecDeque<(MessageId, Outcome)>,
    /// Acknowledgements that did not come in time, and when their fragments had left: the newest, at most
    /// [`MAX_UNDER_WAY`].
    overdue: VecDeque<(Identifier, Instant)>,
}

impl Outbox {
    pub(super) fn new(
        sizes: MessageSizes,
        give_up_after: Duration,
        unknown_delays: Duration,
    ) -> Self {
        Self {
            sizes,
            give_up_after,
            unknown_delays,
            slept: Duration::ZERO,
            messages: BTreeMap::new(),
            bytes: 0,
            lanes: BTreeMap::new(),
            credits: AckCredits::default(),
            turns: BTreeMap::new(),
            next_turn: 0,
            under_way: HashMap::new(),
            by_due: BTreeSet::new(),
            by_give_up: BTreeSet::new(),
            outcomes: VecDeque::new(),
            overdue: VecDeque::new(),
        }
    }

    /// Messages that wait, their bytes, and fragments under way.
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        (self.messages.len(), self.bytes, self.under_way.len())
    }

    /// Whether a body of so many bytes may wait.
    pub(super) fn check_room(&self, body_bytes: usize) -> Result<(), SendError> {
        let is_full = self.messages.len() >= MAX_OUTGOING_MESSAGES
            || self.bytes + body_bytes > MAX_OUTGOING_BYTES;
        if is_full { Err(SendError::Full) } else { Ok(()) }
    }

    /// Takes in a body that there is room for.
    pub(super) fn push(
        &mut self,
        now: Instant,
        (id, hour): (MessageId, Hour),
        destination: Destination,
        body: Zeroizing<Vec<u8>>,
    ) {
        let count = fragment_count(body.len(), self.sizes).expect("bodies are short enough");
        self.bytes += body.len();
        let unknown_delays = self.unknown_delays;
        let lane = self.lanes.entry(destination).or_insert_with(|| {
            self.next_turn += 1;
            self.turns.insert(self.next_turn, destination);
            Lane::new(now, unknown_delays, self.next_turn)
        });
        lane.messages += 1;
        lane.unsent += usize::from(count);
        lane.waiting.push_back(id);
        let pushed = now + self.slept;
        let give_up_at = pushed + self.give_up_after;
        self.by_give_up.insert((give_up_at, id));
        let outgoing = Outgoing {
            destination,
            hour,
            body,
            acked: vec![false; count.into()],
            unacked: count.into(),
            next: 0,
            lost: BTreeSet::new(),
            is_waiting: true,
            begins_slowly: false,
            under_way: 0,
            pushed,
            give_up_at,
            slept_before: Duration::ZERO,
        };
        self.messages.insert(id, outgoing);
    }

    /// A message that was just pushed is to be no burst.
    pub(super) fn begin_slowly(&mut self, id: MessageId) {
        if let Some(outgoing) = self.messages.get_mut(&id) {
            outgoing.begins_slowly = true;
        }
    }

    /// Destinations in the order of their turns.
    pub(super) fn turns(&self) -> impl Iterator<Item = Destination> {
        self.turns.values().copied()
    }

    /// Whether a fragment may go to the destination now, and how many wait there.
    pub(super) fn may_send(&self, now: Instant, destination: Destination) -> Option<usize> {
        if self.under_way.len() >= MAX_UNDER_WAY {
            return None;
        }
        let lane = self.lanes.get(&destination)?;
        if !lane.may_send(now) || !self.credits.may_give(now, &destination) {
            return None;
        }
        (!lane.waiting.is_empty()).then_some(lane.unsent)
    }

    /// The next fragment for the destination; the others have their turn first next time.
    pub(super) fn take_fragment(
        &mut self,
        destination: Destination,
    ) -> Option<(MessageId, u16, Zeroizing<Vec<u8>>)> {
        let lane = self.lanes.get_mut(&destination)?;
        let id = lane.waiting.pop_front()?;
        let outgoing = self.messages.get_mut(&id).expect("those that wait are there");
        let index = outgoing.take_unsent().expect("those that wait have something to send");
        lane.unsent -= 1;
        outgoing.under_way += 1;
        outgoing.is_waiting = outgoing.may_send();
        if outgoing.is_waiting {
            lane.waiting.push_back(id);
        }
        let fragment = Fragment::of_body((id, outgoing.hour), &outgoing.body, index, self.sizes)
            .expect("an index below the count")
            .to_bytes(self.sizes);
        self.end_turn(destination);
        Some((id, index, Zeroizing::new(fragment)))
    }

    /// The others have their turn first next time.
    pub(super) fn end_turn(&mut self, destination: Destination) {
        if let Some(lane) = self.lanes.get_mut(&destination) {
            self.turns.remove(&lane.turn);
            self.next_turn += 1;
            lane.turn = self.next_turn;
            self.turns.insert(lane.turn, destination);
        }
    }

    /// A fragment leaves; its acknowledgement comes by this SURB, of which the delays are known.
    pub(super) fn sent<R>(
        &mut self,
        now: Instant,
        surb: &MadeSurb<R>,
        (message, index): (MessageId, u16),
        destination: Destination,
    ) -> Piece {
        let (ack, delays) = (surb.identifier, surb.delay);
        self.credits.give(now, &destination, surb.key_epoch);
        let wait = match self.lanes.get_mut(&destination) {
            Some(lane) => {
                lane.under_way += 1;
                lane.ack_wait()
            }
            None => Duration::ZERO,
        };
        let due = now + delays + self.unknown_delays + wait;
        let slept = self.slept;
        let piece = Piece { message, index, destination, sent: now, slept, delays, due };
        self.under_way.insert(ack, piece);
        self.by_due.insert((due, ack));
        piece
    }

    /// The shell has chosen the delays of the packet.
    pub(super) fn add_delay(&mut self, ack: &Identifier, delay: Duration) -> Option<Piece> {
        let piece = self.under_way.get_mut(ack)?;
        self.by_due.remove(&(piece.due, *ack));
        piece.delays += delay;
        piece.due += delay;
        self.by_due.insert((piece.due, *ack));
        Some(*piece)
    }

    /// The packet could not be made, as there is no route.
    pub(super) fn unsent(&mut self, now: Instant, ack: &Identifier) {
        if let Some(piece) = self.land(ack) {
            self.credits.take_back(&piece.destination);
            self.lose(&piece);
            self.obstruct(now, piece.destination, Obstacle::NoRoute);
        }
    }

    /// An acknowledgement came, maybe after its time.
    pub(super) fn on_ack(
        &mut self,
        now: Instant,
        ack: &Identifier,
        piece: &Piece,
        status: AckStatus,
    ) {
        let is_in_time = self.land(ack).is_some();
        self.credits.on_return(&piece.destination);
        match status {
            AckStatus::Stored => self.on_stored(now, piece, is_in_time),
            AckStatus::UnknownClient => {
                self.end(piece.message, Outcome::Failed(FailReason::UnknownClient))
            }
            AckStatus::ShareFull => {
                self.lose(piece);
                self.obstruct(now, piece.destination, Obstacle::ShareFull);
            }
            AckStatus::StoreUnavailable => {
                self.lose(piece);
                self.obstruct(now, piece.destination, Obstacle::StoreUnavailable);
            }
        }
        self.forget_idle_lane(piece.destination);
    }

    fn on_stored(&mut self, now: Instant, piece: &Piece, is_in_time: bool) {
        let mut outgoing = self.messages.get_mut(&piece.message);
        if outgoing.as_ref().is_some_and(|outgoing| piece.slept < outgoing.slept_before) {
            return;
        }
        let acked = outgoing.as_mut().and_then(|message| message.acked.get_mut(piece.position()));
        let is_copy = acked.is_some_and(|acked| std::mem::replace(acked, true));
        if let Some(lane) = self.lanes.get_mut(&piece.destination) {
            lane.on_trip(now, now.saturating_duration_since(piece.sent + piece.delays));
            // Whoever answers late, or for one fragment several times, shows no way that works.
            if is_in_time && !is_copy {
                lane.on_progress(now);
            }
        }
        let Some(outgoing) = outgoing.filter(|_| !is_copy) else { return };
        outgoing.unacked -= 1;
        let was_lost = outgoing.lost.remove(&piece.index);
        if was_lost && let Some(lane) = self.lanes.get_mut(&piece.destination) {
            lane.unsent -= 1;
        }
        self.by_give_up.remove(&(outgoing.give_up_at, piece.message));
        // The recipient has had news at some time since it left; maybe long before the acknowledgement.
        let give_up_at = piece.sent + piece.slept + self.give_up_after;
        let give_up_at = outgoing.give_up_at.max(give_up_at);
        outgoing.give_up_at = give_up_at.min(outgoing.whole_time_ends());
        self.by_give_up.insert((outgoing.give_up_at, piece.message));
        if outgoing.unacked == 0 {
            self.end(piece.message, Outcome::Delivered);
        } else {
            self.queue(piece.message);
        }
    }

    /// The fragment is under way no longer.
    fn land(&mut self, ack: &Identifier) -> Option<Piece> {
        let piece = self.under_way.remove(ack)?;
        self.by_due.remove(&(piece.due, *ack));
        if let Some(lane) = self.lanes.get_mut(&piece.destination) {
            lane.under_way -= 1;
        }
        if let Some(outgoing) = self.messages.get_mut(&piece.message) {
            outgoing.under_way -= 1;
        }
        self.queue(piece.message);
        Some(piece)
    }

    /// Has a message wait in its lane if it may send, and not if it has nothing to send any more.
    fn queue(&mut self, id: MessageId) {
        let Some(outgoing) = self.messages.get_mut(&id) else { return };
        let Some(lane) = self.lanes.get_mut(&outgoing.destination) else { return };
        let may_send = outgoing.may_send();
        match (std::mem::replace(&mut outgoing.is_waiting, may_send), may_send) {
            (false, true) => lane.waiting.push_front(id),
            (true, false) => lane.waiting.retain(|waiting| *waiting != id),
            (false, false) | (true, true) => {}
        }
    }

    /// The fragment must be sent again, if it is still needed.
    fn lose(&mut self, piece: &Piece) {
        let Some(outgoing) = self.messages.get_mut(&piece.message) else { return };
        let is_outdated = piece.slept < outgoing.slept_before;
        if is_outdated || outgoing.acked.get(piece.position()) != Some(&false) {
            return;
        }
        let is_new = outgoing.lost.insert(piece.index);
        if is_new && let Some(lane) = self.lanes.get_mut(&piece.destination) {
            lane.unsent += 1;
        }
        self.queue(piece.message);
    }

    fn obstruct(&mut self, now: Instant, destination: Destination, obstacle: Obstacle) {
        if let Some(lane) = self.lanes.get_mut(&destination) {
            lane.obstruct(now, obstacle);
        }
    }

    fn end(&mut self, id: MessageId, outcome: Outcome) {
        let Some(outgoing) = self.messages.remove(&id) else { return };
        self.bytes -= outgoing.body.len();
        self.by_give_up.remove(&(outgoing.give_up_at, id));
        if let Some(lane) = self.lanes.get_mut(&outgoing.destination) {
            lane.messages -= 1;
            lane.unsent -= outgoing.unsent();
            if outgoing.is_waiting {
                lane.waiting.retain(|waiting| *waiting != id);
            }
        }
        self.outcomes.push_back((id, outcome));
        self.forget_idle_lane(outgoing.destination);
    }

    fn forget_idle_lane(&mut self, destination: Destination) {
        if self.lanes.get(&destination).is_some_and(Lane::is_idle)
            && let Some(lane) = self.lanes.remove(&destination)
        {
            self.turns.remove(&lane.turn);
        }
    }

    pub(super) fn poll_outcome(&mut self) -> Option<(MessageId, Outcome)> {
        self.outcomes.pop_front()
    }

    pub(super) fn poll_overdue(&mut self) -> Option<(Identifier, Instant)> {
        self.overdue.pop_front()
    }

    /// When [`Outbox::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let due = self.by_due.first().map(|(due, _)| *due);
        let give_up = self.by_give_up.first().map(|(at, _)| *at - self.slept.min(*at - now));
        let pauses = self.lanes.values().filter_map(|lane| lane.paused_until(now));
        let waiting = self.lanes.iter().filter(|(_, lane)| !lane.waiting.is_empty());
        let credits = waiting.filter_map(|(destination, _)| self.credits.next(now, destination));
        due.into_iter().chain(give_up).chain(pauses).chain(credits).min()
    }

    /// The machine has slept for so long, in which `now` stood still; or its clock was set forward, which
    /// looks the same. Recipients may have given up what they had: a message whose time is over by that, but
    /// not its whole time, is tried anew from the beginning for a while.
    pub(super) fn handle_sleep(&mut self, now: Instant, slept: Duration) {
        let before = now + self.slept;
        self.slept += slept;
        let now = now + self.slept;
        let is_over = |at: Instant| before < at && at <= now;
        let over = self.by_give_up.iter().filter(|(at, _)| is_over(*at)).map(|(_, id)| *id);
        for id in Vec::from_iter(over) {
            self.try_anew(now, id);
        }
    }

    fn try_anew(&mut self, now: Instant, id: MessageId) {
        let Some(outgoing) = self.messages.get_mut(&id) else { return };
        let unsent = outgoing.unsent();
        let give_up_at = (now + TRY_AFTER_SLEEP).min(outgoing.pushed + WHOLE_TIME);
        if give_up_at <= now {
            return;
        }
        outgoing.begin_anew();
        outgoing.slept_before = self.slept;
        self.by_give_up.remove(&(outgoing.give_up_at, id));
        outgoing.give_up_at = give_up_at;
        self.by_give_up.insert((give_up_at, id));
        if let Some(lane) = self.lanes.get_mut(&outgoing.destination) {
            lane.unsent += outgoing.unsent();
            lane.unsent -= unsent;
        }
        self.queue(id);
    }

    /// Sends again what was not heard of in time, and gives up what has been for too long.
    /// `has_surbs` says whether there are SURBs for replies to a sender.
    pub(super) fn handle_timeout(&mut self, now: Instant, has_surbs: impl Fn(SenderTag) -> bool) {
        while let Some(&(due, ack)) = self.by_due.first()
            && due <= now
        {
            let Some(piece) = self.land(&ack) else { break };
            self.overdue.push_back((ack, piece.sent));
            if self.overdue.len() > MAX_UNDER_WAY {
                self.overdue.pop_front();
            }
            if let Some(lane) = self.lanes.get_mut(&piece.destination) {
                lane.on_vain_wait(now, piece.sent);
            }
            self.lose(&piece);
            self.forget_idle_lane(piece.destination);
        }
        while let Some(&(at, id)) = self.by_give_up.first()
            && at <= now + self.slept
        {
            let destination = self.messages.get(&id).map(|outgoing| outgoing.destination);
            let lane = destination.and_then(|destination| self.lanes.get(&destination));
            let reason = match destination {
                Some(Destination::Sender(tag)) if !has_surbs(tag) => FailReason::NoSurbs,
                _ => lane.map_or(FailReason::NotConfirmed, Lane::reason),
            };
            self.end(id, Outcome::Failed(reason));
        }
    }
}
