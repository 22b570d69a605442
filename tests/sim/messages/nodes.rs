//! What gateways and mixes do when something comes to them, and how packets get from one to the next.

use std::time::Duration;

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::keys::Identity;
use mixsocks_node::gateway::store::Store;
use mixsocks_sphinx::{HopAddress, Packet};
use rand::RngExt;

use super::client::sizes;
use super::gateway::{Down, Up};
use super::world::{CLIENTS, Event, GATEWAYS, Node, Reading, World};
use crate::codec::Codec;
use crate::world::WIRE;

/// Share of the packets that are held up where they enter the mixnet, of those that come twice to the next
/// node, and for how long at most.
const HELD_UP: f64 = 0.01;
const TWICE: f64 = 0.01;
const HELD_UP_FOR: Duration = Duration::from_secs(3);
/// Share of what a gateway reads and writes that takes long.
const SLOW_READS: f64 = 0.2;
const SLOW_WRITES: f64 = 0.05;
/// Share of the reads of a gateway that fail.
const READ_FAILS: f64 = 0.005;

impl<C: Codec> World<C> {
    pub(super) fn handle_up(
        &mut self,
        client: usize,
        connection: u64,
        received: u64,
        frames: Vec<Up>,
    ) -> Result<(), String> {
        let (name, number) = (self.clients[client].name(), self.clients[client].gateway);
        let asked = |frame: &Up| if let Up::Receive(number) = frame { Some(*number) } else { None };
        let asked: Vec<_> = frames.iter().filter_map(asked).collect();
        let gateway = &mut self.gateways[number];
        if gateway.has_connection(&name, connection) {
            for number in asked {
                self.asking.on_asked(client, number, gateway.kept(&name))?;
            }
        } else {
            self.asking.mishaps.lost_receives += asked.len();
        }
        for (mix, packet) in gateway.handle_frames(&name, connection, received, frames)? {
            self.enter(&mix, packet);
        }
        self.plan_writing(client);
        self.begin_commit(number);
        Ok(())
    }

    pub(super) fn plan_writing(&mut self, client: usize) {
        let at = &self.clients[client];
        if let Some(connection) = self.gateways[at.gateway].plan_writing(&at.name()) {
            self.after(Duration::ZERO, Event::Write { client, connection });
        }
    }

    pub(super) fn write(&mut self, client: usize, connection: u64) -> Result<(), String> {
        let at = &self.clients[client];
        let name = at.name();
        let gateway = &mut self.gateways[at.gateway];
        let (frames, request) = gateway.write(&name, connection, self.now);
        if let Some(request) = request {
            let took = self.draw_disk_time(SLOW_READS);
            let looks_after = took.mul_f64(self.rng.random());
            let read =
                Reading { client, connection, request, is_handled_after: took - looks_after };
            self.after(looks_after, Event::Read(read));
        }
        if frames.is_empty() {
            return Ok(());
        }
        for frame in &frames {
            if let Down::CaughtUp(number) = frame {
                self.asking.on_answered(client, *number)?;
            }
        }
        let at = &self.clients[client];
        let took = at.spacing * u32::try_from(frames.len()).expect("a few");
        if self.gateways[at.gateway].plan_writing(&name).is_some() {
            self.after(took, Event::Write { client, connection });
        }
        self.after(took + WIRE, Event::Down { client, connection, frames });
        Ok(())
    }

    /// A gateway's disk is looked at for a client.
    pub(super) fn read(&mut self, reading: Reading) {
        let Reading { client, connection, request, is_handled_after } = reading;
        let at = &self.clients[client];
        let store = &self.gateways[at.gateway].store;
        let found = store.deliveries(&at.name(), request.after, request.max);
        let found = found.ok().filter(|_| !self.rng.random_bool(READ_FAILS));
        self.after(is_handled_after, Event::HasRead { client, connection, found });
    }

    pub(super) fn has_read(&mut self, client: usize, connection: u64, found: Option<Vec<KeptBox>>) {
        let (now, at) = (self.now, &self.clients[client]);
        let gateway = &mut self.gateways[at.gateway];
        match gateway.handle_read(&at.name(), connection, now, found) {
            Some(retry_at) => self.after(retry_at - now, Event::ReadAgain(client)),
            None => self.plan_writing(client),
        }
    }

    /// Disks are fast, but for a share.
    fn draw_disk_time(&mut self, slow: f64) -> Duration {
        let most = if self.rng.random_bool(slow) { 300.0 } else { 10.0 };
        Duration::from_secs_f64(most * self.rng.random::<f64>() / 1e3)
    }

    fn begin_commit(&mut self, number: usize) {
        let gateway = &mut self.gateways[number];
        if gateway.commit.begin() {
            let life = gateway.life;
            let took = self.draw_disk_time(SLOW_WRITES);
            self.after(took, Event::Committed { gateway: number, life });
        }
    }

    pub(super) fn committed(&mut self, number: usize, life: u64) {
        let wall = self.wall();
        let gateway = &mut self.gateways[number];
        if gateway.life != life {
            return;
        }
        let (acks, wakes) = gateway.finish_commit(wall);
        for (surb, contents) in acks {
            if let Some((mix, packet)) = self.codec.use_surb(surb, &contents) {
                self.enter(&mix, packet);
            }
        }
        for client in wakes {
            self.plan_writing(client);
        }
        self.begin_commit(number);
    }

    pub(super) fn kill_gateway(&mut self, number: usize) -> Result<(), String> {
        if self.gateways[number].is_down {
            return Ok(());
        }
        self.note(format!("gateway {number} is killed"));
        let (wall, has_tags) = (self.wall(), self.rng.random_bool(0.8));
        self.gateways[number].kill(&mut self.rng, has_tags, wall);
        for client in (0..CLIENTS).filter(|client| client % GATEWAYS == number) {
            self.asking.on_crash(client);
            self.cut(client, true);
            self.settle_client(client)?;
        }
        Ok(())
    }

    // --- Packets.

    /// A packet enters the mixnet at a mix of the first layer, if it gets there.
    fn enter(&mut self, mix: &HopAddress, packet: Packet) {
        if self.rng.random_bool(self.loss) {
            return;
        }
        let Some(node) = self.nodes.get(mix).copied() else { return };
        let held_up = match self.rng.random_bool(HELD_UP) {
            true => HELD_UP_FOR.mul_f64(self.rng.random()),
            false => Duration::ZERO,
        };
        self.after(WIRE + held_up, Event::Arrive(node, packet));
    }

    /// A packet goes from mix to mix, or to a gateway.
    fn forward(&mut self, to: &Identity, packet: Packet) {
        let Some(node) = self.nodes.get(to.as_bytes()).copied() else { return };
        if self.rng.random_bool(TWICE) {
            let later = HELD_UP_FOR.mul_f64(self.rng.random());
            self.after(WIRE + later, Event::Arrive(node, packet.clone()));
        }
        self.after(WIRE, Event::Arrive(node, packet));
    }

    pub(super) fn arrive(&mut self, node: Node, packet: Packet) {
        let now = self.now;
        match node {
            Node::Mix(number) => {
                // Keys never change here, and a full mix drops.
                let all = 0..=u64::MAX;
                let _ = self.mixes[number].handle_packet(&self.codec, now, &all, packet);
                self.settle_mix(number);
            }
            Node::Gateway(number) => {
                let sizes = sizes(&self.document);
                let gateway = &mut self.gateways[number];
                if let Some(client) = gateway.handle_packet(&self.codec, sizes, now, packet) {
                    self.plan_writing(client);
                }
                self.begin_commit(number);
            }
        }
    }

    pub(super) fn settle_mix(&mut self, number: usize) {
        while let Some((to, packet)) = self.mixes[number].poll_transmit(self.now) {
            self.forward(&to, packet);
        }
        let Some(next) = self.mixes[number].poll_timeout() else { return };
        if self.mix_timers[number].is_none_or(|planned| next < planned) {
            self.mix_timers[number] = Some(next);
            self.after(next.saturating_duration_since(self.now), Event::MixTimer(number));
        }
    }
}
