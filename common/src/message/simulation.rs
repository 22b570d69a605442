//! Clients, their gateways and a network that loses, delays and reorders, under fake time.
//!
//! A gateway stores what arrives a moment later, and acknowledges it then; a crash loses what is not
//! stored. A client that is connected gets what its gateway keeps, again with each new connection. The
//! application of each client answers what it can, and takes messages when it likes. The model knows each
//! message that was sent, so that it can be said at the end which came, and how often.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::fragment::MessageId;
use super::packet::{AckStatus, MessageSizes, ReplyContents};
use super::testing::{address, identifier, made_surb, surb_number};
use super::*;
use crate::address::Address;
use crate::topology::UnixTime;

const CLIENTS: usize = 3;
const HOUR: Duration = Duration::from_secs(3600);
const GIVE_UP: Duration = Duration::from_secs(600);

/// What a slow line takes for a delivery: those that a gateway keeps take longer than incomplete messages
/// are kept.
const SLOW_LINE: Duration = Duration::from_secs(40);

/// What the wall clock shows at first.
const WALL: UnixTime = UnixTime(1_800_000_000);

/// Boxes that a gateway keeps for a client: few, so that it is full at times.
const SHARE: usize = 120;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[derive(Debug)]
enum Event {
    /// A box is at the gateway of a client; the acknowledgement goes by this SURB.
    Box {
        client: usize,
        fragment: Vec<u8>,
        ack: u64,
    },
    /// A gateway has stored what was pending when its life of this number had begun.
    Stored {
        client: usize,
        life: u64,
    },
    Delivery {
        client: usize,
        connection: u64,
        number: u64,
        fragment: Vec<u8>,
    },
    /// All that the gateway kept when it was asked was handed over.
    CaughtUp {
        client: usize,
        connection: u64,
    },
    Confirmation {
        client: usize,
        connection: u64,
        number: u64,
    },
    /// Something came by a SURB of this number.
    BySurb {
        surb: u64,
        contents: Vec<u8>,
    },
    Taken {
        client: usize,
        received: ReceivedId,
    },
    Send {
        client: usize,
    },
    Crash {
        client: usize,
    },
    Disconnect {
        client: usize,
    },
    Connect {
        client: usize,
    },
    /// A client's machine sleeps for so long.
    Sleep {
        client: usize,
        time: Duration,
    },
    Wake {
        client: usize,
        time: Duration,
    },
    /// A gateway hands all boxes that it ever kept over once more.
    Replay {
        client: usize,
    },
    /// A client is killed and starts again: it knows what it has written down, and nothing else.
    Restart {
        client: usize,
    },
}

#[derive(Default)]
struct Gateway {
    pending: Vec<(Vec<u8>, u64)>,
    kept: BTreeMap<u64, Vec<u8>>,
    /// All that was ever kept.
    old: Vec<Vec<u8>>,
    next: u64,
    life: u64,
    down_until: Option<Instant>,
    /// How long the client's line takes for a delivery, and when it is done with those that wait.
    line: Duration,
    line_free: Option<Instant>,
}

impl Gateway {
    /// When something that is handed over now is at the client.
    fn carried(&mut self, now: Instant, takes: Duration) -> Duration {
        let begins = self.line_free.unwrap_or(now).max(now);
        self.line_free = Some(begins + takes);
        begins + takes - now
    }
}

struct Client {
    core: Messages<u64>,
    address: Address,
    gateway: Gateway,
    /// Of its present connection; counts up.
    connection: u64,
    is_connected: bool,
    is_asleep: bool,
    /// How much its clock is behind, as it stands still while its machine sleeps.
    behind: Duration,
    surbs: VecDeque<MadeSurb<u64>>,
    /// Ids that were written down before the application got their messages.
    log: TakenIds,
}

/// A message in the model.
#[derive(Debug)]
struct Sent {
    client: usize,
    at: Instant,
    received: usize,
    is_delivered: bool,
    failed: Option<FailReason>,
    /// Its sender was killed: nobody tells what becomes of it.
    is_abandoned: bool,
}

struct World {
    start: Instant,
    now: Instant,
    rng: StdRng,
    loss: f64,
    clients: Vec<Client>,
    events: BTreeMap<(Instant, u64), Event>,
    next: u64,
    next_surb: u64,
    /// By its first 8 bytes.
    sent: BTreeMap<u64, Sent>,
    ids: BTreeMap<MessageId, u64>,
}

impl World {
    fn new(seed: u64, loss: f64) -> Self {
        let now = Instant::now();
        let mut rng = StdRng::seed_from_u64(seed);
        let clients = (0..CLIENTS).map(|_| Client::new(now, &mut rng)).collect();
        let (events, sent, ids) = Default::default();
        let start = now;
        let mut world =
            Self { start, now, rng, loss, clients, events, next: 0, next_surb: 0, sent, ids };
        for client in 0..CLIENTS {
            world.at(ms(0), Event::Connect { client });
        }
        world
    }

    fn wall(&self) -> UnixTime {
        UnixTime(WALL.0 + (self.now - self.start).as_secs())
    }

    /// What the clock of a client shows.
    fn clock(&self, client: usize) -> Instant {
        self.now - self.clients[client].behind
    }

    fn at(&mut self, after: Duration, event: Event) {
        self.next += 1;
        self.events.insert((self.now + after, self.next), event);
    }

    fn delay(&mut self) -> Duration {
        ms(self.rng.random_range(20..200))
    }

    /// Sends through the mixnet.
    fn mix(&mut self, delay: Duration, event: Event) {
        if !self.rng.random_bool(self.loss) {
            let jitter = ms(self.rng.random_range(0..40));
            self.at(delay + jitter, event);
        }
    }

    fn make_surb(&mut self, client: usize) -> MadeSurb<u64> {
        self.next_surb += 1;
        made_surb(self.next_surb * CLIENTS as u64 + client as u64, 0)
    }

    /// A message that the model knows again.
    fn message(&mut self, client: usize) -> (u64, Vec<u8>) {
        let name = self.next + 1_000_000;
        let len = *[8, 100, 1560, 1561, 9000, 40_000].get(self.rng.random_range(0..6)).unwrap();
        let mut message = vec![0; len];
        self.rng.fill_bytes(&mut message);
        message[..8].copy_from_slice(&name.to_be_bytes());
        let sent = Sent {
            client,
            at: self.now,
            received: 0,
            is_delivered: false,
            failed: None,
            is_abandoned: false,
        };
        self.sent.insert(name, sent);
        self.next += 1;
        (name, message)
    }

    fn send(&mut self, client: usize) {
        let to = self.rng.random_range(0..CLIENTS);
        let recipient = self.clients[to].address;
        let (name, message) = self.message(client);
        let surbs = *[0, 0, 1, 12].get(self.rng.random_range(0..4)).unwrap();
        let surbs = (0..surbs).map(|_| self.make_surb(client)).collect();
        let now = self.clock(client);
        let core = &mut self.clients[client].core;
        let id = core.send(now, &mut self.rng, recipient, &message, surbs).unwrap();
        self.ids.insert(id, name);
    }

    fn reply(&mut self, client: usize, tag: SenderTag) {
        let (name, message) = self.message(client);
        let now = self.clock(client);
        let core = &mut self.clients[client].core;
        let id = core.reply(now, &mut self.rng, tag, &message).unwrap();
        self.ids.insert(id, name);
    }

    fn handle(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Box { client, fragment, ack } => {
                let gateway = &mut self.clients[client].gateway;
                if gateway.down_until.is_some_and(|until| now < until) {
                    return;
                }
                if gateway.kept.len() + gateway.pending.len() >= SHARE {
                    return self.by_surb(ack, AckStatus::ShareFull.to_bytes().to_vec());
                }
                gateway.pending.push((fragment, ack));
                let life = gateway.life;
                self.at(ms(5), Event::Stored { client, life });
            }
            Event::Stored { client, life } => self.store(client, life),
            Event::Delivery { client, connection, number, fragment } => {
                let now = self.clock(client);
                let client = &mut self.clients[client];
                if client.is_connected && client.connection == connection {
                    client.core.handle_delivery(now, number, &fragment);
                }
            }
            Event::CaughtUp { client, connection } => {
                let now = self.clock(client);
                let client = &mut self.clients[client];
                if client.is_connected && client.connection == connection {
                    client.core.caught_up(now);
                }
            }
            Event::Confirmation { client, connection, number } => {
                let client = &mut self.clients[client];
                if client.is_connected && client.connection == connection {
                    client.gateway.kept.remove(&number);
                }
            }
            Event::BySurb { surb, contents } => {
                let client = usize::try_from(surb).unwrap() % CLIENTS;
                let now = self.clock(client);
                let client = &mut self.clients[client];
                if client.is_connected
                    && let Some((recovery, purpose)) = client.core.take_awaited(&identifier(surb))
                {
                    assert_eq!(recovery, surb);
                    client.core.handle_by_surb(now, purpose, &contents);
                }
            }
            Event::Taken { client, .. }
            | Event::Send { client }
            | Event::Connect { client }
            | Event::Restart { client }
                if self.clients[client].is_asleep =>
            {
                self.at(ms(60_000), event);
            }
            Event::Taken { client, received } => {
                self.clients[client].core.taken(received);
            }
            Event::Send { client } => self.send(client),
            Event::Crash { client } => {
                let down = ms(self.rng.random_range(0..20_000));
                let gateway = &mut self.clients[client].gateway;
                gateway.pending.clear();
                gateway.life += 1;
                gateway.down_until = Some(now + down);
                self.handle(Event::Disconnect { client });
                self.at(down + ms(1000), Event::Connect { client });
            }
            Event::Disconnect { client } => {
                let now = self.clock(client);
                let client = &mut self.clients[client];
                client.is_connected = false;
                if !client.is_asleep {
                    client.core.set_receiving(now, false);
                }
            }
            Event::Sleep { client, time } => {
                self.clients[client].is_connected = false;
                self.clients[client].is_asleep = true;
                self.at(time, Event::Wake { client, time });
            }
            Event::Wake { client, time } => self.wake(client, time),
            Event::Connect { client } => self.receive(client),
            Event::Restart { client } => self.restart(client),
            Event::Replay { client } => {
                for fragment in self.clients[client].gateway.old.clone() {
                    let number = self.clients[client].gateway.next;
                    self.clients[client].gateway.next += 1;
                    self.hand_over(client, number, fragment);
                }
            }
        }
    }

    /// The clock of one client in two has stood still. It takes a moment until the connection is known to
    /// be dead.
    fn wake(&mut self, client: usize, time: Duration) {
        let wall = self.wall();
        let at = &mut self.clients[client];
        at.is_asleep = false;
        if client.is_multiple_of(2) {
            at.behind += time;
        }
        let now = self.clock(client);
        self.clients[client].core.handle_clock(now, wall);
        self.at(ms(3000), Event::Disconnect { client });
        self.at(ms(5000), Event::Connect { client });
    }

    fn restart(&mut self, client: usize) {
        let wall = self.wall();
        let at = &mut self.clients[client];
        at.core = Messages::new(self.now - at.behind, options(wall, at.log.clone()));
        at.is_connected = false;
        at.surbs.clear();
        for sent in self.sent.values_mut().filter(|sent| sent.client == client) {
            sent.is_abandoned |= !sent.is_delivered && sent.failed.is_none();
        }
        self.at(ms(2000), Event::Connect { client });
    }

    fn store(&mut self, client: usize, life: u64) {
        let gateway = &mut self.clients[client].gateway;
        if gateway.life != life {
            return;
        }
        for (fragment, ack) in std::mem::take(&mut gateway.pending) {
            let gateway = &mut self.clients[client].gateway;
            let number = gateway.next;
            gateway.next += 1;
            gateway.kept.insert(number, fragment.clone());
            gateway.old.push(fragment.clone());
            self.by_surb(ack, AckStatus::Stored.to_bytes().to_vec());
            self.hand_over(client, number, fragment);
        }
    }

    fn hand_over(&mut self, client: usize, number: u64, fragment: Vec<u8>) {
        let connection = self.clients[client].connection;
        let gateway = &mut self.clients[client].gateway;
        let after = gateway.carried(self.now, gateway.line);
        self.at(after, Event::Delivery { client, connection, number, fragment });
    }

    /// A new connection on which the gateway hands over all that it keeps.
    fn receive(&mut self, client: usize) {
        let now = self.clock(client);
        let at = &mut self.clients[client];
        at.is_connected = true;
        at.connection += 1;
        at.core.set_receiving(now, true);
        at.gateway.line_free = None;
        for (number, fragment) in at.gateway.kept.clone() {
            self.hand_over(client, number, fragment);
        }
        let connection = self.clients[client].connection;
        let after = self.clients[client].gateway.carried(self.now, ms(0));
        self.at(after, Event::CaughtUp { client, connection });
    }

    fn by_surb(&mut self, surb: u64, contents: Vec<u8>) {
        // The delay that the SURB's creator knows.
        self.mix(made_surb(surb, 0).delay, Event::BySurb { surb, contents });
    }

    /// Does what a shell does for one client.
    fn drive(&mut self, client: usize) {
        if self.clients[client].is_asleep {
            return;
        }
        let (now, wall) = (self.clock(client), self.wall());
        self.clients[client].core.handle_clock(now, wall);
        if self.clients[client].core.poll_timeout(now).is_some_and(|at| at <= now) {
            self.clients[client].core.handle_timeout(now);
            let next = self.clients[client].core.poll_timeout(now);
            assert!(next.is_none_or(|next| next > now), "a deadline survives its handling");
        }
        while let Some(received) = self.clients[client].core.poll_surbs() {
            self.clients[client].write_down(received);
            self.clients[client].core.taken(received);
        }
        while let Some(event) = self.clients[client].core.poll_event() {
            self.tell(client, event);
        }
        if !self.clients[client].is_connected {
            return;
        }
        if self.clients[client].core.wants_receive(now) {
            self.receive(client);
        }
        while let Some(number) = self.clients[client].core.poll_confirmation() {
            let connection = self.clients[client].connection;
            self.at(ms(10), Event::Confirmation { client, connection, number });
        }
        while let Some(Refill { recipient, surbs }) = self.clients[client].core.poll_refill() {
            let surbs = (0..surbs).map(|_| self.make_surb(client)).collect();
            let core = &mut self.clients[client].core;
            core.refill(now, &mut self.rng, recipient, surbs).unwrap();
        }
        self.transmit(client);
    }

    fn transmit(&mut self, client: usize) {
        loop {
            if self.clients[client].surbs.is_empty() {
                let surb = self.make_surb(client);
                self.clients[client].surbs.push_back(surb);
            }
            let now = self.clock(client);
            let at = &mut self.clients[client];
            let wants = at.core.wants_to_send(now);
            let sent = at.core.poll_transmit(now, &mut self.rng, &mut at.surbs);
            assert_eq!(wants, sent.is_some());
            match sent {
                None => return,
                Some(Transmit::Message { recipient, fragment, ack_surb, ack }) => {
                    let delay = self.delay();
                    self.clients[client].core.sent(&ack, delay);
                    let to = self.clients.iter().position(|other| other.address == recipient);
                    let ack = surb_number(&ack_surb);
                    self.mix(
                        delay,
                        Event::Box { client: to.unwrap(), fragment: fragment.to_vec(), ack },
                    );
                }
                Some(Transmit::Reply { surb, fragment, ack_surb }) => {
                    let contents = ReplyContents { ack_surb, fragment: &fragment }.compose();
                    self.by_surb(surb_number(&surb), contents);
                }
                Some(Transmit::Acknowledgement { surb }) => {
                    self.by_surb(surb_number(&surb), AckStatus::Stored.to_bytes().to_vec());
                }
            }
        }
    }

    fn tell(&mut self, client: usize, event: MessageEvent) {
        match event {
            MessageEvent::Received { received, message, sender } => {
                let name = u64::from_be_bytes(*message.first_chunk().unwrap());
                self.sent.get_mut(&name).unwrap().received += 1;
                self.clients[client].write_down(received);
                let after = ms(self.rng.random_range(0..3000));
                self.at(after, Event::Taken { client, received });
                if let Sender::Anonymous(tag) = sender {
                    self.reply(client, tag);
                }
            }
            MessageEvent::Delivered(id) => {
                self.sent.get_mut(&self.ids[&id]).unwrap().is_delivered = true;
            }
            MessageEvent::Failed(id, reason) => {
                let sent = self.sent.get_mut(&self.ids[&id]).unwrap();
                // Sleep is counted in seconds.
                assert!(self.now + ms(1000) >= sent.at + GIVE_UP, "{reason} too early");
                sent.failed = Some(reason);
            }
        }
    }

    fn run_until(&mut self, end: Instant) {
        loop {
            for client in 0..CLIENTS {
                self.drive(client);
            }
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let timeout = |client: &Client| {
                let at = client.core.poll_timeout(self.now - client.behind)?;
                Some(at + client.behind)
            };
            let timeouts =
                self.clients.iter().filter(|client| !client.is_asleep).filter_map(timeout);
            match event.into_iter().chain(timeouts).min() {
                Some(at) if at <= end => self.now = at,
                _ => return self.now = end,
            }
            while let Some(first) = self.events.first_entry()
                && first.key().0 <= self.now
            {
                let event = first.remove();
                self.handle(event);
            }
            for client in &self.clients {
                client.check_bounds();
            }
        }
    }
}

fn options(wall: UnixTime, known: TakenIds) -> MessageOptions {
    MessageOptions {
        sizes: MessageSizes::new(2031).unwrap(),
        give_up_after: GIVE_UP,
        wall,
        validity: UnixTime(0)..=UnixTime(u64::MAX),
        unknown_delays: ms(100),
        known,
    }
}

impl Client {
    fn new(now: Instant, rng: &mut StdRng) -> Self {
        let address = address(rng);
        let core = Messages::new(now, options(WALL, TakenIds::default()));
        let (surbs, log) = Default::default();
        let gateway = Gateway { line: ms(10), ..Gateway::default() };
        Self {
            core,
            address,
            gateway,
            connection: 0,
            is_connected: false,
            is_asleep: false,
            behind: ms(0),
            surbs,
            log,
        }
    }

    fn write_down(&mut self, received: ReceivedId) {
        if let Some(id) = received.to_remember() {
            self.log.insert(id);
        }
    }

    fn check_bounds(&self) {
        let counts = self.core.counts();
        assert!(counts.outgoing.2 <= MAX_UNDER_WAY);
        assert!(counts.incoming.2 <= MAX_HELD_BYTES);
        assert!(self.gateway.kept.len() + self.gateway.pending.len() <= SHARE);
    }
}

/// What became of a seed's messages: how many there were, were delivered, and failed.
fn run(seed: u64) -> (usize, usize, usize) {
    let loss = f64::from(u32::try_from(seed % 4).unwrap()) * 0.1;
    let mut world = World::new(seed, loss);
    for client in 0..CLIENTS {
        for _ in 0..4 {
            let after = ms(world.rng.random_range(0..60_000));
            world.at(after, Event::Send { client });
        }
        for _ in 0..2 {
            let after = ms(world.rng.random_range(0..120_000));
            world.at(after, Event::Crash { client });
        }
    }
    if seed.is_multiple_of(3) {
        let client = world.rng.random_range(0..CLIENTS);
        let after = ms(world.rng.random_range(0..120_000));
        world.at(after, Event::Restart { client });
    }
    if seed.is_multiple_of(2) {
        let away = ms(world.rng.random_range(125_000..200_000));
        let client = world.rng.random_range(0..CLIENTS);
        world.at(away, Event::Disconnect { client });
        world.at(away + HOUR, Event::Connect { client });
        for sender in 0..CLIENTS {
            world.at(away + ms(500), Event::Send { client: sender });
        }
    }
    if seed % 10 == 1 {
        let client = world.rng.random_range(0..CLIENTS);
        world.clients[client].gateway.line = SLOW_LINE;
    }
    if seed % 5 == 3 {
        for client in 0..CLIENTS {
            let time = ms(world.rng.random_range(10_000..2 * 3_600_000));
            let after = ms(world.rng.random_range(0..120_000));
            world.at(after, Event::Sleep { client, time });
        }
    }
    if seed % 7 == 2 {
        for client in 0..CLIENTS {
            let after = ms(world.rng.random_range(60_000..240_000));
            world.at(after, Event::Replay { client });
        }
    }
    let end = world.now + 8 * HOUR;
    world.run_until(end);
    for (name, sent) in &world.sent {
        assert!(sent.received <= 1, "seed {seed}: message {name} came {} times", sent.received);
        assert!(!sent.is_delivered || sent.received == 1, "seed {seed}: {name} {sent:?} is lost");
        let fates = [sent.is_delivered, sent.failed.is_some(), sent.is_abandoned];
        let fates = fates.into_iter().filter(|fate| *fate).count();
        assert_eq!(fates, 1, "seed {seed}: {name} of {} has {fates} fates", sent.client);
    }
    for client in &world.clients {
        assert_eq!(client.gateway.kept.len(), 0, "seed {seed}: not all was confirmed");
        let counts = client.core.counts();
        assert_eq!((counts.outgoing.0, counts.incoming.2), (0, 0), "seed {seed}");
    }
    let delivered = world.sent.values().filter(|sent| sent.is_delivered).count();
    let failed = world.sent.values().filter(|sent| sent.failed.is_some()).count();
    (world.sent.len(), delivered, failed)
}

#[test]
fn messages_come_at_most_once_and_what_was_delivered_arrives() {
    let (mut all, mut delivered) = (0, 0);
    for seed in 0..300 {
        let (sent, arrived, _) = run(seed);
        all += sent;
        delivered += arrived;
    }
    // Replies to somebody who is away fail, and what goes to somebody whose share is full.
    assert!(delivered * 10 >= all * 9, "{delivered} of {all} were delivered");
}

#[test]
fn a_seed_gives_the_same_each_time() {
    assert_eq!(run(2), run(2));
}
