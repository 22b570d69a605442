//! A gateway's store in memory, with the semantics of the trait, and the group commit before it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::message::packet::AckStatus;
use mixsocks_common::topology::UnixTime;
use mixsocks_node::gateway::store::{
    Change, ClientId, Expired, Limits, Outcome, QUEUED_CHANGES, Share, Store, StoreError, Usage,
    judge,
};
use mixsocks_sphinx::Surb;

/// Changes in one batch, as in the shell.
const BATCH_CHANGES: usize = 512;

/// What is in it is durable: it outlives its gateway.
#[derive(Debug)]
pub(crate) struct MemoryStore {
    limits: Limits,
    /// Its disk is full: whatever keeps something is refused.
    pub(crate) is_disk_full: AtomicBool,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    registered: BTreeSet<ClientId>,
    shares: BTreeMap<ClientId, Share>,
    boxes: BTreeMap<(ClientId, u64), Vec<u8>>,
    usage: Usage,
}

impl MemoryStore {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, is_disk_full: AtomicBool::new(false), kept: Mutex::default() }
    }

    /// Whether a client's delivery of this number is kept.
    pub(crate) fn keeps(&self, client: &ClientId, number: u64) -> bool {
        self.lock().boxes.contains_key(&(*client, number))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap()
    }
}

impl Kept {
    fn apply(&mut self, limits: &Limits, change: &Change, now: UnixTime) -> Outcome {
        match change {
            Change::Keep { client, sealed } => {
                if !self.registered.contains(client) {
                    return Outcome::UnknownClient;
                }
                let share = self.shares.entry(*client).or_default();
                let bytes = sealed.len() as u64;
                if let Err(refused) = judge(limits, share, &self.usage, bytes) {
                    return refused;
                }
                let number = share.add(bytes, now);
                self.usage.boxes += 1;
                self.usage.bytes += bytes;
                self.boxes.insert((*client, number), sealed.clone());
            }
            Change::Confirm { client, numbers } => {
                for number in numbers {
                    if let Some(sealed) = self.boxes.remove(&(*client, *number)) {
                        let bytes = sealed.len() as u64;
                        self.shares.entry(*client).or_default().remove(bytes);
                        self.usage.boxes -= 1;
                        self.usage.bytes -= bytes;
                    }
                }
            }
            Change::Register { client, .. } => {
                self.registered.insert(*client);
            }
            Change::LogIn { .. } => {}
        }
        Outcome::Done
    }
}

impl Store for MemoryStore {
    fn apply(&self, changes: &[Change], now: UnixTime) -> Result<Vec<Outcome>, StoreError> {
        let needs_room = changes.iter().any(|change| matches!(change, Change::Keep { .. }));
        if needs_room && self.is_disk_full.load(Ordering::Relaxed) {
            return Err(StoreError::Closed("memory".into()));
        }
        let mut kept = self.lock();
        Ok(changes.iter().map(|change| kept.apply(&self.limits, change, now)).collect())
    }

    fn deliveries(
        &self,
        client: &ClientId,
        after: u64,
        max: usize,
    ) -> Result<Vec<KeptBox>, StoreError> {
        let range = (Bound::Excluded((*client, after)), Bound::Included((*client, u64::MAX)));
        let kept = self.lock();
        let found = kept.boxes.range(range).take(max);
        let kept_box = |((_, number), sealed): (&(ClientId, u64), &Vec<u8>)| KeptBox {
            number: *number,
            sealed: sealed.clone(),
        };
        Ok(found.map(kept_box).collect())
    }

    fn token_hash(&self, _: &ClientId) -> Result<Option<TokenHash>, StoreError> {
        unreachable!("the login is not simulated")
    }

    fn expire(&self, _: UnixTime) -> Result<Expired, StoreError> {
        unreachable!("nobody is away for a week")
    }

    fn usage(&self) -> Usage {
        self.lock().usage
    }
}

/// What became of a change, and what waits for that.
pub(crate) struct Answer {
    pub(crate) change: Change,
    /// For the acknowledgement of a box.
    pub(crate) ack_surb: Option<Surb>,
    /// `None` when the store failed.
    pub(crate) outcome: Option<Outcome>,
}

impl Answer {
    /// How it is acknowledged.
    pub(crate) fn status(&self) -> AckStatus {
        match self.outcome {
            Some(Outcome::Done) => AckStatus::Stored,
            Some(Outcome::ClientFull) => AckStatus::ShareFull,
            Some(Outcome::UnknownClient) => AckStatus::UnknownClient,
            Some(Outcome::StoreFull) | None => AckStatus::StoreUnavailable,
        }
    }
}

/// Changes that wait, and the batch that is being written: as
/// [`GroupCommit`](mixsocks_node::gateway::store::GroupCommit), whose task and clock are not simulated.
#[derive(Default)]
pub(crate) struct GroupCommit {
    waiting: VecDeque<(Change, Option<Surb>)>,
    batch: Vec<(Change, Option<Surb>)>,
}

impl GroupCommit {
    /// Hands in a change; it is dropped when too many wait.
    pub(crate) fn push(&mut self, change: Change, ack_surb: Option<Surb>) {
        if self.waiting.len() < QUEUED_CHANGES {
            self.waiting.push_back((change, ack_surb));
        }
    }

    /// Begins to write what waits; whether there is anything, and nothing was being written.
    pub(crate) fn begin(&mut self) -> bool {
        if !self.batch.is_empty() || self.waiting.is_empty() {
            return false;
        }
        let count = self.waiting.len().min(BATCH_CHANGES);
        self.batch.extend(self.waiting.drain(..count));
        true
    }

    /// The batch is written. As in the shell, what needs no room is tried once more after a failure.
    pub(crate) fn finish(&mut self, store: &MemoryStore, now: UnixTime) -> Vec<Answer> {
        let (changes, surbs): (Vec<_>, Vec<_>) = self.batch.drain(..).unzip();
        let outcomes: Vec<_> = match store.apply(&changes, now) {
            Ok(outcomes) => outcomes.into_iter().map(Some).collect(),
            Err(_) => changes
                .iter()
                .map(|change| match change {
                    Change::Keep { .. } => None,
                    change => store.apply(std::slice::from_ref(change), now).unwrap().pop(),
                })
                .collect(),
        };
        let all = changes.into_iter().zip(surbs).zip(outcomes);
        all.map(|((change, ack_surb), outcome)| Answer { change, ack_surb, outcome }).collect()
    }

    /// The gateway is killed. What was being written is on the disk, or is not; nobody is answered.
    pub(crate) fn crash(&mut self, store: &MemoryStore, is_written: bool, now: UnixTime) {
        self.waiting.clear();
        if is_written {
            self.finish(store, now);
        }
        self.batch.clear();
    }
}
