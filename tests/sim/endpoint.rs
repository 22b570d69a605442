//! Clients and the provider of the simulation: their real cores, and what their shells do around
//! them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mixsocks_client::core::ClientCore;
use mixsocks_client::health::Way;
use mixsocks_client::{ReadySurb, Renewal, Stale};
use mixsocks_common::address::Address;
use mixsocks_common::gateway::delivery::Delivery;
use mixsocks_common::gateway::keepalive::{Due, Keepalive};
use mixsocks_common::gateway::message::StreamId;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::replay::{Admission, RecentTags};
use mixsocks_common::session::{AccessTokens, PresentedToken};
use mixsocks_common::topology::{Topology, UnixTime, check_route, random_route};
use mixsocks_provider::core::ProviderCore;
use mixsocks_sphinx::{HopAddress, Identifier, Packet, SecretKey, Surb, max_plaintext};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::codec::{Arrival, Codec, NodeKey, Opening, SealedRoute};
use crate::documents::Document;
use crate::faults::SleepingClock;
use crate::hostile;
use crate::network::{Frame, poll_frame};

/// SURBs that are made at a time, and how long that takes.
const SURBS_PER_TURN: usize = 8;
const SURB_WORK: Duration = Duration::from_millis(1);
const REPLAY_SPAN: Duration = Duration::from_secs(600);
const REPLAY_TAGS: usize = 1 << 20;
/// How often an endpoint that waits for its link looks after its sessions, as in the shells.
const RESERVE_LIMIT: Duration = Duration::from_secs(1);
/// Frames that may wait for the wire before the next packet is asked for.
const PULL_AHEAD: u32 = 16;

/// Share of the replies that a hostile provider makes up.
const LIES: f64 = 0.2;

/// What an endpoint has to do with access tokens.
#[derive(Clone, Default)]
pub(crate) struct Access {
    /// What the provider demands.
    pub(crate) demanded: Option<AccessTokens>,
    /// What a client shows.
    pub(crate) shown: Option<PresentedToken>,
}

/// What an endpoint is.
pub(crate) enum Role<C: Codec> {
    Provider(Box<ProviderCore>),
    Client(Box<ClientCore<C::Recovery>>),
}

/// A packet that is to be made.
pub(crate) enum Contents<'a, R> {
    /// Of this client, if it has one.
    ToProvider(&'a mut ClientCore<R>),
    /// Of the provider, on this SURB.
    Reply(Surb, Vec<u8>),
}

pub(crate) struct Endpoint<C: Codec> {
    pub(crate) number: usize,
    pub(crate) key: NodeKey,
    pub(crate) address: Address,
    /// Number of its gateway.
    pub(crate) gateway: usize,
    pub(crate) role: Role<C>,
    pub(crate) access: Access,
    pub(crate) connection: u64,
    pub(crate) is_connected: bool,
    sleep: Option<Sleep>,
    /// Frames that came while it slept, by connection: they wait in the socket.
    pub(crate) in_socket: Vec<(u64, Frame<Packet>)>,
    /// By how much its clock is behind that of the world: it stood still for so long.
    clock_lag: Duration,
    pub(crate) is_down: bool,
    /// Whether its provider lies to it now.
    pub(crate) is_lied_to: bool,
    pub(crate) clock_error_s: i64,
    rng: StdRng,
    tags: RecentTags,
    pub(crate) flow: Option<Flow>,
    free_at: Instant,
    making: Option<Making<C::Recovery>>,
    /// SURBs that were made and not answered; those that lead to nowhere.
    surbs_awaited: BTreeSet<Identifier>,
    surbs_dead: BTreeSet<Identifier>,
    document: (usize, Document),
    /// The one that the core has been told of.
    followed: Document,
    renewal: Renewal,
    /// The gateway of those to whom it sends.
    peer_gateway: Identity,
}

/// SURBs that are being made.
struct Making<R> {
    surbs: Vec<ReadySurb<R>>,
    done_at: Instant,
}

/// A machine that is suspended since some time of the world.
struct Sleep {
    since: Instant,
    clock: SleepingClock,
}

/// What outlives a connection.
pub(crate) struct Flow {
    pub(crate) delivery: Delivery<(HopAddress, Packet)>,
    received: u64,
    keepalive: Keepalive,
}

impl<C: Codec> Endpoint<C> {
    pub(crate) fn new(
        rng: &mut StdRng,
        now: Instant,
        wall_ms: u64,
        number: usize,
        document: &Document,
        [gateway, peer_gateway]: [Identity; 2],
        clock_error_ms: i64,
    ) -> Self {
        let identity = IdentityKey::generate(rng).identity();
        let key = SecretKey::generate(rng);
        let encryption = key.public_key().into();
        let topology = document;
        let wall_ms = wall_ms.saturating_add_signed(clock_error_ms);
        let wall = UnixTime(wall_ms / 1000);
        Self {
            number,
            key: NodeKey::lasting(*identity.as_bytes(), key, clock_error_ms),
            address: Address { identity, encryption, gateway },
            gateway: usize::from(number == 0),
            role: role(number, now, wall_ms, topology),
            access: Access::default(),
            connection: 0,
            is_connected: false,
            sleep: None,
            in_socket: Vec::new(),
            clock_lag: Duration::ZERO,
            is_down: false,
            is_lied_to: false,
            clock_error_s: 0,
            tags: RecentTags::new(now, REPLAY_SPAN, REPLAY_TAGS, rng),
            rng: StdRng::seed_from_u64(rng.random()),
            flow: None,
            free_at: now,
            making: None,
            surbs_awaited: BTreeSet::new(),
            surbs_dead: BTreeSet::new(),
            document: (0, document.clone()),
            followed: document.clone(),
            renewal: Renewal::new(document.clone(), gateway, vec![peer_gateway], now, wall),
            peer_gateway,
        }
    }

    /// The time by its own clock, which stood still while it slept.
    pub(crate) fn clock(&self, world_now: Instant) -> Instant {
        match &self.sleep {
            Some(Sleep { since, clock: SleepingClock::StandsStill }) => *since - self.clock_lag,
            _ => world_now - self.clock_lag,
        }
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.sleep.is_some()
    }

    pub(crate) fn fall_asleep(&mut self, world_now: Instant, clock: SleepingClock) {
        self.sleep.get_or_insert(Sleep { since: world_now, clock });
    }

    pub(crate) fn wake(&mut self, world_now: Instant) {
        let own_now = self.clock(world_now);
        self.sleep = None;
        self.clock_lag = world_now - own_now;
    }

    /// All SURBs that it has made so far lead to nowhere.
    pub(crate) fn lose_surbs(&mut self) {
        self.surbs_dead.append(&mut self.surbs_awaited);
    }

    /// It has forgotten everything but its keys and the document. Its clock says `wall_ms`.
    pub(crate) fn restart(&mut self, world_now: Instant, wall_ms: u64) {
        let now = self.clock(world_now);
        self.in_socket.clear();
        self.role = role(self.number, now, wall_ms, &self.document.1);
        self.take_access(world_now, self.access.clone());
        self.begin_renewal(now, wall_ms);
        self.tags = RecentTags::new(now, REPLAY_SPAN, REPLAY_TAGS, &mut self.rng);
        self.flow = None;
        self.making = None;
    }

    /// From now on it demands, or shows, these tokens.
    pub(crate) fn take_access(&mut self, world_now: Instant, access: Access) {
        let now = self.clock(world_now);
        match &mut self.role {
            Role::Provider(core) => core.set_access_tokens(now, access.demanded.clone()),
            Role::Client(core) => core.set_access_token(0, access.shown.clone()),
        }
        self.access = access;
    }

    /// Milliseconds since 1970 by its own clock.
    pub(crate) fn wall_ms(&self, right_ms: u64) -> u64 {
        right_ms.saturating_add_signed(1000 * self.clock_error_s + self.key.clock_error_ms)
    }

    // --- Documents.

    pub(crate) fn take_document(&mut self, number: usize, document: Document) {
        if number > self.document.0 {
            self.document = (number, document);
        }
    }

    /// Of the document that it has, a node's keys are others now; those that it gave away may be dead,
    /// but it is told so only if `is_told`.
    pub(crate) fn correct_document(
        &mut self,
        documents: &[Document],
        is_told: bool,
        world_now: Instant,
        right_ms: u64,
    ) {
        let now = self.clock(world_now);
        self.document.1 = documents[self.document.0].clone();
        if !is_told {
            self.begin_renewal(now, self.wall_ms(right_ms));
        }
    }

    fn begin_renewal(&mut self, now: Instant, wall_ms: u64) {
        let (own, peer) = (self.address.gateway, self.peer_gateway);
        let wall = UnixTime(wall_ms / 1000);
        self.renewal = Renewal::new(self.document.1.clone(), own, vec![peer], now, wall);
    }

    /// Follows the document and the clock. No headers are made ahead here.
    pub(crate) fn look(&mut self, world_now: Instant, right_ms: u64) {
        let now = self.clock(world_now);
        let wall = UnixTime(self.wall_ms(right_ms) / 1000);
        let Role::Client(core) = &mut self.role else { return };
        if !Arc::ptr_eq(&self.followed, &self.document.1) {
            self.followed = self.document.1.clone();
            core.follow(now, &self.followed, self.followed.parameters.mean_delay);
        }
        match self.renewal.handle(&self.document.1, now, wall, &mut self.rng) {
            Stale::Nothing | Stale::MadeAhead => {}
            Stale::SurbsSoon => core.replace_surbs(now),
            Stale::Surbs => core.renew_surbs(now),
        }
    }

    fn has_routes(&self, wall: UnixTime) -> bool {
        [&self.address.gateway, &self.peer_gateway]
            .into_iter()
            .all(|gateway| check_route(&self.document.1, gateway, wall).is_ok())
    }

    // --- The link to the gateway.

    pub(crate) fn resume(&self) -> Option<(StreamId, u64)> {
        self.flow.as_ref().map(|flow| (flow.delivery.stream(), flow.received))
    }

    pub(crate) fn welcome(
        &mut self,
        world_now: Instant,
        connection: u64,
        (stream, received): (StreamId, u64),
        packet_bytes: usize,
    ) -> Result<(), String> {
        let now = self.clock(world_now);
        let keepalive = Keepalive::new(now);
        match &mut self.flow {
            Some(flow) if flow.delivery.stream() == stream => {
                flow.delivery.resume(received).map_err(|error| error.to_string())?;
                flow.keepalive = keepalive;
            }
            Some(flow) => {
                flow.delivery.restart(stream);
                flow.received = 0;
                flow.keepalive = keepalive;
            }
            flow @ None => {
                let delivery = Delivery::new(stream, packet_bytes);
                *flow = Some(Flow { delivery, received: 0, keepalive });
            }
        }
        self.connection = connection;
        self.is_connected = true;
        if let Role::Client(core) = &mut self.role {
            core.path_is_back();
        }
        self.free_at = now;
        Ok(())
    }

    pub(crate) fn cut(&mut self, world_now: Instant) {
        let now = self.clock(world_now);
        self.is_connected = false;
        if let Some(flow) = &mut self.flow {
            flow.delivery.detach(now);
        }
    }

    /// Whether nothing was heard of the gateway for so long that the connection must be dead.
    pub(crate) fn is_link_silent(&self, world_now: Instant) -> bool {
        let now = self.clock(world_now);
        let flow = self.flow.as_ref().filter(|_| self.is_connected);
        flow.is_some_and(|flow| flow.keepalive.due(now) == Some(Due::Close))
    }

    pub(crate) fn handle_frame(
        &mut self,
        codec: &C,
        world_now: Instant,
        wall_ms: u64,
        frame: Frame<Packet>,
    ) -> Result<(), String> {
        let now = self.clock(world_now);
        let Some(flow) = &mut self.flow else { return Ok(()) };
        flow.delivery.confirm(frame.counter).map_err(|error| error.to_string())?;
        flow.keepalive.heard(now);
        let Some(packet) = frame.packet else { return Ok(()) };
        flow.received += 1;
        let Opening::Opened(tag, opened) = codec.open(&self.key, &(0..=0), packet) else {
            return Ok(());
        };
        if self.tags.insert(&tag, now) != Admission::Fresh {
            return Ok(());
        }
        if let Some(Arrival::Final { identifier, payload, .. }) = codec.finish(opened) {
            let wall_ms = self.wall_ms(wall_ms);
            self.handle_payload(codec, now, wall_ms, identifier, payload);
        }
        Ok(())
    }

    fn handle_payload(
        &mut self,
        codec: &C,
        now: Instant,
        wall_ms: u64,
        identifier: Identifier,
        payload: C::Payload,
    ) {
        // What the cores refuse is dropped, as in the shells.
        match &mut self.role {
            Role::Provider(core) => {
                if identifier == Identifier::default()
                    && let Some(contents) = codec.contents(payload)
                {
                    let _ = core.handle_packet(now, wall_ms, &contents);
                }
            }
            Role::Client(core) => {
                self.surbs_awaited.remove(&identifier);
                if self.surbs_dead.remove(&identifier) {
                    return;
                }
                if core.loop_came(now, &identifier) {
                    return;
                }
                if let Some(awaited) = core.take_awaited(&identifier)
                    && let Some(mut contents) = codec.recover(awaited.recovery, payload)
                {
                    // Only the provider can make what its SURB recovers: these are its words.
                    if self.is_lied_to && self.rng.random_bool(LIES) {
                        contents = hostile::reply(&mut self.rng, contents);
                    }
                    let _ = core.handle_reply(now, awaited.session, &awaited.way, &contents);
                }
            }
        }
    }

    // --- Time and packets.

    pub(crate) fn poll_timeout(&self, world_now: Instant, right_ms: u64) -> Option<Instant> {
        if self.is_suspended() {
            return None;
        }
        let now = self.clock(world_now);
        let wall = UnixTime(self.wall_ms(right_ms) / 1000);
        let has_routes = matches!(self.role, Role::Provider(_)) || self.has_routes(wall);
        let look = matches!(self.role, Role::Client(_)).then(|| self.renewal.poll_timeout());
        let core = match &self.role {
            Role::Provider(core) => core.poll_timeout(),
            Role::Client(core) => core.poll_timeout(),
        };
        let flow = self.flow.as_ref().filter(|_| self.is_connected);
        let keepalive = flow.map(|flow| flow.keepalive.poll_timeout());
        // Who is overdue wants to send. Without a connection it is looked after now and then; with
        // one it waits for the wire and for nothing else, so that on a free wire it spins.
        let can_send = flow.is_some() && has_routes;
        let waits_until = if can_send { self.free_at } else { now + RESERVE_LIMIT };
        let due = core.into_iter().chain(keepalive).min();
        let due = due.map(|at| if at > now { at } else { at.max(waits_until) });
        let making = self.making.as_ref().map(|making| making.done_at);
        let wire = (self.free_at > now).then_some(self.free_at);
        [due, making, wire, look].into_iter().flatten().min().map(|at| at + self.clock_lag)
    }

    pub(crate) fn handle_timeout(&mut self, world_now: Instant) {
        let now = self.clock(world_now);
        match &mut self.role {
            Role::Provider(core) => core.handle_timeout(now),
            Role::Client(core) => core.handle_timeout(now),
        }
    }

    /// SURBs are made while they are wanted, unless it `is_famine`.
    pub(crate) fn make_surbs(
        &mut self,
        codec: &C,
        world_now: Instant,
        right_ms: u64,
        is_famine: bool,
    ) {
        let now = self.clock(world_now);
        let wall = UnixTime(self.wall_ms(right_ms) / 1000);
        let has_routes = self.has_routes(wall);
        let topology = &self.document.1;
        let Role::Client(core) = &mut self.role else { return };
        if let Some(made) = self.making.take_if(|making| making.done_at <= now) {
            core.deliver_surbs(made.surbs.len(), made.surbs);
        }
        if self.making.is_some() || is_famine || !has_routes {
            return;
        }
        let mean = topology.parameters.mean_delay;
        let choice = core.route_choice();
        let surbs: Vec<_> = (0..core.claim_surbs(now, SURBS_PER_TURN))
            .map(|_| {
                let identifier = self.rng.random();
                let to = &self.address;
                let rng = &mut self.rng;
                let route = random_route(topology, to, wall, mean, identifier, &choice, rng)
                    .expect("there are routes");
                let sealed = SealedRoute { route: &route, recipient: to, topology, now: wall };
                let (surb, recovery) = codec.build_surb(&mut self.rng, &sealed);
                let way = Way::of(&route);
                self.surbs_awaited.insert(identifier);
                ReadySurb { surb, identifier, recovery, way, made: now, key_epoch: 0 }
            })
            .collect();
        if !surbs.is_empty() {
            self.making = Some(Making { surbs, done_at: now + SURB_WORK });
        }
    }

    /// The frames for the gateway that the wire has room for, and when each is on it.
    pub(crate) fn pull(
        &mut self,
        world_now: Instant,
        spacing: Duration,
        mut make: impl FnMut(
            &Topology,
            Instant,
            Contents<'_, C::Recovery>,
        ) -> Option<(HopAddress, Packet)>,
    ) -> Vec<(Instant, Frame<(HopAddress, Packet)>)> {
        let now = self.clock(world_now);
        let mut frames = Vec::new();
        let Some(flow) = self.flow.as_mut().filter(|_| self.is_connected) else { return frames };
        let mut contents = Vec::new();
        while self.free_at <= now + spacing * PULL_AHEAD {
            let held = flow.delivery.poll_transmit().cloned();
            if let Some(frame) = poll_frame(&mut flow.keepalive, now, flow.received, held) {
                self.free_at = self.free_at.max(now) + spacing;
                frames.push((self.free_at + self.clock_lag, frame));
                continue;
            }
            let packet = match &mut self.role {
                Role::Client(core) => {
                    if core.wants_transmit(now) {
                        make(&self.document.1, now, Contents::ToProvider(core))
                    } else {
                        None
                    }
                }
                Role::Provider(core) => match core.next_reply(now, &mut contents) {
                    Some(surb) => {
                        let reply = Contents::Reply(surb, std::mem::take(&mut contents));
                        match make(&self.document.1, now, reply) {
                            // A SURB that is of no use is no reason to stop.
                            None => continue,
                            packet => packet,
                        }
                    }
                    None => None,
                },
            };
            let Some(packet) = packet else { break };
            // A full delivery forgets an old packet for it.
            let _ = flow.delivery.push(packet, now);
        }
        frames
    }
}

fn role<C: Codec>(number: usize, now: Instant, wall_ms: u64, topology: &Topology) -> Role<C> {
    let max_contents_bytes = max_plaintext(topology.parameters.payload_bytes);
    let mean_delay = topology.parameters.mean_delay;
    if number == 0 {
        Role::Provider(Box::new(ProviderCore::new(wall_ms, max_contents_bytes, mean_delay)))
    } else {
        Role::Client(Box::new(ClientCore::new(topology, 1, now, max_contents_bytes, mean_delay)))
    }
}
