//! How frames travel in websocket messages, without the websocket itself.

use bytes::Bytes;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error, Message};

use crate::link::{FrameCodec, FrameError};

/// What a TLS record carries at most.
const CLIENT_READ_BYTES: usize = 16 * 1024;
/// More than what the websocket puts before a frame.
const HEADER_BYTES: usize = 16;
/// Bytes that are gathered before they are written.
pub const WRITE_BUFFER_BYTES: usize = 128 * 1024;

/// That of a client, which reads as much at a time as there is.
pub fn client_config(frame_bytes: usize) -> WebSocketConfig {
    config(frame_bytes, CLIENT_READ_BYTES)
}

/// That of a gateway, which reads a frame at a time: a connection has as much memory for it also while
/// nothing comes, and a gateway has thousands of them.
pub fn gateway_config(frame_bytes: usize) -> WebSocketConfig {
    config(frame_bytes, frame_bytes + HEADER_BYTES)
}

/// What a websocket may hold. Whoever writes waits beyond [`WRITE_BUFFER_BYTES`], so that no more
/// than one frame and a farewell come on top, each with its websocket header: two frames have room
/// for both.
fn config(frame_bytes: usize, read_bytes: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(read_bytes)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES + 2 * frame_bytes)
        .max_message_size(Some(frame_bytes))
        .max_frame_size(Some(frame_bytes))
}

/// Why a websocket gives no frame.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The peer has closed it.
    #[error("the websocket is closed")]
    Closed,
    /// A message that has no place here.
    #[error("an unexpected {0}")]
    Unexpected(&'static str),
    /// It broke.
    #[error(transparent)]
    Broken(#[from] Error),
}

/// The bytes of a frame, from what a websocket has received next.
///
/// # Errors
/// When it is anything else. The connection has to be closed then.
pub fn received(next: Option<Result<Message, Error>>) -> Result<Bytes, ReceiveError> {
    match next.transpose()? {
        Some(Message::Binary(bytes)) => Ok(bytes),
        // Neither end sends pings, and the websocket has queued its answer before it tells of one:
        // the answers would pile up for a peer that does not read, so the first one ends it.
        Some(Message::Ping(_) | Message::Pong(_)) => Err(ReceiveError::Unexpected("ping")),
        Some(Message::Text(_) | Message::Frame(_)) => Err(ReceiveError::Unexpected("text message")),
        Some(Message::Close(_)) | None => Err(ReceiveError::Closed),
    }
}

/// A message with one CONTROL frame.
///
/// # Errors
/// When `body` does not fit into a frame.
pub fn control_message(
    codec: &FrameCodec,
    counter: u64,
    body: &[u8],
) -> Result<Message, FrameError> {
    let mut frame = Vec::with_capacity(codec.frame_bytes());
    codec.encode_control(counter, body, &mut frame)?;
    Ok(Message::Binary(frame.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_binary_messages_are_frames() {
        let frame = Bytes::from_static(b"frame");
        assert_eq!(received(Some(Ok(Message::Binary(frame.clone())))).unwrap(), frame);
        for message in [Message::Ping(frame.clone()), Message::Pong(frame)] {
            assert!(matches!(received(Some(Ok(message))), Err(ReceiveError::Unexpected("ping"))));
        }
        let text = received(Some(Ok(Message::text("frame"))));
        assert!(matches!(text, Err(ReceiveError::Unexpected("text message"))));
        assert!(matches!(received(Some(Ok(Message::Close(None)))), Err(ReceiveError::Closed)));
        assert!(matches!(received(None), Err(ReceiveError::Closed)));
        let broken = received(Some(Err(Error::AlreadyClosed)));
        assert!(matches!(broken, Err(ReceiveError::Broken(Error::AlreadyClosed))));
    }

    #[test]
    fn what_is_written_is_bounded_and_leaves_room_for_one_frame_more() {
        let config = gateway_config(2444);
        assert_eq!(config.max_write_buffer_size, WRITE_BUFFER_BYTES + 2 * 2444);
        assert_eq!(config.write_buffer_size, WRITE_BUFFER_BYTES);
    }
}
