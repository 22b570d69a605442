//! How packets are made and opened: with the real cryptography, or with none at the same sizes.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use mixsocks_common::address::Address;
use mixsocks_common::keys::EncryptionKey;
use mixsocks_common::message::packet::BOX_OVERHEAD;
use mixsocks_common::message::sealed_box::{open_boxes, seal_boxes};
use mixsocks_common::topology::{Node, Parameters, Topology, UnixTime};
use mixsocks_sphinx::{
    HEADER_LEN, HopAddress, Identifier, OpenedPacket, Packet, Payload, Peeled, ReplayTag,
    ReplyRecovery, Route, SURB_LEN, SecretKey, Surb, build_packets, build_surbs, finish,
    max_plaintext, open_headers, recover_replies, use_surbs,
};
use rand::RngExt;
use rand::rngs::StdRng;

/// What a node finds in a packet.
pub(crate) enum Arrival<C: Codec> {
    Forward { next_hop: HopAddress, delay: Duration, packet: Packet },
    Final { destination: HopAddress, identifier: Identifier, payload: C::Payload },
}

/// The cryptography of a simulated network.
pub(crate) trait Codec: Sized {
    /// What recovers a reply.
    type Recovery;
    /// A packet whose replay tag is to be judged.
    type Opened;
    /// What the last hop finds.
    type Payload;

    fn new(payload_bytes: usize) -> Self;
    fn build(&self, rng: &mut StdRng, route: &SealedRoute<'_>, contents: &[u8]) -> Packet;
    fn build_surb(&self, rng: &mut StdRng, route: &SealedRoute<'_>) -> (Surb, Self::Recovery);
    fn use_surb(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)>;
    /// Opens a packet with the keys of key epochs that `count`.
    fn open(&self, node: &NodeKey, count: &KeyEpochs, packet: Packet) -> Opening<Self::Opened>;
    fn finish(&self, opened: Self::Opened) -> Option<Arrival<Self>>;
    /// The contents of a packet that is no reply.
    fn contents(&self, payload: Self::Payload) -> Option<Vec<u8>>;
    fn recover(&self, recovery: Self::Recovery, payload: Self::Payload) -> Option<Vec<u8>>;
    /// Seals a fragment of a message for whoever has the key.
    fn seal(&self, rng: &mut StdRng, to: EncryptionKey, fragment: &[u8]) -> Vec<u8>;
    fn unseal(&self, keys: &BoxKeys, sealed: &[u8]) -> Option<Vec<u8>>;
}

pub(crate) type KeyEpochs = RangeInclusive<u64>;

/// What opening a packet comes to.
pub(crate) enum Opening<T> {
    Opened(ReplayTag, T),
    /// It is for a key of this node that does not count now.
    Outdated,
    /// It is not for this node, or was changed.
    Unreadable,
}

/// The keys of whoever opens boxes.
pub(crate) struct BoxKeys {
    pub(crate) secret: SecretKey,
    pub(crate) public: EncryptionKey,
}

/// A route, and what its sender knows of the keys on it.
pub(crate) struct SealedRoute<'a> {
    pub(crate) route: &'a Route,
    /// To whom it leads: the destination.
    pub(crate) recipient: &'a Address,
    pub(crate) topology: &'a Topology,
    pub(crate) now: UnixTime,
}

impl SealedRoute<'_> {
    /// What stands for the key of a hop; zero for that of the recipient, which never changes.
    fn key_mark(&self, address: &HopAddress) -> KeyMark {
        let is_it = |node: &&Node| node.identity.as_bytes() == address;
        let key = self.topology.nodes().iter().find(is_it);
        let key = key.and_then(|node| self.topology.sphinx_key(node, self.now));
        key.map_or(KeyMark::default(), |key| mark(&key))
    }
}

type KeyMark = [u8; 3];

fn mark(key: &EncryptionKey) -> KeyMark {
    let [first, second, third, ..] = *key.as_bytes();
    [first, second, third]
}

/// Who a node or endpoint is to a codec, and what its clock says.
pub(crate) struct NodeKey {
    pub(crate) address: HopAddress,
    /// By key epoch. An endpoint has one for all times.
    keys: BTreeMap<u64, (SecretKey, KeyMark)>,
    pub(crate) clock_error_ms: i64,
}

impl NodeKey {
    /// A node, whose keys are made as they are needed.
    pub(crate) fn new(address: HopAddress, clock_error_ms: i64) -> Self {
        Self { address, keys: BTreeMap::new(), clock_error_ms }
    }

    /// An endpoint.
    pub(crate) fn lasting(address: HopAddress, key: SecretKey, clock_error_ms: i64) -> Self {
        let keys = BTreeMap::from([(0, (key, KeyMark::default()))]);
        Self { address, keys, clock_error_ms }
    }

    /// The public key of a key epoch.
    pub(crate) fn public(&mut self, key_epoch: u64, rng: &mut StdRng) -> EncryptionKey {
        let (key, key_mark) = self
            .keys
            .entry(key_epoch)
            .or_insert_with(|| (SecretKey::generate(rng), KeyMark::default()));
        let public = key.public_key().into();
        *key_mark = mark(&public);
        public
    }

    /// Forgets all keys; packets made for them are lost.
    pub(crate) fn renew(&mut self) {
        self.keys.clear();
    }
}

/// Sphinx.
pub(crate) struct Real {
    payload_bytes: usize,
}

impl Codec for Real {
    type Recovery = ReplyRecovery;
    type Opened = OpenedPacket;
    type Payload = Payload;

    fn new(payload_bytes: usize) -> Self {
        Self { payload_bytes }
    }

    fn build(&self, rng: &mut StdRng, route: &SealedRoute<'_>, contents: &[u8]) -> Packet {
        let requests = [(route.route.clone(), contents)];
        build_packets(rng, self.payload_bytes, &requests).remove(0).expect("it fits")
    }

    fn build_surb(&self, rng: &mut StdRng, route: &SealedRoute<'_>) -> (Surb, ReplyRecovery) {
        build_surbs(rng, std::slice::from_ref(route.route))
            .remove(0)
            .expect("the identifier is not zero")
    }

    fn use_surb(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)> {
        use_surbs(self.payload_bytes, vec![(surb, contents)]).remove(0).ok()
    }

    fn open(&self, node: &NodeKey, count: &KeyEpochs, packet: Packet) -> Opening<OpenedPacket> {
        let counting = node.keys.range(count.clone()).map(|(_, (key, _))| key);
        let open = |key| open_headers(key, vec![packet.clone()]).remove(0).ok();
        match counting.filter_map(open).next() {
            Some(opened) => Opening::Opened(opened.replay_tag(), opened),
            // Which key it is for cannot be seen.
            None => Opening::Unreadable,
        }
    }

    fn finish(&self, opened: OpenedPacket) -> Option<Arrival<Self>> {
        Some(match finish(vec![opened]).remove(0).ok()? {
            Peeled::Forward { next_hop, delay, packet } => {
                Arrival::Forward { next_hop, delay, packet }
            }
            Peeled::Final { destination, identifier, payload } => {
                Arrival::Final { destination, identifier, payload }
            }
        })
    }

    fn contents(&self, payload: Payload) -> Option<Vec<u8>> {
        payload.into_plaintext().ok()
    }

    fn recover(&self, recovery: ReplyRecovery, payload: Payload) -> Option<Vec<u8>> {
        recover_replies(vec![(recovery, payload)]).remove(0).ok()
    }

    fn seal(&self, rng: &mut StdRng, to: EncryptionKey, fragment: &[u8]) -> Vec<u8> {
        seal_boxes(rng, &[(to, fragment)]).remove(0)
    }

    fn unseal(&self, keys: &BoxKeys, sealed: &[u8]) -> Option<Vec<u8>> {
        let opened = open_boxes(&keys.secret, &[sealed]).remove(0).ok()?;
        Some(opened.to_vec())
    }
}

/// The same sizes and the same behaviour without cryptography: the route stands in the header.
///
/// | offset | bytes | header |
/// |--:|--:|---|
/// | 0 | 32 | the base point, as a SURB's group element must be one |
/// | 32 | 8 | random: tells packets apart |
/// | 40 | 1, 1 | hops passed, hops |
/// | 42 | 16 | identifier |
/// | 58 | 5 × 40 | of each hop: address, mark of its key (3 bytes), delay in nanoseconds (5 bytes) |
/// | 258 | 32 | destination |
/// | 290 | 8 | sum of what is above, without the hops passed |
///
/// A payload is a length, a sum and the contents.
pub(crate) struct Plain {
    payload_bytes: usize,
}

const RANDOM: usize = 32;
const PASSED: usize = 40;
const HOPS: usize = 41;
const IDENTIFIER: usize = 42;
const ROUTE: usize = 58;
const DESTINATION: usize = 258;
const SUM: usize = 290;
const PAYLOAD_HEAD: usize = 12;

impl Plain {
    fn header(rng: &mut StdRng, sealed: &SealedRoute<'_>) -> [u8; HEADER_LEN] {
        let route = sealed.route;
        let mut header = [0; HEADER_LEN];
        header[0] = 9;
        header[RANDOM..PASSED].copy_from_slice(&rng.random::<u64>().to_be_bytes());
        header[HOPS] = u8::try_from(route.hops().len()).expect("five at most");
        header[IDENTIFIER..ROUTE].copy_from_slice(&route.identifier());
        for (slot, (address, delay)) in header[ROUTE..DESTINATION].chunks_mut(40).zip(route.hops())
        {
            slot[..32].copy_from_slice(&address);
            let nanos = u64::try_from(delay.as_nanos()).expect("delays are short");
            slot[32..].copy_from_slice(&nanos.to_be_bytes());
            slot[32..35].copy_from_slice(&sealed.key_mark(&address));
        }
        header[DESTINATION..SUM].copy_from_slice(sealed.recipient.identity.as_bytes());
        let sum = Self::header_sum(&header);
        header[SUM..SUM + 8].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn header_sum(header: &[u8]) -> u64 {
        sum(&header[..PASSED]) ^ sum(&header[HOPS..SUM])
    }

    fn packet(&self, header: &[u8], contents: &[u8]) -> Packet {
        assert!(contents.len() <= max_plaintext(self.payload_bytes));
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.payload_bytes);
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(&u32::try_from(contents.len()).expect("short").to_be_bytes());
        bytes.extend_from_slice(&sum(contents).to_be_bytes());
        bytes.extend_from_slice(contents);
        bytes.resize(HEADER_LEN + self.payload_bytes, 0);
        Packet::from_bytes(bytes, self.payload_bytes).expect("the length is right")
    }
}

impl Codec for Plain {
    type Recovery = ();
    type Opened = Packet;
    type Payload = Vec<u8>;

    fn new(payload_bytes: usize) -> Self {
        Self { payload_bytes }
    }

    fn build(&self, rng: &mut StdRng, route: &SealedRoute<'_>, contents: &[u8]) -> Packet {
        self.packet(&Self::header(rng, route), contents)
    }

    fn build_surb(&self, rng: &mut StdRng, route: &SealedRoute<'_>) -> (Surb, ()) {
        let mut bytes = [0; SURB_LEN];
        bytes[..HEADER_LEN].copy_from_slice(&Self::header(rng, route));
        bytes[HEADER_LEN..HEADER_LEN + 32].copy_from_slice(&route.route.first_hop());
        (Surb::from_bytes(&bytes).expect("the base point is no point of low order"), ())
    }

    fn use_surb(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)> {
        Some((surb.first_hop(), self.packet(&surb.as_bytes()[..HEADER_LEN], contents)))
    }

    fn open(&self, node: &NodeKey, count: &KeyEpochs, packet: Packet) -> Opening<Packet> {
        let header = &packet.as_bytes()[..HEADER_LEN];
        let at = ROUTE + 40 * usize::from(header[PASSED]);
        let is_whole = header[SUM..SUM + 8] == Self::header_sum(header).to_be_bytes();
        let is_mine = header[PASSED] < header[HOPS] && header[at..at + 32] == node.address;
        if !is_whole || !is_mine {
            return Opening::Unreadable;
        }
        let is_for = |(_, (_, key_mark)): &(&u64, &(SecretKey, KeyMark))| {
            header[at + 32..at + 35] == *key_mark
        };
        if !node.keys.range(count.clone()).any(|key| is_for(&key)) {
            let is_known = node.keys.iter().any(|key| is_for(&key));
            return if is_known { Opening::Outdated } else { Opening::Unreadable };
        }
        let mut tag = [0; 32];
        // Each hop sees another tag.
        tag[..8].copy_from_slice(&header[RANDOM..PASSED]);
        tag[0] ^= header[PASSED];
        Opening::Opened(ReplayTag::from_bytes(tag), packet)
    }

    fn finish(&self, opened: Packet) -> Option<Arrival<Self>> {
        let mut bytes = opened.into_bytes();
        let passed = usize::from(bytes[PASSED]);
        if passed + 1 == usize::from(bytes[HOPS]) {
            let identifier = *bytes[IDENTIFIER..ROUTE].first_chunk()?;
            let destination = *bytes[DESTINATION..SUM].first_chunk()?;
            let payload = bytes.split_off(HEADER_LEN);
            return Some(Arrival::Final { destination, identifier, payload });
        }
        let slot = ROUTE + 40 * passed;
        let delay = u64::from_be_bytes(*bytes[slot + 32..].first_chunk()?) & (u64::MAX >> 24);
        let next_hop = *bytes[slot + 40..].first_chunk()?;
        bytes[PASSED] += 1;
        let packet = Packet::from_bytes(bytes, self.payload_bytes).ok()?;
        Some(Arrival::Forward { next_hop, delay: Duration::from_nanos(delay), packet })
    }

    fn contents(&self, mut payload: Vec<u8>) -> Option<Vec<u8>> {
        let len = usize::try_from(u32::from_be_bytes(*payload.first_chunk()?)).ok()?;
        let stated = u64::from_be_bytes(*payload[4..].first_chunk()?);
        payload.truncate(PAYLOAD_HEAD + len);
        let contents = payload.split_off(PAYLOAD_HEAD);
        (contents.len() == len && sum(&contents) == stated).then_some(contents)
    }

    fn recover(&self, (): (), payload: Vec<u8>) -> Option<Vec<u8>> {
        self.contents(payload)
    }

    /// Whom it is for, a sum, the fragment.
    fn seal(&self, _: &mut StdRng, to: EncryptionKey, fragment: &[u8]) -> Vec<u8> {
        let sum = sum(fragment).to_be_bytes();
        [to.as_bytes(), &sum[..], &[0; BOX_OVERHEAD - 40], fragment].concat()
    }

    fn unseal(&self, keys: &BoxKeys, sealed: &[u8]) -> Option<Vec<u8>> {
        let (head, fragment) = sealed.split_at_checked(BOX_OVERHEAD)?;
        let is_mine = head.starts_with(keys.public.as_bytes());
        let is_whole = head[32..40] == sum(fragment).to_be_bytes();
        (is_mine && is_whole).then(|| fragment.to_vec())
    }
}

/// Notices a changed byte, and is fast.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let rest = rest.iter().map(|byte| u64::from(*byte));
    words.iter().map(|word| u64::from_le_bytes(*word)).chain(rest).fold(
        bytes.len() as u64,
        |sum, word| {
            // Not linear: two changes must not make up for each other.
            (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        },
    )
}

/// Bytes of a payload on this network.
pub(crate) fn codec<C: Codec>(parameters: &Parameters) -> C {
    C::new(parameters.payload_bytes)
}
