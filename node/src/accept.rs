//! Accepting connections also when the system refuses to.

use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::warn;

/// How long to wait after a failure that the next try would meet again, such as a lack of file
/// descriptors: what waits in the queue of the system is accepted soon after one is free.
const PAUSE: Duration = Duration::from_millis(100);
/// A failure that comes no later than this after the last one is no news: when descriptors are
/// scarce, some connections get in between.
const NEWS_AFTER: Duration = Duration::from_secs(60);

/// How accepting went so far.
pub(crate) struct Accepting {
    /// What is accepted, for the log.
    what: &'static str,
    failed_at: Option<Instant>,
}

impl Accepting {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, failed_at: None }
    }

    /// Waits for a connection, and pauses after failures; whoever calls it serves others meanwhile.
    /// Can be cancelled without loss, also of the pause.
    pub(crate) async fn next<T, F>(&mut self, accept: impl Fn() -> F) -> T
    where
        F: Future<Output = io::Result<T>>,
    {
        loop {
            if let Some(failed_at) = self.failed_at {
                sleep_until(failed_at + PAUSE).await;
            }
            match accept().await {
                Ok(connection) => return connection,
                Err(error) if concerns_one_connection(&error) => {}
                Err(error) => self.handle_failure(&error),
            }
        }
    }

    fn handle_failure(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.failed_at.is_none_or(|last| now > last + NEWS_AFTER) {
            warn!("cannot accept {}, and tries again: {error}", self.what);
        }
        self.failed_at = Some(now);
    }
}

/// Whether it was the connection that failed, so that the next one may be fine.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind;
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lack_of_descriptors_is_waited_out_without_spinning() {
        let (tries, failures) = (&Cell::new(0u32), &Cell::new(3));
        let accept = || async move {
            tries.set(tries.get() + 1);
            if failures.get() == 0 {
                return Ok(());
            }
            failures.set(failures.get() - 1);
            Err(io::Error::from_raw_os_error(24))
        };
        let mut accepting = Accepting::new("tests");
        let start = Instant::now();
        accepting.next(accept).await;
        assert_eq!((tries.get(), start.elapsed() / 3), (4, PAUSE));
        // Not a pause for each connection from then on.
        accepting.next(accept).await;
        assert_eq!(start.elapsed() / 3, PAUSE);

        // Whoever looks after other things in between does not shorten the pause.
        failures.set(1);
        let start = Instant::now();
        while timeout(PAUSE / 10, accepting.next(accept)).await.is_err() {}
        assert!(start.elapsed() >= PAUSE && tries.get() == 7, "{}", tries.get());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_broke_costs_the_others_nothing() {
        let is_broken = &Cell::new(true);
        let accept = || async move {
            match is_broken.replace(false) {
                true => Err(io::ErrorKind::ConnectionAborted.into()),
                false => Ok(()),
            }
        };
        let start = Instant::now();
        Accepting::new("tests").next(accept).await;
        assert!(start.elapsed().is_zero());
    }
}
