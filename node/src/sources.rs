//! Where connections come from, and how many of one source may be half open.

use std::collections::VecDeque;
use std::net::IpAddr;

/// Where a connection comes from, as finely as addresses are handed out: an IPv4 address, or the
/// first 64 bits of an IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Source(Prefix);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Prefix {
    V4([u8; 4]),
    V6([u16; 4]),
}

impl From<IpAddr> for Source {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => Prefix::V4(address.octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Prefix::V6([a, b, c, d])
            }
        })
    }
}

/// How many connections may be half open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HalfOpenLimits {
    /// From everywhere. One more puts out the oldest: somebody who holds many open and stays silent
    /// then delays nobody, while refusing the newest would lock everybody out.
    pub(crate) total: usize,
    /// From one source; one more puts out the oldest of its own, so that one source does not put
    /// out the others.
    pub(crate) per_source: usize,
}

/// Connections that have not shown who they are, the oldest first.
pub(crate) struct HalfOpen<T> {
    limits: HalfOpenLimits,
    connections: VecDeque<(Source, T)>,
}

impl<T> HalfOpen<T> {
    pub(crate) fn new(limits: HalfOpenLimits) -> Self {
        Self { limits, connections: VecDeque::new() }
    }

    /// Takes out what must go before one more may come from `source`.
    pub(crate) fn make_room(&mut self, source: Source) -> Option<T> {
        let mut of_source =
            (0..self.connections.len()).filter(|at| self.connections[*at].0 == source);
        let oldest_of_source = of_source.next();
        let at = if 1 + of_source.count() >= self.limits.per_source {
            oldest_of_source?
        } else if self.connections.len() >= self.limits.total {
            0
        } else {
            return None;
        };
        self.connections.remove(at).map(|(_, connection)| connection)
    }

    pub(crate) fn push(&mut self, source: Source, connection: T) {
        self.connections.push_back((source, connection));
    }

    pub(crate) fn remove(&mut self, is_it: impl Fn(&T) -> bool) {
        self.connections.retain(|(_, connection)| !is_it(connection));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HalfOpenLimits = HalfOpenLimits { total: 512, per_source: 64 };

    fn source(address: &str) -> Source {
        address.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn sources_are_as_fine_as_addresses_are_handed_out() {
        assert!(source("192.0.2.1") != source("192.0.2.2"));
        assert!(source("::ffff:192.0.2.1") == source("192.0.2.1"));
        assert!(source("2001:db8:0:1::1") == source("2001:db8:0:1:ffff::2"));
        assert!(source("2001:db8:0:1::1") != source("2001:db8:0:2::1"));
    }

    #[test]
    fn a_source_that_holds_connections_open_puts_out_its_own() {
        let mut half_open = HalfOpen::new(LIMITS);
        let (flooder, other) = (source("192.0.2.1"), source("192.0.2.2"));
        half_open.push(other, usize::MAX);
        for n in 0..1000usize {
            let expected = n.checked_sub(LIMITS.per_source);
            assert_eq!(half_open.make_room(flooder), expected);
            half_open.push(flooder, n);
        }
        assert_eq!(half_open.make_room(other), None);
        assert_eq!(half_open.connections.len(), 1 + LIMITS.per_source);
        half_open.remove(|n| *n == usize::MAX);
        assert_eq!(half_open.connections.len(), LIMITS.per_source);
    }

    #[test]
    fn many_sources_put_out_the_oldest() {
        let mut half_open = HalfOpen::new(LIMITS);
        for n in 0..2000u32 {
            let source = Source::from(IpAddr::from(n.to_be_bytes()));
            let out = half_open.make_room(source);
            assert_eq!(out, n.checked_sub(512));
            half_open.push(source, n);
        }
        assert_eq!(half_open.connections.len(), LIMITS.total);
    }
}
