//! The layers of payloads: one per hop, each of them LIONESS with a key made from the hop's seed.

use hkdf::Hkdf;
use sha2::Sha256;
use sphinx_packet::constants::{
    PAYLOAD_KEY_HKDF_INFO, PAYLOAD_KEY_HKDF_SALT, PAYLOAD_KEY_SEED_SIZE,
};
use zeroize::Zeroizing;

use crate::MIN_PAYLOAD_LEN;
use crate::wide_block::{self, Key, WIDTH};

/// What the key of a layer is made from; the hop derives it from its shared secret.
pub(crate) type Seed = [u8; PAYLOAD_KEY_SEED_SIZE];

const _: () = assert!(MIN_PAYLOAD_LEN == wide_block::MIN_BLOCK_LEN);

/// Puts a layer on each payload for each of its seeds, the last one first, so that the first hop of
/// a route takes off the outermost.
pub(crate) fn add<'a>(payloads: &mut [(&'a [Seed], &'a mut [u8])]) {
    for group in payloads.chunks_mut(WIDTH) {
        let depth = group.iter().map(|(seeds, _)| seeds.len()).max().unwrap_or(0);
        for layer in (0..depth).rev() {
            let (seeds, mut blocks): (Vec<_>, Vec<_>) = group
                .iter_mut()
                .filter_map(|(seeds, payload)| Some((seeds.get(layer)?, &mut **payload)))
                .unzip();
            let keys = keys(seeds);
            let mut blocks: Vec<_> = keys.iter().zip(blocks.drain(..)).collect();
            wide_block::encrypt(&mut blocks);
        }
    }
}

/// Takes one layer off each payload.
pub(crate) fn remove<'a>(payloads: impl IntoIterator<Item = (&'a Seed, &'a mut [u8])>) {
    let (seeds, blocks): (Vec<_>, Vec<_>) = payloads.into_iter().unzip();
    let keys = keys(seeds);
    let mut blocks: Vec<_> = keys.iter().zip(blocks).collect();
    wide_block::decrypt(&mut blocks);
}

/// The key of each seed.
fn keys<'a>(seeds: impl IntoIterator<Item = &'a Seed>) -> Vec<Key> {
    seeds
        .into_iter()
        .map(|seed| {
            let mut key = Zeroizing::new([0; wide_block::KEY_LEN]);
            Hkdf::<Sha256>::new(Some(PAYLOAD_KEY_HKDF_SALT), seed)
                .expand(PAYLOAD_KEY_HKDF_INFO, key.as_mut())
                .expect("HKDF-SHA256 gives up to 8,160 bytes");
            Key::from_bytes(&key)
        })
        .collect()
}
