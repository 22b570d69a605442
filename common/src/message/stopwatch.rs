//! Time that counts only now and then, and never while the machine sleeps.

use std::time::{Duration, Instant};

/// Longest time between two looks that counts. Whatever is longer, the machine slept or was stuck: the
/// clock of some systems goes on then, while nothing can come.
const MAX_STEP: Duration = Duration::from_secs(60);

/// A clock that stands still until it is started, and whenever it is stopped. It goes on only when it is
/// looked at: while a time is waited for, [`Stopwatch::due`] says when to look next.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    elapsed: Duration,
    /// When it was looked at last; `None` while it stands still.
    seen: Option<Instant>,
}

impl Stopwatch {
    /// One that goes from now on.
    pub(super) fn started(now: Instant) -> Self {
        Self { elapsed: Duration::ZERO, seen: Some(now) }
    }

    pub(super) fn start(&mut self, now: Instant) {
        self.look(now);
        self.seen = Some(now);
    }

    pub(super) fn stop(&mut self) {
        self.seen = None;
    }

    pub(super) fn is_running(&self) -> bool {
        self.seen.is_some()
    }

    /// The time that has counted.
    pub(super) fn look(&mut self, now: Instant) -> Duration {
        if let Some(seen) = &mut self.seen {
            self.elapsed += now.saturating_duration_since(*seen).min(MAX_STEP);
            *seen = now.max(*seen);
        }
        self.elapsed
    }

    /// When to look again while `at` is waited for; `None` while it stands still.
    pub(super) fn due(&self, at: Duration) -> Option<Instant> {
        Some(self.seen? + at.saturating_sub(self.elapsed).min(MAX_STEP))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn it_counts_only_while_it_runs() {
        let now = Instant::now();
        let mut watch = Stopwatch::default();
        assert_eq!((watch.look(now + MINUTE), watch.due(MINUTE)), (Duration::ZERO, None));
        watch.start(now + MINUTE);
        assert_eq!(watch.look(now + MINUTE + MINUTE / 2), MINUTE / 2);
        watch.stop();
        assert_eq!(watch.look(now + 9 * MINUTE), MINUTE / 2);
        watch.start(now + 9 * MINUTE);
        watch.start(now + 9 * MINUTE + MINUTE / 4);
        assert_eq!(watch.look(now + 9 * MINUTE + MINUTE / 2), MINUTE);
    }

    #[test]
    fn a_step_that_is_too_long_counts_as_the_longest_one() {
        let now = Instant::now();
        let mut watch = Stopwatch::started(now);
        assert_eq!(watch.look(now + 500 * MINUTE), MAX_STEP);
    }

    #[test]
    fn whoever_looks_when_it_is_due_sees_all_of_the_time() {
        let start = Instant::now();
        let (mut now, mut watch) = (start, Stopwatch::started(start));
        let at = 7 * MINUTE + MINUTE / 3;
        while watch.look(now) < at {
            now = watch.due(at).unwrap();
        }
        assert_eq!(now, start + at);
    }
}
