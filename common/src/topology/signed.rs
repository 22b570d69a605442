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
//! A signature is made over `"mixsocks topology v1\0"` followed by every byte after the empty line.

use std::collections::BTreeSet;
use std::fmt;

use sha2::{Digest, Sha256};

use super::{DocumentError, Topology, UnixTime};
use crate::keys::{Identity, IdentityKey, KeyError, Signature};
use crate::signed_text::{Kind, SignedTextError};

/// Longest topology file in bytes: a network of [`super::MAX_NODES`] nodes fits.
pub const MAX_DOCUMENT_BYTES: usize = 8 * 1024 * 1024;

const KIND: Kind = Kind {
    first_line: "mixsocks-topology 1",
    context: b"mixsocks topology v1\0",
    max_bytes: MAX_DOCUMENT_BYTES,
    // Nobody has more authorities.
    max_signatures: 64,
    too_long: "it is larger than 8 MiB",
    other_first_line: "its first line is not \"mixsocks-topology 1\"",
    too_many_signatures: "it has more than 64 signatures",
};

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
    #[error("this is not a topology file: {0}; get the one that the network's operators publish")]
    NotATopology(&'static str),
    /// A key or signature in the first lines does not read.
    #[error("a signature line is damaged: {0}; get the file once more")]
    SignatureLine(#[from] KeyError),
    /// A pinned authority's signature is there, but does not fit the contents.
    #[error("the file was changed after {authority} signed it; get it once more")]
    Changed {
        /// The authority.
        authority: Identity,
    },
    /// No pinned authority has signed, rightly or wrongly.
    #[error(
        "others than the given authority signed it: it belongs to another network, or the authority's key is not the right one"
    )]
    OtherAuthorities,
    /// Some pinned authorities have signed, but too few.
    #[error("{valid} of {needed} needed authorities signed it; get one that more of them signed")]
    TooFewSignatures {
        /// Signatures of pinned authorities.
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

    /// The pinned keys, in ascending order.
    pub fn keys(&self) -> impl Iterator<Item = &Identity> {
        self.keys.iter()
    }

    /// Whether this is one of the pinned keys.
    pub fn contains(&self, identity: &Identity) -> bool {
        self.keys.contains(identity)
    }

    /// How many keys there are.
    pub fn count(&self) -> usize {
        self.keys.len()
    }

    /// How many of them must have signed.
    pub fn threshold(&self) -> usize {
        self.threshold
    }
}

/// SHA-256 of the bytes that a document's signatures cover.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentDigest([u8; Self::LEN]);

impl DocumentDigest {
    /// Bytes of a digest.
    pub const LEN: usize = 32;

    /// Takes the 32 bytes of a digest.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for DocumentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DocumentDigest({})", bs58::encode(self.0).into_string())
    }
}

/// The text of a document, without signatures; whether it keeps the rules is another matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentBody(String);

impl DocumentBody {
    /// Takes a text.
    pub fn from_text(text: String) -> Self {
        Self(text)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What names the document.
    pub fn digest(&self) -> DocumentDigest {
        DocumentDigest(Sha256::digest(KIND.signed_bytes(&self.0)).into())
    }

    /// Signs it.
    pub fn sign(&self, key: &IdentityKey) -> Signature {
        KIND.sign(&self.0, key)
    }

    /// Whether `authority` has signed it.
    pub fn is_signed_by(&self, authority: &Identity, signature: &Signature) -> bool {
        authority.verify(&KIND.signed_bytes(&self.0), signature).is_ok()
    }

    /// The file: signatures and text.
    pub fn to_file(&self, signatures: &[(Identity, Signature)]) -> String {
        KIND.write(&self.0, signatures)
    }
}

impl Topology {
    /// The text of the document: the same for equal topologies.
    pub fn body(&self) -> DocumentBody {
        DocumentBody(self.to_toml())
    }
}

/// A topology that enough authorities have signed, with its file. It need not be in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedTopology {
    topology: Topology,
    file: String,
    digest: DocumentDigest,
    signers: BTreeSet<Identity>,
}

impl SignedTopology {
    /// Reads a file and checks its signatures and its contents, but not the time.
    ///
    /// Nothing of the contents is looked at before the signatures are right.
    ///
    /// # Errors
    /// [`TopologyError`], but neither `Expired` nor `NotYetValid`.
    pub fn read(file: &[u8], authorities: &Authorities) -> Result<Self, TopologyError> {
        let text = KIND.parse(file)?;
        let message = KIND.signed_bytes(text.body);
        let mut signers = BTreeSet::new();
        let mut changed = None;
        for (authority, signature) in &text.signatures {
            if authorities.keys.contains(authority) {
                match authority.verify(&message, signature) {
                    Ok(()) => {
                        signers.insert(*authority);
                    }
                    Err(_) => changed = changed.or(Some(*authority)),
                }
            }
        }
        if signers.len() < authorities.threshold {
            return Err(match (changed, signers.len()) {
                (Some(authority), _) => TopologyError::Changed { authority },
                (None, 0) => TopologyError::OtherAuthorities,
                (None, valid) => {
                    TopologyError::TooFewSignatures { valid, needed: authorities.threshold }
                }
            });
        }
        let topology = Topology::from_toml(text.body, text.body_line)?;
        let file = KIND.write(text.body, &text.signatures);
        let digest = DocumentDigest(Sha256::digest(&message).into());
        Ok(Self { topology, file, digest, signers })
    }

    /// What it says.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// What it says, without its file.
    pub fn into_topology(self) -> Topology {
        self.topology
    }

    /// The file, for storage and for others.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// What names the document, whoever signed it.
    pub fn digest(&self) -> DocumentDigest {
        self.digest
    }

    /// The pinned authorities that signed it.
    pub fn signers(&self) -> &BTreeSet<Identity> {
        &self.signers
    }

    /// Checks that it is in force.
    ///
    /// # Errors
    /// [`TopologyError::NotYetValid`], [`TopologyError::Expired`].
    pub fn check_time(&self, now: UnixTime) -> Result<(), TopologyError> {
        let Topology { valid_from, valid_until, .. } = self.topology;
        if now < valid_from {
            return Err(TopologyError::NotYetValid { seconds: valid_from.0 - now.0 });
        }
        if now >= valid_until {
            return Err(TopologyError::Expired { seconds_ago: now.0 - valid_until.0 });
        }
        Ok(())
    }
}

impl From<SignedTextError> for TopologyError {
    fn from(error: SignedTextError) -> Self {
        match error {
            SignedTextError::Form(what) => Self::NotATopology(what),
            SignedTextError::Key(error) => Self::SignatureLine(error),
        }
    }
}

/// Writes the file of a topology, signed with each of `keys`.
pub fn sign(topology: &Topology, keys: &[&IdentityKey]) -> String {
    let body = topology.body();
    let signatures: Vec<_> = keys.iter().map(|key| (key.identity(), body.sign(key))).collect();
    body.to_file(&signatures)
}

/// Reads a file, checks its signatures, its contents and that it is in force at `now`.
///
/// # Errors
/// [`TopologyError`] says what to do about it.
pub fn verify(
    file: &[u8],
    authorities: &Authorities,
    now: UnixTime,
) -> Result<Topology, TopologyError> {
    let signed = SignedTopology::read(file, authorities)?;
    signed.check_time(now)?;
    Ok(signed.into_topology())
}

#[cfg(test)]
mod tests {
    use super::super::{
        Epochs, LAYERS, MAX_NODES, MAX_PROVIDERS, NetworkName, Node, Parameters, Provider, Role,
    };
    use super::*;
    use crate::address::Address;
    use mixsocks_sphinx::SecretKey;
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
    use std::time::Duration;

    fn node(role: Role) -> Node {
        static PORTS: AtomicU16 = AtomicU16::new(9000);
        let mut rng = rand::rng();
        Node {
            identity: IdentityKey::generate(&mut rng).identity(),
            sphinx_key: SecretKey::generate(&mut rng).public_key().into(),
            next_sphinx_key: None,
            link_address: SocketAddr::from(([127, 0, 0, 1], PORTS.fetch_add(1, Relaxed))),
            role,
        }
    }

    fn nodes() -> Vec<Node> {
        let client_address = "127.0.0.1:9".parse().unwrap();
        let mut nodes: Vec<_> = (1..=3).map(|layer| node(Role::Mix { layer })).collect();
        nodes.extend((0..2).map(|_| node(Role::Gateway { client_address })));
        nodes
    }

    fn topology_of(nodes: Vec<Node>, providers: Vec<Provider>) -> Result<Topology, DocumentError> {
        let parameters = Parameters {
            payload_bytes: 2048,
            mean_delay: Duration::from_millis(15),
            max_delay: Duration::from_secs(10),
            epochs: Epochs { epoch_seconds: 100, key_epochs: 4, overlap_seconds: 200 },
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
            requires_token: true,
        };
        let newcomer = IdentityKey::generate(&mut rand::rng()).identity();
        topology_of(nodes, vec![provider]).unwrap().with_waiting(vec![newcomer]).unwrap()
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
        let too_few = Err(TopologyError::TooFewSignatures { valid: 1, needed: 2 });
        assert_eq!(check(&[&keys[0], &keys[0]]), too_few);
        assert_eq!(check(&[&keys[0], &stranger]), too_few);
        assert_eq!(check(&[]), Err(TopologyError::OtherAuthorities));
        assert_eq!(check(&[&stranger]), Err(TopologyError::OtherAuthorities));
        assert_eq!(check(&[&stranger, &keys[2], &keys[0]]), Ok(()));
    }

    #[test]
    fn a_changed_file_is_told_from_one_of_strangers() {
        let keys: Vec<_> = (0..2).map(|_| IdentityKey::generate(&mut rand::rng())).collect();
        let file = sign(&topology(), &[&keys[0]]).replace("epoch = 7", "epoch = 8");
        let check = |pinned| verify(file.as_bytes(), &authorities(&[pinned], 1), UnixTime(150));
        let authority = keys[0].identity();
        assert_eq!(check(&keys[0]), Err(TopologyError::Changed { authority }));
        assert_eq!(check(&keys[1]), Err(TopologyError::OtherAuthorities));
        let errors = [check(&keys[0]), check(&keys[1])].map(|result| result.unwrap_err());
        assert!(errors[0].to_string().contains("was changed"));
        assert!(errors[1].to_string().contains("another network"));
    }

    /// Signs any text, and reads it.
    fn read_signed(body: &str) -> Result<Topology, TopologyError> {
        let key = IdentityKey::generate(&mut rand::rng());
        let file = KIND.write(body, &[(key.identity(), KIND.sign(body, &key))]);
        verify(file.as_bytes(), &authorities(&[&key], 1), UnixTime(150))
    }

    #[test]
    fn signed_texts_that_break_a_rule_are_refused_in_one_line() {
        let good = topology().to_toml();
        assert!(read_signed(&good).is_ok());
        let mix = "role = \"mix\"\n";
        let client_address = "client_address = \"127.0.0.1:9\"\n";
        for (from, to, words) in [
            (
                "epoch = 7",
                "epoch = 7\ncolour = \"red\"",
                &["line 6 ", "unknown field `colour`"][..],
            ),
            ("payload_bytes", "payload_bits", &["unknown field `payload_bits`"]),
            (mix, "role = \"mixer\"\n", &["unknown variant `mixer`"]),
            (mix, &format!("{mix}{client_address}"), &["a mix has no client_address"]),
            ("layer = 1\n", "", &["a mix needs a layer"]),
            ("layer = 1\n", "layer = 0\n", &["its layer must be 1, 2 or 3"]),
            (client_address, "", &["a gateway needs a client_address"]),
            (client_address, &format!("layer = 1\n{client_address}"), &["a gateway has no layer"]),
            ("epoch = 7", "epoch = -7", &["line 5 ", "integer"]),
            ("epoch = 7", "epoch = ", &["line 5 "]),
            ("network = \"test\"", "", &["missing field `network`"]),
            ("\"test\"", "\"Test\"", &["the network name \"Test\""]),
            ("\"test\"", "\"\"", &["the network name \"\""]),
            ("\"test\"", &format!("\"{}\"", "a".repeat(65)), &["1 to 64"]),
            ("payload_bytes = 2048", "payload_bytes = 1023", &["is 1023", "1024 to 32768"]),
            ("payload_bytes = 2048", "payload_bytes = 32769", &["is 32769", "1024 to 32768"]),
            ("max_delay_us = 10000000", "max_delay_us = 60000001", &["at most 60000000"]),
            ("mean_delay_us = 15000", "mean_delay_us = 10000001", &["at most max_delay_us"]),
            ("epoch_seconds = 100", "epoch_seconds = 0", &["is 0", "1 to 4294967295"]),
            ("key_epochs = 4", "key_epochs = 4294967296", &["is 4294967296", "1 to 4294967295"]),
            ("overlap_seconds = 200", "overlap_seconds = 201", &["at most half a key epoch"]),
            ("requires_token = true", "requires_token = 1", &["boolean"]),
            ("waiting = [", "waiting = [3, ", &["string"]),
        ] {
            let changed = good.replacen(from, to, 1);
            assert_ne!(changed, good, "{from}");
            let error = read_signed(&changed).unwrap_err();
            assert!(matches!(error, TopologyError::Document(_)), "{error}");
            let line = error.to_string();
            assert_eq!(line.lines().count(), 1, "{line}");
            for word in words {
                assert!(line.contains(word), "{word}: {line}");
            }
        }
        for limit in ["payload_bytes = 1024", "payload_bytes = 32768"] {
            assert!(read_signed(&good.replace("payload_bytes = 2048", limit)).is_ok(), "{limit}");
        }
        let longest = good.replace("max_delay_us = 10000000", "max_delay_us = 60000000");
        assert!(read_signed(&longest).is_ok());
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
    fn nothing_of_a_node_or_provider_appears_twice() {
        let refused = |nodes: Vec<Node>, providers: Vec<Provider>, word: &str| {
            let Err(DocumentError::Duplicate(what)) = topology_of(nodes, providers) else {
                panic!("a {word} was accepted twice");
            };
            assert!(what.starts_with(word), "{word}: {what}");
        };
        // A node that is new but for one thing that it has from another role's node.
        let like = |change: fn(&mut Node, &Node)| {
            let mut nodes = nodes();
            let mut double = node(Role::Mix { layer: 2 });
            change(&mut double, &nodes[4]);
            nodes.push(double);
            nodes
        };
        refused(like(|double, node| double.identity = node.identity), vec![], "node");
        refused(like(|double, node| double.sphinx_key = node.sphinx_key), vec![], "sphinx_key");
        let next = |double: &mut Node, node: &Node| double.next_sphinx_key = Some(node.sphinx_key);
        refused(like(next), vec![], "sphinx_key");
        refused(
            like(|double, _| double.next_sphinx_key = Some(double.sphinx_key)),
            vec![],
            "sphinx_key",
        );
        refused(
            like(|double, node| double.link_address = node.link_address),
            vec![],
            "link_address",
        );
        assert!(topology_of(like(|_, _| {}), vec![]).is_ok());

        let waiting = |waiting: Vec<Identity>| topology_of(nodes(), vec![])?.with_waiting(waiting);
        let newcomer = IdentityKey::generate(&mut rand::rng()).identity();
        assert!(waiting(vec![newcomer]).is_ok());
        assert!(matches!(waiting(vec![newcomer; 2]), Err(DocumentError::Duplicate(_))));
        let placed = topology_of(nodes(), vec![]).unwrap();
        let twice = placed.nodes()[1].identity;
        assert!(matches!(placed.with_waiting(vec![twice]), Err(DocumentError::Duplicate(_))));

        let nodes = nodes();
        let provider = |name: &str, gateway: &Node| Provider {
            name: name.to_owned(),
            address: Address {
                identity: gateway.identity,
                encryption: gateway.sphinx_key,
                gateway: gateway.identity,
            },
            policy: String::new(),
            requires_token: false,
        };
        let twice = vec![provider("exit", &nodes[3]), provider("exit", &nodes[4])];
        refused(nodes.clone(), twice, "provider \"exit\"");
        let two = vec![provider("exit", &nodes[3]), provider("way out", &nodes[3])];
        assert!(topology_of(nodes, two).is_ok());
    }

    #[test]
    fn too_many_nodes_or_providers_are_refused() {
        // Counted before anything else is looked at, so that copies do.
        let too_many = |what, result: Result<Topology, DocumentError>| {
            let max = MAX_NODES;
            assert_eq!(result, Err(DocumentError::TooMany { what, count: max + 1, max }));
        };
        const _: () = assert!(MAX_NODES == MAX_PROVIDERS);
        too_many("nodes", topology_of(vec![nodes()[0].clone(); MAX_NODES + 1], vec![]));
        let provider = topology().providers()[0].clone();
        too_many("providers", topology_of(nodes(), vec![provider; MAX_PROVIDERS + 1]));
    }

    #[test]
    fn senders_use_the_key_of_the_key_epoch_that_the_clock_tells() {
        let mut nodes = nodes();
        let next = SecretKey::generate(&mut rand::rng()).public_key().into();
        nodes[0].next_sphinx_key = Some(next);
        // Of epoch 7, the last of key epoch 1, which ends at 800.
        let topology = topology_of(nodes, vec![]).unwrap();
        let [first, second, ..] = topology.nodes() else { panic!("five nodes") };
        let key = |node, now| topology.sphinx_key(node, UnixTime(now));
        assert_eq!(topology.key_epoch(), 1);
        assert_eq!([0, 799].map(|now| key(first, now)), [Some(first.sphinx_key); 2]);
        assert_eq!([800, 1199].map(|now| key(first, now)), [Some(next); 2]);
        assert_eq!(key(first, 1200), None);
        assert_eq!((key(second, 799), key(second, 800)), (Some(second.sphinx_key), None));
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
