//! A recipient on the mixnet: its keys, its link to the gateway, and what arrives for it. Clients and
//! providers stand on it alike.

use std::fmt;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mixsocks_common::address::Address;
use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::message::sealed_box::{OpenBoxError, open_boxes};
use mixsocks_common::replay::{Admission, RecentTags};
use mixsocks_common::topology::{
    NoRoute, RouteChoice, Topology, UnixTime, check_route, random_message_route, random_route,
};
use mixsocks_sphinx::{
    HopAddress, Identifier, OpenedPacket, Packet, PacketHeader, Payload, Peeled, ReplyRecovery,
    Route, SecretKey, Surb, build_headers, build_surbs, fill_headers, finish, max_plaintext,
    open_headers, use_surbs,
};
use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::documents::Documents;
use crate::drops::{DropReason, Drops};
use crate::gateway::{
    self, Arrival, Confirmations, GatewayLink, GatewayLinkConfig, GatewayLinkError,
    GatewayReceiver, GatewaySender, GatewayState, Receiving,
};
use crate::headers::ReadyHeader;
use crate::health::Way;
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
    /// The network: new documents are used as they come. When the sender is gone, the last one stays.
    pub topology: watch::Receiver<Arc<Topology>>,
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
    /// Whether to ask the gateway for the messages that it keeps; then [`Arrivals::delivered`] has to
    /// take them.
    pub receives_messages: bool,
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

    /// Boxes that the gateway keeps for the endpoint. They come again after each cut until their
    /// numbers have gone into [`Endpoint::confirmations`].
    fn delivered(&self, deliveries: Vec<KeptBox>) {
        drop(deliveries);
    }

    /// All that the gateway kept when it was asked by this number has been delivered.
    fn caught_up(&self, _number: u32) {}
}

/// A connected endpoint.
pub struct Endpoint {
    documents: Mutex<Documents>,
    /// What a document that has others is not used for.
    payload_bytes: usize,
    address: Address,
    mean_delay: Option<Duration>,
    key: SecretKey,
    replay: Mutex<RecentTags>,
    drops: Drops,
    sender: GatewaySender,
    confirmations: Confirmations,
    receiving: Arc<Receiving>,
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
        let EndpointConfig { topology, identity, encryption, gateway, token_file, .. } = config;
        let (mean_delay, receives_messages) = (config.mean_delay, config.receives_messages);
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
            receives_messages,
        };
        let documents = Documents::new(topology);
        let GatewayLink { sender, receiver, confirmations, receiving, state } =
            gateway::connect(link).await?;
        let endpoint = Self {
            mean_delay,
            payload_bytes: documents.used().parameters.payload_bytes,
            documents: Mutex::new(documents),
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
            confirmations,
            receiving,
            state,
        };
        Ok((Arc::new(endpoint), receiver))
    }

    /// Where packets for this endpoint go.
    pub fn address(&self) -> Address {
        self.address
    }

    /// The network: the newest document, unless it is of another network or has other packets than
    /// the one that the endpoint started with. Of such a one the user is told.
    pub fn topology(&self) -> Arc<Topology> {
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(unusable) = documents.refresh() {
            tracing::warn!("the new topology is not used: {unusable}; restart this program");
        }
        documents.used().clone()
    }

    /// Calls `act` after each new document, for ever.
    pub async fn on_each_document(&self, act: impl Fn()) {
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner).clone();
        loop {
            documents.changed().await;
            // The endpoint's own look tells of one that is not used.
            self.topology();
            if documents.refresh() == Ok(true) {
                act();
            }
        }
    }

    /// Whether there are routes to clients of `gateway` now.
    ///
    /// # Errors
    /// [`NoRoute`] says why there are none.
    pub fn check_route(&self, gateway: &Identity) -> Result<(), NoRoute> {
        check_route(&self.topology(), gateway, unix_time())
    }

    /// Mean delay of each mix on the routes that the endpoint chooses.
    pub fn mean_delay(&self) -> Duration {
        self.mean_delay.unwrap_or_else(|| self.topology().parameters.mean_delay)
    }

    /// Bytes of the payload of a packet.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Bytes of contents that a packet holds.
    pub fn max_contents_bytes(&self) -> usize {
        max_plaintext(self.payload_bytes)
    }

    /// Takes the numbers of deliveries that the gateway may let go.
    pub fn confirmations(&self) -> &Confirmations {
        &self.confirmations
    }

    /// Asks the gateway anew for the messages that it keeps, from the oldest on.
    pub fn receive_again(&self) {
        self.receiving.again();
    }

    /// Whether the gateway was asked for them by this number last.
    pub fn is_last_receive(&self, number: u32) -> bool {
        self.receiving.is_last(number)
    }

    /// Opens the boxes of deliveries, in their order.
    pub fn open_boxes(
        &self,
        deliveries: &[KeptBox],
    ) -> Vec<Result<Zeroizing<Vec<u8>>, OpenBoxError>> {
        let boxes: Vec<_> = deliveries.iter().map(|kept| &kept.sealed[..]).collect();
        open_boxes(&self.key, &boxes)
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

    /// A place on the link for another packet, if there is one at once.
    pub fn try_reserve(&self) -> Option<mpsc::Permit<'_, (HopAddress, Packet)>> {
        self.sender.try_reserve().ok()
    }

    /// Draws a route for each identifier.
    fn routes(
        &self,
        recipient: &Address,
        choice: &RouteChoice,
        identifiers: impl Iterator<Item = Identifier>,
    ) -> Result<Vec<Route>, NoRoute> {
        let (topology, mean_delay) = (self.topology(), self.mean_delay());
        let (now, mut rng) = (unix_time(), rand::rng());
        identifiers
            .map(|identifier| {
                random_route(&topology, recipient, now, mean_delay, identifier, choice, &mut rng)
            })
            .collect()
    }

    /// Makes `count` headers of packets to `recipient`, each for a route of its own; takes some 130 µs
    /// of CPU for each when they are many, and 210 µs for a single one.
    ///
    /// # Errors
    /// [`NoRoute`] says why there is no way to the recipient.
    pub fn make_headers(
        &self,
        recipient: &Address,
        choice: &RouteChoice,
        count: usize,
    ) -> Result<Vec<ReadyHeader>, NoRoute> {
        let made = Instant::now();
        let identifiers = std::iter::repeat_n(Identifier::default(), count);
        let routes = self.routes(recipient, choice, identifiers)?;
        let ways = routes.iter().map(Way::of);
        let headers = build_headers(&mut rand::rng(), &routes).into_iter().zip(ways);
        Ok(headers.map(|(header, way)| ReadyHeader { header, way, made }).collect())
    }

    /// Makes the headers of message packets, which end at their recipients' gateways, each for a route of
    /// its own and in the order of the recipients. Costs as [`Endpoint::make_headers`] does.
    ///
    /// # Errors
    /// Per recipient, [`NoRoute`] says why there is no way to it.
    pub fn make_message_headers(
        &self,
        recipients: &[Address],
        choice: &RouteChoice,
    ) -> Vec<Result<ReadyHeader, NoRoute>> {
        let made = Instant::now();
        let (topology, mean_delay) = (self.topology(), self.mean_delay());
        let (now, mut rng) = (unix_time(), rand::rng());
        let draw = |recipient| {
            random_message_route(&topology, recipient, now, mean_delay, choice, &mut rng)
        };
        let routes: Vec<_> = recipients.iter().map(draw).collect();
        let good: Vec<_> = routes.iter().flatten().cloned().collect();
        let mut headers = build_headers(&mut rand::rng(), &good).into_iter();
        let mut ready = |route: Route| ReadyHeader {
            header: headers.next().expect("one for each route"),
            way: Way::of(&route),
            made,
        };
        routes.into_iter().map(|route| route.map(&mut ready)).collect()
    }

    /// Makes the packets of SURBs and contents. A SURB that is none makes no packet.
    pub fn build_replies(&self, requests: Vec<(Surb, &[u8])>) -> Vec<(HopAddress, Packet)> {
        use_surbs(self.payload_bytes, requests).into_iter().flatten().collect()
    }

    /// Makes the header of a loop: a packet to this endpoint itself, and what names it when it comes.
    ///
    /// # Errors
    /// [`NoRoute`] says why there is no way.
    pub fn make_loop(&self, choice: &RouteChoice) -> Result<(Identifier, ReadyHeader), NoRoute> {
        let made = Instant::now();
        let identifier = identifiers().next().expect("they do not end");
        let routes = self.routes(&self.address, choice, std::iter::once(identifier))?;
        let way = Way::of(&routes[0]);
        let header = build_headers(&mut rand::rng(), &routes).remove(0);
        Ok((identifier, ReadyHeader { header, way, made }))
    }

    /// Makes the packets of headers and contents; takes some 15 µs of CPU for each when they are many,
    /// and 30 µs for a single one.
    ///
    /// # Panics
    /// When contents are longer than [`Endpoint::max_contents_bytes`]: a local mistake.
    pub fn build<'a>(
        &self,
        requests: impl Iterator<Item = (PacketHeader, &'a [u8])>,
    ) -> Vec<(HopAddress, Packet)> {
        let requests: Vec<_> = requests.collect();
        let first_hops: Vec<_> = requests.iter().map(|(header, _)| header.first_hop()).collect();
        let packets = fill_headers(self.payload_bytes, requests).into_iter();
        first_hops.into_iter().zip(packets.map(|packet| packet.expect("contents fit"))).collect()
    }

    /// Makes `count` SURBs for replies to this endpoint; takes some 130 µs of CPU for each when they are
    /// many, and 210 µs for a single one.
    ///
    /// # Errors
    /// [`NoRoute`] says why there is no way to this endpoint.
    pub fn make_surbs(
        &self,
        choice: &RouteChoice,
        count: usize,
    ) -> Result<Vec<ReadySurb<ReplyRecovery>>, NoRoute> {
        let made = Instant::now();
        // Not later than the routes are drawn: then they are of this key epoch or the next one.
        let key_epoch = self.topology().key_epoch_used(unix_time());
        let routes = self.routes(&self.address, choice, identifiers().take(count))?;
        let built = build_surbs(&mut rand::rng(), &routes).into_iter().zip(&routes);
        let ready = built.filter_map(|(built, route)| {
            let (surb, recovery) = built.ok()?;
            let (identifier, way) = (recovery.identifier(), Way::of(route));
            Some(ReadySurb { surb, identifier, recovery, way, made, key_epoch })
        });
        Ok(ready.collect())
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
            let (mut packets, mut deliveries) = (Vec::with_capacity(received), Vec::new());
            let mut caught_up = None;
            for arrival in batch.drain(..) {
                match arrival {
                    Arrival::Packet(packet) => packets.push(packet),
                    Arrival::Delivery(kept) => deliveries.push(kept),
                    Arrival::CaughtUp(number) => caught_up = Some(number),
                }
            }
            if !deliveries.is_empty() {
                arrivals.delivered(deliveries);
            }
            if let Some(number) = caught_up {
                arrivals.caught_up(number);
            }
            let mut arrived = Vec::with_capacity(packets.len());
            for peeled in finish(self.admit(open_headers(&self.key, packets))) {
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

/// Random names of packets to oneself. Zero means that a packet is none.
fn identifiers() -> impl Iterator<Item = Identifier> {
    let mut rng = rand::rng();
    std::iter::repeat_with(move || rng.random())
        .filter(|identifier| *identifier != Identifier::default())
}

/// The time of day.
pub(crate) fn unix_time() -> UnixTime {
    UnixTime(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// Tasks that do the cryptography of one endpoint side by side.
pub fn worker_count() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(8)
}
