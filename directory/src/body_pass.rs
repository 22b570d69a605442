//! What an authority shows before it sends a large message, so that strangers cannot take its place.

use mixsocks_common::directory::CLOCK_SKEW;
use mixsocks_common::keys::{Identity, IdentityKey, Signature};
use mixsocks_common::topology::{NetworkName, UnixTime};

const CONTEXT: &[u8] = b"mixsocks body v1\0";

/// The value of a header: sender, seconds since 1970, and its signature, separated by spaces; over
/// `"mixsocks body v1\0"`, length u8 and name of the network, seconds and length of the body, both
/// u64 big-endian.
pub(crate) struct BodyPass {
    pub(crate) sender: Identity,
    made: UnixTime,
    signature: Signature,
}

impl BodyPass {
    /// The header's name.
    pub(crate) const HEADER: &str = "mixsocks-body-pass";

    /// The value for a body of `length` bytes that the holder of `key` sends now.
    pub(crate) fn write(
        key: &IdentityKey,
        network: &NetworkName,
        length: usize,
        now: UnixTime,
    ) -> String {
        let signature = key.sign(&signed_bytes(network, length, now));
        format!("{} {} {signature}", key.identity(), now.0)
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let sender = words.next()?.parse().ok()?;
        let made = UnixTime(words.next()?.parse().ok()?);
        let signature = words.next()?.parse().ok()?;
        words.next().is_none().then_some(Self { sender, made, signature })
    }

    /// Whether its sender has signed it for such a body, not long ago.
    pub(crate) fn is_good(&self, network: &NetworkName, length: usize, now: UnixTime) -> bool {
        self.made.0.abs_diff(now.0) <= 2 * CLOCK_SKEW.as_secs()
            && self
                .sender
                .verify(&signed_bytes(network, length, self.made), &self.signature)
                .is_ok()
    }
}

fn signed_bytes(network: &NetworkName, length: usize, made: UnixTime) -> Vec<u8> {
    let name = network.as_str().as_bytes();
    let name_len = u8::try_from(name.len()).expect("a network's name has at most 64 bytes");
    let length = length as u64;
    [CONTEXT, &[name_len], name, &made.0.to_be_bytes(), &length.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_for_one_length_network_and_time() {
        let key = IdentityKey::from_bytes(&[1; 32]);
        let network = |name| NetworkName::new(name).unwrap();
        let now = UnixTime(1_000_000);
        let pass = BodyPass::parse(&BodyPass::write(&key, &network("a"), 5000, now)).unwrap();
        assert_eq!(pass.sender, key.identity());
        assert!(pass.is_good(&network("a"), 5000, now));
        assert!(pass.is_good(&network("a"), 5000, UnixTime(now.0 + 240)));
        assert!(!pass.is_good(&network("a"), 5000, UnixTime(now.0 + 241)));
        assert!(!pass.is_good(&network("a"), 5001, now));
        assert!(!pass.is_good(&network("b"), 5000, now));
        for wrong in ["", "a b c", &BodyPass::write(&key, &network("a"), 1, now)[1..]] {
            assert!(BodyPass::parse(wrong).is_none_or(|p| !p.is_good(&network("a"), 1, now)));
        }
    }
}
