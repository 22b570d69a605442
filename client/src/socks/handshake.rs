//! From the first byte on the port to the target of a CONNECT.

use std::fmt;
use std::io;

use bytes::Bytes;
use fast_socks5::Socks5Command;
use fast_socks5::server::{
    Socks5ServerProtocol, SocksServerError, StandardAuthentication, StandardAuthenticationStarted,
};
use fast_socks5::util::target_addr::{AddrError, TargetAddr};
use mixsocks_common::session::OpenOutcome;
use mixsocks_common::target::{Target, TargetError};
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, sink};
use zeroize::Zeroizing;

use super::rewind::Rewind;

/// Longest user name and longest password in bytes (RFC 1929 §2).
pub const MAX_CREDENTIAL_LEN: usize = 255;

/// Longest HTTP method that is recognised; the registered ones have up to 17 letters, those that
/// programs send to a proxy up to 8.
const MAX_METHOD_LEN: usize = 17;

const SOCKS4_VERSION: u8 = 4;
const SOCKS5_VERSION: u8 = 5;
const PASSWORD_VERSION: u8 = 1;
const COMMAND_NOT_SUPPORTED: u8 = 7;
const ADDRESS_TYPE_NOT_SUPPORTED: u8 = 8;

const PASSWORD_ACCEPTED: [u8; 2] = [PASSWORD_VERSION, 0];
const PASSWORD_REJECTED: [u8; 2] = [PASSWORD_VERSION, 1];
/// "Request rejected or failed"; the rest of the reply has no meaning.
const SOCKS4_REJECTED: [u8; 8] = [0, 0x5b, 0, 0, 0, 0, 0, 0];
const HTTP_ANSWER: &str = "HTTP/1.1 400 Bad Request\r\n\
    Content-Type: text/plain; charset=utf-8\r\n\
    Content-Length: 60\r\n\
    Connection: close\r\n\
    \r\n\
    This is a SOCKS5 proxy port: set it as SOCKS5, not as HTTP.\n";

/// The user name and password that programs must give.
pub struct Credentials {
    user: Zeroizing<Vec<u8>>,
    password: Zeroizing<Vec<u8>>,
}

/// A user name or password has no form that SOCKS5 can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a user name and a password have 1 to {MAX_CREDENTIAL_LEN} bytes each, not {0}")]
pub struct CredentialLength(pub usize);

/// How a handshake ended without a target. No text holds a target or credentials.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("the connection broke during the handshake: {}", .0.kind())]
    Io(#[from] io::Error),
    #[error("the program speaks HTTP")]
    Http,
    #[error("the program speaks SOCKS4")]
    Socks4,
    #[error("the program speaks no known protocol")]
    UnknownProtocol,
    #[error("the program offers no acceptable authentication")]
    NoAcceptableMethod,
    #[error("wrong user name or password")]
    WrongCredentials,
    #[error("the program asks for something other than CONNECT")]
    Command,
    #[error("unknown address type")]
    AddressType,
    #[error("unusable host name: {0}")]
    HostName(TargetError),
    #[error("the handshake violates SOCKS5")]
    Malformed,
}

impl Credentials {
    /// Credentials of 1 to 255 bytes each.
    ///
    /// # Errors
    /// [`CredentialLength`] for others.
    pub fn new(user: &str, password: &str) -> Result<Self, CredentialLength> {
        for text in [user, password] {
            if text.is_empty() || text.len() > MAX_CREDENTIAL_LEN {
                return Err(CredentialLength(text.len()));
            }
        }
        Ok(Self {
            user: Zeroizing::new(user.as_bytes().to_vec()),
            password: Zeroizing::new(password.as_bytes().to_vec()),
        })
    }

    /// Compares in a time that depends on neither.
    fn fit(&self, user: &[u8], password: &[u8]) -> bool {
        let user = padded(&self.user).ct_eq(&*padded(user));
        let password = padded(&self.password).ct_eq(&*padded(password));
        (user & password).into()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(secret)")
    }
}

/// Length and bytes in an array of one size, so that comparing does not show the length.
fn padded(text: &[u8]) -> Zeroizing<[u8; 1 + MAX_CREDENTIAL_LEN]> {
    let mut array = Zeroizing::new([0; 1 + MAX_CREDENTIAL_LEN]);
    // Both come from fields with a length of one byte.
    array[0] = u8::try_from(text.len()).unwrap_or(u8::MAX);
    let len = text.len().min(MAX_CREDENTIAL_LEN);
    array[1..=len].copy_from_slice(&text[..len]);
    array
}

/// The reply to a request (RFC 1928 §6): version, code, reserved, then the bound address, which is
/// always `0.0.0.0:0`, since the provider's address is nobody's business.
pub(super) fn reply(code: u8) -> [u8; 10] {
    [SOCKS5_VERSION, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

impl HandshakeError {
    /// What the program is still told; errors that the SOCKS5 crate answers itself have nothing.
    pub(super) fn answer(&self) -> Bytes {
        let code = match self {
            Self::Http => return Bytes::from_static(HTTP_ANSWER.as_bytes()),
            Self::Socks4 => return Bytes::from_static(&SOCKS4_REJECTED),
            Self::WrongCredentials => return Bytes::from_static(&PASSWORD_REJECTED),
            Self::Io(_) | Self::UnknownProtocol | Self::NoAcceptableMethod | Self::Malformed => {
                return Bytes::new();
            }
            Self::Command => COMMAND_NOT_SUPPORTED,
            Self::AddressType => ADDRESS_TYPE_NOT_SUPPORTED,
            Self::HostName(_) => OpenOutcome::HostUnreachable.code(),
        };
        Bytes::copy_from_slice(&reply(code))
    }
}

impl From<SocksServerError> for HandshakeError {
    fn from(error: SocksServerError) -> Self {
        match error {
            SocksServerError::Io { source, .. } => Self::Io(source),
            SocksServerError::AuthMethodUnacceptable(_) => Self::NoAcceptableMethod,
            SocksServerError::UnknownCommand(_) => Self::Command,
            SocksServerError::AddrError(error) => match error {
                AddrError::IncorrectAddressType => Self::AddressType,
                AddrError::Utf8(_) => Self::HostName(TargetError::HostCharacter),
                AddrError::IPv4Unreadable(error)
                | AddrError::IPv6Unreadable(error)
                | AddrError::DomainLenUnreadable(error)
                | AddrError::DomainContentUnreadable(error)
                | AddrError::PortNumberUnreadable(error) => Self::Io(error),
                _ => Self::Malformed,
            },
            _ => Self::Malformed,
        }
    }
}

/// Speaks SOCKS5 up to the request, and tells other protocols apart.
///
/// With `required` credentials the program must give these; without, it may give any or none.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Send + Unpin>(
    stream: &mut Rewind<S>,
    required: Option<&Credentials>,
) -> Result<Target, HandshakeError> {
    match stream.peek(1).await?.first().copied() {
        Some(SOCKS5_VERSION) => {}
        Some(SOCKS4_VERSION) => return Err(HandshakeError::Socks4),
        Some(_) if is_http(stream).await? => return Err(HandshakeError::Http),
        Some(_) => return Err(HandshakeError::UnknownProtocol),
        None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    }
    let methods = StandardAuthentication::allow_no_auth(required.is_none());
    let method = Socks5ServerProtocol::start(&mut *stream).negotiate_auth(methods).await?;
    match method {
        StandardAuthenticationStarted::NoAuthentication(_) => {}
        StandardAuthenticationStarted::PasswordAuthentication(_) => {
            exchange_password(stream, required).await?;
        }
    }
    // Who the program is has been settled above. The crate would write replies of its own to the
    // errors found here, some with codes that mislead (a bad name as "refused"): they go nowhere.
    let requests = tokio::io::join(&mut *stream, sink());
    let requests = Socks5ServerProtocol::skip_auth_this_is_not_rfc_compliant(requests);
    let (_, command, target) = requests.read_command().await?;
    if command != Socks5Command::TCPConnect {
        return Err(HandshakeError::Command);
    }
    match target {
        TargetAddr::Ip(address) => Ok(Target::Ip(address)),
        TargetAddr::Domain(name, port) => {
            Target::new(&name, port).map_err(HandshakeError::HostName)
        }
    }
}

/// RFC 1929, by hand: the SOCKS5 crate closes on an empty password, which some programs send when
/// they have none, and it logs what it reads.
async fn exchange_password<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut Rewind<S>,
    required: Option<&Credentials>,
) -> Result<(), HandshakeError> {
    if stream.read_u8().await? != PASSWORD_VERSION {
        return Err(HandshakeError::Malformed);
    }
    let user = read_field(stream).await?;
    let password = read_field(stream).await?;
    if required.is_some_and(|required| !required.fit(&user, &password)) {
        return Err(HandshakeError::WrongCredentials);
    }
    stream.write_all(&PASSWORD_ACCEPTED).await?;
    stream.flush().await?;
    Ok(())
}

async fn read_field<S: AsyncRead + Unpin>(
    stream: &mut Rewind<S>,
) -> io::Result<Zeroizing<Vec<u8>>> {
    let len = stream.read_u8().await?;
    let mut field = Zeroizing::new(vec![0; len.into()]);
    stream.read_exact(&mut field).await?;
    Ok(field)
}

/// Whether the bytes begin with a method and a space.
async fn is_http<S: AsyncRead + Unpin>(stream: &mut Rewind<S>) -> io::Result<bool> {
    for at in 0..=MAX_METHOD_LEN {
        match stream.peek(at + 1).await?.get(at) {
            Some(b'A'..=b'Z') => {}
            Some(b' ') => return Ok(at > 0),
            _ => return Ok(false),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_http_answer_has_the_length_that_it_states() {
        let (head, body) = HTTP_ANSWER.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
    }

    #[test]
    fn credentials() {
        let right = Credentials::new("user", "password").unwrap();
        assert!(right.fit(b"user", b"password"));
        for (user, password) in [
            ("user", "Password"),
            ("User", "password"),
            ("user", "password\0"),
            ("user\0", "password"),
            ("use", "rpassword"),
            ("", ""),
        ] {
            assert!(!right.fit(user.as_bytes(), password.as_bytes()));
        }
        let long = "x".repeat(MAX_CREDENTIAL_LEN);
        assert!(Credentials::new(&long, &long).unwrap().fit(long.as_bytes(), long.as_bytes()));
        assert_eq!(Credentials::new("", "x").unwrap_err(), CredentialLength(0));
        assert_eq!(Credentials::new("x", &format!("{long}x")).unwrap_err(), CredentialLength(256));
        assert!(!format!("{right:?}").contains("user") && !format!("{right:?}").contains("word"));
    }
}
