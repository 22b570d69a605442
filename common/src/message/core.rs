//! Both ends of messages in one core.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use mixsocks_sphinx::{Identifier, Surb};
use rand::{Rng, RngExt};
use zeroize::Zeroizing;

use super::awaited::{AckSurbs, Awaited, MadeSurb};
use super::body::{Body, ReplySurbs, SenderTag};
use super::clock::Clock;
use super::conversations::Conversations;
use super::exchange::{
    Counts, Dropped, MessageEvent, MessageOptions, Purpose, PurposeKind, Received, ReceivedId,
    Refill, Transmit,
};
use super::fragment::{Fragment, Hour, MESSAGE_ID_LEN, MessageId};
use super::inbox::{Arrived, Inbox, Kept, Sender};
use super::outbox::{Destination, Outbox, Outcome, Piece};
use super::packet::{AckStatus, MessageSizes, ReplyContents};
use super::replies::ReplyStock;
use super::shelf::{INCOMPLETE_AGE, Key, Origin};
use super::{FailReason, MAX_MESSAGE_BYTES, MAX_REPLY_SURBS, SendError};
use crate::address::Address;
use crate::topology::UnixTime;

/// How long after its last progress a message is given up, unless told otherwise: a gateway is started
/// again and a laptop opened in that time.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(10 * 60);

/// The longest time after its last progress that a message is tried: recipients give incomplete ones up
/// later than that, with ten minutes to spare for clocks and lines.
pub const MAX_GIVE_UP_AFTER: Duration = Duration::from_secs(20 * 60);
const _: () = assert!(MAX_GIVE_UP_AFTER.as_secs() + 10 * 60 <= INCOMPLETE_AGE.as_secs());

/// Most acknowledgements that are awaited, late ones among them; the oldest of the
/// destination with the most are given up first.
pub const MAX_AWAITED_ACKS: usize = 32 * 1024;

/// Most replies that are awaited; the oldest of the recipient with the most are given up first.
pub const MAX_AWAITED_REPLIES: usize = 32 * 1024;

/// Most acknowledgements of replies that wait to be sent. Beyond, the oldest are dropped: the replier
/// sends again.
pub const MAX_OWED_ACKS: usize = 4096;

/// The messages of one client; `R` is what recovers what comes by a SURB.
///
/// After every call that takes `&mut self`, [`Messages::poll_transmit`] may have something to send,
/// [`Messages::poll_event`] and [`Messages::poll_confirmation`] news, [`Messages::poll_refill`] a wish,
/// and [`Messages::poll_timeout`] may have changed.
#[derive(Debug)]
pub struct Messages<R> {
    sizes: MessageSizes,
    clock: Clock,
    outbox: Outbox,
    inbox: Inbox,
    stock: ReplyStock,
    conversations: Conversations,
    acks: Awaited<R, Piece, Destination>,
    replies: Awaited<R, Address, Address>,
    owed_acks: VecDeque<Surb>,
    /// Refills on their way: the application knows nothing of them.
    refills: BTreeMap<MessageId, Address>,
    received: VecDeque<Received>,
    /// Bodies of SURBs only, until it is written down that they came; and those that are to be.
    surbs_came: BTreeMap<Key, Zeroizing<Vec<u8>>>,
    unwritten: VecDeque<ReceivedId>,
    dropped: Dropped,
}

impl<R> Messages<R> {
    /// Nothing to send, and nothing came yet.
    pub fn new(now: Instant, options: MessageOptions) -> Self {
        let MessageOptions { sizes, give_up_after, wall, validity, unknown_delays, known } =
            options;
        let give_up_after = give_up_after.min(MAX_GIVE_UP_AFTER);
        Self {
            sizes,
            clock: Clock::new(now, wall, validity),
            outbox: Outbox::new(sizes, give_up_after, unknown_delays),
            inbox: Inbox::new(sizes, now, known),
            stock: ReplyStock::default(),
            conversations: Conversations::default(),
            acks: Awaited::new(MAX_AWAITED_ACKS),
            replies: Awaited::new(MAX_AWAITED_REPLIES),
            owed_acks: VecDeque::new(),
            refills: BTreeMap::new(),
            received: VecDeque::new(),
            surbs_came: BTreeMap::new(),
            unwritten: VecDeque::new(),
            dropped: Dropped::default(),
        }
    }

    /// What is held.
    pub fn counts(&self) -> Counts {
        Counts {
            outgoing: self.outbox.counts(),
            incoming: self.inbox.counts(),
            awaited: (self.acks.len(), self.replies.len()),
            reply_surbs: self.stock.counts(),
            conversations: self.conversations.len(),
        }
    }

    /// What was dropped.
    pub fn dropped(&self) -> Dropped {
        self.dropped
    }

    // --- The application.

    /// Sends a message, with SURBs for replies if there are to be any.
    ///
    /// # Errors
    /// See [`SendError`]; then nothing is sent, and the SURBs are gone.
    pub fn send(
        &mut self,
        now: Instant,
        rng: &mut impl Rng,
        recipient: Address,
        message: &[u8],
        reply_surbs: Vec<MadeSurb<R>>,
    ) -> Result<MessageId, SendError> {
        self.check_send(message.len(), reply_surbs.len())?;
        let body = if reply_surbs.is_empty() {
            Zeroizing::new(Body::Plain(message).to_bytes())
        } else {
            self.with_surbs(rng, recipient, reply_surbs, Some(message))
        };
        Ok(self.push(now, rng, Destination::Recipient(recipient), body))
    }

    /// Whether [`Messages::send`] would take a message of so many bytes with so many SURBs: these need
    /// not be made in vain.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn check_send(&self, message_bytes: usize, reply_surbs: usize) -> Result<(), SendError> {
        check_message_bytes(message_bytes)?;
        match reply_surbs {
            0 => self.outbox.check_room(1 + message_bytes),
            surbs => self.check_surbs(surbs, message_bytes),
        }
    }

    /// Replies to whoever sent SURBs under this tag.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn reply(
        &mut self,
        now: Instant,
        rng: &mut impl Rng,
        sender_tag: SenderTag,
        message: &[u8],
    ) -> Result<MessageId, SendError> {
        check_message_bytes(message.len())?;
        self.outbox.check_room(1 + message.len())?;
        if !self.stock.knows(sender_tag) {
            return Err(SendError::UnknownSender);
        }
        let body = Zeroizing::new(Body::Plain(message).to_bytes());
        Ok(self.push(now, rng, Destination::Sender(sender_tag), body))
    }

    /// Who asked for SURBs; the shell makes them and calls [`Messages::refill`].
    pub fn poll_refill(&mut self) -> Option<Refill> {
        let refills = &self.refills;
        let is_busy = |address: &Address| refills.values().any(|busy| busy == address);
        let (recipient, surbs) = self.conversations.poll_wanted(is_busy)?;
        Some(Refill { recipient, surbs })
    }

    /// Sends SURBs to somebody who asked for them.
    ///
    /// # Errors
    /// See [`SendError`]; the recipient asks again.
    pub fn refill(
        &mut self,
        now: Instant,
        rng: &mut impl Rng,
        recipient: Address,
        surbs: Vec<MadeSurb<R>>,
    ) -> Result<(), SendError> {
        if surbs.is_empty() {
            return Ok(());
        }
        self.check_surbs(surbs.len(), 0)?;
        self.conversations.on_refill(&recipient, surbs.len());
        let body = self.with_surbs(rng, recipient, surbs, None);
        let id = self.push(now, rng, Destination::Recipient(recipient), body);
        self.outbox.begin_slowly(id);
        self.refills.insert(id, recipient);
        Ok(())
    }

    /// What the application is to be told, outcomes first.
    pub fn poll_event(&mut self) -> Option<MessageEvent> {
        let outcome = self.poll_outcome().map(|(id, outcome)| match outcome {
            Ok(()) => MessageEvent::Delivered(id),
            Err(reason) => MessageEvent::Failed(id, reason),
        });
        outcome.or_else(|| self.poll_received().map(MessageEvent::from))
    }

    /// What became of a message that was sent. Those that came wait.
    pub fn poll_outcome(&mut self) -> Option<(MessageId, Result<(), FailReason>)> {
        loop {
            let (id, outcome) = self.outbox.poll_outcome()?;
            if self.refills.remove(&id).is_none() {
                return Some(match outcome {
                    Outcome::Delivered => (id, Ok(())),
                    Outcome::Failed(reason) => (id, Err(reason)),
                });
            }
        }
    }

    /// A message that came. What became of those that were sent waits.
    pub fn poll_received(&mut self) -> Option<Received> {
        self.received.pop_front()
    }

    /// SURBs came without a message: when that is written down, [`Messages::taken`] is to be called.
    /// Used before, they would come once more after a restart, and each works only once.
    pub fn poll_surbs(&mut self) -> Option<ReceivedId> {
        self.unwritten.pop_front()
    }

    /// The application has the message: its deliveries are confirmed.
    pub fn taken(&mut self, received: ReceivedId) {
        if let Some(body) = self.surbs_came.remove(&received.key)
            && let Ok(Body::Surbs(surbs)) = Body::parse(&body)
        {
            self.dropped.surbs += self.stock.add(&surbs) as u64;
        }
        self.inbox.taken(received.key);
    }

    // --- What is sent.

    /// The next packet. `None` while there is nothing to send, or no SURB for its acknowledgement.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        rng: &mut impl Rng,
        surbs: &mut impl AckSurbs<R>,
    ) -> Option<Transmit> {
        if let Some(surb) = self.owed_acks.pop_front() {
            return Some(Transmit::Acknowledgement { surb });
        }
        let (destination, unsent) = self.next_destination(now)?;
        let made = surbs.take()?;
        match destination {
            Destination::Recipient(recipient) => {
                let (id, index, fragment) = self.outbox.take_fragment(destination)?;
                let ack = made.identifier;
                let ack_surb = self.expect_ack(now, made, (id, index), destination);
                Some(Transmit::Message { recipient, fragment, ack_surb, ack })
            }
            Destination::Sender(tag) => {
                let (surb, piece, fragment) = match self.stock.request(now, tag, unsent) {
                    Some((surb, number)) => self.request_fragment(rng, surb, number),
                    None => {
                        let surb = self.stock.pop(tag)?;
                        let (id, index, fragment) = self.outbox.take_fragment(destination)?;
                        (surb, (id, index), fragment)
                    }
                };
                let ack_surb = self.expect_ack(now, made, piece, destination);
                Some(Transmit::Reply { surb, fragment, ack_surb })
            }
        }
    }

    /// Whether [`Messages::poll_transmit`] would send something if it had a SURB.
    pub fn wants_to_send(&self, now: Instant) -> bool {
        !self.owed_acks.is_empty() || self.next_destination(now).is_some()
    }

    /// How many SURBs [`Messages::poll_transmit`] could use now, at most `max`.
    pub fn surb_demand(&self, now: Instant, max: usize) -> usize {
        if self.next_destination(now).is_none() {
            return 0;
        }
        let (messages, bytes, under_way) = self.outbox.counts();
        let fragments = messages + bytes / self.sizes.fragment_data_bytes();
        fragments.saturating_sub(under_way).clamp(1, max)
    }

    /// Whether [`Messages::poll_transmit`] has something that needs no SURB.
    pub fn owes_acks(&self) -> bool {
        !self.owed_acks.is_empty()
    }

    /// The shell has chosen the delays of the packet that is acknowledged by this SURB: their sum.
    pub fn sent(&mut self, ack: &Identifier, delay: Duration) {
        if let Some(piece) = self.outbox.add_delay(ack, delay)
            && let Some(awaited) = self.acks.purpose_mut(ack)
        {
            *awaited = piece;
        }
    }

    /// What recovers an acknowledgement that is awaited.
    pub fn recovery_mut(&mut self, ack: &Identifier) -> Option<&mut R> {
        self.acks.recovery_mut(ack)
    }

    /// The next packet that was not acknowledged in time: what would recover its acknowledgement, and when
    /// it left. It is lost, or late.
    pub fn poll_overdue(&mut self) -> Option<(&R, Instant)> {
        loop {
            let (ack, sent) = self.outbox.poll_overdue()?;
            if self.acks.recovery_mut(&ack).is_some() {
                return self.acks.recovery_mut(&ack).map(|recovery| (&*recovery, sent));
            }
        }
    }

    /// There is no route for the packet that would be acknowledged by this SURB: it was not sent.
    pub fn unsent(&mut self, now: Instant, ack: &Identifier) {
        self.outbox.unsent(now, ack);
        self.acks.take(ack);
    }

    fn next_destination(&self, now: Instant) -> Option<(Destination, usize)> {
        self.outbox.turns().find_map(|destination| {
            let unsent = self.outbox.may_send(now, destination)?;
            let is_possible = match destination {
                Destination::Recipient(_) => true,
                Destination::Sender(tag) => self.stock.can_send(now, tag),
            };
            is_possible.then_some((destination, unsent))
        })
    }

    fn request_fragment(
        &mut self,
        rng: &mut impl Rng,
        surb: Surb,
        number: u16,
    ) -> (Surb, (MessageId, u16), Zeroizing<Vec<u8>>) {
        let id = draw_id(rng);
        let body = Body::Request(number).to_bytes();
        let fragment = Fragment { id, hour: Hour(0), index: 0, count: 1, bytes: &body };
        let fragment = Zeroizing::new(fragment.to_bytes(self.sizes));
        (surb, (id, 0), fragment)
    }

    fn expect_ack(
        &mut self,
        now: Instant,
        made: MadeSurb<R>,
        piece: (MessageId, u16),
        destination: Destination,
    ) -> Surb {
        let piece = self.outbox.sent(now, &made, piece, destination);
        self.acks.insert(made, piece, destination)
    }

    fn push(
        &mut self,
        now: Instant,
        rng: &mut impl Rng,
        destination: Destination,
        body: Zeroizing<Vec<u8>>,
    ) -> MessageId {
        let id = draw_id(rng);
        // Nobody keeps replies, so that their hour would tell something for nothing.
        let hour = match destination {
            Destination::Recipient(_) => self.hour(now),
            Destination::Sender(_) => Hour(0),
        };
        self.outbox.push(now, (id, hour), destination, body);
        id
    }

    fn check_surbs(&self, surbs: usize, message_bytes: usize) -> Result<(), SendError> {
        if surbs > MAX_REPLY_SURBS {
            return Err(SendError::TooManySurbs(surbs));
        }
        let surb_bytes = surbs * mixsocks_sphinx::SURB_LEN;
        self.outbox.check_room(super::BODY_HEADER_LEN + surb_bytes + message_bytes)
    }

    /// A body with SURBs, which are awaited from now on, and with a message if there is one.
    fn with_surbs(
        &mut self,
        rng: &mut impl Rng,
        recipient: Address,
        made: Vec<MadeSurb<R>>,
        message: Option<&[u8]>,
    ) -> Zeroizing<Vec<u8>> {
        let sender_tag = self.conversations.tag(rng, recipient);
        let key_epoch = made.iter().map(|made| made.key_epoch).min().unwrap_or(0);
        let mut expect = |made| *self.replies.insert(made, recipient, recipient).as_bytes();
        let surbs: Vec<_> = made.into_iter().map(&mut expect).collect();
        let given = ReplySurbs { sender_tag, key_epoch, surbs: &surbs };
        Zeroizing::new(match message {
            Some(message) => Body::WithSurbs(given, message).to_bytes(),
            None => Body::Surbs(given).to_bytes(),
        })
    }

    // --- What comes.

    /// Something came by this SURB: what recovers it, and what it is for. `None` if it is not awaited.
    pub fn take_awaited(&mut self, identifier: &Identifier) -> Option<(R, Purpose)> {
        if let Some((recovery, piece)) = self.acks.take(identifier) {
            return Some((recovery, Purpose(PurposeKind::Ack(*identifier, piece))));
        }
        let (recovery, address) = self.replies.take(identifier)?;
        Some((recovery, Purpose(PurposeKind::Reply(address))))
    }

    /// Takes in what came by a SURB: the contents of its packet, recovered.
    pub fn handle_by_surb(&mut self, now: Instant, purpose: Purpose, contents: &[u8]) {
        match purpose.0 {
            PurposeKind::Ack(identifier, piece) => match AckStatus::from_bytes(contents) {
                Ok(status) => self.outbox.on_ack(now, &identifier, &piece, status),
                Err(_) => self.dropped.malformed += 1,
            },
            PurposeKind::Reply(address) => self.handle_reply(now, address, contents),
        }
    }

    fn handle_reply(&mut self, now: Instant, address: Address, contents: &[u8]) {
        let sizes = self.sizes;
        let Ok(ReplyContents { ack_surb, fragment }) = ReplyContents::parse(contents, sizes) else {
            self.dropped.malformed += 1;
            return;
        };
        let Ok(fragment) = Fragment::parse(fragment, sizes) else {
            self.dropped.malformed += 1;
            return;
        };
        self.conversations.on_reply(&address);
        let is_kept = self.handle_fragment(now, Origin::Replier(address), None, &fragment);
        if is_kept {
            self.owed_acks.push_back(ack_surb);
            if self.owed_acks.len() > MAX_OWED_ACKS {
                self.owed_acks.pop_front();
                self.dropped.owed_acks += 1;
            }
        }
    }

    /// The gateway hands over delivery `number`; its box held this.
    pub fn handle_delivery(&mut self, now: Instant, number: u64, fragment: &[u8]) {
        match Fragment::parse(fragment, self.sizes) {
            Ok(fragment) => {
                self.handle_fragment(now, Origin::Gateway, Some(number), &fragment);
            }
            Err(_) => self.handle_unreadable(number),
        }
    }

    /// The gateway hands over delivery `number`, whose box cannot be opened: it is confirmed, as it would
    /// come again and again.
    pub fn handle_unreadable(&mut self, number: u64) {
        self.dropped.malformed += 1;
        self.inbox.confirm(Some(number));
    }

    /// The gateway was asked for what it keeps, or the connection with it has ended.
    pub fn set_receiving(&mut self, now: Instant, is_receiving: bool) {
        self.inbox.set_receiving(now, is_receiving);
    }

    /// All that the gateway kept when it was asked last has come.
    pub fn caught_up(&mut self, now: Instant) {
        self.inbox.caught_up(now);
    }

    /// Whether all has come, as far as is known, that the gateway kept when it was asked last.
    pub fn is_caught_up(&self) -> bool {
        self.inbox.is_caught_up()
    }

    /// Whether the gateway is to be asked again for what it keeps.
    pub fn wants_receive(&self, now: Instant) -> bool {
        self.inbox.wants_again(self.hour(now))
    }

    /// The next delivery that the gateway may forget.
    pub fn poll_confirmation(&mut self) -> Option<u64> {
        self.inbox.poll_confirmation()
    }

    /// Whether the sender of the fragment may stop sending it.
    fn handle_fragment(
        &mut self,
        now: Instant,
        origin: Origin,
        number: Option<u64>,
        fragment: &Fragment<'_>,
    ) -> bool {
        let hour = self.hour(now);
        match self.inbox.handle((now, hour), origin, number, fragment) {
            Kept::Yes => true,
            Kept::Complete => {
                if let Some(arrived) = self.inbox.assemble((origin, fragment.id)) {
                    self.handle_arrived(arrived);
                }
                true
            }
            Kept::NoRoom => {
                self.dropped.no_room += 1;
                false
            }
            Kept::TooEarly => {
                self.dropped.too_early += 1;
                false
            }
            Kept::Conflict => {
                self.dropped.conflicting += 1;
                true
            }
            Kept::Misdated => {
                self.dropped.misdated += 1;
                true
            }
        }
    }

    fn handle_arrived(&mut self, Arrived { key, hour, body }: Arrived) {
        let (origin, _) = key;
        let (sender, message) = match (origin, Body::parse(&body)) {
            (Origin::Gateway, Ok(Body::Plain(message))) => (Sender::Unknown, message),
            (Origin::Gateway, Ok(Body::WithSurbs(surbs, message))) => {
                self.dropped.surbs += self.stock.add(&surbs) as u64;
                (Sender::Anonymous(surbs.sender_tag), message)
            }
            (Origin::Gateway, Ok(Body::Surbs(_))) => {
                self.unwritten.push_back(ReceivedId { key, hour });
                self.surbs_came.insert(key, body);
                return;
            }
            (Origin::Replier(address), Ok(Body::Plain(message))) => {
                (Sender::Replier(address), message)
            }
            (Origin::Replier(address), Ok(Body::Request(number))) => {
                self.conversations.on_request(&address, number);
                return self.inbox.taken(key);
            }
            (_, Ok(_) | Err(_)) => {
                self.dropped.malformed += 1;
                self.inbox.discard(key);
                return;
            }
        };
        let (message, received) = (message.to_vec(), ReceivedId { key, hour });
        self.received.push_back(Received { received, message, sender });
    }

    // --- Time.

    /// Takes in what the wall clock shows: to be called before anything else whenever time may have
    /// passed. What the machine has slept counts like any other time for those who wait for the rest of
    /// a message, so it counts here too, before anything that came in the meantime; what is over by that is
    /// tried anew for a minute.
    /// Whether it has slept, so that there may be news.
    pub fn handle_clock(&mut self, now: Instant, wall: UnixTime) -> bool {
        let slept = self.clock.look(now, wall);
        let has_slept = !slept.is_zero();
        if has_slept {
            self.outbox.handle_sleep(now, slept);
            self.handle_timeout(now);
        }
        has_slept
    }

    /// There is another document of the network: however wrong the clock is, the hour is held within
    /// that document's validity, so that those of sender and recipient are not far from each other.
    pub fn set_validity(&mut self, validity: RangeInclusive<UnixTime>) {
        self.clock.set_validity(validity);
    }

    /// The hour, as messages are dated.
    pub fn hour(&self, now: Instant) -> Hour {
        self.clock.hour(now)
    }

    /// Nodes have no keys of earlier key epochs any more: SURBs of those lead to nowhere.
    pub fn forget_key_epochs_before(&mut self, key_epoch: u64) {
        self.acks.forget_before(key_epoch);
        self.replies.forget_before(key_epoch);
        self.stock.forget_before(key_epoch);
    }

    /// When [`Messages::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self, now: Instant) -> Option<Instant> {
        let requests = self.outbox.turns().filter_map(|destination| match destination {
            Destination::Sender(tag) => self.stock.next_request(tag).filter(|at| *at > now),
            Destination::Recipient(_) => None,
        });
        let inbox = self.inbox.poll_timeout();
        let next_hour = self.inbox.waits_for_hour().map(|hour| self.clock.start_of(now, hour));
        let next_hour = next_hour.filter(|at| *at > now);
        self.outbox
            .poll_timeout(now)
            .into_iter()
            .chain(inbox)
            .chain(next_hour)
            .chain(requests)
            .min()
    }

    /// Sends again or gives up what was not heard of in time.
    pub fn handle_timeout(&mut self, now: Instant) {
        let stock = &self.stock;
        self.outbox.handle_timeout(now, |tag| stock.available(tag) > 0);
        self.dropped.incomplete += self.inbox.handle_timeout(now) as u64;
    }
}

fn check_message_bytes(message_bytes: usize) -> Result<(), SendError> {
    match message_bytes {
        0 => Err(SendError::Empty),
        len if len > MAX_MESSAGE_BYTES => Err(SendError::TooLong(len)),
        _ => Ok(()),
    }
}

fn draw_id(rng: &mut impl Rng) -> MessageId {
    let mut id = [0; MESSAGE_ID_LEN];
    rng.fill(&mut id);
    MessageId(id)
}
