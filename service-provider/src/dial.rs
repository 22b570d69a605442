//! Dialling: from a target to a connection that the exit policy allows.
//!
//! A name is resolved once; the policy judges every address that came back; only those that it
//! allowed are dialled, as addresses. A name server that answers differently the next time (DNS
//! rebinding) is not asked a next time.

use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mixsocks_common::session::OpenOutcome;
use mixsocks_common::target::Target;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::policy::{ExitPolicy, Forbidden};
use crate::resolver::{ResolveError, Resolver};

/// The whole time for connecting, after the name is resolved.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an address is tried alone (RFC 8305 §5, "Connection Attempt Delay").
pub const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Addresses tried for one target; all of them fit into [`CONNECT_TIMEOUT`].
const MAX_ATTEMPTS: usize = 8;

/// Opens one connection to one address; a parameter of [`Dialer`], so that tests need no network.
pub trait Connect: Clone + Send + Sync + 'static {
    /// The connection.
    type Stream: Send + 'static;

    /// Connects.
    fn connect(&self, address: SocketAddr)
    -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// TCP with `TCP_NODELAY`.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpConnector;

impl Connect for TcpConnector {
    type Stream = TcpStream;

    async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Connects to targets.
pub struct Dialer<C = TcpConnector> {
    resolver: Resolver,
    policy: ExitPolicy,
    connector: C,
}

/// Why a target was not connected. No text holds the target.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name gave no addresses.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The policy refuses every address; this is its reason for the first.
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// Every allowed address failed; this is the error that says most.
    #[error("the connection failed")]
    Connect(#[source] io::Error),
    /// No address answered within [`CONNECT_TIMEOUT`].
    #[error("the connection took too long")]
    TimedOut,
}

impl DialError {
    /// The outcome that the client is told.
    pub fn outcome(&self) -> OpenOutcome {
        match self {
            Self::Resolve(ResolveError::NotFound) => OpenOutcome::HostUnreachable,
            Self::Resolve(ResolveError::TimedOut) | Self::TimedOut => OpenOutcome::TimedOut,
            Self::Resolve(ResolveError::Failed) => OpenOutcome::Failed,
            Self::Forbidden(_) => OpenOutcome::Forbidden,
            Self::Connect(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => OpenOutcome::Refused,
                io::ErrorKind::TimedOut => OpenOutcome::TimedOut,
                io::ErrorKind::HostUnreachable => OpenOutcome::HostUnreachable,
                // Without an address of its own in the target's family there is no way there.
                io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::NetworkDown
                | io::ErrorKind::AddrNotAvailable => OpenOutcome::NetworkUnreachable,
                _ => OpenOutcome::Failed,
            },
        }
    }

    /// How much the error tells about the target: a host that answers with a refusal exists, a
    /// missing route may only be the provider's.
    fn rank(&self) -> u8 {
        match self.outcome() {
            OpenOutcome::Refused => 5,
            OpenOutcome::TimedOut => 4,
            OpenOutcome::HostUnreachable => 3,
            OpenOutcome::NetworkUnreachable => 2,
            OpenOutcome::Failed | OpenOutcome::Forbidden | OpenOutcome::Connected => 1,
        }
    }
}

impl Dialer {
    /// A dialer over TCP.
    pub fn new(resolver: Resolver, policy: ExitPolicy) -> Self {
        Self::with_connector(resolver, policy, TcpConnector)
    }
}

impl<C: Connect> Dialer<C> {
    /// A dialer over another transport.
    pub fn with_connector(resolver: Resolver, policy: ExitPolicy, connector: C) -> Self {
        Self { resolver, policy, connector }
    }

    /// Connects to `target`, in at most [`LOOKUP_TIMEOUT`] plus [`CONNECT_TIMEOUT`].
    ///
    /// Dropping the future ends every attempt.
    ///
    /// # Errors
    /// See [`DialError`]; [`DialError::outcome`] is what the client is told.
    ///
    /// [`LOOKUP_TIMEOUT`]: crate::resolver::LOOKUP_TIMEOUT
    pub async fn connect(&self, target: &Target) -> Result<C::Stream, DialError> {
        let addresses = match target {
            Target::Ip(address) => vec![*address],
            Target::Host(name, port) => {
                let ips = self.resolver.resolve(name).await?;
                ips.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect()
            }
        };
        let mut allowed = Vec::with_capacity(addresses.len());
        let mut forbidden = None;
        for address in addresses {
            match self.policy.check(address) {
                Ok(()) if !allowed.contains(&address) => allowed.push(address),
                Ok(()) => {}
                Err(error) => forbidden = forbidden.or(Some(error)),
            }
        }
        match forbidden {
            Some(error) if allowed.is_empty() => return Err(error.into()),
            _ => {}
        }
        race(&self.connector, &allowed).await
    }
}

/// Dials the addresses in order, the next one whenever [`ATTEMPT_DELAY`] has passed or an attempt
/// failed, until the first connects.
async fn race<C: Connect>(connector: &C, addresses: &[SocketAddr]) -> Result<C::Stream, DialError> {
    let mut worst: Option<DialError> = None;
    let raced = timeout(CONNECT_TIMEOUT, async {
        let mut waiting = addresses.iter().take(MAX_ATTEMPTS).copied();
        let mut attempts = JoinSet::new();
        let mut next_start = Instant::now();
        let mut more = true;
        loop {
            if more && (attempts.is_empty() || Instant::now() >= next_start) {
                match waiting.next() {
                    Some(address) => {
                        let connector = connector.clone();
                        attempts.spawn(async move { connector.connect(address).await });
                        next_start = Instant::now() + ATTEMPT_DELAY;
                    }
                    None => more = false,
                }
            }
            if !more && attempts.is_empty() {
                return None;
            }
            let stagger =
                async { if more { sleep_until(next_start).await } else { pending().await } };
            tokio::select! {
                Some(ended) = attempts.join_next() => {
                    let error = match ended {
                        Ok(Ok(stream)) => return Some(stream),
                        Ok(Err(error)) => DialError::Connect(error),
                        Err(panicked) => DialError::Connect(io::Error::other(panicked)),
                    };
                    if worst.as_ref().is_none_or(|worst| worst.rank() < error.rank()) {
                        worst = Some(error);
                    }
                    next_start = Instant::now();
                }
                () = stagger => {}
            }
        }
    })
    .await;
    match raced {
        Ok(Some(stream)) => Ok(stream),
        Ok(None) => Err(worst.unwrap_or(DialError::Resolve(ResolveError::NotFound))),
        Err(_) => Err(worst
            .filter(|error| error.rank() > DialError::TimedOut.rank())
            .unwrap_or(DialError::TimedOut)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::IpAddr;
    use std::sync::{Arc, Mutex};

    use hickory_resolver::proto::rr::RecordType;
    use tokio::net::TcpListener;

    use super::*;
    use crate::policy::Reason;
    use crate::resolver::tests::{Answer, Server};

    #[derive(Clone, Copy, Debug)]
    enum Behaviour {
        Accepts(Duration),
        Fails(Duration, io::ErrorKind),
        Silent,
    }

    /// A connector that does as told and remembers what it dialled, and when.
    #[derive(Clone)]
    struct Fake {
        behaviours: Arc<HashMap<IpAddr, Behaviour>>,
        dialled: Arc<Mutex<Vec<(SocketAddr, Instant)>>>,
    }

    impl Fake {
        fn new<const N: usize>(behaviours: [(&str, Behaviour); N]) -> Self {
            let behaviours =
                behaviours.into_iter().map(|(ip, does)| (ip.parse().unwrap(), does)).collect();
            Self { behaviours: Arc::new(behaviours), dialled: Arc::default() }
        }

        fn dialled(&self) -> Vec<String> {
            let dialled = self.dialled.lock().unwrap();
            dialled.iter().map(|(address, _)| address.ip().to_string()).collect()
        }

        fn delays(&self) -> Vec<Duration> {
            let dialled = self.dialled.lock().unwrap();
            dialled.windows(2).map(|pair| pair[1].1 - pair[0].1).collect()
        }
    }

    impl Connect for Fake {
        type Stream = SocketAddr;

        async fn connect(&self, address: SocketAddr) -> io::Result<SocketAddr> {
            self.dialled.lock().unwrap().push((address, Instant::now()));
            match self.behaviours.get(&address.ip()).unwrap_or(&Behaviour::Silent) {
                Behaviour::Accepts(after) => {
                    tokio::time::sleep(*after).await;
                    Ok(address)
                }
                Behaviour::Fails(after, kind) => {
                    tokio::time::sleep(*after).await;
                    Err((*kind).into())
                }
                Behaviour::Silent => pending().await,
            }
        }
    }

    const NOW: Duration = Duration::ZERO;

    fn addresses<const N: usize>(ips: [&str; N]) -> Vec<SocketAddr> {
        ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 443)).collect()
    }

    async fn outcome(fake: &Fake, ips: &[SocketAddr]) -> OpenOutcome {
        race(fake, ips).await.map_or_else(|error| error.outcome(), |_| OpenOutcome::Connected)
    }

    fn dialer(server: &Server, allow_private: bool) -> Dialer {
        let policy = ExitPolicy::new([], allow_private);
        Dialer::new(Resolver::with_server(server.address).unwrap(), policy)
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_address_starts_after_the_delay_and_the_first_to_connect_wins() {
        let fake = Fake::new([
            ("2606:4700::1", Behaviour::Silent),
            ("1.1.1.1", Behaviour::Accepts(Duration::from_millis(400))),
            ("2606:4700::2", Behaviour::Accepts(Duration::from_millis(100))),
        ]);
        let all = addresses(["2606:4700::1", "1.1.1.1", "2606:4700::2", "1.0.0.1"]);
        assert_eq!(race(&fake, &all).await.unwrap(), all[2]);
        assert_eq!(fake.dialled().len(), 3);
        assert_eq!(fake.delays(), [ATTEMPT_DELAY; 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_starts_the_next_address_at_once() {
        let refuses = Behaviour::Fails(Duration::from_millis(20), io::ErrorKind::ConnectionRefused);
        let fake = Fake::new([("2606:4700::1", refuses), ("1.1.1.1", Behaviour::Accepts(NOW))]);
        let all = addresses(["2606:4700::1", "1.1.1.1"]);
        assert_eq!(race(&fake, &all).await.unwrap(), all[1]);
        assert_eq!(fake.delays(), [Duration::from_millis(20)]);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_after_the_timeout() {
        let fake = Fake::new([]);
        let started = Instant::now();
        let all = addresses(["2606:4700::1", "1.1.1.1"]);
        assert!(matches!(race(&fake, &all).await, Err(DialError::TimedOut)));
        assert_eq!(started.elapsed(), CONNECT_TIMEOUT);
        assert_eq!(fake.dialled().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_are_bounded() {
        let fake = Fake::new([]);
        let all: Vec<_> = (1..=50).map(|n| SocketAddr::new([1, 1, 1, n].into(), 1)).collect();
        assert_eq!(outcome(&fake, &all).await, OpenOutcome::TimedOut);
        assert_eq!(fake.dialled().len(), MAX_ATTEMPTS);
    }

    #[tokio::test(start_paused = true)]
    async fn errors_become_outcomes() {
        for (kind, expected) in [
            (io::ErrorKind::ConnectionRefused, OpenOutcome::Refused),
            (io::ErrorKind::HostUnreachable, OpenOutcome::HostUnreachable),
            (io::ErrorKind::NetworkUnreachable, OpenOutcome::NetworkUnreachable),
            (io::ErrorKind::NetworkDown, OpenOutcome::NetworkUnreachable),
            (io::ErrorKind::AddrNotAvailable, OpenOutcome::NetworkUnreachable),
            (io::ErrorKind::TimedOut, OpenOutcome::TimedOut),
            (io::ErrorKind::PermissionDenied, OpenOutcome::Failed),
        ] {
            let fake = Fake::new([("1.1.1.1", Behaviour::Fails(NOW, kind))]);
            assert_eq!(outcome(&fake, &addresses(["1.1.1.1"])).await, expected);
        }
        for (error, expected) in [
            (DialError::from(ResolveError::NotFound), OpenOutcome::HostUnreachable),
            (DialError::from(ResolveError::TimedOut), OpenOutcome::TimedOut),
            (DialError::from(ResolveError::Failed), OpenOutcome::Failed),
            (DialError::from(Forbidden { reason: Reason::Port }), OpenOutcome::Forbidden),
        ] {
            assert_eq!(error.outcome(), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_several_errors_the_most_informative_is_told() {
        let fails = |kind| Behaviour::Fails(NOW, kind);
        let no_network = fails(io::ErrorKind::NetworkUnreachable);
        let refused = fails(io::ErrorKind::ConnectionRefused);
        let all = addresses(["2606:4700::1", "1.1.1.1"]);
        for (first, second, expected) in [
            (no_network, refused, OpenOutcome::Refused),
            (refused, no_network, OpenOutcome::Refused),
            (no_network, Behaviour::Silent, OpenOutcome::TimedOut),
            (refused, Behaviour::Silent, OpenOutcome::Refused),
            (no_network, fails(io::ErrorKind::HostUnreachable), OpenOutcome::HostUnreachable),
            (fails(io::ErrorKind::Other), no_network, OpenOutcome::NetworkUnreachable),
        ] {
            let fake = Fake::new([("2606:4700::1", first), ("1.1.1.1", second)]);
            assert_eq!(outcome(&fake, &all).await, expected, "{first:?} {second:?}");
        }
    }

    #[tokio::test]
    async fn rebinding_is_useless() {
        let public: Vec<IpAddr> =
            ["93.184.216.34", "2606:4700::1"].map(|ip| ip.parse().unwrap()).into();
        let inside: Vec<IpAddr> = ["127.0.0.1", "::1"].map(|ip| ip.parse().unwrap()).into();
        let answer = Answer::Changing(public, inside);
        let server = Server::start([("rebind.example", answer)]).await;
        let fake = Fake::new([
            ("2606:4700::1", Behaviour::Fails(NOW, io::ErrorKind::NetworkUnreachable)),
            ("93.184.216.34", Behaviour::Accepts(NOW)),
        ]);
        let resolver = Resolver::with_server(server.address).unwrap();
        let dialer = Dialer::with_connector(resolver, ExitPolicy::new([], false), fake.clone());
        let stream = dialer.connect(&"rebind.example:80".parse().unwrap()).await.unwrap();
        assert_eq!(stream, "93.184.216.34:80".parse().unwrap());
        assert_eq!(fake.dialled(), ["2606:4700::1", "93.184.216.34"]);
        for record_type in [RecordType::A, RecordType::AAAA] {
            assert_eq!(server.queries("rebind.example", record_type), 1);
        }
    }

    #[tokio::test]
    async fn only_the_allowed_addresses_of_a_name_are_dialled() {
        let mixed = ["10.0.0.1", "1.1.1.1", "fd00::1", "::ffff:127.0.0.1", "169.254.169.254"];
        let mixed = mixed.map(|ip| ip.parse().unwrap()).into();
        let private = ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap()).into();
        let server = Server::start([
            ("mixed.example", Answer::Addresses(mixed)),
            ("private.example", Answer::Addresses(private)),
        ])
        .await;
        let fake = Fake::new([("1.1.1.1", Behaviour::Accepts(NOW))]);
        let resolver = Resolver::with_server(server.address).unwrap();
        let dialer = Dialer::with_connector(resolver, ExitPolicy::new([], false), fake.clone());
        assert!(dialer.connect(&"mixed.example:80".parse().unwrap()).await.is_ok());
        for target in ["private.example:80", "127.0.0.1:80", "localhost:80", "1.1.1.1:25"] {
            let error = dialer.connect(&target.parse().unwrap()).await.unwrap_err();
            assert_eq!(error.outcome(), OpenOutcome::Forbidden, "{target}");
        }
        assert_eq!(fake.dialled(), ["1.1.1.1"]);
    }

    #[tokio::test]
    async fn loopback_accepts_and_refuses() {
        let server = Server::start([]).await;
        let dialer = dialer(&server, true);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stream = dialer.connect(&Target::Ip(address)).await.unwrap();
        assert!(stream.nodelay().unwrap());
        assert_eq!(stream.peer_addr().unwrap(), address);
        // By name: ::1 refuses, 127.0.0.1 accepts.
        let by_name = Target::new("localhost", address.port()).unwrap();
        assert_eq!(dialer.connect(&by_name).await.unwrap().peer_addr().unwrap(), address);
        drop(listener);
        let error = dialer.connect(&Target::Ip(address)).await.unwrap_err();
        assert_eq!(error.outcome(), OpenOutcome::Refused);
    }

    #[tokio::test]
    async fn unknown_names_are_unreachable_hosts() {
        let server = Server::start([]).await;
        let error = dialer(&server, false).connect(&"gone.example:80".parse().unwrap()).await;
        assert_eq!(error.unwrap_err().outcome(), OpenOutcome::HostUnreachable);
    }

    /// Keeps the text of every event above DEBUG that a logging setup would show.
    struct Loud(Arc<Mutex<Vec<String>>>);

    impl tracing::Subscriber for Loud {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            let quiet = crate::resolver::QUIET_LOG_TARGETS;
            *metadata.level() < tracing::Level::DEBUG
                && !quiet.iter().any(|target| metadata.target().starts_with(target))
        }

        fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            self.0.lock().unwrap().push(format!("{span:?}"));
            tracing::span::Id::from_u64(1)
        }

        fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
            self.0.lock().unwrap().push(format!("{values:?}"));
        }

        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            self.0.lock().unwrap().push(format!("{event:?}"));
        }

        fn enter(&self, _: &tracing::span::Id) {}

        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[tokio::test]
    async fn destinations_are_never_logged_above_debug() {
        let texts = Arc::default();
        let _guard = tracing::subscriber::set_default(Loud(Arc::clone(&texts)));
        let server = Server::start([
            ("secret.example", Answer::Addresses(vec![[127, 0, 0, 1].into()])),
            ("malformed.secret.example", Answer::Malformed),
        ])
        .await;
        let dialer = dialer(&server, true);
        let mut errors = Vec::new();
        for name in ["secret.example", "malformed.secret.example", "gone.secret.example"] {
            for port in [1, 25] {
                let target = Target::new(name, port).unwrap();
                let error = dialer.connect(&target).await.unwrap_err();
                errors.push(format!("{error} {error:?}"));
            }
        }
        errors.append(&mut texts.lock().unwrap());
        for text in errors {
            assert!(!text.contains("secret") && !text.contains("127.0.0"), "{text}");
        }
    }
}
