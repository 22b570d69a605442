//! `mixsocks`: a local SOCKS5 proxy whose traffic goes through a mixnet.
//!
//! [`cli`] is the command line; [`up`], [`client`] and [`bench`](mod@bench) are its commands.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

mod access_tokens;
mod bench;
mod cli;
mod client;
mod config;
mod data_dir;
mod directory;
mod impairment;
mod invitations;
mod logging;
mod membership;
mod messages;
mod nearest;
mod network;
mod node;
mod open_files;
mod provider;
mod proxy;
mod service;
mod show;
mod signals;
mod topology_file;
mod up;
mod usage_error;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Context;
use mixsocks_sphinx::Backend;

use crate::cli::{Cli, CliError, ClientCommand, Command, ConfigCommand, NetworkCommand};

/// What still runs after a command has ended, such as a name look-up, is left behind after this.
const LEFT_BEHIND_AFTER: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let cli = match Cli::from_words(std::env::args_os()) {
        Ok(cli) => cli,
        Err(CliError::Words(error)) if !error.use_stderr() || is_bare(&words) => error.exit(),
        Err(CliError::Words(error)) => {
            complain(&usage_error::describe(&error, &words));
            return ExitCode::from(usage_error::EXIT_CODE);
        }
        Err(CliError::Config(error)) => {
            complain(&describe(&error));
            return ExitCode::from(usage_error::EXIT_CODE);
        }
    };
    logging::start(cli.verbosity);
    match run(cli).and_then(|()| all_said()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// Whether a command was named without anything else, which asks for its help.
fn is_bare(words: &[String]) -> bool {
    matches!(words, [_])
        || matches!(words, [_, word] if ["client", "directory", "node", "provider", "network", "config"].contains(&&**word))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    for backend in Backend::faulty() {
        tracing::warn!(
            "{backend} code computes wrongly on this machine and is not used: packets take longer"
        );
    }
    Backend::from_environment().context(Backend::VARIABLE)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let quiet = cli.verbosity.quiet;
    let result = runtime.block_on(async move {
        match cli.command {
            Command::Up(args) => Box::pin(up::run(args, quiet)).await,
            Command::Client(ClientCommand::Init(args)) => client::init(&args, &cli.config),
            Command::Client(ClientCommand::Run(args)) => Box::pin(client::run(args, quiet)).await,
            Command::Directory(command) => {
                Box::pin(directory::run(command, &cli.config, quiet)).await
            }
            Command::Node(command) => Box::pin(node::run(command, &cli.config, quiet)).await,
            Command::Provider(command) => {
                Box::pin(provider::run(command, &cli.config, quiet)).await
            }
            Command::Send(args) => Box::pin(messages::send(args, quiet)).await,
            Command::Receive(args) => Box::pin(messages::receive(args)).await,
            Command::Address(args) => Box::pin(messages::address(args)).await,
            Command::Providers(args) => show::providers(&args).await,
            Command::Network(NetworkCommand::Status(args)) => show::status(&args).await,
            Command::Config(ConfigCommand::Check { file }) => {
                cli::check_config(&file)?;
                say(&format!("{} is right", file.display()));
                Ok(())
            }
            Command::Bench(args) => Box::pin(bench::run(args)).await,
        }
    });
    runtime.shutdown_timeout(LEFT_BEHIND_AFTER);
    result
}

/// The error, its causes and what helps in one line. A cause that the line already quotes is not
/// repeated.
fn describe(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        let kind = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        matches!(kind, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    };
    if error.chain().any(is_full) {
        line.push_str("; free some space, or choose another place with --data-dir");
    }
    line
}

/// Writes an error to stderr; a stderr that is closed is no reason to panic.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "error: {line}");
}

/// Why something could not be said. What a command says must not stop it before it has done its work.
static UNSAID: OnceLock<std::io::Error> = OnceLock::new();

/// Writes text to stdout. [`all_said`] tells whether that failed.
fn say(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        // The first one counts.
        let _ = UNSAID.set(error);
    }
}

/// # Errors
/// When something could not be said, other than to a reader who has gone: nobody misses it.
fn all_said() -> anyhow::Result<()> {
    match UNSAID.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            // Not as a cause: what helps where files are kept does not help here.
            anyhow::bail!("cannot write to the standard output: {error}")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn an_error_is_one_line_and_says_everything_once() {
        let error = Err::<(), _>(std::io::Error::other("disk is on fire"))
            .context("cannot read x: disk is on fire")
            .context("the client does not start")
            .unwrap_err();
        assert_eq!(describe(&error), "the client does not start: cannot read x: disk is on fire");
    }

    #[test]
    fn a_full_disk_is_explained_once_wherever_it_shows() {
        const HELP: &str = "; free some space, or choose another place with --data-dir";
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
            let full = std::io::Error::new(kind, "no room");
            let error = data_dir::explain(&full, "data/x".as_ref());
            assert_eq!(describe(&error), format!("there is no space left for data/x{HELP}"));
            // A part that stores something by itself.
            let error = anyhow::Error::new(full).context("the token cannot be stored");
            assert_eq!(describe(&error), format!("the token cannot be stored: no room{HELP}"));
        }
    }
}
