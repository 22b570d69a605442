//! The invitations of an authority on its disk.
//!
//! ```text
//! invitations/<hash of this authority's share, base58>   "mix", or "mix <identity of who has used it>"
//! invite/<name>                                          a secret that was not handed out yet
//! ```
//!
//! Each is a file of its own, so that a new one can be added while the authority runs.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use mixsocks_common::directory::{
    INVITATION_LEN, Invitation, InvitationHash, MAX_INVITATIONS, MemberKind,
};
use mixsocks_common::keys::Identity;
use zeroize::Zeroizing;

use crate::cli::{kind_word, parse_kind};
use crate::data_dir::{self, DataDir};

/// Longest file: a word and a key.
const MAX_FILE_BYTES: u64 = 256;

/// The folder.
pub(crate) struct Invitations(PathBuf);

impl Invitations {
    /// Those of the data directory at `path`.
    pub(crate) fn new(path: &Path) -> Self {
        Self(path.join("invitations"))
    }

    /// Adds one that nobody has used.
    pub(crate) fn add(&self, hash: &InvitationHash, kind: MemberKind) -> Result<()> {
        let path = self.file(hash);
        if path.exists() {
            bail!("this authority has that invitation already");
        }
        data_dir::create_private_dir(&self.0)?;
        let count = fs::read_dir(&self.0).map_err(|e| data_dir::explain(&e, &self.0))?.count();
        if count >= MAX_INVITATIONS {
            bail!(
                "there are {MAX_INVITATIONS} invitations already; list members who have used one \
                 with --allow and delete their files in {}",
                self.0.display()
            );
        }
        self.put(&path, kind_word(kind)).map_err(|error| data_dir::explain(&error, &path))
    }

    /// Notes who has used one.
    pub(crate) fn take(&self, hash: &InvitationHash, who: Identity) -> io::Result<()> {
        let path = self.file(hash);
        let kind = fs::read_to_string(&path)?;
        let kind = kind.split_whitespace().next().unwrap_or_default();
        self.put(&path, &format!("{kind} {who}"))
    }

    /// Replaces a file whole. It is made beside the folder, so that no part of one is ever in it.
    fn put(&self, path: &Path, line: &str) -> io::Result<()> {
        let beside = self.0.parent().unwrap_or(&self.0);
        data_dir::replace(path, beside, format!("{line}\n").as_bytes())
    }

    /// All of them; the operator is told of files that are none.
    pub(crate) fn all(&self) -> io::Result<Vec<(InvitationHash, MemberKind, Option<Identity>)>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry?.path();
            match read(&path) {
                Some(invitation) => all.push(invitation),
                None => tracing::warn!("{} is no invitation; delete it", path.display()),
            }
        }
        Ok(all)
    }

    fn file(&self, hash: &InvitationHash) -> PathBuf {
        self.0.join(bs58::encode(hash.as_bytes()).into_string())
    }

    /// Puts a secret into a file that is to be handed out.
    pub(crate) fn write_secret(
        &self,
        dir: &DataDir,
        name: &str,
        invitation: &Invitation,
    ) -> Result<PathBuf> {
        let file = format!("invite/{name}");
        dir.write(&file, Zeroizing::new(format!("{}\n", to_text(invitation))).as_bytes())?;
        Ok(dir.path().join(file))
    }
}

fn read(path: &Path) -> Option<(InvitationHash, MemberKind, Option<Identity>)> {
    let mut hash = [0; INVITATION_LEN];
    let name = path.file_name()?.to_str()?;
    if bs58::decode(name).onto(&mut hash).ok()? != INVITATION_LEN {
        return None;
    }
    if fs::metadata(path).ok()?.len() > MAX_FILE_BYTES {
        return None;
    }
    let text = fs::read_to_string(path).ok()?;
    let mut words = text.split_whitespace();
    let kind = parse_kind(words.next()?).ok()?;
    let taken_by = match words.next() {
        Some(word) => Some(word.parse().ok()?),
        None => None,
    };
    Some((InvitationHash::from_bytes(hash), kind, taken_by))
}

/// An invitation as people copy it.
pub(crate) fn to_text(invitation: &Invitation) -> String {
    bs58::encode(invitation.as_bytes()).into_string()
}

/// Reads an invitation from a file that nobody else may read.
pub(crate) fn read_secret(path: &Path) -> Result<Invitation> {
    let secret = data_dir::read_given_secret(path, "invitation", "--invitation")?;
    Ok(Invitation::from_bytes(*secret))
}

#[cfg(test)]
mod tests {
    use mixsocks_common::keys::IdentityKey;

    use super::*;

    fn hash(number: usize) -> InvitationHash {
        let mut bytes = [7; INVITATION_LEN];
        bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
        InvitationHash::from_bytes(bytes)
    }

    #[test]
    fn who_has_used_one_is_kept_and_what_is_none_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let invitations = Invitations::new(dir.path());
        assert!(invitations.all().unwrap().is_empty());
        invitations.add(&hash(1), MemberKind::Mix).unwrap();
        let error = invitations.add(&hash(1), MemberKind::Gateway).unwrap_err().to_string();
        assert!(error.contains("has that invitation already"), "{error}");
        let who = IdentityKey::from_bytes(&[1; 32]).identity();
        invitations.take(&hash(1), who).unwrap();
        // As a crash or a full disk may leave them.
        fs::write(invitations.file(&hash(2)), "").unwrap();
        fs::write(dir.path().join("invitations/.tmp"), "mix").unwrap();
        assert!(invitations.all().unwrap() == [(hash(1), MemberKind::Mix, Some(who))]);
    }

    #[test]
    fn there_are_not_more_than_an_authority_keeps() {
        let dir = tempfile::tempdir().unwrap();
        let invitations = Invitations::new(dir.path());
        fs::create_dir(dir.path().join("invitations")).unwrap();
        for number in 0..MAX_INVITATIONS {
            fs::write(invitations.file(&hash(number)), "mix").unwrap();
        }
        let error = invitations.add(&hash(MAX_INVITATIONS), MemberKind::Mix).unwrap_err();
        assert!(error.to_string().contains("--allow"), "{error}");
    }
}
