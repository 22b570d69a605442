//! Thousands of clients on one gateway, and what each costs it.
#![cfg(target_os = "linux")] // Elsewhere 127.0.0.0/8 is not this machine, and memory is told otherwise.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use mixsocks_client::EndpointConfig;
use mixsocks_client::messages::{Messenger, MessengerOptions};
use mixsocks_common::gateway::token::Token;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::message::MessageEvent;
use mixsocks_common::topology::{Authorities, Role, Topology, UnixTime, verify};
use mixsocks_node::gateway::MAX_CLIENTS_PER_SOURCE;
use mixsocks_node::gateway::store::{Change, Limits, Outcome, RedbStore, Store};
use mixsocks_sphinx::SecretKey;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::process::{DEADLINE, skip};
use crate::town::{CLIENT_PORT, Plan, Town, authority};

const CLIENTS: usize = 2000;
const SOURCES: usize = 8;
const _: () = assert!(CLIENTS / SOURCES <= MAX_CLIENTS_PER_SOURCE);
/// Each client has a connection to its forwarder, which has two ends of it and one to the gateway.
const OPEN_FILES: u64 = 3 * CLIENTS as u64 + 256;
/// Resident in the gateway for each client that is connected, at most, and for its store's cache of
/// 64 MiB.
const MAX_KIB_PER_CLIENT: u64 = 48;
const MAX_STORE_KIB: u64 = 72 * 1024;

const GATEWAY: &str = "gateway-1";
/// Keys of one hour, so that none changes meanwhile; nobody needs a provider.
const PLAN: Plan = Plan { epoch: 3600, providers: 0, ..Plan::SMALL };

/// Somebody who is registered.
struct Person {
    identity: Arc<IdentityKey>,
    token: Token,
}

/// Registers everybody in the gateway's store, before it starts: doing so over its listener is slow on
/// purpose.
fn register(town: &Town) -> Vec<Person> {
    let mut rng = rand::rng();
    let person = |_| Person {
        identity: Arc::new(IdentityKey::generate(&mut rng)),
        token: Token::generate(&mut rand::rng()),
    };
    let people: Vec<_> = (0..CLIENTS).map(person).collect();
    let change = |person: &Person| Change::Register {
        client: *person.identity.identity().as_bytes(),
        token: person.token.hash(),
    };
    std::fs::create_dir_all(town.folder(GATEWAY)).unwrap();
    let store = RedbStore::open(&town.folder(GATEWAY), Limits::default()).unwrap();
    let changes: Vec<_> = people.iter().map(change).collect();
    let outcomes = store.apply(&changes, now()).unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
    people
}

fn now() -> UnixTime {
    UnixTime(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
}

/// The document of a town.
fn read_topology(town: &Town) -> Topology {
    let file = std::fs::read(town.folder(&authority(0)).join("topology")).unwrap();
    let authorities = Authorities::new([town.key(0).parse().unwrap()], 1).unwrap();
    verify(&file, &authorities, now()).unwrap()
}

/// The same for those who reach a gateway at another address.
fn with_address(topology: &Topology, gateway: Identity, address: SocketAddr) -> Arc<Topology> {
    let mut nodes = topology.nodes().to_vec();
    let node = nodes.iter_mut().find(|node| node.identity == gateway).unwrap();
    node.role = Role::Gateway { client_address: address };
    let (network, parameters) = (topology.network.clone(), topology.parameters);
    let validity = topology.valid_from..topology.valid_until;
    let providers = topology.providers().to_vec();
    let changed = Topology::new(network, topology.epoch, validity, parameters, nodes, providers);
    Arc::new(changed.unwrap())
}

/// Forwards connections to a gateway, to which they come from `source`.
async fn forward(listener: TcpListener, source: IpAddr, gateway: SocketAddr) {
    let mut connections = JoinSet::new();
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        connections.spawn(async move {
            let Ok(mut server) = connect_from(source, gateway).await else { return };
            // It ends with either of them.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        });
    }
}

async fn connect_from(source: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.connect(to).await
}

/// Where clients of one source connect, and their files.
struct Site {
    topology: watch::Receiver<Arc<Topology>>,
    gateway: Identity,
    folder: TempDir,
}

impl Site {
    async fn connect(&self, person: Person) -> Messenger {
        let client = person.identity.identity();
        let mut token = format!("mixsocks-token 1\n{}\n{client}\n", self.gateway);
        person.token.as_bytes().iter().for_each(|byte| write!(token, "{byte:02x}").unwrap());
        let token_file = self.folder.path().join(client.to_string());
        std::fs::write(&token_file, token + "\n").unwrap();
        let config = EndpointConfig {
            topology: self.topology.clone(),
            identity: person.identity,
            encryption: SecretKey::generate(&mut rand::rng()),
            gateway: self.gateway,
            token_file,
            mean_delay: None,
            receives_messages: true,
        };
        soon(Messenger::connect(config, MessengerOptions::default())).await.unwrap()
    }
}

/// Fails when an event does not come.
async fn soon<T>(event: impl Future<Output = T>) -> T {
    timeout(DEADLINE, event).await.expect("it happens in the end")
}

/// Connects people one after the other.
async fn connect_all(site: Site, people: Vec<Person>) -> Vec<Messenger> {
    let mut messengers = Vec::new();
    for person in people {
        messengers.push(site.connect(person).await);
    }
    messengers
}

/// Sends something to itself, and waits until it has come and is said to be delivered.
async fn send_to_itself(messenger: Messenger) {
    let text = messenger.address().to_string().into_bytes();
    let id = messenger.send(messenger.address(), &text, 0).await.unwrap();
    let (mut is_delivered, mut is_received) = (false, false);
    while !(is_delivered && is_received) {
        match soon(messenger.next_event()).await.unwrap() {
            MessageEvent::Delivered(delivered) => {
                assert_eq!(delivered, id);
                is_delivered = true;
            }
            MessageEvent::Received { received, message, .. } => {
                assert!(message == text && !is_received);
                messenger.taken(received);
                is_received = true;
            }
            MessageEvent::Failed(_, reason) => panic!("{reason}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_clients_of_a_gateway_each_send_to_themselves_and_cost_it_little_memory() {
    if rlimit::increase_nofile_limit(u64::MAX).unwrap() < OPEN_FILES {
        return skip("the limit of open files is too low for so many clients");
    }
    let mut town = Town::on_loopback(PLAN);
    let mut people = register(&town);
    town.start_without_client();
    let gateway = town.wait_for(GATEWAY, "gateway  ");
    let gateway: Identity = gateway.split_whitespace().next().unwrap().parse().unwrap();
    let (topology, address) = (read_topology(&town), town.address(GATEWAY, CLIENT_PORT));
    let before = town.resident_kib(GATEWAY);

    let (mut forwarders, mut connecting) = (JoinSet::new(), JoinSet::new());
    for number in 0..SOURCES {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let topology = with_address(&topology, gateway, listener.local_addr().unwrap());
        let source = [127, 0, 0, u8::try_from(2 + number).unwrap()];
        forwarders.spawn(forward(listener, source.into(), address));
        let folder = tempfile::tempdir().unwrap();
        let site = Site { topology: watch::channel(topology).1, gateway, folder };
        connecting.spawn(connect_all(site, people.split_off(people.len() - CLIENTS / SOURCES)));
    }
    let messengers = connecting.join_all().await.concat();
    assert_eq!(messengers.len(), CLIENTS);
    let connected = town.resident_kib(GATEWAY);

    let sending: JoinSet<_> = messengers.iter().cloned().map(send_to_itself).collect();
    sending.join_all().await;
    let after = town.resident_kib(GATEWAY);
    println!(
        "resident: {before} KiB, {connected} KiB with {CLIENTS} clients, {after} KiB when each has sent \
         and received"
    );
    let all_clients = MAX_KIB_PER_CLIENT * CLIENTS as u64;
    assert!(connected <= before + all_clients, "{connected} KiB");
    assert!(after <= before + all_clients + MAX_STORE_KIB, "{after} KiB");
}
