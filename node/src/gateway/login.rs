//! A connection from its first byte to WELCOME.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use mixsocks_common::gateway::message::{
    ClientMessage, GatewayMessage, MessageError, Refusal, RegistrationMode,
};
use mixsocks_common::gateway::server::{
    Authenticating, GatewayHandshake, GatewaySetup, GatewayStep, Login, OutOfOrder, Registering,
};
use mixsocks_common::gateway::transcript::{Binding, EXPORTER_LABEL, EXPORTER_LEN};
use mixsocks_common::gateway::websocket::{self, ReceiveError};
use mixsocks_common::keys::Identity;
use mixsocks_common::link::tls::{self, CLIENT_ALPN};
use mixsocks_common::link::{FrameBody, FrameCodec, FrameError, LinkError};
use mixsocks_common::topology::{NetworkName, Topology};
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};
use tracing::warn;

use super::clients::{Attached, Clients};
use super::limits::RegistrationLimit;
use super::messages::Messages;
use super::store::{Change, Outcome};
use crate::counters::{Counters, DropReason};
use crate::link::prepare;
use crate::sources::Source;

/// From the first TCP packet to WELCOME.
pub(super) const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a refusal may take to be taken.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) type Socket = WebSocketStream<TlsStream<TcpStream>>;

/// Why a connection ended. Shows nothing of who was at its other end.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("the login took too long")]
    TimedOut,
    #[error("TCP: {0}")]
    Tcp(#[source] std::io::Error),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("websocket: {0}")]
    WebSocket(#[from] tungstenite::Error),
    #[error("a malformed frame: {0}")]
    Frame(#[from] FrameError),
    #[error("a malformed message: {0}")]
    Message(#[from] MessageError),
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
    #[error("an unexpected {0}")]
    Unexpected(&'static str),
    #[error(transparent)]
    Counter(#[from] mixsocks_common::gateway::delivery::CounterError),
    #[error("refused: {0}")]
    Refused(Refusal),
    #[error("the client closed the connection")]
    Closed,
    #[error("nothing was heard for too long")]
    Silent,
    #[error("the client has taken nothing for too long")]
    Stalled,
}

impl From<ReceiveError> for ConnectionError {
    fn from(error: ReceiveError) -> Self {
        match error {
            ReceiveError::Closed => Self::Closed,
            ReceiveError::Unexpected(what) => Self::Unexpected(what),
            ReceiveError::Broken(error) => Self::WebSocket(error),
        }
    }
}

impl ConnectionError {
    /// Whether the client broke the protocol.
    pub(super) fn is_breach(&self) -> bool {
        match self {
            Self::Frame(_)
            | Self::Message(_)
            | Self::OutOfOrder(_)
            | Self::Unexpected(_)
            | Self::Counter(_) => true,
            // A message that is longer than a frame is a frame that is too long.
            Self::WebSocket(error) => {
                matches!(error, tungstenite::Error::Capacity(_) | tungstenite::Error::Protocol(_))
                    && !is_cut(error)
            }
            _ => false,
        }
    }
}

/// A connection that breaks without a farewell is no breach.
fn is_cut(error: &tungstenite::Error) -> bool {
    use tungstenite::error::ProtocolError;
    matches!(error, tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake))
}

/// Lets clients in.
pub(super) struct Doorkeeper {
    me: Identity,
    network: NetworkName,
    codec: FrameCodec,
    tls: Arc<ServerConfig>,
    messages: Arc<Messages>,
    limit: Mutex<RegistrationLimit>,
    clients: Arc<Clients>,
    counters: Arc<Counters>,
}

/// A client that has logged in.
pub(super) struct LoggedIn {
    pub(super) socket: Socket,
    pub(super) attached: Attached,
    pub(super) identity: Identity,
}

impl Doorkeeper {
    pub(super) fn new(
        me: Identity,
        topology: &Topology,
        tls: Arc<ServerConfig>,
        messages: Arc<Messages>,
        clients: Arc<Clients>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            me,
            network: topology.network.clone(),
            codec: FrameCodec::new(topology.packet_bytes()),
            tls,
            messages,
            limit: Mutex::new(RegistrationLimit::new(Instant::now().into_std())),
            clients,
            counters,
        }
    }

    pub(super) fn codec(&self) -> FrameCodec {
        self.codec
    }

    pub(super) fn limit(&self) -> MutexGuard<'_, RegistrationLimit> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection up to WELCOME.
    pub(super) async fn let_in(
        &self,
        stream: TcpStream,
        source: Source,
    ) -> Result<LoggedIn, ConnectionError> {
        let result = timeout(LOGIN_TIMEOUT, self.log_in(stream, source))
            .await
            .unwrap_or(Err(ConnectionError::TimedOut));
        if result.as_ref().is_err_and(ConnectionError::is_breach) {
            self.counters.add_drop(DropReason::MalformedFrame);
        }
        result
    }

    async fn log_in(&self, stream: TcpStream, source: Source) -> Result<LoggedIn, ConnectionError> {
        let (mut socket, binding) = self.open(stream).await?;
        match self.shake_hands(&mut socket, binding, source).await {
            Ok((login, attached, welcome)) => {
                send(&mut socket, &self.codec, &welcome).await?;
                Ok(LoggedIn { socket, attached, identity: login.identity })
            }
            Err(error) => {
                let refusal = match &error {
                    ConnectionError::Refused(refusal) => *refusal,
                    error if error.is_breach() => Refusal::Protocol,
                    _ => return Err(error),
                };
                let farewell = async {
                    send(&mut socket, &self.codec, &GatewayMessage::Refused(refusal)).await?;
                    Ok::<_, ConnectionError>(socket.close(None).await?)
                };
                // What ended the connection is what counts.
                let _ = timeout(REFUSAL_TIMEOUT, farewell).await;
                Err(error)
            }
        }
    }

    async fn open(&self, stream: TcpStream) -> Result<(Socket, Binding), ConnectionError> {
        prepare(&stream).map_err(ConnectionError::Tcp)?;
        let stream = TlsAcceptor::from(self.tls.clone())
            .accept(stream)
            .await
            .map_err(ConnectionError::Tcp)?;
        let session = stream.get_ref().1;
        tls::check_protocol(session, CLIENT_ALPN)?;
        let exporter = session
            .export_keying_material([0u8; EXPORTER_LEN], EXPORTER_LABEL, None)
            .map_err(LinkError::Tls)?;
        let config = websocket::gateway_config(self.codec.frame_bytes());
        let socket = tokio_tungstenite::accept_async_with_config(stream, Some(config)).await?;
        Ok((socket, Binding::Session(exporter)))
    }

    async fn shake_hands(
        &self,
        socket: &mut Socket,
        binding: Binding,
        source: Source,
    ) -> Result<(Login, Attached, GatewayMessage), ConnectionError> {
        let mut handshake = GatewayHandshake::new(GatewaySetup {
            network: self.network.clone(),
            gateway: self.me,
            binding,
            mode: RegistrationMode::Open,
        });
        loop {
            let message = receive(socket, &self.codec).await?;
            let step = handshake
                .handle_message(message, &mut rand::rng())
                .map_err(|rejected| rejected.error)?;
            let answer;
            (handshake, answer) = match step {
                GatewayStep::Send { state, message } => (state, message),
                GatewayStep::Register(registering) => self.register(registering, source).await?,
                GatewayStep::Authenticate(authenticating) => {
                    let login = self.authenticate(authenticating).await?;
                    let (attached, welcome) = self
                        .clients
                        .attach(login, source, Instant::now().into_std())
                        .map_err(ConnectionError::Refused)?;
                    return Ok((login, attached, welcome));
                }
                GatewayStep::Refuse(refusal) => return Err(ConnectionError::Refused(refusal)),
                GatewayStep::Ended => return Err(ConnectionError::Closed),
            };
            send(socket, &self.codec, &answer).await?;
        }
    }

    /// Stores a new token; only then it is handed out.
    async fn register(
        &self,
        registering: Registering,
        source: Source,
    ) -> Result<(GatewayHandshake, GatewayMessage), ConnectionError> {
        let now = Instant::now().into_std();
        let taken = self.limit().take(source, now);
        if let Err(wait) = taken {
            let retry_after_s = u16::try_from(wait.as_secs() + 1).unwrap_or(u16::MAX);
            return Err(ConnectionError::Refused(Refusal::RateLimited { retry_after_s }));
        }
        let issued = registering.issue(&mut rand::rng());
        let client = *issued.identity().as_bytes();
        let change = Change::Register { client, token: issued.hash() };
        match self.messages.register(change).await {
            Some(Outcome::Done) => Ok(issued.stored()),
            Some(_) => Err(ConnectionError::Refused(Refusal::TooManyClients)),
            // The store has said why.
            None => Err(ConnectionError::Refused(Refusal::Internal)),
        }
    }

    async fn authenticate(&self, authenticating: Authenticating) -> Result<Login, ConnectionError> {
        let (store, client) = (self.messages.store.clone(), *authenticating.identity().as_bytes());
        let stored = spawn_blocking(move || store.token_hash(&client)).await;
        let stored = stored.expect("the store does not panic").map_err(|error| {
            warn!("{error}");
            ConnectionError::Refused(Refusal::Internal)
        })?;
        let login = authenticating.check(stored.as_ref()).map_err(ConnectionError::Refused)?;
        self.messages.changes.note_login(*login.identity.as_bytes());
        Ok(login)
    }
}

/// Shows no client.
#[cfg(test)]
impl std::fmt::Debug for Doorkeeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doorkeeper").finish_non_exhaustive()
    }
}

/// Waits for the bytes of a frame. Can be cancelled without loss.
pub(super) async fn next_frame(
    stream: &mut (impl StreamExt<Item = Result<Message, tungstenite::Error>> + Unpin),
) -> Result<bytes::Bytes, ConnectionError> {
    Ok(websocket::received(stream.next().await)?)
}

async fn receive(
    socket: &mut Socket,
    codec: &FrameCodec,
) -> Result<ClientMessage, ConnectionError> {
    let bytes = next_frame(socket).await?;
    match codec.decode(&bytes)?.body {
        FrameBody::Control(body) => Ok(ClientMessage::decode(body)?),
        FrameBody::Packet { .. } => Err(ConnectionError::Unexpected("packet")),
        FrameBody::Pad => Err(ConnectionError::Unexpected("pad")),
    }
}

async fn send(
    socket: &mut Socket,
    codec: &FrameCodec,
    message: &GatewayMessage,
) -> Result<(), ConnectionError> {
    Ok(socket.send(control_frame(codec, 0, message)?).await?)
}

/// A websocket message with one CONTROL frame.
pub(super) fn control_frame(
    codec: &FrameCodec,
    counter: u64,
    message: &GatewayMessage,
) -> Result<Message, FrameError> {
    websocket::control_message(codec, counter, &message.encode())
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    /// The writer waits for a peer that does not read; neither it nor its farewell meets the bound.
    #[tokio::test]
    async fn a_peer_that_does_not_read_stops_the_writer_below_the_bound() {
        for frame_bytes in [1024 + 396, 32 * 1024 + 396] {
            let (stream, _peer) = tokio::io::duplex(1000);
            let config = websocket::gateway_config(frame_bytes);
            let mut socket =
                WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
            let frame = || Message::Binary(vec![0; frame_bytes].into());
            let mut taken = 0;
            while let Some(result) = socket.feed(frame()).now_or_never() {
                result.unwrap();
                taken += frame_bytes;
                assert!(taken <= config.max_write_buffer_size);
            }
            assert!(taken > websocket::WRITE_BUFFER_BYTES);
            assert!(socket.close(None).now_or_never().is_none(), "it waits, and does not fail");
        }
    }
}
