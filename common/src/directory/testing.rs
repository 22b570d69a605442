//! Members and authorities for tests.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mixsocks_sphinx::SecretKey;

use super::{
    AddressRule, Candidate, Descriptor, Endorsement, Hop, Member, MemberKind, Minimum, Rules,
    Settings, SignedDescriptor,
};
use crate::address::Address;
use crate::keys::{EncryptionKey, IdentityKey};
use crate::topology::{Authorities, Epochs, NetworkName, Parameters, Provider, UnixTime};

pub(super) const EPOCH_SECONDS: u64 = 3200;
pub(super) const KEY_EPOCHS: u64 = 3;

/// A member of the test network, by number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Person {
    number: u8,
    kind: MemberKind,
    gateway: u8,
}

impl Person {
    pub(super) fn mix(number: u8) -> Self {
        Self { number, kind: MemberKind::Mix, gateway: 0 }
    }

    pub(super) fn gateway(number: u8) -> Self {
        Self { number, kind: MemberKind::Gateway, gateway: 0 }
    }

    pub(super) fn provider(number: u8, gateway: u8) -> Self {
        Self { number, kind: MemberKind::Provider, gateway }
    }

    pub(super) fn kind(&self) -> MemberKind {
        self.kind
    }

    pub(super) fn key(&self) -> IdentityKey {
        IdentityKey::from_bytes(&[self.number; 32])
    }

    /// Its Sphinx key of a key epoch.
    pub(super) fn sphinx_key(&self, key_epoch: u64) -> EncryptionKey {
        let mut seed = [self.number; 32];
        seed[..8].copy_from_slice(&key_epoch.to_be_bytes());
        SecretKey::from_bytes(seed).public_key().into()
    }

    /// What it says at a time.
    pub(super) fn descriptor(&self, published: u64) -> Descriptor {
        let key_epoch = published / EPOCH_SECONDS / KEY_EPOCHS;
        let hop = Hop {
            link_address: SocketAddr::from(([127, 0, 0, 1], 1000 + u16::from(self.number))),
            keys: (key_epoch..key_epoch + 3).map(|epoch| (epoch, self.sphinx_key(epoch))).collect(),
        };
        let member = match self.kind {
            MemberKind::Mix => Member::Mix(hop),
            MemberKind::Gateway => {
                let client_address =
                    SocketAddr::from(([127, 0, 0, 1], 2000 + u16::from(self.number)));
                Member::Gateway { hop, client_address }
            }
            MemberKind::Provider => Member::Provider(Provider {
                name: format!("exit-{}", self.number),
                address: Address {
                    identity: self.key().identity(),
                    encryption: self.sphinx_key(0),
                    gateway: Self::gateway(self.gateway).key().identity(),
                },
                policy: "everything but \"port 25\"".to_owned(),
                requires_token: true,
            }),
        };
        let network = NetworkName::new("test").unwrap();
        let published = UnixTime(published);
        Descriptor { network, identity: self.key().identity(), published, member }
    }

    pub(super) fn signed(&self, published: u64) -> SignedDescriptor {
        self.descriptor(published).sign(&self.key()).unwrap()
    }

    /// Its descriptor, endorsed by `authorities` for 100 epochs.
    pub(super) fn candidate(&self, published: u64, authorities: &[&IdentityKey]) -> Candidate {
        endorsed(self.signed(published), authorities)
    }
}

pub(super) fn endorsed(descriptor: SignedDescriptor, authorities: &[&IdentityKey]) -> Candidate {
    let until = descriptor.descriptor().published.0 / EPOCH_SECONDS + 100;
    let endorsements: BTreeMap<_, _> = authorities
        .iter()
        .map(|key| (key.identity(), Endorsement::new(key, descriptor.descriptor(), until)))
        .collect();
    Candidate { descriptor, endorsements: endorsements.into_values().collect() }
}

/// Sorts candidates as assembling needs them.
pub(super) fn sorted(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    candidates.sort_by_key(|candidate| candidate.descriptor.identity());
    candidates
}

pub(super) fn authority_key(number: u8) -> IdentityKey {
    IdentityKey::from_bytes(&[200 + number; 32])
}

/// Rules of a network with `count` authorities, of which `threshold` must sign.
pub(super) fn rules(count: u8, threshold: usize) -> Rules {
    let keys = (0..count).map(|number| authority_key(number).identity());
    Rules::new(Settings {
        network: NetworkName::new("test").unwrap(),
        parameters: Parameters {
            payload_bytes: 2048,
            mean_delay: Duration::from_millis(15),
            max_delay: Duration::from_secs(10),
            epochs: Epochs {
                epoch_seconds: EPOCH_SECONDS,
                key_epochs: KEY_EPOCHS,
                overlap_seconds: 240,
            },
        },
        authorities: Authorities::new(keys, threshold).unwrap(),
        addresses: AddressRule::Private,
        valid_epochs: 4,
        minimum: Minimum { mixes: 3, gateways: 2, providers: 1 },
    })
    .unwrap()
}
