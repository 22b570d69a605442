//! The frames inside a session's packets, and the numbers they are written with.
//!
//! Numbers are variable-length integers of RFC 9000 §16 (1, 2, 4 or 8 bytes, big endian, the length
//! in the two top bits), below 2^62. Every frame begins with a type byte:
//!
//! | type | frame | fields after the type |
//! |--:|---|---|
//! | 1 | START | version u16, time u64 (ms since 1970), access token 32 bytes (zeros: none), key agreement: length varint and bytes |
//! | 2 | OPEN | stream varint, target (RFC 1928 address form) |
//! | 3 | OPENED | stream varint, code u8 |
//! | 4 | DATA | stream varint, offset varint, length with fin in the lowest bit varint, bytes |
//! | 5 | ACK | latest varint, delay in µs varint, first varint, span varint, settled minus first varint, count varint, then `count` pairs of gap varint and length varint |
//! | 6 | CREDIT | stream varint, limit varint |
//! | 7 | RESET | stream varint |
//! | 9 | STOCK | generation varint, count varint |
//! | 10 | SURBS | generation varint, count u8, `count` × 396 bytes |
//! | 11 | PING | – |
//! | 12 | CLOSE | reason u8 |
//!
//! Type 8 is kept for DATAGRAM. A packet ends where its last frame ends; an unknown type or a frame
//! that is cut short makes the whole packet malformed.

use bytes::BufMut;
use mixsocks_sphinx::SURB_LEN;

use super::{ACCESS_TOKEN_LEN, OpenOutcome, PresentedToken};
use crate::target::{Target, TargetError};

/// One past the largest number that a frame can hold.
pub const VARINT_END: u64 = 1 << 62;

/// Version of the session protocol.
pub const SESSION_VERSION: u16 = 2;

/// Longest key agreement in a START: an ML-KEM-768 public key and an X25519 one fit.
pub const MAX_KEY_AGREEMENT_LEN: usize = 1216;

const START: u8 = 1;
const OPEN: u8 = 2;
const OPENED: u8 = 3;
const DATA: u8 = 4;
const ACK: u8 = 5;
const CREDIT: u8 = 6;
const RESET: u8 = 7;
const STOCK: u8 = 9;
const SURBS: u8 = 10;
const PING: u8 = 11;
const CLOSE: u8 = 12;

/// Number of a stream within its session; the client counts from 1.
pub type StreamId = u64;

/// Why bytes are not frames. The packet is dropped and counted; its sender is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame needs more bytes than the packet has.
    #[error("a frame is cut short")]
    Truncated,
    /// A type byte that this version does not know.
    #[error("frame type {0} is unknown")]
    UnknownType(u8),
    /// A START of another protocol version.
    #[error("session protocol version {0} is not {SESSION_VERSION}")]
    Version(u16),
    /// The target of an OPEN.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A value that its field does not allow.
    #[error("a frame holds an impossible {0}")]
    Value(&'static str),
}

/// A frame as it was read; bytes stay in the packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The first packets of a session: its version and when it began.
    Start {
        /// Milliseconds since 1970 on the client's clock.
        time_ms: u64,
        /// What opens a private provider. Its bytes are there without it as well: packets have the same
        /// room for SURBs then, so that their number does not tell who has a token.
        access_token: Option<PresentedToken>,
        /// Kept for a hybrid post-quantum key agreement; empty today.
        key_agreement: &'a [u8],
    },
    /// The client asks for a connection to a target.
    Open {
        /// The new stream.
        stream: StreamId,
        /// Where to.
        target: Target,
    },
    /// The provider's answer to OPEN.
    Opened {
        /// The stream.
        stream: StreamId,
        /// What happened.
        outcome: OpenOutcome,
    },
    /// Bytes of a stream.
    Data {
        /// The stream.
        stream: StreamId,
        /// Where in the stream the bytes begin.
        offset: u64,
        /// Whether the stream ends after them.
        fin: bool,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Which packets have arrived.
    Ack(Ack),
    /// How far the peer may send.
    Credit {
        /// The stream.
        stream: StreamId,
        /// Offset up to which (exclusive) the receiver takes bytes; never shrinks.
        limit: u64,
    },
    /// The stream ends at once in both directions.
    Reset {
        /// The stream.
        stream: StreamId,
    },
    /// How many SURBs the provider has.
    Stock {
        /// Their generation.
        generation: u64,
        /// Their number.
        count: u64,
    },
    /// SURBs for the provider.
    Surbs {
        /// Their generation.
        generation: u64,
        /// `n` × 396 bytes.
        surbs: &'a [[u8; SURB_LEN]],
    },
    /// Asks for an acknowledgement.
    Ping,
    /// The session is over.
    Close(CloseReason),
}

/// Why a session was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// 0: nobody needs it any more.
    #[error("the session has ended")]
    Done,
    /// 1: the provider has no such session, probably because it was restarted.
    #[error("the provider does not know the session (it may have been restarted)")]
    Unknown,
    /// 2: the time in START is too far from the provider's.
    #[error("the provider refuses the session's start time: check this machine's clock")]
    StaleStart,
    /// 3: the peer broke the protocol.
    #[error("the protocol was broken")]
    Protocol,
    /// 4: the provider has no room for another session.
    #[error("the provider is full")]
    Full,
    /// 5: the provider serves only who has one of its access tokens, and this session has none of them.
    #[error("the provider demands an access token that it knows")]
    TokenNeeded,
}

impl CloseReason {
    fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Unknown => 1,
            Self::StaleStart => 2,
            Self::Protocol => 3,
            Self::Full => 4,
            Self::TokenNeeded => 5,
        }
    }

    fn from_code(code: u8) -> Result<Self, FrameError> {
        Ok(match code {
            0 => Self::Done,
            1 => Self::Unknown,
            2 => Self::StaleStart,
            3 => Self::Protocol,
            4 => Self::Full,
            5 => Self::TokenNeeded,
            _ => return Err(FrameError::Value("close reason")),
        })
    }
}

/// Which packets have arrived, as far as this frame tells: of the numbers `first..first + span`,
/// those in `ranges` have, the others have not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// The packet that arrived last.
    pub latest: u64,
    /// How long before the frame was written, in microseconds.
    pub delay_us: u64,
    /// Lowest number that the frame tells about.
    pub first: u64,
    /// One past the highest number that the frame tells about.
    pub end: u64,
    /// Within `first..=end`: what is below it and has not arrived is not waited for any more.
    pub settled: u64,
    /// Ascending, disjoint, within `first..end`.
    pub ranges: Vec<std::ops::Range<u64>>,
}

/// Most ranges that one ACK can hold: they would fill the largest packet.
pub const MAX_ACK_RANGES: usize = 16 * 1024;

impl Frame<'_> {
    /// Reads the next frame from the front of `input`; `None` at its end.
    ///
    /// # Errors
    /// [`FrameError`]; the rest of `input` is then worthless.
    pub fn decode<'a>(input: &mut &'a [u8]) -> Result<Option<Frame<'a>>, FrameError> {
        let Some((&kind, rest)) = input.split_first() else { return Ok(None) };
        *input = rest;
        Ok(Some(match kind {
            START => {
                let version = u16::from_be_bytes(take_array(input)?);
                if version != SESSION_VERSION {
                    return Err(FrameError::Version(version));
                }
                let time_ms = u64::from_be_bytes(take_array(input)?);
                let access_token = PresentedToken::from_bytes(take_array(input)?);
                let len = take_len(input)?;
                if len > MAX_KEY_AGREEMENT_LEN {
                    return Err(FrameError::Value("key agreement"));
                }
                Frame::Start { time_ms, access_token, key_agreement: take(input, len)? }
            }
            OPEN => Frame::Open { stream: take_stream(input)?, target: Target::decode(input)? },
            OPENED => {
                let stream = take_stream(input)?;
                let [code] = take_array(input)?;
                Frame::Opened { stream, outcome: OpenOutcome::from_code(code) }
            }
            DATA => {
                let stream = take_stream(input)?;
                let offset = take_varint(input)?;
                let len_fin = take_varint(input)?;
                let len = usize::try_from(len_fin >> 1).map_err(|_| FrameError::Truncated)?;
                let bytes = take(input, len)?;
                if offset + bytes.len() as u64 >= VARINT_END {
                    return Err(FrameError::Value("offset"));
                }
                Frame::Data { stream, offset, fin: len_fin & 1 == 1, bytes }
            }
            ACK => Frame::Ack(Ack::decode(input)?),
            CREDIT => Frame::Credit { stream: take_stream(input)?, limit: take_varint(input)? },
            RESET => Frame::Reset { stream: take_stream(input)? },
            STOCK => Frame::Stock { generation: take_varint(input)?, count: take_varint(input)? },
            SURBS => {
                let generation = take_varint(input)?;
                let [count] = take_array(input)?;
                let bytes = take(input, usize::from(count) * SURB_LEN)?;
                let (surbs, _) = bytes.as_chunks::<SURB_LEN>();
                Frame::Surbs { generation, surbs }
            }
            PING => Frame::Ping,
            CLOSE => {
                let [code] = take_array(input)?;
                Frame::Close(CloseReason::from_code(code)?)
            }
            unknown => return Err(FrameError::UnknownType(unknown)),
        }))
    }

    /// Whether a packet with this frame is to be acknowledged. If an ACK or a STOCK were, two idle
    /// ends would acknowledge each other for ever; SURBS come with a PING.
    pub fn elicits_ack(&self) -> bool {
        match self {
            Frame::Open { .. }
            | Frame::Opened { .. }
            | Frame::Data { .. }
            | Frame::Credit { .. }
            | Frame::Reset { .. }
            | Frame::Ping
            | Frame::Close(_) => true,
            Frame::Start { .. } | Frame::Ack(_) | Frame::Stock { .. } | Frame::Surbs { .. } => {
                false
            }
        }
    }

    /// Appends the frame.
    ///
    /// # Panics
    /// When a number is not below 2^62 or a count does not fit its byte: local mistakes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Start { time_ms, access_token, key_agreement } => {
                out.put_u8(START);
                out.put_u16(SESSION_VERSION);
                out.put_u64(*time_ms);
                let token = access_token.as_ref().map(PresentedToken::as_bytes);
                out.put_slice(token.unwrap_or(&[0; ACCESS_TOKEN_LEN]));
                put_varint(out, key_agreement.len() as u64);
                out.put_slice(key_agreement);
            }
            Frame::Open { stream, target } => {
                out.put_u8(OPEN);
                put_varint(out, *stream);
                target.encode(out);
            }
            Frame::Opened { stream, outcome } => {
                out.put_u8(OPENED);
                put_varint(out, *stream);
                out.put_u8(outcome.code());
            }
            Frame::Data { stream, offset, fin, bytes } => {
                put_data_header(out, *stream, *offset, bytes.len(), *fin);
                out.put_slice(bytes);
            }
            Frame::Ack(ack) => ack.encode(out),
            Frame::Credit { stream, limit } => {
                out.put_u8(CREDIT);
                put_varint(out, *stream);
                put_varint(out, *limit);
            }
            Frame::Reset { stream } => {
                out.put_u8(RESET);
                put_varint(out, *stream);
            }
            Frame::Stock { generation, count } => {
                out.put_u8(STOCK);
                put_varint(out, *generation);
                put_varint(out, *count);
            }
            Frame::Surbs { generation, surbs } => {
                put_surbs_header(out, *generation, surbs.len());
                for surb in *surbs {
                    out.put_slice(surb);
                }
            }
            Frame::Ping => out.put_u8(PING),
            Frame::Close(reason) => {
                out.put_u8(CLOSE);
                out.put_u8(reason.code());
            }
        }
    }
}

/// Appends the front of a DATA frame; `len` bytes must follow.
pub(super) fn put_data_header(
    out: &mut Vec<u8>,
    stream: StreamId,
    offset: u64,
    len: usize,
    fin: bool,
) {
    out.put_u8(DATA);
    put_varint(out, stream);
    put_varint(out, offset);
    put_varint(out, (len as u64) << 1 | u64::from(fin));
}

/// Bytes of the front of a DATA frame with up to `len` bytes.
pub(super) fn data_header_len(stream: StreamId, offset: u64, len: usize) -> usize {
    1 + varint_len(stream) + varint_len(offset) + varint_len((len as u64) << 1)
}

/// Appends the front of a SURBS frame; `count` SURBs must follow.
pub(super) fn put_surbs_header(out: &mut Vec<u8>, generation: u64, count: usize) {
    out.put_u8(SURBS);
    put_varint(out, generation);
    out.put_u8(u8::try_from(count).expect("a packet has room for few SURBs"));
}

impl Ack {
    fn decode(input: &mut &[u8]) -> Result<Self, FrameError> {
        let latest = take_varint(input)?;
        let delay_us = take_varint(input)?;
        let first = take_varint(input)?;
        let end = first + take_varint(input)?;
        let settled = first + take_varint(input)?;
        if settled > end {
            return Err(FrameError::Value("settled number"));
        }
        let count = take_len(input)?;
        // Each range takes at least two bytes, so that a short packet cannot ask for much memory.
        if count > MAX_ACK_RANGES || count > input.len() / 2 {
            return Err(FrameError::Truncated);
        }
        let mut ranges = Vec::with_capacity(count);
        let mut position = first;
        for index in 0..count {
            let gap = take_varint(input)?;
            let len = take_varint(input)?;
            if len == 0 || (gap == 0 && index > 0) {
                return Err(FrameError::Value("acknowledged range"));
            }
            let start = position + gap;
            position = start + len;
            if position > end {
                return Err(FrameError::Value("acknowledged range"));
            }
            ranges.push(start..position);
        }
        Ok(Self { latest, delay_us, first, end, settled, ranges })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(ACK);
        put_varint(out, self.latest);
        put_varint(out, self.delay_us);
        put_varint(out, self.first);
        put_varint(out, self.end - self.first);
        put_varint(out, self.settled - self.first);
        put_varint(out, self.ranges.len() as u64);
        let mut position = self.first;
        for range in &self.ranges {
            put_varint(out, range.start - position);
            put_varint(out, range.end - range.start);
            position = range.end;
        }
    }

    /// Bytes of the frame without its ranges, at most.
    pub(super) const MAX_HEADER_LEN: usize = 1 + 5 * 8 + 4;
}

/// Appends a number (RFC 9000 §16).
///
/// # Panics
/// When it is not below 2^62.
pub fn put_varint(out: &mut Vec<u8>, value: u64) {
    assert!(value < VARINT_END, "number too large for a frame");
    match varint_len(value) {
        1 => out.extend_from_slice(&value.to_be_bytes()[7..]),
        2 => out.extend_from_slice(&(value | 1 << 14).to_be_bytes()[6..]),
        4 => out.extend_from_slice(&(value | 2 << 30).to_be_bytes()[4..]),
        _ => out.extend_from_slice(&(value | 3 << 62).to_be_bytes()),
    }
}

/// Bytes that a number takes.
pub fn varint_len(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Reads a number and moves `input` past it.
///
/// # Errors
/// [`FrameError::Truncated`].
pub fn take_varint(input: &mut &[u8]) -> Result<u64, FrameError> {
    let first = *input.first().ok_or(FrameError::Truncated)?;
    let bytes = take(input, 1 << (first >> 6))?;
    let value = bytes[1..]
        .iter()
        .fold(u64::from(first & 0x3f), |value, &byte| value << 8 | u64::from(byte));
    Ok(value)
}

fn take_stream(input: &mut &[u8]) -> Result<StreamId, FrameError> {
    match take_varint(input)? {
        0 => Err(FrameError::Value("stream")),
        stream => Ok(stream),
    }
}

fn take_len(input: &mut &[u8]) -> Result<usize, FrameError> {
    usize::try_from(take_varint(input)?).map_err(|_| FrameError::Truncated)
}

fn take<'a>(input: &mut &'a [u8], len: usize) -> Result<&'a [u8], FrameError> {
    input.split_off(..len).ok_or(FrameError::Truncated)
}

fn take_array<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], FrameError> {
    let mut bytes = [0u8; N];
    bytes.copy_from_slice(take(input, N)?);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let mut input = &bytes[..];
        assert_eq!(Frame::decode(&mut input).unwrap().as_ref(), Some(frame));
        assert!(input.is_empty());
        for end in 1..bytes.len() {
            assert!(Frame::decode(&mut &bytes[..end]).is_err(), "{frame:?} cut at {end}");
        }
    }

    #[test]
    fn every_frame_round_trips() {
        let surbs = [[7u8; SURB_LEN], [8u8; SURB_LEN]];
        for frame in [
            Frame::Start { time_ms: 1_700_000_000_000, access_token: None, key_agreement: b"" },
            Frame::Start {
                time_ms: 0,
                access_token: PresentedToken::from_bytes([7; ACCESS_TOKEN_LEN]),
                key_agreement: &[9; MAX_KEY_AGREEMENT_LEN],
            },
            Frame::Open { stream: 1, target: "example.com:443".parse().unwrap() },
            Frame::Opened { stream: 70, outcome: OpenOutcome::Refused },
            Frame::Data { stream: 3, offset: 1 << 40, fin: true, bytes: b"bytes" },
            Frame::Data { stream: 3, offset: 5, fin: true, bytes: b"" },
            Frame::Ack(Ack {
                latest: 20,
                delay_us: 7,
                first: 3,
                end: 30,
                settled: 10,
                ranges: vec![3..5, 9..10, 20..30],
            }),
            Frame::Ack(Ack {
                latest: 0,
                delay_us: 0,
                first: 0,
                end: 0,
                settled: 0,
                ranges: vec![],
            }),
            Frame::Credit { stream: 9, limit: VARINT_END - 1 },
            Frame::Reset { stream: 9 },
            Frame::Stock { generation: 0, count: 200 },
            Frame::Surbs { generation: 1, surbs: &surbs },
            Frame::Ping,
            Frame::Close(CloseReason::Full),
            Frame::Close(CloseReason::TokenNeeded),
        ] {
            round_trip(&frame);
        }
    }

    #[test]
    fn known_numbers() {
        // The examples of RFC 9000 appendix A.1.
        for (value, bytes) in [
            (151_288_809_941_952_652, &[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c][..]),
            (494_878_333, &[0x9d, 0x7f, 0x3e, 0x7d]),
            (15_293, &[0x7b, 0xbd]),
            (37, &[0x25]),
        ] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out, bytes);
            assert_eq!(take_varint(&mut &out[..]), Ok(value));
            assert_eq!(varint_len(value), bytes.len());
        }
    }

    #[test]
    fn bad_frames_are_refused() {
        for (bytes, error) in [
            (&[0u8][..], FrameError::UnknownType(0)),
            (&[8], FrameError::UnknownType(8)),
            (&[200], FrameError::UnknownType(200)),
            (&[7, 0], FrameError::Value("stream")),
            (&[12, 99], FrameError::Value("close reason")),
            (&[12, 6], FrameError::Value("close reason")),
            (&[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], FrameError::Version(1)),
            (&[1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0], FrameError::Truncated),
            // A range beyond the span, an empty range, two ranges that touch.
            (&[5, 0, 0, 0, 4, 0, 1, 0, 5], FrameError::Value("acknowledged range")),
            (&[5, 0, 0, 0, 4, 0, 1, 0, 0], FrameError::Value("acknowledged range")),
            (&[5, 0, 0, 0, 9, 0, 2, 0, 1, 0, 1], FrameError::Value("acknowledged range")),
            // More settled than told.
            (&[5, 0, 0, 0, 4, 5, 0], FrameError::Value("settled number")),
            // A count of ranges that the packet cannot hold.
            (&[5, 0, 0, 0, 4, 0, 0x80, 0, 0x40, 0, 0, 1], FrameError::Truncated),
            (&[4, 1, 0xff, 255, 255, 255, 255, 255, 255, 255, 2, 0], FrameError::Value("offset")),
        ] {
            assert_eq!(Frame::decode(&mut &bytes[..]), Err(error), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes: Vec<u8>) {
            let mut input = &bytes[..];
            while let Ok(Some(_)) = Frame::decode(&mut input) {}
        }

        #[test]
        fn numbers_round_trip(value in 0..VARINT_END) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(take_varint(&mut &out[..]), Ok(value));
        }
    }
}
