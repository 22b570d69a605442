//! Group commit: changes wait in a bounded queue, and all that wait are applied in one go.
//!
//! Making a batch durable costs the disk nearly the same whether it is one change or hundreds; while
//! one batch is written, the next one gathers. An answer is given only when its batch is durable.
//!
//! While the store fails, nearly everything is refused without trying, as trying costs it more than
//! success: boxes, which need room, after a batch with them has failed, and all else after a batch
//! without them has. Confirmations are not refused: they are tried again until they are stored.

use std::collections::BTreeSet;
use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::super::acceptor::until_stopped;
use super::failing::{OwedConfirmations, Pause};
use super::{Change, ClientId, Expired, Outcome, Statistics, Store, StoreError};
use crate::clock::Clock;

/// Changes that may wait: four batches. Of the usual boxes they take 3.4 MB, of the largest 66 MB.
pub const QUEUED_CHANGES: usize = 2048;
/// Changes in one batch: what a disk writes in some 20 ms.
const BATCH_CHANGES: usize = 512;
/// How often it is written down who has logged in: once for all who did, so that no number of
/// logins keeps the disk busy. A crash forgets no more than these.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);
/// Confirmations that are tried again in one batch: some 20 ms.
const OWED_AT_ONCE: usize = 4096;
/// How often boxes are looked for that have expired; they do by the hour.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// A change with what waits for its outcome.
type Waiting<W> = (Change, W);

/// What became of a change.
#[derive(Debug)]
pub struct Answer<W> {
    /// The change.
    pub change: Change,
    /// What waited for it.
    pub waiting: W,
    /// Its outcome; `None` when the store fails. Confirmations are tried again then.
    pub outcome: Option<Outcome>,
}

/// Where changes are handed in. What waits for an outcome is the caller's own.
#[derive(Debug)]
pub struct Changes<W> {
    queue: mpsc::Sender<Waiting<W>>,
    logins: Arc<Logins>,
}

impl<W> Clone for Changes<W> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), logins: self.logins.clone() }
    }
}

impl<W> Changes<W> {
    /// Hands in a change without waiting; gives it back when [`QUEUED_CHANGES`] wait already, or the
    /// gateway stops.
    ///
    /// # Errors
    /// The change and what waits for it.
    pub fn try_push(&self, change: Change, waiting: W) -> Result<(), (Change, W)> {
        self.queue.try_send((change, waiting)).map_err(mpsc::error::TrySendError::into_inner)
    }

    /// Hands in a change, and waits while [`QUEUED_CHANGES`] wait already. When the gateway stops it
    /// is lost.
    pub async fn push(&self, change: Change, waiting: W) {
        // An error means that it stops.
        let _ = self.queue.send((change, waiting)).await;
    }

    /// Takes down that a client has logged in; it is written within a second. Does not block.
    pub fn note_login(&self, client: ClientId) {
        self.logins.insert(client);
    }
}

/// Clients that have logged in since it was last written down; those that are registered, hence no
/// more than may be.
#[derive(Debug, Default)]
struct Logins(Mutex<BTreeSet<ClientId>>);

impl Logins {
    fn insert(&self, client: ClientId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(client);
    }

    fn take(&self) -> Vec<Change> {
        let mut logins = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mem::take(&mut *logins).into_iter().map(|client| Change::LogIn { client }).collect()
    }

    fn put_back(&self, changes: &[Change]) {
        for change in changes {
            if let Change::LogIn { client } = change {
                self.insert(*client);
            }
        }
    }
}

/// The one that writes: the task of [`GroupCommit::run`].
#[derive(Debug)]
pub struct GroupCommit<S: ?Sized, W> {
    store: Arc<S>,
    clock: Clock,
    queue: mpsc::Receiver<Waiting<W>>,
    logins: Arc<Logins>,
    statistics: Arc<Statistics>,
    /// Boxes are refused until then.
    box_pause: Pause,
    /// Nothing at all is tried until then.
    pause: Pause,
    owed: OwedConfirmations,
    /// The operator was told that the store fails.
    said_it_fails: bool,
}

impl<S: Store + ?Sized, W> GroupCommit<S, W> {
    /// For a store; changes go into the first part.
    pub fn new(store: Arc<S>, statistics: Arc<Statistics>) -> (Changes<W>, Self) {
        Self::at(store, statistics, Clock::System)
    }

    pub(crate) fn at(
        store: Arc<S>,
        statistics: Arc<Statistics>,
        clock: Clock,
    ) -> (Changes<W>, Self) {
        let (changes, queue) = mpsc::channel(QUEUED_CHANGES);
        let logins = Arc::<Logins>::default();
        let group_commit = Self {
            store,
            clock,
            queue,
            logins: logins.clone(),
            statistics,
            box_pause: Pause::default(),
            pause: Pause::default(),
            owed: OwedConfirmations::default(),
            said_it_fails: false,
        };
        (Changes { queue: changes, logins }, group_commit)
    }

    /// Applies what is handed in and gives the answers of each batch to `answer`, until `stopped` is
    /// true; then it applies what still waits, and ends.
    pub async fn run(
        mut self,
        mut stopped: watch::Receiver<bool>,
        mut answer: impl FnMut(Vec<Answer<W>>),
    ) {
        let mut saves = interval(SAVE_INTERVAL);
        saves.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut expiries = interval(EXPIRE_INTERVAL);
        expiries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_expiring = false;
        let mut batch = Vec::with_capacity(BATCH_CHANGES);
        loop {
            tokio::select! {
                count = self.queue.recv_many(&mut batch, BATCH_CHANGES) => {
                    if count == 0 {
                        break;
                    }
                    answer(self.apply(mem::take(&mut batch)).await);
                }
                _ = saves.tick() => {
                    self.save_logins().await;
                    self.save_owed().await;
                }
                _ = expiries.tick() => is_expiring = true,
                // Takes turns with what is handed in.
                () = std::future::ready(()), if is_expiring => {
                    is_expiring = !self.expire().await;
                }
                () = until_stopped(&mut stopped) => {
                    self.queue.close();
                    while self.queue.recv_many(&mut batch, BATCH_CHANGES).await > 0 {
                        answer(self.apply(mem::take(&mut batch)).await);
                    }
                    break;
                }
            }
        }
        // For the last time.
        self.pause.handle_success();
        self.save_logins().await;
        self.save_owed().await;
    }

    async fn apply(&mut self, batch: Vec<Waiting<W>>) -> Vec<Answer<W>> {
        let (changes, waiting): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        // Who has just logged in must not make room for somebody else.
        if changes.iter().any(|change| matches!(change, Change::Register { .. })) {
            self.save_logins().await;
        }
        let (changes, outcomes) = self.try_all(changes).await;
        for (change, outcome) in changes.iter().zip(&outcomes) {
            match change {
                Change::Keep { .. } => self.statistics.add_box(*outcome),
                Change::Confirm { client, numbers } => match outcome {
                    Some(_) => self.statistics.add_confirmed(numbers.len() as u64),
                    None => self.owed.insert(*client, numbers),
                },
                Change::Register { .. } | Change::LogIn { .. } => {}
            }
        }
        let answered = changes.into_iter().zip(waiting).zip(outcomes);
        answered.map(|((change, waiting), outcome)| Answer { change, waiting, outcome }).collect()
    }

    /// Applies changes as far as it may be tried now.
    async fn try_all(&mut self, mut changes: Vec<Change>) -> (Vec<Change>, Vec<Option<Outcome>>) {
        if changes.iter().any(Change::needs_room) && self.may_try_boxes() {
            let result;
            (changes, result) = self.apply_to_store(changes).await;
            match &result {
                Ok(_) => {
                    self.box_pause.handle_success();
                    self.pause.handle_success();
                }
                Err(_) => self.box_pause.handle_failure(Instant::now()),
            }
            if let Some(outcomes) = self.tell(result) {
                return (changes, outcomes.into_iter().map(Some).collect());
            }
        }
        // What needs no room may work all the same, and confirmations make some.
        let rest: Vec<_> = changes.iter().filter(|change| !change.needs_room()).cloned().collect();
        let (_, outcomes) = self.commit(rest).await;
        let mut outcomes = outcomes.unwrap_or_default().into_iter();
        let outcomes = changes
            .iter()
            .map(|change| if change.needs_room() { None } else { outcomes.next() })
            .collect();
        (changes, outcomes)
    }

    fn may_try_boxes(&self) -> bool {
        let now = Instant::now();
        self.pause.is_over(now) && self.box_pause.is_over(now)
    }

    async fn save_logins(&mut self) {
        let logins = self.logins.take();
        let (logins, outcomes) = self.commit(logins).await;
        if outcomes.is_none() {
            self.logins.put_back(&logins);
        }
    }

    /// Tries confirmations again that could not be stored.
    async fn save_owed(&mut self) {
        loop {
            let owed = self.owed.take(OWED_AT_ONCE);
            if owed.is_empty() {
                return;
            }
            let (owed, outcomes) = self.commit(owed).await;
            for change in &owed {
                let Change::Confirm { client, numbers } = change else { continue };
                match outcomes {
                    Some(_) => self.statistics.add_confirmed(numbers.len() as u64),
                    None => self.owed.insert(*client, numbers),
                }
            }
            if outcomes.is_none() {
                return;
            }
        }
    }

    /// Lets go of some boxes that have expired; whether it is done with all.
    async fn expire(&mut self) -> bool {
        if !self.pause.is_over(Instant::now()) {
            // With the next tick again.
            return true;
        }
        let (store, now) = (self.store.clone(), self.clock.now());
        let result = spawn_blocking(move || store.expire(now)).await;
        match self.handle_result(result.expect("the store does not panic")) {
            Some(Expired { boxes, is_done }) => {
                self.statistics.add_expired(boxes);
                is_done
            }
            None => true,
        }
    }

    /// Applies changes that need no room; `None` when that fails, or is not to be tried now.
    async fn commit(&mut self, changes: Vec<Change>) -> (Vec<Change>, Option<Vec<Outcome>>) {
        if changes.is_empty() {
            return (changes, Some(Vec::new()));
        }
        if !self.pause.is_over(Instant::now()) {
            return (changes, None);
        }
        let (changes, result) = self.apply_to_store(changes).await;
        (changes, self.handle_result(result))
    }

    /// What follows from trying something that needs no room.
    fn handle_result<T>(&mut self, result: Result<T, StoreError>) -> Option<T> {
        match &result {
            Ok(_) => self.pause.handle_success(),
            Err(_) => self.pause.handle_failure(Instant::now()),
        }
        self.tell(result)
    }

    async fn apply_to_store(
        &mut self,
        changes: Vec<Change>,
    ) -> (Vec<Change>, Result<Vec<Outcome>, StoreError>) {
        let (store, now) = (self.store.clone(), self.clock.now());
        let work = move || {
            let result = store.apply(&changes, now);
            (changes, result)
        };
        let applied = spawn_blocking(work).await.expect("the store does not panic");
        self.statistics.add_commit();
        applied
    }

    /// Tells the operator once when the store fails, and once when boxes are stored again.
    fn tell<T>(&mut self, result: Result<T, StoreError>) -> Option<T> {
        match result {
            Ok(done) => {
                if self.box_pause.is_clear() && mem::take(&mut self.said_it_fails) {
                    info!("messages and registrations are stored again");
                }
                Some(done)
            }
            Err(error) => {
                if !mem::replace(&mut self.said_it_fails, true) {
                    warn!(
                        "nothing can be stored, so messages and registrations are refused: {error}; \
                         make room on the disk of the data directory, or repair it"
                    );
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc as blocking;

    use futures_util::FutureExt;
    use mixsocks_common::gateway::message::KeptBox;
    use mixsocks_common::gateway::token::TokenHash;
    use mixsocks_common::topology::UnixTime;
    use tokio::task::JoinSet;

    use super::super::{Day, Limits, RedbStore, Usage};
    use super::*;
    use crate::link::testnet::{soon, until};

    const CLIENT: ClientId = [1; 32];

    fn keep(fill: u8) -> Change {
        Change::Keep { client: CLIENT, sealed: vec![fill; 100] }
    }

    fn confirm(numbers: Vec<u64>) -> Change {
        Change::Confirm { client: CLIENT, numbers }
    }

    /// A store that waits before each batch until the test lets it go on, and says what was in it.
    #[derive(Debug)]
    struct SlowStore {
        go: Mutex<blocking::Receiver<()>>,
        batches: Mutex<Vec<usize>>,
        is_full: AtomicBool,
        is_broken: AtomicBool,
    }

    impl SlowStore {
        fn new() -> (Arc<Self>, blocking::Sender<()>) {
            let (go, gone) = blocking::channel();
            let store = Self {
                go: Mutex::new(gone),
                batches: Mutex::default(),
                is_full: false.into(),
                is_broken: false.into(),
            };
            (Arc::new(store), go)
        }

        /// One that need not be let go on.
        fn fast() -> Arc<Self> {
            let (store, go) = Self::new();
            // Far more than any test has.
            (0..100_000).for_each(|_| go.send(()).unwrap());
            store
        }

        fn tries(&self) -> usize {
            self.batches.lock().unwrap().len()
        }
    }

    impl Store for SlowStore {
        fn apply(&self, changes: &[Change], _: UnixTime) -> Result<Vec<Outcome>, StoreError> {
            self.go.lock().unwrap().recv().unwrap();
            self.batches.lock().unwrap().push(changes.len());
            let needs_room = changes.iter().any(Change::needs_room);
            let is_full = needs_room && self.is_full.load(Ordering::Relaxed);
            if is_full || self.is_broken.load(Ordering::Relaxed) {
                return Err(StoreError::Closed("full".into()));
            }
            Ok(vec![Outcome::Done; changes.len()])
        }

        fn deliveries(&self, _: &ClientId, _: u64, _: usize) -> Result<Vec<KeptBox>, StoreError> {
            unreachable!("nobody reads")
        }

        fn token_hash(&self, _: &ClientId) -> Result<Option<TokenHash>, StoreError> {
            unreachable!("nobody reads")
        }

        fn expire(&self, _: UnixTime) -> Result<Expired, StoreError> {
            Ok(Expired { boxes: 0, is_done: true })
        }

        fn usage(&self) -> Usage {
            Usage::default()
        }
    }

    type Answers = Arc<Mutex<Vec<(u64, Option<Outcome>)>>>;

    struct Running {
        changes: Changes<u64>,
        answers: Answers,
        statistics: Arc<Statistics>,
        stop: watch::Sender<bool>,
        task: JoinSet<()>,
    }

    fn start(store: Arc<dyn Store>) -> Running {
        let statistics = Arc::<Statistics>::default();
        let (changes, group_commit) = GroupCommit::new(store, statistics.clone());
        let answers = Answers::default();
        let (stop, stopped) = watch::channel(false);
        let mut task = JoinSet::new();
        let taken = answers.clone();
        task.spawn(group_commit.run(stopped, move |batch| {
            let batch = batch.into_iter().map(|answer| (answer.waiting, answer.outcome));
            taken.lock().unwrap().extend(batch);
        }));
        Running { changes, answers, statistics, stop, task }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_waits_goes_together_in_order_and_no_answer_comes_before_it_is_durable() {
        let (store, go) = SlowStore::new();
        let running = start(store.clone());
        running.changes.try_push(keep(0), 0).unwrap();
        // The first batch is with the store from the moment at which the queue is empty.
        until(|| running.changes.queue.capacity() == QUEUED_CHANGES).await;
        for n in 1..=700 {
            running.changes.try_push(keep(0), n).unwrap();
        }
        assert!(running.answers.lock().unwrap().is_empty());
        go.send(()).unwrap();
        until(|| running.answers.lock().unwrap().len() == 1).await;
        (0..2).for_each(|_| go.send(()).unwrap());
        until(|| running.answers.lock().unwrap().len() == 701).await;
        let expected: Vec<_> = (0..=700).map(|n| (n, Some(Outcome::Done))).collect();
        assert_eq!(*running.answers.lock().unwrap(), expected);
        assert_eq!(*store.batches.lock().unwrap(), [1, 512, 188]);
        let counts = running.statistics.snapshot();
        assert_eq!((counts.kept, counts.commits), (701, 3));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_queue_gives_boxes_back_and_makes_confirmations_wait() {
        let (store, go) = SlowStore::new();
        let running = start(store);
        running.changes.try_push(keep(0), 0).unwrap();
        until(|| running.changes.queue.capacity() == QUEUED_CHANGES).await;
        let pushed = (1..).take_while(|n| running.changes.try_push(keep(1), *n).is_ok()).count();
        assert_eq!(pushed, QUEUED_CHANGES);
        let waiting = running.changes.push(confirm(vec![3, 4]), u64::MAX);
        tokio::pin!(waiting);
        assert!((&mut waiting).now_or_never().is_none());
        (0..10).for_each(|_| go.send(()).unwrap());
        soon(waiting).await;
        until(|| running.answers.lock().unwrap().len() == QUEUED_CHANGES + 2).await;
        assert_eq!(running.statistics.snapshot().confirmed, 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_store_that_fails_answers_so_and_still_takes_what_makes_room() {
        let (store, go) = SlowStore::new();
        store.is_full.store(true, Ordering::Relaxed);
        let running = start(store.clone());
        running.changes.try_push(confirm(vec![1]), 0).unwrap();
        until(|| running.changes.queue.capacity() == QUEUED_CHANGES).await;
        for (n, change) in [(1, keep(1)), (2, confirm(vec![2])), (3, keep(3))] {
            running.changes.try_push(change, n).unwrap();
        }
        (0..3).for_each(|_| go.send(()).unwrap());
        until(|| running.answers.lock().unwrap().len() == 4).await;
        let done = Some(Outcome::Done);
        let expected = [(0, done), (1, None), (2, done), (3, None)];
        assert_eq!(*running.answers.lock().unwrap(), expected);
        assert_eq!(running.statistics.snapshot().failed, 2);
        assert_eq!(*store.batches.lock().unwrap(), [1, 3, 1]);
    }

    impl Running {
        /// Hands a change in, and waits for its outcome.
        async fn outcome(&self, change: Change) -> Option<Outcome> {
            let before = self.answers.lock().unwrap().len();
            soon(self.changes.push(change, 0)).await;
            until(|| self.answers.lock().unwrap().len() > before).await;
            self.answers.lock().unwrap()[before].1
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_store_is_tried_now_and_then_and_boxes_are_refused_at_once_meanwhile() {
        let store = SlowStore::fast();
        store.is_full.store(true, Ordering::Relaxed);
        let running = start(store.clone());
        let begin = Instant::now();
        let mut refused = 0;
        while begin.elapsed() < Duration::from_secs(60) {
            assert_eq!(running.outcome(keep(1)).await, None);
            refused += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // After 0, 1, 3, 7, 15, 31 and 47 seconds.
        assert!(store.tries() <= 7 && refused > 1000, "{} of {refused}", store.tries());
        // What needs no room is not refused meanwhile.
        assert_eq!(running.outcome(confirm(vec![1])).await, Some(Outcome::Done));
        store.is_full.store(false, Ordering::Relaxed);
        let begin = Instant::now();
        while running.outcome(keep(1)).await.is_none() {
            assert!(begin.elapsed() <= Duration::from_secs(17));
        }
        assert_eq!(running.outcome(keep(1)).await, Some(Outcome::Done));
    }

    #[tokio::test(start_paused = true)]
    async fn confirmations_that_cannot_be_stored_are_stored_later() {
        let store = SlowStore::fast();
        store.is_broken.store(true, Ordering::Relaxed);
        let mut running = start(store.clone());
        for change in [confirm(vec![1, 2]), keep(1), confirm(vec![2, 3])] {
            assert_eq!(running.outcome(change).await, None);
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(store.tries() <= 9, "{}", store.tries());
        assert_eq!(running.statistics.snapshot().confirmed, 0);
        store.is_broken.store(false, Ordering::Relaxed);
        until(|| running.statistics.snapshot().confirmed == 3).await;
        // Once.
        let tries = store.tries();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(store.tries(), tries);
        // Also when the gateway stops meanwhile.
        store.is_broken.store(true, Ordering::Relaxed);
        assert_eq!(running.outcome(confirm(vec![4])).await, None);
        store.is_broken.store(false, Ordering::Relaxed);
        running.stop.send_replace(true);
        soon(running.task.join_next()).await.unwrap().unwrap();
        assert_eq!(running.statistics.snapshot().confirmed, 4);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_waits_when_it_stops_is_stored_and_nothing_more_is_taken() {
        let (store, go) = SlowStore::new();
        let mut running = start(store);
        running.changes.try_push(keep(0), 0).unwrap();
        until(|| running.changes.queue.capacity() == QUEUED_CHANGES).await;
        for n in 1..=5 {
            running.changes.try_push(keep(0), n).unwrap();
        }
        running.stop.send_replace(true);
        (0..2).for_each(|_| go.send(()).unwrap());
        soon(running.task.join_next()).await.unwrap().unwrap();
        assert_eq!(running.answers.lock().unwrap().len(), 6);
        assert!(running.changes.try_push(keep(0), 9).is_err());
        soon(running.changes.push(keep(0), 9)).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn who_has_just_logged_in_makes_no_room_for_somebody_else() {
        const TODAY: Day = 20_000;
        const DAY: u64 = 24 * 60 * 60;
        let at = |day: Day| UnixTime(u64::from(day) * DAY);
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { registrations: 1, ..Limits::default() };
        let store = Arc::new(RedbStore::open(folder.path(), limits).unwrap());
        let register = |client| Change::Register { client, token: TokenHash::from_bytes([1; 32]) };
        store.apply(&[register(CLIENT)], at(TODAY)).unwrap();
        let (now, clock) = watch::channel(at(TODAY + 1));
        let (changes, group_commit) =
            GroupCommit::at(store.clone(), Arc::default(), Clock::Fake(clock));
        let (_stop, stopped) = watch::channel(false);
        let answers = Answers::default();
        let taken = answers.clone();
        // Both before it begins, so that the login cannot have been written before.
        changes.note_login(CLIENT);
        changes.try_push(register([2; 32]), 0_u64).unwrap();
        let mut task = JoinSet::new();
        task.spawn(group_commit.run(stopped, move |batch| {
            taken.lock().unwrap().extend(batch.iter().map(|done| (done.waiting, done.outcome)));
        }));
        until(|| answers.lock().unwrap().len() == 1).await;
        assert_eq!(answers.lock().unwrap()[0].1, Some(Outcome::StoreFull));
        assert_eq!(store.last_login(&CLIENT), (TODAY + 1, true));
        // Logins are written by themselves too.
        now.send_replace(at(TODAY + 2));
        changes.note_login(CLIENT);
        until(|| store.last_login(&CLIENT).0 == TODAY + 2).await;
    }
}
