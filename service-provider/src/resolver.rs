//! Name resolution at the exit.
//!
//! Names are taken as fully qualified: there is no search list and no hosts file, so a client
//! cannot find out how the provider's own network calls things. The one local name is `localhost`.
//!
//! The resolver behind it logs the names that it is asked for, some of them as warnings: a logging
//! setup must switch the targets of [`QUIET_LOG_TARGETS`] off.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RecordType};
use mixsocks_common::target::HostName;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

/// Log targets that name destinations above DEBUG; to be switched off wherever logs are set up.
pub const QUIET_LOG_TARGETS: [&str; 3] = ["hickory_net", "hickory_proto", "hickory_resolver"];

/// The whole time that one name may take.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for one try at the name servers; two fit into [`LOOKUP_TIMEOUT`].
const TRY_TIMEOUT: Duration = Duration::from_secs(2);
const RETRIES: usize = 1;

/// What IPv6 addresses may cost once IPv4 addresses are known. Never the other way round: exits
/// without IPv6 are common, so IPv6 addresses alone are worth little.
const IPV6_GRACE: Duration = Duration::from_millis(250);

/// Names in flight; each holds two UDP sockets. More wait, and waiting counts as lookup time.
const MAX_LOOKUPS: usize = 256;

/// Cached answers, each of a few hundred bytes.
const MAX_CACHED_ANSWERS: u64 = 4096;
const MAX_POSITIVE_TTL: Duration = Duration::from_secs(60 * 60);
/// A name that did not exist a minute ago may exist now, whatever its zone says.
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(60);

/// Addresses taken of each family: more than anybody dials.
const MAX_ADDRESSES_PER_FAMILY: usize = 8;

/// Resolves names to addresses.
pub struct Resolver {
    dns: TokioResolver,
    slots: Semaphore,
}

/// Why there is no resolver.
#[derive(Debug, thiserror::Error)]
pub enum ResolverSetupError {
    /// The system's configuration cannot be read, or names no server.
    #[error("the system's DNS configuration is not usable; name a server with --dns")]
    System(#[source] NetError),
    /// The resolver does not accept its configuration.
    #[error("the DNS resolver cannot be set up")]
    Build(#[source] NetError),
}

/// Why a name has no addresses. No text holds the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The name does not exist, has no addresses, or cannot exist.
    #[error("the name does not resolve")]
    NotFound,
    /// No name server answered within [`LOOKUP_TIMEOUT`].
    #[error("the name servers do not answer")]
    TimedOut,
    /// The name servers answered with an error or with something unreadable.
    #[error("the name servers failed")]
    Failed,
}

impl Resolver {
    /// A resolver that asks the system's name servers.
    ///
    /// # Errors
    /// [`ResolverSetupError`] when the system names none.
    pub fn system() -> Result<Self, ResolverSetupError> {
        let (config, _) = hickory_resolver::system_conf::read_system_conf()
            .map_err(ResolverSetupError::System)?;
        let (_domain, _search, servers) = config.into_parts();
        Self::new(servers)
    }

    /// A resolver that asks one name server, over UDP and, for long answers, TCP.
    ///
    /// # Errors
    /// [`ResolverSetupError::Build`].
    pub fn with_server(server: SocketAddr) -> Result<Self, ResolverSetupError> {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
        let connections = connections.map(|mut connection| {
            connection.port = server.port();
            connection
        });
        Self::new(vec![NameServerConfig::new(server.ip(), true, connections.into())])
    }

    fn new(servers: Vec<NameServerConfig>) -> Result<Self, ResolverSetupError> {
        let config = ResolverConfig::from_name_servers(servers);
        let mut builder =
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        set_options(builder.options_mut());
        let dns = builder.build().map_err(ResolverSetupError::Build)?;
        Ok(Self { dns, slots: Semaphore::new(MAX_LOOKUPS) })
    }

    /// The addresses of a name, IPv6 and IPv4 in turns, at least one.
    ///
    /// Both families are asked for at once. A name that is an IP address is that address.
    ///
    /// # Errors
    /// See [`ResolveError`].
    pub async fn resolve(&self, name: &HostName) -> Result<Vec<IpAddr>, ResolveError> {
        let text = name.as_str();
        if let Ok(ip) = text.parse() {
            return Ok(vec![ip]);
        }
        if is_localhost(text) {
            return Ok(vec![Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into()]);
        }
        let mut name = Name::from_ascii(text).map_err(|_| ResolveError::NotFound)?;
        name.set_fqdn(true);
        let deadline = Instant::now() + LOOKUP_TIMEOUT;
        // The semaphore is never closed, so that the one error here is the deadline.
        let Ok(_slot) = timeout_at(deadline, self.slots.acquire()).await else {
            return Err(ResolveError::TimedOut);
        };
        self.both_families(name, deadline).await
    }

    async fn both_families(
        &self,
        name: Name,
        deadline: Instant,
    ) -> Result<Vec<IpAddr>, ResolveError> {
        let v4 = self.family(name.clone(), RecordType::A, deadline);
        let v6 = self.family(name, RecordType::AAAA, deadline);
        tokio::pin!(v4, v6);
        let (v4, v6) = tokio::select! {
            v4 = &mut v4 => match v4 {
                Ok(found) => {
                    let v6 = timeout(IPV6_GRACE, v6).await;
                    (Ok(found), v6.unwrap_or(Err(FamilyError::TimedOut)))
                }
                // Holds for every type of record (RFC 8020).
                Err(FamilyError::NoSuchName) => return Err(ResolveError::NotFound),
                Err(error) => (Err(error), v6.await),
            },
            v6 = &mut v6 => match v6 {
                Err(FamilyError::NoSuchName) => return Err(ResolveError::NotFound),
                v6 => (v4.await, v6),
            },
        };
        match (v4, v6) {
            (Ok(v4), Ok(v6)) => Ok(interleave(v6, v4)),
            (Ok(found), Err(_)) | (Err(_), Ok(found)) => Ok(found),
            (Err(v4), Err(v6)) => Err(v4.max(v6).into()),
        }
    }

    /// The addresses of one family, at least one.
    async fn family(
        &self,
        name: Name,
        record_type: RecordType,
        deadline: Instant,
    ) -> Result<Vec<IpAddr>, FamilyError> {
        // On the heap: the future of a lookup is several KiB.
        let lookup = Box::pin(self.dns.lookup(name, record_type));
        let found = timeout_at(deadline, lookup).await.unwrap_or(Err(NetError::Timeout))?;
        let records = found.answers().iter().filter(|record| record.record_type() == record_type);
        let addresses = records.filter_map(|record| record.data.ip_addr());
        let addresses: Vec<_> = addresses.take(MAX_ADDRESSES_PER_FAMILY).collect();
        if addresses.is_empty() { Err(FamilyError::NoRecords) } else { Ok(addresses) }
    }
}

fn set_options(options: &mut ResolverOpts) {
    *options = ResolverOpts::default();
    options.timeout = TRY_TIMEOUT;
    options.attempts = RETRIES;
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = MAX_CACHED_ANSWERS;
    options.positive_max_ttl = Some(MAX_POSITIVE_TTL);
    options.negative_max_ttl = Some(MAX_NEGATIVE_TTL);
}

/// RFC 6761 §6.3: never asked from a name server, which could give it any address.
fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let last = name.rsplit('.').next().unwrap_or(name);
    last.eq_ignore_ascii_case("localhost")
}

/// How one family's lookup failed; of two errors the greater one says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum FamilyError {
    /// The name exists, with records of other types.
    NoRecords,
    Failed,
    TimedOut,
    NoSuchName,
}

impl From<NetError> for FamilyError {
    fn from(error: NetError) -> Self {
        match error {
            NetError::Timeout => Self::TimedOut,
            NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
                ResponseCode::NXDomain => Self::NoSuchName,
                ResponseCode::NoError => Self::NoRecords,
                _ => Self::Failed,
            },
            _ => Self::Failed,
        }
    }
}

impl From<FamilyError> for ResolveError {
    fn from(error: FamilyError) -> Self {
        match error {
            FamilyError::NoRecords | FamilyError::NoSuchName => Self::NotFound,
            FamilyError::Failed => Self::Failed,
            FamilyError::TimedOut => Self::TimedOut,
        }
    }
}

fn interleave(first: Vec<IpAddr>, second: Vec<IpAddr>) -> Vec<IpAddr> {
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all = Vec::with_capacity(first.len() + second.len());
    loop {
        let len = all.len();
        all.extend(first.next());
        all.extend(second.next());
        if all.len() == len {
            return all;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::{HashMap, HashSet};
    use std::sync::{Arc, Mutex};

    use hickory_resolver::proto::op::{Message, MessageType};
    use hickory_resolver::proto::rr::{RData, Record};
    use tokio::net::UdpSocket;
    use tokio::task::AbortHandle;

    use super::*;

    /// What the test server does with a query.
    #[derive(Clone, Debug)]
    pub(crate) enum Answer {
        /// These addresses, as far as they are of the type asked for.
        Addresses(Vec<IpAddr>),
        /// The first list for the first query of each family, then the second.
        Changing(Vec<IpAddr>, Vec<IpAddr>),
        NoSuchName,
        ServerFailure,
        /// The header, then an unreadable question.
        Malformed,
        Silence,
        /// A records only; AAAA queries get no answer.
        SilentAboutIpv6(Vec<IpAddr>),
    }

    /// The identifiers of the queries for each name and type.
    type Queries = HashMap<(String, RecordType), HashSet<u16>>;

    /// A name server on loopback that counts its queries; one that is sent again counts once.
    pub(crate) struct Server {
        pub(crate) address: SocketAddr,
        queries: Arc<Mutex<Queries>>,
        task: AbortHandle,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    impl Server {
        pub(crate) async fn start(zone: impl IntoIterator<Item = (&'static str, Answer)>) -> Self {
            let zone: HashMap<_, _> = zone.into_iter().collect();
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let address = socket.local_addr().unwrap();
            let queries = Arc::new(Mutex::new(Queries::new()));
            let counted = queries.clone();
            let task = tokio::spawn(async move {
                let mut packet = [0; 1500];
                loop {
                    let (len, from) = socket.recv_from(&mut packet).await.unwrap();
                    let query = Message::from_vec(&packet[..len]).unwrap();
                    let question = &query.queries[0];
                    let name = question.name().to_ascii().to_lowercase();
                    let name = name.trim_end_matches('.').to_owned();
                    let count = {
                        let mut queries = counted.lock().unwrap();
                        let ids = queries.entry((name.clone(), question.query_type())).or_default();
                        ids.insert(query.id);
                        ids.len()
                    };
                    let answer = zone.get(&name[..]).cloned().unwrap_or(Answer::NoSuchName);
                    if let Some(reply) = reply(&query, answer, count) {
                        socket.send_to(&reply, from).await.unwrap();
                    }
                }
            });
            Self { address, queries, task: task.abort_handle() }
        }

        pub(crate) fn queries(&self, name: &str, record_type: RecordType) -> usize {
            let queries = self.queries.lock().unwrap();
            queries.get(&(name.to_owned(), record_type)).map_or(0, HashSet::len)
        }

        fn total(&self) -> usize {
            self.queries.lock().unwrap().values().map(HashSet::len).sum()
        }
    }

    fn reply(query: &Message, answer: Answer, count: usize) -> Option<Vec<u8>> {
        let question = query.queries[0].clone();
        let mut reply = Message::query();
        reply.metadata.id = query.id;
        reply.metadata.message_type = MessageType::Response;
        reply.metadata.recursion_available = true;
        reply.add_query(question.clone());
        let addresses = match answer {
            Answer::Addresses(addresses) => addresses,
            Answer::Changing(first, then) => {
                if count == 1 {
                    first
                } else {
                    then
                }
            }
            Answer::SilentAboutIpv6(_) if question.query_type() == RecordType::AAAA => return None,
            Answer::SilentAboutIpv6(addresses) => addresses,
            Answer::NoSuchName => {
                reply.metadata.response_code = ResponseCode::NXDomain;
                Vec::new()
            }
            Answer::ServerFailure => {
                reply.metadata.response_code = ResponseCode::ServFail;
                Vec::new()
            }
            Answer::Malformed => {
                let mut bytes = reply.to_vec().unwrap();
                bytes.truncate(14);
                return Some(bytes);
            }
            Answer::Silence => return None,
        };
        for ip in addresses {
            let data = RData::from(ip);
            if data.record_type() == question.query_type() {
                reply.add_answer(Record::from_rdata(question.name().clone(), 300, data));
            }
        }
        Some(reply.to_vec().unwrap())
    }

    fn ips<const N: usize>(texts: [&str; N]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    async fn resolve(server: &Server, name: &str) -> Result<Vec<IpAddr>, ResolveError> {
        let resolver = Resolver::with_server(server.address).unwrap();
        resolver.resolve(&HostName::new(name).unwrap()).await
    }

    #[tokio::test]
    async fn both_families_interleaved_from_one_query_each() {
        let all =
            ips(["198.51.100.1", "2001:db8::1", "198.51.100.2", "2001:db8::2", "198.51.100.3"]);
        let server = Server::start([("two.example", Answer::Addresses(all))]).await;
        let resolver = Resolver::with_server(server.address).unwrap();
        let expected =
            ips(["2001:db8::1", "198.51.100.1", "2001:db8::2", "198.51.100.2", "198.51.100.3"]);
        // The second time from the cache, whatever the case and with or without the final dot.
        for name in ["two.example", "TWO.example."] {
            let name = HostName::new(name).unwrap();
            assert_eq!(resolver.resolve(&name).await, Ok(expected.clone()));
        }
        assert_eq!(server.queries("two.example", RecordType::A), 1);
        assert_eq!(server.queries("two.example", RecordType::AAAA), 1);
    }

    #[tokio::test]
    async fn one_family_is_enough() {
        let server = Server::start([
            ("v4.example", Answer::Addresses(ips(["198.51.100.1"]))),
            ("v6.example", Answer::Addresses(ips(["2001:db8::1"]))),
        ])
        .await;
        assert_eq!(resolve(&server, "v4.example").await, Ok(ips(["198.51.100.1"])));
        assert_eq!(resolve(&server, "v6.example").await, Ok(ips(["2001:db8::1"])));
    }

    #[tokio::test]
    async fn ipv4_does_not_wait_for_a_server_that_is_silent_about_ipv6() {
        let answer = Answer::SilentAboutIpv6(ips(["198.51.100.1"]));
        let server = Server::start([("half.example", answer)]).await;
        let started = Instant::now();
        assert_eq!(resolve(&server, "half.example").await, Ok(ips(["198.51.100.1"])));
        assert!(started.elapsed() < TRY_TIMEOUT);
    }

    #[tokio::test]
    async fn missing_names() {
        let server = Server::start([("empty.example", Answer::Addresses(Vec::new()))]).await;
        for name in ["gone.example", "empty.example", "a..example", &"a".repeat(64), "single"] {
            assert_eq!(resolve(&server, name).await, Err(ResolveError::NotFound), "{name}");
        }
        // Taken as fully qualified: nothing was appended.
        assert!(server.queries("single", RecordType::A) > 0);
    }

    #[tokio::test]
    async fn failing_servers() {
        let server = Server::start([
            ("broken.example", Answer::ServerFailure),
            ("malformed.example", Answer::Malformed),
        ])
        .await;
        for name in ["broken.example", "malformed.example"] {
            assert_eq!(resolve(&server, name).await, Err(ResolveError::Failed), "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_times_out() {
        let server = Server::start([("silent.example", Answer::Silence)]).await;
        let started = Instant::now();
        assert_eq!(resolve(&server, "silent.example").await, Err(ResolveError::TimedOut));
        assert!(started.elapsed() <= LOOKUP_TIMEOUT, "{:?}", started.elapsed());
        for record_type in [RecordType::A, RecordType::AAAA] {
            assert!(server.queries("silent.example", record_type) > 0);
        }
    }

    #[tokio::test]
    async fn addresses_and_localhost_ask_nobody() {
        let server = Server::start([]).await;
        for ip in ["127.0.0.1", "2001:db8::1", "::ffff:10.0.0.1"] {
            assert_eq!(resolve(&server, ip).await, Ok(ips([ip])));
        }
        for name in ["localhost", "LocalHost.", "a.b.localhost", "localhost.localhost."] {
            assert_eq!(resolve(&server, name).await, Ok(ips(["::1", "127.0.0.1"])), "{name}");
        }
        assert_eq!(server.total(), 0);
        assert_eq!(resolve(&server, "notlocalhost").await, Err(ResolveError::NotFound));
        assert!(server.total() > 0);
    }

    #[tokio::test]
    async fn many_answers_are_cut() {
        let many = (1..=40).map(|n| IpAddr::from([198, 51, 100, n])).collect();
        let server = Server::start([("many.example", Answer::Addresses(many))]).await;
        let found = resolve(&server, "many.example").await.unwrap();
        assert_eq!(found.len(), MAX_ADDRESSES_PER_FAMILY);
    }

    #[test]
    fn no_error_holds_a_name() {
        for error in [ResolveError::NotFound, ResolveError::TimedOut, ResolveError::Failed] {
            assert!(!format!("{error} {error:?}").contains('.'));
        }
    }
}
