//! How long to wait before dialling again.

use std::time::Duration;

use rand::{Rng, RngExt};

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(30);

/// Waits that double from 100 ms to 30 s, each cut by up to a half at random, so that the
/// neighbours of a node that comes back do not all dial at once.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The next wait.
    pub fn next_wait(&mut self, rng: &mut impl Rng) -> Duration {
        let longest = self.next;
        self.next = (longest * 2).min(LONGEST);
        rng.random_range(longest / 2..=longest)
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut rng = rand::rng();
        let mut backoff = Backoff::default();
        for doublings in 0..40u32 {
            let longest = (FIRST * 2u32.pow(doublings.min(10))).min(LONGEST);
            let wait = backoff.next_wait(&mut rng);
            assert!((longest / 2..=longest).contains(&wait), "{doublings}: {wait:?}");
        }
        backoff.reset();
        assert!(backoff.next_wait(&mut rng) <= FIRST);
    }
}
