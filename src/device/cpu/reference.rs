//! The plain kernels: what each one computes, with no thought of speed. They
//! are the oracle of every fast one.
//!
//! Rows are row-major f32; `stride` is the elements from one row to the next.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::quant::dequantize_row;
use crate::device::tensor::RawTensor;
use crate::device::{AttentionShape, AttnSeq};
use crate::e4m3;
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvRun};

/// `weight` as f32, `[rows, cols]`.
pub fn dequantize(weight: &RawTensor<'_>) -> Vec<f32> {
    let mut out = vec![0.0; weight.rows * weight.cols];
    let row_bytes = weight.dtype.bytes(weight.cols).unwrap_or(0);
    let rows = out.chunks_exact_mut(weight.cols.max(1)).zip(weight.bytes.chunks_exact(row_bytes.max(1)));
    for (i, (row, bytes)) in rows.enumerate() {
        dequantize_row(weight.dtype, bytes, row);
        if let Some(scales) = weight.scales {
            for (run, scale) in row.chunks_mut(scales.block.1).zip(scales.row(i, weight.cols)) {
                run.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }
    out
}

/// `x · Wᵀ (+ bias)`: x `[rows, cols]`, w `[outs, cols]`, result `[rows, outs]`.
pub fn linear(x: &[f32], w: &[f32], cols: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        for (j, w) in w.chunks_exact(cols).enumerate() {
            let sum: f64 = x.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            out.push(sum as f32 + bias.map_or(0.0, |b| b[j]));
        }
    }
    out
}

/// `x / rms(x) · weight` of one row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = (f64::from(v) * factor) as f32 * w;
    }
}

/// Rotates the pairs of one head by their angles.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], interleaved: bool) {
    let half = head.len() / 2;
    for i in 0..half {
        let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let (x, y) = (head[a], head[b]);
        head[a] = x * cos[i] - y * sin[i];
        head[b] = x * sin[i] + y * cos[i];
    }
}

/// `silu(gate) · up` of one row `[gate, up]`.
pub fn swiglu(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + (-g).exp()) * u;
    }
}

/// Merges the partial `(b, b_lse)` of one head into `(a, a_lse)`. An empty part
/// (−∞) leaves the other as it is, bit for bit.
pub fn merge(a: &mut [f32], a_lse: &mut f32, b: &[f32], b_lse: f32) {
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
    for (a, &b) in a.iter_mut().zip(b) {
        *a = (*a * wa + b * wb) / sum;
    }
    *a_lse = max + sum.ln();
}

/// Element `index` of K (`v` false) or V of one token and head in the pool.
pub fn kv_at(pool: &KvPool, layer: usize, block: u32, v: bool, head: usize, token: usize, index: usize) -> f32 {
    let shape = pool.shape();
    let heads = usize::from(v) * shape.kv_heads as usize + head;
    let element = (heads * shape.block_tokens as usize + token) * shape.head_dim as usize + index;
    let offset = pool.offset(layer, block) + element * shape.dtype.size();
    assert!(offset + shape.dtype.size() <= pool.memory().len());
    // SAFETY: in range, checked above; unaligned bytes of any pattern.
    unsafe {
        let at = pool.memory().as_ptr().add(offset);
        match shape.dtype {
            KvDtype::Bf16 => at.cast::<bf16>().read_unaligned().to_f32(),
            KvDtype::F16 => at.cast::<f16>().read_unaligned().to_f32(),
            KvDtype::F32 => at.cast::<f32>().read_unaligned(),
            KvDtype::Fp8 => e4m3::to_f32(*at),
        }
    }
}

/// Writes one K (or V) head of one token, rounded to nearest even.
#[allow(clippy::too_many_arguments)]
pub fn write_kv(pool: &KvPool, layer: usize, block: u32, v: bool, head: usize, token: usize, values: &[f32]) {
    let shape = pool.shape();
    let heads = usize::from(v) * shape.kv_heads as usize + head;
    let element = (heads * shape.block_tokens as usize + token) * shape.head_dim as usize;
    let offset = pool.offset(layer, block) + element * shape.dtype.size();
    assert!(offset + values.len() * shape.dtype.size() <= pool.memory().len());
    // SAFETY: in range, checked above; the block belongs to the writer.
    unsafe {
        let at = pool.memory().as_ptr().add(offset);
        for (i, &x) in values.iter().enumerate() {
            match shape.dtype {
                KvDtype::Bf16 => at.cast::<bf16>().add(i).write_unaligned(bf16::from_f32(x)),
                KvDtype::F16 => at.cast::<f16>().add(i).write_unaligned(f16::from_f32(x)),
                KvDtype::F32 => at.cast::<f32>().add(i).write_unaligned(x),
                KvDtype::Fp8 => *at.add(i) = e4m3::from_f32(x),
            }
        }
    }
}

/// Whether the query at `row` sees the key at `position`.
pub fn sees(row: u32, position: u32, window: Option<u32>) -> bool {
    position <= row && window.is_none_or(|w| row - position < w)
}

/// MicroAttention of one query head at position `row` over `runs`; returns the
/// lse (natural log, −∞ where it sees no key, and then `o` is 0).
#[allow(clippy::too_many_arguments)]
pub fn attention_head(
    q: &[f32],
    scale: f32,
    row: u32,
    window: Option<u32>,
    layer: usize,
    pool: &KvPool,
    kv_head: usize,
    runs: &[KvRun],
    o: &mut [f32],
) -> f32 {
    let mut scores = Vec::new();
    for run in runs {
        for token in 0..run.tokens {
            if sees(row, run.position + token, window) {
                let key = |i| kv_at(pool, layer, run.block, false, kv_head, token as usize, i);
                let dot: f64 = q.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(key(i))).sum();
                scores.push((run.block, token as usize, dot * f64::from(scale)));
            }
        }
    }
    o.fill(0.0);
    let max = scores.iter().map(|s| s.2).fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return f32::NEG_INFINITY;
    }
    let sum: f64 = scores.iter().map(|s| (s.2 - max).exp()).sum();
    for (i, o) in o.iter_mut().enumerate() {
        let value = |&(block, token, _): &(u32, usize, f64)| kv_at(pool, layer, block, true, kv_head, token, i);
        *o = (scores.iter().map(|s| (s.2 - max).exp() * f64::from(value(s))).sum::<f64>() / sum) as f32;
    }
    (max + sum.ln()) as f32
}

/// MicroAttention of all rows of `seqs`: q rows of `q_stride`, o `[rows, heads ·
/// head_dim]`, lse `[rows, heads]`.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    shape: &AttentionShape,
    window: Option<u32>,
    layer: usize,
    pool: &KvPool,
    q: &[f32],
    q_stride: usize,
    seqs: &[AttnSeq],
    runs: &[KvRun],
    o: &mut [f32],
    lse: &mut [f32],
) {
    let d = shape.head_dim;
    let group = shape.heads / shape.kv_heads;
    for seq in seqs {
        let runs = if seq.runs == 0 { &[] } else { &runs[seq.run as usize..][..seq.runs as usize] };
        for r in 0..seq.rows {
            let row = (seq.row + r) as usize;
            for head in 0..shape.heads {
                let q = &q[row * q_stride + head * d..][..d];
                let o = &mut o[row * shape.q_width() + head * d..][..d];
                lse[row * shape.heads + head] =
                    attention_head(q, shape.scale, seq.position + r, window, layer, pool, head / group, runs, o);
            }
        }
    }
}
