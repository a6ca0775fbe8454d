//! Linear layers of few rows: a kernel of our own that runs up to four of them
//! one after another in one launch, the weights of the next on their way before
//! the last is done. They are queued here until something else is to be launched
//! that may read what they write.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::api;
use super::buffer::{Buffer, FEW_ROWS, Matrix, Vector};
use super::driver::{Context, Stream};
use super::element::Element;
use super::kernels::{Grid, Kernel, Kernels, Swizzle, Tensor, TensorMap};
use super::memory::GpuMemory;
use crate::device::{Norm, Result};

/// Rows that the kernel exists for: with more the matrix library is faster.
const BUCKETS: [usize; 3] = [8, 16, FEW_ROWS];
/// Products of a launch.
const MOST: usize = 4;
/// Threads of a block.
const THREADS: u32 = 320;
/// Blocks of a cluster, which may share the input features of a product.
const CLUSTER: u32 = 2;
/// Shared memory of a block: all of a multiprocessor.
const SHARED: u32 = 232_448;
/// Stages of the ring, most.
const STAGES: u32 = 16;

/// What becomes of a product; the numbers are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Stored in the working precision.
    Plain = 0,
    /// Gate and up features become activations.
    Swiglu = 1,
    /// Added to what is there, in f32.
    Add = 2,
    /// Stored in f32.
    Logits = 3,
}

/// How a product is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    tile_units: u32,
    depth: u32,
    splits: u32,
}

/// What the kernel takes: see `cuda/linear.cuh`.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Arguments {
    weights: [TensorMap; MOST + 1],
    x: [TensorMap; MOST],
    product: [api::Linear; MOST + 1],
    chain: api::LinearChain,
}

const _: () = assert!(
    std::mem::offset_of!(Arguments, x) == 640
        && std::mem::offset_of!(Arguments, product) == 1152
        && std::mem::offset_of!(Arguments, chain) == 1592
        && size_of::<Arguments>() == 1664
);

#[derive(Clone, Copy)]
struct Queued {
    weights: TensorMap,
    x: TensorMap,
    product: api::Linear,
    cut: Cut,
}

/// The queue and its kernels.
pub struct Chain {
    element: Element,
    /// By bucket.
    kernels: [Kernel; BUCKETS.len()],
    /// Clusters that are resident at once, by bucket: the kernel's blocks wait for
    /// each other.
    clusters: [u32; BUCKETS.len()],
    barrier: GpuMemory,
    queue: Vec<Queued>,
    bucket: usize,
}

impl Chain {
    /// `None` where the GPU is no Hopper.
    pub fn new(context: &Arc<Context>, kernels: &Kernels, stream: &Stream, element: Element) -> Result<Option<Self>> {
        if context.properties().capability != (9, 0) {
            return Ok(None);
        }
        let kernel = |rows| kernels.typed(&format!("linear_m{rows}"), SHARED);
        let [a, b, c] = BUCKETS;
        let kernels = [kernel(a)?, kernel(b)?, kernel(c)?];
        let mut clusters = [0; BUCKETS.len()];
        for (clusters, kernel) in clusters.iter_mut().zip(kernels) {
            *clusters = kernel.clusters(THREADS, CLUSTER)?;
        }
        let barrier = GpuMemory::new(context, 4, "linear layers")?;
        barrier.fill(stream, 0)?;
        Ok(Some(Self { element, kernels, clusters, barrier, queue: Vec::with_capacity(MOST), bucket: 0 }))
    }

    /// Rows that a buffer needs room for, for its `rows` to be taken.
    pub fn room(rows: usize) -> usize {
        BUCKETS.into_iter().find(|&bucket| rows <= bucket).unwrap_or(rows)
    }

    /// Whether a product can be queued.
    pub fn takes(&self, rows: usize, weight: &Matrix, x: &Buffer, end: End) -> bool {
        let outs = if end == End::Swiglu { 32 } else { 4 };
        rows <= FEW_ROWS
            && weight.ins().is_multiple_of(8)
            && weight.outs().is_multiple_of(outs)
            && x.rows() >= Self::room(rows)
    }

    /// Queues `out (+)= x · Wᵀ (+ bias)` of `rows` rows, as `end` says; with a
    /// norm, the norm of the sum goes to its buffer, not yet scaled.
    pub fn push(
        &mut self,
        stream: &Stream,
        counts: u64,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        out: &Buffer,
        end: End,
        next: Option<(Norm<'_, Vector>, &Buffer)>,
    ) -> Result<()> {
        let bucket = BUCKETS.iter().position(|&most| rows <= most).expect("few rows, as `takes` said");
        if self.queue.len() == MOST || (bucket != self.bucket && !self.queue.is_empty()) {
            self.flush(stream)?;
        }
        self.bucket = bucket;
        let (outs, ins, size) = (weight.outs() as u64, weight.ins() as u64, self.element.size() as u64);
        let weights = Tensor {
            address: weight.address(),
            dims: &[ins, outs],
            strides: &[ins * size],
            piece: &[64, if end == End::Swiglu { 16 } else { 32 }],
            swizzle: Swizzle::Bytes128,
            promotion: 256,
        };
        let most = BUCKETS[bucket];
        let input = Tensor {
            address: x.address(),
            dims: &[ins, most as u64],
            strides: &[x.cols() as u64 * size],
            piece: &[64, most as u32],
            swizzle: Swizzle::Bytes128,
            promotion: 128,
        };
        let cut = Cut::new(weight, most, end, self.clusters[bucket]);
        let product = api::Linear {
            x_squares: if x.unscaled.is_some() { x.squares() } else { 0 },
            bias: bias.map_or(0, Vector::address),
            out: out.address(),
            next: next.map_or(0, |(_, normed)| normed.address()),
            next_norm: next.map_or(0, |(norm, _)| norm.weight.address()),
            squares: next.map_or(0, |(_, normed)| normed.squares()),
            rows: counts,
            in_features: ins as u32,
            out_features: outs as u32,
            end: end as u32,
            tile_units: cut.tile_units,
            depth: cut.depth,
            splits: cut.splits,
            eps: x.unscaled.unwrap_or(0.0),
            reserved: 0,
        };
        let (weights, x) = (TensorMap::new(self.element, &weights)?, TensorMap::new(self.element, &input)?);
        self.queue.push(Queued { weights, x, product, cut });
        Ok(())
    }

    /// Launches what is queued.
    pub fn flush(&mut self, stream: &Stream) -> Result<()> {
        let Some(first) = self.queue.first().copied() else { return Ok(()) };
        let rows = BUCKETS[self.bucket] as u32;
        let depth = self.queue.iter().map(|q| q.cut.depth).max().unwrap_or(1);
        let stage = 32_768 + depth * rows * 128;
        let sums = |q: &Queued| q.cut.depth.min(2) * rows * (q.cut.tile_units * 32 + 4) * 4;
        let sums = self.queue.iter().map(sums).max().unwrap_or(0);
        let stages = ((SHARED - 1024 - sums) / stage).min(STAGES);
        let mut arguments = Arguments {
            weights: [first.weights; MOST + 1],
            x: [first.x; MOST],
            product: [first.product; MOST + 1],
            chain: api::LinearChain {
                barrier: self.barrier.address(),
                count: self.queue.len() as u32,
                stages,
                stage_depth: depth,
                ahead: 0,
            },
        };
        for (i, queued) in self.queue.drain(..).enumerate() {
            (arguments.weights[i], arguments.x[i], arguments.product[i]) = (queued.weights, queued.x, queued.product);
        }
        let grid = Grid { blocks: (self.clusters[self.bucket] * CLUSTER, 1, 1), threads: THREADS, cluster: CLUSTER };
        let kernel = self.kernels[self.bucket].with_shared(1024 + stages * stage + sums);
        // SAFETY: what was queued names buffers with room for the bucket's rows
        // (`takes`) and matrices of the features given; all blocks are resident at
        // once, as `clusters` is what the device holds.
        unsafe { kernel.overlap_raw(stream, grid, (&raw const arguments).cast()) }
    }
}

impl Cut {
    /// The cut with which the busiest block moves the fewest bytes.
    fn new(weight: &Matrix, rows: usize, end: End, clusters: u32) -> Self {
        let units = if end == End::Swiglu { weight.outs() / 32 } else { weight.outs().div_ceil(32) };
        let places = weight.ins().div_ceil(64);
        let deepest = match rows {
            8 => 8,
            16 => 4,
            _ => 2,
        };
        let mut best = (f64::INFINITY, Self { tile_units: 1, depth: 1, splits: 1 });
        for splits in [1, CLUSTER as usize] {
            let blocks = if splits == 1 { (clusters * CLUSTER) as usize } else { clusters as usize };
            for tile_units in 1..=8usize {
                let share = places.div_ceil(splits);
                let depth = (8 / tile_units).min(deepest).min(share).max(1);
                let passes = units.div_ceil(tile_units).div_ceil(blocks) as f64;
                let bytes = passes * share as f64 * (tile_units as f64 * 4096.0 + 0.4 * rows as f64 * 128.0);
                let fixed = passes * if splits == 1 { 3000.0 } else { 6000.0 };
                let cost = bytes + fixed + (8 - tile_units * depth) as f64 * 1500.0;
                if cost < best.0 {
                    let cut = Self { tile_units: tile_units as u32, depth: depth as u32, splits: splits as u32 };
                    best = (cost, cut);
                }
            }
        }
        best.1
    }
}
