//! The layers of payloads: one per hop, each of them LIONESS with a key made from the hop's seed.

mod reference;

use sphinx_packet::constants::{
    PAYLOAD_KEY_HKDF_INFO, PAYLOAD_KEY_HKDF_SALT, PAYLOAD_KEY_SEED_SIZE,
};

use crate::hkdf;
use crate::wide_block::{self, Key, WIDTH};
use crate::{Backend, MIN_PAYLOAD_LEN};

/// What the key of a layer is made from; the hop derives it from its shared secret.
pub(crate) type Seed = [u8; SEED_LEN];

/// Length of a seed in bytes.
pub(crate) const SEED_LEN: usize = PAYLOAD_KEY_SEED_SIZE;

const _: () = assert!(MIN_PAYLOAD_LEN == wide_block::MIN_BLOCK_LEN);

/// Puts a layer on each payload for each of its seeds, the last one first, so that the first hop of
/// a route takes off the outermost.
pub(crate) fn add(payloads: &mut [(&[Seed], &mut [u8])]) {
    if Backend::current() == Backend::Reference {
        return reference::add(payloads);
    }
    for group in payloads.chunks_mut(WIDTH) {
        // All at once, as derivations go in step.
        let keys = keys(group.iter().flat_map(|(seeds, _)| *seeds));
        let mut rest = &keys[..];
        let mut layers: Vec<(&[Key], &mut [u8])> = Vec::with_capacity(group.len());
        for (seeds, payload) in group {
            let (own, others) = rest.split_at(seeds.len());
            layers.push((own, payload));
            rest = others;
        }
        let depth = layers.iter().map(|(keys, _)| keys.len()).max().unwrap_or(0);
        for layer in (0..depth).rev() {
            let mut blocks: Vec<_> = layers
                .iter_mut()
                .filter_map(|(keys, payload)| Some((keys.get(layer)?, &mut **payload)))
                .collect();
            wide_block::encrypt(&mut blocks);
        }
    }
}

/// Takes one layer off each payload.
pub(crate) fn remove<'a>(payloads: impl IntoIterator<Item = (&'a Seed, &'a mut [u8])>) {
    if Backend::current() == Backend::Reference {
        return reference::remove(payloads);
    }
    let (seeds, blocks): (Vec<_>, Vec<_>) = payloads.into_iter().unzip();
    let keys = keys(seeds);
    let mut blocks: Vec<_> = keys.iter().zip(blocks).collect();
    wide_block::decrypt(&mut blocks);
}

/// The key of each seed.
fn keys<'a>(seeds: impl IntoIterator<Item = &'a Seed>) -> Vec<Key> {
    let seeds: Vec<_> = seeds.into_iter().map(|seed| &seed[..]).collect();
    let keys = hkdf::derive(PAYLOAD_KEY_HKDF_SALT, &seeds, PAYLOAD_KEY_HKDF_INFO);
    keys.iter().map(|key| Key::from_bytes(key)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Payloads of random bytes with 0 to 5 seeds each.
    fn payloads(seed: u64, lens: &[(usize, usize)]) -> Vec<(Vec<Seed>, Vec<u8>)> {
        let mut rng = StdRng::seed_from_u64(seed);
        lens.iter()
            .map(|(depth, len)| {
                let (mut seeds, mut payload) = (vec![[0; _]; *depth], vec![0; *len]);
                seeds.iter_mut().for_each(|seed: &mut Seed| rng.fill_bytes(seed));
                rng.fill_bytes(&mut payload);
                (seeds, payload)
            })
            .collect()
    }

    fn borrow(payloads: &mut [(Vec<Seed>, Vec<u8>)]) -> Vec<(&[Seed], &mut [u8])> {
        payloads.iter_mut().map(|(seeds, payload)| (&seeds[..], &mut payload[..])).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn layers_are_those_of_the_reference(
            seed: u64,
            lens in prop::collection::vec(
                (0..=5_usize, prop_oneof![33..300_usize, Just(1024_usize)]),
                0..20,
            ),
        ) {
            let mut ours = payloads(seed, &lens);
            let mut theirs = ours.clone();
            add(&mut borrow(&mut ours));
            reference::add(&mut borrow(&mut theirs));
            prop_assert!(ours == theirs);

            let outermost = |payloads: &mut Vec<(Vec<Seed>, Vec<u8>)>| payloads.retain(|(s, _)| !s.is_empty());
            outermost(&mut ours);
            outermost(&mut theirs);
            remove(borrow(&mut ours).into_iter().map(|(seeds, payload)| (&seeds[0], payload)));
            reference::remove(borrow(&mut theirs).into_iter().map(|(seeds, payload)| (&seeds[0], payload)));
            prop_assert!(ours == theirs);
        }
    }
}
