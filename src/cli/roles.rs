//! The options of those who take part in a network with others: authorities, nodes and providers.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, Subcommand};
use mixsocks_common::directory::{MemberKind, Minimum};
use mixsocks_common::keys::Identity;
use mixsocks_common::topology::NetworkName;
use mixsocks_directory::Url;
use mixsocks_node::gateway::store::{Limits, MAX_EXPIRY};

use super::{FileArgs, parse_mean_delay, parse_socket_address};
use crate::network::DEFAULT_PAYLOAD_BYTES;

/// An epoch lasts between these: a second is for tests; of more than a week nobody waits for a change.
const EPOCH_SECONDS: std::ops::RangeInclusive<u64> = 1..=7 * 24 * 3600;

/// What `mixsocks directory` does.
#[derive(Debug, Subcommand)]
pub(crate) enum DirectoryCommand {
    /// Write its configuration file, with these options, and its key.
    Init(DirectoryInitArgs),
    /// Start it.
    Run(DirectoryArgs),
    /// Make an invitation for one new member.
    Invite(InviteArgs),
}

/// What `mixsocks node` does.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Write its configuration file, with these options, and its keys.
    Init(NodeArgs),
    /// Start it.
    Run(NodeArgs),
}

/// What `mixsocks provider` does.
#[derive(Debug, Subcommand)]
pub(crate) enum ProviderCommand {
    /// Write its configuration file, with these options, and its keys.
    Init(ProviderArgs),
    /// Start it.
    Run(ProviderArgs),
    /// Make an access token for its users, and print it.
    Token(TokenArgs),
}

/// What all roles that run for long have.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Where /metrics and /healthz are served over HTTP (else nowhere).
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_METRICS",
        value_parser = parse_socket_address
    )]
    pub(crate) metrics: Option<SocketAddr>,
    /// Where keys and all else that is remembered are kept (else in the data directory of the
    /// platform).
    #[arg(long, value_name = "DIR", env = "MIXSOCKS_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Options of `mixsocks directory run`.
#[derive(Debug, Args)]
pub(crate) struct DirectoryArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    /// The network's name: 1 to 64 of the characters a-z, 0-9 and hyphen. This and all that follows
    /// must be the same at all authorities, but for where they listen, peers, lists and directories.
    #[arg(
        long, value_name = "NAME", env = "MIXSOCKS_NETWORK", default_value = "mixnet",
        value_parser = parse_network
    )]
    pub(crate) network: NetworkName,
    /// Where members, followers and other authorities reach it over HTTP.
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_LISTEN", default_value = "127.0.0.1:9000",
        value_parser = parse_socket_address
    )]
    pub(crate) listen: SocketAddr,
    /// Another authority: its key and where it listens; may be given several times.
    #[arg(
        long, value_name = "KEY@URL", env = "MIXSOCKS_PEER", action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) peer: Vec<PeerChoice>,
    /// How many of the authorities must sign (else more than half of them).
    #[arg(long, value_name = "N", env = "MIXSOCKS_SIGNATURES")]
    pub(crate) signatures: Option<usize>,
    /// How long an epoch lasts: each has a document of its own.
    #[arg(
        long, value_name = "DURATION", env = "MIXSOCKS_EPOCH", default_value = "1h",
        value_parser = parse_epoch
    )]
    pub(crate) epoch: Duration,
    /// Epochs for which a Sphinx key is used.
    #[arg(
        long, value_name = "N", env = "MIXSOCKS_KEY_EPOCHS", default_value_t = 24,
        value_parser = clap::value_parser!(u64).range(1..=u64::from(u32::MAX))
    )]
    pub(crate) key_epochs: u64,
    /// For how long before and after the change of Sphinx keys both are taken (15 minutes, or a
    /// quarter of the time for which a key is used if that is less).
    #[arg(
        long, value_name = "DURATION", env = "MIXSOCKS_OVERLAP", value_parser = parse_seconds
    )]
    pub(crate) overlap: Option<Duration>,
    /// Epochs for which a document is in force when none follows.
    #[arg(
        long, value_name = "N", env = "MIXSOCKS_VALID_EPOCHS", default_value_t = 24,
        value_parser = clap::value_parser!(u64).range(2..=1000)
    )]
    pub(crate) valid_epochs: u64,
    /// Members that the first document waits for.
    #[arg(
        long,
        value_name = "KIND=N,…",
        env = "MIXSOCKS_MINIMUM",
        default_value = "mix=3,gateway=2,provider=0"
    )]
    pub(crate) minimum: Members,
    /// Bytes of a packet's payload: 1024 to 32768.
    #[arg(
        long, value_name = "N", env = "MIXSOCKS_PAYLOAD_BYTES",
        default_value_t = DEFAULT_PAYLOAD_BYTES,
        value_parser = clap::value_parser!(u32).range(1024..=32768)
    )]
    pub(crate) payload_bytes: u32,
    /// Mean time that each of the three mixes holds a packet.
    #[arg(
        long, value_name = "DURATION", env = "MIXSOCKS_MEAN_DELAY", default_value = "15ms",
        value_parser = parse_mean_delay
    )]
    pub(crate) mean_delay: Duration,
    /// A member that is admitted without an invitation; may be given several times.
    #[arg(
        long, value_name = "KEY=KIND", env = "MIXSOCKS_ALLOW", action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) allow: Vec<Allowed>,
    /// Take members at private and loopback addresses too: networks on one machine or in one
    /// building.
    #[arg(
        long, env = "MIXSOCKS_PRIVATE_ADDRESSES", action = ArgAction::SetTrue,
        value_parser = BoolishValueParser::new()
    )]
    pub(crate) private_addresses: bool,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Options of `mixsocks directory init`.
#[derive(Debug, Args)]
pub(crate) struct DirectoryInitArgs {
    #[command(flatten)]
    pub(crate) directory: DirectoryArgs,
    /// Make invitations for so many members of each kind, in files of the data directory; the first
    /// document waits for as many.
    #[arg(long, value_name = "KIND=N,…")]
    pub(crate) invite: Option<Members>,
}

/// Options of `mixsocks directory invite`.
#[derive(Debug, Args)]
pub(crate) struct InviteArgs {
    /// What the member will be: mix, gateway or provider.
    #[arg(value_name = "KIND", value_parser = parse_kind)]
    pub(crate) kind: MemberKind,
    /// File with an invitation that another authority has made, so that it serves here as well.
    #[arg(long, value_name = "FILE")]
    pub(crate) invitation: Option<PathBuf>,
    /// The authority's data directory.
    #[arg(long, value_name = "DIR", env = "MIXSOCKS_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Where a network's authorities are, and who they are.
#[derive(Clone, Debug, Args)]
pub(crate) struct MemberArgs {
    /// Where an authority of the network listens; all of them must be given.
    #[arg(
        long, value_name = "URL", env = "MIXSOCKS_DIRECTORY", action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) directory: Vec<Url>,
    /// Key of an authority that signs the topology, in base58; all of them must be given.
    #[arg(
        long, value_name = "KEY", env = "MIXSOCKS_AUTHORITY", action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) authority: Vec<Identity>,
    /// How many of the authorities must have signed (else more than half of them).
    #[arg(long, value_name = "N", env = "MIXSOCKS_SIGNATURES")]
    pub(crate) signatures: Option<usize>,
    /// File with the invitation that an authority's operator gave.
    #[arg(long, value_name = "FILE", env = "MIXSOCKS_INVITATION")]
    pub(crate) invitation: Option<PathBuf>,
}

/// Options of `mixsocks node`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) member: MemberArgs,
    /// What the node is: "mix" or "gateway".
    #[arg(
        long, value_name = "KIND", env = "MIXSOCKS_KIND", default_value = "mix",
        value_parser = parse_node_kind
    )]
    pub(crate) kind: MemberKind,
    /// Where it takes links from other nodes.
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_LISTEN", default_value = "0.0.0.0:9001",
        value_parser = parse_socket_address
    )]
    pub(crate) listen: SocketAddr,
    /// Where other nodes reach it (else where it listens).
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_ADDRESS",
        value_parser = parse_socket_address
    )]
    pub(crate) address: Option<SocketAddr>,
    /// Gateways: where it takes clients.
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_CLIENT_LISTEN",
        default_value = "0.0.0.0:9002", value_parser = parse_socket_address
    )]
    pub(crate) client_listen: SocketAddr,
    /// Gateways: where clients reach it (else where it listens for them).
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_CLIENT_ADDRESS",
        value_parser = parse_socket_address
    )]
    pub(crate) client_address: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// For networks under test: file that says which part of the packets to other nodes is lost and
    /// how late they are. It is read again with SIGHUP.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) impairment: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What a gateway keeps of messages for clients that are away.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct StoreArgs {
    /// Gateways: most bytes of messages that are kept for all clients together; nobody gets more than
    /// a 64th of what is left of them.
    #[arg(
        long, value_name = "SIZE", env = "MIXSOCKS_STORE_SIZE", default_value = "8GiB",
        value_parser = parse_store_size
    )]
    pub(crate) store_size: u64,
    /// Gateways: most bytes of messages that are kept for one client.
    #[arg(
        long, value_name = "SIZE", env = "MIXSOCKS_CLIENT_STORE_SIZE", default_value = "64MiB",
        value_parser = parse_store_size
    )]
    pub(crate) client_store_size: u64,
    /// Gateways: most packets of messages that are kept for one client.
    #[arg(
        long, value_name = "N", env = "MIXSOCKS_CLIENT_STORE_PACKETS", default_value_t = 65_536,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    pub(crate) client_store_packets: u64,
    /// Gateways: messages that nobody has fetched for so long are given up: 1h to 30d, in whole hours.
    #[arg(
        long, value_name = "DURATION", env = "MIXSOCKS_STORE_EXPIRY", default_value = "7d",
        value_parser = parse_expiry
    )]
    pub(crate) store_expiry: Duration,
}

impl StoreArgs {
    /// As the gateway wants it.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            client_bytes: self.client_store_size,
            client_boxes: self.client_store_packets,
            total_bytes: self.store_size,
            expiry: self.store_expiry,
            ..Limits::default()
        }
    }
}

/// Options of `mixsocks provider`.
#[derive(Debug, Args)]
pub(crate) struct ProviderArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) member: MemberArgs,
    /// The name under which it is advertised: 1 to 64 of the characters a-z, 0-9 and hyphen.
    #[arg(
        long, value_name = "NAME", env = "MIXSOCKS_NAME", default_value = "exit",
        value_parser = parse_network
    )]
    pub(crate) name: NetworkName,
    /// Identity of the gateway that it uses (else a random one, and then always the same).
    #[arg(long, value_name = "KEY", env = "MIXSOCKS_GATEWAY")]
    pub(crate) gateway: Option<Identity>,
    /// Serve only those who have an access token (see `mixsocks provider token`).
    #[arg(
        long, env = "MIXSOCKS_REQUIRE_TOKEN", action = ArgAction::SetTrue,
        value_parser = BoolishValueParser::new()
    )]
    pub(crate) require_token: bool,
    #[command(flatten)]
    pub(crate) exit: ExitArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Options of `mixsocks provider token`.
#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// What the operator calls it, to find it again: 1 to 64 of the characters a-z, 0-9 and hyphen.
    #[arg(long, value_name = "NAME", default_value = "friends", value_parser = parse_network)]
    pub(crate) name: NetworkName,
    /// The provider's data directory.
    #[arg(long, value_name = "DIR", env = "MIXSOCKS_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Whereto a provider connects.
#[derive(Clone, Debug, Args)]
pub(crate) struct ExitArgs {
    /// Let the provider connect to private and loopback addresses too, but for other addresses of this
    /// machine (for tests).
    #[arg(
        long, env = "MIXSOCKS_ALLOW_PRIVATE", action = ArgAction::SetTrue,
        value_parser = BoolishValueParser::new()
    )]
    pub(crate) allow_private: bool,
    /// Name server that the provider asks, instead of those of this machine.
    #[arg(long, value_name = "ADDR:PORT", env = "MIXSOCKS_DNS", value_parser = parse_socket_address)]
    pub(crate) dns: Option<SocketAddr>,
}

/// Another authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerChoice {
    pub(crate) identity: Identity,
    pub(crate) url: Url,
}

impl FromStr for PeerChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (identity, url) = text
            .split_once('@')
            .ok_or("expected KEY@URL, such as 4vJ9…@http://203.0.113.5:9000")?;
        Ok(Self {
            identity: identity.parse().map_err(|error| format!("the key: {error}"))?,
            url: url.parse().map_err(|error| format!("the address: {error}"))?,
        })
    }
}

/// Somebody on an authority's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) identity: Identity,
    pub(crate) kind: MemberKind,
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (identity, kind) =
            text.split_once('=').ok_or("expected KEY=KIND, such as 4vJ9…=mix")?;
        let identity = identity.parse().map_err(|error| format!("the key: {error}"))?;
        Ok(Self { identity, kind: parse_kind(kind)? })
    }
}

/// How many members of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Members {
    pub(crate) mixes: u16,
    pub(crate) gateways: u16,
    pub(crate) providers: u16,
}

impl Members {
    /// So many, but no fewer than a network needs: others come by the list.
    pub(crate) fn enough(self) -> Self {
        Self { mixes: self.mixes.max(3), gateways: self.gateways.max(1), ..self }
    }

    pub(crate) fn counts(&self) -> [(MemberKind, u16); 3] {
        [
            (MemberKind::Mix, self.mixes),
            (MemberKind::Gateway, self.gateways),
            (MemberKind::Provider, self.providers),
        ]
    }
}

impl FromStr for Members {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut members = Self::default();
        for part in text.split(',') {
            let (kind, count) =
                part.split_once('=').ok_or("expected KIND=N,…, such as mix=3,gateway=2")?;
            let count = count.parse().map_err(|_| format!("{count:?} is no number up to 65535"))?;
            match parse_kind(kind)? {
                MemberKind::Mix => members.mixes = count,
                MemberKind::Gateway => members.gateways = count,
                MemberKind::Provider => members.providers = count,
            }
        }
        Ok(members)
    }
}

impl fmt::Display for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mixes, gateways, providers } = self;
        write!(f, "mix={mixes},gateway={gateways},provider={providers}")
    }
}

impl From<Members> for Minimum {
    fn from(members: Members) -> Self {
        Self {
            mixes: members.mixes.into(),
            gateways: members.gateways.into(),
            providers: members.providers.into(),
        }
    }
}

/// The word for a kind of member.
pub(crate) fn kind_word(kind: MemberKind) -> &'static str {
    match kind {
        MemberKind::Mix => "mix",
        MemberKind::Gateway => "gateway",
        MemberKind::Provider => "provider",
    }
}

pub(crate) fn parse_kind(text: &str) -> Result<MemberKind, String> {
    let all = [MemberKind::Mix, MemberKind::Gateway, MemberKind::Provider];
    let found = all.into_iter().find(|kind| kind_word(*kind) == text);
    found.ok_or_else(|| "expected mix, gateway or provider".to_owned())
}

fn parse_node_kind(text: &str) -> Result<MemberKind, String> {
    match parse_kind(text) {
        Ok(kind @ (MemberKind::Mix | MemberKind::Gateway)) => Ok(kind),
        _ => Err("expected mix or gateway".to_owned()),
    }
}

fn parse_network(text: &str) -> Result<NetworkName, String> {
    NetworkName::new(text)
        .ok_or_else(|| "expected 1 to 64 of the characters a-z, 0-9 and hyphen".to_owned())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| "expected a number and a unit, such as 10s or 1h".to_owned())?;
    match duration.subsec_nanos() {
        0 => Ok(duration),
        _ => Err("expected whole seconds".to_owned()),
    }
}

/// A store for less would not keep a single message of some length.
const SMALLEST_STORE: u64 = 1024 * 1024;
const HOUR: u64 = 60 * 60;

fn parse_store_size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 4] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let found = UNITS.into_iter().find_map(|(unit, bits)| {
        text.strip_suffix(unit).map(|number| (number.trim_end().parse::<u64>(), 1 << bits))
    });
    let Some((Ok(number), unit)) = found else {
        return Err("expected a whole number and a unit, such as 64MiB or 8GiB".to_owned());
    };
    match number.checked_mul(unit) {
        None => Err("that is more than any disk has".to_owned()),
        Some(bytes) if bytes < SMALLEST_STORE => Err("expected at least 1MiB".to_owned()),
        Some(bytes) => Ok(bytes),
    }
}

fn parse_expiry(text: &str) -> Result<Duration, String> {
    let expiry = humantime::parse_duration(text)
        .map_err(|_| "expected a number and a unit, such as 12h or 7d".to_owned())?;
    let is_whole = expiry.subsec_nanos() == 0 && expiry.as_secs().is_multiple_of(HOUR);
    if is_whole && (Duration::from_secs(HOUR)..=MAX_EXPIRY).contains(&expiry) {
        return Ok(expiry);
    }
    Err("expected whole hours, 1h to 30d".to_owned())
}

fn parse_epoch(text: &str) -> Result<Duration, String> {
    let epoch = parse_seconds(text)?;
    if EPOCH_SECONDS.contains(&epoch.as_secs()) {
        return Ok(epoch);
    }
    Err("an epoch lasts between 1 second and 7 days".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_expiry_has_whole_hours() {
        let sizes = ["1MiB", "1024KiB", "64 MiB", "8GiB", "1TiB"].map(parse_store_size);
        let bytes = [1 << 20, 1 << 20, 64 << 20, 8 << 30, 1 << 40];
        assert_eq!(sizes, bytes.map(Ok));
        for wrong in ["", "5", "MiB", "1MB", "-1MiB", "1.5GiB", "1023KiB", "0GiB", "99999999TiB"] {
            assert!(parse_store_size(wrong).is_err(), "{wrong}");
        }
        for (text, hours) in [("1h", 1), ("7d", 168), ("30d", 720), ("60m", 1)] {
            assert_eq!(parse_expiry(text), Ok(Duration::from_secs(hours * HOUR)));
        }
        for wrong in ["", "7", "59m", "90m", "0h", "721h", "31d", "1h 1ms"] {
            assert!(parse_expiry(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn few_invitations_still_make_a_network() {
        for (invited, minimum) in [
            ("provider=1", "mix=3,gateway=1,provider=1"),
            ("mix=3,gateway=2,provider=1", "mix=3,gateway=2,provider=1"),
            ("mix=9", "mix=9,gateway=1,provider=0"),
        ] {
            assert_eq!(invited.parse::<Members>().unwrap().enough().to_string(), minimum);
        }
    }
}
