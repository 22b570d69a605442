//! The session core alone: packets in and out per second of one core, without cryptography; and what
//! an acknowledgement costs by the number of packets in flight.
//!
//! `cargo bench -p mixsocks-common --bench session`

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mixsocks_common::session::frame::{Ack, Frame, StreamId, VARINT_END, put_varint, varint_len};
use mixsocks_common::session::{
    ACK_AFTER_PACKETS, ClientSession, Handled, OpenOutcome, PacketKind, ProviderSessions, RangeSet,
    SessionId, StreamEvent, SurbSource,
};
use mixsocks_sphinx::SURB_LEN;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

const PACKET_BYTES: usize = 2031;
const DELAY: Duration = Duration::from_millis(45);
/// Packets of each direction that are exchanged at a time: they overtake each other.
const TURN: Duration = Duration::from_millis(5);
const WALL_MS: u64 = 1_000_000;

struct Surbs([u8; SURB_LEN]);

impl SurbSource for Surbs {
    fn available(&self) -> usize {
        64
    }

    fn write_surb(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
}

/// Both ends, with packets under way for as long as three mixes hold them.
struct Pair {
    now: Instant,
    client: ClientSession,
    sessions: ProviderSessions,
    surbs: Surbs,
    rng: StdRng,
    /// Due time, whether for the provider, contents.
    under_way: Vec<(Instant, bool, Vec<u8>)>,
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
            under_way: Vec::new(),
            spare: Vec::new(),
            packets: 0,
        }
    }

    fn turn(&mut self) {
        self.now += TURN;
        let now = self.now;
        let (mut due, under_way): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.under_way).into_iter().partition(|packet| packet.0 <= now);
        self.under_way = under_way;
        due.shuffle(&mut self.rng);
        for (_, to_provider, contents) in due {
            self.packets += 1;
            if to_provider {
                black_box(self.sessions.handle_packet(now, WALL_MS, &contents));
            } else {
                let _ = black_box(self.client.handle_reply(now, DELAY, &contents));
            }
            self.spare.push(contents);
        }
        if self.client.poll_timeout().is_some_and(|at| at <= now) {
            self.client.handle_timeout(now);
        }
        loop {
            let mut out = self.spare.pop().unwrap_or_default();
            if !self.client.poll_transmit(now, DELAY, &mut self.surbs, &mut out) {
                break;
            }
            self.packets += 1;
            self.under_way.push((now + DELAY, true, out));
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
            let jitter = Duration::from_micros(self.rng.random_range(0..20_000));
            self.under_way.push((now + DELAY - jitter, false, out));
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
            bencher.iter(|| pair.transfer(stream, down, PACKETS));
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
    /// Bytes of the ranges of one ACK: as many as fit beside its other fields.
    const RANGE_BYTES: usize = 1950;

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
            Frame::Start { time_ms: WALL_MS, key_agreement: &[] },
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
        let first = self.resume;
        let (mut ranges, mut bytes, mut end) = (Vec::new(), 0, first);
        self.resume = self.received.first().filter(|range| range.start == 0).map_or(0, |r| r.end);
        for range in self.received.iter_from(first) {
            let range = range.start.max(first)..range.end;
            bytes += varint_len(range.start - end) + varint_len(range.end - range.start);
            if bytes > Self::RANGE_BYTES {
                self.resume = end;
                break;
            }
            end = range.end;
            ranges.push(range);
        }
        let ack = Ack { latest, delay_us: 0, first, end, settled: first, ranges };
        self.packet(&[Frame::Ack(ack)])
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
                    let start = Instant::now();
                    in_flight.handle(black_box(&contents));
                    let took = start.elapsed();
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
    group.finish();
}

criterion_group!(benches, transfers, acknowledgements);
criterion_main!(benches);
