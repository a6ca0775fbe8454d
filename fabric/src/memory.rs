//! Memory that can be registered: pages of an anonymous file, mapped shared, so
//! that a process on the same host can map the same pages and every other
//! transport can treat them as plain memory.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{Error, Result};

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
}

// SAFETY: the mapping lives as long as the value and is reached through raw
// pointers only; who may access which bytes is the users' protocol.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Allocates `len` zeroed bytes, rounded up to whole pages. Pages are taken
    /// from the system when first touched.
    pub fn new(len: usize) -> Result<Arc<Self>> {
        let len = len.max(1).next_multiple_of(rustix::param::page_size());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("distkv", flags).map_err(|e| Error::os("creating shared memory", e))?;
        rustix::fs::ftruncate(&file, len as u64).map_err(|e| Error::os("sizing shared memory", e))?;
        // A peer that maps the file must never see it shrink under its feet.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(|e| Error::os("sealing shared memory", e))?;
        Self::map(file, len).map(Arc::new)
    }

    /// Maps memory that another process made and passed as `file`.
    /// Refuses a file that is shorter than `len` or could still shrink.
    pub fn from_peer(file: OwnedFd, len: usize) -> Result<Arc<Self>> {
        let stat = rustix::fs::fstat(&file).map_err(|e| Error::os("inspecting a peer's memory", e))?;
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|e| Error::os("inspecting a peer's memory", e))?;
        if len == 0 || (stat.st_size as u64) < len as u64 || !seals.contains(SealFlags::SHRINK) {
            return Err(Error::Protocol("shared memory is shorter than said, or not sealed".into()));
        }
        Self::map(file, len).map(Arc::new)
    }

    fn map(file: OwnedFd, len: usize) -> Result<Self> {
        // SAFETY: a fresh mapping at an address the kernel chooses aliases
        // nothing that Rust knows of.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )
        }
        .map_err(|e| Error::os("mapping shared memory", e))?;
        // Large pages spare the TLB where the system grants them; no matter if
        // it does not.
        // SAFETY: the range was mapped just now.
        let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxHugepage) };
        let base = NonNull::new(base.cast()).ok_or(Error::Protocol("mapping at address 0".into()))?;
        Ok(Self { base, len, file })
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
