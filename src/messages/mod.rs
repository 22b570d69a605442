//! `mixsocks send`, `receive` and `address`: messages from the terminal.
//!
//! Each works through the websocket of a client that runs ([`program`]), or as a client itself ([`own`]).

mod own;
mod program;
mod show;

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use mixsocks_client::messages::Messenger;
use mixsocks_common::address::Address;
use mixsocks_common::message::{MAX_MESSAGE_BYTES, ReceivedId, SenderTag};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use self::own::Own;
use self::program::Program;
use crate::cli::{AddressArgs, ByArgs, ReceiveArgs, SendArgs};
use crate::data_dir::DataDir;
use crate::proxy;
use crate::signals::Signals;

/// After a signal, how long the message that is just being printed may take.
const PRINT_TIME: Duration = Duration::from_secs(1);

/// What came.
struct Incoming {
    message: Vec<u8>,
    /// Of a sender who can be answered.
    sender_tag: Option<SenderTag>,
    /// What has to be confirmed; nothing when that was done already.
    received: Option<ReceivedId>,
}

/// The client that sends and receives.
enum By {
    Own(Own),
    Program(Box<Program>),
}

impl By {
    /// The running client if one listens, and else this process.
    async fn connect(args: &ByArgs, receives: bool) -> Result<Self> {
        let Some(address) = args.websocket else {
            return Own::connect(args, receives).await.map(Self::Own);
        };
        let token = args.token.websocket_token.as_ref();
        match Program::connect(address, token, receives).await {
            Ok(program) => Ok(Self::Program(Box::new(program))),
            Err(program::ConnectError::Refused) if knows_network(args) => {
                Own::connect(args, receives).await.map(Self::Own)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn address(&self) -> Address {
        match self {
            Self::Own(own) => own.address(),
            Self::Program(program) => program.address(),
        }
    }

    /// Sends a message, and waits until it is delivered.
    async fn send(&mut self, recipient: Address, message: Vec<u8>) -> Result<()> {
        match self {
            Self::Own(own) => own.send(recipient, message).await,
            Self::Program(program) => program.send(recipient, &message).await,
        }
    }

    /// Waits for a message. Nothing is lost when the future is dropped.
    async fn receive(&mut self) -> Result<Incoming> {
        match self {
            Self::Own(own) => own.receive().await,
            Self::Program(program) => program.receive().await,
        }
    }

    /// Tells how many parts of messages have come; a running client does not.
    fn parts(&self) -> impl Fn() -> u64 + use<> {
        let messenger = match self {
            Self::Own(own) => Some(own.messenger()),
            Self::Program(_) => None,
        };
        move || messenger.as_ref().map_or(0, Messenger::deliveries)
    }

    /// The message was printed.
    async fn taken(&mut self, received: Option<ReceivedId>) -> Result<()> {
        match self {
            Self::Own(own) => received.into_iter().for_each(|received| own.taken(received)),
            Self::Program(program) => program.taken().await?,
        }
        Ok(())
    }

    async fn shutdown(self) {
        match self {
            Self::Own(own) => own.shutdown().await,
            Self::Program(program) => program.close().await,
        }
    }
}

fn knows_network(args: &ByArgs) -> bool {
    args.network.topology.is_some() || !args.network.directory.is_empty()
}

/// Sends a message.
pub(crate) async fn send(args: SendArgs, quiet: bool) -> Result<()> {
    let message = read_message(&args.message)?;
    let mut by = By::connect(&args.by, false).await?;
    let sent = by.send(args.recipient, message).await;
    by.shutdown().await;
    sent?;
    if !quiet {
        crate::say("delivered: its gateway keeps it for the recipient");
    }
    Ok(())
}

fn read_message(path: &Path) -> Result<Vec<u8>> {
    let is_stdin = path == Path::new("-");
    let name = if is_stdin { "the standard input".into() } else { path.display().to_string() };
    let mut message = Vec::new();
    let limit = u64::try_from(MAX_MESSAGE_BYTES).unwrap_or(u64::MAX) + 1;
    let read = if is_stdin {
        io::stdin().lock().take(limit).read_to_end(&mut message)
    } else {
        File::open(path).and_then(|file| file.take(limit).read_to_end(&mut message))
    };
    read.map_err(|error| anyhow!("cannot read {name}: {error}"))?;
    ensure!(!message.is_empty(), "{name} is empty, and an empty message cannot be sent");
    ensure!(
        message.len() <= MAX_MESSAGE_BYTES,
        "{name} is longer than 16 MiB, the longest message; send it in parts, as `split` makes them"
    );
    Ok(message)
}

/// Prints what comes. A message is let go once it was printed.
pub(crate) async fn receive(args: ReceiveArgs) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut by = tokio::select! {
        by = Box::pin(By::connect(&args.by, true)) => by?,
        () = signals.next() => return Ok(()),
    };
    let received = print_all(&mut by, &args, &mut signals).await;
    by.shutdown().await;
    received
}

/// Prints messages until nothing has come for a while, or a signal comes.
async fn print_all(by: &mut By, args: &ReceiveArgs, signals: &mut Signals) -> Result<()> {
    let wait = if args.follow { Duration::MAX } else { args.wait };
    let form = Form::of(args);
    let parts = by.parts();
    loop {
        let incoming = tokio::select! {
            incoming = unless_quiet(wait, &parts, by.receive()) => incoming,
            () = signals.next() => return Ok(()),
        };
        let Some(incoming) = incoming else { return Ok(()) };
        let incoming = incoming?;
        let received = incoming.received;
        let mut printing = spawn_blocking(move || print(form, &incoming));
        let printed = tokio::select! {
            printed = &mut printing => printed,
            // Whoever reads the output may take it slowly, or not at all.
            () = signals.next() => match timeout(PRINT_TIME, printing).await {
                Ok(printed) => printed,
                Err(_) => return Ok(()),
            },
        };
        // Not as a cause: what helps where files are kept does not help here.
        printed?.map_err(|error| {
            anyhow!("a message cannot be printed, and waits for the next start: {error}")
        })?;
        by.taken(received).await?;
    }
}

/// What is coming, or `None` when neither it nor a part of it has come for so long.
async fn unless_quiet<T>(
    wait: Duration,
    parts: impl Fn() -> u64,
    coming: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(coming);
    let mut seen = parts();
    loop {
        if let Ok(come) = timeout(wait, &mut coming).await {
            return Some(come);
        }
        let before = std::mem::replace(&mut seen, parts());
        if seen == before {
            return None;
        }
    }
}

/// How messages are printed.
#[derive(Debug, Clone, Copy)]
enum Form {
    Json,
    Raw,
    Lines,
}

impl Form {
    fn of(args: &ReceiveArgs) -> Self {
        match (args.json, args.raw) {
            (true, _) => Self::Json,
            (_, true) => Self::Raw,
            _ => Self::Lines,
        }
    }
}

fn print(form: Form, incoming: &Incoming) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let message = &incoming.message;
    match form {
        Form::Json => writeln!(stdout, "{}", show::json(incoming))?,
        Form::Lines if stdout.is_terminal() => {
            writeln!(stdout, "{}", show::for_terminal(message))?;
        }
        Form::Lines if !message.ends_with(b"\n") => {
            stdout.write_all(message)?;
            stdout.write_all(b"\n")?;
        }
        Form::Raw | Form::Lines => stdout.write_all(message)?,
    }
    stdout.flush()
}

/// Prints the address of the client.
pub(crate) async fn address(args: AddressArgs) -> Result<()> {
    let address = match (args.by.websocket, own_address(&args.by)?) {
        (None, Some(address)) => address,
        _ => {
            let by = By::connect(&args.by, false).await?;
            let address = by.address();
            by.shutdown().await;
            address
        }
    };
    crate::say(&address.to_string());
    if args.qr {
        crate::say(&show::qr_code(&address)?);
    }
    Ok(())
}

/// The address of the client whose data directory it is, if it has registered with a gateway. Another
/// process may use the directory.
fn own_address(args: &ByArgs) -> Result<Option<Address>> {
    let path = match &args.data_dir {
        Some(path) => path.clone(),
        None => DataDir::default_path("client")?,
    };
    proxy::address_in(&path)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_long_message_on_a_slow_line_is_waited_for_and_silence_is_not() {
        const WAIT: Duration = Duration::from_secs(3);
        let (start, parts) = (Instant::now(), Cell::new(0));
        let coming = async {
            for _ in 0..20 {
                sleep(WAIT * 2 / 3).await;
                parts.set(parts.get() + 1);
            }
            "all of it"
        };
        assert_eq!(unless_quiet(WAIT, || parts.get(), coming).await, Some("all of it"));
        assert!(start.elapsed() > 10 * WAIT);
        let silence = std::future::pending::<()>();
        assert_eq!(unless_quiet(WAIT, || parts.get(), silence).await, None);
    }
}
