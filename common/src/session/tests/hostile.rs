//! Peers that break the rules, or keep to their letter only.

use super::frame::{Ack, Frame, put_varint};
use super::*;

#[test]
fn nonsense_never_panics() {
    let mut rng = StdRng::seed_from_u64(29);
    let mut world = World::new(29, Network::perfect());
    let mut begun = 0;
    for round in 0..20_000 {
        if round % 100 == 0 || world.client.closed().is_some() {
            world = World::new(round, Network::perfect());
            world.open();
            begun += 1;
        }
        let id = world.client.id();
        let mut contents = vec![PacketKind::Session as u8];
        contents.extend_from_slice(&id.0);
        let len = rng.random_range(0..60);
        contents.extend((0..len).map(|_| rng.random_range(0..16u8)));
        // Nonsense ends the session at the provider, so that the client gets a new one.
        if !matches!(
            world.sessions.handle_packet(world.now, 1_000_000, &contents),
            Handled::Session(_) | Handled::Dropped(Dropped::Packet(PacketError::Duplicate))
        ) {
            world.client.end(frame::CloseReason::Done);
        }
        contents[0] = PacketKind::Reply as u8;
        contents.drain(1..17);
        let _ = world.client.handle_reply(world.now, Duration::ZERO, &contents);
    }
    assert!(begun > 1000, "{begun}");
}

/// Contents of the packet that the client of `id` would send under this number.
fn packet(id: SessionId, number: u64, frames: &[Frame<'_>]) -> Vec<u8> {
    let mut out = vec![PacketKind::Session as u8];
    out.extend_from_slice(&id.0);
    put_varint(&mut out, number);
    put_varint(&mut out, 0);
    frames.iter().for_each(|frame| frame.encode(&mut out));
    out
}

pub(super) fn all_arrived(end: u64) -> Ack {
    let ranges = std::iter::once(0..end).collect();
    Ack { latest: end - 1, delay_us: 0, first: 0, end, settled: 0, ranges }
}

/// The acknowledgement of data finds that the stream is no more.
#[test]
fn a_reset_and_an_acknowledgement_in_one_packet() {
    let mut world = World::new(103, Network::perfect());
    let stream = world.open();
    world.provider().write(stream, b"answer").unwrap();
    world.transmit();
    let ack = Frame::Ack(all_arrived(world.sent[1]));
    let contents = packet(world.client.id(), 900, &[Frame::Reset { stream }, ack]);
    let handled = world.sessions.handle_packet(world.now, 1_000_000, &contents);
    assert!(matches!(handled, Handled::Session(_)), "{handled:?}");
}

#[test]
fn frames_of_streams_without_an_open_take_up_little() {
    let now = Instant::now();
    let id = SessionId([5; SESSION_ID_LEN]);
    let start = Frame::Start { time_ms: 1_000_000, access_token: None, key_agreement: &[] };
    let mut sessions = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    let credits = (1..100).map(|stream| Frame::Credit { stream, limit: 1 << 40 });
    let frames: Vec<_> = [start.clone()].into_iter().chain(credits).collect();
    sessions.handle_packet(now, 1_000_000, &packet(id, 0, &frames));
    assert_eq!(sessions.get_mut(id).unwrap().stream_count(), 0, "nobody may send in them");
    // A RESET that overtakes its OPEN is remembered, as long as the numbers have few gaps.
    let mut end = None;
    for number in 1..100 {
        let resets: Vec<_> =
            (0..200).map(|n| Frame::Reset { stream: (number * 200 + n) * 2 }).collect();
        let handled = sessions.handle_packet(now, 1_000_000, &packet(id, number, &resets));
        if !matches!(handled, Handled::Session(_)) {
            end = Some(number);
            break;
        }
        assert_eq!(sessions.get_mut(id).unwrap().stream_count(), 0);
    }
    assert_eq!(end, Some(21), "4,096 gaps are enough");
}

#[test]
fn an_open_that_comes_after_its_reset_dials_nothing() {
    let now = Instant::now();
    let id = SessionId([5; SESSION_ID_LEN]);
    let start = Frame::Start { time_ms: 1_000_000, access_token: None, key_agreement: &[] };
    let mut sessions = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    let open = Frame::Open { stream: 1, target: "example.com:80".parse().unwrap() };
    sessions.handle_packet(now, 1_000_000, &packet(id, 1, &[start, Frame::Reset { stream: 1 }]));
    sessions.handle_packet(now, 1_000_000, &packet(id, 0, &[open]));
    assert_eq!(sessions.get_mut(id).unwrap().poll_event(), None);
}

#[test]
fn more_streams_than_allowed_end_the_session() {
    let now = Instant::now();
    let id = SessionId([5; SESSION_ID_LEN]);
    let start = Frame::Start { time_ms: 1_000_000, access_token: None, key_agreement: &[] };
    let mut sessions = ProviderSessions::new(0, MAX_PACKET_BYTES, MEAN_DELAY);
    for stream in 1..=2 * MAX_STREAMS as u64 + 1 {
        let data = Frame::Data { stream, offset: 0, fin: false, bytes: b"x" };
        let handled =
            sessions.handle_packet(now, 1_000_000, &packet(id, stream, &[start.clone(), data]));
        let taken = matches!(handled, Handled::Session(_));
        assert_eq!(taken, stream <= 2 * MAX_STREAMS as u64, "{stream}: {handled:?}");
    }
}

/// The client's streams are limited as well, and it can open more when some are over.
#[test]
fn a_client_opens_a_bounded_number_of_streams() {
    let mut world = World::new(105, Network::perfect());
    let first = world.client.open("example.com:80".parse().unwrap()).unwrap();
    for _ in 1..MAX_STREAMS {
        assert!(world.client.open("example.com:80".parse().unwrap()).is_some());
    }
    assert_eq!(world.client.open("example.com:80".parse().unwrap()), None);
    world.client.release(first);
    world.run_until(Duration::from_secs(60), |world| world.client.stream_count() < MAX_STREAMS);
    assert!(world.client.open("example.com:80".parse().unwrap()).is_some());
}

/// A provider that says it has no SURB, and keeps them, ends the session before it has many.
#[test]
fn surbs_are_not_given_to_a_provider_that_hoards_them() {
    let start = Instant::now();
    let mut client = ClientSession::new(SessionId([7; 16]), 0, start, MAX_PACKET_BYTES, MEAN_DELAY);
    client.open("192.0.2.1:80".parse().unwrap()).unwrap();
    let (mut made, mut rng) = (HashMap::new(), StdRng::seed_from_u64(1));
    let (mut maker, mut out) = (Maker::default(), Vec::new());
    let (mut now, mut packets, mut replies) = (start, 0, 0);
    let delay = Duration::from_millis(45);
    while client.closed().is_none() {
        for _ in 0..10 {
            maker.handle_timeout(now, client.surb_demand());
            let mut surbs =
                Surbs { maker: &mut maker, made: &mut made, rng: &mut rng, mean_delay: MEAN_DELAY };
            while client.poll_transmit(now, delay, &mut surbs, &mut out) {
                packets += 1;
            }
            now += Maker::WORK;
        }
        now += 2 * delay;
        if client.poll_timeout().is_some_and(|at| at <= now) {
            client.handle_timeout(now);
        }
        for _ in 0..4 {
            let mut reply = vec![PacketKind::Reply as u8];
            put_varint(&mut reply, replies);
            put_varint(&mut reply, 0);
            reply.extend_from_slice(&[0; 4]);
            replies += 1;
            Frame::Stock { generation: 0, count: 0 }.encode(&mut reply);
            Frame::Ack(all_arrived(packets)).encode(&mut reply);
            client.handle_reply(now, delay, &reply).unwrap();
        }
        assert!(now < start + Duration::from_secs(3600), "it goes on for ever");
    }
    let hoarded = made.len() as u64 - replies;
    println!("{hoarded} SURBs hoarded, {packets} packets, {:?}", now - start);
    assert!(hoarded < 20_000 + 5 * replies);
}

/// The stock of SURBs is bounded, and what is thrown away is counted.
#[test]
fn a_provider_keeps_a_bounded_stock_of_surbs() {
    let now = Instant::now();
    let mut provider = ProviderSession::new(now, MAX_PACKET_BYTES, MEAN_DELAY);
    let mut good = [0; SURB_LEN];
    good[0] = 9;
    let surbs = [good, good, good, [0; SURB_LEN], good];
    let mut contents = Vec::new();
    for number in 0..1100 {
        contents.clear();
        put_varint(&mut contents, number);
        put_varint(&mut contents, 0);
        Frame::Surbs { generation: 3, surbs: &surbs }.encode(&mut contents);
        provider.handle_packet(now, &contents).unwrap();
    }
    assert_eq!(provider.stock_surbs(), MAX_STOCK_SURBS);
    assert_eq!(provider.surbs_refused(), 1100 * 5 - MAX_STOCK_SURBS as u64);
    // Older ones are not taken; newer ones that skip a generation replace all.
    for (number, generation, stock) in [(1100, 2, MAX_STOCK_SURBS), (1101, 5, 4)] {
        contents.clear();
        put_varint(&mut contents, number);
        put_varint(&mut contents, 0);
        Frame::Surbs { generation, surbs: &surbs }.encode(&mut contents);
        provider.handle_packet(now, &contents).unwrap();
        assert_eq!(provider.stock_surbs(), stock);
    }
}
