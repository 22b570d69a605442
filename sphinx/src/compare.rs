//! What packets and SURBs cost, beside the crate `sphinx-packet` in the same run.
//!
//! Times of different runs cannot be compared: the clock of a CPU and its other work change. So
//! every operation is timed alternately, once as this crate does it and once as `sphinx-packet`
//! does, and what counts is the median of either.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;
use sphinx_packet::{SURB, SURBMaterial, SphinxPacket, SphinxPacketBuilder, payload};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::{
    Hop, MAX_HOPS, Packet, Payload, Peeled, ReplyRecovery, Route, SecretKey, Surb, VERSION,
    build_headers, build_packets, build_surbs, fill_headers, finish, max_plaintext, open_headers,
    payload_layers, recover_replies, use_surbs, x25519,
};

/// The operations that are compared. Routes have [`MAX_HOPS`] hops, plaintexts fill the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// One multiplication of a point by a secret.
    X25519,
    /// Both phases of peeling a packet that is to be passed on.
    Peel,
    /// Building a packet.
    Build,
    /// Making a packet of a header that was built before, beside building a packet.
    Fill,
    /// Building a SURB.
    BuildSurb,
    /// Making a reply packet of a SURB.
    UseSurb,
    /// Opening a reply that has arrived.
    Recover,
    /// Taking a layer off a payload: what peeling does with it.
    Layer,
}

/// What one operation costs.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Median time per packet with this crate.
    pub ours: Duration,
    /// Median time per packet with `sphinx-packet`, which knows no batches.
    pub reference: Duration,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::X25519,
        Self::Peel,
        Self::Build,
        Self::Fill,
        Self::BuildSurb,
        Self::UseSurb,
        Self::Recover,
        Self::Layer,
    ];

    /// Measures for about `time`, but at least three times, with batches of `batch` packets whose
    /// payloads have `payload_len` bytes.
    ///
    /// # Panics
    ///
    /// Panics if `batch` is zero or `payload_len` less than [`crate::MIN_PAYLOAD_LEN`].
    #[must_use]
    pub fn compare(self, payload_len: usize, batch: usize, time: Duration) -> Cost {
        assert!(batch > 0);
        let fixture = Fixture::new(payload_len, batch);
        match self {
            Self::X25519 => fixture.x25519(time),
            Self::Peel => fixture.peel(time),
            Self::Build => fixture.build(time),
            Self::Fill => fixture.fill(time),
            Self::BuildSurb => fixture.build_surb(time),
            Self::UseSurb => fixture.use_surb(time),
            Self::Recover => fixture.recover(time),
            Self::Layer => fixture.layer(time),
        }
    }
}

/// One route, and what travels along it.
struct Fixture {
    payload_len: usize,
    batch: usize,
    keys: Vec<SecretKey>,
    route: Route,
    plaintext: Vec<u8>,
}

impl Fixture {
    fn new(payload_len: usize, batch: usize) -> Self {
        let mut rng = rng();
        let keys: Vec<_> = (0..MAX_HOPS).map(|_| SecretKey::generate(&mut rng)).collect();
        let hops: Vec<_> = keys
            .iter()
            .map(|key| Hop { address: [1; 32], key: key.public_key(), delay: Duration::ZERO })
            .collect();
        let route = Route::new(&hops, [2; 32], [3; 16]).expect("the most hops of a route");
        let plaintext = vec![4; max_plaintext(payload_len)];
        Self { payload_len, batch, keys, route, plaintext }
    }

    fn x25519(&self, time: Duration) -> Cost {
        let secret = self.keys[0].secret();
        let point = PublicKey::from(*self.keys[1].public_key().as_bytes());
        self.alternate(
            time,
            || vec![point; self.batch],
            |points| {
                let operations: Vec<_> =
                    points.iter().map(|point| (secret.as_bytes(), point.as_bytes())).collect();
                x25519(&operations)
            },
            || point,
            |point| secret.diffie_hellman(&point),
        )
    }

    fn peel(&self, time: Duration) -> Cost {
        let packet = self.packet();
        let key = &self.keys[0];
        self.alternate(
            time,
            || vec![packet.clone(); self.batch],
            |packets| peel(key, packets),
            || SphinxPacket::from_bytes(packet.as_bytes()).expect(OURS_IS_THEIRS),
            |packet| packet.process(key.secret()).is_ok(),
        )
    }

    fn build(&self, time: Duration) -> Cost {
        let mut rng = rng();
        self.alternate(
            time,
            || vec![(self.route.clone(), &self.plaintext[..]); self.batch],
            |requests| build_packets(&mut rng, self.payload_len, &requests),
            || StaticSecret::from([5; 32]),
            |secret| self.build_reference(&secret),
        )
    }

    fn fill(&self, time: Duration) -> Cost {
        let routes = vec![self.route.clone(); self.batch];
        self.alternate(
            time,
            || {
                let headers = build_headers(&mut rng(), &routes).into_iter();
                headers.map(|header| (header, &self.plaintext[..])).collect()
            },
            |requests| fill_headers(self.payload_len, requests),
            || StaticSecret::from([5; 32]),
            |secret| self.build_reference(&secret),
        )
    }

    fn build_reference(&self, secret: &StaticSecret) -> SphinxPacket {
        SphinxPacketBuilder::new()
            .with_version(VERSION)
            .with_payload_size(self.payload_len)
            .with_initial_secret(secret)
            .build_packet(
                &self.plaintext,
                self.route.nodes(),
                self.route.destination(),
                self.route.delays(),
            )
            .expect("a route has its length, and the plaintext fits")
    }

    fn build_surb(&self, time: Duration) -> Cost {
        let mut rng = rng();
        self.alternate(
            time,
            || vec![self.route.clone(); self.batch],
            |routes| build_surbs(&mut rng, &routes),
            || {
                SURBMaterial::new(
                    self.route.nodes().to_vec(),
                    self.route.delays().to_vec(),
                    self.route.destination().clone(),
                    VERSION,
                )
            },
            |material| SURB::new_recoverable(StaticSecret::from([5; 32]), material),
        )
    }

    fn use_surb(&self, time: Duration) -> Cost {
        let (surb, _) = self.surb();
        let copy = || Surb::from_bytes(surb.as_bytes()).expect("a SURB of ours");
        self.alternate(
            time,
            || (0..self.batch).map(|_| (copy(), &self.plaintext[..])).collect(),
            |requests| use_surbs(self.payload_len, requests),
            || SURB::from_bytes(surb.as_bytes()).expect(OURS_IS_THEIRS),
            |surb| surb.use_surb(&self.plaintext, self.payload_len),
        )
    }

    fn recover(&self, time: Duration) -> Cost {
        let (surb, recovery) = self.surb();
        let used = use_surbs(self.payload_len, vec![(surb, &self.plaintext)]).remove(0);
        let (_, packet) = used.expect("the plaintext fits");
        let payload = self.travel(packet);
        let (theirs, their_payload) = (recovery.to_reference(), payload.copy().remove_layer());
        self.alternate(
            time,
            || (0..self.batch).map(|_| (recovery.copy(), payload.copy())).collect(),
            recover_replies,
            || payload::Payload::from_bytes(&their_payload).expect(OURS_IS_THEIRS),
            |payload| theirs.recover_plaintext(payload),
        )
    }

    fn layer(&self, time: Duration) -> Cost {
        let payload = vec![5; self.payload_len];
        self.alternate(
            time,
            || vec![payload.clone(); self.batch],
            |mut payloads| {
                payload_layers::remove(payloads.iter_mut().map(|bytes| (&[6; 16], &mut bytes[..])));
                payloads
            },
            || payload::Payload::from_bytes(&payload).expect(OURS_IS_THEIRS),
            |payload| payload.unwrap(payload::key::derive_payload_key(&[6; 16])),
        )
    }

    fn packet(&self) -> Packet {
        let request = (self.route.clone(), &self.plaintext[..]);
        build_packets(&mut rng(), self.payload_len, &[request]).remove(0).expect("it fits")
    }

    fn surb(&self) -> (Surb, ReplyRecovery) {
        let routes = std::slice::from_ref(&self.route);
        build_surbs(&mut rng(), routes).remove(0).expect("the identifier is not zero")
    }

    /// What arrives at the last hop.
    fn travel(&self, mut packet: Packet) -> Payload {
        for key in &self.keys {
            match peel(key, vec![packet]).remove(0) {
                Peeled::Forward { packet: next, .. } => packet = next,
                Peeled::Final { payload, .. } => return payload,
            }
        }
        unreachable!("the last hop ends the journey");
    }

    /// Calls the two alternately: ours for a batch, the reference for each packet of one. What they
    /// consume is made, and what they return is dropped, while the clock stands.
    fn alternate<A, B, C, D>(
        &self,
        time: Duration,
        make_ours: impl Fn() -> A,
        mut ours: impl FnMut(A) -> B,
        make_reference: impl Fn() -> C,
        mut reference: impl FnMut(C) -> D,
    ) -> Cost {
        let (mut our_times, mut reference_times) = (Vec::new(), Vec::new());
        let started = Instant::now();
        while our_times.len() < 3 || started.elapsed() < time {
            our_times.push(timed(&make_ours, &mut ours));
            let one_by_one = (0..self.batch).map(|_| timed(&make_reference, &mut reference));
            reference_times.push(one_by_one.sum());
        }
        let batch = u32::try_from(self.batch).expect("batches are small");
        Cost {
            ours: median(&mut our_times) / batch,
            reference: median(&mut reference_times) / batch,
        }
    }
}

const OURS_IS_THEIRS: &str = "both crates have the same format";

fn rng() -> StdRng {
    StdRng::seed_from_u64(1)
}

fn peel(key: &SecretKey, packets: Vec<Packet>) -> Vec<Peeled> {
    let opened = open_headers(key, packets).into_iter().flatten().collect();
    finish(opened).into_iter().flatten().collect()
}

fn timed<A, B>(make: impl Fn() -> A, run: impl FnOnce(A) -> B) -> Duration {
    let input = black_box(make());
    let started = Instant::now();
    let output = black_box(run(input));
    let time = started.elapsed();
    drop(output);
    time
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_compared() {
        for operation in Operation::ALL {
            for batch in [1, 3] {
                let Cost { ours, reference } = operation.compare(64, batch, Duration::ZERO);
                assert!(!ours.is_zero() && !reference.is_zero(), "{operation:?}");
            }
        }
    }

    #[test]
    fn a_reply_is_opened_by_both() {
        let fixture = Fixture::new(64, 1);
        let (surb, recovery) = fixture.surb();
        let (_, packet) = use_surbs(64, vec![(surb, b"hello")]).remove(0).expect("it fits");
        let payload = fixture.travel(packet);
        let (theirs, padded) = (recovery.to_reference(), payload.copy().remove_layer());
        let opened =
            payload::Payload::from_bytes(&padded).and_then(|p| theirs.recover_plaintext(p));
        assert_eq!(opened.expect("the right recovery"), b"hello");
        assert_eq!(
            recover_replies(vec![(recovery.copy(), payload.copy())]),
            [Ok(b"hello".to_vec())]
        );
    }

    #[test]
    fn medians() {
        let ms = Duration::from_millis;
        assert_eq!(median(&mut [ms(9), ms(1), ms(2)]), ms(2));
        assert_eq!(median(&mut [ms(4)]), ms(4));
    }
}
