//! What users of other networks miss: streams that end when they should not, stall, or flood.

use super::fairness::Sender;
use super::frame::Frame;
use super::*;

/// Reads all that is there, at the client (`true`) or the provider; the bytes, and whether they end.
fn read_all(world: &mut World, at_client: bool, stream: StreamId) -> (Vec<u8>, bool) {
    let (mut bytes, mut chunk) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let read = match at_client {
            true => world.client.read(stream, &mut chunk),
            false => world.provider().read(stream, &mut chunk),
        };
        match read.unwrap() {
            Some(0) => return (bytes, true),
            Some(len) => bytes.extend_from_slice(&chunk[..len]),
            None => return (bytes, false),
        }
    }
}

fn write(world: &mut World, at_client: bool, stream: StreamId, bytes: &[u8]) -> usize {
    match at_client {
        true => world.client.write(stream, bytes).unwrap(),
        false => world.provider().write(stream, bytes).unwrap(),
    }
}

#[test]
fn the_answer_sixty_seconds_after_half_close_arrives() {
    for by_client in [true, false] {
        let mut world = World::new(201, Network { loss: 0.05, ..Network::perfect() });
        let stream = world.open();
        write(&mut world, by_client, stream, b"ask");
        match by_client {
            true => world.client.finish(stream),
            false => world.provider().finish(stream),
        }
        let mut asked = Vec::new();
        world.run_until(Duration::from_secs(30), |world| {
            let (bytes, ends) = read_all(world, !by_client, stream);
            asked.extend(bytes);
            ends
        });
        assert_eq!(asked, b"ask");
        world.run_for(Duration::from_secs(60));
        write(&mut world, !by_client, stream, b"answer");
        match by_client {
            true => world.provider().finish(stream),
            false => world.client.finish(stream),
        }
        let mut answer = Vec::new();
        world.run_until(Duration::from_secs(120), |world| {
            let (bytes, ends) = read_all(world, by_client, stream);
            answer.extend(bytes);
            ends
        });
        assert_eq!(answer, b"answer");
    }
}

#[test]
fn one_byte_per_second_lives_for_twenty_minutes() {
    for by_client in [true, false] {
        let mut world = World::new(203, Network { loss: 0.05, ..Network::perfect() });
        let stream = world.open();
        let (mut read, mut waits) = (0, Duration::ZERO);
        for byte in 0..20 * 60usize {
            let written = world.now;
            assert_eq!(write(&mut world, by_client, stream, &[byte.to_le_bytes()[0]]), 1);
            world.run_until(Duration::from_secs(3600), |world| {
                let (bytes, ends) = read_all(world, !by_client, stream);
                assert!(!ends && bytes.iter().all(|read| *read == byte.to_le_bytes()[0]));
                read += bytes.len();
                read > byte
            });
            waits = waits.max(world.now - written);
            let next = written + Duration::from_secs(1);
            world.run_for(next - world.now);
        }
        println!("the longest wait for a byte was {waits:?}");
        assert!(waits < Duration::from_secs(5), "{waits:?}");
    }
}

/// At any time, also with a window that has grown: what was taken from the writer and not given to the
/// reader is what may be held behind a gap and what is taken ahead, and no more.
#[test]
fn a_reader_that_stops_stops_its_server() {
    const BOUND: u64 = MAX_HELD_BYTES + SEND_AHEAD_BYTES;
    for by_client in [true, false] {
        for reads_until_ms in [0, 300, 3000] {
            let mut world = World::new(207, Network { loss: 0.01, ..Network::perfect() });
            let stream = world.open();
            let stops = world.now + Duration::from_millis(reads_until_ms);
            let until = world.now + Duration::from_secs(120);
            let (mut written, mut read, mut last_written) = (0, 0, world.now);
            let block = vec![1; 1 << 20];
            world.run_until(Duration::from_secs(600), |world| {
                let taken = write(world, by_client, stream, &block) as u64;
                if taken > 0 {
                    (written, last_written) = (written + taken, world.now);
                }
                if world.now < stops {
                    read += read_all(world, !by_client, stream).0.len() as u64;
                }
                world.now >= until
            });
            let held = written - read;
            println!("by client {by_client}, stops after {reads_until_ms} ms: {held} bytes held");
            assert!(held <= BOUND, "{held}");
            let took = last_written - stops;
            assert!(took < Duration::from_secs(10), "it still takes bytes {took:?} later");
            let ends = [world.client.held_bytes(), world.provider().held_bytes()];
            assert!(ends.iter().all(|bytes| *bytes as u64 <= BOUND + (1 << 20)), "{ends:?}");
        }
    }
}

/// Neither end holds more than windows, what is taken ahead of them, and the pools of both directions.
#[test]
fn a_thousand_stalled_streams_hold_a_bounded_amount() {
    const STREAMS: usize = 1000;
    let mut world = World::new(211, Network::perfect());
    let target = || "example.com:80".parse().unwrap();
    let streams: Vec<_> = (0..STREAMS).map(|_| world.client.open(target()).unwrap()).collect();
    world.run_for(Duration::from_secs(10));
    for &stream in &streams {
        world.provider().opened(stream, OpenOutcome::Connected);
    }
    let block = vec![1; 1 << 20];
    let mut written = 0;
    let until = world.now + Duration::from_secs(120);
    while world.now < until {
        for &stream in &streams {
            written += write(&mut world, true, stream, &block) as u64;
            written += write(&mut world, false, stream, &block) as u64;
        }
        world.run_for(Duration::from_secs(1));
    }
    let of_streams = STREAMS as u64 * (2 * INITIAL_WINDOW_BYTES + SEND_AHEAD_BYTES);
    let bound = of_streams + 2 * WINDOW_POOL_BYTES;
    // 187.5 MiB and 64 MiB, and some state.
    assert_eq!(bound, 263_716_864);
    let state = STREAMS * 1024 + MAX_STOCK_SURBS * SURB_LEN;
    for held in [world.client.held_bytes(), world.provider().held_bytes()] {
        println!("{written} bytes written, {held} held");
        assert!(held as u64 <= bound + state as u64, "{held}");
        assert!(held as u64 > STREAMS as u64 * INITIAL_WINDOW_BYTES, "{held}: they do not stall");
    }
    // One that is read goes on all the same.
    let (stream, mut read) = (streams[0], 0);
    let began = world.now;
    world.run_until(Duration::from_secs(600), |world| {
        write(world, false, stream, &block);
        read += read_all(world, true, stream).0.len();
        read > 1 << 20
    });
    let time = world.now - began;
    assert!(time < Duration::from_secs(5), "{time:?}");
}

#[test]
fn a_target_that_never_answers_holds_nothing_but_its_own_stream() {
    let mut world = World::new(213, Network::perfect());
    let silent = world.open();
    assert_eq!(write(&mut world, true, silent, b"hello?"), 6);
    let alone = transfer(&mut World::new(213, Network::perfect()), 3, 1 << 20, true, MINUTE);
    let beside = transfer(&mut world, 3, 1 << 20, true, MINUTE);
    assert!(beside < alone + Duration::from_millis(200), "{beside:?} instead of {alone:?}");
    world.run_for(Duration::from_secs(3600));
    let surbs = world.provider().stock_surbs() * SURB_LEN;
    for held in [world.client.held_bytes(), world.provider().held_bytes() - surbs] {
        assert!(held < 10_000, "{held}");
    }
    let (bytes, ends) = read_all(&mut world, false, silent);
    assert!(bytes == b"hello?" && !ends);
}

const MINUTE: Duration = Duration::from_secs(60);

/// Of three thousand replies the last comes first; then come all others.
#[test]
fn a_packet_thousands_early_leaves_no_hole() {
    const PACKETS: u64 = 3000;
    let now = Instant::now();
    let mut client = rules::client_after(&[], now);
    let stream = 1;
    for number in std::iter::once(PACKETS - 1).chain(0..PACKETS - 1) {
        let bytes = &[number.to_le_bytes()[0]; 10];
        let data = Frame::Data { stream, offset: 10 * number, fin: false, bytes };
        rules::take_reply(&mut client, now, number, &[data]);
    }
    let mut read = vec![0; 100_000];
    let len = client.read(stream, &mut read).unwrap().unwrap();
    let written: Vec<_> = (0..PACKETS).flat_map(|number| [number.to_le_bytes()[0]; 10]).collect();
    assert!(read[..len] == written);
}

/// The provider has not one SURB left, and cannot say so.
#[test]
fn without_surbs_the_stream_recovers() {
    for seed in 0..10 {
        let mut world = World::new(seed, Network::perfect());
        let stream = world.open();
        let bytes = pattern(stream, 4 << 20);
        let (mut written, mut read) = (0, Vec::new());
        let (mut emptied, mut pause, mut last) = (false, Duration::ZERO, world.now);
        world.run_until(MINUTE, |world| {
            written += write(world, false, stream, &bytes[written..]);
            let now = world.now;
            let (more, _) = read_all(world, true, stream);
            if !more.is_empty() {
                (pause, last) = (pause.max(now - last), now);
                read.extend(more);
            }
            if !emptied && read.len() > 1 << 20 {
                emptied = true;
                world.arrivals.clear();
                world.provider().lose_surbs();
            }
            read.len() == bytes.len()
        });
        assert!(emptied && read == bytes);
        assert!(pause < Duration::from_secs(2), "{pause:?}");
    }
}

/// Half of all packets are lost each way, as when one of two mixes of a layer is dead. No SURB is kept
/// by the provider on purpose, although it has few answers for them.
#[test]
fn half_of_all_packets_may_be_lost() {
    for down in [true, false] {
        let mut world = World::new(217, Network { loss: 0.5, ..Network::perfect() });
        let time = transfer(&mut world, 1, 24 << 20, down, Duration::from_secs(600));
        println!("down {down}: {time:?}");
    }
}

/// A reader has all, and the writer waits for acknowledgements alone: no CREDIT wakes it any more.
#[test]
fn a_writer_that_waits_for_acknowledgements_goes_on() {
    let mut sender = Sender::new(40);
    let all = index(MAX_HELD_BYTES + SEND_AHEAD_BYTES);
    sender.open(1, all);
    sender.handle(&[Frame::Credit { stream: 1, limit: 2 * MAX_HELD_BYTES }]);
    let mut out = Vec::new();
    let mut sent = 0;
    while sender.send(&mut out) {
        sent += 1;
        sender.give_surbs(1);
    }
    assert_eq!(sender.session.write(1, &[1; 10]), Some(0));
    while sender.session.poll_event().is_some() {}
    sender.handle(&[Frame::Ack(hostile::all_arrived(sent))]);
    assert_eq!(sender.session.poll_event(), Some(StreamEvent::Writable(1)));
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// How long after its sending the first packet of a stream is repeated again and again, when nothing
/// gets through any more on a path with such wires.
fn repeats(wire: Duration) -> Vec<Duration> {
    let mut world = World::new(219, Network { wire, ..Network::perfect() });
    let stream = world.open();
    transfer(&mut world, 1, 300_000, false, MINUTE);
    world.run_for(Duration::from_secs(3));
    world.blackout = true;
    let began = world.now;
    world.client.write(stream, b"lost").unwrap();
    let mut sent = Vec::new();
    while world.now < began + Duration::from_secs(20) {
        let (now, before) = (world.now, world.sent[0]);
        assert!(world.step());
        (before..world.sent[0]).for_each(|_| sent.push(now - began));
    }
    sent
}

#[test]
fn retransmission_follows_the_measured_path_and_backs_off() {
    let ms = Duration::from_millis;
    let [near, far] = [ms(2), ms(400)].map(repeats);
    println!("{near:?}\n{far:?}");
    // The first packet, and then when the first wait has ended: round trip, delays and a margin.
    assert!((ms(150)..ms(450)).contains(&near[1]), "{:?}", near[1]);
    assert!((ms(800)..ms(1300)).contains(&far[1]), "{:?}", far[1]);
    for sent in [near, far] {
        // In pairs, first in growing intervals, in the end every two seconds.
        let last = sent.len() - 1;
        assert!(sent[last] - sent[last - 4] > ms(3500), "{sent:?}");
        assert!(sent.len() < 30, "{sent:?}");
        let gaps: Vec<_> = sent.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| *gap < ms(2300)), "{gaps:?}");
    }
}

/// On a path that takes longer than any wait, news of what was given up tell how long it takes.
#[test]
fn a_path_slower_than_any_wait_is_learnt() {
    for down in [true, false] {
        let mut world =
            World::new(223, Network { wire: Duration::from_secs(3), ..Network::perfect() });
        let time = transfer(&mut world, 1, 300_000, down, Duration::from_secs(600));
        let needed = 300_000 / 2000;
        let sent = world.sent[usize::from(down)];
        println!("down {down}: {time:?}, {sent} packets for {needed}");
        assert!(time < MINUTE + MINUTE, "{time:?}");
        assert!(sent < 3 * needed, "{sent} packets for {needed}");
    }
}

/// The server has said something while the client was away, which waits for nothing else. The provider
/// has used up its SURBs meanwhile, and the next keepalive is minutes away.
#[test]
fn a_client_that_is_back_asks_for_news() {
    let mut world = World::new(227, Network::perfect());
    let stream = world.open();
    world.run_for(Duration::from_secs(3600));
    let sent = world.sent[0];
    world.run_until(Duration::from_secs(3600) + 2 * KEEPALIVE, |world| world.sent[0] > sent);
    world.run_for(Duration::from_secs(30));
    let sent = world.sent[0];
    world.blackout = true;
    world.provider().write(stream, b"news").unwrap();
    world.run_for(2 * MINUTE);
    world.blackout = false;
    assert_eq!(world.sent[0], sent, "the client has noticed");
    assert!(world.provider().stock_surbs() <= 1, "and the provider can say hardly anything");
    world.client.path_is_back();
    let back = world.now;
    world.run_until(Duration::from_secs(7200), |world| !read_all(world, true, stream).0.is_empty());
    let time = world.now - back;
    assert!(time < Duration::from_secs(2), "{time:?}");
}

/// Who hears of the peer asks again soon, not after the long wait that it had come to.
#[test]
fn a_sign_of_life_shortens_the_wait() {
    let mut sender = Sender::new(200);
    sender.open(1, 100_000);
    let mut out = Vec::new();
    let began = sender.now;
    let mut probed = began;
    while probed < began + Duration::from_secs(10) {
        while sender.session.poll_transmit(sender.now, &mut out).is_some() {
            probed = sender.now;
        }
        sender.now = sender.session.poll_timeout().unwrap();
        sender.session.handle_timeout(sender.now);
    }
    while sender.session.poll_transmit(sender.now, &mut out).is_some() {}
    let (probed, next) = (sender.now, sender.session.poll_timeout().unwrap());
    assert_eq!(next - probed, Duration::from_secs(2));
    sender.handle(&[Frame::Credit { stream: 1, limit: 1 }]);
    sender.now += ACK_DELAY;
    assert!(sender.session.poll_transmit(sender.now, &mut out).is_some(), "an ACK");
    let sooner = sender.session.poll_timeout().unwrap();
    // Twice the first wait, as nothing is known of the path.
    assert!(sooner - probed < Duration::from_millis(1700), "{:?}", sooner - probed);
}

/// Packets that were under way while a machine slept, or lay at a gateway, say little about the path.
#[test]
fn what_was_held_up_does_not_make_losses_wait() {
    let now = Instant::now();
    let mut queueing = estimate::Queueing::new(now, 0.0);
    (0..100).for_each(|_| queueing.update(0.05, now));
    (0..5).for_each(|_| queueing.update(60.0, now));
    assert!(queueing.room() < 8.0, "{}", queueing.room());
    (0..30).for_each(|_| queueing.update(0.05, now));
    assert!(queueing.room() < 0.5, "{}", queueing.room());
}

#[test]
fn a_clock_that_jumps_is_no_queue() {
    let now = Instant::now();
    let mut queueing = estimate::Queueing::new(now, 0.0);
    for jump in [0.0, 60.0, -60.0] {
        (0..100).for_each(|_| queueing.update_between_clocks(0.05 + jump, now));
        assert!(!queueing.is_above_target());
    }
}

/// The session is closed at any moment, also while streams are opened.
#[test]
fn a_session_is_closed_well_at_every_moment() {
    for moment in 0..100 {
        let mut world = World::new(moment, Network { loss: 0.1, ..Network::perfect() });
        let stream = world.client.open("example.com:80".parse().unwrap()).unwrap();
        world.client.write(stream, &[1; 50_000]).unwrap();
        (0..moment).for_each(|_| assert!(world.step()));
        world.client.close();
        let closed = world.now;
        world.run_until(Duration::from_secs(3600), |world| world.client.closed().is_some());
        assert!(world.now - closed < Duration::from_secs(10), "{moment}");
        assert_eq!(world.client.closed(), Some(frame::CloseReason::Done));
        assert_eq!(world.client.poll_timeout(), None);
    }
}
