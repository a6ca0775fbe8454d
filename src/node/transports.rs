//! Which transports a node's lanes use.

use std::net::{IpAddr, SocketAddr};

use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::select::Kind;
use distkv_fabric::{Result, Transport};

use crate::control::seal::KEY_BYTES;

/// How the fabric of a cluster is protected: under a secret of its own, made of
/// the cluster's key and name, or not at all.
pub fn security(key: &[u8; KEY_BYTES], cluster: &[u8; 16], insecure: bool) -> Security {
    if insecure {
        return Security::Insecure;
    }
    let mut secret = blake3::Hasher::new_derive_key("distkv secret of the fabric v1");
    secret.update(key).update(cluster);
    Security::Sealed(Secret::new(*secret.finalize().as_bytes()))
}

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
    pub fn open(self, host: IpAddr, security: &Security) -> Result<Vec<Box<dyn Transport>>> {
        let kinds: &[Kind] = match self {
            Self::Auto => &[Kind::Shm, Kind::Tcp],
            Self::Shm => &[Kind::Shm],
            Self::Tcp => &[Kind::Tcp],
            Self::Loopback => &[Kind::Loopback],
        };
        kinds.iter().map(|kind| kind.bind(SocketAddr::new(host, 0), security)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_is_of_one_key_and_one_cluster() {
        let sealed = |key, cluster| security(&[key; KEY_BYTES], &[cluster; 16], false);
        assert_eq!(sealed(1, 1), sealed(1, 1));
        for other in [sealed(2, 1), sealed(1, 2), Security::Sealed(Secret::new([1; 32]))] {
            assert_ne!(sealed(1, 1), other);
        }
        assert_eq!(security(&[1; KEY_BYTES], &[1; 16], true), Security::Insecure);
    }
}
