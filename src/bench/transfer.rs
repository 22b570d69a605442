//! One stream through the proxy, as a program would use it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{timeout, timeout_at};

use super::origin::{Arrived, CHUNK_BYTES, Origin, Pattern, send};

/// A request that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

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
            bail!("byte {offset} arrived wrong");
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

/// CONNECT without authentication (RFC 1928).
async fn open(proxy: SocketAddr, target: SocketAddr) -> Result<TcpStream> {
    const ADDRESS_TYPE_IPV4: u8 = 1;
    let connected = TcpStream::connect(proxy).await;
    let mut stream = connected.with_context(|| format!("no proxy answers at {proxy}"))?;
    stream.set_nodelay(true)?;
    let SocketAddr::V4(target) = target else { bail!("the measuring server has an IPv4 address") };
    stream.write_all(&[5, 1, 0]).await?;
    let mut method = [0; 2];
    stream.read_exact(&mut method).await.context("no SOCKS5 proxy answers")?;
    ensure!(method == [5, 0], "the proxy does not speak SOCKS5, or wants a password");
    let mut request = vec![5, 1, 0, ADDRESS_TYPE_IPV4];
    request.extend(target.ip().octets());
    request.extend(target.port().to_be_bytes());
    stream.write_all(&request).await?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).await.context("the proxy gives no reply")?;
    ensure!(reply[3] == ADDRESS_TYPE_IPV4, "the proxy's reply is of another kind");
    match reply[1] {
        0 => Ok(stream),
        2 => bail!("the provider's policy forbids {target}; it needs --allow-private"),
        code => bail!("the proxy cannot reach {target} (SOCKS5 reply {code:02})"),
    }
}
