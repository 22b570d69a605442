//! Messages through the websocket of a client that runs, in binary (`docs/websocket-api.md`).

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::{SinkExt, StreamExt};
use mixsocks_client::websocket::MAX_REQUEST_BYTES;
use mixsocks_common::address::{ADDRESS_LEN, Address};
use mixsocks_common::message::{SENDER_TAG_LEN, SenderTag};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::http::{StatusCode, Uri};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::{Incoming, show};
use crate::cli::TokenText;

/// A client on this machine answers at once.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// How long an orderly end may take.
const FAREWELL_TIME: Duration = Duration::from_secs(1);

/// Requests and answers.
const SEND: u8 = 0;
const SELF_ADDRESS: u8 = 3;
const WITH_ID: u8 = 128;
const RECEIVED: u8 = 1;
const OWN_ADDRESS: u8 = 2;
const DELIVERED: u8 = 128;
const FAILED: u8 = 129;
const ERROR_WITH_ID: u8 = 130;
const TAKEN: u8 = 129;

/// The id of the only message that is sent.
const ID: [u8; 8] = [0; 8];

/// A connection to a running client.
pub(super) struct Program {
    socket: WebSocketStream<TcpStream>,
    address: Address,
    /// A message that came before the address.
    early: Option<Incoming>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// Nobody listens.
    #[error(
        "no client listens there: start one with --websocket, or name a network with --directory or \
         --topology to be one yourself"
    )]
    Refused,
    #[error("the client's websocket cannot be reached: {0}")]
    Io(io::Error),
    #[error(
        "the client asks for the token that it was started with: give it with --websocket-token"
    )]
    NoToken,
    #[error("the token is not the one that the client was started with")]
    WrongToken,
    #[error("as many programs are connected to the client as may be: close one of them")]
    Full,
    #[error("what listens there is no client: {0}")]
    Other(String),
}

impl Program {
    /// Connects, and asks for the client's address.
    pub(super) async fn connect(
        listener: SocketAddr,
        token: Option<&TokenText>,
        receives: bool,
    ) -> Result<Self, ConnectError> {
        let connecting = Self::shake_hands(reachable(listener), token, receives);
        let silent = |_| ConnectError::Other("it does not answer".to_owned());
        timeout(CONNECT_TIME, connecting).await.map_err(silent)?
    }

    async fn shake_hands(
        listener: SocketAddr,
        token: Option<&TokenText>,
        receives: bool,
    ) -> Result<Self, ConnectError> {
        let stream = TcpStream::connect(listener).await.map_err(|error| match error.kind() {
            ErrorKind::ConnectionRefused => ConnectError::Refused,
            _ => ConnectError::Io(error),
        })?;
        // What cannot be printed is not lost.
        let receive = if receives { "confirm" } else { "no" };
        let uri = Uri::builder()
            .scheme("ws")
            .authority(listener.to_string())
            .path_and_query(format!("/?receive={receive}"))
            .build()
            .map_err(|error| ConnectError::Other(error.to_string()))?;
        let mut request = ClientRequestBuilder::new(uri);
        if let Some(token) = token {
            request = request.with_header("Authorization", format!("Bearer {}", token.as_str()));
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_REQUEST_BYTES))
            .max_frame_size(Some(MAX_REQUEST_BYTES));
        let (mut socket, _) = client_async_with_config(request, stream, Some(config))
            .await
            .map_err(|error| refused(error, token.is_some()))?;
        let (address, early) = ask_address(&mut socket)
            .await
            .map_err(|error| ConnectError::Other(error.to_string()))?;
        Ok(Self { socket, address, early })
    }

    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// Sends a message, and waits for what becomes of it.
    pub(super) async fn send(&mut self, recipient: Address, message: &[u8]) -> Result<()> {
        let length = u64::try_from(message.len()).unwrap_or(u64::MAX).to_be_bytes();
        let head = [&[WITH_ID][..], &ID, &[SEND], &recipient.to_bytes(), &[0; 8], &length].concat();
        let request = [&head, message].concat();
        self.socket.send(Message::binary(request)).await.map_err(broken)?;
        let answer = next(&mut self.socket).await?;
        match answer.split_first() {
            Some((&DELIVERED, _)) => Ok(()),
            Some((&(FAILED | ERROR_WITH_ID), rest)) => {
                // An id, a number and a length.
                let text = rest.get(ID.len() + 1 + 8..).unwrap_or_default();
                bail!("{}", show::for_terminal(text))
            }
            _ => Err(strange()),
        }
    }

    /// Waits for a message. Nothing is lost when the future is dropped.
    pub(super) async fn receive(&mut self) -> Result<Incoming> {
        if let Some(early) = self.early.take() {
            return Ok(early);
        }
        let answer = next(&mut self.socket).await?;
        received(&answer).ok_or_else(strange)
    }

    /// The message is printed: the next one may come.
    pub(super) async fn taken(&mut self) -> Result<()> {
        self.socket.send(Message::binary(vec![TAKEN])).await.map_err(broken)
    }

    pub(super) async fn close(mut self) {
        // It ends either way.
        let _ = timeout(FAREWELL_TIME, self.socket.close(None)).await;
    }
}

/// A listener on all addresses is reached at the loopback one.
fn reachable(mut listener: SocketAddr) -> SocketAddr {
    match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => listener.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => listener.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    listener
}

fn refused(error: Error, has_token: bool) -> ConnectError {
    match error {
        Error::Http(response) if response.status() == StatusCode::UNAUTHORIZED => {
            if has_token {
                ConnectError::WrongToken
            } else {
                ConnectError::NoToken
            }
        }
        Error::Http(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => {
            ConnectError::Full
        }
        Error::Io(error) => ConnectError::Io(error),
        error => ConnectError::Other(error.to_string()),
    }
}

/// The address of the client, and a message that waited for longer than the client waits for requests.
async fn ask_address(
    socket: &mut WebSocketStream<TcpStream>,
) -> Result<(Address, Option<Incoming>)> {
    socket.send(Message::binary(vec![SELF_ADDRESS])).await.map_err(broken)?;
    let mut answer = next(socket).await?;
    let early = received(&answer);
    if early.is_some() {
        answer = next(socket).await?;
    }
    let bytes = answer.strip_prefix(&[OWN_ADDRESS]).and_then(|rest| rest.first_chunk());
    let bytes: &[u8; ADDRESS_LEN] = bytes.ok_or_else(strange)?;
    let address = Address::from_bytes(bytes).context("the client's address is wrong")?;
    Ok((address, early))
}

/// The next answer.
async fn next(socket: &mut WebSocketStream<TcpStream>) -> Result<Vec<u8>> {
    loop {
        match socket.next().await {
            Some(Ok(Message::Binary(bytes))) => return Ok(bytes.into()),
            Some(Ok(Message::Text(_))) => return Err(strange()),
            Some(Ok(Message::Close(_))) | None => bail!("the client has stopped"),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(broken(error)),
        }
    }
}

/// A message that came: flag, sender_tag if it is 1, length, bytes.
fn received(answer: &[u8]) -> Option<Incoming> {
    let (&flag, mut rest) = answer.strip_prefix(&[RECEIVED])?.split_first()?;
    let mut sender_tag = None;
    if flag == 1 {
        let (tag, after) = rest.split_first_chunk::<SENDER_TAG_LEN>()?;
        (sender_tag, rest) = (Some(SenderTag(*tag)), after);
    }
    let (_, message) = rest.split_first_chunk::<8>()?;
    Some(Incoming { message: message.to_vec(), sender_tag, received: None })
}

fn broken(error: Error) -> anyhow::Error {
    anyhow!("the connection to the client broke: {error}")
}

fn strange() -> anyhow::Error {
    anyhow!("the client gave an answer that is not understood: is it of another version?")
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::http::Response;

    use super::*;

    #[test]
    fn who_is_refused_is_told_what_to_do() {
        for (status, has_token, word) in [
            (StatusCode::UNAUTHORIZED, false, "give it with --websocket-token"),
            (StatusCode::UNAUTHORIZED, true, "not the one"),
            (StatusCode::SERVICE_UNAVAILABLE, true, "close one"),
            (StatusCode::NOT_FOUND, true, "no client"),
        ] {
            let response = Response::builder().status(status).body(None).unwrap();
            let text = refused(Error::Http(Box::new(response)), has_token).to_string();
            assert!(text.contains(word), "{text}");
        }
    }
}
