//! What was measured, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::child::Memory;
use super::transfer::Moved;

const MIB: f64 = 1024.0 * 1024.0;

/// All figures. What was not asked for, or cannot be known of a network that was not started here, is
/// null.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) cpu: String,
    pub(super) profile: Option<String>,
    pub(super) mean_delay_ms: Option<f64>,
    /// From the start of the process, or of all of them, to the proxy.
    pub(super) start_seconds: Option<f64>,
    pub(super) first_byte: Option<FirstByte>,
    pub(super) down: Option<Throughput>,
    pub(super) up: Option<Throughput>,
    pub(super) ten_down: Option<Throughput>,
    pub(super) ten_up: Option<Throughput>,
    pub(super) busy_first_byte: Option<BusyFirstByte>,
    pub(super) page: Option<Page>,
    pub(super) connections: Option<AtOnce>,
    pub(super) streams: Option<AtOnce>,
    /// Of all processes together, as what follows.
    pub(super) idle_cpu_percent: Option<f64>,
    pub(super) resident_mib: Option<f64>,
    pub(super) peak_resident_mib: Option<f64>,
    pub(super) roles: Vec<RoleFigures>,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            cpu: super::cpu_name(),
            profile: None,
            mean_delay_ms: None,
            start_seconds: None,
            first_byte: None,
            down: None,
            up: None,
            ten_down: None,
            ten_up: None,
            busy_first_byte: None,
            page: None,
            connections: None,
            streams: None,
            idle_cpu_percent: None,
            resident_mib: None,
            peak_resident_mib: None,
            roles: Vec::new(),
        }
    }
}

/// Times to the first byte.
#[derive(Debug, Serialize)]
pub(super) struct FirstByte {
    requests: usize,
    median_ms: f64,
    p95_ms: f64,
}

/// Times to the first byte beside a download.
#[derive(Debug, Serialize)]
pub(super) struct BusyFirstByte {
    #[serde(flatten)]
    first_byte: FirstByte,
    /// What the download moved meanwhile.
    download_mib_per_second: f64,
}

/// Streams in one direction.
#[derive(Debug, Serialize)]
pub(super) struct Throughput {
    streams: usize,
    bytes: u64,
    seconds: f64,
    mib_per_second: f64,
    slowest_stream_mib_per_second: f64,
    fastest_stream_mib_per_second: f64,
    /// The slowest stream's rate as a part of what it would have if all had the same: 1 is fair.
    slowest_share: f64,
    cpu_seconds_per_mib: Option<f64>,
    cpu_seconds_per_mib_by_role: BTreeMap<String, f64>,
}

/// Objects over a few connections, from opening the first connection to the last byte.
#[derive(Debug, Serialize)]
pub(super) struct Page {
    objects: usize,
    object_bytes: u64,
    connections: usize,
    runs: usize,
    median_seconds: f64,
    slowest_seconds: f64,
}

/// Connections that are opened at once, from opening the first one to the last byte of all.
#[derive(Debug, Serialize)]
pub(super) struct AtOnce {
    connections: usize,
    bytes_each: u64,
    runs: usize,
    median_seconds: f64,
    slowest_seconds: f64,
    /// Of all runs together.
    failed: usize,
    first_failure: Option<String>,
}

/// One process.
#[derive(Debug, Serialize)]
pub(super) struct RoleFigures {
    name: String,
    /// After the load.
    #[serde(flatten)]
    pub(super) memory: Option<Memory>,
    /// Packets that it remembers, at 9.4 to 11.3 bytes each.
    pub(super) replay_tags: Option<u64>,
    pub(super) idle_cpu_percent: Option<f64>,
}

impl RoleFigures {
    /// One of which nothing is known yet.
    pub(super) fn of(name: &str) -> Self {
        Self { name: name.to_owned(), memory: None, replay_tags: None, idle_cpu_percent: None }
    }
}

impl FirstByte {
    /// Of at least one time; sorts them.
    pub(super) fn of(times: &mut [Duration]) -> Self {
        times.sort_unstable();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Self {
            requests: times.len(),
            median_ms: ms(times[rank(times.len(), 50)]),
            p95_ms: ms(times[rank(times.len(), 95)]),
        }
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        let Self { requests, median_ms, p95_ms } = self;
        write!(
            f,
            "{name:<20}{median_ms:>9.1} ms     median, 95 % within {p95_ms:.1} ms ({requests} requests)"
        )
    }
}

impl BusyFirstByte {
    /// Of at least one time beside a download that moved so many bytes in so long a time.
    pub(super) fn of(times: &mut [Duration], bytes: u64, time: Duration) -> Self {
        let download_mib_per_second = mib(bytes) / time.as_secs_f64();
        Self { first_byte: FirstByte::of(times), download_mib_per_second }
    }
}

impl Page {
    /// Of at least one run; sorts them.
    pub(super) fn of(
        runs: &mut [Duration],
        objects: usize,
        object_bytes: u64,
        connections: usize,
    ) -> Self {
        let [median_seconds, slowest_seconds] = median_and_slowest(runs);
        let runs = runs.len();
        Self { objects, object_bytes, connections, runs, median_seconds, slowest_seconds }
    }
}

impl AtOnce {
    /// Of at least one run; sorts them.
    pub(super) fn of(
        runs: &mut [Duration],
        connections: usize,
        bytes_each: u64,
        failures: Vec<String>,
    ) -> Self {
        let [median_seconds, slowest_seconds] = median_and_slowest(runs);
        Self {
            connections,
            bytes_each,
            runs: runs.len(),
            median_seconds,
            slowest_seconds,
            failed: failures.len(),
            first_failure: failures.into_iter().next(),
        }
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        let Self { connections, bytes_each, median_seconds, slowest_seconds, .. } = self;
        let kib = bytes_each / 1024;
        write!(
            f,
            "{name:<20}{median_seconds:>9.2} s      {connections} of {kib} KiB, {slowest_seconds:.2} s at most"
        )?;
        match &self.first_failure {
            None => writeln!(f, ", all succeed"),
            Some(failure) => writeln!(f, ", {} FAIL: {failure}", self.failed),
        }
    }
}

fn median_and_slowest(runs: &mut [Duration]) -> [f64; 2] {
    runs.sort_unstable();
    [rank(runs.len(), 50), runs.len() - 1].map(|at| runs[at].as_secs_f64())
}

/// Index of a percentile among `count` sorted values: the least that so many percent do not exceed.
pub(super) fn rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).saturating_sub(1)
}

impl Throughput {
    pub(super) fn of(
        streams: &[Moved],
        seconds: f64,
        cpu_seconds: Option<Vec<(String, f64)>>,
    ) -> Self {
        let bytes = streams.iter().map(|moved| moved.bytes).sum();
        let mib = mib(bytes);
        let rates = streams.iter().map(|moved| self::mib(moved.bytes) / moved.seconds);
        let slowest = rates.clone().fold(f64::INFINITY, f64::min);
        #[expect(clippy::cast_precision_loss, reason = "streams are few")]
        let fair = rates.clone().sum::<f64>() / streams.len() as f64;
        Self {
            streams: streams.len(),
            bytes,
            seconds,
            mib_per_second: mib / seconds,
            slowest_stream_mib_per_second: slowest,
            fastest_stream_mib_per_second: rates.fold(0.0, f64::max),
            slowest_share: slowest / fair,
            cpu_seconds_per_mib: cpu_seconds
                .as_ref()
                .map(|used| used.iter().map(|(_, cpu)| cpu).sum::<f64>() / mib),
            cpu_seconds_per_mib_by_role: cpu_seconds
                .into_iter()
                .flatten()
                .map(|(name, cpu)| (name, cpu / mib))
                .collect(),
        }
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        write!(f, "{name:<20}{:>9.2} MiB/s", self.mib_per_second)?;
        if self.streams > 1 {
            let (slowest, fastest) =
                (self.slowest_stream_mib_per_second, self.fastest_stream_mib_per_second);
            let percent = 100.0 * self.slowest_share;
            write!(
                f,
                "  {slowest:.2} to {fastest:.2} each (from {percent:.0} % of a fair share on)"
            )?;
        }
        if let Some(cpu) = self.cpu_seconds_per_mib {
            write!(f, "  {cpu:.3} CPU s/MiB")?;
        }
        writeln!(f)?;
        if self.cpu_seconds_per_mib_by_role.len() > 1 {
            let mut roles = self.cpu_seconds_per_mib_by_role.iter().peekable();
            write!(f, "{:<20}", "")?;
            while let Some((name, cpu)) = roles.next() {
                let comma = if roles.peek().is_some() { ", " } else { "\n" };
                write!(f, "{name} {cpu:.4}{comma}")?;
            }
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 bytes")]
pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(first_byte) = &self.first_byte {
            first_byte.row(f, "first byte")?;
            writeln!(f)?;
        }
        let throughputs = [
            ("one stream down", &self.down),
            ("one stream up", &self.up),
            ("ten streams down", &self.ten_down),
            ("ten streams up", &self.ten_up),
        ];
        for (name, throughput) in throughputs {
            throughput.as_ref().map_or(Ok(()), |throughput| throughput.row(f, name))?;
        }
        if let Some(busy) = &self.busy_first_byte {
            busy.first_byte.row(f, "the same, busy")?;
            writeln!(f, ", beside {:.2} MiB/s", busy.download_mib_per_second)?;
        }
        if let Some(page) = &self.page {
            let Page {
                objects, object_bytes, connections, median_seconds, slowest_seconds, ..
            } = page;
            let kib = object_bytes / 1024;
            writeln!(
                f,
                "{:<20}{median_seconds:>9.2} s      {objects} objects of {kib} KiB over {connections} connections, {slowest_seconds:.2} s at most",
                "page"
            )?;
        }
        for (name, at_once) in [("connections", &self.connections), ("streams", &self.streams)] {
            at_once.as_ref().map_or(Ok(()), |at_once| at_once.row(f, name))?;
        }
        if let Some(percent) = self.idle_cpu_percent {
            writeln!(f, "{:<20}{percent:>9.2} %      of one core", "idle")?;
        }
        if let (Some(resident), Some(peak)) = (self.resident_mib, self.peak_resident_mib) {
            writeln!(f, "{:<20}{resident:>9.0} MiB    at most {peak:.0} MiB", "memory")?;
        }
        if let Some(seconds) = self.start_seconds {
            writeln!(f, "{:<20}{seconds:>9.2} s", "start")?;
        }
        if self.roles.len() > 1 {
            writeln!(
                f,
                "\n{:<20}{:>9}{:>12}{:>14}{:>10}",
                "", "resident", "at most", "replay tags", "idle"
            )?;
            self.roles.iter().try_for_each(|role| writeln!(f, "{role}"))?;
            writeln!(f)?;
        }
        write!(f, "every byte that arrived was right")
    }
}

impl fmt::Display for RoleFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<20}", self.name)?;
        match self.memory {
            Some(Memory { resident_mib, peak_resident_mib }) => {
                write!(f, "{resident_mib:>5.0} MiB{peak_resident_mib:>8.0} MiB")?;
            }
            None => write!(f, "{:>21}", "")?,
        }
        match self.replay_tags {
            Some(tags) => write!(f, "{tags:>14}")?,
            None => write!(f, "{:>14}", "")?,
        }
        match self.idle_cpu_percent {
            Some(percent) => write!(f, "{percent:>8.2} %"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        assert_eq!((rank(1, 50), rank(1, 95)), (0, 0));
        assert_eq!((rank(20, 50), rank(20, 95)), (9, 18));
        assert_eq!((rank(100, 50), rank(100, 95)), (49, 94));
    }

    #[test]
    fn rates() {
        let moved = |mib: u64, seconds| Moved { bytes: mib << 20, seconds };
        let used = vec![("client".to_owned(), 3.0), ("mix-1".to_owned(), 1.0)];
        let throughput = Throughput::of(&[moved(6, 2.0), moved(2, 2.0)], 2.0, Some(used));
        assert_eq!(throughput.mib_per_second, 4.0);
        assert_eq!(throughput.slowest_stream_mib_per_second, 1.0);
        assert_eq!(throughput.fastest_stream_mib_per_second, 3.0);
        assert_eq!(throughput.slowest_share, 0.5);
        assert_eq!(throughput.cpu_seconds_per_mib, Some(0.5));
        assert_eq!(throughput.cpu_seconds_per_mib_by_role["mix-1"], 0.125);
    }

    #[test]
    fn a_failure_is_named() {
        let run = || [Duration::from_secs(3), Duration::from_secs(1)];
        let shown = |failures: &[&str]| {
            let failures = failures.iter().map(|&failure| failure.to_owned()).collect();
            let connections = Some(AtOnce::of(&mut run(), 200, 10 << 10, failures));
            Report { connections, ..Report::default() }.to_string()
        };
        assert!(shown(&[]).contains("1.00 s      200 of 10 KiB, 3.00 s at most, all succeed"));
        assert!(shown(&["no room", "no"]).contains(", 2 FAIL: no room"));
    }
}
