//! What is known about the way to one destination, and how much may be under way there.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::FailReason;
use super::fragment::MessageId;
use crate::session::estimate::{Queueing, Window, seconds};

/// Fragments that may be under way: at first, at least and at most. So many take 0.1 s at the speed of an
/// ordinary line; the most are 4 MB.
const INITIAL_WINDOW: u32 = 64;
const MIN_WINDOW: u32 = 16;
pub(super) const MAX_WINDOW: u32 = 2048;

/// Fragments that may be under way while nothing is heard, or while the gateway refuses.
const PROBE_PACKETS: usize = 2;

/// Round trip that is assumed, beyond the delays that are known, before one was measured.
const INITIAL_BASE: Duration = Duration::from_millis(500);

/// Room for timers, busy processors, and for a gateway that stores several boxes at once.
const MARGIN: Duration = Duration::from_millis(100);

/// Waits double up to this: somebody whose gateway is back is found soon, and two packets burden nobody.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A pause after a refusal, at first and at most: a share has room again when its owner was there.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Doublings after which every wait and every pause has reached its maximum.
const MAX_DOUBLINGS: u32 = 6;

/// Why fragments do not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Obstacle {
    ShareFull,
    StoreUnavailable,
    NoRoute,
}

/// The way to one destination.
#[derive(Debug)]
pub(super) struct Lane {
    /// Messages that are not delivered yet.
    pub(super) messages: usize,
    /// Of those, the ones with fragments to send.
    pub(super) waiting: VecDeque<MessageId>,
    /// Fragments to send.
    pub(super) unsent: usize,
    /// When it is its turn, as a number that counts up.
    pub(super) turn: u64,
    pub(super) under_way: usize,
    window: Window,
    queueing: Queueing,
    /// Waits in a row after which nothing had been heard, and when the last one ended.
    vain_waits: u32,
    last_vain: Option<Instant>,
    last_progress: Option<Instant>,
    /// Obstacles in a row, and until when nothing is sent.
    obstacles: u32,
    obstacle: Option<Obstacle>,
    paused_until: Option<Instant>,
}

impl Lane {
    pub(super) fn new(now: Instant, unknown_delays: Duration, turn: u64) -> Self {
        Self {
            messages: 0,
            waiting: VecDeque::new(),
            unsent: 0,
            turn,
            under_way: 0,
            window: Window::new(now, INITIAL_WINDOW, MIN_WINDOW, MAX_WINDOW),
            queueing: Queueing::new(now, unknown_delays.as_secs_f64()),
            vain_waits: 0,
            last_vain: None,
            last_progress: None,
            obstacles: 0,
            obstacle: None,
            paused_until: None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.messages == 0 && self.under_way == 0
    }

    /// How long after the known delays an acknowledgement is here at the latest.
    pub(super) fn ack_wait(&self) -> Duration {
        let base = self.queueing.base().map_or(INITIAL_BASE, seconds);
        let wait = base + seconds(self.queueing.room()) + MARGIN;
        (wait * (1 << self.vain_waits)).min(MAX_WAIT.max(wait))
    }

    pub(super) fn may_send(&self, now: Instant) -> bool {
        let is_doubtful = self.vain_waits > 0 || self.obstacles > 0;
        let window = if is_doubtful { PROBE_PACKETS } else { self.window.packets() };
        self.under_way < window && self.paused_until(now).is_none()
    }

    /// Until when nothing is sent, if that is later than now.
    pub(super) fn paused_until(&self, now: Instant) -> Option<Instant> {
        self.paused_until.filter(|until| now < *until)
    }

    /// A fragment was acknowledged, so long after what the known delays take.
    pub(super) fn on_trip(&mut self, now: Instant, trip: Duration) {
        self.queueing.update(trip.as_secs_f64(), now);
        self.window.steer(now, &self.queueing, 1);
        self.obstacles = 0;
        self.obstacle = None;
        self.paused_until = None;
    }

    /// A fragment was acknowledged for the first time, and in time: the way is there.
    pub(super) fn on_progress(&mut self, now: Instant) {
        self.last_progress = Some(now);
        self.vain_waits = 0;
    }

    /// A fragment was not heard of in time. If nothing was since it left, the next ones wait for longer;
    /// if all that left together doubled the wait, the last would take hours.
    pub(super) fn on_vain_wait(&mut self, now: Instant, sent: Instant) {
        let is_silent = self.last_progress.is_none_or(|progress| progress < sent);
        if is_silent && self.last_vain.is_none_or(|vain| vain <= sent) {
            self.vain_waits = (self.vain_waits + 1).min(MAX_DOUBLINGS);
            self.last_vain = Some(now);
        }
    }

    /// Nothing is sent for a while; for longer, if that was so before.
    pub(super) fn obstruct(&mut self, now: Instant, obstacle: Obstacle) {
        self.obstacle = Some(obstacle);
        if self.paused_until(now).is_none() {
            let pause = (FIRST_PAUSE * (1 << self.obstacles)).min(MAX_PAUSE);
            self.obstacles = (self.obstacles + 1).min(MAX_DOUBLINGS);
            self.paused_until = Some(now + pause);
        }
    }

    /// Why messages have not been delivered.
    pub(super) fn reason(&self) -> FailReason {
        match self.obstacle {
            Some(Obstacle::ShareFull) => FailReason::ShareFull,
            Some(Obstacle::StoreUnavailable) => FailReason::StoreUnavailable,
            Some(Obstacle::NoRoute) => FailReason::NoRoute,
            None => FailReason::NotConfirmed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_doubles_the_wait_once_for_all_that_left_together() {
        let start = Instant::now();
        let mut lane = Lane::new(start, Duration::ZERO, 0);
        let first = lane.ack_wait();
        let later = start + first;
        for _ in 0..50 {
            lane.on_vain_wait(later, start);
        }
        assert_eq!(lane.ack_wait(), 2 * first);
        let mut now = later;
        for _ in 0..20 {
            let sent = now;
            now += lane.ack_wait();
            lane.on_vain_wait(now, sent);
            assert!(lane.ack_wait() <= MAX_WAIT);
        }
        assert_eq!(lane.ack_wait(), MAX_WAIT);
        lane.under_way = PROBE_PACKETS;
        assert!(!lane.may_send(now));
        lane.on_trip(now, Duration::from_millis(50));
        assert!(!lane.may_send(now), "that may have been late, or a copy");
        lane.on_progress(now);
        assert!(lane.may_send(now));
    }

    #[test]
    fn losses_between_acknowledgements_double_nothing() {
        let start = Instant::now();
        let mut lane = Lane::new(start, Duration::ZERO, 0);
        lane.on_progress(start + MARGIN);
        lane.on_vain_wait(start + 9 * MARGIN, start);
        assert_eq!(lane.vain_waits, 0);
    }

    #[test]
    fn refusals_pause_for_longer_each_time_up_to_the_most() {
        let mut now = Instant::now();
        let mut lane = Lane::new(now, Duration::ZERO, 0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            lane.obstruct(now, Obstacle::ShareFull);
            lane.obstruct(now, Obstacle::ShareFull);
            assert!(!lane.may_send(now));
            let until = lane.paused_until(now).unwrap();
            pauses.push((until - now).as_secs());
            now = until;
            assert!(lane.may_send(now), "due means now");
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(lane.reason(), FailReason::ShareFull);
    }
}
