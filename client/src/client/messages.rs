//! The messages of a client: its core, and what its tasks do for that.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mixsocks_common::address::Address;
use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::message::fragment::{Hour, MessageId};
use mixsocks_common::message::packet::{AckStatus, MessageContents, MessageSizes, ReplyContents};
use mixsocks_common::message::sealed_box::seal_boxes;
use mixsocks_common::message::{
    AckSurbs, FailReason, MadeSurb, MessageEvent, MessageOptions, Messages, Purpose, Received,
    ReceivedId, SendError, SenderTag, TakenId, TakenIds, Transmit,
};
use mixsocks_common::topology::{LAYERS, Topology, UnixTime, delay_quantile};
use mixsocks_sphinx::{HopAddress, Identifier, Packet, RecoverError, ReplyRecovery, Surb};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;
use zeroize::Zeroizing;

use super::{ClientError, Shared, State};
use crate::core::ClientCore;
use crate::drops::DropReason;
use crate::endpoint::{Endpoint, unix_time};
use crate::health::{Mixes, Way};
use crate::messages::{MAX_UNFETCHED, MessengerOptions, ReceivedLog, WriteDown};
use crate::surbs::ReadySurb;

/// SURBs for acknowledgements that are kept ready while much is to be sent.
const READY_SURBS: usize = 32;

/// SURBs for replies that are made at a time: as many as share vectors.
const SURBS_PER_TURN: usize = 8;

/// Mixes of a route.
const MIXES: u32 = 3;
const _: () = assert!(MIXES as usize == LAYERS);

/// How long to wait until a received message is tried again to be written down.
const LOG_RETRY: Duration = Duration::from_secs(1);

/// What recovers what comes by a SURB of a message, and the way that it takes.
#[derive(Debug)]
pub(super) struct Recovery {
    pub(super) recovery: ReplyRecovery,
    pub(super) way: Way,
    /// The mixes of the packet that is acknowledged, if they are this client's choice.
    sent_through: Option<Mixes>,
}

/// What has come by a SURB of a message.
pub(super) struct Returned {
    way: Way,
    sent_through: Option<Mixes>,
    purpose: Purpose,
}

/// The messages of a client. Its locks are taken behind that of the sessions, and for moments.
pub(super) struct Mail {
    core: Mutex<Core>,
    log: Mutex<Log>,
    write_down: WriteDown,
    /// How many the gateway has handed over.
    deliveries: AtomicU64,
    /// The message that is handed out next, once it is written down.
    next_received: tokio::sync::Mutex<Option<Received>>,
    /// There may be an outcome.
    has_outcomes: Notify,
    /// There may be a message that came.
    has_received: Notify,
    /// There may be room for another message.
    has_room: Notify,
    wake_confirmer: Notify,
    wake_refiller: Notify,
    /// SURBs may have come.
    wake_writer: Notify,
}

struct Core {
    messages: Messages<Recovery>,
    /// Messages whose outcome the application has not fetched, those under way included.
    unfetched: usize,
    /// SURBs of earlier key epochs were forgotten.
    oldest_key_epoch: u64,
}

/// What was received, as it is written down.
struct Log {
    file: Option<ReceivedLog>,
    /// The user was told that the log cannot be written.
    told: bool,
}

/// SURBs for acknowledgements are those at hand.
struct Surbs<'a>(&'a mut ClientCore<ReplyRecovery>, Instant);

impl AckSurbs<Recovery> for Surbs<'_> {
    fn take(&mut self) -> Option<MadeSurb<Recovery>> {
        self.0.take_surb(self.1).map(made_surb)
    }
}

fn made_surb(ready: ReadySurb<ReplyRecovery>) -> MadeSurb<Recovery> {
    let ReadySurb { surb, identifier, recovery, way, key_epoch, .. } = ready;
    let recovery = Recovery { recovery, way, sent_through: None };
    MadeSurb { surb, identifier, recovery, delay: way.delay, key_epoch }
}

/// Whatever a wrong clock shows, it is some time in which the network's document is valid.
fn validity(topology: &Topology) -> RangeInclusive<UnixTime> {
    topology.valid_from..=topology.valid_until
}

impl Mail {
    pub(super) fn new(endpoint: &Endpoint, options: MessengerOptions) -> Result<Self, ClientError> {
        let sizes =
            MessageSizes::new(endpoint.max_contents_bytes()).ok_or(ClientError::NoMessages)?;
        let (wall, validity) = (unix_time(), validity(&endpoint.topology()));
        let (log, known) = match options.received_log {
            Some(path) => {
                let hour = Hour::of(wall.min(*validity.end()).max(*validity.start()));
                let (log, known) = ReceivedLog::open(&path, hour)?;
                (Some(log), known)
            }
            None => (None, TakenIds::default()),
        };
        // Whoever is replied to takes the network's delays too.
        let unknown_delays = delay_quantile(endpoint.mean_delay(), MIXES);
        let MessengerOptions { give_up_after, write_down, .. } = options;
        let options =
            MessageOptions { sizes, give_up_after, wall, validity, unknown_delays, known };
        let messages = Messages::new(Instant::now(), options);
        Ok(Self {
            core: Mutex::new(Core { messages, unfetched: 0, oldest_key_epoch: 0 }),
            log: Mutex::new(Log { file: log, told: false }),
            write_down,
            deliveries: AtomicU64::new(0),
            next_received: tokio::sync::Mutex::default(),
            has_outcomes: Notify::new(),
            has_received: Notify::new(),
            has_room: Notify::new(),
            wake_confirmer: Notify::new(),
            wake_refiller: Notify::new(),
            wake_writer: Notify::new(),
        })
    }

    /// The core looks at the clock first: nothing that came while the machine slept may seem to have
    /// come in time.
    fn lock(&self) -> MutexGuard<'_, Core> {
        let mut core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        if core.messages.handle_clock(Instant::now(), unix_time()) {
            self.wake();
        }
        core
    }

    /// Wakes whoever may have something to do after the core was given something.
    fn wake(&self) {
        self.has_outcomes.notify_one();
        self.has_received.notify_one();
        self.has_room.notify_waiters();
        self.wake_confirmer.notify_one();
        self.wake_refiller.notify_one();
        self.wake_writer.notify_one();
    }

    /// Writes down that a message is received, if it has to be. Whether it is.
    fn write_down(&self, received: ReceivedId) -> bool {
        let Some(id) = received.to_remember() else { return true };
        let hour = self.lock().messages.hour(Instant::now());
        self.log.lock().unwrap_or_else(PoisonError::into_inner).append(id, hour)
    }
}

impl Core {
    fn check_room(&self) -> Result<(), SendError> {
        if self.unfetched >= MAX_UNFETCHED { Err(SendError::Full) } else { Ok(()) }
    }
}

/// What the application does.
impl Shared {
    pub(crate) async fn send_message(
        &self,
        recipient: Address,
        message: &[u8],
        reply_surbs: usize,
    ) -> Result<MessageId, SendError> {
        // A gateway that merely cannot be reached now may come back.
        if self.endpoint.topology().gateway(&recipient.gateway).is_none() {
            return Err(SendError::UnknownGateway);
        }
        loop {
            self.wait_for_room(|core| core.messages.check_send(message.len(), reply_surbs)).await?;
            let surbs = self.make_reply_surbs(reply_surbs).await.ok_or(SendError::NoRoute)?;
            let sent = self.push_message(|core| {
                let now = Instant::now();
                core.messages.send(now, &mut rand::rng(), recipient, message, surbs)
            });
            // Another message may have taken the room.
            if sent != Err(SendError::Full) {
                return sent;
            }
        }
    }

    pub(crate) async fn reply_message(
        &self,
        sender_tag: SenderTag,
        message: &[u8],
    ) -> Result<MessageId, SendError> {
        loop {
            self.wait_for_room(|core| core.messages.check_send(message.len(), 0)).await?;
            let sent = self.push_message(|core| {
                core.messages.reply(Instant::now(), &mut rand::rng(), sender_tag, message)
            });
            if sent != Err(SendError::Full) {
                return sent;
            }
        }
    }

    /// Waits while `check` says that there is no room.
    async fn wait_for_room(
        &self,
        check: impl Fn(&Core) -> Result<(), SendError>,
    ) -> Result<(), SendError> {
        let Some(mail) = &self.mail else { return Err(SendError::Stopped) };
        loop {
            let room = mail.has_room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.lock().closed {
                return Err(SendError::Stopped);
            }
            let checked = {
                let core = mail.lock();
                check(&core).and_then(|()| core.check_room())
            };
            match checked {
                Err(SendError::Full) => room.await,
                checked => return checked,
            }
        }
    }

    fn push_message(
        &self,
        push: impl FnOnce(&mut Core) -> Result<MessageId, SendError>,
    ) -> Result<MessageId, SendError> {
        let Some(mail) = &self.mail else { return Err(SendError::Stopped) };
        let mut core = mail.lock();
        core.check_room()?;
        let sent = push(&mut core);
        core.unfetched += usize::from(sent.is_ok());
        drop(core);
        self.wake_senders.notify_one();
        sent
    }

    /// SURBs that are given away, in batches; `None` without a route.
    async fn make_reply_surbs(&self, count: usize) -> Option<Vec<MadeSurb<Recovery>>> {
        let mut surbs = Vec::with_capacity(count);
        while surbs.len() < count {
            let choice = self.lock().core.route_choice();
            let batch = SURBS_PER_TURN.min(count - surbs.len());
            let made = self.endpoint.make_surbs(&choice, batch).ok()?;
            surbs.extend(made.into_iter().map(made_surb));
            yield_now().await;
        }
        Some(surbs)
    }

    /// Waits for the next event.
    pub(crate) async fn next_message_event(&self) -> Option<MessageEvent> {
        let outcome = tokio::select! {
            biased;
            outcome = self.next_outcome() => outcome,
            received = self.next_received() => return received.map(MessageEvent::from),
        };
        match outcome {
            Some((id, Ok(()))) => Some(MessageEvent::Delivered(id)),
            Some((id, Err(reason))) => Some(MessageEvent::Failed(id, reason)),
            // What came before the client stopped is still handed out.
            None => self.next_received().await.map(MessageEvent::from),
        }
    }

    /// Waits for what becomes of a message.
    pub(crate) async fn next_outcome(&self) -> Option<(MessageId, Result<(), FailReason>)> {
        let mail = self.mail.as_ref()?;
        loop {
            let outcome = {
                let mut core = mail.lock();
                let outcome = core.messages.poll_outcome();
                core.unfetched = core.unfetched.saturating_sub(usize::from(outcome.is_some()));
                outcome
            };
            if outcome.is_some() {
                mail.has_room.notify_waiters();
                return outcome;
            }
            if self.lock().closed {
                return None;
            }
            mail.has_outcomes.notified().await;
        }
    }

    /// Waits for a message; one that is not handed out because nobody waits any more is kept.
    pub(crate) async fn next_received(&self) -> Option<Received> {
        let mail = self.mail.as_ref()?;
        let mut next = mail.next_received.lock().await;
        loop {
            if next.is_none() {
                *next = mail.lock().messages.poll_received();
            }
            match &*next {
                Some(came) => {
                    let may_come_again = mail.write_down == WriteDown::WhenTaken;
                    if may_come_again || mail.write_down(came.received) {
                        return next.take();
                    }
                    if self.lock().closed {
                        return None;
                    }
                    sleep(LOG_RETRY).await;
                }
                None if self.lock().closed => return None,
                None => mail.has_received.notified().await,
            }
        }
    }

    /// How many parts of messages the gateway has handed over.
    pub(crate) fn deliveries(&self) -> u64 {
        self.mail.as_ref().map_or(0, |mail| mail.deliveries.load(Ordering::Relaxed))
    }

    /// Bytes of a message that a full packet carries.
    pub(crate) fn message_bytes_per_packet(&self) -> usize {
        let sizes = MessageSizes::new(self.endpoint.max_contents_bytes());
        sizes.expect("checked by Mail::new").fragment_data_bytes()
    }

    pub(crate) fn message_taken(&self, received: ReceivedId) {
        let Some(mail) = &self.mail else { return };
        if mail.write_down == WriteDown::WhenTaken {
            // If that fails the user is told, and the message may come again after a restart.
            mail.write_down(received);
        }
        mail.lock().messages.taken(received);
        self.receive_again_if_wanted(mail);
        mail.wake();
    }

    /// The client has stopped: nobody has to wait any more.
    pub(super) fn tell_messengers(&self) {
        if let Some(mail) = &self.mail {
            mail.wake();
        }
    }
}

impl Log {
    fn append(&mut self, id: TakenId, now: Hour) -> bool {
        let Some(log) = &mut self.file else { return true };
        match log.append(id, now) {
            Ok(()) => self.told = false,
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    tracing::warn!("messages wait until they can be written down: {error}");
                }
                return false;
            }
        }
        true
    }
}

/// What the sending tasks do.
impl Shared {
    /// The next part of a message, if there is a SURB for its acknowledgement.
    pub(super) fn pull_message(&self, state: &mut State, now: Instant) -> Option<Transmit> {
        let mail = self.mail.as_ref()?;
        let mut surbs = Surbs(&mut state.core, now);
        let transmit = mail.lock().messages.poll_transmit(now, &mut rand::rng(), &mut surbs)?;
        self.ask_for_surbs(mail, &mut state.core, now);
        Some(transmit)
    }

    /// Whether there is something to send and all that it takes.
    pub(super) fn wants_to_send_mail(
        &self,
        core: &mut ClientCore<ReplyRecovery>,
        now: Instant,
    ) -> bool {
        let Some(mail) = &self.mail else { return false };
        let demand = self.ask_for_surbs(mail, core, now);
        mail.lock().messages.owes_acks() || demand > 0 && core.ready_surbs(now) > 0
    }

    fn ask_for_surbs(
        &self,
        mail: &Mail,
        core: &mut ClientCore<ReplyRecovery>,
        now: Instant,
    ) -> usize {
        let demand = mail.lock().messages.surb_demand(now, READY_SURBS);
        core.want_surbs(demand);
        if demand > core.ready_surbs(now) {
            self.wake_makers.notify_one();
        }
        demand
    }

    /// Handles what is due; when the next is.
    pub(super) fn handle_mail_timeout(
        &self,
        of_sessions: &mut ClientCore<ReplyRecovery>,
        now: Instant,
    ) -> Option<Instant> {
        let mail = self.mail.as_ref()?;
        let mut core = mail.lock();
        let due = core.messages.poll_timeout(now).is_some_and(|at| at <= now);
        if due {
            core.messages.handle_timeout(now);
        }
        while let Some((recovery, sent)) = core.messages.poll_overdue() {
            if let Some(mixes) = recovery.sent_through {
                of_sessions.note_message_fate(now, &mixes, sent, false);
            }
        }
        let (messages, ..) = core.messages.counts().outgoing;
        of_sessions.set_messages(messages > 0);
        let next = core.messages.poll_timeout(now);
        drop(core);
        if due {
            mail.wake();
        }
        // There may be room with the next hour.
        self.receive_again_if_wanted(mail);
        next
    }

    /// Makes the packets of parts of messages. Those without a route are given back to the core.
    pub(super) fn build_messages(&self, transmits: Vec<Transmit>) -> Vec<(HopAddress, Packet)> {
        let (mut messages, mut by_surbs) = (Vec::new(), Vec::new());
        for transmit in transmits {
            match transmit {
                Transmit::Message { recipient, fragment, ack_surb, ack } => {
                    messages.push((recipient, fragment, ack_surb, ack));
                }
                Transmit::Reply { surb, fragment, ack_surb } => {
                    let contents = ReplyContents { ack_surb, fragment: &fragment }.compose();
                    by_surbs.push((surb, Zeroizing::new(contents)));
                }
                Transmit::Acknowledgement { surb } => {
                    by_surbs.push((surb, Zeroizing::new(AckStatus::Stored.to_bytes().to_vec())));
                }
            }
        }
        let mut packets = self.build_fragments(messages);
        let (surbs, contents): (Vec<_>, Vec<_>) = by_surbs.into_iter().unzip();
        let requests =
            surbs.into_iter().zip(contents.iter().map(|contents| contents.as_slice())).collect();
        packets.extend(self.endpoint.build_replies(requests));
        packets
    }

    fn build_fragments(
        &self,
        messages: Vec<(Address, Zeroizing<Vec<u8>>, Surb, Identifier)>,
    ) -> Vec<(HopAddress, Packet)> {
        let Some(mail) = self.mail.as_ref().filter(|_| !messages.is_empty()) else {
            return Vec::new();
        };
        let choice = self.lock().core.route_choice();
        let recipients: Vec<_> = messages.iter().map(|(recipient, ..)| *recipient).collect();
        let headers = self.endpoint.make_message_headers(&recipients, &choice);
        let mut good = Vec::with_capacity(messages.len());
        {
            let (mut core, now) = (mail.lock(), Instant::now());
            for ((recipient, fragment, ack_surb, ack), header) in messages.into_iter().zip(headers)
            {
                match header {
                    Ok(ready) => {
                        core.messages.sent(&ack, ready.way.delay);
                        if let Some(recovery) = core.messages.recovery_mut(&ack) {
                            recovery.sent_through = Some(ready.way.mixes);
                        }
                        good.push((ready.header, recipient, fragment, ack_surb));
                    }
                    Err(error) => {
                        tracing::trace!("a message was not sent: {error}");
                        core.messages.unsent(now, &ack);
                    }
                }
            }
        }
        let fragments: Vec<_> = good
            .iter()
            .map(|(_, recipient, fragment, _)| (recipient.encryption, &fragment[..]))
            .collect();
        let boxes = seal_boxes(&mut rand::rng(), &fragments);
        let (mut headers, mut contents) = (Vec::new(), Vec::new());
        for ((header, _, _, ack_surb), sealed_box) in good.into_iter().zip(&boxes) {
            headers.push(header);
            contents.push(MessageContents { ack_surb, sealed_box }.compose());
        }
        self.endpoint.build(headers.into_iter().zip(contents.iter().map(Vec::as_slice)))
    }
}

/// What arrives.
impl Shared {
    /// What recovers what came by this SURB, if it was one of a message.
    pub(super) fn take_awaited_mail(
        &self,
        identifier: &Identifier,
    ) -> Option<(ReplyRecovery, Returned)> {
        let (recovery, purpose) = self.mail.as_ref()?.lock().messages.take_awaited(identifier)?;
        let Recovery { recovery, way, sent_through } = recovery;
        Some((recovery, Returned { way, sent_through, purpose }))
    }

    /// Takes in what came by SURBs of messages.
    pub(super) fn handle_mail(
        &self,
        whose: Vec<Returned>,
        recovered: Vec<Result<Vec<u8>, RecoverError>>,
    ) {
        let Some(mail) = self.mail.as_ref().filter(|_| !whose.is_empty()) else { return };
        let mut state = self.lock();
        let (mut core, now) = (mail.lock(), Instant::now());
        for (returned, contents) in whose.into_iter().zip(recovered) {
            let Returned { way, sent_through, purpose } = returned;
            match contents {
                Ok(contents) => {
                    let contents = Zeroizing::new(contents);
                    if let (Some(mixes), Some(sent)) = (sent_through, purpose.sent()) {
                        state.core.note_message_fate(now, &mixes, sent, true);
                    }
                    core.messages.handle_by_surb(now, purpose, &contents);
                    state.core.message_came(now, &way);
                }
                Err(_) => self.endpoint.drops().add(DropReason::Changed),
            }
        }
        state.settle();
        drop(core);
        drop(state);
        mail.wake();
    }

    /// Takes in what the gateway keeps for this client.
    pub(super) fn handle_deliveries(&self, deliveries: &[KeptBox]) {
        let Some(mail) = &self.mail else { return };
        mail.deliveries.fetch_add(deliveries.len() as u64, Ordering::Relaxed);
        let opened = self.endpoint.open_boxes(deliveries);
        {
            let (mut core, now) = (mail.lock(), Instant::now());
            let misdated = |core: &Core| {
                let dropped = core.messages.dropped();
                dropped.misdated + dropped.too_early
            };
            let before = misdated(&core);
            for (kept, fragment) in deliveries.iter().zip(opened) {
                match fragment {
                    Ok(fragment) => core.messages.handle_delivery(now, kept.number, &fragment),
                    Err(_) => core.messages.handle_unreadable(kept.number),
                }
            }
            if before == 0 && misdated(&core) > 0 {
                tracing::warn!(
                    "a message waits or was refused, as it is dated in the future or may have been \
                     received before; is the clock of this machine right?"
                );
            }
        }
        self.receive_again_if_wanted(mail);
        mail.wake();
        // An incomplete message may have to be given up in time.
        self.wake_senders.notify_one();
    }

    /// All that the gateway kept for this client when it was asked by this number has come. If it was asked
    /// again since then, this tells nothing.
    pub(super) fn handle_caught_up(&self, number: u32) {
        let Some(mail) = &self.mail else { return };
        {
            let mut core = mail.lock();
            if !self.endpoint.is_last_receive(number) {
                return;
            }
            core.messages.caught_up(Instant::now());
        }
        // An incomplete message may have to be given up in time.
        self.wake_senders.notify_one();
    }

    fn receive_again_if_wanted(&self, mail: &Mail) {
        let (mut core, now) = (mail.lock(), Instant::now());
        if core.messages.wants_receive(now) {
            core.messages.set_receiving(now, true);
            self.endpoint.receive_again();
        }
    }

    /// The link to the gateway is there, and it was asked for what it keeps; or it is not.
    pub(super) fn set_receiving(&self, is_up: bool) {
        if let Some(mail) = &self.mail {
            mail.lock().messages.set_receiving(Instant::now(), is_up);
            self.receive_again_if_wanted(mail);
        }
    }

    /// Takes in what a document says: nodes keep the keys of a key epoch for the overlap after it.
    pub(super) fn forget_old_key_epochs(&self, topology: &Arc<Topology>, wall: UnixTime) {
        let Some(mail) = &self.mail else { return };
        let oldest = topology.oldest_key_epoch(wall);
        let mut core = mail.lock();
        core.messages.set_validity(validity(topology));
        if oldest > core.oldest_key_epoch {
            core.oldest_key_epoch = oldest;
            core.messages.forget_key_epochs_before(oldest);
        }
    }
}

/// Tasks.
impl Shared {
    /// Tells the gateway what it may let go.
    pub(super) async fn confirm_deliveries(self: Arc<Self>) {
        let Some(mail) = &self.mail else { return };
        loop {
            let Ok(room) = self.endpoint.confirmations().reserve().await else { return };
            let next = mail.lock().messages.poll_confirmation();
            match next {
                Some(number) => room.send(number),
                None => mail.wake_confirmer.notified().await,
            }
        }
    }

    /// Whether replies came that are not acknowledged yet.
    pub(super) fn owes_acks(&self) -> bool {
        self.mail.as_ref().is_some_and(|mail| mail.lock().messages.owes_acks())
    }

    /// Gives the link the confirmations that it has room for, before it takes leave.
    pub(super) fn confirm_the_last(&self) {
        let Some(mail) = &self.mail else { return };
        while let Ok(room) = self.endpoint.confirmations().try_reserve() {
            let Some(number) = mail.lock().messages.poll_confirmation() else { return };
            room.send(number);
        }
    }

    /// Takes in the SURBs that others send when they were asked for them, once it is written down.
    pub(super) async fn take_in_surbs(self: Arc<Self>) {
        let Some(mail) = &self.mail else { return };
        loop {
            let Some(received) = mail.lock().messages.poll_surbs() else {
                mail.wake_writer.notified().await;
                continue;
            };
            while !mail.write_down(received) {
                sleep(LOG_RETRY).await;
            }
            self.message_taken(received);
            self.wake_senders.notify_one();
        }
    }

    /// Gives SURBs to those who ask for them.
    pub(super) async fn refill_others(self: Arc<Self>) {
        let Some(mail) = &self.mail else { return };
        loop {
            let Some(refill) = mail.lock().messages.poll_refill() else {
                mail.wake_refiller.notified().await;
                continue;
            };
            let Some(surbs) = self.make_reply_surbs(refill.surbs).await else { continue };
            let mut rng = rand::rng();
            let (now, recipient) = (Instant::now(), refill.recipient);
            if let Err(error) = mail.lock().messages.refill(now, &mut rng, recipient, surbs) {
                tracing::debug!("SURBs were not sent, and are asked for again: {error}");
            }
            self.wake_senders.notify_one();
        }
    }
}
