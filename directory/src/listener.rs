//! A listener with bounds: how many connections there are, from whom, and for how long.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Sleep, sleep};

/// Connections at a time. Followers ask once in an epoch and leave.
pub const MAX_CONNECTIONS: usize = 1024;
/// As many of them may come from one IPv4 address or one IPv6 network of 64 bits.
pub const MAX_CONNECTIONS_PER_SOURCE: usize = 64;
/// A connection ends after this, whatever it does: who sends a byte now and then holds no place for
/// ever. The largest document takes as long at 160 kB/s.
pub const MAX_CONNECTION_TIME: Duration = Duration::from_secs(120);
/// How long to wait after the system has refused a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes connections within the bounds; what is beyond them is closed at once.
pub struct BoundedListener {
    listener: TcpListener,
    places: Arc<Mutex<Places>>,
}

impl BoundedListener {
    /// Bounds a listener.
    pub fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::default() }
    }
}

impl Listener for BoundedListener {
    type Io = Bounded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Bounded, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    if let Some(place) = Place::take(&self.places, address.ip()) {
                        let deadline = Box::pin(sleep(MAX_CONNECTION_TIME));
                        return (Bounded { stream, deadline, _place: place }, address);
                    }
                }
                Err(_) => sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Connections, by where they come from.
#[derive(Default)]
struct Places {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// The place of one connection.
struct Place {
    places: Arc<Mutex<Places>>,
    source: IpAddr,
}

impl Place {
    fn take(places: &Arc<Mutex<Places>>, ip: IpAddr) -> Option<Self> {
        let source = source(ip);
        let mut taken = places.lock().unwrap_or_else(PoisonError::into_inner);
        let of_source = taken.by_source.get(&source).copied().unwrap_or(0);
        if taken.total >= MAX_CONNECTIONS || of_source >= MAX_CONNECTIONS_PER_SOURCE {
            return None;
        }
        taken.total += 1;
        taken.by_source.insert(source, of_source + 1);
        Some(Self { places: places.clone(), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        taken.total -= 1;
        if let Some(count) = taken.by_source.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                taken.by_source.remove(&self.source);
            }
        }
    }
}

/// What counts as one source.
fn source(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
    }
}

/// A connection that ends by itself.
pub struct Bounded {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    _place: Place,
}

impl Bounded {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_come_back() {
        let places = Arc::<Mutex<Places>>::default();
        let take = |ip: &str| Place::take(&places, ip.parse().unwrap());
        let mut taken: Vec<_> =
            (0..MAX_CONNECTIONS_PER_SOURCE).map(|_| take("192.0.2.1").unwrap()).collect();
        assert!(take("192.0.2.1").is_none());
        assert!(take("::ffff:192.0.2.1").is_none(), "the same address in another form");
        taken.pop();
        assert!(take("192.0.2.1").is_some(), "and its place came back at once");
        let network: Vec<_> = (0..MAX_CONNECTIONS_PER_SOURCE)
            .map(|n| take(&format!("2001:db8::{n:x}")).unwrap())
            .collect();
        assert!(take("2001:db8::ffff:1").is_none(), "one network of 64 bits");
        drop((taken, network));
        let all: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|n| take(&format!("192.0.{}.{}", n / 200, n % 200)).unwrap())
            .collect();
        assert!(take("198.51.100.1").is_none());
        drop(all);
        assert!(places.lock().unwrap().by_source.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_whatever_it_does() {
        use tokio::io::AsyncReadExt;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut bounded = BoundedListener::new(listener);
        let _silent = TcpStream::connect(address).await.unwrap();
        let (mut connection, _) = bounded.accept().await;
        let error = connection.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
