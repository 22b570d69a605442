//! The topology as a file: read and verified, or signed and written.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use mixsocks_common::directory::{Follower, Pace, Refused};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{
    Authorities, MAX_DOCUMENT_BYTES, Topology, UnixTime, sign, verify,
};

use crate::data_dir::DataDir;

/// Name of the file that [`write()`] makes in a data directory.
pub(crate) const FILE: &str = "topology";

/// The time by this machine's clock.
pub(crate) fn now() -> UnixTime {
    UnixTime(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()))
}

/// A topology file that was read and verified. It is read only once, so that what is stored is
/// what was verified, and a pipe will do.
#[derive(Debug)]
pub(crate) struct VerifiedFile {
    pub(crate) topology: Topology,
    pub(crate) bytes: Vec<u8>,
}

/// Reads a topology file that enough of the authorities must have signed.
pub(crate) fn read(path: &Path, authorities: &Authorities) -> Result<VerifiedFile> {
    let bytes = read_bytes(path).map_err(|error| {
        anyhow!(
            "cannot read the topology file {}: {error}; --topology names the file that the \
             network's operators publish",
            path.display()
        )
    })?;
    let topology = verify(&bytes, authorities, now())
        .with_context(|| format!("the topology file {} cannot be used", path.display()))?;
    Ok(VerifiedFile { topology, bytes })
}

/// Accepts a file that was read, unless it is of another network than the one that was accepted
/// before, older, or another one of the same epoch: each would let somebody choose which network a
/// client sees.
pub(crate) fn accept(
    dir: &DataDir,
    path: &Path,
    file: &VerifiedFile,
    authorities: &Authorities,
) -> Result<()> {
    let mut follower = follower(dir, authorities)?;
    let path = path.display();
    match follower.accept(&file.bytes, now()) {
        Ok(_) => dir.write(FILE, &file.bytes),
        Err(Refused::Topology(error)) => {
            Err(error).with_context(|| format!("the topology file {path} cannot be used"))
        }
        Err(Refused::OtherNetwork { theirs, ours }) => bail!(
            "the topology file {path} is of network {theirs:?}, but {} was used with network {ours:?} \
             before; choose another directory for another network with --data-dir",
            dir.path().display()
        ),
        Err(Refused::Rollback { new, old }) => bail!(
            "the topology file {path} is of epoch {new}, but one of epoch {old} was used before; \
             fetch the newest one"
        ),
        Err(Refused::Equivocation { epoch, .. }) => bail!(
            "the topology file {path} differs from the one used before, though both are of epoch \
             {epoch}; an authority signed two, so ask its operator which one is right"
        ),
    }
}

/// Signs a topology and writes it into the data directory.
pub(crate) fn write(dir: &DataDir, topology: &Topology, authority: &IdentityKey) -> Result<()> {
    dir.write(FILE, sign(topology, &[authority]).as_bytes())
}

/// The topology that the data directory holds, whether it is in force or not; `None` when there is
/// none.
pub(crate) fn latest(dir: &DataDir, authorities: &Authorities) -> Result<Option<Topology>> {
    Ok(follower(dir, authorities)?.latest().map(|latest| latest.topology().clone()))
}

/// Whoever knows what the data directory holds.
fn follower(dir: &DataDir, authorities: &Authorities) -> Result<Follower> {
    let path = dir.path().join(FILE);
    let stored = if path.exists() {
        let bytes = read_bytes(&path)
            .map_err(|error| anyhow!("cannot read {}: {error}; delete it", path.display()))?;
        Some(bytes)
    } else {
        None
    };
    Follower::new(authorities.clone(), stored.as_deref(), Pace::Client).with_context(|| {
        format!(
            "the topology file {} of earlier starts cannot be used; if it is merely damaged, delete \
             it; for another network, choose another directory with --data-dir",
            path.display()
        )
    })
}

/// A network with one authority.
pub(crate) fn only(authority: Identity) -> Result<Authorities> {
    Ok(Authorities::new([authority], 1)?)
}

/// Reads one byte more than is allowed at most, so that [`verify`] sees what is too long.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mixsocks_common::topology::{Epochs, NetworkName, Node, Parameters, Role};
    use std::time::Duration;

    /// In force whatever the clock says.
    const FOR_EVER: std::ops::Range<u64> = 0..u64::MAX >> 1;

    struct Fixture {
        parent: tempfile::TempDir,
        dir: DataDir,
        authority: IdentityKey,
        nodes: Vec<Node>,
    }

    impl Fixture {
        fn authorities(&self) -> Authorities {
            only(self.authority.identity()).unwrap()
        }

        fn new() -> Self {
            let parent = tempfile::tempdir().unwrap();
            let dir = DataDir::open(&parent.path().join("data")).unwrap();
            let authority = dir.identity_key("authority.key").unwrap();
            let address = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
            let client_address = address(9);
            let mut roles: Vec<_> = (1..=3).map(|layer| Role::Mix { layer }).collect();
            roles.push(Role::Gateway { client_address });
            let nodes = (1..).zip(roles).map(|(n, role)| Node {
                identity: dir.identity_key(&format!("{n}.id")).unwrap().identity(),
                sphinx_key: dir.sphinx_key(&format!("{n}.key")).unwrap().public_key().into(),
                next_sphinx_key: None,
                link_address: address(n),
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
                epochs: Epochs::STATIC,
            };
            let network = NetworkName::new("test").unwrap();
            let validity = UnixTime(validity.start)..UnixTime(validity.end);
            Topology::new(network, epoch, validity, parameters, self.nodes.clone(), vec![]).unwrap()
        }

        fn path(&self) -> std::path::PathBuf {
            self.parent.path().join("file")
        }

        fn accept(&self, topology: Topology) -> Result<()> {
            let bytes = sign(&topology, &[&self.authority]).into_bytes();
            let file = VerifiedFile { topology, bytes };
            accept(&self.dir, &self.path(), &file, &self.authorities())
        }
    }

    #[test]
    fn the_latest_is_found_whatever_the_clock_says() {
        let fixture = Fixture::new();
        let authorities = fixture.authorities();
        assert!(latest(&fixture.dir, &authorities).unwrap().is_none());
        for validity in [0..1, 100..200, FOR_EVER, 1 << 40..1 << 41] {
            let topology = fixture.topology(7, validity);
            write(&fixture.dir, &topology, &fixture.authority).unwrap();
            assert_eq!(latest(&fixture.dir, &authorities).unwrap(), Some(topology));
        }
        fixture.dir.write(FILE, b"something else").unwrap();
        let error = format!("{:#}", latest(&fixture.dir, &authorities).unwrap_err());
        assert!(error.contains("delete it") && error.contains("first line"), "{error}");
    }

    #[test]
    fn a_client_never_goes_back() {
        let fixture = Fixture::new();
        fixture.accept(fixture.topology(7, FOR_EVER)).unwrap();
        fixture.accept(fixture.topology(7, FOR_EVER)).unwrap();
        let error = fixture.accept(fixture.topology(7, 1..FOR_EVER.end)).unwrap_err().to_string();
        assert!(error.contains("signed two"), "{error}");
        fixture.accept(fixture.topology(8, 1..FOR_EVER.end)).unwrap();
        let error = fixture.accept(fixture.topology(7, FOR_EVER)).unwrap_err().to_string();
        assert!(error.contains("fetch the newest"), "{error}");
    }

    #[test]
    fn a_client_stays_with_its_network() {
        let fixture = Fixture::new();
        fixture.accept(fixture.topology(7, FOR_EVER)).unwrap();
        let mut other = fixture.topology(8, FOR_EVER);
        other.network = NetworkName::new("other").unwrap();
        let error = fixture.accept(other).unwrap_err().to_string();
        assert!(error.contains("network \"other\"") && error.contains("--data-dir"), "{error}");
        let latest = latest(&fixture.dir, &fixture.authorities()).unwrap().unwrap();
        assert_eq!((latest.network.as_str(), latest.epoch), ("test", 7));
    }

    #[test]
    fn what_was_verified_is_stored_even_if_the_file_has_changed_since() {
        let fixture = Fixture::new();
        let authorities = fixture.authorities();
        let signed = sign(&fixture.topology(7, FOR_EVER), &[&fixture.authority]);
        std::fs::write(fixture.path(), &signed).unwrap();
        let file = read(&fixture.path(), &authorities).unwrap();
        std::fs::write(fixture.path(), "something else").unwrap();
        accept(&fixture.dir, &fixture.path(), &file, &authorities).unwrap();
        assert_eq!(fixture.dir.read_text(FILE).unwrap(), Some(signed));
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_as_good_as_a_file() {
        use std::io::Write;
        use std::os::fd::AsRawFd;
        let fixture = Fixture::new();
        let authorities = fixture.authorities();
        let (reader, mut writer) = std::io::pipe().unwrap();
        let signed = sign(&fixture.topology(7, FOR_EVER), &[&fixture.authority]);
        writer.write_all(signed.as_bytes()).unwrap();
        drop(writer);
        let path = std::path::PathBuf::from(format!("/dev/fd/{}", reader.as_raw_fd()));
        let file = read(&path, &authorities).unwrap();
        accept(&fixture.dir, &path, &file, &authorities).unwrap();
        assert_eq!(fixture.dir.read_text(FILE).unwrap(), Some(signed));
    }

    #[test]
    fn a_file_that_is_not_there() {
        let fixture = Fixture::new();
        let error = read(&fixture.path(), &fixture.authorities()).unwrap_err().to_string();
        assert!(error.contains("cannot read") && error.contains("--topology"), "{error}");
    }
}
