//! A gateway of the simulation of messages: its real cores over a store, and what its shell does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mixsocks_common::gateway::delivery::Delivery;
use mixsocks_common::gateway::message::{KeptBox, StreamId};
use mixsocks_common::keys::Identity;
use mixsocks_common::message::packet::{MessageContents, MessageSizes};
use mixsocks_common::replay::ReplayFilter;
use mixsocks_common::topology::UnixTime;
use mixsocks_node::gateway::store::{Change, Limits, Store};
use mixsocks_node::gateway::{InboxCore, ReadRequest};
use mixsocks_node::link::NextHops;
use mixsocks_sphinx::{HopAddress, Packet, Surb};
use rand::RngExt;
use rand::rngs::StdRng;

use super::client::sizes;
use super::store::{GroupCommit, MemoryStore};
use crate::codec::{Arrival, Codec, NodeKey};
use crate::documents::Document;
use crate::network::{REPLAY_TAGS, peel};

/// Frames that are written at a time, as in the shell.
pub(crate) const WRITE_FRAMES: usize = 16;

/// A frame for a client.
pub(crate) enum Down {
    Packet(Packet),
    Delivery(KeptBox),
    CaughtUp(u32),
}

/// A frame of a client.
pub(crate) enum Up {
    Packet(HopAddress, Packet),
    Receive(u32),
    Confirm(Vec<u64>),
}

pub(crate) struct Gateway {
    pub(crate) key: NodeKey,
    pub(crate) identity: Identity,
    next_hops: NextHops,
    box_bytes: usize,
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
    /// The deliveries of the newest connection.
    inbox: InboxCore,
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
            box_bytes: sizes(document).box_bytes(),
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
                line.inbox.handle_new();
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
            inbox: InboxCore::new(self.box_bytes),
            is_writing: false,
        });
        line.delivery.handle_timeout(now);
        line.connection = Some(connection);
        line.inbox = InboxCore::new(self.box_bytes);
        line.is_writing = false;
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

    /// Whether this is the connection of a client, as far as it has noticed.
    pub(crate) fn has_connection(&self, address: &HopAddress, connection: u64) -> bool {
        self.lines.get(address).is_some_and(|line| line.connection == Some(connection))
    }

    /// The numbers of all that is kept for a client.
    pub(crate) fn kept(&self, address: &HopAddress) -> BTreeSet<u64> {
        let all = self.store.deliveries(address, 0, usize::MAX).expect("it can be read");
        all.into_iter().map(|kept| kept.number).collect()
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
                Up::Receive(number) => line.inbox.handle_receive(number),
                Up::Confirm(numbers) => {
                    let numbers = line.inbox.handle_confirm(numbers);
                    if !numbers.is_empty() {
                        self.commit.push(Change::Confirm { client: *address, numbers }, None);
                    }
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

    /// The next frames for a client, none when it has all; and what is to be read for it meanwhile.
    pub(crate) fn write(
        &mut self,
        address: &HopAddress,
        connection: u64,
        now: Instant,
    ) -> (Vec<Down>, Option<ReadRequest>) {
        let mut frames = Vec::new();
        let line = self.lines.get_mut(address);
        let Some(line) = line.filter(|line| line.connection == Some(connection)) else {
            return (frames, None);
        };
        line.is_writing = false;
        let read = line.inbox.poll_read(now);
        let max_packets = WRITE_FRAMES - line.inbox.ready().min(WRITE_FRAMES / 2);
        while frames.len() < max_packets
            && let Some(packet) = line.delivery.poll_transmit()
        {
            frames.push(Down::Packet(packet.clone()));
        }
        while frames.len() < WRITE_FRAMES
            && let Some(kept) = line.inbox.poll_transmit()
        {
            frames.push(Down::Delivery(kept));
        }
        frames.extend(line.inbox.poll_caught_up().map(Down::CaughtUp));
        (frames, read)
    }

    /// Its disk has given what was to be read for a connection, or nothing; when it is to be tried again.
    pub(crate) fn handle_read(
        &mut self,
        address: &HopAddress,
        connection: u64,
        now: Instant,
        read: Option<Vec<KeptBox>>,
    ) -> Option<Instant> {
        let line = self.lines.get_mut(address);
        let line = line.filter(|line| line.connection == Some(connection))?;
        match read {
            Some(read) => line.inbox.handle_read(read),
            None => line.inbox.handle_read_failure(now),
        }
        line.inbox.poll_timeout()
    }
}
