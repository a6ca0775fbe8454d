//! Memory on large pages, with a kernel that has some: these tests change how
//! many, and put back what was. In the guest of scripts/softroce by its job
//! `fabric-pages`, or as root where nothing else wants large pages:
//!
//!     cargo test -p distkv-fabric --test huge_pages -- --ignored --skip device

#[path = "suite/node.rs"]
#[expect(dead_code, reason = "the suite uses the rest")]
mod node;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use distkv_fabric::shm::{ShmConfig, ShmTransport};
use distkv_fabric::verbs::device::{Context, Mr, MrAccess, Pd};
use distkv_fabric::verbs::sys::Lib;
use distkv_fabric::{Access, Error, Memory, Pages, Transport};

use node::{Node, bytes, drive, join, pattern, write};

const MIB: usize = 1 << 20;
const LARGE: usize = 2 * MIB;

const RESERVE: &str = "/proc/sys/vm/nr_hugepages";
/// Tells the process of another test that it is one.
const ASKED: &str = "DISTKV_TEST_TRANSPARENT";
const SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The kernel's large pages, as they were before when a test ends.
struct Kernel {
    reserve: String,
    shared: Option<String>,
    _alone: MutexGuard<'static, ()>,
}

impl Kernel {
    /// With this many reserved, and no transparent ones for shared memory.
    fn with(pages: usize) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let reserve = fs::read_to_string(RESERVE).expect("a kernel with reserved pages");
        let shared = fs::read_to_string(SHARED).ok().map(|text| {
            let (_, rest) = text.split_once('[').expect("one of them is chosen");
            rest.split_once(']').expect("a word").0.to_owned()
        });
        let kernel = Self { reserve, shared, _alone: alone };
        if kernel.shared.is_some() {
            fs::write(SHARED, "never").expect("root");
        }
        fs::write(RESERVE, pages.to_string()).expect("root");
        assert_eq!(count("nr_hugepages"), pages, "the kernel has that many");
        kernel
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = fs::write(RESERVE, &self.reserve);
        if let Some(shared) = &self.shared {
            let _ = fs::write(SHARED, shared);
        }
    }
}

fn count(name: &str) -> usize {
    let text = fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")).unwrap();
    text.trim().parse().unwrap()
}

fn because(memory: &Memory) -> String {
    let Pages::Usual { because } = memory.pages() else { panic!("{}", memory.pages()) };
    because.clone()
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn reserved_pages_are_taken_at_once_and_given_back() {
    let _kernel = Kernel::with(8);
    let memory = Memory::new(12 * MIB - 5).unwrap();
    assert_eq!((memory.pages(), memory.len()), (&Pages::Reserved, 12 * MIB));
    assert!(memory.as_ptr().addr().is_multiple_of(LARGE));
    // Not promised: there.
    assert_eq!((count("free_hugepages"), count("resv_hugepages")), (2, 0));
    assert_eq!(bytes(&memory, 0, 12 * MIB), vec![0; 12 * MIB]);
    memory.write(11 * MIB, &pattern(MIB, 3)).unwrap();
    assert!(bytes(&memory, 11 * MIB, MIB) == pattern(MIB, 3));
    assert_eq!(Memory::new(64 << 10).unwrap().len(), 64 << 10, "what is small takes none");
    drop(memory);
    assert_eq!(count("free_hugepages"), 8);
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn where_too_few_are_reserved_none_is_taken_and_the_reason_told() {
    let _kernel = Kernel::with(3);
    let first = Memory::new(4 * MIB).unwrap();
    assert_eq!(first.pages(), &Pages::Reserved);
    let memory = Memory::new(4 * MIB).unwrap();
    let told = because(&memory);
    assert!(told.contains("2 of 2 MiB are needed, and 1 of those reserved are free"), "{told}");
    assert!(told.ends_with("; transparent ones are off: shmem_enabled is never"), "{told}");
    assert_eq!(count("free_hugepages"), 1);
    // It is memory all the same.
    memory.write(0, &pattern(4 * MIB, 1)).unwrap();
    assert!(bytes(&memory, 0, 4 * MIB) == pattern(4 * MIB, 1));
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn without_any_the_usual_ones_are_used() {
    let _kernel = Kernel::with(0);
    let told = because(&Memory::new(4 * MIB).unwrap());
    assert!(told.starts_with("none of 2 MiB are reserved: vm.nr_hugepages is 0; "), "{told}");
    assert!(because(&Memory::new(4096).unwrap()).contains("smaller"));
}

/// A control group whose processes may have so many bytes on reserved pages.
struct Group(tempfile::TempDir);

impl Group {
    fn of(bytes: usize) -> Self {
        let group = Self(tempfile::tempdir().unwrap());
        let root = group.0.path();
        assert!(Command::new("mount").args(["-t", "cgroup2", "none"]).arg(root).status().unwrap().success(), "root");
        fs::write(root.join("cgroup.subtree_control"), "+hugetlb").expect("a kernel that limits reserved pages");
        fs::create_dir(group.folder()).unwrap();
        fs::write(group.folder().join("hugetlb.2MB.max"), bytes.to_string()).unwrap();
        group
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("distkv-test")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.folder());
        let _ = fs::write(self.0.path().join("cgroup.subtree_control"), "-hugetlb");
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// The kernel promises pages that a container's limit then refuses: to touch one
/// would end the process by SIGBUS.
#[test]
#[ignore = "changes the kernel's large pages"]
fn pages_that_a_limit_refuses_are_found_out_when_memory_is_made() {
    let _kernel = Kernel::with(8);
    let group = Group::of(4 * MIB);
    let enter = "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"";
    let mut child = Command::new("sh");
    child.args(["-c", enter]).arg(group.folder()).arg(std::env::current_exe().unwrap());
    let child = child.args(["--exact", "limited", "--ignored", "--nocapture"]).env(ASKED, "").output().unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("limited: "), "{:?}: {said}", child.status);
    println!("{}", said.lines().find(|line| line.contains("limited: ")).unwrap_or_default());
}

#[test]
#[ignore = "another test's process"]
fn limited() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    let memory = Memory::new(12 * MIB).unwrap();
    let told = because(&memory);
    println!("limited: {told}");
    assert!(told.contains("6 of 2 MiB: the kernel promised them and refuses one: a limit"), "{told}");
    assert_eq!(count("free_hugepages"), 8, "none is kept");
    memory.write(0, &pattern(12 * MIB, 1)).unwrap();
    assert_eq!(Memory::new(4 * MIB).unwrap().pages(), &Pages::Reserved, "up to the limit");
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn transparent_ones_come_second() {
    let kernel = Kernel::with(0);
    assert!(kernel.shared.is_some(), "a kernel with transparent ones");
    fs::write(SHARED, "advise").unwrap();
    // This process has asked before, and was given none: another one asks.
    let mut child = Command::new(std::env::current_exe().unwrap());
    let child = child.args(["--exact", "transparent", "--ignored", "--nocapture"]).env(ASKED, "").output().unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(String::from_utf8_lossy(&child.stdout).contains("pages: transparent"), "it ran");
}

#[test]
#[ignore = "another test's process"]
fn transparent() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    let memory = Memory::new(4 * MIB).unwrap();
    assert_eq!(memory.pages(), &Pages::Transparent);
    println!("pages: {}", memory.pages());
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn a_peer_maps_the_same_large_pages_and_writes_there() {
    let _kernel = Kernel::with(12);
    let new = || Node { transport: Box::new(ShmTransport::bind(ShmConfig::default()).unwrap()), seen: Vec::new() };
    let (mut a, mut b) = (new(), new());
    let (to_b, _) = join(&mut a, &mut b, b"a");
    let landing = Memory::new(6 * MIB).unwrap();
    let source = Memory::new(6 * MIB).unwrap();
    assert_eq!((landing.pages(), source.pages()), (&Pages::Reserved, &Pages::Reserved));
    let free = count("free_hugepages");
    let theirs = b.transport.register(&landing, Access::RemoteWrite).unwrap();
    let ours = a.transport.register(&source, Access::LocalOnly).unwrap();
    let key = b.transport.remote_key(theirs).unwrap();
    source.write(0, &pattern(6 * MIB, 7)).unwrap();
    a.transport.write(to_b, write(ours, 6 * MIB as u64, &key, Some(1))).unwrap();
    drive([&mut a, &mut b], |[_, b]| b.notified() == [1]);
    assert!(bytes(&landing, 0, 6 * MIB) == pattern(6 * MIB, 7));
    assert_eq!((count("free_hugepages"), count("resv_hugepages")), (free, 0), "mapped, not taken again");
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn part_of_a_large_page_is_not_mapped_for_a_peer() {
    let _kernel = Kernel::with(2);
    let memory = Memory::new(4 * MIB).unwrap();
    let file = || memory.file().try_clone_to_owned().unwrap();
    let refused = Memory::from_peer(file(), 3 * MIB).err();
    assert_eq!(refused, Some(Error::Protocol("shared memory that ends within a page".into())));
    let again = Memory::from_peer(file(), 2 * MIB).unwrap();
    memory.write(5, b"seen").unwrap();
    assert_eq!((again.pages(), again.len(), bytes(&again, 5, 4)), (&Pages::Reserved, 2 * MIB, b"seen".to_vec()));
}

#[test]
#[ignore = "changes the kernel's large pages"]
fn a_device_registers_large_pages() {
    let devices = std::env::var("DISTKV_TEST_VERBS_DEVICES").expect("DISTKV_TEST_VERBS_DEVICES=rxe0");
    let _kernel = Kernel::with(2);
    let memory = Memory::new(4 * MIB).unwrap();
    assert_eq!(memory.pages(), &Pages::Reserved);
    let name = devices.split(',').next().expect("a device");
    let pd = Pd::new(&Context::open(Lib::get().unwrap(), name).unwrap()).unwrap();
    for access in [MrAccess::Local, MrAccess::RemoteWrite, MrAccess::Windows] {
        let region = Mr::register(&pd, &memory, access).unwrap();
        assert_eq!((region.address(), region.len()), (memory.as_ptr().addr() as u64, 4 * MIB));
    }
}
