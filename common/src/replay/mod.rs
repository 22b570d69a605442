//! Replay tags: which packets a node has seen under one of its keys.
//!
//! A tag is kept as its first 8 bytes. Tags are HKDF output, so among n of them an honest packet is
//! taken for a replay with probability n / 2^64, and nobody who does not share the packet's secret
//! can aim at its tag. A sender does know the tags of its own packets, and can search for some
//! that share leading bits; a secret key of the table takes the use out of that.

mod recent;

pub use recent::RecentTags;

use mixsocks_sphinx::ReplayTag;
use rand::{Rng, RngExt};

/// Tags of a table when all shards are as full as they may be on average.
///
/// The longest pause is to move one shard into a larger table: this many words, about 50 µs.
const SHARD_TAGS: usize = 16 * 1024;
/// A shard grows when more than 17 of 20 slots are taken: then a new tag looks at 23 slots on
/// average, which are neighbours in memory.
const MAX_LOAD: (usize, usize) = (17, 20);
/// It grows by a fifth, so that between 71 % and 85 % are taken, and a tag costs 9.4 to 11.3 bytes.
const GROWTH_DIVISOR: usize = 5;
/// Slots of a shard with its first tag.
const FIRST_SLOTS: usize = 8;
/// What an empty slot holds; the tag with this prefix has a place of its own.
const EMPTY: u64 = 0;

/// What to do with a packet that shows a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is new, and remembered from now on.
    Fresh,
    /// It was here before.
    Replayed,
    /// It is new, but no more tags can be remembered: to let it pass would let its replay pass too.
    Full,
}

/// The tags seen under one key.
///
/// Memory is 9.4 to 11.3 bytes per tag beyond the first thousands, and is never given back: a key
/// epoch ends, and its filter with it. Growing happens shard by shard, so that no single insertion
/// takes longer than some 50 µs.
pub struct ReplayFilter {
    shards: Vec<Shard>,
    /// Right shift that leaves the bits that name the shard.
    shard_shift: u32,
    key: [u64; 2],
    has_empty_prefix: bool,
    len: usize,
    max_tags: usize,
}

/// An open-addressing table with linear probing. The slot follows the order of the mixed tags, so
/// that moving to a larger table reads and writes memory in sequence.
#[derive(Default)]
struct Shard {
    slots: Box<[u64]>,
    len: usize,
}

impl ReplayFilter {
    /// A filter that remembers at most `max_tags` tags; `rng` gives the secret key of its table.
    pub fn new(max_tags: usize, rng: &mut impl Rng) -> Self {
        Self::with_key(max_tags, [rng.random(), rng.random()])
    }

    fn with_key(max_tags: usize, key: [u64; 2]) -> Self {
        let shards = max_tags.div_ceil(SHARD_TAGS).max(2).next_power_of_two();
        Self {
            shards: std::iter::repeat_with(Shard::default).take(shards).collect(),
            shard_shift: u64::BITS - shards.trailing_zeros(),
            key,
            has_empty_prefix: false,
            len: 0,
            max_tags,
        }
    }

    /// Judges the packet with this tag, and remembers the tag if it is fresh.
    ///
    /// Ask only for packets whose MAC is right, so that nobody can fill the filter with garbage.
    pub fn insert(&mut self, tag: &ReplayTag) -> Admission {
        self.insert_prefix(tag.prefix())
    }

    /// The same for the prefix of a tag, which is all that a filter keeps: for tags that were
    /// stored.
    pub fn insert_prefix(&mut self, prefix: u64) -> Admission {
        let full = self.len >= self.max_tags;
        if prefix == EMPTY {
            let admission = match (self.has_empty_prefix, full) {
                (true, _) => Admission::Replayed,
                (false, true) => Admission::Full,
                (false, false) => Admission::Fresh,
            };
            if admission == Admission::Fresh {
                self.has_empty_prefix = true;
                self.len += 1;
            }
            return admission;
        }
        let (index, home) = self.place(prefix);
        let (key, shard_bits) = (self.key, u64::BITS - self.shard_shift);
        let home_of = |prefix| mix(prefix, key) << shard_bits;
        let shard = &mut self.shards[index];
        match shard.find(prefix, home) {
            Err(()) => Admission::Replayed,
            Ok(_) if full => Admission::Full,
            Ok(free) => {
                let free = match free {
                    Some(free) if !shard.is_loaded() => free,
                    _ => {
                        shard.grow(home_of);
                        shard.free_slot(home)
                    }
                };
                shard.slots[free] = prefix;
                shard.len += 1;
                self.len += 1;
                Admission::Fresh
            }
        }
    }

    /// Tags remembered.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no tag is remembered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the tables take.
    pub fn memory_bytes(&self) -> usize {
        let slots: usize = self.shards.iter().map(|shard| shard.slots.len()).sum();
        slots * size_of::<u64>() + self.shards.len() * size_of::<Shard>()
    }

    fn contains_prefix(&self, prefix: u64) -> bool {
        if prefix == EMPTY {
            return self.has_empty_prefix;
        }
        let (index, home) = self.place(prefix);
        self.shards[index].find(prefix, home).is_err()
    }

    /// The shard of a tag, and its home there.
    fn place(&self, prefix: u64) -> (usize, u64) {
        let mixed = mix(prefix, self.key);
        let index = usize::try_from(mixed >> self.shard_shift).expect("fewer shards than memory");
        // The bits that named the shard are the same for all of its tags.
        (index, mixed << (u64::BITS - self.shard_shift))
    }
}

/// Shows no tag and no key.
impl std::fmt::Debug for ReplayFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplayFilter")
            .field("len", &self.len)
            .field("max_tags", &self.max_tags)
            .finish_non_exhaustive()
    }
}

impl Shard {
    /// The free slot for a tag, `None` in a table without slots; an error when the tag is there.
    fn find(&self, prefix: u64, home: u64) -> Result<Option<usize>, ()> {
        if self.slots.is_empty() {
            return Ok(None);
        }
        let mut slot = self.home_slot(home);
        loop {
            match self.slots[slot] {
                EMPTY => return Ok(Some(slot)),
                taken if taken == prefix => return Err(()),
                _ => slot = self.next(slot),
            }
        }
    }

    /// The free slot for a tag that is not there, in a table that has room.
    fn free_slot(&self, home: u64) -> usize {
        let mut slot = self.home_slot(home);
        while self.slots[slot] != EMPTY {
            slot = self.next(slot);
        }
        slot
    }

    /// Maps the 64 bits evenly and in order to the slots.
    fn home_slot(&self, home: u64) -> usize {
        let slot = (u128::from(home) * self.slots.len() as u128) >> u64::BITS;
        usize::try_from(slot).expect("less than the number of slots")
    }

    fn next(&self, slot: usize) -> usize {
        if slot + 1 == self.slots.len() { 0 } else { slot + 1 }
    }

    fn is_loaded(&self) -> bool {
        let (taken, of) = MAX_LOAD;
        (self.len + 1) * of > self.slots.len() * taken
    }

    fn grow(&mut self, home: impl Fn(u64) -> u64) {
        let slots = self.slots.len();
        let larger = (slots + slots.div_ceil(GROWTH_DIVISOR)).max(FIRST_SLOTS);
        let old = std::mem::replace(&mut self.slots, vec![EMPTY; larger].into_boxed_slice());
        for prefix in old.into_iter().filter(|prefix| *prefix != EMPTY) {
            let slot = self.free_slot(home(prefix));
            self.slots[slot] = prefix;
        }
    }
}

/// A keyed permutation of the tags: without the key nobody can choose tags that crowd one place.
fn mix(prefix: u64, [a, b]: [u64; 2]) -> u64 {
    let mut x = (prefix ^ a).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 32) ^ b).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::collections::BTreeSet;

    fn filter(max_tags: usize) -> ReplayFilter {
        ReplayFilter::new(max_tags, &mut StdRng::seed_from_u64(1))
    }

    #[test]
    fn each_tag_is_fresh_once() {
        let mut filter = filter(100_000);
        let mut rng = StdRng::seed_from_u64(2);
        let prefixes: Vec<u64> = (0..50_000).map(|_| rng.random()).collect();
        for prefix in &prefixes {
            assert_eq!(filter.insert_prefix(*prefix), Admission::Fresh);
            assert_eq!(filter.insert_prefix(*prefix), Admission::Replayed);
        }
        for prefix in &prefixes {
            assert_eq!(filter.insert_prefix(*prefix), Admission::Replayed);
        }
        assert_eq!(filter.len(), prefixes.len());
    }

    #[test]
    fn the_prefix_of_zeros_counts_like_any_other() {
        let mut filter = filter(2);
        assert!(filter.is_empty());
        assert_eq!(filter.insert_prefix(0), Admission::Fresh);
        assert_eq!(filter.insert_prefix(0), Admission::Replayed);
        assert_eq!(filter.insert_prefix(1), Admission::Fresh);
        assert_eq!(filter.len(), 2);
        assert_eq!(filter.insert_prefix(0), Admission::Replayed);
        let mut full = super::tests::filter(1);
        assert_eq!(full.insert_prefix(1), Admission::Fresh);
        assert_eq!(full.insert_prefix(0), Admission::Full);
    }

    #[test]
    fn at_the_cap_new_tags_are_refused_and_old_ones_still_known() {
        const CAP: u64 = 1000;
        let mut filter = filter(1000);
        for prefix in 1..=CAP {
            assert_eq!(filter.insert_prefix(prefix), Admission::Fresh);
        }
        for prefix in CAP + 1..3 * CAP {
            assert_eq!(filter.insert_prefix(prefix), Admission::Full);
        }
        for prefix in 1..=CAP {
            assert_eq!(filter.insert_prefix(prefix), Admission::Replayed);
        }
        assert_eq!(filter.len(), 1000);
        assert_eq!(super::tests::filter(0).insert_prefix(7), Admission::Full);
    }

    #[test]
    fn a_tag_costs_about_eleven_bytes() {
        let mut filter = filter(1_000_000);
        let mut rng = StdRng::seed_from_u64(3);
        for n in 1..=1_000_000usize {
            assert_eq!(filter.insert_prefix(rng.random()), Admission::Fresh);
            if n >= 200_000 && n.is_multiple_of(10_000) {
                let bytes_per_tag = filter.memory_bytes() as f64 / n as f64;
                assert!((9.0..11.6).contains(&bytes_per_tag), "{n} tags: {bytes_per_tag} bytes");
            }
        }
    }

    /// Tags that a sender has searched for, with the same leading or trailing bits.
    #[test]
    fn chosen_tags_spread_like_others() {
        for chosen in [|n: u64| n + 1, |n: u64| (n + 1) << 40, |n: u64| 0xabcd << 48 | n] {
            let mut filter = filter(64 * SHARD_TAGS);
            for n in 0..100_000 {
                assert_eq!(filter.insert_prefix(chosen(n)), Admission::Fresh);
            }
            let mean = 100_000 / filter.shards.len();
            let largest = filter.shards.iter().map(|shard| shard.len).max().unwrap();
            assert!(largest < mean + mean / 4, "{largest} tags where {mean} are even");
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_bounded_set(
            prefixes in prop::collection::vec(0u64..40, 0..200),
            max_tags in 0usize..50,
            seed: u64,
        ) {
            let mut filter = ReplayFilter::new(max_tags, &mut StdRng::seed_from_u64(seed));
            let mut model = BTreeSet::new();
            for prefix in prefixes {
                let expected = if model.contains(&prefix) {
                    Admission::Replayed
                } else if model.len() >= max_tags {
                    Admission::Full
                } else {
                    model.insert(prefix);
                    Admission::Fresh
                };
                prop_assert_eq!(filter.insert_prefix(prefix), expected);
                prop_assert_eq!(filter.len(), model.len());
            }
        }
    }
}
