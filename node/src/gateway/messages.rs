//! Message packets: what they hold is kept for a client, and then acknowledged.
//!
//! peeling → [`Messages`] → group commit → [`Answers`] → the mix that the sender's SURB names. There
//! is no queue but that of the group commit: at most as many acknowledgements are made at a time as
//! a batch has boxes, and they go into the links' own bounded queues. If the gateway ends before one
//! is sent, the sender sends its packet again.

use std::sync::Arc;

use mixsocks_common::keys::Identity;
use mixsocks_common::message::packet::{ACK_LEN, AckStatus, MessageContents, MessageSizes};
use mixsocks_sphinx::{
    HopAddress, Identifier, Payload, Surb, max_plaintext, open_payloads, use_surbs,
};
use tokio::sync::oneshot;

use super::carrier::Uplink;
use super::clients::Clients;
use super::inbox::{Inbox, InboxReader};
use super::store::{Answer, Change, Changes, Outcome, Store};
use crate::counters::{Counters, DropReason};

/// Acknowledgements that are made at a time: no more packets than needed are held in memory.
const ACKS_AT_ONCE: usize = 64;

/// What waits for the outcome of a change.
pub(super) enum Waiting {
    Nobody,
    /// The sender of a box.
    Sender(Surb),
    /// Somebody who registers.
    Registration(oneshot::Sender<Option<Outcome>>),
}

/// A packet whose route ends at this gateway.
pub(super) struct FinalPacket {
    pub(super) destination: HopAddress,
    pub(super) identifier: Identifier,
    pub(super) payload: Payload,
}

/// Where message packets and confirmations go, and deliveries come from.
pub(super) struct Messages {
    pub(super) store: Arc<dyn Store>,
    pub(super) changes: Changes<Waiting>,
    sizes: MessageSizes,
    counters: Arc<Counters>,
}

impl Messages {
    pub(super) fn new(
        store: Arc<dyn Store>,
        changes: Changes<Waiting>,
        payload_bytes: usize,
        counters: Arc<Counters>,
    ) -> Self {
        let sizes = MessageSizes::new(max_plaintext(payload_bytes));
        let sizes = sizes.expect("the packets of every network hold messages");
        Self { store, changes, sizes, counters }
    }

    /// Takes message packets: hands their boxes to the store, or drops and counts them. Never waits.
    pub(super) fn handle_packets(&self, packets: Vec<FinalPacket>) {
        let heads: Vec<_> =
            packets.iter().map(|packet| (packet.destination, packet.identifier)).collect();
        let payloads = packets.into_iter().map(|packet| packet.payload).collect();
        for ((client, identifier), contents) in heads.into_iter().zip(open_payloads(payloads)) {
            let taken = contents
                .ok()
                .filter(|_| identifier == Identifier::default())
                .ok_or(DropReason::MalformedMessage)
                .and_then(|contents| self.keep(client, &contents));
            if let Err(reason) = taken {
                self.counters.add_drop(reason);
            }
        }
    }

    fn keep(&self, client: HopAddress, contents: &[u8]) -> Result<(), DropReason> {
        let MessageContents { ack_surb, sealed_box } = MessageContents::parse(contents, self.sizes)
            .map_err(|_| DropReason::MalformedMessage)?;
        let change = Change::Keep { client, sealed: sealed_box.to_vec() };
        let pushed = self.changes.try_push(change, Waiting::Sender(ack_surb));
        pushed.map_err(|_| DropReason::StoreBusy)
    }

    /// The deliveries for a new connection.
    pub(super) fn inbox(&self) -> Inbox {
        Inbox::new(self.sizes.box_bytes())
    }

    /// Reads them for a client.
    pub(super) fn inbox_reader(&self, client: &Identity, inbox: Arc<Inbox>) -> InboxReader {
        InboxReader::new(*client.as_bytes(), self.store.clone(), inbox)
    }

    /// Lets deliveries go that a client has taken. Waits while too much waits for the disk.
    pub(super) async fn confirm(&self, client: &Identity, numbers: Vec<u64>) {
        let change = Change::Confirm { client: *client.as_bytes(), numbers };
        self.changes.push(change, Waiting::Nobody).await;
    }

    /// Stores a client's token; `None` when that fails.
    pub(super) async fn register(&self, change: Change) -> Option<Outcome> {
        let (answer, outcome) = oneshot::channel();
        self.changes.push(change, Waiting::Registration(answer)).await;
        // Without an answer the gateway stops.
        outcome.await.ok().flatten()
    }
}

/// Tells those who wait what became of their changes.
pub(super) struct Answers {
    pub(super) uplink: Arc<Uplink>,
    pub(super) clients: Arc<Clients>,
    pub(super) payload_bytes: usize,
}

impl Answers {
    pub(super) fn handle(&self, answers: Vec<Answer<Waiting>>) {
        let mut acks = Vec::new();
        for Answer { change, waiting, outcome } in answers {
            match waiting {
                Waiting::Nobody => {}
                Waiting::Sender(surb) => {
                    if let (Change::Keep { client, .. }, Some(Outcome::Done)) = (&change, outcome) {
                        self.clients.notify(client);
                    }
                    acks.push((surb, status(outcome).to_bytes()));
                }
                Waiting::Registration(answer) => {
                    // Whoever waited may be gone.
                    let _ = answer.send(outcome);
                }
            }
        }
        while !acks.is_empty() {
            let rest = acks.split_off(acks.len().min(ACKS_AT_ONCE));
            self.send(std::mem::replace(&mut acks, rest));
        }
    }

    fn send(&self, acks: Vec<(Surb, [u8; ACK_LEN])>) {
        let (surbs, contents): (Vec<_>, Vec<_>) = acks.into_iter().unzip();
        let requests = surbs.into_iter().zip(contents.iter().map(|contents| &contents[..]));
        for packet in use_surbs(self.payload_bytes, requests.collect()) {
            let (first_hop, packet) = packet.expect("an acknowledgement fits every payload");
            self.uplink.send(&first_hop, packet);
        }
    }
}

/// How an acknowledgement says what became of a box.
fn status(outcome: Option<Outcome>) -> AckStatus {
    match outcome {
        Some(Outcome::Done) => AckStatus::Stored,
        Some(Outcome::ClientFull) => AckStatus::ShareFull,
        Some(Outcome::UnknownClient) => AckStatus::UnknownClient,
        Some(Outcome::StoreFull) | None => AckStatus::StoreUnavailable,
    }
}
