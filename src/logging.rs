//! Logs on stderr.
//!
//! A default log holds no destination and no client address: below WARN nothing is shown unless
//! asked for, and what could name a destination is logged at DEBUG or below. Other crates' logs
//! don't keep to that rule, so they are cut at WARN, with two exceptions: `fast_socks5` logs
//! passwords and targets and is always off, `hickory` warns with names in the text and is off unless
//! destinations are asked for with `-vv`.
//!
//! When a network in this process is taken down, its parts miss each other in whatever order they
//! go: each of them sends to the next, in a circle. By default nothing is said about that.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

use mixsocks_client::socks::QUIET_LOG_TARGET;
use mixsocks_provider::resolver::QUIET_LOG_TARGETS;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, Targets, dynamic_filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Verbosity;

/// Sends the logs of this process to stderr.
///
/// # Panics
/// When called twice.
pub(crate) fn start(verbosity: Verbosity) {
    let parting = move |metadata: &Metadata<'_>| {
        verbosity.verbose == 0
            && IS_PARTING.load(Ordering::Acquire)
            && is_about_parting(metadata.level(), metadata.target())
    };
    let is_news = dynamic_filter_fn(move |metadata, _| !parting(metadata))
        .with_max_level_hint(LevelFilter::TRACE);
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(verbosity.verbose > 0)
        .with_filter(filter(verbosity).and(is_news));
    tracing_subscriber::registry().with(layer).init();
}

/// Whether parts of a network in this process are going.
static IS_PARTING: AtomicBool = AtomicBool::new(false);

/// A network in this process is whole. To be dropped before the first of its parts goes; another
/// network is not started afterwards.
#[derive(Debug)]
pub(crate) struct Intact(());

impl Intact {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Drop for Intact {
    fn drop(&mut self) {
        IS_PARTING.store(true, Ordering::Release);
    }
}

/// What a part may say when another one has gone.
fn is_about_parting(level: &Level, target: &str) -> bool {
    *level > Level::ERROR
        && ["mixsocks_node", "mixsocks_client"].iter().any(|part| target.starts_with(part))
}

fn filter(verbosity: Verbosity) -> Targets {
    let own = match verbosity {
        Verbosity { quiet: true, .. } => LevelFilter::ERROR,
        Verbosity { verbose: 0, .. } => LevelFilter::WARN,
        Verbosity { verbose: 1, .. } => LevelFilter::INFO,
        Verbosity { verbose: 2, .. } => LevelFilter::DEBUG,
        Verbosity { .. } => LevelFilter::TRACE,
    };
    let names = if own >= LevelFilter::DEBUG { LevelFilter::WARN } else { LevelFilter::OFF };
    // A target also stands for every target that it is the beginning of.
    let names = QUIET_LOG_TARGETS.map(|target| (target, names));
    Targets::new()
        .with_default(own.min(LevelFilter::WARN))
        .with_target("mixsocks", own)
        .with_targets(names)
        .with_target(QUIET_LOG_TARGET, LevelFilter::OFF)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert!(!filter.would_enable("hickory_proto", &Level::ERROR));
            assert!(!filter.would_enable("mixsocks_provider::dial", &Level::DEBUG));
        }
        assert!(at(2, false).would_enable("mixsocks_provider::dial", &Level::DEBUG));
        assert!(at(2, false).would_enable("hickory_net::udp", &Level::WARN));
    }

    #[test]
    fn only_what_parts_say_about_each_other_is_no_news_while_they_go() {
        assert!(is_about_parting(&Level::WARN, "mixsocks_node::link::pool"));
        assert!(is_about_parting(&Level::WARN, "mixsocks_client::gateway::session"));
        assert!(!is_about_parting(&Level::ERROR, "mixsocks_node::link::pool"));
        assert!(!is_about_parting(&Level::WARN, "mixsocks_provider::provider"));
        assert!(!is_about_parting(&Level::WARN, "mixsocks::client"));
        assert!(!is_about_parting(&Level::WARN, "rustls"));
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
