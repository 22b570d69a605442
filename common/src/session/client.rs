//! The client's end of a session: it alone controls how much is under way in both directions.

use std::fmt;
use std::time::{Duration, Instant};

use bytes::BufMut;
use mixsocks_sphinx::SURB_LEN;

use super::flight::{Cargo, Sent};
use super::frame::{CloseReason, Frame, FrameError, StreamId, put_surbs_header};
use super::provider::RESERVE_SURBS;
use super::streams::{Side, StreamEvent, Violation};
use super::transport::{Fill, RecentMin, Smoothed, Transport, take_number, wrapping_us};
use super::{PacketKind, SESSION_ID_LEN};
use crate::target::Target;
use crate::topology::delay_quantile;

/// Queueing that the windows aim at: enough to keep the path busy, little enough that a new request
/// hardly waits.
const TARGET_QUEUEING_SECONDS: f64 = 0.020;

/// Packets under way to the provider: at first, at least, and at most. The most is what 13 MiB/s
/// need at a round trip of 300 ms.
const INITIAL_WINDOW: f64 = 32.0;
const MIN_WINDOW: f64 = 16.0;
const MAX_WINDOW: f64 = 2048.0;

/// SURBs at the provider or under way in either direction: at first and at least, and at most. The
/// first is one page of text; the most bounds the client's memory for recoveries to about 1 MiB.
const MIN_SURB_WINDOW: f64 = 40.0;
const MAX_SURB_WINDOW: f64 = 4096.0;

/// SURBs of one packet that has nothing else: five fit into 2,031 bytes.
const REFILL_SURBS: usize = 5;

/// A session with open streams that is silent in both directions asks whether all is well.
pub const KEEPALIVE: Duration = Duration::from_secs(5 * 60);

/// A session from which nothing was heard for so long is dead.
pub const SESSION_SILENCE: Duration = Duration::from_secs(15 * 60);

/// CLOSE is repeated so many times at most: the provider forgets silent sessions by itself.
const CLOSE_ATTEMPTS: u32 = 3;

/// Random name of a session, known to its client and its provider alone; who knows it can write
/// into the session, so it is not shown.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; SESSION_ID_LEN]);

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(…)")
    }
}

/// Makes SURBs when a packet has room for them.
pub trait SurbSource {
    /// How many can be had at once.
    fn available(&self) -> usize;

    /// Appends one SURB of 396 bytes. Called at most [`SurbSource::available`] times.
    fn write_surb(&mut self, out: &mut Vec<u8>);
}

/// Why a reply is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// Its bytes are no frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It breaks a rule; the session has ended.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The same reply came before, or the provider gave it up.
    #[error("a duplicate")]
    Duplicate,
}

/// A session, as its client sees it.
///
/// After every call, [`ClientSession::poll_transmit`] may have something to send, and
/// [`ClientSession::poll_timeout`] and [`ClientSession::poll_event`] something new to say.
#[derive(Debug)]
pub struct ClientSession {
    id: SessionId,
    started_ms: u64,
    began: Instant,
    max_packet_bytes: usize,
    transport: Transport,
    confirmed: bool,
    window: f64,
    window_is_probing: bool,
    surbs: SurbWindow,
    ping_wanted: bool,
    last_heard: Instant,
    last_asked: Instant,
    closing: Closing,
    closed: Option<CloseReason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    Wanted { attempts: u32 },
    Sent { attempts: u32 },
}

/// How many SURBs are where.
#[derive(Debug)]
struct SurbWindow {
    generation: u64,
    window: f64,
    is_probing: bool,
    /// Number of the reply that told `stock`; replies behind it tell older news.
    reported_by: Option<u64>,
    stock: usize,
    /// When that reply left the provider, by the delays of its SURB.
    report_left: Option<Instant>,
    /// Replies with lower numbers that have not arrived are lost.
    horizon: u64,
    horizon_marks: std::collections::VecDeque<(Instant, u64)>,
    replies_under_way: usize,
    base: RecentMin,
    queueing: Smoothed,
    reply_quantile: Duration,
}

impl ClientSession {
    /// A new session whose first packet says that it began at `started_ms` (milliseconds since 1970)
    /// and whose packets hold `max_packet_bytes`; `mean_delay` is that of each mix.
    pub fn new(
        id: SessionId,
        started_ms: u64,
        now: Instant,
        max_packet_bytes: usize,
        mean_delay: Duration,
    ) -> Self {
        let reply_quantile = delay_quantile(mean_delay, 3);
        Self {
            id,
            started_ms,
            began: now,
            max_packet_bytes,
            transport: Transport::new(Side::Client, now, reply_quantile),
            confirmed: false,
            window: INITIAL_WINDOW,
            window_is_probing: true,
            surbs: SurbWindow::new(now, reply_quantile),
            ping_wanted: false,
            last_heard: now,
            last_asked: now,
            closing: Closing::No,
            closed: None,
        }
    }

    /// Its name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// How old it is.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Why it ended, once it has; its streams are then reset.
    pub fn closed(&self) -> Option<CloseReason> {
        self.closed
    }

    /// Streams that are not over yet.
    pub fn stream_count(&self) -> usize {
        self.transport.streams.len()
    }

    /// When the provider was heard of last; before that, when the session began.
    pub fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// Whether the provider has answered at all.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    // --- Streams.

    /// Opens a stream; `None` when [`super::MAX_STREAMS`] are open or the session has ended.
    ///
    /// Bytes written before the next [`ClientSession::poll_transmit`] travel with the OPEN.
    pub fn open(&mut self, target: Target) -> Option<StreamId> {
        if self.closed.is_some() || self.closing != Closing::No {
            return None;
        }
        self.transport.streams.open(target)
    }

    /// Takes as many bytes as there is room for, and says how many; after 0 a
    /// [`StreamEvent::Writable`] follows. `None` when the stream was reset or finished.
    pub fn write(&mut self, stream: StreamId, bytes: &[u8]) -> Option<usize> {
        self.transport.streams.write(stream, bytes)
    }

    /// Nothing more will be written; the other direction goes on.
    pub fn finish(&mut self, stream: StreamId) {
        self.transport.streams.finish(stream);
    }

    /// Reads: `Ok(Some(0))` is the end, `Ok(None)` nothing yet (a [`StreamEvent::Readable`]
    /// follows).
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

    /// Tells the provider to forget the session. Streams that are open are reset.
    pub fn close(&mut self) {
        if self.closing == Closing::No {
            self.closing = Closing::Wanted { attempts: 0 };
        }
    }

    /// SURBs made for a provider that shall not use the older ones any more.
    pub fn generation(&self) -> u64 {
        self.surbs.generation
    }

    // --- Replies.

    /// Takes the contents of a reply whose SURB was built with delays that sum to `surb_delay`.
    ///
    /// # Errors
    /// [`ReplyError`]; after a violation the session has ended.
    pub fn handle_reply(
        &mut self,
        now: Instant,
        surb_delay: Duration,
        plaintext: &[u8],
    ) -> Result<(), ReplyError> {
        if self.closed.is_some() {
            return Ok(());
        }
        let mut input = plaintext;
        PacketKind::Reply.take(&mut input)?;
        let (number, floor) = take_number(&mut input)?;
        let mut sent_us = [0u8; 4];
        sent_us.copy_from_slice(input.split_off(..4).ok_or(FrameError::Truncated)?);
        if !self.transport.received.on_packet(number, floor, now) {
            return Err(ReplyError::Duplicate);
        }
        self.last_heard = now;
        self.confirmed = true;
        let left = now.checked_sub(surb_delay);
        self.surbs.on_reply(now, surb_delay, u32::from_be_bytes(sent_us), self.began);
        let mut owes_ack = false;
        let mut frames = Vec::new();
        while let Some(frame) = Frame::decode(&mut input)? {
            frames.push(frame);
        }
        for frame in frames {
            match &frame {
                Frame::Opened { .. }
                | Frame::Data { .. }
                | Frame::Credit { .. }
                | Frame::Reset { .. } => {
                    owes_ack = true;
                    if let Err(violation) = self.transport.streams.handle_frame(&frame) {
                        self.end(CloseReason::Protocol);
                        return Err(violation.into());
                    }
                }
                Frame::Ping => owes_ack = true,
                Frame::Ack(ack) => {
                    let acked = match self.transport.handle_ack(ack, now) {
                        Ok(acked) => acked,
                        Err(violation) => {
                            self.end(CloseReason::Protocol);
                            return Err(violation.into());
                        }
                    };
                    if let Some(latest) = &acked.latest {
                        self.on_round_trip(
                            now,
                            latest,
                            surb_delay,
                            Duration::from_micros(ack.delay_us),
                        );
                    }
                    self.grow_window(acked.packets.len());
                    if acked.packets.iter().any(|packet| packet.cargo.contains(&Cargo::Close)) {
                        self.end(CloseReason::Done);
                        return Ok(());
                    }
                    let slack = self.transport.base_or_guess() + self.transport.margin();
                    let cutoff = left.and_then(|left| left.checked_sub(slack));
                    let lost = self.transport.lose_by_ack(cutoff, ack);
                    self.on_lost(&lost);
                }
                Frame::Stock { generation, count } => {
                    if *generation == self.surbs.generation {
                        self.surbs.on_report(number, *count, left);
                    }
                }
                Frame::Close(reason) => {
                    self.end(*reason);
                    return Ok(());
                }
                Frame::Start { .. } | Frame::Open { .. } | Frame::Surbs { .. } => {
                    self.end(CloseReason::Protocol);
                    return Err(Violation::Direction.into());
                }
            }
        }
        if owes_ack {
            self.transport.received.owe_ack(now);
        }
        self.surbs.count_replies_under_way(now, &self.transport);
        Ok(())
    }

    /// Ends the session at once: every stream is reset.
    pub fn end(&mut self, reason: CloseReason) {
        self.closed.get_or_insert(reason);
    }

    fn on_round_trip(
        &mut self,
        now: Instant,
        latest: &Sent,
        surb_delay: Duration,
        ack_delay: Duration,
    ) {
        let chosen = (latest.arrives - latest.at) + surb_delay + ack_delay;
        let above = now.saturating_duration_since(latest.at).as_secs_f64() - chosen.as_secs_f64();
        self.transport.base.update(above, now);
        let queueing = above - self.transport.base.min().unwrap_or(above);
        self.transport.queueing.update(queueing);
    }

    fn grow_window(&mut self, acked: usize) {
        // A window that is not used says nothing about the path.
        if acked == 0 || (self.transport.flight.len() as f64) < self.window / 2.0 - acked as f64 {
            return;
        }
        steer(
            &mut self.window,
            &mut self.window_is_probing,
            self.transport.queueing.value(),
            acked as f64,
        );
        self.window = self.window.clamp(MIN_WINDOW, MAX_WINDOW);
    }

    fn on_lost(&mut self, lost: &[Sent]) {
        if lost.iter().any(|packet| packet.cargo.contains(&Cargo::Close))
            && let Closing::Sent { attempts } = self.closing
        {
            self.closing = Closing::Wanted { attempts };
        }
    }

    // --- Time.

    /// When [`ClientSession::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.closed.is_some() {
            return None;
        }
        let keepalive = (!self.transport.streams.is_empty() && self.transport.flight.is_empty())
            .then(|| self.last_heard.max(self.last_asked) + KEEPALIVE);
        let silence =
            (!self.transport.flight.is_empty()).then(|| self.last_heard + SESSION_SILENCE);
        // A session that is being closed owes nothing any more.
        let ack = self.transport.received.ack_due().filter(|_| self.closing == Closing::No);
        [ack, self.transport.loss_deadline(), keepalive, silence].into_iter().flatten().min()
    }

    /// Handles what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.closed.is_some() {
            return;
        }
        if !self.transport.flight.is_empty() && now >= self.last_heard + SESSION_SILENCE {
            return self.end(CloseReason::Unknown);
        }
        let lost = self.transport.lose_by_time(now);
        self.on_lost(&lost);
        if !lost.is_empty() {
            // Whatever the packets carried: the provider must get SURBs and a reason to answer.
            self.ping_wanted = true;
            if self.transport.is_backing_off() {
                self.surbs.forget_report();
            }
        }
        if !self.transport.streams.is_empty()
            && self.transport.flight.is_empty()
            && now >= self.last_heard.max(self.last_asked) + KEEPALIVE
        {
            self.ping_wanted = true;
        }
    }

    // --- Packets.

    /// How many SURBs should be ready for the next packets.
    pub fn surb_demand(&self) -> usize {
        if self.closed.is_some() || self.closing != Closing::No {
            return 0;
        }
        let used = !self.transport.streams.is_empty() || self.ping_wanted;
        if used || self.confirmed { self.surbs.deficit(&self.transport) } else { 0 }
    }

    /// Whether [`ClientSession::poll_transmit`] has something to send at `now`, given that `surbs`
    /// SURBs are at hand.
    pub fn wants_transmit(&self, now: Instant, surbs: usize) -> bool {
        self.purpose(now, surbs).is_some()
    }

    fn purpose(&self, now: Instant, surbs_available: usize) -> Option<Purpose> {
        if self.closed.is_some() {
            return None;
        }
        match self.closing {
            Closing::Wanted { .. } => return Some(Purpose::Control),
            Closing::Sent { .. } => return None,
            Closing::No => {}
        }
        let in_flight = self.transport.flight.len();
        let window = self.transport.window(packets(self.window));
        let ack_due = self.transport.received.ack_due().is_some_and(|due| due <= now);
        if ack_due
            || (in_flight < window && (self.ping_wanted || self.transport.streams.has_control()))
        {
            return Some(Purpose::Control);
        }
        // Refills are not data: they are bounded by the SURB window, and a full window of uploads
        // must not starve a download.
        let refill_allowed = in_flight < self.transport.window(2 * packets(MAX_WINDOW));
        let refill = surbs_available.min(self.surbs.deficit(&self.transport)) >= REFILL_SURBS
            && self.surb_demand() > 0;
        let data = in_flight < window && self.transport.streams.has_data();
        match (refill && refill_allowed, data) {
            (true, true) if self.surbs.is_low(&self.transport) => Some(Purpose::Refill),
            (_, true) => Some(Purpose::Data),
            (true, false) => Some(Purpose::Refill),
            (false, false) => None,
        }
    }

    /// Writes the contents of one packet, whose mixes delay it by `packet_delay` in all, to `out`;
    /// `false` when there is nothing to send.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        packet_delay: Duration,
        surbs: &mut impl SurbSource,
        out: &mut Vec<u8>,
    ) -> bool {
        let Some(purpose) = self.purpose(now, surbs.available()) else { return false };
        out.clear();
        out.put_u8(PacketKind::Session as u8);
        out.put_slice(&self.id.0);
        self.transport.write_number(out);
        if !self.confirmed {
            Frame::Start { time_ms: self.started_ms, key_agreement: &[] }.encode(out);
        }
        let surbs_first = if purpose == Purpose::Refill {
            REFILL_SURBS.min((self.max_packet_bytes - out.len() - SURBS_HEADER_BYTES) / SURB_LEN)
        } else {
            0
        };
        let reserved_bytes =
            if surbs_first > 0 { surbs_first * SURB_LEN + SURBS_HEADER_BYTES } else { 0 };
        let fill = Fill { ack: true, data: purpose != Purpose::Refill, reserved_bytes };
        let mut cargo = if self.closing == Closing::No {
            self.transport.write_frames(now, out, self.max_packet_bytes, fill)
        } else {
            Vec::new()
        };
        if let Closing::Wanted { attempts } = self.closing {
            Frame::Close(CloseReason::Done).encode(out);
            if attempts + 1 >= CLOSE_ATTEMPTS {
                self.end(CloseReason::Done);
            }
            self.closing = Closing::Sent { attempts: attempts + 1 };
            cargo.push(Cargo::Close);
        }
        let surb_count = self.write_surbs(surbs, out);
        // Every packet with SURBs is to be heard of, so that it is known where they are.
        let eliciting = !cargo.is_empty() || surb_count > 0 || self.ping_wanted;
        if cargo.is_empty() && eliciting {
            Frame::Ping.encode(out);
        }
        if eliciting {
            self.ping_wanted = false;
            self.last_asked = now;
        }
        debug_assert!(out.len() <= self.max_packet_bytes);
        self.transport.flight.on_sent(eliciting.then_some(Sent {
            at: now,
            arrives: now + packet_delay,
            cargo,
            surbs: surb_count,
        }));
        true
    }

    /// Fills what is left of the packet with SURBs, as many as the window allows.
    fn write_surbs(&self, surbs: &mut impl SurbSource, out: &mut Vec<u8>) -> usize {
        let room =
            (self.max_packet_bytes - out.len()).saturating_sub(SURBS_HEADER_BYTES) / SURB_LEN;
        let count = room.min(surbs.available()).min(self.surbs.deficit(&self.transport));
        if count > 0 {
            put_surbs_header(out, self.surbs.generation, count);
            for _ in 0..count {
                surbs.write_surb(out);
            }
        }
        count
    }
}

/// The stream was reset by the peer, by a failed OPEN, or with its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream was reset")]
pub struct StreamReset;

/// Type, generation, count and a PING.
const SURBS_HEADER_BYTES: usize = 1 + 8 + 1 + 1;

/// Why a packet is sent: it decides what goes in first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Control,
    Data,
    Refill,
}

/// Moves a window towards the queueing that is aimed at, after `packets` of it were heard of.
///
/// At first it doubles with each round trip; later it grows or shrinks by up to a tenth. Loss alone
/// changes nothing: a mixnet loses packets at random.
fn steer(window: &mut f64, is_probing: &mut bool, queueing: f64, packets: f64) {
    if *is_probing {
        if queueing <= TARGET_QUEUEING_SECONDS {
            *window += packets;
            return;
        }
        *is_probing = false;
        *window *= 0.8;
    }
    let error = ((TARGET_QUEUEING_SECONDS - queueing) / TARGET_QUEUEING_SECONDS).clamp(-2.0, 1.0);
    *window += 0.1 * error * packets;
}

/// The whole packets of a window.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "windows are clamped to thousands"
)]
fn packets(window: f64) -> usize {
    window as usize
}

impl SurbWindow {
    fn new(now: Instant, reply_quantile: Duration) -> Self {
        Self {
            generation: 0,
            window: MIN_SURB_WINDOW,
            is_probing: true,
            reported_by: None,
            stock: 0,
            report_left: None,
            horizon: 0,
            horizon_marks: std::collections::VecDeque::new(),
            replies_under_way: 0,
            base: RecentMin::new(now),
            queueing: Smoothed::default(),
            reply_quantile,
        }
    }

    /// SURBs that the window has room for.
    fn deficit(&self, transport: &Transport) -> usize {
        packets(self.window).saturating_sub(self.outstanding(transport))
    }

    fn is_low(&self, transport: &Transport) -> bool {
        self.outstanding(transport) < packets(self.window) * 3 / 4
    }

    /// SURBs at the provider, under way to it, or under way back.
    fn outstanding(&self, transport: &Transport) -> usize {
        let under_way = match self.report_left {
            Some(left) => transport.flight.surbs_arriving_after(left),
            None => transport.flight.surbs(),
        };
        self.stock + under_way + self.replies_under_way
    }

    fn on_reply(&mut self, now: Instant, surb_delay: Duration, sent_us: u32, began: Instant) {
        // Both clocks are arbitrary: only the difference to the smallest one counts. It wraps after
        // 71 minutes, which looks like a jump and is forgotten with the minimum.
        let now_us = wrapping_us(now.saturating_duration_since(began));
        let trip =
            f64::from(now_us.wrapping_sub(sent_us).cast_signed()) / 1e6 - surb_delay.as_secs_f64();
        self.base.update(trip, now);
        let queueing = trip - self.base.min().unwrap_or(trip);
        self.queueing.update(queueing.min(10.0));
    }

    fn on_report(&mut self, number: u64, count: u64, left: Option<Instant>) {
        // An older report is worthless, but the reply still tells that the provider is using SURBs.
        if self.reported_by.is_none_or(|newest| number > newest) {
            self.reported_by = Some(number);
            self.stock = usize::try_from(count).unwrap_or(usize::MAX).min(packets(MAX_SURB_WINDOW));
            self.report_left = left;
        }
        let nearly_used_up = self.stock <= RESERVE_SURBS + packets(self.window) / 4;
        if nearly_used_up || self.queueing.value() > TARGET_QUEUEING_SECONDS {
            steer(&mut self.window, &mut self.is_probing, self.queueing.value(), 1.0);
            self.window = self.window.clamp(MIN_SURB_WINDOW, MAX_SURB_WINDOW);
        }
    }

    /// Counts the replies that were sent, have not arrived and may still do so.
    fn count_replies_under_way(&mut self, now: Instant, transport: &Transport) {
        let end = transport.received.end();
        let wait = self.reply_quantile + transport.margin();
        if self.horizon_marks.back().is_none_or(|(at, _)| *at + wait / 8 <= now) {
            self.horizon_marks.push_back((now, end));
        }
        while let Some(&(at, mark)) = self.horizon_marks.front()
            && at + wait <= now
        {
            self.horizon = self.horizon.max(mark);
            self.horizon_marks.pop_front();
        }
        let sent = end.saturating_sub(self.horizon);
        let arrived = transport.received.count_from(self.horizon);
        self.replies_under_way =
            usize::try_from(sent.saturating_sub(arrived)).unwrap_or(usize::MAX);
    }

    /// Nothing was heard when it was due: the provider may have no SURB left.
    fn forget_report(&mut self) {
        self.stock = 0;
        self.replies_under_way = 0;
        self.report_left = None;
    }
}
