//! A mix: takes packets from the layer before, peels them, holds each for its own time, and passes
//! them on to the layer after.
//!
//! links → bounded queue → crypto workers ([`Peeler`]) → [`MixCore`] → [`LinkPool`]. A worker takes
//! whatever is queued, up to a small batch; when a stage is slow, the one before it waits, back to
//! the links.

#[cfg(test)]
mod change_tests;
mod core;
#[cfg(test)]
mod tests;

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::link::LinkError;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{Packet, Peeled};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

pub use self::core::{MAX_HELD_BYTES, MixCore};
use crate::clock::Clock;
use crate::counters::Counters;
use crate::keys::SphinxKeys;
use crate::link::{
    Impairment, LinkContext, LinkFailure, LinkListener, LinkPool, changed, sleep_until,
};
use crate::monitor::Monitor;
use crate::peel::{MAX_REPLAY_TAGS, Peeler};
use crate::replay_log::ReplayLogError;
use crate::upkeep::{Kind, Standing, Upkeep, sync_tags};

/// Packets between the links and the workers: what a core peels in some 100 ms. More would only
/// delay what the sender's clock has already judged lost. Of the largest packets they take 34 MB.
const INBOUND_QUEUE_PACKETS: usize = 1024;
/// Packets that a worker peels before it lets other tasks run: under 2 ms.
const PEEL_BATCH_PACKETS: usize = 32;
/// How long a mix that comes to its end passes on what it holds: more than nearly all delays.
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// How late tokio's timers are on average: they count whole milliseconds, and round up twice. A mix that waits
/// for them passes on what is due within that time, so that packets are held for as long as they ask on
/// average, and still leave together: of 12 mixes on two round trips each would add its millisecond.
const TIMER_LATENESS: Duration = Duration::from_millis(1);
/// Batches between the workers and the core, which never waits: room for all workers at once.
const PEELED_QUEUE_BATCHES: usize = 64;

/// What a mix needs.
#[derive(Debug)]
pub struct MixConfig {
    /// Who it is.
    pub identity: Arc<IdentityKey>,
    /// The keys of its layer of packets, opened with the epochs of the topology.
    pub keys: Arc<SphinxKeys>,
    /// The network as it is at any time; a sender that is gone means that it does not change.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// Where it takes links, already bound.
    pub listener: TcpListener,
    /// Where it keeps its replay tags; the directory must exist, and no other node may use it.
    pub data_dir: PathBuf,
}

/// Why a mix does not start.
#[derive(Debug, thiserror::Error)]
pub enum MixError {
    /// The topology says that this identity is a gateway.
    #[error("the topology has {0} as a gateway, not as a mix: is this the right identity?")]
    NotAMix(Identity),
    /// The replay tags cannot be read or stored.
    #[error(transparent)]
    ReplayLog(#[from] ReplayLogError),
    /// The links to other nodes cannot be set up.
    #[error("links cannot be set up: {0}")]
    Link(#[from] LinkFailure),
}

impl From<LinkError> for MixError {
    fn from(error: LinkError) -> Self {
        Self::Link(error.into())
    }
}

/// A running mix; dropping it stops it.
#[derive(Debug)]
pub struct Mix {
    keys: Arc<SphinxKeys>,
    peeler: Arc<Peeler>,
    counters: Arc<Counters>,
    listener: LinkListener,
    /// Whoever has packets in hand: each ends when no more can come.
    work: JoinSet<()>,
    tasks: JoinSet<()>,
    pool: Arc<LinkPool>,
}

impl Mix {
    /// Starts a mix, also one that the topology does not have yet. Blocks on the disk for as long
    /// as reading its replay tags takes.
    ///
    /// # Errors
    /// [`MixError`].
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(config: MixConfig) -> Result<Self, MixError> {
        Self::start_at(config, Clock::System, None)
    }

    /// As [`Self::start`], for a network under test: things happen to the packets that it sends.
    ///
    /// # Errors
    /// [`MixError`].
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start_impaired(
        config: MixConfig,
        impairment: watch::Receiver<Impairment>,
    ) -> Result<Self, MixError> {
        Self::start_at(config, Clock::System, Some(impairment))
    }

    pub(crate) fn start_at(
        config: MixConfig,
        clock: Clock,
        impairment: Option<watch::Receiver<Impairment>>,
    ) -> Result<Self, MixError> {
        let MixConfig { identity, keys, topology: mut documents, listener, data_dir } = config;
        let me = identity.identity();
        let topology = documents.borrow_and_update().clone();
        let standing =
            Standing::new(me, Kind::Mix, &topology).map_err(|_| MixError::NotAMix(me))?;
        let counters = Arc::new(Counters::default());
        let core = MixCore::new(&topology, &me, MAX_HELD_BYTES);
        let peeler = Peeler::open(keys.clone(), data_dir, MAX_REPLAY_TAGS, counters.clone())?;
        let peeler = Arc::new(peeler);
        let (in_use, used_topology) = watch::channel(topology.clone());
        let context = LinkContext::new(identity, used_topology.clone(), counters.clone());
        let context = context.impaired(impairment);
        let pool = Arc::new(LinkPool::start(context.clone())?);
        let (inbound, packets) = mpsc::channel(INBOUND_QUEUE_PACKETS);
        let (batches, peeled) = mpsc::channel(PEELED_QUEUE_BATCHES);
        let listener = LinkListener::start(context, listener, inbound)?;
        let (mut work, mut tasks) = (JoinSet::new(), JoinSet::new());
        let packets = Arc::new(Mutex::new(packets));
        let workers = std::thread::available_parallelism().map_or(1, NonZero::get);
        for _ in 0..workers {
            work.spawn(peel(packets.clone(), peeler.clone(), clock.clone(), batches.clone()));
        }
        drop(batches);
        work.spawn(hold(core, peeled, used_topology, pool.clone(), counters.clone()));
        tasks.spawn(sync_tags(peeler.clone()));
        let links = pool.clone();
        let use_topology = move |topology: &Arc<Topology>| {
            if let Err(error) = links.set_topology(topology) {
                warn!(%me, "not all links of the new topology can be set up: {error}");
            }
            in_use.send_replace(topology.clone());
        };
        let upkeep = Upkeep {
            standing,
            topology,
            documents,
            keys: keys.clone(),
            peeler: peeler.clone(),
            clock,
            use_topology,
        };
        tasks.spawn(upkeep.run());
        Ok(Self { keys, peeler, counters, listener, work, tasks, pool })
    }

    /// What it has counted since its start.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Waits until a part of it has ended by itself, which is a mistake in this program.
    pub async fn ended(&mut self) {
        tokio::select! {
            _ = self.work.join_next() => {}
            _ = self.tasks.join_next() => {}
        }
    }

    /// A look at it that outlives this value.
    pub fn monitor(&self) -> Monitor {
        let (counters, keys, peeler) =
            (self.counters.clone(), self.keys.clone(), self.peeler.clone());
        Monitor { counters, keys, peeler, store: None }
    }

    /// Takes no more packets, passes on those that it has, though not for longer than 5 s, and stops.
    pub async fn drain(mut self) {
        self.listener.shutdown().await;
        let passed_on = async {
            while self.work.join_next().await.is_some() {}
            self.pool.flushed().await;
        };
        // What is left is lost as with every stop.
        let _ = timeout(DRAIN_TIME, passed_on).await;
        self.work.shutdown().await;
        self.tasks.shutdown().await;
        if let Some(pool) = Arc::into_inner(self.pool) {
            pool.shutdown().await;
        }
    }

    /// Stops it, and returns when its links are closed. Packets that it holds are lost; their
    /// senders send them again.
    pub async fn shutdown(mut self) {
        self.listener.shutdown().await;
        self.work.shutdown().await;
        self.tasks.shutdown().await;
        if let Some(pool) = Arc::into_inner(self.pool) {
            pool.shutdown().await;
        }
    }
}

/// One crypto worker.
async fn peel(
    packets: Arc<Mutex<mpsc::Receiver<Packet>>>,
    peeler: Arc<Peeler>,
    clock: Clock,
    batches: mpsc::Sender<Vec<Peeled>>,
) {
    loop {
        let mut batch = Vec::with_capacity(PEEL_BATCH_PACKETS);
        let count = packets.lock().await.recv_many(&mut batch, PEEL_BATCH_PACKETS).await;
        if count == 0 {
            return;
        }
        let peeled = peeler.peel(clock.now(), batch);
        if !peeled.is_empty() && batches.send(peeled).await.is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Drives the core, until no more packets can come and it holds none.
async fn hold(
    mut core: MixCore,
    mut batches: mpsc::Receiver<Vec<Peeled>>,
    mut topology: watch::Receiver<Arc<Topology>>,
    pool: Arc<LinkPool>,
    counters: Arc<Counters>,
) {
    let mut may_come = true;
    while may_come || core.held() > 0 {
        let timeout = core.poll_timeout().map(|due| due.checked_sub(TIMER_LATENESS).unwrap_or(due));
        let batch = tokio::select! {
            batch = batches.recv(), if may_come => {
                may_come = batch.is_some();
                batch.unwrap_or_default()
            }
            () = sleep_until(timeout) => Vec::new(),
            () = changed(&mut topology) => {
                core.set_topology(&topology.borrow_and_update());
                continue;
            }
        };
        let now = tokio::time::Instant::now().into_std();
        for peeled in batch {
            if let Err(reason) = core.handle_peeled(now, peeled) {
                counters.add_drop(reason);
            }
        }
        while let Some((next_hop, packet)) = core.poll_transmit(now + TIMER_LATENESS) {
            pool.send(&next_hop, packet);
        }
    }
}
