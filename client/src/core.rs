//! A client without a clock, a socket or cryptography: its sessions, its SURBs, whose turn it is, and
//! which mixes and providers are alive.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{
    ClientSession, PresentedToken, ReplyError, SessionId, StreamEvent, StreamReset, start_time_ms,
};
use mixsocks_common::target::Target;
use mixsocks_common::topology::{RouteChoice, Topology, delay_quantile};
use mixsocks_sphinx::Identifier;
use rand::{Rng, RngExt};

use crate::health::{Health, LoopWish, Mixes, Way};
use crate::stream::StreamKey;
use crate::surbs::{Awaited, ReadySurb, SurbStore};

/// New streams move to a new session after this time, so that no session becomes a profile.
pub const SESSION_AGE: Duration = Duration::from_secs(10 * 60);

/// A provider that owes an answer for so long, beyond what mixes may hold, is silent: others are
/// preferred.
const SILENT_AFTER: Duration = Duration::from_millis(2500);

/// How long others are preferred, unless it is heard of.
const AVOIDED_FOR: Duration = Duration::from_secs(60);

/// A session whose provider owes an answer for so long is dead if the mixnet works: its streams are
/// reset. Longer than a gateway takes to start again, or a laptop is closed for a moment.
pub const DEAD_AFTER: Duration = Duration::from_secs(90);

/// The mixnet works if something came that left so long after the first packet without an answer. If it
/// works only since a moment ago, the provider has so long to answer.
const PROOF_AFTER: Duration = Duration::from_secs(5);
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// Mixes that a packet and its answer pass.
const PATH_MIXES: u32 = 6;

/// What the shell must be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// Something happened to a stream.
    Stream(SessionId, StreamEvent),
    /// A session with a provider has ended, and with it its streams.
    SessionEnded(SessionId, usize, CloseReason),
    /// A mix seems dead: headers that were made before lead through it.
    MixAvoided,
}

/// What [`ClientCore::next_packet`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulled {
    /// There is nothing to send.
    Nothing,
    /// It wrote the contents of a packet to this provider.
    Packet(usize),
    /// It would have, but there was no way to this provider.
    NoWay(usize),
}

/// One of the providers that the client was given.
#[derive(Debug)]
struct Provider {
    /// What sessions with it show.
    access_token: Option<PresentedToken>,
    /// Whether there are routes to it.
    is_reachable: bool,
    /// Until then others are preferred, as nothing was heard of it when it was due.
    avoided_until: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    session: ClientSession,
    provider: usize,
    /// When it was first known that the mixnet works although the provider owes an answer.
    proved: Option<Instant>,
}

/// The sessions and SURBs of a client; `R` is what recovers a reply. Providers are numbered in the order
/// in which the user prefers them.
///
/// After every call that takes `&mut self`, [`ClientCore::poll_event`] may have news,
/// [`ClientCore::next_packet`] or [`ClientCore::next_loop`] something to send and
/// [`ClientCore::claim_surbs`] something to make, and [`ClientCore::poll_timeout`] may have changed.
#[derive(Debug)]
pub struct ClientCore<R> {
    providers: Vec<Provider>,
    /// The newest is the last one.
    sessions: Vec<Held>,
    /// The session that is asked first for the next packet.
    turn: usize,
    surbs: SurbStore<R>,
    /// SURBs that are wanted for messages.
    wanted_surbs: usize,
    /// Messages wait to be delivered.
    has_messages: bool,
    health: Health,
    has_avoided: bool,
    /// The mixes of the packets whose fate is open.
    under_way: HashMap<(SessionId, u64), Mixes>,
    looked_at: Instant,
    max_contents_bytes: usize,
    mean_delay: Duration,
    /// By the mean delay.
    silent_after: Duration,
}

impl<R> ClientCore<R> {
    /// No sessions with any of so many `providers`; packets hold `max_contents_bytes`, and mixes
    /// `mean_delay` on average.
    pub fn new(
        topology: &Topology,
        providers: usize,
        now: Instant,
        max_contents_bytes: usize,
        mean_delay: Duration,
    ) -> Self {
        let provider = || Provider { access_token: None, is_reachable: true, avoided_until: None };
        Self {
            providers: std::iter::repeat_with(provider).take(providers).collect(),
            sessions: Vec::new(),
            turn: 0,
            surbs: SurbStore::default(),
            wanted_surbs: 0,
            has_messages: false,
            health: Health::new(topology, now),
            has_avoided: false,
            under_way: HashMap::new(),
            looked_at: now,
            max_contents_bytes,
            mean_delay,
            silent_after: silent_after(mean_delay),
        }
    }

    /// The mixes are those of `topology`, and each delays by `mean_delay` on average, from now on.
    pub fn follow(&mut self, now: Instant, topology: &Topology, mean_delay: Duration) {
        self.health.follow(topology, now);
        self.mean_delay = mean_delay;
        self.silent_after = silent_after(mean_delay);
        for Held { session, .. } in &mut self.sessions {
            session.set_mean_delay(mean_delay);
        }
    }

    /// What routes are to be drawn by: which mixes seem dead.
    pub fn route_choice(&self) -> RouteChoice {
        self.health.choice()
    }

    // --- Providers.

    /// Sessions with the provider that begin from now on show it this token.
    pub fn set_access_token(&mut self, provider: usize, access_token: Option<PresentedToken>) {
        self.providers[provider].access_token = access_token;
    }

    /// Whether sessions show the provider a token.
    pub fn shows_access_token(&self, provider: usize) -> bool {
        self.providers[provider].access_token.is_some()
    }

    /// Whether there are routes to the provider now. While there are none, it is sent nothing.
    pub fn set_reachable(&mut self, provider: usize, is_reachable: bool) {
        self.providers[provider].is_reachable = is_reachable;
    }

    /// The provider did not answer when it should have.
    pub fn avoid_provider(&mut self, now: Instant, provider: usize) {
        self.providers[provider].avoided_until = Some(now + AVOIDED_FOR);
    }

    /// A provider that owes an answer for so long is silent.
    pub fn silent_after(&self) -> Duration {
        self.silent_after
    }

    /// Whom to ask for a stream, the best one first: those that there is a route to, in the user's order,
    /// but those that are silent last.
    pub fn candidates(&self, now: Instant) -> Vec<usize> {
        let reachable = |&provider: &usize| self.providers[provider].is_reachable;
        let mut candidates: Vec<_> = (0..self.providers.len()).filter(reachable).collect();
        candidates.sort_by_key(|&provider| self.is_silent(now, provider));
        candidates
    }

    /// Whether anything that left after `time` has come.
    pub fn mixnet_works_since(&self, time: Instant) -> bool {
        self.health.came_since(time)
    }

    fn is_silent(&self, now: Instant, provider: usize) -> bool {
        let silent_after = self.silent_after();
        let mut sessions = self.sessions.iter().filter(|held| held.provider == provider);
        // Without anything that came, nobody knows whose fault it is.
        let is_overdue = |held: &Held| {
            held.session
                .unanswered_since()
                .is_some_and(|since| now >= since + silent_after && self.health.came_since(since))
        };
        sessions.any(is_overdue)
            || self.providers[provider].avoided_until.is_some_and(|until| now < until)
    }

    // --- Streams.

    /// Opens a stream through a provider, in the newest session with it, or in a new one if that is too
    /// old or has ended; bytes that are written at once travel with the request. `wall_ms` are
    /// milliseconds since 1970. `None` when the session has too many streams.
    pub fn open(
        &mut self,
        now: Instant,
        wall_ms: u64,
        rng: &mut impl Rng,
        provider: usize,
        target: Target,
    ) -> Option<StreamKey> {
        let usable = |session: &ClientSession| {
            session.closed().is_none() && now < session.began() + SESSION_AGE
        };
        let newest = self.sessions.iter().rposition(|held| held.provider == provider);
        let at = match newest.filter(|&at| usable(&self.sessions[at].session)) {
            Some(at) => at,
            None => {
                let session = ClientSession::new(
                    SessionId(rng.random()),
                    start_time_ms(wall_ms),
                    now,
                    self.max_contents_bytes,
                    self.mean_delay,
                );
                let token = self.providers[provider].access_token.clone();
                let session = session.with_access_token(token);
                self.sessions.push(Held { session, provider, proved: None });
                self.sessions.len() - 1
            }
        };
        let session = &mut self.sessions[at].session;
        Some((session.id(), session.open(target)?))
    }

    /// The session, unless it has ended.
    pub fn session(&mut self, id: SessionId) -> Option<&mut ClientSession> {
        self.sessions
            .iter_mut()
            .map(|held| &mut held.session)
            .find(|session| session.id() == id)
            .filter(|session| session.closed().is_none())
    }

    /// All sessions that have not been forgotten.
    pub fn sessions(&self) -> impl ExactSizeIterator<Item = &ClientSession> {
        self.sessions.iter().map(|held| &held.session)
    }

    /// Whose session it is, if it has not been forgotten.
    pub fn provider_of(&self, id: SessionId) -> Option<usize> {
        let held = self.sessions.iter().find(|held| held.session.id() == id)?;
        Some(held.provider)
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

    /// Tells the providers to forget the sessions.
    pub fn close(&mut self) {
        self.sessions.iter_mut().for_each(|held| held.session.close());
    }

    /// Ends all sessions at once.
    pub fn end(&mut self) {
        self.sessions.iter_mut().for_each(|held| held.session.end(CloseReason::Done));
    }

    /// What has happened. Sessions that have ended are forgotten when it is told.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        if std::mem::take(&mut self.has_avoided) {
            return Some(ClientEvent::MixAvoided);
        }
        for Held { session, .. } in &mut self.sessions {
            let id = session.id();
            if let Some(event) = session.poll_event() {
                return Some(ClientEvent::Stream(id, event));
            }
        }
        let ended = self.sessions.iter().position(|held| held.session.closed().is_some())?;
        let Held { session, provider, .. } = self.sessions.remove(ended);
        self.surbs.forget_session(session.id());
        self.under_way.retain(|(id, _), _| *id != session.id());
        Some(ClientEvent::SessionEnded(session.id(), provider, session.closed()?))
    }

    // --- Time.

    /// When [`ClientCore::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let of_sessions = self.sessions().filter_map(ClientSession::poll_timeout);
        let idle = self.sessions().filter(|session| session.is_idle());
        let ages = idle.map(|session| session.began() + SESSION_AGE);
        // Without a proof that the mixnet works the time passes, and a loop that comes back is one.
        let deaths = self.sessions.iter().filter_map(|held| {
            Some(death(held.session.unanswered_since()?, held.proved.unwrap_or(self.looked_at)))
        });
        let loops = if self.is_in_use() { self.health.next_loop_at(self.looked_at) } else { None };
        let loops = loops.filter(|at| *at > self.looked_at).into_iter();
        let proofs = self.next_proof_at().into_iter();
        let of_health = loops.chain(proofs).chain(self.health.poll_timeout());
        of_sessions.chain(ages).chain(deaths).chain(of_health).min()
    }

    /// Handles what is due at `now`. Old sessions without streams are closed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.looked_at = now;
        for Held { session, .. } in &mut self.sessions {
            if session.poll_timeout().is_some_and(|at| at <= now) {
                session.handle_timeout(now);
            }
            if session.is_idle() && now >= session.began() + SESSION_AGE {
                session.close();
            }
        }
        self.health.handle_timeout(now);
        self.note_fates(now);
        if self.next_proof_at().is_some_and(|at| at <= now) {
            self.health.seek_proof(now);
        }
        self.end_dead_sessions(now);
    }

    /// When somebody has to know next whether the mixnet works, as a provider owes an answer: before it is
    /// silent, and before its session is dead. Neither may wait for a loss that has loops sent.
    fn next_proof_at(&self) -> Option<Instant> {
        if !self.is_in_use() {
            return None;
        }
        let silent_soon = self.silent_after() / 2;
        let unproved = self.sessions().filter_map(|session| {
            let since = session.unanswered_since()?;
            let proofs = [(since, since + silent_soon), (since + PROOF_AFTER, since + PROOF_AFTER)];
            proofs.into_iter().find(|(left, _)| !self.health.came_since(*left))
        });
        Some(unproved.map(|(_, wanted)| wanted).min()?.max(self.health.next_proof_at()))
    }

    /// Streams through a dead provider must not hang for ever. What is no fault of the provider, such as
    /// a gateway or a link that is away, is waited for.
    fn end_dead_sessions(&mut self, now: Instant) {
        for Held { session, proved, .. } in &mut self.sessions {
            let since = session.unanswered_since();
            let Some(since) = since.filter(|since| self.health.came_since(*since + PROOF_AFTER))
            else {
                *proved = None;
                continue;
            };
            if now >= death(since, *proved.get_or_insert(now)) {
                session.end(CloseReason::Unknown);
            }
        }
    }

    /// Whether anybody waits for something.
    fn is_in_use(&self) -> bool {
        let has_streams =
            |session: &ClientSession| session.closed().is_none() && session.stream_count() > 0;
        self.has_messages || self.sessions().any(has_streams)
    }

    /// Whether messages wait to be delivered.
    pub fn set_messages(&mut self, has_messages: bool) {
        self.has_messages = has_messages;
    }

    // --- Packets.

    /// Whether [`ClientCore::next_packet`] or [`ClientCore::next_loop`] has something.
    pub fn wants_transmit(&mut self, now: Instant) -> bool {
        let surbs = self.surbs.ready(now);
        let wants = |held: &Held| {
            self.providers[held.provider].is_reachable && held.session.wants_transmit(now, surbs)
        };
        self.sessions.iter().any(wants) || self.next_loop(now).is_some()
    }

    /// Writes the contents of the next packet of any session to `out`; `way_to` says which way a packet
    /// to a provider will go, if there is one.
    pub fn next_packet(
        &mut self,
        now: Instant,
        mut way_to: impl FnMut(usize) -> Option<Way>,
        out: &mut Vec<u8>,
    ) -> Pulled {
        let surbs = self.surbs.ready(now);
        let count = self.sessions.len();
        let mut result = Pulled::Nothing;
        for index in (self.turn..self.turn + count).map(|turn| turn % count) {
            let Held { session, provider, .. } = &mut self.sessions[index];
            if !self.providers[*provider].is_reachable || !session.wants_transmit(now, surbs) {
                continue;
            }
            let Some(way) = way_to(*provider) else {
                result = Pulled::NoWay(*provider);
                continue;
            };
            let (number, under_way) = (session.next_number(), session.packets_under_way());
            let mut source = self.surbs.source(session.id());
            if session.poll_transmit(now, way.delay, &mut source, out) {
                if session.packets_under_way() > under_way {
                    self.under_way.insert((session.id(), number), way.mixes);
                }
                self.turn = index + 1;
                return Pulled::Packet(*provider);
            }
        }
        result
    }

    /// The next loop to send: a packet to this client itself, with an identifier that names it.
    /// [`ClientCore::loop_taken`] must follow.
    pub fn next_loop(&self, now: Instant) -> Option<LoopWish> {
        self.health.next_loop(now).filter(|_| self.is_in_use())
    }

    /// The loop that was wished for is being made; [`ClientCore::loop_sent`] follows unless there is no
    /// route for it.
    pub fn loop_taken(&mut self, now: Instant, wish: LoopWish) {
        self.health.loop_taken(now, wish);
    }

    /// The loop leaves.
    pub fn loop_sent(&mut self, now: Instant, wish: LoopWish, identifier: Identifier, way: Way) {
        self.health.loop_sent(now, wish, identifier, way);
    }

    /// Whether what has come is a loop that is awaited.
    pub fn awaits_loop(&self, identifier: &Identifier) -> bool {
        self.health.awaits_loop(identifier)
    }

    /// Whether what has come is a loop.
    pub fn loop_came(&mut self, now: Instant, identifier: &Identifier) -> bool {
        let is_loop = self.health.loop_came(now, identifier);
        if is_loop {
            self.end_dead_sessions(now);
        }
        is_loop
    }

    /// Tells what is known of the mixes, and draws the conclusions.
    fn note_fates(&mut self, now: Instant) {
        for Held { session, .. } in &mut self.sessions {
            while let Some(fate) = session.poll_fate() {
                if let Some(mixes) = self.under_way.remove(&(session.id(), fate.number)) {
                    self.health.on_fate(now, &mixes, fate.sent, fate.has_come);
                }
            }
        }
        if self.health.take_news() {
            // Those that the provider has lead through it as well.
            self.renew_surbs(now);
            self.has_avoided = true;
        }
    }

    // --- SURBs and replies.

    /// SURBs that are ready, and replies that are awaited.
    pub fn surb_counts(&self) -> (usize, usize) {
        self.surbs.counts()
    }

    /// SURBs that sessions and messages want.
    pub fn surb_demand(&self) -> usize {
        self.sessions().map(ClientSession::surb_demand).sum::<usize>() + self.wanted_surbs
    }

    /// So many SURBs are wanted for messages.
    pub fn want_surbs(&mut self, count: usize) {
        self.wanted_surbs = count;
    }

    /// SURBs at hand.
    pub fn ready_surbs(&mut self, now: Instant) -> usize {
        self.surbs.ready(now)
    }

    /// The next SURB at hand, for a message. What comes by it is for [`ClientCore::message_came`].
    pub fn take_surb(&mut self, now: Instant) -> Option<ReadySurb<R>> {
        self.surbs.pop(now)
    }

    /// Something has come by a SURB of a message, which led this way.
    pub fn message_came(&mut self, now: Instant, way: &Way) {
        self.health.on_reply(now, &way.mixes);
        self.note_fates(now);
    }

    /// A packet of a message that left at `sent` through these mixes was acknowledged, or not in time.
    pub fn note_message_fate(
        &mut self,
        now: Instant,
        mixes: &Mixes,
        sent: Instant,
        has_come: bool,
    ) {
        self.health.on_fate(now, mixes, sent, has_come);
        self.note_fates(now);
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
        self.sessions.iter_mut().for_each(|held| held.session.replace_surbs());
    }

    /// SURBs that were made before `now` lead to nowhere: a node on their routes is gone or has another
    /// key, or the client has another gateway. All sessions begin a new generation.
    ///
    /// A mere reconnect to the gateway is no reason: what leads there still does.
    pub fn renew_surbs(&mut self, now: Instant) {
        self.surbs.renew(now);
        self.sessions.iter_mut().for_each(|held| held.session.renew_surbs());
    }

    /// The gateway is reached again after a cut or a sleep: sessions with streams ask their providers, one
    /// packet each, whether there is news.
    pub fn path_is_back(&mut self) {
        self.sessions.iter_mut().for_each(|held| held.session.path_is_back());
    }

    /// The reply with this identifier has come: what recovers it. A second one finds nothing.
    pub fn take_awaited(&mut self, identifier: &Identifier) -> Option<Awaited<R>> {
        self.surbs.take(identifier)
    }

    /// Takes the contents of a recovered reply for `session`, whose SURB led this way.
    ///
    /// # Errors
    /// [`ReplyError`]; after a violation the session has ended. Nothing happens when it had ended.
    pub fn handle_reply(
        &mut self,
        now: Instant,
        session: SessionId,
        way: &Way,
        contents: &[u8],
    ) -> Result<(), ReplyError> {
        if let Some(provider) = self.provider_of(session) {
            self.providers[provider].avoided_until = None;
        }
        let Some(session) = self.session(session) else { return Ok(()) };
        session.handle_reply(now, way.delay, contents)?;
        self.health.on_reply(now, &way.mixes);
        self.note_fates(now);
        Ok(())
    }
}

/// How long an answer may take: both ways, and once more for what is lost.
fn silent_after(mean_delay: Duration) -> Duration {
    SILENT_AFTER + 2 * delay_quantile(mean_delay, PATH_MIXES)
}

/// When a session ends whose provider owes an answer since then, if the mixnet works since `proved`.
fn death(since: Instant, proved: Instant) -> Instant {
    (since + DEAD_AFTER).max(proved + ANSWER_TIME)
}

#[cfg(test)]
mod tests;
