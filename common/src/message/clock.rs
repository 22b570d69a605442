//! The wall clock, and for how long the machine has slept.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use super::fragment::Hour;
use crate::topology::UnixTime;

/// Differences up to this are none: the wall clock is given in seconds, and is steered.
const TOLERANCE_S: u64 = 2;

/// More sleep at a time counts no more: everything is given up long before.
const MAX_SLEEP_S: u64 = 24 * 60 * 60;

/// The wall clock as it was seen last. [`Instant`] stands still on some systems while the machine sleeps;
/// what the wall clock has gained on it since then is sleep, or somebody has set it. The hour is held within
/// the validity of the network's document: the clocks of two machines may be wrong, but what both take for
/// the hour is not further apart than that.
#[derive(Debug)]
pub(super) struct Clock {
    seen: Instant,
    wall: UnixTime,
    validity: RangeInclusive<UnixTime>,
}

impl Clock {
    pub(super) fn new(now: Instant, wall: UnixTime, validity: RangeInclusive<UnixTime>) -> Self {
        Self { seen: now, wall, validity }
    }

    /// There is another document.
    pub(super) fn set_validity(&mut self, validity: RangeInclusive<UnixTime>) {
        self.validity = validity;
    }

    /// The hour.
    pub(super) fn hour(&self, now: Instant) -> Hour {
        Hour::of(self.held(now))
    }

    fn held(&self, now: Instant) -> UnixTime {
        self.wall(now).min(*self.validity.end()).max(*self.validity.start())
    }

    /// What the wall clock shows.
    fn wall(&self, now: Instant) -> UnixTime {
        let since = now.saturating_duration_since(self.seen).as_secs();
        UnixTime(self.wall.0.saturating_add(since))
    }

    /// When an hour begins; at the latest in an hour.
    pub(super) fn start_of(&self, now: Instant, hour: Hour) -> Instant {
        let seconds = (u64::from(hour.0) * 3600).saturating_sub(self.held(now).0);
        now + Duration::from_secs(seconds.min(3600))
    }

    /// Takes in what the wall clock shows; returns how long the machine has slept since the last time.
    pub(super) fn look(&mut self, now: Instant, wall: UnixTime) -> Duration {
        let expected = self.wall(now).0;
        if wall.0.abs_diff(expected) <= TOLERANCE_S {
            return Duration::ZERO;
        }
        (self.seen, self.wall) = (now, wall);
        Duration::from_secs(wall.0.saturating_sub(expected).min(MAX_SLEEP_S))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixTime = UnixTime(1_800_000_000);

    const ALWAYS: RangeInclusive<UnixTime> = UnixTime(0)..=UnixTime(u64::MAX);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_the_wall_clock_gains_is_sleep_once() {
        let now = Instant::now();
        let mut clock = Clock::new(now, START, ALWAYS);
        assert_eq!(clock.look(now + seconds(100), UnixTime(START.0 + 100)), Duration::ZERO);
        assert_eq!(clock.look(now + seconds(110), UnixTime(START.0 + 1110)), seconds(1000));
        assert_eq!(clock.look(now + seconds(111), UnixTime(START.0 + 1111)), Duration::ZERO);
        assert_eq!(clock.wall(now + seconds(120)), UnixTime(START.0 + 1120));
    }

    #[test]
    fn many_short_sleeps_are_seen_together() {
        let now = Instant::now();
        let mut clock = Clock::new(now, START, ALWAYS);
        let slept: Duration =
            (1..=30).map(|n| clock.look(now + seconds(n), UnixTime(START.0 + 2 * n))).sum();
        assert_eq!(slept, seconds(30));
    }

    #[test]
    fn a_clock_that_is_set_back_has_slept_nothing_and_one_that_jumps_no_more_than_counts() {
        let now = Instant::now();
        let mut clock = Clock::new(now, START, ALWAYS);
        assert_eq!(clock.look(now, UnixTime(0)), Duration::ZERO);
        assert_eq!(clock.look(now + seconds(1), UnixTime(1)), Duration::ZERO);
        assert_eq!(clock.look(now, UnixTime(u64::MAX)), seconds(MAX_SLEEP_S));
        assert_eq!(clock.wall(now + seconds(1)), UnixTime(u64::MAX));
    }

    #[test]
    fn the_hour_is_held_within_the_validity_and_another_one_is_no_sleep() {
        let now = Instant::now();
        let hour = Hour::of(START);
        let hours = |from: u64, until: u64| {
            UnixTime(START.0 + 3600 * from)..=UnixTime(START.0 + 3600 * until)
        };
        for (wall, expected) in [(UnixTime(0), 2), (START, 2), (UnixTime(START.0 + 3 * 3600), 3)] {
            let clock = Clock::new(now, wall, hours(2, 5));
            assert_eq!(clock.hour(now).0, hour.0 + expected);
        }
        let mut clock = Clock::new(now, UnixTime(u64::MAX), hours(2, 5));
        assert_eq!(clock.hour(now).0, hour.0 + 5);
        clock.set_validity(hours(3, 6));
        assert_eq!(clock.look(now, UnixTime(u64::MAX)), Duration::ZERO);
        assert_eq!(clock.hour(now).0, hour.0 + 6);
    }
}
