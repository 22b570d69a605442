//! What a node counts: packets in, packets out, and packets dropped with the reason.
//!
//! Nothing is counted per client or per neighbour, so that a log of these numbers tells no more
//! than how busy the node was.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a packet ended here instead of going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum DropReason {
    /// A frame broke the rules of its link; the link was closed.
    MalformedFrame,
    /// The packet's MAC is wrong: changed on the way, or made for another key.
    BadMac,
    /// The packet's group element is of low order.
    LowOrder,
    /// The packet has another version of the format.
    UnknownVersion,
    /// The routing information says neither forward nor final.
    BadRouting,
    /// The packet was here before.
    Replayed,
    /// The replay filter holds as many tags as it may: a new packet cannot be told from an old one.
    ReplayFilterFull,
    /// The packet's replay tag could not be stored, so that its replay would pass too.
    ReplayLogFailed,
    /// The next hop is nobody that this node knows.
    UnknownNextHop,
    /// The next hop is a node, but none that this node may send to.
    WrongLayer,
    /// The route ends here, where routes do not end.
    FinalHopHere,
    /// The route ends here, and the contents are no message for a client.
    MalformedMessage,
    /// More messages wait to be stored than may.
    StoreBusy,
    /// More packets wait out their delays than may.
    DelayQueueFull,
    /// The queue to the next hop is full.
    QueueFull,
    /// The next hop cannot be reached.
    LinkDown,
    /// The next hop is no client that is registered here.
    UnknownClient,
    /// The queue to the client is full.
    ClientQueueFull,
    /// The packet waited for its client for too long.
    Expired,
    /// The node is under test, and loses packets as it was told ([`crate::link::Impairment`]).
    Impaired,
}

impl DropReason {
    /// All reasons, in the order of their declaration.
    pub const ALL: [Self; 20] = [
        Self::MalformedFrame,
        Self::BadMac,
        Self::LowOrder,
        Self::UnknownVersion,
        Self::BadRouting,
        Self::Replayed,
        Self::ReplayFilterFull,
        Self::ReplayLogFailed,
        Self::UnknownNextHop,
        Self::WrongLayer,
        Self::FinalHopHere,
        Self::MalformedMessage,
        Self::StoreBusy,
        Self::DelayQueueFull,
        Self::QueueFull,
        Self::LinkDown,
        Self::UnknownClient,
        Self::ClientQueueFull,
        Self::Expired,
        Self::Impaired,
    ];

    /// A few words for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MalformedFrame => "malformed frame",
            Self::BadMac => "bad MAC",
            Self::LowOrder => "low-order group element",
            Self::UnknownVersion => "unknown version",
            Self::BadRouting => "bad routing information",
            Self::Replayed => "replayed",
            Self::ReplayFilterFull => "replay filter full",
            Self::ReplayLogFailed => "replay log failed",
            Self::UnknownNextHop => "unknown next hop",
            Self::WrongLayer => "next hop in a wrong layer",
            Self::FinalHopHere => "final hop here",
            Self::MalformedMessage => "malformed message",
            Self::StoreBusy => "store busy",
            Self::DelayQueueFull => "delay queue full",
            Self::QueueFull => "link queue full",
            Self::LinkDown => "link down",
            Self::UnknownClient => "unknown client",
            Self::ClientQueueFull => "client queue full",
            Self::Expired => "expired",
            Self::Impaired => "impaired link",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The running counts of one node since its start; shared by its tasks.
#[derive(Debug, Default)]
pub struct Counters {
    packets_in: AtomicU64,
    packets_out: AtomicU64,
    drops: [AtomicU64; DropReason::ALL.len()],
}

impl Counters {
    /// Counts packets taken from links.
    pub fn add_in(&self, packets: u64) {
        self.packets_in.fetch_add(packets, Ordering::Relaxed);
    }

    /// Counts packets written to links.
    pub fn add_out(&self, packets: u64) {
        self.packets_out.fetch_add(packets, Ordering::Relaxed);
    }

    /// Counts one dropped packet.
    pub fn add_drop(&self, reason: DropReason) {
        self.add_drops(reason, 1);
    }

    /// Counts dropped packets.
    pub fn add_drops(&self, reason: DropReason, packets: u64) {
        self.drops[reason as usize].fetch_add(packets, Ordering::Relaxed);
    }

    /// The counts now. Each is exact; together they may be a few packets apart.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            packets_in: self.packets_in.load(Ordering::Relaxed),
            packets_out: self.packets_out.load(Ordering::Relaxed),
            drops: std::array::from_fn(|i| self.drops[i].load(Ordering::Relaxed)),
        }
    }
}

/// The counts of a node at one moment.
///
/// Displays as one line that names only the reasons that occurred.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Packets taken from links.
    pub packets_in: u64,
    /// Packets written to links.
    pub packets_out: u64,
    drops: [u64; DropReason::ALL.len()],
}

impl Snapshot {
    /// Packets dropped for this reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// Packets dropped, by reason.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        DropReason::ALL.into_iter().map(|reason| (reason.as_str(), self.dropped(reason)))
    }

    /// Packets dropped for any reason.
    pub fn dropped_total(&self) -> u64 {
        self.drops.iter().sum()
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets in, {} out", self.packets_in, self.packets_out)?;
        let mut separator = "; dropped: ";
        for reason in DropReason::ALL {
            let count = self.dropped(reason);
            if count > 0 {
                write!(f, "{separator}{count} {reason}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_place_and_name() {
        for (i, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i);
            let others = &DropReason::ALL[..i];
            assert!(others.iter().all(|other| other.as_str() != reason.as_str()));
        }
    }

    #[test]
    fn the_line_names_only_what_happened() {
        let counters = Counters::default();
        assert_eq!(counters.snapshot().to_string(), "0 packets in, 0 out");
        counters.add_in(5);
        counters.add_out(2);
        counters.add_drop(DropReason::BadMac);
        counters.add_drops(DropReason::Replayed, 2);
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.to_string(), "5 packets in, 2 out; dropped: 1 bad MAC, 2 replayed");
        assert_eq!(snapshot.dropped_total(), 3);
    }
}
