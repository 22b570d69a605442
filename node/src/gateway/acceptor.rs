//! Takes connections of clients, and owns the tasks that serve them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::carrier::{Uplink, carry};
use super::limits::Source;
use super::login::{ConnectionError, Doorkeeper, LoggedIn};

/// Connections that may be between their first byte and their login. One more puts out the oldest:
/// somebody who holds many open and stays silent then delays nobody, while refusing the newest
/// would lock everybody out.
pub const MAX_HALF_OPEN: usize = 512;
/// As many of them may come from one IPv4 address or one IPv6 network of 64 bits, so that one
/// source does not put out the others.
pub const MAX_HALF_OPEN_PER_SOURCE: usize = 64;
/// How long to wait when the system has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Opened = Result<Box<LoggedIn>, ConnectionError>;

pub(super) struct Acceptor {
    doorkeeper: Arc<Doorkeeper>,
    uplink: Arc<Uplink>,
    stopped: watch::Receiver<bool>,
    logins: JoinSet<Opened>,
    half_open: HalfOpen<AbortHandle>,
    /// At most as many as there are clients in the table, and those that are just being put out.
    connections: JoinSet<()>,
}

impl Acceptor {
    pub(super) fn new(
        doorkeeper: Doorkeeper,
        uplink: Uplink,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        Self {
            doorkeeper: Arc::new(doorkeeper),
            uplink: Arc::new(uplink),
            stopped,
            logins: JoinSet::new(),
            half_open: HalfOpen::new(),
            connections: JoinSet::new(),
        }
    }

    /// Runs until the gateway stops, and then until the clients have taken their farewell.
    pub(super) async fn run(mut self, listener: TcpListener) {
        let mut said_accept_fails = false;
        let mut stopped = self.stopped.clone();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, address)) => {
                        said_accept_fails = false;
                        self.handle_accepted(stream, address);
                    }
                    Err(error) => {
                        if !said_accept_fails {
                            warn!("cannot accept clients: {error}");
                            said_accept_fails = true;
                        }
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(done) = self.logins.join_next_with_id() => self.handle_login(done),
                Some(done) = self.connections.join_next() => handle_end(done),
                () = until_stopped(&mut stopped) => break,
            }
        }
        drop(listener);
        self.logins.shutdown().await;
        while let Some(done) = self.connections.join_next().await {
            handle_end(done);
        }
    }

    fn handle_accepted(&mut self, stream: TcpStream, address: SocketAddr) {
        let source = Source::from(address.ip());
        if let Some(oldest) = self.half_open.make_room(source) {
            debug!("too many half-open connections: the oldest is closed");
            oldest.abort();
        }
        let doorkeeper = self.doorkeeper.clone();
        let login = async move { Box::pin(doorkeeper.let_in(stream, source)).await.map(Box::new) };
        self.half_open.push(source, self.logins.spawn(login));
    }

    fn handle_login(&mut self, done: Result<(Id, Opened), JoinError>) {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        self.half_open.remove(|login| login.id() == id);
        match done {
            Ok((_, Ok(client))) => {
                let (codec, uplink) = (self.doorkeeper.codec(), self.uplink.clone());
                let stopped = self.stopped.clone();
                self.connections
                    .spawn(async move { Box::pin(carry(*client, codec, uplink, stopped)).await });
            }
            Ok((_, Err(error))) => debug!("a client did not get in: {error}"),
            Err(error) => handle_end(Err(error)),
        }
    }
}

/// Waits until the gateway stops, or is gone.
pub(super) async fn until_stopped(stopped: &mut watch::Receiver<bool>) {
    // An error means that it is gone.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn handle_end(done: Result<(), JoinError>) {
    match done {
        Err(error) if !error.is_cancelled() => {
            warn!("a connection failed in this gateway: {error}");
        }
        _ => {}
    }
}

/// Connections that have not logged in, the oldest first.
struct HalfOpen<T>(VecDeque<(Source, T)>);

impl<T> HalfOpen<T> {
    fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Takes out what must go before one more may come from `source`.
    fn make_room(&mut self, source: Source) -> Option<T> {
        let mut of_source = (0..self.0.len()).filter(|at| self.0[*at].0 == source);
        let oldest_of_source = of_source.next();
        let at = if 1 + of_source.count() >= MAX_HALF_OPEN_PER_SOURCE {
            oldest_of_source?
        } else if self.0.len() >= MAX_HALF_OPEN {
            0
        } else {
            return None;
        };
        self.0.remove(at).map(|(_, connection)| connection)
    }

    fn push(&mut self, source: Source, connection: T) {
        self.0.push_back((source, connection));
    }

    fn remove(&mut self, is_it: impl Fn(&T) -> bool) {
        self.0.retain(|(_, connection)| !is_it(connection));
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn a_source_that_holds_connections_open_puts_out_its_own() {
        let mut half_open = HalfOpen::new();
        let (flooder, other) = (
            Source::from(IpAddr::from([192, 0, 2, 1])),
            Source::from(IpAddr::from([192, 0, 2, 2])),
        );
        half_open.push(other, usize::MAX);
        for n in 0..1000usize {
            let expected = n.checked_sub(MAX_HALF_OPEN_PER_SOURCE);
            assert_eq!(half_open.make_room(flooder), expected);
            half_open.push(flooder, n);
        }
        assert_eq!(half_open.make_room(other), None);
        assert_eq!(half_open.0.len(), 1 + MAX_HALF_OPEN_PER_SOURCE);
        half_open.remove(|n| *n == usize::MAX);
        assert_eq!(half_open.0.len(), MAX_HALF_OPEN_PER_SOURCE);
    }

    #[test]
    fn many_sources_put_out_the_oldest() {
        let mut half_open = HalfOpen::new();
        for n in 0..2000u32 {
            let source = Source::from(IpAddr::from(n.to_be_bytes()));
            let out = half_open.make_room(source);
            assert_eq!(out, n.checked_sub(512));
            half_open.push(source, n);
        }
        assert_eq!(half_open.0.len(), MAX_HALF_OPEN);
    }
}
