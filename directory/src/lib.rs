//! The directory over HTTP: the server of an authority, and what members and clients ask of it.
//!
//! The cores are in [`mixsocks_common::directory`]; here are sockets, clocks and tasks. Nothing is
//! trusted because of where it came from: documents, descriptors, rules and messages are signed.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod body_pass;
mod clock;
mod follow;
mod http;
mod listener;
mod publish;
mod server;
mod service;
#[cfg(test)]
mod tests;
mod url;

pub use clock::{now, unix_time};
pub use follow::{Follow, FollowConfig, Following};
pub use http::{Http, HttpError};
pub use listener::{
    Bounded, BoundedListener, MAX_CONNECTION_TIME, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE,
};
pub use publish::{PublishConfig, Publisher, learn_descriptors, learn_rules};
pub use service::{Asker, DirectoryConfig, DirectoryServer, Peer, StartError, Store};
pub use url::{BadUrl, Url};
