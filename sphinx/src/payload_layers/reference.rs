//! Layers of payloads by the crate `sphinx-packet`: for the backend `reference`.

use sphinx_packet::payload::Payload;
use sphinx_packet::payload::key::derive_payload_key;

use super::Seed;

const LONG_ENOUGH: &str = "a payload has at least the shortest length";

/// Puts a layer on each payload for each of its seeds, the last one first.
pub(crate) fn add(payloads: &mut [(&[Seed], &mut [u8])]) {
    for (seeds, bytes) in payloads {
        let mut payload = Payload::from_bytes(bytes).expect(LONG_ENOUGH);
        for seed in seeds.iter().rev() {
            payload = payload.add_encryption_layer(derive_payload_key(seed)).expect(LONG_ENOUGH);
        }
        bytes.copy_from_slice(payload.as_bytes());
    }
}

/// Takes one layer off each payload.
pub(crate) fn remove<'a>(payloads: impl IntoIterator<Item = (&'a Seed, &'a mut [u8])>) {
    for (seed, bytes) in payloads {
        let payload = Payload::from_bytes(bytes).expect(LONG_ENOUGH);
        let payload = payload.unwrap(derive_payload_key(seed)).expect(LONG_ENOUGH);
        bytes.copy_from_slice(payload.as_bytes());
    }
}
