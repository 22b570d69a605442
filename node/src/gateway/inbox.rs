//! The deliveries of one connection: which are next, and which may be confirmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// What both halves of a connection know of its deliveries.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    /// RECEIVE has come: begin with the oldest.
    start: AtomicBool,
    /// Deliveries that were sent and not yet confirmed by so many numbers.
    unconfirmed: AtomicU64,
}

impl Wishes {
    /// The client wants what is kept for it, from the oldest on.
    pub(super) fn receive(&self) {
        self.start.store(true, Ordering::Relaxed);
    }

    /// Takes as many of the numbers as deliveries were sent over this connection and not confirmed:
    /// beyond that nobody can have anything to confirm, and looking for it would cost the disk.
    pub(super) fn confirm(&self, mut numbers: Vec<u64>) -> Vec<u64> {
        let all = numbers.len() as u64;
        let before = self
            .unconfirmed
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(all))
            })
            .unwrap_or_default();
        numbers.truncate(usize::try_from(before).unwrap_or(usize::MAX));
        numbers
    }
}

type Reading = JoinHandle<Result<Vec<KeptBox>, StoreError>>;

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
    reading: Option<Reading>,
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
            reading: None,
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
        self.wishes.unconfirmed.fetch_add(1, Ordering::Relaxed);
        Some(kept)
    }

    /// Something new is kept for the client.
    pub(super) fn handle_new(&mut self) {
        self.has_more = true;
    }

    /// Looks what the client wants, and begins to read if there is nothing left to send.
    pub(super) fn poll(&mut self) {
        if self.wishes.start.swap(false, Ordering::Relaxed) {
            self.cursor = Some(0);
            self.has_more = true;
            self.reading = None;
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
            self.handle_read(read);
        } else if let Some(at) = self.retry_at {
            sleep_until(at).await;
        } else {
            std::future::pending().await
        }
    }

    fn handle_read(&mut self, read: Result<Vec<KeptBox>, StoreError>) {
        match read {
            Ok(read) => {
                self.has_more |= read.len() == self.at_once;
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
