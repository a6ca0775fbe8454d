//! Making a GPU's memory known to a NIC: as a dmabuf, by its address with
//! nvidia-peermem, or not at all, and then host memory to copy through.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::gpu_direct::{DmabufSupport, GpuDirect};
use super::open::{Mr, MrAccess, Pd};
use crate::{Dmabuf, GpuRange, Memory, Result};

/// Makes memory known to one NIC.
pub trait Registrar {
    /// What it has then.
    type Region;
    /// By a dmabuf of `gpu`.
    fn take_dmabuf(&self, gpu: &Arc<dyn GpuRange>, dmabuf: &Dmabuf, access: MrAccess) -> Result<Self::Region>;
    /// By the GPU's address.
    fn take_address(&self, gpu: &Arc<dyn GpuRange>, access: MrAccess) -> Result<Self::Region>;
    /// The host's.
    fn take_host(&self, memory: &Arc<Memory>, access: MrAccess) -> Result<Self::Region>;
}

impl Registrar for Arc<Pd> {
    type Region = Mr;

    fn take_dmabuf(&self, gpu: &Arc<dyn GpuRange>, dmabuf: &Dmabuf, access: MrAccess) -> Result<Mr> {
        let (len, address) = (dmabuf.len.min(gpu.bytes()), gpu.device_address());
        let owner = Arc::new(Arc::clone(gpu));
        Mr::register_dmabuf(self, dmabuf.file.as_fd(), dmabuf.offset, len, address, access, owner)
    }

    fn take_address(&self, gpu: &Arc<dyn GpuRange>, access: MrAccess) -> Result<Mr> {
        let start = std::ptr::without_provenance_mut(gpu.device_address() as usize);
        // SAFETY: what every `GpuRange` promises; the owner is one.
        unsafe { Mr::register_raw(self, start, gpu.bytes(), access, Arc::new(Arc::clone(gpu))) }
    }

    fn take_host(&self, memory: &Arc<Memory>, access: MrAccess) -> Result<Mr> {
        Mr::register(self, memory, access)
    }
}

/// How a NIC reaches a GPU's memory, tried and working.
pub struct Reached<R> {
    /// The way.
    pub way: GpuDirect,
    /// The GPU's memory as the NIC has it; where the way is a copy, `host`.
    pub region: R,
    /// Host memory to copy through, where the way is a copy.
    pub host: Option<Arc<Memory>>,
    /// The better ways that were tried, and what failed of each.
    pub failed: Vec<(&'static str, String)>,
}

/// Makes `gpu` known to the NIC called `name`, whose support is known: by the way
/// that [`GpuDirect::choose`] takes, and where that fails by the next. The last
/// is host memory of `bounce` bytes to copy through; an error only where that
/// cannot be registered either. What failed is logged, once.
pub fn reach<R: Registrar>(
    nic: &R,
    name: &str,
    (dmabuf, peermem): (&DmabufSupport, bool),
    gpu: &Arc<dyn GpuRange>,
    access: MrAccess,
    bounce: usize,
) -> Result<Reached<R::Region>> {
    let mut failed = Vec::new();
    let mut support = dmabuf.clone();
    let mut way = GpuDirect::choose(&support, peermem);
    if way == GpuDirect::Dmabuf {
        match by_dmabuf(nic, gpu, access) {
            Ok(region) => return Ok(Reached { way: said(name, way), region, host: None, failed }),
            Err(because) => {
                failed.push(("dmabuf", because.clone()));
                support = DmabufSupport::No { because };
                way = GpuDirect::choose(&support, peermem);
            }
        }
    }
    if way == GpuDirect::PeerMem {
        match by_address(nic, gpu, access) {
            Ok(region) => return Ok(Reached { way: said(name, way), region, host: None, failed }),
            Err(because) => {
                way = GpuDirect::choose_but(&support, Err(&because));
                failed.push(("nvidia-peermem", because));
            }
        }
    }
    let memory = Memory::new(bounce)?;
    let region = nic.take_host(&memory, access)?;
    Ok(Reached { way: said(name, way), region, host: Some(memory), failed })
}

fn by_dmabuf<R: Registrar>(
    nic: &R,
    gpu: &Arc<dyn GpuRange>,
    access: MrAccess,
) -> std::result::Result<R::Region, String> {
    gpu.prepare().map_err(|e| format!("the GPU's driver did not ready its memory for a NIC: {e}"))?;
    let dmabuf = gpu.export().map_err(|e| format!("the GPU's memory was not exported as a dmabuf: {e}"))?;
    nic.take_dmabuf(gpu, &dmabuf, access).map_err(|e| format!("the NIC did not take the dmabuf: {e}"))
}

fn by_address<R: Registrar>(
    nic: &R,
    gpu: &Arc<dyn GpuRange>,
    access: MrAccess,
) -> std::result::Result<R::Region, String> {
    gpu.prepare().map_err(|e| format!("the GPU's driver did not ready its memory for a NIC: {e}"))?;
    nic.take_address(gpu, access).map_err(|e| format!("the NIC did not take the GPU's address: {e}"))
}

/// Logs a way, once for each NIC and reason.
fn said(name: &str, way: GpuDirect) -> GpuDirect {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let line = format!("{name} reaches the GPU's memory by {way}");
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(line.clone()) {
        match way {
            GpuDirect::Bounce { .. } => tracing::warn!("{line}"),
            GpuDirect::Dmabuf | GpuDirect::PeerMem => tracing::info!("{line}"),
        }
    }
    way
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::Error;

    /// A GPU's memory of which the driver says what a test wants.
    struct Gpu {
        prepares: bool,
        exports: bool,
    }

    // SAFETY: no range: nothing here reads or writes it.
    unsafe impl GpuRange for Gpu {
        fn device_address(&self) -> u64 {
            0x7f00_0000_0000
        }

        fn bytes(&self) -> usize {
            1 << 21
        }

        fn prepare(&self) -> std::result::Result<(), String> {
            self.prepares.then_some(()).ok_or("not now".into())
        }

        fn export(&self) -> std::result::Result<Dmabuf, String> {
            let file = std::fs::File::open("/dev/null").map_err(|e| e.to_string())?;
            match self.exports {
                true => Ok(Dmabuf { file: file.into(), offset: 4096, len: 1 << 21 }),
                false => Err("the driver has no dmabufs".into()),
            }
        }
    }

    /// A NIC that takes what it is told to, and notes what it was asked.
    #[derive(Default)]
    struct Nic {
        takes: [bool; 3],
        asked: RefCell<Vec<&'static str>>,
    }

    impl Nic {
        fn asked(&self, what: &'static str, takes: bool) -> Result<&'static str> {
            self.asked.borrow_mut().push(what);
            takes.then_some(what).ok_or_else(|| Error::os("registering memory", format!("{what} refused")))
        }
    }

    impl Registrar for Nic {
        type Region = &'static str;

        fn take_dmabuf(&self, _: &Arc<dyn GpuRange>, dmabuf: &Dmabuf, _: MrAccess) -> Result<&'static str> {
            assert_eq!((dmabuf.offset, dmabuf.len), (4096, 1 << 21));
            self.asked("dmabuf", self.takes[0])
        }

        fn take_address(&self, gpu: &Arc<dyn GpuRange>, _: MrAccess) -> Result<&'static str> {
            assert_eq!((gpu.device_address(), gpu.bytes()), (0x7f00_0000_0000, 1 << 21));
            self.asked("address", self.takes[1])
        }

        fn take_host(&self, memory: &Arc<Memory>, _: MrAccess) -> Result<&'static str> {
            assert_eq!(memory.len(), 64 << 10);
            self.asked("host", self.takes[2])
        }
    }

    fn no() -> DmabufSupport {
        DmabufSupport::No { because: "the kernel is old".into() }
    }

    fn tried(nic: &Nic, support: DmabufSupport, peermem: bool, gpu: Gpu) -> Result<Reached<&'static str>> {
        let gpu: Arc<dyn GpuRange> = Arc::new(gpu);
        reach(nic, "mlx5_0", (&support, peermem), &gpu, MrAccess::RemoteWrite, 64 << 10)
    }

    const WILLING: Gpu = Gpu { prepares: true, exports: true };

    #[test]
    fn the_best_way_that_works_is_taken_and_none_after_it_is_tried() {
        let cases = [
            (DmabufSupport::Yes, true, [true, true, true], &["dmabuf"][..], GpuDirect::Dmabuf),
            (DmabufSupport::Yes, true, [false, true, true], &["dmabuf", "address"], GpuDirect::PeerMem),
            (no(), true, [true, true, true], &["address"], GpuDirect::PeerMem),
        ];
        for (support, peermem, takes, asked, way) in cases {
            let nic = Nic { takes, ..Nic::default() };
            let reached = tried(&nic, support, peermem, WILLING).expect("a way");
            assert_eq!((&nic.asked.borrow()[..], &reached.way), (asked, &way));
            assert_eq!((Some(&reached.region), reached.host.is_none()), (asked.last(), true));
            assert_eq!(reached.failed.len(), asked.len() - 1);
        }
    }

    #[test]
    fn a_copy_comes_last_and_names_all_that_failed_before() {
        let cases = [
            // Claimed by the NIC, and refused when it came to it.
            (
                DmabufSupport::Yes,
                true,
                WILLING,
                "dmabuf,address,host",
                "dmabuf refused, and the NIC did not take the GPU",
            ),
            (
                DmabufSupport::Yes,
                false,
                WILLING,
                "dmabuf,host",
                "dmabuf refused, and the module nvidia_peermem is not loaded",
            ),
            (no(), true, WILLING, "address,host", "the kernel is old, and the NIC did not take the GPU's address"),
            (no(), false, WILLING, "host", "the kernel is old, and the module nvidia_peermem is not loaded"),
            // The GPU's own driver refuses: the NIC is not asked.
            (
                DmabufSupport::Yes,
                true,
                Gpu { exports: false, ..WILLING },
                "address,host",
                "the driver has no dmabufs, and the NIC",
            ),
            (
                DmabufSupport::Yes,
                true,
                Gpu { prepares: false, ..WILLING },
                "host",
                "not now, and the GPU's driver did not ready",
            ),
        ];
        for (support, peermem, gpu, asked, told) in cases {
            let nic = Nic { takes: [false, false, true], ..Nic::default() };
            let reached = tried(&nic, support.clone(), peermem, gpu).expect("a copy");
            assert_eq!(nic.asked.borrow().join(","), asked);
            assert_eq!((reached.region, reached.host.map(|memory| memory.len())), ("host", Some(64 << 10)));
            let GpuDirect::Bounce { because } = reached.way else { panic!("{:?}", reached.way) };
            assert!(because.contains(told), "{because}");
            assert_eq!(reached.failed.len(), usize::from(support == DmabufSupport::Yes) + usize::from(peermem));
            assert!(reached.failed.iter().all(|(_, why)| because.contains(why.as_str())), "{:?}", reached.failed);
        }
    }

    #[test]
    fn where_not_even_host_memory_is_registered_it_is_an_error() {
        let error = tried(&Nic::default(), DmabufSupport::Yes, true, WILLING).err().expect("nothing works").to_string();
        assert!(error.contains("host refused"), "{error}");
    }
}
