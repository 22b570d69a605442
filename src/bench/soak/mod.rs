//! `mixsocks bench soak`: a network of processes under mixed traffic and random faults.
//!
//! Two mixes of each layer, so that there is a way around one. Every byte is compared, and every
//! stream has a deadline. One fault at a time:
//!
//! | fault | what a stream may notice |
//! |---|---|
//! | a mix killed and started again | a pause |
//! | a gateway killed and started again, the client's or the provider's | a pause |
//! | the client stopped for seconds | a pause |
//! | the provider killed and started again | an end with an error, never wrong bytes |
//!
//! While a fault lasts, and for [`GRACE`] after it, new streams may be refused in the words of
//! SOCKS.
//!
//! In the second half only mixes with odd numbers are killed, so that the memory of all others can be
//! compared over a time in which they were not started anew.

mod faults;
mod memory;
mod report;
mod traffic;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use self::faults::{Faults, History};
use self::memory::Watch;
use self::report::Report;
use self::traffic::Worker;
use super::network::Town;
use super::origin::Origin;
use crate::cli::BenchSoakArgs;
use crate::open_files;
use crate::signals::Signals;

/// Mixes of each layer.
const MIXES_PER_LAYER: u8 = 2;
/// Streams at once.
const WORKERS: u64 = 16;
/// A stream that takes longer is stuck. Bulk streams are a few MiB, and share what a busy machine
/// carries with fifteen others; the longest fault adds some ten seconds.
const DEADLINE: Duration = Duration::from_secs(180);
/// How long after a fault new streams may be refused, and after a restart of the provider those of
/// its last life may end with an error: a client waits that long for a gateway.
const GRACE: Duration = Duration::from_secs(30);
/// How often memory is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Runs, prints, and fails if something was wrong.
pub(super) async fn run(args: &BenchSoakArgs) -> Result<()> {
    let seed = args.seed.unwrap_or_else(rand::random);
    let mut signals = Signals::new()?;
    if !args.json {
        crate::say(&format!("seed {seed}"));
    }
    let report = tokio::select! {
        report = Box::pin(soak(args, seed)) => report?,
        () = signals.next() => bail!("interrupted (seed {seed})"),
    };
    crate::say(&if args.json { serde_json::to_string(&report)? } else { report.to_string() });
    let complaints = report.complaints();
    ensure!(complaints.is_empty(), "{} (seed {seed})", complaints.join("; "));
    Ok(())
}

/// A soak that runs.
struct Soak {
    faults: Faults,
    memory: Watch,
    report: Arc<Mutex<Report>>,
    started: Instant,
    duration: Duration,
}

async fn soak(args: &BenchSoakArgs, seed: u64) -> Result<Report> {
    open_files::raise_limit();
    let duration = args.duration();
    let town = Box::pin(Town::start(args.traffic, MIXES_PER_LAYER)).await?;
    let (proxy, origin) = (town.proxy()?, Origin::start().await?);
    // The first request also sets up the session.
    super::transfer::tiny(proxy, origin.address()).await?;
    let history = Arc::new(History::default());
    let rng = StdRng::seed_from_u64(seed);
    let faults = Faults::new(town, rng, history.clone(), duration).await?;
    let mut memory = Watch::default();
    memory.start(faults.town()).await;
    let report = Arc::new(Mutex::new(Report::new(seed, duration)));
    let mut soak = Soak { faults, memory, report, started: Instant::now(), duration };
    let end = soak.started + duration;
    let mut workers = JoinSet::new();
    for number in 1..=WORKERS {
        let rng = StdRng::seed_from_u64(seed.wrapping_add(number));
        let worker = Worker::new(proxy, origin.address(), rng, history.clone(), duration);
        let (report, started) = (soak.report.clone(), soak.started);
        workers.spawn(worker.run(end, move |kind, outcome| {
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.add(kind, outcome, started.elapsed());
        }));
    }
    soak.run().await?;
    while let Some(worker) = workers.join_next().await {
        worker?;
    }
    soak.memory.end(soak.faults.town()).await;
    let report = Arc::into_inner(soak.report).and_then(|report| report.into_inner().ok());
    let Some(mut report) = report else { bail!("the report is still in use") };
    report.faults = history.counts();
    report.memory = soak.memory.into_roles(duration);
    Ok(report)
}

impl Soak {
    /// Lets things go wrong until the time is over.
    async fn run(&mut self) -> Result<()> {
        let (half, end) = (self.started + self.duration / 2, self.started + self.duration);
        loop {
            let next = Instant::now() + self.faults.pause();
            while Instant::now() < next.min(end) {
                sleep_until(next.min(end).min(Instant::now() + LOOK_INTERVAL)).await;
                self.memory.look(self.faults.town(), self.passed()).await;
            }
            if Instant::now() >= end {
                return Ok(());
            }
            if let Some(name) = self.faults.inflict(Instant::now() >= half).await? {
                self.memory.forget(&name, self.passed());
            }
        }
    }

    /// Which part of the time has passed.
    fn passed(&self) -> f64 {
        self.started.elapsed().as_secs_f64() / self.duration.as_secs_f64()
    }
}
