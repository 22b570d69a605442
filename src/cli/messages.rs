//! The options of messages: those of the websocket API, and of the commands that send and receive.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, ArgMatches, Args};
use mixsocks_client::websocket::Token;
use mixsocks_common::address::Address;

use super::{FileArgs, NetworkArgs, parse_socket_address};

/// Where programs reach the websocket API, and who may.
#[derive(Clone, Debug, Args)]
pub(crate) struct WebsocketArgs {
    /// Where programs send and receive messages over a websocket, such as 127.0.0.1:1977 (else
    /// nowhere).
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_WEBSOCKET",
        value_parser = parse_socket_address
    )]
    pub(crate) websocket: Option<SocketAddr>,
    /// Origin of pages in browsers that may connect there, such as http://localhost:8000; may be given
    /// several times.
    #[arg(
        long, value_name = "ORIGIN", env = "MIXSOCKS_WEBSOCKET_ORIGIN", action = ArgAction::Append,
        value_delimiter = ',', value_parser = parse_origin
    )]
    pub(crate) websocket_origin: Vec<String>,
    /// Further name by which programs call this machine there; may be given several times.
    #[arg(
        long, value_name = "NAME", env = "MIXSOCKS_WEBSOCKET_HOST", action = ArgAction::Append,
        value_delimiter = ',', value_parser = parse_host
    )]
    pub(crate) websocket_host: Vec<String>,
    #[command(flatten)]
    pub(crate) token: WebsocketTokenArgs,
}

/// What opens the websocket API.
#[derive(Clone, Debug, Args)]
pub(crate) struct WebsocketTokenArgs {
    /// Token that programs must show there: 16 to 128 letters, digits, -, ., _ or ~ (other local users
    /// see it in the process list; the variable is not shown there).
    #[arg(
        long, value_name = "TOKEN", env = "MIXSOCKS_WEBSOCKET_TOKEN", hide_env_values = true,
        value_parser = TokenText::parse
    )]
    pub(crate) websocket_token: Option<TokenText>,
}

/// The text of a token, which is not shown.
#[derive(Clone)]
pub(crate) struct TokenText(String);

impl TokenText {
    fn parse(text: &str) -> Result<Self, String> {
        Token::new(text).map_err(|error| error.to_string())?;
        Ok(Self(text.to_owned()))
    }

    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&TokenText> for Token {
    fn from(text: &TokenText) -> Self {
        Self::new(&text.0).expect("checked by TokenText::parse")
    }
}

impl std::fmt::Debug for TokenText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenText(secret)")
    }
}

/// By which client messages are sent and received.
#[derive(Debug, Args)]
pub(crate) struct ByArgs {
    #[command(flatten)]
    pub(crate) file: FileArgs,
    /// Where a running client or network listens that was started with --websocket. Without it, or when
    /// nobody listens there, the command is a client itself, with the keys of the data directory.
    #[arg(
        long, value_name = "ADDR:PORT", env = "MIXSOCKS_WEBSOCKET",
        value_parser = parse_socket_address
    )]
    pub(crate) websocket: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) token: WebsocketTokenArgs,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    /// Where the client's keys are kept (else in the data directory of the platform).
    #[arg(long, value_name = "DIR", env = "MIXSOCKS_DATA_DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

/// Options of `mixsocks send`.
#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    /// The recipient's address, as `mixsocks address` prints it there.
    #[arg(value_name = "ADDRESS", value_parser = parse_address)]
    pub(crate) recipient: Address,
    /// File that holds the message, of 1 byte to 16 MiB; - is the standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    pub(crate) message: PathBuf,
    #[command(flatten)]
    pub(crate) by: ByArgs,
}

/// Options of `mixsocks receive`.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Wait for further messages until Ctrl-C, instead of ending when nothing has come for a while.
    #[arg(long)]
    pub(crate) follow: bool,
    /// For how long nothing has come when the command ends.
    #[arg(
        long, value_name = "DURATION", default_value = "3s", conflicts_with = "follow",
        value_parser = parse_wait
    )]
    pub(crate) wait: Duration,
    /// Print each message as a line of JSON: its text or, if it is none, its bytes in base64, and the
    /// senderTag, if it can be answered.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the bytes of messages as they are, and nothing between them. Without this and --json a line
    /// ends each, so that a message can look like several.
    #[arg(long, conflicts_with = "json")]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) by: ByArgs,
}

/// Options of `mixsocks address`.
#[derive(Debug, Args)]
pub(crate) struct AddressArgs {
    /// Also draw it as a QR code.
    #[arg(long)]
    pub(crate) qr: bool,
    #[command(flatten)]
    pub(crate) by: ByArgs,
}

/// Options of a websocket port are of no use without one. Not `requires` of clap: that sees no values of
/// files.
///
/// # Errors
/// What clap would say.
pub(super) fn check_websocket(options: &ArgMatches) -> Result<(), clap::Error> {
    // Some commands have none of them.
    let has = |id| options.try_contains_id(id).unwrap_or(false);
    let of_port = ["websocket_origin", "websocket_host", "websocket_token"];
    match of_port.into_iter().find(|id| has(id)) {
        Some(id) if !has("websocket") => {
            let name = format!("--{}", id.replace('_', "-"));
            let mut error = clap::Error::new(ErrorKind::MissingRequiredArgument);
            let missing = ContextValue::Strings(vec!["--websocket".to_owned()]);
            error.insert(ContextKind::InvalidArg, missing);
            error.insert(ContextKind::PriorArg, ContextValue::String(name));
            Err(error)
        }
        _ => Ok(()),
    }
}

/// An origin as browsers send it (RFC 6454, section 6): another text would fit none.
fn parse_origin(text: &str) -> Result<String, String> {
    let is_origin = |(scheme, host): (&str, &str)| {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-._:[]".contains(letter);
        let is_scheme = |letter: char| letter.is_ascii_alphanumeric() || "+-.".contains(letter);
        [scheme, host].iter().all(|part| !part.is_empty())
            && scheme.chars().all(is_scheme)
            && host.chars().all(is_plain)
    };
    if text == "null" || text.split_once("://").is_some_and(is_origin) {
        return Ok(text.to_owned());
    }
    Err("expected a scheme, a host and a port if it is not the usual one, such as \
         http://localhost:8000, and nothing behind them"
        .to_owned())
}

fn parse_host(text: &str) -> Result<String, String> {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || "-.".contains(letter);
    if !text.is_empty() && text.chars().all(is_name) {
        return Ok(text.to_owned());
    }
    Err("expected a name without a port, such as box.example".to_owned())
}

fn parse_address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|error| format!("{error}"))
}

fn parse_wait(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "expected a number and a unit, such as 3s or 1m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_what_browsers_send() {
        for right in ["http://localhost:8000", "https://a.example", "null", "http://[::1]:80"] {
            assert_eq!(parse_origin(right).as_deref(), Ok(right));
        }
        for wrong in ["", "localhost:8000", "http://", "http://a.example/", "://a", "http://a b"] {
            assert!(parse_origin(wrong).unwrap_err().contains("such as http"), "{wrong}");
        }
        assert_eq!(parse_host("box.example").as_deref(), Ok("box.example"));
        for wrong in ["", "box.example:80", "a b", "a/b"] {
            assert!(parse_host(wrong).unwrap_err().contains("such as box"), "{wrong}");
        }
    }

    #[test]
    fn tokens_are_checked_and_never_shown() {
        let token = TokenText::parse("0123456789abcdef").unwrap();
        assert_eq!(token.as_str(), "0123456789abcdef");
        assert!(!format!("{token:?}").contains("0123"));
        for wrong in ["", "short", "0123456789abcde&"] {
            assert!(TokenText::parse(wrong).unwrap_err().contains("16 to 128"), "{wrong}");
        }
    }
}
