//! Where a packet goes: hops, what each of them is told, and what the last one is given.

use std::fmt;
use std::time::Duration;

use sphinx_packet::header::delays::Delay;
use sphinx_packet::route::{Destination, DestinationAddressBytes, Node, NodeAddressBytes};
use thiserror::Error;

use crate::{HOP_ADDRESS_LEN, IDENTIFIER_LEN, MAX_HOPS, PublicKey};

/// How a hop is named in routing information: 32 bytes without a meaning here.
pub type HopAddress = [u8; HOP_ADDRESS_LEN];

/// What the last hop is given along with the destination; names a SURB to its creator.
pub type Identifier = [u8; IDENTIFIER_LEN];

/// One hop of a [`Route`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// What the hop before this one is told to send to.
    pub address: HopAddress,
    /// The hop's public key.
    pub key: PublicKey,
    /// How long the hop holds the packet before it passes it on; nanoseconds on the wire. That of
    /// the last hop, which passes nothing on, is neither sent nor counted.
    pub delay: Duration,
}

/// A checked route of 1 to [`MAX_HOPS`] hops with a destination and an identifier for the last one.
#[derive(Clone)]
pub struct Route {
    nodes: Vec<Node>,
    delays: Vec<Delay>,
    destination: Destination,
}

/// Why hops are no [`Route`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RouteError {
    /// There is no hop.
    #[error("a route needs at least one hop")]
    Empty,
    /// There are more than [`MAX_HOPS`] hops.
    #[error("a route of {hops} hops is longer than {MAX_HOPS}")]
    TooManyHops {
        /// The number of hops.
        hops: usize,
    },
    /// A delay in nanoseconds does not fit 64 bits (about 584 years).
    #[error("the delay of hop {hop} does not fit 64 bits of nanoseconds")]
    DelayTooLong {
        /// The index of the hop, from 0.
        hop: usize,
    },
}

impl Route {
    /// Checks `hops`; the last of them will be given `destination` and `identifier`.
    ///
    /// # Errors
    ///
    /// See [`RouteError`].
    pub fn new(
        hops: &[Hop],
        destination: HopAddress,
        identifier: Identifier,
    ) -> Result<Self, RouteError> {
        if hops.is_empty() {
            return Err(RouteError::Empty);
        }
        if hops.len() > MAX_HOPS {
            return Err(RouteError::TooManyHops { hops: hops.len() });
        }
        let nodes = hops.iter().map(node).collect();
        let delays = hops
            .iter()
            .enumerate()
            .map(|(hop, Hop { delay, .. })| {
                u64::try_from(delay.as_nanos())
                    .map(Delay::new_from_nanos)
                    .map_err(|_| RouteError::DelayTooLong { hop })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            nodes,
            delays,
            destination: Destination::new(
                DestinationAddressBytes::from_bytes(destination),
                identifier,
            ),
        })
    }

    /// The address of the hop that the packet is to be sent to.
    #[must_use]
    pub fn first_hop(&self) -> HopAddress {
        self.nodes[0].address.to_bytes()
    }

    /// The sum of the delays of all hops but the last, which holds no packet.
    #[must_use]
    pub fn total_delay(&self) -> Duration {
        let (_, forwarding) = self.delays.split_last().expect("a route has a hop");
        forwarding.iter().map(Delay::to_duration).sum()
    }

    /// The addresses of the hops in their order, each with the time that it holds the packet.
    pub fn hops(&self) -> impl ExactSizeIterator<Item = (HopAddress, Duration)> {
        let delays = self.delays.iter().map(Delay::to_duration);
        self.nodes.iter().map(|node| node.address.to_bytes()).zip(delays)
    }

    /// What the last hop is given along with the destination.
    #[must_use]
    pub fn identifier(&self) -> Identifier {
        self.destination.identifier
    }

    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub(crate) fn delays(&self) -> &[Delay] {
        &self.delays
    }

    pub(crate) fn destination(&self) -> &Destination {
        &self.destination
    }
}

/// Shows the number of hops only: a route in a log would undo the mixing.
impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("hops", &self.nodes.len()).finish_non_exhaustive()
    }
}

fn node(hop: &Hop) -> Node {
    Node::new(
        NodeAddressBytes::from_bytes(hop.address),
        x25519_dalek::PublicKey::from(*hop.key.as_bytes()),
    )
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::SecretKey;

    fn hops(delays: &[Duration]) -> Vec<Hop> {
        let key = SecretKey::from_bytes([7; 32]).public_key();
        let hop = |delay| Hop { address: [0xcd; 32], key, delay };
        delays.iter().copied().map(hop).collect()
    }

    fn route(delays: &[Duration]) -> Result<Route, RouteError> {
        Route::new(&hops(delays), [0xcd; 32], [0xcd; 16])
    }

    #[test]
    fn a_route_has_one_to_five_hops() {
        assert_eq!(route(&[]).err(), Some(RouteError::Empty));
        for hops in 1..=MAX_HOPS {
            assert!(route(&vec![Duration::ZERO; hops]).is_ok());
        }
        assert_eq!(route(&[Duration::ZERO; 6]).err(), Some(RouteError::TooManyHops { hops: 6 }));
    }

    #[test]
    fn a_delay_has_64_bits_of_nanoseconds() {
        let longest = Duration::from_nanos(u64::MAX);
        assert!(route(&[longest]).is_ok());
        assert_eq!(
            route(&[longest, longest + Duration::from_nanos(1)]).err(),
            Some(RouteError::DelayTooLong { hop: 1 })
        );
    }

    #[test]
    fn the_last_hop_holds_nothing() {
        let ms = Duration::from_millis;
        assert_eq!(route(&[ms(1), ms(20), ms(300)]).unwrap().total_delay(), ms(21));
        assert_eq!(route(&[ms(1)]).unwrap().total_delay(), Duration::ZERO);
        let longest = Duration::from_nanos(u64::MAX);
        assert_eq!(route(&[longest; 5]).unwrap().total_delay(), longest * 4);
    }

    #[test]
    fn a_route_shows_its_length_only() {
        let route = route(&[Duration::from_secs(205); 3]).unwrap();
        assert_eq!(format!("{route:?}"), "Route { hops: 3, .. }");
    }
}
