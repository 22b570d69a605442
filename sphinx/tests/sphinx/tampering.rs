//! Whoever changes a packet is noticed: a header by the next hop, a payload at the end.

use mixsocks_sphinx::{HEADER_LEN, PeelError, open_headers, recover_replies, use_surbs};
use proptest::prelude::*;

use crate::network::{self, Network, change, peel};

/// The top bit of the group element, which X25519 ignores.
const IGNORED_BIT: usize = 255;

fn flip(bytes: &mut [u8], bit: usize) {
    bytes[bit / 8] ^= 1 << (bit % 8);
}

#[test]
fn each_bit_of_the_header_is_protected() {
    network::with_every_backend(|| {
        let mut rng = network::rng(1);
        let network = Network::new(&mut rng, 5);
        let packet = network.packet(&mut rng, 64, b"hello");
        let packets =
            (0..HEADER_LEN * 8).map(|bit| change(&packet, |bytes| flip(bytes, bit))).collect();
        let opened = open_headers(&network.keys[0], packets);
        for (bit, result) in opened.into_iter().enumerate() {
            match result {
                Ok(_) => assert_eq!(bit, IGNORED_BIT),
                Err(error) => assert_eq!(error, PeelError::BadMac, "bit {bit}"),
            }
        }
    });
}

#[test]
fn a_packet_for_another_hop_is_refused() {
    network::with_every_backend(|| {
        let mut rng = network::rng(2);
        let network = Network::new(&mut rng, 2);
        let packet = network.packet(&mut rng, 64, b"hello");
        assert_eq!(peel(&network.keys[1], packet).unwrap_err(), PeelError::BadMac);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_changed_payload_of_a_packet_is_noticed_by_the_last_hop(
        hop in 0..5_usize,
        bit in HEADER_LEN * 8..(HEADER_LEN + 1024) * 8,
    ) {
        let mut rng = network::rng(3);
        let network = Network::new(&mut rng, 5);
        let packet = network.packet(&mut rng, 1024, b"hello");
        let payload = network.travel(packet, |i, packet| {
            if i == hop { change(&packet, |bytes| flip(bytes, bit)) } else { packet }
        });
        prop_assert!(payload.into_plaintext().is_err());
    }

    #[test]
    fn a_changed_payload_of_a_reply_is_noticed_by_its_creator(
        hop in 0..5_usize,
        bit in HEADER_LEN * 8..(HEADER_LEN + 1024) * 8,
    ) {
        let mut rng = network::rng(4);
        let network = Network::new(&mut rng, 5);
        let (surb, recovery) = network.surb(&mut rng);
        let (_, packet) = use_surbs(1024, vec![(surb, b"hello")]).remove(0).unwrap();
        let payload = network.travel(packet, |i, packet| {
            if i == hop { change(&packet, |bytes| flip(bytes, bit)) } else { packet }
        });
        prop_assert!(recover_replies(vec![(recovery, payload)])[0].is_err());
    }
}
