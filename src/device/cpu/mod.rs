//! The CPU device.

mod amx;
mod attention;
mod attention_few;
mod attention_many;
#[cfg(test)]
mod attention_tests;
pub mod bandwidth;
mod buffer;
mod dot;
#[cfg(test)]
mod dot_tests;
mod format;
mod format_blocks;
mod format_dots;
mod gemm;
mod gemv;
mod gemv_dots;
mod kv_view;
mod matrix;
mod product;
#[cfg(test)]
mod product_tests;
pub mod quant;
pub mod reference;
mod row_kernels;
mod rows;
#[cfg(test)]
mod rows_tests;
mod simd;
mod step;
pub mod threads;

use std::ops::Range;
use std::sync::Arc;

pub use buffer::{Buffer, Vector};
pub use matrix::Matrix;
pub use simd::Isa;

use attention::{Attend, Attention};
use product::{Linear, Products};
use step::Step;
use threads::ThreadPool;

use super::tensor::RawTensor;
use super::{AttentionShape, AttnSeq, Device, DeviceError, HolderKernel, Norm, Pass, Result, Rope, StepInput};
use crate::kv::pool::KvPool;
use crate::kv::rblock::KvRun;

/// How activations are held inside a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Math {
    /// f32 everywhere; weights are widened in registers. A row's results do not
    /// depend on the rows beside it beyond the order of f32 sums.
    #[default]
    Exact,
    /// Activations of 8 bits in blocks of 32 in products with quantised weights,
    /// where the processor multiplies them faster than f32, and bf16 activations
    /// and weights in products of many rows, where it has a matrix unit for them
    /// (AMX); exact otherwise.
    Fast,
}

/// How to make a CPU device.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Threads, the calling one included.
    pub threads: usize,
    /// Keep each worker thread on one core.
    pub pin: bool,
    /// Precision of activations inside products.
    pub math: Math,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Instruction set of the kernels; `None` takes the one that the variable
    /// `DISTKV_CPU_ISA` names (`avx512`, `avx2`, `portable`), else the best.
    pub isa: Option<Isa>,
}

impl Default for CpuOptions {
    /// A thread a core, pinned, exact, steps of up to 512 rows.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { threads, pin: true, math: Math::Exact, max_rows: 512, isa: None }
    }
}

/// The processor's cores as a [`Device`].
pub struct CpuDevice {
    threads: ThreadPool,
    options: CpuOptions,
    isa: Isa,
    step: Step,
    products: Products,
    attention: Attention,
}

impl CpuDevice {
    /// Starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let isa = options.isa.map_or_else(Isa::detect, Isa::checked)?;
        let threads = ThreadPool::new(options.threads, options.pin)?;
        let mut step = Step::default();
        step.reserve(options.max_rows);
        let products = Products::new(isa, options.math, threads.threads())?;
        let attention = Attention::new(isa, threads.threads());
        Ok(Self { threads, options, isa, step, products, attention })
    }
}

impl Device for CpuDevice {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;

    fn describe(&self) -> String {
        let math = match self.options.math {
            Math::Exact => "exact f32 activations",
            Math::Fast => match (self.products.dots.is_some(), self.products.amx) {
                (true, true) => "int8 activations with quantised weights, bf16 prefill on AMX",
                (true, false) => "int8 activations with quantised weights",
                (false, _) => "exact f32 activations, as nothing else is faster here",
            },
        };
        format!("cpu ({:?}, {math}, {} threads)", self.isa, self.threads.threads())
    }

    fn load_matrix(&mut self, parts: &[RawTensor<'_>]) -> Result<Matrix> {
        let matrix = Matrix::new(parts, &mut self.threads)?;
        self.products.reserve(self.options.max_rows, &matrix)?;
        Ok(matrix)
    }

    fn load_vector(&mut self, parts: &[RawTensor<'_>]) -> Result<Vector> {
        let mut data = Vec::new();
        for part in parts {
            matrix::check(part, part.cols)?;
            data.extend(reference::dequantize(part));
        }
        Ok(Vector::new(data))
    }

    fn buffer(&mut self, rows: usize, cols: usize) -> Result<Buffer> {
        Buffer::new(rows, cols)
    }

    fn begin_step(&mut self, rope: &Rope, step: &StepInput<'_>, pool: &KvPool, _: bool) -> Result<Pass> {
        if pool.on_host().is_none() {
            return Err(DeviceError::Unsupported("the CPU computes over KV in the host's memory only".into()));
        }
        self.step.begin(rope, step, self.options.max_rows)?;
        Ok(Pass::Run { rows: step.tokens.len(), logits: step.logit_rows.len() })
    }

    fn embed(&mut self, table: &Matrix, out: &mut Buffer) {
        let (stride, cols) = (out.cols(), table.cols());
        for (row, &token) in out.as_mut_slice().chunks_exact_mut(stride).zip(&self.step.tokens) {
            assert!((token as usize) < table.outs(), "token {token} of a vocabulary of {}", table.outs());
            table.read_row(token as usize, &mut row[..cols]);
        }
    }

    fn rms_norm(&mut self, x: &Buffer, rows: usize, norm: Norm<'_, Vector>, out: &mut Buffer) {
        rows::rms_norm(&mut self.threads, self.isa, x, rows, norm.weight, norm.eps, out);
    }

    fn linear(&mut self, x: &Buffer, rows: usize, weight: &Matrix, bias: Option<&Vector>, out: &mut Buffer) {
        self.products.run(&mut self.threads, Linear { x, rows, weight, bias, add: false, out });
    }

    fn linear_add(&mut self, x: &Buffer, rows: usize, weight: &Matrix, bias: Option<&Vector>, out: &mut Buffer) {
        self.products.run(&mut self.threads, Linear { x, rows, weight, bias, add: true, out });
    }

    fn rope_append(
        &mut self,
        shape: &AttentionShape,
        qk_norm: Option<(&Vector, &Vector, f32)>,
        layer: usize,
        pool: &KvPool,
        qkv: &mut Buffer,
    ) {
        rows::rope_append(&mut self.threads, self.isa, &self.step, shape, qk_norm, layer, pool, qkv);
    }

    fn attention(
        &mut self,
        shape: &AttentionShape,
        window: Option<u32>,
        layer: usize,
        pool: &KvPool,
        qkv: &Buffer,
        o: &mut Buffer,
        lse: &mut Buffer,
    ) {
        let (o_stride, lse_stride) = (o.cols(), lse.cols());
        let job = Attend {
            shape,
            window,
            layer,
            pool,
            q: qkv.as_slice(),
            q_stride: qkv.cols(),
            seqs: &self.step.seqs,
            runs: &self.step.runs,
            o: o.as_mut_slice(),
            o_stride,
            lse: lse.as_mut_slice(),
            lse_stride,
        };
        self.attention.run(&mut self.threads, job);
    }

    fn export_queries(&mut self, shape: &AttentionShape, qkv: &Buffer, rows: &[Range<u32>], dst: &mut [f32]) {
        let width = shape.q_width();
        let rows = rows.iter().flat_map(|r| r.clone());
        for (row, dst) in rows.zip(dst.chunks_exact_mut(width)) {
            dst.copy_from_slice(&qkv.row(row as usize)[..width]);
        }
    }

    fn merge(
        &mut self,
        shape: &AttentionShape,
        rows: &[Range<u32>],
        remote_o: &[f32],
        remote_lse: &[f32],
        o: &mut Buffer,
        lse: &mut Buffer,
    ) {
        rows::merge(&mut self.threads, self.isa, shape, rows, remote_o, remote_lse, o, lse);
    }

    fn swiglu(&mut self, gate_up: &Buffer, rows: usize, out: &mut Buffer) {
        rows::swiglu(&mut self.threads, self.isa, gate_up, rows, out);
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        let (cols, stride) = (x.cols(), out.cols());
        for (&row, out) in rows.iter().zip(out.as_mut_slice().chunks_exact_mut(stride)) {
            out[..cols].copy_from_slice(x.row(row as usize));
        }
    }

    fn download(&mut self, x: &Buffer, rows: usize, dst: &mut [f32]) -> Result<()> {
        let len = rows * x.cols();
        dst[..len].copy_from_slice(&x.as_slice()[..len]);
        Ok(())
    }
}

/// The CPU as a creditor's kernel: threads of its own, so that lent rBlocks are
/// attended to while the engine is in its own step.
pub struct CpuHolder {
    threads: ThreadPool,
    attention: Attention,
}

impl CpuHolder {
    /// Starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let isa = options.isa.map_or_else(Isa::detect, Isa::checked)?;
        let threads = ThreadPool::new(options.threads, options.pin)?;
        let attention = Attention::new(isa, threads.threads());
        Ok(Self { threads, attention })
    }
}

impl HolderKernel for CpuHolder {
    fn micro_attention(
        &mut self,
        shape: &AttentionShape,
        window: Option<u32>,
        layer: usize,
        pool: &Arc<KvPool>,
        q: &[f32],
        seqs: &[AttnSeq],
        runs: &[KvRun],
        o: &mut [f32],
        lse: &mut [f32],
    ) {
        let (q_stride, o_stride, lse_stride) = (shape.q_width(), shape.q_width(), shape.heads);
        let job = Attend { shape, window, layer, pool, q, q_stride, seqs, runs, o, o_stride, lse, lse_stride };
        self.attention.run(&mut self.threads, job);
    }
}
