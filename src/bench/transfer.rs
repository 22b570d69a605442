//! One stream through the proxy, as a program would use it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::origin::{Origin, Pattern, SEND_BUFFER_BYTES, Verdict, check, send};

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

/// What a transfer has moved, from the request to the last byte's arrival.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

impl Transfer {
    /// Runs it, and checks every byte.
    pub(super) async fn run(self) -> Result<Moved> {
        let mut stream = open(self.proxy, self.origin.address()).await?;
        let seed = rand::random();
        let started = Instant::now();
        let (sent, verdict) = match self.direction {
            Direction::Down => {
                let milliseconds = self.duration.as_millis();
                stream.write_all(format!("DOWN {seed} {milliseconds}\n").as_bytes()).await?;
                let verdict = check(&mut stream, Pattern(seed)).await?;
                (self.origin.sent(seed), verdict)
            }
            Direction::Up => {
                stream.write_all(format!("UP {seed}\n").as_bytes()).await?;
                let sent = send(&mut stream, Pattern(seed), self.duration).await?;
                stream.shutdown().await?;
                let mut verdict = [0; Verdict::LEN];
                stream.read_exact(&mut verdict).await.context("the upload was not confirmed")?;
                (Some(sent), Verdict::from_bytes(verdict))
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        if let Some(offset) = verdict.first_wrong {
            bail!("byte {offset} arrived wrong");
        }
        let bytes = verdict.count;
        ensure!(sent == Some(bytes), "{bytes} bytes arrived, but other than all were sent");
        Ok(Moved { bytes, seconds })
    }
}

/// The time of a tiny request, from the connection to the proxy to the first byte of the answer.
pub(super) async fn tiny(proxy: SocketAddr, origin: SocketAddr) -> Result<Duration> {
    let started = Instant::now();
    let mut stream = open(proxy, origin).await?;
    stream.write_all(b"TINY\n").await?;
    stream.read_u8().await.context("the answer to a tiny request is empty")?;
    Ok(started.elapsed())
}

/// CONNECT without authentication (RFC 1928).
async fn open(proxy: SocketAddr, target: SocketAddr) -> Result<TcpStream> {
    const ADDRESS_TYPE_IPV4: u8 = 1;
    let socket = if proxy.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    let mut stream =
        socket.connect(proxy).await.with_context(|| format!("no proxy answers at {proxy}"))?;
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
