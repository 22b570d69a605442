//! What the operator of a node wants to know while it runs.

use std::sync::Arc;

use crate::counters::Counters;
use crate::gateway::store::{Statistics, Store, StoreCounts, Usage};
use crate::keys::SphinxKeys;
use crate::peel::Peeler;

/// A look at a running node; it keeps none of its tasks or links alive.
#[derive(Clone, Debug)]
pub struct Monitor {
    pub(crate) counters: Arc<Counters>,
    pub(crate) keys: Arc<SphinxKeys>,
    pub(crate) peeler: Arc<Peeler>,
    /// Gateways have one.
    pub(crate) store: Option<(Arc<dyn Store>, Arc<Statistics>)>,
}

impl Monitor {
    /// What it has counted since its start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The key epoch whose Sphinx key is the present one.
    pub fn key_epoch(&self) -> u64 {
        self.keys.key_epoch()
    }

    /// Replay tags in its memory; there may be up to [`crate::peel::MAX_REPLAY_TAGS`] for each key.
    pub fn replay_tags(&self) -> usize {
        self.peeler.replay_tags()
    }

    /// What a gateway's store has done since the start, and how much is in it; `None` for mixes.
    pub fn store(&self) -> Option<(StoreCounts, Usage)> {
        self.store.as_ref().map(|(store, statistics)| (statistics.snapshot(), store.usage()))
    }
}
