//! What works row by row: norm, rotary embedding and KV append, SwiGLU, merge.
//! A row or two are done by the caller alone; the kernels are in `row_kernels`.
#![allow(unsafe_code)]

use std::ops::Range;

use super::buffer::{Buffer, Shared, Vector};
use super::product::SendPtr;
use super::row_kernels::{Blend, RmsNorm, RopeAppend, SwiGlu};
use super::simd::{Isa, dispatch};
use super::step::Step;
use super::threads::ThreadPool;
use crate::device::AttentionShape;
use crate::kv::pool::KvPool;

/// Elements that are worth waking a thread for.
const SHARE: usize = 1 << 14;

/// Rows of `cols` elements that a thread claims at a time.
fn grain(cols: usize) -> usize {
    SHARE.div_ceil(cols.max(1))
}

pub(super) fn rms_norm(
    threads: &mut ThreadPool,
    isa: Isa,
    x: &Buffer,
    rows: usize,
    weight: &Vector,
    eps: f32,
    out: &mut Buffer,
) {
    let weight = weight.as_slice();
    let cols = weight.len();
    assert!(x.cols() >= cols && out.cols() >= cols && rows <= x.rows() && rows <= out.rows());
    let stride = out.cols();
    let target = Shared::new(out.as_mut_slice());
    threads.run(rows, grain(cols), &|_, range| {
        for r in range {
            // SAFETY: row `r` is this chunk's.
            let out = unsafe { target.range(r * stride..r * stride + cols) };
            let kernel = RmsNorm { x: x.row(r).as_ptr(), weight: weight.as_ptr(), cols, eps, out: out.as_mut_ptr() };
            // SAFETY: `cols` elements each, checked above.
            unsafe { dispatch(isa, kernel) };
        }
    });
}

pub(super) fn swiglu(threads: &mut ThreadPool, isa: Isa, gate_up: &Buffer, rows: usize, out: &mut Buffer) {
    let cols = gate_up.cols() / 2;
    assert!(out.cols() >= cols && rows <= gate_up.rows() && rows <= out.rows());
    let stride = out.cols();
    let target = Shared::new(out.as_mut_slice());
    threads.run(rows, grain(4 * cols), &|_, range| {
        for r in range {
            let (gate, up) = gate_up.row(r).split_at(cols);
            // SAFETY: row `r` is this chunk's.
            let out = unsafe { target.range(r * stride..r * stride + cols) };
            let kernel = SwiGlu { gate: gate.as_ptr(), up: up.as_ptr(), cols, out: out.as_mut_ptr() };
            // SAFETY: `cols` elements each.
            unsafe { dispatch(isa, kernel) };
        }
    });
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rope_append(
    threads: &mut ThreadPool,
    isa: Isa,
    step: &Step,
    shape: &AttentionShape,
    qk_norm: Option<(&Vector, &Vector, f32)>,
    layer: usize,
    pool: &KvPool,
    qkv: &mut Buffer,
) {
    let (d, stride, kv) = (shape.head_dim, qkv.cols(), pool.shape());
    assert!(stride >= shape.qkv_width() && step.rows() <= qkv.rows() && layer < kv.layers as usize);
    assert!(kv.head_dim as usize == d && kv.kv_heads as usize == shape.kv_heads && step.pairs == d / 2);
    assert!(step.slots.iter().all(|s| s.block < pool.blocks() && s.offset < kv.block_tokens), "a slot out of pool");
    let qk_norm = qk_norm.map(|(q, k, eps)| {
        assert!(q.as_slice().len() == d && k.as_slice().len() == d);
        (q.as_slice().as_ptr(), k.as_slice().as_ptr(), eps)
    });
    let qk_norm = qk_norm.map(|(q, k, eps)| (SendPtr(q), SendPtr(k), eps));
    let token_bytes = d * kv.dtype.size();
    let target = Shared::new(qkv.as_mut_slice());
    threads.run(step.rows(), grain(4 * shape.qkv_width()), &|_, range| {
        for r in range {
            let slot = step.slots[r];
            let (cos, sin) = step.angles(r);
            // SAFETY: row `r` is this chunk's.
            let row = unsafe { target.range(r * stride..r * stride + shape.qkv_width()) };
            let kernel = RopeAppend {
                qkv: row.as_mut_ptr(),
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: d,
                qk_norm: qk_norm.map(|(q, k, eps)| (q.get(), k.get(), eps)),
                cos,
                sin,
                interleaved: step.interleaved,
                // SAFETY: layer, block and offset were checked above.
                kv: unsafe {
                    pool.memory().as_ptr().add(pool.offset(layer, slot.block) + slot.offset as usize * token_bytes)
                },
                head_stride: kv.head_bytes(),
                dtype: kv.dtype,
            };
            // SAFETY: as above; the slot's block belongs to this step.
            unsafe { dispatch(isa, kernel) };
        }
    });
}

#[allow(clippy::too_many_arguments)]
pub(super) fn merge(
    threads: &mut ThreadPool,
    isa: Isa,
    shape: &AttentionShape,
    rows: &[Range<u32>],
    remote_o: &[f32],
    remote_lse: &[f32],
    o: &mut Buffer,
    lse: &mut Buffer,
) {
    let (d, heads, width) = (shape.head_dim, shape.heads, shape.q_width());
    let (o_stride, lse_stride) = (o.cols(), lse.cols());
    let total: usize = rows.iter().map(|r| r.len()).sum();
    assert!(remote_o.len() >= total * width && remote_lse.len() >= total * heads);
    assert!(o_stride >= width && lse_stride >= heads);
    let (o, lse) = (Shared::new(o.as_mut_slice()), Shared::new(lse.as_mut_slice()));
    threads.run(total, grain(2 * width), &|_, range| {
        let mut before = 0;
        for part in rows {
            let start = range.start.clamp(before, before + part.len());
            let end = range.end.clamp(before, before + part.len());
            for i in start..end {
                let row = part.start as usize + i - before;
                for h in 0..heads {
                    // SAFETY: the ranges do not overlap, and row `row` is this
                    // chunk's.
                    let (a, a_lse) = unsafe {
                        let a = o.range(row * o_stride + h * d..row * o_stride + (h + 1) * d);
                        (a, &mut lse.range(row * lse_stride + h..row * lse_stride + h + 1)[0])
                    };
                    let b = &remote_o[i * width + h * d..][..d];
                    merge_head(isa, a, a_lse, b, remote_lse[i * heads + h]);
                }
            }
            before += part.len();
        }
    });
}

/// Merges `(b, b_lse)` into `(a, a_lse)`; an empty part leaves the other as it
/// is, bit for bit.
fn merge_head(isa: Isa, a: &mut [f32], a_lse: &mut f32, b: &[f32], b_lse: f32) {
    if b_lse == f32::NEG_INFINITY {
        return;
    }
    if *a_lse == f32::NEG_INFINITY {
        a.copy_from_slice(b);
        *a_lse = b_lse;
        return;
    }
    let max = a_lse.max(b_lse);
    let (wa, wb) = ((*a_lse - max).exp(), (b_lse - max).exp());
    let sum = wa + wb;
    let kernel = Blend { into: a.as_mut_ptr(), from: b.as_ptr(), len: a.len(), a: wa / sum, b: wb / sum };
    // SAFETY: both of `len` elements.
    unsafe { dispatch(isa, kernel) };
    *a_lse = max + sum.ln();
}
