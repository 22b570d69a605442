//! What every store must do, and what this one does with its file.

use std::cell::Cell;

use mixsocks_common::gateway::token::Token;
use mixsocks_common::keys::IdentityKey;

use super::*;

const HOUR: u64 = 60 * 60;
const DAY: u64 = 24 * HOUR;
const NOW: UnixTime = UnixTime(20_000 * DAY + 5);
const TODAY: Day = 20_000;
const BOX_BYTES: usize = 1635;

fn on_day(day: Day) -> UnixTime {
    UnixTime(u64::from(day) * DAY)
}

fn pair() -> (ClientId, TokenHash) {
    let mut rng = rand::rng();
    let client = IdentityKey::generate(&mut rng).identity();
    (*client.as_bytes(), Token::generate(&mut rng).hash())
}

struct TestStore {
    dir: tempfile::TempDir,
    store: RedbStore,
    limits: Limits,
    /// What the clock said last; none before the store looked at it.
    clock: Cell<Option<UnixTime>>,
}

impl TestStore {
    fn new(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(dir.path(), limits).unwrap();
        Self { dir, store, limits, clock: Cell::default() }
    }

    fn reopen(self, limits: Limits) -> Self {
        let Self { dir, store, clock, .. } = self;
        drop(store);
        let store = RedbStore::open(dir.path(), limits).unwrap();
        Self { dir, store, limits, clock }
    }

    /// Lets time pass up to `now`, or sets the clock back to it. The store looks at the clock often
    /// enough to see that nothing jumps.
    fn pass_to(&self, now: UnixTime) {
        let last = self.clock.replace(Some(now)).unwrap_or(now);
        let step = store_time::longest_step(self.limits.expiry).as_secs();
        for clock in (last.0..now.0).step_by(usize::try_from(step).unwrap()).chain([now.0]) {
            self.store.apply(&[], UnixTime(clock)).unwrap();
        }
    }

    fn apply(&self, change: Change, now: UnixTime) -> Outcome {
        self.pass_to(now);
        self.store.apply(&[change], now).unwrap()[0]
    }

    /// Registers somebody, who also logs in if `logs_in` is set.
    fn register_on(&self, day: Day, logs_in: bool) -> (ClientId, Outcome) {
        let (client, token) = pair();
        let outcome = self.apply(Change::Register { client, token }, on_day(day));
        if logs_in && outcome == Outcome::Done {
            self.apply(Change::LogIn { client }, on_day(day));
        }
        (client, outcome)
    }

    fn client(&self) -> ClientId {
        self.register_on(TODAY, true).0
    }

    fn has(&self, client: &ClientId) -> bool {
        self.store.token_hash(client).unwrap().is_some()
    }

    fn keep(&self, client: &ClientId, fill: u8) -> Outcome {
        self.keep_at(client, fill, NOW)
    }

    fn keep_at(&self, client: &ClientId, fill: u8, now: UnixTime) -> Outcome {
        self.apply(Change::Keep { client: *client, sealed: vec![fill; BOX_BYTES] }, now)
    }

    fn confirm(&self, client: &ClientId, numbers: Vec<u64>) {
        self.apply(Change::Confirm { client: *client, numbers }, NOW);
    }

    /// The fills of what is kept for a client, and the numbers.
    fn kept(&self, client: &ClientId) -> (Vec<u8>, Vec<u64>) {
        let kept = self.store.deliveries(client, 0, usize::MAX).unwrap();
        kept.iter().map(|kept| (kept.sealed[0], kept.number)).unzip()
    }

    /// Boxes that have expired when it is `now`.
    fn expire(&self, now: UnixTime) -> u64 {
        self.pass_to(now);
        self.expire_at(now)
    }

    /// Boxes that expire when the clock says `now`.
    fn expire_at(&self, now: UnixTime) -> u64 {
        self.clock.set(Some(now));
        let mut boxes = 0;
        loop {
            let expired = self.store.expire(now).unwrap();
            boxes += expired.boxes;
            if expired.is_done {
                return boxes;
            }
        }
    }
}

#[test]
fn what_is_kept_is_read_in_order_until_it_is_confirmed() {
    let mut store = TestStore::new(Limits::default());
    let (one, other) = (store.client(), store.client());
    for fill in 0..5 {
        assert_eq!(store.keep(&one, fill), Outcome::Done);
    }
    assert_eq!(store.keep(&other, 9), Outcome::Done);
    let bytes = 6 * BOX_BYTES as u64;
    for _ in 0..2 {
        let (fills, numbers) = store.kept(&one);
        assert_eq!(fills, [0, 1, 2, 3, 4]);
        assert!(numbers.is_sorted_by(|a, b| a < b));
        assert_eq!(store.kept(&other).0, [9]);
        let next = store.store.deliveries(&one, numbers[1], 2).unwrap();
        assert_eq!(next.iter().map(|kept| kept.number).collect::<Vec<_>>(), numbers[2..4]);
        assert_eq!(store.store.usage(), Usage { boxes: 6, bytes });
        store = store.reopen(Limits::default());
    }
    let numbers = store.kept(&one).1;
    // Also twice, and what is not there or somebody else's.
    let of_other = store.kept(&other).1[0];
    store.confirm(&one, vec![numbers[3], numbers[0], numbers[3], 1, u64::MAX]);
    store.confirm(&one, vec![numbers[0]]);
    store.confirm(&pair().0, vec![of_other]);
    assert_eq!(store.kept(&one).0, [1, 2, 4]);
    assert_eq!(store.kept(&other).0, [9]);
    let usage = Usage { boxes: 4, bytes: 4 * BOX_BYTES as u64 };
    assert_eq!(store.store.usage(), usage);
    let store = store.reopen(Limits::default());
    assert_eq!((store.kept(&one).0, store.store.usage()), (vec![1, 2, 4], usage));
}

#[test]
fn strangers_get_nothing_kept() {
    let store = TestStore::new(Limits::default());
    let (stranger, token) = pair();
    let keep = || Change::Keep { client: stranger, sealed: vec![1; BOX_BYTES] };
    let register = Change::Register { client: stranger, token };
    let outcomes = store.store.apply(&[keep(), register, keep()], NOW).unwrap();
    assert_eq!(outcomes, [Outcome::UnknownClient, Outcome::Done, Outcome::Done]);
    assert_eq!(store.kept(&stranger).0.len(), 1);
}

#[test]
fn no_number_is_used_twice_also_when_everything_was_confirmed_before_a_restart() {
    let mut store = TestStore::new(Limits::default());
    let client = store.client();
    let mut last = 0;
    // The clock is set back meanwhile.
    for hour in [5, 5, 6, 2, 2, 7] {
        store.keep_at(&client, 1, UnixTime(NOW.0 + hour * HOUR));
        let numbers = store.kept(&client).1;
        assert!(numbers.len() == 1 && numbers[0] > last, "{numbers:?} after {last}");
        last = numbers[0];
        store.confirm(&client, numbers);
        store = store.reopen(Limits::default());
    }
    assert_eq!(store.store.usage(), Usage::default());
}

#[test]
fn a_full_share_refuses_and_keeps_what_it_has() {
    let by_bytes = Limits { client_bytes: 3 * BOX_BYTES as u64, ..Limits::default() };
    let by_boxes = Limits { client_boxes: 3, ..Limits::default() };
    for limits in [by_bytes, by_boxes] {
        let store = TestStore::new(limits);
        let (one, other) = (store.client(), store.client());
        // Also within one batch.
        let keep = |fill| Change::Keep { client: one, sealed: vec![fill; BOX_BYTES] };
        let outcomes = store.store.apply(&[keep(0), keep(1), keep(2), keep(3)], NOW).unwrap();
        assert_eq!(outcomes[..3], [Outcome::Done; 3]);
        assert_eq!(outcomes[3], Outcome::ClientFull);
        let store = store.reopen(limits);
        assert_eq!(store.keep(&one, 4), Outcome::ClientFull);
        assert_eq!(store.keep(&other, 5), Outcome::Done);
        let (fills, numbers) = store.kept(&one);
        assert_eq!(fills, [0, 1, 2]);
        store.confirm(&one, vec![numbers[1]]);
        assert_eq!(store.keep(&one, 6), Outcome::Done);
        assert_eq!(store.kept(&one).0, [0, 2, 6]);
    }
}

#[test]
fn a_full_store_refuses_and_works_again_when_there_is_room() {
    let limits = Limits { total_bytes: 3 * BOX_BYTES as u64, ..Limits::default() };
    let store = TestStore::new(limits);
    let clients: Vec<_> = (0..4).map(|_| store.client()).collect();
    for client in &clients[..3] {
        assert_eq!(store.keep(client, 1), Outcome::Done);
    }
    assert_eq!(store.keep(&clients[3], 1), Outcome::StoreFull);
    let store = store.reopen(limits);
    assert_eq!(store.keep(&clients[3], 1), Outcome::StoreFull);
    store.confirm(&clients[0], store.kept(&clients[0]).1);
    assert_eq!(store.keep(&clients[3], 2), Outcome::Done);
}

#[test]
fn boxes_expire_after_their_time_whoever_they_are_for() {
    let limits = Limits { expiry: Duration::from_secs(7 * DAY), ..Limits::default() };
    let store = TestStore::new(limits);
    let (one, other) = (store.client(), store.client());
    let at = |hours| UnixTime(NOW.0 + hours * HOUR);
    for (client, fill, hours) in [(&one, 0, 0), (&one, 1, 0), (&other, 2, 1), (&one, 3, 50)] {
        store.keep_at(client, fill, at(hours));
    }
    assert_eq!(store.expire(UnixTime(NOW.0 + 7 * DAY - 6)), 0);
    assert_eq!(store.expire(at(7 * 24 + 1)), 2);
    assert_eq!((store.kept(&one).0, store.kept(&other).0), (vec![3], vec![2]));
    assert_eq!(store.expire(at(7 * 24 + 2)), 1);
    let usage = Usage { boxes: 1, bytes: BOX_BYTES as u64 };
    assert_eq!(store.store.usage(), usage);
    let store = store.reopen(limits);
    assert_eq!((store.kept(&one).0, store.store.usage()), (vec![3], usage));
}

/// More boxes and clients than one transaction takes.
#[test]
fn expiry_gets_to_all_in_the_end() {
    let limits = Limits { client_boxes: u64::MAX, ..Limits::default() };
    let store = TestStore::new(limits);
    store.pass_to(NOW);
    let clients: Vec<_> = (0..4500).map(|_| pair()).collect();
    let register = |(client, token): &(ClientId, TokenHash)| Change::Register {
        client: *client,
        token: *token,
    };
    store.store.apply(&clients.iter().map(register).collect::<Vec<_>>(), NOW).unwrap();
    let keep = |client: &ClientId| Change::Keep { client: *client, sealed: vec![1; 50] };
    let each = clients.iter().map(|(client, _)| keep(client));
    let more = (0..3000).map(|_| keep(&clients[7].0));
    let changes: Vec<_> = each.chain(more).collect();
    store.store.apply(&changes, NOW).unwrap();
    let much_later = UnixTime(NOW.0 + 30 * DAY);
    store.pass_to(much_later);
    let first = store.store.expire(much_later).unwrap();
    assert!(!first.is_done && first.boxes < 2000, "{first:?}");
    assert_eq!(first.boxes + store.expire(much_later), 7500);
    assert_eq!(store.store.usage(), Usage::default());
    assert_eq!(store.expire(much_later), 0);
}

#[test]
fn a_clock_that_is_ahead_costs_no_message() {
    let ahead = UnixTime(NOW.0 + 300 * DAY);
    let mut store = TestStore::new(Limits::default());
    let (client, other) = (store.client(), store.client());
    for fill in 0..3 {
        store.keep(&client, fill);
    }
    // While the gateway runs, and when it starts.
    assert_eq!(store.expire_at(ahead), 0);
    store.keep_at(&client, 3, ahead);
    store = store.reopen(Limits::default());
    assert_eq!(store.expire_at(UnixTime(ahead.0 + 300 * DAY)), 0);
    // And when it is set right.
    assert_eq!(store.expire_at(UnixTime(NOW.0 + HOUR)), 0);
    store = store.reopen(Limits::default());
    assert_eq!(store.expire_at(UnixTime(NOW.0 + HOUR)), 0);
    assert_eq!(store.kept(&client).0, [0, 1, 2, 3]);
    // Each jump was a day; the rest of the seven has to pass.
    let passed = UnixTime(NOW.0 + 5 * DAY + 2 * HOUR);
    assert_eq!(store.expire(UnixTime(passed.0 - 2 * HOUR)), 0);
    store.keep_at(&other, 9, passed);
    assert_eq!(store.expire(passed), 3);
    assert_eq!((store.kept(&client).0, store.kept(&other).0), (vec![3], vec![9]));
}

#[test]
fn a_gateway_that_was_off_for_weeks_still_has_its_messages() {
    let store = TestStore::new(Limits::default());
    let client = store.client();
    store.keep(&client, 1);
    let store = store.reopen(Limits::default());
    let later = UnixTime(NOW.0 + 21 * DAY);
    assert_eq!(store.expire_at(later), 0);
    assert_eq!(store.expire(UnixTime(later.0 + 6 * DAY - HOUR)), 0);
    assert_eq!(store.expire(UnixTime(later.0 + 6 * DAY + HOUR)), 1);
}

/// Its clock begins in 1970, until it has asked for the time.
#[test]
fn a_machine_that_learns_the_time_late_keeps_its_messages() {
    let store = TestStore::new(Limits::default());
    let (client, token) = pair();
    store.apply(Change::Register { client, token }, UnixTime(7));
    store.keep_at(&client, 1, UnixTime(8));
    assert_eq!(store.expire_at(NOW), 0);
    assert_eq!(store.kept(&client).0, [1]);
}

#[test]
fn where_messages_are_kept_for_an_hour_no_jump_makes_them_expire() {
    let limits = Limits { expiry: Duration::from_secs(HOUR), ..Limits::default() };
    let store = TestStore::new(limits);
    let client = store.client();
    store.keep(&client, 1);
    assert_eq!(store.expire_at(UnixTime(NOW.0 + 300 * DAY)), 0);
    assert_eq!(store.expire(UnixTime(NOW.0 + 300 * DAY + 2 * HOUR)), 1);
}

#[test]
fn a_clock_that_is_ahead_costs_no_registration() {
    let store = TestStore::new(at_most(1));
    let (client, _) = store.register_on(TODAY, true);
    store.keep(&client, 1);
    let (other, token) = pair();
    let ahead = UnixTime(NOW.0 + 300 * DAY);
    let outcomes = store.store.apply(&[Change::Register { client: other, token }], ahead).unwrap();
    assert_eq!(outcomes, [Outcome::StoreFull]);
    assert_eq!((store.has(&client), store.kept(&client).0), (true, vec![1]));
}

/// Of gateways that trusted their clock, also when it was ahead.
#[test]
fn a_store_without_a_time_begins_where_its_numbers_are() {
    let ahead = UnixTime(NOW.0 + 300 * DAY);
    for (newest, clock) in [(NOW, ahead), (ahead, NOW)] {
        let store = TestStore::new(Limits::default());
        let client = store.client();
        store.keep(&client, 1);
        let TestStore { dir, store, .. } = store;
        drop(store);
        {
            let database = redb::Database::open(dir.path().join(FILE_NAME)).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction.delete_table(batch::MARKS).unwrap();
            let share = (first_number(newest), 1, BOX_BYTES as u64);
            transaction.open_table(batch::SHARES).unwrap().insert(client, share).unwrap();
            transaction.commit().unwrap();
        }
        let store = RedbStore::open(dir.path(), Limits::default()).unwrap();
        assert_eq!(store.expire(clock).unwrap(), Expired { boxes: 0, is_done: true });
        assert_eq!(store.deliveries(&client, 0, 9).unwrap().len(), 1);
    }
}

#[test]
fn no_number_is_used_twice_also_by_who_was_forgotten_and_registers_again() {
    let store = TestStore::new(at_most(1));
    let (client, _) = store.register_on(TODAY, false);
    let tomorrow = on_day(TODAY + 1);
    for fill in 0..3 {
        store.keep_at(&client, fill, tomorrow);
    }
    let before = store.kept(&client).1;
    // It has never logged in, and makes room for another one.
    assert_eq!(store.register_on(TODAY + 1, true).1, Outcome::Done);
    assert!(!store.has(&client));
    // In the same hour it is back.
    let store = store.reopen(at_most(2));
    let register = Change::Register { client, token: pair().1 };
    assert_eq!(store.apply(register, tomorrow), Outcome::Done);
    store.keep_at(&client, 7, tomorrow);
    let (fills, numbers) = store.kept(&client);
    assert_eq!(fills, [7]);
    assert!(numbers[0] > before[2], "{numbers:?} after {before:?}");
}

#[test]
fn registrations_survive_and_the_newest_counts() {
    let mut store = TestStore::new(Limits::default());
    let ((client, first), (_, second)) = (pair(), pair());
    for token in [first, second] {
        assert_eq!(store.apply(Change::Register { client, token }, NOW), Outcome::Done);
        store = store.reopen(Limits::default());
    }
    assert_eq!(store.store.token_hash(&client).unwrap(), Some(second));
    assert_eq!(store.store.token_hash(&pair().0).unwrap(), None);
}

fn at_most(registrations: u64) -> Limits {
    Limits { registrations, ..Limits::default() }
}

#[test]
fn a_full_table_takes_only_those_it_has() {
    let store = TestStore::new(at_most(1));
    let ((client, first), (other, second)) = (pair(), pair());
    let register = |client, token| store.apply(Change::Register { client, token }, NOW);
    assert_eq!(register(client, first), Outcome::Done);
    assert_eq!(register(other, second), Outcome::StoreFull);
    assert_eq!(store.store.token_hash(&other).unwrap(), None);
    assert_eq!(register(client, second), Outcome::Done);
    assert_eq!(store.store.token_hash(&client).unwrap(), Some(second));
}

#[test]
fn who_never_logged_in_makes_room_the_next_day_with_all_that_was_kept_for_it() {
    let store = TestStore::new(at_most(2));
    let (used, _) = store.register_on(TODAY, true);
    let (unused, _) = store.register_on(TODAY, false);
    store.keep(&used, 1);
    store.keep(&unused, 2);
    store.keep(&unused, 3);
    assert_eq!(store.register_on(TODAY, true).1, Outcome::StoreFull);
    let (next, outcome) = store.register_on(TODAY + 1, true);
    assert_eq!(outcome, Outcome::Done);
    assert!(store.has(&used) && store.has(&next) && !store.has(&unused));
    assert_eq!((store.kept(&used).0, store.kept(&unused).0), (vec![1], vec![]));
    let usage = Usage { boxes: 1, bytes: BOX_BYTES as u64 };
    assert_eq!(store.store.usage(), usage);
    assert_eq!(store.reopen(at_most(2)).store.usage(), usage);
}

#[test]
fn clients_in_use_stay_whatever_anybody_registers() {
    let ((client, token), logged_in_on) = (pair(), TODAY + 5);
    let store = TestStore::new(at_most(2));
    store.apply(Change::Register { client, token }, NOW);
    store.apply(Change::LogIn { client }, on_day(logged_in_on));
    // A new token does not make a new client of it.
    store.apply(Change::Register { client, token: pair().1 }, on_day(logged_in_on));
    // And the day of its login survives a restart.
    let store = store.reopen(at_most(2));
    for day in logged_in_on..logged_in_on + SILENT_DAYS {
        for _ in 0..3 {
            store.register_on(day, false);
        }
        assert!(store.has(&client));
    }
    let flood = (0..3).map(|_| store.register_on(logged_in_on + SILENT_DAYS, true).1);
    let outcomes: Vec<_> = flood.collect();
    assert_eq!(outcomes, [Outcome::Done, Outcome::Done, Outcome::StoreFull]);
    assert!(!store.has(&client));
}

#[test]
fn two_gateways_do_not_share_a_directory() {
    let store = TestStore::new(Limits::default());
    let second = RedbStore::open(store.dir.path(), Limits::default());
    assert!(matches!(second, Err(StoreError::InUse(_))));
}

#[test]
fn the_file_of_a_gateway_that_kept_registrations_alone_becomes_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let (client, token) = pair();
    {
        // As such gateways wrote it.
        let old = redb::Database::create(dir.path().join("registrations.redb")).unwrap();
        let table = redb::TableDefinition::<[u8; 32], ([u8; 32], u32, bool)>::new("clients");
        let transaction = old.begin_write().unwrap();
        let entry = (*token.as_bytes(), TODAY, true);
        transaction.open_table(table).unwrap().insert(client, entry).unwrap();
        transaction.commit().unwrap();
    }
    let store = RedbStore::open(dir.path(), Limits::default()).unwrap();
    assert_eq!(store.token_hash(&client).unwrap(), Some(token));
    assert_eq!(store.last_login(&client), (TODAY, true));
    let store = TestStore { dir, store, limits: Limits::default(), clock: Cell::default() };
    assert_eq!(store.keep(&client, 1), Outcome::Done);
    // Once: an older file that comes back does not take the place of the store.
    std::fs::write(store.dir.path().join("registrations.redb"), "old").unwrap();
    let store = store.reopen(Limits::default());
    assert_eq!(store.kept(&client).0, [1]);
}
