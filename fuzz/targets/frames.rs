//! The frames inside a session's packets: what is read is written in the same way.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixsocks_common::session::frame::Frame;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    loop {
        let before = rest;
        let Ok(Some(frame)) = Frame::decode(&mut rest) else { return };
        assert!(rest.len() < before.len(), "a frame takes no bytes");
        // Numbers have longer spellings (RFC 9000 §16), so that the bytes may differ.
        let mut written = Vec::new();
        frame.encode(&mut written);
        assert!(written.len() <= before.len() - rest.len(), "{frame:?}");
        let mut again = &written[..];
        assert_eq!(Frame::decode(&mut again), Ok(Some(frame)));
        assert!(again.is_empty());
    }
});
