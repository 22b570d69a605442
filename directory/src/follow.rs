//! Keeps up with the documents of a network.

use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::directory::{Follower, News, Pace};
use mixsocks_common::topology::{Authorities, MAX_DOCUMENT_BYTES, Topology, TopologyError};
use rand::RngExt;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::clock::{now, sleep_towards};
use crate::http::{Fetched, Http, HttpError};
use crate::server::etag;
use crate::service::Store;
use crate::url::Url;

/// Name of the stored document.
const FILE: &str = "topology";

/// What following needs.
pub struct FollowConfig {
    /// Where documents are fetched: authorities and mirrors, in order of preference. At least one.
    pub urls: Vec<Url>,
    /// Who must have signed them.
    pub authorities: Authorities,
    /// When they are fetched.
    pub pace: Pace,
    /// Where the latest one is kept.
    pub store: Arc<dyn Store>,
    /// Requests.
    pub http: Http,
}

/// A follower that fetches.
pub struct Follow {
    config: FollowConfig,
    follower: Follower,
    problem: Option<String>,
    told: bool,
}

impl Follow {
    /// Begins with the document that was kept.
    ///
    /// # Errors
    /// [`TopologyError`] when it is damaged, or of other authorities. That it cannot be read at all
    /// is an error of the second kind.
    pub fn new(config: FollowConfig) -> std::io::Result<Result<Self, TopologyError>> {
        let stored = config.store.read(FILE)?;
        let follower = Follower::new(config.authorities.clone(), stored.as_deref(), config.pace);
        Ok(follower.map(|follower| Self { config, follower, problem: None, told: false }))
    }

    /// The document that was accepted last, in force or not.
    pub fn latest(&self) -> Option<&Topology> {
        self.follower.latest().map(|latest| latest.topology())
    }

    /// What went wrong last.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Waits until there is a document in force. Can be cancelled.
    pub async fn first(&mut self) -> Arc<Topology> {
        loop {
            if let Some(topology) = self.follower.in_force(now()) {
                return Arc::new(topology.clone());
            }
            self.step().await;
        }
    }

    /// Goes on in a task of its own, and tells each new document.
    pub fn spawn(mut self, first: Arc<Topology>) -> (watch::Receiver<Arc<Topology>>, Following) {
        let (sender, receiver) = watch::channel(first);
        let task = tokio::spawn(async move {
            loop {
                self.step().await;
                let newest = self.follower.in_force(now());
                if let Some(newest) = newest.filter(|newest| **newest != **sender.borrow()) {
                    let newest = Arc::new(newest.clone());
                    let old = sender.borrow().clone();
                    self.wait_for_use(&old, &newest).await;
                    info!("the document of epoch {} is used", newest.epoch);
                    sender.send_replace(newest);
                }
            }
        });
        (receiver, Following(task))
    }

    /// When a client changes to another document, its provider may see (other SURBs come, through other
    /// mixes), and who has given it the document saw when and to whom. So the one says nothing about
    /// the other: it is used at a random time in the second eighth of its epoch, or after a random
    /// eighth of an epoch if it came later. Only when the old one ends, that cannot be.
    async fn wait_for_use(&self, old: &Topology, new: &Topology) {
        if self.config.pace == Pace::Node {
            return;
        }
        let epochs = &new.parameters.epochs;
        let eighth = Duration::from_secs(epochs.epoch_seconds) / 8;
        let begin = Duration::from_secs(epochs.start(new.epoch).0) + eighth;
        let random = eighth.mul_f64(rand::rng().random());
        let end = Duration::from_secs(old.valid_until.0);
        let then = (begin.max(now()) + random).min(end);
        let latest = Instant::now() + then.saturating_sub(now());
        while now() < then && Instant::now() < latest {
            sleep_towards(then).await;
        }
    }

    /// Waits until it is time, and fetches once.
    async fn step(&mut self) {
        // By the clock, but if that is set back not for longer than it was to be.
        let wait = self.follower.poll_timeout().saturating_sub(now());
        let latest = Instant::now() + wait;
        while self.follower.poll_timeout() > now() && Instant::now() < latest {
            sleep_towards(self.follower.poll_timeout()).await;
        }
        let at = self.follower.url(self.config.urls.len());
        let url = self.config.urls[at].clone();
        // The document's own digest: what a server makes up could mark who comes again.
        let known = self.follower.latest().map(etag);
        let request =
            self.config.http.get(url.join("/topology"), known.as_ref(), MAX_DOCUMENT_BYTES);
        let fetched = request.await;
        let is_early = self.follower.latest().is_none()
            && matches!(fetched, Err(HttpError::Refused { status: 404, .. }));
        let problem = match fetched {
            Ok(Fetched::NotModified) => {
                self.follower.handle_failure(now(), &mut rand::rng());
                None
            }
            Ok(Fetched::New(body)) => self.take(&body).err(),
            Err(error) => {
                self.follower.handle_failure(now(), &mut rand::rng());
                Some(error.to_string())
            }
        };
        let problem = problem.map(|problem| format!("no new document from {url}: {problem}"));
        match &problem {
            // A network that is being set up has none for a while.
            Some(problem) if is_early => debug!("{problem}"),
            Some(problem) if !std::mem::replace(&mut self.told, true) => warn!("{problem}"),
            Some(problem) => debug!("{problem}"),
            None => self.told = false,
        }
        self.problem = problem;
    }

    /// Accepts a file; it is kept before it is used.
    fn take(&mut self, file: &[u8]) -> Result<(), String> {
        let mut follower = self.follower.clone();
        let news = follower.handle_file(file, now(), &mut rand::rng());
        if news == Ok(News::New)
            && let Err(error) = self.config.store.write(FILE, file)
        {
            self.follower.handle_failure(now(), &mut rand::rng());
            return Err(format!("it cannot be stored: {error}"));
        }
        self.follower = follower;
        news.map(drop).map_err(|error| error.to_string())
    }
}

/// The task that follows; it ends with this.
#[derive(Debug)]
pub struct Following(JoinHandle<()>);

impl Following {
    /// Waits until it has ended by itself, which is a mistake in this program.
    pub async fn ended(&mut self) {
        // It never returns, so this is its panic, which is in the log.
        let _ = (&mut self.0).await;
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}
