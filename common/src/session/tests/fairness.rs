//! Whose bytes go into the next packet.

use super::frame::{Frame, put_varint, take_varint};
use super::*;

/// A provider that streams are opened at, and its client's packets.
pub(super) struct Sender {
    pub(super) session: ProviderSession,
    pub(super) now: Instant,
    number: u64,
    /// What the streams' programs have not written yet, for want of room.
    unwritten: BTreeMap<StreamId, usize>,
}

impl Sender {
    pub(super) fn new(surbs: usize) -> Self {
        let now = Instant::now();
        let session = ProviderSession::new(now, MAX_PACKET_BYTES, MEAN_DELAY);
        let mut sender = Self { session, now, number: 0, unwritten: BTreeMap::new() };
        sender.give_surbs(surbs);
        sender
    }

    pub(super) fn give_surbs(&mut self, count: usize) {
        let mut surb = [0; SURB_LEN];
        surb[0] = 9;
        for _ in 0..count {
            self.handle(&[Frame::Surbs { generation: 0, surbs: &[surb] }]);
        }
    }

    pub(super) fn handle(&mut self, frames: &[Frame<'_>]) {
        let mut contents = Vec::new();
        put_varint(&mut contents, self.number);
        put_varint(&mut contents, 0);
        frames.iter().for_each(|frame| frame.encode(&mut contents));
        self.number += 1;
        self.session.handle_packet(self.now, &contents).unwrap();
    }

    pub(super) fn open(&mut self, stream: StreamId, bytes: usize) {
        let target = "example.com:80".parse().unwrap();
        let limit = MAX_HELD_BYTES;
        self.handle(&[Frame::Open { stream, target }, Frame::Credit { stream, limit }]);
        self.session.opened(stream, OpenOutcome::Connected);
        self.unwritten.insert(stream, bytes);
        self.go_on_writing();
    }

    fn go_on_writing(&mut self) {
        for (&stream, bytes) in &mut self.unwritten {
            *bytes -= self.session.write(stream, &vec![1; *bytes]).unwrap();
        }
        self.unwritten.retain(|_, bytes| *bytes > 0);
    }

    /// Sends one reply, and says whether there was anything to send; programs go on writing.
    pub(super) fn send(&mut self, out: &mut Vec<u8>) -> bool {
        let sent = self.session.poll_transmit(self.now, out).is_some();
        self.go_on_writing();
        sent
    }

    /// Bytes of each stream in the next reply.
    fn next_packet(&mut self) -> Vec<(StreamId, usize)> {
        let mut out = Vec::new();
        assert!(self.send(&mut out));
        let mut input = &out[1..];
        take_varint(&mut input).unwrap();
        take_varint(&mut input).unwrap();
        input.split_off(..4).unwrap();
        let frames = std::iter::from_fn(|| Frame::decode(&mut input).unwrap());
        frames
            .filter_map(|frame| match frame {
                Frame::Data { stream, bytes, .. } => Some((stream, bytes.len())),
                _ => None,
            })
            .collect()
    }
}

#[test]
fn ten_streams_get_equal_shares() {
    let mut sender = Sender::new(MAX_STOCK_SURBS);
    // One began long before the others.
    sender.open(1, 4 << 20);
    (0..200).for_each(|_| drop(sender.next_packet()));
    (2..=10).for_each(|stream| sender.open(stream, 4 << 20));
    let mut shares = [0; 11];
    for _ in 0..2000 {
        sender.next_packet().into_iter().for_each(|(stream, len)| shares[index(stream)] += len);
    }
    let (least, most) = (shares[1..].iter().min().unwrap(), shares.iter().max().unwrap());
    println!("{shares:?}");
    assert!(*most < least + least / 5, "{shares:?}");
}

#[test]
fn a_stream_that_begins_is_not_behind_bulk_transfers() {
    let mut sender = Sender::new(MAX_STOCK_SURBS);
    (1..=50).for_each(|stream| sender.open(stream, 1 << 20));
    // All of them have had their first bytes sent.
    (0..500).for_each(|_| drop(sender.next_packet()));
    sender.open(51, 3000);
    let first: Vec<_> = sender.next_packet().into_iter().map(|(stream, _)| stream).collect();
    assert_eq!(first, [51]);
    assert_eq!(sender.next_packet()[0].0, 51);
    assert_ne!(sender.next_packet()[0].0, 51);
}

/// One that begins goes first for 16 KiB and then takes turns.
#[test]
fn a_bulk_stream_soon_takes_turns() {
    let mut sender = Sender::new(MAX_STOCK_SURBS);
    sender.open(1, 1 << 20);
    (0..100).for_each(|_| drop(sender.next_packet()));
    sender.open(2, 1 << 20);
    let first: usize = (0..9).flat_map(|_| sender.next_packet()).map(|(_, len)| len).sum();
    assert!(first > 16 * 1024);
    let next: Vec<_> = (0..6).map(|_| sender.next_packet()[0].0).collect();
    assert!(next == [1, 2, 1, 2, 1, 2] || next == [2, 1, 2, 1, 2, 1], "{next:?}");
}

/// One that waits for its program now and then does not begin anew with every packet.
#[test]
fn a_stream_that_runs_dry_for_a_moment_waits_a_turn() {
    let mut sender = Sender::new(MAX_STOCK_SURBS);
    (1..=4).for_each(|stream| sender.open(stream, 1 << 20));
    (0..100).for_each(|_| drop(sender.next_packet()));
    sender.open(5, 1500);
    let mut shares = [0; 6];
    for _ in 0..500 {
        sender.next_packet().into_iter().for_each(|(stream, len)| shares[index(stream)] += len);
        sender.session.write(5, &[1; 1500]).unwrap();
    }
    assert!(shares[5] < 2 * shares[1], "{shares:?}");
}

fn index(stream: StreamId) -> usize {
    usize::try_from(stream).unwrap()
}
