//! The session core alone: packets in and out per second of one core, without cryptography; and what
//! an acknowledgement costs by the number of packets in flight. What counts is the time of the CPU, so
//! that other work of the machine disturbs little.
//!
//! `cargo bench -p mixsocks-common --bench session`

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mixsocks_common::session::frame::{
    Ack, Frame, StreamId, VARINT_END, put_varint, take_varint, varint_len,
};
use mixsocks_common::session::{
    ACK_AFTER_PACKETS, ClientSession, Handled, OpenOutcome, PacketKind, ProviderSessions, RangeSet,
    SESSION_ID_LEN, SessionId, StreamEvent, SurbSource,
};
use mixsocks_sphinx::SURB_LEN;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rustix::time::{ClockId, clock_gettime};

const PACKET_BYTES: usize = 2031;
const DELAY: Duration = Duration::from_millis(45);
/// Packets of each direction that are exchanged at a time: they overtake each other.
const TURN: Duration = Duration::from_millis(5);
/// Turns that a packet is under way.
const TURNS: usize = 9;
const _: () = assert!(TURNS as u128 * TURN.as_millis() == DELAY.as_millis());
const WALL_MS: u64 = 1_000_000;
/// Bytes of the ranges of one ACK: as many as fit beside its other fields.
const ACK_RANGE_BYTES: usize = 1950;

/// How much CPU time `work` takes.
fn cpu_time(work: impl FnOnce()) -> Duration {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("it is positive");
    let start = now();
    work();
    now() - start
}

struct Surbs([u8; SURB_LEN]);

impl SurbSource for Surbs {
    fn available(&self) -> usize {
        64
    }

    fn write_surb(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
}

struct NoSurbs;

impl SurbSource for NoSurbs {
    fn available(&self) -> usize {
        0
    }

    fn write_surb(&mut self, _: &mut Vec<u8>) {
        unreachable!("there is none");
    }
}

/// Both ends, with packets under way for as long as three mixes hold them.
struct Pair {
    now: Instant,
    client: ClientSession,
    sessions: ProviderSessions,
    surbs: Surbs,
    rng: StdRng,
    /// What arrives in each of the next turns: whether for the provider, and contents.
    under_way: VecDeque<Vec<(bool, Vec<u8>)>>,
    spare: Vec<Vec<u8>>,
    /// Packets in and out of both cores.
    packets: u64,
}

impl Pair {
    fn new() -> Self {
        let now = Instant::now();
        let mut surb = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        surb[0] = 9;
        let mean = DELAY / 3;
        Self {
            now,
            client: ClientSession::new(SessionId([7; 16]), WALL_MS, now, PACKET_BYTES, mean),
            sessions: ProviderSessions::new(0, PACKET_BYTES, mean),
            surbs: Surbs(surb),
            rng: StdRng::seed_from_u64(1),
            under_way: vec![Vec::new(); TURNS].into(),
            spare: Vec::new(),
            packets: 0,
        }
    }

    fn turn(&mut self) {
        self.now += TURN;
        let now = self.now;
        let mut due = self.under_way.pop_front().expect("there is always one for each turn");
        due.shuffle(&mut self.rng);
        for (to_provider, contents) in due.drain(..) {
            self.packets += 1;
            if to_provider {
                black_box(self.sessions.handle_packet(now, WALL_MS, &contents));
            } else {
                let _ = black_box(self.client.handle_reply(now, DELAY, &contents));
            }
            self.spare.push(contents);
        }
        self.under_way.push_back(due);
        if self.client.poll_timeout().is_some_and(|at| at <= now) {
            self.client.handle_timeout(now);
        }
        loop {
            let mut out = self.spare.pop().unwrap_or_default();
            if !self.client.poll_transmit(now, DELAY, &mut self.surbs, &mut out) {
                break;
            }
            self.packets += 1;
            self.under_way[TURNS - 1].push((true, out));
        }
        let Some(session) = self.sessions.get_mut(self.client.id()) else { return };
        if session.poll_timeout().is_some_and(|at| at <= now) {
            session.handle_timeout(now);
        }
        loop {
            let mut out = self.spare.pop().unwrap_or_default();
            if session.poll_transmit(now, &mut out).is_none() {
                break;
            }
            self.packets += 1;
            // Replies vary a little, so that they come out of order.
            let turns = self.rng.random_range(TURNS - 4..TURNS);
            self.under_way[turns].push((false, out));
        }
        while self.client.poll_event().is_some() {}
        while let Some(event) = session.poll_event() {
            if let StreamEvent::Open { stream, .. } = event {
                session.opened(stream, OpenOutcome::Connected);
            }
        }
    }

    fn open(&mut self) -> StreamId {
        let target = "192.0.2.1:80".parse().expect("a good target");
        let stream = self.client.open(target).expect("a fresh session");
        (0..100).for_each(|_| self.turn());
        stream
    }

    fn transfer(&mut self, stream: StreamId, down: bool, packets: u64) {
        static BLOCK: [u8; 1 << 16] = [7; 1 << 16];
        let mut chunk = vec![0; 1 << 16];
        let until = self.packets + packets;
        while self.packets < until {
            let session = self.sessions.get_mut(self.client.id()).expect("it has begun");
            loop {
                let written = if down {
                    session.write(stream, &BLOCK)
                } else {
                    self.client.write(stream, &BLOCK)
                };
                if written != Some(BLOCK.len()) {
                    break;
                }
            }
            loop {
                let read = if down {
                    self.client.read(stream, &mut chunk)
                } else {
                    session.read(stream, &mut chunk)
                };
                if !matches!(read, Ok(Some(1..))) {
                    break;
                }
            }
            self.turn();
        }
    }
}

fn transfers(criterion: &mut Criterion) {
    const PACKETS: u64 = 20_000;
    let mut group = criterion.benchmark_group("session");
    group.throughput(Throughput::Elements(PACKETS));
    for (name, down) in [("download", true), ("upload", false)] {
        group.bench_function(name, |bencher| {
            let mut pair = Pair::new();
            let stream = pair.open();
            pair.transfer(stream, down, PACKETS);
            bencher.iter_custom(|rounds| {
                cpu_time(|| (0..rounds).for_each(|_| pair.transfer(stream, down, PACKETS)))
            });
        });
    }
    group.finish();
}

/// A provider with packets in flight, of which a client of our own making acknowledges some at a time.
struct InFlight {
    now: Instant,
    sessions: ProviderSessions,
    /// Number of the client's next packet.
    number: u64,
    numbers: VecDeque<u64>,
    /// What the client has received, and where its next ACK begins.
    received: RangeSet,
    resume: u64,
    rng: StdRng,
}

impl InFlight {
    const ID: SessionId = SessionId([7; 16]);
    const STREAM: StreamId = 1;

    fn new(packets: usize) -> Self {
        let now = Instant::now();
        let mut this = Self {
            now,
            sessions: ProviderSessions::new(0, PACKET_BYTES, DELAY / 3),
            number: 0,
            numbers: VecDeque::new(),
            received: RangeSet::new(),
            resume: 0,
            rng: StdRng::seed_from_u64(1),
        };
        let stream = Self::STREAM;
        let target = "192.0.2.1:80".parse().expect("a good target");
        let contents = this.packet(&[
            Frame::Start { time_ms: WALL_MS, access_token: None, key_agreement: &[] },
            Frame::Open { stream, target },
            Frame::Credit { stream, limit: VARINT_END - 1 },
        ]);
        this.handle(&contents);
        let session = this.sessions.get_mut(Self::ID).expect("it has begun");
        session.opened(stream, OpenOutcome::Connected);
        (0..packets as u64).for_each(|number| this.send(number));
        this
    }

    fn packet(&mut self, frames: &[Frame<'_>]) -> Vec<u8> {
        let mut out = vec![PacketKind::Session as u8];
        out.extend(Self::ID.0);
        put_varint(&mut out, self.number);
        put_varint(&mut out, 0);
        self.number += 1;
        frames.iter().for_each(|frame| frame.encode(&mut out));
        out
    }

    fn handle(&mut self, contents: &[u8]) {
        let handled = self.sessions.handle_packet(self.now, WALL_MS, contents);
        assert!(matches!(handled, Handled::Session(_)), "{handled:?}");
    }

    /// The provider sends packet `number`, with one byte of the stream.
    fn send(&mut self, number: u64) {
        if self.sessions.get_mut(Self::ID).is_some_and(|session| session.stock_surbs() < 16) {
            let mut surb = [0; SURB_LEN];
            surb[0] = 9;
            let contents = self.packet(&[Frame::Surbs { generation: 0, surbs: &[surb; 5] }]);
            self.handle(&contents);
            return self.send(number);
        }
        let session = self.sessions.get_mut(Self::ID).expect("it has begun");
        assert_eq!(session.write(Self::STREAM, &[7]), Some(1));
        session.poll_transmit(self.now, &mut Vec::new()).expect("there are SURBs");
        self.numbers.push_back(number);
    }

    /// The packet that acknowledges 64 more, the oldest ones or any of them.
    fn ack(&mut self, any: bool) -> Vec<u8> {
        let count = ACK_AFTER_PACKETS.min(u32::try_from(self.numbers.len()).unwrap_or(u32::MAX));
        let mut latest = 0;
        for _ in 0..count {
            let index = if any { self.rng.random_range(0..self.numbers.len()) } else { 0 };
            self.numbers.swap(0, index);
            latest = self.numbers.pop_front().expect("as many as are counted");
            self.received.insert(latest..latest + 1);
        }
        let ack = next_ack(&self.received, &mut self.resume, latest);
        self.packet(&[Frame::Ack(ack)])
    }
}

/// The ACK that goes on where the last one ended, and begins anew when all was told.
fn next_ack(received: &RangeSet, resume: &mut u64, latest: u64) -> Ack {
    let first = *resume;
    let (mut ranges, mut bytes, mut end) = (Vec::new(), 0, first);
    *resume = received.first().filter(|range| range.start == 0).map_or(0, |range| range.end);
    for range in received.iter_from(first) {
        let range = range.start.max(first)..range.end;
        bytes += varint_len(range.start - end) + varint_len(range.end - range.start);
        if bytes > ACK_RANGE_BYTES {
            *resume = end;
            break;
        }
        end = range.end;
        ranges.push(range);
    }
    Ack { latest, delay_us: 0, first, end, settled: first, ranges }
}

/// A client with packets in flight to a provider of our own making, which acknowledges 64 at a time.
/// Packets and ACKs take as long as three mixes hold them.
struct Uplink {
    start: Instant,
    now: Instant,
    client: ClientSession,
    stream: StreamId,
    under_way: BinaryHeap<Reverse<(Instant, u64)>>,
    /// When an ACK arrives, the delays of its SURB, and the contents of its reply.
    acks: BinaryHeap<Reverse<(Instant, Duration, Vec<u8>)>>,
    /// Packets that were sent, and packets that the client has been told about.
    sent: u64,
    told: u64,
    replies: u64,
    received: RangeSet,
    resume: u64,
    rng: StdRng,
}

impl Uplink {
    fn new() -> Self {
        let now = Instant::now();
        let mut client =
            ClientSession::new(SessionId([7; 16]), WALL_MS, now, PACKET_BYTES, DELAY / 3);
        let stream = client.open("192.0.2.1:80".parse().expect("a good target"));
        let mut this = Self {
            start: now,
            now,
            client,
            stream: stream.expect("a fresh session"),
            under_way: BinaryHeap::new(),
            acks: BinaryHeap::new(),
            sent: 0,
            told: 0,
            replies: 0,
            received: RangeSet::new(),
            resume: 0,
            rng: StdRng::seed_from_u64(1),
        };
        let credit = Frame::Credit { stream: this.stream, limit: VARINT_END - 1 };
        let contents = this.reply(&credit);
        this.client.handle_reply(now, DELAY, &contents).expect("a good reply");
        this
    }

    fn trip(&mut self) -> Duration {
        (0..3).map(|_| (DELAY / 3).mul_f64(-(1.0 - self.rng.random::<f64>()).ln())).sum()
    }

    fn reply(&mut self, frame: &Frame<'_>) -> Vec<u8> {
        let mut out = vec![PacketKind::Reply as u8];
        put_varint(&mut out, self.replies);
        put_varint(&mut out, self.replies);
        let sent_us = (self.now - self.start).as_micros() % (1 << 32);
        out.extend(u32::try_from(sent_us).expect("modulo 2^32").to_be_bytes());
        frame.encode(&mut out);
        self.replies += 1;
        out
    }

    /// The client sends until `packets` are in flight, or as many as its window allows.
    fn send(&mut self, packets: u64) {
        let block = [7; 1 << 16];
        let mut out = Vec::new();
        while self.client.write(self.stream, &block) == Some(block.len()) {}
        while self.sent - self.told < packets {
            let delay = self.trip();
            if !self.client.poll_transmit(self.now, delay, &mut NoSurbs, &mut out) {
                break;
            }
            let mut input = &out[1 + SESSION_ID_LEN..];
            let number = take_varint(&mut input).expect("a number");
            let below = take_varint(&mut input).expect("a floor");
            self.received.insert(0..number - below);
            self.under_way.push(Reverse((self.now + delay, number)));
            self.sent += 1;
        }
    }

    /// Time goes on until the provider has received 64 packets; the CPU time of each ACK that the
    /// client has taken meanwhile.
    fn step(&mut self, packets: u64) -> Vec<Duration> {
        self.send(packets);
        let mut latest = 0;
        for _ in 0..ACK_AFTER_PACKETS {
            let Some(Reverse((at, number))) = self.under_way.pop() else { break };
            self.now = self.now.max(at);
            self.received.insert(number..number + 1);
            latest = number;
        }
        let ack = next_ack(&self.received, &mut self.resume, latest);
        let contents = self.reply(&Frame::Ack(ack));
        let delay = self.trip();
        self.acks.push(Reverse((self.now + delay, delay, contents)));
        let mut times = Vec::new();
        while let Some(Reverse((at, ..))) = self.acks.peek()
            && (*at <= self.now || self.under_way.is_empty())
        {
            let Reverse((at, delay, contents)) = self.acks.pop().expect("looked at above");
            self.now = self.now.max(at);
            let (now, client) = (self.now, &mut self.client);
            times.push(cpu_time(|| {
                client.handle_reply(now, delay, black_box(&contents)).expect("a good reply");
            }));
            self.told += u64::from(ACK_AFTER_PACKETS).min(self.sent - self.told);
        }
        if self.client.poll_timeout().is_some_and(|at| at <= self.now) {
            self.client.handle_timeout(self.now);
        }
        times
    }
}

/// Time for one packet with an ACK of 64 packets. In order it has one range; with any order as many
/// as a packet has room for, most of them known: that is what grows until a packet is full.
fn acknowledgements(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ack");
    for (name, any) in [("in order", false), ("any order", true)] {
        for packets in [10, 100, 1_000, 10_000, 100_000] {
            group.bench_function(BenchmarkId::new(name, packets), |bencher| {
                let mut in_flight = InFlight::new(packets);
                let mut next = packets as u64;
                let mut step = |in_flight: &mut InFlight| {
                    let contents = in_flight.ack(any);
                    let took = cpu_time(|| in_flight.handle(black_box(&contents)));
                    while in_flight.numbers.len() < packets {
                        in_flight.send(next);
                        next += 1;
                    }
                    took
                };
                // Until the order is as mixed as it gets.
                (0..packets / 16).for_each(|_| _ = step(&mut in_flight));
                bencher.iter_custom(|rounds| (0..rounds).map(|_| step(&mut in_flight)).sum());
            });
        }
    }
    // A client judges losses as well; its window lets 2,048 out.
    for packets in [100, 1_000, 2_000] {
        group.bench_function(BenchmarkId::new("client", packets), |bencher| {
            let mut uplink = Uplink::new();
            (0..1_000).for_each(|_| drop(uplink.step(packets)));
            bencher.iter_custom(|rounds| {
                let mut times = Vec::new();
                while (times.len() as u64) < rounds {
                    times.extend(uplink.step(packets));
                }
                times.iter().sum::<Duration>().mul_f64(rounds as f64 / times.len() as f64)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, transfers, acknowledgements);
criterion_main!(benches);
