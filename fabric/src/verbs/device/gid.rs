//! GIDs: what a port is called on its network, and which of its names to use.

use std::fmt;
use std::net::Ipv6Addr;

use crate::verbs::sys::{self, ibv_gid};

use super::Link;

/// What a GID stands for, and so which packets are sent under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// RoCE version 1: Ethernet frames, not routable.
    RoceV1,
    /// RoCE version 2: UDP over IPv4 or IPv6.
    RoceV2,
}

impl GidKind {
    /// Of the library's number; `None` for one that is unknown here.
    pub(super) fn of_number(number: u32) -> Option<Self> {
        match number {
            sys::IBV_GID_TYPE_IB => Some(Self::InfiniBand),
            sys::IBV_GID_TYPE_ROCE_V1 => Some(Self::RoceV1),
            sys::IBV_GID_TYPE_ROCE_V2 => Some(Self::RoceV2),
            _ => None,
        }
    }

    /// Of what sysfs says in `gid_attrs/types`, where InfiniBand and RoCE
    /// version 1 share a name.
    pub(super) fn of_sysfs(text: &str, link: Link) -> Option<Self> {
        match (text.trim(), link) {
            ("RoCE v2", _) => Some(Self::RoceV2),
            ("IB/RoCE v1", Link::InfiniBand) => Some(Self::InfiniBand),
            ("IB/RoCE v1", _) => Some(Self::RoceV1),
            _ => None,
        }
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2 => "RoCE v2",
        })
    }
}

/// One entry of a port's GID table that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the table; queue pairs name it by this.
    pub index: u8,
    /// The GID.
    pub raw: ibv_gid,
    /// What it stands for.
    pub kind: GidKind,
}

impl Gid {
    /// How far its address reaches: 0 an IPv4 address, 1 a global (or unique
    /// local) IPv6 address, 2 one that is valid on its link only.
    fn reach(&self) -> u8 {
        let address = Ipv6Addr::from(self.raw.raw);
        match address.to_ipv4_mapped() {
            Some(v4) if v4.is_link_local() || v4.is_loopback() => 2,
            Some(_) => 0,
            None if address.is_unicast_link_local() || address.is_loopback() => 2,
            None => 1,
        }
    }

    /// In words: `RoCE v2, IPv4`.
    pub fn describe(&self) -> String {
        match (self.kind, self.reach()) {
            (GidKind::InfiniBand, _) => self.kind.to_string(),
            (kind, 0) => format!("{kind}, IPv4"),
            (kind, 1) => format!("{kind}, IPv6"),
            (kind, _) => format!("{kind}, link-local"),
        }
    }
}

/// As an IP address: `10.1.2.3`, `fe80::1`.
impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.raw.raw);
        match address.to_ipv4_mapped() {
            Some(v4) => v4.fmt(f),
            None => address.fmt(f),
        }
    }
}

/// The GID to use of those a port has: the one at `wanted` if given; else on
/// InfiniBand the first, on Ethernet RoCE v2 before v1 and, within a version,
/// IPv4 before global IPv6 before link-local, the lowest index of equals. The
/// error says what to do.
pub fn choose(link: Link, gids: &[Gid], wanted: Option<u8>) -> Result<Gid, String> {
    if let Some(index) = wanted {
        return gids.iter().find(|gid| gid.index == index).copied().ok_or_else(|| {
            let used: Vec<String> = gids.iter().map(|gid| format!("{} ({gid}, {})", gid.index, gid.kind)).collect();
            match used.is_empty() {
                true => format!("GID index {index} is empty, and so are all others"),
                false => format!("GID index {index} is empty; in use: {}", used.join(", ")),
            }
        });
    }
    match link {
        Link::InfiniBand => {
            let first = gids.iter().find(|gid| gid.index == 0).copied();
            first.ok_or_else(|| "GID 0 is empty: is a subnet manager running?".to_string())
        }
        Link::Ethernet => {
            let best = gids.iter().min_by_key(|gid| (gid.kind != GidKind::RoceV2, gid.reach(), gid.index)).copied();
            best.ok_or_else(|| "no GID: give the network interface an IP address and bring it up".to_string())
        }
        Link::Unknown(number) => Err(format!("link layer {number} is unknown: name a GID index to use it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(index: u8, address: &str, kind: GidKind) -> Gid {
        let address: std::net::IpAddr = address.parse().expect("an address");
        let raw = match address {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(v6) => v6.octets(),
        };
        Gid { index, raw: ibv_gid { raw }, kind }
    }

    /// A port as mlx5 shows one with an IPv6 and an IPv4 address.
    fn table() -> Vec<Gid> {
        use GidKind::{RoceV1, RoceV2};
        vec![
            gid(0, "fe80::ba59:9fff:fe12:3456", RoceV1),
            gid(1, "fe80::ba59:9fff:fe12:3456", RoceV2),
            gid(2, "2001:db8::5", RoceV1),
            gid(3, "2001:db8::5", RoceV2),
            gid(4, "10.1.2.3", RoceV1),
            gid(5, "10.1.2.3", RoceV2),
            gid(6, "10.1.2.4", RoceV2),
        ]
    }

    #[test]
    fn ethernet_prefers_version_2_then_ipv4_then_global_then_low() {
        let mut gids = table();
        for (index, words) in [
            (5, "RoCE v2, IPv4"),
            (6, "RoCE v2, IPv4"),
            (3, "RoCE v2, IPv6"),
            (1, "RoCE v2, link-local"),
            (4, "RoCE v1, IPv4"),
            (2, "RoCE v1, IPv6"),
            (0, "RoCE v1, link-local"),
        ] {
            let chosen = choose(Link::Ethernet, &gids, None).expect("a GID");
            assert_eq!((chosen.index, chosen.describe().as_str()), (index, words));
            gids.retain(|gid| gid.index != index);
        }
        assert!(choose(Link::Ethernet, &gids, None).unwrap_err().starts_with("no GID"));
    }

    #[test]
    fn an_ipv4_address_of_the_link_alone_comes_after_global_ipv6() {
        let gids = [gid(0, "169.254.7.7", GidKind::RoceV2), gid(1, "2001:db8::5", GidKind::RoceV2)];
        assert_eq!(choose(Link::Ethernet, &gids, None).map(|gid| gid.index), Ok(1));
    }

    #[test]
    fn infiniband_takes_the_first() {
        let gids = [gid(0, "fe80::1", GidKind::InfiniBand), gid(1, "2001:db8::5", GidKind::InfiniBand)];
        assert_eq!(choose(Link::InfiniBand, &gids, None).map(|gid| gid.index), Ok(0));
        assert!(choose(Link::InfiniBand, &gids[1..], None).unwrap_err().contains("subnet manager"));
    }

    #[test]
    fn an_index_that_is_asked_for_is_taken_or_refused_with_those_in_use() {
        assert_eq!(choose(Link::Ethernet, &table(), Some(2)).map(|gid| gid.index), Ok(2));
        let refused = choose(Link::Ethernet, &table()[5..], Some(9)).unwrap_err();
        assert_eq!(refused, "GID index 9 is empty; in use: 5 (10.1.2.3, RoCE v2), 6 (10.1.2.4, RoCE v2)");
        assert_eq!(choose(Link::Unknown(7), &table(), Some(5)).map(|gid| gid.index), Ok(5));
        assert!(choose(Link::Unknown(7), &table(), None).is_err());
    }

    #[test]
    fn sysfs_names_types_by_link() {
        assert_eq!(GidKind::of_sysfs("RoCE v2\n", Link::Ethernet), Some(GidKind::RoceV2));
        assert_eq!(GidKind::of_sysfs("IB/RoCE v1\n", Link::Ethernet), Some(GidKind::RoceV1));
        assert_eq!(GidKind::of_sysfs("IB/RoCE v1\n", Link::InfiniBand), Some(GidKind::InfiniBand));
        assert_eq!(GidKind::of_sysfs("RoCE v3\n", Link::Ethernet), None);
    }
}
