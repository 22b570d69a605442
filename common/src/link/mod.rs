//! Links between nodes, and between a client and its gateway: [`frame`]s of one size inside TLS
//! that is pinned to identities ([`tls`]), opened by a [`hello`]; dialled again by [`redial`].

pub mod frame;
pub mod hello;
pub mod redial;
pub mod tls;

pub use frame::{FRAME_OVERHEAD, Frame, FrameBody, FrameCodec, FrameError};
pub use hello::{Hello, HelloError};
pub use redial::Redial;
pub use tls::LinkError;
