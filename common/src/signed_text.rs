//! Signed texts: a first line, signature lines, an empty line, and the text that they sign.
//!
//! ```text
//! mixsocks-… 1
//! signature <identity, base58> <signature, base58>
//!
//! (the body)
//! ```
//!
//! A signature is made over the kind's context followed by every byte after the empty line, so that
//! there is nothing to normalise and nothing unsigned to parse.

use crate::keys::{Identity, IdentityKey, KeyError, Signature};

/// What a text is.
pub(crate) struct Kind {
    /// The first line, without its end.
    pub(crate) first_line: &'static str,
    /// What is signed before the body, so that a signature of one kind is none of another.
    pub(crate) context: &'static [u8],
    /// Longest text in bytes.
    pub(crate) max_bytes: usize,
    /// Most signature lines that are looked at.
    pub(crate) max_signatures: usize,
    /// What to say of a longer text.
    pub(crate) too_long: &'static str,
    /// What to say of another first line.
    pub(crate) other_first_line: &'static str,
    /// What to say of more signatures.
    pub(crate) too_many_signatures: &'static str,
}

/// Why bytes are no signed text of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SignedTextError {
    /// They do not have the form.
    Form(&'static str),
    /// A key or signature does not read.
    Key(KeyError),
}

/// A text whose signatures have been read, but not checked.
pub(crate) struct SignedText<'a> {
    pub(crate) signatures: Vec<(Identity, Signature)>,
    pub(crate) body: &'a str,
    /// The line on which the body begins, from 1.
    pub(crate) body_line: usize,
}

/// Where a body does not read, by the line of its text, and why: what the library says in several
/// lines, with the text quoted, in one line.
pub(crate) fn toml_error(error: &toml::de::Error, body: &str, body_line: usize) -> (usize, String) {
    let before = error.span().map_or(0, |span| span.start);
    let line = body_line + body.bytes().take(before).filter(|byte| *byte == b'\n').count();
    (line, error.message().lines().collect::<Vec<_>>().join(" "))
}

impl Kind {
    /// Takes a text apart.
    pub(crate) fn parse<'a>(&self, text: &'a [u8]) -> Result<SignedText<'a>, SignedTextError> {
        if text.len() > self.max_bytes {
            return Err(SignedTextError::Form(self.too_long));
        }
        let text =
            std::str::from_utf8(text).map_err(|_| SignedTextError::Form("it is not text"))?;
        let rest = text
            .strip_prefix(self.first_line)
            .and_then(|rest| rest.strip_prefix('\n'))
            .ok_or(SignedTextError::Form(self.other_first_line))?;
        let (lines, body) = if let Some(body) = rest.strip_prefix('\n') {
            ("", body)
        } else {
            rest.split_once("\n\n")
                .ok_or(SignedTextError::Form("no empty line follows the signatures"))?
        };
        let mut signatures = Vec::new();
        for line in lines.lines() {
            if signatures.len() == self.max_signatures {
                return Err(SignedTextError::Form(self.too_many_signatures));
            }
            let (identity, signature) = line
                .strip_prefix("signature ")
                .and_then(|rest| rest.split_once(' '))
                .ok_or(SignedTextError::Form("a line before the empty one is no signature"))?;
            let identity = identity.parse().map_err(SignedTextError::Key)?;
            let signature = signature.parse().map_err(SignedTextError::Key)?;
            signatures.push((identity, signature));
        }
        let head = &text[..text.len() - body.len()];
        let body_line = 1 + head.bytes().filter(|byte| *byte == b'\n').count();
        Ok(SignedText { signatures, body, body_line })
    }

    /// The bytes that a signature covers.
    pub(crate) fn signed_bytes(&self, body: &str) -> Vec<u8> {
        [self.context, body.as_bytes()].concat()
    }

    /// Signs a body.
    pub(crate) fn sign(&self, body: &str, key: &IdentityKey) -> Signature {
        key.sign(&self.signed_bytes(body))
    }

    /// Writes a text.
    pub(crate) fn write(&self, body: &str, signatures: &[(Identity, Signature)]) -> String {
        let mut text = format!("{}\n", self.first_line);
        for (identity, signature) in signatures {
            text.push_str(&format!("signature {identity} {signature}\n"));
        }
        text.push('\n');
        text.push_str(body);
        text
    }
}
