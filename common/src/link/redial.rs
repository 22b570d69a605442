//! When to dial again: clients their gateway, nodes their neighbours.
//!
//! Waits double from [`FIRST_WAIT`], each cut by up to a half at random, so that all who wait for a
//! node that comes back do not dial at once. How far they grow is a matter of what a dial costs the
//! other end. One that nobody answers costs it nothing, and whoever comes back is to be found soon: so
//! that wait stays short while the outage is young. One that was answered and failed costs a
//! handshake, and most likely the other end has too many of them: that wait grows.

use std::time::{Duration, Instant};

use rand::{Rng, RngExt};

/// The longest first wait.
pub const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait between dials that nobody answers, while the outage is young: at most this much
/// longer than the outage itself nobody tries.
pub const QUICK_WAIT: Duration = Duration::from_secs(2);
/// An outage is young for so long: a restart, a router that is switched on again, a tunnel.
pub const QUICK_PERIOD: Duration = Duration::from_secs(5 * 60);
/// The longest wait between dials that nobody answers.
pub const SLOW_WAIT: Duration = Duration::from_secs(10);
/// The longest wait after dials that were answered and failed. The 16,384 clients that a gateway takes
/// at most are then some 700 handshakes a second.
pub const REFUSED_WAIT: Duration = Duration::from_secs(30);
/// A connection that lived this long was a good one: its end begins another outage.
pub const STABLE_AFTER: Duration = Duration::from_secs(10);
/// For how long a dial waits for the other end's TCP to answer. Systems ask again after 1 s and 3 s;
/// whoever comes back just after the second question is asked anew sooner than by the third.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For how long what was written may stay without an answer from the other end's system, before the
/// connection is given up. TCP itself would wait for a quarter of an hour, ever more rarely asking:
/// after an outage of 20 s it may ask again 20 s later. A new connection is dialled sooner than that.
pub const UNANSWERED_TIMEOUT: Duration = Duration::from_secs(5);

/// How a dial or a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Nobody took the connection.
    Unanswered,
    /// Somebody took the connection, and did not become a peer.
    Refused,
    /// The connection stood, and ended.
    Ended,
}

/// When to dial a peer again.
#[derive(Debug)]
pub struct Redial {
    longest_next: Duration,
    dialled: Instant,
    /// Since when there is no lasting connection.
    outage_since: Option<Instant>,
    up_since: Option<Instant>,
}

impl Redial {
    /// For a peer that is dialled for the first time at `now`.
    pub fn new(now: Instant) -> Self {
        Self { longest_next: FIRST_WAIT, dialled: now, outage_since: None, up_since: None }
    }

    /// A dial begins.
    pub fn handle_dial(&mut self, now: Instant) {
        self.dialled = now;
    }

    /// The dial succeeded.
    pub fn handle_up(&mut self, now: Instant) {
        self.up_since = Some(now);
    }

    /// Starts over: the peer is elsewhere now.
    pub fn reset(&mut self) {
        self.longest_next = FIRST_WAIT;
        self.outage_since = None;
        self.up_since = None;
    }

    /// The dial or the connection has failed: tells when to dial again, which is never at once.
    pub fn handle_failure(
        &mut self,
        now: Instant,
        failure: Failure,
        rng: &mut impl Rng,
    ) -> Instant {
        let was_stable = self.up_since.take().is_some_and(|since| now >= since + STABLE_AFTER);
        if was_stable {
            self.reset();
        }
        let outage_since = *self.outage_since.get_or_insert(now);
        let longest = match failure {
            Failure::Refused => REFUSED_WAIT,
            Failure::Unanswered | Failure::Ended if now < outage_since + QUICK_PERIOD => QUICK_WAIT,
            Failure::Unanswered | Failure::Ended => SLOW_WAIT,
        };
        let longest_now = self.longest_next.min(longest);
        self.longest_next = (longest_now * 2).min(longest);
        let wait = rng.random_range(longest_now / 2..=longest_now);
        // A dial that nobody answered has been a wait already.
        let from = if failure == Failure::Unanswered { self.dialled } else { now };
        (from + wait).max(now + FIRST_WAIT / 2)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    /// Fails `count` times in the same way, each time after `lasting`; the waits.
    fn waits(
        redial: &mut Redial,
        now: &mut Instant,
        failure: Failure,
        lasting: Duration,
        count: usize,
    ) -> Vec<Duration> {
        let mut rng = StdRng::seed_from_u64(7);
        let next = |_| {
            redial.handle_dial(*now);
            if failure == Failure::Ended {
                redial.handle_up(*now);
            }
            *now += lasting;
            let again = redial.handle_failure(*now, failure, &mut rng);
            let wait = again - *now;
            *now = again;
            wait
        };
        (0..count).map(next).collect()
    }

    fn longest(waits: &[Duration]) -> Duration {
        *waits.iter().max().unwrap()
    }

    const REFUSED_BY_TCP: Duration = Duration::ZERO;

    #[test]
    fn waits_double_and_are_drawn() {
        let mut now = Instant::now();
        let mut redial = Redial::new(now);
        let waits = waits(&mut redial, &mut now, Failure::Refused, REFUSED_BY_TCP, 20);
        for (doublings, wait) in (0u32..).zip(&waits) {
            let longest = (FIRST_WAIT * 2u32.pow(doublings)).min(REFUSED_WAIT);
            assert!((longest / 2..=longest).contains(wait), "{doublings}: {wait:?}");
        }
        assert!(longest(&waits[10..]) > longest(&waits[..7]), "it grows: {waits:?}");
        assert!(waits[10..].windows(2).any(|pair| pair[0] != pair[1]), "not drawn: {waits:?}");
    }

    #[test]
    fn whoever_comes_back_soon_is_found_soon() {
        let mut now = Instant::now();
        let began = now;
        let mut redial = Redial::new(now);
        let unanswered = Failure::Unanswered;
        while now < began + QUICK_PERIOD - QUICK_WAIT {
            let waits = waits(&mut redial, &mut now, unanswered, REFUSED_BY_TCP, 1);
            assert!(longest(&waits) <= QUICK_WAIT, "{waits:?}");
        }
        // Then less often, but often enough for whoever switches the machine on again.
        let later = waits(&mut redial, &mut now, unanswered, REFUSED_BY_TCP, 20);
        assert!(longest(&later) > QUICK_WAIT && longest(&later) <= SLOW_WAIT, "{later:?}");
    }

    #[test]
    fn a_dial_without_an_answer_counts_as_a_wait() {
        let mut now = Instant::now();
        let mut redial = Redial::new(now);
        let waits = waits(&mut redial, &mut now, Failure::Unanswered, CONNECT_TIMEOUT, 20);
        assert!(waits.iter().all(|wait| *wait == FIRST_WAIT / 2), "{waits:?}");
    }

    #[test]
    fn a_peer_that_dies_again_and_again_is_found_soon_each_time() {
        let mut now = Instant::now();
        let mut redial = Redial::new(now);
        let ended = waits(&mut redial, &mut now, Failure::Ended, STABLE_AFTER / 2, 30);
        assert!(longest(&ended) <= QUICK_WAIT, "{ended:?}");
    }

    #[test]
    fn a_connection_that_lasted_ends_the_outage() {
        let mut now = Instant::now();
        let mut redial = Redial::new(now);
        waits(&mut redial, &mut now, Failure::Refused, REFUSED_BY_TCP, 20);
        let after = waits(&mut redial, &mut now, Failure::Ended, STABLE_AFTER, 1);
        assert!(longest(&after) <= FIRST_WAIT, "{after:?}");
        // One that did not last does not.
        waits(&mut redial, &mut now, Failure::Refused, REFUSED_BY_TCP, 20);
        let after = waits(&mut redial, &mut now, Failure::Ended, STABLE_AFTER - FIRST_WAIT, 1);
        assert!(longest(&after) > FIRST_WAIT, "{after:?}");
    }

    #[test]
    fn a_refusal_after_an_outage_does_not_begin_with_the_longest_wait() {
        let mut now = Instant::now();
        let mut redial = Redial::new(now);
        waits(&mut redial, &mut now, Failure::Unanswered, REFUSED_BY_TCP, 20);
        let refused = waits(&mut redial, &mut now, Failure::Refused, REFUSED_BY_TCP, 1);
        assert!(longest(&refused) <= QUICK_WAIT, "{refused:?}");
        redial.reset();
        let elsewhere = waits(&mut redial, &mut now, Failure::Refused, REFUSED_BY_TCP, 1);
        assert!(longest(&elsewhere) <= FIRST_WAIT, "{elsewhere:?}");
    }
}
