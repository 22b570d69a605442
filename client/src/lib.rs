//! The mixnet client: a connection to a gateway, sessions with a provider, streams for programs.
//!
//! [`Client`] opens streams through a provider; [`Endpoint`] is what it stands on, and what a service
//! of one's own would. Behind the feature `socks`, the module `socks` is a SOCKS5 listener on top; behind `websocket`,
//! `websocket` lets programs send and receive messages.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod client;
pub mod core;
mod documents;
pub mod drops;
mod endpoint;
pub mod gateway;
mod headers;
pub mod health;
pub mod messages;
pub mod relay;
mod renewal;
#[cfg(feature = "socks")]
pub mod socks;
pub mod stream;
mod surbs;
#[cfg(test)]
mod testing;
#[cfg(feature = "websocket")]
pub mod websocket;

pub use client::{Client, ClientConfig, ClientError};
pub use endpoint::{Arrivals, Endpoint, EndpointConfig, Reserved, worker_count};
pub use headers::ReadyHeader;
pub use renewal::{LOOK_INTERVAL, Renewal, Stale};
pub use stream::{MixStream, OpenError};
pub use surbs::{Awaited, MAX_AWAITED_REPLIES, MAX_READY_SURBS, ReadySurb};
