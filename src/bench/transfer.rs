//! Streams through the proxy, as a program would use them.

use std::convert::Infallible;
use std::fmt;
use std::io::{Error, ErrorKind};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};

use super::origin::{Arrived, CHUNK_BYTES, Origin, Pattern, RIGHT, WRONG, send, send_exactly};

/// A request that takes longer is stuck.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Which way the bytes go, as the program sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Down,
    Up,
}

/// A transfer of a given duration.
pub(super) struct Transfer {
    pub(super) proxy: SocketAddr,
    pub(super) origin: Origin,
    pub(super) direction: Direction,
    pub(super) duration: Duration,
}

/// What a transfer has moved: what had arrived when its time was up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

/// Bytes arrived that were not sent so. Nothing excuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WrongBytes;

impl fmt::Display for WrongBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes arrived wrong")
    }
}

impl std::error::Error for WrongBytes {}

/// The proxy refuses a connection, with its SOCKS5 reply code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) target: SocketAddr,
    pub(super) code: u8,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, code } = self;
        match code {
            2 => write!(f, "the provider's policy forbids {target}; it needs --allow-private"),
            code => write!(f, "the proxy cannot reach {target} (SOCKS5 reply {code:02})"),
        }
    }
}

impl std::error::Error for Refused {}

impl Transfer {
    /// Runs it, and checks every byte that arrives. Then it is cut off, because what is still under
    /// way would take long and show nothing more.
    pub(super) async fn run(self) -> Result<Moved> {
        let opening = open(self.proxy, self.origin.address());
        let mut stream = timeout(PATIENCE, opening).await.context("a stream is not opened")??;
        stream.set_zero_linger()?;
        let seed = rand::random();
        let started = Instant::now();
        let arrived = match self.direction {
            Direction::Down => {
                stream.write_all(format!("DOWN {seed}\n").as_bytes()).await?;
                receive(stream, Pattern(seed), started + self.duration).await?
            }
            Direction::Up => {
                stream.write_all(format!("UP {seed}\n").as_bytes()).await?;
                if let Ok(broken) = timeout(self.duration, send(&mut stream, Pattern(seed))).await {
                    broken.context("the upload broke")?;
                }
                self.origin.arrived(seed)
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        if let Some(offset) = arrived.first_wrong {
            return Err(WrongBytes).context(format!("at offset {offset}"));
        }
        Ok(Moved { bytes: arrived.bytes, seconds })
    }
}

/// Receives until a point in time.
async fn receive(mut stream: TcpStream, pattern: Pattern, until: Instant) -> Result<Arrived> {
    let mut arrived = Arrived::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    while let Ok(read) = timeout_at(until.into(), stream.read(&mut chunk)).await {
        match read.context("the download broke")? {
            0 => bail!("the download ended early"),
            read => arrived.take(pattern, &chunk[..read]),
        }
    }
    Ok(arrived)
}

/// The time of a tiny request, from the connection to the proxy to the first byte of the answer.
pub(super) async fn tiny(proxy: SocketAddr, origin: SocketAddr) -> Result<Duration> {
    let started = Instant::now();
    let request = async {
        let mut stream = open(proxy, origin).await?;
        stream.write_all(b"TINY\n").await?;
        stream.read_u8().await.context("the answer to a tiny request is empty")
    };
    timeout(PATIENCE, request).await.context("a tiny request got no answer")??;
    Ok(started.elapsed())
}

/// A download that only an error ends, and that is cut off when this is dropped. `bytes` is how much
/// has arrived.
pub(super) async fn endless(
    proxy: SocketAddr,
    origin: SocketAddr,
    bytes: &AtomicU64,
) -> Result<Infallible> {
    let mut connection = Connection::open(proxy, origin).await?;
    let seed = rand::random();
    connection.say("DOWN", seed, None).await?;
    let mut arrived = Arrived::default();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = connection.stream.read(&mut chunk).await.context("the download broke")?;
        ensure!(read > 0, "the download ended early");
        arrived.take(Pattern(seed), &chunk[..read]);
        ensure!(arrived.first_wrong.is_none(), WrongBytes);
        bytes.store(arrived.bytes, Ordering::Relaxed);
    }
}

/// A connection to the server through the proxy, for one request after the other.
pub(super) struct Connection {
    stream: TcpStream,
}

impl Connection {
    pub(super) async fn open(proxy: SocketAddr, origin: SocketAddr) -> Result<Self> {
        Ok(Self { stream: open(proxy, origin).await? })
    }

    /// Downloads so many bytes.
    pub(super) async fn get(&mut self, bytes: u64) -> Result<()> {
        let seed = rand::random();
        self.say("GET", seed, Some(bytes)).await?;
        self.receive(Pattern(seed), bytes).await
    }

    /// Uploads so many bytes.
    pub(super) async fn put(&mut self, bytes: u64) -> Result<()> {
        let seed = rand::random();
        self.say("PUT", seed, Some(bytes)).await?;
        send_exactly(&mut self.stream, Pattern(seed), bytes).await?;
        self.verdict().await
    }

    /// Uploads so many bytes, ends this direction, and only then downloads as many.
    pub(super) async fn turn(mut self, bytes: u64) -> Result<()> {
        let seed = rand::random();
        self.say("TURN", seed, Some(bytes)).await?;
        send_exactly(&mut self.stream, Pattern(seed), bytes).await?;
        self.stream.shutdown().await?;
        self.verdict().await?;
        self.receive(Pattern(seed), bytes).await?;
        self.end().await
    }

    /// Downloads up to so many bytes until the server resets the connection.
    pub(super) async fn be_cut(mut self, bytes: u64) -> Result<()> {
        let seed = rand::random();
        self.say("CUT", seed, Some(bytes)).await?;
        match self.receive_until(Pattern(seed), bytes + 1).await {
            Ok(_) => bail!("a reset arrived as an end"),
            Err(error) if is_reset(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Begins a download or an upload of so many bytes, and resets the connection in the middle.
    pub(super) async fn cut(mut self, direction: Direction, bytes: u64) -> Result<()> {
        let seed = rand::random();
        match direction {
            Direction::Down => {
                self.say("GET", seed, Some(bytes)).await?;
                self.receive(Pattern(seed), bytes / 2).await?;
            }
            Direction::Up => {
                self.say("PUT", seed, Some(bytes)).await?;
                send_exactly(&mut self.stream, Pattern(seed), bytes / 2).await?;
            }
        }
        Ok(self.stream.set_zero_linger()?)
    }

    /// Ends this direction, and waits until the server has done so as well.
    pub(super) async fn end(mut self) -> Result<()> {
        self.stream.shutdown().await?;
        let more = self.stream.read(&mut [0]).await?;
        ensure!(more == 0, WrongBytes);
        Ok(())
    }

    async fn say(&mut self, what: &str, seed: u64, bytes: Option<u64>) -> Result<()> {
        let bytes = bytes.map(|bytes| format!(" {bytes}")).unwrap_or_default();
        Ok(self.stream.write_all(format!("{what} {seed}{bytes}\n").as_bytes()).await?)
    }

    async fn verdict(&mut self) -> Result<()> {
        match self.stream.read_u8().await? {
            RIGHT => Ok(()),
            WRONG => Err(WrongBytes).context("at the server"),
            _ => Err(WrongBytes).context("in the server's verdict"),
        }
    }

    async fn receive(&mut self, pattern: Pattern, bytes: u64) -> Result<()> {
        let arrived = self.receive_until(pattern, bytes).await?;
        if arrived < bytes {
            return Err(Error::from(ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }

    /// How many bytes have arrived when there are so many, or at the end.
    async fn receive_until(&mut self, pattern: Pattern, bytes: u64) -> Result<u64> {
        let mut arrived = Arrived::default();
        let mut stream = (&mut self.stream).take(bytes);
        let mut chunk = vec![0; CHUNK_BYTES];
        while let read @ 1.. = stream.read(&mut chunk).await? {
            arrived.take(pattern, &chunk[..read]);
            ensure!(arrived.first_wrong.is_none(), WrongBytes);
        }
        Ok(arrived.bytes)
    }
}

fn is_reset(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

/// CONNECT without authentication (RFC 1928).
async fn open(proxy: SocketAddr, target: SocketAddr) -> Result<TcpStream> {
    const ADDRESS_TYPE_IPV4: u8 = 1;
    let connected = TcpStream::connect(proxy).await;
    let mut stream = connected.with_context(|| format!("no proxy answers at {proxy}"))?;
    stream.set_nodelay(true)?;
    let SocketAddr::V4(address) = target else { bail!("the measuring server has an IPv4 address") };
    stream.write_all(&[5, 1, 0]).await?;
    let mut method = [0; 2];
    stream.read_exact(&mut method).await.context("no SOCKS5 proxy answers")?;
    ensure!(method == [5, 0], "the proxy does not speak SOCKS5, or wants a password");
    let mut request = vec![5, 1, 0, ADDRESS_TYPE_IPV4];
    request.extend(address.ip().octets());
    request.extend(address.port().to_be_bytes());
    stream.write_all(&request).await?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).await.context("the proxy gives no reply")?;
    ensure!(reply[3] == ADDRESS_TYPE_IPV4, "the proxy's reply is of another kind");
    match reply[1] {
        0 => Ok(stream),
        code => Err(Refused { target, code }.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;
    use tokio::net::tcp::{ReadHalf, WriteHalf};

    use super::*;

    /// How the proxy of a test treats bytes.
    #[derive(Clone, Copy, PartialEq)]
    enum Care {
        /// It passes them on.
        Good,
        /// It changes this byte of what comes down, or goes up.
        Spoils(Direction, u64),
        /// It ends what was reset.
        EndsNicely,
    }

    /// A proxy without a network behind it.
    async fn proxy(care: Care) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((program, _)) = listener.accept().await {
                tokio::spawn(serve(program, care));
            }
        });
        address
    }

    async fn serve(mut program: TcpStream, care: Care) {
        program.read_exact(&mut [0; 3]).await.unwrap();
        program.write_all(&[5, 0]).await.unwrap();
        let mut request = [0; 10];
        program.read_exact(&mut request).await.unwrap();
        let port = u16::from_be_bytes([request[8], request[9]]);
        let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        program.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
        let (from_server, to_server) = server.split();
        let (from_program, to_program) = program.split();
        let is_reset = tokio::select! {
            true = relay(from_server, to_program, care, Direction::Down) => true,
            true = relay(from_program, to_server, care, Direction::Up) => true,
            else => false,
        };
        if is_reset {
            program.set_zero_linger().unwrap();
        }
    }

    /// Whether it was a reset that has ended it.
    async fn relay(
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        care: Care,
        direction: Direction,
    ) -> bool {
        for offset in 0.. {
            match from.read_u8().await {
                Ok(byte) => {
                    let is_spoilt = care == Care::Spoils(direction, offset);
                    let byte = if is_spoilt { byte ^ 1 } else { byte };
                    if to.write_all(&[byte]).await.is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() != ErrorKind::UnexpectedEof => {
                    if care != Care::EndsNicely {
                        return true;
                    }
                    break;
                }
                Err(_) => break,
            }
        }
        // Fails if the other end has gone.
        let _ = to.shutdown().await;
        false
    }

    const BYTES: u64 = 1000;

    async fn connection(care: Care) -> (Connection, Origin) {
        let origin = Origin::start().await.unwrap();
        (Connection::open(proxy(care).await, origin.address()).await.unwrap(), origin)
    }

    #[tokio::test]
    async fn what_comes_through_unchanged_is_right() {
        let (mut c, _origin) = connection(Care::Good).await;
        c.get(BYTES).await.unwrap();
        c.put(BYTES).await.unwrap();
        c.get(0).await.unwrap();
        c.end().await.unwrap();
        connection(Care::Good).await.0.turn(BYTES).await.unwrap();
        connection(Care::Good).await.0.be_cut(BYTES).await.unwrap();
        for direction in [Direction::Down, Direction::Up] {
            connection(Care::Good).await.0.cut(direction, BYTES).await.unwrap();
        }
    }

    #[tokio::test]
    async fn streams_see_a_wrong_byte() {
        let is_wrong = |result: Result<()>| result.unwrap_err().is::<WrongBytes>();
        let down = Care::Spoils(Direction::Down, BYTES / 3);
        // Beyond the first line.
        let up = Care::Spoils(Direction::Up, BYTES / 2);
        assert!(is_wrong(connection(down).await.0.get(BYTES).await));
        assert!(is_wrong(connection(up).await.0.put(BYTES).await));
        assert!(is_wrong(connection(down).await.0.turn(BYTES).await));
        assert!(is_wrong(connection(up).await.0.turn(BYTES).await));
        assert!(is_wrong(connection(down).await.0.cut(Direction::Down, BYTES).await));
    }

    #[tokio::test]
    async fn a_reset_that_arrives_as_an_end_is_told() {
        let (c, _origin) = connection(Care::EndsNicely).await;
        let error = c.be_cut(BYTES).await.unwrap_err();
        assert_eq!(error.to_string(), "a reset arrived as an end");
    }
}
