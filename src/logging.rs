//! Logs on stderr.
//!
//! A default log holds no destination and no client address: below WARN nothing is shown unless
//! asked for, and what could name a destination is logged at DEBUG or below. Other crates' logs
//! don't keep to that rule, so they are cut at WARN, with two exceptions: `fast_socks5` logs
//! passwords and targets and is always off, `hickory` warns with names in the text and is off unless
//! destinations are asked for with `-vv`.

use std::io::IsTerminal;

use mixsocks_client::socks::QUIET_LOG_TARGET;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Verbosity;

/// Sends the logs of this process to stderr.
///
/// # Panics
/// When called twice.
pub(crate) fn start(verbosity: Verbosity) {
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(verbosity.verbose > 0)
        .with_filter(filter(verbosity));
    tracing_subscriber::registry().with(layer).init();
}

fn filter(verbosity: Verbosity) -> Targets {
    let own = match verbosity {
        Verbosity { quiet: true, .. } => LevelFilter::ERROR,
        Verbosity { verbose: 0, .. } => LevelFilter::WARN,
        Verbosity { verbose: 1, .. } => LevelFilter::INFO,
        Verbosity { verbose: 2, .. } => LevelFilter::DEBUG,
        Verbosity { .. } => LevelFilter::TRACE,
    };
    let hickory = if own >= LevelFilter::DEBUG { LevelFilter::WARN } else { LevelFilter::OFF };
    // A target also stands for every target that it is the beginning of.
    Targets::new()
        .with_default(own.min(LevelFilter::WARN))
        .with_target("mixsocks", own)
        .with_target("hickory", hickory)
        .with_target(QUIET_LOG_TARGET, LevelFilter::OFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    fn at(verbose: u8, quiet: bool) -> Targets {
        filter(Verbosity { verbose, quiet })
    }

    #[test]
    fn passwords_are_never_logged() {
        for verbose in 0..=4 {
            assert!(!at(verbose, false).would_enable("fast_socks5::server", &Level::ERROR));
        }
    }

    #[test]
    fn names_are_logged_only_when_asked_for() {
        for (verbose, quiet) in [(0, true), (0, false), (1, false)] {
            let filter = at(verbose, quiet);
            assert!(!filter.would_enable("hickory_resolver", &Level::ERROR));
            assert!(!filter.would_enable("hickory_net::udp", &Level::ERROR));
            assert!(!filter.would_enable("mixsocks_provider::dial", &Level::DEBUG));
        }
        assert!(at(2, false).would_enable("mixsocks_provider::dial", &Level::DEBUG));
    }

    #[test]
    fn other_crates_are_cut_at_warn() {
        assert!(!at(4, false).would_enable("tungstenite", &Level::INFO));
        assert!(at(0, false).would_enable("rustls", &Level::WARN));
        assert!(!at(0, true).would_enable("rustls", &Level::WARN));
        assert!(at(4, false).would_enable("mixsocks_node::mix", &Level::TRACE));
        assert!(!at(0, false).would_enable("mixsocks_node::mix", &Level::INFO));
    }
}
