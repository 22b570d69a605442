//! What the fuzz targets share.

mod edits;
pub mod sessions;

pub use edits::Edits;
