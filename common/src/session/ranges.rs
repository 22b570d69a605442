//! A set of whole numbers as ranges: packet numbers received, bytes acknowledged, streams closed.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, non-adjacent ranges of `u64`. Each operation is O(log n) in the number of ranges, plus
/// the ranges that it merges or removes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Start to end (exclusive).
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many ranges the set consists of.
    pub fn range_count(&self) -> usize {
        self.ranges.len()
    }

    /// The ranges in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// The ranges that end after `from`, in ascending order; the first may begin before it.
    pub fn iter_from(&self, from: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.range_at_or_before(from).filter(|range| range.end > from);
        let rest = self.ranges.range(from.saturating_add(1)..).map(|(&start, &end)| start..end);
        first.into_iter().chain(rest)
    }

    /// The lowest range.
    pub fn first(&self) -> Option<Range<u64>> {
        self.ranges.first_key_value().map(|(&start, &end)| start..end)
    }

    /// One past the highest number.
    pub fn end(&self) -> u64 {
        self.ranges.last_key_value().map_or(0, |(_, &end)| end)
    }

    /// Whether `value` is in the set.
    pub fn contains(&self, value: u64) -> bool {
        self.range_at_or_before(value).is_some_and(|range| value < range.end)
    }

    /// Adds `range`; whether anything in it is new.
    pub fn insert(&mut self, range: Range<u64>) -> bool {
        let Range { start, end } = range;
        if start >= end {
            return false;
        }
        // It lengthens the range that it begins in or behind, or is one of its own.
        let first = match self.ranges.range_mut(..=start).next_back() {
            Some((&first, before_end)) if *before_end >= start => {
                if *before_end >= end {
                    return false;
                }
                *before_end = end;
                first
            }
            _ => {
                self.ranges.insert(start, end);
                start
            }
        };
        // It swallows the ranges that it reaches; only the last of them can go further than it does.
        while let Some((&next, &next_end)) = self.ranges.range(first + 1..=end).next() {
            self.ranges.remove(&next);
            if next_end > end {
                self.ranges.insert(first, next_end);
                break;
            }
        }
        true
    }

    /// Takes `range` out of the set.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        if let Some(before) = self.range_at_or_before(range.start)
            && before.end > range.start
        {
            self.ranges.remove(&before.start);
            if before.start < range.start {
                self.ranges.insert(before.start, range.start);
            }
            if before.end > range.end {
                self.ranges.insert(range.end, before.end);
                return;
            }
        }
        while let Some((&start, &end)) = self.ranges.range(range.start..range.end).next() {
            self.ranges.remove(&start);
            if end > range.end {
                self.ranges.insert(range.end, end);
                return;
            }
        }
    }

    /// How many numbers of `range` are in the set.
    pub fn count_within(&self, range: Range<u64>) -> u64 {
        self.iter_from(range.start)
            .take_while(|part| part.start < range.end)
            .map(|part| part.end.min(range.end) - part.start.max(range.start))
            .sum()
    }

    fn range_at_or_before(&self, value: u64) -> Option<Range<u64>> {
        self.ranges.range(..=value).next_back().map(|(&start, &end)| start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(ops: Vec<(bool, u8, u8)>, probe: u8) {
            let mut ranges = RangeSet::new();
            let mut model = BTreeSet::new();
            for (insert, start, len) in ops {
                let range = u64::from(start)..u64::from(start) + u64::from(len % 20);
                if insert {
                    let fresh = range.clone().any(|n| !model.contains(&n));
                    prop_assert_eq!(ranges.insert(range.clone()), fresh);
                    model.extend(range);
                } else {
                    ranges.remove(range.clone());
                    model.retain(|n| !range.contains(n));
                }
                let listed: Vec<u64> = ranges.iter().flatten().collect();
                prop_assert_eq!(&listed, &model.iter().copied().collect::<Vec<_>>());
                for (a, b) in ranges.iter().zip(ranges.iter().skip(1)) {
                    prop_assert!(a.end < b.start);
                }
                prop_assert_eq!(ranges.end(), model.last().map_or(0, |n| n + 1));
            }
            let probe = u64::from(probe);
            prop_assert_eq!(ranges.contains(probe), model.contains(&probe));
            prop_assert_eq!(
                ranges.count_within(probe..probe + 30),
                model.range(probe..probe + 30).count() as u64
            );
            let from: Vec<u64> = ranges.iter_from(probe).flatten().filter(|n| *n >= probe).collect();
            prop_assert_eq!(from, model.range(probe..).copied().collect::<Vec<_>>());
        }
    }
}
