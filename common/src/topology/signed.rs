//! The file of a topology: signature lines, an empty line, and the TOML that they sign.
//!
//! ```text
//! mixsocks-topology 1
//! signature <authority, base58> <signature, base58>
//!
//! network = "…"
//! …
//! ```
//!
//! A signature is made over `"mixsocks topology v1\0"` followed by every byte after the empty line,
//! so that there is nothing to normalise and nothing unsigned to parse.

use std::collections::BTreeSet;

use super::{DocumentError, Topology, UnixTime};
use crate::keys::{Identity, IdentityKey, KeyError, Signature};

const FIRST_LINE: &str = "mixsocks-topology 1";
const CONTEXT: &[u8] = b"mixsocks topology v1\0";

/// Longest topology file in bytes: a network of [`super::MAX_NODES`] nodes fits.
pub const MAX_DOCUMENT_BYTES: usize = 8 * 1024 * 1024;

/// Most signature lines that are looked at: nobody has more authorities.
const MAX_SIGNATURES: usize = 64;

/// The keys that a network's documents must be signed with, and by how many of them.
#[derive(Clone, Debug)]
pub struct Authorities {
    keys: BTreeSet<Identity>,
    threshold: usize,
}

/// The authorities contradict each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{threshold} of {count} signatures: more than half of the authorities, and not more than all, must sign"
)]
pub struct AuthoritiesError {
    threshold: usize,
    count: usize,
}

/// Why a topology file is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// The file is not a topology at all.
    #[error("this is not a topology file: {0}")]
    NotATopology(&'static str),
    /// A key or signature in the first lines does not read.
    #[error("a signature line is damaged: {0}")]
    SignatureLine(#[from] KeyError),
    /// The document was changed, or others than the pinned authorities signed it.
    #[error(
        "{valid} of {needed} needed signatures are right: the file was changed, or belongs to a network with other authorities"
    )]
    Signatures {
        /// Signatures of pinned authorities that are right.
        valid: usize,
        /// How many are needed.
        needed: usize,
    },
    /// The contents break a rule.
    #[error("the topology is signed, but unusable: {0}")]
    Document(#[from] DocumentError),
    /// The document is not in force any more.
    #[error(
        "the topology expired {seconds_ago} s ago: fetch a newer one, or set this machine's clock"
    )]
    Expired {
        /// How long ago.
        seconds_ago: u64,
    },
    /// The document is not in force yet.
    #[error("the topology becomes valid in {seconds} s: set this machine's clock, or wait")]
    NotYetValid {
        /// In how many seconds.
        seconds: u64,
    },
}

impl Authorities {
    /// `threshold` of `keys` must have signed.
    ///
    /// # Errors
    /// [`AuthoritiesError`] unless more than half, and at most all, of the keys are needed: with
    /// half or fewer, two valid documents of one epoch could exist.
    pub fn new(
        keys: impl IntoIterator<Item = Identity>,
        threshold: usize,
    ) -> Result<Self, AuthoritiesError> {
        let keys: BTreeSet<_> = keys.into_iter().collect();
        let count = keys.len();
        if threshold * 2 <= count || threshold > count {
            return Err(AuthoritiesError { threshold, count });
        }
        Ok(Self { keys, threshold })
    }

    /// The pinned keys.
    pub fn keys(&self) -> impl Iterator<Item = &Identity> {
        self.keys.iter()
    }
}

/// Writes the file of a topology, signed with each of `keys`.
pub fn sign(topology: &Topology, keys: &[&IdentityKey]) -> String {
    let body = topology.to_toml();
    let message = signed_bytes(&body);
    let mut file = format!("{FIRST_LINE}\n");
    for key in keys {
        file.push_str(&format!("signature {} {}\n", key.identity(), key.sign(&message)));
    }
    file.push('\n');
    file.push_str(&body);
    file
}

/// Reads a file, checks its signatures, its contents and that it is in force at `now`.
///
/// Nothing of the contents is looked at before the signatures are right.
///
/// # Errors
/// [`TopologyError`] says what to do about it.
pub fn verify(
    file: &[u8],
    authorities: &Authorities,
    now: UnixTime,
) -> Result<Topology, TopologyError> {
    if file.len() > MAX_DOCUMENT_BYTES {
        return Err(TopologyError::NotATopology("it is larger than 8 MiB"));
    }
    let text =
        std::str::from_utf8(file).map_err(|_| TopologyError::NotATopology("it is not text"))?;
    let text = text
        .strip_prefix(FIRST_LINE)
        .and_then(|rest| rest.strip_prefix('\n'))
        .ok_or(TopologyError::NotATopology("its first line is not \"mixsocks-topology 1\""))?;
    let (signatures, body) = if let Some(body) = text.strip_prefix('\n') {
        ("", body)
    } else {
        text.split_once("\n\n")
            .ok_or(TopologyError::NotATopology("no empty line follows the signatures"))?
    };
    let message = signed_bytes(body);
    let mut signers = BTreeSet::new();
    for (index, line) in signatures.lines().enumerate() {
        if index == MAX_SIGNATURES {
            return Err(TopologyError::NotATopology("it has more than 64 signatures"));
        }
        let (authority, signature) = line
            .strip_prefix("signature ")
            .and_then(|rest| rest.split_once(' '))
            .ok_or(TopologyError::NotATopology("a line before the empty one is no signature"))?;
        let authority: Identity = authority.parse()?;
        let signature: Signature = signature.parse()?;
        if authorities.keys.contains(&authority) && authority.verify(&message, &signature).is_ok() {
            signers.insert(authority);
        }
    }
    if signers.len() < authorities.threshold {
        let (valid, needed) = (signers.len(), authorities.threshold);
        return Err(TopologyError::Signatures { valid, needed });
    }
    let topology = Topology::from_toml(body)?;
    if now < topology.valid_from {
        return Err(TopologyError::NotYetValid { seconds: topology.valid_from.0 - now.0 });
    }
    if now >= topology.valid_until {
        return Err(TopologyError::Expired { seconds_ago: now.0 - topology.valid_until.0 });
    }
    Ok(topology)
}

fn signed_bytes(body: &str) -> Vec<u8> {
    [CONTEXT, body.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::super::{LAYERS, NetworkName, Node, Parameters, Provider, Role};
    use super::*;
    use crate::address::Address;
    use mixsocks_sphinx::SecretKey;
    use std::time::Duration;

    fn node(role: Role) -> Node {
        let mut rng = rand::rng();
        Node {
            identity: IdentityKey::generate(&mut rng).identity(),
            sphinx_key: SecretKey::generate(&mut rng).public_key().into(),
            link_address: "127.0.0.1:9000".parse().unwrap(),
            role,
        }
    }

    fn nodes() -> Vec<Node> {
        let client_address = "127.0.0.1:9001".parse().unwrap();
        let mut nodes: Vec<_> = (1..=3).map(|layer| node(Role::Mix { layer })).collect();
        nodes.extend((0..2).map(|_| node(Role::Gateway { client_address })));
        nodes
    }

    fn topology_of(nodes: Vec<Node>, providers: Vec<Provider>) -> Result<Topology, DocumentError> {
        let parameters = Parameters {
            payload_bytes: 2048,
            mean_delay: Duration::from_millis(15),
            max_delay: Duration::from_secs(10),
        };
        let network = NetworkName::new("test").unwrap();
        Topology::new(network, 7, UnixTime(100)..UnixTime(200), parameters, nodes, providers)
    }

    fn topology() -> Topology {
        let nodes = nodes();
        let provider = Provider {
            name: "exit".to_owned(),
            address: Address {
                identity: IdentityKey::generate(&mut rand::rng()).identity(),
                encryption: nodes[0].sphinx_key,
                gateway: nodes[4].identity,
            },
            policy: "everything but \"port 25\"\nand more".to_owned(),
        };
        topology_of(nodes, vec![provider]).unwrap()
    }

    fn authorities(keys: &[&IdentityKey], threshold: usize) -> Authorities {
        Authorities::new(keys.iter().map(|key| key.identity()), threshold).unwrap()
    }

    #[test]
    fn signed_file_round_trips() {
        let topology = topology();
        let key = IdentityKey::generate(&mut rand::rng());
        let file = sign(&topology, &[&key]);
        let read = verify(file.as_bytes(), &authorities(&[&key], 1), UnixTime(150));
        assert_eq!(read, Ok(topology));
    }

    #[test]
    fn a_changed_byte_anywhere_is_refused() {
        let key = IdentityKey::generate(&mut rand::rng());
        let file = sign(&topology(), &[&key]).into_bytes();
        let authorities = authorities(&[&key], 1);
        for at in 0..file.len() {
            let mut changed = file.clone();
            changed[at] ^= 1;
            assert!(verify(&changed, &authorities, UnixTime(150)).is_err(), "byte {at}");
        }
        for end in 0..file.len() {
            assert!(verify(&file[..end], &authorities, UnixTime(150)).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn the_same_authority_counts_once_and_strangers_never() {
        let keys: Vec<_> = (0..3).map(|_| IdentityKey::generate(&mut rand::rng())).collect();
        let stranger = IdentityKey::generate(&mut rand::rng());
        let two_of_three = authorities(&keys.iter().collect::<Vec<_>>(), 2);
        let check = |signers: &[&IdentityKey]| {
            let file = sign(&topology(), signers);
            verify(file.as_bytes(), &two_of_three, UnixTime(150)).map(|_| ())
        };
        let too_few = Err(TopologyError::Signatures { valid: 1, needed: 2 });
        assert_eq!(check(&[&keys[0], &keys[0]]), too_few);
        assert_eq!(check(&[&keys[0], &stranger]), too_few);
        assert_eq!(check(&[]), Err(TopologyError::Signatures { valid: 0, needed: 2 }));
        assert_eq!(check(&[&stranger, &keys[2], &keys[0]]), Ok(()));
    }

    #[test]
    fn validity_ends_exactly() {
        let key = IdentityKey::generate(&mut rand::rng());
        let file = sign(&topology(), &[&key]);
        let authorities = authorities(&[&key], 1);
        let at = |now| verify(file.as_bytes(), &authorities, UnixTime(now)).map(|t| t.epoch);
        assert_eq!(at(99), Err(TopologyError::NotYetValid { seconds: 1 }));
        assert_eq!(at(100), Ok(7));
        assert_eq!(at(199), Ok(7));
        assert_eq!(at(200), Err(TopologyError::Expired { seconds_ago: 0 }));
    }

    #[test]
    fn half_of_the_authorities_is_not_enough() {
        let keys: Vec<_> =
            (0..4).map(|_| IdentityKey::generate(&mut rand::rng()).identity()).collect();
        assert!(Authorities::new(keys.clone(), 2).is_err());
        assert!(Authorities::new(keys.clone(), 5).is_err());
        assert!(Authorities::new(keys.clone(), 3).is_ok());
        assert!(Authorities::new([], 0).is_err());
    }

    #[test]
    fn documents_that_break_a_rule_are_refused() {
        let without = |index: usize| {
            let mut nodes = nodes();
            nodes.remove(index);
            nodes
        };
        for layer in 0..LAYERS {
            assert_eq!(
                topology_of(without(layer), vec![]),
                Err(DocumentError::EmptyLayer(layer + 1))
            );
        }
        assert_eq!(topology_of(nodes()[..3].to_vec(), vec![]), Err(DocumentError::NoGateway));
        let mut twice = nodes();
        twice.push(twice[0].clone());
        assert!(matches!(topology_of(twice, vec![]), Err(DocumentError::Duplicate(_))));
        let mut fourth = nodes();
        fourth.push(node(Role::Mix { layer: 4 }));
        assert!(matches!(topology_of(fourth, vec![]), Err(DocumentError::Node { .. })));
        let provider = topology().providers()[0].clone();
        assert!(matches!(
            topology_of(nodes(), vec![provider]),
            Err(DocumentError::UnknownGateway(_))
        ));
    }

    #[test]
    fn packets_go_only_to_the_neighbouring_layer() {
        let topology = topology();
        let ids: Vec<_> = topology.nodes().iter().map(|node| node.identity).collect();
        // Rows and columns: mixes of layer 1 to 3, two gateways.
        let allowed = [(3, 0), (4, 0), (0, 1), (1, 2), (2, 3), (2, 4)];
        for from in 0..5 {
            for to in 0..5 {
                assert_eq!(
                    topology.may_forward(&ids[from], &ids[to]),
                    allowed.contains(&(from, to)),
                    "{from} to {to}"
                );
            }
        }
    }
}
