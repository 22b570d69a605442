//! Gateways that are killed at random moments while messages are under way: what was reported delivered
//! arrives, and nothing comes twice.
//!
//! `MIXSOCKS_TEST_SEED=7` draws messages and moments from a number; else it is random, and printed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mixsocks_client::messages::Messenger;
use mixsocks_common::keys::Identity;
use mixsocks_common::message::MessageEvent;
use mixsocks_common::message::fragment::MessageId;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::messages::{Person, soon, topology};
use crate::town::{Plan, Town};

const ROUNDS: usize = 50;
const GATEWAYS: usize = 2;
/// Those who send, and are always there; and those who come, are killed and come again.
const SENDERS: usize = 4;
const VISITORS: usize = 4;
/// What each sends in a round at most.
const MESSAGES: usize = 3;
const LONGEST: usize = 20_000;
/// A gateway is killed so long after messages were sent at most: most are acknowledged by then.
const LATEST: Duration = Duration::from_millis(400);

/// What messengers were told.
#[derive(Default)]
struct Ledger {
    news: Mutex<News>,
    changed: Notify,
}

#[derive(Default)]
struct News {
    /// How often each message came.
    received: BTreeMap<u64, usize>,
    /// Which of them were reported delivered.
    delivered: Vec<MessageId>,
    /// What must not happen.
    wrong: Vec<String>,
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap()
    }

    fn note(&self, messenger: &Messenger, event: MessageEvent) {
        let mut news = self.lock();
        match event {
            MessageEvent::Received { received, message, .. } => {
                let number = u64::from_be_bytes(*message.first_chunk().unwrap());
                *news.received.entry(number).or_default() += 1;
                if message != text(number) {
                    news.wrong.push(format!("message {number} came with other bytes"));
                }
                messenger.taken(received);
            }
            MessageEvent::Delivered(id) => news.delivered.push(id),
            MessageEvent::Failed(id, reason) => news.wrong.push(format!("{id:?}: {reason}")),
        }
        drop(news);
        self.changed.notify_one();
    }

    /// Waits until it says what it should.
    async fn wait(&self, is_so: impl Fn(&News) -> bool) {
        soon(async {
            while !is_so(&self.lock()) {
                self.changed.notified().await;
            }
        })
        .await;
    }
}

/// The bytes of a message: its number, and more of a length of its own.
fn text(number: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(number);
    let mut rest = vec![0; rng.random_range(0..LONGEST)];
    rng.fill(&mut rest[..]);
    [&number.to_be_bytes()[..], &rest].concat()
}

/// A messenger that runs, and the task that writes down what it is told.
struct Running {
    messenger: Messenger,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(person: &Person, ledger: &Arc<Ledger>) -> Self {
        let messenger = person.connect().await;
        let (follower, ledger) = (messenger.clone(), ledger.clone());
        let task = tokio::spawn(async move {
            while let Some(event) = follower.next_event().await {
                ledger.note(&follower, event);
            }
        });
        Self { messenger, task }
    }

    /// Ends it without a farewell, as if its process was killed.
    async fn kill(self) {
        self.task.abort();
        // An error says that it was aborted.
        let _ = self.task.await;
    }
}

/// All who send and receive.
struct People {
    all: Vec<Person>,
    senders: Vec<Messenger>,
    visitors: Vec<Option<Running>>,
    ledger: Arc<Ledger>,
    /// The id of each message, in the order of their numbers.
    sent: Vec<MessageId>,
}

impl People {
    async fn start(town: &Town) -> Self {
        let document = topology(&town.folder("gateway-1").join("topology"), town.key(0));
        let document = watch::channel(document).1;
        let gateways: Vec<_> = (0..GATEWAYS).map(|number| identity(town, number)).collect();
        let person = |number: usize| Person::new(&document, gateways[number % GATEWAYS]);
        let all: Vec<_> = (0..SENDERS + VISITORS).map(person).collect();
        let ledger = Arc::<Ledger>::default();
        let mut senders = Vec::new();
        for person in &all[..SENDERS] {
            senders.push(Running::start(person, &ledger).await.messenger);
        }
        for person in &all[SENDERS..] {
            // It registers, and is away.
            Running::start(person, &ledger).await.kill().await;
        }
        let visitors = (0..VISITORS).map(|_| None).collect();
        Self { all, senders, visitors, ledger, sent: Vec::new() }
    }

    async fn send(&mut self, from: usize, to: usize) {
        let message = text(self.sent.len() as u64);
        let sent = self.senders[from].send(self.all[to].address(), &message, 0);
        self.sent.push(soon(sent).await.unwrap());
    }

    /// Everybody sends to somebody, whether that one is there or not.
    async fn send_some(&mut self, rng: &mut StdRng) {
        for from in 0..SENDERS {
            for _ in 0..rng.random_range(1..=MESSAGES) {
                self.send(from, rng.random_range(0..SENDERS + VISITORS)).await;
            }
        }
    }

    /// A visitor comes, or is killed.
    async fn visit(&mut self, number: usize) {
        self.visitors[number] = match self.visitors[number].take() {
            Some(running) => {
                running.kill().await;
                None
            }
            None => Some(Running::start(&self.all[SENDERS + number], &self.ledger).await),
        };
    }

    /// Waits until all were delivered, and looks whether each has come once.
    async fn check(&mut self) {
        for number in 0..VISITORS {
            if self.visitors[number].is_none() {
                self.visit(number).await;
            }
        }
        let first = self.sent.len() as u64;
        self.wait_until_delivered(first..first).await;
        // Gateways hand over the oldest first: what was delivered, or would come twice, comes before these.
        for to in 0..SENDERS + VISITORS {
            self.send(0, to).await;
        }
        let all = self.sent.len() as u64;
        self.wait_until_delivered(first..all).await;
        let news = self.ledger.lock();
        assert_eq!(news.wrong, Vec::<String>::new());
        let lost: Vec<_> = (0..all).filter(|number| !news.received.contains_key(number)).collect();
        let more: Vec<_> = news.received.iter().filter(|(_, times)| **times > 1).collect();
        assert!(lost.is_empty() && more.is_empty(), "lost: {lost:?}, more than once: {more:?}");
        let (mut delivered, mut sent) = (news.delivered.clone(), self.sent.clone());
        delivered.sort_unstable();
        sent.sort_unstable();
        assert_eq!(delivered, sent);
    }

    /// Waits until all were delivered, and the last ones have come.
    async fn wait_until_delivered(&self, last: Range<u64>) {
        let all = self.sent.len();
        let is_so = |news: &News| {
            let is_delivered = news.delivered.len() >= all;
            let has_come = |number| news.received.contains_key(&number);
            !news.wrong.is_empty() || is_delivered && last.clone().all(has_come)
        };
        self.ledger.wait(is_so).await;
    }
}

fn name(gateway: usize) -> String {
    format!("gateway-{}", gateway + 1)
}

fn identity(town: &Town, gateway: usize) -> Identity {
    let line = town.wait_for(&name(gateway), "gateway  ");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn seed() -> u64 {
    match std::env::var("MIXSOCKS_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::random::<u32>().into(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_outlive_gateways_that_are_killed_fifty_times() {
    let seed = seed();
    println!("MIXSOCKS_TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    // Keys do not change meanwhile.
    let mut town = Town::on_loopback(Plan { epoch: 3600, ..Plan::SMALL });
    town.start_all();
    let mut people = People::start(&town).await;
    for _ in 0..ROUNDS {
        people.send_some(&mut rng).await;
        sleep(LATEST.mul_f64(rng.random())).await;
        let gateway = name(rng.random_range(0..GATEWAYS));
        town.kill(&gateway);
        town.start(&gateway);
        town.wait_healthy(&gateway);
        if rng.random_bool(0.3) {
            people.visit(rng.random_range(0..VISITORS)).await;
        }
    }
    people.check().await;
}
