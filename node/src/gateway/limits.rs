//! How often anybody may register, and how fast a client may send.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mixsocks_common::gateway::delivery::MAX_HELD_BYTES;

use crate::link::LINK_QUEUE_BYTES;
use crate::sources::Source;

/// Registrations that a source may make at once; then one per [`SOURCE_INTERVAL`]. Many people may
/// share an address.
pub(super) const SOURCE_BURST: u32 = 64;
const SOURCE_INTERVAL: Duration = Duration::from_secs(10);
/// As many sources may register from one IPv6 site as if they were four: a house or a small company.
const SITE_BURST: u32 = 4 * SOURCE_BURST;
const SITE_INTERVAL: Duration = Duration::from_millis(2500);
/// Registrations at this gateway at once; then one per [`GATEWAY_INTERVAL`]: what a disk stores
/// without effort.
const GATEWAY_BURST: u32 = 1024;
const GATEWAY_INTERVAL: Duration = Duration::from_millis(100);
/// Sources and sites that are remembered. No more than 1,124 of each can have registered within
/// their interval, as the gateway's limit holds for all of them together.
const MAX_SOURCES: usize = 4096;

/// Token buckets of the gateway, of each source and of each site.
pub(super) struct RegistrationLimit {
    gateway: Bucket,
    sources: BTreeMap<Source, Bucket>,
}

/// A token bucket, told by the time at which it will be full again.
#[derive(Clone, Copy)]
struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// The bucket after one more, or how long to wait for it.
    fn take(self, burst: u32, interval: Duration, now: Instant) -> Result<Self, Duration> {
        let full_at = self.full_at.max(now) + interval;
        let excess = (full_at - now).saturating_sub(interval * burst);
        if excess.is_zero() { Ok(Self { full_at }) } else { Err(excess) }
    }
}

impl RegistrationLimit {
    pub(super) fn new(now: Instant) -> Self {
        Self { gateway: Bucket { full_at: now }, sources: BTreeMap::new() }
    }

    /// Counts a registration; if there were too many, how long to wait.
    pub(super) fn take(&mut self, source: Source, now: Instant) -> Result<(), Duration> {
        // A source that is refused takes nothing from the others.
        let of_source = self.bucket(source, now).take(SOURCE_BURST, SOURCE_INTERVAL, now)?;
        let of_site = match source.site() {
            Some(site) => {
                let bucket = self.bucket(site, now).take(SITE_BURST, SITE_INTERVAL, now)?;
                Some((site, bucket))
            }
            None => None,
        };
        let gateway = self.gateway.take(GATEWAY_BURST, GATEWAY_INTERVAL, now)?;
        // Room for a source and its site.
        if self.sources.len() + 1 >= MAX_SOURCES {
            self.sources.retain(|_, bucket| bucket.full_at > now);
        }
        if self.sources.len() + 1 >= MAX_SOURCES && !self.sources.contains_key(&source) {
            return Err(SOURCE_INTERVAL);
        }
        self.gateway = gateway;
        self.sources.insert(source, of_source);
        self.sources.extend(of_site);
        Ok(())
    }

    fn bucket(&self, source: Source, now: Instant) -> Bucket {
        self.sources.get(&source).copied().unwrap_or(Bucket { full_at: now })
    }
}

/// Bytes of frames that are read from one client per second: 14,000 frames of the usual packets. A
/// client at full speed sends some 10,000 (more it cannot make, and no mix of one core peels more),
/// so that this slows down nobody but those who send garbage.
const CLIENT_BYTES_PER_SECOND: u32 = 32 * 1024 * 1024;
/// Bytes that may come at once: what a client may hold, and send again after a cut. Less than half
/// of what may wait for a mix, so that nobody fills that queue in one go.
const CLIENT_BURST_BYTES: usize = MAX_HELD_BYTES;
const _: () = assert!(CLIENT_BURST_BYTES < LINK_QUEUE_BYTES / 2);

/// When to read on from a client: its share of the queues to the mixes, which all clients use.
///
/// A token bucket that goes into debt for a frame that has come already, told by the time at which
/// it will be full again. While it is empty nothing is read, so that TCP makes the client wait: a
/// client that sends too fast loses nothing, and its packets drive out nobody else's.
pub(super) struct ReadLimit {
    per_frame: Duration,
    burst: Duration,
    full_at: Instant,
}

impl ReadLimit {
    pub(super) fn new(frame_bytes: usize, now: Instant) -> Self {
        Self { per_frame: time_for(frame_bytes), burst: time_for(CLIENT_BURST_BYTES), full_at: now }
    }

    /// Counts a frame; `Some` when nothing may be read before then.
    pub(super) fn handle_frame(&mut self, now: Instant) -> Option<Instant> {
        self.full_at = self.full_at.max(now) + self.per_frame;
        let excess = (self.full_at - now).saturating_sub(self.burst);
        (!excess.is_zero()).then(|| now + excess)
    }
}

/// How long as many bytes take at [`CLIENT_BYTES_PER_SECOND`].
fn time_for(bytes: usize) -> Duration {
    Duration::from_secs(bytes as u64) / CLIENT_BYTES_PER_SECOND
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn source(address: &str) -> Source {
        address.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_source_that_floods_waits_and_others_do_not() {
        let start = Instant::now();
        let mut limit = RegistrationLimit::new(start);
        let (flooder, other) = (source("192.0.2.1"), source("192.0.2.2"));
        let taken = (0..1000).filter(|_| limit.take(flooder, start).is_ok()).count();
        assert_eq!(taken, SOURCE_BURST as usize);
        assert_eq!(limit.take(flooder, start), Err(SOURCE_INTERVAL));
        assert_eq!(limit.take(other, start), Ok(()));
        let later = start + SOURCE_INTERVAL;
        assert_eq!(
            limit.take(flooder, later - Duration::from_millis(1)).unwrap_err().as_millis(),
            1
        );
        assert_eq!(limit.take(flooder, later), Ok(()));
        assert!(limit.take(flooder, later).is_err());
    }

    #[test]
    fn a_site_that_uses_all_its_sources_waits_and_others_do_not() {
        let start = Instant::now();
        let mut limit = RegistrationLimit::new(start);
        let of_site = |n: u32| source(&format!("2001:db8:1:{n:x}::1"));
        let taken = (0..1000).filter(|n| limit.take(of_site(*n), start).is_ok()).count();
        assert_eq!(taken, SITE_BURST as usize);
        assert_eq!(limit.take(of_site(1000), start), Err(SITE_INTERVAL));
        assert_eq!(limit.take(source("2001:db8:2::1"), start), Ok(()));
        assert_eq!(limit.take(of_site(1000), start + SITE_INTERVAL), Ok(()));
    }

    #[test]
    fn many_sources_together_are_limited_too_and_fill_no_memory() {
        let start = Instant::now();
        let mut limit = RegistrationLimit::new(start);
        let mut taken = 0;
        for n in 0..100_000u32 {
            let now = start + Duration::from_millis(n.into());
            // Each from a site of its own.
            let source = Source::from(IpAddr::from((u128::from(n) << 80).to_be_bytes()));
            taken += usize::from(limit.take(source, now).is_ok());
            assert!(limit.sources.len() <= MAX_SOURCES);
        }
        assert_eq!(taken, GATEWAY_BURST as usize + 999);
    }

    /// Frames that may come within that time from the start, however greedily they are read.
    fn frames_within(frame_bytes: usize, time: Duration) -> u64 {
        let start = Instant::now();
        let (mut limit, mut now) = (ReadLimit::new(frame_bytes, start), start);
        for count in 1.. {
            if let Some(ready_at) = limit.handle_frame(now) {
                assert!(ready_at > now);
                now = ready_at;
            }
            if now > start + time {
                return count;
            }
        }
        unreachable!()
    }

    #[test]
    fn a_flood_is_read_at_its_rate_after_the_burst_whatever_frames_measure() {
        for frame_bytes in [1420, 2444, 33_164] {
            let seconds = 5;
            let frames = frames_within(frame_bytes, Duration::from_secs(seconds));
            let expected = (CLIENT_BURST_BYTES as u64
                + seconds * u64::from(CLIENT_BYTES_PER_SECOND))
                / frame_bytes as u64;
            assert!(frames.abs_diff(expected) <= 2, "{frames} {expected}");
        }
    }

    #[test]
    fn a_client_at_full_speed_never_waits() {
        let mut now = Instant::now();
        let mut limit = ReadLimit::new(2444, now);
        let is_slowed = |limit: &mut ReadLimit, now, frames: u32| {
            (0..frames).filter(|_| limit.handle_frame(now).is_some()).count()
        };
        // All that it holds after a cut, and then 10,000 a second in bursts of 50 ms.
        assert_eq!(is_slowed(&mut limit, now, 1716), 0);
        assert!(limit.handle_frame(now).is_some(), "and no more at once");
        now += Duration::from_secs(1);
        for _ in 0..100 {
            assert_eq!(is_slowed(&mut limit, now, 500), 0);
            now += Duration::from_millis(50);
        }
        // Silence saves up no more than the burst.
        now += Duration::from_secs(3600);
        assert_eq!(is_slowed(&mut limit, now, 1716), 0);
        assert!(limit.handle_frame(now).is_some());
    }
}
