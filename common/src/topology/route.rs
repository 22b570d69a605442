//! Routes: one mix of each layer, drawn evenly for each packet, with exponential delays.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mixsocks_sphinx::{Hop, HopAddress, Identifier, Route};
use rand::seq::IteratorRandom;
use rand::{Rng, RngExt};

use super::{LAYERS, Node, Topology, UnixTime};
use crate::address::Address;
use crate::keys::{EncryptionKey, Identity};

/// There is no way to the recipient.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// The document is not in force any more: nobody knows whether its nodes are still trusted.
    #[error(
        "the topology expired {seconds_ago} s ago: fetch a newer one, or set this machine's clock"
    )]
    Expired {
        /// How long ago.
        seconds_ago: u64,
    },
    /// The recipient's gateway is not in the topology.
    #[error(
        "the gateway {0} is not in the topology: it has left the network, or the address that names it belongs to another one"
    )]
    UnknownGateway(Identity),
    /// The recipient's gateway has told no key for this time.
    #[error(
        "the topology has no key of the gateway {0} for this time: fetch a newer one, or set this machine's clock"
    )]
    GatewayWithoutKey(Identity),
    /// No mix of a layer has told a key for this time.
    #[error(
        "the topology has no key of any mix in layer {0} for this time: fetch a newer one, or set this machine's clock"
    )]
    LayerWithoutKeys(u8),
}

/// Whether there are routes to clients of `gateway` at `now`.
///
/// # Errors
/// [`NoRoute`] says why there are none.
pub fn check_route(topology: &Topology, gateway: &Identity, now: UnixTime) -> Result<(), NoRoute> {
    gateway_with_key(topology, gateway, now)?;
    let lacks_keys = |layer: &u8| mixes_with_keys(topology, *layer, now).next().is_none();
    match (1..).take(LAYERS).find(lacks_keys) {
        Some(layer) => Err(NoRoute::LayerWithoutKeys(layer)),
        None => Ok(()),
    }
}

/// Which mixes routes lead through, if not through any.
#[derive(Debug, Clone, Default)]
pub struct RouteChoice {
    /// Mixes that are left out while their layer has others.
    pub avoided: Arc<BTreeSet<HopAddress>>,
    /// A mix that takes its layer, avoided or not.
    pub through: Option<HopAddress>,
}

impl RouteChoice {
    fn draw<'a, M: Iterator<Item = (&'a Node, EncryptionKey)>>(
        &self,
        mixes: impl Fn() -> M,
        rng: &mut impl Rng,
    ) -> Option<(&'a Node, EncryptionKey)> {
        let id = |mix: &Node| *mix.identity.as_bytes();
        if let Some(through) = self.through
            && let Some(mix) = mixes().find(|(mix, _)| id(mix) == through)
        {
            return Some(mix);
        }
        let good = mixes().filter(|(mix, _)| !self.avoided.contains(&id(mix)));
        good.choose(rng).or_else(|| mixes().choose(rng))
    }
}

/// Draws a route to `recipient`: a mix of each layer, its gateway, itself.
///
/// Mixes are drawn evenly from those that `choice` leaves. Each mix holds the packet for an exponentially distributed time of mean `mean_delay`, cut at the
/// network's maximum; the gateway and the recipient do not delay. Choices are independent of each
/// other and of earlier routes. Each node's key is that of the key epoch at `now`; mixes that have
/// told none for it are left out.
///
/// # Errors
/// [`NoRoute`], as [`check_route`] tells it.
pub fn random_route(
    topology: &Topology,
    recipient: &Address,
    now: UnixTime,
    mean_delay: Duration,
    identifier: Identifier,
    choice: &RouteChoice,
    rng: &mut impl Rng,
) -> Result<Route, NoRoute> {
    let mut hops = hops_to_gateway(topology, &recipient.gateway, now, mean_delay, choice, rng)?;
    hops.push(Hop {
        address: *recipient.identity.as_bytes(),
        key: recipient.encryption.public_key(),
        delay: Duration::ZERO,
    });
    let destination = *recipient.identity.as_bytes();
    Ok(Route::new(&hops, destination, identifier)
        .expect("five hops and delays of at most a minute"))
}

/// Draws a route of a message for `recipient` as [`random_route`] does, but one that ends at its gateway,
/// which keeps the message.
///
/// # Errors
/// [`NoRoute`], as [`check_route`] tells it.
pub fn random_message_route(
    topology: &Topology,
    recipient: &Address,
    now: UnixTime,
    mean_delay: Duration,
    choice: &RouteChoice,
    rng: &mut impl Rng,
) -> Result<Route, NoRoute> {
    let hops = hops_to_gateway(topology, &recipient.gateway, now, mean_delay, choice, rng)?;
    let destination = *recipient.identity.as_bytes();
    Ok(Route::new(&hops, destination, Identifier::default())
        .expect("four hops and delays of at most a minute"))
}

fn hops_to_gateway(
    topology: &Topology,
    gateway: &Identity,
    now: UnixTime,
    mean_delay: Duration,
    choice: &RouteChoice,
    rng: &mut impl Rng,
) -> Result<Vec<Hop>, NoRoute> {
    let (gateway, gateway_key) = gateway_with_key(topology, gateway, now)?;
    let mut hops = Vec::with_capacity(LAYERS + 2);
    for layer in (1..).take(LAYERS) {
        let (mix, key) = choice
            .draw(|| mixes_with_keys(topology, layer, now), rng)
            .ok_or(NoRoute::LayerWithoutKeys(layer))?;
        let delay = exponential(mean_delay, rng).min(topology.parameters.max_delay);
        hops.push(hop(mix, key, delay));
    }
    hops.push(hop(gateway, gateway_key, Duration::ZERO));
    Ok(hops)
}

/// The gateway and its key at `now`, in a document that is in force.
fn gateway_with_key<'a>(
    topology: &'a Topology,
    gateway: &Identity,
    now: UnixTime,
) -> Result<(&'a Node, EncryptionKey), NoRoute> {
    if now >= topology.valid_until {
        return Err(NoRoute::Expired { seconds_ago: now.0 - topology.valid_until.0 });
    }
    let node = topology.gateway(gateway).ok_or(NoRoute::UnknownGateway(*gateway))?;
    let key = topology.sphinx_key(node, now).ok_or(NoRoute::GatewayWithoutKey(*gateway))?;
    Ok((node, key))
}

/// The mixes of a layer that have told a key for `now`, and that key.
fn mixes_with_keys(
    topology: &Topology,
    layer: u8,
    now: UnixTime,
) -> impl Iterator<Item = (&Node, EncryptionKey)> {
    topology.mixes(layer).filter_map(move |mix| Some((mix, topology.sphinx_key(mix, now)?)))
}

fn hop(node: &Node, key: EncryptionKey, delay: Duration) -> Hop {
    Hop { address: *node.identity.as_bytes(), key: key.public_key(), delay }
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

    use super::super::{Epochs, NetworkName, Parameters, Role};
    use super::*;
    use crate::keys::IdentityKey;

    const MIXES_PER_LAYER: usize = 4;
    const PAYLOAD_BYTES: usize = 1024;
    const MAX_DELAY: Duration = Duration::from_millis(20);
    const IDENTIFIER: Identifier = [7; 16];
    const NOW: UnixTime = UnixTime(0);

    /// A network, and a recipient at its first gateway, with the keys of all.
    struct Fixture {
        topology: Topology,
        recipient: Address,
        keys: Vec<(Identity, SecretKey)>,
        choice: RouteChoice,
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
            Self { topology, recipient, keys, choice: RouteChoice::default(), rng }
        }

        fn route(&mut self) -> Route {
            let mean = self.topology.parameters.mean_delay;
            let (topology, recipient) = (&self.topology, &self.recipient);
            random_route(topology, recipient, NOW, mean, IDENTIFIER, &self.choice, &mut self.rng)
                .unwrap()
        }

        fn route_at(&mut self, now: UnixTime) -> Result<Route, NoRoute> {
            let Self { topology, recipient, choice, rng, .. } = self;
            let no_delay = Duration::ZERO;
            let route = random_route(topology, recipient, now, no_delay, IDENTIFIER, choice, rng);
            let checked = check_route(topology, &recipient.gateway, now);
            assert_eq!(checked.err().as_ref(), route.as_ref().err());
            route
        }

        fn no_route(&mut self, now: UnixTime) -> NoRoute {
            self.route_at(now).err().unwrap()
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
    fn what_is_avoided_is_drawn_only_where_there_is_nothing_else() {
        let mut fixture = Fixture::new(9);
        let layer = |fixture: &Fixture, layer| -> Vec<HopAddress> {
            fixture.topology.mixes(layer).map(|mix| *mix.identity.as_bytes()).collect()
        };
        let (first, second) = (layer(&fixture, 1), layer(&fixture, 2));
        let avoided: BTreeSet<_> = first[..2].iter().chain(&second).copied().collect();
        fixture.choice.avoided = Arc::new(avoided);
        let mut drawn = BTreeSet::new();
        for _ in 0..200 {
            let route = fixture.route();
            drawn.extend(route.hops().map(|(address, _)| address).take(2));
        }
        // All of them, but for a chance of 10^-24.
        assert_eq!(drawn, first[2..].iter().chain(&second).copied().collect());
        fixture.choice.through = Some(first[1]);
        assert!((0..20).all(|_| fixture.route().first_hop() == first[1]), "asked for by name");
        fixture.choice.through = Some([9; 32]);
        assert!((0..20).all(|_| fixture.route().first_hop() != first[1]), "no such mix");
    }

    #[test]
    fn there_is_no_route_to_a_gateway_that_is_none() {
        let mut fixture = Fixture::new(3);
        let mix = fixture.topology.mixes(1).next().unwrap().identity;
        fixture.recipient.gateway = mix;
        assert_eq!(fixture.no_route(NOW), NoRoute::UnknownGateway(mix));
    }

    #[test]
    fn an_expired_topology_has_no_routes() {
        let mut fixture = Fixture::new(4);
        fixture.topology.valid_until = UnixTime(100);
        fixture.route_at(UnixTime(99)).unwrap();
        assert_eq!(fixture.no_route(UnixTime(100)), NoRoute::Expired { seconds_ago: 0 });
        assert_eq!(fixture.no_route(UnixTime(107)), NoRoute::Expired { seconds_ago: 7 });
    }

    /// Key epoch 0 is over after 100 s, key epoch 1 after 200 s.
    fn rotating(seed: u64) -> Fixture {
        let mut fixture = Fixture::new(seed);
        fixture.topology.parameters.epochs =
            Epochs { epoch_seconds: 10, key_epochs: 10, overlap_seconds: 20 };
        fixture.topology.valid_until = UnixTime(1000);
        for node in &mut fixture.topology.nodes {
            node.next_sphinx_key = Some(SecretKey::generate(&mut fixture.rng).public_key().into());
        }
        fixture
    }

    #[test]
    fn packets_are_made_for_the_keys_of_their_time() {
        let mut fixture = rotating(5);
        let opens = |fixture: &Fixture, route: &Route, rng: &mut StdRng| {
            let request = (route.clone(), &b"contents"[..]);
            let packet = build_packets(rng, PAYLOAD_BYTES, &[request]).remove(0).unwrap();
            let is_first =
                |(identity, _): &&(Identity, SecretKey)| *identity.as_bytes() == route.first_hop();
            let (_, key) = fixture.keys.iter().find(is_first).unwrap();
            open_headers(key, vec![packet]).remove(0).is_ok()
        };
        let mut rng = StdRng::seed_from_u64(6);
        let [before, after] = [99, 100].map(|second| fixture.route_at(UnixTime(second)).unwrap());
        assert!(opens(&fixture, &before, &mut rng));
        assert!(!opens(&fixture, &after, &mut rng), "that is for the next key");
    }

    #[test]
    fn mixes_without_a_key_for_the_time_are_left_out() {
        let mut fixture = rotating(7);
        let silent = fixture.topology.mixes(1).next().unwrap().identity;
        let node = |fixture: &mut Fixture, identity: Identity| {
            let nodes = &mut fixture.topology.nodes;
            let at = nodes.iter().position(|node| node.identity == identity).unwrap();
            nodes[at].next_sphinx_key = None;
        };
        node(&mut fixture, silent);
        let first_hops = |fixture: &mut Fixture, second| -> Vec<_> {
            let mut hop = || fixture.route_at(UnixTime(second)).unwrap().first_hop();
            (0..200).map(|_| hop()).collect()
        };
        // Each mix is drawn in 200 routes, but for a chance of 10^-25.
        assert!(first_hops(&mut fixture, 99).contains(silent.as_bytes()));
        assert!(!first_hops(&mut fixture, 100).contains(silent.as_bytes()));
        let others: Vec<_> = fixture.topology.mixes(1).map(|mix| mix.identity).collect();
        others.into_iter().for_each(|mix| node(&mut fixture, mix));
        assert_eq!(fixture.no_route(UnixTime(100)), NoRoute::LayerWithoutKeys(1));
        let gateway = fixture.recipient.gateway;
        node(&mut fixture, gateway);
        assert_eq!(fixture.no_route(UnixTime(100)), NoRoute::GatewayWithoutKey(gateway));
        fixture.route_at(UnixTime(99)).unwrap();
    }

    #[test]
    fn a_document_of_two_key_epochs_before_has_no_keys() {
        let mut fixture = rotating(8);
        let gateway = fixture.recipient.gateway;
        fixture.route_at(UnixTime(199)).unwrap();
        assert_eq!(fixture.no_route(UnixTime(200)), NoRoute::GatewayWithoutKey(gateway));
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
