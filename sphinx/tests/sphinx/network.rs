//! A row of hops, and the journey of a packet along it.

use std::time::Duration;

use mixsocks_sphinx::{
    Backend, Hop, HopAddress, Identifier, Packet, Payload, PeelError, Peeled, ReplyRecovery, Route,
    SecretKey, Surb, build_packets, build_surbs, finish, open_headers,
};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

pub(crate) const DESTINATION: HopAddress = [0xde; 32];
pub(crate) const IDENTIFIER: Identifier = [0x1d; 16];

pub(crate) fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Does the same with every backend of this machine.
pub(crate) fn with_every_backend(test: impl Fn()) {
    for backend in Backend::available() {
        println!("backend {backend}");
        backend.scope(&test).unwrap();
    }
}

/// One of the backends of this machine.
pub(crate) fn backend() -> impl Strategy<Value = Backend> {
    prop::sample::select(Backend::available().collect::<Vec<_>>())
}

/// The secret keys of hops, and the hops as a sender knows them.
pub(crate) struct Network {
    pub(crate) keys: Vec<SecretKey>,
    pub(crate) hops: Vec<Hop>,
}

impl Network {
    /// Hop `i` has the address `[i; 32]` and holds packets for `i + 1` milliseconds.
    pub(crate) fn new(rng: &mut StdRng, hops: u8) -> Self {
        let keys: Vec<_> = (0..hops).map(|_| SecretKey::generate(rng)).collect();
        let hops = (0..hops).zip(&keys).map(|(i, key)| Hop {
            address: [i; 32],
            key: key.public_key(),
            delay: Duration::from_millis(u64::from(i) + 1),
        });
        let hops = hops.collect();
        Self { keys, hops }
    }

    pub(crate) fn route(&self) -> Route {
        Route::new(&self.hops, DESTINATION, IDENTIFIER).unwrap()
    }

    pub(crate) fn packet(&self, rng: &mut StdRng, payload_len: usize, plaintext: &[u8]) -> Packet {
        build_packets(rng, payload_len, &[(self.route(), plaintext)]).remove(0).unwrap()
    }

    pub(crate) fn surb(&self, rng: &mut StdRng) -> (Surb, ReplyRecovery) {
        build_surbs(rng, &[self.route()]).remove(0).unwrap()
    }

    /// Takes `packet` along the whole route, checks what each hop is told, and returns what the
    /// last one gets. `before_hop` may change the packet before each hop.
    pub(crate) fn travel(
        &self,
        mut packet: Packet,
        mut before_hop: impl FnMut(usize, Packet) -> Packet,
    ) -> Payload {
        for (i, key) in self.keys.iter().enumerate() {
            packet = before_hop(i, packet);
            match peel(key, packet).unwrap() {
                Peeled::Forward { next_hop, delay, packet: next } => {
                    assert_eq!(next_hop, self.hops[i + 1].address);
                    assert_eq!(delay, self.hops[i].delay);
                    packet = next;
                }
                Peeled::Final { destination, identifier, payload } => {
                    assert_eq!(i + 1, self.keys.len());
                    assert_eq!((destination, identifier), (DESTINATION, IDENTIFIER));
                    return payload;
                }
            }
        }
        panic!("the packet did not end at the last hop");
    }
}

/// Both phases for one packet.
pub(crate) fn peel(key: &SecretKey, packet: Packet) -> Result<Peeled, PeelError> {
    let opened = open_headers(key, vec![packet]).remove(0)?;
    finish(vec![opened]).remove(0)
}

/// The same packet with other bytes.
pub(crate) fn change(packet: &Packet, change: impl FnOnce(&mut [u8])) -> Packet {
    let mut bytes = packet.as_bytes().to_vec();
    change(&mut bytes);
    let payload_len = bytes.len() - mixsocks_sphinx::HEADER_LEN;
    Packet::from_bytes(bytes, payload_len).unwrap()
}
