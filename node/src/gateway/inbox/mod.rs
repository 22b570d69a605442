//! The deliveries of one connection: its core, which both halves of the connection use, and the reading
//! from the disk.

mod core;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mixsocks_common::gateway::message::KeptBox;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::store::{ClientId, Store, StoreError};

pub use self::core::{InboxCore, ReadRequest};

/// What both halves of a connection know of its deliveries.
#[derive(Debug)]
pub(super) struct Inbox(Mutex<InboxCore>);

impl Inbox {
    /// That of a new connection, on a network whose boxes have `box_bytes`.
    pub(super) fn new(box_bytes: usize) -> Self {
        Self(Mutex::new(InboxCore::new(box_bytes)))
    }

    /// Locked for a few deliveries, never across an await.
    pub(super) fn lock(&self) -> MutexGuard<'_, InboxCore> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Reading = JoinHandle<Result<Vec<KeptBox>, StoreError>>;

/// Reads from the store what an inbox wants, beside its connection.
pub(super) struct InboxReader {
    client: ClientId,
    store: Arc<dyn Store>,
    inbox: Arc<Inbox>,
    reading: Option<Reading>,
}

impl InboxReader {
    pub(super) fn new(client: ClientId, store: Arc<dyn Store>, inbox: Arc<Inbox>) -> Self {
        Self { client, store, inbox, reading: None }
    }

    /// Begins to read if the inbox wants that.
    pub(super) fn poll(&mut self) {
        let Some(read) = self.inbox.lock().poll_read(now()) else { return };
        let (store, client) = (self.store.clone(), self.client);
        let reading = move || store.deliveries(&client, read.after, read.max);
        self.reading = Some(spawn_blocking(reading));
    }

    /// Waits until something has been read, or may be read again. Can be cancelled without loss.
    pub(super) async fn changed(&mut self) {
        let Some(reading) = &mut self.reading else {
            let retry_at = self.inbox.lock().poll_timeout();
            return match retry_at {
                Some(at) => sleep_until(at.into()).await,
                None => std::future::pending().await,
            };
        };
        let read = reading.await.expect("the store does not panic");
        self.reading = None;
        match read {
            Ok(read) => self.inbox.lock().handle_read(read),
            Err(error) => {
                debug!("deliveries cannot be read: {error}");
                self.inbox.lock().handle_read_failure(now());
            }
        }
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures_util::FutureExt;
    use mixsocks_common::gateway::token::TokenHash;
    use mixsocks_common::topology::UnixTime;

    use super::super::store::{Change, Expired, Outcome, Usage};
    use super::core::RETRY_AFTER;
    use super::*;

    const BOX_BYTES: usize = 1635;
    const BOXES: u64 = 45;

    /// Some deliveries, unless it fails.
    #[derive(Debug, Default)]
    struct TestStore {
        fails: AtomicBool,
    }

    impl Store for TestStore {
        fn apply(&self, _: &[Change], _: UnixTime) -> Result<Vec<Outcome>, StoreError> {
            unreachable!("nobody writes")
        }

        fn deliveries(
            &self,
            _: &ClientId,
            after: u64,
            max: usize,
        ) -> Result<Vec<KeptBox>, StoreError> {
            if self.fails.load(Ordering::Relaxed) {
                return Err(StoreError::Closed("test".into()));
            }
            let kept = |number| KeptBox { number, sealed: vec![0; BOX_BYTES] };
            Ok((after + 1..=BOXES).take(max).map(kept).collect())
        }

        fn token_hash(&self, _: &ClientId) -> Result<Option<TokenHash>, StoreError> {
            unreachable!("nobody logs in")
        }

        fn expire(&self, _: UnixTime) -> Result<Expired, StoreError> {
            unreachable!("nothing expires")
        }

        fn usage(&self) -> Usage {
            Usage::default()
        }
    }

    fn inbox() -> (Arc<TestStore>, Arc<Inbox>, InboxReader) {
        let (store, inbox) = (Arc::<TestStore>::default(), Arc::new(Inbox::new(BOX_BYTES)));
        let reader = InboxReader::new([1; 32], store.clone(), inbox.clone());
        (store, inbox, reader)
    }

    /// How many are sent until it is said that these were all, and what is said.
    async fn sent(inbox: &Inbox, reader: &mut InboxReader) -> (usize, u32) {
        let mut sent = 0;
        loop {
            if let Some(number) = inbox.lock().poll_caught_up() {
                return (sent, number);
            }
            reader.poll();
            reader.changed().await;
            sent += std::iter::from_fn(|| inbox.lock().poll_transmit()).count();
        }
    }

    #[tokio::test]
    async fn what_one_half_asks_for_the_other_one_reads() {
        let (_, inbox, mut reader) = inbox();
        reader.poll();
        assert!(reader.changed().now_or_never().is_none(), "nobody has asked");
        for number in [7, 8] {
            inbox.lock().handle_receive(number);
            assert_eq!(sent(&inbox, &mut reader).await, (45, number));
        }
        reader.poll();
        assert!(reader.changed().now_or_never().is_none(), "it waits for something new");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_fails_is_asked_again_after_a_while() {
        let (store, inbox, mut reader) = inbox();
        store.fails.store(true, Ordering::Relaxed);
        inbox.lock().handle_receive(1);
        let start = Instant::now();
        reader.poll();
        reader.changed().await;
        store.fails.store(false, Ordering::Relaxed);
        reader.poll();
        assert!(reader.changed().now_or_never().is_none());
        reader.changed().await;
        assert!(start.elapsed() >= RETRY_AFTER && start.elapsed() < 2 * RETRY_AFTER);
        assert_eq!(sent(&inbox, &mut reader).await, (45, 1));
    }
}
