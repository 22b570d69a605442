//! What goes wrong, and when: drawn from the seed.

use std::ops::Range;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

/// Nothing goes wrong after this time, so that everything can end well.
pub(crate) const FAULTS_END: Duration = Duration::from_secs(60);

/// Something that goes wrong for a while.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// This share of the packets that enter the mixnet is lost.
    Loss(f64),
    /// This share arrives at some node twice.
    Duplication(f64),
    /// This share is held up on a wire for up to so long.
    Delay(f64, Duration),
    /// A byte of this share is changed on a wire.
    Corruption(f64),
    /// Wires carry so many packets a second, and what waits for them is bounded.
    Narrow(u32),
    /// Nothing of the clients gets through to the provider.
    Blackout,
    /// Clients get no SURBs made: the provider runs out of them, while their data goes on flowing.
    Famine,
    /// All SURBs that clients have made so far lead to nowhere, and nobody knows.
    SurbsLost,
    /// The connection of an endpoint to its gateway is cut; it dials again.
    Cut(usize),
    /// A mix is down.
    MixDown(usize, Memory),
    /// A mix is down for good, and no document says so; its layer has another one.
    MixKilled(usize),
    /// A gateway is down.
    GatewayDown(usize, Memory),
    /// A node (gateways first) gets another key, and all packets and SURBs for the old one die.
    /// Clients make new ones for the new key; only if `true` they also renew those that they have
    /// given away.
    NewKey(usize, bool),
    /// A mix leaves the network, with a document that says so; if `true`, for good.
    MixLeaves(usize, bool),
    /// A mix is in another layer, with a document that says so; if `true`, for good.
    MixMoves(usize, u8, bool),
    /// An endpoint stands still, as a machine does that is suspended.
    Suspended(usize, SleepingClock),
    /// The provider is down; afterwards it has forgotten its sessions.
    ProviderDown,
    /// A client is down; afterwards it has forgotten everything.
    ClientDown(usize),
    /// An endpoint's wall clock is off by so many seconds.
    WrongClock(usize, i64),
    /// The provider answers this client with nonsense; at the end the client is started anew.
    HostileProvider(usize),
    /// A private provider takes all tokens back, and then gives them out again.
    TokensRemoved,
    /// Somebody sends valid packets with nonsense inside to everybody.
    Hostile,
}

impl Fault {
    /// Whether a layer may have a mix less because of it, for longer than the fault lasts.
    fn takes_mixes_away(&self) -> bool {
        matches!(self, Fault::MixKilled(_) | Fault::MixLeaves(..) | Fault::MixMoves(..))
    }
}

/// What the clock that measures intervals does while its machine sleeps. The time of day goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SleepingClock {
    /// It goes on, so that it jumps for whoever slept.
    GoesOn,
    /// It stands still, as `CLOCK_MONOTONIC` does on Linux.
    StandsStill,
}

/// What a node that was down still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Everything, as when only its wires were cut.
    All,
    /// Its replay tags.
    Tags,
    Nothing,
}

/// A fault and its time.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) during: Range<Duration>,
    pub(crate) fault: Fault,
}

/// What a network consists of, as far as faults are about it.
pub(crate) struct Shape {
    pub(crate) mixes: usize,
    pub(crate) mixes_per_layer: usize,
    pub(crate) gateways: usize,
    /// The provider is number 0, clients follow.
    pub(crate) endpoints: usize,
}

/// Draws the faults of one run.
pub(crate) fn draw(rng: &mut StdRng, shape: &Shape) -> Vec<Planned> {
    let count = rng.random_range(0..=5);
    let mut faults: Vec<_> = (0..count).map(|_| draw_one(rng, shape)).collect();
    // Each layer keeps a mix that lives.
    let is_killed = |planned: &Planned| matches!(planned.fault, Fault::MixKilled(_));
    if let Some(killed) = faults.iter().position(is_killed) {
        let killed = faults.remove(killed);
        faults.retain(|planned| !planned.fault.takes_mixes_away());
        faults.push(killed);
    }
    faults
}

fn draw_one(rng: &mut StdRng, shape: &Shape) -> Planned {
    let endpoint = rng.random_range(0..shape.endpoints);
    let client = rng.random_range(1..shape.endpoints);
    let share = *[0.01, 0.05, 0.2].get(rng.random_range(0..3)).expect("one of three");
    let memory = [Memory::All, Memory::Tags, Memory::Nothing][rng.random_range(0..3)];
    let clock = [SleepingClock::GoesOn, SleepingClock::StandsStill][rng.random_range(0..2)];
    let fault = match rng.random_range(0..30) {
        0..=3 => Fault::Loss(share),
        4 => Fault::Duplication(share),
        5 | 6 => Fault::Delay(share, Duration::from_millis(rng.random_range(1..3000))),
        7 => Fault::Corruption(share),
        8 | 9 => Fault::Narrow(rng.random_range(30..1000)),
        10 => Fault::Blackout,
        11 | 12 => Fault::Cut(endpoint),
        13 => Fault::MixDown(rng.random_range(0..shape.mixes), memory),
        14 => Fault::GatewayDown(rng.random_range(0..shape.gateways), memory),
        15 => Fault::Suspended(endpoint, clock),
        16 => Fault::ProviderDown,
        17 => Fault::ClientDown(client),
        18 => Fault::WrongClock(endpoint, rng.random_range(-200..200)),
        19 | 20 => Fault::NewKey(rng.random_range(0..shape.gateways + shape.mixes), rng.random()),
        21 => Fault::Hostile,
        22 => Fault::Famine,
        23 => Fault::MixLeaves(rng.random_range(0..shape.mixes), rng.random()),
        24 | 25 => {
            let layer = rng.random_range(1..=3);
            Fault::MixMoves(rng.random_range(0..shape.mixes), layer, rng.random())
        }
        26 => Fault::SurbsLost,
        27 => Fault::TokensRemoved,
        28 if shape.mixes_per_layer > 1 => Fault::MixKilled(rng.random_range(0..shape.mixes)),
        _ => Fault::HostileProvider(client),
    };
    let start = rng.random_range(0.0..30.0);
    let length = match fault {
        Fault::WrongClock(..) => FAULTS_END.as_secs_f64() - start,
        Fault::Suspended(..) => rng.random_range(0.1..60.0),
        _ => rng.random_range(0.1..30.0),
    };
    let during = Duration::from_secs_f64(start)..Duration::from_secs_f64(start + length);
    Planned { during: during.start..during.end.min(FAULTS_END), fault }
}
