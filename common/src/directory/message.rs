//! Messages between authorities.
//!
//! | offset | length | field |
//! |--:|--:|---|
//! | 0 | 1 | kind: 1 status, 2 proposal, 3 draft, 4 candidates, 5 document |
//! | 1 | 32 | the authority that sends |
//! | 33 | … | contents |
//! | last | 64 | its signature over `"mixsocks authority v1\0"`, length u8 and name of the network, and everything before |
//!
//! Numbers are big-endian. Nothing of the contents is looked at before the signature is right.
//! Messages may be lost, repeated and overtaken: each says all that is to be known.

use std::time::Duration;

use bytes::Bytes;

use super::rules::MAX_ATTEMPTS;
use super::{
    Candidate, Endorsement, MAX_AUTHORITIES, MAX_DESCRIPTOR_BYTES, MAX_HELD, Rules,
    SignedDescriptor,
};
use crate::keys::{Identity, IdentityKey, KEY_LEN, SIGNATURE_LEN, Signature};
use crate::topology::{DocumentBody, DocumentDigest, MAX_DOCUMENT_BYTES, NetworkName};

/// Longest message in bytes: a proposal with the most and largest descriptors.
pub const MAX_MESSAGE_BYTES: usize = 48 * 1024 * 1024;
/// Most candidates in a message that brings somebody what it lacks: it takes a few rounds to bring
/// more, and a lying authority's burst stays small.
pub(super) const MAX_SHARED: usize = 256;

const CANDIDATE_BYTES: usize = 2 + MAX_DESCRIPTOR_BYTES + 1 + MAX_AUTHORITIES * Endorsement::LEN;
const _: () = assert!(
    MAX_DOCUMENT_BYTES + MAX_HELD * CANDIDATE_BYTES + MAX_AUTHORITIES * Status::LEN + 256
        <= MAX_MESSAGE_BYTES
);

const STATUS: u8 = 1;
const PROPOSAL: u8 = 2;
const DRAFT: u8 = 3;
const CANDIDATES: u8 = 4;
const DOCUMENT: u8 = 5;

const CONTEXT: &[u8] = b"mixsocks authority v1\0";

/// Where an authority stands: a sign of life, a promise to vote in no earlier attempt, its latest
/// vote, and its signature of the document once it has given it.
///
/// Offsets in the contents, 123 bytes, which make 220 with the frame around them:
///
/// | offset | length | field |
/// |--:|--:|---|
/// | 0 | 8 | when it was made, milliseconds since 1970 |
/// | 8 | 8 | epoch of the latest document that the sender has; 0 for none |
/// | 16 | 8 | epoch whose document is being made |
/// | 24 | 1 | attempt, from 0 |
/// | 25 | 1 | 0 has not voted, 1 has voted, 2 has also signed |
/// | 26 | 1 | attempt in which it last voted; zero without |
/// | 27 | 32 | digest that it voted for; zeros without |
/// | 59 | 64 | its signature of that document; zeros without |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) from: Identity,
    pub(super) sent_ms: u64,
    pub(super) standing: Standing,
    signature: Signature,
}

/// A vote for a document in an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Vote {
    pub(super) attempt: u8,
    pub(super) digest: DocumentDigest,
}

/// A document with the descriptors that it was made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Draft {
    pub(super) body: DocumentBody,
    pub(super) candidates: Vec<Candidate>,
}

/// A leader's proposal, with the statuses that allow it: as many as must sign, of this very attempt;
/// none in attempt 0.
///
/// Epoch u64, attempt u8, count u8 and as many statuses (220 each, as they came), draft.
///
/// A draft is length u32 and text of the document, and candidates: count u32 and as many times
/// length u16 and text of the descriptor, count u8 and as many endorsements (104 each).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proposal {
    pub(super) epoch: u64,
    pub(super) attempt: u8,
    pub(super) statuses: Vec<Status>,
    pub(super) draft: Draft,
}

/// The contents of a message whose signature has been checked.
#[derive(Debug)]
pub(super) enum Message<'a> {
    Status(Status),
    Proposal(Proposal),
    /// A draft that the sender has voted for.
    Draft(Draft),
    /// Descriptors whose signatures have been checked, with endorsements that have not.
    Candidates(Vec<Candidate>),
    /// The file of a document, unchecked.
    Document(&'a [u8]),
}

/// The bytes are no message of an authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What a status says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) latest: u64,
    pub(super) epoch: u64,
    pub(super) attempt: u8,
    pub(super) vote: Option<Vote>,
    pub(super) signed: Option<Signature>,
}

/// Who sends, and to whom it belongs.
#[derive(Clone, Copy)]
pub(super) struct Sender<'a> {
    pub(super) key: &'a IdentityKey,
    pub(super) network: &'a NetworkName,
}

impl Sender<'_> {
    pub(super) fn status(self, now: Duration, standing: Standing) -> Status {
        let mut status = Status {
            from: self.key.identity(),
            sent_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            standing,
            signature: Signature::from_bytes([0; SIGNATURE_LEN]),
        };
        let bytes = status.to_bytes();
        let unsigned = &bytes[..Status::LEN - SIGNATURE_LEN];
        status.signature = self.key.sign(&signed_bytes(self.network, unsigned));
        status
    }

    pub(super) fn proposal(self, proposal: &Proposal) -> Bytes {
        let mut bytes = self.begin(PROPOSAL);
        bytes.extend_from_slice(&proposal.epoch.to_be_bytes());
        bytes.push(proposal.attempt);
        bytes.push(u8::try_from(proposal.statuses.len()).expect("at most 16 authorities"));
        for status in &proposal.statuses {
            bytes.extend_from_slice(&status.to_bytes());
        }
        proposal.draft.encode(&mut bytes);
        self.end(bytes)
    }

    pub(super) fn draft(self, draft: &Draft) -> Bytes {
        let mut bytes = self.begin(DRAFT);
        draft.encode(&mut bytes);
        self.end(bytes)
    }

    /// At most [`MAX_SHARED`].
    pub(super) fn candidates(self, candidates: &[Candidate]) -> Bytes {
        let mut bytes = self.begin(CANDIDATES);
        encode_candidates(&mut bytes, candidates);
        self.end(bytes)
    }

    pub(super) fn document(self, file: &str) -> Bytes {
        let mut bytes = self.begin(DOCUMENT);
        bytes.extend_from_slice(file.as_bytes());
        self.end(bytes)
    }

    fn begin(self, kind: u8) -> Vec<u8> {
        [&[kind], &self.key.identity().as_bytes()[..]].concat()
    }

    fn end(self, mut bytes: Vec<u8>) -> Bytes {
        let signature = self.key.sign(&signed_bytes(self.network, &bytes));
        bytes.extend_from_slice(signature.as_bytes());
        bytes.into()
    }
}

impl Status {
    /// Bytes of the whole message.
    pub(super) const LEN: usize = 1 + KEY_LEN + 8 + Standing::LEN + SIGNATURE_LEN;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.push(STATUS);
        bytes.extend_from_slice(self.from.as_bytes());
        bytes.extend_from_slice(&self.sent_ms.to_be_bytes());
        bytes.extend_from_slice(&self.standing.to_bytes());
        bytes.extend_from_slice(self.signature.as_bytes());
        bytes.try_into().expect("the fields have these lengths")
    }

    /// The message.
    pub(super) fn message(self) -> Bytes {
        Bytes::copy_from_slice(&self.to_bytes())
    }

    fn from_bytes(bytes: &[u8; Self::LEN], rules: &Rules) -> Result<Self, Malformed> {
        match Message::parse(bytes, rules)? {
            (_, Message::Status(status)) => Ok(status),
            _ => Err(Malformed),
        }
    }
}

impl Standing {
    /// Bytes of a standing.
    const LEN: usize = 8 + 8 + 1 + 1 + 1 + DocumentDigest::LEN + SIGNATURE_LEN;

    pub(super) fn to_bytes(self) -> [u8; Self::LEN] {
        let Self { latest, epoch, attempt, vote, signed } = self;
        let stage = match (vote, signed) {
            (None, _) => 0,
            (Some(_), None) => 1,
            (Some(_), Some(_)) => 2,
        };
        let signed = signed.filter(|_| vote.is_some());
        let mut bytes = Vec::with_capacity(Self::LEN);
        bytes.extend_from_slice(&latest.to_be_bytes());
        bytes.extend_from_slice(&epoch.to_be_bytes());
        bytes.extend_from_slice(&[attempt, stage, vote.map_or(0, |vote| vote.attempt)]);
        bytes.extend_from_slice(&vote.map_or([0; DocumentDigest::LEN], |v| *v.digest.as_bytes()));
        bytes.extend_from_slice(&signed.map_or([0; SIGNATURE_LEN], |s| *s.as_bytes()));
        bytes.try_into().expect("the fields have these lengths")
    }
}

impl Message<'_> {
    /// Parses a message and checks that an authority sent it.
    pub(super) fn parse<'a>(
        bytes: &'a [u8],
        rules: &Rules,
    ) -> Result<(Identity, Message<'a>), Malformed> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(Malformed);
        }
        let unsigned_len = bytes.len().checked_sub(SIGNATURE_LEN).ok_or(Malformed)?;
        let (unsigned, signature) = bytes.split_at(unsigned_len);
        let signature = Signature::from_bytes(signature.try_into().map_err(|_| Malformed)?);
        let mut reader = Reader(unsigned);
        let kind = reader.byte()?;
        let from = reader.identity()?;
        if !rules.authorities().contains(&from) {
            return Err(Malformed);
        }
        from.verify(&signed_bytes(rules.network(), unsigned), &signature).map_err(|_| Malformed)?;
        let message = match kind {
            STATUS => {
                let (sent_ms, standing) = (reader.u64()?, reader.standing()?);
                let status = Status { from, sent_ms, standing, signature };
                // One encoding only: what means nothing is zero.
                if status.to_bytes() != bytes {
                    return Err(Malformed);
                }
                return Ok((from, Message::Status(status)));
            }
            PROPOSAL => Message::Proposal(reader.proposal(rules)?),
            DRAFT => Message::Draft(reader.draft()?),
            CANDIDATES => Message::Candidates(reader.candidates(MAX_SHARED)?),
            DOCUMENT => return Ok((from, Message::Document(reader.0))),
            _ => return Err(Malformed),
        };
        reader.end()?;
        Ok((from, message))
    }
}

impl Draft {
    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        let text = self.body.as_str();
        bytes.extend_from_slice(&length32(text.len()));
        bytes.extend_from_slice(text.as_bytes());
        encode_candidates(bytes, &self.candidates);
    }
}

pub(super) fn encode_candidates(bytes: &mut Vec<u8>, candidates: &[Candidate]) {
    bytes.extend_from_slice(&length32(candidates.len()));
    for Candidate { descriptor, endorsements } in candidates {
        let text = descriptor.text();
        let len = u16::try_from(text.len()).expect("a descriptor has at most 2,048 bytes");
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
        bytes.push(u8::try_from(endorsements.len()).expect("at most 16 authorities"));
        for endorsement in endorsements {
            bytes.extend_from_slice(&endorsement.to_bytes());
        }
    }
}

fn length32(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("messages have at most 48 MiB").to_be_bytes()
}

fn signed_bytes(network: &NetworkName, message: &[u8]) -> Vec<u8> {
    let name = network.as_str().as_bytes();
    let len = u8::try_from(name.len()).expect("a network's name has at most 64 bytes");
    [CONTEXT, &[len], name, message].concat()
}

/// Takes fields off the front of bytes.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (field, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(field)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    pub(super) fn byte(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn attempt(&mut self) -> Result<u8, Malformed> {
        Some(self.byte()?).filter(|attempt| *attempt < MAX_ATTEMPTS).ok_or(Malformed)
    }

    pub(super) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed) }
    }

    fn len(&mut self, max: usize) -> Result<usize, Malformed> {
        let len = usize::try_from(u32::from_be_bytes(self.array()?)).map_err(|_| Malformed)?;
        if len > max { Err(Malformed) } else { Ok(len) }
    }

    fn identity(&mut self) -> Result<Identity, Malformed> {
        Identity::from_bytes(self.array::<KEY_LEN>()?).map_err(|_| Malformed)
    }

    fn signature(&mut self) -> Result<Signature, Malformed> {
        self.array().map(Signature::from_bytes)
    }

    fn text(&mut self, len: usize) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.take(len)?).map_err(|_| Malformed)
    }

    pub(super) fn standing(&mut self) -> Result<Standing, Malformed> {
        let (latest, epoch, attempt) = (self.u64()?, self.u64()?, self.attempt()?);
        let stage = self.byte()?;
        let (voted_in, digest) = (self.attempt()?, DocumentDigest::from_bytes(self.array()?));
        let (vote, signature) = (Vote { attempt: voted_in, digest }, self.signature()?);
        let (vote, signed) = match stage {
            0 => (None, None),
            1 => (Some(vote), None),
            2 => (Some(vote), Some(signature)),
            _ => return Err(Malformed),
        };
        Ok(Standing { latest, epoch, attempt, vote, signed })
    }

    fn proposal(&mut self, rules: &Rules) -> Result<Proposal, Malformed> {
        let (epoch, attempt) = (self.u64()?, self.attempt()?);
        let count = usize::from(self.byte()?);
        if count > MAX_AUTHORITIES {
            return Err(Malformed);
        }
        let mut statuses = Vec::with_capacity(count);
        for _ in 0..count {
            statuses.push(Status::from_bytes(&self.array()?, rules)?);
        }
        Ok(Proposal { epoch, attempt, statuses, draft: self.draft()? })
    }

    pub(super) fn draft(&mut self) -> Result<Draft, Malformed> {
        let len = self.len(MAX_DOCUMENT_BYTES)?;
        let body = DocumentBody::from_text(self.text(len)?.to_owned());
        Ok(Draft { body, candidates: self.candidates(MAX_HELD)? })
    }

    pub(super) fn candidates(&mut self, max: usize) -> Result<Vec<Candidate>, Malformed> {
        let count = self.len(max)?;
        (0..count).map(|_| self.candidate()).collect()
    }

    fn candidate(&mut self) -> Result<Candidate, Malformed> {
        let len = u16::from_be_bytes(self.array()?);
        let text = self.take(usize::from(len))?;
        let descriptor = SignedDescriptor::read(text).map_err(|_| Malformed)?;
        let count = usize::from(self.byte()?);
        if count > MAX_AUTHORITIES {
            return Err(Malformed);
        }
        let mut endorsements = Vec::with_capacity(count);
        for _ in 0..count {
            endorsements.push(Endorsement::from_bytes(&self.array()?).ok_or(Malformed)?);
        }
        Ok(Candidate { descriptor, endorsements })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Person, authority_key, rules, sorted};
    use super::*;

    fn draft() -> Draft {
        let key = authority_key(0);
        let candidates = [Person::mix(1), Person::gateway(2)].map(|p| p.candidate(5000, &[&key]));
        let body = DocumentBody::from_text("network = \"…\"\n".to_owned());
        Draft { body, candidates: sorted(candidates.to_vec()) }
    }

    fn standing() -> Standing {
        let vote = Vote { attempt: 3, digest: draft().body.digest() };
        let signed = Some(Signature::from_bytes([5; SIGNATURE_LEN]));
        Standing { latest: 7, epoch: 8, attempt: 4, vote: Some(vote), signed }
    }

    #[test]
    fn each_message_round_trips_and_no_part_of_one_is_one() {
        let (key, rules) = (authority_key(0), rules(3, 2));
        let sender = Sender { key: &key, network: rules.network() };
        let status = sender.status(Duration::from_millis(1234), standing());
        assert_eq!(status.message().len(), 220);
        let proposal = Proposal { epoch: 8, attempt: 4, statuses: vec![status; 2], draft: draft() };
        let messages = [
            status.message(),
            sender.proposal(&proposal),
            sender.draft(&draft()),
            sender.candidates(&draft().candidates),
        ];
        for message in &messages {
            for end in 0..message.len() {
                assert_eq!(Message::parse(&message[..end], &rules).unwrap_err(), Malformed);
            }
            let longer = [&message[..], &[0]].concat();
            assert_eq!(Message::parse(&longer, &rules).unwrap_err(), Malformed);
        }
        let parse = |at: usize| {
            let (from, message) = Message::parse(&messages[at], &rules).unwrap();
            assert_eq!(from, key.identity());
            message
        };
        assert!(matches!(parse(0), Message::Status(read) if read == status));
        assert!(matches!(parse(1), Message::Proposal(read) if read == proposal));
        assert!(matches!(parse(2), Message::Draft(read) if read == draft()));
        assert!(matches!(parse(3), Message::Candidates(read) if read == draft().candidates));
        let document = sender.document("text");
        let parsed = Message::parse(&document, &rules).unwrap().1;
        assert!(matches!(parsed, Message::Document(file) if file == b"text"));
    }

    /// Contents that an authority signed whatever they say.
    #[test]
    fn signed_contents_that_break_a_rule_are_refused() {
        let (key, rules) = (authority_key(0), rules(3, 2));
        let sender = Sender { key: &key, network: rules.network() };
        let good = sender.status(Duration::ZERO, standing()).message();
        let resign = |kind: u8, contents: &[u8]| {
            let mut bytes = sender.begin(kind);
            bytes.extend_from_slice(contents);
            Message::parse(&sender.end(bytes), &rules).map(|_| ())
        };
        let contents = &good[33..156];
        assert_eq!(resign(STATUS, contents), Ok(()));
        for kind in [0, 6, 255] {
            assert_eq!(resign(kind, contents), Err(Malformed));
        }
        // Attempt, stage, attempt of the vote; a signature without its stage.
        for (at, value) in [(24, MAX_ATTEMPTS), (25, 3), (26, MAX_ATTEMPTS), (25, 1), (25, 0)] {
            let mut contents = contents.to_vec();
            contents[at] = value;
            assert_eq!(resign(STATUS, &contents), Err(Malformed), "{at}");
        }
        let too_many = u32::try_from(MAX_SHARED + 1).unwrap().to_be_bytes();
        assert_eq!(resign(CANDIDATES, &too_many), Err(Malformed));
        assert_eq!(resign(CANDIDATES, &[0; 4]), Ok(()));
        let long = u32::try_from(MAX_DOCUMENT_BYTES + 1).unwrap().to_be_bytes();
        assert_eq!(
            resign(DRAFT, &[&long[..], &vec![b'x'; MAX_DOCUMENT_BYTES + 5]].concat()),
            Err(Malformed)
        );
    }
}
