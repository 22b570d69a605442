//! `mixsocks providers` and `mixsocks network status`: a topology as people read it.

use std::time::Duration;

use anyhow::Result;
use mixsocks_common::topology::{
    Epochs, LAYERS, Node, Provider, Role, SignedTopology, Topology, UnixTime,
};

use crate::cli::ShowArgs;
use crate::{membership, topology_file};

/// Lists the providers.
pub(crate) async fn providers(args: &ShowArgs) -> Result<()> {
    let topology = membership::look(&args.network).await?.into_topology();
    if topology.providers().is_empty() {
        crate::say("this network advertises no provider");
        return Ok(());
    }
    let rows = topology
        .providers()
        .iter()
        .map(|provider| [provider.name.clone(), policy(provider), provider.address.to_string()]);
    crate::say(&table(["PROVIDER", "POLICY", "ADDRESS"], rows.collect()));
    Ok(())
}

/// Shows the network.
pub(crate) async fn status(args: &ShowArgs) -> Result<()> {
    let signed = membership::look(&args.network).await?;
    crate::say(&describe(&signed, topology_file::now()));
    Ok(())
}

fn describe(signed: &SignedTopology, now: UnixTime) -> String {
    let topology = signed.topology();
    let left = Duration::from_secs(topology.valid_until.0.saturating_sub(now.0));
    let parameters = &topology.parameters;
    let head = format!(
        "network   {}, epoch {}\n\
         in force  for another {}{}\n\
         packets   {} bytes of payload, held {} by each mix on average, {} at most\n",
        topology.network.as_str(),
        topology.epoch,
        humantime::format_duration(left),
        late(topology, now),
        parameters.payload_bytes,
        humantime::format_duration(parameters.mean_delay),
        humantime::format_duration(parameters.max_delay),
    );
    let mut nodes = Vec::new();
    for layer in (1..).take(LAYERS) {
        nodes.extend(topology.mixes(layer).map(|node| row(node, format!("mix {layer}"))));
    }
    nodes.extend(topology.gateways().map(|node| row(node, "gateway".to_owned())));
    let providers = topology.providers().iter().map(|provider| {
        let gateway = provider.address.gateway.to_string();
        [provider.name.clone(), policy(provider), gateway]
    });
    nodes.extend(topology.waiting().iter().map(|identity| {
        ["mix".to_owned(), identity.to_string(), "gets its layer in the next epoch".to_owned()]
    }));
    let signers = signed.signers().iter().map(|signer| format!("signed    {signer}\n"));
    let head = head + &signers.collect::<String>();
    format!(
        "{head}\n{}\n\n{}",
        table(["NODE", "IDENTITY", "ADDRESS"], nodes),
        table(["PROVIDER", "POLICY", "GATEWAY"], providers.collect())
    )
}

/// What is to be said of a document whose successor is missing.
fn late(topology: &Topology, now: UnixTime) -> String {
    let epoch = topology.parameters.epochs.at(now);
    match epoch.saturating_sub(topology.epoch) {
        // Networks without a directory merely count documents.
        _ if topology.parameters.epochs == Epochs::STATIC => String::new(),
        0 => String::new(),
        missing => format!(
            "; it is epoch {epoch}, but the last {missing} had no document, or it has not come yet"
        ),
    }
}

fn policy(provider: &Provider) -> String {
    let policy = &provider.policy;
    if provider.requires_token { format!("{policy}; asks for a token") } else { policy.clone() }
}

fn row(node: &Node, what: String) -> [String; 3] {
    let address = match node.role {
        Role::Mix { .. } => node.link_address.to_string(),
        Role::Gateway { client_address } => {
            format!("{}, for clients {client_address}", node.link_address)
        }
    };
    [what, node.identity.to_string(), address]
}

/// Columns as wide as their widest entry, but for the last.
fn table(head: [&str; 3], rows: Vec<[String; 3]>) -> String {
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let (first, second) = (width(0).unwrap_or(0), width(1).unwrap_or(0));
    let lines: Vec<_> =
        rows.iter().map(|[a, b, c]| format!("{a:first$}  {b:second$}  {c}")).collect();
    lines.join("\n")
}
