//! What a gateway keeps on its disk: registrations, and messages for clients that are away.
//!
//! The gateway's core knows the trait [`Store`] only: batches of [`Change`]s that are applied
//! together, durably and all or none, and a few look-ups. It never judges what may be kept: a store
//! does that in the same transaction that keeps it, so that several gateways could share one.
//!
//! - [`RedbStore`]: the store of a single gateway, one file.
//! - [`GroupCommit`]: collects what waits and has it applied in one go.
//! - `batch`: what one transaction does; `store_time`: by which time, as clocks may be wrong.
//! - `shares`: how much a client may keep, and the numbers of its deliveries.
//! - `registrations`: whose registration goes when the table is full.
//!
//! Packets of streams never come here. Nothing is logged or counted that tells a client from another.

mod batch;
mod failing;
mod group_commit;
mod redb_store;
mod registrations;
mod shares;
#[cfg(all(test, unix))]
mod small_disk;
mod statistics;
mod store_time;
#[cfg(test)]
mod tests;
#[cfg(all(test, unix))]
mod trouble_tests;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::keys::KEY_LEN;
use mixsocks_common::topology::UnixTime;

pub use self::group_commit::{Answer, Changes, GroupCommit, QUEUED_CHANGES};
pub use self::redb_store::{FILE_NAME, RedbStore};
pub use self::registrations::{MAX_REGISTRATIONS, SILENT_DAYS};
pub use self::shares::{Share, first_number, judge};
pub use self::statistics::{Statistics, StoreCounts};

/// The 32 bytes of a client's identity, as packets name it.
pub type ClientId = [u8; KEY_LEN];

/// A day (UTC), counted from the first of 1970.
pub type Day = u32;

/// How much a store keeps, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of boxes for one client.
    pub client_bytes: u64,
    /// Boxes for one client.
    pub client_boxes: u64,
    /// Bytes of boxes for all clients together.
    pub total_bytes: u64,
    /// What was not confirmed for that long is let go, in whole hours; at most [`MAX_EXPIRY`].
    pub expiry: Duration,
    /// Clients that may be registered.
    pub registrations: u64,
}

/// The longest time for which a box is kept: then the registration of a silent client may go too.
pub const MAX_EXPIRY: Duration = Duration::from_secs(SILENT_DAYS as u64 * 24 * 60 * 60);

impl Default for Limits {
    /// 64 MiB and 65,536 boxes for a client (three of the longest messages), 8 GiB for all, 7 days.
    fn default() -> Self {
        Self {
            client_bytes: 64 * 1024 * 1024,
            client_boxes: 65_536,
            total_bytes: 8 * 1024 * 1024 * 1024,
            expiry: Duration::from_secs(7 * 24 * 60 * 60),
            registrations: MAX_REGISTRATIONS,
        }
    }
}

/// One change of a batch.
#[derive(Clone, PartialEq, Eq)]
pub enum Change {
    /// Keep a box for a client, under its next number.
    Keep {
        /// For whom.
        client: ClientId,
        /// The box.
        sealed: Vec<u8>,
    },
    /// The client has taken these deliveries: let them go. Numbers that are not there do nothing.
    Confirm {
        /// Whose they are.
        client: ClientId,
        /// Their numbers.
        numbers: Vec<u64>,
    },
    /// Remember the hash of a client's token in place of an older one.
    Register {
        /// Whose token it is.
        client: ClientId,
        /// Its hash.
        token: TokenHash,
    },
    /// Remember that a client was there today.
    LogIn {
        /// Who.
        client: ClientId,
    },
}

impl Change {
    /// Whether it takes room on the disk; the others make some, or take next to none.
    pub fn needs_room(&self) -> bool {
        matches!(self, Self::Keep { .. })
    }
}

/// Shows no client.
impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep { .. } => "Keep(…)",
            Self::Confirm { .. } => "Confirm(…)",
            Self::Register { .. } => "Register(…)",
            Self::LogIn { .. } => "LogIn(…)",
        })
    }
}

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is on the disk, or there was nothing to do.
    Done,
    /// Refused: the client's share of the store is full.
    ClientFull,
    /// Refused: no such client is registered.
    UnknownClient,
    /// Refused: the store is full, or has as many registrations as it may.
    StoreFull,
}

/// How much is kept for all clients together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Boxes.
    pub boxes: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What one call of [`Store::expire`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    /// Boxes that were let go.
    pub boxes: u64,
    /// Whether all clients have been looked at: the next call begins anew.
    pub is_done: bool,
}

/// Why a store cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the file open.
    #[error("{0} is in use: does another gateway run on the same data directory?")]
    InUse(PathBuf),
    /// The file or its disk does not work.
    #[error("the store {path}: {source}")]
    Failed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It failed before and could not be opened again yet.
    #[error("the store {0} is closed since it failed; it is tried again every second")]
    Closed(PathBuf),
}

/// What a gateway keeps. All calls block on the disk, and may come from several threads.
///
/// Deliveries of a client have numbers that grow in the order in which they are kept, and none is
/// ever used again, also across restarts. The numbers of one client tell nothing of another's.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Applies changes in their order, and says for each what became of it. When it returns, those
    /// that are [`Outcome::Done`] survive the end of the process and of the machine. `now` is what the
    /// clock says, which may be wrong: a store does not let boxes go because of a clock that jumps.
    ///
    /// # Errors
    /// [`StoreError`]: then it is not known whether the changes were applied, but all of them were
    /// or none.
    fn apply(&self, changes: &[Change], now: UnixTime) -> Result<Vec<Outcome>, StoreError>;

    /// The first `max` deliveries of a client whose numbers are above `after`, in their order.
    ///
    /// # Errors
    /// [`StoreError`].
    fn deliveries(
        &self,
        client: &ClientId,
        after: u64,
        max: usize,
    ) -> Result<Vec<KeptBox>, StoreError>;

    /// What is stored of a client's token.
    ///
    /// # Errors
    /// [`StoreError`].
    fn token_hash(&self, client: &ClientId) -> Result<Option<TokenHash>, StoreError>;

    /// Lets go of boxes that are older than [`Limits::expiry`], at most some thousand at a time: to
    /// be called until it is done.
    ///
    /// # Errors
    /// [`StoreError`]; what was let go before stays so.
    fn expire(&self, now: UnixTime) -> Result<Expired, StoreError>;

    /// How much is kept.
    fn usage(&self) -> Usage;
}
