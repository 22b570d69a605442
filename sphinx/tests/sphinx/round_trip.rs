//! What is sent arrives, whatever the route, the payload and the plaintext.

use mixsocks_sphinx::{
    BuildError, HEADER_LEN, PayloadError, PeelError, Peeled, UseSurbError, build_packets, finish,
    max_plaintext, open_headers, recover_replies, use_surbs,
};
use proptest::prelude::*;

use crate::network::{self, Network, change};

fn payload_len_and_plaintext() -> impl Strategy<Value = (usize, Vec<u8>)> {
    prop::sample::select(vec![1024_usize, 2048, 16384]).prop_flat_map(|payload_len| {
        let max = max_plaintext(payload_len);
        let len = prop_oneof![1 => Just(0), 1 => Just(max), 6 => 0..=max];
        let plaintext = len.prop_flat_map(|len| prop::collection::vec(any::<u8>(), len));
        (Just(payload_len), plaintext)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_packet_arrives(
        seed: u64,
        hops in 1..=5_u8,
        (payload_len, plaintext) in payload_len_and_plaintext(),
    ) {
        let mut rng = network::rng(seed);
        let network = Network::new(&mut rng, hops);
        let packet = network.packet(&mut rng, payload_len, &plaintext);
        let payload = network.travel(packet, |_, packet| {
            assert_eq!(packet.as_bytes().len(), HEADER_LEN + payload_len);
            packet
        });
        prop_assert_eq!(payload.len(), payload_len);
        prop_assert_eq!(payload.into_plaintext().unwrap(), plaintext);
    }

    #[test]
    fn a_reply_arrives(
        seed: u64,
        hops in 1..=5_u8,
        (payload_len, plaintext) in payload_len_and_plaintext(),
    ) {
        let mut rng = network::rng(seed);
        let network = Network::new(&mut rng, hops);
        let (surb, recovery) = network.surb(&mut rng);
        prop_assert_eq!(surb.first_hop(), network.hops[0].address);
        prop_assert_eq!(recovery.identifier(), network::IDENTIFIER);
        let (first_hop, packet) =
            use_surbs(payload_len, vec![(surb, &plaintext)]).remove(0).unwrap();
        prop_assert_eq!(first_hop, network.hops[0].address);
        let payload = network.travel(packet, |_, packet| packet);
        let reply = recover_replies(vec![(recovery, payload)]).remove(0);
        prop_assert_eq!(reply.unwrap(), plaintext);
    }
}

#[test]
fn a_reply_means_nothing_without_its_recovery() {
    let mut rng = network::rng(1);
    let network = Network::new(&mut rng, 5);
    let mut payloads = Vec::new();
    let mut recoveries = Vec::new();
    for _ in 0..2 {
        let (surb, recovery) = network.surb(&mut rng);
        let (_, packet) = use_surbs(1024, vec![(surb, b"hello")]).remove(0).unwrap();
        payloads.push(network.travel(packet, |_, packet| packet));
        recoveries.push(recovery);
    }
    // Each with the other's recovery.
    recoveries.reverse();
    let requests = recoveries.into_iter().zip(payloads).collect();
    for reply in recover_replies(requests) {
        assert!(reply.is_err());
    }

    let (surb, _) = network.surb(&mut rng);
    let (_, packet) = use_surbs(1024, vec![(surb, b"hello")]).remove(0).unwrap();
    let payload = network.travel(packet, |_, packet| packet);
    assert_eq!(payload.into_plaintext(), Err(PayloadError::LeadingZeros));
}

#[test]
fn the_only_hop_of_a_surb_reads_the_reply() {
    let mut rng = network::rng(5);
    let network = Network::new(&mut rng, 1);
    let (surb, _) = network.surb(&mut rng);
    let (_, packet) = use_surbs(1024, vec![(surb, b"hello")]).remove(0).unwrap();
    let payload = network.travel(packet, |_, packet| packet);
    assert_eq!(payload.into_plaintext().unwrap(), b"hello");
}

#[test]
fn a_plaintext_that_is_too_long_is_refused() {
    let mut rng = network::rng(2);
    let network = Network::new(&mut rng, 5);
    for payload_len in [1024, 2048, 16384] {
        let max = max_plaintext(payload_len);
        let plaintext = vec![1; max + 1];
        let requests = [(network.route(), &plaintext[..])];
        assert_eq!(
            build_packets(&mut rng, payload_len, &requests).remove(0),
            Err(BuildError::PlaintextTooLong { len: max + 1, max })
        );
        let (surb, _) = network.surb(&mut rng);
        assert_eq!(
            use_surbs(payload_len, vec![(surb, &plaintext)]).remove(0),
            Err(UseSurbError::PlaintextTooLong { len: max + 1, max })
        );
    }
}

#[test]
fn packets_of_a_batch_do_not_disturb_each_other() {
    network::with_every_backend(|| {
        let mut rng = network::rng(3);
        let network = Network::new(&mut rng, 1);
        let good = |text: &[u8], rng: &mut _| network.packet(rng, 1024, text);
        let [first, second, third] = [b"one", b"two", b"six"].map(|text| good(text, &mut rng));
        let bad_mac = change(&second, |bytes| bytes[40] ^= 1);
        let low_order = change(&second, |bytes| bytes[..32].fill(0));
        let bad_payload = change(&second, |bytes| bytes[400] ^= 1);
        let wrong_version = {
            let routing = crate::forge::routing(crate::forge::FINAL, [0, 3, 9]);
            let group_element = *first.as_bytes().first_chunk().unwrap();
            crate::forge::packet(&network.keys[0], group_element, &routing)
        };

        let packets = vec![first, bad_mac, low_order, wrong_version, bad_payload, third];
        let mut opened = Vec::new();
        let mut refused = Vec::new();
        for result in open_headers(&network.keys[0], packets) {
            match result {
                Ok(packet) => opened.push(packet),
                Err(error) => refused.push(error),
            }
        }
        assert_eq!(refused, [PeelError::BadMac, PeelError::LowOrderPoint]);

        let outcomes: Vec<_> = finish(opened)
            .into_iter()
            .map(|peeled| match peeled {
                Ok(Peeled::Final { payload, .. }) => Ok(payload.into_plaintext().ok()),
                Ok(Peeled::Forward { .. }) => panic!("the only hop is the last"),
                Err(error) => Err(error),
            })
            .collect();
        assert_eq!(
            outcomes,
            [
                Ok(Some(b"one".to_vec())),
                Err(PeelError::UnknownVersion(777)),
                Ok(None),
                Ok(Some(b"six".to_vec())),
            ]
        );
    });
}

#[test]
fn empty_batches_are_fine() {
    network::with_every_backend(|| {
        let mut rng = network::rng(4);
        let network = Network::new(&mut rng, 1);
        assert!(build_packets(&mut rng, 1024, &[]).is_empty());
        assert!(open_headers(&network.keys[0], vec![]).is_empty());
        assert!(finish(vec![]).is_empty());
        assert!(use_surbs(1024, vec![]).is_empty());
        assert!(recover_replies(vec![]).is_empty());
    });
}
