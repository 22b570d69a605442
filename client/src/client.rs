//! A client of one provider or several: opens streams, and drives the sessions that carry them.

mod messages;
mod routes;
mod traffic;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{AccessToken, OpenOutcome, PresentedToken, SessionId, StreamEvent};
use mixsocks_common::target::Target;
use mixsocks_common::topology::{NoRoute, Topology, check_route};
use mixsocks_sphinx::{ReplyRecovery, SecretKey};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout, timeout_at};

use self::messages::Mail;
use self::routes::Routes;
use crate::core::{ClientCore, ClientEvent};
use crate::endpoint::{Endpoint, EndpointConfig, unix_time, worker_count};
use crate::gateway::{GatewayLinkError, GatewayState, LinkState};
use crate::headers::HeaderPool;
use crate::messages::ReceivedLogError;
use crate::messages::{Messenger, MessengerOptions};
use crate::renewal::{Renewal, Stale};
use crate::stream::{MixStream, OpenError, StreamHost, StreamKey, Waiting};

/// When no provider says anything at all for so long, opening a stream fails: within 10 s.
const SILENCE_LIMIT: Duration = Duration::from_secs(9);

/// How often it is looked whether a provider that says nothing is at fault.
const FAULT_POLL: Duration = Duration::from_millis(250);

/// The provider's dialling takes 15 s at most (names and connection), and its answer may have to be
/// repeated.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// How long saying goodbye may take, and how often it is looked whether it is done.
const FAREWELL_LIMIT: Duration = Duration::from_millis(800);
const FAREWELL_POLL: Duration = Duration::from_millis(10);

/// What a client needs.
#[derive(Debug)]
pub struct ClientConfig {
    /// The network: new documents are used as they come. When the sender is gone, the last one stays.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// Who the client is to its gateway.
    pub identity: Arc<IdentityKey>,
    /// The key of the last layer of packets for it.
    pub encryption: SecretKey,
    /// Its gateway; never the provider's.
    pub gateway: Identity,
    /// Where the gateway's token is kept; its directory must exist.
    pub token_file: PathBuf,
    /// The providers through which streams are opened, the preferred one first: the others serve while
    /// it is silent. There must be one.
    pub providers: Vec<Address>,
    /// What opens a provider that demands a token. The others are shown nothing.
    pub access_token: Option<AccessToken>,
    /// Mean delay of each mix; `None` takes the network's.
    pub mean_delay: Option<Duration>,
    /// Whether the client sends and receives messages too: [`Client::messenger`].
    pub messages: Option<MessengerOptions>,
}

/// Why a client does not start.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The gateway sees who the client is, the provider's gateway sees who is visited: one of them
    /// must not be both.
    #[error("the client's gateway is the provider's as well: choose another gateway")]
    SameGateway,
    /// Somebody must talk to targets.
    #[error("no provider was given")]
    NoProvider,
    /// No provider can be reached through this network.
    #[error("the provider is not reachable: {0}")]
    Provider(#[from] NoRoute),
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayLinkError),
    /// Messages that came before would be received once more.
    #[error(transparent)]
    ReceivedLog(#[from] ReceivedLogError),
    /// Messages do not fit the network's packets.
    #[error("the packets of this network are too short, or too long, for messages")]
    NoMessages,
}

/// A client of a provider. Clones are the same client; it stops with [`Client::shutdown`], or when
/// the last clone is dropped. Streams that are open then are reset.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    tasks: Arc<Tasks>,
}

/// Stops the tasks, and whoever waits for a stream, when the last clone is dropped.
struct Tasks {
    shared: Arc<Shared>,
    tasks: Mutex<JoinSet<()>>,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.shared.end_all();
    }
}

pub(crate) struct Shared {
    endpoint: Arc<Endpoint>,
    providers: Vec<Address>,
    /// Messages, if the client has any.
    mail: Option<Mail>,
    state: Mutex<State>,
    /// A packet may have to be sent.
    wake_senders: Notify,
    /// SURBs or headers may have to be made.
    wake_makers: Notify,
}

struct State {
    core: ClientCore<ReplyRecovery>,
    /// What is known of each provider.
    providers: Vec<ProviderState>,
    renewal: Renewal,
    routes: Routes,
    waiting: Waiting,
    opening: HashMap<StreamKey, oneshot::Sender<Result<(), Attempt>>>,
    closed: bool,
    /// The user was told that nothing answers, and no stream was opened since.
    told_silent: bool,
    /// Messages are asked first for the next packet.
    is_turn_of_messages: bool,
}

struct ProviderState {
    /// The user's, whether the provider is shown it or not.
    access_token: Option<PresentedToken>,
    headers: HeaderPool,
    /// The user was told that the provider demands a token, and no stream was opened since.
    told_token: bool,
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
            providers,
            access_token,
            mean_delay,
            messages,
        } = config;
        if providers.iter().any(|provider| provider.gateway == gateway) {
            return Err(ClientError::SameGateway);
        }
        let first = providers.first().ok_or(ClientError::NoProvider)?;
        {
            let (topology, now) = (topology.borrow(), unix_time());
            let route_to = |provider: &Address| check_route(&topology, &provider.gateway, now);
            if !providers.iter().any(|provider| route_to(provider).is_ok()) {
                route_to(first)?;
            }
        }
        let config = EndpointConfig {
            topology,
            identity,
            encryption,
            gateway,
            token_file,
            mean_delay,
            receives_messages: messages.is_some(),
        };
        Self::start(config, providers, access_token, messages).await
    }

    /// Connects to the gateway; with no providers if there are only messages.
    pub(crate) async fn start(
        config: EndpointConfig,
        providers: Vec<Address>,
        access_token: Option<AccessToken>,
        messages: Option<MessengerOptions>,
    ) -> Result<Self, ClientError> {
        let (endpoint, receiver) = Endpoint::connect(config).await?;
        let mail = messages.map(|options| Mail::new(&endpoint, options)).transpose()?;
        let topology = endpoint.topology();
        let (now, own) = (Instant::now(), endpoint.address().gateway);
        let mut core = ClientCore::new(
            &topology,
            providers.len(),
            now,
            endpoint.max_contents_bytes(),
            endpoint.mean_delay(),
        );
        let mut states = Vec::with_capacity(providers.len());
        for (number, provider) in providers.iter().enumerate() {
            let token = access_token.as_ref().map(|token| token.present(&provider.encryption));
            let advert = topology.provider_at(provider);
            if advert.is_none_or(|advert| advert.requires_token) {
                core.set_access_token(number, token.clone());
            }
            states.push(ProviderState {
                access_token: token,
                headers: HeaderPool::default(),
                told_token: false,
            });
        }
        let peers = providers.iter().map(|provider| provider.gateway).collect();
        let state = State {
            core,
            providers: states,
            renewal: Renewal::new(topology, own, peers, now, unix_time()),
            routes: Routes::default(),
            waiting: Waiting::default(),
            opening: HashMap::new(),
            closed: false,
            told_silent: false,
            is_turn_of_messages: false,
        };
        let shared = Arc::new(Shared {
            endpoint: endpoint.clone(),
            providers,
            mail,
            state: Mutex::new(state),
            wake_senders: Notify::new(),
            wake_makers: Notify::new(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(endpoint.receive(receiver, shared.clone()));
        tasks.spawn(shared.clone().follow_documents());
        tasks.spawn(shared.clone().follow_link());
        for _ in 0..worker_count() {
            tasks.spawn(shared.clone().send_packets());
            tasks.spawn(shared.clone().make_ahead());
        }
        if shared.mail.is_some() {
            tasks.spawn(shared.clone().confirm_deliveries());
            tasks.spawn(shared.clone().refill_others());
            tasks.spawn(shared.clone().take_in_surbs());
        }
        let tasks = Tasks { shared: shared.clone(), tasks: Mutex::new(tasks) };
        Ok(Self { shared, tasks: Arc::new(tasks) })
    }

    /// This client's address.
    pub fn address(&self) -> Address {
        self.shared.endpoint.address()
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The messages of this client, if [`ClientConfig::messages`] asked for them.
    pub fn messenger(&self) -> Option<Messenger> {
        self.shared.mail.as_ref()?;
        Some(Messenger::of(self.clone()))
    }

    /// How the link to the gateway is.
    pub fn link(&self) -> GatewayState {
        self.shared.endpoint.state().clone()
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
        let deadline = Instant::now() + SILENCE_LIMIT;
        let mut candidates = self.shared.candidates(Instant::now())?.into_iter().peekable();
        let mut result = Err(OpenError::ProviderSilent.into());
        while let Some(provider) = candidates.next() {
            let silent_at = Instant::now() + self.shared.lock().core.silent_after();
            // What was sent early may have been passed on: it must not be sent to another one as well.
            let may_move_on = candidates.peek().is_some() && early.is_empty();
            let move_on_at = Some(silent_at).filter(|at| may_move_on && *at < deadline);
            result = self.try_open(provider, target.clone(), early, move_on_at, deadline).await;
            // For the same reason not again.
            if matches!(result, Err(Attempt::Again(_))) && early.is_empty() {
                result = self.try_open(provider, target.clone(), early, move_on_at, deadline).await;
            }
            if !matches!(result, Err(Attempt::MoveOn)) {
                break;
            }
        }
        result.map_err(Attempt::into_error)
    }

    /// Waits for the answer of one provider: from `move_on_at` on until it is at fault, until `deadline` if it
    /// is silent, and else for as long as it may take to reach the target.
    async fn try_open(
        &self,
        provider: usize,
        target: Target,
        early: &[u8],
        move_on_at: Option<Instant>,
        deadline: Instant,
    ) -> Result<MixStream, Attempt> {
        let began = Instant::now();
        let (answer, answered) = oneshot::channel();
        let key = {
            let mut state = self.shared.lock();
            let key = state.open(provider, target, early)?;
            state.opening.insert(key, answer);
            key
        };
        // From here on, giving up drops the stream, which resets it.
        let stream = MixStream::new(self.shared.clone(), key);
        self.shared.wake_senders.notify_one();
        self.shared.wake_makers.notify_one();
        tokio::pin!(answered);
        // Only a client that is shut down drops the other end.
        let opened = |result: Result<Result<(), Attempt>, _>| {
            result.unwrap_or(Err(OpenError::Closed.into())).map(|()| stream)
        };
        let mut at_fault_at = move_on_at;
        while let Some(at) = at_fault_at.filter(|at| *at < deadline) {
            if let Ok(result) = timeout_at(at.into(), &mut answered).await {
                return opened(result);
            }
            if self.shared.is_at_fault(provider, key.0, began) {
                return Err(Attempt::MoveOn);
            }
            // Nothing has shown yet that the mixnet works.
            at_fault_at = Some(at + FAULT_POLL);
        }
        if let Ok(result) = timeout_at(deadline.into(), &mut answered).await {
            return opened(result);
        }
        if !self.shared.is_silent(key.0, Instant::now())
            && let Ok(result) = timeout_at((began + OPEN_LIMIT).into(), &mut answered).await
        {
            return opened(result);
        }
        Err(self.shared.silence())
    }

    /// Tells the provider to forget the sessions, and stops. Streams that are open are reset.
    pub async fn shutdown(&self) {
        {
            let mut state = self.shared.lock();
            state.closed = true;
            state.opening.clear();
            state.core.close();
        }
        self.shared.wake_senders.notify_one();
        // Most providers have heard of it by then; they forget silent sessions by themselves. Repliers
        // would wait for acknowledgements.
        let _ = timeout(FAREWELL_LIMIT, async {
            while self.shared.lock().core.sessions().len() > 0 || self.shared.owes_acks() {
                sleep(FAREWELL_POLL).await;
            }
        })
        .await;
        // The link sends what it was given, and says goodbye.
        self.shared.confirm_the_last();
        self.tasks.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
        let mut link = self.shared.endpoint.state().clone();
        let is_down = |state: &LinkState| !matches!(state, LinkState::Connected);
        let _ = timeout(FAREWELL_LIMIT, link.wait_for(is_down)).await;
        self.shared.end_all();
    }
}

/// How an attempt to open a stream failed.
enum Attempt {
    Failed(OpenError),
    /// The provider says nothing although the mixnet works: another one may be asked.
    MoveOn,
    /// The session was refused, so that nothing was done in it: another one may be taken.
    Again(CloseReason),
}

impl From<OpenError> for Attempt {
    fn from(error: OpenError) -> Self {
        Self::Failed(error)
    }
}

impl Attempt {
    fn into_error(self) -> OpenError {
        match self {
            Self::Failed(error) => error,
            Self::MoveOn => OpenError::ProviderSilent,
            Self::Again(reason) => OpenError::SessionEnded(reason),
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
        provider: usize,
        target: Target,
        early: &[u8],
    ) -> Result<StreamKey, Attempt> {
        if self.closed {
            return Err(OpenError::Closed.into());
        }
        let key = self
            .core
            .open(Instant::now(), wall_ms(), &mut rand::rng(), provider, target)
            .ok_or(OpenError::TooManyStreams)?;
        // An empty send buffer takes far more than a program sends early.
        self.core.write(key, early);
        Ok(key)
    }

    /// Tells waiting tasks what has happened.
    fn settle(&mut self) {
        while let Some(event) = self.core.poll_event() {
            match event {
                ClientEvent::Stream(id, event) => self.handle_event(id, event),
                ClientEvent::MixAvoided => {
                    tracing::info!("a mix does not pass packets on: routes avoid it");
                    self.renew_headers(Instant::now());
                }
                ClientEvent::SessionEnded(id, provider, reason) => {
                    tracing::debug!("a session ended: {reason}");
                    self.waiting.wake_session(id);
                    let may_begin_anew = self.after_end(provider, reason);
                    let ended = self.opening.extract_if(|key, _| key.0 == id);
                    for (_, answer) in ended {
                        // Whoever asked may have given up.
                        let _ = answer.send(Err(match may_begin_anew {
                            true => Attempt::Again(reason),
                            false => OpenError::SessionEnded(reason).into(),
                        }));
                    }
                }
            }
        }
    }

    fn renew_headers(&mut self, now: Instant) {
        self.providers.iter_mut().for_each(|provider| provider.headers.renew(now));
    }

    /// Draws the conclusions from the end of a session; whether another one may be taken in its place.
    fn after_end(&mut self, provider: usize, reason: CloseReason) -> bool {
        match reason {
            // The provider was restarted since it began.
            CloseReason::Unknown => true,
            // The document did not say so. Where there is a choice, the token is for those that it names.
            CloseReason::TokenNeeded
                if self.providers.len() == 1
                    && self.providers[provider].access_token.is_some()
                    && !self.core.shows_access_token(provider) =>
            {
                let token = self.providers[provider].access_token.clone();
                self.core.set_access_token(provider, token);
                true
            }
            CloseReason::TokenNeeded => {
                self.providers[provider].tell_token_needed();
                false
            }
            _ => false,
        }
    }

    fn handle_event(&mut self, id: SessionId, event: StreamEvent) {
        match event {
            StreamEvent::Opened { stream, outcome } => {
                self.told_silent = false;
                if let Some(provider) = self.core.provider_of(id) {
                    self.providers[provider].told_token = false;
                }
                self.answer((id, stream), outcome);
            }
            StreamEvent::Readable(stream) => self.waiting.wake_reader((id, stream)),
            StreamEvent::Writable(stream) => self.waiting.wake_writer((id, stream)),
            StreamEvent::Reset(stream) => {
                self.answer((id, stream), OpenOutcome::Failed);
                self.waiting.wake_reader((id, stream));
                self.waiting.wake_writer((id, stream));
            }
            StreamEvent::Open { .. } => {}
        }
    }

    fn answer(&mut self, key: StreamKey, outcome: OpenOutcome) {
        if let Some(answer) = self.opening.remove(&key) {
            let result = match outcome {
                OpenOutcome::Connected => Ok(()),
                outcome => Err(OpenError::Refused(outcome).into()),
            };
            // Whoever asked may have given up.
            let _ = answer.send(result);
        }
    }
}

impl ProviderState {
    /// The first time in a row, says what the user can do about a provider that demands a token.
    fn tell_token_needed(&mut self) {
        if std::mem::replace(&mut self.told_token, true) {
            return;
        }
        match self.access_token {
            None => tracing::warn!(
                "streams cannot be opened: the provider serves only who has an access token; give \
                 yours with --access-token-file"
            ),
            Some(_) => tracing::warn!(
                "streams cannot be opened: the provider does not know the access token that \
                 --access-token-file names; ask its operator for another one"
            ),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_all(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.opening.clear();
        state.core.end();
        state.settle();
        drop(state);
        self.tell_messengers();
    }

    /// Whether the provider has owed an answer in the session for longer than it takes one that lives:
    /// replies that were under way when it died do not count for it.
    fn is_silent(&self, id: SessionId, now: Instant) -> bool {
        let mut state = self.lock();
        let long = state.core.silent_after() / 2;
        let session = state.core.session(id);
        let since = session.and_then(|session| session.unanswered_since());
        since.is_some_and(|since| now >= since + long)
    }

    /// Follows the document and the clock: what is outdated is thrown away or renewed. Whether packets
    /// can be sent, and answered.
    fn look(&self, state: &mut State, now: Instant) -> Result<(), NoRoute> {
        let (topology, wall) = (self.endpoint.topology(), unix_time());
        let stale = state.renewal.handle(&topology, now, wall, &mut rand::rng());
        if stale >= Stale::MadeAhead {
            state.renew_headers(now);
        }
        match stale {
            Stale::Nothing | Stale::MadeAhead => {}
            Stale::SurbsSoon => state.core.replace_surbs(now),
            Stale::Surbs => state.core.renew_surbs(now),
        }
        self.forget_old_key_epochs(&topology, wall);
        let own = self.endpoint.address().gateway;
        let peers = self.providers.iter().map(|provider| &provider.gateway);
        let State { routes, core, .. } = state;
        let tell = |provider, is_reachable| core.set_reachable(provider, is_reachable);
        routes.check(&topology, &own, peers, wall, tell)
    }

    /// The providers to ask for a stream, the best one first.
    fn candidates(&self, now: Instant) -> Result<Vec<usize>, OpenError> {
        let mut state = self.lock();
        self.look(&mut state, now)?;
        Ok(state.core.candidates(now))
    }

    /// Has everybody look at each new document.
    async fn follow_documents(self: Arc<Self>) {
        self.endpoint
            .on_each_document(|| {
                let (topology, mean_delay) = (self.endpoint.topology(), self.endpoint.mean_delay());
                self.lock().core.follow(Instant::now(), &topology, mean_delay);
                self.wake_senders.notify_one();
            })
            .await;
    }

    /// Has sessions ask for news whenever the link to the gateway is there again.
    async fn follow_link(self: Arc<Self>) {
        let mut link = self.endpoint.state().clone();
        let is_up = |state: &LinkState| matches!(state, LinkState::Connected);
        loop {
            self.set_receiving(true);
            let is_closed = link.wait_for(|state| !is_up(state)).await.is_err();
            self.set_receiving(false);
            if is_closed || link.wait_for(is_up).await.is_err() {
                return;
            }
            self.lock().core.path_is_back();
            self.wake_senders.notify_one();
        }
    }

    /// Whether the provider is silent although the mixnet has worked since then; others are
    /// preferred to it from now on.
    fn is_at_fault(&self, provider: usize, id: SessionId, since: Instant) -> bool {
        let now = Instant::now();
        let is_silent = self.is_silent(id, now);
        let mut state = self.lock();
        let is_at_fault = is_silent && state.core.mixnet_works_since(since);
        if is_at_fault {
            state.core.avoid_provider(now, provider);
        }
        is_at_fault
    }

    /// Why nothing is heard. The first time in a row the user is told.
    fn silence(&self) -> Attempt {
        let mut state = self.lock();
        if let Err(error) = self.look(&mut state, Instant::now()) {
            return OpenError::from(error).into();
        }
        let is_connected = matches!(&*self.endpoint.state().borrow(), LinkState::Connected);
        let error = if is_connected { OpenError::ProviderSilent } else { OpenError::NoGateway };
        if !std::mem::replace(&mut state.told_silent, true) {
            tracing::warn!("streams cannot be opened: {error}");
        }
        error.into()
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
        let State { core, waiting, .. } = &mut *state;
        let result = waiting.poll_write(core.write(key, bytes), key, cx);
        drop(state);
        self.wake_senders.notify_one();
        result
    }

    fn finish(&self, key: StreamKey) {
        self.lock().core.finish(key);
        self.wake_senders.notify_one();
    }

    fn release(&self, key: StreamKey) {
        let mut state = self.lock();
        state.waiting.forget(key);
        state.opening.remove(&key);
        state.core.release(key);
        drop(state);
        self.wake_senders.notify_one();
    }
}

/// Milliseconds since 1970.
fn wall_ms() -> u64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}
