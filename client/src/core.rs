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
mod tests {
    use mixsocks_common::session::frame::{Frame, take_varint};
    use mixsocks_common::session::{ACCESS_TOKEN_LEN, OpenOutcome};
    use mixsocks_common::topology::LAYERS;
    use mixsocks_sphinx::{SURB_LEN, Surb};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::testing::TestNetwork;

    const WAY: Way = Way { delay: Duration::from_millis(45), mixes: [[0; 32]; LAYERS] };

    /// With two providers.
    fn core() -> (ClientCore<()>, Instant) {
        let (topology, now) = (TestNetwork::new().topology(0), Instant::now());
        (ClientCore::new(&topology, 2, now, 2031, Duration::from_millis(15)), now)
    }

    /// Whether a packet was written.
    fn pull(core: &mut ClientCore<()>, now: Instant, out: &mut Vec<u8>) -> bool {
        core.next_packet(now, |_| Some(WAY), out) != Pulled::Nothing
    }

    fn open(core: &mut ClientCore<()>, now: Instant) -> StreamKey {
        let mut rng = StdRng::seed_from_u64(core.sessions().len() as u64);
        core.open(now, 0, &mut rng, 0, "192.0.2.1:80".parse().unwrap()).unwrap()
    }

    /// Reply 0 with this frame.
    fn reply(core: &mut ClientCore<()>, now: Instant, id: SessionId, frame: &Frame<'_>) {
        let mut contents = vec![2, 0, 0, 0, 0, 0, 0];
        frame.encode(&mut contents);
        core.handle_reply(now, id, &WAY, &contents).unwrap();
    }

    fn surbs(count: u8, made: Instant) -> Vec<ReadySurb<()>> {
        let ready = |number| {
            let mut bytes = [0; SURB_LEN];
            // The base point: a group element that a SURB may begin with.
            bytes[0] = 9;
            let surb = Surb::from_bytes(&bytes).unwrap();
            let mut identifier = Identifier::default();
            identifier[0] = number;
            ReadySurb { surb, identifier, recovery: (), way: WAY, made, key_epoch: 0 }
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
        while pull(&mut core, start + SESSION_AGE, &mut out) {
            assert_ne!(out[out.len() - 2..], [12, 0], "its stream was not released");
        }
        core.release(key);
        let due = core.poll_timeout().unwrap();
        assert!(due <= start + SESSION_AGE, "{:?}", due - start);
        core.handle_timeout(start + SESSION_AGE);
        assert!(pull(&mut core, start + SESSION_AGE, &mut out));
        assert_eq!(out[out.len() - 2..], [12, 0], "CLOSE, done");
    }

    #[test]
    fn new_sessions_show_the_token() {
        let (mut core, now) = core();
        let mut shown = Vec::new();
        let token = PresentedToken::from_bytes([7; ACCESS_TOKEN_LEN]);
        for (time, token) in [(now, None), (now + SESSION_AGE, token.clone())] {
            core.set_access_token(0, token);
            open(&mut core, time);
            let mut out = Vec::new();
            while pull(&mut core, time, &mut out) {
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

    fn packet(core: &mut ClientCore<()>, now: Instant) {
        assert!(pull(core, now, &mut Vec::new()));
    }

    #[test]
    fn a_provider_that_owes_an_answer_for_long_is_preferred_no_more() {
        let (mut core, start) = core();
        assert_eq!(core.candidates(start), [0, 1]);
        let key = open(&mut core, start);
        packet(&mut core, start);
        let silent = start + core.silent_after();
        assert_eq!(core.candidates(silent), [0, 1], "the mixnet may be at fault");
        core.health.on_fate(silent, &WAY.mixes, silent, true);
        assert_eq!(core.candidates(silent - Duration::from_nanos(1)), [0, 1]);
        assert_eq!(core.candidates(silent), [1, 0]);
        let outcome = OpenOutcome::Connected;
        reply(&mut core, silent, key.0, &Frame::Opened { stream: key.1, outcome });
        assert_eq!(core.candidates(silent), [0, 1]);
        // So is one of which the shell says so, for a while.
        core.avoid_provider(silent, 0);
        assert_eq!(core.candidates(silent), [1, 0]);
        assert_eq!(core.candidates(silent + AVOIDED_FOR), [0, 1]);
        core.set_reachable(1, false);
        assert_eq!(core.candidates(silent), [0]);
    }

    /// Lets time pass until then, with a provider that says nothing; loops come back if the mixnet works.
    /// Returns how many were sent.
    fn pass(core: &mut ClientCore<()>, from: Instant, until: Instant, mixnet_works: bool) -> u8 {
        let (mut now, mut loops) = (from, 0);
        loop {
            let due = core.poll_timeout().unwrap_or(until).max(now + Duration::from_millis(1));
            now = due.min(until);
            core.handle_timeout(now);
            while pull(core, now, &mut Vec::new()) {}
            while send_loop(core, now, [loops; 16]) {
                assert!(!mixnet_works || core.loop_came(now, &[loops; 16]));
                loops += 1;
            }
            if now == until {
                return loops;
            }
        }
    }

    /// After many losses the loops that look for dead mixes are rare.
    fn with_many_losses(core: &mut ClientCore<()>, mut now: Instant) -> Instant {
        let key = open(core, now);
        for _ in 0..8 {
            now += Duration::from_secs(33);
            core.health.on_fate(now, &WAY.mixes, now, false);
            while send_loop(core, now, [255; 16]) {
                assert!(core.loop_came(now, &[255; 16]));
                core.health.handle_timeout(now + Duration::from_secs(2));
            }
        }
        core.release(key);
        now + SESSION_AGE
    }

    #[test]
    fn a_silent_provider_is_known_in_time_also_after_many_losses() {
        let (mut core, start) = core();
        let now = with_many_losses(&mut core, start);
        core.health.on_fate(now, &WAY.mixes, now, false);
        while send_loop(&mut core, now, [254; 16]) {}
        open(&mut core, now);
        packet(&mut core, now);
        let silent = now + core.silent_after();
        pass(&mut core, now, silent, true);
        assert_eq!(core.candidates(silent), [1, 0]);
    }

    #[test]
    fn few_loops_seek_a_proof_that_does_not_come() {
        let (mut core, now) = core();
        open(&mut core, now);
        packet(&mut core, now);
        core.health.on_fate(now, &WAY.mixes, now, true);
        let loops = pass(&mut core, now, now + Duration::from_secs(60), false);
        assert!((6..100).contains(&loops), "{loops}");
    }

    #[test]
    fn each_provider_has_sessions_of_its_own() {
        let (mut core, now) = core();
        let mut rng = StdRng::seed_from_u64(1);
        let target: Target = "192.0.2.1:80".parse().unwrap();
        let keys: Vec<_> = [0, 1, 0]
            .map(|provider| core.open(now, 0, &mut rng, provider, target.clone()).unwrap())
            .into();
        assert!(keys[0].0 == keys[2].0 && keys[0].0 != keys[1].0);
        assert_eq!(core.provider_of(keys[1].0), Some(1));
        let mut out = Vec::new();
        // Without a way to one of them, the other's turn comes.
        let only = |number| move |provider| (provider == number).then_some(WAY);
        assert_eq!(core.next_packet(now, only(1), &mut out), Pulled::Packet(1));
        assert_eq!(core.next_packet(now, only(1), &mut out), Pulled::NoWay(0));
        core.set_reachable(0, false);
        assert_eq!(core.next_packet(now, only(1), &mut out), Pulled::Nothing);
    }

    /// The client's loop through any mixes: whether there was one to send.
    fn send_loop(core: &mut ClientCore<()>, now: Instant, identifier: Identifier) -> bool {
        let Some(wish) = core.next_loop(now) else { return false };
        core.loop_taken(now, wish);
        core.loop_sent(now, wish, identifier, WAY);
        true
    }

    #[test]
    fn streams_of_a_dead_provider_end_when_the_mixnet_works() {
        for mixnet_works in [false, true] {
            let (mut core, start) = core();
            let key = open(&mut core, start);
            packet(&mut core, start);
            let mut sent = Vec::new();
            // Its packets are given up, and the loops that follow come back, or do not.
            let mut now = start;
            while now < start + 2 * DEAD_AFTER && core.session(key.0).is_some() {
                now = core.poll_timeout().unwrap().max(now + Duration::from_millis(1));
                core.handle_timeout(now);
                let claimed = core.claim_surbs(now, 10);
                core.deliver_surbs(claimed, surbs(10, now));
                while pull(&mut core, now, &mut Vec::new()) {}
                let identifier = [u8::try_from(sent.len()).unwrap(); 16];
                if send_loop(&mut core, now, identifier) {
                    sent.push(identifier);
                    assert!(!mixnet_works || core.loop_came(now, &identifier));
                }
                while let Some(event) = core.poll_event() {
                    println!("{event:?} after {:?}", now - start);
                }
            }
            assert!(sent.len() > 3, "loops were sent: {}", sent.len());
            assert_eq!(core.session(key.0).is_none(), mixnet_works);
            if mixnet_works {
                assert!((DEAD_AFTER..DEAD_AFTER + Duration::from_secs(5)).contains(&(now - start)));
            }
        }
    }

    /// Until then the client was cut off: the provider could not answer.
    #[test]
    fn a_provider_has_time_to_answer_once_the_mixnet_works_again() {
        let (mut core, start) = core();
        let key = open(&mut core, start);
        packet(&mut core, start);
        let back = start + 3 * DEAD_AFTER;
        core.handle_timeout(back);
        core.health.on_fate(back, &WAY.mixes, back, true);
        core.handle_timeout(back);
        assert!(core.session(key.0).is_some());
        core.handle_timeout(back + ANSWER_TIME - Duration::from_nanos(1));
        assert!(core.session(key.0).is_some());
        core.handle_timeout(back + ANSWER_TIME);
        assert!(core.session(key.0).is_none());
    }

    #[test]
    fn a_client_without_streams_sends_no_loops() {
        let (mut core, now) = core();
        let key = open(&mut core, now);
        packet(&mut core, now);
        core.health.on_fate(now, &WAY.mixes, now, false);
        assert!(core.next_loop(now).is_some());
        let outcome = OpenOutcome::Refused;
        reply(&mut core, now, key.0, &Frame::Opened { stream: key.1, outcome });
        core.release(key);
        assert!(core.next_loop(now).is_none() && core.session(key.0).is_some());
    }

    /// Nothing but messages shows it that mixes are dead.
    #[test]
    fn a_client_without_streams_sends_loops_when_its_messages_are_lost() {
        let (mut core, now) = core();
        core.set_messages(true);
        assert!(core.next_loop(now).is_none());
        core.note_message_fate(now, &WAY.mixes, now, true);
        assert!(core.next_loop(now).is_none());
        core.note_message_fate(now, &WAY.mixes, now, false);
        assert!(core.next_loop(now).is_some() && core.wants_transmit(now));
        core.set_messages(false);
        assert!(core.next_loop(now).is_none(), "there is nothing to send");
    }

    #[test]
    fn what_is_under_way_is_forgotten_with_its_session() {
        let (mut core, now) = core();
        let key = open(&mut core, now);
        core.write(key, &[1; 30_000]).unwrap();
        while pull(&mut core, now, &mut Vec::new()) {}
        assert_eq!(core.under_way.len(), core.session(key.0).unwrap().packets_under_way());
        core.end();
        while core.poll_event().is_some() {}
        assert!(core.under_way.is_empty());
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
                assert!(pull(&mut core, now, &mut out));
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
        assert!(pull(&mut core, now, &mut out));
        assert_eq!(surbs_in(&out), [(0, 5)]);
        let claimed = core.claim_surbs(now, 10);
        let later = now + Duration::from_millis(1);
        core.renew_surbs(later);
        core.deliver_surbs(claimed, surbs(10, now));
        while pull(&mut core, later, &mut out) {
            assert_eq!(surbs_in(&out), [], "those were made before");
        }
        let claimed = core.claim_surbs(later, 10);
        core.deliver_surbs(claimed, surbs(10, later));
        assert!(pull(&mut core, later, &mut out));
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
        assert!(pull(&mut core, now, &mut out));
        assert_eq!(surbs_in(&out), [(1, 5)]);
    }
}
