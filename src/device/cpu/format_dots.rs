//! Products of the quantised formats with activations of 8 bits: integer sums
//! over a block of 32, then one multiplication by both scales.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use super::dot::{Dot, I};
use super::format::Format;
use super::format_blocks::{HALVES, LINE, Q4, Q4K, Q4M, Q6K, Q8};
use super::simd::{PANEL, Simd};

/// Activations that share a scale.
pub(super) const BLOCK: usize = 32;

/// Quantised activations: `x ≈ scale · code`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
pub(super) struct Block {
    /// In −127 ..= 127.
    pub codes: [i8; BLOCK],
    pub scale: f32,
    /// `scale ·` the sum of the codes.
    pub total: f32,
    /// Sums of the codes of each half.
    pub sums: [i32; 2],
}

/// Sums of products of `R` rows in `W` vectors.
pub(super) type Acc<D, const W: usize, const R: usize> = [[<<D as Dot>::S as Simd>::F; W]; R];

/// A packed format with integer products.
///
/// # Safety
/// Methods: `group` points to a panel's group of the format, each `x` to its
/// activations. `vector` is the first of the panel's vectors that `acc` is of.
pub(super) trait DotFormat: Format {
    /// `acc[r] += group · x[r]`.
    unsafe fn dot<D: Dot, const W: usize, const R: usize>(
        group: *const u8,
        vector: usize,
        x: &[*const Block; R],
        acc: &mut Acc<D, W, R>,
    );
}

/// Four activations in every lane.
#[inline(always)]
unsafe fn four<D: Dot>(x: *const Block, index: usize) -> I<D> {
    // SAFETY: `index` is below 8; the codes come first.
    unsafe { D::S::splat_i(x.cast::<u32>().add(index).read()) }
}

#[inline(always)]
unsafe fn load<D: Dot>(lines: *const u8, line: usize, vector: usize) -> I<D> {
    // SAFETY: a line of the panel.
    unsafe { D::S::load_i(lines.add(line * LINE).cast::<u32>().add(vector * D::S::LANES)) }
}

#[inline(always)]
unsafe fn half<D: Dot>(halves: *const u8, vector: usize) -> <D::S as Simd>::F {
    // SAFETY: an f16 a feature at `halves`.
    unsafe { D::S::load_f16(halves.cast::<u16>().add(vector * D::S::LANES)) }
}

/// Integer sums of 32 4-bit codes, for each row.
#[inline(always)]
unsafe fn nibble_sums<D: Dot, const R: usize>(lines: *const u8, vector: usize, x: &[*const Block; R]) -> [I<D>; R] {
    // SAFETY: `lines` has NIBBLES bytes.
    unsafe {
        let mut sums = [D::S::splat_i(0); R];
        let mask = D::S::splat_i(0x0f0f_0f0f);
        for line in 0..4 {
            let w = load::<D>(lines, line, vector);
            let (low, high) = (D::S::and(w, mask), D::S::and(D::S::shr(w, 4), mask));
            for r in 0..R {
                sums[r] = D::small(sums[r], low, four::<D>(x[r], line));
                sums[r] = D::small(sums[r], high, four::<D>(x[r], 4 + line));
            }
        }
        for r in 0..R {
            sums[r] = D::whole(sums[r]);
        }
        sums
    }
}

/// `acc + sums · (weights' scale · activations' scale)`: in this order what is
/// representable does not overflow on the way.
#[inline(always)]
unsafe fn scaled<D: Dot>(
    sums: I<D>,
    weights: <D::S as Simd>::F,
    activations: f32,
    acc: <D::S as Simd>::F,
) -> <D::S as Simd>::F {
    // SAFETY: the caller's instructions.
    unsafe { D::S::fma(D::S::to_f(sums), D::S::mul(weights, D::S::splat(activations)), acc) }
}

/// `8 · sum` or `32 · sum` to take away, in every lane.
#[inline(always)]
unsafe fn less<D: Dot>(times: i32, sum: i32) -> I<D> {
    // SAFETY: the caller's instructions.
    unsafe { D::S::splat_i((-times * sum) as u32) }
}

impl DotFormat for Q8 {
    #[inline(always)]
    unsafe fn dot<D: Dot, const W: usize, const R: usize>(
        group: *const u8,
        vector: usize,
        x: &[*const Block; R],
        acc: &mut Acc<D, W, R>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..W {
                let mut sums = [D::S::splat_i(0); R];
                for r in 0..R {
                    sums[r] = D::bytes_start((*x[r]).sums[0] + (*x[r]).sums[1]);
                }
                for line in 0..8 {
                    let w = load::<D>(group.add(HALVES), line, vector + v);
                    for r in 0..R {
                        sums[r] = D::bytes(sums[r], w, four::<D>(x[r], line));
                    }
                }
                let scale = half::<D>(group, vector + v);
                for r in 0..R {
                    acc[r][v] = scaled::<D>(sums[r], scale, (*x[r]).scale, acc[r][v]);
                }
            }
        }
    }
}

impl DotFormat for Q4 {
    #[inline(always)]
    unsafe fn dot<D: Dot, const W: usize, const R: usize>(
        group: *const u8,
        vector: usize,
        x: &[*const Block; R],
        acc: &mut Acc<D, W, R>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..W {
                let sums = nibble_sums::<D, R>(group.add(HALVES), vector + v, x);
                let scale = half::<D>(group, vector + v);
                for r in 0..R {
                    let sum = D::add(sums[r], less::<D>(8, (*x[r]).sums[0] + (*x[r]).sums[1]));
                    acc[r][v] = scaled::<D>(sum, scale, (*x[r]).scale, acc[r][v]);
                }
            }
        }
    }
}

impl DotFormat for Q4M {
    #[inline(always)]
    unsafe fn dot<D: Dot, const W: usize, const R: usize>(
        group: *const u8,
        vector: usize,
        x: &[*const Block; R],
        acc: &mut Acc<D, W, R>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            for v in 0..W {
                let sums = nibble_sums::<D, R>(group.add(2 * HALVES), vector + v, x);
                let (scale, min) = (half::<D>(group, vector + v), half::<D>(group.add(HALVES), vector + v));
                for r in 0..R {
                    acc[r][v] = scaled::<D>(sums[r], scale, (*x[r]).scale, acc[r][v]);
                    acc[r][v] = D::S::fma(min, D::S::splat((*x[r]).total), acc[r][v]);
                }
            }
        }
    }
}

impl DotFormat for Q4K {
    #[inline(always)]
    unsafe fn dot<D: Dot, const W: usize, const R: usize>(
        group: *const u8,
        vector: usize,
        x: &[*const Block; R],
        acc: &mut Acc<D, W, R>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut x = *x;
            for j in 0..8 {
                let sub = group.add(2 * HALVES + j * Self::SUB);
                for v in 0..W {
                    let at = (vector + v) * D::S::LANES;
                    let sums = nibble_sums::<D, R>(sub.add(2 * PANEL), vector + v, &x);
                    let scale = D::S::mul(half::<D>(group, vector + v), D::S::load_u8(sub.add(at)));
                    let min = D::S::mul(half::<D>(group.add(HALVES), vector + v), D::S::load_u8(sub.add(PANEL + at)));
                    for r in 0..R {
                        acc[r][v] = scaled::<D>(sums[r], scale, (*x[r]).scale, acc[r][v]);
                        acc[r][v] = D::S::fma(min, D::S::splat(-(*x[r]).total), acc[r][v]);
                    }
                }
                for r in 0..R {
                    x[r] = x[r].add(1);
                }
            }
        }
    }
}

impl DotFormat for Q6K {
    #[inline(always)]
    unsafe fn dot<D: Dot, const W: usize, const R: usize>(
        group: *const u8,
        vector: usize,
        x: &[*const Block; R],
        acc: &mut Acc<D, W, R>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            let mut x = *x;
            for j in 0..8 {
                let sub = group.add(HALVES + j * Self::SUB);
                for v in 0..W {
                    for half_run in 0..2 {
                        let mut sums = [[D::S::splat_i(0); 2]; R];
                        for line in 0..4 {
                            let w = Self::codes::<D::S>(sub, half_run, line, vector + v);
                            for r in 0..R {
                                let x = four::<D>(x[r], 4 * half_run + line);
                                sums[r][line % 2] = D::small(sums[r][line % 2], w, x);
                            }
                        }
                        let at = half_run * PANEL + (vector + v) * D::S::LANES;
                        let scale = D::S::mul(half::<D>(group, vector + v), D::S::load_i8(sub.add(at).cast()));
                        for r in 0..R {
                            let sum = D::add(D::whole(sums[r][0]), D::whole(sums[r][1]));
                            let sum = D::add(sum, less::<D>(32, (*x[r]).sums[half_run]));
                            acc[r][v] = scaled::<D>(sum, scale, (*x[r]).scale, acc[r][v]);
                        }
                    }
                }
                for r in 0..R {
                    x[r] = x[r].add(1);
                }
            }
        }
    }
}
