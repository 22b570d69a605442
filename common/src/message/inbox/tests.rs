//! What the inbox takes, holds, gives up and confirms.

use std::time::Duration;

use proptest::prelude::*;

use super::super::fragment::MessageId;
use super::super::remembered::MAX_REMEMBERED;
use super::super::shelf::{
    DROPPED_AGE, INCOMPLETE_AGE, MAX_INCOMPLETE_REPLIES, TIME_PER_FRAGMENT, WHOLE_AGE,
};
use super::super::testing::address;
use super::*;

fn sizes() -> MessageSizes {
    MessageSizes::new(2031).unwrap()
}

const HOUR: Hour = Hour(500_000);

fn id(number: u32) -> MessageId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    MessageId(id)
}

fn inbox(now: Instant) -> Inbox {
    let mut inbox = Inbox::new(sizes(), now, TakenIds::default());
    inbox.set_receiving(now, true);
    inbox.caught_up(now);
    inbox
}

/// Lets time pass as a shell does, and no longer than until then; how many were given up.
fn wait(inbox: &mut Inbox, until: Instant) -> usize {
    let mut given_up = 0;
    while let Some(at) = inbox.poll_timeout().filter(|at| *at <= until) {
        given_up += inbox.handle_timeout(at);
        assert!(inbox.poll_timeout().is_none_or(|next| next > at), "due means now");
    }
    given_up + inbox.handle_timeout(until)
}

fn fragment(message: u32, index: u16, count: u16) -> Fragment<'static> {
    Fragment { id: id(message), hour: HOUR, index, count, bytes: b"piece" }
}

fn handle(inbox: &mut Inbox, now: Instant, number: u64, fragment: &Fragment<'_>) -> Kept {
    inbox.handle((now, HOUR), Origin::Gateway, Some(number), fragment)
}

#[test]
fn a_delivery_is_confirmed_only_when_its_message_was_taken() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    assert_eq!(handle(&mut inbox, now, 1, &fragment(0, 0, 2)), Kept::Yes);
    assert_eq!(handle(&mut inbox, now, 2, &fragment(0, 1, 2)), Kept::Complete);
    let arrived = inbox.assemble((Origin::Gateway, id(0))).unwrap();
    assert_eq!(arrived.body[..], *b"piecepiece");
    assert_eq!(inbox.confirmations(), []);
    // The same deliveries again, and a copy that the sender sent again.
    assert_eq!(handle(&mut inbox, now, 1, &fragment(0, 0, 2)), Kept::Yes);
    assert_eq!(inbox.confirmations(), []);
    assert_eq!(handle(&mut inbox, now, 3, &fragment(0, 0, 2)), Kept::Yes);
    assert_eq!(inbox.confirmations(), [3]);
    inbox.taken(arrived.key);
    assert_eq!(inbox.confirmations(), [3, 1, 2]);
    assert_eq!(handle(&mut inbox, now, 4, &fragment(0, 1, 2)), Kept::Yes);
    assert_eq!(inbox.confirmations(), [3, 1, 2, 4]);
    assert_eq!(inbox.counts(), (0, 0, 0, 1));
}

#[test]
fn copies_of_fragments_of_incomplete_messages_are_confirmed_but_not_the_first_one() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    for number in [1, 1, 2] {
        assert_eq!(handle(&mut inbox, now, number, &fragment(0, 0, 2)), Kept::Yes);
    }
    assert_eq!(inbox.confirmations(), [2]);
}

#[test]
fn a_fragment_with_another_count_is_dropped_and_harms_nothing() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    handle(&mut inbox, now, 1, &fragment(0, 0, 2));
    assert_eq!(handle(&mut inbox, now, 2, &fragment(0, 1, 3)), Kept::Conflict);
    assert_eq!(inbox.confirmations(), [2]);
    assert_eq!(handle(&mut inbox, now, 3, &fragment(0, 1, 2)), Kept::Complete);
}

#[test]
fn ids_that_were_known_at_the_start_are_not_received_again() {
    let now = Instant::now();
    let mut known = TakenIds::default();
    known.insert(TakenId { hour: HOUR, id: id(7) });
    let mut inbox = Inbox::new(sizes(), now, known);
    assert_eq!(handle(&mut inbox, now, 1, &fragment(7, 0, 1)), Kept::Yes);
    assert_eq!((inbox.confirmations(), inbox.counts().1), (vec![1], 0));
}

/// Takes a message of one fragment, if it may be.
fn take(inbox: &mut Inbox, hour: u32, message: u32) -> Kept {
    let (id, number) = (id(message), u64::from(message));
    let fragment = Fragment { id, hour: Hour(hour), index: 0, count: 1, bytes: b"m" };
    let now = Instant::now();
    let kept = inbox.handle((now, HOUR), Origin::Gateway, Some(number), &fragment);
    if kept == Kept::Complete {
        let arrived = inbox.assemble((Origin::Gateway, id)).unwrap();
        inbox.taken(arrived.key);
    }
    kept
}

/// Somebody fills the memory with messages of one hour, and a gateway hands old boxes over again.
#[test]
fn a_full_memory_refuses_only_the_hour_that_fills_it_and_nothing_is_taken_twice() {
    let many = u32::try_from(MAX_REMEMBERED).unwrap();
    for full in [HOUR.0 - 5, HOUR.0, HOUR.0 + MAX_HOURS_AHEAD] {
        let mut inbox = inbox(Instant::now());
        let others = [HOUR.0 - 9, HOUR.0 - 1, HOUR.0 + 1];
        for hour in others {
            assert_eq!(take(&mut inbox, hour, hour), Kept::Complete);
        }
        for message in 0..many {
            let kept = take(&mut inbox, full, message);
            let is_room = usize::try_from(message).unwrap() + others.len() <= MAX_REMEMBERED;
            assert_eq!(kept, if is_room { Kept::Complete } else { Kept::Misdated });
        }
        assert_eq!(take(&mut inbox, full, 0), Kept::Misdated);
        for hour in others {
            assert_eq!(take(&mut inbox, hour, hour), Kept::Yes, "it is remembered");
            assert_eq!(take(&mut inbox, hour, 999_999), Kept::Complete, "it waited");
        }
        assert!(inbox.taken.len() <= MAX_REMEMBERED);
    }
}

#[test]
fn messages_that_are_older_than_what_is_remembered_are_refused() {
    let mut inbox = inbox(Instant::now());
    let oldest = oldest_remembered(HOUR).0;
    assert_eq!(take(&mut inbox, oldest - 1, 1), Kept::Misdated);
    assert_eq!(take(&mut inbox, oldest, 2), Kept::Complete);
    assert_eq!(inbox.confirmations(), [1, 2]);
}

#[test]
fn messages_from_the_future_wait_at_the_gateway_until_their_hour() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    let latest = HOUR.0 + MAX_HOURS_AHEAD;
    let good = Fragment { hour: Hour(latest), ..fragment(0, 0, 2) };
    assert_eq!(handle(&mut inbox, now, 1, &good), Kept::Yes);
    let early = Fragment { hour: Hour(latest + 2), ..fragment(1, 0, 1) };
    assert_eq!(handle(&mut inbox, now, 2, &early), Kept::TooEarly);
    let never = Fragment { hour: Hour(HOUR.0 + MAX_HOURS_WAITING + 1), ..fragment(2, 0, 1) };
    assert_eq!(handle(&mut inbox, now, 3, &never), Kept::Misdated);
    let other = Fragment { hour: HOUR, ..fragment(0, 1, 2) };
    let kept = handle(&mut inbox, now, 4, &other);
    assert_eq!(kept, Kept::Conflict, "pieces of one are of one hour");
    assert_eq!(inbox.confirmations(), [3, 4]);
    let hour = Hour(HOUR.0 + 2);
    assert_eq!(inbox.waits_for_hour(), Some(hour));
    assert!(!inbox.wants_again(HOUR.next()) && inbox.wants_again(hour));
    inbox.set_receiving(now, true);
    let kept = inbox.handle((now, hour), Origin::Gateway, Some(2), &early);
    assert_eq!((kept, inbox.wants_again(hour)), (Kept::Complete, false));
}

#[test]
fn what_waits_for_its_hour_is_bounded_and_does_not_wait_for_room() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    let max = MAX_HELD_BYTES / sizes().fragment_bytes();
    for index in 0..u16::try_from(max).unwrap() {
        handle(&mut inbox, now, index.into(), &fragment(0, index, u16::MAX));
    }
    let later = HOUR.0 + MAX_HOURS_AHEAD + 1;
    for message in 1..=u32::try_from(MAX_WAITING_FOR_HOUR).unwrap() {
        assert_eq!(take(&mut inbox, later, 100_000 + message), Kept::TooEarly);
    }
    assert_eq!(take(&mut inbox, later, 200_000), Kept::Misdated);
    assert_eq!(take(&mut inbox, later, 100_001), Kept::TooEarly, "it waits already");
    assert_eq!(inbox.confirmations(), [200_000]);
    assert!(!inbox.wants_again(HOUR) && inbox.wants_again(HOUR.next()));
}

#[test]
fn the_newest_messages_make_room_and_are_asked_for_again() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    let max = u32::try_from(MAX_HELD_BYTES / sizes().fragment_bytes()).unwrap();
    let big = u16::MAX;
    // The first message and a second one fill all the room together.
    for index in 0..u16::try_from(max / 2).unwrap() {
        handle(&mut inbox, now, index.into(), &fragment(0, index, big));
    }
    let mut index = 0;
    while handle(&mut inbox, now, 50_000 + u64::from(index), &fragment(1, index, big)) == Kept::Yes
    {
        index += 1;
    }
    assert!(inbox.counts().2 <= MAX_HELD_BYTES);
    assert_eq!(u32::from(index) + max / 2, max);
    assert_eq!(handle(&mut inbox, now, 99_000, &fragment(2, 0, 1)), Kept::NoRoom);
    assert!(!inbox.wants_again(HOUR), "there is no room");
    let first = u16::try_from(max / 2).unwrap();
    assert_eq!(handle(&mut inbox, now, 99_001, &fragment(0, first, big)), Kept::Yes);
    assert_eq!(inbox.counts().0, 1, "the second has made room");
    assert_eq!(inbox.confirmations(), [], "what was dropped is at the gateway still");
    assert!(!inbox.wants_again(HOUR));
    let almost = now + DROPPED_AGE - Duration::from_millis(1);
    assert_eq!(wait(&mut inbox, almost), 0, "more may be at the gateway");
    assert_eq!(wait(&mut inbox, now + DROPPED_AGE), 1);
}

/// Whoever sends pieces of messages that never become whole keeps nobody out.
#[test]
fn thousands_of_half_messages_leave_room_for_a_whole_one() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    for message in 0..10_000 {
        let half = fragment(message, 0, 2);
        assert_eq!(handle(&mut inbox, now, message.into(), &half), Kept::Yes);
    }
    assert_eq!(handle(&mut inbox, now, 20_000, &fragment(20_000, 0, 2)), Kept::Yes);
    assert_eq!(handle(&mut inbox, now, 20_001, &fragment(20_000, 1, 2)), Kept::Complete);
    assert!(inbox.assemble((Origin::Gateway, id(20_000))).is_some());
    assert!(!inbox.wants_again(HOUR));
    assert_eq!(wait(&mut inbox, now + INCOMPLETE_AGE), 10_000);
}

#[test]
fn half_replies_are_bounded_in_number_and_keep_out_neither_whole_ones_nor_deliveries() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    let mut begun = 0;
    let mut begin = |inbox: &mut Inbox, origin| {
        begun += 1;
        inbox.handle((now, HOUR), origin, None, &fragment(begun, 0, 2))
    };
    for _ in 0..7 {
        let origin = Origin::Replier(address(&mut rand::rng()));
        assert_eq!(begin(&mut inbox, origin), Kept::Yes, "others leave some room");
        while begin(&mut inbox, origin) == Kept::Yes {}
    }
    assert!(inbox.counts().0 <= MAX_INCOMPLETE_REPLIES);
    assert!(!inbox.wants_again(HOUR), "the gateway has nothing of it");
    let origin = Origin::Replier(address(&mut rand::rng()));
    let whole = inbox.handle((now, HOUR), origin, None, &fragment(99_001, 0, 1));
    assert_eq!(whole, Kept::Complete);
    assert!(inbox.assemble((origin, id(99_001))).is_some());
    assert_eq!(handle(&mut inbox, now, 1, &fragment(99_002, 0, 2)), Kept::Yes);
    let incomplete = inbox.counts().0;
    assert_eq!(wait(&mut inbox, now + INCOMPLETE_AGE), incomplete);
    assert_eq!(inbox.replies.shares.len(), 1, "what is complete is held still");
}

/// Whoever begins replies and ends none, or sends long ones, keeps nobody else out.
#[test]
fn one_replier_leaves_room_for_the_replies_of_others() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    let [greedy, other] = [(); 2].map(|()| Origin::Replier(address(&mut rand::rng())));
    let mut pieces = 0;
    while inbox.handle((now, HOUR), greedy, None, &fragment(0, pieces, u16::MAX)) == Kept::Yes {
        pieces += 1;
    }
    let body_pieces = super::super::MAX_BODY_BYTES.div_ceil(sizes().fragment_data_bytes());
    assert!(usize::from(pieces) > 2 * body_pieces, "there is room for the longest messages");
    let kept = [0, 1].map(|index| inbox.handle((now, HOUR), other, None, &fragment(1, index, 2)));
    assert_eq!(kept, [Kept::Yes, Kept::Complete]);
    assert!(inbox.counts().2 <= MAX_HELD_BYTES);
}

/// Asking again does not keep pieces for ever, and pieces that were dropped do not either.
#[test]
fn what_was_dropped_delays_giving_up_but_does_not_prevent_it() {
    let start = Instant::now();
    let mut inbox = inbox(start);
    let max = MAX_HELD_BYTES / sizes().fragment_bytes();
    for index in 0..u16::try_from(max).unwrap() {
        handle(&mut inbox, start, index.into(), &fragment(0, index, u16::MAX));
    }
    assert_eq!(handle(&mut inbox, start, 99_000, &fragment(1, 0, 2)), Kept::NoRoom);
    assert_eq!(wait(&mut inbox, start + INCOMPLETE_AGE), 0);
    inbox.set_receiving(start + INCOMPLETE_AGE, true);
    inbox.caught_up(start + INCOMPLETE_AGE);
    assert_eq!(wait(&mut inbox, start + INCOMPLETE_AGE), 1, "nothing is dropped now");
    assert_eq!(inbox.counts().2, 0);
}

#[test]
fn incomplete_messages_are_given_up_only_while_the_gateway_has_handed_over_all_else() {
    let start = Instant::now();
    let mut inbox = inbox(start);
    handle(&mut inbox, start, 1, &fragment(0, 0, 2));
    let half = start + INCOMPLETE_AGE / 2;
    assert_eq!(wait(&mut inbox, half), 0);
    inbox.set_receiving(half, false);
    assert_eq!(inbox.poll_timeout(), None);
    inbox.caught_up(half);
    assert_eq!(wait(&mut inbox, half + 9 * INCOMPLETE_AGE), 0, "it was said before the cut");
    let again = half + 10 * INCOMPLETE_AGE;
    inbox.set_receiving(again, true);
    let caught_up = again + 10 * INCOMPLETE_AGE;
    assert_eq!(wait(&mut inbox, caught_up), 0, "other deliveries come first");
    inbox.caught_up(caught_up);
    let almost = caught_up + INCOMPLETE_AGE / 2 - Duration::from_millis(1);
    assert_eq!(wait(&mut inbox, almost), 0);
    assert_eq!(wait(&mut inbox, caught_up + INCOMPLETE_AGE / 2), 1);
    assert_eq!((inbox.confirmations(), inbox.counts()), (vec![1], (0, 0, 0, 0)));
    assert_eq!(inbox.poll_timeout(), None);
}

#[test]
fn the_gateway_is_asked_again_when_it_was_missed_that_all_has_come() {
    let now = Instant::now();
    let mut inbox = inbox(now);
    handle(&mut inbox, now, 1, &fragment(0, 0, 2));
    inbox.set_receiving(now, false);
    inbox.caught_up(now);
    assert!(!inbox.wants_again(HOUR), "there is no connection");
    inbox.set_receiving(now, true);
    assert_eq!((inbox.wants_again(HOUR), inbox.poll_timeout()), (true, None));
    inbox.set_receiving(now, true);
    assert!(!inbox.wants_again(HOUR), "it was asked");
    inbox.caught_up(now);
    assert_eq!(wait(&mut inbox, now + INCOMPLETE_AGE), 1);
}

#[test]
fn a_copy_of_a_piece_shows_that_its_sender_still_tries() {
    let start = Instant::now();
    let mut inbox = inbox(start);
    handle(&mut inbox, start, 1, &fragment(0, 0, 2));
    let half = start + INCOMPLETE_AGE / 2;
    assert_eq!(wait(&mut inbox, half), 0);
    assert_eq!(handle(&mut inbox, half, 2, &fragment(0, 0, 2)), Kept::Yes);
    assert_eq!(handle(&mut inbox, half + INCOMPLETE_AGE / 4, 1, &fragment(0, 0, 2)), Kept::Yes);
    assert_eq!(wait(&mut inbox, start + INCOMPLETE_AGE), 0);
    assert_eq!(wait(&mut inbox, half + INCOMPLETE_AGE), 1);
}

/// Whoever sends one piece again and again holds its bytes no longer than a bound.
#[test]
fn copies_keep_no_message_for_ever_and_new_pieces_give_their_time() {
    let start = Instant::now();
    let mut inbox = inbox(start);
    for index in [0, 1] {
        handle(&mut inbox, start, index.into(), &fragment(0, index, 4));
    }
    let (mut now, mut number) = (start, 2);
    let mut give_up = |inbox: &mut Inbox, until: Instant| {
        while now < until {
            now = until.min(now + INCOMPLETE_AGE / 2);
            number += 1;
            if wait(inbox, now) > 0 {
                return true;
            }
            handle(inbox, now, number, &fragment(0, 0, 4));
        }
        false
    };
    assert!(!give_up(&mut inbox, start + WHOLE_AGE));
    handle(&mut inbox, start + WHOLE_AGE, 1000, &fragment(0, 2, 4));
    let ends = start + WHOLE_AGE + 3 * TIME_PER_FRAGMENT;
    assert!(!give_up(&mut inbox, ends - Duration::from_millis(1)));
    assert!(give_up(&mut inbox, ends));
    assert_eq!(inbox.counts(), (0, 0, 0, 0));
    assert!(inbox.deliveries.by_age.is_empty() && inbox.deliveries.by_news.is_empty());
}

/// The clock of some systems goes on while the machine sleeps, and the connection seems to be there.
#[test]
fn nothing_is_given_up_because_the_machine_slept() {
    let start = Instant::now();
    let mut inbox = inbox(start);
    handle(&mut inbox, start, 1, &fragment(0, 0, 2));
    assert_eq!(inbox.handle_timeout(start + 20 * INCOMPLETE_AGE), 0);
    assert_eq!(
        handle(&mut inbox, start + 20 * INCOMPLETE_AGE, 2, &fragment(0, 1, 2)),
        Kept::Complete
    );
}

#[test]
fn confirmations_that_nobody_fetches_are_bounded() {
    let mut inbox = inbox(Instant::now());
    for number in 0..=MAX_CONFIRMATIONS as u64 {
        inbox.confirm(Some(number));
    }
    assert_eq!(inbox.confirmations().len(), MAX_CONFIRMATIONS);
    assert_eq!(inbox.poll_confirmation(), Some(1));
}

proptest! {
    #[test]
    fn a_body_arrives_once_in_whatever_order_with_whatever_duplicates(
        body in proptest::collection::vec(any::<u8>(), 1..12_000),
        order in proptest::collection::vec(any::<u16>(), 0..40),
    ) {
        let now = Instant::now();
        let mut inbox = inbox(now);
        let count = super::super::fragment::fragment_count(body.len(), sizes()).unwrap();
        let order = order.into_iter().map(|index| index % count).chain((0..count).rev());
        let mut arrived = Vec::new();
        for (number, index) in (0..).zip(order) {
            let fragment = Fragment::of_body((id(0), HOUR), &body, index, sizes()).unwrap();
            if handle(&mut inbox, now, number, &fragment) == Kept::Complete {
                arrived.extend(inbox.assemble((Origin::Gateway, id(0))));
            }
        }
        prop_assert_eq!(arrived.len(), 1);
        prop_assert_eq!(&*arrived[0].body, &body);
        prop_assert_eq!(inbox.counts().2, usize::from(count) * 1587);
    }
}
