//! A disk that is soon full. Tests of the whole program have this file too.

use std::path::Path;
use std::process::Command;

/// A file system of a given size; unmounted when dropped.
pub(super) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` when this user may not mount.
    pub(super) fn mount(kib: u32) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path());
        let mounted = command.output().is_ok_and(|output| output.status.success());
        mounted.then(|| Self(folder))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}
