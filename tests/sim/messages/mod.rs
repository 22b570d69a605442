//! Messages among fifty clients: nothing comes twice, and what was reported delivered arrives.
//!
//! The cores of clients ([`Messages`](mixsocks_common::message::Messages)), mixes and gateways are the real
//! ones, and the store of a gateway follows the trait
//! [`Store`](mixsocks_node::gateway::store::Store): see `docs/simulation.md`.

mod applications;
mod client;
mod faults;
mod gateway;
mod model;
mod nodes;
mod single;
mod store;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};

use self::faults::QUIET_END;
use self::world::World;
use crate::codec::{Codec, Plain, Real};
use crate::runner::run_seeds;

/// A seed takes as long as three of the simulation of streams.
const COST: u64 = 3;

/// One seed in so many has real cryptography.
const REAL_EVERY: u64 = 100;

/// Runs a seed to its end: how many messages were sent, and delivered.
fn run<C: Codec>(seed: u64) -> Result<(usize, usize), String> {
    let mut world = World::<C>::new(seed);
    let played = world.play(QUIET_END).and_then(|()| world.check_end());
    played.map_err(|error| format!("{error}\n{}", world.trace()))?;
    Ok(world.model.counts())
}

fn run_any(seed: u64) -> Result<(usize, usize), String> {
    if seed % REAL_EVERY == REAL_EVERY - 1 { run::<Real>(seed) } else { run::<Plain>(seed) }
}

#[test]
fn messages_come_at_most_once_and_what_was_delivered_arrives() {
    let [sent, delivered] = [(); 2].map(|()| AtomicUsize::new(0));
    run_seeds(COST, |seed| {
        let counts = run_any(seed)?;
        sent.fetch_add(counts.0, Ordering::Relaxed);
        delivered.fetch_add(counts.1, Ordering::Relaxed);
        Ok(())
    });
    let [sent, delivered] = [sent, delivered].map(AtomicUsize::into_inner);
    println!("{delivered} of {sent} messages were delivered");
    // The others are those to strangers, of clients that were killed or away, to those who were when
    // they were replied to, and what small shares do not take.
    assert!(delivered * 10 >= sent * 7, "only {delivered} of {sent} were delivered");
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
