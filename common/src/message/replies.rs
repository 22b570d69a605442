//! SURBs that others gave for replies, by sender_tag.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_sphinx::Surb;

use super::{MAX_REPLY_SURBS, ReplySurbs, SenderTag};

/// Most SURBs that are kept for one sender: what two messages can bring, 0.8 MB.
pub const MAX_SURBS_PER_SENDER: usize = 2 * MAX_REPLY_SURBS;

/// Most SURBs that are kept in all: 26 MB.
pub const MAX_REPLY_SURBS_KEPT: usize = 64 * 1024;

/// Most senders whose SURBs are kept.
pub const MAX_SENDERS: usize = 4096;

/// SURBs that only requests for more may use, as several may be lost: so many, or a quarter of what a
/// sender has given, so that a single SURB still carries a reply.
pub const RESERVED_FOR_REQUESTS: usize = 4;

/// A request is repeated after this time at first, and after twice as long each time, up to the most: as
/// the sender answers with a message that takes a round trip and may have to be repeated itself.
const REQUEST_AGAIN: Duration = Duration::from_secs(3);
const MAX_REQUEST_AGAIN: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Stock {
    surbs: VecDeque<(u64, Surb)>,
    /// How many there have ever been.
    given: usize,
    /// When it was last used or added to, as a number that counts up.
    used: u64,
    /// No request before; how many were in vain.
    next_request: Option<Instant>,
    requests: u32,
}

/// The SURBs of all senders. The sender that was not heard of or answered for longest goes first.
#[derive(Debug, Default)]
pub(super) struct ReplyStock {
    senders: BTreeMap<SenderTag, Stock>,
    by_use: BTreeMap<u64, SenderTag>,
    uses: u64,
    surbs: usize,
    oldest_epoch: u64,
}

impl ReplyStock {
    /// SURBs in all, and senders.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.surbs, self.senders.len())
    }

    pub(super) fn knows(&self, tag: SenderTag) -> bool {
        self.senders.contains_key(&tag)
    }

    /// How many SURBs of the sender may be used for fragments.
    pub(super) fn available(&self, tag: SenderTag) -> usize {
        let available = |stock: &Stock| {
            stock.surbs.len().saturating_sub(RESERVED_FOR_REQUESTS.min(stock.given / 4))
        };
        self.senders.get(&tag).map_or(0, available)
    }

    /// Whether there is a SURB for a fragment, or for a request that may be sent now.
    pub(super) fn can_send(&self, now: Instant, tag: SenderTag) -> bool {
        let may_request = |stock: &Stock| {
            !stock.surbs.is_empty() && stock.next_request.is_none_or(|next| next <= now)
        };
        self.available(tag) > 0 || self.senders.get(&tag).is_some_and(may_request)
    }

    /// Adds what a sender sent. What there is no room for, what is no SURB, and what leads to nowhere by
    /// now is thrown away; returns how many were.
    pub(super) fn add(&mut self, given: &ReplySurbs<'_>) -> usize {
        let tag = given.sender_tag;
        self.touch(tag);
        let stock = self.senders.entry(tag).or_default();
        let mut refused = 0;
        for bytes in given.surbs {
            match Surb::from_bytes(bytes) {
                Ok(surb)
                    if given.key_epoch >= self.oldest_epoch
                        && stock.surbs.len() < MAX_SURBS_PER_SENDER =>
                {
                    stock.surbs.push_back((given.key_epoch, surb));
                    self.surbs += 1;
                    stock.given += 1;
                    stock.next_request = None;
                    stock.requests = 0;
                }
                _ => refused += 1,
            }
        }
        while self.surbs > MAX_REPLY_SURBS_KEPT || self.senders.len() > MAX_SENDERS {
            self.forget_oldest();
        }
        refused
    }

    /// Takes the SURB for a fragment. The first ones come first, as they lead to nowhere first.
    pub(super) fn pop(&mut self, tag: SenderTag) -> Option<Surb> {
        if self.available(tag) == 0 {
            return None;
        }
        self.pop_any(tag)
    }

    /// Takes the SURB for a request, if one is to be sent now because `needed` SURBs are missing: also
    /// returns how many to ask for.
    pub(super) fn request(
        &mut self,
        now: Instant,
        tag: SenderTag,
        needed: usize,
    ) -> Option<(Surb, u16)> {
        let missing = needed.saturating_sub(self.available(tag));
        let stock = self.senders.get_mut(&tag)?;
        if missing == 0 || stock.next_request.is_some_and(|next| now < next) {
            return None;
        }
        if stock.surbs.is_empty() {
            return None;
        }
        let wait = (REQUEST_AGAIN * (1 << stock.requests.min(5))).min(MAX_REQUEST_AGAIN);
        stock.next_request = Some(now + wait);
        stock.requests += 1;
        // Half as many again: some replies are lost and need another one.
        let number = (missing + missing / 2 + RESERVED_FOR_REQUESTS).min(MAX_REPLY_SURBS);
        let surb = self.pop_any(tag)?;
        Some((surb, u16::try_from(number).expect("so many fit a message")))
    }

    /// When another request may be sent, if SURBs of the sender are there for it.
    pub(super) fn next_request(&self, tag: SenderTag) -> Option<Instant> {
        let stock = self.senders.get(&tag)?;
        stock.next_request.filter(|_| !stock.surbs.is_empty())
    }

    /// Nodes have no keys of earlier epochs any more: those SURBs lead to nowhere.
    pub(super) fn forget_before(&mut self, key_epoch: u64) {
        self.oldest_epoch = key_epoch;
        for stock in self.senders.values_mut() {
            stock.surbs.retain(|(epoch, _)| *epoch >= key_epoch);
        }
        self.surbs = self.senders.values().map(|stock| stock.surbs.len()).sum();
    }

    fn pop_any(&mut self, tag: SenderTag) -> Option<Surb> {
        let (_, surb) = self.senders.get_mut(&tag)?.surbs.pop_front()?;
        self.surbs -= 1;
        self.touch(tag);
        Some(surb)
    }

    fn touch(&mut self, tag: SenderTag) {
        let stock = self.senders.entry(tag).or_default();
        self.by_use.remove(&stock.used);
        self.uses += 1;
        stock.used = self.uses;
        self.by_use.insert(self.uses, tag);
    }

    fn forget_oldest(&mut self) {
        if let Some((_, tag)) = self.by_use.pop_first()
            && let Some(stock) = self.senders.remove(&tag)
        {
            self.surbs -= stock.surbs.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_sphinx::SURB_LEN;

    use super::super::testing::{made_surb, surb_number};
    use super::*;

    fn tag(number: u16) -> SenderTag {
        let mut tag = [0; 16];
        tag[..2].copy_from_slice(&number.to_be_bytes());
        SenderTag(tag)
    }

    fn surbs(numbers: std::ops::Range<u64>) -> Vec<[u8; SURB_LEN]> {
        numbers.map(|number| *made_surb(number, 0).surb.as_bytes()).collect()
    }

    fn given(sender: u16, key_epoch: u64, surbs: &[[u8; SURB_LEN]]) -> ReplySurbs<'_> {
        ReplySurbs { sender_tag: tag(sender), key_epoch, surbs }
    }

    #[test]
    fn the_first_are_used_first_and_some_are_kept_for_requests() {
        let now = Instant::now();
        let mut stock = ReplyStock::default();
        stock.add(&given(1, 0, &surbs(0..16)));
        let used: Vec<_> = std::iter::from_fn(|| stock.pop(tag(1))).collect();
        let used: Vec<_> = used.iter().map(surb_number).collect();
        assert_eq!(used, Vec::from_iter(0..12));
        let (surb, number) = stock.request(now, tag(1), 10).unwrap();
        assert_eq!((surb_number(&surb), number), (12, 19));
    }

    #[test]
    fn a_single_surb_carries_a_reply() {
        let mut stock = ReplyStock::default();
        stock.add(&given(1, 0, &surbs(0..1)));
        assert!(stock.pop(tag(1)).is_some());
        assert!(stock.pop(tag(1)).is_none());
    }

    #[test]
    fn requests_are_rare_and_rarer_each_time() {
        let now = Instant::now();
        let mut stock = ReplyStock::default();
        stock.add(&given(1, 0, &surbs(0..4)));
        assert!(stock.request(now, tag(1), 10).is_some());
        assert!(stock.request(now, tag(1), 10).is_none());
        assert_eq!(stock.next_request(tag(1)), Some(now + REQUEST_AGAIN));
        let later = now + REQUEST_AGAIN;
        assert!(stock.request(later, tag(1), 10).is_some());
        assert_eq!(stock.next_request(tag(1)), Some(later + 2 * REQUEST_AGAIN));
        stock.add(&given(1, 0, &surbs(4..8)));
        assert!(stock.request(later, tag(1), 10).is_some(), "the sender has answered");
    }

    #[test]
    fn surbs_that_do_not_parse_or_are_too_many_or_too_old_are_refused() {
        let mut stock = ReplyStock::default();
        assert_eq!(stock.add(&given(1, 0, &[[0; SURB_LEN]])), 1);
        let many = surbs(0..1024);
        assert_eq!(stock.add(&given(1, 1, &many)), 0);
        assert_eq!(stock.add(&given(1, 2, &many)), 0);
        assert_eq!(stock.add(&given(1, 2, &many)), 1024);
        assert_eq!(stock.counts(), (MAX_SURBS_PER_SENDER, 1));
        stock.forget_before(2);
        assert_eq!(stock.counts(), (1024, 1));
        assert_eq!(stock.add(&given(1, 1, &many)), 1024, "they lead to nowhere");
    }

    #[test]
    fn senders_that_were_not_heard_of_for_longest_go() {
        let mut stock = ReplyStock::default();
        let many = surbs(0..1024);
        for sender in 0..64 {
            stock.add(&given(sender, 0, &many));
        }
        assert_eq!(stock.counts(), (MAX_REPLY_SURBS_KEPT, 64));
        assert!(stock.pop(tag(0)).is_some());
        stock.add(&given(64, 0, &many));
        assert!(stock.knows(tag(0)), "it was answered");
        assert!(!stock.knows(tag(1)));
        for sender in 0..5000 {
            stock.add(&given(sender, 0, &surbs(0..1)));
        }
        assert_eq!(stock.counts().1, MAX_SENDERS);
        assert_eq!(stock.by_use.len(), MAX_SENDERS);
    }
}
