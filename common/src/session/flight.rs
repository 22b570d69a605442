//! Packets under way: numbers, acknowledgements, and loss judged by time.
//!
//! Order means nothing in a mixnet, so a packet is never lost because later ones arrived. It is
//! lost when it should have been acknowledged by now: by a reply that left the peer after the
//! packet was due there, or by no reply at all within the longest time that one may take.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Instant;

use super::frame::{Ack, StreamId};
use super::halves::Piece;

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
    pub(super) number: u64,
    pub(super) at: Instant,
    /// When it reaches the peer by the delays that the sender chose, without queueing and wires. A
    /// sender that did not choose them takes the time of sending.
    pub(super) arrives: Instant,
    pub(super) cargo: Vec<Cargo>,
    pub(super) surbs: usize,
    /// Whether it was sent for its SURBs alone, so that the window of packets does not bound it.
    pub(super) is_refill: bool,
}

impl Sent {
    fn trip(&self) -> Trip {
        Trip { at: self.at, arrives: self.arrives }
    }
}

/// The times of a packet: when it left, and when it reaches the peer as [`Sent`] has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trip {
    pub(super) at: Instant,
    pub(super) arrives: Instant,
}

/// What an acknowledgement brought.
#[derive(Debug)]
pub(super) struct Acked {
    pub(super) packets: Vec<Sent>,
    /// The packet that the peer received last, when this is the first news of it.
    pub(super) latest: Option<Trip>,
}

impl Acked {
    /// Whether the peer has received something of which this is the first news.
    pub(super) fn is_progress(&self) -> bool {
        !self.packets.is_empty() || self.latest.is_some()
    }
}

/// Packets that were given up and are remembered, the newest: an acknowledgement that comes after all
/// tells that the path takes longer than was thought.
const MAX_GIVEN_UP: usize = 64;

/// The packets that one side has sent and not heard of. Each operation is O(log n) in their number,
/// plus what it takes out; what a moving mark passes is looked at once.
#[derive(Debug, Default)]
pub(super) struct Flight {
    next: u64,
    sent: BTreeMap<u64, Sent>,
    by_arrival: BTreeSet<(Instant, u64)>,
    /// Of those, the numbers that were due at the peer by `overdue_at`.
    overdue: BTreeSet<u64>,
    overdue_at: Option<Instant>,
    refills: usize,
    /// What was given up because time had passed, at most [`MAX_GIVEN_UP`].
    given_up: BTreeMap<u64, Trip>,
    surbs: SurbsUnderWay,
}

/// SURBs in packets that have not been heard of.
#[derive(Debug, Default)]
struct SurbsUnderWay {
    all: usize,
    /// Of those, in packets that were due at the peer by `counted_at`: its count of them knows these.
    counted: usize,
    counted_at: Option<Instant>,
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

    /// Of those, the ones that the window of packets bounds: all but refills.
    pub(super) fn windowed_len(&self) -> usize {
        self.sent.len() - self.refills
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty()
    }

    /// SURBs in packets that were not due at the peer when it last counted them.
    pub(super) fn uncounted_surbs(&self) -> usize {
        self.surbs.all - self.surbs.counted
    }

    /// The peer counted its SURBs at `time`: all that were due there by then are in its count.
    /// `None` takes that back.
    pub(super) fn surbs_counted_at(&mut self, time: Option<Instant>) {
        let surbs_between = |flight: &Self, from: Option<Instant>, to: Instant| -> usize {
            let after = from.map_or(Bound::Unbounded, |from| Bound::Excluded((from, u64::MAX)));
            flight
                .by_arrival
                .range((after, Bound::Included((to, u64::MAX))))
                .filter_map(|(_, number)| flight.sent.get(number))
                .map(|sent| sent.surbs)
                .sum()
        };
        let old = self.surbs.counted_at;
        match (old, time) {
            (_, None) => self.surbs.counted = 0,
            (Some(old), Some(new)) if new < old => {
                self.surbs.counted -= surbs_between(self, Some(new), old);
            }
            (old, Some(new)) => self.surbs.counted += surbs_between(self, old, new),
        }
        self.surbs.counted_at = time;
    }

    /// The SURBs under way are of no use any more.
    pub(super) fn forget_surbs(&mut self) {
        for sent in self.sent.values_mut() {
            sent.surbs = 0;
        }
        self.surbs.all = 0;
        self.surbs.counted = 0;
    }

    /// Uses up the next number; `sent` is kept when the packet elicits an acknowledgement.
    pub(super) fn on_sent(&mut self, sent: Option<Sent>) {
        if let Some(sent) = sent {
            self.by_arrival.insert((sent.arrives, self.next));
            self.surbs.all += sent.surbs;
            self.refills += usize::from(sent.is_refill);
            if self.surbs.counted_at.is_some_and(|at| sent.arrives <= at) {
                self.surbs.counted += sent.surbs;
            }
            if self.overdue_at.is_some_and(|at| sent.arrives <= at) {
                self.overdue.insert(self.next);
            }
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
        let named = ack.ranges.iter().flat_map(|range| self.sent.range(range.clone()));
        let named: Vec<u64> = named.map(|(&number, _)| number).collect();
        let latest = named.binary_search(&ack.latest).ok();
        let packets: Vec<Sent> = named.into_iter().map(|number| self.take(number)).collect();
        let latest = match latest {
            Some(index) => Some(packets[index].trip()),
            None => self.given_up.remove(&ack.latest),
        };
        Some(Acked { packets, latest })
    }

    /// Takes out the packets that the receiver says it does not wait for any more.
    pub(super) fn lost_by_settling(&mut self, ack: &Ack) -> Vec<Sent> {
        let lost: Vec<u64> =
            self.sent.range(ack.first..ack.settled).map(|(&number, _)| number).collect();
        lost.into_iter().map(|number| self.take(number)).collect()
    }

    /// Takes out the packets that were due at the peer by `cutoff`, and that an ACK telling about
    /// `first..end` does not name.
    pub(super) fn lost_by_ack(&mut self, cutoff: Instant, ack: &Ack) -> Vec<Sent> {
        if self.overdue_at.is_none_or(|at| at < cutoff) {
            let after =
                self.overdue_at.map_or(Bound::Unbounded, |at| Bound::Excluded((at, u64::MAX)));
            let passed = self.by_arrival.range((after, Bound::Included((cutoff, u64::MAX))));
            self.overdue.extend(passed.map(|&(_, number)| number));
            self.overdue_at = Some(cutoff);
        }
        // The mark of an earlier ACK may be ahead of this one's cutoff.
        let lost: Vec<u64> = self
            .overdue
            .range(ack.first..ack.end)
            .filter(|number| self.sent.get(number).is_some_and(|sent| sent.arrives <= cutoff))
            .copied()
            .collect();
        lost.into_iter().map(|number| self.take(number)).collect()
    }

    /// Takes out the packets that were due at the peer by `cutoff`.
    pub(super) fn lost_by_time(&mut self, cutoff: Instant) -> Vec<Sent> {
        let mut lost = Vec::new();
        while let Some(&(arrives, number)) = self.by_arrival.first()
            && arrives <= cutoff
        {
            let sent = self.take(number);
            self.given_up.insert(number, sent.trip());
            if self.given_up.len() > MAX_GIVEN_UP {
                self.given_up.pop_first();
            }
            lost.push(sent);
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
        self.overdue.remove(&number);
        self.surbs.all -= sent.surbs;
        self.refills -= usize::from(sent.is_refill);
        if self.surbs.counted_at.is_some_and(|at| sent.arrives <= at) {
            self.surbs.counted -= sent.surbs;
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::super::received::Received;
    use super::*;
    use std::time::Duration;

    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};

    fn sent(at: Instant, arrives: Instant) -> Sent {
        Sent { number: 0, at, arrives, cargo: vec![], surbs: 1, is_refill: false }
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
        assert_eq!(flight.uncounted_surbs(), lost.len());
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
        let ack = Ack { latest: 0, delay_us: 0, first: 0, end: 2, settled: 0, ranges };
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
        let ack = Ack { latest: 2, delay_us: 0, first: 0, end: 2, settled: 0, ranges: vec![] };
        assert!(flight.on_ack(&ack).is_none(), "packet 2 was never sent");
        let ack = Ack { latest: 1, ..ack };
        assert_eq!(flight.lost_by_ack(ms(50), &ack).len(), 1);
        assert_eq!(flight.floor(), 0, "the slow packet is still under way");
        assert_eq!(flight.first_arrival(), Some(ms(100)));
        assert_eq!(flight.lost_by_time(ms(99)).len(), 0);
        assert_eq!(flight.lost_by_time(ms(100)).len(), 1);
    }

    #[test]
    fn what_is_settled_and_not_named_is_lost() {
        let start = Instant::now();
        let mut flight = Flight::default();
        (0..6).for_each(|_| flight.on_sent(Some(sent(start, start))));
        let ranges = [1..2, 4..5].to_vec();
        let ack = Ack { latest: 4, delay_us: 0, first: 1, end: 5, settled: 4, ranges };
        assert_eq!(flight.on_ack(&ack).unwrap().packets.len(), 2);
        assert_eq!(flight.lost_by_settling(&ack).len(), 2, "2 and 3, but not 0 and 5");
        assert_eq!(flight.len(), 2);
    }

    #[test]
    fn surbs_are_in_the_count_once_they_were_due() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let mut flight = Flight::default();
        for n in 0..10 {
            flight.on_sent(Some(sent(start, ms(10 * n))));
        }
        assert_eq!(flight.uncounted_surbs(), 10);
        flight.surbs_counted_at(Some(ms(45)));
        assert_eq!(flight.uncounted_surbs(), 5);
        flight.surbs_counted_at(Some(ms(25)));
        assert_eq!(flight.uncounted_surbs(), 7, "an older count knows less");
        flight.surbs_counted_at(Some(ms(70)));
        assert_eq!(flight.uncounted_surbs(), 2);
        let ranges = [0..3, 9..10].to_vec();
        let ack = Ack { latest: 9, delay_us: 0, first: 0, end: 10, settled: 0, ranges };
        flight.on_ack(&ack).unwrap();
        assert_eq!(flight.uncounted_surbs(), 1);
        flight.surbs_counted_at(None);
        assert_eq!(flight.uncounted_surbs(), 6);
        flight.forget_surbs();
        assert_eq!(flight.uncounted_surbs(), 0);
        assert_eq!(flight.lost_by_time(ms(100)).len(), 6);
    }

    #[test]
    fn news_of_what_was_given_up_tell_how_long_it_took() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let mut flight = Flight::default();
        for n in 0..MAX_GIVEN_UP as u64 + 1 {
            flight.on_sent(Some(sent(ms(n), ms(n + 10))));
        }
        assert_eq!(flight.lost_by_time(ms(1000)).len(), MAX_GIVEN_UP + 1);
        let ack = |latest| Ack {
            latest,
            delay_us: 0,
            first: latest,
            end: latest + 1,
            settled: latest,
            ranges: std::iter::once(latest..latest + 1).collect(),
        };
        let acked = flight.on_ack(&ack(1)).unwrap();
        assert_eq!(acked.latest, Some(Trip { at: ms(1), arrives: ms(11) }));
        assert!(acked.packets.is_empty() && acked.is_progress());
        assert!(!flight.on_ack(&ack(1)).unwrap().is_progress(), "that is no news any more");
        assert!(!flight.on_ack(&ack(0)).unwrap().is_progress(), "the oldest is forgotten");
    }

    /// ACKs whose cutoffs go back and forth lose neither too much nor too little.
    #[test]
    fn loss_by_ack_is_what_a_plain_search_finds() {
        let start = Instant::now();
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let mut flight = Flight::default();
        let mut model: BTreeMap<u64, Instant> = BTreeMap::new();
        for step in 0..3000 {
            let now = start + Duration::from_millis(step);
            let arrives = now + Duration::from_millis(rng.random_range(0..200));
            model.insert(flight.next_number(), arrives);
            flight.on_sent(Some(sent(now, arrives)));
            let first = rng.random_range(0..flight.next_number());
            let end = rng.random_range(first..=flight.next_number());
            let ack = Ack { latest: 0, delay_us: 0, first, end, settled: first, ranges: vec![] };
            let back = Duration::from_millis(rng.random_range(0..200));
            let Some(cutoff) = now.checked_sub(back) else { continue };
            let expected: Vec<_> = model
                .range(first..end)
                .filter(|(_, arrives)| **arrives <= cutoff)
                .map(|(&number, _)| number)
                .collect();
            model.retain(|number, _| !expected.contains(number));
            assert_eq!(flight.lost_by_ack(cutoff, &ack).len(), expected.len());
            assert_eq!(flight.len(), model.len());
        }
    }
}
