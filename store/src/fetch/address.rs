//! Which addresses belong to everybody's internet. A recording's URL is a stranger's: with it nobody may reach what only
//! this machine can.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether an address is plain public unicast. Everything that leads to this machine, its network or its cloud's own
/// services is not, nor is an IPv6 address that carries an IPv4 one inside, whatever that one is.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !SPECIAL_V4.iter().any(|(net, bits)| in_v4(v4, *net, *bits)),
        // Global unicast is 2000::/3. Mapped, NAT64, unique-local, link-local, loopback and multicast lie outside.
        IpAddr::V6(v6) => in_v6(v6, [0x2000, 0], 3) && !SPECIAL_V6.iter().any(|(net, bits)| in_v6(v6, *net, *bits)),
    }
}

/// IANA's special-purpose registry, as far as it is not globally reachable unicast.
const SPECIAL_V4: [([u8; 4], u32); 16] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10),
    ([127, 0, 0, 0], 8),
    ([169, 254, 0, 0], 16),
    ([172, 16, 0, 0], 12),
    ([192, 0, 0, 0], 24),
    ([192, 0, 2, 0], 24),
    ([192, 88, 99, 0], 24),
    ([192, 168, 0, 0], 16),
    ([198, 18, 0, 0], 15),
    ([198, 51, 100, 0], 24),
    ([203, 0, 113, 0], 24),
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
    // Answers platform requests inside one large cloud.
    ([168, 63, 129, 16], 32),
];

/// The same within 2000::/3: protocol assignments with Teredo, documentation, 6to4.
const SPECIAL_V6: [([u16; 2], u32); 4] =
    [([0x2001, 0], 23), ([0x2001, 0x0db8], 32), ([0x2002, 0], 16), ([0x3fff, 0], 20)];

/// Whether an address is of a site: a public one, or one of its private networks. This machine, its link (where clouds answer
/// with credentials) and clouds' own services are not, in no notation.
pub(super) fn is_of_a_site(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public(address) || PRIVATE_V4.iter().any(|(net, bits)| in_v4(v4, *net, *bits)),
        // Unique local, without the address at which one large cloud gives out credentials.
        IpAddr::V6(v6) => is_public(address) || (in_v6(v6, [0xfc00, 0], 7) && v6 != METADATA_V6),
    }
}

const PRIVATE_V4: [([u8; 4], u32); 3] = [([10, 0, 0, 0], 8), ([172, 16, 0, 0], 12), ([192, 168, 0, 0], 16)];
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

fn in_v4(address: Ipv4Addr, net: [u8; 4], bits: u32) -> bool {
    (u32::from(address) ^ u32::from_be_bytes(net)) >> (32 - bits) == 0
}

fn in_v6(address: Ipv6Addr, net: [u16; 2], bits: u32) -> bool {
    let [a, b, ..] = address.segments();
    let both = |[a, b]: [u16; 2]| u32::from(a) << 16 | u32::from(b);
    (both([a, b]) ^ both(net)) >> (32 - bits) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_addresses_are() {
        for text in ["1.1.1.1", "8.8.8.8", "100.63.0.1", "100.128.0.1", "172.15.0.1", "172.32.0.1", "198.20.0.1"] {
            assert!(is_public(text.parse().expect(text)), "{text}");
        }
        for text in ["2606:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001:81b::200e"] {
            assert!(is_public(text.parse().expect(text)), "{text}");
        }
    }

    #[test]
    fn a_site_has_private_networks_and_neither_this_machine_nor_metadata() {
        for text in ["8.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "fd00::1", "2606:4700::1111"] {
            assert!(is_of_a_site(text.parse().expect(text)), "{text}");
        }
        for text in [
            "0.0.0.0",
            "127.0.0.1",
            "127.8.8.8",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "224.0.0.1",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "fd00:ec2::254",
            "fe80::1",
        ] {
            assert!(!is_of_a_site(text.parse().expect(text)), "{text}");
        }
    }

    #[test]
    fn everything_else_is_not() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "168.63.129.16",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::ffff:169.254.169.254",
            "64:ff9b::169.254.169.254",
            "2002:a9fe:a9fe::1",
            "fd00::",
            "::8.8.8.8",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "3fff::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!is_public(text.parse().expect(text)), "{text}");
        }
    }
}
