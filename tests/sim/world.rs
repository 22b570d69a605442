//! The whole network under one event queue, one fake clock and one generator.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_client::core::Pulled;
use mixsocks_client::health::Way;
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::session::SessionId;
use mixsocks_common::topology::{LAYERS, Parameters, Role, UnixTime, random_route};
use mixsocks_sphinx::{HEADER_LEN, Identifier, Packet};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::access::Access;
use crate::codec::{Codec, NodeKey, SealedRoute, codec};
use crate::damage::{Start, Weather};
use crate::documents::{Documents, Schedule, roles};
use crate::endpoint::{self, Endpoint, Role as EndpointRole};
use crate::faults::{self, Fault, Planned, Shape};
use crate::model::{End, Stream};
use crate::network::{Frame, Gateway, Inbox, Mix, Outdated};

pub(crate) const PAYLOAD_BYTES: usize = 2048;
pub(crate) const PACKET_BYTES: usize = HEADER_LEN + PAYLOAD_BYTES;
/// One way between two machines.
pub(crate) const WIRE: Duration = Duration::from_millis(2);
/// From one packet to the next on every wire, unless it is narrowed.
const SPACING: Duration = Duration::from_micros(150);
/// Packets that wait for a wire; a further one is dropped, or waits at its sender.
const WIRE_QUEUE: u32 = 64;
/// From a cut to the next try.
const RECONNECT: Duration = Duration::from_millis(300);
/// Milliseconds since 1970 when a simulation begins.
pub(crate) const WALL_START_MS: u64 = 1_700_000_000_000;
/// Events at one moment, beyond which something spins.
const MAX_EVENTS_AT_ONCE: u32 = 100_000;
/// Lines of the trace that are kept.
const TRACE_LINES: usize = 60;

/// What can happen.
pub(crate) enum Event {
    /// A packet comes to a mix or gateway.
    Arrive(NodeRef, Packet),
    /// A frame comes to a gateway.
    Up {
        endpoint: usize,
        connection: u64,
        frame: Frame<([u8; 32], Packet)>,
    },
    /// A frame comes to an endpoint.
    Down {
        endpoint: usize,
        connection: u64,
        frame: Frame<Packet>,
    },
    /// Something is due at a node.
    Timer(NodeRef),
    /// An endpoint dials its gateway.
    Dial(usize),
    /// A program or target may have something to do.
    App(usize, End),
    /// A program opens a stream.
    Open(usize),
    /// A target has answered the provider.
    Dialled(usize),
    FaultBegins(usize),
    FaultEnds(usize),
    /// A document for the epoch at a time in milliseconds since 1970 is published.
    Publish(u64),
    /// A document comes to somebody.
    Document(NodeRef, usize),
    /// The hostile endpoint sends something.
    Attack,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum NodeRef {
    Mix(usize),
    Gateway(usize),
    Endpoint(usize),
}

struct Timed {
    at: Instant,
    serial: u64,
    event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

/// A simulated network.
pub(crate) struct World<C: Codec> {
    pub(crate) now: Instant,
    pub(crate) start: Instant,
    pub(crate) rng: StdRng,
    pub(crate) codec: C,
    pub(crate) documents: Documents,
    /// What nodes do unless a fault changes it, gateways first.
    pub(crate) first_roles: Vec<Role>,
    /// Packets that were dropped because the keys or nodes that they were made for do not count any more.
    pub(crate) outdated: u64,
    events: BinaryHeap<Reverse<Timed>>,
    serial: u64,
    timers: BTreeMap<NodeRef, Instant>,
    pub(crate) mixes: Vec<Mix>,
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) endpoints: Vec<Endpoint<C>>,
    nodes: BTreeMap<[u8; 32], NodeRef>,
    wires: BTreeMap<(NodeRef, NodeRef), Instant>,
    pub(crate) streams: Vec<Stream>,
    pub(crate) access: Access,
    pub(crate) faults: Vec<Planned>,
    pub(crate) weather: Weather,
    pub(crate) max_held_packets: usize,
    pub(crate) seen: VecDeque<(NodeRef, Packet)>,
    trace: VecDeque<String>,
    pub(crate) packets_built: u64,
    /// Of all sessions that clients began.
    pub(crate) starts: BTreeMap<SessionId, Start>,
    /// When the provider last forgot everything, and the latest of its starts by its own clock.
    pub(crate) provider_restarted: Option<Instant>,
    /// When it last took its tokens back.
    pub(crate) tokens_removed: Option<Instant>,
    pub(crate) provider_started_ms: u64,
    /// Events so far.
    pub(crate) happened: u64,
    at_once: u32,
}

/// What goes on in a run.
pub(crate) struct Scenario {
    pub(crate) streams: Vec<Stream>,
    pub(crate) clients: usize,
    pub(crate) mixes_per_layer: usize,
    pub(crate) mean_delay: Duration,
    pub(crate) schedule: Schedule,
    /// What each mix may hold.
    pub(crate) mix_packets: usize,
    pub(crate) access: Access,
    pub(crate) faults: Vec<Planned>,
}

impl<C: Codec> World<C> {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let clients = rng.random_range(1..=3);
        let mixes_per_layer = rng.random_range(1..=3);
        let mixes = LAYERS * mixes_per_layer;
        let shape = Shape { mixes, mixes_per_layer, gateways: 2, endpoints: 1 + clients };
        let streams = rng.random_range(1..=12);
        let scenario = Scenario {
            streams: (0..streams).map(|number| Stream::draw(&mut rng, number, clients)).collect(),
            clients,
            mixes_per_layer,
            mean_delay: Duration::from_millis(
                *[0, 5, 15, 15, 15, 60].get(rng.random_range(0..6)).expect("one of six"),
            ),
            schedule: Schedule::draw(&mut rng),
            // Far more than senders need, or so few that some are dropped.
            mix_packets: if rng.random_bool(0.8) { 3500 } else { rng.random_range(20..200) },
            access: Access::draw(&mut rng, clients),
            faults: faults::draw(&mut rng, &shape),
        };
        Self::with(rng, scenario)
    }

    pub(crate) fn with(mut rng: StdRng, scenario: Scenario) -> Self {
        let start = Instant::now();
        let schedule = scenario.schedule;
        let parameters = Parameters {
            payload_bytes: PAYLOAD_BYTES,
            mean_delay: scenario.mean_delay,
            max_delay: Duration::from_secs(10),
            epochs: schedule.epochs,
        };
        let first_roles = roles(scenario.mixes_per_layer);
        let mut node_keys: Vec<_> = first_roles
            .iter()
            .map(|_| {
                let identity = IdentityKey::generate(&mut rng).identity();
                let clock_error_ms = schedule.clock_error_ms(&mut rng);
                (identity, NodeKey::new(*identity.as_bytes(), clock_error_ms))
            })
            .collect();
        let mut documents = Documents::new(schedule, parameters, first_roles.clone());
        let mut listed: Vec<_> =
            node_keys.iter_mut().map(|(identity, key)| (*identity, key)).collect();
        let document = documents.publish(&mut rng, WALL_START_MS, WALL_START_MS, &mut listed);
        let mix_keys = node_keys.split_off(2);
        let own_gateways = [node_keys[0].0, node_keys[1].0];
        let gateways: Vec<_> = node_keys
            .into_iter()
            .map(|(identity, key)| Gateway::new(&mut rng, &document, identity, key))
            .collect();
        let mixes: Vec<_> = mix_keys
            .into_iter()
            .map(|(identity, key)| {
                Mix::new(&mut rng, &document, identity, key, scenario.mix_packets)
            })
            .collect();
        let gateway_refs = (0..2).map(|n| (gateways[n].key.address, NodeRef::Gateway(n)));
        let mix_refs = mixes.iter().enumerate().map(|(n, mix)| (mix.key.address, NodeRef::Mix(n)));
        let nodes = gateway_refs.chain(mix_refs).collect();
        // The provider has the second gateway, clients the first.
        let mut endpoints: Vec<Endpoint<C>> = (0..=scenario.clients)
            .map(|number| {
                let [first, second] = own_gateways;
                let gateways = if number == 0 { [second, first] } else { [first, second] };
                let error_ms = schedule.clock_error_ms(&mut rng);
                Endpoint::new(&mut rng, start, WALL_START_MS, number, &document, gateways, error_ms)
            })
            .collect();
        let access = scenario.access;
        let provider = endpoints[0].address.encryption;
        for (number, endpoint) in endpoints.iter_mut().enumerate() {
            let tokens = match number {
                0 => endpoint::Access { demanded: access.demanded(&provider), shown: None },
                _ => endpoint::Access { demanded: None, shown: access.shown(number, &provider) },
            };
            endpoint.take_access(start, tokens);
        }
        let provider_started_ms = endpoints[0].wall_ms(WALL_START_MS);
        let mut world = Self {
            now: start,
            start,
            codec: codec(&parameters),
            rng,
            documents,
            first_roles,
            outdated: 0,
            events: BinaryHeap::new(),
            serial: 0,
            timers: BTreeMap::new(),
            mixes,
            gateways,
            endpoints,
            nodes,
            wires: BTreeMap::new(),
            streams: scenario.streams,
            access,
            faults: scenario.faults,
            weather: Weather::default(),
            max_held_packets: scenario.mix_packets,
            seen: VecDeque::new(),
            trace: VecDeque::new(),
            packets_built: 0,
            starts: BTreeMap::new(),
            provider_restarted: None,
            tokens_removed: None,
            provider_started_ms,
            happened: 0,
            at_once: 0,
        };
        for number in 0..world.endpoints.len() {
            world.at(start, Event::Dial(number));
        }
        for number in 0..world.streams.len() {
            world.at(start + world.streams[number].opens_at, Event::Open(number));
        }
        for number in 0..world.streams.len() {
            for end in [End::Program, End::Target] {
                let plan = world.streams[number].plan(end);
                let times = [Some(plan.silent_until), plan.leaves_at];
                for at in times.into_iter().flatten() {
                    world.at(start + at, Event::App(number, end));
                }
            }
        }
        world.plan_next_document();
        for number in 0..world.faults.len() {
            let during = world.faults[number].during.clone();
            world.at(start + during.start, Event::FaultBegins(number));
            world.at(start + during.end, Event::FaultEnds(number));
        }
        world
    }

    // --- Time.

    pub(crate) fn at(&mut self, at: Instant, event: Event) {
        self.serial += 1;
        self.events.push(Reverse(Timed { at, serial: self.serial, event }));
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// Milliseconds since 1970, as a right clock tells.
    pub(crate) fn wall_ms(&self) -> u64 {
        WALL_START_MS + u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Lets the next thing happen; `false` when nothing will before `until`.
    pub(crate) fn step(&mut self, until: Duration) -> Result<bool, String> {
        let until = self.start + until;
        let Some(Reverse(next)) = self.events.peek() else { return Ok(false) };
        if next.at > until {
            self.now = until;
            return Ok(false);
        }
        let Some(Reverse(Timed { at, event, .. })) = self.events.pop() else { return Ok(false) };
        self.at_once = if at > self.now { 0 } else { self.at_once + 1 };
        if self.at_once > MAX_EVENTS_AT_ONCE {
            return Err(format!("something spins at {:?}", self.elapsed()));
        }
        self.now = self.now.max(at);
        self.happened += 1;
        self.handle(event)?;
        self.check_bounds()?;
        Ok(true)
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Arrive(node, packet) => self.arrive(node, packet)?,
            Event::Up { endpoint, connection, frame } => {
                self.handle_up(endpoint, connection, frame)?
            }
            Event::Down { endpoint, connection, frame } => {
                self.handle_down(endpoint, connection, frame)?;
            }
            Event::Timer(node) => self.handle_timer(node)?,
            Event::Dial(endpoint) => self.dial(endpoint)?,
            Event::App(stream, end) => self.run_app(stream, end)?,
            Event::Open(stream) => self.open_stream(stream)?,
            Event::Dialled(stream) => self.dialled(stream)?,
            Event::FaultBegins(number) => self.change_fault(number, true)?,
            Event::FaultEnds(number) => self.change_fault(number, false)?,
            Event::Publish(epoch_ms) => {
                self.publish(epoch_ms);
                self.plan_next_document();
            }
            Event::Document(party, number) => self.deliver(party, number)?,
            Event::Attack => self.attack(),
        }
        Ok(())
    }

    /// Asks a node when it wants to be called, and sees to that.
    pub(crate) fn reschedule(&mut self, node: NodeRef) {
        let due = match node {
            NodeRef::Mix(n) => self.mixes[n].poll_timeout(),
            NodeRef::Gateway(n) => {
                self.gateways[n].clients.values().filter_map(Inbox::poll_timeout).min()
            }
            NodeRef::Endpoint(n) => self.endpoints[n].poll_timeout(self.now, self.wall_ms()),
        };
        let Some(due) = due else { return };
        let due = due.max(self.now);
        if self.timers.get(&node).is_none_or(|at| due < *at) {
            self.timers.insert(node, due);
            self.at(due, Event::Timer(node));
        }
    }

    fn handle_timer(&mut self, node: NodeRef) -> Result<(), String> {
        // Only the earliest one counts; it has been replaced if this is not it.
        if self.timers.get(&node).is_none_or(|at| *at > self.now) {
            return Ok(());
        }
        self.timers.remove(&node);
        match node {
            NodeRef::Mix(n) => {
                while let Some((next, packet)) = self.mixes[n].poll_transmit(self.now) {
                    self.send(node, next.as_bytes(), packet);
                }
            }
            NodeRef::Gateway(n) => {
                let endpoints: Vec<_> =
                    self.gateways[n].clients.values().map(|inbox| inbox.endpoint).collect();
                for inbox in self.gateways[n].clients.values_mut() {
                    inbox.handle_timeout(self.now);
                }
                for endpoint in endpoints {
                    self.flush_down(endpoint);
                }
            }
            NodeRef::Endpoint(n) => {
                if self.endpoints[n].is_link_silent(self.now) {
                    self.cut(n);
                }
                if !self.endpoints[n].is_suspended() {
                    self.endpoints[n].handle_timeout(self.now);
                    self.settle(n)?;
                }
            }
        }
        self.reschedule(node);
        Ok(())
    }

    // --- Wires.

    /// Sends a packet from a node to the next one, through the weather.
    pub(crate) fn send(&mut self, from: NodeRef, to: &[u8; 32], packet: Packet) {
        let Some(&to) = self.nodes.get(to) else { return };
        let enters = matches!((from, to), (NodeRef::Gateway(_), NodeRef::Mix(_)));
        if enters && self.weather.loss > 0.0 && self.rng.random_bool(self.weather.loss) {
            return;
        }
        let spacing = self.weather.spacing.unwrap_or(SPACING);
        let free_at = self.wires.entry((from, to)).or_insert(self.now);
        let leaves = (*free_at).max(self.now);
        if leaves > self.now + spacing * WIRE_QUEUE {
            return;
        }
        *free_at = leaves + spacing;
        let mut at = leaves + WIRE;
        let (share, longest) = self.weather.delay;
        if share > 0.0 && self.rng.random_bool(share) {
            at += longest.mul_f64(self.rng.random());
        }
        let packet = self.spoil(packet);
        if self.weather.hostile {
            self.seen.push_back((to, packet.clone()));
            if self.seen.len() > 100 {
                self.seen.pop_front();
            }
        }
        if self.weather.duplication > 0.0 && self.rng.random_bool(self.weather.duplication) {
            self.at(at + WIRE, Event::Arrive(to, packet.clone()));
        }
        self.at(at, Event::Arrive(to, packet));
    }

    fn spoil(&mut self, packet: Packet) -> Packet {
        if self.weather.corruption == 0.0 || !self.rng.random_bool(self.weather.corruption) {
            return packet;
        }
        let mut bytes = packet.into_bytes();
        let at = self.rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << self.rng.random_range(0..8);
        Packet::from_bytes(bytes, PAYLOAD_BYTES).expect("as long as before")
    }

    fn arrive(&mut self, node: NodeRef, packet: Packet) -> Result<(), String> {
        let counting = |world: &Self, key: &NodeKey| {
            let wall_ms = world.wall_ms().saturating_add_signed(key.clock_error_ms);
            world.documents.schedule.counting(wall_ms)
        };
        let taken = match node {
            NodeRef::Mix(n) => {
                let count = counting(self, &self.mixes[n].key);
                let taken = self.mixes[n].handle_packet(&self.codec, self.now, &count, packet);
                taken.map(|()| None)
            }
            NodeRef::Gateway(n) => {
                let count = counting(self, &self.gateways[n].key);
                self.gateways[n].handle_packet(&self.codec, self.now, &count, packet)
            }
            NodeRef::Endpoint(_) => return Err("packets come to endpoints in frames".to_owned()),
        };
        match taken {
            Ok(Some(endpoint)) => self.flush_down(endpoint),
            Ok(None) => {}
            Err(Outdated) => self.on_outdated(node)?,
        }
        self.reschedule(node);
        Ok(())
    }

    /// Sends the frames that a gateway has for an endpoint.
    fn flush_down(&mut self, endpoint: usize) {
        let gateway = self.endpoints[endpoint].gateway;
        let address = self.endpoints[endpoint].key.address;
        let spacing = self.weather.spacing.unwrap_or(SPACING);
        let mut sent = Vec::new();
        if let Some(inbox) = self.gateways[gateway].clients.get_mut(&address) {
            loop {
                inbox.waits_for_wire = inbox.free_at > self.now + spacing * WIRE_QUEUE;
                if inbox.waits_for_wire {
                    break;
                }
                let Some(frame) = inbox.poll_frame(self.now) else { break };
                inbox.free_at = inbox.free_at.max(self.now) + spacing;
                sent.push((inbox.free_at + WIRE, inbox.connection.unwrap_or(0), frame));
            }
        }
        for (at, connection, frame) in sent {
            self.at(at, Event::Down { endpoint, connection, frame });
        }
        self.reschedule(NodeRef::Gateway(gateway));
    }

    /// Lets an endpoint send what its link has room for.
    pub(crate) fn flush_up(&mut self, endpoint: usize) {
        let spacing = self.weather.spacing.unwrap_or(SPACING);
        let provider = self.endpoints[0].address;
        let own_address = self.endpoints[endpoint].address;
        let wall = UnixTime(self.endpoints[endpoint].wall_ms(self.wall_ms()) / 1000);
        let Self { endpoints, rng, codec, now, packets_built, .. } = self;
        let frames = endpoints[endpoint].pull(*now, spacing, |topology, own_now, contents| {
            *packets_built += 1;
            match contents {
                crate::endpoint::Contents::ToProvider(core) => {
                    let mean = topology.parameters.mean_delay;
                    let mut choice = core.route_choice();
                    let mut out = Vec::new();
                    let wish = core.next_loop(own_now);
                    let (to, identifier) = match wish {
                        Some(wish) => {
                            core.loop_taken(own_now, wish);
                            choice.through = wish.through;
                            (&own_address, rng.random())
                        }
                        None => (&provider, Identifier::default()),
                    };
                    let route =
                        random_route(topology, to, wall, mean, identifier, &choice, rng).ok()?;
                    let way = Way::of(&route);
                    match wish {
                        Some(wish) => core.loop_sent(own_now, wish, identifier, way),
                        None => {
                            let pulled = core.next_packet(own_now, |_| Some(way), &mut out);
                            if pulled == Pulled::Nothing {
                                return None;
                            }
                        }
                    }
                    let sealed = SealedRoute { route: &route, recipient: to, topology, now: wall };
                    Some((route.first_hop(), codec.build(rng, &sealed, &out)))
                }
                crate::endpoint::Contents::Reply(surb, contents) => codec.use_surb(surb, &contents),
            }
        });
        let connection = self.endpoints[endpoint].connection;
        for (at, frame) in frames {
            self.at(at + WIRE, Event::Up { endpoint, connection, frame });
        }
        self.reschedule(NodeRef::Endpoint(endpoint));
    }

    fn handle_up(
        &mut self,
        endpoint: usize,
        connection: u64,
        frame: Frame<([u8; 32], Packet)>,
    ) -> Result<(), String> {
        let gateway = self.endpoints[endpoint].gateway;
        let address = self.endpoints[endpoint].key.address;
        let Some(inbox) = self.gateways[gateway].clients.get_mut(&address) else { return Ok(()) };
        if inbox.connection != Some(connection) {
            self.hang_up(endpoint, connection);
            return Ok(());
        }
        inbox.delivery.confirm(frame.counter).map_err(|error| error.to_string())?;
        inbox.keepalive.heard(self.now);
        if let Some((next_hop, packet)) = frame.packet {
            inbox.received += 1;
            let is_cut_off = self.weather.blackout && endpoint != 0;
            match self.gateways[gateway].next_hops.resolve(&next_hop) {
                Ok(_) if is_cut_off => {}
                Ok(_) => self.send(NodeRef::Gateway(gateway), &next_hop, packet),
                Err(_) => self.on_outdated(NodeRef::Gateway(gateway))?,
            }
        }
        self.flush_down(endpoint);
        Ok(())
    }

    /// A gateway gets something on a connection that it has closed: it says so.
    fn hang_up(&mut self, endpoint: usize, connection: u64) {
        let at_endpoint = &self.endpoints[endpoint];
        if at_endpoint.is_connected && at_endpoint.connection == connection {
            self.cut(endpoint);
        }
    }

    fn handle_down(
        &mut self,
        endpoint: usize,
        connection: u64,
        frame: Frame<Packet>,
    ) -> Result<(), String> {
        let (now, wall_ms) = (self.now, self.wall_ms());
        let target = &mut self.endpoints[endpoint];
        if !target.is_connected || target.connection != connection {
            return Ok(());
        }
        if target.is_suspended() {
            target.in_socket.push((connection, frame));
            return Ok(());
        }
        target.handle_frame(&self.codec, now, wall_ms, frame)?;
        self.settle(endpoint)
    }

    fn dial(&mut self, endpoint: usize) -> Result<(), String> {
        let gateway = self.endpoints[endpoint].gateway;
        if self.endpoints[endpoint].is_connected || self.endpoints[endpoint].is_suspended() {
            return Ok(());
        }
        let is_cut = self.active().any(|fault| matches!(fault, Fault::Cut(n) if *n == endpoint));
        if self.gateways[gateway].is_down || self.endpoints[endpoint].is_down || is_cut {
            self.at(self.now + RECONNECT, Event::Dial(endpoint));
            return Ok(());
        }
        self.serial += 1;
        let connection = self.serial;
        let packet_bytes = PACKET_BYTES;
        let target = &mut self.endpoints[endpoint];
        let welcome = self.gateways[gateway].attach(
            &mut self.rng,
            self.now,
            (endpoint, target.key.address),
            connection,
            target.resume(),
            packet_bytes,
        );
        target.welcome(self.now, connection, welcome, packet_bytes)?;
        self.note(format!("endpoint {endpoint} is connected"));
        self.flush_down(endpoint);
        self.settle(endpoint)
    }

    pub(crate) fn cut(&mut self, endpoint: usize) {
        let gateway = self.endpoints[endpoint].gateway;
        let address = self.endpoints[endpoint].key.address;
        if let Some(inbox) = self.gateways[gateway].clients.get_mut(&address) {
            inbox.connection = None;
            inbox.delivery.detach(self.now);
        }
        self.endpoints[endpoint].cut(self.now);
        self.at(self.now + RECONNECT, Event::Dial(endpoint));
        self.note(format!("endpoint {endpoint} is cut off"));
    }

    // --- For checks, and for whoever reads of a failure.

    pub(crate) fn note(&mut self, line: String) {
        if self.trace.len() >= TRACE_LINES {
            self.trace.pop_front();
        }
        let at = self.elapsed().as_secs_f64();
        self.trace.push_back(format!("{at:9.4} {line}"));
    }

    /// What happened last, for whoever has to find out why.
    pub(crate) fn trace(&self) -> String {
        let faults: Vec<_> = self.faults.iter().map(|planned| format!("{planned:?}")).collect();
        let lines: Vec<_> = self.trace.iter().map(String::as_str).collect();
        format!(
            "{:?}\nfaults:\n  {}\nlast events:\n  {}",
            self.access,
            faults.join("\n  "),
            lines.join("\n  ")
        )
    }

    /// Sessions that clients have, and that the provider has.
    pub(crate) fn sessions(&self) -> (u64, u64) {
        let mut counts = (0, 0);
        for endpoint in &self.endpoints {
            match &endpoint.role {
                EndpointRole::Client(core) => counts.0 += core.sessions().len() as u64,
                EndpointRole::Provider(core) => counts.1 = core.session_count() as u64,
            }
        }
        counts
    }

    /// Whether the provider may have sessions whose clients do not know of them, or do not know that its
    /// SURBs lead to nowhere.
    pub(crate) fn may_have_orphans(&self) -> bool {
        self.faults.iter().any(|planned| {
            matches!(
                planned.fault,
                Fault::ClientDown(_)
                    | Fault::Hostile
                    | Fault::TokensRemoved
                    | Fault::HostileProvider(_)
                    | Fault::NewKey(_, false)
                    | Fault::MixKilled(_)
            )
        })
    }

    /// Whether packets are lost after the last fault, too.
    pub(crate) fn is_lossy_for_good(&self) -> bool {
        self.faults.iter().any(|planned| matches!(planned.fault, Fault::MixKilled(_)))
    }

    pub(crate) fn provider(&mut self) -> &mut mixsocks_provider::core::ProviderCore {
        match &mut self.endpoints[0].role {
            EndpointRole::Provider(core) => core,
            EndpointRole::Client(_) => unreachable!("endpoint 0 is the provider"),
        }
    }
}
