//! What the hostile say: contents that begin like honest ones and go on with anything.

use mixsocks_common::session::frame::{Ack, CloseReason, Frame, put_varint};
use mixsocks_common::session::{OpenOutcome, PresentedToken};
use mixsocks_sphinx::max_plaintext;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::world::PAYLOAD_BYTES;

/// A packet of a session, for a provider or a client; somebody's token may have got about.
pub(crate) fn packet(
    rng: &mut StdRng,
    wall_ms: u64,
    access_token: Option<PresentedToken>,
) -> Vec<u8> {
    let mut out = vec![rng.random_range(0..4)];
    // Some sessions are hit twice.
    out.extend_from_slice(&[rng.random_range(0..5); 16]);
    out.push(rng.random_range(0..64));
    out.push(0);
    if rng.random() {
        Frame::Start { time_ms: wall_ms, access_token, key_agreement: &[] }.encode(&mut out);
    }
    let count = rng.random_range(0..20);
    put_frames(rng, count, 100, &mut out);
    out
}

/// What a provider answers instead of `honest`, or beside it.
pub(crate) fn reply(rng: &mut StdRng, honest: Vec<u8>) -> Vec<u8> {
    let mut out = if rng.random() {
        honest
    } else {
        let mut out = vec![2];
        let bits = rng.random_range(1..24);
        let number = rng.random_range(0..1 << bits);
        put_varint(&mut out, number);
        put_varint(&mut out, rng.random_range(0..=number));
        out.extend_from_slice(&rng.random::<[u8; 4]>());
        out
    };
    // Few of them: the first that breaks a rule ends the session.
    let count = rng.random_range(0..4);
    put_frames(rng, count, 8, &mut out);
    out
}

/// Appends frames about the first `streams` streams, as far as the packet has room.
fn put_frames(rng: &mut StdRng, count: usize, streams: u64, out: &mut Vec<u8>) {
    let surbs = [[9; 396]];
    for _ in 0..count {
        let bits = rng.random_range(1..40);
        let number = rng.random_range(0..1 << bits);
        let stream = 1 + rng.random_range(0..streams);
        let frame = match rng.random_range(0..14) {
            0 => Frame::Open { stream, target: "nowhere.test:1".parse().expect("good") },
            1 => Frame::Data { stream, offset: number, fin: rng.random(), bytes: b"bytes" },
            2 => {
                let ranges = std::iter::once(number..number + 5).collect();
                Frame::Ack(Ack {
                    latest: number,
                    delay_us: number,
                    first: number,
                    end: number + 9,
                    settled: number + 3,
                    ranges,
                })
            }
            3 => Frame::Credit { stream, limit: number },
            4 => Frame::Reset { stream },
            5 => Frame::Surbs { generation: number, surbs: &surbs },
            6 => Frame::Close(CloseReason::Full),
            7 => Frame::Stock { generation: 0, count: number },
            8 => {
                out.push(rng.random());
                continue;
            }
            9 => Frame::Data { stream, offset: 0, fin: false, bytes: b"first bytes" },
            10 => Frame::Opened { stream, outcome: OpenOutcome::Connected },
            11 => Frame::Close(CloseReason::Unknown),
            _ => Frame::Ping,
        };
        frame.encode(out);
    }
    out.truncate(max_plaintext(PAYLOAD_BYTES));
}
