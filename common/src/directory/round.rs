//! A round: how one document of an epoch is agreed on.
//!
//! Voting is Paxos over attempts: who leads an attempt after the first must show where enough
//! authorities stand, and propose what the latest vote among them was for, if there is one. So once
//! enough have voted for a document in one attempt, no other can be voted for any more; and only
//! then is it signed. A signature is never taken back, a vote may move on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;

use super::Rules;
use super::message::{Draft, Malformed, Reader, Standing, Status, Vote};
use super::rules::MAX_ATTEMPTS;
use crate::keys::{Identity, Signature};
use crate::topology::{Authorities, DocumentDigest, UnixTime};

/// What an authority has proposed.
pub(super) struct Proposed {
    pub(super) digest: DocumentDigest,
    pub(super) message: Bytes,
}

/// The making of one document.
pub(super) struct Round {
    pub(super) epoch: u64,
    pub(super) attempt: u8,
    /// When the attempt is over.
    pub(super) deadline: Duration,
    /// Whose descriptors the document must have, and of what age.
    pub(super) expected: BTreeMap<Identity, UnixTime>,
    /// What this authority proposes in this attempt.
    pub(super) proposal: Option<Proposed>,
    /// Whether it may propose in this attempt: not if it may have done so before a restart, as there
    /// must be one proposal only.
    pub(super) may_propose: bool,
    /// Whether it has told this attempt's leader whom its proposal leaves out.
    pub(super) shared: bool,
    /// Its latest vote, and its signature.
    pub(super) vote: Option<Vote>,
    pub(super) signed: Option<Signature>,
    statuses: BTreeMap<Identity, Status>,
    votes: BTreeMap<(u8, Identity), DocumentDigest>,
    signatures: BTreeMap<Identity, (DocumentDigest, Signature)>,
    drafts: BTreeMap<DocumentDigest, Draft>,
}

impl Round {
    pub(super) fn new(
        epoch: u64,
        deadline: Duration,
        expected: BTreeMap<Identity, UnixTime>,
    ) -> Self {
        Self {
            epoch,
            attempt: 0,
            deadline,
            expected,
            proposal: None,
            may_propose: true,
            shared: false,
            vote: None,
            signed: None,
            statuses: BTreeMap::new(),
            votes: BTreeMap::new(),
            signatures: BTreeMap::new(),
            drafts: BTreeMap::new(),
        }
    }

    /// What must be on the disk before anything of it is sent: standing (123 − 8 bytes, as in a
    /// status), and the draft that was voted for.
    pub(super) fn record(&self) -> Vec<u8> {
        let mut bytes = self.standing(0).to_bytes().to_vec();
        if let Some(draft) = self.voted_draft() {
            draft.encode(&mut bytes);
        }
        bytes
    }

    /// Takes up a round where its record left it.
    pub(super) fn restore(record: &[u8], deadline: Duration) -> Result<Self, Malformed> {
        let mut reader = Reader(record);
        let standing = reader.standing()?;
        let mut round = Self::new(standing.epoch, deadline, BTreeMap::new());
        round.may_propose = false;
        (round.attempt, round.vote, round.signed) =
            (standing.attempt, standing.vote, standing.signed);
        if let Some(vote) = standing.vote {
            let draft = reader.draft()?;
            if draft.body.digest() != vote.digest {
                return Err(Malformed);
            }
            round.drafts.insert(vote.digest, draft);
        }
        reader.end()?;
        Ok(round)
    }

    pub(super) fn standing(&self, latest: u64) -> Standing {
        let Self { epoch, attempt, vote, signed, .. } = *self;
        Standing { latest, epoch, attempt, vote, signed }
    }

    /// Goes on to a later attempt; `false` if it is none.
    pub(super) fn advance(&mut self, attempt: u8, deadline: Duration) -> bool {
        if attempt <= self.attempt || attempt >= MAX_ATTEMPTS {
            return false;
        }
        (self.attempt, self.deadline) = (attempt, deadline);
        (self.proposal, self.may_propose, self.shared) = (None, true, false);
        true
    }

    /// The attempt to go on to because enough others have: one of them at least is honest if so many
    /// lie that the rest could still sign.
    pub(super) fn attempt_of_others(&self, authorities: &Authorities) -> u8 {
        let mut attempts: Vec<_> = self.statuses.values().map(|s| s.standing.attempt).collect();
        attempts.sort_unstable_by(|a, b| b.cmp(a));
        let enough = authorities.count() - authorities.threshold() + 1;
        attempts.get(enough - 1).copied().unwrap_or(0)
    }

    /// Learns where an authority stands; `false` if it contradicts what it said before.
    pub(super) fn learn(&mut self, status: &Status) -> bool {
        let Standing { attempt, vote, signed, .. } = status.standing;
        let progress = |s: &Status| {
            (
                s.standing.attempt,
                s.standing.vote.map(|vote| vote.attempt),
                s.standing.signed.is_some(),
            )
        };
        let known = self.statuses.get(&status.from);
        if known.is_none_or(|known| progress(known) <= progress(status)) {
            self.statuses.insert(status.from, *status);
        }
        let Some(vote) = vote.filter(|vote| vote.attempt <= attempt) else { return true };
        let mut honest = true;
        let first = *self.votes.entry((vote.attempt, status.from)).or_insert(vote.digest);
        honest &= first == vote.digest;
        if let Some(signature) = signed {
            let (first, _) =
                *self.signatures.entry(status.from).or_insert((vote.digest, signature));
            honest &= first == vote.digest;
        }
        honest
    }

    /// Whether this authority needs the draft: somebody has voted for it.
    pub(super) fn wants(&self, digest: &DocumentDigest) -> bool {
        let voted = |s: &Status| s.standing.vote.is_some_and(|vote| vote.digest == *digest);
        !self.drafts.contains_key(digest) && self.statuses.values().any(voted)
    }

    /// Keeps a draft. Those that nobody's latest vote is for go: so there are never more than
    /// authorities, and one.
    pub(super) fn keep(&mut self, draft: Draft) {
        let votes = self.statuses.values().filter_map(|status| status.standing.vote);
        let mut wanted: BTreeSet<_> = votes.chain(self.vote).map(|vote| vote.digest).collect();
        wanted.extend(self.proposal.as_ref().map(|proposal| proposal.digest));
        self.drafts.retain(|digest, _| wanted.contains(digest));
        self.drafts.insert(draft.body.digest(), draft);
    }

    pub(super) fn voted_draft(&self) -> Option<&Draft> {
        self.drafts.get(&self.vote?.digest)
    }

    pub(super) fn draft(&self, digest: &DocumentDigest) -> Option<&Draft> {
        self.drafts.get(digest)
    }

    /// The statuses with which this authority may propose in this attempt: those that bind it least,
    /// as few as will do; `None` while too few have got there. The first attempt needs none.
    pub(super) fn mandate(&self, authorities: &Authorities) -> Option<Vec<Status>> {
        if self.attempt == 0 {
            return Some(Vec::new());
        }
        let here = |status: &&Status| status.standing.attempt == self.attempt;
        let mut statuses: Vec<_> = self.statuses.values().filter(here).copied().collect();
        statuses.sort_by_key(|status| status.standing.vote.map(|vote| vote.attempt));
        statuses.truncate(authorities.threshold());
        (statuses.len() == authorities.threshold()).then_some(statuses)
    }

    /// How many have voted in this attempt for what this authority proposes.
    pub(super) fn supporters(&self) -> usize {
        let Some(proposal) = &self.proposal else { return 0 };
        let here = |((attempt, _), digest): &(&(u8, Identity), &DocumentDigest)| {
            *attempt == self.attempt && **digest == proposal.digest
        };
        self.votes.iter().filter(here).count()
    }

    /// Whether enough authorities have voted, in one attempt, for what this one has voted for.
    pub(super) fn is_decided(&self, authorities: &Authorities) -> bool {
        let Some(own) = self.vote else { return false };
        let mut counts: BTreeMap<u8, usize> = BTreeMap::new();
        for ((attempt, _), digest) in &self.votes {
            *counts.entry(*attempt).or_default() += usize::from(*digest == own.digest);
        }
        counts.values().any(|count| *count >= authorities.threshold())
    }

    /// The file of the document that enough authorities have signed.
    pub(super) fn file(&self, authorities: &Authorities) -> Option<String> {
        self.drafts.iter().find_map(|(digest, draft)| {
            let signatures: Vec<_> = self
                .signatures
                .iter()
                .filter(|(_, (signed, _))| signed == digest)
                .filter(|(authority, (_, s))| draft.body.is_signed_by(authority, s))
                .map(|(authority, (_, signature))| (*authority, *signature))
                .collect();
            (signatures.len() >= authorities.threshold()).then(|| draft.body.to_file(&signatures))
        })
    }

    /// Whether an authority is known to have voted in this attempt.
    pub(super) fn has_voted(&self, authority: &Identity) -> bool {
        let vote = self.statuses.get(authority).and_then(|status| status.standing.vote);
        vote.is_some_and(|vote| vote.attempt >= self.attempt)
    }
}

/// The digests of which one must be proposed by who shows these statuses: those of the latest votes.
/// Any may be when there are none.
pub(super) fn bound_to(statuses: &[Status]) -> BTreeSet<DocumentDigest> {
    let votes = || statuses.iter().filter_map(|status| status.standing.vote);
    let latest = votes().map(|vote| vote.attempt).max();
    votes().filter(|vote| Some(vote.attempt) == latest).map(|vote| vote.digest).collect()
}

/// Whether somebody else has voted for this draft than who proposed it.
pub(super) fn is_supported(statuses: &[Status], digest: &DocumentDigest, rules: &Rules) -> bool {
    statuses.iter().any(|Status { from, standing, .. }| {
        let vote = standing.vote.filter(|vote| vote.digest == *digest);
        vote.is_some_and(|vote| rules.leader(standing.epoch, vote.attempt) != from)
    })
}

/// Whether `statuses` are of enough authorities, each once, at this attempt of this epoch.
pub(super) fn is_mandate(
    statuses: &[Status],
    epoch: u64,
    attempt: u8,
    authorities: &Authorities,
) -> bool {
    let here = |s: &Status| {
        let Standing { vote, .. } = s.standing;
        s.standing.epoch == epoch
            && s.standing.attempt == attempt
            && vote.is_none_or(|vote| vote.attempt < attempt)
    };
    let distinct: BTreeSet<_> = statuses.iter().map(|status| status.from).collect();
    attempt == 0
        || (statuses.iter().all(here)
            && distinct.len() == statuses.len()
            && distinct.len() >= authorities.threshold())
}

#[cfg(test)]
mod tests {
    use super::super::message::Sender;
    use super::super::testing::{authority_key, rules};
    use super::*;

    fn digest(number: u8) -> DocumentDigest {
        DocumentDigest::from_bytes([number; 32])
    }

    /// The status of an authority in attempt 3 of epoch 9, with its vote.
    fn status(number: u8, vote: Option<(u8, u8)>) -> Status {
        let (key, rules) = (authority_key(number), rules(3, 2));
        let vote = vote.map(|(attempt, number)| Vote { attempt, digest: digest(number) });
        let standing = Standing { latest: 0, epoch: 9, attempt: 3, vote, signed: None };
        Sender { key: &key, network: rules.network() }.status(Duration::ZERO, standing)
    }

    #[test]
    fn the_latest_votes_bind_a_leader() {
        assert_eq!(bound_to(&[status(0, None), status(1, None)]), BTreeSet::new());
        let statuses = [status(0, Some((1, 7))), status(1, None), status(2, Some((0, 8)))];
        assert_eq!(bound_to(&statuses), BTreeSet::from([digest(7)]));
        let equal = [status(0, Some((1, 7))), status(1, Some((1, 8)))];
        assert_eq!(bound_to(&equal), BTreeSet::from([digest(7), digest(8)]));
    }

    #[test]
    fn a_mandate_is_of_enough_different_authorities_at_this_attempt() {
        let rules = rules(3, 2);
        let is_mandate =
            |statuses: &[Status], attempt| is_mandate(statuses, 9, attempt, rules.authorities());
        let (first, second) = (status(0, None), status(1, Some((2, 7))));
        assert!(is_mandate(&[first, second], 3));
        assert!(is_mandate(&[], 0));
        for attempt in [2, 4] {
            assert!(!is_mandate(&[first, second], attempt));
        }
        assert!(!is_mandate(&[first], 3));
        assert!(!is_mandate(&[first, first], 3));
        // Who has voted in this attempt has had its proposal already.
        assert!(!is_mandate(&[first, status(1, Some((3, 7)))], 3));
        assert!(!super::is_mandate(&[first, second], 8, 3, rules.authorities()));
    }

    #[test]
    fn a_leader_shows_the_statuses_that_bind_it_least() {
        let rules = rules(3, 2);
        let mut round = Round::new(9, Duration::ZERO, BTreeMap::new());
        assert_eq!(round.mandate(rules.authorities()), Some(Vec::new()));
        round.advance(3, Duration::ZERO);
        assert!(round.learn(&status(2, Some((2, 7)))));
        assert_eq!(round.mandate(rules.authorities()), None);
        assert!(round.learn(&status(0, None)) && round.learn(&status(1, None)));
        let mandate = round.mandate(rules.authorities()).unwrap();
        assert_eq!(bound_to(&mandate), BTreeSet::new());
    }

    #[test]
    fn attempts_are_followed_when_an_honest_one_is_there_for_certain() {
        let rules = rules(3, 2);
        let mut round = Round::new(9, Duration::ZERO, BTreeMap::new());
        round.learn(&status(1, None));
        assert_eq!(round.attempt_of_others(rules.authorities()), 0);
        round.learn(&status(2, None));
        assert_eq!(round.attempt_of_others(rules.authorities()), 3);
        assert!(round.advance(3, Duration::ZERO) && !round.advance(3, Duration::ZERO));
        assert!(!round.advance(MAX_ATTEMPTS, Duration::ZERO));
    }

    #[test]
    fn another_vote_of_one_attempt_or_another_signature_is_a_lie() {
        let mut round = Round::new(9, Duration::ZERO, BTreeMap::new());
        assert!(round.learn(&status(1, Some((1, 7)))));
        assert!(round.learn(&status(1, Some((2, 8)))));
        assert!(!round.learn(&status(1, Some((1, 8)))));
    }
}
