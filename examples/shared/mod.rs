//! What the examples of messages share: a messenger whose keys are kept in a folder.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use mixsocks_client::EndpointConfig;
use mixsocks_client::messages::{Messenger, MessengerOptions, RECEIVED_LOG_FILE};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{Authorities, UnixTime, verify};
use mixsocks_sphinx::SecretKey;
use rand::Rng;

/// Connects to the network of a signed topology file. The address stays the same as long as the folder
/// does.
pub(crate) async fn connect(
    topology: &str,
    authority: &str,
    folder: &Path,
) -> Result<Messenger, Box<dyn Error>> {
    // Who is in the network is what the authority signed, and nothing else.
    let authorities = Authorities::new([authority.trim().parse::<Identity>()?], 1)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let topology = Arc::new(verify(&fs::read(topology)?, &authorities, UnixTime(now))?);
    let gateway = topology.gateways().next().ok_or("the network has no gateway")?.identity;

    fs::create_dir_all(folder)?;
    let config = EndpointConfig {
        topology: tokio::sync::watch::channel(topology).1,
        identity: Arc::new(IdentityKey::from_bytes(&secret(&folder.join("identity"))?)),
        encryption: SecretKey::from_bytes(secret(&folder.join("encryption"))?),
        gateway,
        token_file: folder.join("token"),
        mean_delay: None,
        receives_messages: true,
    };
    // What was received once is not received again, also after a restart.
    let received_log = Some(folder.join(RECEIVED_LOG_FILE));
    let options = MessengerOptions { received_log, ..MessengerOptions::default() };
    Ok(Messenger::connect(config, options).await?)
}

/// The 32 bytes of a file, which are drawn at the first use.
fn secret(path: &Path) -> io::Result<[u8; 32]> {
    match fs::read(path) {
        Ok(bytes) => bytes.try_into().map_err(|_| io::Error::other("a key has 32 bytes")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut secret = [0; 32];
            rand::rng().fill_bytes(&mut secret);
            fs::write(path, secret)?;
            Ok(secret)
        }
        Err(error) => Err(error),
    }
}
