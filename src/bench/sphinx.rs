//! `mixsocks bench sphinx`: what packets cost on this machine, beside the crate `sphinx-packet`.

use std::fmt;
use std::time::Duration;

use mixsocks_sphinx::Backend;
use mixsocks_sphinx::compare::{Cost, Operation};
use serde::Serialize;

use crate::cli::BenchSphinxArgs;

const OPERATIONS: [(&str, Operation); 7] = [
    ("x25519", Operation::X25519),
    ("peel", Operation::Peel),
    ("build", Operation::Build),
    ("fill", Operation::Fill),
    ("surb", Operation::BuildSurb),
    ("use", Operation::UseSurb),
    ("recover", Operation::Recover),
];
const PAYLOADS: [usize; 2] = [2048, 16384];
const BATCHES: [usize; 2] = [1, 8];

/// All figures.
#[derive(Debug, Serialize)]
struct Report {
    cpu: String,
    backend: String,
    rows: Vec<Row>,
}

/// One operation: median times per packet, and how many times as fast as the reference ours is.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    payload: usize,
    batch: usize,
    ours_us: f64,
    reference_us: f64,
    ratio: f64,
}

/// Measures and prints.
pub(super) fn run(args: &BenchSphinxArgs) -> anyhow::Result<()> {
    let report = Report::measure(Duration::from_secs(args.seconds));
    crate::say(&if args.json { serde_json::to_string(&report)? } else { report.to_string() });
    Ok(())
}

impl Report {
    fn measure(time: Duration) -> Self {
        let rows = OPERATIONS.len() * PAYLOADS.len() * BATCHES.len();
        let each = time / u32::try_from(rows).expect("rows are few");
        let mut rows = Vec::with_capacity(rows);
        for (name, operation) in OPERATIONS {
            for payload in PAYLOADS {
                for batch in BATCHES {
                    let cost = operation.compare(payload, batch, each);
                    rows.push(Row::of(name, payload, batch, cost));
                }
            }
        }
        Self { cpu: super::cpu_name(), backend: Backend::current().to_string(), rows }
    }
}

impl Row {
    fn of(name: &'static str, payload: usize, batch: usize, cost: Cost) -> Self {
        let [ours_us, reference_us] =
            [cost.ours, cost.reference].map(|time| time.as_secs_f64() * 1e6);
        Self { name, payload, batch, ours_us, reference_us, ratio: reference_us / ours_us }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {}", self.cpu, self.backend)?;
        write!(
            f,
            "{:<10}{:>8}{:>7}{:>11}{:>17}{:>8}",
            "", "payload", "batch", "ours", "sphinx-packet", "ratio"
        )?;
        for row in &self.rows {
            let Row { name, payload, batch, ours_us, reference_us, ratio } = row;
            write!(
                f,
                "\n{name:<10}{payload:>8}{batch:>7}{ours_us:>8.1} µs{reference_us:>14.1} µs{ratio:>7.2}×"
            )?;
        }
        Ok(())
    }
}
