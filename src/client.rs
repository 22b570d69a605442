//! `mixsocks client`: a proxy to a network of many machines.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use mixsocks_client::Client;
use mixsocks_client::gateway::{GatewayState, LinkState};
use mixsocks_common::address::Address;
use mixsocks_common::keys::Identity;
use mixsocks_common::topology::{self, Topology};
use mixsocks_directory::Following;
use rand::seq::IteratorRandom;
use tokio::sync::watch;

use crate::access_tokens;
use crate::cli::{ClientArgs, ProviderChoice};
use crate::config;
use crate::data_dir::DataDir;
use crate::membership::{self, Source};
use crate::nearest::nearest;
use crate::proxy::{self, Way};
use crate::service::{Report, Service};
use crate::signals::Signals;
use crate::topology_file;
use crate::up::{proxy_line, weakness};

/// Where the gateway that was chosen is remembered.
const GATEWAY_FILE: &str = "client/gateway";

/// Runs until Ctrl-C or SIGTERM.
pub(crate) async fn run(args: ClientArgs, quiet: bool) -> Result<()> {
    let mut signals = Signals::new()?;
    let service = Service::start("client", args.run.metrics).await?;
    let listener = proxy::bind(&args.listen)?;
    let address = listener.local_addr()?;
    let Started { client, provider, topology, _following } = tokio::select! {
        started = Box::pin(start(&args)) => started?,
        () = signals.next() => return Ok(()),
    };
    let proxy = proxy_line(address);
    if quiet {
        crate::say(&proxy);
    } else {
        let client = client.address();
        let weakness = weakness(args.timing.profile);
        crate::say(&format!(
            "provider  {provider}\n\
             client    {client}\n\
             {proxy}\n\
             \n\
             {weakness}\n\
             \n\
             Try it:   curl --socks5-hostname {address} https://example.com\n\
             Ctrl-C stops."
        ));
    }
    service.watch(source(client.link(), topology));
    service.ready();
    proxy::serve(listener, client, &mut signals, std::future::ready(())).await;
    service.stopping();
    Ok(())
}

/// What the client has to tell.
fn source(
    link: GatewayState,
    topology: watch::Receiver<Arc<Topology>>,
) -> impl crate::service::Source {
    move || {
        let mut report = Report::of_document(&topology.borrow());
        if !matches!(*link.borrow(), LinkState::Connected) {
            report.complain("there is no link to the gateway");
        }
        async move { report }
    }
}

/// A client that runs, and what keeps its topology up to date.
struct Started {
    client: Client,
    provider: Address,
    topology: watch::Receiver<Arc<Topology>>,
    _following: Option<Following>,
}

/// Writes the configuration file and the keys.
pub(crate) fn init(args: &ClientArgs, config: &str) -> Result<()> {
    let dir = DataDir::open_for("client", args.run.data_dir.as_deref())?;
    let file = config::write(&dir, args.file.config.as_deref(), config)?;
    proxy::keys(&dir)?;
    let file = file.display();
    crate::say(&format!(
        "settings  {file}\n\
         keys      {}\n\
         \n\
         Look through the settings, and start it with: mixsocks client run --config {file}",
        dir.path().join(proxy::FOLDER).display()
    ));
    Ok(())
}

async fn start(args: &ClientArgs) -> Result<Started> {
    let access_token =
        args.access_token_file.as_deref().map(access_tokens::read_secret).transpose()?;
    let choose = |topology: &Topology| {
        let provider = choose_provider(topology, &args.provider)?;
        require_token(topology, &provider, access_token.is_some())?;
        anyhow::Ok(provider)
    };
    let (source, authorities) = membership::source(&args.network)?;
    let (dir, topology, following) = match source {
        Source::File(path) => {
            let file = topology_file::read(path, &authorities)?;
            // What the user has chosen wrongly is told before anything is stored.
            choose(&file.topology)?;
            let dir = open(args)?;
            topology_file::accept(&dir, path, &file, &authorities)?;
            (dir, watch::channel(Arc::new(file.topology)).1, None)
        }
        Source::Directory(urls) => {
            let dir = open(args)?;
            let (topology, following) = membership::documents(&dir, urls, &authorities).await?;
            (dir, topology, Some(following))
        }
    };
    let newest = topology.borrow().clone();
    let provider = choose(&newest)?;
    let gateway = gateway(&dir, &newest, &provider.gateway)?;
    let way = Way { topology: topology.clone(), gateway, provider, access_token };
    let client = proxy::connect(&dir, way).await?;
    Ok(Started { client, provider, topology, _following: following })
}

fn open(args: &ClientArgs) -> Result<Arc<DataDir>> {
    let dir = Arc::new(DataDir::open_for("client", args.run.data_dir.as_deref())?);
    dir.require_space()?;
    Ok(dir)
}

/// The first of the choices that the network has; without a choice, the only one that it advertises.
fn choose_provider(topology: &Topology, choices: &[ProviderChoice]) -> Result<Address> {
    let Some((first, others)) = choices.split_first() else {
        return match topology.providers() {
            [topology::Provider { address, .. }] => Ok(*address),
            [] => bail!(
                "this network advertises no provider; give the address of one with --provider"
            ),
            several => {
                let names: Vec<_> = several.iter().map(|provider| &*provider.name).collect();
                bail!(
                    "this network has several providers; choose one with --provider: {}",
                    names.join(", ")
                )
            }
        };
    };
    let found = provider(topology, first).or_else(|error| {
        // What is wrong with the first choice is told if none of the others is there either.
        others.iter().find_map(|choice| provider(topology, choice).ok()).ok_or(error)
    })?;
    Ok(found)
}

/// Refuses a provider that is known to demand a token when there is none.
fn require_token(topology: &Topology, provider: &Address, has_token: bool) -> Result<()> {
    match topology.provider_at(provider) {
        Some(advert) if advert.requires_token && !has_token => bail!(
            "the provider {:?} serves only who has an access token: give the file that holds yours \
             with --access-token-file, or choose another provider with --provider",
            advert.name
        ),
        _ => Ok(()),
    }
}

/// The provider of one choice.
fn provider(topology: &Topology, choice: &ProviderChoice) -> Result<Address> {
    match choice {
        ProviderChoice::Address(address) => {
            if topology.gateway(&address.gateway).is_none() {
                bail!(
                    "the provider's gateway {} is not in this topology: the address belongs to \
                     another network, or the gateway has left",
                    address.gateway
                );
            }
            Ok(*address)
        }
        ProviderChoice::Name(name) => match topology.provider(name) {
            Some(provider) => Ok(provider.address),
            None if topology.providers().is_empty() => bail!(
                "there is no provider {name:?}: this network advertises none; give the address of \
                 one with --provider"
            ),
            None => {
                let names: Vec<_> = topology.providers().iter().map(|p| &*p.name).collect();
                let near = nearest(name, names.iter().copied());
                let meant = near.map_or(String::new(), |near| format!("; did you mean {near:?}?"));
                bail!(
                    "there is no provider {name:?}{meant} (this network has: {})",
                    names.join(", ")
                )
            }
        },
    }
}

/// The gateway that was chosen earlier, or else a random one; never the provider's, which could
/// then see both ends.
fn gateway(dir: &DataDir, topology: &Topology, providers: &Identity) -> Result<Identity> {
    if let Some(text) = dir.read_text(GATEWAY_FILE)? {
        let chosen: Identity = text.trim().parse().with_context(|| {
            let path = dir.path().join(GATEWAY_FILE);
            format!("the file {} is damaged; delete it to choose a new gateway", path.display())
        })?;
        if chosen != *providers && topology.gateway(&chosen).is_some() {
            return Ok(chosen);
        }
        tracing::warn!("the gateway used before cannot be used any more; choosing a new one");
    }
    let others = topology.gateways().map(|node| node.identity).filter(|id| id != providers);
    let Some(chosen) = others.choose(&mut rand::rng()) else {
        bail!(
            "this network has no gateway but the provider's own, which would see both ends; choose \
             a provider at another gateway with --provider"
        );
    };
    dir.write(GATEWAY_FILE, format!("{chosen}\n").as_bytes())?;
    Ok(chosen)
}
