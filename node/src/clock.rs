//! The time of day, by which keys change.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mixsocks_common::topology::UnixTime;

/// How long is waited at most before the clock is read again: clocks are set, and machines sleep.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Where a node has the time of day from.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    /// The clock of the machine.
    System,
    /// A clock that a test sets.
    #[cfg(test)]
    Fake(tokio::sync::watch::Receiver<UnixTime>),
}

impl Clock {
    pub(crate) fn now(&self) -> UnixTime {
        match self {
            Self::System => {
                let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
                UnixTime(elapsed.map_or(0, |elapsed| elapsed.as_secs()))
            }
            #[cfg(test)]
            Self::Fake(now) => *now.borrow(),
        }
    }

    /// Waits for that time, or for a shorter one: whoever waits looks at the clock afterwards.
    pub(crate) async fn wait(&mut self, until: UnixTime) {
        let left = Duration::from_secs(until.0.saturating_sub(self.now().0));
        match self {
            Self::System => tokio::time::sleep(left.min(LONGEST_WAIT)).await,
            #[cfg(test)]
            Self::Fake(now) => {
                if now.changed().await.is_err() {
                    std::future::pending().await
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_clock_is_looked_at_every_minute() {
        let mut clock = Clock::System;
        let start = tokio::time::Instant::now();
        clock.wait(UnixTime(u64::MAX)).await;
        assert_eq!(start.elapsed().as_secs(), 60);
        clock.wait(UnixTime(clock.now().0 + 10)).await;
        assert!((69..=70).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
        clock.wait(UnixTime(0)).await;
        assert!(start.elapsed().as_secs() <= 70, "a time that is past is not waited for");
    }
}
