//! Which next hops a node may send to.

use mixsocks_common::keys::Identity;
use mixsocks_common::topology::{Node, Topology};

use crate::counters::DropReason;

/// All nodes of a topology as seen from one of them. A look-up is a binary search: what strangers
/// write into packets costs no key parsing and no walk over the topology.
#[derive(Clone, Debug)]
pub struct NextHops {
    /// Sorted by identity; whether the node may be sent to.
    nodes: Vec<(Identity, bool)>,
}

impl NextHops {
    /// The next hops of node `me`; none if the topology does not have it.
    pub fn new(topology: &Topology, me: &Identity) -> Self {
        let me = topology.node(me).map(|node| node.role);
        let reachable = |to: &Node| me.is_some_and(|me| me.may_forward_to(to.role));
        let mut nodes: Vec<_> =
            topology.nodes().iter().map(|node| (node.identity, reachable(node))).collect();
        nodes.sort_unstable();
        Self { nodes }
    }

    /// The node that 32 bytes of a packet or frame name.
    ///
    /// # Errors
    /// [`DropReason::UnknownNextHop`] when no node has this identity (it may be a client),
    /// [`DropReason::WrongLayer`] when it is a node that this one must not send to.
    pub fn resolve(&self, next_hop: &[u8; 32]) -> Result<Identity, DropReason> {
        match self.nodes.binary_search_by(|(node, _)| node.as_bytes().cmp(next_hop)) {
            Ok(at) if self.nodes[at].1 => Ok(self.nodes[at].0),
            Ok(_) => Err(DropReason::WrongLayer),
            Err(_) => Err(DropReason::UnknownNextHop),
        }
    }

    /// The nodes that may be sent to, sorted by identity.
    pub fn reachable(&self) -> impl Iterator<Item = &Identity> {
        self.nodes.iter().filter(|(_, reachable)| *reachable).map(|(node, _)| node)
    }
}
