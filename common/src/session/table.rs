//! The sessions of a provider: who may begin one, and what happens to packets of the others.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use mixsocks_sphinx::Surb;

use super::client::SessionId;
use super::frame::{CloseReason, Frame};
use super::provider::{PacketError, ProviderSession, write_close};
use super::transport::take_number;
use super::{AccessTokenHash, AccessTokens, PacketKind, PresentedToken, SESSION_ID_LEN};

/// Sessions that a provider keeps at once. An idle one takes a few KiB.
pub const MAX_SESSIONS: usize = 4096;

/// A START is taken while the two clocks differ by no more than this.
pub const MAX_START_AGE: Duration = Duration::from_secs(120);

/// Clients round the time in a START up to a multiple of this: milliseconds would tell the provider
/// how far their clock is off, and so which sessions are of one client. It is also how long after a
/// provider's restart a START from before it may be taken.
pub const START_STEP: Duration = Duration::from_secs(10);

/// Ended sessions are remembered so long: until no START of theirs can be taken any more.
const REMEMBER_ENDED: Duration = Duration::from_secs(2 * 120 + 10 + 10);

/// Ended sessions that are remembered at most, some 50 MB; beyond, no new ones begin. It takes 2,000
/// sessions a second to get there.
pub const MAX_REMEMBERED: usize = 512 * 1024;

/// The time to put into the START of a session that begins at `wall_ms` (milliseconds since 1970).
pub fn start_time_ms(wall_ms: u64) -> u64 {
    let step_ms = millis(START_STEP);
    wall_ms.div_ceil(step_ms).saturating_mul(step_ms)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What became of a packet.
#[derive(Debug)]
pub enum Handled {
    /// It belongs to this session, which has news.
    Session(SessionId),
    /// It was refused, and its sender is told so.
    Refused {
        /// Why.
        reason: CloseReason,
        /// The contents of the reply.
        contents: Vec<u8>,
        /// The SURB to send it with.
        surb: Surb,
    },
    /// It was dropped.
    Dropped(Dropped),
}

/// Why a packet was dropped without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Dropped {
    /// It is no packet of a session.
    #[error("not a session packet")]
    NotASession,
    /// The session does not take it.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// It was refused, and has no SURB to say so.
    #[error("refused without a way to say so: {0}")]
    Refused(CloseReason),
}

/// All sessions of a provider.
#[derive(Debug)]
pub struct ProviderSessions {
    sessions: HashMap<SessionId, ProviderSession>,
    /// Who is served: whoever has one of these tokens, or everybody.
    access: Option<AccessTokens>,
    /// With which token each session began, if one was demanded.
    begun_with: HashMap<SessionId, AccessTokenHash>,
    /// When each ended session may be forgotten.
    ended: HashMap<SessionId, Instant>,
    ended_order: BTreeSet<(Instant, SessionId)>,
    /// Sessions that packets have ended, of which the caller has not heard yet.
    put_out: Vec<SessionId>,
    max_sessions: usize,
    max_remembered: usize,
    provider_started_ms: u64,
    max_packet_bytes: usize,
    mean_delay: Duration,
}

impl ProviderSessions {
    /// No sessions, at a provider that started at `started_ms` (milliseconds since 1970).
    pub fn new(started_ms: u64, max_packet_bytes: usize, mean_delay: Duration) -> Self {
        let (max_sessions, max_remembered) = (MAX_SESSIONS, MAX_REMEMBERED);
        Self::with_limits(started_ms, max_packet_bytes, mean_delay, max_sessions, max_remembered)
    }

    pub(super) fn with_limits(
        started_ms: u64,
        max_packet_bytes: usize,
        mean_delay: Duration,
        max_sessions: usize,
        max_remembered: usize,
    ) -> Self {
        Self {
            sessions: HashMap::new(),
            access: None,
            begun_with: HashMap::new(),
            ended: HashMap::new(),
            ended_order: BTreeSet::new(),
            put_out: Vec::new(),
            max_sessions,
            max_remembered,
            provider_started_ms: started_ms,
            max_packet_bytes,
            mean_delay,
        }
    }

    /// The session with this id.
    pub fn get_mut(&mut self, id: SessionId) -> Option<&mut ProviderSession> {
        self.sessions.get_mut(&id)
    }

    /// All sessions, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &ProviderSession> {
        self.sessions.values()
    }

    /// Each mix delays by this on average from now on.
    pub fn set_mean_delay(&mut self, mean_delay: Duration) {
        self.mean_delay = mean_delay;
        self.sessions.values_mut().for_each(|session| session.set_mean_delay(mean_delay));
    }

    /// From now on only sessions with one of these tokens begin; `None` takes them all.
    ///
    /// Returns the sessions that began with another token or none, in the order of their ids: the caller
    /// ends them.
    pub fn set_access_tokens(&mut self, access: Option<AccessTokens>) -> Vec<SessionId> {
        self.access = access;
        let Some(access) = &self.access else { return Vec::new() };
        let may_stay =
            |id: &SessionId| self.begun_with.get(id).is_some_and(|hash| access.know(hash));
        let mut others: Vec<_> = self.sessions.keys().copied().filter(|id| !may_stay(id)).collect();
        others.sort_unstable();
        others
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Takes the contents of a packet; `wall_ms` is the time in milliseconds since 1970.
    pub fn handle_packet(&mut self, now: Instant, wall_ms: u64, contents: &[u8]) -> Handled {
        let mut input = contents;
        if PacketKind::Session.take(&mut input).is_err() {
            return Handled::Dropped(Dropped::NotASession);
        }
        let Some(id) = input.split_off(..SESSION_ID_LEN) else {
            return Handled::Dropped(Dropped::NotASession);
        };
        let mut bytes = [0u8; SESSION_ID_LEN];
        bytes.copy_from_slice(id);
        let id = SessionId(bytes);
        if !self.sessions.contains_key(&id)
            && let Err(reason) = self.begin(id, now, wall_ms, input)
        {
            return refuse(input, reason);
        }
        let session = self.sessions.get_mut(&id).expect("found or begun above");
        match session.handle_packet(now, input) {
            Ok(()) => Handled::Session(id),
            Err(PacketError::Duplicate) => Handled::Dropped(PacketError::Duplicate.into()),
            Err(error) => {
                let session = self.remove(id, now);
                self.put_out.push(id);
                let mut contents = Vec::new();
                match session
                    .and_then(|session| session.refuse(CloseReason::Protocol, &mut contents))
                {
                    Some(surb) => {
                        Handled::Refused { reason: CloseReason::Protocol, contents, surb }
                    }
                    None => Handled::Dropped(error.into()),
                }
            }
        }
    }

    /// A session that [`ProviderSessions::handle_packet`] has ended.
    pub fn poll_ended(&mut self) -> Option<SessionId> {
        self.put_out.pop()
    }

    /// Takes an ended session out and remembers its id, so that a replayed START begins nothing.
    pub fn remove(&mut self, id: SessionId, now: Instant) -> Option<ProviderSession> {
        let session = self.sessions.remove(&id)?;
        self.begun_with.remove(&id);
        self.remember(id, now);
        Some(session)
    }

    fn remember(&mut self, id: SessionId, now: Instant) {
        let until = now + REMEMBER_ENDED;
        if let Some(before) = self.ended.insert(id, until) {
            self.ended_order.remove(&(before, id));
        }
        self.ended_order.insert((until, id));
    }

    /// A session is told that it is unknown, and may do elsewhere what it asked for: a START of it from
    /// before the provider's own start, which comes later, must begin nothing. Such a START can be taken
    /// for a while only. Strangers can send such packets, so that room is left for sessions that end.
    fn on_unknown(&mut self, id: SessionId, now: Instant, wall_ms: u64) {
        let span_ms = millis(MAX_START_AGE) + millis(START_STEP);
        let may_begin = wall_ms <= self.provider_started_ms.saturating_add(span_ms);
        if may_begin && self.ended.len() < self.max_remembered / 2 {
            self.remember(id, now);
        }
    }

    fn begin(
        &mut self,
        id: SessionId,
        now: Instant,
        wall_ms: u64,
        packet: &[u8],
    ) -> Result<(), CloseReason> {
        while let Some(&(until, ended)) = self.ended_order.first()
            && until <= now
        {
            self.ended_order.pop_first();
            self.ended.remove(&ended);
        }
        let Some((started_ms, token)) = start(packet) else {
            self.on_unknown(id, now, wall_ms);
            return Err(CloseReason::Unknown);
        };
        // Before anything else: strangers put no other session out, and are told what they lack.
        let token = self.admit(token)?;
        if self.ended.contains_key(&id) {
            return Err(CloseReason::Unknown);
        }
        let oldest = wall_ms.saturating_sub(millis(MAX_START_AGE)).max(self.provider_started_ms);
        let newest = wall_ms + millis(MAX_START_AGE) + millis(START_STEP);
        if !(oldest..=newest).contains(&started_ms) {
            return Err(CloseReason::StaleStart);
        }
        if self.sessions.len() >= self.max_sessions {
            self.put_one_out(now);
        }
        if self.sessions.len() >= self.max_sessions || self.ended.len() >= self.max_remembered {
            return Err(CloseReason::Full);
        }
        self.sessions.insert(id, ProviderSession::new(now, self.max_packet_bytes, self.mean_delay));
        if let Some(token) = token {
            self.begun_with.insert(id, token);
        }
        Ok(())
    }

    /// The token with which a session may begin; `None` when none is demanded.
    fn admit(&self, token: Option<PresentedToken>) -> Result<Option<AccessTokenHash>, CloseReason> {
        let Some(access) = &self.access else { return Ok(None) };
        let known = token.map(|token| token.hash()).filter(|hash| access.know(hash));
        known.map(Some).ok_or(CloseReason::TokenNeeded)
    }
}

impl ProviderSessions {
    /// Makes room: of the sessions without streams, the one that has been silent for longest is
    /// forgotten. Otherwise whoever begins sessions and leaves them alone could keep others out; the
    /// client of a forgotten one begins another when it needs it.
    fn put_one_out(&mut self, now: Instant) {
        let idle = self.sessions.iter().filter(|(_, session)| session.stream_count() == 0);
        let oldest = idle.map(|(id, session)| (session.last_heard(), *id)).min();
        if let Some((_, id)) = oldest {
            self.remove(id, now);
            self.put_out.push(id);
        }
    }
}

/// Time and token in the START of a packet that has one.
fn start(packet: &[u8]) -> Option<(u64, Option<PresentedToken>)> {
    let mut input = packet;
    take_number(&mut input).ok()?;
    match Frame::decode(&mut input) {
        Ok(Some(Frame::Start { time_ms, access_token, .. })) => Some((time_ms, access_token)),
        _ => None,
    }
}

/// Answers a packet without a session, if it brought a SURB.
fn refuse(packet: &[u8], reason: CloseReason) -> Handled {
    let mut input = packet;
    if take_number(&mut input).is_ok() {
        while let Ok(Some(frame)) = Frame::decode(&mut input) {
            if let Frame::Surbs { surbs, .. } = frame
                && let Some(bytes) = surbs.first()
                && let Ok(surb) = Surb::from_bytes(bytes)
            {
                let mut contents = Vec::new();
                write_close(reason, &mut contents);
                return Handled::Refused { reason, contents, surb };
            }
        }
    }
    Handled::Dropped(Dropped::Refused(reason))
}
