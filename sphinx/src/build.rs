//! Building packets: what a sender does.

use rand::CryptoRng;
use thiserror::Error;

use crate::header::build_headers;
use crate::{MIN_PAYLOAD_LEN, Packet, Route, max_plaintext, payload_layers};

/// Why a packet or a SURB cannot be built. All of it is the caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BuildError {
    /// The network's payloads are shorter than [`MIN_PAYLOAD_LEN`].
    #[error("a payload of {payload_len} bytes is shorter than {MIN_PAYLOAD_LEN}")]
    PayloadTooShort {
        /// The length of payloads that the caller asked for.
        payload_len: usize,
    },
    /// The plaintext does not fit the payload.
    #[error("a plaintext of {len} bytes is longer than {max}")]
    PlaintextTooLong {
        /// The length of the plaintext.
        len: usize,
        /// The longest plaintext that fits.
        max: usize,
    },
    /// The identifier of a SURB is zero, which replies could not be told apart by.
    #[error("the identifier of a SURB must not be zero")]
    ZeroIdentifier,
}

/// Builds one packet for each route and plaintext, with payloads of `payload_len` bytes.
///
/// Each packet takes exactly 32 bytes from `rng`; see the [crate's documentation](crate) for what
/// they decide and what they do not.
///
/// # Errors
///
/// Per request: [`BuildError::PayloadTooShort`], [`BuildError::PlaintextTooLong`].
pub fn build_packets<R: CryptoRng + ?Sized>(
    rng: &mut R,
    payload_len: usize,
    requests: &[(Route, &[u8])],
) -> Vec<Result<Packet, BuildError>> {
    let checked: Vec<_> =
        requests.iter().map(|(_, plaintext)| check_lengths(payload_len, plaintext)).collect();
    let (routes, plaintexts): (Vec<_>, Vec<_>) = requests
        .iter()
        .zip(&checked)
        .filter(|(_, checked)| checked.is_ok())
        .map(|((route, plaintext), _)| (route, plaintext))
        .unzip();
    let headers = build_headers(rng, &routes);
    // Packets whose payloads have no layers yet, and the seeds of those.
    let mut unfinished = headers.into_iter().zip(plaintexts).map(|(header, plaintext)| {
        (Packet::new(&header.bytes, payload_len, plaintext), header.seeds)
    });
    let mut built: Vec<_> = checked
        .into_iter()
        .map(|checked| checked.map(|()| unfinished.next().expect("one for each that fits")))
        .collect();
    let mut payloads: Vec<_> = built
        .iter_mut()
        .flatten()
        .map(|(packet, seeds)| (&seeds[..], packet.payload_mut()))
        .collect();
    payload_layers::add(&mut payloads);
    built.into_iter().map(|built| built.map(|(packet, _)| packet)).collect()
}

fn check_lengths(payload_len: usize, plaintext: &[u8]) -> Result<(), BuildError> {
    if payload_len < MIN_PAYLOAD_LEN {
        return Err(BuildError::PayloadTooShort { payload_len });
    }
    let max = max_plaintext(payload_len);
    if plaintext.len() > max {
        return Err(BuildError::PlaintextTooLong { len: plaintext.len(), max });
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::time::Duration;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::{HEADER_LEN, Hop, SecretKey};

    fn route() -> Route {
        let hop = Hop {
            address: [1; 32],
            key: SecretKey::from_bytes([7; 32]).public_key(),
            delay: Duration::ZERO,
        };
        Route::new(&[hop; 2], [2; 32], [0; 16]).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_refused_and_its_neighbours_are_not() {
        let mut rng = StdRng::seed_from_u64(1);
        let requests: [(Route, &[u8]); 3] =
            [(route(), &[1; 47]), (route(), &[1; 48]), (route(), &[])];
        let [first, second, third] = build_packets(&mut rng, 64, &requests).try_into().unwrap();
        assert_eq!(first.unwrap().as_bytes().len(), HEADER_LEN + 64);
        assert_eq!(second.unwrap_err(), BuildError::PlaintextTooLong { len: 48, max: 47 });
        assert_eq!(third.unwrap().as_bytes().len(), HEADER_LEN + 64);
    }

    #[test]
    fn payloads_shorter_than_the_cipher_needs_are_refused() {
        let mut rng = StdRng::seed_from_u64(2);
        for payload_len in [0, 17, 32] {
            assert_eq!(
                build_packets(&mut rng, payload_len, &[(route(), &[])]),
                [Err(BuildError::PayloadTooShort { payload_len })]
            );
        }
        assert!(build_packets(&mut rng, 33, &[(route(), &[0; 16])])[0].is_ok());
    }

    #[test]
    fn a_packet_takes_32_bytes_of_the_generator_and_a_refused_one_none() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut copy = StdRng::seed_from_u64(3);
        let requests: [(Route, &[u8]); 3] = [(route(), &[]), (route(), &[0; 99]), (route(), &[])];
        let packets = build_packets(&mut rng, 64, &requests);
        for built in [&packets[0], &packets[2]] {
            let secret = SecretKey::generate(&mut copy);
            assert_eq!(
                built.as_ref().unwrap().as_bytes()[..32],
                secret.public_key().as_bytes()[..]
            );
        }
        assert_eq!(rng.next_u64(), copy.next_u64());
    }
}
