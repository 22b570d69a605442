//! The packets of a client: what is sent, what is made ahead, and what arrives.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mixsocks_common::gateway::message::KeptBox;
use mixsocks_common::message::Transmit;
use mixsocks_common::topology::RouteChoice;
use mixsocks_sphinx::{Identifier, PacketHeader, Payload, recover_replies};
use tokio::time::sleep_until;
use zeroize::Zeroizing;

use super::{Shared, State};
use crate::core::Pulled;
use crate::drops::DropReason;
use crate::endpoint::{Arrivals, Reserved};
use crate::health::LoopWish;
use crate::surbs::Awaited;

/// How long sessions are left alone while there is no route: their time goes on, and there is nothing
/// that they could send.
const NO_ROUTE_WAIT: Duration = Duration::from_secs(1);

/// Packets that a task makes at a time: as many as share vectors, and a tenth of a millisecond of work.
const PACKETS_PER_TURN: usize = 8;

/// SURBs that a worker makes at a time: as many as share vectors, and about a millisecond of work.
const SURBS_PER_TURN: usize = 8;

/// What a task has to send.
enum Sending {
    Nothing,
    /// There is something for this provider, but no header.
    NoHeader(usize),
    Packet(PacketHeader),
    /// A part of a message.
    Message(Transmit),
    Loop(LoopWish),
}

impl Shared {
    /// Pulls packets out of the sessions whenever the link takes some: one of several equal tasks.
    pub(super) async fn send_packets(self: Arc<Self>) {
        // An access token may stand in one.
        let mut contents = vec![Zeroizing::new(Vec::new()); PACKETS_PER_TURN];
        loop {
            self.wait_for_work().await;
            let mut permits = match self.endpoint.reserve().await {
                Reserved::Permit(permit) => vec![permit],
                Reserved::TimedOut => continue,
                Reserved::Ended => return self.end_all(),
            };
            let (mut headers, mut messages) = (Vec::new(), Vec::new());
            // Nobody waits for a full batch: it is what there is now.
            let next = loop {
                let Some(out) = contents.get_mut(headers.len()) else { break Sending::Nothing };
                let pulled = headers.len() + messages.len();
                if pulled == PACKETS_PER_TURN {
                    break Sending::Nothing;
                }
                if permits.len() == pulled {
                    let Some(permit) = self.endpoint.try_reserve() else { break Sending::Nothing };
                    permits.push(permit);
                }
                match self.pull(out) {
                    Sending::Packet(header) => headers.push(header),
                    Sending::Message(transmit) => messages.push(transmit),
                    other => break other,
                }
            };
            let mut permits = permits.into_iter();
            if headers.len() + messages.len() > 0 {
                // There may be more; while this task builds, another one looks.
                self.wake_senders.notify_one();
                let with_contents = headers.into_iter().zip(contents.iter().map(|c| &c[..]));
                for (packet, permit) in
                    self.endpoint.build(with_contents).into_iter().zip(&mut permits)
                {
                    permit.send(packet);
                }
                let messages = self.build_messages(messages);
                messages.into_iter().zip(&mut permits).for_each(|(out, permit)| permit.send(out));
            }
            match next {
                Sending::Nothing | Sending::Packet(_) | Sending::Message(_) => {}
                Sending::NoHeader(provider) => drop(self.make_headers(provider, 1)),
                Sending::Loop(wish) => {
                    let made = self.make_loop(wish).map(|header| (header, &[][..]));
                    let packets = self.endpoint.build(made.into_iter());
                    permits.zip(packets).for_each(|(permit, packet)| permit.send(packet));
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Takes the next thing to send; the contents of a packet are written to `contents`.
    fn pull(&self, contents: &mut Vec<u8>) -> Sending {
        let now = Instant::now();
        let mut state = self.lock();
        if let Some(wish) = state.core.next_loop(now) {
            // Whoever looks meanwhile must not send it as well.
            state.core.loop_taken(now, wish);
            return Sending::Loop(wish);
        }
        // Sessions and messages take turns.
        if std::mem::take(&mut state.is_turn_of_messages)
            && let Some(transmit) = self.pull_message(&mut state, now)
        {
            return Sending::Message(transmit);
        }
        let sending = self.pull_packet(&mut state, contents, now);
        state.is_turn_of_messages = true;
        match sending {
            Sending::Nothing => match self.pull_message(&mut state, now) {
                Some(transmit) => Sending::Message(transmit),
                None => Sending::Nothing,
            },
            sending => sending,
        }
    }

    /// Takes the next packet of a session.
    fn pull_packet(&self, state: &mut State, contents: &mut Vec<u8>, now: Instant) -> Sending {
        let State { core, providers, .. } = &mut *state;
        let way_to = |provider: usize| providers[provider].headers.next_way(now);
        let pulled = core.next_packet(now, way_to, contents);
        let sending = match pulled {
            Pulled::Nothing => Sending::Nothing,
            Pulled::NoWay(provider) => Sending::NoHeader(provider),
            Pulled::Packet(provider) => match state.providers[provider].headers.take(now) {
                Some(ready) => Sending::Packet(ready.header),
                None => Sending::Nothing,
            },
        };
        state.settle();
        if matches!(pulled, Pulled::Packet(_)) || state.core.surb_demand() > 0 {
            self.wake_makers.notify_one();
        }
        sending
    }

    fn make_loop(&self, wish: LoopWish) -> Option<PacketHeader> {
        let choice = RouteChoice { through: wish.through, ..self.lock().core.route_choice() };
        let (identifier, ready) = self.endpoint.make_loop(&choice).ok()?;
        self.lock().core.loop_sent(Instant::now(), wish, identifier, ready.way);
        Some(ready.header)
    }

    /// Waits until a session wants to send; handles what is due meanwhile.
    async fn wait_for_work(&self) {
        loop {
            let deadline = {
                let now = Instant::now();
                let mut state = self.lock();
                let has_routes = self.look(&mut state, now).is_ok();
                state.core.handle_timeout(now);
                state.settle();
                let of_mail = self.handle_mail_timeout(&mut state.core, now);
                // What is overdue may have to be asked for with fresh SURBs.
                if state.core.surb_demand() > 0 {
                    self.wake_makers.notify_one();
                }
                if has_routes && state.core.wants_transmit(now)
                    || self.wants_to_send_mail(&mut state.core, now)
                {
                    return;
                }
                let of_core = state.core.poll_timeout();
                // Who is overdue and cannot send waits for nothing.
                let of_core = of_core.map(|at| if has_routes { at } else { now + NO_ROUTE_WAIT });
                let look = state.renewal.poll_timeout();
                of_core.into_iter().chain(of_mail).fold(look, Instant::min)
            };
            tokio::select! {
                () = self.wake_senders.notified() => {}
                () = sleep_until(deadline.into()) => {}
            }
        }
    }

    /// Makes SURBs and headers whenever some are wanted: one of several equal tasks.
    pub(super) async fn make_ahead(self: Arc<Self>) {
        loop {
            let headers: usize =
                (0..self.providers.len()).map(|provider| self.make_headers(provider, 0)).sum();
            if headers + self.make_surbs() == 0 {
                self.wake_makers.notified().await;
            } else {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Makes as many SURBs as sessions want, but not many at a time; returns how many. Without a route
    /// there are none.
    fn make_surbs(&self) -> usize {
        let (claimed, choice) = {
            let mut state = self.lock();
            let claimed = state.core.claim_surbs(Instant::now(), SURBS_PER_TURN);
            (claimed, state.core.route_choice())
        };
        if claimed == 0 {
            return 0;
        }
        let surbs = self.endpoint.make_surbs(&choice, claimed).unwrap_or_default();
        let made = surbs.len();
        self.lock().core.deliver_surbs(claimed, surbs);
        if made > 0 {
            self.wake_makers.notify_one();
            self.wake_senders.notify_one();
        }
        made
    }

    /// Makes `least` headers of packets to a provider, or more if they run short; returns how many.
    /// Without a route there are none.
    fn make_headers(&self, provider: usize, least: usize) -> usize {
        let (claimed, choice) = {
            let mut state = self.lock();
            let claimed = state.providers[provider].headers.claim(Instant::now(), least);
            (claimed, state.core.route_choice())
        };
        if claimed == 0 {
            return 0;
        }
        let recipient = &self.providers[provider];
        let headers = self.endpoint.make_headers(recipient, &choice, claimed).unwrap_or_default();
        let made = headers.len();
        self.lock().providers[provider].headers.deliver(claimed, headers);
        made
    }
}

impl Arrivals for Shared {
    fn arrived(&self, arrived: Vec<(Identifier, Payload)>) {
        let drops = self.endpoint.drops();
        let mut whose = Vec::with_capacity(arrived.len());
        let mut replies = Vec::with_capacity(arrived.len());
        let (mut of_messages, mut mail) = (Vec::new(), Vec::new());
        {
            let (mut state, now) = (self.lock(), Instant::now());
            for (identifier, payload) in arrived {
                if let Some((recovery, returned)) = self.take_awaited_mail(&identifier) {
                    of_messages.push(returned);
                    mail.push((recovery, payload));
                    continue;
                }
                match state.core.take_awaited(&identifier) {
                    Some(Awaited { recovery, session, way }) => {
                        whose.push((session, way));
                        replies.push((recovery, payload));
                    }
                    // A mix that spoils payloads must not count as one that passes them on.
                    None if state.core.awaits_loop(&identifier) => match payload.into_plaintext() {
                        Ok(_) => drop(state.core.loop_came(now, &identifier)),
                        Err(_) => drops.add(DropReason::Changed),
                    },
                    None => drops.add(DropReason::NotAwaited),
                }
            }
        }
        let replies = recover_replies(replies);
        let mut state = self.lock();
        let now = Instant::now();
        for ((session, way), contents) in whose.into_iter().zip(replies) {
            let Ok(contents) = contents else {
                drops.add(DropReason::Changed);
                continue;
            };
            if let Err(error) = state.core.handle_reply(now, session, &way, &contents) {
                drops.add(DropReason::Refused);
                tracing::trace!("a reply was not taken: {error}");
            }
        }
        state.settle();
        drop(state);
        self.handle_mail(of_messages, recover_replies(mail));
        self.wake_senders.notify_one();
        self.wake_makers.notify_one();
    }

    fn delivered(&self, deliveries: Vec<KeptBox>) {
        self.handle_deliveries(&deliveries);
    }

    fn caught_up(&self, number: u32) {
        self.handle_caught_up(number);
    }
}
