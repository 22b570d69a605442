//! What a member sends to an authority.

use super::{
    Endorsement, INVITATION_LEN, MAX_AUTHORITIES, MAX_DESCRIPTOR_BYTES, PresentedInvitation,
};

/// Longest upload in bytes.
pub const MAX_UPLOAD_BYTES: usize =
    2 + MAX_DESCRIPTOR_BYTES + 1 + MAX_AUTHORITIES * Endorsement::LEN + INVITATION_LEN;

/// A descriptor with what admits its maker.
///
/// | length | field |
/// |--:|---|
/// | 2 | length of the descriptor, big-endian |
/// | … | its text, unchecked |
/// | 1 | how many endorsements, at most 16 |
/// | 104 each | endorsements |
/// | 0 or 32 | the invitation as it is shown to this authority |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload<'a> {
    /// The text of the descriptor.
    pub descriptor: &'a [u8],
    /// What authorities have given for earlier uploads: at most [`MAX_AUTHORITIES`] are sent.
    pub endorsements: Vec<Endorsement>,
    /// What lets a stranger in.
    pub invitation: Option<PresentedInvitation>,
}

/// The bytes are no upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are no upload of a descriptor")]
pub struct BadUpload;

impl<'a> Upload<'a> {
    /// The bytes of the wire.
    ///
    /// # Panics
    /// When the descriptor is longer than [`MAX_DESCRIPTOR_BYTES`], which no signed one is.
    pub fn to_bytes(&self) -> Vec<u8> {
        assert!(self.descriptor.len() <= MAX_DESCRIPTOR_BYTES, "the descriptor is too long");
        let mut bytes = Vec::with_capacity(MAX_UPLOAD_BYTES);
        let length = u16::try_from(self.descriptor.len()).expect("2,048 fits");
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(self.descriptor);
        let count = self.endorsements.len().min(MAX_AUTHORITIES);
        bytes.push(u8::try_from(count).expect("16 fits"));
        for endorsement in self.endorsements.iter().take(count) {
            bytes.extend_from_slice(&endorsement.to_bytes());
        }
        if let Some(invitation) = &self.invitation {
            bytes.extend_from_slice(invitation.as_bytes());
        }
        bytes
    }

    /// Parses the bytes of the wire. The descriptor is not looked at.
    ///
    /// # Errors
    /// [`BadUpload`].
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, BadUpload> {
        let (length, rest) = bytes.split_first_chunk().ok_or(BadUpload)?;
        let length = usize::from(u16::from_be_bytes(*length));
        let (descriptor, rest) = rest.split_at_checked(length).ok_or(BadUpload)?;
        let (count, mut rest) = rest.split_first().ok_or(BadUpload)?;
        if length > MAX_DESCRIPTOR_BYTES || usize::from(*count) > MAX_AUTHORITIES {
            return Err(BadUpload);
        }
        let mut endorsements = Vec::with_capacity(usize::from(*count));
        for _ in 0..*count {
            let (endorsement, after) = rest.split_first_chunk().ok_or(BadUpload)?;
            endorsements.push(Endorsement::from_bytes(endorsement).ok_or(BadUpload)?);
            rest = after;
        }
        let invitation = match rest {
            [] => None,
            shown => {
                let shown = shown.try_into().map_err(|_| BadUpload)?;
                Some(PresentedInvitation::from_bytes(shown))
            }
        };
        Ok(Self { descriptor, endorsements, invitation })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Person, authority_key};
    use super::*;

    #[test]
    fn uploads_are_read_as_they_were_written_and_nothing_else_is() {
        let signed = Person::mix(1).signed(1000);
        let endorsement =
            |n| Endorsement::new(&authority_key(n), signed.descriptor(), u64::from(n) + 7);
        for count in [0, 1, 16] {
            for invitation in [None, Some(PresentedInvitation::from_bytes([7; INVITATION_LEN]))] {
                let upload = Upload {
                    descriptor: signed.text().as_bytes(),
                    endorsements: (0..count).map(endorsement).collect(),
                    invitation,
                };
                let bytes = upload.to_bytes();
                assert!(bytes.len() <= MAX_UPLOAD_BYTES);
                assert_eq!(Upload::from_bytes(&bytes), Ok(upload.clone()));
                let whole = bytes.len();
                let is_whole = |length| {
                    length == whole || invitation.is_some() && length + INVITATION_LEN == whole
                };
                for length in (0..whole).filter(|length| !is_whole(*length)) {
                    assert_eq!(Upload::from_bytes(&bytes[..length]), Err(BadUpload), "{length}");
                }
                let longer = [&bytes[..], &[0]].concat();
                assert_eq!(Upload::from_bytes(&longer), Err(BadUpload));
            }
        }
    }

    #[test]
    fn lengths_beyond_the_bounds_are_refused() {
        let mut bytes = vec![0; 2 + MAX_DESCRIPTOR_BYTES + 2];
        bytes[..2].copy_from_slice(&2049u16.to_be_bytes());
        assert_eq!(Upload::from_bytes(&bytes), Err(BadUpload));
        let mut bytes = vec![0; 3 + 17 * Endorsement::LEN];
        bytes[2] = 17;
        assert_eq!(Upload::from_bytes(&bytes), Err(BadUpload));
    }
}
