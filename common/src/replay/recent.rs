//! Replay tags of the last minutes only, for recipients whose protocol stops older replays by itself.

use std::time::{Duration, Instant};

use mixsocks_sphinx::ReplayTag;
use rand::{Rng, RngExt};

use super::{Admission, ReplayFilter};

/// The tags seen in the last one to two times `span`.
///
/// Two generations of tags: when one is `span` old, the other one is forgotten and takes over. So
/// memory is bounded by what arrives in that time, however long the recipient runs.
#[derive(Debug)]
pub struct RecentTags {
    current: ReplayFilter,
    previous: ReplayFilter,
    key: [u64; 2],
    since: Instant,
    span: Duration,
    max_tags: usize,
}

impl RecentTags {
    /// No tags yet. At most `max_tags` are taken in `span`, beyond that packets are refused.
    pub fn new(now: Instant, span: Duration, max_tags: usize, rng: &mut impl Rng) -> Self {
        let key = [rng.random(), rng.random()];
        let filter = || ReplayFilter::with_key(max_tags, key);
        Self { current: filter(), previous: filter(), key, since: now, span, max_tags }
    }

    /// Judges the packet with this tag, and remembers the tag if it is fresh.
    ///
    /// Ask only for packets whose MAC is right, so that nobody can fill the memory with garbage.
    pub fn insert(&mut self, tag: &ReplayTag, now: Instant) -> Admission {
        self.insert_prefix(tag.prefix(), now)
    }

    fn insert_prefix(&mut self, prefix: u64, now: Instant) -> Admission {
        let age = now.saturating_duration_since(self.since);
        if age >= self.span {
            let fresh = || ReplayFilter::with_key(self.max_tags, self.key);
            let last = std::mem::replace(&mut self.current, fresh());
            self.previous = if age < 2 * self.span { last } else { fresh() };
            self.since = now;
        }
        if self.previous.contains_prefix(prefix) {
            return Admission::Replayed;
        }
        self.current.insert_prefix(prefix)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const SPAN: Duration = Duration::from_secs(600);

    fn tags(now: Instant, max_tags: usize) -> RecentTags {
        RecentTags::new(now, SPAN, max_tags, &mut StdRng::seed_from_u64(1))
    }

    #[test]
    fn a_replay_is_noticed_for_at_least_the_span() {
        let start = Instant::now();
        // Also tags that stand for an empty slot.
        for prefix in [0, 77] {
            for sent in [0, 1, 599, 600] {
                let mut tags = tags(start, 10);
                tags.insert_prefix(1, start);
                let sent = start + Duration::from_secs(sent);
                assert_eq!(tags.insert_prefix(prefix, sent), Admission::Fresh);
                assert_eq!(tags.insert_prefix(prefix, sent), Admission::Replayed);
                let late = sent + SPAN - Duration::from_nanos(1);
                assert_eq!(tags.insert_prefix(prefix, late), Admission::Replayed);
            }
        }
    }

    #[test]
    fn old_tags_are_forgotten_and_make_room() {
        let start = Instant::now();
        let mut tags = tags(start, 2);
        assert_eq!(tags.insert_prefix(1, start), Admission::Fresh);
        assert_eq!(tags.insert_prefix(2, start), Admission::Fresh);
        assert_eq!(tags.insert_prefix(3, start), Admission::Full);
        assert_eq!(tags.insert_prefix(3, start + SPAN), Admission::Fresh);
        assert_eq!(tags.insert_prefix(1, start + SPAN), Admission::Replayed);
        assert_eq!(tags.insert_prefix(1, start + 2 * SPAN), Admission::Fresh);
        assert_eq!(tags.insert_prefix(3, start + 2 * SPAN), Admission::Replayed);
        assert_eq!(tags.insert_prefix(3, start + 5 * SPAN), Admission::Fresh);
    }
}
