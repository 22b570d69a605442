//! What a gateway does while its store fails: when it tries again, and what it still owes.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::{Change, ClientId};

/// For how long nothing is tried after a failure: each that follows doubles it. A failure costs the
/// disk more than a batch, as the file is opened anew, and with many clients a second of work.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(16);

/// Confirmations that are kept while the store fails: 3 MB. What is beyond comes again when its
/// client asks for its deliveries the next time, and is confirmed again.
const MAX_OWED: usize = 65_536;

/// When something that has failed is tried again.
#[derive(Debug, Default)]
pub(super) struct Pause {
    length: Duration,
    until: Option<Instant>,
}

impl Pause {
    pub(super) fn handle_failure(&mut self, now: Instant) {
        self.length = (2 * self.length).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.until = Some(now + self.length);
    }

    pub(super) fn handle_success(&mut self) {
        *self = Self::default();
    }

    /// Whether it may be tried.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// Whether it works, as far as is known.
    pub(super) fn is_clear(&self) -> bool {
        self.until.is_none()
    }
}

/// Confirmations that could not be stored, each once.
#[derive(Default)]
pub(super) struct OwedConfirmations(BTreeSet<(ClientId, u64)>);

/// Shows no client.
impl fmt::Debug for OwedConfirmations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwedConfirmations({})", self.0.len())
    }
}

impl OwedConfirmations {
    /// Keeps those of a client, as long as there is room.
    pub(super) fn insert(&mut self, client: ClientId, numbers: &[u64]) {
        let room = MAX_OWED - self.0.len();
        self.0.extend(numbers.iter().take(room).map(|number| (client, *number)));
    }

    /// Takes out up to `max` numbers, as changes.
    pub(super) fn take(&mut self, max: usize) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for _ in 0..max {
            let Some((of, number)) = self.0.pop_first() else { break };
            match changes.last_mut() {
                Some(Change::Confirm { client, numbers }) if *client == of => numbers.push(number),
                _ => changes.push(Change::Confirm { client: of, numbers: vec![number] }),
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_doubles_the_pause_up_to_the_longest() {
        let (mut pause, mut now) = (Pause::default(), Instant::now());
        assert!(pause.is_over(now) && pause.is_clear());
        for seconds in [1, 2, 4, 8, 16, 16] {
            pause.handle_failure(now);
            let end = now + Duration::from_secs(seconds);
            assert!(!pause.is_over(end - Duration::from_millis(1)));
            assert!(pause.is_over(end) && !pause.is_clear());
            now = end;
        }
        pause.handle_success();
        assert!(pause.is_over(now) && pause.is_clear());
        pause.handle_failure(now);
        assert!(pause.is_over(now + FIRST_PAUSE));
    }

    #[test]
    fn confirmations_are_owed_once_and_by_client() {
        let mut owed = OwedConfirmations::default();
        let of = |client, numbers| Change::Confirm { client: [client; 32], numbers };
        owed.insert([2; 32], &[5]);
        owed.insert([1; 32], &[9, 7, 9]);
        owed.insert([1; 32], &[7, 8]);
        assert_eq!(owed.take(2), [of(1, vec![7, 8])]);
        assert_eq!(owed.take(9), [of(1, vec![9]), of(2, vec![5])]);
        assert_eq!(owed.take(9), []);
    }

    #[test]
    fn no_more_are_owed_than_there_is_room_for() {
        let mut owed = OwedConfirmations::default();
        let numbers: Vec<_> = (0..=MAX_OWED as u64).collect();
        owed.insert([1; 32], &numbers);
        owed.insert([2; 32], &numbers[..1]);
        let kept = Change::Confirm { client: [1; 32], numbers: numbers[..MAX_OWED].to_vec() };
        assert_eq!(owed.take(usize::MAX), [kept]);
    }
}
