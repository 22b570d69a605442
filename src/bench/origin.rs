//! The server at the far end: sends and checks bytes that follow a known pattern.
//!
//! A connection starts with a line that says what to do:
//!
//! | line | then |
//! |---|---|
//! | `TINY` | the server answers one byte |
//! | `DOWN <seed> <milliseconds>` | the server sends the pattern for so long, then ends |
//! | `UP <seed>` | the client sends the pattern and ends; the server answers a [`Verdict`] |

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::AbortHandle;

/// Bytes of one read or write.
pub(super) const CHUNK_BYTES: usize = 16 * 1024;

/// What the kernel may buffer for a sender. Everything that is buffered when the time is up still
/// has to get through, and makes the measurement longer.
pub(super) const SEND_BUFFER_BYTES: u32 = 64 * 1024;

/// Longest first line.
const MAX_LINE_BYTES: u64 = 64;

/// A running server; a clone is the same one, and the last drop stops it.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    address: SocketAddr,
    /// By seed, what `DOWN` has sent in full.
    sent: Arc<Mutex<BTreeMap<u64, u64>>>,
    _task: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Origin {
    /// Starts a server on a free loopback port.
    pub(super) async fn start() -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let listener = socket.listen(128).context("the measuring server cannot listen")?;
        let address = listener.local_addr()?;
        let sent = Arc::new(Mutex::new(BTreeMap::new()));
        let task = tokio::spawn(accept(listener, sent.clone()));
        Ok(Self { address, sent, _task: Arc::new(AbortOnDrop(task.abort_handle())) })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How much `DOWN` with this seed has sent, once it has sent all of it.
    pub(super) fn sent(&self, seed: u64) -> Option<u64> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).get(&seed).copied()
    }
}

async fn accept(listener: TcpListener, sent: Arc<Mutex<BTreeMap<u64, u64>>>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                connections.spawn(answer(stream, sent.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A connection that breaks shows at the client.
async fn answer(stream: TcpStream, sent: Arc<Mutex<BTreeMap<u64, u64>>>) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(CHUNK_BYTES, stream);
    let mut line = String::new();
    (&mut stream).take(MAX_LINE_BYTES).read_line(&mut line).await?;
    let words: Vec<_> = line.split_whitespace().collect();
    match words[..] {
        ["TINY"] => stream.write_all(b"!").await?,
        ["DOWN", seed, milliseconds] => {
            let seed = seed.parse()?;
            let duration = Duration::from_millis(milliseconds.parse()?);
            let count = send(&mut stream, Pattern(seed), duration).await?;
            sent.lock().unwrap_or_else(PoisonError::into_inner).insert(seed, count);
        }
        ["UP", seed] => {
            let verdict = check(&mut stream, Pattern(seed.parse()?)).await?;
            stream.write_all(&verdict.to_bytes()).await?;
        }
        _ => bail!("unknown request"),
    }
    stream.shutdown().await?;
    Ok(())
}

/// Sends the pattern for so long, and returns how many bytes that were.
pub(super) async fn send(
    stream: &mut (impl AsyncWriteExt + Unpin),
    pattern: Pattern,
    duration: Duration,
) -> std::io::Result<u64> {
    let started = Instant::now();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut count = 0;
    while started.elapsed() < duration {
        pattern.write(count, &mut chunk);
        stream.write_all(&chunk).await?;
        count += CHUNK_BYTES as u64;
    }
    Ok(count)
}

/// Reads to the end and compares with the pattern.
pub(super) async fn check(
    stream: &mut (impl AsyncReadExt + Unpin),
    pattern: Pattern,
) -> std::io::Result<Verdict> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut verdict = Verdict { count: 0, first_wrong: None };
    loop {
        let read = stream.read(&mut chunk).await?;
        if read == 0 {
            return Ok(verdict);
        }
        if verdict.first_wrong.is_none() {
            verdict.first_wrong = pattern.first_wrong(verdict.count, &chunk[..read]);
        }
        verdict.count += read as u64;
    }
}

/// How received bytes compare with their pattern.
///
/// As bytes: the count (8, big endian), the offset of the first wrong byte (8, big endian, all ones
/// if there is none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) count: u64,
    pub(super) first_wrong: Option<u64>,
}

impl Verdict {
    pub(super) const LEN: usize = 16;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let first_wrong = self.first_wrong.unwrap_or(u64::MAX);
        ((u128::from(self.count) << 64) | u128::from(first_wrong)).to_be_bytes()
    }

    pub(super) fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let [count, first_wrong] = [0, 8]
            .map(|at| bytes[at..at + 8].iter().fold(0, |n, byte| (n << 8) | u64::from(*byte)));
        Self { count, first_wrong: (first_wrong != u64::MAX).then_some(first_wrong) }
    }
}

/// Bytes that depend on a seed and their offset, so that a byte of another place or another stream
/// is a wrong one: the words of SplitMix64 (Steele, Lea, Flood 2014), little endian.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern(pub(super) u64);

impl Pattern {
    fn word(self, index: u64) -> [u8; 8] {
        let mut z = self.0.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    }

    /// The bytes from `offset` on.
    fn bytes(self, offset: u64) -> impl Iterator<Item = u8> {
        let within_word = (offset % 8) as u8;
        (offset / 8..).flat_map(move |index| self.word(index)).skip(within_word.into())
    }

    fn write(self, offset: u64, out: &mut [u8]) {
        for (byte, value) in out.iter_mut().zip(self.bytes(offset)) {
            *byte = value;
        }
    }

    fn first_wrong(self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let at = bytes.iter().zip(self.bytes(offset)).position(|(byte, right)| *byte != right)?;
        Some(offset + at as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_byte_is_found() {
        let mut bytes = vec![0; 100];
        Pattern(7).write(3, &mut bytes);
        assert_eq!(Pattern(7).first_wrong(3, &bytes), None);
        assert_eq!(Pattern(7).first_wrong(50, &bytes[47..]), None);
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            assert_eq!(Pattern(7).first_wrong(3, &wrong), Some(3 + at as u64));
        }
        assert!(Pattern(8).first_wrong(3, &bytes).is_some());
        assert!(Pattern(7).first_wrong(11, &bytes).is_some());
    }

    #[test]
    fn verdicts_round_trip() {
        for first_wrong in [None, Some(0), Some(1 << 40)] {
            let verdict = Verdict { count: 123_456_789_012, first_wrong };
            assert_eq!(Verdict::from_bytes(verdict.to_bytes()), verdict);
        }
    }
}
