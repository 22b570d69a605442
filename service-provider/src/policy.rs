//! The exit policy: which addresses the provider connects to.
//!
//! It judges resolved addresses, never names, so what it allows is exactly what is dialled. An IPv4
//! address is refused when it lies in a special-purpose range (IANA registry, RFC 6890). An IPv6
//! address is refused unless it is global unicast, `2000::/3`, outside the special ranges there: a
//! range that nobody has allotted yet is no target either.
//!
//! IPv6 addresses that hold an IPv4 address:
//!
//! - `::ffff:0:0/96` (mapped) and `64:ff9b::/96` (NAT64) are judged as the IPv4 address. The system
//!   connects to the first as to that IPv4 address, programs do send it, and on an exit that has
//!   IPv6 only the second is the one way to IPv4 hosts.
//! - IPv4-compatible, IPv4-translated, `64:ff9b:1::/48` (its layout depends on the network), 6to4
//!   and Teredo are refused wholly: they are obsolete or local, and lead through translators that
//!   this policy cannot see.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The port of mail between servers: an exit that allowed it would be used for spam.
const SMTP_PORT: u16 = 25;

/// Decides which addresses may be dialled.
#[derive(Clone, Debug)]
pub struct ExitPolicy {
    /// Canonical: an IPv4-mapped address is kept as the IPv4 address.
    own: BTreeSet<IpAddr>,
    /// The address that this machine would come from at a target.
    source_towards: fn(IpAddr) -> Option<IpAddr>,
    allow_private: bool,
}

/// The policy refuses an address.
///
/// Neither text holds the address, so that it can be logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the exit policy forbids {reason}")]
pub struct Forbidden {
    /// What the policy has against the address.
    pub reason: Reason,
}

/// What a refused address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The port is 0 or 25.
    Port,
    /// An address of the provider itself.
    OwnAddress,
    /// In the `/64` of an IPv6 address of the provider: its neighbours, behind the same firewall.
    OwnNetwork,
    /// `0.0.0.0/8` or `::`.
    Unspecified,
    /// `127.0.0.0/8` or `::1`.
    Loopback,
    /// `10.0.0.0/8`, `172.16.0.0/12`, `192.168.0.0/16` or `fc00::/7`.
    Private,
    /// `169.254.0.0/16` or `fe80::/10`; cloud metadata is served there.
    LinkLocal,
    /// `100.64.0.0/10`, the inside of a carrier's NAT.
    SharedNat,
    /// `224.0.0.0/4` or `ff00::/8`.
    Multicast,
    /// `240.0.0.0/4`, with the broadcast address.
    Reserved,
    /// `192.0.0.0/24` or `2001::/23` (RFC 6890).
    ProtocolAssignment,
    /// Kept for documents: `192.0.2.0/24`, `198.51.100.0/24`, `203.0.113.0/24`, `2001:db8::/32`,
    /// `3fff::/20`.
    Documentation,
    /// `198.18.0.0/15`; the IPv6 one is in `2001::/23`.
    Benchmarking,
    /// `192.88.99.0/24`, the anycast address of 6to4 relays.
    RelayAnycast,
    /// An IPv6 address that stands for an IPv4 address behind a translator.
    Translated,
    /// An IPv6 address outside `2000::/3`, such as site-local `fec0::/10`.
    NotGlobal,
}

const V4_RANGES: [(Ipv4Addr, u32, Reason); 15] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, Reason::Unspecified),
    (Ipv4Addr::new(10, 0, 0, 0), 8, Reason::Private),
    (Ipv4Addr::new(100, 64, 0, 0), 10, Reason::SharedNat),
    (Ipv4Addr::new(127, 0, 0, 0), 8, Reason::Loopback),
    (Ipv4Addr::new(169, 254, 0, 0), 16, Reason::LinkLocal),
    (Ipv4Addr::new(172, 16, 0, 0), 12, Reason::Private),
    (Ipv4Addr::new(192, 0, 0, 0), 24, Reason::ProtocolAssignment),
    (Ipv4Addr::new(192, 0, 2, 0), 24, Reason::Documentation),
    (Ipv4Addr::new(192, 88, 99, 0), 24, Reason::RelayAnycast),
    (Ipv4Addr::new(192, 168, 0, 0), 16, Reason::Private),
    (Ipv4Addr::new(198, 18, 0, 0), 15, Reason::Benchmarking),
    (Ipv4Addr::new(198, 51, 100, 0), 24, Reason::Documentation),
    (Ipv4Addr::new(203, 0, 113, 0), 24, Reason::Documentation),
    (Ipv4Addr::new(224, 0, 0, 0), 4, Reason::Multicast),
    (Ipv4Addr::new(240, 0, 0, 0), 4, Reason::Reserved),
];

/// The first range that holds an address gives the reason.
const V6_RANGES: [(Ipv6Addr, u32, Reason); 13] = [
    (Ipv6Addr::UNSPECIFIED, 128, Reason::Unspecified),
    (Ipv6Addr::LOCALHOST, 128, Reason::Loopback),
    // IPv4-compatible (RFC 4291 §2.5.5.1).
    (Ipv6Addr::UNSPECIFIED, 96, Reason::Translated),
    // IPv4-translated (RFC 2765 §2.1).
    (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96, Reason::Translated),
    // NAT64 with a local prefix (RFC 8215).
    (Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0), 48, Reason::Translated),
    // Teredo (RFC 4380), in front of the assignments that it is one of.
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32, Reason::Translated),
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23, Reason::ProtocolAssignment),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, Reason::Documentation),
    // 6to4 (RFC 3056).
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16, Reason::Translated),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20, Reason::Documentation),
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, Reason::Private),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, Reason::LinkLocal),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, Reason::Multicast),
];

const GLOBAL_UNICAST: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0);
const GLOBAL_UNICAST_BITS: u32 = 3;
const NAT64: Ipv6Addr = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);
const NAT64_BITS: u32 = 96;

impl ExitPolicy {
    /// A policy that also refuses `own`, the provider's own addresses: whoever reached those would
    /// come from the machine itself, past its firewall.
    ///
    /// `allow_private` is for tests. It opens loopback (also where it is among `own`) and the
    /// private ranges of both families, [`Reason::Private`]. Everything else stays refused: nobody
    /// needs link-local addresses for a test, and cloud metadata lives there.
    pub fn new(own: impl IntoIterator<Item = IpAddr>, allow_private: bool) -> Self {
        let own = own.into_iter().map(|ip| ip.to_canonical()).collect();
        Self { own, source_towards: |_| None, allow_private }
    }

    /// Also refuses the addresses that the machine has at the moment, and their neighbours:
    /// `source_towards` says which one it would come from at a target. Addresses change, those of
    /// IPv6 with privacy extensions daily.
    #[must_use]
    pub fn with_source(self, source_towards: fn(IpAddr) -> Option<IpAddr>) -> Self {
        Self { source_towards, ..self }
    }

    /// Judges one address.
    ///
    /// # Errors
    /// [`Forbidden`] when it must not be dialled.
    pub fn check(&self, address: SocketAddr) -> Result<(), Forbidden> {
        if matches!(address.port(), 0 | SMTP_PORT) {
            return Err(Forbidden { reason: Reason::Port });
        }
        let ip = match address.ip() {
            IpAddr::V4(ip) => IpAddr::V4(ip),
            IpAddr::V6(ip) => embedded_v4(ip).map_or(IpAddr::V6(ip), IpAddr::V4),
        };
        let reason = match ip {
            IpAddr::V4(ip) => special_v4(ip),
            IpAddr::V6(ip) => special_v6(ip),
        };
        match reason {
            Some(Reason::Loopback) if self.allow_private => Ok(()),
            // The address as it was given as well: `own` may hold one inside a NAT64 prefix.
            _ if self.own.contains(&ip) || self.own.contains(&address.ip()) => {
                Err(Forbidden { reason: Reason::OwnAddress })
            }
            Some(Reason::Private) if self.allow_private => Ok(()),
            Some(reason) => Err(Forbidden { reason }),
            None => self.check_source(ip),
        }
    }

    fn check_source(&self, ip: IpAddr) -> Result<(), Forbidden> {
        match ((self.source_towards)(ip), ip) {
            (Some(source), _) if source == ip => Err(Forbidden { reason: Reason::OwnAddress }),
            (Some(IpAddr::V6(source)), IpAddr::V6(ip)) if contains_v6(source, 64, ip) => {
                Err(Forbidden { reason: Reason::OwnNetwork })
            }
            _ => Ok(()),
        }
    }
}

/// The IPv4 address in whose place an IPv6 address is judged.
fn embedded_v4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    if contains_v6(NAT64, NAT64_BITS, ip) {
        let [.., a, b, c, d] = ip.octets();
        return Some(Ipv4Addr::new(a, b, c, d));
    }
    ip.to_ipv4_mapped()
}

fn special_v4(ip: Ipv4Addr) -> Option<Reason> {
    V4_RANGES
        .iter()
        .find(|(first, bits, _)| (first.to_bits() ^ ip.to_bits()) >> (32 - bits) == 0)
        .map(|(.., reason)| *reason)
}

fn special_v6(ip: Ipv6Addr) -> Option<Reason> {
    V6_RANGES
        .iter()
        .find(|(first, bits, _)| contains_v6(*first, *bits, ip))
        .map(|(.., reason)| *reason)
        .or_else(|| {
            let global = contains_v6(GLOBAL_UNICAST, GLOBAL_UNICAST_BITS, ip);
            (!global).then_some(Reason::NotGlobal)
        })
}

fn contains_v6(first: Ipv6Addr, bits: u32, ip: Ipv6Addr) -> bool {
    (first.to_bits() ^ ip.to_bits()) >> (128 - bits) == 0
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Port => "this port",
            Self::OwnAddress => "the provider's own addresses",
            Self::OwnNetwork => "the provider's own network",
            Self::Unspecified => "the unspecified address",
            Self::Loopback => "loopback addresses",
            Self::Private => "private addresses",
            Self::LinkLocal => "link-local addresses",
            Self::SharedNat => "addresses inside a carrier's NAT",
            Self::Multicast => "multicast addresses",
            Self::Reserved => "reserved addresses",
            Self::ProtocolAssignment => "addresses assigned to protocols",
            Self::Documentation => "addresses kept for documentation",
            Self::Benchmarking => "addresses kept for benchmarks",
            Self::RelayAnycast => "the anycast address of 6to4 relays",
            Self::Translated => "translated IPv4 addresses",
            Self::NotGlobal => "addresses that are not global",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn verdict(policy: &ExitPolicy, ip: &str) -> Option<Reason> {
        let address = SocketAddr::new(ip.parse().unwrap(), 443);
        policy.check(address).err().map(|forbidden| forbidden.reason)
    }

    /// Checks the ends of a range and its neighbours outside, which have verdicts of their own.
    #[track_caller]
    fn range(
        reason: Reason,
        inside: [&str; 2],
        below: Option<(&str, Option<Reason>)>,
        above: Option<(&str, Option<Reason>)>,
    ) {
        let policy = ExitPolicy::new([], false);
        for ip in inside {
            assert_eq!(verdict(&policy, ip), Some(reason), "{ip}");
        }
        for (ip, expected) in below.into_iter().chain(above) {
            assert_eq!(verdict(&policy, ip), expected, "{ip}");
        }
    }

    const OPEN: Option<Reason> = None;
    const NOT_GLOBAL: Option<Reason> = Some(Reason::NotGlobal);

    #[test]
    fn v4_unspecified() {
        range(Reason::Unspecified, ["0.0.0.0", "0.255.255.255"], None, Some(("1.0.0.0", OPEN)));
    }

    #[test]
    fn v4_private_10() {
        let outside = (Some(("9.255.255.255", OPEN)), Some(("11.0.0.0", OPEN)));
        range(Reason::Private, ["10.0.0.0", "10.255.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_shared_nat() {
        let outside = (Some(("100.63.255.255", OPEN)), Some(("100.128.0.0", OPEN)));
        range(Reason::SharedNat, ["100.64.0.0", "100.127.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_loopback() {
        let outside = (Some(("126.255.255.255", OPEN)), Some(("128.0.0.0", OPEN)));
        range(Reason::Loopback, ["127.0.0.0", "127.255.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_link_local() {
        let outside = (Some(("169.253.255.255", OPEN)), Some(("169.255.0.0", OPEN)));
        range(Reason::LinkLocal, ["169.254.0.0", "169.254.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_private_172() {
        let outside = (Some(("172.15.255.255", OPEN)), Some(("172.32.0.0", OPEN)));
        range(Reason::Private, ["172.16.0.0", "172.31.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_protocol_assignments() {
        let outside = (Some(("191.255.255.255", OPEN)), Some(("192.0.1.0", OPEN)));
        range(Reason::ProtocolAssignment, ["192.0.0.0", "192.0.0.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_documentation() {
        for (inside, below, above) in [
            (["192.0.2.0", "192.0.2.255"], "192.0.1.255", "192.0.3.0"),
            (["198.51.100.0", "198.51.100.255"], "198.51.99.255", "198.51.101.0"),
            (["203.0.113.0", "203.0.113.255"], "203.0.112.255", "203.0.114.0"),
        ] {
            range(Reason::Documentation, inside, Some((below, OPEN)), Some((above, OPEN)));
        }
    }

    #[test]
    fn v4_relay_anycast() {
        let outside = (Some(("192.88.98.255", OPEN)), Some(("192.88.100.0", OPEN)));
        range(Reason::RelayAnycast, ["192.88.99.0", "192.88.99.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_private_192() {
        let outside = (Some(("192.167.255.255", OPEN)), Some(("192.169.0.0", OPEN)));
        range(Reason::Private, ["192.168.0.0", "192.168.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_benchmarking() {
        let outside = (Some(("198.17.255.255", OPEN)), Some(("198.20.0.0", OPEN)));
        range(Reason::Benchmarking, ["198.18.0.0", "198.19.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_multicast() {
        let outside =
            (Some(("223.255.255.255", OPEN)), Some(("240.0.0.0", Some(Reason::Reserved))));
        range(Reason::Multicast, ["224.0.0.0", "239.255.255.255"], outside.0, outside.1);
    }

    #[test]
    fn v4_reserved_and_broadcast() {
        let below = Some(("239.255.255.255", Some(Reason::Multicast)));
        range(Reason::Reserved, ["240.0.0.0", "255.255.255.255"], below, None);
    }

    #[test]
    fn v6_unspecified_loopback_and_compatible() {
        range(Reason::Unspecified, ["::", "::"], None, Some(("::1", Some(Reason::Loopback))));
        range(Reason::Loopback, ["::1", "::1"], None, Some(("::2", Some(Reason::Translated))));
        range(Reason::Translated, ["::2", "::ffff:ffff"], None, Some(("::1:0:0", NOT_GLOBAL)));
    }

    #[test]
    fn v6_mapped_is_judged_as_v4() {
        let policy = ExitPolicy::new([], false);
        for (ip, expected) in [
            ("::ffff:0.0.0.0", Some(Reason::Unspecified)),
            ("::ffff:127.0.0.1", Some(Reason::Loopback)),
            ("::ffff:192.168.1.1", Some(Reason::Private)),
            ("::ffff:255.255.255.255", Some(Reason::Reserved)),
            ("::ffff:1.1.1.1", OPEN),
            ("::fffe:ffff:ffff", NOT_GLOBAL),
            ("::1:0:0:0", NOT_GLOBAL),
        ] {
            assert_eq!(verdict(&policy, ip), expected, "{ip}");
        }
    }

    #[test]
    fn v6_translated() {
        let outside =
            (Some(("::fffe:ffff:ffff:ffff", NOT_GLOBAL)), Some(("::ffff:1:0:0", NOT_GLOBAL)));
        range(Reason::Translated, ["::ffff:0:0:0", "::ffff:0:ffff:ffff"], outside.0, outside.1);
    }

    #[test]
    fn v6_nat64_is_judged_as_v4() {
        let policy = ExitPolicy::new([], false);
        for (ip, expected) in [
            ("64:ff9a:ffff:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL),
            ("64:ff9b::", Some(Reason::Unspecified)),
            ("64:ff9b::10.0.0.1", Some(Reason::Private)),
            ("64:ff9b::169.254.169.254", Some(Reason::LinkLocal)),
            ("64:ff9b::1.1.1.1", OPEN),
            ("64:ff9b::255.255.255.255", Some(Reason::Reserved)),
            ("64:ff9b::1:0:0", NOT_GLOBAL),
        ] {
            assert_eq!(verdict(&policy, ip), expected, "{ip}");
        }
    }

    #[test]
    fn v6_local_nat64() {
        let outside = (
            Some(("64:ff9b:0:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL)),
            Some(("64:ff9b:2::", NOT_GLOBAL)),
        );
        let inside = ["64:ff9b:1::", "64:ff9b:1:ffff:ffff:ffff:ffff:ffff"];
        range(Reason::Translated, inside, outside.0, outside.1);
    }

    #[test]
    fn v6_discard() {
        let outside = (
            Some(("ff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL)),
            Some(("100:0:0:1::", NOT_GLOBAL)),
        );
        range(Reason::NotGlobal, ["100::", "100::ffff:ffff:ffff:ffff"], outside.0, outside.1);
    }

    #[test]
    fn v6_global_unicast_is_open_and_nothing_around_it() {
        let policy = ExitPolicy::new([], false);
        for (ip, expected) in [
            ("1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL),
            ("2000::", OPEN),
            ("2606:4700:4700::1111", OPEN),
            ("4000::", NOT_GLOBAL),
        ] {
            assert_eq!(verdict(&policy, ip), expected, "{ip}");
        }
    }

    #[test]
    fn v6_teredo_and_protocol_assignments() {
        let assignment = Some(Reason::ProtocolAssignment);
        range(
            Reason::Translated,
            ["2001::", "2001:0:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff", OPEN)),
            Some(("2001:1::", assignment)),
        );
        range(
            Reason::ProtocolAssignment,
            ["2001:1::", "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff"],
            None,
            Some(("2001:200::", OPEN)),
        );
        // Benchmarking (RFC 5180) lies inside.
        range(Reason::ProtocolAssignment, ["2001:2::", "2001:2:0:ffff::"], None, None);
    }

    #[test]
    fn v6_documentation() {
        range(
            Reason::Documentation,
            ["2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", OPEN)),
            Some(("2001:db9::", OPEN)),
        );
        range(
            Reason::Documentation,
            ["3fff::", "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff", OPEN)),
            Some(("3fff:1000::", OPEN)),
        );
    }

    #[test]
    fn v6_6to4() {
        range(
            Reason::Translated,
            ["2002::", "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff", OPEN)),
            Some(("2003::", OPEN)),
        );
    }

    #[test]
    fn v6_unique_local() {
        range(
            Reason::Private,
            ["fc00::", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("fbff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL)),
            Some(("fe00::", NOT_GLOBAL)),
        );
    }

    #[test]
    fn v6_link_local_site_local_and_multicast() {
        range(
            Reason::LinkLocal,
            ["fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("fe7f:ffff:ffff:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL)),
            Some(("fec0::", NOT_GLOBAL)),
        );
        range(
            Reason::NotGlobal,
            ["fec0::", "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Some(Reason::LinkLocal))),
            Some(("ff00::", Some(Reason::Multicast))),
        );
        range(
            Reason::Multicast,
            ["ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
            Some(("feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", NOT_GLOBAL)),
            None,
        );
    }

    #[test]
    fn ports() {
        for allow_private in [false, true] {
            let policy = ExitPolicy::new([], allow_private);
            for ip in ["1.1.1.1", "2606:4700:4700::1111", "127.0.0.1", "::ffff:1.1.1.1"] {
                for port in [0, 25] {
                    let address = SocketAddr::new(ip.parse().unwrap(), port);
                    assert_eq!(policy.check(address), Err(Forbidden { reason: Reason::Port }));
                }
            }
            for port in [1, 24, 26, 465, 587, u16::MAX] {
                assert_eq!(policy.check(SocketAddr::new([1, 1, 1, 1].into(), port)), Ok(()));
            }
        }
    }

    #[test]
    fn addresses_of_the_moment() {
        let towards = |ip: IpAddr| {
            let own = if ip.is_ipv4() { "8.8.4.4" } else { "2606:4700:1:2::77" };
            own.parse().ok()
        };
        for allow_private in [false, true] {
            let policy = ExitPolicy::new([], allow_private).with_source(towards);
            for (ip, reason) in [
                ("8.8.4.4", Some(Reason::OwnAddress)),
                ("::ffff:8.8.4.4", Some(Reason::OwnAddress)),
                ("64:ff9b::8.8.4.4", Some(Reason::OwnAddress)),
                ("2606:4700:1:2::77", Some(Reason::OwnAddress)),
                ("2606:4700:1:2::1", Some(Reason::OwnNetwork)),
                ("2606:4700:1:3::77", None),
                ("8.8.8.8", None),
            ] {
                assert_eq!(verdict(&policy, ip), reason, "{ip}");
            }
        }
    }

    #[test]
    fn own_addresses() {
        let own = [
            "8.8.4.4",
            "::ffff:8.8.8.8",
            "2606:4700::1",
            "64:ff9b::9.9.9.9",
            "127.0.0.1",
            "10.0.0.5",
        ];
        let own = own.map(|ip| ip.parse().unwrap());
        let policy = ExitPolicy::new(own, false);
        let ips = [
            "8.8.4.4",
            "8.8.8.8",
            "::ffff:8.8.4.4",
            "64:ff9b::8.8.8.8",
            "2606:4700::1",
            "64:ff9b::9.9.9.9",
        ];
        for ip in ips {
            assert_eq!(verdict(&policy, ip), Some(Reason::OwnAddress), "{ip}");
        }
        assert_eq!(verdict(&policy, "8.8.8.9"), None);
        let policy = ExitPolicy::new(own, true);
        assert_eq!(verdict(&policy, "127.0.0.1"), None);
        assert_eq!(verdict(&policy, "10.0.0.5"), Some(Reason::OwnAddress));
        assert_eq!(verdict(&policy, "10.0.0.6"), None);
        assert_eq!(verdict(&policy, "8.8.8.8"), Some(Reason::OwnAddress));
    }

    #[test]
    fn allow_private_opens_loopback_and_private_only() {
        let policy = ExitPolicy::new([], true);
        for ip in [
            "127.0.0.1",
            "127.255.255.255",
            "::1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.0.1",
            "fd00::1",
        ] {
            assert_eq!(verdict(&policy, ip), None, "{ip}");
        }
        for (first, bits, reason) in V4_RANGES {
            let opened = matches!(reason, Reason::Loopback | Reason::Private);
            let last =
                Ipv4Addr::from_bits(first.to_bits() | (u32::MAX.checked_shr(bits).unwrap_or(0)));
            for ip in [first, last] {
                assert_eq!(verdict(&policy, &ip.to_string()).is_none(), opened, "{ip}");
            }
        }
        for ip in [
            "::",
            "::2",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001::1",
            "2002:0a00:0001::",
            "64:ff9b:1::1",
        ] {
            assert!(verdict(&policy, ip).is_some(), "{ip}");
        }
    }

    proptest! {
        #[test]
        fn an_embedded_v4_is_never_more_permissive(
            octets in prop_oneof![any::<[u8; 4]>(), special_octets()],
            own: [u8; 4],
            allow_private: bool,
            port in prop_oneof![Just(25), any::<u16>()],
        ) {
            let ip = Ipv4Addr::from(octets);
            let policy = ExitPolicy::new([own.into(), ip.into()].into_iter().skip(usize::from(port % 2)), allow_private);
            let plain = policy.check(SocketAddr::new(ip.into(), port));
            let [a, b, c, d] = octets;
            let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            for form in [
                ip.to_ipv6_mapped(),
                ip.to_ipv6_compatible(),
                Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, high, low),
                Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
                Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, high, low),
                Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
                Ipv6Addr::new(0x2001, 0, high, low, 0, 0, !high, !low),
            ] {
                // `::1` is no embedding of 0.0.0.1 but loopback itself.
                let loopback = form == Ipv6Addr::LOCALHOST && allow_private;
                let embedded = policy.check(SocketAddr::new(form.into(), port));
                prop_assert!(plain.is_ok() || embedded.is_err() || loopback, "{form}");
            }
        }
    }

    fn special_octets() -> impl Strategy<Value = [u8; 4]> {
        (0..V4_RANGES.len(), any::<u32>()).prop_map(|(index, random)| {
            let (first, bits, _) = V4_RANGES[index];
            let host = random & u32::MAX.checked_shr(bits).unwrap_or(0);
            (first.to_bits() | host).to_be_bytes()
        })
    }
}
