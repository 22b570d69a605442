//! Streams through the mixnet.

use mixsocks_common::session::OpenOutcome;

/// Why a stream was not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The provider tried and says what happened; never [`OpenOutcome::Connected`].
    #[error("{0}")]
    Refused(OpenOutcome),
    /// The provider did not answer within the time limit: it, its gateway or every route is down.
    #[error("the provider does not answer; it or its gateway may be down")]
    ProviderSilent,
    /// There is no connection to this client's gateway.
    #[error("there is no connection to the gateway")]
    NoGateway,
    /// This client already has as many streams as it may.
    #[error("too many streams are open")]
    TooManyStreams,
    /// The client was shut down.
    #[error("the client has been shut down")]
    Closed,
}

impl OpenError {
    /// The outcome in the codes of a SOCKS reply.
    pub fn outcome(&self) -> OpenOutcome {
        match self {
            Self::Refused(outcome) => *outcome,
            Self::ProviderSilent => OpenOutcome::TimedOut,
            Self::NoGateway | Self::TooManyStreams | Self::Closed => OpenOutcome::Failed,
        }
    }
}
