//! What a recipient drops, counted by reason; never by sender or stream.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why something that arrived was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// A packet was made for another key, changed on its way, or is malformed.
    Unreadable,
    /// A packet came before.
    Replayed,
    /// No more replay tags can be remembered for the time being.
    TooManyTags,
    /// A packet wants to be passed on.
    NotForUs,
    /// A payload was changed on its way.
    Changed,
    /// A reply that nobody awaits (any more).
    NotAwaited,
    /// The contents are not those of a session, or break its rules.
    Refused,
}

const REASONS: [(DropReason, &str); 7] = [
    (DropReason::Unreadable, "unreadable"),
    (DropReason::Replayed, "replayed"),
    (DropReason::TooManyTags, "beyond the replay tags"),
    (DropReason::NotForUs, "for others"),
    (DropReason::Changed, "changed"),
    (DropReason::NotAwaited, "not awaited"),
    (DropReason::Refused, "refused"),
];

/// How much was dropped.
#[derive(Debug, Default)]
pub struct Drops([AtomicU64; REASONS.len()]);

impl Drops {
    /// Counts one.
    pub fn add(&self, reason: DropReason) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many were dropped for this reason.
    pub fn count(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }

    /// Whether nothing was dropped.
    pub fn is_empty(&self) -> bool {
        REASONS.iter().all(|(reason, _)| self.count(*reason) == 0)
    }
}

/// The counts that are not zero: `3 replayed, 1 changed`.
impl fmt::Display for Drops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = REASONS.iter().map(|(reason, name)| (self.count(*reason), name));
        for (index, (count, name)) in counts.filter(|(count, _)| *count > 0).enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{count} {name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_counted_and_named() {
        let drops = Drops::default();
        assert!(drops.is_empty());
        for (index, (reason, _)) in REASONS.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
        drops.add(DropReason::Replayed);
        drops.add(DropReason::Refused);
        drops.add(DropReason::Replayed);
        assert_eq!(drops.to_string(), "2 replayed, 1 refused");
        assert_eq!(drops.count(DropReason::Replayed), 2);
    }
}
