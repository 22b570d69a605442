//! What changes while a node runs: its topology, its keys, and what is on the disk.
//!
//! [`Standing`] judges topologies, without I/O; [`Upkeep`] is the task that follows them and the
//! clock; [`sync_tags`] brings replay tags to the disk.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::{EncryptionKey, Identity};
use mixsocks_common::topology::{Epochs, NetworkName, Role, Topology, UnixTime};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::clock::Clock;
use crate::keys::SphinxKeys;
use crate::link::changed;
use crate::peel::Peeler;

/// How often replay tags are brought to the disk: a power failure takes those of this time, and of
/// the time that the disk needs. More often would keep disks busy, and save little.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Mix,
    Gateway,
}

impl Kind {
    fn of(role: Role) -> Self {
        match role {
            Role::Mix { .. } => Self::Mix,
            Role::Gateway { .. } => Self::Gateway,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mix => "mix",
            Self::Gateway => "gateway",
        })
    }
}

/// Where a topology has a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not at all.
    Absent,
    /// Among the mixes that the next document places.
    Waiting,
    Layer(u8),
    Gateway,
}

impl Place {
    fn of(me: &Identity, topology: &Topology) -> Self {
        match topology.node(me).map(|node| node.role) {
            Some(Role::Mix { layer }) => Self::Layer(layer),
            Some(Role::Gateway { .. }) => Self::Gateway,
            None if topology.waiting().contains(me) => Self::Waiting,
            None => Self::Absent,
        }
    }
}

/// Why a topology is not used while the node runs: what is another one than at the start.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    Network { ours: NetworkName, theirs: NetworkName },
    Packets { ours: usize, theirs: usize },
    Epochs,
    Kind { ours: Kind, theirs: Kind },
}

/// What the operator of a node must know.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    Place(Place),
    Unusable(Unusable),
    /// Nobody can send to this node: senders use another key than it has.
    WrongKey {
        key_epoch: u64,
        theirs: EncryptionKey,
        file: PathBuf,
    },
}

impl News {
    fn is_trouble(&self) -> bool {
        match self {
            Self::Place(place) => *place == Place::Absent,
            Self::Unusable(_) | Self::WrongKey { .. } => true,
        }
    }
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Place(Place::Absent) => f.write_str(
                "the topology does not have this node: nothing passes until a document has it; \
                 is this the right identity and network, and do the authorities admit it?",
            ),
            Self::Place(Place::Waiting) => {
                f.write_str("this mix waits for its layer, in which the next document places it")
            }
            Self::Place(Place::Layer(layer)) => write!(f, "this mix is in layer {layer}"),
            Self::Place(Place::Gateway) => f.write_str("this gateway is in the topology"),
            Self::Unusable(why) => {
                write!(f, "{why}: this node goes on with the topology before; restart it")
            }
            Self::WrongKey { key_epoch, theirs, file } => write!(
                f,
                "the topology has the Sphinx key {theirs} for this node in key epoch {key_epoch}, \
                 which is not the one in {}: packets cannot be opened; restore that file from a \
                 backup, or wait until a document has the new key",
                file.display()
            ),
        }
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network { ours, theirs } => write!(
                f,
                "the new topology is one of network {:?} instead of {:?}",
                theirs.as_str(),
                ours.as_str()
            ),
            Self::Packets { ours, theirs } => {
                write!(f, "the new topology has packets of {theirs} bytes instead of {ours}")
            }
            Self::Epochs => f.write_str("the new topology has epochs of another length"),
            Self::Kind { ours, theirs } => {
                write!(f, "the new topology has this {ours} as a {theirs}")
            }
        }
    }
}

/// A node in its network: what it has been told, and what its operator has been told.
#[derive(Debug)]
pub(crate) struct Standing {
    me: Identity,
    kind: Kind,
    network: NetworkName,
    packet_bytes: usize,
    epochs: Epochs,
    place: Option<Place>,
    is_unusable: bool,
    has_wrong_key: bool,
}

impl Standing {
    /// The standing of node `me`, which starts with this topology.
    ///
    /// # Errors
    /// The kind that the topology has it as, if it is another one.
    pub(crate) fn new(me: Identity, kind: Kind, first: &Topology) -> Result<Self, Kind> {
        match first.node(&me).map(|node| Kind::of(node.role)) {
            Some(theirs) if theirs != kind => return Err(theirs),
            _ => {}
        }
        Ok(Self {
            me,
            kind,
            network: first.network.clone(),
            packet_bytes: first.packet_bytes(),
            epochs: first.parameters.epochs,
            place: None,
            is_unusable: false,
            has_wrong_key: false,
        })
    }

    /// Judges a topology: whether it is to be used, and what is news.
    pub(crate) fn handle_topology(&mut self, topology: &Topology) -> (bool, Option<News>) {
        if let Err(why) = self.check(topology) {
            let is_news = !std::mem::replace(&mut self.is_unusable, true);
            return (false, is_news.then_some(News::Unusable(why)));
        }
        self.is_unusable = false;
        let place = Place::of(&self.me, topology);
        let is_news = self.place.replace(place) != Some(place);
        (true, is_news.then_some(News::Place(place)))
    }

    fn check(&self, topology: &Topology) -> Result<(), Unusable> {
        if topology.network != self.network {
            let (ours, theirs) = (self.network.clone(), topology.network.clone());
            return Err(Unusable::Network { ours, theirs });
        }
        if topology.packet_bytes() != self.packet_bytes {
            let (ours, theirs) = (self.packet_bytes, topology.packet_bytes());
            return Err(Unusable::Packets { ours, theirs });
        }
        if topology.parameters.epochs != self.epochs {
            return Err(Unusable::Epochs);
        }
        match topology.node(&self.me).map(|node| Kind::of(node.role)) {
            Some(theirs) if theirs != self.kind => Err(Unusable::Kind { ours: self.kind, theirs }),
            _ => Ok(()),
        }
    }

    /// Whether senders use the key that this node has: at each new topology, and when keys change.
    pub(crate) fn check_key(
        &mut self,
        topology: &Topology,
        keys: &SphinxKeys,
        now: UnixTime,
    ) -> Option<News> {
        let node = topology.node(&self.me)?;
        let theirs = topology.sphinx_key(node, now)?;
        // A document that is in force a little before its epoch tells its own key.
        let key_epoch = self.epochs.key_epoch_at(now).max(topology.key_epoch());
        let is_wrong = keys.public_keys().get(&key_epoch) != Some(&theirs);
        let is_news = is_wrong && !self.has_wrong_key;
        self.has_wrong_key = is_wrong;
        let file = keys.file(key_epoch);
        is_news.then_some(News::WrongKey { key_epoch, theirs, file })
    }
}

/// The task that follows topologies and the clock. `use_topology` is called with each topology that
/// is to be used.
pub(crate) struct Upkeep<F> {
    pub(crate) standing: Standing,
    /// The one that the node has started with.
    pub(crate) topology: Arc<Topology>,
    pub(crate) documents: watch::Receiver<Arc<Topology>>,
    pub(crate) keys: Arc<SphinxKeys>,
    pub(crate) peeler: Arc<Peeler>,
    pub(crate) clock: Clock,
    pub(crate) use_topology: F,
}

impl<F: FnMut(&Arc<Topology>)> Upkeep<F> {
    pub(crate) async fn run(mut self) {
        self.is_usable(&self.topology.clone());
        self.check_key();
        // What fails is said once, and tried again at least every minute.
        let mut is_failing = false;
        loop {
            let due = self.keys.poll_timeout(self.clock.now());
            tokio::select! {
                () = changed(&mut self.documents) => {
                    let new = self.documents.borrow_and_update().clone();
                    if self.is_usable(&new) {
                        (self.use_topology)(&new);
                        self.topology = new;
                        self.check_key();
                    }
                }
                () = self.clock.wait(due) => {
                    is_failing = self.advance(is_failing).await;
                    self.check_key();
                }
            }
        }
    }

    fn check_key(&mut self) {
        let news = self.standing.check_key(&self.topology, &self.keys, self.clock.now());
        self.say(news);
    }

    /// Says what is news about a topology, and returns whether it is to be used.
    fn is_usable(&mut self, topology: &Topology) -> bool {
        let (is_usable, news) = self.standing.handle_topology(topology);
        self.say(news);
        is_usable
    }

    /// Follows the clock; returns whether something fails.
    async fn advance(&self, was_failing: bool) -> bool {
        let (keys, peeler, now) = (self.keys.clone(), self.peeler.clone(), self.clock.now());
        let advanced = spawn_blocking(move || {
            // The peeler follows also if not all could be done.
            let keys = keys.advance(now).map_err(|error| error.to_string());
            keys.and(peeler.advance().map_err(|error| error.to_string()))
        });
        let me = self.standing.me;
        match advanced.await.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(()) => {
                if was_failing {
                    info!(%me, "the next Sphinx keys are there");
                }
                false
            }
            Err(error) => {
                if !was_failing {
                    warn!(%me, "the next Sphinx keys cannot be prepared: {error}");
                }
                true
            }
        }
    }

    fn say(&self, news: Option<News>) {
        let me = self.standing.me;
        match news {
            Some(news) if news.is_trouble() => warn!(%me, "{news}"),
            Some(news) => info!(%me, "{news}"),
            None => {}
        }
    }
}

/// Brings replay tags to the disk, over and over.
pub(crate) async fn sync_tags(peeler: Arc<Peeler>) {
    let mut ticks = interval(SYNC_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_failing = false;
    loop {
        ticks.tick().await;
        let synced = {
            let peeler = peeler.clone();
            spawn_blocking(move || peeler.sync()).await
        };
        match synced.unwrap_or_else(|error| Err(error.into())) {
            Ok(()) => is_failing = false,
            Err(error) if !is_failing => {
                warn!(
                    "replay tags do not reach the disk, so that a power failure would take them: \
                     {error}; check the disk of the data directory"
                );
                is_failing = true;
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_common::topology::Parameters;

    use super::*;
    use crate::link::testnet::{EPOCHS, EXIT, NOW, TestNet, topology};

    const MIX: usize = 1;

    fn standing(net: &TestNet) -> Standing {
        Standing::new(net.identity(MIX), Kind::Mix, &net.topology).unwrap()
    }

    #[tokio::test]
    async fn where_a_node_is_is_said_when_it_changes() {
        let net = TestNet::rotating().await;
        let mut standing = standing(&net);
        let without = net.without(MIX);
        let waiting = without.as_ref().clone().with_waiting(vec![net.identity(MIX)]).unwrap();
        let (layer_1, layer_2) = (net.topology.clone(), net.swapped(1, 2));
        for (topology, place) in [
            (&*layer_1, Some(Place::Layer(1))),
            (&layer_1, None),
            (&layer_2, Some(Place::Layer(2))),
            (&without, Some(Place::Absent)),
            (&without, None),
            (&waiting, Some(Place::Waiting)),
            (&waiting, None),
            (&layer_1, Some(Place::Layer(1))),
        ] {
            assert_eq!(standing.handle_topology(topology), (true, place.map(News::Place)));
        }
        assert!(News::Place(Place::Absent).is_trouble());
        assert!(!News::Place(Place::Waiting).is_trouble());
    }

    #[tokio::test]
    async fn a_node_that_is_in_no_document_starts_and_one_of_another_kind_does_not() {
        let net = TestNet::rotating().await;
        let of = |number: usize, kind, topology: &Topology| {
            Standing::new(net.identity(number), kind, topology).err()
        };
        assert_eq!(of(MIX, Kind::Mix, &net.without(MIX)), None);
        assert_eq!(of(EXIT, Kind::Gateway, &net.without(EXIT)), None);
        assert_eq!(of(MIX, Kind::Gateway, &net.topology), Some(Kind::Mix));
        assert_eq!(of(EXIT, Kind::Mix, &net.topology), Some(Kind::Gateway));
    }

    #[tokio::test]
    async fn what_cannot_change_at_run_time_is_refused_and_said_once() {
        let net = TestNet::rotating().await;
        let nodes = net.topology.nodes().to_vec();
        let with = |change: fn(&mut Parameters)| {
            let mut topology = net.topology.as_ref().clone();
            change(&mut topology.parameters);
            topology
        };
        let unusable = [
            topology("other", nodes),
            with(|parameters| parameters.payload_bytes += 1),
            with(|parameters| parameters.epochs.key_epochs += 1),
            net.swapped(MIX, EXIT).as_ref().clone(),
        ];
        for topology in &unusable {
            let mut standing = standing(&net);
            standing.handle_topology(&net.topology);
            let (is_usable, news) = standing.handle_topology(topology);
            let news = news.unwrap();
            assert!(!is_usable && matches!(news, News::Unusable(_)) && news.is_trouble());
            assert!(news.to_string().contains("restart"), "{news}");
            for topology in &unusable {
                assert_eq!(standing.handle_topology(topology), (false, None));
            }
            assert_eq!(standing.handle_topology(&net.topology), (true, None));
            assert!(standing.handle_topology(topology).1.is_some(), "it is news again");
        }
        // Other parameters may change.
        let mut standing = standing(&net);
        let topology = with(|parameters| parameters.max_delay *= 2);
        assert!(standing.handle_topology(&topology).0);
    }

    #[tokio::test]
    async fn a_key_that_is_not_ours_is_said_once() {
        let net = TestNet::rotating().await;
        let mut standing = standing(&net);
        let (right, others) = (&net.sphinx_keys[MIX], &net.sphinx_keys[2]);
        let mut check = |keys: &SphinxKeys, topology: &Topology, now| {
            standing.check_key(topology, keys, UnixTime(now))
        };
        assert_eq!(check(right, &net.topology, NOW.0), None);
        let news = check(others, &net.topology, NOW.0).unwrap();
        assert!(matches!(news, News::WrongKey { key_epoch: 5, .. }), "{news}");
        assert!(news.to_string().contains("sphinx-5.key"), "{news}");
        assert_eq!(check(others, &net.topology, NOW.0), None);
        assert_eq!(check(right, &net.topology, NOW.0), None);
        // The document tells the next key too, and none after that.
        right.advance(UnixTime(600)).unwrap();
        assert_eq!(check(right, &net.topology, 600), None);
        assert_eq!(check(others, &net.without(MIX), 600), None);
        assert!(check(others, &net.topology, 600).is_some());
        assert_eq!(check(others, &net.topology, 700), None);
        assert_eq!(EPOCHS.key_epoch_at(UnixTime(700)), 7);
    }
}
