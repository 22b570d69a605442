//! The topology: which nodes and providers a network has, as a document signed by its authorities.
//!
//! [`sign`] and [`verify`] make and read its file, [`random_route`] chooses a way through it.

mod document;
mod epochs;
mod route;
mod signed;

use std::net::SocketAddr;
use std::time::Duration;

pub(crate) use document::RawParameters;
pub use document::{DocumentError, MAX_NODES, MAX_PROVIDERS};
pub use epochs::Epochs;
pub use route::{
    NoRoute, RouteChoice, check_route, delay_quantile, random_message_route, random_route,
};
pub use signed::{
    Authorities, AuthoritiesError, DocumentBody, DocumentDigest, MAX_DOCUMENT_BYTES,
    SignedTopology, TopologyError, sign, verify,
};

use crate::address::Address;
use crate::keys::{EncryptionKey, Identity};

/// Mix layers of every network.
pub const LAYERS: usize = 3;

/// Name of a network: 1 to 64 of the characters a–z, 0–9 and hyphen.
///
/// It is part of every signature and hello, so that nodes of two networks never mix.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NetworkName(String);

impl NetworkName {
    /// Longest name in bytes.
    pub const MAX_LEN: usize = 64;

    /// Checks a name; `None` when it is empty, too long or holds another character.
    pub fn new(name: &str) -> Option<Self> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (!name.is_empty() && name.len() <= Self::MAX_LEN && name.bytes().all(allowed))
            .then(|| Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Seconds since 1970-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixTime(pub u64);

/// What all nodes of a network agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Bytes of a packet's payload: 1,024 to 32,768.
    pub payload_bytes: usize,
    /// Mean of the exponential delay that senders choose for each mix. Provider and client judge
    /// loss by it.
    pub mean_delay: Duration,
    /// A mix holds no packet longer, whatever its sender chose.
    pub max_delay: Duration,
    /// How documents and Sphinx keys follow each other.
    pub epochs: Epochs,
}

/// A mix or gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name, in packets too.
    pub identity: Identity,
    /// Key of its layer of a packet, in the key epoch of the document.
    pub sphinx_key: EncryptionKey,
    /// The same for the key epoch after that, if the node has told it.
    pub next_sphinx_key: Option<EncryptionKey>,
    /// Where other nodes reach it.
    pub link_address: SocketAddr,
    /// What it does.
    pub role: Role,
}

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Mixes in one of the layers 1 to 3.
    Mix {
        /// The layer, from 1.
        layer: u8,
    },
    /// Entry and inbox of clients.
    Gateway {
        /// Where clients reach it (websocket over TLS).
        client_address: SocketAddr,
    },
}

impl Role {
    /// Whether packets may go from a node of this role straight to one of the other: from a gateway
    /// into layer 1, from a layer into the next, from the last layer to a gateway.
    pub fn may_forward_to(self, next: Self) -> bool {
        match (self, next) {
            (Self::Gateway { .. }, Self::Mix { layer }) => layer == 1,
            (Self::Mix { layer: from }, Self::Mix { layer: to }) => to == from + 1,
            (Self::Mix { layer }, Self::Gateway { .. }) => usize::from(layer) == LAYERS,
            (Self::Gateway { .. }, Self::Gateway { .. }) => false,
        }
    }
}

/// An advertised service provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    /// Short name for people.
    pub name: String,
    /// Where packets for it go.
    pub address: Address,
    /// What it lets through, in words.
    pub policy: String,
    /// It serves only those who have a token of its operator.
    pub requires_token: bool,
}

/// A topology whose signatures and contents have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The network it describes.
    pub network: NetworkName,
    /// Counts documents; a higher one replaces a lower one.
    pub epoch: u64,
    /// Not in force before.
    pub valid_from: UnixTime,
    /// Not in force from this second on.
    pub valid_until: UnixTime,
    /// What all agree on.
    pub parameters: Parameters,
    nodes: Vec<Node>,
    waiting: Vec<Identity>,
    providers: Vec<Provider>,
}

impl Topology {
    /// Bytes of a packet on this network.
    pub fn packet_bytes(&self) -> usize {
        mixsocks_sphinx::HEADER_LEN + self.parameters.payload_bytes
    }

    /// All nodes, in the document's order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Mixes that are known but not in a layer yet, in the document's order: the next document
    /// places them.
    pub fn waiting(&self) -> &[Identity] {
        &self.waiting
    }

    /// The key epoch of [`Node::sphinx_key`].
    pub fn key_epoch(&self) -> u64 {
        self.parameters.epochs.key_epoch(self.epoch)
    }

    /// The key epoch whose keys packets are made with at `now`: see [`Topology::sphinx_key`].
    pub fn key_epoch_used(&self, now: UnixTime) -> u64 {
        self.parameters.epochs.key_epoch_at(now).max(self.key_epoch())
    }

    /// The earliest key epoch whose keys nodes may still have at `now`.
    pub fn oldest_key_epoch(&self, now: UnixTime) -> u64 {
        let epochs = self.parameters.epochs;
        epochs.key_epoch_at(UnixTime(now.0.saturating_sub(epochs.overlap_seconds)))
    }

    /// The key with which packets are made for `node` at `now`; `None` when the document is too old
    /// to tell. Who has the document a little before its epoch uses its key already.
    pub fn sphinx_key(&self, node: &Node, now: UnixTime) -> Option<EncryptionKey> {
        let key_epoch = self.parameters.epochs.key_epoch_at(now);
        match key_epoch.saturating_sub(self.key_epoch()) {
            0 => Some(node.sphinx_key),
            1 => node.next_sphinx_key,
            _ => None,
        }
    }

    /// All advertised providers, in the document's order.
    pub fn providers(&self) -> &[Provider] {
        &self.providers
    }

    /// The node with this identity.
    pub fn node(&self, identity: &Identity) -> Option<&Node> {
        self.nodes.iter().find(|node| node.identity == *identity)
    }

    /// The mixes of a layer, from 1.
    pub fn mixes(&self, layer: u8) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.role == Role::Mix { layer })
    }

    /// All gateways.
    pub fn gateways(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| matches!(node.role, Role::Gateway { .. }))
    }

    /// The gateway with this identity.
    pub fn gateway(&self, identity: &Identity) -> Option<&Node> {
        self.node(identity).filter(|node| matches!(node.role, Role::Gateway { .. }))
    }

    /// The provider with this name.
    pub fn provider(&self, name: &str) -> Option<&Provider> {
        self.providers.iter().find(|provider| provider.name == name)
    }

    /// The provider with this address; not all are advertised.
    pub fn provider_at(&self, address: &Address) -> Option<&Provider> {
        self.providers.iter().find(|provider| provider.address == *address)
    }

    /// Whether a packet may go from one node straight to the other, by their roles.
    pub fn may_forward(&self, from: &Identity, to: &Identity) -> bool {
        let (Some(from), Some(to)) = (self.node(from), self.node(to)) else { return false };
        from.role.may_forward_to(to.role)
    }
}
