//! The file in which a client keeps its token.
//!
//! Four lines of text: `mixsocks-token 1`, the gateway and the client's identity in base58, and the
//! token in hexadecimal. A token of another gateway or identity is none: the client registers and
//! replaces it.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use mixsocks_common::gateway::token::{TOKEN_LEN, Token};
use mixsocks_common::keys::Identity;
use zeroize::{Zeroize, Zeroizing};

const FIRST_LINE: &str = "mixsocks-token 1";
/// The first line takes 17 bytes, the identities at most 45 each, the token 65.
const MAX_FILE_BYTES: u64 = 256;

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[source] io::Error),
    /// It cannot be written.
    #[error("cannot be written: {0}")]
    Write(#[source] io::Error),
    /// It is something else, or damaged.
    #[error("is not a token file; delete it to register again")]
    Damaged,
}

/// Reads the token of `client` at `gateway`; `None` if there is no file, or one of another pair.
pub(super) fn load(
    path: &Path,
    gateway: &Identity,
    client: &Identity,
) -> Result<Option<Token>, TokenFileError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => return Err(TokenFileError::Damaged),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TokenFileError::Read(error)),
    }
    let bytes = Zeroizing::new(fs::read(path).map_err(TokenFileError::Read)?);
    let text = std::str::from_utf8(&bytes).map_err(|_| TokenFileError::Damaged)?;
    parse(text, gateway, client).ok_or(TokenFileError::Damaged)
}

/// The outer `None` stands for a damaged file, the inner one for a token of another pair.
fn parse(text: &str, gateway: &Identity, client: &Identity) -> Option<Option<Token>> {
    let mut lines = text.strip_suffix('\n')?.split('\n');
    if lines.next()? != FIRST_LINE {
        return None;
    }
    let of_gateway: Identity = lines.next()?.parse().ok()?;
    let of_client: Identity = lines.next()?.parse().ok()?;
    let token = decode_hex(lines.next()?)?;
    if lines.next().is_some() {
        return None;
    }
    Some((of_gateway == *gateway && of_client == *client).then_some(token))
}

/// Replaces the file by one with this token, which is on the disk when this returns.
pub(super) fn store(
    path: &Path,
    gateway: &Identity,
    client: &Identity,
    token: &Token,
) -> Result<(), TokenFileError> {
    let hex = encode_hex(token);
    let text = Zeroizing::new(format!("{FIRST_LINE}\n{gateway}\n{client}\n{}\n", hex.as_str()));
    replace(path, text.as_bytes()).map_err(TokenFileError::Write)
}

fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary_name = name.to_owned();
    temporary_name.push(format!(".{}.new", std::process::id()));
    let temporary = directory.join(temporary_name);
    // A leftover of a crashed process with this number would keep its own permissions.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&temporary, path));
    if replaced.is_err() {
        // The first error is the one that matters.
        let _ = fs::remove_file(&temporary);
    }
    replaced?;
    #[cfg(unix)]
    fs::File::open(directory)?.sync_all()?;
    Ok(())
}

fn encode_hex(token: &Token) -> Zeroizing<String> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = Zeroizing::new(String::with_capacity(2 * TOKEN_LEN));
    for byte in token.as_bytes() {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

fn decode_hex(text: &str) -> Option<Token> {
    let digits: &[u8; 2 * TOKEN_LEN] = text.as_bytes().try_into().ok()?;
    let mut bytes = [0u8; TOKEN_LEN];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    let token = Token::from_bytes(bytes);
    bytes.zeroize();
    Some(token)
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mixsocks_common::keys::IdentityKey;

    fn identity() -> Identity {
        IdentityKey::generate(&mut rand::rng()).identity()
    }

    #[test]
    fn a_token_belongs_to_its_gateway_and_client() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let (gateway, client) = (identity(), identity());
        assert_eq!(load(&path, &gateway, &client).unwrap(), None);
        for _ in 0..2 {
            let token = Token::generate(&mut rand::rng());
            store(&path, &gateway, &client, &token).unwrap();
            assert_eq!(load(&path, &gateway, &client).unwrap(), Some(token));
        }
        assert_eq!(load(&path, &identity(), &client).unwrap(), None);
        assert_eq!(load(&path, &gateway, &identity()).unwrap(), None);
        // Nothing else is left behind.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_can_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        store(&path, &identity(), &identity(), &Token::generate(&mut rand::rng())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn damaged_files_say_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let (gateway, client) = (identity(), identity());
        store(&path, &gateway, &client, &Token::generate(&mut rand::rng())).unwrap();
        let good = fs::read(&path).unwrap();
        for end in 0..good.len() {
            fs::write(&path, &good[..end]).unwrap();
            assert!(matches!(load(&path, &gateway, &client), Err(TokenFileError::Damaged)));
        }
        for contents in [[&good[..], b"\n"].concat(), vec![b'1'; 10_000], vec![0xff; 20]] {
            fs::write(&path, contents).unwrap();
            assert!(matches!(load(&path, &gateway, &client), Err(TokenFileError::Damaged)));
        }
    }
}
