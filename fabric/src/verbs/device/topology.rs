//! Where a NIC sits in the machine, read from sysfs, and how far that is from a
//! GPU or a processor.

use std::fmt;
use std::fs;
use std::path::Path;

/// What the rails should be close to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Near {
    /// A PCI device by its address, e.g. a GPU: `0000:17:00.0`.
    Pci(String),
    /// A NUMA node.
    Node(u32),
    /// Nothing in particular.
    #[default]
    Anywhere,
}

/// A device's place: the bridges above it, outermost first and itself last, and
/// its NUMA node; empty and `None` for a software device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// `pci0000:15`, `0000:15:01.0`, …, `0000:17:00.0`.
    pub pci: Vec<String>,
    /// NUMA node, where the firmware tells one.
    pub node: Option<u32>,
}

/// How far two devices are apart; less is closer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distance {
    /// Under one bridge, so that traffic between them need not pass the
    /// processor; the number of links up and down.
    Bridge(usize),
    /// Under one host bridge.
    HostBridge,
    /// On one NUMA node.
    Node,
    /// On different NUMA nodes.
    System,
    /// Not known of at least one of them, or not asked.
    Unknown,
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge(links) => write!(f, "under one PCI bridge, {links} links away"),
            Self::HostBridge => f.write_str("under one host bridge"),
            Self::Node => f.write_str("on the same NUMA node"),
            Self::System => f.write_str("on another NUMA node"),
            Self::Unknown => f.write_str("distance unknown"),
        }
    }
}

impl Place {
    /// Of an RDMA device, by its name under `class/infiniband`.
    pub fn of_nic(sysfs: &Path, name: &str) -> Self {
        Self::of_folder(&sysfs.join("class/infiniband").join(name).join("device"))
    }

    /// Of a PCI device, by its address; capital letters, and an address without
    /// its domain, are taken as well.
    pub fn of_pci(sysfs: &Path, address: &str) -> Self {
        let address = address.to_ascii_lowercase();
        let full = if address.matches(':').count() == 1 { format!("0000:{address}") } else { address };
        // CUDA tools write domains with eight digits.
        let full = match full.split_once(':') {
            Some((domain, rest)) if domain.len() == 8 && domain.starts_with("0000") => {
                format!("{}:{rest}", &domain[4..])
            }
            _ => full,
        };
        Self::of_folder(&sysfs.join("bus/pci/devices").join(full))
    }

    /// Of a device's folder, or a link to it.
    fn of_folder(folder: &Path) -> Self {
        let Ok(real) = fs::canonicalize(folder) else { return Self::default() };
        let parts = real.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
        let pci: Vec<String> = parts.skip_while(|part| !is_host_bridge(part)).collect();
        let node = fs::read_to_string(real.join("numa_node")).ok().and_then(|text| text.trim().parse().ok());
        Self { pci, node }
    }

    /// The address of the device itself.
    pub fn address(&self) -> Option<&str> {
        self.pci.last().filter(|part| !is_host_bridge(part)).map(String::as_str)
    }

    /// How far `self` is from `other`.
    pub fn distance(&self, other: &Self) -> Distance {
        let common = self.pci.iter().zip(&other.pci).take_while(|(a, b)| a == b).count();
        match (common, self.node, other.node) {
            (2.., ..) => Distance::Bridge(self.pci.len() + other.pci.len() - 2 * common),
            (1, ..) => Distance::HostBridge,
            (_, Some(a), Some(b)) if a == b => Distance::Node,
            (_, Some(_), Some(_)) => Distance::System,
            _ => Distance::Unknown,
        }
    }
}

impl Near {
    /// The place meant; the error names a PCI device that is not there.
    pub fn place(&self, sysfs: &Path) -> Result<Place, String> {
        match self {
            Self::Anywhere => Ok(Place::default()),
            Self::Node(node) => Ok(Place { pci: Vec::new(), node: Some(*node) }),
            Self::Pci(address) => match Place::of_pci(sysfs, address) {
                place if place.pci.is_empty() => Err(format!("there is no PCI device {address}; lspci -D lists them")),
                place => Ok(place),
            },
        }
    }
}

/// `pci0000:15`.
fn is_host_bridge(part: &str) -> bool {
    part.strip_prefix("pci").is_some_and(|rest| {
        rest.split_once(':').is_some_and(|(domain, bus)| {
            let hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            hex(domain) && hex(bus)
        })
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A machine's sysfs, as far as it is read here.
    pub struct Tree(tempfile::TempDir);

    impl Tree {
        pub fn new() -> Self {
            let tree = Self(tempfile::tempdir().expect("a folder"));
            for folder in ["bus/pci/devices", "class/infiniband"] {
                fs::create_dir_all(tree.root().join(folder)).expect("a folder");
            }
            tree
        }

        pub fn root(&self) -> &Path {
            self.0.path()
        }

        /// A PCI device below `path`, e.g. `pci0000:15/0000:15:01.0/0000:16:00.0`.
        pub fn pci(&self, path: &str, node: i32) {
            let folder = self.root().join("devices").join(path);
            fs::create_dir_all(&folder).expect("a folder");
            fs::write(folder.join("numa_node"), format!("{node}\n")).expect("a file");
            let address = path.rsplit('/').next().expect("an address");
            symlink(&folder, self.root().join("bus/pci/devices").join(address)).expect("a link");
        }

        /// An RDMA device, on a PCI device or, without a path, in software.
        pub fn nic(&self, name: &str, path: Option<(&str, i32)>) {
            let class = self.root().join("class/infiniband").join(name);
            fs::create_dir_all(class.join("ports/1/gid_attrs/types")).expect("a folder");
            if let Some((path, node)) = path {
                self.pci(path, node);
                symlink(self.root().join("devices").join(path), class.join("device")).expect("a link");
            }
        }
    }

    /// Two sockets; a GPU and a NIC under one switch, as on an HGX board.
    fn machine() -> Tree {
        let tree = Tree::new();
        tree.pci("pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0", 0);
        tree.nic("mlx5_0", Some(("pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:02.0/0000:19:00.0", 0)));
        tree.nic("mlx5_1", Some(("pci0000:15/0000:15:03.0/0000:1c:00.0", 0)));
        tree.nic("mlx5_2", Some(("pci0000:48/0000:48:01.0/0000:49:00.0", 0)));
        tree.nic("mlx5_3", Some(("pci0000:97/0000:97:01.0/0000:98:00.0", 1)));
        tree.nic("mlx5_4", Some(("pci0000:a7/0000:a7:01.0/0000:a8:00.0", -1)));
        tree.nic("rxe0", None);
        tree
    }

    #[test]
    fn distances_from_a_gpu() {
        let tree = machine();
        let gpu = Near::Pci("00000000:18:00.0".into()).place(tree.root()).expect("the GPU");
        let far = |name| Place::of_nic(tree.root(), name).distance(&gpu);
        assert_eq!(far("mlx5_0"), Distance::Bridge(4));
        assert_eq!(far("mlx5_1"), Distance::HostBridge);
        assert_eq!(far("mlx5_2"), Distance::Node);
        assert_eq!(far("mlx5_3"), Distance::System);
        assert_eq!(far("mlx5_4"), Distance::Unknown);
        assert_eq!(far("rxe0"), Distance::Unknown);
        let order = [Distance::Bridge(2), Distance::Bridge(4), Distance::HostBridge, Distance::Node, Distance::System];
        assert!(order.is_sorted() && Distance::System < Distance::Unknown);
    }

    #[test]
    fn distances_from_a_numa_node() {
        let tree = machine();
        let node = Near::Node(1).place(tree.root()).expect("a node");
        assert_eq!(Place::of_nic(tree.root(), "mlx5_3").distance(&node), Distance::Node);
        assert_eq!(Place::of_nic(tree.root(), "mlx5_0").distance(&node), Distance::System);
    }

    #[test]
    fn addresses_in_their_several_spellings() {
        let tree = machine();
        for spelling in ["0000:A8:00.0", "a8:00.0", "00000000:a8:00.0"] {
            assert_eq!(Place::of_pci(tree.root(), spelling).address(), Some("0000:a8:00.0"), "{spelling}");
        }
        let missing = Near::Pci("0000:ff:00.0".into()).place(tree.root());
        assert_eq!(missing, Err("there is no PCI device 0000:ff:00.0; lspci -D lists them".to_string()));
        assert_eq!(Place::of_nic(tree.root(), "rxe0").address(), None);
    }
}
