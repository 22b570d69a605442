//! The bytes of an open stream, in both directions.

use std::io;
use std::ops::{Deref, DerefMut};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tracing::debug;

use super::rewind::Rewind;
use crate::relay;

/// The connection of a local program.
pub(super) trait Local: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Makes the drop that follows a reset, which the program sees as an error.
    fn reset_on_drop(&mut self);
}

impl Local for TcpStream {
    fn reset_on_drop(&mut self) {
        // It fails on a socket that is broken already.
        let _ = self.set_zero_linger();
    }
}

/// Carries bytes until both directions have ended, however long that takes.
///
/// The end of one direction is carried on as its end, and the other goes on. An error on one side
/// ends both: the local connection is reset and `stream` dropped without a shutdown. The same
/// happens when this future is dropped.
pub(super) async fn relay<L, S>(local: Rewind<L>, mut stream: S)
where
    L: Local,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut local = Guarded { local, ended: false };
    match relay::relay(&mut *local, &mut stream).await {
        Ok(()) => local.ended = true,
        Err(error) => debug!(kind = ?io::Error::kind(&error), "a stream was reset"),
    }
}

/// Resets the local connection when it is dropped, unless it ended.
struct Guarded<L: Local> {
    local: Rewind<L>,
    ended: bool,
}

impl<L: Local> Deref for Guarded<L> {
    type Target = Rewind<L>;

    fn deref(&self) -> &Rewind<L> {
        &self.local
    }
}

impl<L: Local> DerefMut for Guarded<L> {
    fn deref_mut(&mut self) -> &mut Rewind<L> {
        &mut self.local
    }
}

impl<L: Local> Drop for Guarded<L> {
    fn drop(&mut self) {
        if !self.ended {
            self.local.inner_mut().reset_on_drop();
        }
    }
}
