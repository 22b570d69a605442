//! A raw SOCKS5 client, which sees what `curl` hides.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::process::DEADLINE;

pub(crate) const CONNECT: u8 = 1;

/// A connection with a deadline for each read.
pub(crate) fn dial(proxy: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(proxy).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Asks for a target without authentication, and returns the connection and the reply's code.
pub(crate) fn request(proxy: SocketAddr, command: u8, target: &[u8]) -> (TcpStream, u8) {
    let mut stream = dial(proxy);
    stream.write_all(&[5, 1, 0]).unwrap();
    let mut method = [0; 2];
    stream.read_exact(&mut method).unwrap();
    assert_eq!(method, [5, 0]);
    stream.write_all(&[&[5, command, 0], target].concat()).unwrap();
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!((reply[0], reply[3]), (5, 1));
    (stream, reply[1])
}

/// The reply's code for a target.
pub(crate) fn reply_code(proxy: SocketAddr, target: &[u8]) -> u8 {
    request(proxy, CONNECT, target).1
}

/// An open stream to an address.
pub(crate) fn connect(proxy: SocketAddr, target: SocketAddr) -> TcpStream {
    let (stream, code) = request(proxy, CONNECT, &ip(target));
    assert_eq!(code, 0);
    stream
}

/// A target that is an IP address.
pub(crate) fn ip(target: SocketAddr) -> Vec<u8> {
    let mut bytes = match target {
        SocketAddr::V4(target) => [&[1][..], &target.ip().octets()].concat(),
        SocketAddr::V6(target) => [&[4][..], &target.ip().octets()].concat(),
    };
    bytes.extend(target.port().to_be_bytes());
    bytes
}

/// A target that is a name.
pub(crate) fn name(name: &str, port: u16) -> Vec<u8> {
    let mut bytes = vec![3, u8::try_from(name.len()).unwrap()];
    bytes.extend(name.as_bytes());
    bytes.extend(port.to_be_bytes());
    bytes
}
