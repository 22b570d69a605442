//! Where connections come from, how many of one source may be half open, and how many logged in.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a connection comes from, as finely as addresses are handed out: an IPv4 address, or the
/// first 64 bits of an IPv6 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Source(Prefix);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Prefix {
    V4([u8; 4]),
    V6([u16; 4]),
    /// All sources of one site.
    V6Site([u16; 3]),
}

impl Source {
    /// The site of an IPv6 source, its first 48 bits: what one customer may be handed (RFC 6177),
    /// with 65,536 sources. IPv4 has none: whoever holds many such addresses pays for each.
    pub(crate) fn site(self) -> Option<Self> {
        match self.0 {
            Prefix::V6([a, b, c, _]) => Some(Self(Prefix::V6Site([a, b, c]))),
            Prefix::V4(_) | Prefix::V6Site(_) => None,
        }
    }
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
    /// From all sources of one IPv6 site, in the same way.
    pub(crate) per_site: usize,
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
        let HalfOpenLimits { total, per_source, per_site } = self.limits;
        let at = self
            .oldest_of(per_source, |other| other == source)
            .or_else(|| {
                let site = source.site()?;
                self.oldest_of(per_site, |other| other.site() == Some(site))
            })
            .or_else(|| self.oldest_of(total, |_| true))?;
        self.connections.remove(at).map(|(_, connection)| connection)
    }

    /// Where the oldest connection from these sources is, if they have `max`.
    fn oldest_of(&self, max: usize, is_of: impl Fn(Source) -> bool) -> Option<usize> {
        let mut all = (0..self.connections.len()).filter(|at| is_of(self.connections[*at].0));
        let oldest = all.next()?;
        (1 + all.count() >= max).then_some(oldest)
    }

    pub(crate) fn push(&mut self, source: Source, connection: T) {
        self.connections.push_back((source, connection));
    }

    pub(crate) fn remove(&mut self, is_it: impl Fn(&T) -> bool) {
        self.connections.retain(|(_, connection)| !is_it(connection));
    }
}

/// How many places each source, and each IPv6 site, has.
pub(crate) struct SourcePlaces {
    per_source: usize,
    per_site: usize,
    /// Places taken by each source and site; no entry is zero.
    taken: Mutex<BTreeMap<Source, usize>>,
}

/// A place of a source; free again when dropped.
pub(crate) struct SourcePlace {
    source: Source,
    places: Arc<SourcePlaces>,
}

impl SourcePlaces {
    pub(crate) fn new(per_source: usize, per_site: usize) -> Self {
        Self { per_source, per_site, taken: Mutex::default() }
    }

    /// Takes a place; `None` when the source, or its site, has no more.
    pub(crate) fn take(self: &Arc<Self>, source: Source) -> Option<SourcePlace> {
        let mut taken = self.lock();
        let count = |source| taken.get(&source).copied().unwrap_or(0);
        if count(source) >= self.per_source
            || source.site().is_some_and(|site| count(site) >= self.per_site)
        {
            return None;
        }
        for source in std::iter::once(source).chain(source.site()) {
            *taken.entry(source).or_default() += 1;
        }
        Some(SourcePlace { source, places: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Source, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourcePlace {
    pub(crate) fn source(&self) -> Source {
        self.source
    }
}

impl Drop for SourcePlace {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        for source in std::iter::once(self.source).chain(self.source.site()) {
            if let Some(count) = taken.get_mut(&source) {
                *count -= 1;
                if *count == 0 {
                    taken.remove(&source);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HalfOpenLimits = HalfOpenLimits { total: 512, per_source: 64, per_site: 256 };

    fn source(address: &str) -> Source {
        address.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn sources_are_as_fine_as_addresses_are_handed_out() {
        assert!(source("192.0.2.1") != source("192.0.2.2"));
        assert!(source("::ffff:192.0.2.1") == source("192.0.2.1"));
        assert!(source("2001:db8:0:1::1") == source("2001:db8:0:1:ffff::2"));
        assert!(source("2001:db8:0:1::1") != source("2001:db8:0:2::1"));
        assert!(source("2001:db8:0:1::1").site() == source("2001:db8:0:2::1").site());
        assert!(source("2001:db8:0:1::1").site() != source("2001:db8:1:1::1").site());
        assert!(source("192.0.2.1").site().is_none());
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
    fn a_site_that_uses_all_its_sources_puts_out_its_own() {
        let mut half_open = HalfOpen::new(LIMITS);
        half_open.push(source("192.0.2.2"), usize::MAX);
        half_open.push(source("2001:db8:2::1"), usize::MAX);
        for n in 0..1000usize {
            let flooder = source(&format!("2001:db8:1:{n:x}::1"));
            assert_eq!(half_open.make_room(flooder), n.checked_sub(LIMITS.per_site));
            half_open.push(flooder, n);
        }
        assert_eq!(half_open.make_room(source("2001:db8:2::1")), None);
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

    #[test]
    fn places_are_bounded_per_source_and_site_and_come_back() {
        let places = Arc::new(SourcePlaces::new(2, 3));
        let (one, other) = (source("2001:db8:1:1::1"), source("2001:db8:1:2::1"));
        let taken: Vec<_> = [one, one, other].map(|source| places.take(source)).into();
        assert!(taken.iter().all(Option::is_some));
        assert!(places.take(one).is_none(), "the source has no more");
        assert!(places.take(other).is_none(), "the site has no more");
        assert!(places.take(source("2001:db8:2::1")).is_some());
        assert!(places.take(source("192.0.2.1")).is_some());
        drop(taken);
        assert!(places.lock().is_empty());
        assert!(places.take(one).is_some());
    }
}
