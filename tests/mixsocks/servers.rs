//! Servers at the far end: HTTP, a raw one, and a name server. Their threads end with the tests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// Starts a thread per connection to a new loopback port.
pub(crate) fn serve(handle: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let handle = handle.clone();
            std::thread::spawn(move || handle(stream));
        }
    });
    address
}

/// Scripts of the page of [`http`].
pub(crate) const PAGE_PARTS: usize = 20;

/// An HTTP server:
///
/// - `GET /bytes/<length>/<seed>` answers [`body`] of that length and seed;
/// - `GET /page` is a web page whose [`PAGE_PARTS`] scripts, `GET /part/<n>`, write "part <n>." into it;
/// - `POST /hash` answers the body's SHA-256 in hexadecimal;
/// - `GET /slow/<length>/<seed>/<seconds>` answers the same, evenly over that time;
/// - `GET /endless` never stops.
pub(crate) fn http() -> SocketAddr {
    // A client that leaves is none of this server's business.
    serve(|stream| drop(answer_http(stream)))
}

fn answer_http(stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        let lines = head.iter().filter_map(|line| line.split_once(": "));
        lines.clone().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    };
    let request: Vec<_> = head.first().map_or(vec![], |line| line.split(['/', ' ']).collect());
    let reply = match request[..] {
        ["GET", "", "bytes", length, seed, ..] => {
            body(length.parse().unwrap(), seed.parse().unwrap())
        }
        ["GET", "", "page", ..] => {
            let script = |part| format!("<script src=/part/{part}></script>");
            let scripts: String = (0..PAGE_PARTS).map(script).collect();
            format!("<!doctype html><title>page</title><body>{scripts}</body>").into_bytes()
        }
        ["GET", "", "part", part, ..] => format!("document.write('part {part}.')").into_bytes(),
        ["POST", "", "hash", ..] => {
            let length: usize = header("content-length").unwrap().parse().unwrap();
            if header("expect").is_some() {
                writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            let mut upload = vec![0; length];
            reader.read_exact(&mut upload)?;
            sha256(&upload).into_bytes()
        }
        ["GET", "", "slow", length, seed, seconds, ..] => {
            let reply = body(length.parse().unwrap(), seed.parse().unwrap());
            return answer_slowly(&mut writer, &reply, seconds.parse().unwrap());
        }
        ["GET", "", "endless", ..] => {
            writer.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            loop {
                writer.write_all(&[b'.'; 16 * 1024])?;
            }
        }
        // A test that only looks whether the port is open.
        _ => return Ok(()),
    };
    let length = reply.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    writer.write_all(head.as_bytes())?;
    writer.write_all(&reply)
}

/// Ten pieces a second.
fn answer_slowly(writer: &mut TcpStream, reply: &[u8], seconds: usize) -> std::io::Result<()> {
    let length = reply.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    writer.write_all(head.as_bytes())?;
    for piece in reply.chunks(length.div_ceil(10 * seconds)) {
        writer.write_all(piece)?;
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Ok(())
}

/// Bytes in which no place looks like another.
pub(crate) fn body(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        // A multiplicative generator modulo 2^64; only its high bits are any good.
        state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state ^= state >> 29;
        u8::try_from(state >> 56).unwrap()
    };
    (0..length).map(|_| next()).collect()
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A name server that alone knows the names under `mixsocks.test`:
/// `<anything>.here.mixsocks.test` is 127.0.0.1, every other name does not exist.
pub(crate) struct NameServer {
    address: SocketAddr,
    asked: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl NameServer {
    pub(crate) fn start() -> Self {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let asked: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
        let counts = asked.clone();
        std::thread::spawn(move || {
            let mut query = [0; 1500];
            while let Ok((length, peer)) = socket.recv_from(&mut query) {
                let (name, answer) = answer_query(&query[..length]);
                *counts.lock().unwrap().entry(name).or_default() += 1;
                let _ = socket.send_to(&answer, peer);
            }
        });
        Self { address, asked }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often a name was asked for, whatever the type of record.
    pub(crate) fn asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().get(name).copied().unwrap_or(0)
    }
}

/// The name asked for and the answer (RFC 1035 §4).
fn answer_query(query: &[u8]) -> (String, Vec<u8>) {
    const HEADER_LEN: usize = 12;
    const TYPE_A: [u8; 2] = [0, 1];
    let mut labels = Vec::new();
    let mut at = HEADER_LEN;
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).to_lowercase());
        at = end;
    }
    let question = &query[HEADER_LEN..at + 5];
    let name = labels.join(".");
    let known = name.ends_with(".here.mixsocks.test");
    let has_answer = known && query[at + 1..at + 3] == TYPE_A;
    let mut answer = query[..2].to_vec();
    // Response, authoritative, recursion available; code 0, or 3 for a name that does not exist.
    answer.extend([0x85, if known { 0x80 } else { 0x83 }]);
    answer.extend([0, 1, 0, u8::from(has_answer), 0, 0, 0, 0]);
    answer.extend(question);
    if has_answer {
        // Name: the question's; type A, class IN, 60 s, 4 bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
    }
    (name, answer)
}
