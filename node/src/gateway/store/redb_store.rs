//! The store of a single gateway: one file, nothing to set up.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::topology::UnixTime;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, WriteTransaction};
use tracing::warn;

use super::batch::{Batch, DELIVERIES, Finished, MARKS, SHARES, read_time};
use super::registrations::CLIENTS;
use super::shares::hour_of;
use super::store_time::{StoreTime, longest_step};
use super::{Change, ClientId, Day, Expired, Limits, Outcome, Store, StoreError, Usage};
use crate::reserve::Reserve;

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "store.redb";

/// Name of the file of gateways that kept nothing but registrations. Their table is the same, so
/// that this file becomes the store.
const OLD_FILE_NAME: &str = "registrations.redb";

/// Memory for pages of the file.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// How long nobody tries to open a file again that could not be opened.
const REOPEN_INTERVAL: Duration = Duration::from_secs(1);

/// A [`Store`] in a file of the data directory.
#[derive(Debug)]
pub struct RedbStore {
    path: PathBuf,
    limits: Limits,
    reserve: Reserve,
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
    /// `None` before the first look at the clock.
    time: Option<StoreTime>,
    /// The time as it was written down last.
    saved_time: Option<StoreTime>,
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
        let reserve = Reserve::of(data_dir);
        // The disk may be full, and opening writes too.
        reserve.give_up();
        let (database, usage) = open(&path)?;
        let (database, usage) = (RwLock::new(Some(database)), Mutex::new(usage));
        Ok(Self { path, limits, reserve, database, writer: Mutex::default(), usage })
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

    /// The right to write to the open file.
    fn lock_writer(&self) -> Result<MutexGuard<'_, Writer>, StoreError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let is_open = self.database.read().unwrap_or_else(PoisonError::into_inner).is_some();
        if !is_open {
            self.reopen(&mut writer)?;
        }
        Ok(writer)
    }

    /// As [`Self::with`], for a transaction that writes. After a failure the file is opened anew,
    /// in the state of the last good transaction: it answers nothing any more after an error of the
    /// disk.
    fn with_writer<T>(
        &self,
        writer: &mut Writer,
        work: impl FnOnce(&Database, &mut Writer) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let result = self.with(|database| work(database, writer));
        if result.is_err() {
            self.reserve.give_up();
            writer.made_room_on = None;
            // The next one tries again; what matters is why this one failed.
            let _ = self.reopen(writer);
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

    /// Does something in one transaction, in the store's own time.
    fn try_change<T>(
        &self,
        database: &Database,
        writer: &mut Writer,
        clock: UnixTime,
        work: impl FnOnce(&mut Batch<'_>) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let time = self.look_at_clock(database, writer, clock)?;
        let transaction = begin(database)?;
        let (usage, made_room_on) = (self.usage(), writer.made_room_on);
        let mut batch = Batch::open(&transaction, &self.limits, usage, made_room_on, time.now)?;
        let result = work(&mut batch)?;
        if time.is_due(writer.saved_time.as_ref()) {
            batch.save_time(&time)?;
        }
        let Finished { usage, is_changed, saved_time, made_room_on } = batch.finish()?;
        if is_changed {
            transaction.commit()?;
        } else {
            transaction.abort()?;
        }
        writer.saved_time = saved_time.or(writer.saved_time);
        writer.made_room_on = made_room_on;
        *self.lock_usage() = usage;
        Ok(result)
    }

    /// Goes on to what the clock says, as far as that counts.
    fn look_at_clock(
        &self,
        database: &Database,
        writer: &mut Writer,
        clock: UnixTime,
    ) -> Result<StoreTime, redb::Error> {
        if writer.time.is_none() {
            writer.saved_time = read_time(database)?;
        }
        let mut time = match writer.time.or(writer.saved_time) {
            Some(time) => time,
            None => StoreTime::begin(clock, newest_hour(database)?),
        };
        let step = longest_step(self.limits.expiry);
        let ignored = time.look(clock, step);
        if !ignored.is_zero() {
            let hours = |time: Duration| time.as_secs() / (60 * 60);
            warn!(
                "by the clock {} hours have passed since the gateway last looked at it; for kept \
                 messages no more than {} minutes count, so that none is lost if the clock is wrong: \
                 set it right if it is, and do nothing if the gateway was stopped for that long",
                hours(ignored + step),
                step.as_secs() / 60
            );
        }
        writer.time = Some(time);
        Ok(time)
    }
}

impl Store for RedbStore {
    fn apply(&self, changes: &[Change], now: UnixTime) -> Result<Vec<Outcome>, StoreError> {
        // Opening it may need the room that a reserve takes.
        let mut writer = self.lock_writer()?;
        if changes.iter().any(Change::needs_room) {
            self.reserve.make().map_err(|error| failed(self.reserve.path(), error.into()))?;
        }
        self.with_writer(&mut writer, |database, writer| {
            self.try_change(database, writer, now, |batch| {
                changes.iter().map(|change| batch.apply(change)).collect()
            })
        })
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
        let mut writer = self.lock_writer()?;
        self.with_writer(&mut writer, |database, writer| {
            let from = writer.expired_to;
            let (expired, expired_to) =
                self.try_change(database, writer, now, |batch| batch.expire(from))?;
            writer.expired_to = expired_to;
            Ok(expired)
        })
    }

    fn usage(&self) -> Usage {
        *self.lock_usage()
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
        && transaction.open_table(SHARES).is_ok()
        && transaction.open_table(MARKS).is_ok();
    drop(transaction);
    if !are_there {
        let transaction = begin(database)?;
        transaction.open_table(CLIENTS)?;
        transaction.open_table(DELIVERIES)?;
        transaction.open_table(SHARES)?;
        transaction.open_table(MARKS)?;
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

/// The hour of the newest number in a file of a gateway that wrote no time down.
fn newest_hour(database: &Database) -> Result<Option<UnixTime>, redb::Error> {
    let mut newest = None;
    for entry in database.begin_read()?.open_table(SHARES)?.iter()? {
        let (last_number, ..) = entry?.1.value();
        newest = newest.max((last_number > 0).then(|| hour_of(last_number)));
    }
    Ok(newest)
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
