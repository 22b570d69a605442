//! The deliveries of one connection: which are next, and which may be confirmed.

use std::collections::BTreeSet;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mixsocks_common::gateway::message::KeptBox;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::store::{ClientId, Store, StoreError};

/// Bytes of boxes that are read for a connection at a time, and held until they are written: 20 of
/// the usual ones, and at least one.
const READ_BYTES: usize = 32 * 1024;
/// How long a connection waits before it reads again from a store that has failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Numbers that are remembered for a connection: as many as a client has deliveries, 1 MB. Beyond, the
/// oldest go: they come again after the next RECEIVE, and can be confirmed then.
const MAX_UNCONFIRMED: usize = 65_536;

/// What both halves of a connection know of its deliveries.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    /// RECEIVE has come, with this number: begin with the oldest.
    start: Mutex<Option<u32>>,
    /// Deliveries that were sent over this connection and not yet confirmed. Those that a client
    /// confirms from an older connection are not among them, unless they were sent again. Locked for
    /// a few of them, never across an await.
    unconfirmed: Mutex<BTreeSet<u64>>,
}

impl Wishes {
    /// The client wants what is kept for it, from the oldest on.
    pub(super) fn receive(&self, number: u32) {
        *self.start() = Some(number);
    }

    fn start(&self) -> MutexGuard<'_, Option<u32>> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves of the numbers those that were sent over this connection and not confirmed: others need
    /// nothing done, and looking for them would cost the disk.
    pub(super) fn confirm(&self, mut numbers: Vec<u64>) -> Vec<u64> {
        let mut unconfirmed = self.unconfirmed();
        numbers.retain(|number| unconfirmed.remove(number));
        numbers
    }

    /// A delivery is sent.
    fn handle_sent(&self, number: u64) {
        let mut unconfirmed = self.unconfirmed();
        unconfirmed.insert(number);
        if unconfirmed.len() > MAX_UNCONFIRMED {
            unconfirmed.pop_first();
        }
    }

    fn unconfirmed(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.unconfirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Reading = JoinHandle<Result<Vec<KeptBox>, StoreError>>;

/// How far the answer to the last RECEIVE is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// More of what was kept is to be read. This is its number.
    Begun(u32),
    /// The last of it was read.
    Read(u32),
    /// It was sent, and the client was told so; or nobody has asked.
    Complete,
}

/// Reads what a client is to be sent, each delivery once, a few at a time.
pub(super) struct Inbox {
    client: ClientId,
    store: Arc<dyn Store>,
    wishes: Arc<Wishes>,
    at_once: usize,
    /// Up to which number it was sent; `None` until the client asks.
    cursor: Option<u64>,
    /// There may be more behind the cursor.
    has_more: bool,
    answer: Answer,
    /// One at a time: however often the client asks, no reads pile up.
    reading: Option<Reading>,
    /// What is being read was asked for before the client wanted to begin again.
    is_outdated: bool,
    /// The store has failed: nothing is read until then.
    retry_at: Option<Instant>,
    /// Was read, and is sent next; the last is the first.
    ready: Vec<KeptBox>,
}

impl Inbox {
    pub(super) fn new(
        client: ClientId,
        store: Arc<dyn Store>,
        wishes: Arc<Wishes>,
        box_bytes: usize,
    ) -> Self {
        Self {
            client,
            store,
            wishes,
            at_once: (READ_BYTES / box_bytes.max(1)).max(1),
            cursor: None,
            has_more: false,
            answer: Answer::Complete,
            reading: None,
            is_outdated: false,
            retry_at: None,
            ready: Vec::new(),
        }
    }

    /// How many can be sent at once.
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// The next delivery to send.
    pub(super) fn next(&mut self) -> Option<KeptBox> {
        let kept = self.ready.pop()?;
        self.wishes.handle_sent(kept.number);
        Some(kept)
    }

    /// The number of the RECEIVE of which the client is to be told that it was sent all that was kept when
    /// it asked; once. What has come since then is still to be read, or follows.
    pub(super) fn take_caught_up(&mut self) -> Option<u32> {
        let Answer::Read(number) = self.answer else { return None };
        self.ready.is_empty().then(|| {
            self.answer = Answer::Complete;
            number
        })
    }

    /// Something new is kept for the client.
    pub(super) fn handle_new(&mut self) {
        self.has_more = true;
    }

    /// Looks what the client wants, and begins to read if there is nothing left to send.
    pub(super) fn poll(&mut self) {
        let start = self.wishes.start().take();
        if let Some(number) = start {
            self.cursor = Some(0);
            self.has_more = true;
            self.answer = Answer::Begun(number);
            self.is_outdated = self.reading.is_some();
            self.ready.clear();
        }
        let is_waiting = self.retry_at.is_some_and(|at| Instant::now() < at);
        let Some(cursor) = self.cursor else { return };
        if !self.has_more || is_waiting || self.reading.is_some() || !self.ready.is_empty() {
            return;
        }
        self.retry_at = None;
        self.has_more = false;
        let (store, client, at_once) = (self.store.clone(), self.client, self.at_once);
        self.reading = Some(spawn_blocking(move || store.deliveries(&client, cursor, at_once)));
    }

    /// Waits until something has been read, or may be read again. Can be cancelled without loss.
    pub(super) async fn changed(&mut self) {
        if let Some(reading) = &mut self.reading {
            let read = reading.await.expect("the store does not panic");
            self.reading = None;
            if !mem::take(&mut self.is_outdated) {
                self.handle_read(read);
            }
        } else if let Some(at) = self.retry_at {
            sleep_until(at).await;
        } else {
            std::future::pending().await
        }
    }

    fn handle_read(&mut self, read: Result<Vec<KeptBox>, StoreError>) {
        match read {
            Ok(read) => {
                let is_end = read.len() < self.at_once;
                self.has_more |= !is_end;
                if is_end && let Answer::Begun(number) = self.answer {
                    self.answer = Answer::Read(number);
                }
                if let Some(last) = read.last() {
                    self.cursor = Some(last.number);
                }
                self.ready = read;
                self.ready.reverse();
            }
            Err(error) => {
                debug!("deliveries cannot be read: {error}");
                self.has_more = true;
                self.retry_at = Some(Instant::now() + RETRY_AFTER);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use futures_util::FutureExt;
    use mixsocks_common::gateway::token::TokenHash;
    use mixsocks_common::topology::UnixTime;

    use super::super::store::{Change, Expired, Outcome, Usage};
    use super::*;

    const BOX_BYTES: usize = 1635;

    /// So many deliveries, unless it fails.
    #[derive(Debug, Default)]
    struct TestStore {
        /// The number of the oldest.
        first: AtomicU64,
        boxes: AtomicU64,
        fails: AtomicBool,
        reads: AtomicU64,
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
            self.reads.fetch_add(1, Ordering::Relaxed);
            if self.fails.load(Ordering::Relaxed) {
                return Err(StoreError::Closed("test".into()));
            }
            let first = self.first.load(Ordering::Relaxed).max(after + 1);
            let numbers = first..=self.boxes.load(Ordering::Relaxed);
            let kept = |number| KeptBox { number, sealed: vec![0; BOX_BYTES] };
            Ok(numbers.take(max).map(kept).collect())
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

    fn inbox(boxes: u64) -> (Arc<TestStore>, Arc<Wishes>, Inbox) {
        let (store, wishes) = (Arc::<TestStore>::default(), Arc::<Wishes>::default());
        store.boxes.store(boxes, Ordering::Relaxed);
        let inbox = Inbox::new([1; 32], store.clone(), wishes.clone(), BOX_BYTES);
        (store, wishes, inbox)
    }

    /// All that can be sent until there is nothing more to read.
    async fn sent(inbox: &mut Inbox) -> Vec<u64> {
        let mut numbers = Vec::new();
        loop {
            inbox.poll();
            if inbox.reading.is_none() && inbox.ready() == 0 {
                return numbers;
            }
            if inbox.reading.is_some() {
                inbox.changed().await;
            }
            assert!(inbox.ready() * BOX_BYTES <= READ_BYTES);
            numbers.extend(std::iter::from_fn(|| inbox.next()).map(|kept| kept.number));
        }
    }

    #[tokio::test]
    async fn each_delivery_is_sent_once_and_few_are_held() {
        let (store, wishes, mut inbox) = inbox(100);
        assert!(sent(&mut inbox).await.is_empty(), "nobody has asked");
        wishes.receive(1);
        assert_eq!(sent(&mut inbox).await, (1..=100).collect::<Vec<_>>());
        assert!(sent(&mut inbox).await.is_empty());
        store.boxes.store(103, Ordering::Relaxed);
        inbox.handle_new();
        assert_eq!(sent(&mut inbox).await, [101, 102, 103]);
        wishes.receive(1);
        assert_eq!(sent(&mut inbox).await, (1..=103).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn however_often_a_client_asks_one_read_is_under_way() {
        let (store, wishes, mut inbox) = inbox(30);
        for _ in 0..100 {
            wishes.receive(1);
            inbox.poll();
        }
        // What was asked for last is read from the beginning, after what was under way.
        assert_eq!(sent(&mut inbox).await, (1..=30).collect::<Vec<_>>());
        assert!(store.reads.load(Ordering::Relaxed) <= 4);
    }

    #[tokio::test]
    async fn a_client_is_told_once_for_each_time_that_it_asks_and_after_all_that_was_kept() {
        let (store, wishes, mut inbox) = inbox(45);
        assert_eq!(inbox.take_caught_up(), None, "nobody has asked");
        for (number, boxes) in [(7, 45), (8, 60)] {
            store.boxes.store(boxes, Ordering::Relaxed);
            wishes.receive(0);
            inbox.poll();
            wishes.receive(number);
            let mut sent = 0;
            let caught_up = loop {
                if let Some(number) = inbox.take_caught_up() {
                    break number;
                }
                inbox.poll();
                if inbox.reading.is_some() {
                    inbox.changed().await;
                }
                sent += u64::from(inbox.next().is_some());
            };
            assert_eq!((sent, caught_up), (boxes, number));
            store.boxes.store(boxes + 1, Ordering::Relaxed);
            inbox.handle_new();
            self::sent(&mut inbox).await;
            assert_eq!(inbox.take_caught_up(), None, "it has been told");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_is_not_told_while_the_store_fails() {
        let (store, wishes, mut inbox) = inbox(3);
        store.fails.store(true, Ordering::Relaxed);
        wishes.receive(1);
        inbox.poll();
        inbox.changed().await;
        assert_eq!(inbox.take_caught_up(), None);
        store.fails.store(false, Ordering::Relaxed);
        inbox.changed().await;
        sent(&mut inbox).await;
        assert_eq!(inbox.take_caught_up(), Some(1));
    }

    #[test]
    fn the_largest_boxes_are_sent_one_at_a_time() {
        let inbox = Inbox::new([1; 32], Arc::new(TestStore::default()), Arc::default(), 32_355);
        assert_eq!(inbox.at_once, 1);
    }

    #[tokio::test]
    async fn only_what_was_sent_can_be_confirmed_and_once() {
        let (_, wishes, mut inbox) = inbox(5);
        assert!(wishes.confirm(vec![1, 2]).is_empty());
        wishes.receive(1);
        sent(&mut inbox).await;
        assert_eq!(wishes.confirm(vec![1, 2, 9]), [1, 2]);
        assert_eq!(wishes.confirm(vec![2, 3, 4, 4]), [3, 4]);
        // Asking again sends what is left once more, and nothing can be confirmed twice for it.
        wishes.receive(1);
        sent(&mut inbox).await;
        assert_eq!(wishes.confirm(vec![5, 5]), [5]);
    }

    /// A client that confirms over a new connection what the old one has brought, and the gateway had
    /// let go of already.
    #[tokio::test]
    async fn confirmations_of_an_older_connection_leave_those_of_the_new_one_alone() {
        let (store, wishes, mut inbox) = inbox(60);
        store.first.store(31, Ordering::Relaxed);
        wishes.receive(1);
        assert_eq!(sent(&mut inbox).await, (31..=60).collect::<Vec<_>>());
        assert!(wishes.confirm((1..=30).collect()).is_empty());
        assert_eq!(wishes.confirm((31..=60).collect()), (31..=60).collect::<Vec<_>>());
    }

    #[test]
    fn the_numbers_of_a_connection_are_bounded() {
        let wishes = Wishes::default();
        let last = MAX_UNCONFIRMED as u64 + 2;
        (1..=last).for_each(|number| wishes.handle_sent(number));
        assert!(wishes.confirm(vec![1, 2]).is_empty());
        assert_eq!(wishes.confirm(vec![3, last]), [3, last]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_fails_is_asked_again_after_a_while() {
        let (store, wishes, mut inbox) = inbox(3);
        store.fails.store(true, Ordering::Relaxed);
        wishes.receive(1);
        let start = Instant::now();
        inbox.poll();
        inbox.changed().await;
        store.fails.store(false, Ordering::Relaxed);
        assert!(sent(&mut inbox).await.is_empty());
        assert!(inbox.changed().now_or_never().is_none());
        inbox.changed().await;
        assert!(start.elapsed() >= RETRY_AFTER && start.elapsed() < 2 * RETRY_AFTER);
        assert_eq!(sent(&mut inbox).await, [1, 2, 3]);
        let nothing = tokio::time::timeout(Duration::from_secs(60), inbox.changed());
        assert!(nothing.await.is_err(), "it waits for something new");
    }
}
