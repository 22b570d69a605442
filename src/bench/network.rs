//! The network that is measured: all of it in one process, as `mixsocks up` runs it; each role as a
//! process of its own; or one that was there before, of which only the processes are known.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::RngExt;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use super::child::{self, Memory, Process, START_TIME, command};
use crate::cli::TrafficArgs;
use crate::network::{DEFAULT_MEAN_DELAY, DEFAULT_PAYLOAD_BYTES};

/// A measured process, whoever has started it.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) name: String,
    id: u32,
    /// Where it serves its metrics.
    metrics: Option<SocketAddr>,
}

impl Member {
    /// A process that somebody else has started.
    pub(super) fn of_id(id: u32) -> Self {
        let name = child::program_name(id).unwrap_or_else(|| "process".to_owned());
        Self { name: format!("{name}-{id}"), id, metrics: None }
    }

    /// CPU time that it has used; `None` where the system does not tell.
    pub(super) fn cpu_seconds(&self) -> Option<f64> {
        child::cpu_seconds(self.id)
    }

    /// Its memory; `None` where the system does not tell.
    pub(super) fn memory(&self) -> Option<Memory> {
        child::memory(self.id)
    }

    /// How many packets it remembers; `None` if it is no node.
    pub(super) async fn replay_tags(&self) -> Option<u64> {
        let metrics = http_get(self.metrics?, "/metrics").await.ok()??;
        metrics.lines().find_map(|line| line.strip_prefix("mixsocks_replay_tags "))?.parse().ok()
    }
}

/// A whole network in one process.
pub(super) struct Up {
    process: Process,
    proxy: SocketAddr,
    /// The last field, so that the process goes first.
    dir: TempDir,
}

impl Up {
    /// Starts it and waits until its proxy listens.
    pub(super) async fn start(traffic: TrafficArgs, optimistic: bool) -> Result<Self> {
        let dir = temporary_directory()?;
        let mut command = command()?;
        command.args(["up", "--socks", "127.0.0.1:0", "--allow-private"]);
        command.arg("--data-dir").arg(dir.path());
        command.arg("--profile").arg(traffic.timing.profile.to_string());
        if optimistic {
            command.arg("--optimistic");
        }
        if let Some(mean_delay) = traffic.mean_delay {
            command.arg("--mean-delay").arg(words(mean_delay));
        }
        if let Some(payload_bytes) = traffic.payload_bytes {
            command.arg("--payload-bytes").arg(payload_bytes.to_string());
        }
        let mut process = Process::start(&mut command)?;
        let proxy = process.wait_for("socks5h://").await.context("the network does not start")?;
        Ok(Self { process, proxy: proxy.parse()?, dir })
    }

    /// Where its proxy listens.
    pub(super) fn proxy(&self) -> SocketAddr {
        self.proxy
    }

    /// Where its keys, its topology and the stores of its gateways are.
    pub(super) fn data_dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its only process.
    pub(super) fn members(&self) -> Vec<Member> {
        let member = |id| Member { name: "up".to_owned(), id, metrics: None };
        self.process.id().map(member).into_iter().collect()
    }
}

const DIRECTORY: &str = "directory";
pub(super) const PROVIDER: &str = "provider";
pub(super) const CLIENT: &str = "client";
const GATEWAYS: u8 = 2;
const LAYERS: u8 = 3;

const DIRECTORY_PORT: u16 = 9000;
const LINK_PORT: u16 = 9001;
const CLIENT_PORT: u16 = 9002;
const METRICS_PORT: u16 = 9300;
const PROXY_PORT: u16 = 1080;

/// How often somebody is asked who does not yet do its work, and how long an answer may take.
const ASK_INTERVAL: Duration = Duration::from_millis(50);
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Longer answers are cut: those of a node have some 4 KiB.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// A network of separate processes, as `docs/operators.md` makes it: an authority, mixes, two
/// gateways, a provider and a client, each on a loopback address of its own.
pub(super) struct Town {
    traffic: TrafficArgs,
    mixes: u8,
    /// The second and third number of the addresses.
    place: [u8; 2],
    authority: String,
    running: BTreeMap<String, Process>,
    /// The last field, so that the processes go first.
    dir: TempDir,
}

impl Town {
    /// Starts all, and returns when all do their work.
    pub(super) async fn start(traffic: TrafficArgs, mixes_per_layer: u8) -> Result<Self> {
        let mut rng = rand::rng();
        // Others that run at the same time have, almost surely, another place.
        let place = [rng.random_range(64..192), rng.random()];
        let mut town = Self {
            traffic,
            mixes: LAYERS * mixes_per_layer,
            place,
            authority: String::new(),
            running: BTreeMap::new(),
            dir: temporary_directory()?,
        };
        town.found().await?;
        town.launch(DIRECTORY)?;
        town.wait_for(DIRECTORY, "http://").await?;
        let members: Vec<_> = town.mixes().chain(gateways()).chain([PROVIDER.to_owned()]).collect();
        for name in members.iter().map(String::as_str).chain([CLIENT]) {
            town.launch(name)?;
        }
        for name in members.iter().map(String::as_str).chain([CLIENT]) {
            town.wait_healthy(name).await?;
        }
        town.wait_for(CLIENT, "socks5h://").await?;
        Ok(town)
    }

    /// Makes the authority's keys and the invitations.
    async fn found(&mut self) -> Result<()> {
        let (mixes, listen) = (self.mixes, self.address(DIRECTORY, DIRECTORY_PORT)?);
        let mut command = command()?;
        command.args(["directory", "init", "--private-addresses"]);
        command.args(["--invite", &format!("mix={mixes},gateway={GATEWAYS},provider=1")]);
        command.args(["--listen", &listen.to_string()]);
        let TrafficArgs { mean_delay, payload_bytes, .. } = self.traffic;
        command.args(["--mean-delay", &words(mean_delay.unwrap_or(DEFAULT_MEAN_DELAY))]);
        let payload_bytes = payload_bytes.unwrap_or(DEFAULT_PAYLOAD_BYTES);
        command.args(["--payload-bytes", &payload_bytes.to_string()]);
        command.arg("--data-dir").arg(self.folder(DIRECTORY));
        let made = command.output().await.context("cannot start an authority")?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr).trim());
        let key = std::fs::read_to_string(self.folder(DIRECTORY).join("authority.pub"))?;
        self.authority = key.trim().to_owned();
        Ok(())
    }

    /// Where the proxy listens.
    pub(super) fn proxy(&self) -> Result<SocketAddr> {
        self.address(CLIENT, PROXY_PORT)
    }

    /// Its processes that run, in the order of their names.
    pub(super) fn members(&self) -> Vec<Member> {
        let member = |(name, process): (&String, &Process)| {
            let metrics = self.address(name, METRICS_PORT).ok();
            process.id().map(|id| Member { name: name.clone(), id, metrics })
        };
        self.running.iter().filter_map(member).collect()
    }

    /// Names of the mixes.
    pub(super) fn mixes(&self) -> impl Iterator<Item = String> + use<> {
        (1..=self.mixes).map(|number| format!("mix-{number}"))
    }

    /// Name of the gateway that the provider uses; once.
    pub(super) async fn providers_gateway(&mut self) -> Result<String> {
        let identity = std::fs::read_to_string(self.folder(PROVIDER).join("gateway"))?;
        for name in gateways() {
            // The first line that it has written.
            if self.wait_for(&name, "gateway  ").await?.starts_with(identity.trim()) {
                return Ok(name);
            }
        }
        bail!("the provider has a gateway that nobody knows")
    }

    /// Kills one of them without a warning.
    pub(super) async fn kill(&mut self, name: &str) -> Result<()> {
        let process = self.running.remove(name).with_context(|| format!("{name} does not run"))?;
        process.kill().await
    }

    /// Starts one of them again, and waits until it does its work.
    pub(super) async fn restart(&mut self, name: &str) -> Result<()> {
        self.launch(name)?;
        self.wait_healthy(name).await
    }

    /// Sends one of them a signal, such as `STOP`.
    pub(super) async fn signal(&self, name: &str, signal: &str) -> Result<()> {
        let id = self.running.get(name).and_then(Process::id);
        let id = id.with_context(|| format!("{name} does not run"))?;
        // Without unsafe code only another program can send it; every shell has this one built in.
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("kill -s {signal} {id}")]);
        let status = shell.status().await.context("cannot start sh")?;
        ensure!(status.success(), "{name} cannot be sent {signal}");
        Ok(())
    }

    fn launch(&mut self, name: &str) -> Result<()> {
        let mut command = self.command(name)?;
        let process = Process::start(&mut command).with_context(|| name.to_owned())?;
        self.running.insert(name.to_owned(), process);
        Ok(())
    }

    async fn wait_for(&mut self, name: &str, word: &str) -> Result<String> {
        let process = self.running.get_mut(name).with_context(|| format!("{name} does not run"))?;
        process.wait_for(word).await.with_context(|| name.to_owned())
    }

    async fn wait_healthy(&self, name: &str) -> Result<()> {
        let address = self.address(name, METRICS_PORT)?;
        let deadline = Instant::now() + START_TIME;
        loop {
            // Nobody listens at first.
            if let Ok(Some(_)) = http_get(address, "/healthz").await {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{name} does not come to do its work");
            sleep(ASK_INTERVAL).await;
        }
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = command()?;
        match name {
            DIRECTORY => {
                command.args(["directory", "run"]);
            }
            CLIENT => {
                command.args(["client", "run", "--socks", &self.proxy()?.to_string()]);
                command.arg("--profile").arg(self.traffic.timing.profile.to_string());
                self.add_network(&mut command)?;
            }
            PROVIDER => {
                command.args(["provider", "run", "--allow-private"]);
                self.add_network(&mut command)?.arg("--invitation").arg(self.invitation(name));
            }
            node => {
                let kind = node.split('-').next().unwrap_or(node);
                command.args(["node", "run", "--kind", kind]);
                command.args(["--listen", &self.address(node, LINK_PORT)?.to_string()]);
                command.args(["--client-listen", &self.address(node, CLIENT_PORT)?.to_string()]);
                self.add_network(&mut command)?.arg("--invitation").arg(self.invitation(name));
            }
        }
        command.args(["--metrics", &self.address(name, METRICS_PORT)?.to_string()]);
        command.arg("--data-dir").arg(self.folder(name));
        Ok(command)
    }

    /// Adds where the network's documents are, and who signs them.
    fn add_network<'a>(&self, command: &'a mut Command) -> Result<&'a mut Command> {
        let url = format!("http://{}", self.address(DIRECTORY, DIRECTORY_PORT)?);
        Ok(command.args(["--directory", &url, "--authority", &self.authority]))
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn invitation(&self, name: &str) -> PathBuf {
        let file = if name == PROVIDER { "provider-1" } else { name };
        self.folder(DIRECTORY).join("invite").join(file)
    }

    fn address(&self, name: &str, port: u16) -> Result<SocketAddr> {
        let last = match name.split_once('-') {
            None if name == DIRECTORY => 1,
            None if name == PROVIDER => 2,
            None if name == CLIENT => 3,
            Some(("gateway", number)) => 10 + number.parse::<u8>()?,
            Some(("mix", number)) => 20 + number.parse::<u8>()?,
            _ => bail!("there is no {name}"),
        };
        let [second, third] = self.place;
        Ok((Ipv4Addr::new(127, second, third, last), port).into())
    }
}

/// Names of the gateways.
pub(super) fn gateways() -> impl Iterator<Item = String> {
    (1..=GATEWAYS).map(|number| format!("gateway-{number}"))
}

fn temporary_directory() -> Result<TempDir> {
    tempfile::tempdir().context("cannot make a temporary directory")
}

fn words(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// What a role answers to a request; `None` if it does not say 200.
async fn http_get(address: SocketAddr, path: &str) -> Result<Option<String>> {
    let answer = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER_BYTES).read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = timeout(ANSWER_TIME, answer).await.context("no answer")??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let status = head.split_whitespace().nth(1);
    Ok((status == Some("200")).then(|| body.to_owned()))
}
