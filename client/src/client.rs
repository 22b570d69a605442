//! A client of a provider: opens streams, and drives the sessions that carry them.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{ClientSession, OpenOutcome, SessionId, StreamEvent};
use mixsocks_common::target::Target;
use mixsocks_common::topology::{NoRoute, Topology};
use mixsocks_sphinx::{Identifier, Payload, Route, SecretKey, recover_replies};
use rand::RngExt;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use crate::endpoint::{Arrivals, Endpoint, EndpointConfig, worker_count};
use crate::gateway::{GatewayLinkError, LinkState};
use crate::stream::{MixStream, OpenError, StreamHost, StreamKey, Waiting};
use crate::surbs::{self, SurbStore};

/// New streams move to a new session after this time, so that no session becomes a profile.
const SESSION_AGE: Duration = Duration::from_secs(10 * 60);

/// A provider that says nothing at all for so long is taken for dead.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);

/// The provider's dialling takes 15 s at most (names and connection), and its answer may have to be
/// repeated.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// SURBs that a worker makes at a time: some milliseconds of work.
const SURBS_PER_TURN: usize = 2;

/// What a client needs.
#[derive(Debug)]
pub struct ClientConfig {
    /// The network.
    pub topology: Arc<Topology>,
    /// Who the client is to its gateway.
    pub identity: Arc<IdentityKey>,
    /// The key of the last layer of packets for it.
    pub encryption: SecretKey,
    /// Its gateway; never the provider's.
    pub gateway: Identity,
    /// Where the gateway's token is kept; its directory must exist.
    pub token_file: PathBuf,
    /// The provider through which streams are opened.
    pub provider: Address,
    /// Mean delay of each mix; `None` takes the network's.
    pub mean_delay: Option<Duration>,
}

/// Why a client does not start.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The gateway sees who the client is, the provider's gateway sees who is visited: one of them
    /// must not be both.
    #[error("the client's gateway is the provider's as well: choose another gateway")]
    SameGateway,
    /// The provider cannot be reached through this network.
    #[error("the provider is not reachable: {0}")]
    Provider(#[from] NoRoute),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayLinkError),
}

/// A client of a provider. Clones are the same client; it stops with [`Client::shutdown`], or when
/// the last clone is dropped. Streams that are open then are reset.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    _tasks: Arc<Tasks>,
}

/// Stops the tasks, and whoever waits for a stream, when the last clone is dropped.
struct Tasks {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.shared.end_all();
    }
}

struct Shared {
    endpoint: Arc<Endpoint>,
    provider: Address,
    state: Mutex<State>,
    /// A packet may have to be sent.
    wake_senders: Notify,
    /// SURBs may have to be made.
    wake_makers: Notify,
}

#[derive(Default)]
struct State {
    sessions: Vec<ClientSession>,
    surbs: SurbStore,
    waiting: Waiting,
    opening: HashMap<StreamKey, oneshot::Sender<Result<(), OpenError>>>,
    closed: bool,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.address())
    }
}

impl Client {
    /// Connects to the gateway, registering if need be.
    ///
    /// # Errors
    /// [`ClientError`] says what is wrong. Whether the provider lives shows with the first stream.
    pub async fn connect(config: ClientConfig) -> Result<Self, ClientError> {
        let ClientConfig {
            topology,
            identity,
            encryption,
            gateway,
            token_file,
            provider,
            mean_delay,
        } = config;
        if provider.gateway == gateway {
            return Err(ClientError::SameGateway);
        }
        topology.gateway(&provider.gateway).ok_or(NoRoute::UnknownGateway)?;
        let config =
            EndpointConfig { topology, identity, encryption, gateway, token_file, mean_delay };
        let (endpoint, receiver) = Endpoint::connect(config).await?;
        let shared = Arc::new(Shared {
            endpoint: endpoint.clone(),
            provider,
            state: Mutex::new(State::default()),
            wake_senders: Notify::new(),
            wake_makers: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(endpoint.receive(receiver, shared.clone()));
        for _ in 0..worker_count() {
            tasks.spawn(shared.clone().send_packets());
            tasks.spawn(shared.clone().make_surbs());
        }
        let tasks = Tasks { shared: shared.clone(), _tasks: tasks };
        Ok(Self { shared, _tasks: Arc::new(tasks) })
    }

    /// This client's address.
    pub fn address(&self) -> Address {
        self.shared.endpoint.address()
    }

    /// Opens a stream to `target` and waits for the provider's real outcome.
    ///
    /// # Errors
    /// [`OpenError`] says why there is none.
    pub async fn open_stream(&self, target: Target) -> Result<MixStream, OpenError> {
        self.open_stream_with(target, &[]).await
    }

    /// Like [`Client::open_stream`]; the bytes `early` travel together with the request.
    ///
    /// # Errors
    /// As [`Client::open_stream`].
    pub async fn open_stream_with(
        &self,
        target: Target,
        early: &[u8],
    ) -> Result<MixStream, OpenError> {
        // A provider that was restarted does not know the session, and says so: the second try is in
        // a new one. The first did nothing there.
        match self.try_open(target.clone(), early).await {
            Err(Attempt::SessionGone) => {
                self.try_open(target, early).await.map_err(Attempt::into_error)
            }
            result => result.map_err(Attempt::into_error),
        }
    }

    async fn try_open(&self, target: Target, early: &[u8]) -> Result<MixStream, Attempt> {
        let began = Instant::now();
        let (answer, answered) = oneshot::channel();
        let key = self.shared.lock().open(&self.shared.endpoint, target, early, answer)?;
        // From here on, giving up drops the stream, which resets it.
        let stream = MixStream::new(self.shared.clone(), key);
        self.shared.wake_senders.notify_one();
        self.shared.wake_makers.notify_one();
        tokio::pin!(answered);
        let result = match timeout(SILENCE_LIMIT, &mut answered).await {
            Ok(result) => result,
            Err(_) if !self.shared.heard_since(key.0, began) => return Err(self.shared.silence()),
            Err(_) => match timeout(OPEN_LIMIT - SILENCE_LIMIT, &mut answered).await {
                Ok(result) => result,
                Err(_) => return Err(self.shared.silence()),
            },
        };
        match result {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) => Err(Attempt::Failed(error)),
            Err(_) if self.shared.lock().closed => Err(Attempt::Failed(OpenError::Closed)),
            Err(_) => Err(Attempt::SessionGone),
        }
    }

    /// Tells the provider to forget the sessions, and stops. Streams that are open are reset.
    pub async fn shutdown(&self) {
        const FAREWELL: Duration = Duration::from_millis(200);
        {
            let mut state = self.shared.lock();
            state.closed = true;
            state.opening.clear();
            for session in &mut state.sessions {
                session.close();
            }
        }
        self.shared.wake_senders.notify_one();
        // The CLOSEs are sent by then, or never: the provider forgets silent sessions by itself.
        let _ = timeout(FAREWELL, async {
            while self
                .shared
                .lock()
                .sessions
                .iter()
                .any(|session| session.wants_transmit(Instant::now(), 0))
            {
                tokio::time::sleep(FAREWELL / 20).await;
            }
        })
        .await;
        self.shared.end_all();
    }
}

/// How an attempt to open a stream failed.
enum Attempt {
    Failed(OpenError),
    SessionGone,
}

impl Attempt {
    fn into_error(self) -> OpenError {
        match self {
            Self::Failed(error) => error,
            Self::SessionGone => OpenError::ProviderSilent,
        }
    }
}

#[cfg(feature = "socks")]
impl crate::socks::OpenStream for Client {
    type Stream = MixStream;

    async fn open(&self, target: Target, early: bytes::Bytes) -> Result<MixStream, OpenError> {
        self.open_stream_with(target, &early).await
    }
}

impl State {
    fn open(
        &mut self,
        endpoint: &Endpoint,
        target: Target,
        early: &[u8],
        answer: oneshot::Sender<Result<(), OpenError>>,
    ) -> Result<StreamKey, Attempt> {
        if self.closed {
            return Err(Attempt::Failed(OpenError::Closed));
        }
        let session = self.current_session(endpoint);
        let stream = session.open(target).ok_or(Attempt::Failed(OpenError::TooManyStreams))?;
        // An empty send buffer takes far more than a program sends early.
        session.write(stream, early);
        let key = (session.id(), stream);
        self.opening.insert(key, answer);
        Ok(key)
    }

    /// The newest session, unless it is too old or has ended.
    fn current_session(&mut self, endpoint: &Endpoint) -> &mut ClientSession {
        let now = Instant::now();
        let usable =
            |session: &ClientSession| session.closed().is_none() && session.age(now) < SESSION_AGE;
        if !self.sessions.last().is_some_and(usable) {
            let id = SessionId(rand::rng().random());
            let contents = endpoint.max_contents_bytes();
            self.sessions.push(ClientSession::new(
                id,
                wall_ms(),
                now,
                contents,
                endpoint.mean_delay(),
            ));
        }
        self.sessions.last_mut().expect("one was pushed if there was none")
    }

    fn session(&mut self, id: SessionId) -> Option<&mut ClientSession> {
        self.sessions.iter_mut().find(|session| session.id() == id)
    }

    /// Tells waiting tasks what has happened, and removes sessions that have ended.
    fn settle(&mut self) {
        for session in &mut self.sessions {
            let id = session.id();
            while let Some(event) = session.poll_event() {
                match event {
                    StreamEvent::Opened { stream, outcome } => {
                        if let Some(answer) = self.opening.remove(&(id, stream)) {
                            let result = match outcome {
                                OpenOutcome::Connected => Ok(()),
                                outcome => Err(OpenError::Refused(outcome)),
                            };
                            // Whoever asked may have given up.
                            let _ = answer.send(result);
                        }
                    }
                    StreamEvent::Readable(stream) => self.waiting.wake_reader((id, stream)),
                    StreamEvent::Writable(stream) => self.waiting.wake_writer((id, stream)),
                    StreamEvent::Reset(stream) => {
                        if let Some(answer) = self.opening.remove(&(id, stream)) {
                            let _ = answer.send(Err(OpenError::Refused(OpenOutcome::Failed)));
                        }
                        self.waiting.wake_reader((id, stream));
                        self.waiting.wake_writer((id, stream));
                    }
                    StreamEvent::Open { .. } => {}
                }
            }
        }
        let Self { sessions, waiting, opening, surbs, .. } = self;
        sessions.retain(|session| {
            let Some(reason) = session.closed() else { return true };
            let id = session.id();
            tracing::debug!("a session ended: {reason}");
            waiting.wake_session(id);
            // Dropping the sender tells that the session is gone.
            opening.retain(|key, _| key.0 != id);
            surbs.forget_session(id);
            false
        });
    }

    /// The contents of the next packet of any session.
    fn next_packet(&mut self, now: Instant, route: &Route, out: &mut Vec<u8>) -> bool {
        self.surbs.ready(now);
        let Self { sessions, surbs, .. } = self;
        let sent = sessions.iter_mut().any(|session| {
            let mut source = surbs.source(session.id());
            session.poll_transmit(now, route.total_delay(), &mut source, out)
        });
        // Sessions take turns.
        if sent && sessions.len() > 1 {
            let newest = sessions.len() - 1;
            sessions[..newest].rotate_left(1);
        }
        sent
    }

    fn wants_transmit(&mut self, now: Instant) -> bool {
        let surbs = self.surbs.ready(now);
        self.sessions.iter().any(|session| session.wants_transmit(now, surbs))
    }

    fn handle_timeouts(&mut self, now: Instant) {
        for session in &mut self.sessions {
            if session.poll_timeout().is_some_and(|at| at <= now) {
                session.handle_timeout(now);
            }
            if session.age(now) >= SESSION_AGE && session.stream_count() == 0 {
                session.close();
            }
        }
        self.settle();
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.sessions.iter().filter_map(ClientSession::poll_timeout).min()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_all(&self) {
        let mut state = self.lock();
        state.closed = true;
        for session in &mut state.sessions {
            session.end(CloseReason::Done);
        }
        state.settle();
    }

    fn heard_since(&self, id: SessionId, since: Instant) -> bool {
        self.lock().session(id).is_some_and(|session| session.last_heard() > since)
    }

    fn silence(&self) -> Attempt {
        Attempt::Failed(match &*self.endpoint.state().borrow() {
            LinkState::Connected => OpenError::ProviderSilent,
            _ => OpenError::NoGateway,
        })
    }

    /// Pulls packets out of the sessions whenever the link takes one: one of several equal tasks.
    async fn send_packets(self: Arc<Self>) {
        let mut contents = Vec::new();
        loop {
            self.wait_for_work().await;
            let Some(permit) = self.endpoint.reserve().await else { return };
            let Ok(route) = self.endpoint.route_to(&self.provider) else { return };
            let (sent, demand) = {
                let mut state = self.lock();
                let sent = state.next_packet(Instant::now(), &route, &mut contents);
                state.settle();
                (sent, state.sessions.iter().any(|session| session.surb_demand() > 0))
            };
            if demand {
                self.wake_makers.notify_one();
            }
            if sent {
                // There may be more; while this task builds, another one looks.
                self.wake_senders.notify_one();
                permit.send(self.endpoint.build(route, &contents));
                tokio::task::yield_now().await;
            }
        }
    }

    /// Waits until a session wants to send; handles what is due meanwhile.
    async fn wait_for_work(&self) {
        loop {
            let deadline = {
                let now = Instant::now();
                let mut state = self.lock();
                state.handle_timeouts(now);
                if state.wants_transmit(now) {
                    return;
                }
                state.next_timeout()
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

    /// Makes SURBs whenever sessions want some: one of several equal tasks.
    async fn make_surbs(self: Arc<Self>) {
        loop {
            let claimed = {
                let mut state = self.lock();
                state.surbs.ready(Instant::now());
                let demand = state.sessions.iter().map(ClientSession::surb_demand).sum();
                state.surbs.claim(demand, SURBS_PER_TURN)
            };
            if claimed == 0 {
                self.wake_makers.notified().await;
                continue;
            }
            self.wake_makers.notify_one();
            let made = surbs::make(&self.endpoint, claimed);
            self.lock().surbs.deliver(claimed, made);
            self.wake_senders.notify_one();
            tokio::task::yield_now().await;
        }
    }
}

impl Arrivals for Shared {
    fn arrived(&self, identifier: Identifier, payload: Payload) {
        let Some(awaited) = self.lock().surbs.take(&identifier) else { return };
        let Some(Ok(contents)) = recover_replies(vec![(awaited.recovery, payload)]).pop() else {
            tracing::trace!("a reply was changed on its way");
            return;
        };
        let mut state = self.lock();
        let Some(session) = state.session(awaited.session) else { return };
        if let Err(error) = session.handle_reply(Instant::now(), awaited.delay, &contents) {
            tracing::trace!("a reply was not taken: {error}");
        }
        state.settle();
        drop(state);
        self.wake_senders.notify_one();
        self.wake_makers.notify_one();
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
        let session = sessions.iter_mut().find(|session| session.id() == key.0);
        let result = waiting.poll_read(session, key, cx, out);
        if result.is_ready() {
            drop(state);
            self.wake_senders.notify_one();
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
        let session = sessions.iter_mut().find(|session| session.id() == key.0);
        let result = waiting.poll_write(session, key, cx, bytes);
        drop(state);
        self.wake_senders.notify_one();
        result
    }

    fn finish(&self, key: StreamKey) {
        if let Some(session) = self.lock().session(key.0) {
            session.finish(key.1);
        }
        self.wake_senders.notify_one();
    }

    fn release(&self, key: StreamKey) {
        let mut state = self.lock();
        state.waiting.forget(key);
        state.opening.remove(&key);
        if let Some(session) = state.session(key.0) {
            session.release(key.1);
        }
        drop(state);
        self.wake_senders.notify_one();
    }
}

/// Milliseconds since 1970.
fn wall_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
