//! Requests of programs, as text and in binary.
//!
//! A binary request is a tag and its fields, without gaps; integers are big-endian, lengths and
//! connection ids u64. A connection id of zero is none.
//!
//! | tag | request | fields |
//! |--:|---|---|
//! | 0 | send | recipient (96 bytes), connection id, length, message |
//! | 1 | send anonymously | SURBs u32, recipient (96 bytes), connection id, length, message |
//! | 2 | reply | sender_tag (16 bytes), connection id, length, message |
//! | 3 | own address | none; further bytes are ignored |
//! | 4 | connection closed | connection id |
//! | 5 | queue of a connection | connection id |
//! | 128 | with an id | id u64, and one of the requests 0 to 2 with its tag |
//! | 129 | the message that came is taken | none |
//!
//! A text request is a JSON object with a `type`; see `docs/websocket-api.md`.

use std::fmt;

use mixsocks_common::address::{ADDRESS_LEN, Address};
use mixsocks_common::message::{SENDER_TAG_LEN, SendError, SenderTag};
use serde::Serialize;

use super::fields::{Fields, present};

/// Longest `id` of a request, in bytes.
pub const MAX_ID_BYTES: usize = 256;

/// Longest text of an error, in bytes: errors quote what programs sent.
pub const MAX_ERROR_BYTES: usize = 512;

/// Longest text of an address: three keys of at most 44 letters, a dot and an at sign.
const MAX_ADDRESS_TEXT: usize = 3 * 44 + 2;

const SEND: u8 = 0;
const SEND_ANONYMOUS: u8 = 1;
const REPLY: u8 = 2;
const SELF_ADDRESS: u8 = 3;
const CLOSED_CONNECTION: u8 = 4;
const QUEUE_LENGTH: u8 = 5;
/// Far from the tags of the existing client, which may get more.
const WITH_ID: u8 = 128;
const TAKEN: u8 = 129;

/// What a program asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// The client's own address.
    SelfAddress,
    /// A message is to be sent.
    Send(Outgoing),
    /// How many packets of a program's connection wait.
    QueueLength(u64),
    /// The program has the message that came, and may get the next one.
    Taken,
    /// A program's connection has ended. Nothing hangs on it here.
    ClosedConnection,
}

/// A message that is to be sent.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) to: Destination,
    pub(super) message: Vec<u8>,
    /// Asks for the length of this queue as an answer.
    pub(super) connection_id: Option<u64>,
    /// Asks to be told what became of the message.
    pub(super) id: Option<RequestId>,
}

/// Shows nothing of a message.
impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outgoing({} bytes, {:?}, {:?})", self.message.len(), self.connection_id, self.id)
    }
}

/// To whom a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destination {
    Recipient { recipient: Address, reply_surbs: usize },
    Sender(SenderTag),
}

/// What a program calls its request. It is given back as it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(super) enum RequestId {
    Natural(u64),
    Integer(i64),
    Text(String),
    /// Of a binary request, whose answers are binary too.
    #[serde(skip)]
    Binary(u64),
}

/// The code of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ErrorCode {
    Empty = 1,
    TooShort = 2,
    Unknown = 3,
    Malformed = 4,
    Other = 255,
}

impl ErrorCode {
    /// What stands before the text of an error in a text answer.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Empty => "received request contained no data",
            Self::TooShort => "received request did not contain enough data",
            Self::Unknown => "unknown request type",
            Self::Malformed => "malformed request",
            Self::Other => "other",
        }
    }
}

/// Why a request is not fulfilled. The program is at fault, or must wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RequestError {
    pub(super) code: ErrorCode,
    /// At most [`MAX_ERROR_BYTES`].
    pub(super) text: String,
    pub(super) id: Option<RequestId>,
}

impl RequestError {
    pub(super) fn new(code: ErrorCode, text: impl fmt::Display) -> Self {
        let mut text = text.to_string();
        let is_end = |at: &usize| text.is_char_boundary(*at);
        let end = (0..=text.len().min(MAX_ERROR_BYTES)).rev().find(is_end).unwrap_or(0);
        text.truncate(end);
        Self { code, text, id: None }
    }

    pub(super) fn with_id(self, id: Option<RequestId>) -> Self {
        Self { id, ..self }
    }

    /// The program has all that came.
    pub(super) fn nothing_to_confirm() -> Self {
        Self::new(ErrorCode::Malformed, "no message waits to be confirmed")
    }

    /// The client does not take the message in.
    pub(super) fn refused(error: SendError, id: Option<RequestId>) -> Self {
        let code = match error {
            SendError::Empty | SendError::TooLong(_) | SendError::TooManySurbs(_) => {
                ErrorCode::Malformed
            }
            SendError::Full
            | SendError::UnknownSender
            | SendError::UnknownGateway
            | SendError::NoRoute
            | SendError::Stopped => ErrorCode::Other,
        };
        Self::new(code, error).with_id(id)
    }
}

impl Request {
    /// Reads a text request.
    ///
    /// # Errors
    /// [`RequestError`] with the code [`ErrorCode::Malformed`].
    pub(super) fn from_text(text: &str) -> Result<Self, RequestError> {
        let (fields, id) = Fields::parse(text)?;
        fields.request(id.clone()).map_err(|error| error.with_id(id))
    }

    /// Reads a binary request.
    ///
    /// # Errors
    /// [`RequestError`] with the code of what is wrong with it.
    pub(super) fn from_binary(bytes: &[u8]) -> Result<Self, RequestError> {
        let Some((&tag, bytes)) = bytes.split_first() else {
            return Err(RequestError::new(ErrorCode::Empty, "a request begins with a tag"));
        };
        let mut rest = Rest(bytes);
        match tag {
            SEND => rest.send(0),
            SEND_ANONYMOUS => {
                let reply_surbs = u32::from_be_bytes(rest.take()?);
                rest.send(usize::try_from(reply_surbs).unwrap_or(usize::MAX))
            }
            REPLY => {
                let sender_tag = SenderTag(rest.take::<SENDER_TAG_LEN>()?);
                rest.outgoing(Destination::Sender(sender_tag))
            }
            SELF_ADDRESS => Ok(Self::SelfAddress),
            CLOSED_CONNECTION => rest.only_connection_id().map(|_| Self::ClosedConnection),
            QUEUE_LENGTH => rest.only_connection_id().map(Self::QueueLength),
            TAKEN if rest.0.is_empty() => Ok(Self::Taken),
            TAKEN => {
                let text = "the request has no fields";
                Err(RequestError::new(ErrorCode::Malformed, text))
            }
            WITH_ID => {
                let id = u64::from_be_bytes(rest.take()?);
                Self::with_id(id, rest.0)
            }
            tag => Err(RequestError::new(ErrorCode::Unknown, format!("no request has tag {tag}"))),
        }
    }
}

impl Request {
    /// The request in `bytes`, which must be one for a message, with this id.
    fn with_id(id: u64, bytes: &[u8]) -> Result<Self, RequestError> {
        let id = Some(RequestId::Binary(id));
        let request = match bytes.first() {
            Some(&(SEND | SEND_ANONYMOUS | REPLY)) => Self::from_binary(bytes),
            _ => {
                let text = "only requests to send a message have an id";
                Err(RequestError::new(ErrorCode::Malformed, text))
            }
        };
        match request {
            Ok(Self::Send(outgoing)) => Ok(Self::Send(Outgoing { id, ..outgoing })),
            Ok(other) => Ok(other),
            Err(error) => Err(error.with_id(id)),
        }
    }
}

impl Fields {
    fn request(self, id: Option<RequestId>) -> Result<Request, RequestError> {
        let to = match self.r#type.as_str() {
            "selfAddress" => return Ok(Request::SelfAddress),
            "taken" => return Ok(Request::Taken),
            "send" => self.recipient(0)?,
            "sendAnonymous" => {
                let reply_surbs = present("replySurbs", self.reply_surbs)?;
                self.recipient(usize::try_from(reply_surbs).unwrap_or(usize::MAX))?
            }
            "reply" => Destination::Sender(sender_tag(&present("senderTag", self.sender_tag)?)?),
            other => {
                let text = format!("no request has the type `{other}`");
                return Err(RequestError::new(ErrorCode::Malformed, text));
            }
        };
        let message = present("message", self.message)?.into_bytes();
        Ok(Request::Send(Outgoing { to, message, connection_id: self.connection_id, id }))
    }

    fn recipient(&self, reply_surbs: usize) -> Result<Destination, RequestError> {
        let text = present("recipient", self.recipient.as_deref())?;
        // Longer ones take a time that grows with the square of their length.
        if text.len() > MAX_ADDRESS_TEXT {
            let text = format!("an address of {} letters is too long", text.len());
            return Err(RequestError::new(ErrorCode::Malformed, text));
        }
        let recipient =
            text.parse().map_err(|error| RequestError::new(ErrorCode::Malformed, error))?;
        Ok(Destination::Recipient { recipient, reply_surbs })
    }
}

fn sender_tag(text: &str) -> Result<SenderTag, RequestError> {
    let mut tag = [0; SENDER_TAG_LEN];
    match bs58::decode(text).onto(&mut tag) {
        Ok(SENDER_TAG_LEN) => Ok(SenderTag(tag)),
        _ => {
            let text = format!("a senderTag is {SENDER_TAG_LEN} bytes in base58");
            Err(RequestError::new(ErrorCode::Malformed, text))
        }
    }
}

/// What of a binary request was not read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], RequestError> {
        let Some((field, rest)) = self.0.split_first_chunk::<N>() else {
            return Err(RequestError::new(ErrorCode::TooShort, "the request is cut short"));
        };
        self.0 = rest;
        Ok(*field)
    }

    fn send(&mut self, reply_surbs: usize) -> Result<Request, RequestError> {
        let recipient = self.take::<ADDRESS_LEN>()?;
        let recipient = Address::from_bytes(&recipient)
            .map_err(|error| RequestError::new(ErrorCode::Malformed, error))?;
        self.outgoing(Destination::Recipient { recipient, reply_surbs })
    }

    fn outgoing(&mut self, to: Destination) -> Result<Request, RequestError> {
        let connection_id = u64::from_be_bytes(self.take()?);
        let len = u64::from_be_bytes(self.take()?);
        if u64::try_from(self.0.len()) != Ok(len) {
            let text = format!("the length says {len} bytes, and there are {}", self.0.len());
            return Err(RequestError::new(ErrorCode::Malformed, text));
        }
        let connection_id = (connection_id != 0).then_some(connection_id);
        Ok(Request::Send(Outgoing { to, message: self.0.to_vec(), connection_id, id: None }))
    }

    fn only_connection_id(&mut self) -> Result<u64, RequestError> {
        match self.0.try_into() {
            Ok(id) => Ok(u64::from_be_bytes(id)),
            Err(_) => {
                let text = "the request has a connection id of 8 bytes and nothing else";
                Err(RequestError::new(ErrorCode::Malformed, text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::websocket::testing::address;

    const TAG: SenderTag = SenderTag([7; SENDER_TAG_LEN]);

    fn outgoing(to: Destination, message: &[u8], connection_id: Option<u64>) -> Request {
        Request::Send(Outgoing { to, message: message.to_vec(), connection_id, id: None })
    }

    fn to(reply_surbs: usize) -> Destination {
        Destination::Recipient { recipient: address(), reply_surbs }
    }

    fn code(bytes: &[u8]) -> ErrorCode {
        Request::from_binary(bytes).unwrap_err().code
    }

    #[test]
    fn binary_requests_have_known_bytes() {
        let recipient = address().to_bytes();
        let tail = [&[0; 7][..], &[9], &[0; 7], &[2], b"hi"].concat();
        let send = [&[0][..], &recipient, &tail].concat();
        assert_eq!(send.len(), 1 + 96 + 8 + 8 + 2);
        assert_eq!(Request::from_binary(&send), Ok(outgoing(to(0), b"hi", Some(9))));
        let anonymous = [&[1, 0, 0, 1, 4][..], &recipient, &tail].concat();
        assert_eq!(Request::from_binary(&anonymous), Ok(outgoing(to(260), b"hi", Some(9))));
        let reply = [&[2][..], &TAG.0, &[0; 15], &[2], b"hi"].concat();
        let expected = outgoing(Destination::Sender(TAG), b"hi", None);
        assert_eq!(Request::from_binary(&reply), Ok(expected));
        assert_eq!(Request::from_binary(&[3]), Ok(Request::SelfAddress));
        assert_eq!(Request::from_binary(&[3, 0]), Ok(Request::SelfAddress));
        let closed = [4, 0, 0, 0, 0, 0, 0, 0, 5];
        assert_eq!(Request::from_binary(&closed), Ok(Request::ClosedConnection));
        let with_id = [&[128, 0, 0, 0, 0, 0, 0, 1, 2][..], &send].concat();
        let Ok(Request::Send(sent)) = Request::from_binary(&with_id) else { panic!() };
        assert_eq!(sent.id, Some(RequestId::Binary(258)));
        assert_eq!(Request::Send(Outgoing { id: None, ..sent }), outgoing(to(0), b"hi", Some(9)));
        assert_eq!(Request::from_binary(&[129]), Ok(Request::Taken));
        assert_eq!(code(&[129, 0]), ErrorCode::Malformed);
        let queue = [5, 0, 0, 0, 0, 0, 0, 1, 5];
        assert_eq!(Request::from_binary(&queue), Ok(Request::QueueLength(261)));
    }

    #[test]
    fn wrong_binary_requests_have_their_codes() {
        assert_eq!(code(&[]), ErrorCode::Empty);
        for tag in (6..=u8::MAX).filter(|tag| ![WITH_ID, TAKEN].contains(tag)) {
            assert_eq!(code(&[tag, 1, 2]), ErrorCode::Unknown);
        }
        let recipient = address().to_bytes();
        let send = [&[0][..], &recipient, &[0; 15], &[2], b"hi"].concat();
        for len in 1..1 + 96 + 16 {
            assert_eq!(code(&send[..len]), ErrorCode::TooShort);
        }
        assert_eq!(code(&send[..send.len() - 1]), ErrorCode::Malformed);
        assert_eq!(code(&[&send[..], &[0]].concat()), ErrorCode::Malformed);
        let mut huge = send.clone();
        huge[105..113].fill(0xff);
        assert_eq!(code(&huge), ErrorCode::Malformed);
        let mut no_key = send;
        no_key[1..33].fill(0);
        assert_eq!(code(&no_key), ErrorCode::Malformed);
        assert_eq!(code(&[1, 0, 0]), ErrorCode::TooShort);
        assert_eq!(code(&[2, 0, 0]), ErrorCode::TooShort);
        assert_eq!(code(&[5, 0, 0]), ErrorCode::Malformed);
        assert_eq!(code(&[4; 10]), ErrorCode::Malformed);
    }

    #[test]
    fn text_requests_are_those_of_the_known_form() {
        let own = Request::from_text(r#"{"type":"selfAddress"}"#);
        assert_eq!(own, Ok(Request::SelfAddress));
        let recipient = address().to_string();
        let send = format!(
            r#"{{"type":"send","message":"hé","recipient":"{recipient}","withReplySurb":false}}"#
        );
        assert_eq!(Request::from_text(&send), Ok(outgoing(to(0), "hé".as_bytes(), None)));
        let anonymous = format!(
            r#"{{"type":"sendAnonymous","message":"hi","recipient":"{recipient}",
                "replySurbs":3,"connectionId":0}}"#
        );
        assert_eq!(Request::from_text(&anonymous), Ok(outgoing(to(3), b"hi", Some(0))));
        let tag = bs58::encode(TAG.0).into_string();
        let reply =
            format!(r#"{{"type":"reply","message":"hi","senderTag":"{tag}","connectionId":null}}"#);
        let expected = outgoing(Destination::Sender(TAG), b"hi", None);
        assert_eq!(Request::from_text(&reply), Ok(expected));
    }

    #[test]
    fn ids_are_texts_or_integers_and_come_back_with_errors() {
        for (json, id) in [
            (r#""a""#, RequestId::Text("a".into())),
            ("18446744073709551615", RequestId::Natural(u64::MAX)),
            ("-4", RequestId::Integer(-4)),
        ] {
            let text = format!(r#"{{"type":"send","message":"m","recipient":"x","id":{json}}}"#);
            assert_eq!(Request::from_text(&text).unwrap_err().id, Some(id.clone()));
            assert_eq!(serde_json::to_string(&id).unwrap(), json);
        }
        let text = |id: &str| {
            let recipient = address();
            format!(r#"{{"type":"send","message":"m","recipient":"{recipient}","id":{id}}}"#)
        };
        for id in ["1.5", "{}", "[1]", "true"] {
            assert!(Request::from_text(&text(id)).is_err(), "{id}");
        }
        let longest = "x".repeat(MAX_ID_BYTES);
        assert!(Request::from_text(&text(&format!("\"{longest}\""))).is_ok());
        assert!(Request::from_text(&text(&format!("\"{longest}x\""))).is_err());
    }

    #[test]
    fn wrong_text_requests_are_malformed_and_say_why() {
        let recipient = address().to_string();
        for (text, word) in [
            ("", "a JSON object"),
            ("{", "EOF"),
            ("{}", "type"),
            (r#"{"type":"selfAddress""#, "EOF"),
            (r#"{"type":"selfAddress"} x"#, "trailing"),
            (r#"{"type":"nonsense"}"#, "nonsense"),
            (r#"{"type":"send","message":"m"}"#, "recipient"),
            (r#"{"type":"send","message":"m","recipient":"0"}"#, "form"),
            (r#"{"type":"sendAnonymous","message":"m","recipient":"0"}"#, "replySurbs"),
            (r#"{"type":"sendAnonymous","replySurbs":-1}"#, "from 0 to"),
            (r#"{"type":"reply","message":"m"}"#, "senderTag"),
            (r#"{"type":"reply","message":"m","senderTag":"0"}"#, "base58"),
            (r#"{"type":"reply","message":"m","senderTag":"2"}"#, "base58"),
            (r#"{"type":"reply","message":7,"senderTag":"2"}"#, "a text"),
            (&format!(r#"{{"type":"send","recipient":"{recipient}"}}"#), "message"),
            (&format!(r#"{{"type":"send","recipient":"{recipient}x"}}"#), "address"),
            (&format!(r#"{{"type":"send","recipient":"{}"}}"#, "z".repeat(1 << 20)), "too long"),
            (&format!(r#"{{"type":"reply","senderTag":"{}"}}"#, "z".repeat(1 << 20)), "base58"),
        ] {
            let error = Request::from_text(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::Malformed);
            assert!(error.text.contains(word), "{}", error.text);
        }
    }

    #[test]
    fn errors_quote_no_more_than_their_bound() {
        let text = format!(r#"{{"type":"{}"}}"#, "é".repeat(MAX_ERROR_BYTES));
        let error = Request::from_text(&text).unwrap_err().text;
        assert!(error.len() <= MAX_ERROR_BYTES && error.len() > MAX_ERROR_BYTES - 4);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(tag in 0u8..8, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::from_binary(&[&[tag], &bytes[..]].concat());
            let _ = Request::from_text(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn a_length_must_be_that_of_the_message(len: u64, message in ".{0,40}") {
            let bytes = [&[2][..], &TAG.0, &[0; 8], &len.to_be_bytes(), message.as_bytes()].concat();
            let is_right = len == message.len() as u64;
            prop_assert_eq!(Request::from_binary(&bytes).is_ok(), is_right);
        }
    }
}
