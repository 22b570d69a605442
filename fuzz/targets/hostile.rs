//! A session whose peer sends what it likes: nothing panics, spins or grows without end.

#![no_main]

use std::ops::Range;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mixsocks_common::session::frame::{Ack, CloseReason, Frame, put_varint};
use mixsocks_common::session::{ACCESS_TOKEN_LEN, OpenOutcome, PacketKind, PresentedToken};
use mixsocks_fuzz::Edits;
use mixsocks_fuzz::sessions::{End, Op, World};
use mixsocks_sphinx::SURB_LEN;

#[derive(Debug, Arbitrary)]
enum HostileOp<'a> {
    Honest(Op),
    /// Bytes as they come.
    Bytes {
        to: End,
        contents: &'a [u8],
    },
    /// A packet of the session with these frames.
    Frames {
        to: End,
        number: Number,
        below: Number,
        frames: Vec<AnyFrame<'a>>,
    },
    /// An honest packet is changed under way.
    Change {
        to: End,
        packet: u8,
        edits: Edits<'a>,
    },
}

/// Small ones meet what is there, large ones the bounds.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Number {
    Small(u8),
    Medium(u16),
    /// Below 2^62, the largest that the wire carries.
    Large(u64),
}

impl From<Number> for u64 {
    fn from(number: Number) -> Self {
        match number {
            Number::Small(number) => number.into(),
            Number::Medium(number) => number.into(),
            Number::Large(number) => number >> 2,
        }
    }
}

#[derive(Debug, Arbitrary)]
enum AnyFrame<'a> {
    Start {
        is_late: bool,
        access_token: [u8; ACCESS_TOKEN_LEN],
        key_agreement: &'a [u8],
    },
    Open {
        stream: Number,
    },
    Opened {
        stream: Number,
        code: u8,
    },
    Data {
        stream: Number,
        offset: Number,
        fin: bool,
        len: u8,
    },
    /// Gaps and lengths of the ranges.
    Ack {
        latest: Number,
        delay_us: Number,
        first: Number,
        ranges: Vec<(u8, u8)>,
        settled: u8,
    },
    Credit {
        stream: Number,
        limit: Number,
    },
    Reset {
        stream: Number,
    },
    Stock {
        generation: Number,
        count: Number,
    },
    Surbs {
        generation: Number,
        count: u8,
    },
    Ping,
    Close(u8),
    Bytes(&'a [u8]),
}

fuzz_target!(|ops: Vec<HostileOp<'_>>| {
    let mut world = World::default();
    for op in &ops {
        match op {
            HostileOp::Honest(op) => world.apply(op),
            HostileOp::Bytes { to, contents } => world.inject(*to, contents.to_vec()),
            HostileOp::Frames { to, number, below, frames } => {
                let mut contents = head(&world, *to, (*number).into(), (*below).into());
                frames.iter().for_each(|frame| frame.write(&mut contents));
                world.inject(*to, contents);
            }
            HostileOp::Change { to, packet, edits } => {
                if let Some(contents) = world.under_way(*to, *packet) {
                    edits.apply(contents);
                }
            }
        }
    }
    world.conclude();
});

fn head(world: &World, to: End, number: u64, below: u64) -> Vec<u8> {
    let mut out = Vec::new();
    match to {
        End::Provider => {
            out.push(PacketKind::Session as u8);
            out.extend(world.session_id().0);
        }
        End::Client => out.push(PacketKind::Reply as u8),
    }
    put_varint(&mut out, number);
    put_varint(&mut out, below.min(number));
    if to == End::Client {
        out.extend([0; 4]);
    }
    out
}

impl AnyFrame<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        let data = [7; 255];
        let surbs = [surb(); 5];
        let frame = match self {
            Self::Start { is_late, access_token, key_agreement } => {
                let time_ms = if *is_late { 0 } else { 1_000_000_000 };
                let access_token = PresentedToken::from_bytes(*access_token);
                Frame::Start { time_ms, access_token, key_agreement }
            }
            Self::Open { stream } => Frame::Open {
                stream: (*stream).into(),
                target: "192.0.2.1:80".parse().expect("a good target"),
            },
            Self::Opened { stream, code } => {
                Frame::Opened { stream: (*stream).into(), outcome: OpenOutcome::from_code(*code) }
            }
            Self::Data { stream, offset, fin, len } => Frame::Data {
                stream: (*stream).into(),
                offset: (*offset).into(),
                fin: *fin,
                bytes: &data[..usize::from(*len)],
            },
            Self::Ack { latest, delay_us, first, ranges, settled } => {
                let first = (*first).into();
                let ranges = ranges_from(first, ranges);
                let end = ranges.last().map_or(first, |range| range.end);
                let settled = first.saturating_add((*settled).into()).min(end);
                let (latest, delay_us) = ((*latest).into(), (*delay_us).into());
                Frame::Ack(Ack { latest, delay_us, first, end, settled, ranges })
            }
            Self::Credit { stream, limit } => {
                Frame::Credit { stream: (*stream).into(), limit: (*limit).into() }
            }
            Self::Reset { stream } => Frame::Reset { stream: (*stream).into() },
            Self::Stock { generation, count } => {
                Frame::Stock { generation: (*generation).into(), count: (*count).into() }
            }
            Self::Surbs { generation, count } => Frame::Surbs {
                generation: (*generation).into(),
                surbs: &surbs[..usize::from(*count) % (surbs.len() + 1)],
            },
            Self::Ping => Frame::Ping,
            Self::Close(code) => Frame::Close(match code % 6 {
                0 => CloseReason::Done,
                1 => CloseReason::Unknown,
                2 => CloseReason::StaleStart,
                3 => CloseReason::Protocol,
                4 => CloseReason::Full,
                _ => CloseReason::TokenNeeded,
            }),
            Self::Bytes(bytes) => return out.extend_from_slice(bytes),
        };
        frame.encode(out);
    }
}

fn ranges_from(first: u64, gaps_and_lengths: &[(u8, u8)]) -> Vec<Range<u64>> {
    let mut position = first;
    let mut ranges = Vec::new();
    for &(gap, len) in gaps_and_lengths {
        let start = position.saturating_add(gap.into());
        position = start.saturating_add(len.into());
        ranges.push(start..position);
    }
    ranges
}

fn surb() -> [u8; SURB_LEN] {
    let mut surb = [0; SURB_LEN];
    // The base point: a group element that a SURB may begin with.
    surb[0] = 9;
    surb
}
