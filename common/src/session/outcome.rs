//! How an attempt to open a stream ended.

use std::fmt;

/// The provider's answer to OPEN, in the codes of a SOCKS5 reply (RFC 1928 §6), so that a program
/// behind a listener is told what really happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OpenOutcome {
    /// 0: connected.
    Connected = 0,
    /// 1: failed for a reason that has no code of its own.
    Failed = 1,
    /// 2: the exit policy forbids the target.
    Forbidden = 2,
    /// 3: the target's network cannot be reached.
    NetworkUnreachable = 3,
    /// 4: the host cannot be reached, or its name does not resolve.
    HostUnreachable = 4,
    /// 5: the host refused the connection.
    Refused = 5,
    /// 6: the host did not answer in time.
    TimedOut = 6,
}

impl OpenOutcome {
    /// The code on the wire.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The outcome of a code; every unknown one means [`OpenOutcome::Failed`].
    pub fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Connected,
            2 => Self::Forbidden,
            3 => Self::NetworkUnreachable,
            4 => Self::HostUnreachable,
            5 => Self::Refused,
            6 => Self::TimedOut,
            _ => Self::Failed,
        }
    }
}

impl fmt::Display for OpenOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connected => "connected",
            Self::Failed => "the provider could not open the connection",
            Self::Forbidden => "the provider's exit policy forbids the target",
            Self::NetworkUnreachable => "the target's network is unreachable from the provider",
            Self::HostUnreachable => "the target is unreachable, or its name does not resolve",
            Self::Refused => "the target refused the connection",
            Self::TimedOut => "the target did not answer in time",
        })
    }
}
