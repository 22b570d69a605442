//! Which messages the application has had.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use super::fragment::{Hour, MESSAGE_ID_LEN, MessageId};
use super::inbox::MAX_HOURS_AHEAD;
use super::shelf::Key;

/// Most ids that are remembered of messages that gateways keep, 10 MB at most.
pub const MAX_REMEMBERED: usize = 256 * 1024;

/// How long ids are remembered, longer than a gateway keeps a delivery. Messages that were sent earlier are
/// refused.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(REMEMBERED_HOURS as u64 * 60 * 60);

/// [`REMEMBERED_FOR`] in hours.
const REMEMBERED_HOURS: u32 = 31 * 24;

/// Most hours of which messages are refused as ids of them were forgotten: more than ids are remembered
/// of. Beyond, everything is refused up to the oldest one.
pub const MAX_REFUSED_HOURS: usize = 800;
const _: () =
    assert!(REMEMBERED_HOURS as usize + MAX_HOURS_AHEAD as usize + 2 <= MAX_REFUSED_HOURS);

/// Messages that were sent before this hour are too old now to be told from copies.
pub fn oldest_remembered(now: Hour) -> Hour {
    Hour(now.0.saturating_sub(REMEMBERED_HOURS))
}

/// Most ids of replies that are remembered: of those, nobody keeps copies that could come much later.
pub(super) const MAX_REMEMBERED_REPLIES: usize = 32 * 1024;

/// A message that gateways keep, as it is remembered: messages of different hours are different ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TakenId {
    /// When it was sent, as it says itself.
    pub hour: Hour,
    /// Its id.
    pub id: MessageId,
}

impl TakenId {
    /// The least id of an hour.
    fn first_of(hour: Hour) -> Self {
        Self { hour, id: MessageId([0; MESSAGE_ID_LEN]) }
    }
}

/// Ids of messages that were taken. What is forgotten, at the bound or with age, are whole hours, and
/// messages of these are refused from then on: no message that was taken is ever taken again, however many
/// others come. At the bound it is the hour with the most ids: whoever sends so many that they fill the
/// memory costs others no more than the hour that is full of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TakenIds {
    ids: BTreeSet<TakenId>,
    /// How many ids there are of each hour.
    hours: BTreeMap<Hour, usize>,
    refused: BTreeSet<Hour>,
    refused_before: Hour,
}

impl TakenIds {
    /// None yet; messages that were sent before an hour, or in one of some others, are refused.
    pub fn new(refused_before: Hour, refused: impl IntoIterator<Item = Hour>) -> Self {
        let mut taken = Self { refused_before, ..Self::default() };
        refused.into_iter().for_each(|hour| taken.refuse(hour));
        taken
    }

    /// How many are remembered: at most [`MAX_REMEMBERED`].
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether none is remembered.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Messages that were sent before are refused.
    pub fn refused_before(&self) -> Hour {
        self.refused_before
    }

    /// Later hours of which messages are refused too, the oldest first: at most [`MAX_REFUSED_HOURS`].
    pub fn refused_hours(&self) -> impl ExactSizeIterator<Item = Hour> {
        self.refused.iter().copied()
    }

    /// What is remembered, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = TakenId> {
        self.ids.iter().copied()
    }

    /// Whether the message was taken, as far as is remembered.
    pub fn contains(&self, id: &TakenId) -> bool {
        self.ids.contains(id)
    }

    /// Whether messages of this hour are refused: some that were taken may be forgotten.
    pub fn refuses(&self, hour: Hour) -> bool {
        hour < self.refused_before || self.refused.contains(&hour)
    }

    /// Remembers that the message is taken.
    pub fn insert(&mut self, id: TakenId) {
        if self.refuses(id.hour) || !self.ids.insert(id) {
            return;
        }
        *self.hours.entry(id.hour).or_default() += 1;
        if self.ids.len() > MAX_REMEMBERED
            && let Some(hour) = self.fullest_hour()
        {
            self.refuse(hour);
        }
    }

    /// The hour with the most ids; of several the oldest.
    fn fullest_hour(&self) -> Option<Hour> {
        let fullest = self.hours.iter().max_by_key(|(hour, ids)| (**ids, Reverse(**hour)));
        fullest.map(|(hour, _)| *hour)
    }

    /// Forgets an hour, and refuses what was sent in it.
    fn refuse(&mut self, hour: Hour) {
        let first = TakenId::first_of(hour);
        while let Some(id) = self.ids.range(first..).next().copied().filter(|id| id.hour == hour) {
            self.ids.remove(&id);
        }
        self.hours.remove(&hour);
        if hour >= self.refused_before {
            self.refused.insert(hour);
        }
        if self.refused.len() > MAX_REFUSED_HOURS
            && let Some(oldest) = self.refused.first()
        {
            self.forget_before(oldest.next());
        }
    }

    /// Forgets messages that were sent before this hour, and refuses what is not newer than those.
    pub fn forget_before(&mut self, hour: Hour) {
        while let Some(oldest) = self.ids.first().copied().filter(|oldest| oldest.hour < hour) {
            self.ids.remove(&oldest);
            self.refused_before = self.refused_before.max(oldest.hour.next());
        }
        while let Some(oldest) = self.hours.first_entry().filter(|oldest| *oldest.key() < hour) {
            oldest.remove();
        }
        while let Some(oldest) = self.refused.first().copied().filter(|oldest| *oldest < hour) {
            self.refused.remove(&oldest);
            self.refused_before = self.refused_before.max(oldest.next());
        }
    }
}

/// The newest replies that were taken.
#[derive(Debug, Default)]
pub(super) struct TakenReplies {
    ids: HashSet<Key>,
    order: VecDeque<Key>,
}

impl TakenReplies {
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.ids.contains(key)
    }

    pub(super) fn insert(&mut self, key: Key) {
        if self.ids.insert(key) {
            self.order.push_back(key);
        }
        if self.order.len() > MAX_REMEMBERED_REPLIES
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shelf::Origin;
    use super::*;

    fn id(hour: u32, number: usize) -> TakenId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        TakenId { hour: Hour(hour), id: MessageId(id) }
    }

    #[test]
    fn at_the_bound_the_fullest_hour_is_forgotten_and_refused_and_no_other() {
        let mut taken = TakenIds::default();
        for number in 0..MAX_REMEMBERED {
            taken.insert(id(if number < 10 { 7 } else { 9 }, number));
        }
        assert_eq!((taken.len(), taken.refused_hours().len()), (MAX_REMEMBERED, 0));
        taken.insert(id(9, 10));
        assert_eq!(taken.len(), MAX_REMEMBERED, "a copy takes no room");
        taken.insert(id(11, 0));
        assert_eq!(Vec::from_iter(taken.refused_hours()), [Hour(9)]);
        assert_eq!((taken.len(), taken.refused_before()), (11, Hour(0)));
        assert!(taken.contains(&id(7, 0)) && taken.contains(&id(11, 0)));
        let refused = [7, 8, 9, 10, 11].map(|hour| taken.refuses(Hour(hour)));
        assert_eq!(refused, [false, false, true, false, false]);
        taken.insert(id(9, 5));
        assert_eq!(taken.len(), 11, "ids of refused hours are not remembered");
        taken.forget_before(Hour(10));
        assert_eq!((taken.refused_hours().len(), taken.refused_before()), (0, Hour(10)));
    }

    #[test]
    fn refused_hours_are_bounded_and_beyond_that_the_oldest_are_refused_as_a_whole() {
        let most = u32::try_from(MAX_REFUSED_HOURS).unwrap();
        let mut taken = TakenIds::new(Hour(5), (0..most).map(|hour| Hour(10 + 2 * hour)));
        assert_eq!((taken.refused_hours().len(), taken.refused_before()), (800, Hour(5)));
        taken.insert(id(11, 1));
        taken.refuse(Hour(9_000));
        assert_eq!((taken.refused_hours().len(), taken.refused_before()), (800, Hour(11)));
        assert!(taken.contains(&id(11, 1)) && !taken.refuses(Hour(11)));
    }

    #[test]
    fn ids_of_refused_hours_are_not_remembered() {
        let mut taken = TakenIds::new(Hour(5), [Hour(7)]);
        taken.insert(id(4, 1));
        taken.insert(id(7, 1));
        assert!(taken.is_empty());
        taken.insert(id(5, 1));
        assert_eq!(Vec::from_iter(taken.iter()), [id(5, 1)]);
    }

    /// A clock that is wrong refuses nothing that is newer than all that was forgotten.
    #[test]
    fn forgetting_refuses_no_more_than_was_forgotten() {
        let mut taken = TakenIds::default();
        taken.forget_before(Hour(100));
        assert_eq!(taken.refused_before(), Hour(0));
        [3, 5, 8].into_iter().for_each(|hour| taken.insert(id(hour, 0)));
        taken.forget_before(Hour(7));
        assert_eq!((taken.len(), taken.refused_before()), (1, Hour(6)));
        taken.forget_before(Hour(u32::MAX));
        assert_eq!((taken.len(), taken.refused_before()), (0, Hour(9)));
    }

    #[test]
    fn the_newest_replies_are_remembered() {
        let mut taken = TakenReplies::default();
        let key = |number| (Origin::Gateway, id(0, number).id);
        for number in 0..=MAX_REMEMBERED_REPLIES {
            taken.insert(key(number));
            taken.insert(key(number));
        }
        assert!(!taken.contains(&key(0)) && taken.contains(&key(1)));
        assert_eq!((taken.len(), taken.order.len()), (MAX_REMEMBERED_REPLIES, taken.len()));
    }
}
