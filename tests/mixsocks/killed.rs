//! Processes that are killed without a warning, and started again.

use std::path::Path;

use crate::servers::{body, http};
use crate::town::{Plan, Town, authority};

/// How often each is killed.
const ROUNDS: u64 = 30;
const PLAN: Plan = Plan::SMALL;

/// What must be the same afterwards.
fn identity(town: &Town, name: &str) -> Vec<Vec<u8>> {
    let files: &[&str] = match name {
        "client" => {
            &["client/identity.key", "client/encryption.key", "client/token", "client/gateway"]
        }
        "provider-1" => &["identity.key", "encryption.key", "token", "gateway"],
        name if name.starts_with("authority") => &["authority.key"],
        _ => &["identity.key"],
    };
    let read = |file: &&str| std::fs::read(town.folder(name).join(Path::new(file))).unwrap();
    files.iter().map(read).collect()
}

/// Kills one of them in turn, at a moment that another stream has come to, and starts it again. Streams
/// under way go on, or end; new ones work.
fn kill_again_and_again(names: &[&str]) {
    let origin = http();
    let mut town = Town::on_loopback(PLAN);
    town.start_all();
    let small = format!("http://{origin}/bytes/2000/3");
    town.assert_carries(&small, &body(2000, 3));
    let before: Vec<_> = names.iter().map(|name| identity(&town, name)).collect();
    for (round, at) in (0..ROUNDS).zip((0..names.len()).cycle()) {
        let name = names[at];
        let to = town.folder("under way");
        // A little more each time, so that it hits other moments.
        let length = 10_000 * (1 + round);
        let url = format!("http://{origin}/bytes/{length}/{round}");
        let under_way = town.curl(&url, &to);
        town.kill(name);
        town.start(name);
        if name == "client" {
            town.wait_for(name, "socks5h://");
        }
        let ended = under_way.wait();
        if ended.status.success() {
            let expected = body(usize::try_from(length).unwrap(), round);
            assert!(std::fs::read(&to).unwrap() == expected, "round {round}: other bytes came");
        }
        // It may take a while until all have found each other again.
        while !town.curl(&small, &to).wait().status.success() {}
        assert!(std::fs::read(&to).unwrap() == body(2000, 3), "round {round}: other bytes came");
        assert_eq!(identity(&town, name), before[at], "round {round}");
    }
}

#[test]
fn mixes_are_killed() {
    kill_again_and_again(&["mix-1", "mix-2", "mix-3"]);
}

#[test]
fn gateways_are_killed() {
    kill_again_and_again(&["gateway-1", "gateway-2"]);
}

#[test]
fn providers_are_killed() {
    kill_again_and_again(&["provider-1"]);
}

#[test]
fn clients_are_killed() {
    kill_again_and_again(&["client"]);
}

#[test]
fn authorities_are_killed() {
    kill_again_and_again(&[&authority(0)]);
}
