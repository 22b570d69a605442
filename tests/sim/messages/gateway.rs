//! A gateway of the simulation of messages: its real cores over a store, and what its shell does.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use mixsocks_common::gateway::delivery::Delivery;
use mixsocks_common::gateway::message::{KeptBox, StreamId};
use mixsocks_common::keys::Identity;
use mixsocks_common::message::packet::{MessageContents, MessageSizes};
use mixsocks_common::replay::ReplayFilter;
use mixsocks_common::topology::UnixTime;
use mixsocks_node::gateway::store::{Change, Limits, Store};
use mixsocks_node::link::NextHops;
use mixsocks_sphinx::{HopAddress, Packet, Surb};
use rand::RngExt;
use rand::rngs::StdRng;

use super::store::{GroupCommit, MemoryStore};
use crate::codec::{Arrival, Codec, NodeKey};
use crate::documents::Document;
use crate::network::{REPLAY_TAGS, peel};

/// Frames that are written at a time, and deliveries that are read at a time, as in the shell.
pub(crate) const WRITE_FRAMES: usize = 16;
const READ_AT_ONCE: usize = 20;

/// A frame for a client.
pub(crate) enum Down {
    Packet(Packet),
    Delivery(KeptBox),
    CaughtUp,
}

/// A frame of a client.
pub(crate) enum Up {
    Packet(HopAddress, Packet),
    Receive,
    Confirm(Vec<u64>),
}

pub(crate) struct Gateway {
    pub(crate) key: NodeKey,
    pub(crate) identity: Identity,
    next_hops: NextHops,
    tags: ReplayFilter,
    pub(crate) is_down: bool,
    pub(crate) store: MemoryStore,
    pub(crate) commit: GroupCommit,
    /// Counts up with each start.
    pub(crate) life: u64,
    /// By identity, as packets name them.
    lines: BTreeMap<HopAddress, Line>,
}

/// What a gateway knows of a client's connection, also while there is none.
struct Line {
    client: usize,
    connection: Option<u64>,
    delivery: Delivery<Packet>,
    /// Up to which delivery all were sent; `None` until the client asks.
    cursor: Option<u64>,
    has_more: bool,
    /// The client is to be told when all was sent.
    owes_caught_up: bool,
    ready: VecDeque<KeptBox>,
    /// Numbers that were sent over this connection: nothing else can be confirmed.
    unconfirmed: BTreeSet<u64>,
    /// A turn is planned in which it writes.
    is_writing: bool,
}

/// A client that is to be written to.
pub(crate) type Wake = Option<usize>;

impl Gateway {
    pub(crate) fn new(
        rng: &mut StdRng,
        document: &Document,
        identity: Identity,
        key: NodeKey,
        limits: Limits,
    ) -> Self {
        Self {
            key,
            identity,
            next_hops: NextHops::new(document, &identity),
            tags: ReplayFilter::new(REPLAY_TAGS, rng),
            is_down: false,
            store: MemoryStore::new(limits),
            commit: GroupCommit::default(),
            life: 0,
            lines: BTreeMap::new(),
        }
    }

    /// It is killed: its store stays, and its log of replay tags unless it is lost.
    pub(crate) fn kill(&mut self, rng: &mut StdRng, has_tags: bool, now: UnixTime) {
        let is_written = rng.random();
        self.commit.crash(&self.store, is_written, now);
        self.lines.clear();
        if !has_tags {
            self.tags = ReplayFilter::new(REPLAY_TAGS, rng);
        }
        self.is_down = true;
        self.life += 1;
    }

    /// A packet from the last layer.
    pub(crate) fn handle_packet<C: Codec>(
        &mut self,
        codec: &C,
        sizes: MessageSizes,
        now: Instant,
        packet: Packet,
    ) -> Wake {
        if self.is_down {
            return None;
        }
        match peel(codec, &self.key, &(0..=u64::MAX), &mut self.tags, packet).ok()?? {
            Arrival::Forward { next_hop, packet, .. } => {
                let line = self.lines.get_mut(&next_hop)?;
                line.delivery.handle_timeout(now);
                line.delivery.push(packet, now).ok().map(|()| line.client)
            }
            Arrival::Final { destination, payload, .. } => {
                let contents = codec.contents(payload)?;
                let MessageContents { ack_surb, sealed_box } =
                    MessageContents::parse(&contents, sizes).ok()?;
                let change = Change::Keep { client: destination, sealed: sealed_box.to_vec() };
                self.commit.push(change, Some(ack_surb));
                None
            }
        }
    }

    /// The batch is written; acknowledgements that are to be sent, and clients that have something new.
    pub(crate) fn finish_commit(&mut self, now: UnixTime) -> (Vec<(Surb, Vec<u8>)>, Vec<usize>) {
        let (mut acks, mut wakes) = (Vec::new(), Vec::new());
        for answer in self.commit.finish(&self.store, now) {
            let status = answer.status();
            let Some(surb) = answer.ack_surb else { continue };
            acks.push((surb, status.to_bytes().to_vec()));
            if let Change::Keep { client, .. } = &answer.change
                && let Some(line) = self.lines.get_mut(client)
            {
                line.has_more = true;
                wakes.push(line.client);
            }
        }
        (acks, wakes)
    }

    /// A client logs in. The stream goes on if both ends remember it; the one that goes on is returned.
    pub(crate) fn attach(
        &mut self,
        rng: &mut StdRng,
        now: Instant,
        (client, address): (usize, HopAddress),
        connection: u64,
        resume: Option<(StreamId, u64)>,
        packet_bytes: usize,
    ) -> StreamId {
        let new_stream = StreamId::new(rng.random_range(1..=u64::MAX)).expect("not zero");
        let line = self.lines.entry(address).or_insert_with(|| Line {
            client,
            connection: None,
            delivery: Delivery::new(new_stream, packet_bytes),
            cursor: None,
            has_more: false,
            owes_caught_up: false,
            ready: VecDeque::new(),
            unconfirmed: BTreeSet::new(),
            is_writing: false,
        });
        line.delivery.handle_timeout(now);
        line.connection = Some(connection);
        (line.cursor, line.is_writing) = (None, false);
        line.unconfirmed.clear();
        line.ready.clear();
        line.owes_caught_up = false;
        match resume {
            Some((stream, received)) if stream == line.delivery.stream() => {
                line.delivery.resume(received).expect("an honest count");
            }
            _ => line.delivery.restart(new_stream),
        }
        line.delivery.stream()
    }

    /// It notices that a client's connection has ended.
    pub(crate) fn detach(&mut self, address: &HopAddress, now: Instant) {
        if let Some(line) = self.lines.get_mut(address) {
            line.connection = None;
            line.delivery.detach(now);
        }
    }

    /// Takes frames of a client; packets that are to be sent on, by the mix that they go to.
    pub(crate) fn handle_frames(
        &mut self,
        address: &HopAddress,
        connection: u64,
        received: u64,
        frames: Vec<Up>,
    ) -> Result<Vec<(HopAddress, Packet)>, String> {
        let mut packets = Vec::new();
        let line = self.lines.get_mut(address);
        let Some(line) = line.filter(|line| line.connection == Some(connection)) else {
            return Ok(packets);
        };
        line.delivery.confirm(received).map_err(|error| error.to_string())?;
        for frame in frames {
            match frame {
                Up::Packet(next_hop, packet) => {
                    let mix = self.next_hops.resolve(&next_hop);
                    mix.map_err(|reason| format!("a client's packet is dropped: {reason:?}"))?;
                    packets.push((next_hop, packet));
                }
                Up::Receive => {
                    line.cursor = Some(0);
                    line.has_more = true;
                    line.owes_caught_up = true;
                    line.ready.clear();
                }
                Up::Confirm(mut numbers) => {
                    numbers.retain(|number| line.unconfirmed.remove(number));
                    self.commit.push(Change::Confirm { client: *address, numbers }, None);
                }
            }
        }
        Ok(packets)
    }

    /// Whether a turn is to be planned in which a client is written to.
    pub(crate) fn plan_writing(&mut self, address: &HopAddress) -> Option<u64> {
        let line = self.lines.get_mut(address).filter(|line| !line.is_writing)?;
        line.is_writing = true;
        line.connection
    }

    /// The next frames for a client; none when it has all.
    pub(crate) fn write(&mut self, address: &HopAddress, connection: u64) -> Vec<Down> {
        let line = self.lines.get_mut(address);
        let Some(line) = line.filter(|line| line.connection == Some(connection)) else {
            return Vec::new();
        };
        line.is_writing = false;
        if let Some(cursor) = line.cursor.filter(|_| line.has_more && line.ready.is_empty()) {
            let read =
                self.store.deliveries(address, cursor, READ_AT_ONCE).expect("it can be read");
            line.has_more = read.len() == READ_AT_ONCE;
            line.cursor = Some(read.last().map_or(cursor, |last| last.number));
            line.ready = read.into();
        }
        let max_packets = WRITE_FRAMES - line.ready.len().min(WRITE_FRAMES / 2);
        let mut frames = Vec::new();
        while frames.len() < max_packets
            && let Some(packet) = line.delivery.poll_transmit()
        {
            frames.push(Down::Packet(packet.clone()));
        }
        while frames.len() < WRITE_FRAMES
            && let Some(kept) = line.ready.pop_front()
        {
            line.unconfirmed.insert(kept.number);
            frames.push(Down::Delivery(kept));
        }
        let has_all = !line.has_more && line.ready.is_empty();
        if has_all && std::mem::take(&mut line.owes_caught_up) {
            frames.push(Down::CaughtUp);
        }
        frames
    }
}
