//! Linear layers with FP8 weights, which stay FP8 in the GPU's memory. Few rows go
//! to kernels of our own that widen them in registers; for many a matrix is widened
//! as a whole, into room that all matrices share, for the matrix library.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::api;
use super::buffer::{Buffer, Fp8Scales, Matrix, Vector};
use super::chain::End;
use super::driver::{Context, Stream};
use super::element::Element;
use super::kernels::{Grid, Kernel, Kernels};
use super::load::Loader;
use super::memory::{GpuMemory, Pinned};
use crate::device::tensor::{DType, RawTensor};
use crate::device::{DeviceError, Result, fp8};

/// Features and elements of `in` of a brick of packed weights (`cuda/fp8.cuh`).
const BRICK: (usize, usize) = (16, 64);
/// Elements of `in` that share a scale where a row has several, and to which `in` is
/// filled up.
const BLOCK: usize = 128;
/// Elements that the kernels take at once.
const RUN: usize = 16;

/// Rows of `linear_fp8_few`, its threads and bytes of shared memory.
const FEW: (usize, u32, u32) = (8, 256, 114_688);
/// Most bricks of a block of it, for each of its kernels.
const FEW_BRICKS: [usize; 2] = [4, 14];
/// Features of a block of `linear_fp8`.
const TILE: usize = 128;
/// Rows of `linear_fp8`, its threads and bytes of shared memory: with one scale a
/// row, and with several (`Size` in `cuda/linear_fp8.cu`).
const MORE: [[(usize, u32, u32); 2]; 2] =
    [[(16, 256, 115_200), (16, 256, 115_200)], [(32, 512, 197_632), (32, 256, 148_480)]];
/// Times that a kernel may run for the rows of one product: each time it reads a
/// byte a weight, and widening a matrix and multiplying then moves five.
const TIMES: usize = 3;

/// A kernel and how it is launched.
#[derive(Clone, Copy)]
struct Few {
    kernel: Kernel,
    rows: usize,
    threads: u32,
    /// Blocks that are resident at once.
    slots: usize,
}

/// The kernels, and the room for a widened matrix.
pub struct Fp8 {
    context: Arc<Context>,
    element: Element,
    /// By most bricks; with one scale a row and with several. None where the GPU has
    /// too little shared memory.
    few: [[Option<Few>; 2]; 2],
    /// By rows; likewise.
    more: [[Option<Few>; 2]; 2],
    widen: Kernel,
    scratch: Option<GpuMemory>,
    /// Set to 1 by a code that is no number.
    flag: GpuMemory,
}

impl Fp8 {
    /// Finds the kernels.
    pub fn new(context: &Arc<Context>, kernels: &Kernels, stream: &Stream, element: Element) -> Result<Self> {
        let find = |name: &str, several: usize, end: &str, (rows, threads, shared): (usize, u32, u32)| {
            if shared > context.properties().shared_memory {
                return Ok(None);
            }
            let blocks = if several == 1 { "_blocks" } else { "" };
            let kernel = kernels.typed(&format!("{name}{blocks}_{end}"), shared)?;
            let slots = (kernel.occupancy(threads)? * context.properties().multiprocessors) as usize;
            Ok::<_, DeviceError>(Some(Few { kernel, rows, threads, slots }))
        };
        let few = |bricks: usize, several| find("linear_fp8_few", several, &format!("b{bricks}"), FEW);
        let more = |i: usize, s: usize| find("linear_fp8", s, &format!("m{}", MORE[i][s].0), MORE[i][s]);
        let [a, b] = FEW_BRICKS;
        let flag = GpuMemory::new(context, 4, "weights")?;
        flag.fill(stream, 0)?;
        Ok(Self {
            context: context.clone(),
            element,
            few: [[few(a, 0)?, few(a, 1)?], [few(b, 0)?, few(b, 1)?]],
            more: [[more(0, 0)?, more(0, 1)?], [more(1, 0)?, more(1, 1)?]],
            widen: kernels.typed("widen_fp8", 0)?,
            scratch: None,
            flag,
        })
    }

    /// Whether any matrix is FP8.
    pub fn used(&self) -> bool {
        self.scratch.is_some()
    }

    /// Begins to load a matrix whose parts are all FP8.
    pub fn load(
        &mut self,
        loader: &mut Loader,
        stream: &Stream,
        kernels: &Kernels,
        parts: &[RawTensor<'_>],
    ) -> Result<Matrix> {
        let ins = parts.first().map_or(0, |p| p.cols);
        let outs = parts.iter().map(|p| p.rows).sum::<usize>();
        if !ins.is_multiple_of(RUN) || ins == 0 {
            let problem = format!("CUDA: FP8 weights of {ins} input features; a multiple of {RUN}");
            return Err(DeviceError::Unsupported(problem));
        }
        parts.iter().try_for_each(fp8::check_scales)?;
        self.reserve(outs * ins * self.element.size())?;
        let packed = outs.next_multiple_of(BRICK.0) * ins.next_multiple_of(BLOCK);
        let memory = Arc::new(GpuMemory::new(&self.context, packed, "weights")?);
        // What fills the last bricks up.
        memory.fill(stream, 0)?;
        let kernel = kernels.typed("pack_fp8", 0)?;
        let mut at = 0;
        for part in parts {
            loader.load_fp8(stream, kernel, part, &memory, at, self.flag.address())?;
            at += part.rows * part.cols;
        }
        let scales = self.load_scales(stream, parts, ins, outs)?;
        Ok(Matrix::new_fp8(memory, outs, ins, scales))
    }

    /// The parts' scales, one after another: for each run of `2^shift` features, as
    /// many as all parts' can share, one for all of `in` or for each [`BLOCK`].
    fn load_scales(&self, stream: &Stream, parts: &[RawTensor<'_>], ins: usize, outs: usize) -> Result<Fp8Scales> {
        let mut all = Vec::new();
        let (mut start, mut shift, mut several) = (0usize, 16, false);
        for part in parts {
            let Some(scales) = part.scales else { unreachable!("checked before") };
            let (rows, cols) = scales.block;
            several |= cols < ins;
            if cols < ins && cols != BLOCK {
                let problem = format!("CUDA: FP8 scales of {cols} input features; {BLOCK}, or all");
                return Err(DeviceError::Unsupported(problem));
            }
            shift = shift.min(start.trailing_zeros());
            if rows < part.rows {
                shift = shift.min(rows.trailing_zeros());
            }
            all.push((start, scales));
            start += part.rows;
        }
        let cols = if several { ins.div_ceil(BLOCK) } else { 1 };
        let mut values: Vec<f32> = Vec::new();
        for feature in (0..outs).step_by(1 << shift) {
            let found = all.iter().rev().find(|(start, _)| *start <= feature);
            let Some((start, scales)) = found else { unreachable!("the first starts at 0") };
            let row = scales.row(feature - start, ins);
            values.extend((0..cols).map(|block| row[block.min(row.len() - 1)]));
        }
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let mut staging = Pinned::new(&self.context, bytes.len())?;
        staging.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let memory = GpuMemory::new(&self.context, bytes.len(), "weights")?;
        memory.upload(stream, 0, &staging, 0..bytes.len())?;
        stream.synchronize()?;
        Ok(Fp8Scales { memory, shift, cols: cols as u32 })
    }

    /// Room for a widened matrix of so many bytes.
    fn reserve(&mut self, bytes: usize) -> Result<()> {
        if self.scratch.as_ref().is_none_or(|s| s.len() < bytes) {
            self.context.synchronize()?;
            self.scratch = None;
            self.scratch = Some(GpuMemory::new(&self.context, bytes, "a widened matrix")?);
        }
        Ok(())
    }

    /// Whether all codes that were loaded are numbers.
    pub fn check(&self, stream: &Stream) -> Result<()> {
        if !self.used() {
            return Ok(());
        }
        let mut found = Pinned::new(&self.context, 4)?;
        self.flag.download(stream, 0, &mut found, 0..4)?;
        stream.synchronize()?;
        match found.bytes()[..4] {
            [0, 0, 0, 0] => Ok(()),
            _ => Err(DeviceError::Unsupported("an FP8 weight that is not a number".into())),
        }
    }

    /// The kernel for the next of `rows` rows. Its rows may be fewer: it then runs
    /// again for the rest.
    fn kernel(&self, rows: usize, several: usize, bricks: usize) -> Option<Few> {
        if rows <= FEW.0 {
            let i = FEW_BRICKS.iter().position(|most| bricks <= *most)?;
            return self.few[i][several];
        }
        let [less, more] = [self.more[0][several], self.more[1][several]];
        if rows <= MORE[0][0].0 { less } else { more.or(less) }
    }

    /// Whether [`run`](Self::run) does a product.
    pub fn takes(&self, rows: usize, weight: &Matrix, x: &Buffer, end: End) -> bool {
        let Some(scales) = weight.fp8() else { return false };
        let bricks = self.bricks(weight, end);
        let reach = self.kernel(rows, usize::from(scales.cols > 1), bricks).map_or(0, |few| few.rows);
        let outs = if end == End::Swiglu { 2 * BRICK.0 } else { 1 };
        rows <= TIMES * reach && x.cols().is_multiple_of(8) && weight.outs().is_multiple_of(outs)
    }

    /// Bricks of a block of `linear_fp8_few`: as many as give each multiprocessor one
    /// block, or two, or more.
    fn bricks(&self, weight: &Matrix, end: End) -> usize {
        let together = if end == End::Swiglu { 2 } else { 1 };
        let all = weight.outs().div_ceil(BRICK.0 * together);
        let blocks = self.context.properties().multiprocessors as usize;
        let most = FEW_BRICKS[1] / together;
        let waves = all.div_ceil(blocks * most);
        all.div_ceil(blocks * waves.max(1)).max(1) * together
    }

    /// `out (+)= x · Wᵀ (+ bias)` of `rows` rows, as `end` says.
    pub fn run(
        &self,
        stream: &Stream,
        counts: u64,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        out: &Buffer,
        end: End,
    ) -> Result<()> {
        let Some(scales) = weight.fp8() else { unreachable!("as `takes` said") };
        assert!(x.unscaled.is_none(), "only the chain's kernel scales its input");
        let width = if end == End::Swiglu { weight.outs() / 2 } else { weight.outs() };
        assert!(out.cols() == width && bias.is_none_or(|b| b.len() == weight.outs()), "a product of its size");
        assert!(out.is_single() == matches!(end, End::Add | End::Logits), "sums are f32");
        let out_size = if out.is_single() { 4 } else { self.element.size() };
        let several = usize::from(scales.cols > 1);
        let bricks = self.bricks(weight, end);
        let mut first = 0;
        while first < rows {
            let Some(few) = self.kernel(rows - first, several, bricks) else { unreachable!("as `takes` said") };
            let (blocks, splits) = match few.rows <= FEW.0 {
                true => (weight.outs().div_ceil(BRICK.0).div_ceil(bricks), 1),
                false => {
                    // With SwiGLU a tile is half gate, half up.
                    let tiles = width.div_ceil(if end == End::Swiglu { TILE / 2 } else { TILE });
                    let splits = self.splits(few, tiles, weight.ins());
                    (tiles * splits, splits)
                }
            };
            let arguments = api::LinearFp8 {
                weights: weight.address(),
                scales: scales.memory.address(),
                x: x.address() + (first * x.cols() * self.element.size()) as u64,
                bias: bias.map_or(0, Vector::address),
                out: out.address() + (first * width * out_size) as u64,
                rows: counts,
                first: first as u32,
                x_stride: x.cols() as u32,
                in_features: weight.ins() as u32,
                out_features: weight.outs() as u32,
                scale_shift: scales.shift,
                scale_cols: scales.cols,
                end: end as u32,
                splits: splits as u32,
                bricks: bricks as u32,
                reserved: 0,
            };
            let grid = Grid { blocks: (blocks as u32, 1, 1), threads: few.threads, cluster: splits as u32 };
            // SAFETY: the matrix is of these features, packed; x and out have `rows`
            // rows (the caller has checked), of which the kernel takes those in use.
            unsafe { few.kernel.overlap(stream, grid, &arguments)? };
            first += few.rows;
        }
        Ok(())
    }

    /// Blocks that share a tile: as many as make a wave, but for what their meeting
    /// costs. Before Hopper none can, and later ones run code that was made before.
    fn splits(&self, few: Few, tiles: usize, ins: usize) -> usize {
        if self.context.properties().capability != (9, 0) {
            return 1;
        }
        let most = if few.rows > MORE[0][0].0 { 2 } else { 4 };
        let fits = |splits: &usize| tiles * splits <= few.slots && *splits <= ins.div_ceil(BLOCK);
        [4, 2].into_iter().filter(|s| *s <= most).find(fits).unwrap_or(1)
    }

    /// The address of a matrix in the working precision: its own, or that of the room
    /// into which it is widened.
    pub fn wide(&self, stream: &Stream, weight: &Matrix) -> Result<u64> {
        let Some(scales) = weight.fp8() else { return Ok(weight.address()) };
        let Some(scratch) = &self.scratch else { unreachable!("made when the matrix was loaded") };
        self.widen_into(stream, weight, scales, scratch, 0)?;
        Ok(scratch.address())
    }

    /// Writes a matrix in the working precision to element `at` of `out`.
    fn widen_into(
        &self,
        stream: &Stream,
        weight: &Matrix,
        scales: &Fp8Scales,
        out: &GpuMemory,
        at: usize,
    ) -> Result<()> {
        let size = self.element.size();
        assert!((at + weight.outs() * weight.ins()) * size <= out.len(), "room for a widened matrix");
        let arguments = api::WidenFp8 {
            weights: weight.address(),
            scales: scales.memory.address(),
            out: out.address() + (at * size) as u64,
            in_features: weight.ins() as u32,
            out_features: weight.outs() as u32,
            scale_shift: scales.shift,
            scale_cols: scales.cols,
        };
        let elements = weight.outs().next_multiple_of(BRICK.0) * weight.ins().next_multiple_of(BLOCK);
        let grid = Grid::new(elements.div_ceil(256 * RUN).min(8192), 256);
        // SAFETY: the matrix is of these features, and `out` has room for it.
        unsafe { self.widen.overlap(stream, grid, &arguments) }
    }

    /// Loads the FP8 part of a matrix that has others too, in the working precision,
    /// to element `at` of `out`.
    pub fn load_widened(
        &mut self,
        loader: &mut Loader,
        stream: &Stream,
        kernels: &Kernels,
        part: &RawTensor<'_>,
        out: &GpuMemory,
        at: usize,
    ) -> Result<()> {
        let matrix = self.load(loader, stream, kernels, std::slice::from_ref(part))?;
        loader.settle(stream)?;
        if let Some(scales) = matrix.fp8() {
            self.widen_into(stream, &matrix, scales, out, at)?;
        }
        // The matrix goes when this returns.
        stream.synchronize()
    }
}

/// Whether a part is FP8.
pub fn is_fp8(part: &RawTensor<'_>) -> bool {
    part.dtype == DType::F8E4m3
}
