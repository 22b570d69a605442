//! `mixsocks node`: a mix or gateway of a network.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use mixsocks_common::directory::{Hop, Member, MemberKind, Pace};
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::topology::{Topology, UnixTime};
use mixsocks_directory::{Following, Publisher, unix_time};
use mixsocks_node::gateway::store::{Limits, StoreCounts, Usage};
use mixsocks_node::gateway::{Gateway, GatewayConfig};
use mixsocks_node::keys::SphinxKeys;
use mixsocks_node::link::Impairment;
use mixsocks_node::mix::{Mix, MixConfig};
use mixsocks_node::monitor::Monitor;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::cli::{Cli, Command, NodeArgs, NodeCommand, kind_word};
use crate::config;
use crate::data_dir::DataDir;
use crate::impairment;
use crate::membership::Membership;
use crate::open_files;
use crate::service::{self, Report, Service};
use crate::signals::{Signals, Wish};

const ROLE: &str = "node";
const KEY: &str = "identity.key";

/// Does what the command says.
pub(crate) async fn run(command: NodeCommand, config: &str, quiet: bool) -> Result<()> {
    match command {
        NodeCommand::Init(args) => init(&args, config),
        NodeCommand::Run(args) => serve(args, quiet).await,
    }
}

/// Writes the configuration file and the identity.
fn init(args: &NodeArgs, config: &str) -> Result<()> {
    let dir = DataDir::open_for(ROLE, args.run.data_dir.as_deref())?;
    let file = config::write(&dir, args.file.config.as_deref(), config)?;
    let identity = dir.identity_key(KEY)?.identity();
    let file = file.display();
    crate::say(&format!(
        "settings  {file}\n\
         identity  {identity}\n\
         \n\
         Look through the settings, and start it with: mixsocks node run --config {file}"
    ));
    Ok(())
}

/// Runs until Ctrl-C or SIGTERM.
async fn serve(args: NodeArgs, quiet: bool) -> Result<()> {
    open_files::raise_limit();
    let mut signals = Signals::new()?;
    let service = Service::start(ROLE, args.run.metrics).await?;
    let dir = Arc::new(DataDir::open_for(ROLE, args.run.data_dir.as_deref())?);
    dir.require_space()?;
    let identity = Arc::new(dir.identity_key(KEY)?);
    let listeners = Listeners::bind(&args).await?;
    let addresses = Arc::new(Mutex::new(Addresses::of(&args, &listeners)?));
    let words = addresses.lock().unwrap_or_else(PoisonError::into_inner).words(args.kind);
    let impairments = Impairments::read(&args)?;
    let line = format!("{}  {} {words}", kind_word(args.kind), identity.identity());
    service.watch(|| async { Report::sick("there is no document yet") });
    service.ready();
    crate::say(&match quiet {
        true => line,
        false => format!("{line}\nIt works once a document has it. Ctrl-C stops."),
    });
    let bound = listeners.bound()?;
    let reload = || {
        impairments.reread();
        match reread().and_then(|args| Addresses::moved(&args, &bound)) {
            Ok(newest) => {
                *addresses.lock().unwrap_or_else(PoisonError::into_inner) = newest;
                tracing::info!("the addresses were read again");
            }
            Err(error) => tracing::warn!("the settings are not read again: {error:#}"),
        }
    };
    let shared = Shared { addresses: addresses.clone(), impairment: impairments.subscribe() };
    let mut starting = Box::pin(start(&args, &dir, identity, listeners, shared));
    let mut node = loop {
        tokio::select! {
            started = &mut starting => break started?,
            wish = signals.wish() => match wish {
                Wish::Stop => return Ok(()),
                Wish::Reload => reload(),
            },
        }
    };
    service.watch(node.source());
    loop {
        tokio::select! {
            wish = signals.wish() => match wish {
                Wish::Stop => break,
                Wish::Reload => reload(),
            },
            () = node.ended() => bail!("a part of the node has failed; see the log"),
        }
    }
    service.stopping();
    tokio::select! {
        () = node.shutdown() => {}
        () = signals.next() => {}
    }
    Ok(())
}

/// The options as they would be if the node were started now.
fn reread() -> Result<NodeArgs> {
    match Cli::from_words(std::env::args_os()) {
        Ok(Cli { command: Command::Node(NodeCommand::Run(args)), .. }) => Ok(args),
        Ok(_) => bail!("they are those of another command"),
        Err(error) => Err(error.into()),
    }
}

/// Where it listens.
struct Listeners {
    links: TcpListener,
    clients: Option<TcpListener>,
}

impl Listeners {
    async fn bind(args: &NodeArgs) -> Result<Self> {
        let links = service::bind(args.listen, "--listen").await?;
        let clients = match args.kind {
            MemberKind::Gateway => {
                Some(service::bind(args.client_listen, "--client-listen").await?)
            }
            _ => None,
        };
        Ok(Self { links, clients })
    }

    fn bound(&self) -> Result<Bound> {
        let clients = self.clients.as_ref().map(TcpListener::local_addr).transpose()?;
        Ok(Bound { links: self.links.local_addr()?, clients })
    }
}

/// The addresses of [`Listeners`].
#[derive(Clone, Copy)]
struct Bound {
    links: SocketAddr,
    clients: Option<SocketAddr>,
}

/// Where others reach it.
#[derive(Clone, Copy)]
struct Addresses {
    links: SocketAddr,
    clients: Option<SocketAddr>,
}

impl Addresses {
    fn of(args: &NodeArgs, listeners: &Listeners) -> Result<Self> {
        Self::moved(args, &listeners.bound()?)
    }

    fn moved(args: &NodeArgs, bound: &Bound) -> Result<Self> {
        let links = reachable(args.address, bound.links, "--address")?;
        let clients = match bound.clients {
            Some(bound) => Some(reachable(args.client_address, bound, "--client-address")?),
            None => None,
        };
        Ok(Self { links, clients })
    }

    fn words(&self, kind: MemberKind) -> String {
        match (kind, self.clients) {
            (MemberKind::Gateway, Some(clients)) => {
                format!("{}, for clients {clients}", self.links)
            }
            _ => self.links.to_string(),
        }
    }
}

/// The address that was given, or else the one where it listens, if others can reach that.
fn reachable(given: Option<SocketAddr>, bound: SocketAddr, option: &str) -> Result<SocketAddr> {
    match given {
        Some(address) => Ok(address),
        None if bound.ip().is_unspecified() => bail!(
            "it listens on all addresses of this machine: say with {option} ADDR:{} which one others \
             reach",
            bound.port()
        ),
        None => Ok(bound),
    }
}

/// What happens to packets on their way to other nodes, if the network is under test.
struct Impairments(Option<(PathBuf, watch::Sender<Impairment>)>);

impl Impairments {
    fn read(args: &NodeArgs) -> Result<Self> {
        let Some(path) = args.impairment.clone() else { return Ok(Self(None)) };
        let impairments = Self(Some((path.clone(), watch::Sender::new(impairment::read(&path)?))));
        impairments.tell();
        Ok(impairments)
    }

    fn subscribe(&self) -> Option<watch::Receiver<Impairment>> {
        self.0.as_ref().map(|(_, impairment)| impairment.subscribe())
    }

    fn reread(&self) {
        let Some((path, impairment)) = &self.0 else { return };
        match impairment::read(path) {
            Ok(newest) => {
                impairment.send_replace(newest);
                self.tell();
            }
            Err(error) => tracing::warn!("what happens to packets stays as it was: {error:#}"),
        }
    }

    /// No network should be like that by mistake.
    fn tell(&self) {
        if let Some((_, impairment)) = &self.0 {
            tracing::warn!(
                "under test, packets fare as they are told to: {:?}",
                impairment.borrow()
            );
        }
    }
}

/// What may change while it runs.
struct Shared {
    addresses: Arc<Mutex<Addresses>>,
    impairment: Option<watch::Receiver<Impairment>>,
}

/// A running node with what keeps it up to date.
struct Running {
    part: Part,
    topology: watch::Receiver<Arc<Topology>>,
    following: Following,
    publisher: Publisher,
}

enum Part {
    Mix(Mix),
    Gateway(Gateway),
}

async fn start(
    args: &NodeArgs,
    dir: &Arc<DataDir>,
    identity: Arc<IdentityKey>,
    listeners: Listeners,
    Shared { addresses, impairment }: Shared,
) -> Result<Running> {
    let membership = Membership::learn(&args.member, dir, Pace::Node).await?;
    let epochs = membership.rules().parameters.epochs;
    let folder = dir.path().to_owned();
    let keys = Arc::new(SphinxKeys::open(&folder, epochs, unix_time())?);
    let told = keys.clone();
    let publisher =
        membership.publish(identity.clone(), move |now| describe(&told, &addresses, now));
    let (topology, following) = membership.documents().await?;
    let limits = args.store.limits();
    let part =
        Part::start(identity, keys, topology.clone(), listeners, folder, limits, impairment)?;
    Ok(Running { part, topology, following, publisher })
}

/// What the node says of itself.
fn describe(keys: &SphinxKeys, addresses: &Mutex<Addresses>, now: UnixTime) -> Member {
    if let Err(error) = keys.advance(now) {
        tracing::debug!("the keys of the next epochs cannot be made: {error}");
    }
    let Addresses { links, clients } = *addresses.lock().unwrap_or_else(PoisonError::into_inner);
    let hop = Hop { link_address: links, keys: keys.public_keys() };
    match clients {
        Some(client_address) => Member::Gateway { hop, client_address },
        None => Member::Mix(hop),
    }
}

impl Part {
    fn start(
        identity: Arc<IdentityKey>,
        keys: Arc<SphinxKeys>,
        topology: watch::Receiver<Arc<Topology>>,
        listeners: Listeners,
        data_dir: PathBuf,
        limits: Limits,
        impairment: Option<watch::Receiver<Impairment>>,
    ) -> Result<Self> {
        let Listeners { links, clients } = listeners;
        match clients {
            Some(client_listener) => {
                let link_listener = links;
                let config = GatewayConfig {
                    identity,
                    keys,
                    topology,
                    link_listener,
                    client_listener,
                    data_dir,
                    limits,
                };
                let gateway = match impairment {
                    Some(impairment) => Gateway::start_impaired(config, impairment),
                    None => Gateway::start(config),
                };
                let gateway = gateway.context("the gateway does not start")?;
                Ok(Self::Gateway(gateway))
            }
            None => {
                let config = MixConfig { identity, keys, topology, listener: links, data_dir };
                let mix = match impairment {
                    Some(impairment) => Mix::start_impaired(config, impairment),
                    None => Mix::start(config),
                };
                Ok(Self::Mix(mix.context("the mix does not start")?))
            }
        }
    }

    async fn ended(&mut self) {
        match self {
            Self::Mix(mix) => mix.ended().await,
            Self::Gateway(gateway) => gateway.ended().await,
        }
    }

    fn monitor(&self) -> Monitor {
        match self {
            Self::Mix(mix) => mix.monitor(),
            Self::Gateway(gateway) => gateway.monitor(),
        }
    }
}

impl Running {
    /// What the node has to tell.
    fn source(&self) -> impl service::Source + use<> {
        let (monitor, topology) = (self.part.monitor(), self.topology.clone());
        move || {
            let report = report(&monitor, &topology.borrow());
            async move { report }
        }
    }

    /// Waits until a part of it has ended by itself, which is a mistake in this program.
    async fn ended(&mut self) {
        tokio::select! {
            () = self.following.ended() => {}
            () = self.publisher.ended() => {}
            () = self.part.ended() => {}
        }
    }

    async fn shutdown(self) {
        match self.part {
            Part::Mix(mix) => mix.drain().await,
            Part::Gateway(gateway) => gateway.shutdown().await,
        }
    }
}

fn report(monitor: &Monitor, topology: &Topology) -> Report {
    let mut report = Report::of_document(topology);
    let help = "Key epoch of the present Sphinx key.";
    report.gauge("key_epoch", help, monitor.key_epoch());
    let help = "Packets remembered, so that none is processed twice.";
    report.gauge("replay_tags", help, monitor.replay_tags() as u64);
    let counts = monitor.counters().snapshot();
    report.counter("packets_in", "Packets from other nodes.", counts.packets_in);
    report.counter("packets_out", "Packets to other nodes.", counts.packets_out);
    let help = "Packets dropped, by reason.";
    report.counters("packets_dropped", help, "reason", counts.drops());
    if let Some((counts, usage)) = monitor.store() {
        report_store(&mut report, &counts, usage);
    }
    report
}

/// What a gateway keeps for all clients together.
fn report_store(report: &mut Report, counts: &StoreCounts, usage: Usage) {
    let help = "Packets of messages that are kept for clients.";
    report.gauge("store_packets", help, usage.boxes);
    report.gauge("store_bytes", "Bytes of these.", usage.bytes);
    report.counter("store_kept", "Packets of messages that were stored.", counts.kept);
    let help = "Confirmations by clients.";
    report.counter("store_confirmed", help, counts.confirmed);
    let help = "Packets of messages that were given up unconfirmed.";
    report.counter("store_expired", help, counts.expired);
    let help = "Packets of messages that were not stored, by reason.";
    report.counters("store_refused", help, "reason", counts.refusals());
    report.counter("store_commits", "Batches written to the disk.", counts.commits);
}
