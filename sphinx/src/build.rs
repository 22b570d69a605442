//! Building packets: what a sender does.

use std::fmt;

use rand::CryptoRng;
use thiserror::Error;
use zeroize::ZeroizeOnDrop;

use crate::header::{self, Header};
use crate::{HopAddress, MIN_PAYLOAD_LEN, Packet, Route, max_plaintext, payload_layers};

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

/// The header of a packet that has no payload yet, with the seeds of the payload's layers.
///
/// Headers are most of what a packet costs, and can be made ahead of need: [`build_headers`] makes
/// some, [`fill_headers`] makes packets of them. Two packets with one header are known by anybody to
/// come from one sender (and the second one is dropped as a replay), so a header can be neither
/// copied nor filled twice. Wiped when dropped.
pub struct PacketHeader {
    header: Header,
    first_hop: HopAddress,
}

impl PacketHeader {
    /// The address of the hop that the packet is to be sent to.
    #[must_use]
    pub fn first_hop(&self) -> HopAddress {
        self.first_hop
    }
}

/// The parts inside wipe themselves.
impl ZeroizeOnDrop for PacketHeader {}

/// Shows nothing of the header.
impl fmt::Debug for PacketHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketHeader").finish_non_exhaustive()
    }
}

/// Builds one header for each route.
///
/// Each header takes exactly 32 bytes from `rng`, as a packet of [`build_packets`] does: with the
/// same plaintext it becomes the same packet.
pub fn build_headers<R: CryptoRng + ?Sized>(rng: &mut R, routes: &[Route]) -> Vec<PacketHeader> {
    header::build_headers(rng, &routes.iter().collect::<Vec<_>>())
        .into_iter()
        .zip(routes)
        .map(|(header, route)| PacketHeader { header, first_hop: route.first_hop() })
        .collect()
}

/// Makes one packet of each header and plaintext, with payloads of `payload_len` bytes.
///
/// The header is spent even if its request is refused; [`max_plaintext`] tells what fits.
///
/// # Errors
///
/// Per request: [`BuildError::PayloadTooShort`], [`BuildError::PlaintextTooLong`].
pub fn fill_headers(
    payload_len: usize,
    requests: Vec<(PacketHeader, &[u8])>,
) -> Vec<Result<Packet, BuildError>> {
    let checked: Vec<_> = requests
        .into_iter()
        .map(|(header, plaintext)| {
            check_lengths(payload_len, plaintext)?;
            Ok((header.header, plaintext))
        })
        .collect();
    fill(payload_len, checked)
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
    let checked: Vec<_> = requests
        .iter()
        .map(|(route, plaintext)| {
            check_lengths(payload_len, plaintext)?;
            Ok((route, *plaintext))
        })
        .collect();
    let routes: Vec<_> = checked.iter().flatten().map(|(route, _)| *route).collect();
    let mut headers = header::build_headers(rng, &routes).into_iter();
    let mut with_header =
        |(_, plaintext)| (headers.next().expect("one for each that fits"), plaintext);
    fill(payload_len, checked.into_iter().map(|checked| checked.map(&mut with_header)).collect())
}

/// Makes packets of headers and plaintexts that fit.
fn fill(
    payload_len: usize,
    requests: Vec<Result<(Header, &[u8]), BuildError>>,
) -> Vec<Result<Packet, BuildError>> {
    // Packets whose payloads have no layers yet, and the seeds of those.
    let mut filled: Vec<_> = requests
        .into_iter()
        .map(|request| {
            let (header, plaintext) = request?;
            Ok((Packet::new(&header.bytes, payload_len, plaintext), header.seeds))
        })
        .collect();
    let mut payloads: Vec<_> = filled
        .iter_mut()
        .flatten()
        .map(|(packet, seeds)| (&seeds[..], packet.payload_mut()))
        .collect();
    payload_layers::add(&mut payloads);
    filled.into_iter().map(|filled| filled.map(|(packet, _)| packet)).collect()
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
    use std::collections::HashSet;
    use std::time::Duration;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::{Backend, HEADER_LEN, Hop, SecretKey};

    const fn assert_wiped<T: ZeroizeOnDrop>() {}
    const _: () = assert_wiped::<Header>();

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
    fn headers_made_ahead_become_the_packets_that_are_built_at_once() {
        for backend in Backend::available().filter(|backend| *backend != Backend::Reference) {
            for batch in [1, 3, 9] {
                let routes = vec![route(); batch];
                let built = backend.scope(|| {
                    let headers = build_headers(&mut StdRng::seed_from_u64(5), &routes);
                    assert!(headers.iter().all(|header| header.first_hop() == [1; 32]));
                    fill_headers(64, headers.into_iter().map(|h| (h, &b"hello"[..])).collect())
                });
                let requests: Vec<_> =
                    routes.into_iter().map(|route| (route, &b"hello"[..])).collect();
                let at_once =
                    backend.scope(|| build_packets(&mut StdRng::seed_from_u64(5), 64, &requests));
                assert_eq!(built, at_once, "{backend}");
            }
        }
    }

    #[test]
    fn no_two_headers_share_a_group_element() {
        for backend in Backend::available() {
            let headers = backend.scope(|| {
                let mut rng = StdRng::seed_from_u64(6);
                let mut headers = build_headers(&mut rng, &vec![route(); 16]);
                headers.extend(build_headers(&mut rng, &[route()]));
                headers
            });
            let group_elements: HashSet<_> =
                headers.unwrap().iter().map(|header| header.header.bytes[..32].to_vec()).collect();
            assert_eq!(group_elements.len(), 17, "{backend}");
        }
    }

    #[test]
    fn what_does_not_fit_a_header_is_refused_and_its_neighbours_are_not() {
        let mut headers = build_headers(&mut StdRng::seed_from_u64(7), &vec![route(); 3]);
        let requests = [&[1; 47][..], &[1; 48], &[]].map(|text| (headers.remove(0), text)).into();
        let [first, second, third] = fill_headers(64, requests).try_into().unwrap();
        assert!(first.is_ok() && third.is_ok());
        assert_eq!(second.unwrap_err(), BuildError::PlaintextTooLong { len: 48, max: 47 });
        let header = build_headers(&mut StdRng::seed_from_u64(7), &[route()]).remove(0);
        assert_eq!(
            fill_headers(32, vec![(header, &[])]),
            [Err(BuildError::PayloadTooShort { payload_len: 32 })]
        );
    }

    #[test]
    fn a_header_shows_nothing() {
        let headers = build_headers(&mut StdRng::seed_from_u64(8), &[route()]);
        assert_eq!(format!("{:?}", headers[0]), "PacketHeader { .. }");
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
