//! One fault in a network that is otherwise well: transfers in both directions end byte for byte right,
//! and the pause that a user sees is no longer than stated.

use std::ops::Range;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::access::Access;
use crate::codec::Plain;
use crate::documents::Schedule;
use crate::faults::{Fault, Memory, Planned, SleepingClock};
use crate::model::{End, Plan, Stream};
use crate::runner::play;
use crate::world::{Scenario, World};

/// Runs of each fault, with other routes and delays.
const SEEDS: u64 = 4;
/// When the fault begins: all transfers are under way.
const BEGINS: Duration = Duration::from_millis(1500);
/// What a busy stream carries: more than it can until then.
const BULK_BYTES: u64 = 8 << 20;
/// What a slow one carries: a packet's worth each 100 ms, until the last fault is over.
const SLOW_BYTES: u64 = 900 * SLOW_CHUNK as u64;
const SLOW_CHUNK: usize = 1500;
const SLOW_PAUSE: Duration = Duration::from_millis(100);

/// The longest time for which a stream in one direction stood still, at its reader.
#[derive(Debug, Default)]
struct Pauses {
    bulk: [Duration; 2],
    slow: [Duration; 2],
}

impl Pauses {
    fn longest(&self) -> Duration {
        self.bulk.into_iter().chain(self.slow).max().unwrap_or_default()
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// From the beginning of faults on, for so long.
fn lasting(time: Duration) -> Range<Duration> {
    BEGINS..BEGINS + time
}

/// A busy and a slow stream in each direction.
fn streams() -> Vec<Stream> {
    let bulk = Plan::steady(BULK_BYTES, 1 << 16, Duration::ZERO);
    let slow = Plan::steady(SLOW_BYTES, SLOW_CHUNK, SLOW_PAUSE);
    let nothing = Plan::steady(0, 1, Duration::ZERO);
    let plans = [
        [nothing.clone(), bulk.clone()],
        [bulk, nothing.clone()],
        [nothing.clone(), slow.clone()],
        [slow, nothing],
    ];
    let at = Duration::from_millis(500);
    plans
        .into_iter()
        .enumerate()
        .map(|(number, plans)| Stream::planned(number, 1, at, plans))
        .collect()
}

/// The pauses in a network with so many mixes in each layer, the longest of all seeds.
fn pauses_with(mixes_per_layer: usize, during: Range<Duration>, fault: Fault) -> Pauses {
    let mut longest = Pauses::default();
    for seed in 0..SEEDS {
        let scenario = Scenario {
            streams: streams(),
            clients: 1,
            mixes_per_layer,
            mean_delay: Duration::from_millis(15),
            schedule: Schedule::lasting(),
            mix_packets: 3500,
            access: Access::public(),
            faults: vec![Planned { during: during.clone(), fault: fault.clone() }],
        };
        let mut world = World::<Plain>::with(StdRng::seed_from_u64(seed), scenario);
        if let Err(error) = play(&mut world) {
            panic!("seed {seed}: {error}\n{}", world.trace());
        }
        let pause = |number: usize, from: End| {
            assert!(world.streams[number].is_whole(), "{:?}", world.streams[number]);
            world.streams[number].writing(from).longest_pause
        };
        let [down, up] = [End::Target, End::Program];
        for (longest, now) in [(&mut longest.bulk, 0), (&mut longest.slow, 2)] {
            *longest = [longest[0].max(pause(now, down)), longest[1].max(pause(now + 1, up))];
        }
    }
    println!("{fault:?} for {:?}: down and up {longest:?}", during.end - during.start);
    longest
}

fn pauses(time: Duration, fault: Fault) -> Pauses {
    pauses_with(1, lasting(time), fault)
}

/// Nobody can go on before the fault is over; after that it takes `more` at most.
fn assert_goes_on_after(time: Duration, more: Duration, fault: Fault) {
    let pauses = pauses(time, fault);
    let least = pauses.bulk.into_iter().chain(pauses.slow).min().unwrap_or_default();
    assert!(least >= time, "the fault has missed a transfer: {pauses:?}");
    assert!(pauses.longest() <= time + more, "{pauses:?}");
}

#[test]
fn one_packet_of_a_hundred_is_lost() {
    let pauses = pauses(seconds(90), Fault::Loss(0.01));
    assert!(pauses.longest() < seconds(2), "{pauses:?}");
}

#[test]
fn one_packet_of_twenty_is_lost() {
    let pauses = pauses(seconds(90), Fault::Loss(0.05));
    assert!(pauses.longest() < seconds(2), "{pauses:?}");
}

#[test]
fn one_packet_of_five_is_lost() {
    let pauses = pauses(seconds(90), Fault::Loss(0.2));
    assert!(pauses.longest() < seconds(2), "{pauses:?}");
}

#[test]
fn a_mix_is_restarted() {
    assert_goes_on_after(seconds(5), seconds(2), Fault::MixDown(0, Memory::Tags));
}

#[test]
fn the_clients_gateway_is_restarted() {
    assert_goes_on_after(seconds(5), seconds(2), Fault::GatewayDown(0, Memory::Tags));
}

#[test]
fn the_providers_gateway_is_restarted() {
    assert_goes_on_after(seconds(5), seconds(2), Fault::GatewayDown(1, Memory::Tags));
}

#[test]
fn the_client_is_cut_off_for_half_a_minute() {
    assert_goes_on_after(seconds(30), seconds(2), Fault::Cut(1));
}

#[test]
fn the_clients_machine_sleeps_for_a_minute_and_its_clock_jumps() {
    let fault = Fault::Suspended(1, SleepingClock::GoesOn);
    assert_goes_on_after(seconds(60), seconds(2), fault);
}

#[test]
fn the_clients_machine_sleeps_for_a_minute_and_its_clock_stands_still() {
    let fault = Fault::Suspended(1, SleepingClock::StandsStill);
    assert_goes_on_after(seconds(60), seconds(2), fault);
}

#[test]
fn the_providers_machine_sleeps_for_a_minute_and_its_clock_jumps() {
    let fault = Fault::Suspended(0, SleepingClock::GoesOn);
    assert_goes_on_after(seconds(60), seconds(2), fault);
}

#[test]
fn the_providers_machine_sleeps_for_a_minute_and_its_clock_stands_still() {
    let fault = Fault::Suspended(0, SleepingClock::StandsStill);
    assert_goes_on_after(seconds(60), seconds(2), fault);
}

#[test]
fn all_surbs_are_lost() {
    let pauses = pauses(Duration::ZERO, Fault::SurbsLost);
    assert!(pauses.longest() < seconds(2), "{pauses:?}");
}

/// Loops find it within a second or two; until then every second route is dead.
#[test]
fn one_of_two_mixes_of_a_layer_is_killed_for_good() {
    let pauses = pauses_with(2, lasting(Duration::ZERO), Fault::MixKilled(0));
    assert!(pauses.longest() < seconds(3), "{pauses:?}");
}
