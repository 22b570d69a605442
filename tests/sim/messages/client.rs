//! A client of the simulation of messages: its real core, and what its shell does around it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mixsocks_client::gateway::{DOWNLINK_QUEUE_PACKETS, Receiving};
use mixsocks_client::health::Way;
use mixsocks_common::address::Address;
use mixsocks_common::gateway::message::StreamId;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::message::packet::{AckStatus, MessageContents, MessageSizes, ReplyContents};
use mixsocks_common::message::{
    GIVE_UP_AFTER, MAX_AWAITED_ACKS, MAX_AWAITED_REPLIES, MAX_HELD_BYTES, MAX_OUTGOING_BYTES,
    MAX_UNDER_WAY, MadeSurb, MessageOptions, Messages, ReceivedId, Refill, TakenIds, Transmit,
};
use mixsocks_common::replay::{Admission, RecentTags};
use mixsocks_common::topology::{
    LAYERS, RouteChoice, UnixTime, delay_quantile, random_message_route, random_route,
};
use mixsocks_sphinx::{HopAddress, Packet, SecretKey, max_plaintext};
use rand::RngExt;
use rand::rngs::StdRng;

use super::gateway::{Down, Up, WRITE_FRAMES};
use crate::codec::{Arrival, BoxKeys, Codec, NodeKey, Opening, SealedRoute};
use crate::documents::Document;

const REPLAY_SPAN: Duration = Duration::from_secs(600);
const REPLAY_TAGS: usize = 1 << 20;
/// From one frame to the next on a client's line, and for some clients.
const SPACING: Duration = Duration::from_micros(150);
const SLOW_SPACING: Duration = Duration::from_millis(10);
const SLOW_SHARE: f64 = 0.2;
/// Numbers in one CONFIRM.
const CONFIRMED_AT_ONCE: usize = 16;

/// What a client and its shell need of the network.
pub(crate) struct Network<'a, C> {
    pub(crate) codec: &'a C,
    pub(crate) topology: &'a Document,
    pub(crate) now: Instant,
    pub(crate) wall: UnixTime,
    pub(crate) rng: &'a mut StdRng,
}

pub(crate) struct Client<C: Codec> {
    key: NodeKey,
    keys: BoxKeys,
    pub(crate) address: Address,
    /// Number of its gateway.
    pub(crate) gateway: usize,
    pub(crate) core: Messages<C::Recovery>,
    options: MessageOptions,
    surbs: VecDeque<MadeSurb<C::Recovery>>,
    tags: RecentTags,
    /// What it has written down before its application got it.
    log: TakenIds,
    /// Counts up with each time that it is killed.
    pub(crate) life: u32,
    /// The process runs, on a machine that is switched on.
    pub(crate) is_running: bool,
    /// The connection that it has.
    pub(crate) connection: Option<u64>,
    stream: Option<StreamId>,
    pub(crate) received: u64,
    /// The gateway has not been told yet what was received.
    owes_counter: bool,
    receiving: Receiving,
    /// RECEIVE has to be said with this number, as the connection is new; and once more, as its client
    /// wants to receive again.
    receive: Option<u32>,
    receives_again: bool,
    /// What the link has read, and waits until it is taken in, whatever becomes of the connection.
    arrived: VecDeque<Down>,
    /// Nothing is taken in until then.
    busy_until: Instant,
    /// Whether it has heard that there is a connection.
    pub(crate) knows_connection: bool,
    /// From one frame to the next on its line, in each direction.
    pub(crate) spacing: Duration,
    /// When the frames that it has sent are on the wire.
    pub(crate) wire_free_at: Instant,
}

impl<C: Codec> Client<C> {
    pub(crate) fn new(
        rng: &mut StdRng,
        (now, wall): (Instant, UnixTime),
        document: &Document,
        (gateway, gateway_identity): (usize, Identity),
    ) -> Self {
        let identity = IdentityKey::generate(rng).identity();
        let secret = SecretKey::generate(rng);
        let encryption = secret.public_key().into();
        let parameters = &document.parameters;
        let layers = u32::try_from(LAYERS).expect("three");
        let options = MessageOptions {
            sizes: sizes(document),
            give_up_after: GIVE_UP_AFTER,
            unknown_delays: delay_quantile(parameters.mean_delay, layers),
            wall,
            validity: UnixTime(0)..=UnixTime(u64::MAX),
            known: TakenIds::default(),
        };
        let key = SecretKey::from_bytes(*secret.to_bytes());
        Self {
            key: NodeKey::lasting(*identity.as_bytes(), key, 0),
            keys: BoxKeys { secret, public: encryption },
            address: Address { identity, encryption, gateway: gateway_identity },
            gateway,
            core: Messages::new(now, options.clone()),
            options,
            surbs: VecDeque::new(),
            tags: RecentTags::new(now, REPLAY_SPAN, REPLAY_TAGS, rng),
            log: TakenIds::default(),
            life: 0,
            is_running: true,
            connection: None,
            stream: None,
            received: 0,
            owes_counter: false,
            receiving: Receiving::default(),
            receive: None,
            receives_again: false,
            arrived: VecDeque::new(),
            busy_until: now,
            knows_connection: false,
            spacing: if rng.random_bool(SLOW_SHARE) { SLOW_SPACING } else { SPACING },
            wire_free_at: now,
        }
    }

    /// As packets name it.
    pub(crate) fn name(&self) -> HopAddress {
        *self.address.identity.as_bytes()
    }

    // --- Its life.

    /// It is killed. What it will know is what is in its log.
    pub(crate) fn kill(&mut self, now: Instant, wall: UnixTime, rng: &mut StdRng) {
        self.core = Messages::new(
            now,
            MessageOptions { wall, known: self.log.clone(), ..self.options.clone() },
        );
        self.surbs.clear();
        self.tags = RecentTags::new(now, REPLAY_SPAN, REPLAY_TAGS, rng);
        self.life += 1;
        self.is_running = false;
        (self.stream, self.received) = (None, 0);
        self.connection = None;
        self.receiving = Receiving::default();
        (self.receive, self.receives_again) = (None, false);
        self.arrived.clear();
        self.knows_connection = false;
    }

    pub(crate) fn cut(&mut self) {
        self.connection = None;
        self.receive = None;
    }

    pub(crate) fn resume(&self) -> Option<(StreamId, u64)> {
        self.stream.map(|stream| (stream, self.received))
    }

    /// The gateway has let it in.
    pub(crate) fn welcome(&mut self, now: Instant, connection: u64, stream: StreamId) {
        if self.stream != Some(stream) {
            (self.stream, self.received) = (Some(stream), 0);
        }
        self.connection = Some(connection);
        self.owes_counter = false;
        self.wire_free_at = now;
        self.receiving.begin();
        (self.receive, self.receives_again) = (Some(self.receiving.number()), false);
    }

    /// It hears whether there is a connection, a moment after its link does.
    pub(crate) fn follow_link(&mut self, now: Instant) {
        let is_connected = self.connection.is_some();
        if std::mem::replace(&mut self.knows_connection, is_connected) != is_connected {
            self.core.set_receiving(now, is_connected);
        }
    }

    /// It asks anew for what its gateway keeps, as it does when it had no room before.
    pub(crate) fn receive_again(&mut self, now: Instant) {
        if self.knows_connection {
            self.core.set_receiving(now, true);
            self.receiving.again();
            self.receives_again = true;
        }
    }

    /// The number of its last RECEIVE, if it takes that for answered: nothing is to come that was kept
    /// before.
    pub(crate) fn believes_answered(&self) -> Option<u32> {
        self.core.is_caught_up().then(|| self.receiving.number())
    }

    // --- What comes.

    /// Its link reads frames, which wait until they are taken in.
    pub(crate) fn read(&mut self, frames: Vec<Down>) {
        let is_packet = |frame: &&Down| matches!(frame, Down::Packet(_));
        let packets = frames.iter().filter(is_packet).count();
        self.received += packets as u64;
        self.owes_counter |= packets > 0;
        self.arrived.extend(frames);
    }

    /// Nothing is taken in for a while, unless too much waits for that.
    pub(crate) fn be_busy(&mut self, until: Instant) {
        self.busy_until = until;
    }

    /// What is taken in next.
    pub(crate) fn poll_arrived(&mut self, now: Instant) -> Option<Down> {
        let is_busy = now < self.busy_until && self.arrived.len() < DOWNLINK_QUEUE_PACKETS;
        if is_busy { None } else { self.arrived.pop_front() }
    }

    /// Takes a frame in. Whether it was an answer to what had been asked for before.
    pub(crate) fn handle_frame(&mut self, codec: &C, now: Instant, frame: Down) -> bool {
        match frame {
            Down::Packet(packet) => self.handle_packet(codec, now, packet),
            Down::Delivery(kept) => match codec.unseal(&self.keys, &kept.sealed) {
                Some(fragment) => self.core.handle_delivery(now, kept.number, &fragment),
                None => self.core.handle_unreadable(kept.number),
            },
            Down::CaughtUp(number) if self.receiving.is_last(number) => self.core.caught_up(now),
            Down::CaughtUp(_) => return true,
        }
        false
    }

    /// What came is written down before it is taken in.
    pub(crate) fn write_down(&mut self, received: ReceivedId) {
        if let Some(id) = received.to_remember() {
            self.log.insert(id);
        }
    }

    /// Takes SURBs in, and asks for more deliveries if there is room again.
    pub(crate) fn settle(&mut self, now: Instant) {
        while let Some(received) = self.core.poll_surbs() {
            self.write_down(received);
            self.core.taken(received);
        }
        if self.core.wants_receive(now) {
            self.receive_again(now);
        }
        // Whose way through the mixnet is judged is not simulated.
        while self.core.poll_overdue().is_some() {}
    }

    fn handle_packet(&mut self, codec: &C, now: Instant, packet: Packet) {
        let Opening::Opened(tag, opened) = codec.open(&self.key, &(0..=0), packet) else { return };
        if self.tags.insert(&tag, now) != Admission::Fresh {
            return;
        }
        if let Some(Arrival::Final { identifier, payload, .. }) = codec.finish(opened)
            && let Some((recovery, purpose)) = self.core.take_awaited(&identifier)
            && let Some(contents) = codec.recover(recovery, payload)
        {
            self.core.handle_by_surb(now, purpose, &contents);
        }
    }

    // --- What is sent.

    /// The frames that leave now, as many as the wire takes.
    pub(crate) fn frames(&mut self, network: &mut Network<'_, C>) -> Option<Vec<Up>> {
        let mut frames = Vec::new();
        if let Some(number) = self.receive.take() {
            frames.push(Up::Receive(number));
        } else if std::mem::take(&mut self.receives_again) {
            frames.push(Up::Receive(self.receiving.number()));
        }
        let mut numbers: Vec<_> = std::iter::from_fn(|| self.core.poll_confirmation()).collect();
        while !numbers.is_empty() {
            let rest = numbers.split_off(numbers.len().min(CONFIRMED_AT_ONCE));
            frames.push(Up::Confirm(std::mem::replace(&mut numbers, rest)));
        }
        while frames.len() < WRITE_FRAMES
            && let Some((next_hop, packet)) = self.next_packet(network)
        {
            frames.push(Up::Packet(next_hop, packet));
        }
        let owes_counter = std::mem::take(&mut self.owes_counter);
        (owes_counter || !frames.is_empty()).then_some(frames)
    }

    /// SURBs that it gives away.
    pub(crate) fn make_surbs(
        &self,
        network: &mut Network<'_, C>,
        count: usize,
    ) -> Vec<MadeSurb<C::Recovery>> {
        (0..count).map(|_| self.make_surb(network)).collect()
    }

    fn make_surb(&self, network: &mut Network<'_, C>) -> MadeSurb<C::Recovery> {
        let Network { codec, topology, wall, rng, .. } = network;
        let (identifier, choice) = (rng.random(), RouteChoice::default());
        let mean = topology.parameters.mean_delay;
        let route = random_route(topology, &self.address, *wall, mean, identifier, &choice, rng)
            .expect("there are routes");
        let recipient = &self.address;
        let sealed = SealedRoute { route: &route, recipient, topology, now: *wall };
        let (surb, recovery) = codec.build_surb(rng, &sealed);
        MadeSurb { surb, identifier, recovery, delay: Way::of(&route).delay, key_epoch: 0 }
    }

    /// Gives SURBs to those who ask for them.
    pub(crate) fn refill(&mut self, network: &mut Network<'_, C>) {
        while let Some(Refill { recipient, surbs }) = self.core.poll_refill() {
            let made = self.make_surbs(network, surbs);
            // If there is no room, it asks again.
            let _ = self.core.refill(network.now, network.rng, recipient, made);
        }
    }

    fn next_packet(&mut self, network: &mut Network<'_, C>) -> Option<(HopAddress, Packet)> {
        let now = network.now;
        if self.surbs.is_empty() && self.core.wants_to_send(now) {
            let surb = self.make_surb(network);
            self.surbs.push_back(surb);
        }
        let Network { codec, topology, wall, rng, .. } = network;
        match self.core.poll_transmit(now, rng, &mut self.surbs)? {
            Transmit::Message { recipient, fragment, ack_surb, ack } => {
                let (mean, choice) = (topology.parameters.mean_delay, RouteChoice::default());
                let route = random_message_route(topology, &recipient, *wall, mean, &choice, rng)
                    .expect("all gateways are known");
                self.core.sent(&ack, Way::of(&route).delay);
                let sealed_box = codec.seal(rng, recipient.encryption, &fragment);
                let contents = MessageContents { ack_surb, sealed_box: &sealed_box }.compose();
                let recipient = &recipient;
                let sealed = SealedRoute { route: &route, recipient, topology, now: *wall };
                Some((route.first_hop(), codec.build(rng, &sealed, &contents)))
            }
            Transmit::Reply { surb, fragment, ack_surb } => {
                let contents = ReplyContents { ack_surb, fragment: &fragment }.compose();
                codec.use_surb(surb, &contents)
            }
            Transmit::Acknowledgement { surb } => {
                codec.use_surb(surb, &AckStatus::Stored.to_bytes())
            }
        }
    }

    pub(crate) fn check_bounds(&self) -> Result<(), String> {
        let counts = self.core.counts();
        let (_, outgoing_bytes, under_way) = counts.outgoing;
        let (_, _, held_bytes, _) = counts.incoming;
        let (acks, replies) = counts.awaited;
        let is_within = outgoing_bytes <= MAX_OUTGOING_BYTES
            && under_way <= MAX_UNDER_WAY
            && held_bytes <= 2 * MAX_HELD_BYTES
            && acks <= MAX_AWAITED_ACKS
            && replies <= MAX_AWAITED_REPLIES;
        if is_within { Ok(()) } else { Err(format!("a client holds too much: {counts:?}")) }
    }
}

/// The sizes of messages on this network.
pub(crate) fn sizes(document: &Document) -> MessageSizes {
    MessageSizes::new(max_plaintext(document.parameters.payload_bytes)).expect("they fit")
}
