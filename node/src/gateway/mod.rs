//! A gateway: entry and inbox of its clients.
//!
//! Up: a client's packet goes to the mix of layer 1 that the client names, and to nobody else.
//! Down: a packet from layer 3 is peeled, and goes to the client that the packet names, and to
//! nobody else: links → bounded queue → crypto workers ([`Peeler`]) → the client's delivery. A
//! gateway holds no packet back. A packet that ends here holds a message: it is kept on the disk
//! until its client has confirmed it, and its sender gets an acknowledgement.
//!
//! - [`store`]: registrations and kept messages, on the disk.
//! - `messages`: what happens to message packets; `inbox`: what a connection is sent of them.
//! - `limits`: how often anybody may register.
//! - `clients`: who is connected, and what is held for whom.
//! - `login`: a connection up to WELCOME; `carrier`: from there on; `acceptor`: all of them.
//!
//! Nothing is logged or counted that tells a client from another.

mod acceptor;
mod carrier;
mod clients;
mod inbox;
mod limits;
mod login;
#[cfg(test)]
mod message_tests;
mod messages;
pub mod store;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::link::{LinkError, tls};
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{Packet, Peeled};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::warn;

use self::acceptor::Acceptor;
use self::carrier::Uplink;
use self::clients::Clients;
use self::login::Doorkeeper;
use self::messages::{Answers, FinalPacket, Messages};
use self::store::{GroupCommit, Limits, RedbStore, Statistics, Store, StoreError};
use crate::clock::Clock;
use crate::counters::Counters;
use crate::keys::SphinxKeys;
use crate::link::{Impairment, LinkContext, LinkFailure, LinkListener, LinkPool};
use crate::monitor::Monitor;
use crate::peel::{MAX_REPLAY_TAGS, Peeler};
use crate::replay_log::ReplayLogError;
use crate::upkeep::{Kind, Standing, Upkeep, sync_tags};

pub use self::acceptor::{MAX_HALF_OPEN, MAX_HALF_OPEN_PER_SITE, MAX_HALF_OPEN_PER_SOURCE};
pub use self::clients::{
    MAX_CLIENTS, MAX_CLIENTS_PER_SITE, MAX_CLIENTS_PER_SOURCE, MAX_HELD_BYTES_TOTAL,
};
pub use self::inbox::{InboxCore, ReadRequest};

/// Packets between the links and the workers: what a core peels in some 100 ms. More would only
/// delay what the sender's clock has already judged lost. Of the largest packets they take 34 MB.
const INBOUND_QUEUE_PACKETS: usize = 1024;
/// Packets that a worker peels before it lets other tasks run: under 2 ms.
const PEEL_BATCH_PACKETS: usize = 32;
/// How often expired packets and absent clients are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is taken down who is connected; what is kept of it is the day.
const CONNECTED_INTERVAL: Duration = Duration::from_secs(6 * 60 * 60);
/// How long clients have to take their farewell.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// What a gateway needs.
#[derive(Debug)]
pub struct GatewayConfig {
    /// Who it is.
    pub identity: Arc<IdentityKey>,
    /// The keys of its layer of packets, opened with the epochs of the topology.
    pub keys: Arc<SphinxKeys>,
    /// The network as it is at any time; a sender that is gone means that it does not change.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// Where it takes links from mixes of layer 3, already bound.
    pub link_listener: TcpListener,
    /// Where it takes clients, already bound.
    pub client_listener: TcpListener,
    /// Where it keeps [`store::FILE_NAME`] and its replay tags; the directory must exist, and no other
    /// node may use it.
    pub data_dir: PathBuf,
    /// How much it keeps.
    pub limits: Limits,
}

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The topology says that this identity is a mix.
    #[error("the topology has {0} as a mix, not as a gateway: is this the right identity?")]
    NotAGateway(Identity),
    /// The replay tags cannot be read or stored.
    #[error(transparent)]
    ReplayLog(#[from] ReplayLogError),
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The links to other nodes cannot be set up.
    #[error("links cannot be set up: {0}")]
    Link(#[from] LinkFailure),
    /// The listener for clients has no address.
    #[error("the listener for clients does not work: {0}")]
    Listener(#[source] std::io::Error),
}

impl From<LinkError> for GatewayError {
    fn from(error: LinkError) -> Self {
        Self::Link(error.into())
    }
}

/// A running gateway; dropping it stops it at once.
#[derive(Debug)]
pub struct Gateway {
    keys: Arc<SphinxKeys>,
    peeler: Arc<Peeler>,
    counters: Arc<Counters>,
    client_address: SocketAddr,
    links: LinkListener,
    tasks: JoinSet<()>,
    acceptor: JoinSet<()>,
    /// The one that writes into the store.
    writer: JoinSet<()>,
    store: Arc<dyn Store>,
    statistics: Arc<Statistics>,
    /// So that tests need not open as many connections as there are places, or may be registered.
    #[cfg(test)]
    clients: Arc<Clients>,
    #[cfg(test)]
    doorkeeper: Arc<Doorkeeper>,
    pool: Arc<LinkPool>,
    stop: watch::Sender<bool>,
    stop_writer: watch::Sender<bool>,
}

impl Gateway {
    /// Starts a gateway, also one that the topology does not have yet. Blocks on the disk for as
    /// long as reading its replay tags takes.
    ///
    /// # Errors
    /// [`GatewayError`].
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(config: GatewayConfig) -> Result<Self, GatewayError> {
        Self::start_at(config, Clock::System, None)
    }

    /// As [`Self::start`], for a network under test: things happen to the packets that it sends to mixes.
    ///
    /// # Errors
    /// [`GatewayError`].
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start_impaired(
        config: GatewayConfig,
        impairment: watch::Receiver<Impairment>,
    ) -> Result<Self, GatewayError> {
        Self::start_at(config, Clock::System, Some(impairment))
    }

    fn start_at(
        config: GatewayConfig,
        clock: Clock,
        impairment: Option<watch::Receiver<Impairment>>,
    ) -> Result<Self, GatewayError> {
        let me = config.identity.identity();
        let GatewayConfig { identity, keys, topology: mut documents, .. } = config;
        let topology = documents.borrow_and_update().clone();
        let standing = Standing::new(me, Kind::Gateway, &topology)
            .map_err(|_| GatewayError::NotAGateway(me))?;
        let store: Arc<dyn Store> = Arc::new(RedbStore::open(&config.data_dir, config.limits)?);
        let client_address = config.client_listener.local_addr().map_err(GatewayError::Listener)?;
        let counters = Arc::new(Counters::default());
        let data_dir = config.data_dir;
        let peeler = Peeler::open(keys.clone(), data_dir, MAX_REPLAY_TAGS, counters.clone())?;
        let peeler = Arc::new(peeler);
        let clients = Arc::new(Clients::new(topology.packet_bytes(), counters.clone()));
        let (in_use, used_topology) = watch::channel(topology.clone());
        let context = LinkContext::new(identity.clone(), used_topology, counters.clone());
        let context = context.impaired(impairment);
        let pool = Arc::new(LinkPool::start(context.clone())?);
        let (inbound, packets) = mpsc::channel(INBOUND_QUEUE_PACKETS);
        let links = LinkListener::start(context, config.link_listener, inbound)?;
        let tls = tls::gateway_server_config(&identity)?;
        let uplink = Arc::new(Uplink::new(pool.clone(), &topology, me, counters.clone()));
        let statistics = Arc::<Statistics>::default();
        let (changes, group_commit) =
            GroupCommit::at(store.clone(), statistics.clone(), clock.clone());
        let payload_bytes = topology.parameters.payload_bytes;
        let messages =
            Arc::new(Messages::new(store.clone(), changes, payload_bytes, counters.clone()));
        let (door, table) = (messages.clone(), clients.clone());
        let doorkeeper =
            Arc::new(Doorkeeper::new(me, &topology, tls, door, table, counters.clone()));
        let (stop, stopped) = watch::channel(false);
        let (stop_writer, writer_stopped) = watch::channel(false);

        let mut tasks = JoinSet::new();
        let packets = Arc::new(Mutex::new(packets));
        let workers = std::thread::available_parallelism().map_or(1, NonZero::get);
        for _ in 0..workers {
            tasks.spawn(peel(
                packets.clone(),
                peeler.clone(),
                clock.clone(),
                clients.clone(),
                messages.clone(),
                counters.clone(),
            ));
        }
        tasks.spawn(sync_tags(peeler.clone()));
        let to_mixes = uplink.clone();
        let use_topology = move |topology: &Arc<Topology>| {
            if let Err(error) = to_mixes.set_topology(topology) {
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
        tasks.spawn(sweep(clients.clone()));
        tasks.spawn(note_connected(clients.clone(), messages.clone()));
        let answers = Answers { uplink: uplink.clone(), clients: clients.clone(), payload_bytes };
        let mut writer = JoinSet::new();
        writer.spawn(group_commit.run(writer_stopped, move |batch| answers.handle(batch)));
        let mut acceptor = JoinSet::new();
        let acceptance = Acceptor::new(doorkeeper.clone(), uplink, messages, stopped);
        acceptor.spawn(acceptance.run(config.client_listener));
        Ok(Self {
            keys,
            peeler,
            counters,
            client_address,
            links,
            tasks,
            acceptor,
            writer,
            store,
            statistics,
            #[cfg(test)]
            clients,
            #[cfg(test)]
            doorkeeper,
            pool,
            stop,
            stop_writer,
        })
    }

    /// What it has counted since its start.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Waits until a part of it has ended by itself, which is a mistake in this program.
    pub async fn ended(&mut self) {
        tokio::select! {
            _ = self.tasks.join_next() => {}
            _ = self.acceptor.join_next() => {}
            _ = self.writer.join_next() => {}
        }
    }

    /// A look at it that outlives this value.
    pub fn monitor(&self) -> Monitor {
        Monitor {
            counters: self.counters.clone(),
            keys: self.keys.clone(),
            peeler: self.peeler.clone(),
            store: Some((self.store.clone(), self.statistics.clone())),
        }
    }

    /// Where it takes clients.
    pub fn client_address(&self) -> SocketAddr {
        self.client_address
    }

    /// Says goodbye to the clients, stores what waits for that, passes on what clients have sent, and
    /// stops; returns when all connections and files are closed. Packets that are held for clients
    /// are lost, messages are not.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        // Stragglers are cut off below.
        let _ = timeout(SHUTDOWN_TIMEOUT, self.acceptor.join_next()).await;
        self.acceptor.shutdown().await;
        self.stop_writer.send_replace(true);
        let _ = timeout(SHUTDOWN_TIMEOUT, self.writer.join_next()).await;
        self.writer.shutdown().await;
        let _ = timeout(SHUTDOWN_TIMEOUT, self.pool.flushed()).await;
        self.links.shutdown().await;
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
    clients: Arc<Clients>,
    messages: Arc<Messages>,
    counters: Arc<Counters>,
) {
    loop {
        let mut batch = Vec::with_capacity(PEEL_BATCH_PACKETS);
        let count = packets.lock().await.recv_many(&mut batch, PEEL_BATCH_PACKETS).await;
        if count == 0 {
            return;
        }
        let peeled = peeler.peel(clock.now(), batch);
        let now = Instant::now().into_std();
        let mut ends_here = Vec::new();
        for peeled in peeled {
            match peeled {
                Peeled::Forward { next_hop, packet, .. } => {
                    if let Err(reason) = clients.deliver(&next_hop, packet, now) {
                        counters.add_drop(reason);
                    }
                }
                Peeled::Final { destination, identifier, payload } => {
                    ends_here.push(FinalPacket { destination, identifier, payload });
                }
            }
        }
        messages.handle_packets(ends_here);
        tokio::task::yield_now().await;
    }
}

async fn sweep(clients: Arc<Clients>) {
    let mut ticks = interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        clients.handle_timeout(Instant::now().into_std());
    }
}

/// Who is connected is not silent, however long ago the login was.
async fn note_connected(clients: Arc<Clients>, messages: Arc<Messages>) {
    let mut ticks = interval(CONNECTED_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        clients.connected().into_iter().for_each(|client| messages.changes.note_login(client));
    }
}
