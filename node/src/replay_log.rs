//! The replay tags of one key epoch on the disk, so that a restart forgets none.
//!
//! ```text
//! replay-<key epoch>.log
//!
//! offset  length
//!      0      14  "mixsocks tags\0"
//!     14       2  version of this format: 1
//!     16       8  key epoch
//!     24     8 n  the first 8 bytes of each tag
//! ```
//!
//! Numbers are big-endian. Tags are written before their packets go on, so whatever kills the
//! process, none of these packets goes on a second time. What the system has taken it keeps even if
//! the process dies; a power failure may take what was written since the last `fdatasync`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::keys::{numbered_files, sync_dir};
use crate::reserve::Reserve;

const MAGIC: &[u8; 14] = b"mixsocks tags\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 24;
/// Bytes of a tag that are kept.
const PREFIX_LEN: usize = 8;
/// Prefixes that are read at a time: 64 KiB.
const READ_PREFIXES: usize = 8 * 1024;

/// Why the replay tags on the disk cannot be used. A node without them would take packets twice, so
/// it does not start.
#[derive(Debug, thiserror::Error)]
pub enum ReplayLogError {
    /// The file begins with something else than such a file does.
    #[error(
        "{log} is damaged, so that packets that were here before would not be known again: restore \
         it from a backup that is no older than the last packet, or delete it together with {key}, \
         to have a new key made, under which packets arrive once the topology has it",
        log = .log.display(), key = .key.display()
    )]
    Damaged {
        /// The log.
        log: PathBuf,
        /// The key whose tags are in it.
        key: PathBuf,
    },
    /// A newer mixsocks made the file.
    #[error(
        "{path} has version {version} of its format, and this mixsocks knows version {VERSION}: use \
         the newer mixsocks that wrote it",
        path = .path.display()
    )]
    UnknownVersion {
        /// The log.
        path: PathBuf,
        /// Its version.
        version: u16,
    },
    /// The file or its directory does not work.
    #[error(
        "cannot use {path}: {source}; its owner must be able to write there, and the disk must have \
         room",
        path = .path.display()
    )]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
}

/// An append-only file of tags.
#[derive(Debug)]
pub(crate) struct ReplayLog {
    file: Arc<File>,
    /// A gateway's: given up before a packet is dropped.
    reserve: Reserve,
    /// Bytes that are known to be right: the header and whole prefixes.
    len: u64,
    /// A write failed, so that there may be more bytes than that.
    is_torn: bool,
    /// Something was written since the last sync.
    is_dirty: bool,
    /// Reused by each write.
    buffer: Vec<u8>,
}

impl ReplayLog {
    /// Opens the log of a key epoch, or creates it, and hands the tags that it holds to `each`. A
    /// last tag that was not written to its end is cut off: its packet did not go on. On a full disk
    /// a gateway's reserve makes room.
    ///
    /// Reads 8 bytes per tag, so at most 512 MiB. `key` is the key's file, for messages.
    pub(crate) fn open(
        dir: &Path,
        key_epoch: u64,
        key: PathBuf,
        each: impl FnMut(u64),
    ) -> Result<Self, ReplayLogError> {
        let path = path(dir, key_epoch);
        let failed = |source| ReplayLogError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let reserve = Reserve::of(dir);
        let mut file = reserve.give_up_for(|| options.open(&path)).map_err(failed)?;
        let header = header(key_epoch);
        let len = match check_header(&mut file, &header).map_err(failed)? {
            Header::Right => read_prefixes(&mut file, each).map_err(failed)?,
            Header::Unfinished => {
                reserve.give_up_for(|| begin(&mut file, &header, dir)).map_err(failed)?;
                HEADER_LEN as u64
            }
            Header::Version(version) => {
                return Err(ReplayLogError::UnknownVersion { path, version });
            }
            Header::Damaged => return Err(ReplayLogError::Damaged { log: path, key }),
        };
        file.set_len(len).map_err(failed)?;
        Ok(Self::on(file, len, reserve))
    }

    fn on(file: File, len: u64, reserve: Reserve) -> Self {
        let (file, buffer) = (Arc::new(file), Vec::new());
        Self { file, reserve, len, is_torn: false, is_dirty: false, buffer }
    }

    /// A log on a disk that is full.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn on_a_full_disk() -> Self {
        let file = OpenOptions::new().append(true).open("/dev/full").unwrap();
        Self::on(file, HEADER_LEN as u64, Reserve::of(Path::new("/dev")))
    }

    /// Writes tags with a single call to the system, and on a full disk with another one that has the
    /// room of a gateway's reserve. After an error none of them counts as written.
    pub(crate) fn append(&mut self, prefixes: &[u64]) -> io::Result<()> {
        if prefixes.is_empty() {
            return Ok(());
        }
        self.buffer.clear();
        self.buffer.extend(prefixes.iter().flat_map(|prefix| prefix.to_be_bytes()));
        let Self { file, reserve, len, is_torn, buffer, .. } = self;
        reserve.give_up_for(|| {
            if *is_torn {
                // What lies behind would shift the tags that follow.
                file.set_len(*len)?;
            }
            *is_torn = true;
            (&**file).write_all(buffer)
        })?;
        self.is_torn = false;
        self.is_dirty = true;
        self.len += self.buffer.len() as u64;
        Ok(())
    }

    /// What brings to the disk what was written since the last call; `None` when that is nothing.
    pub(crate) fn take_unsynced(&mut self) -> Option<SyncHandle> {
        std::mem::take(&mut self.is_dirty).then(|| SyncHandle(self.file.clone()))
    }
}

/// A log to be synced, without its lock.
pub(crate) struct SyncHandle(Arc<File>);

impl SyncHandle {
    /// Returns when a power failure takes nothing any more. Blocks on the disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Removes the logs of all key epochs before `oldest`.
pub(crate) fn remove_before(dir: &Path, oldest: u64) -> Result<(), ReplayLogError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ReplayLogError::Io { path, source }
    };
    for key_epoch in numbered_files(dir, "replay-", ".log").map_err(failed(dir))? {
        if key_epoch < oldest {
            let path = path(dir, key_epoch);
            fs::remove_file(&path).map_err(failed(&path))?;
        }
    }
    Ok(())
}

fn path(dir: &Path, key_epoch: u64) -> PathBuf {
    dir.join(format!("replay-{key_epoch}.log"))
}

fn header(key_epoch: u64) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..14].copy_from_slice(MAGIC);
    header[14..16].copy_from_slice(&VERSION.to_be_bytes());
    header[16..].copy_from_slice(&key_epoch.to_be_bytes());
    header
}

enum Header {
    Right,
    /// The beginning of one, or nothing: tags follow only when all of it is on the disk.
    Unfinished,
    Version(u16),
    Damaged,
}

fn check_header(file: &mut File, right: &[u8; HEADER_LEN]) -> io::Result<Header> {
    let mut found = Vec::with_capacity(HEADER_LEN);
    Read::by_ref(file).take(HEADER_LEN as u64).read_to_end(&mut found)?;
    Ok(match found[..] {
        ref found if found == right => Header::Right,
        ref found if right.starts_with(found) => Header::Unfinished,
        [ref magic @ .., a, b, _, _, _, _, _, _, _, _]
            if magic == MAGIC && [a, b] != VERSION.to_be_bytes() =>
        {
            Header::Version(u16::from_be_bytes([a, b]))
        }
        _ => Header::Damaged,
    })
}

/// Writes the header and makes sure that it is there to stay.
fn begin(file: &mut File, header: &[u8; HEADER_LEN], dir: &Path) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all(header)?;
    file.sync_all()?;
    sync_dir(dir)
}

/// Reads all whole prefixes behind the header; returns where the last one ends.
fn read_prefixes(file: &mut File, mut each: impl FnMut(u64)) -> io::Result<u64> {
    let mut buffer = vec![0; READ_PREFIXES * PREFIX_LEN];
    let (mut end, mut filled) = (HEADER_LEN, 0);
    loop {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => return Ok(end as u64),
            Ok(read) => filled += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        let (prefixes, rest) = buffer[..filled].as_chunks();
        prefixes.iter().for_each(|prefix| each(u64::from_be_bytes(*prefix)));
        end += size_of_val(prefixes);
        let whole = filled - rest.len();
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY_EPOCH: u64 = 7;

    fn open(dir: &Path) -> Result<(ReplayLog, Vec<u64>), ReplayLogError> {
        let mut prefixes = Vec::new();
        let key = dir.join("the.key");
        let log = ReplayLog::open(dir, KEY_EPOCH, key, |prefix| prefixes.push(prefix))?;
        Ok((log, prefixes))
    }

    #[test]
    fn tags_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, prefixes) = open(dir.path()).unwrap();
        assert!(prefixes.is_empty());
        // More than is read at a time.
        let many: Vec<u64> = (0..3 * READ_PREFIXES as u64 + 5).collect();
        log.append(&many).unwrap();
        log.append(&[]).unwrap();
        log.append(&[u64::MAX, 0]).unwrap();
        let all = [&many[..], &[u64::MAX, 0]].concat();
        // The file is still open, as it is in a process that is killed.
        assert_eq!(open(dir.path()).unwrap().1, all);
        let len = fs::metadata(path(dir.path(), KEY_EPOCH)).unwrap().len();
        assert_eq!(len, (HEADER_LEN + PREFIX_LEN * all.len()) as u64);
    }

    #[test]
    fn a_torn_end_is_cut_off_wherever_it_is() {
        for torn in 1..PREFIX_LEN {
            let dir = tempfile::tempdir().unwrap();
            let (mut log, _) = open(dir.path()).unwrap();
            log.append(&[1, 2]).unwrap();
            (&*log.file).write_all(&[3; PREFIX_LEN][..torn]).unwrap();
            let (mut log, prefixes) = open(dir.path()).unwrap();
            assert_eq!(prefixes, [1, 2]);
            log.append(&[4]).unwrap();
            assert_eq!(open(dir.path()).unwrap().1, [1, 2, 4]);
        }
    }

    #[test]
    fn a_failed_write_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path()).unwrap();
        log.append(&[1]).unwrap();
        // As if the disk had become full within a tag, and had room again.
        (&*log.file).write_all(&[9; 11]).unwrap();
        log.is_torn = true;
        log.append(&[2]).unwrap();
        assert_eq!(open(dir.path()).unwrap().1, [1, 2]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_each_time() {
        let mut log = ReplayLog::on_a_full_disk();
        for _ in 0..3 {
            assert!(log.append(&[1]).is_err());
            assert!(log.take_unsynced().is_none());
        }
        log.append(&[]).unwrap();
    }

    #[test]
    fn a_header_that_was_not_finished_is_written_again() {
        for len in 0..HEADER_LEN {
            let dir = tempfile::tempdir().unwrap();
            let path = path(dir.path(), KEY_EPOCH);
            fs::write(&path, &header(KEY_EPOCH)[..len]).unwrap();
            let (mut log, prefixes) = open(dir.path()).unwrap();
            assert!(prefixes.is_empty());
            log.append(&[5]).unwrap();
            assert_eq!(open(dir.path()).unwrap().1, [5]);
        }
    }

    #[test]
    fn a_damaged_header_is_refused_with_what_helps() {
        let right = header(KEY_EPOCH);
        let mut damaged: Vec<Vec<u8>> = [0, 13, 16, 23]
            .into_iter()
            .map(|at| {
                let mut header = right;
                header[at] ^= 1;
                header.to_vec()
            })
            .collect();
        damaged.extend([vec![0; 10], vec![0; 100], header(KEY_EPOCH + 1).to_vec()]);
        for content in damaged {
            let dir = tempfile::tempdir().unwrap();
            let path = path(dir.path(), KEY_EPOCH);
            fs::write(&path, &content).unwrap();
            let error = open(dir.path()).unwrap_err();
            assert!(matches!(error, ReplayLogError::Damaged { .. }), "{error}");
            for file in [&path, &dir.path().join("the.key")] {
                assert!(error.to_string().contains(&file.display().to_string()), "{error}");
            }
            assert_eq!(fs::read(&path).unwrap(), content, "it is kept");
        }
        let dir = tempfile::tempdir().unwrap();
        let mut newer = right;
        newer[15] = 2;
        fs::write(path(dir.path(), KEY_EPOCH), newer).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, ReplayLogError::UnknownVersion { version: 2, .. }), "{error}");
    }

    #[test]
    fn only_what_was_written_since_is_synced() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path()).unwrap();
        assert!(log.take_unsynced().is_none());
        log.append(&[1]).unwrap();
        log.take_unsynced().unwrap().sync().unwrap();
        assert!(log.take_unsynced().is_none());
    }

    #[test]
    fn logs_of_past_key_epochs_go() {
        let dir = tempfile::tempdir().unwrap();
        for key_epoch in [3, 6, 7, 8] {
            ReplayLog::open(dir.path(), key_epoch, PathBuf::new(), |_| {}).unwrap();
        }
        remove_before(dir.path(), 7).unwrap();
        assert_eq!(numbered_files(dir.path(), "replay-", ".log").unwrap(), [7, 8]);
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_read_tags() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).unwrap();
        let mode = fs::metadata(path(dir.path(), KEY_EPOCH)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
