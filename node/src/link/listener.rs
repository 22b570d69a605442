//! The end that is dialled: takes links from the nodes that may send here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::Identity;
use mixsocks_common::link::redial::STABLE_AFTER;
use mixsocks_common::link::tls;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::Packet;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use super::connection::{Connection, Incoming, within};
use super::{LinkContext, LinkFailure, SETUP_TIMEOUT, SILENCE_TIMEOUT, changed, prepare};
use crate::accept::Accepting;
use crate::counters::DropReason;
use crate::sources::{HalfOpen, HalfOpenLimits, Source};

/// Connections that may be between their first byte and the end of their hellos. One more puts out
/// the oldest.
pub const MAX_HALF_OPEN: usize = 256;
/// As many of them may come from one IPv4 address or one IPv6 network of 64 bits: more than anybody
/// runs nodes behind one address. Else whoever connects without end would put out the neighbours.
pub const MAX_HALF_OPEN_PER_SOURCE: usize = 16;
/// As many of them may come from one IPv6 network of 48 bits, which one customer may hold.
pub const MAX_HALF_OPEN_PER_SITE: usize = 64;

/// Takes links from all nodes that may send here, by the topology of the moment; dropping it closes
/// them.
#[derive(Debug)]
pub struct LinkListener {
    address: SocketAddr,
    task: JoinSet<()>,
}

impl LinkListener {
    /// Starts to take links on `listener` and to hand their packets to `packets`.
    ///
    /// When `packets` is full, the links are not read: then each neighbour's own queue fills and
    /// drops there, and of the room that comes free each link gets its turn, so that a neighbour
    /// that sends too much takes nothing from the others.
    ///
    /// # Errors
    /// [`LinkFailure::Link`] when the TLS library refuses the node's key, [`LinkFailure::Io`] when
    /// the listener has no address.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(
        context: LinkContext,
        listener: TcpListener,
        packets: mpsc::Sender<Packet>,
    ) -> Result<Self, LinkFailure> {
        let (topology, me) = (context.topology.clone(), context.me);
        let may_send = move |peer: &Identity| topology.borrow().may_forward(peer, &me);
        let tls = tls::node_server_config(&context.key, may_send)?;
        let address = listener.local_addr()?;
        let acceptor = Acceptor {
            topology: context.topology.clone(),
            context: Arc::new(context),
            tls,
            packets,
            handshakes: JoinSet::new(),
            half_open: HalfOpen::new(HalfOpenLimits {
                total: MAX_HALF_OPEN,
                per_source: MAX_HALF_OPEN_PER_SOURCE,
                per_site: MAX_HALF_OPEN_PER_SITE,
            }),
            links: JoinSet::new(),
            by_peer: BTreeMap::new(),
            in_breach: BTreeSet::new(),
        };
        let mut task = JoinSet::new();
        task.spawn(acceptor.run(listener));
        Ok(Self { address, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes all links, and returns when they are closed.
    pub async fn shutdown(mut self) {
        self.task.shutdown().await;
    }
}

type Accepted = Connection<TlsStream<TcpStream>>;
/// A link that is open, and who is at its other end.
type Opened = Result<(Box<Accepted>, Identity), LinkFailure>;

/// How a link ended.
struct Ended {
    peer: Identity,
    lived: Duration,
    why: LinkFailure,
}

struct Acceptor {
    topology: watch::Receiver<Arc<Topology>>,
    context: Arc<LinkContext>,
    tls: Arc<ServerConfig>,
    packets: mpsc::Sender<Packet>,
    handshakes: JoinSet<Opened>,
    half_open: HalfOpen<AbortHandle>,
    links: JoinSet<Ended>,
    /// One link per neighbour, hence at most as many as the topology has nodes, but for those that
    /// are being closed.
    by_peer: BTreeMap<Identity, AbortHandle>,
    /// Neighbours whose breach of the protocol has been logged.
    in_breach: BTreeSet<Identity>,
}

impl Acceptor {
    async fn run(mut self, listener: TcpListener) {
        let mut accepting = Accepting::new("links");
        loop {
            tokio::select! {
                (stream, address) = accepting.next(|| listener.accept()) => {
                    self.handle_accepted(stream, address.ip().into());
                }
                Some(done) = self.handshakes.join_next_with_id() => self.handle_handshake(done),
                Some(done) = self.links.join_next_with_id() => self.handle_end(done),
                () = changed(&mut self.topology) => self.handle_topology(),
            }
        }
    }

    /// Closes the links of those who may not send here any more.
    fn handle_topology(&mut self) {
        let topology = self.topology.borrow_and_update().clone();
        for (peer, link) in &self.by_peer {
            if !topology.may_forward(peer, &self.context.me) {
                debug!(%peer, "link closed: by the new topology it may not send here");
                link.abort();
            }
        }
        self.in_breach.retain(|peer| topology.node(peer).is_some());
    }

    fn handle_accepted(&mut self, stream: TcpStream, source: Source) {
        if let Some(oldest) = self.half_open.make_room(source) {
            debug!("too many half-open links: the oldest is closed");
            oldest.abort();
        }
        let (tls, context) = (self.tls.clone(), self.context.clone());
        let handshake = async move { within(SETUP_TIMEOUT, open(stream, tls, &context)).await };
        self.half_open.push(source, self.handshakes.spawn(handshake));
    }

    fn handle_handshake(&mut self, done: Result<(Id, Opened), JoinError>) {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        self.half_open.remove(|handshake| handshake.id() == id);
        match done {
            // The topology may have changed during the handshake.
            Ok((_, Ok((_, peer)))) if !self.may_send(&peer) => {
                debug!(%peer, "link refused: by the new topology it may not send here");
            }
            Ok((_, Ok((connection, peer)))) => {
                debug!(%peer, "link accepted");
                let (packets, context) = (self.packets.clone(), self.context.clone());
                let link = self.links.spawn(async move {
                    let since = Instant::now();
                    let why = take_packets(*connection, &context, packets).await;
                    Ended { peer, lived: since.elapsed(), why }
                });
                // The newest wins: the old one may be dead without knowing.
                if let Some(old) = self.by_peer.insert(peer, link) {
                    old.abort();
                }
            }
            // Anybody can cause these, as often as they like: not worth more than DEBUG.
            Ok((_, Err(error))) => debug!("link refused: {error}"),
            Err(error) if error.is_cancelled() => {}
            Err(error) => warn!("a handshake failed in this node: {error}"),
        }
    }

    fn may_send(&self, peer: &Identity) -> bool {
        self.topology.borrow().may_forward(peer, &self.context.me)
    }

    fn handle_end(&mut self, done: Result<(Id, Ended), JoinError>) {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        self.by_peer.retain(|_, link| link.id() != id);
        match done {
            Ok((_, Ended { peer, lived, why })) => {
                if lived >= STABLE_AFTER {
                    self.in_breach.remove(&peer);
                }
                if why.is_breach() && self.in_breach.insert(peer) {
                    warn!(%peer, "link closed: {why}");
                } else {
                    debug!(%peer, "link ended: {why}");
                }
            }
            Err(error) if error.is_cancelled() => {}
            Err(error) => warn!("a link failed in this node: {error}"),
        }
    }
}

async fn open(stream: TcpStream, tls: Arc<ServerConfig>, context: &LinkContext) -> Opened {
    prepare(&stream)?;
    let stream = TlsAcceptor::from(tls).accept(stream).await?;
    let (connection, peer) = Connection::open(stream, |stream| stream.get_ref().1, context).await?;
    Ok((Box::new(connection), peer))
}

async fn take_packets(
    mut connection: Accepted,
    context: &LinkContext,
    packets: mpsc::Sender<Packet>,
) -> LinkFailure {
    let end = loop {
        match within(SILENCE_TIMEOUT, connection.next()).await {
            Ok(Incoming::Packet(packet)) => {
                context.counters.add_in(1);
                if packets.send(packet).await.is_err() {
                    return LinkFailure::Closed;
                }
            }
            Ok(Incoming::Pad) => {
                connection.push_pad();
                if let Err(error) = connection.flush().await {
                    break error;
                }
            }
            Ok(Incoming::Control(_)) => break LinkFailure::UnexpectedFrame,
            Err(error) => break error,
        }
    };
    if end.is_breach() {
        context.counters.add_drop(DropReason::MalformedFrame);
    }
    end
}
