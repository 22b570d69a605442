//! What packets and SURBs cost, beside the crate `sphinx-packet` (the backend `reference`) and
//! x25519-dalek in the same run: payloads of 2048 bytes, 5 hops unless stated otherwise. Then ratios,
//! measured alternately, for other payloads and batches too.

#![expect(clippy::unwrap_used, reason = "benches")]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput};
use mixsocks_sphinx::compare::{Cost, Operation};
use mixsocks_sphinx::{
    Backend, Hop, Packet, Payload, Peeled, ReplyRecovery, Route, SecretKey, Surb, build_packets,
    build_surbs, finish, max_plaintext, open_headers, recover_replies, use_surbs, x25519,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

const PAYLOAD_LEN: usize = 2048;
const HOPS: usize = 5;

fn seeded() -> StdRng {
    StdRng::seed_from_u64(1)
}

struct Bench {
    rng: StdRng,
    keys: Vec<SecretKey>,
    hops: Vec<Hop>,
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
            hops,
            plaintext: vec![4; max_plaintext(PAYLOAD_LEN)],
        }
    }

    fn requests(&self, batch: usize) -> Vec<(Route, &[u8])> {
        vec![(self.route.clone(), &self.plaintext[..]); batch]
    }

    /// The same for a route without its first hops.
    fn shorter_requests(&self, hops: usize, batch: usize) -> Vec<(Route, &[u8])> {
        let route = Route::new(&self.hops[HOPS - hops..], [2; 32], [3; 16]).unwrap();
        vec![(route, &self.plaintext[..]); batch]
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

/// Runs `bench` for `sphinx-packet`, which knows no batches, and for the fastest backend in batches.
fn compare(
    criterion: &mut Criterion,
    name: &str,
    batches: &[usize],
    mut bench: impl FnMut(&mut BenchmarkGroup<'_, WallTime>, &str, usize),
) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(1));
    Backend::Reference.scope(|| bench(&mut group, "reference", 1)).unwrap();
    for batch in batches {
        group.throughput(Throughput::Elements(*batch as u64));
        bench(&mut group, &format!("{}, batch of {batch}", Backend::current()), *batch);
    }
    group.finish();
}

fn bench_x25519(criterion: &mut Criterion, bench: &Bench) {
    let secret = *bench.keys[0].to_bytes();
    let point = *bench.hops[1].key.as_bytes();
    let batches = [1, 2, 3, 4, 8];
    compare(criterion, "x25519", &batches, |group, name, batch| {
        let operations = vec![(&secret, &point); batch];
        group.bench_function(name, |b| b.iter(|| x25519(black_box(&operations))));
    });
}

fn bench_packets(criterion: &mut Criterion, bench: &Bench) {
    for hops in [4, 5] {
        compare(criterion, &format!("build {hops} hops"), &[1, 8], |group, name, batch| {
            let mut rng = seeded();
            let requests = bench.shorter_requests(hops, batch);
            group.bench_function(name, |b| {
                b.iter(|| build_packets(&mut rng, PAYLOAD_LEN, black_box(&requests)));
            });
        });
    }
    let key = &bench.keys[0];
    compare(criterion, "open header", &[1, 8], |group, name, batch| {
        let packets = bench.packets(batch);
        group.bench_function(name, |b| {
            b.iter_batched(
                || packets.clone(),
                |packets| open_headers(key, packets),
                BatchSize::SmallInput,
            );
        });
    });
    compare(criterion, "peel", &[1, 2, 4, 8, 32], |group, name, batch| {
        let packets = bench.packets(batch);
        group.bench_function(name, |b| {
            b.iter_batched(|| packets.clone(), |packets| peel(key, packets), BatchSize::SmallInput);
        });
    });
}

fn bench_surbs(criterion: &mut Criterion, bench: &mut Bench) {
    compare(criterion, "build SURB", &[1, 8], |group, name, batch| {
        let mut rng = seeded();
        let routes = vec![bench.route.clone(); batch];
        group.bench_function(name, |b| b.iter(|| build_surbs(&mut rng, black_box(&routes))));
    });
    let mut group = criterion.benchmark_group("surb");
    group.throughput(Throughput::Elements(1));
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
    println!("{}: {:>40}", Backend::current(), "ours / sphinx-packet");
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
    bench_x25519(&mut criterion, &bench);
    bench_packets(&mut criterion, &bench);
    bench_surbs(&mut criterion, &mut bench);
    criterion.final_summary();
    // Not when `cargo test` only tries whether benches run.
    if std::env::args().any(|arg| arg == "--bench") {
        print_ratios();
    }
}
