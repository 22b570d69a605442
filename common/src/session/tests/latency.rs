//! How long a small request takes, alone and beside a bulk transfer.

use super::*;

/// A stream that always has something to send, and whose reader keeps up.
#[derive(Clone, Copy)]
struct Bulk {
    stream: StreamId,
    down: bool,
}

impl Bulk {
    fn go_on(self, world: &mut World) {
        let block = [0u8; 1 << 16];
        let mut chunk = [0u8; 1 << 16];
        let Self { stream, down } = self;
        if down {
            while world.provider().write(stream, &block).unwrap() == block.len() {}
            while let Some(1..) = world.client.read(stream, &mut chunk).unwrap() {}
        } else {
            while world.client.write(stream, &block).unwrap() == block.len() {}
            while let Some(1..) = world.provider().read(stream, &mut chunk).unwrap() {}
        }
    }
}

/// The median of the times from opening a stream, with its request, to the first byte of the answer.
fn first_byte(world: &mut World, bulk: Option<Bulk>) -> Duration {
    const REQUESTS: usize = 101;
    let mut chunk = [0u8; 100];
    let mut times: Vec<_> = (0..REQUESTS)
        .map(|_| {
            let began = world.now;
            let stream = world.client.open("example.com:80".parse().unwrap()).unwrap();
            world.client.write(stream, b"GET /").unwrap();
            world.client.finish(stream);
            world.run_until(Duration::from_secs(600), |world| {
                if let Some(bulk) = bulk {
                    bulk.go_on(world);
                }
                if world.provider_events.iter().any(
                    |event| matches!(event, StreamEvent::Open { stream: opened, .. } if *opened == stream),
                ) {
                    world.provider_events.clear();
                    world.provider().opened(stream, OpenOutcome::Connected);
                    world.provider().write(stream, b"answer").unwrap();
                    world.provider().finish(stream);
                }
                world.client.read(stream, &mut chunk).unwrap().is_some()
            });
            let time = world.now - began;
            world.client.release(stream);
            world.provider().release(stream);
            world.client_events.clear();
            time
        })
        .collect();
    times.sort_unstable();
    times[REQUESTS / 2]
}

/// The answer comes after one round trip, as the request travels with its OPEN.
#[test]
fn a_small_request_hardly_waits_behind_a_bulk_transfer() {
    for (down, loss) in [(true, 0.0), (true, 0.01), (false, 0.0), (false, 0.01)] {
        let mut world = World::new(41, Network { loss, ..Network::perfect() });
        world.open();
        let alone = first_byte(&mut world, None);
        let bulk = Bulk { stream: world.open(), down };
        // The bulk transfer gets going.
        let until = world.now + Duration::from_secs(5);
        world.run_until(Duration::from_secs(600), |world| {
            bulk.go_on(world);
            world.now > until
        });
        let sent = world.sent[usize::from(down)];
        let from = world.now;
        let beside = first_byte(&mut world, Some(bulk));
        let rate = (world.sent[usize::from(down)] - sent) as f64 / (world.now - from).as_secs_f64();
        println!(
            "down {down}, loss {loss}: {alone:?} alone, {beside:?} beside {rate:.0} packets/s"
        );
        assert!(beside < alone + Duration::from_millis(30), "{beside:?} instead of {alone:?}");
        assert!(rate > 4000.0, "{rate} packets per second are no bulk transfer");
    }
}
