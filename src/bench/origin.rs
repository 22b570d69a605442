//! The server at the far end: sends and checks bytes that follow a known pattern.
//!
//! A connection starts with a line that says what to do:
//!
//! | line | then |
//! |---|---|
//! | `TINY` | the server answers one byte |
//! | `DOWN <seed>` | the server sends the pattern for as long as it is wanted |
//! | `UP <seed>` | the client sends the pattern, and [`Origin::arrived`] tells what has arrived |
//! | `GET <seed> <n>` | the server sends `n` bytes of the pattern; another line may follow |
//! | `PUT <seed> <n>` | the client sends `n` bytes, and the server a verdict; another line may follow |
//! | `TURN <seed> <n>` | the client sends `n` bytes and ends its direction; then the server sends a verdict and `n` bytes |
//! | `CUT <seed> <n>` | the server sends `n` bytes and resets the connection |
//!
//! A verdict is [`RIGHT`] or [`WRONG`].

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::AbortHandle;

/// Bytes of one read or write.
pub(super) const CHUNK_BYTES: usize = 16 * 1024;

/// Longest line.
const MAX_LINE_BYTES: u64 = 64;

/// The server's verdict on bytes that it was sent.
pub(super) const RIGHT: u8 = b'+';
pub(super) const WRONG: u8 = b'-';

/// A running server; a clone is the same one, and the last drop stops it.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    address: SocketAddr,
    arrivals: Arrivals,
    _task: Arc<AbortOnDrop>,
}

/// Connections that the system holds until they are accepted. Of a thousand that come at once the usual 128
/// would leave some to be tried again, a second later.
const ACCEPT_BACKLOG: u32 = 1024;

/// By seed, what has arrived of each upload.
type Arrivals = Arc<Mutex<BTreeMap<u64, Arrived>>>;

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
        let listener = listen().context("the measuring server cannot listen")?;
        let address = listener.local_addr()?;
        let arrivals = Arrivals::default();
        let task = tokio::spawn(accept(listener, arrivals.clone()));
        Ok(Self { address, arrivals, _task: Arc::new(AbortOnDrop(task.abort_handle())) })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What has arrived so far of the upload with this seed.
    pub(super) fn arrived(&self, seed: u64) -> Arrived {
        lock(&self.arrivals).get(&seed).copied().unwrap_or_default()
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    socket.listen(ACCEPT_BACKLOG)
}

fn lock(arrivals: &Arrivals) -> MutexGuard<'_, BTreeMap<u64, Arrived>> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, arrivals: Arrivals) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                connections.spawn(answer(stream, arrivals.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A connection that breaks shows at the client.
async fn answer(stream: TcpStream, arrivals: Arrivals) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(CHUNK_BYTES, stream);
    let mut line = String::new();
    loop {
        line.clear();
        if (&mut stream).take(MAX_LINE_BYTES).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["GET", seed, bytes] => {
                send_exactly(&mut stream, Pattern(seed.parse()?), bytes.parse()?).await?;
            }
            ["PUT", seed, bytes] => {
                let bytes: u64 = bytes.parse()?;
                let arrived =
                    receive_all(&mut (&mut stream).take(bytes), Pattern(seed.parse()?)).await?;
                stream.write_all(&[arrived.verdict(bytes)]).await?;
            }
            _ => return answer_last(stream, &words, &arrivals).await,
        }
    }
}

/// A request that no other follows.
async fn answer_last(
    mut stream: BufReader<TcpStream>,
    words: &[&str],
    arrivals: &Arrivals,
) -> Result<()> {
    match *words {
        ["TINY"] => {
            stream.write_all(b"!").await?;
            stream.shutdown().await?;
        }
        ["DOWN", seed] => send(&mut stream, Pattern(seed.parse()?)).await?,
        ["UP", seed] => {
            let seed = seed.parse()?;
            let mut arrived = Arrived::default();
            let mut chunk = vec![0; CHUNK_BYTES];
            while let read @ 1.. = stream.read(&mut chunk).await? {
                arrived.take(Pattern(seed), &chunk[..read]);
                lock(arrivals).insert(seed, arrived);
            }
        }
        ["TURN", seed, bytes] => {
            let (pattern, bytes) = (Pattern(seed.parse()?), bytes.parse()?);
            let arrived = receive_all(&mut stream, pattern).await?;
            stream.write_all(&[arrived.verdict(bytes)]).await?;
            send_exactly(&mut stream, pattern, bytes).await?;
            stream.shutdown().await?;
        }
        ["CUT", seed, bytes] => {
            send_exactly(&mut stream, Pattern(seed.parse()?), bytes.parse()?).await?;
            stream.get_ref().set_zero_linger()?;
        }
        _ => bail!("unknown request"),
    }
    Ok(())
}

/// Receives the pattern until the end.
async fn receive_all(
    stream: &mut (impl AsyncReadExt + Unpin),
    pattern: Pattern,
) -> io::Result<Arrived> {
    let mut arrived = Arrived::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let read @ 1.. = stream.read(&mut chunk).await? {
        arrived.take(pattern, &chunk[..read]);
    }
    Ok(arrived)
}

/// Sends so many bytes of the pattern.
pub(super) async fn send_exactly(
    stream: &mut (impl AsyncWriteExt + Unpin),
    pattern: Pattern,
    bytes: u64,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut sent = 0;
    while sent < bytes {
        let left = usize::try_from(bytes - sent).unwrap_or(CHUNK_BYTES);
        let chunk = &mut chunk[..left.min(CHUNK_BYTES)];
        pattern.write(sent, chunk);
        stream.write_all(chunk).await?;
        sent += chunk.len() as u64;
    }
    stream.flush().await
}

/// Sends the pattern without end.
pub(super) async fn send(
    stream: &mut (impl AsyncWriteExt + Unpin),
    pattern: Pattern,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut sent = 0;
    loop {
        pattern.write(sent, &mut chunk);
        stream.write_all(&chunk).await?;
        sent += CHUNK_BYTES as u64;
    }
}

/// What has arrived of a pattern.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Arrived {
    pub(super) bytes: u64,
    /// Offset of the first byte that is not what was sent.
    pub(super) first_wrong: Option<u64>,
}

impl Arrived {
    /// Compares the next bytes with the pattern.
    pub(super) fn take(&mut self, pattern: Pattern, bytes: &[u8]) {
        if self.first_wrong.is_none() {
            self.first_wrong = pattern.first_wrong(self.bytes, bytes);
        }
        self.bytes += bytes.len() as u64;
    }

    /// Whether so many bytes have arrived, and all are right.
    fn verdict(self, bytes: u64) -> u8 {
        if self == (Self { bytes, first_wrong: None }) { RIGHT } else { WRONG }
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

    /// Writes the bytes from `offset` on: a word at a time, as the measured network needs the CPU.
    fn write(self, offset: u64, out: &mut [u8]) {
        let within_word = (offset % 8) as usize;
        let first = self.word(offset / 8);
        let (head, rest) = out.split_at_mut(out.len().min((8 - within_word) % 8));
        head.copy_from_slice(&first[within_word..][..head.len()]);
        for (index, word) in (offset.div_ceil(8)..).zip(rest.chunks_mut(8)) {
            word.copy_from_slice(&self.word(index)[..word.len()]);
        }
    }

    fn first_wrong(self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let mut right = vec![0; bytes.len()];
        self.write(offset, &mut right);
        if right == bytes {
            return None;
        }
        let at = right.iter().zip(bytes).position(|(right, byte)| right != byte)?;
        Some(offset + at as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_the_pattern_is_the_same_wherever_it_begins() {
        let mut all = [0; 100];
        Pattern(7).write(0, &mut all);
        for begin in 0..20 {
            for end in begin..40 {
                let mut part = vec![0; end - begin];
                Pattern(7).write(begin as u64, &mut part);
                assert_eq!(part, all[begin..end], "{begin} to {end}");
            }
        }
    }

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
    fn the_first_wrong_byte_is_remembered() {
        let mut bytes = vec![0; 100];
        Pattern(7).write(0, &mut bytes);
        let mut arrived = Arrived::default();
        arrived.take(Pattern(7), &bytes[..30]);
        assert_eq!(arrived, Arrived { bytes: 30, first_wrong: None });
        arrived.take(Pattern(7), &bytes[31..]);
        arrived.take(Pattern(7), &bytes);
        assert_eq!(arrived, Arrived { bytes: 199, first_wrong: Some(30) });
    }
}
