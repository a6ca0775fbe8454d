//! How a NIC reaches a GPU's memory.

use std::fmt;
use std::path::Path;

/// How bytes come from the NIC into a GPU's memory and out of it. This is the
/// NIC's side; whether the GPU's driver exports its memory is known when it is
/// asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpuDirect {
    /// The GPU exports its memory as a dmabuf, which the NIC registers.
    Dmabuf,
    /// A kernel module of NVIDIA lets GPU addresses be registered like others.
    PeerMem,
    /// By a copy through pinned host memory.
    Bounce {
        /// Why neither of the others.
        because: String,
    },
}

impl fmt::Display for GpuDirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dmabuf => f.write_str("dmabuf"),
            Self::PeerMem => f.write_str("nvidia-peermem"),
            Self::Bounce { because } => write!(f, "a copy through host memory ({because})"),
        }
    }
}

/// Whether a device registers dmabufs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DmabufSupport {
    /// It does.
    Yes,
    /// It does not.
    No {
        /// What says so.
        because: String,
    },
}

impl DmabufSupport {
    /// What the answer to a registration of file descriptor −1 means. A driver
    /// that knows dmabufs looks the descriptor up and finds it bad.
    pub(super) fn of_errno(errno: i32) -> Self {
        let because = match errno {
            libc::EBADF => return Self::Yes,
            libc::EOPNOTSUPP | libc::EPROTONOSUPPORT => {
                "the NIC's driver or the kernel (before 5.12) does not register dmabufs".to_string()
            }
            other => format!("the probe for dmabufs failed: {}", std::io::Error::from_raw_os_error(other)),
        };
        Self::No { because }
    }
}

/// Is a module loaded that lets GPU addresses be registered?
pub fn peermem_loaded(sysfs: &Path) -> bool {
    ["module/nvidia_peermem", "module/nv_peer_mem", "kernel/mm/memory_peers/nv_mem/version"]
        .iter()
        .any(|path| sysfs.join(path).exists())
}

impl GpuDirect {
    /// The best way there is.
    pub fn choose(dmabuf: &DmabufSupport, peermem: bool) -> Self {
        Self::choose_but(dmabuf, if peermem { Ok(()) } else { Err("the module nvidia_peermem is not loaded") })
    }

    /// As [`choose`](Self::choose), where it is known what speaks against
    /// nvidia-peermem.
    pub(super) fn choose_but(dmabuf: &DmabufSupport, peermem: std::result::Result<(), &str>) -> Self {
        match (dmabuf, peermem) {
            (DmabufSupport::Yes, _) => Self::Dmabuf,
            (DmabufSupport::No { .. }, Ok(())) => Self::PeerMem,
            (DmabufSupport::No { because }, Err(either)) => {
                Self::Bounce { because: format!("{because}, and {either}") }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probes_answer_chooses() {
        let yes = DmabufSupport::of_errno(libc::EBADF);
        let no = DmabufSupport::of_errno(libc::EOPNOTSUPP);
        assert_eq!(GpuDirect::choose(&yes, true), GpuDirect::Dmabuf);
        assert_eq!(GpuDirect::choose(&yes, false), GpuDirect::Dmabuf);
        assert_eq!(GpuDirect::choose(&no, true), GpuDirect::PeerMem);
        let bounce = GpuDirect::choose(&no, false).to_string();
        assert!(bounce.contains("does not register dmabufs, and the module nvidia_peermem is not loaded"), "{bounce}");
        let odd = GpuDirect::choose(&DmabufSupport::of_errno(libc::ENODEV), false).to_string();
        assert!(odd.contains("No such device"), "{odd}");
    }

    #[test]
    fn the_module_is_seen_under_each_of_its_names() {
        for name in ["module/nvidia_peermem", "module/nv_peer_mem"] {
            let folder = tempfile::tempdir().expect("a folder");
            assert!(!peermem_loaded(folder.path()));
            std::fs::create_dir_all(folder.path().join(name)).expect("a folder");
            assert!(peermem_loaded(folder.path()), "{name}");
        }
    }
}
