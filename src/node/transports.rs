//! Which transports a node's lanes use.

use std::net::{IpAddr, SocketAddr};

use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::select::{Kind, Options};
use distkv_fabric::{Error, Result, Transport};

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

/// Transports, the preferred one first.
pub type Transports = Vec<Box<dyn Transport>>;

/// `--fabric`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum FabricChoice {
    /// Shared memory between instances of one host; between hosts verbs where both have it, else tcp.
    #[default]
    Auto,
    /// RDMA only (InfiniBand, RoCE).
    Verbs,
    /// Shared memory only; instances on other hosts are not reached.
    Shm,
    /// tcp only.
    Tcp,
    /// Within this process only: for tests.
    Loopback,
}

impl FabricChoice {
    /// New transports, the preferred one first: one set for the engine's lanes,
    /// another for the creditors; and why `Auto` has left out what the machine
    /// lacks. With `require_rdma` that is an error.
    pub fn open(self, host: IpAddr, options: &Options, require_rdma: bool) -> Result<(Transports, Vec<Error>)> {
        let kinds: &[Kind] = match self {
            Self::Auto => &[Kind::Shm, Kind::Verbs, Kind::Tcp],
            Self::Verbs => &[Kind::Verbs],
            Self::Shm => &[Kind::Shm],
            Self::Tcp => &[Kind::Tcp],
            Self::Loopback => &[Kind::Loopback],
        };
        if require_rdma && !kinds.contains(&Kind::Verbs) {
            let because = "RDMA is required, and --fabric leaves it out".to_string();
            return Err(Error::Unavailable { transport: "verbs", because });
        }
        let (mut transports, mut left_out) = (Vec::new(), Vec::new());
        for kind in kinds {
            match kind.bind(SocketAddr::new(host, 0), options) {
                Ok(transport) => transports.push(transport),
                Err(error @ Error::Unavailable { .. }) if self == Self::Auto && !require_rdma => {
                    left_out.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok((transports, left_out))
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

    #[test]
    fn rdma_that_is_required_is_there_or_an_error() {
        let open = |choice: FabricChoice, required| {
            let transports = choice.open([127, 0, 0, 1].into(), &Security::Insecure.into(), required);
            transports.map(|(t, left_out)| (t.iter().map(|t| t.name()).collect::<Vec<_>>(), left_out))
        };
        let has_rdma = Kind::Verbs.bind(([127, 0, 0, 1], 0).into(), &Security::Insecure.into()).is_ok();
        assert_eq!(open(FabricChoice::Auto, true).is_ok(), has_rdma);
        assert_eq!(open(FabricChoice::Verbs, false).is_ok(), has_rdma);
        let (auto, left_out) = open(FabricChoice::Auto, false).unwrap();
        assert_eq!((auto.contains(&"verbs"), auto.last()), (has_rdma, Some(&"tcp")));
        assert_eq!(left_out.is_empty(), has_rdma, "{left_out:?}");
        let left_out = open(FabricChoice::Tcp, true).unwrap_err().to_string();
        assert!(left_out.contains("--fabric leaves it out"), "{left_out}");
    }
}
