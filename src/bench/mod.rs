//! `mixsocks bench`: latency, throughput, CPU and memory of a whole network, end to end.
//!
//! The network is a child process, or one for each role, so that its CPU time and memory are its own
//! and not those of the measuring side. Every byte that arrives is compared with what was sent.
//!
//! `mixsocks bench sphinx` measures packets alone, `mixsocks bench mix` a mix with its links, `mixsocks
//! bench messages` messages through a gateway, and `mixsocks bench soak` whether a network stays whole under traffic and faults.

mod child;
mod messages;
mod mix;
mod network;
mod origin;
mod report;
mod soak;
mod sphinx;
mod transfer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::child::Memory;
use self::network::{Member, Town, Up};
use self::origin::Origin;
use self::report::{AtOnce, BusyFirstByte, FirstByte, Page, Report, RoleFigures, Throughput};
use self::transfer::{Connection, Direction, PATIENCE, Transfer};
use crate::cli::{BenchArgs, BenchCommand, Row};
use crate::network::DEFAULT_MEAN_DELAY;
use crate::open_files;
use crate::signals::Signals;

/// Tiny requests; enough for a 95th percentile.
const REQUESTS: usize = 50;
/// Streams of the parallel measurement.
const STREAMS: usize = 10;
/// A bulk download runs for so long before tiny requests go beside it.
const RAMP_UP: Duration = Duration::from_secs(2);
/// A page, as browsers load it: so many objects of that size over so many connections.
const PAGE_OBJECTS: usize = 50;
const PAGE_OBJECT_BYTES: u64 = 20 * 1024;
const PAGE_CONNECTIONS: usize = 6;
/// Connections at once, and what each downloads.
const FEW_AT_ONCE: usize = 200;
const MANY_AT_ONCE: usize = 1000;
const AT_ONCE_BYTES: u64 = 10 * 1024;
/// What takes a second or less is measured several times.
const RUNS: usize = 3;
/// How long the rest of a network is measured: the system counts hundredths of a second.
const IDLE: Duration = Duration::from_secs(10);
/// After a transfer the network still carries what it had taken over. It has come to rest when it
/// works for less than [`AT_REST`] of a [`SETTLING`]; longer than [`MAX_SETTLING`] nobody waits.
const SETTLING: Duration = Duration::from_millis(500);
const MAX_SETTLING: Duration = Duration::from_secs(10);
const AT_REST: f64 = 0.05;

/// Measures and prints.
pub(crate) async fn run(args: BenchArgs) -> Result<()> {
    match args.command {
        Some(BenchCommand::Sphinx(args)) => return sphinx::run(&args),
        Some(BenchCommand::Mix(args)) => return mix::run(&args).await,
        Some(BenchCommand::Messages(args)) => return messages::run(&args).await,
        Some(BenchCommand::Soak(args)) => return soak::run(&args).await,
        Some(BenchCommand::MixProcess) => return mix::run_process().await,
        None => {}
    }
    let mut signals = Signals::new()?;
    let report = tokio::select! {
        report = Box::pin(measure(&args)) => report?,
        () = signals.next() => bail!("interrupted"),
    };
    crate::say(&if args.json { serde_json::to_string(&report)? } else { report.to_string() });
    Ok(())
}

/// A network that was started to be measured.
enum Network {
    Up(Box<Up>),
    Town(Box<Town>),
}

impl Network {
    async fn start(args: &BenchArgs) -> Result<Self> {
        Ok(match args.processes {
            true => Self::Town(Box::new(Town::start(args.traffic, 1).await?)),
            false => Self::Up(Box::new(Up::start(args.traffic, args.optimistic).await?)),
        })
    }

    fn proxy(&self) -> Result<SocketAddr> {
        match self {
            Self::Up(up) => Ok(up.proxy()),
            Self::Town(town) => town.proxy(),
        }
    }

    fn members(&self) -> Vec<Member> {
        match self {
            Self::Up(up) => up.members(),
            Self::Town(town) => town.members(),
        }
    }
}

async fn measure(args: &BenchArgs) -> Result<Report> {
    open_files::raise_limit();
    let progress = progress_bar(args);
    progress.set_message("starting");
    let started = Instant::now();
    let network = match args.socks {
        Some(_) => None,
        None => Some(Box::pin(Network::start(args)).await?),
    };
    let start_seconds = network.as_ref().map(|_| started.elapsed().as_secs_f64());
    let (proxy, members) = match (&args.socks, &network) {
        (Some(address), _) => (*address, args.pids.iter().copied().map(Member::of_id).collect()),
        (None, Some(network)) => (network.proxy()?, network.members()),
        (None, None) => bail!("there is no proxy to measure"),
    };
    let origin = Origin::start().await?;
    let duration = Duration::from_secs(args.seconds);
    let bench = Bench { proxy, origin, duration, members, progress };
    let traffic = args.socks.is_none().then_some(args.traffic);
    let mut report = Report {
        profile: traffic.map(|traffic| traffic.timing.profile.to_string()),
        mean_delay_ms: traffic
            .map(|traffic| traffic.mean_delay.unwrap_or(DEFAULT_MEAN_DELAY).as_secs_f64() * 1e3),
        start_seconds,
        roles: bench.members.iter().map(|member| RoleFigures::of(&member.name)).collect(),
        ..Report::default()
    };
    // The first request also sets up the session.
    transfer::tiny(proxy, bench.origin.address()).await?;
    for row in rows(args) {
        bench.measure(row, &mut report).await?;
        bench.progress.inc(1);
    }
    bench.add_memory(&mut report).await;
    bench.progress.finish_and_clear();
    Ok(report)
}

/// The rows that are asked for.
fn rows(args: &BenchArgs) -> impl Iterator<Item = Row> {
    use clap::ValueEnum;
    let all = Row::value_variants().iter().copied();
    all.filter(|row| args.only.is_empty() || args.only.contains(row))
}

/// The CPU as the system calls it, or else only its architecture.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name).to_owned()
}

/// Shown on a terminal only.
fn progress_bar(args: &BenchArgs) -> ProgressBar {
    let bar = ProgressBar::new(rows(args).count() as u64);
    let style = ProgressStyle::with_template("{bar:20} {pos}/{len} {msg} ({elapsed})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

struct Bench {
    proxy: SocketAddr,
    origin: Origin,
    duration: Duration,
    /// Of a proxy that was there before, those that are known.
    members: Vec<Member>,
    progress: ProgressBar,
}

impl Bench {
    async fn measure(&self, row: Row, report: &mut Report) -> Result<()> {
        use Direction::{Down, Up};
        match row {
            Row::FirstByte => {
                self.progress.set_message("time to first byte");
                report.first_byte = Some(FirstByte::of(&mut self.first_bytes().await?));
            }
            Row::Down => report.down = Some(self.throughput("one stream down", Down, 1).await?),
            Row::Up => report.up = Some(self.throughput("one stream up", Up, 1).await?),
            Row::TenDown => {
                report.ten_down = Some(self.throughput("ten streams down", Down, STREAMS).await?);
            }
            Row::TenUp => {
                report.ten_up = Some(self.throughput("ten streams up", Up, STREAMS).await?);
            }
            Row::BusyFirstByte => report.busy_first_byte = Some(self.busy_first_byte().await?),
            Row::Page => report.page = Some(self.page().await?),
            Row::Connections => {
                report.connections = Some(self.at_once("connections", FEW_AT_ONCE, RUNS).await?);
            }
            Row::Streams => {
                report.streams = Some(self.at_once("streams", MANY_AT_ONCE, 1).await?);
            }
            Row::Idle => self.add_idle(report).await,
        }
        self.settle().await;
        Ok(())
    }

    /// Each from opening the connection to the proxy until the first byte of the answer, one after
    /// the other.
    async fn first_bytes(&self) -> Result<Vec<Duration>> {
        let mut times = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            times.push(transfer::tiny(self.proxy, self.origin.address()).await?);
        }
        Ok(times)
    }

    /// The same while a bulk download runs.
    async fn busy_first_byte(&self) -> Result<BusyFirstByte> {
        self.progress.set_message("time to first byte beside a download");
        let bytes = AtomicU64::new(0);
        let requests = async {
            sleep(RAMP_UP).await;
            let (before, started) = (bytes.load(Ordering::Relaxed), Instant::now());
            let mut times = self.first_bytes().await?;
            let downloaded = bytes.load(Ordering::Relaxed) - before;
            ensure!(downloaded > 0, "nothing of the download arrived beside the requests");
            Ok(BusyFirstByte::of(&mut times, downloaded, started.elapsed()))
        };
        tokio::select! {
            broken = transfer::endless(self.proxy, self.origin.address(), &bytes) => match broken? {},
            times = requests => times,
        }
    }

    /// Several streams at once in one direction.
    async fn throughput(
        &self,
        name: &'static str,
        direction: Direction,
        streams: usize,
    ) -> Result<Throughput> {
        self.progress.set_message(name);
        let cpu_before = self.cpu_seconds();
        let started = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..streams {
            let transfer = Transfer {
                proxy: self.proxy,
                origin: self.origin.clone(),
                direction,
                duration: self.duration,
            };
            tasks.spawn(transfer.run());
        }
        let mut done = Vec::with_capacity(streams);
        while let Some(joined) = tasks.join_next().await {
            done.push(joined?.context(name)?);
        }
        let seconds = started.elapsed().as_secs_f64();
        ensure!(
            done.iter().any(|moved| moved.bytes > 0),
            "{name}: nothing arrived in {seconds:.0} s"
        );
        let cpu_seconds = self.cpu_since(cpu_before.as_ref());
        let names = self.members.iter().map(|member| member.name.clone());
        let cpu_seconds = cpu_seconds.map(|used| names.zip(used).collect());
        Ok(Throughput::of(&done, seconds, cpu_seconds))
    }

    /// A page, several times.
    async fn page(&self) -> Result<Page> {
        self.progress.set_message("a page");
        let mut runs = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let started = Instant::now();
            let page = self.load_page();
            timeout(PATIENCE, page).await.context("a page takes more than a minute")??;
            runs.push(started.elapsed());
            self.settle().await;
        }
        Ok(Page::of(&mut runs, PAGE_OBJECTS, PAGE_OBJECT_BYTES, PAGE_CONNECTIONS))
    }

    /// Opens all connections at once; each takes the next object when it has one.
    async fn load_page(&self) -> Result<()> {
        let taken = Arc::new(AtomicUsize::new(0));
        let mut connections = JoinSet::new();
        for _ in 0..PAGE_CONNECTIONS {
            let (proxy, origin, taken) = (self.proxy, self.origin.address(), taken.clone());
            connections.spawn(async move {
                let mut connection = Connection::open(proxy, origin).await?;
                while taken.fetch_add(1, Ordering::Relaxed) < PAGE_OBJECTS {
                    connection.get(PAGE_OBJECT_BYTES).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(joined) = connections.join_next().await {
            joined?.context("a page")?;
        }
        Ok(())
    }

    /// Connections that are opened at once, and a small download over each.
    async fn at_once(&self, name: &'static str, connections: usize, runs: usize) -> Result<AtOnce> {
        self.progress.set_message(name);
        let mut times = Vec::with_capacity(runs);
        let mut failures = Vec::new();
        for _ in 0..runs {
            let started = Instant::now();
            let mut tasks = JoinSet::new();
            for _ in 0..connections {
                tasks.spawn(one_of_many(self.proxy, self.origin.address()));
            }
            while let Some(joined) = tasks.join_next().await {
                match joined? {
                    Ok(()) => {}
                    Err(error) if error.is::<transfer::WrongBytes>() => return Err(error),
                    Err(error) => failures.push(format!("{error:#}")),
                }
            }
            times.push(started.elapsed());
            self.settle().await;
        }
        Ok(AtOnce::of(&mut times, connections, AT_ONCE_BYTES, failures))
    }

    /// CPU of the network when nothing is asked of it, in percent of one core.
    async fn add_idle(&self, report: &mut Report) {
        self.progress.set_message("idle");
        let before = self.cpu_seconds();
        let started = Instant::now();
        sleep(IDLE).await;
        let Some(used) = self.cpu_since(before.as_ref()) else { return };
        let percent = |used: f64| 100.0 * used / started.elapsed().as_secs_f64();
        report.idle_cpu_percent = Some(percent(used.iter().sum()));
        for (role, used) in report.roles.iter_mut().zip(used) {
            role.idle_cpu_percent = Some(percent(used));
        }
    }

    /// Memory of the network after all that it has carried.
    async fn add_memory(&self, report: &mut Report) {
        for (role, member) in report.roles.iter_mut().zip(&self.members) {
            role.memory = member.memory();
            role.replay_tags = member.replay_tags().await;
        }
        let sum = |part: fn(&Memory) -> f64| {
            let parts: Option<Vec<_>> =
                report.roles.iter().map(|role| role.memory.as_ref().map(part)).collect();
            parts.filter(|parts| !parts.is_empty()).map(|parts| parts.iter().sum())
        };
        report.resident_mib = sum(|memory| memory.resident_mib);
        report.peak_resident_mib = sum(|memory| memory.peak_resident_mib);
    }

    /// Waits until what was measured last is over.
    async fn settle(&self) {
        let started = Instant::now();
        while started.elapsed() < MAX_SETTLING {
            let before = self.cpu_seconds();
            sleep(SETTLING).await;
            let Some(used) = self.cpu_since(before.as_ref()) else { return };
            if used.iter().sum::<f64>() < AT_REST * SETTLING.as_secs_f64() {
                return;
            }
        }
    }

    /// CPU time that each process has used; `None` if the system does not tell, or none is known.
    fn cpu_seconds(&self) -> Option<Vec<f64>> {
        let used: Option<Vec<_>> = self.members.iter().map(Member::cpu_seconds).collect();
        used.filter(|used| !used.is_empty())
    }

    fn cpu_since(&self, before: Option<&Vec<f64>>) -> Option<Vec<f64>> {
        let now = self.cpu_seconds()?;
        Some(now.iter().zip(before?).map(|(now, before)| now - before).collect())
    }
}

/// One of the connections that are opened at once.
async fn one_of_many(proxy: SocketAddr, origin: SocketAddr) -> Result<()> {
    let download = async {
        let mut connection = Connection::open(proxy, origin).await?;
        connection.get(AT_ONCE_BYTES).await
    };
    timeout(PATIENCE, download).await.context("a download takes more than a minute")?
}
