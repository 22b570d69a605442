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
    use super::*;

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
