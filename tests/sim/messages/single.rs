//! What becomes of one message when one thing is in its way.

use std::time::Duration;

use mixsocks_common::message::{FailReason, GIVE_UP_AFTER};

use super::faults::LONG;
use super::model::{Fate, Kind};
use super::world::{Event, World};
use crate::codec::Plain;

/// The clients that send and receive; each is at the gateway of its number.
const FROM: usize = 0;
const TO: usize = 1;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Plays until `end`: a message of some packets is sent a second after the start, and the other events
/// happen at their times. What its sender was told, and how often it has come.
fn play(others: Vec<(Duration, Event)>, kind: Kind, end: Duration) -> (Fate, u32) {
    let mut world = World::<Plain>::with_plan(3, |_| {
        let send = Event::Send { from: FROM, to: TO, kind, length: 10_000 };
        others.into_iter().chain([(SECOND, send)]).collect()
    });
    world.play(end).unwrap_or_else(|error| panic!("{error}\n{}", world.trace()));
    let [sent] = &world.model.sent[..] else { panic!("one message is sent") };
    (sent.fate, sent.received)
}

#[test]
fn somebody_who_comes_an_hour_later_gets_it() {
    let away = || {
        let leaves = Event::Leave { client: TO, is_killed: true };
        vec![(Duration::ZERO, leaves), (LONG, Event::Return(TO))]
    };
    assert_eq!(play(away(), Kind::Plain, LONG - SECOND), (Fate::Delivered, 0));
    assert_eq!(play(away(), Kind::Plain, LONG + MINUTE), (Fate::Delivered, 1));
}

#[test]
fn a_gateway_that_is_down_makes_it_wait_and_at_last_fail() {
    let down = || (Duration::ZERO, Event::KillGateway(TO));
    let back = (5 * MINUTE, Event::StartGateway(TO));
    assert_eq!(play(vec![down(), back], Kind::Plain, 10 * MINUTE), (Fate::Delivered, 1));
    assert_eq!(play(vec![down()], Kind::Plain, GIVE_UP_AFTER), (Fate::UnderWay, 0));
    let failed = Fate::Failed(FailReason::NotConfirmed);
    assert_eq!(play(vec![down()], Kind::Plain, GIVE_UP_AFTER + MINUTE), (failed, 0));
}

#[test]
fn a_gateway_that_can_store_nothing_refuses_it_until_it_can() {
    let full = |at, is_full| (at, Event::DiskFull { gateway: TO, is_full });
    let for_a_while = vec![full(Duration::ZERO, true), full(5 * MINUTE, false)];
    assert_eq!(play(for_a_while, Kind::Plain, 10 * MINUTE), (Fate::Delivered, 1));
    let failed = Fate::Failed(FailReason::StoreUnavailable);
    let for_ever = vec![full(Duration::ZERO, true)];
    assert_eq!(play(for_ever, Kind::Plain, GIVE_UP_AFTER + MINUTE), (failed, 0));
}

#[test]
fn a_gateway_that_does_not_know_the_recipient_refuses_it_at_once() {
    let failed = Fate::Failed(FailReason::UnknownClient);
    assert_eq!(play(Vec::new(), Kind::ToStranger, 5 * SECOND), (failed, 0));
}
