//! The client's end of a session: it alone controls how much is under way in both directions.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use bytes::BufMut;
use mixsocks_sphinx::SURB_LEN;

use super::estimate::{Queueing, Window};
use super::flight::{Cargo, Sent, Trip};
use super::frame::{Ack, CloseReason, Frame, FrameError, StreamId, put_surbs_header};
use super::streams::{Side, StreamEvent, Violation};
use super::surb_window::SurbWindow;
use super::transport::{Fill, Transport, take_number, wrapping_us};
use super::{PacketKind, PresentedToken, SESSION_ID_LEN};
use crate::target::Target;
use crate::topology::delay_quantile;

/// Packets under way to the provider: at first, at least, and at most. The most is what 13 MiB/s
/// need at a round trip of 300 ms.
const INITIAL_WINDOW: u32 = 32;
const MIN_WINDOW: u32 = 16;
const MAX_WINDOW: u32 = 2048;

/// SURBs of one packet that has nothing else: five fit into 2,031 bytes.
const REFILL_SURBS: usize = 5;

/// A session with open streams that is silent in both directions asks whether all is well: so long after
/// something was said, and then twice as rarely each time up to [`KEEPALIVE`]. The silence may be one of
/// replies that lead to nowhere, which only a question shows.
pub const FIRST_KEEPALIVE: Duration = Duration::from_secs(10);

/// How long a session with open streams is silent at most.
pub const KEEPALIVE: Duration = Duration::from_secs(5 * 60);

/// A session from which nothing was heard for so long is dead.
pub const SESSION_SILENCE: Duration = Duration::from_secs(15 * 60);

/// In a silence SURBs get a new generation, and another one each time that it has lasted so much longer:
/// all that the provider has may lead to nowhere, and it uses the oldest first. Longer than gateways hold
/// packets for somebody who reconnects, and a wait more.
const RENEW_EVERY: Duration = Duration::from_secs(15);

/// How far the generation goes on when those before it are dead, and when the last one is only to be
/// replaced: a provider keeps the generation before the newest, and none before that.
const DEAD_GENERATIONS: u64 = 2;
const RETIRED_GENERATIONS: u64 = 1;

/// CLOSE is repeated so many times at most: the provider forgets silent sessions by itself.
const CLOSE_ATTEMPTS: u32 = 3;

/// Fates of packets that wait to be asked for; more than can be under way.
const MAX_FATES: usize = 8192;

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

/// What became of a packet that was to be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketFate {
    /// What [`ClientSession::next_number`] was before the packet.
    pub number: u64,
    /// When it left.
    pub sent: Instant,
    /// Whether the provider has it; else it is lost, as far as can be told.
    pub has_come: bool,
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
    /// Until the provider has answered.
    access_token: Option<PresentedToken>,
    began: Instant,
    max_packet_bytes: usize,
    transport: Transport,
    confirmed: bool,
    window: Window,
    surbs: SurbWindow,
    /// When a silence last led to a new generation of SURBs.
    renewed: Option<Instant>,
    ping_wanted: bool,
    fates: VecDeque<PacketFate>,
    last_heard: Instant,
    last_asked: Instant,
    /// When the first packet left that asks for an answer, of those since the last answer.
    unanswered_since: Option<Instant>,
    /// Silence after which it asks next.
    keepalive: Duration,
    closing: Closing,
    closed: Option<CloseReason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    Wanted { attempts: u32 },
    Sent { attempts: u32 },
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
            access_token: None,
            began: now,
            max_packet_bytes,
            transport: Transport::new(Side::Client, now, reply_quantile, Queueing::new(now, 0.0)),
            confirmed: false,
            window: Window::new(now, INITIAL_WINDOW, MIN_WINDOW, MAX_WINDOW),
            surbs: SurbWindow::new(now, reply_quantile),
            renewed: None,
            ping_wanted: false,
            fates: VecDeque::new(),
            last_heard: now,
            last_asked: now,
            unanswered_since: None,
            keepalive: FIRST_KEEPALIVE,
            closing: Closing::No,
            closed: None,
        }
    }

    /// The same with a token for the provider that it is with.
    #[must_use]
    pub fn with_access_token(self, access_token: Option<PresentedToken>) -> Self {
        Self { access_token, ..self }
    }

    /// Its name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// When it began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Whether it could be closed: it has no streams, and has neither ended nor been closed.
    pub fn is_idle(&self) -> bool {
        self.stream_count() == 0 && self.closing == Closing::No && self.closed.is_none()
    }

    /// Why it ended, once it has; its streams are then reset.
    pub fn closed(&self) -> Option<CloseReason> {
        self.closed
    }

    /// Streams that are not over yet.
    pub fn stream_count(&self) -> usize {
        self.transport.streams.len()
    }

    /// Bytes of memory that its streams take.
    pub fn held_bytes(&self) -> usize {
        self.transport.streams.held_bytes()
    }

    /// When the provider was heard of last; before that, when the session began.
    pub fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// Since when the provider owes an answer, whatever it answers to; `None` when it owes none.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.unanswered_since
    }

    /// The number of the next packet.
    pub fn next_number(&self) -> u64 {
        self.transport.flight.next_number()
    }

    /// Packets whose fate is open.
    pub fn packets_under_way(&self) -> usize {
        self.transport.flight.len()
    }

    /// What became of a packet, one of those that were to be acknowledged. Who does not ask misses all
    /// but the last 8,192.
    pub fn poll_fate(&mut self) -> Option<PacketFate> {
        self.fates.pop_front()
    }

    fn note_fates(&mut self, packets: &[Sent], has_come: bool) {
        for &Sent { number, at, .. } in packets {
            if self.fates.len() == MAX_FATES {
                self.fates.pop_front();
            }
            self.fates.push_back(PacketFate { number, sent: at, has_come });
        }
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

    /// Asks the provider whether it is there.
    pub fn ping(&mut self) {
        self.ping_wanted = true;
    }

    /// The way to the provider was cut, at this end, and is free again. Streams that wait for nothing but
    /// the provider's words ask for them: what it said meanwhile may be lost, and its SURBs with it.
    pub fn path_is_back(&mut self) {
        self.transport.on_sign_of_life();
        if !self.transport.streams.is_empty() && self.closing == Closing::No {
            self.ping();
        }
    }

    /// From now on SURBs are of a new generation, and the provider uses no older ones any more: those
    /// lead to nowhere, as a node on their routes is gone or has another key, or the client has another
    /// gateway. Replies under way are still taken.
    ///
    /// Without being told, a session does so when it hears nothing for long.
    pub fn renew_surbs(&mut self) {
        self.surbs.renew(&mut self.transport.flight, DEAD_GENERATIONS);
    }

    /// From now on SURBs are of a new generation, which replaces the one before: that one leads to the
    /// client for a while yet, as the keys on its routes have been followed by others. The provider
    /// uses it until it has enough new ones.
    pub fn replace_surbs(&mut self) {
        self.surbs.renew(&mut self.transport.flight, RETIRED_GENERATIONS);
    }

    /// Each mix delays by this on average from now on.
    pub fn set_mean_delay(&mut self, mean_delay: Duration) {
        let reply_quantile = delay_quantile(mean_delay, 3);
        self.transport.set_unknown_delays(reply_quantile);
        self.surbs.set_reply_quantile(reply_quantile);
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
        let mut frames = Vec::new();
        while let Some(frame) = Frame::decode(&mut input)? {
            frames.push(frame);
        }
        // A provider that does not know the session does not know its numbers either.
        if let [Frame::Close(reason)] = frames[..] {
            // It took the START once, so that it was restarted since.
            let is_restart = self.confirmed && reason == CloseReason::StaleStart;
            self.end(if is_restart { CloseReason::Unknown } else { reason });
            return Ok(());
        }
        if !self.transport.received.on_packet(number, floor, now) {
            return Err(ReplyError::Duplicate);
        }
        self.last_heard = now;
        self.unanswered_since = None;
        self.transport.on_sign_of_life();
        self.confirmed = true;
        self.access_token = None;
        // Both clocks are arbitrary: only differences count. It wraps after 71 minutes, which looks
        // like a jump and is forgotten with the shortest trip.
        let now_us = wrapping_us(now.saturating_duration_since(self.began));
        let trip_us = now_us.wrapping_sub(u32::from_be_bytes(sent_us)).cast_signed();
        self.surbs.on_reply(now, surb_delay, number, f64::from(trip_us) / 1e6);
        for frame in &frames {
            if let Err(violation) = self.handle_frame(now, number, surb_delay, frame) {
                self.end(CloseReason::Protocol);
                return Err(violation.into());
            }
        }
        if frames.iter().any(Frame::elicits_ack) {
            self.transport.received.owe_ack(now);
            self.surbs.on_use(now);
            self.keepalive = FIRST_KEEPALIVE;
        }
        self.settle_replies(now);
        Ok(())
    }

    /// Takes a frame of reply `number`.
    fn handle_frame(
        &mut self,
        now: Instant,
        number: u64,
        surb_delay: Duration,
        frame: &Frame<'_>,
    ) -> Result<(), Violation> {
        match frame {
            Frame::Opened { .. }
            | Frame::Data { .. }
            | Frame::Credit { .. }
            | Frame::Reset { .. } => self.transport.streams.handle_frame(frame)?,
            Frame::Ping => {}
            Frame::Ack(ack) => self.handle_ack(now, surb_delay, ack)?,
            Frame::Stock { generation, count } if *generation == self.surbs.generation() => {
                let left = now.checked_sub(surb_delay);
                let base = self.transport.base_or_zero();
                let flight = &mut self.transport.flight;
                self.surbs.on_report(now, flight, number, *count, left, base);
            }
            Frame::Stock { .. } => {}
            Frame::Close(reason) => self.end(*reason),
            Frame::Start { .. } | Frame::Open { .. } | Frame::Surbs { .. } => {
                return Err(Violation::Direction);
            }
        }
        Ok(())
    }

    fn handle_ack(
        &mut self,
        now: Instant,
        surb_delay: Duration,
        ack: &Ack,
    ) -> Result<(), Violation> {
        let acked = self.transport.handle_ack(ack, now)?;
        self.note_fates(&acked.packets, true);
        if let Some(latest) = &acked.latest {
            self.on_round_trip(now, latest, surb_delay, Duration::from_micros(ack.delay_us));
        }
        // A window that is not used says nothing about the path.
        let heard_of = acked.packets.iter().filter(|packet| !packet.is_refill).count();
        let in_use = self.transport.flight.windowed_len() + heard_of;
        if heard_of > 0 && 2 * in_use >= self.window.packets() {
            self.window.steer(now, &self.transport.queueing, heard_of);
        }
        if acked.packets.iter().any(|packet| packet.cargo.contains(&Cargo::Close)) {
            self.end(CloseReason::Done);
            return Ok(());
        }
        // What was due at the provider when the ACK left it should have been in it.
        let slack = self.transport.base_or_guess() + self.transport.margin();
        let cutoff = now.checked_sub(surb_delay + slack);
        let lost = self.transport.lose_by_ack(cutoff, ack);
        self.on_lost(&lost);
        Ok(())
    }

    /// Ends the session at once: every stream is reset.
    pub fn end(&mut self, reason: CloseReason) {
        self.closed.get_or_insert(reason);
    }

    fn on_round_trip(
        &mut self,
        now: Instant,
        latest: &Trip,
        surb_delay: Duration,
        ack_delay: Duration,
    ) {
        let chosen = (latest.arrives - latest.at) + surb_delay + ack_delay;
        let above = now.saturating_duration_since(latest.at).as_secs_f64() - chosen.as_secs_f64();
        self.transport.queueing.update(above, now);
    }

    /// Replies that should have come by now are lost; the provider is told, as it cannot know.
    fn settle_replies(&mut self, now: Instant) {
        if self.surbs.settle(now, &mut self.transport.received) {
            self.transport.received.owe_ack(now);
        }
    }

    fn on_lost(&mut self, lost: &[Sent]) {
        self.note_fates(lost, false);
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
        let keepalive = self.keepalive_due();
        // A session that is being closed owes nothing any more.
        let ack = self.transport.received.ack_due().filter(|_| self.closing == Closing::No);
        let settle = self.surbs.settle_due(&self.transport.received);
        [ack, settle, self.transport.loss_deadline(), keepalive, self.silence_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// When the provider is asked whether all is well, unless something is said.
    fn keepalive_due(&self) -> Option<Instant> {
        // A PING that is wanted waits for SURBs or a turn, not for a time.
        let is_silent = !self.transport.streams.is_empty()
            && self.transport.flight.is_empty()
            && !self.ping_wanted;
        is_silent.then(|| self.last_heard.max(self.last_asked) + self.keepalive)
    }

    /// When the session is given up, unless something is heard.
    fn silence_deadline(&self) -> Option<Instant> {
        if !self.transport.flight.is_empty() {
            return Some(self.last_heard + SESSION_SILENCE);
        }
        self.ping_wanted.then(|| self.last_heard.max(self.last_asked) + SESSION_SILENCE)
    }

    /// Handles what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.closed.is_some() {
            return;
        }
        if self.silence_deadline().is_some_and(|deadline| now >= deadline) {
            return self.end(CloseReason::Unknown);
        }
        self.settle_replies(now);
        let lost = self.transport.lose_by_time(now);
        self.on_lost(&lost);
        if !lost.is_empty() && self.transport.is_backing_off() {
            let Transport { flight, received, .. } = &mut self.transport;
            self.surbs.forget_report(flight, received);
            // Whatever arrives first of it tells the provider, which keeps the old ones until new ones
            // take their places: perhaps they are good.
            if let Some(since) = self.transport.waiting_in_vain_since()
                && self.transport.is_silence()
                && self.renewed.is_none_or(|at| at < since || now >= at + RENEW_EVERY)
            {
                self.renewed = Some(now);
                self.replace_surbs();
            }
        }
        if self.keepalive_due().is_some_and(|due| now >= due) {
            self.ping_wanted = true;
            self.keepalive = (2 * self.keepalive).min(KEEPALIVE);
        }
    }

    // --- Packets.

    /// How many SURBs should be ready for the next packets.
    pub fn surb_demand(&self) -> usize {
        if self.closed.is_some() || self.closing != Closing::No {
            return 0;
        }
        let used = !self.transport.streams.is_empty() || self.ping_wanted;
        if used || self.confirmed { self.surb_deficit() } else { 0 }
    }

    fn surb_deficit(&self) -> usize {
        let in_use = self.transport.streams.is_receiving();
        self.surbs.deficit(&self.transport.flight, &self.transport.received, in_use)
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
        let Transport { flight, .. } = &self.transport;
        let is_backing_off = self.transport.is_backing_off();
        // Who asks a silent provider asks with a few packets, whatever is in them.
        let in_flight = if is_backing_off { flight.len() } else { flight.windowed_len() };
        let window = self.transport.window(self.window.packets());
        let ack_due = self.transport.received.ack_due().is_some_and(|due| due <= now);
        // The provider may have no SURB left, so that a probe must bring some: it waits for them.
        let is_probe = is_backing_off && self.surb_demand() >= REFILL_SURBS;
        if is_probe && !ack_due {
            let is_ready = in_flight < window && surbs_available >= REFILL_SURBS;
            return is_ready.then_some(Purpose::Refill);
        }
        if ack_due
            || (in_flight < window && (self.ping_wanted || self.transport.streams.has_control()))
        {
            return Some(Purpose::Control);
        }
        // Refills are not data: they are bounded by the SURB window, and a full window of uploads
        // must not starve a download.
        let refill_allowed = flight.len() < self.transport.window(2 * self.window.max_packets());
        let refill =
            surbs_available.min(self.surb_deficit()) >= REFILL_SURBS && self.surb_demand() > 0;
        let data = in_flight < window && self.transport.streams.has_data();
        match (refill && refill_allowed, data) {
            (true, true) if self.surbs.is_low(&self.transport.flight, &self.transport.received) => {
                Some(Purpose::Refill)
            }
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
            let (time_ms, access_token) = (self.started_ms, self.access_token.clone());
            Frame::Start { time_ms, access_token, key_agreement: &[] }.encode(out);
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
        if !self.surbs.on_given(surb_count) {
            self.end(CloseReason::Protocol);
        }
        // Every packet with SURBs is to be heard of, so that it is known where they are.
        if !cargo.is_empty() {
            self.keepalive = FIRST_KEEPALIVE;
        }
        let eliciting = !cargo.is_empty() || surb_count > 0 || self.ping_wanted;
        if cargo.is_empty() && eliciting {
            Frame::Ping.encode(out);
        }
        if eliciting {
            self.ping_wanted = false;
            self.last_asked = now;
            self.unanswered_since.get_or_insert(now);
        }
        debug_assert!(out.len() <= self.max_packet_bytes);
        let number = self.next_number();
        self.transport.flight.on_sent(eliciting.then_some(Sent {
            number,
            at: now,
            arrives: now + packet_delay,
            cargo,
            surbs: surb_count,
            is_refill: purpose == Purpose::Refill,
        }));
        true
    }

    /// Fills what is left of the packet with SURBs, as many as the window allows.
    fn write_surbs(&self, surbs: &mut impl SurbSource, out: &mut Vec<u8>) -> usize {
        let room =
            (self.max_packet_bytes - out.len()).saturating_sub(SURBS_HEADER_BYTES) / SURB_LEN;
        let count = room.min(surbs.available()).min(self.surb_deficit());
        if count > 0 {
            put_surbs_header(out, self.surbs.generation(), count);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates_that_nobody_asks_for_are_bounded() {
        let now = Instant::now();
        let id = SessionId([1; SESSION_ID_LEN]);
        let mut session = ClientSession::new(id, 0, now, 2031, Duration::ZERO);
        let sent = |number| Sent {
            number,
            at: now,
            arrives: now,
            cargo: vec![],
            surbs: 0,
            is_refill: false,
        };
        let packets: Vec<_> = (0..MAX_FATES as u64 + 10).map(sent).collect();
        session.note_fates(&packets, true);
        assert_eq!(session.poll_fate().map(|fate| fate.number), Some(10), "the oldest went");
        assert_eq!(std::iter::from_fn(|| session.poll_fate()).count(), MAX_FATES - 1);
    }
}
