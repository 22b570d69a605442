//! One connection to a gateway: frames over a websocket over pinned TLS.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use mixsocks_common::gateway::message::{ClientMessage, GatewayMessage};
use mixsocks_common::gateway::transcript::{Binding, EXPORTER_LABEL, EXPORTER_LEN};
use mixsocks_common::gateway::websocket;
use mixsocks_common::keys::Identity;
use mixsocks_common::link::redial::CONNECT_TIMEOUT;
#[cfg(any(target_os = "linux", target_os = "android"))]
use mixsocks_common::link::redial::UNANSWERED_TIMEOUT;
use mixsocks_common::link::tls::{self, CLIENT_ALPN};
use mixsocks_common::link::{FrameBody, FrameCodec, LinkError};
use rustls::ClientConfig;
#[cfg(any(target_os = "linux", target_os = "android"))]
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};

use super::GatewayLinkError;

/// The name in the HTTP request; nothing depends on it.
const URL: &str = "ws://mixsocks.invalid/";

pub(super) type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// How to reach a gateway.
pub(super) struct Dialler {
    pub(super) gateway: Identity,
    pub(super) address: SocketAddr,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) codec: FrameCodec,
}

/// A websocket to the right gateway, before or after the handshake of the gateway protocol.
pub(super) struct Connection {
    pub(super) socket: Socket,
    codec: FrameCodec,
}

impl Dialler {
    /// Connects, and makes sure that it is the right gateway. Only the first of it, until the
    /// gateway's system answers, has a time limit of its own.
    pub(super) async fn dial(&self) -> Result<(Connection, Binding), GatewayLinkError> {
        let unreachable = |source| GatewayLinkError::Unreachable { address: self.address, source };
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(self.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(unreachable)?;
        prepare(&stream).map_err(unreachable)?;
        let stream = TlsConnector::from(self.tls.clone())
            .connect(tls::server_name(), stream)
            .await
            .map_err(|error| self.tls_error(error))?;
        let session = stream.get_ref().1;
        tls::check_protocol(session, CLIENT_ALPN).map_err(|source| self.link_error(source))?;
        let exporter = session
            .export_keying_material([0u8; EXPORTER_LEN], EXPORTER_LABEL, None)
            .map_err(|error| self.link_error(error.into()))?;
        let config = websocket::client_config(self.codec.frame_bytes());
        let (socket, _) =
            tokio_tungstenite::client_async_with_config(URL, stream, Some(config)).await?;
        Ok((Connection { socket, codec: self.codec }, Binding::Session(exporter)))
    }

    fn tls_error(&self, error: io::Error) -> GatewayLinkError {
        match LinkError::from_io(&error) {
            Some(source) => self.link_error(source),
            // Somebody has answered: this is no dial that costs the gateway nothing.
            None => tungstenite::Error::Io(error).into(),
        }
    }

    fn link_error(&self, source: LinkError) -> GatewayLinkError {
        let address = self.address;
        match source {
            LinkError::WrongIdentity { expected, actual } => {
                GatewayLinkError::WrongKey { address, expected, actual }
            }
            source => GatewayLinkError::Tls { address, source },
        }
    }
}

impl Connection {
    /// Sends a message of the handshake.
    pub(super) async fn send(&mut self, message: &ClientMessage) -> Result<(), GatewayLinkError> {
        let frame = control_frame(&self.codec, 0, message)?;
        Ok(self.socket.send(frame).await?)
    }

    /// Waits for a message of the handshake.
    pub(super) async fn receive(&mut self) -> Result<GatewayMessage, GatewayLinkError> {
        let bytes = next_frame(&mut self.socket).await?;
        match self.codec.decode(&bytes)?.body {
            FrameBody::Control(body) => Ok(GatewayMessage::decode(body)?),
            FrameBody::Packet { .. } => Err(GatewayLinkError::Unexpected("packet")),
            FrameBody::Pad => Err(GatewayLinkError::Unexpected("pad")),
        }
    }
}

/// Sets up a TCP connection that is new: what is written to it goes at once, and it ends when the other
/// end's system has answered nothing for [`UNANSWERED_TIMEOUT`] of what was written. Elsewhere than on
/// Linux only the keepalive notices that.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    SockRef::from(stream).set_tcp_user_timeout(Some(UNANSWERED_TIMEOUT))?;
    Ok(())
}

/// Waits for the bytes of a frame. Can be cancelled without loss.
pub(super) async fn next_frame(
    stream: &mut (impl StreamExt<Item = Result<Message, tungstenite::Error>> + Unpin),
) -> Result<bytes::Bytes, GatewayLinkError> {
    Ok(websocket::received(stream.next().await)?)
}

/// A websocket message with one CONTROL frame.
pub(super) fn control_frame(
    codec: &FrameCodec,
    counter: u64,
    message: &ClientMessage,
) -> Result<Message, GatewayLinkError> {
    Ok(websocket::control_message(codec, counter, &message.encode())?)
}
