//! SURBs that lead to nowhere, because something on their routes is gone or has another key.

use super::*;

/// How long a request takes when all SURBs that the provider has are dead, and whether the client
/// knows.
fn answer_after_surbs_died(is_told: bool) -> Duration {
    let mut world = World::new(113, Network::perfect());
    let stream = world.open();
    world.run_for(Duration::from_secs(60));
    world.kill_surbs();
    if is_told {
        world.client.renew_surbs();
    }
    let asked = world.now;
    let mut chunk = [0; 100];
    world.client.write(stream, b"ask").unwrap();
    world.run_until(Duration::from_secs(600), |world| {
        if let Some(1..) = world.provider().read(stream, &mut chunk).unwrap() {
            world.provider().write(stream, b"answer").unwrap();
        }
        world.client.read(stream, &mut chunk).unwrap().is_some()
    });
    world.now - asked
}

#[test]
fn dead_surbs_are_replaced_at_once_when_the_client_knows() {
    let time = answer_after_surbs_died(true);
    println!("{time:?}");
    assert!(time < Duration::from_secs(1), "{time:?}");
}

/// Using up the dead ones one by one would take half a minute.
#[test]
fn dead_surbs_are_replaced_in_a_silence() {
    let time = answer_after_surbs_died(false);
    println!("{time:?}");
    assert!(time < Duration::from_secs(3), "{time:?}");
}

/// The client has nothing to say, and waits for the answer; only its keepalive shows that none can come.
#[test]
fn dead_surbs_are_replaced_while_the_client_only_waits() {
    let mut world = World::new(149, Network::perfect());
    let stream = world.open();
    world.client.write(stream, b"ask").unwrap();
    world.run_for(Duration::from_secs(5));
    world.kill_surbs();
    world.provider().write(stream, b"answer").unwrap();
    let mut chunk = [0; 100];
    let answered = world.now;
    world.run_until(Duration::from_secs(600), |world| {
        world.client.read(stream, &mut chunk).unwrap().is_some()
    });
    let time = world.now - answered;
    assert!(time < FIRST_KEEPALIVE + Duration::from_secs(3), "{time:?}");
}

/// What a provider has may be good after a cut of some seconds, however fast the mixes are.
#[test]
fn a_short_silence_leaves_the_stock_as_large_as_it_was() {
    for mean_delay in [Duration::ZERO, MEAN_DELAY] {
        stock_survives_a_short_silence(mean_delay);
    }
}

fn stock_survives_a_short_silence(mean_delay: Duration) {
    let mut world = World::new(127, Network { mean_delay, ..Network::perfect() });
    let stream = world.open();
    world.run_for(Duration::from_secs(60));
    let stock = world.provider().stock_surbs();
    world.blackout = true;
    world.client.write(stream, b"ask").unwrap();
    world.run_for(Duration::from_secs(9));
    world.blackout = false;
    let mut least = stock;
    let mut chunk = [0; 100];
    world.run_until(Duration::from_secs(600), |world| {
        least = least.min(world.provider().stock_surbs());
        world.provider().read(stream, &mut chunk).unwrap().is_some()
    });
    world.run_for(Duration::from_secs(10));
    assert!(least > stock / 2, "{least} of {stock} SURBs");
}

/// Replies under way when a generation begins are taken, and a download goes on.
#[test]
fn a_download_survives_new_generations() {
    let mut world = World::new(131, Network::perfect());
    let stream = world.open();
    let bytes = pattern(stream, 4 << 20);
    let (mut written, mut read) = (0, Vec::new());
    let mut chunk = vec![0; 1 << 16];
    let mut renewals = 0;
    world.run_until(Duration::from_secs(60), |world| {
        if read.len() > (renewals + 1) * bytes.len() / 5 {
            renewals += 1;
            world.kill_surbs();
            world.client.renew_surbs();
        }
        written += world.provider().write(stream, &bytes[written..]).unwrap();
        while let Some(n @ 1..) = world.client.read(stream, &mut chunk).unwrap() {
            read.extend_from_slice(&chunk[..n]);
        }
        read.len() == bytes.len()
    });
    assert!(read == bytes);
    assert_eq!(renewals, 4);
    println!("{:?}", world.elapsed());
}

/// The longest time without a byte in a download of 4 MiB during which SURBs are renewed four times.
fn longest_pause(renew: impl Fn(&mut World)) -> Duration {
    let mut world = World::new(151, Network::perfect());
    let stream = world.open();
    let bytes = 4 << 20;
    let (mut written, mut read, mut renewals) = (0, 0, 0);
    let (mut last, mut longest) = (world.now, Duration::ZERO);
    let mut chunk = vec![0; 1 << 16];
    world.run_until(Duration::from_secs(60), |world| {
        if read > (renewals + 1) * bytes / 5 {
            renewals += 1;
            renew(world);
        }
        written += world.provider().write(stream, &vec![0; bytes - written]).unwrap();
        while let Some(n @ 1..) = world.client.read(stream, &mut chunk).unwrap() {
            read += n;
            longest = longest.max(world.now - last);
            last = world.now;
        }
        read == bytes
    });
    assert_eq!(renewals, 4);
    longest
}

/// Old SURBs are used until new ones are there: nobody waits for a change of keys.
#[test]
fn a_download_does_not_pause_when_surbs_are_replaced() {
    let replaced = longest_pause(|world| world.client.replace_surbs());
    let untouched = longest_pause(|_| ());
    println!("{replaced:?}, without a change {untouched:?}");
    assert!(replaced < untouched + Duration::from_millis(50), "{replaced:?}, {untouched:?}");
}

/// The provider has something to say when the old SURBs have died, long after the last packet.
#[test]
fn an_idle_session_gets_new_surbs_before_the_old_ones_die() {
    let mut world = World::new(157, Network::perfect());
    let stream = world.open();
    world.run_for(Duration::from_secs(60));
    let old: Vec<_> = world.surbs.keys().copied().collect();
    world.client.replace_surbs();
    world.run_for(Duration::from_secs(20));
    let stock = world.provider().stock_surbs();
    assert!((40 - RESERVE_SURBS..=40).contains(&stock), "{stock} SURBs: new ones only, and enough");
    world.dead_surbs.extend(old);
    let pushed = world.now;
    world.provider().write(stream, b"news").unwrap();
    let mut chunk = [0; 100];
    world.run_until(Duration::from_secs(600), |world| {
        world.client.read(stream, &mut chunk).unwrap().is_some()
    });
    let time = world.now - pushed;
    assert!(time < Duration::from_millis(500), "{time:?}");
}
