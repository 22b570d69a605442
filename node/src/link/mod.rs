//! Links between nodes: [`LinkListener`] takes packets from those that may send here,
//! [`LinkPool`] brings packets to those that this node may send to.
//!
//! A link carries packets one way, from the node that dialled to the one that was dialled. Both
//! open it with a hello. The dialler sends a pad frame every [`PING_INTERVAL`], and the other end
//! sends one back; whoever hears nothing for too long closes the link. Anything else that comes is
//! a breach of the protocol and closes it too.
//!
//! When the topology changes, links that it does not touch stay as they are.

mod connection;
mod impairment;
mod listener;
mod next_hops;
mod pool;
#[cfg(test)]
pub(crate) mod testnet;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mixsocks_common::keys::{Identity, IdentityKey};
#[cfg(any(target_os = "linux", target_os = "android"))]
use mixsocks_common::link::redial::UNANSWERED_TIMEOUT;
use mixsocks_common::link::{FrameCodec, FrameError, Hello, HelloError, LinkError};
use mixsocks_common::topology::Topology;
#[cfg(any(target_os = "linux", target_os = "android"))]
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::counters::Counters;

pub use impairment::{Impairment, MAX_IMPAIRMENT_DELAY};
pub use listener::{LinkListener, MAX_HALF_OPEN, MAX_HALF_OPEN_PER_SITE, MAX_HALF_OPEN_PER_SOURCE};
pub use next_hops::NextHops;
pub use pool::{LINK_QUEUE_BYTES, LinkPool};

/// From the first TCP packet to the end of the hellos: a few round trips around the world, and
/// some for losses.
pub const SETUP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the dialler asks for a sign of life. A dead link is noticed after two of them; packets
/// that were on their way that long are of no use any more.
pub const PING_INTERVAL: Duration = Duration::from_secs(15);
/// The end that was dialled gives up after four missing pings.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that takes no byte for that long is stuck.
const WRITE_TIMEOUT: Duration = Duration::from_secs(15);
/// Packets wait in the queue while the next dial is no further away than this, else they go.
const DIAL_PATIENCE: Duration = Duration::from_secs(1);

/// What all links of a node have in common; cheap to clone.
#[derive(Clone, Debug)]
pub struct LinkContext {
    key: Arc<IdentityKey>,
    me: Identity,
    topology: watch::Receiver<Arc<Topology>>,
    counters: Arc<Counters>,
    codec: FrameCodec,
    hello: Arc<Hello>,
    ping_interval: Duration,
    impairment: Option<watch::Receiver<Impairment>>,
}

impl LinkContext {
    /// The links of the node with this key. Every topology that comes must be one of the same
    /// network with packets of the same size; a sender that is gone means that none comes.
    pub fn new(
        key: Arc<IdentityKey>,
        topology: watch::Receiver<Arc<Topology>>,
        counters: Arc<Counters>,
    ) -> Self {
        let first = topology.borrow().clone();
        Self {
            me: key.identity(),
            key,
            codec: FrameCodec::new(first.packet_bytes()),
            hello: Arc::new(Hello::new(&first)),
            topology,
            counters,
            ping_interval: PING_INTERVAL,
            impairment: None,
        }
    }

    /// The same, where things happen to packets on their way to other nodes if the network is under
    /// test.
    pub fn impaired(self, impairment: Option<watch::Receiver<Impairment>>) -> Self {
        Self { impairment, ..self }
    }
}

/// Sets up a TCP connection that is new: what is written to it goes at once, and it ends when the other
/// end's system has answered nothing for [`UNANSWERED_TIMEOUT`] of what was written. Elsewhere than on
/// Linux only pings notice that.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    SockRef::from(stream).set_tcp_user_timeout(Some(UNANSWERED_TIMEOUT))?;
    Ok(())
}

/// Waits for another topology; for ever when none will come any more.
pub(crate) async fn changed<T>(news: &mut watch::Receiver<T>) {
    if news.changed().await.is_err() {
        std::future::pending().await
    }
}

/// Sleeps until then, or for ever.
pub(crate) async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Why a link could not be set up, or ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkFailure {
    /// The peer could not be reached.
    #[error("no connection: {0}")]
    Connect(#[source] io::Error),
    /// The peer is not who it should be, or does not speak our TLS.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The peer belongs to another network or version.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The peer sent bytes that are no frame.
    #[error("a malformed frame: {0}")]
    Frame(#[from] FrameError),
    /// The peer sent a frame that has no place there.
    #[error("a frame that has no place on this link")]
    UnexpectedFrame,
    /// The peer closed the connection.
    #[error("the peer closed the link")]
    Closed,
    /// The peer was silent for this long.
    #[error("the peer was silent for {} s", .0.as_secs())]
    Silent(Duration),
    /// The peer has another address now.
    #[error("the peer has another address now")]
    Moved,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
}

impl LinkFailure {
    /// Whether the peer broke the rules of the link after it had proved its identity.
    fn is_breach(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::UnexpectedFrame)
    }
}

impl From<io::Error> for LinkFailure {
    fn from(error: io::Error) -> Self {
        match LinkError::from_io(&error) {
            Some(link_error) => Self::Link(link_error),
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Closed,
            None => Self::Io(error),
        }
    }
}
