//! The part that `up` and `client` share: a mixnet client and the port through which programs use
//! it.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use listenfd::ListenFd;
use mixsocks_client::messages::{MessengerOptions, RECEIVED_LOG_FILE};
use mixsocks_client::socks::SocksListener;
use mixsocks_client::websocket::{BindError, Token, WebsocketListener, WebsocketOptions};
use mixsocks_client::{Client, ClientConfig};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::AccessToken;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::SecretKey;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::cli::{ListenArgs, WebsocketArgs};
use crate::data_dir::DataDir;
use crate::signals::Signals;

/// Folder of the client in a data directory.
pub(crate) const FOLDER: &str = "client";

/// Stopping waits no longer for what is still under way.
const STOP_TIME: Duration = Duration::from_secs(2);

/// Where programs reach the client.
pub(crate) struct Ports {
    socks: SocksListener,
    websocket: Option<WebsocketListener>,
}

impl Ports {
    /// Where the proxy listens.
    pub(crate) fn proxy(&self) -> Result<SocketAddr> {
        Ok(self.socks.local_addr()?)
    }

    /// The lines that say where programs connect; those that start this one read them.
    pub(crate) fn lines(&self) -> Result<String> {
        let proxy = format!("proxy     socks5h://{}", self.proxy()?);
        Ok(match &self.websocket {
            None => proxy,
            Some(websocket) => format!("messages  ws://{}/\n{proxy}", websocket.local_addr()?),
        })
    }
}

/// Takes the ports, so that nothing else is done when they cannot be had.
pub(crate) async fn bind(listen: &ListenArgs, websocket: &WebsocketArgs) -> Result<Ports> {
    let socks = bind_socks(listen)?;
    Ok(Ports { socks, websocket: bind_websocket(websocket).await? })
}

async fn bind_websocket(args: &WebsocketArgs) -> Result<Option<WebsocketListener>> {
    let Some(address) = args.websocket else { return Ok(None) };
    let options = WebsocketOptions {
        origins: args.websocket_origin.clone(),
        hosts: args.websocket_host.clone(),
        token: args.token.websocket_token.as_ref().map(Token::from),
    };
    let bound = WebsocketListener::bind(address, options).await;
    bound.map(Some).map_err(|error| match error {
        BindError::TokenNeeded(address) => anyhow!(
            "other machines that reach {address} could send and receive your messages: give them a \
             token with --websocket-token, or listen on 127.0.0.1"
        ),
        BindError::Io(error) => cannot_listen(address, "--websocket", &error),
    })
}

fn bind_socks(listen: &ListenArgs) -> Result<SocksListener> {
    let address = listen.socks;
    let credentials = listen.socks_user.clone().map(Into::into);
    if let Some(listener) = handed_over()? {
        return Ok(SocksListener::new(listener, credentials).optimistic(listen.optimistic));
    }
    let listener = SocksListener::bind(address, credentials)
        .map_err(|error| cannot_listen(address, "--socks", &error))?;
    if !address.ip().is_loopback() {
        let address = listener.local_addr().unwrap_or(address);
        let open = if listen.socks_user.is_none() { ", without a password" } else { "" };
        tracing::warn!("other machines that reach {address} can use this proxy{open}");
    }
    Ok(listener.optimistic(listen.optimistic))
}

fn cannot_listen(address: SocketAddr, option: &str, error: &io::Error) -> anyhow::Error {
    let other = format!("choose another with {option} ADDR:PORT");
    match error.kind() {
        ErrorKind::AddrInUse => anyhow!(
            "another program listens on {address}; stop it, or {other} (port 0 takes any free one)"
        ),
        ErrorKind::AddrNotAvailable => {
            anyhow!("{address} is not an address of this machine; {other}")
        }
        ErrorKind::PermissionDenied => {
            anyhow!("this user may not listen on {address}; {other}, with a port from 1024 on")
        }
        _ => anyhow!("cannot listen on {address}: {error}; {other}"),
    }
}

/// The listener that the service manager has opened for this process, if it has
/// (`mixsocks-client.socket`).
fn handed_over() -> Result<Option<TcpListener>> {
    let Some(listener) = ListenFd::from_env().take_tcp_listener(0).context(
        "the service manager hands over something else than one listener for TCP; correct the unit",
    )?
    else {
        return Ok(None);
    };
    listener.set_nonblocking(true)?;
    Ok(Some(TcpListener::from_std(listener)?))
}

/// The way of a client through a network.
pub(crate) struct Way {
    pub(crate) topology: watch::Receiver<Arc<Topology>>,
    /// The client's own gateway.
    pub(crate) gateway: Identity,
    /// The preferred one first.
    pub(crate) providers: Vec<Address>,
    /// For a provider that demands one.
    pub(crate) access_token: Option<AccessToken>,
}

/// The client's identity, and the key of the last layer of packets for it.
pub(crate) fn keys(dir: &DataDir) -> Result<(IdentityKey, SecretKey)> {
    let identity = dir.identity_key(&format!("{FOLDER}/identity.key"))?;
    Ok((identity, dir.sphinx_key(&format!("{FOLDER}/encryption.key"))?))
}

/// Where the gateway's token is kept.
pub(crate) fn token_file(dir: &DataDir) -> Result<PathBuf> {
    Ok(dir.folder(FOLDER)?.join("token"))
}

/// The address of the client of a data directory, which another process may use; `None` when it was not
/// registered yet.
pub(crate) fn address_in(data_dir: &Path) -> Result<Option<Address>> {
    let folder = data_dir.join(FOLDER);
    let [identity, encryption, gateway, token] =
        ["identity.key", "encryption.key", "gateway", "token"].map(|file| folder.join(file));
    if ![&identity, &encryption, &gateway, &token].iter().all(|file| file.exists()) {
        return Ok(None);
    }
    let gateway = std::fs::read_to_string(&gateway).ok().and_then(|text| text.trim().parse().ok());
    let Some(gateway) = gateway else { return Ok(None) };
    let identity = DataDir::read_identity(&identity)?;
    let encryption = DataDir::read_encryption_key(&encryption)?;
    Ok(Some(Address { identity, encryption, gateway }))
}

/// How the client of a data directory handles messages.
pub(crate) fn messenger_options(dir: &DataDir) -> Result<MessengerOptions> {
    let received_log = Some(dir.folder(FOLDER)?.join(RECEIVED_LOG_FILE));
    Ok(MessengerOptions { received_log, ..MessengerOptions::default() })
}

/// Connects the client whose keys the data directory holds.
pub(crate) async fn connect(dir: &DataDir, way: Way, messages: bool) -> Result<Client> {
    let (identity, encryption) = keys(dir)?;
    let config = ClientConfig {
        topology: way.topology,
        identity: Arc::new(identity),
        encryption,
        gateway: way.gateway,
        token_file: token_file(dir)?,
        providers: way.providers,
        access_token: way.access_token,
        // Every client takes the network's: mixes read the delays of packets, so that other ones
        // would mark this client's packets at each of them.
        mean_delay: None,
        messages: messages.then(|| messenger_options(dir)).transpose()?,
    };
    Client::connect(config).await.context("the client cannot connect")
}

/// Serves programs until a signal comes; then the client says goodbye, and after it `stop` takes down
/// what it used. Both have [`STOP_TIME`], unless another signal comes.
pub(crate) async fn serve(
    ports: Ports,
    client: Client,
    signals: &mut Signals,
    stop: impl Future<Output = ()>,
) {
    let Ports { socks, websocket } = ports;
    let (ending, mut ended) = watch::channel(());
    let serve_socks = socks.serve(client.clone(), async {
        signals.next().await;
        drop(ending);
    });
    let serve_websocket = async {
        if let (Some(websocket), Some(messenger)) = (websocket, client.messenger()) {
            // It fails when the other end is gone.
            websocket.serve(messenger, async move { drop(ended.changed().await) }).await;
        }
    };
    tokio::join!(serve_socks, serve_websocket);
    let stopped = async move {
        client.shutdown().await;
        // This is what closes the link to the gateway.
        drop(client);
        stop.await;
    };
    tokio::select! {
        result = tokio::time::timeout(STOP_TIME, stopped) => {
            if result.is_err() {
                tracing::info!("stopped without waiting for what was still under way");
            }
        }
        () = signals.next() => {}
    }
}
