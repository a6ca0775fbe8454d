//! Looking at devices, opening and registering, against a libibverbs of two
//! devices that `fake_verbs.c` makes up; it ends the process where anything is
//! freed too early, and fails its exit where something is not freed.
//!
//! Needs a C compiler and libibverbs-dev (`scripts/setup --test`).
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use distkv_fabric::verbs::device::{
    Context, DmabufSupport, GidKind, GpuDirect, Link, Mr, MrAccess, Pd, PortState, VerbsConfig, rails, reach, survey,
};
use distkv_fabric::verbs::sys::Lib;
use distkv_fabric::{Dmabuf, Error, GpuRange, Memory};

/// The made-up library, compiled once a process.
fn fake() -> &'static Lib {
    static LIB: OnceLock<Lib> = OnceLock::new();
    LIB.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let library: PathBuf = folder.path().join("libfake.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_verbs.c");
        let mut compiler = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
        let compiled = compiler.args(["-shared", "-fPIC", source, "-o"]).arg(&library).output();
        let compiled = compiled.expect("no C compiler: run scripts/setup --test");
        let complaint = String::from_utf8_lossy(&compiled.stderr);
        assert!(compiled.status.success(), "libibverbs-dev is needed: run scripts/setup --test\n{complaint}");
        Lib::open(library.to_str().expect("a path in UTF-8")).expect("the made-up library")
    })
}

/// A sysfs that tells the types of fake_1's GIDs and the speeds.
fn sysfs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (port, rate) in [("fake_0/ports/1", "400 Gb/sec (4X NDR)"), ("fake_1/ports/1", "100 Gb/sec (4X EDR)")] {
        let port = folder.path().join("class/infiniband").join(port);
        fs::create_dir_all(port.join("gid_attrs/types")).expect("a folder");
        fs::write(port.join("rate"), format!("{rate}\n")).expect("a file");
        fs::write(port.join("gid_attrs/types/0"), "IB/RoCE v1\n").expect("a file");
        fs::write(port.join("gid_attrs/types/255"), "RoCE v2\n").expect("a file");
    }
    folder
}

#[test]
fn a_survey_tells_devices_ports_and_gids() {
    let sysfs = sysfs();
    let found = survey(fake(), sysfs.path()).expect("a survey");
    assert!(found.failed.is_empty(), "{:?}", found.failed);
    let [ib, roce] = &found.devices[..] else { panic!("{:?}", found.devices) };

    assert_eq!((ib.name.as_str(), ib.ports.len(), &ib.dmabuf), ("fake_0", 1, &DmabufSupport::Yes));
    let port = &ib.ports[0];
    assert_eq!((port.state, port.link, port.mtu), (PortState::Active, Link::InfiniBand, 4096));
    assert_eq!((port.lid, port.gigabits), (17, Some(400)));
    assert_eq!(port.gids.iter().map(|gid| (gid.index, gid.kind)).collect::<Vec<_>>(), [(0, GidKind::InfiniBand)]);

    assert_eq!((roce.name.as_str(), roce.ports.len()), ("fake_1", 2));
    assert!(matches!(&roce.dmabuf, DmabufSupport::No { because } if because.contains("does not register dmabufs")));
    let port = &roce.ports[0];
    assert_eq!((port.link, port.mtu, port.gigabits), (Link::Ethernet, 1024, Some(100)));
    let gids: Vec<_> = port.gids.iter().map(|gid| (gid.index, gid.kind, gid.to_string())).collect();
    assert_eq!(gids, [(0, GidKind::RoceV1, "10.0.0.1".into()), (255, GidKind::RoceV2, "10.0.0.1".into())]);
    assert_eq!((roce.ports[1].state, roce.ports[1].gids.len()), (PortState::Down, 0));
}

#[test]
fn rails_of_the_survey() {
    let sysfs = sysfs();
    let found = survey(fake(), sysfs.path()).expect("a survey");
    let config = VerbsConfig { max_rails: 4, ..VerbsConfig::default() };
    let rails = rails(&found.devices, &config.near.place(sysfs.path()).expect("anywhere"), &config);
    let names: Vec<_> = rails.chosen.iter().map(|rail| (rail.device.as_str(), rail.port, rail.gid.index)).collect();
    assert_eq!(names, [("fake_0", 1, 0), ("fake_1", 1, 255)]);
    assert_eq!(rails.passed_over, [("fake_1:2".to_string(), "the port is down".to_string())]);
}

#[test]
fn a_region_keeps_what_it_needs_until_it_is_dropped() {
    let context = Context::open(fake(), "fake_0").expect("the device");
    assert_eq!(context.attributes().expect("attributes").max_qp_wr, 8192);
    let pd = Pd::new(&context).expect("a domain");
    let memory = Memory::new(4096).expect("memory");
    let local = Mr::register(&pd, &memory, MrAccess::Local).expect("a region");
    let remote = Mr::register(&pd, &memory, MrAccess::RemoteWrite).expect("a region");
    assert_eq!((local.lkey(), local.rkey(), remote.rkey()), (7, 0, 8));
    assert_eq!((remote.address(), remote.len()), (memory.as_ptr().addr() as u64, memory.len()));
    // The regions alone hold domain, device and memory now; freed in a wrong
    // order the library would end the process.
    let kept = Arc::downgrade(&memory);
    drop((context, pd, memory, local));
    assert!(kept.upgrade().is_some());
    drop(remote);
    assert!(kept.upgrade().is_none());
}

#[test]
fn a_registration_that_fails_tells_the_limit_on_locked_memory() {
    let pd = Pd::new(&Context::open(fake(), "fake_0").expect("the device")).expect("a domain");
    let memory = Memory::new(2 << 20).expect("memory");
    let error = Mr::register(&pd, &memory, MrAccess::Local).err().expect("the library allows 1 MiB").to_string();
    assert!(error.starts_with("registering memory: Cannot allocate memory (os error 12) (2097152 bytes"), "{error}");
}

#[test]
fn dmabufs_are_registered_without_the_optional_flag_where_it_is_refused() {
    let file = fs::File::open("/dev/null").expect("a descriptor");
    let register = |name: &str| {
        let pd = Pd::new(&Context::open(fake(), name).expect("the device")).expect("a domain");
        Mr::register_dmabuf(&pd, file.as_fd(), 64, 4096, 1 << 20, MrAccess::RemoteWrite, Arc::new(()))
    };
    let region = register("fake_0").expect("a region");
    assert_eq!((region.lkey(), region.rkey(), region.address(), region.len()), (64, 1 << 20, 1 << 20, 4096));
    let error = register("fake_1").err().expect("this device has no dmabufs").to_string();
    assert!(error.contains("not supported"), "{error}");
}

/// What a GPU's driver would give.
struct Exported;

// SAFETY: no range: the made-up library reads and writes nothing.
unsafe impl GpuRange for Exported {
    fn device_address(&self) -> u64 {
        3 << 20
    }

    fn bytes(&self) -> usize {
        5000
    }

    fn prepare(&self) -> Result<(), String> {
        Ok(())
    }

    fn export(&self) -> Result<Dmabuf, String> {
        let file = fs::File::open("/dev/null").map_err(|e| e.to_string())?;
        Ok(Dmabuf { file: file.into(), offset: 8192, len: 8192 })
    }
}

#[test]
fn a_gpus_memory_is_registered_under_its_own_address_as_far_as_it_goes() {
    let reached = |name: &str, dmabuf| {
        let pd = Pd::new(&Context::open(fake(), name).expect("the device")).expect("a domain");
        let gpu: Arc<dyn GpuRange> = Arc::new(Exported);
        reach(&pd, name, (&dmabuf, false), &gpu, MrAccess::RemoteWrite, 4096).expect("a way")
    };
    let by = reached("fake_0", DmabufSupport::Yes);
    assert_eq!((&by.way, by.region.address(), by.region.len()), (&GpuDirect::Dmabuf, 3 << 20, 5000));
    // The library's keys are the offset and the address that it was given.
    assert_eq!((by.region.lkey(), by.region.rkey()), (8192, 3 << 20));
    let by = reached("fake_1", DmabufSupport::Yes);
    assert!(
        matches!(&by.way, GpuDirect::Bounce { because } if because.contains("did not take the dmabuf")),
        "{}",
        by.way
    );
    assert_eq!(by.region.len(), by.host.expect("host memory").len());
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let error = Context::open(fake(), "mlx5_0").err().expect("opened a device that is not there");
    let because = "there is no RDMA device mlx5_0".to_string();
    assert_eq!(error, Error::Unavailable { transport: "verbs", because });
}

#[test]
fn the_systems_own_library_lists_devices_or_says_why_not() {
    // Debian's libibverbs-dev, which these tests need, brings the library.
    let lib = Lib::get().expect("libibverbs.so.1");
    match survey(lib, Path::new("/sys")) {
        Ok(found) => assert!(found.devices.iter().all(|device| !device.name.is_empty())),
        Err(error) => assert!(error.to_string().starts_with("verbs cannot be used: "), "{error}"),
    }
}
