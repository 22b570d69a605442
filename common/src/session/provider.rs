//! The provider's end of a session: it answers on the SURBs it has been given.

use std::time::{Duration, Instant};

use bytes::BufMut;
use mixsocks_sphinx::{SURB_LEN, Surb};

use super::OpenOutcome;
use super::PacketKind;
use super::client::{SESSION_SILENCE, StreamReset};
use super::estimate::Queueing;
use super::flight::{Sent, Trip};
use super::frame::{CloseReason, Frame, FrameError, StreamId};
use super::stock::{RESERVE_SURBS, SurbStock};
use super::streams::{Side, StreamEvent, Violation};
use super::transport::{Fill, Transport, take_number, wrapping_us};
use crate::topology::delay_quantile;

/// Of the reserve, SURBs that plain acknowledgements leave for the rest.
const ACK_RESERVE_SURBS: usize = 4;

/// Mixes that a reply and the packet that acknowledges it pass: the provider knows nothing about their
/// delays.
const PATH_MIXES: u32 = 6;

/// How often a provider that waits for SURBs reports so, at most.
const MAX_REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Why a packet is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Its bytes are no frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It breaks a rule; the session must be closed.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The same packet came before, or the client gave it up.
    #[error("a duplicate")]
    Duplicate,
}

/// A session, as its provider sees it.
///
/// After every call, [`ProviderSession::poll_transmit`] may have something to send, and
/// [`ProviderSession::poll_timeout`] and [`ProviderSession::poll_event`] something new to say.
#[derive(Debug)]
pub struct ProviderSession {
    began: Instant,
    max_packet_bytes: usize,
    transport: Transport,
    stock: SurbStock,
    /// Data waits for SURBs since then, and so many reports said so.
    starving: Option<Starving>,
    last_heard: Instant,
    ended: bool,
}

#[derive(Debug, Clone, Copy)]
struct Starving {
    next_report: Instant,
    interval: Duration,
}

impl ProviderSession {
    /// A session whose packets hold `max_packet_bytes`; `mean_delay` is that of each mix.
    pub fn new(now: Instant, max_packet_bytes: usize, mean_delay: Duration) -> Self {
        Self {
            began: now,
            max_packet_bytes,
            transport: Transport::new(
                Side::Provider,
                now,
                delay_quantile(mean_delay, PATH_MIXES),
                Queueing::new(now, 6.0 * mean_delay.as_secs_f64()),
            ),
            stock: SurbStock::default(),
            starving: None,
            last_heard: now,
            ended: false,
        }
    }

    /// Whether the client closed the session, or it has been silent for too long.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Streams that are not over yet.
    pub fn stream_count(&self) -> usize {
        self.transport.streams.len()
    }

    /// When the client was heard of last.
    pub fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// SURBs at hand.
    pub fn stock_surbs(&self) -> usize {
        self.stock.len()
    }

    /// SURBs that were thrown away because there were too many or they did not parse.
    pub fn surbs_refused(&self) -> u64 {
        self.stock.refused()
    }

    /// Forgets all SURBs.
    #[cfg(test)]
    pub(super) fn lose_surbs(&mut self) {
        self.stock.lose();
    }

    /// Bytes of memory that its streams and SURBs take.
    pub fn held_bytes(&self) -> usize {
        self.transport.streams.held_bytes() + self.stock.len() * SURB_LEN
    }

    /// Each mix delays by this on average from now on.
    pub fn set_mean_delay(&mut self, mean_delay: Duration) {
        self.transport.set_unknown_delays(delay_quantile(mean_delay, PATH_MIXES));
    }

    // --- Streams: as in the client's session.

    /// Answers a [`StreamEvent::Open`].
    pub fn opened(&mut self, stream: StreamId, outcome: OpenOutcome) {
        self.transport.streams.opened(stream, outcome);
    }

    /// Takes as many bytes as there is room for; `None` when the stream was reset or finished.
    pub fn write(&mut self, stream: StreamId, bytes: &[u8]) -> Option<usize> {
        self.transport.streams.write(stream, bytes)
    }

    /// Nothing more will be written; the other direction goes on.
    pub fn finish(&mut self, stream: StreamId) {
        self.transport.streams.finish(stream);
    }

    /// Reads: `Ok(Some(0))` is the end, `Ok(None)` nothing yet.
    ///
    /// # Errors
    /// When the stream was reset.
    pub fn read(&mut self, stream: StreamId, out: &mut [u8]) -> Result<Option<usize>, StreamReset> {
        self.transport.streams.read(stream, out).map_err(|()| StreamReset)
    }

    /// The application lets go of the stream. Unless both directions have ended, it is reset.
    pub fn release(&mut self, stream: StreamId) {
        self.transport.streams.release(stream);
    }

    /// What the application must be told.
    pub fn poll_event(&mut self) -> Option<StreamEvent> {
        self.transport.streams.poll_event()
    }

    // --- Packets.

    /// Takes the contents of a packet after its session id.
    ///
    /// # Errors
    /// [`PacketError`]; a frame that does not parse, or a violation, ends the session.
    pub fn handle_packet(&mut self, now: Instant, contents: &[u8]) -> Result<(), PacketError> {
        let mut input = contents;
        let (number, floor) = take_number(&mut input)?;
        let mut frames = Vec::new();
        while let Some(frame) = Frame::decode(&mut input)? {
            frames.push(frame);
        }
        if !self.transport.received.on_packet(number, floor, now) {
            return Err(PacketError::Duplicate);
        }
        self.last_heard = now;
        self.transport.on_sign_of_life();
        for frame in &frames {
            match frame {
                Frame::Open { .. }
                | Frame::Data { .. }
                | Frame::Credit { .. }
                | Frame::Reset { .. } => self.transport.streams.handle_frame(frame)?,
                Frame::Start { .. } | Frame::Ping => {}
                Frame::Ack(ack) => {
                    let acked = self.transport.handle_ack(ack, now)?;
                    if let Some(latest) = &acked.latest {
                        self.on_round_trip(now, latest, Duration::from_micros(ack.delay_us));
                    }
                    // The client knows the delays of replies, so it judges which are lost.
                    self.transport.lose_by_ack(None, ack);
                }
                Frame::Surbs { generation, surbs } => self.take_surbs(now, *generation, surbs),
                Frame::Close(_) => self.ended = true,
                Frame::Opened { .. } | Frame::Stock { .. } => {
                    return Err(Violation::Direction.into());
                }
            }
        }
        if frames.iter().any(Frame::elicits_ack) {
            self.transport.received.owe_ack(now);
        }
        Ok(())
    }

    fn take_surbs(&mut self, now: Instant, generation: u64, surbs: &[[u8; SURB_LEN]]) {
        self.stock.take_in(now, generation, surbs);
        if self.stock.len() > RESERVE_SURBS {
            self.starving = None;
        }
    }

    fn on_round_trip(&mut self, now: Instant, latest: &Trip, ack_delay: Duration) {
        let trip = now.saturating_duration_since(latest.at).saturating_sub(ack_delay).as_secs_f64();
        self.transport.queueing.update(trip, now);
    }

    /// When [`ProviderSession::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.ended {
            return None;
        }
        let report = self.starving.filter(|_| !self.stock.is_empty());
        let report = report.map(|starving| starving.next_report);
        let silence = Some(self.last_heard + SESSION_SILENCE);
        let retired = self.stock.poll_timeout();
        [self.ack_due(), report, self.transport.loss_deadline(), retired, silence]
            .into_iter()
            .flatten()
            .min()
    }

    /// Handles what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if now >= self.last_heard + SESSION_SILENCE {
            self.ended = true;
            return;
        }
        self.stock.handle_timeout(now);
        self.transport.lose_by_time(now);
    }

    /// Writes the contents of one reply to `out` and returns the SURB that it must be sent with;
    /// `None` when there is nothing to send, or no SURB to send it with.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Surb> {
        let fill = self.next_reply(now)?;
        let surb = self.stock.pop(fill.data)?;
        out.clear();
        out.put_u8(PacketKind::Reply as u8);
        self.transport.write_number(out);
        // Wraps after 71 minutes: the client compares neighbours only.
        let sent_us = wrapping_us(now.saturating_duration_since(self.began));
        out.put_u32(sent_us);
        let count = self.stock.newest() as u64;
        Frame::Stock { generation: self.stock.generation(), count }.encode(out);
        let cargo = self.transport.write_frames(now, out, self.max_packet_bytes, fill);
        debug_assert!(out.len() <= self.max_packet_bytes);
        let eliciting = !cargo.is_empty();
        let number = self.transport.flight.next_number();
        self.transport.flight.on_sent(eliciting.then_some(Sent {
            number,
            at: now,
            arrives: now,
            cargo,
            surbs: 0,
            is_refill: false,
        }));
        Some(surb)
    }

    /// When an acknowledgement must leave, if there is a SURB that it may use.
    fn ack_due(&self) -> Option<Instant> {
        let due = self.transport.received.ack_due()?;
        (self.stock.len() > ACK_RESERVE_SURBS).then_some(due)
    }

    /// What the next reply is for; `None` when there is none to send now.
    fn next_reply(&mut self, now: Instant) -> Option<Fill> {
        if self.stock.is_empty() {
            return None;
        }
        let data = self.transport.streams.has_data();
        if !data {
            self.starving = None;
        }
        let room = self.transport.flight.len() < self.transport.window(usize::MAX);
        let spare = self.stock.len() > RESERVE_SURBS;
        let fill = |data| Fill { ack: true, data, reserved_bytes: 0 };
        if self.ended {
            // One last reply acknowledges the CLOSE.
            return self.transport.received.ack_due().map(|_| fill(false));
        }
        if data && spare && room {
            return Some(fill(true));
        }
        let ack_due = self.ack_due().is_some_and(|due| due <= now);
        if ack_due || (room && self.transport.streams.has_control()) {
            return Some(fill(data && spare && room));
        }
        if data && !spare {
            return self.report_starving(now).then_some(fill(false));
        }
        None
    }

    /// Whether it is time to tell, from the reserve, that data waits for SURBs. The last reply with
    /// data told the stock already, so the first report waits until that one must have arrived.
    fn report_starving(&mut self, now: Instant) -> bool {
        let wait = self.transport.loss_wait();
        let starving =
            self.starving.get_or_insert(Starving { next_report: now + wait, interval: wait });
        if now < starving.next_report {
            return false;
        }
        starving.interval = (starving.interval * 2).min(MAX_REPORT_INTERVAL);
        starving.next_report = now + starving.interval;
        true
    }

    /// The last words to a client whose session is ended by the provider: the contents of a reply
    /// and the SURB to send it with, when there is one.
    pub fn refuse(mut self, reason: CloseReason, out: &mut Vec<u8>) -> Option<Surb> {
        let surb = self.stock.pop(false)?;
        write_close(reason, out);
        Some(surb)
    }
}

/// The contents of a reply that closes a session. The client takes a lone CLOSE whatever its number,
/// as a provider that does not know the session does not know its numbers.
pub(super) fn write_close(reason: CloseReason, out: &mut Vec<u8>) {
    out.clear();
    out.put_slice(&[PacketKind::Reply as u8, 0, 0]);
    out.put_u32(0);
    Frame::Close(reason).encode(out);
}
