//! Ids of messages that the application has taken.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::inbox::Key;

/// Most ids that are remembered, 60 MB at most: the oldest are forgotten. A copy that comes later than
/// that would be received once more.
pub const MAX_REMEMBERED: usize = 256 * 1024;

/// How long ids are remembered: longer than a gateway keeps a delivery.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(31 * 24 * 60 * 60);

/// The newest ids.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    ids: HashSet<Key>,
    order: VecDeque<(Instant, Key)>,
}

impl Remembered {
    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn contains(&self, key: &Key) -> bool {
        self.ids.contains(key)
    }

    pub(super) fn insert(&mut self, now: Instant, key: Key) {
        if !self.ids.insert(key) {
            return;
        }
        self.order.push_back((now, key));
        while self.order.len() > MAX_REMEMBERED
            || self.order.front().is_some_and(|(at, _)| *at + REMEMBERED_FOR <= now)
        {
            if let Some((_, oldest)) = self.order.pop_front() {
                self.ids.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fragment::MessageId;
    use super::super::inbox::Origin;
    use super::*;

    fn key(number: usize) -> Key {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        (Origin::Gateway, MessageId(id))
    }

    #[test]
    fn the_oldest_ids_are_forgotten_at_the_bound_and_with_age() {
        let now = Instant::now();
        let mut remembered = Remembered::default();
        for number in 0..=MAX_REMEMBERED {
            remembered.insert(now, key(number));
        }
        assert!(!remembered.contains(&key(0)));
        assert!(remembered.contains(&key(1)));
        assert_eq!((remembered.len(), remembered.order.len()), (MAX_REMEMBERED, MAX_REMEMBERED));
        remembered.insert(now + REMEMBERED_FOR, key(0));
        assert_eq!((remembered.len(), remembered.order.len()), (1, 1));
    }
}
