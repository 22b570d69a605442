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

/// Name of the file that [`write()`] makes in a data directory.
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

/// Accepts a topology that was read, unless it is older than one that was accepted before, or
/// another one of the same epoch: both would let somebody choose which network a client sees.
pub(crate) fn accept(
    dir: &DataDir,
    path: &Path,
    topology: &Topology,
    authority: Identity,
) -> Result<()> {
    if let Some(latest) = latest(dir, authority)? {
        let (new, old) = (topology.epoch, latest.epoch);
        if new < old {
            bail!(
                "the topology file {} is of epoch {new}, but one of epoch {old} was used before; \
                 fetch the newest one",
                path.display()
            );
        }
        if new == old && *topology != latest {
            bail!(
                "the topology file {} differs from the one used before, though both are of epoch \
                 {new}; an authority signed two, so ask its operator which one is right",
                path.display()
            );
        }
    }
    dir.write(FILE, &read_bytes(path)?)
}

/// Signs a topology and writes it into the data directory.
pub(crate) fn write(dir: &DataDir, topology: &Topology, authority: &IdentityKey) -> Result<()> {
    dir.write(FILE, sign(topology, &[authority]).as_bytes())
}

/// The topology that the data directory holds, whether it is in force or not; `None` when there is
/// none.
pub(crate) fn latest(dir: &DataDir, authority: Identity) -> Result<Option<Topology>> {
    let path = dir.path().join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let file = read_bytes(&path)?;
    let authorities = only(authority)?;
    let now = now();
    let topology = match verify(&file, &authorities, now) {
        Err(TopologyError::Expired { seconds_ago }) => {
            verify(&file, &authorities, UnixTime(now.0 - seconds_ago - 1))
        }
        Err(TopologyError::NotYetValid { seconds }) => {
            verify(&file, &authorities, UnixTime(now.0 + seconds))
        }
        other => other,
    };
    topology.map(Some).with_context(|| {
        format!(
            "the topology file {} of earlier starts cannot be used; if it is merely damaged, delete \
             it; for another network, choose another directory with --data-dir",
            path.display()
        )
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use mixsocks_common::topology::{NetworkName, Node, Parameters, Role};
    use std::time::Duration;

    struct Fixture {
        parent: tempfile::TempDir,
        dir: DataDir,
        authority: IdentityKey,
        nodes: Vec<Node>,
    }

    impl Fixture {
        fn new() -> Self {
            let parent = tempfile::tempdir().unwrap();
            let dir = DataDir::open(&parent.path().join("data")).unwrap();
            let authority = dir.identity_key("authority.key").unwrap();
            let client_address = "127.0.0.1:9".parse().unwrap();
            let mut roles: Vec<_> = (1..=3).map(|layer| Role::Mix { layer }).collect();
            roles.push(Role::Gateway { client_address });
            let nodes = roles.into_iter().enumerate().map(|(n, role)| Node {
                identity: dir.identity_key(&format!("{n}.id")).unwrap().identity(),
                sphinx_key: dir.sphinx_key(&format!("{n}.key")).unwrap().public_key().into(),
                link_address: "127.0.0.1:9".parse().unwrap(),
                role,
            });
            let nodes = nodes.collect();
            Self { parent, dir, authority, nodes }
        }

        fn topology(&self, epoch: u64, validity: std::ops::Range<u64>) -> Topology {
            let parameters = Parameters {
                payload_bytes: 2048,
                mean_delay: Duration::ZERO,
                max_delay: Duration::from_secs(1),
            };
            let network = NetworkName::new("test").unwrap();
            let validity = UnixTime(validity.start)..UnixTime(validity.end);
            Topology::new(network, epoch, validity, parameters, self.nodes.clone(), vec![]).unwrap()
        }

        fn accept(&self, topology: &Topology) -> Result<()> {
            let path = self.parent.path().join("file");
            std::fs::write(&path, sign(topology, &[&self.authority])).unwrap();
            accept(&self.dir, &path, topology, self.authority.identity())
        }
    }

    #[test]
    fn the_latest_is_found_whatever_the_clock_says() {
        let fixture = Fixture::new();
        let authority = fixture.authority.identity();
        assert!(latest(&fixture.dir, authority).unwrap().is_none());
        for validity in [0..1, 100..200, 0..u64::MAX >> 1, 1 << 40..1 << 41] {
            let topology = fixture.topology(7, validity);
            write(&fixture.dir, &topology, &fixture.authority).unwrap();
            assert_eq!(latest(&fixture.dir, authority).unwrap(), Some(topology));
        }
        fixture.dir.write(FILE, b"something else").unwrap();
        let error = format!("{:#}", latest(&fixture.dir, authority).unwrap_err());
        assert!(error.contains("delete it") && error.contains("first line"), "{error}");
    }

    #[test]
    fn a_client_never_goes_back() {
        let fixture = Fixture::new();
        fixture.accept(&fixture.topology(7, 0..100)).unwrap();
        fixture.accept(&fixture.topology(7, 0..100)).unwrap();
        let error = fixture.accept(&fixture.topology(7, 0..101)).unwrap_err().to_string();
        assert!(error.contains("signed two"), "{error}");
        fixture.accept(&fixture.topology(8, 0..101)).unwrap();
        let error = fixture.accept(&fixture.topology(7, 0..100)).unwrap_err().to_string();
        assert!(error.contains("fetch the newest"), "{error}");
    }
}
