//! The provider itself: sessions in, TCP connections out.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mixsocks_client::drops::DropReason;
use mixsocks_client::gateway::GatewayLinkError;
use mixsocks_client::relay::relay;
use mixsocks_client::stream::{StreamHost, StreamKey, Waiting};
use mixsocks_client::{Arrivals, Endpoint, EndpointConfig, MixStream, Reserved, worker_count};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::{AccessTokens, OpenOutcome, SessionId, StreamEvent};
use mixsocks_common::target::Target;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{
    HopAddress, Identifier, Packet, Payload, SecretKey, Surb, open_payloads, use_surbs,
};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

use crate::core::{ProviderCore, ProviderEvent};
use crate::dial::Dialer;
use crate::policy::ExitPolicy;
use crate::resolver::{Resolver, ResolverSetupError};

/// Connections, and attempts at one, of all sessions. Each is an open file, of which systems allow
/// few at first, often 1,024: `mixsocks up` raises the limit, and says when that is not enough.
const MAX_CONNECTIONS: usize = 8192;

/// How long a provider that comes to its end lets streams run, and how often it looks at them.
const DRAIN_TIME: Duration = Duration::from_secs(5);
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Replies that a task seals at a time: as many as share vectors.
const REPLIES_PER_TURN: usize = 8;

/// What a provider needs.
#[derive(Debug)]
pub struct ProviderConfig {
    /// The network: new documents are used as they come. When the sender is gone, the last one stays.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// Who the provider is.
    pub identity: Arc<IdentityKey>,
    /// The key of the last layer of packets for it.
    pub encryption: SecretKey,
    /// The gateway that it is, or will be, registered with.
    pub gateway: Identity,
    /// Where the gateway's token is kept; its directory must exist.
    pub token_file: PathBuf,
    /// Who is served: whoever has one of these tokens, nobody if there are none, or everybody (`None`).
    pub access_tokens: Option<AccessTokens>,
    /// Opens private and loopback addresses, for tests and networks of one's own.
    pub allow_private: bool,
    /// The DNS server; `None` takes the system's.
    pub dns: Option<SocketAddr>,
}

/// Why a provider does not start.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayLinkError),
    /// The system's DNS settings.
    #[error("the resolver does not start: {0}")]
    Resolver(#[from] ResolverSetupError),
}

/// A running provider; dropping it stops it.
pub struct Provider {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Provider({})", self.address())
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.shared.lock().connections.abort_all();
    }
}

impl Provider {
    /// Connects to the gateway, registering if need be, and serves.
    ///
    /// # Errors
    /// [`ProviderError`] says what is wrong.
    pub async fn start(config: ProviderConfig) -> Result<Self, ProviderError> {
        let resolver = match config.dns {
            Some(server) => Resolver::with_server(server),
            None => Resolver::system(),
        }?;
        let policy =
            ExitPolicy::new(own_addresses(), config.allow_private).with_source(source_towards);
        let ProviderConfig {
            topology,
            identity,
            encryption,
            gateway,
            token_file,
            access_tokens,
            ..
        } = config;
        let config = EndpointConfig {
            topology,
            identity,
            encryption,
            gateway,
            token_file,
            mean_delay: None,
            receives_messages: false,
        };
        let (endpoint, receiver) = Endpoint::connect(config).await?;
        let mut core =
            ProviderCore::new(wall_ms(), endpoint.max_contents_bytes(), endpoint.mean_delay());
        core.set_access_tokens(Instant::now(), access_tokens);
        let state = State {
            core,
            waiting: Waiting::default(),
            connections: JoinSet::new(),
            dialling: HashMap::new(),
            told_full: false,
            is_draining: false,
            told_left: false,
        };
        let shared = Arc::new_cyclic(|this| Shared {
            this: this.clone(),
            endpoint: endpoint.clone(),
            dialer: Dialer::new(resolver, policy),
            state: Mutex::new(state),
            wake_senders: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(endpoint.receive(receiver, shared.clone()));
        tasks.spawn(shared.clone().follow_documents());
        for _ in 0..worker_count() {
            tasks.spawn(shared.clone().send_replies());
        }
        Ok(Self { shared, tasks })
    }

    /// Where packets for the provider go: what it advertises.
    pub fn address(&self) -> Address {
        self.shared.endpoint.address()
    }

    /// Serves whoever has one of these tokens from now on, or everybody (`None`). Sessions that began with
    /// another token end, and their connections with them.
    pub fn set_access_tokens(&self, access_tokens: Option<AccessTokens>) {
        let mut state = self.shared.lock();
        state.core.set_access_tokens(Instant::now(), access_tokens);
        self.shared.settle(state);
    }

    /// Opens no more streams, lets those that are open come to their end, though not for longer than
    /// 5 s, and stops.
    pub async fn drain(self) {
        self.shared.lock().is_draining = true;
        let _ = timeout(DRAIN_TIME, async {
            while self.shared.has_connections() {
                sleep(DRAIN_POLL).await;
            }
        })
        .await;
        self.shutdown().await;
    }

    /// Stops. Connections are closed, sessions forgotten.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
    }
}

struct Shared {
    this: std::sync::Weak<Self>,
    endpoint: Arc<Endpoint>,
    dialer: Dialer,
    state: Mutex<State>,
    /// A reply may have to be sent.
    wake_senders: Notify,
}

struct State {
    core: ProviderCore,
    waiting: Waiting,
    connections: JoinSet<()>,
    /// Streams whose targets are being dialled, and what stops that.
    dialling: HashMap<StreamKey, oneshot::Sender<()>>,
    /// The operator was told that streams are refused, and none was taken since.
    told_full: bool,
    /// No streams are taken any more.
    is_draining: bool,
    /// The operator was told that the gateway has left the network, and it has not come back since.
    told_left: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_connections(&self) -> bool {
        let connections = &mut self.lock().connections;
        while connections.try_join_next().is_some() {}
        !connections.is_empty()
    }

    /// Sees to what follows from a change of the core.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        self.handle_events(&mut state);
        drop(state);
        self.wake_senders.notify_one();
    }

    fn handle_events(&self, state: &mut State) {
        while let Some(event) = state.core.poll_event() {
            match event {
                ProviderEvent::Stream(id, event) => self.handle_event(state, id, event),
                ProviderEvent::SessionEnded(id) => {
                    state.waiting.wake_session(id);
                    state.dialling.retain(|key, _| key.0 != id);
                }
            }
        }
    }

    fn handle_event(&self, state: &mut State, id: SessionId, event: StreamEvent) {
        match event {
            StreamEvent::Open { stream, target } => {
                self.start_connection(state, (id, stream), target);
            }
            StreamEvent::Readable(stream) => state.waiting.wake_reader((id, stream)),
            StreamEvent::Writable(stream) => state.waiting.wake_writer((id, stream)),
            StreamEvent::Reset(stream) => {
                state.dialling.remove(&(id, stream));
                state.waiting.wake_reader((id, stream));
                state.waiting.wake_writer((id, stream));
            }
            StreamEvent::Opened { .. } => {}
        }
    }

    fn start_connection(&self, state: &mut State, key: StreamKey, target: Target) {
        while state.connections.try_join_next().is_some() {}
        if state.is_draining {
            state.core.opened(key, OpenOutcome::Failed);
            state.core.release(key);
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        let is_full = state.connections.len() >= MAX_CONNECTIONS || state.core.is_memory_short();
        if is_full {
            if !std::mem::replace(&mut state.told_full, true) {
                tracing::warn!("streams are refused: all connections or all memory are in use");
            }
            state.core.opened(key, OpenOutcome::Failed);
            state.core.release(key);
            return;
        }
        state.told_full = false;
        let (stop, stopped) = oneshot::channel();
        state.dialling.insert(key, stop);
        state.connections.spawn(this.connect(key, target, stopped));
    }

    /// Connects a stream and carries its bytes until both directions have ended.
    async fn connect(self: Arc<Self>, key: StreamKey, target: Target, stop: oneshot::Receiver<()>) {
        // Dropping it, however this ends, lets go of the stream.
        let mut stream = MixStream::new(self.clone(), key);
        let dialled = tokio::select! {
            dialled = self.dialer.connect(&target) => dialled,
            // The client does not want it any more.
            _ = stop => return,
        };
        self.lock().dialling.remove(&key);
        match dialled {
            Ok(connection) => {
                let mut connection = Guarded { connection, ended: false };
                self.answer(key, OpenOutcome::Connected);
                let relayed = relay(&mut stream, &mut connection.connection).await;
                connection.ended = relayed.is_ok();
            }
            Err(error) => {
                tracing::debug!("{target}: {error}");
                self.answer(key, error.outcome());
            }
        }
    }

    fn answer(&self, key: StreamKey, outcome: OpenOutcome) {
        let mut state = self.lock();
        state.core.opened(key, outcome);
        self.settle(state);
    }

    /// Takes over what new documents say about delays, and tells the operator when the provider's gateway
    /// has left the network. Replies go on SURBs, so that the provider draws no routes.
    async fn follow_documents(self: Arc<Self>) {
        let gateway = self.endpoint.address().gateway;
        self.endpoint
            .on_each_document(|| {
                let mut state = self.lock();
                state.core.set_mean_delay(self.endpoint.mean_delay());
                let has_left = self.endpoint.topology().gateway(&gateway).is_none();
                if has_left && !state.told_left {
                    tracing::warn!(
                        "the gateway {gateway} has left the network: clients cannot reach this provider"
                    );
                }
                state.told_left = has_left;
            })
            .await;
    }

    /// Pulls replies out of the sessions whenever the link takes some: one of several equal tasks.
    async fn send_replies(self: Arc<Self>) {
        let mut contents = vec![Vec::new(); REPLIES_PER_TURN];
        loop {
            self.wait_for_work().await;
            let mut permits = match self.endpoint.reserve().await {
                Reserved::Permit(permit) => vec![permit],
                Reserved::TimedOut => continue,
                Reserved::Ended => return,
            };
            let mut surbs = Vec::new();
            // Nobody waits for a full batch: it is what there is now.
            for out in &mut contents {
                if permits.len() == surbs.len() {
                    let Some(permit) = self.endpoint.try_reserve() else { break };
                    permits.push(permit);
                }
                let mut state = self.lock();
                let surb = state.core.next_reply(Instant::now(), out);
                self.handle_events(&mut state);
                drop(state);
                let Some(surb) = surb else { break };
                surbs.push(surb);
            }
            if surbs.is_empty() {
                continue;
            }
            // There may be more; while this task builds, another one looks.
            self.wake_senders.notify_one();
            let replies = surbs.into_iter().zip(contents.iter().map(|c| &c[..])).collect();
            for (sealed, permit) in self.seal(replies).zip(permits) {
                permit.send(sealed);
            }
            tokio::task::yield_now().await;
        }
    }

    async fn wait_for_work(&self) {
        loop {
            let deadline = {
                let mut state = self.lock();
                state.core.handle_timeout(Instant::now());
                if state.core.wants_transmit() {
                    return;
                }
                state.core.poll_timeout()
            };
            match deadline {
                Some(at) => {
                    tokio::select! {
                        () = self.wake_senders.notified() => {}
                        () = sleep_until(at.into()) => {}
                    }
                }
                None => self.wake_senders.notified().await,
            }
        }
    }

    fn seal(&self, replies: Vec<(Surb, &[u8])>) -> impl Iterator<Item = (HopAddress, Packet)> {
        use_surbs(self.endpoint.payload_bytes(), replies).into_iter().filter_map(|sealed| {
            sealed.inspect_err(|error| tracing::trace!("a SURB was of no use: {error}")).ok()
        })
    }
}

impl Arrivals for Shared {
    fn arrived(&self, arrived: Vec<(Identifier, Payload)>) {
        let drops = self.endpoint.drops();
        let mut payloads = Vec::with_capacity(arrived.len());
        for (identifier, payload) in arrived {
            match identifier == Identifier::default() {
                true => payloads.push(payload),
                false => drops.add(DropReason::NotAwaited),
            }
        }
        let opened = open_payloads(payloads);
        let mut state = self.lock();
        for contents in opened {
            let Ok(contents) = contents else {
                drops.add(DropReason::Changed);
                continue;
            };
            if let Err(reason) = state.core.handle_packet(Instant::now(), wall_ms(), &contents) {
                drops.add(DropReason::Refused);
                tracing::trace!("a packet was dropped: {reason}");
            }
        }
        self.settle(state);
    }
}

impl StreamHost for Shared {
    fn poll_read(
        &self,
        key: StreamKey,
        cx: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        let State { core, waiting, .. } = &mut *state;
        let result = waiting.poll_read(core.read(key, out), key, cx);
        self.settle(state);
        result
    }

    fn poll_write(
        &self,
        key: StreamKey,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        let State { core, waiting, .. } = &mut *state;
        let result = waiting.poll_write(core.write(key, bytes), key, cx);
        self.settle(state);
        result
    }

    fn finish(&self, key: StreamKey) {
        let mut state = self.lock();
        state.core.finish(key);
        self.settle(state);
    }

    fn release(&self, key: StreamKey) {
        let mut state = self.lock();
        state.waiting.forget(key);
        state.core.release(key);
        self.settle(state);
    }
}

/// A connection to a target: reset when it is dropped, unless it ended, so that the target does not
/// take a break for an end.
struct Guarded {
    connection: TcpStream,
    ended: bool,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if !self.ended {
            // It fails on a socket that is broken already.
            let _ = self.connection.set_zero_linger();
        }
    }
}

/// The addresses that this machine uses towards the internet when it starts.
fn own_addresses() -> Vec<IpAddr> {
    // Addresses of documentation (RFC 5737, RFC 3849), which routes treat like all others.
    let far: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 1).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    far.into_iter().filter_map(source_towards).collect()
}

/// The address that this machine comes from at `target`. Nothing is sent to find out: a datagram
/// socket that is connected has a source address.
fn source_towards(target: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match target {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((target, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Milliseconds since 1970.
fn wall_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
