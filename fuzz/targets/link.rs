//! What comes over links: frames, hellos between nodes, messages between clients and gateways.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mixsocks_common::gateway::message::{ClientMessage, GatewayMessage, MAX_MESSAGE_BYTES};
use mixsocks_common::link::frame::{Frame, FrameBody, FrameCodec};
use mixsocks_common::link::hello::{Hello, HelloError};
use mixsocks_fuzz::small_network;

/// Short packets: longer ones would be more bytes to guess and no other code.
const PACKET_BYTES: usize = 80;

static HELLO: LazyLock<Hello> = LazyLock::new(|| Hello::new(&small_network()));

fuzz_target!(|bytes: &[u8]| {
    message(bytes);
    hello(bytes);
    let codec = FrameCodec::new(PACKET_BYTES);
    if let Ok(frame) = codec.decode(bytes) {
        assert_eq!(encode(&codec, &frame), bytes);
        if let FrameBody::Control(body) = frame.body {
            message(body);
        }
    }
    // Nearly all bytes have another length: they shall be frames as well.
    let mut frame = bytes.to_vec();
    frame.resize(codec.frame_bytes(), 0);
    if let Ok(decoded) = codec.decode(&frame) {
        assert_eq!(encode(&codec, &decoded), frame);
    }
});

fn encode(codec: &FrameCodec, frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    match frame.body {
        FrameBody::Pad => codec.encode_pad(frame.counter, &mut out),
        FrameBody::Packet { next_hop, packet } => {
            codec.encode_packet(frame.counter, next_hop, packet, &mut out);
        }
        FrameBody::Control(body) => {
            codec.encode_control(frame.counter, body, &mut out).expect("it came out of a frame");
        }
    }
    out
}

fn message(body: &[u8]) {
    match ClientMessage::decode(body) {
        // Nothing behind the version of another one is looked at.
        Ok(message @ ClientMessage::OtherVersion(_)) => {
            assert!(body.starts_with(&message.encode()))
        }
        Ok(message) => assert_eq!(message.encode().as_slice(), body),
        Err(_) => {}
    }
    if let Ok(message) = GatewayMessage::decode(body) {
        assert_eq!(message.encode().as_slice(), body);
        let has_box = matches!(message, GatewayMessage::Delivery(_));
        assert!(has_box || body.len() <= MAX_MESSAGE_BYTES);
    }
}

/// Only the hello of one's own network passes; another one is told what differs.
fn hello(bytes: &[u8]) {
    match HELLO.check(bytes) {
        Ok(()) => assert_eq!(HELLO.encode(), bytes),
        Err(HelloError::Malformed) => {}
        Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
    }
}
