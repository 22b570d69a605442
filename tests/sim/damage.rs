//! What faults do to the network, and what may rightly become of sessions then.

use std::time::{Duration, Instant};

use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{AccessTokens, MAX_START_AGE, START_STEP, SessionId};
use mixsocks_common::topology::{Role as NodeRole, RouteChoice, UnixTime, random_route};
use mixsocks_sphinx::Identifier;
use rand::RngExt;

use crate::codec::{Codec, SealedRoute};
use crate::endpoint::{Access, Endpoint};
use crate::faults::Fault;
use crate::hostile;
use crate::model::Stream;
use crate::world::{Event, NodeRef, WALL_START_MS, WIRE, World};

/// What the faults of the moment do to wires.
#[derive(Default)]
pub(crate) struct Weather {
    pub(crate) loss: f64,
    pub(crate) duplication: f64,
    pub(crate) delay: (f64, Duration),
    pub(crate) corruption: f64,
    pub(crate) spacing: Option<Duration>,
    pub(crate) blackout: bool,
    pub(crate) famine: bool,
    pub(crate) hostile: bool,
}

/// What a session told the provider about its beginning.
pub(crate) struct Start {
    pub(crate) client: usize,
    pub(crate) began: Instant,
    pub(crate) time_ms: u64,
}

impl<C: Codec> World<C> {
    pub(crate) fn active(&self) -> impl Iterator<Item = &Fault> {
        let elapsed = self.elapsed();
        self.faults
            .iter()
            .filter(move |planned| planned.during.contains(&elapsed))
            .map(|planned| &planned.fault)
    }

    pub(crate) fn change_fault(&mut self, number: usize, begins: bool) -> Result<(), String> {
        let fault = self.faults[number].fault.clone();
        self.note(format!("{} {fault:?}", if begins { "begins:" } else { "ends:" }));
        match fault {
            Fault::Cut(endpoint) if begins => self.cut(endpoint),
            Fault::MixKilled(mix) if begins => self.mixes[mix].is_down = true,
            Fault::SurbsLost if begins => self.endpoints.iter_mut().for_each(Endpoint::lose_surbs),
            Fault::MixDown(mix, memory) => {
                if begins {
                    self.mixes[mix].is_down = true;
                } else {
                    self.mixes[mix].restart(&mut self.rng, memory);
                    self.reschedule(NodeRef::Mix(mix));
                }
            }
            Fault::NewKey(node, is_told) if begins => self.renew_key(node, is_told)?,
            Fault::MixLeaves(mix, for_good) if begins || !for_good => {
                self.change_role(mix, begins, None);
            }
            Fault::MixMoves(mix, layer, for_good) if begins || !for_good => {
                self.change_role(mix, begins, Some(NodeRole::Mix { layer }));
            }
            Fault::GatewayDown(gateway, memory) => {
                for endpoint in 0..self.endpoints.len() {
                    if self.endpoints[endpoint].gateway == gateway {
                        self.cut(endpoint);
                    }
                }
                self.gateways[gateway].restart(&mut self.rng, memory);
                self.gateways[gateway].is_down = begins;
            }
            Fault::Suspended(endpoint, clock) if begins => {
                self.endpoints[endpoint].fall_asleep(self.now, clock);
            }
            Fault::Suspended(endpoint, _) => self.wake(endpoint)?,
            Fault::ProviderDown | Fault::ClientDown(_) => {
                let endpoint = if let Fault::ClientDown(client) = fault { client } else { 0 };
                if begins {
                    self.cut(endpoint);
                    self.lose_endpoint(endpoint);
                }
                self.endpoints[endpoint].is_down = begins;
            }
            Fault::WrongClock(endpoint, seconds) => {
                self.endpoints[endpoint].clock_error_s = if begins { seconds } else { 0 };
            }
            Fault::HostileProvider(client) => {
                self.endpoints[client].is_lied_to = begins;
                if begins {
                    for stream in &mut self.streams {
                        stream.is_lied_to |=
                            stream.client == client && stream.has_begun && !stream.is_told();
                    }
                } else {
                    // Its user has had enough. What was acknowledged and never delivered would
                    // be waited for until then.
                    self.cut(client);
                    self.lose_endpoint(client);
                }
            }
            Fault::TokensRemoved if !self.access.is_public() => self.remove_tokens(begins)?,
            Fault::Hostile if begins => self.at(self.now, Event::Attack),
            _ => {}
        }
        self.weather = self.current_weather();
        if matches!(fault, Fault::Famine) {
            (1..self.endpoints.len()).try_for_each(|client| self.settle(client))?;
        }
        Ok(())
    }

    /// A suspended endpoint goes on. What came for it meanwhile is in its socket, unless the gateway has
    /// given the connection up.
    fn wake(&mut self, endpoint: usize) -> Result<(), String> {
        self.endpoints[endpoint].wake(self.now);
        for (connection, frame) in std::mem::take(&mut self.endpoints[endpoint].in_socket) {
            self.at(self.now, Event::Down { endpoint, connection, frame });
        }
        let Endpoint { gateway, key, connection, is_connected, .. } = &self.endpoints[endpoint];
        let inbox = self.gateways[*gateway].clients.get(&key.address);
        let is_alive = inbox.is_some_and(|inbox| inbox.connection == Some(*connection));
        if *is_connected && !is_alive {
            self.cut(endpoint);
        }
        self.at(self.now, Event::Dial(endpoint));
        self.reschedule(NodeRef::Endpoint(endpoint));
        self.wake_apps(endpoint);
        self.settle(endpoint)
    }

    fn current_weather(&self) -> Weather {
        let mut weather = Weather::default();
        for fault in self.active() {
            match fault {
                Fault::Loss(share) => weather.loss = weather.loss.max(*share),
                Fault::Duplication(share) => weather.duplication = *share,
                Fault::Delay(share, longest) => weather.delay = (*share, *longest),
                Fault::Corruption(share) => weather.corruption = *share,
                Fault::Narrow(rate) => weather.spacing = Some(Duration::from_secs(1) / *rate),
                Fault::Blackout => weather.blackout = true,
                Fault::Famine => weather.famine = true,
                Fault::Hostile => weather.hostile = true,
                _ => {}
            }
        }
        weather
    }

    /// An endpoint forgets everything, and its programs or targets lose their streams.
    fn lose_endpoint(&mut self, endpoint: usize) {
        let wall_ms = self.endpoints[endpoint].wall_ms(self.wall_ms());
        self.endpoints[endpoint].restart(self.now, wall_ms);
        if endpoint == 0 {
            self.provider_restarted = Some(self.now);
            self.provider_started_ms = self.provider_started_ms.max(wall_ms);
            self.streams.iter_mut().for_each(Stream::lose_target);
        } else {
            let of_it = self.streams.iter_mut().filter(|stream| stream.client == endpoint);
            of_it.for_each(Stream::lose_program);
        }
    }

    /// Whether a client may rightly be told that its session has ended.
    pub(crate) fn may_end(&self, session: SessionId, reason: CloseReason) -> bool {
        let Some(start) = self.starts.get(&session) else { return false };
        match reason {
            CloseReason::Unknown => {
                let ended = [self.provider_restarted, self.tokens_removed].into_iter().flatten();
                ended.max().is_some_and(|at| at >= start.began)
            }
            CloseReason::StaleStart => self.may_be_stale(start),
            CloseReason::TokenNeeded => {
                !self.access.serves(start.client) || self.lacked_tokens_since(start.began)
            }
            _ => false,
        }
    }

    /// Whether the provider has had no tokens at some time since then.
    fn lacked_tokens_since(&self, began: Instant) -> bool {
        let began = began - self.start;
        self.faults.iter().any(|planned| {
            matches!(planned.fault, Fault::TokensRemoved)
                && planned.during.start <= self.elapsed()
                && planned.during.end >= began
        })
    }

    /// A private provider knows no tokens any more, and its sessions end; or it has them again.
    fn remove_tokens(&mut self, begins: bool) -> Result<(), String> {
        let right = self.access.demanded(&self.endpoints[0].address.encryption);
        let demanded = if begins { Some(AccessTokens::default()) } else { right };
        if begins {
            self.tokens_removed = Some(self.now);
            self.streams.iter_mut().for_each(Stream::lose_session);
        }
        self.endpoints[0].take_access(self.now, Access { demanded, shown: None });
        match self.endpoints[0].is_suspended() {
            true => Ok(()),
            false => self.settle(0),
        }
    }

    /// Whether a START that came since its session began may have been refused: it was from before the
    /// provider's own start, or too old or new by the clock that the provider had at some time.
    fn may_be_stale(&self, start: &Start) -> bool {
        let began = start.began - self.start;
        let errors_s = self.faults.iter().filter_map(|planned| match planned.fault {
            Fault::WrongClock(0, seconds)
                if planned.during.start <= self.elapsed() && planned.during.end >= began =>
            {
                Some(seconds)
            }
            _ => None,
        });
        let errors_s = || errors_s.clone().chain([0]);
        let (slow_s, fast_s) = (errors_s().min().unwrap_or(0), errors_s().max().unwrap_or(0));
        let always_ms = self.endpoints[0].key.clock_error_ms;
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let latest_ms = self.wall_ms().saturating_add_signed(1000 * fast_s + always_ms);
        let earliest_ms =
            (WALL_START_MS + ms(began)).saturating_add_signed(1000 * slow_s + always_ms);
        let oldest_ms = (latest_ms - ms(MAX_START_AGE)).max(self.provider_started_ms);
        let newest_ms = earliest_ms + ms(MAX_START_AGE) + ms(START_STEP);
        !(oldest_ms..=newest_ms).contains(&start.time_ms)
    }

    /// A node gets other keys, and every client knows it; those that are told renew their SURBs.
    fn renew_key(&mut self, node: usize, is_told: bool) -> Result<(), String> {
        let Self { documents, gateways, mixes, rng, .. } = self;
        let key = match node.checked_sub(gateways.len()) {
            None => {
                gateways[node].renew_key(rng);
                &mut gateways[node].key
            }
            Some(mix) => {
                mixes[mix].renew_key(rng);
                &mut mixes[mix].key
            }
        };
        documents.change_keys(key, rng);
        let right_ms = self.wall_ms();
        for number in 0..self.endpoints.len() {
            let published = &self.documents.published;
            self.endpoints[number].correct_document(published, is_told, self.now, right_ms);
            if !self.endpoints[number].is_suspended() {
                self.settle(number)?;
            }
        }
        Ok(())
    }

    /// A mix has another role, or none, if its layer can do without it; a new document
    /// says so.
    fn change_role(&mut self, mix: usize, begins: bool, role: Option<NodeRole>) {
        let node = self.gateways.len() + mix;
        let documents = &mut self.documents;
        if begins && documents.may_go(node) {
            documents.roles[node] = role;
        } else if !begins {
            documents.roles[node] = Some(self.first_roles[node]);
        } else {
            return;
        }
        self.publish(self.wall_ms());
    }

    /// Somebody replays what it saw, and sends nonsense in valid packets to provider and clients.
    pub(crate) fn attack(&mut self) {
        if !self.weather.hostile {
            return;
        }
        if !self.seen.is_empty() {
            let (to, packet) = self.seen[self.rng.random_range(0..self.seen.len())].clone();
            self.at(self.now + WIRE, Event::Arrive(to, packet));
        }
        let recipient = self.endpoints[self.rng.random_range(0..self.endpoints.len())].address;
        let wall_ms = self.wall_ms();
        let token =
            self.endpoints[self.rng.random_range(1..self.endpoints.len())].access.shown.clone();
        let contents = hostile::packet(&mut self.rng, wall_ms, token);
        let identifier = if self.rng.random() { Identifier::default() } else { self.rng.random() };
        let topology = self.documents.published.last().expect("there is a first one");
        let (mean, now) = (topology.parameters.mean_delay, UnixTime(wall_ms / 1000));
        let choice = RouteChoice::default();
        if let Ok(route) =
            random_route(topology, &recipient, now, mean, identifier, &choice, &mut self.rng)
        {
            let sealed = SealedRoute { route: &route, recipient: &recipient, topology, now };
            let packet = self.codec.build(&mut self.rng, &sealed, &contents);
            self.send(NodeRef::Gateway(0), &route.first_hop(), packet);
        }
        let pause = Duration::from_millis(self.rng.random_range(1..100));
        self.at(self.now + pause, Event::Attack);
    }
}
