//! TLS of all links: version 1.3 with the hybrid key exchange X25519MLKEM768 and nothing else,
//! and no certificates: each end shows the raw Ed25519 public key (RFC 7250) that is its identity.
//!
//! There is no web PKI, no server name on the wire, no resumption and no early data: each
//! connection proves both identities afresh. Links between nodes are pinned at both ends; on the
//! link from a client to its gateway only the gateway shows a key here, and the client proves
//! itself inside, at registration.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{
    CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, NamedGroup, OtherError,
    PeerIncompatible, ProtocolVersion, ServerConfig, SignatureScheme,
};
use zeroize::Zeroizing;

use crate::keys::{Identity, IdentityKey, KEY_LEN};

/// The protocol name (ALPN) of links between nodes.
pub const NODE_ALPN: &[u8] = b"mixsocks-link/1";
/// The protocol name (ALPN) of links between a client and its gateway.
///
/// What is spoken first there is an HTTP upgrade to a websocket, and a front that an operator puts
/// before a gateway must be able to pass it on; its own version is in the gateway protocol.
pub const CLIENT_ALPN: &[u8] = b"http/1.1";

/// `SubjectPublicKeyInfo` of an Ed25519 key (RFC 8410 §4) up to the 32 bytes of the key.
const SPKI_PREFIX: [u8; 12] = *b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";
/// PKCS #8 form of an Ed25519 key (RFC 8410 §7) up to the 32 bytes of the seed.
const PKCS8_PREFIX: [u8; 16] = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

/// Why a link cannot be trusted or set up.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// Somebody else than expected answered.
    #[error("the peer should have the identity {expected}, but has {actual}")]
    WrongIdentity {
        /// Who was expected.
        expected: Identity,
        /// Who answered.
        actual: Identity,
    },
    /// The peer proved its identity, but is none of the nodes that may send here.
    #[error("{actual} is no node that may send to this one")]
    NotANeighbour {
        /// Who called.
        actual: Identity,
    },
    /// The peer showed a key that is not a raw Ed25519 public key, or none.
    #[error("the peer showed no Ed25519 public key")]
    NoIdentity,
    /// The ends have not agreed on the protocol or the key exchange that this link needs.
    #[error("the peer did not agree to the protocol of this link")]
    WrongProtocol,
    /// The handshake failed for another reason.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
}

impl From<rustls::Error> for LinkError {
    /// Finds the reason that one of our verifiers gave inside the error of the handshake.
    fn from(error: rustls::Error) -> Self {
        match &error {
            rustls::Error::Other(OtherError(inner)) => {
                inner.downcast_ref::<Self>().cloned().unwrap_or(Self::Tls(error))
            }
            // Either the peer takes no raw keys, or it does not show one.
            rustls::Error::NoCertificatesPresented
            | rustls::Error::PeerIncompatible(
                PeerIncompatible::IncorrectCertificateTypeExtension,
            ) => Self::NoIdentity,
            _ => Self::Tls(error),
        }
    }
}

impl LinkError {
    /// The link error inside an I/O error of a TLS stream, if there is one.
    pub fn from_io(error: &io::Error) -> Option<Self> {
        let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
        Some(Self::from(inner.clone()))
    }

    fn into_tls(self) -> rustls::Error {
        rustls::Error::Other(OtherError(Arc::new(self)))
    }
}

/// For the node that is dialled: shows `key`, and lets in only identities that `allowed` accepts.
///
/// # Errors
/// [`LinkError::Tls`] when the library refuses the key.
pub fn node_server_config(
    key: &IdentityKey,
    allowed: impl Fn(&Identity) -> bool + Send + Sync + 'static,
) -> Result<Arc<ServerConfig>, LinkError> {
    let provider = provider();
    let verifier =
        Arc::new(NeighbourVerifier { allowed: Box::new(allowed), provider: provider.clone() });
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(server_key(key)?);
    Ok(finish_server(config, NODE_ALPN))
}

/// For the node that dials: shows `key`, and accepts only `expected`.
///
/// # Errors
/// [`LinkError::Tls`] when the library refuses the key.
pub fn node_client_config(
    key: &IdentityKey,
    expected: Identity,
) -> Result<Arc<ClientConfig>, LinkError> {
    let provider = provider();
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedVerifier { expected, provider }))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::new(
            certified_key(key)?,
        ))));
    Ok(finish_client(config, NODE_ALPN))
}

/// For a gateway towards clients: shows `key`, and asks clients for none.
///
/// # Errors
/// [`LinkError::Tls`] when the library refuses the key.
pub fn gateway_server_config(key: &IdentityKey) -> Result<Arc<ServerConfig>, LinkError> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(server_key(key)?);
    Ok(finish_server(config, CLIENT_ALPN))
}

/// For a client: accepts only the gateway `expected`, and shows no key.
///
/// # Errors
/// [`LinkError::Tls`] when the library refuses the parameters.
pub fn gateway_client_config(expected: Identity) -> Result<Arc<ClientConfig>, LinkError> {
    let provider = provider();
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedVerifier { expected, provider }))
        .with_no_client_auth();
    Ok(finish_client(config, CLIENT_ALPN))
}

/// The server name that the TLS library wants for a dialled connection. It is never sent.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("mixsocks.invalid").expect("a valid name")
}

/// Checks a finished handshake, at either end: protocol `alpn`, version and key exchange.
///
/// A peer that offers no protocol name at all is let through by the handshake itself, so every link
/// is to be checked before its first byte is used.
///
/// # Errors
/// [`LinkError::WrongProtocol`].
pub fn check_protocol(connection: &CommonState, alpn: &[u8]) -> Result<(), LinkError> {
    let exchange = connection.negotiated_key_exchange_group().map(|group| group.name());
    let agreed = connection.alpn_protocol() == Some(alpn)
        && connection.protocol_version() == Some(ProtocolVersion::TLSv1_3)
        && exchange == Some(NamedGroup::X25519MLKEM768);
    if agreed { Ok(()) } else { Err(LinkError::WrongProtocol) }
}

/// Who is at the other end of a finished handshake.
///
/// # Errors
/// [`LinkError::NoIdentity`] when the peer has shown no key, as clients do towards their gateway.
pub fn peer_identity(connection: &CommonState) -> Result<Identity, LinkError> {
    match connection.peer_certificates() {
        Some([key]) => parse_spki(key),
        _ => Err(LinkError::NoIdentity),
    }
}

fn finish_server(mut config: ServerConfig, alpn: &[u8]) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Arc::new(config)
}

fn finish_client(mut config: ClientConfig, alpn: &[u8]) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_early_data = false;
    Arc::new(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768],
        ..aws_lc_rs::default_provider()
    })
}

fn server_key(key: &IdentityKey) -> Result<Arc<AlwaysResolvesServerRawPublicKeys>, LinkError> {
    Ok(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(certified_key(key)?))))
}

fn certified_key(key: &IdentityKey) -> Result<CertifiedKey, LinkError> {
    let mut pkcs8 = Zeroizing::new([0u8; PKCS8_PREFIX.len() + KEY_LEN]);
    pkcs8[..PKCS8_PREFIX.len()].copy_from_slice(&PKCS8_PREFIX);
    pkcs8[PKCS8_PREFIX.len()..].copy_from_slice(key.to_bytes().as_ref());
    let signer = aws_lc_rs::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(&pkcs8[..]))?;
    let mut spki = SPKI_PREFIX.to_vec();
    spki.extend_from_slice(key.identity().as_bytes());
    Ok(CertifiedKey::new(vec![CertificateDer::from(spki)], signer))
}

/// The identity in a `SubjectPublicKeyInfo`: exactly the one encoding of an Ed25519 key.
fn parse_spki(spki: &[u8]) -> Result<Identity, LinkError> {
    let key = spki.strip_prefix(&SPKI_PREFIX).ok_or(LinkError::NoIdentity)?;
    let key = <[u8; KEY_LEN]>::try_from(key).map_err(|_| LinkError::NoIdentity)?;
    Identity::from_bytes(key).map_err(|_| LinkError::NoIdentity)
}

/// The identity in a certificate message, which must hold one raw key and nothing else.
fn shown_identity(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<Identity, LinkError> {
    if !intermediates.is_empty() {
        return Err(LinkError::NoIdentity);
    }
    parse_spki(end_entity)
}

fn verify_signature(
    provider: &CryptoProvider,
    message: &[u8],
    key: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    let spki = SubjectPublicKeyInfoDer::from(key.as_ref());
    let algorithms = &provider.signature_verification_algorithms;
    verify_tls13_signature_with_raw_key(message, &spki, signature, algorithms)
}

/// TLS 1.2 is switched off; no signature of it is good.
fn no_tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled)
}

/// Accepts one server.
#[derive(Debug)]
struct PinnedVerifier {
    expected: Identity,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let actual = shown_identity(end_entity, intermediates).map_err(LinkError::into_tls)?;
        if actual != self.expected {
            let expected = self.expected;
            return Err(LinkError::WrongIdentity { expected, actual }.into_tls());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Accepts the nodes that may send here.
struct NeighbourVerifier {
    allowed: Box<dyn Fn(&Identity) -> bool + Send + Sync>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for NeighbourVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NeighbourVerifier").finish_non_exhaustive()
    }
}

impl ClientCertVerifier for NeighbourVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let actual = shown_identity(end_entity, intermediates).map_err(LinkError::into_tls)?;
        if !(self.allowed)(&actual) {
            return Err(LinkError::NotANeighbour { actual }.into_tls());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConnection, ServerConnection};

    fn key(seed: u8) -> IdentityKey {
        IdentityKey::from_bytes(&[seed; KEY_LEN])
    }

    struct Pair {
        client: ClientConnection,
        server: ServerConnection,
    }

    /// What both ends say when the handshake is over.
    struct Outcome {
        pair: Pair,
        client: Result<(), LinkError>,
        server: Result<(), LinkError>,
    }

    /// Carries bytes to and fro until neither end has more to say.
    fn shake_hands(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
        let mut pair = Pair {
            client: ClientConnection::new(client, server_name()).unwrap(),
            server: ServerConnection::new(server).unwrap(),
        };
        let (mut client, mut server) = (Ok(()), Ok(()));
        loop {
            let mut to_server = Vec::new();
            while pair.client.wants_write() {
                pair.client.write_tls(&mut to_server).unwrap();
            }
            let mut to_client = Vec::new();
            if server.is_ok() {
                server = feed(&to_server, |bytes| {
                    pair.server.read_tls(bytes).unwrap();
                    pair.server.process_new_packets().map(|_| ())
                });
            }
            while pair.server.wants_write() {
                pair.server.write_tls(&mut to_client).unwrap();
            }
            if client.is_ok() {
                client = feed(&to_client, |bytes| {
                    pair.client.read_tls(bytes).unwrap();
                    pair.client.process_new_packets().map(|_| ())
                });
            }
            if to_server.is_empty() && to_client.is_empty() {
                return Outcome { pair, client, server };
            }
        }
    }

    fn feed(
        mut bytes: &[u8],
        mut read: impl FnMut(&mut &[u8]) -> Result<(), rustls::Error>,
    ) -> Result<(), LinkError> {
        while !bytes.is_empty() {
            read(&mut bytes)?;
        }
        Ok(())
    }

    fn node_server() -> Arc<ServerConfig> {
        let neighbour = key(1).identity();
        node_server_config(&key(2), move |who| *who == neighbour).unwrap()
    }

    #[test]
    fn nodes_know_each_other_and_use_the_hybrid_exchange() {
        let client = node_client_config(&key(1), key(2).identity()).unwrap();
        let outcome = shake_hands(client, node_server());
        outcome.client.unwrap();
        outcome.server.unwrap();
        let Pair { client, server } = outcome.pair;
        check_protocol(&client, NODE_ALPN).unwrap();
        check_protocol(&server, NODE_ALPN).unwrap();
        assert!(check_protocol(&server, CLIENT_ALPN).is_err());
        assert_eq!(peer_identity(&client).unwrap(), key(2).identity());
        assert_eq!(peer_identity(&server).unwrap(), key(1).identity());
        let mut exported = [[0u8; 32]; 2];
        client.export_keying_material(&mut exported[0], b"label", Some(b"context")).unwrap();
        server.export_keying_material(&mut exported[1], b"label", Some(b"context")).unwrap();
        assert_eq!(exported[0], exported[1]);
        assert_ne!(exported[0], [0; 32]);
    }

    #[test]
    fn a_client_shows_no_key_and_its_gateway_does() {
        let client = gateway_client_config(key(2).identity()).unwrap();
        let outcome = shake_hands(client, gateway_server_config(&key(2)).unwrap());
        outcome.client.unwrap();
        outcome.server.unwrap();
        let Pair { client, server } = outcome.pair;
        check_protocol(&client, CLIENT_ALPN).unwrap();
        check_protocol(&server, CLIENT_ALPN).unwrap();
        assert_eq!(peer_identity(&client).unwrap(), key(2).identity());
        assert!(matches!(peer_identity(&server), Err(LinkError::NoIdentity)));
    }

    #[test]
    fn a_wrong_server_is_refused_and_both_keys_are_named() {
        let (expected, actual) = (key(3).identity(), key(2).identity());
        for outcome in [
            shake_hands(node_client_config(&key(1), expected).unwrap(), node_server()),
            shake_hands(
                gateway_client_config(expected).unwrap(),
                gateway_server_config(&key(2)).unwrap(),
            ),
        ] {
            let error = outcome.client.unwrap_err();
            assert!(
                matches!(error, LinkError::WrongIdentity { expected: e, actual: a }
                    if e == expected && a == actual),
                "{error}"
            );
            let text = error.to_string();
            assert!(text.contains(&expected.to_string()) && text.contains(&actual.to_string()));
            assert!(outcome.server.is_err(), "the server hears of it");
        }
    }

    #[test]
    fn a_wrong_client_is_refused_by_name() {
        let client = node_client_config(&key(4), key(2).identity()).unwrap();
        let outcome = shake_hands(client, node_server());
        let error = outcome.server.unwrap_err();
        assert!(
            matches!(error, LinkError::NotANeighbour { actual } if actual == key(4).identity()),
            "{error}"
        );
        assert!(outcome.client.is_err(), "the client hears of it");
    }

    #[test]
    fn a_client_without_a_key_is_refused() {
        let mut client = (*gateway_client_config(key(2).identity()).unwrap()).clone();
        client.alpn_protocols = vec![NODE_ALPN.to_vec()];
        let outcome = shake_hands(Arc::new(client), node_server());
        assert!(matches!(outcome.server, Err(LinkError::NoIdentity)), "{:?}", outcome.server);
    }

    /// Somebody who shows the right key but does not hold it.
    #[test]
    fn a_key_without_its_secret_is_refused() {
        let mut stolen = certified_key(&key(5)).unwrap();
        stolen.cert = certified_key(&key(1)).unwrap().cert;
        let mut client = (*node_client_config(&key(1), key(2).identity()).unwrap()).clone();
        client.client_auth_cert_resolver =
            Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::new(stolen)));
        let outcome = shake_hands(Arc::new(client), node_server());
        assert!(matches!(outcome.server, Err(LinkError::Tls(_))), "{:?}", outcome.server);

        let mut stolen = certified_key(&key(5)).unwrap();
        stolen.cert = certified_key(&key(2)).unwrap().cert;
        let mut server = (*gateway_server_config(&key(2)).unwrap()).clone();
        server.cert_resolver = Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(stolen)));
        let client = gateway_client_config(key(2).identity()).unwrap();
        let outcome = shake_hands(client, Arc::new(server));
        assert!(matches!(outcome.client, Err(LinkError::Tls(_))), "{:?}", outcome.client);
    }

    #[test]
    fn x25519_alone_is_refused() {
        let x25519_only =
            Arc::new(CryptoProvider { kx_groups: vec![kx_group::X25519], ..(*provider()).clone() });
        let verifier =
            Arc::new(PinnedVerifier { expected: key(2).identity(), provider: x25519_only.clone() });
        let mut client = ClientConfig::builder_with_provider(x25519_only)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(Arc::new(
                certified_key(&key(1)).unwrap(),
            ))));
        client.alpn_protocols = vec![NODE_ALPN.to_vec(), CLIENT_ALPN.to_vec()];
        let client = Arc::new(client);
        for server in [node_server(), gateway_server_config(&key(2)).unwrap()] {
            let outcome = shake_hands(client.clone(), server);
            assert!(outcome.server.is_err());
            assert!(outcome.client.is_err());
        }
    }

    #[test]
    fn a_node_link_is_no_client_link() {
        let client = gateway_client_config(key(2).identity()).unwrap();
        assert!(shake_hands(client, node_server()).server.is_err());
        let client = node_client_config(&key(1), key(2).identity()).unwrap();
        let server = gateway_server_config(&key(2)).unwrap();
        assert!(shake_hands(client, server).server.is_err());
    }

    /// The handshake lets a peer without a protocol name pass; the check afterwards does not.
    #[test]
    fn a_peer_without_a_protocol_is_found_out() {
        let mut client = (*node_client_config(&key(1), key(2).identity()).unwrap()).clone();
        client.alpn_protocols.clear();
        let outcome = shake_hands(Arc::new(client), node_server());
        outcome.server.unwrap();
        let error = check_protocol(&outcome.pair.server, NODE_ALPN).unwrap_err();
        assert!(matches!(error, LinkError::WrongProtocol));
    }

    #[test]
    fn nothing_is_resumed() {
        let client = node_client_config(&key(1), key(2).identity()).unwrap();
        let server = node_server();
        for _ in 0..2 {
            let outcome = shake_hands(client.clone(), server.clone());
            outcome.server.unwrap();
            let kind = outcome.pair.client.handshake_kind();
            assert_eq!(kind, Some(rustls::HandshakeKind::Full));
            assert_eq!(outcome.pair.client.tls13_tickets_received(), 0);
        }
    }

    /// The name that the library wants is a constant, and must not become a fingerprint.
    #[test]
    fn no_server_name_is_sent() {
        let client = gateway_client_config(key(2).identity()).unwrap();
        let mut client = ClientConnection::new(client, server_name()).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        assert!(!hello.windows(8).any(|window| window == b"mixsocks"));
    }

    #[test]
    fn only_the_one_encoding_of_a_good_key_is_an_identity() {
        let spki = certified_key(&key(1)).unwrap().cert[0].to_vec();
        assert_eq!(parse_spki(&spki).unwrap(), key(1).identity());
        for len in 0..spki.len() {
            assert!(parse_spki(&spki[..len]).is_err());
        }
        assert!(parse_spki(&[&spki[..], &[0]].concat()).is_err());
        let mut x25519 = spki.clone();
        x25519[8] = 0x6e;
        assert!(parse_spki(&x25519).is_err());
        let neutral = [&SPKI_PREFIX[..], &[1], &[0; 31]].concat();
        assert!(parse_spki(&neutral).is_err(), "a point of low order");
    }
}
