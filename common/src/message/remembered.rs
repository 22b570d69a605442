//! Which messages the application has had.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use super::fragment::{Hour, MessageId};
use super::inbox::Key;

/// Most ids that are remembered of messages that gateways keep, 10 MB at most.
pub const MAX_REMEMBERED: usize = 256 * 1024;

/// How long ids are remembered from one start of the program to the next: longer than a gateway keeps
/// a delivery.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(31 * 24 * 60 * 60);

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

/// Ids of messages that were taken. What is forgotten, at the bound or with age, are whole hours, the
/// oldest first; and whatever is not newer than those is refused from then on. So a message that was taken
/// is never taken again, however many others come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TakenIds {
    ids: BTreeSet<TakenId>,
    refused_before: Hour,
}

impl TakenIds {
    /// None yet; messages that were sent before this hour are refused.
    pub fn new(refused_before: Hour) -> Self {
        Self { ids: BTreeSet::new(), refused_before }
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

    /// What is remembered, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = TakenId> {
        self.ids.iter().copied()
    }

    /// Whether the message was taken, as far as is remembered.
    pub fn contains(&self, id: &TakenId) -> bool {
        self.ids.contains(id)
    }

    /// Remembers that the message is taken.
    pub fn insert(&mut self, id: TakenId) {
        if id.hour < self.refused_before {
            return;
        }
        self.ids.insert(id);
        while self.ids.len() > MAX_REMEMBERED
            && let Some(oldest) = self.ids.first()
        {
            self.forget_before(oldest.hour.next());
        }
    }

    /// Forgets messages that were sent before this hour, and refuses what is not newer than those.
    pub fn forget_before(&mut self, hour: Hour) {
        while let Some(oldest) = self.ids.first().copied().filter(|oldest| oldest.hour < hour) {
            self.ids.remove(&oldest);
            self.refused_before = oldest.hour.next();
        }
    }

    /// Whether so many more can be remembered without refusing messages of this hour or later.
    pub(super) fn has_room(&self, more: usize, hour: Hour) -> bool {
        let excess = (self.ids.len() + more).saturating_sub(MAX_REMEMBERED);
        excess == 0 || self.ids.iter().nth(excess - 1).is_some_and(|id| id.hour < hour)
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
    use super::super::inbox::Origin;
    use super::*;

    fn id(hour: u32, number: usize) -> TakenId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        TakenId { hour: Hour(hour), id: MessageId(id) }
    }

    #[test]
    fn at_the_bound_the_oldest_hour_is_forgotten_and_refused() {
        let mut taken = TakenIds::default();
        for number in 0..MAX_REMEMBERED {
            taken.insert(id(if number < 10 { 7 } else { 9 }, number));
        }
        assert_eq!((taken.len(), taken.refused_before()), (MAX_REMEMBERED, Hour(0)));
        assert!(taken.has_room(10, Hour(9)));
        assert!(!taken.has_room(11, Hour(9)), "others of this hour would be refused");
        assert!(taken.has_room(11, Hour(10)));
        taken.insert(id(9, MAX_REMEMBERED));
        assert_eq!((taken.len(), taken.refused_before()), (MAX_REMEMBERED - 9, Hour(8)));
        assert!(!taken.contains(&id(7, 0)) && taken.contains(&id(9, 10)));
    }

    #[test]
    fn ids_of_refused_hours_are_not_remembered() {
        let mut taken = TakenIds::new(Hour(5));
        taken.insert(id(4, 1));
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
