//! The file that says which messages were received.
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 8 | `mixrecv1` |
//! | 8 | 24 each | id (16), seconds since 1970 u64 big-endian |
//!
//! An entry is written before the application gets its message, and survives the end of the process
//! then, but not of the machine: that is left to the system, as an fsync for each message would cost more
//! than all else. An entry that is cut short at the end of the file is no entry.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use mixsocks_common::message::fragment::{MESSAGE_ID_LEN, MessageId};
use mixsocks_common::message::{MAX_REMEMBERED, REMEMBERED_FOR};
use mixsocks_common::topology::UnixTime;

const MAGIC: &[u8; 8] = b"mixrecv1";
const ENTRY_LEN: usize = MESSAGE_ID_LEN + 8;

/// Entries at which the file is written anew, with the newest [`MAX_REMEMBERED`] that are not too old:
/// 13 MB.
pub const MAX_LOGGED: usize = 2 * MAX_REMEMBERED;

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReceivedLogError {
    /// It cannot be read or written.
    #[error("the log of received messages {path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It is something else.
    #[error(
        "{0} is not a log of received messages; move it away, and messages that wait at the gateway may come once more"
    )]
    Foreign(PathBuf),
}

/// The open log.
#[derive(Debug)]
pub struct ReceivedLog {
    path: PathBuf,
    file: File,
    entries: usize,
}

impl ReceivedLog {
    /// Opens the log or makes it; with the ids that are remembered, the oldest first.
    ///
    /// # Errors
    /// See [`ReceivedLogError`].
    pub fn open(path: &Path, now: UnixTime) -> Result<(Self, Vec<MessageId>), ReceivedLogError> {
        let io = |source| ReceivedLogError::Io { path: path.to_owned(), source };
        let bytes = match read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => MAGIC.to_vec(),
            // Cut short when it was made.
            Ok(bytes) if MAGIC.starts_with(&bytes) => MAGIC.to_vec(),
            bytes => bytes.map_err(io)?,
        };
        let entries =
            bytes.strip_prefix(MAGIC).ok_or_else(|| ReceivedLogError::Foreign(path.to_owned()))?;
        let kept = newest(entries, now);
        let ids = kept.iter().filter_map(|entry| entry.first_chunk()).copied().map(MessageId);
        let ids = ids.collect();
        let file = replace(path, &kept).map_err(io)?;
        Ok((Self { path: path.to_owned(), file, entries: kept.len() }, ids))
    }

    /// Writes down that a message is received.
    ///
    /// # Errors
    /// When it is not; then it may be tried again.
    pub fn append(&mut self, id: MessageId, now: UnixTime) -> io::Result<()> {
        if self.entries >= MAX_LOGGED {
            let bytes = read(&self.path)?;
            let kept = newest(bytes.get(MAGIC.len()..).unwrap_or_default(), now);
            self.file = replace(&self.path, &kept)?;
            self.entries = kept.len();
        }
        // What a try that failed has left is written over.
        let end = (MAGIC.len() + self.entries * ENTRY_LEN) as u64;
        self.file.seek(SeekFrom::Start(end))?;
        self.file.write_all(&[&id.0[..], &now.0.to_be_bytes()].concat())?;
        self.entries += 1;
        Ok(())
    }
}

/// The whole file, but no more than a log may have.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let most = MAGIC.len() + (MAX_LOGGED + 1) * ENTRY_LEN;
    let mut bytes = Vec::new();
    File::open(path)?.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The entries that are to be remembered.
fn newest(entries: &[u8], now: UnixTime) -> Vec<[u8; ENTRY_LEN]> {
    let (entries, _) = entries.as_chunks::<ENTRY_LEN>();
    let is_young = |entry: &&[u8; ENTRY_LEN]| {
        let seconds = entry.last_chunk().map_or(0, |seconds| u64::from_be_bytes(*seconds));
        seconds.saturating_add(REMEMBERED_FOR.as_secs()) > now.0
    };
    let from = entries.len().saturating_sub(MAX_REMEMBERED);
    entries[from..].iter().filter(is_young).copied().collect()
}

/// Replaces the file by one with these entries, and opens it.
fn replace(path: &Path, entries: &[[u8; ENTRY_LEN]]) -> io::Result<File> {
    let temporary = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&temporary)?;
    file.write_all(&[MAGIC, entries.as_flattened()].concat())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime(1_800_000_000);

    fn id(number: usize) -> MessageId {
        let mut id = [0; MESSAGE_ID_LEN];
        id[..8].copy_from_slice(&number.to_be_bytes());
        MessageId(id)
    }

    #[test]
    fn ids_are_read_again_also_when_the_last_entry_was_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, known) = ReceivedLog::open(&path, NOW).unwrap();
        assert_eq!(known, []);
        for number in 0..3 {
            log.append(id(number), NOW).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(whole.len(), 8 + 3 * 24);
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, known) = ReceivedLog::open(&path, NOW).unwrap();
            let expected: Vec<_> = (0..cut.saturating_sub(8) / 24).map(id).collect();
            assert_eq!(known, expected);
            log.append(id(9), NOW).unwrap();
            drop(log);
            let (_, known) = ReceivedLog::open(&path, NOW).unwrap();
            assert_eq!(known, [expected, vec![id(9)]].concat());
        }
    }

    #[test]
    fn ids_are_forgotten_with_age() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, _) = ReceivedLog::open(&path, NOW).unwrap();
        log.append(id(1), NOW).unwrap();
        log.append(id(2), UnixTime(NOW.0 + 1)).unwrap();
        let later = UnixTime(NOW.0 + REMEMBERED_FOR.as_secs());
        let (_, known) = ReceivedLog::open(&path, later).unwrap();
        assert_eq!(known, [id(2)]);
    }

    #[test]
    fn the_file_is_bounded_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, _) = ReceivedLog::open(&path, NOW).unwrap();
        for number in 0..=MAX_LOGGED {
            log.append(id(number), NOW).unwrap();
        }
        assert_eq!(log.entries, MAX_REMEMBERED + 1);
        let (_, known) = ReceivedLog::open(&path, NOW).unwrap();
        assert_eq!(known.len(), MAX_REMEMBERED);
        assert_eq!(known.last(), Some(&id(MAX_LOGGED)));
    }

    #[test]
    fn another_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "a diary of somebody").unwrap();
        assert!(matches!(ReceivedLog::open(&path, NOW), Err(ReceivedLogError::Foreign(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"a diary of somebody");
    }
}
