//! How a member or client of a network deals with its authorities: it learns the rules, publishes what
//! it is, and follows the documents.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mixsocks_common::directory::{Descriptor, Invitation, Member, Pace, SignedRules};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{Authorities, SignedTopology, Topology, UnixTime};
use mixsocks_directory::{
    Follow, FollowConfig, Following, Http, PublishConfig, Publisher, Url, learn_descriptors,
    learn_rules,
};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::cli::{MemberArgs, NetworkArgs};
use crate::data_dir::DataDir;
use crate::{invitations, topology_file};

/// The first wait when an authority has no answer yet, and the longest.
pub(crate) const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(20);
/// How long a client waits for its first document before it gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A member's way to the authorities.
pub(crate) struct Membership {
    http: Http,
    urls: Vec<Url>,
    authorities: Authorities,
    rules: SignedRules,
    invitation: Option<Invitation>,
    follow: Follow,
}

impl Membership {
    /// Learns the rules: from the document that was used last, or else from an authority, for whom it
    /// waits.
    pub(crate) async fn learn(args: &MemberArgs, dir: &Arc<DataDir>, pace: Pace) -> Result<Self> {
        if args.directory.is_empty() {
            bail!(
                "no directory is given: give the addresses of all of the network's authorities with \
                 --directory, such as http://203.0.113.5:9000"
            );
        }
        let authorities = authorities(&args.authority, args.signatures)?;
        let invitation = args.invitation.as_deref().map(invitations::read_secret).transpose()?;
        let http = Http::default();
        let urls = args.directory.clone();
        let follow = follow(dir, &urls, &authorities, pace, &http)?;
        let rules = match follow.latest() {
            Some(document) => SignedRules {
                authority: *authorities.keys().next().context("there is an authority")?,
                network: document.network.clone(),
                parameters: document.parameters,
            },
            None => ask(&http, &urls, &authorities).await,
        };
        Ok(Self { http, urls, authorities, rules, invitation, follow })
    }

    /// The rules.
    pub(crate) fn rules(&self) -> &SignedRules {
        &self.rules
    }

    /// The descriptors that the authorities hold.
    ///
    /// # Errors
    /// What went wrong, when too few of them answer.
    pub(crate) async fn descriptors(&self) -> Result<Vec<Descriptor>, String> {
        learn_descriptors(&self.http, &self.urls, &self.authorities).await
    }

    /// The document that was used last, in force or not.
    pub(crate) fn latest(&self) -> Option<&Topology> {
        self.follow.latest()
    }

    /// Publishes what `member` says, for as long as the result lives.
    pub(crate) fn publish(
        &self,
        identity: Arc<IdentityKey>,
        member: impl Fn(UnixTime) -> Member + Send + Sync + 'static,
    ) -> Publisher {
        Publisher::start(PublishConfig {
            identity,
            urls: self.urls.clone(),
            authorities: self.authorities.clone(),
            rules: self.rules.clone(),
            invitation: self.invitation.clone(),
            member: Box::new(member),
            http: self.http.clone(),
        })
    }

    /// Waits for a document, and follows those after it for as long as the second result lives.
    ///
    /// # Errors
    /// When it is of another network than the rules that were told.
    pub(crate) async fn documents(mut self) -> Result<(watch::Receiver<Arc<Topology>>, Following)> {
        let first = self.follow.first().await;
        let epochs = self.rules.parameters.epochs;
        if first.network != self.rules.network || first.parameters.epochs != epochs {
            bail!(
                "the document has another network name or other epochs than the rules: start again"
            );
        }
        Ok(self.follow.spawn(first))
    }
}

async fn ask(http: &Http, urls: &[Url], authorities: &Authorities) -> SignedRules {
    let mut wait = FIRST_WAIT;
    let mut told = false;
    loop {
        match learn_rules(http, urls, authorities).await {
            Ok(rules) => return rules,
            Err(problem) if !std::mem::replace(&mut told, true) => {
                tracing::warn!("no authority tells the rules of the network: {problem}");
            }
            Err(problem) => tracing::debug!("no authority tells the rules: {problem}"),
        }
        sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// The authorities that were given.
pub(crate) fn authorities(keys: &[Identity], signatures: Option<usize>) -> Result<Authorities> {
    if keys.is_empty() {
        bail!(
            "no authority is given: give the keys that the network's operators publish with \
             --authority"
        );
    }
    let threshold = signatures.unwrap_or(keys.len() / 2 + 1);
    Ok(Authorities::new(keys.iter().copied(), threshold)?)
}

/// Where a network's documents come from.
pub(crate) enum Source<'a> {
    /// A file, as it was when it was read.
    File(&'a Path),
    /// Authorities and mirrors.
    Directory(&'a [Url]),
}

/// Where the documents are, and who must have signed them.
pub(crate) fn source(network: &NetworkArgs) -> Result<(Source<'_>, Authorities)> {
    let source = match (network.topology.as_deref(), &network.directory[..]) {
        (Some(_), [_, ..]) => {
            bail!("--topology and --directory are both given, but documents come from one of them")
        }
        (Some(path), []) => Source::File(path),
        (None, []) => bail!(
            "no network is given: name where its operators publish its topology, an address with \
             --directory or a file with --topology"
        ),
        (None, urls) => Source::Directory(urls),
    };
    Ok((source, authorities(&network.authority, network.signatures)?))
}

/// The newest document, for a look at it. All places are asked, as each may have an old one or lie.
pub(crate) async fn look(network: &NetworkArgs) -> Result<SignedTopology> {
    let (source, authorities) = source(network)?;
    let urls = match source {
        Source::File(path) => {
            let file = topology_file::read(path, &authorities)?.bytes;
            return Ok(SignedTopology::read(&file, &authorities)?);
        }
        Source::Directory(urls) => urls,
    };
    let http = Http::default();
    let (mut newest, mut problems) = (None::<SignedTopology>, Vec::new());
    for url in urls {
        let signed = match http.document(url).await {
            Ok(file) => SignedTopology::read(&file, &authorities).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match signed {
            Ok(signed) => {
                let epoch = newest.as_ref().map_or(0, |newest| newest.topology().epoch);
                newest = newest.filter(|_| signed.topology().epoch <= epoch).or(Some(signed));
            }
            Err(problem) => problems.push(format!("{url}: {problem}")),
        }
    }
    match newest {
        Some(newest) => {
            problems.iter().for_each(|problem| tracing::warn!("no document from {problem}"));
            Ok(newest)
        }
        None => bail!("there is no document: {}", problems.join("; ")),
    }
}

/// Follows documents from authorities and mirrors, once there is a first one.
///
/// # Errors
/// When there is none in force within [`PATIENCE`].
pub(crate) async fn documents(
    dir: &Arc<DataDir>,
    urls: &[Url],
    authorities: &Authorities,
) -> Result<(watch::Receiver<Arc<Topology>>, Following)> {
    let mut follow = follow(dir, urls, authorities, Pace::Client, &Http::default())?;
    match timeout(PATIENCE, follow.first()).await {
        Ok(first) => Ok(follow.spawn(first)),
        Err(_) => bail!("{}", follow.problem().unwrap_or("no directory answers")),
    }
}

/// A follower that keeps its document in a data directory.
pub(crate) fn follow(
    dir: &Arc<DataDir>,
    urls: &[Url],
    authorities: &Authorities,
    pace: Pace,
    http: &Http,
) -> Result<Follow> {
    let config = FollowConfig {
        urls: urls.to_vec(),
        authorities: authorities.clone(),
        pace,
        store: dir.clone(),
        http: http.clone(),
    };
    let path = || dir.path().join("topology").display().to_string();
    Follow::new(config).with_context(|| format!("cannot read {}", path()))?.with_context(|| {
        format!(
            "the topology {} of earlier starts cannot be used; if it is merely damaged, delete it; \
             for another network, choose another directory with --data-dir",
            path()
        )
    })
}
