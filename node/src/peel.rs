//! Peeling with a memory: open the headers, refuse what was here before, finish the rest.

use std::sync::{Arc, Mutex, PoisonError};

use mixsocks_common::keys::EncryptionKey;
use mixsocks_common::replay::{Admission, ReplayFilter};
use mixsocks_sphinx::{OpenedPacket, Packet, PeelError, Peeled, SecretKey, finish, open_headers};
use rand::Rng;
use tracing::warn;

use crate::counters::{Counters, DropReason};

/// Most tags that a node remembers for one key: some 720 MB, and at 2,000 packets per second nine
/// hours. Beyond it every packet is refused until the key changes.
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
    /// What the operator has been told.
    said: Fill,
}

impl Memory {
    /// What the operator must be told now; once for each step.
    fn take_news(&mut self) -> Option<Fill> {
        let fill = Fill::of(self.filter.len(), self.max_tags);
        (fill > self.said).then(|| {
            self.said = fill;
            fill
        })
    }
}

/// One Sphinx key with the tags of the packets that it has opened; shared by crypto workers.
#[derive(Debug)]
pub struct Peeler {
    key: SecretKey,
    /// Held for microseconds per batch, never across an await.
    memory: Mutex<Memory>,
    counters: Arc<Counters>,
}

impl Peeler {
    /// A peeler that has seen no packet and remembers up to `max_tags`; `rng` keys the table.
    pub fn new(
        key: SecretKey,
        max_tags: usize,
        counters: Arc<Counters>,
        rng: &mut impl Rng,
    ) -> Self {
        let filter = ReplayFilter::new(max_tags, rng);
        let memory = Mutex::new(Memory { filter, max_tags, said: Fill::Room });
        Self { key, memory, counters }
    }

    /// Takes one layer off each packet, in their order. Packets that are forged, malformed,
    /// replayed, or new to a full filter are dropped and counted.
    ///
    /// Takes some 60 µs of CPU per packet, more for a single one, and does not wait: keep batches
    /// small between awaits.
    pub fn peel(&self, packets: Vec<Packet>) -> Vec<Peeled> {
        let opened: Vec<_> = open_headers(&self.key, packets)
            .into_iter()
            .filter_map(|opened| self.count_error(opened))
            .collect();
        let fresh = self.admit(opened);
        finish(fresh).into_iter().filter_map(|peeled| self.count_error(peeled)).collect()
    }

    fn admit(&self, opened: Vec<OpenedPacket>) -> Vec<OpenedPacket> {
        // Tags are taken out first, so that the lock covers nothing but the table.
        let tags: Vec<_> = opened.iter().map(OpenedPacket::replay_tag).collect();
        let (admissions, news): (Vec<_>, _) = {
            // A panic inside would leave the table as it was or with one tag more: still in order.
            let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            let admissions = tags.iter().map(|tag| memory.filter.insert(tag)).collect();
            (admissions, memory.take_news())
        };
        if let Some(fill) = news {
            self.warn(fill);
        }
        let is_fresh = |admission| match admission {
            Admission::Fresh => true,
            Admission::Replayed => {
                self.counters.add_drop(DropReason::Replayed);
                false
            }
            Admission::Full => {
                self.counters.add_drop(DropReason::ReplayFilterFull);
                false
            }
        };
        opened
            .into_iter()
            .zip(admissions)
            .filter_map(|(opened, admission)| is_fresh(admission).then_some(opened))
            .collect()
    }

    fn warn(&self, fill: Fill) {
        let key = EncryptionKey::from(self.key.public_key());
        match fill {
            Fill::Room => {}
            Fill::NearlyFull => warn!(
                "the node with the Sphinx key {key} has used up nine tenths of it: replace the key \
                 soon, in the topology too, else the node will refuse every packet"
            ),
            Fill::Full => warn!(
                "the node with the Sphinx key {key} has used it up and refuses every new packet: \
                 replace the key, in the topology too"
            ),
        }
    }

    fn count_error<T>(&self, result: Result<T, PeelError>) -> Option<T> {
        result.map_err(|error| self.counters.add_drop(drop_reason(error))).ok()
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

    fn packets(key: &SecretKey, count: usize) -> Vec<Packet> {
        let hop = Hop { address: [1; 32], key: key.public_key(), delay: Duration::ZERO };
        let route = Route::new(&[hop], [2; 32], [3; 16]).unwrap();
        let requests = vec![(route, &b"text"[..]); count];
        let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &requests);
        built.into_iter().map(Result::unwrap).collect()
    }

    fn peeler(key: SecretKey, max_tags: usize) -> (Peeler, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        (Peeler::new(key, max_tags, counters.clone(), &mut rand::rng()), counters)
    }

    #[test]
    fn a_packet_passes_once_also_within_a_batch() {
        let key = SecretKey::generate(&mut rand::rng());
        let packets = packets(&key, 2);
        let (peeler, counters) = peeler(key, 10);
        let twice = vec![packets[0].clone(), packets[0].clone(), packets[1].clone()];
        assert_eq!(peeler.peel(twice).len(), 2);
        assert!(peeler.peel(packets).is_empty());
        assert_eq!(counters.snapshot().dropped(DropReason::Replayed), 3);
    }

    /// Neither another payload nor the ignored top bit of the group element makes a new packet.
    #[test]
    fn a_disguised_replay_is_a_replay() {
        let key = SecretKey::generate(&mut rand::rng());
        let packet = packets(&key, 1).remove(0);
        let (peeler, counters) = peeler(key, 10);
        let disguised: Vec<_> = [31, HEADER_LEN, HEADER_LEN + PAYLOAD_LEN - 1]
            .into_iter()
            .map(|at| {
                let mut bytes = packet.clone().into_bytes();
                bytes[at] ^= 0x80;
                Packet::from_bytes(bytes, PAYLOAD_LEN).unwrap()
            })
            .collect();
        assert_eq!(peeler.peel(vec![packet]).len(), 1);
        assert!(peeler.peel(disguised).is_empty());
        assert_eq!(counters.snapshot().dropped(DropReason::Replayed), 3);
    }

    #[test]
    fn forgeries_are_counted_and_fill_no_memory() {
        let key = SecretKey::generate(&mut rand::rng());
        let other = SecretKey::generate(&mut rand::rng());
        let good = packets(&key, 1);
        let mut low_order = good[0].clone().into_bytes();
        low_order[..32].fill(0);
        let low_order = Packet::from_bytes(low_order, PAYLOAD_LEN).unwrap();
        // Room for a single tag: forgeries must not take it.
        let (peeler, counters) = peeler(key, 1);
        let mut forged = packets(&other, 3);
        forged.push(low_order);
        assert!(peeler.peel(forged).is_empty());
        assert_eq!(peeler.peel(good).len(), 1);
        let counts = counters.snapshot();
        assert_eq!(counts.dropped(DropReason::BadMac), 3);
        assert_eq!(counts.dropped(DropReason::LowOrder), 1);
    }

    #[test]
    fn a_full_filter_refuses() {
        let key = SecretKey::generate(&mut rand::rng());
        let packets = packets(&key, 5);
        let (peeler, counters) = peeler(key, 2);
        assert_eq!(peeler.peel(packets).len(), 2);
        assert_eq!(counters.snapshot().dropped(DropReason::ReplayFilterFull), 3);
    }

    #[test]
    fn the_operator_is_told_once_before_the_filter_is_full_and_once_when_it_is() {
        let key = SecretKey::generate(&mut rand::rng());
        let packets = packets(&key, 25);
        let (peeler, _) = peeler(key, 20);
        let mut news = Vec::new();
        for (count, packet) in (1..).zip(packets) {
            let opened = open_headers(&peeler.key, vec![packet]).remove(0).unwrap();
            let mut memory = peeler.memory.lock().unwrap();
            memory.filter.insert(&opened.replay_tag());
            news.extend(memory.take_news().map(|fill| (count, fill)));
        }
        assert_eq!(news, [(18, Fill::NearlyFull), (20, Fill::Full)]);
    }

    #[test]
    fn peeling_tells_what_is_news() {
        let key = SecretKey::generate(&mut rand::rng());
        let packets = packets(&key, 3);
        let (peeler, _) = peeler(key, 3);
        peeler.peel(packets);
        let mut memory = peeler.memory.lock().unwrap();
        assert_eq!((memory.said, memory.take_news()), (Fill::Full, None));
    }
}
