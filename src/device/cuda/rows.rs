//! The kernels that go over rows: embedding, norms, rotary embedding and the way
//! of K and V into the pool, and rows on their way to and from the host.

#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use super::api;
use super::buffer::{Buffer, Matrix, Vector};
use super::driver::{Context, Stream};
use super::element::Element;
use super::kernels::{Grid, Kernel, Kernels};
use super::memory::{GpuMemory, Pinned};
use super::step::Addresses;
use crate::device::{AttentionShape, DeviceError, Norm, Result, Rope};
use crate::kv::rblock::{KvDtype, KvShape};

/// A step's cos and sin, and what they are made from.
struct Angles {
    rope: Rope,
    inv_freq: GpuMemory,
    table: GpuMemory,
}

/// Where a kernel finds how far to turn the step's rows.
#[derive(Clone, Copy, Debug)]
pub struct Turned {
    /// f32 `[rows, pairs, 2 (cos, sin)]`.
    pub table: u64,
    /// Pairs of a head that are rotated.
    pub pairs: u32,
    /// Pairs are neighbours.
    pub interleaved: bool,
}

/// The kernels and their memory.
pub struct Rows {
    context: Arc<Context>,
    element: Element,
    embed: Kernel,
    gather: Kernel,
    rms_norm: Kernel,
    rope_table: Kernel,
    rope_append: Kernel,
    angles: Option<Angles>,
    max_rows: usize,
    /// Between the device and the host.
    staging: Option<(GpuMemory, Pinned)>,
}

impl Rows {
    /// For steps of up to so many rows.
    pub fn new(context: &Arc<Context>, kernels: &Kernels, element: Element, max_rows: usize) -> Result<Self> {
        Ok(Self {
            context: context.clone(),
            element,
            embed: kernels.typed("embed", 0)?,
            gather: kernels.plain("gather", 0)?,
            rms_norm: kernels.typed("rms_norm", 0)?,
            rope_table: kernels.plain("rope_table", 0)?,
            rope_append: kernels.typed("rope_append", 0)?,
            angles: None,
            max_rows,
            staging: None,
        })
    }

    /// Makes ready for a rotary embedding; true where it is another than before,
    /// so that recorded launches are of no use.
    pub fn fit(&mut self, stream: &Stream, rope: &Rope) -> Result<bool> {
        if self.angles.as_ref().is_some_and(|a| a.rope == *rope) {
            return Ok(false);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&rope.inv_freq);
        let mut staging = Pinned::new(&self.context, bytes.len())?;
        staging.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let inv_freq = GpuMemory::new(&self.context, bytes.len(), "the rotary embedding")?;
        inv_freq.upload(stream, 0, &staging, 0..bytes.len())?;
        stream.synchronize()?;
        let table = GpuMemory::new(&self.context, self.max_rows * rope.inv_freq.len() * 8, "the rotary embedding")?;
        self.angles = Some(Angles { rope: rope.clone(), inv_freq, table });
        Ok(true)
    }

    /// cos and sin of the step's positions, for all layers.
    pub fn turn(&self, stream: &Stream, at: &Addresses, rows: usize) -> Result<()> {
        let Some(Angles { rope, inv_freq, table }) = &self.angles else { return Err(unfit()) };
        let pairs = rope.inv_freq.len();
        assert!(rows <= self.max_rows, "rows of a step");
        let arguments = api::RopeTable {
            inv_freq: inv_freq.address(),
            table: table.address(),
            slots: at.slots,
            rows: at.step,
            pairs: pairs as u32,
            magnitude: rope.magnitude,
        };
        // SAFETY: the table has room for `rows` rows of `pairs`.
        unsafe { self.rope_table.overlap(stream, Grid::new((rows * pairs).div_ceil(256), 256), &arguments) }
    }

    /// What [`turn`](Self::turn) wrote.
    pub fn turned(&self) -> Result<Turned> {
        let Some(Angles { rope, table, .. }) = &self.angles else { return Err(unfit()) };
        let (pairs, interleaved) = (rope.inv_freq.len() as u32, rope.interleaved);
        Ok(Turned { table: table.address(), pairs, interleaved })
    }

    /// `out[r] = table[tokens[r]]`.
    pub fn embed(&self, stream: &Stream, at: &Addresses, rows: usize, table: &Matrix, out: &Buffer) -> Result<()> {
        assert!(out.is_single() && out.cols() == table.ins() && rows <= out.rows(), "an embedding's rows");
        if table.fp8().is_some() {
            return Err(DeviceError::Unsupported("CUDA: an embedding in FP8; its rows are read as they are".into()));
        }
        let arguments = api::Embed {
            table: table.address(),
            tokens: at.tokens,
            out: out.address(),
            rows: at.step,
            cols: out.cols() as u32,
            vocab: table.outs() as u32,
        };
        // SAFETY: sizes were checked; a token outside the table makes NaN.
        unsafe { self.embed.overlap(stream, sweep(rows, out.cols()), &arguments) }
    }

    /// `out[i] = x[logit_rows[i]]`.
    pub fn gather(
        &self,
        stream: &Stream,
        at: &Addresses,
        counts: u64,
        rows: usize,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        assert!(x.is_single() && out.is_single() && x.cols() == out.cols() && rows <= out.rows(), "rows to gather");
        let arguments = api::Gather {
            x: x.address(),
            index: at.logit_rows,
            out: out.address(),
            rows: counts,
            cols: out.cols() as u32,
            reserved: 0,
        };
        // SAFETY: sizes were checked, and the rows named when the step was taken.
        unsafe { self.gather.overlap(stream, sweep(rows, out.cols()), &arguments) }
    }

    /// `out[r] = x[r] / rms(x[r]) · weight`.
    pub fn norm(
        &self,
        stream: &Stream,
        counts: u64,
        rows: usize,
        x: &Buffer,
        norm: Norm<'_, Vector>,
        out: &Buffer,
    ) -> Result<()> {
        let cols = x.cols();
        assert!(x.is_single() && !out.is_single() && out.cols() == cols && norm.weight.len() == cols, "a norm");
        assert!(rows <= x.rows() && rows <= out.rows(), "rows of a norm");
        let arguments = api::RmsNorm {
            x: x.address(),
            delta: 0,
            bias: 0,
            weight: norm.weight.address(),
            out: out.address(),
            index: 0,
            rows: counts,
            cols: cols as u32,
            eps: norm.eps,
        };
        let elements = if rows < 1024 { 256 } else { 1024 };
        let grid = Grid::new(rows, (32 * cols.div_ceil(elements)).min(1024) as u32);
        // SAFETY: sizes were checked.
        unsafe { self.rms_norm.overlap(stream, grid, &arguments) }
    }

    /// Norms of the heads, rotary embedding, K and V into the pool's layer at
    /// `kv`.
    pub fn rope_append(
        &self,
        stream: &Stream,
        at: &Addresses,
        rows: usize,
        shape: &AttentionShape,
        qk_norm: Option<(&Vector, &Vector, f32)>,
        kv: u64,
        pool: &KvShape,
        qkv: &Buffer,
    ) -> Result<()> {
        let turned = self.turned()?;
        let d = shape.head_dim;
        assert!(qkv.cols() == shape.qkv_width() && rows <= qkv.rows() && !qkv.is_single(), "fused QKV rows");
        if d > 256 || !d.is_multiple_of(2) {
            return Err(DeviceError::Unsupported(format!("CUDA: heads of {d} elements; an even number up to 256")));
        }
        if let Some((q, k, _)) = qk_norm {
            assert!(q.len() == d && k.len() == d, "norms of heads");
        }
        let arguments = api::RopeAppend {
            qkv: qkv.address(),
            pool: kv,
            table: turned.table,
            bias: 0,
            q_norm: qk_norm.map_or(0, |(q, ..)| q.address()),
            k_norm: qk_norm.map_or(0, |(_, k, _)| k.address()),
            slots: at.slots,
            rows: at.step,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: d as u32,
            block_tokens: pool.block_tokens,
            pairs: turned.pairs,
            interleaved: turned.interleaved.into(),
            eps: qk_norm.map_or(0.0, |(.., eps)| eps),
            fp8: u32::from(pool.dtype == KvDtype::Fp8),
        };
        let lanes = d.div_ceil(16).next_power_of_two();
        let shares = if rows >= 1024 { 1 } else { ((shape.heads + 2 * shape.kv_heads) * lanes).div_ceil(128) };
        let grid = Grid { blocks: (rows.clamp(1, 2112) as u32, shares as u32, 1), threads: 128, cluster: 1 };
        // SAFETY: sizes were checked; slots lie in the pool, which was checked when
        // the step was taken.
        unsafe { self.rope_append.overlap(stream, grid, &arguments) }
    }

    /// The query heads of `rows`, to the host, as f32.
    pub fn export(
        &mut self,
        stream: &Stream,
        shape: &AttentionShape,
        qkv: &Buffer,
        rows: &[Range<u32>],
        dst: &mut [f32],
    ) -> Result<()> {
        let (width, stride, size) = (shape.q_width(), qkv.cols(), self.element.size());
        let count: usize = rows.iter().map(|r| r.len()).sum();
        assert!(dst.len() >= count * width && rows.iter().all(|r| r.end as usize <= qkv.rows()), "queries");
        let element = self.element;
        let (_, host) = self.staging(count * stride * size)?;
        let mut at = 0;
        for range in rows {
            let bytes = range.len() * stride * size;
            qkv.memory().download(stream, range.start as usize * stride * size, host, at..at + bytes)?;
            at += bytes;
        }
        stream.synchronize()?;
        let values: &[u16] = bytemuck::cast_slice(&host.bytes()[..at]);
        for (row, dst) in values.chunks_exact(stride).zip(dst.chunks_exact_mut(width)) {
            dst.iter_mut().zip(row).for_each(|(to, &bits)| *to = element.widen(bits));
        }
        Ok(())
    }

    /// The first `rows` rows of `x`, to the host, as f32.
    pub fn download(&mut self, stream: &Stream, x: &Buffer, rows: usize, dst: &mut [f32]) -> Result<()> {
        let count = rows * x.cols();
        assert!(rows <= x.rows() && dst.len() >= count, "rows to the host");
        let (element, size) = (self.element, if x.is_single() { 4 } else { self.element.size() });
        let (_, host) = self.staging(count * size)?;
        x.memory().download(stream, 0, host, 0..count * size)?;
        stream.synchronize()?;
        let bytes = &host.bytes()[..count * size];
        if x.is_single() {
            dst[..count].copy_from_slice(bytemuck::cast_slice(bytes));
        } else {
            let values: &[u16] = bytemuck::cast_slice(bytes);
            dst.iter_mut().zip(values).for_each(|(to, &bits)| *to = element.widen(bits));
        }
        Ok(())
    }

    /// Rows from the host to the beginning of `x`, rounded to nearest even where
    /// it is of the working precision.
    pub fn upload(&mut self, stream: &Stream, x: &Buffer, values: &[f32]) -> Result<()> {
        assert!(values.len() <= x.rows() * x.cols(), "rows from the host");
        let element = self.element;
        let bytes = values.len() * if x.is_single() { 4 } else { element.size() };
        stream.synchronize()?;
        let (_, host) = self.staging(bytes)?;
        if x.is_single() {
            host.bytes_mut()[..bytes].copy_from_slice(bytemuck::cast_slice(values));
        } else {
            for (to, &value) in host.bytes_mut()[..bytes].chunks_exact_mut(2).zip(values) {
                to.copy_from_slice(&element.narrow(value).to_ne_bytes());
            }
        }
        x.memory().upload(stream, 0, host, 0..bytes)?;
        stream.synchronize()
    }

    fn staging(&mut self, bytes: usize) -> Result<&mut (GpuMemory, Pinned)> {
        if self.staging.as_ref().is_none_or(|(device, _)| device.len() < bytes) {
            let bytes = bytes.next_power_of_two();
            let made = (GpuMemory::new(&self.context, bytes, "rows for the host")?, Pinned::new(&self.context, bytes)?);
            self.staging = Some(made);
        }
        Ok(self.staging.as_mut().expect("made above"))
    }
}

fn sweep(rows: usize, cols: usize) -> Grid {
    Grid::new((rows * cols).div_ceil(2048), 256)
}

fn unfit() -> DeviceError {
    DeviceError::System("a step before its rotary embedding was made known".into())
}
