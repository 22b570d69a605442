//! What clients ask of their gateways, what they are owed for it, and what they may believe then.
//!
//! The numbers are those of the real ends ([`Receiving`](mixsocks_client::gateway::Receiving) and
//! [`InboxCore`](mixsocks_node::gateway::InboxCore)); this is told what they say, and nothing else.

use std::collections::BTreeSet;

use super::world::CLIENTS;

/// The last RECEIVE that a gateway took over the present connection of a client.
#[derive(Debug)]
struct Asked {
    number: u32,
    /// Deliveries that were kept then and have not come to the client.
    owed: BTreeSet<u64>,
    /// It was said that all was sent.
    is_answered: bool,
}

/// How often something went wrong that has to do with RECEIVE.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mishaps {
    /// A RECEIVE, or a CAUGHT_UP, was lost with its connection.
    pub(crate) lost_receives: usize,
    pub(crate) lost_answers: usize,
    /// A CAUGHT_UP was taken in when another RECEIVE had been said.
    pub(crate) late_answers: usize,
    /// A gateway was killed between a RECEIVE and its CAUGHT_UP.
    pub(crate) crashes: usize,
}

impl Mishaps {
    pub(crate) fn add(&mut self, other: Self) {
        self.lost_receives += other.lost_receives;
        self.lost_answers += other.lost_answers;
        self.late_answers += other.late_answers;
        self.crashes += other.crashes;
    }

    pub(crate) fn each(self) -> [usize; 4] {
        [self.lost_receives, self.lost_answers, self.late_answers, self.crashes]
    }
}

/// What all clients have asked for.
pub(crate) struct Asking {
    asked: [Option<Asked>; CLIENTS],
    pub(crate) mishaps: Mishaps,
}

impl Asking {
    pub(crate) fn new() -> Self {
        Self { asked: [const { None }; CLIENTS], mishaps: Mishaps::default() }
    }

    /// A client has a new connection: its gateway knows of no RECEIVE over that.
    pub(crate) fn on_connected(&mut self, client: usize) {
        self.asked[client] = None;
    }

    /// A gateway takes a RECEIVE, and keeps these deliveries for the client.
    pub(crate) fn on_asked(
        &mut self,
        client: usize,
        number: u32,
        kept: BTreeSet<u64>,
    ) -> Result<(), String> {
        let asked = self.asked[client].replace(Asked { number, owed: kept, is_answered: false });
        match asked {
            Some(before) if before.number >= number => {
                Err(format!("client {client} says RECEIVE {number} after {}", before.number))
            }
            _ => Ok(()),
        }
    }

    /// A gateway says that it has sent all that it kept.
    pub(crate) fn on_answered(&mut self, client: usize, number: u32) -> Result<(), String> {
        match &mut self.asked[client] {
            Some(asked) if asked.number == number && !asked.is_answered => {
                asked.is_answered = true;
                Ok(())
            }
            asked => Err(format!("client {client} is told CAUGHT_UP {number}: {asked:?}")),
        }
    }

    /// A delivery comes to a client.
    pub(crate) fn on_delivered(&mut self, client: usize, number: u64) {
        if let Some(asked) = &mut self.asked[client] {
            asked.owed.remove(&number);
        }
    }

    /// The gateway of a client was killed.
    pub(crate) fn on_crash(&mut self, client: usize) {
        if let Some(asked) = self.asked[client].as_mut().filter(|asked| !asked.is_answered) {
            self.mishaps.crashes += 1;
            asked.is_answered = true;
        }
    }

    /// A client whose last RECEIVE had this number believes that all has come that was kept then. What
    /// `is_kept` no more is owed to nobody.
    pub(crate) fn check_belief(
        &mut self,
        client: usize,
        number: u32,
        is_kept: impl Fn(u64) -> bool,
    ) -> Result<(), String> {
        match &mut self.asked[client] {
            Some(asked) if asked.number == number => {
                asked.owed.retain(|number| is_kept(*number));
                match asked.owed.len() {
                    0 => Ok(()),
                    owed => Err(format!(
                        "client {client} takes for all what it got after RECEIVE {number}, and {owed} \
                         deliveries are to come"
                    )),
                }
            }
            asked => Err(format!(
                "client {client} takes RECEIVE {number} for answered, which its gateway does not \
                 know: {asked:?}"
            )),
        }
    }
}
