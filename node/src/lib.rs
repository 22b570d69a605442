//! Mixes and gateways.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod accept;
mod clock;
pub mod counters;
pub mod gateway;
pub mod keys;
pub mod link;
pub mod mix;
pub mod monitor;
pub mod peel;
pub mod replay_log;
mod reserve;
mod sources;
mod upkeep;
