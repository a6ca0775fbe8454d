//! A GPU's memory beside a device of the kernel's that takes no dmabufs: in the
//! guest of scripts/softroce, by its job `fabric-faults`. There is no GPU there;
//! in its place stands host memory, which is at least the process's own.
#![allow(unsafe_code)]

use std::path::Path;
use std::sync::Arc;

use distkv_fabric::verbs::device::{
    Context, DmabufSupport, GpuDirect, MrAccess, Pd, SYSFS, peermem_loaded, reach, survey,
};
use distkv_fabric::verbs::sys::Lib;
use distkv_fabric::{Dmabuf, GpuRange, Memory};

use crate::guest::DEVICES;

const LEN: usize = 1 << 20;
const BOUNCE: usize = 256 << 10;

struct InItsPlace(Arc<Memory>);

// SAFETY: mapped while it lives, and never lent as bytes.
unsafe impl GpuRange for InItsPlace {
    fn device_address(&self) -> u64 {
        self.0.as_ptr().addr() as u64
    }

    fn bytes(&self) -> usize {
        self.0.len()
    }

    fn prepare(&self) -> Result<(), String> {
        Ok(())
    }

    fn export(&self) -> Result<Dmabuf, String> {
        let file = self.0.file().try_clone_to_owned().map_err(|e| e.to_string())?;
        Ok(Dmabuf { file, offset: 0, len: self.0.len() })
    }
}

#[test]
#[ignore = "in the guest of scripts/softroce"]
fn a_device_without_dmabufs_gets_the_next_way_that_works() {
    let devices = std::env::var(DEVICES).expect("DISTKV_TEST_VERBS_DEVICES=rxe0,rxe1");
    let name = devices.split(',').next().expect("a device");
    let lib = Lib::get().unwrap();
    let found = survey(lib, Path::new(SYSFS)).unwrap();
    let device = found.devices.iter().find(|device| device.name == name).expect("the device");
    // What the probe says, and that it is right.
    let DmabufSupport::No { because } = &device.dmabuf else { panic!("rxe takes dmabufs now: {device:?}") };
    assert!(because.contains("does not register dmabufs"), "{because}");
    assert!(!peermem_loaded(Path::new(SYSFS)) && !device.peermem);
    assert!(matches!(device.gpu_direct(), GpuDirect::Bounce { .. }));

    let pd = Pd::new(&Context::open(lib, name).unwrap()).unwrap();
    let memory = Memory::new(LEN).unwrap();
    let (address, kept) = (memory.as_ptr().addr() as u64, Arc::downgrade(&memory));
    let gpu: Arc<dyn GpuRange> = Arc::new(InItsPlace(memory));
    let tried =
        |dmabuf: &DmabufSupport, peermem| reach(&pd, name, (dmabuf, peermem), &gpu, MrAccess::RemoteWrite, BOUNCE);

    // As it is: a copy, through memory that is registered indeed.
    let reached = tried(&device.dmabuf, device.peermem).unwrap();
    let host = reached.host.expect("host memory");
    assert_eq!((reached.region.address(), reached.region.len()), (host.as_ptr().addr() as u64, BOUNCE));
    assert!(reached.failed.is_empty() && reached.region.rkey() != 0);
    println!("{name}: {}", reached.way);

    // Told that it takes dmabufs, it refuses one, and the next is tried.
    let reached = tried(&DmabufSupport::Yes, false).unwrap();
    let GpuDirect::Bounce { because } = &reached.way else { panic!("{:?}", reached.way) };
    println!("{name}, told that it takes dmabufs: {because}");
    assert!(because.starts_with("the NIC did not take the dmabuf: registering memory: "), "{because}");
    assert!(because.ends_with(", and the module nvidia_peermem is not loaded"), "{because}");
    assert_eq!(reached.failed.iter().map(|(what, _)| *what).collect::<Vec<_>>(), ["dmabuf"]);

    // With peermem the address is registered like any other, and keeps the memory.
    let reached = tried(&DmabufSupport::Yes, true).unwrap();
    assert_eq!((&reached.way, reached.host.is_none()), (&GpuDirect::PeerMem, true));
    assert_eq!((reached.region.address(), reached.region.len()), (address, LEN));
    drop(gpu);
    assert!(kept.upgrade().is_some(), "the registration keeps it");
    drop(reached);
    assert!(kept.upgrade().is_none());

    // An address where nothing is mapped is refused, and a copy is left.
    struct Nowhere;
    // SAFETY: no range: the kernel refuses it.
    unsafe impl GpuRange for Nowhere {
        fn device_address(&self) -> u64 {
            1 << 46
        }
        fn bytes(&self) -> usize {
            LEN
        }
        fn prepare(&self) -> Result<(), String> {
            Ok(())
        }
        fn export(&self) -> Result<Dmabuf, String> {
            Err("nothing is there".into())
        }
    }
    let gpu: Arc<dyn GpuRange> = Arc::new(Nowhere);
    let reached = reach(&pd, name, (&DmabufSupport::Yes, true), &gpu, MrAccess::RemoteWrite, BOUNCE).unwrap();
    let GpuDirect::Bounce { because } = &reached.way else { panic!("{:?}", reached.way) };
    println!("{name}, an address where nothing is: {because}");
    assert!(because.contains("nothing is there, and the NIC did not take the GPU's address"), "{because}");
    assert_eq!(reached.failed.iter().map(|(what, _)| *what).collect::<Vec<_>>(), ["dmabuf", "nvidia-peermem"]);
}
