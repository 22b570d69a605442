//! Processes that are killed, and disks that are full.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use rand::RngExt;

use super::small_disk::SmallDisk;
use super::*;
use crate::replay_log::ReplayLog;
use crate::reserve::Reserve;

const NOW: UnixTime = UnixTime(1_700_000_000);
const BOX_BYTES: usize = 1635;
/// Nothing in a test takes that long, unless it never happens.
const PATIENCE: Duration = Duration::from_secs(60);

fn register(client: ClientId) -> Change {
    Change::Register { client, token: TokenHash::from_bytes([7; 32]) }
}

fn keep(client: ClientId, fill: u8) -> Change {
    Change::Keep { client, sealed: vec![fill; BOX_BYTES] }
}

/// Says which folder the process of [`a_killed_process_forgets_nothing_that_it_told`] writes to.
const FOLDER: &str = "MIXSOCKS_TEST_STORE";

/// The process that is killed: it keeps and confirms, and tells of each batch when it is durable.
#[test]
fn the_process_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let store = RedbStore::open(Path::new(&folder), Limits::default()).unwrap();
    let clients: [ClientId; 4] = std::array::from_fn(|n| [u8::try_from(n).unwrap(); 32]);
    store.apply(&clients.map(register), NOW).unwrap();
    loop {
        for client in clients {
            let kept = store.deliveries(&client, 0, usize::MAX).unwrap();
            // Those of the batch before stay: it may be the last that was told of.
            let older = &kept[..kept.len().saturating_sub(7)];
            let numbers: Vec<_> = older.iter().map(|kept| kept.number).take(6).collect();
            let mut changes: Vec<_> = (0..7).map(|fill| keep(client, fill)).collect();
            changes.push(Change::Confirm { client, numbers: numbers.clone() });
            let outcomes = store.apply(&changes, NOW).unwrap();
            assert_eq!(outcomes, [Outcome::Done; 8]);
            let last = store.deliveries(&client, 0, usize::MAX).unwrap().last().unwrap().number;
            // From the newest on, 7 must be there, and those that were confirmed not.
            let mut words = vec![client[0].to_string(), last.to_string()];
            words.extend(numbers.iter().map(u64::to_string));
            println!("durable {}", words.join(" "));
            std::io::stdout().flush().unwrap();
        }
    }
}

/// What a killed process told last of each client: the newest number, and what it had confirmed.
#[derive(Default)]
struct Told {
    newest: u64,
    confirmed: Vec<u64>,
}

/// Runs the process on a folder, and kills it at a random moment. What it told.
fn killed(folder: &Path) -> Vec<Told> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "gateway::store::trouble_tests::the_process_that_is_killed"])
        .arg("--nocapture")
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let batches = rand::rng().random_range(1..20);
    let mut told: Vec<_> = std::iter::repeat_with(Told::default).take(4).collect();
    let mut count = 0;
    let mut take = |line: String| {
        let Some(words) = line.strip_prefix("durable ") else { return false };
        let numbers: Vec<u64> = words.split(' ').map(|word| word.parse().unwrap()).collect();
        let told = &mut told[usize::try_from(numbers[0]).unwrap()];
        told.newest = numbers[1];
        told.confirmed.extend(&numbers[2..]);
        true
    };
    while count < batches {
        let Some(line) = lines.next() else { panic!("it ended by itself: {:?}", child.wait()) };
        count += i32::from(take(line.unwrap()));
    }
    let moment = Duration::from_micros(rand::rng().random_range(0..3000));
    let start = Instant::now();
    while start.elapsed() < moment {
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    // What it could still say before its end was durable too.
    for line in lines {
        take(line.unwrap());
    }
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    told
}

#[test]
fn a_killed_process_forgets_nothing_that_it_told() {
    const ROUNDS: usize = 50;
    let folder = tempfile::tempdir().unwrap();
    let mut highest = [0; 4];
    for round in 0..ROUNDS {
        let told = killed(folder.path());
        let store = RedbStore::open(folder.path(), Limits::default()).unwrap();
        let mut usage = Usage::default();
        for (n, Told { newest, confirmed }) in told.into_iter().enumerate() {
            let client = [u8::try_from(n).unwrap(); 32];
            assert!(store.token_hash(&client).unwrap().is_some());
            let kept = store.deliveries(&client, 0, usize::MAX).unwrap();
            let numbers: Vec<_> = kept.iter().map(|kept| kept.number).collect();
            if newest > 0 {
                // All of the batch that it told of last, as they were.
                for number in newest - 6..=newest {
                    let found = kept.iter().find(|kept| kept.number == number).unwrap();
                    let fill = u8::try_from(number + 6 - newest).unwrap();
                    assert_eq!(found.sealed, vec![fill; BOX_BYTES], "round {round}");
                }
                assert!(newest > highest[n], "a number was used again");
            }
            assert!(confirmed.iter().all(|number| !numbers.contains(number)));
            highest[n] = numbers.last().copied().unwrap_or(0).max(highest[n]);
            usage.boxes += kept.len() as u64;
            usage.bytes += kept.iter().map(|kept| kept.sealed.len() as u64).sum::<u64>();
        }
        assert_eq!(store.usage(), usage);
    }
    assert!(highest.iter().any(|number| *number > 0));
}

/// A batch as large as the gateway makes them, until one fails. How many boxes were kept.
fn fill_up(store: &RedbStore, client: ClientId, kept: &mut Vec<u8>) {
    let start = Instant::now();
    for fill in 0..=u8::MAX {
        assert!(start.elapsed() < PATIENCE, "the disk is never full");
        let batch: Vec<_> = (0..64).map(|_| keep(client, fill)).collect();
        match store.apply(&batch, NOW) {
            Ok(outcomes) => {
                assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
                kept.extend([fill; 64]);
            }
            Err(error) => {
                assert!(error.to_string().contains("No space left"), "{error}");
                return;
            }
        }
    }
    panic!("the disk is never full");
}

fn fills(store: &RedbStore, client: &ClientId) -> Vec<u8> {
    let kept = store.deliveries(client, 0, usize::MAX).unwrap();
    kept.iter()
        .map(|kept| {
            assert!(kept.sealed.iter().all(|byte| *byte == kept.sealed[0]));
            kept.sealed[0]
        })
        .collect()
}

/// Waits until the store takes one more box, as it tries to open its file once a second only.
fn until_kept(store: &RedbStore, client: ClientId) {
    let start = Instant::now();
    while store.apply(&[keep(client, 255)], NOW).is_err() {
        assert!(start.elapsed() < PATIENCE, "it never works again");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// `None` when this user may not mount.
fn small_disk() -> Option<SmallDisk> {
    let disk = SmallDisk::mount(12 * 1024);
    if disk.is_none() {
        // Where everything that tests need is meant to be there, that is a failure.
        assert!(std::env::var_os("MIXSOCKS_TEST_NO_SKIP").is_none(), "mounting is not permitted");
        println!("skipped: mounting a small disk is not permitted here");
    }
    disk
}

/// On a disk of any size, as it is luck how much the file needs for its next change.
#[test]
fn a_full_disk_takes_confirmations_however_full_it_is() {
    for pages in 0..20 {
        let Some(disk) = small_disk() else { return };
        let filler = vec![1; 4 * 1024 * 1024 + pages * 4096];
        std::fs::write(disk.path().join("filler"), filler).unwrap();
        let store = RedbStore::open(disk.path(), Limits::default()).unwrap();
        let client = [1; 32];
        store.apply(&[register(client)], NOW).unwrap();
        fill_up(&store, client, &mut Vec::new());
        while store.usage().boxes > 0 {
            let first = store.deliveries(&client, 0, 100).unwrap();
            let numbers = first.iter().map(|kept| kept.number).collect();
            store.apply(&[Change::Confirm { client, numbers }], NOW).unwrap();
        }
        until_kept(&store, client);
    }
}

#[test]
fn a_full_disk_refuses_forgets_nothing_and_works_again_when_there_is_room() {
    let Some(disk) = small_disk() else { return };
    let filler = disk.path().join("filler");
    std::fs::write(&filler, vec![1; 2 * 1024 * 1024]).unwrap();
    let client = [1; 32];
    let limits = Limits::default();
    let store = RedbStore::open(disk.path(), limits).unwrap();
    store.apply(&[register(client)], NOW).unwrap();
    let mut kept = Vec::new();
    fill_up(&store, client, &mut kept);
    assert!(!kept.is_empty());
    // It goes on reading, and says how much there is.
    assert_eq!(fills(&store, &client), kept);
    assert_eq!(store.usage().boxes, kept.len() as u64);
    // Confirmations need no room, or next to none, and make some.
    let numbers: Vec<_> =
        store.deliveries(&client, 0, 100).unwrap().iter().map(|kept| kept.number).collect();
    let outcome = store.apply(&[Change::Confirm { client, numbers }], NOW).unwrap();
    assert_eq!(outcome, [Outcome::Done]);
    kept.drain(..100);
    assert_eq!(fills(&store, &client), kept);
    until_kept(&store, client);
    kept.push(255);
    assert_eq!(fills(&store, &client), kept);
    // Room on the disk is used at once.
    fill_up(&store, client, &mut kept);
    std::fs::remove_file(&filler).unwrap();
    until_kept(&store, client);
    kept.push(255);
    fill_up(&store, client, &mut kept);
    assert_eq!(fills(&store, &client), kept);
    // And also a new process finds all.
    drop(store);
    let store = RedbStore::open(disk.path(), limits).unwrap();
    assert_eq!(fills(&store, &client), kept);
    assert_eq!(store.usage().boxes, kept.len() as u64);
}

fn open_log(disk: &SmallDisk) -> (ReplayLog, Vec<u64>) {
    let mut tags = Vec::new();
    let log = ReplayLog::open(disk.path(), 0, PathBuf::new(), |tag| tags.push(tag)).unwrap();
    (log, tags)
}

/// Takes all that is left, as other programs may.
fn fill_to_the_last_byte(disk: &SmallDisk) {
    let mut filler = File::create(disk.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
}

/// However often boxes are tried on a full disk.
#[test]
fn a_full_disk_leaves_room_for_replay_tags() {
    const TRIES: u64 = 20;
    // More than any batch has.
    let tags_of = |n| vec![n; 1024];
    let Some(disk) = small_disk() else { return };
    let (mut log, _) = open_log(&disk);
    let store = RedbStore::open(disk.path(), Limits::default()).unwrap();
    let client = [1; 32];
    store.apply(&[register(client)], NOW).unwrap();
    let mut kept = Vec::new();
    for n in 0..TRIES {
        fill_up(&store, client, &mut kept);
        log.append(&tags_of(n)).unwrap();
    }
    assert_eq!(fills(&store, &client), kept);
    // There is no reserve, and none of all that is left is made.
    let reserve = Reserve::of(disk.path());
    assert!(!reserve.path().exists());
    let error = store.apply(&[keep(client, 1)], NOW).unwrap_err().to_string();
    assert!(error.contains("store.reserve") && error.contains("3 MiB must be free"), "{error}");
    assert!(!reserve.path().exists());
    drop((log, store));
    assert_eq!(open_log(&disk).1, (0..TRIES).flat_map(tags_of).collect::<Vec<_>>());
}

#[test]
fn a_disk_that_others_fill_takes_replay_tags_and_starts_as_long_as_there_is_a_reserve() {
    let Some(disk) = small_disk() else { return };
    let client = [1; 32];
    let reserve = Reserve::of(disk.path());
    let (mut log, _) = open_log(&disk);
    let store = RedbStore::open(disk.path(), Limits::default()).unwrap();
    store.apply(&[register(client), keep(client, 1)], NOW).unwrap();
    assert!(reserve.path().exists());
    fill_to_the_last_byte(&disk);
    // Far more than a page that may be there already.
    log.append(&[7; 8192]).unwrap();
    assert!(!reserve.path().exists());
    // What that left goes too.
    fill_to_the_last_byte(&disk);
    let error = log.append(&[8; 8192]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert!(store.apply(&[keep(client, 2)], NOW).is_err());
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    log.append(&[9; 8192]).unwrap();
    until_kept(&store, client);
    assert!(reserve.path().exists());
    drop((log, store));
    // Nothing is left but the reserve.
    fill_to_the_last_byte(&disk);
    let store = RedbStore::open(disk.path(), Limits::default()).unwrap();
    let (mut log, tags) = open_log(&disk);
    log.append(&[10; 8192]).unwrap();
    assert_eq!(tags, [[7; 8192], [9; 8192]].concat());
    assert_eq!(fills(&store, &client), [1, 255]);
    // Also without a store in between, and the next key epoch's.
    drop((log, store));
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    reserve.make().unwrap();
    fill_to_the_last_byte(&disk);
    ReplayLog::open(disk.path(), 1, PathBuf::new(), |_| {}).unwrap();
    assert!(!reserve.path().exists());
}
