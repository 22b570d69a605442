//! An authority: it admits members, and makes documents with the other authorities.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use bytes::Bytes;

use super::members::Members;
use super::message::{
    Draft, MAX_SHARED, Malformed, Message, Proposal, Reader, Sender, Status, Vote,
    encode_candidates,
};
use super::round::{Proposed, Round, bound_to, is_mandate, is_supported};
use super::{
    Admission, Admitted, AssemblyError, CLOCK_SKEW, Candidate, CheckError, DescriptorError,
    ENDORSED_EPOCHS, Endorsement, MAX_HELD, NotAdmitted, PresentedInvitation, Rules,
    SignedDescriptor, assemble, check,
};
use crate::keys::{Identity, IdentityKey};
use crate::topology::{MAX_DOCUMENT_BYTES, SignedTopology, TopologyError, UnixTime};

/// How often a running round says again where it stands: parts of an attempt.
const REPEATS: u32 = 4;
/// For so many attempts' time who has no document waits for a word of every other authority, before it
/// takes part in making one: the network may have some already.
const FIRST_WAIT: u32 = 2;
/// What signature lines add to a document.
const MAX_SIGNATURES_BYTES: usize = 4096;

/// The core of an authority.
///
/// `now` is the time since 1970 by this machine's clock. After every call, take everything out of
/// [`Authority::poll_output`], and call [`Authority::handle_timeout`] at [`Authority::poll_timeout`],
/// which may have changed. Messages may be lost, and are repeated; the same input gives the same
/// output.
pub struct Authority {
    key: IdentityKey,
    rules: Rules,
    admission: Admission,
    members: Members,
    latest: Option<SignedTopology>,
    /// No document of an earlier epoch is worked on.
    first_epoch: u64,
    round: Option<Round>,
    disk: Disk,
    peers: BTreeMap<Identity, Peer>,
    next_send: Duration,
    started: Duration,
    signed_twice: BTreeSet<(Identity, u64)>,
    problem: Option<AssemblyError>,
    outputs: VecDeque<Output>,
}

/// What an authority wants done, in this order.
#[derive(Debug)]
pub enum Output {
    /// Replace the record on the disk, and once it would survive a crash call
    /// [`Authority::persisted`]. Until then nothing is sent that depends on it.
    Persist(Vec<u8>),
    /// Bring a message to another authority, if it can be reached.
    Send {
        /// To whom.
        to: Identity,
        /// At most [`super::MAX_MESSAGE_BYTES`].
        message: Bytes,
    },
    /// Store and publish the file of a new document.
    Publish(String),
}

/// What an authority remembers of its last run.
#[derive(Debug, Clone, Copy)]
pub enum Memory<'a> {
    /// It has never run.
    New,
    /// The last record that it persisted.
    Record(&'a [u8]),
    /// It has run, but its record is gone. It may have signed documents of this and the next epoch,
    /// so it takes no part in making them.
    Lost,
}

/// Why an authority cannot start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NewAuthorityError {
    /// The key is none of the network's authorities.
    #[error("{0} is not one of the network's authorities")]
    NotAnAuthority(Identity),
    /// The stored document is damaged, or of another network.
    #[error("the stored document cannot be used: {0}")]
    Document(#[from] TopologyError),
    /// The record is damaged.
    #[error("the record is damaged; restore it, or start without it and miss two documents")]
    Record,
}

/// Why a member's upload is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The descriptor is not good.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The member is not admitted.
    #[error(transparent)]
    NotAdmitted(#[from] NotAdmitted),
    /// A newer one is there already.
    #[error("a descriptor made at {0} is there already: publish a newer one")]
    NotNewer(u64),
    /// There are [`super::MAX_HELD`] others.
    #[error("this authority holds as many descriptors as it can")]
    Full,
}

/// What a member gets for its upload.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "an invitation that was used must be on the disk before the answer leaves"]
pub struct Published {
    /// To be sent along with the next upload to every authority.
    pub endorsement: Endorsement,
    /// Whether an invitation was used.
    pub admitted: Admitted,
}

/// Why a message of another authority had no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It is none.
    #[error("the bytes are no message of an authority of this network")]
    Malformed,
    /// It is not its turn.
    #[error("{0} proposed a document when it was not its turn")]
    NotItsTurn(Identity),
    /// It does not show that it may propose this.
    #[error("{0} proposed a document without showing that it may")]
    NoMandate(Identity),
    /// The proposal breaks the rules.
    #[error("{leader} proposed a document that breaks the rules: {error}")]
    Refused {
        /// Who proposed it.
        leader: Identity,
        /// What is wrong with it.
        error: CheckError,
    },
    /// A document is not signed as it should be, or unusable.
    #[error("{from} sent a document that cannot be used: {error}")]
    Document {
        /// Who sent it.
        from: Identity,
        /// What is wrong with it.
        error: TopologyError,
    },
    /// Another document of the epoch is in force: authorities have signed two.
    #[error("there are two documents of epoch {0}: authorities have signed both")]
    TwoDocuments(u64),
    /// A document or round lies so far ahead that a clock must be wrong.
    #[error("{from} speaks of epoch {epoch}, which has not begun: set the clocks of both machines")]
    Ahead {
        /// Who sent it.
        from: Identity,
        /// The epoch.
        epoch: u64,
    },
}

/// What an operator wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorityStatus {
    /// The epoch by this machine's clock.
    pub epoch: u64,
    /// Epoch of the document in force, and until when it is; `None` without one.
    pub in_force: Option<(u64, UnixTime)>,
    /// Epoch whose document is being made, and the attempt; `None` when it is there.
    pub making: Option<(u64, u8)>,
    /// Why this authority could not assemble when it last tried.
    pub problem: Option<AssemblyError>,
    /// When each other authority was last heard, since 1970; `None` for never since the start.
    pub last_heard: Vec<(Identity, Option<Duration>)>,
    /// Who has signed two documents of an epoch, or voted for two in one attempt.
    pub signed_twice: Vec<(Identity, u64)>,
}

#[derive(Default)]
struct Peer {
    last_heard: Option<Duration>,
    /// No document is sent before: they are large, and asking for them is cheap.
    next_document: Duration,
}

/// Whether the round is as it is on the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Disk {
    Same,
    Changed,
    Writing { changed: bool },
}

impl Authority {
    /// Starts an authority with what it remembers: the document that it published last, its record,
    /// and later its members ([`Authority::restore_members`]).
    ///
    /// # Errors
    /// [`NewAuthorityError`].
    pub fn new(
        key: IdentityKey,
        rules: Rules,
        admission: Admission,
        latest: Option<&[u8]>,
        memory: Memory<'_>,
        now: Duration,
    ) -> Result<Self, NewAuthorityError> {
        let me = key.identity();
        if !rules.authorities().contains(&me) {
            return Err(NewAuthorityError::NotAnAuthority(me));
        }
        let latest = latest.map(|file| read(file, &rules)).transpose()?;
        let round = match memory {
            Memory::Record(record) => {
                let deadline = now + rules.attempt_time();
                Some(Round::restore(record, deadline).map_err(|_| NewAuthorityError::Record)?)
            }
            Memory::New | Memory::Lost => None,
        };
        let first_epoch = match memory {
            Memory::Lost => joinable(&rules, now) + 1,
            Memory::New | Memory::Record(_) => 0,
        };
        let others = rules.authorities().keys().filter(|identity| **identity != me);
        let peers = others.map(|identity| (*identity, Peer::default())).collect();
        Ok(Self {
            key,
            rules,
            admission,
            members: Members::default(),
            latest,
            first_epoch,
            round,
            disk: Disk::Same,
            peers,
            next_send: now,
            started: now,
            signed_twice: BTreeSet::new(),
            problem: None,
            outputs: VecDeque::new(),
        })
    }

    /// Who it is.
    pub fn identity(&self) -> Identity {
        self.key.identity()
    }

    /// The latest document.
    pub fn latest(&self) -> Option<&SignedTopology> {
        self.latest.as_ref()
    }

    /// Whom it admits from now on. Who is no longer admitted gets no further endorsement.
    pub fn set_admission(&mut self, admission: Admission) {
        self.admission = admission;
    }

    /// Takes the upload of a member: a descriptor, the endorsements that it has collected, and an
    /// invitation if it needs one.
    ///
    /// # Errors
    /// [`PublishError`]; then nothing has changed.
    pub fn publish(
        &mut self,
        descriptor: &[u8],
        endorsements: &[Endorsement],
        invitation: Option<&PresentedInvitation>,
        now: Duration,
    ) -> Result<Published, PublishError> {
        let descriptor = SignedDescriptor::read(descriptor)?;
        descriptor.check_place(self.rules.network(), self.rules.addresses())?;
        let seconds = UnixTime(now.as_secs());
        descriptor.check_time(seconds, self.rules.descriptor_seconds())?;
        if let Some(published) = self.members.newer_than(&descriptor) {
            return Err(PublishError::NotNewer(published.0));
        }
        let identity = descriptor.identity();
        if !self.members.has_room(&identity) {
            return Err(PublishError::Full);
        }
        let kind = descriptor.descriptor().kind();
        let admitted = self.admission.admit(&identity, kind, invitation)?;
        let until = self.rules.parameters().epochs.at(seconds) + ENDORSED_EPOCHS - 1;
        let endorsement = Endorsement::new(&self.key, descriptor.descriptor(), until);
        let offered = endorsements.iter().take(super::MAX_AUTHORITIES);
        let mut good = self.good_endorsements(&descriptor, offered);
        good.push(endorsement);
        self.members.put(descriptor, &good, &self.rules, now);
        // A network that has no document yet gets one as soon as it has enough members.
        if self.latest.is_none() {
            self.settle(now);
        }
        Ok(Published { endorsement, admitted })
    }

    /// Forgets the upload of a member: when it could not be stored who has used an invitation, which
    /// somebody else may then use.
    pub fn forget(&mut self, member: &Identity) {
        self.members.remove(member);
    }

    /// What [`Authority::restore_members`] takes: all descriptors and endorsements held. To be
    /// stored now and then, so that a restart does not make everybody upload again at once.
    pub fn members(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode_candidates(&mut bytes, &self.members.all());
        bytes
    }

    /// The texts of all descriptors held, by identity.
    pub fn descriptors(&self) -> Vec<String> {
        let all = self.members.all();
        all.iter().map(|candidate| candidate.descriptor.text().to_owned()).collect()
    }

    /// Takes back what [`Authority::members`] gave; what has become too old is left out.
    ///
    /// # Errors
    /// [`MessageError::Malformed`]: the bytes are damaged, and nothing was taken.
    pub fn restore_members(&mut self, bytes: &[u8], now: Duration) -> Result<(), MessageError> {
        let mut reader = Reader(bytes);
        let candidates = reader.candidates(MAX_HELD).map_err(|_| MessageError::Malformed)?;
        reader.end().map_err(|_| MessageError::Malformed)?;
        for Candidate { descriptor, endorsements } in candidates {
            let seconds = UnixTime(now.as_secs());
            let good = descriptor
                .check_place(self.rules.network(), self.rules.addresses())
                .and_then(|()| descriptor.check_time(seconds, self.rules.descriptor_seconds()));
            if good.is_ok() {
                let endorsements = self.good_endorsements(&descriptor, &endorsements);
                self.members.put(descriptor, &endorsements, &self.rules, now);
            }
        }
        Ok(())
    }

    /// Takes a message of another authority.
    ///
    /// # Errors
    /// [`MessageError`] says why it had no effect, for the log.
    pub fn handle_message(&mut self, bytes: &[u8], now: Duration) -> Result<(), MessageError> {
        let (from, message) =
            Message::parse(bytes, &self.rules).map_err(|Malformed| MessageError::Malformed)?;
        let result = match message {
            Message::Status(status) => self.handle_status(&status, now),
            Message::Proposal(proposal) => self.handle_proposal(from, proposal, now),
            Message::Draft(draft) => {
                self.handle_draft(draft);
                Ok(())
            }
            Message::Candidates(candidates) => {
                self.handle_candidates(candidates, now);
                Ok(())
            }
            Message::Document(file) => self.handle_document(from, file, now),
        };
        self.settle(now);
        result
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Duration) {
        let epoch = self.due_epoch(now);
        if epoch >= self.next_epoch() {
            self.begin(epoch, now);
        }
        if let Some(round) = self.round.as_mut().filter(|round| now >= round.deadline) {
            let done = self.latest.as_ref().is_some_and(|l| l.topology().epoch >= round.epoch);
            if !done && round.advance(round.attempt + 1, now + self.rules.attempt_time()) {
                self.changed();
            } else {
                round.deadline = Duration::MAX;
            }
        }
        self.settle(now);
        if now >= self.next_send {
            self.announce(now);
            self.settle(now);
        }
    }

    /// When [`Authority::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Duration {
        let begin = match self.latest {
            Some(_) => self.rules.round_start(self.next_epoch()),
            None => {
                let start = self.rules.parameters().epochs.start(self.next_epoch());
                Duration::from_secs(start.0)
            }
        };
        let deadline = self.round.as_ref().map_or(Duration::MAX, |round| round.deadline);
        begin.min(deadline).min(self.next_send)
    }

    /// The record of the last [`Output::Persist`] is on the disk.
    pub fn persisted(&mut self, now: Duration) {
        self.disk = match self.disk {
            Disk::Writing { changed: true } => Disk::Changed,
            Disk::Writing { changed: false } | Disk::Same => Disk::Same,
            Disk::Changed => Disk::Changed,
        };
        if self.disk == Disk::Same {
            self.announce(now);
        }
        self.settle(now);
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What an operator wants to know.
    pub fn status(&self, now: Duration) -> AuthorityStatus {
        let seconds = UnixTime(now.as_secs());
        let in_force = self.latest.as_ref().filter(|latest| latest.check_time(seconds).is_ok());
        let making = self.round.as_ref().filter(|round| !self.has_document_of(round.epoch));
        AuthorityStatus {
            epoch: self.rules.parameters().epochs.at(seconds),
            in_force: in_force
                .map(|latest| (latest.topology().epoch, latest.topology().valid_until)),
            making: making.map(|round| (round.epoch, round.attempt)),
            problem: self.problem.clone(),
            last_heard: self.peers.iter().map(|(id, peer)| (*id, peer.last_heard)).collect(),
            signed_twice: self.signed_twice.iter().copied().collect(),
        }
    }

    fn sender(&self) -> Sender<'_> {
        Sender { key: &self.key, network: self.rules.network() }
    }

    fn send(&mut self, to: Identity, message: Bytes) {
        self.outputs.push_back(Output::Send { to, message });
    }

    /// Those of `endorsements` that authorities of this network gave for this descriptor.
    fn good_endorsements<'a>(
        &self,
        descriptor: &SignedDescriptor,
        endorsements: impl IntoIterator<Item = &'a Endorsement>,
    ) -> Vec<Endorsement> {
        let good = |endorsement: &&Endorsement| {
            self.rules.authorities().contains(&endorsement.authority)
                && endorsement.is_of(descriptor.descriptor())
        };
        endorsements.into_iter().filter(good).copied().collect()
    }

    fn latest_epoch(&self) -> u64 {
        self.latest.as_ref().map_or(0, |latest| latest.topology().epoch)
    }

    fn has_document_of(&self, epoch: u64) -> bool {
        self.latest.as_ref().is_some_and(|latest| latest.topology().epoch >= epoch)
    }

    /// The epoch whose document is to be made: the next one from a quarter of an epoch ahead. The first
    /// document of a network is one of the running epoch, so that nobody waits for the next.
    fn due_epoch(&self, now: Duration) -> u64 {
        match self.latest {
            Some(_) => self.rules.round_at(now),
            None => self.rules.parameters().epochs.at(UnixTime(now.as_secs())),
        }
    }

    /// Whether it knows enough to take part. Who has no document, be it that the network is new or that
    /// this authority is, could else help a liar to a second first one.
    fn is_informed(&self, now: Duration) -> bool {
        self.latest.is_some()
            || self.peers.values().all(|peer| peer.last_heard.is_some())
            || now >= self.started + FIRST_WAIT * self.rules.attempt_time()
    }

    /// The first epoch for which a round may begin.
    fn next_epoch(&self) -> u64 {
        self.round.as_ref().map_or(self.first_epoch, |round| round.epoch + 1).max(self.first_epoch)
    }

    fn begin(&mut self, epoch: u64, now: Duration) {
        self.members.prune(&self.rules, epoch);
        let expected = self.members.expected(&self.rules, epoch, now);
        self.round = Some(Round::new(epoch, now + self.rules.attempt_time(), expected));
        self.problem = None;
        self.next_send = now;
        self.changed();
    }

    /// The round that runs for this epoch, begun now if that is not too early by this clock.
    fn round_of(
        &mut self,
        from: Identity,
        epoch: u64,
        now: Duration,
    ) -> Result<bool, MessageError> {
        if epoch > joinable(&self.rules, now) {
            return Err(MessageError::Ahead { from, epoch });
        }
        if epoch >= self.next_epoch() {
            self.begin(epoch, now);
        }
        Ok(self.round.as_ref().is_some_and(|round| round.epoch == epoch))
    }

    fn handle_status(&mut self, status: &Status, now: Duration) -> Result<(), MessageError> {
        let Status { from, sent_ms, standing, .. } = *status;
        let Some(peer) = self.peers.get_mut(&from) else { return Ok(()) };
        // Whoever repeats an old one does not make the sender look alive.
        if Duration::from_millis(sent_ms).abs_diff(now) <= 2 * CLOCK_SKEW {
            peer.last_heard = Some(now);
        }
        let latest = self.latest.as_ref();
        if let Some(latest) = latest.filter(|latest| latest.topology().epoch > standing.latest)
            && now >= peer.next_document
        {
            peer.next_document = now + self.rules.attempt_time() / REPEATS;
            let message = self.sender().document(latest.file());
            self.send(from, message);
        }
        if self.round_of(from, standing.epoch, now)? {
            self.learn(status, now);
        }
        Ok(())
    }

    fn learn(&mut self, status: &Status, now: Duration) {
        let Some(round) = &mut self.round else { return };
        if !round.learn(status) {
            self.signed_twice.insert((status.from, round.epoch));
        }
        let attempt = round.attempt_of_others(self.rules.authorities());
        let done = self.latest.as_ref().is_some_and(|l| l.topology().epoch >= round.epoch);
        if !done && round.advance(attempt, now + self.rules.attempt_time()) {
            self.changed();
        }
    }

    fn handle_proposal(
        &mut self,
        leader: Identity,
        proposal: Proposal,
        now: Duration,
    ) -> Result<(), MessageError> {
        let Proposal { epoch, attempt, statuses, draft } = proposal;
        if *self.rules.leader(epoch, attempt) != leader {
            return Err(MessageError::NotItsTurn(leader));
        }
        let digest = draft.body.digest();
        let bound = bound_to(&statuses);
        if !is_mandate(&statuses, epoch, attempt, self.rules.authorities())
            || !(bound.is_empty() || bound.contains(&digest))
        {
            return Err(MessageError::NoMandate(leader));
        }
        if !self.round_of(leader, epoch, now)? || self.has_document_of(epoch) {
            return Ok(());
        }
        for status in &statuses {
            self.learn(status, now);
        }
        let deadline = now + self.rules.attempt_time();
        if self.round.as_mut().is_some_and(|round| round.advance(attempt, deadline)) {
            self.changed();
        }
        let Some(round) = &self.round else { return Ok(()) };
        let voted = round.vote.is_some_and(|vote| vote.attempt >= attempt);
        let other = round.signed.is_some() && round.vote.is_some_and(|vote| vote.digest != digest);
        let ready = self.is_informed(now);
        if leader == self.key.identity() || attempt != round.attempt || voted || other || !ready {
            return Ok(());
        }
        if let Err(error) = self.check(&draft, &statuses) {
            self.share(leader, &draft.candidates, &error);
            return Err(MessageError::Refused { leader, error });
        }
        self.vote(draft);
        Ok(())
    }

    /// Checks a draft that is proposed with these statuses.
    ///
    /// Whom it leaves out is not held against it when the leader had no choice, and somebody else had
    /// found it right before: else two honest authorities that lack different descriptors could block
    /// each other.
    fn check(&self, draft: &Draft, statuses: &[Status]) -> Result<(), CheckError> {
        let nobody = BTreeMap::new();
        let Some(round) = &self.round else { return Ok(()) };
        let bound = is_supported(statuses, &draft.body.digest(), &self.rules);
        let expected = if bound { &nobody } else { &round.expected };
        let (latest, epoch) = (self.latest.as_ref(), round.epoch);
        check(&self.rules, latest, epoch, &draft.body, &draft.candidates, expected)
    }

    /// Votes for a draft that has been checked.
    fn vote(&mut self, draft: Draft) {
        let Some(round) = &mut self.round else { return };
        round.vote = Some(Vote { attempt: round.attempt, digest: draft.body.digest() });
        round.keep(draft);
        self.changed();
    }

    /// Sends a leader, once in an attempt, what its proposal should have had.
    fn share(&mut self, leader: Identity, has: &[Candidate], error: &CheckError) {
        let Some(round) = &mut self.round else { return };
        let first = !std::mem::replace(&mut round.shared, true);
        if !first || !matches!(error, CheckError::Omitted(_)) {
            return;
        }
        let missing = |candidate: &Candidate| {
            let identity = candidate.descriptor.identity();
            let found = has.binary_search_by_key(&identity, |c| c.descriptor.identity());
            !found.is_ok_and(|at| has[at].descriptor == candidate.descriptor)
        };
        let current = self.members.current(&self.rules, round.epoch);
        let share: Vec<_> = current.into_iter().filter(missing).take(MAX_SHARED).collect();
        let message = self.sender().candidates(&share);
        self.send(leader, message);
    }

    fn handle_draft(&mut self, draft: Draft) {
        let Some(round) = &mut self.round else { return };
        if round.wants(&draft.body.digest()) {
            round.keep(draft);
        }
    }

    fn handle_candidates(&mut self, candidates: Vec<Candidate>, now: Duration) {
        let epoch = self.rules.round_at(now);
        for candidate in candidates {
            let Candidate { descriptor, endorsements } = &candidate;
            let room = self.members.has_room(&descriptor.identity());
            if room && candidate.check(&self.rules, epoch).is_ok() {
                let good = self.good_endorsements(descriptor, endorsements);
                self.members.put(candidate.descriptor, &good, &self.rules, now);
            }
        }
    }

    fn handle_document(
        &mut self,
        from: Identity,
        file: &[u8],
        now: Duration,
    ) -> Result<(), MessageError> {
        let signed =
            read(file, &self.rules).map_err(|error| MessageError::Document { from, error })?;
        self.accept(from, signed, now)
    }

    fn accept(
        &mut self,
        from: Identity,
        signed: SignedTopology,
        now: Duration,
    ) -> Result<(), MessageError> {
        let epoch = signed.topology().epoch;
        if epoch > joinable(&self.rules, now) {
            return Err(MessageError::Ahead { from, epoch });
        }
        if let Some(latest) = &self.latest {
            if latest.topology().epoch == epoch && latest.digest() != signed.digest() {
                let both = latest.signers().intersection(signed.signers());
                self.signed_twice.extend(both.map(|identity| (*identity, epoch)));
                return Err(MessageError::TwoDocuments(epoch));
            }
            if latest.topology().epoch >= epoch {
                return Ok(());
            }
        }
        self.outputs.push_back(Output::Publish(signed.file().to_owned()));
        self.latest = Some(signed);
        self.problem = None;
        Ok(())
    }

    /// Does whatever has become possible.
    fn settle(&mut self, now: Duration) {
        self.propose(now);
        self.support_own();
        self.sign();
        self.finish(now);
        if self.disk == Disk::Changed
            && let Some(round) = &self.round
        {
            self.outputs.push_back(Output::Persist(round.record()));
            self.disk = Disk::Writing { changed: false };
        }
    }

    /// Proposes a document when it is this authority's turn.
    ///
    /// It votes for it last, when its vote is the one that is missing: a vote for what the others
    /// refuse would bind the leaders that follow.
    fn propose(&mut self, now: Duration) {
        let me = self.identity();
        let Some(round) = &self.round else { return };
        let (epoch, attempt) = (round.epoch, round.attempt);
        if *self.rules.leader(epoch, attempt) != me
            || round.proposal.is_some()
            || !round.may_propose
            || self.disk != Disk::Same
            || self.has_document_of(epoch)
            || !self.is_informed(now)
        {
            return;
        }
        let Some(statuses) = round.mandate(self.rules.authorities()) else { return };
        let bound = bound_to(&statuses);
        let draft = if bound.is_empty() {
            self.assemble(epoch)
        } else {
            bound.iter().find_map(|digest| round.draft(digest)).cloned()
        };
        let Some(draft) = draft.filter(|draft| self.check(draft, &statuses).is_ok()) else {
            return;
        };
        let digest = draft.body.digest();
        let proposal = Proposal { epoch, attempt, statuses, draft };
        let message = self.sender().proposal(&proposal);
        if let Some(round) = &mut self.round {
            round.proposal = Some(Proposed { digest, message });
            round.keep(proposal.draft);
        }
        self.announce(now);
    }

    fn support_own(&mut self) {
        let Some(round) = &self.round else { return };
        let Some(proposal) = &round.proposal else { return };
        let voted = round.vote.is_some_and(|vote| vote.attempt >= round.attempt);
        if !voted
            && round.supporters() + 1 >= self.rules.authorities().threshold()
            && let Some(draft) = round.draft(&proposal.digest).cloned()
        {
            self.vote(draft);
        }
    }

    fn assemble(&mut self, epoch: u64) -> Option<Draft> {
        let candidates = self.members.current(&self.rules, epoch);
        match assemble(&self.rules, self.latest.as_ref(), &candidates, epoch) {
            Ok(topology) => {
                let body = topology.body();
                let fits = body.as_str().len() <= MAX_DOCUMENT_BYTES - MAX_SIGNATURES_BYTES;
                fits.then_some(Draft { body, candidates })
            }
            Err(error) => {
                self.problem = Some(error);
                None
            }
        }
    }

    fn sign(&mut self) {
        let Some(round) = &mut self.round else { return };
        if round.signed.is_none()
            && round.is_decided(self.rules.authorities())
            && let Some(draft) = round.voted_draft()
        {
            round.signed = Some(draft.body.sign(&self.key));
            self.changed();
        }
    }

    fn finish(&mut self, now: Duration) {
        let Some(round) = &self.round else { return };
        if self.has_document_of(round.epoch) {
            return;
        }
        let file = round.file(self.rules.authorities());
        let me = self.identity();
        if let Some(Ok(signed)) = file.map(|file| read(file.as_bytes(), &self.rules)) {
            // It can only be too early for a clock that was set back; then it comes again.
            let _ = self.accept(me, signed, now);
        }
    }

    fn changed(&mut self) {
        self.disk = match self.disk {
            Disk::Same | Disk::Changed => Disk::Changed,
            Disk::Writing { .. } => Disk::Writing { changed: true },
        };
    }

    /// Tells everybody where this authority stands, if that is on the disk.
    fn announce(&mut self, now: Duration) {
        let Some(round) = self.round.as_ref().filter(|_| self.disk == Disk::Same) else {
            self.next_send = now + self.rules.attempt_time() / REPEATS;
            return;
        };
        let running = !self.has_document_of(round.epoch);
        let pause = self.rules.attempt_time() / if running { REPEATS } else { 1 };
        let status = self.sender().status(now, round.standing(self.latest_epoch()));
        let leader = *self.rules.leader(round.epoch, round.attempt);
        let earlier = round.vote.is_some_and(|vote| vote.attempt < round.attempt);
        let draft = round.voted_draft().filter(|_| running && earlier);
        let draft = draft.map(|draft| self.sender().draft(draft));
        let mut messages = Vec::new();
        for peer in self.peers.keys() {
            messages.push((*peer, status.message()));
            if let Some(draft) = draft.as_ref().filter(|_| *peer == leader) {
                messages.push((*peer, draft.clone()));
            }
            if let Some(proposal) = round.proposal.as_ref().filter(|_| running)
                && !round.has_voted(peer)
            {
                messages.push((*peer, proposal.message.clone()));
            }
        }
        for (to, message) in messages {
            self.send(to, message);
        }
        self.next_send = now + pause;
        self.learn(&status, now);
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.identity())
    }
}

/// The latest epoch whose round may begin, whoever says so: clocks differ.
fn joinable(rules: &Rules, now: Duration) -> u64 {
    rules.round_at(now.saturating_add(Duration::from_secs(rules.skew_seconds())))
}

fn read(file: &[u8], rules: &Rules) -> Result<SignedTopology, TopologyError> {
    let signed = SignedTopology::read(file, rules.authorities())?;
    if signed.topology().network != *rules.network() {
        return Err(TopologyError::NotATopology("it is of another network"));
    }
    Ok(signed)
}

#[cfg(test)]
mod tests;
