//! The text of a topology: TOML in, [`Topology`] out, and back.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Epochs, LAYERS, NetworkName, Node, Parameters, Provider, Role, Topology, UnixTime};
use crate::address::Address;
use crate::keys::{EncryptionKey, Identity};
use crate::signed_text::toml_error;

/// Most nodes in a document: a bound on memory and on the work of checking it.
pub const MAX_NODES: usize = 10_000;
/// Most providers in a document.
pub const MAX_PROVIDERS: usize = 10_000;

const MIN_PAYLOAD_BYTES: usize = 1024;
const MAX_PAYLOAD_BYTES: usize = 32 * 1024;
/// A sender that could choose longer delays could fill a mix's memory with waiting packets.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// What is wrong with the contents of a topology whose signatures are right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// It is not the TOML that a topology is made of.
    #[error("line {line} does not read as a topology: {problem}")]
    Syntax {
        /// The line of the file, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// The network name has other characters than a–z, 0–9 and hyphen, or too many.
    #[error("the network name {0:?} must be 1 to 64 of the characters a-z, 0-9 and hyphen")]
    NetworkName(String),
    /// A parameter is out of its range.
    #[error("{name} is {value}, but must be {range}")]
    OutOfRange {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        range: &'static str,
    },
    /// A layer has no mix, so that no packet gets through.
    #[error("layer {0} has no mix")]
    EmptyLayer(usize),
    /// There is no gateway, so that nobody can take part.
    #[error("there is no gateway")]
    NoGateway,
    /// A node has a role that does not exist, or misses what its role needs.
    #[error("node {identity}: {problem}")]
    Node {
        /// The node.
        identity: Identity,
        /// What is wrong.
        problem: &'static str,
    },
    /// Two nodes, or two providers, have something in common that each must have for itself.
    #[error("{0} appears twice")]
    Duplicate(String),
    /// A provider is registered with a gateway that the document does not have.
    #[error("the gateway of provider {0:?} is not in the topology")]
    UnknownGateway(String),
    /// More nodes or providers than a document may have.
    #[error("{count} {what}, at most {max} are allowed")]
    TooMany {
        /// Nodes or providers.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTopology {
    network: String,
    epoch: u64,
    valid_from: u64,
    valid_until: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    waiting: Vec<Identity>,
    parameters: RawParameters,
    node: Vec<RawNode>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    provider: Vec<RawProvider>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawParameters {
    payload_bytes: usize,
    mean_delay_us: u64,
    max_delay_us: u64,
    epoch_seconds: u64,
    key_epochs: u64,
    overlap_seconds: u64,
}

impl From<RawParameters> for Parameters {
    fn from(raw: RawParameters) -> Self {
        Self {
            payload_bytes: raw.payload_bytes,
            mean_delay: Duration::from_micros(raw.mean_delay_us),
            max_delay: Duration::from_micros(raw.max_delay_us),
            epochs: Epochs {
                epoch_seconds: raw.epoch_seconds,
                key_epochs: raw.key_epochs,
                overlap_seconds: raw.overlap_seconds,
            },
        }
    }
}

impl From<&Parameters> for RawParameters {
    fn from(parameters: &Parameters) -> Self {
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let Epochs { epoch_seconds, key_epochs, overlap_seconds } = parameters.epochs;
        Self {
            payload_bytes: parameters.payload_bytes,
            mean_delay_us: micros(parameters.mean_delay),
            max_delay_us: micros(parameters.max_delay),
            epoch_seconds,
            key_epochs,
            overlap_seconds,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    role: RawRole,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<u8>,
    identity: Identity,
    sphinx_key: EncryptionKey,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_sphinx_key: Option<EncryptionKey>,
    link_address: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_address: Option<SocketAddr>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawRole {
    Mix,
    Gateway,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProvider {
    name: String,
    address: Address,
    policy: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    requires_token: bool,
}

impl Topology {
    /// Puts a topology together, in which nobody waits.
    ///
    /// # Errors
    /// [`DocumentError`] says which rule the parts break.
    pub fn new(
        network: NetworkName,
        epoch: u64,
        validity: std::ops::Range<UnixTime>,
        parameters: Parameters,
        nodes: Vec<Node>,
        providers: Vec<Provider>,
    ) -> Result<Self, DocumentError> {
        let topology = Self {
            network,
            epoch,
            valid_from: validity.start,
            valid_until: validity.end,
            parameters,
            nodes,
            waiting: Vec::new(),
            providers,
        };
        topology.check()?;
        Ok(topology)
    }

    /// The same with these mixes waiting for a layer.
    ///
    /// # Errors
    /// [`DocumentError`] when one of them is there already, or when they are too many.
    pub fn with_waiting(self, waiting: Vec<Identity>) -> Result<Self, DocumentError> {
        let topology = Self { waiting, ..self };
        topology.check()?;
        Ok(topology)
    }

    /// Reads the text of a document whose signatures have been checked; it begins at `first_line` of
    /// its file.
    pub(super) fn from_toml(text: &str, first_line: usize) -> Result<Self, DocumentError> {
        let raw: RawTopology = toml::from_str(text).map_err(|error| {
            let (line, problem) = toml_error(&error, text, first_line);
            DocumentError::Syntax { line, problem }
        })?;
        let network = NetworkName::new(&raw.network)
            .ok_or_else(|| DocumentError::NetworkName(raw.network.clone()))?;
        let parameters = raw.parameters.into();
        let nodes = raw.node.into_iter().map(RawNode::check).collect::<Result<_, _>>()?;
        let providers = raw
            .provider
            .into_iter()
            .map(|RawProvider { name, address, policy, requires_token }| Provider {
                name,
                address,
                policy,
                requires_token,
            })
            .collect();
        let validity = UnixTime(raw.valid_from)..UnixTime(raw.valid_until);
        Self::new(network, raw.epoch, validity, parameters, nodes, providers)?
            .with_waiting(raw.waiting)
    }

    /// Writes the text of the document.
    ///
    /// # Panics
    /// Never: every value has a TOML form.
    pub(super) fn to_toml(&self) -> String {
        let raw = RawTopology {
            network: self.network.as_str().to_owned(),
            epoch: self.epoch,
            valid_from: self.valid_from.0,
            valid_until: self.valid_until.0,
            waiting: self.waiting.clone(),
            parameters: RawParameters::from(&self.parameters),
            node: self.nodes.iter().map(RawNode::from).collect(),
            provider: self
                .providers
                .iter()
                .cloned()
                .map(|Provider { name, address, policy, requires_token }| RawProvider {
                    name,
                    address,
                    policy,
                    requires_token,
                })
                .collect(),
        };
        toml::to_string(&raw).expect("a topology has only TOML values")
    }

    fn check(&self) -> Result<(), DocumentError> {
        self.parameters.check()?;
        for (what, count, max) in [
            ("nodes", self.nodes.len().saturating_add(self.waiting.len()), MAX_NODES),
            ("providers", self.providers.len(), MAX_PROVIDERS),
        ] {
            if count > max {
                return Err(DocumentError::TooMany { what, count, max });
            }
        }
        let mut mixes = [0usize; LAYERS];
        let mut distinct = DistinctNodes::default();
        let mut gateways = BTreeSet::new();
        for node in &self.nodes {
            distinct.add(node)?;
            match node.role {
                Role::Mix { layer } => match mixes.get_mut(usize::from(layer).wrapping_sub(1)) {
                    Some(count) => *count += 1,
                    None => {
                        let problem = "its layer must be 1, 2 or 3";
                        return Err(DocumentError::Node { identity: node.identity, problem });
                    }
                },
                Role::Gateway { .. } => {
                    gateways.insert(node.identity);
                }
            }
        }
        for identity in &self.waiting {
            distinct.add_waiting(*identity)?;
        }
        if let Some(empty) = mixes.iter().position(|count| *count == 0) {
            return Err(DocumentError::EmptyLayer(empty + 1));
        }
        if gateways.is_empty() {
            return Err(DocumentError::NoGateway);
        }
        let mut names = BTreeSet::new();
        for provider in &self.providers {
            if !names.insert(&provider.name) {
                return Err(DocumentError::Duplicate(format!("provider {:?}", provider.name)));
            }
            if !gateways.contains(&provider.address.gateway) {
                return Err(DocumentError::UnknownGateway(provider.name.clone()));
            }
        }
        Ok(())
    }
}

/// What nodes must not have in common: a machine that is listed as two nodes would see two hops of
/// a route.
#[derive(Default)]
struct DistinctNodes {
    identities: BTreeSet<Identity>,
    sphinx_keys: BTreeSet<EncryptionKey>,
    link_addresses: BTreeSet<SocketAddr>,
}

impl DistinctNodes {
    fn add(&mut self, node: &Node) -> Result<(), DocumentError> {
        let Node { identity, sphinx_key, next_sphinx_key, link_address, .. } = node;
        let mut keys = std::iter::once(sphinx_key).chain(next_sphinx_key);
        let twice = if !self.identities.insert(*identity) {
            format!("node {identity}")
        } else if let Some(key) = keys.find(|key| !self.sphinx_keys.insert(**key)) {
            format!("sphinx_key {key}")
        } else if !self.link_addresses.insert(*link_address) {
            format!("link_address {link_address}")
        } else {
            return Ok(());
        };
        Err(DocumentError::Duplicate(twice))
    }

    fn add_waiting(&mut self, identity: Identity) -> Result<(), DocumentError> {
        if self.identities.insert(identity) {
            return Ok(());
        }
        Err(DocumentError::Duplicate(format!("node {identity}")))
    }
}

impl Parameters {
    /// Checks the ranges.
    pub(crate) fn check(&self) -> Result<(), DocumentError> {
        let out_of_range =
            |name, value, range| Err(DocumentError::OutOfRange { name, value, range });
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        if !(MIN_PAYLOAD_BYTES..=MAX_PAYLOAD_BYTES).contains(&self.payload_bytes) {
            return out_of_range("payload_bytes", self.payload_bytes as u64, "1024 to 32768");
        }
        if self.max_delay > MAX_DELAY {
            return out_of_range("max_delay_us", micros(self.max_delay), "at most 60000000");
        }
        if self.mean_delay > self.max_delay {
            return out_of_range("mean_delay_us", micros(self.mean_delay), "at most max_delay_us");
        }
        let Epochs { epoch_seconds, key_epochs, overlap_seconds } = self.epochs;
        for (name, value) in [("epoch_seconds", epoch_seconds), ("key_epochs", key_epochs)] {
            if !(1..=Epochs::MAX).contains(&value) {
                return out_of_range(name, value, "1 to 4294967295");
            }
        }
        if overlap_seconds > epoch_seconds * key_epochs / 2 {
            return out_of_range("overlap_seconds", overlap_seconds, "at most half a key epoch");
        }
        Ok(())
    }
}

impl RawNode {
    fn check(self) -> Result<Node, DocumentError> {
        let role = match (self.role, self.layer, self.client_address) {
            (RawRole::Mix, Some(layer), None) => Ok(Role::Mix { layer }),
            (RawRole::Mix, None, _) => Err("a mix needs a layer"),
            (RawRole::Mix, Some(_), Some(_)) => Err("a mix has no client_address"),
            (RawRole::Gateway, None, Some(client_address)) => Ok(Role::Gateway { client_address }),
            (RawRole::Gateway, _, None) => Err("a gateway needs a client_address"),
            (RawRole::Gateway, Some(_), _) => Err("a gateway has no layer"),
        };
        let role =
            role.map_err(|problem| DocumentError::Node { identity: self.identity, problem })?;
        Ok(Node {
            identity: self.identity,
            sphinx_key: self.sphinx_key,
            next_sphinx_key: self.next_sphinx_key,
            link_address: self.link_address,
            role,
        })
    }
}

impl From<&Node> for RawNode {
    fn from(node: &Node) -> Self {
        let (role, layer, client_address) = match node.role {
            Role::Mix { layer } => (RawRole::Mix, Some(layer), None),
            Role::Gateway { client_address } => (RawRole::Gateway, None, Some(client_address)),
        };
        Self {
            role,
            layer,
            identity: node.identity,
            sphinx_key: node.sphinx_key,
            next_sphinx_key: node.next_sphinx_key,
            link_address: node.link_address,
            client_address,
        }
    }
}
