//! What clients do when something comes to them, and how their connections begin and end.

use std::time::{Duration, Instant};

use mixsocks_common::link::redial::FIRST_WAIT;
use mixsocks_common::topology::UnixTime;
use rand::RngExt;
use rand::rngs::StdRng;

use super::client::Network;
use super::gateway::Down;
use super::world::{Event, World};
use crate::codec::Codec;
use crate::documents::Document;
use crate::world::{PACKET_BYTES, WIRE};

/// Until a client dials again, after the shortest wait of links.
const REDIAL: Duration = Duration::from_millis(500);
/// How long it takes at most, nearly always, until a client hears of its link.
const USUALLY_HEARS: Duration = Duration::from_micros(100);

impl<C: Codec> World<C> {
    /// Frames come to a client's link, if it is there still.
    pub(super) fn handle_down(
        &mut self,
        client: usize,
        connection: u64,
        frames: Vec<Down>,
    ) -> Result<(), String> {
        let at = &mut self.clients[client];
        if at.connection != Some(connection) {
            let is_answer = |frame: &&Down| matches!(frame, Down::CaughtUp(_));
            self.asking.mishaps.lost_answers += frames.iter().filter(is_answer).count();
            return Ok(());
        }
        at.read(frames);
        self.take_in(client)
    }

    /// A client takes in what its link has read, unless it is busy.
    pub(super) fn take_in(&mut self, number: usize) -> Result<(), String> {
        let now = self.now;
        while let Some(frame) = self.clients[number].poll_arrived(now) {
            if let Down::Delivery(kept) = &frame {
                self.asking.on_delivered(number, kept.number);
            }
            let is_late = self.clients[number].handle_frame(&self.codec, now, frame);
            self.asking.mishaps.late_answers += usize::from(is_late);
            self.check_belief(number)?;
        }
        self.settle_client(number)
    }

    /// Whoever believes that it has all has it.
    fn check_belief(&mut self, client: usize) -> Result<(), String> {
        let at = &self.clients[client];
        let Some(number) = at.believes_answered() else { return Ok(()) };
        let (name, store) = (at.name(), &self.gateways[at.gateway].store);
        self.asking.check_belief(client, number, |number| store.keeps(&name, number))
    }

    /// What a client's shell uses of the world.
    pub(super) fn network<'a>(
        (codec, topology, rng): (&'a C, &'a Document, &'a mut StdRng),
        now: Instant,
        wall: UnixTime,
    ) -> Network<'a, C> {
        Network { codec, topology, now, wall, rng }
    }

    /// Does what a client's shell does after something has happened.
    pub(super) fn settle_client(&mut self, number: usize) -> Result<(), String> {
        let (now, wall) = (self.now, self.wall());
        let core = &mut self.clients[number].core;
        core.handle_clock(now, wall);
        if core.poll_timeout(now).is_some_and(|at| at <= now) {
            core.handle_timeout(now);
            if core.poll_timeout(now).is_some_and(|at| at <= now) {
                return Err(format!("a deadline of client {number} survives its handling"));
            }
        }
        self.clients[number].settle(now);
        while let Some(event) = self.clients[number].core.poll_event() {
            self.tell(number, event)?;
        }
        let client = &mut self.clients[number];
        let mut network = Self::network((&self.codec, &self.document, &mut self.rng), now, wall);
        if let Some(connection) = client.connection.filter(|_| client.wire_free_at <= now) {
            client.refill(&mut network);
            if let Some(frames) = client.frames(&mut network) {
                let took = client.spacing * u32::try_from(frames.len().max(1)).expect("a few");
                client.wire_free_at = now + took;
                let received = client.received;
                let up = Event::Up { client: number, connection, received, frames };
                self.after(took + WIRE, up);
            }
        }
        self.clients[number].check_bounds()?;
        self.check_belief(number)?;
        self.plan_client(number);
        Ok(())
    }

    /// Plans when a client is due next.
    fn plan_client(&mut self, number: usize) {
        let (now, client) = (self.now, &self.clients[number]);
        let timeout = client.core.poll_timeout(now);
        let is_waiting = client.connection.is_some() && client.wire_free_at > now;
        let wire = is_waiting.then_some(client.wire_free_at);
        let Some(next) = timeout.into_iter().chain(wire).min() else { return };
        if self.client_timers[number].is_none_or(|planned| next < planned) {
            self.client_timers[number] = Some(next);
            self.after(next - now, Event::ClientTimer(number));
        }
    }

    pub(super) fn dial(&mut self, client: usize) -> Result<(), String> {
        let at = &mut self.clients[client];
        // What was planned before the last cut comes too early: that cut has planned to dial as well.
        let is_early = at.connection.is_some() || at.knows_connection;
        if is_early || self.presences[client].away_since.is_some() {
            return Ok(());
        }
        let gateway = &mut self.gateways[at.gateway];
        if gateway.is_down {
            let wait = REDIAL.mul_f64(1.0 + self.rng.random::<f64>());
            self.after(wait, Event::Dial(client));
            return Ok(());
        }
        self.connections += 1;
        let (now, name, resume) = (self.now, (client, at.name()), at.resume());
        let connection = self.connections;
        let stream = gateway.attach(&mut self.rng, now, name, connection, resume, PACKET_BYTES);
        self.asking.on_connected(client);
        at.welcome(now, connection, stream);
        self.plan_follow_link(client);
        if let Some(after) = self.presences[client].next_breaks_after.take() {
            let is_noticed = self.rng.random();
            self.after(after, Event::Cut { client, is_noticed, again_after: None });
        }
        self.plan_writing(client);
        self.settle_client(client)
    }

    pub(super) fn cut(&mut self, client: usize, is_noticed: bool) {
        let at = &mut self.clients[client];
        if at.connection.is_none() {
            return;
        }
        at.cut();
        if is_noticed {
            self.gateways[at.gateway].detach(&at.name(), self.now);
        }
        self.plan_follow_link(client);
        let wait = FIRST_WAIT / 2 + REDIAL.mul_f64(self.rng.random());
        self.after(wait, Event::Dial(client));
    }

    /// A client hears of its link before that dials again.
    fn plan_follow_link(&mut self, client: usize) {
        let most = if self.rng.random_bool(0.9) { USUALLY_HEARS } else { FIRST_WAIT / 2 };
        let wait = most.mul_f64(self.rng.random::<f64>());
        self.after(wait, Event::FollowLink(client));
    }

    pub(super) fn leave(&mut self, client: usize, is_killed: bool) -> Result<(), String> {
        self.note(format!("client {client} leaves, killed: {is_killed}"));
        let is_noticed = self.rng.random();
        self.cut(client, is_noticed);
        let presence = &mut self.presences[client];
        presence.away_since.get_or_insert(self.now);
        presence.has_left = true;
        if is_killed {
            let wall = self.wall();
            self.clients[client].kill(self.now, wall, &mut self.rng);
            self.model.on_killed(client);
        }
        self.settle_client(client)
    }
}
