//! What a client expects by the SURBs that it gave away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use mixsocks_sphinx::{Identifier, Surb};

/// A SURB that the shell made.
#[derive(Debug)]
pub struct MadeSurb<R> {
    /// What is given away.
    pub surb: Surb,
    /// Names what comes by it.
    pub identifier: Identifier,
    /// What recovers that.
    pub recovery: R,
    /// The sum of the delays that were chosen for its route.
    pub delay: Duration,
    /// The key epoch whose keys it was made for.
    pub key_epoch: u64,
}

/// Where SURBs for acknowledgements come from.
pub trait AckSurbs<R> {
    /// The next one; `None` while there are none at hand.
    fn take(&mut self) -> Option<MadeSurb<R>>;
}

/// The oldest first.
impl<R> AckSurbs<R> for std::collections::VecDeque<MadeSurb<R>> {
    fn take(&mut self) -> Option<MadeSurb<R>> {
        self.pop_front()
    }
}

#[derive(Debug)]
struct Entry<R, P, O> {
    number: u64,
    recovery: R,
    key_epoch: u64,
    purpose: P,
    owner: O,
}

/// SURBs under way, whom each was given to and what for; at most `max`. Beyond, whoever has the most
/// loses its oldest: a greedy one drives out nobody else.
#[derive(Debug)]
pub(super) struct Awaited<R, P, O> {
    entries: HashMap<Identifier, Entry<R, P, O>>,
    /// In the order in which they were given.
    by_owner: BTreeMap<O, BTreeMap<u64, Identifier>>,
    by_count: BTreeSet<(usize, O)>,
    next: u64,
    max: usize,
}

impl<R, P, O: Copy + Ord> Awaited<R, P, O> {
    pub(super) fn new(max: usize) -> Self {
        Self {
            entries: HashMap::new(),
            by_owner: BTreeMap::new(),
            by_count: BTreeSet::new(),
            next: 0,
            max,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Remembers a SURB that is given to `owner`, and returns it.
    pub(super) fn insert(&mut self, made: MadeSurb<R>, purpose: P, owner: O) -> Surb {
        let MadeSurb { surb, identifier, recovery, key_epoch, .. } = made;
        self.take(&identifier);
        let number = self.next;
        self.next += 1;
        self.change(owner, |given| given.insert(number, identifier));
        self.entries.insert(identifier, Entry { number, recovery, key_epoch, purpose, owner });
        if self.entries.len() > self.max
            && let Some((_, greediest)) = self.by_count.last().copied()
            && let Some((_, oldest)) = self.change(greediest, BTreeMap::pop_first)
        {
            self.entries.remove(&oldest);
        }
        surb
    }

    pub(super) fn purpose_mut(&mut self, identifier: &Identifier) -> Option<&mut P> {
        self.entries.get_mut(identifier).map(|entry| &mut entry.purpose)
    }

    pub(super) fn recovery_mut(&mut self, identifier: &Identifier) -> Option<&mut R> {
        self.entries.get_mut(identifier).map(|entry| &mut entry.recovery)
    }

    /// What came by this SURB is awaited no longer.
    pub(super) fn take(&mut self, identifier: &Identifier) -> Option<(R, P)> {
        let entry = self.entries.remove(identifier)?;
        self.change(entry.owner, |given| given.remove(&entry.number));
        Some((entry.recovery, entry.purpose))
    }

    /// Nodes have no keys of earlier epochs any more: nothing comes by those SURBs.
    pub(super) fn forget_before(&mut self, key_epoch: u64) {
        let old = self.entries.iter().filter(|(_, entry)| entry.key_epoch < key_epoch);
        let old: Vec<_> = old.map(|(identifier, _)| *identifier).collect();
        for identifier in old {
            self.take(&identifier);
        }
    }

    /// Changes what an owner was given.
    fn change<T>(
        &mut self,
        owner: O,
        change: impl FnOnce(&mut BTreeMap<u64, Identifier>) -> T,
    ) -> T {
        let given = self.by_owner.entry(owner).or_default();
        self.by_count.remove(&(given.len(), owner));
        let changed = change(given);
        match given.len() {
            0 => drop(self.by_owner.remove(&owner)),
            count => drop(self.by_count.insert((count, owner))),
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::made_surb;
    use super::*;

    #[test]
    fn the_oldest_are_given_up_and_each_is_taken_once() {
        let mut awaited = Awaited::new(3);
        for number in 0..5 {
            awaited.insert(made_surb(number, 0), number, 'a');
        }
        assert_eq!(awaited.len(), 3);
        let id = |number| made_surb(number, 0).identifier;
        assert!(awaited.take(&id(1)).is_none());
        assert_eq!(awaited.take(&id(2)), Some((2, 2)));
        assert!(awaited.take(&id(2)).is_none());
        assert_eq!((awaited.len(), awaited.by_owner[&'a'].len()), (2, 2));
        for number in 3..5 {
            awaited.take(&id(number));
        }
        assert!(awaited.by_owner.is_empty() && awaited.by_count.is_empty());
    }

    #[test]
    fn whoever_has_the_most_makes_room() {
        let mut awaited = Awaited::new(10);
        for number in 0..4 {
            awaited.insert(made_surb(number, 0), number, 'a');
        }
        for number in 4..100 {
            awaited.insert(made_surb(number, 0), number, 'b');
        }
        assert_eq!((awaited.by_owner[&'a'].len(), awaited.by_owner[&'b'].len()), (4, 6));
        for number in 100..200 {
            awaited.insert(made_surb(number, 0), number, 'c');
        }
        let counts: Vec<_> = awaited.by_owner.values().map(BTreeMap::len).collect();
        assert_eq!((counts.iter().sum(), counts.iter().min()), (10, Some(&3)));
    }

    #[test]
    fn surbs_of_past_key_epochs_are_forgotten() {
        let mut awaited = Awaited::new(9);
        for number in 0..6 {
            awaited.insert(made_surb(number, number), (), 'a');
        }
        awaited.forget_before(4);
        assert_eq!((awaited.len(), awaited.by_owner[&'a'].len()), (2, 2));
    }
}
