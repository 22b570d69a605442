//! Secret bytes that wipe themselves.

use std::ops::{Deref, DerefMut};

use zeroize::{Zeroize, ZeroizeOnDrop};

/// `LEN` bytes, wiped when dropped as one slice: arrays in `Zeroizing` are wiped byte by byte, which
/// takes as long as hashing them.
pub(crate) struct Wiped<const LEN: usize>([u8; LEN]);

impl<const LEN: usize> Wiped<LEN> {
    pub(crate) fn zero() -> Self {
        Self([0; LEN])
    }
}

impl<const LEN: usize> Deref for Wiped<LEN> {
    type Target = [u8; LEN];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<const LEN: usize> DerefMut for Wiped<LEN> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<const LEN: usize> Drop for Wiped<LEN> {
    fn drop(&mut self) {
        self.0[..].zeroize();
    }
}

impl<const LEN: usize> ZeroizeOnDrop for Wiped<LEN> {}
