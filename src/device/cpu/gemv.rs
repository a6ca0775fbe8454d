//! Products of a few rows, bounded by reading the weights: every weight is read
//! once for all rows and widened in registers.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::format::{Format, SUM};
use super::matrix::{Segment, with_format};
use super::simd::{Kernel, PANEL, Simd, lanes};

/// Bytes ahead that are asked for: the hardware's prefetchers stop at a page.
pub(super) const AHEAD: usize = 4096;

/// `out = x · Wᵀ` over some panels of a segment.
pub(super) struct Gemv<'a> {
    pub segment: &'a Segment,
    pub panels: Range<usize>,
    /// `[rows, groups · K]`, rows `x_stride` apart.
    pub x: *const f32,
    pub x_stride: usize,
    /// Sums of x over runs of 16, rows `sums_stride` apart; read only by the
    /// quantised formats.
    pub sums: *const f32,
    pub sums_stride: usize,
    pub rows: usize,
    /// `[rows, outs of the matrix]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// Of all outs of the matrix.
    pub bias: Option<&'a [f32]>,
    /// Add to `out` what is there.
    pub add: bool,
}

impl Kernel for Gemv<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // Without vectors nothing is gained over `gemm`, which `product` uses.
        if !S::PLAIN {
            // SAFETY: the fields are as they say.
            with_format!(self.segment.dtype, F => unsafe { self.panels::<F, S, V>() });
        }
    }
}

impl Gemv<'_> {
    #[inline(always)]
    unsafe fn panels<F: Format, S: Simd, const V: usize>(self) {
        for panel in self.panels.clone() {
            let mut row = 0;
            // Sixteen registers hold two rows of four vectors; of two vectors
            // four rows do. (More kinds of block would cost a minute of every
            // build and gain little: the second one finds the panel in cache.)
            while row < self.rows {
                // SAFETY: the rows exist.
                row += unsafe {
                    if self.rows - row == 1 {
                        self.block::<F, S, V, 1>(panel, row)
                    } else if V == 2 {
                        self.block::<F, S, V, 4>(panel, row)
                    } else {
                        self.block::<F, S, V, 2>(panel, row)
                    }
                };
            }
        }
    }

    /// Up to `R` rows from `row` on; returns how many.
    #[inline(always)]
    unsafe fn block<F: Format, S: Simd, const V: usize, const R: usize>(&self, panel: usize, row: usize) -> usize {
        let rows = R.min(self.rows - row);
        let weights = self.segment.panel(panel);
        // SAFETY: `weights` holds `groups` groups, and x and sums their rows.
        unsafe {
            // Where there are fewer rows the last one is computed again.
            let mut x: [*const f32; R] =
                lanes!([std::ptr::null(); R], r => self.x.add((row + r.min(rows - 1)) * self.x_stride));
            let mut sums: [*const f32; R] =
                lanes!([std::ptr::null(); R], r => self.sums.wrapping_add((row + r.min(rows - 1)) * self.sums_stride));
            let mut acc = [[S::splat(0.0); V]; R];
            // A second set of sums hides the latency where one is too short.
            let mut other = [[S::splat(0.0); V]; R];
            let mut group = weights.as_ptr();
            let mut left = self.segment.groups;
            while left >= 2 && F::K <= 2 && R == 1 {
                step::<F, S, V, R>(group, &mut x, &mut sums, &mut acc);
                step::<F, S, V, R>(group.add(F::BYTES), &mut x, &mut sums, &mut other);
                group = group.add(2 * F::BYTES);
                left -= 2;
            }
            while left > 0 {
                step::<F, S, V, R>(group, &mut x, &mut sums, &mut acc);
                group = group.add(F::BYTES);
                left -= 1;
            }
            for (r, (acc, other)) in acc.iter_mut().zip(&other).enumerate().take(rows) {
                for v in 0..V {
                    acc[v] = S::add(acc[v], other[v]);
                }
                let first = self.segment.first + panel * PANEL;
                let out = self.out.add((row + r) * self.out_stride);
                store::<S, V>(out, first, self.segment.panel_outs(panel), acc, self.bias, self.add);
            }
        }
        rows
    }
}

/// Writes `outs` sums of one row, the first of which is feature `first`.
///
/// # Safety
/// As [`Simd`]; `outs` elements at `out` from `first` on are the caller's.
#[inline(always)]
pub(super) unsafe fn store<S: Simd, const V: usize>(
    out: *mut f32,
    first: usize,
    outs: usize,
    acc: &[S::F; V],
    bias: Option<&[f32]>,
    add: bool,
) {
    // SAFETY: as promised.
    unsafe {
        let out = out.add(first);
        if outs == V * S::LANES {
            for v in 0..V {
                let mut sum = acc[v];
                if let Some(bias) = bias {
                    sum = S::add(sum, S::load(bias[first + v * S::LANES..][..S::LANES].as_ptr()));
                }
                let out = out.add(v * S::LANES);
                S::store(out, if add { S::add(S::load(out), sum) } else { sum });
            }
            return;
        }
        let mut lanes = [0.0f32; PANEL];
        for v in 0..V {
            S::store(lanes.as_mut_ptr().add(v * S::LANES), acc[v]);
        }
        for (i, lane) in lanes.iter().enumerate().take(outs) {
            let mut sum = *lane;
            if let Some(bias) = bias {
                sum += bias[first + i];
            }
            *out.add(i) = if add { *out.add(i) + sum } else { sum };
        }
    }
}

/// One group; moves x and sums on.
#[inline(always)]
unsafe fn step<F: Format, S: Simd, const V: usize, const R: usize>(
    group: *const u8,
    x: &mut [*const f32; R],
    sums: &mut [*const f32; R],
    acc: &mut [[S::F; V]; R],
) {
    // SAFETY: a group, and its activations.
    unsafe {
        for at in (0..F::BYTES).step_by(64) {
            S::prefetch(group.wrapping_add(AHEAD + at));
        }
        F::product::<S, V, R>(group, x, sums, acc);
        for r in 0..R {
            x[r] = x[r].add(F::K);
            sums[r] = sums[r].wrapping_add(F::K / SUM);
        }
    }
}
