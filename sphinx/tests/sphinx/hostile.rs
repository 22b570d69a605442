//! Packets of hostile senders, and packets that somebody writes in another way.

use std::time::Duration;

use curve25519_dalek::constants::EIGHT_TORSION;
use curve25519_dalek::montgomery::MontgomeryPoint;
use mixsocks_sphinx::{
    HEADER_LEN, KeyError, Packet, PeelError, Peeled, PublicKey, ReplayTag, SURB_LEN, SecretKey,
    Surb, open_headers, recover_replies, use_surbs,
};
use proptest::prelude::*;
use sphinx_packet::header::delays::Delay;
use sphinx_packet::route::{Destination, DestinationAddressBytes, Node, NodeAddressBytes};
use sphinx_packet::version::{KNOWN_VERSIONS, PAYLOAD_KEYS_SEEDS_VERSION, Version};
use sphinx_packet::{SURB, SURBMaterial, SphinxPacketBuilder};
use x25519_dalek::StaticSecret;

use crate::forge::{self, FINAL, FORWARD, ROUTING_LEN};
use crate::network::{self, IDENTIFIER, Network, change, peel};

fn tag(key: &SecretKey, packet: Packet) -> ReplayTag {
    open_headers(key, vec![packet]).remove(0).unwrap().replay_tag()
}

/// The group element of nobody in particular.
fn group_element() -> [u8; 32] {
    *SecretKey::from_bytes([5; 32]).public_key().as_bytes()
}

fn node(key: &PublicKey) -> Node {
    Node::new(NodeAddressBytes::from_bytes([1; 32]), x25519_dalek::PublicKey::from(*key.as_bytes()))
}

fn destination() -> Destination {
    Destination::new(DestinationAddressBytes::from_bytes([2; 32]), IDENTIFIER)
}

#[test]
fn an_odd_first_byte_of_the_version_does_not_panic() {
    network::with_every_backend(|| {
        let key = SecretKey::from_bytes([3; 32]);
        for first in 1..=u8::MAX {
            let packet =
                forge::packet(&key, group_element(), &forge::routing(FINAL, [first, 1, 4]));
            assert!(matches!(peel(&key, packet), Ok(Peeled::Final { .. })));
            let packet =
                forge::packet(&key, group_element(), &forge::routing(FORWARD, [first, 3, 9]));
            assert_eq!(peel(&key, packet).unwrap_err(), PeelError::UnknownVersion(777));
        }
    });
}

#[test]
fn every_version_but_260_is_refused() {
    network::with_every_backend(|| {
        let key = SecretKey::from_bytes([3; 32]);
        for version in 0..=u16::MAX {
            // All of them near the known ones, some of the others.
            if version > 1024 && version % 251 != 0 {
                continue;
            }
            let [high, low] = version.to_be_bytes();
            for flag in [FORWARD, FINAL] {
                let packet =
                    forge::packet(&key, group_element(), &forge::routing(flag, [0, high, low]));
                match peel(&key, packet) {
                    Ok(_) => assert_eq!(version, 260),
                    Err(error) => assert_eq!(error, PeelError::UnknownVersion(version)),
                }
            }
        }
    });
}

#[test]
fn versions_of_other_builders_are_refused_at_the_first_hop() {
    let network = Network::new(&mut network::rng(1), 3);
    let nodes: Vec<_> = network.hops.iter().map(|hop| node(&hop.key)).collect();
    for version in KNOWN_VERSIONS.iter().copied().chain([Version::new(777)]) {
        let packet = SphinxPacketBuilder::new()
            .with_version(version)
            .with_initial_secret(&StaticSecret::from([5; 32]))
            .build_packet(b"hello", &nodes, &destination(), &[Delay::new_from_nanos(1); 3])
            .unwrap();
        let packet = Packet::from_bytes(packet.to_bytes(), 1024).unwrap();
        match peel(&network.keys[0], packet) {
            Ok(_) => assert_eq!(version.value(), 260),
            Err(error) => assert_eq!(error, PeelError::UnknownVersion(version.value())),
        }
    }
}

#[test]
fn unknown_flags_are_refused() {
    network::with_every_backend(|| {
        let key = SecretKey::from_bytes([3; 32]);
        for flag in (0..=u8::MAX).filter(|flag| ![FORWARD, FINAL].contains(flag)) {
            let packet = forge::packet(&key, group_element(), &forge::routing(flag, [0, 1, 4]));
            assert_eq!(peel(&key, packet).unwrap_err(), PeelError::BadRouting);
        }
    });
}

#[test]
fn the_longest_delay_is_reported_as_it_is() {
    network::with_every_backend(|| {
        let key = SecretKey::from_bytes([3; 32]);
        let mut routing = forge::routing(FORWARD, [0, 1, 4]);
        routing[36..44].fill(0xff);
        let peeled = peel(&key, forge::packet(&key, group_element(), &routing)).unwrap();
        let Peeled::Forward { delay, .. } = peeled else {
            panic!("not a forward hop");
        };
        assert_eq!(delay, Duration::from_nanos(u64::MAX));
    });
}

/// Every encoding of a point of low order, with either top bit.
fn low_order_points() -> Vec<[u8; 32]> {
    let mut points: Vec<_> =
        EIGHT_TORSION.iter().map(|point| point.to_montgomery().to_bytes()).collect();
    // −1, 0 and 1 near p.
    points.extend([0xec, 0xed, 0xee].map(encoding_near_p));
    let with_top_bit = points.clone().into_iter().map(|mut point| {
        point[31] |= 0x80;
        point
    });
    points.extend(with_top_bit.collect::<Vec<_>>());
    points
}

#[test]
fn group_elements_of_low_order_are_refused_even_with_a_valid_mac() {
    network::with_every_backend(|| {
        let key = SecretKey::from_bytes([3; 32]);
        let routing = forge::routing(FINAL, [0, 1, 4]);
        let good = forge::packet(&key, group_element(), &routing);
        let mut batch = vec![good.clone()];
        for point in low_order_points() {
            let packet = forge::packet(&key, point, &routing);
            assert_eq!(
                open_headers(&key, vec![packet.clone()]).remove(0).unwrap_err(),
                PeelError::LowOrderPoint
            );
            batch.push(packet);
        }
        batch.push(good);
        // All of them among good ones.
        let last = batch.len() - 1;
        for (i, opened) in open_headers(&key, batch).into_iter().enumerate() {
            match i == 0 || i == last {
                true => assert!(opened.is_ok()),
                false => assert_eq!(opened.unwrap_err(), PeelError::LowOrderPoint),
            }
        }
    });
}

/// So nothing can be built for such a key, by whatever backend.
#[test]
fn keys_of_low_order_do_not_exist() {
    network::with_every_backend(|| {
        for point in low_order_points() {
            assert_eq!(PublicKey::from_bytes(point), Err(KeyError::LowOrderPoint));
        }
    });
}

/// The number `p − 0xed + low`.
fn encoding_near_p(low: u8) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] = low;
    bytes[31] = 0x7f;
    bytes
}

#[test]
fn the_top_bit_of_the_group_element_does_not_hide_a_replay() {
    network::with_every_backend(|| {
        let mut rng = network::rng(2);
        let network = Network::new(&mut rng, 5);
        let packet = network.packet(&mut rng, 1024, b"hello");
        let flipped = change(&packet, |bytes| bytes[31] ^= 0x80);
        assert_ne!(packet, flipped);
        let first = &network.keys[0];
        assert_eq!(tag(first, packet.clone()), tag(first, flipped.clone()));

        let [one, other] = [packet, flipped].map(|packet| match peel(first, packet).unwrap() {
            Peeled::Forward { packet, .. } => packet,
            Peeled::Final { .. } => panic!("the first hop of five is not the last"),
        });
        assert_eq!(one, other);
    });
}

#[test]
fn other_encodings_of_the_group_element_do_not_hide_a_replay() {
    network::with_every_backend(|| {
        let key = SecretKey::from_bytes([3; 32]);
        let routing = forge::routing(FORWARD, [0, 1, 4]);
        // 0 and 1 are of low order; 2 to 18 have a second encoding below 2^255.
        for number in 2..=18 {
            let mut canonical = [0; 32];
            canonical[0] = number;
            let packet = forge::packet(&key, canonical, &routing);
            let expected = tag(&key, packet.clone());
            for (encoding, top_bit) in [
                (canonical, 0x80),
                (encoding_near_p(0xed + number), 0),
                (encoding_near_p(0xed + number), 0x80),
            ] {
                let rewritten = change(&packet, |bytes| {
                    bytes[..32].copy_from_slice(&encoding);
                    bytes[31] |= top_bit;
                });
                assert_ne!(packet, rewritten);
                assert_eq!(tag(&key, rewritten), expected);
            }
        }
    });
}

#[test]
fn adding_a_point_of_low_order_does_not_hide_a_replay() {
    network::with_every_backend(|| {
        let mut rng = network::rng(3);
        let network = Network::new(&mut rng, 2);
        let packet = network.packet(&mut rng, 1024, b"hello");
        let expected = tag(&network.keys[0], packet.clone());
        let group_element = MontgomeryPoint(*packet.as_bytes().first_chunk().unwrap());
        let point = group_element.to_edwards(0).unwrap();
        for low_order in EIGHT_TORSION {
            let sum = (point + low_order).to_montgomery();
            let rewritten = change(&packet, |bytes| {
                bytes[..32].copy_from_slice(sum.as_bytes());
            });
            assert_eq!(tag(&network.keys[0], rewritten), expected);
        }
    });
}

#[test]
fn tags_differ_between_packets_and_between_hops() {
    let mut rng = network::rng(4);
    let network = Network::new(&mut rng, 5);
    let mut tags = std::collections::HashSet::new();
    for _ in 0..8 {
        let packet = network.packet(&mut rng, 1024, b"hello");
        network.travel(packet, |hop, packet| {
            assert!(tags.insert(tag(&network.keys[hop], packet.clone())));
            packet
        });
    }
    assert_eq!(tags.len(), 40);
}

#[test]
fn an_opened_packet_shows_nothing() {
    let mut rng = network::rng(5);
    let network = Network::new(&mut rng, 1);
    let packet = network.packet(&mut rng, 1024, b"hello");
    let opened = open_headers(&network.keys[0], vec![packet]).remove(0);
    assert_eq!(format!("{:?}", opened.unwrap()), "OpenedPacket { .. }");
}

#[test]
fn a_peeled_packet_shows_neither_its_next_hop_nor_its_delay() {
    let mut rng = network::rng(5);
    let network = Network::new(&mut rng, 2);
    let packet = network.packet(&mut rng, 1024, b"hello");
    let forward = peel(&network.keys[0], packet).unwrap();
    assert_eq!(format!("{forward:?}"), "Forward { .. }");
    let Peeled::Forward { packet, .. } = forward else { panic!("the first hop of two") };
    let last = peel(&network.keys[1], packet).unwrap();
    assert_eq!(format!("{last:?}"), "Final { .. }");
}

#[test]
fn a_surb_of_another_version_has_another_length_or_is_refused_by_the_hop() {
    let key = SecretKey::from_bytes([3; 32]);
    let surb = |hops: usize| {
        let material = SURBMaterial::new(
            vec![node(&key.public_key()); hops],
            vec![Delay::new_from_nanos(1); hops],
            destination(),
            PAYLOAD_KEYS_SEEDS_VERSION,
        );
        SURB::new(StaticSecret::from([5; 32]), material).unwrap().to_bytes()
    };
    for hops in 2..=5 {
        let bytes = surb(hops);
        assert_eq!(bytes.len(), SURB_LEN + 16 * (hops - 1));
        assert!(<&[u8; SURB_LEN]>::try_from(&bytes[..]).is_err());
    }
    // One of a single hop has the same length, and only the hop can read the version.
    let surb = Surb::from_bytes(&surb(1).try_into().unwrap()).unwrap();
    let (_, packet) = use_surbs(1024, vec![(surb, b"hello")]).remove(0).unwrap();
    assert_eq!(peel(&key, packet).unwrap_err(), PeelError::UnknownVersion(259));
}

proptest! {
    #[test]
    fn arbitrary_packets_do_not_panic(
        header in prop::collection::vec(any::<u8>(), HEADER_LEN),
        payload in prop::collection::vec(any::<u8>(), 33..200),
    ) {
        let key = SecretKey::from_bytes([3; 32]);
        let payload_len = payload.len();
        let packet = Packet::from_bytes([header, payload].concat(), payload_len).unwrap();
        prop_assert_eq!(peel(&key, packet).unwrap_err(), PeelError::BadMac);
    }

    #[test]
    fn arbitrary_lengths_do_not_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..1000),
        payload_len in prop_oneof![0..1000_usize, Just(usize::MAX)],
    ) {
        let key = SecretKey::from_bytes([3; 32]);
        if let Ok(packet) = Packet::from_bytes(bytes, payload_len) {
            let _ = peel(&key, packet);
        }
    }

    #[test]
    fn arbitrary_routing_information_with_a_valid_mac_does_not_panic(
        flag in prop_oneof![Just(FORWARD), Just(FINAL), any::<u8>()],
        version in prop_oneof![Just([0, 1, 4]), any::<[u8; 3]>()],
        rest in prop::collection::vec(any::<u8>(), ROUTING_LEN - 4),
    ) {
        let key = SecretKey::from_bytes([3; 32]);
        let mut routing = forge::routing(flag, version);
        routing[4..].copy_from_slice(&rest);
        match peel(&key, forge::packet(&key, group_element(), &routing)) {
            Ok(Peeled::Forward { next_hop, .. }) => {
                prop_assert_eq!(flag, FORWARD);
                prop_assert_eq!(&next_hop[..], &rest[..32]);
            }
            Ok(Peeled::Final { destination, identifier, payload }) => {
                prop_assert_eq!(flag, FINAL);
                prop_assert_eq!(&destination[..], &rest[..32]);
                prop_assert_eq!(&identifier[..], &rest[32..48]);
                prop_assert!(payload.into_plaintext().is_err());
            }
            Err(PeelError::UnknownVersion(_)) => prop_assert_ne!(version[1..].to_vec(), [1, 4]),
            Err(error) => {
                prop_assert_eq!(error, PeelError::BadRouting);
                prop_assert!(![FORWARD, FINAL].contains(&flag));
            }
        }
    }

    #[test]
    fn arbitrary_surbs_do_not_panic(
        bytes in prop::collection::vec(any::<u8>(), SURB_LEN),
        payload_len in 0..300_usize,
        plaintext in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let bytes: [u8; SURB_LEN] = bytes.try_into().unwrap();
        let surb = Surb::from_bytes(&bytes).unwrap();
        let used = use_surbs(payload_len, vec![(surb, &plaintext)]).remove(0);
        let fits = payload_len >= 33 && plaintext.len() + 17 <= payload_len;
        prop_assert_eq!(used.is_ok(), fits);
        if let Ok((first_hop, packet)) = used {
            prop_assert_eq!(&first_hop[..], &bytes[HEADER_LEN..HEADER_LEN + 32]);
            prop_assert_eq!(&packet.as_bytes()[..HEADER_LEN], &bytes[..HEADER_LEN]);
        }
    }

    #[test]
    fn a_packet_in_place_of_a_reply_is_not_opened(
        hops in 2..=5_u8,
        plaintext in prop::collection::vec(any::<u8>(), 0..47),
    ) {
        let mut rng = network::rng(6);
        let network = Network::new(&mut rng, hops);
        let (_, recovery) = network.surb(&mut rng);
        let packet = network.packet(&mut rng, 64, &plaintext);
        let payload = network.travel(packet, |_, packet| packet);
        prop_assert!(recover_replies(vec![(recovery, payload)])[0].is_err());
    }
}
