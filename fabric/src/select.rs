//! Which transport reaches a peer.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

use crate::loopback::LoopbackTransport;
use crate::secure::Security;
use crate::shm::ShmTransport;
use crate::tcp::{TcpConfig, TcpTransport};
use crate::verbs::device::VerbsConfig;
use crate::verbs::{self, VerbsTransport};
use crate::{Address, Error, Result, Transport};

/// A kind of transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Peers in one process.
    Loopback,
    /// Processes of one user on one host.
    Shm,
    /// Hosts that an RDMA network joins.
    Verbs,
    /// Any two hosts.
    Tcp,
}

/// What transports are made with.
#[derive(Clone, Debug)]
pub struct Options {
    /// tcp's, and that of verbs' control channel. Nobody but this user reaches
    /// the others.
    pub security: Security,
    /// Which RDMA devices are used, and how.
    pub rdma: VerbsConfig,
}

impl From<Security> for Options {
    fn from(security: Security) -> Self {
        Self { security, rdma: VerbsConfig::default() }
    }
}

impl Kind {
    /// Every kind there is.
    pub const ALL: [Self; 4] = [Self::Loopback, Self::Shm, Self::Verbs, Self::Tcp];

    /// Its name, which is also the scheme of its addresses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Shm => "shm",
            Self::Verbs => "verbs",
            Self::Tcp => "tcp",
        }
    }

    /// The kind that can connect to an address.
    pub fn of(address: &Address) -> Result<Self> {
        let scheme = address.0.split_once("://").map(|(scheme, _)| scheme);
        let kind = Self::ALL.into_iter().find(|kind| Some(kind.name()) == scheme);
        kind.ok_or_else(|| {
            Error::BadAddress(address.clone(), "it begins with none of loopback://, shm://, verbs://, tcp://")
        })
    }

    /// Makes a transport of this kind. `listen` is where tcp and verbs listen;
    /// the others choose a place of their own.
    pub fn bind(self, listen: SocketAddr, options: &Options) -> Result<Box<dyn Transport>> {
        Ok(match self {
            Self::Loopback => Box::new(LoopbackTransport::bind()),
            Self::Shm => Box::new(ShmTransport::bind(Default::default())?),
            Self::Verbs => {
                let config = verbs::Config { ports: options.rdma.clone(), ..Default::default() };
                Box::new(VerbsTransport::bind(listen, options.security.secret(), config)?)
            }
            Self::Tcp => Box::new(TcpTransport::bind(listen, TcpConfig::new(options.security.clone()))?),
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| format!("no transport is called {name}; there are loopback, shm, verbs, tcp"))
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that two processes share exactly if shm can join them: they run under
/// the same boot of the same kernel, see the same files and are of the same
/// user. `None` where the system does not tell; then use tcp.
pub fn host_token() -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let files = std::fs::metadata("/proc/self/ns/mnt").ok()?;
    let user = rustix::process::geteuid().as_raw();
    Some(format!("{}-{:x}-{:x}-{user}", boot.trim(), files.dev(), files.ino()))
}

/// The best kind for a peer whose [`host_token`] is `theirs`.
pub fn best(ours: Option<&str>, theirs: Option<&str>) -> Kind {
    if ours.is_some() && ours == theirs { Kind::Shm } else { Kind::Tcp }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_knows_its_own_address() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            match kind.bind(([127, 0, 0, 1], 0).into(), &Security::Insecure.into()) {
                Ok(transport) => {
                    assert_eq!((transport.name(), Kind::of(&transport.address())), (kind.name(), Ok(kind)));
                }
                // Where there is no RDMA.
                Err(e) => assert!(matches!(e, Error::Unavailable { transport: "verbs", .. }), "{e}"),
            }
        }
        assert!(Kind::of(&Address("localhost:80".into())).is_err());
    }

    #[test]
    fn shm_is_for_the_same_host_only() {
        let here = host_token();
        assert_eq!(here, host_token());
        assert_eq!(best(Some("a"), Some("a")), Kind::Shm);
        assert_eq!(best(Some("a"), Some("b")), Kind::Tcp);
        assert_eq!(best(None, None), Kind::Tcp, "two that know nothing need not be together");
    }
}
