//! What members and authorities send: descriptors, uploads, rules, and messages with a good signature.

#![no_main]

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use mixsocks_common::directory::{
    AddressRule, Admission, Authority, Descriptor, Hop, Member, Memory, Minimum, Rules, Settings,
    SignedDescriptor, SignedRules, Upload,
};
use mixsocks_common::keys::IdentityKey;
use mixsocks_common::topology::{Authorities, Epochs, NetworkName, Parameters, UnixTime};
use mixsocks_fuzz::Edits;
use mixsocks_sphinx::SecretKey;

const NOW: Duration = Duration::from_secs(3_200_000);

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    /// A descriptor as it comes.
    Descriptor(&'a [u8]),
    /// A good text of a descriptor, changed before it was signed.
    SignedDescriptor(Edits<'a>),
    /// An upload as it comes.
    Upload(&'a [u8]),
    /// Rules as they come.
    Rules(&'a [u8]),
    /// A message as it comes, and one whose contents another authority has signed.
    Message(&'a [u8]),
    SignedMessage(u8, &'a [u8]),
    /// What an authority is to take back from its disk.
    Members(&'a [u8]),
    Record(&'a [u8]),
}

static MEMBER: LazyLock<IdentityKey> = LazyLock::new(|| IdentityKey::from_bytes(&[1; 32]));
static ME: LazyLock<IdentityKey> = LazyLock::new(|| IdentityKey::from_bytes(&[2; 32]));
static OTHER: LazyLock<IdentityKey> = LazyLock::new(|| IdentityKey::from_bytes(&[3; 32]));

static DESCRIPTOR: LazyLock<String> = LazyLock::new(|| {
    let key = |seed| SecretKey::from_bytes([seed; 32]).public_key().into();
    let hop = Hop {
        link_address: SocketAddr::from(([127, 0, 0, 1], 9001)),
        keys: [(333, key(1)), (334, key(2)), (335, key(3))].into(),
    };
    let descriptor = Descriptor {
        network: network(),
        identity: MEMBER.identity(),
        published: UnixTime(NOW.as_secs()),
        member: Member::Mix(hop),
    };
    descriptor.sign(&MEMBER).expect("a good descriptor").text().to_owned()
});

static RULES: LazyLock<Rules> = LazyLock::new(|| {
    Rules::new(Settings {
        network: network(),
        parameters: Parameters {
            payload_bytes: 2048,
            mean_delay: Duration::from_millis(15),
            max_delay: Duration::from_secs(1),
            epochs: Epochs { epoch_seconds: 3200, key_epochs: 3, overlap_seconds: 240 },
        },
        authorities: Authorities::new([ME.identity(), OTHER.identity()], 2).expect("two of two"),
        addresses: AddressRule::Private,
        valid_epochs: 4,
        minimum: Minimum { mixes: 3, gateways: 1, providers: 0 },
    })
    .expect("good rules")
});

fn network() -> NetworkName {
    NetworkName::new("test").expect("a name")
}

fn authority(memory: Memory<'_>) -> Option<Authority> {
    let me = IdentityKey::from_bytes(&[2; 32]);
    Authority::new(me, RULES.clone(), Admission::default(), None, memory, NOW).ok()
}

fuzz_target!(|input: Input<'_>| match input {
    Input::Descriptor(bytes) => read(bytes),
    Input::SignedDescriptor(edits) => {
        let (_, text) = DESCRIPTOR.split_once("\n\n").expect("an empty line precedes the text");
        let mut text = text.as_bytes().to_vec();
        edits.apply(&mut text);
        let message = [&b"mixsocks descriptor v1\0"[..], &text].concat();
        let head = format!(
            "mixsocks-descriptor 1\nsignature {} {}\n\n",
            MEMBER.identity(),
            MEMBER.sign(&message)
        );
        read(&[head.as_bytes(), &text].concat());
    }
    Input::Upload(bytes) => {
        if let Ok(upload) = Upload::from_bytes(bytes) {
            assert_eq!(upload.to_bytes(), bytes);
            let mut authority = authority(Memory::New).expect("a new one starts");
            let Upload { descriptor, endorsements, invitation } = upload;
            let _ = authority.publish(descriptor, &endorsements, invitation.as_ref(), NOW);
        }
    }
    Input::Rules(bytes) => drop(SignedRules::read(bytes)),
    Input::Message(bytes) => take(bytes),
    Input::SignedMessage(kind, contents) => {
        let name = network();
        let name = name.as_str().as_bytes();
        let frame = [&[kind][..], OTHER.identity().as_bytes(), contents].concat();
        let length = [u8::try_from(name.len()).expect("a short name")];
        let signed = [&b"mixsocks authority v1\0"[..], &length, name, &frame].concat();
        take(&[&frame, &OTHER.sign(&signed).as_bytes()[..]].concat());
    }
    Input::Members(bytes) => {
        let mut authority = authority(Memory::New).expect("a new one starts");
        let _ = authority.restore_members(bytes, NOW);
    }
    Input::Record(bytes) => {
        if let Some(mut authority) = authority(Memory::Record(bytes)) {
            authority.handle_timeout(NOW);
            while authority.poll_output().is_some() {}
        }
    }
});

/// A descriptor that is good is read from its own text as the same.
fn read(bytes: &[u8]) {
    if let Ok(signed) = SignedDescriptor::read(bytes) {
        assert_eq!(SignedDescriptor::read(signed.text().as_bytes()), Ok(signed));
    }
}

/// A message has an effect or not; the authority goes on, and does not spin.
fn take(bytes: &[u8]) {
    let mut authority = authority(Memory::New).expect("a new one starts");
    authority.handle_timeout(NOW);
    let _ = authority.handle_message(bytes, NOW);
    authority.handle_timeout(NOW);
    while authority.poll_output().is_some() {}
    assert!(authority.poll_timeout() > NOW);
}
