//! Mixes and gateways of the simulation: their real cores, and what their shells do around them.

use std::collections::BTreeMap;
use std::time::Instant;

use mixsocks_common::gateway::delivery::Delivery;
use mixsocks_common::gateway::keepalive::{Due, Keepalive};
use mixsocks_common::gateway::message::StreamId;
use mixsocks_common::keys::Identity;
use mixsocks_common::replay::{Admission, ReplayFilter};
use mixsocks_common::topology::Topology;
use mixsocks_node::counters::DropReason;
use mixsocks_node::link::NextHops;
use mixsocks_node::mix::MixCore;
use mixsocks_sphinx::{HopAddress, Packet, Peeled};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::codec::{Arrival, Codec, KeyEpochs, NodeKey, Opening};
use crate::documents::Document;
use crate::faults::Memory;

pub(crate) const REPLAY_TAGS: usize = 1 << 20;

/// A frame between an endpoint and its gateway.
pub(crate) struct Frame<P> {
    /// PACKET frames that its sender has received.
    pub(crate) counter: u64,
    /// `None` is a PAD.
    pub(crate) packet: Option<P>,
}

pub(crate) struct Mix {
    pub(crate) key: NodeKey,
    pub(crate) identity: Identity,
    pub(crate) core: MixCore,
    max_held_bytes: usize,
    tags: ReplayFilter,
    pub(crate) is_down: bool,
    document: (usize, Document),
}

impl Mix {
    pub(crate) fn new(
        rng: &mut StdRng,
        document: &Document,
        identity: Identity,
        key: NodeKey,
        max_held_packets: usize,
    ) -> Self {
        let max_held_bytes = max_held_packets * document.packet_bytes();
        let core = MixCore::new(document, &identity, max_held_bytes);
        let tags = ReplayFilter::new(REPLAY_TAGS, rng);
        let document = (0, document.clone());
        Self { key, identity, core, max_held_bytes, tags, is_down: false, document }
    }

    /// A new document; where it changes who may send to whom, what is held is lost.
    pub(crate) fn take_document(&mut self, number: usize, document: &Document) {
        let (known, before) = &self.document;
        if number <= *known {
            return;
        }
        if !have_same_roles(before, document) {
            self.core = MixCore::new(document, &self.identity, self.max_held_bytes);
        }
        self.document = (number, document.clone());
    }

    /// It comes back with what it remembers.
    pub(crate) fn restart(&mut self, rng: &mut StdRng, memory: Memory) {
        if memory != Memory::All {
            self.core = MixCore::new(&self.document.1, &self.identity, self.max_held_bytes);
        }
        if memory == Memory::Nothing {
            self.tags = ReplayFilter::new(REPLAY_TAGS, rng);
        }
        self.is_down = false;
    }

    /// Replays under the old key are no danger to the new one.
    pub(crate) fn renew_key(&mut self, rng: &mut StdRng) {
        self.key.renew();
        self.tags = ReplayFilter::new(REPLAY_TAGS, rng);
    }

    /// What it passes on now.
    pub(crate) fn poll_transmit(&mut self, now: Instant) -> Option<(Identity, Packet)> {
        if self.is_down { None } else { self.core.poll_transmit(now) }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        if self.is_down { None } else { self.core.poll_timeout() }
    }

    /// Keys of the key epochs `count`.
    pub(crate) fn handle_packet<C: Codec>(
        &mut self,
        codec: &C,
        now: Instant,
        count: &KeyEpochs,
        packet: Packet,
    ) -> Result<(), Outdated> {
        if self.is_down {
            return Ok(());
        }
        if let Some(Arrival::Forward { next_hop, delay, packet }) =
            peel(codec, &self.key, count, &mut self.tags, packet)?
        {
            // A full mix drops what would leave last.
            let peeled = Peeled::Forward { next_hop, delay, packet };
            if let Err(DropReason::WrongLayer | DropReason::UnknownNextHop) =
                self.core.handle_peeled(now, peeled)
            {
                return Err(Outdated);
            }
        }
        Ok(())
    }
}

/// A packet was made for a key that does not count, or for a node that is not there any more.
pub(crate) struct Outdated;

pub(crate) fn peel<C: Codec>(
    codec: &C,
    key: &NodeKey,
    count: &KeyEpochs,
    tags: &mut ReplayFilter,
    packet: Packet,
) -> Result<Option<Arrival<C>>, Outdated> {
    match codec.open(key, count, packet) {
        Opening::Opened(tag, opened) if tags.insert(&tag) == Admission::Fresh => {
            Ok(codec.finish(opened))
        }
        Opening::Opened(..) | Opening::Unreadable => Ok(None),
        Opening::Outdated => Err(Outdated),
    }
}

fn have_same_roles(one: &Topology, other: &Topology) -> bool {
    let roles = |topology: &Topology| -> Vec<_> {
        topology.nodes().iter().map(|node| (node.identity, node.role)).collect()
    };
    roles(one) == roles(other)
}

pub(crate) struct Gateway {
    pub(crate) key: NodeKey,
    pub(crate) identity: Identity,
    /// Number of the newest document that it has.
    document: usize,
    pub(crate) next_hops: NextHops,
    tags: ReplayFilter,
    pub(crate) is_down: bool,
    /// By identity, as packets name them.
    pub(crate) clients: BTreeMap<HopAddress, Inbox>,
}

/// What a gateway holds for one endpoint.
pub(crate) struct Inbox {
    pub(crate) endpoint: usize,
    pub(crate) connection: Option<u64>,
    pub(crate) delivery: Delivery<Packet>,
    pub(crate) received: u64,
    pub(crate) keepalive: Keepalive,
    /// When the last frame is on the wire.
    pub(crate) free_at: Instant,
    /// Whether the wire was full when it was asked for frames.
    pub(crate) waits_for_wire: bool,
}

impl Gateway {
    pub(crate) fn new(
        rng: &mut StdRng,
        document: &Document,
        identity: Identity,
        key: NodeKey,
    ) -> Self {
        Self {
            key,
            identity,
            document: 0,
            next_hops: NextHops::new(document, &identity),
            tags: ReplayFilter::new(REPLAY_TAGS, rng),
            is_down: false,
            clients: BTreeMap::new(),
        }
    }

    pub(crate) fn take_document(&mut self, number: usize, document: &Document) {
        if number > self.document {
            self.document = number;
            self.next_hops = NextHops::new(document, &self.identity);
        }
    }

    /// It comes back with what it remembers: all clients are cut off in any case.
    pub(crate) fn restart(&mut self, rng: &mut StdRng, memory: Memory) {
        if memory != Memory::All {
            self.clients.clear();
        }
        if memory == Memory::Nothing {
            self.tags = ReplayFilter::new(REPLAY_TAGS, rng);
        }
        self.is_down = false;
    }

    pub(crate) fn renew_key(&mut self, rng: &mut StdRng) {
        self.key.renew();
        self.tags = ReplayFilter::new(REPLAY_TAGS, rng);
    }

    /// A packet from the last layer; the endpoint whose inbox it is in. Keys of the key epochs `count`.
    pub(crate) fn handle_packet<C: Codec>(
        &mut self,
        codec: &C,
        now: Instant,
        count: &KeyEpochs,
        packet: Packet,
    ) -> Result<Option<usize>, Outdated> {
        if self.is_down {
            return Ok(None);
        }
        let Some(Arrival::Forward { next_hop, packet, .. }) =
            peel(codec, &self.key, count, &mut self.tags, packet)?
        else {
            return Ok(None);
        };
        let Some(inbox) = self.clients.get_mut(&next_hop) else { return Ok(None) };
        // A full inbox, or one of somebody long gone, takes nothing.
        Ok(inbox.delivery.push(packet, now).ok().map(|()| inbox.endpoint))
    }

    /// An endpoint logs in, as [`Clients`](mixsocks_node::gateway) does it: the stream goes on if
    /// both sides remember it. Returns the stream and how many packets of the endpoint have arrived.
    pub(crate) fn attach(
        &mut self,
        rng: &mut StdRng,
        now: Instant,
        endpoint: (usize, HopAddress),
        connection: u64,
        resume: Option<(StreamId, u64)>,
        packet_bytes: usize,
    ) -> (StreamId, u64) {
        let new_stream = StreamId::new(rng.random_range(1..=u64::MAX)).expect("not zero");
        let inbox = self.clients.entry(endpoint.1).or_insert_with(|| Inbox {
            endpoint: endpoint.0,
            connection: None,
            delivery: Delivery::new(new_stream, packet_bytes),
            received: 0,
            keepalive: Keepalive::new(now),
            free_at: now,
            waits_for_wire: false,
        });
        inbox.connection = Some(connection);
        inbox.keepalive = Keepalive::new(now);
        inbox.free_at = now;
        match resume {
            Some((stream, received)) if stream == inbox.delivery.stream() => {
                inbox.delivery.resume(received).expect("an honest count");
            }
            _ => {
                inbox.delivery.restart(new_stream);
                inbox.received = 0;
            }
        }
        (inbox.delivery.stream(), inbox.received)
    }
}

impl Inbox {
    /// The next frame for the endpoint.
    pub(crate) fn poll_frame(&mut self, now: Instant) -> Option<Frame<Packet>> {
        self.connection?;
        let counter = self.received;
        let packet = self.delivery.poll_transmit().cloned();
        poll_frame(&mut self.keepalive, now, counter, packet)
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.delivery.handle_timeout(now);
        if self.connection.is_some() && self.keepalive.due(now) == Some(Due::Close) {
            self.connection = None;
            self.delivery.detach(now);
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let due = if self.waits_for_wire { self.free_at } else { self.keepalive.poll_timeout() };
        let link = self.connection.map(|_| due);
        link.into_iter().chain(self.delivery.poll_timeout()).min()
    }
}

/// A frame with `packet`, or a PAD if one is due.
pub(crate) fn poll_frame<P>(
    keepalive: &mut Keepalive,
    now: Instant,
    counter: u64,
    packet: Option<P>,
) -> Option<Frame<P>> {
    if packet.is_none() && keepalive.due(now) != Some(Due::Pad) {
        return None;
    }
    keepalive.sent(now);
    Some(Frame { counter, packet })
}
