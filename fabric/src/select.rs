//! Which transport reaches a peer.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

use crate::loopback::LoopbackTransport;
use crate::secure::Security;
use crate::shm::ShmTransport;
use crate::tcp::{TcpConfig, TcpTransport};
use crate::{Address, Error, Result, Transport};

/// A kind of transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Peers in one process.
    Loopback,
    /// Processes of one user on one host.
    Shm,
    /// Any two hosts.
    Tcp,
}

impl Kind {
    /// Every kind there is.
    pub const ALL: [Self; 3] = [Self::Loopback, Self::Shm, Self::Tcp];

    /// Its name, which is also the scheme of its addresses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }

    /// The kind that can connect to an address.
    pub fn of(address: &Address) -> Result<Self> {
        let scheme = address.0.split_once("://").map(|(scheme, _)| scheme);
        let kind = Self::ALL.into_iter().find(|kind| Some(kind.name()) == scheme);
        kind.ok_or_else(|| Error::BadAddress(address.clone(), "it begins with none of loopback://, shm://, tcp://"))
    }

    /// Makes a transport of this kind. `listen` is where tcp listens; the
    /// others choose a place of their own. `security` is tcp's too: nobody but
    /// this user reaches the others.
    pub fn bind(self, listen: SocketAddr, security: &Security) -> Result<Box<dyn Transport>> {
        Ok(match self {
            Self::Loopback => Box::new(LoopbackTransport::bind()),
            Self::Shm => Box::new(ShmTransport::bind(Default::default())?),
            Self::Tcp => Box::new(TcpTransport::bind(listen, TcpConfig::new(security.clone()))?),
        })
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| format!("no transport is called {name}; there are loopback, shm, tcp"))
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
            let transport = kind.bind(([127, 0, 0, 1], 0).into(), &Security::Insecure).unwrap();
            assert_eq!((transport.name(), Kind::of(&transport.address())), (kind.name(), Ok(kind)));
            assert_eq!(kind.name().parse(), Ok(kind));
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
