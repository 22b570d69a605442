//! How many SURBs for acknowledgements each gateway or client is given.
//!
//! Whoever is given one and keeps it can send a packet to this client later, at a moment of its choice:
//! many at once show who it is to somebody who sees both ends. So each holder has credit: a SURB that is
//! given costs one, a SURB by which something came earns two. What is withheld is at most
//! [`INITIAL_CREDIT`], as many as were returned, and one each [`BARE_INTERVAL`]. The arithmetic is in
//! `docs/messages.md`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::SenderTag;
use super::lane::MAX_WINDOW;
use super::outbox::Destination;
use crate::keys::Identity;

/// SURBs that a holder is given in each key epoch before anything has come back: four first windows.
pub(super) const INITIAL_CREDIT: u32 = 256;

/// What each return earns: with that, no more than half may be withheld or lost for long.
const EARNED: u32 = 2;

/// The most that honesty saves up: what the largest window takes.
const MAX_CREDIT: u32 = MAX_WINDOW;

/// Without credit one SURB is given each time this has passed, so that a gateway that was away for long
/// is found again.
pub(super) const BARE_INTERVAL: Duration = Duration::from_secs(30);

/// Most holders whose credit is remembered: more than there are gateways, or clients that are answered
/// at a time. The one not used for longest is forgotten.
pub(super) const MAX_HOLDERS: usize = 4096;

/// Who is given SURBs for acknowledgements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// The gateway of recipients.
    Gateway(Identity),
    /// Whoever gave SURBs under this tag.
    Sender(SenderTag),
}

impl Holder {
    fn at(destination: &Destination) -> Self {
        match destination {
            Destination::Recipient(address) => Self::Gateway(address.gateway),
            Destination::Sender(tag) => Self::Sender(*tag),
        }
    }
}

#[derive(Debug)]
struct Credit {
    left: u32,
    key_epoch: u64,
    /// When another one is given without credit.
    next_bare: Instant,
    /// When it was last used, as a number that counts up.
    used: u64,
}

/// The credit of all holders.
#[derive(Debug, Default)]
pub(super) struct AckCredits {
    holders: BTreeMap<Holder, Credit>,
    by_use: BTreeMap<u64, Holder>,
    uses: u64,
}

impl AckCredits {
    /// Whether a SURB may be given to whoever acknowledges for this destination.
    pub(super) fn may_give(&self, now: Instant, to: &Destination) -> bool {
        let credit = self.holders.get(&Holder::at(to));
        credit.is_none_or(|credit| credit.left > 0 || credit.next_bare <= now)
    }

    /// When one may be given again, if none may now.
    pub(super) fn next(&self, now: Instant, to: &Destination) -> Option<Instant> {
        let credit = self.holders.get(&Holder::at(to))?;
        (credit.left == 0 && credit.next_bare > now).then_some(credit.next_bare)
    }

    /// A SURB of this key epoch is given. Those of an earlier one will soon lead to nowhere.
    pub(super) fn give(&mut self, now: Instant, to: &Destination, key_epoch: u64) {
        let holder = Holder::at(to);
        self.uses += 1;
        let used = self.uses;
        let new = Credit { left: INITIAL_CREDIT, key_epoch, next_bare: now, used };
        let credit = self.holders.entry(holder).or_insert(new);
        self.by_use.remove(&credit.used);
        self.by_use.insert(used, holder);
        credit.used = used;
        if key_epoch > credit.key_epoch {
            credit.key_epoch = key_epoch;
            credit.left = credit.left.max(INITIAL_CREDIT);
        }
        credit.left = credit.left.saturating_sub(1);
        if credit.left == 0 {
            credit.next_bare = now + BARE_INTERVAL;
        }
        if self.holders.len() > MAX_HOLDERS
            && let Some((_, holder)) = self.by_use.pop_first()
        {
            self.holders.remove(&holder);
        }
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
        if let Some(holder) = self.holders.get_mut(&Holder::at(from)) {
            holder.left = (holder.left + credit).min(MAX_CREDIT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(number: u16) -> Destination {
        let mut tag = [0; 16];
        tag[..2].copy_from_slice(&number.to_be_bytes());
        Destination::Sender(SenderTag(tag))
    }

    /// Gives as many as may be given.
    fn give_all(credits: &mut AckCredits, now: Instant, key_epoch: u64) -> u32 {
        let mut given = 0;
        while credits.may_give(now, &destination(0)) {
            credits.give(now, &destination(0), key_epoch);
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
    fn holders_that_were_not_used_for_longest_are_forgotten() {
        let now = Instant::now();
        let mut credits = AckCredits::default();
        give_all(&mut credits, now, 0);
        for number in 1..=u16::try_from(MAX_HOLDERS).unwrap() {
            credits.give(now, &destination(number), 0);
        }
        assert_eq!((credits.holders.len(), credits.by_use.len()), (MAX_HOLDERS, MAX_HOLDERS));
        assert!(credits.may_give(now, &destination(0)));
    }
}
