//! What one transaction of the store does, and with which tables.

use std::collections::BTreeMap;

use mixsocks_common::topology::UnixTime;
use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};

use super::registrations::{CLIENTS, Registrations};
use super::shares::{Share, judge, last_number_of_hour, oldest_number};
use super::store_time::StoreTime;
use super::{Change, ClientId, Day, Expired, Limits, Outcome, Usage};

/// By client and number: the box.
pub(super) const DELIVERIES: TableDefinition<'static, (ClientId, u64), &[u8]> =
    TableDefinition::new("deliveries");
/// By client: the highest number that was used, boxes, and their bytes. It stays when nothing is
/// kept any more, so that no number is used again.
pub(super) const SHARES: TableDefinition<'static, ClientId, (u64, u64, u64)> =
    TableDefinition::new("shares");
/// What is remembered for all clients together, by name.
pub(super) const MARKS: TableDefinition<'static, &str, u64> = TableDefinition::new("marks");

/// Marks: the time of the store, and what the clock said then; in seconds since 1970.
const TIME: &str = "time";
const CLOCK: &str = "clock";
/// Mark: no client that was forgotten has had a higher number. It is the last one of its hour, so
/// that it tells nobody how much came for another.
const FORGOTTEN_NUMBER: &str = "forgotten number";

/// Boxes that may expire in one transaction, and clients that are looked at for it: some 20 ms.
const EXPIRE_MESSAGES: usize = 1024;
const EXPIRE_CLIENTS: usize = 4096;

/// The time that was written down last.
pub(super) fn read_time(database: &Database) -> Result<Option<StoreTime>, redb::Error> {
    let marks = database.begin_read()?.open_table(MARKS)?;
    let read = |name| Ok::<_, redb::Error>(marks.get(name)?.map(|mark| UnixTime(mark.value())));
    Ok(read(TIME)?.zip(read(CLOCK)?).map(|(now, clock)| StoreTime { now, clock }))
}

/// One transaction that changes things.
pub(super) struct Batch<'txn> {
    transaction: &'txn WriteTransaction,
    limits: &'txn Limits,
    now: UnixTime,
    registrations: Registrations<'txn>,
    deliveries: Table<'txn, (ClientId, u64), &'static [u8]>,
    share_table: Table<'txn, ClientId, (u64, u64, u64)>,
    /// Shares that were read; `None` for those who are not registered.
    shares: BTreeMap<ClientId, Option<Share>>,
    usage: Usage,
    saved_time: Option<StoreTime>,
    is_changed: bool,
}

/// What is so when a transaction is committed.
pub(super) struct Finished {
    pub(super) usage: Usage,
    /// Whether there is something to commit.
    pub(super) is_changed: bool,
    /// The time, if it was written down.
    pub(super) saved_time: Option<StoreTime>,
    pub(super) made_room_on: Option<Day>,
}

impl<'txn> Batch<'txn> {
    /// Opens the tables; `now` is the time of the store.
    pub(super) fn open(
        transaction: &'txn WriteTransaction,
        limits: &'txn Limits,
        usage: Usage,
        made_room_on: Option<Day>,
        now: UnixTime,
    ) -> Result<Self, redb::Error> {
        let max = limits.registrations;
        let table = transaction.open_table(CLIENTS)?;
        Ok(Self {
            transaction,
            limits,
            now,
            registrations: Registrations { table, max, made_room_on },
            deliveries: transaction.open_table(DELIVERIES)?,
            share_table: transaction.open_table(SHARES)?,
            shares: BTreeMap::new(),
            usage,
            saved_time: None,
            is_changed: false,
        })
    }

    pub(super) fn apply(&mut self, change: &Change) -> Result<Outcome, redb::Error> {
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

    /// The share of a client as it was before. Where there is none, its numbers begin above those
    /// of all who were forgotten: it may be one of these.
    fn stored_share(&self, client: &ClientId) -> Result<Share, redb::Error> {
        let stored = self.share_table.get(client)?.map(|entry| entry.value());
        Ok(match stored {
            Some((last_number, boxes, bytes)) => Share { last_number, boxes, bytes },
            None => Share { last_number: self.forgotten_number()?, ..Share::default() },
        })
    }

    fn forgotten_number(&self) -> Result<u64, redb::Error> {
        let marks = self.transaction.open_table(MARKS)?;
        let number = marks.get(FORGOTTEN_NUMBER)?.map_or(0, |number| number.value());
        Ok(number)
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
        if share.last_number > self.forgotten_number()? {
            let number = last_number_of_hour(share.last_number);
            self.transaction.open_table(MARKS)?.insert(FORGOTTEN_NUMBER, number)?;
        }
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
    pub(super) fn expire(
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

    /// Writes down the time.
    pub(super) fn save_time(&mut self, time: &StoreTime) -> Result<(), redb::Error> {
        let mut marks = self.transaction.open_table(MARKS)?;
        marks.insert(TIME, time.now.0)?;
        marks.insert(CLOCK, time.clock.0)?;
        self.saved_time = Some(*time);
        self.is_changed = true;
        Ok(())
    }

    /// Writes down the shares that have changed.
    pub(super) fn finish(mut self) -> Result<Finished, redb::Error> {
        if self.is_changed {
            for (client, share) in &self.shares {
                let Some(Share { last_number, boxes, bytes }) = share else { continue };
                self.share_table.insert(client, (*last_number, *boxes, *bytes))?;
            }
        }
        let made_room_on = self.registrations.made_room_on;
        let Self { usage, is_changed, saved_time, .. } = self;
        Ok(Finished { usage, is_changed, saved_time, made_room_on })
    }
}
