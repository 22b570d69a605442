//! Frames: what every link carries, all of one size on a network.
//!
//! | offset | length | field |
//! |--:|--:|---|
//! | 0 | 1 | kind: 0 pad, 1 packet, 2 control |
//! | 1 | 7 | zero |
//! | 8 | 8 | counter, big-endian: packet frames delivered so far in the other direction |
//! | 16 | 32 | next hop: the identity that the packet is to be handed to; zero in pad and control |
//! | 48 | packet size | body |
//!
//! The body of a packet frame is a Sphinx packet. That of a control frame is a length of two bytes,
//! big-endian, as many bytes, and zeros to the end; that of a pad frame is all zeros. So each frame
//! has one encoding only, and inside TLS all frames look alike.
//!
//! Between nodes the counter is zero and the next hop is the receiver itself. From a client to its
//! gateway the next hop is the first mix; from the gateway to the client it is the client.

use bytes::BufMut;

/// Bytes of a frame that are not its body.
pub const FRAME_OVERHEAD: usize = 48;

/// Bytes of the length in the body of a control frame.
const CONTROL_LENGTH_LEN: usize = 2;
/// Where the fields start.
const COUNTER_AT: usize = 8;
const NEXT_HOP_AT: usize = 16;
const NEXT_HOP_LEN: usize = 32;

const KIND_PAD: u8 = 0;
const KIND_PACKET: u8 = 1;
const KIND_CONTROL: u8 = 2;

const _: () = assert!(NEXT_HOP_AT + NEXT_HOP_LEN == FRAME_OVERHEAD);

/// Why bytes are no frame, or a body does not fit into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The frame does not have the one size of its network.
    #[error("a frame of {actual} bytes where {expected} are needed")]
    WrongLength {
        /// Its length in bytes.
        actual: usize,
        /// The length in bytes that all frames of the network have.
        expected: usize,
    },
    /// The first byte names no kind of frame.
    #[error("{0} is no kind of frame")]
    UnknownKind(u8),
    /// Bytes that must be zero are not.
    #[error("a frame with bytes other than zero where zeros must be")]
    NotZero,
    /// The body of a control frame is longer than a frame has room for.
    #[error("a control message of {len} bytes, at most {max} fit into a frame")]
    ControlTooLong {
        /// Its length in bytes.
        len: usize,
        /// Most bytes that fit.
        max: usize,
    },
}

/// A frame that has been read: a view of the bytes it was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Packet frames delivered so far in the other direction.
    pub counter: u64,
    /// What the frame carries.
    pub body: FrameBody<'a>,
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum FrameBody<'a> {
    /// Nothing.
    Pad,
    /// A Sphinx packet.
    Packet {
        /// The identity that it is to be handed to; any 32 bytes.
        next_hop: &'a [u8; NEXT_HOP_LEN],
        /// The packet, of the network's packet size.
        packet: &'a [u8],
    },
    /// A control message, such as a hello.
    Control(&'a [u8]),
}

/// Shows kinds and lengths only.
impl std::fmt::Debug for FrameBody<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pad => f.write_str("Pad"),
            Self::Packet { .. } => f.write_str("Packet(…)"),
            Self::Control(body) => write!(f, "Control({} bytes)", body.len()),
        }
    }
}

/// Writes and reads the frames of one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameCodec {
    packet_bytes: usize,
}

impl FrameCodec {
    /// Frames for packets of `packet_bytes` bytes.
    ///
    /// # Panics
    /// When a packet is shorter than the length of a control message.
    pub fn new(packet_bytes: usize) -> Self {
        assert!(
            packet_bytes >= CONTROL_LENGTH_LEN,
            "a packet of {packet_bytes} bytes is shorter than a length"
        );
        Self { packet_bytes }
    }

    /// Bytes of each packet.
    pub fn packet_bytes(&self) -> usize {
        self.packet_bytes
    }

    /// Bytes of each frame.
    pub fn frame_bytes(&self) -> usize {
        FRAME_OVERHEAD + self.packet_bytes
    }

    /// Most bytes of a control message.
    pub fn max_control_bytes(&self) -> usize {
        (self.packet_bytes - CONTROL_LENGTH_LEN).min(usize::from(u16::MAX))
    }

    /// Appends a pad frame.
    pub fn encode_pad(&self, counter: u64, out: &mut impl BufMut) {
        put_head(KIND_PAD, counter, &[0; NEXT_HOP_LEN], out);
        out.put_bytes(0, self.packet_bytes);
    }

    /// Appends a packet frame.
    ///
    /// # Panics
    /// When `packet` does not have the network's packet size.
    pub fn encode_packet(
        &self,
        counter: u64,
        next_hop: &[u8; NEXT_HOP_LEN],
        packet: &[u8],
        out: &mut impl BufMut,
    ) {
        assert_eq!(packet.len(), self.packet_bytes, "a packet of another network");
        put_head(KIND_PACKET, counter, next_hop, out);
        out.put_slice(packet);
    }

    /// Appends a control frame.
    ///
    /// # Errors
    /// [`FrameError::ControlTooLong`]; then nothing is appended.
    pub fn encode_control(
        &self,
        counter: u64,
        message: &[u8],
        out: &mut impl BufMut,
    ) -> Result<(), FrameError> {
        let too_long =
            FrameError::ControlTooLong { len: message.len(), max: self.max_control_bytes() };
        let len = u16::try_from(message.len()).map_err(|_| too_long)?;
        if message.len() > self.max_control_bytes() {
            return Err(too_long);
        }
        put_head(KIND_CONTROL, counter, &[0; NEXT_HOP_LEN], out);
        out.put_u16(len);
        out.put_slice(message);
        out.put_bytes(0, self.packet_bytes - CONTROL_LENGTH_LEN - message.len());
        Ok(())
    }

    /// Reads one frame from exactly its bytes.
    ///
    /// # Errors
    /// [`FrameError`]; every frame that is read without error has this encoding and no other.
    pub fn decode<'a>(&self, frame: &'a [u8]) -> Result<Frame<'a>, FrameError> {
        let wrong_length =
            FrameError::WrongLength { actual: frame.len(), expected: self.frame_bytes() };
        if frame.len() != self.frame_bytes() {
            return Err(wrong_length);
        }
        let (head, body) = frame.split_first_chunk::<FRAME_OVERHEAD>().ok_or(wrong_length)?;
        let (start, next_hop) = head.split_last_chunk::<NEXT_HOP_LEN>().ok_or(wrong_length)?;
        let (kind, counter) = start.split_last_chunk::<COUNTER_AT>().ok_or(wrong_length)?;
        let (kind, reserved) = kind.split_first().ok_or(wrong_length)?;
        all_zero(reserved)?;
        let body = match *kind {
            KIND_PACKET => FrameBody::Packet { next_hop, packet: body },
            KIND_PAD => {
                all_zero(next_hop)?;
                all_zero(body)?;
                FrameBody::Pad
            }
            KIND_CONTROL => {
                all_zero(next_hop)?;
                FrameBody::Control(self.decode_control(body)?)
            }
            unknown => return Err(FrameError::UnknownKind(unknown)),
        };
        Ok(Frame { counter: u64::from_be_bytes(*counter), body })
    }

    fn decode_control<'a>(&self, body: &'a [u8]) -> Result<&'a [u8], FrameError> {
        let max = self.max_control_bytes();
        let too_long = |len| FrameError::ControlTooLong { len, max };
        let (len, rest) = body.split_first_chunk::<CONTROL_LENGTH_LEN>().ok_or(too_long(0))?;
        let len = usize::from(u16::from_be_bytes(*len));
        let (message, padding) = rest.split_at_checked(len).ok_or(too_long(len))?;
        all_zero(padding)?;
        Ok(message)
    }
}

fn put_head(kind: u8, counter: u64, next_hop: &[u8; NEXT_HOP_LEN], out: &mut impl BufMut) {
    out.put_u8(kind);
    out.put_bytes(0, COUNTER_AT - 1);
    out.put_u64(counter);
    out.put_slice(next_hop);
}

fn all_zero(bytes: &[u8]) -> Result<(), FrameError> {
    // Without an early exit the compiler makes vector code of it.
    match bytes.iter().fold(0, |all, byte| all | byte) {
        0 => Ok(()),
        _ => Err(FrameError::NotZero),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use proptest::prelude::*;

    const CODEC: FrameCodec = FrameCodec { packet_bytes: 16 };

    fn frame(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    fn good_vectors() {
        let mut out = Vec::new();
        CODEC.encode_pad(7, &mut out);
        assert_eq!(out, frame(&[&[0; 8], &[0, 0, 0, 0, 0, 0, 0, 7], &[0; 32], &[0; 16]]));

        let mut out = BytesMut::new();
        CODEC.encode_packet(0x0102_0304_0506_0708, &[9; 32], &[5; 16], &mut out);
        let head = [1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(out, frame(&[&head, &[9; 32], &[5; 16]]));

        let mut out = Vec::new();
        CODEC.encode_control(0, b"abc", &mut out).unwrap();
        assert_eq!(out, frame(&[&[2], &[0; 47], &[0, 3], b"abc", &[0; 11]]));
    }

    #[test]
    fn bad_vectors() {
        let pad = vec![0; CODEC.frame_bytes()];
        assert_eq!(CODEC.decode(&pad), Ok(Frame { counter: 0, body: FrameBody::Pad }));
        let with = |changes: &[(usize, u8)]| {
            let mut frame = pad.clone();
            for (at, byte) in changes {
                frame[*at] = *byte;
            }
            CODEC.decode(&frame).map(|_| ()).unwrap_err()
        };
        for reserved in 1..8 {
            for kind in 0..3 {
                assert_eq!(with(&[(0, kind), (reserved, 1)]), FrameError::NotZero);
            }
        }
        assert_eq!(with(&[(0, 3)]), FrameError::UnknownKind(3));
        assert_eq!(with(&[(0, 255)]), FrameError::UnknownKind(255));
        assert_eq!(with(&[(16, 1)]), FrameError::NotZero, "next hop of a pad");
        assert_eq!(with(&[(63, 1)]), FrameError::NotZero, "body of a pad");
        assert_eq!(with(&[(0, 2), (47, 1)]), FrameError::NotZero, "next hop of a control");
        assert_eq!(with(&[(0, 2), (50, 1)]), FrameError::NotZero, "behind a control message");
        assert_eq!(with(&[(0, 2), (49, 15)]), FrameError::ControlTooLong { len: 15, max: 14 });
        assert_eq!(with(&[(0, 2), (48, 255)]), FrameError::ControlTooLong { len: 0xff00, max: 14 });
        for len in [0, 1, 47, 48, 63, 65, 128] {
            let wrong = FrameError::WrongLength { actual: len, expected: 64 };
            assert_eq!(CODEC.decode(&vec![0; len]), Err(wrong));
        }
    }

    #[test]
    fn control_messages_fill_a_frame_and_no_more() {
        let mut out = Vec::new();
        let full = [1; 14];
        CODEC.encode_control(0, &full, &mut out).unwrap();
        assert_eq!(CODEC.decode(&out).unwrap().body, FrameBody::Control(&full));
        let error = CODEC.encode_control(0, &[1; 15], &mut out).unwrap_err();
        assert_eq!(error, FrameError::ControlTooLong { len: 15, max: 14 });
        assert_eq!(out.len(), CODEC.frame_bytes(), "nothing was appended");
        // The two bytes of the length bound it on networks with large packets.
        assert_eq!(FrameCodec::new(100_000).max_control_bytes(), 65_535);
    }

    proptest! {
        #[test]
        fn round_trip(
            counter: u64,
            next_hop: [u8; 32],
            packet: [u8; 16],
            message in prop::collection::vec(any::<u8>(), 0..=14),
        ) {
            let mut out = Vec::new();
            CODEC.encode_packet(counter, &next_hop, &packet, &mut out);
            CODEC.encode_control(counter, &message, &mut out).unwrap();
            CODEC.encode_pad(counter, &mut out);
            let bodies = [
                FrameBody::Packet { next_hop: &next_hop, packet: &packet },
                FrameBody::Control(&message),
                FrameBody::Pad,
            ];
            prop_assert_eq!(out.len(), bodies.len() * CODEC.frame_bytes());
            for (frame, body) in out.chunks(CODEC.frame_bytes()).zip(bodies) {
                prop_assert_eq!(CODEC.decode(frame), Ok(Frame { counter, body }));
            }
        }

        #[test]
        fn what_is_read_has_one_encoding(
            kind in 0u8..4,
            bytes in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>()], 63),
        ) {
            let mut frame = vec![kind];
            frame.extend(bytes);
            if let Ok(Frame { counter, body }) = CODEC.decode(&frame) {
                let mut again = Vec::new();
                match body {
                    FrameBody::Pad => CODEC.encode_pad(counter, &mut again),
                    FrameBody::Packet { next_hop, packet } => {
                        CODEC.encode_packet(counter, next_hop, packet, &mut again);
                    }
                    FrameBody::Control(message) => {
                        CODEC.encode_control(counter, message, &mut again).unwrap();
                    }
                }
                prop_assert_eq!(again, frame);
            }
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..130)) {
            let _ = CODEC.decode(&bytes);
        }
    }
}
