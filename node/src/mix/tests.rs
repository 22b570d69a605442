//! Mixes over loopback, between two gateways that only send and only receive.

use std::time::{Duration, Instant};

use mixsocks_sphinx::{Hop, Packet, Peeled, Route, build_packets};

use super::*;
use crate::counters::DropReason;
use crate::link::testnet::{ENTRY, EXIT, MAX_DELAY, PAYLOAD_LEN, TestNet, soon, until_dropped};

const ROUTE: [usize; 4] = [1, 2, 3, EXIT];

fn start(net: &mut TestNet, number: usize) -> Mix {
    Mix::start(MixConfig {
        identity: net.keys[number].clone(),
        keys: net.sphinx_keys[number].clone(),
        topology: net.watch(),
        listener: net.listener(number),
        data_dir: net.data_dir(number),
    })
    .unwrap()
}

fn entry(net: &TestNet) -> LinkPool {
    LinkPool::start(net.context(ENTRY).0).unwrap()
}

fn exit(net: &mut TestNet) -> (LinkListener, mpsc::Receiver<Packet>) {
    let (context, _) = net.context(EXIT);
    let (sender, packets) = mpsc::channel(8);
    (LinkListener::start(context, net.listener(EXIT), sender).unwrap(), packets)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_mixes_carry_a_thousand_packets_each_once() {
    const PACKETS: usize = 1000;
    let mut net = TestNet::new().await;
    let (_exit, mut arrived) = exit(&mut net);
    let mixes = [3, 2, 1].map(|number| start(&mut net, number));
    let entry = entry(&net);
    let delays: Vec<_> = (0..PACKETS as u64).map(|n| Duration::from_micros(n * 7 % 5000)).collect();
    for packet in net.packets(&ROUTE, &delays) {
        entry.send(&net.identity(1), packet);
    }
    let (keys, data_dir) = (net.sphinx_keys[EXIT].clone(), net.data_dir(EXIT));
    let peeler = Peeler::open(keys, data_dir, PACKETS, Arc::default()).unwrap();
    let mut numbers = Vec::new();
    for _ in 0..PACKETS {
        let packet = soon(arrived.recv()).await.unwrap();
        let Some(Peeled::Final { payload, .. }) =
            peeler.peel(Clock::System.now(), vec![packet]).pop()
        else {
            panic!("a packet that the exit cannot open");
        };
        let text = payload.into_plaintext().unwrap();
        numbers.push(usize::try_from(u64::from_be_bytes(text.try_into().unwrap())).unwrap());
    }
    assert!(!numbers.is_sorted(), "different delays mix the order");
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..PACKETS), "each once");
    for mix in mixes {
        assert_eq!((mix.monitor().replay_tags(), mix.monitor().key_epoch()), (PACKETS, 0));
        let counts = mix.counters().clone();
        soon(mix.shutdown()).await;
        let counts = counts.snapshot();
        assert_eq!((counts.packets_in, counts.dropped_total()), (1000, 0), "{counts}");
    }
    assert!(arrived.try_recv().is_err(), "and no more");
}

#[tokio::test]
async fn a_packet_is_held_for_its_delay() {
    let mut net = TestNet::new().await;
    let (_exit, mut arrived) = exit(&mut net);
    let _mixes = [3, 2, 1].map(|number| start(&mut net, number));
    let entry = entry(&net);
    let since = Instant::now();
    for packet in net.packets(&ROUTE, &[MAX_DELAY]) {
        entry.send(&net.identity(1), packet);
    }
    soon(arrived.recv()).await.unwrap();
    assert!(since.elapsed() >= 3 * (MAX_DELAY - TIMER_LATENESS));
}

#[tokio::test]
async fn a_replay_is_dropped_and_counted() {
    let mut net = TestNet::new().await;
    let (_exit, mut arrived) = exit(&mut net);
    let mixes = [3, 2, 1].map(|number| start(&mut net, number));
    let entry = entry(&net);
    let packet = net.packets(&ROUTE, &[Duration::ZERO]).remove(0);
    for _ in 0..5 {
        entry.send(&net.identity(1), packet.clone());
    }
    soon(arrived.recv()).await.unwrap();
    until_dropped(mixes[2].counters(), DropReason::Replayed, 4).await;
    assert!(arrived.try_recv().is_err());
}

/// Routes that a client may craft to use a mix as a relay or to learn something from it.
#[tokio::test]
async fn crafted_routes_end_here() {
    let mut net = TestNet::new().await;
    let mix = start(&mut net, 1);
    let entry = entry(&net);
    let send = |packets: Vec<Packet>| {
        for packet in packets {
            entry.send(&net.identity(1), packet);
        }
    };
    // Past a layer, straight to the exit, back to the entry, in a circle.
    for second in [3, EXIT, ENTRY, 1] {
        send(net.packets(&[1, second], &[Duration::ZERO]));
    }
    until_dropped(mix.counters(), DropReason::WrongLayer, 4).await;

    // A hop of the sender's own.
    let own = Hop { address: [9; 32], ..net.hop(2, Duration::ZERO) };
    let route = Route::new(&[net.hop(1, Duration::ZERO), own], [7; 32], [8; 16]).unwrap();
    let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &[(route, &b"text"[..])]);
    send(built.into_iter().map(Result::unwrap).collect());
    until_dropped(mix.counters(), DropReason::UnknownNextHop, 1).await;

    // A route that ends at a mix.
    send(net.packets(&[1], &[Duration::ZERO]));
    until_dropped(mix.counters(), DropReason::FinalHopHere, 1).await;

    // A packet for another mix.
    send(net.packets(&[2, 3], &[Duration::ZERO]));
    until_dropped(mix.counters(), DropReason::BadMac, 1).await;
    assert_eq!(mix.counters().snapshot().packets_out, 0);
}

/// Of the packets whose next mix is away, none is lost without being counted.
#[tokio::test]
async fn packets_for_a_mix_that_is_away_are_counted() {
    let mut net = TestNet::new().await;
    drop(net.listener(2));
    let mix = start(&mut net, 1);
    let entry = entry(&net);
    for packet in net.packets(&ROUTE, &[Duration::ZERO; 20]) {
        entry.send(&net.identity(1), packet);
    }
    until_dropped(mix.counters(), DropReason::LinkDown, 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mix_that_comes_to_its_end_passes_on_what_it_holds() {
    const PACKETS: usize = 50;
    let mut net = TestNet::new().await;
    let (_exit, mut arrived) = exit(&mut net);
    let [_third, _second, first] = [3, 2, 1].map(|number| start(&mut net, number));
    let entry = entry(&net);
    for packet in net.packets(&ROUTE, &[MAX_DELAY; PACKETS]) {
        entry.send(&net.identity(1), packet);
    }
    let taken = async {
        while first.monitor().replay_tags() < PACKETS {
            tokio::task::yield_now().await;
        }
    };
    soon(taken).await;
    let counters = first.counters().clone();
    let all = async {
        for _ in 0..PACKETS {
            arrived.recv().await.unwrap();
        }
    };
    tokio::join!(soon(first.drain()), soon(all));
    let counts = counters.snapshot();
    assert_eq!((counts.packets_out, counts.dropped_total()), (50, 0), "{counts}");
}

#[tokio::test]
async fn dropping_a_mix_closes_its_port() {
    let mut net = TestNet::new().await;
    let mix = start(&mut net, 1);
    let address = net.address(1);
    tokio::net::TcpStream::connect(address).await.unwrap();
    drop(mix);
    let refused = async {
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    soon(refused).await;
}
