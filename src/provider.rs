//! `mixsocks provider`: connects to the internet for others.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use mixsocks_common::address::Address;
use mixsocks_common::directory::{Member, MemberKind, Pace};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::AccessTokens;
use mixsocks_common::topology;
use mixsocks_directory::{Following, Publisher};
use mixsocks_provider::{Provider, ProviderConfig};
use mixsocks_sphinx::SecretKey;
use rand::seq::IteratorRandom;
use tokio::time::sleep;

use crate::access_tokens;
use crate::cli::{ProviderArgs, ProviderCommand, TokenArgs};
use crate::config;
use crate::data_dir::DataDir;
use crate::membership::{FIRST_WAIT, Membership};
use crate::network::policy;
use crate::open_files;
use crate::service::{Report, Service};
use crate::signals::{Signals, Wish};

const ROLE: &str = "provider";
const KEY: &str = "identity.key";
const ENCRYPTION_KEY: &str = "encryption.key";
/// Where the gateway that was chosen is remembered.
const GATEWAY_FILE: &str = "gateway";

/// Attempts to find a gateway, a second apart, before the operator is told that there is none.
const PATIENCE: u32 = 10;

/// Does what the command says.
pub(crate) async fn run(command: ProviderCommand, config: &str, quiet: bool) -> Result<()> {
    match command {
        ProviderCommand::Init(args) => init(&args, config),
        ProviderCommand::Run(args) => serve(args, quiet).await,
        ProviderCommand::Token(args) => make_token(&args),
    }
}

/// Writes the configuration file and the keys.
fn init(args: &ProviderArgs, config: &str) -> Result<()> {
    let dir = DataDir::open_for(ROLE, args.run.data_dir.as_deref())?;
    let file = config::write(&dir, args.file.config.as_deref(), config)?;
    let identity = dir.identity_key(KEY)?.identity();
    dir.sphinx_key(ENCRYPTION_KEY)?;
    let file = file.display();
    crate::say(&format!(
        "settings  {file}\n\
         identity  {identity}\n\
         \n\
         Look through the settings, and start it with: mixsocks provider run --config {file}"
    ));
    Ok(())
}

/// Makes an access token, also while the provider runs.
fn make_token(args: &TokenArgs) -> Result<()> {
    let path = match &args.data_dir {
        Some(path) => path.clone(),
        None => DataDir::default_path(ROLE)?,
    };
    let key = DataDir::read_encryption_key(&path.join(ENCRYPTION_KEY))
        .context("there is no provider; make one with `mixsocks provider init`")?;
    crate::say(&access_tokens::to_text(&access_tokens::make(&path, &args.name, &key)?));
    Ok(())
}

/// Runs until Ctrl-C or SIGTERM.
async fn serve(args: ProviderArgs, quiet: bool) -> Result<()> {
    open_files::raise_limit();
    let mut signals = Signals::new()?;
    let service = Service::start(ROLE, args.run.metrics).await?;
    let dir = Arc::new(DataDir::open_for(ROLE, args.run.data_dir.as_deref())?);
    dir.require_space()?;
    service.watch(|| async { Report::sick("there is no document yet") });
    service.ready();
    let mut starting = Box::pin(start(&args, &dir, quiet));
    let mut is_reload_wanted = false;
    let mut running = loop {
        tokio::select! {
            started = &mut starting => break started?,
            wish = signals.wish() => match wish {
                Wish::Stop => return Ok(()),
                Wish::Reload => is_reload_wanted = true,
            },
        }
    };
    service.watch(running.source());
    if is_reload_wanted {
        reload(&running.provider, &args, &dir);
    }
    loop {
        tokio::select! {
            wish = signals.wish() => match wish {
                Wish::Stop => break,
                Wish::Reload => reload(&running.provider, &args, &dir),
            },
            () = running.following.ended() => bail!("following the documents has failed"),
            () = running.publisher.ended() => bail!("publishing has failed"),
        }
    }
    service.stopping();
    tokio::select! {
        () = running.provider.drain() => {}
        () = signals.next() => {}
    }
    Ok(())
}

/// Whom the provider serves: who has one of these, or everybody. The operator is told if that is hardly
/// what was meant.
fn demanded_tokens(args: &ProviderArgs, dir: &DataDir) -> Result<Option<AccessTokens>> {
    let tokens = access_tokens::all(dir.path())?;
    match (args.require_token, tokens.is_empty()) {
        (true, true) => tracing::warn!(
            "nobody is served: there is no access token; `mixsocks provider token` makes one"
        ),
        (false, false) => tracing::warn!(
            "everybody is served: access tokens are demanded only with --require-token"
        ),
        _ => {}
    }
    Ok(args.require_token.then_some(tokens))
}

/// Reads the access tokens again.
fn reload(provider: &Provider, args: &ProviderArgs, dir: &DataDir) {
    match demanded_tokens(args, dir) {
        Ok(tokens) => {
            provider.set_access_tokens(tokens);
            tracing::info!("the access tokens were read again");
        }
        Err(error) => tracing::warn!("the access tokens are not read again: {error:#}"),
    }
}

/// A running provider with what keeps it up to date.
struct Running {
    provider: Provider,
    topology: tokio::sync::watch::Receiver<Arc<topology::Topology>>,
    following: Following,
    publisher: Publisher,
}

async fn start(args: &ProviderArgs, dir: &Arc<DataDir>, quiet: bool) -> Result<Running> {
    let identity = Arc::new(dir.identity_key(KEY)?);
    let encryption = dir.sphinx_key(ENCRYPTION_KEY)?;
    let access_tokens = demanded_tokens(args, dir)?;
    let membership = Membership::learn(&args.member, dir, Pace::Client).await?;
    let gateway = gateway(args, dir, &membership).await?;
    let advert = advert(args, &identity, &encryption, gateway);
    let line = format!("provider  {} {}", args.name.as_str(), advert.address);
    crate::say(&match quiet {
        true => line,
        false => format!("{line}\nIt works once a document has it. Ctrl-C stops."),
    });
    let publisher = membership.publish(identity.clone(), move |_| Member::Provider(advert.clone()));
    let (topology, following) = membership.documents().await?;
    let config = ProviderConfig {
        topology: topology.clone(),
        identity,
        encryption,
        gateway,
        token_file: dir.path().join("token"),
        access_tokens,
        allow_private: args.exit.allow_private,
        dns: args.exit.dns,
    };
    let provider = Provider::start(config).await.context("the provider does not start")?;
    Ok(Running { provider, topology, following, publisher })
}

/// What documents say of it.
fn advert(
    args: &ProviderArgs,
    identity: &IdentityKey,
    encryption: &SecretKey,
    gateway: Identity,
) -> topology::Provider {
    topology::Provider {
        name: args.name.as_str().to_owned(),
        address: Address {
            identity: identity.identity(),
            encryption: encryption.public_key().into(),
            gateway,
        },
        policy: policy(args.exit.allow_private).to_owned(),
        requires_token: args.require_token,
    }
}

/// The gateway that was given, or the one that was chosen earlier, while the network has it, or else a
/// random one: of the document, or before the first one of those that want to be in it.
async fn gateway(args: &ProviderArgs, dir: &DataDir, membership: &Membership) -> Result<Identity> {
    if let Some(gateway) = args.gateway {
        return Ok(gateway);
    }
    let mut attempts = 0;
    loop {
        attempts += 1;
        let known: Vec<Identity> = match membership.latest() {
            Some(document) => document.gateways().map(|node| node.identity).collect(),
            None => match membership.descriptors().await {
                Ok(all) => {
                    let gateways = all.iter().filter(|d| d.kind() == MemberKind::Gateway);
                    gateways.map(|descriptor| descriptor.identity).collect()
                }
                Err(problem) => {
                    tracing::debug!("no authority tells of gateways: {problem}");
                    Vec::new()
                }
            },
        };
        if let Some(text) = dir.read_text(GATEWAY_FILE)? {
            let chosen = text.trim().parse().with_context(|| {
                let path = dir.path().join(GATEWAY_FILE);
                format!("{} is damaged; delete it to choose a new gateway", path.display())
            })?;
            if known.is_empty() || known.contains(&chosen) {
                return Ok(chosen);
            }
            tracing::warn!("the gateway used before has left: the provider's address changes");
        }
        if let Some(chosen) = known.into_iter().choose(&mut rand::rng()) {
            dir.write(GATEWAY_FILE, format!("{chosen}\n").as_bytes())?;
            return Ok(chosen);
        }
        if attempts == PATIENCE {
            tracing::warn!("waiting for a gateway in this network; --gateway names one");
        }
        sleep(FIRST_WAIT).await;
    }
}

impl Running {
    /// What the provider has to tell.
    fn source(&self) -> impl crate::service::Source + use<> {
        let topology = self.topology.clone();
        move || {
            let report = Report::of_document(&topology.borrow());
            async move { report }
        }
    }
}
