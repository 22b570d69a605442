//! The topology as a file: read and verified, or signed and written.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{
    Authorities, MAX_DOCUMENT_BYTES, Topology, TopologyError, UnixTime, sign, verify,
};

use crate::data_dir::DataDir;

/// Name of the file that [`write`] makes in a data directory.
pub(crate) const FILE: &str = "topology";

/// The time by this machine's clock.
pub(crate) fn now() -> UnixTime {
    UnixTime(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()))
}

/// Reads a topology file that `authority` must have signed.
pub(crate) fn read(path: &Path, authority: Identity) -> Result<Topology> {
    let file = read_bytes(path)?;
    verify(&file, &only(authority)?, now())
        .with_context(|| format!("the topology file {} cannot be used", path.display()))
}

/// Signs a topology and writes it into the data directory.
pub(crate) fn write(dir: &DataDir, topology: &Topology, authority: &IdentityKey) -> Result<()> {
    dir.write(FILE, sign(topology, &[authority]).as_bytes())
}

/// The epoch after that of the file in the data directory; 1 when there is none.
///
/// A file that is not in force any more counts too: an epoch is never used twice.
pub(crate) fn next_epoch(dir: &DataDir, authority: Identity) -> Result<u64> {
    let path = dir.path().join(FILE);
    if !path.exists() {
        return Ok(1);
    }
    let file = read_bytes(&path)?;
    let authorities = only(authority)?;
    let now = now();
    let old = match verify(&file, &authorities, now) {
        Err(TopologyError::Expired { seconds_ago }) => {
            verify(&file, &authorities, UnixTime(now.0 - seconds_ago - 1))
        }
        Err(TopologyError::NotYetValid { seconds }) => {
            verify(&file, &authorities, UnixTime(now.0 + seconds))
        }
        other => other,
    };
    let old = old.with_context(|| {
        let path = path.display();
        format!("the topology file {path} is damaged; delete it to have a new one written")
    })?;
    Ok(old.epoch + 1)
}

fn only(authority: Identity) -> Result<Authorities> {
    Ok(Authorities::new([authority], 1)?)
}

/// Reads one byte more than is allowed at most, so that [`verify`] sees what is too long.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let result = File::open(path)
        .and_then(|opened| opened.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut file));
    if let Err(error) = result {
        bail!("cannot read the topology file {}: {error}", path.display());
    }
    Ok(file)
}
