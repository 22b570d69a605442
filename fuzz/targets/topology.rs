//! Topology files: as they come, and texts that an authority has signed whatever they say.

#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mixsocks_common::address::Address;
use mixsocks_common::keys::{EncryptionKey, Identity, IdentityKey};
use mixsocks_common::topology::{
    Authorities, Epochs, NetworkName, Node, Parameters, Provider, Role, Topology, UnixTime, sign,
    verify,
};
use mixsocks_fuzz::Edits;
use mixsocks_sphinx::SecretKey;

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

/// A good text with one node of each kind and a provider.
static TEXT: LazyLock<String> = LazyLock::new(|| {
    let file = sign(&topology(), &[]);
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

fn topology() -> Topology {
    let node = |number: u8, role| Node {
        identity: identity(number),
        sphinx_key: encryption_key(number),
        next_sphinx_key: None,
        link_address: ([192, 0, 2, number], 9000).into(),
        role,
    };
    let mut nodes: Vec<_> = (1..=3).map(|layer| node(layer, Role::Mix { layer })).collect();
    nodes.push(node(4, Role::Gateway { client_address: ([192, 0, 2, 4], 9001).into() }));
    let address =
        Address { identity: identity(5), encryption: encryption_key(5), gateway: identity(4) };
    let policy = "everything but \"port 25\"\nand more".to_owned();
    let parameters = Parameters {
        payload_bytes: 2048,
        mean_delay: Duration::from_millis(15),
        max_delay: Duration::from_secs(10),
        epochs: Epochs::STATIC,
    };
    let network = NetworkName::new("test").expect("a good name");
    let providers =
        vec![Provider { name: "exit".to_owned(), address, policy, requires_token: false }];
    Topology::new(network, 7, UnixTime(100)..UnixTime(200), parameters, nodes, providers)
        .expect("a small network")
}

fn identity(number: u8) -> Identity {
    IdentityKey::from_bytes(&[number; 32]).identity()
}

fn encryption_key(number: u8) -> EncryptionKey {
    SecretKey::from_bytes([number; 32]).public_key().into()
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
