//! Bytes between two streams, in both directions.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is read at a time, and what a direction holds at most while its writer takes no more.
pub const RELAY_BYTES: usize = 8 * 1024;

/// Reads in a row before others get their turn.
const READS_PER_TURN: usize = 32;

/// Carries bytes until both directions have ended. The end of one is carried on as its end, and the
/// other goes on.
///
/// Unlike [`tokio::io::copy_bidirectional`] it holds no buffer while nothing has to wait: a thousand idle
/// streams would keep 16 MiB.
///
/// # Errors
/// The first error of either stream ends both directions.
pub async fn relay<A, B>(one: &mut A, other: &mut B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Direction::default(), Direction::default());
    poll_fn(|cx| {
        let there = there.poll(cx, one, other)?;
        let back = back.poll(cx, other, one)?;
        if there.is_ready() && back.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

/// One direction.
#[derive(Debug, Default)]
struct Direction {
    /// Read, and not written yet, from `written` on.
    held: Vec<u8>,
    written: usize,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Running,
    /// The reader has ended, and the writer is to be told.
    Ending,
    Ended,
}

impl Direction {
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.stage == Stage::Running {
            ready!(self.poll_carry(cx, reader, writer))?;
            self.stage = Stage::Ending;
        }
        if self.stage == Stage::Ending {
            ready!(Pin::new(writer).poll_shutdown(cx))?;
            self.stage = Stage::Ended;
        }
        Poll::Ready(Ok(()))
    }

    /// Carries until the reader ends.
    fn poll_carry<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_write_held(cx, writer))?;
        let mut bytes = [0; RELAY_BYTES];
        for _ in 0..READS_PER_TURN {
            let mut read = ReadBuf::new(&mut bytes);
            match Pin::new(&mut *reader).poll_read(cx, &mut read)? {
                Poll::Ready(()) if read.filled().is_empty() => return Poll::Ready(Ok(())),
                Poll::Ready(()) => ready!(self.poll_write_new(cx, writer, read.filled()))?,
                Poll::Pending => {
                    // Whatever the writer may gather goes out while nothing comes.
                    ready!(Pin::new(&mut *writer).poll_flush(cx))?;
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what was just read; what the writer does not take is held.
    fn poll_write_new<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
        mut bytes: &[u8],
    ) -> Poll<io::Result<()>> {
        while !bytes.is_empty() {
            match poll_write_some(cx, writer, bytes)? {
                Poll::Ready(written) => bytes = &bytes[written..],
                Poll::Pending => {
                    (self.held, self.written) = (bytes.to_vec(), 0);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write_held<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            self.written += ready!(poll_write_some(cx, writer, &self.held[self.written..]))?;
        }
        (self.held, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

fn poll_write_some<W: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    writer: &mut W,
    bytes: &[u8],
) -> Poll<io::Result<usize>> {
    match ready!(Pin::new(writer).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};

    use super::*;
    use crate::testing::within;

    fn bytes(length: usize) -> Vec<u8> {
        (0..=250).cycle().take(length).collect()
    }

    #[tokio::test]
    async fn every_byte_comes_in_both_directions_however_little_the_streams_take() {
        for room in [1, 100, 20_000] {
            let (left, mut inner_left) = duplex(room);
            let (right, mut inner_right) = duplex(room);
            let relaying = async { relay(&mut inner_left, &mut inner_right).await.unwrap() };
            let exchange = |stream: tokio::io::DuplexStream, sends: usize, gets: usize| async move {
                let (mut read, mut write) = split(stream);
                let sending = async {
                    write.write_all(&bytes(sends)).await.unwrap();
                    write.shutdown().await.unwrap();
                };
                let mut got = Vec::new();
                let (read, ()) = tokio::join!(read.read_to_end(&mut got), sending);
                read.unwrap();
                assert!(got == bytes(gets));
            };
            let all = async {
                tokio::join!(
                    relaying,
                    exchange(left, 50_000, 70_000),
                    exchange(right, 70_000, 50_000)
                )
            };
            within(all).await;
        }
    }

    #[tokio::test]
    async fn a_half_that_has_ended_leaves_the_other_one_open() {
        let (mut left, mut inner_left) = duplex(64);
        let (mut right, mut inner_right) = duplex(64);
        let relaying = tokio::spawn(async move { relay(&mut inner_left, &mut inner_right).await });
        left.shutdown().await.unwrap();
        assert_eq!(within(right.read(&mut [0; 8])).await.unwrap(), 0);
        right.write_all(b"late").await.unwrap();
        let mut late = [0; 4];
        within(left.read_exact(&mut late)).await.unwrap();
        assert_eq!(&late, b"late");
        assert!(!relaying.is_finished());
        right.shutdown().await.unwrap();
        within(relaying).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_error_ends_both() {
        let (left, mut inner_left) = duplex(64);
        let (mut right, mut inner_right) = duplex(64);
        drop(left);
        right.write_all(b"to nobody").await.unwrap();
        let error = within(relay(&mut inner_left, &mut inner_right)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_reader_that_always_has_something_lets_others_have_their_turn() {
        let mut cx = Context::from_waker(Waker::noop());
        let (mut reader, mut written) = (tokio::io::repeat(7), Vec::new());
        let mut direction = Direction::default();
        assert!(direction.poll(&mut cx, &mut reader, &mut written).is_pending());
        assert_eq!(written.len(), READS_PER_TURN * RELAY_BYTES);
    }

    #[tokio::test]
    async fn nothing_is_held_but_what_a_writer_does_not_take() {
        let mut cx = Context::from_waker(Waker::noop());
        let (mut source, mut reader) = duplex(1 << 20);
        let (mut writer, mut sink) = duplex(1000);
        let mut direction = Direction::default();
        source.write_all(&bytes(100_000)).await.unwrap();
        assert!(direction.poll(&mut cx, &mut reader, &mut writer).is_pending());
        assert_eq!(direction.held.len(), RELAY_BYTES - 1000);
        let mut got = vec![0; 100_000];
        let mut at = 0;
        while at < got.len() {
            at += within(sink.read(&mut got[at..])).await.unwrap();
            // A new budget of polls, without which the streams pretend not to be ready.
            tokio::task::yield_now().await;
            assert!(direction.poll(&mut cx, &mut reader, &mut writer).is_pending());
            assert!(direction.held.len() <= RELAY_BYTES);
        }
        assert!(got == bytes(100_000));
        assert_eq!(direction.held.capacity(), 0);
    }
}
