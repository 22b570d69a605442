//! Clients and the provider of the simulation: their real cores, and what their shells do around
//! them.

use std::time::{Duration, Instant};

use mixsocks_client::ReadySurb;
use mixsocks_client::core::ClientCore;
use mixsocks_common::address::Address;
use mixsocks_common::gateway::delivery::Delivery;
use mixsocks_common::gateway::keepalive::{Due, Keepalive};
use mixsocks_common::gateway::message::StreamId;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::replay::{Admission, RecentTags};
use mixsocks_common::session::frame::{Ack, CloseReason, Frame as SessionFrame};
use mixsocks_common::topology::{Topology, random_route};
use mixsocks_provider::core::{MAX_HELD_BYTES, ProviderCore};
use mixsocks_sphinx::{HopAddress, Identifier, Packet, SecretKey, Surb, max_plaintext};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::codec::{Arrival, Codec, NodeKey};
use crate::network::{Frame, poll_frame};
use crate::world::PAYLOAD_BYTES;

/// SURBs that are made at a time, and how long that takes.
const SURBS_PER_TURN: usize = 8;
const SURB_WORK: Duration = Duration::from_millis(1);
const REPLAY_SPAN: Duration = Duration::from_secs(600);
const REPLAY_TAGS: usize = 1 << 20;
/// Frames that may wait for the wire before the next packet is asked for.
const PULL_AHEAD: u32 = 16;

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
    pub(crate) connection: u64,
    pub(crate) is_connected: bool,
    pub(crate) is_suspended: bool,
    pub(crate) is_down: bool,
    pub(crate) clock_error_s: i64,
    rng: StdRng,
    tags: RecentTags,
    flow: Option<Flow>,
    free_at: Instant,
    /// SURBs that are being made, and when they are.
    making: Option<(usize, Instant)>,
}

/// What outlives a connection.
struct Flow {
    delivery: Delivery<(HopAddress, Packet)>,
    received: u64,
    keepalive: Keepalive,
}

impl<C: Codec> Endpoint<C> {
    pub(crate) fn new(
        rng: &mut StdRng,
        now: Instant,
        wall_ms: u64,
        number: usize,
        topology: &Topology,
        gateway: Identity,
    ) -> Self {
        let identity = IdentityKey::generate(rng).identity();
        let key = SecretKey::generate(rng);
        let encryption = key.public_key().into();
        Self {
            number,
            key: NodeKey::new(*identity.as_bytes(), key),
            address: Address { identity, encryption, gateway },
            gateway: usize::from(number == 0),
            role: role(number, wall_ms, topology),
            connection: 0,
            is_connected: false,
            is_suspended: false,
            is_down: false,
            clock_error_s: 0,
            tags: RecentTags::new(now, REPLAY_SPAN, REPLAY_TAGS, rng),
            rng: StdRng::seed_from_u64(rng.random()),
            flow: None,
            free_at: now,
            making: None,
        }
    }

    /// It has forgotten everything but its keys.
    pub(crate) fn restart(&mut self, now: Instant, wall_ms: u64, topology: &Topology) {
        self.role = role(self.number, wall_ms, topology);
        self.tags = RecentTags::new(now, REPLAY_SPAN, REPLAY_TAGS, &mut self.rng);
        self.flow = None;
        self.making = None;
    }

    /// Milliseconds since 1970 by its own clock.
    pub(crate) fn wall_ms(&self, right_ms: u64) -> u64 {
        right_ms.saturating_add_signed(1000 * self.clock_error_s)
    }

    // --- The link to the gateway.

    pub(crate) fn resume(&self) -> Option<(StreamId, u64)> {
        self.flow.as_ref().map(|flow| (flow.delivery.stream(), flow.received))
    }

    pub(crate) fn welcome(
        &mut self,
        now: Instant,
        connection: u64,
        (stream, received): (StreamId, u64),
    ) -> Result<(), String> {
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
                let delivery = Delivery::new(stream, PAYLOAD_BYTES);
                *flow = Some(Flow { delivery, received: 0, keepalive });
            }
        }
        self.connection = connection;
        self.is_connected = true;
        self.free_at = now;
        Ok(())
    }

    pub(crate) fn cut(&mut self, now: Instant) {
        self.is_connected = false;
        if let Some(flow) = &mut self.flow {
            flow.delivery.detach(now);
        }
    }

    /// Whether nothing was heard of the gateway for so long that the connection must be dead.
    pub(crate) fn is_link_silent(&self, now: Instant) -> bool {
        let flow = self.flow.as_ref().filter(|_| self.is_connected);
        flow.is_some_and(|flow| flow.keepalive.due(now) == Some(Due::Close))
    }

    pub(crate) fn handle_frame(
        &mut self,
        codec: &C,
        now: Instant,
        wall_ms: u64,
        frame: Frame<Packet>,
    ) -> Result<(), String> {
        let Some(flow) = &mut self.flow else { return Ok(()) };
        flow.delivery.confirm(frame.counter).map_err(|error| error.to_string())?;
        flow.keepalive.heard(now);
        let Some(packet) = frame.packet else { return Ok(()) };
        flow.received += 1;
        let Some((tag, opened)) = codec.open(&self.key, packet) else { return Ok(()) };
        if self.tags.insert(&tag, now) != Admission::Fresh {
            return Ok(());
        }
        if let Some(Arrival::Final { identifier, payload }) = codec.finish(opened) {
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
                if let Some(awaited) = core.take_awaited(&identifier)
                    && let Some(contents) = codec.recover(awaited.recovery, payload)
                {
                    let _ = core.handle_reply(now, awaited.session, awaited.delay, &contents);
                }
            }
        }
    }

    // --- Time and packets.

    pub(crate) fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        if self.is_suspended {
            return None;
        }
        let core = match &self.role {
            Role::Provider(core) => core.poll_timeout(),
            Role::Client(core) => core.poll_timeout(),
        };
        // A core that is overdue wants to send: it waits for the wire, or for a connection.
        let core = core.map(|at| if at > now { at } else { self.free_at.max(now + SURB_WORK) });
        let flow = self.flow.as_ref().filter(|_| self.is_connected);
        let keepalive = flow.map(|flow| flow.keepalive.poll_timeout());
        let making = self.making.map(|(_, at)| at);
        let wire = (self.free_at > now).then_some(self.free_at);
        [core, keepalive, making, wire].into_iter().flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        match &mut self.role {
            Role::Provider(core) => core.handle_timeout(now),
            Role::Client(core) => core.handle_timeout(now),
        }
    }

    /// SURBs are made while they are wanted.
    pub(crate) fn make_surbs(&mut self, codec: &C, now: Instant, topology: &Topology) {
        let Role::Client(core) = &mut self.role else { return };
        if let Some((claimed, _)) = self.making.take_if(|(_, at)| *at <= now) {
            let made = (0..claimed)
                .map(|_| {
                    let identifier = self.rng.random();
                    let mean = topology.parameters.mean_delay;
                    let route =
                        random_route(topology, &self.address, mean, identifier, &mut self.rng)
                            .expect("its gateway is in the topology");
                    let (surb, recovery) = codec.build_surb(&mut self.rng, &route);
                    let delay = route.total_delay();
                    ReadySurb { surb, identifier, recovery, delay, made: now }
                })
                .collect();
            core.deliver_surbs(claimed, made);
        }
        if self.making.is_none() {
            let claimed = core.claim_surbs(now, SURBS_PER_TURN);
            self.making = (claimed > 0).then_some((claimed, now + SURB_WORK));
        }
    }

    /// The frames for the gateway that the wire has room for, and when each is on it.
    pub(crate) fn pull(
        &mut self,
        now: Instant,
        spacing: Duration,
        mut make: impl FnMut(Contents<'_, C::Recovery>) -> Option<(HopAddress, Packet)>,
    ) -> Vec<(Instant, Frame<(HopAddress, Packet)>)> {
        let mut frames = Vec::new();
        let Some(flow) = self.flow.as_mut().filter(|_| self.is_connected) else { return frames };
        let mut contents = Vec::new();
        loop {
            while let Some(frame) = {
                let packet = flow.delivery.poll_transmit().cloned();
                poll_frame(&mut flow.keepalive, now, flow.received, packet)
            } {
                self.free_at = self.free_at.max(now) + spacing;
                frames.push((self.free_at, frame));
            }
            if self.free_at > now + spacing * PULL_AHEAD {
                return frames;
            }
            let packet = match &mut self.role {
                Role::Client(core) => {
                    if core.wants_transmit(now) {
                        make(Contents::ToProvider(core))
                    } else {
                        None
                    }
                }
                Role::Provider(core) => match core.next_reply(now, &mut contents) {
                    Some(surb) => {
                        match make(Contents::Reply(surb, std::mem::take(&mut contents))) {
                            // A SURB that is of no use is no reason to stop.
                            None => continue,
                            packet => packet,
                        }
                    }
                    None => None,
                },
            };
            let Some(packet) = packet else { return frames };
            // A full delivery forgets an old packet for it.
            let _ = flow.delivery.push(packet, now);
        }
    }

    pub(crate) fn check_bounds(&self) -> Result<(), String> {
        match &self.role {
            Role::Provider(core) if core.held_bytes() > MAX_HELD_BYTES + (64 << 20) => {
                Err(format!("the provider holds {} bytes", core.held_bytes()))
            }
            _ => Ok(()),
        }
    }
}

fn role<C: Codec>(number: usize, wall_ms: u64, topology: &Topology) -> Role<C> {
    let max_contents_bytes = max_plaintext(topology.parameters.payload_bytes);
    let mean_delay = topology.parameters.mean_delay;
    if number == 0 {
        Role::Provider(Box::new(ProviderCore::new(wall_ms, max_contents_bytes, mean_delay)))
    } else {
        Role::Client(Box::new(ClientCore::new(max_contents_bytes, mean_delay)))
    }
}

/// Contents that begin like those of a session and go on with anything.
pub(crate) fn nonsense(rng: &mut StdRng, wall_ms: u64) -> Vec<u8> {
    let mut out = vec![rng.random_range(0..4)];
    // Some sessions are hit twice.
    out.extend_from_slice(&[rng.random_range(0..5); 16]);
    out.push(rng.random_range(0..64));
    out.push(0);
    if rng.random() {
        SessionFrame::Start { time_ms: wall_ms, key_agreement: &[] }.encode(&mut out);
    }
    let surbs = [[9; 396]];
    for _ in 0..rng.random_range(0..20) {
        let bits = rng.random_range(1..40);
        let number = rng.random_range(0..1 << bits);
        let stream = 1 + rng.random_range(0..100);
        let frame = match rng.random_range(0..12) {
            0 => SessionFrame::Open { stream, target: "nowhere.test:1".parse().expect("good") },
            1 => SessionFrame::Data { stream, offset: number, fin: rng.random(), bytes: b"bytes" },
            2 => {
                let ranges = std::iter::once(number..number + 5).collect();
                SessionFrame::Ack(Ack {
                    latest: number,
                    delay_us: number,
                    first: number,
                    end: number + 9,
                    settled: number + 3,
                    ranges,
                })
            }
            3 => SessionFrame::Credit { stream, limit: number },
            4 => SessionFrame::Reset { stream },
            5 => SessionFrame::Surbs { generation: number, surbs: &surbs },
            6 => SessionFrame::Close(CloseReason::Full),
            7 => SessionFrame::Stock { generation: 0, count: number },
            8 => {
                out.push(rng.random());
                continue;
            }
            9 => SessionFrame::Data { stream, offset: 0, fin: false, bytes: b"first bytes" },
            _ => SessionFrame::Ping,
        };
        frame.encode(&mut out);
    }
    out.truncate(max_plaintext(PAYLOAD_BYTES));
    out
}
