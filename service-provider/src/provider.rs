//! The provider itself: sessions in, TCP connections out.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use mixsocks_client::gateway::GatewayLinkError;
use mixsocks_client::stream::{StreamHost, StreamKey, Waiting};
use mixsocks_client::{Arrivals, Endpoint, EndpointConfig, MixStream, worker_count};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::frame::StreamId;
use mixsocks_common::session::{
    Handled, OpenOutcome, ProviderSession, ProviderSessions, SessionId, StreamEvent,
};
use mixsocks_common::target::Target;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{HopAddress, Identifier, Packet, Payload, SecretKey, Surb, use_surbs};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

use crate::dial::Dialer;
use crate::policy::ExitPolicy;
use crate::resolver::{Resolver, ResolverSetupError};

/// Bytes that all streams of all sessions may hold or be sent; beyond, new streams are refused. A
/// tenth of a server's memory, and a thousand busy streams.
const MAX_COMMITTED_BYTES: u64 = 1024 * 1024 * 1024;

/// Connections, and attempts at one, of all sessions. Each is an open file, of which systems allow
/// few at first, often 1,024: `mixsocks up` raises the limit, and says when that is not enough.
const MAX_CONNECTIONS: usize = 8192;

/// What a relay copies at a time, each way.
const RELAY_BYTES: usize = 16 * 1024;

/// What a provider needs.
#[derive(Debug)]
pub struct ProviderConfig {
    /// The network.
    pub topology: Arc<Topology>,
    /// Who the provider is.
    pub identity: Arc<IdentityKey>,
    /// The key of the last layer of packets for it.
    pub encryption: SecretKey,
    /// The gateway that it is, or will be, registered with.
    pub gateway: Identity,
    /// Where the gateway's token is kept; its directory must exist.
    pub token_file: PathBuf,
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
        let policy = ExitPolicy::new(own_addresses(), config.allow_private);
        let ProviderConfig { topology, identity, encryption, gateway, token_file, .. } = config;
        let config = EndpointConfig {
            topology,
            identity,
            encryption,
            gateway,
            token_file,
            mean_delay: None,
        };
        let (endpoint, receiver) = Endpoint::connect(config).await?;
        let sessions =
            ProviderSessions::new(wall_ms(), endpoint.max_contents_bytes(), endpoint.mean_delay());
        let shared = Arc::new_cyclic(|this| Shared {
            this: this.clone(),
            endpoint: endpoint.clone(),
            dialer: Dialer::new(resolver, policy),
            state: Mutex::new(State::new(sessions)),
            wake_senders: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(endpoint.receive(receiver, shared.clone()));
        for _ in 0..worker_count() {
            tasks.spawn(shared.clone().send_replies());
        }
        Ok(Self { shared, tasks })
    }

    /// Where packets for the provider go: what it advertises.
    pub fn address(&self) -> Address {
        self.shared.endpoint.address()
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
    sessions: ProviderSessions,
    waiting: Waiting,
    /// Sessions that may have something to send, in turn.
    ready: VecDeque<SessionId>,
    is_ready: HashSet<SessionId>,
    timeouts: BTreeSet<(Instant, SessionId)>,
    timeout_of: HashMap<SessionId, Instant>,
    connections: JoinSet<()>,
}

impl State {
    fn new(sessions: ProviderSessions) -> Self {
        Self {
            sessions,
            waiting: Waiting::default(),
            ready: VecDeque::new(),
            is_ready: HashSet::new(),
            timeouts: BTreeSet::new(),
            timeout_of: HashMap::new(),
            connections: JoinSet::new(),
        }
    }

    /// Notes that a session has changed: its events are told, its turn and its timeout are set.
    fn touch(&mut self, id: SessionId, opens: &mut Vec<(StreamKey, Target)>) {
        let Some(session) = self.sessions.get_mut(id) else { return };
        while let Some(event) = session.poll_event() {
            match event {
                StreamEvent::Open { stream, target } => opens.push(((id, stream), target)),
                StreamEvent::Readable(stream) => self.waiting.wake_reader((id, stream)),
                StreamEvent::Writable(stream) => self.waiting.wake_writer((id, stream)),
                StreamEvent::Reset(stream) => {
                    self.waiting.wake_reader((id, stream));
                    self.waiting.wake_writer((id, stream));
                }
                StreamEvent::Opened { .. } => {}
            }
        }
        let timeout = session.poll_timeout();
        self.set_timeout(id, timeout);
        if self.is_ready.insert(id) {
            self.ready.push_back(id);
        }
    }

    fn set_timeout(&mut self, id: SessionId, timeout: Option<Instant>) {
        if let Some(old) = self.timeout_of.remove(&id) {
            self.timeouts.remove(&(old, id));
        }
        if let Some(at) = timeout {
            self.timeout_of.insert(id, at);
            self.timeouts.insert((at, id));
        }
    }

    /// The next reply of any session.
    fn next_reply(&mut self, now: Instant, contents: &mut Vec<u8>) -> Option<Surb> {
        while let Some(id) = self.ready.pop_front() {
            self.is_ready.remove(&id);
            let Some(session) = self.sessions.get_mut(id) else { continue };
            let surb = session.poll_transmit(now, contents);
            let timeout = session.poll_timeout();
            let ended = session.has_ended();
            if ended && surb.is_none() {
                self.end(id, now);
                continue;
            }
            self.set_timeout(id, timeout);
            if surb.is_some() {
                self.is_ready.insert(id);
                self.ready.push_back(id);
                return surb;
            }
        }
        None
    }

    fn handle_timeouts(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timeouts.first()
            && at <= now
        {
            self.set_timeout(id, None);
            if let Some(session) = self.sessions.get_mut(id) {
                session.handle_timeout(now);
                // Due acknowledgements are sent by the turn that follows, which also sets the next
                // timeout.
                if self.is_ready.insert(id) {
                    self.ready.push_back(id);
                }
            }
        }
    }

    fn end(&mut self, id: SessionId, now: Instant) {
        self.sessions.remove(id, now);
        self.set_timeout(id, None);
        self.waiting.wake_session(id);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with a session, and sees to what follows from it.
    fn with_session<T>(
        &self,
        id: SessionId,
        act: impl FnOnce(&mut ProviderSession) -> T,
    ) -> Option<T> {
        let mut state = self.lock();
        let result = act(state.sessions.get_mut(id)?);
        self.settle(state, id);
        Some(result)
    }

    fn settle(&self, mut state: MutexGuard<'_, State>, id: SessionId) {
        let mut opens = Vec::new();
        state.touch(id, &mut opens);
        for (key, target) in opens {
            self.start_connection(&mut state, key, target);
        }
        drop(state);
        self.wake_senders.notify_one();
    }

    fn start_connection(&self, state: &mut State, key: StreamKey, target: Target) {
        while state.connections.try_join_next().is_some() {}
        let Some(this) = self.this.upgrade() else { return };
        let is_full = state.connections.len() >= MAX_CONNECTIONS
            || state.sessions.committed_bytes() > MAX_COMMITTED_BYTES;
        if is_full {
            tracing::warn!("a stream was refused: all connections or all memory are in use");
            if let Some(session) = state.sessions.get_mut(key.0) {
                session.opened(key.1, OpenOutcome::Failed);
                session.release(key.1);
            }
            return;
        }
        state.connections.spawn(this.connect(key, target));
    }

    /// Connects a stream and carries its bytes until both directions have ended.
    async fn connect(self: Arc<Self>, key: StreamKey, target: Target) {
        // Dropping it, however this ends, lets go of the stream.
        let mut stream = MixStream::new(self.clone(), key);
        match self.dialer.connect(&target).await {
            Ok(mut connection) => {
                self.answer(key, OpenOutcome::Connected);
                let result = copy_bidirectional_with_sizes(
                    &mut stream,
                    &mut connection,
                    RELAY_BYTES,
                    RELAY_BYTES,
                )
                .await;
                if result.is_err() {
                    reset(&connection);
                }
            }
            Err(error) => {
                tracing::debug!("{target}: {error}");
                self.answer(key, error.outcome());
            }
        }
    }

    fn answer(&self, (id, stream): (SessionId, StreamId), outcome: OpenOutcome) {
        self.with_session(id, |session| session.opened(stream, outcome));
    }

    /// Pulls replies out of the sessions whenever the link takes one: one of several equal tasks.
    async fn send_replies(self: Arc<Self>) {
        let mut contents = Vec::new();
        loop {
            self.wait_for_work().await;
            let Some(permit) = self.endpoint.reserve().await else { return };
            let surb = self.lock().next_reply(Instant::now(), &mut contents);
            let Some(surb) = surb else { continue };
            // There may be more; while this task builds, another one looks.
            self.wake_senders.notify_one();
            if let Some(sealed) = self.seal(surb, &contents) {
                permit.send(sealed);
            }
        }
    }

    async fn wait_for_work(&self) {
        loop {
            let deadline = {
                let mut state = self.lock();
                state.handle_timeouts(Instant::now());
                if !state.ready.is_empty() {
                    return;
                }
                state.timeouts.first().map(|&(at, _)| at)
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

    fn seal(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)> {
        let payload_bytes = self.endpoint.topology().parameters.payload_bytes;
        match use_surbs(payload_bytes, vec![(surb, contents)]).pop()? {
            Ok(sealed) => Some(sealed),
            Err(error) => {
                tracing::trace!("a SURB was of no use: {error}");
                None
            }
        }
    }
}

impl Arrivals for Shared {
    fn arrived(&self, identifier: Identifier, payload: Payload) {
        if identifier != Identifier::default() {
            return;
        }
        let Ok(contents) = payload.into_plaintext() else {
            tracing::trace!("a packet was changed on its way");
            return;
        };
        let mut state = self.lock();
        match state.sessions.handle_packet(Instant::now(), wall_ms(), &contents) {
            Handled::Session(id) => self.settle(state, id),
            Handled::Refused { reason, contents, surb } => {
                drop(state);
                tracing::debug!("a session was refused: {reason}");
                if let Some((first_hop, packet)) = self.seal(surb, &contents) {
                    // A full queue has more important things to carry.
                    self.endpoint.try_send(first_hop, packet);
                }
            }
            Handled::Dropped(reason) => tracing::trace!("a packet was dropped: {reason}"),
        }
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
        let State { sessions, waiting, .. } = &mut *state;
        let result = waiting.poll_read(sessions.get_mut(key.0), key, cx, out);
        if result.is_ready() {
            self.settle(state, key.0);
        }
        result
    }

    fn poll_write(
        &self,
        key: StreamKey,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        let State { sessions, waiting, .. } = &mut *state;
        let result = waiting.poll_write(sessions.get_mut(key.0), key, cx, bytes);
        if result.is_ready() {
            self.settle(state, key.0);
        }
        result
    }

    fn finish(&self, key: StreamKey) {
        self.with_session(key.0, |session| session.finish(key.1));
    }

    fn release(&self, key: StreamKey) {
        self.lock().waiting.forget(key);
        self.with_session(key.0, |session| session.release(key.1));
    }
}

/// Ends a connection with a reset, so that the target does not take the break for an end.
fn reset(connection: &TcpStream) {
    // The connection may be gone already.
    let _ = connection.set_zero_linger();
}

/// The addresses that this machine uses towards the internet. Nothing is sent to find out: a
/// datagram socket that is connected has a source address.
fn own_addresses() -> Vec<IpAddr> {
    // Addresses of documentation (RFC 5737, RFC 3849), which routes treat like all others.
    let far: [(IpAddr, IpAddr); 2] = [
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into()),
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
    ];
    far.into_iter()
        .filter_map(|(any, far)| {
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.connect((far, 9)).ok()?;
            Some(socket.local_addr().ok()?.ip())
        })
        .collect()
}

/// Milliseconds since 1970.
fn wall_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
