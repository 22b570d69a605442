//! The data directory: keys, stores and the topology, kept by one process at a time.
//!
//! ```text
//! lock                      held while a process uses the directory
//! authority.key             up: signs the topology
//! authority.pub             up: its public key, for `mixsocks client --authority`
//! topology                  up: the signed file, new at each start; client: the latest one used
//! mix-1 … mix-3/            up: identity.key; sphinx-<key epoch>.key and replay-<key epoch>.log
//! gateway-1, gateway-2/     up: the same, and store.redb: registrations and kept messages, store.reserve
//! provider/                 up: identity.key, encryption.key, token
//! tokens/<name>             provider: hashes of the access tokens that it has given out
//! client/                   identity.key, encryption.key, token, gateway (the one that was chosen)
//! ```
//!
//! A `.key` file is a 32-byte secret in base58 that only its owner may read. Files are replaced
//! whole (temporary file, sync, rename), so that none is ever half written. A replay log holds the
//! tags of the packets that came under the key beside it: delete neither without the other.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use etcetera::AppStrategy;
use mixsocks_common::keys::{EncryptionKey, Identity, IdentityKey, KEY_LEN};
use mixsocks_directory::Store;
use mixsocks_sphinx::SecretKey;
use rand::Rng;
use zeroize::Zeroizing;

/// Room that a start asks for: several times what keys, a topology and registrations take.
const NEEDED_BYTES: usize = 1024 * 1024;

/// Longest file with a secret: 32 bytes take 44 characters.
const MAX_SECRET_FILE_BYTES: u64 = 256;

/// Another process uses a data directory.
#[derive(Debug, thiserror::Error)]
#[error(
    "another mixsocks process uses the data directory {}; stop it, or choose another directory with \
     --data-dir",
    .0.display()
)]
pub(crate) struct InUse(PathBuf);

/// A data directory that this process alone uses, until the value is dropped.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    /// Locked; the lock ends with the file.
    _lock: File,
}

impl DataDir {
    /// Where a command keeps its data unless told otherwise.
    pub(crate) fn default_path(command: &str) -> Result<PathBuf> {
        let names = etcetera::AppStrategyArgs {
            app_name: "mixsocks".to_owned(),
            ..etcetera::AppStrategyArgs::default()
        };
        let strategy = etcetera::app_strategy::choose_native_strategy(names)
            .context("there is no home directory to keep data in; choose one with --data-dir")?;
        Ok(strategy.in_data_dir(command))
    }

    /// Opens the directory that was chosen for a command, or its usual one.
    pub(crate) fn open_for(command: &str, chosen: Option<&Path>) -> Result<Self> {
        match chosen {
            Some(path) => Self::open(path),
            None => Self::open(&Self::default_path(command)?),
        }
    }

    /// Opens the directory, creating it if needed, and keeps other processes out.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        create_private_dir(path)?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(|error| explain(&error, &lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(InUse(path.to_owned()).into()),
            Err(TryLockError::Error(error)) => Err(explain(&error, &lock_path)),
        }
    }

    /// The path of the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a folder inside it, which is created if needed.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        create_private_dir(&path)?;
        Ok(path)
    }

    /// The identity key in `file`; a new one is drawn and stored at the first use.
    pub(crate) fn identity_key(&self, file: &str) -> Result<IdentityKey> {
        Ok(IdentityKey::from_bytes(&*self.secret(file)?))
    }

    /// Who has the identity key in a file of a directory that another process may use.
    pub(crate) fn read_identity(path: &Path) -> Result<Identity> {
        Ok(IdentityKey::from_bytes(&*read_key(path)?).identity())
    }

    /// The public part of the Sphinx key in a file of a directory that another process may use.
    pub(crate) fn read_encryption_key(path: &Path) -> Result<EncryptionKey> {
        Ok(SecretKey::from_bytes(*read_key(path)?).public_key().into())
    }

    /// The Sphinx key in `file`; a new one is drawn and stored at the first use.
    pub(crate) fn sphinx_key(&self, file: &str) -> Result<SecretKey> {
        Ok(SecretKey::from_bytes(*self.secret(file)?))
    }

    fn secret(&self, file: &str) -> Result<Zeroizing<[u8; KEY_LEN]>> {
        if let Some(text) = self.read_secret_text(file)? {
            let mut secret = Zeroizing::new([0; KEY_LEN]);
            return match bs58::decode(text.trim_ascii()).onto(secret.as_mut()) {
                Ok(KEY_LEN) => Ok(secret),
                Ok(_) | Err(_) => bail!(
                    "the key file {} is damaged: restore it from a backup, or delete it to have a \
                     new key made, which changes an address",
                    self.path.join(file).display()
                ),
            };
        }
        let mut secret = Zeroizing::new([0; KEY_LEN]);
        rand::rng().fill_bytes(secret.as_mut());
        let text = Zeroizing::new(format!("{}\n", bs58::encode(secret.as_ref()).into_string()));
        self.write(file, text.as_bytes())?;
        Ok(secret)
    }

    /// Reads a small file that nobody else may read; `None` when there is none.
    fn read_secret_text(&self, file: &str) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let path = self.path.join(file);
        let key = match File::open(&path) {
            Ok(key) => key,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(explain(&error, &path)),
        };
        refuse_readable_by_others(&key, &path)?;
        let mut text = Zeroizing::new(Vec::new());
        key.take(MAX_SECRET_FILE_BYTES)
            .read_to_end(&mut text)
            .map_err(|error| explain(&error, &path))?;
        Ok(Some(text))
    }

    /// Makes sure that there is room for what will be stored, so that a full disk shows before
    /// anything is begun and not as some part's failure to remember.
    pub(crate) fn require_space(&self) -> Result<()> {
        let probe = || {
            let mut file = tempfile::tempfile_in(&self.path)?;
            file.write_all(&vec![1; NEEDED_BYTES])?;
            file.sync_all()
        };
        probe().map_err(|error| explain(&error, &self.path))
    }

    /// Reads a text file; `None` when there is none.
    pub(crate) fn read_text(&self, file: &str) -> Result<Option<String>> {
        let path = self.path.join(file);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(explain(&error, &path)),
        }
    }

    /// Replaces a file as a whole; only the owner may read it.
    pub(crate) fn write(&self, file: &str, content: &[u8]) -> Result<()> {
        let path = self.path.join(file);
        let folder = path.parent().unwrap_or(&self.path);
        create_private_dir(folder)?;
        replace(&path, folder, content).map_err(|error| explain(&error, &path))
    }

    /// Whether there is such a file.
    pub(crate) fn has(&self, file: &str) -> bool {
        self.path.join(file).exists()
    }
}

/// What the parts of a network keep by themselves.
impl Store for DataDir {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path.join(name)) {
            Ok(contents) => Ok(Some(contents)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        replace(&self.path.join(name), &self.path, contents)
    }
}

fn read_key(path: &Path) -> Result<Zeroizing<[u8; KEY_LEN]>> {
    let text = fs::read(path).map_err(|error| explain(&error, path)).map(Zeroizing::new)?;
    let mut secret = Zeroizing::new([0; KEY_LEN]);
    match bs58::decode(text.trim_ascii()).onto(secret.as_mut()) {
        Ok(KEY_LEN) => Ok(secret),
        _ => bail!("the key file {} is damaged", path.display()),
    }
}

/// Reads a secret of 32 bytes in base58, such as an invitation (`what`), from a file that somebody was
/// given and named with `option`; nobody else may read it.
pub(crate) fn read_given_secret(
    path: &Path,
    what: &str,
    option: &str,
) -> Result<Zeroizing<[u8; KEY_LEN]>> {
    let explain = |error: io::Error| {
        anyhow!("cannot read the {what} {}: {error}; {option} names the file", path.display())
    };
    let file = File::open(path).map_err(explain)?;
    refuse_readable_by_others(&file, path)?;
    let mut text = Zeroizing::new(Vec::new());
    file.take(MAX_SECRET_FILE_BYTES).read_to_end(&mut text).map_err(explain)?;
    let mut secret = Zeroizing::new([0; KEY_LEN]);
    match bs58::decode(text.trim_ascii()).onto(secret.as_mut()) {
        Ok(KEY_LEN) => Ok(secret),
        _ => bail!("{} holds no {what}; copy it anew from whoever gave it to you", path.display()),
    }
}

/// A temporary file is created with mode 0600 and keeps it when renamed.
pub(crate) fn replace(path: &Path, folder: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

pub(crate) fn create_private_dir(path: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|error| explain(&error, path))
}

/// Refuses a file with a secret inside that others than its owner may read.
#[cfg(unix)]
pub(crate) fn refuse_readable_by_others(file: &File, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    const GROUP_AND_OTHERS: u32 = 0o077;
    let mode = file.metadata().map_err(|error| explain(&error, path))?.permissions().mode();
    if mode & GROUP_AND_OTHERS != 0 {
        let path = path.display();
        bail!("other users may read {path}, which holds a secret; `chmod 600 {path}` ends that");
    }
    Ok(())
}

#[cfg(not(unix))]
pub(crate) fn refuse_readable_by_others(_: &File, _: &Path) -> Result<()> {
    Ok(())
}

/// Says what to do about an error at a path of the data directory. What helps against a full disk
/// is said where errors are printed, as other parts store things too.
pub(crate) fn explain(error: &io::Error, path: &Path) -> anyhow::Error {
    let path = path.display();
    let other = "choose another place with --data-dir";
    match error.kind() {
        ErrorKind::PermissionDenied => {
            anyhow!("no permission to use {path}; change its owner or mode, or {other}")
        }
        ErrorKind::ReadOnlyFilesystem => {
            anyhow!("{path} is on a file system that is read-only; {other}")
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            io::Error::new(error.kind(), format!("there is no space left for {path}")).into()
        }
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            anyhow!("{path} cannot be a directory, because a file is in its place; {other}")
        }
        ErrorKind::IsADirectory => {
            anyhow!("{path} should be a file, but is a directory; move it away, or {other}")
        }
        _ => anyhow!("cannot use {path}: {error}; {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary() -> (tempfile::TempDir, DataDir) {
        let parent = tempfile::tempdir().unwrap();
        let dir = DataDir::open(&parent.path().join("a/b")).unwrap();
        (parent, dir)
    }

    #[test]
    fn keys_stay_the_same() {
        let (_parent, dir) = temporary();
        let first = dir.identity_key("mix-1/identity.key").unwrap();
        let second = dir.identity_key("mix-1/identity.key").unwrap();
        assert_eq!(first.identity(), second.identity());
        let other = dir.identity_key("mix-2/identity.key").unwrap();
        assert_ne!(first.identity(), other.identity());
    }

    #[test]
    fn two_never_share_a_directory() {
        let (_parent, dir) = temporary();
        let error = DataDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another mixsocks process") && error.contains("--data-dir"));
        let path = dir.path().to_owned();
        drop(dir);
        DataDir::open(&path).unwrap();
    }

    #[test]
    fn damaged_keys_are_refused_and_kept() {
        let (_parent, dir) = temporary();
        for content in ["", "0OIl", "abc", &"1".repeat(100_000)] {
            dir.write("x.key", content.as_bytes()).unwrap();
            let error = dir.sphinx_key("x.key").unwrap_err().to_string();
            assert!(error.contains("x.key is damaged"), "{error}");
            assert_eq!(dir.read_text("x.key").unwrap().unwrap(), content);
        }
    }

    #[cfg(unix)]
    #[test]
    fn keys_belong_to_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let (_parent, dir) = temporary();
        dir.sphinx_key("x.key").unwrap();
        let path = dir.path().join("x.key");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(dir.path())), (0o600, 0o700));
        for readable in [0o644, 0o640, 0o604] {
            fs::set_permissions(&path, fs::Permissions::from_mode(readable)).unwrap();
            let error = dir.sphinx_key("x.key").unwrap_err().to_string();
            assert!(error.contains(&format!("chmod 600 {}", path.display())), "{error}");
        }
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let (parent, dir) = temporary();
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("below")] {
            let error = DataDir::open(&path).unwrap_err().to_string();
            assert!(error.contains("a file is in its place"), "{error}");
        }
        dir.folder("x.key").unwrap();
        let error = dir.sphinx_key("x.key").unwrap_err().to_string();
        assert!(error.contains("is a directory"), "{error}");
    }
}
