//! When to send a PAD, and when the other side is gone.
//!
//! The rules look at the times and the number of frames only, never at what the frames were. An
//! observer sees the same and can apply the rules too, and so recognise most PADs; but as they
//! follow from nothing else, they tell nothing about packets that was not to be seen already.

use std::time::{Duration, Instant};

/// A side that has sent nothing for this long sends a PAD, so that the other side and every
/// address translator on the way know that the connection lives.
pub const PAD_AFTER: Duration = Duration::from_secs(20);

/// A side that has heard nothing for this long (two PADs were lost, and TCP repeats what is lost)
/// closes the connection.
pub const CLOSE_AFTER: Duration = Duration::from_secs(60);

/// A side that has heard this many frames since it last sent one sends a PAD, whose counter lets
/// the other side forget them: 3 % more frames in one direction. Two sides cannot keep each other
/// awake, as each PAD needs 32 frames before it.
pub const PAD_EVERY_FRAMES: u32 = 32;

/// The times of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    sent: Instant,
    heard: Instant,
    heard_since_sent: u32,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Send a PAD.
    Pad,
    /// Nothing was heard for [`CLOSE_AFTER`].
    Close,
}

impl Keepalive {
    /// A connection whose handshake has just ended.
    pub fn new(now: Instant) -> Self {
        Self { sent: now, heard: now, heard_since_sent: 0 }
    }

    /// A frame was sent.
    pub fn sent(&mut self, now: Instant) {
        self.sent = now;
        self.heard_since_sent = 0;
    }

    /// A frame arrived. Poll [`Self::due`] afterwards.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.heard_since_sent = self.heard_since_sent.saturating_add(1);
    }

    /// What is due; after [`Due::Pad`] call [`Self::sent`].
    pub fn due(&self, now: Instant) -> Option<Due> {
        if now >= self.heard + CLOSE_AFTER {
            Some(Due::Close)
        } else if now >= self.sent + PAD_AFTER || self.heard_since_sent >= PAD_EVERY_FRAMES {
            Some(Due::Pad)
        } else {
            None
        }
    }

    /// When to poll [`Self::due`] again if nothing happens before.
    pub fn poll_timeout(&self) -> Instant {
        (self.sent + PAD_AFTER).min(self.heard + CLOSE_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_exact_and_do_not_survive() {
        let start = Instant::now();
        let mut keepalive = Keepalive::new(start);
        assert_eq!(keepalive.poll_timeout(), start + PAD_AFTER);
        assert_eq!(keepalive.due(start + PAD_AFTER - Duration::from_nanos(1)), None);
        let mut now = start;
        for _ in 0..2 {
            now += PAD_AFTER;
            assert_eq!(keepalive.due(now), Some(Due::Pad));
            keepalive.sent(now);
            assert_eq!(keepalive.due(now), None);
            assert!(keepalive.poll_timeout() > now);
        }
        now += PAD_AFTER;
        assert_eq!(keepalive.due(now), Some(Due::Close));
        keepalive.heard(now);
        keepalive.sent(now);
        assert_eq!(keepalive.due(now), None);
    }

    #[test]
    fn many_frames_are_answered_by_one_and_answers_do_not_breed() {
        let now = Instant::now();
        let (mut one, mut two) = (Keepalive::new(now), Keepalive::new(now));
        let (mut answers, mut answers_to_answers) = (0, 0);
        for _ in 0..32 * 32 {
            two.heard(now);
            one.sent(now);
            if two.due(now) == Some(Due::Pad) {
                two.sent(now);
                answers += 1;
                one.heard(now);
                answers_to_answers += u32::from(one.due(now).is_some());
            }
        }
        assert_eq!((answers, answers_to_answers), (32, 0));
    }
}
