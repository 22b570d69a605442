//! The directory: how the authorities of a network make its document of each epoch together, and how
//! everybody else keeps up with it.
//!
//! Members publish a [`SignedDescriptor`] to every authority and collect the [`Endorsement`]s that
//! admit them. In each epoch's round one [`Authority`] after the other may propose what [`assemble`]
//! makes of the descriptors that it holds; the others [`check`] it and vote. Once enough of them have
//! voted for one document, those that did sign it. A [`Follower`] takes what enough have signed.
//!
//! `docs/directory.md` states the rules, the messages byte by byte, and what liars can do.

mod admission;
mod assembly;
mod authority;
mod descriptor;
mod follower;
mod layers;
mod members;
mod message;
mod round;
mod rules;
mod signed_rules;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod testing;
mod upload;

use std::time::Duration;

pub use admission::{
    Admission, Admitted, Endorsement, INVITATION_LEN, Invitation, InvitationHash, MAX_INVITATIONS,
    NotAdmitted, PresentedInvitation, TooManyInvitations,
};
pub use assembly::{AssemblyError, Candidate, CandidateError, CheckError, assemble, check};
pub use authority::{
    Authority, AuthorityStatus, Memory, MessageError, NewAuthorityError, Output, PublishError,
    Published,
};
pub use descriptor::{
    AddressRule, Descriptor, DescriptorError, Hop, MAX_DESCRIPTOR_BYTES, MAX_KEYS,
    MAX_POLICY_BYTES, Member, MemberKind, SignedDescriptor,
};
pub use follower::{Follower, News, Pace, Refused};
pub use message::MAX_MESSAGE_BYTES;
pub use rules::{
    DESCRIPTOR_EPOCHS, ENDORSED_EPOCHS, MAX_AUTHORITIES, Minimum, Rules, RulesError, Settings,
};

pub use signed_rules::{SignedRules, SignedRulesError};
pub use upload::{BadUpload, MAX_UPLOAD_BYTES, Upload};

/// How far clocks may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(120);
/// Most descriptors that an authority holds, and a document is made of: with these, all of the
/// greatest size, document and proposal stay below their bounds.
pub const MAX_HELD: usize = 8192;
