//! One layer of a pool as the attention kernels read it.
#![allow(unsafe_code)]

use super::simd::Simd;
use crate::e4m3;
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvRun};

/// Where a layer's keys and values lie.
#[derive(Clone, Copy)]
pub(super) struct KvView {
    base: *const u8,
    /// Bytes of a block in this layer.
    pub block_bytes: usize,
    /// Bytes of K (or V) of one head.
    pub head_bytes: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub block_tokens: usize,
    pub dtype: KvDtype,
    blocks: u32,
}

// SAFETY: it reads memory that the pool keeps and the rBlock table's rules keep
// others from writing meanwhile.
unsafe impl Send for KvView {}
// SAFETY: as above.
unsafe impl Sync for KvView {}

impl KvView {
    pub fn new(pool: &KvPool, layer: usize) -> Self {
        let shape = pool.shape();
        assert!(layer < shape.layers as usize, "layer {layer} of {}", shape.layers);
        Self {
            base: pool.memory().as_ptr().wrapping_add(layer * pool.layer_stride()),
            block_bytes: shape.layer_bytes(),
            head_bytes: shape.head_bytes(),
            kv_heads: shape.kv_heads as usize,
            head_dim: shape.head_dim as usize,
            block_tokens: shape.block_tokens as usize,
            dtype: shape.dtype,
            blocks: pool.blocks(),
        }
    }

    /// Whether a run lies inside the pool.
    pub fn holds(&self, run: &KvRun) -> bool {
        run.block < self.blocks && run.tokens as usize <= self.block_tokens
    }

    /// A block's first byte; its K heads, then its V heads.
    pub fn block(&self, run: &KvRun) -> *const u8 {
        self.base.wrapping_add(run.block as usize * self.block_bytes)
    }

    /// Bytes of one token's K (or V) of one head.
    pub fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.size()
    }
}

/// `LANES` elements from element `i` of a row.
///
/// # Safety
/// As [`Simd`]: that many elements are there.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(row: *const u8, i: usize, dtype: KvDtype) -> S::F {
    // SAFETY: as promised.
    unsafe {
        match dtype {
            KvDtype::Bf16 => S::load_bf16(row.cast::<u16>().wrapping_add(i)),
            KvDtype::F16 => S::load_f16(row.cast::<u16>().wrapping_add(i)),
            KvDtype::F32 => S::load(row.cast::<f32>().wrapping_add(i)),
            KvDtype::Fp8 => S::load_e4m3(row.wrapping_add(i)),
        }
    }
}

/// One row as f32, zeros up to a multiple of `LANES`, each `LANES` of them `step`
/// elements after those before; asks for the row `ahead`
/// bytes on while at it.
///
/// # Safety
/// `d` elements at `row`, `d` rounded up to LANES at `out`.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd>(
    row: *const u8,
    d: usize,
    dtype: KvDtype,
    ahead: *const u8,
    out: *mut f32,
    step: usize,
) {
    // SAFETY: as promised; the prefetched address need not be valid.
    unsafe {
        let whole = d - d % S::LANES;
        for at in (0..d * dtype.size()).step_by(64) {
            S::prefetch(ahead.wrapping_add(at));
        }
        for i in (0..whole).step_by(S::LANES) {
            S::store(out.wrapping_add(i / S::LANES * step), load::<S>(row, i, dtype));
        }
        if whole < d {
            for i in whole..whole + S::LANES {
                *out.add(whole / S::LANES * step + i - whole) = if i >= d {
                    0.0
                } else {
                    match dtype {
                        KvDtype::Bf16 => half::bf16::from_bits(*row.cast::<u16>().add(i)).to_f32(),
                        KvDtype::F16 => half::f16::from_bits(*row.cast::<u16>().add(i)).to_f32(),
                        KvDtype::F32 => *row.cast::<f32>().add(i),
                        KvDtype::Fp8 => e4m3::to_f32(*row.add(i)),
                    }
                };
            }
        }
    }
}

/// Where element `i` of a head lies when pairs of bf16 are widened: each `2 ·
/// LANES` elements become the even ones, then the odd ones.
#[inline(always)]
pub(super) fn paired<S: Simd>(i: usize) -> usize {
    let (chunk, i) = (i / (2 * S::LANES), i % (2 * S::LANES));
    chunk * 2 * S::LANES + i % 2 * S::LANES + i / 2
}

/// The even and the odd ones of `2 · LANES` bf16 from element `i` on: half the
/// instructions of widening them in order.
///
/// # Safety
/// As [`Simd`]: that many elements are there.
#[inline(always)]
pub(super) unsafe fn load_pair<S: Simd>(row: *const u8, i: usize) -> (S::F, S::F) {
    // SAFETY: as promised.
    unsafe {
        let pair = S::load_i(row.wrapping_add(2 * i).cast());
        (S::as_f(S::shl(pair, 16)), S::as_f(S::and(pair, S::splat_i(0xffff_0000))))
    }
}

/// As [`widen`], of bf16 into [`paired`] order; `d` a multiple of `2 · LANES`.
///
/// # Safety
/// As [`widen`].
#[inline(always)]
pub(super) unsafe fn widen_pairs<S: Simd>(row: *const u8, d: usize, ahead: *const u8, out: *mut f32, step: usize) {
    // SAFETY: as promised.
    unsafe {
        for i in (0..d).step_by(2 * S::LANES) {
            S::prefetch(ahead.wrapping_add(2 * i));
            let (even, odd) = load_pair::<S>(row, i);
            let out = out.wrapping_add(i / S::LANES * step);
            S::store(out, even);
            S::store(out.wrapping_add(step), odd);
        }
    }
}
