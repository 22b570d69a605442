//! Messages through a gateway over loopback: kept, acknowledged, delivered, confirmed.

use mixsocks_client::gateway::{Arrival, GatewayLink};
use mixsocks_common::gateway::message::{ClientMessage, Confirmed, GatewayMessage, KeptBox};
use mixsocks_common::message::packet::AckStatus;
use mixsocks_sphinx::{
    Hop, ReplyRecovery, Route, SURB_LEN, SecretKey, build_packets, build_surbs, finish,
    max_plaintext, open_headers, recover_replies,
};

use super::tests::{GatewayNet, Person, RawClient, number};
use super::*;
use crate::counters::DropReason;
use crate::link::testnet::{ENTRY, EXIT, PAYLOAD_LEN, soon, until, until_dropped};

const BOX_BYTES: usize = max_plaintext(PAYLOAD_LEN) - SURB_LEN;

/// Somebody who sends messages, and awaits their acknowledgements at the gateway [`ENTRY`].
struct Sender {
    address: [u8; 32],
    key: SecretKey,
    last_mix: LinkPool,
    _first_mix: LinkListener,
    acks: mpsc::Receiver<Packet>,
    recoveries: Vec<ReplyRecovery>,
}

impl Sender {
    fn new(net: &mut GatewayNet) -> Self {
        let key = SecretKey::generate(&mut rand::rng());
        let (first_mix, acks) = net.first_mix();
        let (last_mix, recoveries) = (net.last_mix(), Vec::new());
        Self { address: [3; 32], key, last_mix, _first_mix: first_mix, acks, recoveries }
    }

    /// The bytes of a SURB for an acknowledgement.
    fn ack_surb(&mut self, net: &GatewayNet) -> Vec<u8> {
        let mut hops: Vec<_> =
            [1, 2, 3, ENTRY].map(|node| net.net.hop(node, Duration::ZERO)).into();
        let (address, key) = (self.address, self.key.public_key());
        hops.push(Hop { address, key, delay: Duration::ZERO });
        let identifier = [u8::try_from(self.recoveries.len() + 1).unwrap(); 16];
        let route = Route::new(&hops, self.address, identifier).unwrap();
        let (surb, recovery) = build_surbs(&mut rand::rng(), &[route]).remove(0).unwrap();
        self.recoveries.push(recovery);
        surb.as_bytes().to_vec()
    }

    /// Sends a box that consists of one byte, repeated.
    fn send(&mut self, net: &GatewayNet, to: &Person, fill: u8) {
        let surb = self.ack_surb(net);
        let contents = [surb, vec![fill; BOX_BYTES]].concat();
        self.send_contents(net, to, [0; 16], &contents);
    }

    fn send_contents(&self, net: &GatewayNet, to: &Person, identifier: [u8; 16], contents: &[u8]) {
        let gateway = net.net.hop(EXIT, Duration::ZERO);
        let to = *to.key.identity().as_bytes();
        let route = Route::new(&[gateway], to, identifier).unwrap();
        let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &[(route, contents)]);
        let packet = built.into_iter().next().unwrap().unwrap();
        self.last_mix.send(&net.net.identity(EXIT), packet);
    }

    /// The next acknowledgement, as its sender gets it.
    async fn ack(&mut self, net: &GatewayNet) -> AckStatus {
        let mut packet = soon(self.acks.recv()).await.unwrap();
        for node in [1, 2, 3, ENTRY] {
            packet = match peel(&net.net.sphinx_key(node, 0), packet) {
                Peeled::Forward { packet, .. } => packet,
                Peeled::Final { .. } => panic!("it ends before its sender"),
            };
        }
        let Peeled::Final { identifier, payload, .. } = peel(&self.key, packet) else {
            panic!("it goes on after its sender")
        };
        let is_it = |recovery: &ReplyRecovery| recovery.identifier() == identifier;
        let at = self.recoveries.iter().position(is_it).expect("each SURB is used once");
        let recovery = self.recoveries.remove(at);
        let contents = recover_replies(vec![(recovery, payload)]).remove(0).unwrap();
        AckStatus::from_bytes(&contents).unwrap()
    }

    /// Sends, and waits for the acknowledgement.
    async fn send_acked(&mut self, net: &GatewayNet, to: &Person, fills: &[u8]) {
        for fill in fills {
            self.send(net, to, *fill);
            assert_eq!(self.ack(net).await, AckStatus::Stored);
        }
    }
}

fn peel(key: &SecretKey, packet: Packet) -> Peeled {
    let opened = open_headers(key, vec![packet]).remove(0).unwrap();
    finish(vec![opened]).remove(0).unwrap()
}

impl GatewayNet {
    /// Somebody who is registered, and away.
    async fn absent(&self) -> Person {
        let person = self.person();
        drop(self.connect(&person).await);
        person
    }
}

/// The next delivery.
async fn delivery(link: &mut GatewayLink) -> KeptBox {
    loop {
        match soon(link.receiver.recv()).await.unwrap() {
            Arrival::Delivery(kept) => return kept,
            Arrival::CaughtUp(_) => {}
            Arrival::Packet(_) => panic!("a packet"),
        }
    }
}

/// Takes deliveries that consist of these bytes; their numbers.
async fn deliveries(link: &mut GatewayLink, fills: &[u8]) -> Vec<u64> {
    let mut numbers = Vec::new();
    for fill in fills {
        let kept = delivery(link).await;
        assert_eq!(kept.sealed, vec![*fill; BOX_BYTES]);
        numbers.push(kept.number);
    }
    numbers
}

async fn confirm(link: &GatewayLink, gateway: &Gateway, numbers: &[u64]) {
    let left = gateway.store.usage().boxes - numbers.len() as u64;
    for number in numbers {
        soon(link.confirmations.send(*number)).await.unwrap();
    }
    until(|| gateway.store.usage().boxes == left).await;
}

#[tokio::test]
async fn who_is_away_gets_messages_later_in_their_order_until_they_are_confirmed() {
    let mut net = GatewayNet::new().await;
    let mut gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.absent().await;
    sender.send_acked(&net, &person, &[1, 2, 3, 4]).await;

    let mut link = net.receive(&person).await;
    let numbers = deliveries(&mut link, &[1, 2, 3, 4]).await;
    confirm(&link, &gateway, &numbers[1..3]).await;
    // After a cut, in a new program, and from a new process of the gateway.
    net.proxy.cut();
    assert_eq!(deliveries(&mut link, &[1, 4]).await, [numbers[0], numbers[3]]);
    drop(link);
    soon(gateway.shutdown()).await;
    gateway = net.restart("gateway").await;
    let mut link = net.receive(&person).await;
    assert_eq!(deliveries(&mut link, &[1, 4]).await, [numbers[0], numbers[3]]);
    confirm(&link, &gateway, &[numbers[0], numbers[3]]).await;
    drop(link);
    assert_eq!(gateway.store.usage(), store::Usage::default());
}

#[tokio::test]
async fn who_is_there_gets_each_message_once() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.absent().await;
    let mut link = net.receive(&person).await;
    let mut numbers = Vec::new();
    for fill in 0..100 {
        sender.send(&net, &person, fill);
        numbers.extend(deliveries(&mut link, &[fill]).await);
        assert_eq!(sender.ack(&net).await, AckStatus::Stored);
    }
    assert!(numbers.is_sorted_by(|a, b| a < b));
    // Also when many came before it looked.
    drop(link);
    let mut link = net.receive(&person).await;
    assert_eq!(deliveries(&mut link, &(0..100).collect::<Vec<_>>()).await, numbers);
    assert_eq!(gateway.store.usage().boxes, 100);
    confirm(&link, &gateway, &numbers).await;
    let counts = || gateway.monitor().store().unwrap().0;
    until(|| counts().confirmed == 100).await;
    assert_eq!(counts().kept, 100);
}

#[tokio::test]
async fn streams_and_messages_share_a_connection() {
    const COUNT: u64 = 200;
    let mut net = GatewayNet::new().await;
    let _gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.absent().await;
    let fills: Vec<_> = (0..50).collect();
    sender.send_acked(&net, &person, &fills).await;
    let mut link = net.receive(&person).await;
    let all = net.packets_for(&person, 0..COUNT);
    let packets = all.len();
    for packet in all {
        sender.last_mix.send(&net.net.identity(EXIT), packet);
    }
    let (mut delivered, mut numbers) = (Vec::new(), Vec::new());
    while delivered.len() + numbers.len() < fills.len() + packets {
        match soon(link.receiver.recv()).await.unwrap() {
            Arrival::Delivery(kept) => delivered.push(kept.sealed[0]),
            Arrival::CaughtUp(_) => assert_eq!(delivered, fills, "all that was kept came before"),
            packet => numbers.push(number(&person, packet)),
        }
    }
    numbers.sort_unstable();
    assert_eq!((delivered, numbers), (fills, (0..COUNT).collect()));
}

#[tokio::test]
async fn who_does_not_ask_is_sent_nothing() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.person();
    let (_sender, mut receiver, _) = net.connect(&person).await;
    sender.send_acked(&net, &person, &[1, 2]).await;
    for packet in net.packets_for(&person, 7..8) {
        sender.last_mix.send(&net.net.identity(EXIT), packet);
    }
    assert_eq!(number(&person, soon(receiver.recv()).await.unwrap()), 7);
    assert_eq!(gateway.store.usage().boxes, 2);
}

#[tokio::test]
async fn senders_are_told_what_is_not_kept_and_why() {
    let mut net = GatewayNet::new().await;
    net.limits = Limits { client_boxes: 2, total_bytes: 4 * BOX_BYTES as u64, ..net.limits };
    let gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let stranger = net.person();
    let people = [net.absent().await, net.absent().await];
    // The whole store is so small that each has room for one.
    let expected = [
        (&stranger, AckStatus::UnknownClient),
        (&people[0], AckStatus::Stored),
        (&people[0], AckStatus::ShareFull),
        (&people[1], AckStatus::Stored),
    ];
    for (to, status) in expected {
        sender.send(&net, to, 9);
        assert_eq!(sender.ack(&net).await, status);
    }
    let mut link = net.receive(&people[0]).await;
    let numbers = deliveries(&mut link, &[9]).await;
    confirm(&link, &gateway, &numbers).await;
    sender.send_acked(&net, &people[0], &[8]).await;
    assert_eq!(deliveries(&mut link, &[8]).await.len(), 1);
    let counts = gateway.monitor().store().unwrap().0;
    assert_eq!((counts.kept, counts.client_full, counts.unknown_client), (3, 1, 1));
}

#[tokio::test]
async fn what_is_no_message_packet_is_dropped_and_counted() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.absent().await;
    let good = [sender.ack_surb(&net), vec![1; BOX_BYTES]].concat();
    let mut low_order = good.clone();
    low_order[..32].fill(0);
    sender.send_contents(&net, &person, [1; 16], &good);
    for contents in [&good[..good.len() - 1], &good[..SURB_LEN], &[], &low_order] {
        sender.send_contents(&net, &person, [0; 16], contents);
    }
    until_dropped(gateway.counters(), DropReason::MalformedMessage, 5).await;
    sender.send_acked(&net, &person, &[2]).await;
    assert_eq!(gateway.store.usage().boxes, 1);
}

/// A SURB may name anybody as its first hop; a gateway sends to its mixes only.
#[tokio::test]
async fn acknowledgements_go_to_the_first_layer_only() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.absent().await;
    for (at, reason, count) in [(2, DropReason::WrongLayer, 1), (ENTRY, DropReason::WrongLayer, 2)]
    {
        let mut contents = [sender.ack_surb(&net), vec![1; BOX_BYTES]].concat();
        contents[348..380].copy_from_slice(net.net.identity(at).as_bytes());
        sender.send_contents(&net, &person, [0; 16], &contents);
        until_dropped(gateway.counters(), reason, count).await;
    }
    let mut contents = [sender.ack_surb(&net), vec![1; BOX_BYTES]].concat();
    contents[348..380].fill(9);
    sender.send_contents(&net, &person, [0; 16], &contents);
    until_dropped(gateway.counters(), DropReason::UnknownNextHop, 1).await;
}

impl RawClient {
    async fn next_delivery(&mut self) -> KeptBox {
        loop {
            let frame = self.frame().await.unwrap();
            match self.codec.decode(&frame).unwrap().body {
                mixsocks_common::link::FrameBody::Control(body) => {
                    match GatewayMessage::decode(body).unwrap() {
                        GatewayMessage::Delivery(kept) => return kept,
                        GatewayMessage::CaughtUp(_) => {}
                        message => panic!("{message:?}"),
                    }
                }
                mixsocks_common::link::FrameBody::Pad => {}
                body => panic!("{body:?}"),
            }
        }
    }
}

#[tokio::test]
async fn only_what_was_sent_can_be_confirmed_and_asking_again_starts_over() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut sender = Sender::new(&mut net);
    let person = net.person();
    let mut raw = RawClient::dial(&net).await;
    raw.log_in(&net, &person, None).await.unwrap();
    sender.send_acked(&net, &person, &[1, 2, 3]).await;
    let stored = gateway.store.deliveries(person.key.identity().as_bytes(), 0, 9).unwrap();
    let numbers: Vec<_> = stored.iter().map(|kept| kept.number).collect();
    let confirm = |numbers: &[u64]| {
        let confirmed = Confirmed::new(numbers.to_vec()).unwrap();
        ClientMessage::Confirm(confirmed)
    };
    // Nothing was sent yet: it is ignored, also when the client guesses right.
    raw.send(raw.control(&confirm(&numbers))).await;
    for round in 0..2 {
        raw.send(raw.control(&ClientMessage::Receive(1))).await;
        for kept in &stored {
            assert_eq!(raw.next_delivery().await, *kept, "{round}");
        }
        assert_eq!(gateway.store.usage().boxes, 3);
    }
    raw.send(raw.control(&confirm(&numbers[..1]))).await;
    until(|| gateway.store.usage().boxes == 2).await;
    raw.send(raw.control(&ClientMessage::Receive(1))).await;
    assert_eq!(raw.next_delivery().await, stored[1]);
}
