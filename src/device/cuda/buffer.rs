//! Activations, vectors and weights on the GPU.

use std::sync::Arc;

use super::driver::Context;
use super::element::Element;
use super::memory::GpuMemory;
use crate::device::Result;

/// Rows for which a buffer holds sums of squares: those of the kernels for few
/// rows.
pub const FEW_ROWS: usize = 32;

/// Which count of a step's metadata says how many rows of a buffer are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// The step's rows.
    Rows,
    /// The step's rows of logits.
    Logits,
}

/// Activations `[rows, cols]`: of the working precision, or f32.
pub struct Buffer {
    memory: GpuMemory,
    rows: usize,
    cols: usize,
    single: bool,
    squares: GpuMemory,
    /// Which rows are in use.
    pub(super) counted: Counted,
    /// The rows are not divided by their root mean square yet: the sums of
    /// squares that the next linear layer needs for that lie in `squares`, and
    /// this is what it adds to their mean.
    pub(super) unscaled: Option<f32>,
}

impl Buffer {
    /// Room for `rows` rows, all NaN: what is read before it is written shows.
    pub(super) fn new(
        context: &Arc<Context>,
        element: Element,
        rows: usize,
        cols: usize,
        single: bool,
    ) -> Result<Self> {
        let size = if single { 4 } else { element.size() };
        let memory = GpuMemory::new(context, rows * cols * size, "activations")?;
        let squares = GpuMemory::new(context, FEW_ROWS.min(rows) * cols.div_ceil(32) * 4, "activations")?;
        Ok(Self { memory, rows, cols, single, squares, counted: Counted::Rows, unscaled: None })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Where the sums of squares are: f32 `[FEW_ROWS, ceil(cols / 32)]`.
    pub(super) fn squares(&self) -> u64 {
        self.squares.address()
    }

    /// Its memory.
    pub(super) fn memory(&self) -> &GpuMemory {
        &self.memory
    }

    /// Rows there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements are f32.
    pub fn is_single(&self) -> bool {
        self.single
    }
}

/// A norm's weights or a bias, f32.
pub struct Vector {
    memory: Arc<GpuMemory>,
    len: usize,
}

impl Vector {
    pub(super) fn new(memory: Arc<GpuMemory>, len: usize) -> Self {
        Self { memory, len }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The scales of FP8 weights: f32 `[ceil(outs / 2^shift), cols]`.
pub(super) struct Fp8Scales {
    pub memory: GpuMemory,
    /// A scale is for `2^shift` output features.
    pub shift: u32,
    /// 1, or one for each 128 input features.
    pub cols: u32,
}

/// A linear layer's weights `[outs, ins]`: of the working precision, or FP8.
pub struct Matrix {
    memory: Arc<GpuMemory>,
    outs: usize,
    ins: usize,
    fp8: Option<Fp8Scales>,
}

impl Matrix {
    pub(super) fn new(memory: Arc<GpuMemory>, outs: usize, ins: usize) -> Self {
        Self { memory, outs, ins, fp8: None }
    }

    /// Of FP8 codes, packed as `cuda/fp8.cuh` says.
    pub(super) fn new_fp8(memory: Arc<GpuMemory>, outs: usize, ins: usize, scales: Fp8Scales) -> Self {
        Self { memory, outs, ins, fp8: Some(scales) }
    }

    /// The scales, where the weights are FP8.
    pub(super) fn fp8(&self) -> Option<&Fp8Scales> {
        self.fp8.as_ref()
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Output features.
    pub fn outs(&self) -> usize {
        self.outs
    }

    /// Input features.
    pub fn ins(&self) -> usize {
        self.ins
    }
}
