//! Which tokens are good: a table of the SHA-256 of each client's token.
//!
//! Beside it stands the day on which the client was last there, so that registrations which nobody
//! uses make room when the table is full. Whose registration went loses what was kept for it and one
//! registration: its client makes another one by itself.

use mixsocks_common::gateway::token::{TOKEN_LEN, TokenHash};
use redb::{ReadableTable, ReadableTableMetadata, Table, TableDefinition};

use super::{ClientId, Day, Outcome};

/// Most clients that may be registered: some 100 MB on the disk. Whoever is registered may still
/// register again. For one more, those go that registered on an earlier day and never logged in,
/// and those that have been silent for [`SILENT_DAYS`]; if there are none, nobody new gets in. So
/// nobody can drive out clients that are in use, however much they register.
pub const MAX_REGISTRATIONS: u64 = 1_000_000;

/// Days without a login after which a client's registration may go: longer than most people are
/// away.
pub const SILENT_DAYS: Day = 30;

/// By identity: the token's hash, the day (UTC, since 1970) of the last login, or of the
/// registration before the first one, and whether there has been a login. No finer time: the disk
/// should not know more than it must.
pub(super) const CLIENTS: TableDefinition<'static, ClientId, Entry> =
    TableDefinition::new("clients");
pub(super) type Entry = ([u8; TOKEN_LEN], Day, bool);

/// The registrations within one transaction.
pub(super) struct Registrations<'txn> {
    pub(super) table: Table<'txn, ClientId, Entry>,
    pub(super) max: u64,
    /// The day on which room was last made: on the same day there would be no more to find.
    pub(super) made_room_on: Option<Day>,
}

impl Registrations<'_> {
    pub(super) fn has(&self, client: &ClientId) -> Result<bool, redb::Error> {
        Ok(self.table.get(client)?.is_some())
    }

    /// Takes a token in place of an older one. Tells also whose registrations went for it: once a
    /// day it looks at all of them.
    pub(super) fn register(
        &mut self,
        client: &ClientId,
        token: &TokenHash,
        today: Day,
    ) -> Result<(Outcome, Vec<ClientId>), redb::Error> {
        let known = self.table.get(client)?.map(|entry| entry.value());
        let (_, day, has_logged_in) = known.unwrap_or(([0; TOKEN_LEN], today, false));
        let mut gone = Vec::new();
        if known.is_none() && self.table.len()? >= self.max {
            gone = self.make_room(today)?;
        }
        if known.is_none() && self.table.len()? >= self.max {
            return Ok((Outcome::StoreFull, gone));
        }
        self.table.insert(client, (*token.as_bytes(), day, has_logged_in))?;
        Ok((Outcome::Done, gone))
    }

    /// Takes down that a client was there today.
    pub(super) fn log_in(&mut self, client: &ClientId, today: Day) -> Result<(), redb::Error> {
        let known = self.table.get(client)?.map(|entry| entry.value());
        if let Some((hash, ..)) = known {
            self.table.insert(client, (hash, today, true))?;
        }
        Ok(())
    }

    /// Lets go of what nobody uses, at most once a day, as it looks at every entry.
    fn make_room(&mut self, today: Day) -> Result<Vec<ClientId>, redb::Error> {
        if self.made_room_on.replace(today) == Some(today) {
            return Ok(Vec::new());
        }
        let mut gone = Vec::new();
        self.table.retain(|client, (_, day, has_logged_in)| {
            let stays = today.saturating_sub(day) < if has_logged_in { SILENT_DAYS } else { 1 };
            if !stays {
                gone.push(client);
            }
            stays
        })?;
        Ok(gone)
    }
}
