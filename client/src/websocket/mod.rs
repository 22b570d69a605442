//! The websocket API: programs in any language send and receive messages.
//!
//! [`WebsocketListener`] speaks what the existing mixnet's client speaks, and tells those who ask what
//! became of a message. The bytes, limits and rules are in `docs/websocket-api.md`.
//!
//! All programs may send; the one that connected first gets what comes, until it leaves. A message is
//! taken when it was written to a program's connection, and the next one is asked for after that: a
//! program that does not read makes the mixnet keep its messages.

mod answer;
mod connection;
mod fields;
mod gate;
mod request;
mod service;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tracker;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_common::message::MAX_MESSAGE_BYTES;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, accept_hdr_async_with_config};
use tracing::{debug, error, warn};

use self::connection::{Program, Shared};
use self::gate::{Gate, Receiving, Refused};
pub use self::gate::{TOKEN_LENGTHS, Token, TokenError};
pub use self::request::{MAX_ERROR_BYTES, MAX_ID_BYTES};
pub use self::service::MessageService;
use self::tracker::ConnectionNumber;

/// Connections at once. Each may hold a request and, while it gets one, a message: 32 MiB or so.
pub const MAX_CONNECTIONS: usize = 32;

/// Connections beyond [`MAX_CONNECTIONS`] that are told so at once; further ones are closed.
const MAX_TURNED_AWAY: usize = 8;

/// Time from accepting a connection to the end of its handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest request, in bytes of its websocket message: the longest message, and room for what stands
/// around it. A text whose escapes need more must be sent in binary.
pub const MAX_REQUEST_BYTES: usize = MAX_MESSAGE_BYTES + 64 * 1024;

/// Longest answer: a message of control characters as text, each of which becomes six.
const MAX_ANSWER_BYTES: usize = 6 * MAX_MESSAGE_BYTES + 1024;

/// Bytes that are gathered before they are written.
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

/// Room for answers to pings, of which there are no more than [`connection::MAX_ANSWERS`].
const PONG_BYTES: usize = connection::MAX_ANSWERS * 127;

/// A connection on which nothing goes is probed after this time, and given up after a few probes
/// without an answer: the other machine has gone. The system does that; a program that is merely busy
/// is left alone.
const KEEPALIVE_TIME: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Pause after an error that accepting meets again at once, such as a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who may connect beside programs of this machine that speak to its loopback addresses.
#[derive(Debug, Default)]
pub struct WebsocketOptions {
    /// Origins of pages that may connect, such as `http://localhost:8000`. `null`, which pages from
    /// files have, needs a token as well.
    pub origins: Vec<String>,
    /// Further names by which programs may call this machine; without a port.
    pub hosts: Vec<String>,
    /// What programs must show.
    pub token: Option<Token>,
}

/// Why there is no websocket port.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Others than this machine could connect without a token.
    #[error("{0} can be reached by other machines: a token is needed")]
    TokenNeeded(SocketAddr),
    /// The address cannot be bound.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A websocket port.
#[derive(Debug)]
pub struct WebsocketListener {
    listener: TcpListener,
    gate: Gate,
    max_connections: usize,
}

impl WebsocketListener {
    /// A port on `address`.
    ///
    /// # Errors
    /// [`BindError`] if it is not a loopback address and there is no token, or if it cannot be bound.
    pub async fn bind(address: SocketAddr, options: WebsocketOptions) -> Result<Self, BindError> {
        let WebsocketOptions { origins, hosts, token } = options;
        if token.is_none() && !address.ip().is_loopback() {
            return Err(BindError::TokenNeeded(address));
        }
        let listener = TcpListener::bind(address).await?;
        let gate = Gate { bound: address.ip(), origins, hosts, token };
        Ok(Self { listener, gate, max_connections: MAX_CONNECTIONS })
    }

    /// The address of the port.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves programs until `shutdown` resolves or the service stops; then closes the connections that are left.
    pub async fn serve<S: MessageService>(
        self,
        service: S,
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let shared = Arc::new(Shared::new(service));
        let (has_stopped, stopped) = oneshot::channel();
        let tell_outcomes = async {
            shared.tell_outcomes().await;
            // Nobody listens any more if the port has been closed before.
            let _ = has_stopped.send(());
        };
        let ended = async {
            tokio::select! {
                () = shutdown => {}
                _ = stopped => {}
            }
        };
        let accept = self.accept(&shared, ended);
        tokio::pin!(accept, tell_outcomes);
        tokio::select! {
            () = &mut accept => {}
            () = &mut tell_outcomes => accept.await,
        }
    }

    async fn accept<S: MessageService>(
        self,
        shared: &Arc<Shared<S>>,
        shutdown: impl Future<Output = ()> + Send,
    ) {
        let Self { listener, gate, max_connections } = self;
        let gate = Arc::new(gate);
        let (stop, stopped) = watch::channel(());
        let mut shutdown = pin!(shutdown);
        let (mut connections, mut turned_away) = (JoinSet::new(), JoinSet::new());
        // Whether the last connection was turned away, so that a row of them is one line in the log.
        let (mut is_full, mut is_failing) = (false, false);
        for number in 0.. {
            // In this order, so that a connection that has ended makes room for the next.
            let accepted = tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(ended) = connections.join_next() => {
                    if ended.is_err() {
                        error!("the task of a program's connection panicked");
                    }
                    continue;
                }
                Some(_) = turned_away.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) if connections.len() < max_connections => {
                    (is_full, is_failing) = (false, false);
                    let (shared, gate) = (shared.clone(), gate.clone());
                    let (number, stopped) = (ConnectionNumber(number), stopped.clone());
                    connections.spawn(async move {
                        if let Some((socket, receiving)) =
                            Box::pin(shake_hands(stream, gate, true)).await
                        {
                            let program = Program { number, receiving };
                            Box::pin(connection::serve(&shared, program, socket, stopped)).await;
                        }
                    });
                }
                Ok((stream, _)) => {
                    if !is_full {
                        warn!(
                            max_connections,
                            "too many programs are connected; turning new ones away"
                        );
                    }
                    is_full = true;
                    if turned_away.len() < MAX_TURNED_AWAY {
                        let gate = gate.clone();
                        turned_away.spawn(async move {
                            Box::pin(shake_hands(stream, gate, false)).await;
                        });
                    }
                }
                Err(error) => {
                    if !is_failing {
                        warn!(%error, "a program's connection cannot be accepted; trying again");
                    }
                    is_failing = true;
                    tokio::select! {
                        () = &mut shutdown => break,
                        () = sleep(ACCEPT_PAUSE) => {}
                    }
                }
            }
        }
        drop((stop, listener));
        while connections.join_next().await.is_some() {}
    }
}

/// From the first byte to a websocket, and what the program does about messages; `None` if it does not come
/// to that, as when there is no room.
async fn shake_hands(
    stream: TcpStream,
    gate: Arc<Gate>,
    has_room: bool,
) -> Option<(WebSocketStream<TcpStream>, Receiving)> {
    prepare(&stream);
    let mut receiving = Receiving::Yes;
    #[expect(clippy::result_large_err, reason = "the websocket library wants it so")]
    let check = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
        let room = has_room.then_some(response).ok_or(Refused::Full);
        let allowed = gate.check(request).and_then(|()| {
            receiving = Receiving::of(request)?;
            room
        });
        allowed.map_err(|refused| {
            debug!("a program may not use the websocket port: {refused}");
            refused.response()
        })
    };
    let handshake = accept_hdr_async_with_config(stream, check, Some(config()));
    match timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(socket)) => Some((socket, receiving)),
        Ok(Err(error)) => {
            debug!(%error, "a program did not get a websocket");
            None
        }
        Err(_) => {
            debug!("a program stalled in its handshake");
            None
        }
    }
}

/// These fail on a connection that is broken already, which its first read will show.
fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_TIME).with_interval(KEEPALIVE_INTERVAL);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// What a websocket may hold. One answer at a time is written, and nothing beside it but pongs.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES + MAX_ANSWER_BYTES + PONG_BYTES)
        .max_message_size(Some(MAX_REQUEST_BYTES))
        .max_frame_size(Some(MAX_REQUEST_BYTES))
}
