//! Keeps up with the documents of a network.

use std::sync::Arc;

use hyper::header::HeaderValue;
use mixsocks_common::directory::{Follower, News, Pace};
use mixsocks_common::topology::{Authorities, MAX_DOCUMENT_BYTES, Topology, TopologyError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use crate::clock::{now, sleep_towards};
use crate::http::{Fetched, Http, HttpError};
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
    /// The place of the URL that gave the latest answer, and what names that.
    known: Option<(usize, HeaderValue)>,
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
        Ok(follower.map(|follower| Self {
            config,
            follower,
            known: None,
            problem: None,
            told: false,
        }))
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
                    info!("the document of epoch {} is in force", newest.epoch);
                    sender.send_replace(Arc::new(newest.clone()));
                }
            }
        });
        (receiver, Following(task))
    }

    /// Waits until it is time, and fetches once.
    async fn step(&mut self) {
        while self.follower.poll_timeout() > now() {
            sleep_towards(self.follower.poll_timeout()).await;
        }
        let at = self.follower.url(self.config.urls.len());
        let url = self.config.urls[at].clone();
        let etag = self.known.as_ref().filter(|(place, _)| *place == at).map(|(_, etag)| etag);
        let fetched = self.config.http.get(url.join("/topology"), etag, MAX_DOCUMENT_BYTES).await;
        let is_early = self.follower.latest().is_none()
            && matches!(fetched, Err(HttpError::Refused { status: 404, .. }));
        let problem = match fetched {
            Ok(Fetched::NotModified) => {
                self.follower.handle_failure(now(), &mut rand::rng());
                None
            }
            Ok(Fetched::New { body, etag }) => {
                let result = self.take(&body);
                if result.is_ok() {
                    self.known = etag.map(|etag| (at, etag));
                }
                result.err()
            }
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

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}
