//! The part that `up` and `client` share: a mixnet client and the port through which programs use
//! it.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use listenfd::ListenFd;
use mixsocks_client::socks::SocksListener;
use mixsocks_client::{Client, ClientConfig};
use mixsocks_common::address::Address;
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::session::AccessToken;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::SecretKey;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::cli::ListenArgs;
use crate::data_dir::DataDir;
use crate::signals::Signals;

/// Folder of the client in a data directory.
pub(crate) const FOLDER: &str = "client";

/// Stopping waits no longer for what is still under way.
const STOP_TIME: Duration = Duration::from_secs(2);

/// Takes the port, so that nothing else is done when it cannot be had.
pub(crate) fn bind(listen: &ListenArgs) -> Result<SocksListener> {
    let address = listen.socks;
    let credentials = listen.socks_user.clone().map(Into::into);
    if let Some(listener) = handed_over()? {
        return Ok(SocksListener::new(listener, credentials).optimistic(listen.optimistic));
    }
    let listener = SocksListener::bind(address, credentials).map_err(|error| {
        let other = "choose another with --socks ADDR:PORT";
        match error.kind() {
            ErrorKind::AddrInUse => anyhow!(
                "another program listens on {address}; stop it, or {other} (port 0 takes any free \
                 one)"
            ),
            ErrorKind::AddrNotAvailable => {
                anyhow!("{address} is not an address of this machine; {other}")
            }
            ErrorKind::PermissionDenied => {
                anyhow!("this user may not listen on {address}; {other}, with a port from 1024 on")
            }
            _ => anyhow!("cannot listen on {address}: {error}; {other}"),
        }
    })?;
    if !address.ip().is_loopback() {
        let address = listener.local_addr().unwrap_or(address);
        let open = if listen.socks_user.is_none() { ", without a password" } else { "" };
        tracing::warn!("other machines that reach {address} can use this proxy{open}");
    }
    Ok(listener.optimistic(listen.optimistic))
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

/// Connects the client whose keys the data directory holds.
pub(crate) async fn connect(dir: &DataDir, way: Way) -> Result<Client> {
    let (identity, encryption) = keys(dir)?;
    let config = ClientConfig {
        topology: way.topology,
        identity: Arc::new(identity),
        encryption,
        gateway: way.gateway,
        token_file: dir.folder(FOLDER)?.join("token"),
        providers: way.providers,
        access_token: way.access_token,
        // Every client takes the network's: mixes read the delays of packets, so that other ones
        // would mark this client's packets at each of them.
        mean_delay: None,
        messages: None,
    };
    Client::connect(config).await.context("the client cannot connect")
}

/// Serves programs until a signal comes; then the client says goodbye, and after it `stop` takes down
/// what it used. Both have [`STOP_TIME`], unless another signal comes.
pub(crate) async fn serve(
    listener: SocksListener,
    client: Client,
    signals: &mut Signals,
    stop: impl Future<Output = ()>,
) {
    let opener = client.clone();
    listener.serve(opener, signals.next()).await;
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
