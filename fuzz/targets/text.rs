//! What people and files write: keys, signatures, addresses, targets, names of networks; and the
//! binary forms of the same.

#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use mixsocks_common::address::{ADDRESS_LEN, Address};
use mixsocks_common::keys::{EncryptionKey, Identity, KEY_LEN, Signature};
use mixsocks_common::target::{MAX_TARGET_LEN, Target};
use mixsocks_common::topology::NetworkName;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes) {
        written_as_read::<Identity>(text);
        written_as_read::<EncryptionKey>(text);
        written_as_read::<Signature>(text);
        written_as_read::<Address>(text);
        target_text(text);
        if let Some(name) = NetworkName::new(text) {
            assert_eq!(name.as_str(), text);
        }
    }
    if let Some(bytes) = bytes.first_chunk::<KEY_LEN>() {
        if let Ok(key) = Identity::from_bytes(*bytes) {
            assert_eq!(key.as_bytes(), bytes);
            written_as_read::<Identity>(&key.to_string());
        }
        if let Ok(key) = EncryptionKey::from_bytes(*bytes) {
            assert_eq!(key.as_bytes(), bytes);
            written_as_read::<EncryptionKey>(&key.to_string());
        }
    }
    if let Some(bytes) = bytes.first_chunk::<ADDRESS_LEN>()
        && let Ok(address) = Address::from_bytes(bytes)
    {
        assert_eq!(address.to_bytes(), *bytes);
        written_as_read::<Address>(&address.to_string());
    }
    target_bytes(bytes);
});

/// A text that is read is what would be written, so that nothing has two spellings; errors stay
/// readable.
fn written_as_read<T>(text: &str)
where
    T: FromStr<Err: Display> + Display + Debug + PartialEq,
{
    match text.parse::<T>() {
        Ok(value) => assert_eq!(value.to_string(), text),
        Err(error) => assert!(error.to_string().len() < 1000),
    }
}

/// Targets have several spellings (`[::1]:80`, `1.2.3.4:080`), each of which means one thing.
fn target_text(text: &str) {
    let Ok(target) = text.parse::<Target>() else { return };
    assert_ne!(target.port(), 0);
    assert_eq!(target.to_string().parse::<Target>().as_ref(), Ok(&target));
    let mut wire = Vec::new();
    target.encode(&mut wire);
    assert_eq!(wire.len(), target.encoded_len());
    assert!(wire.len() <= MAX_TARGET_LEN);
    assert_eq!(Target::decode(&mut &wire[..]), Ok(target));
}

fn target_bytes(bytes: &[u8]) {
    let mut rest = bytes;
    let Ok(target) = Target::decode(&mut rest) else { return };
    let mut again = Vec::new();
    target.encode(&mut again);
    assert_eq!(again, bytes[..bytes.len() - rest.len()]);
}
