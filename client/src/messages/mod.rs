//! Messages to anybody, and from anybody: what an application does with them.
//!
//! A [`Messenger`] stands alone ([`Messenger::connect`]) or on a client that opens streams too
//! ([`Client::messenger`]); then both use one identity, one link to the gateway, and the same tasks.
//! The rules are in `docs/messages.md`.

mod received_log;

use std::path::PathBuf;
use std::time::Duration;

use mixsocks_common::address::Address;
use mixsocks_common::message::fragment::MessageId;
use mixsocks_common::message::{
    FailReason, GIVE_UP_AFTER, MessageEvent, Received, ReceivedId, SendError, SenderTag,
};

pub use received_log::{MAX_LOGGED, ReceivedLog, ReceivedLogError};

use crate::client::{Client, ClientError};
use crate::endpoint::EndpointConfig;

/// The name that the log of received messages has in a client's directory.
pub const RECEIVED_LOG_FILE: &str = "received-messages.log";

/// Most messages that were sent and whose outcome was not fetched, those under way included. Beyond, who
/// sends waits.
pub const MAX_UNFETCHED: usize = 4096;

/// When it is written down that a message was received, which decides what a killed program loses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WriteDown {
    /// Before the application gets it: it comes at most once, and not again to a program that was killed
    /// before it had done its work.
    #[default]
    First,
    /// When the application has taken it: it comes at least once.
    WhenTaken,
}

/// How messages are handled.
#[derive(Debug, Clone)]
pub struct MessengerOptions {
    /// Where it is written down which messages were received, so that none is received again after a
    /// restart; `None` remembers it only while the program runs. Its directory must exist.
    pub received_log: Option<PathBuf>,
    /// When that is written.
    pub write_down: WriteDown,
    /// How long after its last progress a message is given up; at most
    /// [`MAX_GIVE_UP_AFTER`](mixsocks_common::message::MAX_GIVE_UP_AFTER), as recipients wait no longer
    /// for the rest of a message.
    pub give_up_after: Duration,
}

impl Default for MessengerOptions {
    fn default() -> Self {
        Self { received_log: None, write_down: WriteDown::First, give_up_after: GIVE_UP_AFTER }
    }
}

/// Sends and receives messages. Clones are the same one; it stops with [`Messenger::shutdown`], or when
/// the last clone is dropped and the client that it stands on.
///
/// Whoever sends has to fetch events or outcomes: when [`MAX_UNFETCHED`] messages have not been heard of,
/// [`Messenger::send`] and [`Messenger::reply`] wait.
#[derive(Debug, Clone)]
pub struct Messenger(Client);

impl Messenger {
    /// Connects to the gateway, registering if need be. No provider is needed. Unless the configuration
    /// says that messages are received, what comes stays at the gateway.
    ///
    /// # Errors
    /// [`ClientError`] says what is wrong.
    pub async fn connect(
        config: EndpointConfig,
        options: MessengerOptions,
    ) -> Result<Self, ClientError> {
        Client::start(config, Vec::new(), None, Some(options)).await.map(Self)
    }

    pub(crate) fn of(client: Client) -> Self {
        Self(client)
    }

    /// Where messages for this messenger go.
    pub fn address(&self) -> Address {
        self.0.address()
    }

    /// Bytes of a message that a full packet carries in this network.
    pub fn bytes_per_packet(&self) -> usize {
        self.0.shared().message_bytes_per_packet()
    }

    /// Takes in a message for `recipient`, with `reply_surbs` SURBs for replies; waits until there is room
    /// for it. [`MessageEvent::Delivered`] or [`MessageEvent::Failed`] follows.
    ///
    /// # Errors
    /// [`SendError`] if it is not taken in, never [`SendError::Full`]: nothing is sent, and no event follows.
    pub async fn send(
        &self,
        recipient: Address,
        message: &[u8],
        reply_surbs: usize,
    ) -> Result<MessageId, SendError> {
        self.0.shared().send_message(recipient, message, reply_surbs).await
    }

    /// Takes in a reply to whoever gave SURBs under `sender_tag`, as [`Messenger::send`] does.
    ///
    /// # Errors
    /// As [`Messenger::send`].
    pub async fn reply(
        &self,
        sender_tag: SenderTag,
        message: &[u8],
    ) -> Result<MessageId, SendError> {
        self.0.shared().reply_message(sender_tag, message).await
    }

    /// Waits for what happens next; `None` when the messenger has stopped. Nothing is lost when the future
    /// is dropped. A message that is received is written down before, and confirmed with
    /// [`Messenger::taken`]; what is not fetched fills the client's share at its gateway.
    pub async fn next_event(&self) -> Option<MessageEvent> {
        self.0.shared().next_message_event().await
    }

    /// Waits for what becomes of a message that was sent, as [`Messenger::next_event`] does; messages that
    /// came wait.
    pub async fn next_outcome(&self) -> Option<(MessageId, Result<(), FailReason>)> {
        self.0.shared().next_outcome().await
    }

    /// Waits for a message, as [`Messenger::next_event`] does; what became of those that were sent waits.
    pub async fn next_received(&self) -> Option<Received> {
        self.0.shared().next_received().await
    }

    /// How many parts of messages the gateway has handed over so far. While that grows, a message comes, even
    /// if it is long and the line slow.
    pub fn deliveries(&self) -> u64 {
        self.0.shared().deliveries()
    }

    /// The application has the message: it may be forgotten everywhere.
    pub fn taken(&self, received: ReceivedId) {
        self.0.shared().message_taken(received);
    }

    /// Stops, and with it the client that it stands on. What was not delivered is not sent any more.
    pub async fn shutdown(&self) {
        self.0.shutdown().await;
    }
}
