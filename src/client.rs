//! `mixsocks client`: a proxy to a network of many machines.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use mixsocks_client::Client;
use mixsocks_client::gateway::{GatewayState, LinkState};
use mixsocks_common::address::Address;
use mixsocks_common::keys::Identity;
use mixsocks_common::topology::Topology;
use mixsocks_directory::Following;
use rand::seq::{IteratorRandom, SliceRandom};
use tokio::sync::watch;

use crate::access_tokens;
use crate::cli::{ClientArgs, NetworkArgs, ProviderChoice};
use crate::config;
use crate::data_dir::DataDir;
use crate::membership::{self, Source};
use crate::nearest::nearest;
use crate::proxy::{self, Way};
use crate::service::{Report, Service};
use crate::signals::Signals;
use crate::topology_file;
use crate::up::weakness;

/// Of providers that chance has chosen, the one that is used, and one for when it is silent.
const PROVIDERS_BY_CHANCE: usize = 2;

/// Where the gateway that was chosen is remembered.
const GATEWAY_FILE: &str = "client/gateway";

/// Runs until Ctrl-C or SIGTERM.
pub(crate) async fn run(args: ClientArgs, quiet: bool) -> Result<()> {
    let mut signals = Signals::new()?;
    let service = Service::start("client", args.run.metrics).await?;
    let ports = proxy::bind(&args.listen, &args.websocket).await?;
    let Started { client, providers, topology, _following, _dir } = tokio::select! {
        started = Box::pin(start(&args)) => started?,
        () = signals.next() => return Ok(()),
    };
    let (address, lines) = (ports.proxy()?, ports.lines()?);
    if quiet {
        crate::say(&lines);
    } else {
        let client = client.address();
        let weakness = weakness(args.timing.profile);
        let providers: Vec<_> =
            providers.iter().map(|provider| format!("provider  {provider}\n")).collect();
        let providers = providers.concat();
        crate::say(&format!(
            "{providers}\
             client    {client}\n\
             {lines}\n\
             \n\
             {weakness}\n\
             \n\
             Try it:   curl --socks5-hostname {address} https://example.com\n\
             Ctrl-C stops."
        ));
    }
    service.watch(source(client.link(), topology));
    service.ready();
    proxy::serve(ports, client, &mut signals, std::future::ready(())).await;
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
    providers: Vec<Address>,
    topology: watch::Receiver<Arc<Topology>>,
    _following: Option<Following>,
    /// Locked as long as the client uses it.
    _dir: Arc<DataDir>,
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
    let choose =
        |topology: &Topology| choose_providers(topology, &args.provider, access_token.is_some());
    let (network, mut providers) =
        join(&args.network, args.run.data_dir.as_deref(), choose).await?;
    let Joined { dir, topology, following } = network;
    let newest = topology.borrow().clone();
    let gateway = gateway(&dir, &newest, &mut providers, args.provider.is_empty())?;
    if args.provider.is_empty() {
        // Each provider that a client turns to learns where it goes.
        providers.truncate(PROVIDERS_BY_CHANCE);
    }
    let way =
        Way { topology: topology.clone(), gateway, providers: providers.clone(), access_token };
    let messages = args.websocket.websocket.is_some();
    let client = proxy::connect(&dir, way, messages).await?;
    Ok(Started { client, providers, topology, _following: following, _dir: dir })
}

/// A network as a client sees it, and the directory with what the client keeps.
pub(crate) struct Joined {
    pub(crate) dir: Arc<DataDir>,
    pub(crate) topology: watch::Receiver<Arc<Topology>>,
    /// Keeps the topology up to date.
    pub(crate) following: Option<Following>,
}

/// Learns a network's topology, of which `choose` takes what it wants.
pub(crate) async fn join<T>(
    network: &NetworkArgs,
    data_dir: Option<&Path>,
    choose: impl Fn(&Topology) -> Result<T>,
) -> Result<(Joined, T)> {
    let (source, authorities) = membership::source(network)?;
    match source {
        Source::File(path) => {
            let file = topology_file::read(path, &authorities)?;
            // What the user has chosen wrongly is told before anything is stored.
            let chosen = choose(&file.topology)?;
            let dir = open(data_dir)?;
            topology_file::accept(&dir, path, &file, &authorities)?;
            let topology = watch::channel(Arc::new(file.topology)).1;
            Ok((Joined { dir, topology, following: None }, chosen))
        }
        Source::Directory(urls) => {
            let dir = open(data_dir)?;
            let (topology, following) = membership::documents(&dir, urls, &authorities).await?;
            let newest = topology.borrow().clone();
            let chosen = choose(&newest)?;
            Ok((Joined { dir, topology, following: Some(following) }, chosen))
        }
    }
}

fn open(data_dir: Option<&Path>) -> Result<Arc<DataDir>> {
    let dir = Arc::new(DataDir::open_for("client", data_dir)?);
    dir.require_space()?;
    Ok(dir)
}

/// The choices that the network has, in the user's order; without a choice, all providers that it
/// advertises, in an order of chance, but those that demand a token when there is none.
fn choose_providers(
    topology: &Topology,
    choices: &[ProviderChoice],
    has_token: bool,
) -> Result<Vec<Address>> {
    let mut chosen = Vec::new();
    let mut errors = Vec::new();
    let mut consider = |provider: Result<Address>| {
        let provider = provider.and_then(|provider| {
            require_token(topology, &provider, has_token)?;
            Ok(provider)
        });
        match provider {
            Ok(provider) => chosen.push(provider),
            Err(error) => errors.push(error),
        }
    };
    choices.iter().for_each(|choice| consider(provider(topology, choice)));
    if choices.is_empty() {
        topology.providers().iter().for_each(|advert| consider(Ok(advert.address)));
        // Nobody gets all users because it stands first.
        chosen.shuffle(&mut rand::rng());
    }
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    // What is wrong with the first choice is told if none of the others is there either.
    Err(errors.into_iter().next().unwrap_or_else(|| {
        anyhow!("this network advertises no provider; give the address of one with --provider")
    }))
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

/// The gateway that was chosen earlier, or else a random one, at which none of the providers is if there is
/// such a one, and never the first, which could then see both ends; providers at it are left out. Providers
/// without an order give way to the gateway that was chosen earlier.
fn gateway(
    dir: &DataDir,
    topology: &Topology,
    providers: &mut Vec<Address>,
    by_chance: bool,
) -> Result<Identity> {
    let chosen = match chosen_gateway(dir, topology, providers, by_chance)? {
        Some(chosen) => chosen,
        None => {
            let wanted = if by_chance { PROVIDERS_BY_CHANCE } else { providers.len() };
            let preferred: Vec<_> =
                providers.iter().take(wanted).map(|provider| provider.gateway).collect();
            let gateways: Vec<_> = topology.gateways().map(|node| node.identity).collect();
            let chosen = apart_from(&gateways, &preferred).context(
                "this network has no gateway but the provider's own, which would see both ends; \
                 choose a provider at another gateway with --provider",
            )?;
            dir.write(GATEWAY_FILE, format!("{chosen}\n").as_bytes())?;
            chosen
        }
    };
    let before = providers.len();
    providers.retain(|provider| provider.gateway != chosen);
    if providers.len() < before && !by_chance {
        tracing::warn!(
            "a provider is left out: its gateway is the client's as well, and would see both ends"
        );
    }
    Ok(chosen)
}

/// A random one of the `gateways` that is none of the `providers'`; if there is none, the last of these do not
/// count, but the first always does.
fn apart_from(gateways: &[Identity], providers: &[Identity]) -> Option<Identity> {
    (1..=providers.len()).rev().find_map(|count| {
        let free = gateways.iter().filter(|gateway| !providers[..count].contains(gateway));
        free.choose(&mut rand::rng()).copied()
    })
}

/// The gateway of a client that sends and receives messages only: the one that was chosen earlier, or else
/// a random one. If there is a choice, no provider is at it, so that the client may open streams later.
pub(crate) fn gateway_of_messages(dir: &DataDir, topology: &Topology) -> Result<Identity> {
    if let Some(chosen) = read_gateway(dir)?.filter(|chosen| topology.gateway(chosen).is_some()) {
        return Ok(chosen);
    }
    let has_provider = |gateway: &Identity| {
        topology.providers().iter().any(|provider| provider.address.gateway == *gateway)
    };
    let all = || topology.gateways().map(|node| node.identity);
    let mut rng = rand::rng();
    let free = all().filter(|gateway| !has_provider(gateway)).choose(&mut rng);
    let chosen = free.or_else(|| all().choose(&mut rng)).context("this network has no gateway")?;
    dir.write(GATEWAY_FILE, format!("{chosen}\n").as_bytes())?;
    Ok(chosen)
}

/// The gateway that was chosen earlier.
pub(crate) fn read_gateway(dir: &DataDir) -> Result<Option<Identity>> {
    let Some(text) = dir.read_text(GATEWAY_FILE)? else { return Ok(None) };
    let chosen = text.trim().parse().with_context(|| {
        let path = dir.path().join(GATEWAY_FILE);
        format!("the file {} is damaged; delete it to choose a new gateway", path.display())
    })?;
    Ok(Some(chosen))
}

/// The gateway that was chosen earlier, if it can still be used.
fn chosen_gateway(
    dir: &DataDir,
    topology: &Topology,
    providers: &[Address],
    by_chance: bool,
) -> Result<Option<Identity>> {
    let Some(chosen) = read_gateway(dir)? else { return Ok(None) };
    let is_elsewhere = |provider: &Address| provider.gateway != chosen;
    let fits = match by_chance {
        true => providers.iter().any(is_elsewhere),
        false => providers.first().is_some_and(is_elsewhere),
    };
    if fits && topology.gateway(&chosen).is_some() {
        return Ok(Some(chosen));
    }
    tracing::warn!("the gateway used before cannot be used any more; choosing a new one");
    Ok(None)
}

#[cfg(test)]
mod tests {
    use mixsocks_common::keys::IdentityKey;

    use super::*;

    #[test]
    fn the_gateway_leaves_as_many_of_the_first_providers_as_possible() {
        let gateways = [1, 2, 3].map(|seed| IdentityKey::from_bytes(&[seed; 32]).identity());
        let [a, b, c] = gateways;
        for (providers, allowed) in [
            (&[a, b][..], &[c][..]),
            (&[a, a], &[b, c]),
            (&[c], &[a, b]),
            (&[a, b, c], &[c]),
            (&[b, c, a, b], &[a]),
        ] {
            let chosen: Vec<_> = std::iter::repeat_with(|| apart_from(&gateways, providers))
                .take(200)
                .collect::<Option<_>>()
                .unwrap();
            assert!(chosen.iter().all(|gateway| allowed.contains(gateway)), "{providers:?}");
            assert!(allowed.iter().all(|gateway| chosen.contains(gateway)), "{providers:?}");
        }
        assert_eq!(apart_from(&[a], &[a, a]), None);
        assert_eq!(apart_from(&[], &[a]), None);
    }
}
