//! Whoever changes a packet is noticed: a header by the next hop, a payload at the end.

use mixsocks_sphinx::{
    HEADER_LEN, Packet, PeelError, Peeled, finish, open_headers, open_payloads, recover_replies,
    use_surbs,
};
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

/// Places of one packet in a batch: alone, in the middle of vectors, left over.
const BATCHES: [(usize, usize); 4] = [(1, 0), (3, 1), (8, 5), (9, 8)];

/// The same packet `batch` times, with one bit of the one at `place` changed.
fn batch_with_flip(packet: &Packet, batch: usize, place: usize, bit: usize) -> Vec<Packet> {
    let mut packets = vec![packet.clone(); batch];
    packets[place] = change(packet, |bytes| flip(bytes, bit));
    packets
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_changed_bit_of_a_header_is_noticed_in_any_batch(
        backend in network::backend(),
        bit in 0..HEADER_LEN * 8,
        (batch, place) in prop::sample::select(&BATCHES[..]),
    ) {
        let mut rng = network::rng(5);
        let network = Network::new(&mut rng, 5);
        let packet = network.packet(&mut rng, 64, b"hello");
        let packets = batch_with_flip(&packet, batch, place, bit);
        let opened = backend.scope(|| open_headers(&network.keys[0], packets)).unwrap();
        for (i, opened) in opened.into_iter().enumerate() {
            let expected = if i == place && bit != IGNORED_BIT {
                Some(PeelError::BadMac)
            } else {
                None
            };
            prop_assert_eq!(opened.err(), expected);
        }
    }

    #[test]
    fn a_changed_bit_of_a_payload_is_noticed_in_any_batch(
        backend in network::backend(),
        bit in HEADER_LEN * 8..(HEADER_LEN + 300) * 8,
        (batch, place) in prop::sample::select(&BATCHES[..]),
    ) {
        let mut rng = network::rng(6);
        let network = Network::new(&mut rng, 2);
        let packet = network.packet(&mut rng, 300, b"hello");
        let packets = batch_with_flip(&packet, batch, place, bit);
        let texts = backend.scope(|| {
            let mut payloads = Vec::new();
            let mut packets = packets;
            for key in &network.keys {
                let opened = open_headers(key, std::mem::take(&mut packets));
                let opened = opened.into_iter().map(Result::unwrap).collect();
                for peeled in finish(opened) {
                    match peeled.unwrap() {
                        Peeled::Forward { packet, .. } => packets.push(packet),
                        Peeled::Final { payload, .. } => payloads.push(payload),
                    }
                }
            }
            open_payloads(payloads)
        });
        let texts = texts.unwrap();
        prop_assert_eq!(texts.len(), batch);
        for (i, text) in texts.into_iter().enumerate() {
            match i == place {
                true => prop_assert!(text.is_err()),
                false => prop_assert_eq!(text.unwrap(), b"hello"),
            }
        }
    }

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
