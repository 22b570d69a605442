//! mixsocks-provider

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod dial;
pub mod policy;
pub mod resolver;
