//! Messages among fifty clients: nothing comes twice, and what was reported delivered arrives.
//!
//! The cores of clients ([`Messages`](mixsocks_common::message::Messages)), mixes and gateways
//! ([`InboxCore`](mixsocks_node::gateway::InboxCore)) are the real ones, and the store of a gateway follows
//! the trait [`Store`](mixsocks_node::gateway::store::Store): see `docs/simulation.md`.

mod applications;
mod client;
mod connections;
mod faults;
mod gateway;
mod model;
mod nodes;
mod receiving;
mod single;
mod store;
mod world;

use std::sync::Mutex;

use self::faults::QUIET_END;
use self::receiving::Mishaps;
use self::world::World;
use crate::codec::{Codec, Plain, Real};
use crate::runner::run_seeds;

/// A seed takes as long as three of the simulation of streams.
const COST: u64 = 3;

/// One seed in so many has real cryptography.
const REAL_EVERY: u64 = 100;

/// What has happened in a seed.
#[derive(Clone, Copy, Default)]
struct Counts {
    sent: usize,
    delivered: usize,
    mishaps: Mishaps,
}

/// Runs a seed to its end.
fn run<C: Codec>(seed: u64) -> Result<Counts, String> {
    let mut world = World::<C>::new(seed);
    let played = world.play(QUIET_END).and_then(|()| world.check_end());
    played.map_err(|error| format!("{error}\n{}", world.trace()))?;
    let (sent, delivered) = world.model.counts();
    Ok(Counts { sent, delivered, mishaps: world.asking.mishaps })
}

fn run_any(seed: u64) -> Result<Counts, String> {
    if seed % REAL_EVERY == REAL_EVERY - 1 { run::<Real>(seed) } else { run::<Plain>(seed) }
}

#[test]
fn messages_come_at_most_once_and_what_was_delivered_arrives() {
    let all = Mutex::new(Counts::default());
    run_seeds(COST, |seed| {
        let counts = run_any(seed)?;
        let mut all = all.lock().unwrap();
        all.sent += counts.sent;
        all.delivered += counts.delivered;
        all.mishaps.add(counts.mishaps);
        Ok(())
    });
    let Counts { sent, delivered, mishaps } = all.into_inner().unwrap();
    println!("{delivered} of {sent} messages were delivered; {mishaps:?}");
    // The others are those to strangers, of clients that were killed or away, to those who were when
    // they were replied to, and what small shares do not take.
    assert!(delivered * 10 >= sent * 7, "only {delivered} of {sent} were delivered");
}

#[test]
fn what_may_happen_to_a_receive_and_its_answer_happens_in_a_few_seeds() {
    let mut mishaps = Mishaps::default();
    for seed in 0..8 {
        mishaps.add(run::<Plain>(seed).unwrap().mishaps);
        if mishaps.each().into_iter().all(|times| times > 0) {
            return;
        }
    }
    panic!("{mishaps:?}");
}

#[test]
fn a_seed_of_messages_decides_everything() {
    let [first, second] = [(); 2].map(|()| {
        let mut world = World::<Plain>::new(1);
        world.play(QUIET_END).unwrap();
        (world.model.counts(), world.trace())
    });
    assert_eq!(first, second);
}
