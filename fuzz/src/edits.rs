//! Something valid with a few changes: blind bytes rarely get past a MAC, a signature or a length.

use arbitrary::Arbitrary;

/// Most bytes that edits may make of something.
const MAX_LEN: usize = 64 * 1024;

/// Changes to a byte string, one after the other.
#[derive(Debug, Arbitrary)]
pub struct Edits<'a>(Vec<Edit<'a>>);

/// Positions are taken modulo the length.
#[derive(Debug, Arbitrary)]
enum Edit<'a> {
    /// Flips bits of one byte.
    Flip { at: u16, bits: u8 },
    /// Puts other bytes in the place of `len` ones.
    Splice { at: u16, len: u16, bytes: &'a [u8] },
    /// Repeats `len` bytes.
    Repeat { at: u16, len: u16 },
    /// Cuts the rest off.
    Cut { at: u16 },
}

impl Edits<'_> {
    /// Applies the changes.
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        for edit in &self.0 {
            let whole = bytes.len();
            let range = |at: u16, len: u16| {
                let start = usize::from(at) % (whole + 1);
                start..whole.min(start + usize::from(len))
            };
            match *edit {
                Edit::Flip { at, bits } => {
                    if let Some(byte) = bytes[range(at, 1)].first_mut() {
                        *byte ^= bits;
                    }
                }
                Edit::Splice { at, len, bytes: new } => {
                    let range = range(at, len);
                    bytes.splice(range, new.iter().copied());
                }
                Edit::Repeat { at, len } => {
                    let range = range(at, len);
                    let end = range.end;
                    let copy = bytes[range].to_vec();
                    bytes.splice(end..end, copy);
                }
                Edit::Cut { at } => bytes.truncate(range(at, 0).start),
            }
            bytes.truncate(MAX_LEN);
        }
    }
}
