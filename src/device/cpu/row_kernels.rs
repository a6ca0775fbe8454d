//! Kernels of single rows: norm, rotary embedding and KV append, SwiGLU, merge.
#![allow(unsafe_code)]

use super::simd::{Kernel, Simd};
use crate::e4m3;
use crate::kv::rblock::KvDtype;

/// `out = x / rms(x) · weight`; `out` may be `x`.
pub(super) struct RmsNorm {
    pub x: *const f32,
    pub weight: *const f32,
    pub cols: usize,
    pub eps: f32,
    pub out: *mut f32,
}

impl Kernel for RmsNorm {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // SAFETY: `cols` elements behind each pointer.
        unsafe {
            let whole = self.cols - self.cols % S::LANES;
            let mut acc = [S::splat(0.0); 4];
            let mut i = 0;
            while i + 4 * S::LANES <= whole {
                for (j, acc) in acc.iter_mut().enumerate() {
                    let x = S::load(self.x.add(i + j * S::LANES));
                    *acc = S::fma(x, x, *acc);
                }
                i += 4 * S::LANES;
            }
            while i < whole {
                let x = S::load(self.x.add(i));
                acc[0] = S::fma(x, x, acc[0]);
                i += S::LANES;
            }
            let mut sum = S::sum(S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3])));
            for i in whole..self.cols {
                sum += *self.x.add(i) * *self.x.add(i);
            }
            let factor = 1.0 / (sum / self.cols as f32 + self.eps).sqrt();
            let factors = S::splat(factor);
            for i in (0..whole).step_by(S::LANES) {
                let x = S::mul(S::load(self.x.add(i)), factors);
                S::store(self.out.add(i), S::mul(x, S::load(self.weight.add(i))));
            }
            for i in whole..self.cols {
                *self.out.add(i) = *self.x.add(i) * factor * *self.weight.add(i);
            }
        }
    }
}

/// `out = silu(gate) · up`.
pub(super) struct SwiGlu {
    pub gate: *const f32,
    pub up: *const f32,
    pub cols: usize,
    pub out: *mut f32,
}

impl Kernel for SwiGlu {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // SAFETY: `cols` elements behind each pointer.
        unsafe {
            let whole = self.cols - self.cols % S::LANES;
            for i in (0..whole).step_by(S::LANES) {
                S::store(self.out.add(i), silu::<S>(S::load(self.gate.add(i)), S::load(self.up.add(i))));
            }
            if whole < self.cols {
                let (mut g, mut u, mut o) = ([0.0; 16], [0.0; 16], [0.0; 16]);
                for i in whole..self.cols {
                    g[i - whole] = *self.gate.add(i);
                    u[i - whole] = *self.up.add(i);
                }
                S::store(o.as_mut_ptr(), silu::<S>(S::load(g.as_ptr()), S::load(u.as_ptr())));
                for i in whole..self.cols {
                    *self.out.add(i) = o[i - whole];
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn silu<S: Simd>(gate: S::F, up: S::F) -> S::F {
    // SAFETY: the caller's instruction set.
    unsafe {
        let e = S::exp2(S::mul(gate, S::splat(-std::f32::consts::LOG2_E)));
        S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
    }
}

/// `into = into · a + from · b`.
pub(super) struct Blend {
    pub into: *mut f32,
    pub from: *const f32,
    pub len: usize,
    pub a: f32,
    pub b: f32,
}

impl Kernel for Blend {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // SAFETY: `len` elements behind each pointer.
        unsafe {
            let whole = self.len - self.len % S::LANES;
            for i in (0..whole).step_by(S::LANES) {
                let x = S::mul(S::load(self.into.add(i)), S::splat(self.a));
                S::store(self.into.add(i), S::fma(S::load(self.from.add(i)), S::splat(self.b), x));
            }
            for i in whole..self.len {
                *self.into.add(i) = *self.into.add(i) * self.a + *self.from.add(i) * self.b;
            }
        }
    }
}

/// One row's fused QKV: normed, rotated in place, and its K and V heads
/// written to their block.
pub(super) struct RopeAppend<'a> {
    /// `[heads + 2 · kv_heads, head_dim]`.
    pub qkv: *mut f32,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Weights of the q and of the k norm, each `[head_dim]`, and epsilon.
    pub qk_norm: Option<(*const f32, *const f32, f32)>,
    /// `[head_dim / 2]` each.
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub interleaved: bool,
    /// This token's element of the first K head; heads are `head_stride` bytes
    /// apart, V heads follow K heads.
    pub kv: *mut u8,
    pub head_stride: usize,
    pub dtype: KvDtype,
}

impl Kernel for RopeAppend<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        let d = self.head_dim;
        for h in 0..self.heads + 2 * self.kv_heads {
            // SAFETY: the head is in the row, its place in the block.
            unsafe {
                let head = self.qkv.add(h * d);
                if h < self.heads + self.kv_heads {
                    if let Some((q, k, eps)) = self.qk_norm {
                        let weight = if h < self.heads { q } else { k };
                        RmsNorm { x: head, weight, cols: d, eps, out: head }.run::<S, V>();
                    }
                    self.rotate::<S>(head);
                }
                if h >= self.heads {
                    store_kv::<S>(head, d, self.kv.add((h - self.heads) * self.head_stride), self.dtype);
                }
            }
        }
    }
}

impl RopeAppend<'_> {
    #[inline(always)]
    unsafe fn rotate<S: Simd>(&self, head: *mut f32) {
        let half = self.head_dim / 2;
        assert!(self.cos.len() == half && self.sin.len() == half);
        // SAFETY: `head_dim` elements at `head`.
        unsafe {
            let mut i = 0;
            if !self.interleaved {
                while i + S::LANES <= half {
                    let (x, y) = (S::load(head.add(i)), S::load(head.add(i + half)));
                    let (cos, sin) = (S::load(self.cos.as_ptr().add(i)), S::load(self.sin.as_ptr().add(i)));
                    S::store(head.add(i), S::sub(S::mul(x, cos), S::mul(y, sin)));
                    S::store(head.add(i + half), S::add(S::mul(x, sin), S::mul(y, cos)));
                    i += S::LANES;
                }
            }
            while i < half {
                let (a, b) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (x, y) = (*head.add(a), *head.add(b));
                let (cos, sin) = (*self.cos.get_unchecked(i), *self.sin.get_unchecked(i));
                *head.add(a) = x * cos - y * sin;
                *head.add(b) = x * sin + y * cos;
                i += 1;
            }
        }
    }
}

/// Writes `len` elements as the pool's type, rounded to nearest even.
#[inline(always)]
unsafe fn store_kv<S: Simd>(from: *const f32, len: usize, to: *mut u8, dtype: KvDtype) {
    // SAFETY: `len` elements on both sides; rows of a block are aligned to the
    // element at least, since head_dim is even and the pool page-aligned.
    unsafe {
        match dtype {
            KvDtype::F32 => std::ptr::copy_nonoverlapping(from, to.cast::<f32>(), len),
            KvDtype::Bf16 => {
                for i in 0..len {
                    to.cast::<u16>().add(i).write(to_bf16(*from.add(i)));
                }
            }
            KvDtype::Fp8 => {
                for i in 0..len {
                    to.add(i).write(e4m3::from_f32(*from.add(i)));
                }
            }
            KvDtype::F16 => {
                let whole = len - len % S::LANES;
                for i in (0..whole).step_by(S::LANES) {
                    S::store_f16(to.cast::<u16>().add(i), S::load(from.add(i)));
                }
                for i in whole..len {
                    to.cast::<u16>().add(i).write(half::f16::from_f32(*from.add(i)).to_bits());
                }
            }
        }
    }
}

/// Nearest even bf16; a NaN stays one.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) as u16 | 0x40 } else { rounded }
}
