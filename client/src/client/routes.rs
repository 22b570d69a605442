//! Whether a client has somewhere to send to.

use std::sync::Arc;

use mixsocks_common::keys::Identity;
use mixsocks_common::topology::{NoRoute, Topology, UnixTime, check_route};

/// Whether there are routes to this client and to each provider, by a document and at a time.
pub(super) struct Routes {
    checked: Option<(Arc<Topology>, UnixTime)>,
    /// To this client and to a provider at least.
    result: Result<(), NoRoute>,
}

impl Default for Routes {
    /// Nobody has looked yet.
    fn default() -> Self {
        Self { checked: None, result: Ok(()) }
    }
}

impl Routes {
    /// Looks anew if the document or the second is another one: there must be routes to `own`, and to
    /// one of `peers`, and `tell` is told which of these. Of a change the user is told.
    pub(super) fn check<'a>(
        &mut self,
        topology: &Arc<Topology>,
        own: &Identity,
        peers: impl Iterator<Item = &'a Identity>,
        now: UnixTime,
        mut tell: impl FnMut(usize, bool),
    ) -> Result<(), NoRoute> {
        let is_known = |(checked, at): &(Arc<Topology>, UnixTime)| {
            Arc::ptr_eq(checked, topology) && *at == now
        };
        if !self.checked.as_ref().is_some_and(is_known) {
            self.checked = Some((topology.clone(), now));
            let mut to_peers = Vec::new();
            for (number, peer) in peers.enumerate() {
                let to_peer = check_route(topology, peer, now);
                tell(number, to_peer.is_ok());
                to_peers.push(to_peer);
            }
            // What is wrong with the first one is told.
            let to_any = match to_peers.iter().any(Result::is_ok) {
                true => Ok(()),
                false => to_peers.into_iter().next().unwrap_or(Ok(())),
            };
            let result = check_route(topology, own, now).and(to_any);
            match (&self.result, &result) {
                (Ok(()), Err(error)) => tracing::warn!("nothing can be sent: {error}"),
                (Err(_), Ok(())) => tracing::info!("packets can be sent again"),
                _ => {}
            }
            self.result = result;
        }
        self.result.clone()
    }
}

#[cfg(test)]
mod tests {
    use mixsocks_common::session::OpenOutcome;

    use super::*;
    use crate::stream::OpenError;
    use crate::testing::{KEY_EPOCH_SECONDS, TestNetwork};

    #[test]
    fn nothing_is_sent_by_an_expired_document_until_there_is_another() {
        let network = TestNetwork::new();
        let [own, peer] = network.gateways();
        let [old, new] = [0, 1].map(|epoch| Arc::new(network.topology(epoch)));
        let mut routes = Routes::default();
        let end = 2 * KEY_EPOCH_SECONDS;
        let mut check = |topology, second| {
            let peers = std::iter::once(&peer);
            routes.check(topology, &own, peers, UnixTime(second), |_, _| {})
        };
        assert_eq!(check(&old, end - 1), Ok(()));
        let expired = NoRoute::Expired { seconds_ago: 0 };
        assert_eq!(check(&old, end), Err(expired.clone()));
        assert_eq!(check(&new, end), Ok(()), "in the same second");
        // Who opens a stream is told.
        let error = OpenError::from(expired);
        assert_eq!(error.outcome(), OpenOutcome::NetworkUnreachable);
        assert!(error.to_string().contains("the topology expired 0 s ago"), "{error}");
    }

    #[test]
    fn there_must_be_routes_to_this_client_and_to_a_provider() {
        let network = TestNetwork::new();
        let stranger = TestNetwork::new().gateways()[0];
        let [own, peer] = network.gateways();
        let topology = Arc::new(network.topology(0));
        let unknown = Err(NoRoute::UnknownGateway(stranger));
        for (own, peers, expected, reachable) in [
            (&own, vec![&stranger], unknown.clone(), vec![false]),
            (&stranger, vec![&peer], unknown.clone(), vec![true]),
            (&own, vec![&stranger, &peer], Ok(()), vec![false, true]),
        ] {
            let mut routes = Routes::default();
            let mut told = Vec::new();
            let tell = |number, is_reachable| {
                assert_eq!(number, told.len());
                told.push(is_reachable);
            };
            let result = routes.check(&topology, own, peers.into_iter(), UnixTime(0), tell);
            assert_eq!((result, told), (expected, reachable));
        }
    }
}
