//! Memory that can be registered: pages of an anonymous file, mapped shared, so
//! that a process on the same host can map the same pages and every other
//! transport can treat them as plain memory.
//!
//! Large pages spare the processor's address translation: reserved ones are
//! taken where there are enough, else transparent ones where the kernel grants
//! them to shared memory, else the usual ones ([`Pages`] says which, and why).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::pages::{self, LARGE, Pages};
use crate::{Error, Result};

/// What tells a file on reserved pages by its file system (`statfs(2)`).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// More than this is taken from the reserve by several threads: the kernel clears
/// each page.
const ALONE: usize = 256 << 20;

/// Page-aligned, zeroed, shareable memory.
///
/// Its bytes may change at any time under the hands of a device, a transport
/// or a peer, so it never lends a plain slice safely: [`read`](Self::read) and
/// [`write`](Self::write) copy, and kernels use [`as_ptr`](Self::as_ptr) under
/// the rBlock table's rules of who may touch what when.
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    file: OwnedFd,
    pages: Pages,
}

// SAFETY: the mapping lives as long as the value and is reached through raw
// pointers only; who may access which bytes is the users' protocol.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocates `len` zeroed bytes, rounded up to whole pages of the kind that is
    /// used. Reserved pages are all taken now, others when first touched.
    pub fn new(len: usize) -> Result<Arc<Self>> {
        let mm = Path::new(pages::FOLDER);
        let not_reserved = match pages::reserved(mm, len).and_then(Self::on_reserved) {
            Ok(memory) => return Ok(Arc::new(memory)),
            Err(because) => because,
        };
        let pages = match if len < LARGE { Err(None) } else { transparent().map_err(Some) } {
            Ok(()) => Pages::Transparent,
            Err(None) => Pages::Usual { because: not_reserved },
            Err(Some(because)) => Pages::Usual { because: format!("{not_reserved}; {because}") },
        };
        Self::on_usual(len, pages).map(Arc::new)
    }

    /// On pages of the usual size, or transparent ones where the kernel has them.
    fn on_usual(len: usize, pages: Pages) -> Result<Self> {
        let len = len.max(1).next_multiple_of(rustix::param::page_size());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("distkv", flags).map_err(|e| Error::os("creating shared memory", e))?;
        size(&file, len)?;
        Self::map(file, len, pages)
    }

    /// On reserved pages, `len` being whole ones; the error says what is missing.
    /// A page that could not be had is found out here, not when it is touched.
    fn on_reserved(len: usize) -> std::result::Result<Self, String> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let failed = |what: &str| format!("{} of 2 MiB: {what}", len / LARGE);
        let file = rustix::fs::memfd_create("distkv", flags).map_err(|e| failed(&e.to_string()))?;
        size(&file, len).map_err(|e| failed(&e.to_string()))?;
        let memory = Self::map(file, len, Pages::Reserved).map_err(|e| failed(&e.to_string()))?;
        memory.take().map_err(|e| match e {
            Errno::FAULT => {
                failed("the kernel promised them and refuses one: a limit of the control group's or of NUMA nodes")
            }
            e => failed(&format!("taking them from the reserve: {e}")),
        })?;
        Ok(memory)
    }

    /// Has every page now.
    fn take(&self) -> std::result::Result<(), Errno> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if self.len > ALONE { cores.min(8) } else { 1 };
        let part = self.len.div_ceil(threads).next_multiple_of(LARGE);
        let take = |at: usize| {
            let len = part.min(self.len - at);
            // SAFETY: within the mapping; no byte changes by it.
            unsafe { rustix::mm::madvise(self.as_ptr().add(at).cast(), len, Advice::LinuxPopulateWrite) }
        };
        let taken = std::thread::scope(|scope| {
            let others: Vec<_> = (part..self.len).step_by(part).map(|at| scope.spawn(move || take(at))).collect();
            let first = take(0);
            others.into_iter().fold(first, |taken, other| taken.and(other.join().unwrap_or(Err(Errno::NOMEM))))
        });
        match taken {
            // Linux before 5.14.
            Err(Errno::INVAL) => rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, self.len as u64),
            taken => taken,
        }
    }

    /// Maps memory that another process made and passed as `file`.
    /// Refuses a file that is shorter than `len` or could still shrink, and part
    /// of a page.
    pub fn from_peer(file: OwnedFd, len: usize) -> Result<Arc<Self>> {
        let failed = |e| Error::os("inspecting a peer's memory", e);
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(failed)?;
        if len == 0 || (stat.st_size as u64) < len as u64 || !seals.contains(SealFlags::SHRINK) {
            return Err(Error::Protocol("shared memory is shorter than said, or not sealed".into()));
        }
        let system = rustix::fs::fstatfs(&file).map_err(failed)?;
        let pages = match system.f_type as u64 {
            HUGETLBFS_MAGIC => Pages::Reserved,
            _ => Pages::Usual { because: "a peer made it".into() },
        };
        let page = if pages == Pages::Reserved { system.f_bsize as usize } else { 1 };
        if page == 0 || !len.is_multiple_of(page) {
            return Err(Error::Protocol("shared memory that ends within a page".into()));
        }
        Self::map(file, len, pages).map(Arc::new)
    }

    fn map(file: OwnedFd, len: usize, pages: Pages) -> Result<Self> {
        // Of reserved pages the kernel promises as many as are mapped, or says
        // now that it cannot.
        let flags = match pages {
            Pages::Reserved => MapFlags::SHARED,
            Pages::Transparent | Pages::Usual { .. } => MapFlags::SHARED | MapFlags::NORESERVE,
        };
        // SAFETY: a fresh mapping at an address the kernel chooses aliases
        // nothing that Rust knows of.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0) }
                .map_err(|e| Error::os("mapping shared memory", e))?;
        if pages != Pages::Reserved {
            // No matter if the system grants none.
            // SAFETY: the range was mapped just now.
            let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxHugepage) };
        }
        let base = NonNull::new(base.cast()).ok_or(Error::Protocol("mapping at address 0".into()))?;
        Ok(Self { base, len, file, pages })
    }

    /// The pages it lies on.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Bytes, a multiple of the page size.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: memory has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first byte. Valid for [`len`](Self::len) bytes while `self` lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The file behind it, for a peer on this host to map.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::OutOfRange { offset: offset as u64, len: len as u64, size: self.len as u64 });
        }
        Ok(())
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        self.check(offset, into.len())?;
        // SAFETY: in range; `into` is ours alone. A concurrent writer can tear
        // the bytes, which any bit pattern of u8 allows.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().add(offset), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `len` bytes to `to`. The ranges must not overlap if both are of
    /// the same memory; a copy that does gives unspecified bytes.
    pub fn copy_to(&self, offset: usize, to: &Memory, to_offset: usize, len: usize) -> Result<()> {
        self.check(offset, len)?;
        to.check(to_offset, len)?;
        // SAFETY: both ranges are in range; `copy` allows overlap; as in `read`
        // a concurrent writer can only tear bytes.
        unsafe { std::ptr::copy(self.as_ptr().add(offset), to.as_ptr().add(to_offset), len) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        self.check(offset, from.len())?;
        // SAFETY: in range; as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.as_ptr().add(offset), from.len()) };
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nothing borrows from it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Makes a file as long as `len`, for good: a peer that maps it must never see it
/// shrink under its feet.
fn size(file: &OwnedFd, len: usize) -> Result<()> {
    rustix::fs::ftruncate(file, len as u64).map_err(|e| Error::os("sizing shared memory", e))?;
    rustix::fs::fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW)
        .map_err(|e| Error::os("sealing shared memory", e))
}

/// Does the kernel give shared memory transparent large pages? Asked once, by
/// touching some.
fn transparent() -> std::result::Result<(), String> {
    static GIVEN: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let tried = || {
        pages::transparent(Path::new(pages::FOLDER))?;
        let memory = Memory::on_usual(2 * LARGE, Pages::Transparent).map_err(|e| e.to_string())?;
        let whole = memory.as_ptr().addr().next_multiple_of(LARGE);
        memory.write(whole - memory.as_ptr().addr(), &[1]).map_err(|e| e.to_string())?;
        let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(|e| format!("reading smaps: {e}"))?;
        let given = pages::mapped_large(&smaps, whole);
        given.then_some(()).ok_or_else(|| "the kernel gave no transparent one when asked".into())
    };
    GIVEN.get_or_init(tried).clone()
}
