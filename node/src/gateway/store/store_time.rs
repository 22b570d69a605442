//! The time by which a store counts: when boxes expire, and which registrations nobody uses.
//!
//! A clock that is wrong must not cost a message. So a store has a time of its own. It follows the
//! machine's clock, but it never goes back, and between two looks at the clock no more than
//! [`longest_step`] passes: a clock that jumps ahead, or that is ahead when the gateway starts, makes
//! everything older by one such step, however far it jumps. A gateway looks every ten minutes at
//! least, so that nothing else slows its time down but that it does not run.

use std::time::Duration;

use mixsocks_common::topology::UnixTime;

/// More never passes at once.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The part of the time for which boxes are kept that may pass at once.
const PART_OF_EXPIRY: u32 = 4;
/// How much the clock goes on before it is written down again.
const SAVE_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// The time of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StoreTime {
    /// Its own time.
    pub(super) now: UnixTime,
    /// What the clock said at the last look.
    pub(super) clock: UnixTime,
}

impl StoreTime {
    /// That of a store that has none yet: what the clock says, unless boxes have come before. `newest`
    /// is then the hour in which the newest came, and counts as the last look at the clock.
    pub(super) fn begin(clock: UnixTime, newest: Option<UnixTime>) -> Self {
        // An hour in the future tells only that the clock was ahead.
        let last = newest.map_or(clock, |newest| newest.min(clock));
        Self { now: last, clock: last }
    }

    /// Goes on to what the clock says now. Returns how much of what has passed by it does not count.
    pub(super) fn look(&mut self, clock: UnixTime, longest_step: Duration) -> Duration {
        let passed = Duration::from_secs(clock.0.saturating_sub(self.clock.0));
        let counted = passed.min(longest_step);
        self.now = UnixTime(self.now.0.saturating_add(counted.as_secs()));
        self.clock = clock;
        passed - counted
    }

    /// Whether it should be written down, if this was written down last.
    pub(super) fn is_due(&self, saved: Option<&Self>) -> bool {
        saved.is_none_or(|saved| self.clock.0.abs_diff(saved.clock.0) >= SAVE_INTERVAL.as_secs())
    }
}

/// How much passes at most between two looks at the clock: a day, or a quarter of the time for which
/// boxes are kept.
pub(super) fn longest_step(expiry: Duration) -> Duration {
    DAY.min(expiry / PART_OF_EXPIRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixTime = UnixTime(1_700_000_000);

    fn after(seconds: u64) -> UnixTime {
        UnixTime(START.0 + seconds)
    }

    #[test]
    fn it_follows_the_clock_and_never_goes_back() {
        let mut time = StoreTime::begin(START, None);
        assert_eq!(time.look(after(600), DAY), Duration::ZERO);
        assert_eq!(time.now, after(600));
        assert_eq!(time.look(after(60), DAY), Duration::ZERO);
        assert_eq!(time.now, after(600));
        assert_eq!(time.look(after(70), DAY), Duration::ZERO);
        assert_eq!(time.now, after(610));
    }

    #[test]
    fn a_clock_that_jumps_ahead_costs_one_step_however_far_it_jumps() {
        for clock in [after(2 * DAY.as_secs()), UnixTime(u64::MAX)] {
            let mut time = StoreTime::begin(START, None);
            assert_eq!(time.look(clock, DAY), Duration::from_secs(clock.0 - START.0) - DAY);
            assert_eq!(time.now, after(DAY.as_secs()));
            // And when it is set right nothing more.
            time.look(after(60), DAY);
            time.look(after(70), DAY);
            assert_eq!(time.now, after(DAY.as_secs() + 10));
        }
    }

    #[test]
    fn where_boxes_are_kept_for_hours_no_day_passes_at_once() {
        let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
        assert_eq!(longest_step(hours(7 * 24)), DAY);
        assert_eq!(longest_step(hours(1)), hours(1) / 4);
    }

    #[test]
    fn without_a_time_the_newest_box_tells_it() {
        let newest = Some(START);
        assert_eq!(StoreTime::begin(after(1000), newest).now, START);
        let behind = UnixTime(START.0 - 1000);
        assert_eq!(StoreTime::begin(behind, newest).now, behind);
    }

    #[test]
    fn it_is_written_down_by_the_hour() {
        let mut time = StoreTime::begin(START, None);
        assert!(time.is_due(None));
        let saved = time;
        time.look(after(SAVE_INTERVAL.as_secs() - 1), DAY);
        assert!(!time.is_due(Some(&saved)));
        time.look(after(SAVE_INTERVAL.as_secs()), DAY);
        assert!(time.is_due(Some(&saved)));
        let ahead = StoreTime { clock: after(10_000), ..saved };
        assert!(saved.is_due(Some(&ahead)), "also when the clock was set back");
    }
}
