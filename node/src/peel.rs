//! Peeling with a memory: open the headers, refuse what was here before, finish the rest.
//!
//! Each key epoch has a key and a memory of its own: a filter, and a log on the disk from which the
//! filter is filled after a restart. Both go with the key.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use mixsocks_common::replay::{Admission, ReplayFilter};
use mixsocks_common::topology::{Epochs, UnixTime};
use mixsocks_sphinx::{
    OpenedPacket, Packet, PeelError, Peeled, ReplayTag, SecretKey, finish, open_headers,
};
use tracing::{info, warn};

use crate::counters::{Counters, DropReason};
use crate::keys::{Counting, SphinxKeys};
use crate::replay_log::{self, ReplayLog, ReplayLogError};

/// Most tags that a node remembers for one key: some 720 MB, a log of 512 MiB, and at 2,000 packets
/// per second nine hours. Beyond it every packet is refused until the key changes.
pub const MAX_REPLAY_TAGS: usize = 64 * 1024 * 1024;

/// How full a replay filter is, as far as its operator must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fill {
    Room,
    /// Nine of ten tags: at 2,000 packets per second some 55 minutes are left.
    NearlyFull,
    /// Every new packet is refused from here on.
    Full,
}

impl Fill {
    fn of(tags: usize, max_tags: usize) -> Self {
        if tags >= max_tags {
            Self::Full
        } else if tags >= max_tags - max_tags / 10 {
            Self::NearlyFull
        } else {
            Self::Room
        }
    }
}

/// The tags of one key.
#[derive(Debug)]
struct Memory {
    filter: ReplayFilter,
    max_tags: usize,
    log: ReplayLog,
    /// What the operator has been told of the filter, and of the log.
    said: Fill,
    is_failing: bool,
}

/// What became of a batch of tags.
struct Judged {
    admissions: Vec<Admission>,
    /// Whether the fresh ones are on the disk.
    stored: io::Result<()>,
    news: Vec<News>,
}

/// What the operator must know.
#[derive(Debug, PartialEq, Eq)]
enum News {
    Fill(Fill),
    LogFails(String),
    LogWorks,
}

impl Memory {
    /// Judges tags, and stores those that are fresh. Tags that cannot be stored stay in the filter:
    /// their packets do not go on, and neither do replays of them.
    fn judge(&mut self, tags: &[ReplayTag]) -> Judged {
        let admissions: Vec<_> = tags.iter().map(|tag| self.filter.insert(tag)).collect();
        let fresh: Vec<_> = std::iter::zip(tags, &admissions)
            .filter(|(_, admission)| **admission == Admission::Fresh)
            .map(|(tag, _)| tag.prefix())
            .collect();
        let stored = self.log.append(&fresh);
        let mut news = Vec::from_iter(self.take_news());
        match &stored {
            Err(error) if !self.is_failing => {
                self.is_failing = true;
                news.push(News::LogFails(error.to_string()));
            }
            Ok(()) if self.is_failing && !fresh.is_empty() => {
                self.is_failing = false;
                news.push(News::LogWorks);
            }
            Ok(()) | Err(_) => {}
        }
        Judged { admissions, stored, news }
    }

    /// What the operator must be told of the filter now; once for each step.
    fn take_news(&mut self) -> Option<News> {
        let fill = Fill::of(self.filter.len(), self.max_tags);
        (fill > self.said).then(|| {
            self.said = fill;
            News::Fill(fill)
        })
    }
}

/// The key of a key epoch, with the tags of the packets that it has opened.
#[derive(Debug)]
struct EpochKey {
    key_epoch: u64,
    key: Arc<SecretKey>,
    /// Held for microseconds per batch, never across an await.
    memory: Mutex<Memory>,
}

/// The Sphinx keys of a node with the tags of the packets that they have opened; shared by crypto
/// workers.
#[derive(Debug)]
pub struct Peeler {
    keys: Arc<SphinxKeys>,
    epochs: Epochs,
    data_dir: PathBuf,
    max_tags: usize,
    /// By key epoch; as many as `keys` has.
    epoch_keys: RwLock<BTreeMap<u64, Arc<EpochKey>>>,
    counters: Arc<Counters>,
}

impl Peeler {
    /// A peeler that knows the packets again whose tags are in `data_dir`, and remembers up to
    /// `max_tags` for each key. Blocks on the disk, for seconds when it has seen many packets.
    ///
    /// # Errors
    /// [`ReplayLogError`].
    pub fn open(
        keys: Arc<SphinxKeys>,
        data_dir: PathBuf,
        max_tags: usize,
        counters: Arc<Counters>,
    ) -> Result<Self, ReplayLogError> {
        let epochs = keys.epochs();
        let epoch_keys = RwLock::default();
        let peeler = Self { keys, epochs, data_dir, max_tags, epoch_keys, counters };
        peeler.advance()?;
        Ok(peeler)
    }

    /// Follows a change of the keys: prepares for those that are new, and forgets those that are
    /// gone, with their tags. Blocks on the disk.
    ///
    /// # Errors
    /// [`ReplayLogError`]; what could be done is done, and the next call tries the rest. Until then packets under a key whose log
    /// cannot be opened are dropped.
    pub fn advance(&self) -> Result<(), ReplayLogError> {
        let keys = self.keys.all();
        let write = || self.epoch_keys.write().unwrap_or_else(PoisonError::into_inner);
        write().retain(|key_epoch, _| keys.contains_key(key_epoch));
        let mut result = Ok(());
        for (key_epoch, key) in &keys {
            if self.epoch_key(*key_epoch).is_some() {
                continue;
            }
            match self.open_epoch(*key_epoch, key.clone()) {
                Ok(opened) => {
                    write().insert(*key_epoch, Arc::new(opened));
                }
                Err(error) => result = Err(error),
            }
        }
        if let Some((oldest, _)) = keys.first_key_value() {
            replay_log::remove_before(&self.data_dir, *oldest)?;
        }
        result
    }

    fn open_epoch(&self, key_epoch: u64, key: Arc<SecretKey>) -> Result<EpochKey, ReplayLogError> {
        let mut filter = ReplayFilter::new(self.max_tags, &mut rand::rng());
        let file = self.keys.file(key_epoch);
        let log = ReplayLog::open(&self.data_dir, key_epoch, file, |prefix| {
            // Only tags that were fresh once are in there.
            filter.insert_prefix(prefix);
        })?;
        let (max_tags, said, is_failing) = (self.max_tags, Fill::Room, false);
        let mut memory = Memory { filter, max_tags, log, said, is_failing };
        let news = memory.take_news();
        let epoch_key = EpochKey { key_epoch, key, memory: Mutex::new(memory) };
        news.into_iter().for_each(|news| epoch_key.say(&news));
        Ok(epoch_key)
    }

    /// Takes one layer off each packet. Packets that are forged, malformed, replayed, new to a full
    /// filter, or whose tags cannot be stored are dropped and counted. They come in their order, but
    /// those under the key of a neighbouring key epoch behind the others.
    ///
    /// Takes some 60 µs of CPU per packet, more for a single one, and waits for nothing but the
    /// system to take 8 bytes for each: keep batches small between awaits.
    pub fn peel(&self, now: UnixTime, packets: Vec<Packet>) -> Vec<Peeled> {
        let counting = Counting::at(self.epochs, now);
        let Some(current) = self.epoch_key(counting.current) else {
            self.counters.add_drops(DropReason::ReplayLogFailed, packets.len() as u64);
            return Vec::new();
        };
        let neighbour = counting.neighbour.and_then(|key_epoch| self.epoch_key(key_epoch));
        let mut fresh;
        if let Some(neighbour) = neighbour {
            let copies = packets.clone();
            let mut others = Vec::new();
            let results = std::iter::zip(open_headers(&current.key, packets), copies);
            let opened = results
                .filter_map(|(result, copy)| match result {
                    Err(PeelError::BadMac) => {
                        others.push(copy);
                        None
                    }
                    result => self.count_error(result),
                })
                .collect();
            fresh = self.admit(&current, opened);
            fresh.extend(self.open_new(&neighbour, others));
        } else {
            fresh = self.open_new(&current, packets);
        }
        finish(fresh).into_iter().filter_map(|peeled| self.count_error(peeled)).collect()
    }

    /// Brings the tags of the last packets to the disk, so that not even a power failure makes the
    /// node forget them. Blocks on the disk, if there are any.
    ///
    /// # Errors
    /// What the system says; the tags are then safe from everything but a power failure.
    pub fn sync(&self) -> io::Result<()> {
        let epoch_keys: Vec<_> = {
            let epoch_keys = self.epoch_keys.read().unwrap_or_else(PoisonError::into_inner);
            epoch_keys.values().cloned().collect()
        };
        let mut result = Ok(());
        for epoch_key in epoch_keys {
            // Packets pass meanwhile.
            let unsynced = epoch_key.memory().log.take_unsynced();
            if let Some(Err(error)) = unsynced.map(|unsynced| unsynced.sync()) {
                result = Err(error);
            }
        }
        result
    }

    /// Replay tags in memory, of all keys.
    pub fn replay_tags(&self) -> usize {
        let epoch_keys = self.epoch_keys.read().unwrap_or_else(PoisonError::into_inner);
        epoch_keys.values().map(|epoch_key| epoch_key.memory().filter.len()).sum()
    }

    fn epoch_key(&self, key_epoch: u64) -> Option<Arc<EpochKey>> {
        let epoch_keys = self.epoch_keys.read().unwrap_or_else(PoisonError::into_inner);
        epoch_keys.get(&key_epoch).cloned()
    }

    /// Opens the headers of packets, and keeps those that are new.
    fn open_new(&self, epoch_key: &EpochKey, packets: Vec<Packet>) -> Vec<OpenedPacket> {
        let opened = open_headers(&epoch_key.key, packets);
        let opened = opened.into_iter().filter_map(|opened| self.count_error(opened)).collect();
        self.admit(epoch_key, opened)
    }

    fn admit(&self, epoch_key: &EpochKey, opened: Vec<OpenedPacket>) -> Vec<OpenedPacket> {
        // Tags are taken out first, so that the lock covers nothing but the memory.
        let tags: Vec<_> = opened.iter().map(OpenedPacket::replay_tag).collect();
        let Judged { admissions, stored, news } = epoch_key.memory().judge(&tags);
        news.iter().for_each(|news| epoch_key.say(news));
        let drop_reason = |admission| match admission {
            Admission::Fresh if stored.is_ok() => None,
            Admission::Fresh => Some(DropReason::ReplayLogFailed),
            Admission::Replayed => Some(DropReason::Replayed),
            Admission::Full => Some(DropReason::ReplayFilterFull),
        };
        std::iter::zip(opened, admissions)
            .filter_map(|(opened, admission)| match drop_reason(admission) {
                None => Some(opened),
                Some(reason) => {
                    self.counters.add_drop(reason);
                    None
                }
            })
            .collect()
    }

    fn count_error<T>(&self, result: Result<T, PeelError>) -> Option<T> {
        result.map_err(|error| self.counters.add_drop(drop_reason(error))).ok()
    }
}

impl EpochKey {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        // A panic inside would leave the table as it was or with some tags more: still in order.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, news: &News) {
        let key_epoch = self.key_epoch;
        match news {
            News::Fill(Fill::Room) => {}
            News::Fill(Fill::NearlyFull) => warn!(
                "nine tenths of the {MAX_REPLAY_TAGS} replay tags of key epoch {key_epoch} are used \
                 up; when all are, this node refuses every new packet until its key changes: a \
                 network of so many packets needs more nodes, or shorter key epochs"
            ),
            News::Fill(Fill::Full) => warn!(
                "all replay tags of key epoch {key_epoch} are used up: this node refuses every new \
                 packet until its key changes; the network needs more nodes, or shorter key epochs"
            ),
            News::LogFails(error) => warn!(
                "the replay tags of key epoch {key_epoch} cannot be stored, so every packet is \
                 dropped: {error}; make room on the disk of the data directory, or repair it"
            ),
            News::LogWorks => info!("the replay tags of key epoch {key_epoch} are stored again"),
        }
    }
}

fn drop_reason(error: PeelError) -> DropReason {
    match error {
        PeelError::LowOrderPoint => DropReason::LowOrder,
        PeelError::BadMac => DropReason::BadMac,
        PeelError::UnknownVersion(_) => DropReason::UnknownVersion,
        PeelError::BadRouting => DropReason::BadRouting,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mixsocks_sphinx::{HEADER_LEN, Hop, Route, build_packets};
    use std::time::Duration;

    const PAYLOAD_LEN: usize = 1024;
    /// Key epochs of 100 s.
    const EPOCHS: Epochs = Epochs { epoch_seconds: 10, key_epochs: 10, overlap_seconds: 20 };
    /// In the middle of key epoch 5.
    const NOW: UnixTime = UnixTime(550);

    /// A node whose clock stands at [`NOW`] until it is told otherwise.
    struct TestNode {
        dir: tempfile::TempDir,
        keys: Arc<SphinxKeys>,
        peeler: Peeler,
        counters: Arc<Counters>,
    }

    impl TestNode {
        fn new(max_tags: usize) -> Self {
            Self::open(tempfile::tempdir().unwrap(), max_tags)
        }

        fn open(dir: tempfile::TempDir, max_tags: usize) -> Self {
            let keys = Arc::new(SphinxKeys::open(dir.path(), EPOCHS, NOW).unwrap());
            let counters = Arc::new(Counters::default());
            let data_dir = dir.path().to_owned();
            let peeler = Peeler::open(keys.clone(), data_dir, max_tags, counters.clone()).unwrap();
            Self { dir, keys, peeler, counters }
        }

        /// As if the process had been killed.
        fn restart(self) -> Self {
            let max_tags = self.peeler.max_tags;
            Self::open(self.dir, max_tags)
        }

        fn advance(&self, now: u64) {
            self.keys.advance(UnixTime(now)).unwrap();
            self.peeler.advance().unwrap();
        }

        fn packets(&self, key_epoch: u64, count: usize) -> Vec<Packet> {
            packets(&self.keys.all()[&key_epoch], count)
        }

        fn peel(&self, packets: Vec<Packet>) -> usize {
            self.peel_at(NOW.0, packets)
        }

        fn peel_at(&self, now: u64, packets: Vec<Packet>) -> usize {
            self.peeler.peel(UnixTime(now), packets).len()
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            self.counters.snapshot().dropped(reason)
        }

        fn logs(&self) -> Vec<u64> {
            crate::keys::numbered_files(self.dir.path(), "replay-", ".log").unwrap()
        }
    }

    fn packets(key: &SecretKey, count: usize) -> Vec<Packet> {
        let hop = Hop { address: [1; 32], key: key.public_key(), delay: Duration::ZERO };
        let route = Route::new(&[hop], [2; 32], [3; 16]).unwrap();
        let requests = vec![(route, &b"text"[..]); count];
        let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &requests);
        built.into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn a_packet_passes_once_also_within_a_batch() {
        let node = TestNode::new(10);
        let packets = node.packets(5, 2);
        let twice = vec![packets[0].clone(), packets[0].clone(), packets[1].clone()];
        assert_eq!(node.peel(twice), 2);
        assert_eq!(node.peel(packets), 0);
        assert_eq!(node.dropped(DropReason::Replayed), 3);
    }

    /// Neither another payload nor the ignored top bit of the group element makes a new packet.
    #[test]
    fn a_disguised_replay_is_a_replay() {
        let node = TestNode::new(10);
        let packet = node.packets(5, 1).remove(0);
        let disguised: Vec<_> = [31, HEADER_LEN, HEADER_LEN + PAYLOAD_LEN - 1]
            .into_iter()
            .map(|at| {
                let mut bytes = packet.clone().into_bytes();
                bytes[at] ^= 0x80;
                Packet::from_bytes(bytes, PAYLOAD_LEN).unwrap()
            })
            .collect();
        assert_eq!(node.peel(vec![packet]), 1);
        assert_eq!(node.peel(disguised), 0);
        assert_eq!(node.dropped(DropReason::Replayed), 3);
    }

    #[test]
    fn forgeries_are_counted_and_fill_no_memory() {
        let other = SecretKey::generate(&mut rand::rng());
        // Room for a single tag: forgeries must not take it.
        let node = TestNode::new(1);
        let good = node.packets(5, 1);
        let mut low_order = good[0].clone().into_bytes();
        low_order[..32].fill(0);
        let low_order = Packet::from_bytes(low_order, PAYLOAD_LEN).unwrap();
        let mut forged = packets(&other, 3);
        forged.push(low_order);
        // Also while two keys are tried.
        assert_eq!(node.peel(forged.clone()), 0);
        assert_eq!(node.peel_at(590, forged), 0);
        assert_eq!(node.peel(good), 1);
        assert_eq!(node.dropped(DropReason::BadMac), 6);
        assert_eq!(node.dropped(DropReason::LowOrder), 2);
    }

    #[test]
    fn a_full_filter_refuses() {
        let node = TestNode::new(2);
        assert_eq!(node.peel(node.packets(5, 5)), 2);
        assert_eq!(node.dropped(DropReason::ReplayFilterFull), 3);
        let node = node.restart();
        assert_eq!(node.peel(node.packets(5, 5)), 0, "also after a restart");
        assert_eq!(node.dropped(DropReason::ReplayFilterFull), 5);
    }

    #[test]
    fn packets_of_the_other_key_pass_during_the_overlap_alone() {
        let node = TestNode::new(100);
        // Time, key epoch of the packet, whether it passes.
        for (now, key_epoch, passes) in [
            (579, 6, false),
            (580, 6, true),
            (599, 6, true),
            (599, 5, true),
            (600, 5, true),
            (600, 6, true),
            (619, 5, true),
            (619, 7, false),
            // The old key is still there, but its time is over.
            (620, 5, false),
            (620, 6, true),
        ] {
            let packets = node.packets(key_epoch, 2);
            assert_eq!(node.peel_at(now, packets) == 2, passes, "{now} {key_epoch}");
        }
        assert_eq!(node.dropped(DropReason::BadMac), 6);
        assert_eq!(node.peeler.replay_tags(), 14);
    }

    #[test]
    fn batches_of_both_keys_are_sorted_out() {
        let node = TestNode::new(100);
        let mut batch = node.packets(5, 2);
        batch.extend(node.packets(6, 2));
        batch.extend(node.packets(7, 1));
        batch.swap(0, 3);
        assert_eq!(node.peel_at(600, batch.clone()), 4);
        assert_eq!(node.peel_at(600, batch), 0);
        assert_eq!(node.dropped(DropReason::Replayed), 4);
        assert_eq!(node.dropped(DropReason::BadMac), 2);
    }

    #[test]
    fn a_restart_forgets_no_packet() {
        let node = TestNode::new(100);
        let (old, new) = (node.packets(5, 3), node.packets(6, 3));
        assert_eq!(node.peel_at(590, [old.clone(), new.clone()].concat()), 6);
        let node = node.restart();
        assert_eq!(node.peeler.replay_tags(), 6);
        for (now, packets) in [(550, &old), (590, &new), (610, &old), (610, &new)] {
            assert_eq!(node.peel_at(now, packets.clone()), 0);
        }
        assert_eq!(node.dropped(DropReason::Replayed), 12);
        assert_eq!(node.peel(node.packets(5, 1)), 1);
    }

    #[test]
    fn tags_and_log_go_with_their_key() {
        let node = TestNode::new(100);
        assert_eq!(node.peel(node.packets(5, 3)), 3);
        assert_eq!(node.logs(), [5, 6, 7]);
        let replay = node.packets(5, 1);
        assert_eq!(node.peel(replay.clone()), 1);
        node.advance(610);
        assert_eq!((node.logs(), node.peeler.replay_tags()), (vec![5, 6, 7, 8], 4));
        assert_eq!(node.peel_at(610, replay.clone()), 0);
        assert_eq!(node.dropped(DropReason::Replayed), 1);
        node.advance(620);
        assert_eq!((node.logs(), node.peeler.replay_tags()), (vec![6, 7, 8], 0));
        assert_eq!(node.peel_at(620, replay), 0);
        assert_eq!(node.dropped(DropReason::BadMac), 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_cannot_be_stored_does_not_go_on() {
        let node = TestNode::new(100);
        let epoch_key = node.peeler.epoch_key(5).unwrap();
        let packets = node.packets(5, 3);
        let log = std::mem::replace(&mut epoch_key.memory().log, ReplayLog::on_a_full_disk());
        assert_eq!(node.peel(packets.clone()), 0);
        assert_eq!(node.dropped(DropReason::ReplayLogFailed), 3);
        // And not later either: nobody can be sure that it was not stored.
        epoch_key.memory().log = log;
        assert_eq!(node.peel(packets), 0);
        assert_eq!(node.dropped(DropReason::Replayed), 3);
        assert_eq!(node.peel(node.packets(5, 2)), 2);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_said_once_and_so_is_its_end() {
        let node = TestNode::new(100);
        let epoch_key = node.peeler.epoch_key(5).unwrap();
        let tag = |byte| [ReplayTag::from_bytes([byte; 32])];
        let mut memory = epoch_key.memory();
        let log = std::mem::replace(&mut memory.log, ReplayLog::on_a_full_disk());
        assert!(matches!(memory.judge(&tag(1)).news[..], [News::LogFails(_)]));
        assert_eq!(memory.judge(&tag(2)).news, []);
        memory.log = log;
        assert_eq!(memory.judge(&[]).news, [], "nothing was written");
        assert_eq!(memory.judge(&tag(3)).news, [News::LogWorks]);
        assert_eq!(memory.judge(&tag(4)).news, []);
    }

    /// A key without a log would take replays.
    #[test]
    fn a_key_whose_log_cannot_be_opened_takes_nothing() {
        let node = TestNode::new(100);
        let in_the_way = node.dir.path().join("replay-8.log");
        std::fs::create_dir(&in_the_way).unwrap();
        node.keys.advance(UnixTime(600)).unwrap();
        let error = node.peeler.advance().unwrap_err();
        assert!(error.to_string().contains("replay-8.log"), "{error}");
        assert_eq!(node.peel_at(850, node.packets(8, 2)), 0);
        assert_eq!(node.dropped(DropReason::ReplayLogFailed), 2);
        std::fs::remove_dir(&in_the_way).unwrap();
        node.peeler.advance().unwrap();
        assert_eq!(node.peel_at(850, node.packets(8, 2)), 2);
    }

    #[test]
    fn the_operator_is_told_once_before_the_filter_is_full_and_once_when_it_is() {
        let node = TestNode::new(20);
        let epoch_key = node.peeler.epoch_key(5).unwrap();
        let mut news = Vec::new();
        for count in 1..=25 {
            let tag = ReplayTag::from_bytes([count; 32]);
            let judged = epoch_key.memory().judge(&[tag]);
            news.extend(judged.news.into_iter().map(|news| (count, news)));
        }
        let expected = [(18, News::Fill(Fill::NearlyFull)), (20, News::Fill(Fill::Full))];
        assert_eq!(news, expected);
    }

    #[test]
    fn peeling_tells_what_is_news() {
        let node = TestNode::new(3);
        node.peel(node.packets(5, 3));
        let epoch_key = node.peeler.epoch_key(5).unwrap();
        let mut memory = epoch_key.memory();
        assert_eq!((memory.said, memory.take_news()), (Fill::Full, None));
    }

    #[test]
    fn syncing_covers_all_keys() {
        let node = TestNode::new(10);
        node.peel_at(590, [node.packets(5, 1), node.packets(6, 1)].concat());
        node.peeler.sync().unwrap();
        for key_epoch in [5, 6] {
            let epoch_key = node.peeler.epoch_key(key_epoch).unwrap();
            assert!(epoch_key.memory().log.take_unsynced().is_none());
        }
    }
}
