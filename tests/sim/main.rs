//! The whole network in one seeded simulation: see `docs/simulation.md`.
//!
//! `MIXSOCKS_SIM_SEED=7` replays one seed, `MIXSOCKS_SIM_SEEDS=10000` runs more of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod access;
mod apps;
mod bounds;
mod codec;
mod damage;
mod documents;
mod endpoint;
mod faults;
mod hostile;
mod messages;
mod model;
mod network;
mod outages;
mod runner;
mod world;
