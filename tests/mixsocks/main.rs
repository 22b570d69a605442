//! End to end: the real program, driven by real `curl` and by raw sockets, against servers on this
//! machine.
//!
//! Nothing waits for a fixed time; each wait ends with an event or, when something is broken, with
//! a generous deadline.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod authorities;
mod bad_input;
mod bench;
mod browser;
mod crowd;
mod faults;
mod killed;
mod killed_gateways;
mod lab;
mod life;
mod machines;
mod messages;
mod operators;
mod outcomes;
mod people;
mod private_provider;
mod process;
mod rotation;
mod servers;
#[path = "../../node/src/gateway/store/small_disk.rs"]
mod small_disk;
mod socks;
mod terminal;
mod tools;
mod town;
mod transfer;
mod transfers;
mod watching;
mod web_driver;
mod websocket;
