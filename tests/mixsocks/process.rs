//! The program under test as a child process.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::servers::NameServer;

/// Longer than anything takes in an unoptimised build on a slow and busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(600);

/// The program, without the variables that would change what it does.
pub(crate) fn mixsocks() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mixsocks"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MIXSOCKS_") {
            command.env_remove(name);
        }
    }
    command
}

/// Says that a test cannot be run here. Where everything that tests need is meant to be there, as in
/// `.ci/run`, that is a failure.
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os("MIXSOCKS_TEST_NO_SKIP").is_none(), "not to be skipped: {why}");
    println!("skipped: {why}");
}

/// `mixsocks up` on a free port.
pub(crate) fn up(data_dir: &Path) -> Command {
    let mut command = mixsocks();
    command.args(["up", "--socks", "127.0.0.1:0"]).arg("--data-dir").arg(data_dir);
    command
}

/// A child and what it has written so far; killed when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: Text,
    stderr: Text,
}

/// How a child ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::try_start(command).unwrap()
    }

    pub(crate) fn try_start(command: &mut Command) -> std::io::Result<Self> {
        Self::spawn(command.stdin(Stdio::null()))
    }

    /// A child that is typed to.
    pub(crate) fn try_start_typing(command: &mut Command) -> std::io::Result<(Self, ChildStdin)> {
        let mut process = Self::spawn(command.stdin(Stdio::piped()))?;
        let stdin = process.child.stdin.take().unwrap();
        Ok((process, stdin))
    }

    fn spawn(command: &mut Command) -> std::io::Result<Self> {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = Text::collect(child.stdout.take().unwrap());
        let stderr = Text::collect(child.stderr.take().unwrap());
        Ok(Self { child, stdout, stderr })
    }

    /// Sends a signal, such as `INT`, to this very process.
    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end.
    pub(crate) fn wait(mut self) -> Ended {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let stdout = self.stdout.to_the_end(deadline);
                let stderr = self.stderr.to_the_end(deadline);
                return Ended { status, stdout, stderr };
            }
            assert!(Instant::now() < deadline, "no end; stderr: {}", self.stderr.so_far());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How much memory it has.
    #[cfg(target_os = "linux")]
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// What it has written to stderr so far.
    pub(crate) fn stderr_so_far(&self) -> String {
        self.stderr.so_far()
    }

    /// Waits until stdout holds `word`, and returns what follows it on its line.
    pub(crate) fn wait_for(&self, word: &str) -> String {
        self.stdout.wait_for(word).unwrap_or_else(|| {
            panic!("no {word:?} on stdout; stderr: {}", self.stderr.so_far());
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails when it has ended already, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Ended {
    Process::start(command).wait()
}

/// What a pipe has delivered so far.
#[derive(Clone)]
struct Text(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    text: String,
    ended: bool,
}

impl Text {
    fn collect(pipe: impl Read + Send + 'static) -> Self {
        let text = Self(Arc::default());
        let shared = text.clone();
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while pipe.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                shared.0.0.lock().unwrap().text.push_str(&String::from_utf8_lossy(&line));
                shared.0.1.notify_all();
                line.clear();
            }
            shared.0.0.lock().unwrap().ended = true;
            shared.0.1.notify_all();
        });
        text
    }

    fn so_far(&self) -> String {
        self.0.0.lock().unwrap().text.clone()
    }

    /// `None` when the pipe ended, or the deadline came, before the word.
    fn wait_for(&self, word: &str) -> Option<String> {
        let after_word = |collected: &Collected| {
            let (_, rest) = collected.text.split_once(word)?;
            let (line, _) = rest.split_once('\n')?;
            Some(line.to_owned())
        };
        let (lock, changed) = &*self.0;
        let waiting =
            |collected: &mut Collected| after_word(collected).is_none() && !collected.ended;
        let guard = lock.lock().unwrap();
        let (guard, _) = changed.wait_timeout_while(guard, DEADLINE, waiting).unwrap();
        after_word(&guard)
    }

    fn to_the_end(&self, deadline: Instant) -> String {
        let (lock, changed) = &*self.0;
        let left = deadline.saturating_duration_since(Instant::now());
        let guard = lock.lock().unwrap();
        let (guard, _) = changed.wait_timeout_while(guard, left, |c| !c.ended).unwrap();
        guard.text.clone()
    }
}

/// A running `mixsocks up` or `mixsocks client`, ready for use.
pub(crate) struct Proxy {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    /// The provider's address, as it was printed.
    pub(crate) provider: String,
    /// The client's address, as it was printed.
    pub(crate) client: String,
}

impl Proxy {
    /// `mixsocks up` on a free port, with these further options.
    pub(crate) fn up(data_dir: &Path, options: &[&str]) -> Self {
        Self::start(up(data_dir).args(options))
    }

    /// Starts a command that prints where its proxy listens.
    pub(crate) fn start(command: &mut Command) -> Self {
        let process = Process::start(command);
        let provider = process.wait_for("provider  ");
        let client = process.wait_for("client    ");
        let address = process.wait_for("socks5h://").parse().unwrap();
        process.wait_for("Ctrl-C stops");
        Self { process, address, provider, client }
    }

    /// `curl` through this proxy; `None`, with a line that says so, when there is no `curl`.
    pub(crate) fn curl(&self, arguments: &[&str]) -> Option<Process> {
        let mut command = Command::new("curl");
        // -q first: no settings from the user's own file.
        command.args(["-q", "--silent", "--show-error", "--max-time"]);
        command.arg(DEADLINE.as_secs().to_string());
        command.args(["--socks5-hostname", &self.address.to_string()]).args(arguments);
        for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
            command.env_remove(name).env_remove(name.to_uppercase());
        }
        match Process::try_start(&mut command) {
            Ok(curl) => Some(curl),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                skip("curl is not installed");
                None
            }
            Err(error) => panic!("curl does not start: {error}"),
        }
    }
}

/// A network with `--allow-private` and its own name server, shared by the tests that run at the
/// same time; it ends with the last of them.
pub(crate) struct SharedNetwork {
    pub(crate) proxy: Proxy,
    pub(crate) name_server: NameServer,
    pub(crate) data_dir: TempDir,
}

pub(crate) fn shared_network() -> Arc<SharedNetwork> {
    static SHARED: Mutex<Weak<SharedNetwork>> = Mutex::new(Weak::new());
    // A test that failed to start it has poisoned the lock, not the value.
    let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(network) = shared.upgrade() {
        return network;
    }
    let data_dir = tempfile::tempdir().unwrap();
    let name_server = NameServer::start();
    let dns = name_server.address().to_string();
    let proxy = Proxy::up(data_dir.path(), &["--allow-private", "--dns", &dns]);
    let network = Arc::new(SharedNetwork { proxy, name_server, data_dir });
    *shared = Arc::downgrade(&network);
    network
}
