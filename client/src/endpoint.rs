//! A recipient on the mixnet: its keys, its link to the gateway, and what arrives for it. Clients and
//! providers stand on it alike.

use std::fmt;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::replay::{Admission, RecentTags};
use mixsocks_common::topology::{NoRoute, Topology, random_route};
use mixsocks_sphinx::{
    HopAddress, Identifier, OpenedPacket, Packet, PacketHeader, Payload, Peeled, ReplyRecovery,
    Route, SecretKey, build_headers, build_surbs, fill_headers, finish, max_plaintext,
    open_headers,
};
use rand::RngExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::drops::{DropReason, Drops};
use crate::gateway::{
    self, GatewayLinkConfig, GatewayLinkError, GatewayReceiver, GatewaySender, GatewayState,
};
use crate::headers::ReadyHeader;
use crate::surbs::ReadySurb;

/// How long a recipient remembers the tags of packets, at least. Older replays do nothing: a reply is
/// awaited once, and a session knows its packet numbers while it lives and is remembered until its
/// START is too old.
const REPLAY_SPAN: Duration = Duration::from_secs(10 * 60);

/// Tags in that time: 28,000 packets a second, more than a machine peels. Up to 180 MB for each of
/// two generations; the tables grow with what arrives.
const MAX_REPLAY_TAGS: usize = 16 * 1024 * 1024;

/// How long a task waits for the link before it looks after its sessions.
const RESERVE_LIMIT: Duration = Duration::from_secs(1);

/// Packets that a worker takes at a time: under a millisecond of work, so that others get their turn.
const BATCH_PACKETS: usize = 8;

/// What an endpoint needs.
#[derive(Debug)]
pub struct EndpointConfig {
    /// The network.
    pub topology: Arc<Topology>,
    /// Who the endpoint is.
    pub identity: Arc<IdentityKey>,
    /// The key of the last layer of packets for it.
    pub encryption: SecretKey,
    /// The gateway that it is, or will be, registered with.
    pub gateway: Identity,
    /// Where the gateway's token is kept.
    pub token_file: PathBuf,
    /// Mean delay of each mix on the routes that the endpoint chooses; `None` takes the network's.
    pub mean_delay: Option<Duration>,
}

/// What became of waiting for the link.
#[derive(Debug)]
pub enum Reserved<'a> {
    /// It takes one packet.
    Permit(mpsc::Permit<'a, (HopAddress, Packet)>),
    /// It took none in time.
    TimedOut,
    /// It has ended for good.
    Ended,
}

/// Takes what arrives for an endpoint.
pub trait Arrivals: Send + Sync + 'static {
    /// Payloads of packets that arrived together; the identifier is that of the SURB for replies,
    /// else zero.
    fn arrived(&self, arrived: Vec<(Identifier, Payload)>);
}

/// A connected endpoint.
pub struct Endpoint {
    topology: Arc<Topology>,
    address: Address,
    mean_delay: Duration,
    key: SecretKey,
    replay: Mutex<RecentTags>,
    drops: Drops,
    sender: GatewaySender,
    state: GatewayState,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.address)
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if !self.drops.is_empty() {
            tracing::info!("packets dropped: {}", self.drops);
        }
    }
}

impl Endpoint {
    /// Connects to the gateway. What arrives waits in the receiver for [`Endpoint::receive`].
    ///
    /// # Errors
    /// See [`gateway::connect`].
    pub async fn connect(
        config: EndpointConfig,
    ) -> Result<(Arc<Self>, GatewayReceiver), GatewayLinkError> {
        let EndpointConfig { topology, identity, encryption, gateway, token_file, mean_delay } =
            config;
        let address = Address {
            identity: identity.identity(),
            encryption: encryption.public_key().into(),
            gateway,
        };
        let link = GatewayLinkConfig {
            topology: topology.clone(),
            gateway,
            identity,
            token_file,
            invitation: None,
        };
        let (sender, receiver, state) = gateway::connect(link).await?;
        let endpoint = Self {
            mean_delay: mean_delay.unwrap_or(topology.parameters.mean_delay),
            topology,
            address,
            key: encryption,
            replay: Mutex::new(RecentTags::new(
                Instant::now(),
                REPLAY_SPAN,
                MAX_REPLAY_TAGS,
                &mut rand::rng(),
            )),
            drops: Drops::default(),
            sender,
            state,
        };
        Ok((Arc::new(endpoint), receiver))
    }

    /// Where packets for this endpoint go.
    pub fn address(&self) -> Address {
        self.address
    }

    /// The network.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Mean delay of each mix on the routes that the endpoint chooses.
    pub fn mean_delay(&self) -> Duration {
        self.mean_delay
    }

    /// Bytes of contents that a packet holds.
    pub fn max_contents_bytes(&self) -> usize {
        max_plaintext(self.topology.parameters.payload_bytes)
    }

    /// What was dropped of what arrived.
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// How the link to the gateway is.
    pub fn state(&self) -> &GatewayState {
        &self.state
    }

    /// Waits until the link takes another packet, but no longer than a second: the link may be down
    /// for long, and time goes on for sessions.
    pub async fn reserve(&self) -> Reserved<'_> {
        match timeout(RESERVE_LIMIT, self.sender.reserve()).await {
            Ok(Ok(permit)) => Reserved::Permit(permit),
            Ok(Err(_)) => Reserved::Ended,
            Err(_) => Reserved::TimedOut,
        }
    }

    /// Draws a route.
    fn route(&self, recipient: &Address, identifier: Identifier) -> Result<Route, NoRoute> {
        random_route(&self.topology, recipient, self.mean_delay, identifier, &mut rand::rng())
    }

    /// Makes `count` headers of packets to `recipient`, each for a route of its own; takes some 130 µs
    /// of CPU for each when they are many, and 210 µs for a single one.
    ///
    /// # Errors
    /// When the recipient's gateway is not in the topology.
    pub fn make_headers(
        &self,
        recipient: &Address,
        count: usize,
    ) -> Result<Vec<ReadyHeader>, NoRoute> {
        let made = Instant::now();
        let mut rng = rand::rng();
        let routes = std::iter::repeat_with(|| self.route(recipient, Identifier::default()))
            .take(count)
            .collect::<Result<Vec<_>, _>>()?;
        let delays = routes.iter().map(Route::total_delay);
        let headers = build_headers(&mut rng, &routes).into_iter().zip(delays);
        Ok(headers.map(|(header, delay)| ReadyHeader { header, delay, made }).collect())
    }

    /// Makes the packet of a header; takes some 45 µs of CPU.
    ///
    /// # Panics
    /// When `contents` are longer than [`Endpoint::max_contents_bytes`]: a local mistake.
    pub fn build(&self, header: PacketHeader, contents: &[u8]) -> (HopAddress, Packet) {
        let first_hop = header.first_hop();
        let payload_bytes = self.topology.parameters.payload_bytes;
        let packet = fill_headers(payload_bytes, vec![(header, contents)])
            .pop()
            .expect("one request gives one result")
            .expect("contents fit");
        (first_hop, packet)
    }

    /// Makes `count` SURBs for replies to this endpoint; takes some 130 µs of CPU for each when they are
    /// many, and 210 µs for a single one.
    pub fn make_surbs(&self, count: usize) -> Vec<ReadySurb<ReplyRecovery>> {
        let made = Instant::now();
        let mut rng = rand::rng();
        let routes: Vec<_> = std::iter::repeat_with(|| rng.random())
            // Zero means "not a reply".
            .filter(|identifier| *identifier != Identifier::default())
            .take(count)
            .map_while(|identifier| self.route(&self.address, identifier).ok())
            .collect();
        build_surbs(&mut rand::rng(), &routes)
            .into_iter()
            .zip(&routes)
            .filter_map(|(built, route)| {
                let (surb, recovery) = built.ok()?;
                let (identifier, delay) = (recovery.identifier(), route.total_delay());
                Some(ReadySurb { surb, identifier, recovery, delay, made })
            })
            .collect()
    }

    /// Hands everything that arrives to `arrivals`, until the link ends.
    pub async fn receive(self: Arc<Self>, receiver: GatewayReceiver, arrivals: Arc<impl Arrivals>) {
        let receiver = Arc::new(tokio::sync::Mutex::new(receiver));
        let mut workers = JoinSet::new();
        for _ in 0..worker_count() {
            workers.spawn(self.clone().work(receiver.clone(), arrivals.clone()));
        }
        workers.join_all().await;
    }

    async fn work(
        self: Arc<Self>,
        receiver: Arc<tokio::sync::Mutex<GatewayReceiver>>,
        arrivals: Arc<impl Arrivals>,
    ) {
        let mut batch = Vec::new();
        loop {
            let received = receiver.lock().await.recv_many(&mut batch, BATCH_PACKETS).await;
            if received == 0 {
                return;
            }
            let mut arrived = Vec::with_capacity(received);
            for peeled in finish(self.admit(open_headers(&self.key, std::mem::take(&mut batch)))) {
                match peeled {
                    Ok(Peeled::Final { identifier, payload, .. }) => {
                        arrived.push((identifier, payload));
                    }
                    Ok(Peeled::Forward { .. }) => self.drops.add(DropReason::NotForUs),
                    Err(_) => self.drops.add(DropReason::Unreadable),
                }
            }
            if !arrived.is_empty() {
                arrivals.arrived(arrived);
            }
            tokio::task::yield_now().await;
        }
    }

    fn admit<E>(&self, opened: Vec<Result<OpenedPacket, E>>) -> Vec<OpenedPacket> {
        let now = Instant::now();
        let mut replay = self.replay.lock().unwrap_or_else(PoisonError::into_inner);
        opened
            .into_iter()
            .filter_map(|opened| {
                let refusal = match &opened {
                    Ok(packet) => match replay.insert(&packet.replay_tag(), now) {
                        Admission::Fresh => return opened.ok(),
                        Admission::Replayed => DropReason::Replayed,
                        Admission::Full => DropReason::TooManyTags,
                    },
                    Err(_) => DropReason::Unreadable,
                };
                self.drops.add(refusal);
                None
            })
            .collect()
    }
}

/// Tasks that do the cryptography of one endpoint side by side.
pub fn worker_count() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(8)
}
