//! What was measured, as a table and as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::transfer::Moved;

const MIB: f64 = 1024.0 * 1024.0;

/// All figures. What cannot be known of a network that was not started here is null.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) profile: Option<String>,
    pub(super) mean_delay_ms: Option<f64>,
    /// From the start of the process to its proxy.
    pub(super) start_seconds: Option<f64>,
    pub(super) first_byte: FirstByte,
    pub(super) down: Throughput,
    pub(super) up: Throughput,
    pub(super) ten_down: Throughput,
    pub(super) ten_up: Throughput,
    pub(super) idle_cpu_percent: Option<f64>,
    pub(super) resident_mib: Option<f64>,
    pub(super) peak_resident_mib: Option<f64>,
}

/// Times to the first byte.
#[derive(Debug, Serialize)]
pub(super) struct FirstByte {
    requests: usize,
    median_ms: f64,
    p95_ms: f64,
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
    cpu_seconds_per_mib: Option<f64>,
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
}

/// Index of a percentile among `count` sorted values: the least that so many percent do not exceed.
fn rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).saturating_sub(1)
}

impl Throughput {
    pub(super) fn of(streams: &[Moved], seconds: f64, cpu_seconds: Option<f64>) -> Self {
        let bytes = streams.iter().map(|moved| moved.bytes).sum();
        let mib = mib(bytes);
        let rates = streams.iter().map(|moved| self::mib(moved.bytes) / moved.seconds);
        Self {
            streams: streams.len(),
            bytes,
            seconds,
            mib_per_second: mib / seconds,
            slowest_stream_mib_per_second: rates.clone().fold(f64::INFINITY, f64::min),
            fastest_stream_mib_per_second: rates.fold(0.0, f64::max),
            cpu_seconds_per_mib: cpu_seconds.map(|cpu| cpu / mib),
        }
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        write!(f, "{name:<20}{:>9.2} MiB/s", self.mib_per_second)?;
        if self.streams > 1 {
            let (slowest, fastest) =
                (self.slowest_stream_mib_per_second, self.fastest_stream_mib_per_second);
            write!(f, "  {slowest:.2} to {fastest:.2} each")?;
        }
        if let Some(cpu) = self.cpu_seconds_per_mib {
            write!(f, "  {cpu:.3} CPU s/MiB")?;
        }
        writeln!(f)
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 bytes")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FirstByte { requests, median_ms, p95_ms } = self.first_byte;
        writeln!(
            f,
            "{:<20}{median_ms:>9.0} ms     median, 95 % within {p95_ms:.0} ms ({requests} requests)",
            "first byte"
        )?;
        self.down.row(f, "one stream down")?;
        self.up.row(f, "one stream up")?;
        self.ten_down.row(f, "ten streams down")?;
        self.ten_up.row(f, "ten streams up")?;
        if let Some(percent) = self.idle_cpu_percent {
            writeln!(f, "{:<20}{percent:>9.2} %      of one core", "idle")?;
        }
        if let (Some(resident), Some(peak)) = (self.resident_mib, self.peak_resident_mib) {
            writeln!(f, "{:<20}{resident:>9.0} MiB    at most {peak:.0} MiB", "memory")?;
        }
        if let Some(seconds) = self.start_seconds {
            writeln!(f, "{:<20}{seconds:>9.2} s", "start")?;
        }
        write!(f, "every byte that arrived was right")
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
        let throughput = Throughput::of(&[moved(6, 2.0), moved(2, 2.0)], 2.0, Some(4.0));
        assert_eq!(throughput.mib_per_second, 4.0);
        assert_eq!(throughput.slowest_stream_mib_per_second, 1.0);
        assert_eq!(throughput.fastest_stream_mib_per_second, 3.0);
        assert_eq!(throughput.cpu_seconds_per_mib, Some(0.5));
    }
}
