//! What became of the messages of programs, and how much of them is still on its way.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mixsocks_common::message::fragment::MessageId;
use tokio::sync::mpsc::OwnedPermit;

use super::answer::{Outcome, outcome_message};
use super::connection::Writing;
use super::request::RequestId;

/// Outcomes that are kept because they may be of a message whose sender is just about to be told its
/// id. That takes no longer than a switch of tasks, so the oldest may go.
const MAX_EARLY: usize = 1024;

/// A connection of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConnectionNumber(pub(super) u64);

/// A message that is on its way.
pub(super) struct Tracked {
    pub(super) connection: ConnectionNumber,
    /// The queue that it is counted in.
    pub(super) connection_id: Option<u64>,
    /// Who wants to know what becomes of it.
    pub(super) id: Option<RequestId>,
    /// A place for the answer. Each message has one, which bounds how many there are.
    pub(super) place: OwnedPermit<Writing>,
    pub(super) bytes: usize,
}

impl Tracked {
    fn tell(self, outcome: Outcome) {
        if let Some(id) = self.id {
            self.place.send(Writing::Message(outcome_message(&id, outcome)));
        }
    }
}

/// The messages of all connections that are on their way.
pub(super) struct Tracker {
    state: Mutex<State>,
    /// Bytes of a message that a full packet carries; queues are told in packets.
    bytes_per_packet: usize,
}

#[derive(Default)]
struct State {
    messages: BTreeMap<MessageId, Tracked>,
    /// Messages that the service is just taking in.
    begun: usize,
    /// What happened meanwhile to messages that are not known yet.
    early: VecDeque<(MessageId, Outcome)>,
}

/// A message that the service is just taking in.
pub(super) struct Begun<'a>(&'a Tracker);

impl Tracker {
    pub(super) fn new(bytes_per_packet: usize) -> Self {
        Self { state: Mutex::default(), bytes_per_packet }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called before a message is handed to the service: its outcome may be known before its id.
    pub(super) fn begin(&self) -> Begun<'_> {
        self.state().begun += 1;
        Begun(self)
    }

    /// A message was delivered or has failed.
    pub(super) fn finished(&self, message: MessageId, outcome: Outcome) {
        let mut state = self.state();
        match state.messages.remove(&message) {
            Some(tracked) => tracked.tell(outcome),
            None if state.begun > 0 => {
                if state.early.len() == MAX_EARLY {
                    state.early.pop_front();
                }
                state.early.push_back((message, outcome));
            }
            None => {}
        }
    }

    /// How many packets' worth of messages of a connection's queue are not delivered yet.
    pub(super) fn queue_length(&self, connection: ConnectionNumber, connection_id: u64) -> u64 {
        let state = self.state();
        let queued = state.messages.values().filter(|tracked| {
            tracked.connection == connection && tracked.connection_id == Some(connection_id)
        });
        let packets = queued.map(|tracked| tracked.bytes.div_ceil(self.bytes_per_packet));
        u64::try_from(packets.sum::<usize>()).unwrap_or(u64::MAX)
    }

    /// A connection has ended: nobody wants to know any more.
    pub(super) fn left(&self, connection: ConnectionNumber) {
        self.state().messages.retain(|_, tracked| tracked.connection != connection);
    }
}

impl Begun<'_> {
    /// The service has taken the message in.
    pub(super) fn sent(self, message: MessageId, tracked: Tracked) {
        let mut state = self.0.state();
        match state.early.iter().position(|(early, _)| *early == message) {
            Some(at) => {
                if let Some((_, outcome)) = state.early.remove(at) {
                    tracked.tell(outcome);
                }
            }
            None => {
                state.messages.insert(message, tracked);
            }
        }
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.begun -= 1;
        if state.begun == 0 {
            state.early.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    const BYTES_PER_PACKET: usize = 3000;
    const FIRST: ConnectionNumber = ConnectionNumber(1);
    const SECOND: ConnectionNumber = ConnectionNumber(2);

    fn message(number: u16) -> MessageId {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&number.to_be_bytes());
        MessageId(id)
    }

    struct Fixture {
        tracker: Tracker,
        sender: mpsc::Sender<Writing>,
        told: mpsc::Receiver<Writing>,
    }

    impl Fixture {
        fn new() -> Self {
            let (sender, told) = mpsc::channel(8);
            Self { tracker: Tracker::new(BYTES_PER_PACKET), sender, told }
        }

        fn tracked(&self, connection: ConnectionNumber, queue: u64, bytes: usize) -> Tracked {
            let place = self.sender.clone().try_reserve_owned().unwrap();
            let id = Some(RequestId::Natural(queue));
            Tracked { connection, connection_id: Some(queue), id, place, bytes }
        }

        fn told(&mut self) -> Option<String> {
            match self.told.try_recv().ok()? {
                Writing::Message(message) => Some(message.into_text().unwrap().to_string()),
                Writing::Flush => panic!("nobody sent a ping"),
            }
        }
    }

    #[test]
    fn whoever_asked_is_told_once() {
        let mut fixture = Fixture::new();
        let tracked = fixture.tracked(FIRST, 7, 1);
        fixture.tracker.begin().sent(message(1), tracked);
        fixture.tracker.finished(message(2), Ok(()));
        assert_eq!(fixture.told(), None);
        fixture.tracker.finished(message(1), Ok(()));
        assert_eq!(fixture.told().unwrap(), r#"{"type":"delivered","id":7}"#);
        fixture.tracker.finished(message(1), Ok(()));
        assert_eq!(fixture.told(), None);
    }

    #[test]
    fn an_outcome_may_come_before_the_id() {
        let mut fixture = Fixture::new();
        let begun = fixture.tracker.begin();
        for number in 0..2000 {
            fixture.tracker.finished(message(number), Ok(()));
        }
        assert_eq!(fixture.tracker.state().early.len(), MAX_EARLY);
        begun.sent(message(1999), fixture.tracked(FIRST, 7, 1));
        assert!(fixture.told().is_some());
        assert!(fixture.tracker.state().early.is_empty() && fixture.tracker.state().begun == 0);
        fixture.tracker.finished(message(3), Ok(()));
        assert!(fixture.tracker.state().early.is_empty());
    }

    #[test]
    fn queues_are_counted_in_packets_and_by_connection() {
        let fixture = Fixture::new();
        for (number, connection, queue, bytes) in [
            (1, FIRST, 7, 1),
            (2, FIRST, 7, BYTES_PER_PACKET + 1),
            (3, FIRST, 8, 1),
            (4, SECOND, 7, 1),
        ] {
            let tracked = fixture.tracked(connection, queue, bytes);
            fixture.tracker.begin().sent(message(number), tracked);
        }
        assert_eq!(fixture.tracker.queue_length(FIRST, 7), 3);
        assert_eq!(fixture.tracker.queue_length(SECOND, 7), 1);
        fixture.tracker.finished(message(2), Ok(()));
        assert_eq!(fixture.tracker.queue_length(FIRST, 7), 1);
        fixture.tracker.left(FIRST);
        assert_eq!(fixture.tracker.queue_length(FIRST, 7), 0);
        assert_eq!(fixture.tracker.state().messages.len(), 1);
    }
}
