//! The service provider: takes streams out of the mixnet and connects them to the internet.
//!
//! It is an application on the mixnet client, as a service of one's own would be: [`Provider`] drives
//! the sessions in its [`core`], [`policy`] says where they may go, [`resolver`] finds it and [`dial`] connects.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod core;
pub mod dial;
pub mod policy;
mod provider;
pub mod resolver;

pub use provider::{Provider, ProviderConfig, ProviderError};
