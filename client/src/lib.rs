//! The mixnet client.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod gateway;
#[cfg(feature = "socks")]
pub mod socks;
pub mod stream;
