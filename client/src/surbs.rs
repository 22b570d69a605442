//! SURBs of a client: made ahead of need, and remembered until their reply comes.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use mixsocks_common::session::{SessionId, SurbSource};
use mixsocks_sphinx::{Identifier, ReplyRecovery, Surb, build_surbs};
use rand::RngExt;

use crate::endpoint::Endpoint;

/// SURBs that are kept ready at most: some packets' worth.
const MAX_READY: usize = 64;

/// A SURB that waited so long is thrown away: its route may be outdated.
const MAX_READY_AGE: Duration = Duration::from_secs(1);

/// Replies that are awaited at most; the oldest are given up first. Eight times the largest window.
const MAX_AWAITED: usize = 32 * 1024;

/// A SURB that nobody has been given yet.
pub(crate) struct ReadySurb {
    surb: Surb,
    recovery: ReplyRecovery,
    delay: Duration,
    made: Instant,
}

/// Makes `count` SURBs; takes about half a millisecond of CPU for each.
pub(crate) fn make(endpoint: &Endpoint, count: usize) -> Vec<ReadySurb> {
    let mut rng = rand::rng();
    let mut routes = Vec::with_capacity(count);
    while routes.len() < count {
        let identifier: Identifier = rng.random();
        // Zero means "not a reply".
        if identifier == Identifier::default() {
            continue;
        }
        match endpoint.route_home(identifier) {
            Ok(route) => routes.push(route),
            Err(_) => return Vec::new(),
        }
    }
    let made = Instant::now();
    build_surbs(&mut rng, &routes)
        .into_iter()
        .zip(&routes)
        .filter_map(|(built, route)| {
            let (surb, recovery) = built.ok()?;
            Some(ReadySurb { surb, recovery, delay: route.total_delay(), made })
        })
        .collect()
}

/// A reply that is awaited.
pub(crate) struct Awaited {
    pub(crate) recovery: ReplyRecovery,
    pub(crate) session: SessionId,
    pub(crate) delay: Duration,
}

/// All SURBs of a client.
#[derive(Default)]
pub(crate) struct SurbStore {
    ready: VecDeque<ReadySurb>,
    /// SURBs that workers are making now.
    in_making: usize,
    awaited: HashMap<Identifier, Awaited>,
    order: VecDeque<Identifier>,
}

impl SurbStore {
    /// How many more a worker should make, at most `max`, given that `demand` are wanted.
    pub(crate) fn claim(&mut self, demand: usize, max: usize) -> usize {
        let wanted = demand.min(MAX_READY).saturating_sub(self.ready.len() + self.in_making);
        let claimed = wanted.min(max);
        self.in_making += claimed;
        claimed
    }

    /// Takes in what a worker made of what it claimed.
    pub(crate) fn deliver(&mut self, claimed: usize, made: Vec<ReadySurb>) {
        self.in_making -= claimed;
        self.ready.extend(made);
    }

    /// SURBs at hand, of which outdated ones are thrown away.
    pub(crate) fn ready(&mut self, now: Instant) -> usize {
        while self.ready.front().is_some_and(|surb| surb.made + MAX_READY_AGE <= now) {
            self.ready.pop_front();
        }
        self.ready.len()
    }

    /// The SURBs at hand, for packets of `session`.
    pub(crate) fn source(&mut self, session: SessionId) -> Source<'_> {
        Source { store: self, session }
    }

    /// The reply with this identifier has come: it is awaited no longer.
    pub(crate) fn take(&mut self, identifier: &Identifier) -> Option<Awaited> {
        self.awaited.remove(identifier)
    }

    /// Replies of a session that has ended are not awaited.
    pub(crate) fn forget_session(&mut self, session: SessionId) {
        self.awaited.retain(|_, awaited| awaited.session != session);
    }

    fn remember(&mut self, identifier: Identifier, awaited: Awaited) {
        self.awaited.insert(identifier, awaited);
        self.order.push_back(identifier);
        // Identifiers of replies that came stay in the order until they reach its front.
        while self.awaited.len() > MAX_AWAITED || self.order.len() > 2 * MAX_AWAITED {
            let Some(oldest) = self.order.pop_front() else { break };
            self.awaited.remove(&oldest);
        }
    }
}

/// Hands the ready SURBs to one session.
pub(crate) struct Source<'a> {
    store: &'a mut SurbStore,
    session: SessionId,
}

impl SurbSource for Source<'_> {
    fn available(&self) -> usize {
        self.store.ready.len()
    }

    fn write_surb(&mut self, out: &mut Vec<u8>) {
        if let Some(ReadySurb { surb, recovery, delay, .. }) = self.store.ready.pop_front() {
            out.extend_from_slice(surb.as_bytes());
            let awaited = Awaited { recovery, session: self.session, delay };
            self.store.remember(awaited.recovery.identifier(), awaited);
        }
    }
}
