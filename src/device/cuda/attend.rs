//! MicroAttention on the GPU: a plan a step, then a launch or two a layer.
//!
//! A sequence with few rows is decoded: its KV is cut into equal shares for the
//! multiprocessors, and the shares' partials are joined by a second kernel.
//! Any other is prefilled, tile by tile of its queries. Which is which, the
//! planners on the device and [`Taken`] on the host decide by the same rule.
//! Heads of a width that those kernels do not know go through a plain one.
//!
//! Decoding begins to read KV while the launch before it still runs. Of the KV
//! that a sequence of the step reads, that launch may therefore write only the
//! step's own rows of the same sequence: a block that several sequences share
//! is complete before a step begins (as [`PrefixCache`] has it).
//!
//! [`PrefixCache`]: crate::kv::prefix::PrefixCache

#![allow(unsafe_code)]

use std::sync::Arc;

use super::api;
use super::buffer::Buffer;
use super::driver::{Context, Stream};
use super::element::Element;
use super::kernels::{Grid, Kernel, Kernels, Swizzle, Tensor, TensorMap};
use super::memory::GpuMemory;
use super::rows::Turned;
use super::short::{Shares, Short, ShortStep};
use super::step::{Addresses, Taken};
use super::tiles::{Tile, Unit};
use super::widen::Widened;
use crate::device::{AttentionShape, DeviceError, Result};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvShape};

/// Widths of heads for which there are tensor-core kernels.
const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];
/// Widest group of query heads a KV head that one tile of the decode kernel takes.
const MAX_GROUP: usize = super::DECODE_TILE;
/// Columns (query rows times heads of a group) of the narrow decode kernel.
const NARROW: usize = 8;
/// Shared memory that the decode kernel leaves, in bytes: the block of the join
/// that stands by beside it has its own.
const JOIN_ROOM: u32 = 16 << 10;
/// Blocks' shares are at least this many units.
const LEAST_UNITS: u32 = 1;

/// What the planners wrote for the layers of one window.
struct Plan {
    window: u32,
    /// Of this step.
    fresh: bool,
    items: GpuMemory,
    spans: GpuMemory,
    cuts: GpuMemory,
    prefill: GpuMemory,
}

/// The kernels for one pool and one shape of heads.
struct Fit {
    shape: AttentionShape,
    kv: KvShape,
    pool: u64,
    blocks: u32,
    kernels: Fast,
    short: Option<Short>,
}

enum Fast {
    /// Tensor cores.
    Tiled(Box<Tiled>),
    /// One warp a row and head.
    Plain(Kernel),
}

struct Tiled {
    decode: Kernel,
    /// The same for up to [`NARROW`] columns a sequence.
    narrow: Kernel,
    join: Kernel,
    unit: Unit,
    slots: u32,
    /// The pool as the copy engine of Hopper sees it; in the device's memory.
    decode_map: Option<GpuMemory>,
    prefill: Kernel,
    /// Likewise, a layer each.
    prefill_maps: Vec<TensorMap>,
    /// Where keys are widened before the products.
    widened: Option<Widened>,
    prefill_grid: Grid,
    tile_rows: u32,
    tile_keys: u32,
    parts: GpuMemory,
}

/// Attention's kernels and what they need between launches.
pub struct Attention {
    context: Arc<Context>,
    element: Element,
    max_rows: usize,
    max_seqs: usize,
    decode_plan: Kernel,
    prefill_plan: Kernel,
    plans: Vec<Plan>,
    fit: Option<Fit>,
}

impl Attention {
    /// For steps of up to so many rows and sequences.
    pub fn new(
        context: &Arc<Context>,
        kernels: &Kernels,
        element: Element,
        max_rows: usize,
        max_seqs: usize,
    ) -> Result<Self> {
        Ok(Self {
            context: context.clone(),
            element,
            max_rows,
            max_seqs,
            decode_plan: kernels.plain("decode_plan", 0)?,
            prefill_plan: kernels.plain("prefill_plan", 0)?,
            plans: Vec::new(),
            fit: None,
        })
    }

    /// Whether it is ready for this pool.
    pub fn is_fit(&self, pool: &KvPool) -> bool {
        self.fit.as_ref().is_some_and(|f| Some(f.pool) == pool.device_address() && f.blocks == pool.blocks())
    }

    /// Whether a step of so many rows, or fewer that are padded, can be run by
    /// [`run_short`](Self::run_short), and how its positions are then shared out.
    pub fn shares(&self, rows: usize, taken: &Taken) -> Option<Shares> {
        self.fit.as_ref()?.short.as_ref()?.takes(rows, taken)
    }

    /// A new step: what was planned is of the last one.
    pub fn begin(&mut self) {
        self.plans.iter_mut().for_each(|plan| plan.fresh = false);
    }

    /// Makes ready for a pool and a shape; true where they are others than before,
    /// so that recorded launches are of no use.
    pub fn fit(&mut self, kernels: &Kernels, stream: &Stream, shape: &AttentionShape, pool: &KvPool) -> Result<bool> {
        let Some(address) = pool.device_address() else {
            return Err(DeviceError::Unsupported("CUDA: KV in the host's memory; its pool lies on the GPU".into()));
        };
        let fits =
            |f: &Fit| f.shape == *shape && f.kv == *pool.shape() && f.pool == address && f.blocks == pool.blocks();
        if self.fit.as_ref().is_some_and(fits) {
            return Ok(false);
        }
        stream.synchronize()?;
        self.plans.clear();
        let kv = *pool.shape();
        if Element::of_kv(kv.dtype)? != self.element {
            return Err(DeviceError::Unsupported(format!("CUDA: {:?} KV on a device of {:?}", kv.dtype, self.element)));
        }
        let group = shape.heads / shape.kv_heads;
        let tiled = HEAD_DIMS.contains(&shape.head_dim) && group <= MAX_GROUP && kv.block_tokens.is_multiple_of(16);
        let fast = match tiled {
            true => Fast::Tiled(Box::new(self.tile(kernels, stream, shape, pool, address)?)),
            false => Fast::Plain(kernels.typed(&format!("attention_plain{}", of_pool(&kv)), 0)?),
        };
        let short = Short::new(self.context.properties(), kernels, self.element, shape, &kv)?;
        self.fit = Some(Fit { shape: *shape, kv, pool: address, blocks: pool.blocks(), kernels: fast, short });
        Ok(true)
    }

    fn tile(
        &self,
        kernels: &Kernels,
        stream: &Stream,
        shape: &AttentionShape,
        pool: &KvPool,
        address: u64,
    ) -> Result<Tiled> {
        let d = shape.head_dim;
        let properties = self.context.properties();
        let blocks = properties.multiprocessors;
        let hopper = properties.capability == (9, 0);
        let shared = properties.shared_memory;
        let unit = Unit::new(pool.shape());
        let (element, of_pool) = (pool.shape().dtype.size(), of_pool(pool.shape()));
        let Some(slots) = unit.slots(d as u32, element as u32, shared) else {
            return Err(DeviceError::Unsupported(format!("CUDA: heads of {d} in {shared} bytes of shared memory")));
        };
        // All that is left: with the least that suffices, the multiprocessor's memory
        // would be divided so that nothing fits beside it.
        let decode_shared = unit.shared(slots, d as u32, element as u32).max(shared.saturating_sub(JOIN_ROOM));
        let decode = kernels.typed(&format!("attention_decode_d{d}{of_pool}"), decode_shared)?;
        let narrow = kernels.typed(&format!("attention_decode_narrow_d{d}{of_pool}"), decode_shared)?;
        let rows = 2 * u64::from(pool.blocks()) * shape.kv_heads as u64 * u64::from(pool.shape().block_tokens);
        let decode_map = match hopper {
            true => Some(self.decode_map(stream, shape, pool, address, rows, unit)?),
            false => None,
        };
        let tile = Tile::new(d);
        let sm90 = |kernels: &Kernels| kernels.typed(&format!("attention_prefill_sm90_d{d}"), tile.shared(d as u32));
        let sm90_map = |address: u64, blocks: u64| {
            let rows = 2 * blocks * shape.kv_heads as u64 * u64::from(pool.shape().block_tokens);
            self.prefill_map(d, pool.shape().block_tokens, address, rows)
        };
        let hopper_takes = hopper && element == self.element.size();
        let widened = match Widened::is_needed(properties, pool.shape().dtype) {
            true => Some(Widened::new(&self.context, kernels, sm90(kernels)?, pool.shape(), sm90_map)?),
            false => None,
        };
        let layers = 0..if hopper_takes { pool.shape().layers as usize } else { 0 };
        let layer = |layer| sm90_map(address + pool.offset(layer, 0) as u64, u64::from(pool.blocks()));
        let prefill_maps = layers.map(layer).collect::<Result<Vec<_>>>()?;
        let (prefill, grid, tile_rows, tile_keys) = if hopper_takes {
            (sm90(kernels)?, self.sm90_grid(tile), tile.rows, tile.keys)
        } else {
            let keys = if d == 256 { 32 } else { 64 };
            let pitch = ((d as u32 * element as u32 / 16) | 1) * 16;
            let kernel = kernels
                .typed(&format!("attention_prefill_d{d}{of_pool}"), 64 * (d as u32 + 8) * 2 + 4 * keys * pitch)?;
            let grid = Grid::new((blocks * kernel.occupancy(128)?) as usize, 128);
            (kernel, grid, 64, keys)
        };
        let parts = 4 * 2 * blocks as usize * unit.together as usize * 16 * (d + 2);
        let parts = GpuMemory::new(&self.context, parts, "attention")?;
        Ok(Tiled {
            decode,
            narrow,
            join: kernels.typed("decode_join", 0)?,
            unit,
            slots,
            decode_map,
            prefill,
            prefill_maps,
            widened,
            prefill_grid: grid,
            tile_rows,
            tile_keys,
            parts,
        })
    }

    /// A layer's pool as Hopper's prefill kernel has it brought.
    fn prefill_map(&self, d: usize, block_tokens: u32, address: u64, rows: u64) -> Result<TensorMap> {
        let row_bytes = (d * self.element.size()) as u64;
        let keys = Tile::new(d).keys;
        let piece = (block_tokens & block_tokens.wrapping_neg()).min(keys & keys.wrapping_neg());
        let wide = if d.is_multiple_of(64) { (64, d as u64 / 64) } else { (d as u64, 1) };
        let tensor = Tensor {
            address,
            dims: &[wide.0, 8, wide.1, rows / 8],
            strides: &[row_bytes, 128, 8 * row_bytes],
            piece: &[64, 8, wide.1 as u32, piece / 8],
            swizzle: Swizzle::Bytes128,
            promotion: 256,
        };
        TensorMap::new(self.element, &tensor)
    }

    fn sm90_grid(&self, tile: Tile) -> Grid {
        Grid::new(self.blocks(), tile.threads)
    }

    fn decode_map(
        &self,
        stream: &Stream,
        shape: &AttentionShape,
        pool: &KvPool,
        address: u64,
        rows: u64,
        unit: Unit,
    ) -> Result<GpuMemory> {
        // In elements of two bytes, whatever they are.
        let d = (shape.head_dim * pool.shape().dtype.size() / 2) as u64;
        let (width, swizzle) = match d {
            d if d.is_multiple_of(64) => (64, Swizzle::Bytes128),
            d if d.is_multiple_of(32) => (32, Swizzle::Bytes64),
            d => (d, Swizzle::None),
        };
        let tensor = Tensor {
            address,
            dims: &[width, 8, d / width, rows * u64::from(pool.shape().layers) / 8],
            strides: &[2 * d, 2 * width, 16 * d],
            piece: &[width as u32, 8, (d / width) as u32, unit.copied / 8],
            swizzle,
            promotion: 128,
        };
        let map = TensorMap::new(self.element, &tensor)?;
        let mut staging = super::memory::Pinned::new(&self.context, map.bytes().len())?;
        staging.bytes_mut()[..map.bytes().len()].copy_from_slice(map.bytes());
        let memory = GpuMemory::new(&self.context, map.bytes().len(), "attention")?;
        memory.upload(stream, 0, &staging, 0..map.bytes().len())?;
        stream.synchronize()?;
        Ok(memory)
    }

    /// The attention of one layer: see
    /// [`Device::attention`](crate::device::Device::attention).
    pub fn run(
        &mut self,
        stream: &Stream,
        at: &Addresses,
        taken: &Taken,
        window: Option<u32>,
        layer: usize,
        qkv: &Buffer,
        o: &Buffer,
        lse: &Buffer,
    ) -> Result<()> {
        let Some(fit) = &self.fit else {
            return Err(DeviceError::System("attention before its pool was made known".into()));
        };
        let shape = fit.shape;
        assert!(qkv.cols() >= shape.q_width() && o.cols() == shape.q_width() && lse.cols() == shape.heads, "buffers");
        let window = window.unwrap_or(0);
        let kv = self.layer(layer);
        match &fit.kernels {
            Fast::Tiled(_) => {}
            Fast::Plain(kernel) => {
                let arguments = api::AttentionPlain {
                    qkv: qkv.address(),
                    kv,
                    o: o.address(),
                    lse: lse.address(),
                    step: at.step,
                    seqs: at.seqs,
                    pages: at.pages,
                    q_stride: qkv.cols() as u32,
                    heads: shape.heads as u32,
                    kv_heads: shape.kv_heads as u32,
                    head_dim: shape.head_dim as u32,
                    block_tokens: fit.kv.block_tokens,
                    window,
                    scale: shape.scale,
                    reserved: 0,
                };
                let rows = taken.rows.max(1) as u32;
                let grid = Grid { blocks: (rows, shape.heads.div_ceil(4) as u32, 1), threads: 128, cluster: 1 };
                // SAFETY: the buffers hold the step's rows, checked when it was
                // taken in, and so were its blocks.
                return unsafe { kernel.launch(stream, grid, &arguments) };
            }
        }
        let (blocks, kv_shape) = (fit.blocks, fit.kv);
        let (decodes, prefills) = kinds(taken, &shape);
        let (index, planned) = self.plan(stream, at, taken, window)?;
        let Some(Fit { kernels: Fast::Tiled(tiled), .. }) = &self.fit else { unreachable!("seen above") };
        let plan = &self.plans[index];
        if decodes {
            let arguments = api::Decode {
                qkv: qkv.address(),
                kv,
                kv_map: tiled.decode_map.as_ref().map_or(0, GpuMemory::address),
                o: o.address(),
                lse: lse.address(),
                pages: at.pages,
                items: plan.items.address(),
                parts: tiled.parts.address(),
                map_row: (layer as u64
                    * 2
                    * u64::from(blocks)
                    * shape.kv_heads as u64
                    * u64::from(kv_shape.block_tokens)) as u32,
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                block_tokens: kv_shape.block_tokens,
                window,
                box_rows: tiled.unit.copied,
                together: tiled.unit.together,
                slots: tiled.slots,
                scale: shape.scale,
                reserved: 0,
            };
            let join = api::DecodeJoin {
                cuts: plan.cuts.address(),
                parts: tiled.parts.address(),
                o: o.address(),
                lse: lse.address(),
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                head_dim: shape.head_dim as u32,
                together: tiled.unit.together,
            };
            // SAFETY: as above; the plan is of this step, and its memory and that
            // of the parts are of the sizes that api.h asks for.
            unsafe {
                let grid = Grid::new(self.blocks(), tiled.unit.threads());
                let narrow = taken.most * (shape.heads / shape.kv_heads) <= NARROW;
                let kernel = if narrow { tiled.narrow } else { tiled.decode };
                match planned {
                    // It reads the plan, and KV, before it waits.
                    true => kernel.launch(stream, grid, &arguments)?,
                    false => kernel.overlap(stream, grid, &arguments)?,
                }
                tiled.join.overlap(stream, Grid::new(self.blocks(), 256), &join)?;
            }
        }
        if prefills {
            let widened = tiled.widened(taken);
            if let Some(widened) = widened {
                widened.run(stream, at, taken, &shape, &kv_shape, kv)?;
            }
            let arguments = api::Prefill {
                q: qkv.address(),
                kv: widened.map_or(kv, Widened::address),
                o: o.address(),
                lse: lse.address(),
                seqs: at.seqs,
                pages: at.pages,
                plan: plan.prefill.address(),
                q_stride: qkv.cols() as u32,
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                block_tokens: kv_shape.block_tokens,
                window,
                scale: shape.scale,
                gathered: widened.map_or(api::NOT_GATHERED, |_| taken.long_pages.0 as u32),
                reserved: 0,
            };
            // SAFETY: as above.
            unsafe {
                match (widened, tiled.prefill_maps.get(layer)) {
                    (Some(Widened { prefill, map, .. }), _) => {
                        let grid = self.sm90_grid(Tile::new(shape.head_dim));
                        prefill.launch_with_map(stream, grid, &arguments, map, false)?;
                    }
                    (None, Some(map)) => {
                        tiled.prefill.launch_with_map(stream, tiled.prefill_grid, &arguments, map, false)?;
                    }
                    (None, None) => tiled.prefill.launch(stream, tiled.prefill_grid, &arguments)?,
                }
            }
        }
        Ok(())
    }

    /// The rotary embedding, the way of keys and values into the pool and the
    /// attention of one layer, for a step that has [`shares`](Self::shares).
    pub fn run_short(
        &self,
        stream: &Stream,
        at: &Addresses,
        rows: usize,
        window: Option<u32>,
        layer: usize,
        step: ShortStep,
        turned: Turned,
        qkv: &Buffer,
        o: &Buffer,
        lse: &Buffer,
    ) -> Result<()> {
        let Some(Fit { shape, kv, short: Some(short), .. }) = &self.fit else {
            return Err(DeviceError::System("attention before its pool was made known".into()));
        };
        short.run(stream, at, rows, shape, window, step, turned, (self.layer(layer), kv), qkv, o, lse)
    }

    /// The address of a layer of the pool.
    fn layer(&self, layer: usize) -> u64 {
        self.fit.as_ref().map_or(0, |f| f.pool + (layer * f.kv.layer_bytes() * f.blocks as usize) as u64)
    }

    fn blocks(&self) -> usize {
        self.context.properties().multiprocessors as usize
    }

    /// The index of the step's plan for `window`, and whether it had to be made.
    fn plan(&mut self, stream: &Stream, at: &Addresses, taken: &Taken, window: u32) -> Result<(usize, bool)> {
        let Some(Fit { shape, kv, kernels: Fast::Tiled(tiled), .. }) = &self.fit else {
            return Err(DeviceError::System("a plan for a plain kernel".into()));
        };
        let group = (shape.heads / shape.kv_heads) as u32;
        let capacity = self.max_rows * group as usize / tiled.tile_rows as usize + self.max_seqs;
        let index = match self.plans.iter().position(|plan| plan.window == window) {
            Some(index) => index,
            None => {
                let items = 48 * (self.blocks() + self.max_seqs * shape.kv_heads / tiled.unit.together as usize);
                self.plans.push(Plan {
                    window,
                    fresh: false,
                    items: GpuMemory::new(&self.context, items, "attention")?,
                    cuts: GpuMemory::new(&self.context, 20 * (self.blocks() + 1), "attention")?,
                    spans: GpuMemory::new(&self.context, 16 * (self.max_seqs + 1), "attention")?,
                    prefill: GpuMemory::new(&self.context, 4 * (8 + 8 * capacity), "attention")?,
                });
                self.plans.len() - 1
            }
        };
        let plan = &mut self.plans[index];
        if std::mem::replace(&mut plan.fresh, true) {
            return Ok((index, false));
        }
        let (decodes, prefills) = kinds(taken, shape);
        if decodes {
            let arguments = api::DecodePlan {
                step: at.step,
                seqs: at.seqs,
                pages: at.pages,
                items: plan.items.address(),
                spans: plan.spans.address(),
                cuts: plan.cuts.address(),
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                head_dim: shape.head_dim as u32,
                block_tokens: kv.block_tokens,
                window,
                box_rows: tiled.unit.copied,
                together: tiled.unit.together,
                grid: self.context.properties().multiprocessors,
                least: LEAST_UNITS,
                reserved: 0,
            };
            // SAFETY: the plan's memory is of the sizes that api.h asks for.
            unsafe { self.decode_plan.launch(stream, Grid::new(1, 1024), &arguments)? };
        }
        if prefills {
            let (tile_rows, tile_keys) = match tiled.widened(taken) {
                Some(_) => {
                    let tile = Tile::new(shape.head_dim);
                    (tile.rows, tile.keys)
                }
                None => (tiled.tile_rows, tiled.tile_keys),
            };
            let arguments = api::PrefillPlan {
                step: at.step,
                seqs: at.seqs,
                pages: at.pages,
                plan: plan.prefill.address(),
                capacity: capacity as u32,
                group,
                kv_heads: shape.kv_heads as u32,
                head_dim: shape.head_dim as u32,
                block_tokens: kv.block_tokens,
                window,
                tile_rows,
                tile_keys,
            };
            // SAFETY: as above.
            unsafe { self.prefill_plan.launch(stream, Grid::new(1, 1024), &arguments)? };
        }
        Ok((index, true))
    }
}

impl Tiled {
    /// Where the step's longer sequences are widened, if they are.
    fn widened(&self, taken: &Taken) -> Option<&Widened> {
        self.widened.as_ref().filter(|widened| widened.holds(taken))
    }
}

/// What the names of kernels for a pool say of its element, where it is not the
/// device's.
fn of_pool(kv: &KvShape) -> &'static str {
    if kv.dtype == KvDtype::Fp8 { "_fp8" } else { "" }
}

/// Whether a step has sequences to decode, and to prefill: the rule of
/// `is_decode` in `cuda/paged_kv.cuh`.
fn kinds(taken: &Taken, shape: &AttentionShape) -> (bool, bool) {
    let decode = |rows: usize| rows * (shape.heads / shape.kv_heads) <= super::DECODE_TILE;
    (taken.seqs > 0 && decode(taken.fewest), taken.seqs > 0 && !decode(taken.most))
}
