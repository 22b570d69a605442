//! Streams that end at every moment, and sessions whose other end is gone.

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Finish,
    Leave,
}

/// Two programs that talk; one of them ends at some moment.
struct Talk {
    world: World,
    stream: StreamId,
    /// What the client and the provider have read, and whether up to the end.
    read: [(Vec<u8>, bool); 2],
    is_connected: bool,
    finished: [bool; 2],
}

const ASKED: &[u8] = &[1; 5_000];
const ANSWERED: &[u8] = &[2; 20_000];

impl Talk {
    fn new(seed: u64) -> Self {
        let mut world = World::new(seed, Network { loss: 0.1, ..Network::perfect() });
        let stream = world.client.open("example.com:80".parse().unwrap()).unwrap();
        assert_eq!(world.client.write(stream, ASKED), Some(ASKED.len()));
        Self { world, stream, read: Default::default(), is_connected: false, finished: [false; 2] }
    }

    /// Lets something happen; both programs read, and answer an end with theirs.
    fn step(&mut self) {
        assert!(self.world.step(), "nothing happens any more");
        for event in self.world.provider_events.drain(..).collect::<Vec<_>>() {
            match event {
                StreamEvent::Open { stream, .. } => {
                    assert!(!self.is_connected, "dialled twice");
                    self.is_connected = true;
                    self.world.provider().opened(stream, OpenOutcome::Connected);
                    self.world.provider().write(stream, ANSWERED).unwrap();
                }
                StreamEvent::Reset(stream) => self.world.provider().release(stream),
                _ => {}
            }
        }
        for event in self.world.client_events.drain(..).collect::<Vec<_>>() {
            if let StreamEvent::Reset(stream) = event {
                self.world.client.release(stream);
            }
        }
        self.read_all(0);
        if self.is_connected {
            self.read_all(1);
        }
    }

    fn read_all(&mut self, end: usize) {
        let mut chunk = [0; 10_000];
        let (world, stream) = (&mut self.world, self.stream);
        loop {
            let read = match end {
                0 => world.client.read(stream, &mut chunk),
                _ => world.provider().read(stream, &mut chunk),
            };
            let Ok(Some(len)) = read else { return };
            if len == 0 {
                self.read[end].1 = true;
                return self.end(end, Ending::Finish);
            }
            self.read[end].0.extend_from_slice(&chunk[..len]);
        }
    }

    fn end(&mut self, end: usize, ending: Ending) {
        let (world, stream) = (&mut self.world, self.stream);
        match (end, ending) {
            (0, Ending::Finish) => world.client.finish(stream),
            (0, Ending::Leave) => world.client.release(stream),
            (_, Ending::Finish) => world.provider().finish(stream),
            (_, Ending::Leave) => world.provider().release(stream),
        }
        self.finished[end] |= ending == Ending::Finish;
        for (end, other) in [(0, 1), (1, 0)] {
            if self.finished[end] && self.read[end].1 && self.finished[other] {
                match end {
                    0 => self.world.client.release(self.stream),
                    _ => self.world.provider().release(self.stream),
                }
            }
        }
    }

    fn is_over(&mut self) -> bool {
        let id = self.world.client.id();
        let at_provider = self.world.sessions.get_mut(id).map_or(0, |it| it.stream_count());
        self.world.client.stream_count() == 0 && at_provider == 0
    }
}

#[test]
fn a_stream_ends_well_at_every_moment() {
    for (end, ending) in
        [(0, Ending::Finish), (1, Ending::Finish), (0, Ending::Leave), (1, Ending::Leave)]
    {
        // Nothing is under way after some 65 steps.
        for moment in 0..70 {
            let mut talk = Talk::new(moment);
            for _ in 0..moment {
                talk.step();
            }
            // A provider without the stream has nothing to end.
            while end == 1 && !talk.is_connected {
                talk.step();
            }
            talk.end(end, ending);
            let ended = talk.world.now;
            while !talk.is_over() {
                talk.step();
                let time = talk.world.now - ended;
                assert!(time < Duration::from_secs(60), "{end} {ending:?} at {moment}: not over");
            }
            let [answer, question] = &talk.read;
            assert!(ANSWERED.starts_with(&answer.0) && ASKED.starts_with(&question.0));
            if ending == Ending::Finish {
                assert!(answer.1 && answer.0.len() == ANSWERED.len(), "{end} at {moment}");
                assert!(question.1 && question.0.len() == ASKED.len(), "{end} at {moment}");
            }
        }
    }
}

#[test]
fn a_close_is_acknowledged() {
    let mut world = World::new(149, Network::perfect());
    world.open();
    world.run_for(Duration::from_secs(5));
    let before = world.sent;
    world.client.close();
    world.run_until(Duration::from_secs(3600), |world| world.client.closed().is_some());
    assert_eq!(world.client.closed(), Some(frame::CloseReason::Done));
    assert_eq!([world.sent[0] - before[0], world.sent[1] - before[1]], [1, 1]);
}

#[test]
fn a_close_that_is_lost_is_repeated_a_few_times() {
    let mut world = World::new(151, Network::perfect());
    world.open();
    world.run_for(Duration::from_secs(5));
    let before = world.sent[0];
    world.client.close();
    world.blackout = true;
    world.run_until(Duration::from_secs(3600), |world| world.client.closed().is_some());
    assert_eq!(world.sent[0] - before, 3);
}

/// Streams have no idle timeout: keepalives are enough.
#[test]
fn a_stream_may_be_idle_for_hours() {
    let mut world = World::new(137, Network { loss: 0.2, ..Network::perfect() });
    let stream = world.open();
    world.run_for(Duration::from_secs(3 * 3600));
    world.client.write(stream, b"still there?").unwrap();
    let mut chunk = [0; 100];
    world.run_until(Duration::from_secs(4 * 3600), |world| {
        world.provider().read(stream, &mut chunk).unwrap().is_some()
    });
}

#[test]
fn whoever_hears_nothing_for_a_quarter_of_an_hour_ends_the_session() {
    let mut world = World::new(139, Network::perfect());
    world.open();
    world.run_for(Duration::from_secs(5));
    world.blackout = true;
    let heard = world.client.last_heard();
    let mut ended = [None; 2];
    world.run_until(Duration::from_secs(3600), |world| {
        let now = world.now;
        if world.client.closed().is_some() {
            ended[0].get_or_insert(now);
        }
        if world.provider().has_ended() {
            ended[1].get_or_insert(now);
        }
        ended.iter().all(Option::is_some)
    });
    assert_eq!(world.client.closed(), Some(frame::CloseReason::Unknown));
    for at in ended.into_iter().flatten() {
        let silence = at - heard;
        assert!(silence >= SESSION_SILENCE - Duration::from_secs(5), "{silence:?}");
        assert!(silence < SESSION_SILENCE + Duration::from_secs(60), "{silence:?}");
    }
}
