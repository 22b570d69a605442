//! SURBs of a client: made ahead of need, and remembered until their reply comes.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_common::session::{SessionId, SurbSource};
use mixsocks_sphinx::{Identifier, Surb};

use crate::health::Way;

/// SURBs that are kept ready at most: some packets' worth.
pub const MAX_READY_SURBS: usize = 64;

/// A SURB that waited so long is thrown away: its route may be outdated.
const MAX_READY_AGE: Duration = Duration::from_secs(1);

/// Replies that are awaited at most; the oldest are given up first. Eight times the largest window.
pub const MAX_AWAITED_REPLIES: usize = 32 * 1024;

/// A SURB that nobody has been given yet.
#[derive(Debug)]
pub struct ReadySurb<R> {
    /// What the provider gets.
    pub surb: Surb,
    /// Names its reply.
    pub identifier: Identifier,
    /// What recovers the reply.
    pub recovery: R,
    /// The way of its reply.
    pub way: Way,
    /// When it was made: not later than its route was drawn.
    pub made: Instant,
    /// The key epoch whose keys it was made for.
    pub key_epoch: u64,
}

/// A reply that is awaited.
#[derive(Debug)]
pub struct Awaited<R> {
    /// What recovers it.
    pub recovery: R,
    /// Which session gave the SURB away.
    pub session: SessionId,
    /// Its way.
    pub way: Way,
}

/// All SURBs of a client.
#[derive(Debug)]
pub(crate) struct SurbStore<R> {
    ready: VecDeque<ReadySurb<R>>,
    /// SURBs that workers are making now.
    in_making: usize,
    /// Those that were made before lead to nowhere.
    renewed: Option<Instant>,
    awaited: HashMap<Identifier, Awaited<R>>,
    order: VecDeque<Identifier>,
}

impl<R> Default for SurbStore<R> {
    fn default() -> Self {
        Self {
            ready: VecDeque::new(),
            in_making: 0,
            renewed: None,
            awaited: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<R> SurbStore<R> {
    /// How many more a worker should make, at most `max`, given that `demand` are wanted.
    pub(crate) fn claim(&mut self, demand: usize, max: usize) -> usize {
        let wanted = demand.min(MAX_READY_SURBS).saturating_sub(self.ready.len() + self.in_making);
        let claimed = wanted.min(max);
        self.in_making += claimed;
        claimed
    }

    /// Takes in what a worker made of what it claimed.
    pub(crate) fn deliver(&mut self, claimed: usize, made: Vec<ReadySurb<R>>) {
        self.in_making -= claimed;
        let is_good = |surb: &ReadySurb<R>| self.renewed.is_none_or(|renewed| surb.made >= renewed);
        self.ready.extend(made.into_iter().filter(is_good));
    }

    /// SURBs that were made before `now`, and those of them that are still being made, lead to
    /// nowhere.
    pub(crate) fn renew(&mut self, now: Instant) {
        self.ready.clear();
        self.renewed = Some(now);
    }

    /// SURBs that are ready, and replies that are awaited.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.ready.len(), self.awaited.len())
    }

    /// SURBs at hand, of which outdated ones are thrown away.
    pub(crate) fn ready(&mut self, now: Instant) -> usize {
        while self.ready.front().is_some_and(|surb| surb.made + MAX_READY_AGE <= now) {
            self.ready.pop_front();
        }
        self.ready.len()
    }

    /// Hands out the SURB that was made first, to be remembered by whoever takes it.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<ReadySurb<R>> {
        self.ready(now);
        self.ready.pop_front()
    }

    /// The SURBs at hand, for packets of `session`.
    pub(crate) fn source(&mut self, session: SessionId) -> Source<'_, R> {
        Source { store: self, session }
    }

    /// The reply with this identifier has come: it is awaited no longer.
    pub(crate) fn take(&mut self, identifier: &Identifier) -> Option<Awaited<R>> {
        self.awaited.remove(identifier)
    }

    /// Replies of a session that has ended are not awaited.
    pub(crate) fn forget_session(&mut self, session: SessionId) {
        self.awaited.retain(|_, awaited| awaited.session != session);
    }

    fn remember(&mut self, identifier: Identifier, awaited: Awaited<R>) {
        self.awaited.insert(identifier, awaited);
        self.order.push_back(identifier);
        if self.awaited.len() > MAX_AWAITED_REPLIES {
            let awaited = &mut self.awaited;
            while self.order.pop_front().is_some_and(|oldest| awaited.remove(&oldest).is_none()) {}
        }
        // Identifiers of replies that came stay in the order until there are as many of them.
        if self.order.len() > 2 * MAX_AWAITED_REPLIES {
            self.order.retain(|identifier| self.awaited.contains_key(identifier));
        }
    }
}

/// Hands the ready SURBs to one session.
pub(crate) struct Source<'a, R> {
    store: &'a mut SurbStore<R>,
    session: SessionId,
}

impl<R> SurbSource for Source<'_, R> {
    fn available(&self) -> usize {
        self.store.ready.len()
    }

    fn write_surb(&mut self, out: &mut Vec<u8>) {
        if let Some(ready) = self.store.ready.pop_front() {
            out.extend_from_slice(ready.surb.as_bytes());
            let ReadySurb { identifier, recovery, way, .. } = ready;
            self.store.remember(identifier, Awaited { recovery, session: self.session, way });
        }
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_common::session::SESSION_ID_LEN;
    use mixsocks_sphinx::SURB_LEN;

    use super::*;

    const SESSION: SessionId = SessionId([1; SESSION_ID_LEN]);

    fn surb(number: u32, made: Instant) -> ReadySurb<u32> {
        let mut bytes = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        bytes[0] = 9;
        ReadySurb {
            surb: Surb::from_bytes(&bytes).unwrap(),
            identifier: identifier(number),
            recovery: number,
            way: Way { delay: Duration::ZERO, mixes: Default::default() },
            made,
            key_epoch: 0,
        }
    }

    fn identifier(number: u32) -> Identifier {
        let mut identifier = Identifier::default();
        identifier[..4].copy_from_slice(&number.to_be_bytes());
        identifier
    }

    #[test]
    fn as_many_are_made_as_are_wanted_and_no_more() {
        let now = Instant::now();
        let mut store = SurbStore::default();
        assert_eq!(store.claim(3, 2), 2);
        assert_eq!(store.claim(3, 2), 1, "two are being made");
        assert_eq!(store.claim(3, 2), 0);
        store.deliver(2, vec![surb(1, now), surb(2, now)]);
        store.deliver(1, vec![]);
        assert_eq!(store.claim(3, 2), 1, "one could not be made");
        assert_eq!(store.claim(usize::MAX, usize::MAX), MAX_READY_SURBS - 3);
    }

    #[test]
    fn old_ones_are_thrown_away() {
        let now = Instant::now();
        let mut store = SurbStore::default();
        store.deliver(0, vec![surb(1, now), surb(2, now + MAX_READY_AGE / 2)]);
        assert_eq!(store.ready(now + MAX_READY_AGE), 1);
    }

    #[test]
    fn what_was_begun_before_a_renewal_is_thrown_away() {
        let now = Instant::now();
        let mut store = SurbStore::default();
        store.deliver(0, vec![surb(1, now)]);
        assert_eq!(store.claim(4, 2), 2);
        let later = now + MAX_READY_AGE / 4;
        store.renew(later);
        store.deliver(2, vec![surb(2, now), surb(3, later)]);
        assert_eq!(store.ready(later), 1);
        assert_eq!(store.claim(4, usize::MAX), 3);
    }

    #[test]
    fn a_reply_is_awaited_once() {
        let mut store = SurbStore::default();
        store.deliver(0, vec![surb(1, Instant::now())]);
        let mut out = Vec::new();
        store.source(SESSION).write_surb(&mut out);
        assert_eq!(out.len(), SURB_LEN);
        assert_eq!(store.take(&identifier(1)).unwrap().recovery, 1);
        assert!(store.take(&identifier(1)).is_none());
    }

    /// A quiet session's SURBs are kept however much another one receives.
    #[test]
    fn replies_that_came_drive_no_others_out() {
        let now = Instant::now();
        let mut store = SurbStore::default();
        let other = SessionId([2; SESSION_ID_LEN]);
        store.deliver(0, vec![surb(0, now)]);
        store.source(SESSION).write_surb(&mut Vec::new());
        for number in 1..u32::try_from(5 * MAX_AWAITED_REPLIES).unwrap() {
            store.deliver(0, vec![surb(number, now)]);
            store.source(other).write_surb(&mut Vec::new());
            assert!(store.take(&identifier(number)).is_some());
            assert!(store.order.len() <= 2 * MAX_AWAITED_REPLIES);
        }
        assert!(store.take(&identifier(0)).is_some());
    }

    #[test]
    fn the_oldest_replies_are_given_up() {
        let now = Instant::now();
        let mut store = SurbStore::default();
        let count = u32::try_from(MAX_AWAITED_REPLIES).unwrap() + 2;
        for number in 0..count {
            store.deliver(0, vec![surb(number, now)]);
            store.source(SESSION).write_surb(&mut Vec::new());
        }
        assert!(store.take(&identifier(0)).is_none());
        assert!(store.take(&identifier(1)).is_none());
        assert!(store.take(&identifier(2)).is_some());
        assert_eq!(store.counts(), (0, MAX_AWAITED_REPLIES - 1));
        store.forget_session(SESSION);
        assert!(store.take(&identifier(3)).is_none());
    }
}
