//! What numbers look like: bytes outside, limbs inside.

use super::lanes::Lanes;

/// Where a limb lies in a number: offset and length in bits.
pub(super) type Place = (usize, usize);

/// Limbs of the same number, which fits the lowest of them, in all lanes.
#[inline(always)]
pub(super) fn small<L: Lanes<N>, const N: usize, const LIMBS: usize>(number: u64) -> [L; LIMBS] {
    let mut limbs = [L::splat(0); LIMBS];
    limbs[0] = L::splat(number);
    limbs
}

/// Limbs of little-endian numbers; what lies beyond the last limb is ignored.
#[inline(always)]
pub(super) fn decode<L: Lanes<N>, const N: usize, const LIMBS: usize>(
    numbers: &[[u8; 32]; N],
    places: &[Place; LIMBS],
) -> [L; LIMBS] {
    let mut limbs = [L::splat(0); LIMBS];
    for (limb, place) in limbs.iter_mut().zip(places) {
        let mut lanes = [0; N];
        for (lane, number) in lanes.iter_mut().zip(numbers) {
            *lane = cut(number, *place);
        }
        *limb = L::from_array(lanes);
    }
    limbs
}

/// The little-endian numbers modulo p = 2^255 − 19. They must be less than 2^256.
#[inline(always)]
pub(super) fn encode<L: Lanes<N>, const N: usize, const LIMBS: usize>(
    limbs: &[L; LIMBS],
    places: &[Place; LIMBS],
) -> [[u8; 32]; N] {
    let mut columns = [[0; N]; LIMBS];
    for (column, limb) in columns.iter_mut().zip(limbs) {
        *column = limb.to_array();
    }
    let mut numbers = [[0; 32]; N];
    for (lane, number) in numbers.iter_mut().enumerate() {
        *number =
            join(places.iter().zip(&columns).map(|((offset, _), column)| (*offset, column[lane])));
    }
    numbers
}

/// The bits of a little-endian number at a place of at most 56 bits.
fn cut(number: &[u8; 32], (offset, bits): Place) -> u64 {
    let mut word = [0; 8];
    let rest = &number[offset / 8..];
    let len = rest.len().min(8);
    word[..len].copy_from_slice(&rest[..len]);
    u64::from_le_bytes(word) >> (offset % 8) & ((1 << bits) - 1)
}

/// The bytes of the sum of limbs, each at its offset in bits, modulo p = 2^255 − 19.
///
/// The sum must be less than 2^256.
fn join(limbs: impl IntoIterator<Item = (usize, u64)>) -> [u8; 32] {
    let mut words = [0; 4];
    for (offset, limb) in limbs {
        let mut carry = u128::from(limb) << (offset % 64);
        for word in &mut words[offset / 64..] {
            carry += u128::from(*word);
            *word = low_word(carry);
            carry >>= 64;
        }
    }
    // 2^255 is 19. What is below 2^255 then may still be p or more: exactly if 19 more reach 2^255.
    let top = take_bit_255(&mut words);
    add(&mut words, 19 * top);
    let mut probe = words;
    add(&mut probe, 19);
    let top = take_bit_255(&mut probe);
    add(&mut words, 19 * top);
    take_bit_255(&mut words);

    let mut bytes = [0; 32];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[expect(clippy::cast_possible_truncation, reason = "the rest is carried")]
fn low_word(number: u128) -> u64 {
    number as u64
}

fn take_bit_255(words: &mut [u64; 4]) -> u64 {
    let top = words[3] >> 63;
    words[3] &= u64::MAX >> 1;
    top
}

fn add(words: &mut [u64; 4], small: u64) {
    let mut carry = small;
    for word in words {
        let (sum, over) = word.overflowing_add(carry);
        *word = sum;
        carry = u64::from(over);
    }
}
