//! The dialling end: one long-lived connection to each node that this one may send to.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use mixsocks_common::keys::Identity;
use mixsocks_common::link::redial::{CONNECT_TIMEOUT, Failure, STABLE_AFTER};
use mixsocks_common::link::{LinkError, Redial, tls};
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::Packet;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{
    Instant, Interval, MissedTickBehavior, interval_at, sleep, sleep_until, timeout,
};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::{debug, info, warn};

use super::connection::{Connection, Incoming, within};
use super::impairment::impair;
use super::{DIAL_PATIENCE, LinkContext, LinkFailure, SETUP_TIMEOUT, changed, prepare};
use crate::counters::{Counters, DropReason};

/// Bytes of packets that may wait for one neighbour, whatever the network's packets measure: 4,376
/// of the usual ones, some hundred milliseconds of what a node can peel, and 316 of the largest.
/// What would wait longer is late anyway.
pub const LINK_QUEUE_BYTES: usize = 10 * 1024 * 1024;
/// How often it is looked whether all is written, when a node comes to its end.
const FLUSH_POLL: Duration = Duration::from_millis(20);
/// Packets per write: 32 of them fill five TLS records; more would bring nothing.
const WRITE_PACKETS: usize = 32;

/// The links to all neighbours of a node.
///
/// They are dialled at once, so that the first packet does not wait and a wrong neighbour shows
/// early, and again when they end, with back-off. While a neighbour is dialled for the first time
/// or just after its link ended, packets wait for it in its queue; from the first failure until it
/// is back they are dropped. What was written to a connection that then broke is lost uncounted.
/// Dropping the pool closes all links.
#[derive(Debug)]
pub struct LinkPool {
    neighbours: Arc<Neighbours>,
    context: LinkContext,
    queue_packets: usize,
    /// Under test: whereto all packets go first.
    impaired: Option<mpsc::Sender<(Identity, Packet)>>,
    /// One for each neighbour, and those that are just ending.
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Debug)]
struct Neighbours {
    /// Locked for a look-up, or while neighbours change; never across an await.
    by_identity: RwLock<BTreeMap<Identity, Neighbour>>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Neighbour {
    queue: mpsc::Sender<Packet>,
    is_down: Arc<AtomicBool>,
    address: watch::Sender<SocketAddr>,
    task: AbortHandle,
}

impl LinkPool {
    /// Starts to dial all neighbours that the context's topology has now.
    ///
    /// # Errors
    /// [`LinkError`] when the TLS library refuses the node's key.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(context: LinkContext) -> Result<Self, LinkError> {
        let topology = context.topology.borrow().clone();
        let counters = context.counters.clone();
        let neighbours = Arc::new(Neighbours { by_identity: RwLock::default(), counters });
        let queue_packets = LINK_QUEUE_BYTES / topology.packet_bytes();
        let mut tasks = JoinSet::new();
        let impaired = context.impairment.clone().map(|impairment| {
            let (impaired, packets) = mpsc::channel(queue_packets);
            let (links, counts) = (neighbours.clone(), neighbours.clone());
            let deliver = move |to: &Identity, packet| links.send(to, packet);
            let drop_one = move |reason| counts.counters.add_drop(reason);
            tasks.spawn(impair(impairment, packets, queue_packets, deliver, drop_one));
            impaired
        });
        let tasks = Mutex::new(tasks);
        let pool = Self { neighbours, queue_packets, context, impaired, tasks };
        pool.set_topology(&topology)?;
        Ok(pool)
    }

    /// Makes the neighbours those of another topology. New ones are dialled. Those that are none any
    /// more are closed, and what waits for them is dropped and counted. Those that have moved are
    /// dialled again, and what waits for them still does. The others notice nothing.
    ///
    /// # Errors
    /// [`LinkError`] when the TLS library refuses the node's key.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn set_topology(&self, topology: &Topology) -> Result<(), LinkError> {
        let role = topology.node(&self.context.me).map(|me| me.role);
        let wanted: BTreeMap<_, _> = topology
            .nodes()
            .iter()
            .filter(|node| role.is_some_and(|role| role.may_forward_to(node.role)))
            .map(|node| (node.identity, node.link_address))
            .collect();
        // A panic inside leaves neighbours that are in order, if not all of them.
        let by_identity = &self.neighbours.by_identity;
        let mut neighbours = by_identity.write().unwrap_or_else(PoisonError::into_inner);
        neighbours.retain(|identity, neighbour| {
            let stays = wanted.contains_key(identity);
            if !stays {
                neighbour.task.abort();
            }
            stays
        });
        for (identity, address) in wanted {
            match neighbours.entry(identity) {
                Entry::Vacant(entry) => {
                    entry.insert(self.dial(identity, address)?);
                }
                Entry::Occupied(entry) => {
                    entry
                        .get()
                        .address
                        .send_if_modified(|old| std::mem::replace(old, address) != address);
                }
            }
        }
        Ok(())
    }

    /// Starts the task of a neighbour.
    fn dial(&self, peer: Identity, address: SocketAddr) -> Result<Neighbour, LinkError> {
        let (queue, packets) = mpsc::channel(self.queue_packets);
        let is_down = Arc::new(AtomicBool::new(false));
        let (address, dialled_address) = watch::channel(address);
        let dialler = Dialler {
            tls: tls::node_client_config(&self.context.key, peer)?,
            peer,
            address: dialled_address,
            context: self.context.clone(),
            packets,
            is_down: is_down.clone(),
        };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        let task = tasks.spawn(dialler.run());
        Ok(Neighbour { queue, is_down, address, task })
    }

    /// Queues a packet for a neighbour; never waits. A packet that cannot be queued is dropped and
    /// counted: the neighbour is none, its link is down, or its queue is full.
    pub fn send(&self, to: &Identity, packet: Packet) {
        let Some(impaired) = &self.impaired else {
            return self.neighbours.send(to, packet);
        };
        if let Err(error) = impaired.try_send((*to, packet)) {
            self.context.counters.add_drop(reason(&error));
        }
    }

    /// Waits until no packet is queued for a neighbour whose link is up.
    pub async fn flushed(&self) {
        while self.is_anything_queued() {
            sleep(FLUSH_POLL).await;
        }
        // What was taken out of a queue last is being written.
        sleep(FLUSH_POLL).await;
    }

    fn is_anything_queued(&self) -> bool {
        let by_identity = &self.neighbours.by_identity;
        let neighbours = by_identity.read().unwrap_or_else(PoisonError::into_inner);
        neighbours.values().any(|neighbour| {
            !neighbour.is_down.load(Ordering::Relaxed)
                && neighbour.queue.capacity() < neighbour.queue.max_capacity()
        })
    }

    /// Closes all links, and returns when they are closed. Queued packets are lost.
    pub async fn shutdown(self) {
        self.tasks.into_inner().unwrap_or_else(PoisonError::into_inner).shutdown().await;
    }
}

impl Neighbours {
    fn send(&self, to: &Identity, packet: Packet) {
        if let Err(reason) = self.try_send(to, packet) {
            self.counters.add_drop(reason);
        }
    }

    fn try_send(&self, to: &Identity, packet: Packet) -> Result<(), DropReason> {
        let neighbours = self.by_identity.read().unwrap_or_else(PoisonError::into_inner);
        let neighbour = neighbours.get(to).ok_or(DropReason::UnknownNextHop)?;
        if neighbour.is_down.load(Ordering::Relaxed) {
            return Err(DropReason::LinkDown);
        }
        neighbour.queue.try_send(packet).map_err(|error| reason(&error))
    }
}

/// What a packet that a queue did not take is counted as.
fn reason<T>(error: &TrySendError<T>) -> DropReason {
    match error {
        TrySendError::Full(_) => DropReason::QueueFull,
        TrySendError::Closed(_) => DropReason::LinkDown,
    }
}

/// The task of one neighbour.
struct Dialler {
    tls: Arc<ClientConfig>,
    peer: Identity,
    address: watch::Receiver<SocketAddr>,
    context: LinkContext,
    packets: mpsc::Receiver<Packet>,
    is_down: Arc<AtomicBool>,
}

pub(super) type Dialled = Connection<TlsStream<TcpStream>>;

impl Dialler {
    async fn run(mut self) {
        let peer = self.peer;
        let mut redial = Redial::new(now());
        // Trouble is said once when it begins, not at each try.
        let mut is_troubled = false;
        loop {
            redial.handle_dial(now());
            let (problem, failure) = match self.dial().await {
                Ok(connection) => {
                    redial.handle_up(now());
                    self.is_down.store(false, Ordering::Relaxed);
                    if is_troubled {
                        info!(%peer, "link is up again");
                    } else {
                        debug!(%peer, "link is up");
                    }
                    let since = Instant::now();
                    let ControlFlow::Break(end) = self.carry(connection).await else {
                        return;
                    };
                    is_troubled &= since.elapsed() < STABLE_AFTER;
                    (end, Failure::Ended)
                }
                Err(error @ LinkFailure::Connect(_)) => (error, Failure::Unanswered),
                Err(error) => (error, Failure::Refused),
            };
            if matches!(problem, LinkFailure::Moved) {
                debug!(%peer, "link ended: {problem}");
                redial.reset();
                continue;
            }
            if is_troubled {
                debug!(%peer, "still no lasting link: {problem}");
            } else {
                warn!(%peer, "no link: {problem}");
                is_troubled = true;
            }
            let again = redial.handle_failure(now(), failure, &mut rand::rng());
            if failure != Failure::Ended || again > now() + DIAL_PATIENCE {
                self.is_down.store(true, Ordering::Relaxed);
                self.drop_queued();
            }
            tokio::select! {
                () = sleep_until(again.into()) => {}
                () = changed(&mut self.address) => redial.reset(),
            }
        }
    }

    async fn dial(&mut self) -> Result<Dialled, LinkFailure> {
        let address = *self.address.borrow_and_update();
        tokio::select! {
            dialled = within(SETUP_TIMEOUT, dial(&self.context, address, self.tls.clone())) => dialled,
            () = changed(&mut self.address) => Err(LinkFailure::Moved),
        }
    }

    /// Carries packets until the link ends, or until the pool is gone.
    async fn carry(&mut self, mut connection: Dialled) -> ControlFlow<LinkFailure> {
        let mut batch = Vec::with_capacity(WRITE_PACKETS);
        let mut ping = ping_interval(self.context.ping_interval);
        let mut awaits_pong = false;
        loop {
            let result = tokio::select! {
                // No packet is written to where the peer is no more.
                biased;
                () = changed(&mut self.address) => Err(LinkFailure::Moved),
                frame = connection.next() => match frame {
                    Ok(Incoming::Pad) if awaits_pong => {
                        awaits_pong = false;
                        Ok(())
                    }
                    Ok(_) => Err(LinkFailure::UnexpectedFrame),
                    Err(error) => Err(error),
                },
                _ = ping.tick() => {
                    if awaits_pong {
                        Err(LinkFailure::Silent(self.context.ping_interval))
                    } else {
                        awaits_pong = true;
                        connection.push_pad();
                        connection.flush().await
                    }
                }
                count = self.packets.recv_many(&mut batch, WRITE_PACKETS) => {
                    if count == 0 {
                        return ControlFlow::Continue(());
                    }
                    self.write(&mut connection, &mut batch).await
                }
            };
            if let Err(end) = result {
                return ControlFlow::Break(end);
            }
        }
    }

    async fn write(
        &self,
        connection: &mut Dialled,
        batch: &mut Vec<Packet>,
    ) -> Result<(), LinkFailure> {
        let count = batch.len() as u64;
        for packet in batch.drain(..) {
            connection.push_packet(&self.peer, &packet);
        }
        let result = connection.flush().await;
        match result {
            Ok(()) => self.context.counters.add_out(count),
            Err(_) => self.context.counters.add_drops(DropReason::LinkDown, count),
        }
        result
    }

    fn drop_queued(&mut self) {
        let mut count = 0;
        while self.packets.try_recv().is_ok() {
            count += 1;
        }
        self.context.counters.add_drops(DropReason::LinkDown, count);
    }
}

/// What waits for a neighbour that is none any more is lost, but counted.
impl Drop for Dialler {
    fn drop(&mut self) {
        self.drop_queued();
    }
}

/// Connects to a node, makes sure that it is the one that `tls` expects, and exchanges hellos.
pub(super) async fn dial(
    context: &LinkContext,
    address: SocketAddr,
    tls: Arc<ClientConfig>,
) -> Result<Dialled, LinkFailure> {
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(LinkFailure::Connect)?;
    shake_hands(context, stream, tls).await
}

pub(super) async fn shake_hands(
    context: &LinkContext,
    stream: TcpStream,
    tls: Arc<ClientConfig>,
) -> Result<Dialled, LinkFailure> {
    prepare(&stream)?;
    let stream = TlsConnector::from(tls).connect(tls::server_name(), stream).await?;
    let (connection, _) = Connection::open(stream, |stream| stream.get_ref().1, context).await?;
    Ok(connection)
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn ping_interval(period: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
