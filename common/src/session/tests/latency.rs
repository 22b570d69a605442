//! How long a small request takes, alone and beside a bulk transfer.

use super::*;

/// Times from opening a stream, with its request, to the first byte of the answer.
fn first_bytes(world: &mut World, bulk: Option<StreamId>, requests: usize) -> Vec<Duration> {
    let block = vec![0u8; 1 << 20];
    let mut chunk = vec![0u8; 1 << 16];
    let mut times = Vec::new();
    for _ in 0..requests {
        let began = world.now;
        let stream = world.client.open("example.com:80".parse().unwrap()).unwrap();
        world.client.write(stream, b"GET /").unwrap();
        world.client.finish(stream);
        world.run_until(Duration::from_secs(600), |world| {
            if let Some(bulk) = bulk {
                world.provider().write(bulk, &block).unwrap();
                while let Some(1..) = world.client.read(bulk, &mut chunk).unwrap() {}
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
        times.push(world.now - began);
        world.client.release(stream);
        world.provider().release(stream);
        world.client_events.clear();
    }
    times.sort_unstable();
    times
}

/// The answer comes after one round trip, as the request travels with its OPEN.
#[test]
fn a_small_request_hardly_waits_behind_a_bulk_transfer() {
    const REQUESTS: usize = 101;
    let mut world = World::new(41, Network::perfect());
    world.open();
    let alone = first_bytes(&mut world, None, REQUESTS)[REQUESTS / 2];
    let bulk = world.open();
    // The bulk transfer gets going.
    let until = world.now + Duration::from_secs(5);
    first_bytes(&mut world, Some(bulk), 1);
    let block = vec![0u8; 1 << 20];
    let mut chunk = vec![0u8; 1 << 16];
    world.run_until(Duration::from_secs(600), |world| {
        world.provider().write(bulk, &block).unwrap();
        while let Some(1..) = world.client.read(bulk, &mut chunk).unwrap() {}
        world.now > until
    });
    let beside = first_bytes(&mut world, Some(bulk), REQUESTS)[REQUESTS / 2];
    println!("first byte: {alone:?} alone, {beside:?} beside a bulk transfer");
    assert!(beside < alone + Duration::from_millis(30), "{beside:?} instead of {alone:?}");
}
