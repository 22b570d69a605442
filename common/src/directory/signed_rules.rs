//! What an authority tells those who want to become members, before there is a document.
//!
//! ```text
//! mixsocks-rules 1
//! signature <authority, base58> <signature, base58>
//!
//! network = "…"
//!
//! [parameters]
//! …
//! ```
//!
//! The only signature is the authority's, over `"mixsocks rules v1\0"` and every byte after the empty
//! line. The parameters are those of a topology document.

use serde::{Deserialize, Serialize};

use super::Rules;
use crate::keys::{Identity, IdentityKey, KeyError};
use crate::signed_text::{Kind, SignedTextError, toml_error};
use crate::topology::{DocumentError, NetworkName, Parameters, RawParameters};

/// Longest text in bytes: it has some 500.
const MAX_RULES_BYTES: usize = 2048;

const KIND: Kind = Kind {
    first_line: "mixsocks-rules 1",
    context: b"mixsocks rules v1\0",
    max_bytes: MAX_RULES_BYTES,
    max_signatures: 1,
    too_long: "they are larger than 2,048 bytes",
    other_first_line: "their first line is not \"mixsocks-rules 1\"",
    too_many_signatures: "they have more than one signature",
};

/// Rules as an authority signs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRules {
    /// Who says so.
    pub authority: Identity,
    /// The network.
    pub network: NetworkName,
    /// What all of its nodes agree on.
    pub parameters: Parameters,
}

/// Why a text is no rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignedRulesError {
    /// It has another form.
    #[error("these are no rules of a network: {0}")]
    NotRules(&'static str),
    /// A key or the signature in the first lines does not read.
    #[error("the signature line is damaged: {0}")]
    SignatureLine(#[from] KeyError),
    /// Whom it names has not signed it.
    #[error("the rules are not signed by the authority that they name")]
    NotSigned,
    /// It is not the TOML that rules are made of.
    #[error("line {line} does not read as rules: {problem}")]
    Syntax {
        /// The line of the text, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// The name or a parameter is out of its range.
    #[error(transparent)]
    Document(#[from] DocumentError),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRules {
    network: String,
    parameters: RawParameters,
}

impl SignedRules {
    /// Signs what others must know of `rules`.
    ///
    /// # Panics
    /// Never: every value has a TOML form.
    pub fn sign(rules: &Rules, key: &IdentityKey) -> String {
        let raw = RawRules {
            network: rules.network().as_str().to_owned(),
            parameters: RawParameters::from(rules.parameters()),
        };
        let body = toml::to_string(&raw).expect("rules have only TOML values");
        KIND.write(&body, &[(key.identity(), KIND.sign(&body, key))])
    }

    /// Reads a text and checks its signature and contents; whether the authority is one of the
    /// network's, is for the caller to see.
    ///
    /// # Errors
    /// [`SignedRulesError`].
    pub fn read(text: &[u8]) -> Result<Self, SignedRulesError> {
        let signed = KIND.parse(text).map_err(|error| match error {
            SignedTextError::Form(problem) => SignedRulesError::NotRules(problem),
            SignedTextError::Key(error) => error.into(),
        })?;
        let [(authority, signature)] = &signed.signatures[..] else {
            return Err(SignedRulesError::NotSigned);
        };
        authority
            .verify(&KIND.signed_bytes(signed.body), signature)
            .map_err(|_| SignedRulesError::NotSigned)?;
        let raw: RawRules = toml::from_str(signed.body).map_err(|error| {
            let (line, problem) = toml_error(&error, signed.body, signed.body_line);
            SignedRulesError::Syntax { line, problem }
        })?;
        let network =
            NetworkName::new(&raw.network).ok_or(DocumentError::NetworkName(raw.network))?;
        let parameters = Parameters::from(raw.parameters);
        parameters.check()?;
        Ok(Self { authority: *authority, network, parameters })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{authority_key, rules};
    use super::*;

    #[test]
    fn rules_are_read_as_they_were_signed() {
        let (rules, key) = (rules(3, 2), authority_key(1));
        let text = SignedRules::sign(&rules, &key);
        let read = SignedRules::read(text.as_bytes()).unwrap();
        assert_eq!((read.authority, &read.network), (key.identity(), rules.network()));
        assert_eq!(read.parameters, *rules.parameters());
    }

    #[test]
    fn a_changed_byte_is_noticed() {
        let text = SignedRules::sign(&rules(3, 2), &authority_key(1)).into_bytes();
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            assert!(SignedRules::read(&changed).is_err(), "byte {at}");
        }
        assert!(SignedRules::read(&[b'x'; MAX_RULES_BYTES + 1]).is_err());
    }
}
