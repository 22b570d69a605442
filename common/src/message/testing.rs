//! SURBs that lead to nowhere.

use std::time::Duration;

use mixsocks_sphinx::{Identifier, SURB_LEN, SecretKey, Surb};
use rand::CryptoRng;

use super::MadeSurb;
use crate::address::Address;
use crate::keys::IdentityKey;

/// The address of somebody.
pub(super) fn address(rng: &mut impl CryptoRng) -> Address {
    Address {
        identity: IdentityKey::generate(rng).identity(),
        encryption: SecretKey::generate(rng).public_key().into(),
        gateway: IdentityKey::generate(rng).identity(),
    }
}

/// SURB `number`, whose bytes say which one it is.
pub(super) fn made_surb(number: u64, key_epoch: u64) -> MadeSurb<u64> {
    let mut bytes = [0; SURB_LEN];
    // The base point: a group element that a SURB may begin with.
    bytes[0] = 9;
    bytes[SURB_LEN - 8..].copy_from_slice(&number.to_be_bytes());
    MadeSurb {
        surb: Surb::from_bytes(&bytes).unwrap(),
        identifier: identifier(number),
        recovery: number,
        delay: Duration::from_millis(45),
        key_epoch,
    }
}

pub(super) fn identifier(number: u64) -> Identifier {
    let mut identifier = Identifier::default();
    identifier[..8].copy_from_slice(&number.to_be_bytes());
    identifier
}

/// Which one a SURB is.
pub(super) fn surb_number(surb: &Surb) -> u64 {
    u64::from_be_bytes(*surb.as_bytes().last_chunk().unwrap())
}
