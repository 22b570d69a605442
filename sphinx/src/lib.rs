//! Sphinx packets and single-use reply blocks (SURBs) for the mixnet.
//!
//! A packet is a header of [`HEADER_LEN`] bytes and a payload whose length is a parameter of the
//! network; every packet of one network has the same length. The sender chooses a [`Route`] of at
//! most [`MAX_HOPS`] hops and wraps header and payload once per hop; each hop takes off one layer
//! and learns its two neighbours and how long to hold the packet, nothing else. The last hop gets
//! the destination, the identifier and the payload.
//!
//! A [`Surb`] is a header that its creator made in advance for a route that ends at the creator.
//! Whoever holds it can send one reply of one payload along that route without learning it.
//!
//! Everything takes batches, because several packets can share one pass of vector code: fours with
//! AVX2, eights with AVX-512. Results come in the order of the requests, and a request that fails
//! leaves its neighbours alone. A [`Backend`] says which code works; all of them give the same.
//!
//! # Format
//!
//! Version 260 of the format of the `sphinx-packet` crate, which is one of the backends. Header
//! (offset, length):
//!
//! | offset | length | field |
//! |--:|--:|---|
//! | 0 | 32 | group element, a Curve25519 u-coordinate ("alpha" in the paper) |
//! | 32 | 16 | HMAC-SHA256 of the routing information, truncated ("gamma") |
//! | 48 | 300 | encrypted routing information, 60 bytes per hop ("beta") |
//!
//! Payload before encryption: 16 zero bytes, the plaintext, one byte `1`, zero bytes to the end.
//! Each layer is LIONESS (BLAKE2b and ChaCha20), a wide-block cipher: whoever changes one bit of a
//! payload turns all of it into noise, and the zero bytes show it at the end of the route. Hops on
//! the way cannot notice. The format is that of G. Danezis and I. Goldberg, "Sphinx: A Compact and
//! Provably Secure Mix Format" (2009), with random instead of zero padding in the last hop's
//! routing information, as C. Kuhn et al., "Breaking and (Partially) Fixing Provably Secure Onion
//! Routing" (2020), ask for.
//!
//! # What a seed decides
//!
//! Each packet and SURB draws exactly 32 bytes, its initial secret, from the generator that the
//! caller passes; requests that are refused draw nothing. They decide every byte: the padding of the
//! last hop's routing information is derived from them as well, except by the backend `reference`,
//! which takes it from the thread's generator.
//!
//! # What is refused
//!
//! Group elements of low order (the shared secret would be zero for everyone), keys that are no
//! multiples of the base point (nobody made them), versions other than 260, lengths that are not
//! exact. The top bit of a group element is ignored as RFC
//! 7748 section 5 says, the 19 encodings at or above 2^255 − 19 are taken modulo that prime, and
//! adding a point of low order changes nothing, because secrets are multiples of 8. So a group
//! element can be written in several ways, and the MAC does not cover it; but all of them give the
//! same shared secret and with it the same [`ReplayTag`], so a replay cannot hide behind them.
//! The version field is 3 bytes, the first of which is ignored as well: only the sender can set it,
//! and nothing is ever done with it. (`sphinx-packet` asserts in debug builds that it is zero; the
//! workspace compiles that crate without debug assertions, so that remote input cannot panic.)
//!
//! # Secrets
//!
//! [`SecretKey`], [`PacketHeader`], [`Surb`], [`ReplyRecovery`] and [`OpenedPacket`] wipe themselves
//! when dropped and show nothing in their `Debug` output; so do scalars, ladders over points, and keys of payloads.
//! What vector registers and spilled parts of them held, and what other crates keep on their stack
//! while they work, is out of reach and not wiped.

mod backend;
mod build;
pub mod compare;
mod header;
mod hkdf;
mod key;
mod packet;
mod payload_layers;
mod peel;
mod reference;
mod route;
mod secrets;
mod self_check;
mod surb;
mod wide_block;
mod wiped;
mod x25519;

pub use backend::{Backend, BackendError};
pub use build::{BuildError, PacketHeader, build_headers, build_packets, fill_headers};
pub use key::{KeyError, PublicKey, SecretKey};
pub use packet::{Packet, PacketError, Payload, PayloadError, max_plaintext, open_payloads};
pub use peel::{OpenedPacket, PeelError, Peeled, ReplayTag, finish, open_headers};
pub use route::{Hop, HopAddress, Identifier, Route, RouteError};
pub use surb::{
    RecoverError, ReplyRecovery, Surb, SurbError, UseSurbError, build_surbs, recover_replies,
    use_surbs,
};

pub use x25519::x25519;

use sphinx_packet::version::{SINGLE_SEED_SURB_VERSION, Version};
use sphinx_packet::{constants, payload};

/// Length of a packet's header in bytes.
pub const HEADER_LEN: usize = 348;
/// Bytes of a payload that are not plaintext: 16 zero bytes before it and one byte after it.
pub const PAYLOAD_OVERHEAD: usize = 17;
/// Shortest payload in bytes: the wide-block cipher needs more than one 32-byte block.
pub const MIN_PAYLOAD_LEN: usize = 33;
/// Length of a SURB in bytes: header, address of the first hop, one 16-byte seed.
pub const SURB_LEN: usize = 396;
/// Most hops of a route, its last hop included.
pub const MAX_HOPS: usize = 5;
/// Length of a [`HopAddress`] in bytes.
pub const HOP_ADDRESS_LEN: usize = 32;
/// Length of an [`Identifier`] in bytes.
pub const IDENTIFIER_LEN: usize = 16;
/// Length of a [`ReplayTag`] in bytes.
pub const REPLAY_TAG_LEN: usize = 32;

/// The one version that is built and accepted.
const VERSION: Version = SINGLE_SEED_SURB_VERSION;

const _: () = {
    assert!(VERSION.0 == 260);
    assert!(HEADER_LEN == sphinx_packet::header::HEADER_SIZE);
    assert!(PAYLOAD_OVERHEAD == payload::PAYLOAD_OVERHEAD_SIZE);
    assert!(MAX_HOPS == constants::MAX_PATH_LENGTH);
    assert!(HOP_ADDRESS_LEN == constants::NODE_ADDRESS_LENGTH);
    assert!(HOP_ADDRESS_LEN == constants::DESTINATION_ADDRESS_LENGTH);
    assert!(IDENTIFIER_LEN == constants::IDENTIFIER_LENGTH);
    assert!(REPLAY_TAG_LEN == constants::REPLAY_TAG_SIZE);
    assert!(SURB_LEN == HEADER_LEN + HOP_ADDRESS_LEN + constants::PAYLOAD_KEY_SEED_SIZE);
};
