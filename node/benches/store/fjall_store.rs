//! The same store on `fjall`, as far as messages are concerned.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fjall::{
    Database, Keyspace, KeyspaceCreateOptions, KvSeparationOptions, OwnedWriteBatch, PersistMode,
};
use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::topology::UnixTime;
use mixsocks_node::gateway::store::{
    Change, ClientId, Expired, Limits, Outcome, Share, Store, StoreError, Usage, judge,
};

/// As much as redb has.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;

pub(crate) struct FjallStore {
    database: Database,
    clients: Keyspace,
    shares: Keyspace,
    deliveries: Keyspace,
    limits: Limits,
    usage: Mutex<Usage>,
}

impl std::fmt::Debug for FjallStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FjallStore").finish_non_exhaustive()
    }
}

impl FjallStore {
    /// Opens or creates it; boxes may stand beside the tree.
    pub(crate) fn open(folder: &Path, limits: Limits, beside: bool) -> fjall::Result<Self> {
        let database = Database::builder(folder).cache_size(CACHE_BYTES).open()?;
        let options = || {
            let separation = beside.then(KvSeparationOptions::default);
            KeyspaceCreateOptions::default().with_kv_separation(separation)
        };
        let clients = database.keyspace("clients", KeyspaceCreateOptions::default)?;
        let shares = database.keyspace("shares", KeyspaceCreateOptions::default)?;
        let deliveries = database.keyspace("deliveries", options)?;
        Ok(Self { database, clients, shares, deliveries, limits, usage: Mutex::default() })
    }

    fn lock_usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn share(&self, client: &ClientId) -> fjall::Result<Option<Share>> {
        if !self.clients.contains_key(client)? {
            return Ok(None);
        }
        let stored = self.shares.get(client)?;
        let number = |at: usize| {
            let bytes = stored.as_ref().and_then(|stored| stored[at..].first_chunk().copied());
            bytes.map_or(0, u64::from_be_bytes)
        };
        Ok(Some(Share { last_number: number(0), boxes: number(8), bytes: number(16) }))
    }

    fn try_apply(&self, changes: &[Change], now: UnixTime) -> fjall::Result<Vec<Outcome>> {
        let batch = self.database.batch().durability(Some(PersistMode::SyncData));
        let mut work =
            Work { store: self, batch, shares: BTreeMap::new(), usage: *self.lock_usage(), now };
        let outcomes = changes.iter().map(|change| work.apply(change)).collect::<Result<_, _>>()?;
        let Work { mut batch, shares, usage, .. } = work;
        for (client, share) in shares {
            let Some(Share { last_number, boxes, bytes }) = share else { continue };
            let value = [last_number, boxes, bytes].map(u64::to_be_bytes).concat();
            batch.insert(&self.shares, client, value);
        }
        batch.commit()?;
        *self.lock_usage() = usage;
        Ok(outcomes)
    }
}

fn key(client: &ClientId, number: u64) -> Vec<u8> {
    [&client[..], &number.to_be_bytes()].concat()
}

struct Work<'a> {
    store: &'a FjallStore,
    batch: OwnedWriteBatch,
    shares: BTreeMap<ClientId, Option<Share>>,
    usage: Usage,
    now: UnixTime,
}

impl Work<'_> {
    fn share(&mut self, client: &ClientId) -> fjall::Result<Option<Share>> {
        if let Some(share) = self.shares.get(client) {
            return Ok(*share);
        }
        self.store.share(client)
    }

    fn apply(&mut self, change: &Change) -> fjall::Result<Outcome> {
        match change {
            Change::Keep { client, sealed } => {
                let Some(mut share) = self.share(client)? else {
                    return Ok(Outcome::UnknownClient);
                };
                let bytes = sealed.len() as u64;
                if let Err(refused) = judge(&self.store.limits, &share, &self.usage, bytes) {
                    return Ok(refused);
                }
                let number = share.add(bytes, self.now);
                self.batch.insert(&self.store.deliveries, key(client, number), &sealed[..]);
                self.usage.boxes += 1;
                self.usage.bytes += bytes;
                self.shares.insert(*client, Some(share));
                Ok(Outcome::Done)
            }
            Change::Confirm { client, numbers } => {
                let Some(mut share) = self.share(client)? else {
                    return Ok(Outcome::UnknownClient);
                };
                for number in numbers {
                    let key = key(client, *number);
                    let Some(bytes) = self.store.deliveries.size_of(&key)? else { continue };
                    // No key is ever written twice.
                    self.batch.remove_weak(&self.store.deliveries, key);
                    share.remove(bytes.into());
                    self.usage.boxes -= 1;
                    self.usage.bytes -= u64::from(bytes);
                }
                self.shares.insert(*client, Some(share));
                Ok(Outcome::Done)
            }
            Change::Register { client, token } => {
                self.batch.insert(&self.store.clients, client, &token.as_bytes()[..]);
                self.shares.insert(*client, Some(Share::default()));
                Ok(Outcome::Done)
            }
            Change::LogIn { .. } => Ok(Outcome::Done),
        }
    }
}

impl Store for FjallStore {
    fn apply(&self, changes: &[Change], now: UnixTime) -> Result<Vec<Outcome>, StoreError> {
        self.try_apply(changes, now).map_err(failed)
    }

    fn deliveries(
        &self,
        client: &ClientId,
        after: u64,
        max: usize,
    ) -> Result<Vec<KeptBox>, StoreError> {
        let range = key(client, after + 1)..=key(client, u64::MAX);
        let read = self.deliveries.range(range).take(max).map(|entry| {
            let (key, sealed) = entry.into_inner()?;
            let number = key.last_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
            Ok(KeptBox { number, sealed: sealed.to_vec() })
        });
        read.collect::<fjall::Result<_>>().map_err(failed)
    }

    fn token_hash(&self, client: &ClientId) -> Result<Option<TokenHash>, StoreError> {
        let stored = self.clients.get(client).map_err(failed)?;
        let hash = stored.as_ref().and_then(|stored| stored.first_chunk().copied());
        Ok(hash.map(TokenHash::from_bytes))
    }

    fn expire(&self, _: UnixTime) -> Result<Expired, StoreError> {
        Ok(Expired { boxes: 0, is_done: true })
    }

    fn usage(&self) -> Usage {
        *self.lock_usage()
    }
}

fn failed(error: fjall::Error) -> StoreError {
    StoreError::Failed { path: "fjall".into(), source: Box::new(error) }
}
