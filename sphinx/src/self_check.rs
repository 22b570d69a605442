//! Whether vector code gives on this machine what it should: asked before a backend is used at all.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::x25519::x25519;
use crate::{Backend, Hop, Packet, Peeled, Route, SecretKey, build_packets, finish, open_headers};

/// Operations and packets: more than there are lanes, so that some are left over.
const BATCH: usize = 11;
/// Several blocks of the payload's hash.
const PAYLOAD_LEN: usize = 300;

/// RFC 7748 section 6.1: Alice's secret key, Bob's public key, and what they share.
const SECRET: [u8; 32] = [
    0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
    0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
];
const POINT: [u8; 32] = [
    0xde, 0x9e, 0xdb, 0x7d, 0x7b, 0x7d, 0xc1, 0xb4, 0xd3, 0x5b, 0x61, 0xc2, 0xec, 0xe4, 0x35, 0x37,
    0x3f, 0x83, 0x43, 0xc8, 0x5b, 0x78, 0x67, 0x4d, 0xad, 0xfc, 0x7e, 0x14, 0x6f, 0x88, 0x2b, 0x4f,
];
const PRODUCT: [u8; 32] = [
    0x4a, 0x5d, 0x9d, 0x5b, 0xa4, 0xce, 0x2d, 0xe1, 0x72, 0x8e, 0x3b, 0xf4, 0x80, 0x35, 0x0f, 0x25,
    0xe0, 0x7e, 0x21, 0xc9, 0x47, 0xd1, 0x9e, 0x33, 0x76, 0xf0, 0x9b, 0x3c, 0x1e, 0x16, 0x17, 0x42,
];

/// Whether the backend multiplies as RFC 7748 says, and builds and peels packets as
/// [`Backend::Portable`] does. Takes a few milliseconds. The CPU must have the instructions.
pub(crate) fn passes(backend: Backend) -> bool {
    let products = backend.run(|| x25519(&[(&SECRET, &POINT); BATCH]));
    products.iter().all(|product| *product == PRODUCT)
        && backend.run(journey) == Backend::Portable.run(journey)
}

/// Packets as they leave the sender and the first of two hops.
fn journey() -> [Vec<Packet>; 2] {
    let mut rng = StdRng::seed_from_u64(1);
    let keys = [(); 2].map(|()| SecretKey::generate(&mut rng));
    let hop = |key: &SecretKey| Hop {
        address: [1; 32],
        key: key.public_key(),
        delay: Duration::from_millis(1),
    };
    let route = Route::new(&keys.each_ref().map(hop), [2; 32], [3; 16]).expect("two hops");
    let requests = vec![(route, &b"self-check"[..]); BATCH];
    let built: Vec<_> =
        build_packets(&mut rng, PAYLOAD_LEN, &requests).into_iter().flatten().collect();
    let opened = open_headers(&keys[0], built.clone()).into_iter().flatten().collect();
    let forwarded = finish(opened).into_iter().filter_map(|peeled| match peeled {
        Ok(Peeled::Forward { packet, .. }) => Some(packet),
        _ => None,
    });
    let forwarded = forwarded.collect();
    [built, forwarded]
}

/// Where a test makes a backend compute wrongly.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The last product of a batch.
    Multiplication,
    /// The first digest of a batch.
    Hash,
}

#[cfg(test)]
thread_local! {
    static INJECTED: std::cell::Cell<Option<(Backend, Fault)>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
impl Fault {
    /// Whether the backend at work is to be wrong here.
    pub(crate) fn is_injected(self) -> bool {
        INJECTED.get() == Some((Backend::current(), self))
    }

    fn inject<T>(self, backend: Backend, work: impl FnOnce() -> T) -> T {
        INJECTED.set(Some((backend, self)));
        let result = work();
        INJECTED.set(None);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journey_is_whole() {
        let [built, forwarded] = Backend::Portable.run(journey);
        assert_eq!((built.len(), forwarded.len()), (BATCH, BATCH));
    }

    #[test]
    fn every_backend_of_a_sound_machine_passes() {
        for backend in Backend::available() {
            assert!(backend == Backend::Reference || passes(backend), "{backend}");
        }
        assert_eq!(Backend::faulty().count(), 0);
    }

    #[test]
    fn a_backend_that_computes_wrongly_fails() {
        assert!(!Fault::Multiplication.inject(Backend::Portable, || passes(Backend::Portable)));
        for backend in
            [Backend::Avx2, Backend::Avx512].into_iter().filter(|b| b.scope(|| ()).is_ok())
        {
            for fault in [Fault::Multiplication, Fault::Hash] {
                assert!(!fault.inject(backend, || passes(backend)), "{backend}, {fault:?}");
            }
            assert!(passes(backend));
        }
    }
}
