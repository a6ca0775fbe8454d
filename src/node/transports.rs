//! Which transports a node's lanes use.

use std::net::{IpAddr, SocketAddr};

use distkv_fabric::loopback::LoopbackTransport;
use distkv_fabric::tcp::{TcpConfig, TcpTransport};
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
        let tcp = || -> Result<Box<dyn Transport>> {
            Ok(Box::new(TcpTransport::bind(SocketAddr::new(host, 0), TcpConfig::default())?))
        };
        let shm = || -> Result<Box<dyn Transport>> { Ok(Box::new(LoopbackTransport::bind())) };
        Ok(match self {
            Self::Auto => vec![shm()?, tcp()?],
            Self::Shm => vec![shm()?],
            Self::Tcp => vec![tcp()?],
            Self::Loopback => vec![Box::new(LoopbackTransport::bind())],
        })
    }
}
