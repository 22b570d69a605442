//! What a seed decides of packets and SURBs.

use mixsocks_sphinx::{HEADER_LEN, Packet, open_headers, recover_replies, use_surbs};

use crate::network::{self, Network};

/// The packet before each hop, and its replay tag there.
fn journey(network: &Network, packet: Packet) -> Vec<(Vec<u8>, [u8; 32])> {
    let mut seen = Vec::new();
    network.travel(packet, |hop, packet| {
        let opened = open_headers(&network.keys[hop], vec![packet.clone()]).remove(0);
        let tag = *opened.unwrap().replay_tag().as_bytes();
        seen.push((packet.as_bytes().to_vec(), tag));
        packet
    });
    seen
}

#[test]
fn a_seed_decides_every_byte_of_a_packet() {
    for hops in 1..=5 {
        let network = Network::new(&mut network::rng(1), hops);
        let [one, other] = [(); 2].map(|()| {
            let packet = network.packet(&mut network::rng(2), 1024, b"hello");
            journey(&network, packet)
        });
        assert_eq!(one, other);
    }
}

#[test]
fn a_seed_decides_every_byte_of_a_surb_and_what_its_creator_keeps() {
    for hops in 1..=5 {
        let network = Network::new(&mut network::rng(1), hops);
        let [(one, recovery), (other, _)] = [(); 2].map(|()| network.surb(&mut network::rng(2)));
        assert_eq!(one.as_bytes(), other.as_bytes());
        let (_, packet) = use_surbs(1024, vec![(other, b"hello")]).remove(0).unwrap();
        let payload = network.travel(packet, |_, packet| packet);
        let reply = recover_replies(vec![(recovery, payload)]).remove(0);
        assert_eq!(reply.unwrap(), b"hello");
    }
}

#[test]
fn different_seeds_give_different_packets() {
    let network = Network::new(&mut network::rng(1), 5);
    let [one, other] = [2, 3].map(|seed| network.packet(&mut network::rng(seed), 1024, b"hello"));
    assert_ne!(one.as_bytes()[..32], other.as_bytes()[..32]);
    assert_ne!(one.as_bytes()[HEADER_LEN..], other.as_bytes()[HEADER_LEN..]);
}
