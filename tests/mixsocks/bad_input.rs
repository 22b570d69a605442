//! Whatever is wrong has an error of its own that says what to do, in one line.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mixsocks_common::address::Address;
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::topology::{
    Epochs, NetworkName, Node, Parameters, Provider, Role, Topology, UnixTime, sign,
};
use mixsocks_sphinx::SecretKey;
use tempfile::TempDir;

use crate::process::{mixsocks, run, skip, up};
use crate::small_disk::SmallDisk;

/// Runs to the end, which must come soon and be an error of one line with these words.
fn fails(command: &mut Command, code: i32, words: &[&str]) {
    let ended = run(command);
    assert_eq!(ended.status.code(), Some(code), "{command:?}: {ended:?}");
    assert!(ended.stderr.starts_with("error: "), "{command:?}: {ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{command:?}: {ended:?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{word:?} of {command:?}: {ended:?}");
    }
}

#[test]
fn wrong_command_lines() {
    for (arguments, word) in [
        (&["up", "--sock", "127.0.0.1:0"][..], "did you mean --socks?"),
        (&["up", "--mean-deley", "1ms"], "did you mean --mean-delay?"),
        (&["up", "--mean-delay", "1m"], "no packet longer than 10s"),
        (&["up", "--profile", "private"], "only the profile \"fast\""),
        (&["up", "--socks", "localhost"], "127.0.0.1:1080"),
        (&["bnech"], "did you mean \"bench\"?"),
        (&["client", "run", "--authority", "0OIl", "--topology", "y"], "base58"),
        (
            &["client", "run", "--provider", "abc@def", "--topology", "y"],
            "<identity>.<encryption>@",
        ),
    ] {
        fails(mixsocks().args(arguments), 2, &[word, "--help"]);
    }
    fails(mixsocks().arg("up").env("MIXSOCKS_MEAN_DELAY", "soon"), 2, &["--mean-delay", "15ms"]);
    fails(mixsocks().args(["-q", "-v", "up"]), 2, &["--quiet and --verbose exclude each other"]);
}

#[test]
fn a_backend_that_is_not_there() {
    let words = ["MIXSOCKS_SPHINX_BACKEND", "\"avx1024\"", "reference, portable"];
    fails(mixsocks().arg("up").env("MIXSOCKS_SPHINX_BACKEND", "avx1024"), 1, &words);
}

/// A network that exists on paper only: nobody listens at its addresses.
struct PaperNetwork {
    name: &'static str,
    folder: TempDir,
    authority: IdentityKey,
    nodes: Vec<Node>,
    provider: Address,
}

impl PaperNetwork {
    fn new(gateways: usize) -> Self {
        let mut rng = rand::rng();
        let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let nobody: SocketAddr = nobody.local_addr().unwrap();
        let mut roles: Vec<_> = (1..=3).map(|layer| Role::Mix { layer }).collect();
        roles.extend((0..gateways).map(|_| Role::Gateway { client_address: nobody }));
        let key = || IdentityKey::generate(&mut rand::rng()).identity();
        let nodes: Vec<_> = (1..)
            .zip(roles)
            .map(|(port, role)| Node {
                identity: key(),
                sphinx_key: SecretKey::generate(&mut rng).public_key().into(),
                next_sphinx_key: None,
                link_address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                role,
            })
            .collect();
        let provider = Address {
            identity: key(),
            encryption: nodes[0].sphinx_key,
            gateway: nodes.last().unwrap().identity,
        };
        let authority = IdentityKey::generate(&mut rand::rng());
        let folder = tempfile::tempdir().unwrap();
        Self { name: "paper", folder, authority, nodes, provider }
    }

    /// A document in force from one time to another, in seconds from now.
    fn document(&self, epoch: u64, from: i64, until: i64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let at = |seconds| UnixTime(now.checked_add_signed(seconds).unwrap());
        let parameters = Parameters {
            payload_bytes: 2048,
            mean_delay: Duration::ZERO,
            max_delay: Duration::from_secs(1),
            epochs: Epochs::STATIC,
        };
        let provider = Provider {
            name: "paper".to_owned(),
            address: self.provider,
            policy: String::new(),
            requires_token: false,
        };
        let name = NetworkName::new(self.name).unwrap();
        let topology = Topology::new(
            name,
            epoch,
            at(from)..at(until),
            parameters,
            self.nodes.clone(),
            vec![provider],
        );
        sign(&topology.unwrap(), &[&self.authority])
    }

    fn file(&self, document: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join("topology");
        std::fs::write(&path, document).unwrap();
        path
    }

    fn client(&self, topology: &Path) -> Command {
        let mut command = mixsocks();
        command.args(["client", "run", "--socks", "127.0.0.1:0"]).arg("--topology").arg(topology);
        command.arg("--authority").arg(self.authority.identity().to_string());
        command.arg("--data-dir").arg(self.folder.path().join("data"));
        command
    }
}

#[test]
fn unusable_topologies() {
    let network = PaperNetwork::new(2);
    let good = network.document(1, -10, 1000);
    let changed = good.replace("payload_bytes = 2048", "payload_bytes = 2049");
    assert_ne!(good, changed);
    for (document, words) in [
        (&b"\x00\xff\xfe binary"[..], &["not a topology", "get the one"][..]),
        (b"", &["not a topology"]),
        (b"[some]\ntoml = 1\n", &["not a topology", "first line"]),
        (&good.as_bytes()[..good.len() / 2], &["the file was changed"]),
        (changed.as_bytes(), &["the file was changed"]),
        (network.document(1, -1000, -100).as_bytes(), &["expired", "newer"]),
        (network.document(1, 100, 1000).as_bytes(), &["becomes valid in", "clock"]),
    ] {
        let file = network.file(document);
        fails(&mut network.client(&file), 1, &[words, &[file.to_str().unwrap()]].concat());
    }
    let stranger = PaperNetwork::new(2);
    let file = network.file(stranger.document(1, -10, 1000));
    fails(&mut network.client(&file), 1, &["others than the given authority", "another network"]);
    let nowhere = Path::new("/nowhere/topology");
    fails(&mut network.client(nowhere), 1, &["/nowhere/topology", "--topology names"]);
}

#[test]
fn a_network_and_its_signatures() {
    let network = PaperNetwork::new(2);
    let file = network.file(network.document(7, -10, 1000));
    let key = network.authority.identity().to_string();
    let other = PaperNetwork::new(1).authority.identity().to_string();
    let show = |words: &[&str], authorities: &[&str]| {
        let mut command = mixsocks();
        command.args(words).arg("--topology").arg(&file);
        command.args(authorities.iter().flat_map(|key| ["--authority", key]));
        command
    };
    let status = run(&mut show(&["network", "status"], &[&key]));
    assert!(status.status.success(), "{status:?}");
    for word in ["network   paper, epoch 7", "mix 1", "mix 3", "gateway", "127.0.0.1:", "paper  "] {
        assert!(status.stdout.contains(word), "{word}: {status:?}");
    }
    let providers = run(&mut show(&["providers"], &[&key]));
    assert!(providers.stdout.contains(&network.provider.to_string()), "{providers:?}");
    // One of two is not more than half.
    fails(&mut show(&["providers"], &[&key, &other]), 1, &["1 of 2 needed authorities"]);
    let one = ["providers", "--signatures", "1"];
    fails(&mut show(&one, &[&key, &other]), 1, &["more than half of the authorities"]);
    fails(&mut show(&["providers"], &[]), 1, &["no authority is given", "--authority"]);
    fails(
        mixsocks().args(["network", "status"]),
        1,
        &["no network is given", "--directory", "--topology"],
    );
}

#[test]
fn settings_from_a_file() {
    let network = PaperNetwork::new(2);
    let file = network.file(network.document(1, -10, 1000));
    let data = network.folder.path().join("data");
    let init = run(mixsocks()
        .args(["client", "init", "--socks", "127.0.0.1:0", "--data-dir"])
        .arg(&data)
        .arg("--topology")
        .arg(&file)
        .arg("--authority")
        .arg(network.authority.identity().to_string()));
    assert!(init.status.success() && init.stdout.contains("config.toml"), "{init:?}");
    let config = data.join("config.toml");
    let client = || {
        let mut command = mixsocks();
        command.args(["client", "run", "--data-dir"]).arg(&data);
        command
    };
    // Everything else is in the file.
    fails(&mut client(), 1, &["gateway", "127.0.0.1:", "refused"]);
    fails(client().args(["--provider", "exit"]), 1, &["no provider \"exit\""]);
    let check = run(mixsocks().args(["config", "check"]).arg(&config));
    assert!(check.status.success(), "{check:?}");
    fails(mixsocks().args(["client", "init", "--data-dir"]).arg(&data), 1, &["is there already"]);

    let right = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, right.replace("\nsocks = ", "\nsokcs = ")).unwrap();
    let words = ["config.toml, line ", "no key sokcs", "did you mean socks?"];
    fails(&mut client(), 2, &words);
    fails(mixsocks().args(["config", "check"]).arg(&config), 1, &words);
    fails(mixsocks().args(["config", "check", "/nowhere.toml"]), 1, &["/nowhere.toml"]);
}

#[test]
fn an_older_topology() {
    let network = PaperNetwork::new(2);
    let file = network.file(network.document(8, -10, 1000));
    fails(&mut network.client(&file), 1, &["gateway"]);
    let file = network.file(network.document(7, -10, 1000));
    fails(&mut network.client(&file), 1, &["epoch 7", "epoch 8", "newest"]);
}

#[test]
fn a_topology_of_another_network() {
    let mut network = PaperNetwork::new(2);
    let file = network.file(network.document(8, -10, 1000));
    fails(&mut network.client(&file), 1, &["gateway"]);
    network.name = "cardboard";
    let file = network.file(network.document(9, -10, 1000));
    fails(&mut network.client(&file), 1, &["network \"cardboard\"", "\"paper\"", "--data-dir"]);
}

#[test]
fn an_unreachable_gateway() {
    let network = PaperNetwork::new(2);
    let file = network.file(network.document(1, -10, 1000));
    fails(&mut network.client(&file), 1, &["gateway", "127.0.0.1:", "refused"]);
}

#[test]
fn providers_that_cannot_be_used() {
    let network = PaperNetwork::new(2);
    let file = network.file(network.document(1, -10, 1000));
    let with = |provider: &str| {
        let mut command = network.client(&file);
        command.args(["--provider", provider]);
        command
    };
    fails(&mut with("papr"), 1, &["no provider \"papr\"", "did you mean \"paper\"?"]);
    fails(&mut with("exit"), 1, &["no provider \"exit\"", "has: paper"]);
    // The second choice is there, and what is wrong then is another thing.
    fails(&mut with("exit,paper"), 1, &["gateway", "127.0.0.1:", "refused"]);
    fails(&mut with("exit,door"), 1, &["no provider \"exit\"", "has: paper"]);
    let elsewhere = PaperNetwork::new(1).provider.to_string();
    fails(&mut with(&elsewhere), 1, &["not in this topology"]);
    let truncated = &elsewhere[..elsewhere.len() - 3];
    fails(&mut with(truncated), 2, &["the gateway of the address is wrong"]);

    let lonely = PaperNetwork::new(1);
    let file = lonely.file(lonely.document(1, -10, 1000));
    fails(&mut lonely.client(&file), 1, &["no gateway but the provider's own"]);
}

#[test]
fn damaged_files_in_the_data_directory() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let proxy = crate::process::Proxy::up(dir, &[]);
    drop(proxy);
    for (file, words) in [
        ("topology", &["topology", "delete it"][..]),
        ("provider/identity.key", &["provider/identity.key is damaged", "backup"]),
        ("client/token", &["client/token", "delete it"]),
    ] {
        let path = dir.join(file);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, "scribble").unwrap();
        fails(&mut up(dir), 1, words);
        std::fs::write(&path, good).unwrap();
    }
    crate::process::Proxy::up(dir, &[]);
}

#[cfg(unix)]
#[test]
fn keys_that_others_may_read() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    drop(crate::process::Proxy::up(folder.path(), &[]));
    let key = folder.path().join("authority.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    fails(&mut up(folder.path()), 1, &[&format!("chmod 600 {}", key.display())]);
}

#[test]
fn a_file_in_place_of_the_data_directory() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fails(&mut up(file.path()), 1, &["a file is in its place", "--data-dir"]);
}

#[cfg(unix)]
#[test]
fn a_data_directory_without_permission() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir().unwrap();
    let is_root = folder.path().metadata().unwrap().uid() == 0;
    let mode = std::fs::Permissions::from_mode(if is_root { 0o755 } else { 0o555 });
    std::fs::set_permissions(folder.path(), mode).unwrap();
    let mut command = up(&folder.path().join("data"));
    if is_root {
        // Nothing is forbidden to root.
        command.uid(NOBODY).gid(NOBODY);
        if command.get_program().to_str().is_some_and(|path| !open_to_all(Path::new(path))) {
            return skip("other users cannot run the program where it was built");
        }
    }
    fails(&mut command, 1, &["no permission", "--data-dir"]);
}

/// Whether every folder above a file lets every user through.
#[cfg(unix)]
fn open_to_all(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let passable = |path: &Path| path.metadata().is_ok_and(|m| m.permissions().mode() & 1 != 0);
    file.ancestors().filter(|path| !path.as_os_str().is_empty()).all(passable)
}

#[test]
fn a_full_data_directory() {
    const DISK_KIB: u32 = 8 * 1024;
    let Some(disk) = SmallDisk::mount(DISK_KIB) else {
        return skip("mounting a small disk is not permitted here");
    };
    let data_dir = disk.path().join("data");
    let filler = disk.path().join("filler");
    let fill = |kib: usize| {
        // The last bytes may find no room, which is what is wanted.
        let _ = std::fs::write(&filler, vec![1; kib * 1024]);
    };
    // Without room for a lock file, for the first keys, and for all that a start stores.
    for free_kib in [0, 16, 128] {
        fill(DISK_KIB as usize - free_kib);
        fails(&mut up(&data_dir), 1, &["no space left", "--data-dir"]);
    }
    std::fs::remove_file(&filler).unwrap();
    drop(crate::process::Proxy::up(&data_dir, &[]));
    fill(DISK_KIB as usize);
    fails(&mut up(&data_dir), 1, &["no space left", "--data-dir"]);
}

/// What operators of a network may get wrong.
#[test]
fn roles_of_a_network() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let key = PaperNetwork::new(1).authority.identity().to_string();
    let command = |words: &[&str]| {
        let mut command = mixsocks();
        command.args(words).arg("--data-dir").arg(folder.path().join("data"));
        command
    };
    let member = |role: &str, options: &[&str]| {
        let mut command = command(&[role, "run", "--directory", "http://127.0.0.1:9"]);
        command.args(["--authority", &key]).args(options);
        command
    };
    for role in ["node", "provider"] {
        let listen = if role == "node" { vec!["--listen", "127.0.0.1:0"] } else { vec![] };
        let words = [vec![role, "run"], listen.clone()].concat();
        fails(&mut command(&words), 1, &["no directory is given", "--directory"]);
        let words = [words, vec!["--directory", "http://127.0.0.1:9"]].concat();
        fails(&mut command(&words), 1, &["no authority is given", "--authority"]);
        let missing = path("missing");
        let options = [listen.clone(), vec!["--invitation", &missing]].concat();
        fails(&mut member(role, &options), 1, &["cannot read", "missing", "--invitation"]);
        let nonsense = path("nonsense");
        secret(&nonsense, "nonsense");
        let options = [listen, vec!["--invitation", &nonsense]].concat();
        fails(&mut member(role, &options), 1, &["nonsense", "holds no invitation"]);
    }
    let open = ["--listen", "0.0.0.0:0"];
    fails(&mut member("node", &open), 1, &["all addresses", "--address"]);
    let gateway = ["--kind", "gateway", "--listen", "127.0.0.1:0", "--client-listen", "0.0.0.0:0"];
    fails(&mut member("node", &gateway), 1, &["all addresses", "--client-address"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let busy = ["--listen", &taken];
    let busy_error = ["another program listens on", &taken, "--listen"];
    fails(&mut member("node", &busy), 1, &busy_error);

    let directory = |options: &[&str]| {
        let mut command = command(&["directory", "run", "--listen", "127.0.0.1:0"]);
        command.args(options);
        command
    };
    let short = ["--overlap", "1s"];
    fails(&mut directory(&short), 1, &["overlap_seconds is 1", "at least 240"]);
    let few = ["--minimum", "mix=2,gateway=1"];
    fails(&mut directory(&few), 1, &["at least 3 mixes and 1 gateway"]);
    let own = std::fs::read_to_string(folder.path().join("data/authority.key")).unwrap();
    assert!(!own.is_empty());
    let half = ["--peer", &format!("{key}@http://127.0.0.1:9"), "--signatures", "1"];
    fails(&mut directory(&half), 1, &["more than half of the authorities"]);

    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let file = folder.path().join("data/authority.key");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        let chmod = format!("chmod 600 {}", file.display());
        fails(&mut directory(&[]), 1, &["other users may read", &chmod]);
    }
}

/// Writes a file that its owner alone may read.
fn secret(path: &str, text: &str) {
    std::fs::write(path, text).unwrap();
    #[cfg(unix)]
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}
