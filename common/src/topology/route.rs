//! Routes: one mix of each layer, drawn evenly for each packet, with exponential delays.

use std::time::Duration;

use mixsocks_sphinx::{Hop, Identifier, Route};
use rand::seq::IteratorRandom;
use rand::{Rng, RngExt};

use super::{LAYERS, Node, Topology};
use crate::address::Address;

/// There is no way to the recipient.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// Its gateway is not in the topology.
    #[error(
        "the gateway of the address is not in the topology: the address belongs to another network, or its gateway has left"
    )]
    UnknownGateway,
}

/// Draws a route to `recipient`: a mix of each layer, its gateway, itself.
///
/// Each mix holds the packet for an exponentially distributed time of mean `mean_delay`, cut at the
/// network's maximum; the gateway and the recipient do not delay. Choices are independent of each
/// other and of earlier routes.
///
/// # Errors
/// [`NoRoute::UnknownGateway`].
pub fn random_route(
    topology: &Topology,
    recipient: &Address,
    mean_delay: Duration,
    identifier: Identifier,
    rng: &mut impl Rng,
) -> Result<Route, NoRoute> {
    let gateway = topology.gateway(&recipient.gateway).ok_or(NoRoute::UnknownGateway)?;
    let mut hops = Vec::with_capacity(LAYERS + 2);
    for layer in (1..).take(LAYERS) {
        let mix = topology.mixes(layer).choose(rng).expect("a topology has a mix in each layer");
        let delay = exponential(mean_delay, rng).min(topology.parameters.max_delay);
        hops.push(hop(mix, delay));
    }
    hops.push(hop(gateway, Duration::ZERO));
    hops.push(Hop {
        address: *recipient.identity.as_bytes(),
        key: recipient.encryption.public_key(),
        delay: Duration::ZERO,
    });
    let destination = *recipient.identity.as_bytes();
    Ok(Route::new(&hops, destination, identifier)
        .expect("five hops and delays of at most a minute"))
}

fn hop(node: &Node, delay: Duration) -> Hop {
    Hop { address: *node.identity.as_bytes(), key: node.sphinx_key.public_key(), delay }
}

fn exponential(mean: Duration, rng: &mut impl Rng) -> Duration {
    // 1 - u is in (0, 1], so that the logarithm is finite.
    let u: f64 = rng.random();
    mean.mul_f64(-(1.0 - u).ln())
}

/// The time within which all but one in a thousand of the sums of `delays` exponential delays of
/// mean `mean` stay: the p99.9 of an Erlang distribution.
///
/// Found by bisection of the exact tail `exp(-x) · Σ_{k<n} x^k / k!`.
pub fn delay_quantile(mean: Duration, delays: u32) -> Duration {
    const TAIL: f64 = 0.001;
    let tail = |x: f64| {
        let mut term = 1.0;
        let mut sum = 0.0;
        for k in 0..delays {
            sum += term;
            term *= x / f64::from(k + 1);
        }
        sum * (-x).exp()
    };
    let (mut low, mut high) = (0.0, 20.0 + 4.0 * f64::from(delays));
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if tail(middle) > TAIL { low = middle } else { high = middle }
    }
    mean.mul_f64(high)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use mixsocks_sphinx::{
        HopAddress, Packet, Payload, Peeled, SecretKey, build_packets, build_surbs, finish,
        max_plaintext, open_headers, recover_replies, use_surbs,
    };
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::{Epochs, NetworkName, Parameters, Role, UnixTime};
    use super::*;
    use crate::keys::{Identity, IdentityKey};

    const MIXES_PER_LAYER: usize = 4;
    const PAYLOAD_BYTES: usize = 1024;
    const MAX_DELAY: Duration = Duration::from_millis(20);
    const IDENTIFIER: Identifier = [7; 16];

    /// A network, and a recipient at its first gateway, with the keys of all.
    struct Fixture {
        topology: Topology,
        recipient: Address,
        keys: Vec<(Identity, SecretKey)>,
        rng: StdRng,
    }

    /// What the hops of a route were told.
    struct Journey {
        hops: Vec<Identity>,
        delays: Vec<Duration>,
        destination: HopAddress,
        identifier: Identifier,
        payload: Payload,
    }

    impl Fixture {
        fn new(seed: u64) -> Self {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut keys = Vec::new();
            let mut draw = || {
                let identity = IdentityKey::generate(&mut rng).identity();
                let key = SecretKey::generate(&mut rng);
                let public = key.public_key().into();
                keys.push((identity, key));
                (identity, public)
            };
            let mut roles = Vec::new();
            for layer in [3, 1, 2] {
                roles.extend([Role::Mix { layer }; MIXES_PER_LAYER]);
            }
            for port in [1, 2] {
                let client_address = SocketAddr::from(([192, 0, 2, 1], port));
                roles.push(Role::Gateway { client_address });
            }
            let nodes: Vec<_> = (1..)
                .zip(roles)
                .map(|(port, role)| {
                    let (identity, sphinx_key) = draw();
                    let link_address = SocketAddr::from(([192, 0, 2, 2], port));
                    Node { identity, sphinx_key, next_sphinx_key: None, link_address, role }
                })
                .collect();
            let (identity, encryption) = draw();
            let gateway = nodes[3 * MIXES_PER_LAYER].identity;
            let recipient = Address { identity, encryption, gateway };
            let parameters = Parameters {
                payload_bytes: PAYLOAD_BYTES,
                mean_delay: Duration::from_millis(15),
                max_delay: MAX_DELAY,
                epochs: Epochs::STATIC,
            };
            let network = NetworkName::new("test").unwrap();
            let validity = UnixTime(0)..UnixTime(1);
            let topology = Topology::new(network, 1, validity, parameters, nodes, vec![]).unwrap();
            Self { topology, recipient, keys, rng }
        }

        fn route(&mut self) -> Route {
            let mean = self.topology.parameters.mean_delay;
            random_route(&self.topology, &self.recipient, mean, IDENTIFIER, &mut self.rng).unwrap()
        }

        /// Takes a packet along its route, each layer being taken off with the key of the very hop
        /// that the one before named.
        fn travel(&self, first_hop: HopAddress, mut packet: Packet) -> Journey {
            let (mut hops, mut delays) = (Vec::new(), Vec::new());
            let mut hop = first_hop;
            loop {
                let named = |(identity, _): &&(Identity, SecretKey)| *identity.as_bytes() == hop;
                let (identity, key) = self.keys.iter().find(named).unwrap();
                hops.push(*identity);
                let opened = open_headers(key, vec![packet]).remove(0).unwrap();
                match finish(vec![opened]).remove(0).unwrap() {
                    Peeled::Forward { next_hop, delay, packet: next } => {
                        delays.push(delay);
                        (hop, packet) = (next_hop, next);
                    }
                    Peeled::Final { destination, identifier, payload } => {
                        return Journey { hops, delays, destination, identifier, payload };
                    }
                }
            }
        }

        /// Whether these are a mix of each layer in turn, the recipient's gateway, the recipient.
        fn is_way_to_recipient(&self, hops: &[Identity]) -> bool {
            let [one, two, three, gateway, recipient] = hops else { return false };
            let layer = |mix| self.topology.node(mix).map(|node| node.role);
            [one, two, three].map(layer) == [1, 2, 3].map(|layer| Some(Role::Mix { layer }))
                && (*gateway, *recipient) == (self.recipient.gateway, self.recipient.identity)
        }
    }

    #[test]
    fn a_packet_passes_a_mix_of_each_layer_the_gateway_and_the_recipient() {
        let mut fixture = Fixture::new(1);
        let mut was_cut = false;
        for _ in 0..50 {
            let route = fixture.route();
            let (first_hop, total) = (route.first_hop(), route.total_delay());
            let contents = [9; max_plaintext(PAYLOAD_BYTES)];
            let packet = build_packets(&mut fixture.rng, PAYLOAD_BYTES, &[(route, &contents[..])])
                .remove(0)
                .unwrap();
            let journey = fixture.travel(first_hop, packet);
            assert!(fixture.is_way_to_recipient(&journey.hops), "{:?}", journey.hops);
            assert_eq!(journey.destination, *fixture.recipient.identity.as_bytes());
            assert_eq!(journey.identifier, IDENTIFIER);
            assert_eq!(journey.payload.into_plaintext().unwrap(), contents);
            let [mixes @ .., gateway] = &journey.delays[..] else { panic!("no delays") };
            assert_eq!((mixes.len(), *gateway), (LAYERS, Duration::ZERO));
            assert!(mixes.iter().all(|delay| *delay <= MAX_DELAY), "{mixes:?}");
            assert_eq!(journey.delays.iter().sum::<Duration>(), total);
            was_cut |= mixes.contains(&MAX_DELAY);
        }
        // A delay passes 20 ms with probability e^(-4/3), so that all 150 stay below it with
        // probability 10^-20.
        assert!(was_cut);
    }

    #[test]
    fn the_last_hop_of_a_surb_is_its_creator() {
        let mut fixture = Fixture::new(2);
        for _ in 0..20 {
            let route = fixture.route();
            let (surb, recovery) = build_surbs(&mut fixture.rng, &[route]).remove(0).unwrap();

            let (first_hop, reply) =
                use_surbs(PAYLOAD_BYTES, vec![(surb, &b"reply"[..])]).remove(0).unwrap();
            let journey = fixture.travel(first_hop, reply);
            assert!(fixture.is_way_to_recipient(&journey.hops), "{:?}", journey.hops);
            assert_eq!(journey.identifier, IDENTIFIER);
            let reply = recover_replies(vec![(recovery, journey.payload)]).remove(0).unwrap();
            assert_eq!(reply, b"reply");
        }
    }

    #[test]
    fn mixes_are_drawn_evenly() {
        const DRAWS: u32 = 40_000;
        let mut fixture = Fixture::new(rand::random());
        let mut counts = std::collections::BTreeMap::<_, u32>::new();
        for _ in 0..DRAWS {
            *counts.entry(fixture.route().first_hop()).or_default() += 1;
        }
        let first_layer: Vec<_> = fixture.topology.mixes(1).map(|mix| mix.identity).collect();
        assert_eq!(counts.len(), MIXES_PER_LAYER);
        assert!(first_layer.iter().all(|mix| counts.contains_key(mix.as_bytes())));
        let expected = f64::from(DRAWS) / 4.0;
        let chi_square: f64 =
            counts.values().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
        // With 3 degrees of freedom an even draw exceeds 40 with probability 10^-8. A mix that is
        // drawn a tenth too often adds 100.
        assert!(chi_square < 40.0, "{chi_square}: {counts:?}");
    }

    #[test]
    fn there_is_no_route_to_a_gateway_that_is_none() {
        let mut fixture = Fixture::new(3);
        fixture.recipient.gateway = fixture.topology.mixes(1).next().unwrap().identity;
        let Fixture { topology, recipient, rng, .. } = &mut fixture;
        let route = random_route(topology, recipient, Duration::ZERO, IDENTIFIER, rng);
        assert_eq!(route.err(), Some(NoRoute::UnknownGateway));
    }

    #[test]
    fn quantiles_match_the_tables() {
        let mean = Duration::from_secs(1);
        // ln(1000) for one delay; chi-square tables (6 and 12 degrees of freedom, halved) for more.
        for (delays, expected) in [(1, 6.9078), (3, 11.2289), (6, 16.4547)] {
            let quantile = delay_quantile(mean, delays).as_secs_f64();
            assert!((quantile - expected).abs() < 0.001, "{delays}: {quantile}");
        }
        assert_eq!(delay_quantile(Duration::ZERO, 3), Duration::ZERO);
    }

    #[test]
    fn delays_have_the_chosen_mean() {
        let mut rng = rand::rng();
        let mean = Duration::from_millis(15);
        let n = 100_000;
        let total: Duration = (0..n).map(|_| exponential(mean, &mut rng)).sum();
        // The mean of 100,000 draws has a standard error of 0.3 %; 3 % is ten of them.
        let ratio = total.as_secs_f64() / f64::from(n) / mean.as_secs_f64();
        assert!((0.97..1.03).contains(&ratio), "{ratio}");
        assert_eq!(exponential(Duration::ZERO, &mut rng), Duration::ZERO);
    }
}
