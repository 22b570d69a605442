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

    /// Published public keys: RFC 8032 section 7.1 test 1, RFC 7748 section 6.1 (Alice's), RFC 8032
    /// section 7.1 test 2.
    #[test]
    fn known_bytes_and_text() {
        #[rustfmt::skip]
        let bytes: [u8; ADDRESS_LEN] = [
            0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07, 0x3a,
            0x0e, 0xe1, 0x72, 0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a,
            0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e, 0xf7, 0x5a,
            0x0d, 0xbf, 0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a,
            0x3d, 0x40, 0x17, 0xc3, 0xe8, 0x43, 0x89, 0x5a, 0x92, 0xb7, 0x0a, 0xa7, 0x4d, 0x1b, 0x7e, 0xbc,
            0x9c, 0x98, 0x2c, 0xcf, 0x2e, 0xc4, 0x96, 0x8c, 0xc0, 0xcd, 0x55, 0xf1, 0x2a, 0xf4, 0x66, 0x0c,
        ];
        let text = "FVen3X669xLzsi6N2V91DoiyzHzg1uAgqiT8jZ9nS96Z.\
                    9xgMXw7nrN39BoN9rJuGV6B9LwBNYXAJAMfeACcdyLMP@\
                    586Z7H2vpX9qNhN2T4e9Utugie3ogjbxzGaMtM3E6HR5";
        let address = Address::from_bytes(&bytes).unwrap();
        assert_eq!(address.to_bytes(), bytes);
        assert_eq!(address.to_string(), text);
        assert_eq!(text.parse(), Ok(address));
    }

    #[test]
    fn each_part_must_be_a_key() {
        let good = address().to_bytes();
        for (part, word) in [(0, "identity"), (1, "encryption key"), (2, "gateway")] {
            let mut bytes = good;
            // Zero is a point of low order on both curves.
            bytes[part * KEY_LEN..][..KEY_LEN].fill(0);
            let error = Address::from_bytes(&bytes).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
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
