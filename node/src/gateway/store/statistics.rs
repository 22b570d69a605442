//! What a store has done since the gateway's start: totals only.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Outcome;

/// The running counts; shared by tasks.
#[derive(Debug, Default)]
pub struct Statistics {
    kept: AtomicU64,
    confirmed: AtomicU64,
    expired: AtomicU64,
    client_full: AtomicU64,
    unknown_client: AtomicU64,
    store_full: AtomicU64,
    failed: AtomicU64,
    commits: AtomicU64,
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreCounts {
    /// Boxes that were taken.
    pub kept: u64,
    /// Numbers that clients have confirmed, also more than once.
    pub confirmed: u64,
    /// Boxes that were let go unconfirmed.
    pub expired: u64,
    /// Boxes refused because the client's share was full.
    pub client_full: u64,
    /// Boxes refused because nobody of that name is registered.
    pub unknown_client: u64,
    /// Boxes refused because the store was full.
    pub store_full: u64,
    /// Boxes refused because the store failed.
    pub failed: u64,
    /// Batches that were applied.
    pub commits: u64,
}

impl StoreCounts {
    /// Refused boxes by reason.
    pub fn refusals(&self) -> [(&'static str, u64); 4] {
        [
            ("client full", self.client_full),
            ("unknown client", self.unknown_client),
            ("store full", self.store_full),
            ("store failed", self.failed),
        ]
    }
}

impl Statistics {
    /// Counts a box by what became of it; `None` when the store failed.
    pub(super) fn add_box(&self, outcome: Option<Outcome>) {
        let count = match outcome {
            Some(Outcome::Done) => &self.kept,
            Some(Outcome::ClientFull) => &self.client_full,
            Some(Outcome::UnknownClient) => &self.unknown_client,
            Some(Outcome::StoreFull) => &self.store_full,
            None => &self.failed,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add_confirmed(&self, numbers: u64) {
        self.confirmed.fetch_add(numbers, Ordering::Relaxed);
    }

    pub(super) fn add_expired(&self, boxes: u64) {
        self.expired.fetch_add(boxes, Ordering::Relaxed);
    }

    pub(super) fn add_commit(&self) {
        self.commits.fetch_add(1, Ordering::Relaxed);
    }

    /// The counts now.
    pub fn snapshot(&self) -> StoreCounts {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        StoreCounts {
            kept: load(&self.kept),
            confirmed: load(&self.confirmed),
            expired: load(&self.expired),
            client_full: load(&self.client_full),
            unknown_client: load(&self.unknown_client),
            store_full: load(&self.store_full),
            failed: load(&self.failed),
            commits: load(&self.commits),
        }
    }
}
