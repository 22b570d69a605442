//! How the links of a node under test are impaired, as a file: TOML, each key of which may be left out.
//!
//! ```toml
//! loss = 0.05       # the part of the packets that is lost, 0 to 1
//! delay = "20ms"    # how much later they are, up to 10 s
//! rate = 500        # packets per second to each other node
//! cut = false       # whether all are lost
//! ```

use std::fs::File;
use std::io::Read as _;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mixsocks_node::link::{Impairment, MAX_IMPAIRMENT_DELAY};
use serde::Deserialize;

/// A longer file holds something else.
const MAX_BYTES: u64 = 4096;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    loss: f64,
    delay: Option<String>,
    rate: Option<NonZeroU32>,
    cut: bool,
}

/// Reads such a file.
pub(crate) fn read(path: &Path) -> Result<Impairment> {
    let text = || {
        let mut text = String::new();
        File::open(path)?.take(MAX_BYTES).read_to_string(&mut text)?;
        std::io::Result::Ok(text)
    };
    let file = || format!("the impairment {}", path.display());
    parse(&text().with_context(file)?).with_context(file)
}

fn parse(text: &str) -> Result<Impairment> {
    let Keys { loss, delay, rate, cut } = toml::from_str(text)?;
    ensure!((0.0..=1.0).contains(&loss), "loss is a part of all packets: 0 to 1");
    let delay = match delay {
        Some(delay) => humantime::parse_duration(&delay).context("delay is wrong")?,
        None => Duration::ZERO,
    };
    ensure!(delay <= MAX_IMPAIRMENT_DELAY, "delay is longer than {MAX_IMPAIRMENT_DELAY:?}");
    Ok(Impairment { loss, delay, rate, cut })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_happens_to_packets() {
        let all = "loss = 0.05\ndelay = \"20ms\"\nrate = 500\ncut = true\n";
        let expected = Impairment {
            loss: 0.05,
            delay: Duration::from_millis(20),
            rate: NonZeroU32::new(500),
            cut: true,
        };
        assert_eq!(parse(all).unwrap(), expected);
        assert_eq!(parse("").unwrap(), Impairment::default());
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in [
            "loss = 1.5",
            "loss = -0.1",
            "loss = nan",
            "delay = \"soon\"",
            "delay = \"11s\"",
            "rate = 0",
            "rate = -1",
            "cut = 1",
            "lost = 0.1",
            "loss 0.1",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let error = read(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
