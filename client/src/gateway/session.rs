//! The task that keeps a link: logs in, carries frames, and starts over after a cut.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use mixsocks_common::gateway::client::{ClientHandshake, ClientSetup, ClientStep, Welcome};
use mixsocks_common::gateway::delivery::Delivery;
use mixsocks_common::gateway::keepalive::{Due, Keepalive};
use mixsocks_common::gateway::message::{
    ClientMessage, Confirmed, GatewayMessage, MAX_CONFIRMED, Refusal, Resume,
};
use mixsocks_common::gateway::token::Token;
use mixsocks_common::keys::Identity;
use mixsocks_common::link::redial::Failure;
use mixsocks_common::link::{FrameBody, FrameCodec, Redial, tls};
use mixsocks_common::message::packet::MessageSizes;
use mixsocks_common::topology::Role;
use mixsocks_sphinx::{HEADER_LEN, HopAddress, Packet, max_plaintext};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message;
use tracing::{debug, info, warn};

use super::connection::{Connection, Dialler, Socket, control_frame, next_frame};
use super::{Arrival, GatewayLinkConfig, GatewayLinkError, LinkState, Receiving, token_file};
use crate::documents::Documents;

/// From the first TCP packet to the end of the login: a dozen round trips around the world.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// A gateway that takes no byte for that long is stuck.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a farewell may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
/// Frames per write: 16 of them fill some two TLS records.
const WRITE_FRAMES: usize = 16;
/// No gateway keeps a client away for longer.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

type Outgoing = (HopAddress, Packet);

/// What goes to the gateway.
pub(super) struct Uplink {
    pub(super) packets: mpsc::Receiver<Outgoing>,
    /// Numbers of deliveries.
    pub(super) confirmed: mpsc::Receiver<u64>,
    /// Tells when RECEIVE is to be said once more.
    pub(super) receiving: Arc<Receiving>,
}

/// What is to be sent next.
#[derive(Default)]
struct Batch {
    packets: Vec<Outgoing>,
    /// At most [`MAX_CONFIRMED`].
    confirmed: Vec<u64>,
    /// RECEIVE has to be said, with this number.
    receive: Option<u32>,
}

pub(super) struct Session {
    config: GatewayLinkConfig,
    documents: Documents,
    /// The user was told that the gateway has left the network, and it has not come back since.
    told_left: bool,
    dialler: Dialler,
    token: Option<Token>,
    /// What the gateway may ask for again, and how much of its stream has arrived; there once a
    /// login has succeeded.
    flow: Option<Flow>,
}

/// What outlives a connection, and the times of the current one.
struct Flow {
    delivery: Delivery<Outgoing>,
    received: u64,
    keepalive: Keepalive,
}

/// Why carrying ended.
enum End {
    /// The application dropped the receiver.
    Dropped,
    Failed(GatewayLinkError),
}

impl From<GatewayLinkError> for End {
    fn from(error: GatewayLinkError) -> Self {
        Self::Failed(error)
    }
}

impl Session {
    pub(super) fn new(config: GatewayLinkConfig) -> Result<Self, GatewayLinkError> {
        let gateway = config.gateway;
        let documents = Documents::new(config.topology.clone());
        let address = client_address(&documents, gateway)?;
        let tls = tls::gateway_client_config(gateway)
            .map_err(|source| GatewayLinkError::Tls { address, source })?;
        let codec = FrameCodec::new(documents.used().packet_bytes());
        let token =
            token_file::load(&config.token_file, &gateway, &config.identity.identity()).map_err(
                |source| GatewayLinkError::TokenFile { path: config.token_file.clone(), source },
            )?;
        let dialler = Dialler { gateway, address, tls, codec };
        Ok(Self { config, documents, told_left: false, dialler, token, flow: None })
    }

    /// Dials and logs in; registers when there is no token, or none that the gateway knows.
    pub(super) async fn log_in(&mut self) -> Result<Connection, GatewayLinkError> {
        match self.try_log_in().await {
            Err(GatewayLinkError::Refused(Refusal::UnknownToken)) if self.token.is_some() => {
                info!("the gateway does not know this client any more; registering again");
                self.token = None;
                self.try_log_in().await
            }
            result => result,
        }
    }

    /// Looks where the gateway is now.
    fn find_gateway(&mut self) -> Result<(), GatewayLinkError> {
        if let Err(unusable) = self.documents.refresh() {
            debug!("a new topology is not used: {unusable}");
        }
        let found = client_address(&self.documents, self.dialler.gateway);
        if let Err(error) = &found
            && !self.told_left
        {
            warn!("{error}");
        }
        self.told_left = found.is_err();
        self.dialler.address = found?;
        Ok(())
    }

    async fn try_log_in(&mut self) -> Result<Connection, GatewayLinkError> {
        self.find_gateway()?;
        let address = self.dialler.address;
        let seconds = LOGIN_TIMEOUT.as_secs();
        let result = timeout(LOGIN_TIMEOUT, self.shake_hands())
            .await
            .unwrap_or(Err(GatewayLinkError::TimedOut { address, seconds }));
        // When the two disagree about the stream, the next login starts a new one.
        if let Err(GatewayLinkError::Refused(Refusal::BadCounter) | GatewayLinkError::Counter(_)) =
            &result
        {
            self.flow = None;
        }
        result
    }

    async fn shake_hands(&mut self) -> Result<Connection, GatewayLinkError> {
        let (mut connection, binding) = self.dialler.dial().await?;
        let setup = ClientSetup {
            network: self.documents.used().network.clone(),
            gateway: self.dialler.gateway,
            key: self.config.identity.clone(),
            binding,
            token: self.token.clone(),
            invitation: self.config.invitation.clone(),
            resume: self
                .flow
                .as_ref()
                .map(|flow| Resume { stream: flow.delivery.stream(), received: flow.received }),
        };
        let (mut handshake, mut message) = ClientHandshake::start(setup, &mut rand::rng());
        loop {
            connection.send(&message).await?;
            let answer = connection.receive().await?;
            let step = handshake.handle_message(answer).map_err(|rejected| rejected.error)?;
            (handshake, message) = match step {
                ClientStep::Send { state, message } => (state, message),
                ClientStep::Store { token, state, message } => {
                    self.store(token).await?;
                    (state, message)
                }
                ClientStep::Established(welcome) => {
                    self.welcome(welcome)?;
                    return Ok(connection);
                }
                ClientStep::Refused(refusal) => return Err(refusal.into()),
                ClientStep::Ended(GatewayMessage::Evicted) => {
                    return Err(GatewayLinkError::Evicted);
                }
                ClientStep::Ended(_) => return Err(GatewayLinkError::Closed),
            };
        }
    }

    async fn store(&mut self, token: Token) -> Result<(), GatewayLinkError> {
        // Kept even if the file cannot be written: the old token is worth nothing any more.
        self.token = Some(token.clone());
        let path = self.config.token_file.clone();
        let (gateway, client) = (self.dialler.gateway, self.config.identity.identity());
        let write =
            move || token_file::store(&path, &gateway, &client, &token).map_err(|e| (path, e));
        tokio::task::spawn_blocking(write)
            .await
            .expect("writing a file does not panic")
            .map_err(|(path, source)| GatewayLinkError::TokenFile { path, source })
    }

    fn welcome(&mut self, welcome: Welcome) -> Result<(), GatewayLinkError> {
        let keepalive = Keepalive::new(now());
        match &mut self.flow {
            Some(flow) => {
                if welcome.resumed {
                    flow.delivery.resume(welcome.received)?;
                } else {
                    flow.delivery.restart(welcome.stream);
                    flow.received = 0;
                }
                flow.keepalive = keepalive;
                let lost = flow.delivery.take_lost();
                if lost > 0 {
                    debug!("{lost} packets may have been lost with the last connection");
                }
            }
            None => {
                let packet_bytes = self.dialler.codec.packet_bytes();
                let delivery = Delivery::new(welcome.stream, packet_bytes);
                self.flow = Some(Flow { delivery, received: 0, keepalive });
            }
        }
        Ok(())
    }

    /// Carries frames until the link is evicted or its receiver is dropped.
    pub(super) async fn run(
        mut self,
        mut connection: Connection,
        mut uplink: Uplink,
        downlink: mpsc::Sender<Arrival>,
        states: watch::Sender<LinkState>,
    ) {
        let mut redial = Redial::new(now());
        uplink.receiving.begin();
        loop {
            redial.handle_up(now());
            let error = match self.carry(connection, &mut uplink, &downlink).await {
                End::Dropped => break,
                End::Failed(error) => error,
            };
            warn!("the gateway link was cut: {error}");
            match self.reconnect(error, &mut redial, &downlink, &states).await {
                ControlFlow::Continue(next) => connection = next,
                ControlFlow::Break(last) => {
                    states.send_replace(last);
                    return;
                }
            }
            info!("the gateway link is up again");
            // First: whoever knows of this connection takes no answer of an earlier one for its own.
            uplink.receiving.begin();
            states.send_replace(LinkState::Connected);
        }
        states.send_replace(LinkState::Closed);
    }

    async fn reconnect(
        &mut self,
        mut error: GatewayLinkError,
        redial: &mut Redial,
        downlink: &mpsc::Sender<Arrival>,
        states: &watch::Sender<LinkState>,
    ) -> ControlFlow<LinkState, Connection> {
        let mut failure = Failure::Ended;
        for attempts in 0u32.. {
            if let GatewayLinkError::Evicted = error {
                return ControlFlow::Break(LinkState::Evicted);
            }
            let again =
                redial.handle_failure(now(), failure, &mut rand::rng()) + asked_wait(&error);
            states.send_replace(LinkState::Reconnecting { attempts, error: Arc::new(error) });
            let next = async {
                sleep_until(again.into()).await;
                redial.handle_dial(now());
                Box::pin(self.log_in()).await
            };
            let result = tokio::select! {
                result = next => result,
                () = downlink.closed() => return ControlFlow::Break(LinkState::Closed),
            };
            match result {
                Ok(connection) => return ControlFlow::Continue(connection),
                Err(failed) => {
                    debug!("the gateway link is still down: {failed}");
                    failure = match failed {
                        GatewayLinkError::Unreachable { .. } => Failure::Unanswered,
                        _ => Failure::Refused,
                    };
                    error = failed;
                }
            }
        }
        ControlFlow::Break(LinkState::Closed)
    }

    async fn carry(
        &mut self,
        connection: Connection,
        uplink: &mut Uplink,
        downlink: &mpsc::Sender<Arrival>,
    ) -> End {
        let codec = self.dialler.codec;
        let me = *self.config.identity.identity().as_bytes();
        let Some(flow) = self.flow.as_mut() else {
            return End::Failed(GatewayLinkError::Closed);
        };
        let flow = Mutex::new(flow);
        let receives_messages = self.config.receives_messages;
        let carrier = Carrier { codec, me, receives_messages, flow: &flow, wake: Notify::new() };
        let (mut sink, mut stream) = connection.socket.split();
        // Both halves run side by side: were one to wait for the other, two ends that both write
        // could wait for each other for ever.
        let end = tokio::select! {
            end = carrier.read(&mut stream, downlink) => end,
            error = carrier.write(&mut sink, uplink, downlink) => End::Failed(error),
            () = downlink.closed() => End::Dropped,
        };
        if let End::Dropped = end {
            // What was given to the link goes out before the farewell. The gateway notices the closed
            // connection in any case.
            let _ = timeout(GOODBYE_TIMEOUT, carrier.say_goodbye(&mut sink, uplink)).await;
        }
        carrier.flow().delivery.detach(now());
        end
    }
}

/// Where clients reach the gateway, by the document that is used.
fn client_address(
    documents: &Documents,
    gateway: Identity,
) -> Result<SocketAddr, GatewayLinkError> {
    match documents.used().gateway(&gateway).map(|node| node.role) {
        Some(Role::Gateway { client_address }) => Ok(client_address),
        _ => Err(GatewayLinkError::UnknownGateway(gateway)),
    }
}

/// One connection after its handshake.
struct Carrier<'a> {
    codec: FrameCodec,
    me: HopAddress,
    receives_messages: bool,
    /// Held for a few frames, never across an await.
    flow: &'a Mutex<&'a mut Flow>,
    /// Asks the writing half to look at the keepalive.
    wake: Notify,
}

impl<'a> Carrier<'a> {
    fn flow(&self) -> MutexGuard<'_, &'a mut Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(
        &self,
        stream: &mut SplitStream<Socket>,
        downlink: &mpsc::Sender<Arrival>,
    ) -> End {
        loop {
            // Nothing is read that there is no room for: then the gateway waits.
            let Ok(room) = downlink.reserve().await else {
                return End::Dropped;
            };
            let frame = match next_frame(stream).await {
                Ok(frame) => frame,
                Err(error) => return error.into(),
            };
            match self.handle_frame(&frame) {
                Ok(Some(arrival)) => room.send(arrival),
                Ok(None) => {}
                Err(error) => return error.into(),
            }
        }
    }

    fn handle_frame(&self, bytes: &[u8]) -> Result<Option<Arrival>, GatewayLinkError> {
        let frame = self.codec.decode(bytes)?;
        let now = now();
        let mut flow = self.flow();
        flow.delivery.confirm(frame.counter)?;
        flow.keepalive.heard(now);
        if flow.keepalive.due(now).is_some() {
            self.wake.notify_one();
        }
        match frame.body {
            FrameBody::Pad => Ok(None),
            FrameBody::Packet { next_hop, packet } => {
                if *next_hop != self.me {
                    return Err(GatewayLinkError::Unexpected("packet for somebody else"));
                }
                let payload_len = packet.len().saturating_sub(HEADER_LEN);
                let packet = Packet::from_bytes(packet, payload_len)
                    .map_err(|_| GatewayLinkError::Unexpected("packet size"))?;
                flow.received += 1;
                Ok(Some(Arrival::Packet(packet)))
            }
            FrameBody::Control(body) => match GatewayMessage::decode(body)? {
                GatewayMessage::Evicted => Err(GatewayLinkError::Evicted),
                GatewayMessage::Goodbye => Err(GatewayLinkError::Closed),
                GatewayMessage::Delivery(kept) if self.receives_messages => {
                    let contents_bytes = max_plaintext(self.codec.packet_bytes() - HEADER_LEN);
                    let sizes = MessageSizes::new(contents_bytes);
                    match sizes.is_some_and(|sizes| kept.sealed.len() == sizes.box_bytes()) {
                        true => Ok(Some(Arrival::Delivery(kept))),
                        false => Err(GatewayLinkError::Unexpected("box size")),
                    }
                }
                GatewayMessage::CaughtUp(number) if self.receives_messages => {
                    Ok(Some(Arrival::CaughtUp(number)))
                }
                message => Err(GatewayLinkError::Unexpected(message.name())),
            },
        }
    }

    async fn write(
        &self,
        sink: &mut SplitSink<Socket, Message>,
        uplink: &mut Uplink,
        downlink: &mpsc::Sender<Arrival>,
    ) -> GatewayLinkError {
        let Uplink { packets, confirmed, receiving } = uplink;
        let receive = self.receives_messages.then(|| receiving.first());
        let mut batch = Batch { receive, ..Batch::default() };
        let mut senders_are_gone = false;
        let mut confirmers_are_gone = false;
        loop {
            let is_stuck = downlink.capacity() == 0;
            let frames = match self.gather(&mut batch, is_stuck) {
                Ok(frames) => frames,
                Err(error) => return error,
            };
            if frames.is_empty() {
                let due = self.flow().keepalive.poll_timeout();
                tokio::select! {
                    count = packets.recv_many(&mut batch.packets, WRITE_FRAMES),
                        if !senders_are_gone =>
                    {
                        senders_are_gone = count == 0;
                    }
                    count = confirmed.recv_many(&mut batch.confirmed, MAX_CONFIRMED),
                        if !confirmers_are_gone =>
                    {
                        confirmers_are_gone = count == 0;
                    }
                    () = receiving.again.notified(), if self.receives_messages => {
                        batch.receive = Some(receiving.number());
                    }
                    () = self.wake.notified() => {}
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
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.into(),
                Err(_) => return GatewayLinkError::Stalled,
            }
        }
    }

    /// Sends what waits, and takes leave.
    async fn say_goodbye(
        &self,
        sink: &mut SplitSink<Socket, Message>,
        uplink: &mut Uplink,
    ) -> Result<(), GatewayLinkError> {
        let mut batch = Batch::default();
        uplink.packets.close();
        uplink.confirmed.close();
        while let Ok(outgoing) = uplink.packets.try_recv() {
            batch.packets.push(outgoing);
        }
        loop {
            while batch.confirmed.len() < MAX_CONFIRMED
                && let Ok(number) = uplink.confirmed.try_recv()
            {
                batch.confirmed.push(number);
            }
            let frames = self.gather(&mut batch, false)?;
            if frames.is_empty() {
                break;
            }
            for frame in frames {
                sink.feed(frame).await?;
            }
        }
        let received = self.flow().received;
        sink.feed(control_frame(&self.codec, received, &ClientMessage::Goodbye)?).await?;
        sink.close().await?;
        Ok(())
    }

    /// The next frames to write, at most [`WRITE_FRAMES`] and two; none when there is nothing to do.
    fn gather(&self, batch: &mut Batch, is_stuck: bool) -> Result<Vec<Message>, GatewayLinkError> {
        let now = now();
        let mut flow = self.flow();
        let Flow { delivery, received, keepalive } = &mut **flow;
        delivery.handle_timeout(now);
        for outgoing in batch.packets.drain(..) {
            // There is room: what was sent before is forgotten for it.
            if let Err(error) = delivery.push(outgoing, now) {
                debug!("a packet was dropped: {error}");
            }
        }
        let mut frames = Vec::new();
        if let Some(number) = batch.receive.take() {
            frames.push(control_frame(&self.codec, *received, &ClientMessage::Receive(number))?);
        }
        if let Some(confirmed) = Confirmed::new(std::mem::take(&mut batch.confirmed)) {
            let confirm = ClientMessage::Confirm(confirmed);
            frames.push(control_frame(&self.codec, *received, &confirm)?);
        }
        while frames.len() < WRITE_FRAMES
            && let Some((first_hop, packet)) = delivery.poll_transmit()
        {
            let mut frame = Vec::with_capacity(self.codec.frame_bytes());
            self.codec.encode_packet(*received, first_hop, packet.as_bytes(), &mut frame);
            frames.push(Message::Binary(frame.into()));
        }
        if is_stuck && keepalive.due(now) == Some(Due::Close) {
            // It is the application that does not read, not the gateway that does not write.
            keepalive.heard(now);
        }
        match keepalive.due(now) {
            Some(Due::Close) => return Err(GatewayLinkError::Silent),
            Some(Due::Pad) if frames.is_empty() => {
                let mut frame = Vec::with_capacity(self.codec.frame_bytes());
                self.codec.encode_pad(*received, &mut frame);
                frames.push(Message::Binary(frame.into()));
            }
            Some(Due::Pad) | None => {}
        }
        if !frames.is_empty() {
            keepalive.sent(now);
        }
        Ok(frames)
    }
}

/// How much longer than else the gateway wants this client to wait.
fn asked_wait(error: &GatewayLinkError) -> Duration {
    match error {
        GatewayLinkError::Refused(Refusal::RateLimited { retry_after_s }) => {
            Duration::from_secs((*retry_after_s).into()).min(LONGEST_RETRY_AFTER)
        }
        _ => Duration::ZERO,
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mixsocks_common::keys::IdentityKey;

    use super::*;
    use crate::testing::TestNetwork;

    #[test]
    fn the_newest_document_tells_where_to_dial() {
        let folder = tempfile::tempdir().unwrap();
        let mut network = TestNetwork::new();
        let [gateway, _] = network.gateways();
        let (documents, topology) = watch::channel(Arc::new(network.topology(0)));
        let config = GatewayLinkConfig {
            topology,
            gateway,
            identity: Arc::new(IdentityKey::generate(&mut rand::rng())),
            token_file: folder.path().join("token"),
            invitation: None,
            receives_messages: false,
        };
        let mut session = Session::new(config).unwrap();
        let first = session.dialler.address;
        let moved = SocketAddr::from(([127, 0, 0, 1], 77));
        network.set_client_address(TestNetwork::OWN_GATEWAY, moved);
        session.find_gateway().unwrap();
        assert_eq!(session.dialler.address, first, "nothing new yet");
        documents.send_replace(Arc::new(network.topology(0)));
        session.find_gateway().unwrap();
        assert_eq!(session.dialler.address, moved);

        // It leaves: that is told once, and looked at again with each try.
        let mut without = TestNetwork::new();
        std::mem::swap(&mut network, &mut without);
        documents.send_replace(Arc::new(network.topology(0)));
        for _ in 0..2 {
            let error = session.find_gateway().unwrap_err();
            assert!(matches!(error, GatewayLinkError::UnknownGateway(left) if left == gateway));
            assert!(session.told_left);
        }
        documents.send_replace(Arc::new(without.topology(0)));
        session.find_gateway().unwrap();
        assert!(!session.told_left);
    }

    #[test]
    fn a_gateway_that_asks_for_time_gets_it_but_not_for_ever() {
        let limited = |retry_after_s| {
            asked_wait(&GatewayLinkError::Refused(Refusal::RateLimited { retry_after_s }))
        };
        assert_eq!(limited(40), Duration::from_secs(40));
        assert_eq!(limited(u16::MAX), LONGEST_RETRY_AFTER);
        assert_eq!(asked_wait(&GatewayLinkError::Closed), Duration::ZERO);
    }
}
