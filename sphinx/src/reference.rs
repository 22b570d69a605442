//! Headers by the crate `sphinx-packet`: for the backend `reference`.

use sphinx_packet::header::SphinxHeader;
use sphinx_packet::header::keys::KeyMaterial;
use sphinx_packet::header::shared_secret::ExpandedSharedSecret;
use sphinx_packet::packet::builder::SphinxPacketBuilder;
use sphinx_packet::{ErrorKind, ProcessedPacketData, SURB, SURBMaterial, SphinxPacket};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::header::Header;
use crate::payload_layers::Seed;
use crate::wiped::Wiped;
use crate::{
    HEADER_LEN, IDENTIFIER_LEN, MIN_PAYLOAD_LEN, Packet, Payload, PeelError, Peeled, Route,
    SecretKey, VERSION,
};

/// Builds the header of a route from its initial secret. Its padding is that of the crate.
pub(crate) fn build_header(secret: &[u8; 32], route: &Route) -> Header {
    if route.identifier() == [0; IDENTIFIER_LEN] {
        header_of_packet(secret, route)
    } else {
        header_of_surb(secret, route)
    }
}

/// The crate hands out headers with their seeds as SURBs, unless the identifier is zero.
fn header_of_surb(secret: &[u8; 32], route: &Route) -> Header {
    let material = SURBMaterial::new(
        route.nodes().to_vec(),
        route.delays().to_vec(),
        route.destination().clone(),
        VERSION,
    );
    let (surb, recovery) = SURB::new_recoverable(StaticSecret::from(*secret), material)
        .expect("a route has its length, and its identifier is not zero");
    let surb = Zeroizing::new(surb.to_bytes());
    let kept = Zeroizing::new(recovery.to_bytes());
    let bytes = surb.first_chunk::<HEADER_LEN>().expect("a SURB starts with a header");
    let (seeds, _) = kept[IDENTIFIER_LEN..].as_chunks::<{ size_of::<Seed>() }>();
    header(bytes, seeds.iter())
}

/// Otherwise in a packet, and the seeds have to be derived once more.
fn header_of_packet(secret: &[u8; 32], route: &Route) -> Header {
    let secret = StaticSecret::from(*secret);
    let packet = SphinxPacketBuilder::new()
        .with_version(VERSION)
        .with_payload_size(MIN_PAYLOAD_LEN)
        .with_initial_secret(&secret)
        .build_packet(b"", route.nodes(), route.destination(), route.delays())
        .expect("a route has its length, and nothing fits into any payload")
        .to_bytes();
    let bytes = packet.first_chunk::<HEADER_LEN>().expect("a packet starts with a header");
    let chain = KeyMaterial::derive(route.nodes(), &secret);
    let seeds = chain.expanded_shared_secrets.iter().map(|secret| secret.payload_key_seed());
    header(bytes, seeds)
}

fn header<'a>(bytes: &[u8; HEADER_LEN], seeds: impl ExactSizeIterator<Item = &'a Seed>) -> Header {
    let mut header = Header {
        bytes: Box::new(Wiped::zero()),
        seeds: Zeroizing::new(Vec::with_capacity(seeds.len())),
    };
    header.bytes.copy_from_slice(bytes);
    header.seeds.extend(seeds);
    header
}

/// Computes the shared secret and checks the MAC.
pub(crate) fn open_header(
    key: &SecretKey,
    packet: &Packet,
) -> Result<ExpandedSharedSecret, PeelError> {
    let header = parse(packet);
    let secret = header.compute_expanded_shared_secret(key.secret());
    header.ensure_header_integrity(&secret).map_err(|_| PeelError::BadMac)?;
    Ok(secret)
}

/// All of phase 2 but for the payload.
pub(crate) fn read_header(
    mut packet: Packet,
    secret: &ExpandedSharedSecret,
) -> Result<Peeled, PeelError> {
    // The crate reads a header only along with a payload.
    let payload = sphinx_packet::payload::Payload::from_bytes(&[0; MIN_PAYLOAD_LEN])
        .expect("it has the shortest length");
    let processed = SphinxPacket { header: parse(&packet), payload }
        .process_with_expanded_secret(secret)
        .map_err(|error| match error.kind() {
            ErrorKind::InvalidHeader => PeelError::BadMac,
            _ => PeelError::BadRouting,
        })?;
    if processed.version != VERSION {
        return Err(PeelError::UnknownVersion(processed.version.value()));
    }
    Ok(match processed.data {
        ProcessedPacketData::ForwardHop { next_hop_packet, next_hop_address, delay } => {
            packet.header_mut().copy_from_slice(&next_hop_packet.header.to_bytes());
            Peeled::Forward {
                next_hop: next_hop_address.to_bytes(),
                delay: delay.to_duration(),
                packet,
            }
        }
        ProcessedPacketData::FinalHop { destination, identifier, .. } => Peeled::Final {
            destination: destination.as_bytes(),
            identifier,
            payload: Payload::new(packet, secret.payload_key_seed()),
        },
    })
}

fn parse(packet: &Packet) -> SphinxHeader {
    SphinxHeader::from_bytes(packet.header()).expect("a header has its length")
}
