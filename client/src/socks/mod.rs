//! The SOCKS5 listener (RFC 1928 and 1929): CONNECT to names, IPv4 and IPv6 addresses.
//!
//! A program gets its reply when the stream is open or could not be opened, with the code of what
//! really happened at the provider. What it sent in advance travels with the OPEN. An optimistic listener
//! says at once that the stream is open, so that what programs then say travels with the OPEN as well: it
//! saves them one of two round trips, and they see a reset where the stream could not be opened.
//!
//! Nothing here logs targets or credentials. The SOCKS5 crate does, at DEBUG: a logging setup must
//! switch the target [`QUIET_LOG_TARGET`] off.

mod handshake;
mod relay;
mod rewind;

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mixsocks_common::session::OpenOutcome;
use mixsocks_common::target::Target;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, warn};

pub use self::handshake::{CredentialLength, Credentials, MAX_CREDENTIAL_LEN};
use self::relay::Local;
use self::rewind::Rewind;
use crate::stream::OpenError;

/// The log target that shows passwords and targets at DEBUG; to be switched off wherever logs are
/// set up.
pub const QUIET_LOG_TARGET: &str = "fast_socks5";

/// Connections at once. Each holds two file descriptors at most and 32 KiB of buffers, so that all
/// of them fit into 128 MiB; a browser with many tabs has a few hundred.
pub const MAX_CONNECTIONS: usize = 4096;

/// Time from accepting a connection to the end of its request.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes that travel with an OPEN: they fit into one packet beside it.
pub const MAX_EARLY_BYTES: usize = 1400;

/// How long an optimistic listener waits for what a program says first. Those that have something to say
/// do so at once; where the other side speaks first, this is lost.
const FIRST_BYTES_WAIT: Duration = Duration::from_millis(10);

/// Most bytes taken from a program that does not wait for its reply; then it is made to.
const MAX_PENDING_BYTES: usize = 16 * 1024;

/// Connections that the system holds until they are accepted. With the usual 128, a burst of a few
/// hundred was seen to end in resets.
const ACCEPT_BACKLOG: u32 = 1024;

/// What the system takes over from a program before the proxy does. By itself it would take several
/// MiB: programs would show uploads as done that have hardly begun, and what they break off would
/// be carried for seconds.
const RECEIVE_BUFFER_BYTES: u32 = 256 * 1024;

/// Pause after an error that accepting meets again at once, such as a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long, and over how many bytes, a refused program gets to read its answer. A connection that
/// is closed on unread bytes is reset, and a reset may overtake the answer.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_FAREWELL_BYTES: u64 = 64 * 1024;

/// Opens streams through the mixnet for local programs.
pub trait OpenStream: Clone + Send + Sync + 'static {
    /// An open stream.
    ///
    /// Shutting it down ends its outgoing direction; dropping it before both directions have ended
    /// resets it; a read or write error means that the other side reset it.
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Opens a stream to `target` whose first bytes are `early`, which may be empty.
    ///
    /// Dropping the future gives the stream up.
    fn open(
        &self,
        target: Target,
        early: Bytes,
    ) -> impl Future<Output = Result<Self::Stream, OpenError>> + Send;
}

/// A SOCKS5 port.
#[derive(Debug)]
pub struct SocksListener {
    listener: TcpListener,
    manner: Manner,
}

/// How a port treats programs.
#[derive(Debug, Clone, Default)]
struct Manner {
    credentials: Option<Arc<Credentials>>,
    is_optimistic: bool,
}

impl SocksListener {
    /// A port on a listener that is bound already; [`SocksListener::bind`] gives it a longer queue.
    ///
    /// With `credentials`, programs must give them. Without, they may give any user name and
    /// password, or none.
    pub fn new(listener: TcpListener, credentials: Option<Credentials>) -> Self {
        let credentials = credentials.map(Arc::new);
        Self { listener, manner: Manner { credentials, is_optimistic: false } }
    }

    /// Whether programs are told at once that a stream is open, without waiting for the provider.
    #[must_use]
    pub fn optimistic(mut self, is_optimistic: bool) -> Self {
        self.manner.is_optimistic = is_optimistic;
        self
    }

    /// A port on `address`.
    ///
    /// # Errors
    /// When the address cannot be bound.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(address: SocketAddr, credentials: Option<Credentials>) -> io::Result<Self> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // Elsewhere it would let another program take the port over.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        // Accepted connections inherit it.
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        socket.bind(address)?;
        Ok(Self::new(socket.listen(ACCEPT_BACKLOG)?, credentials))
    }

    /// The address of the port.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves programs until `shutdown` resolves; then resets the streams that are left.
    pub async fn serve<O: OpenStream>(self, opener: O, shutdown: impl Future<Output = ()> + Send) {
        serve(self.listener, self.manner, MAX_CONNECTIONS, opener, shutdown).await;
    }
}

/// Where local connections come from.
trait Accept: Send {
    type Local: Local;

    /// Waits for the next connection; nothing is lost when the future is dropped.
    fn accept(&mut self) -> impl Future<Output = io::Result<Self::Local>> + Send;
}

impl Accept for TcpListener {
    type Local = TcpStream;

    async fn accept(&mut self) -> io::Result<TcpStream> {
        let (stream, _) = TcpListener::accept(self).await?;
        // It fails on a connection that is broken already, which its first read will show.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }
}

async fn serve<A: Accept, O: OpenStream>(
    mut acceptor: A,
    manner: Manner,
    max_connections: usize,
    opener: O,
    shutdown: impl Future<Output = ()> + Send,
) {
    let mut shutdown = pin!(shutdown);
    let mut connections = JoinSet::new();
    // Whether the last connection was turned away, so that a row of them is one line in the log.
    let mut full = false;
    let mut failing = false;
    loop {
        // In this order, so that a connection that has ended makes room for the next.
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => {
                if ended.is_err() {
                    error!("the task of a local connection panicked");
                }
                continue;
            }
            accepted = acceptor.accept() => accepted,
        };
        match accepted {
            Ok(local) if connections.len() < max_connections => {
                (full, failing) = (false, false);
                connections.spawn(handle(local, manner.clone(), opener.clone()));
            }
            Ok(_) => {
                if !full {
                    warn!(max_connections, "too many local connections; closing new ones");
                }
                full = true;
            }
            Err(error) if concerns_one_connection(&error) => {
                debug!(%error, "a local connection broke while it was accepted");
            }
            Err(error) => {
                if !failing {
                    warn!(%error, "local connections cannot be accepted; trying again");
                }
                failing = true;
                tokio::select! {
                    () = &mut shutdown => break,
                    () = sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    connections.shutdown().await;
}

fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// One connection, from its first byte to its last.
async fn handle<L: Local, O: OpenStream>(local: L, manner: Manner, opener: O) {
    let mut local = Rewind::new(local);
    let handshake = handshake::handshake(&mut local, manner.credentials.as_deref());
    let target = match timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(target)) => target,
        Ok(Err(error)) => {
            debug!(%error, "a local connection was refused");
            return say_farewell(local, &error.answer()).await;
        }
        Err(_) => return debug!("a local connection stalled in its handshake"),
    };
    if manner.is_optimistic {
        if reply_success(&mut local).await.is_err() {
            return;
        }
        if local.buffered() == 0 {
            // Whether it says something, ends or breaks shows below.
            let _ = timeout(FIRST_BYTES_WAIT, local.fill()).await;
        }
    }
    let early = local.take_ready(MAX_EARLY_BYTES).await;
    let sent_early = !early.is_empty();
    let opened = tokio::select! {
        () = gone(&mut local, sent_early) => return debug!("a program left before its reply"),
        opened = opener.open(target, early) => opened,
    };
    match opened {
        Ok(stream) => {
            if manner.is_optimistic || reply_success(&mut local).await.is_ok() {
                relay::relay(local, stream).await;
            }
        }
        Err(error) => {
            debug!(%error, "a stream was not opened");
            if manner.is_optimistic {
                return local.inner_mut().reset_on_drop();
            }
            let outcome = match error.outcome() {
                OpenOutcome::Connected => OpenOutcome::Failed,
                outcome => outcome,
            };
            say_farewell(local, &handshake::reply(outcome.code())).await;
        }
    }
}

async fn reply_success<L: Local>(local: &mut Rewind<L>) -> io::Result<()> {
    local.write_all(&handshake::reply(OpenOutcome::Connected.code())).await?;
    local.flush().await
}

/// Resolves when the program that waits for its reply has gone.
///
/// Its end of stream alone does not tell: it may have said all it has to say. But a program that
/// has said nothing, and never will, cannot have wanted the connection.
async fn gone<L: Local>(local: &mut Rewind<L>, sent_early: bool) {
    while local.buffered() < MAX_PENDING_BYTES {
        match local.fill().await {
            Ok(0) if !sent_early && local.buffered() == 0 => return,
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return,
        }
    }
    pending().await
}

/// Writes the answer, ends the stream, and waits a little for the program to end its own.
async fn say_farewell<L: Local>(mut local: Rewind<L>, answer: &[u8]) {
    let farewell = async {
        local.write_all(answer).await?;
        local.shutdown().await?;
        let mut rest = local.take(MAX_FAREWELL_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // Either way the connection ends here.
    let _ = timeout(FAREWELL_TIMEOUT, farewell).await;
}

#[cfg(test)]
mod tests;
