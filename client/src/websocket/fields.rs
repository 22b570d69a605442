//! The fields of a text request: a JSON object.
//!
//! Each is read whatever type it has, so that an error about one can be given the `id` of the request;
//! what has no right type is skipped without keeping it.

use std::fmt;

use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::request::{ErrorCode, MAX_ID_BYTES, RequestError, RequestId};

/// What JSON takes for space.
const SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// The fields of all text requests. Others are ignored.
pub(super) struct Fields {
    pub(super) r#type: String,
    pub(super) recipient: Option<String>,
    pub(super) message: Option<String>,
    pub(super) sender_tag: Option<String>,
    pub(super) reply_surbs: Option<u64>,
    pub(super) connection_id: Option<u64>,
}

/// The same as they came.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Raw {
    r#type: Value,
    recipient: Value,
    message: Value,
    sender_tag: Value,
    reply_surbs: Value,
    connection_id: Value,
    id: Value,
}

/// A value of JSON, as far as requests have a use for it.
#[derive(Debug, Default, PartialEq, Eq)]
enum Value {
    /// Or `null`.
    #[default]
    Missing,
    Natural(u64),
    Negative(i64),
    Text(String),
    Other,
}

impl Fields {
    /// The fields of a request, and its id.
    ///
    /// # Errors
    /// [`RequestError`] with the code [`ErrorCode::Malformed`], and with the id if that is right.
    pub(super) fn parse(text: &str) -> Result<(Self, Option<RequestId>), RequestError> {
        // A list would be read as the fields in their order.
        if !text.trim_start_matches(SPACE).starts_with('{') {
            return Err(malformed("a request is a JSON object"));
        }
        let mut raw: Raw = serde_json::from_str(text).map_err(malformed)?;
        let id = std::mem::take(&mut raw.id).id()?;
        match raw.typed() {
            Ok(fields) => Ok((fields, id)),
            Err(error) => Err(error.with_id(id)),
        }
    }
}

impl Raw {
    fn typed(self) -> Result<Fields, RequestError> {
        Ok(Fields {
            r#type: present("type", self.r#type.text("type")?)?,
            recipient: self.recipient.text("recipient")?,
            message: self.message.text("message")?,
            sender_tag: self.sender_tag.text("senderTag")?,
            reply_surbs: self.reply_surbs.natural("replySurbs")?,
            connection_id: self.connection_id.natural("connectionId")?,
        })
    }
}

impl Value {
    fn text(self, name: &str) -> Result<Option<String>, RequestError> {
        match self {
            Self::Missing => Ok(None),
            Self::Text(text) => Ok(Some(text)),
            _ => Err(malformed(format!("`{name}` must be a text"))),
        }
    }

    fn natural(self, name: &str) -> Result<Option<u64>, RequestError> {
        match self {
            Self::Missing => Ok(None),
            Self::Natural(number) => Ok(Some(number)),
            _ => Err(malformed(format!("`{name}` must be an integer from 0 to {}", u64::MAX))),
        }
    }

    fn id(self) -> Result<Option<RequestId>, RequestError> {
        match self {
            Self::Missing => Ok(None),
            Self::Natural(id) => Ok(Some(RequestId::Natural(id))),
            Self::Negative(id) => Ok(Some(RequestId::Integer(id))),
            Self::Text(id) if id.len() <= MAX_ID_BYTES => Ok(Some(RequestId::Text(id))),
            Self::Text(_) | Self::Other => Err(malformed(format!(
                "`id` must be an integer from {} to {}, or a text of at most {MAX_ID_BYTES} bytes",
                i64::MIN,
                u64::MAX
            ))),
        }
    }
}

/// # Errors
/// [`RequestError`] if the field is missing.
pub(super) fn present<T>(name: &str, field: Option<T>) -> Result<T, RequestError> {
    field.ok_or_else(|| malformed(format!("missing field `{name}`")))
}

fn malformed(text: impl fmt::Display) -> RequestError {
    RequestError::new(ErrorCode::Malformed, text)
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Missing)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Natural(number))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        Ok(u64::try_from(number).map_or(Value::Negative(number), Value::Natural))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> RequestError {
        Fields::parse(text).map(|(fields, _)| fields.r#type).unwrap_err()
    }

    #[test]
    fn an_error_about_any_field_has_the_id_of_the_request() {
        for field in ["type", "recipient", "message", "senderTag", "replySurbs", "connectionId"] {
            for value in ["-1", "1.5", "true", "{}", r#"[{"a":[null]}]"#, "18446744073709551616"] {
                let r#type = if field == "type" { "" } else { r#""type":"send","# };
                let error = error(&format!(r#"{{{type}"{field}":{value},"id":6}}"#));
                assert_eq!(error.id, Some(RequestId::Natural(6)), "{field}: {value}");
                assert_eq!(error.code, ErrorCode::Malformed);
                assert!(error.text.starts_with(&format!("`{field}` must be")), "{}", error.text);
            }
        }
        assert_eq!(error(r#"{"id":"a"}"#).id, Some(RequestId::Text("a".into())));
        assert_eq!(error(r#"{"type":"send","message":5,"id":null}"#).id, None);
    }

    #[test]
    fn a_list_is_no_request() {
        for text in [
            r#"["selfAddress",null,null,null,null,null,null]"#,
            " []",
            "",
            "hello",
            r#""{}""#,
            &"[".repeat(1 << 20),
        ] {
            assert_eq!(error(text).text, "a request is a JSON object");
        }
        assert!(Fields::parse(" \r\n\t{\"type\":\"selfAddress\"} ").is_ok());
    }

    #[test]
    fn a_wrong_id_is_told_what_an_id_may_be() {
        for id in ["1.5", "{}", "[1]", "true", "18446744073709551616", "-9223372036854775809"] {
            let error = error(&format!(r#"{{"type":"selfAddress","id":{id}}}"#));
            assert!(error.text.starts_with("`id` must be an integer from -9223"), "{}", error.text);
            assert!(error.text.ends_with("or a text of at most 256 bytes") && error.id.is_none());
        }
    }

    #[test]
    fn deep_values_are_skipped() {
        let deep = format!("{}{}", "[".repeat(1 << 16), "]".repeat(1 << 16));
        let error = error(&format!(r#"{{"type":{deep},"id":6}}"#));
        assert_eq!(error.id, Some(RequestId::Natural(6)), "{}", error.text);
    }
}
