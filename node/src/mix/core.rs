//! What a mix does with peeled packets: check the next hop, hold, pass on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mixsocks_common::keys::Identity;
use mixsocks_common::topology::Topology;
use mixsocks_sphinx::{Packet, Peeled};

use crate::counters::DropReason;
use crate::link::NextHops;

/// Bytes of packets that a mix holds at most, whatever the network's packets measure: some 70,000 of
/// the usual ones, and 5,000 of the largest. A mix that forwards 10,000 packets per second with a
/// mean delay of 50 ms holds 500.
pub const MAX_HELD_BYTES: usize = 160 * 1024 * 1024;

/// The delays of a mix, without a clock or a socket.
///
/// After each [`handle_peeled`](Self::handle_peeled) and whenever
/// [`poll_timeout`](Self::poll_timeout) has come, call [`poll_transmit`](Self::poll_transmit) until
/// it returns `None`, then ask for the timeout again.
#[derive(Debug)]
pub struct MixCore {
    me: Identity,
    next_hops: NextHops,
    max_delay: Duration,
    max_held_packets: usize,
    /// By deadline; the number of the packet tells those of one deadline apart.
    held: BTreeMap<(Instant, u64), (Identity, Packet)>,
    handled: u64,
}

impl MixCore {
    /// The core of mix `me`, which holds at most `max_held_bytes` of packets.
    pub fn new(topology: &Topology, me: &Identity, max_held_bytes: usize) -> Self {
        Self {
            me: *me,
            next_hops: NextHops::new(topology, me),
            max_delay: topology.parameters.max_delay,
            max_held_packets: max_held_bytes / topology.packet_bytes(),
            held: BTreeMap::new(),
            handled: 0,
        }
    }

    /// Goes on with another topology, whose packets have the same size. Packets that are held leave
    /// when they would have, to the node that they were for.
    pub fn set_topology(&mut self, topology: &Topology) {
        self.next_hops = NextHops::new(topology, &self.me);
        self.max_delay = topology.parameters.max_delay;
    }

    /// Takes a packet and holds it for as long as its sender chose, but not longer than the
    /// network's maximum.
    ///
    /// When no more can be held, the packet that would leave last goes, be it this one or another.
    /// So somebody who fills a mix with long delays drives out their own packets and not those that
    /// others sent with the usual delays.
    ///
    /// # Errors
    /// The reason for which a packet was dropped: [`DropReason::FinalHopHere`],
    /// [`DropReason::UnknownNextHop`] or [`DropReason::WrongLayer`] for this one,
    /// [`DropReason::DelayQueueFull`] for this or another one.
    pub fn handle_peeled(&mut self, now: Instant, peeled: Peeled) -> Result<(), DropReason> {
        let Peeled::Forward { next_hop, delay, packet } = peeled else {
            return Err(DropReason::FinalHopHere);
        };
        let next_hop = self.next_hops.resolve(&next_hop)?;
        let deadline = now + delay.min(self.max_delay);
        self.handled += 1;
        self.held.insert((deadline, self.handled), (next_hop, packet));
        if self.held.len() > self.max_held_packets {
            self.held.pop_last();
            return Err(DropReason::DelayQueueFull);
        }
        Ok(())
    }

    /// When the next packet is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.held.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// The next packet whose deadline is not after `now`, and whom to send it to.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<(Identity, Packet)> {
        let first = self.held.first_entry()?;
        let (deadline, _) = first.key();
        (*deadline <= now).then(|| first.remove())
    }

    /// Packets held.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::testnet::{MAX_DELAY, PAYLOAD_LEN, TestNet};
    use mixsocks_sphinx::HEADER_LEN;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn forward(next_hop: [u8; 32], delay: Duration, fill: u8) -> Peeled {
        forward_long(next_hop, delay, fill, PAYLOAD_LEN)
    }

    fn forward_long(next_hop: [u8; 32], delay: Duration, fill: u8, payload_len: usize) -> Peeled {
        let bytes = vec![fill; HEADER_LEN + payload_len];
        let packet = Packet::from_bytes(bytes, payload_len).unwrap();
        Peeled::Forward { next_hop, delay, packet }
    }

    fn fills(core: &mut MixCore, now: Instant) -> Vec<u8> {
        std::iter::from_fn(|| core.poll_transmit(now))
            .map(|(_, packet)| packet.as_bytes()[0])
            .collect()
    }

    /// The core of the mix in layer 1, and its one next hop.
    async fn core(max_held: usize) -> (MixCore, [u8; 32]) {
        let net = TestNet::new().await;
        let max_held_bytes = max_held * net.topology.packet_bytes();
        let core = MixCore::new(&net.topology, &net.identity(1), max_held_bytes);
        (core, *net.identity(2).as_bytes())
    }

    #[tokio::test]
    async fn packets_leave_by_deadline_and_ties_in_order() {
        let (mut core, next) = core(10).await;
        let start = Instant::now();
        for (delay, fill) in [(5, 1), (3, 2), (5, 3), (0, 4)] {
            core.handle_peeled(start, forward(next, delay * MILLISECOND, fill)).unwrap();
        }
        assert_eq!(core.poll_timeout(), Some(start));
        assert_eq!(fills(&mut core, start), [4]);
        assert_eq!(core.poll_timeout(), Some(start + 3 * MILLISECOND));
        let just_before = start + 3 * MILLISECOND - Duration::from_nanos(1);
        assert!(fills(&mut core, just_before).is_empty());
        assert_eq!(fills(&mut core, start + 6 * MILLISECOND), [2, 1, 3]);
        assert_eq!(core.poll_timeout(), None);
    }

    #[tokio::test]
    async fn no_delay_is_longer_than_the_networks_maximum() {
        let (mut core, next) = core(10).await;
        let start = Instant::now();
        for delay in [MAX_DELAY + MILLISECOND, Duration::from_nanos(u64::MAX), Duration::MAX] {
            core.handle_peeled(start, forward(next, delay, 1)).unwrap();
        }
        assert_eq!(fills(&mut core, start + MAX_DELAY), [1, 1, 1]);
    }

    /// Long delays of one sender do not drive out the short ones of others.
    #[tokio::test]
    async fn a_full_mix_gives_up_what_would_leave_last() {
        let (mut core, next) = core(3).await;
        let start = Instant::now();
        for (delay, fill) in [(10, 1), (20, 2), (15, 3)] {
            core.handle_peeled(start, forward(next, delay * MILLISECOND, fill)).unwrap();
        }
        let full = Err(DropReason::DelayQueueFull);
        assert_eq!(core.handle_peeled(start, forward(next, 20 * MILLISECOND, 4)), full);
        assert_eq!(core.handle_peeled(start, forward(next, MILLISECOND, 5)), full);
        assert_eq!(core.held(), 3);
        assert_eq!(fills(&mut core, start + MAX_DELAY), [5, 1, 3]);
    }

    /// The bound is one of memory, so a network of long packets holds fewer of them.
    #[tokio::test]
    async fn long_packets_take_no_more_memory_than_short_ones() {
        const MAX_BYTES: usize = 1024 * 1024;
        for payload_len in [1024, 32_768] {
            let mut net = TestNet::new().await;
            net.set_payload_len(payload_len);
            let next = *net.identity(2).as_bytes();
            let mut core = MixCore::new(&net.topology, &net.identity(1), MAX_BYTES);
            let now = Instant::now();
            let forward = || forward_long(next, MILLISECOND, 1, payload_len);
            while core.handle_peeled(now, forward()).is_ok() {}
            let held_bytes = core.held() * net.topology.packet_bytes();
            assert!(held_bytes <= MAX_BYTES, "{held_bytes}");
            assert!(held_bytes + net.topology.packet_bytes() > MAX_BYTES, "{held_bytes}");
        }
    }

    #[tokio::test]
    async fn what_may_not_go_on_leaves_the_core_unchanged() {
        let net = TestNet::new().await;
        let mut core = MixCore::new(&net.topology, &net.identity(1), MAX_HELD_BYTES);
        let now = Instant::now();
        for wrong in [0, 1, 3, 4] {
            let peeled = forward(*net.identity(wrong).as_bytes(), MILLISECOND, 1);
            assert_eq!(core.handle_peeled(now, peeled), Err(DropReason::WrongLayer));
        }
        let peeled = forward([1; 32], MILLISECOND, 1);
        assert_eq!(core.handle_peeled(now, peeled), Err(DropReason::UnknownNextHop));
        assert_eq!((core.held(), core.poll_timeout()), (0, None));
    }

    #[tokio::test]
    async fn another_topology_counts_from_the_next_packet_on() {
        let net = TestNet::new().await;
        let mut core = MixCore::new(&net.topology, &net.identity(1), MAX_HELD_BYTES);
        let now = Instant::now();
        let to = |number: usize, delay| forward(*net.identity(number).as_bytes(), delay, 1);
        core.handle_peeled(now, to(2, MAX_DELAY)).unwrap();
        // From layer 1 to layer 2, with half of the longest delay.
        let mut other = net.swapped(1, 2).as_ref().clone();
        other.parameters.max_delay = MAX_DELAY / 2;
        core.set_topology(&other);
        assert_eq!(core.handle_peeled(now, to(2, MAX_DELAY)), Err(DropReason::WrongLayer));
        core.handle_peeled(now, to(3, MAX_DELAY)).unwrap();
        let half = now + MAX_DELAY / 2;
        assert_eq!(core.poll_transmit(half).map(|(to, _)| to), Some(net.identity(3)));
        assert_eq!(core.poll_transmit(half), None);
        assert_eq!(core.poll_transmit(now + MAX_DELAY).map(|(to, _)| to), Some(net.identity(2)));
        // Nowhere, and back.
        core.set_topology(&net.without(1));
        assert_eq!(core.handle_peeled(now, to(2, MAX_DELAY)), Err(DropReason::WrongLayer));
        core.set_topology(&net.topology);
        core.handle_peeled(now, to(2, MAX_DELAY)).unwrap();
    }

    /// Random packets and clock steps against a sorted list; no deadline survives its handling.
    #[tokio::test]
    async fn behaves_like_a_sorted_list() {
        const MAX_HELD: usize = 20;
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut core, next) = core(MAX_HELD).await;
        let mut now = Instant::now();
        let mut model: Vec<(Instant, u64, u8)> = Vec::new();
        for number in 0..3000 {
            let delay = Duration::from_micros(rng.random_range(0..30_000));
            let fill = rng.random();
            let result = core.handle_peeled(now, forward(next, delay, fill));
            model.push((now + delay.min(MAX_DELAY), number, fill));
            model.sort_unstable();
            assert_eq!(result.is_err(), model.len() > MAX_HELD);
            model.truncate(MAX_HELD);
            if rng.random_ratio(1, 5) {
                now += Duration::from_micros(rng.random_range(0..5_000));
                let due = model.partition_point(|(deadline, ..)| *deadline <= now);
                let expected: Vec<_> = model.drain(..due).map(|(.., fill)| fill).collect();
                assert_eq!(fills(&mut core, now), expected);
                assert!(core.poll_timeout().is_none_or(|deadline| deadline > now));
            }
            assert_eq!(core.poll_timeout(), model.first().map(|(deadline, ..)| *deadline));
            assert_eq!(core.held(), model.len());
        }
    }
}
