//! Access tokens: a private provider, its friends, and strangers.

use mixsocks_common::keys::EncryptionKey;
use mixsocks_common::session::{ACCESS_TOKEN_LEN, AccessToken, AccessTokens, PresentedToken};
use rand::RngExt;
use rand::rngs::StdRng;

/// Who may use the provider, and what clients show it.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    is_private: bool,
    /// Of each client, the first one first.
    badges: Vec<Badge>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Badge {
    Right,
    Wrong,
    None,
}

impl Access {
    /// The provider serves everybody.
    pub(crate) fn public() -> Self {
        Self { is_private: false, badges: Vec::new() }
    }

    pub(crate) fn draw(rng: &mut StdRng, clients: usize) -> Self {
        let badge = |rng: &mut StdRng| match rng.random_range(0..5) {
            0 => Badge::Wrong,
            1 => Badge::None,
            _ => Badge::Right,
        };
        Self {
            is_private: rng.random_bool(0.3),
            badges: (0..clients).map(|_| badge(rng)).collect(),
        }
    }

    /// Whether the provider serves everybody.
    pub(crate) fn is_public(&self) -> bool {
        !self.is_private
    }

    /// Whether the provider serves this client.
    pub(crate) fn serves(&self, client: usize) -> bool {
        !self.is_private || self.badges[client - 1] == Badge::Right
    }

    /// What the provider with this key demands.
    pub(crate) fn demanded(&self, provider: &EncryptionKey) -> Option<AccessTokens> {
        let known = [1, 3].map(|number| token(number).present(provider).hash());
        self.is_private.then(|| AccessTokens::new(known).expect("few of them"))
    }

    /// What this client shows the provider with this key.
    pub(crate) fn shown(&self, client: usize, provider: &EncryptionKey) -> Option<PresentedToken> {
        match self.badges.get(client - 1)? {
            Badge::Right => Some(token(1).present(provider)),
            Badge::Wrong => Some(token(2).present(provider)),
            Badge::None => None,
        }
    }
}

fn token(number: u8) -> AccessToken {
    AccessToken::from_bytes([number; ACCESS_TOKEN_LEN])
}
