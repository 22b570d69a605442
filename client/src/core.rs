//! A client without a clock, a socket or cryptography: its sessions, its SURBs, and whose turn it is.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{
    ClientSession, ReplyError, SessionId, StreamEvent, StreamReset, start_time_ms,
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
    surbs: SurbStore<R>,
    events: VecDeque<ClientEvent>,
    max_contents_bytes: usize,
    mean_delay: Duration,
}

impl<R> ClientCore<R> {
    /// No sessions; packets hold `max_contents_bytes`, and mixes `mean_delay` on average.
    pub fn new(max_contents_bytes: usize, mean_delay: Duration) -> Self {
        Self {
            sessions: Vec::new(),
            surbs: SurbStore::default(),
            events: VecDeque::new(),
            max_contents_bytes,
            mean_delay,
        }
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
            self.sessions.push(ClientSession::new(
                SessionId(rng.random()),
                start_time_ms(wall_ms),
                now,
                self.max_contents_bytes,
                self.mean_delay,
            ));
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
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
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
        let Self { sessions, surbs, .. } = self;
        let sent = sessions.iter_mut().any(|session| {
            let mut source = surbs.source(session.id());
            session.poll_transmit(now, packet_delay, &mut source, out)
        });
        // Sessions take turns.
        if sent && sessions.len() > 1 {
            let newest = sessions.len() - 1;
            sessions[..newest].rotate_left(1);
        }
        sent
    }

    // --- SURBs and replies.

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
