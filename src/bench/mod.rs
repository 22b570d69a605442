//! `mixsocks bench`: latency, throughput, CPU and memory of a whole network, end to end.
//!
//! The network is a child process, so that its CPU time and memory are its own and not those of
//! the measuring side. Every byte that arrives is compared with what was sent.
//!
//! `mixsocks bench sphinx` measures packets alone, `mixsocks bench mix` a mix with its links.

mod child;
mod mix;
mod origin;
mod report;
mod sphinx;
mod transfer;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use self::child::Network;
use self::origin::Origin;
use self::report::{FirstByte, Report, Throughput};
use self::transfer::{Direction, Transfer};
use crate::cli::{BenchArgs, BenchCommand};
use crate::network::DEFAULT_MEAN_DELAY;
use crate::signals::Signals;

/// Tiny requests; enough for a 95th percentile.
const REQUESTS: usize = 20;
/// Streams of the parallel measurement.
const STREAMS: usize = 10;
/// How long the rest of a network is measured.
const IDLE: Duration = Duration::from_secs(5);
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

async fn measure(args: &BenchArgs) -> Result<Report> {
    let progress = progress_bar();
    progress.set_message("starting");
    let started = Instant::now();
    let network = match args.socks {
        Some(_) => None,
        None => Some(Network::start(args.traffic).await?),
    };
    let start_seconds = network.as_ref().map(|_| started.elapsed().as_secs_f64());
    let proxy = match (&args.socks, &network) {
        (Some(address), _) => *address,
        (None, Some(network)) => network.proxy(),
        (None, None) => bail!("there is no proxy to measure"),
    };
    let bench = Bench {
        proxy,
        origin: Origin::start().await?,
        duration: Duration::from_secs(args.seconds),
        network,
        progress,
    };
    let first_byte = bench.first_byte().await?;
    let down = bench.throughput("one stream down", Direction::Down, 1).await?;
    let up = bench.throughput("one stream up", Direction::Up, 1).await?;
    let ten_down = bench.throughput("ten streams down", Direction::Down, STREAMS).await?;
    let ten_up = bench.throughput("ten streams up", Direction::Up, STREAMS).await?;
    let idle_cpu_percent = bench.idle().await?;
    let memory = bench.network.as_ref().and_then(Network::memory);
    bench.progress.finish_and_clear();
    if let Some(network) = bench.network {
        network.stop().await?;
    }
    let traffic = args.socks.is_none().then_some(args.traffic);
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        profile: traffic.map(|traffic| traffic.timing.profile.to_string()),
        mean_delay_ms: traffic
            .map(|traffic| traffic.mean_delay.unwrap_or(DEFAULT_MEAN_DELAY).as_secs_f64() * 1e3),
        start_seconds,
        first_byte,
        down,
        up,
        ten_down,
        ten_up,
        idle_cpu_percent,
        resident_mib: memory.map(|memory| memory.resident_mib),
        peak_resident_mib: memory.map(|memory| memory.peak_resident_mib),
    })
}

/// The CPU as the system calls it, or else only its architecture.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name).to_owned()
}

/// Shown on a terminal only.
fn progress_bar() -> ProgressBar {
    const STEPS: u64 = 6;
    let bar = ProgressBar::new(STEPS);
    let style = ProgressStyle::with_template("{bar:20} {pos}/{len} {msg} ({elapsed})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

struct Bench {
    proxy: SocketAddr,
    origin: Origin,
    duration: Duration,
    network: Option<Network>,
    progress: ProgressBar,
}

impl Bench {
    /// From opening the connection to the proxy until the first byte of the answer.
    async fn first_byte(&self) -> Result<FirstByte> {
        self.progress.set_message("time to first byte");
        let request = || transfer::tiny(self.proxy, self.origin.address());
        request().await?; // The first one also sets up the session.
        let mut times = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            times.push(request().await?);
        }
        self.progress.inc(1);
        Ok(FirstByte::of(&mut times))
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
        let mut tasks = tokio::task::JoinSet::new();
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
        let cpu_seconds = self.cpu_seconds().zip(cpu_before).map(|(after, before)| after - before);
        self.settle().await;
        self.progress.inc(1);
        Ok(Throughput::of(&done, seconds, cpu_seconds))
    }

    /// CPU of the network when nothing is asked of it, in percent of one core.
    async fn idle(&self) -> Result<Option<f64>> {
        self.progress.set_message("idle");
        if self.network.is_none() {
            return Ok(None);
        }
        let before = self.cpu_seconds();
        let started = Instant::now();
        tokio::time::sleep(IDLE).await;
        let used = self.cpu_seconds().zip(before).map(|(after, before)| after - before);
        self.progress.inc(1);
        Ok(used.map(|seconds| 100.0 * seconds / started.elapsed().as_secs_f64()))
    }

    /// Waits until what was measured last is over.
    async fn settle(&self) {
        let started = Instant::now();
        while started.elapsed() < MAX_SETTLING {
            let before = self.cpu_seconds();
            tokio::time::sleep(SETTLING).await;
            let Some((after, before)) = self.cpu_seconds().zip(before) else { return };
            if after - before < AT_REST * SETTLING.as_secs_f64() {
                return;
            }
        }
    }

    fn cpu_seconds(&self) -> Option<f64> {
        self.network.as_ref().and_then(Network::cpu_seconds)
    }
}
