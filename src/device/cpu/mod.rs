//! The CPU device.

pub mod bandwidth;
mod buffer;
mod format;
mod format_blocks;
mod gemm;
mod gemv;
mod matrix;
mod product;
#[cfg(test)]
mod product_tests;
pub mod quant;
pub mod reference;
mod rows;
mod simd;
mod step;
pub mod threads;

use std::ops::Range;
use std::sync::Arc;

pub use buffer::{Buffer, Vector};
pub use matrix::Matrix;
pub use simd::Isa;

use product::{Linear, Products};
use step::Step;
use threads::ThreadPool;

use super::tensor::RawTensor;
use super::{AttentionShape, AttnSeq, Device, HolderKernel, Result, Rope, StepInput};
use crate::kv::pool::KvPool;
use crate::kv::rblock::KvRun;

/// How activations are held inside a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Math {
    /// f32 everywhere; weights are widened in registers. A row's results do not
    /// depend on the rows beside it beyond the order of f32 sums.
    #[default]
    Exact,
    /// bf16 or int8 activations where they are faster.
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
}

impl CpuDevice {
    /// Starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let isa = options.isa.map_or_else(Isa::detect, Isa::checked)?;
        let threads = ThreadPool::new(options.threads, options.pin)?;
        let mut step = Step::default();
        step.reserve(options.max_rows);
        let products = Products::new(isa, options.math, threads.threads())?;
        Ok(Self { threads, options, isa, step, products })
    }
}

impl Device for CpuDevice {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;

    fn describe(&self) -> String {
        format!("cpu ({:?}, {:?} math, {} threads)", self.isa, self.options.math, self.threads.threads())
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

    fn begin_step(&mut self, rope: &Rope, step: &StepInput<'_>) -> Result<()> {
        self.step.begin(rope, step, self.options.max_rows)
    }

    fn embed(&mut self, table: &Matrix, out: &mut Buffer) {
        let (stride, cols) = (out.cols(), table.cols());
        for (row, &token) in out.as_mut_slice().chunks_exact_mut(stride).zip(&self.step.tokens) {
            assert!((token as usize) < table.outs(), "token {token} of a vocabulary of {}", table.outs());
            table.read_row(token as usize, &mut row[..cols]);
        }
    }

    fn rms_norm(&mut self, x: &Buffer, rows: usize, weight: &Vector, eps: f32, out: &mut Buffer) {
        let cols = weight.as_slice().len();
        let stride = out.cols();
        for r in 0..rows {
            let out = &mut out.as_mut_slice()[r * stride..][..cols];
            reference::rms_norm(&x.row(r)[..cols], weight.as_slice(), eps, out);
        }
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
        let (d, stride) = (shape.head_dim, qkv.cols());
        let mut normed = vec![0.0; d];
        for (row, slot) in self.step.slots.iter().enumerate() {
            let (cos, sin) = self.step.angles(row);
            let qkv = &mut qkv.as_mut_slice()[row * stride..][..shape.qkv_width()];
            for (h, head) in qkv.chunks_exact_mut(d).enumerate() {
                if h < shape.heads + shape.kv_heads {
                    if let Some((q_norm, k_norm, eps)) = qk_norm {
                        let weight = if h < shape.heads { q_norm } else { k_norm };
                        reference::rms_norm(head, weight.as_slice(), eps, &mut normed);
                        head.copy_from_slice(&normed);
                    }
                    reference::rotate(head, cos, sin, self.step.interleaved);
                }
                if h >= shape.heads {
                    let (v, kv_head) = ((h - shape.heads) >= shape.kv_heads, (h - shape.heads) % shape.kv_heads);
                    reference::write_kv(pool, layer, slot.block, v, kv_head, slot.offset as usize, head);
                }
            }
        }
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
        assert!(o.cols() == shape.q_width() && lse.cols() == shape.heads);
        reference::attention(
            shape,
            window,
            layer,
            pool,
            qkv.as_slice(),
            qkv.cols(),
            &self.step.seqs,
            &self.step.runs,
            o.as_mut_slice(),
            lse.as_mut_slice(),
        );
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
        let d = shape.head_dim;
        let (o_stride, lse_stride) = (o.cols(), lse.cols());
        let rows = rows.iter().flat_map(|r| r.clone());
        for (i, row) in rows.enumerate() {
            let row = row as usize;
            for head in 0..shape.heads {
                reference::merge(
                    &mut o.as_mut_slice()[row * o_stride + head * d..][..d],
                    &mut lse.as_mut_slice()[row * lse_stride + head],
                    &remote_o[i * shape.q_width() + head * d..][..d],
                    remote_lse[i * shape.heads + head],
                );
            }
        }
    }

    fn swiglu(&mut self, gate_up: &Buffer, rows: usize, out: &mut Buffer) {
        let (n, stride) = (gate_up.cols() / 2, out.cols());
        for r in 0..rows {
            reference::swiglu(gate_up.row(r), &mut out.as_mut_slice()[r * stride..][..n]);
        }
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        let (cols, stride) = (x.cols(), out.cols());
        for (&row, out) in rows.iter().zip(out.as_mut_slice().chunks_exact_mut(stride)) {
            out[..cols].copy_from_slice(x.row(row as usize));
        }
    }

    fn download(&mut self, x: &Buffer, rows: usize, dst: &mut [f32]) {
        let len = rows * x.cols();
        dst[..len].copy_from_slice(&x.as_slice()[..len]);
    }
}

/// The CPU as a creditor's kernel: threads of its own, so that lent rBlocks are
/// attended to while the engine is in its own step.
pub struct CpuHolder {
    #[allow(dead_code)]
    threads: ThreadPool,
}

impl CpuHolder {
    /// Starts the threads.
    pub fn new(options: CpuOptions) -> Result<Self> {
        Ok(Self { threads: ThreadPool::new(options.threads, options.pin)? })
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
        reference::attention(shape, window, layer, pool, q, shape.q_width(), seqs, runs, o, lse);
    }
}
