//! Tokens: what a client shows to its gateway after it has registered.

use std::fmt;

use rand::CryptoRng;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::transcript::Transcript;

/// Bytes of a token, of its hash and of its masked form.
pub const TOKEN_LEN: usize = 32;

const AUTHENTICATE_CONTEXT: &[u8] = b"mixsocks authenticate v1\0";

/// A registered client's secret: 32 random bytes that the gateway drew.
///
/// It is wiped when dropped, shows nothing in `Debug` and compares in constant time.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Token([u8; TOKEN_LEN]);

/// What the gateway keeps of a token: its SHA-256, which does not let anybody in.
#[derive(Clone, Copy)]
pub struct TokenHash([u8; TOKEN_LEN]);

/// A token as it travels in AUTHENTICATE: masked for one connection.
///
/// `token ⊕ SHA-256("mixsocks authenticate v1\0" ‖ SHA-256(token) ‖ transcript)`: who stores the
/// hash can take the mask off and check the token; who recorded the message learns nothing and
/// cannot use it on another connection, whose nonces differ; who only has the hash cannot make one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MaskedToken([u8; TOKEN_LEN]);

impl Token {
    /// Draws a new token.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut bytes = [0u8; TOKEN_LEN];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// Takes the 32 bytes of a token.
    pub fn from_bytes(bytes: [u8; TOKEN_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for storage at the client.
    pub fn as_bytes(&self) -> &[u8; TOKEN_LEN] {
        &self.0
    }

    /// What the gateway stores.
    pub fn hash(&self) -> TokenHash {
        TokenHash(Sha256::digest(self.0).into())
    }

    /// Masks the token for the connection of `transcript`.
    pub fn mask(&self, transcript: &Transcript) -> MaskedToken {
        MaskedToken(xor(&self.0, &mask(&self.hash(), transcript)))
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

impl TokenHash {
    /// Takes the 32 bytes of a stored hash.
    pub fn from_bytes(bytes: [u8; TOKEN_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for storage at the gateway.
    pub fn as_bytes(&self) -> &[u8; TOKEN_LEN] {
        &self.0
    }

    /// Whether `masked` holds the token of this hash, masked for the connection of `transcript`.
    pub fn matches(&self, masked: &MaskedToken, transcript: &Transcript) -> bool {
        let token = Token(xor(&masked.0, &mask(self, transcript)));
        token.hash() == *self
    }
}

impl PartialEq for TokenHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for TokenHash {}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenHash(…)")
    }
}

impl MaskedToken {
    /// Takes the 32 bytes of the wire.
    pub fn from_bytes(bytes: [u8; TOKEN_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the wire.
    pub fn as_bytes(&self) -> &[u8; TOKEN_LEN] {
        &self.0
    }
}

impl fmt::Debug for MaskedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MaskedToken(…)")
    }
}

fn mask(hash: &TokenHash, transcript: &Transcript) -> [u8; TOKEN_LEN] {
    let mut hasher = Sha256::new();
    hasher.update(AUTHENTICATE_CONTEXT);
    hasher.update(hash.0);
    hasher.update(transcript.to_bytes());
    hasher.finalize().into()
}

fn xor(a: &[u8; TOKEN_LEN], b: &[u8; TOKEN_LEN]) -> [u8; TOKEN_LEN] {
    std::array::from_fn(|i| a[i] ^ b[i])
}

#[cfg(test)]
mod tests {
    use super::super::transcript::tests::transcript;
    use super::*;

    #[test]
    fn a_masked_token_fits_its_hash_and_its_connection_only() {
        let mut rng = rand::rng();
        let (token, other) = (Token::generate(&mut rng), Token::generate(&mut rng));
        let (here, elsewhere) = (transcript(), transcript());
        let masked = token.mask(&here);
        assert!(token.hash().matches(&masked, &here));
        assert!(!token.hash().matches(&masked, &elsewhere));
        assert!(!other.hash().matches(&masked, &here));
        assert_ne!(masked.as_bytes(), token.as_bytes());
        // The hash alone, presented as if it were the token, lets nobody in.
        let stolen = Token::from_bytes(*token.hash().as_bytes());
        assert!(!token.hash().matches(&stolen.mask(&here), &here));
    }

    #[test]
    fn debug_shows_nothing() {
        let token = Token::from_bytes([0xab; TOKEN_LEN]);
        let texts = [
            format!("{token:?}"),
            format!("{:?}", token.hash()),
            format!("{:?}", token.mask(&transcript())),
        ];
        assert_eq!(texts, ["Token(secret)", "TokenHash(…)", "MaskedToken(…)"]);
    }
}
