//! Streams through the mixnet, as the application sees them.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use mixsocks_common::session::frame::{CloseReason, StreamId};
use mixsocks_common::session::{OpenOutcome, SessionId, StreamReset};
use mixsocks_common::topology::NoRoute;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Why a stream was not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The provider tried and says what happened; never [`OpenOutcome::Connected`].
    #[error("{0}")]
    Refused(OpenOutcome),
    /// The provider did not answer within the time limit: it, its gateway or every route is down.
    #[error("the provider does not answer; it or its gateway may be down")]
    ProviderSilent,
    /// There is no connection to this client's gateway.
    #[error("there is no connection to the gateway")]
    NoGateway,
    /// The topology has no way to the provider and back: nothing is sent.
    #[error("nothing can be sent: {0}")]
    NoRoute(#[from] NoRoute),
    /// This client already has as many streams as it may.
    #[error("too many streams are open")]
    TooManyStreams,
    /// The provider ended the session, or broke its rules.
    #[error("{0}")]
    SessionEnded(CloseReason),
    /// The client was shut down.
    #[error("the client has been shut down")]
    Closed,
}

impl OpenError {
    /// The outcome in the codes of a SOCKS reply.
    pub fn outcome(&self) -> OpenOutcome {
        match self {
            Self::Refused(outcome) => *outcome,
            Self::ProviderSilent => OpenOutcome::TimedOut,
            Self::NoRoute(_) => OpenOutcome::NetworkUnreachable,
            Self::SessionEnded(CloseReason::TokenNeeded) => OpenOutcome::Forbidden,
            Self::NoGateway | Self::TooManyStreams | Self::SessionEnded(_) | Self::Closed => {
                OpenOutcome::Failed
            }
        }
    }
}

/// Names a stream among all of a client or provider.
pub type StreamKey = (SessionId, StreamId);

/// Whoever drives the session of a stream.
pub trait StreamHost: Send + Sync {
    /// Reads into `out`; 0 bytes are the end.
    fn poll_read(
        &self,
        key: StreamKey,
        cx: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<io::Result<usize>>;

    /// Writes as much of `bytes` as there is room for.
    fn poll_write(
        &self,
        key: StreamKey,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>>;

    /// Ends the outgoing direction.
    fn finish(&self, key: StreamKey);

    /// The application's handle is gone.
    fn release(&self, key: StreamKey);
}

/// A stream through the mixnet.
///
/// Shutting it down ends its outgoing direction; the other one goes on. Dropping it before both
/// directions have ended resets it at the other side. A read or write error of the kind
/// [`io::ErrorKind::ConnectionReset`] means that the other side, or the session, reset it.
pub struct MixStream {
    host: Arc<dyn StreamHost>,
    key: StreamKey,
}

impl MixStream {
    /// The handle of a stream of `host`; there must be one only.
    pub fn new(host: Arc<dyn StreamHost>, key: StreamKey) -> Self {
        Self { host, key }
    }
}

impl fmt::Debug for MixStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MixStream({})", self.key.1)
    }
}

impl AsyncRead for MixStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        self.host
            .poll_read(self.key, cx, buf.initialize_unfilled())
            .map_ok(|read| buf.advance(read))
    }
}

impl AsyncWrite for MixStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.host.poll_write(self.key, cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.host.finish(self.key);
        Poll::Ready(Ok(()))
    }
}

impl Drop for MixStream {
    fn drop(&mut self) {
        self.host.release(self.key);
    }
}

/// The tasks that wait for streams of one host.
#[derive(Debug, Default)]
pub struct Waiting {
    readers: HashMap<StreamKey, Waker>,
    writers: HashMap<StreamKey, Waker>,
}

impl Waiting {
    /// What the session's `read` says, as a task is told it; notes that the task waits if there is
    /// nothing yet.
    pub fn poll_read(
        &mut self,
        read: Result<Option<usize>, StreamReset>,
        key: StreamKey,
        cx: &Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match read {
            Ok(Some(read)) => Poll::Ready(Ok(read)),
            Ok(None) => {
                self.readers.insert(key, cx.waker().clone());
                Poll::Pending
            }
            Err(StreamReset) => Poll::Ready(Err(reset())),
        }
    }

    /// What the session's `write` says, as a task is told it; notes that the task waits if there was
    /// no room.
    pub fn poll_write(
        &mut self,
        written: Option<usize>,
        key: StreamKey,
        cx: &Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Some(0) => {
                self.writers.insert(key, cx.waker().clone());
                Poll::Pending
            }
            Some(written) => Poll::Ready(Ok(written)),
            None => Poll::Ready(Err(reset())),
        }
    }

    /// Wakes whoever reads the stream.
    pub fn wake_reader(&mut self, key: StreamKey) {
        if let Some(waker) = self.readers.remove(&key) {
            waker.wake();
        }
    }

    /// Wakes whoever writes to the stream.
    pub fn wake_writer(&mut self, key: StreamKey) {
        if let Some(waker) = self.writers.remove(&key) {
            waker.wake();
        }
    }

    /// Wakes whoever waits for a stream of `session`.
    pub fn wake_session(&mut self, session: SessionId) {
        for waiting in [&mut self.readers, &mut self.writers] {
            waiting.retain(|key, waker| {
                let keep = key.0 != session;
                if !keep {
                    waker.wake_by_ref();
                }
                keep
            });
        }
    }

    /// Nobody waits for the stream any more.
    pub fn forget(&mut self, key: StreamKey) {
        self.readers.remove(&key);
        self.writers.remove(&key);
    }
}

fn reset() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the stream was reset")
}
