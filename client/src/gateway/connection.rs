//! One connection to a gateway: frames over a websocket over pinned TLS.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use mixsocks_common::gateway::message::{ClientMessage, GatewayMessage};
use mixsocks_common::gateway::transcript::{Binding, EXPORTER_LABEL, EXPORTER_LEN};
use mixsocks_common::keys::Identity;
use mixsocks_common::link::tls::{self, CLIENT_ALPN};
use mixsocks_common::link::{FrameBody, FrameCodec, LinkError};
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use super::GatewayLinkError;

/// The name in the HTTP request; nothing depends on it.
const URL: &str = "ws://mixsocks.invalid/";
/// What a TLS record carries at most.
const READ_BUFFER_BYTES: usize = 16 * 1024;
/// Bytes that are gathered before they are written.
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

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
    /// Connects, and makes sure that it is the right gateway. Without a time limit of its own.
    pub(super) async fn dial(&self) -> Result<(Connection, Binding), GatewayLinkError> {
        let unreachable = |source| GatewayLinkError::Unreachable { address: self.address, source };
        let stream = TcpStream::connect(self.address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let stream = TlsConnector::from(self.tls.clone())
            .connect(tls::server_name(), stream)
            .await
            .map_err(|error| self.tls_error(error))?;
        let session = stream.get_ref().1;
        tls::check_protocol(session, CLIENT_ALPN).map_err(|source| self.link_error(source))?;
        let exporter = session
            .export_keying_material([0u8; EXPORTER_LEN], EXPORTER_LABEL, None)
            .map_err(|error| self.link_error(error.into()))?;
        let config = websocket_config(self.codec.frame_bytes());
        let (socket, _) =
            tokio_tungstenite::client_async_with_config(URL, stream, Some(config)).await?;
        Ok((Connection { socket, codec: self.codec }, Binding::Session(exporter)))
    }

    fn tls_error(&self, error: io::Error) -> GatewayLinkError {
        match LinkError::from_io(&error) {
            Some(source) => self.link_error(source),
            None => GatewayLinkError::Unreachable { address: self.address, source: error },
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

/// What a websocket may hold. Whoever writes waits beyond [`WRITE_BUFFER_BYTES`], so that no more
/// than one frame and a farewell come on top, each with its websocket header: two frames have room
/// for both.
fn websocket_config(frame_bytes: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES + 2 * frame_bytes)
        .max_message_size(Some(frame_bytes))
        .max_frame_size(Some(frame_bytes))
}

/// Waits for the bytes of a frame. Can be cancelled without loss.
pub(super) async fn next_frame<S>(stream: &mut S) -> Result<bytes::Bytes, GatewayLinkError>
where
    S: StreamExt<Item = Result<Message, tokio_tungstenite::tungstenite::Error>> + Unpin,
{
    match stream.next().await {
        Some(Ok(Message::Binary(bytes))) => Ok(bytes),
        // Neither end sends pings, and the websocket has queued its answer before it tells of one:
        // the answers would pile up for a peer that does not read, so the first one ends it.
        Some(Ok(Message::Ping(_) | Message::Pong(_))) => Err(GatewayLinkError::Unexpected("ping")),
        Some(Ok(Message::Text(_) | Message::Frame(_))) => {
            Err(GatewayLinkError::Unexpected("text message"))
        }
        Some(Ok(Message::Close(_))) | None => Err(GatewayLinkError::Closed),
        Some(Err(error)) => Err(error.into()),
    }
}

/// A websocket message with one CONTROL frame.
pub(super) fn control_frame(
    codec: &FrameCodec,
    counter: u64,
    message: &ClientMessage,
) -> Result<Message, GatewayLinkError> {
    let mut frame = Vec::with_capacity(codec.frame_bytes());
    codec.encode_control(counter, &message.encode(), &mut frame)?;
    Ok(Message::Binary(frame.into()))
}

#[cfg(test)]
mod tests {
    use futures_util::stream::iter;

    use super::*;

    #[tokio::test]
    async fn a_gateway_that_sends_pings_breaks_the_protocol() {
        for message in [Message::Ping(bytes::Bytes::new()), Message::Pong(bytes::Bytes::new())] {
            let error = next_frame(&mut iter([Ok(message)])).await.unwrap_err();
            assert!(matches!(error, GatewayLinkError::Unexpected("ping")), "{error}");
        }
    }

    #[test]
    fn what_is_written_is_bounded_and_leaves_room_for_one_frame_more() {
        let config = websocket_config(2444);
        assert_eq!(config.max_write_buffer_size, WRITE_BUFFER_BYTES + 2 * 2444);
        assert_eq!(config.write_buffer_size, WRITE_BUFFER_BYTES);
    }
}
