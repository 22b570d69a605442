//! What numbers look like: bytes outside, limbs inside.

/// The bits of a little-endian number of 255 bits from `offset` on, at most 56 of them.
pub(super) fn limb(number: &[u8; 32], offset: usize, bits: usize) -> u64 {
    let mut word = [0; 8];
    let rest = &number[offset / 8..];
    let len = rest.len().min(8);
    word[..len].copy_from_slice(&rest[..len]);
    u64::from_le_bytes(word) >> (offset % 8) & ((1 << bits) - 1)
}

/// The bytes of the sum of limbs, each at its offset in bits, modulo p = 2^255 − 19.
///
/// The sum must be less than 2^256.
pub(super) fn join(limbs: impl IntoIterator<Item = (usize, u64)>) -> [u8; 32] {
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
