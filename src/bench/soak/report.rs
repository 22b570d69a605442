//! What a soak has found.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::super::report::mib;
use super::DEADLINE;
use super::memory::RoleMemory;
use super::traffic::{Kind, Outcome};

/// Failures that are told in words; all are counted.
const MAX_TOLD: usize = 20;

/// All of it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    pub(super) cpu: String,
    seed: u64,
    seconds: f64,
    streams: BTreeMap<&'static str, Tally>,
    /// Streams with bytes that were not sent so.
    wrong: u64,
    /// Streams that did not end within their deadline.
    stuck: u64,
    deadline_seconds: u64,
    /// Streams that ended with an error that nothing excuses.
    broken: u64,
    /// The first of these failures.
    failures: Vec<String>,
    pub(super) faults: BTreeMap<&'static str, u64>,
    /// Resident memory in MiB, without the replay tags of nodes.
    pub(super) memory: BTreeMap<String, RoleMemory>,
}

/// Streams of one kind.
#[derive(Debug, Default, Serialize)]
struct Tally {
    right: u64,
    /// Bytes of these.
    bytes: u64,
    /// Refused during a fault, or just after it.
    refused: u64,
    /// Ended by a restart of the provider.
    ended: u64,
}

impl Report {
    pub(super) fn new(seed: u64, duration: Duration) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            cpu: super::super::cpu_name(),
            seed,
            seconds: duration.as_secs_f64(),
            streams: BTreeMap::new(),
            wrong: 0,
            stuck: 0,
            deadline_seconds: DEADLINE.as_secs(),
            broken: 0,
            failures: Vec::new(),
            faults: BTreeMap::new(),
            memory: BTreeMap::new(),
        }
    }

    /// Adds a stream.
    pub(super) fn add(&mut self, kind: Kind, outcome: Outcome, at: Duration) {
        let tally = self.streams.entry(kind.name()).or_default();
        let (count, words) = match outcome {
            Outcome::Right { bytes } => {
                tally.right += 1;
                tally.bytes += bytes;
                return;
            }
            Outcome::Refused => return tally.refused += 1,
            Outcome::Ended => return tally.ended += 1,
            Outcome::Broken(words) => (&mut self.broken, words),
            Outcome::Wrong(words) => (&mut self.wrong, words),
            Outcome::Stuck => (&mut self.stuck, "stuck".to_owned()),
        };
        *count += 1;
        if self.failures.len() < MAX_TOLD {
            let (kind, at) = (kind.name(), at.as_secs_f64());
            self.failures.push(format!("{kind}, after {at:.1} s: {words}"));
        }
    }

    /// What is wrong, in words.
    pub(super) fn complaints(&self) -> Vec<String> {
        let counts = [
            (self.wrong, "streams with wrong bytes"),
            (self.stuck, "stuck streams"),
            (self.broken, "broken streams"),
        ];
        let counts = counts.into_iter().filter(|(count, _)| *count > 0);
        let mut complaints: Vec<_> =
            counts.map(|(count, what)| format!("{count} {what}")).collect();
        if self.streams.values().all(|tally| tally.right == 0) {
            complaints.push("nothing was carried".to_owned());
        }
        let growing = self.memory.iter().filter(|(_, memory)| memory.is_flat() == Some(false));
        complaints.extend(growing.map(|(name, _)| format!("the memory of {name} grows")));
        complaints
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<26}{:>10}{:>12}{:>10}{:>10}", "", "right", "MiB", "refused", "ended")?;
        for (name, tally) in &self.streams {
            let Tally { right, bytes, refused, ended } = tally;
            let mib = mib(*bytes);
            writeln!(f, "{name:<26}{right:>10}{mib:>12.1}{refused:>10}{ended:>10}")?;
        }
        let Self { wrong, stuck, broken, deadline_seconds, .. } = self;
        writeln!(f, "\n{:<26}{wrong:>10}", "with wrong bytes")?;
        writeln!(f, "{:<26}{stuck:>10}  (after {deadline_seconds} s)", "stuck")?;
        writeln!(f, "{:<26}{broken:>10}  (an error that no fault excuses)", "broken")?;
        self.failures.iter().try_for_each(|failure| writeln!(f, "  {failure}"))?;
        writeln!(f)?;
        self.faults.iter().try_for_each(|(name, count)| writeln!(f, "{name:<26}{count:>10}"))?;
        writeln!(
            f,
            "\n{:<16}{:>10}{:>10}{:>10}  MiB without tags",
            "memory", "start", "middle", "end"
        )?;
        for (name, memory) in &self.memory {
            write!(f, "{name:<16}")?;
            for mib in [memory.start, memory.middle, memory.end] {
                match mib {
                    Some(mib) => write!(f, "{mib:>10.1}")?,
                    None => write!(f, "{:>10}", "")?,
                }
            }
            match memory.is_flat() {
                Some(true) => write!(f, "  flat")?,
                Some(false) => write!(f, "  GROWS")?,
                None => write!(f, "  not compared")?,
            }
            match memory.replay_tags {
                Some(tags) => writeln!(f, ", {tags} tags")?,
                None => writeln!(f)?,
            }
        }
        let seconds = self.seconds;
        write!(f, "\n{seconds:.0} s with seed {}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: Vec<Outcome>) -> Report {
        let mut report = Report::new(7, Duration::from_secs(1));
        for outcome in outcomes {
            report.add(Kind::Upload, outcome, Duration::from_secs(3));
        }
        report
    }

    #[test]
    fn what_a_fault_excuses_is_no_complaint() {
        let excused = [Outcome::Right { bytes: 1 }, Outcome::Refused, Outcome::Ended];
        assert_eq!(report(excused.into()).complaints(), Vec::<String>::new());
    }

    #[test]
    fn all_else_is_one() {
        let complaints = |outcome| report(vec![Outcome::Right { bytes: 1 }, outcome]).complaints();
        assert_eq!(complaints(Outcome::Wrong(String::new())), ["1 streams with wrong bytes"]);
        assert_eq!(complaints(Outcome::Stuck), ["1 stuck streams"]);
        assert_eq!(complaints(Outcome::Broken(String::new())), ["1 broken streams"]);
        assert_eq!(report(vec![Outcome::Refused]).complaints(), ["nothing was carried"]);
    }

    #[test]
    fn failures_are_told_up_to_a_bound() {
        let report = report((0..100).map(|_| Outcome::Stuck).collect());
        assert_eq!((report.stuck, report.failures.len()), (100, MAX_TOLD));
        assert_eq!(report.failures[0], "upload, after 3.0 s: stuck");
    }
}
