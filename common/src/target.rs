//! What a stream is opened to: an IP address or a host name, and a port.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use bytes::BufMut;

/// Longest host name in bytes (RFC 1035 §2.3.4).
pub const MAX_HOST_LEN: usize = 253;

/// Longest encoded target: type, length, host name, port.
pub const MAX_TARGET_LEN: usize = 1 + 1 + MAX_HOST_LEN + 2;

const TYPE_IPV4: u8 = 1;
const TYPE_HOST: u8 = 3;
const TYPE_IPV6: u8 = 4;

/// Where the provider shall connect.
///
/// On the wire as in RFC 1928 §4: type (1 byte: 1 IPv4, 3 host name, 4 IPv6), address (4 bytes;
/// length byte and name; 16 bytes), port (2 bytes, big endian).
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// An IP address and a port.
    Ip(SocketAddr),
    /// A name, which the provider resolves, and a port.
    Host(HostName, u16),
}

/// A name of 1 to 253 visible ASCII characters. Whether it resolves is the provider's business.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HostName(Box<str>);

/// Why something is not a target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The name is empty or longer than 253 bytes.
    #[error("a host name has 1 to {MAX_HOST_LEN} bytes, not {0}")]
    HostLength(usize),
    /// The name holds a space, a bracket, a control character or one outside ASCII.
    #[error("a host name holds visible ASCII characters only (write other scripts as punycode)")]
    HostCharacter,
    /// There is no `:port`, or it is not a number from 1 to 65535.
    #[error("a target has the form host:port, with a port from 1 to 65535")]
    Port,
    /// The bytes end too early.
    #[error("the target is cut short")]
    Truncated,
    /// The type byte is none of 1, 3 and 4.
    #[error("address type {0} is unknown")]
    UnknownType(u8),
}

impl HostName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`TargetError::HostLength`] and [`TargetError::HostCharacter`].
    pub fn new(name: &str) -> Result<Self, TargetError> {
        if name.is_empty() || name.len() > MAX_HOST_LEN {
            return Err(TargetError::HostLength(name.len()));
        }
        // Brackets stand around IPv6 addresses, and in no name.
        let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'[' | b']');
        if !name.bytes().all(allowed) {
            return Err(TargetError::HostCharacter);
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Target {
    /// A target of a host and a port; a host that is an IP address becomes [`Target::Ip`].
    ///
    /// # Errors
    /// See [`HostName::new`].
    pub fn new(host: &str, port: u16) -> Result<Self, TargetError> {
        match host.parse::<IpAddr>() {
            Ok(ip) => Ok(Self::Ip(SocketAddr::new(ip, port))),
            Err(_) => Ok(Self::Host(HostName::new(host)?, port)),
        }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Ip(address) => address.port(),
            Self::Host(_, port) => *port,
        }
    }

    /// Bytes that [`Target::encode`] writes.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Ip(SocketAddr::V4(_)) => 1 + 4 + 2,
            Self::Ip(SocketAddr::V6(_)) => 1 + 16 + 2,
            Self::Host(name, _) => 1 + 1 + name.0.len() + 2,
        }
    }

    /// Appends the wire format.
    pub fn encode(&self, out: &mut impl BufMut) {
        match self {
            Self::Ip(SocketAddr::V4(address)) => {
                out.put_u8(TYPE_IPV4);
                out.put_slice(&address.ip().octets());
            }
            Self::Ip(SocketAddr::V6(address)) => {
                out.put_u8(TYPE_IPV6);
                out.put_slice(&address.ip().octets());
            }
            Self::Host(name, _) => {
                out.put_u8(TYPE_HOST);
                // At most MAX_HOST_LEN, by construction.
                out.put_u8(u8::try_from(name.0.len()).unwrap_or(u8::MAX));
                out.put_slice(name.0.as_bytes());
            }
        }
        out.put_u16(self.port());
    }

    /// Reads a target from the front of `input` and moves `input` past it.
    ///
    /// # Errors
    /// When the bytes are not a target; `input` is then where the error was found.
    pub fn decode(input: &mut &[u8]) -> Result<Self, TargetError> {
        fn take<'a>(input: &mut &'a [u8], n: usize) -> Result<&'a [u8], TargetError> {
            input.split_off(..n).ok_or(TargetError::Truncated)
        }
        fn array<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], TargetError> {
            let mut bytes = [0u8; N];
            bytes.copy_from_slice(take(input, N)?);
            Ok(bytes)
        }
        fn port(input: &mut &[u8]) -> Result<u16, TargetError> {
            Ok(u16::from_be_bytes(array(input)?))
        }
        match array::<1>(input)?[0] {
            TYPE_IPV4 => {
                let ip = Ipv4Addr::from(array::<4>(input)?);
                Ok(Self::Ip(SocketAddr::new(ip.into(), port(input)?)))
            }
            TYPE_IPV6 => {
                let ip = Ipv6Addr::from(array::<16>(input)?);
                Ok(Self::Ip(SocketAddr::new(ip.into(), port(input)?)))
            }
            TYPE_HOST => {
                let len = array::<1>(input)?[0];
                let name = take(input, len.into())?;
                let name = std::str::from_utf8(name).map_err(|_| TargetError::HostCharacter)?;
                let name = HostName::new(name)?;
                Ok(Self::Host(name, port(input)?))
            }
            unknown => Err(TargetError::UnknownType(unknown)),
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    /// Parses `host:port`; an IPv6 address stands in brackets.
    fn from_str(text: &str) -> Result<Self, TargetError> {
        let (host, port) = text.rsplit_once(':').ok_or(TargetError::Port)?;
        let port: u16 = port.parse().map_err(|_| TargetError::Port)?;
        if port == 0 {
            return Err(TargetError::Port);
        }
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        Self::new(host, port)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => write!(f, "{address}"),
            Self::Host(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(target: &Target) {
        let mut bytes = Vec::new();
        target.encode(&mut bytes);
        assert_eq!(bytes.len(), target.encoded_len());
        assert!(bytes.len() <= MAX_TARGET_LEN);
        let mut input = &bytes[..];
        assert_eq!(Target::decode(&mut input).as_ref(), Ok(target));
        assert!(input.is_empty());
        for end in 0..bytes.len() {
            assert_eq!(Target::decode(&mut &bytes[..end]), Err(TargetError::Truncated));
        }
    }

    #[test]
    fn known_bytes() {
        let mut bytes = Vec::new();
        "example.com:443".parse::<Target>().unwrap().encode(&mut bytes);
        assert_eq!(bytes, b"\x03\x0bexample.com\x01\xbb");
        bytes.clear();
        "192.0.2.7:80".parse::<Target>().unwrap().encode(&mut bytes);
        assert_eq!(bytes, [1, 192, 0, 2, 7, 0, 80]);
        bytes.clear();
        "[2001:db8::7]:22".parse::<Target>().unwrap().encode(&mut bytes);
        assert_eq!(bytes, b"\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07\0\x16");
    }

    #[test]
    fn bytes_that_are_no_target() {
        for (bytes, error) in [
            (&b""[..], TargetError::Truncated),
            (b"\x02\xc0\0\x02\x07\0\x50", TargetError::UnknownType(2)),
            (b"\x03\0\0\x50", TargetError::HostLength(0)),
            (&[&[3, 254][..], &[b'a'; 254], &[0, 80]].concat(), TargetError::HostLength(254)),
            (b"\x03\x01 \0\x50", TargetError::HostCharacter),
            (b"\x03\x02\xc3\xa4\0\x50", TargetError::HostCharacter),
            (b"\x03\x01\xff\0\x50", TargetError::HostCharacter),
        ] {
            assert_eq!(Target::decode(&mut &bytes[..]), Err(error), "{bytes:?}");
        }
    }

    #[test]
    fn what_follows_a_target_is_left_alone() {
        let mut input = &b"\x01\xc0\0\x02\x07\0\x50rest"[..];
        assert!(Target::decode(&mut input).is_ok());
        assert_eq!(input, b"rest");
    }

    #[test]
    fn texts() {
        for text in ["example.com:443", "192.0.2.7:80", "[2001:db8::1]:22"] {
            let target: Target = text.parse().unwrap();
            assert_eq!(target.to_string(), text);
            round_trip(&target);
        }
        assert_eq!("example.com".parse::<Target>(), Err(TargetError::Port));
        assert_eq!("example.com:0".parse::<Target>(), Err(TargetError::Port));
        assert_eq!(":80".parse::<Target>(), Err(TargetError::HostLength(0)));
        for wrong in ["a b:80", "[[]]:6", "[a:80", "a]:80"] {
            assert_eq!(wrong.parse::<Target>(), Err(TargetError::HostCharacter), "{wrong}");
        }
        let long = format!("{}:80", "a".repeat(254));
        assert_eq!(long.parse::<Target>(), Err(TargetError::HostLength(254)));
    }

    proptest! {
        #[test]
        fn any_target_survives(name in r"[!-Z\\^-~]{1,253}", ip: [u8; 16], port: u16) {
            round_trip(&Target::new(&name, port).unwrap());
            round_trip(&Target::Ip(SocketAddr::new(Ipv6Addr::from(ip).into(), port)));
        }

        #[test]
        fn any_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Target::decode(&mut &bytes[..]);
        }
    }
}
