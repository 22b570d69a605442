//! A stream whose first bytes can be looked at before they are read.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most bytes of one read into the buffer.
const FILL_BYTES: usize = 2048;

/// Reads from a buffer first, then from the stream; writes go straight through.
///
/// The protocols on one port are told apart by their first bytes: those are looked at here and stay
/// for whoever speaks the protocol.
pub(super) struct Rewind<T> {
    inner: T,
    buffer: BytesMut,
}

impl<T: AsyncRead + Unpin> Rewind<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner, buffer: BytesMut::new() }
    }

    pub(super) fn inner_mut(&mut self) -> &mut T {
        &mut self.inner
    }

    /// Waits for `count` bytes and shows all that are there, unread; fewer at the end of the stream.
    pub(super) async fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.buffer.len() < count {
            if self.fill().await? == 0 {
                break;
            }
        }
        Ok(&self.buffer)
    }

    /// Waits for more bytes in the buffer; returns how many came, 0 at the end of the stream.
    /// Nothing is lost when the future is dropped.
    pub(super) async fn fill(&mut self) -> io::Result<usize> {
        poll_fn(|cx| self.poll_fill(cx)).await
    }

    /// Reads what is there already, without waiting, until `count` bytes are buffered; takes them.
    ///
    /// An error shows at the next read.
    pub(super) async fn take_ready(&mut self, count: usize) -> Bytes {
        poll_fn(|cx| {
            while self.buffer.len() < count {
                match self.poll_fill(cx) {
                    Poll::Ready(Ok(read)) if read > 0 => {}
                    _ => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        self.buffer.split_to(count.min(self.buffer.len())).freeze()
    }

    /// Bytes that are read from the stream, but not from here.
    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [0; FILL_BYTES];
        let mut read = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut read))?;
        self.buffer.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewind<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, out);
        }
        let count = out.remaining().min(self.buffer.len());
        out.put_slice(&self.buffer[..count]);
        self.buffer.advance(count);
        if self.buffer.is_empty() {
            // A stream lives long; the memory of its first bytes need not.
            self.buffer = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewind<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
