//! A network of a client's tests: two mixes in each layer and two gateways, whose keys change.

use std::net::SocketAddr;
use std::time::Duration;

use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{
    Epochs, LAYERS, NetworkName, Node, Parameters, Role, Topology, UnixTime,
};
use mixsocks_sphinx::SecretKey;

pub(crate) const KEY_EPOCH_SECONDS: u64 = 3600;
pub(crate) const OVERLAP_SECONDS: u64 = 240;

/// Fails when an event does not come.
pub(crate) async fn within<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), event).await.expect("it happens in the end")
}

struct TestNode {
    identity: Identity,
    /// Of key epoch 0 and the following.
    keys: [SecretKey; 3],
    port: u16,
    role: Role,
}

pub(crate) struct TestNetwork {
    pub(crate) name: String,
    pub(crate) parameters: Parameters,
    nodes: Vec<TestNode>,
}

impl TestNetwork {
    pub(crate) const OWN_GATEWAY: usize = 0;
    pub(crate) const PEER_GATEWAY: usize = 1;
    pub(crate) const FIRST_MIX: usize = 2;

    pub(crate) fn new() -> Self {
        let parameters = Parameters {
            payload_bytes: 2048,
            mean_delay: Duration::from_millis(15),
            max_delay: Duration::from_secs(10),
            epochs: Epochs {
                epoch_seconds: KEY_EPOCH_SECONDS,
                key_epochs: 1,
                overlap_seconds: OVERLAP_SECONDS,
            },
        };
        let mut network = Self { name: "test".to_owned(), parameters, nodes: Vec::new() };
        for port in [1, 2] {
            let client_address = SocketAddr::from(([127, 0, 0, 1], port));
            network.add(Role::Gateway { client_address });
        }
        for layer in (1..).take(LAYERS) {
            network.add_mix(layer);
            network.add_mix(layer);
        }
        network
    }

    fn add(&mut self, role: Role) {
        let mut rng = rand::rng();
        let identity = IdentityKey::generate(&mut rng).identity();
        let keys = std::array::from_fn(|_| SecretKey::generate(&mut rng));
        let port = 1000 + u16::try_from(self.nodes.len()).unwrap();
        self.nodes.push(TestNode { identity, keys, port, role });
    }

    pub(crate) fn add_mix(&mut self, layer: u8) {
        self.add(Role::Mix { layer });
    }

    fn mix(&self, in_layer: u8) -> usize {
        let is_it = |node: &TestNode| node.role == Role::Mix { layer: in_layer };
        self.nodes.iter().position(is_it).unwrap()
    }

    pub(crate) fn remove_mix(&mut self, layer: u8) {
        self.nodes.remove(self.mix(layer));
    }

    pub(crate) fn move_mix(&mut self, from: u8, to: u8) {
        let mix = self.mix(from);
        self.nodes[mix].role = Role::Mix { layer: to };
    }

    pub(crate) fn change_key(&mut self, node: usize) {
        self.nodes[node].keys = std::array::from_fn(|_| SecretKey::generate(&mut rand::rng()));
    }

    pub(crate) fn move_to_port(&mut self, node: usize, port: u16) {
        self.nodes[node].port = port;
    }

    /// Clients reach a gateway here.
    pub(crate) fn set_client_address(&mut self, gateway: usize, client_address: SocketAddr) {
        self.nodes[gateway].role = Role::Gateway { client_address };
    }

    /// The client's own, and the one of whom it talks to.
    pub(crate) fn gateways(&self) -> [Identity; 2] {
        [Self::OWN_GATEWAY, Self::PEER_GATEWAY].map(|number| self.nodes[number].identity)
    }

    /// The document of an epoch, 0 or 1, which is in force for two.
    pub(crate) fn topology(&self, epoch: u8) -> Topology {
        let keys = |node: &TestNode| {
            [0, 1].map(|next| node.keys[usize::from(epoch) + next].public_key().into())
        };
        let nodes = self.nodes.iter().map(|node| {
            let [sphinx_key, next] = keys(node);
            Node {
                identity: node.identity,
                sphinx_key,
                next_sphinx_key: Some(next),
                link_address: SocketAddr::from(([127, 0, 0, 1], node.port)),
                role: node.role,
            }
        });
        let epoch = u64::from(epoch);
        let validity = UnixTime(0)..UnixTime((epoch + 2) * self.parameters.epochs.epoch_seconds);
        let network = NetworkName::new(&self.name).unwrap();
        Topology::new(network, epoch, validity, self.parameters, nodes.collect(), vec![]).unwrap()
    }
}
