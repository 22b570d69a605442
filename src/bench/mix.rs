//! `mixsocks bench mix`: packets through one mix, beside the same mix with the crate `sphinx-packet`.
//!
//! Each of the two mixes is a process of its own, so that its CPU time can be read. This process is
//! the gateway that sends to them and the mix of the next layer that takes what they pass on, over
//! loopback and with all that links do. Packets are built before the clock starts, have no delays,
//! and are all different, as replays are dropped. The two mixes take turns.

use std::fmt;
use std::io::{BufRead, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mixsocks_common::keys::{EncryptionKey, Identity, IdentityKey};
use mixsocks_common::topology::{
    Epochs, NetworkName, Node, Parameters, Role, Topology, UnixTime, sign, verify,
};
use mixsocks_node::counters::Counters;
use mixsocks_node::keys::SphinxKeys;
use mixsocks_node::link::{LinkContext, LinkListener, LinkPool};
use mixsocks_node::mix::{Mix, MixConfig};
use mixsocks_sphinx::{
    Backend, Hop, Packet, Peeled, Route, SecretKey, build_packets, finish, open_headers,
};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::child;
use crate::cli::BenchMixArgs;
use crate::signals::Signals;
use crate::{logging, topology_file};

const PAYLOAD_BYTES: usize = 2048;
/// How often each mix has its turn.
const ROUNDS: usize = 3;
/// Packets that set up the links before anything is measured.
const WARM_UP: usize = 200;
/// Packets under way at most: enough for full batches, and less than any queue of a mix drops.
const WINDOW: usize = 1024;
/// Packets that are built at a time.
const BUILT_AT_ONCE: usize = 32;
/// A mix that passes nothing on for so long has lost packets.
const PATIENCE: Duration = Duration::from_secs(20);
const TEXT: &[u8] = b"through a mix";

/// All figures.
#[derive(Debug, Serialize)]
struct Report {
    cpu: String,
    /// Of each turn of each mix.
    packets: usize,
    rounds: usize,
    ours: Figures,
    reference: Figures,
    ratio_per_second: f64,
    ratio_per_cpu_second: Option<f64>,
}

/// One mix: medians of its turns.
#[derive(Debug, Serialize)]
struct Figures {
    backend: String,
    packets_per_second: f64,
    /// Null where the system does not tell what a process has used.
    packets_per_cpu_second: Option<f64>,
}

/// Measures and prints.
pub(super) async fn run(args: &BenchMixArgs) -> Result<()> {
    let mut signals = Signals::new()?;
    let report = tokio::select! {
        report = Box::pin(measure(args.packets)) => report?,
        () = signals.next() => anyhow::bail!("interrupted"),
    };
    crate::say(&if args.json { serde_json::to_string(&report)? } else { report.to_string() });
    Ok(())
}

async fn measure(packets: usize) -> Result<Report> {
    let backends = [Backend::current(), Backend::Reference];
    let mut bench = Bench::start(backends).await?;
    let mut turns = [Vec::new(), Vec::new()];
    for mix in 0..backends.len() {
        bench.turn(mix, WARM_UP).await?;
    }
    for _ in 0..ROUNDS {
        for (mix, turns) in turns.iter_mut().enumerate() {
            turns.push(bench.turn(mix, packets).await?);
        }
    }
    let [ours, reference] = [0, 1].map(|mix| Figures::of(backends[mix], packets, &turns[mix]));
    Ok(Report {
        cpu: super::cpu_name(),
        packets,
        rounds: ROUNDS,
        ratio_per_second: ours.packets_per_second / reference.packets_per_second,
        ratio_per_cpu_second: ours
            .packets_per_cpu_second
            .zip(reference.packets_per_cpu_second)
            .map(|(ours, reference)| ours / reference),
        ours,
        reference,
    })
}

/// What one turn took.
#[derive(Clone, Copy, Debug)]
struct Turn {
    seconds: f64,
    cpu_seconds: Option<f64>,
}

/// The mixes, and both ends of the links to them.
struct Bench {
    /// The first field, so that nothing is said about parts that go one after the other.
    _intact: logging::Intact,
    mixes: Vec<MixProcess>,
    entry: LinkPool,
    _sink: LinkListener,
    arrivals: mpsc::Receiver<Packet>,
    sink_hop: Hop,
    sink_key: SecretKey,
}

impl Bench {
    async fn start(backends: [Backend; 2]) -> Result<Self> {
        let mut mixes = Vec::new();
        for backend in backends {
            mixes.push(MixProcess::start(backend).await?);
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let [entry_key, sink_identity, last_key] =
            [(); 3].map(|()| Arc::new(IdentityKey::generate(&mut rand::rng())));
        let sink_key = SecretKey::generate(&mut rand::rng());
        // A topology needs a gateway and a mix of the last layer; nobody dials them.
        let nowhere = [1, 2].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let [entry_sphinx, last_sphinx] = [(); 2].map(|()| SecretKey::generate(&mut rand::rng()));
        let node = |key: &IdentityKey, sphinx_key: &SecretKey, link_address, role| Node {
            identity: key.identity(),
            sphinx_key: sphinx_key.public_key().into(),
            next_sphinx_key: None,
            link_address,
            role,
        };
        let gateway = Role::Gateway { client_address: nowhere[0] };
        let mut nodes = vec![
            node(&entry_key, &entry_sphinx, nowhere[0], gateway),
            node(&sink_identity, &sink_key, address, Role::Mix { layer: 2 }),
            node(&last_key, &last_sphinx, nowhere[1], Role::Mix { layer: 3 }),
        ];
        nodes.extend(mixes.iter().map(|mix| mix.node.clone()));
        let topology = Arc::new(topology(nodes)?);
        for mix in &mut mixes {
            mix.join(&topology).await?;
        }
        let fixed = watch::channel(topology).1;
        let context = |key| LinkContext::new(key, fixed.clone(), Arc::<Counters>::default());
        let (sender, arrivals) = mpsc::channel(WINDOW);
        let sink_hop = hop(sink_identity.identity(), sink_key.public_key().into());
        Ok(Self {
            _intact: logging::Intact::new(),
            mixes,
            _sink: LinkListener::start(context(sink_identity), listener, sender)?,
            entry: LinkPool::start(context(entry_key))?,
            arrivals,
            sink_hop,
            sink_key,
        })
    }

    /// Sends `count` packets through a mix, and waits for all of them.
    async fn turn(&mut self, mix: usize, count: usize) -> Result<Turn> {
        let mut packets = self.build(mix, count).into_iter();
        let mix = &self.mixes[mix];
        let cpu_before = mix.cpu_seconds();
        let started = Instant::now();
        let mut under_way = 0;
        let mut arrived = Vec::new();
        loop {
            for packet in packets.by_ref().take(WINDOW - under_way) {
                self.entry.send(&mix.node.identity, packet);
                under_way += 1;
            }
            if under_way == 0 {
                break;
            }
            arrived.clear();
            let received = timeout(PATIENCE, self.arrivals.recv_many(&mut arrived, WINDOW))
                .await
                .with_context(|| format!("{under_way} packets do not arrive"))?;
            ensure!(received > 0, "the link from the mix has ended");
            under_way -= received;
        }
        let seconds = started.elapsed().as_secs_f64();
        let cpu_seconds = mix.cpu_seconds().zip(cpu_before).map(|(after, before)| after - before);
        // Nothing of it shows after a very short turn: the system counts hundredths of a second.
        let cpu_seconds = cpu_seconds.filter(|seconds| *seconds > 0.0);
        self.check(arrived)?;
        Ok(Turn { seconds, cpu_seconds })
    }

    fn build(&self, mix: usize, count: usize) -> Vec<Packet> {
        let node = &self.mixes[mix].node;
        let hops = [hop(node.identity, node.sphinx_key), self.sink_hop];
        let route = Route::new(&hops, [0; 32], [0; 16]).expect("two hops are a route");
        let requests = vec![(route, TEXT); BUILT_AT_ONCE];
        let mut packets = Vec::with_capacity(count);
        while packets.len() < count {
            let wanted = requests.len().min(count - packets.len());
            let built = build_packets(&mut rand::rng(), PAYLOAD_BYTES, &requests[..wanted]);
            packets.extend(built.into_iter().map(|built| built.expect("the text fits")));
        }
        packets
    }

    /// Whether the packets that arrived last are what they should be.
    fn check(&self, arrived: Vec<Packet>) -> Result<()> {
        let opened = open_headers(&self.sink_key, arrived).into_iter().collect::<Result<_, _>>()?;
        for peeled in finish(opened) {
            let is_right = match peeled? {
                Peeled::Final { payload, .. } => payload.into_plaintext()? == TEXT,
                Peeled::Forward { .. } => false,
            };
            ensure!(is_right, "a packet arrived changed");
        }
        Ok(())
    }
}

fn topology(nodes: Vec<Node>) -> Result<Topology> {
    let network = NetworkName::new("bench").expect("five letters are a name");
    let validity = UnixTime(0)..UnixTime(u64::MAX >> 1);
    let parameters = Parameters {
        payload_bytes: PAYLOAD_BYTES,
        mean_delay: Duration::ZERO,
        max_delay: Duration::ZERO,
        epochs: Epochs::STATIC,
    };
    Ok(Topology::new(network, 1, validity, parameters, nodes, Vec::new())?)
}

fn hop(identity: Identity, key: EncryptionKey) -> Hop {
    Hop { address: *identity.as_bytes(), key: key.public_key(), delay: Duration::ZERO }
}

/// A mix of layer 1 in a process of its own; killed when dropped, and it ends with this process.
struct MixProcess {
    child: Child,
    stdin: ChildStdin,
    node: Node,
    /// Where it keeps its key and its replay tags; the last field, so that the process goes first.
    _dir: tempfile::TempDir,
}

impl MixProcess {
    async fn start(backend: Backend) -> Result<Self> {
        let dir = tempfile::tempdir().context("there is no room for the replay tags of a mix")?;
        let mut command = child::command()?;
        command.args(["bench", "mix-process"]).current_dir(dir.path());
        command.env(Backend::VARIABLE, backend.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot start a mix")?;
        let stdin = child.stdin.take().context("the mix has no input")?;
        let stdout = child.stdout.take().context("the mix has no output")?;
        let mut line = String::new();
        timeout(PATIENCE, BufReader::new(stdout).read_line(&mut line))
            .await
            .context("the mix does not start")??;
        let node = parse_node(&line).context("the mix does not start")?;
        Ok(Self { child, stdin, node, _dir: dir })
    }

    /// Tells the mix what network it is in: one that this process makes up.
    async fn join(&mut self, topology: &Topology) -> Result<()> {
        let authority = IdentityKey::generate(&mut rand::rng());
        let document = sign(topology, &[&authority]);
        let head = format!("{} {}\n", authority.identity(), document.len());
        self.stdin.write_all(head.as_bytes()).await?;
        self.stdin.write_all(document.as_bytes()).await?;
        Ok(self.stdin.flush().await?)
    }

    fn cpu_seconds(&self) -> Option<f64> {
        child::cpu_seconds(self.child.id()?)
    }
}

/// What the process of a mix says first: identity, Sphinx key and address.
fn parse_node(line: &str) -> Option<Node> {
    let mut words = line.split_whitespace();
    Some(Node {
        identity: words.next()?.parse().ok()?,
        sphinx_key: words.next()?.parse().ok()?,
        next_sphinx_key: None,
        link_address: words.next()?.parse().ok()?,
        role: Role::Mix { layer: 1 },
    })
}

/// The process of a mix: says who it is, reads its topology, and runs until its input ends.
pub(super) async fn run_process() -> Result<()> {
    let identity = Arc::new(IdentityKey::generate(&mut rand::rng()));
    // Where its parent has started it.
    let data_dir = std::env::current_dir()?;
    let keys = Arc::new(SphinxKeys::open(&data_dir, Epochs::STATIC, topology_file::now())?);
    let key = keys.public_keys().into_values().next().context("the mix has no key")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address: SocketAddr = listener.local_addr()?;
    crate::say(&format!("{} {key} {address}", identity.identity()));
    let topology = Arc::new(tokio::task::spawn_blocking(read_topology).await??);
    let topology = watch::channel(topology).1;
    let mix = Mix::start(MixConfig { identity, keys, topology, listener, data_dir })?;
    let end = || std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    tokio::task::spawn_blocking(end).await??;
    mix.shutdown().await;
    Ok(())
}

fn read_topology() -> Result<Topology> {
    let mut stdin = std::io::stdin().lock();
    let mut head = String::new();
    stdin.read_line(&mut head)?;
    let (authority, len) = head.trim().split_once(' ').context("there is no topology")?;
    let mut document = vec![0; len.parse()?];
    stdin.read_exact(&mut document)?;
    let authorities = topology_file::only(authority.parse()?)?;
    Ok(verify(&document, &authorities, topology_file::now())?)
}

impl Figures {
    fn of(backend: Backend, packets: usize, turns: &[Turn]) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 packets")]
        let packets = packets as f64;
        let seconds = turns.iter().map(|turn| turn.seconds).collect();
        let cpu_seconds: Option<_> = turns.iter().map(|turn| turn.cpu_seconds).collect();
        Self {
            backend: backend.to_string(),
            packets_per_second: packets / median(seconds),
            packets_per_cpu_second: cpu_seconds.map(|seconds| packets / median(seconds)),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, packets, rounds, ours, reference, .. } = self;
        writeln!(f, "{cpu}, medians of {rounds} × {packets} packets")?;
        write!(f, "{:<16}{:>12}{:>12}{:>8}", "", ours.backend, reference.backend, "ratio")?;
        let mut row = |name, ours: f64, reference: f64| {
            let ratio = ours / reference;
            write!(f, "\n{name:<16}{ours:>12.0}{reference:>12.0}{ratio:>7.2}×")
        };
        row("packets/s", ours.packets_per_second, reference.packets_per_second)?;
        match (ours.packets_per_cpu_second, reference.packets_per_cpu_second) {
            (Some(ours), Some(reference)) => row("packets/CPU s", ours, reference),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_medians() {
        let turn = |seconds| Turn { seconds, cpu_seconds: Some(seconds / 2.0) };
        let figures = Figures::of(Backend::Portable, 100, &[turn(1.0), turn(50.0), turn(2.0)]);
        assert_eq!(figures.backend, "portable");
        assert_eq!(figures.packets_per_second, 50.0);
        assert_eq!(figures.packets_per_cpu_second, Some(100.0));
        let unknown = Turn { seconds: 1.0, cpu_seconds: None };
        let figures = Figures::of(Backend::Portable, 100, &[turn(1.0), unknown]);
        assert_eq!(figures.packets_per_cpu_second, None);
    }

    #[test]
    fn a_mix_that_says_something_else_is_none() {
        assert!(parse_node("").is_none());
        assert!(parse_node("error: no").is_none());
    }
}
