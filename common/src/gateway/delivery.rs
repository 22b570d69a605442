//! What one side holds for the other: packets that wait to be sent, and packets that were sent and
//! may have to be sent again.
//!
//! A [`Delivery`] numbers the packets of one stream in the order in which they are first sent; the
//! other side counts what it receives and states the count in every frame. After a cut it states it
//! once more, and what it has not received is sent again, from that count on. So within one stream
//! each packet arrives at most once and in order. Gateways use it for each client, clients use it
//! towards their gateway.
//!
//! A packet is held for at most [`HOLD_TIME`], and all together take at most [`MAX_HELD_BYTES`].
//! Beyond that the oldest packet that was sent before is forgotten: most likely it has arrived, and
//! it is lost only if the connection is cut just then. Only when nothing but unsent packets are
//! held is a new one refused.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::message::StreamId;

/// Most bytes of packets held for one client. At 10 MB/s it is what a reconnect within 0.4 s needs.
pub const MAX_HELD_BYTES: usize = 4 * 1024 * 1024;

/// A packet is held for no longer: its sender has given it up by then. A client that was away for
/// as long is gone.
pub const HOLD_TIME: Duration = Duration::from_secs(10);

/// Packets for one receiver. Poll [`Self::poll_transmit`] after [`Self::push`], [`Self::resume`] and
/// [`Self::restart`], and call [`Self::handle_timeout`] at [`Self::poll_timeout`].
#[derive(Debug)]
pub struct Delivery<P> {
    stream: StreamId,
    /// Since when there is no connection; `None` while there is one.
    absent_since: Option<Instant>,
    /// In the order of their arrival; the first `sent` of them were sent.
    held: VecDeque<Held<P>>,
    max_packets: usize,
    sent: usize,
    /// Packets of the stream that were sent and forgotten, and are not confirmed: older than `held`.
    forgotten: u64,
    /// Packets of the stream that the receiver has confirmed.
    confirmed: u64,
    lost: u64,
}

#[derive(Debug)]
struct Held<P> {
    packet: P,
    since: Instant,
}

/// Why a packet was not taken; it is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The receiver has been away for [`HOLD_TIME`].
    #[error("the receiver is gone")]
    Gone,
    /// [`MAX_HELD_BYTES`] wait to be sent.
    #[error("too many packets wait for the receiver")]
    Full,
}

/// A receiver states a count that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer says that it received {stated} packets, which must be {confirmed} to {sent}")]
pub struct CounterError {
    /// What it states.
    pub stated: u64,
    /// What it has stated before.
    pub confirmed: u64,
    /// How many were sent.
    pub sent: u64,
}

impl<P> Delivery<P> {
    /// For a receiver that has just connected, of packets of `packet_bytes` bytes.
    pub fn new(stream: StreamId, packet_bytes: usize) -> Self {
        Self {
            stream,
            absent_since: None,
            held: VecDeque::new(),
            max_packets: (MAX_HELD_BYTES / packet_bytes.max(1)).max(1),
            sent: 0,
            forgotten: 0,
            confirmed: 0,
            lost: 0,
        }
    }

    /// The stream that is being sent.
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// How many packets are held.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether no packet is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether the receiver has been away for [`HOLD_TIME`], so that nothing is taken for it any
    /// more.
    pub fn is_gone(&self, now: Instant) -> bool {
        self.absent_since.is_some_and(|since| now >= since + HOLD_TIME)
    }

    /// Takes a packet.
    ///
    /// # Errors
    /// [`PushError`]; the packet is dropped.
    pub fn push(&mut self, packet: P, now: Instant) -> Result<(), PushError> {
        self.handle_timeout(now);
        if self.is_gone(now) {
            return Err(PushError::Gone);
        }
        if self.held.len() >= self.max_packets {
            if self.sent == 0 {
                return Err(PushError::Full);
            }
            self.drop_oldest();
        }
        self.held.push_back(Held { packet, since: now });
        Ok(())
    }

    /// The next packet to send over the connection, if there are both.
    pub fn poll_transmit(&mut self) -> Option<&P> {
        if self.absent_since.is_some() {
            return None;
        }
        let next = self.held.get(self.sent)?;
        self.sent += 1;
        Some(&next.packet)
    }

    /// Takes the count that the receiver states in a frame.
    ///
    /// # Errors
    /// [`CounterError`] when it goes backwards or beyond what was sent; nothing changes.
    pub fn confirm(&mut self, stated: u64) -> Result<(), CounterError> {
        let sent = self.confirmed + self.forgotten + self.sent as u64;
        if !(self.confirmed..=sent).contains(&stated) {
            return Err(CounterError { stated, confirmed: self.confirmed, sent });
        }
        let newly = stated - self.confirmed;
        let of_forgotten = newly.min(self.forgotten);
        self.forgotten -= of_forgotten;
        let of_held = usize::try_from(newly - of_forgotten).expect("at most what is held");
        self.held.drain(..of_held);
        self.sent -= of_held;
        self.confirmed = stated;
        Ok(())
    }

    /// The connection is cut.
    pub fn detach(&mut self, now: Instant) {
        self.absent_since.get_or_insert(now);
    }

    /// The receiver is back and goes on with the stream, of which it has received `received`
    /// packets. What it has not received will be sent again.
    ///
    /// # Errors
    /// [`CounterError`] as in [`Self::confirm`]; nothing changes.
    pub fn resume(&mut self, received: u64) -> Result<(), CounterError> {
        self.confirm(received)?;
        // What is held gets the numbers that follow the receiver's count.
        self.lost += std::mem::take(&mut self.forgotten);
        self.sent = 0;
        self.absent_since = None;
        Ok(())
    }

    /// The receiver starts a new stream. What was sent before is given up, as it may have arrived;
    /// what was not goes out in the new stream.
    pub fn restart(&mut self, stream: StreamId) {
        self.lost += self.forgotten + self.sent as u64;
        self.held.drain(..self.sent);
        self.stream = stream;
        self.sent = 0;
        self.forgotten = 0;
        self.confirmed = 0;
        self.absent_since = None;
    }

    /// When to call [`Self::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.held.front().map(|held| held.since + HOLD_TIME)
    }

    /// Lets go of what was held for [`HOLD_TIME`].
    pub fn handle_timeout(&mut self, now: Instant) {
        while self.poll_timeout().is_some_and(|due| now >= due) {
            self.drop_oldest();
        }
    }

    /// How many packets were given up since the last call: never sent within [`HOLD_TIME`], or
    /// sent, lost with a connection and forgotten by then.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    fn drop_oldest(&mut self) {
        if self.held.pop_front().is_none() {
            return;
        }
        if self.sent > 0 {
            self.sent -= 1;
            self.forgotten += 1;
        } else {
            self.lost += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// So large that three packets are the limit.
    const PACKET_BYTES: usize = MAX_HELD_BYTES / 3;

    fn stream(id: u64) -> StreamId {
        StreamId::new(id).unwrap()
    }

    fn delivery() -> Delivery<u64> {
        Delivery::new(stream(1), PACKET_BYTES)
    }

    fn transmit(delivery: &mut Delivery<u64>) -> Vec<u64> {
        std::iter::from_fn(|| delivery.poll_transmit().copied()).collect()
    }

    #[test]
    fn confirmed_packets_are_let_go_and_the_rest_is_sent_again() {
        let (mut delivery, now) = (delivery(), Instant::now());
        (0..3).for_each(|n| delivery.push(n, now).unwrap());
        assert_eq!(transmit(&mut delivery), [0, 1, 2]);
        delivery.confirm(1).unwrap();
        assert_eq!(delivery.len(), 2);
        delivery.detach(now);
        delivery.push(3, now).unwrap();
        assert_eq!(transmit(&mut delivery), []);
        delivery.resume(2).unwrap();
        assert_eq!(transmit(&mut delivery), [2, 3]);
        delivery.confirm(4).unwrap();
        assert!(delivery.is_empty());
        assert_eq!(delivery.take_lost(), 0);
    }

    #[test]
    fn lies_about_the_count_change_nothing() {
        let (mut delivery, now) = (delivery(), Instant::now());
        (0..3).for_each(|n| delivery.push(n, now).unwrap());
        assert_eq!(delivery.poll_transmit(), Some(&0));
        assert_eq!(delivery.poll_transmit(), Some(&1));
        delivery.confirm(1).unwrap();
        for stated in [0, 3, u64::MAX] {
            let error = CounterError { stated, confirmed: 1, sent: 2 };
            assert_eq!(delivery.confirm(stated), Err(error));
            assert_eq!(delivery.resume(stated), Err(error));
        }
        assert_eq!(delivery.confirm(1), Ok(()));
        assert_eq!(transmit(&mut delivery), [2]);
    }

    #[test]
    fn a_full_delivery_forgets_what_was_sent_and_refuses_when_nothing_was() {
        let (mut delivery, now) = (delivery(), Instant::now());
        (0..3).for_each(|n| delivery.push(n, now).unwrap());
        assert_eq!(delivery.push(9, now), Err(PushError::Full));
        transmit(&mut delivery);
        delivery.push(3, now).unwrap();
        assert_eq!(delivery.len(), 3);
        // The first one is forgotten; it did not arrive, so it is lost when the connection is cut.
        assert_eq!(delivery.take_lost(), 0);
        delivery.detach(now);
        delivery.resume(0).unwrap();
        assert_eq!(delivery.take_lost(), 1);
        assert_eq!(transmit(&mut delivery), [1, 2, 3]);
        delivery.confirm(3).unwrap();
        assert!(delivery.is_empty());
    }

    #[test]
    fn nothing_is_held_longer_than_its_time() {
        let (mut delivery, start) = (delivery(), Instant::now());
        delivery.push(0, start).unwrap();
        transmit(&mut delivery);
        delivery.push(1, start).unwrap();
        let due = delivery.poll_timeout().unwrap();
        assert_eq!(due, start + HOLD_TIME);
        delivery.handle_timeout(due - Duration::from_nanos(1));
        assert_eq!(delivery.len(), 2);
        delivery.handle_timeout(due);
        assert_eq!((delivery.len(), delivery.poll_timeout()), (0, None));
        // One was never sent; the other may have arrived, and did.
        assert_eq!(delivery.take_lost(), 1);
        delivery.confirm(1).unwrap();
        assert_eq!(delivery.take_lost(), 0);
    }

    #[test]
    fn an_absent_receiver_is_gone_after_its_time() {
        let (mut delivery, start) = (delivery(), Instant::now());
        delivery.detach(start);
        let late = start + HOLD_TIME;
        delivery.detach(late);
        assert_eq!(delivery.push(0, late - Duration::from_nanos(1)), Ok(()));
        assert_eq!(delivery.push(1, late), Err(PushError::Gone));
        assert!(delivery.is_gone(late));
    }

    #[test]
    fn a_new_stream_repeats_nothing() {
        let (mut delivery, now) = (delivery(), Instant::now());
        (0..2).for_each(|n| delivery.push(n, now).unwrap());
        transmit(&mut delivery);
        delivery.detach(now);
        delivery.push(2, now).unwrap();
        delivery.restart(stream(2));
        assert_eq!(delivery.take_lost(), 2);
        assert_eq!(transmit(&mut delivery), [2]);
        delivery.confirm(1).unwrap();
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Push,
        /// The network carries so many packets that were sent.
        Carry(usize),
        /// The receiver's count reaches the sender.
        Confirm,
        Cut,
        Reconnect,
        /// The receiver has forgotten its stream.
        Restart,
        Wait(u64),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            6 => Just(Operation::Push),
            4 => (1usize..5).prop_map(Operation::Carry),
            3 => Just(Operation::Confirm),
            1 => Just(Operation::Cut),
            2 => Just(Operation::Reconnect),
            1 => Just(Operation::Restart),
            2 => (0u64..6_000).prop_map(Operation::Wait),
        ]
    }

    proptest! {
        #[test]
        fn each_packet_arrives_at_most_once_and_in_order(
            operations in proptest::collection::vec(operation(), 1..200),
        ) {
            const LIMIT: usize = 3;
            let mut delivery = delivery();
            let mut now = Instant::now();
            let mut connected = true;
            let mut on_the_way = VecDeque::new();
            let mut streams = 1;
            let (mut pushed, mut received, mut lost, mut refused) = (0u64, Vec::new(), 0, 0u64);
            let mut received_in_stream = 0;
            for operation in operations {
                match operation {
                    Operation::Push => {
                        refused += u64::from(delivery.push(pushed, now).is_err());
                        pushed += 1;
                    }
                    Operation::Carry(count) => {
                        on_the_way.extend(std::iter::from_fn(|| delivery.poll_transmit().copied()));
                        for packet in on_the_way.drain(..count.min(on_the_way.len())) {
                            received.push(packet);
                            received_in_stream += 1;
                        }
                    }
                    Operation::Confirm if connected => {
                        prop_assert_eq!(delivery.confirm(received_in_stream), Ok(()));
                    }
                    Operation::Confirm => {}
                    Operation::Cut => {
                        connected = false;
                        on_the_way.clear();
                        delivery.detach(now);
                    }
                    Operation::Reconnect => {
                        connected = true;
                        on_the_way.clear();
                        prop_assert_eq!(delivery.resume(received_in_stream), Ok(()));
                    }
                    Operation::Restart => {
                        connected = true;
                        on_the_way.clear();
                        streams += 1;
                        received_in_stream = 0;
                        delivery.restart(stream(streams));
                    }
                    Operation::Wait(millis) => {
                        now += Duration::from_millis(millis);
                        delivery.handle_timeout(now);
                        prop_assert!(delivery.poll_timeout().is_none_or(|due| due > now));
                    }
                }
                lost += delivery.take_lost();
                prop_assert!(delivery.len() <= LIMIT);
                // Strictly rising: no duplicates and no reordering, over all streams.
                prop_assert!(received.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", received);
            }
            // Once everything has arrived, each packet is received, lost or refused; a packet that
            // was given up by a restart may be both lost and received.
            delivery.resume(received_in_stream).unwrap();
            received.extend(std::iter::from_fn(|| delivery.poll_transmit().copied()));
            lost += delivery.take_lost();
            prop_assert!(received.len() as u64 + lost + refused >= pushed);
            if streams == 1 {
                prop_assert_eq!(received.len() as u64 + lost + refused, pushed);
            }
        }
    }
}
