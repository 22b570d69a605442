//! Mixes and gateways.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod accept;
pub mod counters;
pub mod gateway;
pub mod link;
pub mod mix;
pub mod peel;
mod sources;
