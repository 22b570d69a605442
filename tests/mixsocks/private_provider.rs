//! A provider that serves only who has an access token.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use tempfile::TempDir;

use crate::process::{DEADLINE, Ended, Process, Proxy, mixsocks, run};
use crate::servers::serve;
use crate::socks;

const SERVED: u8 = 0;
const FORBIDDEN: u8 = 2;

/// An authority and its nodes on loopback addresses, and a provider that demands a token.
struct Network {
    dir: TempDir,
    directory: String,
    authority: String,
    provider: Option<Process>,
    _others: Vec<Process>,
}

impl Network {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = mixsocks();
        command.args(["directory", "init", "--listen", "127.0.0.1:0", "--private-addresses"]);
        command.args(["--invite", "mix=3,gateway=2,provider=1", "--data-dir"]);
        succeeded(&run(command.arg(dir.path().join("directory"))));
        let mut command = mixsocks();
        command.args(["directory", "run", "--data-dir"]).arg(dir.path().join("directory"));
        let process = Process::start(&mut command);
        let directory = process.wait_for("directory  ");
        let authority = std::fs::read_to_string(dir.path().join("directory/authority.pub"));
        let authority = authority.unwrap().trim().to_owned();
        let mut network =
            Self { dir, directory, authority, provider: None, _others: vec![process] };
        for kind in ["mix", "gateway"] {
            for number in 1..=if kind == "mix" { 3 } else { 2 } {
                let name = format!("{kind}-{number}");
                let mut command = network.member("node", &name);
                command.args(["--kind", kind, "--listen", "127.0.0.1:0"]);
                command.args(["--client-listen", "127.0.0.1:0"]);
                network._others.push(Process::start(&mut command));
            }
        }
        network
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of a role with a data directory of this name.
    fn command(&self, words: &[&str], name: &str) -> Command {
        let mut command = mixsocks();
        command.args(words).arg("--data-dir").arg(self.path(name));
        command.args(["--directory", &self.directory, "--authority", &self.authority]);
        command
    }

    fn member(&self, role: &str, name: &str) -> Command {
        let mut command = self.command(&[role, "run"], name);
        command.arg("--invitation").arg(self.path(&format!("directory/invite/{name}")));
        command
    }

    /// Starts the provider, in place of one that runs.
    fn start_provider(&mut self, options: &[&str]) {
        if let Some(process) = self.provider.take() {
            process.signal("TERM");
            succeeded(&process.wait());
        }
        let mut command = self.member("provider", "provider-1");
        let process = Process::start(command.arg("--allow-private").args(options));
        process.wait_for("It works once");
        self.provider = Some(process);
    }

    /// A new token of the provider, in a file for somebody.
    fn token(&self, name: &str) -> PathBuf {
        let mut command = mixsocks();
        command.args(["provider", "token", "--name", name, "--data-dir"]);
        let ended = run(command.arg(self.path("provider-1")));
        succeeded(&ended);
        let file = self.path(name);
        write_private(&file, &ended.stdout);
        file
    }

    fn client(&self, name: &str, token: Option<&Path>) -> Command {
        let mut command = self.command(&["client", "run", "--socks", "127.0.0.1:0"], name);
        if let Some(token) = token {
            command.arg("--access-token-file").arg(token);
        }
        command
    }

    /// The provider reads its tokens again.
    fn reload(&self) {
        self.provider.as_ref().unwrap().signal("HUP");
    }
}

fn succeeded(ended: &Ended) {
    assert!(ended.status.success(), "{ended:?}");
}

fn write_private(file: &Path, text: &str) {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.create_new(true).write(true).mode(0o600).open(file).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// A target that says what it hears.
fn echo() -> SocketAddr {
    serve(|mut stream| {
        let mut bytes = [0; 100];
        while let Ok(read @ 1..) = stream.read(&mut bytes) {
            if stream.write_all(&bytes[..read]).is_err() {
                return;
            }
        }
    })
}

fn code(proxy: &Proxy, target: SocketAddr) -> u8 {
    socks::reply_code(proxy.address, &socks::ip(target))
}

/// Asks until the reply has this code: what a signal asks for takes a moment.
fn wait_for_code(proxy: &Proxy, target: SocketAddr, expected: u8) {
    let deadline = Instant::now() + DEADLINE;
    while code(proxy, target) != expected {
        assert!(Instant::now() < deadline, "{expected} never comes");
    }
}

#[test]
fn friends_are_served_and_strangers_are_told_why_not() {
    let mut network = Network::start();
    succeeded(&run(&mut network.command(&["provider", "init"], "provider-1")));
    let friends = network.token("friends");
    network.start_provider(&["--require-token"]);
    let target = echo();

    let friend = Proxy::start(&mut network.client("friend", Some(&friends)));
    // Not all have the first document at once.
    wait_for_code(&friend, target, SERVED);
    let mut stream = socks::connect(friend.address, target);
    stream.write_all(b"hello").unwrap();
    let mut echoed = [0; 5];
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"hello");

    // What everybody can see.
    let mut command = mixsocks();
    command.args(["providers", "--directory", &network.directory]);
    let shown = run(command.args(["--authority", &network.authority]));
    assert!(shown.stdout.contains("asks for a token"), "{shown:?}");
    let ended = run(&mut network.client("nobody", None));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("--access-token-file"), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");

    // A token that the provider does not know is refused by it, which no waiting in vain looks like.
    let wrong = network.path("wrong");
    write_private(&wrong, &"1".repeat(32));
    let stranger = Proxy::start(&mut network.client("stranger", Some(&wrong)));
    for _ in 0..3 {
        assert_eq!(code(&stranger, target), FORBIDDEN);
    }
    stranger.process.signal("INT");
    let ended = stranger.process.wait();
    assert_eq!(ended.stderr.matches("does not know the access token").count(), 1, "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");

    // A new token counts once the provider has read it.
    let late = network.token("late");
    let newcomer = Proxy::start(&mut network.client("newcomer", Some(&late)));
    assert_eq!(code(&newcomer, target), FORBIDDEN);
    network.reload();
    wait_for_code(&newcomer, target, SERVED);
    stream.write_all(b"again").unwrap();
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"again", "others notice nothing");

    // One that was taken back counts no more, and what it opened ends.
    std::fs::remove_file(network.path("provider-1/tokens/friends")).unwrap();
    network.reload();
    let error = stream.read_exact(&mut echoed).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof));
    assert_eq!(code(&friend, target), FORBIDDEN);
    assert_eq!(code(&newcomer, target), SERVED);
}

/// The document says that no token is demanded, as the provider has changed its mind since.
#[test]
fn a_document_that_is_behind() {
    let mut network = Network::start();
    network.start_provider(&[]);
    let stranger = Proxy::start(&mut network.client("stranger", None));
    let target = echo();
    wait_for_code(&stranger, target, SERVED);

    let token = network.token("friends");
    network.start_provider(&["--require-token"]);
    wait_for_code(&stranger, target, FORBIDDEN);
    let friend = Proxy::start(&mut network.client("friend", Some(&token)));
    assert_eq!(code(&friend, target), SERVED);
    assert_eq!(code(&stranger, target), FORBIDDEN);
    stranger.process.signal("INT");
    let ended = stranger.process.wait();
    assert_eq!(ended.stderr.matches("give yours with --access-token-file").count(), 1, "{ended:?}");
}
