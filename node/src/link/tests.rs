//! Links over loopback, honest and not.

use std::time::Duration;

use mixsocks_common::link::{FrameCodec, HelloError, LinkError, tls};
use mixsocks_sphinx::Packet;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use super::connection::{Connection, Incoming};
use super::pool::{Dialled, dial, shake_hands};
use super::testnet::{ENTRY, EXIT, PAYLOAD_LEN, TestNet, soon, topology, until_dropped};
use super::*;
use crate::counters::DropReason;

const MIX: usize = 1;

/// Bytes that look like a packet; links do not open them.
fn packet(fill: u8) -> Packet {
    let bytes = vec![fill; mixsocks_sphinx::HEADER_LEN + PAYLOAD_LEN];
    Packet::from_bytes(bytes, PAYLOAD_LEN).unwrap()
}

fn start_listener(
    net: &mut TestNet,
    room: usize,
) -> (LinkListener, mpsc::Receiver<Packet>, Arc<Counters>) {
    let (context, counters) = net.context(MIX);
    let (sender, receiver) = mpsc::channel(room);
    let listener = LinkListener::start(context, net.listener(MIX), sender).unwrap();
    (listener, receiver, counters)
}

async fn dial_from(net: &TestNet, from: usize, to: usize) -> Result<Dialled, LinkFailure> {
    let (context, _) = net.context(from);
    let tls = tls::node_client_config(&net.keys[from], net.identity(to)).unwrap();
    soon(dial(&context, net.address(to), tls)).await
}

async fn is_closed(connection: &mut Dialled) -> bool {
    soon(connection.next()).await.is_err()
}

#[tokio::test]
async fn packets_arrive_in_order_and_are_counted() {
    let mut net = TestNet::new().await;
    let (_listener, mut packets, counters) = start_listener(&mut net, 8);
    let (context, sent) = net.context(ENTRY);
    let pool = LinkPool::start(context).unwrap();
    for fill in 0..200 {
        pool.send(&net.identity(MIX), packet(fill));
    }
    for fill in 0..200 {
        assert_eq!(soon(packets.recv()).await.unwrap(), packet(fill));
    }
    assert_eq!(counters.snapshot().packets_in, 200);
    assert_eq!(sent.snapshot().dropped_total(), 0);
    pool.shutdown().await;
    assert_eq!(sent.snapshot().packets_out, 200);
}

#[tokio::test]
async fn a_node_with_a_wrong_key_is_refused_and_both_keys_are_named() {
    let mut net = TestNet::new().await;
    // Somebody else answers where the mix should be.
    let impostor = net.keys[2].clone();
    let (sender, _packets) = mpsc::channel(1);
    let context = LinkContext::new(impostor, net.watch(), Arc::default());
    let _listener = LinkListener::start(context, net.listener(MIX), sender).unwrap();
    let error = dial_from(&net, ENTRY, MIX).await.err().unwrap();
    let (expected, actual) = (net.identity(MIX), net.identity(2));
    assert!(
        matches!(&error, LinkFailure::Link(LinkError::WrongIdentity { expected: e, actual: a })
            if *e == expected && *a == actual),
        "{error}"
    );
    assert!(error.to_string().contains(&expected.to_string()), "{error}");

    let (context, counters) = net.context(ENTRY);
    let pool = LinkPool::start(context).unwrap();
    pool.send(&expected, packet(1));
    until_dropped(&counters, DropReason::LinkDown, 1).await;
}

#[tokio::test]
async fn only_nodes_of_the_layer_before_get_in() {
    let mut net = TestNet::new().await;
    let (_listener, _packets, _) = start_listener(&mut net, 1);
    for stranger in [2, 3] {
        assert!(dial_from(&net, stranger, MIX).await.is_err());
    }
    assert!(dial_from(&net, ENTRY, MIX).await.is_ok());
    assert!(dial_from(&net, EXIT, MIX).await.is_ok(), "every gateway may send to layer 1");
}

#[tokio::test]
async fn a_node_of_another_network_is_refused_by_name() {
    let mut net = TestNet::new().await;
    let (_listener, _packets, _) = start_listener(&mut net, 1);
    net.topology = Arc::new(topology("other", net.topology.nodes().to_vec()));
    let error = dial_from(&net, ENTRY, MIX).await.err().unwrap();
    assert!(
        matches!(&error, LinkFailure::Hello(HelloError::WrongNetwork { ours, theirs })
            if ours == "other" && theirs == "test"),
        "{error}"
    );
}

/// What a malicious neighbour may try after an honest hello.
#[tokio::test]
async fn a_breach_closes_the_link_and_is_counted() {
    let mut net = TestNet::new().await;
    let (_listener, mut packets, counters) = start_listener(&mut net, 8);
    let codec = FrameCodec::new(net.topology.packet_bytes());
    let me = *net.identity(MIX).as_bytes();
    let other = *net.identity(2).as_bytes();
    let good = packet(1);
    let frame = |counter, next_hop| {
        let mut frame = Vec::new();
        codec.encode_packet(counter, next_hop, good.as_bytes(), &mut frame);
        frame
    };
    let mut unknown_kind = frame(0, &me);
    unknown_kind[0] = 3;
    let mut reserved = frame(0, &me);
    reserved[7] = 1;
    let mut second_hello = Vec::new();
    codec.encode_control(0, b"hello again", &mut second_hello).unwrap();
    let mut full_pad = Vec::new();
    codec.encode_pad(0, &mut full_pad);
    *full_pad.last_mut().unwrap() = 1;
    let breaches =
        [frame(0, &other), frame(1, &me), unknown_kind, reserved, second_hello, full_pad];
    for (count, breach) in (1..).zip(breaches) {
        let mut connection = dial_from(&net, ENTRY, MIX).await.unwrap();
        connection.push_packet(&net.identity(MIX), &good);
        connection.push_bytes(&breach);
        connection.push_packet(&net.identity(MIX), &packet(2));
        connection.flush().await.unwrap();
        assert_eq!(soon(packets.recv()).await.unwrap(), good, "what came before it counts");
        assert!(is_closed(&mut connection).await);
        until_dropped(&counters, DropReason::MalformedFrame, count).await;
    }
    assert!(packets.try_recv().is_err(), "nothing behind a breach is taken");
}

#[tokio::test]
async fn the_newest_link_of_a_neighbour_wins() {
    let mut net = TestNet::new().await;
    let (_listener, mut packets, _) = start_listener(&mut net, 8);
    let mut old = dial_from(&net, ENTRY, MIX).await.unwrap();
    let mut other = dial_from(&net, EXIT, MIX).await.unwrap();
    let mut new = dial_from(&net, ENTRY, MIX).await.unwrap();
    assert!(is_closed(&mut old).await);
    for connection in [&mut new, &mut other] {
        connection.push_packet(&net.identity(MIX), &packet(1));
        connection.flush().await.unwrap();
        assert_eq!(soon(packets.recv()).await.unwrap(), packet(1));
    }
}

#[tokio::test]
async fn silent_strangers_do_not_lock_neighbours_out() {
    let mut net = TestNet::new().await;
    let (listener, _packets, _) = start_listener(&mut net, 8);
    let mut strangers = Vec::new();
    for _ in 0..MAX_HALF_OPEN_PER_SOURCE + 20 {
        strangers.push(TcpStream::connect(listener.address()).await.unwrap());
    }
    assert!(dial_from(&net, ENTRY, MIX).await.is_ok());
    // The oldest ones were put out.
    let mut byte = [0];
    let read = soon(strangers[0].read(&mut byte)).await;
    assert!(matches!(read, Ok(0) | Err(_)));
}

/// Whoever connects without end from one address puts out nobody but themselves.
#[cfg(target_os = "linux")] // Elsewhere not all of 127.0.0.0/8 is this machine.
#[tokio::test]
async fn a_flood_of_connections_does_not_put_out_neighbours() {
    let mut net = TestNet::new().await;
    let (listener, _packets, _) = start_listener(&mut net, 8);
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let neighbour = soon(socket.connect(listener.address())).await.unwrap();
    let mut flood = Vec::new();
    for _ in 0..MAX_HALF_OPEN + 20 {
        flood.push(TcpStream::connect(listener.address()).await.unwrap());
    }
    // The last one to be put out: then all have been accepted, and the neighbour is the oldest.
    let last_out = flood.len() - 1 - MAX_HALF_OPEN_PER_SOURCE;
    let mut byte = [0];
    assert!(matches!(soon(flood[last_out].read(&mut byte)).await, Ok(0) | Err(_)));
    let (context, _) = net.context(ENTRY);
    let tls = tls::node_client_config(&net.keys[ENTRY], net.identity(MIX)).unwrap();
    assert!(soon(shake_hands(&context, neighbour, tls)).await.is_ok());
}

/// A full inbound queue stops the reading, not the neighbours' share of it.
#[tokio::test]
async fn a_flood_leaves_room_for_other_links() {
    let mut net = TestNet::new().await;
    let (_listener, mut packets, _) = start_listener(&mut net, 1);
    let (context, _) = net.context(ENTRY);
    let flood = LinkPool::start(context).unwrap();
    for _ in 0..1000 {
        flood.send(&net.identity(MIX), packet(1));
    }
    assert_eq!(soon(packets.recv()).await.unwrap(), packet(1));
    let mut quiet = dial_from(&net, EXIT, MIX).await.unwrap();
    quiet.push_packet(&net.identity(MIX), &packet(2));
    quiet.flush().await.unwrap();
    let mut taken = 0;
    while soon(packets.recv()).await.unwrap() != packet(2) {
        taken += 1;
        // Taking slowly: the other link has long been waiting for its turn.
        tokio::task::yield_now().await;
    }
    assert!(taken < 900, "{taken} packets of the flood came first");
}

#[tokio::test]
async fn a_full_queue_drops_and_counts() {
    for (payload_len, room) in [(1024, 7_642), (2048, 4_376), (32_768, 316)] {
        // The listener of the mix accepts TCP by its backlog, but never answers.
        let mut net = TestNet::new().await;
        net.set_payload_len(payload_len);
        let (context, counters) = net.context(ENTRY);
        let pool = LinkPool::start(context).unwrap();
        let bytes = vec![1; net.topology.packet_bytes()];
        let packet = Packet::from_bytes(bytes, payload_len).unwrap();
        for _ in 0..room + 10 {
            pool.send(&net.identity(MIX), packet.clone());
        }
        assert!(room * net.topology.packet_bytes() <= LINK_QUEUE_BYTES);
        assert_eq!(counters.snapshot().dropped(DropReason::QueueFull), 10, "{payload_len}");
        pool.send(&net.identity(2), packet);
        assert_eq!(counters.snapshot().dropped(DropReason::UnknownNextHop), 1, "no neighbour");
    }
}

#[tokio::test]
async fn a_link_comes_back_with_its_node() {
    let mut net = TestNet::new().await;
    let address = net.address(MIX);
    drop(net.listener(MIX));
    let (context, counters) = net.context(ENTRY);
    let pool = LinkPool::start(context).unwrap();
    pool.send(&net.identity(MIX), packet(1));
    until_dropped(&counters, DropReason::LinkDown, 1).await;

    for _ in 0..2 {
        let (context, _) = net.context(MIX);
        let (sender, mut packets) = mpsc::channel(8);
        let socket = TcpListener::bind(address).await.unwrap();
        let listener = LinkListener::start(context, socket, sender).unwrap();
        let arrived = async {
            loop {
                pool.send(&net.identity(MIX), packet(2));
                let wait = Duration::from_millis(20);
                if let Ok(Some(arrived)) = tokio::time::timeout(wait, packets.recv()).await {
                    return arrived;
                }
            }
        };
        assert_eq!(soon(arrived).await, packet(2));
        listener.shutdown().await;
    }
}

type Accepted = Connection<tokio_rustls::server::TlsStream<TcpStream>>;

/// The listening side of a link, done by hand.
async fn accept_by_hand(net: &TestNet, socket: &TcpListener) -> Accepted {
    accept_as(net, MIX, socket).await
}

async fn accept_as(net: &TestNet, number: usize, socket: &TcpListener) -> Accepted {
    let tls = tls::node_server_config(&net.keys[number], |_| true).unwrap();
    let (stream, _) = soon(socket.accept()).await.unwrap();
    let stream = soon(TlsAcceptor::from(tls).accept(stream)).await.unwrap();
    let (context, _) = net.context(number);
    let opened = Connection::open(stream, |stream| stream.get_ref().1, &context);
    soon(opened).await.unwrap().0
}

#[tokio::test]
async fn a_ping_is_answered() {
    let mut net = TestNet::new().await;
    let (_listener, _packets, _) = start_listener(&mut net, 8);
    let mut connection = dial_from(&net, ENTRY, MIX).await.unwrap();
    for _ in 0..3 {
        connection.push_pad();
        connection.flush().await.unwrap();
        assert!(matches!(soon(connection.next()).await.unwrap(), Incoming::Pad));
    }
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_dialled_again() {
    let mut net = TestNet::new().await;
    let socket = net.listener(MIX);
    let (mut context, _) = net.context(ENTRY);
    context.ping_interval = Duration::from_millis(20);
    let _pool = LinkPool::start(context).unwrap();
    let mut connection = accept_by_hand(&net, &socket).await;
    assert!(matches!(soon(connection.next()).await.unwrap(), Incoming::Pad), "the ping");
    assert!(soon(connection.next()).await.is_err(), "closed without another ping");
    accept_by_hand(&net, &socket).await;
}

/// The dialled end has nothing to send but answers to pings.
#[tokio::test]
async fn packets_against_the_direction_close_the_link() {
    let mut net = TestNet::new().await;
    let socket = net.listener(MIX);
    let (context, counters) = net.context(ENTRY);
    let _pool = LinkPool::start(context).unwrap();
    let mut connection = accept_by_hand(&net, &socket).await;
    connection.push_packet(&net.identity(ENTRY), &packet(1));
    connection.flush().await.unwrap();
    assert!(soon(connection.next()).await.is_err());
    assert_eq!(counters.snapshot().packets_in, 0);
    accept_by_hand(&net, &socket).await;
}

#[tokio::test]
async fn next_hops_are_told_apart() {
    let net = TestNet::new().await;
    let hops = NextHops::new(&net.topology, &net.identity(2));
    assert_eq!(hops.resolve(net.identity(3).as_bytes()), Ok(net.identity(3)));
    for wrong in [ENTRY, 1, 2, EXIT] {
        assert_eq!(hops.resolve(net.identity(wrong).as_bytes()), Err(DropReason::WrongLayer));
    }
    assert_eq!(hops.resolve(&[0; 32]), Err(DropReason::UnknownNextHop));
    assert_eq!(hops.reachable().collect::<Vec<_>>(), [&net.identity(3)]);
}

async fn takes(connection: &mut Accepted, fill: u8) -> bool {
    loop {
        match soon(connection.next()).await {
            Ok(Incoming::Packet(taken)) => return taken == packet(fill),
            Ok(Incoming::Pad) => connection.push_pad(),
            Ok(Incoming::Control(_)) | Err(_) => return false,
        }
    }
}

/// The last mix sends to two gateways; one of them moves.
#[tokio::test]
async fn a_neighbour_that_moves_is_dialled_where_it_is_and_the_others_notice_nothing() {
    let mut net = TestNet::new().await;
    let [staying, moving] = [ENTRY, EXIT].map(|number| net.listener(number));
    let (context, counters) = net.context(3);
    let pool = LinkPool::start(context).unwrap();
    let mut stays = accept_as(&net, ENTRY, &staying).await;
    let mut before = accept_as(&net, EXIT, &moving).await;
    for (number, connection) in [(ENTRY, &mut stays), (EXIT, &mut before)] {
        pool.send(&net.identity(number), packet(1));
        assert!(takes(connection, 1).await);
    }

    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut nodes = net.topology.nodes().to_vec();
    nodes[EXIT].link_address = elsewhere.local_addr().unwrap();
    pool.set_topology(&net.of(nodes)).unwrap();
    pool.set_topology(&net.topology).unwrap();
    let mut nodes = net.topology.nodes().to_vec();
    nodes[EXIT].link_address = elsewhere.local_addr().unwrap();
    pool.set_topology(&net.of(nodes)).unwrap();
    // What is sent meanwhile waits.
    pool.send(&net.identity(EXIT), packet(2));
    let mut after = accept_as(&net, EXIT, &elsewhere).await;
    assert!(takes(&mut after, 2).await);
    assert!(soon(before.next()).await.is_err(), "the old link is closed");
    pool.send(&net.identity(ENTRY), packet(2));
    assert!(takes(&mut stays, 2).await, "on the link that was there");
    assert_eq!(counters.snapshot().dropped_total(), 0);
}

/// A neighbour that is away is not waited for when it has another address.
#[tokio::test]
async fn a_new_address_ends_the_waiting() {
    let mut net = TestNet::new().await;
    drop(net.listener(MIX));
    let (context, counters) = net.context(ENTRY);
    let pool = LinkPool::start(context).unwrap();
    pool.send(&net.identity(MIX), packet(1));
    until_dropped(&counters, DropReason::LinkDown, 1).await;
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut nodes = net.topology.nodes().to_vec();
    nodes[MIX].link_address = elsewhere.local_addr().unwrap();
    pool.set_topology(&net.of(nodes)).unwrap();
    accept_by_hand(&net, &elsewhere).await;
}

#[tokio::test]
async fn neighbours_come_and_go() {
    let mut net = TestNet::new().await;
    let [staying, leaving] = [ENTRY, EXIT].map(|number| net.listener(number));
    let (context, counters) = net.context(3);
    let pool = LinkPool::start(context).unwrap();
    let mut stays = accept_as(&net, ENTRY, &staying).await;
    let mut leaves = accept_as(&net, EXIT, &leaving).await;
    let exit = net.identity(EXIT);
    pool.set_topology(&net.without(EXIT)).unwrap();
    assert!(soon(leaves.next()).await.is_err());
    pool.send(&exit, packet(1));
    assert_eq!(counters.snapshot().dropped(DropReason::UnknownNextHop), 1);
    pool.set_topology(&net.topology).unwrap();
    let mut back = accept_as(&net, EXIT, &leaving).await;
    pool.send(&exit, packet(2));
    assert!(takes(&mut back, 2).await);
    // A node that is in no document itself has no neighbours.
    pool.set_topology(&net.without(3)).unwrap();
    for connection in [&mut stays, &mut back] {
        assert!(soon(connection.next()).await.is_err());
    }
}

#[tokio::test]
async fn what_waits_for_a_neighbour_that_goes_is_counted() {
    let net = TestNet::new().await;
    let (context, counters) = net.context(ENTRY);
    // The listener of the mix accepts TCP by its backlog, but never answers.
    let pool = LinkPool::start(context).unwrap();
    for _ in 0..5 {
        pool.send(&net.identity(MIX), packet(1));
    }
    pool.set_topology(&net.without(MIX)).unwrap();
    until_dropped(&counters, DropReason::LinkDown, 5).await;
}

#[tokio::test]
async fn links_of_nodes_that_may_not_send_here_any_more_are_closed() {
    let mut net = TestNet::new().await;
    let (documents, topology) = tokio::sync::watch::channel(net.topology.clone());
    let context = LinkContext::new(net.keys[MIX].clone(), topology, Arc::default());
    let (sender, mut packets) = mpsc::channel(8);
    let _listener = LinkListener::start(context, net.listener(MIX), sender).unwrap();
    let mut stays = dial_from(&net, EXIT, MIX).await.unwrap();
    let mut leaves = dial_from(&net, ENTRY, MIX).await.unwrap();
    documents.send_replace(net.without(ENTRY));
    assert!(is_closed(&mut leaves).await);
    assert!(dial_from(&net, ENTRY, MIX).await.is_err());
    stays.push_packet(&net.identity(MIX), &packet(1));
    stays.flush().await.unwrap();
    assert_eq!(soon(packets.recv()).await.unwrap(), packet(1));
    documents.send_replace(net.topology.clone());
    // The sender is gone: it stays as it is.
    drop(documents);
    let back = async { while dial_from(&net, ENTRY, MIX).await.is_err() {} };
    soon(Box::pin(back)).await;
}

/// What a network under test does to packets, and stops doing.
#[tokio::test]
async fn impaired_links_lose_packets_and_say_so() {
    let mut net = TestNet::new().await;
    let (_listener, mut packets, _) = start_listener(&mut net, 8);
    let (context, counters) = net.context(ENTRY);
    let cut = Impairment { cut: true, ..Impairment::default() };
    let (impairments, impairment) = watch::channel(cut);
    let pool = LinkPool::start(context.impaired(Some(impairment))).unwrap();
    for _ in 0..10 {
        pool.send(&net.identity(MIX), packet(1));
    }
    until_dropped(&counters, DropReason::Impaired, 10).await;
    impairments.send_replace(Impairment { delay: Duration::from_millis(1), ..cut });
    pool.send(&net.identity(MIX), packet(1));
    until_dropped(&counters, DropReason::Impaired, 11).await;
    impairments
        .send_replace(Impairment { delay: Duration::from_millis(1), ..Impairment::default() });
    let arrived = async {
        loop {
            // Until it is known that they may pass.
            pool.send(&net.identity(MIX), packet(2));
            let wait = Duration::from_millis(20);
            if let Ok(Some(arrived)) = tokio::time::timeout(wait, packets.recv()).await {
                return arrived;
            }
        }
    };
    assert_eq!(soon(arrived).await, packet(2));
    pool.send(&net.identity(2), packet(3));
    until_dropped(&counters, DropReason::UnknownNextHop, 1).await;
}

/// Else TCP would ask a peer that is gone for a quarter of an hour, ever more rarely.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn connections_without_an_answer_are_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    prepare(&stream).unwrap();
    let socket = socket2::SockRef::from(&stream);
    assert_eq!(socket.tcp_user_timeout().unwrap(), Some(UNANSWERED_TIMEOUT));
    assert!(stream.nodelay().unwrap());
}
