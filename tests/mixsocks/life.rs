//! Starting, stopping and starting again.

use std::net::{TcpListener, TcpStream};
use std::process::Stdio;

use crate::process::{Proxy, mixsocks, run, shared_network};
use crate::servers::{http, serve};
use crate::socks;
use crate::transfers::client_of;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// Stopping is promised within two seconds; a busy machine gets more.
const STOP_TIME: Duration = Duration::from_secs(10);

fn stops_cleanly(proxy: Proxy, signal: &str) {
    let asked = Instant::now();
    proxy.process.signal(signal);
    let ended = proxy.process.wait();
    assert!(asked.elapsed() < STOP_TIME, "it took {:?} to stop", asked.elapsed());
    assert_eq!((ended.status.code(), &*ended.stderr), (Some(0), ""));
}

#[test]
fn ctrl_c_during_a_transfer() {
    let data_dir = tempfile::tempdir().unwrap();
    let proxy = Proxy::up(data_dir.path(), &["--allow-private"]);
    // A download, an upload and a request without an answer, all in full swing.
    let mut download = socks::connect(proxy.address, http());
    download.write_all(b"GET /endless HTTP/1.1\r\n\r\n").unwrap();
    let mut bytes = vec![0; 256 * 1024];
    download.read_exact(&mut bytes).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let (ended, upload_ended) = std::sync::mpsc::channel();
    let sink = serve(move |mut stream| {
        let mut bytes = vec![0; 256 * 1024];
        stream.read_exact(&mut bytes).unwrap();
        sender.send(()).unwrap();
        ended.send(std::io::copy(&mut stream, &mut std::io::sink()).is_err()).unwrap();
    });
    let mut upload = socks::connect(proxy.address, sink);
    let uploading = std::thread::spawn(move || while upload.write_all(&[0; 16 * 1024]).is_ok() {});
    receiver.recv_timeout(crate::process::DEADLINE).unwrap();
    let silent = serve(|mut stream| drop(stream.read_to_end(&mut Vec::new())));
    let waiting = socks::connect(proxy.address, silent);
    stops_cleanly(proxy, "INT");
    uploading.join().unwrap();
    drop(waiting);
    // Both end in an error, so that nobody takes half a file for a whole one.
    assert!(std::io::copy(&mut download, &mut std::io::sink()).is_err());
    assert!(upload_ended.recv_timeout(crate::process::DEADLINE).unwrap());
}

/// The last words of a client get through, so that its targets do not wait for it.
#[test]
fn targets_hear_at_once_that_a_client_has_stopped() {
    let network = shared_network();
    for _ in 0..3 {
        let data_dir = tempfile::tempdir().unwrap();
        let client = Proxy::start(&mut client_of(network.data_dir.path(), data_dir.path()));
        let (sender, ended) = std::sync::mpsc::channel();
        let target = serve(move |mut stream| {
            let end = stream.read_to_end(&mut Vec::new());
            sender.send(end.is_err()).unwrap();
        });
        let stream = socks::connect(client.address, target);
        stops_cleanly(client, "INT");
        // Without its last words the provider would wait for a quarter of an hour.
        assert!(ended.recv_timeout(crate::process::DEADLINE).unwrap(), "an end, not a reset");
        drop(stream);
    }
}

#[test]
fn sigterm_while_idle() {
    let data_dir = tempfile::tempdir().unwrap();
    stops_cleanly(Proxy::up(data_dir.path(), &[]), "TERM");
}

#[test]
fn a_second_start_has_the_same_addresses_and_a_new_topology() {
    let data_dir = tempfile::tempdir().unwrap();
    let epoch = || {
        let topology = std::fs::read_to_string(data_dir.path().join("topology")).unwrap();
        let (_, rest) = topology.split_once("\nepoch = ").unwrap();
        rest.lines().next().unwrap().parse::<u64>().unwrap()
    };
    let first = Proxy::up(data_dir.path(), &["--allow-private"]);
    let addresses = (first.provider.clone(), first.client.clone());
    let first_epoch = epoch();
    stops_cleanly(first, "INT");
    // The second time nobody says goodbye: what counts is on the disk already.
    let second = Proxy::up(data_dir.path(), &["--allow-private"]);
    assert_eq!((second.provider.clone(), second.client.clone()), addresses);
    assert_eq!(epoch(), first_epoch + 1);
    drop(second);
    let third = Proxy::up(data_dir.path(), &["--allow-private"]);
    assert_eq!((third.provider.clone(), third.client.clone()), addresses);
    assert_eq!(socks::reply_code(third.address, &socks::ip(http())), 0);
}

#[test]
fn a_taken_port_is_named_with_the_option_that_changes_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let data_dir = tempfile::tempdir().unwrap();
    let below = data_dir.path().join("below");
    let ended = run(mixsocks().args(["up", "--socks", &address]).arg("--data-dir").arg(&below));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains(&address) && ended.stderr.contains("--socks"), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert!(!below.exists(), "nothing was begun");
}

#[test]
fn two_never_share_a_data_directory() {
    let network = shared_network();
    let mut command = mixsocks();
    command.args(["up", "--socks", "127.0.0.1:0", "--data-dir"]).arg(network.data_dir.path());
    let ended = run(&mut command);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("another mixsocks process"), "{ended:?}");
    assert!(ended.stderr.contains("--data-dir"), "{ended:?}");
}

#[test]
fn an_option_wins_over_a_variable() {
    let data_dir = tempfile::tempdir().unwrap();
    let mut command = mixsocks();
    command.args(["-v", "up", "--socks", "127.0.0.1:0", "--data-dir"]).arg(data_dir.path());
    let process = crate::process::Process::start(command.env("MIXSOCKS_QUIET", "1"));
    process.wait_for("Ctrl-C stops");
    process.signal("INT");
    assert_eq!(process.wait().status.code(), Some(0));
}

#[test]
fn quiet_says_only_where_the_proxy_is() {
    let data_dir = tempfile::tempdir().unwrap();
    let mut command = mixsocks();
    command.args(["-q", "up", "--socks", "127.0.0.1:0", "--data-dir"]).arg(data_dir.path());
    let process = crate::process::Process::start(&mut command);
    process.wait_for("socks5h://");
    process.signal("INT");
    let ended = process.wait();
    assert_eq!((ended.stdout.lines().count(), &*ended.stderr), (1, ""), "{ended:?}");
}

#[test]
fn a_closed_stdout_is_no_reason_to_panic() {
    let data_dir = tempfile::tempdir().unwrap();
    let address = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap()
    };
    let mut command = mixsocks();
    command.args(["up", "--socks", &address.to_string(), "--data-dir"]).arg(data_dir.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    // The port is taken at once, but nobody is answered before the greeting was written.
    let deadline = Instant::now() + crate::process::DEADLINE;
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    stream.set_read_timeout(Some(crate::process::DEADLINE)).unwrap();
    stream.write_all(&[5, 1, 0]).unwrap();
    stream.read_exact(&mut [0; 2]).unwrap();
    let id = child.id().to_string();
    std::process::Command::new("kill").args(["-s", "INT", &id]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""));
}
