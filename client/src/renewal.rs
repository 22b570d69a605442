//! When headers that were made ahead, and SURBs that were given away, have to be made anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mixsocks_common::keys::Identity;
use mixsocks_common::topology::{LAYERS, Node, Role, Topology, UnixTime};
use rand::{Rng, RngExt};

/// How often the clock is looked at, at least: it may have been set, or stood still with the machine.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Clients replace their SURBs within such a part of the overlap after the change of key epochs: long
/// enough that they do not all do it in one second, and short enough that clocks may differ.
const REPLACED_WITHIN: u32 = 4;

/// The longest such time, however long the overlap is.
const MAX_SPREAD: Duration = Duration::from_secs(3600);

/// What has to be made anew; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stale {
    /// Nothing.
    Nothing,
    /// What was made ahead: it is for other nodes or keys.
    MadeAhead,
    /// And SURBs that were given away, which still work for a while
    /// ([`replace_surbs`](crate::core::ClientCore::replace_surbs)).
    SurbsSoon,
    /// And SURBs that were given away, which may be dead
    /// ([`renew_surbs`](crate::core::ClientCore::renew_surbs)).
    Surbs,
}

/// Watches the document and the key epoch of a client that is reached through one gateway and sends
/// to recipients at others.
///
/// Packets are made for the new keys as soon as the clock is in their epoch, or as the document is.
/// SURBs that were given away are replaced at a random moment after that, while the nodes still take
/// the old keys. They are given up at once when that time may be over, or when a node on their routes
/// has left, is in another layer, or has another key than it told before.
///
/// Call [`Renewal::handle`] before packets are made, after each new document, and whenever
/// [`Renewal::poll_timeout`] has come.
#[derive(Debug)]
pub struct Renewal {
    topology: Arc<Topology>,
    own_gateway: Identity,
    peer_gateways: Vec<Identity>,
    /// Of the keys for which packets are made.
    key_epoch: u64,
    /// When SURBs of the key epoch before are replaced.
    replace_at: Option<Instant>,
    next_look: Instant,
}

impl Renewal {
    /// Nothing was made yet.
    pub fn new(
        topology: Arc<Topology>,
        own_gateway: Identity,
        peer_gateways: Vec<Identity>,
        now: Instant,
        wall: UnixTime,
    ) -> Self {
        let key_epoch = topology.key_epoch_used(wall);
        Self { topology, own_gateway, peer_gateways, key_epoch, replace_at: None, next_look: now }
    }

    /// When to look again.
    pub fn poll_timeout(&self) -> Instant {
        self.replace_at.map_or(self.next_look, |at| at.min(self.next_look))
    }

    /// What has to be made anew because of `topology`, the newest document, and the time.
    pub fn handle(
        &mut self,
        topology: &Arc<Topology>,
        now: Instant,
        wall: UnixTime,
        rng: &mut impl Rng,
    ) -> Stale {
        let by_document = self.follow_document(topology);
        let by_clock = self.follow_clock(now, wall, rng);
        let is_due = self.replace_at.is_some_and(|at| now >= at);
        let by_plan = if is_due { Stale::SurbsSoon } else { Stale::Nothing };
        let stale = by_document.max(by_clock).max(by_plan);
        if stale >= Stale::SurbsSoon {
            self.replace_at = None;
        }
        self.next_look = now + self.until_change(wall).min(LOOK_INTERVAL);
        stale
    }

    /// How long the key epoch lasts; up to a second more, as `wall` has whole seconds.
    fn until_change(&self, wall: UnixTime) -> Duration {
        let next = self.topology.parameters.epochs.key_epoch_start(self.key_epoch + 1);
        Duration::from_secs(next.0.saturating_sub(wall.0))
    }

    fn follow_clock(&mut self, now: Instant, wall: UnixTime, rng: &mut impl Rng) -> Stale {
        let key_epoch = self.topology.key_epoch_used(wall);
        let before = std::mem::replace(&mut self.key_epoch, key_epoch);
        if key_epoch == before {
            return Stale::Nothing;
        }
        let epochs = self.topology.parameters.epochs;
        let seconds_since = wall.0.saturating_sub(epochs.key_epoch_start(key_epoch).0);
        // Half of the overlap is left for other clocks.
        let is_in_time = seconds_since < epochs.overlap_seconds / 2;
        if key_epoch != before + 1 || !is_in_time || self.replace_at.is_some() {
            return Stale::Surbs;
        }
        let spread = Duration::from_secs(epochs.overlap_seconds) / REPLACED_WITHIN;
        self.replace_at = Some(now + spread.min(MAX_SPREAD).mul_f64(rng.random()));
        Stale::MadeAhead
    }

    fn follow_document(&mut self, new: &Arc<Topology>) -> Stale {
        if Arc::ptr_eq(&self.topology, new) {
            return Stale::Nothing;
        }
        let old = std::mem::replace(&mut self.topology, new.clone());
        if old.parameters.epochs != new.parameters.epochs {
            return Stale::Surbs;
        }
        let nodes: BTreeMap<_, _> = new.nodes().iter().map(|node| (node.identity, node)).collect();
        let goes_on = |node: &Node| {
            let same = nodes.get(&node.identity);
            same.is_some_and(|same| does_the_same(node, same) && keeps_keys(&old, node, new, same))
        };
        let gateway_goes_on = |identity| old.gateway(identity).is_none_or(goes_on);
        let mut mixes = (1..).take(LAYERS).flat_map(|layer| old.mixes(layer));
        if !mixes.all(goes_on) || !gateway_goes_on(&self.own_gateway) {
            Stale::Surbs
        } else if !self.peer_gateways.iter().all(gateway_goes_on) {
            Stale::MadeAhead
        } else {
            Stale::Nothing
        }
    }
}

fn does_the_same(old: &Node, new: &Node) -> bool {
    match (old.role, new.role) {
        (Role::Mix { layer: old }, Role::Mix { layer: new }) => old == new,
        (Role::Gateway { .. }, Role::Gateway { .. }) => true,
        _ => false,
    }
}

/// Whether the node has the same keys wherever both documents tell one for the same key epoch.
fn keeps_keys(old: &Topology, old_node: &Node, new: &Topology, new_node: &Node) -> bool {
    let keys = |topology: &Topology, node: &Node| {
        let first = topology.key_epoch();
        [(first, Some(node.sphinx_key)), (first + 1, node.next_sphinx_key)]
    };
    let new_keys = keys(new, new_node);
    keys(old, old_node).iter().all(|(epoch, key)| {
        let same = new_keys.iter().find(|(other, _)| other == epoch);
        same.is_none_or(|(_, other)| key.is_none() || other.is_none() || key == other)
    })
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::testing::{KEY_EPOCH_SECONDS, OVERLAP_SECONDS, TestNetwork};

    const SPREAD: Duration = Duration::from_secs(OVERLAP_SECONDS / 4);

    /// A client that started in the middle of key epoch 0.
    struct Fixture {
        network: TestNetwork,
        document: Arc<Topology>,
        renewal: Renewal,
        now: Instant,
        rng: StdRng,
    }

    impl Fixture {
        fn new() -> Self {
            let network = TestNetwork::new();
            let document = Arc::new(network.topology(0));
            let now = Instant::now();
            let [own, peer] = network.gateways();
            let wall = UnixTime(KEY_EPOCH_SECONDS / 2);
            let renewal = Renewal::new(document.clone(), own, vec![peer], now, wall);
            Self { network, document, renewal, now, rng: StdRng::seed_from_u64(1) }
        }

        fn look(&mut self, now: Instant, second: u64) -> Stale {
            self.renewal.handle(&self.document, now, UnixTime(second), &mut self.rng)
        }

        /// What the next document means, which is this network's.
        fn publish(&mut self, epoch: u8) -> Stale {
            self.document = Arc::new(self.network.topology(epoch));
            self.look(self.now, KEY_EPOCH_SECONDS / 2)
        }
    }

    #[test]
    fn surbs_are_replaced_in_the_first_quarter_of_the_overlap() {
        let mut moments = Vec::new();
        for seed in 0..50 {
            let mut fixture = Fixture { rng: StdRng::seed_from_u64(seed), ..Fixture::new() };
            let now = fixture.now;
            assert_eq!(fixture.look(now, KEY_EPOCH_SECONDS - 1), Stale::Nothing);
            assert_eq!(fixture.look(now, KEY_EPOCH_SECONDS), Stale::MadeAhead);
            let at = fixture.renewal.replace_at.unwrap();
            let before = at - Duration::from_nanos(1);
            assert_eq!(fixture.look(before, KEY_EPOCH_SECONDS), Stale::Nothing);
            assert!(fixture.renewal.poll_timeout() <= at);
            assert_eq!(fixture.look(at, KEY_EPOCH_SECONDS), Stale::SurbsSoon);
            assert_eq!(fixture.look(at, KEY_EPOCH_SECONDS), Stale::Nothing);
            moments.push(at - now);
        }
        assert!(moments.iter().all(|moment| *moment < SPREAD), "{moments:?}");
        let in_the_second_half = moments.iter().filter(|moment| **moment > SPREAD / 2).count();
        // All on one side has a chance of 2^-49.
        assert!((1..50).contains(&in_the_second_half), "{moments:?}");
    }

    #[test]
    fn whoever_slept_through_the_change_gives_its_surbs_up() {
        let late = KEY_EPOCH_SECONDS + OVERLAP_SECONDS / 2;
        for second in [late, KEY_EPOCH_SECONDS * 2 - 1, KEY_EPOCH_SECONDS * 2, u64::MAX / 4] {
            let mut fixture = Fixture::new();
            assert_eq!(fixture.look(fixture.now, second), Stale::Surbs, "{second}");
            assert_eq!(fixture.look(fixture.now, second), Stale::Nothing, "{second}");
        }
        let mut fixture = Fixture::new();
        assert_eq!(fixture.look(fixture.now, late - 1), Stale::MadeAhead);
    }

    #[test]
    fn a_clock_that_is_set_back_over_a_change_gives_surbs_up() {
        let mut fixture = Fixture::new();
        let now = fixture.now;
        assert_eq!(fixture.look(now, KEY_EPOCH_SECONDS), Stale::MadeAhead);
        assert_eq!(fixture.look(now, KEY_EPOCH_SECONDS - 1), Stale::Surbs);
        assert_eq!(fixture.look(now + SPREAD, KEY_EPOCH_SECONDS - 1), Stale::Nothing);
    }

    #[test]
    fn the_clock_is_looked_at_when_keys_change_and_each_minute() {
        let mut fixture = Fixture::new();
        let now = fixture.now;
        fixture.look(now, KEY_EPOCH_SECONDS - 7);
        assert_eq!(fixture.renewal.poll_timeout(), now + Duration::from_secs(7));
        fixture.look(now, KEY_EPOCH_SECONDS / 2);
        assert_eq!(fixture.renewal.poll_timeout(), now + LOOK_INTERVAL);
    }

    #[test]
    fn a_document_of_the_next_key_epoch_brings_it_about_before_the_clock() {
        let mut fixture = Fixture::new();
        fixture.document = Arc::new(fixture.network.topology(1));
        assert_eq!(fixture.look(fixture.now, KEY_EPOCH_SECONDS - 5), Stale::MadeAhead);
        let later = fixture.now + SPREAD;
        assert_eq!(fixture.look(later, KEY_EPOCH_SECONDS), Stale::SurbsSoon);
    }

    #[test]
    fn a_document_that_changes_nothing_renews_nothing() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.publish(0), Stale::Nothing);
        // Nor one in which somebody joins, or a node has moved to another address.
        fixture.network.add_mix(2);
        assert_eq!(fixture.publish(0), Stale::Nothing);
        fixture.network.move_to_port(0, 9999);
        fixture.network.parameters.mean_delay *= 2;
        assert_eq!(fixture.publish(0), Stale::Nothing);
        // The key epoch's own keys are announced before.
        assert_eq!(fixture.look(fixture.now, KEY_EPOCH_SECONDS), Stale::MadeAhead);
        fixture.document = Arc::new(fixture.network.topology(1));
        assert_eq!(fixture.look(fixture.now, KEY_EPOCH_SECONDS), Stale::Nothing);
    }

    #[test]
    fn surbs_are_given_up_when_a_node_leaves_or_changes_layer_or_key() {
        let changes: [fn(&mut TestNetwork); 4] = [
            |network| network.remove_mix(1),
            |network| network.move_mix(1, 2),
            |network| network.change_key(TestNetwork::FIRST_MIX),
            |network| network.change_key(TestNetwork::OWN_GATEWAY),
        ];
        for (number, change) in changes.iter().enumerate() {
            let mut fixture = Fixture::new();
            change(&mut fixture.network);
            assert_eq!(fixture.publish(0), Stale::Surbs, "change {number}");
            assert_eq!(fixture.publish(0), Stale::Nothing, "change {number}");
        }
    }

    /// SURBs do not lead through it.
    #[test]
    fn another_key_of_the_peers_gateway_outdates_headers_alone() {
        let mut fixture = Fixture::new();
        fixture.network.change_key(TestNetwork::PEER_GATEWAY);
        assert_eq!(fixture.publish(0), Stale::MadeAhead);
    }
}
