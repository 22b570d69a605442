//! What an authority holds of the network's members.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use super::{Candidate, Endorsement, MAX_HELD, Rules, SignedDescriptor};
use crate::keys::Identity;
use crate::topology::UnixTime;

/// Descriptors with the endorsements that came with them, by identity.
#[derive(Default)]
pub(super) struct Members {
    held: BTreeMap<Identity, Held>,
}

struct Held {
    descriptor: SignedDescriptor,
    endorsements: BTreeMap<Identity, Endorsement>,
    /// Since when this descriptor has been held with enough endorsements.
    since: Option<Duration>,
    /// When the newest one was published that had been held for long enough before this one came.
    earlier: Option<UnixTime>,
}

impl Held {
    fn published(&self) -> UnixTime {
        self.descriptor.descriptor().published
    }

    /// As a document of `epoch` uses it; `None` if it may not. Everything else was checked when it
    /// came.
    fn candidate(&self, rules: &Rules, epoch: u64) -> Option<Candidate> {
        let epochs = &rules.parameters().epochs;
        let (published, begin) = (self.published().0, epochs.start(epoch).0);
        if published.saturating_add(rules.descriptor_seconds()) < begin
            || published > epochs.start(epoch.saturating_add(1)).0
        {
            return None;
        }
        let needed = rules.authorities().threshold();
        let valid = self.endorsements.values().filter(|endorsement| endorsement.until >= epoch);
        let endorsements: Vec<_> = valid.take(needed).copied().collect();
        let descriptor = || self.descriptor.clone();
        (endorsements.len() == needed).then(|| Candidate { descriptor: descriptor(), endorsements })
    }
}

impl Members {
    /// When the held descriptor was published, if `descriptor` is neither newer nor the same.
    pub(super) fn newer_than(&self, descriptor: &SignedDescriptor) -> Option<UnixTime> {
        let held = self.held.get(&descriptor.identity())?;
        let published = held.published();
        let newer = published >= descriptor.descriptor().published;
        (newer && held.descriptor != *descriptor).then_some(published)
    }

    /// As many as there may be, all with the same descriptor under other names.
    #[cfg(test)]
    pub(super) fn full(descriptor: &SignedDescriptor) -> Self {
        let held = (0..MAX_HELD as u64).map(|number| {
            let mut seed = [9; 32];
            seed[..8].copy_from_slice(&number.to_be_bytes());
            let identity = crate::keys::IdentityKey::from_bytes(&seed).identity();
            let (descriptor, endorsements) = (descriptor.clone(), BTreeMap::new());
            (identity, Held { descriptor, endorsements, since: None, earlier: None })
        });
        Self { held: held.collect() }
    }

    /// Whether a descriptor of `identity` has a place.
    pub(super) fn has_room(&self, identity: &Identity) -> bool {
        self.held.len() < MAX_HELD || self.held.contains_key(identity)
    }

    /// Keeps a descriptor, if it is newer than the one that is held, and endorsements of its maker
    /// that are right, in any case.
    pub(super) fn put<'a>(
        &mut self,
        descriptor: SignedDescriptor,
        endorsements: impl IntoIterator<Item = &'a Endorsement>,
        rules: &Rules,
        now: Duration,
    ) {
        let settle_time = rules.attempt_time();
        let kind = descriptor.descriptor().kind();
        let new = |descriptor| Held {
            descriptor,
            endorsements: BTreeMap::new(),
            since: None,
            earlier: None,
        };
        let newer = self.newer_than(&descriptor).is_none();
        let held = match self.held.entry(descriptor.identity()) {
            Entry::Vacant(entry) => entry.insert(new(descriptor)),
            Entry::Occupied(entry) => {
                let held = entry.into_mut();
                if held.descriptor.descriptor().kind() != kind {
                    // An endorsement is for one kind of member.
                    if newer {
                        *held = new(descriptor);
                    } else {
                        return;
                    }
                } else if newer && held.descriptor != descriptor {
                    if held.since.is_some_and(|since| since + settle_time <= now) {
                        held.earlier = Some(held.published());
                    }
                    (held.descriptor, held.since) = (descriptor, None);
                }
                held
            }
        };
        for endorsement in endorsements {
            let kept = held.endorsements.entry(endorsement.authority).or_insert(*endorsement);
            if kept.until < endorsement.until {
                *kept = *endorsement;
            }
        }
        if held.endorsements.len() >= rules.authorities().threshold() {
            held.since = held.since.or(Some(now));
        }
    }

    /// Forgets one.
    pub(super) fn remove(&mut self, identity: &Identity) {
        self.held.remove(identity);
    }

    /// Forgets what is too old for a document of `epoch`.
    pub(super) fn prune(&mut self, rules: &Rules, epoch: u64) {
        let begin = rules.parameters().epochs.start(epoch).0;
        let seconds = rules.descriptor_seconds();
        self.held.retain(|_, held| held.published().0.saturating_add(seconds) >= begin);
    }

    /// All that may be used for the document of `epoch`, sorted by identity.
    pub(super) fn current(&self, rules: &Rules, epoch: u64) -> Vec<Candidate> {
        self.held.values().filter_map(|held| held.candidate(rules, epoch)).collect()
    }

    /// Whom the document of `epoch` must not leave out, with the time at which the descriptor was
    /// published that it must have at least: what has been held for an attempt's time at `now`, when
    /// making it begins.
    pub(super) fn expected(
        &self,
        rules: &Rules,
        epoch: u64,
        now: Duration,
    ) -> BTreeMap<Identity, UnixTime> {
        let expected = |(identity, held): (&Identity, &Held)| {
            held.candidate(rules, epoch)?;
            let settled = held.since.is_some_and(|since| since + rules.attempt_time() <= now);
            let published = if settled { Some(held.published()) } else { held.earlier };
            let begin = rules.parameters().epochs.start(epoch).0;
            // An earlier one may have become too old to be demanded.
            let usable = |p: &UnixTime| p.0.saturating_add(rules.descriptor_seconds()) >= begin;
            Some((*identity, published.filter(usable)?))
        };
        self.held.iter().filter_map(expected).collect()
    }

    /// All that is held.
    pub(super) fn all(&self) -> Vec<Candidate> {
        let candidate = |held: &Held| Candidate {
            descriptor: held.descriptor.clone(),
            endorsements: held.endorsements.values().copied().collect(),
        };
        self.held.values().map(candidate).collect()
    }
}
