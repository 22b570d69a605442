//! What packets and SURBs cost: 5 hops, payloads of 2048 bytes; and beside the crate `sphinx-packet`
//! in the same run, for other payloads and batches too.

#![expect(clippy::unwrap_used, reason = "benches")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput};
use mixsocks_sphinx::compare::{Cost, Operation, backend};
use mixsocks_sphinx::{
    Hop, Packet, Payload, Peeled, ReplyRecovery, Route, SecretKey, Surb, build_packets,
    build_surbs, finish, max_plaintext, open_headers, recover_replies, use_surbs,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

const PAYLOAD_LEN: usize = 2048;
const HOPS: usize = 5;
const BATCHES: [usize; 2] = [1, 8];

fn seeded() -> StdRng {
    StdRng::seed_from_u64(1)
}

struct Bench {
    rng: StdRng,
    keys: Vec<SecretKey>,
    route: Route,
    plaintext: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let mut rng = seeded();
        let keys: Vec<_> = (0..HOPS).map(|_| SecretKey::generate(&mut rng)).collect();
        let hops: Vec<_> = keys
            .iter()
            .map(|key| Hop {
                address: [1; 32],
                key: key.public_key(),
                delay: Duration::from_millis(15),
            })
            .collect();
        Self {
            rng,
            keys,
            route: Route::new(&hops, [2; 32], [3; 16]).unwrap(),
            plaintext: vec![4; max_plaintext(PAYLOAD_LEN)],
        }
    }

    fn requests(&self, batch: usize) -> Vec<(Route, &[u8])> {
        vec![(self.route.clone(), &self.plaintext[..]); batch]
    }

    fn packets(&self, batch: usize) -> Vec<Packet> {
        let packets = build_packets(&mut seeded(), PAYLOAD_LEN, &self.requests(batch));
        packets.into_iter().map(Result::unwrap).collect()
    }

    fn surb(&mut self) -> (Surb, ReplyRecovery) {
        build_surbs(&mut self.rng, std::slice::from_ref(&self.route)).remove(0).unwrap()
    }

    /// A reply as it arrives at its creator.
    fn reply(&mut self) -> (ReplyRecovery, Payload) {
        let (surb, recovery) = self.surb();
        let used = use_surbs(PAYLOAD_LEN, vec![(surb, &self.plaintext)]).remove(0);
        let mut packet = used.unwrap().1;
        for key in &self.keys {
            match peel(key, vec![packet]).remove(0) {
                Peeled::Forward { packet: next, .. } => packet = next,
                Peeled::Final { payload, .. } => return (recovery, payload),
            }
        }
        unreachable!("the last hop ends the journey");
    }
}

fn peel(key: &SecretKey, packets: Vec<Packet>) -> Vec<Peeled> {
    let opened = open_headers(key, packets).into_iter().map(Result::unwrap).collect();
    finish(opened).into_iter().map(Result::unwrap).collect()
}

fn bench_packets(criterion: &mut Criterion, bench: &Bench) {
    for batch in BATCHES {
        let mut group = criterion.benchmark_group(format!("batch of {batch}"));
        group.throughput(Throughput::Elements(batch as u64));
        let mut rng = seeded();
        let requests = bench.requests(batch);
        group.bench_function("build_packet", |b| {
            b.iter(|| build_packets(&mut rng, PAYLOAD_LEN, black_box(&requests)));
        });
        let packets = bench.packets(batch);
        let key = &bench.keys[0];
        group.bench_function("open_header", |b| {
            b.iter_batched(
                || packets.clone(),
                |packets| open_headers(key, packets),
                BatchSize::SmallInput,
            );
        });
        group.bench_function("peel_packet", |b| {
            b.iter_batched(|| packets.clone(), |packets| peel(key, packets), BatchSize::SmallInput);
        });
        group.finish();
    }
}

fn bench_surbs(criterion: &mut Criterion, bench: &mut Bench) {
    let mut group = criterion.benchmark_group("surb");
    group.throughput(Throughput::Elements(1));
    let mut rng = seeded();
    let routes = [bench.route.clone()];
    group.bench_function("build_surb", |b| {
        b.iter(|| build_surbs(&mut rng, black_box(&routes)));
    });
    let surb = *bench.surb().0.as_bytes();
    let plaintext = vec![4; max_plaintext(PAYLOAD_LEN)];
    group.bench_function("use_surb", |b| {
        b.iter_batched(
            || vec![(Surb::from_bytes(&surb).unwrap(), &plaintext[..])],
            |requests| use_surbs(PAYLOAD_LEN, requests),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("recover_reply", |b| {
        b.iter_batched(
            || vec![bench.reply()],
            recover_replies,
            // Making a reply takes twenty times as long as opening it.
            BatchSize::NumIterations(16),
        );
    });
    group.finish();
}

/// Medians per packet, taken alternately of ours and of `sphinx-packet`, and their ratio.
fn print_ratios() {
    const TIME: Duration = Duration::from_millis(300);
    println!("{:?}: {:>40}", backend(), "ours / sphinx-packet");
    for operation in Operation::ALL {
        for payload_len in [2048, 16384] {
            for batch in [1, 4, 8] {
                let Cost { ours, reference } = operation.compare(payload_len, batch, TIME);
                let name = format!("{operation:?}, {payload_len} bytes, batch of {batch}");
                let ratio = reference.as_secs_f64() / ours.as_secs_f64();
                println!("{name:<36}{ours:>12.2?} /{reference:>12.2?} ={ratio:>6.2}");
            }
        }
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .configure_from_args();
    let mut bench = Bench::new();
    bench_packets(&mut criterion, &bench);
    bench_surbs(&mut criterion, &mut bench);
    criterion.final_summary();
    // Not when `cargo test` only tries whether benches run.
    if std::env::args().any(|arg| arg == "--bench") {
        print_ratios();
    }
}
