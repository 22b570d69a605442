//! What both ends of a session share: numbering, acknowledgements, loss and the streams.

use std::time::{Duration, Instant};

use super::estimate::{Queueing, seconds};
use super::flight::{Acked, Cargo, Flight, Sent};
use super::frame::{Ack, Frame, FrameError, put_varint, take_varint};
use super::received::{ACK_DELAY, Received};
use super::streams::{Side, Streams, Violation};

/// Round trip that is assumed, beyond the mixes' delays, before one was measured.
const INITIAL_BASE: Duration = Duration::from_millis(500);

/// Loss is judged with at least this much room for timers and busy processors.
pub(super) const MIN_MARGIN: Duration = Duration::from_millis(20);

/// Waits for a silent peer double up to this: it may be away for long, and a user notices when it
/// takes longer than that to go on once it is back. Two packets in 2 s burden nobody.
const MAX_BACKOFF_WAIT: Duration = Duration::from_secs(2);

/// Doublings after which every wait has reached it: the shortest is more than 2^-7 of it.
const MAX_BACKOFF: u32 = 7;

/// Packets that may be under way while the peer is silent.
const PROBE_PACKETS: usize = 2;

/// Most bytes that an ACK takes of a packet that carries other things as well.
const SHARED_ACK_BYTES: usize = 500;

/// Microseconds modulo 2^32.
#[expect(clippy::cast_possible_truncation, reason = "that is the modulo")]
pub(super) fn wrapping_us(time: Duration) -> u32 {
    time.as_micros() as u32
}

/// Numbering, acknowledgements and streams of one end.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) streams: Streams,
    pub(super) flight: Flight,
    pub(super) received: Received,
    /// Of round trips, without the delays that are known.
    pub(super) queueing: Queueing,
    /// Longest time (p99.9) that the mixes hold what the sender did not choose.
    unknown_delays: Duration,
    backoff: u32,
    /// When the first of the waits ended that have been in vain.
    waiting_in_vain_since: Option<Instant>,
    last_progress: Instant,
}

/// How a packet is to be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fill {
    pub(super) ack: bool,
    pub(super) data: bool,
    /// Bytes at the packet's end that others need.
    pub(super) reserved_bytes: usize,
}

impl Transport {
    pub(super) fn new(
        side: Side,
        now: Instant,
        unknown_delays: Duration,
        queueing: Queueing,
    ) -> Self {
        Self {
            streams: Streams::new(side),
            flight: Flight::default(),
            received: Received::default(),
            queueing,
            unknown_delays,
            backoff: 0,
            waiting_in_vain_since: None,
            last_progress: now,
        }
    }

    /// From now on mixes hold what the sender did not choose for at most so long (p99.9).
    pub(super) fn set_unknown_delays(&mut self, unknown_delays: Duration) {
        self.unknown_delays = unknown_delays;
    }

    /// Room that is left for queues and timers when loss is judged.
    pub(super) fn margin(&self) -> Duration {
        MIN_MARGIN + seconds(self.queueing.room())
    }

    pub(super) fn base_or_guess(&self) -> Duration {
        self.queueing.base().map_or(INITIAL_BASE, seconds)
    }

    /// The round trip without delays and queues, as far as it is known.
    pub(super) fn base_or_zero(&self) -> Duration {
        self.queueing.base().map_or(Duration::ZERO, seconds)
    }

    /// How long after its arrival by the sender's own delays a packet is heard of at the latest.
    pub(super) fn loss_wait(&self) -> Duration {
        self.base_or_guess() + self.unknown_delays + ACK_DELAY + self.margin()
    }

    /// The same with what silence adds to it.
    fn backed_off_wait(&self) -> Duration {
        let wait = self.loss_wait();
        (wait * (1 << self.backoff)).min(wait.max(MAX_BACKOFF_WAIT))
    }

    /// How many packets may be under way, of `window`.
    pub(super) fn window(&self, window: usize) -> usize {
        if self.backoff > 0 { window.min(PROBE_PACKETS) } else { window }
    }

    pub(super) fn is_backing_off(&self) -> bool {
        self.backoff > 0
    }

    /// Whether more than one wait has been in vain: then it is not the loss of single packets.
    pub(super) fn is_silence(&self) -> bool {
        self.backoff > 1
    }

    /// The peer can be heard, or its link is there again: whoever is backing off asks it soon, and need
    /// not wait until a long wait has ended. Only an acknowledgement ends the backing off, as the way
    /// there may be cut.
    pub(super) fn on_sign_of_life(&mut self) {
        self.backoff = self.backoff.min(1);
    }

    /// When the first of the waits ended that have been in vain since the last progress.
    pub(super) fn waiting_in_vain_since(&self) -> Option<Instant> {
        self.waiting_in_vain_since
    }

    pub(super) fn handle_ack(&mut self, ack: &Ack, now: Instant) -> Result<Acked, Violation> {
        let acked = self.flight.on_ack(ack).ok_or(Violation::NeverSent)?;
        for packet in &acked.packets {
            for cargo in &packet.cargo {
                self.streams.on_acked(cargo);
            }
        }
        if acked.is_progress() {
            self.backoff = 0;
            self.waiting_in_vain_since = None;
            self.last_progress = now;
        }
        Ok(acked)
    }

    /// Repeats what an ACK does not name though it was due at the peer by `cutoff`, or what the peer
    /// has given up.
    pub(super) fn lose_by_ack(&mut self, cutoff: Option<Instant>, ack: &Ack) -> Vec<Sent> {
        let mut lost = self.flight.lost_by_settling(ack);
        if let Some(cutoff) = cutoff {
            lost.extend(self.flight.lost_by_ack(cutoff, ack));
        }
        self.requeue(&lost);
        lost
    }

    /// Repeats what was not heard of in time.
    ///
    /// When the time has come for one packet, all that should have been heard of by then are lost: if
    /// each of them doubled the wait, the last would take hours.
    pub(super) fn lose_by_time(&mut self, now: Instant) -> Vec<Sent> {
        if self.loss_deadline().is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        let Some(cutoff) = now.checked_sub(self.loss_wait()) else { return Vec::new() };
        let lost = self.flight.lost_by_time(cutoff);
        if now.saturating_duration_since(self.last_progress) >= self.backed_off_wait() {
            self.backoff = (self.backoff + 1).min(MAX_BACKOFF);
            self.waiting_in_vain_since.get_or_insert(now);
        }
        self.requeue(&lost);
        lost
    }

    pub(super) fn loss_deadline(&self) -> Option<Instant> {
        Some(self.flight.first_arrival()? + self.backed_off_wait())
    }

    fn requeue(&mut self, lost: &[Sent]) {
        for packet in lost {
            for cargo in &packet.cargo {
                self.streams.on_lost(cargo);
            }
        }
    }

    /// Appends the packet's number and how far below it the floor is.
    pub(super) fn write_number(&self, out: &mut Vec<u8>) {
        let number = self.flight.next_number();
        put_varint(out, number);
        put_varint(out, number - self.flight.floor());
    }

    /// Appends an ACK, control and data frames, as `fill` says and as many as fit.
    pub(super) fn write_frames(
        &mut self,
        now: Instant,
        out: &mut Vec<u8>,
        max_bytes: usize,
        fill: Fill,
    ) -> Vec<Cargo> {
        let mut cargo = Vec::new();
        let limit = max_bytes - fill.reserved_bytes.min(max_bytes);
        if fill.ack && self.received.has_news() {
            let others = self.streams.has_control() || (fill.data && self.streams.has_data());
            let room = limit.saturating_sub(out.len());
            let room = if others { room.min(SHARED_ACK_BYTES) } else { room };
            if let Some(ack) = self.received.ack(now, room) {
                Frame::Ack(ack).encode(out);
            }
        }
        self.streams.write_control(out, limit, &mut cargo);
        if fill.data {
            self.streams.write_data(out, limit, &mut cargo);
        }
        cargo
    }
}

/// Reads what [`Transport::write_number`] wrote: number and floor.
pub(super) fn take_number(input: &mut &[u8]) -> Result<(u64, u64), FrameError> {
    let number = take_varint(input)?;
    let below = take_varint(input)?;
    let floor = number.checked_sub(below).ok_or(FrameError::Value("packet number"))?;
    Ok((number, floor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floors_above_numbers_are_refused() {
        assert_eq!(take_number(&mut &[5, 2][..]), Ok((5, 3)));
        assert_eq!(take_number(&mut &[5, 6][..]), Err(FrameError::Value("packet number")));
    }
}
