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
///   one.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{EPOCH_SECONDS, Person, authority_key, rules, sorted};
    use super::super::{DESCRIPTOR_EPOCHS, Minimum};
    use super::*;
    use crate::keys::IdentityKey;
    use crate::topology::sign;

    const EPOCH: u64 = 1000;

    /// Two of three authorities sign and endorse.
    struct Fixture {
        rules: Rules,
        keys: [IdentityKey; 2],
    }

    impl Fixture {
        fn new() -> Self {
            Self { rules: rules(3, 2), keys: [authority_key(0), authority_key(1)] }
        }

        fn candidate(&self, person: Person, epoch: u64) -> Candidate {
            let [first, second] = &self.keys;
            person.candidate(epoch * EPOCH_SECONDS - 10, &[first, second])
        }

        fn candidates(&self, people: &[Person], epoch: u64) -> Vec<Candidate> {
            sorted(people.iter().map(|person| self.candidate(*person, epoch)).collect())
        }

        fn make(
            &self,
            previous: Option<&SignedTopology>,
            candidates: &[Candidate],
            epoch: u64,
        ) -> Result<SignedTopology, AssemblyError> {
            let topology = assemble(&self.rules, previous, candidates, epoch)?;
            let file = sign(&topology, &[&self.keys[0], &self.keys[1]]);
            Ok(SignedTopology::read(file.as_bytes(), self.rules.authorities()).unwrap())
        }

        fn check(
            &self,
            previous: Option<&SignedTopology>,
            body: &DocumentBody,
            candidates: &[Candidate],
        ) -> Result<(), CheckError> {
            check(&self.rules, previous, EPOCH, body, candidates, &BTreeMap::new())
        }
    }

    fn people() -> Vec<Person> {
        let mut people: Vec<_> = (1..=4).map(Person::mix).collect();
        people.extend([Person::gateway(11), Person::gateway(12), Person::provider(21, 11)]);
        people
    }

    fn layer(document: &SignedTopology, person: Person) -> Option<u8> {
        match document.topology().node(&person.key().identity())?.role {
            Role::Mix { layer } => Some(layer),
            Role::Gateway { .. } => panic!("it is a gateway"),
        }
    }

    fn waits(document: &SignedTopology, person: Person) -> bool {
        document.topology().waiting().contains(&person.key().identity())
    }

    #[test]
    fn the_first_document_needs_the_minimum_and_places_at_once() {
        let fixture = Fixture::new();
        let Minimum { mixes, gateways, providers } = fixture.rules.minimum();
        let first = fixture.make(None, &fixture.candidates(&people(), EPOCH), EPOCH).unwrap();
        assert_eq!(first.topology().nodes().len(), 6);
        assert_eq!(first.topology().waiting(), []);
        assert_eq!(first.topology().providers().len(), 1);
        for (what, left_out, needed) in [
            ("mixes", vec![0, 1], mixes),
            ("gateways", vec![5], gateways),
            ("providers", vec![6], providers),
        ] {
            let mut few = people();
            for at in left_out.into_iter().rev() {
                few.remove(at);
            }
            let error = fixture.make(None, &fixture.candidates(&few, EPOCH), EPOCH).unwrap_err();
            assert_eq!(error, AssemblyError::TooFew { what, count: needed - 1, needed });
        }
    }

    #[test]
    fn a_new_mix_waits_for_one_document_and_stays_where_it_was_put() {
        let fixture = Fixture::new();
        let newcomer = Person::mix(9);
        let mut all = people();
        let first = fixture.make(None, &fixture.candidates(&all, EPOCH), EPOCH).unwrap();
        all.push(newcomer);
        let second =
            fixture.make(Some(&first), &fixture.candidates(&all, EPOCH + 1), EPOCH + 1).unwrap();
        assert!(waits(&second, newcomer) && layer(&second, newcomer).is_none());
        // Two epochs on: one may have failed.
        let third =
            fixture.make(Some(&second), &fixture.candidates(&all, EPOCH + 3), EPOCH + 3).unwrap();
        assert!(!waits(&third, newcomer));
        for person in people().into_iter().take(4) {
            assert_eq!(layer(&third, person), layer(&first, person));
        }
        let place = layer(&third, newcomer);
        assert!(place.is_some());
        let fourth =
            fixture.make(Some(&third), &fixture.candidates(&all, EPOCH + 4), EPOCH + 4).unwrap();
        assert_eq!(layer(&fourth, newcomer), place);
        // Who was gone for a document waits again.
        let fifth =
            fixture.make(Some(&fourth), &fixture.candidates(&people(), EPOCH + 5), EPOCH + 5);
        let fifth = fifth.unwrap();
        let sixth =
            fixture.make(Some(&fifth), &fixture.candidates(&all, EPOCH + 6), EPOCH + 6).unwrap();
        assert!(waits(&sixth, newcomer));
    }

    #[test]
    fn newcomers_are_placed_at_once_when_a_layer_would_be_empty() {
        let fixture = Fixture::new();
        let mut all = people();
        let first = fixture.make(None, &fixture.candidates(&all, EPOCH), EPOCH).unwrap();
        all.drain(..2);
        all.push(Person::mix(9));
        let second =
            fixture.make(Some(&first), &fixture.candidates(&all, EPOCH + 1), EPOCH + 1).unwrap();
        assert!(layer(&second, Person::mix(9)).is_some());
        all.pop();
        let error = fixture.make(Some(&first), &fixture.candidates(&all, EPOCH + 1), EPOCH + 1);
        assert!(matches!(error, Err(AssemblyError::Document(DocumentError::EmptyLayer(_)))));
    }

    #[test]
    fn members_leave_with_their_keys_their_gateway_or_their_descriptor() {
        let fixture = Fixture::new();
        let all = people();
        let first = fixture.make(None, &fixture.candidates(&all, EPOCH), EPOCH).unwrap();
        // Keys of three key epochs were published, the last of which ends after nine epochs at most.
        let late = EPOCH + 9;
        let mut candidates = fixture.candidates(&all, late);
        let position = |candidates: &[Candidate], person: Person| {
            let identity = person.key().identity();
            candidates.iter().position(|c| c.descriptor.identity() == identity).unwrap()
        };
        let stale = position(&candidates, all[0]);
        candidates[stale] = fixture.candidate(all[0], EPOCH);
        let second = fixture.make(Some(&first), &candidates, late).unwrap();
        assert_eq!(layer(&second, all[0]), None);
        let gateway = position(&candidates, Person::gateway(11));
        candidates.remove(gateway);
        let third = fixture.make(Some(&first), &candidates, late).unwrap();
        assert_eq!(third.topology().providers(), []);
    }

    #[test]
    fn the_keys_are_those_of_the_documents_key_epoch() {
        let fixture = Fixture::new();
        // Published in key epoch 333, for a document of 333 and one of 334.
        for epoch in [1001, 1002] {
            let candidates = fixture.candidates(&people(), 1001);
            let document = fixture.make(None, &candidates, epoch).unwrap();
            let node = document.topology().node(&Person::mix(1).key().identity()).unwrap();
            let key_epoch = epoch / 3;
            assert_eq!(node.sphinx_key, Person::mix(1).sphinx_key(key_epoch));
            assert_eq!(node.next_sphinx_key, Some(Person::mix(1).sphinx_key(key_epoch + 1)));
        }
        let range = fixture.rules.validity(1000);
        assert_eq!(range, UnixTime(1000 * EPOCH_SECONDS - 120)..UnixTime(1004 * EPOCH_SECONDS));
        // Never longer than there are keys: up to the end of key epoch 334.
        assert_eq!(fixture.rules.validity(1001).end, UnixTime(1005 * EPOCH_SECONDS));
        assert_eq!(fixture.rules.validity(1000).end, UnixTime(1004 * EPOCH_SECONDS));
    }

    #[test]
    fn what_one_member_has_nobody_takes_from_it() {
        let fixture = Fixture::new();
        let [key, other] = &fixture.keys;
        let all = people();
        let first = fixture.make(None, &fixture.candidates(&all, EPOCH), EPOCH).unwrap();
        let published = (EPOCH + 1) * EPOCH_SECONDS - 10;
        let honest = fixture.candidates(&all, EPOCH + 1);
        type Theft = fn(&mut Hop, &Hop);
        let thefts: [Theft; 2] = [
            |thief, victim| thief.link_address = victim.link_address,
            |thief, victim| thief.keys.clone_from(&victim.keys),
        ];
        for steal in thefts {
            // Many thieves, so that by rank some would come first.
            for number in 30..40 {
                let thief = Person::mix(number);
                let mut descriptor = thief.descriptor(published);
                let Member::Mix(victim) = all[0].descriptor(published).member else {
                    panic!("a mix")
                };
                let Member::Mix(hop) = &mut descriptor.member else { panic!("a mix") };
                steal(hop, &victim);
                let signed = descriptor.sign(&thief.key()).unwrap();
                let mut candidates = honest.clone();
                candidates.push(super::super::testing::endorsed(signed, &[key, other]));
                let candidates = sorted(candidates);
                let second = fixture.make(Some(&first), &candidates, EPOCH + 1).unwrap();
                assert!(layer(&second, all[0]).is_some());
                assert!(!waits(&second, thief));
            }
        }
        let thief = Person::provider(22, 11);
        let mut descriptor = thief.descriptor(published);
        let Member::Provider(provider) = &mut descriptor.member else { panic!("a provider") };
        provider.name = "exit-21".to_owned();
        let signed = descriptor.sign(&thief.key()).unwrap();
        let mut candidates = honest;
        candidates.push(super::super::testing::endorsed(signed, &[key, other]));
        let second = fixture.make(Some(&first), &sorted(candidates), EPOCH + 1).unwrap();
        let owners: Vec<_> =
            second.topology().providers().iter().map(|p| p.address.identity).collect();
        assert_eq!(owners, [Person::provider(21, 11).key().identity()]);
    }

    #[test]
    fn candidates_are_used_within_their_time_and_with_enough_endorsements() {
        let fixture = Fixture::new();
        let [key, other] = &fixture.keys;
        let begin = EPOCH * EPOCH_SECONDS;
        let at = |published: u64| Person::mix(1).candidate(published, &[key, other]);
        let check = |candidate: &Candidate| candidate.check(&fixture.rules, EPOCH);
        let oldest = begin - DESCRIPTOR_EPOCHS * EPOCH_SECONDS;
        assert_eq!(check(&at(oldest)), Ok(()));
        let old = Err(CandidateError::Descriptor(DescriptorError::Old { seconds: 9601 }));
        assert_eq!(check(&at(oldest - 1)), old);
        assert_eq!(check(&at(begin + EPOCH_SECONDS)), Ok(()));
        let future = Err(CandidateError::Descriptor(DescriptorError::Future { seconds: 1 }));
        assert_eq!(check(&at(begin + EPOCH_SECONDS + 1)), future);

        let not_admitted = |valid| Err(CandidateError::NotAdmitted { valid, needed: 2 });
        let stranger = authority_key(9);
        let by = |keys: &[&IdentityKey]| check(&Person::mix(1).candidate(begin, keys));
        assert_eq!(by(&[key]), not_admitted(1));
        assert_eq!(by(&[key, &stranger]), not_admitted(1));
        let mut twice = Person::mix(1).candidate(begin, &[key]);
        twice.endorsements.push(twice.endorsements[0]);
        assert_eq!(check(&twice), not_admitted(1));
        let descriptor = Person::mix(1).descriptor(begin);
        let mut expired = at(begin);
        let last = [EPOCH, EPOCH - 1].map(|until| Endorsement::new(key, &descriptor, until));
        let position = expired.endorsements.iter().position(|e| e.authority == key.identity());
        expired.endorsements[position.unwrap()] = last[0];
        assert_eq!(check(&expired), Ok(()));
        expired.endorsements[position.unwrap()] = last[1];
        assert_eq!(check(&expired), not_admitted(1));
    }

    #[test]
    fn a_proposal_that_differs_anywhere_is_refused() {
        let fixture = Fixture::new();
        let candidates = fixture.candidates(&people(), EPOCH);
        let body = assemble(&fixture.rules, None, &candidates, EPOCH).unwrap().body();
        assert_eq!(fixture.check(None, &body, &candidates), Ok(()));
        for (from, to) in [
            ("layer = 1", "layer = 2"),
            ("mean_delay_us = 15000", "mean_delay_us = 15001"),
            ("epoch = 1000", "epoch = 1001"),
            ("exit-21", "exit-22"),
        ] {
            let changed = body.as_str().replacen(from, to, 1);
            assert_ne!(changed, body.as_str());
            let changed = DocumentBody::from_text(changed);
            assert_eq!(fixture.check(None, &changed, &candidates), Err(CheckError::Differs));
        }
        let mut unsorted = candidates.clone();
        unsorted.swap(0, 1);
        assert_eq!(fixture.check(None, &body, &unsorted), Err(CheckError::Order));
        let mut double = candidates.clone();
        double.insert(0, candidates[0].clone());
        assert_eq!(fixture.check(None, &body, &double), Err(CheckError::Order));
        let mut unendorsed = candidates;
        unendorsed[3].endorsements.pop();
        let result = fixture.check(None, &body, &unendorsed);
        assert!(matches!(result, Err(CheckError::Candidate { .. })), "{result:?}");
    }

    #[test]
    fn an_expected_member_must_be_there_with_a_descriptor_as_new() {
        let fixture = Fixture::new();
        let candidates = fixture.candidates(&people(), EPOCH);
        let body = assemble(&fixture.rules, None, &candidates, EPOCH).unwrap().body();
        let check = |identity, published| {
            let expected = BTreeMap::from([(identity, UnixTime(published))]);
            check(&fixture.rules, None, EPOCH, &body, &candidates, &expected)
        };
        let (mix, published) = (people()[0].key().identity(), EPOCH * EPOCH_SECONDS - 10);
        assert_eq!(check(mix, published), Ok(()));
        assert_eq!(check(mix, published + 1), Err(CheckError::Omitted(mix)));
        let nobody = Person::mix(9).key().identity();
        assert_eq!(check(nobody, 0), Err(CheckError::Omitted(nobody)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// Over several epochs in which members come and go: what is assembled passes the check, of
        /// the order of descriptors nothing depends, layers are balanced, and mixes move only when
        /// that is needed for it.
        #[test]
        fn assembled_documents_pass_the_check(
            present in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 9), 4),
        ) {
            let fixture = Fixture::new();
            let mut previous: Option<SignedTopology> = None;
            for (epoch, present) in (EPOCH..).zip(present) {
                let mut some = people();
                some.extend((30..39).zip(present).filter(|(_, here)| *here).map(|(n, _)| Person::mix(n)));
                let candidates = fixture.candidates(&some, epoch);
                let document = fixture.make(previous.as_ref(), &candidates, epoch).unwrap();
                let body = document.topology().body();
                let checked = check(
                    &fixture.rules, previous.as_ref(), epoch, &body, &candidates, &BTreeMap::new(),
                );
                prop_assert_eq!(checked, Ok(()));
                let sizes = [1, 2, 3].map(|layer| document.topology().mixes(layer).count());
                prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
                let here = |person: &Person| layer(&document, *person).is_some() || waits(&document, *person);
                let mixes = some.iter().filter(|p| p.kind() == super::super::MemberKind::Mix);
                prop_assert!(mixes.clone().all(here));
                previous = Some(document);
            }
        }
    }
}
