//! Takes connections of clients, and owns the tasks that serve them.

use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tracing::{debug, warn};

use super::carrier::{Uplink, carry};
use super::login::{ConnectionError, Doorkeeper, LoggedIn};
use super::messages::Messages;
use crate::accept::Accepting;
use crate::sources::{HalfOpen, HalfOpenLimits, Source};

/// Connections that may be between their first byte and their login. One more puts out the oldest.
pub const MAX_HALF_OPEN: usize = 512;
/// As many of them may come from one IPv4 address or one IPv6 network of 64 bits; many people may
/// share one.
pub const MAX_HALF_OPEN_PER_SOURCE: usize = 64;
/// As many of them may come from one IPv6 network of 48 bits, which one customer may hold.
pub const MAX_HALF_OPEN_PER_SITE: usize = 256;

type Opened = Result<Box<LoggedIn>, ConnectionError>;

pub(super) struct Acceptor {
    doorkeeper: Arc<Doorkeeper>,
    uplink: Arc<Uplink>,
    messages: Arc<Messages>,
    stopped: watch::Receiver<bool>,
    logins: JoinSet<Opened>,
    half_open: HalfOpen<AbortHandle>,
    /// At most as many as there are clients in the table, and those that are just being put out.
    connections: JoinSet<()>,
}

impl Acceptor {
    pub(super) fn new(
        doorkeeper: Arc<Doorkeeper>,
        uplink: Arc<Uplink>,
        messages: Arc<Messages>,
        stopped: watch::Receiver<bool>,
    ) -> Self {
        Self {
            doorkeeper,
            uplink,
            messages,
            stopped,
            logins: JoinSet::new(),
            half_open: HalfOpen::new(HalfOpenLimits {
                total: MAX_HALF_OPEN,
                per_source: MAX_HALF_OPEN_PER_SOURCE,
                per_site: MAX_HALF_OPEN_PER_SITE,
            }),
            connections: JoinSet::new(),
        }
    }

    /// Runs until the gateway stops, and then until the clients have taken their farewell.
    pub(super) async fn run(mut self, listener: TcpListener) {
        let mut accepting = Accepting::new("clients");
        let mut stopped = self.stopped.clone();
        loop {
            tokio::select! {
                (stream, address) = accepting.next(|| listener.accept()) => {
                    self.handle_accepted(stream, address.ip().into());
                }
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

    fn handle_accepted(&mut self, stream: TcpStream, source: Source) {
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
                let (messages, stopped) = (self.messages.clone(), self.stopped.clone());
                self.connections.spawn(async move {
                    Box::pin(carry(*client, codec, uplink, messages, stopped)).await;
                });
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
