//! Sessions and streams.

mod outcome;

pub use outcome::OpenOutcome;
