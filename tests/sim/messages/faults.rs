//! What a run's clients do and what goes wrong, drawn from the seed.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

use super::model::{Kind, draw_length};
use super::world::{CLIENTS, Event, GATEWAYS, MIXES};

/// When everything of the plan has begun but for what comes after a long absence.
pub(crate) const PLAN_END: Duration = Duration::from_secs(180);
/// How long somebody is away who is away for long.
pub(crate) const LONG: Duration = Duration::from_secs(3600);
/// When nothing is to happen any more: whoever was away for long was there for longer than an
/// incomplete message is kept.
pub(crate) const QUIET_END: Duration = Duration::from_secs(4 * 3600);

/// When something that has just begun again breaks once more: before a client is told that it has all that
/// its gateway kept, or some time after. And how long a client may take nothing in meanwhile.
const AT_ONCE: Duration = Duration::from_millis(10);
const SOON: Duration = Duration::from_millis(1500);
const BUSY_FOR: Duration = Duration::from_secs(4);

/// Share of the packets that are lost where they enter the mixnet, as the issue asks for; in every other
/// run it changes again and again, up to the worst.
const USUAL_LOSS: f64 = 0.05;
const WORST_LOSS: f64 = 0.2;

fn within(rng: &mut StdRng, from: Duration, to: Duration) -> Duration {
    from + (to - from).mul_f64(rng.random())
}

fn seconds(rng: &mut StdRng, from: u64, to: u64) -> Duration {
    within(rng, Duration::from_secs(from), Duration::from_secs(to))
}

/// All that is planned, with its time.
pub(crate) fn draw(rng: &mut StdRng) -> Vec<(Duration, Event)> {
    let mut plan = Vec::new();
    draw_loss(rng, &mut plan);
    for from in 0..CLIENTS {
        for _ in 0..rng.random_range(1..=5) {
            let kind = match rng.random_range(0..100) {
                0..55 => Kind::Plain,
                55..99 => Kind::Anonymous(rng.random_range(1..=12)),
                _ => Kind::ToStranger,
            };
            let (to, length) = (rng.random_range(0..CLIENTS), draw_length(rng));
            plan.push((
                within(rng, Duration::ZERO, PLAN_END),
                Event::Send { from, to, kind, length },
            ));
        }
    }
    draw_absences(rng, &mut plan);
    for gateway in 0..GATEWAYS {
        for _ in 0..rng.random_range(0..=4) {
            let at = within(rng, Duration::ZERO, PLAN_END);
            plan.push((at, Event::KillGateway(gateway)));
            let back = at + seconds(rng, 0, 20);
            plan.push((back, Event::StartGateway(gateway)));
            if rng.random() {
                let again = back + within(rng, Duration::ZERO, SOON);
                plan.push((again, Event::KillGateway(gateway)));
                plan.push((again + seconds(rng, 0, 5), Event::StartGateway(gateway)));
            }
        }
    }
    for _ in 0..rng.random_range(0..=2) {
        let (mix, at) = (rng.random_range(0..MIXES), within(rng, Duration::ZERO, PLAN_END));
        plan.push((at, Event::KillMix(mix)));
        plan.push((at + seconds(rng, 0, 20), Event::StartMix(mix)));
    }
    if rng.random_bool(0.2) {
        let (gateway, at) = (rng.random_range(0..GATEWAYS), within(rng, Duration::ZERO, PLAN_END));
        plan.push((at, Event::DiskFull { gateway, is_full: true }));
        plan.push((at + seconds(rng, 1, 30), Event::DiskFull { gateway, is_full: false }));
    }
    plan
}

fn draw_loss(rng: &mut StdRng, plan: &mut Vec<(Duration, Event)>) {
    if rng.random() {
        return plan.push((Duration::ZERO, Event::Loss(USUAL_LOSS)));
    }
    let mut at = Duration::ZERO;
    while at < PLAN_END {
        plan.push((at, Event::Loss(WORST_LOSS * rng.random::<f64>())));
        at += seconds(rng, 1, 60);
    }
    plan.push((PLAN_END, Event::Loss(USUAL_LOSS)));
}

/// Clients come and go, some are killed, and two are away for long.
fn draw_absences(rng: &mut StdRng, plan: &mut Vec<(Duration, Event)>) {
    for client in 0..CLIENTS {
        for _ in 0..rng.random_range(0..=2) {
            let at = within(rng, Duration::ZERO, PLAN_END);
            let [is_noticed, breaks_again] = rng.random::<[bool; 2]>();
            let most = if rng.random() { AT_ONCE } else { SOON };
            let again_after = breaks_again.then(|| within(rng, Duration::ZERO, most));
            plan.push((at, Event::Cut { client, is_noticed, again_after }));
            if breaks_again && rng.random() {
                let time = within(rng, SOON, BUSY_FOR);
                plan.push((at, Event::BeBusy { client, time }));
            }
        }
        if rng.random_bool(0.3) {
            let at = within(rng, Duration::ZERO, PLAN_END);
            plan.push((at, Event::Leave { client, is_killed: rng.random() }));
            let back = at + seconds(rng, 0, 120);
            come_back(rng, plan, client, back);
        }
    }
    for _ in 0..2 {
        let (client, at) = (rng.random_range(0..CLIENTS), within(rng, Duration::ZERO, PLAN_END));
        plan.push((at, Event::Leave { client, is_killed: rng.random() }));
        come_back(rng, plan, client, at + LONG);
    }
}

/// A client comes back, and may ask several times for what its gateway keeps.
fn come_back(rng: &mut StdRng, plan: &mut Vec<(Duration, Event)>, client: usize, at: Duration) {
    plan.push((at, Event::Return(client)));
    for _ in 0..rng.random_range(0..=3) {
        plan.push((at + within(rng, Duration::ZERO, SOON), Event::ReceiveAgain(client)));
    }
}
