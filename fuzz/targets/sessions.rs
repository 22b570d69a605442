//! Honest ends and a network that loses, repeats and reorders: what is read is what was written, and
//! everything arrives once the network is good again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixsocks_fuzz::sessions::{Op, World};

fuzz_target!(|ops: Vec<Op>| {
    let mut world = World::default();
    ops.iter().for_each(|op| world.apply(op));
    world.conclude();
});
