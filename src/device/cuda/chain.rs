//! Linear layers of few rows: a kernel of our own that runs up to four of them
//! one after another in one launch, each made from the one before, the weights of
//! the next on their way before the last is done. They are queued here until
//! something else is to be launched that may read what they write.

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
/// What is left of it, by bucket: with few rows a block of the attention before or
/// behind (`cuda/decode_short.cu`) runs beside, with more the ring needs all.
const LEFT: [u32; BUCKETS.len()] = [9 << 10, 0, 0];
/// Up to so many rows are handed on without a fence: with more, what has to be copied
/// again costs as much (8 rows on an H200: 3% of a step).
const LOOKED_AT: usize = 2;
/// Bytes of a launch's weights below which they are handed on behind one all the same:
/// the memory is idle when it comes, and looking at rows takes longer. (On an H200:
/// launches of 436 MB are faster without, of 122 MB with.)
pub const FENCED_BELOW: u64 = 200_000_000;
/// Stages of the ring, most.
const STAGES: u32 = 16;
/// Bytes of a brick, the unit of the weights: 32 features x 64 input features.
const BRICK: u32 = 4096;
/// Bytes of a relay before its halves.
const RELAY_HEAD: usize = 128;
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
    x: TensorMap,
    handed: [[TensorMap; MOST - 1]; 2],
    product: [api::Linear; MOST],
    chain: api::LinearChain,
}

const _: () = assert!(
    std::mem::offset_of!(Arguments, x) == 512
        && std::mem::offset_of!(Arguments, handed) == 640
        && std::mem::offset_of!(Arguments, product) == 1408
        && std::mem::offset_of!(Arguments, chain) == 1760
        && size_of::<Arguments>() == 1792
);

#[derive(Clone, Copy)]
struct Queued {
    weights: TensorMap,
    /// Where its input lies, unless it is handed on, and elements of a row there.
    x: u64,
    pitch: u64,
    product: api::Linear,
    cut: Cut,
}

/// What products of a launch hand rows on through: see `cuda/linear_relay.cuh`.
struct Relay {
    memory: GpuMemory,
    /// Bytes of each of its halves.
    half: usize,
}

impl Relay {
    fn new(context: &Arc<Context>, stream: &Stream, half: usize) -> Result<Self> {
        let memory = GpuMemory::new(context, RELAY_HEAD + 2 * half, "linear layers")?;
        memory.fill(stream, 0xff)?;
        memory.fill_range(stream, 0..RELAY_HEAD, 0)?;
        Ok(Self { memory, half })
    }
}

/// The queue and its kernels.
pub struct Chain {
    context: Arc<Context>,
    element: Element,
    /// By bucket.
    kernels: [Kernel; BUCKETS.len()],
    /// Clusters that are resident at once, by bucket: the kernel's blocks wait for
    /// each other.
    clusters: [u32; BUCKETS.len()],
    /// Bytes a second that weights are asked for; 0: as they come up.
    pace: f64,
    /// By bucket, the last the one in use: recorded launches know those before it.
    relays: [Vec<Relay>; BUCKETS.len()],
    queue: Vec<Queued>,
    bucket: usize,
    /// Rows of what is queued.
    rows: usize,
    /// Bytes of a launch's weights: see [`FENCED_BELOW`].
    fenced_below: u64,
}

impl Chain {
    /// `None` where the GPU is no Hopper.
    pub fn new(context: &Arc<Context>, kernels: &Kernels, element: Element, fenced_below: u64) -> Result<Option<Self>> {
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
        let pace = PACE * context.properties().memory_bandwidth as f64;
        let (context, queue) = (context.clone(), Vec::with_capacity(MOST));
        Ok(Some(Self {
            context,
            element,
            kernels,
            clusters,
            pace,
            relays: Default::default(),
            queue,
            bucket: 0,
            rows: 0,
            fenced_below,
        }))
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
        let follows = self.queue.last().is_some_and(|last| last.feeds(x.address(), weight.ins()));
        if self.queue.len() == MOST || bucket != self.bucket || rows != self.rows || !follows {
            self.flush(stream)?;
        }
        (self.bucket, self.rows) = (bucket, rows);
        let (outs, ins, size) = (weight.outs() as u64, weight.ins() as u64, self.element.size() as u64);
        let most = BUCKETS[bucket];
        // Who adds to a feature reads what he wrote, not what another block did.
        let same = self.queue.iter().find(|q| q.product.out == out.address()).map(|q| q.cut);
        let mut cut = Cut::new(weight, most, end, self.clusters[bucket], same);
        if cut.is_none() {
            self.flush(stream)?;
            cut = Cut::new(weight, most, end, self.clusters[bucket], None);
        }
        let cut = cut.expect("a brick at a time is a cut");
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
        let weights = TensorMap::new(self.element, &weights)?;
        self.queue.push(Queued { weights, x: x.address(), pitch: x.cols() as u64, product, cut });
        Ok(())
    }

    /// Launches what is queued.
    pub fn flush(&mut self, stream: &Stream) -> Result<()> {
        let Some(first) = self.queue.first().copied() else { return Ok(()) };
        let rows = BUCKETS[self.bucket] as u32;
        let most = |f: fn(&Cut, u32) -> u32| self.queue.iter().map(|q| f(&q.cut, rows)).max().unwrap_or(0);
        let (stage, sums) = (most(Cut::stage), most(Cut::sums));
        let stages = ((SHARED - LEFT[self.bucket] - 1024 - sums) / stage).min(STAGES);
        let size = self.element.size();
        let handed =
            |q: &Queued| rows as usize * (q.product.in_features as usize * size + q.product.in_features as usize / 8);
        let weights = |q: &Queued| u64::from(q.product.in_features) * u64::from(q.product.out_features) * size as u64;
        let fenced = self.rows > LOOKED_AT || self.queue.iter().map(weights).sum::<u64>() < self.fenced_below;
        // Behind fences the relay only counts.
        let half = if fenced { 0 } else { self.queue.iter().skip(1).map(handed).sum::<usize>() };
        let relays = &mut self.relays[self.bucket];
        if relays.last().is_none_or(|relay| half > relay.half) {
            relays.push(Relay::new(&self.context, stream, half)?);
        }
        let relay = relays.last().expect("made above");
        let x = first.input(self.element, rows, first.x, first.pitch)?;
        let mut arguments = Arguments {
            weights: [first.weights; MOST],
            x,
            handed: [[x; MOST - 1]; 2],
            product: [first.product; MOST],
            chain: api::LinearChain {
                relay: relay.memory.address(),
                count: self.queue.len() as u32,
                stages,
                stage,
                half: relay.half as u32,
                fenced: fenced.into(),
                reserved: 0,
            },
        };
        let mut at = relay.memory.address() + RELAY_HEAD as u64;
        for (i, queued) in self.queue.drain(..).enumerate() {
            (arguments.weights[i], arguments.product[i]) = (queued.weights, queued.product);
            if i > 0 && fenced {
                let map = queued.input(self.element, rows, queued.x, queued.pitch)?;
                arguments.handed.iter_mut().for_each(|maps| maps[i - 1] = map);
            } else if i > 0 {
                for (half, maps) in arguments.handed.iter_mut().enumerate() {
                    let pitch = u64::from(queued.product.in_features);
                    maps[i - 1] = queued.input(self.element, rows, at + (half * relay.half) as u64, pitch)?;
                }
                at += handed(&queued) as u64;
            }
        }
        let grid = Grid { blocks: (self.clusters[self.bucket] * CLUSTER, 1, 1), threads: THREADS, cluster: CLUSTER };
        let kernel = self.kernels[self.bucket].with_shared(1024 + stages * stage + sums);
        // SAFETY: what was queued names buffers with room for the bucket's rows
        // (`takes`) and matrices of the features given, each made from the one before
        // (`feeds`); all blocks are resident at once, as `clusters` is what the device
        // holds; the relay has room.
        unsafe { kernel.overlap_raw(stream, grid, (&raw const arguments).cast()) }
    }
}

impl Queued {
    /// Whether the product hands what is at this address, of so many features, to the
    /// next.
    fn feeds(&self, x: u64, ins: usize) -> bool {
        let p = &self.product;
        match p.end {
            end if end == End::Swiglu as u32 => p.out == x && p.out_features as usize / 2 == ins,
            end if end == End::Add as u32 => p.next == x && p.out_features as usize == ins,
            _ => false,
        }
    }

    /// Its input at an address, a stage at a time.
    fn input(&self, element: Element, rows: u32, address: u64, pitch: u64) -> Result<TensorMap> {
        let size = element.size() as u64;
        let tensor = Tensor {
            address,
            dims: &[64, u64::from(rows), u64::from(self.product.in_features) / 64],
            strides: &[pitch * size, 64 * size],
            piece: &[64, rows, self.cut.depth],
            swizzle: Swizzle::Bytes128,
            promotion: 128,
        };
        TensorMap::new(element, &tensor)
    }
}

impl Cut {
    /// The cut with which the busiest block has done soonest, by what was measured
    /// on an H200; with `same`, of those with its tiles and splits.
    fn new(weight: &Matrix, rows: usize, end: End, clusters: u32, same: Option<Self>) -> Option<Self> {
        /// Bytes a microsecond that a block is given by the memory.
        const RATE: f64 = 34_000.0;
        /// What an x is of, as to the time that it takes: it comes from the cache, but
        /// takes room in the ring.
        const ROWS: f64 = 0.6;
        /// Microseconds: a stage at least, a tile's end, with a cluster's meeting.
        const STAGE: f64 = 0.2;
        const TILE: [f64; 2] = [1.0, 0.7];
        let units = if end == End::Swiglu { weight.outs() / 32 } else { weight.outs().div_ceil(32) };
        let places = weight.ins() / 64;
        let mut best: Option<(f64, Self)> = None;
        for (splits, tile_end) in [1, CLUSTER as usize].into_iter().zip(TILE) {
            let blocks = if splits == 1 { (clusters * CLUSTER) as usize } else { clusters as usize };
            for tile_units in 1..=8usize {
                if same.is_some_and(|s| (s.tile_units as usize, s.splits as usize) != (tile_units, splits)) {
                    continue;
                }
                // Memory is read in order within a place's 128 bytes, times the depth.
                for (depth, slower) in [(1usize, 1.3), (2, 1.17), (4, 1.0), (8, 1.02)] {
                    let stages = places.div_ceil(depth);
                    if tile_units * depth > 8 || stages < splits {
                        continue;
                    }
                    let (stages, passes) = (stages.div_ceil(splits), units.div_ceil(tile_units).div_ceil(blocks));
                    let bytes = (tile_units * depth) as f64 * f64::from(BRICK);
                    let stage = (bytes * slower + ROWS * (depth * rows * 128) as f64) / RATE;
                    // Half a stage more until the first is there.
                    let cost = passes as f64 * (stages as f64 * stage.max(STAGE) + tile_end) + bytes / RATE / 2.0;
                    if best.is_none_or(|(least, _)| cost < least) {
                        let share = (passes * stages * tile_units * depth) as u32 * (BRICK / 1024);
                        let (tile_units, depth, splits) = (tile_units as u32, depth as u32, splits as u32);
                        best = Some((cost, Self { tile_units, depth, splits, share }));
                    }
                }
            }
        }
        best.map(|(_, cut)| cut)
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
