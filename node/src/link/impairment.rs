//! Impaired links, for networks under test.
//!
//! TCP loses nothing of ours, and between two processes on one machine nothing is late. What a bad
//! network does to packets is therefore done here, to those that a node would hand to its links: some
//! are lost, all are late, so many pass in a second, or none at all. Lost ones are counted as
//! [`DropReason::Impaired`]. A node without an impairment has none of this but one branch per packet.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use mixsocks_common::keys::Identity;
use mixsocks_sphinx::Packet;
use rand::{Rng, RngExt};
use tokio::sync::{mpsc, watch};

use super::{changed, sleep_until};
use crate::counters::DropReason;

/// The longest [`Impairment::delay`].
pub const MAX_IMPAIRMENT_DELAY: Duration = Duration::from_secs(10);

/// What happens to the packets that a node sends to other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Impairment {
    /// Which part of them is lost, from 0 (none) to 1 (all).
    pub loss: f64,
    /// By how much each of them is later; at most [`MAX_IMPAIRMENT_DELAY`].
    pub delay: Duration,
    /// How many pass in a second to each node; `None` for as many as there are.
    pub rate: Option<NonZeroU32>,
    /// Whether all of them are lost.
    pub cut: bool,
}

/// Packets on an impaired way to their links, without I/O. Call [`Self::poll_transmit`] at
/// [`Self::poll_timeout`] and after [`Self::handle_packet`], until it yields nothing.
#[derive(Debug)]
struct ImpairedLines {
    impairment: Impairment,
    lines: BTreeMap<Identity, Line>,
    held: usize,
    max_held: usize,
}

/// The way to one node: one packet after the other.
#[derive(Debug, Default)]
struct Line {
    /// When each arrives, in order.
    packets: VecDeque<(Instant, Packet)>,
    /// When the next may set out.
    free_at: Option<Instant>,
}

impl ImpairedLines {
    fn new(impairment: Impairment, max_held: usize) -> Self {
        Self { impairment, lines: BTreeMap::new(), held: 0, max_held }
    }

    /// Packets that come from now on fare otherwise; those on their way arrive as they would have.
    fn set(&mut self, impairment: Impairment) {
        self.impairment = impairment;
        for line in self.lines.values_mut() {
            line.free_at = None;
        }
    }

    /// Sends a packet on its way.
    ///
    /// # Errors
    /// Why it will not arrive.
    fn handle_packet(
        &mut self,
        now: Instant,
        to: Identity,
        packet: Packet,
        rng: &mut impl Rng,
    ) -> Result<(), DropReason> {
        let Impairment { loss, delay, rate, cut } = self.impairment;
        if cut || rng.random_bool(loss.clamp(0.0, 1.0)) {
            return Err(DropReason::Impaired);
        }
        if self.held >= self.max_held {
            return Err(DropReason::QueueFull);
        }
        let line = self.lines.entry(to).or_default();
        let sets_out = line.free_at.map_or(now, |free| free.max(now));
        line.free_at = rate.map(|rate| sets_out + Duration::from_secs(1) / rate.get());
        // What is on its way is not overtaken when the delay has become shorter.
        let before = line.packets.back().map_or(now, |(arrival, _)| *arrival);
        line.packets.push_back(((sets_out + delay).max(before), packet));
        self.held += 1;
        Ok(())
    }

    /// A packet that has arrived, and whose it is.
    fn poll_transmit(&mut self, now: Instant) -> Option<(Identity, Packet)> {
        let arrived =
            |line: &Line| line.packets.front().is_some_and(|(arrival, _)| now >= *arrival);
        let (to, line) = self.lines.iter_mut().find(|(_, line)| arrived(line))?;
        let (_, packet) = line.packets.pop_front()?;
        self.held -= 1;
        Some((*to, packet))
    }

    /// When the next arrives.
    fn poll_timeout(&self) -> Option<Instant> {
        self.lines.values().filter_map(|line| line.packets.front()).map(|(at, _)| *at).min()
    }
}

/// Drives [`ImpairedLines`]: takes packets, and hands over those that arrive to `deliver` and those that
/// do not to `drop_one`, until none can come any more. Holds no more than `max_held` packets.
pub(super) async fn impair(
    mut impairments: watch::Receiver<Impairment>,
    mut packets: mpsc::Receiver<(Identity, Packet)>,
    max_held: usize,
    deliver: impl Fn(&Identity, Packet),
    drop_one: impl Fn(DropReason),
) {
    let mut lines = ImpairedLines::new(*impairments.borrow_and_update(), max_held);
    loop {
        let timeout = lines.poll_timeout();
        let packet = tokio::select! {
            packet = packets.recv() => match packet {
                Some(packet) => Some(packet),
                None => return,
            },
            () = sleep_until(timeout) => None,
            () = changed(&mut impairments) => {
                lines.set(*impairments.borrow_and_update());
                None
            }
        };
        let now = tokio::time::Instant::now().into_std();
        if let Some((to, packet)) = packet
            && let Err(reason) = lines.handle_packet(now, to, packet, &mut rand::rng())
        {
            drop_one(reason);
        }
        while let Some((to, packet)) = lines.poll_transmit(now) {
            deliver(&to, packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_common::keys::IdentityKey;
    use mixsocks_sphinx::HEADER_LEN;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const MAX_HELD: usize = 100;

    struct Wire {
        lines: ImpairedLines,
        rng: StdRng,
        now: Instant,
        to: [Identity; 2],
    }

    impl Wire {
        fn new(impairment: Impairment) -> Self {
            let mut rng = StdRng::seed_from_u64(1);
            let to = [(); 2].map(|()| IdentityKey::generate(&mut rng).identity());
            let lines = ImpairedLines::new(impairment, MAX_HELD);
            Self { lines, rng, now: Instant::now(), to }
        }

        fn send(&mut self, to: usize, fill: u8) -> Result<(), DropReason> {
            let packet = Packet::from_bytes(vec![fill; HEADER_LEN + 1024], 1024).unwrap();
            self.lines.handle_packet(self.now, self.to[to], packet, &mut self.rng)
        }

        /// Waits for the next arrivals; when and what they are.
        fn arrivals(&mut self, began: Instant) -> Option<(Duration, Vec<(usize, u8)>)> {
            let at = self.lines.poll_timeout()?;
            let mut arrived = Vec::new();
            if at > self.now {
                assert!(self.lines.poll_transmit(at - Duration::from_nanos(1)).is_none());
                self.now = at;
            }
            while let Some((to, packet)) = self.lines.poll_transmit(self.now) {
                let to = self.to.iter().position(|identity| *identity == to).unwrap();
                arrived.push((to, packet.as_bytes()[0]));
            }
            Some((self.now - began, arrived))
        }
    }

    #[test]
    fn nothing_happens_to_packets_by_default() {
        let mut wire = Wire::new(Impairment::default());
        let began = wire.now;
        for (to, fill) in [(0, 1), (1, 2), (0, 3)] {
            wire.send(to, fill).unwrap();
        }
        let (after, mut arrived) = wire.arrivals(began).unwrap();
        arrived.sort_unstable();
        assert_eq!((after, arrived), (Duration::ZERO, vec![(0, 1), (0, 3), (1, 2)]));
        assert_eq!(wire.lines.poll_timeout(), None);
    }

    #[test]
    fn so_many_are_lost_and_a_cut_line_loses_all() {
        const COUNT: u32 = 10_000;
        let mut wire = Wire::new(Impairment { loss: 0.2, ..Impairment::default() });
        let mut lost = 0;
        for _ in 0..COUNT {
            match wire.send(0, 1) {
                Ok(()) => assert!(wire.lines.poll_transmit(wire.now).is_some()),
                Err(reason) => {
                    assert_eq!(reason, DropReason::Impaired);
                    lost += 1;
                }
            }
        }
        assert!((COUNT * 18 / 100..COUNT * 22 / 100).contains(&lost), "{lost}");
        for all in [
            Impairment { loss: 1.0, ..Impairment::default() },
            Impairment { cut: true, ..Impairment::default() },
        ] {
            wire.lines.set(all);
            assert!((0..100).all(|_| wire.send(0, 1) == Err(DropReason::Impaired)));
        }
    }

    #[test]
    fn a_delay_is_exact_and_keeps_the_order() {
        let delay = Duration::from_millis(50);
        let mut wire = Wire::new(Impairment { delay, ..Impairment::default() });
        let began = wire.now;
        wire.send(0, 1).unwrap();
        wire.now += delay / 2;
        wire.lines.set(Impairment::default());
        wire.send(0, 2).unwrap();
        wire.send(1, 3).unwrap();
        assert_eq!(wire.arrivals(began), Some((delay / 2, vec![(1, 3)])));
        assert_eq!(wire.arrivals(began), Some((delay, vec![(0, 1), (0, 2)])));
        assert_eq!(wire.arrivals(began), None);
    }

    #[test]
    fn so_many_pass_in_a_second_to_each_node() {
        let rate = NonZeroU32::new(10);
        let mut wire = Wire::new(Impairment { rate, ..Impairment::default() });
        let began = wire.now;
        for fill in 0..3 {
            wire.send(0, fill).unwrap();
            wire.send(1, fill).unwrap();
        }
        for fill in 0..3 {
            let (after, mut arrived) = wire.arrivals(began).unwrap();
            arrived.sort_unstable();
            assert_eq!(after, Duration::from_millis(100) * fill.into());
            assert_eq!(arrived, [(0, fill), (1, fill)]);
        }
        assert_eq!(wire.arrivals(began), None);
    }

    #[test]
    fn a_full_line_drops() {
        let rate = NonZeroU32::new(1);
        let mut wire = Wire::new(Impairment { rate, ..Impairment::default() });
        for _ in 0..MAX_HELD {
            wire.send(0, 1).unwrap();
        }
        assert_eq!(wire.send(0, 1), Err(DropReason::QueueFull));
        assert!(wire.lines.poll_transmit(wire.now).is_some());
        assert_eq!(wire.send(0, 1), Ok(()));
    }
}
