//! The command line: every option, also as a `MIXSOCKS_…` variable, parsed once into what it means.

mod bench;
mod messages;
mod roles;

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use mixsocks_client::socks;
use mixsocks_common::address::Address;
use mixsocks_common::keys::Identity;
use mixsocks_directory::Url;

pub(crate) use self::bench::{
    BenchArgs, BenchCommand, BenchMessagesArgs, BenchMixArgs, BenchSoakArgs, BenchSphinxArgs, Row,
};
pub(crate) use self::messages::{
    AddressArgs, ByArgs, ReceiveArgs, SendArgs, TokenText, WebsocketArgs,
};
pub(crate) use self::roles::{
    Allowed, DirectoryArgs, DirectoryCommand, DirectoryInitArgs, ExitArgs, InviteArgs, MemberArgs,
    NodeArgs, NodeCommand, PeerChoice, ProviderArgs, ProviderCommand, RunArgs, TokenArgs,
    kind_word, parse_kind,
};
use crate::config::{self, ConfigFile};

/// Mixes hold no packet longer than this, so a mean beyond it would be a promise that is not kept.
pub(crate) const MAX_DELAY: Duration = Duration::from_secs(10);

/// A local SOCKS5 proxy whose traffic goes through a mixnet.
#[derive(Debug, Parser)]
#[command(
    name = "mixsocks",
    version,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    after_help = "Options are also variables, and keys of a file: --socks [::1]:9050 is MIXSOCKS_SOCKS=[::1]:9050 and socks = \"[::1]:9050\". An option wins over a variable, a variable over the file."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) verbosity: Verbosity,
    #[command(subcommand)]
    pub(crate) command: Command,
    /// What `init` writes.
    #[arg(skip)]
    pub(crate) config: String,
}

/// Why a command line is not understood.
#[derive(Debug)]
pub(crate) enum CliError {
    /// It is wrong, or asks for help.
    Words(clap::Error),
    /// Its file is wrong.
    Config(anyhow::Error),
}

impl From<CliError> for anyhow::Error {
    fn from(error: CliError) -> Self {
        match error {
            CliError::Words(error) => error.into(),
            CliError::Config(error) => error,
        }
    }
}

impl From<clap::Error> for CliError {
    fn from(error: clap::Error) -> Self {
        Self::Words(error)
    }
}

/// A command with settings among what was matched.
struct Matched<'a> {
    /// The role whose file it reads.
    role: &'static str,
    /// The words that name it.
    path: &'static [&'static str],
    options: &'a ArgMatches,
}

/// Commands with settings, and the role whose file each reads.
const WITH_SETTINGS: [(&str, &[&str]); 14] = [
    ("up", &["up"]),
    ("client", &["client", "run"]),
    ("client", &["client", "init"]),
    ("directory", &["directory", "run"]),
    ("directory", &["directory", "init"]),
    ("node", &["node", "run"]),
    ("node", &["node", "init"]),
    ("provider", &["provider", "run"]),
    ("provider", &["provider", "init"]),
    ("client", &["providers"]),
    ("client", &["network", "status"]),
    ("client", &["send"]),
    ("client", &["receive"]),
    ("client", &["address"]),
];

fn matched(matches: &ArgMatches) -> Option<Matched<'_>> {
    WITH_SETTINGS.into_iter().find_map(|(role, path)| {
        let options = path.iter().try_fold(matches, |at, word| at.subcommand_matches(word))?;
        Some(Matched { role, path, options })
    })
}

/// The options with which a role runs.
fn options(root: &clap::Command, role: &str) -> Option<clap::Command> {
    let (_, path) = WITH_SETTINGS.into_iter().find(|(of, _)| *of == role)?;
    path.iter().try_fold(root, |at, word| at.find_subcommand(word)).cloned()
}

/// Changes the command that `path` names.
fn change(
    command: clap::Command,
    path: &[&'static str],
    how: impl FnOnce(clap::Command) -> clap::Command,
) -> clap::Command {
    match path {
        [] => how(command),
        [first, rest @ ..] => command.mut_subcommand(first, |below| change(below, rest, how)),
    }
}

impl Cli {
    /// Understands a command line, and the file that it names. Of two options that exclude each other,
    /// one of the command line wins over one of a variable, which may have been set for another
    /// command.
    pub(crate) fn from_words(words: impl IntoIterator<Item = OsString>) -> Result<Self, CliError> {
        let words: Vec<_> = words.into_iter().collect();
        let mut command = with_file(Self::command(), &words).map_err(CliError::Config)?;
        let matches = command.try_get_matches_from_mut(words)?;
        let mut cli = Self::from_arg_matches(&matches).map_err(|e| e.format(&mut command))?;
        if let Some(Matched { options, .. }) = matched(&matches) {
            messages::check_websocket(options)?;
        }
        if let Some(Matched { role, path: [.., "init"], options: given }) = matched(&matches)
            && let Some(options) = options(&command, role)
        {
            cli.config = config::template(role, &options, given);
        }
        let Verbosity { verbose, quiet } = &mut cli.verbosity;
        if *quiet && *verbose > 0 {
            match stronger(&matches, "quiet", "verbose")? {
                "quiet" => *verbose = 0,
                _ => *quiet = false,
            }
        }
        if let (Command::Bench(args), Some((_, matches))) = (&mut cli.command, matches.subcommand())
            && args.socks.is_some()
        {
            // --socks is never a variable's here: that one is for up and client.
            if args.traffic.mean_delay.take().is_some() {
                stronger(matches, "socks", "mean_delay")?;
            }
            if args.traffic.payload_bytes.take().is_some() {
                stronger(matches, "socks", "payload_bytes")?;
            }
        }
        Ok(cli)
    }
}

/// The command line with the values of the file that `words` name as its defaults.
fn with_file(root: clap::Command, words: &[OsString]) -> anyhow::Result<clap::Command> {
    // What is wrong with the words is told once the file has been read.
    let Ok(matches) = root.clone().ignore_errors(true).try_get_matches_from(words) else {
        return Ok(root);
    };
    let Some(Matched { role, path, options: given }) = matched(&matches) else { return Ok(root) };
    if path.ends_with(&["init"]) {
        return Ok(root);
    }
    let (Some(file), Some(options)) = (config::path(given, role), options(&root, role)) else {
        return Ok(root);
    };
    let file = ConfigFile::read(&file, role, &options)?;
    Ok(change(root, path, |command| file.apply(command)))
}

/// The options with which a role runs.
#[cfg(test)]
pub(crate) fn options_of(role: &str) -> Option<clap::Command> {
    options(&Cli::command(), role)
}

/// Says what is wrong with a file.
pub(crate) fn check_config(path: &Path) -> anyhow::Result<()> {
    let role = config::role_of(path)?;
    let Some(options) = options(&Cli::command(), &role) else {
        anyhow::bail!(
            "{}: there is no role {role:?}; there are up, client, directory, node and provider",
            path.display()
        );
    };
    ConfigFile::read(path, &role, &options).map(drop)
}

/// Which of two options counts that exclude each other.
fn stronger<'a>(
    matches: &ArgMatches,
    one: &'a str,
    other: &'a str,
) -> Result<&'a str, clap::Error> {
    let is_word = |id| matches.value_source(id) == Some(ValueSource::CommandLine);
    match (is_word(one), is_word(other)) {
        (true, false) => Ok(one),
        (false, true) => Ok(other),
        _ => {
            let name = |id: &str| ContextValue::String(format!("--{}", id.replace('_', "-")));
            let mut error = clap::Error::new(ErrorKind::ArgumentConflict);
            error.insert(ContextKind::InvalidArg, name(one));
            error.insert(ContextKind::PriorArg, name(other));
            Err(error)
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a whole network on this machine (mixes, gateways, provider, client) and a proxy to it.
    Up(UpArgs),
    /// A proxy to a network of many machines.
    #[command(subcommand)]
    Client(ClientCommand),
    /// An authority of a network: it admits members and signs documents.
    #[command(subcommand)]
    Directory(DirectoryCommand),
    /// A mix or gateway of a network.
    #[command(subcommand)]
    Node(NodeCommand),
    /// A provider: it connects to the internet for others.
    #[command(subcommand)]
    Provider(ProviderCommand),
    /// Send a message.
    Send(SendArgs),
    /// Print the messages that have come.
    Receive(ReceiveArgs),
    /// Print the address at which messages reach you.
    Address(AddressArgs),
    /// List the providers that a network advertises.
    Providers(ShowArgs),
    /// Look at a network.
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Check a configuration file.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Measure latency, throughput, CPU and memory of a proxy.
    Bench(BenchArgs),
}

/// What `mixsocks client` does.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Write its configuration file, with these options, and its keys.
    Init(ClientArgs),
    /// Start it.
    Run(ClientArgs),
}

/// What `mixsocks config` does.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Say what is wrong with a configuration file.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// Where the settings of a role are.
#[derive(Clone, Debug, Args)]
pub(crate) struct FileArgs {
    /// File with settings (else config.toml in the data directory, if it is there).
    #[arg(long, value_name = "FILE", env = "MIXSOCKS_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

/// What `mixsocks network` does.
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Show a network's nodes and providers, and who signed for them.
    Status(ShowArgs),
}

/// A network that is looked at.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
}

/// Which network.
#[derive(Clone, Debug, Args)]
pub(crate) struct NetworkArgs {
    /// Where the network's signed topology is fetched: an authority or a mirror; may be given several
    /// times.
    #[arg(
        long, value_name = "URL", env = "MIXSOCKS_DIRECTORY", action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) directory: Vec<Url>,
    /// The network's signed topology file, for networks without a directory.
    #[arg(long, value_name = "FILE", env = "MIXSOCKS_TOPOLOGY")]
    pub(crate) topology: Option<PathBuf>,
    /// Key of an authority that signs the topology, in base58; may be given several times.
    #[arg(
        long, value_name = "KEY", env = "MIXSOCKS_AUTHORITY", action = ArgAction::Append,
        value_delimiter = ','
    )]
    pub(crate) authority: Vec<Identity>,
    /// How many of the authorities must have signed (else more than half of them).
    #[arg(long, value_name = "N", env = "MIXSOCKS_SIGNATURES")]
    pub(crate) signatures: Option<usize>,
}

/// How much is said.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Verbosity {
    /// Log more; twice also shows destinations.
    #[arg(short, long, global = true, action = ArgAction::Count, env = "MIXSOCKS_VERBOSE")]
    pub(crate) verbose: u8,
    /// Say only where the proxy listens, and errors.
    #[arg(
        short, long, global = true, env = "MIXSOCKS_QUIET", value_parser = BoolishValueParser::new()
    )]
    pub(crate) quiet: bool,
}

/// Where programs reach the proxy.
#[derive(Clone, Debug, Args)]
pub(crate) struct ListenArgs {
    /// Where the SOCKS5 proxy listens; port 0 takes any free one.
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_SOCKS", default_value = "127.0.0.1:1080",
        value_parser = parse_socket_address
    )]
    pub(crate) socks: SocketAddr,
    /// Ask programs for this user name and password (other local users see it in the process list;
    /// the variable is not shown there).
    #[arg(
        long, value_name = "USER:PASSWORD", env = "MIXSOCKS_SOCKS_USER", hide_env_values = true,
        value_parser = Credentials::parse
    )]
    pub(crate) socks_user: Option<Credentials>,
    /// Tell programs at once that a connection is open, so that their first bytes travel with the
    /// request: it saves one of two round trips. When the connection cannot be opened they see it break
    /// off, and are not told why.
    #[arg(long, env = "MIXSOCKS_OPTIMISTIC")]
    pub(crate) optimistic: bool,
}

/// How packets are delayed.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TrafficArgs {
    /// Mean time that each of the three mixes holds a packet; 0 switches mixing off (for tests)
    /// (15ms unless said otherwise).
    #[arg(
        long, value_name = "DURATION", env = "MIXSOCKS_MEAN_DELAY", value_parser = parse_mean_delay
    )]
    pub(crate) mean_delay: Option<Duration>,
    /// Bytes of a packet's payload: 1024 to 32768 (4096 unless said otherwise).
    #[arg(
        long, value_name = "N", env = "MIXSOCKS_PAYLOAD_BYTES",
        value_parser = clap::value_parser!(u32).range(1024..=32768)
    )]
    pub(crate) payload_bytes: Option<u32>,
    #[command(flatten)]
    pub(crate) timing: TimingArgs,
}

/// How packets leave.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TimingArgs {
    /// How sending is timed: "fast" sends when there is something to send.
    #[arg(
        long, value_name = "PROFILE", env = "MIXSOCKS_PROFILE", default_value = "fast",
        value_parser = Profile::parse
    )]
    pub(crate) profile: Profile,
}

/// Options of `mixsocks up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) listen: ListenArgs,
    #[command(flatten)]
    pub(crate) websocket: WebsocketArgs,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    /// Where keys and registrations are kept, so that addresses stay the same (else in the
    /// data directory of the platform).
    #[arg(long, value_name = "DIR", env = "MIXSOCKS_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) exit: ExitArgs,
}

/// Options of `mixsocks client`.
#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    /// The provider to use: a name from the topology, or an address. Of several, each serves while those
    /// before it are silent; without any, two by chance of those that the network advertises.
    #[arg(
        long, value_name = "NAME|ADDRESS", env = "MIXSOCKS_PROVIDER", action = ArgAction::Append,
        value_delimiter = ',', value_parser = ProviderChoice::parse
    )]
    pub(crate) provider: Vec<ProviderChoice>,
    /// File with the access token that a private provider's operator gave.
    #[arg(long, value_name = "FILE", env = "MIXSOCKS_ACCESS_TOKEN_FILE")]
    pub(crate) access_token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) listen: ListenArgs,
    #[command(flatten)]
    pub(crate) websocket: WebsocketArgs,
    #[command(flatten)]
    pub(crate) timing: TimingArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// How the client times its sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Sends when there is something to send: mixing only.
    Fast,
}

impl Profile {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "fast" => Ok(Self::Fast),
            _ => Err("this version has only the profile \"fast\"".to_owned()),
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fast => f.write_str("fast"),
        }
    }
}

/// User name and password of the proxy (RFC 1929): 1 to 255 bytes each.
#[derive(Clone)]
pub(crate) struct Credentials {
    user: String,
    password: String,
}

impl Credentials {
    fn parse(text: &str) -> Result<Self, String> {
        let (user, password) = text.split_once(':').ok_or("expected USER:PASSWORD")?;
        socks::Credentials::new(user, password).map_err(|error| error.to_string())?;
        Ok(Self { user: user.to_owned(), password: password.to_owned() })
    }
}

impl From<Credentials> for socks::Credentials {
    fn from(credentials: Credentials) -> Self {
        Self::new(&credentials.user, &credentials.password).expect("checked by Credentials::parse")
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// How the user names a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProviderChoice {
    /// A name that the topology advertises.
    Name(String),
    /// An address, advertised or not.
    Address(Address),
}

impl ProviderChoice {
    /// What holds an `@` or a `.` was meant as an address.
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains(['@', '.']) {
            let address = text.parse().map_err(|error| format!("{error}"))?;
            return Ok(Self::Address(address));
        }
        Ok(Self::Name(text.to_owned()))
    }
}

fn parse_socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        "expected an IP address and a port, such as 127.0.0.1:1080 or [::1]:1080".to_owned()
    })
}

fn parse_mean_delay(text: &str) -> Result<Duration, String> {
    let delay = humantime::parse_duration(text)
        .map_err(|_| "expected a number and a unit, such as 15ms or 0.1s".to_owned())?;
    if delay > MAX_DELAY {
        return Err(format!(
            "the mixes hold no packet longer than {}",
            humantime::format_duration(MAX_DELAY)
        ));
    }
    Ok(delay)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mean_delays() {
        assert_eq!(parse_mean_delay("15ms"), Ok(Duration::from_millis(15)));
        assert_eq!(parse_mean_delay("0"), Ok(Duration::ZERO));
        assert_eq!(parse_mean_delay("0ms"), Ok(Duration::ZERO));
        assert_eq!(parse_mean_delay("10s"), Ok(MAX_DELAY));
        assert!(parse_mean_delay("10001ms").unwrap_err().contains("longer than 10s"));
        for wrong in ["", "15", "-1ms", "ms", "fast"] {
            assert!(parse_mean_delay(wrong).unwrap_err().contains("such as 15ms"), "{wrong}");
        }
    }

    #[test]
    fn credentials_are_split_at_the_first_colon_and_never_shown() {
        let credentials = Credentials::parse("alice:se:cret").unwrap();
        assert_eq!((&*credentials.user, &*credentials.password), ("alice", "se:cret"));
        assert_eq!(format!("{credentials:?}"), "Credentials");
        for wrong in ["alice", ":x", "x:", &format!("x:{}", "y".repeat(256))] {
            assert!(Credentials::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_provider_is_a_name_or_an_address() {
        assert_eq!(ProviderChoice::parse("exit"), Ok(ProviderChoice::Name("exit".to_owned())));
        for wrong in ["abc@def", "abc.def", "a.b@c"] {
            assert!(ProviderChoice::parse(wrong).is_err(), "{wrong}");
        }
    }
}
