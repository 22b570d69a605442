//! A provider without a clock, a socket or cryptography: its sessions, and whose turn it is.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_client::stream::StreamKey;
use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{
    AccessTokens, Dropped, Handled, OpenOutcome, ProviderSession, ProviderSessions, SessionId,
    StreamEvent, StreamReset,
};
use mixsocks_sphinx::Surb;

/// What the shell must be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProviderEvent {
    /// Something happened to a stream.
    Stream(SessionId, StreamEvent),
    /// A session has ended, and with it its streams.
    SessionEnded(SessionId),
}

/// The sessions of a provider.
///
/// After every call that takes `&mut self`, [`ProviderCore::poll_event`] may have news and
/// [`ProviderCore::next_reply`] something to send, and [`ProviderCore::poll_timeout`] may have
/// changed.
#[derive(Debug)]
pub struct ProviderCore {
    sessions: ProviderSessions,
    /// Sessions that may have something to send, in turn.
    ready: VecDeque<SessionId>,
    is_ready: HashSet<SessionId>,
    timeouts: BTreeSet<(Instant, SessionId)>,
    timeout_of: HashMap<SessionId, Instant>,
    events: VecDeque<ProviderEvent>,
    /// Answers to packets of sessions that are refused.
    refusals: VecDeque<(Vec<u8>, Surb)>,
    held_of: HashMap<SessionId, usize>,
    held_bytes: usize,
    max_held_bytes: usize,
}

/// Bytes that all sessions may hold: a tenth of a server's memory, and a thousand busy streams. Beyond
/// it the session that holds most is put out; beyond three quarters no stream is opened.
pub const MAX_HELD_BYTES: usize = 1024 * 1024 * 1024;

/// Refusals that wait to be sent at most: beyond that, a packet is refused without a word.
const MAX_REFUSALS: usize = 64;

impl ProviderCore {
    /// No sessions, at a provider that started at `started_ms` (milliseconds since 1970); packets
    /// hold `max_contents_bytes`, and mixes `mean_delay` on average.
    pub fn new(started_ms: u64, max_contents_bytes: usize, mean_delay: Duration) -> Self {
        Self {
            sessions: ProviderSessions::new(started_ms, max_contents_bytes, mean_delay),
            ready: VecDeque::new(),
            is_ready: HashSet::new(),
            timeouts: BTreeSet::new(),
            timeout_of: HashMap::new(),
            events: VecDeque::new(),
            refusals: VecDeque::new(),
            held_of: HashMap::new(),
            held_bytes: 0,
            max_held_bytes: MAX_HELD_BYTES,
        }
    }

    /// Each mix delays by this on average from now on.
    pub fn set_mean_delay(&mut self, mean_delay: Duration) {
        self.sessions.set_mean_delay(mean_delay);
    }

    /// From now on only sessions with one of these tokens are taken, or all (`None`). Those that began
    /// with another one, or none, are closed.
    pub fn set_access_tokens(&mut self, now: Instant, access: Option<AccessTokens>) {
        for id in self.sessions.set_access_tokens(access) {
            self.put_out(now, id, CloseReason::TokenNeeded);
        }
    }

    /// All sessions, in no order.
    pub fn sessions(&self) -> impl Iterator<Item = &ProviderSession> {
        self.sessions.iter()
    }

    /// How many sessions there are.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Bytes that all sessions hold, as they were when they last changed.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Whether new streams should be refused.
    pub fn is_memory_short(&self) -> bool {
        self.held_bytes > self.max_held_bytes / 4 * 3
    }

    // --- Streams.

    /// Answers a [`StreamEvent::Open`].
    pub fn opened(&mut self, key: StreamKey, outcome: OpenOutcome) {
        self.with(key.0, |session| session.opened(key.1, outcome));
    }

    /// Takes bytes as [`ProviderSession::write`] does; `None` also when the session has ended.
    pub fn write(&mut self, key: StreamKey, bytes: &[u8]) -> Option<usize> {
        self.with(key.0, |session| session.write(key.1, bytes))?
    }

    /// Reads as [`ProviderSession::read`] does.
    ///
    /// # Errors
    /// When the stream was reset, or its session has ended.
    pub fn read(&mut self, key: StreamKey, out: &mut [u8]) -> Result<Option<usize>, StreamReset> {
        self.with(key.0, |session| session.read(key.1, out)).unwrap_or(Err(StreamReset))
    }

    /// Nothing more will be written; the other direction goes on.
    pub fn finish(&mut self, key: StreamKey) {
        self.with(key.0, |session| session.finish(key.1));
    }

    /// The application lets go of the stream. Unless both directions have ended, it is reset.
    pub fn release(&mut self, key: StreamKey) {
        self.with(key.0, |session| session.release(key.1));
    }

    /// What has happened.
    pub fn poll_event(&mut self) -> Option<ProviderEvent> {
        self.events.pop_front()
    }

    /// Does something with a session, and sees to what follows from it.
    fn with<T>(&mut self, id: SessionId, act: impl FnOnce(&mut ProviderSession) -> T) -> Option<T> {
        let result = act(self.sessions.get_mut(id)?);
        self.touch(id);
        Some(result)
    }

    /// Puts out the sessions that hold most, until all of them together hold no more than they may.
    fn keep_within_memory(&mut self, now: Instant) {
        while self.held_bytes > self.max_held_bytes
            && let Some((_, id)) = self.held_of.iter().map(|(id, held)| (*held, *id)).max()
        {
            self.put_out(now, id, CloseReason::Full);
        }
    }

    /// Ends a session. Its client is told if there is a SURB, and room for another refusal; otherwise it
    /// is when it sends the next packet.
    fn put_out(&mut self, now: Instant, id: SessionId, reason: CloseReason) {
        let session = self.sessions.remove(id, now);
        self.on_ended(id);
        let mut contents = Vec::new();
        if let Some(surb) = session.and_then(|session| session.refuse(reason, &mut contents)) {
            self.refuse(contents, surb);
        }
    }

    /// Queues an answer to a session that has ended; whether there was room.
    fn refuse(&mut self, contents: Vec<u8>, surb: Surb) -> bool {
        let has_room = self.refusals.len() < MAX_REFUSALS;
        if has_room {
            self.refusals.push_back((contents, surb));
        }
        has_room
    }

    fn on_ended(&mut self, id: SessionId) {
        self.set_timeout(id, None);
        self.held_bytes -= self.held_of.remove(&id).unwrap_or(0);
        self.events.push_back(ProviderEvent::SessionEnded(id));
    }

    /// Notes that a session has changed: its events are told, its turn and its timeout are set.
    fn touch(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(id) else { return };
        while let Some(event) = session.poll_event() {
            self.events.push_back(ProviderEvent::Stream(id, event));
        }
        let timeout = session.poll_timeout();
        let held = session.held_bytes();
        let before = self.held_of.insert(id, held).unwrap_or(0);
        self.held_bytes = self.held_bytes + held - before;
        self.set_timeout(id, timeout);
        self.make_ready(id);
    }

    fn make_ready(&mut self, id: SessionId) {
        if self.is_ready.insert(id) {
            self.ready.push_back(id);
        }
    }

    // --- Time.

    /// When [`ProviderCore::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timeouts.first().map(|&(at, _)| at)
    }

    /// Handles what is due at `now`. What it makes due to send sets the next timeout when
    /// [`ProviderCore::next_reply`] is called until it has nothing.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(&(at, id)) = self.timeouts.first()
            && at <= now
        {
            self.set_timeout(id, None);
            if let Some(session) = self.sessions.get_mut(id) {
                session.handle_timeout(now);
                self.make_ready(id);
            }
        }
    }

    fn set_timeout(&mut self, id: SessionId, timeout: Option<Instant>) {
        if let Some(old) = self.timeout_of.remove(&id) {
            self.timeouts.remove(&(old, id));
        }
        if let Some(at) = timeout {
            self.timeout_of.insert(id, at);
            self.timeouts.insert((at, id));
        }
    }

    // --- Packets.

    /// Takes the contents of a packet; `wall_ms` is the time in milliseconds since 1970.
    ///
    /// # Errors
    /// Why it was dropped.
    pub fn handle_packet(
        &mut self,
        now: Instant,
        wall_ms: u64,
        contents: &[u8],
    ) -> Result<(), Dropped> {
        let handled = self.sessions.handle_packet(now, wall_ms, contents);
        while let Some(id) = self.sessions.poll_ended() {
            self.on_ended(id);
        }
        match handled {
            Handled::Session(id) => self.touch(id),
            Handled::Refused { reason, contents, surb } => {
                if !self.refuse(contents, surb) {
                    return Err(Dropped::Refused(reason));
                }
            }
            Handled::Dropped(reason) => return Err(reason),
        }
        self.keep_within_memory(now);
        Ok(())
    }

    /// Whether [`ProviderCore::next_reply`] may have something.
    pub fn wants_transmit(&self) -> bool {
        !self.ready.is_empty() || !self.refusals.is_empty()
    }

    /// Writes the contents of the next reply of any session to `out` and returns the SURB that it is
    /// to be sent with; `None` when there is none.
    pub fn next_reply(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Surb> {
        self.keep_within_memory(now);
        if let Some((contents, surb)) = self.refusals.pop_front() {
            *out = contents;
            return Some(surb);
        }
        while let Some(id) = self.ready.pop_front() {
            self.is_ready.remove(&id);
            let Some(session) = self.sessions.get_mut(id) else { continue };
            let surb = session.poll_transmit(now, out);
            let timeout = session.poll_timeout();
            if session.has_ended() && surb.is_none() {
                self.sessions.remove(id, now);
                self.on_ended(id);
                continue;
            }
            self.set_timeout(id, timeout);
            if surb.is_some() {
                self.make_ready(id);
                return surb;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use mixsocks_common::session::frame::{Frame, put_varint};
    use mixsocks_common::session::{MAX_START_AGE, SESSION_ID_LEN};
    use mixsocks_sphinx::SURB_LEN;

    use super::*;

    const WALL_MS: u64 = 1_000_000;

    fn core() -> ProviderCore {
        ProviderCore::new(0, 2031, Duration::from_millis(15))
    }

    /// Packet `number` of session `id`, with a SURB and these frames.
    fn packet(id: u8, number: u64, frames: &[Frame<'_>]) -> Vec<u8> {
        let mut out = vec![1];
        out.extend_from_slice(&[id; SESSION_ID_LEN]);
        put_varint(&mut out, number);
        put_varint(&mut out, 0);
        Frame::Start { time_ms: WALL_MS, access_token: None, key_agreement: &[] }.encode(&mut out);
        let mut surb = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        surb[0] = 9;
        Frame::Surbs { generation: 0, surbs: &[surb] }.encode(&mut out);
        frames.iter().for_each(|frame| frame.encode(&mut out));
        out
    }

    fn session(id: u8) -> SessionId {
        SessionId([id; SESSION_ID_LEN])
    }

    fn open(stream: u64) -> Frame<'static> {
        Frame::Open { stream, target: "192.0.2.1:80".parse().unwrap() }
    }

    /// Data far from the beginning of a stream takes up memory for what lies before it.
    fn hold(core: &mut ProviderCore, now: Instant, id: u8, streams: Range<u64>) {
        for stream in streams {
            let data = Frame::Data { stream, offset: 60_000, fin: false, bytes: b"x" };
            core.handle_packet(now, WALL_MS, &packet(id, stream, &[data])).unwrap();
        }
    }

    fn ended(core: &mut ProviderCore) -> Vec<SessionId> {
        std::iter::from_fn(|| core.poll_event())
            .filter_map(|event| match event {
                ProviderEvent::SessionEnded(id) => Some(id),
                ProviderEvent::Stream(..) => None,
            })
            .collect()
    }

    #[test]
    fn whoever_holds_most_is_put_out() {
        let (mut core, now) = (core(), Instant::now());
        core.max_held_bytes = 1_000_000;
        hold(&mut core, now, 1, 1..4);
        hold(&mut core, now, 2, 1..9);
        assert!(!core.is_memory_short() && core.held_bytes() > 11 * 60_000);
        assert_eq!(ended(&mut core), []);
        hold(&mut core, now, 3, 1..7);
        assert_eq!(ended(&mut core), [session(2)]);
        assert!(core.held_bytes() < 9 * 64_000, "{}", core.held_bytes());
        // It is told so.
        let mut out = Vec::new();
        assert!(core.next_reply(now, &mut out).is_some());
        assert_eq!(out[out.len() - 2..], [12, 4]);
        hold(&mut core, now, 3, 7..12);
        assert!(core.is_memory_short());
    }

    /// Tasks that wait for its streams must hear of it.
    #[test]
    fn a_session_that_breaks_the_rules_ends_for_everybody() {
        let (mut core, now) = (core(), Instant::now());
        core.handle_packet(now, WALL_MS, &packet(1, 0, &[open(1)])).unwrap();
        assert!(matches!(
            core.poll_event(),
            Some(ProviderEvent::Stream(_, StreamEvent::Open { .. }))
        ));
        let wrong = Frame::Stock { generation: 0, count: 0 };
        core.handle_packet(now, WALL_MS, &packet(1, 1, &[wrong])).unwrap();
        assert_eq!(ended(&mut core), [session(1)]);
        assert_eq!((core.held_bytes(), core.session_count(), core.poll_timeout()), (0, 0, None));
        assert_eq!(core.read((session(1), 1), &mut [0; 10]), Err(StreamReset));
        assert_eq!(core.write((session(1), 1), &[0; 10]), None);
    }

    /// Its client is told why, and tasks that wait for its streams hear of it.
    #[test]
    fn a_session_whose_token_is_removed_ends_for_everybody() {
        let (mut core, now) = (core(), Instant::now());
        core.handle_packet(now, WALL_MS, &packet(1, 0, &[open(1)])).unwrap();
        core.set_access_tokens(now, Some(AccessTokens::default()));
        assert_eq!(ended(&mut core), [session(1)]);
        assert_eq!((core.held_bytes(), core.session_count(), core.poll_timeout()), (0, 0, None));
        let mut out = Vec::new();
        assert!(core.next_reply(now, &mut out).is_some());
        assert_eq!(out[out.len() - 2..], [12, 5]);
        // The next one is refused, and dials nothing.
        core.handle_packet(now, WALL_MS, &packet(2, 0, &[open(1)])).unwrap();
        assert_eq!((core.session_count(), core.poll_event()), (0, None));
        assert!(core.next_reply(now, &mut out).is_some());
        assert_eq!(out[out.len() - 2..], [12, 5]);
    }

    #[test]
    fn refusals_that_wait_are_bounded() {
        let (mut core, now) = (core(), Instant::now());
        let late = WALL_MS + 10 * u64::try_from(MAX_START_AGE.as_millis()).unwrap();
        for id in 0..100 {
            let result = core.handle_packet(now, late, &packet(id, 0, &[open(1)]));
            assert_eq!(result.is_ok(), usize::from(id) < MAX_REFUSALS);
        }
        let mut out = Vec::new();
        let refusals = std::iter::from_fn(|| core.next_reply(now, &mut out)).count();
        assert_eq!(refusals, MAX_REFUSALS);
        assert!(!core.wants_transmit());
    }

    #[test]
    fn sessions_take_turns() {
        let (mut core, now) = (core(), Instant::now());
        for id in 1..=2 {
            for number in 0..20 {
                core.handle_packet(now, WALL_MS, &packet(id, number, &[open(1)])).unwrap();
            }
            core.opened((session(id), 1), OpenOutcome::Connected);
            core.write((session(id), 1), &[id; 20_000]).unwrap();
        }
        let mut out = Vec::new();
        let mut senders = Vec::new();
        while core.next_reply(now, &mut out).is_some() {
            senders.push(*out.last().unwrap());
        }
        let switches = senders.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!(switches >= 10, "{senders:?}");
    }
}
