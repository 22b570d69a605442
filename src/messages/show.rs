//! How messages and addresses look.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use data_encoding::BASE64;
use mixsocks_common::address::Address;
use qrcode::QrCode;
use qrcode::render::unicode::Dense1x2;
use serde::Serialize;

use super::Incoming;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    sender_tag: Option<String>,
}

/// A message as a line of JSON.
pub(super) fn json(Incoming { message, sender_tag, .. }: &Incoming) -> String {
    let text = std::str::from_utf8(message).ok();
    let line = Line {
        message: text,
        base64: text.is_none().then(|| BASE64.encode(message)),
        sender_tag: sender_tag.map(|tag| bs58::encode(tag.0).into_string()),
    };
    let json = serde_json::to_string(&line).expect("texts have a form in JSON");
    let mut shown = String::with_capacity(json.len());
    for letter in json.chars() {
        if is_obeyed(letter) {
            let mut units = [0; 2];
            for unit in letter.encode_utf16(&mut units) {
                // Writing to a text does not fail.
                let _ = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(letter);
        }
    }
    shown
}

/// A message as text without what a terminal would obey: strangers write it.
pub(super) fn for_terminal(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message);
    let mut shown = String::with_capacity(text.len());
    for letter in text.trim_end_matches('\n').chars() {
        match letter {
            '\n' | '\t' => shown.push(letter),
            _ if is_obeyed(letter) => shown.extend(letter.escape_unicode()),
            _ => shown.push(letter),
        }
    }
    shown
}

/// What a terminal obeys instead of showing it: control characters, and those that break lines, make text
/// run the other way, or are not seen.
fn is_obeyed(letter: char) -> bool {
    letter.is_control()
        || matches!(
            letter,
            '\u{61c}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{2069}'
                | '\u{feff}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// An address for the camera of another device. Light on dark, as most terminals are, with the quiet zone.
pub(super) fn qr_code(address: &Address) -> Result<String> {
    let code = QrCode::new(address.to_string()).context("the address has no QR code")?;
    let mut renderer = code.render::<Dense1x2>();
    Ok(renderer.dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build())
}

#[cfg(test)]
mod tests {
    use mixsocks_common::message::SenderTag;

    use super::*;

    fn incoming(message: &[u8], sender_tag: Option<SenderTag>) -> Incoming {
        Incoming { message: message.to_vec(), sender_tag, received: None }
    }

    #[test]
    fn json_keeps_every_byte() {
        let text = json(&incoming("ä\n\"".as_bytes(), None));
        assert_eq!(text, r#"{"message":"ä\n\"","senderTag":null}"#);
        let hidden = json(&incoming("\u{9b}\u{e0001}".as_bytes(), None));
        assert_eq!(hidden, r#"{"message":"\u009b\udb40\udc01","senderTag":null}"#);
        let parsed: serde_json::Value = serde_json::from_str(&hidden).unwrap();
        assert_eq!(parsed["message"], "\u{9b}\u{e0001}");
        let bytes = json(&incoming(b"\xff\0", Some(SenderTag([0xff; 16]))));
        assert_eq!(bytes, r#"{"base64":"/wA=","senderTag":"YcVfxkQb6JRzqk5kF2tNLv"}"#);
    }

    #[test]
    fn a_terminal_is_told_nothing_but_text() {
        assert_eq!(for_terminal("hé\n\tx\n".as_bytes()), "hé\n\tx");
        assert_eq!(for_terminal(b"\x1b[2J\x07\r\xff"), "\\u{1b}[2J\\u{7}\\u{d}\u{fffd}");
        assert_eq!(for_terminal("\u{202e}txt.exe\u{9b}".as_bytes()), "\\u{202e}txt.exe\\u{9b}");
    }
}
