//! What each stream should do: two byte queues, and what the programs at its ends do with them.
//!
//! What arrives must be a prefix of what was written, in order, and whole at the end. A stream may
//! fail only when a program reset it, the target refused, or a fault allows it.

use std::sync::OnceLock;
use std::time::Duration;

use mixsocks_client::stream::StreamKey;
use mixsocks_common::session::OpenOutcome;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// Bytes after which what an end writes begins again: a prime, so that no round number of bytes too many
/// or too few goes unnoticed.
const PATTERN_BYTES: usize = 1_048_573;
/// By so much the directions of streams differ in where they begin.
const PATTERN_STEP: u64 = 10_007;

/// One of the two ends of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The program behind the client.
    Program,
    /// The target behind the provider.
    Target,
}

impl End {
    pub(crate) fn other(self) -> Self {
        match self {
            End::Program => End::Target,
            End::Target => End::Program,
        }
    }
}

/// What the program at one end does.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Bytes that it writes before it ends its direction.
    pub(crate) writes: u64,
    pub(crate) chunk: usize,
    /// Between two chunks.
    pub(crate) pause: Duration,
    /// Nothing is written before: a server that has news after a long silence.
    pub(crate) silent_until: Duration,
    /// Waits with its end until the other one has ended, as a server does that answers.
    pub(crate) answers: bool,
    /// How much it reads at a time, and how long it rests then.
    pub(crate) reads: usize,
    pub(crate) rest: Duration,
    /// Lets go when it has read so many bytes, whatever is under way.
    pub(crate) leaves_after: Option<u64>,
    /// Lets go at this time, whatever is under way: also while the stream is being opened.
    pub(crate) leaves_at: Option<Duration>,
}

impl Plan {
    /// It writes so many bytes, in chunks with a pause after each, and reads all that there is.
    pub(crate) fn steady(writes: u64, chunk: usize, pause: Duration) -> Self {
        Self {
            writes,
            chunk,
            pause,
            silent_until: Duration::ZERO,
            answers: false,
            reads: 1 << 16,
            rest: Duration::ZERO,
            leaves_after: None,
            leaves_at: None,
        }
    }

    fn draw(rng: &mut StdRng) -> Self {
        let writes = match rng.random_range(0..10) {
            0 => 0,
            1..=5 => rng.random_range(1..3000),
            6..=8 => rng.random_range(3000..200_000),
            _ => rng.random_range(200_000..1_500_000),
        };
        let pause = if rng.random_bool(0.3) { rng.random_range(1..500) } else { 0 };
        let silent_until = if rng.random_bool(0.2) { rng.random_range(0..220) } else { 0 };
        let rest = if rng.random_bool(0.2) { rng.random_range(1..300) } else { 0 };
        Self {
            writes,
            chunk: rng.random_range(1..100_000).max(usize::try_from(writes).unwrap_or(1) / 100),
            pause: Duration::from_millis(pause),
            silent_until: Duration::from_secs(silent_until),
            answers: rng.random_bool(0.4),
            reads: rng.random_range(10_000..65_536),
            rest: Duration::from_millis(rest),
            leaves_after: rng.random_bool(0.1).then(|| rng.random_range(0..50_000)),
            leaves_at: None,
        }
    }
}

/// One direction of a stream.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    pub(crate) written: u64,
    pub(crate) read: u64,
    pub(crate) finished: bool,
    pub(crate) end_read: bool,
    /// When something was read last.
    last_read: Option<Duration>,
    /// The longest time from one read to the next, or to the end.
    pub(crate) longest_pause: Duration,
}

impl Direction {
    fn note_read(&mut self, now: Duration) {
        let last = self.last_read.replace(now).unwrap_or(now);
        self.longest_pause = self.longest_pause.max(now - last);
    }
}

/// A stream and all that is known about it.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) number: usize,
    pub(crate) client: usize,
    pub(crate) opens_at: Duration,
    pub(crate) outcome: OpenOutcome,
    /// How long the target takes to answer the connection.
    pub(crate) dialling: Duration,
    plans: [Plan; 2],
    /// From the program, and from the target.
    directions: [Direction; 2],
    /// What the client and the provider call it.
    pub(crate) key: Option<StreamKey>,
    pub(crate) target_key: Option<StreamKey>,
    pub(crate) has_begun: bool,
    pub(crate) was_retried: bool,
    /// Which ends have let go.
    pub(crate) gone: [bool; 2],
    pub(crate) opened: Option<OpenOutcome>,
    /// An end left before both directions had ended.
    pub(crate) was_left: bool,
    /// It failed because of a fault that allows it.
    pub(crate) was_killed: bool,
    /// Its provider lies, so that whatever its program sees means nothing.
    pub(crate) is_lied_to: bool,
    /// The client could not open it.
    pub(crate) was_refused: bool,
}

impl Stream {
    pub(crate) fn draw(rng: &mut StdRng, number: usize, clients: usize) -> Self {
        let outcome = match rng.random_range(0..20) {
            0 => OpenOutcome::Refused,
            1 => OpenOutcome::HostUnreachable,
            _ => OpenOutcome::Connected,
        };
        let client = rng.random_range(1..=clients);
        let opens_at = Duration::from_secs_f64(rng.random_range(0.0..30.0));
        let dialling = Duration::from_millis(rng.random_range(0..300));
        let mut plans = [Plan::draw(rng), Plan::draw(rng)];
        for plan in &mut plans {
            let after = Duration::from_secs_f64(rng.random_range(0.0..3.0));
            plan.leaves_at = rng.random_bool(0.05).then_some(opens_at + after);
        }
        Self { outcome, dialling, ..Self::planned(number, client, opens_at, plans) }
    }

    /// A stream to a target that answers at once.
    pub(crate) fn planned(
        number: usize,
        client: usize,
        opens_at: Duration,
        plans: [Plan; 2],
    ) -> Self {
        Self {
            number,
            client,
            opens_at,
            outcome: OpenOutcome::Connected,
            dialling: Duration::ZERO,
            plans,
            directions: Default::default(),
            key: None,
            target_key: None,
            has_begun: false,
            was_retried: false,
            gone: [false; 2],
            opened: None,
            was_left: false,
            was_killed: false,
            is_lied_to: false,
            was_refused: false,
        }
    }

    pub(crate) fn plan(&self, end: End) -> &Plan {
        &self.plans[end as usize]
    }

    /// The bytes that this end writes.
    pub(crate) fn writing(&self, end: End) -> &Direction {
        &self.directions[end as usize]
    }

    pub(crate) fn writing_mut(&mut self, end: End) -> &mut Direction {
        &mut self.directions[end as usize]
    }

    /// The bytes that an end writes from `offset` on.
    pub(crate) fn bytes(&self, end: End, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let piece = self.piece(end, offset + bytes.len() as u64);
            bytes.extend_from_slice(&piece[..piece.len().min(len - bytes.len())]);
        }
        bytes
    }

    /// Some of the bytes that an end writes from `offset` on: a part of one long pattern, which each
    /// direction of each stream begins elsewhere.
    fn piece(&self, end: End, offset: u64) -> &'static [u8] {
        static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
        let pattern = PATTERN.get_or_init(|| {
            let mut bytes = vec![0; PATTERN_BYTES];
            StdRng::seed_from_u64(1).fill_bytes(&mut bytes);
            bytes
        });
        let begins = (2 * self.number + end as usize) as u64 * PATTERN_STEP;
        let at = (begins + offset) % PATTERN_BYTES as u64;
        &pattern[usize::try_from(at).expect("within the pattern")..]
    }

    /// Bytes that `end` has read `now`: they must be those that the other one wrote.
    pub(crate) fn check_read(
        &mut self,
        end: End,
        now: Duration,
        bytes: &[u8],
    ) -> Result<(), String> {
        if self.is_lied_to && end == End::Program {
            return Ok(());
        }
        let from = end.other();
        let at = self.writing(from).read;
        // After a failure an end may have begun anew, while what the old one wrote is still under way.
        if at + bytes.len() as u64 > self.writing(from).written && !self.may_fail() {
            return Err(format!("stream {} reads more than was written", self.number));
        }
        if bytes != self.bytes(from, at, bytes.len()) {
            let end = at + bytes.len() as u64;
            let number = self.number;
            return Err(format!("stream {number}: a byte of {at}..{end} from {from:?} is wrong"));
        }
        let direction = self.writing_mut(from);
        direction.read += bytes.len() as u64;
        direction.note_read(now);
        Ok(())
    }

    /// `end` has read the end `now` of what the other one wrote.
    pub(crate) fn check_end(&mut self, end: End, now: Duration) -> Result<(), String> {
        let number = self.number;
        let is_excused = self.may_fail();
        let direction = self.writing_mut(end.other());
        if !is_excused && (!direction.finished || direction.read != direction.written) {
            return Err(format!("stream {number} ends early: {direction:?}"));
        }
        direction.end_read = true;
        direction.note_read(now);
        Ok(())
    }

    /// `end` sees a reset.
    pub(crate) fn check_reset(&mut self, end: End) -> Result<(), String> {
        let is_expected =
            self.was_left || self.may_fail() || self.outcome != OpenOutcome::Connected;
        if is_expected {
            Ok(())
        } else {
            Err(format!("stream {} is reset for no reason at the {end:?}: {self:?}", self.number))
        }
    }

    /// The client is told how opening ended.
    pub(crate) fn check_opened(&mut self, outcome: OpenOutcome) -> Result<(), String> {
        if self.opened.replace(outcome).is_some() {
            return Err(format!("stream {} is opened twice", self.number));
        }
        if outcome != self.outcome && !self.is_lied_to {
            return Err(format!("stream {}: told {outcome:?} of {:?}", self.number, self.outcome));
        }
        Ok(())
    }

    /// Whether `end` has nothing left to do.
    pub(crate) fn is_done_at(&self, end: End) -> bool {
        self.gone[end as usize]
            || (self.writing(end).finished && self.writing(end.other()).end_read)
    }

    /// Whether a fault allows that it fails.
    pub(crate) fn may_fail(&self) -> bool {
        self.was_killed || self.is_lied_to
    }

    /// Whether both ends know that nothing is left to happen.
    pub(crate) fn is_told(&self) -> bool {
        // A program that leaves before its OPEN arrives leaves no target.
        let [program, target] = self.gone;
        program && (target || self.target_key.is_none())
    }

    /// Whether nothing is left to happen, but that some end may have to be told that it failed.
    pub(crate) fn is_over(&self) -> bool {
        self.may_fail() || self.is_told()
    }

    /// Its program begins, or begins anew in another session.
    pub(crate) fn begin_at_program(&mut self) {
        self.key = None;
        let [from_program, from_target] = &mut self.directions;
        (from_program.written, from_program.finished) = (0, false);
        (from_target.read, from_target.end_read) = (0, false);
    }

    /// A target is dialled, once more if the provider was restarted meanwhile.
    pub(crate) fn begin_at_target(&mut self, key: StreamKey) {
        self.target_key = Some(key);
        self.gone[End::Target as usize] = false;
        let [from_program, from_target] = &mut self.directions;
        (from_program.read, from_program.end_read) = (0, false);
        (from_target.written, from_target.finished) = (0, false);
    }

    /// Its client was started anew, and the program has lost its connection.
    pub(crate) fn lose_program(&mut self) {
        if self.has_begun {
            self.was_killed |= !self.is_over();
            self.gone[End::Program as usize] = true;
        }
    }

    /// The provider was started anew. Whose OPEN had not arrived asks once more; all others have lost
    /// their stream.
    pub(crate) fn lose_target(&mut self) {
        self.lose_session();
        self.target_key = None;
    }

    /// The provider ends all sessions.
    pub(crate) fn lose_session(&mut self) {
        let has_arrived = self.opened.is_some() || self.target_key.is_some();
        self.was_killed |= has_arrived && !self.is_over();
    }

    /// What was to arrive has arrived.
    pub(crate) fn check_complete(&self) -> Result<(), String> {
        let may_be_short = self.was_left || self.may_fail() || self.was_refused;
        if may_be_short || self.outcome != OpenOutcome::Connected || self.is_whole() {
            Ok(())
        } else {
            Err(format!("stream {} is over and not whole: {self:?}", self.number))
        }
    }

    /// Whether all that was written has been read, up to the end.
    pub(crate) fn is_whole(&self) -> bool {
        self.directions.iter().all(|d| d.end_read && d.read == d.written)
    }

    /// Whether `end` wants to write more now.
    pub(crate) fn next_chunk(&self, end: End) -> Option<usize> {
        let (plan, direction) = (self.plan(end), self.writing(end));
        let left = usize::try_from(plan.writes - direction.written).ok()?;
        (left > 0 && !direction.finished).then(|| plan.chunk.min(left))
    }

    /// Whether `end` ends its direction now.
    pub(crate) fn wants_to_finish(&self, end: End) -> bool {
        let (plan, direction) = (self.plan(end), self.writing(end));
        let may = !plan.answers || end == End::Program || self.writing(end.other()).end_read;
        !direction.finished && direction.written == plan.writes && may
    }

    /// Whether `end` has read so much that it leaves, whatever is under way.
    pub(crate) fn wants_to_leave(&self, end: End) -> bool {
        let read = self.writing(end.other()).read;
        self.plan(end).leaves_after.is_some_and(|after| read >= after)
    }

    /// Whether the time has come for `end` to leave, whatever is under way.
    pub(crate) fn is_time_to_leave(&self, end: End, now: Duration) -> bool {
        self.plan(end).leaves_at.is_some_and(|at| now >= at)
    }
}
