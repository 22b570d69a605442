//! Layers: which mix is in which, so that none chooses its own.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::keys::Identity;
use crate::topology::{DocumentDigest, LAYERS};

const CONTEXT: &[u8] = b"mixsocks rank v1\0";

/// A place in an order that nobody can choose who had to be known before the seed was.
pub(super) type Rank = [u8; 32];

/// SHA-256 of a context, the seed, what is ranked, and whom.
pub(super) fn rank(seed: &DocumentDigest, purpose: &str, what: &[u8]) -> Rank {
    let mut hasher = Sha256::new();
    hasher.update(CONTEXT);
    hasher.update(seed.as_bytes());
    hasher.update([u8::try_from(purpose.len()).expect("a purpose is a short word")]);
    hasher.update(purpose);
    hasher.update(what);
    hasher.finalize().into()
}

/// Gives every mix a layer from 1, so that sizes differ by at most one.
///
/// `placed` mixes keep their layers as far as that allows: as few as possible move, chosen by rank.
/// Those that move and the `arrivals` are dealt out, by rank, to the places that are free. Larger
/// layers are the ones that keep one more, of equally large ones those with the lower rank.
pub(super) fn deal(
    placed: &BTreeMap<Identity, u8>,
    arrivals: &[Identity],
    seed: &DocumentDigest,
) -> BTreeMap<Identity, u8> {
    let mut layers: [Vec<Identity>; LAYERS] = Default::default();
    for (identity, layer) in placed {
        layers[usize::from(*layer) - 1].push(*identity);
    }
    let sizes = sizes(&layers, placed.len() + arrivals.len(), seed);
    let mut moving = arrivals.to_vec();
    for (layer, size) in layers.iter_mut().zip(sizes) {
        layer.sort_by_cached_key(|identity| rank(seed, "stay", identity.as_bytes()));
        moving.extend(layer.split_off(size.min(layer.len())));
    }
    moving.sort_by_cached_key(|identity| rank(seed, "place", identity.as_bytes()));
    for (layer, size) in layers.iter_mut().zip(sizes) {
        let free = size - layer.len();
        layer.extend(moving.drain(..free));
    }
    (1..).zip(layers).flat_map(|(n, layer)| layer.into_iter().map(move |id| (id, n))).collect()
}

/// How many mixes each layer shall have of `count` in all.
fn sizes(layers: &[Vec<Identity>; LAYERS], count: usize, seed: &DocumentDigest) -> [usize; LAYERS] {
    let mut sizes = [count / LAYERS; LAYERS];
    let mut order: Vec<_> = (0..LAYERS).collect();
    order.sort_by_cached_key(|layer| {
        let rank = rank(seed, "layer", &layer.to_be_bytes());
        (std::cmp::Reverse(layers[*layer].len()), rank)
    });
    for layer in order.into_iter().take(count % LAYERS) {
        sizes[layer] += 1;
    }
    sizes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::keys::IdentityKey;

    fn identities(count: usize) -> Vec<Identity> {
        let key = |number: usize| {
            let mut seed = [1; 32];
            seed[..8].copy_from_slice(&number.to_be_bytes());
            IdentityKey::from_bytes(&seed).identity()
        };
        (0..count).map(key).collect()
    }

    fn counts(layers: impl IntoIterator<Item = u8>) -> [usize; LAYERS] {
        let mut counts = [0; LAYERS];
        layers.into_iter().for_each(|layer| counts[usize::from(layer) - 1] += 1);
        counts
    }

    /// The fewest moves after which sizes differ by at most one, found by trying all sizes.
    fn fewest_moves(placed: [usize; LAYERS], arrivals: usize) -> usize {
        let count = placed.iter().sum::<usize>() + arrivals;
        let mut fewest = usize::MAX;
        for a in 0..=count {
            for b in 0..=count - a {
                let sizes = [a, b, count - a - b];
                if sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1 {
                    let moves = placed.iter().zip(sizes).map(|(n, size)| n.saturating_sub(size));
                    fewest = fewest.min(moves.sum());
                }
            }
        }
        fewest
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn layers_are_balanced_and_no_mix_moves_needlessly(
            placed in proptest::collection::vec(1u8..=3, 0..20),
            arrivals in 0usize..12,
            seed: [u8; 32],
        ) {
            let identities = identities(placed.len() + arrivals);
            let (known, new) = identities.split_at(placed.len());
            let before: BTreeMap<_, _> = known.iter().copied().zip(placed.iter().copied()).collect();
            let after = deal(&before, new, &DocumentDigest::from_bytes(seed));
            prop_assert_eq!(after.len(), identities.len());
            let sizes = counts(after.values().copied());
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            let moves = before.iter().filter(|(id, layer)| after[id] != **layer).count();
            prop_assert_eq!(moves, fewest_moves(counts(placed), arrivals));
        }
    }

    #[test]
    fn the_seed_alone_decides_where_an_arrival_goes() {
        let arrivals = identities(3);
        let mut seen = [0; LAYERS];
        for seed in 0..100 {
            let seed = DocumentDigest::from_bytes([seed; 32]);
            let layers = deal(&BTreeMap::new(), &arrivals, &seed);
            let mut backwards = arrivals.clone();
            backwards.reverse();
            assert_eq!(layers, deal(&BTreeMap::new(), &backwards, &seed));
            seen[usize::from(layers[&arrivals[0]]) - 1] += 1;
        }
        // Fixed seeds, so fixed numbers; evenly they would be 33.
        assert!(seen.iter().all(|count| (20..50).contains(count)), "{seen:?}");
    }
}
