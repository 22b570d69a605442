//! Authorities in fake time: loss, delays, crashes, clocks that differ, and a liar.
//!
//! The queue of events is ordered by time and number; everything random comes from the seed, which a
//! failure names.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::message::{Draft, Proposal, Sender, Standing};
use super::testing::{EPOCH_SECONDS, Person, authority_key, rules};
use super::{
    Admission, Authority, Endorsement, Memory, MessageError, Output, Rules, SignedDescriptor,
};
use crate::keys::Identity;
use crate::topology::{DocumentBody, DocumentDigest, SignedTopology, UnixTime};

const FIRST_EPOCH: u64 = 1000;

/// What happens to whom.
#[derive(Clone, Copy)]
struct Scenario {
    authorities: u8,
    threshold: usize,
    epochs: u64,
    loss: f64,
    max_delay: Duration,
    /// Clocks differ by up to so much in either direction.
    skew: Duration,
    /// Crashes in an epoch, of one authority at a time, for up to a tenth of an epoch.
    crashes: u32,
    /// The first so many authorities never start.
    dead: u8,
    /// The last authority lies, but signs no two documents.
    liar: bool,
}

const QUIET: Scenario = Scenario {
    authorities: 3,
    threshold: 2,
    epochs: 4,
    loss: 0.0,
    max_delay: Duration::from_millis(500),
    skew: Duration::ZERO,
    crashes: 0,
    dead: 0,
    liar: false,
};

enum Event {
    Deliver { to: usize, message: Bytes },
    Wake { at: usize, number: u64 },
    Persisted { at: usize, life: u32, record: Vec<u8> },
    Crash,
    Restart { at: usize },
    Upload,
    Lie,
}

/// A machine with its disk.
struct Machine {
    core: Option<Authority>,
    life: u32,
    /// Which of its wake-ups counts.
    wake: u64,
    record: Option<Vec<u8>>,
    file: Option<String>,
    members: Vec<u8>,
    clock_ahead: Duration,
}

struct World {
    scenario: Scenario,
    rules: Rules,
    rng: StdRng,
    now: Duration,
    events: BTreeMap<(Duration, u64), Event>,
    count: u64,
    machines: Vec<Machine>,
    people: Vec<Person>,
    endorsements: BTreeMap<Identity, Vec<Endorsement>>,
    /// What passed over the network lately, for the liar to repeat.
    overheard: Vec<Bytes>,
    documents: BTreeMap<u64, (DocumentDigest, SignedTopology, Duration)>,
    lies_refused: u32,
}

impl World {
    fn new(scenario: Scenario, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut people: Vec<_> = (1..=5).map(Person::mix).collect();
        people.extend([Person::gateway(11), Person::gateway(12), Person::provider(21, 12)]);
        let machines = (0..scenario.authorities).map(|_| Machine {
            core: None,
            life: 0,
            wake: 0,
            record: None,
            file: None,
            members: Vec::new(),
            // All clocks are ahead of `now`, by more or less.
            clock_ahead: scenario.skew.mul_f64(2.0 * rng.random::<f64>()),
        });
        let machines = machines.collect();
        let now = Duration::from_secs(FIRST_EPOCH * EPOCH_SECONDS + 100);
        let mut world = Self {
            scenario,
            rules: rules(scenario.authorities, scenario.threshold),
            rng,
            now,
            events: BTreeMap::new(),
            count: 0,
            machines,
            people,
            endorsements: BTreeMap::new(),
            overheard: Vec::new(),
            documents: BTreeMap::new(),
            lies_refused: 0,
        };
        for at in usize::from(scenario.dead)..usize::from(scenario.authorities) {
            world.start(at);
        }
        for second in (0..scenario.epochs * EPOCH_SECONDS).step_by(400) {
            world.schedule(Duration::from_secs(second), Event::Upload);
        }
        for _ in 0..u64::from(scenario.crashes) * scenario.epochs {
            let when = Duration::from_secs(scenario.epochs * EPOCH_SECONDS);
            let when = when.mul_f64(world.rng.random());
            world.schedule(when, Event::Crash);
        }
        if scenario.liar {
            for second in (0..scenario.epochs * EPOCH_SECONDS).step_by(40) {
                world.schedule(Duration::from_secs(second), Event::Lie);
            }
        }
        world
    }

    /// Runs to the end, and returns the epochs of all documents.
    fn run(mut self) -> Report {
        let end = self.now + Duration::from_secs(self.scenario.epochs * EPOCH_SECONDS);
        while let Some(((when, _), event)) = self.events.pop_first() {
            if when > end {
                break;
            }
            self.now = when;
            self.handle(event);
        }
        self.check_documents();
        let now = self.now + self.scenario.skew;
        Report {
            epochs: self.documents.keys().copied().collect(),
            signed_twice: self
                .machines
                .iter()
                .filter_map(|machine| machine.core.as_ref())
                .flat_map(|core| core.status(now).signed_twice)
                .collect(),
            latest: self
                .machines
                .iter()
                .filter_map(|machine| machine.core.as_ref())
                .map(|core| core.latest().map(|latest| latest.topology().epoch))
                .collect(),
            lies_refused: self.lies_refused,
        }
    }

    fn schedule(&mut self, delay: Duration, event: Event) {
        self.count += 1;
        self.events.insert((self.now + delay, self.count), event);
    }

    fn schedule_wake(&mut self, at: usize, delay: Duration) {
        let number = self.count + 1;
        self.machines[at].wake = number;
        self.schedule(delay, Event::Wake { at, number });
    }

    fn clock(&self, at: usize) -> Duration {
        self.now + self.machines[at].clock_ahead
    }

    fn is_liar(&self, at: usize) -> bool {
        self.scenario.liar && at + 1 == self.machines.len()
    }

    fn start(&mut self, at: usize) {
        let now = self.clock(at);
        let people = self.people.iter().map(|person| (person.key().identity(), person.kind()));
        let admission = Admission::new(people);
        let machine = &mut self.machines[at];
        let memory = machine.record.as_deref().map_or(Memory::New, Memory::Record);
        let key = authority_key(u8::try_from(at).unwrap());
        let file = machine.file.as_ref().map(|file| file.as_bytes());
        let mut core =
            Authority::new(key, self.rules.clone(), admission, file, memory, now).unwrap();
        if !machine.members.is_empty() {
            core.restore_members(&machine.members, now).unwrap();
        }
        machine.core = Some(core);
        machine.life += 1;
        self.schedule_wake(at, Duration::ZERO);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Deliver { to, message } => {
                self.with_core(to, |core, now| core.handle_message(&message, now).is_ok());
            }
            Event::Wake { at, number } if number != self.machines[at].wake => {}
            Event::Wake { at, .. } => {
                self.with_core(at, |core, now| {
                    let due = now >= core.poll_timeout();
                    core.handle_timeout(now);
                    assert!(core.poll_timeout() > now, "a deadline outlives its handling");
                    due
                });
            }
            Event::Persisted { at, life, record } => {
                if self.machines[at].life == life && self.machines[at].core.is_some() {
                    self.machines[at].record = Some(record);
                    self.with_core(at, |core, now| {
                        core.persisted(now);
                        true
                    });
                }
            }
            Event::Crash => self.crash(),
            Event::Restart { at } => self.start(at),
            Event::Upload => self.upload(),
            Event::Lie => self.lie(),
        }
    }

    /// Calls a core if it is up, and does what it wants done.
    fn with_core(&mut self, at: usize, call: impl FnOnce(&mut Authority, Duration) -> bool) {
        let now = self.clock(at);
        let Some(core) = &mut self.machines[at].core else { return };
        call(core, now);
        let mut outputs = Vec::new();
        while let Some(output) = core.poll_output() {
            outputs.push(output);
        }
        let wake = core.poll_timeout().saturating_sub(now);
        for output in outputs {
            match output {
                Output::Persist(record) => {
                    let life = self.machines[at].life;
                    let delay = Duration::from_millis(self.rng.random_range(1..200));
                    self.schedule(delay, Event::Persisted { at, life, record });
                }
                Output::Send { to, message } => self.send(at, to, message),
                Output::Publish(file) => self.published(at, file),
            }
        }
        self.schedule_wake(at, wake);
    }

    fn send(&mut self, from: usize, to: Identity, message: Bytes) {
        self.overheard.push(message.clone());
        if self.overheard.len() > 50 {
            let old = self.rng.random_range(0..50);
            self.overheard.swap_remove(old);
        }
        // A liar answers to nobody half of the time.
        let lost = if self.is_liar(from) { 0.5 } else { self.scenario.loss };
        if self.rng.random_bool(lost) {
            return;
        }
        let to = self.rules.authorities().keys().position(|key| *key == to).unwrap();
        let to = self.machine_of(to);
        let delay = self.scenario.max_delay.mul_f64(self.rng.random());
        self.schedule(delay, Event::Deliver { to, message });
    }

    /// The number of the machine whose key is at this place in their order.
    fn machine_of(&self, place: usize) -> usize {
        let key = *self.rules.authorities().keys().nth(place).unwrap();
        (0..self.machines.len())
            .find(|at| authority_key(u8::try_from(*at).unwrap()).identity() == key)
            .unwrap()
    }

    fn crash(&mut self) {
        let up: Vec<_> =
            (0..self.machines.len()).filter(|at| self.machines[*at].core.is_some()).collect();
        // One at a time, so that enough stay up.
        if up.len() + usize::from(self.scenario.dead) < self.machines.len() || up.len() < 2 {
            return;
        }
        let at = up[self.rng.random_range(0..up.len())];
        self.machines[at].core = None;
        let longest = Duration::from_secs(EPOCH_SECONDS / 10);
        let pause = longest.mul_f64(self.rng.random());
        self.schedule(pause, Event::Restart { at });
    }

    /// Everybody publishes, with what it has collected so far; one in five uploads is lost.
    fn upload(&mut self) {
        for person in self.people.clone() {
            let descriptor = person.signed(self.now.as_secs());
            let collected = self.endorsements.remove(&descriptor.identity()).unwrap_or_default();
            let mut newest: BTreeMap<_, _> =
                collected.iter().map(|e: &Endorsement| (e.authority, *e)).collect();
            for at in 0..self.machines.len() {
                let lost = self.rng.random_bool(0.2);
                let now = self.clock(at);
                let Some(core) = self.machines[at].core.as_mut().filter(|_| !lost) else {
                    continue;
                };
                if let Some(endorsement) = publish(core, &descriptor, &collected, now) {
                    newest.insert(endorsement.authority, endorsement);
                }
                self.machines[at].members = core.members();
            }
            self.endorsements.insert(descriptor.identity(), newest.into_values().collect());
        }
    }

    fn published(&mut self, at: usize, file: String) {
        let signed = SignedTopology::read(file.as_bytes(), self.rules.authorities()).unwrap();
        let epoch = signed.topology().epoch;
        let (digest, now) = (signed.digest(), self.now);
        let (first, ..) = self.documents.entry(epoch).or_insert((digest, signed, now));
        assert_eq!(*first, digest, "two documents of epoch {epoch}");
        self.machines[at].file = Some(file);
    }

    /// Sends everybody something that an honest authority would not say.
    fn lie(&mut self) {
        let liar = self.machines.len() - 1;
        let key = authority_key(u8::try_from(liar).unwrap());
        let network = self.rules.network().clone();
        let sender = Sender { key: &key, network: &network };
        let epoch = self.rules.round_at(self.now);
        let attempt = self.rng.random_range(0..8);
        let message = match self.rng.random_range(0..6) {
            0 => {
                let mut bytes = self.overheard.first().map_or(vec![1, 2, 3], |b| b.to_vec());
                let at = self.rng.random_range(0..bytes.len());
                bytes[at] ^= 1 << self.rng.random_range(0..8);
                bytes.into()
            }
            1 if !self.overheard.is_empty() => {
                self.overheard[self.rng.random_range(0..self.overheard.len())].clone()
            }
            2 => {
                let standing = Standing { latest: 0, epoch, attempt: 40, vote: None, signed: None };
                sender.status(self.now, standing).message()
            }
            3 => {
                // An old document as it was, or with something changed.
                let Some((_, old, _)) = self.documents.values().next() else { return };
                let file = old.file().replace("payload_bytes = 2048", "payload_bytes = 4096");
                sender.document(if self.rng.random() { &file } else { old.file() })
            }
            _ => {
                // The document in force, with more delay, or without some members.
                let Some((_, latest, _)) = self.documents.values().last() else { return };
                let body = latest.topology().body();
                let body = if self.rng.random() {
                    body.as_str().replace("mean_delay_us = 15000", "mean_delay_us = 15001")
                } else {
                    body.as_str().to_owned()
                };
                let body = DocumentBody::from_text(body);
                let draft = Draft { body, candidates: Vec::new() };
                sender.proposal(&Proposal { epoch, attempt, statuses: Vec::new(), draft })
            }
        };
        for to in 0..liar {
            let message = message.clone();
            let mut refused = false;
            self.with_core(to, |core, now| {
                refused = core.handle_message(&message, now).is_err();
                !refused
            });
            self.lies_refused += u32::from(refused);
        }
    }

    /// Whatever was signed is what the rules make of everybody who has published.
    fn check_documents(&self) {
        for (digest, signed, when) in self.documents.values() {
            let topology = signed.topology();
            assert_eq!(topology.parameters, *self.rules.parameters(), "{digest:?}");
            let slack = Duration::from_secs(1200) + 2 * self.scenario.skew;
            let begin = self.rules.round_start(topology.epoch);
            assert!(*when + slack >= begin, "epoch {} was made too early", topology.epoch);
            let layers = [1, 2, 3].map(|layer| topology.mixes(layer).count());
            let (fewest, most) = (layers.iter().min().unwrap(), layers.iter().max().unwrap());
            assert!(most - fewest <= 1, "{layers:?}");
        }
        let ids = |signed: &SignedTopology| -> BTreeSet<Identity> {
            let topology = signed.topology();
            let nodes = topology.nodes().iter().map(|node| node.identity);
            nodes.chain(topology.providers().iter().map(|p| p.address.identity)).collect()
        };
        let everybody: BTreeSet<_> = self.people.iter().map(|p| p.key().identity()).collect();
        // Uploads are lost too, so the first documents may come before the last member.
        for (_, signed, _) in self.documents.values().skip(2) {
            assert_eq!(ids(signed), everybody, "epoch {}", signed.topology().epoch);
        }
    }
}

fn publish(
    core: &mut Authority,
    descriptor: &SignedDescriptor,
    collected: &[Endorsement],
    now: Duration,
) -> Option<Endorsement> {
    let result = core.publish(descriptor.text().as_bytes(), collected, None, now);
    result.ok().map(|published| published.endorsement)
}

struct Report {
    epochs: Vec<u64>,
    signed_twice: Vec<(Identity, u64)>,
    latest: Vec<Option<u64>>,
    lies_refused: u32,
}

/// Every epoch but the last of which the round may still run has its document, and everybody who is
/// up at the end has one of the last two.
fn expect_all(scenario: Scenario, seed: u64) -> Report {
    let report = World::new(scenario, seed).run();
    let all = FIRST_EPOCH + 1..FIRST_EPOCH + scenario.epochs;
    let missing: Vec<_> = all.clone().filter(|epoch| !report.epochs.contains(epoch)).collect();
    assert!(missing.is_empty(), "seed {seed}: no document of {missing:?}");
    for latest in &report.latest {
        assert!(*latest >= Some(all.end - 2), "seed {seed}: {latest:?} is the latest");
    }
    assert_eq!(report.signed_twice, [], "seed {seed}");
    report
}

#[test]
fn any_number_of_authorities_makes_every_document() {
    for (authorities, threshold) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)] {
        expect_all(Scenario { authorities, threshold, ..QUIET }, u64::from(authorities));
    }
}

#[test]
fn as_few_as_must_sign_are_enough() {
    for (authorities, threshold, dead) in [(3, 2, 1), (5, 3, 2)] {
        expect_all(Scenario { authorities, threshold, dead, ..QUIET }, 7);
    }
    let report = World::new(Scenario { dead: 2, ..QUIET }, 7).run();
    assert_eq!(report.epochs, [0; 0]);
}

#[test]
fn loss_delay_and_clocks_that_differ_cost_attempts_but_no_epoch() {
    for seed in 0..2 {
        let skew = Duration::from_secs(60);
        let max_delay = Duration::from_secs(5);
        let scenario =
            Scenario { authorities: 5, threshold: 3, loss: 0.2, max_delay, skew, ..QUIET };
        expect_all(scenario, seed);
    }
}

#[test]
fn crashes_lose_what_was_not_on_the_disk_and_no_epoch() {
    for seed in 0..2 {
        let (crashes, loss) = (12, 0.1);
        let skew = Duration::from_secs(30);
        expect_all(Scenario { crashes, loss, skew, epochs: 4, ..QUIET }, seed);
        let five = Scenario { authorities: 5, threshold: 3, ..QUIET };
        expect_all(Scenario { crashes, loss, skew, epochs: 4, ..five }, seed);
    }
}

#[test]
fn a_liar_and_a_crash_at_a_time_never_get_a_wrong_document_signed() {
    for seed in 0..2 {
        let scenario = Scenario { authorities: 5, threshold: 3, liar: true, ..QUIET };
        let scenario = Scenario { loss: 0.1, crashes: 4, ..scenario };
        let report = World::new(scenario, seed).run();
        assert!(report.lies_refused > 0, "seed {seed}");
        // Only its own honest half can be blamed, never another.
        let liar = authority_key(4).identity();
        assert!(report.signed_twice.iter().all(|(who, _)| *who == liar), "seed {seed}");
        assert!(report.epochs.len() >= 3, "seed {seed}: {:?}", report.epochs);
    }
    for seed in 0..2 {
        let report = World::new(Scenario { liar: true, ..QUIET }, seed).run();
        assert!(report.epochs.len() >= 3, "seed {seed}: {:?}", report.epochs);
    }
}

#[test]
fn messages_that_are_none_are_refused_whole() {
    let key = authority_key(0);
    let now = Duration::from_secs(FIRST_EPOCH * EPOCH_SECONDS);
    let rules = rules(3, 2);
    let (admission, network) = (Admission::default(), rules.network().clone());
    let mut core = Authority::new(key, rules, admission, None, Memory::New, now).unwrap();
    let other = authority_key(1);
    let standing = Standing { latest: 0, epoch: FIRST_EPOCH, attempt: 0, vote: None, signed: None };
    let sender = Sender { key: &other, network: &network };
    let good = sender.status(now, standing).message();
    for end in 0..good.len() {
        assert_eq!(core.handle_message(&good[..end], now), Err(MessageError::Malformed), "{end}");
    }
    for at in 0..good.len() {
        let mut bytes = good.to_vec();
        bytes[at] ^= 1;
        assert_eq!(core.handle_message(&bytes, now), Err(MessageError::Malformed), "{at}");
    }
    let stranger = authority_key(9);
    let foreign = Sender { key: &stranger, network: &network }.status(now, standing).message();
    assert_eq!(core.handle_message(&foreign, now), Err(MessageError::Malformed));
    assert_eq!(core.handle_message(&good, now), Ok(()));
    let heard = core.status(now).last_heard;
    assert!(heard.contains(&(other.identity(), Some(now))));
    assert_eq!(core.status(now).in_force.map(|(_, until): (u64, UnixTime)| until), None);
}
