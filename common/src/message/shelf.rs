//! Messages that are put together: what has come of each, and which is given up.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::fragment::{Fragment, Hour, MessageId};
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

/// Where a fragment came from. Messages of different origins have nothing to do with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Origin {
    /// The gateway, from anybody.
    Gateway,
    /// Whoever was given SURBs by messages to this address.
    Replier(Address),
}

pub(super) type Key = (Origin, MessageId);

#[derive(Debug)]
pub(super) struct Incomplete {
    pub(super) count: u16,
    pub(super) hour: Hour,
    pub(super) fragments: BTreeMap<u16, Zeroizing<Vec<u8>>>,
    pub(super) numbers: BTreeSet<u64>,
    /// Counts up, to tell the newest.
    pub(super) begun: u64,
    /// When the first fragment came and the last one, by the stopwatch of its shelf.
    pub(super) first_came: Duration,
    pub(super) last_news: Duration,
}

impl Incomplete {
    /// When it has become too old, if nothing was dropped that the gateway still has.
    pub(super) fn whole_age_ends(&self) -> Duration {
        let fragments = u32::try_from(self.fragments.len()).unwrap_or(u32::MAX);
        self.first_came + WHOLE_AGE + TIME_PER_FRAGMENT.saturating_mul(fragments)
    }
}

/// A message that is complete, until the application has taken it.
#[derive(Debug)]
pub(super) struct Complete {
    pub(super) hour: Hour,
    pub(super) numbers: BTreeSet<u64>,
    pub(super) held_bytes: usize,
}

/// What is known of a fragment's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    New,
    /// It is there. `is_known` tells that it came as a delivery of which the number is kept.
    Taken {
        is_known: bool,
    },
    Conflict,
}

/// For how long messages may be incomplete.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Since something came of it.
    pub(super) age: Duration,
    /// In all, beyond its own time, as pieces were dropped that the gateway still has.
    pub(super) dropped: Duration,
}

impl Patience {
    pub(super) const USUAL: Self = Self { age: INCOMPLETE_AGE, dropped: Duration::ZERO };
    pub(super) const DROPPED: Self = Self { age: DROPPED_AGE, dropped: DROPPED_AGE };
}

/// What one origin holds.
#[derive(Debug, Default)]
pub(super) struct Share {
    pub(super) incomplete: usize,
    pub(super) held_bytes: usize,
}

/// Messages of one kind of origin, from the gateway or from repliers. Each kind has room of its own, so
/// that neither keeps the other out.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    pub(super) incomplete: BTreeMap<Key, Incomplete>,
    pub(super) by_begun: BTreeMap<u64, Key>,
    pub(super) by_news: BTreeSet<(Duration, Key)>,
    /// By [`Incomplete::whole_age_ends`].
    pub(super) by_age: BTreeSet<(Duration, Key)>,
    /// Goes while more can be expected at once of whatever is incomplete.
    pub(super) watch: Stopwatch,
    pub(super) begun: u64,
    pub(super) complete: BTreeMap<Key, Complete>,
    pub(super) held_bytes: usize,
    pub(super) shares: BTreeMap<Origin, Share>,
}

impl Shelf {
    pub(super) fn place(&self, key: &Key, number: Option<u64>, fragment: &Fragment<'_>) -> Place {
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

    pub(super) fn insert(
        &mut self,
        now: Instant,
        key: Key,
        number: Option<u64>,
        fragment: &Fragment<'_>,
    ) {
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
    pub(super) fn touch(&mut self, now: Instant, key: &Key) {
        let now = self.watch.look(now);
        if let Some(incomplete) = self.incomplete.get_mut(key) {
            self.by_news.remove(&(incomplete.last_news, *key));
            self.by_news.insert((now, *key));
            incomplete.last_news = now;
        }
    }

    /// The message that is given up first, and when.
    pub(super) fn given_up_first(&self, patience: Patience) -> Option<(Duration, Key)> {
        let silent = self.by_news.first().map(|(last_news, key)| (*last_news + patience.age, *key));
        let old = self.by_age.first().map(|(ends, key)| (*ends + patience.dropped, *key));
        silent.into_iter().chain(old).min()
    }

    /// Takes out a message that nothing more came of for too long, or that is too old.
    pub(super) fn give_up(
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

    pub(super) fn is_whole(&self, key: &Key) -> bool {
        self.incomplete
            .get(key)
            .is_some_and(|message| message.fragments.len() == usize::from(message.count))
    }

    pub(super) fn remove(&mut self, key: &Key, fragment_bytes: usize) -> Option<Incomplete> {
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

    pub(super) fn hold(&mut self, origin: Origin, bytes: usize) {
        self.held_bytes += bytes;
        self.shares.entry(origin).or_default().held_bytes += bytes;
    }

    pub(super) fn release(&mut self, origin: &Origin, bytes: usize) {
        self.held_bytes -= bytes;
        if let Some(share) = self.shares.get_mut(origin) {
            share.held_bytes -= bytes;
        }
    }

    pub(super) fn forget_empty_share(&mut self, origin: &Origin) {
        if self.shares.get(origin).is_some_and(|share| share.held_bytes + share.incomplete == 0) {
            self.shares.remove(origin);
        }
    }

    /// Whether this origin may hold so many bytes more and, if the fragment begins a message of several,
    /// another incomplete one.
    pub(super) fn has_share(&self, origin: &Origin, bytes: usize, is_begun: bool) -> bool {
        let (held, incomplete) =
            self.shares.get(origin).map_or((0, 0), |share| (share.held_bytes, share.incomplete));
        let fits = |own: usize, all: usize, max: usize| {
            max.checked_sub(all).is_some_and(|left| own <= SHARE_OF_REST * left)
        };
        fits(held, self.held_bytes + bytes, MAX_HELD_BYTES)
            && (!is_begun || fits(incomplete, self.incomplete.len() + 1, MAX_INCOMPLETE_REPLIES))
    }
}
