//! A client and a provider session joined by a mixnet that delays, reorders and loses packets, under
//! fake time and one seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_sphinx::SURB_LEN;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::frame::StreamId;
use super::*;

mod access;
mod endings;
mod fairness;
mod generations;
mod hostile;
mod latency;
mod outages;
mod promises;
mod rules;

const MAX_PACKET_BYTES: usize = 2031;
const MEAN_DELAY: Duration = Duration::from_millis(15);
const HELD_UP: Duration = Duration::from_secs(4);

/// What the network does to packets.
#[derive(Clone, Copy)]
struct Network {
    mean_delay: Duration,
    loss: f64,
    /// Share of packets that arrive [`HELD_UP`] late.
    held_up: f64,
    /// Time of wires and processors, one way.
    wire: Duration,
    /// Shortest time between two packets of one direction.
    spacing: Duration,
}

impl Network {
    fn perfect() -> Self {
        Self {
            mean_delay: MEAN_DELAY,
            loss: 0.0,
            held_up: 0.0,
            wire: Duration::from_millis(2),
            spacing: Duration::from_micros(200),
        }
    }
}

/// A packet under way.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct UnderWay {
    direction: usize,
    /// How many of its direction were sent up to it.
    number: u64,
    arrival: Arrival,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Arrival {
    Packet(Vec<u8>),
    Reply { surb: u64, contents: Vec<u8> },
}

/// SURBs that are made ahead, as a client does it.
#[derive(Default)]
struct Maker {
    /// When each was made.
    ready: VecDeque<Instant>,
    done_at: Option<Instant>,
}

impl Maker {
    const MAX_READY: usize = 64;
    const MAX_AGE: Duration = Duration::from_secs(1);
    const WORK: Duration = Duration::from_millis(2);

    fn handle_timeout(&mut self, now: Instant, demand: usize) {
        let demand = demand.min(Self::MAX_READY);
        while self.ready.front().is_some_and(|made| *made + Self::MAX_AGE <= now) {
            self.ready.pop_front();
        }
        if self.done_at.is_some_and(|at| at <= now) {
            self.done_at = None;
            self.ready.resize(self.ready.len().max(demand), now);
        }
        if demand > self.ready.len() {
            self.done_at.get_or_insert(now + Self::WORK);
        }
    }
}

struct Surbs<'a> {
    maker: &'a mut Maker,
    made: &'a mut HashMap<u64, Duration>,
    rng: &'a mut StdRng,
    mean_delay: Duration,
}

impl SurbSource for Surbs<'_> {
    fn available(&self) -> usize {
        self.maker.ready.len()
    }

    fn write_surb(&mut self, out: &mut Vec<u8>) {
        self.maker.ready.pop_front().expect("one was available");
        let id: u64 = self.rng.random();
        let mut bytes = [0u8; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        bytes[0] = 9;
        bytes[348..356].copy_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&bytes);
        self.made.insert(id, trip(self.mean_delay, self.rng));
    }
}

fn trip(mean: Duration, rng: &mut StdRng) -> Duration {
    (0..3).map(|_| mean.mul_f64(-(1.0 - rng.random::<f64>()).ln())).sum()
}

/// Both ends, and what is under way between them.
struct World {
    now: Instant,
    start: Instant,
    rng: StdRng,
    network: Network,
    client: ClientSession,
    sessions: ProviderSessions,
    arrivals: BinaryHeap<Reverse<(Instant, u64, UnderWay)>>,
    serial: u64,
    maker: Maker,
    surbs: HashMap<u64, Duration>,
    /// Of those, the ones that lead to nowhere.
    dead_surbs: HashSet<u64>,
    free_at: [Instant; 2],
    sent: [u64; 2],
    lost: [u64; 2],
    /// Of the packets that arrived: the latest of each direction, and the most that overtook one.
    latest: [u64; 2],
    overtook: [u64; 2],
    client_events: Vec<StreamEvent>,
    provider_events: Vec<StreamEvent>,
    /// Nothing gets through.
    blackout: bool,
    /// Something is to be done at this time.
    alarm: Option<Instant>,
}

impl World {
    fn new(seed: u64, network: Network) -> Self {
        let now = Instant::now();
        let id = client::SessionId([7; SESSION_ID_LEN]);
        Self {
            now,
            start: now,
            rng: StdRng::seed_from_u64(seed),
            network,
            client: ClientSession::new(id, 1_000_000, now, MAX_PACKET_BYTES, network.mean_delay),
            sessions: ProviderSessions::new(0, MAX_PACKET_BYTES, network.mean_delay),
            arrivals: BinaryHeap::new(),
            serial: 0,
            maker: Maker::default(),
            surbs: HashMap::new(),
            dead_surbs: HashSet::new(),
            free_at: [now; 2],
            sent: [0; 2],
            lost: [0; 2],
            latest: [0; 2],
            overtook: [0; 2],
            client_events: Vec::new(),
            provider_events: Vec::new(),
            blackout: false,
            alarm: None,
        }
    }

    fn provider(&mut self) -> &mut ProviderSession {
        let id = self.client.id();
        self.sessions.get_mut(id).expect("the session has begun")
    }

    fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    fn dispatch(&mut self, direction: usize, delay: Duration, arrival: Arrival) {
        self.sent[direction] += 1;
        if self.blackout || self.rng.random_bool(self.network.loss) {
            self.lost[direction] += 1;
            return;
        }
        self.serial += 1;
        let leaves = self.free_at[direction].max(self.now);
        self.free_at[direction] = leaves + self.network.spacing;
        let mut at = leaves + delay + self.network.wire;
        if self.rng.random_bool(self.network.held_up) {
            at += HELD_UP;
        }
        let number = self.sent[direction];
        self.arrivals.push(Reverse((at, self.serial, UnderWay { direction, number, arrival })));
    }

    /// Everything that both ends have to send now.
    fn transmit(&mut self) {
        let mut out = Vec::new();
        loop {
            self.maker.handle_timeout(self.now, self.client.surb_demand());
            // The link takes a packet when it is free, as a real one does.
            if self.free_at[0] > self.now + self.network.spacing * 16 {
                break;
            }
            let delay = trip(self.network.mean_delay, &mut self.rng);
            let mut surbs = Surbs {
                maker: &mut self.maker,
                made: &mut self.surbs,
                rng: &mut self.rng,
                mean_delay: self.network.mean_delay,
            };
            if !self.client.poll_transmit(self.now, delay, &mut surbs, &mut out) {
                break;
            }
            assert!(out.len() <= MAX_PACKET_BYTES);
            self.dispatch(0, delay, Arrival::Packet(out.clone()));
        }
        let id = self.client.id();
        loop {
            if self.free_at[1] > self.now + self.network.spacing * 16 {
                break;
            }
            let Some(session) = self.sessions.get_mut(id) else { break };
            let Some(surb) = session.poll_transmit(self.now, &mut out) else { break };
            assert!(out.len() <= MAX_PACKET_BYTES);
            self.send_reply(&surb, out.clone());
        }
    }

    fn send_reply(&mut self, surb: &mixsocks_sphinx::Surb, contents: Vec<u8>) {
        let mut id = [0u8; 8];
        id.copy_from_slice(&surb.as_bytes()[348..356]);
        let surb = u64::from_be_bytes(id);
        if self.dead_surbs.contains(&surb) {
            return;
        }
        let delay = self.surbs[&surb];
        self.dispatch(1, delay, Arrival::Reply { surb, contents });
    }

    /// Goes to the next thing that happens; `false` when nothing ever will.
    fn step(&mut self) -> bool {
        self.transmit();
        let id = self.client.id();
        let links = self.free_at.into_iter().filter(|at| *at > self.now);
        // Who is overdue wants to send, and waits for its link.
        let free_at = self.free_at;
        let wait =
            |at: Instant, link: usize| if at > self.now { at } else { free_at[link].max(at) };
        let session = self.sessions.get_mut(id);
        let next = [
            self.arrivals.peek().map(|Reverse((at, _, _))| *at),
            self.maker.done_at,
            self.client.poll_timeout().map(|at| wait(at, 0)),
            session.and_then(|session| session.poll_timeout()).map(|at| wait(at, 1)),
            self.alarm.take_if(|at| *at > self.now),
        ];
        let Some(next) = next.into_iter().flatten().chain(links).min() else { return false };
        self.now = self.now.max(next);
        while let Some(Reverse((at, _, _))) = self.arrivals.peek()
            && *at <= self.now
        {
            let Reverse((_, _, UnderWay { direction, number, arrival })) =
                self.arrivals.pop().unwrap();
            let latest = &mut self.latest[direction];
            *latest = number.max(*latest);
            self.overtook[direction] = self.overtook[direction].max(*latest - number);
            self.arrive(arrival);
        }
        if self.client.poll_timeout().is_some_and(|at| at <= self.now) {
            self.client.handle_timeout(self.now);
        }
        let now = self.now;
        if let Some(session) = self.sessions.get_mut(id)
            && session.poll_timeout().is_some_and(|at| at <= now)
        {
            session.handle_timeout(now);
        }
        while let Some(event) = self.client.poll_event() {
            self.client_events.push(event);
        }
        if let Some(session) = self.sessions.get_mut(id) {
            while let Some(event) = session.poll_event() {
                self.provider_events.push(event);
            }
        }
        true
    }

    fn arrive(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Packet(contents) => {
                let wall_ms = 1_000_000 + u64::try_from(self.elapsed().as_millis()).unwrap();
                match self.sessions.handle_packet(self.now, wall_ms, &contents) {
                    Handled::Refused { contents, surb, .. } => self.send_reply(&surb, contents),
                    Handled::Session(_)
                    | Handled::Dropped(
                        Dropped::Packet(PacketError::Duplicate) | Dropped::Refused(_),
                    ) => {}
                    Handled::Dropped(dropped) => panic!("{dropped}"),
                }
            }
            Arrival::Reply { surb, contents } => {
                let delay = self.surbs.remove(&surb).unwrap();
                match self.client.handle_reply(self.now, delay, &contents) {
                    Ok(()) | Err(ReplyError::Duplicate) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    /// All SURBs that the provider has been given lead to nowhere from now on.
    fn kill_surbs(&mut self) {
        self.dead_surbs.extend(self.surbs.keys());
    }

    fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.alarm = Some(until);
            self.step();
        }
    }

    fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) {
        while !done(self) {
            assert!(self.step(), "nothing happens any more");
            assert!(self.elapsed() < limit, "not done after {limit:?}");
        }
    }

    fn open(&mut self) -> StreamId {
        let stream = self.client.open("example.com:80".parse().unwrap()).unwrap();
        self.run_until(Duration::from_secs(30), |world| {
            let mut opened = Vec::new();
            world.provider_events.retain(|event| match event {
                StreamEvent::Open { stream, .. } => {
                    opened.push(*stream);
                    false
                }
                _ => true,
            });
            for stream in opened {
                world.provider().opened(stream, OpenOutcome::Connected);
            }
            world
                .client_events
                .contains(&StreamEvent::Opened { stream, outcome: OpenOutcome::Connected })
        });
        stream
    }
}

fn pattern(stream: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|n| ((n * 31 + stream * 7 + (n >> 8)) % 251) as u8).collect()
}

/// Sends `len` bytes in each of `streams` streams, up or down, and checks them.
fn transfer(
    world: &mut World,
    streams: usize,
    len: usize,
    down: bool,
    limit: Duration,
) -> Duration {
    let ids: Vec<StreamId> = (0..streams).map(|_| world.open()).collect();
    let began = world.now;
    let mut written: BTreeMap<StreamId, usize> = ids.iter().map(|id| (*id, 0)).collect();
    let mut read: BTreeMap<StreamId, Vec<u8>> = ids.iter().map(|id| (*id, Vec::new())).collect();
    let bytes: BTreeMap<StreamId, Vec<u8>> =
        ids.iter().map(|id| (*id, pattern(*id, len))).collect();
    let mut chunk = vec![0u8; 65536];
    let mut ended = 0;
    world.run_until(limit, |world| {
        for &id in &ids {
            let done = written.get_mut(&id).unwrap();
            if *done <= len {
                let rest = &bytes[&id][*done..];
                if !rest.is_empty() {
                    let taken = if down {
                        world.provider().write(id, rest)
                    } else {
                        world.client.write(id, rest)
                    };
                    *done += taken.unwrap();
                }
                if *done == len {
                    if down {
                        world.provider().finish(id)
                    } else {
                        world.client.finish(id)
                    }
                    *done += 1;
                }
            }
            loop {
                let result = if down {
                    world.client.read(id, &mut chunk)
                } else {
                    world.provider().read(id, &mut chunk)
                };
                match result.unwrap() {
                    Some(0) => {
                        if read[&id].len() == len {
                            read.get_mut(&id).unwrap().push(0);
                            ended += 1;
                        }
                        break;
                    }
                    Some(n) => read.get_mut(&id).unwrap().extend_from_slice(&chunk[..n]),
                    None => break,
                }
            }
        }
        ended == streams
    });
    for id in ids {
        assert!(read[&id][..len] == bytes[&id][..], "stream {id} has other bytes");
    }
    world.now - began
}

#[test]
fn a_download_and_an_upload_arrive() {
    for down in [true, false] {
        let mut world = World::new(1, Network::perfect());
        let time = transfer(&mut world, 1, 4 << 20, down, Duration::from_secs(60));
        let rate = 4.0 / time.as_secs_f64();
        let packets = (4 << 20) as f64 / 2000.0;
        let extra = world.sent[usize::from(down)] as f64 / packets;
        println!(
            "down {down}: {rate:.1} MiB/s, {extra:.2} packets per packet of data, {:?}",
            world.sent
        );
        assert!(rate > 2.0, "{rate} MiB/s of 9.5 that the path carries");
        assert!(extra < 1.2, "{extra} packets for each that is needed");
    }
}

#[test]
fn bytes_are_right_with_loss() {
    for (seed, loss) in [(1, 0.01), (2, 0.05), (3, 0.2)] {
        for down in [true, false] {
            let mut world = World::new(seed, Network { loss, ..Network::perfect() });
            let time = transfer(&mut world, 3, 500_000, down, Duration::from_secs(300));
            println!(
                "loss {loss} down {down}: {time:?}, sent {:?} lost {:?}",
                world.sent, world.lost
            );
        }
    }
}

#[test]
fn thousands_of_packets_overtake_each_other() {
    let network = Network {
        mean_delay: Duration::from_millis(400),
        spacing: Duration::from_micros(50),
        ..Network::perfect()
    };
    for down in [true, false] {
        let mut world = World::new(5, network);
        let time = transfer(&mut world, 4, 3 << 20, down, Duration::from_secs(300));
        println!("down {down}: {time:?}");
    }
}

/// More than are ever in flight: those that are held up are long given up, and mean nothing when they
/// come.
#[test]
fn packets_are_overtaken_by_more_than_ten_thousand() {
    let network = Network { held_up: 0.01, ..Network::perfect() };
    for down in [true, false] {
        let mut world = World::new(6, network);
        let time = transfer(&mut world, 1, 64 << 20, down, Duration::from_secs(300));
        println!("down {down}: {time:?}, overtaken by {:?}", world.overtook);
        assert!(world.overtook[usize::from(down)] > 10_000, "{:?}", world.overtook);
    }
}

#[test]
fn an_idle_session_falls_silent() {
    let mut world = World::new(9, Network::perfect());
    let stream = world.open();
    world.client.write(stream, b"request").unwrap();
    world.run_until(Duration::from_secs(30), |world| {
        world.provider_events.contains(&StreamEvent::Readable(stream))
    });
    // What is left to do is done, also the SURBs that are being made: fewer than five are not worth a
    // packet.
    let rest = |world: &mut World| {
        world.run_until(20 * KEEPALIVE, |world| {
            world.transmit();
            world.client.surb_demand() < 5
                && world.maker.done_at.is_none()
                && world.arrivals.is_empty()
                && world.client.poll_timeout().is_none_or(|at| at > world.now + FIRST_KEEPALIVE / 2)
        });
        world.client.poll_timeout().expect("a stream is open")
    };
    // Keepalives are asked and answered, each after twice the silence before it.
    let mut asks_at = rest(&mut world);
    let mut silence = FIRST_KEEPALIVE;
    for _ in 0..10 {
        let before = world.sent;
        while world.now < asks_at {
            assert_eq!(world.sent, before, "an idle session talks");
            world.step();
        }
        let next = rest(&mut world);
        for (sent, before) in world.sent.into_iter().zip(before) {
            assert!((1..=2).contains(&(sent - before)), "{sent} {before}");
        }
        silence = (2 * silence).min(KEEPALIVE);
        let pause = next - asks_at;
        assert!((silence..silence + Duration::from_secs(2)).contains(&pause), "{pause:?}");
        asks_at = next;
    }
    assert_eq!(silence, KEEPALIVE);
    // What is said begins it anew.
    world.client.write(stream, b"more").unwrap();
    world.step();
    assert!(rest(&mut world) <= world.now + FIRST_KEEPALIVE);
}

/// After a download nobody fills the stock up for nothing.
#[test]
fn an_unused_session_needs_few_surbs() {
    let mut world = World::new(19, Network::perfect());
    let stream = world.open();
    let block = vec![1u8; 1 << 20];
    let mut chunk = vec![0u8; 1 << 16];
    let until = world.now + Duration::from_secs(3);
    world.run_until(Duration::from_secs(60), |world| {
        world.provider().write(stream, &block).unwrap();
        while let Some(1..) = world.client.read(stream, &mut chunk).unwrap() {}
        world.now >= until
    });
    world.client.release(stream);
    let before = world.sent[0];
    let until = world.now + Duration::from_secs(10);
    while world.now < until && world.step() {}
    assert_eq!(world.client.stream_count(), 0);
    // What is under way when it ends is acknowledged; without the rule it is 80 packets.
    assert!(world.sent[0] - before < 40, "{} packets", world.sent[0] - before);
}

#[test]
fn a_stalled_reader_stops_its_sender_and_nobody_else() {
    let mut world = World::new(13, Network::perfect());
    let stalled = world.open();
    let bytes = vec![1u8; 8 << 20];
    let mut written = world.provider().write(stalled, &bytes).unwrap();
    transfer(&mut world, 1, 1 << 20, true, Duration::from_secs(60));
    written += world.provider().write(stalled, &bytes).unwrap();
    // Its first bytes may have come out of order, so that the window grew before it was stalled.
    assert!(written as u64 <= SEND_AHEAD_BYTES + 4 * INITIAL_WINDOW_BYTES, "{written}");
}

#[test]
fn half_closes_and_resets_carry_through() {
    let mut world = World::new(17, Network::perfect());
    let stream = world.open();
    world.client.write(stream, b"ask").unwrap();
    world.client.finish(stream);
    let mut chunk = [0u8; 100];
    let mut asked = Vec::new();
    world.run_until(Duration::from_secs(30), |world| {
        while let Some(n) = world.provider().read(stream, &mut chunk).unwrap() {
            if n == 0 {
                return true;
            }
            asked.extend_from_slice(&chunk[..n]);
        }
        false
    });
    assert_eq!(asked, b"ask");
    // The answer comes long after the client's end.
    let later = world.now + Duration::from_secs(60);
    while world.step() && world.now < later {}
    world.provider().write(stream, b"answer").unwrap();
    world.provider().release(stream);
    world.run_until(Duration::from_secs(1000), |world| {
        world.client_events.contains(&StreamEvent::Reset(stream))
    });
    assert_eq!(world.client.read(stream, &mut chunk), Err(StreamReset));
    world.client.release(stream);
    let later = world.now + Duration::from_secs(5);
    while world.step() && world.now < later {}
    assert_eq!(world.client.stream_count(), 0);
}

#[test]
fn failed_opens_tell_why() {
    let mut world = World::new(19, Network { loss: 0.3, ..Network::perfect() });
    let stream = world.client.open("nowhere.invalid:80".parse().unwrap()).unwrap();
    world.run_until(Duration::from_secs(60), |world| {
        if let Some(StreamEvent::Open { stream, .. }) = world.provider_events.pop() {
            world.provider().opened(stream, OpenOutcome::HostUnreachable);
            world.provider().release(stream);
        }
        world
            .client_events
            .contains(&StreamEvent::Opened { stream, outcome: OpenOutcome::HostUnreachable })
    });
    world.client.release(stream);
    assert_eq!(world.client.stream_count(), 0);
}

#[test]
fn a_closed_session_is_forgotten_and_not_begun_again() {
    let mut world = World::new(23, Network::perfect());
    world.open();
    world.client.close();
    world.run_until(Duration::from_secs(30), |world| world.client.closed().is_some());
    let id = world.client.id();
    assert!(world.sessions.get_mut(id).unwrap().has_ended());
    let now = world.now;
    world.sessions.remove(id, now);
    // A replay of the first packet must not open the stream again.
    let mut replay = Vec::new();
    let mut copy = ClientSession::new(id, 1_000_000, now, MAX_PACKET_BYTES, MEAN_DELAY);
    copy.open("example.com:80".parse().unwrap()).unwrap();
    world.maker.ready = [now; 10].into();
    let mut surbs = Surbs {
        maker: &mut world.maker,
        made: &mut world.surbs,
        rng: &mut world.rng,
        mean_delay: MEAN_DELAY,
    };
    assert!(copy.poll_transmit(now, Duration::ZERO, &mut surbs, &mut replay));
    let handled = world.sessions.handle_packet(now, 1_001_000, &replay);
    assert!(
        matches!(handled, Handled::Refused { reason: frame::CloseReason::Unknown, .. }),
        "{handled:?}"
    );
}

#[test]
fn starts_of_another_time_are_refused() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::new(1_000_000, MAX_PACKET_BYTES, MEAN_DELAY);
    // One that has been there for long judges by the age alone.
    let mut old = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    for (started_ms, taken) in [(880_000, true), (879_999, false)] {
        let packet = first_packet_of(9, started_ms, now, open_one);
        let handled = old.handle_packet(now, 1_000_000, &packet);
        assert_eq!(matches!(handled, Handled::Session(_)), taken, "{started_ms}: {handled:?}");
        old = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    }
    for (id, started_ms, taken) in
        [(1, 1_000_000, true), (2, 999_999, false), (3, 1_130_001, false), (4, 1_130_000, true)]
    {
        let packet = first_packet_of(id, started_ms, now, open_one);
        let handled = sessions.handle_packet(now, 1_000_000, &packet);
        assert_eq!(matches!(handled, Handled::Session(_)), taken, "{started_ms}: {handled:?}");
    }
}

/// A packet that begins session `id` and does nothing in it but what `prepare` says.
fn first_packet(id: u16, now: Instant, prepare: impl FnOnce(&mut ClientSession)) -> Vec<u8> {
    first_packet_of(id, 1_000_000, now, prepare)
}

fn first_packet_of(
    id: u16,
    started_ms: u64,
    now: Instant,
    prepare: impl FnOnce(&mut ClientSession),
) -> Vec<u8> {
    let mut bytes = [0; SESSION_ID_LEN];
    bytes[..2].copy_from_slice(&id.to_be_bytes());
    let id = client::SessionId(bytes);
    let mut session = ClientSession::new(id, started_ms, now, MAX_PACKET_BYTES, MEAN_DELAY);
    prepare(&mut session);
    let (mut made, mut rng, mut out) = (HashMap::new(), StdRng::seed_from_u64(1), Vec::new());
    let mut maker = Maker { ready: [now; 10].into(), done_at: None };
    let mut surbs =
        Surbs { maker: &mut maker, made: &mut made, rng: &mut rng, mean_delay: MEAN_DELAY };
    assert!(session.poll_transmit(now, Duration::ZERO, &mut surbs, &mut out));
    out
}

fn open_one(session: &mut ClientSession) {
    session.open("example.com:80".parse().unwrap()).unwrap();
}

/// Sessions that nobody uses do not keep others out, and those with streams stay.
#[test]
fn a_full_provider_forgets_idle_sessions_only() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::with_limits(0, MAX_PACKET_BYTES, MEAN_DELAY, 3, 5);
    let mut begin = |id, seconds, prepare: fn(&mut ClientSession)| {
        let at = now + Duration::from_secs(seconds);
        sessions.handle_packet(at, 1_000_000, &first_packet(id, now, prepare))
    };
    let refused = |handled: &Handled| {
        matches!(handled, Handled::Refused { reason: frame::CloseReason::Full, .. })
    };
    assert!(matches!(begin(1, 0, open_one), Handled::Session(_)));
    // It has no stream: its packet says only that it is there.
    assert!(matches!(begin(2, 1, ClientSession::ping), Handled::Session(_)));
    assert!(matches!(begin(3, 2, ClientSession::ping), Handled::Session(_)));
    assert!(matches!(begin(4, 3, open_one), Handled::Session(_)), "2 was put out");
    assert!(matches!(begin(5, 4, open_one), Handled::Session(_)), "3 was put out");
    assert!(refused(&begin(6, 5, open_one)), "1, 4 and 5 have streams");
    let again = begin(2, 6, ClientSession::ping);
    assert!(matches!(again, Handled::Refused { reason: frame::CloseReason::Unknown, .. }));
}

#[test]
fn ended_sessions_are_remembered_up_to_a_bound_and_for_a_while() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::with_limits(0, MAX_PACKET_BYTES, MEAN_DELAY, 10, 3);
    for id in 0..3 {
        let packet = first_packet(id, now, open_one);
        let Handled::Session(id) = sessions.handle_packet(now, 1_000_000, &packet) else {
            panic!("session {id} did not begin")
        };
        sessions.remove(id, now);
    }
    let packet = first_packet(9, now, open_one);
    let full = sessions.handle_packet(now, 1_000_000, &packet);
    assert!(matches!(full, Handled::Refused { reason: frame::CloseReason::Full, .. }), "{full:?}");
    let later = now + 2 * MAX_START_AGE + 2 * START_STEP;
    assert!(matches!(sessions.handle_packet(later, 1_000_000, &packet), Handled::Session(_)));
}

/// After a restart of the provider, packets of a session from before come in any order: who was told that
/// it is unknown opens its streams in another one, so that they are not opened in this one as well.
#[test]
fn a_session_that_was_told_it_is_unknown_does_not_begin_later() {
    const RESTARTED_MS: u64 = 1_000_000;
    const TAKEN_FOR_MS: u64 = 130_000;
    let now = Instant::now();
    let without_start = |id: u16| {
        let mut packet = vec![PacketKind::Session as u8];
        packet.extend_from_slice(&id.to_be_bytes());
        packet.resize(1 + SESSION_ID_LEN, 0);
        packet.extend_from_slice(&[9, 0]);
        packet
    };
    // A START later than the longest span is of a session that began after the restart.
    for (after_ms, started_ms, is_told_the_truth) in [
        (0, RESTARTED_MS + 10_000, true),
        (TAKEN_FOR_MS, RESTARTED_MS + 10_000, true),
        (TAKEN_FOR_MS + 1, RESTARTED_MS + 20_000, false),
    ] {
        let mut sessions =
            ProviderSessions::with_limits(RESTARTED_MS, MAX_PACKET_BYTES, MEAN_DELAY, 10, 8);
        let wall_ms = RESTARTED_MS + after_ms;
        let mut handle = |packet: &[u8]| sessions.handle_packet(now, wall_ms, packet);
        for id in 1..=6 {
            let handled = handle(&without_start(id));
            let unknown = Dropped::Refused(frame::CloseReason::Unknown);
            assert!(matches!(&handled, Handled::Dropped(why) if *why == unknown), "{handled:?}");
        }
        // Half of what may be remembered is left for sessions that end.
        let begins: Vec<_> = (1..=6)
            .map(|id| handle(&first_packet_of(id, started_ms, now, open_one)))
            .map(|handled| matches!(handled, Handled::Session(_)))
            .collect();
        let expected: Vec<_> = (1..=6).map(|id| !is_told_the_truth || id > 4).collect();
        assert_eq!(begins, expected, "{after_ms} ms after the start");
    }
}

#[test]
fn start_times_tell_little_about_clocks() {
    assert_eq!(start_time_ms(1_000_001), 1_010_000);
    assert_eq!(start_time_ms(1_009_999), 1_010_000);
    assert_eq!(start_time_ms(1_010_000), 1_010_000);
}

/// The provider was restarted after so many replies that no number is new to the client.
#[test]
fn a_restarted_provider_is_understood_at_any_time() {
    let mut world = World::new(31, Network::perfect());
    world.open();
    let mut reply = vec![PacketKind::Reply as u8];
    frame::put_varint(&mut reply, MAX_NUMBER_SPAN - 1);
    frame::put_varint(&mut reply, 0);
    reply.extend_from_slice(&[0; 4]);
    world.client.handle_reply(world.now, Duration::ZERO, &reply).unwrap();
    world.sessions = ProviderSessions::new(1_000_100, MAX_PACKET_BYTES, MEAN_DELAY);
    world.client.open("example.com:80".parse().unwrap()).unwrap();
    world.run_until(Duration::from_secs(60), |world| world.client.closed().is_some());
    assert_eq!(world.client.closed(), Some(frame::CloseReason::Unknown));
}

/// One stream gets what a path of 5,000 packets per second carries, start-up included, and sends
/// little that is not needed.
#[test]
fn loss_costs_little_more_than_what_is_lost() {
    const MIB: usize = 100;
    for (loss, share) in [(0.0, 0.93), (0.01, 0.90), (0.05, 0.85)] {
        for down in [true, false] {
            let mut world = World::new(77, Network { loss, ..Network::perfect() });
            let time = transfer(&mut world, 1, MIB << 20, down, Duration::from_secs(120));
            let direction = usize::from(down);
            let needed = (MIB << 20) as f64 / 2000.0;
            let carried = 5000.0 * time.as_secs_f64() * (1.0 - loss);
            let arrived = (world.sent[direction] - world.lost[direction]) as f64;
            let (rate, extra) = (needed / carried, arrived / needed);
            println!(
                "loss {loss} down {down}: {rate:.3} of the path, {extra:.3} of what is needed"
            );
            assert!(rate >= share, "{rate} of what the path carries");
            assert!(extra <= 1.03, "{extra} packets for each that is needed");
        }
    }
}
