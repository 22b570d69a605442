//! A client without a clock, a socket or cryptography: its sessions, its SURBs, and whose turn it is.

use std::time::{Duration, Instant};

use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{
    ClientSession, PresentedToken, ReplyError, SessionId, StreamEvent, StreamReset, start_time_ms,
};
use mixsocks_common::target::Target;
use mixsocks_sphinx::Identifier;
use rand::{Rng, RngExt};

use crate::stream::StreamKey;
use crate::surbs::{Awaited, ReadySurb, SurbStore};

/// New streams move to a new session after this time, so that no session becomes a profile.
pub const SESSION_AGE: Duration = Duration::from_secs(10 * 60);

/// What the shell must be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// Something happened to a stream.
    Stream(SessionId, StreamEvent),
    /// A session has ended, and with it its streams.
    SessionEnded(SessionId, CloseReason),
}

/// The sessions and SURBs of a client; `R` is what recovers a reply.
///
/// After every call that takes `&mut self`, [`ClientCore::poll_event`] may have news,
/// [`ClientCore::next_packet`] something to send and [`ClientCore::claim_surbs`] something to make,
/// and [`ClientCore::poll_timeout`] may have changed.
#[derive(Debug)]
pub struct ClientCore<R> {
    /// The newest is the last one.
    sessions: Vec<ClientSession>,
    /// The session that is asked first for the next packet.
    turn: usize,
    surbs: SurbStore<R>,
    max_contents_bytes: usize,
    mean_delay: Duration,
    access_token: Option<PresentedToken>,
}

impl<R> ClientCore<R> {
    /// No sessions; packets hold `max_contents_bytes`, and mixes `mean_delay` on average.
    pub fn new(max_contents_bytes: usize, mean_delay: Duration) -> Self {
        Self {
            sessions: Vec::new(),
            turn: 0,
            surbs: SurbStore::default(),
            max_contents_bytes,
            mean_delay,
            access_token: None,
        }
    }

    /// Each mix delays by this on average from now on.
    pub fn set_mean_delay(&mut self, mean_delay: Duration) {
        self.mean_delay = mean_delay;
        self.sessions.iter_mut().for_each(|session| session.set_mean_delay(mean_delay));
    }

    /// Sessions that begin from now on show the provider this token.
    pub fn set_access_token(&mut self, access_token: Option<PresentedToken>) {
        self.access_token = access_token;
    }

    /// Whether sessions show the provider a token.
    pub fn shows_access_token(&self) -> bool {
        self.access_token.is_some()
    }

    /// Opens a stream in the newest session, or in a new one if that is too old or has ended; bytes
    /// that are written at once travel with the request. `wall_ms` are milliseconds since 1970.
    /// `None` when the session has too many streams.
    pub fn open(
        &mut self,
        now: Instant,
        wall_ms: u64,
        rng: &mut impl Rng,
        target: Target,
    ) -> Option<StreamKey> {
        let usable = |session: &ClientSession| {
            session.closed().is_none() && now < session.began() + SESSION_AGE
        };
        if !self.sessions.last().is_some_and(usable) {
            let session = ClientSession::new(
                SessionId(rng.random()),
                start_time_ms(wall_ms),
                now,
                self.max_contents_bytes,
                self.mean_delay,
            );
            self.sessions.push(session.with_access_token(self.access_token.clone()));
        }
        let session = self.sessions.last_mut().expect("one was pushed if there was none");
        Some((session.id(), session.open(target)?))
    }

    /// The session, unless it has ended.
    pub fn session(&mut self, id: SessionId) -> Option<&mut ClientSession> {
        self.sessions
            .iter_mut()
            .find(|session| session.id() == id)
            .filter(|session| session.closed().is_none())
    }

    /// All sessions that have not been forgotten.
    pub fn sessions(&self) -> &[ClientSession] {
        &self.sessions
    }

    /// Takes bytes as [`ClientSession::write`] does; `None` also when the session has ended.
    pub fn write(&mut self, key: StreamKey, bytes: &[u8]) -> Option<usize> {
        self.session(key.0)?.write(key.1, bytes)
    }

    /// Reads as [`ClientSession::read`] does.
    ///
    /// # Errors
    /// When the stream was reset, or its session has ended.
    pub fn read(&mut self, key: StreamKey, out: &mut [u8]) -> Result<Option<usize>, StreamReset> {
        self.session(key.0).ok_or(StreamReset)?.read(key.1, out)
    }

    /// Nothing more will be written; the other direction goes on.
    pub fn finish(&mut self, key: StreamKey) {
        if let Some(session) = self.session(key.0) {
            session.finish(key.1);
        }
    }

    /// The application lets go of the stream. Unless both directions have ended, it is reset.
    pub fn release(&mut self, key: StreamKey) {
        if let Some(session) = self.session(key.0) {
            session.release(key.1);
        }
    }

    /// Tells the provider to forget the sessions.
    pub fn close(&mut self) {
        self.sessions.iter_mut().for_each(ClientSession::close);
    }

    /// Ends all sessions at once.
    pub fn end(&mut self) {
        for session in &mut self.sessions {
            session.end(CloseReason::Done);
        }
    }

    /// What has happened. Sessions that have ended are forgotten when it is told.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        for session in &mut self.sessions {
            let id = session.id();
            if let Some(event) = session.poll_event() {
                return Some(ClientEvent::Stream(id, event));
            }
        }
        let ended = self.sessions.iter().position(|session| session.closed().is_some())?;
        let session = self.sessions.remove(ended);
        self.surbs.forget_session(session.id());
        Some(ClientEvent::SessionEnded(session.id(), session.closed()?))
    }

    // --- Time.

    /// When [`ClientCore::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let of_sessions = self.sessions.iter().filter_map(ClientSession::poll_timeout);
        let ages = self.sessions.iter().filter(|session| session.is_idle());
        of_sessions.chain(ages.map(|session| session.began() + SESSION_AGE)).min()
    }

    /// Handles what is due at `now`. Old sessions without streams are closed.
    pub fn handle_timeout(&mut self, now: Instant) {
        for session in &mut self.sessions {
            if session.poll_timeout().is_some_and(|at| at <= now) {
                session.handle_timeout(now);
            }
            if session.is_idle() && now >= session.began() + SESSION_AGE {
                session.close();
            }
        }
    }

    // --- Packets.

    /// Whether [`ClientCore::next_packet`] has something.
    pub fn wants_transmit(&mut self, now: Instant) -> bool {
        let surbs = self.surbs.ready(now);
        self.sessions.iter().any(|session| session.wants_transmit(now, surbs))
    }

    /// Writes the contents of the next packet of any session to `out`; its mixes delay it by
    /// `packet_delay` in all. `false` when there is none.
    pub fn next_packet(&mut self, now: Instant, packet_delay: Duration, out: &mut Vec<u8>) -> bool {
        self.surbs.ready(now);
        let count = self.sessions.len();
        for index in (self.turn..self.turn + count).map(|turn| turn % count) {
            let session = &mut self.sessions[index];
            let mut source = self.surbs.source(session.id());
            if session.poll_transmit(now, packet_delay, &mut source, out) {
                self.turn = index + 1;
                return true;
            }
        }
        false
    }

    // --- SURBs and replies.

    /// SURBs that are ready, and replies that are awaited.
    pub fn surb_counts(&self) -> (usize, usize) {
        self.surbs.counts()
    }

    /// SURBs that sessions want.
    pub fn surb_demand(&self) -> usize {
        self.sessions.iter().map(ClientSession::surb_demand).sum()
    }

    /// How many SURBs to make now, at most `max`; [`ClientCore::deliver_surbs`] must follow.
    pub fn claim_surbs(&mut self, now: Instant, max: usize) -> usize {
        self.surbs.ready(now);
        self.surbs.claim(self.surb_demand(), max)
    }

    /// Takes in what was made of `claimed` SURBs.
    pub fn deliver_surbs(&mut self, claimed: usize, made: Vec<ReadySurb<R>>) {
        self.surbs.deliver(claimed, made);
    }

    /// SURBs that were made before `now` lead here for a while yet, as their keys have been followed by
    /// others. All sessions replace those that they gave away; nobody waits for the new ones.
    pub fn replace_surbs(&mut self, now: Instant) {
        self.surbs.renew(now);
        self.sessions.iter_mut().for_each(ClientSession::replace_surbs);
    }

    /// SURBs that were made before `now` lead to nowhere: a node on their routes is gone or has another
    /// key, or the client has another gateway. All sessions begin a new generation.
    ///
    /// A mere reconnect to the gateway is no reason: what leads there still does.
    pub fn renew_surbs(&mut self, now: Instant) {
        self.surbs.renew(now);
        self.sessions.iter_mut().for_each(ClientSession::renew_surbs);
    }

    /// The reply with this identifier has come: what recovers it. A second one finds nothing.
    pub fn take_awaited(&mut self, identifier: &Identifier) -> Option<Awaited<R>> {
        self.surbs.take(identifier)
    }

    /// Takes the contents of a recovered reply for `session`, whose SURB was built with delays that
    /// sum to `surb_delay`.
    ///
    /// # Errors
    /// [`ReplyError`]; after a violation the session has ended. Nothing happens when it had ended.
    pub fn handle_reply(
        &mut self,
        now: Instant,
        session: SessionId,
        surb_delay: Duration,
        contents: &[u8],
    ) -> Result<(), ReplyError> {
        match self.session(session) {
            Some(session) => session.handle_reply(now, surb_delay, contents),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_common::session::frame::{Frame, take_varint};
    use mixsocks_common::session::{ACCESS_TOKEN_LEN, OpenOutcome};
    use mixsocks_sphinx::{SURB_LEN, Surb};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const DELAY: Duration = Duration::from_millis(45);

    fn core() -> (ClientCore<()>, Instant) {
        (ClientCore::new(2031, Duration::from_millis(15)), Instant::now())
    }

    fn open(core: &mut ClientCore<()>, now: Instant) -> StreamKey {
        let mut rng = StdRng::seed_from_u64(core.sessions().len() as u64);
        core.open(now, 0, &mut rng, "192.0.2.1:80".parse().unwrap()).unwrap()
    }

    /// Reply 0 with this frame.
    fn reply(core: &mut ClientCore<()>, now: Instant, id: SessionId, frame: &Frame<'_>) {
        let mut contents = vec![2, 0, 0, 0, 0, 0, 0];
        frame.encode(&mut contents);
        core.handle_reply(now, id, DELAY, &contents).unwrap();
    }

    fn surbs(count: u8, made: Instant) -> Vec<ReadySurb<()>> {
        let ready = |number| {
            let mut bytes = [0; SURB_LEN];
            // The base point: a group element that a SURB may begin with.
            bytes[0] = 9;
            let surb = Surb::from_bytes(&bytes).unwrap();
            let mut identifier = Identifier::default();
            identifier[0] = number;
            ReadySurb { surb, identifier, recovery: (), delay: DELAY, made }
        };
        (1..=count).map(ready).collect()
    }

    /// The generation of the SURBs in the packet, and how many there are.
    fn surbs_in(packet: &[u8]) -> Vec<(u64, usize)> {
        let mut input = &packet[17..];
        take_varint(&mut input).unwrap();
        take_varint(&mut input).unwrap();
        std::iter::from_fn(|| Frame::decode(&mut input).unwrap())
            .filter_map(|frame| match frame {
                Frame::Surbs { generation, surbs } => Some((generation, surbs.len())),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn new_streams_move_to_a_new_session_and_old_ones_stay() {
        let (mut core, start) = core();
        let first = open(&mut core, start);
        let second = open(&mut core, start + SESSION_AGE - Duration::from_millis(1));
        assert_eq!(second.0, first.0);
        let third = open(&mut core, start + SESSION_AGE);
        assert_ne!(third.0, first.0);
        core.handle_timeout(start + 2 * SESSION_AGE);
        assert_eq!(core.write(first, b"still there"), Some(11));
    }

    #[test]
    fn an_old_session_is_closed_when_its_last_stream_is_over() {
        let (mut core, start) = core();
        let key = open(&mut core, start);
        let outcome = OpenOutcome::Refused;
        reply(&mut core, start, key.0, &Frame::Opened { stream: key.1, outcome });
        core.handle_timeout(start + SESSION_AGE);
        let mut out = Vec::new();
        while core.next_packet(start + SESSION_AGE, DELAY, &mut out) {
            assert_ne!(out[out.len() - 2..], [12, 0], "its stream was not released");
        }
        core.release(key);
        let due = core.poll_timeout().unwrap();
        assert!(due <= start + SESSION_AGE, "{:?}", due - start);
        core.handle_timeout(start + SESSION_AGE);
        assert!(core.next_packet(start + SESSION_AGE, DELAY, &mut out));
        assert_eq!(out[out.len() - 2..], [12, 0], "CLOSE, done");
    }

    #[test]
    fn new_sessions_show_the_token() {
        let (mut core, now) = core();
        let mut shown = Vec::new();
        let token = PresentedToken::from_bytes([7; ACCESS_TOKEN_LEN]);
        for (time, token) in [(now, None), (now + SESSION_AGE, token.clone())] {
            core.set_access_token(token);
            open(&mut core, time);
            let mut out = Vec::new();
            while core.next_packet(time, DELAY, &mut out) {
                let mut input = &out[17..];
                take_varint(&mut input).unwrap();
                take_varint(&mut input).unwrap();
                if let Some(Frame::Start { access_token, .. }) = Frame::decode(&mut input).unwrap()
                {
                    shown.push(access_token);
                }
            }
        }
        assert_eq!(shown, [None, token]);
    }

    #[test]
    fn sessions_take_turns() {
        let (mut core, start) = core();
        let now = start + SESSION_AGE;
        let keys = [open(&mut core, start), open(&mut core, now)];
        for key in keys {
            core.write(key, &[1; 30_000]).unwrap();
        }
        let mut out = Vec::new();
        let senders: Vec<_> = (0..20)
            .map(|_| {
                assert!(core.next_packet(now, DELAY, &mut out));
                out[1..17].to_vec()
            })
            .collect();
        assert!(senders.windows(2).all(|pair| pair[0] != pair[1]), "{senders:?}");
    }

    #[test]
    fn renewed_surbs_are_of_a_new_generation() {
        let (mut core, now) = core();
        let key = open(&mut core, now);
        reply(&mut core, now, key.0, &Frame::Stock { generation: 0, count: 0 });
        let claimed = core.claim_surbs(now, 10);
        core.deliver_surbs(claimed, surbs(10, now));
        let mut out = Vec::new();
        assert!(core.next_packet(now, DELAY, &mut out));
        assert_eq!(surbs_in(&out), [(0, 5)]);
        let claimed = core.claim_surbs(now, 10);
        let later = now + Duration::from_millis(1);
        core.renew_surbs(later);
        core.deliver_surbs(claimed, surbs(10, now));
        while core.next_packet(later, DELAY, &mut out) {
            assert_eq!(surbs_in(&out), [], "those were made before");
        }
        let claimed = core.claim_surbs(later, 10);
        core.deliver_surbs(claimed, surbs(10, later));
        assert!(core.next_packet(later, DELAY, &mut out));
        assert_eq!(surbs_in(&out), [(2, 5)], "the generation between is left out");
    }

    #[test]
    fn replaced_surbs_are_of_the_next_generation() {
        let (mut core, now) = core();
        let key = open(&mut core, now);
        reply(&mut core, now, key.0, &Frame::Stock { generation: 0, count: 40 });
        assert_eq!(core.surb_demand(), 0, "there are enough");
        core.replace_surbs(now);
        assert_eq!(core.surb_demand(), 40, "though no stream has anything to say");
        let claimed = core.claim_surbs(now, 10);
        core.deliver_surbs(claimed, surbs(10, now));
        let mut out = Vec::new();
        assert!(core.next_packet(now, DELAY, &mut out));
        assert_eq!(surbs_in(&out), [(1, 5)]);
    }
}
