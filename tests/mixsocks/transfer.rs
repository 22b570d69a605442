//! Transfers that go on until they have seen enough, and tell for how long they stood still.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::lab::Place;
use crate::process::DEADLINE;
use crate::servers::{body, serve};
use crate::socks;

/// What is written at a time.
const PIECE: usize = 32 * 1024;
/// How much is under way at most, so that what is left at the end takes no long time.
const AHEAD: usize = 512 * 1024;
/// A test that writes more waits for something that does not happen.
const MAX_PIECES: u64 = 8 * 1024;

/// Where a transfer begins and ends.
#[derive(Clone)]
pub(crate) struct Ends {
    pub(crate) proxy: SocketAddr,
    /// Where the program is that uses the proxy.
    pub(crate) program: Place,
    pub(crate) server: Place,
}

impl Ends {
    /// A server where the provider finds it.
    fn serve(&self, handle: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
        let place = self.server.clone();
        let start = move || {
            place.enter();
            serve(handle)
        };
        std::thread::spawn(start).join().unwrap()
    }

    /// What the program does with a stream to this server.
    fn run<T: Send + 'static>(
        &self,
        server: SocketAddr,
        program: impl FnOnce(TcpStream) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let Self { proxy, program: place, .. } = self.clone();
        std::thread::spawn(move || {
            place.enter();
            program(socks::connect(proxy, server))
        })
    }
}

/// A download or an upload under way.
pub(crate) struct Transfer {
    name: &'static str,
    progress: Progress,
    enough: Arc<AtomicBool>,
    /// Yields what was sent and what arrived.
    thread: JoinHandle<[Sum; 2]>,
}

/// The number of bytes, and their SHA-256.
#[derive(Debug, PartialEq, Eq)]
struct Sum(usize, [u8; 32]);

/// What has arrived so far.
#[derive(Clone, Default)]
struct Progress(Arc<(Mutex<Arrived>, Condvar)>);

#[derive(Default)]
struct Arrived {
    bytes: usize,
    last: Option<Instant>,
    longest_gap: Duration,
}

impl Progress {
    fn add(&self, bytes: usize) {
        let mut arrived = self.0.0.lock().unwrap();
        let now = Instant::now();
        if let Some(last) = arrived.last.replace(now) {
            arrived.longest_gap = arrived.longest_gap.max(now - last);
        }
        arrived.bytes += bytes;
        self.0.1.notify_all();
    }

    /// Reads to the end of what arrives.
    fn read_all(&self, mut stream: &TcpStream) -> std::io::Result<Sum> {
        let (mut hash, mut piece) = (Sha256::new(), vec![0; PIECE]);
        let mut bytes = 0;
        loop {
            let count = stream.read(&mut piece)?;
            if count == 0 {
                return Ok(Sum(bytes, hash.finalize().into()));
            }
            self.add(count);
            hash.update(&piece[..count]);
            bytes += count;
        }
    }

    /// Waits until so many bytes have arrived; `false` if that does not happen.
    fn wait_for(&self, bytes: usize) -> bool {
        let (arrived, changed) = &*self.0;
        let still = |arrived: &mut Arrived| arrived.bytes < bytes;
        let waited = changed.wait_timeout_while(arrived.lock().unwrap(), DEADLINE, still);
        !waited.unwrap().1.timed_out()
    }
}

/// Writes until it is enough, and ends the stream.
fn write_until(
    mut stream: &TcpStream,
    enough: &AtomicBool,
    arrived: &Progress,
) -> std::io::Result<Sum> {
    let mut hash = Sha256::new();
    let mut bytes: usize = 0;
    for seed in 0..MAX_PIECES {
        if enough.load(Ordering::Relaxed) {
            stream.shutdown(Shutdown::Write)?;
            return Ok(Sum(bytes, hash.finalize().into()));
        }
        if !arrived.wait_for(bytes.saturating_sub(AHEAD)) {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        let piece = body(PIECE, seed);
        stream.write_all(&piece)?;
        hash.update(&piece);
        bytes += piece.len();
    }
    panic!("{bytes} bytes were not enough");
}

impl Transfer {
    /// From a server to a program.
    pub(crate) fn down(ends: &Ends) -> Self {
        let (progress, enough) = (Progress::default(), Arc::<AtomicBool>::default());
        let (sender, sent) = std::sync::mpsc::channel();
        let (until, arrived) = (enough.clone(), progress.clone());
        let server =
            ends.serve(move |stream| drop(sender.send(write_until(&stream, &until, &arrived))));
        let arrived = progress.clone();
        let thread = ends.run(server, move |stream| {
            let arrived = arrived.read_all(&stream).unwrap();
            [sent.recv_timeout(DEADLINE).unwrap().unwrap(), arrived]
        });
        Self { name: "download", progress, enough, thread }
    }

    /// From a program to a server.
    pub(crate) fn up(ends: &Ends) -> Self {
        let (progress, enough) = (Progress::default(), Arc::<AtomicBool>::default());
        let (sender, received) = std::sync::mpsc::channel();
        let arrived = progress.clone();
        let server = ends.serve(move |stream| drop(sender.send(arrived.read_all(&stream))));
        let (until, arrived) = (enough.clone(), progress.clone());
        let thread = ends.run(server, move |mut stream| {
            let sent = write_until(&stream, &until, &arrived).unwrap();
            // The server's end is the sign that it has all.
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
            [sent, received.recv_timeout(DEADLINE).unwrap().unwrap()]
        });
        Self { name: "upload", progress, enough, thread }
    }

    /// How many bytes have arrived.
    pub(crate) fn bytes(&self) -> usize {
        self.progress.0.0.lock().unwrap().bytes
    }

    /// Waits until so many bytes have arrived.
    pub(crate) fn wait_for(&self, bytes: usize) {
        let comes = self.progress.wait_for(bytes);
        assert!(comes, "{}: {} bytes of {bytes}", self.name, self.bytes());
    }

    /// Ends it, and asserts that what was sent has arrived. Returns the longest time in which nothing
    /// arrived.
    pub(crate) fn finish(self) -> Duration {
        self.enough.store(true, Ordering::Relaxed);
        let [sent, arrived] = self.thread.join().unwrap();
        assert_eq!(arrived, sent, "{}", self.name);
        self.progress.0.0.lock().unwrap().longest_gap
    }
}
