//! Packets and SURBs along whole routes, and what hops make of hostile ones.

#![expect(clippy::unwrap_used, reason = "tests")]

mod determinism;
mod differential;
mod forge;
mod hostile;
mod network;
mod round_trip;
mod tampering;
