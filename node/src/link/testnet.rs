//! A small network for tests: two gateways and one mix per layer, listening on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{Epochs, NetworkName, Node, Parameters, Role, Topology, UnixTime};
use mixsocks_sphinx::{Hop, Packet, Route, SecretKey, build_packets};
use tokio::net::TcpListener;

use super::LinkContext;
use crate::counters::{Counters, DropReason};

pub(crate) const PAYLOAD_LEN: usize = 1024;
pub(crate) const MAX_DELAY: Duration = Duration::from_millis(20);
/// Nothing in a test takes that long, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);

/// The nodes by number: the two gateways around the mixes of the layers 1 to 3.
pub(crate) const ENTRY: usize = 0;
pub(crate) const EXIT: usize = 4;

pub(crate) struct TestNet {
    pub(crate) keys: Vec<Arc<IdentityKey>>,
    pub(crate) sphinx_keys: Vec<SecretKey>,
    pub(crate) topology: Arc<Topology>,
    listeners: Vec<Option<TcpListener>>,
}

impl TestNet {
    pub(crate) async fn new() -> Self {
        let mut rng = rand::rng();
        let mut keys = Vec::new();
        let mut sphinx_keys = Vec::new();
        let mut listeners = Vec::new();
        let mut nodes = Vec::new();
        for number in ENTRY..=EXIT {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let key = IdentityKey::generate(&mut rng);
            let sphinx_key = SecretKey::generate(&mut rng);
            let link_address = listener.local_addr().unwrap();
            let role = match u8::try_from(number).unwrap() {
                layer @ 1..=3 => Role::Mix { layer },
                _ => Role::Gateway { client_address: link_address },
            };
            nodes.push(Node {
                identity: key.identity(),
                sphinx_key: sphinx_key.public_key().into(),
                next_sphinx_key: None,
                link_address,
                role,
            });
            keys.push(Arc::new(key));
            sphinx_keys.push(sphinx_key);
            listeners.push(Some(listener));
        }
        let topology = Arc::new(topology("test", nodes));
        Self { keys, sphinx_keys, topology, listeners }
    }

    /// Makes it a network of other packets.
    pub(crate) fn set_payload_len(&mut self, payload_len: usize) {
        let nodes = self.topology.nodes().to_vec();
        self.topology = Arc::new(topology_with("test", nodes, payload_len));
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

    pub(crate) fn sphinx_key(&self, number: usize) -> SecretKey {
        SecretKey::from_bytes(*self.sphinx_keys[number].to_bytes())
    }

    pub(crate) fn context(&self, number: usize) -> (LinkContext, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let (key, topology) = (self.keys[number].clone(), self.topology.clone());
        (LinkContext::new(key, topology, counters.clone()), counters)
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
    topology_with(network, nodes, PAYLOAD_LEN)
}

fn topology_with(network: &str, nodes: Vec<Node>, payload_bytes: usize) -> Topology {
    let parameters = Parameters {
        payload_bytes,
        mean_delay: Duration::from_millis(1),
        max_delay: MAX_DELAY,
        epochs: Epochs::STATIC,
    };
    let network = NetworkName::new(network).unwrap();
    let validity = UnixTime(0)..UnixTime(u64::MAX);
    Topology::new(network, 1, validity, parameters, nodes, Vec::new()).unwrap()
}

/// Awaits something that happens soon or never.
pub(crate) async fn soon<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, event).await.expect("it happens in the end")
}

/// Waits until so many packets have been dropped for this reason.
pub(crate) async fn until_dropped(counters: &Counters, reason: DropReason, count: u64) {
    let reached = async {
        while counters.snapshot().dropped(reason) < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(reached).await;
    assert_eq!(counters.snapshot().dropped(reason), count);
}
