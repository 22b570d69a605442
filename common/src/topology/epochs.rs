//! Epochs: when documents and Sphinx keys follow each other.

use super::UnixTime;
use crate::directory::CLOCK_SKEW;

/// How documents and Sphinx keys follow each other.
///
/// Epoch `e` begins `e × epoch_seconds` after 1970 and has a document of its own; key epoch `k` is
/// made of the epochs from `k × key_epochs` on, and each node has a Sphinx key for it. A network
/// whose documents are made by hand is [`Epochs::STATIC`]: its epochs merely count documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epochs {
    /// Seconds of an epoch: 1 to 2^32 − 1.
    pub epoch_seconds: u64,
    /// Epochs for which a Sphinx key is used: 1 to 2^32 − 1.
    pub key_epochs: u64,
    /// For how many seconds before and after the change of key epochs nodes take packets of both:
    /// at most half a key epoch.
    pub overlap_seconds: u64,
}

impl Epochs {
    /// Epochs that only count: Sphinx keys stay what they are until the year 2106.
    pub const STATIC: Self =
        Self { epoch_seconds: Self::MAX, key_epochs: Self::MAX, overlap_seconds: 0 };

    /// The greatest length, of an epoch in seconds and of a key epoch in epochs: products of both
    /// stay far below 2^64.
    pub(super) const MAX: u64 = u32::MAX as u64;

    /// How far clocks may differ: two minutes, or an eighth of an epoch if that is less.
    pub fn skew_seconds(&self) -> u64 {
        CLOCK_SKEW.as_secs().min(self.epoch_seconds / 8)
    }

    /// The epoch at `now`.
    ///
    /// # Panics
    /// If an epoch has no seconds, which no checked topology allows; the same holds below.
    pub fn at(&self, now: UnixTime) -> u64 {
        now.0 / self.epoch_seconds
    }

    /// When an epoch begins.
    pub fn start(&self, epoch: u64) -> UnixTime {
        UnixTime(epoch.saturating_mul(self.epoch_seconds))
    }

    /// The key epoch of an epoch.
    pub fn key_epoch(&self, epoch: u64) -> u64 {
        epoch / self.key_epochs
    }

    /// The key epoch at `now`.
    pub fn key_epoch_at(&self, now: UnixTime) -> u64 {
        self.key_epoch(self.at(now))
    }

    /// When a key epoch begins.
    pub fn key_epoch_start(&self, key_epoch: u64) -> UnixTime {
        self.start(key_epoch.saturating_mul(self.key_epochs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_and_key_epochs_begin_exactly() {
        let epochs = Epochs { epoch_seconds: 10, key_epochs: 3, overlap_seconds: 2 };
        assert_eq!([99, 100, 109].map(|now| epochs.at(UnixTime(now))), [9, 10, 10]);
        assert_eq!(epochs.start(10), UnixTime(100));
        assert_eq!([89, 90, 119].map(|now| epochs.key_epoch_at(UnixTime(now))), [2, 3, 3]);
        assert_eq!(epochs.key_epoch_start(3), UnixTime(90));
        assert_eq!(epochs.start(u64::MAX), UnixTime(u64::MAX));
    }

    #[test]
    fn static_keys_do_not_change_in_this_century() {
        let in_2100 = UnixTime(4_102_444_800);
        assert_eq!(Epochs::STATIC.key_epoch_at(in_2100), 0);
        assert_eq!(Epochs::STATIC.key_epoch(1_000_000), 0);
    }
}
