//! Products of many rows, bounded by arithmetic. The activations are packed
//! into tiles of 12 rows; each panel of weights is widened to f32 once for all
//! rows, 256 input features at a time, so that the inner loop reads both from
//! the first-level cache.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::format::Format;
use super::matrix::{Segment, with_format};
use super::simd::{Kernel, PANEL, Simd, lanes};

/// Rows of a tile of activations.
pub(super) const TILE: usize = 12;
/// Input features that are worked on at a time; a multiple of every group.
pub(super) const DEPTH: usize = 256;
/// Bytes of a thread's scratch: a panel's weights of one depth.
pub(super) const SCRATCH: usize = DEPTH * PANEL * 4;

/// f32 elements of `rows` × `cols` packed activations.
pub(super) fn packed_len(rows: usize, cols: usize) -> usize {
    rows.next_multiple_of(TILE) * cols.next_multiple_of(DEPTH)
}

/// Packs one tile of activations at one depth: `[DEPTH][TILE]`, zeros where
/// rows or columns end.
pub(super) struct PackTile {
    /// First row and column of the tile.
    pub x: *const f32,
    pub x_stride: usize,
    /// 1 ..= TILE.
    pub rows: usize,
    /// 1 ..= DEPTH.
    pub cols: usize,
    pub out: *mut f32,
}

impl Kernel for PackTile {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // SAFETY: `rows` × `cols` at `x`, a whole tile at `out`.
        unsafe {
            let mut k = 0;
            if self.rows == TILE {
                // Squares of four, which the compiler turns into shuffles.
                while k + 4 <= self.cols {
                    for i in (0..TILE).step_by(4) {
                        let row =
                            |r: usize| self.x.add((i + r) * self.x_stride + k).cast::<[f32; 4]>().read_unaligned();
                        let square = [row(0), row(1), row(2), row(3)];
                        for c in 0..4 {
                            let column = [square[0][c], square[1][c], square[2][c], square[3][c]];
                            self.out.add((k + c) * TILE + i).cast::<[f32; 4]>().write_unaligned(column);
                        }
                    }
                    k += 4;
                }
            }
            while k < DEPTH {
                for i in 0..TILE {
                    let inside = k < self.cols && i < self.rows;
                    *self.out.add(k * TILE + i) = if inside { *self.x.add(i * self.x_stride + k) } else { 0.0 };
                }
                k += 1;
            }
        }
    }
}

/// `out = x · Wᵀ` over some panels of a segment.
pub(super) struct Gemm<'a> {
    pub segment: &'a Segment,
    pub panels: Range<usize>,
    /// `[depths][tiles][DEPTH][TILE]`.
    pub x: *const f32,
    pub rows: usize,
    pub cols: usize,
    /// `[rows, outs of the matrix]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// Of all outs of the matrix.
    pub bias: Option<&'a [f32]>,
    /// Add to `out` what is there.
    pub add: bool,
    /// [`SCRATCH`] bytes of this thread.
    pub scratch: *mut f32,
}

impl Kernel for Gemm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        let tiles = self.rows.div_ceil(TILE);
        for (depth, k) in (0..self.cols).step_by(DEPTH).enumerate() {
            let cols = DEPTH.min(self.cols - k);
            for panel in self.panels.clone() {
                // SAFETY: the fields are as they say; the widened weights fill
                // `cols` rounded up to groups, at most DEPTH.
                unsafe {
                    with_format!(self.segment.dtype, F => {
                        let weights = self.segment.panel(panel).as_ptr().add(k / F::K * F::BYTES);
                        for g in 0..cols.div_ceil(F::K) {
                            F::unpack::<S, V>(weights.add(g * F::BYTES), self.scratch.add(g * F::K * PANEL));
                        }
                    });
                    for tile in 0..tiles {
                        let x = self.x.add((depth * tiles + tile) * DEPTH * TILE);
                        let rows = TILE.min(self.rows - tile * TILE);
                        self.tile::<S, V>(panel, k == 0, x, tile * TILE, rows, cols);
                    }
                }
            }
        }
    }
}

impl Gemm<'_> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const V: usize>(
        &self,
        panel: usize,
        first: bool,
        x: *const f32,
        row: usize,
        rows: usize,
        cols: usize,
    ) {
        let out = self.segment.first + panel * PANEL;
        let outs = self.segment.panel_outs(panel);
        // SAFETY: the rows and features exist; see `run`.
        unsafe {
            let mut partial = [0.0f32; TILE * PANEL];
            let at = self.out.add(row * self.out_stride + out);
            let load = self.add || !first;
            let (c, stride) = if outs == PANEL { (at, self.out_stride) } else { (partial.as_mut_ptr(), PANEL) };
            if outs < PANEL && load {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(at.add(r * self.out_stride), c.add(r * PANEL), outs);
                }
            }
            micro_tile::<S, V>(x, self.scratch, cols, rows, c, stride, load);
            if let Some(bias) = self.bias.filter(|_| first) {
                for r in 0..rows {
                    for (i, b) in bias[out..out + outs].iter().enumerate() {
                        *c.add(r * stride + i) += b;
                    }
                }
            }
            if outs < PANEL {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(c.add(r * PANEL), at.add(r * self.out_stride), outs);
                }
            }
        }
    }
}

/// `c[rows, 32] (+)= xᵀ[k, rows] · w[k, 32]`, x in columns of [`TILE`].
///
/// # Safety
/// `x` has `cols` × TILE elements, `w` `cols` × PANEL, `c` `rows` rows of PANEL.
#[inline(always)]
pub(super) unsafe fn micro_tile<S: Simd, const V: usize>(
    x: *const f32,
    w: *const f32,
    cols: usize,
    rows: usize,
    c: *mut f32,
    stride: usize,
    load: bool,
) {
    // SAFETY: as promised.
    unsafe {
        if V == 2 {
            match rows {
                9.. => micro::<S, 12, 2>(x, 1, TILE, w, cols, rows, c, stride, load),
                5..=8 => micro::<S, 8, 2>(x, 1, TILE, w, cols, rows, c, stride, load),
                _ => micro::<S, 4, 2>(x, 1, TILE, w, cols, rows, c, stride, load),
            }
        } else {
            for row in (0..rows).step_by(6) {
                for half in 0..V / 2 {
                    let at = half * 2 * S::LANES;
                    let c = c.add(row * stride + at);
                    micro::<S, 6, 2>(x.add(row), 1, TILE, w.add(at), cols, (rows - row).min(6), c, stride, load);
                }
            }
        }
    }
}

/// `c[rows][W vectors] (+)= x · w[k][PANEL]` in registers, x's element (row, k)
/// at `row · xr + k · xk`.
///
/// # Safety
/// `x` has `R` rows, `w` `depth` rows of PANEL, `c` `rows` rows, `stride` apart.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn micro<S: Simd, const R: usize, const W: usize>(
    x: *const f32,
    xr: usize,
    xk: usize,
    w: *const f32,
    depth: usize,
    rows: usize,
    c: *mut f32,
    stride: usize,
    load: bool,
) {
    // SAFETY: as promised.
    unsafe {
        let mut acc = [[S::splat(0.0); W]; R];
        let (mut x, mut w) = (x, w);
        for _ in 0..depth {
            let weights: [S::F; W] = lanes!(S, W, v => S::load(w.wrapping_add(v * S::LANES)));
            for r in 0..R {
                let a = S::splat(*x.wrapping_add(r.wrapping_mul(xr)));
                for v in 0..W {
                    acc[r][v] = S::fma(a, weights[v], acc[r][v]);
                }
            }
            x = x.wrapping_add(xk);
            w = w.wrapping_add(PANEL);
        }
        for r in 0..R {
            if r < rows {
                for v in 0..W {
                    let c = c.add(r * stride + v * S::LANES);
                    S::store(c, if load { S::add(S::load(c), acc[r][v]) } else { acc[r][v] });
                }
            }
        }
    }
}
