//! A network that is as small as one can be.

use std::time::Duration;

use mixsocks_common::address::Address;
use mixsocks_common::keys::{EncryptionKey, Identity, IdentityKey};
use mixsocks_common::topology::{
    Epochs, NetworkName, Node, Parameters, Provider, Role, Topology, UnixTime,
};
use mixsocks_sphinx::SecretKey;

/// One node of each kind and a provider, in force from second 100 up to 200.
pub fn small_network() -> Topology {
    let node = |number: u8, role| Node {
        identity: identity(number),
        sphinx_key: encryption_key(number),
        next_sphinx_key: None,
        link_address: ([192, 0, 2, number], 9000).into(),
        role,
    };
    let mut nodes: Vec<_> = (1..=3).map(|layer| node(layer, Role::Mix { layer })).collect();
    nodes.push(node(4, Role::Gateway { client_address: ([192, 0, 2, 4], 9001).into() }));
    let address =
        Address { identity: identity(5), encryption: encryption_key(5), gateway: identity(4) };
    let policy = "everything but \"port 25\"\nand more".to_owned();
    let parameters = Parameters {
        payload_bytes: 2048,
        mean_delay: Duration::from_millis(15),
        max_delay: Duration::from_secs(10),
        epochs: Epochs::STATIC,
    };
    let network = NetworkName::new("test").expect("a good name");
    let providers =
        vec![Provider { name: "exit".to_owned(), address, policy, requires_token: false }];
    Topology::new(network, 7, UnixTime(100)..UnixTime(200), parameters, nodes, providers)
        .expect("a small network")
}

fn identity(number: u8) -> Identity {
    IdentityKey::from_bytes(&[number; 32]).identity()
}

fn encryption_key(number: u8) -> EncryptionKey {
    SecretKey::from_bytes([number; 32]).public_key().into()
}
