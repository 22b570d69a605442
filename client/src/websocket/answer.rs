//! What programs are told, as text and in binary.
//!
//! A binary answer is a tag and its fields, without gaps; integers are big-endian, lengths u64.
//!
//! | tag | answer | fields |
//! |--:|---|---|
//! | 0 | error | code u8, length, text |
//! | 1 | received | 0, or 1 and sender_tag (16 bytes); length, message |
//! | 2 | own address | address (96 bytes) |
//! | 3 | queue of a connection | connection id u64, packets u64 |
//! | 128 | delivered | id u64 |
//! | 129 | failed | id u64, reason u8, length, text |
//! | 130 | error of a request with an id | id u64, code u8, length, text |
//!
//! What became of a message is told in the form of its request.

use mixsocks_common::address::Address;
use mixsocks_common::message::{FailReason, SenderTag};
use serde::Serialize;
use tokio_tungstenite::tungstenite::Message;

use super::request::{RequestError, RequestId};

const ERROR: u8 = 0;
const RECEIVED: u8 = 1;
const SELF_ADDRESS: u8 = 2;
const QUEUE_LENGTH: u8 = 3;
const DELIVERED: u8 = 128;
const FAILED: u8 = 129;
const ERROR_WITH_ID: u8 = 130;

/// The form of requests and answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Text,
    Binary,
}

/// An answer, or a message that came.
#[derive(Debug)]
pub(super) enum Answer<'a> {
    Error(&'a RequestError),
    Received { message: &'a [u8], sender_tag: Option<SenderTag> },
    SelfAddress(Address),
    QueueLength { connection_id: u64, packets: u64 },
}

/// What became of a message.
pub(super) type Outcome = Result<(), FailReason>;

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "camelCase")]
enum AnswerText<'a> {
    Error {
        message: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<&'a RequestId>,
    },
    #[serde(rename_all = "camelCase")]
    Received {
        message: &'a str,
        sender_tag: Option<String>,
    },
    SelfAddress {
        address: String,
    },
    /// The existing client spells the name of this field so.
    LaneQueueLength {
        lane: u64,
        queue_length: u64,
    },
    Delivered {
        id: &'a RequestId,
    },
    Failed {
        id: &'a RequestId,
        reason: &'static str,
        message: String,
    },
}

impl Answer<'_> {
    /// The websocket message of it.
    pub(super) fn to_message(&self, form: Form) -> Message {
        match form {
            Form::Text => self.to_text(),
            Form::Binary => Message::Binary(self.to_bytes().into()),
        }
    }

    fn to_text(&self) -> Message {
        match self {
            Self::Error(error) => text(&AnswerText::Error {
                message: format!("{}:{}", error.code.text(), error.text),
                id: error.id.as_ref(),
            }),
            Self::Received { message, sender_tag } => text(&AnswerText::Received {
                message: &String::from_utf8_lossy(message),
                sender_tag: sender_tag.map(|tag| bs58::encode(tag.0).into_string()),
            }),
            Self::SelfAddress(address) => {
                text(&AnswerText::SelfAddress { address: address.to_string() })
            }
            Self::QueueLength { connection_id, packets } => {
                text(&AnswerText::LaneQueueLength { lane: *connection_id, queue_length: *packets })
            }
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Error(error) => {
                let (code, text) = ([error.code as u8], error.text.as_bytes());
                let head = match &error.id {
                    Some(RequestId::Binary(id)) => tag_and_id(ERROR_WITH_ID, *id),
                    _ => vec![ERROR],
                };
                [&head[..], &code, &length(text), text].concat()
            }
            Self::Received { message, sender_tag: None } => {
                [&[RECEIVED, 0], &length(message)[..], message].concat()
            }
            Self::Received { message, sender_tag: Some(tag) } => {
                [&[RECEIVED, 1], &tag.0[..], &length(message), message].concat()
            }
            Self::SelfAddress(address) => [&[SELF_ADDRESS], &address.to_bytes()[..]].concat(),
            Self::QueueLength { connection_id, packets } => {
                [&[QUEUE_LENGTH], &connection_id.to_be_bytes()[..], &packets.to_be_bytes()].concat()
            }
        }
    }
}

/// The websocket message that tells what became of the message of a request.
pub(super) fn outcome_message(id: &RequestId, outcome: Outcome) -> Message {
    if let RequestId::Binary(id) = id {
        return Message::Binary(outcome_bytes(*id, outcome).into());
    }
    match outcome {
        Ok(()) => text(&AnswerText::Delivered { id }),
        Err(reason) => text(&AnswerText::Failed {
            id,
            reason: reason_name(reason),
            message: reason.to_string(),
        }),
    }
}

fn outcome_bytes(id: u64, outcome: Outcome) -> Vec<u8> {
    let Err(reason) = outcome else { return tag_and_id(DELIVERED, id) };
    let text = reason.to_string();
    let text = text.as_bytes();
    [&tag_and_id(FAILED, id)[..], &[reason_number(reason)], &length(text), text].concat()
}

fn tag_and_id(tag: u8, id: u64) -> Vec<u8> {
    [&[tag][..], &id.to_be_bytes()].concat()
}

fn reason_number(reason: FailReason) -> u8 {
    match reason {
        FailReason::NotConfirmed => 1,
        FailReason::ShareFull => 2,
        FailReason::StoreUnavailable => 3,
        FailReason::UnknownClient => 4,
        FailReason::NoRoute => 5,
        FailReason::NoSurbs => 6,
    }
}

fn reason_name(reason: FailReason) -> &'static str {
    match reason {
        FailReason::NotConfirmed => "notConfirmed",
        FailReason::ShareFull => "shareFull",
        FailReason::StoreUnavailable => "storeUnavailable",
        FailReason::UnknownClient => "unknownClient",
        FailReason::NoRoute => "noRoute",
        FailReason::NoSurbs => "noSurbs",
    }
}

fn text(answer: &AnswerText<'_>) -> Message {
    let json = serde_json::to_string(answer).expect("texts and numbers have a form in JSON");
    Message::text(json)
}

fn length(bytes: &[u8]) -> [u8; 8] {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::websocket::request::ErrorCode;
    use crate::websocket::testing::address;

    const TAG: SenderTag = SenderTag([0xff; 16]);

    fn json(answer: &Answer<'_>) -> String {
        answer.to_message(Form::Text).into_text().unwrap().to_string()
    }

    fn bytes(answer: &Answer<'_>) -> Vec<u8> {
        answer.to_message(Form::Binary).into_data().to_vec()
    }

    #[test]
    fn messages_that_came_have_known_bytes_and_text() {
        let anonymous = Answer::Received { message: b"hi", sender_tag: Some(TAG) };
        let expected = [&[1, 1][..], &[0xff; 16], &[0, 0, 0, 0, 0, 0, 0, 2], b"hi"].concat();
        assert_eq!(bytes(&anonymous), expected);
        // 16 bytes of ones in base58, by another program.
        let expected = r#"{"type":"received","message":"hi","senderTag":"YcVfxkQb6JRzqk5kF2tNLv"}"#;
        assert_eq!(json(&anonymous), expected);
        let plain = Answer::Received { message: b"\xffa\"", sender_tag: None };
        assert_eq!(bytes(&plain), b"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x03\xffa\"");
        let expected = "{\"type\":\"received\",\"message\":\"\u{fffd}a\\\"\",\"senderTag\":null}";
        assert_eq!(json(&plain), expected);
    }

    #[test]
    fn other_answers_have_known_bytes_and_text() {
        let own = Answer::SelfAddress(address());
        assert_eq!(bytes(&own), [&[2][..], &address().to_bytes()].concat());
        assert_eq!(json(&own), format!(r#"{{"type":"selfAddress","address":"{}"}}"#, address()));
        let queue = Answer::QueueLength { connection_id: 258, packets: 3 };
        assert_eq!(bytes(&queue), [3, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(json(&queue), r#"{"type":"laneQueueLength","lane":258,"queue_length":3}"#);
    }

    #[test]
    fn errors_have_their_code_or_its_text() {
        for (code, number, name) in [
            (ErrorCode::Empty, 1, "received request contained no data"),
            (ErrorCode::TooShort, 2, "received request did not contain enough data"),
            (ErrorCode::Unknown, 3, "unknown request type"),
            (ErrorCode::Malformed, 4, "malformed request"),
            (ErrorCode::Other, 255, "other"),
        ] {
            let mut error = RequestError { code, text: "no".into(), id: None };
            let expected = [&[0, number][..], &[0, 0, 0, 0, 0, 0, 0, 2], b"no"].concat();
            assert_eq!(bytes(&Answer::Error(&error)), expected);
            let expected = format!(r#"{{"type":"error","message":"{name}:no"}}"#);
            assert_eq!(json(&Answer::Error(&error)), expected);
            error.id = Some(RequestId::Natural(7));
            let expected = format!(r#"{{"type":"error","message":"{name}:no","id":7}}"#);
            assert_eq!(json(&Answer::Error(&error)), expected);
        }
    }

    #[test]
    fn outcomes_and_errors_with_a_binary_id_have_known_bytes() {
        const ID: RequestId = RequestId::Binary(258);
        let told = |outcome| outcome_message(&ID, outcome).into_data().to_vec();
        let id = [0, 0, 0, 0, 0, 0, 1, 2];
        assert_eq!(told(Ok(())), [&[128][..], &id].concat());
        let text = b"there are no SURBs to reply with";
        let expected = [&[129][..], &id, &[6, 0, 0, 0, 0, 0, 0, 0, 32], text].concat();
        assert_eq!(told(Err(FailReason::NoSurbs)), expected);
        let error = RequestError { code: ErrorCode::Other, text: "no".into(), id: Some(ID) };
        let expected = [&[130][..], &id, &[255, 0, 0, 0, 0, 0, 0, 0, 2], b"no"].concat();
        assert_eq!(bytes(&Answer::Error(&error)), expected);
    }

    #[test]
    fn outcomes_of_text_requests_are_text() {
        let id = RequestId::Text("a".into());
        let told = |outcome| outcome_message(&id, outcome).into_text().unwrap().to_string();
        assert_eq!(told(Ok(())), r#"{"type":"delivered","id":"a"}"#);
        let expected = r#"{"type":"failed","id":"a","reason":"noSurbs","message":"there are no SURBs to reply with"}"#;
        assert_eq!(told(Err(FailReason::NoSurbs)), expected);
    }
}
