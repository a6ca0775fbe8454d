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
/// Positions that a block attends to, most, of one row (all that the kernel takes) and
/// of several: with more the other kernels are faster.
const TOKENS: [usize; 2] = [128, 64];
/// Positions, times query heads a KV head, that a block attends to before others share
/// them: they have to wait for each other.
const ALONE: usize = 256;
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

/// A step of short contexts.
#[derive(Clone, Copy, Debug)]
pub struct ShortStep {
    /// Blocks that share a row and KV head: what [`Short::takes`] said.
    pub sharers: usize,
    /// Those of the layer at hand.
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
            kernel: kernels.typed(&format!("decode_short_d{}_g{group}", shape.head_dim), 0)?,
            kv_heads: shape.kv_heads,
            blocks: BLOCKS * properties.multiprocessors as usize,
            alone: (ALONE / group).min(TOKENS[1]),
            // Older GPUs have no clusters.
            sharers: if properties.capability.0 >= 9 { SHARERS } else { 1 },
        }))
    }

    /// Whether a step is of short contexts, recorded for `rows` rows: the blocks that
    /// share a row and KV head.
    pub fn takes(&self, rows: usize, taken: &Taken) -> Option<usize> {
        let most = self.blocks / (rows.max(1) * self.kv_heads);
        let reach = TOKENS[usize::from(rows > 1)];
        sharers(taken.deepest, self.alone, reach, most.min(self.sharers)).filter(|_| taken.plain_decode)
    }

    /// Rotates, appends and attends: `rows` rows of the step, a sequence each.
    pub fn run(
        &self,
        stream: &Stream,
        at: &Addresses,
        rows: usize,
        shape: &AttentionShape,
        window: Option<u32>,
        ShortStep { sharers, norms }: ShortStep,
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
        };
        assert!((1..=self.sharers).contains(&sharers), "blocks of a cluster");
        let blocks = ((self.kv_heads * sharers) as u32, rows.max(1) as u32, 1);
        let grid = Grid { blocks, threads: THREADS, cluster: sharers as u32 };
        // SAFETY: the buffers hold `rows` rows of their widths, checked above; the
        // step's blocks and pages were checked when it was taken in, and nobody
        // attends to more positions than the blocks have room for (`takes`). It
        // waits before it touches what the step's kernels write.
        unsafe { self.kernel.overlap(stream, grid, &arguments) }
    }
}

/// Blocks that share the `deepest` positions before a row's own, a power of two up to
/// `most`: each has `alone` of them or fewer, else up to `reach`.
fn sharers(deepest: usize, alone: usize, reach: usize, most: usize) -> Option<usize> {
    let most = 1 << most.checked_ilog2()?;
    let sharers = deepest.div_ceil(alone).next_power_of_two().min(most);
    (deepest <= sharers * reach).then_some(sharers)
}

#[cfg(test)]
mod tests {
    use super::sharers;

    #[test]
    fn as_few_blocks_share_a_row_as_it_is_long() {
        let of_one = [0, 64, 65, 512, 1024, 1025].map(|deepest| sharers(deepest, 64, 128, 8));
        assert_eq!(of_one, [Some(1), Some(1), Some(2), Some(8), Some(8), None]);
        let of_several = [0, 32, 33, 128, 129].map(|deepest| sharers(deepest, 32, 64, 3));
        assert_eq!(of_several, [Some(1), Some(1), Some(2), Some(2), None]);
        assert_eq!(sharers(0, 64, 64, 0), None, "more rows than blocks");
    }
}
