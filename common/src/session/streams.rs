//! The streams of a session: their states, and who of them sends next.

use std::collections::{BTreeMap, VecDeque};

use super::OpenOutcome;
use super::flight::Cargo;
use super::frame::{Frame, StreamId, data_header_len, put_data_header};
use super::halves::{INITIAL_WINDOW_BYTES, RecvHalf, SendHalf, StreamViolation};
use super::ranges::RangeSet;
use crate::target::Target;

/// Streams that a client may have open in one session.
pub const MAX_STREAMS: usize = 1024;

/// Streams that a provider keeps for one session: streams that the client has finished may still be
/// finishing here.
const MAX_PEER_STREAMS: usize = 2 * MAX_STREAMS;

/// Gaps between the numbers of streams that are over. Those of an honest client are its open streams
/// and those whose first packets are late; who leaves more wastes our memory.
const MAX_CLOSED_GAPS: usize = 2 * MAX_PEER_STREAMS;

/// What all streams of a session together may add to their initial windows. With the initial ones
/// it bounds what stalled readers can hold: 96 MiB a session at 1,024 streams.
pub const WINDOW_POOL_BYTES: u64 = 32 * 1024 * 1024;

/// A stream that begins to send goes before the others for so many bytes: an interactive one never
/// waits behind a bulk transfer, and a bulk one soon takes its turn.
const FRESH_QUANTUM_BYTES: usize = 16 * 1024;

/// The smallest piece of data worth a frame of its own in a packet that is nearly full.
const MIN_PIECE_BYTES: usize = 64;

/// What the application must be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// Provider: the client asks for a connection; answer with `opened`.
    Open {
        /// The new stream.
        stream: StreamId,
        /// Where to.
        target: Target,
    },
    /// Client: the provider's answer. Unless it is [`OpenOutcome::Connected`], the stream is over.
    Opened {
        /// The stream.
        stream: StreamId,
        /// What happened.
        outcome: OpenOutcome,
    },
    /// Bytes, or the end, can be read.
    Readable(StreamId),
    /// A write that was cut short may go on.
    Writable(StreamId),
    /// The peer ended the stream at once.
    Reset(StreamId),
}

/// The peer breaks the rules of the session, which ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A rule of one stream.
    #[error("stream {stream}: {violation}")]
    Stream {
        /// The stream.
        stream: StreamId,
        /// The rule.
        violation: StreamViolation,
    },
    /// A frame that only the other side may send.
    #[error("a frame of the wrong direction")]
    Direction,
    /// A frame about a stream that was never opened.
    #[error("a frame about stream {0}, which was never opened")]
    NeverOpened(StreamId),
    /// More streams than allowed, or more gaps between their numbers.
    #[error("more than {MAX_PEER_STREAMS} streams, or gaps between their numbers")]
    TooManyStreams,
    /// An acknowledgement of a packet that was never sent.
    #[error("an acknowledgement of a packet that was never sent")]
    NeverSent,
}

/// Which end of the session this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Provider,
}

#[derive(Debug)]
struct Stream {
    send: SendHalf,
    recv: RecvHalf,
    opening: Opening,
    wants: Wants,
    in_control_queue: bool,
    turn: Turn,
    /// What it adds to the session's totals.
    noted: Totals,
    write_blocked: bool,
    reset: Option<ResetState>,
    /// The application holds no handle any more.
    released: bool,
}

/// Sums over streams.
#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    /// Streams with data that may be sent now.
    pending: usize,
    /// Bytes in buffers of both directions.
    held_bytes: usize,
    /// Streams in which the peer may have more to say.
    receiving: usize,
}

#[derive(Debug, Default)]
struct Wants {
    open: bool,
    opened: bool,
    credit: bool,
    reset: bool,
}

#[derive(Debug)]
enum Opening {
    /// Client: waits for the answer.
    Asked(Target),
    /// Provider: data came before its OPEN.
    Unasked,
    /// Provider: the application is connecting.
    Connecting,
    /// The answer is known.
    Answered(OpenOutcome),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResetState {
    /// Our RESET is on its way.
    Telling,
    /// The peer knows.
    Over,
}

/// Where a stream stands in the round of senders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Idle,
    Fresh { sent_bytes: usize },
    Steady,
}

#[derive(Debug)]
pub(super) struct Streams {
    side: Side,
    streams: BTreeMap<StreamId, Stream>,
    /// Streams that are over; their late frames mean nothing, and a late OPEN must not dial again.
    closed: RangeSet,
    next_id: StreamId,
    control: VecDeque<StreamId>,
    fresh: VecDeque<StreamId>,
    steady: VecDeque<StreamId>,
    totals: Totals,
    events: VecDeque<StreamEvent>,
    window_pool_bytes: u64,
}

impl Streams {
    pub(super) fn new(side: Side) -> Self {
        Self {
            side,
            streams: BTreeMap::new(),
            closed: RangeSet::new(),
            next_id: 1,
            control: VecDeque::new(),
            fresh: VecDeque::new(),
            steady: VecDeque::new(),
            totals: Totals::default(),
            events: VecDeque::new(),
            window_pool_bytes: WINDOW_POOL_BYTES,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.streams.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    pub(super) fn poll_event(&mut self) -> Option<StreamEvent> {
        self.events.pop_front()
    }

    /// Whether the peer may have more to say in any stream.
    pub(super) fn is_receiving(&self) -> bool {
        self.totals.receiving > 0
    }

    /// Bytes of memory that the streams take.
    pub(super) fn held_bytes(&self) -> usize {
        self.totals.held_bytes + self.streams.len() * size_of::<Stream>()
    }

    // --- The application's side.

    /// Opens a stream whose first bytes are `early`, as far as they fit; `None` when too many are
    /// open.
    pub(super) fn open(&mut self, target: Target) -> Option<StreamId> {
        if self.streams.len() >= MAX_STREAMS {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        let mut stream = Stream::new(Opening::Asked(target));
        stream.wants.open = true;
        self.streams.insert(id, stream);
        self.note(id);
        self.queue_control(id);
        Some(id)
    }

    pub(super) fn opened(&mut self, id: StreamId, outcome: OpenOutcome) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if matches!(stream.opening, Opening::Connecting) {
            stream.opening = Opening::Answered(outcome);
            stream.wants.opened = true;
            self.queue_control(id);
        }
    }

    pub(super) fn write(&mut self, id: StreamId, bytes: &[u8]) -> Option<usize> {
        let stream = self.streams.get_mut(&id)?;
        if stream.reset.is_some() || stream.send.is_finished() {
            return None;
        }
        let written = stream.send.write(bytes);
        stream.write_blocked = written < bytes.len();
        self.activate(id);
        Some(written)
    }

    pub(super) fn finish(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.reset.is_none()
        {
            stream.send.finish();
            self.activate(id);
        }
    }

    /// `Err(())` when the stream was reset.
    pub(super) fn read(&mut self, id: StreamId, out: &mut [u8]) -> Result<Option<usize>, ()> {
        let stream = self.streams.get_mut(&id).ok_or(())?;
        if stream.reset.is_some() {
            return Err(());
        }
        let read = stream.recv.read(out);
        self.grant(id);
        self.note(id);
        Ok(read)
    }

    fn grant(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.recv.grant(&mut self.window_pool_bytes)
        {
            stream.wants.credit = true;
            self.queue_control(id);
        }
    }

    pub(super) fn reset(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.reset.is_none() {
            stream.reset = Some(ResetState::Telling);
            stream.wants = Wants { reset: true, ..Wants::default() };
            stream.send = SendHalf::new(0);
            self.note(id);
            self.queue_control(id);
        }
    }

    /// The application lets go of the stream; unless both directions have ended, that resets it.
    pub(super) fn release(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.released = true;
        let orderly = stream.send.is_finished() && stream.recv.is_done();
        let failed = matches!(stream.opening, Opening::Answered(outcome) if outcome != OpenOutcome::Connected);
        if !orderly && !failed {
            self.reset(id);
        }
        self.forget_if_over(id);
    }

    // --- The peer's side.

    pub(super) fn handle_frame(&mut self, frame: &Frame<'_>) -> Result<(), Violation> {
        match frame {
            Frame::Open { stream, target } => self.handle_open(*stream, target),
            Frame::Opened { stream, outcome } => self.handle_opened(*stream, *outcome),
            Frame::Data { stream, offset, fin, bytes } => {
                self.handle_data(*stream, *offset, bytes, *fin)
            }
            // Whoever may send already has an OPEN: no other stream has credit to raise.
            Frame::Credit { stream, .. } if !self.streams.contains_key(stream) => Ok(()),
            Frame::Credit { stream, limit } => {
                if let Some(state) = self.known(*stream)?
                    && state.reset.is_none()
                {
                    state.send.raise_credit(*limit);
                    self.activate(*stream);
                    self.unblock_writer(*stream);
                }
                Ok(())
            }
            Frame::Reset { stream } => self.handle_reset(*stream),
            _ => Ok(()),
        }
    }

    fn handle_open(&mut self, id: StreamId, target: &Target) -> Result<(), Violation> {
        if self.side != Side::Provider {
            return Err(Violation::Direction);
        }
        if let Some(stream) = self.known(id)?
            && matches!(stream.opening, Opening::Unasked)
        {
            stream.opening = Opening::Connecting;
            if stream.reset.is_none() {
                self.events.push_back(StreamEvent::Open { stream: id, target: target.clone() });
                if self.streams.get(&id).is_some_and(|stream| stream.recv.is_readable()) {
                    self.events.push_back(StreamEvent::Readable(id));
                }
            }
        }
        Ok(())
    }

    fn handle_opened(&mut self, id: StreamId, outcome: OpenOutcome) -> Result<(), Violation> {
        if self.side != Side::Client {
            return Err(Violation::Direction);
        }
        if let Some(stream) = self.known(id)?
            && matches!(stream.opening, Opening::Asked(_))
        {
            stream.opening = Opening::Answered(outcome);
            if stream.reset.is_none() {
                if outcome != OpenOutcome::Connected {
                    stream.reset = Some(ResetState::Over);
                    stream.wants = Wants::default();
                    stream.send = SendHalf::new(0);
                }
                self.events.push_back(StreamEvent::Opened { stream: id, outcome });
                self.note(id);
                self.forget_if_over(id);
            }
        }
        Ok(())
    }

    fn handle_data(
        &mut self,
        id: StreamId,
        offset: u64,
        bytes: &[u8],
        fin: bool,
    ) -> Result<(), Violation> {
        let Some(stream) = self.known(id)? else { return Ok(()) };
        if stream.reset.is_some() {
            return Ok(());
        }
        let readable = stream
            .recv
            .insert(offset, bytes, fin)
            .map_err(|violation| Violation::Stream { stream: id, violation })?;
        if readable && !matches!(stream.opening, Opening::Unasked) {
            self.events.push_back(StreamEvent::Readable(id));
        }
        self.grant(id);
        self.note(id);
        Ok(())
    }

    fn handle_reset(&mut self, id: StreamId) -> Result<(), Violation> {
        if self.side == Side::Provider && !self.streams.contains_key(&id) {
            // It overtook its OPEN, which must not dial any more.
            self.closed.insert(id..id + 1);
            let gaps = self.closed.range_count();
            return if gaps > MAX_CLOSED_GAPS { Err(Violation::TooManyStreams) } else { Ok(()) };
        }
        if let Some(stream) = self.known(id)? {
            let told = stream.reset.is_some();
            let never_seen = matches!(stream.opening, Opening::Unasked);
            stream.reset = Some(ResetState::Over);
            stream.wants = Wants::default();
            stream.send = SendHalf::new(0);
            stream.released |= never_seen;
            if !told && !never_seen {
                self.events.push_back(StreamEvent::Reset(id));
            }
            self.note(id);
            self.forget_if_over(id);
        }
        Ok(())
    }

    /// The state of a stream that a frame is about; `None` when it is over. Frames overtake each
    /// other, so that a provider may hear of a stream before its OPEN.
    fn known(&mut self, id: StreamId) -> Result<Option<&mut Stream>, Violation> {
        if self.closed.contains(id) {
            return Ok(None);
        }
        if !self.streams.contains_key(&id) {
            if self.side == Side::Client {
                return if id < self.next_id { Ok(None) } else { Err(Violation::NeverOpened(id)) };
            }
            if self.streams.len() >= MAX_PEER_STREAMS || self.closed.range_count() > MAX_CLOSED_GAPS
            {
                return Err(Violation::TooManyStreams);
            }
            self.streams.insert(id, Stream::new(Opening::Unasked));
        }
        Ok(self.streams.get_mut(&id))
    }

    // --- What goes into packets.

    /// Whether [`Streams::write_control`] has something.
    pub(super) fn has_control(&self) -> bool {
        !self.control.is_empty()
    }

    /// Whether [`Streams::write_data`] has something.
    pub(super) fn has_data(&self) -> bool {
        self.totals.pending > 0
    }

    /// Writes frames other than DATA, as many as fit below `limit` bytes of `out`.
    pub(super) fn write_control(
        &mut self,
        out: &mut Vec<u8>,
        limit: usize,
        cargo: &mut Vec<Cargo>,
    ) {
        while let Some(&id) = self.control.front() {
            let Some(stream) = self.streams.get_mut(&id) else {
                self.control.pop_front();
                continue;
            };
            if !stream.write_control(id, out, limit, cargo) {
                return;
            }
            stream.in_control_queue = false;
            self.control.pop_front();
        }
    }

    /// Writes DATA frames, as many as fit below `limit` bytes of `out`, in fair turns.
    pub(super) fn write_data(&mut self, out: &mut Vec<u8>, limit: usize, cargo: &mut Vec<Cargo>) {
        while let Some(id) = self.fresh.front().or(self.steady.front()).copied() {
            let from_fresh = !self.fresh.is_empty();
            let Some(stream) = self.streams.get_mut(&id) else {
                self.take_turn(from_fresh);
                continue;
            };
            if !stream.send.has_pending() {
                // A fresh stream that ran dry stays in the round once more, so that it cannot come
                // back as fresh with every packet.
                self.take_turn(from_fresh);
                let stream = self.streams.get_mut(&id).expect("looked up above");
                if from_fresh {
                    stream.turn = Turn::Steady;
                    self.steady.push_back(id);
                } else {
                    stream.turn = Turn::Idle;
                }
                continue;
            }
            let header = data_header_len(id, stream.send.next_offset(), limit);
            let Some(room) = limit.checked_sub(out.len() + header) else { return };
            if room < MIN_PIECE_BYTES && !out.is_empty() {
                return;
            }
            let Some(piece) = stream.send.next_piece(room) else { return };
            let len =
                usize::try_from(piece.range.end - piece.range.start).expect("fits the packet");
            put_data_header(out, id, piece.range.start, len, piece.fin);
            stream.send.copy(&piece.range, out);
            stream.note(&mut self.totals);
            cargo.push(Cargo::Data(id, piece));
            match &mut stream.turn {
                Turn::Fresh { sent_bytes } if *sent_bytes + len < FRESH_QUANTUM_BYTES => {
                    *sent_bytes += len;
                }
                _ => {
                    stream.turn = Turn::Steady;
                    self.take_turn(from_fresh);
                    self.steady.push_back(id);
                }
            }
            self.unblock_writer(id);
        }
    }

    pub(super) fn on_acked(&mut self, cargo: &Cargo) {
        match cargo {
            Cargo::Data(id, piece) => {
                let Some(stream) = self.streams.get_mut(id) else { return };
                // What a stream had under way when it was reset is of no interest any more.
                if stream.reset.is_some() {
                    return;
                }
                stream.send.on_acked(piece);
                stream.note(&mut self.totals);
                self.unblock_writer(*id);
                self.forget_if_over(*id);
            }
            Cargo::Reset(id) => {
                if let Some(stream) = self.streams.get_mut(id) {
                    stream.reset = Some(ResetState::Over);
                    self.forget_if_over(*id);
                }
            }
            Cargo::Opened(id) => {
                if let Some(stream) = self.streams.get_mut(id)
                    && matches!(stream.opening, Opening::Answered(outcome) if outcome != OpenOutcome::Connected)
                {
                    stream.reset = Some(ResetState::Over);
                    self.forget_if_over(*id);
                }
            }
            Cargo::Open(_) | Cargo::Credit(_) | Cargo::Close => {}
        }
    }

    pub(super) fn on_lost(&mut self, cargo: &Cargo) {
        let (Cargo::Open(id)
        | Cargo::Opened(id)
        | Cargo::Data(id, _)
        | Cargo::Credit(id)
        | Cargo::Reset(id)) = cargo
        else {
            return;
        };
        let Some(stream) = self.streams.get_mut(id) else { return };
        match (cargo, stream.reset) {
            (Cargo::Reset(_), Some(ResetState::Telling)) => stream.wants.reset = true,
            (_, Some(_)) => return,
            (Cargo::Open(_), None) => {
                stream.wants.open = matches!(stream.opening, Opening::Asked(_));
            }
            (Cargo::Opened(_), None) => stream.wants.opened = true,
            (Cargo::Credit(_), None) => stream.wants.credit = true,
            (Cargo::Data(_, piece), None) => {
                stream.send.on_lost(piece);
                return self.activate(*id);
            }
            _ => return,
        }
        self.queue_control(*id);
    }

    fn queue_control(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.in_control_queue
        {
            stream.in_control_queue = true;
            self.control.push_back(id);
        }
    }

    fn activate(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.turn == Turn::Idle
            && stream.send.has_pending()
        {
            stream.turn = Turn::Fresh { sent_bytes: 0 };
            self.fresh.push_back(id);
        }
        self.note(id);
    }

    fn note(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.note(&mut self.totals);
        }
    }

    /// Wakes a writer that waits, if there is room now: because more was granted, because what was kept
    /// for repeating is acknowledged, or because what waited was sent.
    fn unblock_writer(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.write_blocked
            && stream.send.is_worth_waking()
        {
            stream.write_blocked = false;
            self.events.push_back(StreamEvent::Writable(id));
        }
    }

    fn take_turn(&mut self, from_fresh: bool) {
        if from_fresh {
            self.fresh.pop_front();
        } else {
            self.steady.pop_front();
        }
    }

    fn forget_if_over(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(&id) else { return };
        let ended = stream.send.is_done() && stream.recv.is_done();
        if stream.released && (ended || stream.reset == Some(ResetState::Over)) {
            self.window_pool_bytes += stream.recv.pooled_bytes();
            self.totals.pending -= stream.noted.pending;
            self.totals.held_bytes -= stream.noted.held_bytes;
            self.totals.receiving -= stream.noted.receiving;
            self.streams.remove(&id);
            self.closed.insert(id..id + 1);
        }
    }
}

impl Stream {
    fn new(opening: Opening) -> Self {
        Self {
            send: SendHalf::new(INITIAL_WINDOW_BYTES),
            recv: RecvHalf::new(),
            opening,
            wants: Wants::default(),
            in_control_queue: false,
            turn: Turn::Idle,
            noted: Totals::default(),
            write_blocked: false,
            reset: None,
            released: false,
        }
    }

    /// Keeps the totals true after a change.
    fn note(&mut self, totals: &mut Totals) {
        let now = Totals {
            pending: usize::from(self.send.has_pending()),
            held_bytes: self.send.buffered_bytes() + self.recv.buffered_bytes(),
            receiving: usize::from(self.reset.is_none() && !self.recv.is_whole()),
        };
        totals.pending = totals.pending + now.pending - self.noted.pending;
        totals.held_bytes = totals.held_bytes + now.held_bytes - self.noted.held_bytes;
        totals.receiving = totals.receiving + now.receiving - self.noted.receiving;
        self.noted = now;
    }

    /// Whether everything that waited was written.
    fn write_control(
        &mut self,
        id: StreamId,
        out: &mut Vec<u8>,
        limit: usize,
        cargo: &mut Vec<Cargo>,
    ) -> bool {
        let mut write = |frame: Frame<'_>, what: Cargo| {
            let before = out.len();
            frame.encode(out);
            if out.len() > limit {
                out.truncate(before);
                return false;
            }
            cargo.push(what);
            true
        };
        if self.wants.open
            && let Opening::Asked(target) = &self.opening
        {
            if !write(Frame::Open { stream: id, target: target.clone() }, Cargo::Open(id)) {
                return false;
            }
            self.wants.open = false;
        }
        if self.wants.opened
            && let Opening::Answered(outcome) = self.opening
        {
            if !write(Frame::Opened { stream: id, outcome }, Cargo::Opened(id)) {
                return false;
            }
            self.wants.opened = false;
        }
        if self.wants.credit {
            let limit = self.recv.credit();
            if !write(Frame::Credit { stream: id, limit }, Cargo::Credit(id)) {
                return false;
            }
            self.wants.credit = false;
        }
        if self.wants.reset {
            if !write(Frame::Reset { stream: id }, Cargo::Reset(id)) {
                return false;
            }
            self.wants.reset = false;
        }
        true
    }
}
