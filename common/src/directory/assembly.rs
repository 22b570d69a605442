//! Assembly: from the previous document and descriptors to the next document, the same for everybody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use sha2::{Digest, Sha256};

use super::layers::{Rank, deal, rank};
use super::{
    Descriptor, DescriptorError, Endorsement, Hop, MAX_HELD, Member, Rules, SignedDescriptor,
};
use crate::keys::{EncryptionKey, Identity};
use crate::topology::{
    DocumentBody, DocumentDigest, DocumentError, LAYERS, Node, Provider, Role, SignedTopology,
    Topology, UnixTime,
};

/// A descriptor with the endorsements that admit its maker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What it says about itself.
    pub descriptor: SignedDescriptor,
    /// Who admits it, in ascending order, each once.
    pub endorsements: Vec<Endorsement>,
}

/// Why a descriptor may not be used for a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CandidateError {
    /// The descriptor does not belong here or is too old.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// Too few authorities admit it.
    #[error("{valid} of {needed} needed authorities admit it")]
    NotAdmitted {
        /// How many do.
        valid: usize,
        /// How many must.
        needed: usize,
    },
}

/// Why there is no next document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssemblyError {
    /// The first document needs more members.
    #[error("there are {count} {what} for the first document, {needed} are needed")]
    TooFew {
        /// Mixes, gateways or providers.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there must be.
        needed: usize,
    },
    /// There is a document of this epoch or of a later one.
    #[error("the document in force is of epoch {0} already")]
    NotNewer(u64),
    /// What is left is no network.
    #[error("the members that are left are no network: {0}")]
    Document(#[from] DocumentError),
}

/// Why a proposed document is not signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// A descriptor that it uses may not be used.
    #[error("it uses the descriptor of {identity}, but {error}")]
    Candidate {
        /// Whose descriptor.
        identity: Identity,
        /// What is wrong.
        error: CandidateError,
    },
    /// The descriptors are not sorted, or one identity has two, or they are too many.
    #[error("its descriptors are not sorted by identity, or too many")]
    Order,
    /// Somebody is missing.
    #[error("it leaves out {0}, or has an older descriptor of it than it should have")]
    Omitted(Identity),
    /// Nothing can be made of what it uses.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    /// Something else was to be made of what it uses.
    #[error("it is not what the rules make of its descriptors and the previous document")]
    Differs,
}

impl Candidate {
    /// Checks that its descriptor may be used for the document of `epoch`: it belongs to the
    /// network, was published at most [`super::DESCRIPTOR_EPOCHS`] before the epoch begins and not
    /// after its end, and as many authorities admit it as must sign.
    ///
    /// # Errors
    /// [`CandidateError`].
    pub fn check(&self, rules: &Rules, epoch: u64) -> Result<(), CandidateError> {
        self.descriptor.check_place(rules.network(), rules.addresses())?;
        let epochs = &rules.parameters().epochs;
        let (begin, end) = (epochs.start(epoch).0, epochs.start(epoch.saturating_add(1)).0);
        let published = self.descriptor.descriptor().published.0;
        if published > end {
            return Err(DescriptorError::Future { seconds: published - end }.into());
        }
        if published.saturating_add(rules.descriptor_seconds()) < begin {
            return Err(DescriptorError::Old { seconds: begin - published }.into());
        }
        let descriptor = self.descriptor.descriptor();
        let valid: BTreeSet<_> = self
            .endorsements
            .iter()
            .filter(|endorsement| endorsement.until >= epoch)
            .filter(|endorsement| rules.authorities().contains(&endorsement.authority))
            .filter(|endorsement| endorsement.is_of(descriptor))
            .map(|endorsement| endorsement.authority)
            .collect();
        let (valid, needed) = (valid.len(), rules.authorities().threshold());
        if valid < needed {
            return Err(CandidateError::NotAdmitted { valid, needed });
        }
        Ok(())
    }

    fn identity(&self) -> Identity {
        self.descriptor.identity()
    }
}

/// Makes the document of `epoch` of candidates that have been checked and are sorted by identity.
///
/// The result depends on nothing but the arguments:
///
/// - A mix or gateway without a Sphinx key for the epoch is left out.
/// - A link address, Sphinx key or provider's name belongs to the one who had it in the previous
///   document, if it is still there; else, of several, to one who was in that document, and then to
///   the one with the lowest rank. The others are left out.
/// - A provider whose gateway is not in the document is left out.
/// - A mix that is not in the previous document waits. One that waited there, and is still there, is
///   placed now, by a rank whose seed is the digest of that document. Only if fewer than three mixes
///   could be placed, those that are new are placed at once.
/// - Mixes keep their layers; only as many move as must for the layers' sizes to differ by at most
///   one ([`deal`]).
/// - The first document, which has no previous one, needs the minimum of members, and places all
///   mixes; its seed is the SHA-256 of all descriptors.
///
/// # Errors
/// [`AssemblyError`].
pub fn assemble(
    rules: &Rules,
    previous: Option<&SignedTopology>,
    candidates: &[Candidate],
    epoch: u64,
) -> Result<Topology, AssemblyError> {
    let before = previous.map(SignedTopology::topology);
    if let Some(latest) = before.map(|topology| topology.epoch).filter(|latest| *latest >= epoch) {
        return Err(AssemblyError::NotNewer(latest));
    }
    let seed = previous.map_or_else(|| first_seed(candidates), SignedTopology::digest);
    let members = Members::choose(rules, before, candidates, epoch, &seed);
    if before.is_none() {
        members.check_minimum(rules)?;
    }
    let (layers, waiting) = place(before, &members.mixes, &seed);
    let mut mixes = Vec::new();
    for (mix, hop) in &members.mixes {
        if let Some(layer) = layers.get(mix) {
            mixes.push(hop.node(*mix, Role::Mix { layer: *layer }));
        }
    }
    mixes.sort_by_key(|node| (layers[&node.identity], node.identity));
    let gateways = members.gateways.iter().map(|(gateway, (hop, client_address))| {
        hop.node(*gateway, Role::Gateway { client_address: *client_address })
    });
    let nodes = mixes.into_iter().chain(gateways).collect();
    let mut providers: Vec<_> = members.providers.values().map(|p| (*p).clone()).collect();
    providers.sort_by(|a, b| a.name.cmp(&b.name));
    let (network, parameters) = (rules.network().clone(), *rules.parameters());
    let validity = rules.validity(epoch);
    let topology = Topology::new(network, epoch, validity, parameters, nodes, providers)?;
    Ok(topology.with_waiting(waiting)?)
}

/// Checks a proposed document: every descriptor that it uses, that it is exactly what [`assemble`]
/// makes of them, and that nobody is missing of whom the checking authority has held a descriptor
/// for long enough (`expected`, with the time at which it was published: an equal or newer one is
/// right).
///
/// # Errors
/// [`CheckError`].
pub fn check(
    rules: &Rules,
    previous: Option<&SignedTopology>,
    epoch: u64,
    body: &DocumentBody,
    candidates: &[Candidate],
    expected: &BTreeMap<Identity, UnixTime>,
) -> Result<(), CheckError> {
    let sorted = candidates.windows(2).all(|pair| pair[0].identity() < pair[1].identity());
    if !sorted || candidates.len() > MAX_HELD {
        return Err(CheckError::Order);
    }
    for (identity, published) in expected {
        let found = candidates.binary_search_by_key(identity, Candidate::identity);
        let up_to_date =
            found.is_ok_and(|at| candidates[at].descriptor.descriptor().published >= *published);
        if !up_to_date {
            return Err(CheckError::Omitted(*identity));
        }
    }
    for candidate in candidates {
        candidate.check(rules, epoch).map_err(|error| {
            let identity = candidate.identity();
            CheckError::Candidate { identity, error }
        })?;
    }
    if assemble(rules, previous, candidates, epoch)?.body() != *body {
        return Err(CheckError::Differs);
    }
    Ok(())
}

fn first_seed(candidates: &[Candidate]) -> DocumentDigest {
    let mut hasher = Sha256::new();
    for candidate in candidates {
        hasher.update(Sha256::digest(candidate.descriptor.text()));
    }
    DocumentDigest::from_bytes(hasher.finalize().into())
}

/// Layers of those that are placed, and those that wait.
fn place(
    before: Option<&Topology>,
    mixes: &BTreeMap<Identity, HopNow>,
    seed: &DocumentDigest,
) -> (BTreeMap<Identity, u8>, Vec<Identity>) {
    let layers: BTreeMap<_, _> = before
        .iter()
        .flat_map(|topology| topology.nodes())
        .filter_map(|node| match node.role {
            Role::Mix { layer } => Some((node.identity, layer)),
            Role::Gateway { .. } => None,
        })
        .collect();
    let waited: BTreeSet<_> = before.iter().flat_map(|topology| topology.waiting()).collect();
    let mut placed = BTreeMap::new();
    let (mut arrivals, mut waiting) = (Vec::new(), Vec::new());
    for mix in mixes.keys() {
        if let Some(layer) = layers.get(mix) {
            placed.insert(*mix, *layer);
        } else if before.is_none() || waited.contains(mix) {
            arrivals.push(*mix);
        } else {
            waiting.push(*mix);
        }
    }
    if placed.len() + arrivals.len() < LAYERS {
        arrivals.append(&mut waiting);
    }
    (deal(&placed, &arrivals, seed), waiting)
}

/// What a mix or gateway is in one document.
struct HopNow {
    link_address: SocketAddr,
    sphinx_key: EncryptionKey,
    next_sphinx_key: Option<EncryptionKey>,
}

impl HopNow {
    /// `None` without a key for the epoch.
    fn new(hop: &Hop, key_epoch: u64) -> Option<Self> {
        Some(Self {
            link_address: hop.link_address,
            sphinx_key: *hop.keys.get(&key_epoch)?,
            next_sphinx_key: hop.keys.get(&(key_epoch + 1)).copied(),
        })
    }

    fn node(&self, identity: Identity, role: Role) -> Node {
        let Self { link_address, sphinx_key, next_sphinx_key } = *self;
        Node { identity, sphinx_key, next_sphinx_key, link_address, role }
    }
}

/// Who is in a document, mixes that wait included.
#[derive(Default)]
struct Members<'a> {
    mixes: BTreeMap<Identity, HopNow>,
    gateways: BTreeMap<Identity, (HopNow, SocketAddr)>,
    providers: BTreeMap<Identity, &'a Provider>,
}

impl<'a> Members<'a> {
    fn choose(
        rules: &Rules,
        before: Option<&Topology>,
        candidates: &'a [Candidate],
        epoch: u64,
        seed: &DocumentDigest,
    ) -> Self {
        let key_epoch = rules.parameters().epochs.key_epoch(epoch);
        let mut claims = Claims::new(before, candidates);
        let mut members = Self::default();
        for descriptor in claims.in_order(candidates, seed) {
            let identity = descriptor.identity;
            match &descriptor.member {
                Member::Mix(hop) => {
                    let hop = HopNow::new(hop, key_epoch).filter(|hop| claims.hop(identity, hop));
                    members.mixes.extend(hop.map(|hop| (identity, hop)));
                }
                Member::Gateway { hop, client_address } => {
                    let hop = HopNow::new(hop, key_epoch).filter(|hop| claims.hop(identity, hop));
                    members.gateways.extend(hop.map(|hop| (identity, (hop, *client_address))));
                }
                Member::Provider(provider) => {
                    if claims.take(identity, &[Claim::Name(&provider.name)]) {
                        members.providers.insert(identity, provider);
                    }
                }
            }
        }
        let gateways = &members.gateways;
        members.providers.retain(|_, provider| gateways.contains_key(&provider.address.gateway));
        members
    }

    fn check_minimum(&self, rules: &Rules) -> Result<(), AssemblyError> {
        let minimum = rules.minimum();
        for (what, count, needed) in [
            ("mixes", self.mixes.len(), minimum.mixes),
            ("gateways", self.gateways.len(), minimum.gateways),
            ("providers", self.providers.len(), minimum.providers),
        ] {
            if count < needed {
                return Err(AssemblyError::TooFew { what, count, needed });
            }
        }
        Ok(())
    }
}

/// What only one member can have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim<'a> {
    Link(SocketAddr),
    Key(EncryptionKey),
    Name(&'a str),
}

/// Who has what.
struct Claims<'a> {
    /// Who had it in the previous document and is still there.
    held: BTreeMap<Claim<'a>, Identity>,
    before: BTreeSet<Identity>,
    taken: BTreeSet<Claim<'a>>,
}

impl<'a> Claims<'a> {
    fn new(before: Option<&'a Topology>, candidates: &[Candidate]) -> Self {
        let present = |identity: &Identity| {
            candidates.binary_search_by_key(identity, Candidate::identity).is_ok()
        };
        let mut held = BTreeMap::new();
        let mut known = BTreeSet::new();
        if let Some(topology) = before {
            known.extend(topology.waiting().iter().copied());
            for node in topology.nodes().iter().filter(|node| present(&node.identity)) {
                known.insert(node.identity);
                let keys = [Some(node.sphinx_key), node.next_sphinx_key];
                let keys = keys.into_iter().flatten().map(Claim::Key);
                let claims = keys.chain([Claim::Link(node.link_address)]);
                held.extend(claims.map(|claim| (claim, node.identity)));
            }
            for provider in topology.providers() {
                let identity = provider.address.identity;
                if present(&identity) {
                    known.insert(identity);
                    held.insert(Claim::Name(&provider.name), identity);
                }
            }
        }
        Self { held, before: known, taken: BTreeSet::new() }
    }

    /// Descriptors in the order in which they may claim.
    fn in_order<'c>(
        &self,
        candidates: &'c [Candidate],
        seed: &DocumentDigest,
    ) -> Vec<&'c Descriptor> {
        let mut order: Vec<_> =
            candidates.iter().map(|candidate| candidate.descriptor.descriptor()).collect();
        order.sort_by_cached_key(|descriptor| -> (bool, Rank) {
            let identity = descriptor.identity;
            let new = !self.before.contains(&identity);
            (new, rank(seed, "claim", identity.as_bytes()))
        });
        order
    }

    fn hop(&mut self, identity: Identity, hop: &HopNow) -> bool {
        let mut claims = vec![Claim::Link(hop.link_address), Claim::Key(hop.sphinx_key)];
        claims.extend(hop.next_sphinx_key.map(Claim::Key));
        self.take(identity, &claims)
    }

    /// Gives all of `claims` to `identity`, or none.
    fn take(&mut self, identity: Identity, claims: &[Claim<'a>]) -> bool {
        let free = |claim: &Claim<'a>| {
            let holder = self.held.get(claim);
            holder.is_none_or(|holder| *holder == identity) && !self.taken.contains(claim)
        };
        let all = claims.iter().all(free);
        if all {
            self.taken.extend(claims);
        }
        all
    }
}
