//! What goes wrong in a soak, and when.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use tokio::time::{Instant, sleep};

use super::super::network::{CLIENT, PROVIDER, Town, gateways};
use super::{DEADLINE, GRACE};

/// The least time between two faults; the most is so much more, or a tenth of a short soak.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_MORE: Duration = Duration::from_secs(10);
/// How long a process is away at most, or a tenth of a short soak.
const LONGEST_ABSENCE: Duration = Duration::from_secs(5);

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    MixKilled,
    ClientsGatewayKilled,
    ProvidersGatewayKilled,
    ProviderKilled,
    ClientStopped,
}

impl Fault {
    const ALL: [Self; 5] = [
        Self::MixKilled,
        Self::ClientsGatewayKilled,
        Self::ProvidersGatewayKilled,
        Self::ProviderKilled,
        Self::ClientStopped,
    ];
    /// Those that start anew nobody whose memory is compared.
    const GENTLE: [Self; 2] = [Self::MixKilled, Self::ClientStopped];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::MixKilled => "mix killed",
            Self::ClientsGatewayKilled => "client's gateway killed",
            Self::ProvidersGatewayKilled => "provider's gateway killed",
            Self::ProviderKilled => "provider killed",
            Self::ClientStopped => "client stopped",
        }
    }
}

/// The network, and what befalls it.
pub(super) struct Faults {
    town: Town,
    providers_gateway: String,
    clients_gateway: String,
    rng: StdRng,
    /// What comes next: all in some order before any comes again.
    bag: Vec<Fault>,
    history: Arc<History>,
    longest_more: Duration,
    longest_absence: Duration,
}

impl Faults {
    /// For a soak of this duration.
    pub(super) async fn new(
        mut town: Town,
        rng: StdRng,
        history: Arc<History>,
        duration: Duration,
    ) -> Result<Self> {
        let providers_gateway = town.providers_gateway().await?;
        let clients_gateway = gateways().find(|name| *name != providers_gateway);
        Ok(Self {
            clients_gateway: clients_gateway.unwrap_or_else(|| providers_gateway.clone()),
            providers_gateway,
            town,
            rng,
            bag: Vec::new(),
            history,
            longest_more: LONGEST_MORE.min(duration / 10),
            longest_absence: LONGEST_ABSENCE.min(duration / 10),
        })
    }

    pub(super) fn town(&self) -> &Town {
        &self.town
    }

    /// How long it is until the next fault.
    pub(super) fn pause(&mut self) -> Duration {
        LEAST_PAUSE + self.longest_more.mul_f64(self.rng.random())
    }

    /// Lets something go wrong, and returns when it is right again, with the name of whoever was
    /// started anew.
    pub(super) async fn inflict(&mut self, gently: bool) -> Result<Option<String>> {
        let fault = self.draw(gently);
        let name = match fault {
            Fault::MixKilled => self.draw_mix(gently),
            Fault::ClientsGatewayKilled => self.clients_gateway.clone(),
            Fault::ProvidersGatewayKilled => self.providers_gateway.clone(),
            Fault::ProviderKilled => PROVIDER.to_owned(),
            Fault::ClientStopped => CLIENT.to_owned(),
        };
        let absence = self.longest_absence.mul_f64(self.rng.random());
        self.history.begin(fault, Instant::now());
        if fault == Fault::ClientStopped {
            self.town.signal(&name, "STOP").await?;
            sleep(absence).await;
            self.town.signal(&name, "CONT").await?;
            self.history.end(Instant::now());
            return Ok(None);
        }
        self.town.kill(&name).await?;
        sleep(absence).await;
        self.town.restart(&name).await?;
        self.history.end(Instant::now());
        Ok(Some(name))
    }

    fn draw(&mut self, gently: bool) -> Fault {
        if gently {
            self.bag.retain(|fault| Fault::GENTLE.contains(fault));
        }
        if self.bag.is_empty() {
            self.bag = if gently { Fault::GENTLE.to_vec() } else { Fault::ALL.to_vec() };
            self.bag.shuffle(&mut self.rng);
        }
        self.bag.pop().expect("it was filled")
    }

    /// Gently: one of every other mix.
    fn draw_mix(&mut self, gently: bool) -> String {
        let every = if gently { 2 } else { 1 };
        let mixes: Vec<_> = self.town.mixes().step_by(every).collect();
        mixes.choose(&mut self.rng).expect("there are mixes").clone()
    }
}

/// Which faults there were; streams are judged by it.
#[derive(Debug, Default)]
pub(super) struct History(Mutex<Events>);

#[derive(Debug, Default)]
struct Events {
    counts: BTreeMap<Fault, u64>,
    /// Those that a stream of now may have met.
    recent: VecDeque<Event>,
}

#[derive(Debug)]
struct Event {
    fault: Fault,
    from: Instant,
    until: Option<Instant>,
}

impl Event {
    /// Whether a stream with this life may show it.
    fn touches(&self, started: Instant, ended: Instant) -> bool {
        self.from <= ended && self.until.is_none_or(|until| started <= until + GRACE)
    }
}

impl History {
    fn begin(&self, fault: Fault, now: Instant) {
        let mut events = self.lock();
        *events.counts.entry(fault).or_default() += 1;
        let is_past = |event: &Event| event.until.is_some_and(|u| u + GRACE + DEADLINE < now);
        while events.recent.front().is_some_and(is_past) {
            events.recent.pop_front();
        }
        events.recent.push_back(Event { fault, from: now, until: None });
    }

    fn end(&self, now: Instant) {
        if let Some(event) = self.lock().recent.back_mut() {
            event.until = Some(now);
        }
    }

    /// Whether new streams of that time may be refused.
    pub(super) fn excuses_refusal(&self, started: Instant, ended: Instant) -> bool {
        self.lock().recent.iter().any(|event| event.touches(started, ended))
    }

    /// Whether streams of that time may end with an error.
    pub(super) fn excuses_end(&self, started: Instant, ended: Instant) -> bool {
        let recent = &self.lock().recent;
        let mut kills = recent.iter().filter(|event| event.fault == Fault::ProviderKilled);
        kills.any(|event| event.touches(started, ended))
    }

    /// How many faults of each kind there were.
    pub(super) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.lock().counts.iter().map(|(fault, count)| (fault.name(), *count)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_streams_that_met_a_fault_are_excused() {
        let history = History::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let after = 20 + GRACE.as_secs() + 1;
        history.begin(Fault::MixKilled, at(10));
        assert!(!history.excuses_refusal(at(0), at(9)));
        assert!(history.excuses_refusal(at(0), at(11)));
        assert!(!history.excuses_end(at(0), at(11)));
        history.end(at(20));
        assert!(history.excuses_refusal(at(after - 2), at(after)));
        assert!(!history.excuses_refusal(at(after), at(after)));
        history.begin(Fault::ProviderKilled, at(after + 1));
        assert!(history.excuses_end(at(after), at(after + 2)));
        assert!(!history.excuses_end(at(0), at(after)));
    }

    #[test]
    fn faults_that_no_stream_of_now_can_have_met_are_forgotten() {
        let history = History::default();
        let mut now = Instant::now();
        for _ in 0..100 {
            history.begin(Fault::MixKilled, now);
            history.end(now);
            now += DEADLINE;
        }
        assert_eq!(history.lock().recent.len(), 2);
        assert_eq!(history.counts()["mix killed"], 100);
    }
}
