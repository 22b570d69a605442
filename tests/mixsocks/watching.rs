//! What operators see, and how a role comes to its end.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::servers::{body, http};
use crate::town::{METRICS_PORT, Plan, Town, authority};

const PLAN: Plan = Plan::SMALL;
const ROLES: [(&str, &str); 8] = [
    ("authority-0", "directory"),
    ("mix-1", "node"),
    ("mix-2", "node"),
    ("mix-3", "node"),
    ("gateway-1", "node"),
    ("gateway-2", "node"),
    ("provider-1", "provider"),
    ("client", "client"),
];

/// The answer to a request for the metrics of one of them, with its head.
fn get(town: &Town, name: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(town.address(name, METRICS_PORT)).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The value of a metric without labels.
fn metric(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")))?;
    line.trim().parse().ok()
}

#[test]
fn each_role_tells_how_it_is() {
    let origin = http();
    let mut town = Town::on_loopback(PLAN);
    town.start(&authority(0));
    town.wait_for(&authority(0), "Ctrl-C stops");
    let early = get(&town, &authority(0), "/healthz");
    assert!(early.starts_with("HTTP/1.1 503") && early.contains("no document"), "{early}");
    town.kill(&authority(0));
    town.start_all();
    town.assert_carries(&format!("http://{origin}/bytes/100000/3"), &body(100_000, 3));
    let epoch = town.epoch();
    for (name, role) in ROLES {
        let health = get(&town, name, "/healthz");
        assert!(health.starts_with("HTTP/1.1 200") && health.ends_with("ok\n"), "{name}: {health}");
        let metrics = get(&town, name, "/metrics");
        assert!(metrics.contains(&format!("mixsocks_info{{role=\"{role}\"")), "{name}: {metrics}");
        let told = metric(&metrics, "mixsocks_document_epoch").unwrap();
        assert!((epoch..=epoch + 1).contains(&told), "{name}: {metrics}");
        assert_eq!(metric(&metrics, "mixsocks_healthy"), Some(1), "{name}: {metrics}");
        // Nothing tells who uses the network, and for what.
        assert!(!metrics.contains(&origin.to_string()), "{name}: {metrics}");
        if name.starts_with("mix") {
            for counter in ["mixsocks_packets_in_total", "mixsocks_replay_tags"] {
                assert!(metric(&metrics, counter) > Some(20), "{name}: {metrics}");
            }
        }
        assert!(get(&town, name, "/other").starts_with("HTTP/1.1 404"), "{name}");
    }
}

#[test]
fn streams_come_to_their_end_before_a_provider_does() {
    let origin = http();
    let mut town = Town::on_loopback(PLAN);
    town.start_all();
    let to = town.folder("stream");
    let under_way = town.curl(&format!("http://{origin}/slow/200000/3/2"), &to);
    while std::fs::metadata(&to).map_or(0, |metadata| metadata.len()) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    town.signal("provider-1", "TERM");
    let ended = town.end("provider-1");
    assert!(ended.status.success(), "{}", ended.stderr);
    let ended = under_way.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(std::fs::read(&to).unwrap() == body(200_000, 3), "other bytes came");
    for (name, _) in ROLES.into_iter().filter(|(name, _)| *name != "provider-1") {
        town.signal(name, "TERM");
        let ended = town.end(name);
        assert!(ended.status.success(), "{name}: {}", ended.stderr);
    }
}
