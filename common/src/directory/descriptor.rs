//! Descriptors: what a node or provider says about itself, signed by it.
//!
//! ```text
//! mixsocks-descriptor 1
//! signature <identity, base58> <signature, base58>
//!
//! network = "…"
//! identity = "…"
//! published = 1800000000
//! role = "mix"
//! …
//! ```
//!
//! The only signature is the identity's, over `"mixsocks descriptor v1\0"` and every byte after the
//! empty line.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::CLOCK_SKEW;
use crate::address::Address;
use crate::keys::{EncryptionKey, Identity, IdentityKey, KeyError};
use crate::signed_text::{Kind, SignedTextError, toml_error};
use crate::topology::{NetworkName, Provider, UnixTime};

/// Longest descriptor in bytes: one with the longest name, policy and keys has some 1,100.
pub const MAX_DESCRIPTOR_BYTES: usize = 2048;
/// Longest policy of a provider in bytes: a document with [`super::MAX_HELD`] of them fits its bound.
pub const MAX_POLICY_BYTES: usize = 200;
/// Most key epochs in a descriptor: this, the next, and the one after that, which the last document
/// of a key epoch needs.
pub const MAX_KEYS: usize = 3;

const KIND: Kind = Kind {
    first_line: "mixsocks-descriptor 1",
    context: b"mixsocks descriptor v1\0",
    max_bytes: MAX_DESCRIPTOR_BYTES,
    max_signatures: 1,
    too_long: "it is larger than 2,048 bytes",
    other_first_line: "its first line is not \"mixsocks-descriptor 1\"",
    too_many_signatures: "it has more than one signature",
};

/// What a node or provider says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The network that it belongs to.
    pub network: NetworkName,
    /// Who it is, and who signs.
    pub identity: Identity,
    /// When it was made. A newer one replaces an older one.
    pub published: UnixTime,
    /// What it does, and where.
    pub member: Member,
}

/// What a member of a network does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Member {
    /// A mix, in a layer that it cannot choose.
    Mix(Hop),
    /// A gateway.
    Gateway {
        /// What it has in common with mixes.
        hop: Hop,
        /// Where clients reach it.
        client_address: SocketAddr,
    },
    /// A provider, whose address names the same identity. Its name has 1 to 64 of the characters
    /// a–z, 0–9 and hyphen, its policy at most [`MAX_POLICY_BYTES`] without control characters.
    Provider(Provider),
}

/// What mixes and gateways have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Where other nodes reach it.
    pub link_address: SocketAddr,
    /// Its Sphinx keys by key epoch: 1 to [`MAX_KEYS`] consecutive ones, all different.
    pub keys: BTreeMap<u64, EncryptionKey>,
}

/// What kind of member somebody is: an admission holds for one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberKind {
    /// A mix.
    Mix,
    /// A gateway.
    Gateway,
    /// A provider.
    Provider,
}

/// Which addresses an authority takes.
///
/// Addresses that nobody can dial (unspecified, multicast, broadcast, port 0) are never taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressRule {
    /// Those that the whole internet can reach.
    Public,
    /// Loopback, private and link-local ones too: networks on one machine or in one building.
    Private,
}

/// A descriptor that its identity has signed, with the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedDescriptor {
    descriptor: Descriptor,
    text: String,
}

/// Why a descriptor is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// It is not a descriptor at all.
    #[error("this is not a descriptor: {0}")]
    NotADescriptor(&'static str),
    /// A key or the signature in the first lines does not read.
    #[error("the signature line is damaged: {0}")]
    SignatureLine(#[from] KeyError),
    /// The identity has not signed the contents.
    #[error("the descriptor is not signed by the identity that it names")]
    NotSigned,
    /// It is not the TOML that a descriptor is made of.
    #[error("line {line} does not read as a descriptor: {problem}")]
    Syntax {
        /// The line of the text, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// It breaks a rule of descriptors.
    #[error("the descriptor {0}")]
    Rule(&'static str),
    /// It belongs to another network.
    #[error("the descriptor belongs to network {theirs:?}, this is {ours:?}")]
    OtherNetwork {
        /// The descriptor's network.
        theirs: String,
        /// The authority's network.
        ours: String,
    },
    /// An address is one that others cannot reach.
    #[error("the address {address} {problem}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// It was published in the future.
    #[error("the descriptor was made {seconds} s in the future: set the clocks of both machines")]
    Future {
        /// How far ahead.
        seconds: u64,
    },
    /// It was published too long ago.
    #[error("the descriptor was made {seconds} s ago: publish a new one, or set the clocks")]
    Old {
        /// How long ago.
        seconds: u64,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDescriptor {
    network: String,
    identity: Identity,
    published: u64,
    role: RawRole,
    #[serde(skip_serializing_if = "Option::is_none")]
    link_address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_address: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<Address>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requires_token: Option<bool>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    key: Vec<RawKey>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawRole {
    Mix,
    Gateway,
    Provider,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    key_epoch: u64,
    sphinx_key: EncryptionKey,
}

impl Descriptor {
    /// What kind of member it is.
    pub fn kind(&self) -> MemberKind {
        match self.member {
            Member::Mix(_) => MemberKind::Mix,
            Member::Gateway { .. } => MemberKind::Gateway,
            Member::Provider(_) => MemberKind::Provider,
        }
    }

    /// Signs it.
    ///
    /// # Errors
    /// [`DescriptorError`] when it breaks a rule, or when `key` is another's.
    ///
    /// # Panics
    /// Never: every value has a TOML form.
    pub fn sign(self, key: &IdentityKey) -> Result<SignedDescriptor, DescriptorError> {
        if self.identity != key.identity() {
            return Err(DescriptorError::NotSigned);
        }
        self.check()?;
        let body = toml::to_string(&RawDescriptor::from(&self))
            .expect("a descriptor has only TOML values");
        let text = KIND.write(&body, &[(self.identity, KIND.sign(&body, key))]);
        Ok(SignedDescriptor { descriptor: self, text })
    }

    fn check(&self) -> Result<(), DescriptorError> {
        let rule = |broken: bool, rule| {
            if broken { Err(DescriptorError::Rule(rule)) } else { Ok(()) }
        };
        match &self.member {
            Member::Mix(hop) | Member::Gateway { hop, .. } => {
                let count = hop.keys.len();
                rule(!(1..=MAX_KEYS).contains(&count), "must have 1 to 3 Sphinx keys")?;
                let epochs: Vec<_> = hop.keys.keys().collect();
                let gap = epochs.windows(2).any(|pair| pair[1] - pair[0] != 1);
                rule(gap, "has Sphinx keys of key epochs that do not follow each other")?;
                let distinct: std::collections::BTreeSet<_> = hop.keys.values().collect();
                rule(distinct.len() != count, "has one Sphinx key for two key epochs")
            }
            Member::Provider(Provider { name, address, policy, .. }) => {
                let named = NetworkName::new(name).is_some();
                rule(!named, "must have a name of 1 to 64 of the characters a-z, 0-9 and hyphen")?;
                rule(address.identity != self.identity, "has the address of somebody else")?;
                rule(policy.len() > MAX_POLICY_BYTES, "has a policy of more than 200 bytes")?;
                rule(policy.chars().any(char::is_control), "has control characters in its policy")
            }
        }
    }

    /// The addresses that others dial.
    fn socket_addresses(&self) -> impl Iterator<Item = SocketAddr> {
        let (link, client) = match &self.member {
            Member::Mix(hop) => (Some(hop.link_address), None),
            Member::Gateway { hop, client_address } => {
                (Some(hop.link_address), Some(*client_address))
            }
            Member::Provider(_) => (None, None),
        };
        link.into_iter().chain(client)
    }
}

impl SignedDescriptor {
    /// Reads a text and checks its signature and what does not depend on network, time and place.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn read(text: &[u8]) -> Result<Self, DescriptorError> {
        let signed = KIND.parse(text)?;
        let [(signer, signature)] = &signed.signatures[..] else {
            return Err(DescriptorError::NotSigned);
        };
        signer
            .verify(&KIND.signed_bytes(signed.body), signature)
            .map_err(|_| DescriptorError::NotSigned)?;
        let raw: RawDescriptor = toml::from_str(signed.body).map_err(|error| {
            let (line, problem) = toml_error(&error, signed.body, signed.body_line);
            DescriptorError::Syntax { line, problem }
        })?;
        if raw.identity != *signer {
            return Err(DescriptorError::NotSigned);
        }
        let descriptor = Descriptor::try_from(raw)?;
        descriptor.check()?;
        let text = KIND.write(signed.body, &signed.signatures);
        Ok(Self { descriptor, text })
    }

    /// What it says.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Who made it.
    pub fn identity(&self) -> Identity {
        self.descriptor.identity
    }

    /// The signed text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Checks that it belongs to `network` and that others can reach its addresses.
    ///
    /// # Errors
    /// [`DescriptorError::OtherNetwork`], [`DescriptorError::Address`].
    pub fn check_place(
        &self,
        network: &NetworkName,
        rule: AddressRule,
    ) -> Result<(), DescriptorError> {
        if self.descriptor.network != *network {
            return Err(DescriptorError::OtherNetwork {
                theirs: self.descriptor.network.as_str().to_owned(),
                ours: network.as_str().to_owned(),
            });
        }
        self.descriptor.socket_addresses().try_for_each(|address| rule.check(address))
    }

    /// Checks that it was published at most `max_age_seconds` ago and not in the future, but for
    /// [`CLOCK_SKEW`].
    ///
    /// # Errors
    /// [`DescriptorError::Future`], [`DescriptorError::Old`].
    pub fn check_time(&self, now: UnixTime, max_age_seconds: u64) -> Result<(), DescriptorError> {
        let published = self.descriptor.published;
        if published.0 > now.0.saturating_add(CLOCK_SKEW.as_secs()) {
            return Err(DescriptorError::Future { seconds: published.0 - now.0 });
        }
        let seconds = now.0.saturating_sub(published.0);
        if seconds > max_age_seconds {
            return Err(DescriptorError::Old { seconds });
        }
        Ok(())
    }
}

impl AddressRule {
    /// Checks an address.
    ///
    /// # Errors
    /// [`DescriptorError::Address`].
    pub fn check(self, address: SocketAddr) -> Result<(), DescriptorError> {
        let ip = address.ip().to_canonical();
        let problem = if address.port() == 0 {
            "has no port"
        } else if !is_one_host(ip) {
            "is not that of one host"
        } else if self == Self::Public && !is_public(ip) {
            "cannot be reached from the internet"
        } else {
            return Ok(());
        };
        Err(DescriptorError::Address { address, problem })
    }
}

fn is_one_host(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !(ip.is_unspecified() || ip.is_multicast() || broadcast)
}

/// Whether an address is of a block that the internet routes (IANA special-purpose registries).
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_documentation()
                || a == 0
                || a >= 240
                || (a == 100 && b & 0xc0 == 64)
                || (a == 198 && b & 0xfe == 18)
                || (a, b, c) == (192, 0, 0))
        }
        IpAddr::V6(ip) => {
            let documentation = ip.segments()[..2] == [0x2001, 0xdb8];
            ip.segments()[0] & 0xe000 == 0x2000 && !documentation
        }
    }
}

impl From<SignedTextError> for DescriptorError {
    fn from(error: SignedTextError) -> Self {
        match error {
            SignedTextError::Form(what) => Self::NotADescriptor(what),
            SignedTextError::Key(error) => Self::SignatureLine(error),
        }
    }
}

impl TryFrom<RawDescriptor> for Descriptor {
    type Error = DescriptorError;

    fn try_from(raw: RawDescriptor) -> Result<Self, DescriptorError> {
        let rule = DescriptorError::Rule;
        let network = NetworkName::new(&raw.network).ok_or(rule("has a wrong network name"))?;
        let count = raw.key.len();
        let keys: BTreeMap<_, _> =
            raw.key.iter().map(|key| (key.key_epoch, key.sphinx_key)).collect();
        if keys.len() != count {
            return Err(rule("has two Sphinx keys of one key epoch"));
        }
        let hop = raw.link_address.map(|link_address| Hop { link_address, keys });
        let advert = (raw.name, raw.address, raw.policy, raw.requires_token);
        let member = match (raw.role, hop, raw.client_address, advert) {
            (RawRole::Mix, Some(hop), None, (None, None, None, None)) => Member::Mix(hop),
            (RawRole::Mix, ..) => return Err(rule("of a mix needs link_address and keys only")),
            (RawRole::Gateway, Some(hop), Some(client_address), (None, None, None, None)) => {
                Member::Gateway { hop, client_address }
            }
            (RawRole::Gateway, ..) => {
                return Err(rule("of a gateway needs link_address, client_address and keys only"));
            }
            (
                RawRole::Provider,
                None,
                None,
                (Some(name), Some(address), Some(policy), Some(requires_token)),
            ) if count == 0 => Member::Provider(Provider { name, address, policy, requires_token }),
            (RawRole::Provider, ..) => {
                return Err(rule(
                    "of a provider needs name, address, policy and requires_token only",
                ));
            }
        };
        let published = UnixTime(raw.published);
        Ok(Self { network, identity: raw.identity, published, member })
    }
}

impl From<&Descriptor> for RawDescriptor {
    fn from(descriptor: &Descriptor) -> Self {
        let raw = |role| Self {
            network: descriptor.network.as_str().to_owned(),
            identity: descriptor.identity,
            published: descriptor.published.0,
            role,
            link_address: None,
            client_address: None,
            name: None,
            address: None,
            policy: None,
            requires_token: None,
            key: Vec::new(),
        };
        let keys = |hop: &Hop| {
            let key = |(key_epoch, sphinx_key): (&u64, &EncryptionKey)| RawKey {
                key_epoch: *key_epoch,
                sphinx_key: *sphinx_key,
            };
            hop.keys.iter().map(key).collect()
        };
        match &descriptor.member {
            Member::Mix(hop) => {
                Self { link_address: Some(hop.link_address), key: keys(hop), ..raw(RawRole::Mix) }
            }
            Member::Gateway { hop, client_address } => Self {
                link_address: Some(hop.link_address),
                client_address: Some(*client_address),
                key: keys(hop),
                ..raw(RawRole::Gateway)
            },
            Member::Provider(provider) => Self {
                name: Some(provider.name.clone()),
                address: Some(provider.address),
                policy: Some(provider.policy.clone()),
                requires_token: Some(provider.requires_token),
                ..raw(RawRole::Provider)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Person;
    use super::*;

    fn signed_body(body: &str, key: &IdentityKey) -> Vec<u8> {
        KIND.write(body, &[(key.identity(), KIND.sign(body, key))]).into_bytes()
    }

    #[test]
    fn each_kind_round_trips() {
        for person in [Person::mix(1), Person::gateway(2), Person::provider(3, 2)] {
            let signed = person.signed(5000);
            assert_eq!(SignedDescriptor::read(signed.text().as_bytes()), Ok(signed.clone()));
            assert_eq!(*signed.descriptor(), person.descriptor(5000));
            assert!(signed.text().len() < MAX_DESCRIPTOR_BYTES / 2, "{}", signed.text().len());
        }
    }

    #[test]
    fn a_changed_or_missing_byte_anywhere_is_refused() {
        let text = Person::gateway(1).signed(0).text().as_bytes().to_vec();
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            assert!(SignedDescriptor::read(&changed).is_err(), "byte {at}");
            assert!(SignedDescriptor::read(&text[..at]).is_err(), "cut at {at}");
        }
        let long = [text, vec![b' '; MAX_DESCRIPTOR_BYTES]].concat();
        assert!(matches!(SignedDescriptor::read(&long), Err(DescriptorError::NotADescriptor(_))));
    }

    #[test]
    fn only_the_identity_itself_signs_and_only_once() {
        let (mix, other) = (Person::mix(1), Person::mix(2));
        assert_eq!(mix.descriptor(0).sign(&other.key()), Err(DescriptorError::NotSigned));
        let text = mix.signed(0).text().to_owned();
        let body = text.split_once("\n\n").unwrap().1;
        let foreign = signed_body(body, &other.key());
        assert_eq!(SignedDescriptor::read(&foreign), Err(DescriptorError::NotSigned));
        let unsigned = KIND.write(body, &[]);
        assert_eq!(SignedDescriptor::read(unsigned.as_bytes()), Err(DescriptorError::NotSigned));
        let signature = (mix.key().identity(), KIND.sign(body, &mix.key()));
        let twice = KIND.write(body, &[signature, signature]);
        let result = SignedDescriptor::read(twice.as_bytes());
        assert!(matches!(result, Err(DescriptorError::NotADescriptor(_))));
    }

    #[test]
    fn signed_texts_that_break_a_rule_are_refused_in_one_line() {
        let gateway = Person::gateway(1);
        let provider = Person::provider(3, 1);
        let key = |person: &Person, epoch| format!("\"{}\"", person.sphinx_key(epoch));
        let again = (key(&gateway, 1), key(&gateway, 0));
        for (person, from, to, words) in [
            (gateway, "published", "published_at", "unknown field `published_at`"),
            (gateway, "\"test\"", "\"Test\"", "network name"),
            (gateway, "client_address", "name = \"x\"\nclient_address", "of a gateway needs"),
            (gateway, "role = \"gateway\"", "role = \"mix\"", "of a mix needs"),
            (gateway, "role = \"gateway\"", "role = \"provider\"", "of a provider needs"),
            (gateway, "key_epoch = 2", "key_epoch = 3", "do not follow each other"),
            (gateway, "key_epoch = 2", "key_epoch = 1", "two Sphinx keys of one key epoch"),
            (gateway, &again.0, &again.1, "one Sphinx key for two key epochs"),
            (provider, "exit-3", "Exit", "must have a name"),
            (provider, "everything", &"x".repeat(200), "more than 200 bytes"),
            (provider, "requires_token = true\n", "", "of a provider needs"),
        ] {
            let text = person.signed(0).text().replace(from, to);
            let body = text.split_once("\n\n").unwrap().1;
            let error = SignedDescriptor::read(&signed_body(body, &person.key())).unwrap_err();
            let line = error.to_string();
            assert!(line.contains(words) && line.lines().count() == 1, "{words}: {line}");
        }
        let mut descriptor = provider.descriptor(0);
        descriptor.identity = gateway.key().identity();
        let error = descriptor.sign(&gateway.key()).unwrap_err();
        assert!(error.to_string().contains("the address of somebody else"), "{error}");
        let mut descriptor = provider.descriptor(0);
        let Member::Provider(advert) = &mut descriptor.member else { panic!("a provider") };
        advert.policy = "two\nlines".to_owned();
        let error = descriptor.sign(&provider.key()).unwrap_err();
        assert!(error.to_string().contains("control characters"), "{error}");
        for keys in [0, MAX_KEYS as u64 + 1] {
            let mut descriptor = Person::mix(1).descriptor(0);
            let Member::Mix(hop) = &mut descriptor.member else { panic!("a mix") };
            hop.keys = (0..keys).map(|epoch| (epoch, gateway.sphinx_key(epoch))).collect();
            let error = descriptor.sign(&Person::mix(1).key()).unwrap_err();
            assert!(error.to_string().contains("1 to 3 Sphinx keys"), "{error}");
        }
    }

    #[test]
    fn keys_outside_the_subgroup_are_refused() {
        let mix = Person::mix(1);
        let text = mix.signed(0).text().to_owned();
        let body = text.split_once("\n\n").unwrap().1;
        // u = 2 is a point of the twist, and u = 0 one of low order.
        for u in [0, 2] {
            let mut point = [0; 32];
            point[0] = u;
            let bad = bs58::encode(point).into_string();
            let body = body.replace(&mix.sphinx_key(0).to_string(), &bad);
            let result = SignedDescriptor::read(&signed_body(&body, &mix.key()));
            assert!(matches!(result, Err(DescriptorError::Syntax { .. })), "{u}: {result:?}");
        }
    }

    #[test]
    fn addresses_that_nobody_or_not_everybody_can_dial() {
        let check = |rule: AddressRule, address: &str| rule.check(address.parse().unwrap()).is_ok();
        for never in ["0.0.0.0:1", "[::]:1", "224.0.0.1:1", "[ff02::1]:1", "255.255.255.255:1"] {
            assert!(!check(AddressRule::Private, never), "{never}");
        }
        assert!(!check(AddressRule::Private, "192.0.2.1:0"));
        for private in [
            "127.0.0.1:1",
            "10.0.0.1:1",
            "172.16.0.1:1",
            "192.168.1.1:1",
            "169.254.1.1:1",
            "100.64.0.1:1",
            "198.18.0.1:1",
            "192.0.2.1:1",
            "0.1.2.3:1",
            "240.0.0.1:1",
            "[::1]:1",
            "[fe80::1]:1",
            "[fd00::1]:1",
            "[2001:db8::1]:1",
            "[::ffff:10.0.0.1]:1",
        ] {
            assert!(check(AddressRule::Private, private), "{private}");
            assert!(!check(AddressRule::Public, private), "{private}");
        }
        for public in ["1.1.1.1:1", "172.32.0.1:65535", "[2606:4700::1111]:1", "[::ffff:1.1.1.1]:1"]
        {
            assert!(check(AddressRule::Public, public), "{public}");
        }
    }

    #[test]
    fn place_and_time_are_checked_exactly() {
        let signed = Person::gateway(1).signed(1000);
        let network = NetworkName::new("test").unwrap();
        assert_eq!(signed.check_place(&network, AddressRule::Private), Ok(()));
        let result = signed.check_place(&network, AddressRule::Public);
        assert!(matches!(result, Err(DescriptorError::Address { .. })));
        let other = NetworkName::new("other").unwrap();
        let result = signed.check_place(&other, AddressRule::Private);
        assert!(matches!(result, Err(DescriptorError::OtherNetwork { .. })));
        let at = |now| signed.check_time(UnixTime(now), 500);
        assert_eq!(at(879), Err(DescriptorError::Future { seconds: 121 }));
        assert!([880, 1000, 1500].iter().all(|now| at(*now).is_ok()));
        assert_eq!(at(1501), Err(DescriptorError::Old { seconds: 501 }));
    }
}
