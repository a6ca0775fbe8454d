//! Memory of the CPU device: activations and vectors, f32, aligned to a cache
//! line.
#![allow(unsafe_code)]

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::device::{DeviceError, Result};

/// One cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

/// Zeroed bytes that begin on a cache line, with room to a whole line.
#[derive(Default)]
pub(super) struct Aligned(Vec<Line>);

impl Aligned {
    /// At least `bytes` zeroed bytes.
    pub fn zeroed(bytes: usize) -> Result<Self> {
        let mut aligned = Self::default();
        aligned.grow(bytes)?;
        Ok(aligned)
    }

    /// Makes room for `bytes` bytes; what is there stays.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        let lines = bytes.div_ceil(64);
        if lines > self.0.len() {
            self.0
                .try_reserve(lines - self.0.len())
                .map_err(|_| DeviceError::OutOfMemory(format!("cannot allocate {bytes} bytes")))?;
            self.0.resize(lines, Line([0; 64]));
        }
        Ok(())
    }

    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }

    pub fn f32s(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    pub fn f32s_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
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
