//! Packets under way: numbers, acknowledgements, and loss judged by time.
//!
//! Order means nothing in a mixnet, so a packet is never lost because later ones arrived. It is
//! lost when it should have been acknowledged by now: by a reply that left the peer after the
//! packet was due there, or by no reply at all within the longest time that one may take.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::frame::{Ack, MAX_ACK_RANGES, StreamId};
use super::halves::Piece;
use super::ranges::RangeSet;

/// Receivers acknowledge within this time, senders count on it. Shorter times cost packets, longer
/// ones slow the growth of windows; 20 ms are under half of one mean trip at 15 ms per mix.
pub const ACK_DELAY: Duration = Duration::from_millis(20);

/// Receivers acknowledge at once when so many packets wait for it.
pub const ACK_AFTER_PACKETS: u32 = 64;

/// What a packet carried that must be repeated when it is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cargo {
    Open(StreamId),
    Opened(StreamId),
    Data(StreamId, Piece),
    Credit(StreamId),
    Reset(StreamId),
    Close,
}

/// A packet that waits for its acknowledgement.
#[derive(Clone, Debug)]
pub(super) struct Sent {
    pub(super) at: Instant,
    /// When it reaches the peer by the delays that the sender chose, without queueing and wires. A
    /// sender that did not choose them takes the time of sending.
    pub(super) arrives: Instant,
    pub(super) cargo: Vec<Cargo>,
    pub(super) surbs: usize,
}

/// What an acknowledgement brought.
#[derive(Debug, Default)]
pub(super) struct Acked {
    pub(super) packets: Vec<Sent>,
    /// The packet that the peer received last, when this is the first news of it.
    pub(super) latest: Option<Sent>,
}

/// The packets that one side has sent and not heard of.
#[derive(Debug, Default)]
pub(super) struct Flight {
    next: u64,
    sent: BTreeMap<u64, Sent>,
    by_arrival: BTreeSet<(Instant, u64)>,
    surbs: usize,
}

impl Flight {
    /// The number of the next packet.
    pub(super) fn next_number(&self) -> u64 {
        self.next
    }

    /// The lowest number that still matters: the peer may forget everything below.
    pub(super) fn floor(&self) -> u64 {
        self.sent.first_key_value().map_or(self.next, |(&number, _)| number)
    }

    /// Packets under way that elicit acknowledgements.
    pub(super) fn len(&self) -> usize {
        self.sent.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty()
    }

    /// SURBs in packets that have not been heard of.
    pub(super) fn surbs(&self) -> usize {
        self.surbs
    }

    /// SURBs in packets that reach the peer after `time`.
    pub(super) fn surbs_arriving_after(&self, time: Instant) -> usize {
        self.by_arrival
            .range((time, u64::MAX)..)
            .filter_map(|(_, number)| self.sent.get(number))
            .map(|sent| sent.surbs)
            .sum()
    }

    /// Uses up the next number; `sent` is kept when the packet elicits an acknowledgement.
    pub(super) fn on_sent(&mut self, sent: Option<Sent>) {
        if let Some(sent) = sent {
            self.by_arrival.insert((sent.arrives, self.next));
            self.surbs += sent.surbs;
            self.sent.insert(self.next, sent);
        }
        self.next += 1;
    }

    /// Takes out what an ACK names; `None` when it names a packet that was never sent.
    ///
    /// O(log n) for each range, plus the packets that are acknowledged for the first time.
    pub(super) fn on_ack(&mut self, ack: &Ack) -> Option<Acked> {
        if ack.latest >= self.next.max(1) || ack.end > self.next {
            return None;
        }
        let mut acked = Acked::default();
        for range in &ack.ranges {
            while let Some((&number, _)) = self.sent.range(range.clone()).next() {
                let sent = self.take(number);
                if number == ack.latest {
                    acked.latest = Some(sent.clone());
                }
                acked.packets.push(sent);
            }
        }
        Some(acked)
    }

    /// Takes out the packets that were due at the peer by `cutoff`, and that an ACK telling about
    /// `first..end` does not name.
    pub(super) fn lost_by_ack(&mut self, cutoff: Instant, ack: &Ack) -> Vec<Sent> {
        let lost: Vec<u64> = self
            .by_arrival
            .range(..=(cutoff, u64::MAX))
            .map(|&(_, number)| number)
            .filter(|number| (ack.first..ack.end).contains(number))
            .collect();
        lost.into_iter().map(|number| self.take(number)).collect()
    }

    /// Takes out the packets that were due at the peer by `cutoff`.
    pub(super) fn lost_by_time(&mut self, cutoff: Instant) -> Vec<Sent> {
        let mut lost = Vec::new();
        while let Some(&(arrives, number)) = self.by_arrival.first()
            && arrives <= cutoff
        {
            lost.push(self.take(number));
        }
        lost
    }

    /// When the first packet under way reaches the peer.
    pub(super) fn first_arrival(&self) -> Option<Instant> {
        self.by_arrival.first().map(|&(arrives, _)| arrives)
    }

    fn take(&mut self, number: u64) -> Sent {
        let sent = self.sent.remove(&number).expect("both maps hold the same packets");
        self.by_arrival.remove(&(sent.arrives, number));
        self.surbs -= sent.surbs;
        sent
    }
}

/// Most packets ahead of the lowest missing one that a receiver keeps book of. The largest window is
/// far below; a peer beyond it breaks the protocol, and the packet is dropped.
pub const MAX_NUMBER_SPAN: u64 = 1 << 20;

/// The numbers that one side has received, and what it owes the sender.
#[derive(Debug, Default)]
pub(super) struct Received {
    numbers: RangeSet,
    floor: u64,
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
        if floor > self.floor {
            self.floor = floor;
            self.numbers.remove(0..floor);
        }
        self.latest = Some((number, now));
        self.news = true;
        true
    }

    /// The packet that was noted last wants to be acknowledged.
    pub(super) fn owe_ack(&mut self, now: Instant) {
        self.unacked += 1;
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

    /// How many of the numbers from `start` on were received.
    pub(super) fn count_from(&self, start: u64) -> u64 {
        self.numbers.count_within(start..u64::MAX)
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
            bytes += super::frame::varint_len(gap) + super::frame::varint_len(len);
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
            delay_us: u64::try_from(delay.as_micros())
                .unwrap_or(u64::MAX)
                .min(super::frame::VARINT_END - 1),
            first,
            end,
            ranges,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};

    fn sent(at: Instant, arrives: Instant) -> Sent {
        Sent { at, arrives, cargo: vec![], surbs: 1 }
    }

    #[test]
    fn ten_thousand_packets_in_any_order() {
        let start = Instant::now();
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut flight = Flight::default();
        let mut received = Received::default();
        for _ in 0..10_000 {
            flight.on_sent(Some(sent(start, start)));
        }
        let mut numbers: Vec<u64> = (0..10_000).collect();
        numbers.shuffle(&mut rng);
        let lost: Vec<u64> = numbers.split_off(9_900);
        for number in numbers {
            assert!(received.on_packet(number, 0, start));
            assert!(!received.on_packet(number, 0, start), "a duplicate is noticed");
            received.owe_ack(start);
            // Far too little room for all ranges: several ACKs tell them.
            if rng.random_bool(0.02)
                && let Some(ack) = received.ack(start, 200)
            {
                flight.on_ack(&ack).unwrap();
            }
        }
        for _ in 0..200 {
            let ack = received.ack(start, 200).unwrap();
            flight.on_ack(&ack).unwrap();
        }
        assert_eq!(flight.len(), lost.len());
        assert_eq!(flight.surbs(), lost.len());
        // Two more ACKs tell everything between them, wherever the last one stopped.
        let found: usize = (0..2)
            .map(|_| received.ack(start, 100_000).unwrap())
            .map(|ack| flight.lost_by_ack(start, &ack).len())
            .sum();
        assert_eq!(found, lost.len());
        assert!(flight.is_empty());
        assert_eq!(flight.floor(), 10_000);
    }

    #[test]
    fn an_ack_says_nothing_about_what_it_does_not_span() {
        let start = Instant::now();
        let mut flight = Flight::default();
        for _ in 0..4 {
            flight.on_sent(Some(sent(start, start)));
        }
        let ranges = std::iter::once(0..1).collect();
        let ack = Ack { latest: 0, delay_us: 0, first: 0, end: 2, ranges };
        assert_eq!(flight.on_ack(&ack).unwrap().packets.len(), 1);
        assert_eq!(flight.lost_by_ack(start, &ack).len(), 1, "number 1 was told missing");
        assert_eq!(flight.len(), 2, "nothing was said about 2 and 3");
    }

    #[test]
    fn late_packets_are_judged_by_when_they_were_due() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let mut flight = Flight::default();
        flight.on_sent(Some(sent(start, ms(100))));
        flight.on_sent(Some(sent(start, ms(10))));
        let ack = Ack { latest: 2, delay_us: 0, first: 0, end: 2, ranges: vec![] };
        assert!(flight.on_ack(&ack).is_none(), "packet 2 was never sent");
        let ack = Ack { latest: 1, ..ack };
        assert_eq!(flight.lost_by_ack(ms(50), &ack).len(), 1);
        assert_eq!(flight.floor(), 0, "the slow packet is still under way");
        assert_eq!(flight.first_arrival(), Some(ms(100)));
        assert_eq!(flight.lost_by_time(ms(99)).len(), 0);
        assert_eq!(flight.lost_by_time(ms(100)).len(), 1);
    }

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
}
