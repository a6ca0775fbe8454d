//! Which transports a node's lanes use.

use std::net::{IpAddr, SocketAddr};

use distkv_fabric::select::Kind;
use distkv_fabric::{Result, Transport};

/// `--fabric`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum FabricChoice {
    /// Shared memory between instances of one host, tcp between hosts.
    #[default]
    Auto,
    /// Shared memory only; instances on other hosts are not reached.
    Shm,
    /// tcp only.
    Tcp,
    /// Within this process only: for tests.
    Loopback,
}

impl FabricChoice {
    /// New transports, the preferred one first: one set for the engine's lanes,
    /// another for the creditors.
    pub fn open(self, host: IpAddr) -> Result<Vec<Box<dyn Transport>>> {
        let kinds: &[Kind] = match self {
            Self::Auto => &[Kind::Shm, Kind::Tcp],
            Self::Shm => &[Kind::Shm],
            Self::Tcp => &[Kind::Tcp],
            Self::Loopback => &[Kind::Loopback],
        };
        kinds.iter().map(|kind| kind.bind(SocketAddr::new(host, 0))).collect()
    }
}
