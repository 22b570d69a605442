//! Messages through a whole network, with the Rust API.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mixsocks_client::messages::{
    MAX_UNFETCHED, Messenger, MessengerOptions, RECEIVED_LOG_FILE, WriteDown,
};
use mixsocks_client::{Client, ClientConfig, EndpointConfig};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::message::fragment::MessageId;
use mixsocks_common::message::{
    FailReason, MessageEvent, ReceivedId, SendError, Sender, SenderTag,
};
use mixsocks_common::topology::{Authorities, Topology, UnixTime, verify};
use mixsocks_sphinx::SecretKey;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::process::{DEADLINE, Process, up};

/// `mixsocks up`.
struct Network {
    topology: watch::Receiver<Arc<Topology>>,
    documents: watch::Sender<Arc<Topology>>,
    process: Option<Process>,
    folder: TempDir,
}

impl Network {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let process = Some(start(folder.path()));
        let (documents, topology) = watch::channel(read_topology(folder.path()));
        Self { topology, documents, process, folder }
    }

    /// Kills all nodes, and starts them again at other ports.
    fn restart(&mut self) {
        self.process = None;
        self.process = Some(start(self.folder.path()));
        self.documents.send_replace(read_topology(self.folder.path()));
    }

    fn gateway(&self, number: usize) -> Identity {
        self.topology.borrow().gateways().nth(number).unwrap().identity
    }

    /// Somebody at a gateway.
    fn person(&self, gateway: usize) -> Person {
        Person::new(&self.topology, self.gateway(gateway))
    }
}

fn start(folder: &Path) -> Process {
    let process = Process::start(up(folder).args(["--mean-delay", "1ms"]));
    process.wait_for("socks5h://");
    process
}

fn read_topology(folder: &Path) -> Arc<Topology> {
    let authority = std::fs::read_to_string(folder.join("authority.pub")).unwrap();
    topology(&folder.join("topology"), &authority)
}

/// The document in a file that one authority has signed.
pub(crate) fn topology(file: &Path, authority: &str) -> Arc<Topology> {
    let authority: Identity = authority.trim().parse().unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let authorities = Authorities::new([authority], 1).unwrap();
    Arc::new(verify(&std::fs::read(file).unwrap(), &authorities, UnixTime(now)).unwrap())
}

/// Somebody who connects, and comes back.
pub(crate) struct Person {
    topology: watch::Receiver<Arc<Topology>>,
    identity: Arc<IdentityKey>,
    encryption: Vec<u8>,
    gateway: Identity,
    folder: TempDir,
}

impl Person {
    /// Somebody new.
    pub(crate) fn new(topology: &watch::Receiver<Arc<Topology>>, gateway: Identity) -> Self {
        Self {
            topology: topology.clone(),
            identity: Arc::new(IdentityKey::generate(&mut rand::rng())),
            encryption: SecretKey::generate(&mut rand::rng()).to_bytes().to_vec(),
            gateway,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn encryption(&self) -> SecretKey {
        SecretKey::from_bytes(self.encryption[..].try_into().unwrap())
    }

    pub(crate) fn address(&self) -> Address {
        Address {
            identity: self.identity.identity(),
            encryption: self.encryption().public_key().into(),
            gateway: self.gateway,
        }
    }

    fn options(&self) -> MessengerOptions {
        let received_log = Some(self.folder.path().join(RECEIVED_LOG_FILE));
        MessengerOptions { received_log, ..MessengerOptions::default() }
    }

    pub(crate) async fn connect(&self) -> Messenger {
        self.connect_with(self.options()).await
    }

    async fn connect_with(&self, options: MessengerOptions) -> Messenger {
        let config = EndpointConfig {
            topology: self.topology.clone(),
            identity: self.identity.clone(),
            encryption: self.encryption(),
            gateway: self.gateway,
            token_file: self.folder.path().join("token"),
            mean_delay: None,
            receives_messages: true,
        };
        soon(Messenger::connect(config, options)).await.unwrap()
    }
}

/// Fails when an event does not come.
pub(crate) async fn soon<T>(event: impl Future<Output = T>) -> T {
    timeout(DEADLINE, event).await.expect("it happens in the end")
}

async fn event(messenger: &Messenger) -> MessageEvent {
    soon(messenger.next_event()).await.expect("the messenger runs")
}

/// The next message that comes; news of what was sent is passed over.
async fn received(messenger: &Messenger) -> (Vec<u8>, Sender, ReceivedId) {
    loop {
        match event(messenger).await {
            MessageEvent::Received { received, message, sender } => {
                return (message, sender, received);
            }
            MessageEvent::Delivered(_) => {}
            MessageEvent::Failed(_, reason) => panic!("{reason}"),
        }
    }
}

async fn take(messenger: &Messenger) -> (Vec<u8>, Sender) {
    let (message, sender, id) = received(messenger).await;
    messenger.taken(id);
    (message, sender)
}

/// What becomes of a message.
async fn outcome(messenger: &Messenger, of: MessageId) -> Result<(), FailReason> {
    loop {
        match event(messenger).await {
            MessageEvent::Delivered(id) if id == of => return Ok(()),
            MessageEvent::Failed(id, reason) if id == of => return Err(reason),
            _ => {}
        }
    }
}

fn bytes(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_to_oneself_of_every_size_come_and_are_said_to_be_delivered() {
    let network = Network::start();
    let messenger = network.person(0).connect().await;
    for length in [1, 100_000, 16 * 1024 * 1024] {
        let id = messenger.send(messenger.address(), &bytes(length), 0).await.unwrap();
        let (mut is_delivered, mut is_received) = (false, false);
        while !(is_delivered && is_received) {
            match event(&messenger).await {
                MessageEvent::Delivered(delivered) => {
                    assert_eq!((delivered, is_delivered), (id, false));
                    is_delivered = true;
                }
                MessageEvent::Received { received, message, sender } => {
                    assert!(message == bytes(length) && !is_received);
                    assert_eq!(sender, Sender::Unknown);
                    messenger.taken(received);
                    is_received = true;
                }
                MessageEvent::Failed(_, reason) => panic!("{reason}"),
            }
        }
    }
    soon(messenger.shutdown()).await;
    assert_eq!(soon(messenger.next_event()).await, None);
    let refused = soon(messenger.send(messenger.address(), b"late", 0)).await;
    assert_eq!(refused, Err(SendError::Stopped));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anonymous_senders_get_replies_also_more_than_they_gave_surbs_for() {
    let network = Network::start();
    let (asker, answerer) = (network.person(0).connect().await, network.person(1).connect().await);
    asker.send(answerer.address(), b"question", 5).await.unwrap();
    let (message, sender) = take(&answerer).await;
    assert_eq!(message, b"question");
    let Sender::Anonymous(tag) = sender else { panic!("{sender:?}") };
    // One of them takes far more than five SURBs.
    let replies = [b"one".to_vec(), bytes(60_000), b"three".to_vec()];
    let mut missing = BTreeMap::new();
    for reply in &replies {
        missing.insert(reply.clone(), answerer.reply(tag, reply).await.unwrap());
    }
    while !missing.is_empty() {
        let (message, sender) = take(&asker).await;
        assert_eq!(sender, Sender::Replier(answerer.address()));
        assert!(missing.remove(&message).is_some(), "it came once");
    }
    let unknown = answerer.reply(SenderTag([1; 16]), b"to nobody").await;
    assert_eq!(unknown, Err(SendError::UnknownSender));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_is_acknowledged_by_who_leaves_as_soon_as_it_has_come() {
    let network = Network::start();
    let (asker, answerer) = (network.person(0).connect().await, network.person(1).connect().await);
    asker.send(answerer.address(), b"question", 10).await.unwrap();
    let (_, Sender::Anonymous(tag)) = take(&answerer).await else { panic!() };
    let reply = answerer.reply(tag, b"answer").await.unwrap();
    assert_eq!(take(&asker).await.0, b"answer");
    soon(asker.shutdown()).await;
    assert_eq!(outcome(&answerer, reply).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_away_gets_messages_later_and_each_at_most_once() {
    let network = Network::start();
    let (sender, person) = (network.person(0).connect().await, network.person(1));
    soon(person.connect().await.shutdown()).await;
    let id = sender.send(person.address(), b"for later", 0).await.unwrap();
    assert_eq!(outcome(&sender, id).await, Ok(()));
    // It is received, but nobody says so: the program is killed.
    let messenger = person.connect().await;
    assert_eq!(received(&messenger).await.0, b"for later");
    drop(messenger);
    let messenger = person.connect().await;
    sender.send(person.address(), b"the next one", 0).await.unwrap();
    assert_eq!(take(&messenger).await.0, b"the next one", "and the first one not again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_writes_down_what_was_taken_gets_each_message_at_least_once() {
    let network = Network::start();
    let person = network.person(0);
    let options = || MessengerOptions { write_down: WriteDown::WhenTaken, ..person.options() };
    let messenger = person.connect_with(options()).await;
    messenger.send(person.address(), b"once more", 0).await.unwrap();
    assert_eq!(received(&messenger).await.0, b"once more");
    drop(messenger);
    let messenger = person.connect_with(options()).await;
    assert_eq!(take(&messenger).await.0, b"once more");
    drop(messenger);
    let messenger = person.connect_with(options()).await;
    messenger.send(person.address(), b"the next one", 0).await.unwrap();
    assert_eq!(take(&messenger).await.0, b"the next one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_clients_and_gateways_fail_with_their_reason() {
    let network = Network::start();
    let person = network.person(0);
    let options =
        MessengerOptions { give_up_after: Duration::from_millis(1500), ..person.options() };
    let messenger = person.connect_with(options).await;
    let id = messenger.send(network.person(1).address(), b"to nobody", 0).await.unwrap();
    assert_eq!(outcome(&messenger, id).await, Err(FailReason::UnknownClient));
    let gateway = IdentityKey::generate(&mut rand::rng()).identity();
    let nowhere = Address { gateway, ..person.address() };
    let sent = messenger.send(nowhere, b"to nowhere", 0).await;
    assert_eq!(sent, Err(SendError::UnknownGateway));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_messages_share_a_client() {
    let network = Network::start();
    let provider = network.topology.borrow().providers()[0].address;
    let gateway = usize::from(network.gateway(0) == provider.gateway);
    let person = network.person(gateway);
    let config = ClientConfig {
        topology: person.topology.clone(),
        identity: person.identity.clone(),
        encryption: person.encryption(),
        gateway: person.gateway,
        token_file: person.folder.path().join("token"),
        providers: vec![provider],
        access_token: None,
        mean_delay: None,
        messages: Some(person.options()),
    };
    let client = soon(Client::connect(config)).await.unwrap();
    let messenger = client.messenger().unwrap();
    messenger.send(messenger.address(), &bytes(50_000), 0).await.unwrap();
    // The provider refuses private addresses: an answer of its own.
    let refused = soon(client.open_stream("10.0.0.1:80".parse().unwrap())).await;
    assert!(refused.is_err());
    assert!(take(&messenger).await.0 == bytes(50_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_in_one_process_each_send_to_themselves() {
    const CLIENTS: usize = 50;
    let network = Network::start();
    let mut all = Vec::new();
    for number in 0..CLIENTS {
        all.push(network.person(number % 2).connect().await);
    }
    for (number, messenger) in all.iter().enumerate() {
        messenger.send(messenger.address(), &bytes(number + 1), 0).await.unwrap();
    }
    for (number, messenger) in all.iter().enumerate() {
        assert_eq!(take(messenger).await.0, bytes(number + 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_delivered_survives_that_the_gateways_are_killed() {
    let mut network = Network::start();
    let (sender, person) = (network.person(0).connect().await, network.person(1));
    soon(person.connect().await.shutdown()).await;
    let id = sender.send(person.address(), b"before", 0).await.unwrap();
    assert_eq!(outcome(&sender, id).await, Ok(()));
    network.restart();
    let messenger = person.connect().await;
    assert_eq!(take(&messenger).await.0, b"before");
    // The link of the sender comes back by itself.
    sender.send(person.address(), b"after", 0).await.unwrap();
    assert_eq!(take(&messenger).await.0, b"after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_fetches_no_events_has_to_wait_at_the_bound() {
    let network = Network::start();
    let messenger = network.person(0).connect().await;
    let nobody = network.person(1).address();
    for _ in 0..MAX_UNFETCHED {
        soon(messenger.send(nobody, b"m", 0)).await.unwrap();
    }
    let one_more = messenger.send(nobody, b"m", 0);
    tokio::pin!(one_more);
    tokio::select! {
        biased;
        sent = &mut one_more => panic!("{sent:?}"),
        () = std::future::ready(()) => {}
    }
    let failed = event(&messenger).await;
    assert!(matches!(failed, MessageEvent::Failed(_, FailReason::UnknownClient)), "{failed:?}");
    soon(one_more).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_where_it_was_asked_for() {
    let network = Network::start();
    let person = network.person(0);
    let messenger = person.connect().await;
    messenger.send(messenger.address(), b"m", 0).await.unwrap();
    received(&messenger).await;
    let log: &Path = &person.folder.path().join(RECEIVED_LOG_FILE);
    assert_eq!(std::fs::metadata(log).unwrap().len(), 16 + 20);
}
