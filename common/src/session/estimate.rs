//! Estimates from noisy samples, and windows that follow them.

use std::time::{Duration, Instant};

/// The smallest of recent values: of the last one to two times `span`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecentMin {
    span: Duration,
    current: Option<f64>,
    previous: Option<f64>,
    since: Instant,
}

impl RecentMin {
    pub(crate) fn new(now: Instant, span: Duration) -> Self {
        Self { span, current: None, previous: None, since: now }
    }

    pub(crate) fn update(&mut self, value: f64, now: Instant) {
        if now.saturating_duration_since(self.since) >= self.span {
            self.previous = self.current.take();
            self.since = now;
        }
        self.current = Some(self.current.map_or(value, |current| current.min(value)));
    }

    pub(crate) fn min(&self) -> Option<f64> {
        match (self.current, self.previous) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}

/// A smoothed value and its mean deviation, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Smoothed {
    value: f64,
    deviation: f64,
    samples: u64,
}

impl Smoothed {
    pub(crate) fn update(&mut self, sample: f64) {
        if self.samples == 0 {
            self.value = sample;
            self.deviation = sample.abs() / 2.0;
        } else {
            self.deviation += ((sample - self.value).abs() - self.deviation) / 4.0;
            self.value += (sample - self.value) / 8.0;
        }
        self.samples += 1;
    }

    /// Room for what is usual, and for four deviations more.
    pub(crate) fn room(&self) -> f64 {
        (self.value + 4.0 * self.deviation).max(0.0)
    }
}

/// Queueing that windows aim at: enough to keep the path busy, little enough that a new request, which crosses
/// four queues until its first byte, hardly waits (docs/performance.md).
const TARGET_QUEUEING_SECONDS: f64 = 0.008;

/// How long a shortest time counts: the path may have changed after that.
const BASE_SPAN: Duration = Duration::from_secs(30);

/// Queueing is the least of what was seen in this time and at most once more: some turns of a busy
/// processor, whose hiccups delay single packets, while a queue delays all of them.
const STANDING_SPAN: Duration = Duration::from_millis(50);

/// A path on which nothing has queued for so long has more room than the window takes. Several round
/// trips, so that the swings of a window that is right do not count.
const CALM_TIME: Duration = Duration::from_secs(1);

/// A packet that takes longer than that beyond the shortest trip was held up, by a cut link or a machine
/// that slept, and says little about the next one.
const MAX_BEYOND_SECONDS: f64 = 2.0;

/// Between the shortest trip and another one: no packet is under way for so long, as gateways hold none
/// for more than 10 s. One of two clocks has jumped.
const CLOCK_JUMP_SECONDS: f64 = 15.0;

/// Queueing on a path, from times of which only differences mean something.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queueing {
    base: RecentMin,
    standing: RecentMin,
    smoothed: Smoothed,
    /// Seconds that a trip takes beyond the shortest one without any queueing.
    unknown: f64,
}

impl Queueing {
    /// Nothing is known yet; trips take `unknown` seconds more than the shortest one for reasons
    /// that are no queueing.
    pub(crate) fn new(now: Instant, unknown: f64) -> Self {
        Self {
            unknown,
            base: RecentMin::new(now, BASE_SPAN),
            standing: RecentMin::new(now, STANDING_SPAN),
            smoothed: Smoothed::default(),
        }
    }

    /// A trip took so many seconds beyond what is known of it.
    pub(crate) fn update(&mut self, trip: f64, now: Instant) {
        self.base.update(trip, now);
        self.standing.update(trip, now);
        let beyond = trip - self.base.min().unwrap_or(trip);
        self.smoothed.update((beyond - self.unknown).clamp(0.0, MAX_BEYOND_SECONDS));
    }

    /// The same for a trip from one clock to another, of which either may have jumped: then all before
    /// means nothing.
    pub(crate) fn update_between_clocks(&mut self, trip: f64, now: Instant) {
        if self.base().is_some_and(|base| trip - base > CLOCK_JUMP_SECONDS) {
            *self = Self::new(now, self.unknown);
        }
        self.update(trip, now);
    }

    /// The shortest recent trip, in seconds: one without queues.
    pub(crate) fn base(&self) -> Option<f64> {
        self.base.min()
    }

    /// Seconds that every packet waits.
    fn standing(&self) -> f64 {
        match (self.standing.min(), self.base.min()) {
            (Some(standing), Some(base)) => standing - base,
            _ => 0.0,
        }
    }

    /// Whether there is more queueing than windows aim at.
    pub(crate) fn is_above_target(&self) -> bool {
        self.standing() > TARGET_QUEUEING_SECONDS
    }

    /// Seconds beyond the base that packets need, but for rare ones.
    pub(crate) fn room(&self) -> f64 {
        self.smoothed.room()
    }
}

/// How much may be under way at once: follows the queueing of the path, never its losses, because a
/// mixnet loses packets at random.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    size: f64,
    min: f64,
    max: f64,
    /// Doubling with each round trip, until there is queueing.
    is_probing: bool,
    /// When there was queueing last that is worth the name.
    queued: Instant,
}

impl Window {
    /// A window of `initial` packets that stays within `min` and `max`.
    pub(crate) fn new(now: Instant, initial: u32, min: u32, max: u32) -> Self {
        let (size, min, max) = (initial.into(), min.into(), max.into());
        Self { size, min, max, is_probing: true, queued: now }
    }

    /// The whole packets of the window.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "windows are clamped to thousands"
    )]
    pub(crate) fn packets(&self) -> usize {
        self.size as usize
    }

    /// The largest that it can get.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "made from a whole number"
    )]
    pub(crate) fn max_packets(&self) -> usize {
        self.max as usize
    }

    /// Moves the window towards the queueing that is aimed at, after `packets` of it were heard of.
    ///
    /// At first it grows by one for each; when queueing passes the target it shrinks to 0.8 once,
    /// and from then on moves by up to a fifth of what was heard of. After a second in which nothing
    /// queues it grows as at first: what kept it small is gone.
    pub(crate) fn steer(&mut self, now: Instant, queueing: &Queueing, packets: usize) {
        let packets = packets as f64;
        let standing = queueing.standing();
        if standing > TARGET_QUEUEING_SECONDS / 2.0 {
            self.queued = now;
        } else if now.saturating_duration_since(self.queued) >= CALM_TIME {
            self.is_probing = true;
        }
        if self.is_probing && standing <= TARGET_QUEUEING_SECONDS {
            self.size += packets;
        } else {
            if self.is_probing {
                self.is_probing = false;
                self.size *= 0.8;
            }
            let error = (TARGET_QUEUEING_SECONDS - standing) / TARGET_QUEUEING_SECONDS;
            self.size += 0.1 * error.clamp(-2.0, 1.0) * packets;
        }
        self.size = self.size.clamp(self.min, self.max);
    }
}

pub(crate) fn seconds(value: f64) -> Duration {
    // Bounded, so that a wild estimate never overflows a deadline.
    Duration::from_secs_f64(value.clamp(0.0, 60.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_minimum_forgets() {
        let start = Instant::now();
        let span = Duration::from_secs(30);
        let mut min = RecentMin::new(start, span);
        assert_eq!(min.min(), None);
        min.update(1.0, start);
        min.update(5.0, start + span);
        assert_eq!(min.min(), Some(1.0));
        min.update(6.0, start + 2 * span);
        assert_eq!(min.min(), Some(5.0));
    }

    #[test]
    fn hiccups_are_no_queue_and_a_queue_is_one() {
        let start = Instant::now();
        let mut queueing = Queueing::new(start, 0.0);
        let mut window = Window::new(start, 32, 16, 2048);
        for n in 0..1000u32 {
            // Nine of ten packets meet a busy processor.
            let trip = if n % 10 == 0 { 0.010 } else { 0.080 };
            queueing.update(trip, start + n * MS);
            window.steer(start + n * MS, &queueing, 1);
        }
        assert_eq!(window.packets(), 1032, "still probing");
        for n in 1000..2000u32 {
            queueing.update(0.051 + f64::from(n % 10) / 1000.0, start + n * MS);
            window.steer(start + n * MS, &queueing, 1);
        }
        assert!(window.packets() < 800, "{window:?}");
        assert!(queueing.is_above_target());
    }

    /// Another transfer filled the path, and has ended.
    #[test]
    fn a_window_that_was_kept_small_doubles_again_when_nothing_queues() {
        let start = Instant::now();
        let mut queueing = Queueing::new(start, 0.0);
        let mut window = Window::new(start, 32, 16, 2048);
        let mut trips = |from: u32, to: u32, trip: f64| {
            for n in from..to {
                let now = start + n * MS;
                queueing.update(trip, now);
                window.steer(now, &queueing, 1);
            }
            window.packets()
        };
        trips(0, 10, 0.0);
        assert_eq!(trips(10, 1000, 0.080), 16);
        let calm_ms = u32::try_from(CALM_TIME.as_millis()).unwrap();
        // By a tenth for each until it is sure, and then by one.
        let slow = trips(1000, 1000 + calm_ms, 0.0);
        assert!((16..16 + calm_ms as usize / 9).contains(&slow), "{slow}");
        let fast = trips(1000 + calm_ms, 1500 + calm_ms, 0.0);
        assert!(fast >= slow + 400, "{slow} {fast}");
    }

    #[test]
    fn windows_have_limits() {
        let start = Instant::now();
        let mut queueing = Queueing::new(start, 0.0);
        let mut window = Window::new(start, 32, 16, 64);
        queueing.update(0.0, start);
        window.steer(start, &queueing, 1000);
        assert_eq!(window.packets(), 64);
        for n in 0..500u32 {
            queueing.update(1.0, start + n * MS);
            window.steer(start + n * MS, &queueing, 1);
        }
        assert_eq!(window.packets(), 16);
    }
}
