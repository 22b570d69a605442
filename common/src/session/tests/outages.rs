//! Nothing gets through for a while, or streams end while their bytes are under way.

use std::ops::Range;

use super::*;

#[test]
fn a_session_survives_a_blackout_in_both_directions() {
    let mut world = World::new(11, Network::perfect());
    let stream = world.open();
    let bytes = pattern(stream, 8 << 20);
    let mut written = 0;
    let mut read = Vec::new();
    let mut chunk = [0u8; 65536];
    let dark = Duration::from_millis(600)..Duration::from_secs(31);
    let mut ended = false;
    world.run_until(Duration::from_secs(120), |world| {
        world.blackout = dark.contains(&world.elapsed());
        if written < bytes.len() {
            written += world.provider().write(stream, &bytes[written..]).unwrap();
            if written == bytes.len() {
                world.provider().finish(stream);
            }
        }
        while let Some(n) = world.client.read(stream, &mut chunk).unwrap() {
            read.extend_from_slice(&chunk[..n]);
            if n == 0 {
                ended = true;
                break;
            }
        }
        ended
    });
    assert!(read == bytes);
    println!("ended {:?} after the light", world.elapsed() - dark.end);
}

/// Streams in both directions while nothing gets through, and how long it takes until both go on.
fn recovery(seed: u64, dark: Range<Duration>, with_upload: bool) -> Duration {
    const ENOUGH: usize = 300_000;
    let mut world = World::new(seed, Network::perfect());
    let (down, up) = (world.open(), world.open());
    let block = vec![1u8; 1 << 20];
    let mut chunk = vec![0u8; 1 << 16];
    let mut received = [0, if with_upload { 0 } else { ENOUGH }];
    world.run_until(dark.end + Duration::from_secs(60), |world| {
        assert_eq!(world.client.closed(), None);
        world.blackout = dark.contains(&world.elapsed());
        let is_light = world.elapsed() > dark.end;
        world.provider().write(down, &block).unwrap();
        if with_upload {
            world.client.write(up, &block).unwrap();
        }
        while let Some(n @ 1..) = world.client.read(down, &mut chunk).unwrap() {
            received[0] += if is_light { n } else { 0 };
        }
        while let Some(n @ 1..) = world.provider().read(up, &mut chunk).unwrap() {
            received[1] += if is_light { n } else { 0 };
        }
        received.iter().all(|bytes| *bytes >= ENOUGH)
    });
    world.elapsed() - dark.end
}

/// A silence of any length is over for the user seconds after it is over.
#[test]
fn both_directions_go_on_after_an_outage() {
    let ms = Duration::from_millis;
    let mut longest = Duration::ZERO;
    for with_upload in [false, true] {
        for dark_ms in [500, 1000, 5000, 20_000, 120_000] {
            for seed in 1..5 {
                let pause = recovery(seed, ms(1200)..ms(1200 + dark_ms), with_upload);
                longest = longest.max(pause);
            }
        }
    }
    println!("the longest pause after an outage was {longest:?}");
    assert!(longest < Duration::from_secs(3), "{longest:?}");
}

#[test]
fn a_stream_ends_while_its_first_bytes_are_under_way() {
    for by_client in [true, false] {
        let mut world = World::new(101, Network::perfect());
        let stream = world.open();
        world.client.write(stream, b"GET / HTTP/1.0\r\n\r\n").unwrap();
        world.provider().write(stream, b"answer").unwrap();
        world.transmit();
        if by_client {
            world.client.release(stream);
        } else {
            world.provider().release(stream);
        }
        world.run_until(Duration::from_secs(30), |world| {
            if world.client_events.contains(&StreamEvent::Reset(stream)) {
                world.client.release(stream);
            }
            if world.provider_events.contains(&StreamEvent::Reset(stream)) {
                world.provider().release(stream);
            }
            world.client.stream_count() == 0 && world.provider().stream_count() == 0
        });
    }
}

/// The provider waits for SURBs with data whose stream is then reset: it has nothing to report.
#[test]
fn a_provider_without_surbs_and_without_data_waits_for_nothing() {
    let mut world = World::new(107, Network::perfect());
    let stream = world.open();
    world.provider().write(stream, &[7; 100_000]).unwrap();
    // No SURBs come any more, and the reserve is all that is left.
    let start = world.now;
    let mut out = Vec::new();
    while world.provider().stock_surbs() > RESERVE_SURBS {
        let now = world.now;
        assert!(world.provider().poll_transmit(now, &mut out).is_some());
    }
    assert!(world.provider().poll_transmit(start, &mut out).is_none());
    world.provider().release(stream);
    let mut now = start;
    let mut wakes = 0;
    while let Some(at) = world.provider().poll_timeout()
        && at < start + SESSION_SILENCE
    {
        assert!(at > now || wakes == 0, "a timer that does not move");
        now = at.max(now);
        world.provider().handle_timeout(now);
        while world.provider().poll_transmit(now, &mut out).is_some() {}
        wakes += 1;
        assert!(wakes < 500, "it wakes for ever");
    }
}

struct NoSurbs;

impl SurbSource for NoSurbs {
    fn available(&self) -> usize {
        0
    }

    fn write_surb(&mut self, _: &mut Vec<u8>) {
        panic!("there is none");
    }
}

/// A keepalive that waits for SURBs is due at no time: its caller would spin. They are not waited for
/// for ever.
#[test]
fn a_client_without_surbs_waits_for_them() {
    let mut now = Instant::now();
    let id = SessionId([7; SESSION_ID_LEN]);
    let mut client = ClientSession::new(id, 1_000_000, now, MAX_PACKET_BYTES, MEAN_DELAY);
    client.open("example.com:80".parse().unwrap()).unwrap();
    let mut out = Vec::new();
    assert!(client.poll_transmit(now, Duration::ZERO, &mut NoSurbs, &mut out));
    let start = now;
    while let Some(at) = client.poll_timeout() {
        assert!(at > now, "due at once, {:?} after the start", now - start);
        now = at;
        client.handle_timeout(now);
        while client.poll_transmit(now, Duration::ZERO, &mut NoSurbs, &mut out) {}
    }
    assert_eq!(client.closed(), Some(frame::CloseReason::Unknown));
    assert!(now - start < SESSION_SILENCE + Duration::from_secs(60), "{:?}", now - start);
}
