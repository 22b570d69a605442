//! How many SURBs the client has given out, where they are, and how many there should be.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::estimate::{Queueing, Window, seconds};
use super::flight::Flight;
use super::received::Received;
use super::stock::RESERVE_SURBS;
use super::transport::MIN_MARGIN;

/// SURBs at the provider or under way in either direction: at first and at least, and at most. The
/// first is one page of text; the most bounds the client's memory for recoveries to about 1 MiB.
const MIN_WINDOW: u32 = 40;
const MAX_WINDOW: u32 = 4096;
const MIN_WINDOW_SURBS: usize = MIN_WINDOW as usize;

/// Use is measured over two long waits for a reply and this, for wires and busy processors.
const MIN_USAGE_SPAN: Duration = Duration::from_millis(200);

/// SURBs that may be given out for each reply heard, and beyond that. A provider that says it has none,
/// and keeps them, could make the client send at any rate, and later answer in a burst that it knows
/// again. Honest networks stay within: those that lose half of all packets each way, as when one of two
/// mixes of a layer is dead, and a sixth of the rest; and four whole windows in blackouts.
const MAX_PER_REPLY: u64 = 6;
const MAX_UNANSWERED: u64 = 4 * MAX_WINDOW as u64;

/// The client's book of SURBs. Its window is how much the provider may have under way: SURBs are
/// the provider's right to send.
#[derive(Debug)]
pub(super) struct SurbWindow {
    generation: u64,
    window: Window,
    /// The provider's newest count, and the number of the reply that told it; replies behind that
    /// one tell older news.
    stock: usize,
    reported_by: Option<u64>,
    /// Of replies: only differences mean something, as both ends' clocks are arbitrary.
    queueing: Queueing,
    /// When replies left, and one past their numbers: everything below was sent by then. Both
    /// ascend.
    marks: VecDeque<(Instant, u64)>,
    /// Longest time (p99.9) that mixes hold a reply.
    reply_quantile: Duration,
    /// SURBs given out in all, and replies heard in all.
    given: u64,
    heard: u64,
    usage: Usage,
}

/// How many SURBs are used for contents in a time that is longer than a round trip.
#[derive(Debug)]
struct Usage {
    span: Duration,
    since: Instant,
    current: usize,
    previous: usize,
}

impl Usage {
    fn on_reply(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.since);
        if age >= self.span {
            self.previous = if age < 2 * self.span { self.current } else { 0 };
            self.current = 0;
            self.since = now;
        }
        self.current += 1;
    }

    fn recent(&self) -> usize {
        self.current + self.previous
    }
}

impl SurbWindow {
    pub(super) fn new(now: Instant, reply_quantile: Duration) -> Self {
        Self {
            generation: 0,
            window: Window::new(now, MIN_WINDOW, MIN_WINDOW, MAX_WINDOW),
            stock: 0,
            reported_by: None,
            queueing: Queueing::new(now, 0.0),
            marks: VecDeque::new(),
            reply_quantile,
            given: 0,
            heard: 0,
            usage: Usage {
                span: 2 * reply_quantile + MIN_USAGE_SPAN,
                since: now,
                current: 0,
                previous: 0,
            },
        }
    }

    /// From now on mixes hold replies for at most so long (p99.9).
    pub(super) fn set_reply_quantile(&mut self, reply_quantile: Duration) {
        self.reply_quantile = reply_quantile;
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// SURBs that the window has room for, as far as they are used: a window that was large once is
    /// not filled up for a provider that answers little now. When it has nothing to say in any
    /// stream, it needs no more than at first.
    pub(super) fn deficit(&self, flight: &Flight, received: &Received, in_use: bool) -> usize {
        let used = if in_use { 2 * self.usage.recent() } else { 0 };
        let wanted = self.window.packets().min(used.max(MIN_WINDOW_SURBS));
        wanted.saturating_sub(self.outstanding(flight, received))
    }

    /// Whether SURBs are more urgent than data.
    pub(super) fn is_low(&self, flight: &Flight, received: &Received) -> bool {
        self.outstanding(flight, received) < self.window.packets() * 3 / 4
    }

    /// SURBs at the provider, under way to it, or under way back.
    fn outstanding(&self, flight: &Flight, received: &Received) -> usize {
        let returning = usize::try_from(received.missing()).unwrap_or(usize::MAX);
        self.stock.saturating_add(flight.uncounted_surbs()).saturating_add(returning)
    }

    /// A new reply with this number has come, whose SURB was built with delays that sum to
    /// `surb_delay`; `now` and `sent` are the two ends' clocks.
    pub(super) fn on_reply(&mut self, now: Instant, surb_delay: Duration, number: u64, trip: f64) {
        self.heard += 1;
        self.queueing.update_between_clocks(trip - surb_delay.as_secs_f64(), now);
        let left = now.checked_sub(surb_delay).unwrap_or(now);
        if self.marks.back().is_none_or(|&(_, end)| end <= number) {
            while self.marks.back().is_some_and(|&(at, _)| at >= left) {
                self.marks.pop_back();
            }
            self.marks.push_back((left, number + 1));
        }
    }

    /// A reply had more to say than what has arrived and how many SURBs there are.
    pub(super) fn on_use(&mut self, now: Instant) {
        self.usage.on_reply(now);
    }

    /// SURBs leave for the provider; whether it is still plausible that it needs them.
    pub(super) fn on_given(&mut self, count: usize) -> bool {
        self.given += count as u64;
        self.given <= MAX_PER_REPLY * self.heard + MAX_UNANSWERED
    }

    /// A reply with this number, which left at `left` by the delays of its SURB, tells how many SURBs
    /// the provider has; `base` is the round trip without delays and queues.
    pub(super) fn on_report(
        &mut self,
        now: Instant,
        flight: &mut Flight,
        number: u64,
        count: u64,
        left: Option<Instant>,
        base: Duration,
    ) {
        // An older report is worthless, but the reply still tells that the provider is using SURBs.
        if self.reported_by.is_none_or(|newest| number > newest) {
            self.reported_by = Some(number);
            let max = self.window.max_packets();
            self.stock = usize::try_from(count).unwrap_or(usize::MAX).min(max);
            if let Some(counted_at) = left.and_then(|left| left.checked_sub(base)) {
                flight.surbs_counted_at(Some(counted_at));
            }
        }
        let nearly_used_up = self.stock <= RESERVE_SURBS + self.window.packets() / 4;
        if nearly_used_up || self.queueing.is_above_target() {
            self.window.steer(now, &self.queueing, 1);
        }
    }

    /// When the next missing reply is to be given up.
    pub(super) fn settle_due(&self, received: &Received) -> Option<Instant> {
        let &(left, _) = self.marks.front().filter(|_| received.missing() > 0)?;
        Some(left + self.settle_wait())
    }

    /// Gives up replies that should have come by now; whether there were any.
    pub(super) fn settle(&mut self, now: Instant, received: &mut Received) -> bool {
        let wait = self.settle_wait();
        let mut gave_up = false;
        while let Some(&(left, end)) = self.marks.front()
            && left + wait <= now
        {
            gave_up |= received.settle_below(end);
            self.marks.pop_front();
        }
        gave_up
    }

    fn settle_wait(&self) -> Duration {
        self.reply_quantile + MIN_MARGIN + seconds(self.queueing.room())
    }

    /// Nothing was heard when it was due: the provider may have no SURB left.
    pub(super) fn forget_report(&mut self, flight: &mut Flight, received: &mut Received) {
        self.stock = 0;
        flight.surbs_counted_at(None);
        received.settle_below(received.end());
        self.marks.clear();
    }

    /// From now on SURBs are `generations` further, and all older ones count as used.
    pub(super) fn renew(&mut self, flight: &mut Flight, generations: u64) {
        self.generation += generations;
        self.stock = 0;
        flight.forget_surbs();
    }
}
