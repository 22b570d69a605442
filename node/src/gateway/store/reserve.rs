//! Room on the disk for what makes room.
//!
//! Letting a box go writes to the disk too. So that confirmations can still be stored when the disk is
//! full, boxes are taken only while a file is there that does nothing but take room. It is given up
//! when something could not be stored, and made again before the next box is.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Name of the file in the data directory.
const FILE_NAME: &str = "store.reserve";
/// As long as it should be, and at least: a batch of confirmations rewrites some 2 MB when each of
/// them is of another client.
const RESERVE_BYTES: u64 = 4 * 1024 * 1024;
const MIN_RESERVE_BYTES: u64 = RESERVE_BYTES / 2;
/// It is written in steps, so that a disk with less room is used as far as it goes.
const STEP_BYTES: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Reserve(PathBuf);

impl Reserve {
    /// That of a data directory; whether there is one is not looked at.
    pub(super) fn of(data_dir: &Path) -> Self {
        Self(data_dir.join(FILE_NAME))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes sure that it is there.
    ///
    /// # Errors
    /// When there is no room for it; then it takes none.
    pub(super) fn make(&self) -> io::Result<()> {
        if fs::metadata(&self.0).is_ok_and(|file| file.len() >= MIN_RESERVE_BYTES) {
            return Ok(());
        }
        let mut file = File::create(&self.0)?;
        let written = write_up_to(&mut file, RESERVE_BYTES).and_then(|()| file.sync_all());
        match written {
            Err(_) if file.metadata()?.len() >= MIN_RESERVE_BYTES => Ok(()),
            Err(error) => {
                self.give_up();
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Leaves its room to others.
    pub(super) fn give_up(&self) {
        // It is not there, or cannot be removed: then there is nothing to gain.
        let _ = fs::remove_file(&self.0);
    }
}

fn write_up_to(file: &mut File, bytes: u64) -> io::Result<()> {
    // No zeros: they might take no room.
    let step = [0xA5; STEP_BYTES];
    for _ in 0..bytes / STEP_BYTES as u64 {
        file.write_all(&step)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_its_room_once_and_gives_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let reserve = Reserve::of(folder.path());
        for _ in 0..2 {
            reserve.make().unwrap();
            assert_eq!(fs::metadata(reserve.path()).unwrap().len(), RESERVE_BYTES);
        }
        // As much as there was room for.
        File::options()
            .write(true)
            .open(reserve.path())
            .unwrap()
            .set_len(MIN_RESERVE_BYTES)
            .unwrap();
        reserve.make().unwrap();
        assert_eq!(fs::metadata(reserve.path()).unwrap().len(), MIN_RESERVE_BYTES);
        reserve.give_up();
        reserve.give_up();
        assert!(!reserve.path().exists());
    }
}
