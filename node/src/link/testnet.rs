//! A small network for tests: two gateways and one mix per layer, listening on loopback.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{Epochs, NetworkName, Node, Parameters, Role, Topology, UnixTime};
use mixsocks_sphinx::{Hop, Packet, Route, SecretKey, build_packets};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::LinkContext;
use crate::clock::Clock;
use crate::counters::{Counters, DropReason};
use crate::keys::SphinxKeys;

pub(crate) const PAYLOAD_LEN: usize = 1024;
pub(crate) const MAX_DELAY: Duration = Duration::from_millis(20);
/// Nothing in a test takes that long, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);

/// The nodes by number: the two gateways around the mixes of the layers 1 to 3.
pub(crate) const ENTRY: usize = 0;
pub(crate) const EXIT: usize = 4;

/// Key epochs of 100 s, and a time in the middle of one of them.
pub(crate) const EPOCHS: Epochs = Epochs { epoch_seconds: 10, key_epochs: 10, overlap_seconds: 20 };
pub(crate) const NOW: UnixTime = UnixTime(550);

pub(crate) struct TestNet {
    pub(crate) keys: Vec<Arc<IdentityKey>>,
    pub(crate) sphinx_keys: Vec<Arc<SphinxKeys>>,
    directory: tempfile::TempDir,
    pub(crate) topology: Arc<Topology>,
    listeners: Vec<Option<TcpListener>>,
}

impl TestNet {
    /// A network whose keys stay.
    pub(crate) async fn new() -> Self {
        Self::at(Epochs::STATIC, Clock::System.now()).await
    }

    /// A network whose keys follow each other, at [`NOW`].
    pub(crate) async fn rotating() -> Self {
        Self::at(EPOCHS, NOW).await
    }

    async fn at(epochs: Epochs, now: UnixTime) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut rng = rand::rng();
        let mut keys = Vec::new();
        let mut sphinx_keys = Vec::new();
        let mut listeners = Vec::new();
        let mut nodes = Vec::new();
        for number in ENTRY..=EXIT {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let key = IdentityKey::generate(&mut rng);
            let data_dir = directory.path().join(number.to_string());
            std::fs::create_dir(&data_dir).unwrap();
            let sphinx = SphinxKeys::open(&data_dir, epochs, now).unwrap();
            let link_address = listener.local_addr().unwrap();
            let role = match u8::try_from(number).unwrap() {
                layer @ 1..=3 => Role::Mix { layer },
                _ => Role::Gateway { client_address: link_address },
            };
            nodes.push(Node {
                identity: key.identity(),
                sphinx_key: sphinx.public_keys()[&sphinx.key_epoch()],
                next_sphinx_key: sphinx.public_keys().get(&(sphinx.key_epoch() + 1)).copied(),
                link_address,
                role,
            });
            keys.push(Arc::new(key));
            sphinx_keys.push(Arc::new(sphinx));
            listeners.push(Some(listener));
        }
        let parameters = Parameters { epochs, ..parameters(PAYLOAD_LEN) };
        let topology = Arc::new(topology_of("test", epochs.at(now), parameters, nodes));
        Self { keys, sphinx_keys, directory, topology, listeners }
    }

    /// Makes it a network of other packets.
    pub(crate) fn set_payload_len(&mut self, payload_len: usize) {
        let nodes = self.topology.nodes().to_vec();
        self.topology = Arc::new(topology_of("test", 1, parameters(payload_len), nodes));
    }

    pub(crate) fn identity(&self, number: usize) -> Identity {
        self.keys[number].identity()
    }

    pub(crate) fn address(&self, number: usize) -> SocketAddr {
        self.topology.nodes()[number].link_address
    }

    pub(crate) fn listener(&mut self, number: usize) -> TcpListener {
        self.listeners[number].take().unwrap()
    }

    /// The key of a node in a key epoch.
    pub(crate) fn sphinx_key(&self, number: usize, key_epoch: u64) -> Arc<SecretKey> {
        self.sphinx_keys[number].all()[&key_epoch].clone()
    }

    pub(crate) fn data_dir(&self, number: usize) -> PathBuf {
        self.directory.path().join(number.to_string())
    }

    /// The same network of other nodes.
    pub(crate) fn of(&self, nodes: Vec<Node>) -> Arc<Topology> {
        let Topology { epoch, parameters, .. } = *self.topology;
        Arc::new(topology_of("test", epoch, parameters, nodes))
    }

    /// The network without one of its nodes, in whose place is another one that cannot be reached.
    pub(crate) fn without(&self, number: usize) -> Arc<Topology> {
        let mut rng = rand::rng();
        let mut nodes = self.topology.nodes().to_vec();
        nodes[number].identity = IdentityKey::generate(&mut rng).identity();
        nodes[number].sphinx_key = SecretKey::generate(&mut rng).public_key().into();
        nodes[number].next_sphinx_key = None;
        nodes[number].link_address = "127.0.0.1:1".parse().unwrap();
        self.of(nodes)
    }

    /// The network with two nodes in each other's places.
    pub(crate) fn swapped(&self, one: usize, other: usize) -> Arc<Topology> {
        let mut nodes = self.topology.nodes().to_vec();
        (nodes[one].role, nodes[other].role) = (nodes[other].role, nodes[one].role);
        self.of(nodes)
    }

    pub(crate) fn context(&self, number: usize) -> (LinkContext, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let context = LinkContext::new(self.keys[number].clone(), self.watch(), counters.clone());
        (context, counters)
    }

    /// The topology, as nodes follow it; it never changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Topology>> {
        watch::channel(self.topology.clone()).1
    }

    /// One packet per delay, numbered from 0 in the plaintext, over the nodes `route`; the last of
    /// them is where it ends.
    pub(crate) fn packets(&self, route: &[usize], delays: &[Duration]) -> Vec<Packet> {
        let texts: Vec<_> = (0..delays.len()).map(|n| (n as u64).to_be_bytes()).collect();
        let requests: Vec<_> = delays
            .iter()
            .zip(&texts)
            .map(|(delay, text)| {
                let hops: Vec<_> = route.iter().map(|number| self.hop(*number, *delay)).collect();
                (Route::new(&hops, [7; 32], [8; 16]).unwrap(), &text[..])
            })
            .collect();
        let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &requests);
        built.into_iter().map(Result::unwrap).collect()
    }

    pub(crate) fn hop(&self, number: usize, delay: Duration) -> Hop {
        let node = &self.topology.nodes()[number];
        Hop { address: *node.identity.as_bytes(), key: node.sphinx_key.public_key(), delay }
    }
}

pub(crate) fn topology(network: &str, nodes: Vec<Node>) -> Topology {
    topology_of(network, 1, parameters(PAYLOAD_LEN), nodes)
}

fn parameters(payload_bytes: usize) -> Parameters {
    Parameters {
        payload_bytes,
        mean_delay: Duration::from_millis(1),
        max_delay: MAX_DELAY,
        epochs: Epochs::STATIC,
    }
}

fn topology_of(network: &str, epoch: u64, parameters: Parameters, nodes: Vec<Node>) -> Topology {
    let network = NetworkName::new(network).unwrap();
    let validity = UnixTime(0)..UnixTime(u64::MAX);
    Topology::new(network, epoch, validity, parameters, nodes, Vec::new()).unwrap()
}

/// Awaits something that happens soon or never.
pub(crate) async fn soon<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.expect("it happens in the end")
}

/// Waits until so many packets have been dropped for this reason.
pub(crate) async fn until_dropped(counters: &Counters, reason: DropReason, count: u64) {
    until(|| counters.snapshot().dropped(reason) >= count).await;
    assert_eq!(counters.snapshot().dropped(reason), count);
}

/// Waits until something is so.
pub(crate) async fn until(is_so: impl Fn() -> bool) {
    let reached = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(reached).await;
}
