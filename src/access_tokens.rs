//! Access tokens: those that a provider has on its disk, and the one that a client is given.
//!
//! ```text
//! tokens/<name>   hash of what the provider is shown of a token, base58
//! ```
//!
//! Each is a file of its own, so that one can be added or deleted while the provider runs.

use std::fs;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::Path;

use anyhow::{Result, bail};
use mixsocks_common::keys::EncryptionKey;
use mixsocks_common::session::{
    ACCESS_TOKEN_LEN, AccessToken, AccessTokenHash, AccessTokens, MAX_ACCESS_TOKENS,
};
use mixsocks_common::topology::NetworkName;
use zeroize::Zeroizing;

use crate::data_dir;

const FOLDER: &str = "tokens";

/// Longest file: a hash takes 44 characters.
const MAX_FILE_BYTES: u64 = 256;

/// Makes a token for the provider that has this key and this data directory, which it may be using.
pub(crate) fn make(
    dir: &Path,
    name: &NetworkName,
    provider: &EncryptionKey,
) -> Result<AccessToken> {
    let token = AccessToken::generate(&mut rand::rng());
    let hash = bs58::encode(token.present(provider).hash().as_bytes()).into_string();
    let folder = dir.join(FOLDER);
    let path = folder.join(name.as_str());
    let write = || -> io::Result<()> {
        fs::create_dir_all(&folder)?;
        if fs::read_dir(&folder)?.count() >= MAX_ACCESS_TOKENS {
            return Err(io::Error::other(format!(
                "there are {MAX_ACCESS_TOKENS} tokens already; several people may share one"
            )));
        }
        // A provider that reads the folder meanwhile sees it whole or not at all.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        writeln!(file, "{hash}")?;
        file.as_file().sync_all()?;
        file.persist_noclobber(&path).map_err(|error| error.error)?;
        Ok(())
    };
    match write() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!(
            "there is a token {:?} already: choose another name with --name, or delete {} to take \
             that one back",
            name.as_str(),
            path.display()
        ),
        result => result.map_err(|error| data_dir::explain(&error, &path))?,
    }
    Ok(token)
}

/// All that the provider with this data directory knows.
pub(crate) fn all(dir: &Path) -> Result<AccessTokens> {
    let folder = dir.join(FOLDER);
    let explain = |error: io::Error| data_dir::explain(&error, &folder);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(AccessTokens::default()),
        Err(error) => return Err(explain(error)),
    };
    let mut hashes = Vec::new();
    for entry in entries {
        hashes.push(read_hash(&entry.map_err(explain)?.path())?);
    }
    Ok(AccessTokens::new(hashes)?)
}

fn read_hash(path: &Path) -> Result<AccessTokenHash> {
    let explain = |error: io::Error| data_dir::explain(&error, path);
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(explain)?;
    file.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(explain)?;
    let mut hash = [0; ACCESS_TOKEN_LEN];
    match bs58::decode(text.trim_ascii()).onto(&mut hash) {
        Ok(ACCESS_TOKEN_LEN) => Ok(AccessTokenHash::from_bytes(hash)),
        _ => bail!("{} is no token; delete it", path.display()),
    }
}

/// A token as people copy it.
pub(crate) fn to_text(token: &AccessToken) -> Zeroizing<String> {
    Zeroizing::new(bs58::encode(token.as_bytes()).into_string())
}

/// Reads a token from a file that nobody else may read.
pub(crate) fn read_secret(path: &Path) -> Result<AccessToken> {
    let secret = data_dir::read_given_secret(path, "access token", "--access-token-file")?;
    Ok(AccessToken::from_bytes(*secret))
}

#[cfg(test)]
mod tests {
    use mixsocks_sphinx::SecretKey;

    use super::*;

    fn provider() -> EncryptionKey {
        SecretKey::generate(&mut rand::rng()).public_key().into()
    }

    fn name(text: &str) -> NetworkName {
        NetworkName::new(text).unwrap()
    }

    #[test]
    fn tokens_come_and_go() {
        let (dir, provider) = (tempfile::tempdir().unwrap(), provider());
        assert!(all(dir.path()).unwrap().is_empty());
        let first = make(dir.path(), &name("friends"), &provider).unwrap();
        let second = make(dir.path(), &name("family"), &provider).unwrap();
        let knows =
            |token: &AccessToken| all(dir.path()).unwrap().know(&token.present(&provider).hash());
        assert!(knows(&first) && knows(&second));
        let error = make(dir.path(), &name("friends"), &provider).unwrap_err().to_string();
        assert!(error.contains("\"friends\" already") && error.contains("--name"), "{error}");
        assert!(knows(&first), "it is not replaced");
        fs::remove_file(dir.path().join("tokens/friends")).unwrap();
        assert!(!knows(&first) && knows(&second));
    }

    #[test]
    fn the_disk_does_not_hold_what_is_shown() {
        let (dir, provider) = (tempfile::tempdir().unwrap(), provider());
        let token = make(dir.path(), &name("friends"), &provider).unwrap();
        let stored = fs::read_to_string(dir.path().join("tokens/friends")).unwrap();
        let presented = bs58::encode(token.present(&provider).as_bytes()).into_string();
        assert!(stored.trim() != *to_text(&token) && stored.trim() != presented);
    }

    #[test]
    fn other_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), &name("friends"), &provider()).unwrap();
        for content in ["", "friends", "0OIl", &"1".repeat(10_000)] {
            fs::write(dir.path().join("tokens/odd"), content).unwrap();
            let error = all(dir.path()).unwrap_err().to_string();
            assert!(error.contains("tokens/odd is no token; delete it"), "{error}");
        }
    }

    #[test]
    fn they_have_a_bound() {
        let (dir, provider) = (tempfile::tempdir().unwrap(), provider());
        for number in 0..MAX_ACCESS_TOKENS {
            fs::create_dir_all(dir.path().join(FOLDER)).unwrap();
            fs::write(dir.path().join(FOLDER).join(number.to_string()), "1".repeat(32)).unwrap();
        }
        assert_eq!(all(dir.path()).unwrap().len(), MAX_ACCESS_TOKENS);
        let error = make(dir.path(), &name("friends"), &provider).unwrap_err().to_string();
        assert!(error.contains("share one"), "{error}");
        fs::write(dir.path().join(FOLDER).join("one-more"), "1".repeat(32)).unwrap();
        let error = all(dir.path()).unwrap_err().to_string();
        assert!(error.contains("more than 1024"), "{error}");
    }

    #[test]
    fn a_client_reads_what_was_printed() {
        let dir = tempfile::tempdir().unwrap();
        let token = make(dir.path(), &name("friends"), &provider()).unwrap();
        let file = dir.path().join("token");
        let text = to_text(&token);
        fs::write(&file, format!("{}\n", *text)).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
            let error = format!("{:#}", read_secret(&file).unwrap_err());
            assert!(error.contains("chmod 600"), "{error}");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        }
        assert_eq!(read_secret(&file).unwrap().as_bytes(), token.as_bytes());
        fs::write(&file, "nonsense").unwrap();
        let error = format!("{:#}", read_secret(&file).unwrap_err());
        assert!(error.contains("holds no access token"), "{error}");
        let error = format!("{:#}", read_secret(&dir.path().join("none")).unwrap_err());
        assert!(error.contains("--access-token-file names the file"), "{error}");
    }
}
