//! The `mixsocks` binary.
fn main() {}
