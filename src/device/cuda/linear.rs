//! Linear layers: kernels of our own for few rows, where the weights' way from
//! memory is all that counts, and the matrix library for many.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::CudaOptions;
use super::api;
use super::blas::{Blas, Into, Product};
use super::buffer::{Buffer, FEW_ROWS, Matrix, Vector};
use super::chain::{Chain, End};
use super::driver::{Context, Stream};
use super::element::Element;
use super::fp8::Fp8;
use super::kernels::{Grid, Kernel, Kernels};
use super::memory::GpuMemory;
use crate::device::{Norm, Result};

/// The linear layers of a device.
pub struct Linears {
    context: Arc<Context>,
    element: Element,
    blas: Blas,
    chain: Option<Chain>,
    fp8: Fp8,
    add: Kernel,
    add_bias: Kernel,
    swiglu: Kernel,
    /// What a sum with a bias goes through.
    scratch: Option<GpuMemory>,
    max_rows: usize,
}

impl Linears {
    /// For steps of a device made so.
    pub fn new(context: &Arc<Context>, kernels: &Kernels, stream: &Stream, options: &CudaOptions) -> Result<Self> {
        let CudaOptions { element, max_rows, fenced_below, .. } = *options;
        Ok(Self {
            context: context.clone(),
            element,
            blas: Blas::new(context, element)?,
            chain: Chain::new(context, kernels, element, fenced_below)?,
            fp8: Fp8::new(context, kernels, stream, element)?,
            add: kernels.typed("add", 0)?,
            add_bias: kernels.typed("add_bias", 0)?,
            swiglu: kernels.typed("swiglu", 0)?,
            scratch: None,
            max_rows,
        })
    }

    /// Rows that a product of `rows` rows is computed for: buffers have room for
    /// as many. Padding costs little; a shape of its own for each number of rows
    /// would have to be timed anew.
    pub fn padded(rows: usize) -> usize {
        let step = match rows {
            0..=FEW_ROWS => return rows.next_power_of_two(),
            33..=512 => 64,
            513..=2048 => 256,
            _ => 512,
        };
        rows.next_multiple_of(step)
    }

    /// Rows that a buffer has room for: as many as any product of `rows` rows
    /// touches.
    pub fn room(rows: usize) -> usize {
        Chain::room(Self::padded(rows))
    }

    /// Weights in FP8, and their kernels.
    pub fn fp8(&mut self) -> &mut Fp8 {
        &mut self.fp8
    }

    /// The chain, where it takes the product.
    fn chain(&mut self, rows: usize, weight: &Matrix, x: &Buffer, end: End) -> Option<&mut Chain> {
        self.chain.as_mut().filter(|c| weight.fp8().is_none() && c.takes(rows, weight, x, end))
    }

    /// Launches what waits in the chain: before anything else that may read it.
    pub fn flush(&mut self, stream: &Stream) -> Result<()> {
        self.chain.as_mut().map_or(Ok(()), |chain| chain.flush(stream))
    }

    /// `out = x · Wᵀ (+ bias)`, in `out`'s precision.
    pub fn plain(
        &mut self,
        stream: &Stream,
        counts: u64,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        out: &Buffer,
    ) -> Result<()> {
        check(x, rows, weight, out, weight.outs());
        let end = if out.is_single() { End::Logits } else { End::Plain };
        if let Some(chain) = self.chain(rows, weight, x, end) {
            return chain.push(stream, counts, x, rows, weight, bias, out, end, None);
        }
        self.flush(stream)?;
        if self.fp8.takes(rows, weight, x, end) {
            return self.fp8.run(stream, counts, x, rows, weight, bias, out, end);
        }
        assert!(x.unscaled.is_none(), "only the kernel for few rows scales its input");
        let into = if out.is_single() { Into::Single } else { Into::Working };
        let w = self.fp8.wide(stream, weight)?;
        self.blas.run(stream, &product(x, rows, weight, w, out.address(), out.cols(), into))?;
        let Some(bias) = bias else { return Ok(()) };
        assert!(!out.is_single() && bias.len() == weight.outs() && out.cols() == weight.outs(), "a bias of its size");
        let arguments =
            api::AddBias { x: out.address(), bias: bias.address(), rows: counts, cols: out.cols() as u32, reserved: 0 };
        // SAFETY: `out` holds `rows` rows of `cols`, as checked.
        unsafe { self.add_bias.overlap(stream, wide(rows, out.cols()), &arguments) }
    }

    /// `out += x · Wᵀ (+ bias)`, `out` in f32; where a norm is given, `normed` is
    /// made from the sum for the layer that comes next, if that can be done at
    /// once: true then.
    pub fn add(
        &mut self,
        stream: &Stream,
        counts: u64,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        out: &Buffer,
        next: Option<(Norm<'_, Vector>, &Buffer)>,
    ) -> Result<bool> {
        check(x, rows, weight, out, weight.outs());
        assert!(out.is_single() && out.cols() == weight.outs(), "a residual stream");
        // A row that is not divided by its root mean square overflows in f16; and
        // neither the kernels of FP8 nor what the chain does not take could divide it.
        let scaled_later = self.element == Element::Bf16 && !self.fp8.used() && weight.outs().is_multiple_of(64);
        let next = next.filter(|_| scaled_later);
        if let Some(chain) = self.chain(rows, weight, x, End::Add) {
            chain.push(stream, counts, x, rows, weight, bias, out, End::Add, next)?;
            return Ok(next.is_some());
        }
        self.flush(stream)?;
        if self.fp8.takes(rows, weight, x, End::Add) {
            self.fp8.run(stream, counts, x, rows, weight, bias, out, End::Add)?;
            return Ok(false);
        }
        let w = self.fp8.wide(stream, weight)?;
        let Some(bias) = bias else {
            self.blas.run(stream, &product(x, rows, weight, w, out.address(), out.cols(), Into::AddSingle))?;
            return Ok(false);
        };
        let size = Self::padded(self.max_rows) * out.cols() * self.element.size();
        if self.scratch.as_ref().is_none_or(|s| s.len() < size) {
            self.scratch = Some(GpuMemory::new(&self.context, size, "a sum with a bias")?);
        }
        let scratch = self.scratch.as_ref().map_or(0, GpuMemory::address);
        self.blas.run(stream, &product(x, rows, weight, w, scratch, out.cols(), Into::Working))?;
        let arguments = api::Add {
            x: out.address(),
            delta: scratch,
            bias: bias.address(),
            rows: counts,
            cols: out.cols() as u32,
            reserved: 0,
        };
        // SAFETY: both hold `rows` rows of `cols`, as checked.
        unsafe { self.add.overlap(stream, wide(rows, out.cols()), &arguments)? };
        Ok(false)
    }

    /// `out = silu(x · Gᵀ) · (x · Uᵀ)` with G the first half of the features and U
    /// the second; `gate_up` is scratch.
    pub fn swiglu(
        &mut self,
        stream: &Stream,
        counts: u64,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        gate_up: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        check(x, rows, weight, gate_up, weight.outs());
        if let Some(chain) = self.chain(rows, weight, x, End::Swiglu) {
            return chain.push(stream, counts, x, rows, weight, bias, out, End::Swiglu, None);
        }
        if self.fp8.takes(rows, weight, x, End::Swiglu) {
            self.flush(stream)?;
            return self.fp8.run(stream, counts, x, rows, weight, bias, out, End::Swiglu);
        }
        self.plain(stream, counts, x, rows, weight, None, gate_up)?;
        self.flush(stream)?;
        self.activate(stream, counts, gate_up, rows, bias, out)
    }

    /// `out = silu(gate) · up`, after the bias.
    pub fn activate(
        &self,
        stream: &Stream,
        counts: u64,
        gate_up: &Buffer,
        rows: usize,
        bias: Option<&Vector>,
        out: &Buffer,
    ) -> Result<()> {
        assert!(gate_up.cols() == 2 * out.cols() && rows <= gate_up.rows() && rows <= out.rows(), "gate and up");
        let arguments = api::Swiglu {
            gate_up: gate_up.address(),
            bias: bias.map_or(0, Vector::address),
            out: out.address(),
            rows: counts,
            cols: out.cols() as u32,
            reserved: 0,
        };
        let grid = Grid::new((rows * out.cols()).div_ceil(2048).min(8448), 256);
        // SAFETY: both hold `rows` rows, of 2 · cols and cols.
        unsafe { self.swiglu.overlap(stream, grid, &arguments) }
    }
}

/// A grid for a kernel that goes over all elements.
fn wide(rows: usize, cols: usize) -> Grid {
    Grid::new((rows * cols).div_ceil(2048), 256)
}

fn check(x: &Buffer, rows: usize, weight: &Matrix, out: &Buffer, outs: usize) {
    assert!(x.cols() == weight.ins(), "{} features into a layer of {}", x.cols(), weight.ins());
    assert!(rows <= x.rows() && rows <= out.rows() && outs <= out.cols(), "{rows} rows of {outs} features");
    assert!(!x.is_single(), "a layer takes activations of the working precision");
}

fn product(x: &Buffer, rows: usize, weight: &Matrix, w: u64, out: u64, out_stride: usize, into: Into) -> Product {
    Product {
        rows: Linears::padded(rows).min(x.rows()),
        outs: weight.outs(),
        ins: weight.ins(),
        w,
        x: x.address(),
        x_stride: x.cols(),
        out,
        out_stride,
        into,
    }
}
