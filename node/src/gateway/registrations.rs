//! Which tokens are good: a table of the SHA-256 of each client's token in one file.

use std::path::{Path, PathBuf};

use mixsocks_common::gateway::token::{TOKEN_LEN, TokenHash};
use mixsocks_common::keys::{Identity, KEY_LEN};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTableMetadata, TableDefinition};

/// Name of the file in the data directory.
pub const FILE_NAME: &str = "registrations.redb";

/// Most clients that may be registered: some 100 MB on the disk. Whoever is registered may still
/// register again.
pub const MAX_REGISTRATIONS: u64 = 1_000_000;

/// Memory for pages of the file.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

const TOKENS: TableDefinition<'static, [u8; KEY_LEN], [u8; TOKEN_LEN]> =
    TableDefinition::new("token-hashes");

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
        let registrations = Self { path, database, max };
        // So that the table is there for the first look-up.
        registrations.create_table().map_err(|error| registrations.error(error))?;
        Ok(registrations)
    }

    /// What is stored for a client. Blocks on the disk.
    pub(super) fn token_hash(
        &self,
        client: &Identity,
    ) -> Result<Option<TokenHash>, RegistrationsError> {
        self.read(client).map_err(|error| self.error(error))
    }

    /// Stores a client's token in place of an older one; it is on the disk when this returns.
    /// Blocks on the disk.
    pub(super) fn store(
        &self,
        client: &Identity,
        hash: &TokenHash,
    ) -> Result<Stored, RegistrationsError> {
        self.write(client, hash).map_err(|error| self.error(error))
    }

    fn create_table(&self) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(TOKENS)?;
        Ok(transaction.commit()?)
    }

    fn read(&self, client: &Identity) -> Result<Option<TokenHash>, redb::Error> {
        let table = self.database.begin_read()?.open_table(TOKENS)?;
        let hash = redb::ReadableTable::get(&table, *client.as_bytes())?;
        Ok(hash.map(|hash| TokenHash::from_bytes(hash.value())))
    }

    fn write(&self, client: &Identity, hash: &TokenHash) -> Result<Stored, redb::Error> {
        let transaction = self.database.begin_write()?;
        let stored = {
            let mut table = transaction.open_table(TOKENS)?;
            table.insert(*client.as_bytes(), *hash.as_bytes())?;
            if table.len()? > self.max { Stored::Full } else { Stored::Durably }
        };
        match stored {
            // Durable when it returns: the default of the store.
            Stored::Durably => transaction.commit()?,
            Stored::Full => transaction.abort()?,
        }
        Ok(stored)
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

    fn pair() -> (Identity, TokenHash) {
        let mut rng = rand::rng();
        (IdentityKey::generate(&mut rng).identity(), Token::generate(&mut rng).hash())
    }

    #[test]
    fn registrations_survive_and_the_newest_counts() {
        let directory = tempfile::tempdir().unwrap();
        let ((client, first), (_, second)) = (pair(), pair());
        for hash in [first, second] {
            let registrations = Registrations::open(directory.path()).unwrap();
            assert_eq!(registrations.store(&client, &hash).unwrap(), Stored::Durably);
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
        assert_eq!(registrations.store(&client, &first).unwrap(), Stored::Durably);
        assert_eq!(registrations.store(&other, &second).unwrap(), Stored::Full);
        assert_eq!(registrations.token_hash(&other).unwrap(), None);
        assert_eq!(registrations.store(&client, &second).unwrap(), Stored::Durably);
        assert_eq!(registrations.token_hash(&client).unwrap(), Some(second));
    }

    #[test]
    fn two_gateways_do_not_share_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Registrations::open(directory.path()).unwrap();
        let second = Registrations::open(directory.path());
        assert!(matches!(second, Err(RegistrationsError::InUse(_))));
    }
}
