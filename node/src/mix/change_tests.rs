//! What changes while a mix runs: its keys, its topology, and the mix itself, which may be killed.

use std::time::Duration;

use mixsocks_common::topology::UnixTime;
use mixsocks_sphinx::{Hop, Route, build_packets};

use super::*;
use crate::counters::DropReason;
use crate::link::testnet::{ENTRY, NOW, PAYLOAD_LEN, TestNet, soon, until, until_dropped};

const MIX: usize = 1;

/// A mix of layer 1 whose clock and documents a test sets, and its neighbours.
struct Running {
    net: TestNet,
    clock: watch::Sender<UnixTime>,
    documents: watch::Sender<Arc<Topology>>,
    mix: Mix,
    entry: LinkPool,
    _next: LinkListener,
    arrived: mpsc::Receiver<Packet>,
}

impl Running {
    async fn start() -> Self {
        let mut net = TestNet::rotating().await;
        let (clock, documents) =
            (watch::Sender::new(NOW), watch::Sender::new(net.topology.clone()));
        let listener = net.listener(MIX);
        let mix = start(&net, net.sphinx_keys[MIX].clone(), listener, &clock, &documents);
        let (sender, arrived) = mpsc::channel(8);
        let next = LinkListener::start(net.context(2).0, net.listener(2), sender).unwrap();
        let entry = LinkPool::start(net.context(ENTRY).0).unwrap();
        Self { net, clock, documents, mix, entry, _next: next, arrived }
    }

    /// Sets the clock, and waits until the mix has followed.
    async fn set_clock(&self, now: u64) {
        self.clock.send_replace(UnixTime(now));
        let key_epoch = self.net.topology.parameters.epochs.key_epoch_at(UnixTime(now));
        until(|| self.mix.monitor().key_epoch() == key_epoch).await;
    }

    fn send(&self, packet: &Packet) {
        self.entry.send(&self.net.identity(MIX), packet.clone());
    }

    async fn passes(&mut self, packet: &Packet) {
        self.send(packet);
        soon(self.arrived.recv()).await.unwrap();
    }

    /// Sends a packet that must not pass, and counts.
    async fn is_dropped(&mut self, packet: &Packet, reason: DropReason) {
        let before = self.mix.counters().snapshot().dropped(reason);
        self.send(packet);
        until_dropped(self.mix.counters(), reason, before + 1).await;
        assert!(self.arrived.try_recv().is_err());
    }

    /// A packet under the mix's key of a key epoch.
    fn packet(&self, key_epoch: u64) -> Packet {
        let key = self.net.sphinx_key(MIX, key_epoch);
        let first = Hop { key: key.public_key(), ..self.net.hop(MIX, Duration::ZERO) };
        let second = self.net.hop(2, Duration::ZERO);
        let route = Route::new(&[first, second], [7; 32], [8; 16]).unwrap();
        let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &[(route, &b"text"[..])]);
        built.into_iter().next().unwrap().unwrap()
    }
}

fn start(
    net: &TestNet,
    keys: Arc<SphinxKeys>,
    listener: TcpListener,
    clock: &watch::Sender<UnixTime>,
    documents: &watch::Sender<Arc<Topology>>,
) -> Mix {
    let config = MixConfig {
        identity: net.keys[MIX].clone(),
        keys,
        topology: documents.subscribe(),
        listener,
        data_dir: net.data_dir(MIX),
    };
    Mix::start_at(config, Clock::Fake(clock.subscribe()), None).unwrap()
}

/// As long as a key is there, no packet passes twice: not after the mix was killed, and not when its
/// key is the last one; and when the key is gone, it passes no more either.
#[tokio::test]
async fn a_neighbour_that_records_and_repeats_gets_nothing_through() {
    let mut running = Running::start().await;
    let recorded = running.packet(5);
    running.passes(&recorded).await;
    running.is_dropped(&recorded, DropReason::Replayed).await;
    assert_eq!(running.mix.monitor().replay_tags(), 1);

    // Dropped without a farewell, and started again on the same directory.
    let address = running.net.address(MIX);
    let Running { net, clock, documents, mix, entry, _next, arrived } = running;
    drop(mix);
    let listener = async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let listener = soon(listener).await;
    let epochs = net.topology.parameters.epochs;
    let keys = Arc::new(SphinxKeys::open(&net.data_dir(MIX), epochs, NOW).unwrap());
    let mix = start(&net, keys, listener, &clock, &documents);
    assert_eq!(mix.monitor().replay_tags(), 1);
    let mut running = Running { net, clock, documents, mix, entry, _next, arrived };
    // Until the link is up again, what is sent is lost.
    let replayed = || running.mix.counters().snapshot().dropped(DropReason::Replayed);
    let repeat = async {
        while replayed() == 0 {
            running.send(&recorded);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(repeat).await;
    assert!(running.arrived.try_recv().is_err());
    let new = running.packet(5);
    running.passes(&new).await;
    running.is_dropped(&new, DropReason::Replayed).await;

    running.set_clock(610).await;
    running.is_dropped(&recorded, DropReason::Replayed).await;
    running.set_clock(620).await;
    running.is_dropped(&recorded, DropReason::BadMac).await;
}

#[tokio::test]
async fn a_packet_under_the_other_key_passes_during_the_overlap_and_not_outside() {
    let mut running = Running::start().await;
    let [early, old, late] = [5, 5, 5].map(|key_epoch| running.packet(key_epoch));
    let next = [6, 6, 6].map(|key_epoch| running.packet(key_epoch));
    running.is_dropped(&next[0], DropReason::BadMac).await;
    running.passes(&early).await;
    running.set_clock(590).await;
    running.passes(&next[1]).await;
    running.set_clock(619).await;
    assert_eq!(running.mix.monitor().key_epoch(), 6);
    running.passes(&old).await;
    running.passes(&next[2]).await;
    running.is_dropped(&old, DropReason::Replayed).await;
    running.set_clock(620).await;
    running.is_dropped(&late, DropReason::BadMac).await;
    // The old key, its tags and its log go, and new ones come.
    until(|| running.mix.monitor().replay_tags() == 2).await;
    let files = || {
        let names = std::fs::read_dir(running.net.data_dir(MIX)).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    };
    let expected = [6, 7, 8].map(|key_epoch| format!("replay-{key_epoch}.log"));
    let expected: Vec<_> =
        expected.into_iter().chain([6, 7, 8].map(|n| format!("sphinx-{n}.key"))).collect();
    until(|| files() == expected).await;
}

/// To layer 2, out of the document, and back.
#[tokio::test]
async fn a_mix_follows_its_place_in_the_topology() {
    let mut running = Running::start().await;
    let packet = running.packet(5);
    running.passes(&packet).await;

    // The mix that was in layer 2 now sends to it, and it sends to layer 3.
    let swapped = running.net.swapped(MIX, 2);
    let original = std::mem::replace(&mut running.net.topology, swapped.clone());
    let (sender, mut third) = mpsc::channel(8);
    let context = running.net.context(3).0;
    let listener = running.net.listener(3);
    let _third = LinkListener::start(context, listener, sender).unwrap();
    running.documents.send_replace(swapped);
    let layer_1 = LinkPool::start(running.net.context(2).0).unwrap();
    let arrived = async {
        loop {
            // Until the mix has the document too, it refuses the link.
            for packet in running.net.packets(&[MIX, 3], &[Duration::ZERO]) {
                layer_1.send(&running.net.identity(MIX), packet);
            }
            let wait = Duration::from_millis(20);
            if let Ok(Some(_)) = tokio::time::timeout(wait, third.recv()).await {
                return;
            }
        }
    };
    soon(arrived).await;
    let wrong = running.mix.counters().snapshot().dropped(DropReason::WrongLayer);
    for packet in running.net.packets(&[MIX, 2], &[Duration::ZERO]) {
        layer_1.send(&running.net.identity(MIX), packet);
    }
    until_dropped(running.mix.counters(), DropReason::WrongLayer, wrong + 1).await;

    running.net.topology = original.clone();
    running.documents.send_replace(running.net.without(MIX));
    running.documents.send_replace(original);
    let back = async {
        loop {
            running.send(&running.packet(5));
            let wait = Duration::from_millis(20);
            if let Ok(Some(_)) = tokio::time::timeout(wait, running.arrived.recv()).await {
                return;
            }
        }
    };
    soon(back).await;
}

/// A mix that no document has yet runs, and waits.
#[tokio::test]
async fn a_mix_that_waits_works_as_soon_as_it_is_placed() {
    let mut net = TestNet::rotating().await;
    let without = net.without(MIX);
    let waiting = without.as_ref().clone().with_waiting(vec![net.identity(MIX)]).unwrap();
    let (clock, documents) = (watch::Sender::new(NOW), watch::Sender::new(Arc::new(waiting)));
    let listener = net.listener(MIX);
    let _mix = start(&net, net.sphinx_keys[MIX].clone(), listener, &clock, &documents);
    let (sender, mut arrived) = mpsc::channel(8);
    let _next = LinkListener::start(net.context(2).0, net.listener(2), sender).unwrap();
    documents.send_replace(net.topology.clone());
    // A document of another network changes nothing.
    let nodes = net.topology.nodes().to_vec();
    documents.send_replace(Arc::new(crate::link::testnet::topology("other", nodes)));
    documents.send_replace(net.topology.clone());
    let entry = LinkPool::start(net.context(ENTRY).0).unwrap();
    let passes = async {
        loop {
            for packet in net.packets(&[MIX, 2], &[Duration::ZERO]) {
                entry.send(&net.identity(MIX), packet);
            }
            let wait = Duration::from_millis(20);
            if let Ok(Some(_)) = tokio::time::timeout(wait, arrived.recv()).await {
                return;
            }
        }
    };
    soon(passes).await;
}

#[tokio::test]
async fn an_identity_that_the_topology_has_as_a_gateway_is_no_mix() {
    let mut net = TestNet::new().await;
    let started = Mix::start(MixConfig {
        identity: net.keys[ENTRY].clone(),
        keys: net.sphinx_keys[ENTRY].clone(),
        topology: net.watch(),
        listener: net.listener(ENTRY),
        data_dir: net.data_dir(ENTRY),
    });
    assert!(matches!(started, Err(MixError::NotAMix(_))));
}
