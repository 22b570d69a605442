//! The protocols of mixsocks as pure cores: no sockets, no clock, no threads.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod address;
pub mod directory;
pub mod gateway;
pub mod keys;
pub mod link;
pub mod message;
pub mod replay;
pub mod session;
mod signed_text;
pub mod target;
pub mod topology;
