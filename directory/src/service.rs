//! A running authority: the core, its disk, its clock, and the way to the other authorities.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode};
use bytes::Bytes;
use mixsocks_common::directory::{
    Admission, Admitted, Authority, AuthorityStatus, Endorsement, InvitationHash, Memory,
    MessageError, NewAuthorityError, Output, PublishError, Rules, SignedRules, Upload,
};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{NetworkName, SignedTopology};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use crate::body_pass::BodyPass;
use crate::clock::{now, sleep_towards, unix_time};
use crate::http::{Http, HttpError};
use crate::server::{self, Published};
use crate::url::Url;

/// Requests that wait for the authority: each is small or holds a place of its own.
const REQUESTS: usize = 64;
/// Messages that wait for one other authority: the next ones say all that is to be known again.
const OUTBOX: usize = 16;
/// How often what members have uploaded is written down, if it has changed.
const SAVE_INTERVAL: Duration = Duration::from_secs(30);
/// For a stranger's invitation, the admitted are read anew no more often.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
/// When to try again after the disk has refused.
const DISK_RETRY: Duration = Duration::from_secs(1);

/// The document that is served: what a mirror copies.
const DOCUMENT: &str = "topology";
/// The newest one, while it is not in force yet.
const NEXT: &str = "topology.next";
const RECORD: &str = "record";
const MEMBERS: &str = "members";

/// Files of a data directory.
pub trait Store: Send + Sync + 'static {
    /// The contents of a file; `None` when it is not there.
    ///
    /// # Errors
    /// When it cannot be read.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Replaces a file whole; it has survived a crash when this returns.
    ///
    /// # Errors
    /// When it cannot be written; then the old one is still there.
    fn write(&self, name: &str, contents: &[u8]) -> io::Result<()>;
}

/// Another authority.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its key.
    pub identity: Identity,
    /// Where it listens.
    pub url: Url,
}

/// What an authority needs.
pub struct DirectoryConfig {
    /// Who it is.
    pub key: IdentityKey,
    /// What the authorities have agreed on.
    pub rules: Rules,
    /// The other authorities.
    pub peers: Vec<Peer>,
    /// Where it listens, already bound.
    pub listener: TcpListener,
    /// Its disk.
    pub store: Arc<dyn Store>,
    /// Whether it has run before on this disk: then a missing record is a lost one.
    pub has_run: bool,
    /// Whom it admits; asked again after [`DirectoryServer::reload`], and when somebody shows an
    /// invitation that is not known.
    pub admission: Box<dyn Fn() -> io::Result<Admission> + Send>,
    /// Writes down who has used an invitation.
    pub invited: Box<dyn Fn(InvitationHash, Identity) -> io::Result<()> + Send>,
}

/// Why an authority does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file cannot be read.
    #[error("the data directory cannot be read: {0}")]
    Disk(#[from] io::Error),
    /// What it remembers is of no use.
    #[error(transparent)]
    Authority(#[from] NewAuthorityError),
    /// Its peers are not the other authorities.
    #[error("the peers given are not the network's other authorities")]
    Peers,
}

/// A running authority; dropping it stops it.
pub struct DirectoryServer {
    address: SocketAddr,
    requests: mpsc::Sender<Request>,
    tasks: JoinSet<()>,
}

/// Asks a running authority how it is.
#[derive(Clone)]
pub struct Asker(mpsc::Sender<Request>);

impl Asker {
    /// What an operator wants to know; `None` when it has stopped.
    pub async fn status(&self) -> Option<AuthorityStatus> {
        let (answer, status) = oneshot::channel();
        self.0.send(Request::Status { answer }).await.ok()?;
        status.await.ok()
    }
}

pub(crate) enum Request {
    Upload { body: Bytes, answer: oneshot::Sender<Result<Endorsement, Refusal>> },
    Message { body: Bytes, answer: oneshot::Sender<Result<(), Refusal>> },
    Status { answer: oneshot::Sender<AuthorityStatus> },
    Descriptors { answer: oneshot::Sender<Vec<String>> },
    Reload,
}

/// Why a request is refused, as HTTP says it.
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) explanation: String,
}

impl Refusal {
    fn new(status: StatusCode, explanation: impl ToString) -> Self {
        Self { status, explanation: explanation.to_string() }
    }
}

impl DirectoryServer {
    /// Starts an authority.
    ///
    /// # Errors
    /// [`StartError`].
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(config: DirectoryConfig) -> Result<Self, StartError> {
        let DirectoryConfig { key, rules, peers, listener, store, has_run, admission, invited } =
            config;
        let others = rules.authorities().keys().filter(|identity| **identity != key.identity());
        if !others.eq(peers
            .iter()
            .map(|p| p.identity)
            .collect::<std::collections::BTreeSet<_>>()
            .iter())
        {
            return Err(StartError::Peers);
        }
        let address = listener.local_addr()?;
        let served = store.read(DOCUMENT)?;
        let next = store.read(NEXT)?;
        let record = store.read(RECORD)?;
        let memory = match &record {
            Some(record) => Memory::Record(record),
            None if has_run => Memory::Lost,
            None => Memory::New,
        };
        if matches!(memory, Memory::Lost) {
            warn!("the record of this authority is lost: it takes no part in the next documents");
        }
        let rules_text = Bytes::from(SignedRules::sign(&rules, &key));
        // The core has the key, too.
        let key = Arc::new(key);
        let own = IdentityKey::from_bytes(&key.to_bytes());
        let read = |file: Vec<u8>| SignedTopology::read(&file, rules.authorities());
        let served = served.map(read).transpose().map_err(NewAuthorityError::from)?;
        let next = next.map(read).transpose().map_err(NewAuthorityError::from)?;
        // Either may have been written last.
        let latest = served.iter().chain(&next).max_by_key(|signed| signed.topology().epoch);
        let latest = latest.map(|signed| signed.file().as_bytes());
        let mut authority =
            Authority::new(own, rules.clone(), admission()?, latest, memory, now())?;
        if let Some(members) = store.read(MEMBERS)?
            && authority.restore_members(&members, now()).is_err()
        {
            warn!("the file {MEMBERS} is damaged and not used: members upload again");
        }
        let (published, newest) = watch::channel(served.as_ref().map(Published::of));
        let (requests, waiting) = mpsc::channel(REQUESTS);
        let mut tasks = JoinSet::new();
        let http = Http::default();
        let outboxes = peers
            .into_iter()
            .map(|Peer { identity, url }| {
                let (outbox, messages) = mpsc::channel(OUTBOX);
                let (http, key) = (http.clone(), key.clone());
                let courier = Courier { http, url, key, network: rules.network().clone() };
                tasks.spawn(courier.deliver(messages));
                (identity, outbox)
            })
            .collect();
        let service = Service {
            authority,
            store,
            admission,
            invited,
            outboxes,
            published,
            served,
            unwritten: None,
            members_changed: false,
            told_disk: false,
            reloaded: Instant::now(),
            said: None,
        };
        tasks.spawn(service.run(waiting));
        let router =
            server::router(server::Shared::new(requests.clone(), newest, &rules, rules_text));
        tasks.spawn(server::serve(listener, router));
        Ok(Self { address, requests, tasks })
    }

    /// Waits until a part of it has ended by itself, which is a mistake in this program.
    pub async fn ended(&mut self) {
        self.tasks.join_next().await;
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Asks anew whom it admits.
    pub async fn reload(&self) {
        // It fails only when the task is gone, which is seen elsewhere.
        let _ = self.requests.send(Request::Reload).await;
    }

    /// Whom to ask how it is.
    pub fn asker(&self) -> Asker {
        Asker(self.requests.clone())
    }

    /// Stops it. What members have uploaded in the last half minute is uploaded again.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
    }
}

struct Service {
    authority: Authority,
    store: Arc<dyn Store>,
    admission: Box<dyn Fn() -> io::Result<Admission> + Send>,
    invited: Box<dyn Fn(InvitationHash, Identity) -> io::Result<()> + Send>,
    outboxes: BTreeMap<Identity, mpsc::Sender<Bytes>>,
    published: watch::Sender<Option<Published>>,
    /// The document that is served: the newest one comes in its place when it is in force.
    served: Option<SignedTopology>,
    /// What the disk has refused so far: the record, or a document.
    unwritten: Option<Unwritten>,
    members_changed: bool,
    told_disk: bool,
    reloaded: Instant,
    /// The problem that the operator was told.
    said: Option<String>,
}

#[derive(Default)]
struct Unwritten {
    record: Option<Vec<u8>>,
    next: Option<String>,
}

impl Service {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut next_save = Instant::now() + SAVE_INTERVAL;
        self.authority.handle_timeout(now());
        loop {
            self.settle().await;
            let mut due = self.authority.poll_timeout().min(self.next_change());
            if self.unwritten.is_some() {
                due = now() + DISK_RETRY;
            }
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.handle(request).await,
                    None => return,
                },
                () = sleep_towards(due) => self.authority.handle_timeout(now()),
                () = sleep_until(next_save) => {
                    next_save = Instant::now() + SAVE_INTERVAL;
                    self.save_members().await;
                }
            }
        }
    }

    async fn handle(&mut self, request: Request) {
        match request {
            // Whoever asked may have given up.
            Request::Upload { body, answer } => {
                let result = self.upload(&body).await;
                let _ = answer.send(result);
            }
            Request::Message { body, answer } => {
                let _ = answer.send(self.message(&body));
            }
            Request::Status { answer } => {
                let _ = answer.send(self.status());
            }
            Request::Descriptors { answer } => {
                let _ = answer.send(self.authority.descriptors());
            }
            Request::Reload => self.reload(),
        }
    }

    fn status(&self) -> AuthorityStatus {
        let mut status = self.authority.status(now());
        // The newest document may be one that is not in force yet.
        let in_force = self.served.as_ref().filter(|served| served.check_time(unix_time()).is_ok());
        status.in_force = status
            .in_force
            .or(in_force.map(|served| (served.topology().epoch, served.topology().valid_until)));
        status
    }

    async fn upload(&mut self, body: &[u8]) -> Result<Endorsement, Refusal> {
        let upload =
            Upload::from_bytes(body).map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, e))?;
        let Upload { descriptor, endorsements, invitation } = upload;
        let publish = |authority: &mut Authority| {
            authority.publish(descriptor, &endorsements, invitation.as_ref(), now())
        };
        let mut result = publish(&mut self.authority);
        let is_unknown = matches!(result, Err(PublishError::NotAdmitted(_)));
        if invitation.is_some() && is_unknown && self.reloaded.elapsed() >= RELOAD_INTERVAL {
            // The invitation may be newer than what was read.
            self.reload();
            result = publish(&mut self.authority);
        }
        let published = result.map_err(|error| {
            let status = match error {
                PublishError::NotAdmitted(_) => StatusCode::FORBIDDEN,
                PublishError::NotNewer(_) => StatusCode::CONFLICT,
                PublishError::Full => StatusCode::SERVICE_UNAVAILABLE,
                PublishError::Descriptor(_) => StatusCode::BAD_REQUEST,
            };
            Refusal::new(status, error)
        })?;
        self.members_changed = true;
        if let Admitted::Invited(hash) = published.admitted {
            let identity = upload_identity(descriptor);
            let stored = identity.map_or(Ok(()), |identity| (self.invited)(hash, identity));
            if let Err(error) = stored {
                warn!("it cannot be stored who has used an invitation: {error}");
                self.reload();
                identity.iter().for_each(|identity| self.authority.forget(identity));
                let words = "the authority cannot store that the invitation was used; try later";
                return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, words));
            }
            info!("a new member was admitted by invitation");
            self.save_members().await;
        }
        Ok(published.endorsement)
    }

    fn message(&mut self, body: &[u8]) -> Result<(), Refusal> {
        self.authority.handle_message(body, now()).map_err(|error| {
            match &error {
                MessageError::TwoDocuments(_) => warn!("{error}"),
                _ => debug!("{error}"),
            }
            Refusal::new(StatusCode::BAD_REQUEST, error)
        })
    }

    fn reload(&mut self) {
        self.reloaded = Instant::now();
        match (self.admission)() {
            Ok(admission) => self.authority.set_admission(admission),
            Err(error) => warn!("it cannot be read whom this authority admits: {error}"),
        }
    }

    /// Does what the core wants done. While the disk refuses, nothing leaves that depends on it.
    async fn settle(&mut self) {
        if let Some(Unwritten { record, next }) = self.unwritten.take() {
            if let Some(record) = record {
                self.persist(record).await;
            }
            if let Some(next) = next {
                self.keep(next).await;
            }
        }
        while let Some(output) = self.authority.poll_output() {
            match output {
                Output::Persist(record) => self.persist(record).await,
                Output::Send { to, message } => {
                    if let Some(outbox) = self.outboxes.get(&to) {
                        // A full one loses messages, which are repeated.
                        let _ = outbox.try_send(message);
                    }
                }
                Output::Publish(file) => self.keep(file).await,
            }
        }
        self.publish().await;
        self.tell_problem();
    }

    async fn persist(&mut self, record: Vec<u8>) {
        if self.write(RECORD, record.clone()).await {
            self.authority.persisted(now());
        } else {
            self.unwritten_mut().record = Some(record);
        }
    }

    /// Keeps a new document.
    async fn keep(&mut self, file: String) {
        if !self.write(NEXT, file.clone().into_bytes()).await {
            self.unwritten_mut().next = Some(file);
        }
    }

    /// When the newest document comes in the place of the one that is served.
    fn next_change(&self) -> Duration {
        let Some(newest) = self.newer() else { return Duration::MAX };
        Duration::from_secs(newest.topology().valid_from.0)
    }

    /// The newest document, if another one is served.
    fn newer(&self) -> Option<&SignedTopology> {
        let served = self.served.as_ref().map(SignedTopology::digest);
        self.authority.latest().filter(|newest| Some(newest.digest()) != served)
    }

    /// Serves the newest document once it is in force, or at once if no other one is.
    async fn publish(&mut self) {
        let seconds = unix_time();
        let is_needed =
            self.served.as_ref().is_none_or(|served| served.check_time(seconds).is_err());
        let Some(newest) =
            self.newer().filter(|newest| is_needed || newest.topology().valid_from <= seconds)
        else {
            return;
        };
        let newest = newest.clone();
        if self.write(DOCUMENT, newest.file().as_bytes().to_vec()).await {
            info!("the document of epoch {} is served", newest.topology().epoch);
            self.published.send_replace(Some(Published::of(&newest)));
            self.served = Some(newest);
        } else {
            // It is tried again with what else the disk refuses.
            self.unwritten_mut();
        }
    }

    fn unwritten_mut(&mut self) -> &mut Unwritten {
        self.unwritten.get_or_insert_default()
    }

    async fn save_members(&mut self) {
        if std::mem::take(&mut self.members_changed) {
            let members = self.authority.members();
            self.members_changed = !self.write(MEMBERS, members).await;
        }
    }

    /// Whether it was written. What is wrong is told once.
    async fn write(&mut self, name: &'static str, contents: Vec<u8>) -> bool {
        let store = self.store.clone();
        let written = tokio::task::spawn_blocking(move || store.write(name, &contents)).await;
        match written.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
            Ok(()) => {
                self.told_disk = false;
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.told_disk, true) {
                    warn!("{name} cannot be stored, so this authority waits: {error}");
                }
                false
            }
        }
    }

    /// Says once why there is no document.
    fn tell_problem(&mut self) {
        let problem = self.authority.status(now()).problem.map(|problem| problem.to_string());
        if problem != self.said {
            if let Some(problem) = &problem {
                info!("no document can be made yet: {problem}");
            }
            self.said = problem;
        }
    }
}

/// Who made a descriptor that was taken.
fn upload_identity(descriptor: &[u8]) -> Option<Identity> {
    let signed = mixsocks_common::directory::SignedDescriptor::read(descriptor);
    signed.ok().map(|signed| signed.identity())
}

/// The way to one other authority.
struct Courier {
    http: Http,
    url: Url,
    key: Arc<IdentityKey>,
    network: NetworkName,
}

impl Courier {
    /// Brings messages, one after the other.
    async fn deliver(self, mut messages: mpsc::Receiver<Bytes>) {
        let url = &self.url;
        let mut is_down = false;
        while let Some(message) = messages.recv().await {
            match self.bring(message).await {
                Ok(_) if std::mem::take(&mut is_down) => {
                    info!("the authority at {url} answers again");
                }
                Ok(_) => {}
                Err(error @ HttpError::Refused { .. }) => debug!("{url}: {error}"),
                Err(error) => {
                    if !std::mem::replace(&mut is_down, true) {
                        warn!("the authority at {url} is not reached: {error}");
                    }
                }
            }
        }
    }

    async fn bring(&self, message: Bytes) -> Result<Bytes, HttpError> {
        let pass = BodyPass::write(&self.key, &self.network, message.len(), unix_time());
        let pass = HeaderValue::from_str(&pass).expect("base58 and digits are a header");
        let uri = self.url.join("/authority");
        self.http.post_with(uri, message, Some((BodyPass::HEADER, pass)), 0).await
    }
}
