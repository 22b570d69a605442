//! Which mixes are alive, without I/O: suspected by the fate of the client's own packets, judged by
//! loops.
//!
//! A client notices at once that its packets are lost, and through which mixes they went, but it has that
//! from its provider, or from the gateways that acknowledge its messages: one that lies could make mixes
//! look dead until those are left that suit it. So what happens to packets and replies only raises a suspicion. Loops, packets
//! to oneself that nobody can tell from others, decide. Routes avoid what seems dead, but never more than
//! half of a layer: whoever can kill mixes must not choose the route either.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mixsocks_common::topology::{LAYERS, RouteChoice, Topology};
use mixsocks_sphinx::{HopAddress, Identifier, Route};

/// The mixes of a route, layer by layer.
pub type Mixes = [HopAddress; LAYERS];

/// The way of a packet, as far as its sender has to remember it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The sum of the delays that its sender chose.
    pub delay: Duration,
    /// Its mixes.
    pub mixes: Mixes,
}

impl Way {
    /// Of a route that begins with a mix of each layer.
    ///
    /// # Panics
    /// When the route is shorter than that.
    pub fn of(route: &Route) -> Self {
        let mut hops = route.hops();
        let mixes = std::array::from_fn(|_| hops.next().expect("a mix of each layer").0);
        Self { delay: route.total_delay(), mixes }
    }
}

// A mix is dead or alive, and each packet says a little about which (E. S. Page, "Continuous inspection
// schemes", Biometrika 41, 1954): what is lost adds ln(P/Q), what came subtracts ln((1-Q)/(1-P)), never
// below zero, where P = 0.9 is the share that a dead mix loses, and Q = 0.3 more than living ones do.
const LOST_SCORE: f64 = 1.0986;
const CAME_SCORE: f64 = 1.9459;

/// From here on a mix is suspected, by own packets or by loops: four losses in a row.
const SUSPECT_SCORE: f64 = 4.0;

/// From here on it is dead, by loops alone: eleven losses in a row. Where a fifth of all packets is lost
/// at random, a living mix comes that far once in some ten million loops.
const DEAD_SCORE: f64 = 12.0;

/// Of replies only those that came are known. A living mix has none among so many per mix of its layer
/// with a probability of e^-16: it is suspected.
const UNSEEN_REPLIES: f64 = 16.0;

/// After so many replies it is looked which mixes none came through.
const REPLIES_PER_LOOK: u32 = 64;

/// A loss says something about a mix only if packets came through another one of its layer that left at
/// the same time, or shortly before and shortly after: else the whole path was away. So long is a moment,
/// so many of them are short, and so many are remembered.
const MOMENT: Duration = Duration::from_millis(100);
const SHORT_MOMENTS: u64 = 5;
const MAX_MOMENTS: usize = 64;

/// Loops after a loss: through any mixes, or through one that is suspected and some through others, which
/// it is compared with.
const ANY_LOOPS: usize = 24;
const AIMED_LOOPS: usize = 14;
const COMPARED_LOOPS: usize = 6;

/// Loops that show that the mixnet works: one of them comes back also where a third of all packets is lost.
const PROOF_LOOPS: usize = 3;

/// Loops under way: while there are so many, no more are sent.
const MAX_LOOPS: usize = 1024;

/// Loops that wait to be sent, and how long: what they would tell is of that time.
const MAX_WISHES: usize = 128;
const WISH_TIME: Duration = Duration::from_secs(2);

/// How long after loops the next ones follow another loss or suspicion, at least; twice as long each
/// time, until there was none for [`CALM`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(32);
const CALM: Duration = Duration::from_secs(60);

/// A loop that takes so much longer than its delays is lost.
const LOOP_SLACK: Duration = Duration::from_secs(1);

/// How often loops are sent through a mix that is avoided: first, and at last.
const FIRST_PROBE: Duration = Duration::from_secs(1);
const MAX_PROBE: Duration = Duration::from_secs(60);

/// When a mix that is avoided has answered, loops follow so fast, from so long on before it may be used
/// again.
const RECOVERY_PROBE: Duration = Duration::from_millis(200);
const RECOVERY: Duration = Duration::from_secs(3);

/// How long a mix is avoided at least; twice as long each time, until it was good for [`FORGIVEN`].
const FIRST_AVOIDED: Duration = Duration::from_secs(5);
const MAX_AVOIDED: Duration = Duration::from_secs(5 * 60);
const FORGIVEN: Duration = Duration::from_secs(10 * 60);

/// A loop that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopWish {
    /// The mix that it goes through; else any.
    pub through: Option<HopAddress>,
}

/// The mixes of a network, as one client sees them.
///
/// After every call that takes `&mut self`, [`Health::take_news`] may have something, and
/// [`Health::poll_timeout`] may have changed.
#[derive(Debug)]
pub struct Health {
    start: Instant,
    layers: [Layer; LAYERS],
    avoided: Arc<BTreeSet<HopAddress>>,
    has_news: bool,
    /// Loops that are not judged yet, by identifier, and when each is: those that came as late as those
    /// that did not, so that the scores see them in the order in which they left.
    loops: BTreeMap<Identifier, Loop>,
    deadlines: BTreeSet<(Instant, Identifier)>,
    /// Loops still to be sent.
    wishes: VecDeque<LoopWish>,
    wishes_until: Instant,
    /// Of loops through any mixes, and of those that show that anything comes through.
    pauses: Pauses,
    proofs: Pauses,
    replies_until_look: u32,
    /// When the last of all that came had left.
    newest: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Loop {
    mixes: Mixes,
    sent: Instant,
    /// The avoided mix that it asks.
    asks: Option<HopAddress>,
    has_come: bool,
}

/// When loops may follow a loss.
#[derive(Debug, Clone, Copy)]
struct Pauses {
    not_before: Instant,
    next: Duration,
}

impl Pauses {
    fn new(now: Instant) -> Self {
        Self { not_before: now, next: FIRST_PAUSE }
    }

    /// Whether loops may be sent now; if so, the next ones only after a pause.
    fn allow(&mut self, now: Instant) -> bool {
        if now < self.not_before {
            return false;
        }
        if now >= self.not_before + CALM {
            self.next = FIRST_PAUSE;
        }
        self.not_before = now + self.next;
        self.next = (2 * self.next).min(MAX_PAUSE);
        true
    }
}

#[derive(Debug, Default)]
struct Layer {
    mixes: BTreeMap<HopAddress, Mix>,
    /// The share of routes that lead through one mix of those that are not avoided.
    share: f64,
    /// Replies that came, each by this share.
    replies: f64,
}

#[derive(Debug)]
struct Mix {
    /// By own packets, and by loops.
    suspicion: f64,
    score: f64,
    /// Moments at which own packets left that came through it, and loops. The provider tells of packets,
    /// so they say nothing about loops.
    moments: [BTreeSet<u64>; 2],
    /// What the layer's replies were when the last one came through it.
    seen: f64,
    /// Routes may lead through it since then.
    drawn_since: Instant,
    pauses: Pauses,
    avoided: Option<Avoided>,
    /// How long it was avoided at least the last time.
    avoided_for: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Avoided {
    until: Instant,
    next_probe: Instant,
    interval: Duration,
    is_asked: bool,
}

impl Mix {
    /// Of a layer with so many replies.
    fn new(now: Instant, seen: f64) -> Self {
        Self {
            suspicion: 0.0,
            score: 0.0,
            moments: Default::default(),
            seen,
            drawn_since: now,
            pauses: Pauses::new(now),
            avoided: None,
            avoided_for: Duration::ZERO,
        }
    }

    /// What own packets say, or loops.
    fn evidence(&mut self, is_loop: bool) -> &mut f64 {
        if is_loop { &mut self.score } else { &mut self.suspicion }
    }

    fn is_suspected(&self, replies: f64) -> bool {
        self.suspicion.max(self.score) >= SUSPECT_SCORE || replies - self.seen >= UNSEEN_REPLIES
    }

    fn on_came(&mut self, is_loop: bool) {
        let evidence = self.evidence(is_loop);
        *evidence = (*evidence - CAME_SCORE).max(0.0);
    }

    fn passed_on(&mut self, moment: u64, is_loop: bool) {
        let moments = &mut self.moments[usize::from(is_loop)];
        moments.insert(moment);
        if moments.len() > MAX_MOMENTS {
            moments.pop_first();
        }
    }

    /// Whether it passed on what left at that moment.
    fn passed_at(&self, moment: u64, is_loop: bool) -> bool {
        let passed = &self.moments[usize::from(is_loop)];
        let any = |moments: Range<u64>| passed.range(moments).next().is_some();
        let before = moment.saturating_sub(SHORT_MOMENTS)..moment;
        any(moment..moment + 1) || any(before) && any(moment + 1..moment + 1 + SHORT_MOMENTS)
    }

    fn avoid(&mut self, now: Instant) {
        let is_forgiven = now >= self.drawn_since + FORGIVEN;
        let again = if is_forgiven { Duration::ZERO } else { 2 * self.avoided_for };
        self.avoided_for = again.clamp(FIRST_AVOIDED, MAX_AVOIDED);
        self.score = DEAD_SCORE;
        self.avoided = Some(Avoided {
            until: now + self.avoided_for,
            next_probe: now + FIRST_PROBE,
            interval: FIRST_PROBE,
            is_asked: false,
        });
    }

    fn readmit(&mut self, now: Instant, replies: f64) {
        self.avoided = None;
        (self.suspicion, self.score, self.seen) = (0.0, 0.0, replies);
        self.drawn_since = now;
    }
}

impl Health {
    /// All mixes of `topology` are alive until the contrary shows.
    pub fn new(topology: &Topology, now: Instant) -> Self {
        let mut health = Self {
            start: now,
            layers: Default::default(),
            avoided: Arc::default(),
            has_news: false,
            loops: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            wishes: VecDeque::new(),
            wishes_until: now,
            pauses: Pauses::new(now),
            proofs: Pauses::new(now),
            replies_until_look: REPLIES_PER_LOOK,
            newest: None,
        };
        health.follow(topology, now);
        health
    }

    /// The mixes are those of `topology` from now on; what is known about those that stay is kept.
    pub fn follow(&mut self, topology: &Topology, now: Instant) {
        for (number, layer) in (1..).zip(&mut self.layers) {
            let mut old = std::mem::take(&mut layer.mixes);
            let replies = layer.replies;
            let mut known = |id| old.remove(&id).unwrap_or_else(|| Mix::new(now, replies));
            let ids = topology.mixes(number).map(|mix| *mix.identity.as_bytes());
            layer.mixes = ids.map(|id| (id, known(id))).collect();
            // A layer that has shrunk may be avoided less.
            while layer.avoided() > layer.mixes.len() / 2 {
                let avoided = layer.mixes.values_mut().find(|mix| mix.avoided.is_some());
                avoided.expect("there are some").readmit(now, replies);
            }
        }
        self.list_avoided();
    }

    /// What routes are to be drawn by.
    pub fn choice(&self) -> RouteChoice {
        RouteChoice { avoided: self.avoided.clone(), through: None }
    }

    /// Whether a mix is avoided that was not before: what was made for routes through it is lost.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// Whether anything that left after `time` has come.
    pub fn came_since(&self, time: Instant) -> bool {
        self.newest.is_some_and(|newest| newest > time)
    }

    /// Somebody has to know whether anything comes through: some loops are sent, unless some were a moment
    /// ago. Pauses between them grow until something has come.
    pub fn seek_proof(&mut self, now: Instant) {
        if self.proofs.allow(now) {
            self.wish(now, None, PROOF_LOOPS);
        }
    }

    /// When [`Health::seek_proof`] does something next.
    pub fn next_proof_at(&self) -> Instant {
        self.proofs.not_before
    }

    // --- Evidence.

    /// An own packet that left at `sent` has come to the provider, or is lost.
    pub fn on_fate(&mut self, now: Instant, mixes: &Mixes, sent: Instant, has_come: bool) {
        if has_come {
            self.passed_on(mixes, sent, false);
            return self.on_came(mixes, false);
        }
        self.on_lost(now, mixes, sent, false);
        let is_explained = mixes.iter().any(|id| self.avoided.contains(id));
        if !is_explained && self.pauses.allow(now) {
            self.wish(now, None, ANY_LOOPS);
        }
    }

    /// A reply has come.
    pub fn on_reply(&mut self, now: Instant, mixes: &Mixes) {
        for (layer, id) in self.layers.iter_mut().zip(mixes) {
            layer.replies += layer.share;
            if let Some(mix) = layer.mixes.get_mut(id) {
                mix.seen = layer.replies;
            }
        }
        self.replies_until_look -= 1;
        if self.replies_until_look == 0 {
            self.replies_until_look = REPLIES_PER_LOOK;
            self.judge(now, |_| true);
        }
    }

    fn on_came(&mut self, mixes: &Mixes, is_loop: bool) {
        for (layer, id) in self.layers.iter_mut().zip(mixes) {
            if let Some(mix) = layer.mixes.get_mut(id) {
                mix.on_came(is_loop);
            }
        }
    }

    /// What left at `sent` has come through these.
    fn passed_on(&mut self, mixes: &Mixes, sent: Instant, is_loop: bool) {
        let moment = self.moment(sent);
        self.newest = self.newest.max(Some(sent));
        self.proofs.next = FIRST_PAUSE;
        for (layer, id) in self.layers.iter_mut().zip(mixes) {
            if let Some(mix) = layer.mixes.get_mut(id) {
                mix.passed_on(moment, is_loop);
            }
        }
    }

    fn on_lost(&mut self, now: Instant, mixes: &Mixes, sent: Instant, is_loop: bool) {
        let moment = self.moment(sent);
        // A mix that is avoided explains the loss; the others are not to blame.
        let is_explained = mixes.iter().any(|id| self.avoided.contains(id));
        for (layer, id) in self.layers.iter_mut().zip(mixes) {
            let mut others = layer.mixes.iter().filter(|(other, _)| *other != id);
            let has_others = others.any(|(_, mix)| mix.passed_at(moment, is_loop));
            let Some(mix) = layer.mixes.get_mut(id) else { continue };
            if has_others && (!is_explained || mix.avoided.is_some()) {
                let evidence = mix.evidence(is_loop);
                *evidence = (*evidence + LOST_SCORE).min(DEAD_SCORE);
            }
        }
        self.judge(now, |id| mixes.contains(id));
    }

    fn moment(&self, time: Instant) -> u64 {
        let millis = time.saturating_duration_since(self.start).as_millis();
        u64::try_from(millis / MOMENT.as_millis()).unwrap_or(u64::MAX / 2)
    }

    /// Of the mixes that `concerns` names, avoids what is dead, as far as may be, and has loops sent
    /// through what is suspected.
    fn judge(&mut self, now: Instant, concerns: impl Fn(&HopAddress) -> bool) {
        let mut suspects = Vec::new();
        let mut has_dead = false;
        for layer in &mut self.layers {
            let has_choice = layer.mixes.len() > 1;
            let mut room = (layer.mixes.len() / 2).saturating_sub(layer.avoided());
            let drawn = layer.mixes.iter_mut().filter(|(_, mix)| mix.avoided.is_none());
            for (id, mix) in drawn.filter(|(id, _)| concerns(id)) {
                if mix.score >= DEAD_SCORE && room > 0 {
                    mix.avoid(now);
                    (room, has_dead) = (room - 1, true);
                } else if has_choice && mix.is_suspected(layer.replies) && mix.pauses.allow(now) {
                    (mix.suspicion, mix.seen) = (0.0, layer.replies);
                    suspects.push(*id);
                }
            }
        }
        for suspect in suspects {
            self.wish(now, Some(suspect), AIMED_LOOPS);
            self.wish(now, None, COMPARED_LOOPS);
        }
        if has_dead {
            self.has_news = true;
            self.list_avoided();
            // What was lost through others may have been lost through that one.
            for mix in self.layers.iter_mut().flat_map(|layer| layer.mixes.values_mut()) {
                if mix.avoided.is_none() {
                    (mix.suspicion, mix.score) = (0.0, 0.0);
                }
            }
            // From now on it is asked now and then.
            let avoided = &self.avoided;
            let is_over = |wish: &LoopWish| wish.through.is_some_and(|id| avoided.contains(&id));
            self.wishes.retain(|wish| !is_over(wish));
        }
    }

    /// Has `count` more loops sent.
    fn wish(&mut self, now: Instant, through: Option<HopAddress>, count: usize) {
        if now > self.wishes_until {
            self.wishes.clear();
        }
        self.wishes_until = now + WISH_TIME;
        let count = count.min(MAX_WISHES - self.wishes.len());
        self.wishes.extend(std::iter::repeat_n(LoopWish { through }, count));
    }

    fn list_avoided(&mut self) {
        let mixes = self.layers.iter().flat_map(|layer| &layer.mixes);
        let avoided = mixes.filter(|(_, mix)| mix.avoided.is_some()).map(|(id, _)| *id).collect();
        self.avoided = Arc::new(avoided);
        for layer in &mut self.layers {
            layer.share = 1.0 / (layer.mixes.len() - layer.avoided()).max(1) as f64;
        }
    }

    // --- Loops.

    /// The next loop to send at `now`; [`Health::loop_taken`] must follow.
    pub fn next_loop(&self, now: Instant) -> Option<LoopWish> {
        if self.loops.len() >= MAX_LOOPS {
            return None;
        }
        let is_due = |(_, avoided): &(_, Avoided)| !avoided.is_asked && avoided.next_probe <= now;
        let probe = self.avoided_mixes().find(is_due).map(|(id, _)| LoopWish { through: Some(id) });
        let wish = self.wishes.front().filter(|_| now <= self.wishes_until);
        probe.or_else(|| wish.copied())
    }

    /// The loop that was wished for is being made.
    pub fn loop_taken(&mut self, now: Instant, wish: LoopWish) {
        match wish.through.and_then(|id| self.avoided_mix(&id)) {
            Some(avoided) => {
                // If it answers, it is asked more often again.
                avoided.next_probe = now + avoided.interval;
                avoided.interval = (2 * avoided.interval).min(MAX_PROBE);
            }
            None => drop(self.wishes.pop_front()),
        }
    }

    /// The loop leaves.
    pub fn loop_sent(&mut self, now: Instant, wish: LoopWish, identifier: Identifier, way: Way) {
        // A mix without a key for the time is on no route.
        let asks = wish.through.filter(|id| self.avoided.contains(id) && way.mixes.contains(id));
        if let Some(avoided) = asks.and_then(|id| self.avoided_mix(&id)) {
            avoided.is_asked = true;
        }
        let deadline = now + way.delay + LOOP_SLACK;
        let sent = Loop { mixes: way.mixes, sent: now, asks, has_come: false };
        self.loops.insert(identifier, sent);
        self.deadlines.insert((deadline, identifier));
    }

    /// Whether it names a loop that has not come.
    pub fn awaits_loop(&self, identifier: &Identifier) -> bool {
        self.loops.get(identifier).is_some_and(|sent| !sent.has_come)
    }

    /// Whether what has come is a loop.
    pub fn loop_came(&mut self, now: Instant, identifier: &Identifier) -> bool {
        let Some(came) = self.loops.get_mut(identifier).filter(|sent| !sent.has_come) else {
            return false;
        };
        came.has_come = true;
        let Loop { mixes, sent, asks, .. } = *came;
        self.passed_on(&mixes, sent, true);
        if let Some(avoided) = asks.and_then(|id| self.avoided_mix(&id)) {
            // It may be back: it is asked more often when it may be used again.
            avoided.is_asked = false;
            avoided.interval = FIRST_PROBE;
            let soon = avoided.until.checked_sub(RECOVERY).unwrap_or(now);
            avoided.next_probe = (now + RECOVERY_PROBE).max(soon);
        }
        true
    }

    fn readmit_recovered(&mut self, now: Instant) {
        let is_over =
            |mix: &Mix| mix.score <= 0.0 && mix.avoided.is_some_and(|avoided| avoided.until <= now);
        let mut is_any = false;
        for Layer { mixes, replies, .. } in &mut self.layers {
            for mix in mixes.values_mut().filter(|mix| is_over(mix)) {
                mix.readmit(now, *replies);
                is_any = true;
            }
        }
        if is_any {
            self.list_avoided();
        }
    }

    fn avoided_mixes(&self) -> impl Iterator<Item = (HopAddress, Avoided)> {
        self.avoided.iter().filter_map(|id| {
            let mix = self.layers.iter().find_map(|layer| layer.mixes.get(id))?;
            Some((*id, mix.avoided?))
        })
    }

    fn avoided_mix(&mut self, id: &HopAddress) -> Option<&mut Avoided> {
        self.layers.iter_mut().find_map(|layer| layer.mixes.get_mut(id))?.avoided.as_mut()
    }

    // --- Time.

    /// When [`Health::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// When the next loop is to be sent, if nothing happens before.
    pub fn next_loop_at(&self, now: Instant) -> Option<Instant> {
        if self.loops.len() >= MAX_LOOPS {
            return None;
        }
        let unasked = self.avoided_mixes().filter(|(_, avoided)| !avoided.is_asked);
        let probe = unasked.map(|(_, avoided)| avoided.next_probe);
        let wish = (!self.wishes.is_empty() && now <= self.wishes_until).then_some(now);
        probe.chain(wish).min()
    }

    /// Judges the loops that should have come by now.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(&(deadline, identifier)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            let Some(sent) = self.loops.remove(&identifier) else { continue };
            if sent.has_come {
                self.on_came(&sent.mixes, true);
                continue;
            }
            if let Some(avoided) = sent.asks.and_then(|id| self.avoided_mix(&id)) {
                avoided.is_asked = false;
            }
            self.on_lost(now, &sent.mixes, sent.sent, true);
        }
        self.readmit_recovered(now);
    }
}

impl Layer {
    /// How many of its mixes are avoided.
    fn avoided(&self) -> usize {
        self.mixes.values().filter(|mix| mix.avoided.is_some()).count()
    }
}

#[cfg(test)]
mod tests;
