//! Runs seeds side by side, and says how to replay the one that failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mixsocks_common::session::SESSION_SILENCE;

use crate::codec::{Codec, Plain, Real};
use crate::faults::FAULTS_END;
use crate::model::Stream;
use crate::world::World;

/// Seeds that a plain `cargo test` runs.
const DEFAULT_SEEDS: u64 = 300;
/// One seed in so many has real cryptography.
const REAL_EVERY: u64 = 50;
/// When everything must be over: every wait in the protocol is far shorter.
const OVER_BY: Duration = Duration::from_secs(FAULTS_END.as_secs() + 240);
/// After that long, nothing is under way any more.
const SETTLED_AFTER: Duration = Duration::from_secs(30);
/// How long an idle network is watched: sessions grow old and are closed meanwhile.
const WATCHED_FOR: Duration = Duration::from_secs(20 * 60);
/// The same while half of what is sent is lost for good: each CLOSE of a session may be, and the provider
/// then waits for a quarter of an hour.
const WATCHED_WHEN_LOSSY: Duration = Duration::from_secs(20 * 60 + SESSION_SILENCE.as_secs());
/// Packets of a session that is closed: CLOSE three times at most, with what is sent for it.
const PACKETS_OF_A_CLOSE: u64 = 12;
/// Packets of a session whose SURBs are replaced: forty in fives, each acknowledged, and as many again
/// for those that were used for that.
const PACKETS_OF_A_RENEWAL: u64 = 32;
/// Events of an endpoint when keys change: it looks, replaces, and looks again.
const EVENTS_OF_A_CHANGE: u64 = 4;
/// Events of a document: it is published, and it comes.
const EVENTS_OF_A_DOCUMENT: u64 = 2;
/// Events of a link that is watched, at whose ends a PAD leaves every 20 s.
const EVENTS_OF_A_LINK: u64 = 400;
/// Events of a packet from end to end, with the timers and PADs that it leads to.
const EVENTS_OF_A_PACKET: u64 = 60;
/// What a provider sends at most to a client that does not hear it: two packets every 5 s for a quarter of
/// an hour.
const PACKETS_TO_NOBODY: u64 = 400;

/// Runs a seed to its end; an error says what went wrong and what happened before.
fn run<C: Codec>(seed: u64) -> Result<(), String> {
    let mut world = World::<C>::new(seed);
    play(&mut world).map_err(|error| format!("{error}\n{}", world.trace()))
}

/// Plays a world to its end, and watches it when it is idle.
pub(crate) fn play<C: Codec>(world: &mut World<C>) -> Result<(), String> {
    while !(world.elapsed() > FAULTS_END && world.streams.iter().all(|stream| stream.is_over())) {
        if !world.step(OVER_BY)? {
            let stuck: Vec<_> = world.streams.iter().filter(|stream| !stream.is_over()).collect();
            return Err(format!("not over: {stuck:#?}"));
        }
    }
    for stream in &world.streams {
        stream.check_complete()?;
    }
    let told_by = world.elapsed() + SESSION_SILENCE + SETTLED_AFTER;
    while !world.streams.iter().all(Stream::is_told) {
        if !world.step(told_by)? {
            let untold: Vec<_> = world.streams.iter().filter(|s| !s.is_told()).collect();
            return Err(format!("an end does not learn that its stream is over: {untold:#?}"));
        }
    }
    // An idle network is silent.
    let settled = world.elapsed() + SETTLED_AFTER;
    while world.step(settled)? {}
    let before = world.packets_built;
    let happened = world.happened;
    let delivered = world.documents.delivered;
    let (of_clients, of_provider) = world.sessions();
    let orphans = if world.may_have_orphans() { of_provider } else { 0 };
    let watched_for = if world.is_lossy_for_good() { WATCHED_WHEN_LOSSY } else { WATCHED_FOR };
    let watched = settled + watched_for;
    while world.step(watched)? {}
    let talk = world.packets_built - before;
    let changes = world.key_changes(watched_for);
    let of_session = PACKETS_OF_A_CLOSE + changes * PACKETS_OF_A_RENEWAL;
    if talk > of_clients * of_session + orphans * PACKETS_TO_NOBODY {
        return Err(format!("an idle network sends {talk} packets for {of_clients} sessions"));
    }
    let happened = world.happened - happened;
    let of_link = EVENTS_OF_A_LINK * watched_for.as_secs().div_ceil(WATCHED_FOR.as_secs())
        + changes * EVENTS_OF_A_CHANGE;
    let may_happen = world.endpoints.len() as u64 * of_link
        + talk * EVENTS_OF_A_PACKET
        + (world.documents.delivered - delivered) * EVENTS_OF_A_DOCUMENT;
    if happened > may_happen {
        return Err(format!("an idle network is not idle: {happened} events, {talk} packets"));
    }
    let left = world.sessions();
    if left != (0, 0) {
        return Err(format!("sessions outlive their age: {left:?}"));
    }
    Ok(())
}

fn run_any(seed: u64) -> Result<(), String> {
    if seed % REAL_EVERY == REAL_EVERY - 1 { run::<Real>(seed) } else { run::<Plain>(seed) }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// The first of many seeds: zero, or any, so that each night runs others.
fn first_seed() -> u64 {
    match std::env::var("MIXSOCKS_SIM_FROM").as_deref() {
        Ok("random") => rand::random::<u32>().into(),
        _ => number_from("MIXSOCKS_SIM_FROM").unwrap_or(0),
    }
}

/// Two runs of one seed are the same run, or no failure could be replayed.
#[test]
fn a_seed_decides_everything() {
    for seed in [3, 5, 19] {
        let [first, second] = [(); 2].map(|()| {
            let mut world = World::<Plain>::new(seed);
            play(&mut world).unwrap();
            (world.packets_built, world.trace())
        });
        assert_eq!(first, second, "seed {seed}");
    }
}

#[test]
fn every_seed_ends_well() {
    run_seeds(1, run_any);
}

/// Runs seeds side by side: one for each `cost` that are asked for, as some simulations take longer.
pub(crate) fn run_seeds(cost: u64, run_any: impl Fn(u64) -> Result<(), String> + Sync) {
    let asked_for = || number_from("MIXSOCKS_SIM_SEEDS").unwrap_or(DEFAULT_SEEDS);
    let (first, count) = match number_from("MIXSOCKS_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (first_seed(), asked_for().div_ceil(cost)),
    };
    println!("{count} seeds from {first} on");
    let began = Instant::now();
    let next = AtomicU64::new(first);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let failures: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut failures = Vec::new();
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= first + count || failures.len() >= 3 {
                            return failures;
                        }
                        let result = catch_unwind(AssertUnwindSafe(|| run_any(seed)));
                        let result = result.unwrap_or_else(|_| Err("it panicked".to_owned()));
                        failures.extend(result.err().map(|error| (seed, error)));
                    }
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    // Workers that have seen enough failures leave the rest.
    let ran = next.load(Ordering::Relaxed).min(first + count) - first;
    println!("{ran} of {count} seeds in {:.1} s", began.elapsed().as_secs_f64());
    let reports: Vec<_> = failures
        .iter()
        .map(|(seed, error)| {
            format!("seed {seed}: {error}\nreplay: MIXSOCKS_SIM_SEED={seed} cargo test --test sim")
        })
        .collect();
    assert!(reports.is_empty(), "\n{}\ncommit: {}", reports.join("\n\n"), commit());
}

fn commit() -> String {
    let output = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output();
    output.map_or_else(|_| "unknown".to_owned(), |out| String::from_utf8_lossy(&out.stdout).into())
}
