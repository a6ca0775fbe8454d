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
const THREADS: u32 = 352;
/// Blocks of a cluster, which may share the input features of a product.
const CLUSTER: u32 = 2;
/// Shared memory of a block: all of a multiprocessor.
const SHARED: u32 = 232_448;
/// Stages of the ring, most.
const STAGES: u32 = 16;
/// Bytes of a brick, the unit of the weights: 32 features x 64 input features.
const BRICK: u32 = 4096;
/// Weights are asked for at this share of what the memory's clock and width give: a
/// little more than it delivers (0.92 to 0.94, an H200).
const PACE: f64 = 0.955;

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

/// How a product is cut up: see `cuda/api.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    tile_units: u32,
    depth: u32,
    splits: u32,
    /// KiB of weights that the busiest block is given.
    share: u32,
}

/// What the kernel takes: see `cuda/linear.cuh`.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Arguments {
    weights: [TensorMap; MOST],
    x: [TensorMap; MOST],
    product: [api::Linear; MOST],
    chain: api::LinearChain,
}

const _: () = assert!(
    std::mem::offset_of!(Arguments, x) == 512
        && std::mem::offset_of!(Arguments, product) == 1024
        && std::mem::offset_of!(Arguments, chain) == 1376
        && size_of::<Arguments>() == 1408
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
    /// Bytes a second that weights are asked for; 0: as they come up.
    pace: f64,
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
        let pace = PACE * context.properties().memory_bandwidth as f64;
        Ok(Some(Self { element, kernels, clusters, pace, barrier, queue: Vec::with_capacity(MOST), bucket: 0 }))
    }

    /// Rows that a buffer needs room for, for its `rows` to be taken.
    pub fn room(rows: usize) -> usize {
        BUCKETS.into_iter().find(|&bucket| rows <= bucket).unwrap_or(rows)
    }

    /// Whether a product can be queued.
    pub fn takes(&self, rows: usize, weight: &Matrix, x: &Buffer, end: End) -> bool {
        let outs = if end == End::Swiglu { 32 } else { 4 };
        rows <= FEW_ROWS
            && weight.ins().is_multiple_of(64)
            && weight.outs().is_multiple_of(outs)
            && x.rows() >= Self::room(rows)
    }

    /// Queues `out (+)= x · Wᵀ (+ bias)` of `rows` rows, as `end` says; with a
    /// norm, the norm of the sum goes to its buffer, not yet scaled: the sum's
    /// features are then a multiple of 64.
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
        let most = BUCKETS[bucket];
        let cut = Cut::new(weight, most, end, self.clusters[bucket]);
        let (wide, places) = (ins * size, ins / 64);
        let (dims, strides, piece): (&[u64], &[u64], &[u32]) = match end {
            // Gate features and the up features that belong to them.
            End::Swiglu => (
                &[64, 16, 2, outs / 32, places],
                &[wide, outs / 2 * wide, 16 * wide, 64 * size],
                &[64, 16, 2, cut.tile_units, cut.depth],
            ),
            _ => (&[64, outs, places], &[wide, 64 * size], &[64, 32 * cut.tile_units, cut.depth]),
        };
        let (swizzle, promotion) = (Swizzle::Bytes128, 128);
        let weights = Tensor { address: weight.address(), dims, strides, piece, swizzle, promotion };
        let input = Tensor {
            address: x.address(),
            dims: &[64, most as u64, places],
            strides: &[x.cols() as u64 * size, 64 * size],
            piece: &[64, most as u32, cut.depth],
            swizzle,
            promotion,
        };
        let total = (ins * outs * size) as f64;
        let pace = if self.pace > 0.0 { total / self.pace / f64::from(cut.share) * 1e12 } else { 0.0 };
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
            pace: pace as u32,
        };
        let (weights, x) = (TensorMap::new(self.element, &weights)?, TensorMap::new(self.element, &input)?);
        self.queue.push(Queued { weights, x, product, cut });
        Ok(())
    }

    /// Launches what is queued.
    pub fn flush(&mut self, stream: &Stream) -> Result<()> {
        let Some(first) = self.queue.first().copied() else { return Ok(()) };
        let rows = BUCKETS[self.bucket] as u32;
        let most = |f: fn(&Cut, u32) -> u32| self.queue.iter().map(|q| f(&q.cut, rows)).max().unwrap_or(0);
        let (stage, sums) = (most(Cut::stage), most(Cut::sums));
        let stages = ((SHARED - 1024 - sums) / stage).min(STAGES);
        let mut arguments = Arguments {
            weights: [first.weights; MOST],
            x: [first.x; MOST],
            product: [first.product; MOST],
            chain: api::LinearChain {
                barrier: self.barrier.address(),
                count: self.queue.len() as u32,
                stages,
                stage,
                reserved: 0,
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
    /// The cut with which the busiest block has done soonest, by what was measured
    /// on an H200.
    fn new(weight: &Matrix, rows: usize, end: End, clusters: u32) -> Self {
        /// Bytes a microsecond that a block is given by the memory.
        const RATE: f64 = 34_000.0;
        /// What an x is of, as to the time that it takes: it comes from the cache.
        const ROWS: f64 = 0.3;
        /// Microseconds: a stage at least, a tile's end, with a cluster's meeting.
        const STAGE: f64 = 0.2;
        const TILE: [f64; 2] = [0.3, 0.35];
        let units = if end == End::Swiglu { weight.outs() / 32 } else { weight.outs().div_ceil(32) };
        let places = weight.ins() / 64;
        let mut best = (f64::INFINITY, Self { tile_units: 1, depth: 1, splits: 1, share: 1 });
        for (splits, tile_end) in [1, CLUSTER as usize].into_iter().zip(TILE) {
            let blocks = if splits == 1 { (clusters * CLUSTER) as usize } else { clusters as usize };
            for tile_units in 1..=8usize {
                // Memory is read in order within a place's 128 bytes, times the depth.
                for (depth, slower) in [(1usize, 1.16), (2, 1.05), (4, 1.0), (8, 1.0)] {
                    let stages = places.div_ceil(depth);
                    if tile_units * depth > 8 || stages < splits {
                        continue;
                    }
                    let (stages, passes) = (stages.div_ceil(splits), units.div_ceil(tile_units).div_ceil(blocks));
                    let bytes = (tile_units * depth) as f64 * f64::from(BRICK);
                    let stage = (bytes * slower + ROWS * (depth * rows * 128) as f64) / RATE;
                    // Half a stage more until the first is there.
                    let cost = passes as f64 * (stages as f64 * stage.max(STAGE) + tile_end) + bytes / RATE / 2.0;
                    if cost < best.0 {
                        let share = (passes * stages * tile_units * depth) as u32 * (BRICK / 1024);
                        let (tile_units, depth, splits) = (tile_units as u32, depth as u32, splits as u32);
                        best = (cost, Self { tile_units, depth, splits, share });
                    }
                }
            }
        }
        best.1
    }

    /// Bytes of shared memory that a stage takes.
    fn stage(&self, rows: u32) -> u32 {
        self.depth * (self.tile_units * BRICK + rows * 128)
    }

    /// Bytes of shared memory for sums, and at least what is multiplied of a
    /// stage's last brick without being in the tile.
    fn sums(&self, rows: u32) -> u32 {
        (self.depth.min(2) * rows * (self.tile_units * 32 + 4) * 4).max(BRICK)
    }
}
