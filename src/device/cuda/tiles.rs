//! What attention's kernels take at once: shapes that the kernels' files know too.

use super::api;
use crate::kv::rblock::KvShape;

/// Rows of the pool that one copy brings, most, and slots of a block's ring, most:
/// more of either is slower, measured on an H200.
const COPIED: u32 = 64;
const MOST_SLOTS: u32 = 5;

/// What the decode kernel takes at once: see `cuda/decode.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Rows of a unit.
    pub rows: u32,
    /// Rows that one copy brings.
    pub copied: u32,
    /// KV heads that a copy spans.
    pub together: u32,
}

impl Unit {
    /// For a pool's blocks and heads.
    pub fn new(kv: &KvShape) -> Self {
        let (rows, tokens) = (if kv.head_dim <= 128 { 128 } else { 64 }, kv.block_tokens);
        if COPIED.is_multiple_of(tokens) {
            let fits = |heads: &u32| kv.kv_heads.is_multiple_of(*heads) && *heads <= COPIED / tokens;
            let together = [8, 4, 2, 1].into_iter().find(fits).unwrap_or(1);
            return Self { rows, copied: together * tokens, together };
        }
        let fits = |copied: &u32| tokens.is_multiple_of(*copied);
        Self { rows, copied: [COPIED, 32, 16].into_iter().find(fits).unwrap_or(16), together: 1 }
    }

    /// Of a block: those that compute, and the warp that brings units.
    pub const fn threads(self) -> u32 {
        2 * self.rows + 32
    }

    /// Bytes of shared memory with so many slots.
    pub const fn shared(self, slots: u32, head_dim: u32, element: u32) -> u32 {
        let warps = self.rows / 16;
        slots * self.rows * head_dim * element + warps * 8 * (head_dim + 4) * 4 + warps * 64 + 256 + 16 * warps * 8
    }

    /// Slots that fit, at most, with KV of `element` bytes.
    pub fn slots(self, head_dim: u32, element: u32, room: u32) -> Option<u32> {
        let most = MOST_SLOTS * 2 / element;
        (2..=most.min(api::DECODE_SLOTS)).rev().find(|&slots| self.shared(slots, head_dim, element) <= room)
    }
}

/// A tile of the prefill kernel on Hopper: as `Shape` in `cuda/prefill_feed.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Packed query rows.
    pub rows: u32,
    /// Tiles of them in flight.
    pub queries: u32,
    /// Keys, and values.
    pub keys: u32,
    /// Tiles of either in flight.
    pub stages: u32,
    /// Of a block.
    pub threads: u32,
}

impl Tile {
    /// For heads of this width.
    pub const fn new(head_dim: usize) -> Self {
        match head_dim {
            64 => Self { rows: 192, queries: 2, keys: 96, stages: 4, threads: 512 },
            256 => Self { rows: 128, queries: 1, keys: 64, stages: 2, threads: 384 },
            _ => Self { rows: 128, queries: 1, keys: 128, stages: 2, threads: 384 },
        }
    }

    /// Bytes of shared memory; the first tile begins at a multiple of 1024.
    pub const fn shared(self, head_dim: u32) -> u32 {
        head_dim.div_ceil(64) * 128 * (self.queries * self.rows + 2 * self.stages * self.keys) + 1024
    }
}
