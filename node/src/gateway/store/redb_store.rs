//! The store of a single gateway: one file, nothing to set up.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::topology::UnixTime;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, Table, TableDefinition,
    WriteTransaction,
};

use super::registrations::{CLIENTS, Registrations};
use super::shares::{Share, judge, oldest_number};
use super::{Change, ClientId, Day, Expired, Limits, Outcome, Store, StoreError, Usage};

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "store.redb";

/// Name of the file of gateways that kept nothing but registrations. Their table is the same, so
/// that this file becomes the store.
const OLD_FILE_NAME: &str = "registrations.redb";

/// Memory for pages of the file.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// Boxes that may expire in one transaction, and clients that are looked at for it: some 20 ms.
const EXPIRE_MESSAGES: usize = 1024;
const EXPIRE_CLIENTS: usize = 4096;

/// How long nobody tries to open a file again that could not be opened.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// By client and number: the box.
const DELIVERIES: TableDefinition<'static, (ClientId, u64), &[u8]> =
    TableDefinition::new("deliveries");
/// By client: the highest number that was used, boxes, and their bytes. It stays when nothing is
/// kept any more, so that no number is used again.
const SHARES: TableDefinition<'static, ClientId, (u64, u64, u64)> = TableDefinition::new("shares");

/// A [`Store`] in a file of the data directory.
#[derive(Debug)]
pub struct RedbStore {
    path: PathBuf,
    limits: Limits,
    /// `None` when it failed and could not be opened again yet.
    database: RwLock<Option<Database>>,
    /// Held while a batch is applied.
    writer: Mutex<Writer>,
    usage: Mutex<Usage>,
}

/// What whoever writes knows besides.
#[derive(Debug, Default)]
struct Writer {
    made_room_on: Option<Day>,
    /// Up to which client it was looked for expired boxes.
    expired_to: Option<ClientId>,
    reopened: Option<Instant>,
}

impl RedbStore {
    /// Opens the file of a data directory, or creates it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(data_dir: &Path, limits: Limits) -> Result<Self, StoreError> {
        let path = data_dir.join(FILE_NAME);
        if let Err(error) = adopt_old_file(data_dir, &path) {
            return Err(StoreError::Failed { path, source: Box::new(error) });
        }
        let (database, usage) = open(&path)?;
        let (database, usage) = (RwLock::new(Some(database)), Mutex::new(usage));
        Ok(Self { path, limits, database, writer: Mutex::default(), usage })
    }

    /// Does something with the open file.
    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database = database.as_ref().ok_or_else(|| StoreError::Closed(self.path.clone()))?;
        work(database).map_err(|error| failed(&self.path, error))
    }

    /// As [`Self::with`], for a transaction that writes. After a failure the file is opened anew,
    /// in the state of the last good transaction: it answers nothing any more after an error of the
    /// disk.
    fn with_writer<T>(
        &self,
        work: impl FnOnce(&Database, &mut Writer) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = self.database.read().unwrap_or_else(PoisonError::into_inner).is_some();
        if !is_open {
            self.reopen(&mut writer)?;
        }
        let result = self.with(|database| work(database, &mut writer));
        if result.is_err() {
            writer.made_room_on = None;
            // The next one tries again; what matters is why this one failed.
            let _ = self.reopen(&mut writer);
        }
        result
    }

    fn reopen(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        let was_open = database.take().is_some();
        let is_early = writer.reopened.is_some_and(|last| last.elapsed() < REOPEN_INTERVAL);
        if !was_open && is_early {
            return Err(StoreError::Closed(self.path.clone()));
        }
        writer.reopened = Some(Instant::now());
        let (opened, usage) = open(&self.path)?;
        *self.lock_usage() = usage;
        *database = Some(opened);
        Ok(())
    }

    /// The day on which a client was last there, and whether it has logged in.
    #[cfg(test)]
    pub(in super::super) fn last_login(&self, client: &ClientId) -> (Day, bool) {
        let entry = self.with(|database| {
            let table = database.begin_read()?.open_table(CLIENTS)?;
            Ok(table.get(client)?.map(|entry| entry.value()))
        });
        let (_, day, has_logged_in) = entry.unwrap().unwrap();
        (day, has_logged_in)
    }

    fn lock_usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_apply(
        &self,
        database: &Database,
        writer: &mut Writer,
        changes: &[Change],
        now: UnixTime,
    ) -> Result<Vec<Outcome>, redb::Error> {
        let transaction = begin(database)?;
        let mut batch = Batch::open(&transaction, &self.limits, self.usage(), writer, now)?;
        let mut outcomes = Vec::with_capacity(changes.len());
        for change in changes {
            outcomes.push(batch.apply(change)?);
        }
        let Finished { usage, is_changed, made_room_on } = batch.finish()?;
        if is_changed {
            transaction.commit()?;
        } else {
            transaction.abort()?;
        }
        writer.made_room_on = made_room_on;
        *self.lock_usage() = usage;
        Ok(outcomes)
    }

    fn try_expire(
        &self,
        database: &Database,
        writer: &mut Writer,
        now: UnixTime,
    ) -> Result<Expired, redb::Error> {
        let transaction = begin(database)?;
        let mut batch = Batch::open(&transaction, &self.limits, self.usage(), writer, now)?;
        let (expired, expired_to) = batch.expire(writer.expired_to)?;
        let Finished { usage, is_changed, .. } = batch.finish()?;
        if is_changed {
            transaction.commit()?;
        } else {
            transaction.abort()?;
        }
        writer.expired_to = expired_to;
        *self.lock_usage() = usage;
        Ok(expired)
    }
}

impl Store for RedbStore {
    fn apply(&self, changes: &[Change], now: UnixTime) -> Result<Vec<Outcome>, StoreError> {
        self.with_writer(|database, writer| self.try_apply(database, writer, changes, now))
    }

    fn deliveries(
        &self,
        client: &ClientId,
        after: u64,
        max: usize,
    ) -> Result<Vec<KeptBox>, StoreError> {
        let Some(first) = after.checked_add(1) else { return Ok(Vec::new()) };
        self.with(|database| {
            let table = database.begin_read()?.open_table(DELIVERIES)?;
            let range = table.range((*client, first)..=(*client, u64::MAX))?;
            let mut found = Vec::new();
            for entry in range.take(max) {
                let (key, sealed) = entry?;
                found.push(KeptBox { number: key.value().1, sealed: sealed.value().to_vec() });
            }
            Ok(found)
        })
    }

    fn token_hash(&self, client: &ClientId) -> Result<Option<TokenHash>, StoreError> {
        self.with(|database| {
            let table = database.begin_read()?.open_table(CLIENTS)?;
            let entry = table.get(client)?.map(|entry| entry.value());
            Ok(entry.map(|(hash, ..)| TokenHash::from_bytes(hash)))
        })
    }

    fn expire(&self, now: UnixTime) -> Result<Expired, StoreError> {
        self.with_writer(|database, writer| self.try_expire(database, writer, now))
    }

    fn usage(&self) -> Usage {
        *self.lock_usage()
    }
}

/// One transaction that changes things.
struct Batch<'txn> {
    limits: &'txn Limits,
    now: UnixTime,
    registrations: Registrations<'txn>,
    deliveries: Table<'txn, (ClientId, u64), &'static [u8]>,
    share_table: Table<'txn, ClientId, (u64, u64, u64)>,
    /// Shares that were read; `None` for those who are not registered.
    shares: BTreeMap<ClientId, Option<Share>>,
    usage: Usage,
    is_changed: bool,
}

struct Finished {
    usage: Usage,
    is_changed: bool,
    made_room_on: Option<Day>,
}

impl<'txn> Batch<'txn> {
    fn open(
        transaction: &'txn WriteTransaction,
        limits: &'txn Limits,
        usage: Usage,
        writer: &Writer,
        now: UnixTime,
    ) -> Result<Self, redb::Error> {
        let (max, made_room_on) = (limits.registrations, writer.made_room_on);
        let table = transaction.open_table(CLIENTS)?;
        Ok(Self {
            limits,
            now,
            registrations: Registrations { table, max, made_room_on },
            deliveries: transaction.open_table(DELIVERIES)?,
            share_table: transaction.open_table(SHARES)?,
            shares: BTreeMap::new(),
            usage,
            is_changed: false,
        })
    }

    fn apply(&mut self, change: &Change) -> Result<Outcome, redb::Error> {
        match change {
            Change::Keep { client, sealed } => self.keep(client, sealed),
            Change::Confirm { client, numbers } => self.confirm(client, numbers),
            Change::Register { client, token } => {
                let (outcome, gone) = self.registrations.register(client, token, self.today())?;
                self.is_changed |= outcome == Outcome::Done || !gone.is_empty();
                // Somebody who was refused before in this batch may be known now.
                self.shares.retain(|_, share| share.is_some());
                gone.iter().try_for_each(|client| self.forget(client))?;
                Ok(outcome)
            }
            Change::LogIn { client } => {
                self.is_changed = true;
                self.registrations.log_in(client, self.today())?;
                Ok(Outcome::Done)
            }
        }
    }

    fn today(&self) -> Day {
        const SECONDS_OF_A_DAY: u64 = 24 * 60 * 60;
        Day::try_from(self.now.0 / SECONDS_OF_A_DAY).unwrap_or(Day::MAX)
    }

    fn keep(&mut self, client: &ClientId, sealed: &[u8]) -> Result<Outcome, redb::Error> {
        let Some(mut share) = self.share(client)? else { return Ok(Outcome::UnknownClient) };
        let bytes = sealed.len() as u64;
        if let Err(refused) = judge(self.limits, &share, &self.usage, bytes) {
            return Ok(refused);
        }
        let number = share.add(bytes, self.now);
        self.deliveries.insert((*client, number), sealed)?;
        self.usage.boxes += 1;
        self.usage.bytes += bytes;
        self.shares.insert(*client, Some(share));
        self.is_changed = true;
        Ok(Outcome::Done)
    }

    fn confirm(&mut self, client: &ClientId, numbers: &[u64]) -> Result<Outcome, redb::Error> {
        let Some(mut share) = self.share(client)? else { return Ok(Outcome::UnknownClient) };
        for number in numbers {
            let removed = self.deliveries.remove((*client, *number))?;
            let Some(bytes) = removed.map(|sealed| sealed.value().len() as u64) else { continue };
            self.remove(&mut share, bytes);
        }
        self.shares.insert(*client, Some(share));
        Ok(Outcome::Done)
    }

    fn remove(&mut self, share: &mut Share, bytes: u64) {
        share.remove(bytes);
        self.usage.boxes = self.usage.boxes.saturating_sub(1);
        self.usage.bytes = self.usage.bytes.saturating_sub(bytes);
        self.is_changed = true;
    }

    /// What is kept for a client, if it is registered.
    fn share(&mut self, client: &ClientId) -> Result<Option<Share>, redb::Error> {
        if let Some(share) = self.shares.get(client) {
            return Ok(*share);
        }
        let share = match self.registrations.has(client)? {
            true => Some(self.stored_share(client)?),
            false => None,
        };
        self.shares.insert(*client, share);
        Ok(share)
    }

    fn stored_share(&self, client: &ClientId) -> Result<Share, redb::Error> {
        let stored = self.share_table.get(client)?.map(|entry| entry.value());
        let (last_number, boxes, bytes) = stored.unwrap_or_default();
        Ok(Share { last_number, boxes, bytes })
    }

    /// Lets go of all that is kept for a client whose registration went.
    fn forget(&mut self, client: &ClientId) -> Result<(), redb::Error> {
        let mut share = match self.shares.remove(client).flatten() {
            Some(share) => share,
            None => self.stored_share(client)?,
        };
        if share.boxes > 0 {
            for bytes in self.extract(client, u64::MAX, usize::MAX)? {
                self.remove(&mut share, bytes);
            }
        }
        self.share_table.remove(client)?;
        Ok(())
    }

    /// Removes up to `max` deliveries of a client below a number; returns how long they were.
    fn extract(
        &mut self,
        client: &ClientId,
        below: u64,
        max: usize,
    ) -> Result<Vec<u64>, redb::Error> {
        let range = (*client, 0)..(*client, below);
        let removed = self.deliveries.extract_from_if(range, |_, _| true)?;
        removed.take(max).map(|entry| Ok(entry?.1.value().len() as u64)).collect()
    }

    /// Lets go of boxes that have expired, from the client after `from` on. Returns also up to which
    /// client it got, if there are more.
    fn expire(
        &mut self,
        from: Option<ClientId>,
    ) -> Result<(Expired, Option<ClientId>), redb::Error> {
        let oldest = oldest_number(self.now, self.limits.expiry);
        let from = from.unwrap_or_default();
        let candidates: Vec<_> = self
            .share_table
            .range(from..)?
            .take(EXPIRE_CLIENTS)
            .map(|entry| entry.map(|(client, share)| (client.value(), share.value())))
            .collect::<Result<_, _>>()?;
        let is_last = candidates.len() < EXPIRE_CLIENTS;
        let mut expired = Expired::default();
        let mut left = EXPIRE_MESSAGES;
        let mut reached = from;
        for (client, (last_number, boxes, bytes)) in candidates {
            reached = client;
            if boxes == 0 {
                continue;
            }
            let mut share = Share { last_number, boxes, bytes };
            let removed = self.extract(&client, oldest, left)?;
            if removed.is_empty() {
                continue;
            }
            left -= removed.len();
            expired.boxes += removed.len() as u64;
            removed.into_iter().for_each(|bytes| self.remove(&mut share, bytes));
            self.shares.insert(client, Some(share));
            if left == 0 {
                return Ok((expired, Some(reached)));
            }
        }
        expired.is_done = is_last;
        Ok((expired, (!is_last).then_some(reached)))
    }

    /// Writes down the shares that have changed.
    fn finish(mut self) -> Result<Finished, redb::Error> {
        if self.is_changed {
            for (client, share) in &self.shares {
                let Some(Share { last_number, boxes, bytes }) = share else { continue };
                self.share_table.insert(client, (*last_number, *boxes, *bytes))?;
            }
        }
        let made_room_on = self.registrations.made_room_on;
        Ok(Finished { usage: self.usage, is_changed: self.is_changed, made_room_on })
    }
}

/// A transaction that is durable when it has been committed, and after which the file can be opened
/// at once, however large it is and whatever happened.
fn begin(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_quick_repair(true);
    Ok(transaction)
}

/// Opens the file, and adds up what is in it.
fn open(path: &Path) -> Result<(Database, Usage), StoreError> {
    let created = Database::builder().set_cache_size(CACHE_BYTES).create(path);
    let database = match created {
        Ok(database) => database,
        Err(DatabaseError::DatabaseAlreadyOpen) => {
            return Err(StoreError::InUse(path.to_owned()));
        }
        Err(error) => return Err(failed(path, error.into())),
    };
    let usage = prepare(&database).map_err(|error| failed(path, error))?;
    Ok((database, usage))
}

/// Creates the tables, so that they are there for the first look-up.
fn prepare(database: &Database) -> Result<Usage, redb::Error> {
    let transaction = database.begin_read()?;
    let are_there = transaction.open_table(CLIENTS).is_ok()
        && transaction.open_table(DELIVERIES).is_ok()
        && transaction.open_table(SHARES).is_ok();
    drop(transaction);
    if !are_there {
        let transaction = begin(database)?;
        transaction.open_table(CLIENTS)?;
        transaction.open_table(DELIVERIES)?;
        transaction.open_table(SHARES)?;
        transaction.commit()?;
    }
    let mut usage = Usage::default();
    for entry in database.begin_read()?.open_table(SHARES)?.iter()? {
        let (_, boxes, bytes) = entry?.1.value();
        usage.boxes += boxes;
        usage.bytes += bytes;
    }
    Ok(usage)
}

/// Has the file of registrations alone become the store, unless there is one.
fn adopt_old_file(data_dir: &Path, path: &Path) -> io::Result<()> {
    let old = data_dir.join(OLD_FILE_NAME);
    if path.try_exists()? || !old.try_exists()? {
        return Ok(());
    }
    fs::rename(old, path)?;
    #[cfg(unix)]
    fs::File::open(data_dir)?.sync_all()?;
    Ok(())
}

fn failed(path: &Path, error: redb::Error) -> StoreError {
    StoreError::Failed { path: path.to_owned(), source: Box::new(error) }
}
