//! What everybody may hold at most, by the constants of the code.

use mixsocks_client::core::ClientCore;
use mixsocks_client::{MAX_AWAITED_REPLIES, MAX_READY_SURBS};
use mixsocks_common::gateway::delivery::{self, Delivery};
use mixsocks_common::session::{
    self, INITIAL_WINDOW_BYTES, MAX_SESSIONS, MAX_STOCK_SURBS, SEND_AHEAD_BYTES, WINDOW_POOL_BYTES,
};
use mixsocks_provider::core::{self, ProviderCore};
use mixsocks_sphinx::SURB_LEN;

use crate::codec::Codec;
use crate::endpoint::Role;
use crate::world::{PACKET_BYTES, World};

/// What a stream takes beside its bytes, at most.
const STREAM_STATE_BYTES: u64 = 1024;

impl<C: Codec> World<C> {
    pub(crate) fn check_bounds(&self) -> Result<(), String> {
        for mix in &self.mixes {
            at_most(self.max_held_packets, mix.core.held(), "packets in a mix")?;
        }
        let packet_bytes = PACKET_BYTES;
        for inbox in self.gateways.iter().flat_map(|gateway| gateway.clients.values()) {
            check_delivery(&inbox.delivery, packet_bytes)?;
        }
        for endpoint in &self.endpoints {
            if let Some(flow) = &endpoint.flow {
                check_delivery(&flow.delivery, packet_bytes)?;
            }
            match &endpoint.role {
                Role::Provider(core) => check_provider(core)?,
                Role::Client(core) => check_client(core)?,
            }
        }
        Ok(())
    }
}

fn check_delivery<P>(delivery: &Delivery<P>, packet_bytes: usize) -> Result<(), String> {
    let held_bytes = delivery.len() * packet_bytes;
    at_most(delivery::MAX_HELD_BYTES, held_bytes, "bytes for one end of a link")
}

fn check_client<R>(core: &ClientCore<R>) -> Result<(), String> {
    let (ready, awaited) = core.surb_counts();
    at_most(MAX_READY_SURBS, ready, "ready SURBs")?;
    at_most(MAX_AWAITED_REPLIES, awaited, "awaited replies")?;
    // Streams are opened while the first session is young; one that has ended is forgotten at once.
    at_most(1, core.sessions().len(), "sessions of a client")?;
    core.sessions().try_for_each(|session| {
        let max_bytes = max_stream_bytes(session.stream_count());
        at_most(max_bytes, session.held_bytes(), "bytes of a client's streams")
    })
}

fn check_provider(core: &ProviderCore) -> Result<(), String> {
    at_most(MAX_SESSIONS, core.session_count(), "sessions of the provider")?;
    at_most(core::MAX_HELD_BYTES, core.held_bytes(), "bytes of the provider")?;
    core.sessions().try_for_each(|session| {
        at_most(MAX_STOCK_SURBS, session.stock_surbs(), "SURBs of a session")?;
        let max_bytes = max_stream_bytes(session.stream_count()) + session.stock_surbs() * SURB_LEN;
        at_most(max_bytes, session.held_bytes(), "bytes of a session")
    })
}

/// What the streams of a session may hold: their windows and the pool of all in one direction, what
/// was granted and what is taken ahead of it in the other.
fn max_stream_bytes(streams: usize) -> usize {
    let of_each = INITIAL_WINDOW_BYTES + session::MAX_HELD_BYTES + SEND_AHEAD_BYTES;
    let all = WINDOW_POOL_BYTES + streams as u64 * (of_each + STREAM_STATE_BYTES);
    usize::try_from(all).expect("few streams")
}

fn at_most(max: usize, count: usize, what: &str) -> Result<(), String> {
    if count > max { Err(format!("{count} {what}, more than {max}")) } else { Ok(()) }
}
