//! Access tokens: whom a private provider serves.
//!
//! A token is never shown itself. What a provider is shown is bound to its encryption key, which is what
//! keeps everybody else from reading it: whoever is given the token by mistake cannot use it elsewhere.

use std::fmt;

use rand::CryptoRng;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::keys::EncryptionKey;

/// Bytes of an access token, of its presented form and of its hash.
pub const ACCESS_TOKEN_LEN: usize = 32;

/// Most tokens of a provider: each is compared with what a new session shows, all of them in some 20 µs,
/// about what opening its packet costs.
pub const MAX_ACCESS_TOKENS: usize = 1024;

const PRESENT_CONTEXT: &[u8] = b"mixsocks access token v1\0";

/// A secret of 32 random bytes that opens a private provider to everybody who has it.
///
/// It is wiped when dropped and shows nothing in `Debug`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct AccessToken([u8; ACCESS_TOKEN_LEN]);

/// What one provider is shown of a token: SHA-256 of `"mixsocks access token v1\0"`, the token and the
/// provider's encryption key. Never zero, which stands for none.
///
/// It is wiped when dropped, shows nothing in `Debug` and compares in constant time.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresentedToken([u8; ACCESS_TOKEN_LEN]);

/// What a provider keeps of a token: SHA-256 of what it is shown, which lets nobody in.
#[derive(Clone, Copy)]
pub struct AccessTokenHash([u8; ACCESS_TOKEN_LEN]);

/// The tokens that a provider knows. Without any it serves nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessTokens(Vec<AccessTokenHash>);

/// More than [`MAX_ACCESS_TOKENS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_ACCESS_TOKENS} access tokens; several people may share one")]
pub struct TooManyAccessTokens;

impl AccessToken {
    /// Draws a new one.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut secret = [0; ACCESS_TOKEN_LEN];
        rng.fill_bytes(&mut secret);
        Self(secret)
    }

    /// Takes the 32 bytes of a token.
    pub fn from_bytes(bytes: [u8; ACCESS_TOKEN_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for whoever is to have it.
    pub fn as_bytes(&self) -> &[u8; ACCESS_TOKEN_LEN] {
        &self.0
    }

    /// What the provider with this encryption key is shown.
    pub fn present(&self, provider: &EncryptionKey) -> PresentedToken {
        let mut hasher = Sha256::new();
        hasher.update(PRESENT_CONTEXT);
        hasher.update(self.0);
        hasher.update(provider.as_bytes());
        PresentedToken(hasher.finalize().into())
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(secret)")
    }
}

impl PresentedToken {
    /// Takes the 32 bytes of the wire; `None` if they are zeros.
    pub fn from_bytes(bytes: [u8; ACCESS_TOKEN_LEN]) -> Option<Self> {
        (bytes != [0; ACCESS_TOKEN_LEN]).then_some(Self(bytes))
    }

    /// The 32 bytes of the wire.
    pub fn as_bytes(&self) -> &[u8; ACCESS_TOKEN_LEN] {
        &self.0
    }

    /// What the provider keeps of it.
    pub fn hash(&self) -> AccessTokenHash {
        AccessTokenHash(Sha256::digest(self.0).into())
    }
}

impl PartialEq for PresentedToken {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for PresentedToken {}

impl fmt::Debug for PresentedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresentedToken(secret)")
    }
}

impl AccessTokenHash {
    /// Takes the 32 bytes of a stored hash.
    pub fn from_bytes(bytes: [u8; ACCESS_TOKEN_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes, for storage at the provider.
    pub fn as_bytes(&self) -> &[u8; ACCESS_TOKEN_LEN] {
        &self.0
    }
}

impl PartialEq for AccessTokenHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for AccessTokenHash {}

impl fmt::Debug for AccessTokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessTokenHash(…)")
    }
}

impl AccessTokens {
    /// Knows the tokens of these hashes.
    ///
    /// # Errors
    /// When there are more than [`MAX_ACCESS_TOKENS`].
    pub fn new(
        hashes: impl IntoIterator<Item = AccessTokenHash>,
    ) -> Result<Self, TooManyAccessTokens> {
        let hashes: Vec<_> = hashes.into_iter().take(MAX_ACCESS_TOKENS + 1).collect();
        if hashes.len() > MAX_ACCESS_TOKENS { Err(TooManyAccessTokens) } else { Ok(Self(hashes)) }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none, so that nobody is served.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them has this hash; takes as long for each answer.
    pub fn know(&self, hash: &AccessTokenHash) -> bool {
        let none = Choice::from(0);
        self.0.iter().fold(none, |found, known| found | known.0.ct_eq(&hash.0)).into()
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_sphinx::SecretKey;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn key(rng: &mut StdRng) -> EncryptionKey {
        SecretKey::generate(rng).public_key().into()
    }

    #[test]
    fn a_token_opens_the_providers_that_know_it() {
        let mut rng = StdRng::seed_from_u64(1);
        let (here, there) = (key(&mut rng), key(&mut rng));
        let [first, second, other] = [(); 3].map(|()| AccessToken::generate(&mut rng));
        let hashes = [&first, &second].map(|token| token.present(&here).hash());
        let known = AccessTokens::new(hashes).unwrap();
        for (token, provider, is_known) in [
            (&first, &here, true),
            (&second, &here, true),
            (&other, &here, false),
            // What another provider was shown is worth nothing here.
            (&first, &there, false),
        ] {
            assert_eq!(known.know(&token.present(provider).hash()), is_known);
        }
        // Nor is what the provider has on its disk.
        let stolen = PresentedToken::from_bytes(*hashes[0].as_bytes()).unwrap();
        assert!(!known.know(&stolen.hash()));
        assert!(!AccessTokens::default().know(&hashes[0]), "no token is no open door");
    }

    #[test]
    fn what_is_shown_and_kept_is_known() {
        let token = AccessToken::from_bytes([7; ACCESS_TOKEN_LEN]);
        let mut base_point = [0; ACCESS_TOKEN_LEN];
        base_point[0] = 9;
        let presented = token.present(&EncryptionKey::from_bytes(base_point).unwrap());
        // Computed apart from this code.
        let text = |bytes: &[u8; 32]| bs58::encode(bytes).into_string();
        assert_eq!(text(presented.as_bytes()), "Cdxye77AAaeQctw6xZfExew42nuLmr2bh3MpdR7thh5H");
        assert_eq!(
            text(presented.hash().as_bytes()),
            "28abFVTH9qUuKtDLUH9nq4dMPNENtreyY7wRMbzzwCn5"
        );
    }

    #[test]
    fn tokens_have_a_bound() {
        let hash = |n: usize| {
            let mut bytes = [0; ACCESS_TOKEN_LEN];
            bytes[..8].copy_from_slice(&n.to_be_bytes());
            AccessTokenHash::from_bytes(bytes)
        };
        let most = AccessTokens::new((0..MAX_ACCESS_TOKENS).map(hash)).unwrap();
        assert_eq!(most.len(), MAX_ACCESS_TOKENS);
        assert!(most.know(&hash(MAX_ACCESS_TOKENS - 1)) && !most.know(&hash(MAX_ACCESS_TOKENS)));
        let result = AccessTokens::new((0..=MAX_ACCESS_TOKENS).map(hash));
        assert_eq!(result, Err(TooManyAccessTokens));
    }

    #[test]
    fn nothing_secret_is_shown() {
        let token = AccessToken::from_bytes([7; ACCESS_TOKEN_LEN]);
        let presented = token.present(&key(&mut StdRng::seed_from_u64(1)));
        let shown = format!("{token:?} {presented:?} {:?}", presented.hash());
        assert_eq!(shown, "AccessToken(secret) PresentedToken(secret) AccessTokenHash(…)");
        assert_eq!(PresentedToken::from_bytes([0; ACCESS_TOKEN_LEN]), None);
    }
}
