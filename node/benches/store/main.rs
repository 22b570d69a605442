//! A gateway's store under the load of messages: what `redb` and `fjall` take, and what they leave on
//! the disk. Boxes of the usual size go through the group commit as in a gateway, each batch is synced.
//!
//! `cargo bench -p mixsocks-node --bench store [-- BOXES [FOLDER]]`

#![allow(missing_docs, reason = "a program")]

mod fjall_store;

use std::collections::VecDeque;
use std::error::Error;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use mixsocks_common::gateway::message::MAX_CONFIRMED;
use mixsocks_common::gateway::token::TokenHash;
use mixsocks_common::topology::UnixTime;
use mixsocks_node::gateway::store::{
    Change, Changes, ClientId, GroupCommit, Limits, Outcome, QUEUED_CHANGES, RedbStore, Statistics,
    Store,
};
use rand::RngExt;
use tokio::sync::watch;

use self::fjall_store::FjallStore;

/// Bytes of a box on a network of the usual packets.
const BOX_BYTES: usize = 1635;
const CLIENTS: usize = 1000;
const BOXES: usize = 50_000;
/// Boxes at a time when as many as possible go: what fills the queue of the group commit.
const OUTSTANDING: usize = QUEUED_CHANGES;
/// Boxes per second when only some go, and for how long.
const PACED_PER_SECOND: usize = 1000;
const PACE: Duration = Duration::from_millis(2);
const PACED: Duration = Duration::from_secs(5);
/// Deliveries that a connection reads at a time.
const READ_AT_ONCE: usize = 20;
const NOW: UnixTime = UnixTime(1_750_000_000);

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds an option of its own.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let boxes = arguments.next().map_or(Ok(BOXES), |argument| argument.parse())?;
    let folder = arguments.next().unwrap_or_else(|| ".".to_owned());
    println!("{boxes} boxes of {BOX_BYTES} bytes for {CLIENTS} clients");
    println!(
        "{:18} {:>9} {:>8} {:>8} | {:>8} {:>8} | {:>9} | {:>8} {:>8} {:>8}",
        "",
        "kept/s",
        "p50 ms",
        "p99 ms",
        "p50 ms",
        "p99 ms",
        "taken/s",
        "B/box",
        "MB then",
        "again"
    );
    for (name, open) in [
        ("redb", open_redb as Open),
        ("fjall", |folder| open_fjall(folder, false)),
        ("fjall, boxes apart", |folder| open_fjall(folder, true)),
    ] {
        let folder = tempfile::tempdir_in(&folder)?;
        measure(name, open, folder.path(), boxes)?;
    }
    Ok(())
}

type Open = fn(&Path) -> Result<Arc<dyn Store>, Box<dyn Error>>;

fn open_redb(folder: &Path) -> Result<Arc<dyn Store>, Box<dyn Error>> {
    Ok(Arc::new(RedbStore::open(folder, limits())?))
}

fn open_fjall(folder: &Path, beside: bool) -> Result<Arc<dyn Store>, Box<dyn Error>> {
    Ok(Arc::new(FjallStore::open(folder, limits(), beside)?))
}

fn limits() -> Limits {
    Limits { total_bytes: u64::MAX, ..Limits::default() }
}

fn measure(name: &str, open: Open, folder: &Path, boxes: usize) -> Result<(), Box<dyn Error>> {
    let store = open(folder)?;
    let clients: Vec<ClientId> = (0..CLIENTS).map(|_| rand::rng().random()).collect();
    let register = |client: &ClientId| Change::Register {
        client: *client,
        token: TokenHash::from_bytes([0; 32]),
    };
    store.apply(&clients.iter().map(register).collect::<Vec<_>>(), NOW)?;
    let empty = size(folder)?;

    let running = Running::start(store.clone());
    let start = Instant::now();
    let crowded = Latencies::of(running.keep_as_many_as_possible(&clients, boxes));
    let kept_per_second = boxes as f64 / start.elapsed().as_secs_f64();
    let bytes_per_box = (size(folder)? - empty) as f64 / boxes as f64;
    let calm = Latencies::of(running.keep_some(&clients));

    let all = store.usage().boxes;
    let start = Instant::now();
    running.take_all(&*store, &clients)?;
    let taken_per_second = all as f64 / start.elapsed().as_secs_f64();
    assert_eq!(store.usage().boxes, 0, "all was confirmed");
    let after = size(folder)?;
    running.stop();
    drop(store);
    // What a restart makes of it.
    drop(open(folder)?);
    let reopened = size(folder)?;
    println!(
        "{name:18} {kept_per_second:>9.0} {:>8.1} {:>8.1} | {:>8.1} {:>8.1} | {taken_per_second:>9.0} \
         | {bytes_per_box:>8.0} {:>8.1} {:>8.1}",
        crowded.p50_ms,
        crowded.p99_ms,
        calm.p50_ms,
        calm.p99_ms,
        after as f64 / 1e6,
        reopened as f64 / 1e6,
    );
    Ok(())
}

/// Bytes that the disk has given to the files of a folder.
fn size(folder: &Path) -> std::io::Result<u64> {
    let mut total = 0;
    let mut folders = VecDeque::from([folder.to_owned()]);
    while let Some(folder) = folders.pop_front() {
        for entry in fs::read_dir(folder)? {
            // Stores delete files of their own meanwhile.
            let Ok(metadata) = entry.as_ref().map(|entry| entry.metadata()) else { continue };
            match metadata {
                Ok(metadata) if metadata.is_dir() => folders.push_back(entry?.path()),
                Ok(metadata) => total += metadata.blocks() * 512,
                Err(_) => {}
            }
        }
    }
    Ok(total)
}

struct Latencies {
    p50_ms: f64,
    p99_ms: f64,
}

impl Latencies {
    fn of(mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        let at = |part: usize| latencies[(latencies.len() - 1) * part / 100].as_secs_f64() * 1e3;
        Self { p50_ms: at(50), p99_ms: at(99) }
    }
}

/// A group commit in a runtime of its own.
struct Running {
    runtime: tokio::runtime::Runtime,
    changes: Changes<Instant>,
    /// How long each change took from where it was handed in until it was durable.
    durable: Receiver<Duration>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(store: Arc<dyn Store>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_time()
            .build()
            .expect("a runtime starts");
        let (changes, group_commit) =
            GroupCommit::<_, Instant>::new(store, Arc::<Statistics>::default());
        let (stop, stopped) = watch::channel(false);
        let (answers, durable) = mpsc::channel();
        let task = runtime.spawn(group_commit.run(stopped, move |batch| {
            for answer in batch {
                assert_eq!(answer.outcome, Some(Outcome::Done));
                answers.send(answer.waiting.elapsed()).expect("somebody listens");
            }
        }));
        Self { runtime, changes, durable, stop, task }
    }

    fn keep_one(&self, clients: &[ClientId]) {
        let mut rng = rand::rng();
        let mut sealed = vec![0; BOX_BYTES];
        rng.fill(&mut sealed[..]);
        let client = clients[rng.random_range(0..clients.len())];
        let pushed = self.changes.try_push(Change::Keep { client, sealed }, Instant::now());
        assert!(pushed.is_ok(), "the queue is full");
    }

    fn keep_as_many_as_possible(&self, clients: &[ClientId], boxes: usize) -> Vec<Duration> {
        let at_once = boxes.min(OUTSTANDING);
        (0..at_once).for_each(|_| self.keep_one(clients));
        let mut latencies = Vec::with_capacity(boxes);
        for sent in at_once..boxes + at_once {
            latencies.push(self.durable.recv().expect("all are answered"));
            if sent < boxes {
                self.keep_one(clients);
            }
        }
        latencies
    }

    fn keep_some(&self, clients: &[ClientId]) -> Vec<Duration> {
        let at_once = PACED_PER_SECOND * PACE.as_millis() as usize / 1000;
        let start = Instant::now();
        let mut sent = 0;
        for turn in 1.. {
            (0..at_once).for_each(|_| self.keep_one(clients));
            sent += at_once;
            let next = start + turn * PACE;
            if next > start + PACED {
                break;
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        (0..sent).map(|_| self.durable.recv().expect("all are answered")).collect()
    }

    /// Reads as connections do, and confirms all.
    fn take_all(&self, store: &dyn Store, clients: &[ClientId]) -> Result<(), Box<dyn Error>> {
        for client in clients {
            let (mut numbers, mut after) = (Vec::new(), 0);
            loop {
                let read = store.deliveries(client, after, READ_AT_ONCE)?;
                numbers.extend(read.iter().map(|kept| kept.number));
                match read.last() {
                    Some(last) => after = last.number,
                    None => break,
                }
            }
            for numbers in numbers.chunks(MAX_CONFIRMED) {
                let change = Change::Confirm { client: *client, numbers: numbers.to_vec() };
                self.runtime.block_on(self.changes.push(change, Instant::now()));
            }
        }
        // Confirmed at the latest when the last one is answered.
        while store.usage().boxes > 0 {
            self.durable.recv()?;
        }
        Ok(())
    }

    fn stop(self) {
        self.stop.send_replace(true);
        self.runtime.block_on(self.task).expect("it ends");
    }
}
