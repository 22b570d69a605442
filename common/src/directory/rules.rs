//! What the authorities of a network have agreed on, and the times that follow from it.

use std::time::Duration;

use super::AddressRule;
use crate::keys::Identity;
use crate::topology::{Authorities, DocumentError, LAYERS, NetworkName, Parameters, UnixTime};

/// Most authorities of a network: a proposal with the endorsements of more would not fit.
pub const MAX_AUTHORITIES: usize = 16;
/// A descriptor older than this many epochs is left out: members publish one in each epoch, so that
/// three were lost, or the member is gone.
pub const DESCRIPTOR_EPOCHS: u64 = 3;
/// For how many epochs, beginning with that of the upload, an endorsement holds: a member that finds
/// an authority down for a few hours stays a member, and one that is no longer admitted is out
/// within eight epochs.
pub const ENDORSED_EPOCHS: u64 = 8;

/// Assembling begins a quarter of an epoch ahead.
const LEAD_PARTS: u32 = 4;
/// An attempt takes a thirty-second of an epoch: eight fit into the lead, so that each of eight
/// authorities can try before the epoch begins.
const ATTEMPT_PARTS: u32 = 32;
/// Attempts end with the round, which takes an epoch; who joined early may have counted a few more.
pub(super) const MAX_ATTEMPTS: u8 = 48;

/// What the authorities of a network have agreed on: all must have the same.
#[derive(Clone, Debug)]
pub struct Rules {
    settings: Settings,
}

/// The contents of [`Rules`], not yet checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The network.
    pub network: NetworkName,
    /// What documents say to everybody.
    pub parameters: Parameters,
    /// Who signs, and how many of them must.
    pub authorities: Authorities,
    /// Which addresses are taken.
    pub addresses: AddressRule,
    /// For how many epochs a document is in force when none follows: 2 to 1,000, but never beyond
    /// the last key epoch for which it has keys.
    pub valid_epochs: u64,
    /// How many members the first document must have.
    pub minimum: Minimum,
}

/// How many members the first document must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minimum {
    /// At least 3.
    pub mixes: usize,
    /// At least 1.
    pub gateways: usize,
    /// Any number.
    pub providers: usize,
}

/// Why settings are no rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// A parameter is out of its range.
    #[error(transparent)]
    Parameters(#[from] DocumentError),
    /// More than [`MAX_AUTHORITIES`].
    #[error("{0} authorities, at most 16 are possible")]
    TooManyAuthorities(usize),
    /// Clocks may differ by more than the overlap allows.
    #[error("overlap_seconds is {actual}, but must be at least {needed}: clocks differ")]
    Overlap {
        /// The overlap in seconds.
        actual: u64,
        /// What is needed at least.
        needed: u64,
    },
    /// Documents would be in force too short or too long.
    #[error("valid_epochs is {0}, but must be 2 to 1000")]
    ValidEpochs(u64),
    /// A network needs a mix in each layer and a gateway.
    #[error("the first document must have at least 3 mixes and 1 gateway")]
    Minimum,
}

impl Rules {
    /// Checks settings.
    ///
    /// # Errors
    /// [`RulesError`].
    pub fn new(settings: Settings) -> Result<Self, RulesError> {
        settings.parameters.check()?;
        let count = settings.authorities.count();
        if count > MAX_AUTHORITIES {
            return Err(RulesError::TooManyAuthorities(count));
        }
        if !(2..=1000).contains(&settings.valid_epochs) {
            return Err(RulesError::ValidEpochs(settings.valid_epochs));
        }
        let Minimum { mixes, gateways, .. } = settings.minimum;
        if mixes < LAYERS || gateways == 0 {
            return Err(RulesError::Minimum);
        }
        let rules = Self { settings };
        // A document is in force by the skew early, at a reader whose clock is ahead by as much.
        let (actual, needed) =
            (rules.parameters().epochs.overlap_seconds, 2 * rules.skew_seconds());
        if actual < needed {
            return Err(RulesError::Overlap { actual, needed });
        }
        Ok(rules)
    }

    /// The network.
    pub fn network(&self) -> &NetworkName {
        &self.settings.network
    }

    /// What documents say to everybody.
    pub fn parameters(&self) -> &Parameters {
        &self.settings.parameters
    }

    /// Who signs.
    pub fn authorities(&self) -> &Authorities {
        &self.settings.authorities
    }

    /// Which addresses are taken.
    pub fn addresses(&self) -> AddressRule {
        self.settings.addresses
    }

    /// How many members the first document must have.
    pub fn minimum(&self) -> Minimum {
        self.settings.minimum
    }

    /// How far clocks may differ: see [`Epochs::skew_seconds`](crate::topology::Epochs::skew_seconds).
    pub fn skew_seconds(&self) -> u64 {
        self.parameters().epochs.skew_seconds()
    }

    /// When the document of an epoch is in force, if none follows it.
    ///
    /// It begins by the skew early, for readers whose clocks are behind.
    pub fn validity(&self, epoch: u64) -> std::ops::Range<UnixTime> {
        let epochs = &self.parameters().epochs;
        let begin = epochs.start(epoch).0.saturating_sub(self.skew_seconds());
        let end = epochs.start(epoch.saturating_add(self.settings.valid_epochs));
        let keys_end = epochs.key_epoch_start(epochs.key_epoch(epoch).saturating_add(2));
        UnixTime(begin)..end.min(keys_end)
    }

    /// For how many seconds a descriptor counts.
    pub fn descriptor_seconds(&self) -> u64 {
        DESCRIPTOR_EPOCHS * self.parameters().epochs.epoch_seconds
    }

    /// How long an attempt takes: a thirty-second of an epoch.
    pub fn attempt_time(&self) -> Duration {
        self.epoch_time() / ATTEMPT_PARTS
    }

    /// The epoch whose document is being made at `now`, which is a time since 1970.
    pub fn round_at(&self, now: Duration) -> u64 {
        let ahead = now.saturating_add(self.lead());
        self.parameters().epochs.at(UnixTime(ahead.as_secs()))
    }

    /// When making the document of an epoch begins: a quarter of an epoch ahead of it.
    pub fn round_start(&self, epoch: u64) -> Duration {
        Duration::from_secs(self.parameters().epochs.start(epoch).0).saturating_sub(self.lead())
    }

    /// Who assembles in an attempt: each in turn, so that each begins equally many epochs.
    pub fn leader(&self, epoch: u64, attempt: u8) -> &Identity {
        let count = self.authorities().count() as u64;
        let turn = (epoch % count + u64::from(attempt)) % count;
        let turn = usize::try_from(turn).expect("it is below the number of authorities");
        self.authorities().keys().nth(turn).expect("it is below the number of authorities")
    }

    fn lead(&self) -> Duration {
        self.epoch_time() / LEAD_PARTS
    }

    fn epoch_time(&self) -> Duration {
        Duration::from_secs(self.parameters().epochs.epoch_seconds)
    }
}
