//! Keys that name things: Ed25519 identities and X25519 encryption keys, both written in base58.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use mixsocks_sphinx::PublicKey;
use rand::CryptoRng;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

/// Bytes of an identity, of an encryption key and of a secret seed.
pub const KEY_LEN: usize = 32;
/// Bytes of a signature.
pub const SIGNATURE_LEN: usize = 64;

/// Why a text or a byte string is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text holds a character that base58 does not have.
    #[error("\"{text}\" is not base58 (letters and digits without 0, O, I and l)")]
    NotBase58 {
        /// The text as it was given.
        text: String,
    },
    /// The decoded text has the wrong length.
    #[error("\"{text}\" decodes to {actual} bytes where {expected} are needed")]
    WrongLength {
        /// The text as it was given.
        text: String,
        /// Its decoded length in bytes.
        actual: usize,
        /// The length in bytes that the key needs.
        expected: usize,
    },
    /// The bytes are no point of Edwards25519, or one of low order.
    #[error("the bytes are not an Ed25519 public key")]
    NotAnIdentity,
    /// The bytes are a low-order point of Curve25519, whose shared secrets anybody knows.
    #[error("the bytes are a low-order X25519 key, which would protect nothing")]
    LowOrder,
    /// The bytes are a number of 2^255 − 19 or more, so that the key has another spelling.
    #[error("the bytes are not an X25519 key in its canonical encoding")]
    NonCanonical,
    /// The bytes are a point that no secret key belongs to.
    #[error("the bytes are not an X25519 key that anybody can have made")]
    OutsideSubgroup,
}

/// A signature does not belong to the message and the key it came with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not fit the message and the key")]
pub struct BadSignature;

fn decode_base58<const N: usize>(text: &str) -> Result<[u8; N], KeyError> {
    let mut bytes = [0u8; N];
    // Decoding into a fixed array bounds the work, whatever the length of the text.
    match bs58::decode(text).onto(&mut bytes[..]) {
        Ok(len) if len == N => Ok(bytes),
        Ok(actual) => Err(KeyError::WrongLength { text: shorten(text), actual, expected: N }),
        Err(bs58::decode::Error::BufferTooSmall) => Err(KeyError::WrongLength {
            text: shorten(text),
            actual: text.len() * 3 / 4,
            expected: N,
        }),
        Err(_) => Err(KeyError::NotBase58 { text: shorten(text) }),
    }
}

/// Keeps an error message readable when the input was not.
fn shorten(text: &str) -> String {
    const SHOWN_CHARS: usize = 60;
    if text.chars().count() <= SHOWN_CHARS {
        return text.to_owned();
    }
    text.chars().take(SHOWN_CHARS).chain(std::iter::once('…')).collect()
}

/// An Ed25519 public key: the name of a client, provider, mix, gateway or authority.
///
/// 32 bytes, the compressed point of RFC 8032. In packets the bytes name the next hop; in text it
/// is base58.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity([u8; KEY_LEN]);

impl Identity {
    /// Parses the 32 bytes of a public key.
    ///
    /// # Errors
    /// [`KeyError::NotAnIdentity`] when the bytes are not a point or one of low order.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::NotAnIdentity)?;
        if key.is_weak() {
            return Err(KeyError::NotAnIdentity);
        }
        Ok(Self(bytes))
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// Checks that this identity signed `message`.
    ///
    /// Verification is strict (RFC 8032 §8.4 and small-order points are refused), so that two
    /// verifiers never disagree.
    ///
    /// # Errors
    /// [`BadSignature`] when it did not.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> Result<(), BadSignature> {
        let key = VerifyingKey::from_bytes(&self.0).map_err(|_| BadSignature)?;
        key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(&signature.0))
            .map_err(|_| BadSignature)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.0).into_string())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({self})")
    }
}

impl FromStr for Identity {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(decode_base58(text)?)
    }
}

/// The secret half of an [`Identity`]; wiped when dropped.
pub struct IdentityKey(SigningKey);

impl IdentityKey {
    /// Draws a new key.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut seed = Zeroizing::new([0u8; KEY_LEN]);
        rng.fill_bytes(seed.as_mut());
        Self::from_bytes(&seed)
    }

    /// The key of a 32-byte seed (RFC 8032 §5.1.5).
    pub fn from_bytes(seed: &[u8; KEY_LEN]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// The 32-byte seed, for storage.
    pub fn to_bytes(&self) -> Zeroizing<[u8; KEY_LEN]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The public half.
    pub fn identity(&self) -> Identity {
        Identity(self.0.verifying_key().to_bytes())
    }

    /// Signs `message` (RFC 8032, pure Ed25519).
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.0.sign(message).to_bytes())
    }
}

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IdentityKey(secret of {})", self.identity())
    }
}

/// An Ed25519 signature of 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; SIGNATURE_LEN]);

impl Signature {
    /// Wraps 64 bytes; whether they fit anything shows in [`Identity::verify`].
    pub fn from_bytes(bytes: [u8; SIGNATURE_LEN]) -> Self {
        Self(bytes)
    }

    /// The 64 bytes.
    pub fn as_bytes(&self) -> &[u8; SIGNATURE_LEN] {
        &self.0
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.0).into_string())
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({self})")
    }
}

impl FromStr for Signature {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode_base58(text).map(Self)
    }
}

/// The X25519 public key with which packets are encrypted for a node, client or provider.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EncryptionKey(PublicKey);

impl EncryptionKey {
    /// Parses the 32 bytes of a public key (RFC 7748).
    ///
    /// # Errors
    /// [`KeyError::LowOrder`] for the points whose shared secrets are the same for everybody;
    /// [`KeyError::NonCanonical`] for keys that are spelled in another way than they should be;
    /// [`KeyError::OutsideSubgroup`] for points that are no multiple of the base point.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Result<Self, KeyError> {
        PublicKey::from_bytes(bytes).map(Self).map_err(|error| match error {
            mixsocks_sphinx::KeyError::LowOrderPoint => KeyError::LowOrder,
            mixsocks_sphinx::KeyError::NonCanonical => KeyError::NonCanonical,
            mixsocks_sphinx::KeyError::OutsideSubgroup => KeyError::OutsideSubgroup,
        })
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        self.0.as_bytes()
    }

    /// The key as packets use it.
    pub fn public_key(&self) -> PublicKey {
        self.0
    }
}

impl From<PublicKey> for EncryptionKey {
    fn from(key: PublicKey) -> Self {
        Self(key)
    }
}

impl fmt::Display for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.as_bytes()).into_string())
    }
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EncryptionKey({self})")
    }
}

impl FromStr for EncryptionKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(decode_base58(text)?)
    }
}

macro_rules! serde_as_text {
    ($($type:ty),+) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}
pub(crate) use serde_as_text;

serde_as_text!(Identity, EncryptionKey, Signature);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        let key = IdentityKey::generate(&mut rand::rng());
        let text = key.identity().to_string();
        assert_eq!(text.parse::<Identity>(), Ok(key.identity()));
        let signature = key.sign(b"m");
        assert_eq!(signature.to_string().parse::<Signature>(), Ok(signature));
        assert_eq!(*IdentityKey::from_bytes(&key.to_bytes()).to_bytes(), *key.to_bytes());
    }

    #[test]
    fn signature_is_bound_to_message_and_key() {
        let key = IdentityKey::generate(&mut rand::rng());
        let other = IdentityKey::generate(&mut rand::rng());
        let signature = key.sign(b"message");
        assert_eq!(key.identity().verify(b"message", &signature), Ok(()));
        assert_eq!(key.identity().verify(b"messagE", &signature), Err(BadSignature));
        assert_eq!(other.identity().verify(b"message", &signature), Err(BadSignature));
    }

    #[test]
    fn bad_texts_say_why() {
        let long = "1".repeat(100_000);
        assert!(matches!("0OIl".parse::<Identity>(), Err(KeyError::NotBase58 { .. })));
        assert!(matches!("abc".parse::<Identity>(), Err(KeyError::WrongLength { .. })));
        let error = long.parse::<Identity>().unwrap_err().to_string();
        assert!(error.len() < 300, "{error}");
    }

    #[test]
    fn low_order_points_are_refused() {
        assert_eq!(EncryptionKey::from_bytes([0; 32]), Err(KeyError::LowOrder));
        // The neutral element of Edwards25519: y = 1.
        let mut neutral = [0u8; 32];
        neutral[0] = 1;
        assert_eq!(Identity::from_bytes(neutral), Err(KeyError::NotAnIdentity));
    }

    #[test]
    fn a_second_spelling_of_a_key_is_called_that() {
        // The base point, u = 9, and the same with the ignored top bit set.
        let mut key = [0u8; 32];
        key[0] = 9;
        assert!(EncryptionKey::from_bytes(key).is_ok());
        key[31] = 0x80;
        assert_eq!(EncryptionKey::from_bytes(key), Err(KeyError::NonCanonical));
    }

    #[test]
    fn debug_shows_no_secret() {
        let key = IdentityKey::generate(&mut rand::rng());
        let seed = bs58::encode(*key.to_bytes()).into_string();
        assert!(!format!("{key:?}").contains(&seed));
    }
}
