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
    let parameters = &topology.parameters;
    let head = format!(
        "network   {}, epoch {}\n\
         in force  {}\n\
         packets   {} bytes of payload, held {} by each mix on average, {} at most\n",
        topology.network.as_str(),
        topology.epoch,
        in_force(topology, now),
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

/// Until when a document is in force, and what is to be said if its successor is missing.
fn in_force(topology: &Topology, now: UnixTime) -> String {
    let seconds = |seconds| humantime::format_duration(Duration::from_secs(seconds));
    let left = match topology.valid_until.0.checked_sub(now.0) {
        None | Some(0) => format!(
            "no more: it has ended {} ago, and nothing is sent until there is a new one",
            seconds(now.0 - topology.valid_until.0)
        ),
        Some(left) => format!("for another {}", seconds(left)),
    };
    let epochs = &topology.parameters.epochs;
    let missing = epochs.at(now).saturating_sub(topology.epoch);
    // Networks without a directory merely count documents.
    if *epochs == Epochs::STATIC || missing == 0 {
        return left;
    }
    let epoch = epochs.at(now);
    format!("{left}; it is epoch {epoch}, but the last {missing} had no document")
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
