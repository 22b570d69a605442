//! Bytes get through, whole and in order.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::process::Command;
use std::time::Duration;

use crate::process::{Ended, Proxy, mixsocks, run, shared_network};
use crate::servers::{body, http, serve, sha256};
use crate::socks;

const BIG: usize = 20 << 20;

fn succeeded(ended: &Ended) -> &str {
    assert!(ended.status.success(), "{:?}: {}", ended.status, ended.stderr);
    &ended.stdout
}

#[test]
fn twenty_mebibytes_down() {
    let network = shared_network();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("down");
    let url = format!("http://{}/bytes/{BIG}/1", http());
    let Some(curl) = network.proxy.curl(&["-o", file.to_str().unwrap(), &url]) else { return };
    succeeded(&curl.wait());
    assert_eq!(sha256(&std::fs::read(file).unwrap()), sha256(&body(BIG, 1)));
}

#[test]
fn twenty_mebibytes_up() {
    let network = shared_network();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("up");
    let upload = body(BIG, 2);
    std::fs::write(&file, &upload).unwrap();
    let data = format!("@{}", file.display());
    let url = format!("http://{}/hash", http());
    let Some(curl) = network.proxy.curl(&["--data-binary", &data, &url]) else { return };
    assert_eq!(succeeded(&curl.wait()), sha256(&upload));
}

#[test]
fn without_any_mixing() {
    let data_dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::up(data_dir.path(), &["--allow-private", "--mean-delay", "0"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    let url = format!("http://{}/bytes/{}/4", http(), 1 << 20);
    let Some(curl) = proxy.curl(&["-o", file.to_str().unwrap(), &url]) else { return };
    succeeded(&curl.wait());
    assert!(std::fs::read(file).unwrap() == body(1 << 20, 4));
}

#[test]
fn fifty_requests_at_once() {
    const LENGTH: usize = 20_000;
    let network = shared_network();
    let server = http();
    let folder = tempfile::tempdir().unwrap();
    let file = |n: u64| folder.path().join(n.to_string());
    let mut running = Vec::new();
    for n in 0..50 {
        let url = format!("http://{server}/bytes/{LENGTH}/{n}");
        let Some(curl) = network.proxy.curl(&["-o", file(n).to_str().unwrap(), &url]) else {
            return;
        };
        running.push(curl);
    }
    for (n, curl) in (0..).zip(running) {
        succeeded(&curl.wait());
        assert!(std::fs::read(file(n)).unwrap() == body(LENGTH, n), "answer {n} is wrong");
    }
}

#[test]
fn an_answer_ten_seconds_after_the_half_close_arrives() {
    let network = shared_network();
    let server = serve(|mut stream| {
        let mut question = String::new();
        stream.read_to_string(&mut question).unwrap();
        std::thread::sleep(Duration::from_secs(10));
        stream.write_all(format!("you asked: {question}").as_bytes()).unwrap();
    });
    let mut stream = socks::connect(network.proxy.address, server);
    stream.write_all(b"is anybody there?").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "you asked: is anybody there?");
}

#[test]
fn the_other_side_may_end_first() {
    let network = shared_network();
    let (sender, received) = std::sync::mpsc::channel();
    let server = serve(move |mut stream| {
        stream.write_all(b"that is all").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        sender.send(rest).unwrap();
    });
    let mut stream = socks::connect(network.proxy.address, server);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "that is all");
    stream.write_all(b"not for me").unwrap();
    drop(stream);
    assert_eq!(received.recv_timeout(crate::process::DEADLINE).unwrap(), "not for me");
}

#[test]
fn a_reset_by_the_server_reaches_the_program() {
    let network = shared_network();
    // Closing with unread bytes is a reset.
    let server = serve(|mut stream| {
        stream.write_all(b"!").unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
    });
    let mut stream = socks::connect(network.proxy.address, server);
    stream.read_exact(&mut [0]).unwrap();
    stream.write_all(&[0; 2]).unwrap();
    // An end of the stream would mean that all had been said.
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// A client in a process of its own, with another client's gateway, resolves no names either.
#[test]
fn a_client_of_its_own_uses_the_same_network() {
    let network = shared_network();
    let data_dir = tempfile::tempdir().unwrap();
    let client = Proxy::start(&mut client_of(network.data_dir.path(), data_dir.path()));
    assert_eq!(client.provider, network.proxy.provider);
    assert_ne!(client.client, network.proxy.client);
    let server = http();
    let name = "separate.here.mixsocks.test";
    let url = format!("http://{name}:{}/bytes/1000/3", server.port());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    let Some(curl) = client.curl(&["-o", file.to_str().unwrap(), &url]) else { return };
    succeeded(&curl.wait());
    assert!(std::fs::read(file).unwrap() == body(1000, 3));
    assert!(network.name_server.asked(name) > 0);
    client.process.signal("TERM");
    assert!(client.process.wait().status.success());
}

/// `mixsocks client` for the network whose `up` uses `network_dir`.
pub(crate) fn client_of(network_dir: &std::path::Path, data_dir: &std::path::Path) -> Command {
    let authority = std::fs::read_to_string(network_dir.join("authority.pub")).unwrap();
    let mut command = mixsocks();
    command.args(["client", "run", "--socks", "127.0.0.1:0", "--authority", authority.trim()]);
    command.arg("--topology").arg(network_dir.join("topology"));
    command.arg("--data-dir").arg(data_dir);
    command
}

#[test]
fn a_password_is_asked_for() {
    let data_dir = tempfile::tempdir().unwrap();
    let options = ["--allow-private", "--socks-user", "alice:tr0ub4dor", "-vvv"];
    let proxy = Proxy::up(data_dir.path(), &options);
    let url = format!("http://{}/bytes/10/1", http());
    let Some(wrong) = proxy.curl(&["--proxy-user", "alice:hunter2", "-o", "/dev/null", &url])
    else {
        return;
    };
    assert!(!wrong.wait().status.success());
    let right = proxy.curl(&["--proxy-user", "alice:tr0ub4dor", "-o", "/dev/null", &url]).unwrap();
    succeeded(&right.wait());
    proxy.process.signal("INT");
    let ended = proxy.process.wait();
    let log = ended.stdout + &ended.stderr;
    assert!(!log.contains("tr0ub4dor") && !log.contains("hunter2"), "{log}");
}

#[test]
fn a_default_log_names_no_destination() {
    let data_dir = tempfile::tempdir().unwrap();
    let name_server = crate::servers::NameServer::start();
    let dns = name_server.address().to_string();
    let proxy = Proxy::up(data_dir.path(), &["--allow-private", "--dns", &dns, "-v"]);
    let server = http();
    for name in ["logged.here.mixsocks.test", "logged.gone.mixsocks.test"] {
        let target = socks::name(name, server.port());
        socks::reply_code(proxy.address, &target);
    }
    proxy.process.signal("INT");
    let ended = proxy.process.wait();
    let log = ended.stdout + &ended.stderr;
    let port = format!(":{}", server.port());
    assert!(!log.contains("logged") && !log.contains(&port), "{log}");
}

#[test]
fn a_second_client_cannot_use_a_taken_data_directory() {
    let network = shared_network();
    let ended = run(&mut client_of(network.data_dir.path(), network.data_dir.path()));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("another mixsocks process"), "{}", ended.stderr);
}
