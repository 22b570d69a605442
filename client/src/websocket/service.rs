//! What the websocket API asks of the client.

use std::future::Future;

use mixsocks_common::address::Address;
use mixsocks_common::message::fragment::MessageId;
use mixsocks_common::message::{FailReason, Received, ReceivedId, SendError, SenderTag};

use crate::messages::Messenger;

/// Sends and receives messages for local programs.
pub trait MessageService: Clone + Send + Sync + 'static {
    /// The address at which messages for these programs arrive.
    fn address(&self) -> Address;

    /// Bytes of a message that a full packet carries, of which queues are told; the same at any time.
    fn bytes_per_packet(&self) -> usize;

    /// Takes in a message for `recipient`, with `reply_surbs` SURBs for replies; may wait until there is
    /// room for it.
    ///
    /// # Errors
    /// [`SendError`] if it is not taken in: nothing is sent, and no event follows.
    fn send(
        &self,
        recipient: Address,
        message: Vec<u8>,
        reply_surbs: usize,
    ) -> impl Future<Output = Result<MessageId, SendError>> + Send;

    /// Takes in a reply to whoever gave SURBs under `sender_tag`; may wait until there is room for it.
    ///
    /// # Errors
    /// [`SendError`] if it is not taken in: nothing is sent, and no event follows.
    fn reply(
        &self,
        sender_tag: SenderTag,
        message: Vec<u8>,
    ) -> impl Future<Output = Result<MessageId, SendError>> + Send;

    /// Waits for what becomes of a message that was taken in; `None` when the client has stopped. Nothing
    /// is lost when the future is dropped.
    fn next_outcome(
        &self,
    ) -> impl Future<Output = Option<(MessageId, Result<(), FailReason>)>> + Send;

    /// Waits for a message that comes; `None` when the client has stopped.
    ///
    /// One future is awaited at a time, and nothing is lost when it is dropped. While none is awaited,
    /// messages wait in the service.
    fn next_received(&self) -> impl Future<Output = Option<Received>> + Send;

    /// A program has the message: it may be forgotten everywhere.
    fn taken(&self, received: ReceivedId);
}

impl MessageService for Messenger {
    fn address(&self) -> Address {
        Messenger::address(self)
    }

    fn bytes_per_packet(&self) -> usize {
        Messenger::bytes_per_packet(self)
    }

    async fn send(
        &self,
        recipient: Address,
        message: Vec<u8>,
        reply_surbs: usize,
    ) -> Result<MessageId, SendError> {
        Messenger::send(self, recipient, &message, reply_surbs).await
    }

    async fn reply(&self, sender_tag: SenderTag, message: Vec<u8>) -> Result<MessageId, SendError> {
        Messenger::reply(self, sender_tag, &message).await
    }

    async fn next_outcome(&self) -> Option<(MessageId, Result<(), FailReason>)> {
        Messenger::next_outcome(self).await
    }

    async fn next_received(&self) -> Option<Received> {
        Messenger::next_received(self).await
    }

    fn taken(&self, received: ReceivedId) {
        Messenger::taken(self, received);
    }
}
