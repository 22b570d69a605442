//! The options of `mixsocks bench`.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::{TrafficArgs, parse_socket_address};

/// A longer measurement tells nothing more.
const MAX_SECONDS: u64 = 600;

/// A soak of more than a week is none of this program's.
const MAX_SOAK_MINUTES: u64 = 7 * 24 * 60;

/// Packets of a measurement: the most take up 240 MB.
const PACKETS: RangeInclusive<usize> = 100..=100_000;

/// Options of `mixsocks bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,
    /// Measure this proxy (its provider must reach this machine's loopback addresses) instead of a
    /// network that is started for the measurement.
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_socket_address)]
    pub(crate) socks: Option<SocketAddr>,
    /// Processes behind that proxy, whose CPU time and memory are measured as well.
    #[arg(long, value_name = "PID,…", requires = "socks", value_delimiter = ',')]
    pub(crate) pids: Vec<u32>,
    /// Start each role as a process of its own, instead of all in one (needs loopback addresses other
    /// than 127.0.0.1, which Linux has).
    #[arg(long, conflicts_with = "socks")]
    pub(crate) processes: bool,
    /// Measure an optimistic listener, which says at once that a stream is open.
    #[arg(long, conflicts_with_all = ["socks", "processes"])]
    pub(crate) optimistic: bool,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    /// How long each transfer runs.
    #[arg(
        long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS)
    )]
    pub(crate) seconds: u64,
    /// Measure these rows only.
    #[arg(long, value_name = "ROW,…", value_delimiter = ',')]
    pub(crate) only: Vec<Row>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `mixsocks bench` measures, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Row {
    /// Time to first byte of tiny requests.
    FirstByte,
    /// One stream down.
    Down,
    /// One stream up.
    Up,
    /// Ten streams down.
    TenDown,
    /// Ten streams up.
    TenUp,
    /// Time to first byte while a bulk download runs.
    BusyFirstByte,
    /// 50 objects of 20 KiB over 6 connections.
    Page,
    /// 200 connections at once, 10 KiB each.
    Connections,
    /// 1,000 streams opened at once, 10 KiB each.
    Streams,
    /// CPU when nothing is asked of the network.
    Idle,
}

/// What `mixsocks bench` measures other than a proxy.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure what Sphinx packets cost, beside the crate sphinx-packet.
    Sphinx(BenchSphinxArgs),
    /// Measure packets through a mix and its links, beside a mix with the crate sphinx-packet.
    Mix(BenchMixArgs),
    /// Measure messages through one gateway of a network that is started for the measurement.
    Messages(BenchMessagesArgs),
    /// Put a network of processes under mixed traffic and random faults, and see whether it stays
    /// whole.
    Soak(BenchSoakArgs),
    /// The process of a mix that `bench mix` starts.
    #[command(hide = true)]
    MixProcess,
}

/// Options of `mixsocks bench mix`.
#[derive(Debug, Args)]
pub(crate) struct BenchMixArgs {
    /// Packets of each measurement; there are three of each mix.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = parse_packets)]
    pub(crate) packets: usize,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `mixsocks bench messages`.
#[derive(Debug, Args)]
pub(crate) struct BenchMessagesArgs {
    /// How long messages are sent, few first and then as many as can be.
    #[arg(
        long, value_name = "N", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS)
    )]
    pub(crate) seconds: u64,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `mixsocks bench sphinx`.
#[derive(Debug, Args)]
pub(crate) struct BenchSphinxArgs {
    /// How long all of it takes, about.
    #[arg(
        long, value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u64).range(1..=MAX_SECONDS)
    )]
    pub(crate) seconds: u64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `mixsocks bench soak`.
#[derive(Debug, Args)]
pub(crate) struct BenchSoakArgs {
    /// How long traffic and faults go on (60 unless said otherwise); then what is under way is
    /// waited for.
    #[arg(
        long, value_name = "N", conflicts_with = "seconds",
        value_parser = clap::value_parser!(u64).range(1..=MAX_SOAK_MINUTES)
    )]
    minutes: Option<u64>,
    /// The same in seconds.
    #[arg(
        long, value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=MAX_SOAK_MINUTES * 60)
    )]
    seconds: Option<u64>,
    /// Number from which faults and traffic are drawn (a random one, which is printed).
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

impl BenchSoakArgs {
    /// How long traffic and faults go on.
    pub(crate) fn duration(&self) -> Duration {
        let minutes = self.minutes.unwrap_or(60);
        Duration::from_secs(self.seconds.unwrap_or(minutes * 60))
    }
}

fn parse_packets(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|packets| PACKETS.contains(packets))
        .ok_or_else(|| format!("expected a number from {} to {}", PACKETS.start(), PACKETS.end()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::super::{Cli, CliError, Command};
    use super::*;

    fn parse(words: &[&str]) -> Result<BenchArgs, CliError> {
        let words = ["mixsocks", "bench"].iter().chain(words).map(OsString::from);
        match Cli::from_words(words)?.command {
            Command::Bench(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bench_measures_packets_or_a_proxy() {
        assert!(parse(&["--seconds", "2"]).unwrap().command.is_none());
        let Some(BenchCommand::Sphinx(args)) = parse(&["sphinx", "--json"]).unwrap().command else {
            panic!("no subcommand");
        };
        assert_eq!((args.seconds, args.json), (8, true));
        let Some(BenchCommand::Mix(args)) = parse(&["mix", "--packets", "100"]).unwrap().command
        else {
            panic!("no subcommand");
        };
        assert_eq!((args.packets, args.json), (100, false));
        let messages = parse(&["messages", "--seconds", "3"]).unwrap().command;
        let Some(BenchCommand::Messages(args)) = messages else { panic!("no subcommand") };
        assert_eq!((args.seconds, args.json), (3, false));
        for wrong in ["0", "99", "100001", "many"] {
            assert!(parse(&["mix", "--packets", wrong]).is_err(), "{wrong}");
        }
        for wrong in [&["--json", "sphinx"][..], &["sphinx", "--seconds", "0"], &["sphinks"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn rows_are_chosen_by_name() {
        assert_eq!(parse(&[]).unwrap().only, []);
        let chosen = parse(&["--only", "page,first-byte"]).unwrap().only;
        assert_eq!(chosen, [Row::Page, Row::FirstByte]);
        assert!(parse(&["--only", "pages"]).is_err());
    }

    #[test]
    fn processes_are_started_or_named() {
        let named = parse(&["--socks", "127.0.0.1:1", "--pids", "7,8"]).unwrap();
        assert_eq!(named.pids, [7, 8]);
        assert!(parse(&["--pids", "7"]).is_err());
        assert!(parse(&["--processes"]).unwrap().processes);
        assert!(parse(&["--processes", "--socks", "127.0.0.1:1"]).is_err());
    }

    #[test]
    fn a_soak_lasts_an_hour_or_as_long_as_it_is_told() {
        let duration = |words: &[&str]| match parse(words).unwrap().command {
            Some(BenchCommand::Soak(args)) => args.duration().as_secs(),
            other => panic!("{other:?}"),
        };
        assert_eq!(duration(&["soak"]), 3600);
        assert_eq!(duration(&["soak", "--minutes", "2"]), 120);
        assert_eq!(duration(&["soak", "--seconds", "20"]), 20);
        assert!(parse(&["soak", "--seconds", "20", "--minutes", "2"]).is_err());
    }
}
