//! End to end: the real program, driven by real `curl` and by raw sockets, against servers on this
//! machine.
//!
//! Nothing waits for a fixed time; each wait ends with an event or, when something is broken, with
//! a generous deadline.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bad_input;
mod browser;
mod lab;
mod life;
mod operators;
mod outcomes;
mod private_provider;
mod process;
mod servers;
mod socks;
mod tools;
mod transfers;
