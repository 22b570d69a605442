//! Whom a client has given SURBs to, under which sender_tags.

use std::collections::BTreeMap;

use rand::{Rng, RngExt};

use super::{MAX_REPLY_SURBS, SENDER_TAG_LEN, SenderTag};
use crate::address::Address;

/// Most recipients whose sender_tags are remembered: who is written to again later gets a new one.
pub const MAX_CONVERSATIONS: usize = 1024;

/// SURBs that a recipient is given on request whether or not it has answered: four messages' worth.
pub const REFILL_ALLOWANCE: usize = 4 * MAX_REPLY_SURBS;

/// SURBs that a recipient is given on request for each answer that came, as some get lost.
pub const REFILL_FACTOR: usize = 2;

#[derive(Debug)]
struct Conversation {
    tag: SenderTag,
    used: u64,
    /// SURBs sent on request, and what came by SURBs.
    refilled: usize,
    came: usize,
    /// What was asked for and not given yet.
    wanted: usize,
}

/// The recipients of messages with SURBs; the one not written to for longest is forgotten first.
#[derive(Debug, Default)]
pub(super) struct Conversations {
    by_address: BTreeMap<Address, Conversation>,
    uses: u64,
}

impl Conversations {
    pub(super) fn len(&self) -> usize {
        self.by_address.len()
    }

    /// The tag for this recipient, drawn when it is first written to.
    pub(super) fn tag(&mut self, rng: &mut impl Rng, address: Address) -> SenderTag {
        self.uses += 1;
        let used = self.uses;
        let new = || {
            let mut tag = [0; SENDER_TAG_LEN];
            rng.fill(&mut tag);
            Conversation { tag: SenderTag(tag), used, refilled: 0, came: 0, wanted: 0 }
        };
        let conversation = self.by_address.entry(address).or_insert_with(new);
        conversation.used = used;
        let tag = conversation.tag;
        if self.by_address.len() > MAX_CONVERSATIONS {
            let oldest = self.by_address.iter().min_by_key(|(_, conversation)| conversation.used);
            if let Some(oldest) = oldest.map(|(address, _)| *address) {
                self.by_address.remove(&oldest);
            }
        }
        tag
    }

    /// Something came by a SURB that this recipient was given.
    pub(super) fn on_reply(&mut self, address: &Address) {
        if let Some(conversation) = self.by_address.get_mut(address) {
            conversation.came += 1;
        }
    }

    /// The recipient asks for SURBs. It gets no more than its allowance and some for each answer, so that
    /// it cannot hoard them.
    pub(super) fn on_request(&mut self, address: &Address, number: u16) {
        if let Some(conversation) = self.by_address.get_mut(address) {
            conversation.wanted = usize::from(number).min(MAX_REPLY_SURBS);
        }
    }

    /// SURBs that this recipient asked for are sent.
    pub(super) fn on_refill(&mut self, address: &Address, surbs: usize) {
        if let Some(conversation) = self.by_address.get_mut(address) {
            conversation.refilled += surbs;
        }
    }

    /// The next recipient that is to be given SURBs, and how many.
    pub(super) fn poll_wanted(
        &mut self,
        is_busy: impl Fn(&Address) -> bool,
    ) -> Option<(Address, usize)> {
        let granted = |(address, conversation): (&Address, &mut Conversation)| {
            let granted = conversation.wanted.min(conversation.left());
            (granted > 0 && !is_busy(address)).then(|| {
                conversation.wanted = 0;
                (*address, granted)
            })
        };
        self.by_address.iter_mut().find_map(granted)
    }
}

impl Conversation {
    /// How many SURBs may still be sent on request.
    fn left(&self) -> usize {
        (REFILL_ALLOWANCE + REFILL_FACTOR * self.came).saturating_sub(self.refilled)
    }
}
