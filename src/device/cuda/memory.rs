//! Memory of the GPU, and of the host where the GPU reaches it.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::driver::{Context, Stream, failed};
use crate::device::{DeviceError, Result};
use crate::kv::pool::DeviceMemory;

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
        let address = unsafe { result::malloc_sync(len.max(1)) }
            .map_err(|e| failed(&format!("allocating {:.1} MiB for {what}", len as f64 / (1 << 20) as f64), e))?;
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
        // SAFETY: the range is this allocation.
        unsafe { result::memset_d8_async(self.address, byte, self.len, stream.raw()) }
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

/// KV of a pool. Copies to and from it are behind everything given to the
/// device's stream, and are done when they return.
pub struct KvMemory {
    memory: GpuMemory,
    stream: Arc<Stream>,
}

impl KvMemory {
    /// Allocates `len` bytes.
    pub fn new(stream: &Arc<Stream>, len: usize) -> Result<Self> {
        Ok(Self { memory: GpuMemory::new(stream.context(), len, "the KV pool")?, stream: stream.clone() })
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.memory.len), "a copy beyond the pool");
    }
}

impl DeviceMemory for KvMemory {
    fn address(&self) -> u64 {
        self.memory.address
    }

    fn len(&self) -> usize {
        self.memory.len
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
            let pointer = result::malloc_host(len, flags).map_err(|e| {
                failed(&format!("page-locking {:.1} MiB of host memory", len as f64 / (1 << 20) as f64), e)
            })?;
            std::ptr::write_bytes(pointer.cast::<u8>(), 0, len);
            Ok(Self { context: context.clone(), pointer, len })
        }
    }

    /// Its bytes.
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
