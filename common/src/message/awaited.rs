//! What a client expects by the SURBs that it gave away.

use std::collections::{BTreeMap, HashMap};
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
struct Entry<R, P> {
    number: u64,
    recovery: R,
    key_epoch: u64,
    purpose: P,
}

/// SURBs under way and what each is for; at most `max`, of which the oldest go first.
#[derive(Debug)]
pub(super) struct Awaited<R, P> {
    entries: HashMap<Identifier, Entry<R, P>>,
    order: BTreeMap<u64, Identifier>,
    next: u64,
    max: usize,
}

impl<R, P> Awaited<R, P> {
    pub(super) fn new(max: usize) -> Self {
        Self { entries: HashMap::new(), order: BTreeMap::new(), next: 0, max }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Remembers a SURB that is given away, and returns it.
    pub(super) fn insert(&mut self, made: MadeSurb<R>, purpose: P) -> Surb {
        let MadeSurb { surb, identifier, recovery, key_epoch, .. } = made;
        let number = self.next;
        self.next += 1;
        let entry = Entry { number, recovery, key_epoch, purpose };
        if let Some(replaced) = self.entries.insert(identifier, entry) {
            self.order.remove(&replaced.number);
        }
        self.order.insert(number, identifier);
        if self.entries.len() > self.max
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.entries.remove(&oldest);
        }
        surb
    }

    pub(super) fn purpose_mut(&mut self, identifier: &Identifier) -> Option<&mut P> {
        self.entries.get_mut(identifier).map(|entry| &mut entry.purpose)
    }

    /// What came by this SURB is awaited no longer.
    pub(super) fn take(&mut self, identifier: &Identifier) -> Option<(R, P)> {
        let entry = self.entries.remove(identifier)?;
        self.order.remove(&entry.number);
        Some((entry.recovery, entry.purpose))
    }

    /// Nodes have no keys of earlier epochs any more: nothing comes by those SURBs.
    pub(super) fn forget_before(&mut self, key_epoch: u64) {
        self.entries.retain(|_, entry| entry.key_epoch >= key_epoch);
        self.order.retain(|_, identifier| self.entries.contains_key(identifier));
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
            awaited.insert(made_surb(number, 0), number);
        }
        assert_eq!((awaited.len(), awaited.order.len()), (3, 3));
        let id = |number| made_surb(number, 0).identifier;
        assert!(awaited.take(&id(1)).is_none());
        assert_eq!(awaited.take(&id(2)), Some((2, 2)));
        assert!(awaited.take(&id(2)).is_none());
        assert_eq!((awaited.len(), awaited.order.len()), (2, 2));
    }

    #[test]
    fn surbs_of_past_key_epochs_are_forgotten() {
        let mut awaited = Awaited::new(9);
        for number in 0..6 {
            awaited.insert(made_surb(number, number), ());
        }
        awaited.forget_before(4);
        assert_eq!((awaited.len(), awaited.order.len()), (2, 2));
    }
}
