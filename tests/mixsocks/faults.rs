//! What goes wrong while a download and an upload are under way: both go on, and in the end every byte is
//! in its place.
//!
//! Each test prints for how long a user saw nothing arrive:
//! `cargo test --test mixsocks faults -- --nocapture`. Times are not asserted; those of the simulation are.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::lab::{Lab, Place};
use crate::process::{DEADLINE, shared_network};
use crate::servers::{http, serve};
use crate::socks;
use crate::town::{Plan, Town};
use crate::transfer::{Ends, Transfer};

const PLAN: Plan = Plan { impaired: true, ..Plan::SMALL };
/// The code of SOCKS for a stream that is open.
const SERVED: u8 = 0;
/// What each transfer has brought before something happens, and brings afterwards.
const SOME: usize = 1024 * 1024;
/// Packets a second through each gateway, so that no more is transferred than a test needs.
const RATE: u32 = 1000;
/// For how long a program stands still or is cut off: longer than a gateway holds packets for a client.
const OUTAGE: Duration = Duration::from_secs(30);

/// Programs and servers on this machine.
fn ends(proxy: SocketAddr) -> Ends {
    Ends { proxy, program: Place::default(), server: Place::default() }
}

/// Slows the gateways down, through which all packets enter the mixnet, and has them lose a part.
fn impair_gateways(town: &Town, loss: f64) {
    for gateway in town.nodes().into_iter().filter(|name| name.starts_with("gateway")) {
        town.impair(&gateway, &format!("loss = {loss:?}\nrate = {RATE}\n"));
    }
}

/// A download and an upload, in the middle of which something happens.
fn transfers_outlive(town: &mut Town, what: &str, happen: impl FnOnce(&mut Town)) {
    let transfers = [Transfer::down(&town.ends()), Transfer::up(&town.ends())];
    for transfer in &transfers {
        transfer.wait_for(SOME);
    }
    let began = Instant::now();
    happen(town);
    let lasted = began.elapsed();
    for transfer in &transfers {
        transfer.wait_for(transfer.bytes() + SOME);
    }
    let [down, up] = transfers.map(Transfer::finish);
    println!("{what} ({lasted:.1?}): download stood still for {down:.1?}, upload for {up:.1?}");
}

#[test]
fn transfers_outlive_loss() {
    let mut town = Town::on_loopback(PLAN);
    town.start_all();
    for percent in [1, 5, 20] {
        impair_gateways(&town, f64::from(percent) / 100.0);
        transfers_outlive(&mut town, &format!("{percent} % loss"), |_| ());
    }
}

#[test]
fn transfers_outlive_nodes_that_are_killed_and_started_again() {
    let mut town = Town::on_loopback(PLAN);
    town.start_all();
    let [clients, providers] = ["client", "provider-1"].map(|name| town.gateway_of(name));
    for (what, name) in
        [("a mix", "mix-2"), ("the client's gateway", &*clients), ("the provider's", &*providers)]
    {
        impair_gateways(&town, 0.0);
        let what = format!("{what} killed and started again");
        transfers_outlive(&mut town, &what, |town| {
            town.kill(name);
            town.start(name);
            town.wait_healthy(name);
        });
    }
}

#[test]
fn transfers_outlive_a_client_that_is_suspended() {
    let mut town = Town::on_loopback(PLAN);
    town.start_all();
    impair_gateways(&town, 0.0);
    transfers_outlive(&mut town, "the client suspended", |town| {
        town.signal("client", "STOP");
        std::thread::sleep(OUTAGE);
        town.signal("client", "CONT");
    });
}

#[test]
fn transfers_outlive_a_client_that_is_cut_off_and_moves() {
    let Some(lab) = Lab::new() else { return };
    let mut town = Town::on_machines(PLAN, lab);
    town.start_all();
    impair_gateways(&town, 0.0);
    let [old, new] = [town.last_number("client"), 200];
    // Nobody is told: no connection ends by itself.
    transfers_outlive(&mut town, "the client's cable pulled", |town| {
        town.lab().set_plugged(old, false);
        std::thread::sleep(OUTAGE);
        town.lab().set_plugged(old, true);
    });
    transfers_outlive(&mut town, "the client's address changed", |town| {
        town.lab().readdress("client", Some(old), new);
    });
}

/// The packets that would go through it are lost, until nobody uses it any more.
#[test]
fn transfers_outlive_a_mix_that_is_killed_for_good() {
    let mut town = Town::on_loopback(Plan { mixes: 6, ..PLAN });
    town.start_all();
    impair_gateways(&town, 0.0);
    transfers_outlive(&mut town, "one of two mixes killed", |town| town.kill("mix-1"));
}

/// How a try to open a stream ends, and after how long.
fn try_to_open(town: &Town, target: SocketAddr) -> (u8, Duration) {
    let asked = Instant::now();
    (socks::reply_code(town.ends().proxy, &socks::ip(target)), asked.elapsed())
}

/// New streams go to the other one, then to none, then to the first again; those of the dead one end with
/// an error. Packets are lost all the time, so that it has to be found out who is silent.
#[test]
fn providers_are_killed_one_after_the_other() {
    const TIMED_OUT: u8 = 6;
    let origin = http();
    let mut town = Town::on_loopback(Plan { gateways: 3, providers: 2, ..PLAN });
    // The document that the client gets names both providers.
    town.start_without_client();
    town.start("client");
    town.wait_for("client", "socks5h://");
    for node in town.nodes() {
        town.impair(&node, "loss = 0.02\n");
    }
    let proxy = town.ends().proxy;
    let mut download = socks::connect(proxy, origin);
    download.write_all(b"GET /endless HTTP/1.1\r\n\r\n").unwrap();
    download.read_exact(&mut vec![0; SOME]).unwrap();
    let (sender, received) = std::sync::mpsc::channel();
    let sink = serve(move |mut stream| {
        stream.read_exact(&mut vec![0; SOME]).unwrap();
        sender.send(()).unwrap();
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let mut upload = socks::connect(proxy, sink);
    let uploading = std::thread::spawn(move || while upload.write_all(&[0; 16 * 1024]).is_ok() {});
    received.recv_timeout(DEADLINE).unwrap();

    let first = town.provider_in_use();
    town.kill(&first);
    let killed = Instant::now();
    let mut failed = 0;
    while try_to_open(&town, origin).0 != SERVED {
        failed += 1;
        // The first one is served within 5 s, unless the machine is busy.
        assert!(failed < 3, "the other one is not used");
    }
    println!("one of two providers killed: new streams after {:.1?}", killed.elapsed());
    let transfer = Transfer::down(&town.ends());
    transfer.wait_for(SOME);
    transfer.finish();

    let second = if first == "provider-1" { "provider-2" } else { "provider-1" };
    town.kill(second);
    for _ in 0..2 {
        let (code, told) = try_to_open(&town, origin);
        assert_eq!(code, TIMED_OUT);
        // Within 10 s; a busy machine gets more.
        assert!(told < Duration::from_secs(20), "{told:?}");
        println!("no provider is left: told after {told:.1?}");
    }
    town.start(&first);
    let started = Instant::now();
    while try_to_open(&town, origin).0 != SERVED {
        assert!(started.elapsed() < DEADLINE, "the provider is never found again");
    }
    println!("one is back: new streams after {:.1?}", started.elapsed());

    // An end would mean that all has been said.
    assert!(std::io::copy(&mut download, &mut std::io::sink()).is_err());
    uploading.join().unwrap();
    println!("the streams of the first one ended after {:.1?}", killed.elapsed());
}

#[test]
fn a_target_that_never_answers_holds_up_nothing_else() {
    let network = shared_network();
    let proxy = network.proxy.address;
    let silent = serve(|stream| {
        // Reads nothing, writes nothing, until the program leaves.
        let _ = stream.peek(&mut [0]);
        std::thread::sleep(DEADLINE);
    });
    let mut held = socks::connect(proxy, silent);
    // More than anybody holds for it: at some point writing must wait.
    held.set_nonblocking(true).unwrap();
    let mut written = 0;
    let mut last_written = Instant::now();
    while last_written.elapsed() < Duration::from_secs(2) {
        match held.write(&[0; 64 * 1024]) {
            Ok(count) => (written, last_written) = (written + count, Instant::now()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        assert!(written < 64 * SOME, "nothing bounds what is held for it");
    }
    let ends =
        crate::transfer::Ends { proxy, program: Default::default(), server: Default::default() };
    let transfers = [Transfer::down(&ends), Transfer::up(&ends)];
    for transfer in &transfers {
        transfer.wait_for(2 * SOME);
    }
    for transfer in transfers {
        transfer.finish();
    }
    println!("a target that never answers: {written} bytes are held for it");
}

/// Whatever a program leaves behind, its target hears of the end, and others go on.
#[test]
fn programs_may_leave_at_any_moment() {
    const PROGRAMS: usize = 60;
    const GREETING_AND_REQUEST: usize = 3 + 10;
    let network = shared_network();
    let proxy = network.proxy.address;
    let [begun, ended] = [(); 2].map(|()| Arc::<AtomicUsize>::default());
    let (counts, target) = ([begun.clone(), ended.clone()], move |mut stream: TcpStream| {
        begun.fetch_add(1, Ordering::Relaxed);
        let mut writer = stream.try_clone().unwrap();
        let writing =
            std::thread::spawn(move || while writer.write_all(&[0; 16 * 1024]).is_ok() {});
        // Both end only when the program has left: nobody else ends this stream.
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
        writing.join().unwrap();
        ended.fetch_add(1, Ordering::Relaxed);
    });
    let target = serve(target);
    let request =
        [&[5, 1, 0, 5, socks::CONNECT, 0][..], &socks::ip(target), &[7; 100_000]].concat();
    let mut rng = StdRng::seed_from_u64(6);
    for program in 0..PROGRAMS {
        // Before, during and after the handshake; while bytes go in both directions.
        let mut stream = socks::dial(proxy);
        let (written, read) = match program % 3 {
            0 => (rng.random_range(0..=GREETING_AND_REQUEST), 0),
            1 => (rng.random_range(GREETING_AND_REQUEST..request.len()), 0),
            _ => (rng.random_range(GREETING_AND_REQUEST..request.len()), 200_000),
        };
        stream.write_all(&request[..written]).unwrap();
        // Closed with unread bytes, it is reset.
        stream.read_exact(&mut vec![0; rng.random_range(0..=read)]).unwrap();
    }
    let transfer = Transfer::down(&ends(proxy));
    transfer.wait_for(SOME);
    transfer.finish();
    let counts = || counts.clone().map(|count| count.load(Ordering::Relaxed));
    let waiting = Instant::now();
    while counts()[0] != counts()[1] || counts()[0] < PROGRAMS / 3 {
        assert!(waiting.elapsed() < DEADLINE, "{:?} streams begun and ended", counts());
        std::thread::sleep(Duration::from_millis(20));
    }
}
