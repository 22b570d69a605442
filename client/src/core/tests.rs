//! Sessions, providers and SURBs of a client, without a network.

use mixsocks_common::session::frame::{Frame, take_varint};
use mixsocks_common::session::{ACCESS_TOKEN_LEN, OpenOutcome};
use mixsocks_common::topology::LAYERS;
use mixsocks_sphinx::{SURB_LEN, Surb};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::testing::TestNetwork;

const WAY: Way = Way { delay: Duration::from_millis(45), mixes: [[0; 32]; LAYERS] };

/// With two providers.
fn core() -> (ClientCore<()>, Instant) {
    let (topology, now) = (TestNetwork::new().topology(0), Instant::now());
    (ClientCore::new(&topology, 2, now, 2031, Duration::from_millis(15)), now)
}

/// Whether a packet was written.
fn pull(core: &mut ClientCore<()>, now: Instant, out: &mut Vec<u8>) -> bool {
    core.next_packet(now, |_| Some(WAY), out) != Pulled::Nothing
}

fn open(core: &mut ClientCore<()>, now: Instant) -> StreamKey {
    let mut rng = StdRng::seed_from_u64(core.sessions().len() as u64);
    core.open(now, 0, &mut rng, 0, "192.0.2.1:80".parse().unwrap()).unwrap()
}

/// Reply 0 with this frame.
fn reply(core: &mut ClientCore<()>, now: Instant, id: SessionId, frame: &Frame<'_>) {
    let mut contents = vec![2, 0, 0, 0, 0, 0, 0];
    frame.encode(&mut contents);
    core.handle_reply(now, id, &WAY, &contents).unwrap();
}

fn surbs(count: u8, made: Instant) -> Vec<ReadySurb<()>> {
    let ready = |number| {
        let mut bytes = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        bytes[0] = 9;
        let surb = Surb::from_bytes(&bytes).unwrap();
        let mut identifier = Identifier::default();
        identifier[0] = number;
        ReadySurb { surb, identifier, recovery: (), way: WAY, made, key_epoch: 0 }
    };
    (1..=count).map(ready).collect()
}

/// The generation of the SURBs in the packet, and how many there are.
fn surbs_in(packet: &[u8]) -> Vec<(u64, usize)> {
    let mut input = &packet[17..];
    take_varint(&mut input).unwrap();
    take_varint(&mut input).unwrap();
    std::iter::from_fn(|| Frame::decode(&mut input).unwrap())
        .filter_map(|frame| match frame {
            Frame::Surbs { generation, surbs } => Some((generation, surbs.len())),
            _ => None,
        })
        .collect()
}

#[test]
fn new_streams_move_to_a_new_session_and_old_ones_stay() {
    let (mut core, start) = core();
    let first = open(&mut core, start);
    let second = open(&mut core, start + SESSION_AGE - Duration::from_millis(1));
    assert_eq!(second.0, first.0);
    let third = open(&mut core, start + SESSION_AGE);
    assert_ne!(third.0, first.0);
    core.handle_timeout(start + 2 * SESSION_AGE);
    assert_eq!(core.write(first, b"still there"), Some(11));
}

#[test]
fn an_old_session_is_closed_when_its_last_stream_is_over() {
    let (mut core, start) = core();
    let key = open(&mut core, start);
    let outcome = OpenOutcome::Refused;
    reply(&mut core, start, key.0, &Frame::Opened { stream: key.1, outcome });
    core.handle_timeout(start + SESSION_AGE);
    let mut out = Vec::new();
    while pull(&mut core, start + SESSION_AGE, &mut out) {
        assert_ne!(out[out.len() - 2..], [12, 0], "its stream was not released");
    }
    core.release(key);
    let due = core.poll_timeout().unwrap();
    assert!(due <= start + SESSION_AGE, "{:?}", due - start);
    core.handle_timeout(start + SESSION_AGE);
    assert!(pull(&mut core, start + SESSION_AGE, &mut out));
    assert_eq!(out[out.len() - 2..], [12, 0], "CLOSE, done");
}

#[test]
fn new_sessions_show_the_token() {
    let (mut core, now) = core();
    let mut shown = Vec::new();
    let token = PresentedToken::from_bytes([7; ACCESS_TOKEN_LEN]);
    for (time, token) in [(now, None), (now + SESSION_AGE, token.clone())] {
        core.set_access_token(0, token);
        open(&mut core, time);
        let mut out = Vec::new();
        while pull(&mut core, time, &mut out) {
            let mut input = &out[17..];
            take_varint(&mut input).unwrap();
            take_varint(&mut input).unwrap();
            if let Some(Frame::Start { access_token, .. }) = Frame::decode(&mut input).unwrap() {
                shown.push(access_token);
            }
        }
    }
    assert_eq!(shown, [None, token]);
}

fn packet(core: &mut ClientCore<()>, now: Instant) {
    assert!(pull(core, now, &mut Vec::new()));
}

#[test]
fn a_provider_that_owes_an_answer_for_long_is_preferred_no_more() {
    let (mut core, start) = core();
    assert_eq!(core.candidates(start), [0, 1]);
    let key = open(&mut core, start);
    packet(&mut core, start);
    let silent = start + core.silent_after();
    assert_eq!(core.candidates(silent), [0, 1], "the mixnet may be at fault");
    core.health.on_fate(silent, &WAY.mixes, silent, true);
    assert_eq!(core.candidates(silent - Duration::from_nanos(1)), [0, 1]);
    assert_eq!(core.candidates(silent), [1, 0]);
    let outcome = OpenOutcome::Connected;
    reply(&mut core, silent, key.0, &Frame::Opened { stream: key.1, outcome });
    assert_eq!(core.candidates(silent), [0, 1]);
    // So is one of which the shell says so, for a while.
    core.avoid_provider(silent, 0);
    assert_eq!(core.candidates(silent), [1, 0]);
    assert_eq!(core.candidates(silent + AVOIDED_FOR), [0, 1]);
    core.set_reachable(1, false);
    assert_eq!(core.candidates(silent), [0]);
}

/// Lets time pass until then, with a provider that says nothing; loops come back if the mixnet works.
/// Returns how many were sent.
fn pass(core: &mut ClientCore<()>, from: Instant, until: Instant, mixnet_works: bool) -> u8 {
    let (mut now, mut loops) = (from, 0);
    loop {
        let due = core.poll_timeout().unwrap_or(until).max(now + Duration::from_millis(1));
        now = due.min(until);
        core.handle_timeout(now);
        while pull(core, now, &mut Vec::new()) {}
        while send_loop(core, now, [loops; 16]) {
            assert!(!mixnet_works || core.loop_came(now, &[loops; 16]));
            loops += 1;
        }
        if now == until {
            return loops;
        }
    }
}

/// After many losses the loops that look for dead mixes are rare.
fn with_many_losses(core: &mut ClientCore<()>, mut now: Instant) -> Instant {
    let key = open(core, now);
    for _ in 0..8 {
        now += Duration::from_secs(33);
        core.health.on_fate(now, &WAY.mixes, now, false);
        while send_loop(core, now, [255; 16]) {
            assert!(core.loop_came(now, &[255; 16]));
            core.health.handle_timeout(now + Duration::from_secs(2));
        }
    }
    core.release(key);
    now + SESSION_AGE
}

#[test]
fn a_silent_provider_is_known_in_time_also_after_many_losses() {
    let (mut core, start) = core();
    let now = with_many_losses(&mut core, start);
    core.health.on_fate(now, &WAY.mixes, now, false);
    while send_loop(&mut core, now, [254; 16]) {}
    open(&mut core, now);
    packet(&mut core, now);
    let silent = now + core.silent_after();
    pass(&mut core, now, silent, true);
    assert_eq!(core.candidates(silent), [1, 0]);
}

#[test]
fn few_loops_seek_a_proof_that_does_not_come() {
    let (mut core, now) = core();
    open(&mut core, now);
    packet(&mut core, now);
    core.health.on_fate(now, &WAY.mixes, now, true);
    let loops = pass(&mut core, now, now + Duration::from_secs(60), false);
    assert!((6..100).contains(&loops), "{loops}");
}

#[test]
fn each_provider_has_sessions_of_its_own() {
    let (mut core, now) = core();
    let mut rng = StdRng::seed_from_u64(1);
    let target: Target = "192.0.2.1:80".parse().unwrap();
    let keys: Vec<_> = [0, 1, 0]
        .map(|provider| core.open(now, 0, &mut rng, provider, target.clone()).unwrap())
        .into();
    assert!(keys[0].0 == keys[2].0 && keys[0].0 != keys[1].0);
    assert_eq!(core.provider_of(keys[1].0), Some(1));
    let mut out = Vec::new();
    // Without a way to one of them, the other's turn comes.
    let only = |number| move |provider| (provider == number).then_some(WAY);
    assert_eq!(core.next_packet(now, only(1), &mut out), Pulled::Packet(1));
    assert_eq!(core.next_packet(now, only(1), &mut out), Pulled::NoWay(0));
    core.set_reachable(0, false);
    assert_eq!(core.next_packet(now, only(1), &mut out), Pulled::Nothing);
}

/// The client's loop through any mixes: whether there was one to send.
fn send_loop(core: &mut ClientCore<()>, now: Instant, identifier: Identifier) -> bool {
    let Some(wish) = core.next_loop(now) else { return false };
    core.loop_taken(now, wish);
    core.loop_sent(now, wish, identifier, WAY);
    true
}

#[test]
fn streams_of_a_dead_provider_end_when_the_mixnet_works() {
    for mixnet_works in [false, true] {
        let (mut core, start) = core();
        let key = open(&mut core, start);
        packet(&mut core, start);
        let mut sent = Vec::new();
        // Its packets are given up, and the loops that follow come back, or do not.
        let mut now = start;
        while now < start + 2 * DEAD_AFTER && core.session(key.0).is_some() {
            now = core.poll_timeout().unwrap().max(now + Duration::from_millis(1));
            core.handle_timeout(now);
            let claimed = core.claim_surbs(now, 10);
            core.deliver_surbs(claimed, surbs(10, now));
            while pull(&mut core, now, &mut Vec::new()) {}
            let identifier = [u8::try_from(sent.len()).unwrap(); 16];
            if send_loop(&mut core, now, identifier) {
                sent.push(identifier);
                assert!(!mixnet_works || core.loop_came(now, &identifier));
            }
            while let Some(event) = core.poll_event() {
                println!("{event:?} after {:?}", now - start);
            }
        }
        assert!(sent.len() > 3, "loops were sent: {}", sent.len());
        assert_eq!(core.session(key.0).is_none(), mixnet_works);
        if mixnet_works {
            assert!((DEAD_AFTER..DEAD_AFTER + Duration::from_secs(5)).contains(&(now - start)));
        }
    }
}

/// Until then the client was cut off: the provider could not answer.
#[test]
fn a_provider_has_time_to_answer_once_the_mixnet_works_again() {
    let (mut core, start) = core();
    let key = open(&mut core, start);
    packet(&mut core, start);
    let back = start + 3 * DEAD_AFTER;
    core.handle_timeout(back);
    core.health.on_fate(back, &WAY.mixes, back, true);
    core.handle_timeout(back);
    assert!(core.session(key.0).is_some());
    core.handle_timeout(back + ANSWER_TIME - Duration::from_nanos(1));
    assert!(core.session(key.0).is_some());
    core.handle_timeout(back + ANSWER_TIME);
    assert!(core.session(key.0).is_none());
}

#[test]
fn a_client_without_streams_sends_no_loops() {
    let (mut core, now) = core();
    let key = open(&mut core, now);
    packet(&mut core, now);
    core.health.on_fate(now, &WAY.mixes, now, false);
    assert!(core.next_loop(now).is_some());
    let outcome = OpenOutcome::Refused;
    reply(&mut core, now, key.0, &Frame::Opened { stream: key.1, outcome });
    core.release(key);
    assert!(core.next_loop(now).is_none() && core.session(key.0).is_some());
}

/// Nothing but messages shows it that mixes are dead.
#[test]
fn a_client_without_streams_sends_loops_when_its_messages_are_lost() {
    let (mut core, now) = core();
    core.set_messages(true);
    assert!(core.next_loop(now).is_none());
    core.note_message_fate(now, &WAY.mixes, now, true);
    assert!(core.next_loop(now).is_none());
    core.note_message_fate(now, &WAY.mixes, now, false);
    assert!(core.next_loop(now).is_some() && core.wants_transmit(now));
    core.set_messages(false);
    assert!(core.next_loop(now).is_none(), "there is nothing to send");
}

#[test]
fn what_is_under_way_is_forgotten_with_its_session() {
    let (mut core, now) = core();
    let key = open(&mut core, now);
    core.write(key, &[1; 30_000]).unwrap();
    while pull(&mut core, now, &mut Vec::new()) {}
    assert_eq!(core.under_way.len(), core.session(key.0).unwrap().packets_under_way());
    core.end();
    while core.poll_event().is_some() {}
    assert!(core.under_way.is_empty());
}

#[test]
fn sessions_take_turns() {
    let (mut core, start) = core();
    let now = start + SESSION_AGE;
    let keys = [open(&mut core, start), open(&mut core, now)];
    for key in keys {
        core.write(key, &[1; 30_000]).unwrap();
    }
    let mut out = Vec::new();
    let senders: Vec<_> = (0..20)
        .map(|_| {
            assert!(pull(&mut core, now, &mut out));
            out[1..17].to_vec()
        })
        .collect();
    assert!(senders.windows(2).all(|pair| pair[0] != pair[1]), "{senders:?}");
}

#[test]
fn renewed_surbs_are_of_a_new_generation() {
    let (mut core, now) = core();
    let key = open(&mut core, now);
    reply(&mut core, now, key.0, &Frame::Stock { generation: 0, count: 0 });
    let claimed = core.claim_surbs(now, 10);
    core.deliver_surbs(claimed, surbs(10, now));
    let mut out = Vec::new();
    assert!(pull(&mut core, now, &mut out));
    assert_eq!(surbs_in(&out), [(0, 5)]);
    let claimed = core.claim_surbs(now, 10);
    let later = now + Duration::from_millis(1);
    core.renew_surbs(later);
    core.deliver_surbs(claimed, surbs(10, now));
    while pull(&mut core, later, &mut out) {
        assert_eq!(surbs_in(&out), [], "those were made before");
    }
    let claimed = core.claim_surbs(later, 10);
    core.deliver_surbs(claimed, surbs(10, later));
    assert!(pull(&mut core, later, &mut out));
    assert_eq!(surbs_in(&out), [(2, 5)], "the generation between is left out");
}

#[test]
fn replaced_surbs_are_of_the_next_generation() {
    let (mut core, now) = core();
    let key = open(&mut core, now);
    reply(&mut core, now, key.0, &Frame::Stock { generation: 0, count: 40 });
    assert_eq!(core.surb_demand(), 0, "there are enough");
    core.replace_surbs(now);
    assert_eq!(core.surb_demand(), 40, "though no stream has anything to say");
    let claimed = core.claim_surbs(now, 10);
    core.deliver_surbs(claimed, surbs(10, now));
    let mut out = Vec::new();
    assert!(pull(&mut core, now, &mut out));
    assert_eq!(surbs_in(&out), [(1, 5)]);
}
