//! The applications of clients: they send, reply, and take what comes.

use std::time::Duration;

use mixsocks_common::address::Address;
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::message::{MessageEvent, Sender, SenderTag};
use rand::RngExt;

use super::model::{Fate, Kind, draw_length};
use super::world::{Event, World};
use crate::codec::Codec;

/// Share of the messages that are taken at once, within the first time, and of those that are replied to
/// soon; for the others it takes up to the second.
const SOON_SHARE: f64 = 0.95;
const TAKEN_WITHIN: [f64; 2] = [3.0, 300.0];
const REPLIED_SHARE: f64 = 0.8;
const REPLIED_WITHIN: [f64; 2] = [5.0, 300.0];

impl<C: Codec> World<C> {
    pub(super) fn send(
        &mut self,
        from: usize,
        to: usize,
        kind: Kind,
        length: usize,
    ) -> Result<(), String> {
        if !self.clients[from].is_running {
            return Ok(());
        }
        let (now, wall) = (self.now, self.wall());
        let (number, message) = self.model.next(kind, length);
        // The keys of somebody that nobody knows.
        let stranger = IdentityKey::generate(&mut self.rng).identity();
        let (recipient, to) = match kind {
            Kind::ToStranger => {
                (Address { identity: stranger, ..self.clients[to].address }, usize::MAX)
            }
            _ => (self.clients[to].address, to),
        };
        let count = if let Kind::Anonymous(count) = kind { count } else { 0 };
        let mut network = Self::network((&self.codec, &self.document, &mut self.rng), now, wall);
        let client = &mut self.clients[from];
        let surbs = client.make_surbs(&mut network, count);
        let sent = client.core.send(now, network.rng, recipient, &message, surbs);
        let id = sent.map_err(|error| format!("message {number} is not taken in: {error}"))?;
        self.model.on_sent(id, now, (from, client.life, to), kind, &message);
        self.note(format!("{from} sends {number}, {length} bytes, to {to}, {kind:?}"));
        self.settle_client(from)
    }

    pub(super) fn reply(
        &mut self,
        from: usize,
        to: usize,
        tag: SenderTag,
        length: usize,
    ) -> Result<(), String> {
        let (number, message) = self.model.next(Kind::Reply, length);
        let client = &mut self.clients[from];
        let sent = client.core.reply(self.now, &mut self.rng, tag, &message);
        let id = sent.map_err(|error| format!("reply {number} is not taken in: {error}"))?;
        self.model.on_sent(id, self.now, (from, client.life, to), Kind::Reply, &message);
        self.note(format!("{from} replies to {to} with {number}, {length} bytes"));
        self.settle_client(from)
    }

    pub(super) fn tell(&mut self, client: usize, event: MessageEvent) -> Result<(), String> {
        match event {
            MessageEvent::Received { received, message, sender } => {
                let number = self.model.on_received(client, &received, &message)?;
                let address = |client: usize| self.clients[client].address;
                self.model.check_sender(number, &sender, address)?;
                self.note(format!("{client} gets {number}"));
                let at = &mut self.clients[client];
                at.write_down(received);
                let life = at.life;
                if let Sender::Anonymous(tag) = sender {
                    self.plan_replies(client, self.model.sent[number].from, tag);
                }
                let wait = self.draw_wait(SOON_SHARE, TAKEN_WITHIN);
                self.after(wait, Event::Taken { client, life, received });
                Ok(())
            }
            MessageEvent::Delivered(id) => {
                self.model.on_outcome(self.now, client, &id, Fate::Delivered)
            }
            MessageEvent::Failed(id, reason) => {
                self.note(format!("{client} is told that {id:?} has failed: {reason:?}"));
                self.model.on_outcome(self.now, client, &id, Fate::Failed(reason))
            }
        }
    }

    fn plan_replies(&mut self, from: usize, to: usize, tag: SenderTag) {
        let life = self.clients[from].life;
        for _ in 0..self.rng.random_range(0..=2) {
            let length = draw_length(&mut self.rng);
            let wait = self.draw_wait(REPLIED_SHARE, REPLIED_WITHIN);
            self.after(wait, Event::Reply { from, life, to, tag, length });
        }
    }

    fn draw_wait(&mut self, share: f64, [soon, late]: [f64; 2]) -> Duration {
        let most = if self.rng.random_bool(share) { soon } else { late };
        Duration::from_secs_f64(most * self.rng.random::<f64>())
    }
}
