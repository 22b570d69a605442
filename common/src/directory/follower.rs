//! A follower: a client or node that keeps up with the network's documents.

use std::time::Duration;

use rand::{Rng, RngExt};

use crate::keys::Identity;
use crate::topology::{
    Authorities, NetworkName, SignedTopology, Topology, TopologyError, UnixTime,
};

/// The longest wait for the next fetch: networks whose documents are made by hand have no epochs
/// that would tell.
const MAX_WAIT: Duration = Duration::from_secs(6 * 3600);
/// The shortest wait after a failure.
const MIN_WAIT: Duration = Duration::from_secs(1);
/// The longest wait of who has no document yet: in a network that is being set up all have the first
/// one soon after each other, and find each other before streams give up.
const MAX_FIRST_WAIT: Duration = Duration::from_secs(3);
/// Failures that count for the back-off.
const MAX_DOUBLINGS: u32 = 16;

/// When a follower fetches the document of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// As soon as it may be in force, and before anybody sends packets by it: spread over half the
    /// time by which clocks may differ.
    Node,
    /// From the beginning of its epoch on, spread over an eighth of it.
    Client,
}

/// The latest document that was accepted, and when to fetch the next one.
///
/// It accepts what enough of the pinned authorities have signed for the network that it knows, never
/// an older one, and never another one of the same epoch: each would let somebody choose which
/// network it sees. `now` is the time since 1970. Store [`SignedTopology::file`] of whatever was new
/// before using it, and start with it again.
#[derive(Debug, Clone)]
pub struct Follower {
    authorities: Authorities,
    pace: Pace,
    latest: Option<SignedTopology>,
    next_fetch: Duration,
    fetches: usize,
    failures: u32,
}

/// What a document was that is in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// It replaces the one before.
    New,
    /// It is the one that is known.
    Known,
}

/// Why a document is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is not signed as it should be, unusable, or not in force.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// It is of another network.
    #[error("it is of network {theirs:?}, but {ours:?} was used before")]
    OtherNetwork {
        /// The document's network.
        theirs: String,
        /// The network used before.
        ours: String,
    },
    /// An older one than was used before.
    #[error("it is of epoch {new}, but one of epoch {old} was used before")]
    Rollback {
        /// The document's epoch.
        new: u64,
        /// The epoch used before.
        old: u64,
    },
    /// Another one of the same epoch: these authorities signed both.
    #[error(
        "it differs from the one used before, though both are of epoch {epoch}: {} signed both",
        list(signers)
    )]
    Equivocation {
        /// The epoch of both.
        epoch: u64,
        /// Who signed both.
        signers: Vec<Identity>,
    },
}

fn list(identities: &[Identity]) -> String {
    identities.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl Follower {
    /// Starts with the file that was accepted last, in force or not.
    ///
    /// # Errors
    /// [`TopologyError`] when the file is damaged or other authorities signed it.
    pub fn new(
        authorities: Authorities,
        stored: Option<&[u8]>,
        pace: Pace,
    ) -> Result<Self, TopologyError> {
        let latest = stored.map(|file| SignedTopology::read(file, &authorities)).transpose()?;
        let next_fetch = Duration::ZERO;
        Ok(Self { authorities, pace, latest, next_fetch, fetches: 0, failures: 0 })
    }

    /// The document that was accepted last, in force or not.
    pub fn latest(&self) -> Option<&SignedTopology> {
        self.latest.as_ref()
    }

    /// The document in force at `now`.
    pub fn in_force(&self, now: Duration) -> Option<&Topology> {
        let latest = self.latest.as_ref()?;
        latest.check_time(UnixTime(now.as_secs())).is_ok().then(|| latest.topology())
    }

    /// When the document in force ends.
    pub fn expires(&self) -> Option<UnixTime> {
        self.latest.as_ref().map(|latest| latest.topology().valid_until)
    }

    /// The network that was used before.
    pub fn network(&self) -> Option<&NetworkName> {
        self.latest.as_ref().map(|latest| &latest.topology().network)
    }

    /// Accepts a file, or says why not. Then it is fetched anew: when the next one is to be there, as
    /// [`Pace`] says; if that time has come already, as after a failure.
    ///
    /// # Errors
    /// [`Refused`]; the document accepted before stays.
    pub fn handle_file(
        &mut self,
        file: &[u8],
        now: Duration,
        rng: &mut impl Rng,
    ) -> Result<News, Refused> {
        let result = self.accept(file, UnixTime(now.as_secs()));
        let next = self.next_time();
        if let (Ok(_), Some((next, spread))) = (&result, next.filter(|(next, _)| *next > now)) {
            self.failures = 0;
            self.next_fetch = (next + spread.mul_f64(rng.random())).min(now + MAX_WAIT);
        } else {
            self.handle_failure(now, rng);
        }
        result
    }

    /// Fetching failed. The next URL's turn comes after a jittered wait: a sixty-fourth of an epoch,
    /// twice as long after each further failure, up to a quarter of an epoch; without a document 1 s,
    /// up to 3 s.
    pub fn handle_failure(&mut self, now: Duration, rng: &mut impl Rng) {
        let (shortest, longest) = match self.epoch_time() {
            Some(epoch) => (epoch / 64, (epoch / 4).clamp(MIN_WAIT, MAX_WAIT)),
            None => (MIN_WAIT, MAX_FIRST_WAIT),
        };
        let wait = shortest.saturating_mul(1 << self.failures).clamp(MIN_WAIT, longest);
        self.failures = (self.failures + 1).min(MAX_DOUBLINGS);
        self.fetches = self.fetches.wrapping_add(1);
        self.next_fetch = now + wait.mul_f64(0.5 + rng.random::<f64>() / 2.0);
    }

    /// When to fetch next.
    pub fn poll_timeout(&self) -> Duration {
        self.next_fetch
    }

    /// Which of `count` URLs to fetch from: another one after each failure.
    ///
    /// # Panics
    /// If `count` is zero.
    pub fn url(&self, count: usize) -> usize {
        self.fetches % count
    }

    /// The same for who fetches nothing by itself.
    ///
    /// # Errors
    /// [`Refused`]; the document accepted before stays.
    pub fn accept(&mut self, file: &[u8], now: UnixTime) -> Result<News, Refused> {
        let new = SignedTopology::read(file, &self.authorities)?;
        new.check_time(now)?;
        let Some(old) = &self.latest else {
            self.latest = Some(new);
            return Ok(News::New);
        };
        let (topology, known) = (new.topology(), old.topology());
        if topology.network != known.network {
            return Err(Refused::OtherNetwork {
                theirs: topology.network.as_str().to_owned(),
                ours: known.network.as_str().to_owned(),
            });
        }
        if topology.epoch < known.epoch {
            return Err(Refused::Rollback { new: topology.epoch, old: known.epoch });
        }
        if topology.epoch > known.epoch {
            self.latest = Some(new);
            return Ok(News::New);
        }
        if new.digest() == old.digest() {
            return Ok(News::Known);
        }
        let signers = new.signers().intersection(old.signers()).copied().collect();
        Err(Refused::Equivocation { epoch: topology.epoch, signers })
    }

    /// From when on to fetch the document after this one, and over which time to spread that.
    fn next_time(&self) -> Option<(Duration, Duration)> {
        let topology = self.latest.as_ref()?.topology();
        let epochs = &topology.parameters.epochs;
        let begin = Duration::from_secs(epochs.start(topology.epoch.saturating_add(1)).0);
        Some(match self.pace {
            Pace::Node => {
                let early = Duration::from_secs(epochs.skew_seconds());
                (begin.saturating_sub(early), early / 2)
            }
            Pace::Client => (begin, Duration::from_secs(epochs.epoch_seconds) / 8),
        })
    }

    fn epoch_time(&self) -> Option<Duration> {
        let topology = self.latest.as_ref()?.topology();
        Some(Duration::from_secs(topology.parameters.epochs.epoch_seconds))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::assemble;
    use super::super::testing::{EPOCH_SECONDS, Person, authority_key, rules, sorted};
    use super::*;
    use crate::keys::IdentityKey;
    use crate::topology::sign;

    const EPOCH: u64 = 1000;

    struct Fixture {
        keys: [IdentityKey; 3],
        rng: StdRng,
        follower: Follower,
    }

    impl Fixture {
        fn new() -> Self {
            let follower =
                Follower::new(rules(3, 2).authorities().clone(), None, Pace::Client).unwrap();
            let keys = [0, 1, 2].map(authority_key);
            Self { keys, rng: StdRng::seed_from_u64(1), follower }
        }

        /// The document of an epoch with so many mixes, signed by some authorities.
        fn file(&self, epoch: u64, mixes: u8, signers: &[usize]) -> String {
            let mut people: Vec<_> = (1..=mixes).map(Person::mix).collect();
            people.extend([Person::gateway(11), Person::gateway(12), Person::provider(21, 11)]);
            let published = epoch * EPOCH_SECONDS;
            let keys = [&self.keys[0], &self.keys[1]];
            let candidates = people.iter().map(|person| person.candidate(published, &keys));
            let candidates = sorted(candidates.collect());
            let topology = assemble(&rules(3, 2), None, &candidates, epoch).unwrap();
            let signers: Vec<_> = signers.iter().map(|at| &self.keys[*at]).collect();
            sign(&topology, &signers)
        }

        fn handle(&mut self, file: &str, now: Duration) -> Result<News, Refused> {
            self.follower.handle_file(file.as_bytes(), now, &mut self.rng)
        }
    }

    fn seconds(epoch: u64) -> Duration {
        Duration::from_secs(epoch * EPOCH_SECONDS)
    }

    #[test]
    fn newer_documents_are_accepted_and_older_ones_refused() {
        let mut fixture = Fixture::new();
        let [first, second] = [EPOCH, EPOCH + 1].map(|epoch| fixture.file(epoch, 3, &[0, 1]));
        let now = seconds(EPOCH + 1);
        assert_eq!(fixture.handle(&first, now), Ok(News::New));
        assert_eq!(fixture.handle(&second, now), Ok(News::New));
        assert_eq!(fixture.handle(&second, now), Ok(News::Known));
        let rollback = Refused::Rollback { new: EPOCH, old: EPOCH + 1 };
        assert_eq!(fixture.handle(&first, now), Err(rollback));
        assert_eq!(fixture.follower.latest().unwrap().topology().epoch, EPOCH + 1);
        // So it is after a restart, too.
        let stored = fixture.follower.latest().unwrap().file().to_owned();
        let authorities = rules(3, 2).authorities().clone();
        fixture.follower =
            Follower::new(authorities.clone(), Some(stored.as_bytes()), Pace::Client).unwrap();
        assert!(matches!(fixture.handle(&first, now), Err(Refused::Rollback { .. })));
        assert!(Follower::new(authorities, Some(&stored.as_bytes()[1..]), Pace::Client).is_err());
    }

    #[test]
    fn the_same_document_with_other_signatures_is_the_same() {
        let mut fixture = Fixture::new();
        let now = seconds(EPOCH);
        assert_eq!(fixture.handle(&fixture.file(EPOCH, 3, &[0, 1]), now), Ok(News::New));
        assert_eq!(fixture.handle(&fixture.file(EPOCH, 3, &[1, 2]), now), Ok(News::Known));
    }

    #[test]
    fn who_signed_two_documents_of_one_epoch_is_named() {
        let mut fixture = Fixture::new();
        let now = seconds(EPOCH);
        assert_eq!(fixture.handle(&fixture.file(EPOCH, 3, &[0, 1]), now), Ok(News::New));
        let refused = fixture.handle(&fixture.file(EPOCH, 4, &[1, 2]), now).unwrap_err();
        let signers = vec![fixture.keys[1].identity()];
        assert_eq!(refused, Refused::Equivocation { epoch: EPOCH, signers });
        assert!(refused.to_string().contains(&fixture.keys[1].identity().to_string()));
        assert_eq!(fixture.follower.latest().unwrap().topology().nodes().len(), 5);
    }

    #[test]
    fn another_network_and_too_few_signatures_are_refused() {
        let mut fixture = Fixture::new();
        let now = seconds(EPOCH);
        let one = fixture.file(EPOCH, 3, &[0]);
        assert!(matches!(
            fixture.handle(&one, now),
            Err(Refused::Topology(TopologyError::TooFewSignatures { .. }))
        ));
        let good = fixture.file(EPOCH, 3, &[0, 1]);
        assert_eq!(fixture.handle(&good, now), Ok(News::New));
        let mut other = fixture.follower.latest().unwrap().topology().clone();
        other.network = NetworkName::new("other").unwrap();
        let other = sign(&other, &[&fixture.keys[0], &fixture.keys[1]]);
        assert!(matches!(fixture.handle(&other, now), Err(Refused::OtherNetwork { .. })));
    }

    #[test]
    fn a_document_is_in_force_until_its_end() {
        let mut fixture = Fixture::new();
        let file = fixture.file(EPOCH, 3, &[0, 1]);
        let early = seconds(EPOCH) - Duration::from_secs(121);
        assert!(matches!(
            fixture.handle(&file, early),
            Err(Refused::Topology(TopologyError::NotYetValid { seconds: 1 }))
        ));
        assert_eq!(fixture.handle(&file, seconds(EPOCH)), Ok(News::New));
        let end = Duration::from_secs(fixture.follower.expires().unwrap().0);
        assert_eq!(end, seconds(EPOCH + 4));
        assert!(fixture.follower.in_force(end - Duration::from_secs(1)).is_some());
        assert!(fixture.follower.in_force(end).is_none());
        assert!(matches!(
            fixture.handle(&file, end),
            Err(Refused::Topology(TopologyError::Expired { .. }))
        ));
    }

    #[test]
    fn who_has_no_document_asks_again_within_seconds() {
        let mut fixture = Fixture::new();
        let now = seconds(EPOCH);
        for failure in 0..10 {
            fixture.follower.handle_failure(now, &mut fixture.rng);
            let wait = fixture.follower.poll_timeout() - now;
            let most = Duration::from_secs(3.min(1 << failure));
            assert!((most / 2..=most).contains(&wait), "{failure}: {wait:?}");
        }
    }

    #[test]
    fn nodes_fetch_before_anybody_sends_by_a_document() {
        let mut fixture = Fixture::new();
        fixture.follower.pace = Pace::Node;
        let file = fixture.file(EPOCH, 3, &[0, 1]);
        fixture.handle(&file, seconds(EPOCH)).unwrap();
        let early = seconds(EPOCH + 1) - Duration::from_secs(120);
        let due = fixture.follower.poll_timeout();
        assert!((early..=early + Duration::from_secs(60)).contains(&due), "{due:?}");
        let file = fixture.file(EPOCH + 1, 3, &[0, 1]);
        assert_eq!(fixture.handle(&file, early), Ok(News::New));
    }

    #[test]
    fn fetching_follows_epochs_and_backs_off_from_url_to_url() {
        let mut fixture = Fixture::new();
        let now = seconds(EPOCH);
        assert_eq!(fixture.follower.poll_timeout(), Duration::ZERO);
        let file = fixture.file(EPOCH, 3, &[0, 1]);
        fixture.handle(&file, now).unwrap();
        let next = seconds(EPOCH + 1);
        let due = fixture.follower.poll_timeout();
        assert!(due >= next && due <= next + Duration::from_secs(EPOCH_SECONDS / 8), "{due:?}");
        assert_eq!(fixture.follower.url(3), 0);
        // The next document is late: 50 s, 100 s, … and 800 s at most, less up to a half each.
        let mut longest = 50;
        for failure in 1..10 {
            assert_eq!(fixture.handle(&file, next), Ok(News::Known));
            let wait = fixture.follower.poll_timeout() - next;
            let (least, most) = (longest / 2, longest);
            let range = Duration::from_secs(least)..=Duration::from_secs(most);
            assert!(range.contains(&wait), "{failure}: {wait:?}");
            assert_eq!(fixture.follower.url(3), failure % 3);
            longest = (longest * 2).min(EPOCH_SECONDS / 4);
        }
        let file = fixture.file(EPOCH + 1, 3, &[0, 1]);
        assert_eq!(fixture.handle(&file, next), Ok(News::New));
        assert!(fixture.follower.poll_timeout() >= seconds(EPOCH + 2));
    }
}
