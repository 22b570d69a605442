//! The file that says which messages were received.
//!
//! | offset | bytes | field |
//! |--:|--:|---|
//! | 0 | 8 | `mixrecv3` |
//! | 8 | 4 | hour before which everything is refused |
//! | 12 | 4 | number r of later hours of which everything is refused, at most 800 |
//! | 16 | 4r | these |
//! | 16 + 4r | 20 each | hour in which a message was sent (4), its id (16) |
//!
//! Hours are counted since 1970; they and the number are u32 big-endian. Which further hours are refused as
//! there are too many entries follows from these in their order.
//!
//! An entry is written before the application gets its message, and survives the end of the process
//! then, but not of the machine: that is left to the system, as an fsync for each message would cost more
//! than all else. An entry that is cut short at the end of the file is no entry.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use mixsocks_common::message::fragment::{Hour, MESSAGE_ID_LEN, MessageId};
use mixsocks_common::message::{
    MAX_REFUSED_HOURS, MAX_REMEMBERED, TakenId, TakenIds, oldest_remembered,
};

const MAGIC: &[u8; 8] = b"mixrecv3";
/// Without the refused hours.
const HEADER_LEN: usize = MAGIC.len() + 8;
const ENTRY_LEN: usize = 4 + MESSAGE_ID_LEN;

/// Entries at which the file is written anew, with at most [`MAX_REMEMBERED`] that are not too old: 10 MB.
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
    /// Where the entries begin.
    header_len: usize,
    entries: usize,
}

impl ReceivedLog {
    /// Opens the log or makes it; with what it remembers.
    ///
    /// # Errors
    /// See [`ReceivedLogError`].
    pub fn open(path: &Path, now: Hour) -> Result<(Self, TakenIds), ReceivedLogError> {
        let io = |source| ReceivedLogError::Io { path: path.to_owned(), source };
        let bytes = match read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Cut short when it was made.
            Ok(bytes) if is_cut_short(&bytes) => None,
            bytes => Some(bytes.map_err(io)?),
        };
        let taken = match bytes {
            None => TakenIds::default(),
            Some(bytes) => {
                parse(&bytes, now).ok_or_else(|| ReceivedLogError::Foreign(path.to_owned()))?
            }
        };
        let file = replace(path, &taken).map_err(io)?;
        let (header_len, entries) = (header_len(&taken), taken.len());
        Ok((Self { path: path.to_owned(), file, header_len, entries }, taken))
    }

    /// Writes down that a message is received.
    ///
    /// # Errors
    /// When it is not; then it may be tried again.
    pub fn append(&mut self, id: TakenId, now: Hour) -> io::Result<()> {
        if self.entries >= MAX_LOGGED {
            let taken = parse(&read(&self.path)?, now)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            self.file = replace(&self.path, &taken)?;
            (self.header_len, self.entries) = (header_len(&taken), taken.len());
        }
        // What a try that failed has left is written over.
        let end = (self.header_len + self.entries * ENTRY_LEN) as u64;
        self.file.seek(SeekFrom::Start(end))?;
        self.file.write_all(&entry(id))?;
        self.entries += 1;
        Ok(())
    }
}

/// Whether nothing but a part of the header was written.
fn is_cut_short(bytes: &[u8]) -> bool {
    let magic = &bytes[..bytes.len().min(MAGIC.len())];
    bytes.len() < HEADER_LEN && MAGIC.starts_with(magic)
}

/// The whole file, but no more than a log may have.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let most = HEADER_LEN + 4 * MAX_REFUSED_HOURS + (MAX_LOGGED + 1) * ENTRY_LEN;
    let mut bytes = Vec::new();
    File::open(path)?.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn header_len(taken: &TakenIds) -> usize {
    HEADER_LEN + 4 * taken.refused_hours().len()
}

/// What a file remembers that is not too old; `None` if it is no log.
fn parse(bytes: &[u8], now: Hour) -> Option<TakenIds> {
    let (&refused_before, rest) = bytes.strip_prefix(MAGIC)?.split_first_chunk()?;
    let (&refused, rest) = rest.split_first_chunk()?;
    let refused = usize::try_from(u32::from_be_bytes(refused)).ok()?;
    if refused > MAX_REFUSED_HOURS {
        return None;
    }
    let (refused, entries) = rest.split_at_checked(4 * refused)?;
    let (refused, _) = refused.as_chunks::<4>();
    let refused = refused.iter().map(|hour| Hour(u32::from_be_bytes(*hour)));
    let mut taken = TakenIds::new(Hour(u32::from_be_bytes(refused_before)), refused);
    let (entries, _) = entries.as_chunks::<ENTRY_LEN>();
    for [a, b, c, d, id @ ..] in entries {
        let hour = Hour(u32::from_be_bytes([*a, *b, *c, *d]));
        taken.insert(TakenId { hour, id: MessageId(*id) });
    }
    taken.forget_before(oldest_remembered(now));
    Some(taken)
}

fn entry(id: TakenId) -> [u8; ENTRY_LEN] {
    let mut entry = [0; ENTRY_LEN];
    entry[..4].copy_from_slice(&id.hour.0.to_be_bytes());
    entry[4..].copy_from_slice(&id.id.0);
    entry
}

/// Replaces the file by one that remembers this, and opens it.
fn replace(path: &Path, taken: &TakenIds) -> io::Result<File> {
    let temporary = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&temporary)?;
    let mut bytes = Vec::with_capacity(header_len(taken) + taken.len() * ENTRY_LEN);
    bytes.extend(MAGIC);
    bytes.extend(taken.refused_before().0.to_be_bytes());
    let refused = taken.refused_hours();
    let count = u32::try_from(refused.len()).expect("refused hours are few");
    bytes.extend(count.to_be_bytes());
    bytes.extend(refused.flat_map(|hour| hour.0.to_be_bytes()));
    bytes.extend(taken.iter().flat_map(entry));
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Hour = Hour(500_000);

    fn id(number: usize) -> TakenId {
        let mut id = [0; MESSAGE_ID_LEN];
        id[..8].copy_from_slice(&number.to_be_bytes());
        TakenId { hour: NOW, id: MessageId(id) }
    }

    fn ids(taken: &TakenIds) -> Vec<TakenId> {
        taken.iter().collect()
    }

    #[test]
    fn ids_are_read_again_also_when_the_last_entry_was_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, known) = ReceivedLog::open(&path, NOW).unwrap();
        assert!(known.is_empty());
        for number in 0..3 {
            log.append(id(number), NOW).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(whole.len(), 16 + 3 * 20);
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut log, known) = ReceivedLog::open(&path, NOW).unwrap();
            let expected: Vec<_> = (0..cut.saturating_sub(16) / 20).map(id).collect();
            assert_eq!(ids(&known), expected);
            log.append(id(9), NOW).unwrap();
            drop(log);
            let (_, known) = ReceivedLog::open(&path, NOW).unwrap();
            assert_eq!(ids(&known), [expected, vec![id(9)]].concat());
        }
    }

    #[test]
    fn ids_are_forgotten_with_age_and_their_hours_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, _) = ReceivedLog::open(&path, NOW).unwrap();
        log.append(id(1), NOW).unwrap();
        let newer = TakenId { hour: NOW.next(), ..id(2) };
        log.append(newer, NOW).unwrap();
        let later = Hour(NOW.0 + 31 * 24 + 1);
        for time in [later, NOW] {
            let (_, known) = ReceivedLog::open(&path, time).unwrap();
            assert_eq!((ids(&known), known.refused_before()), (vec![newer], NOW.next()));
        }
    }

    /// Whoever fills the memory has one hour refused, before and after a restart.
    #[test]
    fn the_file_is_bounded_and_leads_to_the_same_refused_hours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (mut log, mut taken) = ReceivedLog::open(&path, NOW).unwrap();
        let old = TakenId { hour: Hour(NOW.0 - 1), ..id(0) };
        let mut append = |log: &mut ReceivedLog, id| {
            log.append(id, NOW).unwrap();
            taken.insert(id);
        };
        append(&mut log, old);
        for number in 1..=MAX_REMEMBERED {
            append(&mut log, id(number));
        }
        let reopened = |path: &Path| {
            let (_, known) = ReceivedLog::open(path, NOW).unwrap();
            assert_eq!(Vec::from_iter(known.refused_hours()), [NOW]);
            assert_eq!((ids(&known), known.refused_before()), (vec![old], Hour(0)));
            known
        };
        let copy = folder.path().join("copy");
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(reopened(&copy), taken);
        // Ids of the refused hour take room in the file until it is full, but are not remembered.
        for _ in MAX_REMEMBERED..MAX_LOGGED {
            log.append(id(1), NOW).unwrap();
        }
        assert_eq!((log.entries, log.header_len), (2, 20));
        drop(log);
        assert_eq!(reopened(&path), taken);
        let (_, known) = ReceivedLog::open(&path, Hour(NOW.0 + 31 * 24 + 1)).unwrap();
        assert_eq!((known.refused_hours().len(), known.refused_before()), (0, NOW.next()));
    }

    #[test]
    fn a_file_that_says_too_many_refused_hours_is_none() {
        let mut bytes = [&MAGIC[..], &[0; 4], &801_u32.to_be_bytes()].concat();
        bytes.resize(bytes.len() + 4 * 801, 0);
        assert_eq!(parse(&bytes, NOW), None);
        bytes[12..16].copy_from_slice(&800_u32.to_be_bytes());
        assert!(parse(&bytes, NOW).is_some());
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
