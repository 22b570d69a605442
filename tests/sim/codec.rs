//! How packets are made and opened: with the real cryptography, or with none at the same sizes.

use std::collections::BTreeMap;
use std::time::Duration;

use mixsocks_common::topology::Topology;
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
    Final { identifier: Identifier, payload: C::Payload },
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
    fn build(&self, rng: &mut StdRng, route: &Route, contents: &[u8]) -> Packet;
    fn build_surb(&self, rng: &mut StdRng, route: &Route) -> (Surb, Self::Recovery);
    fn use_surb(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)>;
    /// `None` for a packet that is not for this node, or was changed.
    fn open(&self, node: &NodeKey, packet: Packet) -> Option<(ReplayTag, Self::Opened)>;
    fn finish(&self, opened: Self::Opened) -> Option<Arrival<Self>>;
    /// The contents of a packet that is no reply.
    fn contents(&self, payload: Self::Payload) -> Option<Vec<u8>>;
    fn recover(&self, recovery: Self::Recovery, payload: Self::Payload) -> Option<Vec<u8>>;
    /// A node has got a new key, which senders know of.
    fn learn_key(&mut self, node: &NodeKey);
}

/// Who a node is to a codec.
pub(crate) struct NodeKey {
    pub(crate) address: HopAddress,
    pub(crate) key: SecretKey,
    /// Counts its keys: what packets without cryptography are made for.
    pub(crate) number: u8,
}

impl NodeKey {
    pub(crate) fn new(address: HopAddress, key: SecretKey) -> Self {
        Self { address, key, number: 0 }
    }

    /// Takes a new key; packets made for the old one are lost.
    pub(crate) fn renew(&mut self, rng: &mut StdRng) {
        self.key = SecretKey::generate(rng);
        self.number = self.number.wrapping_add(1);
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

    fn build(&self, rng: &mut StdRng, route: &Route, contents: &[u8]) -> Packet {
        let requests = [(route.clone(), contents)];
        build_packets(rng, self.payload_bytes, &requests).remove(0).expect("it fits")
    }

    fn build_surb(&self, rng: &mut StdRng, route: &Route) -> (Surb, ReplyRecovery) {
        build_surbs(rng, std::slice::from_ref(route)).remove(0).expect("the identifier is not zero")
    }

    fn use_surb(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)> {
        use_surbs(self.payload_bytes, vec![(surb, contents)]).remove(0).ok()
    }

    fn open(&self, node: &NodeKey, packet: Packet) -> Option<(ReplayTag, OpenedPacket)> {
        let opened = open_headers(&node.key, vec![packet]).remove(0).ok()?;
        Some((opened.replay_tag(), opened))
    }

    fn finish(&self, opened: OpenedPacket) -> Option<Arrival<Self>> {
        Some(match finish(vec![opened]).remove(0).ok()? {
            Peeled::Forward { next_hop, delay, packet } => {
                Arrival::Forward { next_hop, delay, packet }
            }
            Peeled::Final { identifier, payload, .. } => Arrival::Final { identifier, payload },
        })
    }

    fn contents(&self, payload: Payload) -> Option<Vec<u8>> {
        payload.into_plaintext().ok()
    }

    fn recover(&self, recovery: ReplyRecovery, payload: Payload) -> Option<Vec<u8>> {
        recover_replies(vec![(recovery, payload)]).remove(0).ok()
    }

    fn learn_key(&mut self, _: &NodeKey) {}
}

/// The same sizes and the same behaviour without cryptography: the route stands in the header.
///
/// | offset | bytes | header |
/// |--:|--:|---|
/// | 0 | 32 | the base point, as a SURB's group element must be one |
/// | 32 | 8 | random: tells packets apart |
/// | 40 | 1, 1 | hops passed, hops |
/// | 42 | 16 | identifier |
/// | 58 | 5 × 40 | of each hop: address, number of its key, delay in nanoseconds in 7 bytes |
/// | 258 | 8 | sum of what is above, without the hops passed |
///
/// A payload is a length, a sum and the contents.
pub(crate) struct Plain {
    payload_bytes: usize,
    /// Of nodes whose key is not their first one.
    keys: BTreeMap<HopAddress, u8>,
}

const RANDOM: usize = 32;
const PASSED: usize = 40;
const HOPS: usize = 41;
const IDENTIFIER: usize = 42;
const ROUTE: usize = 58;
const SUM: usize = 258;
const PAYLOAD_HEAD: usize = 12;

impl Plain {
    fn header(&self, rng: &mut StdRng, route: &Route) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[0] = 9;
        header[RANDOM..PASSED].copy_from_slice(&rng.random::<u64>().to_be_bytes());
        header[HOPS] = u8::try_from(route.hops().len()).expect("five at most");
        header[IDENTIFIER..ROUTE].copy_from_slice(&route.identifier());
        for (slot, (address, delay)) in header[ROUTE..SUM].chunks_mut(40).zip(route.hops()) {
            slot[..32].copy_from_slice(&address);
            let nanos = u64::try_from(delay.as_nanos()).expect("delays are short");
            slot[32..].copy_from_slice(&nanos.to_be_bytes());
            slot[32] = self.keys.get(&address).copied().unwrap_or(0);
        }
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
        Self { payload_bytes, keys: BTreeMap::new() }
    }

    fn build(&self, rng: &mut StdRng, route: &Route, contents: &[u8]) -> Packet {
        self.packet(&self.header(rng, route), contents)
    }

    fn build_surb(&self, rng: &mut StdRng, route: &Route) -> (Surb, ()) {
        let mut bytes = [0; SURB_LEN];
        bytes[..HEADER_LEN].copy_from_slice(&self.header(rng, route));
        bytes[HEADER_LEN..HEADER_LEN + 32].copy_from_slice(&route.first_hop());
        (Surb::from_bytes(&bytes).expect("the base point is no point of low order"), ())
    }

    fn use_surb(&self, surb: Surb, contents: &[u8]) -> Option<(HopAddress, Packet)> {
        Some((surb.first_hop(), self.packet(&surb.as_bytes()[..HEADER_LEN], contents)))
    }

    fn open(&self, node: &NodeKey, packet: Packet) -> Option<(ReplayTag, Packet)> {
        let header = &packet.as_bytes()[..HEADER_LEN];
        let at = ROUTE + 40 * usize::from(header[PASSED]);
        let is_whole = header[SUM..SUM + 8] == Self::header_sum(header).to_be_bytes();
        let is_mine = header[PASSED] < header[HOPS]
            && header[at..at + 32] == node.address
            && header[at + 32] == node.number;
        if !is_whole || !is_mine {
            return None;
        }
        let mut tag = [0; 32];
        // Each hop sees another tag.
        tag[..8].copy_from_slice(&header[RANDOM..PASSED]);
        tag[0] ^= header[PASSED];
        Some((ReplayTag::from_bytes(tag), packet))
    }

    fn finish(&self, opened: Packet) -> Option<Arrival<Self>> {
        let mut bytes = opened.into_bytes();
        let passed = usize::from(bytes[PASSED]);
        if passed + 1 == usize::from(bytes[HOPS]) {
            let identifier = *bytes[IDENTIFIER..ROUTE].first_chunk()?;
            return Some(Arrival::Final { identifier, payload: bytes.split_off(HEADER_LEN) });
        }
        let slot = ROUTE + 40 * passed;
        let delay = u64::from_be_bytes(*bytes[slot + 32..].first_chunk()?) & (u64::MAX >> 8);
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

    fn learn_key(&mut self, node: &NodeKey) {
        self.keys.insert(node.address, node.number);
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
pub(crate) fn codec<C: Codec>(topology: &Topology) -> C {
    C::new(topology.parameters.payload_bytes)
}
