//! Linear layers: which kernel, over which part, on which thread.
#![allow(unsafe_code)]

use super::Math;
use super::amx::{self, AmxGemm};
use super::buffer::{Aligned, Buffer, Shared, Vector};
use super::dot::{DotIsa, dispatch_dot};
use super::format::SUM;
use super::format_dots::{BLOCK, Block};
use super::gemm::{DEPTH, Gemm, PackTile, SCRATCH, TILE, packed_len};
use super::gemv::Gemv;
use super::gemv_dots::{DotGemv, Quantize, has_dots};
use super::matrix::{Matrix, group_k};
use super::simd::{Isa, dispatch};
use super::threads::ThreadPool;
use crate::device::Result;

/// Most rows for which reading the weights outweighs the arithmetic.
const FEW_ROWS: usize = 8;

/// `out (+)= x · Wᵀ (+ bias)`.
pub(super) struct Linear<'a> {
    pub x: &'a Buffer,
    pub rows: usize,
    pub weight: &'a Matrix,
    pub bias: Option<&'a Vector>,
    pub add: bool,
    pub out: &'a mut Buffer,
}

/// Memory that products work in.
pub(super) struct Products {
    isa: Isa,
    /// Products of many rows go to the matrix unit.
    pub amx: bool,
    /// Products with quantised weights are of integers, with these instructions.
    pub dots: Option<DotIsa>,
    /// Activations packed for many rows, or padded for few.
    packed: Aligned,
    /// Activations quantised, `[rows, cols / BLOCK]`.
    quantized: Aligned,
    sums: Aligned,
    scratch: Vec<Aligned>,
}

impl Products {
    pub fn new(isa: Isa, math: Math, threads: usize) -> Result<Self> {
        let scratch = (0..threads).map(|_| Aligned::zeroed(SCRATCH)).collect::<Result<_>>()?;
        let amx = math == Math::Fast && isa == Isa::Avx512 && amx::available();
        let dots = if math == Math::Fast { DotIsa::of(isa) } else { None };
        let [packed, quantized, sums] = [(); 3].map(|()| Aligned::default());
        Ok(Self { isa, amx, dots, packed, quantized, sums, scratch })
    }

    /// Whether all of a product with `weight` is of integers.
    fn integer(&self, weight: &Matrix) -> bool {
        self.dots.is_some() && weight.segments().iter().all(|s| has_dots(s.dtype))
    }

    /// Makes room for products of up to `rows` rows with `weight`, so that a
    /// step need not.
    pub fn reserve(&mut self, rows: usize, weight: &Matrix) -> Result<()> {
        let few = rows.min(FEW_ROWS) * weight.cols().next_multiple_of(DEPTH);
        let many = if rows > FEW_ROWS || self.isa == Isa::Portable { packed_len(rows, weight.cols()) } else { 0 };
        self.sums.grow(few / SUM * 4)?;
        if self.dots.is_some() {
            let rows = if self.integer(weight) && !self.amx { rows } else { rows.min(FEW_ROWS) };
            self.quantized.grow(rows * (weight.cols() / BLOCK) * size_of::<Block>())?;
        }
        if self.amx {
            for scratch in &mut self.scratch {
                scratch.grow(amx::scratch(weight.cols()))?;
            }
        }
        self.packed.grow(few.max(many) * 4)
    }

    pub fn run(&mut self, threads: &mut ThreadPool, job: Linear<'_>) {
        let Linear { x, rows, weight, bias, out, .. } = &job;
        assert!(
            x.cols() >= weight.cols() && out.cols() >= weight.outs() && *rows <= x.rows() && *rows <= out.rows(),
            "a product of {rows} rows: {} × {} by {} × {} into {} × {}",
            x.rows(),
            x.cols(),
            weight.outs(),
            weight.cols(),
            out.rows(),
            out.cols()
        );
        assert!(bias.is_none_or(|b| b.as_slice().len() == weight.outs()), "a bias of another width");
        if *rows <= FEW_ROWS && self.isa != Isa::Portable || self.integer(weight) && !self.amx {
            self.few(threads, job);
        } else if self.amx {
            self.tiles(threads, job);
        } else {
            self.many(threads, job);
        }
    }

    fn few(&mut self, threads: &mut ThreadPool, job: Linear<'_>) {
        let Linear { x, rows, weight, bias, add, out } = job;
        let cols = weight.cols();
        let dots = self.dots.filter(|_| weight.segments().iter().any(|s| has_dots(s.dtype)));
        let blocks = cols / BLOCK;
        if dots.is_some() {
            self.quantize(threads, x, rows, blocks);
        }
        let quantized = SendPtr(self.quantized.bytes().as_ptr().cast::<Block>());
        let (mut base, mut stride) = (x.as_slice().as_ptr(), x.cols());
        if weight.segments().iter().any(|s| cols % group_k(s.dtype) != 0) {
            // Groups reach beyond the last column: a copy with zeros there.
            stride = cols.next_multiple_of(DEPTH);
            let padded = &mut self.packed.f32s_mut()[..rows * stride];
            for (r, padded) in padded.chunks_exact_mut(stride).enumerate() {
                padded[..cols].copy_from_slice(&x.row(r)[..cols]);
                padded[cols..].fill(0.0);
            }
            base = padded.as_ptr();
        }
        let sums_stride = cols / SUM;
        if dots.is_none() && weight.segments().iter().any(|s| group_k(s.dtype) >= SUM) {
            for (r, sums) in self.sums.f32s_mut().chunks_exact_mut(sums_stride).enumerate().take(rows) {
                for (sum, x) in sums.iter_mut().zip(x.row(r).as_chunks::<SUM>().0) {
                    *sum = x.iter().sum();
                }
            }
        }
        let sums = SendPtr(self.sums.f32s().as_ptr());
        let base = SendPtr(base);
        let out_stride = out.cols();
        let target = Shared::new(out.as_mut_slice());
        let bias = bias.map(Vector::as_slice);
        let isa = self.isa;
        let panels = weight.panels();
        threads.run(panels, grain(weight, threads.threads(), 1), &|_, range| {
            weight.for_panels(range, |segment, panels| {
                if let Some(dots) = dots.filter(|_| has_dots(segment.dtype)) {
                    let x = quantized.get();
                    let out = target.as_ptr();
                    let kernel = DotGemv { segment, panels, x, x_stride: blocks, rows, out, out_stride, bias, add };
                    // SAFETY: as below.
                    unsafe { dispatch_dot(dots, kernel) };
                    return;
                }
                let kernel = Gemv {
                    segment,
                    panels,
                    x: base.get(),
                    x_stride: stride,
                    sums: sums.get(),
                    sums_stride,
                    rows,
                    out: target.as_ptr(),
                    out_stride,
                    bias,
                    add,
                };
                // SAFETY: sizes were checked in `run`; panels of different
                // chunks write different features.
                unsafe { dispatch(isa, kernel) };
            });
        });
    }

    /// Quantises the first `blocks` blocks of `rows` rows.
    fn quantize(&mut self, threads: &mut ThreadPool, x: &Buffer, rows: usize, blocks: usize) {
        let isa = self.isa;
        let bytes = &mut self.quantized.bytes_mut()[..rows * blocks * size_of::<Block>()];
        let quantized = Shared::new(bytemuck::cast_slice_mut::<u8, Block>(bytes));
        threads.run(rows, (1 << 14) / (blocks * BLOCK) + 1, &|_, range| {
            for r in range {
                // SAFETY: row `r` is this chunk's.
                let out = unsafe { quantized.range(r * blocks..(r + 1) * blocks) };
                // SAFETY: the instruction set is available; see `Isa`.
                unsafe { dispatch(isa, Quantize { x: &x.row(r)[..blocks * BLOCK], out }) };
            }
        });
    }

    fn many(&mut self, threads: &mut ThreadPool, job: Linear<'_>) {
        let Linear { x, rows, weight, bias, add, out } = job;
        let cols = weight.cols();
        let isa = self.isa;
        let (tiles, depths) = (rows.div_ceil(TILE), cols.div_ceil(DEPTH));
        let packed = Shared::new(&mut self.packed.f32s_mut()[..packed_len(rows, cols)]);
        threads.run(tiles * depths, 4, &|_, range| {
            for i in range {
                let (depth, tile) = (i / tiles, i % tiles);
                let kernel = PackTile {
                    x: x.as_slice()[tile * TILE * x.cols() + depth * DEPTH..].as_ptr(),
                    x_stride: x.cols(),
                    rows: TILE.min(rows - tile * TILE),
                    cols: DEPTH.min(cols - depth * DEPTH),
                    // SAFETY: tile `i` is this chunk's.
                    out: unsafe { packed.range(i * TILE * DEPTH..(i + 1) * TILE * DEPTH) }.as_mut_ptr(),
                };
                // SAFETY: rows and columns exist; checked in `run`.
                unsafe { dispatch(isa, kernel) };
            }
        });
        let out_stride = out.cols();
        let target = Shared::new(out.as_mut_slice());
        let scratch = Shared::new(&mut self.scratch);
        let bias = bias.map(Vector::as_slice);
        let panels = weight.panels();
        threads.run(panels, grain(weight, threads.threads(), 8), &|thread, range| {
            // SAFETY: each thread of a fork has its own index.
            let scratch = unsafe { &mut scratch.range(thread..thread + 1)[0] };
            weight.for_panels(range, |segment, panels| {
                let kernel = Gemm {
                    segment,
                    panels,
                    x: packed.as_ptr(),
                    rows,
                    cols,
                    out: target.as_ptr(),
                    out_stride,
                    bias,
                    add,
                    scratch: scratch.f32s_mut().as_mut_ptr(),
                };
                // SAFETY: sizes were checked in `run`, and activations packed
                // above; panels of different chunks write different features.
                unsafe { dispatch(isa, kernel) };
            });
        });
    }
}

impl Products {
    /// As `many`, in bf16 on the matrix unit.
    fn tiles(&mut self, threads: &mut ThreadPool, job: Linear<'_>) {
        let Linear { x, rows, weight, bias, add, out } = job;
        let cols = weight.cols();
        let isa = self.isa;
        let tiles = rows.div_ceil(amx::TILE);
        let len = amx::packed_len(rows, cols);
        let packed: &mut [u16] = bytemuck::cast_slice_mut(&mut self.packed.bytes_mut()[..len * 2]);
        let packed = Shared::new(packed);
        threads.run(tiles, 1, &|_, range| {
            for tile in range {
                let kernel = amx::PackTile {
                    x: x.as_slice()[tile * amx::TILE * x.cols()..].as_ptr(),
                    x_stride: x.cols(),
                    rows: amx::TILE.min(rows - tile * amx::TILE),
                    cols,
                    // SAFETY: this tile is this chunk's.
                    out: unsafe { packed.range(len / tiles * tile..len / tiles * (tile + 1)) }.as_mut_ptr(),
                };
                // SAFETY: rows and columns exist; checked in `run`.
                unsafe { dispatch(isa, kernel) };
            }
        });
        let out_stride = out.cols();
        let target = Shared::new(out.as_mut_slice());
        let scratch = Shared::new(&mut self.scratch);
        let bias = bias.map(Vector::as_slice);
        threads.run(weight.panels(), grain(weight, threads.threads(), 8), &|thread, range| {
            // SAFETY: each thread of a fork has its own index.
            let scratch = unsafe { &mut scratch.range(thread..thread + 1)[0] };
            weight.for_panels(range, |segment, panels| {
                let kernel = AmxGemm {
                    segment,
                    panels,
                    x: packed.as_ptr(),
                    rows,
                    cols,
                    out: target.as_ptr(),
                    out_stride,
                    bias,
                    add,
                    scratch: scratch.bytes_mut().as_mut_ptr(),
                };
                // SAFETY: sizes were checked in `run`, scratch in `reserve`,
                // activations packed above, the tiles granted in `new`; panels
                // of different chunks write different features.
                unsafe { dispatch(isa, kernel) };
            });
        });
    }
}

/// Panels a thread claims at a time: few enough that all threads end together,
/// at most `most`.
fn grain(weight: &Matrix, threads: usize, most: usize) -> usize {
    let even = weight.panels() / (threads * 8);
    // A claim costs about as much as reading a kilobyte or two.
    let small = (16 << 10) / (weight.bytes() / weight.panels()).max(1);
    if most == 1 { even.max(small) } else { even.min(most) }.max(1)
}

/// A pointer that the threads of a fork share to read.
#[derive(Clone, Copy)]
pub(super) struct SendPtr<T>(pub *const T);

impl<T> SendPtr<T> {
    /// A method, so that closures capture the whole.
    pub fn get(self) -> *const T {
        self.0
    }
}

// SAFETY: only read while the fork's caller keeps what it points to.
unsafe impl<T: Sync> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for SendPtr<T> {}
