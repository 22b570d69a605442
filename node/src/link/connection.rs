//! One connection between two nodes: frames in, frames out, over TLS.

use std::time::Duration;

use bytes::{Buf, BytesMut};
use mixsocks_common::keys::Identity;
use mixsocks_common::link::tls::{self, NODE_ALPN};
use mixsocks_common::link::{FrameBody, FrameCodec, HelloError};
use mixsocks_sphinx::{HEADER_LEN, Packet};
use rustls::CommonState;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::{LinkContext, LinkFailure, WRITE_TIMEOUT};

/// What a TLS record carries at most: more than this does not come in one read.
const READ_BYTES: usize = 16 * 1024;

/// A frame for this node.
pub(super) enum Incoming {
    Pad,
    Packet(Packet),
    Control(Vec<u8>),
}

/// Frames over a stream that has proved who the peer is.
pub(super) struct Connection<S> {
    stream: S,
    me: Identity,
    codec: FrameCodec,
    incoming: BytesMut,
    outgoing: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Checks the finished handshake of `stream`, and exchanges hellos.
    pub(super) async fn open(
        stream: S,
        tls: impl FnOnce(&S) -> &CommonState,
        context: &LinkContext,
    ) -> Result<(Self, Identity), LinkFailure> {
        let handshake = tls(&stream);
        tls::check_protocol(handshake, NODE_ALPN)?;
        let peer = tls::peer_identity(handshake)?;
        let mut connection = Self {
            stream,
            me: context.me,
            codec: context.codec,
            incoming: BytesMut::new(),
            outgoing: Vec::new(),
        };
        let hello = context.hello.encode();
        connection.codec.encode_control(0, &hello, &mut connection.outgoing)?;
        connection.flush().await?;
        match connection.next().await? {
            Incoming::Control(message) => context.hello.check(&message)?,
            Incoming::Pad | Incoming::Packet(_) => return Err(HelloError::Malformed.into()),
        }
        Ok((connection, peer))
    }

    /// Waits for a frame. Can be cancelled without loss.
    pub(super) async fn next(&mut self) -> Result<Incoming, LinkFailure> {
        loop {
            if let Some(frame) = self.take_frame()? {
                return Ok(frame);
            }
            self.incoming.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.incoming).await? == 0 {
                return Err(LinkFailure::Closed);
            }
        }
    }

    fn take_frame(&mut self) -> Result<Option<Incoming>, LinkFailure> {
        let frame_bytes = self.codec.frame_bytes();
        let Some(bytes) = self.incoming.get(..frame_bytes) else {
            return Ok(None);
        };
        let frame = self.codec.decode(bytes)?;
        if frame.counter != 0 {
            return Err(LinkFailure::UnexpectedFrame);
        }
        let incoming = match frame.body {
            FrameBody::Pad => Incoming::Pad,
            FrameBody::Control(message) => Incoming::Control(message.to_vec()),
            FrameBody::Packet { next_hop, packet } => {
                if next_hop != self.me.as_bytes() {
                    return Err(LinkFailure::UnexpectedFrame);
                }
                let payload_len = packet.len().saturating_sub(HEADER_LEN);
                let packet = Packet::from_bytes(packet, payload_len);
                Incoming::Packet(packet.map_err(|_| LinkFailure::UnexpectedFrame)?)
            }
        };
        self.incoming.advance(frame_bytes);
        Ok(Some(incoming))
    }

    /// Puts a packet for `next_hop` into the outgoing buffer.
    pub(super) fn push_packet(&mut self, next_hop: &Identity, packet: &Packet) {
        let (codec, out) = (self.codec, &mut self.outgoing);
        codec.encode_packet(0, next_hop.as_bytes(), packet.as_bytes(), out);
    }

    /// Puts a pad frame into the outgoing buffer.
    pub(super) fn push_pad(&mut self) {
        self.codec.encode_pad(0, &mut self.outgoing);
    }

    /// Puts any bytes into the outgoing buffer, as a malicious neighbour would.
    #[cfg(test)]
    pub(super) fn push_bytes(&mut self, bytes: &[u8]) {
        self.outgoing.extend_from_slice(bytes);
    }

    /// Writes the outgoing buffer in one go. After an error or a cancellation the connection is of
    /// no more use: part of a frame may have been written.
    pub(super) async fn flush(&mut self) -> Result<(), LinkFailure> {
        let write = async {
            self.stream.write_all(&self.outgoing).await?;
            self.stream.flush().await
        };
        within(WRITE_TIMEOUT, write).await?;
        self.outgoing.clear();
        Ok(())
    }
}

/// Awaits `work`, at most for `limit`.
pub(super) async fn within<T, E>(
    limit: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, LinkFailure>
where
    LinkFailure: From<E>,
{
    match timeout(limit, work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(LinkFailure::Silent(limit)),
    }
}
