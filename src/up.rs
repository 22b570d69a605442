//! `mixsocks up`: a whole network on this machine, and a proxy to it.

use std::path::Path;

use anyhow::Result;
use mixsocks_client::Client;

use crate::cli::{Profile, UpArgs};
use crate::data_dir::DataDir;
use crate::network::{Network, NetworkOptions};
use crate::open_files;
use crate::proxy::{self, Ports, Way};
use crate::signals::Signals;

/// Runs until Ctrl-C or SIGTERM.
pub(crate) async fn run(args: UpArgs, quiet: bool) -> Result<()> {
    open_files::raise_limit();
    let mut signals = Signals::new()?;
    let ports = proxy::bind(&args.listen, &args.websocket).await?;
    let dir = DataDir::open_for("up", args.data_dir.as_deref())?;
    dir.require_space()?;
    let (network, client) = tokio::select! {
        started = Box::pin(start(&dir, &args)) => started?,
        () = signals.next() => return Ok(()),
    };
    if quiet {
        crate::say(&ports.lines()?);
    } else {
        let profile = args.traffic.timing.profile;
        crate::say(&greeting(&network, &client, dir.path(), &ports, profile)?);
    }
    proxy::serve(ports, client, &mut signals, network.shutdown()).await;
    Ok(())
}

async fn start(dir: &DataDir, args: &UpArgs) -> Result<(Network, Client)> {
    let options = NetworkOptions {
        mean_delay: args.traffic.mean_delay,
        payload_bytes: args.traffic.payload_bytes,
        allow_private: args.exit.allow_private,
        dns: args.exit.dns,
    };
    let network = Network::start(dir, options).await?;
    let way = Way {
        topology: network.topology().clone(),
        gateway: network.client_gateway(),
        providers: vec![network.provider_address()],
        access_token: None,
    };
    let client = proxy::connect(dir, way, args.websocket.websocket.is_some()).await?;
    Ok((network, client))
}

fn greeting(
    network: &Network,
    client: &Client,
    data_dir: &Path,
    ports: &Ports,
    profile: Profile,
) -> Result<String> {
    let mean_delay = humantime::format_duration(network.topology().borrow().parameters.mean_delay);
    let provider = network.provider_address();
    let client = client.address();
    let data_dir = data_dir.display();
    let (address, lines) = (ports.proxy()?, ports.lines()?);
    Ok(format!(
        "A mixnet runs on this machine: 3 mixes, 2 gateways, a provider and a client.\n\
         \n\
         provider  {provider}\n\
         client    {client}\n\
         data      {data_dir}\n\
         mixing    {mean_delay} in each mix on average, profile {profile}\n\
         {lines}\n\
         \n\
         {}\n\
         All nodes are on this machine, so this shows how it works, but hides you from nobody.\n\
         \n\
         Try it:   curl --socks5-hostname {address} https://example.com\n\
         Ctrl-C stops.",
        if network.topology().borrow().parameters.mean_delay.is_zero() {
            "Mixes hold nothing: neither order nor timing is hidden."
        } else {
            weakness(profile)
        }
    ))
}

/// What a profile does not hide.
pub(crate) fn weakness(profile: Profile) -> &'static str {
    match profile {
        Profile::Fast => {
            "Profile fast only mixes: who watches both ends can match when, and how much, you send."
        }
    }
}
