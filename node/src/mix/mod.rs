//! A mix: takes packets from the layer before, peels them, holds each for its own time, and passes
//! them on to the layer after.
//!
//! links → bounded queue → crypto workers ([`Peeler`]) → [`MixCore`] → [`LinkPool`]. A worker takes
//! whatever is queued, up to a small batch; when a stage is slow, the one before it waits, back to
//! the links.

mod core;
#[cfg(test)]
mod tests;

use std::num::NonZero;
use std::sync::Arc;
use std::time::Instant;

use mixsocks_common::keys::IdentityKey;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{Packet, Peeled, SecretKey};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

pub use self::core::{MAX_HELD_BYTES, MixCore};
use crate::counters::Counters;
use crate::link::{LinkContext, LinkFailure, LinkListener, LinkPool};
use crate::peel::{MAX_REPLAY_TAGS, Peeler};

/// Packets between the links and the workers: what a core peels in some 100 ms. More would only
/// delay what the sender's clock has already judged lost. Of the largest packets they take 34 MB.
const INBOUND_QUEUE_PACKETS: usize = 1024;
/// Packets that a worker peels before it lets other tasks run: under 2 ms.
const PEEL_BATCH_PACKETS: usize = 32;
/// Batches between the workers and the core, which never waits: room for all workers at once.
const PEELED_QUEUE_BATCHES: usize = 64;

/// What a mix needs.
#[derive(Debug)]
pub struct MixConfig {
    /// Who it is.
    pub identity: Arc<IdentityKey>,
    /// The key of its layer of packets.
    pub sphinx_key: SecretKey,
    /// The network.
    pub topology: Arc<Topology>,
    /// Where it takes links, already bound.
    pub listener: TcpListener,
}

/// A running mix; dropping it stops it.
#[derive(Debug)]
pub struct Mix {
    counters: Arc<Counters>,
    listener: LinkListener,
    tasks: JoinSet<()>,
    pool: Arc<LinkPool>,
}

impl Mix {
    /// Starts a mix.
    ///
    /// # Errors
    /// [`LinkFailure`] when the TLS library refuses the identity key or the listener has no
    /// address.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(config: MixConfig) -> Result<Self, LinkFailure> {
        let MixConfig { identity, sphinx_key, topology, listener } = config;
        let counters = Arc::new(Counters::default());
        let core = MixCore::new(&topology, &identity.identity(), MAX_HELD_BYTES);
        let peeler = Peeler::new(sphinx_key, MAX_REPLAY_TAGS, counters.clone(), &mut rand::rng());
        let peeler = Arc::new(peeler);
        let context = LinkContext::new(identity, topology, counters.clone());
        let pool = Arc::new(LinkPool::start(context.clone())?);
        let (inbound, packets) = mpsc::channel(INBOUND_QUEUE_PACKETS);
        let (batches, peeled) = mpsc::channel(PEELED_QUEUE_BATCHES);
        let listener = LinkListener::start(context, listener, inbound)?;
        let mut tasks = JoinSet::new();
        let packets = Arc::new(Mutex::new(packets));
        let workers = std::thread::available_parallelism().map_or(1, NonZero::get);
        for _ in 0..workers {
            tasks.spawn(peel(packets.clone(), peeler.clone(), batches.clone()));
        }
        tasks.spawn(hold(core, peeled, pool.clone(), counters.clone()));
        Ok(Self { counters, listener, tasks, pool })
    }

    /// What it has counted since its start.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Stops it, and returns when its links are closed. Packets that it holds are lost; their
    /// senders send them again.
    pub async fn shutdown(mut self) {
        self.listener.shutdown().await;
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
    batches: mpsc::Sender<Vec<Peeled>>,
) {
    loop {
        let mut batch = Vec::with_capacity(PEEL_BATCH_PACKETS);
        let count = packets.lock().await.recv_many(&mut batch, PEEL_BATCH_PACKETS).await;
        if count == 0 {
            return;
        }
        let peeled = peeler.peel(batch);
        if !peeled.is_empty() && batches.send(peeled).await.is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Drives the core.
async fn hold(
    mut core: MixCore,
    mut batches: mpsc::Receiver<Vec<Peeled>>,
    pool: Arc<LinkPool>,
    counters: Arc<Counters>,
) {
    loop {
        let timeout = core.poll_timeout();
        let batch = tokio::select! {
            batch = batches.recv() => match batch {
                Some(batch) => batch,
                None => return,
            },
            () = sleep_until(timeout) => Vec::new(),
        };
        let now = tokio::time::Instant::now().into_std();
        for peeled in batch {
            if let Err(reason) = core.handle_peeled(now, peeled) {
                counters.add_drop(reason);
            }
        }
        while let Some((next_hop, packet)) = core.poll_transmit(now) {
            pool.send(&next_hop, packet);
        }
    }
}

/// Sleeps until then, or for ever.
async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
