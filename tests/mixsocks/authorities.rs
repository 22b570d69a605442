//! Three authorities, of whom one fails in one way after the other, while the network carries a stream.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use mixsocks_common::keys::IdentityKey;
use mixsocks_common::topology::{Authorities, SignedTopology, sign};

use crate::process::run;
use crate::servers::{body, http};
use crate::town::{Plan, Town, authority};

const EPOCHS: u64 = 3;
const PLAN: Plan = Plan { authorities: 3, epoch: 6, valid_epochs: 3, ..Plan::SMALL };

/// A stream that runs through all of a phase, and the bytes that it must bring.
const STREAM_BYTES: usize = 2 * 1024 * 1024;

/// Runs a stream while `phase` happens; both must end well.
fn with_stream(town: &Town, origin: SocketAddr, seconds: u32, phase: impl FnOnce()) {
    let to = town.folder("stream");
    let url = format!("http://{origin}/slow/{STREAM_BYTES}/7/{seconds}");
    let curl = town.curl(&url, &to);
    phase();
    let ended = curl.wait();
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(std::fs::read(&to).unwrap() == body(STREAM_BYTES, 7), "other bytes came");
}

#[test]
fn an_authority_may_be_down_slow_or_lie() {
    let origin = http();
    let small = format!("http://{origin}/bytes/10000/3");
    let mut town = Town::on_loopback(PLAN);
    town.start_all();
    town.assert_carries(&small, &body(10_000, 3));
    let first = document(&town);
    let seconds = PLAN.epoch * u32::try_from(EPOCHS).unwrap();

    town.kill(&authority(0));
    with_stream(&town, origin, seconds, || town.wait_epochs(EPOCHS));
    town.start(&authority(0));

    // Half of the time it does nothing.
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (town, stopped) = (&town, stop.clone());
        scope.spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for signal in ["STOP", "CONT"] {
                    town.signal(&authority(1), signal);
                    std::thread::sleep(Duration::from_millis(700));
                }
            }
        });
        with_stream(town, origin, seconds, || town.wait_epochs(EPOCHS));
        stop.store(true, Ordering::Relaxed);
    });

    town.kill(&authority(0));
    let liar = Liar::start(&town, first);
    with_stream(&town, origin, seconds, || town.wait_epochs(EPOCHS));
    assert!(liar.told.load(Ordering::Relaxed) >= liar.lies, "nobody asked the liar");
    town.assert_carries(&small, &body(10_000, 3));

    // One is left: the document in force lives until its end, and that is told.
    town.kill(&authority(1));
    let status = town.status_with("had no document");
    assert!(status.contains("in force  for another"), "{status}");
    town.assert_carries(&small, &body(10_000, 3));
    loop {
        let mut command = crate::process::mixsocks();
        let status = run(command.args(["network", "status"]).args(town.network()));
        if status.stdout.contains("has ended") {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let curl = town.curl(&small, &town.folder("nothing")).wait();
    assert!(!curl.status.success(), "it went on without a document");

    // It comes back when they do.
    drop(liar);
    town.start(&authority(0));
    town.start(&authority(1));
    town.wait_epochs(1);
    while !town.curl(&small, &town.folder("again")).wait().status.success() {}
}

/// The file that the first authority serves.
fn document(town: &Town) -> Vec<u8> {
    let address = town.url(0).strip_prefix("http://").unwrap().to_owned();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /topology HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let head = answer.windows(4).position(|at| at == b"\r\n\r\n").unwrap();
    answer.split_off(head + 4)
}

/// In the place of the first authority, with its key: it serves documents that nobody must take, and
/// sends the others what says nothing.
struct Liar {
    told: Arc<AtomicUsize>,
    lies: usize,
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Liar {
    fn start(town: &Town, old: Vec<u8>) -> Self {
        let address: SocketAddr = town.url(0).strip_prefix("http://").unwrap().parse().unwrap();
        let lies = Arc::new(lies(town, old));
        let count = lies.len();
        let (told, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let listener = TcpListener::bind(address).unwrap();
        let (counter, stopped) = (told.clone(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (lies, counter) = (lies.clone(), counter.clone());
                std::thread::spawn(move || drop(lie(stream, &lies, &counter)));
            }
        });
        let others = [1, 2].map(|at| town.url(at).strip_prefix("http://").unwrap().to_owned());
        let stopped = stop.clone();
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for other in &others {
                    // They refuse it, or are gone.
                    drop(post(other, &[7; 300]));
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        Self { told, lies: count, address, stop }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // So that it notices.
        drop(TcpStream::connect(self.address));
    }
}

/// An old document, another one with the liar's signature alone, one with a signature that is changed,
/// and no document at all.
fn lies(town: &Town, old: Vec<u8>) -> Vec<Vec<u8>> {
    let key = std::fs::read_to_string(town.folder(&authority(0)).join("authority.key")).unwrap();
    let mut seed = [0; 32];
    assert_eq!(bs58::decode(key.trim()).onto(&mut seed), Ok(32));
    let key = IdentityKey::from_bytes(&seed);
    assert_eq!(key.identity().to_string(), town.key(0));
    let keys = (0..3).map(|number| town.key(number).parse().unwrap());
    let authorities = Authorities::new(keys, 2).unwrap();
    let mut other = SignedTopology::read(&old, &authorities).unwrap().into_topology();
    other.epoch += 1_000;
    let other = sign(&other, &[&key]).into_bytes();
    let mut changed = old.clone();
    let at = changed.windows(10).position(|at| at == b"signature ").unwrap() + 80;
    changed[at] = if changed[at] == b'2' { b'3' } else { b'2' };
    vec![old, other, changed, b"nothing".to_vec()]
}

fn lie(stream: TcpStream, lies: &[Vec<u8>], told: &AtomicUsize) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let body: &[u8] = match request.starts_with("GET /topology") {
        true => &lies[told.fetch_add(1, Ordering::Relaxed) % lies.len()],
        false => &[7; 104],
    };
    let mut stream = stream;
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

fn post(to: &str, body: &[u8]) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    let length = body.len();
    let head = format!("POST /authority HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}
