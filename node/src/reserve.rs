//! Room on the disk for what must be stored even when the disk is full.
//!
//! Letting a box go writes to the disk too, and so does every packet that goes on. So that
//! confirmations and replay tags can still be stored when the disk is full, boxes are taken only while
//! a file is there that does nothing but take room. Whoever finds no room gives it up. It is made
//! again before the next box is taken, if that leaves room to others: a reserve of all that is left
//! would be what fills the disk.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Name of the file in the data directory.
const FILE_NAME: &str = "store.reserve";
/// As long as it should be, and at least: a batch of confirmations rewrites some 2 MB when each of
/// them is of another client.
const RESERVE_BYTES: u64 = 4 * 1024 * 1024;
const MIN_RESERVE_BYTES: u64 = RESERVE_BYTES / 2;
/// What it leaves to others when it is made: 131,072 replay tags, or a batch of a few boxes.
const LEFT_BYTES: u64 = 1024 * 1024;
/// It is written in steps. No zeros: they might take no room.
static STEP: [u8; 64 * 1024] = [0xA5; 64 * 1024];
const STEP_BYTES: u64 = 64 * 1024;
const _: () = assert!(MIN_RESERVE_BYTES + LEFT_BYTES == 3 * 1024 * 1024, "as the error says");

/// The file of a data directory.
#[derive(Debug)]
pub(crate) struct Reserve(PathBuf);

impl Reserve {
    /// That of a data directory; whether there is one is not looked at.
    pub(crate) fn of(data_dir: &Path) -> Self {
        Self(data_dir.join(FILE_NAME))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes sure that it is there.
    ///
    /// # Errors
    /// When the disk has no room for the shortest one and for [`LEFT_BYTES`]; then it takes none.
    pub(crate) fn make(&self) -> io::Result<()> {
        if fs::metadata(&self.0).is_ok_and(|file| file.len() >= MIN_RESERVE_BYTES) {
            return Ok(());
        }
        // What is left of one that was not finished.
        self.give_up();
        let mut file = File::create(&self.0)?;
        let result = length(free_bytes(&self.0)?)
            .and_then(|length| fill(&mut file, length))
            .and_then(|()| file.sync_all());
        if result.is_err() {
            self.give_up();
        }
        result
    }

    /// Leaves its room to others; whether there was one.
    pub(crate) fn give_up(&self) -> bool {
        // It is not there, or cannot be removed: then there is nothing to gain.
        fs::remove_file(&self.0).is_ok()
    }

    /// Does something that writes to its disk, and once more without the reserve if there was no
    /// room.
    ///
    /// # Errors
    /// Those of `write`.
    pub(crate) fn give_up_for<T>(&self, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match write() {
            Err(error) if is_full(&error) && self.give_up() => write(),
            result => result,
        }
    }
}

/// Whether there was no room, for all or for this user.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// How long it may be on a disk with so much room.
fn length(free_bytes: u64) -> io::Result<u64> {
    let length = free_bytes.saturating_sub(LEFT_BYTES).min(RESERVE_BYTES);
    let length = length - length % STEP_BYTES;
    if length < MIN_RESERVE_BYTES {
        let why = "No space left: 3 MiB must be free before something new is taken";
        return Err(io::Error::new(ErrorKind::StorageFull, why));
    }
    Ok(length)
}

fn fill(file: &mut File, bytes: u64) -> io::Result<()> {
    for _ in 0..bytes / STEP_BYTES {
        file.write_all(&STEP)?;
    }
    Ok(())
}

/// Room on the disk of a file for this user.
#[cfg(unix)]
fn free_bytes(path: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(path)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Not known: it is tried.
#[cfg(not(unix))]
fn free_bytes(_: &Path) -> io::Result<u64> {
    Ok(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_its_room_once_and_gives_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        let len = || fs::metadata(reserve.path()).unwrap().len();
        let cut = |len| File::options().write(true).open(reserve.path()).unwrap().set_len(len);
        for _ in 0..2 {
            reserve.make().unwrap();
            assert_eq!(len(), RESERVE_BYTES);
        }
        // As much as there was room for.
        cut(MIN_RESERVE_BYTES).unwrap();
        reserve.make().unwrap();
        assert_eq!(len(), MIN_RESERVE_BYTES);
        // Less than that is what a process left that was killed.
        cut(MIN_RESERVE_BYTES - 1).unwrap();
        reserve.make().unwrap();
        assert_eq!(len(), RESERVE_BYTES);
        assert!(reserve.give_up());
        assert!(!reserve.give_up());
        assert!(!reserve.path().exists());
    }

    #[test]
    fn its_length_leaves_room_to_others() {
        const LEAST: u64 = MIN_RESERVE_BYTES + LEFT_BYTES;
        for free in [0, LEFT_BYTES, LEAST - 1] {
            assert_eq!(length(free).unwrap_err().kind(), ErrorKind::StorageFull);
        }
        for free in (LEAST..LEAST + RESERVE_BYTES).step_by(4096) {
            let length = length(free).unwrap();
            assert!((MIN_RESERVE_BYTES..=RESERVE_BYTES).contains(&length));
            assert!(free - length >= LEFT_BYTES);
        }
        assert_eq!(length(u64::MAX).unwrap(), RESERVE_BYTES);
    }

    #[test]
    fn it_is_given_up_for_want_of_room_alone_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        let tries = |error: ErrorKind| {
            let mut tries = 0;
            let result: io::Result<()> = reserve.give_up_for(|| {
                tries += 1;
                Err(error.into())
            });
            assert_eq!(result.unwrap_err().kind(), error);
            tries
        };
        reserve.make().unwrap();
        assert_eq!(tries(ErrorKind::PermissionDenied), 1);
        assert!(reserve.path().exists());
        assert_eq!(tries(ErrorKind::StorageFull), 2);
        assert!(!reserve.path().exists());
        assert_eq!(tries(ErrorKind::StorageFull), 1);
    }
}
