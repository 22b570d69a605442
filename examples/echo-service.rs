//! A service of one's own that answers anonymous requests: here, with what it was asked. It never learns
//! who asks.
//!
//! While `mixsocks up --data-dir /tmp/network` runs:
//!
//! ```text
//! network="/tmp/network/topology $(cat /tmp/network/authority.pub)"
//! cargo run --example echo-service -- $network /tmp/echo     # prints its address
//! cargo run --example chat -- $network /tmp/anna ADDRESS     # asks it: each line comes back
//! ```

mod shared;

use std::error::Error;

use mixsocks_common::message::{MessageEvent, Sender};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [topology, authority, folder] = &arguments[..] else {
        return Err("usage: echo-service TOPOLOGY_FILE AUTHORITY_KEY FOLDER".into());
    };
    let messenger = shared::connect(topology, authority, folder.as_ref()).await?;
    println!("the service is {}", messenger.address());
    while let Some(event) = messenger.next_event().await {
        match event {
            MessageEvent::Received { received, message, sender } => {
                messenger.taken(received);
                let Sender::Anonymous(tag) = sender else {
                    eprintln!("! somebody asked who cannot be answered");
                    continue;
                };
                if let Err(error) = messenger.reply(tag, &answer(&message)).await {
                    eprintln!("! {error}");
                }
            }
            MessageEvent::Delivered(_) => {}
            MessageEvent::Failed(_, reason) => eprintln!("! an answer was lost: {reason}"),
        }
    }
    Ok(())
}

/// What the service does.
fn answer(request: &[u8]) -> Vec<u8> {
    request.to_vec()
}
