//! A client's connection after its login: packets both ways, and deliveries.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use mixsocks_common::gateway::keepalive::{Due, Keepalive};
use mixsocks_common::gateway::message::{ClientMessage, GatewayMessage};
use mixsocks_common::keys::Identity;
use mixsocks_common::link::{FrameBody, FrameCodec, LinkError};
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{HEADER_LEN, Packet};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;
use tracing::debug;

use super::acceptor::until_stopped;
use super::clients::{Attached, Evicted};
use super::inbox::{Inbox, InboxReader};
use super::limits::ReadLimit;
use super::login::{ConnectionError, LoggedIn, Socket, control_frame, next_frame};
use super::messages::Messages;
use crate::counters::{Counters, DropReason};
use crate::link::{LinkPool, NextHops};

/// A client that takes no byte for that long is stuck.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a farewell may take.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Frames per write: 16 of them fill some two TLS records.
const WRITE_FRAMES: usize = 16;

/// Where packets of clients go.
pub(super) struct Uplink {
    me: Identity,
    pool: Arc<LinkPool>,
    /// Locked for a look-up, or to be replaced; never across an await.
    next_hops: RwLock<NextHops>,
    counters: Arc<Counters>,
}

impl Uplink {
    pub(super) fn new(
        pool: Arc<LinkPool>,
        topology: &Topology,
        me: Identity,
        counters: Arc<Counters>,
    ) -> Self {
        Self { me, pool, next_hops: RwLock::new(NextHops::new(topology, &me)), counters }
    }

    /// Goes on with another topology.
    pub(super) fn set_topology(&self, topology: &Topology) -> Result<(), LinkError> {
        let next_hops = NextHops::new(topology, &self.me);
        let result = self.pool.set_topology(topology);
        *self.next_hops.write().unwrap_or_else(PoisonError::into_inner) = next_hops;
        result
    }

    fn handle_packet(&self, next_hop: &[u8; 32], packet: Packet) {
        self.counters.add_in(1);
        self.send(next_hop, packet);
    }

    /// Sends a packet to a mix of layer 1, or drops and counts it. Never waits.
    pub(super) fn send(&self, next_hop: &[u8; 32], packet: Packet) {
        let resolved = {
            let next_hops = self.next_hops.read().unwrap_or_else(PoisonError::into_inner);
            next_hops.resolve(next_hop)
        };
        match resolved {
            Ok(mix) => self.pool.send(&mix, packet),
            Err(reason) => self.counters.add_drop(reason),
        }
    }
}

/// Why a connection ended.
enum End {
    Evicted,
    /// The gateway shuts down.
    Stopped,
    Failed(ConnectionError),
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        Self::Failed(error)
    }
}

impl From<Evicted> for End {
    fn from(Evicted: Evicted) -> Self {
        Self::Evicted
    }
}

struct Carrier<'a> {
    codec: FrameCodec,
    uplink: &'a Uplink,
    messages: &'a Messages,
    identity: Identity,
    attached: Attached,
    inbox: Arc<Inbox>,
    keepalive: Mutex<Keepalive>,
}

/// Carries packets until the connection ends.
pub(super) async fn carry(
    client: LoggedIn,
    codec: FrameCodec,
    uplink: Arc<Uplink>,
    messages: Arc<Messages>,
    mut stopped: watch::Receiver<bool>,
) {
    let LoggedIn { socket, attached, identity } = client;
    let keepalive = Mutex::new(Keepalive::new(Instant::now().into_std()));
    let (uplink, messages, inbox) = (&*uplink, &*messages, Arc::new(messages.inbox()));
    let carrier = Carrier { codec, uplink, messages, identity, attached, inbox, keepalive };
    let (mut sink, mut stream) = socket.split();
    // Both halves run side by side: were one to wait for the other, two ends that both write could
    // wait for each other for ever.
    let end = tokio::select! {
        end = carrier.read(&mut stream) => end,
        end = carrier.write(&mut sink) => end,
        // Else it would stay for as long as the client takes nothing.
        () = carrier.attached.evicted() => End::Evicted,
        () = until_stopped(&mut stopped) => End::Stopped,
    };
    let received = carrier.attached.received();
    // From here on packets wait for the next connection.
    drop(carrier);
    let message = match end {
        End::Evicted => GatewayMessage::Evicted,
        End::Stopped => GatewayMessage::Goodbye,
        End::Failed(error) => {
            if error.is_breach() {
                uplink.counters.add_drop(DropReason::MalformedFrame);
            }
            debug!("a client's connection ended: {error}");
            return;
        }
    };
    let Ok(frame) = control_frame(&codec, received, &message) else { return };
    let farewell = async {
        sink.send(frame).await?;
        sink.close().await
    };
    // Who does not take it sees the connection close.
    let _ = timeout(FAREWELL_TIMEOUT, farewell).await;
}

impl Carrier<'_> {
    fn keepalive(&self) -> MutexGuard<'_, Keepalive> {
        self.keepalive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never waits for the writing half, nor for the mixes, so that the client can always write, if
    /// no faster than [`ReadLimit`] allows and, when it confirms deliveries, than the store takes
    /// that.
    async fn read(&self, stream: &mut SplitStream<Socket>) -> End {
        let mut limit = ReadLimit::new(self.codec.frame_bytes(), Instant::now().into_std());
        loop {
            let result = match next_frame(stream).await {
                Ok(frame) => self.handle_frame(&frame),
                Err(error) => Err(error.into()),
            };
            match result {
                Ok(confirmed) if confirmed.is_empty() => {}
                Ok(confirmed) => self.messages.confirm(&self.identity, confirmed).await,
                Err(end) => return end,
            }
            if let Some(ready_at) = limit.handle_frame(Instant::now().into_std()) {
                sleep_until(ready_at.into()).await;
            }
        }
    }

    /// Returns the numbers of deliveries that the client has confirmed.
    fn handle_frame(&self, bytes: &[u8]) -> Result<Vec<u64>, End> {
        let frame = self.codec.decode(bytes).map_err(ConnectionError::from)?;
        let is_packet = matches!(frame.body, FrameBody::Packet { .. });
        self.attached.handle_frame(frame.counter, is_packet)?.map_err(ConnectionError::from)?;
        let now = Instant::now().into_std();
        let is_due = {
            let mut keepalive = self.keepalive();
            keepalive.heard(now);
            keepalive.due(now).is_some()
        };
        if is_due {
            self.attached.wake();
        }
        match frame.body {
            FrameBody::Pad => Ok(Vec::new()),
            FrameBody::Packet { next_hop, packet } => {
                let payload_len = packet.len().saturating_sub(HEADER_LEN);
                let packet = Packet::from_bytes(packet, payload_len)
                    .map_err(|_| ConnectionError::Unexpected("packet size"))?;
                self.uplink.handle_packet(next_hop, packet);
                Ok(Vec::new())
            }
            FrameBody::Control(body) => {
                match ClientMessage::decode(body).map_err(ConnectionError::from)? {
                    ClientMessage::Receive(number) => {
                        self.inbox.lock().handle_receive(number);
                        self.attached.wake();
                        Ok(Vec::new())
                    }
                    ClientMessage::Confirm(confirmed) => {
                        Ok(self.inbox.lock().handle_confirm(confirmed.into_numbers()))
                    }
                    ClientMessage::Goodbye => Err(ConnectionError::Closed.into()),
                    message => Err(ConnectionError::Unexpected(message.name()).into()),
                }
            }
        }
    }

    async fn write(&self, sink: &mut SplitSink<Socket, Message>) -> End {
        let mut reader = self.messages.inbox_reader(&self.identity, self.inbox.clone());
        loop {
            let (frames, packets) = match self.gather(&mut reader) {
                Ok(gathered) => gathered,
                Err(end) => return end,
            };
            if frames.is_empty() {
                let due = self.keepalive().poll_timeout();
                tokio::select! {
                    () = self.attached.woken() => {}
                    () = reader.changed() => {}
                    () = sleep_until(due.into()) => {}
                }
                continue;
            }
            let write = async {
                for frame in frames {
                    sink.feed(frame).await?;
                }
                sink.flush().await
            };
            match timeout(WRITE_TIMEOUT, write).await {
                Ok(Ok(())) => self.uplink.counters.add_out(packets),
                Ok(Err(error)) => return ConnectionError::from(error).into(),
                Err(_) => return ConnectionError::Stalled.into(),
            }
        }
    }

    /// The next frames to write, at most [`WRITE_FRAMES`] and one, and how many of them are packets;
    /// none when there is nothing to do.
    fn gather(&self, reader: &mut InboxReader) -> Result<(Vec<Message>, u64), End> {
        if self.attached.take_new()? {
            self.inbox.lock().handle_new();
        }
        reader.poll();
        let mut inbox = self.inbox.lock();
        // Packets and deliveries have half of the frames each, unless the others need less.
        let max_packets = WRITE_FRAMES - inbox.ready().min(WRITE_FRAMES / 2);
        let mut frames = Vec::new();
        let received = self.attached.transmit(max_packets, |received, packet| {
            let mut frame = Vec::with_capacity(self.codec.frame_bytes());
            let me = self.identity.as_bytes();
            self.codec.encode_packet(received, me, packet.as_bytes(), &mut frame);
            frames.push(Message::Binary(frame.into()));
        })?;
        let packets = frames.len() as u64;
        while frames.len() < WRITE_FRAMES
            && let Some(kept) = inbox.poll_transmit()
        {
            let delivery = GatewayMessage::Delivery(kept);
            let frame = control_frame(&self.codec, received, &delivery);
            frames.push(frame.map_err(ConnectionError::from)?);
        }
        if let Some(number) = inbox.poll_caught_up() {
            let frame = control_frame(&self.codec, received, &GatewayMessage::CaughtUp(number));
            frames.push(frame.map_err(ConnectionError::from)?);
        }
        drop(inbox);
        let now = Instant::now().into_std();
        let mut keepalive = self.keepalive();
        match keepalive.due(now) {
            Some(Due::Close) => return Err(ConnectionError::Silent.into()),
            Some(Due::Pad) if frames.is_empty() => {
                let mut frame = Vec::with_capacity(self.codec.frame_bytes());
                self.codec.encode_pad(received, &mut frame);
                frames.push(Message::Binary(frame.into()));
            }
            Some(Due::Pad) | None => {}
        }
        if !frames.is_empty() {
            keepalive.sent(now);
        }
        Ok((frames, packets))
    }
}
