//! The network's documents, as an endpoint that runs takes them over.

use std::sync::Arc;

use mixsocks_common::topology::Topology;
use tokio::sync::watch;

/// The newest document that fits what the endpoint started with.
#[derive(Debug, Clone)]
pub(crate) struct Documents {
    newest: watch::Receiver<Arc<Topology>>,
    used: Arc<Topology>,
}

/// Why a document is not used by an endpoint that runs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unusable {
    #[error("it is of network {theirs:?}, but this program started in {ours:?}")]
    OtherNetwork { theirs: String, ours: String },
    #[error("its packets hold {theirs} bytes, but this program started with {ours}")]
    OtherPackets { theirs: usize, ours: usize },
}

impl Documents {
    /// Starts with the document that `newest` has now.
    pub(crate) fn new(mut newest: watch::Receiver<Arc<Topology>>) -> Self {
        let used = newest.borrow_and_update().clone();
        Self { newest, used }
    }

    /// The document to use, after the last [`Documents::refresh`].
    pub(crate) fn used(&self) -> &Arc<Topology> {
        &self.used
    }

    /// Takes over the newest document; says so when it is another one than before.
    ///
    /// # Errors
    /// [`Unusable`], once for each document that is not taken over.
    pub(crate) fn refresh(&mut self) -> Result<bool, Unusable> {
        // A sender that is gone leaves the last document.
        if !self.newest.has_changed().unwrap_or(false) {
            return Ok(false);
        }
        let newest = self.newest.borrow_and_update().clone();
        check(&self.used, &newest)?;
        Ok(!Arc::ptr_eq(&std::mem::replace(&mut self.used, newest.clone()), &newest))
    }

    /// Waits for a document that no [`Documents::refresh`] has looked at; for ever when there will be
    /// none. Can be cancelled without loss.
    pub(crate) async fn changed(&mut self) {
        if self.newest.changed().await.is_err() {
            return std::future::pending().await;
        }
        // It is still to be looked at.
        self.newest.mark_changed();
    }
}

fn check(used: &Topology, newest: &Topology) -> Result<(), Unusable> {
    if newest.network != used.network {
        return Err(Unusable::OtherNetwork {
            theirs: newest.network.as_str().to_owned(),
            ours: used.network.as_str().to_owned(),
        });
    }
    let [theirs, ours] = [newest, used].map(|topology| topology.parameters.payload_bytes);
    if theirs != ours {
        return Err(Unusable::OtherPackets { theirs, ours });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestNetwork, within};

    fn document(network: &str, payload_bytes: usize) -> Arc<Topology> {
        let name = network.to_owned();
        let mut network = TestNetwork::new();
        network.name = name;
        network.parameters.payload_bytes = payload_bytes;
        Arc::new(network.topology(1))
    }

    #[test]
    fn a_document_is_taken_over_once() {
        let (sender, receiver) = watch::channel(document("test", 2048));
        let mut documents = Documents::new(receiver);
        assert_eq!(documents.refresh(), Ok(false));
        let next = document("test", 2048);
        sender.send_replace(next.clone());
        assert_eq!(documents.refresh(), Ok(true));
        assert!(Arc::ptr_eq(documents.used(), &next));
        sender.send_replace(next);
        assert_eq!(documents.refresh(), Ok(false), "the same one");
        drop(sender);
        assert_eq!(documents.refresh(), Ok(false));
    }

    #[test]
    fn a_document_of_another_network_or_other_packets_is_refused_once() {
        let first = document("test", 2048);
        let (sender, receiver) = watch::channel(first.clone());
        let mut documents = Documents::new(receiver);
        for other in [document("other", 2048), document("test", 4096)] {
            sender.send_replace(other);
            let refused = documents.refresh();
            assert!(refused.is_err(), "{refused:?}");
            assert_eq!(documents.refresh(), Ok(false));
            assert!(Arc::ptr_eq(documents.used(), &first));
        }
    }

    #[tokio::test]
    async fn what_was_waited_for_is_still_there() {
        let (sender, receiver) = watch::channel(document("test", 2048));
        let mut documents = Documents::new(receiver);
        let mut other = documents.clone();
        sender.send_replace(document("test", 2048));
        within(documents.changed()).await;
        assert_eq!(documents.refresh(), Ok(true));
        assert_eq!(other.refresh(), Ok(true), "everybody has a look of their own");
    }
}
