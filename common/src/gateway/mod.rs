//! What a client and its gateway say to each other.
//!
//! The connection is a websocket over TLS that is pinned to the gateway's identity; an operator may
//! put a front with a web certificate before it. Every websocket message is binary and one link
//! frame (see [`crate::link`]) of the one size of the network, also during the handshake, whose
//! messages are the bodies of CONTROL frames.
//!
//! ```text
//! client                              gateway
//!   HELLO         ─────────────────────►         identity and nonce
//!         ◄─────────────────────   CHALLENGE     nonce, how to register
//!   REGISTER      ─────────────────────►         only without a token: signature
//!         ◄─────────────────────  REGISTERED     token
//!   AUTHENTICATE  ─────────────────────►         token, masked; where to resume
//!         ◄─────────────────────     WELCOME     counters to resume with
//!   PACKET, PAD   ◄────────────────────►         until EVICTED, GOODBYE or a cut
//!   RECEIVE       ─────────────────────►         only who wants what is kept for it
//!         ◄─────────────────────    DELIVERY     each that is kept, once per connection
//!   CONFIRM       ─────────────────────►         which of them may go
//! ```
//!
//! The gateway answers with REFUSED and closes when it lets a client no further; both sides close
//! on anything that is malformed or out of order.
//!
//! - [`message`]: the messages and their layouts.
//! - [`token`]: the token, what a gateway stores of it, and the form in which it travels.
//! - [`transcript`]: what signatures and masked tokens are bound to.
//! - [`client`] and [`server`]: the two sides of the handshake as state machines.
//! - [`delivery`]: what one side holds for the other until it is confirmed, also across a cut.
//! - [`websocket`]: frames as websocket messages, and what a websocket may hold.
//! - [`keepalive`]: when to send a PAD, and when the other side is gone.
//!
//! # What a frame shows
//! Frames have one size inside TLS. When a side sends a PAD depends only on what an observer sees
//! anyway (when frames were sent and how many arrived), never on what the frames were, so that
//! PACKET and PAD cannot be told apart by what follows them.

pub mod client;
pub mod delivery;
pub mod keepalive;
pub mod message;
pub mod server;
pub mod token;
pub mod transcript;
pub mod websocket;

/// Version of the protocol, stated in HELLO.
pub const VERSION: u16 = 1;
