//! A whole mixnet in this process: three mixes, two gateways and a provider, over real sockets on
//! the loopback interface, with the very code that separate processes run.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{EncryptionKey, Identity, IdentityKey};
use mixsocks_common::topology::{
    self, Epochs, LAYERS, NetworkName, Node, Parameters, Role, Topology, UnixTime,
};
use mixsocks_node::gateway::store::Limits;
use mixsocks_node::gateway::{Gateway, GatewayConfig};
use mixsocks_node::keys::SphinxKeys;
use mixsocks_node::mix::{Mix, MixConfig};
use mixsocks_provider::{Provider, ProviderConfig};
use mixsocks_sphinx::SecretKey;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::cli::MAX_DELAY;
use crate::data_dir::DataDir;
use crate::{logging, topology_file};

/// What a network without other wishes uses.
pub(crate) const DEFAULT_MEAN_DELAY: Duration = Duration::from_millis(15);
/// Chosen by measuring: `docs/performance.md`, "Size of packets".
pub(crate) const DEFAULT_PAYLOAD_BYTES: u32 = 4096;
/// Longer than anybody leaves it running without a restart, which writes a new topology.
const VALIDITY_SECONDS: u64 = 30 * 24 * 60 * 60;
/// Clocks of this machine's programs may be set back a little.
const CLOCK_SLACK_SECONDS: u64 = 60 * 60;
const PROVIDER_NAME: &str = "local";
/// Gateways: the first for clients, the second for the provider.
const GATEWAYS: usize = 2;

/// What the user can choose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NetworkOptions {
    pub(crate) mean_delay: Option<Duration>,
    pub(crate) payload_bytes: Option<u32>,
    pub(crate) allow_private: bool,
    pub(crate) dns: Option<SocketAddr>,
}

/// A running network.
pub(crate) struct Network {
    /// The first field, so that it is dropped before the parts.
    intact: logging::Intact,
    topology: watch::Receiver<Arc<Topology>>,
    provider_address: Address,
    client_gateway: Identity,
    mixes: Vec<Mix>,
    gateways: Vec<Gateway>,
    provider: Provider,
}

impl Network {
    /// Starts a network with the keys of the data directory, and writes its topology there.
    pub(crate) async fn start(dir: &DataDir, options: NetworkOptions) -> Result<Self> {
        let authority = dir.identity_key("authority.key")?;
        dir.write("authority.pub", format!("{}\n", authority.identity()).as_bytes())?;
        let mut mix_seats = Vec::new();
        for n in 1..=LAYERS {
            mix_seats.push(MixSeat::take(dir, &format!("mix-{n}")).await?);
        }
        let mut gateway_seats = Vec::new();
        for n in 1..=GATEWAYS {
            gateway_seats.push(GatewaySeat::take(dir, &format!("gateway-{n}")).await?);
        }
        let client_gateway = gateway_seats[0].identity.identity();
        let provider_keys = ProviderKeys::load(dir, gateway_seats[1].identity.identity())?;

        let mut nodes = Vec::new();
        for (layer, seat) in (1..).zip(&mix_seats) {
            nodes.push(seat.node(layer)?);
        }
        for seat in &gateway_seats {
            nodes.push(seat.node()?);
        }
        let advert = topology::Provider {
            name: PROVIDER_NAME.to_owned(),
            address: provider_keys.address,
            policy: policy(options.allow_private).to_owned(),
            requires_token: false,
        };
        publish(dir, &authority, options, nodes, advert)?;
        let authorities = topology_file::only(authority.identity())?;
        // From here on everybody knows what the file says, and nothing else.
        let file = dir.path().join(topology_file::FILE);
        // It does not change while the network runs.
        let newest = Arc::new(topology_file::read(&file, &authorities)?.topology);
        let topology = watch::channel(newest).1;

        let mut gateways = Vec::new();
        for seat in gateway_seats {
            gateways.push(seat.start(&topology)?);
        }
        let mut mixes = Vec::new();
        // Declared behind the nodes, so that it goes before them when something fails from here on.
        let intact = logging::Intact::new();
        for seat in mix_seats {
            mixes.push(seat.start(&topology)?);
        }
        let provider_address = provider_keys.address;
        let provider = provider_keys.start(dir, &topology, options).await?;
        Ok(Self { intact, topology, provider_address, client_gateway, mixes, gateways, provider })
    }

    /// The topology, as it was read from its file.
    pub(crate) fn topology(&self) -> &watch::Receiver<Arc<Topology>> {
        &self.topology
    }

    /// The provider's address.
    pub(crate) fn provider_address(&self) -> Address {
        self.provider_address
    }

    /// The gateway that is meant for clients: the one that is not the provider's.
    pub(crate) fn client_gateway(&self) -> Identity {
        self.client_gateway
    }

    /// Stops everything, the ends first.
    pub(crate) async fn shutdown(self) {
        drop(self.intact);
        self.provider.shutdown().await;
        for gateway in self.gateways {
            gateway.shutdown().await;
        }
        for mix in self.mixes {
            mix.shutdown().await;
        }
    }
}

/// What a provider lets through, in words.
pub(crate) fn policy(allow_private: bool) -> &'static str {
    if allow_private {
        "every address, private and loopback ones too, but not port 25"
    } else {
        "public addresses, but not port 25"
    }
}

/// Signs the topology and writes it.
fn publish(
    dir: &DataDir,
    authority: &IdentityKey,
    options: NetworkOptions,
    nodes: Vec<Node>,
    provider: topology::Provider,
) -> Result<()> {
    let latest = topology_file::latest(dir, &topology_file::only(authority.identity())?)?;
    let epoch = latest.map_or(1, |topology| topology.epoch + 1);
    let parameters = Parameters {
        payload_bytes: options.payload_bytes.unwrap_or(DEFAULT_PAYLOAD_BYTES) as usize,
        mean_delay: options.mean_delay.unwrap_or(DEFAULT_MEAN_DELAY),
        max_delay: MAX_DELAY,
        epochs: Epochs::STATIC,
    };
    let now = topology_file::now().0;
    let validity =
        UnixTime(now.saturating_sub(CLOCK_SLACK_SECONDS))..UnixTime(now + VALIDITY_SECONDS);
    let network = NetworkName::new("local").expect("five letters are a name");
    let topology = Topology::new(network, epoch, validity, parameters, nodes, vec![provider])?;
    topology_file::write(dir, &topology, authority)
}

/// A mix that has its keys and its port, but not yet its network.
struct MixSeat {
    name: String,
    identity: Arc<IdentityKey>,
    keys: Arc<SphinxKeys>,
    listener: TcpListener,
    data_dir: PathBuf,
}

impl MixSeat {
    async fn take(dir: &DataDir, name: &str) -> Result<Self> {
        let data_dir = dir.folder(name)?;
        Ok(Self {
            name: name.to_owned(),
            identity: Arc::new(dir.identity_key(&format!("{name}/identity.key"))?),
            keys: sphinx_keys(&data_dir)?,
            listener: loopback_listener().await?,
            data_dir,
        })
    }

    fn node(&self, layer: u8) -> Result<Node> {
        Ok(Node {
            identity: self.identity.identity(),
            sphinx_key: present_key(&self.keys)?,
            next_sphinx_key: None,
            link_address: self.listener.local_addr()?,
            role: Role::Mix { layer },
        })
    }

    fn start(self, topology: &watch::Receiver<Arc<Topology>>) -> Result<Mix> {
        let config = MixConfig {
            identity: self.identity,
            keys: self.keys,
            topology: topology.clone(),
            listener: self.listener,
            data_dir: self.data_dir,
        };
        Mix::start(config).with_context(|| format!("{} does not start", self.name))
    }
}

/// A gateway that has its keys and its ports, but not yet its network.
struct GatewaySeat {
    name: String,
    identity: Arc<IdentityKey>,
    keys: Arc<SphinxKeys>,
    link_listener: TcpListener,
    client_listener: TcpListener,
    data_dir: PathBuf,
}

impl GatewaySeat {
    async fn take(dir: &DataDir, name: &str) -> Result<Self> {
        let data_dir = dir.folder(name)?;
        Ok(Self {
            name: name.to_owned(),
            identity: Arc::new(dir.identity_key(&format!("{name}/identity.key"))?),
            keys: sphinx_keys(&data_dir)?,
            link_listener: loopback_listener().await?,
            client_listener: loopback_listener().await?,
            data_dir,
        })
    }

    fn node(&self) -> Result<Node> {
        Ok(Node {
            identity: self.identity.identity(),
            sphinx_key: present_key(&self.keys)?,
            next_sphinx_key: None,
            link_address: self.link_listener.local_addr()?,
            role: Role::Gateway { client_address: self.client_listener.local_addr()? },
        })
    }

    fn start(self, topology: &watch::Receiver<Arc<Topology>>) -> Result<Gateway> {
        let config = GatewayConfig {
            identity: self.identity,
            keys: self.keys,
            topology: topology.clone(),
            link_listener: self.link_listener,
            client_listener: self.client_listener,
            data_dir: self.data_dir,
            limits: Limits::default(),
        };
        Gateway::start(config).with_context(|| format!("{} does not start", self.name))
    }
}

/// A provider that has its keys, and so its address.
struct ProviderKeys {
    identity: Arc<IdentityKey>,
    encryption: SecretKey,
    address: Address,
}

impl ProviderKeys {
    const FOLDER: &str = "provider";

    fn load(dir: &DataDir, gateway: Identity) -> Result<Self> {
        let folder = Self::FOLDER;
        let identity = Arc::new(dir.identity_key(&format!("{folder}/identity.key"))?);
        let encryption = dir.sphinx_key(&format!("{folder}/encryption.key"))?;
        let address = Address {
            identity: identity.identity(),
            encryption: encryption.public_key().into(),
            gateway,
        };
        Ok(Self { identity, encryption, address })
    }

    async fn start(
        self,
        dir: &DataDir,
        topology: &watch::Receiver<Arc<Topology>>,
        options: NetworkOptions,
    ) -> Result<Provider> {
        let config = ProviderConfig {
            topology: topology.clone(),
            identity: self.identity,
            encryption: self.encryption,
            gateway: self.address.gateway,
            token_file: dir.folder(Self::FOLDER)?.join("token"),
            access_tokens: None,
            allow_private: options.allow_private,
            dns: options.dns,
        };
        Provider::start(config).await.context("the provider does not start")
    }
}

/// The keys of a node, which stay what they are: the topology does not change while it runs.
fn sphinx_keys(dir: &Path) -> Result<Arc<SphinxKeys>> {
    Ok(Arc::new(SphinxKeys::open(dir, Epochs::STATIC, topology_file::now())?))
}

/// The key that the topology names.
fn present_key(keys: &SphinxKeys) -> Result<EncryptionKey> {
    let key = keys.public_keys().get(&keys.key_epoch()).copied();
    key.context("a node has no Sphinx key for the present")
}

/// Bound before the topology is signed, so that it can name the port.
async fn loopback_listener() -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .context("a node cannot listen on a loopback port")
}
