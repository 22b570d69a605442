//! Packets, SURBs and replies of ours and of the crate `sphinx-packet`, taken along routes by both.

use mixsocks_sphinx::{
    Backend, HEADER_LEN, Packet, Peeled, Route, SURB_LEN, Surb, build_packets, build_surbs, finish,
    max_plaintext, open_headers, open_payloads, recover_replies, use_surbs,
};
use proptest::prelude::*;
use rand::Rng;
use rand::rngs::StdRng;
use sphinx_packet::header::delays::Delay;
use sphinx_packet::packet::builder::SphinxPacketBuilder;
use sphinx_packet::route::{Destination, DestinationAddressBytes, Node, NodeAddressBytes};
use sphinx_packet::version::SINGLE_SEED_SURB_VERSION;
use sphinx_packet::{ProcessedPacketData, SURB, SURBMaterial, SphinxPacket, SurbReplyRecovery};
use x25519_dalek::StaticSecret;

use crate::network::{self, DESTINATION, IDENTIFIER, Network};

/// Packets and payloads at every size that matters: the shortest, the usual, and any in between.
fn payload_len() -> impl Strategy<Value = usize> {
    prop_oneof![
        1 => Just(33),
        4 => 33..=700_usize,
        4 => prop::sample::select(vec![1024_usize, 2048, 4096]),
        1 => prop::sample::select(vec![16384_usize, 32768]),
    ]
}

struct Reference {
    route: Vec<Node>,
    delays: Vec<Delay>,
    destination: Destination,
}

impl Reference {
    fn new(network: &Network) -> Self {
        let node = |hop: &mixsocks_sphinx::Hop| {
            Node::new(NodeAddressBytes::from_bytes(hop.address), (*hop.key.as_bytes()).into())
        };
        Self {
            route: network.hops.iter().map(node).collect(),
            delays: network
                .hops
                .iter()
                .map(|hop| Delay::new_from_nanos(u64::try_from(hop.delay.as_nanos()).unwrap()))
                .collect(),
            destination: Destination::new(
                DestinationAddressBytes::from_bytes(DESTINATION),
                IDENTIFIER,
            ),
        }
    }

    fn packet(&self, secret: [u8; 32], payload_len: usize, plaintext: &[u8]) -> Packet {
        let packet = SphinxPacketBuilder::new()
            .with_version(SINGLE_SEED_SURB_VERSION)
            .with_payload_size(payload_len)
            .with_initial_secret(&StaticSecret::from(secret))
            .build_packet(plaintext, &self.route, &self.destination, &self.delays)
            .unwrap();
        Packet::from_bytes(packet.to_bytes(), payload_len).unwrap()
    }

    fn surb(&self, secret: [u8; 32]) -> (SURB, SurbReplyRecovery) {
        let material = SURBMaterial::new(
            self.route.clone(),
            self.delays.clone(),
            self.destination.clone(),
            SINGLE_SEED_SURB_VERSION,
        );
        SURB::new_recoverable(secret.into(), material).unwrap()
    }
}

/// What the last hop has: our payload, and the same of the other crate.
type Arrived = (mixsocks_sphinx::Payload, sphinx_packet::payload::Payload);

/// Takes packets along the route in one batch, every hop peeling each of them twice.
fn travel(network: &Network, mut packets: Vec<Packet>) -> Vec<Arrived> {
    let mut arrived = Vec::new();
    for key in &network.keys {
        let theirs = packets.iter().map(|packet| {
            let packet = SphinxPacket::from_bytes(packet.as_bytes()).unwrap();
            packet.process(&StaticSecret::from(*key.to_bytes())).unwrap().data
        });
        let theirs: Vec<_> = theirs.collect();
        let opened = open_headers(key, packets).into_iter().map(Result::unwrap).collect();
        packets = Vec::new();
        for (ours, theirs) in finish(opened).into_iter().zip(theirs) {
            match (ours.unwrap(), theirs) {
                (
                    Peeled::Forward { next_hop, delay, packet },
                    ProcessedPacketData::ForwardHop {
                        next_hop_packet,
                        next_hop_address,
                        delay: their_delay,
                    },
                ) => {
                    assert_eq!(next_hop, next_hop_address.to_bytes());
                    assert_eq!(delay, their_delay.to_duration());
                    assert!(packet.as_bytes() == next_hop_packet.to_bytes());
                    packets.push(packet);
                }
                (
                    Peeled::Final { destination, identifier, payload },
                    ProcessedPacketData::FinalHop {
                        destination: their_destination,
                        identifier: their_identifier,
                        payload: their_payload,
                    },
                ) => {
                    assert_eq!(destination, their_destination.as_bytes());
                    assert_eq!(identifier, their_identifier);
                    arrived.push((payload, their_payload));
                }
                _ => panic!("one forwards what the other keeps"),
            }
        }
    }
    arrived
}

fn secrets(rng: &mut StdRng, count: usize) -> Vec<[u8; 32]> {
    let mut secrets = vec![[0; 32]; count];
    secrets.iter_mut().for_each(|secret| rng.fill_bytes(secret));
    secrets
}

fn random(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

proptest! {
    // With batches of 1 to 12, about 5,000 packets each.
    #![proptest_config(ProptestConfig::with_cases(384))]

    #[test]
    fn packets_of_both_are_the_same_to_both(
        seed: u64,
        backend in network::backend(),
        hops in 1..=5_u8,
        payload_len in payload_len(),
        used in 0.0..=1.0_f64,
        batch in 1..=12_usize,
    ) {
        backend.scope(|| {
        let mut rng = network::rng(seed);
        let network = Network::new(&mut rng, hops);
        let reference = Reference::new(&network);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction")]
        let len = (max_plaintext(payload_len) as f64 * used) as usize;
        let plaintexts: Vec<_> = (0..batch).map(|_| random(&mut rng, len)).collect();

        let secrets = secrets(&mut network::rng(!seed), batch);
        let requests: Vec<_> =
            plaintexts.iter().map(|plaintext| (network.route(), &plaintext[..])).collect();
        let ours = build_packets(&mut network::rng(!seed), payload_len, &requests).into_iter().map(Result::unwrap);
        let mut packets: Vec<_> = ours.collect();
        // The padding inside the header is random for one and derived for the other.
        for ((ours, secret), plaintext) in packets.clone().iter().zip(secrets).zip(&plaintexts) {
            let theirs = reference.packet(secret, payload_len, plaintext);
            prop_assert_eq!(&ours.as_bytes()[..32], &theirs.as_bytes()[..32]);
            prop_assert!(ours.as_bytes()[HEADER_LEN..] == theirs.as_bytes()[HEADER_LEN..]);
            packets.push(theirs);
        }
        let (ours, theirs): (Vec<_>, Vec<_>) = travel(&network, packets).into_iter().unzip();
        let plaintexts = plaintexts.iter().chain(&plaintexts);
        for ((ours, theirs), plaintext) in open_payloads(ours).into_iter().zip(theirs).zip(plaintexts) {
            prop_assert!(ours.unwrap() == *plaintext);
            prop_assert!(theirs.recover_plaintext().unwrap() == *plaintext);
        }
            Ok(())
        }).unwrap()?;
    }

    #[test]
    fn replies_on_surbs_of_both_are_the_same_to_both(
        seed: u64,
        backend in network::backend(),
        hops in 1..=5_u8,
        payload_len in payload_len(),
        batch in 1..=12_usize,
    ) {
        backend.scope(|| {
        let mut rng = network::rng(seed);
        let network = Network::new(&mut rng, hops);
        let reference = Reference::new(&network);
        let plaintext = random(&mut rng, max_plaintext(payload_len));

        let secrets = secrets(&mut network::rng(!seed), batch);
        let routes = vec![network.route(); batch];
        let mut packets = Vec::new();
        let mut recoveries = Vec::new();
        for (ours, secret) in build_surbs(&mut network::rng(!seed), &routes).into_iter().zip(secrets) {
            let (ours, our_recovery) = ours.unwrap();
            let (theirs, their_recovery) = reference.surb(secret);
            let their_bytes: [u8; SURB_LEN] = theirs.to_bytes().try_into().unwrap();
            prop_assert_eq!(&ours.as_bytes()[..32], &their_bytes[..32]);
            prop_assert_eq!(&ours.as_bytes()[HEADER_LEN..], &their_bytes[HEADER_LEN..]);
            // Ours used by the other crate, and theirs by ours.
            let (packet, _) =
                SURB::from_bytes(ours.as_bytes()).unwrap().use_surb(&plaintext, payload_len).unwrap();
            packets.push(Packet::from_bytes(packet.to_bytes(), payload_len).unwrap());
            let theirs = Surb::from_bytes(&their_bytes).unwrap();
            packets.push(use_surbs(payload_len, vec![(theirs, &plaintext)]).remove(0).unwrap().1);
            recoveries.push((our_recovery, their_recovery));
        }
        // Both replies of a pair come of the same secret, so either recovery opens either of them.
        let mut payloads = travel(&network, packets).into_iter();
        let mut requests = Vec::new();
        for (our_recovery, their_recovery) in recoveries {
            let (ours, theirs) = payloads.next().unwrap();
            requests.push((our_recovery, ours));
            prop_assert!(their_recovery.recover_plaintext(theirs).unwrap() == plaintext);
            let (_, theirs) = payloads.next().unwrap();
            prop_assert!(their_recovery.recover_plaintext(theirs).unwrap() == plaintext);
        }
        for reply in recover_replies(requests) {
            prop_assert!(reply.unwrap() == plaintext);
        }
            Ok(())
        }).unwrap()?;
    }
}

#[test]
fn a_batch_of_many_routes_and_lengths_is_opened_as_one_by_one() {
    let mut rng = network::rng(9);
    let networks: Vec<_> = (1..=5).map(|hops| Network::new(&mut rng, hops)).collect();
    let mut requests = Vec::new();
    let mut expected = Vec::new();
    for payload_len in [64, 2048, 33, 2048, 2048] {
        for network in &networks {
            let plaintext = random(&mut rng, max_plaintext(payload_len));
            let (surb, recovery) = network.surb(&mut rng);
            let (_, packet) = use_surbs(payload_len, vec![(surb, &plaintext)]).remove(0).unwrap();
            requests.push((recovery, network.travel(packet, |_, packet| packet)));
            expected.push(plaintext);
        }
    }
    let replies: Vec<_> = recover_replies(requests).into_iter().map(Result::unwrap).collect();
    assert!(replies == expected);
}

#[test]
fn routes_of_all_lengths_share_a_batch() {
    let mut rng = network::rng(10);
    let networks: Vec<_> =
        [5, 1, 3, 2, 4, 5, 1, 1, 5, 2].map(|hops| Network::new(&mut rng, hops)).into();
    let requests: Vec<_> =
        networks.iter().map(|network| (network.route(), &b"hello"[..])).collect();
    let packets = build_packets(&mut rng, 64, &requests);
    for (network, packet) in networks.iter().zip(packets) {
        let payload = network.travel(packet.unwrap(), |_, packet| packet);
        assert_eq!(payload.into_plaintext().unwrap(), b"hello");
    }
}

/// Packets that are no replies have it, and SURBs of the other crate must not.
#[test]
fn an_identifier_of_zeros_is_carried_by_every_backend() {
    let mut rng = network::rng(11);
    let network = Network::new(&mut rng, 5);
    let route = Route::new(&network.hops, DESTINATION, [0; 16]).unwrap();
    for backend in Backend::available() {
        let build = || build_packets(&mut rng, 64, &[(route.clone(), b"hello")]).remove(0);
        let mut packet = backend.scope(build).unwrap().unwrap();
        for key in &network.keys {
            let opened = open_headers(key, vec![packet]).remove(0).unwrap();
            match finish(vec![opened]).remove(0).unwrap() {
                Peeled::Forward { packet: next, .. } => packet = next,
                Peeled::Final { identifier, payload, .. } => {
                    assert_eq!(identifier, [0; 16]);
                    assert_eq!(payload.into_plaintext().unwrap(), b"hello", "{backend}");
                    break;
                }
            }
        }
    }
}
