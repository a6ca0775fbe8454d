//! Memory of the GPU, and of the host where the GPU reaches it.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::{result, sys};
use distkv_fabric::Dmabuf;
use distkv_fabric::GpuRange;

use super::driver::{Context, Stream, failed};
use super::refusal::{no_pinned_room, no_room};
use crate::device::{DeviceError, Result};
use crate::kv::pool::DeviceMemory;

const OUT_OF_MEMORY: sys::cudaError_enum = sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY;

/// Bytes of the GPU's memory. Not cleared.
pub struct GpuMemory {
    context: Arc<Context>,
    address: u64,
    len: usize,
}

impl GpuMemory {
    /// Allocates `len` bytes, `what` for people.
    pub fn new(context: &Arc<Context>, len: usize, what: &str) -> Result<Self> {
        context.bind()?;
        // SAFETY: asks for memory, nothing more.
        let address = unsafe { result::malloc_sync(len.max(1)) }.map_err(|e| match e.0 {
            OUT_OF_MEMORY => no_room(len, what, result::mem_get_info().ok()),
            _ => failed(&format!("allocating {:.1} MiB for {what}", len as f64 / (1 << 20) as f64), e),
        })?;
        Ok(Self { context: context.clone(), address, len })
    }

    /// Where it begins, on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Fills it with one byte, behind what the stream was given.
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<()> {
        self.fill_range(stream, 0..self.len, byte)
    }

    /// The same for some of them.
    pub fn fill_range(&self, stream: &Stream, range: std::ops::Range<usize>, byte: u8) -> Result<()> {
        assert!(range.end <= self.len, "a range beyond its memory");
        // SAFETY: the range is of this allocation, as checked.
        unsafe { result::memset_d8_async(self.address + range.start as u64, byte, range.len(), stream.raw()) }
            .map_err(|e| failed("filling memory", e))
    }

    /// Copies `from` to `at`, behind what the stream was given. `from` stays as it
    /// is until the stream has come by: it is pinned memory.
    pub fn upload(&self, stream: &Stream, at: usize, from: &Pinned, range: std::ops::Range<usize>) -> Result<()> {
        assert!(at + range.len() <= self.len, "a copy beyond its target");
        // SAFETY: both ranges were checked; pinned memory lives as long as its
        // device, which waits for the stream before it goes.
        unsafe { result::memcpy_htod_async(self.address + at as u64, &from.bytes()[range], stream.raw()) }
            .map_err(|e| failed("a copy to the GPU", e))
    }

    /// Copies from `at` to `to`, behind what the stream was given; the bytes are
    /// there when the stream has come by.
    pub fn download(&self, stream: &Stream, at: usize, to: &mut Pinned, range: std::ops::Range<usize>) -> Result<()> {
        assert!(at + range.len() <= self.len, "a copy beyond its source");
        // SAFETY: as in `upload`.
        unsafe { result::memcpy_dtoh_async(&mut to.bytes_mut()[range], self.address + at as u64, stream.raw()) }
            .map_err(|e| failed("a copy from the GPU", e))
    }

    /// `len` bytes from `at` on as a dmabuf, for another device's driver to map: the
    /// file is that range and no more. Begin and end lie on the host's pages, as
    /// the driver demands; an error says what of that does not hold, that this
    /// driver exports nothing, or why it refused.
    pub fn export(&self, at: usize, len: usize) -> Result<OwnedFd> {
        exportable(self.address, self.len, at, len, rustix::param::page_size())?;
        if !self.context.properties().dma_buf {
            return Err(DeviceError::Unsupported(
                "CUDA: this driver exports no memory of this GPU as a dmabuf \
                 (CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED is 0); the open kernel modules and Linux 5.12 do"
                    .into(),
            ));
        }
        self.context.bind()?;
        let mut fd: c_int = -1;
        let kind = sys::CUmemRangeHandleType_enum::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        // SAFETY: the range was checked; for this kind of handle an int is written.
        unsafe { sys::cuMemGetHandleForAddressRange((&raw mut fd).cast(), self.address + at as u64, len, kind, 0) }
            .result()
            .map_err(|e| failed(&format!("exporting {len} bytes of the GPU's memory as a dmabuf"), e))?;
        if fd < 0 {
            return Err(DeviceError::System("exporting the GPU's memory: the driver gave no file".into()));
        }
        // SAFETY: a file that the driver opened for us just now.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Copies that the driver would let go on behind the caller's back, and that a
    /// NIC's accesses could overtake, wait from now on.
    fn wait_for_copies(&self) -> Result<()> {
        self.context.bind()?;
        let on: u32 = 1;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS;
        // SAFETY: for this attribute an unsigned int is read; the address is of an
        // allocation that lives.
        unsafe { sys::cuPointerSetAttribute((&raw const on).cast(), attribute, self.address) }
            .result()
            .map_err(|e| failed("having copies of the GPU's memory wait", e))
    }
}

/// May `len` bytes from `at` on of `size` bytes at `address` be exported, with
/// host pages of `page` bytes?
fn exportable(address: u64, size: usize, at: usize, len: usize, page: usize) -> Result<()> {
    let refuse =
        |because: String| Err(DeviceError::Unsupported(format!("CUDA: no dmabuf of the GPU's memory: {because}")));
    let begin = address + at as u64;
    if len == 0 || at.checked_add(len).is_none_or(|end| end > size) {
        return refuse(format!("{len} bytes from {at} on are not within its {size} bytes"));
    }
    if !begin.is_multiple_of(page as u64) || !len.is_multiple_of(page) {
        return refuse(format!(
            "{len} bytes at address {begin:#x} do not begin and end on a page of the host, {page} bytes"
        ));
    }
    Ok(())
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new`, and whoever drops it has waited for
            // what uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// The GPU's large pages: what takes whole ones begins at one, while less shares one
/// with others (seen on an H200) and would begin anywhere in a page of the host.
const WHOLE: usize = 2 << 20;

/// KV of a pool. Copies to and from it are behind everything given to the
/// device's stream, and are done when they return.
pub struct KvMemory {
    /// Whole pages of the GPU's, so that all of it can be exported.
    memory: GpuMemory,
    len: usize,
    stream: Arc<Stream>,
}

impl KvMemory {
    /// Allocates `len` bytes.
    pub fn new(stream: &Arc<Stream>, len: usize) -> Result<Self> {
        let whole = len.max(1).next_multiple_of(WHOLE);
        Ok(Self { memory: GpuMemory::new(stream.context(), whole, "the KV pool")?, len, stream: stream.clone() })
    }

    /// A part of it as a dmabuf: see [`GpuMemory::export`].
    pub fn export_part(&self, at: usize, len: usize) -> Result<OwnedFd> {
        self.memory.export(at, len)
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "a copy beyond the pool");
    }
}

// SAFETY: the allocation lives as long as this; it is reached by copies of the
// stream and by kernels only, never lent as bytes.
unsafe impl GpuRange for KvMemory {
    fn device_address(&self) -> u64 {
        self.memory.address
    }

    fn bytes(&self) -> usize {
        self.len
    }

    fn prepare(&self) -> std::result::Result<(), String> {
        self.memory.wait_for_copies().map_err(|e| e.to_string())
    }

    fn export(&self) -> std::result::Result<Dmabuf, String> {
        let len = self.memory.len;
        let file = self.memory.export(0, len).map_err(|e| e.to_string())?;
        Ok(Dmabuf { file, offset: 0, len })
    }
}

impl DeviceMemory for KvMemory {
    fn address(&self) -> u64 {
        self.memory.address
    }

    fn len(&self) -> usize {
        self.len
    }

    fn for_nic(self: Arc<Self>) -> Option<Arc<dyn GpuRange>> {
        Some(self)
    }

    fn read(&self, offset: usize, to: &mut [u8]) -> std::result::Result<(), String> {
        self.check(offset, to.len());
        let mut copy = || {
            self.stream.context().bind()?;
            // SAFETY: the range was checked; `to` is there until the stream has
            // come by, since that is waited for.
            unsafe { result::memcpy_dtoh_async(to, self.memory.address + offset as u64, self.stream.raw()) }
                .map_err(|e| failed("reading KV from the GPU", e))?;
            self.stream.synchronize()
        };
        copy().map_err(|e: DeviceError| e.to_string())
    }

    fn write(&self, offset: usize, from: &[u8]) -> std::result::Result<(), String> {
        self.check(offset, from.len());
        let copy = || {
            self.stream.context().bind()?;
            // SAFETY: as in `read`.
            unsafe { result::memcpy_htod_async(self.memory.address + offset as u64, from, self.stream.raw()) }
                .map_err(|e| failed("writing KV to the GPU", e))?;
            self.stream.synchronize()
        };
        copy().map_err(|e: DeviceError| e.to_string())
    }
}

/// Memory of the host that the GPU reaches: page-locked, the same address on
/// both.
pub struct Pinned {
    context: Arc<Context>,
    pointer: *mut c_void,
    len: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: shared borrows only read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates `len` bytes, all 0. Cached, so that the host reads it fast.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Self> {
        context.bind()?;
        let len = len.max(1);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: asks for memory, then clears it.
        unsafe {
            let pointer = result::malloc_host(len, flags).map_err(|e| match e.0 {
                OUT_OF_MEMORY => no_pinned_room(len),
                _ => failed(&format!("page-locking {:.1} MiB of host memory", len as f64 / (1 << 20) as f64), e),
            })?;
            std::ptr::write_bytes(pointer.cast::<u8>(), 0, len);
            Ok(Self { context: context.clone(), pointer, len })
        }
    }

    /// Where it begins, for the GPU as for the host.
    pub fn address(&self) -> u64 {
        self.pointer as u64
    }

    /// Its bytes. The caller has waited for what writes them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length, and initialised.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.len) }
    }

    /// Its bytes. The caller has waited for copies that use them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: allocated in `new`, and whoever drops it has waited for
            // what uses it.
            let _ = unsafe { result::free_host(self.pointer) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_within_an_allocation_are_exported() {
        let (at, size) = (0x7f12_3440_0000, 4 << 20);
        assert!(exportable(at, size, 0, size, 4096).is_ok());
        assert!(exportable(at, size, 64 << 10, 64 << 10, 64 << 10).is_ok());
        let refused = [
            (at, 0, 0, 4096, "not within its"),
            (at, size, 4096, 4096, "not within its"),
            (at, usize::MAX, 4096, 4096, "not within its"),
            (at, 4096, 512, 4096, "begin and end on a page of the host, 4096 bytes"),
            (at, 4000, 0, 4096, "4000 bytes at address 0x7f1234400000 do not"),
            (at + 512, 4096, 0, 4096, "address 0x7f1234400200"),
            (at, 4096, 4096, 64 << 10, "begin and end on a page of the host, 65536 bytes"),
        ];
        for (address, len, offset, page, told) in refused {
            let error = exportable(address, size, offset, len, page).expect_err("refused").to_string();
            assert!(error.contains(told), "{error}");
        }
    }
}
