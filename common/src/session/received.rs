//! Packets received: duplicates, and the acknowledgements that are owed.

use std::time::{Duration, Instant};

use super::frame::{Ack, MAX_ACK_RANGES, VARINT_END, varint_len};
use super::ranges::RangeSet;

/// Receivers acknowledge within this time, senders count on it. Shorter times cost packets, longer
/// ones slow the growth of windows; 20 ms are under half of one mean trip at 15 ms per mix.
pub const ACK_DELAY: Duration = Duration::from_millis(20);

/// Receivers acknowledge at once when so many packets wait for it.
pub const ACK_AFTER_PACKETS: u32 = 64;

/// Most packets ahead of the lowest missing one that a receiver keeps book of. The largest window is
/// far below; a peer beyond it breaks the protocol, and the packet is dropped.
pub const MAX_NUMBER_SPAN: u64 = 1 << 20;

/// The numbers that one side has received, and what it owes the sender.
#[derive(Debug, Default)]
pub(super) struct Received {
    numbers: RangeSet,
    floor: u64,
    /// Packets below it that have not arrived are not waited for; never below the floor.
    settled: u64,
    /// Packets from `settled` on that have arrived.
    arrived: u64,
    latest: Option<(u64, Instant)>,
    unacked: u32,
    oldest_unacked: Option<Instant>,
    /// Something arrived since the last ACK, if only packets that do not ask for one.
    news: bool,
    /// Where the next ACK begins when the last one had no room for all ranges.
    resume: Option<u64>,
}

impl Received {
    /// Notes a packet; `false` when it is a duplicate, or too old to tell.
    pub(super) fn on_packet(&mut self, number: u64, floor: u64, now: Instant) -> bool {
        if number < self.floor || number > self.floor + MAX_NUMBER_SPAN || floor > number {
            return false;
        }
        if !self.numbers.insert(number..number + 1) {
            return false;
        }
        self.arrived += u64::from(number >= self.settled);
        if floor > self.floor {
            self.settle_below(floor);
            self.floor = floor;
            self.numbers.remove(0..floor);
        }
        self.latest = Some((number, now));
        self.news = true;
        true
    }

    /// The packet that was noted last wants to be acknowledged, or others were given up.
    pub(super) fn owe_ack(&mut self, now: Instant) {
        self.unacked += 1;
        self.news = true;
        self.oldest_unacked.get_or_insert(now);
    }

    /// When an ACK must leave.
    pub(super) fn ack_due(&self) -> Option<Instant> {
        let oldest = self.oldest_unacked?;
        Some(if self.unacked >= ACK_AFTER_PACKETS { oldest } else { oldest + ACK_DELAY })
    }

    /// Whether an ACK would say something new.
    pub(super) fn has_news(&self) -> bool {
        self.news
    }

    /// One past the highest number received.
    pub(super) fn end(&self) -> u64 {
        self.numbers.end().max(self.floor)
    }

    /// Packets below `number` that have not arrived are not waited for any longer, which the next
    /// ACK tells; whether there were any.
    pub(super) fn settle_below(&mut self, number: u64) -> bool {
        if number <= self.settled {
            return false;
        }
        let arrived = self.numbers.count_within(self.settled..number);
        let gave_up = arrived < number - self.settled;
        self.arrived -= arrived;
        self.settled = number;
        gave_up
    }

    /// How many packets are missing that may still arrive.
    pub(super) fn missing(&self) -> u64 {
        self.end().max(self.settled) - self.settled - self.arrived
    }

    /// An ACK that fits into `max_bytes`; what does not fit is left for the next one.
    pub(super) fn ack(&mut self, now: Instant, max_bytes: usize) -> Option<Ack> {
        let (latest, at) = self.latest?;
        let budget = max_bytes.checked_sub(Ack::MAX_HEADER_LEN)?;
        let first = self.resume.take().map_or(self.floor, |resume| resume.max(self.floor));
        let mut ranges = Vec::new();
        let mut bytes = 0;
        let mut position = first;
        let mut end = self.numbers.end().max(first);
        for range in self.numbers.iter_from(first) {
            let range = range.start.max(first)..range.end;
            let (gap, len) = (range.start - position, range.end - range.start);
            bytes += varint_len(gap) + varint_len(len);
            if bytes > budget || ranges.len() == MAX_ACK_RANGES {
                // The gap before this range is still told.
                end = range.start;
                self.resume = Some(range.start);
                break;
            }
            position = range.end;
            ranges.push(range);
        }
        let delay = now.saturating_duration_since(at);
        // The rest follows in further ACKs, so that what is owed stays owed.
        if self.resume.is_none() {
            self.unacked = 0;
            self.oldest_unacked = None;
            self.news = false;
        }
        Some(Ack {
            latest,
            delay_us: u64::try_from(delay.as_micros()).unwrap_or(u64::MAX).min(VARINT_END - 1),
            first,
            end,
            settled: self.settled.clamp(first, end),
            ranges,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receivers_forget_below_the_floor() {
        let now = Instant::now();
        let mut received = Received::default();
        assert!(received.on_packet(7, 0, now));
        assert!(received.on_packet(9, 8, now));
        assert!(!received.on_packet(3, 0, now), "below the floor a replay cannot be told");
        assert!(!received.on_packet(10, 11, now), "a floor above its own packet");
        assert!(!received.on_packet(9 + MAX_NUMBER_SPAN, 8, now), "too far ahead");
        let ack = received.ack(now, 1000).unwrap();
        assert_eq!((ack.first, ack.end), (8, 10));
        assert!(ack.ranges.into_iter().eq(std::iter::once(9..10)));
    }

    #[test]
    fn acks_are_owed_for_a_while_or_for_many() {
        let now = Instant::now();
        let mut received = Received::default();
        assert_eq!(received.ack_due(), None);
        received.on_packet(0, 0, now);
        assert_eq!(received.ack_due(), None);
        received.owe_ack(now);
        assert_eq!(received.ack_due(), Some(now + ACK_DELAY));
        for number in 1..u64::from(ACK_AFTER_PACKETS) {
            received.on_packet(number, 0, now);
            received.owe_ack(now);
        }
        assert_eq!(received.ack_due(), Some(now));
        assert!(received.ack(now, 1000).is_some());
        assert_eq!(received.ack_due(), None);
        assert!(!received.has_news());
    }

    #[test]
    fn what_is_missing_may_still_come_until_it_is_settled() {
        let now = Instant::now();
        let mut received = Received::default();
        for number in [0, 1, 4, 5, 9] {
            assert!(received.on_packet(number, 0, now));
        }
        assert_eq!(received.missing(), 5);
        received.settle_below(5);
        assert_eq!(received.missing(), 3, "6, 7 and 8");
        let ack = received.ack(now, 1000).unwrap();
        assert_eq!((ack.first, ack.settled, ack.end), (0, 5, 10));
        assert!(received.on_packet(2, 0, now), "late, but good");
        assert_eq!(received.missing(), 3);
        assert!(received.on_packet(10, 8, now), "a floor settles what is below");
        assert_eq!(received.missing(), 1);
        received.settle_below(20);
        assert_eq!(received.missing(), 0);
        assert!(received.on_packet(12, 8, now));
        assert_eq!(received.missing(), 0);
        assert!(received.on_packet(21, 8, now));
        assert_eq!(received.missing(), 1);
    }

    /// An ACK without room for all ranges settles nothing that it does not tell about.
    #[test]
    fn an_ack_settles_only_what_it_tells_about() {
        let now = Instant::now();
        let mut received = Received::default();
        (0..1000).for_each(|n| assert!(received.on_packet(2 * n, 0, now)));
        received.settle_below(1500);
        let (mut end, mut acks) = (0, 0);
        while received.has_news() {
            let ack = received.ack(now, 300).unwrap();
            assert_eq!(ack.first, end);
            assert_eq!(ack.settled, ack.end.min(1500).max(ack.first));
            (end, acks) = (ack.end, acks + 1);
        }
        assert!(acks > 3);
        assert_eq!(end, 1999);
    }
}
