//! Hand-written SOCKS5 programs against the listener, with a mixnet that does as it is told.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use proptest::prelude::*;
use tokio::io::{DuplexStream, ReadBuf, duplex};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;

const PIPE_BYTES: usize = 64 * 1024;
const HELLO: [u8; 3] = [5, 1, 0];
const HELLO_ACCEPTED: [u8; 2] = [5, 0];

/// A stream whose end, drop and reset show in a [`Probe`], and that a probe can break.
struct Watched {
    inner: DuplexStream,
    broken: Option<oneshot::Receiver<()>>,
    seen: Arc<Seen>,
    _alive: oneshot::Sender<Infallible>,
}

#[derive(Default)]
struct Seen {
    shut_down: AtomicBool,
    reset: AtomicBool,
}

struct Probe {
    seen: Arc<Seen>,
    breaks: Option<oneshot::Sender<()>>,
    dropped: oneshot::Receiver<Infallible>,
}

impl Probe {
    fn break_stream(&mut self) {
        self.breaks.take().unwrap().send(()).unwrap();
    }

    async fn dropped(&mut self) {
        assert!((&mut self.dropped).await.is_err());
    }

    fn was_shut_down(&self) -> bool {
        self.seen.shut_down.load(Ordering::SeqCst)
    }

    fn was_reset(&self) -> bool {
        self.seen.reset.load(Ordering::SeqCst)
    }
}

/// A watched stream, the other end of it, and the probe.
fn watched(pipe_bytes: usize) -> (Watched, DuplexStream, Probe) {
    let (inner, far) = duplex(pipe_bytes);
    let (breaks, broken) = oneshot::channel();
    let (alive, dropped) = oneshot::channel();
    let seen = Arc::<Seen>::default();
    let probe = Probe { seen: seen.clone(), breaks: Some(breaks), dropped };
    (Watched { inner, broken: Some(broken), seen, _alive: alive }, far, probe)
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(broken) = &mut self.broken
            && let Poll::Ready(order) = Pin::new(broken).poll(cx)
        {
            self.broken = None;
            if order.is_ok() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
        }
        Pin::new(&mut self.inner).poll_read(cx, out)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seen.shut_down.store(true, Ordering::SeqCst);
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl Local for Watched {
    fn reset_on_drop(&mut self) {
        self.seen.reset.store(true, Ordering::SeqCst);
    }
}

/// Connections, and errors of accepting, from a channel.
struct Arrivals(mpsc::UnboundedReceiver<io::Result<Watched>>);

impl Accept for Arrivals {
    type Local = Watched;

    async fn accept(&mut self) -> io::Result<Watched> {
        match self.0.recv().await {
            Some(arrival) => arrival,
            None => pending().await,
        }
    }
}

/// A mixnet that hands each OPEN to the test.
#[derive(Clone)]
struct Mixnet(mpsc::UnboundedSender<Opening>);

struct Opening {
    target: Target,
    early: Bytes,
    answer: oneshot::Sender<Result<Watched, OpenError>>,
}

impl Opening {
    /// Opens; returns the mixnet's end of the stream.
    fn accept(self) -> (DuplexStream, Probe) {
        let (stream, far, probe) = watched(PIPE_BYTES);
        assert!(self.answer.send(Ok(stream)).is_ok());
        (far, probe)
    }

    fn refuse(self, error: OpenError) {
        assert!(self.answer.send(Err(error)).is_ok());
    }
}

impl OpenStream for Mixnet {
    type Stream = Watched;

    async fn open(&self, target: Target, early: Bytes) -> Result<Watched, OpenError> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Opening { target, early, answer }).map_err(|_| OpenError::Closed)?;
        answered.await.map_err(|_| OpenError::Closed)?
    }
}

/// A listener over pipes.
struct Port {
    arrivals: mpsc::UnboundedSender<io::Result<Watched>>,
    opens: mpsc::UnboundedReceiver<Opening>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Port {
    fn start() -> Self {
        Self::with(None, MAX_CONNECTIONS)
    }

    fn with(credentials: Option<Credentials>, max_connections: usize) -> Self {
        let credentials = credentials.map(Arc::new);
        Self::of(Manner { credentials, is_optimistic: false }, max_connections)
    }

    fn of(manner: Manner, max_connections: usize) -> Self {
        let (arrivals, arrived) = mpsc::unbounded_channel();
        let (opened, opens) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async move {
            // A dropped sender does not stop the port.
            if stopped.await.is_err() {
                pending().await
            }
        };
        let task = tokio::spawn(serve(
            Arrivals(arrived),
            manner,
            max_connections,
            Mixnet(opened),
            stopped,
        ));
        Self { arrivals, opens, stop, task }
    }

    fn connect(&self) -> (DuplexStream, Probe) {
        let (local, program, probe) = watched(PIPE_BYTES);
        assert!(self.arrivals.send(Ok(local)).is_ok());
        (program, probe)
    }

    /// A program that has asked for `target`, and its pending OPEN.
    async fn request(&mut self, target: &str) -> (DuplexStream, Probe, Opening) {
        let (mut program, probe) = self.connect();
        program.write_all(&HELLO).await.unwrap();
        expect(&mut program, &HELLO_ACCEPTED).await;
        program.write_all(&connect_request(target)).await.unwrap();
        let opening = self.opens.recv().await.unwrap();
        (program, probe, opening)
    }

    /// An open stream: the program's end and the mixnet's end.
    async fn open(&mut self) -> (DuplexStream, Probe, DuplexStream, Probe) {
        let (mut program, local, opening) = self.request("example.com:443").await;
        let (far, mix) = opening.accept();
        expect(&mut program, &reply(0)).await;
        (program, local, far, mix)
    }
}

/// CONNECT, in the wire format that targets share with RFC 1928.
fn connect_request(target: &str) -> Vec<u8> {
    let mut request = vec![5, 1, 0];
    target.parse::<Target>().unwrap().encode(&mut request);
    request
}

fn reply(code: u8) -> [u8; 10] {
    [5, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

async fn expect(stream: &mut (impl AsyncRead + Unpin), expected: &[u8]) {
    let mut bytes = vec![0; expected.len()];
    stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, expected);
}

async fn expect_end(stream: &mut (impl AsyncRead + Unpin), expected: &[u8]) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(expected));
}

/// What a program gets that sends `bytes` and then waits for the end.
async fn answer_to(port: &Port, bytes: &[u8]) -> Vec<u8> {
    let (mut program, _) = port.connect();
    program.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    program.read_to_end(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn every_outcome_has_its_reply_code() {
    let mut port = Port::start();
    let refused = OpenError::Refused;
    for (error, code) in [
        (refused(OpenOutcome::Failed), 1),
        (refused(OpenOutcome::Forbidden), 2),
        (refused(OpenOutcome::NetworkUnreachable), 3),
        (refused(OpenOutcome::HostUnreachable), 4),
        (refused(OpenOutcome::Refused), 5),
        (refused(OpenOutcome::TimedOut), 6),
        (refused(OpenOutcome::Connected), 1),
        (OpenError::ProviderSilent, 6),
        (OpenError::NoGateway, 1),
        (OpenError::TooManyStreams, 1),
        (OpenError::Closed, 1),
    ] {
        let (mut program, local, opening) = port.request("example.com:80").await;
        opening.refuse(error);
        expect_end(&mut program, &reply(code)).await;
        assert!(local.was_shut_down() && !local.was_reset());
    }
}

#[tokio::test]
async fn every_address_type_reaches_the_mixnet() {
    let mut port = Port::start();
    for text in ["example.com:443", "192.0.2.7:80", "[2001:db8::1]:22", "x:65535"] {
        let (_program, _, opening) = port.request(text).await;
        assert_eq!(opening.target, text.parse().unwrap());
        assert!(opening.early.is_empty());
    }
    // An address written as a name is an address.
    let (mut program, _) = port.connect();
    program.write_all(&HELLO).await.unwrap();
    program.write_all(b"\x05\x01\x00\x03\x09192.0.2.7\x00\x50").await.unwrap();
    let opening = port.opens.recv().await.unwrap();
    assert_eq!(opening.target, Target::Ip("192.0.2.7:80".parse().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn the_reply_waits_for_the_outcome() {
    let mut port = Port::start();
    let (mut program, _, opening) = port.request("example.com:80").await;
    let mut byte = [0];
    timeout(Duration::from_secs(60), program.read(&mut byte)).await.unwrap_err();
    let (_far, _mix) = opening.accept();
    expect(&mut program, &reply(0)).await;
}

fn optimistic() -> Port {
    Port::of(Manner { credentials: None, is_optimistic: true }, MAX_CONNECTIONS)
}

#[tokio::test(start_paused = true)]
async fn an_optimistic_port_replies_at_once_and_sends_the_first_bytes_along() {
    let mut port = optimistic();
    let (mut program, _) = port.connect();
    program.write_all(&HELLO).await.unwrap();
    expect(&mut program, &HELLO_ACCEPTED).await;
    program.write_all(&connect_request("example.com:80")).await.unwrap();
    expect(&mut program, &reply(0)).await;
    program.write_all(b"GET / HTTP/1.0").await.unwrap();
    let opening = port.opens.recv().await.unwrap();
    assert_eq!(&*opening.early, b"GET / HTTP/1.0");
    program.write_all(b" and more").await.unwrap();
    let (mut far, _mix) = opening.accept();
    expect(&mut far, b" and more").await;
    far.write_all(b"answer").await.unwrap();
    expect(&mut program, b"answer").await;
}

#[tokio::test(start_paused = true)]
async fn an_optimistic_port_does_not_wait_long_for_a_program_that_listens_first() {
    let mut port = optimistic();
    let began = Instant::now();
    let (mut program, _, opening) = port.request("example.com:25").await;
    assert!(opening.early.is_empty());
    assert_eq!(began.elapsed(), FIRST_BYTES_WAIT);
    let (mut far, _mix) = opening.accept();
    expect(&mut program, &reply(0)).await;
    far.write_all(b"220 hello").await.unwrap();
    expect(&mut program, b"220 hello").await;
}

#[tokio::test(start_paused = true)]
async fn an_optimistic_port_resets_what_cannot_be_opened() {
    let mut port = optimistic();
    let (mut program, local, opening) = port.request("example.com:80").await;
    opening.refuse(OpenError::Refused(OpenOutcome::Refused));
    expect_end(&mut program, &reply(0)).await;
    assert!(local.was_reset());
}

#[tokio::test]
async fn a_handshake_may_come_byte_by_byte() {
    let mut port = Port::start();
    let (mut program, _) = port.connect();
    let mut handshake = vec![5, 2, 0, 2, 1, 4];
    handshake.extend_from_slice(b"user\x00");
    handshake.extend(connect_request("example.com:443"));
    for byte in handshake {
        program.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let opening = port.opens.recv().await.unwrap();
    assert_eq!(opening.target, "example.com:443".parse().unwrap());
    let (_far, _mix) = opening.accept();
    expect(&mut program, &[5, 2, 1, 0]).await;
    expect(&mut program, &reply(0)).await;
}

#[tokio::test]
async fn early_bytes_travel_with_the_open_and_none_is_lost() {
    for len in [1usize, 517, MAX_EARLY_BYTES, MAX_EARLY_BYTES + 1, 5000, 40_000] {
        let mut port = Port::start();
        let (mut program, _) = port.connect();
        let data: Vec<u8> = (0..=250).cycle().take(len).collect();
        let mut all = HELLO.to_vec();
        all.extend(connect_request("example.com:443"));
        all.extend(&data);
        program.write_all(&all).await.unwrap();
        let opening = port.opens.recv().await.unwrap();
        let early = opening.early.clone();
        assert_eq!(early.len(), len.min(MAX_EARLY_BYTES));
        let (mut far, _mix) = opening.accept();
        program.write_all(b"after").await.unwrap();
        program.shutdown().await.unwrap();
        let mut received = early.to_vec();
        far.read_to_end(&mut received).await.unwrap();
        assert!(received == [&data[..], b"after"].concat(), "{len}");
    }
}

#[tokio::test]
async fn bytes_sent_while_the_open_is_pending_are_kept() {
    let mut port = Port::start();
    let (mut program, _, opening) = port.request("example.com:443").await;
    let data = vec![7; 3 * MAX_PENDING_BYTES];
    program.write_all(&data).await.unwrap();
    let (mut far, _mix) = opening.accept();
    expect(&mut program, &reply(0)).await;
    program.shutdown().await.unwrap();
    let mut received = Vec::new();
    far.read_to_end(&mut received).await.unwrap();
    assert!(received == data);
}

#[tokio::test]
async fn a_program_that_said_all_in_advance_may_end_its_direction() {
    let mut port = Port::start();
    let (mut program, _) = port.connect();
    let request = [&HELLO[..], &connect_request("example.com:80"), b"GET /"].concat();
    program.write_all(&request).await.unwrap();
    program.shutdown().await.unwrap();
    let opening = port.opens.recv().await.unwrap();
    assert_eq!(&opening.early[..], b"GET /");
    let (mut far, _mix) = opening.accept();
    expect_end(&mut far, b"").await;
    far.write_all(b"answer").await.unwrap();
    drop(far);
    expect(&mut program, &[&HELLO_ACCEPTED[..], &reply(0)].concat()).await;
    expect_end(&mut program, b"answer").await;
}

#[tokio::test]
async fn unusable_requests_get_their_reply() {
    let port = Port::start();
    let long = [&b"\x05\x01\x00\x03\xff"[..], &[b'a'; 255], b"\x00\x50"].concat();
    let requests: [(&[u8], u8); 9] = [
        (b"\x05\x02\x00\x01\x01\x01\x01\x01\x00\x50", 7),
        (b"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", 7),
        (b"\x05\xff\x00\x01\x01\x01\x01\x01\x00\x50", 7),
        (b"\x05\x01\x00\x02\x01\x01\x01\x01\x00\x50", 8),
        (b"\x05\x01\x00\x00", 8),
        (b"\x05\x01\x00\x03\x00\x00\x50", 4),
        (b"\x05\x01\x00\x03\x03a b\x00\x50", 4),
        (b"\x05\x01\x00\x03\x02\xff\xfe\x00\x50", 4),
        (&long, 4),
    ];
    for (request, code) in requests {
        let answer = answer_to(&port, &[&HELLO[..], request].concat()).await;
        assert_eq!(answer, [&HELLO_ACCEPTED[..], &reply(code)].concat(), "{request:?}");
    }
    // No version 5 where there has to be one.
    let answer = answer_to(&port, b"\x05\x01\x00\x04\x01\x00\x01\x01\x01\x01\x01\x00\x50").await;
    assert_eq!(answer, HELLO_ACCEPTED);
}

#[tokio::test]
async fn other_protocols() {
    let port = Port::start();
    for request in
        ["GET http://example.com/ HTTP/1.1\r\n\r\n", "CONNECT a:443 HTTP/1.1\r\n", "PRI "]
    {
        let answer = answer_to(&port, request.as_bytes()).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("SOCKS5, not as HTTP"), "{answer}");
    }
    let socks4 = b"\x04\x01\x00\x50\x01\x01\x01\x01user\x00";
    assert_eq!(answer_to(&port, socks4).await, [0, 0x5b, 0, 0, 0, 0, 0, 0]);
    let garbage: [&[u8]; 6] = [
        b"\x16\x03\x01\x02\x00",
        b"\x00",
        b" GET /",
        b"get / HTTP/1.1",
        b"GETTINGTIREDOFTHISXX ",
        b"GE\0",
    ];
    for bytes in garbage {
        assert!(answer_to(&port, bytes).await.is_empty(), "{bytes:?}");
    }
}

fn credentials() -> Option<Credentials> {
    Some(Credentials::new("user", "secret").unwrap())
}

fn password(user: &str, password: &str) -> Vec<u8> {
    let len = |text: &str| u8::try_from(text.len()).unwrap();
    [&[1, len(user)], user.as_bytes(), &[len(password)], password.as_bytes()].concat()
}

#[tokio::test]
async fn configured_credentials_are_required() {
    let mut port = Port::with(credentials(), MAX_CONNECTIONS);
    // No method but "none" on offer, no method at all, only an unknown one.
    for hello in [&[5, 1, 0][..], &[5, 0], &[5, 1, 1]] {
        assert_eq!(answer_to(&port, hello).await, [5, 0xff]);
    }
    for (user, given) in [("user", "wrong"), ("other", "secret"), ("user", ""), ("", "")] {
        let bytes = [&[5, 2, 0, 2], &password(user, given)[..]].concat();
        assert_eq!(answer_to(&port, &bytes).await, [5, 2, 1, 1]);
    }
    // A wrong version of the sub-negotiation.
    assert_eq!(answer_to(&port, b"\x05\x01\x02\x02\x04user\x06secret").await, [5, 2]);

    let (mut program, _) = port.connect();
    program.write_all(&[5, 2, 0, 2]).await.unwrap();
    expect(&mut program, &[5, 2]).await;
    program.write_all(&password("user", "secret")).await.unwrap();
    expect(&mut program, &[1, 0]).await;
    program.write_all(&connect_request("example.com:80")).await.unwrap();
    assert_eq!(port.opens.recv().await.unwrap().target, "example.com:80".parse().unwrap());
}

#[tokio::test]
async fn without_configured_credentials_any_are_accepted() {
    let mut port = Port::start();
    let long = "x".repeat(255);
    for (user, given) in [("any", "thing"), ("name", ""), ("", ""), (&long, &long)] {
        let (mut program, _) = port.connect();
        program.write_all(&[5, 2, 0, 2]).await.unwrap();
        expect(&mut program, &[5, 2]).await;
        program.write_all(&password(user, given)).await.unwrap();
        expect(&mut program, &[1, 0]).await;
        program.write_all(&connect_request("example.com:80")).await.unwrap();
        port.opens.recv().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_handshake_is_closed() {
    let port = Port::start();
    let started: [&[u8]; 7] = [
        b"",
        b"\x05",
        b"\x05\x02\x00",
        &HELLO,
        b"\x05\x01\x02\x01\x04us",
        b"GE",
        b"\x05\x01\x00\x05\x01\x00\x03\x09exa",
    ];
    for bytes in started {
        let start = Instant::now();
        answer_to(&port, bytes).await;
        assert_eq!(start.elapsed(), HANDSHAKE_TIMEOUT, "{bytes:?}");
    }
    // The limit is one for the whole: a byte every now and then does not extend it.
    let (mut program, mut local) = port.connect();
    let start = Instant::now();
    let drip = async {
        for byte in [5, 1, 0].into_iter().chain(connect_request("example.com:443")) {
            sleep(Duration::from_secs(1)).await;
            program.write_all(&[byte]).await?;
        }
        io::Result::Ok(())
    };
    assert!(tokio::join!(drip, local.dropped()).0.is_err());
    assert!(start.elapsed() <= HANDSHAKE_TIMEOUT + Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn the_program_may_end_its_direction_first() {
    let mut port = Port::start();
    let (mut program, mut local, mut far, mut mix) = port.open().await;
    program.write_all(b"question").await.unwrap();
    program.shutdown().await.unwrap();
    expect_end(&mut far, b"question").await;
    assert!(mix.was_shut_down());
    sleep(Duration::from_secs(60)).await;
    far.write_all(b"late answer").await.unwrap();
    expect(&mut program, b"late answer").await;
    sleep(Duration::from_secs(60)).await;
    far.write_all(b"later").await.unwrap();
    far.shutdown().await.unwrap();
    expect_end(&mut program, b"later").await;
    local.dropped().await;
    mix.dropped().await;
    assert!(!local.was_reset() && local.was_shut_down());
}

#[tokio::test(start_paused = true)]
async fn the_far_side_may_end_its_direction_first() {
    let mut port = Port::start();
    let (mut program, mut local, mut far, mut mix) = port.open().await;
    far.write_all(b"banner").await.unwrap();
    far.shutdown().await.unwrap();
    expect_end(&mut program, b"banner").await;
    assert!(local.was_shut_down() && !mix.was_shut_down());
    sleep(Duration::from_secs(60)).await;
    program.write_all(b"upload").await.unwrap();
    expect(&mut far, b"upload").await;
    sleep(Duration::from_secs(60)).await;
    program.write_all(b"more").await.unwrap();
    drop(program);
    expect_end(&mut far, b"more").await;
    local.dropped().await;
    mix.dropped().await;
    assert!(!local.was_reset() && mix.was_shut_down());
}

#[tokio::test(start_paused = true)]
async fn an_idle_stream_lives() {
    let mut port = Port::start();
    let (mut program, _local, mut far, _mix) = port.open().await;
    sleep(Duration::from_secs(24 * 60 * 60)).await;
    program.write_all(b"still").await.unwrap();
    expect(&mut far, b"still").await;
    far.write_all(b"here").await.unwrap();
    expect(&mut program, b"here").await;
}

#[tokio::test]
async fn a_broken_mix_stream_resets_the_program() {
    let mut port = Port::start();
    let (_program, mut local, _far, mut mix) = port.open().await;
    mix.break_stream();
    local.dropped().await;
    mix.dropped().await;
    assert!(local.was_reset() && !local.was_shut_down() && !mix.was_shut_down());
}

#[tokio::test]
async fn a_broken_program_resets_the_mix_stream() {
    let mut port = Port::start();
    let (_program, mut local, _far, mut mix) = port.open().await;
    local.break_stream();
    mix.dropped().await;
    assert!(!mix.was_shut_down());
}

#[tokio::test]
async fn a_program_that_leaves_gives_up_its_pending_open() {
    let mut port = Port::start();
    let (program, mut local, mut opening) = port.request("example.com:80").await;
    drop(program);
    opening.answer.closed().await;
    local.dropped().await;

    let (_program, mut local, mut opening) = port.request("example.com:80").await;
    local.break_stream();
    opening.answer.closed().await;
    local.dropped().await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let mut port = Port::with(None, 3);
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(port.open().await);
    }
    for _ in 0..5 {
        assert!(answer_to(&port, b"").await.is_empty());
    }
    let (program, mut local, far, _mix) = streams.pop().unwrap();
    drop((program, far));
    local.dropped().await;
    let (mut program, _, mut far, _) = port.open().await;
    program.write_all(b"works").await.unwrap();
    expect(&mut far, b"works").await;
}

#[tokio::test(start_paused = true)]
async fn errors_of_accepting_are_survived() {
    let mut port = Port::start();
    let start = Instant::now();
    for kind in [io::ErrorKind::ConnectionAborted, io::ErrorKind::Interrupted] {
        assert!(port.arrivals.send(Err(kind.into())).is_ok());
    }
    port.open().await;
    assert_eq!(start.elapsed(), Duration::ZERO);
    for _ in 0..10 {
        // EMFILE
        assert!(port.arrivals.send(Err(io::Error::from_raw_os_error(24))).is_ok());
    }
    port.open().await;
    assert_eq!(start.elapsed(), 10 * ACCEPT_PAUSE);
}

#[tokio::test]
async fn shutdown_resets_what_is_open() {
    let mut port = Port::start();
    let (_program, local, _far, mix) = port.open().await;
    let (mut waiting, _, mut opening) = port.request("example.com:80").await;
    port.stop.send(()).unwrap();
    port.task.await.unwrap();
    assert!(local.was_reset() && !mix.was_shut_down());
    opening.answer.closed().await;
    expect_end(&mut waiting, b"").await;
}

/// A mixnet that echoes everything.
#[derive(Clone)]
struct Echo;

impl OpenStream for Echo {
    type Stream = DuplexStream;

    async fn open(&self, _: Target, early: Bytes) -> Result<DuplexStream, OpenError> {
        let (near, mut far) = duplex(PIPE_BYTES);
        tokio::spawn(async move {
            far.write_all(&early).await?;
            let (mut read, mut write) = tokio::io::split(far);
            tokio::io::copy(&mut read, &mut write).await?;
            write.shutdown().await
        });
        Ok(near)
    }
}

async fn tcp_port<O: OpenStream>(opener: O) -> (SocketAddr, JoinHandle<()>) {
    let listener = SocksListener::bind(([127, 0, 0, 1], 0).into(), None).unwrap();
    let address = listener.local_addr().unwrap();
    (address, tokio::spawn(listener.serve(opener, pending())))
}

#[tokio::test]
async fn many_programs_over_tcp() {
    let (address, task) = tcp_port(Echo).await;
    let mut programs = JoinSet::new();
    for n in 0..300u32 {
        programs.spawn(async move {
            let mut program = TcpStream::connect(address).await.unwrap();
            program.write_all(&HELLO).await.unwrap();
            expect(&mut program, &HELLO_ACCEPTED).await;
            let mut request = connect_request("example.com:7");
            if n % 2 == 0 {
                request.extend(b"early");
            }
            program.write_all(&request).await.unwrap();
            expect(&mut program, &reply(0)).await;
            let data: Vec<u8> = n.to_be_bytes().repeat(5000);
            let (mut read, mut write) = program.split();
            let sent = async {
                write.write_all(&data).await.unwrap();
                write.shutdown().await.unwrap();
            };
            let mut echoed = Vec::new();
            let (_, result) = tokio::join!(sent, read.read_to_end(&mut echoed));
            result.unwrap();
            let early: &[u8] = if n % 2 == 0 { b"early" } else { b"" };
            assert!(echoed == [early, &data[..]].concat());
        });
    }
    while let Some(program) = programs.join_next().await {
        program.unwrap();
    }
    task.abort();
}

#[tokio::test]
async fn a_broken_mix_stream_is_a_reset_over_tcp() {
    let (opened, mut opens) = mpsc::unbounded_channel();
    let (address, task) = tcp_port(Mixnet(opened)).await;
    let mut program = TcpStream::connect(address).await.unwrap();
    program.write_all(&HELLO).await.unwrap();
    program.write_all(&connect_request("example.com:80")).await.unwrap();
    let (_far, mut mix) = opens.recv().await.unwrap().accept();
    expect(&mut program, &HELLO_ACCEPTED).await;
    expect(&mut program, &reply(0)).await;
    mix.break_stream();
    let error = program.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    // The other way round.
    let mut program = TcpStream::connect(address).await.unwrap();
    program.write_all(&HELLO).await.unwrap();
    program.write_all(&connect_request("example.com:80")).await.unwrap();
    let (_far, mut mix) = opens.recv().await.unwrap().accept();
    expect(&mut program, &HELLO_ACCEPTED).await;
    expect(&mut program, &reply(0)).await;
    program.set_zero_linger().unwrap();
    drop(program);
    mix.dropped().await;
    assert!(!mix.was_shut_down());
    task.abort();
}

#[tokio::test]
async fn a_refused_program_can_read_its_answer_over_tcp() {
    let (opened, mut opens) = mpsc::unbounded_channel();
    let (address, task) = tcp_port(Mixnet(opened)).await;
    let mut program = TcpStream::connect(address).await.unwrap();
    let request = [&HELLO[..], &connect_request("example.com:80"), &[9; 20_000]].concat();
    program.write_all(&request).await.unwrap();
    opens.recv().await.unwrap().refuse(OpenError::Refused(OpenOutcome::Refused));
    expect(&mut program, &HELLO_ACCEPTED).await;
    expect_end(&mut program, &reply(5)).await;
    task.abort();
}

/// Bytes that get some way into a handshake more often than plain noise does.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(HELLO.to_vec()),
        Just(vec![5, 2, 0, 2]),
        Just(vec![5, 1, 2]),
        Just(password("user", "secret")),
        Just(connect_request("example.com:443")),
        Just(connect_request("[2001:db8::1]:443")),
        Just(b"\x05\x01\x00\x03".to_vec()),
        Just(b"GET / HTTP/1.1\r\n".to_vec()),
        Just(vec![4, 1]),
        proptest::collection::vec(any::<u8>(), 0..300),
    ];
    (proptest::collection::vec(piece, 0..6), any::<prop::sample::Index>()).prop_map(
        |(pieces, cut)| {
            let mut bytes = pieces.concat();
            bytes.truncate(cut.index(bytes.len() + 1).max(bytes.len() / 2));
            bytes
        },
    )
}

proptest! {
    #[test]
    fn any_bytes_end_with_a_close(
        bytes in noise(),
        required: bool,
        opens: bool,
        ends: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut port = Port::with(credentials().filter(|_| required), MAX_CONNECTIONS);
            let (mut program, mut local) = port.connect();
            let mix = async {
                while let Some(opening) = port.opens.recv().await {
                    let (stream, _, _) = watched(PIPE_BYTES);
                    // The program may have left in the meantime.
                    let _ = opening.answer.send(if opens { Ok(stream) } else { Err(OpenError::Closed) });
                }
            };
            let talk = async {
                // The port may have closed in the meantime.
                let _ = program.write_all(&bytes).await;
                if ends {
                    let _ = program.shutdown().await;
                }
                program.read_to_end(&mut Vec::new()).await.unwrap();
                drop(program);
                local.dropped().await;
            };
            tokio::select! {
                () = talk => {}
                () = mix => unreachable!("the port lives"),
            }
            drop(port.arrivals);
            assert!(!port.task.is_finished());
        });
    }
}
