//! Fifty clients, their gateways and the mixes, under one event queue, one fake clock and one generator.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::link::redial::FIRST_WAIT;
use mixsocks_common::message::{FailReason, ReceivedId, SenderTag};
use mixsocks_common::topology::{Epochs, LAYERS, Parameters, Role, UnixTime};
use mixsocks_node::gateway::ReadRequest;
use mixsocks_node::gateway::store::{Change, Limits, Store};
use mixsocks_sphinx::{HopAddress, Packet};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::client::Client;
use super::faults;
use super::gateway::{Down, Gateway, Up};
use super::model::{Fate, Kind, Model, Sent};
use super::receiving::Asking;
use crate::codec::{Codec, NodeKey, codec};
use crate::documents::{Document, Documents, Schedule};
use crate::faults::Memory;
use crate::network::Mix;
use crate::world::{PAYLOAD_BYTES, WALL_START_MS};

pub(crate) const CLIENTS: usize = 50;
pub(crate) const GATEWAYS: usize = 3;
const MIXES_PER_LAYER: usize = 2;
pub(crate) const MIXES: usize = MIXES_PER_LAYER * LAYERS;
const MEAN_DELAY: Duration = Duration::from_millis(15);
const MIX_PACKETS: usize = 3500;
/// Who is away for that long gives messages up.
const AWAY_FOR_LONG: Duration = Duration::from_secs(540);
/// Events at one moment, beyond which something spins.
const MAX_EVENTS_AT_ONCE: u32 = 100_000;
/// Lines of the trace that are kept.
const TRACE_LINES: usize = 60;

/// What can happen.
pub(crate) enum Event {
    /// A packet comes to a node.
    Arrive(Node, Packet),
    /// Frames come to a gateway, with what the client has received.
    Up {
        client: usize,
        connection: u64,
        received: u64,
        frames: Vec<Up>,
    },
    /// Frames come to a client.
    Down {
        client: usize,
        connection: u64,
        frames: Vec<Down>,
    },
    /// A client takes in what its link has read.
    TakeIn(usize),
    /// A client hears whether it is connected.
    FollowLink(usize),
    /// A gateway writes to a client.
    Write {
        client: usize,
        connection: u64,
    },
    /// A gateway's disk is looked at, and gives what was found; nothing when that fails.
    Read(Reading),
    HasRead {
        client: usize,
        connection: u64,
        found: Option<Vec<KeptBox>>,
    },
    /// A gateway may try again what it could not read for a client.
    ReadAgain(usize),
    /// A batch is on the disk of a gateway in its life of this number.
    Committed {
        gateway: usize,
        life: u64,
    },
    /// Something is due.
    MixTimer(usize),
    ClientTimer(usize),
    Dial(usize),
    /// An application sends a message, replies to one, or has taken one.
    Send {
        from: usize,
        to: usize,
        kind: Kind,
        length: usize,
    },
    Reply {
        from: usize,
        life: u32,
        to: usize,
        tag: SenderTag,
        length: usize,
    },
    Taken {
        client: usize,
        life: u32,
        received: ReceivedId,
    },
    /// From now on so large a share of the packets is lost.
    Loss(f64),
    KillGateway(usize),
    StartGateway(usize),
    DiskFull {
        gateway: usize,
        is_full: bool,
    },
    KillMix(usize),
    StartMix(usize),
    /// A connection breaks; its gateway may not notice. The next one may break soon.
    Cut {
        client: usize,
        is_noticed: bool,
        again_after: Option<Duration>,
    },
    /// A client takes nothing in for a while of what its link reads.
    BeBusy {
        client: usize,
        time: Duration,
    },
    /// A client asks its gateway anew for what that keeps.
    ReceiveAgain(usize),
    /// A client goes offline, or is killed.
    Leave {
        client: usize,
        is_killed: bool,
    },
    Return(usize),
}

/// What a gateway reads for a connection.
pub(crate) struct Reading {
    pub(super) client: usize,
    pub(super) connection: u64,
    pub(super) request: ReadRequest,
    /// How long after the disk was looked at the gateway has what was found.
    pub(super) is_handled_after: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Node {
    Mix(usize),
    Gateway(usize),
}

/// What a client has been through.
#[derive(Clone, Copy, Default)]
pub(super) struct Presence {
    pub(super) away_since: Option<Instant>,
    pub(super) has_left: bool,
    was_away_for_long: bool,
    /// When its next connection breaks.
    pub(super) next_breaks_after: Option<Duration>,
}

pub(crate) struct World<C: Codec> {
    pub(super) now: Instant,
    start: Instant,
    pub(super) rng: StdRng,
    pub(super) codec: C,
    pub(super) document: Document,
    /// By time, and a number that keeps the order of what is at one time.
    events: BTreeMap<(Instant, u64), Event>,
    serial: u64,
    pub(super) mixes: Vec<Mix>,
    pub(super) mix_timers: [Option<Instant>; MIXES],
    pub(super) gateways: Vec<Gateway>,
    pub(super) clients: Vec<Client<C>>,
    pub(super) client_timers: [Option<Instant>; CLIENTS],
    pub(super) presences: [Presence; CLIENTS],
    pub(super) nodes: BTreeMap<HopAddress, Node>,
    pub(super) connections: u64,
    pub(super) loss: f64,
    /// Gateways keep so little that messages may fail because of it.
    has_small_shares: bool,
    pub(crate) model: Model,
    pub(crate) asking: Asking,
    trace: VecDeque<String>,
    at_once: u32,
}

impl<C: Codec> World<C> {
    /// All that the seed plans.
    pub(crate) fn new(seed: u64) -> Self {
        Self::with_plan(seed, faults::draw)
    }

    /// What `plan` has happen, and nothing else; each event with its time.
    pub(crate) fn with_plan(
        seed: u64,
        plan: impl FnOnce(&mut StdRng) -> Vec<(Duration, Event)>,
    ) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let rng = &mut rng;
        let start = Instant::now();
        let parameters = Parameters {
            payload_bytes: PAYLOAD_BYTES,
            mean_delay: MEAN_DELAY,
            max_delay: Duration::from_secs(10),
            epochs: Epochs::STATIC,
        };
        let mut node_keys: Vec<(Identity, NodeKey)> = (0..GATEWAYS + MIXES)
            .map(|_| {
                let identity = IdentityKey::generate(rng).identity();
                (identity, NodeKey::new(*identity.as_bytes(), 0))
            })
            .collect();
        let mut listed: Vec<_> =
            node_keys.iter_mut().map(|(identity, key)| (*identity, key)).collect();
        let mut documents = Documents::new(Schedule::lasting(), parameters, roles());
        let document = documents.publish(rng, WALL_START_MS, WALL_START_MS, &mut listed);
        let has_small_shares = rng.random_bool(0.2);
        let limits = match has_small_shares {
            true => Limits { client_boxes: rng.random_range(20..200), ..Limits::default() },
            false => Limits::default(),
        };
        let mix_keys = node_keys.split_off(GATEWAYS);
        let gateways: Vec<_> = node_keys
            .into_iter()
            .map(|(identity, key)| Gateway::new(rng, &document, identity, key, limits))
            .collect();
        let mixes: Vec<_> = mix_keys
            .into_iter()
            .map(|(identity, key)| Mix::new(rng, &document, identity, key, MIX_PACKETS))
            .collect();
        let gateway_names =
            gateways.iter().enumerate().map(|(n, gateway)| (gateway.key.address, Node::Gateway(n)));
        let mix_names = mixes.iter().enumerate().map(|(n, mix)| (mix.key.address, Node::Mix(n)));
        let nodes = gateway_names.chain(mix_names).collect();
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let gateway = number % GATEWAYS;
                let wall = UnixTime(WALL_START_MS / 1000);
                let at = (gateway, gateways[gateway].identity);
                Client::new(rng, (start, wall), &document, at)
            })
            .collect();
        for client in &clients {
            let token = TokenHash::from_bytes([1; 32]);
            let registered = Change::Register { client: client.name(), token };
            let store = &gateways[client.gateway].store;
            store.apply(&[registered], UnixTime(0)).expect("it works");
        }
        let plan = plan(rng);
        let mut world = Self {
            now: start,
            start,
            rng: StdRng::seed_from_u64(rng.random()),
            codec: codec(&parameters),
            document,
            events: BTreeMap::new(),
            serial: 0,
            mixes,
            mix_timers: [None; MIXES],
            gateways,
            clients,
            client_timers: [None; CLIENTS],
            presences: [Presence::default(); CLIENTS],
            nodes,
            connections: 0,
            loss: 0.0,
            has_small_shares,
            model: Model::default(),
            asking: Asking::new(),
            trace: VecDeque::new(),
            at_once: 0,
        };
        for client in 0..CLIENTS {
            world.after(Duration::ZERO, Event::Dial(client));
        }
        for (after, event) in plan {
            world.after(after, event);
        }
        world
    }

    // --- Time.

    pub(super) fn after(&mut self, after: Duration, event: Event) {
        self.serial += 1;
        self.events.insert((self.now + after, self.serial), event);
    }

    pub(super) fn wall(&self) -> UnixTime {
        UnixTime(WALL_START_MS / 1000 + (self.now - self.start).as_secs())
    }

    /// Plays until `end`; an error says what went wrong.
    pub(crate) fn play(&mut self, end: Duration) -> Result<(), String> {
        while let Some(next) = self.events.first_entry()
            && next.key().0 <= self.start + end
        {
            let ((at, _), event) = next.remove_entry();
            self.at_once = if at > self.now { 0 } else { self.at_once + 1 };
            if self.at_once > MAX_EVENTS_AT_ONCE {
                return Err("something spins".to_owned());
            }
            self.now = at;
            self.handle(event)?;
        }
        self.now = self.start + end;
        Ok(())
    }

    /// What is left when all is quiet.
    pub(crate) fn check_end(&self) -> Result<(), String> {
        let presence = |client: usize| self.presences[client];
        let may_fail = |sent: &Sent| {
            // The last SURB may be lost that could have asked for more.
            let of_reply = sent.kind == Kind::Reply
                && (sent.fate == Fate::Failed(FailReason::NoSurbs)
                    || presence(sent.from).has_left
                    || presence(sent.to).has_left);
            self.has_small_shares || of_reply || presence(sent.from).was_away_for_long
        };
        self.model.check_end(may_fail)?;
        for (number, gateway) in self.gateways.iter().enumerate() {
            let usage = gateway.store.usage();
            if usage.boxes > 0 || usage.bytes > 0 {
                return Err(format!("gateway {number} keeps what nobody confirms: {usage:?}"));
            }
        }
        for (number, client) in self.clients.iter().enumerate() {
            let counts = client.core.counts();
            let (incomplete, complete, held_bytes, _) = counts.incoming;
            if (counts.outgoing.0, incomplete, complete, held_bytes) != (0, 0, 0, 0) {
                return Err(format!("client {number} is not done: {counts:?}"));
            }
            if client.believes_answered().is_none() {
                return Err(format!("client {number} was never told that it has all"));
            }
        }
        Ok(())
    }

    // --- What is told when a seed fails.

    pub(super) fn note(&mut self, line: String) {
        if self.trace.len() == TRACE_LINES {
            self.trace.pop_front();
        }
        let at = self.now - self.start;
        self.trace.push_back(format!("{:>10.3} s  {line}", at.as_secs_f64()));
    }

    pub(crate) fn trace(&self) -> String {
        Vec::from(self.trace.clone()).join("\n")
    }

    // --- Events.

    fn handle(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Arrive(node, packet) => self.arrive(node, packet),
            Event::Up { client, connection, received, frames } => {
                return self.handle_up(client, connection, received, frames);
            }
            Event::Down { client, connection, frames } => {
                return self.handle_down(client, connection, frames);
            }
            Event::TakeIn(client) => return self.take_in(client),
            Event::FollowLink(client) => {
                self.clients[client].follow_link(self.now);
                return self.settle_client(client);
            }
            Event::Write { client, connection } => return self.write(client, connection),
            Event::Read(reading) => self.read(reading),
            Event::HasRead { client, connection, found } => {
                self.has_read(client, connection, found);
            }
            Event::ReadAgain(client) => self.plan_writing(client),
            Event::Committed { gateway, life } => self.committed(gateway, life),
            Event::MixTimer(mix) => {
                if self.mix_timers[mix] == Some(self.now) {
                    self.mix_timers[mix] = None;
                    self.settle_mix(mix);
                }
            }
            Event::ClientTimer(client) => {
                if self.client_timers[client] == Some(self.now) {
                    self.client_timers[client] = None;
                    return self.settle_client(client);
                }
            }
            Event::Dial(client) => return self.dial(client),
            Event::Send { from, to, kind, length } => return self.send(from, to, kind, length),
            Event::Reply { from, life, to, tag, length } => {
                if self.clients[from].life == life {
                    return self.reply(from, to, tag, length);
                }
            }
            Event::Taken { client, life, received } => {
                if self.clients[client].life == life {
                    self.clients[client].core.taken(received);
                    return self.settle_client(client);
                }
            }
            fault => return self.change(fault),
        }
        Ok(())
    }

    fn change(&mut self, fault: Event) -> Result<(), String> {
        match fault {
            Event::Loss(share) => {
                self.note(format!("{share:.3} of all packets are lost"));
                self.loss = share;
            }
            Event::KillGateway(gateway) => return self.kill_gateway(gateway),
            Event::StartGateway(gateway) => {
                self.note(format!("gateway {gateway} is back"));
                self.gateways[gateway].is_down = false;
            }
            Event::DiskFull { gateway, is_full } => {
                self.note(format!("the disk of gateway {gateway} is full: {is_full}"));
                let store = &self.gateways[gateway].store;
                store.is_disk_full.store(is_full, std::sync::atomic::Ordering::Relaxed);
            }
            Event::KillMix(mix) => self.mixes[mix].is_down = true,
            Event::StartMix(mix) => {
                let memory = if self.rng.random() { Memory::Tags } else { Memory::Nothing };
                self.mixes[mix].restart(&mut self.rng, memory);
            }
            Event::Cut { client, is_noticed, again_after } => {
                self.presences[client].next_breaks_after = again_after;
                self.cut(client, is_noticed);
                return self.settle_client(client);
            }
            Event::BeBusy { client, time } => {
                self.clients[client].be_busy(self.now + time);
                self.after(time, Event::TakeIn(client));
            }
            Event::ReceiveAgain(client) => {
                self.clients[client].receive_again(self.now);
                return self.settle_client(client);
            }
            Event::Leave { client, is_killed } => return self.leave(client, is_killed),
            Event::Return(client) => {
                self.note(format!("client {client} is back"));
                let presence = &mut self.presences[client];
                let since = presence.away_since.take();
                let is_long = since.is_some_and(|since| self.now >= since + AWAY_FOR_LONG);
                presence.was_away_for_long |= is_long;
                self.clients[client].is_running = true;
                self.after(FIRST_WAIT / 2, Event::Dial(client));
            }
            _ => unreachable!("nothing else changes the world"),
        }
        Ok(())
    }
}

/// Gateways, and the mixes of each layer.
fn roles() -> Vec<Role> {
    let gateways = (1..)
        .take(GATEWAYS)
        .map(|port| Role::Gateway { client_address: ([127, 0, 0, 1], port).into() });
    let mixes = (1..)
        .take(LAYERS)
        .flat_map(|layer| std::iter::repeat_n(Role::Mix { layer }, MIXES_PER_LAYER));
    gateways.chain(mixes).collect()
}
