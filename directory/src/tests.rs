//! Authorities, members and followers that talk over loopback.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mixsocks_common::address::Address;
use mixsocks_common::directory::{
    AddressRule, Admission, Hop, Invitation, InvitationHash, Member, MemberKind, Minimum, Pace,
    Rules, Settings,
};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{
    Authorities, Epochs, NetworkName, Parameters, Provider, Topology, UnixTime,
};
use mixsocks_sphinx::SecretKey;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::*;

/// Epochs of a test: short, so that it sees several.
const EPOCH_SECONDS: u64 = 8;

#[derive(Default)]
struct MemoryStore {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    is_full: watch::Sender<bool>,
}

impl Store for MemoryStore {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.files.lock().unwrap().get(name).cloned())
    }

    fn write(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        if *self.is_full.borrow() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.files.lock().unwrap().insert(name.to_owned(), contents.to_vec());
        Ok(())
    }
}

/// A network's authorities.
struct Network {
    keys: Vec<u8>,
    urls: Vec<Url>,
    authorities: Authorities,
    servers: Vec<Option<DirectoryServer>>,
    stores: Vec<Arc<MemoryStore>>,
    used: Arc<Mutex<Vec<Identity>>>,
}

fn key(number: u8) -> IdentityKey {
    IdentityKey::from_bytes(&[number; 32])
}

fn people() -> [(u8, MemberKind); 6] {
    let mix = MemberKind::Mix;
    [
        (1, mix),
        (2, mix),
        (3, mix),
        (4, MemberKind::Gateway),
        (5, MemberKind::Gateway),
        (6, MemberKind::Provider),
    ]
}

fn invitation() -> Invitation {
    Invitation::from_bytes([9; 32])
}

impl Network {
    /// Those of `running` run.
    async fn new(count: u8, running: &[usize]) -> Self {
        let keys: Vec<u8> = (0..count).map(|number| 100 + number).collect();
        let mut listeners = Vec::new();
        for _ in &keys {
            listeners.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        }
        let url = |listener: &TcpListener| {
            format!("http://{}", listener.local_addr().unwrap()).parse().unwrap()
        };
        let urls: Vec<Url> = listeners.iter().map(url).collect();
        let identities = keys.iter().map(|number| key(*number).identity());
        let authorities = Authorities::new(identities, keys.len() / 2 + 1).unwrap();
        let mut network = Self {
            servers: keys.iter().map(|_| None).collect(),
            stores: keys.iter().map(|_| Arc::default()).collect(),
            used: Arc::default(),
            keys,
            urls,
            authorities,
        };
        for (at, listener) in listeners.into_iter().enumerate() {
            if running.contains(&at) {
                network.servers[at] = Some(network.server(at, listener, false).unwrap());
            }
        }
        network
    }

    fn rules(&self) -> Rules {
        Rules::new(Settings {
            network: NetworkName::new("test").unwrap(),
            parameters: Parameters {
                payload_bytes: 2048,
                mean_delay: Duration::from_millis(15),
                max_delay: Duration::from_secs(1),
                epochs: Epochs { epoch_seconds: EPOCH_SECONDS, key_epochs: 2, overlap_seconds: 2 },
            },
            authorities: self.authorities.clone(),
            addresses: AddressRule::Private,
            valid_epochs: 3,
            minimum: Minimum { mixes: 3, gateways: 2, providers: 1 },
        })
        .unwrap()
    }

    fn server(
        &self,
        at: usize,
        listener: TcpListener,
        has_run: bool,
    ) -> Result<DirectoryServer, StartError> {
        let peers = self.keys.iter().zip(&self.urls).enumerate().filter(|(other, _)| *other != at);
        let peers = peers
            .map(|(_, (number, url))| Peer { identity: key(*number).identity(), url: url.clone() });
        let me = key(self.keys[at]);
        let identity = me.identity();
        let used = self.used.clone();
        DirectoryServer::start(DirectoryConfig {
            key: me,
            rules: self.rules(),
            peers: peers.collect(),
            listener,
            store: self.stores[at].clone(),
            has_run,
            // The provider comes by invitation.
            admission: Box::new(move || {
                let listed = people().into_iter().filter(|(n, _)| *n != 6);
                let mut admission =
                    Admission::new(listed.map(|(n, kind)| (key(n).identity(), kind)));
                let hash = invitation().hash(&identity);
                admission.invite(hash, MemberKind::Provider, None).unwrap();
                Ok(admission)
            }),
            invited: Box::new(move |_: InvitationHash, identity| {
                used.lock().unwrap().push(identity);
                Ok(())
            }),
        })
    }

    async fn publish_all(&self) -> Vec<Publisher> {
        let http = Http::default();
        let rules = learn_rules(&http, &self.urls, &self.authorities).await.unwrap();
        let publisher = |(number, kind)| {
            let config = PublishConfig {
                identity: Arc::new(key(number)),
                urls: self.urls.clone(),
                authorities: self.authorities.clone(),
                rules: rules.clone(),
                invitation: (number == 6).then(invitation),
                member: Box::new(move |now| member(number, kind, now)),
                http: http.clone(),
            };
            Publisher::start(config)
        };
        people().into_iter().map(publisher).collect()
    }

    async fn follow(&self, store: Arc<MemoryStore>) -> (watch::Receiver<Arc<Topology>>, Following) {
        let mut follow = Follow::new(FollowConfig {
            urls: self.urls.clone(),
            authorities: self.authorities.clone(),
            pace: Pace::Node,
            store,
            http: Http::default(),
        })
        .unwrap()
        .unwrap();
        let first = follow.first().await;
        follow.spawn(first)
    }
}

fn member(number: u8, kind: MemberKind, now: UnixTime) -> Member {
    let key_epoch = now.0 / EPOCH_SECONDS / 2;
    let sphinx_key = |key_epoch: u64| {
        let mut seed = [number; 32];
        seed[..8].copy_from_slice(&key_epoch.to_be_bytes());
        SecretKey::from_bytes(seed).public_key().into()
    };
    let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port + u16::from(number)));
    let hop = Hop {
        link_address: address(1000),
        keys: (key_epoch..key_epoch + 3).map(|epoch| (epoch, sphinx_key(epoch))).collect(),
    };
    match kind {
        MemberKind::Mix => Member::Mix(hop),
        MemberKind::Gateway => Member::Gateway { hop, client_address: address(2000) },
        MemberKind::Provider => Member::Provider(Provider {
            name: "exit".to_owned(),
            address: Address {
                identity: key(number).identity(),
                encryption: sphinx_key(0),
                gateway: key(4).identity(),
            },
            policy: "everything".to_owned(),
            requires_token: false,
        }),
    }
}

#[tokio::test]
async fn members_get_into_documents_that_follow_each_other() {
    let network = Network::new(3, &[0, 1, 2]).await;
    let _publishers = network.publish_all().await;
    let store = Arc::<MemoryStore>::default();
    let (mut topology, _following) = network.follow(store.clone()).await;
    let first = topology.borrow_and_update().clone();
    assert_eq!((first.nodes().len(), first.providers().len()), (5, 1));
    topology.changed().await.unwrap();
    let second = topology.borrow_and_update().clone();
    assert_eq!(second.epoch, first.epoch + 1);
    assert_eq!(second.nodes().len(), 5);
    // What is used is kept, so that it is there at once after a restart.
    let (again, _following) = network.follow(store).await;
    assert!(again.borrow().epoch >= second.epoch);
    // The invitation was used once at each authority, and that is on the disk.
    assert_eq!(*network.used.lock().unwrap(), vec![key(6).identity(); 3]);
}

/// The next document is made ahead, but who comes now needs the one that is in force.
#[tokio::test]
async fn the_document_in_force_is_served_until_the_next_one_is() {
    let network = Network::new(1, &[0]).await;
    let _publishers = network.publish_all().await;
    let http = Http::default();
    let mut epochs = std::collections::BTreeSet::new();
    while epochs.len() < 3 {
        let Ok(file) = http.document(&network.urls[0]).await else { continue };
        let before = unix_time();
        let signed =
            mixsocks_common::topology::SignedTopology::read(&file, &network.authorities).unwrap();
        assert_eq!(signed.check_time(before), Ok(()));
        epochs.insert(signed.topology().epoch);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn one_authority_of_three_may_be_down() {
    let network = Network::new(3, &[0, 2]).await;
    let _publishers = network.publish_all().await;
    let (mut topology, _following) = network.follow(Arc::default()).await;
    let first = topology.borrow_and_update().epoch;
    topology.changed().await.unwrap();
    topology.changed().await.unwrap();
    assert!(topology.borrow().epoch >= first + 2);
}

#[tokio::test]
async fn a_document_is_not_sent_again_to_who_has_it() {
    let network = Network::new(1, &[0]).await;
    let _publishers = network.publish_all().await;
    let (topology, _following) = network.follow(Arc::default()).await;
    assert_eq!(topology.borrow().nodes().len(), 5);
    let http = Http::default();
    let get = async |etag| http.get(network.urls[0].join("/topology"), etag, 100_000).await;
    let Ok(http::Fetched::New(body)) = get(None).await else { panic!("no document") };
    let signed =
        mixsocks_common::topology::SignedTopology::read(&body, &network.authorities).unwrap();
    let etag = server::etag(&signed);
    assert!(matches!(get(Some(&etag)).await, Ok(http::Fetched::NotModified)));
    let other = hyper::header::HeaderValue::from_static("\"0\"");
    assert!(matches!(get(Some(&other)).await, Ok(http::Fetched::New(_))));
    let short = http.get(network.urls[0].join("/topology"), None, 100).await;
    assert!(matches!(short, Err(HttpError::TooLong(100))));
}

#[tokio::test]
async fn what_is_refused_is_explained() {
    let network = Network::new(1, &[0]).await;
    let http = Http::default();
    let url = &network.urls[0];
    let refused = async |path, body: Vec<u8>| match http.post(url.join(path), body, 200).await {
        Err(HttpError::Refused { status, explanation }) => (status, explanation),
        other => panic!("{other:?}"),
    };
    let (status, words) = refused("/descriptors", vec![0; 10]).await;
    assert_eq!((status, &*words), (400, "the bytes are no upload of a descriptor"));
    let (status, words) = refused("/descriptors", vec![0; 10_000]).await;
    assert!(status == 413 && words.contains("more than"), "{words}");
    // A large body is taken of other authorities alone.
    let (status, words) = refused("/authority", vec![0; 5000]).await;
    assert!(status == 403 && words.contains("only authorities"), "{words}");
    let (status, words) = refused("/authority", vec![0; 300]).await;
    assert!(status == 400 && words.contains("no message"), "{words}");
    let stranger = mixsocks_common::directory::Descriptor {
        network: NetworkName::new("test").unwrap(),
        identity: key(50).identity(),
        published: unix_time(),
        member: member(50, MemberKind::Mix, unix_time()),
    };
    let signed = stranger.sign(&key(50)).unwrap();
    let upload = mixsocks_common::directory::Upload {
        descriptor: signed.text().as_bytes(),
        endorsements: Vec::new(),
        invitation: None,
    };
    let (status, words) = refused("/descriptors", upload.to_bytes()).await;
    assert!(status == 403 && words.contains("ask the authority's operator"), "{words}");
    let missing = http.get(url.join("/topology"), None, 200).await;
    assert!(matches!(missing, Err(HttpError::Refused { status: 404, .. })));
}

/// A full disk stops an authority, as nothing may leave that is not on it, but not for good.
#[tokio::test]
async fn a_full_disk_stops_an_authority_until_there_is_room() {
    let network = Network::new(1, &[0]).await;
    network.stores[0].is_full.send_replace(true);
    let _publishers = network.publish_all().await;
    let server = network.servers[0].as_ref().unwrap();
    let http = Http::default();
    let held = async || learn_descriptors(&http, &network.urls, &network.authorities).await;
    while held().await.unwrap().len() < 5 {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.asker().status().await.unwrap().in_force, None);
    network.stores[0].is_full.send_replace(false);
    let (topology, _following) = network.follow(Arc::default()).await;
    assert!(topology.borrow().nodes().len() >= 5);
}

#[tokio::test]
async fn peers_must_be_the_other_authorities() {
    let mut network = Network::new(3, &[]).await;
    network.keys.pop();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    assert!(matches!(network.server(0, listener, false), Err(StartError::Peers)));
}
