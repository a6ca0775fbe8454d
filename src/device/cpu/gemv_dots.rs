//! Products of quantised weights with activations of 8 bits, for any number of
//! rows. A row's result is the same whatever rows are beside it.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::dot::{Dot, DotKernel};
use super::format_blocks::{Q4, Q4K, Q4M, Q6K, Q8};
use super::format_dots::{BLOCK, Block, DotFormat};
use super::gemv::{AHEAD, store};
use super::matrix::Segment;
use super::simd::{Kernel, Simd};
use crate::device::tensor::DType;

/// Rows that share a pass over a panel where there are several.
const ROWS: usize = 4;
/// A block whose largest activation is below this counts as zeros: the inverse
/// of its scale is not a number any more.
const SMALLEST: f32 = 1e-30;

/// Whether there are integer products with weights of `dtype`.
pub(super) const fn has_dots(dtype: DType) -> bool {
    matches!(dtype, DType::Q8_0 | DType::Q4_0 | DType::Q4_1 | DType::Q4K | DType::Q6K)
}

/// Quantises one row: to the nearest of 255 multiples of the largest magnitude
/// of each block. What is not finite makes its block NaN.
pub(super) struct Quantize<'a> {
    pub x: &'a [f32],
    /// `x.len() / BLOCK`.
    pub out: &'a mut [Block],
}

impl Kernel for Quantize<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // Adding 1.5 · 2^23 leaves the rounded number in the low bits.
        const BIG: f32 = 12_582_912.0;
        for (x, out) in self.x.as_chunks::<BLOCK>().0.iter().zip(self.out) {
            // As integers magnitudes have the same order, and NaN is the largest.
            let mut most = [0u32; 8];
            for i in 0..BLOCK {
                let bits = x[i].to_bits() & 0x7fff_ffff;
                most[i % 8] = if bits > most[i % 8] { bits } else { most[i % 8] };
            }
            let mut largest = most[0];
            for i in 1..8 {
                largest = if most[i] > largest { most[i] } else { largest };
            }
            let largest = f32::from_bits(largest);
            let (scale, inverse) = if largest < SMALLEST {
                (0.0, 0.0)
            } else if largest < f32::INFINITY {
                (largest / 127.0, 127.0 / largest)
            } else {
                (f32::NAN, 0.0)
            };
            let mut sums = [[0i32; 8]; 2];
            for i in 0..BLOCK {
                let code = (x[i] * inverse + BIG).to_bits() as i32 - BIG.to_bits() as i32;
                out.codes[i] = code as i8;
                sums[i / 16][i % 8] += i32::from(code as i8);
            }
            out.sums = [0; 2];
            for i in 0..8 {
                out.sums[0] += sums[0][i];
                out.sums[1] += sums[1][i];
            }
            out.scale = scale;
            out.total = scale * (out.sums[0] + out.sums[1]) as f32;
        }
    }
}

/// `out = x · Wᵀ` over some panels of a segment of which [`has_dots`].
pub(super) struct DotGemv<'a> {
    pub segment: &'a Segment,
    pub panels: Range<usize>,
    /// Rows `x_stride` blocks apart.
    pub x: *const Block,
    pub x_stride: usize,
    pub rows: usize,
    /// `[rows, outs of the matrix]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// Of all outs of the matrix.
    pub bias: Option<&'a [f32]>,
    /// Add to `out` what is there.
    pub add: bool,
}

impl DotKernel for DotGemv<'_> {
    #[inline(always)]
    unsafe fn run<D: Dot, const V: usize>(self) {
        // SAFETY: the fields are as they say.
        unsafe {
            match self.segment.dtype {
                DType::Q8_0 => self.panels::<Q8, D, V>(),
                DType::Q4_0 => self.panels::<Q4, D, V>(),
                DType::Q4_1 => self.panels::<Q4M, D, V>(),
                DType::Q4K => self.panels::<Q4K, D, V>(),
                DType::Q6K => self.panels::<Q6K, D, V>(),
                DType::F32 | DType::F16 | DType::Bf16 | DType::F8E4m3 => {
                    unreachable!("no integer products with plain floats")
                }
            }
        }
    }
}

impl DotGemv<'_> {
    #[inline(always)]
    unsafe fn panels<F: DotFormat, D: Dot, const V: usize>(self) {
        for panel in self.panels.clone() {
            let mut row = 0;
            while row < self.rows {
                // SAFETY: the rows exist.
                unsafe {
                    if D::S::PLAIN || self.rows - row == 1 {
                        self.block::<F, D, V, 1>(panel, row, 0);
                        row += 1;
                    } else {
                        // Sixteen registers hold four rows of two vectors; the
                        // second half finds the panel in cache.
                        for vector in (0..V).step_by(2) {
                            self.block::<F, D, 2, ROWS>(panel, row, vector);
                        }
                        row += ROWS;
                    }
                }
            }
        }
    }

    /// Up to `R` rows from `row` on, `W` vectors of the panel from `vector` on.
    #[inline(always)]
    unsafe fn block<F: DotFormat, D: Dot, const W: usize, const R: usize>(
        &self,
        panel: usize,
        row: usize,
        vector: usize,
    ) {
        let rows = R.min(self.rows - row);
        let weights = self.segment.panel(panel);
        // SAFETY: `weights` holds `groups` groups, x their activations.
        unsafe {
            // Where there are fewer rows the last one is computed again.
            let mut x = [self.x; R];
            for r in 0..R {
                x[r] = self.x.add((row + r.min(rows - 1)) * self.x_stride);
            }
            let mut acc = [[D::S::splat(0.0); W]; R];
            let mut group = weights.as_ptr();
            for _ in 0..self.segment.groups {
                if row == 0 && vector == 0 {
                    for at in (0..F::BYTES).step_by(64) {
                        D::S::prefetch(group.wrapping_add(AHEAD + at));
                    }
                }
                F::dot::<D, W, R>(group, vector, &x, &mut acc);
                group = group.add(F::BYTES);
                for r in 0..R {
                    x[r] = x[r].add(F::K / BLOCK);
                }
            }
            let first = self.segment.first + panel * super::simd::PANEL + vector * D::S::LANES;
            let width = W * D::S::LANES;
            let outs = self.segment.panel_outs(panel).saturating_sub(vector * D::S::LANES).min(width);
            for r in 0..rows {
                let out = self.out.add((row + r) * self.out_stride);
                store::<D::S, W>(out, first, outs, &acc[r], self.bias, self.add);
            }
        }
    }
}
