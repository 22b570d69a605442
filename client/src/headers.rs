//! Headers of packets to one recipient, made ahead of need, so that sending a packet costs no more
//! than its payload.
//!
//! A header has a route and delays of its own, drawn when it is made. Delays count from the arrival
//! at a mix, so a header that waited leads to the same traffic as a fresh one. Headers are taken in
//! the order in which they were made, whatever their delays.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mixsocks_sphinx::PacketHeader;

use crate::health::Way;

/// Headers that are made at a time: as many as share vectors, and about a millisecond of work.
const HEADERS_PER_TURN: usize = 8;

/// A header that waited so long is thrown away.
const MAX_READY_AGE: Duration = Duration::from_secs(1);

/// A header that no packet has yet. It becomes one packet at most: only its owner can fill it.
#[derive(Debug)]
pub struct ReadyHeader {
    /// All of the packet but its payload.
    pub header: PacketHeader,
    /// Where it leads.
    pub way: Way,
    /// When it was made: not later than its route was drawn.
    pub made: Instant,
}

/// The headers of a client that nobody has taken.
///
/// They are at most twice [`HEADERS_PER_TURN`], those that are being made included, and as many once more
/// for each task that found none. A client that sends less often than once in [`MAX_READY_AGE`] gets none
/// made ahead.
#[derive(Debug, Default)]
pub(crate) struct HeaderPool {
    ready: VecDeque<ReadyHeader>,
    /// Headers that workers are making now.
    in_making: usize,
    /// Those that were made before are for other nodes or keys.
    renewed: Option<Instant>,
    last_taken: Option<Instant>,
    /// One was asked for, and there was none.
    is_wanted: bool,
    /// Until then the client is expected to send another packet.
    busy_until: Option<Instant>,
}

impl HeaderPool {
    /// How many headers to make now: some when they run short, and `least` in any case. A busy client
    /// that needs one gets some, as eight take hardly longer than one. [`HeaderPool::deliver`] must follow.
    pub(crate) fn claim(&mut self, now: Instant, least: usize) -> usize {
        self.drop_outdated(now);
        let is_busy = self.busy_until.is_some_and(|until| now < until);
        let is_short = self.ready.len() + self.in_making < HEADERS_PER_TURN;
        let is_wanted = std::mem::take(&mut self.is_wanted) && self.ready.is_empty();
        let least = if is_wanted && self.in_making == 0 { least.max(1) } else { least };
        let makes_some = is_busy && (is_short || least > 0);
        let claimed = if makes_some { HEADERS_PER_TURN.max(least) } else { least };
        self.in_making += claimed;
        claimed
    }

    /// Takes in what was made of what was claimed.
    pub(crate) fn deliver(&mut self, claimed: usize, made: Vec<ReadyHeader>) {
        self.in_making -= claimed;
        let is_good =
            |header: &ReadyHeader| self.renewed.is_none_or(|renewed| header.made >= renewed);
        self.ready.extend(made.into_iter().filter(is_good));
    }

    /// Headers that were made before `now`, and those of them that are still being made, are of no
    /// use.
    pub(crate) fn renew(&mut self, now: Instant) {
        self.ready.clear();
        self.renewed = Some(now);
    }

    /// The way of the header that is the next one to take.
    pub(crate) fn next_way(&mut self, now: Instant) -> Option<Way> {
        self.drop_outdated(now);
        self.is_wanted |= self.ready.is_empty();
        self.ready.front().map(|header| header.way)
    }

    /// Hands out the header that was made first.
    pub(crate) fn take(&mut self, now: Instant) -> Option<ReadyHeader> {
        self.drop_outdated(now);
        let header = self.ready.pop_front()?;
        let since_last = self.last_taken.replace(now).map(|last| now.duration_since(last));
        let is_busy = since_last.is_some_and(|pause| pause < MAX_READY_AGE);
        self.busy_until = is_busy.then(|| now + MAX_READY_AGE);
        Some(header)
    }

    fn drop_outdated(&mut self, now: Instant) {
        while self.ready.front().is_some_and(|header| header.made + MAX_READY_AGE <= now) {
            self.ready.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_sphinx::{Hop, Route, SecretKey, build_headers};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Headers whose delays are their numbers in milliseconds.
    fn headers(numbers: std::ops::Range<u32>, made: Instant) -> Vec<ReadyHeader> {
        let hop = Hop {
            address: [1; 32],
            key: SecretKey::from_bytes([7; 32]).public_key(),
            delay: Duration::ZERO,
        };
        let routes = vec![Route::new(&[hop], [2; 32], [0; 16]).unwrap(); numbers.len()];
        let headers = build_headers(&mut StdRng::seed_from_u64(1), &routes);
        let ready = |(number, header)| {
            let way = Way { delay: MS * number, mixes: Default::default() };
            ReadyHeader { header, way, made }
        };
        numbers.zip(headers).map(ready).collect()
    }

    /// A pool from which two headers were taken just before.
    fn busy_pool(now: Instant) -> HeaderPool {
        let mut pool = HeaderPool::default();
        pool.deliver(0, headers(0..2, now));
        assert!(pool.take(now).is_some() && pool.take(now).is_some());
        pool
    }

    fn next_delay(pool: &mut HeaderPool, now: Instant) -> Option<Duration> {
        pool.next_way(now).map(|way| way.delay)
    }

    #[test]
    fn a_client_that_sends_seldom_has_none_made_ahead() {
        let mut now = Instant::now();
        let mut pool = HeaderPool::default();
        for _ in 0..5 {
            assert_eq!(pool.claim(now, 0), 0);
            assert_eq!(pool.claim(now, 1), 1);
            pool.deliver(1, headers(0..1, now));
            assert!(pool.take(now).is_some());
            assert_eq!(pool.claim(now, 0), 0);
            now += MAX_READY_AGE;
        }
    }

    #[test]
    fn a_busy_client_has_eight_to_sixteen() {
        let now = Instant::now();
        let mut pool = busy_pool(now);
        assert_eq!(pool.claim(now, 0), 8);
        assert_eq!(pool.claim(now, 0), 0, "eight are being made");
        assert_eq!(pool.claim(now, 1), 8, "whoever cannot wait makes some");
        pool.deliver(8, headers(0..1, now));
        pool.deliver(8, headers(1..9, now));
        assert!(pool.take(now).is_some() && pool.claim(now, 0) == 0, "eight are left");
        assert!(pool.take(now).is_some() && pool.claim(now, 0) == 8, "seven are left");
        pool.deliver(8, vec![]);
        assert_eq!(pool.claim(now, 0), 8, "they could not be made");
    }

    #[test]
    fn nothing_is_made_any_more_a_second_after_the_last_packet() {
        let now = Instant::now();
        let mut pool = busy_pool(now);
        assert_eq!(pool.claim(now + MAX_READY_AGE - MS, 0), 8);
        pool.deliver(8, vec![]);
        assert_eq!(pool.claim(now + MAX_READY_AGE, 0), 0);
    }

    #[test]
    fn headers_are_taken_once_and_in_order() {
        let now = Instant::now();
        let mut pool = HeaderPool::default();
        pool.deliver(0, headers(0..3, now));
        for number in 0..3 {
            assert_eq!(next_delay(&mut pool, now), Some(MS * number));
            assert_eq!(next_delay(&mut pool, now), Some(MS * number), "looking takes nothing");
            assert_eq!(pool.take(now).unwrap().way.delay, MS * number);
        }
        assert!(pool.next_way(now).is_none() && pool.take(now).is_none());
    }

    #[test]
    fn headers_for_other_keys_are_thrown_away() {
        let now = Instant::now();
        let mut pool = busy_pool(now);
        pool.deliver(0, headers(0..2, now));
        assert_eq!(pool.claim(now, 0), 8);
        pool.renew(now + MS);
        assert!(pool.next_way(now + MS).is_none());
        pool.deliver(8, headers(0..8, now));
        assert!(pool.next_way(now + MS).is_none(), "those were begun before");
        pool.deliver(0, headers(5..6, now + MS));
        assert_eq!(next_delay(&mut pool, now + MS), Some(MS * 5));
    }

    #[test]
    fn old_headers_are_thrown_away() {
        let now = Instant::now();
        let mut pool = HeaderPool::default();
        pool.deliver(0, headers(0..2, now));
        pool.deliver(0, headers(2..3, now + MS));
        assert_eq!(next_delay(&mut pool, now + MAX_READY_AGE - MS), Some(Duration::ZERO));
        assert_eq!(pool.take(now + MAX_READY_AGE).unwrap().way.delay, MS * 2);
        assert!(pool.ready.is_empty());
    }
}
