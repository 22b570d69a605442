//! What a member of a network asks of its authorities: the rules, and a place in the documents.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::directory::{
    CLOCK_SKEW, Descriptor, Endorsement, Invitation, MAX_DESCRIPTOR_BYTES, MAX_HELD, Member,
    SignedDescriptor, SignedRules, Upload,
};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{Authorities, UnixTime};
use rand::RngExt;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::clock::{now, sleep_towards, unix_time};
use crate::http::{Fetched, Http};
use crate::url::Url;

/// More than rules have.
const MAX_RULES_BYTES: usize = 2048;
/// All descriptors that an authority can hold, as JSON.
const MAX_LIST_BYTES: usize = MAX_HELD * (2 * MAX_DESCRIPTOR_BYTES);
/// The first wait after a failure; the last is an eighth of an epoch or as long as this, whatever is
/// longer.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// Asks the authorities at `urls` for the rules of their network, and believes what as many of them say
/// as must sign documents: one that lies could else keep newcomers out.
///
/// # Errors
/// What went wrong at each of them, in one line.
pub async fn learn_rules(
    http: &Http,
    urls: &[Url],
    authorities: &Authorities,
) -> Result<SignedRules, String> {
    let (mut told, mut problems) = (BTreeMap::new(), Vec::new());
    for url in urls {
        match rules_of(http, url, authorities).await {
            Ok(rules) => drop(told.insert(rules.authority, rules)),
            Err(problem) => problems.push(format!("{url}: {problem}")),
        }
    }
    let same =
        |a: &SignedRules, b: &SignedRules| (&a.network, a.parameters) == (&b.network, b.parameters);
    for rules in told.values() {
        let agreeing = told.values().filter(|other| same(rules, other)).count();
        if agreeing >= authorities.threshold() {
            return Ok(rules.clone());
        }
    }
    problems.push(format!(
        "{} of {} needed authorities tell the same rules",
        told.len().min(authorities.threshold() - 1),
        authorities.threshold()
    ));
    Err(problems.join("; "))
}

async fn rules_of(
    http: &Http,
    url: &Url,
    authorities: &Authorities,
) -> Result<SignedRules, String> {
    let answer = http.get(url.join("/rules"), None, MAX_RULES_BYTES).await;
    let text = match answer.map_err(|error| error.to_string())? {
        Fetched::New(body) => body,
        Fetched::NotModified => return Err("it answers what was not asked".to_owned()),
    };
    let rules = SignedRules::read(&text).map_err(|error| error.to_string())?;
    if !authorities.contains(&rules.authority) {
        return Err(format!("{} is none of the authorities given", rules.authority));
    }
    Ok(rules)
}

/// Asks the authorities at `urls` for the descriptors that they hold: what there is before the first
/// document. Those are returned that as many of them tell as must sign documents, so that one that
/// lies does not choose.
///
/// # Errors
/// What went wrong at each of them, in one line, when too few have answered.
pub async fn learn_descriptors(
    http: &Http,
    urls: &[Url],
    authorities: &Authorities,
) -> Result<Vec<Descriptor>, String> {
    let (mut told, mut problems) = (BTreeMap::<Identity, (usize, Descriptor)>::new(), Vec::new());
    for url in urls {
        let descriptors = match descriptors_of(http, url).await {
            Ok(descriptors) => descriptors,
            Err(problem) => {
                problems.push(format!("{url}: {problem}"));
                continue;
            }
        };
        for (identity, descriptor) in descriptors {
            told.entry(identity).or_insert((0, descriptor)).0 += 1;
        }
    }
    let threshold = authorities.threshold();
    if urls.len() - problems.len() < threshold {
        return Err(problems.join("; "));
    }
    let enough = told.into_values().filter(|(count, _)| *count >= threshold);
    Ok(enough.map(|(_, descriptor)| descriptor).collect())
}

/// Each member's descriptor with a good signature.
async fn descriptors_of(http: &Http, url: &Url) -> Result<BTreeMap<Identity, Descriptor>, String> {
    let answer = http.get(url.join("/descriptors"), None, MAX_LIST_BYTES).await;
    let Fetched::New(body) = answer.map_err(|error| error.to_string())? else {
        return Err("it answers what was not asked".to_owned());
    };
    let texts: Vec<String> = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
    let read = texts.iter().take(MAX_HELD).filter_map(|text| {
        let signed = SignedDescriptor::read(text.as_bytes()).ok()?;
        Some((signed.identity(), signed.descriptor().clone()))
    });
    Ok(read.collect())
}

/// What publishing needs.
pub struct PublishConfig {
    /// Who publishes.
    pub identity: Arc<IdentityKey>,
    /// Where the authorities are: all of them.
    pub urls: Vec<Url>,
    /// Which keys they have.
    pub authorities: Authorities,
    /// What the authorities have told.
    pub rules: SignedRules,
    /// What lets a stranger in.
    pub invitation: Option<Invitation>,
    /// What the member says of itself at a time.
    pub member: Box<dyn Fn(UnixTime) -> Member + Send + Sync>,
    /// Requests.
    pub http: Http,
}

/// Publishes a member's descriptor in every epoch, and whenever it has changed; it ends with this.
#[derive(Debug)]
pub struct Publisher(JoinHandle<()>);

impl Publisher {
    /// Waits until it has ended by itself, which is a mistake in this program.
    pub async fn ended(&mut self) {
        // It never returns, so this is its panic, which is in the log.
        let _ = (&mut self.0).await;
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Publisher {
    /// Starts to publish.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn start(config: PublishConfig) -> Self {
        let publishing = Publishing {
            config,
            endorsements: BTreeMap::new(),
            last: UnixTime(0),
            said: None,
            invited: BTreeMap::new(),
        };
        Self(tokio::spawn(publishing.run()))
    }
}

struct Publishing {
    config: PublishConfig,
    endorsements: BTreeMap<Identity, Endorsement>,
    /// When the last descriptor was made: the next one must be newer.
    last: UnixTime,
    /// The problem that the operator was told.
    said: Option<String>,
    /// Which authority is at which URL.
    invited: BTreeMap<usize, Identity>,
}

impl Publishing {
    async fn run(mut self) {
        let epoch_time = Duration::from_secs(self.config.rules.parameters.epochs.epoch_seconds);
        let longest = (epoch_time / 8).max(FIRST_WAIT);
        let mut wait = FIRST_WAIT;
        let mut published: Option<(u64, Member)> = None;
        loop {
            let epoch = self.config.rules.parameters.epochs.at(unix_time());
            let member = (self.config.member)(unix_time());
            if published.as_ref() == Some(&(epoch, member.clone())) {
                self.wait_for_change(epoch, &member).await;
                continue;
            }
            match self.publish(member.clone()).await {
                Ok(()) => {
                    if self.said.take().is_some() || published.is_none() {
                        info!("the descriptor is published");
                    }
                    published = Some((epoch, member));
                    wait = FIRST_WAIT;
                }
                Err(problem) => {
                    let line = format!("the descriptor is not published: {problem}");
                    if self.said.as_ref() == Some(&line) {
                        debug!("{line}");
                    } else {
                        warn!("{line}");
                    }
                    self.said = Some(line);
                    let jitter = 0.5 + rand::rng().random::<f64>() / 2.0;
                    sleep(wait.mul_f64(jitter)).await;
                    wait = (wait * 2).min(longest);
                }
            }
        }
    }

    /// Waits until another epoch runs, up to an eighth of it into it, so that not all come at once, or
    /// until the member has something else to say.
    async fn wait_for_change(&self, epoch: u64, member: &Member) {
        let epochs = &self.config.rules.parameters.epochs;
        let spread = Duration::from_secs(epochs.epoch_seconds) / 8;
        let spread = spread.mul_f64(rand::rng().random());
        let next = Duration::from_secs(epochs.start(epoch.saturating_add(1)).0) + spread;
        // A clock that was set back leads to an earlier epoch.
        while now() < next
            && epochs.at(unix_time()) >= epoch
            && (self.config.member)(unix_time()) == *member
        {
            // Members change when keys or addresses do: a second is soon enough.
            sleep_towards(next.min(now() + Duration::from_secs(1))).await;
        }
    }

    /// Brings a new descriptor to every authority, and once more with the endorsements that it got.
    /// It is published when as many took it as must sign.
    async fn publish(&mut self, member: Member) -> Result<(), String> {
        let now = unix_time();
        // If the last one was made by a clock that has been set back, nobody has taken it.
        let is_ahead = self.last.0 > now.0 + CLOCK_SKEW.as_secs();
        let published = if is_ahead { now } else { UnixTime(now.0.max(self.last.0 + 1)) };
        self.last = published;
        let epoch = self.config.rules.parameters.epochs.at(now);
        self.endorsements.retain(|_, endorsement| endorsement.until >= epoch);
        let descriptor = Descriptor {
            network: self.config.rules.network.clone(),
            identity: self.config.identity.identity(),
            published,
            member,
        };
        let signed = descriptor.sign(&self.config.identity).map_err(|error| error.to_string())?;
        let known = self.endorsements.len();
        let first = self.upload(&signed).await;
        if self.endorsements.len() > known && self.config.authorities.count() > 1 {
            return self.upload(&signed).await;
        }
        first
    }

    async fn upload(&mut self, descriptor: &SignedDescriptor) -> Result<(), String> {
        let (mut taken, mut problems) = (0, Vec::new());
        for at in 0..self.config.urls.len() {
            match self.upload_to(at, descriptor).await {
                Ok(endorsement) => {
                    let kept =
                        self.endorsements.entry(endorsement.authority).or_insert(endorsement);
                    if kept.until < endorsement.until {
                        *kept = endorsement;
                    }
                    taken += 1;
                }
                Err(problem) => problems.push(format!("{}: {problem}", self.config.urls[at])),
            }
        }
        if taken >= self.config.authorities.threshold() {
            return Ok(());
        }
        Err(problems.join("; "))
    }

    async fn upload_to(
        &mut self,
        at: usize,
        descriptor: &SignedDescriptor,
    ) -> Result<Endorsement, String> {
        let PublishConfig { identity, urls, authorities, invitation, http, .. } = &self.config;
        let url = &urls[at];
        let invitation = match invitation {
            Some(invitation) => {
                let authority = match self.invited.get(&at) {
                    Some(authority) => *authority,
                    None => rules_of(http, url, authorities).await?.authority,
                };
                self.invited.insert(at, authority);
                Some(invitation.present(&authority, &identity.identity()))
            }
            None => None,
        };
        let upload = Upload {
            descriptor: descriptor.text().as_bytes(),
            endorsements: self.endorsements.values().copied().collect(),
            invitation,
        };
        let answer = http.post(url.join("/descriptors"), upload.to_bytes(), Endorsement::LEN).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // Whoever is there may not be who it was taken for.
                self.invited.remove(&at);
                return Err(error.to_string());
            }
        };
        let endorsement = answer[..].try_into().ok().and_then(Endorsement::from_bytes);
        endorsement
            .filter(|e| authorities.contains(&e.authority) && e.is_of(descriptor.descriptor()))
            .ok_or_else(|| {
                "its answer is no endorsement of one of the authorities given".to_owned()
            })
    }
}
