//! A service in memory.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use mixsocks_common::address::Address;
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::message::fragment::{Fragment, Hour, MessageId};
use mixsocks_common::message::packet::MessageSizes;
use mixsocks_common::message::{
    Body, FailReason, MessageEvent, MessageOptions, Messages, Received, ReceivedId, SendError,
    Sender, SenderTag, TakenIds,
};
use mixsocks_common::topology::UnixTime;
use mixsocks_sphinx::SecretKey;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use super::MessageService;

/// Bytes of a message in a packet of this network, which is none that there is.
pub(super) const BYTES_PER_PACKET: usize = 1000;

/// An address, the same in all tests of a process.
pub(super) fn address() -> Address {
    static ADDRESS: OnceLock<Address> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let mut rng = rand::rng();
        Address {
            identity: IdentityKey::generate(&mut rng).identity(),
            encryption: SecretKey::generate(&mut rng).public_key().into(),
            gateway: IdentityKey::generate(&mut rng).identity(),
        }
    })
}

/// Names a message; those of different numbers differ. Only a core makes such names.
fn received_id(number: u64) -> ReceivedId {
    let sizes = MessageSizes::new(2031).unwrap();
    let options = MessageOptions {
        sizes,
        give_up_after: Duration::from_secs(1),
        wall: UnixTime(0),
        validity: UnixTime(0)..=UnixTime(u64::MAX),
        unknown_delays: Duration::ZERO,
        known: TakenIds::default(),
    };
    let now = Instant::now();
    let mut core = Messages::<u64>::new(now, options);
    let bytes = Body::Plain(b"x").to_bytes();
    let fragment =
        Fragment { id: message_id(number), hour: Hour(0), index: 0, count: 1, bytes: &bytes };
    core.handle_delivery(now, 1, &fragment.to_bytes(sizes));
    match core.poll_event() {
        Some(MessageEvent::Received { received, .. }) => received,
        other => panic!("{other:?}"),
    }
}

pub(super) fn message_id(number: u64) -> MessageId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    MessageId(id)
}

/// What became of a message.
type Outcome = (MessageId, Result<(), FailReason>);

/// What a program has sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Message { recipient: Address, message: Vec<u8>, reply_surbs: usize },
    Reply { sender_tag: SenderTag, message: Vec<u8> },
}

/// The service as the API sees it. Messages get ids from 0 on.
#[derive(Clone)]
pub(super) struct Memory(Arc<Inner>);

struct Inner {
    sent: UnboundedSender<Sent>,
    number: Mutex<u64>,
    refusal: Mutex<Option<SendError>>,
    outcomes: tokio::sync::Mutex<UnboundedReceiver<Outcome>>,
    arrivals: tokio::sync::Mutex<UnboundedReceiver<Received>>,
    taken: UnboundedSender<ReceivedId>,
    handed_over: UnboundedSender<()>,
}

/// The service as a test sees it.
pub(super) struct Control {
    pub(super) sent: UnboundedReceiver<Sent>,
    outcomes: UnboundedSender<Outcome>,
    arrivals: UnboundedSender<Received>,
    taken: UnboundedReceiver<ReceivedId>,
    /// A message that came was taken by the API.
    pub(super) handed_over: UnboundedReceiver<()>,
    inner: Arc<Inner>,
}

pub(super) fn memory() -> (Memory, Control) {
    let (sent_in, sent) = mpsc::unbounded_channel();
    let (outcomes, outcomes_out) = mpsc::unbounded_channel();
    let (arrivals, arrivals_out) = mpsc::unbounded_channel();
    let (taken_in, taken) = mpsc::unbounded_channel();
    let (handed_in, handed_over) = mpsc::unbounded_channel();
    let inner = Arc::new(Inner {
        sent: sent_in,
        number: Mutex::default(),
        refusal: Mutex::default(),
        outcomes: tokio::sync::Mutex::new(outcomes_out),
        arrivals: tokio::sync::Mutex::new(arrivals_out),
        taken: taken_in,
        handed_over: handed_in,
    });
    let control = Control { sent, outcomes, arrivals, taken, handed_over, inner: inner.clone() };
    (Memory(inner), control)
}

impl Control {
    /// Message `number` comes.
    pub(super) fn arrive(&self, number: u64, message: &[u8], sender: Sender) {
        let (received, message) = (received_id(number), message.to_vec());
        self.arrivals.send(Received { received, message, sender }).unwrap();
    }

    /// Message `number`, which was sent, is delivered or has failed.
    pub(super) fn finish(&self, number: u64, outcome: Result<(), FailReason>) {
        self.outcomes.send((message_id(number), outcome)).unwrap();
    }

    /// Waits until message `number` is taken.
    pub(super) async fn taken(&mut self, number: u64) {
        let taken = crate::testing::within(self.taken.recv()).await;
        assert_eq!(taken, Some(received_id(number)));
    }

    pub(super) fn nothing_was_taken(&mut self) -> bool {
        self.taken.try_recv().is_err()
    }

    /// The next messages are refused.
    pub(super) fn refuse(&self, error: Option<SendError>) {
        *self.inner.refusal.lock().unwrap() = error;
    }
}

impl Memory {
    fn take_in(&self, sent: Sent) -> Result<MessageId, SendError> {
        if let Some(error) = *self.0.refusal.lock().unwrap() {
            return Err(error);
        }
        let mut number = self.0.number.lock().unwrap();
        let id = message_id(*number);
        *number += 1;
        // A test may look at none of them.
        let _ = self.0.sent.send(sent);
        Ok(id)
    }
}

impl MessageService for Memory {
    fn address(&self) -> Address {
        address()
    }

    fn bytes_per_packet(&self) -> usize {
        BYTES_PER_PACKET
    }

    async fn send(
        &self,
        recipient: Address,
        message: Vec<u8>,
        reply_surbs: usize,
    ) -> Result<MessageId, SendError> {
        self.take_in(Sent::Message { recipient, message, reply_surbs })
    }

    async fn reply(&self, sender_tag: SenderTag, message: Vec<u8>) -> Result<MessageId, SendError> {
        self.take_in(Sent::Reply { sender_tag, message })
    }

    async fn next_outcome(&self) -> Option<Outcome> {
        self.0.outcomes.lock().await.recv().await
    }

    async fn next_received(&self) -> Option<Received> {
        let received = self.0.arrivals.lock().await.recv().await;
        // A test may not look.
        let _ = self.0.handed_over.send(());
        received
    }

    fn taken(&self, received: ReceivedId) {
        // A test may be over.
        let _ = self.0.taken.send(received);
    }
}
