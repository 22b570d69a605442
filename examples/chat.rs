//! Two people chat through the mixnet with the Rust API. Who is written to can answer, and does not learn
//! who writes.
//!
//! While `mixsocks up --data-dir /tmp/network` runs, in two terminals:
//!
//! ```text
//! network="/tmp/network/topology $(cat /tmp/network/authority.pub)"
//! cargo run --example chat -- $network /tmp/anna              # prints an address, waits for the other one
//! cargo run --example chat -- $network /tmp/bert ADDRESS      # writes to that address
//! ```

mod shared;

use std::error::Error;

use mixsocks_client::messages::Messenger;
use mixsocks_common::address::Address;
use mixsocks_common::message::{MessageEvent, Sender, SenderTag};
use tokio::sync::mpsc;

/// For as many packets of answers before more SURBs are asked for.
const REPLY_SURBS: usize = 20;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (topology, authority, folder, recipient) = match &arguments[..] {
        [topology, authority, folder] => (topology, authority, folder, None),
        [topology, authority, folder, recipient] => {
            (topology, authority, folder, Some(recipient.parse::<Address>()?))
        }
        _ => return Err("usage: chat TOPOLOGY_FILE AUTHORITY_KEY FOLDER [ADDRESS]".into()),
    };
    let messenger = shared::connect(topology, authority, folder.as_ref()).await?;
    println!("you are {}", messenger.address());

    let mut lines = lines();
    let mut answer_to = None;
    // Outcomes of what was sent that are still to come.
    let mut under_way = 0;
    let mut is_open = true;
    while is_open || under_way > 0 {
        tokio::select! {
            line = lines.recv(), if is_open => match line {
                Some(line) if line.is_empty() => {}
                Some(line) => under_way += send(&messenger, recipient, answer_to, &line).await,
                None => is_open = false,
            },
            event = messenger.next_event() => match event {
                Some(MessageEvent::Received { received, message, sender }) => {
                    // Strangers write it: a terminal must not obey it.
                    let text = String::from_utf8_lossy(&message);
                    println!("< {}", text.replace(char::is_control, "\u{fffd}"));
                    messenger.taken(received);
                    if let Sender::Anonymous(tag) = sender {
                        answer_to = Some(tag);
                    }
                }
                Some(MessageEvent::Delivered(_)) => under_way -= 1,
                Some(MessageEvent::Failed(_, reason)) => {
                    eprintln!("! {reason}");
                    under_way -= 1;
                }
                None => break,
            },
        }
    }
    messenger.shutdown().await;
    Ok(())
}

/// Sends a line; how many outcomes will follow.
async fn send(
    messenger: &Messenger,
    recipient: Option<Address>,
    answer_to: Option<SenderTag>,
    line: &str,
) -> usize {
    let sent = match (recipient, answer_to) {
        (Some(recipient), _) => messenger.send(recipient, line.as_bytes(), REPLY_SURBS).await,
        (None, Some(tag)) => messenger.reply(tag, line.as_bytes()).await,
        (None, None) => {
            eprintln!("! nobody has written yet");
            return 0;
        }
    };
    match sent {
        Ok(_) => 1,
        Err(error) => {
            eprintln!("! {error}");
            0
        }
    }
}

/// What is typed.
fn lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    lines
}
