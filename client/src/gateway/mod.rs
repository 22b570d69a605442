//! A client's connection to its gateway, which clients and providers use alike.
//!
//! [`connect`] registers if need be, logs in, and hands out the two ends of bounded queues. From
//! then on one task keeps the connection: it dials again after every cut, goes on where it was cut,
//! and registers anew when the gateway has lost its memory. While there is no connection, packets
//! wait in the queue and then their senders wait; nothing takes another way.

mod connection;
mod error;
mod session;
mod token_file;

use std::path::PathBuf;
use std::sync::Arc;

use mixsocks_common::gateway::message::Invitation;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{HopAddress, Packet};
use tokio::sync::{mpsc, watch};

pub use error::GatewayLinkError;
pub use token_file::TokenFileError;

/// Packets that wait for the connection: what a fast sender produces in some 10 ms. A longer queue
/// would only make them older.
pub const UPLINK_QUEUE_PACKETS: usize = 64;

/// Packets that wait for their receiver, before the gateway is made to wait.
pub const DOWNLINK_QUEUE_PACKETS: usize = 256;

/// What a link needs.
#[derive(Debug)]
pub struct GatewayLinkConfig {
    /// The network: each dial goes to where the newest document has the gateway.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// The gateway to register with: one of the topology.
    pub gateway: Identity,
    /// The client's own key.
    pub identity: Arc<IdentityKey>,
    /// Where the token is kept: readable by the owner only, replaced atomically. Its directory
    /// must exist.
    pub token_file: PathBuf,
    /// For gateways that take new clients by invitation only.
    pub invitation: Option<Invitation>,
}

/// Takes packets and their first hops. [`mpsc::Sender::send`] and [`mpsc::Sender::reserve`] wait
/// while [`UPLINK_QUEUE_PACKETS`] wait already; an error means that the link is evicted or closed.
pub type GatewaySender = mpsc::Sender<(HopAddress, Packet)>;

/// Gives the packets for this client, in the order in which the gateway took them. Dropping it
/// closes the link.
pub type GatewayReceiver = mpsc::Receiver<Packet>;

/// Tells how the connection is.
pub type GatewayState = watch::Receiver<LinkState>;

/// How a link is.
#[derive(Clone, Debug)]
pub enum LinkState {
    /// Packets flow.
    Connected,
    /// The connection was cut; it is being dialled again, for as long as it takes.
    Reconnecting {
        /// Failed tries since the cut.
        attempts: u32,
        /// What the last try failed with, or what cut the connection.
        error: Arc<GatewayLinkError>,
    },
    /// A newer connection of the same identity took over. This link has ended for good: two
    /// programs use one identity.
    Evicted,
    /// The receiver was dropped, and the link has ended.
    Closed,
}

/// Connects to the gateway, and waits for the first login.
///
/// # Errors
/// [`GatewayLinkError`] says what is wrong and where; nothing is tried twice, except that an
/// outdated token is replaced by registering again.
///
/// # Panics
/// Outside of a Tokio runtime.
pub async fn connect(
    config: GatewayLinkConfig,
) -> Result<(GatewaySender, GatewayReceiver, GatewayState), GatewayLinkError> {
    let (outgoing, uplink) = mpsc::channel(UPLINK_QUEUE_PACKETS);
    let (downlink, incoming) = mpsc::channel(DOWNLINK_QUEUE_PACKETS);
    let (states, state) = watch::channel(LinkState::Connected);
    let mut session = session::Session::new(config)?;
    let connection = Box::pin(session.log_in()).await?;
    tokio::spawn(session.run(connection, uplink, downlink, states));
    Ok((outgoing, incoming, state))
}
