//! What can be wrong with a link to a gateway.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use mixsocks_common::gateway::client::ClientError;
use mixsocks_common::gateway::delivery::CounterError;
use mixsocks_common::gateway::message::{MessageError, Refusal};
use mixsocks_common::gateway::websocket::ReceiveError;
use mixsocks_common::keys::Identity;
use mixsocks_common::link::{FrameError, LinkError};

use super::TokenFileError;

/// Why there is no connection to the gateway.
#[derive(Debug, thiserror::Error)]
pub enum GatewayLinkError {
    /// The topology has no such gateway.
    #[error("the gateway {0} is not in the topology: has it left the network?")]
    UnknownGateway(Identity),
    /// Nobody answers at the gateway's address.
    #[error(
        "the gateway cannot be reached at {address}: {source} (is this machine online, and does a firewall let it out?)"
    )]
    Unreachable {
        /// The address in the topology.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The gateway does not answer in time.
    #[error("the gateway at {address} does not finish its handshake within {seconds} s")]
    TimedOut {
        /// The address in the topology.
        address: SocketAddr,
        /// How long it had.
        seconds: u64,
    },
    /// Somebody else answers at the gateway's address.
    #[error(
        "at {address} answers {actual} instead of the gateway {expected}: the topology is outdated, or somebody is in between"
    )]
    WrongKey {
        /// The address in the topology.
        address: SocketAddr,
        /// The gateway's identity.
        expected: Identity,
        /// Who answers.
        actual: Identity,
    },
    /// What answers does not speak our TLS.
    #[error("no trusted connection to the gateway at {address}: {source}")]
    Tls {
        /// The address in the topology.
        address: SocketAddr,
        /// What failed.
        source: LinkError,
    },
    /// The websocket could not be set up, or broke.
    #[error("the connection to the gateway broke: {0}")]
    WebSocket(#[source] Box<tokio_tungstenite::tungstenite::Error>),
    /// The gateway refuses this client.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A newer connection of the same identity took over.
    #[error("another program has connected to the gateway with this identity")]
    Evicted,
    /// The gateway closed the connection.
    #[error("the gateway closed the connection")]
    Closed,
    /// The gateway was silent for too long.
    #[error("the gateway has been silent for too long")]
    Silent,
    /// The gateway takes no bytes any more.
    #[error("the gateway has taken nothing for too long")]
    Stalled,
    /// The gateway's handshake is out of order.
    #[error("the gateway breaks the protocol: {0}")]
    Handshake(#[from] ClientError),
    /// The gateway sent a malformed message.
    #[error("the gateway breaks the protocol: {0}")]
    Message(#[from] MessageError),
    /// The gateway sent a malformed frame.
    #[error("the gateway breaks the protocol: {0}")]
    Frame(#[from] FrameError),
    /// The gateway sent something that has no place here.
    #[error("the gateway breaks the protocol: unexpected {0}")]
    Unexpected(&'static str),
    /// The gateway's counter cannot be right.
    #[error("the gateway breaks the protocol: {0}")]
    Counter(#[from] CounterError),
    /// The token file cannot be used.
    #[error("the token file {path}: {source}")]
    TokenFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: TokenFileError,
    },
}

impl From<ReceiveError> for GatewayLinkError {
    fn from(error: ReceiveError) -> Self {
        match error {
            ReceiveError::Closed => Self::Closed,
            ReceiveError::Unexpected(what) => Self::Unexpected(what),
            ReceiveError::Broken(error) => error.into(),
        }
    }
}

impl From<tokio_tungstenite::tungstenite::Error> for GatewayLinkError {
    fn from(error: tokio_tungstenite::tungstenite::Error) -> Self {
        use tokio_tungstenite::tungstenite::Error;
        match error {
            Error::ConnectionClosed | Error::AlreadyClosed => Self::Closed,
            Error::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => Self::Closed,
            error => Self::WebSocket(Box::new(error)),
        }
    }
}
