//! Admission: who may become a member, and how an authority says so.
//!
//! An authority admits by a list of identities or by invitation, and endorses whom it admits. The
//! endorsements of as many authorities as must sign a document admit a member: so a minority lets
//! nobody in, and keeps nobody out. The member collects them with the answers to its uploads, and
//! sends them along with the next one.

use std::collections::BTreeMap;
use std::fmt;

use rand::CryptoRng;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{Descriptor, MemberKind};
use crate::keys::{Identity, IdentityKey, KEY_LEN, SIGNATURE_LEN, Signature};

/// Bytes of an invitation, of its hash and of its presented form.
pub const INVITATION_LEN: usize = 32;
/// Most invitations that an authority keeps: each is hashed for every stranger's upload.
pub const MAX_INVITATIONS: usize = 1024;

const SHARE_CONTEXT: &[u8] = b"mixsocks invitation share v1\0";
const PRESENT_CONTEXT: &[u8] = b"mixsocks invitation present v1\0";
const ENDORSE_CONTEXT: &[u8] = b"mixsocks endorsement v1\0";

/// A secret that lets one new member in, at all authorities that know its hash.
///
/// Each authority is shown another share of it, SHA-256 of context, secret and authority, so that
/// none can use it at another one. It is wiped when dropped and shows nothing in `Debug`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Invitation([u8; INVITATION_LEN]);

/// What an authority keeps of an invitation: SHA-256 of its share, which lets nobody in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct InvitationHash([u8; INVITATION_LEN]);

/// An invitation as it travels to an authority, masked for one identity.
///
/// `share ⊕ SHA-256("mixsocks invitation present v1\0" ‖ SHA-256(share) ‖ identity)`: who has the
/// hash can take the mask off and check; who recorded it cannot present it for another identity.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PresentedInvitation([u8; INVITATION_LEN]);

/// Whom an authority admits.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    allowed: BTreeMap<Identity, MemberKind>,
    invitations: BTreeMap<InvitationHash, Seat>,
}

/// What an invitation is for, and who has taken it.
#[derive(Clone, Copy, Debug)]
struct Seat {
    kind: MemberKind,
    taken_by: Option<Identity>,
}

/// How somebody was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an invitation that was used must be on the disk before the answer leaves"]
pub enum Admitted {
    /// It is on the list, or had been invited before.
    Known,
    /// With an invitation that from now on is its own.
    Invited(InvitationHash),
}

/// It is neither on the list nor invited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not admitted: ask the authority's operator for an invitation, or to be listed")]
pub struct NotAdmitted(pub Identity);

/// More than [`MAX_INVITATIONS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than 1,024 invitations; delete those that were used by members who are listed")]
pub struct TooManyInvitations;

/// An authority's signed word that it admits somebody.
///
/// On the wire 104 bytes: authority (0..32), last epoch for which it holds (32..40), signature
/// (40..104) over `"mixsocks endorsement v1\0"`, length u8 and name of the network, identity, kind
/// (1 mix, 2 gateway, 3 provider), and the epoch. Numbers are big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endorsement {
    /// Who admits.
    pub authority: Identity,
    /// The last epoch for which it holds.
    pub until: u64,
    signature: Signature,
}

impl Invitation {
    /// Draws a new one.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut secret = [0; INVITATION_LEN];
        rng.fill_bytes(&mut secret);
        Self(secret)
    }

    /// Takes the 32 bytes of an invitation.
    pub fn from_bytes(bytes: [u8; INVITATION_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for whom is invited.
    pub fn as_bytes(&self) -> &[u8; INVITATION_LEN] {
        &self.0
    }

    /// What `authority` stores.
    pub fn hash(&self, authority: &Identity) -> InvitationHash {
        self.share(authority).hash_of_share()
    }

    /// What is shown to `authority` by `identity`.
    pub fn present(&self, authority: &Identity, identity: &Identity) -> PresentedInvitation {
        let share = self.share(authority);
        PresentedInvitation(xor(&share.0, &share.hash_of_share().mask(identity)))
    }

    fn share(&self, authority: &Identity) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(SHARE_CONTEXT);
        hasher.update(self.0);
        hasher.update(authority.as_bytes());
        Self(hasher.finalize().into())
    }

    /// The hash of a share.
    fn hash_of_share(&self) -> InvitationHash {
        InvitationHash(Sha256::digest(self.0).into())
    }
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Invitation(secret)")
    }
}

impl InvitationHash {
    /// Takes the 32 bytes of a stored hash.
    pub fn from_bytes(bytes: [u8; INVITATION_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for storage.
    pub fn as_bytes(&self) -> &[u8; INVITATION_LEN] {
        &self.0
    }

    fn mask(&self, identity: &Identity) -> [u8; INVITATION_LEN] {
        let mut hasher = Sha256::new();
        hasher.update(PRESENT_CONTEXT);
        hasher.update(self.0);
        hasher.update(identity.as_bytes());
        hasher.finalize().into()
    }

    fn matches(&self, presented: &PresentedInvitation, identity: &Identity) -> bool {
        let share = Invitation(xor(&presented.0, &self.mask(identity)));
        share.hash_of_share().0.ct_eq(&self.0).into()
    }
}

impl fmt::Debug for InvitationHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InvitationHash(…)")
    }
}

impl PresentedInvitation {
    /// Takes the 32 bytes of the wire.
    pub fn from_bytes(bytes: [u8; INVITATION_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the wire.
    pub fn as_bytes(&self) -> &[u8; INVITATION_LEN] {
        &self.0
    }
}

impl fmt::Debug for PresentedInvitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresentedInvitation(…)")
    }
}

impl Admission {
    /// Admits those on a list, each as one kind of member, and nobody else yet.
    pub fn new(allowed: impl IntoIterator<Item = (Identity, MemberKind)>) -> Self {
        Self { allowed: allowed.into_iter().collect(), invitations: BTreeMap::new() }
    }

    /// Adds an invitation for one member of a kind, and whose it is if it was used.
    ///
    /// # Errors
    /// [`TooManyInvitations`].
    pub fn invite(
        &mut self,
        hash: InvitationHash,
        kind: MemberKind,
        taken_by: Option<Identity>,
    ) -> Result<(), TooManyInvitations> {
        if self.invitations.len() == MAX_INVITATIONS && !self.invitations.contains_key(&hash) {
            return Err(TooManyInvitations);
        }
        self.invitations.insert(hash, Seat { kind, taken_by });
        Ok(())
    }

    /// Whether `identity` is on the list as such a member, or has used an invitation for one.
    pub fn knows(&self, identity: &Identity, kind: MemberKind) -> bool {
        let invited = |seat: &Seat| seat.kind == kind && seat.taken_by.as_ref() == Some(identity);
        self.allowed.get(identity) == Some(&kind) || self.invitations.values().any(invited)
    }

    /// Admits `identity`, with an invitation if it needs one.
    ///
    /// # Errors
    /// [`NotAdmitted`].
    pub fn admit(
        &mut self,
        identity: &Identity,
        kind: MemberKind,
        presented: Option<&PresentedInvitation>,
    ) -> Result<Admitted, NotAdmitted> {
        if self.knows(identity, kind) {
            return Ok(Admitted::Known);
        }
        let presented = presented.ok_or(NotAdmitted(*identity))?;
        let free = |seat: &Seat| seat.kind == kind && seat.taken_by.is_none();
        for (hash, seat) in self.invitations.iter_mut().filter(|(_, seat)| free(seat)) {
            if hash.matches(presented, identity) {
                seat.taken_by = Some(*identity);
                return Ok(Admitted::Invited(*hash));
            }
        }
        Err(NotAdmitted(*identity))
    }
}

impl Endorsement {
    /// Bytes on the wire.
    pub const LEN: usize = KEY_LEN + 8 + SIGNATURE_LEN;

    /// Says that the authority of `key` admits who made `descriptor` until an epoch.
    pub fn new(key: &IdentityKey, descriptor: &Descriptor, until: u64) -> Self {
        let signature = key.sign(&endorsed_bytes(descriptor, until));
        Self { authority: key.identity(), until, signature }
    }

    /// Whether the authority has said so of who made `descriptor`.
    pub fn is_of(&self, descriptor: &Descriptor) -> bool {
        self.authority.verify(&endorsed_bytes(descriptor, self.until), &self.signature).is_ok()
    }

    /// Parses the bytes of the wire; `None` when the authority is no key.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let (authority, rest) = bytes.split_first_chunk::<KEY_LEN>()?;
        let (until, signature) = rest.split_first_chunk::<8>()?;
        Some(Self {
            authority: Identity::from_bytes(*authority).ok()?,
            until: u64::from_be_bytes(*until),
            signature: Signature::from_bytes(signature.try_into().ok()?),
        })
    }

    /// The bytes of the wire.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..KEY_LEN].copy_from_slice(self.authority.as_bytes());
        bytes[KEY_LEN..KEY_LEN + 8].copy_from_slice(&self.until.to_be_bytes());
        bytes[KEY_LEN + 8..].copy_from_slice(self.signature.as_bytes());
        bytes
    }
}

fn endorsed_bytes(descriptor: &Descriptor, until: u64) -> Vec<u8> {
    let network = descriptor.network.as_str().as_bytes();
    let len = u8::try_from(network.len()).expect("a network's name has at most 64 bytes");
    let kind: u8 = match descriptor.kind() {
        MemberKind::Mix => 1,
        MemberKind::Gateway => 2,
        MemberKind::Provider => 3,
    };
    let identity = descriptor.identity.as_bytes();
    [ENDORSE_CONTEXT, &[len], network, identity, &[kind], &until.to_be_bytes()].concat()
}

fn xor(a: &[u8; INVITATION_LEN], b: &[u8; INVITATION_LEN]) -> [u8; INVITATION_LEN] {
    std::array::from_fn(|i| a[i] ^ b[i])
}

#[cfg(test)]
mod tests {
    use super::super::testing::Person;
    use super::*;
    use crate::topology::NetworkName;

    fn identity(seed: u8) -> Identity {
        IdentityKey::from_bytes(&[seed; 32]).identity()
    }

    #[test]
    fn a_list_admits_each_as_one_kind_of_member() {
        let mut admission = Admission::new([(identity(1), MemberKind::Mix)]);
        assert_eq!(admission.admit(&identity(1), MemberKind::Mix, None), Ok(Admitted::Known));
        let refused = |who| Err(NotAdmitted(identity(who)));
        assert_eq!(admission.admit(&identity(1), MemberKind::Gateway, None), refused(1));
        assert_eq!(admission.admit(&identity(2), MemberKind::Mix, None), refused(2));
    }

    #[test]
    fn an_invitation_lets_one_identity_in_and_then_belongs_to_it() {
        let (here, elsewhere) = (identity(100), identity(101));
        let invitation = Invitation::generate(&mut rand::rng());
        let hash = invitation.hash(&here);
        let mut admission = Admission::default();
        admission.invite(hash, MemberKind::Mix, None).unwrap();
        let mut admit = |who, kind, presented: &PresentedInvitation| {
            admission.admit(&identity(who), kind, Some(presented))
        };
        let first = invitation.present(&here, &identity(1));
        // For another kind, as shown to another authority, recorded and shown by another.
        let refused = |who| Err(NotAdmitted(identity(who)));
        assert_eq!(admit(1, MemberKind::Provider, &first), refused(1));
        let other = invitation.present(&elsewhere, &identity(1));
        assert_eq!(admit(1, MemberKind::Mix, &other), refused(1));
        assert_eq!(admit(2, MemberKind::Mix, &first), refused(2));
        // Who knows the stored hash has no invitation.
        let stolen = Invitation::from_bytes(*hash.as_bytes());
        assert_eq!(admit(2, MemberKind::Mix, &stolen.present(&here, &identity(2))), refused(2));
        assert_eq!(admit(1, MemberKind::Mix, &first), Ok(Admitted::Invited(hash)));
        assert_eq!(admit(1, MemberKind::Mix, &first), Ok(Admitted::Known));
        let second = invitation.present(&here, &identity(2));
        assert_eq!(admit(2, MemberKind::Mix, &second), refused(2));
    }

    #[test]
    fn a_used_invitation_stays_used_after_a_restart() {
        let (here, invitation) = (identity(100), Invitation::generate(&mut rand::rng()));
        let mut admission = Admission::default();
        admission.invite(invitation.hash(&here), MemberKind::Mix, Some(identity(1))).unwrap();
        assert!(admission.knows(&identity(1), MemberKind::Mix));
        let presented = invitation.present(&here, &identity(2));
        assert!(admission.admit(&identity(2), MemberKind::Mix, Some(&presented)).is_err());
    }

    #[test]
    fn invitations_are_bounded() {
        let mut admission = Admission::default();
        let hash = |number: usize| {
            let mut bytes = [0; INVITATION_LEN];
            bytes[..8].copy_from_slice(&number.to_be_bytes());
            InvitationHash::from_bytes(bytes)
        };
        for number in 0..MAX_INVITATIONS {
            admission.invite(hash(number), MemberKind::Mix, None).unwrap();
        }
        let one_more = admission.invite(hash(MAX_INVITATIONS), MemberKind::Mix, None);
        assert_eq!(one_more, Err(TooManyInvitations));
        assert_eq!(admission.invite(hash(0), MemberKind::Mix, Some(identity(1))), Ok(()));
    }

    #[test]
    fn an_endorsement_is_bound_to_network_identity_kind_and_epoch() {
        let authority = IdentityKey::from_bytes(&[100; 32]);
        let mix = Person::mix(1).descriptor(0);
        let endorsement = Endorsement::new(&authority, &mix, 7);
        assert!(endorsement.is_of(&mix));
        assert!(endorsement.is_of(&Person::mix(1).descriptor(1000)));
        assert!(!endorsement.is_of(&Person::mix(2).descriptor(0)));
        let mut changed = mix.clone();
        changed.network = NetworkName::new("other").unwrap();
        assert!(!endorsement.is_of(&changed));
        let mut changed = mix.clone();
        changed.member = Person::gateway(1).descriptor(0).member;
        assert!(!endorsement.is_of(&changed));
        assert!(!Endorsement { until: 8, ..endorsement }.is_of(&mix));
        assert!(!Endorsement { authority: identity(101), ..endorsement }.is_of(&mix));
    }

    #[test]
    fn endorsements_round_trip_and_bad_keys_are_refused() {
        let authority = IdentityKey::from_bytes(&[100; 32]);
        let endorsement = Endorsement::new(&authority, &Person::mix(1).descriptor(0), 7);
        let bytes = endorsement.to_bytes();
        assert_eq!(Endorsement::from_bytes(&bytes), Some(endorsement));
        let mut bad = bytes;
        bad[..KEY_LEN].fill(0);
        assert_eq!(Endorsement::from_bytes(&bad), None);
    }

    #[test]
    fn debug_shows_nothing() {
        let invitation = Invitation::from_bytes([0xab; INVITATION_LEN]);
        let texts = [
            format!("{invitation:?}"),
            format!("{:?}", invitation.hash(&identity(1))),
            format!("{:?}", invitation.present(&identity(1), &identity(2))),
        ];
        assert_eq!(texts, ["Invitation(secret)", "InvitationHash(…)", "PresentedInvitation(…)"]);
    }
}
