//! Clients of networks that lose packets, and mixes that die and come back.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::testing::TestNetwork;

const MS: Duration = Duration::from_millis(1);
const TRIP: Duration = Duration::from_millis(100);

/// A client of a network that loses what a test says.
struct World {
    health: Health,
    now: Instant,
    rng: StdRng,
    /// Share of what is lost anywhere.
    loss: f64,
    dead: BTreeSet<HopAddress>,
    /// Loops under way, and when they come.
    coming: VecDeque<(Instant, Identifier)>,
    loops: usize,
}

impl World {
    /// Two mixes in each layer.
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let health = Health::new(&TestNetwork::new().topology(0), now);
        let rng = StdRng::seed_from_u64(seed);
        let (dead, coming) = (BTreeSet::new(), VecDeque::new());
        Self { health, now, rng, loss: 0.0, dead, coming, loops: 0 }
    }

    fn mix(&self, layer: usize, number: usize) -> HopAddress {
        *self.health.layers[layer].mixes.keys().nth(number).unwrap()
    }

    /// As routes are drawn.
    fn draw(&mut self, through: Option<HopAddress>) -> Mixes {
        let Self { health, rng, .. } = self;
        std::array::from_fn(|layer| {
            let mixes = &health.layers[layer].mixes;
            if let Some(through) = through.filter(|id| mixes.contains_key(id)) {
                return through;
            }
            let good: Vec<_> = mixes.keys().filter(|id| !health.avoided.contains(*id)).collect();
            **good.choose(rng).unwrap()
        })
    }

    fn is_lost(&mut self, mixes: &Mixes) -> bool {
        mixes.iter().any(|id| self.dead.contains(id)) || self.rng.random_bool(self.loss)
    }

    /// Loops leave and come.
    fn step(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        while self.coming.front().is_some_and(|(at, _)| *at <= now) {
            let (_, identifier) = self.coming.pop_front().unwrap();
            assert!(self.health.loop_came(now, &identifier));
            assert!(!self.health.loop_came(now, &identifier), "once");
        }
        self.health.handle_timeout(now);
        while let Some(wish) = self.health.next_loop(now) {
            self.health.loop_taken(now, wish);
            let mixes = self.draw(wish.through);
            let (identifier, way) = (self.rng.random(), Way { delay: TRIP, mixes });
            self.health.loop_sent(now, wish, identifier, way);
            self.loops += 1;
            if !self.is_lost(&mixes) {
                self.coming.push_back((now + TRIP, identifier));
            }
        }
        assert!(self.health.wishes.len() <= MAX_WISHES);
    }

    /// Own packets, one in a millisecond, for so long; their fate is known 200 ms later.
    fn send(&mut self, time: Duration) {
        let mut fates = VecDeque::new();
        let end = self.now + time;
        while self.now < end {
            let mixes = self.draw(None);
            let has_come = !self.is_lost(&mixes);
            fates.push_back((self.now, mixes, has_come));
            self.step(MS);
            while fates.front().is_some_and(|(sent, ..)| *sent + 2 * TRIP <= self.now) {
                let (sent, mixes, has_come) = fates.pop_front().unwrap();
                self.health.on_fate(self.now, &mixes, sent, has_come);
            }
        }
    }

    fn rest(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step(10 * MS);
        }
    }

    fn avoided(&self) -> Vec<HopAddress> {
        self.health.avoided.iter().copied().collect()
    }
}

#[test]
fn a_dead_mix_is_avoided_within_two_seconds_and_no_other() {
    for seed in 0..20 {
        let mut world = World::new(seed);
        world.send(Duration::from_secs(1));
        let dead = world.mix(1, 0);
        world.dead.insert(dead);
        world.send(Duration::from_secs(2));
        assert_eq!(world.avoided(), [dead], "seed {seed}");
        assert!(world.health.take_news() && !world.health.take_news());
        assert_eq!(*world.health.choice().avoided, world.dead);
    }
}

/// One request is lost, and loops find out why.
#[test]
fn a_client_that_hardly_sends_finds_a_dead_mix_within_five_seconds() {
    for seed in 0..20 {
        let mut world = World::new(seed);
        let dead = world.mix(0, 1);
        world.dead.insert(dead);
        let mixes = [dead, world.mix(1, 0), world.mix(2, 0)];
        world.health.on_fate(world.now, &mixes, world.now, false);
        world.rest(Duration::from_secs(5));
        assert_eq!(world.avoided(), [dead], "seed {seed}");
    }
}

#[test]
fn random_loss_makes_no_mix_seem_dead() {
    for (seed, loss) in [(1, 0.01), (2, 0.05), (3, 0.2)] {
        let mut world = World::new(seed);
        world.loss = loss;
        world.send(Duration::from_secs(60));
        assert_eq!(world.avoided(), [] as [HopAddress; 0], "loss {loss}");
        assert!(world.loops < 6000, "{} loops in a minute with {loss}", world.loops);
    }
}

#[test]
fn at_most_half_of_a_layer_is_avoided() {
    let mut world = World::new(1);
    world.send(Duration::from_secs(1));
    // Something comes through now and then, so that the layer is not away as a whole.
    let dead = [world.mix(0, 0), world.mix(0, 1)];
    let alive: Vec<_> = (1..3).map(|layer| world.mix(layer, 0)).collect();
    for number in 0..2000usize {
        let mixes = [dead[number % 2], alive[0], alive[1]];
        let identifier = world.rng.random();
        let wish = LoopWish { through: None };
        let way = Way { delay: TRIP, mixes };
        world.health.loop_sent(world.now, wish, identifier, way);
        world.now += MS;
        if number % 100 < 2 {
            world.health.loop_came(world.now, &identifier);
        }
        world.health.handle_timeout(world.now);
    }
    world.now += 2 * LOOP_SLACK;
    world.health.handle_timeout(world.now);
    let avoided = world.health.layers.each_ref().map(Layer::avoided);
    assert!(avoided[0] == 1 && avoided.iter().all(|count| *count <= 1), "{avoided:?} of two");
}

#[test]
fn the_number_of_loops_is_bounded() {
    let mut world = World::new(1);
    let mixes = world.draw(None);
    // A delay so long that none is given up meanwhile.
    let way = Way { delay: Duration::from_secs(1_000_000), mixes };
    let mut sent = 0;
    for _ in 0..2000 {
        world.now += MAX_PAUSE + CALM;
        world.health.on_fate(world.now, &mixes, world.now, false);
        while let Some(wish) = world.health.next_loop(world.now) {
            world.health.loop_taken(world.now, wish);
            let identifier = world.rng.random();
            world.health.loop_sent(world.now, wish, identifier, way);
            sent += 1;
        }
        assert!(world.health.loops.len() <= MAX_LOOPS);
    }
    assert!(sent >= MAX_LOOPS && world.health.next_loop_at(world.now).is_none(), "{sent}");
}

#[test]
fn when_nothing_comes_at_all_no_mix_is_blamed() {
    let mut world = World::new(1);
    world.send(Duration::from_secs(1));
    world.loss = 1.0;
    world.send(Duration::from_secs(40));
    world.loss = 0.0;
    world.send(Duration::from_secs(5));
    assert_eq!(world.avoided(), [] as [HopAddress; 0]);
}

#[test]
fn a_mix_that_is_back_is_used_again() {
    let mut world = World::new(1);
    world.send(Duration::from_secs(1));
    let dead = world.mix(2, 1);
    world.dead.insert(dead);
    world.send(Duration::from_secs(4));
    assert_eq!(world.avoided(), [dead]);
    world.dead.clear();
    world.send(FIRST_AVOIDED + Duration::from_secs(6));
    assert_eq!(world.avoided(), [] as [HopAddress; 0]);
    // The next time it is avoided for longer.
    world.dead.insert(dead);
    world.send(Duration::from_secs(4));
    world.dead.clear();
    world.send(FIRST_AVOIDED);
    assert_eq!(world.avoided(), [dead]);
    world.send(FIRST_AVOIDED + Duration::from_secs(12));
    assert_eq!(world.avoided(), [] as [HopAddress; 0]);
}

#[test]
fn a_mix_that_stays_dead_is_asked_ever_more_rarely() {
    let mut world = World::new(1);
    let dead = world.mix(2, 1);
    world.dead.insert(dead);
    world.send(Duration::from_secs(5));
    world.rest(Duration::from_secs(600));
    let before = world.loops;
    world.rest(Duration::from_secs(600));
    let asked = world.loops - before;
    assert!((5..=15).contains(&asked), "{asked} loops in ten minutes");
}

/// What a provider says must not decide over routes.
#[test]
fn lies_about_packets_make_no_mix_avoided() {
    let mut world = World::new(1);
    world.send(Duration::from_secs(1));
    let hated = world.mix(2, 0);
    for _ in 0..20_000 {
        let mixes = world.draw(None);
        world.health.on_fate(world.now, &mixes, world.now, !mixes.contains(&hated));
        if !mixes.contains(&hated) {
            world.health.on_reply(world.now, &mixes);
        }
        world.step(MS);
    }
    assert_eq!(world.avoided(), [] as [HopAddress; 0]);
}

/// Replies show it, even if nothing that is sent is lost.
#[test]
fn a_mix_that_passes_no_replies_on_is_found_by_loops() {
    let mut world = World::new(1);
    let dead = world.mix(2, 0);
    world.dead.insert(dead);
    for _ in 0..3000 {
        let mixes = world.draw(None);
        if !mixes.contains(&dead) {
            world.health.on_reply(world.now, &mixes);
        }
        world.step(MS);
    }
    assert_eq!(world.avoided(), [dead]);
}

#[test]
fn a_layer_of_one_mix_is_never_avoided() {
    let mut network = TestNetwork::new();
    (1..=3).for_each(|layer| network.remove_mix(layer));
    let mut world = World::new(1);
    world.health.follow(&network.topology(0), world.now);
    let only = *world.health.layers[0].mixes.keys().next().unwrap();
    world.send(Duration::from_secs(1));
    world.dead.insert(only);
    world.send(Duration::from_secs(20));
    assert!(world.avoided().is_empty());
}

#[test]
fn a_new_document_keeps_what_is_known_of_those_that_stay() {
    let network = TestNetwork::new();
    let mut world = World::new(1);
    world.health.follow(&network.topology(0), world.now);
    world.send(Duration::from_secs(1));
    let dead = world.mix(0, 0);
    world.dead.insert(dead);
    world.send(Duration::from_secs(3));
    world.health.follow(&network.topology(0), world.now);
    assert_eq!(world.avoided(), [dead]);
    // With one mix left in the layer, that one is used whatever it does.
    let mut smaller = network;
    while *world.health.layers[0].mixes.keys().next().unwrap() == dead
        && world.health.layers[0].mixes.len() > 1
    {
        smaller.remove_mix(1);
        world.health.follow(&smaller.topology(0), world.now);
    }
    assert!(world.health.layers[0].avoided() <= world.health.layers[0].mixes.len() / 2);
}
