//! Fetches a page through the mixnet with the Rust API, and prints the answer.
//!
//! While `mixsocks up --data-dir /tmp/network` runs:
//!
//! ```text
//! cargo run --example fetch -- /tmp/network/topology "$(cat /tmp/network/authority.pub)" \
//!     http://example.com/
//! ```

use std::error::Error;
use std::sync::Arc;
use std::time::SystemTime;

use mixsocks_client::{Client, ClientConfig};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::target::Target;
use mixsocks_common::topology::{Authorities, UnixTime, verify};
use mixsocks_sphinx::SecretKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [topology, authority, url] = &arguments[..] else {
        return Err("usage: fetch TOPOLOGY_FILE AUTHORITY_KEY http://HOST[:PORT]/PATH".into());
    };

    // Who is in the network is what the authority signed, and nothing else.
    let authorities = Authorities::new([authority.parse::<Identity>()?], 1)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let topology = Arc::new(verify(&std::fs::read(topology)?, &authorities, UnixTime(now))?);

    // A provider that the topology advertises, and a gateway that is not the provider's.
    let provider = topology.providers().first().ok_or("no provider is advertised")?.address;
    let others = |gateway: &Identity| *gateway != provider.gateway;
    let gateway = topology.gateways().map(|node| node.identity).find(others);
    let gateway = gateway.ok_or("there is no gateway but the provider's")?;

    // A client for this one request; a lasting one keeps its keys and its token file.
    let folder = tempfile::tempdir()?;
    let client = Client::connect(ClientConfig {
        topology: tokio::sync::watch::channel(topology).1,
        identity: Arc::new(IdentityKey::generate(&mut rand::rng())),
        encryption: SecretKey::generate(&mut rand::rng()),
        gateway,
        token_file: folder.path().join("token"),
        providers: vec![provider],
        access_token: None,
        mean_delay: None,
        messages: None,
    })
    .await?;

    let address = url.strip_prefix("http://").ok_or("only http:// is understood")?;
    let (host, path) = address.split_once('/').unwrap_or((address, ""));
    let target: Target = match host.parse() {
        Ok(target) => target,
        Err(_) => Target::new(host, 80)?,
    };
    let mut stream = client.open_stream(target).await?;
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    println!("{}", String::from_utf8_lossy(&answer));
    client.shutdown().await;
    Ok(())
}
