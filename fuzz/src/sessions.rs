//! A client and a provider session joined by a network that does what the operations say, and what
//! must hold whatever they say.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use mixsocks_common::session::frame::{CloseReason, StreamId};
use mixsocks_common::session::{
    ACCESS_TOKEN_LEN, AccessTokens, ClientSession, Dropped, Handled, MAX_STOCK_SURBS, OpenOutcome,
    PacketError, PresentedToken, ProviderSession, ProviderSessions, ReplyError, SESSION_ID_LEN,
    SESSION_SILENCE, SessionId, StreamEvent, SurbSource,
};
use mixsocks_sphinx::{SURB_LEN, Surb};

const PACKET_BYTES: usize = 2031;
const MEAN_DELAY: Duration = Duration::from_millis(15);
const WALL_MS: u64 = 1_000_000_000;

/// Where SURBs have their number here: it is the address of a hop, which nobody looks at.
const SURB_NUMBER_AT: usize = 348;

/// Packets of one direction under way; the oldest are lost. A deeper network would only make a run
/// longer.
const MAX_UNDER_WAY: usize = 256;

/// Packets that one side may send at one moment: the largest windows, 2,048 packets and twice 4,096
/// SURBs, and some control frames.
const MAX_BURST: usize = 12_000;

/// What a session may hold at the provider: stalled readers and writers fill the pools of windows,
/// and the initial windows of a few streams.
const MAX_HELD_BYTES: usize = 128 * 1024 * 1024 + MAX_STOCK_SURBS * SURB_LEN;

/// How long everything takes at most once the network is good again: the longest waits are a minute
/// (a starving provider's reports), and a few follow each other.
const RECOVERY: Duration = Duration::from_secs(10 * 60);

/// One end of the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum End {
    /// The client.
    Client,
    /// The provider.
    Provider,
}

/// What happens next. Streams, packets and so on are taken modulo their number.
#[derive(Debug, Clone, Arbitrary)]
pub enum Op {
    /// The client opens a stream.
    Open,
    /// The provider's target answers.
    Answer { stream: u8, outcome: u8 },
    /// An application writes.
    Write { end: End, stream: u8, len: u16 },
    /// An application reads.
    Read { end: End, stream: u8, len: u16 },
    /// An application has written everything.
    Finish { end: End, stream: u8 },
    /// An application lets go.
    Release { end: End, stream: u8 },
    /// So many packets leave, which the network delays by so much.
    Send { end: End, packets: u8, delay_ms: u8 },
    /// Packets arrive, out of order.
    Deliver { to: End, packet: u8, count: u8 },
    /// A packet arrives, and will once more.
    Duplicate { to: End, packet: u8 },
    /// A packet is lost.
    Lose { to: End, packet: u8 },
    /// Time passes.
    Wait { ms: u16 },
    /// Time passes until something is due.
    WaitForTimeout,
    /// So many SURBs are ready from now on.
    Surbs(u8),
    /// The client asks whether the provider is there.
    Ping,
    /// The client begins a new generation of SURBs.
    RenewSurbs,
    /// The client closes the session.
    Close,
}

/// One direction of a stream, as it should be.
#[derive(Debug, Default)]
struct Direction {
    written: u64,
    finished: bool,
    read: u64,
    ended: bool,
}

/// A stream, as it should be.
#[derive(Debug, Default)]
struct Stream {
    up: Direction,
    down: Direction,
    opened: Option<OpenOutcome>,
    /// The provider's application knows of it.
    is_known: bool,
    /// Somebody let go of it early: both ends may see that whenever.
    is_released: bool,
}

impl Stream {
    fn may_fail(&self) -> bool {
        self.is_released || self.opened.is_some_and(|outcome| outcome != OpenOutcome::Connected)
    }

    fn direction(&mut self, from: End) -> &mut Direction {
        match from {
            End::Client => &mut self.up,
            End::Provider => &mut self.down,
        }
    }
}

/// SURBs with numbers in the place of routes.
#[derive(Debug)]
struct Surbs {
    ready: usize,
    next: u64,
}

impl SurbSource for Surbs {
    fn available(&self) -> usize {
        self.ready
    }

    fn write_surb(&mut self, out: &mut Vec<u8>) {
        self.next += 1;
        let mut surb = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        surb[0] = 9;
        surb[SURB_NUMBER_AT..][..8].copy_from_slice(&self.next.to_be_bytes());
        out.extend_from_slice(&surb);
    }
}

/// Both ends and what is between them.
#[derive(Debug)]
pub struct World {
    start: Instant,
    now: Instant,
    client: ClientSession,
    sessions: ProviderSessions,
    surbs: Surbs,
    to_provider: Vec<Vec<u8>>,
    /// With the delay that the client chose for its SURB.
    to_client: Vec<(Duration, Vec<u8>)>,
    streams: BTreeMap<StreamId, Stream>,
    was_closed: bool,
    /// Somebody breaks the rules, so that no stream can be relied on.
    is_hostile: bool,
}

impl Default for World {
    fn default() -> Self {
        let start = Instant::now();
        let id = SessionId([7; SESSION_ID_LEN]);
        let token = PresentedToken::from_bytes([3; ACCESS_TOKEN_LEN]).expect("not zero");
        let mut sessions = ProviderSessions::new(0, PACKET_BYTES, MEAN_DELAY);
        let access = AccessTokens::new([token.hash()]).expect("one may be");
        sessions.set_access_tokens(Some(access));
        let client = ClientSession::new(id, WALL_MS, start, PACKET_BYTES, MEAN_DELAY);
        Self {
            start,
            now: start,
            client: client.with_access_token(Some(token)),
            sessions,
            surbs: Surbs { ready: 64, next: 0 },
            to_provider: Vec::new(),
            to_client: Vec::new(),
            streams: BTreeMap::new(),
            was_closed: false,
            is_hostile: false,
        }
    }
}

/// The byte at `offset` of what `from` writes into `stream`.
fn byte(from: End, stream: StreamId, offset: u64) -> u8 {
    let seed = stream * 2 + u64::from(from == End::Provider);
    (offset.wrapping_mul(31) ^ (offset >> 8) ^ seed.wrapping_mul(101)).to_le_bytes()[0]
}

fn bytes(from: End, stream: StreamId, range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(|offset| byte(from, stream, offset)).collect()
}

/// Delays of SURBs that differ, so that replies overtake each other.
fn surb_delay(number: u64) -> Duration {
    Duration::from_millis(20 + number.wrapping_mul(37) % 50)
}

impl World {
    /// Does what `op` says, and checks what must hold after it.
    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Open => self.open(),
            Op::Answer { stream, outcome } => self.answer(stream, OpenOutcome::from_code(outcome)),
            Op::Write { end, stream, len } => self.write(end, stream, len),
            Op::Read { end, stream, len } => self.read(end, stream, len),
            Op::Finish { end, stream } => self.finish(end, stream),
            Op::Release { end, stream } => self.release(end, stream),
            Op::Send { end, packets, delay_ms } => {
                let delay = Duration::from_millis(delay_ms.into());
                self.send(end, packets.into(), delay);
            }
            Op::Deliver { to, packet, count } => {
                (0..count).for_each(|_| self.deliver(to, packet.into()));
            }
            Op::Duplicate { to: End::Provider, packet } => {
                if let Some(index) = index(packet.into(), self.to_provider.len()) {
                    self.to_provider.push(self.to_provider[index].clone());
                }
            }
            Op::Duplicate { to: End::Client, packet } => {
                if let Some(index) = index(packet.into(), self.to_client.len()) {
                    self.to_client.push(self.to_client[index].clone());
                }
            }
            Op::Lose { to: End::Provider, packet } => {
                index(packet.into(), self.to_provider.len()).map(|at| self.to_provider.remove(at));
            }
            Op::Lose { to: End::Client, packet } => {
                index(packet.into(), self.to_client.len()).map(|at| self.to_client.remove(at));
            }
            Op::Wait { ms } => self.wait_until(self.now + Duration::from_millis(ms.into())),
            Op::WaitForTimeout => {
                if let Some(at) = self.next_timeout() {
                    self.wait_until(at);
                }
            }
            Op::Surbs(ready) => self.surbs.ready = ready.into(),
            Op::Ping => self.client.ping(),
            Op::RenewSurbs => self.client.renew_surbs(),
            Op::Close => {
                self.client.close();
                self.was_closed = true;
            }
        }
        self.to_provider.drain(..self.to_provider.len().saturating_sub(MAX_UNDER_WAY));
        self.to_client.drain(..self.to_client.len().saturating_sub(MAX_UNDER_WAY));
        self.handle_events();
        self.check();
    }

    // --- The peers of the game.

    /// Contents of a packet or reply that nobody of the two has written arrive.
    pub fn inject(&mut self, to: End, contents: Vec<u8>) {
        self.is_hostile = true;
        match to {
            End::Provider => self.arrive_at_provider(&contents),
            End::Client => self.arrive_at_client(surb_delay(0), &contents),
        }
        self.handle_events();
        self.check();
    }

    /// The next packet under way to `to`, to be changed; `None` when there is none.
    pub fn under_way(&mut self, to: End, packet: u8) -> Option<&mut Vec<u8>> {
        self.is_hostile = true;
        match to {
            End::Provider => {
                let index = index(packet.into(), self.to_provider.len())?;
                Some(&mut self.to_provider[index])
            }
            End::Client => {
                let index = index(packet.into(), self.to_client.len())?;
                Some(&mut self.to_client[index].1)
            }
        }
    }

    /// The session's id: what a packet to the provider begins with, behind its kind.
    pub fn session_id(&self) -> SessionId {
        self.client.id()
    }

    fn provider(&mut self) -> Option<&mut ProviderSession> {
        self.sessions.get_mut(self.client.id())
    }

    // --- Applications.

    fn stream(&self, stream: u8) -> Option<StreamId> {
        let index = index(stream.into(), self.streams.len())?;
        self.streams.keys().nth(index).copied()
    }

    fn open(&mut self) {
        // Operations name streams by one byte.
        if self.streams.len() > u8::MAX.into() {
            return;
        }
        let target = "example.com:80".parse().expect("a good target");
        if let Some(id) = self.client.open(target) {
            assert!(self.streams.insert(id, Stream::default()).is_none(), "a second stream {id}");
        }
    }

    fn answer(&mut self, stream: u8, outcome: OpenOutcome) {
        let Some(id) = self.stream(stream) else { return };
        let state = self.streams.get_mut(&id).expect("it was listed");
        if state.is_known && state.opened.is_none() {
            state.opened = Some(outcome);
            if let Some(provider) = self.provider() {
                provider.opened(id, outcome);
            }
        }
    }

    /// Applications at the provider know of a stream from its OPEN on.
    fn may_use(&self, end: End, id: StreamId) -> bool {
        end == End::Client || self.streams[&id].is_known
    }

    fn write(&mut self, end: End, stream: u8, len: u16) {
        let Some(id) = self.stream(stream).filter(|id| self.may_use(end, *id)) else { return };
        let from = self.streams.get_mut(&id).expect("it was listed").direction(end).written;
        let bytes = bytes(end, id, from..from + u64::from(len));
        let written = match end {
            End::Client => self.client.write(id, &bytes),
            End::Provider => self.provider().and_then(|provider| provider.write(id, &bytes)),
        };
        let direction = self.streams.get_mut(&id).expect("it was listed").direction(end);
        if let Some(written) = written {
            assert!(written <= bytes.len());
            assert!(!direction.finished, "written after the end");
            direction.written += written as u64;
        }
    }

    fn read(&mut self, end: End, stream: u8, len: u16) {
        let Some(id) = self.stream(stream).filter(|id| self.may_use(end, *id)) else { return };
        let mut out = vec![0; len.into()];
        let read = match end {
            End::Client => self.client.read(id, &mut out).ok(),
            End::Provider => self.provider().and_then(|provider| provider.read(id, &mut out).ok()),
        };
        let Some(Some(read)) = read else { return };
        let from = if end == End::Client { End::Provider } else { End::Client };
        let is_hostile = self.is_hostile;
        let direction = self.streams.get_mut(&id).expect("it was listed").direction(from);
        if is_hostile {
            return;
        }
        assert_eq!(out[..read], bytes(from, id, direction.read..direction.read + read as u64));
        direction.read += read as u64;
        assert!(direction.read <= direction.written, "read before it was written");
        if read == 0 && !out.is_empty() {
            assert!(direction.finished, "an end that nobody wrote");
            assert_eq!(direction.read, direction.written, "an end before the last byte");
            direction.ended = true;
        } else {
            assert!(read == 0 || !direction.ended, "bytes after the end");
        }
    }

    fn finish(&mut self, end: End, stream: u8) {
        let Some(id) = self.stream(stream).filter(|id| self.may_use(end, *id)) else { return };
        match end {
            End::Client => self.client.finish(id),
            End::Provider => {
                if let Some(provider) = self.provider() {
                    provider.finish(id);
                }
            }
        }
        self.streams.get_mut(&id).expect("it was listed").direction(end).finished = true;
    }

    fn release(&mut self, end: End, stream: u8) {
        let Some(id) = self.stream(stream).filter(|id| self.may_use(end, *id)) else { return };
        match end {
            End::Client => self.client.release(id),
            End::Provider => {
                if let Some(provider) = self.provider() {
                    provider.release(id);
                }
            }
        }
        self.streams.get_mut(&id).expect("it was listed").is_released = true;
    }

    fn handle_events(&mut self) {
        while let Some(event) = self.client.poll_event() {
            match event {
                StreamEvent::Opened { stream, outcome } if !self.is_hostile => {
                    assert_eq!(self.streams[&stream].opened, Some(outcome), "nobody answered so");
                }
                StreamEvent::Reset(stream) if !self.is_hostile => {
                    assert!(self.streams[&stream].may_fail(), "reset by nobody");
                }
                StreamEvent::Open { .. } => panic!("an OPEN for the client"),
                _ => {}
            }
        }
        let id = self.client.id();
        let Some(provider) = self.sessions.get_mut(id) else { return };
        while let Some(event) = provider.poll_event() {
            match event {
                StreamEvent::Open { stream, .. } => {
                    let is_hostile = self.is_hostile;
                    let state = match self.streams.get_mut(&stream) {
                        Some(state) => state,
                        None if is_hostile => continue,
                        None => panic!("a stream that was never opened"),
                    };
                    assert!(!state.is_known || is_hostile, "the target would be dialled twice");
                    state.is_known = true;
                }
                StreamEvent::Reset(stream) if !self.is_hostile => {
                    assert!(self.streams[&stream].may_fail(), "reset by nobody");
                }
                StreamEvent::Opened { .. } => panic!("an OPENED for the provider"),
                _ => {}
            }
        }
    }

    // --- The network.

    fn send(&mut self, end: End, packets: usize, delay: Duration) {
        for _ in 0..packets {
            let mut out = Vec::new();
            match end {
                End::Client => {
                    if !self.client.poll_transmit(self.now, delay, &mut self.surbs, &mut out) {
                        return;
                    }
                    assert!(out.len() <= PACKET_BYTES);
                    self.to_provider.push(out);
                }
                End::Provider => {
                    let now = self.now;
                    let Some(surb) =
                        self.provider().and_then(|provider| provider.poll_transmit(now, &mut out))
                    else {
                        return;
                    };
                    assert!(out.len() <= PACKET_BYTES);
                    self.reply(&surb, out);
                }
            }
        }
    }

    fn reply(&mut self, surb: &Surb, contents: Vec<u8>) {
        let number = surb.as_bytes()[SURB_NUMBER_AT..].first_chunk().expect("a SURB is longer");
        self.to_client.push((surb_delay(u64::from_be_bytes(*number)), contents));
    }

    fn deliver(&mut self, to: End, packet: usize) {
        match to {
            End::Provider => {
                if let Some(index) = index(packet, self.to_provider.len()) {
                    let contents = self.to_provider.remove(index);
                    self.arrive_at_provider(&contents);
                }
            }
            End::Client => {
                if let Some(index) = index(packet, self.to_client.len()) {
                    let (delay, contents) = self.to_client.remove(index);
                    self.arrive_at_client(delay, &contents);
                }
            }
        }
    }

    fn arrive_at_provider(&mut self, contents: &[u8]) {
        let elapsed_ms = u64::try_from((self.now - self.start).as_millis()).expect("no eternity");
        match self.sessions.handle_packet(self.now, WALL_MS + elapsed_ms, contents) {
            Handled::Session(id) => assert!(self.is_hostile || id == self.client.id()),
            Handled::Refused { reason, contents, surb } => {
                assert!(self.is_hostile || reason != CloseReason::Protocol, "{:?}", self.client);
                self.reply(&surb, contents);
            }
            Handled::Dropped(Dropped::Packet(PacketError::Duplicate) | Dropped::Refused(_)) => {}
            Handled::Dropped(dropped) => assert!(self.is_hostile, "{dropped}"),
        }
        while self.sessions.poll_ended().is_some() {}
    }

    fn arrive_at_client(&mut self, delay: Duration, contents: &[u8]) {
        match self.client.handle_reply(self.now, delay, contents) {
            Ok(()) | Err(ReplyError::Duplicate) => {}
            Err(error) => assert!(self.is_hostile, "{error}"),
        }
    }

    // --- Time.

    fn next_timeout(&mut self) -> Option<Instant> {
        let provider = self.provider().and_then(|provider| provider.poll_timeout());
        [self.client.poll_timeout(), provider].into_iter().flatten().min()
    }

    fn wait_until(&mut self, at: Instant) {
        self.now = self.now.max(at);
        let now = self.now;
        if self.client.poll_timeout().is_some_and(|at| at <= now) {
            self.client.handle_timeout(now);
        }
        if let Some(provider) = self.provider()
            && provider.poll_timeout().is_some_and(|at| at <= now)
        {
            provider.handle_timeout(now);
        }
        self.forget_ended();
    }

    /// As the provider's shell does: a session that has ended and has no more to say goes.
    fn forget_ended(&mut self) {
        let (id, now) = (self.client.id(), self.now);
        if let Some(provider) = self.provider()
            && provider.has_ended()
            && provider.last_heard() + SESSION_SILENCE <= now
        {
            self.sessions.remove(id, now);
        }
    }

    // --- What must hold.

    fn check(&mut self) {
        if let Some(provider) = self.provider() {
            assert!(provider.held_bytes() <= MAX_HELD_BYTES, "{} bytes", provider.held_bytes());
            assert!(provider.stock_surbs() <= MAX_STOCK_SURBS);
        }
        let reason = self.client.closed();
        if self.is_hostile || reason.is_none() {
            return;
        }
        let was_away = self.now - self.start >= Duration::from_secs(60);
        match reason {
            Some(CloseReason::Done) => assert!(self.was_closed, "nobody closed the session"),
            Some(CloseReason::Unknown) => assert!(self.was_closed || was_away),
            Some(CloseReason::StaleStart) => assert!(was_away, "the first packet was not late"),
            Some(reason) => panic!("closed because of {reason:?}"),
            None => {}
        }
    }

    /// Sends everything that waits; afterwards nothing may be due at once, or the caller would spin.
    fn settle(&mut self) {
        self.wait_until(self.now);
        for end in [End::Client, End::Provider] {
            let before = self.to_provider.len() + self.to_client.len();
            self.send(end, MAX_BURST, MEAN_DELAY);
            let sent = self.to_provider.len() + self.to_client.len() - before;
            assert!(sent < MAX_BURST, "{end:?} never stops sending");
        }
        self.wait_until(self.now);
        let client = self.client.poll_timeout();
        assert!(client.is_none_or(|at| at > self.now), "the client spins: {:?}", self.client);
        let now = self.now;
        let provider = self.provider().and_then(|provider| provider.poll_timeout());
        assert!(provider.is_none_or(|at| at > now), "the provider spins");
    }

    /// Checks the end: with a good network everything that was written arrives.
    pub fn conclude(mut self) {
        self.settle();
        if self.is_hostile {
            return;
        }
        self.surbs.ready = 64;
        let limit = self.now + RECOVERY;
        while self.client.closed().is_none() && !self.is_complete() {
            self.progress();
            assert!(self.now < limit, "stuck: {:?}", self.streams);
        }
        self.check();
    }

    /// One turn of a good network: what is under way arrives, what has arrived is read, ends are
    /// ended, then time passes.
    fn progress(&mut self) {
        self.settle();
        (0..self.to_provider.len()).for_each(|_| self.deliver(End::Provider, 0));
        (0..self.to_client.len()).for_each(|_| self.deliver(End::Client, 0));
        self.handle_events();
        for stream in 0..self.streams.len() {
            let stream = u8::try_from(stream).expect("no more are opened");
            self.answer(stream, OpenOutcome::Connected);
            for end in [End::Client, End::Provider] {
                self.finish(end, stream);
                self.read(end, stream, u16::MAX);
                self.read(end, stream, u16::MAX);
            }
        }
        let soon = self.now + Duration::from_millis(50);
        self.wait_until(soon);
    }

    fn is_complete(&self) -> bool {
        self.streams
            .values()
            .all(|stream| stream.may_fail() || (stream.up.ended && stream.down.ended))
    }
}

fn index(number: usize, len: usize) -> Option<usize> {
    number.checked_rem(len)
}
