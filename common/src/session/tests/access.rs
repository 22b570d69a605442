//! Providers that demand an access token.

use mixsocks_sphinx::SecretKey;

use super::frame::{CloseReason, Frame, put_varint, take_varint};
use super::*;

const WALL_MS: u64 = 1_000_000;

/// What the provider of these tests is shown of a token.
fn presented(token: u8) -> PresentedToken {
    let provider = SecretKey::generate(&mut StdRng::seed_from_u64(1)).public_key().into();
    AccessToken::from_bytes([token; ACCESS_TOKEN_LEN]).present(&provider)
}

fn tokens(known: &[u8]) -> AccessTokens {
    AccessTokens::new(known.iter().map(|token| presented(*token).hash())).unwrap()
}

/// A session between a provider that knows tokens 1 and 2, and a client with this one.
fn world(seed: u64, token: Option<u8>) -> World {
    let mut world = World::new(seed, Network::perfect());
    let id = world.client.id();
    world.client = ClientSession::new(id, WALL_MS, world.now, MAX_PACKET_BYTES, MEAN_DELAY)
        .with_access_token(token.map(presented));
    assert_eq!(world.sessions.set_access_tokens(Some(tokens(&[1, 2]))), []);
    world
}

/// Packet `number` of session `id`, with these frames and a SURB; no number is below the floor.
fn packet(id: u8, number: u64, frames: &[Frame<'_>]) -> Vec<u8> {
    let mut out = vec![PacketKind::Session as u8];
    out.extend_from_slice(&[id; SESSION_ID_LEN]);
    put_varint(&mut out, number);
    put_varint(&mut out, number);
    frames.iter().for_each(|frame| frame.encode(&mut out));
    let mut surb = [0; SURB_LEN];
    // The base point: a group element that a SURB may begin with.
    surb[0] = 9;
    Frame::Surbs { generation: 0, surbs: &[surb] }.encode(&mut out);
    out
}

fn start(token: Option<u8>) -> Frame<'static> {
    Frame::Start { time_ms: WALL_MS, access_token: token.map(presented), key_agreement: &[] }
}

fn open() -> Frame<'static> {
    Frame::Open { stream: 1, target: "example.com:80".parse().unwrap() }
}

fn is_refused(handled: &Handled, why: CloseReason) -> bool {
    matches!(handled, Handled::Refused { reason, .. } if *reason == why)
}

#[test]
fn friends_get_in() {
    for token in [1, 2] {
        let mut world = world(7, Some(token));
        world.open();
        assert_eq!(world.sessions.len(), 1);
    }
}

/// Also when most packets are lost: it asks until an answer comes.
#[test]
fn strangers_are_told_at_once_and_nothing_is_kept_of_them() {
    for token in [None, Some(3)] {
        for loss in [0.0, 0.5] {
            let mut world = world(9, token);
            world.network.loss = loss;
            world.client.open("example.com:80".parse().unwrap()).unwrap();
            world.run_until(Duration::from_secs(60), |world| world.client.closed().is_some());
            assert_eq!(world.client.closed(), Some(CloseReason::TokenNeeded));
            assert!(world.provider_events.is_empty(), "something would be dialled");
            assert!(world.sessions.is_empty());
            // SURBs are made, two wires passed, and the mixes of both ways hold packets for a while.
            assert!(loss > 0.0 || world.elapsed() < 20 * MEAN_DELAY, "{:?}", world.elapsed());
        }
    }
}

/// A refused session leaves no trace, not even its id: with the right token it can begin.
#[test]
fn a_refusal_is_forgotten() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::with_limits(0, MAX_PACKET_BYTES, MEAN_DELAY, 10, 1);
    sessions.set_access_tokens(Some(tokens(&[1])));
    for number in 0..3 {
        for token in [None, Some(2)] {
            let handled =
                sessions.handle_packet(now, WALL_MS, &packet(5, number, &[start(token), open()]));
            assert!(is_refused(&handled, CloseReason::TokenNeeded), "{handled:?}");
        }
    }
    let handled = sessions.handle_packet(now, WALL_MS, &packet(5, 3, &[start(Some(1)), open()]));
    assert!(matches!(handled, Handled::Session(_)), "{handled:?}");
}

/// What came later may overtake what began the session: any packet with START may begin it, and those
/// without have to wait for one.
#[test]
fn any_of_the_first_packets_may_come_first() {
    let now = Instant::now();
    let id = SessionId([5; SESSION_ID_LEN]);
    let mut sessions = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    sessions.set_access_tokens(Some(tokens(&[1])));
    let handled = sessions.handle_packet(now, WALL_MS, &packet(5, 9, &[open()]));
    assert!(is_refused(&handled, CloseReason::Unknown), "{handled:?}");
    for number in [4, 2, 0] {
        let contents = packet(5, number, &[start(Some(1)), open()]);
        let handled = sessions.handle_packet(now, WALL_MS, &contents);
        assert!(matches!(handled, Handled::Session(_)), "{handled:?}");
    }
    // The session has begun: it is known by its id, and what another START says means nothing.
    let handled =
        sessions.handle_packet(now, WALL_MS, &packet(5, 3, &[start(Some(2)), Frame::Ping]));
    assert!(matches!(handled, Handled::Session(_)), "{handled:?}");
    let again = sessions.handle_packet(now, WALL_MS, &packet(5, 4, &[start(Some(1)), open()]));
    assert!(matches!(again, Handled::Dropped(Dropped::Packet(PacketError::Duplicate))));
    let session = sessions.get_mut(id).unwrap();
    let opened = std::iter::from_fn(|| session.poll_event()).count();
    assert_eq!(opened, 1, "a target is dialled once");
}

#[test]
fn strangers_put_nobody_out() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::with_limits(0, MAX_PACKET_BYTES, MEAN_DELAY, 1, 5);
    sessions.set_access_tokens(Some(tokens(&[1])));
    sessions.handle_packet(now, WALL_MS, &packet(1, 0, &[start(Some(1)), Frame::Ping]));
    let handled = sessions.handle_packet(now, WALL_MS, &packet(2, 0, &[start(None), open()]));
    assert!(is_refused(&handled, CloseReason::TokenNeeded), "{handled:?}");
    assert!(sessions.get_mut(SessionId([1; SESSION_ID_LEN])).is_some());
}

#[test]
fn a_removed_token_ends_its_sessions_and_no_others() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    sessions.handle_packet(now, WALL_MS, &packet(3, 0, &[start(Some(1)), open()]));
    let id = |id| SessionId([id; SESSION_ID_LEN]);
    let none_was_asked_for = sessions.set_access_tokens(Some(tokens(&[1, 2])));
    assert_eq!(none_was_asked_for, [id(3)]);
    sessions.remove(id(3), now);
    for (number, token) in [(1, 1), (2, 2), (4, 1)] {
        let contents = packet(number, 0, &[start(Some(token)), open()]);
        assert!(matches!(sessions.handle_packet(now, WALL_MS, &contents), Handled::Session(_)));
    }
    assert_eq!(sessions.set_access_tokens(Some(tokens(&[1, 2, 3]))), []);
    assert_eq!(sessions.set_access_tokens(Some(tokens(&[2]))), [id(1), id(4)]);
    assert_eq!(sessions.set_access_tokens(Some(AccessTokens::default())), [id(1), id(2), id(4)]);
    assert_eq!(sessions.set_access_tokens(None), []);
}

#[test]
fn a_provider_that_demands_none_ignores_tokens() {
    let now = Instant::now();
    let mut sessions = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    for (id, token) in [(1, None), (2, Some(1))] {
        let handled = sessions.handle_packet(now, WALL_MS, &packet(id, 0, &[start(token), open()]));
        assert!(matches!(handled, Handled::Session(_)), "{handled:?}");
    }
}

fn token_in(packet: &[u8]) -> Option<Option<PresentedToken>> {
    let mut input = &packet[1 + SESSION_ID_LEN..];
    take_varint(&mut input).unwrap();
    take_varint(&mut input).unwrap();
    match Frame::decode(&mut input).unwrap() {
        Some(Frame::Start { access_token, .. }) => Some(access_token),
        _ => None,
    }
}

/// Whoever counts packets cannot tell who has a token, and a provider that has answered is not shown it
/// again.
#[test]
fn a_token_changes_nothing_but_its_bytes() {
    let packets = [None, Some(1)].map(|token| {
        let mut world = world(11, token);
        world.sessions.set_access_tokens(None);
        world.client.open("example.com:80".parse().unwrap()).unwrap();
        world.maker.ready = [world.now; 40].into();
        let mut sent = 0;
        while !world.client.is_confirmed() {
            world.transmit();
            for Reverse((_, _, UnderWay { arrival, .. })) in &world.arrivals {
                if let Arrival::Packet(contents) = arrival {
                    assert_eq!(token_in(contents), Some(token.map(presented)));
                }
            }
            sent = world.sent[0];
            assert!(world.step());
        }
        world.client.ping();
        let mut out = Vec::new();
        let mut surbs = Surbs {
            maker: &mut world.maker,
            made: &mut world.surbs,
            rng: &mut world.rng,
            mean_delay: MEAN_DELAY,
        };
        assert!(world.client.poll_transmit(world.now, MEAN_DELAY, &mut surbs, &mut out));
        assert_eq!(token_in(&out), None);
        sent
    });
    assert!(packets[0] > 1 && packets[0] == packets[1], "{packets:?}");
}
