//! How much of the store one client may take, and how its deliveries are numbered.

use std::time::Duration;

use mixsocks_common::topology::UnixTime;

use super::{Limits, Outcome, Usage};

/// A client may take no more than this part of what is left of the whole store. So whoever has
/// clients registered to fill the store gets ever smaller shares: 300 of them leave a hundredth of
/// it, of which the next client still gets a megabyte.
const PART_OF_REST: u64 = 64;

/// A number has the hour in which its box came above these bits, so that the age of a delivery
/// stands nowhere else, and nothing finer is known.
const COUNT_BITS: u32 = 32;
const SECONDS_OF_AN_HOUR: u64 = 60 * 60;

/// What is kept for one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// The highest number that was ever used.
    pub last_number: u64,
    /// Boxes.
    pub boxes: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Share {
    /// Takes a box of so many bytes in, under the number that this returns.
    pub fn add(&mut self, bytes: u64, now: UnixTime) -> u64 {
        self.last_number = (self.last_number + 1).max(first_number(now));
        self.boxes += 1;
        self.bytes += bytes;
        self.last_number
    }

    /// Lets a box of so many bytes go.
    pub fn remove(&mut self, bytes: u64) {
        self.boxes = self.boxes.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// The lowest number of a delivery that came in the hour of `now`, or later.
pub fn first_number(now: UnixTime) -> u64 {
    let hour = now.0 / SECONDS_OF_AN_HOUR;
    // Hours of the next 490,000 years fit.
    hour.checked_shl(COUNT_BITS).unwrap_or(u64::MAX).max(1)
}

/// The beginning of the hour in which the delivery of that number came.
pub(super) fn hour_of(number: u64) -> UnixTime {
    UnixTime((number >> COUNT_BITS) * SECONDS_OF_AN_HOUR)
}

/// The highest number of the hour of that number.
pub(super) fn last_number_of_hour(number: u64) -> u64 {
    number | ((1 << COUNT_BITS) - 1)
}

/// The lowest number that has not expired; lower ones may go.
pub(super) fn oldest_number(now: UnixTime, expiry: Duration) -> u64 {
    first_number(UnixTime(now.0.saturating_sub(expiry.as_secs())))
}

/// Whether a box of so many bytes may be kept beside what is kept already.
///
/// What was acknowledged must arrive: at a bound the new box is refused, and no older one goes.
///
/// # Errors
/// [`Outcome::ClientFull`] or [`Outcome::StoreFull`].
pub fn judge(limits: &Limits, share: &Share, usage: &Usage, bytes: u64) -> Result<(), Outcome> {
    let rest = limits.total_bytes.saturating_sub(usage.bytes);
    if bytes > rest {
        return Err(Outcome::StoreFull);
    }
    let client_bytes = limits.client_bytes.min((rest / PART_OF_REST).max(bytes));
    if share.boxes >= limits.client_boxes || share.bytes + bytes > client_bytes {
        return Err(Outcome::ClientFull);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = SECONDS_OF_AN_HOUR;
    const BOX_BYTES: u64 = 1635;

    fn limits() -> Limits {
        Limits { client_bytes: 10 * BOX_BYTES, client_boxes: 7, ..Limits::default() }
    }

    #[test]
    fn numbers_grow_whatever_the_clock_does() {
        let mut share = Share::default();
        let mut last = 0;
        for now in [HOUR, HOUR + 1, 5 * HOUR, 2 * HOUR, 0, 5 * HOUR, 6 * HOUR, u64::MAX] {
            let number = share.add(1, UnixTime(now));
            assert!(number > last, "{now}");
            last = number;
        }
        assert_eq!(share, Share { last_number: last, boxes: 8, bytes: 8 });
    }

    #[test]
    fn an_expired_number_is_at_least_as_old_as_it_must_be_and_at_most_an_hour_older() {
        let expiry = Duration::from_secs(3 * HOUR);
        for came in [100 * HOUR, 100 * HOUR + 1, 101 * HOUR - 1] {
            let number = Share::default().add(1, UnixTime(came));
            let is_expired = |now| number < oldest_number(UnixTime(now), expiry);
            assert!(!is_expired(came + 3 * HOUR - 1));
            assert!(is_expired(came + 4 * HOUR));
        }
    }

    #[test]
    fn bytes_and_boxes_of_a_client_are_bounded() {
        let usage = Usage::default();
        let of_bytes = |bytes| Share { bytes, ..Share::default() };
        let full = Err(Outcome::ClientFull);
        assert_eq!(judge(&limits(), &of_bytes(9 * BOX_BYTES), &usage, BOX_BYTES), Ok(()));
        assert_eq!(judge(&limits(), &of_bytes(9 * BOX_BYTES + 1), &usage, BOX_BYTES), full);
        let of_boxes = |boxes| Share { boxes, ..Share::default() };
        assert_eq!(judge(&limits(), &of_boxes(6), &usage, BOX_BYTES), Ok(()));
        assert_eq!(judge(&limits(), &of_boxes(7), &usage, BOX_BYTES), full);
    }

    #[test]
    fn all_together_are_bounded() {
        let usage = Usage { bytes: limits().total_bytes - BOX_BYTES, boxes: 1 };
        assert_eq!(judge(&limits(), &Share::default(), &usage, BOX_BYTES), Ok(()));
        let full = Err(Outcome::StoreFull);
        assert_eq!(judge(&limits(), &Share::default(), &usage, BOX_BYTES + 1), full);
    }

    #[test]
    fn hundreds_of_clients_that_fill_their_shares_leave_room_for_the_next() {
        let limits = Limits::default();
        let mut usage = Usage::default();
        for _ in 0..300 {
            let mut share = Share::default();
            while judge(&limits, &share, &usage, BOX_BYTES).is_ok() {
                share.add(BOX_BYTES, UnixTime(0));
                usage.bytes += BOX_BYTES;
            }
        }
        let (mut share, mut boxes) = (Share::default(), 0);
        while judge(&limits, &share, &usage, BOX_BYTES).is_ok() {
            share.add(BOX_BYTES, UnixTime(0));
            boxes += 1;
        }
        assert!(boxes > 500 && usage.bytes < limits.total_bytes, "{boxes}");
    }
}
