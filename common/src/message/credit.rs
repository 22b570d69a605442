//! How many SURBs for acknowledgements each gateway or client is given.
//!
//! Whoever is given one and keeps it can send a packet to this client later, at a moment of its choice:
//! many at once show who it is to somebody who sees both ends. So each holder has credit: a SURB that is
//! given costs one, a SURB by which something came earns two. What is withheld is at most
//! [`INITIAL_CREDIT`], as many as were returned, and one each [`BARE_INTERVAL`]. Gateways are those of the
//! network's document, but anybody can make as many sender_tags as they like: what these have not earned
//! costs credit that is common to all of them too. The arithmetic is in `docs/messages.md`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::SenderTag;
use super::lane::MAX_WINDOW;
use super::outbox::Destination;
use crate::keys::Identity;

/// SURBs that a holder is given in each key epoch before anything has come back: four first windows.
pub(super) const INITIAL_CREDIT: u32 = 256;

/// SURBs that all senders who are replied to are given together in each key epoch before anything has come
/// back from those.
pub(super) const COMMON_CREDIT: u32 = 2048;

/// What each return earns: with that, no more than half may be withheld or lost for long.
const EARNED: u32 = 2;

/// The most that honesty saves up: what the largest window takes.
const MAX_CREDIT: u32 = MAX_WINDOW;

/// Without credit one SURB is given each time this has passed, so that a gateway that was away for long
/// is found again.
pub(super) const BARE_INTERVAL: Duration = Duration::from_secs(30);

/// Most holders of each kind whose credit is remembered: more than there are gateways, or clients that are
/// answered at a time. The one not used for longest is forgotten.
pub(super) const MAX_HOLDERS: usize = 4096;

#[derive(Debug)]
struct Credit {
    left: u32,
    key_epoch: u64,
    /// When another one is given without credit.
    next_bare: Instant,
    /// How much of what was given was common credit, and is not returned.
    borrowed: u32,
    /// When it was last used, as a number that counts up.
    used: u64,
}

impl Credit {
    fn new(now: Instant, initial: u32, key_epoch: u64) -> Self {
        Self { left: initial, key_epoch, next_bare: now, borrowed: 0, used: 0 }
    }

    fn begin_key_epoch(&mut self, initial: u32, key_epoch: u64) {
        if key_epoch > self.key_epoch {
            self.key_epoch = key_epoch;
            self.left = self.left.max(initial);
            // What everybody is given is common credit once more.
            self.borrowed = 0;
        }
    }

    fn give(&mut self, now: Instant) {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            self.next_bare = now + BARE_INTERVAL;
        }
    }

    fn add(&mut self, credit: u32, max: u32) {
        self.left = self.left.saturating_add(credit).min(max);
    }

    /// Until when none may be given, if none may now.
    fn wait(&self, now: Instant) -> Option<Instant> {
        (self.left == 0 && self.next_bare > now).then_some(self.next_bare)
    }

    /// Whether nothing is left but what everybody is given.
    fn has_earned_nothing(&self) -> bool {
        self.left <= INITIAL_CREDIT.saturating_sub(self.borrowed)
    }
}

/// Holders of one kind: they cannot make this client forget those of another kind.
#[derive(Debug)]
struct Holders<K> {
    holders: BTreeMap<K, Credit>,
    by_use: BTreeMap<u64, K>,
    uses: u64,
}

impl<K> Default for Holders<K> {
    fn default() -> Self {
        Self { holders: BTreeMap::new(), by_use: BTreeMap::new(), uses: 0 }
    }
}

impl<K: Copy + Ord> Holders<K> {
    /// The credit of one that is given a SURB of this key epoch. Those of an earlier one will soon lead to
    /// nowhere.
    fn used(&mut self, now: Instant, holder: K, key_epoch: u64) -> &mut Credit {
        self.uses += 1;
        if !self.holders.contains_key(&holder)
            && self.holders.len() >= MAX_HOLDERS
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.holders.remove(&oldest);
        }
        let new = || Credit::new(now, INITIAL_CREDIT, key_epoch);
        let credit = self.holders.entry(holder).or_insert_with(new);
        self.by_use.remove(&credit.used);
        self.by_use.insert(self.uses, holder);
        credit.used = self.uses;
        credit.begin_key_epoch(INITIAL_CREDIT, key_epoch);
        credit
    }
}

/// The credit of all holders: of the gateways of recipients, and of those who gave SURBs under a tag.
#[derive(Debug, Default)]
pub(super) struct AckCredits {
    gateways: Holders<Identity>,
    senders: Holders<SenderTag>,
    /// Of all senders together; `None` until one is given something.
    common: Option<Credit>,
}

impl AckCredits {
    /// Whether a SURB may be given to whoever acknowledges for this destination.
    pub(super) fn may_give(&self, now: Instant, to: &Destination) -> bool {
        self.next(now, to).is_none()
    }

    /// When one may be given again, if none may now.
    pub(super) fn next(&self, now: Instant, to: &Destination) -> Option<Instant> {
        match to {
            Destination::Recipient(address) => {
                self.gateways.holders.get(&address.gateway)?.wait(now)
            }
            Destination::Sender(tag) => {
                let own = self.senders.holders.get(tag);
                let common = self.common.as_ref();
                let common =
                    common.filter(|_| own.is_none_or(|credit| credit.has_earned_nothing()));
                let wait = |credit: Option<&Credit>| credit?.wait(now);
                wait(own).max(wait(common))
            }
        }
    }

    /// A SURB of this key epoch is given.
    pub(super) fn give(&mut self, now: Instant, to: &Destination, key_epoch: u64) {
        let tag = match to {
            Destination::Recipient(address) => {
                return self.gateways.used(now, address.gateway, key_epoch).give(now);
            }
            Destination::Sender(tag) => *tag,
        };
        let own = self.senders.used(now, tag, key_epoch);
        if own.has_earned_nothing() {
            let new = || Credit::new(now, COMMON_CREDIT, key_epoch);
            let common = self.common.get_or_insert_with(new);
            common.begin_key_epoch(COMMON_CREDIT, key_epoch);
            common.give(now);
            own.borrowed = own.borrowed.saturating_add(1);
        }
        own.give(now);
    }

    /// Something came by a SURB that was given.
    pub(super) fn on_return(&mut self, from: &Destination) {
        self.add(from, EARNED);
    }

    /// A SURB did not leave after all.
    pub(super) fn take_back(&mut self, from: &Destination) {
        self.add(from, 1);
    }

    fn add(&mut self, from: &Destination, credit: u32) {
        match from {
            Destination::Recipient(address) => {
                if let Some(own) = self.gateways.holders.get_mut(&address.gateway) {
                    own.add(credit, MAX_CREDIT);
                }
            }
            Destination::Sender(tag) => {
                let Some(own) = self.senders.holders.get_mut(tag) else { return };
                own.add(credit, MAX_CREDIT);
                if own.borrowed > 0
                    && let Some(common) = &mut self.common
                {
                    own.borrowed -= 1;
                    common.add(1, COMMON_CREDIT);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::testing::address;
    use super::*;

    fn destination(number: u16) -> Destination {
        Destination::Recipient(address(&mut StdRng::seed_from_u64(number.into())))
    }

    fn sender(number: u16) -> Destination {
        let mut tag = [0; 16];
        tag[..2].copy_from_slice(&number.to_be_bytes());
        Destination::Sender(SenderTag(tag))
    }

    /// Gives as many as may be given.
    fn give_all(credits: &mut AckCredits, now: Instant, key_epoch: u64) -> u32 {
        give_all_to(&destination(0), credits, now, key_epoch)
    }

    fn give_all_to(
        to: &Destination,
        credits: &mut AckCredits,
        now: Instant,
        key_epoch: u64,
    ) -> u32 {
        let mut given = 0;
        while credits.may_give(now, to) {
            credits.give(now, to, key_epoch);
            given += 1;
        }
        given
    }

    #[test]
    fn who_returns_nothing_is_given_the_initial_credit_and_then_one_now_and_then() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        assert_eq!(give_all(&mut credits, now, 0), INITIAL_CREDIT);
        assert_eq!(credits.next(now, &destination(0)), Some(now + BARE_INTERVAL));
        let next = now + BARE_INTERVAL;
        assert_eq!(give_all(&mut credits, next, 0), 1, "due means now");
        assert_eq!(credits.next(next, &destination(0)), Some(next + BARE_INTERVAL));
        assert_eq!(
            give_all(&mut credits, now, 1),
            0,
            "the key epoch is looked at when one is given"
        );
        assert!(credits.may_give(now, &destination(1)), "others are");
    }

    #[test]
    fn a_new_key_epoch_brings_the_initial_credit_once() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        give_all(&mut credits, now, 0);
        let later = now + BARE_INTERVAL;
        assert_eq!(give_all(&mut credits, later, 1), INITIAL_CREDIT);
        assert_eq!(give_all(&mut credits, later + BARE_INTERVAL, 0), 1, "an older one brings none");
    }

    #[test]
    fn a_gateway_that_is_back_is_trusted_again_twice_as_much_each_time() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        give_all(&mut credits, now, 0);
        let mut given = 1;
        credits.give(now + BARE_INTERVAL, &destination(0), 0);
        for doubled in 1..=11 {
            (0..given).for_each(|_| credits.on_return(&destination(0)));
            given = give_all(&mut credits, now, 0);
            assert_eq!(given, 1 << doubled);
        }
        (0..given).for_each(|_| credits.on_return(&destination(0)));
        assert_eq!(give_all(&mut credits, now, 0), MAX_CREDIT);
    }

    #[test]
    fn holders_that_were_not_used_for_longest_are_forgotten_and_none_of_another_kind() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        give_all(&mut credits, now, 0);
        for number in 0..=u16::try_from(MAX_HOLDERS).unwrap() {
            credits.give(now, &sender(number), 0);
        }
        let Holders { holders, by_use, .. } = &credits.senders;
        assert_eq!((holders.len(), by_use.len()), (MAX_HOLDERS, MAX_HOLDERS));
        let Destination::Sender(first) = sender(0) else { unreachable!() };
        assert!(!holders.contains_key(&first));
        assert!(!credits.may_give(now, &destination(0)), "tags cost no gateway its place");
    }

    /// Tags are free to make.
    #[test]
    fn many_senders_are_given_no_more_together_than_the_common_credit() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        let give = |credits: &mut AckCredits, numbers: std::ops::Range<u16>, now, key_epoch| {
            let give = |number| give_all_to(&sender(number), credits, now, key_epoch);
            numbers.map(give).sum::<u32>()
        };
        assert_eq!(give_all_to(&sender(9_999), &mut credits, now, 0), INITIAL_CREDIT);
        let rest = COMMON_CREDIT - INITIAL_CREDIT;
        assert_eq!(give(&mut credits, 0..5_000, now, 0), rest);
        assert_eq!(give(&mut credits, 5_000..9_000, now, 0), 0);
        let later = now + BARE_INTERVAL;
        assert_eq!(credits.next(now, &sender(9_000)), Some(later));
        assert_eq!(give(&mut credits, 5_000..9_000, later, 0), 1, "two a minute for all");
        let later = later + BARE_INTERVAL;
        assert_eq!(give(&mut credits, 5_000..9_000, later, 1), COMMON_CREDIT);
    }

    #[test]
    fn senders_that_return_what_they_are_given_need_no_common_credit() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        let honest = sender(10_000);
        (0..100).for_each(|_| credits.give(now, &honest, 0));
        (0..100).for_each(|_| credits.on_return(&honest));
        let withheld: u32 =
            (0..100).map(|number| give_all_to(&sender(number), &mut credits, now, 0)).sum();
        assert_eq!(withheld, COMMON_CREDIT, "what came back is lent again");
        assert_eq!(give_all_to(&honest, &mut credits, now, 0), 100, "what it has earned");
        (0..100).for_each(|_| credits.on_return(&honest));
        assert_eq!(give_all_to(&honest, &mut credits, now, 0), 200);
    }
}
