//! The session core alone: packets in and out per second of one core, without cryptography.
//!
//! `cargo bench -p mixsocks-common --bench session`

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mixsocks_common::session::frame::StreamId;
use mixsocks_common::session::{
    ClientSession, OpenOutcome, ProviderSessions, SessionId, StreamEvent, SurbSource,
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

criterion_group!(benches, transfers);
criterion_main!(benches);
