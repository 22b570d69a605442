//! The network's documents, the keys that follow each other, and how everybody hears of them.

use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::Identity;
use mixsocks_common::topology::{
    Epochs, LAYERS, NetworkName, Node, Parameters, Role, Topology, UnixTime,
};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::codec::{Codec, NodeKey};
use crate::faults::FAULTS_END;
use crate::network::{Gateway, Mix};
use crate::world::{Event, NodeRef, WALL_START_MS, World};

/// Epochs for which a document is in force.
const VALID_EPOCHS: u64 = 3;
/// Everybody fetches a new document within such a time, but for those who are late: within the other.
const SOON: Duration = Duration::from_secs(1);
const LATE: Duration = Duration::from_secs(20);
/// Share of those who are late.
const LATE_SHARE: f64 = 0.2;
/// Share of the documents in which a node has told no key for the next key epoch.
const UNTOLD_SHARE: f64 = 0.1;
/// From the last fault until nobody has anything made for other keys: a clock that was set is noticed
/// within a minute, documents and packets are under way for less than the rest.
const KEYS_SETTLE: Duration = Duration::from_secs(90);

/// How documents and keys follow each other in a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) epochs: Epochs,
    /// By so much the clocks of two parties differ at most.
    pub(crate) skew: Duration,
}

impl Schedule {
    /// Keys never change, and all clocks are right.
    pub(crate) fn lasting() -> Self {
        Self { epochs: Epochs::STATIC, skew: Duration::ZERO }
    }

    /// Half of the networks change their keys, in proportions that a directory's rules allow: an
    /// epoch lasts eight times the skew, the overlap at least two.
    pub(crate) fn draw(rng: &mut StdRng) -> Self {
        if rng.random() {
            return Self::lasting();
        }
        let skew_seconds = rng.random_range(4..=8);
        let epoch_seconds = 8 * skew_seconds;
        let key_epochs = rng.random_range(1..=2);
        let overlap_seconds = rng.random_range(2 * skew_seconds..=epoch_seconds * key_epochs / 2);
        let epochs = Epochs { epoch_seconds, key_epochs, overlap_seconds };
        Self { epochs, skew: Duration::from_secs(skew_seconds) }
    }

    pub(crate) fn is_static(&self) -> bool {
        self.epochs == Epochs::STATIC
    }

    /// Milliseconds by which a party's clock is off: two of them differ by the skew at most.
    pub(crate) fn clock_error_ms(&self, rng: &mut StdRng) -> i64 {
        let most = i64::try_from(self.skew.as_millis() / 2).expect("seconds");
        rng.random_range(-most..=most)
    }

    /// The epoch at a time in milliseconds since 1970. Where they only count documents, the first.
    fn epoch_at(&self, wall_ms: u64) -> u64 {
        if self.is_static() { 1 } else { self.epochs.at(UnixTime(wall_ms / 1000)) }
    }

    /// Key epochs whose keys count at a node with this clock.
    pub(crate) fn counting(&self, wall_ms: u64) -> std::ops::RangeInclusive<u64> {
        let key_epoch = |seconds| self.epochs.key_epoch_at(UnixTime(seconds));
        let (now, overlap) = (wall_ms / 1000, self.epochs.overlap_seconds);
        key_epoch(now.saturating_sub(overlap))..=key_epoch(now + overlap)
    }

    fn validity(&self, epoch: u64) -> std::ops::Range<UnixTime> {
        if self.is_static() {
            return UnixTime(0)..UnixTime(u64::MAX);
        }
        let epochs = &self.epochs;
        let keys_end = epochs.key_epoch_start(epochs.key_epoch(epoch) + 2);
        let from = epochs.start(epoch).0.saturating_sub(self.skew.as_secs());
        UnixTime(from)..epochs.start(epoch + VALID_EPOCHS).min(keys_end)
    }
}

/// A document as it is at one party.
pub(crate) type Document = Arc<Topology>;

/// The documents so far, and who is in the next one.
pub(crate) struct Documents {
    pub(crate) schedule: Schedule,
    parameters: Parameters,
    /// Gateways first; `None` has left.
    pub(crate) roles: Vec<Option<Role>>,
    pub(crate) published: Vec<Document>,
    /// Documents that have reached somebody.
    pub(crate) delivered: u64,
}

impl Documents {
    pub(crate) fn new(schedule: Schedule, parameters: Parameters, roles: Vec<Role>) -> Self {
        let roles = roles.into_iter().map(Some).collect();
        Self { schedule, parameters, roles, published: Vec::new(), delivered: 0 }
    }

    /// Writes a document of the epoch at `wall_ms`; `keys` are those of all nodes, gateways first.
    pub(crate) fn publish(
        &mut self,
        rng: &mut StdRng,
        epoch_ms: u64,
        wall_ms: u64,
        keys: &mut [(Identity, &mut NodeKey)],
    ) -> Document {
        let epoch = self.schedule.epoch_at(epoch_ms);
        let key_epoch = self.schedule.epochs.key_epoch(epoch);
        let untold = self.may_have_untold(key_epoch, wall_ms) && rng.random_bool(UNTOLD_SHARE);
        let untold = untold.then(|| rng.random_range(0..keys.len()));
        let mut nodes = Vec::new();
        for (number, (identity, key)) in keys.iter_mut().enumerate() {
            let Some(role) = self.roles[number] else { continue };
            let port = u16::try_from(1000 + number).expect("few nodes");
            let next = !self.schedule.is_static() && untold != Some(number);
            nodes.push(Node {
                identity: *identity,
                sphinx_key: key.public(key_epoch, rng),
                next_sphinx_key: next.then(|| key.public(key_epoch + 1, rng)),
                link_address: ([127, 0, 0, 1], port).into(),
                role,
            });
        }
        let document = Arc::new(with_nodes(&self.schedule, self.parameters, epoch, nodes));
        self.published.push(document.clone());
        document
    }

    /// What is not told is made up for by the next document, and forgotten when keys must be right.
    fn may_have_untold(&self, key_epoch: u64, wall_ms: u64) -> bool {
        let next = self.schedule.epochs.key_epoch_start(key_epoch + 1);
        let end_ms = WALL_START_MS + u64::try_from(FAULTS_END.as_millis()).expect("a minute");
        !self.schedule.is_static() && wall_ms < end_ms && next.0 < end_ms / 1000
    }

    /// A node has got other keys: every document says so, as if it had always been so.
    pub(crate) fn change_keys(&mut self, node: &mut NodeKey, rng: &mut StdRng) {
        for document in &mut self.published {
            let mut nodes = document.nodes().to_vec();
            let key_epoch = document.key_epoch();
            let of_it = |listed: &&mut Node| listed.identity.as_bytes() == &node.address;
            if let Some(listed) = nodes.iter_mut().find(of_it) {
                listed.sphinx_key = node.public(key_epoch, rng);
                listed.next_sphinx_key =
                    listed.next_sphinx_key.map(|_| node.public(key_epoch + 1, rng));
            }
            let epoch = document.epoch;
            *document = Arc::new(with_nodes(&self.schedule, self.parameters, epoch, nodes));
        }
    }

    /// Whether the layer of this mix has another one.
    pub(crate) fn may_go(&self, node: usize) -> bool {
        let role = self.roles[node];
        role.is_some() && self.roles.iter().filter(|other| **other == role).count() > 1
    }
}

fn with_nodes(
    schedule: &Schedule,
    parameters: Parameters,
    epoch: u64,
    nodes: Vec<Node>,
) -> Topology {
    let network = NetworkName::new("sim").expect("a good name");
    Topology::new(network, epoch, schedule.validity(epoch), parameters, nodes, Vec::new())
        .expect("a good topology")
}

/// What all nodes do at the beginning: two gateways, and so many mixes in each layer.
pub(crate) fn roles(mixes_per_layer: usize) -> Vec<Role> {
    let gateways = (0..2).map(|n| Role::Gateway { client_address: ([127, 0, 0, 1], 1 + n).into() });
    let mixes = (1..)
        .take(LAYERS)
        .flat_map(|layer| std::iter::repeat_n(Role::Mix { layer }, mixes_per_layer));
    gateways.chain(mixes).collect()
}

/// The keys of all nodes, gateways first.
pub(crate) fn keys<'a>(
    gateways: &'a mut [Gateway],
    mixes: &'a mut [Mix],
) -> Vec<(Identity, &'a mut NodeKey)> {
    let of_gateways = gateways.iter_mut().map(|gateway| (gateway.identity, &mut gateway.key));
    of_gateways.chain(mixes.iter_mut().map(|mix| (mix.identity, &mut mix.key))).collect()
}

impl<C: Codec> World<C> {
    /// Publishes a document for the epoch at `epoch_ms`. Everybody hears of it sooner or later, and
    /// uses it when it is in force by the own clock.
    pub(crate) fn publish(&mut self, epoch_ms: u64) {
        let wall_ms = self.wall_ms();
        let Self { documents, gateways, mixes, rng, .. } = self;
        let document = documents.publish(rng, epoch_ms, wall_ms, &mut keys(gateways, mixes));
        let number = documents.published.len() - 1;
        for party in self.parties() {
            let is_late = self.rng.random_bool(LATE_SHARE);
            let wait = if is_late { LATE } else { SOON }.mul_f64(self.rng.random());
            let clock_ms = wall_ms.saturating_add_signed(self.clock_error_ms(party));
            let early_ms = (1000 * document.valid_from.0).saturating_sub(clock_ms);
            let at = self.now + wait.max(Duration::from_millis(early_ms));
            self.at(at, Event::Document(party, number));
        }
        self.note(format!("document {number}, of epoch {}", document.epoch));
    }

    /// The document of the next epoch comes a quarter of an epoch before it.
    pub(crate) fn plan_next_document(&mut self) {
        if self.documents.schedule.is_static() {
            return;
        }
        let epochs = self.documents.schedule.epochs;
        let lead_ms = 250 * epochs.epoch_seconds;
        let epoch = epochs.at(UnixTime((self.wall_ms() + lead_ms) / 1000)) + 1;
        let at_ms = 1000 * epochs.start(epoch).0 - lead_ms;
        let wait = Duration::from_millis(at_ms - self.wall_ms());
        self.at(self.now + wait, Event::Publish(1000 * epochs.start(epoch).0));
    }

    fn parties(&self) -> Vec<NodeRef> {
        let gateways = (0..self.gateways.len()).map(NodeRef::Gateway);
        let mixes = (0..self.mixes.len()).map(NodeRef::Mix);
        gateways.chain(mixes).chain((0..self.endpoints.len()).map(NodeRef::Endpoint)).collect()
    }

    fn clock_error_ms(&self, party: NodeRef) -> i64 {
        match party {
            NodeRef::Mix(n) => self.mixes[n].key.clock_error_ms,
            NodeRef::Gateway(n) => self.gateways[n].key.clock_error_ms,
            NodeRef::Endpoint(n) => self.endpoints[n].key.clock_error_ms,
        }
    }

    /// A document reaches somebody who may have a newer one.
    pub(crate) fn deliver(&mut self, party: NodeRef, number: usize) -> Result<(), String> {
        let document = self.documents.published[number].clone();
        self.documents.delivered += 1;
        match party {
            NodeRef::Mix(n) => self.mixes[n].take_document(number, &document),
            NodeRef::Gateway(n) => self.gateways[n].take_document(number, &document),
            NodeRef::Endpoint(n) => {
                self.endpoints[n].take_document(number, document);
                if !self.endpoints[n].is_suspended() {
                    self.settle(n)?;
                }
            }
        }
        Ok(())
    }

    /// How often keys change in such a time, at most.
    pub(crate) fn key_changes(&self, time: Duration) -> u64 {
        let epochs = self.documents.schedule.epochs;
        let seconds = epochs.epoch_seconds * epochs.key_epochs;
        if self.documents.schedule.is_static() { 0 } else { time.as_secs() / seconds + 1 }
    }

    /// A node drops a packet for a key of its own that does not count, or for a node to which it may not
    /// send: what sender and SURB were told has changed since.
    pub(crate) fn on_outdated(&mut self, node: NodeRef) -> Result<(), String> {
        self.outdated += 1;
        let is_settled = self.elapsed() > FAULTS_END + KEYS_SETTLE && !self.may_have_orphans();
        if is_settled {
            return Err(format!("an outdated packet at {node:?}"));
        }
        Ok(())
    }
}
