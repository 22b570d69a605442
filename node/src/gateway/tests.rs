//! Gateways and clients over loopback, honest and not.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use mixsocks_client::gateway::{
    Arrival, GatewayLink, GatewayLinkConfig, GatewayLinkError, GatewayReceiver, GatewaySender,
    GatewayState, LinkState, UPLINK_QUEUE_PACKETS, connect,
};
use mixsocks_common::gateway::client::{ClientHandshake, ClientSetup, ClientStep};
use mixsocks_common::gateway::keepalive::{CLOSE_AFTER, PAD_AFTER};
use mixsocks_common::gateway::message::{ClientMessage, GatewayMessage, Refusal};
use mixsocks_common::gateway::server::Login;
use mixsocks_common::gateway::token::Token;
use mixsocks_common::gateway::transcript::{Binding, EXPORTER_LABEL};
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::link::{FrameBody, FrameCodec, tls};
use mixsocks_common::topology::Role;
use mixsocks_sphinx::{Hop, Packet, Peeled, Route, SecretKey, build_packets, finish, open_headers};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::*;
use crate::counters::DropReason;
use crate::link::testnet::{ENTRY, EXIT, PAYLOAD_LEN, TestNet, soon, topology, until_dropped};
use crate::sources::Source;

/// A TCP forwarder that can cut its connections, and whose backend can move.
pub(super) struct Proxy {
    address: SocketAddr,
    backend: Arc<Mutex<Option<SocketAddr>>>,
    cuts: watch::Sender<u32>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = Arc::new(Mutex::new(None::<SocketAddr>));
        let (cuts, cut) = watch::channel(0);
        let mut tasks = JoinSet::new();
        let to = backend.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let (to, mut cut) = (*to.lock().unwrap(), cut.clone());
                connections.spawn(async move {
                    let Some(to) = to else { return };
                    let Ok(mut server) = TcpStream::connect(to).await else { return };
                    cut.mark_unchanged();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { address, backend, cuts, _tasks: tasks }
    }

    pub(super) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

/// The gateway [`EXIT`] of a test network, behind a proxy, and its clients.
pub(super) struct GatewayNet {
    pub(super) net: TestNet,
    pub(super) proxy: Proxy,
    directory: tempfile::TempDir,
    pub(super) limits: Limits,
}

/// A client's keys and files.
#[derive(Clone)]
pub(super) struct Person {
    pub(super) key: Arc<IdentityKey>,
    pub(super) sphinx_key: Arc<SecretKey>,
    token_file: PathBuf,
}

impl GatewayNet {
    pub(super) async fn new() -> Self {
        let mut net = TestNet::new().await;
        let proxy = Proxy::start().await;
        let mut nodes = net.topology.nodes().to_vec();
        for gateway in [ENTRY, EXIT] {
            // The other gateway's address is the same: who dials it meets the wrong one.
            nodes[gateway].role = Role::Gateway { client_address: proxy.address };
        }
        net.topology = Arc::new(topology("test", nodes));
        let (directory, limits) = (tempfile::tempdir().unwrap(), Limits::default());
        Self { net, proxy, directory, limits }
    }

    pub(super) async fn start(&mut self) -> Gateway {
        let listener = self.net.listener(EXIT);
        self.start_on(listener, "gateway").await
    }

    /// Again, after it was stopped; other nodes do not find it any more.
    pub(super) async fn restart(&mut self, data: &str) -> Gateway {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.start_on(listener, data).await
    }

    async fn start_on(&mut self, link_listener: TcpListener, data: &str) -> Gateway {
        self.start_with(link_listener, data, self.net.watch()).await
    }

    async fn start_with(
        &mut self,
        link_listener: TcpListener,
        data: &str,
        topology: watch::Receiver<Arc<Topology>>,
    ) -> Gateway {
        let data_dir = self.directory.path().join(data);
        std::fs::create_dir_all(&data_dir).unwrap();
        let gateway = Gateway::start(GatewayConfig {
            identity: self.net.keys[EXIT].clone(),
            keys: self.net.sphinx_keys[EXIT].clone(),
            topology,
            link_listener,
            client_listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            data_dir,
            limits: self.limits,
        })
        .unwrap();
        *self.proxy.backend.lock().unwrap() = Some(gateway.client_address());
        gateway
    }

    /// The last mix's links, over which packets reach the gateway.
    pub(super) fn last_mix(&self) -> LinkPool {
        LinkPool::start(self.net.context(3).0).unwrap()
    }

    /// The first mix, to which clients send.
    pub(super) fn first_mix(&mut self) -> (LinkListener, mpsc::Receiver<Packet>) {
        let (packets, received) = mpsc::channel(1024);
        let context = self.net.context(1).0;
        (LinkListener::start(context, self.net.listener(1), packets).unwrap(), received)
    }

    pub(super) fn person(&self) -> Person {
        let mut rng = rand::rng();
        let key = Arc::new(IdentityKey::generate(&mut rng));
        let token_file = self.directory.path().join(key.identity().to_string());
        Person { key, sphinx_key: Arc::new(SecretKey::generate(&mut rng)), token_file }
    }

    pub(super) fn config(&self, person: &Person) -> GatewayLinkConfig {
        GatewayLinkConfig {
            topology: self.net.watch(),
            gateway: self.net.identity(EXIT),
            identity: person.key.clone(),
            token_file: person.token_file.clone(),
            invitation: None,
            receives_messages: false,
        }
    }

    pub(super) async fn connect(
        &self,
        person: &Person,
    ) -> (GatewaySender, GatewayReceiver, GatewayState) {
        let link = soon(connect(self.config(person))).await.unwrap();
        (link.sender, link.receiver, link.state)
    }

    /// As somebody who receives messages.
    pub(super) async fn receive(&self, person: &Person) -> GatewayLink {
        let config = GatewayLinkConfig { receives_messages: true, ..self.config(person) };
        soon(connect(config)).await.unwrap()
    }

    /// Packets for the gateway that name `next_hop`, numbered from `first`.
    fn packets(
        &self,
        next_hop: [u8; 32],
        key: &SecretKey,
        numbers: std::ops::Range<u64>,
    ) -> Vec<Packet> {
        let gateway = self.net.hop(EXIT, Duration::ZERO);
        let client = Hop { address: next_hop, key: key.public_key(), delay: Duration::ZERO };
        let texts: Vec<_> = numbers.map(u64::to_be_bytes).collect();
        let route = |_| Route::new(&[gateway, client], next_hop, [8; 16]).unwrap();
        let requests: Vec<_> = texts.iter().map(|text| (route(()), &text[..])).collect();
        let built = build_packets(&mut rand::rng(), PAYLOAD_LEN, &requests);
        built.into_iter().map(Result::unwrap).collect()
    }

    pub(super) fn packets_for(
        &self,
        person: &Person,
        numbers: std::ops::Range<u64>,
    ) -> Vec<Packet> {
        self.packets(*person.key.identity().as_bytes(), &person.sphinx_key, numbers)
    }
}

/// The number in a packet that has reached its client.
pub(super) fn number(person: &Person, arrival: Arrival) -> u64 {
    let Arrival::Packet(packet) = arrival else { panic!("{arrival:?}") };
    let opened = open_headers(&person.sphinx_key, vec![packet]).remove(0).unwrap();
    match finish(vec![opened]).remove(0).unwrap() {
        Peeled::Final { payload, .. } => {
            u64::from_be_bytes(payload.into_plaintext().unwrap().try_into().unwrap())
        }
        Peeled::Forward { .. } => panic!("not the last hop"),
    }
}

/// Bytes that look like a packet; gateways do not open what clients send.
fn packet(fill: u8) -> Packet {
    let bytes = vec![fill; mixsocks_sphinx::HEADER_LEN + PAYLOAD_LEN];
    Packet::from_bytes(bytes, PAYLOAD_LEN).unwrap()
}

async fn until_state(state: &mut GatewayState, is_it: impl FnMut(&LinkState) -> bool) {
    soon(state.wait_for(is_it)).await.unwrap();
}

/// A client that sends what it likes.
pub(super) struct RawClient {
    pub(super) socket: WebSocketStream<TlsStream<TcpStream>>,
    binding: Binding,
    pub(super) codec: FrameCodec,
}

impl RawClient {
    pub(super) async fn dial(net: &GatewayNet) -> Self {
        Self::open(net, TcpStream::connect(net.proxy.address).await.unwrap()).await
    }

    async fn open(net: &GatewayNet, stream: TcpStream) -> Self {
        let config = tls::gateway_client_config(net.net.identity(EXIT)).unwrap();
        let connector = TlsConnector::from(config);
        let stream = soon(connector.connect(tls::server_name(), stream)).await.unwrap();
        let session = stream.get_ref().1;
        let exporter = session.export_keying_material([0; 32], EXPORTER_LABEL, None).unwrap();
        let handshake = Box::pin(tokio_tungstenite::client_async("ws://gateway.invalid/", stream));
        let (socket, _) = soon(handshake).await.unwrap();
        let codec = FrameCodec::new(net.net.topology.packet_bytes());
        Self { socket, binding: Binding::Session(exporter), codec }
    }

    pub(super) async fn send(&mut self, message: Message) {
        // The gateway may have closed already.
        let _ = soon(self.socket.send(message)).await;
    }

    pub(super) fn control(&self, message: &ClientMessage) -> Message {
        let mut frame = Vec::new();
        self.codec.encode_control(0, &message.encode(), &mut frame).unwrap();
        Message::Binary(frame.into())
    }

    fn packet(&self, counter: u64, next_hop: &[u8; 32]) -> Message {
        let mut frame = Vec::new();
        self.codec.encode_packet(counter, next_hop, packet(1).as_bytes(), &mut frame);
        Message::Binary(frame.into())
    }

    /// The next frame; `None` when the gateway closes.
    pub(super) async fn frame(&mut self) -> Option<Bytes> {
        match soon(self.socket.next()).await {
            Some(Ok(Message::Binary(bytes))) => Some(bytes),
            _ => None,
        }
    }

    pub(super) async fn message(&mut self) -> Option<GatewayMessage> {
        let frame = self.frame().await?;
        match self.codec.decode(&frame).unwrap().body {
            FrameBody::Control(body) => Some(GatewayMessage::decode(body).unwrap()),
            body => panic!("{body:?}"),
        }
    }

    pub(super) async fn is_closed(&mut self) -> bool {
        while self.frame().await.is_some() {}
        true
    }

    /// Registers if there is no token, and logs in.
    pub(super) async fn log_in(
        &mut self,
        net: &GatewayNet,
        person: &Person,
        token: Option<Token>,
    ) -> Result<(), Refusal> {
        let setup = ClientSetup {
            network: net.net.topology.network.clone(),
            gateway: net.net.identity(EXIT),
            key: person.key.clone(),
            binding: self.binding.clone(),
            token,
            invitation: None,
            resume: None,
        };
        let (mut state, mut message) = ClientHandshake::start(setup, &mut rand::rng());
        loop {
            self.send(self.control(&message)).await;
            let answer = self.message().await.unwrap();
            (state, message) = match state.handle_message(answer).unwrap() {
                ClientStep::Send { state, message } => (state, message),
                ClientStep::Store { state, message, .. } => (state, message),
                ClientStep::Established(_) => return Ok(()),
                ClientStep::Refused(refusal) => return Err(refusal),
                ClientStep::Ended(message) => panic!("{message:?}"),
            };
        }
    }
}

#[tokio::test]
async fn registers_once_and_logs_in_after_a_restart() {
    let mut net = GatewayNet::new().await;
    let person = net.person();
    let mut tokens = BTreeSet::new();
    for round in 0..2 {
        let gateway = if round == 0 { net.start().await } else { net.restart("gateway").await };
        for _ in 0..2 {
            let (_, receiver, mut state) = net.connect(&person).await;
            tokens.insert(std::fs::read(&person.token_file).unwrap());
            drop(receiver);
            until_state(&mut state, |state| matches!(state, LinkState::Closed)).await;
        }
        soon(gateway.shutdown()).await;
    }
    assert_eq!(tokens.len(), 1, "the same token throughout");
}

#[tokio::test]
async fn the_day_of_a_login_is_kept() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let person = net.person();
    drop(net.connect(&person).await);
    soon(gateway.shutdown()).await;
    let data_dir = net.directory.path().join("gateway");
    let store = RedbStore::open(&data_dir, Limits::default()).unwrap();
    let (day, has_logged_in) = store.last_login(person.key.identity().as_bytes());
    let today = Clock::System.now().0 / (24 * 60 * 60);
    assert!(has_logged_in && u64::from(day).abs_diff(today) <= 1, "{day}");
}

#[tokio::test]
async fn a_wrong_token_is_refused_and_a_client_registers_again() {
    let mut net = GatewayNet::new().await;
    let _gateway = net.start().await;
    let person = net.person();
    let guess = Some(Token::generate(&mut rand::rng()));
    let mut raw = RawClient::dial(&net).await;
    assert_eq!(raw.log_in(&net, &person, guess.clone()).await, Err(Refusal::UnknownToken));
    assert!(raw.is_closed().await);
    drop(net.connect(&person).await);
    let first = std::fs::read(&person.token_file).unwrap();
    let mut raw = RawClient::dial(&net).await;
    assert_eq!(raw.log_in(&net, &person, guess).await, Err(Refusal::UnknownToken));
    // Somebody with the same key registers, as after the loss of the token: the first one is out.
    let mut raw = RawClient::dial(&net).await;
    assert_eq!(raw.log_in(&net, &person, None).await, Ok(()));
    drop(net.connect(&person).await);
    assert_ne!(std::fs::read(&person.token_file).unwrap(), first);
}

#[tokio::test]
async fn the_newest_connection_wins() {
    let mut net = GatewayNet::new().await;
    let _gateway = net.start().await;
    let person = net.person();
    let (sender, mut receiver, mut state) = net.connect(&person).await;
    let (_sender, _receiver, new_state) = net.connect(&person).await;
    until_state(&mut state, |state| matches!(state, LinkState::Evicted)).await;
    assert!(soon(receiver.recv()).await.is_none());
    assert!(soon(sender.send(([1; 32], packet(1)))).await.is_err());
    assert!(matches!(*new_state.borrow(), LinkState::Connected));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_loses_and_repeats_nothing() {
    const COUNT: u64 = 600;
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let person = net.person();
    let (_sender, mut receiver, mut state) = net.connect(&person).await;
    let last_mix = net.last_mix();
    let mut numbers = Vec::new();
    for packet in net.packets_for(&person, 0..COUNT) {
        last_mix.send(&net.net.identity(EXIT), packet);
    }
    for n in 0..COUNT {
        if n % 100 == 50 {
            net.proxy.cut();
        }
        numbers.push(number(&person, soon(receiver.recv()).await.unwrap()));
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
    until_state(&mut state, |state| matches!(state, LinkState::Connected)).await;
    assert_eq!(gateway.counters().snapshot().dropped_total(), 0);
    assert!(receiver.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cuts_lose_and_repeat_nothing_upwards() {
    const COUNT: u8 = 200;
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let (_mix, mut packets) = net.first_mix();
    let mix = *net.net.identity(1).as_bytes();
    let (sender, _receiver, _) = net.connect(&net.person()).await;
    for n in 0..COUNT {
        if n % 50 == 25 {
            net.proxy.cut();
        }
        soon(sender.send((mix, packet(n)))).await.unwrap();
    }
    for n in 0..COUNT {
        assert_eq!(soon(packets.recv()).await.unwrap(), packet(n));
    }
    assert_eq!(gateway.counters().snapshot().dropped_total(), 0);
}

#[tokio::test]
async fn packets_for_anybody_but_its_clients_are_dropped() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let (known, unknown) = (net.person(), net.person());
    let (_sender, mut receiver, _) = net.connect(&known).await;
    let mut packets = net.packets_for(&unknown, 0..2);
    for node in [1, ENTRY, EXIT] {
        // Not even other nodes: nobody uses a gateway to reach them.
        let next_hop = *net.net.identity(node).as_bytes();
        packets.extend(net.packets(next_hop, &net.net.sphinx_key(node, 0), 0..1));
    }
    packets.extend(net.net.packets(&[EXIT], &[Duration::ZERO]));
    packets.extend(net.packets_for(&known, 7..8));
    let last_mix = net.last_mix();
    packets.into_iter().for_each(|packet| last_mix.send(&net.net.identity(EXIT), packet));
    assert_eq!(number(&known, soon(receiver.recv()).await.unwrap()), 7);
    until_dropped(gateway.counters(), DropReason::UnknownClient, 5).await;
    until_dropped(gateway.counters(), DropReason::MalformedMessage, 1).await;
}

#[tokio::test]
async fn clients_reach_the_first_layer_only() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let (_mix, mut packets) = net.first_mix();
    let (sender, _receiver, _) = net.connect(&net.person()).await;
    let hops = [2, 3, ENTRY, EXIT].map(|node| *net.net.identity(node).as_bytes());
    for hop in hops.into_iter().chain([[9; 32], *net.net.identity(1).as_bytes()]) {
        soon(sender.send((hop, packet(5)))).await.unwrap();
    }
    assert_eq!(soon(packets.recv()).await.unwrap(), packet(5));
    until_dropped(gateway.counters(), DropReason::WrongLayer, 4).await;
    until_dropped(gateway.counters(), DropReason::UnknownNextHop, 1).await;
}

#[tokio::test]
async fn whoever_breaks_the_protocol_is_closed() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mix = *net.net.identity(1).as_bytes();
    let mut breaches = 0;
    let frame_bytes = FrameCodec::new(net.net.topology.packet_bytes()).frame_bytes();
    let binary = |len: usize, fill: u8| Message::Binary(vec![fill; len].into());
    for is_logged_in in [false, true] {
        let authenticate = ClientMessage::OtherVersion(1);
        let of = |raw: &RawClient| {
            vec![
                binary(frame_bytes - 1, 0),
                binary(frame_bytes + 1, 0),
                binary(frame_bytes, 7),
                binary(0, 0),
                Message::Text("hello".into()),
                Message::Ping(Bytes::new()),
                Message::Pong(Bytes::new()),
                // Beyond what was sent.
                raw.packet(1, &mix),
                raw.control(&authenticate),
            ]
        };
        let count = of(&RawClient::dial(&net).await).len();
        for at in 0..count {
            let mut raw = RawClient::dial(&net).await;
            if is_logged_in {
                raw.log_in(&net, &net.person(), None).await.unwrap();
            }
            let message = of(&raw).swap_remove(at);
            raw.send(message).await;
            assert!(raw.is_closed().await);
            breaches += 1;
            until_dropped(gateway.counters(), DropReason::MalformedFrame, breaches).await;
        }
    }
    // And the gateway still serves the others.
    net.connect(&net.person()).await;
}

#[tokio::test]
async fn silent_connections_keep_nobody_out() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut silent = Vec::new();
    for _ in 0..3 * MAX_HALF_OPEN_PER_SOURCE {
        silent.push(soon(TcpStream::connect(gateway.client_address())).await.unwrap());
    }
    let (_sender, _receiver, state) = net.connect(&net.person()).await;
    assert!(matches!(*state.borrow(), LinkState::Connected));
    // The oldest ones were closed.
    let mut byte = [0];
    assert!(matches!(soon(silent[0].read(&mut byte)).await, Ok(0) | Err(_)));
}

/// More clients than one source may have, the last of them from another one.
#[cfg(target_os = "linux")] // Elsewhere not all of 127.0.0.0/8 is this machine.
#[tokio::test]
async fn a_source_with_too_many_clients_is_told_and_others_get_in() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    // As if they were connected: registering so many takes the limit of registrations.
    let source = Source::from(std::net::IpAddr::from([127, 0, 0, 1]));
    let mut connected = Vec::new();
    for _ in 0..MAX_CLIENTS_PER_SOURCE {
        let login = Login { identity: net.person().key.identity(), resume: None };
        let now = Instant::now().into_std();
        connected.push(gateway.clients.attach(login, source, now).unwrap().0);
    }
    let person = net.person();
    let mut raw = RawClient::dial(&net).await;
    let refused = raw.log_in(&net, &person, None).await;
    assert_eq!(refused, Err(Refusal::TooManyFromSource));
    assert!(raw.is_closed().await);

    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let stream = soon(socket.connect(gateway.client_address())).await.unwrap();
    let mut raw = RawClient::open(&net, stream).await;
    assert_eq!(raw.log_in(&net, &net.person(), None).await, Ok(()));

    connected.pop();
    let mut raw = RawClient::dial(&net).await;
    assert_eq!(raw.log_in(&net, &person, None).await, Ok(()));
}

#[tokio::test]
async fn registrations_are_limited_and_logins_are_not() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let person = net.person();
    let before = Instant::now().into_std();
    drop(net.connect(&person).await);
    let taken = |at| {
        let source = Source::from(std::net::IpAddr::from([127, 0, 0, 1]));
        std::iter::repeat_with(|| gateway.doorkeeper.limit().take(source, at))
            .take_while(Result::is_ok)
            .count()
    };
    // However long that one took, it is counted.
    assert!(taken(before) < limits::SOURCE_BURST as usize);
    // As if very many came, so that none is let in again while this test runs.
    assert!(taken(before + Duration::from_secs(60 * 60)) > 0);
    let mut raw = RawClient::dial(&net).await;
    let refused = raw.log_in(&net, &net.person(), None).await;
    assert!(matches!(refused, Err(Refusal::RateLimited { .. })), "{refused:?}");
    drop(net.connect(&person).await);
}

#[tokio::test]
async fn silent_strangers_are_closed_in_time() {
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mut stranger = soon(TcpStream::connect(gateway.client_address())).await.unwrap();
    tokio::time::pause();
    let start = Instant::now();
    let mut byte = [0];
    assert!(matches!(soon(stranger.read(&mut byte)).await, Ok(0) | Err(_)));
    assert!(start.elapsed() >= login::LOGIN_TIMEOUT);
}

/// A client that floods is made to wait; nothing of it is lost, and it cannot fill the queues.
#[tokio::test]
async fn a_flood_is_read_no_faster_than_its_share() {
    const FRAMES: u64 = 6000;
    let mut net = GatewayNet::new().await;
    let gateway = net.start().await;
    let mix = *net.net.identity(1).as_bytes();
    let mut raw = RawClient::dial(&net).await;
    raw.log_in(&net, &net.person(), None).await.unwrap();
    let start = Instant::now();
    let mut limit = limits::ReadLimit::new(raw.codec.frame_bytes(), start.into_std());
    let mut earliest = None;
    for _ in 0..FRAMES {
        earliest = limit.handle_frame(start.into_std());
        raw.send(raw.packet(0, &mix)).await;
    }
    raw.send(raw.control(&ClientMessage::Goodbye)).await;
    assert!(raw.is_closed().await);
    // As if all had come at once. The clock is the real one, as a fake one goes on by itself while this
    // machine still carries frames.
    let earliest = Instant::from_std(earliest.unwrap());
    assert!(Instant::now() >= earliest && earliest > start, "{:?}", start.elapsed());
    assert_eq!(gateway.counters().snapshot().packets_in, FRAMES);
    assert_eq!(gateway.counters().snapshot().dropped(DropReason::MalformedFrame), 0);
}

#[tokio::test]
async fn a_silent_client_gets_pads_and_is_closed_in_time() {
    let mut net = GatewayNet::new().await;
    let _gateway = net.start().await;
    let mut raw = RawClient::dial(&net).await;
    raw.log_in(&net, &net.person(), None).await.unwrap();
    tokio::time::pause();
    let start = Instant::now();
    let mut pads = 0;
    while let Some(Ok(Message::Binary(frame))) = raw.socket.next().await {
        assert_eq!(raw.codec.decode(&frame).unwrap().body, FrameBody::Pad);
        pads += 1;
        assert!(start.elapsed() >= PAD_AFTER * pads);
    }
    assert!(pads >= 1 && start.elapsed() >= CLOSE_AFTER, "{pads} {:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_survives_every_restart_and_packets_wait() {
    let mut net = GatewayNet::new().await;
    let mut gateway = net.start().await;
    let (_mix, mut packets) = net.first_mix();
    let mix = *net.net.identity(1).as_bytes();
    let person = net.person();
    let (sender, _receiver, mut state) = net.connect(&person).await;
    let first = std::fs::read(&person.token_file).unwrap();
    // The second time with an empty disk.
    for data in ["gateway", "new"] {
        soon(gateway.shutdown()).await;
        until_state(&mut state, |state| matches!(state, LinkState::Reconnecting { .. })).await;
        for _ in 0..UPLINK_QUEUE_PACKETS {
            sender.try_send((mix, packet(1))).unwrap();
        }
        assert!(sender.try_send((mix, packet(1))).is_err(), "the queue is bounded");
        gateway = net.restart(data).await;
        until_state(&mut state, |state| matches!(state, LinkState::Connected)).await;
        for _ in 0..UPLINK_QUEUE_PACKETS {
            assert_eq!(soon(packets.recv()).await.unwrap(), packet(1));
        }
        let same = std::fs::read(&person.token_file).unwrap() == first;
        assert_eq!(same, data == "gateway");
    }
}

/// A topology that does not change.
fn fixed(topology: Topology) -> watch::Receiver<Arc<Topology>> {
    watch::channel(Arc::new(topology)).1
}

#[tokio::test]
async fn errors_say_what_is_wrong() {
    let mut net = GatewayNet::new().await;
    let person = net.person();
    let config = || net.config(&person);
    let unused = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let mut nodes = net.net.topology.nodes().to_vec();
    nodes[EXIT].role = Role::Gateway { client_address: unused };
    let nowhere = GatewayLinkConfig { topology: fixed(topology("test", nodes)), ..config() };
    let error = soon(connect(nowhere)).await.unwrap_err();
    assert!(matches!(error, GatewayLinkError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&unused.to_string()), "{error}");

    let mix = GatewayLinkConfig { gateway: net.net.identity(1), ..config() };
    let error = soon(connect(mix)).await.unwrap_err();
    assert!(matches!(error, GatewayLinkError::UnknownGateway(_)), "{error}");

    std::fs::write(&person.token_file, "nonsense").unwrap();
    let error = soon(connect(config())).await.unwrap_err();
    assert!(error.to_string().contains(person.token_file.to_str().unwrap()), "{error}");
    std::fs::remove_file(&person.token_file).unwrap();

    let wrong = GatewayLinkConfig { gateway: net.net.identity(ENTRY), ..config() };
    let nodes = net.net.topology.nodes().to_vec();
    let other = GatewayLinkConfig { topology: fixed(topology("other", nodes)), ..config() };
    let _gateway = net.start().await;
    let error = soon(connect(wrong)).await.unwrap_err();
    assert!(matches!(error, GatewayLinkError::WrongKey { .. }), "{error}");
    for identity in [net.net.identity(ENTRY), net.net.identity(EXIT)] {
        assert!(error.to_string().contains(&identity.to_string()), "{error}");
    }
    let error = soon(connect(other)).await.unwrap_err();
    assert!(matches!(error, GatewayLinkError::Refused(Refusal::WrongNetwork)), "{error}");
}

#[tokio::test]
async fn an_identity_that_the_topology_has_as_a_mix_is_no_gateway() {
    let net = GatewayNet::new().await;
    let started = Gateway::start(GatewayConfig {
        identity: net.net.keys[1].clone(),
        keys: net.net.sphinx_keys[1].clone(),
        topology: net.net.watch(),
        link_listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        client_listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        data_dir: net.directory.path().to_owned(),
        limits: Limits::default(),
    });
    assert!(matches!(started, Err(GatewayError::NotAGateway(_))));
}

/// A gateway that starts before a document has it, and a layer 1 that changes.
#[tokio::test]
async fn clients_packets_follow_the_topology() {
    let mut net = GatewayNet::new().await;
    let without = net.net.without(EXIT);
    let (documents, topology) = watch::channel(without);
    let listener = net.net.listener(EXIT);
    let gateway = net.start_with(listener, "gateway", topology).await;
    let (_mix, mut packets) = net.first_mix();
    let (sender, _receiver, mut state) = net.connect(&net.person()).await;
    let [first, second] = [1, 2].map(|mix| *net.net.identity(mix).as_bytes());
    soon(sender.send((first, packet(1)))).await.unwrap();
    until_dropped(gateway.counters(), DropReason::WrongLayer, 1).await;

    documents.send_replace(net.net.topology.clone());
    // Until the gateway has it, packets are dropped.
    let arrived = async {
        loop {
            sender.send((first, packet(2))).await.unwrap();
            let wait = Duration::from_millis(20);
            if let Ok(Some(arrived)) = timeout(wait, packets.recv()).await {
                return arrived;
            }
        }
    };
    assert_eq!(soon(arrived).await, packet(2));

    net.net.topology = net.net.swapped(1, 2);
    let (_mix, mut packets) = {
        let (sender, packets) = mpsc::channel(1024);
        let (context, listener) = (net.net.context(2).0, net.net.listener(2));
        (LinkListener::start(context, listener, sender).unwrap(), packets)
    };
    documents.send_replace(net.net.topology.clone());
    let arrived = async {
        loop {
            sender.send((second, packet(3))).await.unwrap();
            let wait = Duration::from_millis(20);
            if let Ok(Some(arrived)) = timeout(wait, packets.recv()).await {
                return arrived;
            }
        }
    };
    assert_eq!(soon(arrived).await, packet(3));
    let wrong = gateway.counters().snapshot().dropped(DropReason::WrongLayer);
    soon(sender.send((first, packet(4)))).await.unwrap();
    until_dropped(gateway.counters(), DropReason::WrongLayer, wrong + 1).await;
    until_state(&mut state, |state| matches!(state, LinkState::Connected)).await;
}
