//! What a signature or a masked token is bound to, so that it is worth nothing anywhere else.

use std::fmt;

use crate::keys::{Identity, KEY_LEN};

/// Bytes of a nonce.
pub const NONCE_LEN: usize = 32;

/// Bytes of a TLS exporter (RFC 8446 §7.5).
pub const EXPORTER_LEN: usize = 32;

/// Label of the TLS exporter, with no context value.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-mixsocks-register";

/// Bytes of a [`Transcript`].
pub const TRANSCRIPT_LEN: usize = 2 * KEY_LEN + 2 * NONCE_LEN + 1 + EXPORTER_LEN;

const REGISTER_CONTEXT: &[u8] = b"mixsocks register v1\0";

/// Whether both ends hold the same TLS session.
///
/// It is a fact that each end knows about its own connection and never a choice that the other end
/// could talk it out of: the client refuses a gateway that states another kind, the gateway refuses
/// a signature of another kind, and the signature covers the kind.
#[derive(Clone, PartialEq, Eq)]
pub enum Binding {
    /// Both hold it; the value that both derive from it.
    Session([u8; EXPORTER_LEN]),
    /// A front with a web certificate ends the client's TLS session.
    Front,
}

impl Binding {
    /// The kind on the wire.
    pub fn kind(&self) -> BindingKind {
        match self {
            Self::Session(_) => BindingKind::Session,
            Self::Front => BindingKind::Front,
        }
    }
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Binding::{:?}", self.kind())
    }
}

/// The kind of a [`Binding`]: one byte on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BindingKind {
    /// See [`Binding::Front`].
    Front = 0,
    /// See [`Binding::Session`].
    Session = 1,
}

impl BindingKind {
    /// Parses the byte of the wire.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Front),
            1 => Some(Self::Session),
            _ => None,
        }
    }
}

/// The one connection of one client to one gateway.
///
/// | offset | length | |
/// |--:|--:|---|
/// | 0 | 32 | the gateway's identity |
/// | 32 | 32 | the client's identity |
/// | 64 | 32 | the client's nonce |
/// | 96 | 32 | the gateway's nonce |
/// | 128 | 1 | [`BindingKind`] |
/// | 129 | 32 | the TLS exporter, or zeros behind a front |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transcript {
    /// The gateway as the client knows it from the topology, never as the gateway says.
    pub gateway: Identity,
    /// The client.
    pub client: Identity,
    /// Drawn by the client for this connection.
    pub client_nonce: [u8; NONCE_LEN],
    /// Drawn by the gateway for this connection.
    pub gateway_nonce: [u8; NONCE_LEN],
    /// The TLS session.
    pub binding: Binding,
}

impl Transcript {
    /// The bytes of the layout above.
    pub fn to_bytes(&self) -> [u8; TRANSCRIPT_LEN] {
        let exporter = match &self.binding {
            Binding::Session(exporter) => *exporter,
            Binding::Front => [0; EXPORTER_LEN],
        };
        let kind = [self.binding.kind() as u8];
        let parts: [&[u8]; 6] = [
            self.gateway.as_bytes(),
            self.client.as_bytes(),
            &self.client_nonce,
            &self.gateway_nonce,
            &kind,
            &exporter,
        ];
        let mut bytes = [0u8; TRANSCRIPT_LEN];
        let mut at = 0;
        for part in parts {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        bytes
    }

    /// What the client signs to register: `"mixsocks register v1\0"`, then the transcript.
    pub fn registration(&self) -> Vec<u8> {
        [REGISTER_CONTEXT, &self.to_bytes()].concat()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rand::Rng;

    use super::*;
    use crate::keys::IdentityKey;

    pub(in super::super) fn transcript() -> Transcript {
        let mut rng = rand::rng();
        let mut nonces = [[0u8; NONCE_LEN]; 3];
        nonces.iter_mut().for_each(|nonce| rng.fill_bytes(nonce));
        Transcript {
            gateway: IdentityKey::generate(&mut rng).identity(),
            client: IdentityKey::generate(&mut rng).identity(),
            client_nonce: nonces[0],
            gateway_nonce: nonces[1],
            binding: Binding::Session(nonces[2]),
        }
    }

    #[test]
    fn every_part_counts() {
        let one = transcript();
        let two = transcript();
        let variants = [
            Transcript { gateway: two.gateway, ..one.clone() },
            Transcript { client: two.client, ..one.clone() },
            Transcript { client_nonce: two.client_nonce, ..one.clone() },
            Transcript { gateway_nonce: two.gateway_nonce, ..one.clone() },
            Transcript { binding: two.binding, ..one.clone() },
            Transcript { binding: Binding::Front, ..one.clone() },
        ];
        for variant in variants {
            assert_ne!(variant.to_bytes(), one.to_bytes());
        }
        // A session whose exporter is zero is still no front.
        let zero = Transcript { binding: Binding::Session([0; EXPORTER_LEN]), ..one.clone() };
        let front = Transcript { binding: Binding::Front, ..one };
        assert_ne!(zero.to_bytes(), front.to_bytes());
    }

    #[test]
    fn debug_hides_the_exporter() {
        assert_eq!(format!("{:?}", Binding::Session([7; 32])), "Binding::Session");
    }
}
