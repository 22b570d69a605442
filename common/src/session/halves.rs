//! The two directions of a stream: bytes waiting to be sent or acknowledged, and bytes received in
//! any order.

use std::collections::VecDeque;
use std::ops::Range;

use super::ranges::RangeSet;

/// What a stream takes from its application beyond what the peer has granted: some packets' worth,
/// so that there is something to send when the next grant comes.
pub const SEND_AHEAD_BYTES: u64 = 64 * 1024;

/// What a stream takes from its application beyond what it has sent: what a fast path carries in 15 ms,
/// in which the application is asked for more. All beyond that would only wait, here instead of there.
const UNSENT_BYTES: u64 = 256 * 1024;

/// A writer that waits is woken when there is room for so much, and not for each packet.
const WAKE_BYTES: usize = 16 * 1024;

/// What the sender of a stream may send before the first CREDIT. Small, since 1,024 stalled streams
/// may hold it; the window doubles while the reader keeps up.
pub const INITIAL_WINDOW_BYTES: u64 = 64 * 1024;

/// Largest window of a stream: 10 MiB/s at a round trip of 200 ms, doubled for unsteady readers.
pub const MAX_WINDOW_BYTES: u64 = 4 * 1024 * 1024;

/// Most bytes of a stream that are held behind a gap. A lost piece is missed after a quarter of a
/// second and comes after another tenth: 4 MiB at 10 MiB/s, and each further loss of the same piece
/// costs as much again.
pub const MAX_HELD_BYTES: u64 = 16 * 1024 * 1024;

/// Most gaps between received pieces of one stream: [`MAX_HELD_BYTES`] in pieces of 2 KiB, which is more
/// than honest packets leave. Beyond it the peer wastes our memory.
pub const MAX_GAPS: usize = 8192;

/// A piece of a stream that goes into one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    pub(super) fin: bool,
}

/// Bytes from the application to the peer.
#[derive(Debug)]
pub(super) struct SendHalf {
    /// Bytes from `acked_to` on.
    buffer: VecDeque<u8>,
    /// Everything below has arrived.
    acked_to: u64,
    /// What has arrived beyond it.
    acked: RangeSet,
    /// Everything from here on was never sent.
    next: u64,
    /// What was sent and lost.
    lost: RangeSet,
    /// Exclusive offset up to which the peer takes bytes.
    credit: u64,
    fin: Fin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fin {
    /// The application may write more.
    Open,
    /// The end is known but not under way.
    Waiting,
    Sent,
    Acked,
}

impl SendHalf {
    pub(super) fn new(credit: u64) -> Self {
        Self {
            buffer: VecDeque::new(),
            acked_to: 0,
            acked: RangeSet::new(),
            next: 0,
            lost: RangeSet::new(),
            credit,
            fin: Fin::Open,
        }
    }

    fn end(&self) -> u64 {
        self.acked_to + self.buffer.len() as u64
    }

    /// Bytes that are kept for sending or repeating.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// How many bytes [`SendHalf::write`] would take now: what the peer has granted, within the most
    /// that it can hold, and a little more; of that no more than is soon sent.
    pub(super) fn capacity(&self) -> usize {
        let may_hold = self.credit.min(self.acked_to + MAX_HELD_BYTES) + SEND_AHEAD_BYTES;
        index(may_hold.min(self.next + UNSENT_BYTES).saturating_sub(self.end()))
    }

    /// Whether a writer that waits should write more. Once all is sent and acknowledged, there is more
    /// room than that.
    pub(super) fn is_worth_waking(&self) -> bool {
        self.capacity() >= WAKE_BYTES
    }

    /// Takes as much of `bytes` as there is room for.
    pub(super) fn write(&mut self, bytes: &[u8]) -> usize {
        debug_assert_eq!(self.fin, Fin::Open, "nothing is written after the end");
        let taken = bytes.len().min(self.capacity());
        self.buffer.extend(&bytes[..taken]);
        taken
    }

    pub(super) fn finish(&mut self) {
        if self.fin == Fin::Open {
            self.fin = Fin::Waiting;
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.fin != Fin::Open
    }

    /// Whether every byte and the end have arrived.
    pub(super) fn is_done(&self) -> bool {
        self.fin == Fin::Acked && self.buffer.is_empty()
    }

    pub(super) fn raise_credit(&mut self, limit: u64) {
        self.credit = self.credit.max(limit);
    }

    /// Whether [`SendHalf::next_piece`] has something.
    pub(super) fn has_pending(&self) -> bool {
        let end_waits = self.fin == Fin::Waiting && self.next == self.end();
        !self.lost.is_empty() || self.next < self.end().min(self.credit) || end_waits
    }

    /// Where the next piece would begin.
    pub(super) fn next_offset(&self) -> u64 {
        self.lost.first().map_or(self.next, |range| range.start)
    }

    /// Takes the next piece of at most `max` bytes: lost ones first.
    pub(super) fn next_piece(&mut self, max: usize) -> Option<Piece> {
        let max = max as u64;
        let range = if let Some(lost) = self.lost.first() {
            let range = lost.start..lost.end.min(lost.start + max);
            self.lost.remove(range.clone());
            range
        } else {
            let limit = self.end().min(self.credit).max(self.next);
            let range = self.next..limit.min(self.next + max);
            self.next = range.end;
            range
        };
        let fin = self.fin == Fin::Waiting && range.end == self.end() && self.lost.is_empty();
        if fin {
            self.fin = Fin::Sent;
        }
        (fin || !range.is_empty()).then_some(Piece { range, fin })
    }

    /// Appends the bytes of a piece that was not acknowledged yet.
    pub(super) fn copy(&self, range: &Range<u64>, out: &mut Vec<u8>) {
        let start = usize::try_from(range.start - self.acked_to).expect("the buffer fits memory");
        let len = usize::try_from(range.end - range.start).expect("a piece fits a packet");
        let (front, back) = self.buffer.as_slices();
        let from_front = front.get(start..).unwrap_or_default();
        let from_front = &from_front[..from_front.len().min(len)];
        out.extend_from_slice(from_front);
        let back_start = start.saturating_sub(front.len());
        out.extend_from_slice(&back[back_start..back_start + len - from_front.len()]);
    }

    pub(super) fn on_acked(&mut self, piece: &Piece) {
        if piece.fin {
            self.fin = Fin::Acked;
        }
        // A piece that was lost and sent again may be acknowledged twice, in parts.
        let start = piece.range.start.max(self.acked_to);
        if start >= piece.range.end {
            return;
        }
        self.acked.insert(start..piece.range.end);
        self.lost.remove(start..piece.range.end);
        if let Some(first) = self.acked.first()
            && first.start <= self.acked_to
        {
            let len = usize::try_from(first.end - self.acked_to).expect("the buffer fits memory");
            self.buffer.drain(..len);
            self.acked_to = first.end;
            self.acked.remove(first);
            if self.buffer.is_empty() {
                self.buffer.shrink_to(0);
            }
        }
    }

    pub(super) fn on_lost(&mut self, piece: &Piece) {
        if piece.fin && self.fin == Fin::Sent {
            self.fin = Fin::Waiting;
        }
        let start = piece.range.start.max(self.acked_to);
        if start >= piece.range.end {
            return;
        }
        self.lost.insert(start..piece.range.end);
        let acked: Vec<_> =
            self.acked.iter_from(start).take_while(|range| range.start < piece.range.end).collect();
        for range in acked {
            self.lost.remove(range);
        }
    }
}

/// The peer breaks the rules of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamViolation {
    /// Bytes beyond the credit.
    #[error("bytes beyond the credit")]
    Credit,
    /// Bytes after the end, or a second, different end.
    #[error("the end of the stream moved")]
    FinalSize,
    /// Too many gaps between the pieces.
    #[error("more gaps than honest packets leave")]
    Gaps,
}

/// Bytes from the peer to the application.
#[derive(Debug)]
pub(super) struct RecvHalf {
    /// Bytes from `read_to` on; those not in `received` are filler.
    buffer: VecDeque<u8>,
    read_to: u64,
    received: RangeSet,
    end: Option<u64>,
    /// Exclusive offset that was granted.
    credit: u64,
    /// How far ahead of what the reader could have read the peer may be.
    window_bytes: u64,
    /// What was taken out of the session's pool.
    pooled_bytes: u64,
    end_read: bool,
}

impl RecvHalf {
    pub(super) fn new() -> Self {
        Self {
            buffer: VecDeque::new(),
            read_to: 0,
            received: RangeSet::new(),
            end: None,
            credit: INITIAL_WINDOW_BYTES,
            window_bytes: INITIAL_WINDOW_BYTES,
            pooled_bytes: 0,
            end_read: false,
        }
    }

    /// Takes a piece in; whether something new can be read.
    pub(super) fn insert(
        &mut self,
        offset: u64,
        bytes: &[u8],
        fin: bool,
    ) -> Result<bool, StreamViolation> {
        let end = offset + bytes.len() as u64;
        if end > self.credit {
            return Err(StreamViolation::Credit);
        }
        match self.end {
            Some(known) if end > known || (fin && end != known) => {
                return Err(StreamViolation::FinalSize);
            }
            None if fin && end < self.received.end().max(self.read_to) => {
                return Err(StreamViolation::FinalSize);
            }
            _ => {}
        }
        let was_readable = self.is_readable();
        if fin {
            self.end = Some(end);
        }
        let start = offset.max(self.read_to);
        if start < end {
            if self.received.range_count() >= MAX_GAPS {
                return Err(StreamViolation::Gaps);
            }
            self.received.insert(start..end);
            write_at(
                &mut self.buffer,
                index(start - self.read_to),
                &bytes[index(start - offset)..],
            );
        }
        Ok(!was_readable && self.is_readable())
    }

    /// Whether everything up to the end has arrived.
    pub(super) fn is_whole(&self) -> bool {
        self.end == Some(self.read_to + self.readable_bytes() as u64)
    }

    /// Bytes that are kept, gaps included.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes that can be read now.
    pub(super) fn readable_bytes(&self) -> usize {
        match self.received.first() {
            Some(first) if first.start <= self.read_to => index(first.end - self.read_to),
            _ => 0,
        }
    }

    fn is_at_end(&self) -> bool {
        self.end == Some(self.read_to)
    }

    pub(super) fn is_readable(&self) -> bool {
        self.readable_bytes() > 0 || self.is_at_end()
    }

    /// Whether the application has read everything, up to the end.
    pub(super) fn is_done(&self) -> bool {
        self.end_read
    }

    /// Reads into `out`: `Some(0)` is the end of the stream, `None` means nothing yet.
    pub(super) fn read(&mut self, out: &mut [u8]) -> Option<usize> {
        let len = self.readable_bytes().min(out.len());
        if len == 0 {
            if self.is_at_end() {
                self.end_read = true;
                return Some(0);
            }
            return (self.readable_bytes() > 0).then_some(0);
        }
        let (front, back) = self.buffer.as_slices();
        let from_front = front.len().min(len);
        out[..from_front].copy_from_slice(&front[..from_front]);
        out[from_front..len].copy_from_slice(&back[..len - from_front]);
        self.buffer.drain(..len);
        let start = self.read_to;
        self.read_to += len as u64;
        self.received.remove(start..self.read_to);
        if self.buffer.is_empty() {
            self.buffer.shrink_to(0);
        }
        Some(len)
    }

    /// Grants more, out of the session's pool, and gives back to it what is not needed any more;
    /// whether there is a new limit to tell. Call it after reading and after inserting.
    ///
    /// The peer may be one window ahead of the reader. While the reader keeps up, a gap is not its
    /// fault: then what has arrived beyond the gap counts as read, and each half of a window that is
    /// used up doubles the window.
    pub(super) fn grant(&mut self, pool_bytes: &mut u64) -> bool {
        let keeps_up = self.readable_bytes() == 0;
        let reached = if keeps_up { self.received.end().max(self.read_to) } else { self.read_to };
        let mut raised = false;
        if self.end.is_none() && reached + self.window_bytes >= self.credit + self.window_bytes / 2
        {
            let window_bytes = if keeps_up {
                (2 * self.window_bytes).min(MAX_WINDOW_BYTES)
            } else {
                self.window_bytes
            };
            let can_hold =
                MAX_HELD_BYTES.min(INITIAL_WINDOW_BYTES + self.pooled_bytes + *pool_bytes);
            let credit = (reached + window_bytes).min(self.read_to + can_hold);
            // When the pool is nearly empty, steps are small: they are worth a frame from half of
            // the first window on, or when the peer has nothing left.
            let is_worth_it = credit >= self.credit + INITIAL_WINDOW_BYTES / 2;
            if is_worth_it || (credit > self.credit && reached == self.credit) {
                self.credit = credit;
                self.window_bytes = window_bytes;
                raised = true;
            }
        }
        let needed = self.end.unwrap_or(self.credit).saturating_sub(self.read_to);
        let pooled_bytes = needed.saturating_sub(INITIAL_WINDOW_BYTES);
        *pool_bytes = *pool_bytes + self.pooled_bytes - pooled_bytes;
        self.pooled_bytes = pooled_bytes;
        raised
    }

    /// What was taken out of the session's pool.
    pub(super) fn pooled_bytes(&self) -> u64 {
        self.pooled_bytes
    }

    /// The limit that was granted last.
    pub(super) fn credit(&self) -> u64 {
        self.credit
    }
}

fn index(distance: u64) -> usize {
    usize::try_from(distance).expect("windows fit memory")
}

/// Writes over what is there and beyond it, with filler before it if it begins later.
fn write_at(buffer: &mut VecDeque<u8>, at: usize, bytes: &[u8]) {
    if at > buffer.len() {
        buffer.resize(at, 0);
    }
    let (bytes, beyond) = bytes.split_at(bytes.len().min(buffer.len() - at));
    overwrite(buffer, at, bytes);
    buffer.extend(beyond);
}

fn overwrite(buffer: &mut VecDeque<u8>, at: usize, bytes: &[u8]) {
    let (front, back) = buffer.as_mut_slices();
    let split = front.len();
    if at >= split {
        back[at - split..at - split + bytes.len()].copy_from_slice(bytes);
    } else {
        let in_front = bytes.len().min(split - at);
        front[at..at + in_front].copy_from_slice(&bytes[..in_front]);
        back[..bytes.len() - in_front].copy_from_slice(&bytes[in_front..]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::streams::WINDOW_POOL_BYTES;
    use super::*;
    use proptest::prelude::*;
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};

    fn read_all(recv: &mut RecvHalf) -> Vec<u8> {
        let mut all = Vec::new();
        let mut chunk = [0u8; 777];
        while let Some(n @ 1..) = recv.read(&mut chunk) {
            all.extend_from_slice(&chunk[..n]);
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn bytes_survive_loss_and_reordering(seed: u64, len in 0usize..40_000) {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            let bytes: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            let mut send = SendHalf::new(INITIAL_WINDOW_BYTES);
            let mut recv = RecvHalf::new();
            let mut pool = WINDOW_POOL_BYTES;
            let mut written = 0;
            let mut received = Vec::new();
            let mut in_flight: Vec<Piece> = Vec::new();
            let mut rounds = 0;
            while !(send.is_done() && recv.is_at_end()) {
                rounds += 1;
                prop_assert!(rounds < 10_000);
                let chunk = rng.random_range(0..3000).min(len - written);
                if !send.is_finished() {
                    written += send.write(&bytes[written..written + chunk]);
                    if written == len {
                        send.finish();
                    }
                }
                while let Some(piece) = send.next_piece(rng.random_range(1..1500)) {
                    in_flight.push(piece);
                }
                in_flight.shuffle(&mut rng);
                let keep = rng.random_range(0..=in_flight.len());
                for piece in in_flight.split_off(keep) {
                    if rng.random_bool(0.3) {
                        send.on_lost(&piece);
                        continue;
                    }
                    if piece.range.start >= send.acked_to {
                        let mut data = Vec::new();
                        send.copy(&piece.range, &mut data);
                        prop_assert!(recv.insert(piece.range.start, &data, piece.fin).is_ok());
                    }
                    recv.grant(&mut pool);
                    // Some pieces arrive although they are thought lost.
                    if rng.random_bool(0.1) { send.on_lost(&piece) } else { send.on_acked(&piece) }
                }
                received.extend(read_all(&mut recv));
                recv.grant(&mut pool);
                send.raise_credit(recv.credit());
            }
            received.extend(read_all(&mut recv));
            prop_assert_eq!(received, bytes);
        }
    }

    #[test]
    fn credit_is_not_overrun_by_us_nor_by_the_peer() {
        let mut send = SendHalf::new(10);
        send.write(&[1; 30]);
        assert_eq!(send.next_piece(100), Some(Piece { range: 0..10, fin: false }));
        assert_eq!(send.next_piece(100), None);
        assert!(!send.has_pending());
        send.finish();
        assert!(!send.has_pending(), "the end waits for credit, too");
        assert_eq!(send.next_piece(100), None);
        send.raise_credit(25);
        send.raise_credit(20);
        assert_eq!(send.next_piece(100), Some(Piece { range: 10..25, fin: false }));

        let mut recv = RecvHalf::new();
        let last = INITIAL_WINDOW_BYTES - 5;
        assert_eq!(recv.insert(last, &[0; 6], false), Err(StreamViolation::Credit));
        assert_eq!(recv.insert(last, &[0; 5], false), Ok(false));
    }

    #[test]
    fn the_end_does_not_move() {
        let mut recv = RecvHalf::new();
        assert_eq!(recv.insert(0, b"abc", true), Ok(true));
        assert_eq!(recv.insert(0, b"abcd", false), Err(StreamViolation::FinalSize));
        assert_eq!(recv.insert(0, b"ab", true), Err(StreamViolation::FinalSize));
        assert_eq!(recv.insert(0, b"ab", false), Ok(false));
        let mut recv = RecvHalf::new();
        assert_eq!(recv.insert(5, b"x", false), Ok(false));
        assert_eq!(recv.insert(0, b"abc", true), Err(StreamViolation::FinalSize));
        let mut recv = RecvHalf::new();
        assert_eq!(recv.insert(0, b"abcd", false), Ok(true));
        assert_eq!(recv.read(&mut [0; 4]), Some(4));
        assert_eq!(recv.insert(0, b"abc", true), Err(StreamViolation::FinalSize));
    }

    #[test]
    fn an_empty_stream_ends() {
        let mut send = SendHalf::new(10);
        send.finish();
        let piece = send.next_piece(100).unwrap();
        assert_eq!(piece, Piece { range: 0..0, fin: true });
        let mut recv = RecvHalf::new();
        assert_eq!(recv.insert(0, b"", true), Ok(true));
        assert_eq!(recv.read(&mut [0; 4]), Some(0));
        assert!(recv.is_done());
        send.on_lost(&piece);
        assert_eq!(send.next_piece(100), Some(piece.clone()));
        send.on_acked(&piece);
        assert!(send.is_done());
    }

    #[test]
    fn gaps_are_bounded() {
        let mut recv = RecvHalf::new();
        let result = (0..MAX_GAPS as u64 + 1)
            .map(|n| recv.insert(n * 2 + 1, b"x", false))
            .find(Result::is_err);
        assert_eq!(result, Some(Err(StreamViolation::Gaps)));
    }

    const KIB: u64 = 1024;

    fn insert(recv: &mut RecvHalf, offset: u64, len: u64) {
        recv.insert(offset, &vec![1; index(len)], false).unwrap();
    }

    #[test]
    fn credit_follows_the_reader() {
        let (mut recv, mut pool) = (RecvHalf::new(), WINDOW_POOL_BYTES);
        insert(&mut recv, 0, 64 * KIB);
        assert!(!recv.grant(&mut pool), "nothing was read");
        recv.read(&mut [0; 32 * 1024 - 1]);
        assert!(!recv.grant(&mut pool));
        recv.read(&mut [0; 1]);
        assert!(recv.grant(&mut pool), "half of the window was read");
        assert_eq!(recv.credit(), 96 * KIB, "but the reader is behind, so that it stays small");
        recv.read(&mut [0; 64 * 1024]);
        assert!(recv.grant(&mut pool));
        assert_eq!(recv.credit(), 64 * KIB + 128 * KIB, "it has caught up");
        assert_eq!(pool, WINDOW_POOL_BYTES - 64 * KIB);
        assert!(!recv.grant(&mut pool));
    }

    #[test]
    fn a_gap_does_not_stop_the_sender_but_the_bound_does() {
        let (mut recv, mut pool) = (RecvHalf::new(), WINDOW_POOL_BYTES);
        let mut at = KIB;
        while at < recv.credit() {
            let len = (2 * KIB).min(recv.credit() - at);
            insert(&mut recv, at, len);
            recv.grant(&mut pool);
            at += len;
        }
        assert_eq!(recv.credit(), MAX_HELD_BYTES);
        assert_eq!(pool, WINDOW_POOL_BYTES + INITIAL_WINDOW_BYTES - MAX_HELD_BYTES);
        // The gap is filled and all is read: the pool has back what is not granted.
        insert(&mut recv, 0, KIB);
        assert_eq!(read_all(&mut recv).len() as u64, MAX_HELD_BYTES);
        assert!(recv.grant(&mut pool));
        assert_eq!(recv.credit(), MAX_HELD_BYTES + MAX_WINDOW_BYTES);
        assert_eq!(pool, WINDOW_POOL_BYTES + INITIAL_WINDOW_BYTES - MAX_WINDOW_BYTES);
        recv.insert(MAX_HELD_BYTES, b"", true).unwrap();
        recv.grant(&mut pool);
        assert_eq!(pool, WINDOW_POOL_BYTES, "a stream that has ended needs nothing");
    }

    #[test]
    fn an_empty_pool_slows_a_stream_and_does_not_stop_it() {
        let (mut recv, mut pool) = (RecvHalf::new(), 0);
        let mut at = 0;
        for _ in 0..100 {
            let len = recv.credit() - at;
            assert!(len >= INITIAL_WINDOW_BYTES / 2);
            insert(&mut recv, at, len);
            at += len;
            assert_eq!(read_all(&mut recv).len() as u64, len);
            assert!(recv.grant(&mut pool));
            assert_eq!((recv.credit(), pool), (at + INITIAL_WINDOW_BYTES, 0));
        }
    }
}
