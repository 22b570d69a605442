//! Sphinx packets, SURBs and replies: at a hop with a known key, from nothing and from valid ones.

#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mixsocks_fuzz::Edits;
use mixsocks_sphinx::{
    Hop, Packet, Peeled, ReplyRecovery, Route, SURB_LEN, SecretKey, Surb, build_packets,
    build_surbs, finish, max_plaintext, open_headers, recover_replies, use_surbs,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Short payloads: longer ones cost time and have no other code.
const PAYLOAD_BYTES: usize = 64;
const DESTINATION: [u8; 32] = [7; 32];
const IDENTIFIER: [u8; 16] = [8; 16];
const PLAINTEXT: &[u8] = b"plaintext";

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    /// Bytes as they come.
    Packet(&'a [u8]),
    /// One of the good packets, with changes.
    ChangedPacket { packet: u8, edits: Edits<'a> },
    /// A SURB as it comes.
    Surb { surb: &'a [u8], plaintext: &'a [u8] },
    /// A good SURB, and a reply that is changed on the way.
    ChangedReply { hops: u8, plaintext: &'a [u8], edits: Edits<'a> },
}

static KEY: LazyLock<SecretKey> = LazyLock::new(|| SecretKey::from_bytes([3; 32]));

/// One for each length of a route.
static PACKETS: LazyLock<Vec<Packet>> = LazyLock::new(|| {
    let hops = 0..u8::try_from(mixsocks_sphinx::MAX_HOPS).expect("a few");
    let requests: Vec<_> = hops.map(|hops| (route(hops), PLAINTEXT)).collect();
    let packets = build_packets(&mut rng(), PAYLOAD_BYTES, &requests);
    packets.into_iter().map(|packet| packet.expect("route and plaintext are good")).collect()
});

fuzz_target!(|input: Input<'_>| match input {
    Input::Packet(bytes) => {
        peel(bytes.to_vec());
        // Nearly all bytes have another length: they shall be packets as well.
        let mut bytes = bytes.to_vec();
        bytes.resize(mixsocks_sphinx::HEADER_LEN + PAYLOAD_BYTES, 9);
        peel(bytes);
    }
    Input::ChangedPacket { packet, edits } => {
        let packet = &PACKETS[usize::from(packet) % PACKETS.len()];
        let mut bytes = packet.as_bytes().to_vec();
        edits.apply(&mut bytes);
        let is_changed = bytes != packet.as_bytes();
        let end = travel(bytes);
        if !is_changed {
            let Some(Peeled::Final { destination, identifier, payload }) = end else {
                panic!("a good packet has not arrived");
            };
            assert_eq!((destination, identifier), (DESTINATION, IDENTIFIER));
            assert_eq!(payload.into_plaintext().as_deref(), Ok(PLAINTEXT));
        }
    }
    Input::Surb { surb, plaintext } => {
        let mut bytes = [9; SURB_LEN];
        let len = surb.len().min(SURB_LEN);
        bytes[..len].copy_from_slice(&surb[..len]);
        if let Ok(surb) = Surb::from_bytes(&bytes) {
            assert_eq!(surb.as_bytes(), &bytes);
            let (_, packet) = use_surbs(PAYLOAD_BYTES, vec![(surb, fitting(plaintext))])
                .remove(0)
                .expect("the plaintext fits");
            travel(packet.into_bytes());
        }
    }
    Input::ChangedReply { hops, plaintext, edits } => {
        let plaintext = fitting(plaintext);
        let (surb, recovery) = surb(hops);
        let (_, packet) = use_surbs(PAYLOAD_BYTES, vec![(surb, plaintext)])
            .remove(0)
            .expect("the plaintext fits");
        let mut bytes = packet.as_bytes().to_vec();
        edits.apply(&mut bytes);
        let is_changed = bytes != packet.as_bytes();
        if let Some(Peeled::Final { payload, .. }) = travel(bytes) {
            let reply = recover_replies(vec![(recovery, payload)]).remove(0);
            assert!(is_changed || reply.as_deref() == Ok(plaintext));
        } else {
            assert!(is_changed, "a good reply has not arrived");
        }
    }
});

fn rng() -> StdRng {
    StdRng::seed_from_u64(1)
}

fn fitting(plaintext: &[u8]) -> &[u8] {
    &plaintext[..plaintext.len().min(max_plaintext(PAYLOAD_BYTES))]
}

/// A route of 1 to 5 hops, all with the one key.
fn route(hops: u8) -> Route {
    let delay = Duration::from_millis(1);
    let hop = Hop { address: [5; 32], key: KEY.public_key(), delay };
    let hops = vec![hop; 1 + usize::from(hops) % mixsocks_sphinx::MAX_HOPS];
    Route::new(&hops, DESTINATION, IDENTIFIER).expect("1 to 5 hops")
}

fn surb(hops: u8) -> (Surb, ReplyRecovery) {
    build_surbs(&mut rng(), &[route(hops)]).remove(0).expect("the identifier is not zero")
}

fn peel(bytes: Vec<u8>) -> Option<Peeled> {
    let packet = Packet::from_bytes(bytes, PAYLOAD_BYTES).ok()?;
    let opened = open_headers(&KEY, vec![packet]).remove(0).ok()?;
    finish(vec![opened]).remove(0).ok()
}

/// Over all hops, to what the last one finds.
fn travel(mut bytes: Vec<u8>) -> Option<Peeled> {
    for _ in 0..mixsocks_sphinx::MAX_HOPS {
        match peel(bytes)? {
            Peeled::Forward { packet, .. } => bytes = packet.into_bytes(),
            last @ Peeled::Final { .. } => return Some(last),
        }
    }
    panic!("a packet for more hops than there is room for");
}
