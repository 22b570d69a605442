//! The traffic of a soak: streams of all kinds, one after the other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Error, Result};
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::time::{Instant, sleep, timeout};

use super::super::transfer::{Connection, Direction, Refused, WrongBytes};
use super::DEADLINE;
use super::faults::History;

/// The largest transfers; sizes are spread evenly over their logarithms.
const MAX_SIZE_LOG2: f64 = 22.0;
/// The longest idle stream, or a quarter of a short soak.
const LONGEST_IDLE: Duration = Duration::from_secs(20);
/// After a failure, so that a proxy that refuses is not asked without end.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(200);

/// What a stream does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// A small request and a small answer.
    Tiny,
    Download,
    Upload,
    /// Says nothing for a while, and then asks for a little.
    Idle,
    /// The answer comes after the end of the request.
    HalfClose,
    /// The server resets it.
    ServerReset,
    /// The program resets it.
    ClientReset,
}

impl Kind {
    /// With how many of a hundred streams are of each kind.
    const SHARES: [(Self, u32); 7] = [
        (Self::Tiny, 30),
        (Self::Download, 20),
        (Self::Upload, 15),
        (Self::Idle, 10),
        (Self::HalfClose, 10),
        (Self::ServerReset, 8),
        (Self::ClientReset, 7),
    ];

    fn draw(rng: &mut StdRng) -> Self {
        let mut at = rng.random_range(0..Self::SHARES.iter().map(|(_, share)| share).sum());
        let mut shares = Self::SHARES.into_iter();
        loop {
            let (kind, share) = shares.next().expect("the shares have this sum");
            if at < share {
                return kind;
            }
            at -= share;
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Idle => "idle",
            Self::HalfClose => "half-close",
            Self::ServerReset => "reset by the server",
            Self::ClientReset => "reset by the program",
        }
    }
}

/// How a stream ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// As it should; so many bytes came through.
    Right { bytes: u64 },
    /// It was refused while a fault excused that.
    Refused,
    /// It ended with an error while a restart of the provider excused that.
    Ended,
    /// It ended with an error, and nothing excuses that.
    Broken(String),
    /// Bytes arrived that were not sent so.
    Wrong(String),
    /// It did not end.
    Stuck,
}

/// A program that opens one stream after the other.
pub(super) struct Worker {
    pub(super) proxy: SocketAddr,
    pub(super) origin: SocketAddr,
    pub(super) rng: StdRng,
    pub(super) history: Arc<History>,
    pub(super) longest_idle: Duration,
}

impl Worker {
    /// For a soak of this duration.
    pub(super) fn new(
        proxy: SocketAddr,
        origin: SocketAddr,
        rng: StdRng,
        history: Arc<History>,
        duration: Duration,
    ) -> Self {
        let longest_idle = LONGEST_IDLE.min(duration / 4);
        Self { proxy, origin, rng, history, longest_idle }
    }

    /// Opens streams until then, and waits for the last one.
    pub(super) async fn run(mut self, end: Instant, mut tell: impl FnMut(Kind, Outcome)) {
        while Instant::now() < end {
            let kind = Kind::draw(&mut self.rng);
            let started = Instant::now();
            let outcome = match timeout(DEADLINE, self.stream(kind)).await {
                Ok(Ok(bytes)) => Outcome::Right { bytes },
                Ok(Err(error)) => self.judge(&error, started),
                Err(_) => Outcome::Stuck,
            };
            let failed = !matches!(outcome, Outcome::Right { .. });
            tell(kind, outcome);
            if failed {
                sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }

    /// One stream; how many bytes came through it.
    async fn stream(&mut self, kind: Kind) -> Result<u64> {
        let bytes = self.draw_size();
        let small = bytes.isqrt();
        let wait = self.longest_idle.mul_f64(self.rng.random());
        let direction = if self.rng.random() { Direction::Down } else { Direction::Up };
        let mut connection = Connection::open(self.proxy, self.origin).await?;
        match kind {
            Kind::Tiny => {
                connection.get(small).await?;
                connection.end().await?;
                Ok(small)
            }
            Kind::Download => {
                connection.get(bytes).await?;
                connection.end().await?;
                Ok(bytes)
            }
            Kind::Upload => {
                connection.put(bytes).await?;
                connection.end().await?;
                Ok(bytes)
            }
            Kind::Idle => {
                sleep(wait).await;
                connection.put(small).await?;
                connection.get(small).await?;
                connection.end().await?;
                Ok(2 * small)
            }
            Kind::HalfClose => connection.turn(bytes).await.map(|()| 2 * bytes),
            Kind::ServerReset => connection.be_cut(bytes).await.map(|()| 0),
            Kind::ClientReset => connection.cut(direction, bytes).await.map(|()| 0),
        }
    }

    fn draw_size(&mut self) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "4 MiB at most"
        )]
        let size = (MAX_SIZE_LOG2 * self.rng.random::<f64>()).exp2() as u64;
        size
    }

    fn judge(&self, error: &Error, started: Instant) -> Outcome {
        let ended = Instant::now();
        let words = format!("{error:#}");
        if error.is::<WrongBytes>() {
            Outcome::Wrong(words)
        } else if error.is::<Refused>() && self.history.excuses_refusal(started, ended) {
            Outcome::Refused
        } else if self.history.excuses_end(started, ended) {
            Outcome::Ended
        } else {
            Outcome::Broken(words)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::SeedableRng;

    use super::*;

    #[test]
    fn all_kinds_are_drawn_in_their_shares() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut drawn = BTreeMap::<_, u32>::new();
        for _ in 0..10_000 {
            *drawn.entry(Kind::draw(&mut rng)).or_default() += 1;
        }
        for (kind, share) in Kind::SHARES {
            assert!(drawn[&kind].abs_diff(100 * share) < 300, "{drawn:?}");
        }
    }
}
