//! What a seed decides of packets and SURBs, and what the padding leaves open.

use mixsocks_sphinx::{HEADER_LEN, Packet, open_headers, recover_replies, use_surbs};

use crate::network::{self, Network};

const MAC: std::ops::Range<usize> = 32..48;
/// Flag, version, next address and delay, at the start of the routing information.
const COMMAND: std::ops::Range<usize> = 48..92;
/// Flag, version, destination and identifier, at the start of the last hop's.
const LAST_COMMAND: std::ops::Range<usize> = 48..100;

/// The padding of the last hop's routing information.
fn padding(hops: usize) -> std::ops::Range<usize> {
    LAST_COMMAND.end..48 + 60 * (6 - hops)
}

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

fn assert_same_but_for_padding(one: &[(Vec<u8>, [u8; 32])], other: &[(Vec<u8>, [u8; 32])]) {
    let hops = one.len();
    for (hop, ((a, a_tag), (b, b_tag))) in one.iter().zip(other).enumerate() {
        assert_eq!(a_tag, b_tag);
        assert_eq!(a[..32], b[..32], "group element");
        assert_ne!(a[MAC], b[MAC]);
        if hop + 1 < hops {
            assert_eq!(a[COMMAND], b[COMMAND]);
        } else {
            let padding = padding(hops);
            assert_eq!(padding.len(), 8 + 60 * (5 - hops));
            assert_eq!(a[LAST_COMMAND], b[LAST_COMMAND]);
            assert_ne!(a[padding.clone()], b[padding.clone()]);
            assert_eq!(a[padding.end..HEADER_LEN], b[padding.end..HEADER_LEN]);
        }
        assert_eq!(a[HEADER_LEN..], b[HEADER_LEN..], "payload");
    }
}

#[test]
fn a_seed_decides_a_packet_but_for_its_padding_and_macs() {
    for hops in 1..=5 {
        let network = Network::new(&mut network::rng(1), hops);
        let journeys = [(); 2].map(|()| {
            let packet = network.packet(&mut network::rng(2), 1024, b"hello");
            journey(&network, packet)
        });
        assert_same_but_for_padding(&journeys[0], &journeys[1]);
    }
}

#[test]
fn a_seed_decides_a_surb_but_for_its_padding_and_macs() {
    for hops in 1..=5 {
        let network = Network::new(&mut network::rng(1), hops);
        let [(one, first_recovery), (other, _)] =
            [(); 2].map(|()| network.surb(&mut network::rng(2)));
        // The first hop's address and the seed.
        assert_eq!(one.as_bytes()[HEADER_LEN..], other.as_bytes()[HEADER_LEN..]);
        let packets = use_surbs(1024, vec![(one, b"hello"), (other, b"hello")]);
        let [one, other] = <[_; 2]>::try_from(packets).unwrap().map(|used| used.unwrap().1);
        assert_same_but_for_padding(&journey(&network, one), &journey(&network, other.clone()));
        // What the creator keeps is the same: that of one opens the reply to the other.
        let payload = network.travel(other, |_, packet| packet);
        let reply = recover_replies(vec![(first_recovery, payload)]).remove(0);
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
