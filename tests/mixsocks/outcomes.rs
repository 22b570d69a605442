//! A program is told what really happened to its request.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use crate::process::{Proxy, shared_network};
use crate::servers::{NameServer, body, http};
use crate::socks::{self, CONNECT, reply_code};
use crate::transfers::client_of;

/// A loopback port on which nobody listens.
fn closed_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

#[test]
fn names_are_resolved_by_the_provider() {
    let network = shared_network();
    let server = http();
    // Only the provider's name server knows the name, so nobody else can have resolved it.
    let name = "resolved.here.mixsocks.test";
    let url = format!("http://{name}:{}/bytes/1000/5", server.port());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    let Some(curl) = network.proxy.curl(&["-o", file.to_str().unwrap(), &url]) else { return };
    let ended = curl.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(std::fs::read(file).unwrap() == body(1000, 5));
    // One look-up for each family of addresses: nobody else asked for the name.
    assert!((1..=2).contains(&network.name_server.asked(name)));
}

#[test]
fn refused() {
    let network = shared_network();
    let target = closed_port();
    assert_eq!(reply_code(network.proxy.address, &socks::ip(target)), 5);
    curl_is_refused(&network.proxy, &format!("http://{target}/"));
}

fn curl_is_refused(proxy: &Proxy, url: &str) {
    let Some(curl) = proxy.curl(&[url]) else { return };
    assert_eq!(curl.wait().status.code(), Some(97), "curl's code for an error of the proxy");
}

#[test]
fn an_optimistic_proxy_says_yes_at_once_and_breaks_off_what_cannot_be_opened() {
    let data_dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::up(data_dir.path(), &["--allow-private", "--optimistic"]);
    let url = format!("http://{}/bytes/1000/5", http());
    let file = data_dir.path().join("file");
    let Some(curl) = proxy.curl(&["-o", file.to_str().unwrap(), &url]) else { return };
    let ended = curl.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(std::fs::read(file).unwrap() == body(1000, 5));
    // What the provider says would be 5, and curl's code for an error of the proxy 97.
    let refused = closed_port();
    assert_eq!(reply_code(proxy.address, &socks::ip(refused)), 0);
    let code = proxy.curl(&[&format!("http://{refused}/")]).unwrap().wait().status.code();
    assert!(matches!(code, Some(52 | 55 | 56)), "nothing came, or it was reset: {code:?}");
}

#[test]
fn a_name_that_does_not_exist() {
    let network = shared_network();
    let name = "nobody.gone.mixsocks.test";
    assert_eq!(reply_code(network.proxy.address, &socks::name(name, 80)), 4);
    assert!(network.name_server.asked(name) > 0);
    curl_is_refused(&network.proxy, &format!("http://{name}/"));
}

#[test]
fn forbidden_by_policy() {
    let data_dir = tempfile::tempdir().unwrap();
    let name_server = NameServer::start();
    let dns = name_server.address().to_string();
    let proxy = Proxy::up(data_dir.path(), &["--dns", &dns]);
    let server = http();
    let port = server.port();
    let mapped = SocketAddr::from(([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1], port));
    for (what, target) in [
        ("a loopback address", socks::ip(server)),
        ("a loopback address as IPv6", socks::ip(mapped)),
        ("a name of a loopback address", socks::name("policy.here.mixsocks.test", port)),
        ("localhost", socks::name("localhost", port)),
        ("a private address", socks::ip(SocketAddr::from(([10, 0, 0, 1], 80)))),
        ("the mail port", socks::ip(SocketAddr::from(([192, 0, 2, 1], 25)))),
    ] {
        assert_eq!(reply_code(proxy.address, &target), 2, "{what}");
    }
    curl_is_refused(&proxy, &format!("http://{server}/"));
}

/// Its gateway does not know it, as when it is switched off for good.
#[test]
fn a_provider_that_does_not_answer() {
    const TIMED_OUT: u8 = 6;
    let network = shared_network();
    let data_dir = tempfile::tempdir().unwrap();
    let (keys, _) = network.proxy.client.split_once('@').unwrap();
    let (_, gateway) = network.proxy.provider.split_once('@').unwrap();
    let mut command = client_of(network.data_dir.path(), data_dir.path());
    let client = Proxy::start(command.args(["--provider", &format!("{keys}@{gateway}")]));
    let target = socks::ip(closed_port());
    for _ in 0..2 {
        let asked = Instant::now();
        assert_eq!(reply_code(client.address, &target), TIMED_OUT);
        // Promised are 10 s; a first try that waits for 30 s would be wrong on any machine.
        assert!(asked.elapsed() < Duration::from_secs(25), "{:?}", asked.elapsed());
    }
    client.process.signal("INT");
    let ended = client.process.wait();
    assert_eq!(ended.stderr.matches("the provider does not answer").count(), 1, "{ended:?}");
}

#[test]
fn the_mail_port_stays_closed() {
    let network = shared_network();
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, 25));
    assert_eq!(reply_code(network.proxy.address, &socks::ip(target)), 2);
}

#[test]
fn other_commands_and_address_types() {
    const BIND: u8 = 2;
    const UDP_ASSOCIATE: u8 = 3;
    let network = shared_network();
    let target = socks::ip(closed_port());
    for command in [BIND, UDP_ASSOCIATE, 9] {
        assert_eq!(socks::request(network.proxy.address, command, &target).1, 7);
    }
    assert_eq!(socks::request(network.proxy.address, CONNECT, &[9, 1, 2, 3, 4, 0, 80]).1, 8);
}

#[test]
fn bytes_that_are_not_socks() {
    let network = shared_network();
    let noise: Vec<u8> = body(1000, 9);
    for (bytes, answered) in [
        (&b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"[..], &b"HTTP/1.1 400 "[..]),
        (b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"\x00\x5b\x00\x00\x00\x00\x00\x00"),
        (b"\x16\x03\x01\x02\x00\x01", b""),
        (b"\x05\x00", b""),
        // Any password will do when none is asked for, but this one is cut short.
        (b"\x05\x01\x02\x01\x03", b"\x05\x02"),
        (&noise, b""),
    ] {
        let mut stream = socks::dial(network.proxy.address);
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            // Not left open until the deadline; bytes that nobody has read make a reset of it.
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{bytes:?}: {error}");
        }
        assert!(answer.starts_with(answered), "{bytes:?}: {answer:?}");
        assert!(answer.len() < 1000, "{answer:?}");
    }
    let target = socks::ip(http());
    assert_eq!(reply_code(network.proxy.address, &target), 0, "the port still works");
}
