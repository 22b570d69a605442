//! Topology files: as they come, and texts that an authority has signed whatever they say.

#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::topology::{Authorities, UnixTime, sign, verify};
use mixsocks_fuzz::{Edits, small_network};

const NOW: UnixTime = UnixTime(150);

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    /// A file as it comes.
    File(&'a [u8]),
    /// A good file, changed afterwards.
    ChangedFile(Edits<'a>),
    /// A good text, changed before it was signed.
    SignedText(Edits<'a>),
}

static TEXT: LazyLock<String> = LazyLock::new(|| {
    let file = sign(&small_network(), &[]);
    file.split_once("\n\n").expect("an empty line precedes the text").1.to_owned()
});

static KEY: LazyLock<IdentityKey> = LazyLock::new(|| IdentityKey::from_bytes(&[1; 32]));

static AUTHORITIES: LazyLock<Authorities> =
    LazyLock::new(|| Authorities::new([KEY.identity()], 1).expect("one of one"));

fuzz_target!(|input: Input<'_>| match input {
    Input::File(bytes) => read(bytes),
    Input::ChangedFile(edits) => {
        let mut file = signed(&TEXT).into_bytes();
        edits.apply(&mut file);
        if verify(&file, &AUTHORITIES, NOW).is_ok() {
            // More signatures before it may come; what was signed has not changed.
            assert!(file.ends_with(TEXT.as_bytes()));
        }
    }
    Input::SignedText(edits) => {
        let mut text = TEXT.as_bytes().to_vec();
        edits.apply(&mut text);
        if let Ok(text) = std::str::from_utf8(&text) {
            read(signed(text).as_bytes());
        }
    }
});

fn signed(text: &str) -> String {
    let message = [b"mixsocks topology v1\0", text.as_bytes()].concat();
    format!("mixsocks-topology 1\nsignature {} {}\n\n{text}", KEY.identity(), KEY.sign(&message))
}

/// A topology that is good can be written, and is then read as the same.
fn read(file: &[u8]) {
    match verify(file, &AUTHORITIES, NOW) {
        Ok(topology) => {
            let again = sign(&topology, &[&KEY]);
            assert_eq!(verify(again.as_bytes(), &AUTHORITIES, NOW), Ok(topology));
        }
        Err(error) => assert_eq!(error.to_string().lines().count(), 1, "{error}"),
    }
}
