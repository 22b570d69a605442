//! Who is connected, and what is held for whom.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use dashmap::{DashMap, Entry};
use mixsocks_common::gateway::delivery::{CounterError, Delivery, PushError};
use mixsocks_common::gateway::message::{GatewayMessage, Refusal, StreamId};
use mixsocks_common::gateway::server::Login;
use mixsocks_sphinx::Packet;
use rand::RngExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::store::ClientId;
use crate::counters::{Counters, DropReason};
use crate::sources::{Source, SourcePlace, SourcePlaces};

/// Most clients that are connected or were within the last seconds. Each costs a socket and some
/// 30 KB, and up to 140 KB more while frames wait to be written.
pub const MAX_CLIENTS: usize = 16 * 1024;

/// Most clients that are connected from one IPv4 address or one IPv6 network of 64 bits; many people
/// may share one. A single source then takes neither all places nor all file descriptors.
pub const MAX_CLIENTS_PER_SOURCE: usize = 256;
/// As many of them from one IPv6 network of 48 bits, which one customer may hold.
pub const MAX_CLIENTS_PER_SITE: usize = 1024;

/// Most bytes of packets that are held for all clients together; one of them may take no more than
/// [`mixsocks_common::gateway::delivery::MAX_HELD_BYTES`].
pub const MAX_HELD_BYTES_TOTAL: usize = 512 * 1024 * 1024;

/// The clients of a gateway.
pub(super) struct Clients {
    /// By identity, as packets name it.
    table: DashMap<[u8; 32], Arc<Client>>,
    /// One for each entry of the table.
    places: Arc<Semaphore>,
    /// One for each client that is connected.
    source_places: Arc<SourcePlaces>,
    held_packets: AtomicUsize,
    max_held_packets: usize,
    packet_bytes: usize,
    counters: Arc<Counters>,
}

struct Client {
    /// Held for a few packets, never across an await.
    state: Mutex<ClientState>,
    _place: OwnedSemaphorePermit,
}

struct ClientState {
    delivery: Delivery<Packet>,
    /// PACKET frames of the client in this stream.
    received: u64,
    /// Which connection is the newest.
    connection: u64,
    /// Something was kept for the client since that connection last looked.
    has_new: bool,
    /// Wakes the writing half of that connection.
    wake: Arc<Notify>,
    /// Tells that connection that a newer one took over.
    evict: Arc<Notify>,
    /// That of the source of that connection, while it lasts.
    source_place: Option<SourcePlace>,
}

/// A newer connection of the same identity took over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Evicted;

/// A client's connection in the table; detached when dropped.
pub(super) struct Attached {
    clients: Arc<Clients>,
    client: Arc<Client>,
    connection: u64,
    wake: Arc<Notify>,
    evict: Arc<Notify>,
}

impl Clients {
    pub(super) fn new(packet_bytes: usize, counters: Arc<Counters>) -> Self {
        Self::with_limits(packet_bytes, counters, MAX_CLIENTS, MAX_HELD_BYTES_TOTAL)
    }

    fn with_limits(
        packet_bytes: usize,
        counters: Arc<Counters>,
        max_clients: usize,
        max_held_bytes: usize,
    ) -> Self {
        Self {
            table: DashMap::new(),
            places: Arc::new(Semaphore::new(max_clients)),
            source_places: Arc::new(SourcePlaces::new(
                MAX_CLIENTS_PER_SOURCE,
                MAX_CLIENTS_PER_SITE,
            )),
            held_packets: AtomicUsize::new(0),
            max_held_packets: max_held_bytes / packet_bytes,
            packet_bytes,
            counters,
        }
    }

    /// Puts a connection in place of an older one of the same client, which is told. Needs no second
    /// place if both come from one source: who dials again after a cut that the gateway has not
    /// noticed is not kept out.
    ///
    /// # Errors
    /// [`Refusal::TooManyClients`], [`Refusal::TooManyFromSource`] or [`Refusal::BadCounter`], which
    /// leave everything as it was.
    pub(super) fn attach(
        self: &Arc<Self>,
        login: Login,
        source: Source,
        now: Instant,
    ) -> Result<(Attached, GatewayMessage), Refusal> {
        // The entry is locked throughout, so that a client that is just being removed is not
        // attached to.
        let entry = self.table.entry(*login.identity.as_bytes());
        let client = match &entry {
            Entry::Occupied(entry) => entry.get().clone(),
            Entry::Vacant(_) => self.new_client(now)?,
        };
        let (connection, wake, evict, welcome) = self.with(&client, |state| {
            let has_place =
                state.source_place.as_ref().is_some_and(|place| place.source() == source);
            let new_place = if has_place {
                None
            } else {
                Some(self.source_places.take(source).ok_or(Refusal::TooManyFromSource)?)
            };
            match login.resume {
                Some(resume) if resume.stream == state.delivery.stream() => {
                    state.delivery.resume(resume.received).map_err(|_| Refusal::BadCounter)?;
                }
                _ => {
                    state.delivery.restart(new_stream());
                    state.received = 0;
                }
            }
            state.evict.notify_one();
            state.evict = Arc::default();
            state.wake = Arc::default();
            state.connection += 1;
            if new_place.is_some() {
                state.source_place = new_place;
            }
            let (stream, received) = (state.delivery.stream(), state.received);
            let welcome = GatewayMessage::Welcome { stream, received };
            Ok((state.connection, state.wake.clone(), state.evict.clone(), welcome))
        })?;
        entry.or_insert(client.clone());
        Ok((Attached { clients: self.clone(), client, connection, wake, evict }, welcome))
    }

    fn new_client(&self, now: Instant) -> Result<Arc<Client>, Refusal> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| Refusal::TooManyClients)?;
        let mut delivery = Delivery::new(new_stream(), self.packet_bytes);
        delivery.detach(now);
        let state = ClientState {
            delivery,
            received: 0,
            connection: 0,
            has_new: false,
            wake: Arc::default(),
            evict: Arc::default(),
            source_place: None,
        };
        Ok(Arc::new(Client { state: Mutex::new(state), _place: place }))
    }

    /// Takes a packet for a client.
    ///
    /// # Errors
    /// Why it was dropped.
    pub(super) fn deliver(
        &self,
        client: &[u8; 32],
        packet: Packet,
        now: Instant,
    ) -> Result<(), DropReason> {
        let client = self.table.get(client).map(|entry| entry.clone());
        let client = client.ok_or(DropReason::UnknownClient)?;
        if self.held_packets.load(Ordering::Relaxed) >= self.max_held_packets {
            return Err(DropReason::ClientQueueFull);
        }
        self.with(&client, |state| match state.delivery.push(packet, now) {
            Ok(()) => {
                state.wake.notify_one();
                Ok(())
            }
            Err(PushError::Gone) => Err(DropReason::UnknownClient),
            Err(PushError::Full) => Err(DropReason::ClientQueueFull),
        })
    }

    /// Wakes the connection of a client for which something new is kept, if there is one.
    pub(super) fn notify(&self, client: &[u8; 32]) {
        let client = self.table.get(client).map(|entry| entry.clone());
        let Some(client) = client else { return };
        self.with(&client, |state| {
            state.has_new = true;
            state.wake.notify_one();
        });
    }

    /// Lets go of expired packets, and of clients that have been away for too long.
    pub(super) fn handle_timeout(&self, now: Instant) {
        self.table.retain(|_, client| {
            self.with(client, |state| {
                state.delivery.handle_timeout(now);
                !(state.delivery.is_gone(now) && state.delivery.is_empty())
            })
        });
    }

    /// Who is connected now.
    pub(super) fn connected(&self) -> Vec<ClientId> {
        let is_connected =
            |client: &Client| self.with(client, |state| state.source_place.is_some());
        self.table
            .iter()
            .filter(|entry| is_connected(entry.value()))
            .map(|entry| *entry.key())
            .collect()
    }

    /// Does something with a client's state, and keeps the books.
    fn with<T>(&self, client: &Client, work: impl FnOnce(&mut ClientState) -> T) -> T {
        let mut state = client.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.delivery.len();
        let result = work(&mut state);
        let after = state.delivery.len();
        let lost = state.delivery.take_lost();
        drop(state);
        if after > before {
            self.held_packets.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.held_packets.fetch_sub(before - after, Ordering::Relaxed);
        }
        if lost > 0 {
            self.counters.add_drops(DropReason::Expired, lost);
        }
        result
    }
}

/// Shows no client.
#[cfg(test)]
impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

impl Attached {
    /// Waits until a newer connection has taken over.
    pub(super) async fn evicted(&self) {
        self.evict.notified().await;
    }

    /// Waits until there may be something to write.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Wakes the writing half.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Whether something new was kept for the client since the last call.
    pub(super) fn take_new(&self) -> Result<bool, Evicted> {
        self.with(|state| std::mem::take(&mut state.has_new))
    }

    /// Hands up to `max` packets to `write`, and returns how many frames of the client have
    /// arrived.
    pub(super) fn transmit(
        &self,
        max: usize,
        mut write: impl FnMut(u64, &Packet),
    ) -> Result<u64, Evicted> {
        self.with(|state| {
            for _ in 0..max {
                let received = state.received;
                let Some(packet) = state.delivery.poll_transmit() else { break };
                write(received, packet);
            }
            state.received
        })
    }

    /// Takes the counter of a frame of the client, and counts the frame if it is a PACKET.
    pub(super) fn handle_frame(
        &self,
        counter: u64,
        is_packet: bool,
    ) -> Result<Result<(), CounterError>, Evicted> {
        self.with(|state| {
            state.delivery.confirm(counter)?;
            state.received += u64::from(is_packet);
            Ok(())
        })
    }

    /// How many PACKET frames of the client have arrived; zero once it is evicted.
    pub(super) fn received(&self) -> u64 {
        self.with(|state| state.received).unwrap_or(0)
    }

    fn with<T>(&self, work: impl FnOnce(&mut ClientState) -> T) -> Result<T, Evicted> {
        self.clients.with(&self.client, |state| {
            if state.connection == self.connection { Ok(work(state)) } else { Err(Evicted) }
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let now = tokio::time::Instant::now().into_std();
        // An evicted connection leaves the newer one alone.
        let _ = self.with(|state| {
            state.delivery.detach(now);
            state.source_place = None;
        });
    }
}

fn new_stream() -> StreamId {
    let id = rand::rng().random_range(1..=u64::MAX);
    StreamId::new(id).expect("the range starts at one")
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use futures_util::FutureExt;
    use mixsocks_common::gateway::delivery::HOLD_TIME;
    use mixsocks_common::gateway::message::Resume;
    use mixsocks_common::keys::{Identity, IdentityKey};

    use super::*;

    const PACKET_BYTES: usize = 2000;

    fn clients(max_clients: usize, max_held: usize) -> (Arc<Clients>, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let max_held = max_held * PACKET_BYTES;
        let clients = Clients::with_limits(PACKET_BYTES, counters.clone(), max_clients, max_held);
        (Arc::new(clients), counters)
    }

    fn identity() -> Identity {
        IdentityKey::generate(&mut rand::rng()).identity()
    }

    fn packet() -> Packet {
        let payload_len = PACKET_BYTES - mixsocks_sphinx::HEADER_LEN;
        Packet::from_bytes(vec![1; PACKET_BYTES], payload_len).unwrap()
    }

    fn attach(
        clients: &Arc<Clients>,
        identity: Identity,
        resume: Option<Resume>,
    ) -> Result<(Attached, StreamId, u64), Refusal> {
        attach_from(clients, source(1), identity, resume)
    }

    fn source(n: u8) -> Source {
        IpAddr::from([192, 0, 2, n]).into()
    }

    fn attach_from(
        clients: &Arc<Clients>,
        source: Source,
        identity: Identity,
        resume: Option<Resume>,
    ) -> Result<(Attached, StreamId, u64), Refusal> {
        let login = Login { identity, resume };
        let (attached, welcome) = clients.attach(login, source, Instant::now())?;
        let GatewayMessage::Welcome { stream, received } = welcome else { panic!("{welcome:?}") };
        Ok((attached, stream, received))
    }

    fn transmitted(attached: &Attached) -> usize {
        let mut count = 0;
        attached.transmit(usize::MAX, |_, _| count += 1).unwrap();
        count
    }

    #[test]
    fn the_newest_connection_wins_and_the_older_one_can_do_nothing_more() {
        let (clients, _) = clients(2, 10);
        let client = identity();
        let (old, stream, _) = attach(&clients, client, None).unwrap();
        assert_eq!(old.handle_frame(0, true), Ok(Ok(())));
        let resume = Some(Resume { stream, received: 0 });
        let (new, resumed, received) = attach(&clients, client, resume).unwrap();
        assert_eq!((resumed, received), (stream, 1));
        assert_eq!(old.transmit(1, |_, _| {}), Err(Evicted));
        assert_eq!(old.handle_frame(0, true), Err(Evicted));
        drop(old);
        clients.deliver(client.as_bytes(), packet(), Instant::now()).unwrap();
        assert_eq!(transmitted(&new), 1);
    }

    #[tokio::test]
    async fn a_connection_that_is_put_out_need_not_try_to_do_anything() {
        let (clients, _) = clients(2, 10);
        let client = identity();
        let (old, ..) = attach(&clients, client, None).unwrap();
        let (new, ..) = attach(&clients, client, None).unwrap();
        old.evicted().await;
        assert!(new.evicted().now_or_never().is_none());
    }

    #[test]
    fn a_source_has_its_share_of_places_and_no_more() {
        let (clients, _) = clients(2 * MAX_CLIENTS_PER_SOURCE, 10);
        let ids: Vec<_> = (0..=MAX_CLIENTS_PER_SOURCE).map(|_| identity()).collect();
        let (last, all) = ids.split_last().unwrap();
        let mut attached: Vec<_> =
            all.iter().map(|id| attach(&clients, *id, None).unwrap().0).collect();
        let full = Some(Refusal::TooManyFromSource);
        assert_eq!(attach(&clients, *last, None).err(), full);
        assert!(attach_from(&clients, source(2), *last, None).is_ok());
        assert_eq!(attach(&clients, *last, None).err(), full);
        // Who is there already may dial again.
        attached.push(attach(&clients, all[0], None).unwrap().0);
        assert_eq!(attach(&clients, *last, None).err(), full);
        // The one that was put out frees nothing, and one that moves away frees its place.
        attached.remove(0);
        assert_eq!(attach(&clients, *last, None).err(), full);
        let _moved = attach_from(&clients, source(3), all[1], None).unwrap();
        assert!(attach(&clients, *last, None).is_ok());
    }

    #[test]
    fn a_lying_counter_neither_resumes_nor_evicts() {
        let (clients, _) = clients(2, 10);
        let client = identity();
        let (attached, stream, _) = attach(&clients, client, None).unwrap();
        let resume = Some(Resume { stream, received: 1 });
        assert_eq!(attach(&clients, client, resume).err(), Some(Refusal::BadCounter));
        assert!(matches!(attached.handle_frame(1, false), Ok(Err(_))));
        clients.deliver(client.as_bytes(), packet(), Instant::now()).unwrap();
        assert_eq!(transmitted(&attached), 1);
    }

    #[test]
    fn who_was_cut_off_is_not_connected_though_packets_are_held() {
        let (clients, _) = clients(2, 10);
        let [away, here] = [identity(), identity()];
        drop(attach(&clients, away, None).unwrap());
        let _attached = attach(&clients, here, None).unwrap();
        assert_eq!(clients.deliver(away.as_bytes(), packet(), Instant::now()), Ok(()));
        assert_eq!(clients.connected(), [*here.as_bytes()]);
    }

    #[test]
    fn strangers_and_those_long_gone_get_nothing() {
        let (clients, counters) = clients(1, 10);
        let client = identity();
        let deliver = |now| clients.deliver(client.as_bytes(), packet(), now);
        let start = Instant::now();
        assert_eq!(deliver(start), Err(DropReason::UnknownClient));
        let (attached, ..) = attach(&clients, client, None).unwrap();
        drop(attached);
        assert_eq!(deliver(start), Ok(()));
        // Its place is taken until it is gone.
        assert_eq!(attach(&clients, identity(), None).err(), Some(Refusal::TooManyClients));
        let late = Instant::now() + HOLD_TIME;
        assert_eq!(deliver(late), Err(DropReason::UnknownClient));
        clients.handle_timeout(late);
        assert_eq!(clients.held_packets.load(Ordering::Relaxed), 0);
        assert_eq!(counters.snapshot().dropped(DropReason::Expired), 1);
        assert!(clients.table.is_empty());
        assert!(attach(&clients, identity(), None).is_ok());
    }

    #[test]
    fn all_clients_together_hold_no_more_than_their_share() {
        let (clients, _) = clients(10, 3);
        let ids: Vec<_> = (0..4).map(|_| identity()).collect();
        let attached: Vec<_> =
            ids.iter().map(|id| attach(&clients, *id, None).unwrap().0).collect();
        let now = Instant::now();
        let deliver = |at: usize| clients.deliver(ids[at].as_bytes(), packet(), now);
        for at in 0..3 {
            assert_eq!(deliver(at), Ok(()));
        }
        assert_eq!(deliver(3), Err(DropReason::ClientQueueFull));
        assert_eq!(transmitted(&attached[0]), 1);
        attached[0].handle_frame(1, false).unwrap().unwrap();
        assert_eq!(deliver(3), Ok(()));
        clients.handle_timeout(now + HOLD_TIME + Duration::from_secs(1));
        assert_eq!(clients.held_packets.load(Ordering::Relaxed), 0);
    }
}
