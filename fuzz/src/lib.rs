//! What the fuzz targets share.

mod edits;
mod network;
pub mod sessions;

pub use edits::Edits;
pub use network::small_network;
