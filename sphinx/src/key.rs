//! X25519 keys of hops, and the points of low order that no key and no packet may contain.

use std::fmt;

use curve25519_dalek::MontgomeryPoint;
use rand::CryptoRng;
use thiserror::Error;
use x25519_dalek::StaticSecret;
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::x25519;

/// The public X25519 key of a hop: 32 bytes, a u-coordinate, little-endian (RFC 7748 section 5).
///
/// Only canonical encodings of multiples of the base point exist as values of this type, so that
/// equal keys have equal bytes, and senders may calculate with scalars modulo the group's order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

/// The secret X25519 key of a hop. Wiped when dropped.
pub struct SecretKey(StaticSecret);

/// Why 32 bytes are no [`PublicKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The point is of low order: every shared secret with it would be zero.
    #[error("the public key is a point of low order")]
    LowOrderPoint,
    /// The number is 2^255 − 19 or more; the same key has a smaller encoding.
    #[error("the public key is not in its canonical encoding")]
    NonCanonical,
    /// The point is not in the subgroup of prime order, so nobody can have made it as a key.
    #[error("the public key is not a multiple of the base point")]
    OutsideSubgroup,
}

impl PublicKey {
    /// Takes the encoding of a public key. Costs as much as a multiplication.
    ///
    /// # Errors
    ///
    /// [`KeyError::LowOrderPoint`] for every encoding of a point of low order, canonical or not;
    /// [`KeyError::NonCanonical`] for other encodings at or above 2^255 − 19;
    /// [`KeyError::OutsideSubgroup`] for everything else that is not a multiple of the base point,
    /// also for points of the curve's twist.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyError> {
        if is_low_order(&bytes) {
            return Err(KeyError::LowOrderPoint);
        }
        if !is_canonical(&bytes) {
            return Err(KeyError::NonCanonical);
        }
        // Either sign will do: a point and its negative are in the same subgroup.
        let point = MontgomeryPoint(bytes).to_edwards(0).ok_or(KeyError::OutsideSubgroup)?;
        if !point.is_torsion_free() {
            return Err(KeyError::OutsideSubgroup);
        }
        Ok(Self(bytes))
    }

    /// The encoding of the key.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Shows the first four bytes in hexadecimal.
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "PublicKey({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

impl SecretKey {
    /// Makes a key from 32 bytes of `rng`.
    pub fn generate<R: CryptoRng + ?Sized>(rng: &mut R) -> Self {
        Self(draw_secret(rng))
    }

    /// Takes 32 secret bytes; any bytes are a key (they are clamped when used, RFC 7748 section 5).
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(StaticSecret::from(bytes))
    }

    /// The 32 bytes that [`SecretKey::from_bytes`] takes.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    /// The public key that belongs to this key. Costs one multiplication of the base point.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey(x25519::public_key(self.0.as_bytes()))
    }

    pub(crate) fn secret(&self) -> &StaticSecret {
        &self.0
    }
}

/// The key inside wipes itself.
impl ZeroizeOnDrop for SecretKey {}

/// Shows nothing of the key.
impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").finish_non_exhaustive()
    }
}

/// A secret made of exactly 32 bytes of the caller's generator, never of another one.
pub(crate) fn draw_secret<R: CryptoRng + ?Sized>(rng: &mut R) -> StaticSecret {
    let mut bytes = Zeroizing::new([0; 32]);
    rng.fill_bytes(bytes.as_mut());
    StaticSecret::from(*bytes)
}

/// Whether X25519 of this point is zero whatever the secret key, in any of the point's encodings.
///
/// The top bit is ignored, as X25519 does.
pub(crate) fn is_low_order(u: &[u8; 32]) -> bool {
    let mut masked = *u;
    masked[31] &= 0x7f;
    LOW_ORDER_POINTS.contains(&masked)
}

/// Whether the number is less than p = 2^255 − 19.
fn is_canonical(u: &[u8; 32]) -> bool {
    let top_is_full = u[31] == 0x7f && u[1..31].iter().all(|byte| *byte == 0xff);
    u[31] < 0x80 && !(top_is_full && u[0] >= 0xed)
}

/// Every 255-bit encoding of a point of order 1, 2, 4 or 8 on Curve25519 or its twist.
///
/// Source: D. J. Bernstein, <https://cr.yp.to/ecdh.html>, "How do I validate Curve25519 public
/// keys?", without those of his twelve that differ from these in the top bit only.
const LOW_ORDER_POINTS: [[u8; 32]; 7] = [
    // 0
    [0; 32],
    // 1
    [
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0,
    ],
    // 325606250916557431795983626356110631294008115727848805560023387167927233504, order 8
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4,
        0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49,
        0xb8, 0x00,
    ],
    // 39382357235489614581723060781553021112529911719440698176882885853963445705823, order 8
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef,
        0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f,
        0x11, 0x57,
    ],
    // p − 1
    near_p(0xec),
    // p, which is 0 again
    near_p(0xed),
    // p + 1, which is 1 again
    near_p(0xee),
];

/// The number of the 32 bytes `low, ff, …, ff, 7f`.
const fn near_p(low: u8) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = low;
    bytes[31] = 0x7f;
    bytes
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use curve25519_dalek::constants::EIGHT_TORSION;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const fn assert_wiped<T: ZeroizeOnDrop>() {}
    const _: () = assert_wiped::<StaticSecret>();

    fn with_top_bit(mut u: [u8; 32]) -> [u8; 32] {
        u[31] |= 0x80;
        u
    }

    #[test]
    fn low_order_points_are_refused_in_every_encoding() {
        let mut rng = StdRng::seed_from_u64(1);
        for point in LOW_ORDER_POINTS {
            for encoding in [point, with_top_bit(point)] {
                let secret = SecretKey::generate(&mut rng).to_bytes();
                assert_eq!(x25519_dalek::x25519(*secret, encoding), [0; 32]);
                assert_eq!(PublicKey::from_bytes(encoding), Err(KeyError::LowOrderPoint));
            }
        }
    }

    #[test]
    fn the_list_of_low_order_points_is_complete() {
        for point in EIGHT_TORSION {
            assert!(is_low_order(&point.to_montgomery().to_bytes()));
        }
        // On the twist: a point u of order 4 has u = −1, and there is none of order 8, because the
        // order of the twist is 4 times a prime.
        assert!(is_low_order(&near_p(0xec)));
        // Among the numbers with two encodings, and the ends of the range, nothing else is zero.
        let mut rng = StdRng::seed_from_u64(2);
        let secret = *SecretKey::generate(&mut rng).to_bytes();
        for low in 0..=u8::MAX {
            for u in [near_p(low), with_top_bit(near_p(low))] {
                let zero = x25519_dalek::x25519(secret, u) == [0; 32];
                assert_eq!(is_low_order(&u), zero, "{low:02x}");
            }
            let mut u = [0; 32];
            u[0] = low;
            let zero = x25519_dalek::x25519(secret, u) == [0; 32];
            assert_eq!(is_low_order(&u), zero, "{low:02x}");
        }
    }

    #[test]
    fn other_encodings_of_a_key_are_refused() {
        let mut rng = StdRng::seed_from_u64(3);
        let key = *SecretKey::generate(&mut rng).public_key().as_bytes();
        assert_eq!(PublicKey::from_bytes(with_top_bit(key)), Err(KeyError::NonCanonical));
        for low in 0xef..=0xff {
            assert_eq!(PublicKey::from_bytes(near_p(low)), Err(KeyError::NonCanonical));
        }
        assert_ne!(PublicKey::from_bytes(near_p(0xeb)), Err(KeyError::NonCanonical));
    }

    #[test]
    fn points_outside_the_subgroup_are_refused() {
        let mut rng = StdRng::seed_from_u64(5);
        for _ in 0..20 {
            let key = *SecretKey::generate(&mut rng).public_key().as_bytes();
            let point = MontgomeryPoint(key).to_edwards(0).unwrap();
            for low_order in EIGHT_TORSION {
                let sum = (point + low_order).to_montgomery().to_bytes();
                let expected =
                    if sum == key { Ok(PublicKey(key)) } else { Err(KeyError::OutsideSubgroup) };
                assert_eq!(PublicKey::from_bytes(sum), expected);
            }
        }
    }

    #[test]
    fn points_of_the_twist_are_refused() {
        let twisted = (2..=u8::MAX).map(|u| {
            let mut bytes = [0; 32];
            bytes[0] = u;
            bytes
        });
        let twisted: Vec<_> =
            twisted.filter(|u| MontgomeryPoint(*u).to_edwards(0).is_none()).collect();
        assert!(twisted.len() > 100);
        for u in twisted {
            assert_eq!(PublicKey::from_bytes(u), Err(KeyError::OutsideSubgroup));
        }
    }

    #[test]
    fn keys_survive_their_bytes() {
        let mut rng = StdRng::seed_from_u64(4);
        let secret = SecretKey::generate(&mut rng);
        let public = secret.public_key();
        assert_eq!(SecretKey::from_bytes(*secret.to_bytes()).public_key(), public);
        assert_eq!(PublicKey::from_bytes(*public.as_bytes()).unwrap(), public);
    }

    #[test]
    fn the_example_of_rfc_7748_gives_the_same_key() {
        // Section 6.1, Alice.
        let secret = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = SecretKey::from_bytes(secret).public_key();
        assert_eq!(public.as_bytes()[..4], [0x85, 0x20, 0xf0, 0x09]);
        assert_eq!(format!("{public:?}"), "PublicKey(8520f009…)");
    }

    #[test]
    fn a_secret_key_shows_nothing() {
        assert_eq!(format!("{:?}", SecretKey::from_bytes([0xab; 32])), "SecretKey { .. }");
    }
}
