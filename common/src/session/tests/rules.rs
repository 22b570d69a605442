//! Rules that only show at one end, or at one moment.

use super::fairness::Sender;
use super::frame::{Ack, Frame, put_varint, take_varint};
use super::hostile::all_arrived;
use super::streams::{Side, Streams};
use super::*;

/// A stopped writer is woken by the credit that its peer grants, also when CREDIT gets lost.
#[test]
fn a_stopped_writer_goes_on_when_its_peer_reads() {
    let bytes = pattern(1, 300_000);
    for seed in 0..20 {
        let mut world = World::new(seed, Network { loss: 0.3, ..Network::perfect() });
        let stream = world.open();
        let mut written = world.client.write(stream, &bytes).unwrap();
        assert!(written < bytes.len());
        // All that may be sent arrives before the reader begins.
        world.run_for(Duration::from_secs(10));
        let mut read = Vec::new();
        let mut chunk = [0; 100_000];
        world.run_until(Duration::from_secs(1000), |world| {
            if let Some(at) =
                world.client_events.iter().position(|it| *it == StreamEvent::Writable(stream))
            {
                world.client_events.remove(at);
                written += world.client.write(stream, &bytes[written..]).unwrap();
                if written == bytes.len() {
                    world.client.finish(stream);
                }
            }
            while let Some(len) = world.provider().read(stream, &mut chunk).unwrap() {
                if len == 0 {
                    return true;
                }
                read.extend_from_slice(&chunk[..len]);
            }
            false
        });
        assert!(read == bytes);
    }
}

/// Who was granted more sends what waits, whether or not its program writes again.
#[test]
fn credit_lets_go_on_what_waits() {
    let mut sender = Sender::new(500);
    let target = "example.com:80".parse().unwrap();
    sender.handle(&[Frame::Open { stream: 1, target }]);
    sender.session.opened(1, OpenOutcome::Connected);
    assert_eq!(sender.session.write(1, &[1; 100_000]), Some(100_000));
    let mut out = Vec::new();
    while sender.session.poll_transmit(sender.now, &mut out).is_some() {}
    sender.handle(&[Frame::Credit { stream: 1, limit: 100_000 }]);
    assert!(sender.session.poll_transmit(sender.now, &mut out).is_some());
}

/// A provider without SURBs says so now and then, and after fresh ones it begins anew.
#[test]
fn a_famine_is_reported_from_the_reserve() {
    let mut sender = Sender::new(20);
    sender.open(1, 200_000);
    let mut out = Vec::new();
    let mut first_waits = Vec::new();
    let mut sent = 0;
    for _ in 0..2 {
        while sender.session.poll_transmit(sender.now, &mut out).is_some() {
            sent += 1;
        }
        sender.handle(&[Frame::Ack(all_arrived(sent))]);
        assert_eq!(sender.session.stock_surbs(), RESERVE_SURBS);
        let began = sender.now;
        let mut reports = Vec::new();
        while sender.now < began + Duration::from_secs(30) {
            sender.now += Duration::from_millis(100);
            sender.session.handle_timeout(sender.now);
            if sender.session.poll_transmit(sender.now, &mut out).is_some() {
                reports.push(sender.now - began);
                sent += 1;
            }
        }
        first_waits.push(reports[0]);
        assert!((3..RESERVE_SURBS).contains(&reports.len()), "{reports:?}");
        sender.give_surbs(20);
    }
    assert!(first_waits[1] < 2 * first_waits[0], "{first_waits:?}");
}

#[test]
fn the_peer_may_forget_what_was_acknowledged() {
    let mut sender = Sender::new(100);
    sender.open(1, 50_000);
    let mut out = Vec::new();
    for _ in 0..10 {
        sender.session.poll_transmit(sender.now, &mut out).unwrap();
    }
    sender.handle(&[Frame::Ack(all_arrived(10))]);
    sender.session.poll_transmit(sender.now, &mut out).unwrap();
    let mut input = &out[1..];
    assert_eq!(take_varint(&mut input), Ok(10));
    assert_eq!(take_varint(&mut input), Ok(0), "nothing below is under way");
}

/// A client that has received replies with these numbers, which only tell a stock.
pub(super) fn client_after(numbers: &[u64], now: Instant) -> ClientSession {
    let id = SessionId([3; SESSION_ID_LEN]);
    let mut client = ClientSession::new(id, 0, now, MAX_PACKET_BYTES, MEAN_DELAY);
    client.open("192.0.2.1:80".parse().unwrap()).unwrap();
    numbers.iter().for_each(|number| tell_stock(&mut client, now, *number, 40));
    client
}

/// The reply with this number says that the provider has `count` SURBs of generation 0.
fn tell_stock(client: &mut ClientSession, now: Instant, number: u64, count: u64) {
    take_reply(client, now, number, &[Frame::Stock { generation: 0, count }]);
}

/// The client takes a reply with this number, and with the floor zero.
pub(super) fn take_reply(
    client: &mut ClientSession,
    now: Instant,
    number: u64,
    frames: &[Frame<'_>],
) {
    let mut reply = vec![PacketKind::Reply as u8];
    put_varint(&mut reply, number);
    put_varint(&mut reply, number);
    reply.extend_from_slice(&[0; 4]);
    frames.iter().for_each(|frame| frame.encode(&mut reply));
    client.handle_reply(now, Duration::from_millis(45), &reply).unwrap();
}

/// Sends until the client has nothing to send any more.
fn drain(client: &mut ClientSession, now: Instant) -> Vec<Vec<u8>> {
    drain_with(client, now, 0)
}

/// The same with so many SURBs at hand.
fn drain_with(client: &mut ClientSession, now: Instant, surbs: usize) -> Vec<Vec<u8>> {
    let (mut made, mut rng) = (HashMap::new(), StdRng::seed_from_u64(1));
    let mut maker = Maker { ready: vec![now; surbs].into(), done_at: None };
    let mut surbs =
        Surbs { maker: &mut maker, made: &mut made, rng: &mut rng, mean_delay: MEAN_DELAY };
    let (mut packets, mut out) = (Vec::new(), Vec::new());
    while client.poll_transmit(now, Duration::ZERO, &mut surbs, &mut out) {
        packets.push(out.clone());
    }
    packets
}

fn frames(packet: &[u8]) -> Vec<Frame<'_>> {
    let mut input = &packet[1 + SESSION_ID_LEN..];
    take_varint(&mut input).unwrap();
    take_varint(&mut input).unwrap();
    std::iter::from_fn(|| Frame::decode(&mut input).unwrap()).collect()
}

#[test]
fn start_stands_in_every_packet_until_the_first_reply() {
    let now = Instant::now();
    for (numbers, is_confirmed) in [(&[][..], false), (&[0], true)] {
        let mut client = client_after(numbers, now);
        client.open("192.0.2.1:80".parse().unwrap()).unwrap();
        let mut packets = drain(&mut client, now);
        client.ping();
        packets.extend(drain(&mut client, now));
        assert_eq!(packets.len(), 2);
        for packet in &packets {
            let has_start = matches!(frames(packet)[0], Frame::Start { .. });
            assert_eq!(has_start, !is_confirmed);
        }
    }
}

/// The provider cannot know, and the client has nothing else to say.
#[test]
fn a_client_tells_which_replies_it_has_given_up() {
    let now = Instant::now();
    let mut client = client_after(&[0, 2], now);
    drain(&mut client, now);
    let ack_of = |client: &mut ClientSession, now| {
        drain(client, now).iter().flat_map(|packet| frames(packet)).find_map(|frame| match frame {
            Frame::Ack(ack) => Some(ack.settled),
            _ => None,
        })
    };
    let mut settled = None;
    while settled.is_none() {
        let at = client.poll_timeout().unwrap();
        assert!(at < now + Duration::from_secs(1), "nothing is said");
        client.handle_timeout(at);
        settled = ack_of(&mut client, at);
    }
    assert_eq!(settled, Some(3));
}

/// What was due when an ACK left, and is not in it, is repeated without waiting any longer.
#[test]
fn what_an_ack_should_have_named_is_lost() {
    let start = Instant::now();
    let mut client = client_after(&[], start);
    assert_eq!(drain(&mut client, start).len(), 1);
    client.ping();
    assert_eq!(drain(&mut client, start).len(), 1);
    let now = start + Duration::from_millis(600);
    assert!(client.poll_timeout().unwrap() > now);
    let ranges = std::iter::once(1..2).collect();
    let ack = Ack { latest: 1, delay_us: 500_000, first: 0, end: 2, settled: 0, ranges };
    let mut reply = vec![PacketKind::Reply as u8, 0, 0, 0, 0, 0, 0];
    Frame::Ack(ack).encode(&mut reply);
    client.handle_reply(now, Duration::from_millis(45), &reply).unwrap();
    let packets = drain(&mut client, now);
    let opens = |frame: &Frame<'_>| matches!(frame, Frame::Open { .. });
    assert!(packets.iter().any(|packet| frames(packet).iter().any(opens)));
}

#[test]
fn older_reports_of_the_stock_are_worthless() {
    let now = Instant::now();
    let mut client = client_after(&[0, 1, 2, 4], now);
    let demand = client.surb_demand();
    tell_stock(&mut client, now, 3, 0);
    assert!(client.surb_demand() <= demand, "{}", client.surb_demand());
    client.renew_surbs();
    let demand = client.surb_demand();
    tell_stock(&mut client, now, 5, 40);
    assert_eq!(client.surb_demand(), demand, "those are of an older generation");
}

/// An upload that fills the window does not keep SURBs from a download.
#[test]
fn a_full_window_does_not_hold_up_surbs() {
    let now = Instant::now();
    let mut client = client_after(&[0], now);
    client.renew_surbs();
    client.write(1, &[1; 100_000]).unwrap();
    drain(&mut client, now);
    assert!(!client.wants_transmit(now, 0), "the window is full");
    assert!(client.wants_transmit(now, 5));
}

/// Nor does a download, whose SURBs need many packets, keep an upload from sending.
#[test]
fn packets_of_surbs_take_no_room_in_the_window() {
    let now = Instant::now();
    let is_data =
        |packet: &Vec<u8>| frames(packet).iter().any(|frame| matches!(frame, Frame::Data { .. }));
    let [alone, beside] = [1, 10].map(|generations| {
        let mut client = client_after(&[0], now);
        let mut refills = 0;
        for _ in 0..generations {
            client.renew_surbs();
            refills += drain_with(&mut client, now, 40).len();
        }
        client.write(1, &[1; 100_000]).unwrap();
        (refills, drain(&mut client, now).iter().filter(|packet| is_data(packet)).count())
    });
    assert!(beside.0 > alone.0 + alone.1, "{} packets of SURBs are no window full", beside.0);
    assert_eq!(beside.1, alone.1);
}

#[test]
fn bytes_that_come_before_their_open_are_told_with_it() {
    let mut sender = Sender::new(0);
    sender.handle(&[Frame::Data { stream: 1, offset: 0, fin: false, bytes: b"early" }]);
    assert_eq!(sender.session.poll_event(), None);
    let target = "example.com:80".parse().unwrap();
    sender.handle(&[Frame::Open { stream: 1, target }]);
    assert!(matches!(sender.session.poll_event(), Some(StreamEvent::Open { stream: 1, .. })));
    assert_eq!(sender.session.poll_event(), Some(StreamEvent::Readable(1)));
}

/// Streams whose windows have grown are over; the next ones can grow as much.
#[test]
fn a_stream_that_is_over_gives_its_part_of_the_pool_back() {
    let mut streams = Streams::new(Side::Client);
    let block = [1; 1 << 14];
    for round in 0..2 * WINDOW_POOL_BYTES / MAX_WINDOW_BYTES {
        let stream = streams.open("192.0.2.1:80".parse().unwrap()).unwrap();
        let (mut offset, mut limit) = (0, INITIAL_WINDOW_BYTES);
        while limit - offset < MAX_WINDOW_BYTES {
            assert!(offset < 2 * MAX_WINDOW_BYTES, "window {round} stays at {}", limit - offset);
            let data = Frame::Data { stream, offset, fin: false, bytes: &block };
            streams.handle_frame(&data).unwrap();
            offset += block.len() as u64;
            assert_eq!(streams.read(stream, &mut [0; 1 << 14]), Ok(Some(block.len())));
            let mut out = Vec::new();
            streams.write_control(&mut out, MAX_PACKET_BYTES, &mut Vec::new());
            let mut input = &out[..];
            while let Some(frame) = Frame::decode(&mut input).unwrap() {
                if let Frame::Credit { limit: granted, .. } = frame {
                    limit = granted;
                }
            }
        }
        streams.handle_frame(&Frame::Reset { stream }).unwrap();
        streams.release(stream);
        assert!(streams.is_empty());
    }
}

#[test]
fn a_reset_drops_at_once_what_was_to_be_sent() {
    const BYTES: usize = 200_000;
    for by_peer in [false, true] {
        let mut sender = Sender::new(1);
        sender.open(1, BYTES);
        assert!(sender.session.held_bytes() > BYTES);
        if by_peer {
            sender.handle(&[Frame::Reset { stream: 1 }]);
        } else {
            sender.session.release(1);
        }
        assert_eq!(sender.session.stream_count(), 1, "its end is not known to all yet");
        assert!(sender.session.held_bytes() < BYTES / 100);
    }
}

/// A window that nobody uses says nothing about the path: neither that of packets nor that of SURBs.
#[test]
fn a_window_that_is_not_used_stays_as_it_is() {
    let now = Instant::now();
    let mut client = client_after(&[], now);
    let mut sent = drain(&mut client, now).len() as u64;
    for number in 0..100 {
        let frames = [
            Frame::Stock { generation: 0, count: 40 },
            Frame::Ack(all_arrived(sent)),
            Frame::Credit { stream: 1, limit: 1 << 20 },
        ];
        take_reply(&mut client, now, number, &frames);
        client.ping();
        sent += drain(&mut client, now).len() as u64;
    }
    assert_eq!(client.surb_demand(), 0, "40 are enough");
    take_reply(&mut client, now, 100, &[Frame::Ack(all_arrived(sent))]);
    client.write(1, &[1; 100_000]).unwrap();
    assert_eq!(drain(&mut client, now).len(), 32);
}

/// Whatever it said last: it may have used all of its SURBs for replies that were lost.
#[test]
fn a_provider_that_is_silent_may_have_no_surb() {
    let now = Instant::now();
    let mut client = client_after(&[0], now);
    drain(&mut client, now);
    assert_eq!(client.surb_demand(), 0);
    let at = client.poll_timeout().unwrap();
    assert!(at < now + Duration::from_secs(1));
    client.handle_timeout(at);
    assert_eq!(client.surb_demand(), 40);
}
