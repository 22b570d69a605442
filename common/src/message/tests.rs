//! The core by itself: rules of sending and hostile input.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::credit::{BARE_INTERVAL, INITIAL_CREDIT};
use super::fragment::{Fragment, Hour, MessageId};
use super::outbox::{TRY_AFTER_SLEEP, WHOLE_TIME};
use super::packet::{AckStatus, MessageSizes, ReplyContents};
use super::shelf::{TIME_PER_FRAGMENT, WHOLE_AGE};
use super::testing::{identifier, made_surb};
use super::*;
use crate::address::Address;
use crate::topology::UnixTime;

const GIVE_UP: Duration = Duration::from_secs(600);
const WALL: UnixTime = UnixTime(1_800_000_000);

struct Fixture {
    now: Instant,
    rng: StdRng,
    core: Messages<u64>,
    next_surb: u64,
}

fn sizes() -> MessageSizes {
    MessageSizes::new(2031).unwrap()
}

impl Fixture {
    fn new() -> Self {
        Self::with_give_up_after(GIVE_UP)
    }

    fn with_give_up_after(give_up_after: Duration) -> Self {
        Self::with(give_up_after, TakenIds::default())
    }

    fn with(give_up_after: Duration, known: TakenIds) -> Self {
        let options = MessageOptions {
            sizes: sizes(),
            give_up_after,
            wall: WALL,
            validity: UnixTime(0)..=UnixTime(u64::MAX),
            unknown_delays: Duration::ZERO,
            known,
        };
        let now = Instant::now();
        let mut core = Messages::new(now, options);
        core.set_receiving(now, true);
        core.caught_up(now);
        Self { now, rng: StdRng::seed_from_u64(1), core, next_surb: 0 }
    }

    fn address(&mut self) -> Address {
        testing::address(&mut self.rng)
    }

    fn surbs(&mut self, count: usize) -> Vec<MadeSurb<u64>> {
        let mut surb = || {
            self.next_surb += 1;
            made_surb(self.next_surb, 0)
        };
        (0..count).map(|_| surb()).collect()
    }

    fn send(&mut self, to: Address, message: &[u8], surbs: usize) -> Result<MessageId, SendError> {
        let surbs = self.surbs(surbs);
        self.core.send(self.now, &mut self.rng, to, message, surbs)
    }

    fn transmit(&mut self) -> Option<Transmit> {
        let mut surbs = VecDeque::from(self.surbs(1));
        self.core.poll_transmit(self.now, &mut self.rng, &mut surbs)
    }

    /// The number of the SURB by which the acknowledgement of the next fragment comes.
    fn transmit_message(&mut self) -> Option<u64> {
        match self.transmit()? {
            Transmit::Message { ack, .. } => Some(u64::from_be_bytes(*ack.first_chunk().unwrap())),
            other => panic!("{other:?}"),
        }
    }

    fn by_surb(&mut self, surb: u64, contents: &[u8]) -> bool {
        let Some((_, purpose)) = self.core.take_awaited(&identifier(surb)) else { return false };
        self.core.handle_by_surb(self.now, purpose, contents);
        true
    }

    /// A body comes that fits one fragment.
    fn deliver(&mut self, number: u64, body: &[u8]) {
        self.deliver_dated(number, Hour::of(WALL), body);
    }

    fn deliver_dated(&mut self, number: u64, hour: Hour, body: &[u8]) {
        let id = MessageId([u8::try_from(number).unwrap(); 16]);
        let fragment = Fragment { id, hour, index: 0, count: 1, bytes: body }.to_bytes(sizes());
        self.core.handle_delivery(self.now, number, &fragment);
    }

    fn reply_contents(&mut self, id: u8, body: &[u8]) -> Vec<u8> {
        let id = MessageId([id; 16]);
        let fragment = Fragment { id, hour: Hour(0), index: 0, count: 1, bytes: body };
        let ack_surb = self.surbs(1).remove(0).surb;
        ReplyContents { ack_surb, fragment: &fragment.to_bytes(sizes()) }.compose()
    }
}

#[test]
fn messages_that_are_empty_or_too_long_and_too_many_surbs_are_refused() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    assert_eq!(fixture.send(to, b"", 0), Err(SendError::Empty));
    let long = vec![0; MAX_MESSAGE_BYTES + 1];
    assert_eq!(fixture.send(to, &long, 0), Err(SendError::TooLong(MAX_MESSAGE_BYTES + 1)));
    assert_eq!(fixture.send(to, b"m", 1025), Err(SendError::TooManySurbs(1025)));
    assert!(fixture.send(to, &long[1..], 1024).is_ok());
    let tag = SenderTag([0; 16]);
    let reply = fixture.core.reply(fixture.now, &mut fixture.rng, tag, b"m");
    assert_eq!(reply, Err(SendError::UnknownSender));
}

#[test]
fn messages_and_bytes_that_wait_are_bounded() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    for _ in 0..MAX_OUTGOING_MESSAGES {
        fixture.send(to, b"m", 0).unwrap();
    }
    assert_eq!(fixture.send(to, b"m", 0), Err(SendError::Full));
    let mut fixture = Fixture::new();
    let long = vec![0; MAX_MESSAGE_BYTES];
    for _ in 0..3 {
        fixture.send(to, &long, 0).unwrap();
    }
    assert_eq!(fixture.send(to, &long, 0), Err(SendError::Full), "each has a byte more");
    assert!(fixture.core.counts().outgoing.1 <= MAX_OUTGOING_BYTES);
}

#[test]
fn no_more_is_under_way_than_the_window_and_all_destinations_have_their_turn() {
    let mut fixture = Fixture::new();
    let (one, two) = (fixture.address(), fixture.address());
    let long = vec![0; 200_000];
    fixture.send(one, &long, 0).unwrap();
    fixture.send(two, &long, 0).unwrap();
    let sent: Vec<_> = std::iter::from_fn(|| fixture.transmit())
        .map(|sent| match sent {
            Transmit::Message { recipient, .. } => recipient,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(sent.len(), 2 * 64);
    assert_eq!(sent[..4], [one, two, one, two]);
    assert!(!fixture.core.wants_to_send(fixture.now));
}

#[test]
fn acknowledgements_that_nobody_awaits_or_that_are_none_change_nothing() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    fixture.send(to, b"m", 0).unwrap();
    let ack = fixture.transmit_message().unwrap();
    assert!(!fixture.by_surb(ack + 1, &AckStatus::Stored.to_bytes()));
    assert!(fixture.by_surb(ack, &[1, 9]));
    assert_eq!(fixture.core.dropped().malformed, 1);
    assert!(!fixture.by_surb(ack, &AckStatus::Stored.to_bytes()), "each works once");
    assert_eq!(fixture.core.poll_event(), None);
}

#[test]
fn an_overdue_fragment_is_sent_again_and_a_late_acknowledgement_counts() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    let id = fixture.send(to, b"m", 0).unwrap();
    let first = fixture.transmit_message().unwrap();
    fixture.core.sent(&identifier(first), Duration::from_secs(2));
    let due = fixture.core.poll_timeout(fixture.now).unwrap();
    assert!(due >= fixture.now + Duration::from_millis(2545), "the delays, and the rest");
    assert_eq!(fixture.transmit_message(), None);
    fixture.now = due;
    fixture.core.handle_timeout(due);
    let second = fixture.transmit_message().unwrap();
    assert_ne!(first, second);
    assert!(fixture.by_surb(first, &AckStatus::Stored.to_bytes()));
    assert_eq!(fixture.core.poll_event(), Some(MessageEvent::Delivered(id)));
    assert!(fixture.by_surb(second, &AckStatus::Stored.to_bytes()));
    assert_eq!(fixture.core.poll_event(), None);
}

#[test]
fn it_is_told_once_which_packets_were_not_acknowledged_in_time() {
    let mut fixture = Fixture::new();
    let (start, to) = (fixture.now, fixture.address());
    fixture.send(to, &[7; 3000], 0).unwrap();
    let acks = [(); 2].map(|()| fixture.transmit_message().unwrap());
    assert!(fixture.by_surb(acks[0], &AckStatus::Stored.to_bytes()));
    assert_eq!(fixture.core.poll_overdue(), None);
    fixture.now = fixture.core.poll_timeout(fixture.now).unwrap();
    fixture.core.handle_timeout(fixture.now);
    assert_eq!(fixture.core.poll_overdue(), Some((&acks[1], start)));
    assert_eq!(fixture.core.poll_overdue(), None);
    let (_, purpose) = fixture.core.take_awaited(&identifier(acks[1])).unwrap();
    assert_eq!(purpose.sent(), Some(start), "it may be late");
}

#[test]
fn an_unknown_client_fails_at_once_and_others_after_the_stated_time_with_their_reason() {
    let refusals = [
        (AckStatus::ShareFull, FailReason::ShareFull),
        (AckStatus::StoreUnavailable, FailReason::StoreUnavailable),
    ];
    for (status, reason) in refusals {
        let mut fixture = Fixture::new();
        let (start, to) = (fixture.now, fixture.address());
        let id = fixture.send(to, b"m", 0).unwrap();
        let mut sent = 0;
        loop {
            while let Some(ack) = fixture.transmit_message() {
                sent += 1;
                assert!(fixture.by_surb(ack, &status.to_bytes()));
            }
            if let Some(event) = fixture.core.poll_event() {
                assert_eq!(event, MessageEvent::Failed(id, reason));
                break;
            }
            fixture.now = fixture.core.poll_timeout(fixture.now).unwrap();
            fixture.core.handle_timeout(fixture.now);
        }
        assert_eq!(fixture.now, start + GIVE_UP);
        let doubling: u64 = [1, 2, 4, 8, 16, 32].iter().sum();
        assert_eq!(sent, 7 + (GIVE_UP.as_secs() - doubling) / 60, "then one a minute");
    }
    let mut fixture = Fixture::new();
    let to = fixture.address();
    let id = fixture.send(to, b"m", 0).unwrap();
    let ack = fixture.transmit_message().unwrap();
    fixture.by_surb(ack, &AckStatus::UnknownClient.to_bytes());
    let event = MessageEvent::Failed(id, FailReason::UnknownClient);
    assert_eq!(fixture.core.poll_event(), Some(event));
}

#[test]
fn without_a_route_a_message_waits_and_then_fails() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    let id = fixture.send(to, b"m", 0).unwrap();
    let ack = fixture.transmit_message().unwrap();
    fixture.core.unsent(fixture.now, &identifier(ack));
    assert_eq!(fixture.core.counts().awaited, (0, 0));
    assert_eq!(fixture.transmit_message(), None, "there is a pause");
    fixture.now += GIVE_UP;
    fixture.core.handle_timeout(fixture.now);
    let event = MessageEvent::Failed(id, FailReason::NoRoute);
    assert_eq!(fixture.core.poll_event(), Some(event));
}

/// SURBs for acknowledgements that a gateway was given and kept, when it acknowledges one fragment in
/// `one_in`; and how long it took until the message was delivered or had failed.
fn withhold(message: &[u8], one_in: u64) -> (u64, u64, Duration) {
    let mut fixture = Fixture::new();
    let (start, to) = (fixture.now, fixture.address());
    fixture.send(to, message, 0).unwrap();
    let (mut given, mut returned) = (0, 0);
    while fixture.core.poll_event().is_none() {
        let mut acks = Vec::new();
        while let Some(ack) = fixture.transmit_message() {
            given += 1;
            if given % one_in == 0 {
                acks.push(ack);
            }
        }
        fixture.now += Duration::from_millis(100);
        for ack in acks {
            returned += 1;
            assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
        }
        fixture.core.handle_timeout(fixture.now);
    }
    (given - returned, returned, fixture.now - start)
}

#[test]
fn a_gateway_that_acknowledges_little_is_given_few_surbs() {
    for one_in in [3, 10, 50] {
        let (withheld, returned, time) = withhold(&[7; 2_000_000], one_in);
        let bare = time.as_secs() / BARE_INTERVAL.as_secs() + 1;
        let most = u64::from(INITIAL_CREDIT) + returned + bare;
        assert!(withheld <= most, "{withheld} of {most}");
    }
}

#[test]
fn losses_of_a_third_of_all_round_trips_exhaust_no_credit() {
    let mut fixture = Fixture::new();
    let (start, to) = (fixture.now, fixture.address());
    let id = fixture.send(to, &[7; 8_000_000], 0).unwrap();
    let event = loop {
        if let Some(event) = fixture.core.poll_event() {
            break event;
        }
        let acks = Vec::from_iter(std::iter::from_fn(|| fixture.transmit_message()));
        fixture.now += Duration::from_millis(100);
        for ack in acks {
            // A fifth of the packets is lost, and of the acknowledgements of the others.
            if fixture.rng.random_bool(0.8 * 0.8) {
                assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
            }
        }
        fixture.core.handle_timeout(fixture.now);
    };
    assert_eq!(event, MessageEvent::Delivered(id));
    // Whoever had to wait for credit would have waited half a minute for each fragment.
    assert!(fixture.now - start < Duration::from_secs(120), "{:?}", fixture.now - start);
}

/// Recipients give incomplete messages up, whatever their senders are told.
#[test]
fn no_message_is_tried_for_longer_than_recipients_wait() {
    let mut fixture = Fixture::with_give_up_after(INCOMPLETE_AGE * 10);
    let to = fixture.address();
    let id = fixture.send(to, b"m", 0).unwrap();
    fixture.now += MAX_GIVE_UP_AFTER;
    fixture.core.handle_timeout(fixture.now);
    let event = MessageEvent::Failed(id, FailReason::NotConfirmed);
    assert_eq!(fixture.core.poll_event(), Some(event));
}

/// The recipient has given the rest up long before.
#[test]
fn what_a_message_had_acknowledged_before_a_sleep_does_not_count_and_it_is_tried_anew() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    let mut wall = WALL;
    for is_acked in [true, false] {
        let id = fixture.send(to, &[7; 3000], 0).unwrap();
        let [first, second] = [(); 2].map(|()| fixture.transmit_message().unwrap());
        assert!(fixture.by_surb(first, &AckStatus::Stored.to_bytes()));
        wall.0 += GIVE_UP.as_secs() + 1;
        fixture.core.handle_clock(fixture.now, wall);
        assert!(fixture.by_surb(second, &AckStatus::Stored.to_bytes()));
        assert_eq!(fixture.core.poll_event(), None);
        let slept = fixture.now;
        let again = Vec::from_iter(std::iter::from_fn(|| fixture.transmit_message()));
        assert_eq!(again.len(), 2, "all of it is sent again");
        if is_acked {
            for ack in again {
                assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
            }
            assert_eq!(fixture.core.poll_event(), Some(MessageEvent::Delivered(id)));
            continue;
        }
        let event = loop {
            fixture.now = fixture.core.poll_timeout(fixture.now).unwrap();
            fixture.core.handle_timeout(fixture.now);
            while fixture.transmit_message().is_some() {}
            if let Some(event) = fixture.core.poll_event() {
                break event;
            }
        };
        assert_eq!(event, MessageEvent::Failed(id, FailReason::NotConfirmed));
        assert_eq!(fixture.now, slept + TRY_AFTER_SLEEP);
    }
}

/// Recipients give it up soon, whatever comes.
#[test]
fn after_a_sleep_of_hours_messages_fail() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    let id = fixture.send(to, b"m", 0).unwrap();
    fixture.core.handle_clock(fixture.now, UnixTime(WALL.0 + WHOLE_TIME.as_secs()));
    let event = MessageEvent::Failed(id, FailReason::NotConfirmed);
    assert_eq!(fixture.core.poll_event(), Some(event));
}

/// However little is acknowledged at a time.
#[test]
fn a_message_that_goes_on_slowly_is_tried_no_longer_than_recipients_wait() {
    let mut fixture = Fixture::new();
    let (start, to) = (fixture.now, fixture.address());
    let id = fixture.send(to, &[7; 200_000], 0).unwrap();
    let (mut acked, mut event) = (0, None);
    while event.is_none() {
        let acks = Vec::from_iter(std::iter::from_fn(|| fixture.transmit_message()));
        let due = start + acked * (GIVE_UP / 2);
        if fixture.now >= due
            && let Some(ack) = acks.first()
        {
            acked += 1;
            assert!(fixture.by_surb(*ack, &AckStatus::Stored.to_bytes()));
            continue;
        }
        fixture.now = fixture.core.poll_timeout(fixture.now).unwrap();
        fixture.core.handle_timeout(fixture.now);
        event = fixture.core.poll_event();
    }
    assert_eq!(event, Some(MessageEvent::Failed(id, FailReason::NotConfirmed)));
    assert_eq!(fixture.now, start + WHOLE_TIME + acked * TIME_PER_FRAGMENT);
    assert!(fixture.now < start + WHOLE_AGE);
}

/// An acknowledgement may lie somewhere for long: what counts is when the fragment left.
#[test]
fn a_late_acknowledgement_lengthens_no_time() {
    let mut fixture = Fixture::new();
    let (start, to) = (fixture.now, fixture.address());
    let id = fixture.send(to, &[7; 3000], 0).unwrap();
    let ack = fixture.transmit_message().unwrap();
    fixture.now += GIVE_UP - Duration::from_secs(1);
    fixture.core.handle_timeout(fixture.now);
    assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
    fixture.now = start + GIVE_UP;
    fixture.core.handle_timeout(fixture.now);
    let event = MessageEvent::Failed(id, FailReason::NotConfirmed);
    assert_eq!(fixture.core.poll_event(), Some(event));
}

#[test]
fn what_is_malformed_is_confirmed_and_counted() {
    let mut fixture = Fixture::new();
    fixture.core.handle_unreadable(1);
    fixture.core.handle_delivery(fixture.now, 2, &[0; 1587]);
    for (number, body) in [(3, &[9, 9][..]), (4, &Body::Request(5).to_bytes()), (5, &[0])] {
        fixture.deliver(number, body);
    }
    let confirmed: Vec<_> = std::iter::from_fn(|| fixture.core.poll_confirmation()).collect();
    assert_eq!(confirmed, [1, 2, 3, 4, 5]);
    assert_eq!((fixture.core.dropped().malformed, fixture.core.poll_event()), (5, None));
    assert_eq!(fixture.core.counts().incoming, (0, 0, 0, 0), "nothing is remembered of it");
}

#[test]
fn a_message_from_the_future_waits_for_its_hour() {
    let mut fixture = Fixture::new();
    let body = Body::Plain(b"m").to_bytes();
    let hour = Hour(Hour::of(WALL).0 + MAX_HOURS_AHEAD + 1);
    fixture.deliver_dated(1, hour, &body);
    assert_eq!((fixture.core.poll_event(), fixture.core.poll_confirmation()), (None, None));
    assert_eq!(fixture.core.dropped().too_early, 1);
    assert!(!fixture.core.wants_receive(fixture.now));
    let next_hour = fixture.core.poll_timeout(fixture.now).unwrap();
    assert_eq!(next_hour - fixture.now, Duration::from_secs(3600 - WALL.0 % 3600));
    fixture.now = next_hour;
    assert!(fixture.core.wants_receive(fixture.now));
    assert_eq!(fixture.core.poll_timeout(fixture.now), None, "the shell is asked, not told");
    fixture.core.set_receiving(fixture.now, true);
    fixture.deliver_dated(1, hour, &body);
    assert!(matches!(fixture.core.poll_event(), Some(MessageEvent::Received { .. })));
}

/// Two machines of the same network whose clocks are months apart.
#[test]
fn a_message_whose_sender_has_a_wrong_clock_arrives() {
    let month = 30 * 24 * 3600;
    let validity = UnixTime(WALL.0 - 3600)..=UnixTime(WALL.0 + 3600);
    for (theirs, mine) in [(WALL.0 - 2 * month, WALL.0), (WALL.0 + month, WALL.0 - month)] {
        let [mut sender, mut recipient] = [theirs, mine].map(|wall| {
            let mut fixture = Fixture::new();
            fixture.core.handle_clock(fixture.now, UnixTime(wall));
            fixture.core.set_validity(validity.clone());
            fixture
        });
        let to = sender.address();
        sender.send(to, b"m", 0).unwrap();
        let Some(Transmit::Message { fragment, .. }) = sender.transmit() else { panic!() };
        recipient.core.handle_delivery(recipient.now, 1, &fragment);
        assert!(matches!(recipient.core.poll_event(), Some(MessageEvent::Received { .. })));
    }
}

#[test]
fn a_conversation_has_one_tag_and_two_recipients_have_two() {
    let mut fixture = Fixture::new();
    let (one, two) = (fixture.address(), fixture.address());
    let mut tag_of = |to| {
        fixture.send(to, b"m", 1).unwrap();
        let Some(Transmit::Message { fragment, .. }) = fixture.transmit() else { panic!() };
        let fragment = Fragment::parse(&fragment, sizes()).unwrap();
        match Body::parse(fragment.bytes).unwrap() {
            Body::WithSurbs(surbs, _) => surbs.sender_tag,
            other => panic!("{other:?}"),
        }
    };
    let tags = [tag_of(one), tag_of(two), tag_of(one)];
    assert_eq!(tags[0], tags[2]);
    assert_ne!(tags[0], tags[1]);
}

#[test]
fn requests_are_granted_up_to_the_allowance() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    fixture.send(to, b"m", 20).unwrap();
    while let Some(ack) = fixture.transmit_message() {
        assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
    }
    assert!(matches!(fixture.core.poll_event(), Some(MessageEvent::Delivered(_))));
    let mut granted = 0;
    for surb in 1..=20 {
        let body = Body::Request(u16::MAX).to_bytes();
        let contents = fixture.reply_contents(u8::try_from(surb).unwrap(), &body);
        assert!(fixture.by_surb(surb, &contents));
        while let Some(refill) = fixture.core.poll_refill() {
            assert_eq!(refill.recipient, to);
            assert!(refill.surbs <= MAX_REPLY_SURBS);
            granted += fixture.refill(refill);
        }
    }
    assert_eq!(granted, REFILL_ALLOWANCE + REFILL_FACTOR * 20);
}

impl Fixture {
    /// Asks for as many SURBs as may go with a message, by this SURB.
    fn request(&mut self, surb: u64) -> Option<Refill> {
        let body = Body::Request(u16::MAX).to_bytes();
        let contents = self.reply_contents(u8::try_from(surb).unwrap(), &body);
        assert!(self.by_surb(surb, &contents));
        self.core.poll_refill()
    }

    /// Sends the SURBs and delivers them at once; how many.
    fn refill(&mut self, Refill { recipient, surbs }: Refill) -> usize {
        let made = self.surbs(surbs);
        self.core.refill(self.now, &mut self.rng, recipient, made).unwrap();
        while let Some(transmit) = self.transmit() {
            if let Transmit::Message { ack, .. } = transmit {
                let ack = u64::from_be_bytes(*ack.first_chunk().unwrap());
                assert!(self.by_surb(ack, &AckStatus::Stored.to_bytes()));
            }
        }
        assert_eq!(self.core.poll_event(), None, "the application knows nothing of it");
        surbs
    }
}

#[test]
fn what_was_not_sent_is_not_counted_as_given() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    fixture.send(to, b"m", 20).unwrap();
    // There was no route for them: nothing is refilled.
    for surb in 1..=10 {
        assert_eq!(fixture.request(surb), Some(Refill { recipient: to, surbs: MAX_REPLY_SURBS }));
    }
}

/// Whoever asks and watches the line of the client sees no burst.
#[test]
fn a_refill_begins_with_few_packets_and_grows_with_its_acknowledgements() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    fixture.send(to, b"m", 1).unwrap();
    let ack = fixture.transmit_message().unwrap();
    assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
    let refill = fixture.request(1).unwrap();
    let made = fixture.surbs(refill.surbs);
    fixture.core.refill(fixture.now, &mut fixture.rng, to, made).unwrap();
    let mut flights = Vec::new();
    while fixture.core.counts().outgoing.0 > 0 {
        let mut acks = Vec::new();
        while let Some(transmit) = fixture.transmit() {
            if let Transmit::Message { ack, .. } = transmit {
                acks.push(u64::from_be_bytes(*ack.first_chunk().unwrap()));
            }
        }
        flights.push(acks.len());
        for ack in acks {
            assert!(fixture.by_surb(ack, &AckStatus::Stored.to_bytes()));
        }
    }
    assert_eq!(flights[..4], [4, 8, 16, 32]);
}

#[test]
fn surbs_are_taken_in_when_it_is_written_down_that_they_came() {
    let mut fixture = Fixture::new();
    let surbs: Vec<_> = fixture.surbs(2).iter().map(|made| *made.surb.as_bytes()).collect();
    let given = ReplySurbs { sender_tag: SenderTag([5; 16]), key_epoch: 0, surbs: &surbs };
    fixture.deliver(1, &Body::Surbs(given).to_bytes());
    assert_eq!((fixture.core.poll_event(), fixture.core.poll_confirmation()), (None, None));
    let received = fixture.core.poll_surbs().unwrap();
    assert_eq!(received.to_remember().unwrap().id, MessageId([1; 16]));
    assert_eq!((fixture.core.counts().reply_surbs, fixture.core.poll_surbs()), ((0, 0), None));
    fixture.core.taken(received);
    assert_eq!(fixture.core.counts().reply_surbs, (2, 1));
    assert_eq!(fixture.core.poll_confirmation(), Some(1));
    // The same box once more, also after a restart that knows what was written down.
    fixture.deliver(1, &Body::Surbs(given).to_bytes());
    assert_eq!((fixture.core.poll_surbs(), fixture.core.poll_confirmation()), (None, Some(1)));
}

/// Somebody who asks for SURBs again and again costs nobody else theirs.
#[test]
fn a_greedy_replier_drives_out_only_its_own() {
    let mut fixture = Fixture::new();
    let (modest, greedy) = (fixture.address(), fixture.address());
    fixture.send(modest, b"m", 10).unwrap();
    let mut now = 0;
    while now <= MAX_AWAITED_REPLIES {
        if fixture.send(greedy, b"m", MAX_REPLY_SURBS).is_err() {
            panic!("there is room for {now}");
        }
        now += MAX_REPLY_SURBS;
    }
    assert_eq!(fixture.core.counts().awaited.1, MAX_AWAITED_REPLIES);
    for surb in 1..=10 {
        let contents = fixture.reply_contents(7, &Body::Plain(b"answer").to_bytes());
        assert!(fixture.by_surb(surb, &contents));
    }
    let contents = fixture.reply_contents(8, &Body::Plain(b"answer").to_bytes());
    assert!(!fixture.by_surb(11, &contents), "the first of the greedy one are gone");
}

#[test]
fn a_reply_is_acknowledged_and_its_copy_is_not_received_again() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    fixture.send(to, b"m", 2).unwrap();
    fixture.transmit_message().unwrap();
    for surb in [1, 2] {
        let contents = fixture.reply_contents(7, &Body::Plain(b"answer").to_bytes());
        assert!(fixture.by_surb(surb, &contents));
        assert!(matches!(fixture.transmit(), Some(Transmit::Acknowledgement { .. })));
    }
    let Some(MessageEvent::Received { message, sender, received }) = fixture.core.poll_event()
    else {
        panic!("the reply did not come");
    };
    assert_eq!((message, sender), (b"answer".to_vec(), Sender::Replier(to)));
    assert_eq!(received.to_remember(), None);
    assert_eq!(fixture.core.poll_event(), None);
}

#[test]
fn acknowledgements_of_replies_that_wait_are_bounded() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    for _ in 0..5 {
        fixture.send(to, b"m", MAX_REPLY_SURBS).unwrap();
    }
    let contents = fixture.reply_contents(7, &Body::Plain(b"answer").to_bytes());
    for surb in 1..=MAX_OWED_ACKS as u64 + 3 {
        assert!(fixture.by_surb(surb, &contents));
    }
    assert_eq!(fixture.core.dropped().owed_acks, 3);
}

#[test]
fn surbs_of_past_key_epochs_are_neither_used_nor_awaited() {
    let mut fixture = Fixture::new();
    let to = fixture.address();
    fixture.send(to, b"m", 3).unwrap();
    let given = fixture.surbs(2);
    let surbs: Vec<_> = given.iter().map(|made| *made.surb.as_bytes()).collect();
    let given = ReplySurbs { sender_tag: SenderTag([5; 16]), key_epoch: 0, surbs: &surbs };
    fixture.deliver(1, &Body::Surbs(given).to_bytes());
    let received = fixture.core.poll_surbs().unwrap();
    fixture.core.taken(received);
    let counts = fixture.core.counts();
    assert_eq!((counts.awaited, counts.reply_surbs), ((0, 3), (2, 1)));
    fixture.core.forget_key_epochs_before(1);
    let counts = fixture.core.counts();
    assert_eq!((counts.awaited, counts.reply_surbs), ((0, 0), (0, 1)));
}
