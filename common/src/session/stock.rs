//! The SURBs that a provider has for one session, and which it uses next.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mixsocks_sphinx::{SURB_LEN, Surb};

/// SURBs that only control frames may use, so that asking for SURBs never needs one that is not
/// there: enough for an OPENED, a RESET and several reports, some of which are lost.
pub const RESERVE_SURBS: usize = 8;

/// Most SURBs that a provider keeps for one session: 1.6 MB.
pub const MAX_STOCK_SURBS: usize = 4096;

/// How long SURBs of the generation before are kept beside new ones. A client fills the stock within
/// some round trips, or some repeated packets; what has not been used by then is not needed.
const RETIRED_TIME: Duration = Duration::from_secs(10);

/// The SURBs of the newest generation, and those of the one before while there are too few new ones.
#[derive(Debug, Default)]
pub(super) struct SurbStock {
    generation: u64,
    newest: VecDeque<Surb>,
    /// Of the generation before: each new SURB takes the place of one.
    retired: VecDeque<Surb>,
    retired_until: Option<Instant>,
    refused: u64,
}

impl SurbStock {
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// SURBs of the newest generation.
    pub(super) fn newest(&self) -> usize {
        self.newest.len()
    }

    /// SURBs that may be used.
    pub(super) fn len(&self) -> usize {
        self.newest.len() + self.retired.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// SURBs that were thrown away because there were too many or they did not parse.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Takes in SURBs. The first of a higher generation retire those of the one just before it; what
    /// is older than that leads to nowhere, and goes. Those of a lower generation are ignored.
    pub(super) fn take_in(&mut self, now: Instant, generation: u64, surbs: &[[u8; SURB_LEN]]) {
        if generation < self.generation {
            return;
        }
        if generation > self.generation {
            self.retired = std::mem::take(&mut self.newest);
            self.retired_until = Some(now + RETIRED_TIME);
            if generation - self.generation > 1 {
                self.drop_retired();
            }
            self.generation = generation;
        }
        for bytes in surbs {
            match Surb::from_bytes(bytes) {
                Ok(surb) if self.newest.len() < MAX_STOCK_SURBS => {
                    self.newest.push_back(surb);
                    self.retired.pop_front();
                }
                _ => self.refused += 1,
            }
        }
        if self.retired.is_empty() {
            self.drop_retired();
        }
    }

    /// Takes out the SURB for the next reply. Data goes on retired ones while there are no new ones
    /// beyond the reserve; other frames never do if there is a new one, so that they get through
    /// even if the client could not tell in time that its old ones died.
    pub(super) fn pop(&mut self, with_data: bool) -> Option<Surb> {
        let spare = if with_data { RESERVE_SURBS } else { 0 };
        if self.newest.len() > spare {
            return self.newest.pop_front();
        }
        self.retired.pop_front().or_else(|| self.newest.pop_front())
    }

    /// All that are at hand get lost.
    #[cfg(test)]
    pub(super) fn lose(&mut self) {
        self.newest.clear();
        self.drop_retired();
    }

    /// When [`SurbStock::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.retired_until
    }

    /// Throws retired SURBs away when their time is over.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.retired_until.is_some_and(|until| now >= until) {
            self.drop_retired();
        }
    }

    fn drop_retired(&mut self) {
        self.retired.clear();
        self.retired_until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many SURBs that can be told from those of another generation.
    fn surbs(generation: u8, count: usize) -> Vec<[u8; SURB_LEN]> {
        let mut bytes = [0; SURB_LEN];
        // The base point: a group element that a SURB may begin with.
        bytes[0] = 9;
        bytes[SURB_LEN - 1] = generation;
        vec![bytes; count]
    }

    fn generation_of(surb: Option<Surb>) -> Option<u8> {
        surb.map(|surb| surb.as_bytes()[SURB_LEN - 1])
    }

    fn stock(now: Instant, count: usize) -> SurbStock {
        let mut stock = SurbStock::default();
        stock.take_in(now, 0, &surbs(0, count));
        stock
    }

    #[test]
    fn new_ones_take_the_place_of_old_ones_one_by_one() {
        let now = Instant::now();
        let mut stock = stock(now, 20);
        stock.take_in(now, 1, &surbs(1, 5));
        assert_eq!((stock.newest(), stock.len()), (5, 20));
        assert_eq!(generation_of(stock.pop(true)), Some(0), "the reserve is not there yet");
        assert_eq!(generation_of(stock.pop(false)), Some(1));
        stock.take_in(now, 1, &surbs(1, 5));
        assert_eq!((stock.newest(), stock.len()), (9, 18));
        assert_eq!(generation_of(stock.pop(true)), Some(1));
        stock.take_in(now, 1, &surbs(1, 30));
        assert_eq!((stock.newest(), stock.len(), stock.poll_timeout()), (38, 38, None));
    }

    #[test]
    fn old_ones_do_not_outlive_their_time() {
        let now = Instant::now();
        let mut stock = stock(now, 20);
        stock.take_in(now, 1, &surbs(1, 5));
        stock.handle_timeout(now + RETIRED_TIME / 2);
        assert_eq!(stock.len(), 20);
        assert_eq!(stock.poll_timeout(), Some(now + RETIRED_TIME));
        stock.handle_timeout(now + RETIRED_TIME);
        assert_eq!((stock.len(), stock.poll_timeout()), (5, None));
    }

    #[test]
    fn a_generation_that_skips_one_leaves_nothing() {
        let now = Instant::now();
        let mut stock = stock(now, 20);
        stock.take_in(now, 2, &surbs(2, 5));
        assert_eq!((stock.len(), stock.poll_timeout()), (5, None));
        stock.take_in(now, 1, &surbs(1, 5));
        assert_eq!(stock.len(), 5, "those are older");
    }

    #[test]
    fn the_generation_before_the_last_is_gone() {
        let now = Instant::now();
        let mut stock = stock(now, 20);
        stock.take_in(now, 1, &surbs(1, 5));
        stock.take_in(now, 2, &surbs(2, 1));
        assert_eq!((stock.newest(), stock.len()), (1, 5));
        let used: Vec<_> = std::iter::from_fn(|| generation_of(stock.pop(true))).collect();
        assert_eq!(used, [1, 1, 1, 1, 2]);
    }

    #[test]
    fn both_generations_together_are_no_more_than_may_be_kept() {
        let now = Instant::now();
        let mut stock = stock(now, MAX_STOCK_SURBS + 3);
        assert_eq!((stock.len(), stock.refused()), (MAX_STOCK_SURBS, 3));
        stock.take_in(now, 1, &surbs(1, 100));
        assert_eq!((stock.newest(), stock.len()), (100, MAX_STOCK_SURBS));
        stock.take_in(now, 1, &surbs(1, MAX_STOCK_SURBS));
        assert_eq!((stock.len(), stock.refused()), (MAX_STOCK_SURBS, 103));
    }
}
