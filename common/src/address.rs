//! Addresses of clients and providers: `<identity>.<encryption>@<gateway identity>`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::keys::{EncryptionKey, Identity, KEY_LEN, KeyError, serde_as_text};

/// Bytes of an address on the wire.
pub const ADDRESS_LEN: usize = 3 * KEY_LEN;

/// Where packets for a client or provider go: who it is, how to encrypt for it, and the gateway
/// that hands it its packets. It stays the same while IP addresses change.
///
/// On the wire 96 bytes: identity (0..32), encryption key (32..64), gateway (64..96).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// The recipient's identity: the fourth hop's next hop.
    pub identity: Identity,
    /// The recipient's key: the fifth hop's layer, which is the end-to-end encryption.
    pub encryption: EncryptionKey,
    /// The gateway at which the recipient is registered.
    pub gateway: Identity,
}

/// Why a text or a byte string is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The text does not have the three parts.
    #[error("an address has the form <identity>.<encryption>@<gateway identity>, all in base58")]
    Form,
    /// One of the three parts is not a key.
    #[error("the {part} of the address is wrong: {source}")]
    Key {
        /// Which part: identity, encryption key or gateway.
        part: &'static str,
        /// What is wrong with it.
        source: KeyError,
    },
}

impl AddressError {
    fn key(part: &'static str) -> impl FnOnce(KeyError) -> Self {
        move |source| Self::Key { part, source }
    }
}

impl Address {
    /// Parses the 96 bytes of the wire format.
    ///
    /// # Errors
    /// [`AddressError::Key`] names the part that is not a key.
    pub fn from_bytes(bytes: &[u8; ADDRESS_LEN]) -> Result<Self, AddressError> {
        let part = |i: usize| {
            let mut key = [0u8; KEY_LEN];
            key.copy_from_slice(&bytes[i * KEY_LEN..(i + 1) * KEY_LEN]);
            key
        };
        Ok(Self {
            identity: Identity::from_bytes(part(0)).map_err(AddressError::key("identity"))?,
            encryption: EncryptionKey::from_bytes(part(1))
                .map_err(AddressError::key("encryption key"))?,
            gateway: Identity::from_bytes(part(2)).map_err(AddressError::key("gateway"))?,
        })
    }

    /// The 96 bytes of the wire format.
    pub fn to_bytes(&self) -> [u8; ADDRESS_LEN] {
        let mut bytes = [0u8; ADDRESS_LEN];
        bytes[..KEY_LEN].copy_from_slice(self.identity.as_bytes());
        bytes[KEY_LEN..2 * KEY_LEN].copy_from_slice(self.encryption.as_bytes());
        bytes[2 * KEY_LEN..].copy_from_slice(self.gateway.as_bytes());
        bytes
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}@{}", self.identity, self.encryption, self.gateway)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (client, gateway) = text.split_once('@').ok_or(AddressError::Form)?;
        let (identity, encryption) = client.split_once('.').ok_or(AddressError::Form)?;
        Ok(Self {
            identity: identity.parse().map_err(AddressError::key("identity"))?,
            encryption: encryption.parse().map_err(AddressError::key("encryption key"))?,
            gateway: gateway.parse().map_err(AddressError::key("gateway"))?,
        })
    }
}

serde_as_text!(Address);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::IdentityKey;
    use mixsocks_sphinx::SecretKey;

    fn address() -> Address {
        let mut rng = rand::rng();
        Address {
            identity: IdentityKey::generate(&mut rng).identity(),
            encryption: SecretKey::generate(&mut rng).public_key().into(),
            gateway: IdentityKey::generate(&mut rng).identity(),
        }
    }

    #[test]
    fn round_trips() {
        let address = address();
        assert_eq!(address.to_string().parse(), Ok(address));
        assert_eq!(Address::from_bytes(&address.to_bytes()), Ok(address));
    }

    #[test]
    fn wrong_texts_name_the_part() {
        let good = address().to_string();
        let (client, gateway) = good.split_once('@').unwrap();
        for (text, word) in [
            (client.to_owned(), "form"),
            (gateway.to_owned(), "form"),
            (String::new(), "form"),
            (format!("{client}@{gateway}x0"), "gateway"),
            (format!("x.{gateway}@{gateway}"), "identity"),
            (format!("{gateway}.1@{gateway}"), "encryption key"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
