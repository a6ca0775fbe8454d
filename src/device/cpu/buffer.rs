//! Memory of the CPU device: activations and vectors, f32, aligned to a cache
//! line.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

use crate::device::{DeviceError, Result};

/// Zeroed memory that begins on a page, with room to a whole one. Large pages
/// where the system grants them: weights are read end to end every step, and
/// small pages would cost a TLB miss every 4 KiB.
pub(super) struct Aligned {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory, as a Vec does.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Default for Aligned {
    /// Empty.
    fn default() -> Self {
        Self { base: NonNull::<Page>::dangling().cast(), len: 0 }
    }
}

/// Stands for the alignment of an empty [`Aligned`].
#[repr(align(4096))]
struct Page;

impl Aligned {
    /// At least `bytes` zeroed bytes.
    pub fn zeroed(bytes: usize) -> Result<Self> {
        if bytes == 0 {
            return Ok(Self::default());
        }
        let len = bytes
            .checked_next_multiple_of(rustix::param::page_size())
            .ok_or_else(|| DeviceError::OutOfMemory(format!("{bytes} bytes")))?;
        // SAFETY: a fresh private mapping aliases nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|e| DeviceError::OutOfMemory(format!("cannot map {len} bytes: {e}")))?;
        #[cfg(target_os = "linux")]
        // SAFETY: the range was mapped just now. No matter if it is refused.
        let _ = unsafe { rustix::mm::madvise(base, len, rustix::mm::Advice::LinuxHugepage) };
        let base = NonNull::new(base.cast()).ok_or_else(|| DeviceError::System("mapping at address 0".into()))?;
        Ok(Self { base, len })
    }

    /// Makes room for `bytes` bytes, at least doubling; what was there is lost.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.len {
            *self = Self::zeroed(bytes.max(2 * self.len))?;
        }
        Ok(())
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, initialised (zeroed) and ours.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    pub fn f32s(&self) -> &[f32] {
        bytemuck::cast_slice(self.bytes())
    }

    pub fn f32s_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: mapped with this length; borrows have ended.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

/// Activations `[rows, cols]`, row-major.
pub struct Buffer {
    data: Aligned,
    rows: usize,
    cols: usize,
}

impl Buffer {
    pub(super) fn new(rows: usize, cols: usize) -> Result<Self> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(4))
            .ok_or_else(|| DeviceError::OutOfMemory(format!("{rows} rows of {cols} activations")))?;
        Ok(Self { data: Aligned::zeroed(bytes)?, rows, cols })
    }

    /// Rows it has room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements.
    pub fn as_slice(&self) -> &[f32] {
        &self.data.f32s()[..self.rows * self.cols]
    }

    /// All elements, to write.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.rows * self.cols;
        &mut self.data.f32s_mut()[..len]
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.as_slice()[row * self.cols..][..self.cols]
    }
}

/// A norm's weights or a bias.
pub struct Vector {
    data: Vec<f32>,
}

impl Vector {
    pub(super) fn new(data: Vec<f32>) -> Self {
        Self { data }
    }

    /// Its elements.
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }
}

/// A slice whose disjoint parts are written by the threads of one fork.
pub(super) struct Shared<'a, T> {
    base: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts, under `range`'s contract that they are
// disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { base: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// A part of the slice. Panics if it is out of range.
    ///
    /// # Safety
    /// No two parts that are in use at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice borrowed for 'a; disjoint as promised.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(range.start), range.len()) }
    }

    /// The first element, for kernels that write rows with a stride.
    pub fn as_ptr(&self) -> *mut T {
        self.base
    }
}
