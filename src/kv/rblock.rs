//! The rBlock: the KV of a short run of consecutive tokens of one sequence;
//! the unit of allocation, placement, lending and movement (paper, section
//! "rManager").

use std::fmt;

use serde::{Deserialize, Serialize};

/// Tokens of an rBlock unless configured otherwise.
pub const DEFAULT_BLOCK_TOKENS: usize = 16;

/// Names one instance (one process life: a restarted node has a new id).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct InstanceId(pub u64);

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "i{:016x}", self.0)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// One grant of a creditor's rBlocks to a debtor, from reserve to repay.
/// Unique within the creditor's life: chosen by the creditor, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LoanId(pub u32);

/// Index of a physical rBlock in its instance's pool; the same index is valid
/// in every layer.
pub type BlockIndex = u32;

/// Element type of keys and values in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// bfloat16, the default.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 8-bit float E4M3 ([`crate::e4m3`]), unscaled: half the memory of bf16,
    /// three bits of mantissa, values cut off at 448.
    Fp8,
}

impl KvDtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::Fp8 => 1,
        }
    }
}

/// Shape of one model's KV: everything needed to find a byte of it.
///
/// Physical layout: per layer one pool `[blocks, 2 (k, v), kv_heads,
/// block_tokens, head_dim]`, so that one layer of an rBlock is one contiguous
/// run of [`layer_bytes`](Self::layer_bytes) bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KvShape {
    /// Transformer layers.
    pub layers: u32,
    /// KV heads a layer.
    pub kv_heads: u32,
    /// Elements a head.
    pub head_dim: u32,
    /// Tokens an rBlock.
    pub block_tokens: u32,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of K (or of V) of one head in one layer of a block.
    pub const fn head_bytes(&self) -> usize {
        self.block_tokens as usize * self.head_dim as usize * self.dtype.size()
    }

    /// Bytes of one layer of a block, K and V.
    pub const fn layer_bytes(&self) -> usize {
        2 * self.kv_heads as usize * self.head_bytes()
    }

    /// Bytes of a block in all layers.
    pub const fn block_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes()
    }

    /// Bytes of KV of one token in all layers.
    pub const fn token_bytes(&self) -> usize {
        self.block_bytes() / self.block_tokens as usize
    }

    /// Blocks that hold `tokens` tokens.
    pub const fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }
}

/// A run of consecutive tokens of one sequence in one physical block of the
/// pool at hand, as an attention kernel wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvRun {
    /// Physical block.
    pub block: BlockIndex,
    /// Position in the sequence of the block's first token.
    pub position: u32,
    /// Tokens filled, 1 ..= `block_tokens`.
    pub tokens: u32,
}
