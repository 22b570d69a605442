//! Which tokens are good: a table of the SHA-256 of each client's token in one file.
//!
//! Beside it stands the day on which the client was last there, so that registrations which nobody
//! uses make room when the table is full. Whose registration went loses nothing but one
//! registration: its client makes another one by itself.

use std::collections::BTreeSet;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mixsocks_common::gateway::token::{TOKEN_LEN, TokenHash};
use mixsocks_common::keys::{Identity, KEY_LEN};
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table,
    TableDefinition,
};

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "registrations.redb";

/// Most clients that may be registered: some 100 MB on the disk. Whoever is registered may still
/// register again. For one more, those go that registered on an earlier day and never logged in,
/// and those that have been silent for [`SILENT_DAYS`]; if there are none, nobody new gets in. So
/// nobody can drive out clients that are in use, however much they register.
pub const MAX_REGISTRATIONS: u64 = 1_000_000;

/// Days without a login after which a client's registration may go: longer than most people are
/// away.
pub const SILENT_DAYS: u32 = 30;

/// Memory for pages of the file.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// By identity: the token's hash, the day (UTC, since 1970) of the last login, or of the
/// registration before the first one, and whether there has been a login. No finer time: the disk
/// should not know more than it must.
const CLIENTS: TableDefinition<'static, [u8; KEY_LEN], Entry> = TableDefinition::new("clients");
type Entry = ([u8; TOKEN_LEN], Day, bool);
type ClientTable<'a> = Table<'a, [u8; KEY_LEN], Entry>;

/// A day (UTC), counted from the first of 1970.
pub(super) type Day = u32;

/// Stands for no day.
const NEVER: Day = Day::MAX;

/// Why registrations cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum RegistrationsError {
    /// Another process has the file open.
    #[error("{0} is in use: does another gateway run on the same data directory?")]
    InUse(PathBuf),
    /// The file or its disk does not work.
    #[error("the registrations in {path}: {source}")]
    Store {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: Box<redb::Error>,
    },
}

/// The registrations of one gateway.
#[derive(Debug)]
pub(super) struct Registrations {
    path: PathBuf,
    database: Database,
    max: u64,
    /// Clients that have logged in since it was last written down; those that are registered, hence
    /// at most `max`.
    logged_in: Mutex<BTreeSet<[u8; KEY_LEN]>>,
    /// The day on which room was last made: on the same day there would be no more to find.
    made_room_on: AtomicU32,
}

/// Whether a registration was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Durably,
    /// [`MAX_REGISTRATIONS`] others are.
    Full,
}

impl Registrations {
    /// Opens the file, or creates it.
    pub(super) fn open(data_dir: &Path) -> Result<Self, RegistrationsError> {
        Self::open_with(data_dir, MAX_REGISTRATIONS)
    }

    fn open_with(data_dir: &Path, max: u64) -> Result<Self, RegistrationsError> {
        let path = data_dir.join(FILE_NAME);
        let created = Database::builder().set_cache_size(CACHE_BYTES).create(&path);
        let database = match created {
            Ok(database) => database,
            Err(DatabaseError::DatabaseAlreadyOpen) => {
                return Err(RegistrationsError::InUse(path));
            }
            Err(error) => {
                return Err(RegistrationsError::Store { path, source: Box::new(error.into()) });
            }
        };
        let registrations = Self {
            path,
            database,
            max,
            logged_in: Mutex::default(),
            made_room_on: AtomicU32::new(NEVER),
        };
        // So that the table is there for the first look-up.
        registrations.create_table().map_err(|error| registrations.error(error))?;
        Ok(registrations)
    }

    /// What is stored for a client. Blocks on the disk.
    pub(super) fn token_hash(
        &self,
        client: &Identity,
    ) -> Result<Option<TokenHash>, RegistrationsError> {
        let entry = self.read(client).map_err(|error| self.error(error))?;
        Ok(entry.map(|(hash, ..)| TokenHash::from_bytes(hash)))
    }

    /// The day on which a client was last there, and whether it has logged in.
    #[cfg(test)]
    pub(super) fn last_login(&self, client: &Identity) -> (Day, bool) {
        let (_, day, has_logged_in) = self.read(client).unwrap().unwrap();
        (day, has_logged_in)
    }

    /// Stores a client's token in place of an older one; it is on the disk when this returns.
    /// Blocks on the disk, once a day for as long as it takes to look at all registrations.
    pub(super) fn store(
        &self,
        client: &Identity,
        hash: &TokenHash,
        today: Day,
    ) -> Result<Stored, RegistrationsError> {
        self.write(client, hash, today).map_err(|error| self.error(error))
    }

    /// Takes down that a client has logged in; [`Self::save_logins`] writes it. Does not block, so
    /// that a login does not wait for the disk to write.
    pub(super) fn note_login(&self, client: Identity) {
        self.lock_logged_in().insert(*client.as_bytes());
    }

    /// Writes the day of the logins since the last time: all in one go, so that many logins cost
    /// the disk no more than one. Blocks on the disk.
    pub(super) fn save_logins(&self, today: Day) -> Result<(), RegistrationsError> {
        if self.lock_logged_in().is_empty() {
            return Ok(());
        }
        self.try_save_logins(today).map_err(|error| self.error(error))
    }

    fn lock_logged_in(&self) -> MutexGuard<'_, BTreeSet<[u8; KEY_LEN]>> {
        self.logged_in.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create_table(&self) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(CLIENTS)?;
        Ok(transaction.commit()?)
    }

    fn read(&self, client: &Identity) -> Result<Option<Entry>, redb::Error> {
        let table = self.database.begin_read()?.open_table(CLIENTS)?;
        Ok(table.get(*client.as_bytes())?.map(|entry| entry.value()))
    }

    fn write(
        &self,
        client: &Identity,
        hash: &TokenHash,
        today: Day,
    ) -> Result<Stored, redb::Error> {
        let transaction = self.database.begin_write()?;
        let stored = {
            let mut table = transaction.open_table(CLIENTS)?;
            let known = table.get(*client.as_bytes())?.map(|entry| entry.value());
            let (_, day, has_logged_in) = known.unwrap_or(([0; TOKEN_LEN], today, false));
            if known.is_none() && table.len()? >= self.max {
                self.make_room(&mut table, today)?;
            }
            if known.is_none() && table.len()? >= self.max {
                Stored::Full
            } else {
                table.insert(*client.as_bytes(), (*hash.as_bytes(), day, has_logged_in))?;
                Stored::Durably
            }
        };
        // Durable when it returns: the default of the store. Nothing is changed when it is full.
        transaction.commit()?;
        Ok(stored)
    }

    /// Lets go of what nobody uses, at most once a day, as it looks at every entry.
    fn make_room(&self, table: &mut ClientTable<'_>, today: Day) -> Result<(), redb::Error> {
        if self.made_room_on.swap(today, Ordering::Relaxed) == today {
            return Ok(());
        }
        // A client whose login has not been written yet is in use too.
        self.write_logins(table, today)?;
        Ok(table.retain(|_, (_, day, has_logged_in)| {
            today.saturating_sub(day) < if has_logged_in { SILENT_DAYS } else { 1 }
        })?)
    }

    fn try_save_logins(&self, today: Day) -> Result<(), redb::Error> {
        // Waits until nobody else writes.
        let transaction = self.database.begin_write()?;
        self.write_logins(&mut transaction.open_table(CLIENTS)?, today)?;
        Ok(transaction.commit()?)
    }

    fn write_logins(&self, table: &mut ClientTable<'_>, today: Day) -> Result<(), redb::Error> {
        for client in mem::take(&mut *self.lock_logged_in()) {
            let known = table.get(client)?.map(|entry| entry.value());
            if let Some((hash, ..)) = known {
                table.insert(client, (hash, today, true))?;
            }
        }
        Ok(())
    }

    fn error(&self, error: redb::Error) -> RegistrationsError {
        RegistrationsError::Store { path: self.path.clone(), source: Box::new(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mixsocks_common::gateway::token::Token;
    use mixsocks_common::keys::IdentityKey;

    const TODAY: Day = 20_000;

    fn pair() -> (Identity, TokenHash) {
        let mut rng = rand::rng();
        (IdentityKey::generate(&mut rng).identity(), Token::generate(&mut rng).hash())
    }

    /// Registers somebody, who also logs in if `logs_in` is set.
    fn register(registrations: &Registrations, day: Day, logs_in: bool) -> (Identity, Stored) {
        let (client, hash) = pair();
        let stored = registrations.store(&client, &hash, day).unwrap();
        if logs_in && stored == Stored::Durably {
            registrations.note_login(client);
            registrations.save_logins(day).unwrap();
        }
        (client, stored)
    }

    fn has(registrations: &Registrations, client: Identity) -> bool {
        registrations.token_hash(&client).unwrap().is_some()
    }

    #[test]
    fn registrations_survive_and_the_newest_counts() {
        let directory = tempfile::tempdir().unwrap();
        let ((client, first), (_, second)) = (pair(), pair());
        for hash in [first, second] {
            let registrations = Registrations::open(directory.path()).unwrap();
            assert_eq!(registrations.store(&client, &hash, TODAY).unwrap(), Stored::Durably);
        }
        let registrations = Registrations::open(directory.path()).unwrap();
        assert_eq!(registrations.token_hash(&client).unwrap(), Some(second));
        assert_eq!(registrations.token_hash(&pair().0).unwrap(), None);
    }

    #[test]
    fn a_full_table_takes_only_those_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let registrations = Registrations::open_with(directory.path(), 1).unwrap();
        let ((client, first), (other, second)) = (pair(), pair());
        assert_eq!(registrations.store(&client, &first, TODAY).unwrap(), Stored::Durably);
        assert_eq!(registrations.store(&other, &second, TODAY).unwrap(), Stored::Full);
        assert_eq!(registrations.token_hash(&other).unwrap(), None);
        assert_eq!(registrations.store(&client, &second, TODAY).unwrap(), Stored::Durably);
        assert_eq!(registrations.token_hash(&client).unwrap(), Some(second));
    }

    #[test]
    fn who_never_logged_in_makes_room_the_next_day() {
        let directory = tempfile::tempdir().unwrap();
        let registrations = Registrations::open_with(directory.path(), 2).unwrap();
        let (used, _) = register(&registrations, TODAY, true);
        let (unused, _) = register(&registrations, TODAY, false);
        assert_eq!(register(&registrations, TODAY, true).1, Stored::Full);
        let (next, stored) = register(&registrations, TODAY + 1, true);
        assert_eq!(stored, Stored::Durably);
        assert!(has(&registrations, used) && has(&registrations, next));
        assert!(!has(&registrations, unused));
    }

    #[test]
    fn clients_in_use_stay_whatever_anybody_registers() {
        let directory = tempfile::tempdir().unwrap();
        let ((client, hash), logged_in_on) = (pair(), TODAY + 5);
        {
            let registrations = Registrations::open_with(directory.path(), 2).unwrap();
            registrations.store(&client, &hash, TODAY).unwrap();
            registrations.note_login(client);
            registrations.save_logins(logged_in_on).unwrap();
            // A new token does not make a new client of it.
            registrations.store(&client, &pair().1, TODAY).unwrap();
        }
        // And the day of its login survives a restart.
        let registrations = Registrations::open_with(directory.path(), 2).unwrap();
        for day in TODAY..logged_in_on + SILENT_DAYS {
            for _ in 0..3 {
                register(&registrations, day, false);
            }
            assert!(has(&registrations, client));
        }
        let flood = (0..3).map(|_| register(&registrations, logged_in_on + SILENT_DAYS, true).1);
        assert_eq!(flood.collect::<Vec<_>>(), [Stored::Durably, Stored::Durably, Stored::Full]);
        assert!(!has(&registrations, client));
    }

    #[test]
    fn a_login_that_is_not_written_yet_counts() {
        let directory = tempfile::tempdir().unwrap();
        let registrations = Registrations::open_with(directory.path(), 1).unwrap();
        let (client, _) = register(&registrations, TODAY, false);
        registrations.note_login(client);
        assert_eq!(register(&registrations, TODAY + 1, true).1, Stored::Full);
        // Clocks may be set back.
        registrations.save_logins(TODAY - 1).unwrap();
        assert_eq!(register(&registrations, TODAY - 2, true).1, Stored::Full);
        assert!(has(&registrations, client));
        assert!(registrations.lock_logged_in().is_empty());
    }

    #[test]
    fn two_gateways_do_not_share_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Registrations::open(directory.path()).unwrap();
        let second = Registrations::open(directory.path());
        assert!(matches!(second, Err(RegistrationsError::InUse(_))));
    }
}
