//! Messages of a client that is this process.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use mixsocks_client::EndpointConfig;
use mixsocks_client::messages::{Messenger, MessengerOptions, WriteDown};
use mixsocks_common::address::Address;
use mixsocks_common::message::{ReceivedId, Sender};
use mixsocks_directory::Following;

use super::Incoming;
use crate::cli::ByArgs;
use crate::data_dir::{DataDir, InUse};
use crate::{client, proxy};

/// A messenger with the keys of a data directory.
pub(super) struct Own {
    messenger: Messenger,
    _following: Option<Following>,
    /// The last field, so that it stays locked until the rest has gone.
    _dir: Arc<DataDir>,
}

impl Own {
    /// Connects, registering with a gateway if need be.
    pub(super) async fn connect(args: &ByArgs, receives: bool) -> Result<Self> {
        let joined = client::join(&args.network, args.data_dir.as_deref(), |_| Ok(())).await;
        let (network, ()) = joined.map_err(|error| {
            let help = "if it is a client, start that with --websocket and name its port here too";
            if error.is::<InUse>() { anyhow!("{error}; {help}") } else { error }
        })?;
        let newest = network.topology.borrow().clone();
        let gateway = client::gateway_of_messages(&network.dir, &newest)?;
        let (identity, encryption) = proxy::keys(&network.dir)?;
        let config = EndpointConfig {
            topology: network.topology,
            identity: Arc::new(identity),
            encryption,
            gateway,
            token_file: proxy::token_file(&network.dir)?,
            mean_delay: None,
            receives_messages: receives,
        };
        // What cannot be printed comes again.
        let write_down = WriteDown::WhenTaken;
        let options = MessengerOptions { write_down, ..proxy::messenger_options(&network.dir)? };
        let messenger =
            Messenger::connect(config, options).await.context("the client cannot connect")?;
        Ok(Self { messenger, _following: network.following, _dir: network.dir })
    }

    pub(super) fn address(&self) -> Address {
        self.messenger.address()
    }

    pub(super) async fn send(&self, recipient: Address, message: Vec<u8>) -> Result<()> {
        let sent = self.messenger.send(recipient, &message, 0).await?;
        loop {
            match self.messenger.next_outcome().await {
                Some((id, outcome)) if id == sent => return Ok(outcome?),
                Some(_) => {}
                None => bail!("the client has stopped"),
            }
        }
    }

    pub(super) async fn receive(&self) -> Result<Incoming> {
        let received = self.messenger.next_received().await.context("the client has stopped")?;
        let sender_tag = match received.sender {
            Sender::Anonymous(tag) => Some(tag),
            Sender::Unknown | Sender::Replier(_) => None,
        };
        Ok(Incoming { message: received.message, sender_tag, received: Some(received.received) })
    }

    pub(super) fn messenger(&self) -> Messenger {
        self.messenger.clone()
    }

    pub(super) fn taken(&self, received: ReceivedId) {
        self.messenger.taken(received);
    }

    pub(super) async fn shutdown(self) {
        self.messenger.shutdown().await;
    }
}
