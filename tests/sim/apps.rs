//! The programs at both ends of streams: they do what their plans say, and check what they see.

use std::time::Duration;

use mixsocks_client::core::ClientEvent;
use mixsocks_client::stream::StreamKey;
use mixsocks_common::session::frame::CloseReason;
use mixsocks_common::session::{OpenOutcome, SessionId, StreamEvent, start_time_ms};
use mixsocks_common::target::Target;
use mixsocks_provider::core::ProviderEvent;

use crate::codec::Codec;
use crate::damage::Start;
use crate::endpoint::Role;
use crate::model::End;
use crate::world::{Event, World};

/// When a machine that is asleep is looked after again.
const AWAKE_AGAIN: Duration = Duration::from_secs(1);
/// Bytes that are read in one go at most.
const READ_BYTES: usize = 64 * 1024;

impl<C: Codec> World<C> {
    /// Does what follows from a change at an endpoint.
    pub(crate) fn settle(&mut self, endpoint: usize) -> Result<(), String> {
        if self.endpoints[endpoint].is_suspended() {
            return Ok(());
        }
        let right_ms = self.wall_ms();
        self.endpoints[endpoint].look(self.now, right_ms);
        loop {
            let event = match &mut self.endpoints[endpoint].role {
                Role::Client(core) => core.poll_event().map(Seen::ByClient),
                Role::Provider(core) => core.poll_event().map(Seen::ByProvider),
            };
            match event {
                Some(Seen::ByClient(event)) => self.client_event(event)?,
                Some(Seen::ByProvider(event)) => self.provider_event(event)?,
                None => break,
            }
        }
        let Self { endpoints, codec, now, weather, .. } = self;
        endpoints[endpoint].make_surbs(codec, *now, right_ms, weather.famine);
        self.flush_up(endpoint);
        Ok(())
    }

    fn client_event(&mut self, event: ClientEvent) -> Result<(), String> {
        match event {
            ClientEvent::Stream(id, event) => {
                let Some(number) = self.stream_of_client(&event, id) else { return Ok(()) };
                match event {
                    StreamEvent::Opened { outcome, .. } => self.opened(number, outcome)?,
                    StreamEvent::Reset(_) => self.reset_seen(number, End::Program)?,
                    StreamEvent::Readable(_) | StreamEvent::Writable(_) => {
                        self.at(self.now, Event::App(number, End::Program));
                    }
                    StreamEvent::Open { .. } => return Err("a client is asked to dial".to_owned()),
                }
            }
            ClientEvent::MixAvoided => self.note("a client avoids a mix".to_owned()),
            ClientEvent::SessionEnded(id, _, reason) => {
                self.note(format!("a client's session has ended: {reason}"));
                for number in 0..self.streams.len() {
                    let is_of_it = self.streams[number].key.is_some_and(|key| key.0 == id);
                    if is_of_it && !self.streams[number].is_done_at(End::Program) {
                        self.session_lost(number, id, reason)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A client's stream ends with its session.
    fn session_lost(
        &mut self,
        number: usize,
        id: SessionId,
        reason: CloseReason,
    ) -> Result<(), String> {
        if !self.streams[number].is_lied_to && !self.may_end(id, reason) {
            return Err(format!("stream {number} loses its session for no reason: {reason}"));
        }
        let stream = &mut self.streams[number];
        // As a client does it: once more, if the provider has not done anything.
        if reason == CloseReason::Unknown && stream.opened.is_none() && !stream.was_retried {
            stream.was_retried = true;
            stream.begin_at_program();
            self.at(self.now, Event::Open(number));
        } else {
            stream.was_killed = true;
            stream.gone[End::Program as usize] = true;
        }
        Ok(())
    }

    fn provider_event(&mut self, event: ProviderEvent) -> Result<(), String> {
        match event {
            ProviderEvent::Stream(id, StreamEvent::Open { stream, target }) => {
                let key = (id, stream);
                let Some(number) = number_of(&target) else {
                    self.provider().opened(key, OpenOutcome::Refused);
                    self.provider().release(key);
                    return Ok(());
                };
                if !self.access.serves(self.streams[number].client) {
                    return Err(format!(
                        "the target of stream {number}, of a stranger, is dialled"
                    ));
                }
                let stream = &mut self.streams[number];
                if stream.target_key.is_some() && !stream.is_lied_to {
                    return Err(format!("stream {number} is dialled twice"));
                }
                stream.begin_at_target(key);
                self.at(self.now + self.streams[number].dialling, Event::Dialled(number));
            }
            ProviderEvent::Stream(id, event) => {
                let (StreamEvent::Readable(stream)
                | StreamEvent::Writable(stream)
                | StreamEvent::Reset(stream)) = event
                else {
                    return Ok(());
                };
                let key = Some((id, stream));
                let number = self.streams.iter().position(|stream| stream.target_key == key);
                match (number, event) {
                    (Some(number), StreamEvent::Reset(_)) => {
                        self.reset_seen(number, End::Target)?
                    }
                    (Some(number), _) => self.at(self.now, Event::App(number, End::Target)),
                    (None, _) => self.provider().release((id, stream)),
                }
            }
            ProviderEvent::SessionEnded(id) => {
                let is_of_it = |key: StreamKey| key.0 == id;
                for stream in &mut self.streams {
                    if stream.target_key.is_some_and(is_of_it) {
                        stream.gone[End::Target as usize] = true;
                        if !stream.is_done_at(End::Program) && !stream.may_fail() {
                            let number = stream.number;
                            return Err(format!("stream {number} loses its session at the target"));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn stream_of_client(&self, event: &StreamEvent, id: SessionId) -> Option<usize> {
        let (StreamEvent::Opened { stream, .. }
        | StreamEvent::Open { stream, .. }
        | StreamEvent::Readable(stream)
        | StreamEvent::Writable(stream)
        | StreamEvent::Reset(stream)) = event;
        let key = Some((id, *stream));
        self.streams.iter().position(|stream| stream.key == key)
    }

    pub(crate) fn open_stream(&mut self, number: usize) -> Result<(), String> {
        let client = self.streams[number].client;
        let stream = &mut self.streams[number];
        if stream.gone[End::Program as usize] {
            return Ok(());
        }
        stream.has_begun = true;
        stream.is_lied_to |= self.endpoints[client].is_lied_to;
        if self.endpoints[client].is_down || self.endpoints[client].is_suspended() {
            stream.was_refused = true;
            stream.gone[End::Program as usize] = true;
            return Ok(());
        }
        let wall_ms = self.endpoints[client].wall_ms(self.wall_ms());
        let target: Target = format!("stream-{number}.test:80").parse().expect("a good target");
        let now = self.endpoints[client].clock(self.now);
        let rng = &mut self.rng;
        let Role::Client(core) = &mut self.endpoints[client].role else {
            return Err("a provider opens no streams".to_owned());
        };
        let key = core.open(now, wall_ms, rng, 0, target).ok_or("a client opens no stream")?;
        self.streams[number].key = Some(key);
        let start = Start { client, began: self.now, time_ms: start_time_ms(wall_ms) };
        self.starts.entry(key.0).or_insert(start);
        self.note(format!("client {client} opens stream {number}"));
        self.run_app(number, End::Program)
    }

    pub(crate) fn dialled(&mut self, number: usize) -> Result<(), String> {
        if self.endpoints[0].is_suspended() {
            self.at(self.now + AWAKE_AGAIN, Event::Dialled(number));
            return Ok(());
        }
        let Some(key) = self.streams[number].target_key else { return Ok(()) };
        let outcome = self.streams[number].outcome;
        self.provider().opened(key, outcome);
        if outcome == OpenOutcome::Connected {
            self.at(self.now, Event::App(number, End::Target));
        } else {
            self.provider().release(key);
            self.streams[number].gone[End::Target as usize] = true;
        }
        self.settle(0)
    }

    fn opened(&mut self, number: usize, outcome: OpenOutcome) -> Result<(), String> {
        self.streams[number].check_opened(outcome)?;
        self.note(format!("stream {number}: {outcome}"));
        if outcome == OpenOutcome::Connected {
            self.at(self.now, Event::App(number, End::Program));
            return Ok(());
        }
        self.let_go(number, End::Program)
    }

    fn reset_seen(&mut self, number: usize, end: End) -> Result<(), String> {
        if self.streams[number].gone[end as usize] {
            return Ok(());
        }
        self.note(format!("stream {number} is reset, sees the {end:?}"));
        self.streams[number].check_reset(end)?;
        self.let_go(number, end)
    }

    fn let_go(&mut self, number: usize, end: End) -> Result<(), String> {
        let stream = &mut self.streams[number];
        stream.was_left |= !stream.is_done_at(end);
        stream.gone[end as usize] = true;
        let (client, key) = (stream.client, self.key(number, end));
        let Some(key) = key else { return Ok(()) };
        match (end, &mut self.endpoints[if end == End::Program { client } else { 0 }].role) {
            (End::Program, Role::Client(core)) => core.release(key),
            (End::Target, Role::Provider(core)) => core.release(key),
            _ => return Err("an end at the wrong endpoint".to_owned()),
        }
        Ok(())
    }

    fn key(&self, number: usize, end: End) -> Option<StreamKey> {
        match end {
            End::Program => self.streams[number].key,
            End::Target => self.streams[number].target_key,
        }
    }

    /// Lets the program at one end do what it wants to do now.
    pub(crate) fn run_app(&mut self, number: usize, end: End) -> Result<(), String> {
        let endpoint = match end {
            End::Program => self.streams[number].client,
            End::Target => 0,
        };
        if self.endpoints[endpoint].is_suspended() {
            return Ok(());
        }
        if let Some(key) = self.key(number, end)
            && !self.streams[number].gone[end as usize]
        {
            self.act(number, end, key)?;
        }
        self.settle(endpoint)
    }

    /// Programs whose time came while their machine stood still go on.
    pub(crate) fn wake_apps(&mut self, endpoint: usize) {
        for number in 0..self.streams.len() {
            if endpoint == 0 {
                self.at(self.now, Event::App(number, End::Target));
            } else if endpoint == self.streams[number].client && self.streams[number].has_begun {
                self.at(self.now, Event::App(number, End::Program));
            }
        }
    }

    fn act(&mut self, number: usize, end: End, key: StreamKey) -> Result<(), String> {
        if self.streams[number].is_time_to_leave(end, self.elapsed()) {
            return self.let_go(number, end);
        }
        let is_open = self.streams[number].opened == Some(OpenOutcome::Connected);
        if end == End::Target || is_open {
            if self.streams[number].wants_to_leave(end) {
                return self.let_go(number, end);
            }
            if !self.read_some(number, end, key)? {
                return Ok(());
            }
        }
        if self.streams[number].plan(end).silent_until > self.elapsed() {
            return Ok(());
        }
        while let Some(len) = self.streams[number].next_chunk(end) {
            let at = self.streams[number].writing(end).written;
            let bytes = self.streams[number].bytes(end, at, len);
            let Some(taken) = self.with_core(number, end, |core| core.write(key, &bytes)) else {
                return self.failed(number, end);
            };
            self.streams[number].writing_mut(end).written += taken as u64;
            let pause = self.streams[number].plan(end).pause;
            if taken < len {
                return Ok(());
            }
            if !pause.is_zero() {
                self.at(self.now + pause, Event::App(number, end));
                return Ok(());
            }
        }
        if self.streams[number].wants_to_finish(end) && (end == End::Target || is_open) {
            self.with_core(number, end, |core| core.finish(key));
            self.streams[number].writing_mut(end).finished = true;
        }
        if self.streams[number].is_done_at(end) {
            return self.let_go(number, end);
        }
        Ok(())
    }

    /// Reads what the plan says; `false` when nothing more is to be done now.
    fn read_some(&mut self, number: usize, end: End, key: StreamKey) -> Result<bool, String> {
        let now = self.elapsed();
        let mut buffer = vec![0; self.streams[number].plan(end).reads.min(READ_BYTES)];
        while !self.streams[number].writing(end.other()).end_read {
            match self.with_core(number, end, |core| core.read(key, &mut buffer)) {
                Ok(None) => break,
                Ok(Some(0)) => self.streams[number].check_end(end, now)?,
                Ok(Some(len)) => {
                    self.streams[number].check_read(end, now, &buffer[..len])?;
                    if self.streams[number].wants_to_leave(end) {
                        self.let_go(number, end)?;
                        return Ok(false);
                    }
                    let rest = self.streams[number].plan(end).rest;
                    if !rest.is_zero() {
                        self.at(self.now + rest, Event::App(number, end));
                        break;
                    }
                }
                Err(_) => {
                    self.failed(number, end)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// A read or write fails: the stream was reset, or its session is gone.
    fn failed(&mut self, number: usize, end: End) -> Result<(), String> {
        self.reset_seen(number, end)
    }

    fn with_core<T>(&mut self, number: usize, end: End, act: impl FnOnce(&mut dyn Core) -> T) -> T {
        let endpoint = match end {
            End::Program => self.streams[number].client,
            End::Target => 0,
        };
        match &mut self.endpoints[endpoint].role {
            Role::Client(core) => act(core.as_mut()),
            Role::Provider(core) => act(core.as_mut()),
        }
    }
}

enum Seen {
    ByClient(ClientEvent),
    ByProvider(ProviderEvent),
}

/// What both cores do for a stream.
trait Core {
    fn write(&mut self, key: StreamKey, bytes: &[u8]) -> Option<usize>;
    fn read(&mut self, key: StreamKey, out: &mut [u8]) -> Result<Option<usize>, ()>;
    fn finish(&mut self, key: StreamKey);
}

impl<R> Core for mixsocks_client::core::ClientCore<R> {
    fn write(&mut self, key: StreamKey, bytes: &[u8]) -> Option<usize> {
        Self::write(self, key, bytes)
    }

    fn read(&mut self, key: StreamKey, out: &mut [u8]) -> Result<Option<usize>, ()> {
        Self::read(self, key, out).map_err(drop)
    }

    fn finish(&mut self, key: StreamKey) {
        Self::finish(self, key);
    }
}

impl Core for mixsocks_provider::core::ProviderCore {
    fn write(&mut self, key: StreamKey, bytes: &[u8]) -> Option<usize> {
        Self::write(self, key, bytes)
    }

    fn read(&mut self, key: StreamKey, out: &mut [u8]) -> Result<Option<usize>, ()> {
        Self::read(self, key, out).map_err(drop)
    }

    fn finish(&mut self, key: StreamKey) {
        Self::finish(self, key);
    }
}

fn number_of(target: &Target) -> Option<usize> {
    let Target::Host(name, _) = target else { return None };
    name.as_str().strip_prefix("stream-")?.strip_suffix(".test")?.parse().ok()
}
