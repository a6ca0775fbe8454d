//! Decode attention of short contexts, in one launch a layer with the rotary
//! embedding: see `cuda/decode_short.cu`.

#![allow(unsafe_code)]

use super::api;
use super::buffer::{Buffer, Vector};
use super::driver::{Properties, Stream};
use super::element::Element;
use super::kernels::{Grid, Kernel, Kernels};
use super::rows::Turned;
use super::step::{Addresses, Taken};
use crate::device::{AttentionShape, Result};
use crate::kv::rblock::KvShape;

/// Widths of heads that the kernel exists for.
const HEAD_DIMS: [usize; 2] = [64, 128];
/// Most query heads a KV head.
const MAX_GROUP: usize = 8;
/// Elements of keys of one head that a block attends to, most, in steps of one row, of
/// two, and of more: beyond these the other kernels are faster.
const REACH: [usize; 3] = [24 << 10, 16 << 10, 12 << 10];
/// Dynamic shared memory of a block, most (256 positions of 4 query heads): with 10 KiB,
/// which leave a block of the linear layers no room beside it, a step takes 5 to 8%
/// longer.
const SHARED: usize = 5 << 10;
/// Positions, times query heads a KV head, that a block attends to before others share
/// them: they have to wait for each other.
const ALONE: usize = 256;
/// And positions, most.
const ALONE_MOST: usize = 64;
/// Blocks that share a row and KV head, most.
const SHARERS: usize = 8;
/// Blocks a multiprocessor of which a launch consists, most: with more, the other
/// kernels are faster.
const BLOCKS: usize = 2;
/// Threads of a block.
const THREADS: u32 = 256;

/// The kernel for one shape of heads.
pub struct Short {
    kernel: Kernel,
    kv_heads: usize,
    head_dim: usize,
    /// Query heads a KV head, as many as the kernel has room for.
    group: usize,
    /// Blocks of a launch, most.
    blocks: usize,
    /// Positions that a block attends to before others share them.
    alone: usize,
    /// Blocks that may share a row and KV head.
    sharers: usize,
}

/// The queries' and keys' norms of a layer.
#[derive(Clone, Copy, Debug, Default)]
pub struct HeadNorms {
    /// Address of the queries' weights, or 0.
    pub q: u64,
    /// Address of the keys' weights, or 0.
    pub k: u64,
    /// Added to the mean square.
    pub eps: f32,
}

impl HeadNorms {
    /// Of a layer, where the model has them.
    pub fn new(shape: &AttentionShape, norms: Option<(&Vector, &Vector, f32)>) -> Self {
        let Some((q, k, eps)) = norms else { return Self::default() };
        assert!(q.len() == shape.head_dim && k.len() == shape.head_dim, "norms of heads");
        Self { q: q.address(), k: k.address(), eps }
    }
}

/// How the positions of a row and KV head are shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shares {
    /// Blocks that share them.
    pub blocks: usize,
    /// Positions that each has room for.
    pub tokens: usize,
}

/// A step of short contexts.
#[derive(Clone, Copy, Debug)]
pub struct ShortStep {
    /// What [`Short::takes`] said.
    pub shares: Shares,
    /// The norms of the layer at hand.
    pub norms: HeadNorms,
}

impl Short {
    /// `None` where there is no kernel for these heads, or for this KV.
    pub fn new(
        properties: &Properties,
        kernels: &Kernels,
        element: Element,
        shape: &AttentionShape,
        kv: &KvShape,
    ) -> Result<Option<Self>> {
        let group = (shape.heads / shape.kv_heads).next_power_of_two();
        if !HEAD_DIMS.contains(&shape.head_dim) || group > MAX_GROUP || kv.dtype.size() != element.size() {
            return Ok(None);
        }
        Ok(Some(Self {
            kernel: kernels.typed(&format!("decode_short_d{}_g{group}", shape.head_dim), SHARED as u32)?,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            group,
            blocks: BLOCKS * properties.multiprocessors as usize,
            alone: (ALONE / group).min(ALONE_MOST),
            // Older GPUs have no clusters.
            sharers: if properties.capability.0 >= 9 { SHARERS } else { 1 },
        }))
    }

    /// Whether a step is of short contexts, recorded for `rows` rows: how the positions
    /// of a row and KV head are then shared out.
    pub fn takes(&self, rows: usize, taken: &Taken) -> Option<Shares> {
        let most = self.blocks / (rows.max(1) * self.kv_heads);
        let reach = (REACH[rows.clamp(1, REACH.len()) - 1] / self.head_dim).min(room(self.group));
        shares(taken.deepest, self.alone, reach, most.min(self.sharers)).filter(|_| taken.plain_decode)
    }

    /// Rotates, appends and attends: `rows` rows of the step, a sequence each.
    pub fn run(
        &self,
        stream: &Stream,
        at: &Addresses,
        rows: usize,
        shape: &AttentionShape,
        window: Option<u32>,
        ShortStep { shares, norms }: ShortStep,
        turned: Turned,
        (kv, pool): (u64, &KvShape),
        qkv: &Buffer,
        o: &Buffer,
        lse: &Buffer,
    ) -> Result<()> {
        assert!(rows <= qkv.rows() && rows <= o.rows() && rows <= lse.rows(), "rows of attention");
        assert!(qkv.cols() == shape.qkv_width() && o.cols() == shape.q_width() && lse.cols() == shape.heads, "buffers");
        let arguments = api::DecodeShort {
            qkv: qkv.address(),
            pool: kv,
            table: turned.table,
            q_norm: norms.q,
            k_norm: norms.k,
            slots: at.slots,
            seqs: at.seqs,
            pages: at.pages,
            step: at.step,
            o: o.address(),
            lse: lse.address(),
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            block_tokens: pool.block_tokens,
            pairs: turned.pairs,
            interleaved: turned.interleaved.into(),
            window: window.unwrap_or(0),
            eps: norms.eps,
            scale: shape.scale,
            tokens: shares.tokens as u32,
            reserved: 0,
        };
        assert!((1..=self.sharers).contains(&shares.blocks), "blocks of a cluster");
        let blocks = ((self.kv_heads * shares.blocks) as u32, rows.max(1) as u32, 1);
        let grid = Grid { blocks, threads: THREADS, cluster: shares.blocks as u32 };
        let kernel = self.kernel.with_shared(shared(shares.tokens, self.group));
        // SAFETY: the buffers hold `rows` rows of their widths, checked above; the
        // step's blocks and pages were checked when it was taken in, and nobody
        // attends to more positions than the blocks have room for (`takes`). It
        // waits before it touches what the step's kernels write.
        unsafe { kernel.overlap(stream, grid, &arguments) }
    }
}

/// Dynamic shared memory of a block with room for so many positions: `decode_short.cu`
/// has it.
fn shared(tokens: usize, group: usize) -> u32 {
    (((tokens + 1) * group + tokens) * 4) as u32
}

/// Positions that a block has room for, most.
fn room(group: usize) -> usize {
    (SHARED / 4 - group) / (group + 1)
}

/// How the `deepest` positions before a row's own are shared out: by a power of two of
/// blocks, up to `most`, of which each has `alone` of them or fewer, else up to `reach`.
fn shares(deepest: usize, alone: usize, reach: usize, most: usize) -> Option<Shares> {
    let most = 1 << most.checked_ilog2()?;
    let blocks = deepest.div_ceil(alone).next_power_of_two().min(most);
    let tokens = if deepest <= blocks * alone { alone } else { reach };
    (deepest <= blocks * tokens).then_some(Shares { blocks, tokens })
}

#[cfg(test)]
mod tests {
    use super::{MAX_GROUP, SHARED, Shares, room, shared, shares};

    #[test]
    fn as_few_blocks_share_a_row_as_it_is_long() {
        let found = |alone, reach, most, all: &[usize]| -> Vec<Option<(usize, usize)>> {
            let one = |&deepest| shares(deepest, alone, reach, most).map(|Shares { blocks, tokens }| (blocks, tokens));
            all.iter().map(one).collect()
        };
        let of_one = [Some((1, 64)), Some((1, 64)), Some((2, 64)), Some((8, 64)), Some((8, 128)), None];
        assert_eq!(found(64, 128, 8, &[0, 64, 65, 512, 1024, 1025]), of_one);
        let of_several = [Some((1, 32)), Some((1, 32)), Some((2, 32)), Some((2, 64)), None];
        assert_eq!(found(32, 64, 3, &[0, 32, 33, 128, 129]), of_several);
        assert_eq!(found(64, 64, 0, &[0]), [None], "more rows than blocks");
    }

    #[test]
    fn as_many_positions_as_there_is_room_for() {
        for group in 1..=MAX_GROUP {
            let sizes = [0, 1].map(|more| shared(room(group) + more, group) as usize);
            assert!(sizes[0] <= SHARED && SHARED < sizes[1], "{group}: {sizes:?}");
        }
    }
}
