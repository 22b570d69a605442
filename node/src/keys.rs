//! The Sphinx keys of a node: one for each key epoch, made ahead, and wiped when it is past.
//!
//! A node has the keys of the key epoch that it is and of the two that follow, so that it can
//! announce them before they are needed; the key of the one before stays for the overlap. The rules
//! are in `KeyRing`, which does no I/O; `KeyFiles` keeps the keys on the disk:
//!
//! ```text
//! sphinx-<key epoch>.key        a 32-byte secret in base58 and a newline, mode 0600
//! sphinx-<key epoch>.key.new    while it is written
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mixsocks_common::keys::{EncryptionKey, KEY_LEN};
use mixsocks_common::topology::{Epochs, UnixTime};
use mixsocks_sphinx::SecretKey;
use zeroize::Zeroizing;

/// Key epochs after the present one whose keys a node has: the last document of a key epoch is made
/// before it ends, and names the key of the one after it; descriptors come before documents.
const KEY_EPOCHS_AHEAD: u64 = 2;
/// 2200-01-01 00:00 UTC: no key is made for a key epoch that begins later. Where keys do not rotate
/// ([`Epochs::STATIC`]) the next key epoch is further away than that.
const LATEST_START: UnixTime = UnixTime(7_258_118_400);
/// A key file has 45 bytes. So much is read of one, and whatever is longer is damaged.
const LONGEST_KEY_FILE_BYTES: u64 = 256;

/// Why the keys of a node cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Others than the owner may read a key file.
    #[error(
        "other users may read {path}, which holds a secret; `chmod 600 {path}` ends that",
        path = .0.display()
    )]
    ReadableByOthers(PathBuf),
    /// A key file does not hold a key.
    #[error(
        "the key file {path} is damaged: restore it from a backup, or delete it to have a new key \
         made, under which packets arrive once the topology has it",
        path = .0.display()
    )]
    Damaged(PathBuf),
    /// A file or its directory does not work.
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

/// The Sphinx keys of one node; shared by all of its parts.
#[derive(Debug)]
pub struct SphinxKeys {
    files: KeyFiles,
    /// Held while files are read or written, but never across an await.
    ring: Mutex<KeyRing>,
}

impl SphinxKeys {
    /// Reads the keys in `dir`, makes those that are missing at `now`, and wipes those that are
    /// past.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn open(dir: &Path, epochs: Epochs, now: UnixTime) -> Result<Self, KeysError> {
        let files = KeyFiles { dir: dir.to_owned() };
        let mut ring = KeyRing::new(epochs, now);
        for key_epoch in files.list()? {
            if key_epoch < ring.oldest(now) {
                files.wipe(key_epoch)?;
            } else if key_epoch <= ring.newest(now) {
                ring.insert(key_epoch, files.read(key_epoch)?);
            }
        }
        let keys = Self { files, ring: Mutex::new(ring) };
        keys.advance(now)?;
        Ok(keys)
    }

    /// Makes the keys that are missing at `now`, and wipes those that are past. Blocks on the disk
    /// if there is something to do: at the times that [`poll_timeout`](Self::poll_timeout) tells.
    ///
    /// # Errors
    /// [`KeysError`]; what could be done is done, and the rest is tried by the next call.
    pub fn advance(&self, now: UnixTime) -> Result<(), KeysError> {
        let mut ring = self.ring();
        ring.set_time(now);
        let mut result = Ok(());
        for key_epoch in ring.missing(now) {
            match self.files.make(key_epoch) {
                Ok(key) => ring.insert(key_epoch, key),
                Err(error) => result = Err(error),
            }
        }
        for key_epoch in ring.past(now) {
            match self.files.wipe(key_epoch) {
                Ok(()) => ring.remove(key_epoch),
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// When [`advance`](Self::advance) has something to do next: later than `now`.
    pub fn poll_timeout(&self, now: UnixTime) -> UnixTime {
        self.ring().next_change(now)
    }

    /// The public keys of the present key epoch and of those that follow, for the node's descriptor.
    pub fn public_keys(&self) -> BTreeMap<u64, EncryptionKey> {
        let ring = self.ring();
        let last = ring.key_epoch.saturating_add(KEY_EPOCHS_AHEAD);
        let keys = ring.keys.range(ring.key_epoch..=last);
        keys.map(|(key_epoch, key)| (*key_epoch, key.public_key().into())).collect()
    }

    /// The key epoch at the time of the last [`advance`](Self::advance).
    pub fn key_epoch(&self) -> u64 {
        self.ring().key_epoch
    }

    /// How key epochs follow each other.
    pub fn epochs(&self) -> Epochs {
        self.ring().epochs
    }

    /// All keys, also that of the last key epoch while it is there.
    pub(crate) fn all(&self) -> BTreeMap<u64, Arc<SecretKey>> {
        self.ring().keys.clone()
    }

    /// The file of a key, for messages.
    pub(crate) fn file(&self, key_epoch: u64) -> PathBuf {
        self.files.path(key_epoch)
    }

    fn ring(&self) -> MutexGuard<'_, KeyRing> {
        // Each change of the ring is a single step, so a panic leaves it in order.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Under which keys packets are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counting {
    /// The key epoch that it is.
    pub(crate) current: u64,
    /// The one before or after, during the overlap around the change between them.
    pub(crate) neighbour: Option<u64>,
}

impl Counting {
    /// What counts at `now`. The overlap is at most half a key epoch, so that there is never more
    /// than one neighbour.
    pub(crate) fn at(epochs: Epochs, now: UnixTime) -> Self {
        let current = epochs.key_epoch_at(now);
        let next = current.saturating_add(1);
        let neighbour = if now < overlap_end(epochs, current) {
            current.checked_sub(1)
        } else if now.0.saturating_add(epochs.overlap_seconds) >= epochs.key_epoch_start(next).0 {
            Some(next)
        } else {
            None
        };
        Self { current, neighbour }
    }
}

/// Until when the key of the key epoch before counts.
fn overlap_end(epochs: Epochs, key_epoch: u64) -> UnixTime {
    UnixTime(epochs.key_epoch_start(key_epoch).0.saturating_add(epochs.overlap_seconds))
}

/// Which keys there are, and which there should be.
#[derive(Debug)]
struct KeyRing {
    epochs: Epochs,
    key_epoch: u64,
    /// Four, and those that could not be wiped or are far ahead because the clock was set back.
    keys: BTreeMap<u64, Arc<SecretKey>>,
}

impl KeyRing {
    fn new(epochs: Epochs, now: UnixTime) -> Self {
        Self { epochs, key_epoch: epochs.key_epoch_at(now), keys: BTreeMap::new() }
    }

    fn set_time(&mut self, now: UnixTime) {
        self.key_epoch = self.epochs.key_epoch_at(now);
    }

    fn insert(&mut self, key_epoch: u64, key: SecretKey) {
        self.keys.insert(key_epoch, Arc::new(key));
    }

    fn remove(&mut self, key_epoch: u64) {
        self.keys.remove(&key_epoch);
    }

    /// The first key epoch whose key is kept.
    fn oldest(&self, now: UnixTime) -> u64 {
        let current = self.epochs.key_epoch_at(now);
        let overlaps = now < overlap_end(self.epochs, current);
        if overlaps { current.saturating_sub(1) } else { current }
    }

    /// The last key epoch for which there should be a key.
    fn newest(&self, now: UnixTime) -> u64 {
        let current = self.epochs.key_epoch_at(now);
        let has_use = |key_epoch: &u64| self.epochs.key_epoch_start(*key_epoch) < LATEST_START;
        (current..=current.saturating_add(KEY_EPOCHS_AHEAD)).rev().find(has_use).unwrap_or(current)
    }

    /// The keys to make. That of the key epoch before is none of them: nobody can know it.
    fn missing(&self, now: UnixTime) -> Vec<u64> {
        let wanted = self.epochs.key_epoch_at(now)..=self.newest(now);
        wanted.filter(|key_epoch| !self.keys.contains_key(key_epoch)).collect()
    }

    /// The keys to wipe. Keys of key epochs that are far ahead stay: the clock was set back.
    fn past(&self, now: UnixTime) -> Vec<u64> {
        self.keys.range(..self.oldest(now)).map(|(key_epoch, _)| *key_epoch).collect()
    }

    /// When one of these changes.
    fn next_change(&self, now: UnixTime) -> UnixTime {
        let current = self.epochs.key_epoch_at(now);
        let end = overlap_end(self.epochs, current);
        let next = self.epochs.key_epoch_start(current.saturating_add(1));
        if now < end { end.min(next) } else { next }
    }
}

/// The keys on the disk.
#[derive(Debug)]
struct KeyFiles {
    dir: PathBuf,
}

impl KeyFiles {
    fn path(&self, key_epoch: u64) -> PathBuf {
        self.dir.join(format!("sphinx-{key_epoch}.key"))
    }

    /// The key epochs that have a file.
    fn list(&self) -> Result<Vec<u64>, KeysError> {
        numbered_files(&self.dir, "sphinx-", ".key").map_err(failed_at(&self.dir))
    }

    fn read(&self, key_epoch: u64) -> Result<SecretKey, KeysError> {
        let path = self.path(key_epoch);
        let mut text = Zeroizing::new(Vec::new());
        let read = |text: &mut Vec<u8>| {
            let file = File::open(&path)?;
            let is_private = is_private(&file)?;
            file.take(LONGEST_KEY_FILE_BYTES).read_to_end(text)?;
            Ok(is_private)
        };
        let is_private = read(&mut text).map_err(failed_at(&path))?;
        if !is_private {
            return Err(KeysError::ReadableByOthers(path));
        }
        let mut secret = Zeroizing::new([0; KEY_LEN]);
        match bs58::decode(text.trim_ascii()).onto(secret.as_mut()) {
            Ok(KEY_LEN) => Ok(SecretKey::from_bytes(*secret)),
            Ok(_) | Err(_) => Err(KeysError::Damaged(path)),
        }
    }

    /// Draws a key and stores it.
    fn make(&self, key_epoch: u64) -> Result<SecretKey, KeysError> {
        let key = SecretKey::generate(&mut rand::rng());
        let text = Zeroizing::new(bs58::encode(*key.to_bytes()).into_string());
        let path = self.path(key_epoch);
        self.replace(&path, &text).map_err(failed_at(&path))?;
        Ok(key)
    }

    /// The name of the new file is always the same, so that none is left behind by a crash.
    fn replace(&self, path: &Path, text: &str) -> io::Result<()> {
        let new = path.with_extension("key.new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&new)?;
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_dir(&self.dir)
    }

    /// Overwrites a key before it goes: file systems may leave the bytes of removed files where they
    /// were. Those that write elsewhere, and some disks, keep them all the same.
    fn wipe(&self, key_epoch: u64) -> Result<(), KeysError> {
        let path = self.path(key_epoch);
        let wipe = || {
            let mut file = OpenOptions::new().write(true).open(&path)?;
            let len = usize::try_from(file.metadata()?.len().min(LONGEST_KEY_FILE_BYTES));
            file.write_all(&vec![0; len.unwrap_or(0)])?;
            file.sync_all()?;
            fs::remove_file(&path)?;
            sync_dir(&self.dir)
        };
        match wipe() {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(failed_at(&path)),
        }
    }
}

fn failed_at(path: &Path) -> impl FnOnce(io::Error) -> KeysError {
    move |source| KeysError::Io { path: path.to_owned(), source }
}

/// The numbers of the files in `dir` that are named `<prefix><number><suffix>`, sorted.
pub(crate) fn numbered_files(dir: &Path, prefix: &str, suffix: &str) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| {
            let digits = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            let number: u64 = digits.parse().ok()?;
            // Not `07` and not `+7`, which would be read as the file of another one.
            (number.to_string() == digits).then_some(number)
        });
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Makes what was created, renamed or removed in a directory last.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(dir)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

/// Whether nobody but the owner may read a file.
fn is_private(file: &File) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        const GROUP_AND_OTHERS: u32 = 0o077;
        Ok(file.metadata()?.permissions().mode() & GROUP_AND_OTHERS == 0)
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Key epochs of 100 s.
    const EPOCHS: Epochs = Epochs { epoch_seconds: 10, key_epochs: 10, overlap_seconds: 20 };

    fn open(dir: &Path, now: u64) -> SphinxKeys {
        SphinxKeys::open(dir, EPOCHS, UnixTime(now)).unwrap()
    }

    fn key_epochs(keys: &SphinxKeys) -> Vec<u64> {
        keys.all().into_keys().collect()
    }

    fn on_disk(dir: &Path) -> Vec<u64> {
        numbered_files(dir, "sphinx-", ".key").unwrap()
    }

    #[test]
    fn the_neighbour_counts_only_within_the_overlap() {
        let counting = |now| {
            let Counting { current, neighbour } = Counting::at(EPOCHS, UnixTime(now));
            (current, neighbour)
        };
        assert_eq!([0, 19, 20].map(counting), [(0, None), (0, None), (0, None)]);
        assert_eq!([579, 580, 599].map(counting), [(5, None), (5, Some(6)), (5, Some(6))]);
        assert_eq!([600, 619, 620].map(counting), [(6, Some(5)), (6, Some(5)), (6, None)]);
        // The longest overlap that a topology may have, and none.
        let half = Epochs { overlap_seconds: 50, ..EPOCHS };
        for (now, neighbour) in [(600, 5), (649, 5), (650, 7), (699, 7)] {
            assert_eq!(Counting::at(half, UnixTime(now)).neighbour, Some(neighbour));
        }
        let none = Epochs { overlap_seconds: 0, ..EPOCHS };
        for now in [599, 600] {
            assert_eq!(Counting::at(none, UnixTime(now)).neighbour, None);
        }
        let now = UnixTime(u64::MAX);
        assert_eq!(Counting::at(Epochs::STATIC, now).current, Epochs::STATIC.key_epoch_at(now));
    }

    #[test]
    fn keys_are_made_ahead_kept_for_the_overlap_and_then_gone() {
        let dir = tempfile::tempdir().unwrap();
        let keys = open(dir.path(), 550);
        assert_eq!((key_epochs(&keys), on_disk(dir.path())), (vec![5, 6, 7], vec![5, 6, 7]));
        assert_eq!(keys.key_epoch(), 5);
        let announced = keys.public_keys();
        for (now, expected) in [
            (599, vec![5, 6, 7]),
            (600, vec![5, 6, 7, 8]),
            (619, vec![5, 6, 7, 8]),
            (620, vec![6, 7, 8]),
        ] {
            keys.advance(UnixTime(now)).unwrap();
            assert_eq!((key_epochs(&keys), on_disk(dir.path())), (expected.clone(), expected));
        }
        assert_eq!(keys.public_keys().into_keys().collect::<Vec<_>>(), [6, 7, 8]);
        assert!([6, 7].iter().all(|epoch| keys.public_keys()[epoch] == announced[epoch]));
    }

    /// Whoever looks at these times misses no change.
    #[test]
    fn something_changes_when_the_timeout_says_so_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let keys = open(dir.path(), 555);
        let mut now = UnixTime(555);
        for expected in [600, 620, 700, 720, 800] {
            let due = keys.poll_timeout(now);
            assert_eq!(due, UnixTime(expected));
            let before = key_epochs(&keys);
            keys.advance(UnixTime(due.0 - 1)).unwrap();
            assert_eq!(key_epochs(&keys), before);
            keys.advance(due).unwrap();
            assert_ne!(key_epochs(&keys), before);
            now = due;
        }
    }

    #[test]
    fn keys_stay_the_same_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path(), 550).public_keys();
        assert_eq!(open(dir.path(), 599).public_keys(), first);
        // Also the last key, as long as it counts, though it is announced no more.
        let later = open(dir.path(), 610);
        assert_eq!(key_epochs(&later), [5, 6, 7, 8]);
        assert_eq!(EncryptionKey::from(later.all()[&5].public_key()), first[&5]);
        assert!(!later.public_keys().contains_key(&5));
        // Off for long: what is past goes at the start.
        assert_eq!(key_epochs(&open(dir.path(), 1_000)), [10, 11, 12]);
        assert_eq!(on_disk(dir.path()), [10, 11, 12]);
    }

    #[test]
    fn a_key_that_nobody_knows_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(key_epochs(&open(dir.path(), 600)), [6, 7, 8]);
    }

    #[test]
    fn a_clock_that_is_set_back_loses_no_keys_and_makes_no_more_than_needed() {
        let dir = tempfile::tempdir().unwrap();
        let keys = open(dir.path(), 1_050);
        let ahead = keys.public_keys();
        keys.advance(UnixTime(550)).unwrap();
        assert_eq!(key_epochs(&keys), [5, 6, 7, 10, 11, 12]);
        assert_eq!(keys.key_epoch(), 5);
        assert_eq!(keys.public_keys().into_keys().collect::<Vec<_>>(), [5, 6, 7]);
        keys.advance(UnixTime(1_050)).unwrap();
        assert_eq!(keys.public_keys(), ahead);
        assert_eq!(on_disk(dir.path()), [10, 11, 12]);
    }

    #[test]
    fn keys_that_do_not_rotate_are_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let now = UnixTime(1_800_000_000);
        let keys = SphinxKeys::open(dir.path(), Epochs::STATIC, now).unwrap();
        assert_eq!(on_disk(dir.path()), [0]);
        assert_eq!(keys.public_keys().into_keys().collect::<Vec<_>>(), [0]);
        // After 2200 there is still a key.
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(key_epochs(&open(dir.path(), LATEST_START.0 + 50)), [LATEST_START.0 / 100]);
    }

    #[test]
    fn damaged_keys_are_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), 550);
        let path = dir.path().join("sphinx-6.key");
        for content in ["", "0OIl", "abc", &"1".repeat(100_000)] {
            fs::write(&path, content).unwrap();
            let error = SphinxKeys::open(dir.path(), EPOCHS, UnixTime(550)).unwrap_err();
            assert!(matches!(&error, KeysError::Damaged(at) if *at == path), "{error}");
            assert!(error.to_string().contains("delete it"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let others =
            ["sphinx-01.key", "sphinx-+1.key", "sphinx-.key", "sphinx.key", "sphinx-1.key~"];
        for name in others {
            fs::write(dir.path().join(name), "mine").unwrap();
        }
        open(dir.path(), 550);
        for name in others {
            assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), "mine");
        }
    }

    #[cfg(unix)]
    #[test]
    fn keys_belong_to_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        open(dir.path(), 550);
        let path = dir.path().join("sphinx-5.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        for readable in [0o644, 0o640, 0o604] {
            fs::set_permissions(&path, fs::Permissions::from_mode(readable)).unwrap();
            let error = SphinxKeys::open(dir.path(), EPOCHS, UnixTime(550)).unwrap_err();
            let help = format!("chmod 600 {}", path.display());
            assert!(error.to_string().contains(&help), "{error}");
        }
    }

    /// Another name of the file shows what became of its bytes.
    #[cfg(unix)]
    #[test]
    fn a_key_that_is_past_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let keys = open(dir.path(), 550);
        let name = dir.path().join("another name");
        fs::hard_link(dir.path().join("sphinx-5.key"), &name).unwrap();
        assert!(fs::read(&name).unwrap().iter().any(|byte| *byte != 0));
        keys.advance(UnixTime(620)).unwrap();
        assert!(fs::read(&name).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_fails_is_named_and_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let keys = open(dir.path(), 550);
        // A directory where the new file should be written.
        let in_the_way = dir.path().join("sphinx-8.key.new");
        fs::create_dir(&in_the_way).unwrap();
        let error = keys.advance(UnixTime(620)).unwrap_err();
        assert!(error.to_string().contains("sphinx-8.key"), "{error}");
        assert_eq!(key_epochs(&keys), [6, 7], "the rest is done");
        fs::remove_dir(&in_the_way).unwrap();
        keys.advance(UnixTime(620)).unwrap();
        assert_eq!(key_epochs(&keys), [6, 7, 8]);
    }

    #[test]
    fn debug_shows_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let keys = open(dir.path(), 550);
        let secret = fs::read_to_string(dir.path().join("sphinx-5.key")).unwrap();
        assert!(!format!("{keys:?}").contains(secret.trim()));
    }
}
