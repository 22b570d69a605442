//! The first control message in each direction of a link between nodes.
//!
//! | offset | length | field |
//! |--:|--:|---|
//! | 0 | 2 | version of the link protocol, big-endian |
//! | 2 | 4 | bytes of a packet, big-endian |
//! | 6 | 1 | bytes of the network's name |
//! | 7 | 1 to 64 | the network's name, ASCII |
//!
//! The version comes first and is judged first: behind another version the rest may be anything.
//! The identities are not repeated: TLS has shown them.

use crate::topology::{NetworkName, Topology};

/// The version of the link protocol that this code speaks.
pub const LINK_VERSION: u16 = 1;

/// What both ends of a link must agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    network: NetworkName,
    packet_bytes: u32,
}

/// Why the two ends of a link do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// The message is not a hello.
    #[error("the peer's first message is not a hello")]
    Malformed,
    /// The peer speaks another version.
    #[error("the peer speaks version {theirs} of the link protocol, this node version {ours}")]
    WrongVersion {
        /// Our version.
        ours: u16,
        /// The peer's version.
        theirs: u16,
    },
    /// The peer belongs to another network.
    #[error("the peer belongs to network {theirs:?}, this node to {ours:?}")]
    WrongNetwork {
        /// Our network.
        ours: String,
        /// The peer's network.
        theirs: String,
    },
    /// The peer has another idea of the network's packet size.
    #[error("the peer's packets have {theirs} bytes, those of this node {ours}")]
    WrongPacketSize {
        /// Bytes of our packets.
        ours: u32,
        /// Bytes of the peer's packets.
        theirs: u32,
    },
}

impl Hello {
    /// The hello of all nodes of this network.
    ///
    /// # Panics
    /// Never: a checked topology has packets of at most a few ten thousand bytes.
    pub fn new(topology: &Topology) -> Self {
        Self {
            network: topology.network.clone(),
            packet_bytes: u32::try_from(topology.packet_bytes())
                .expect("a checked topology has small packets"),
        }
    }

    /// The bytes of the control message: at most 71.
    pub fn encode(&self) -> Vec<u8> {
        let name = self.network.as_str().as_bytes();
        let len = u8::try_from(name.len()).expect("a network's name has at most 64 bytes");
        let mut message = Vec::with_capacity(7 + name.len());
        message.extend_from_slice(&LINK_VERSION.to_be_bytes());
        message.extend_from_slice(&self.packet_bytes.to_be_bytes());
        message.push(len);
        message.extend_from_slice(name);
        message
    }

    /// Checks that the peer's hello says the same as ours.
    ///
    /// # Errors
    /// [`HelloError`] states both sides of the first difference.
    pub fn check(&self, message: &[u8]) -> Result<(), HelloError> {
        let (version, rest) = message.split_first_chunk::<2>().ok_or(HelloError::Malformed)?;
        let version = u16::from_be_bytes(*version);
        if version != LINK_VERSION {
            return Err(HelloError::WrongVersion { ours: LINK_VERSION, theirs: version });
        }
        let (packet_bytes, rest) = rest.split_first_chunk::<4>().ok_or(HelloError::Malformed)?;
        let (name_len, name) = rest.split_first().ok_or(HelloError::Malformed)?;
        if usize::from(*name_len) != name.len() {
            return Err(HelloError::Malformed);
        }
        let name = std::str::from_utf8(name).ok().and_then(NetworkName::new);
        let name = name.ok_or(HelloError::Malformed)?;
        if name != self.network {
            return Err(HelloError::WrongNetwork {
                ours: self.network.as_str().to_owned(),
                theirs: name.as_str().to_owned(),
            });
        }
        let packet_bytes = u32::from_be_bytes(*packet_bytes);
        if packet_bytes != self.packet_bytes {
            return Err(HelloError::WrongPacketSize {
                ours: self.packet_bytes,
                theirs: packet_bytes,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(network: &str, packet_bytes: u32) -> Hello {
        Hello { network: NetworkName::new(network).unwrap(), packet_bytes }
    }

    #[test]
    fn good_vector() {
        let message = hello("net-1", 2396).encode();
        assert_eq!(message, b"\x00\x01\x00\x00\x09\x5c\x05net-1");
        assert_eq!(hello("net-1", 2396).check(&message), Ok(()));
    }

    #[test]
    fn differences_name_both_sides() {
        let ours = hello("net-1", 2396);
        let check = |message: &[u8]| ours.check(message).unwrap_err();
        assert_eq!(
            check(&hello("net-2", 1).encode()),
            HelloError::WrongNetwork { ours: "net-1".into(), theirs: "net-2".into() }
        );
        assert_eq!(
            check(&hello("net-1", 2397).encode()),
            HelloError::WrongPacketSize { ours: 2396, theirs: 2397 }
        );
        // Whatever follows another version is not looked at.
        assert_eq!(check(b"\x00\x02"), HelloError::WrongVersion { ours: 1, theirs: 2 });
        let text = check(b"\xff\xff?").to_string();
        assert!(text.contains("65535") && text.contains("version 1"), "{text}");
    }

    #[test]
    fn bad_vectors() {
        let good = hello("net-1", 2396).encode();
        for len in 0..good.len() {
            assert_eq!(hello("net-1", 2396).check(&good[..len]), Err(HelloError::Malformed));
        }
        for bad in [
            &b"\x00\x01\x00\x00\x09\x5c\x05net-1x"[..],
            b"\x00\x01\x00\x00\x09\x5c\x00",
            b"\x00\x01\x00\x00\x09\x5c\x03N E",
            b"\x00\x01\x00\x00\x09\x5c\x02\xff\xfe",
        ] {
            assert_eq!(hello("net-1", 2396).check(bad), Err(HelloError::Malformed), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn only_our_own_hello_passes(message in prop::collection::vec(any::<u8>(), 0..80)) {
            let ours = hello("net-1", 2396);
            if ours.check(&message).is_ok() {
                prop_assert_eq!(message, ours.encode());
            }
        }
    }
}
