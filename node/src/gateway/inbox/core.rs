//! What a connection is sent of its client's deliveries, and which of them may be confirmed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mixsocks_common::gateway::message::KeptBox;

/// Bytes of boxes that are read for a connection at a time, and held until they are written: 20 of
/// the usual ones, and at least one.
pub(super) const READ_BYTES: usize = 32 * 1024;
/// How long a connection waits before it reads again from a store that has failed.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Numbers that are remembered for a connection: as many as a client has deliveries, 1 MB. Beyond, the
/// oldest go: they come again after the next RECEIVE, and can be confirmed then.
const MAX_UNCONFIRMED: usize = 65_536;

/// Deliveries that are to be read from the store: those with the lowest numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadRequest {
    /// Only those with a higher number than this one.
    pub after: u64,
    /// No more than so many.
    pub max: usize,
}

/// How far the answer to the last RECEIVE is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// More of what was kept is to be read. This is its number.
    Begun(u32),
    /// The last of it was read.
    Read(u32),
    /// It was sent, and the client was told so; or nobody has asked.
    Complete,
}

/// The deliveries of one connection, without a clock or a store: each is sent once for each RECEIVE, and
/// a few are held at a time.
///
/// After anything was handled, and whenever [`poll_timeout`](Self::poll_timeout) has come, ask
/// [`poll_read`](Self::poll_read) what is to be read. While there is room on the connection, call
/// [`poll_transmit`](Self::poll_transmit), and [`poll_caught_up`](Self::poll_caught_up) after it.
#[derive(Debug)]
pub struct InboxCore {
    at_once: usize,
    /// Up to which number it was read; `None` until the client asks.
    cursor: Option<u64>,
    /// There may be more behind the cursor.
    has_more: bool,
    answer: Answer,
    /// One at a time: however often the client asks, no reads pile up.
    is_reading: bool,
    /// What is being read was asked for before the client wanted to begin again.
    is_outdated: bool,
    /// The store has failed: nothing is read until then.
    retry_at: Option<Instant>,
    /// Was read, and is sent next; the last is the first.
    ready: Vec<KeptBox>,
    /// Deliveries that were sent over this connection and not yet confirmed. Those that a client
    /// confirms from an older connection are not among them, unless they were sent again.
    unconfirmed: BTreeSet<u64>,
}

impl InboxCore {
    /// That of a new connection, on a network whose boxes have `box_bytes`.
    pub fn new(box_bytes: usize) -> Self {
        Self {
            at_once: (READ_BYTES / box_bytes.max(1)).max(1),
            cursor: None,
            has_more: false,
            answer: Answer::Complete,
            is_reading: false,
            is_outdated: false,
            retry_at: None,
            ready: Vec::new(),
            unconfirmed: BTreeSet::new(),
        }
    }

    /// RECEIVE has come, with this number: what is kept is sent from the oldest on. What was asked for
    /// before is not answered any more.
    pub fn handle_receive(&mut self, number: u32) {
        self.cursor = Some(0);
        self.has_more = true;
        self.answer = Answer::Begun(number);
        self.is_outdated = self.is_reading;
        self.ready.clear();
    }

    /// CONFIRM has come. Leaves of the numbers those that were sent over this connection and not
    /// confirmed: others need nothing done, and looking for them would cost the disk.
    pub fn handle_confirm(&mut self, mut numbers: Vec<u64>) -> Vec<u64> {
        numbers.retain(|number| self.unconfirmed.remove(number));
        numbers
    }

    /// Something new is kept for the client.
    pub fn handle_new(&mut self) {
        self.has_more = true;
    }

    /// What is to be read next, if anything; [`Self::handle_read`] or [`Self::handle_read_failure`] has to
    /// follow.
    pub fn poll_read(&mut self, now: Instant) -> Option<ReadRequest> {
        let is_waiting = self.retry_at.is_some_and(|at| now < at);
        let after = self.cursor?;
        if !self.has_more || is_waiting || self.is_reading || !self.ready.is_empty() {
            return None;
        }
        self.retry_at = None;
        self.has_more = false;
        self.is_reading = true;
        Some(ReadRequest { after, max: self.at_once })
    }

    /// This was read: all that there was, or the most that there was to be.
    pub fn handle_read(&mut self, read: Vec<KeptBox>) {
        if !self.end_reading() {
            return;
        }
        let is_end = read.len() < self.at_once;
        self.has_more |= !is_end;
        if is_end && let Answer::Begun(number) = self.answer {
            self.answer = Answer::Read(number);
        }
        if let Some(last) = read.last() {
            self.cursor = Some(last.number);
        }
        self.ready = read;
        self.ready.reverse();
    }

    /// Nothing could be read: it is tried again in a while.
    pub fn handle_read_failure(&mut self, now: Instant) {
        if self.end_reading() {
            self.has_more = true;
            self.retry_at = Some(now + RETRY_AFTER);
        }
    }

    /// Whether what was read is what is wanted still.
    fn end_reading(&mut self) -> bool {
        self.is_reading = false;
        !std::mem::take(&mut self.is_outdated)
    }

    /// How many can be sent at once.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// The next delivery to send.
    pub fn poll_transmit(&mut self) -> Option<KeptBox> {
        let kept = self.ready.pop()?;
        self.unconfirmed.insert(kept.number);
        if self.unconfirmed.len() > MAX_UNCONFIRMED {
            self.unconfirmed.pop_first();
        }
        Some(kept)
    }

    /// The number of the RECEIVE of which the client is to be told that it was sent all that was kept when
    /// it asked; once. What has come since then is still to be read, or follows.
    pub fn poll_caught_up(&mut self) -> Option<u32> {
        let Answer::Read(number) = self.answer else { return None };
        self.ready.is_empty().then(|| {
            self.answer = Answer::Complete;
            number
        })
    }

    /// When a store that has failed is to be read again.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.retry_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOX_BYTES: usize = 1635;

    /// An inbox over a store that keeps deliveries of these numbers.
    struct Fixture {
        core: InboxCore,
        kept: std::ops::RangeInclusive<u64>,
        now: Instant,
        reads: usize,
    }

    impl Fixture {
        fn new(kept: std::ops::RangeInclusive<u64>) -> Self {
            Self { core: InboxCore::new(BOX_BYTES), kept, now: Instant::now(), reads: 0 }
        }

        fn read(&mut self, read: ReadRequest) -> Vec<KeptBox> {
            self.reads += 1;
            let numbers = self.kept.clone().filter(|number| *number > read.after);
            let kept = |number| KeptBox { number, sealed: vec![0; BOX_BYTES] };
            numbers.take(read.max).map(kept).collect()
        }

        /// All that is sent until there is nothing more to read, and what was said last of it.
        fn sent(&mut self) -> (Vec<u64>, Option<u32>) {
            let (mut sent, mut caught_up) = (Vec::new(), None);
            while let Some(read) = self.core.poll_read(self.now) {
                let read = self.read(read);
                self.core.handle_read(read);
                assert!(self.core.ready() * BOX_BYTES <= READ_BYTES);
                while let Some(kept) = self.core.poll_transmit() {
                    assert!(caught_up.is_none(), "it was said that all was sent");
                    sent.push(kept.number);
                }
                caught_up = self.core.poll_caught_up();
            }
            (sent, caught_up)
        }
    }

    fn numbers(range: std::ops::RangeInclusive<u64>) -> Vec<u64> {
        range.collect()
    }

    #[test]
    fn each_delivery_is_sent_once_and_few_are_held() {
        let mut inbox = Fixture::new(1..=100);
        assert_eq!(inbox.sent(), (vec![], None), "nobody has asked");
        inbox.core.handle_receive(1);
        assert_eq!(inbox.sent(), (numbers(1..=100), Some(1)));
        assert_eq!(inbox.sent(), (vec![], None));
        inbox.kept = 1..=103;
        inbox.core.handle_new();
        assert_eq!(inbox.sent(), (vec![101, 102, 103], None), "it was told before");
        inbox.core.handle_receive(2);
        assert_eq!(inbox.sent(), (numbers(1..=103), Some(2)));
    }

    #[test]
    fn however_often_a_client_asks_one_read_is_under_way() {
        let mut inbox = Fixture::new(1..=30);
        inbox.core.handle_receive(0);
        let read = inbox.core.poll_read(inbox.now).unwrap();
        for number in 1..100 {
            inbox.core.handle_receive(number);
            assert_eq!(inbox.core.poll_read(inbox.now), None);
        }
        // What was asked for last is read from the beginning, after what was under way.
        let read = inbox.read(read);
        inbox.core.handle_read(read);
        assert_eq!(inbox.sent(), (numbers(1..=30), Some(99)));
        assert_eq!(inbox.reads, 3);
    }

    #[test]
    fn a_client_that_asks_anew_is_not_told_that_it_got_what_it_asked_for_before() {
        let mut inbox = Fixture::new(1..=2);
        inbox.core.handle_receive(7);
        let read = inbox.core.poll_read(inbox.now).unwrap();
        // All of it is read, with nothing left behind it.
        let read = inbox.read(read);
        inbox.kept = 1..=3;
        inbox.core.handle_receive(8);
        inbox.core.handle_read(read);
        assert_eq!((inbox.core.poll_transmit(), inbox.core.poll_caught_up()), (None, None));
        let read = inbox.core.poll_read(inbox.now).unwrap();
        let read = inbox.read(read);
        inbox.core.handle_read(read);
        assert!(inbox.core.poll_transmit().is_some());
        inbox.core.handle_receive(9);
        assert_eq!((inbox.core.poll_transmit(), inbox.core.poll_caught_up()), (None, None));
        assert_eq!(inbox.sent(), (vec![1, 2, 3], Some(9)));
    }

    #[test]
    fn what_is_kept_while_the_store_is_read_is_read_next() {
        let mut inbox = Fixture::new(1..=2);
        inbox.core.handle_receive(1);
        let read = inbox.core.poll_read(inbox.now).unwrap();
        let read = inbox.read(read);
        inbox.kept = 1..=3;
        inbox.core.handle_new();
        inbox.core.handle_read(read);
        while inbox.core.poll_transmit().is_some() {}
        assert_eq!(inbox.core.poll_caught_up(), Some(1), "it came after it was asked for");
        assert_eq!(inbox.sent(), (vec![3], None));
    }

    #[test]
    fn a_store_that_fails_is_asked_again_after_a_while_and_nobody_is_told_before() {
        let mut inbox = Fixture::new(1..=3);
        inbox.core.handle_receive(1);
        assert!(inbox.core.poll_read(inbox.now).is_some());
        inbox.core.handle_read_failure(inbox.now);
        let retry_at = inbox.core.poll_timeout().unwrap();
        assert_eq!(retry_at, inbox.now + RETRY_AFTER);
        assert_eq!(inbox.sent(), (vec![], None));
        assert_eq!(inbox.core.poll_caught_up(), None);
        inbox.now = retry_at;
        assert_eq!(inbox.sent(), (vec![1, 2, 3], Some(1)));
        assert_eq!(inbox.core.poll_timeout(), None);
    }

    #[test]
    fn the_largest_boxes_are_sent_one_at_a_time() {
        let mut core = InboxCore::new(32_355);
        core.handle_receive(1);
        assert_eq!(core.poll_read(Instant::now()), Some(ReadRequest { after: 0, max: 1 }));
    }

    #[test]
    fn only_what_was_sent_can_be_confirmed_and_once() {
        let mut inbox = Fixture::new(1..=5);
        assert!(inbox.core.handle_confirm(vec![1, 2]).is_empty());
        inbox.core.handle_receive(1);
        inbox.sent();
        assert_eq!(inbox.core.handle_confirm(vec![1, 2, 9]), [1, 2]);
        assert_eq!(inbox.core.handle_confirm(vec![2, 3, 4, 4]), [3, 4]);
        // Asking again sends what is left once more, and nothing can be confirmed twice for it.
        inbox.core.handle_receive(2);
        inbox.sent();
        assert_eq!(inbox.core.handle_confirm(vec![5, 5]), [5]);
    }

    /// A client that confirms over a new connection what the old one has brought, and the gateway had
    /// let go of already.
    #[test]
    fn confirmations_of_an_older_connection_leave_those_of_the_new_one_alone() {
        let mut inbox = Fixture::new(31..=60);
        inbox.core.handle_receive(1);
        assert_eq!(inbox.sent().0, numbers(31..=60));
        assert!(inbox.core.handle_confirm(numbers(1..=30)).is_empty());
        assert_eq!(inbox.core.handle_confirm(numbers(31..=60)), numbers(31..=60));
    }

    #[test]
    fn the_numbers_of_a_connection_are_bounded() {
        let last = MAX_UNCONFIRMED as u64 + 2;
        let mut inbox = Fixture::new(1..=last);
        inbox.core.handle_receive(1);
        while inbox.core.poll_caught_up().is_none() {
            let read = inbox.core.poll_read(inbox.now).unwrap();
            // As `Fixture::read`, which would look at all numbers each time.
            let kept = |number| KeptBox { number, sealed: Vec::new() };
            inbox.core.handle_read((read.after + 1..=last).take(read.max).map(kept).collect());
            while inbox.core.poll_transmit().is_some() {}
        }
        assert!(inbox.core.handle_confirm(vec![1, 2]).is_empty());
        assert_eq!(inbox.core.handle_confirm(vec![3, last]), [3, last]);
    }
}
