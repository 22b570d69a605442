//! A client's connection to its gateway, which clients and providers use alike.
//!
//! [`connect`] registers if need be, logs in, and hands out the two ends of bounded queues. From
//! then on one task keeps the connection: it dials again after every cut, goes on where it was cut,
//! and registers anew when the gateway has lost its memory. While there is no connection, packets
//! wait in the queue and then their senders wait; nothing takes another way.
//!
//! Who receives messages asks for them after each login, gets what the gateway keeps as
//! [`Arrival::Delivery`], and says in [`GatewayLink::confirmations`] what the gateway may let go.

mod connection;
mod error;
mod session;
mod token_file;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::FutureExt;
use mixsocks_common::gateway::message::{Invitation, KeptBox};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{HopAddress, Packet};
use tokio::sync::{Notify, mpsc, watch};

pub use error::GatewayLinkError;
pub use token_file::TokenFileError;

/// Packets that wait for the connection: what a fast sender produces in some 10 ms. A longer queue
/// would only make them older.
pub const UPLINK_QUEUE_PACKETS: usize = 64;

/// Packets and deliveries that wait for their receiver, before the gateway is made to wait.
pub const DOWNLINK_QUEUE_PACKETS: usize = 256;

/// Confirmations that wait for the connection: for all deliveries that a gateway sends in some 100 ms.
pub const CONFIRMATION_QUEUE: usize = 4096;

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
    /// Whether to ask for the messages that the gateway keeps.
    pub receives_messages: bool,
}

/// The ends of a link.
#[derive(Debug)]
pub struct GatewayLink {
    /// Takes packets.
    pub sender: GatewaySender,
    /// Gives what arrives.
    pub receiver: GatewayReceiver,
    /// Takes the numbers of deliveries that the gateway may let go.
    pub confirmations: Confirmations,
    /// Asks the gateway anew for the messages that it keeps, from the oldest on.
    pub receiving: Arc<Receiving>,
    /// Tells how the connection is.
    pub state: GatewayState,
}

/// What the gateway was asked for. Each time has a number, which the answer repeats: an answer that has
/// been under way since an earlier time is none to the last one.
#[derive(Debug, Default)]
pub struct Receiving {
    number: AtomicU32,
    again: Notify,
}

impl Receiving {
    /// A new connection has begun: the gateway is asked over it, and nothing that it has said over an
    /// earlier one is an answer to that.
    pub fn begin(&self) {
        self.number.fetch_add(1, Ordering::Relaxed);
    }

    /// Asks the gateway anew for the messages that it keeps, from the oldest on.
    pub fn again(&self) {
        self.begin();
        self.again.notify_one();
    }

    /// The number of the last time.
    pub fn number(&self) -> u32 {
        self.number.load(Ordering::Relaxed)
    }

    /// The number of a new connection. Whoever wanted to ask anew before has what it wanted by that.
    fn first(&self) -> u32 {
        let _ = self.again.notified().now_or_never();
        self.number()
    }

    /// Whether the gateway was asked by this number last, or is about to be.
    pub fn is_last(&self, number: u32) -> bool {
        self.number() == number
    }
}

/// What comes from the gateway.
#[derive(Debug)]
pub enum Arrival {
    /// A packet for this client.
    Packet(Packet),
    /// A box that the gateway keeps for this client. It comes again after every cut until it has been
    /// confirmed, and it may come again although it was.
    Delivery(KeptBox),
    /// All that the gateway kept when it was asked by this number has come.
    CaughtUp(u32),
}

/// Takes the numbers of deliveries, of this connection or an earlier one. [`mpsc::Sender::send`] waits
/// while [`CONFIRMATION_QUEUE`] wait already. A confirmation may get lost with a connection: then the
/// delivery comes again, and has to be confirmed again.
pub type Confirmations = mpsc::Sender<u64>;

/// Takes packets and their first hops. [`mpsc::Sender::send`] and [`mpsc::Sender::reserve`] wait
/// while [`UPLINK_QUEUE_PACKETS`] wait already; an error means that the link is evicted or closed.
pub type GatewaySender = mpsc::Sender<(HopAddress, Packet)>;

/// Gives the packets for this client, in the order in which the gateway took them, and between them
/// the deliveries, of each connection the oldest first. Dropping it closes the link.
pub type GatewayReceiver = mpsc::Receiver<Arrival>;

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
pub async fn connect(config: GatewayLinkConfig) -> Result<GatewayLink, GatewayLinkError> {
    let (sender, packets) = mpsc::channel(UPLINK_QUEUE_PACKETS);
    let (confirmations, confirmed) = mpsc::channel(CONFIRMATION_QUEUE);
    let receiving = Arc::new(Receiving::default());
    let uplink = session::Uplink { packets, confirmed, receiving: receiving.clone() };
    let (downlink, receiver) = mpsc::channel(DOWNLINK_QUEUE_PACKETS);
    let (states, state) = watch::channel(LinkState::Connected);
    let mut session = session::Session::new(config)?;
    let connection = Box::pin(session.log_in()).await?;
    tokio::spawn(session.run(connection, uplink, downlink, states));
    Ok(GatewayLink { sender, receiver, confirmations, receiving, state })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_to_an_earlier_receive_is_none_to_the_last_one() {
        let receiving = Receiving::default();
        receiving.begin();
        let first = receiving.number();
        assert!(receiving.is_last(first));
        // It is known before the task that asks has been woken.
        receiving.again();
        assert!(!receiving.is_last(first));
        receiving.again.notified().await;
        let second = receiving.number();
        receiving.begin();
        assert!(!receiving.is_last(second), "another connection has begun");
    }

    #[test]
    fn who_wanted_to_receive_again_before_a_connection_began_need_not_ask_twice() {
        let receiving = Receiving::default();
        receiving.again();
        receiving.begin();
        assert!(receiving.is_last(receiving.first()));
        assert!(receiving.again.notified().now_or_never().is_none());
        receiving.again();
        assert!(receiving.again.notified().now_or_never().is_some());
    }
}
