//! The whole network in one seeded simulation: see `docs/simulation.md`.
//!
//! `MIXSOCKS_SIM_SEED=7` replays one seed, `MIXSOCKS_SIM_SEEDS=10000` runs more of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod apps;
mod codec;
mod endpoint;
mod faults;
mod model;
mod network;
mod runner;
mod world;
