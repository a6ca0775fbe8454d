//! The control plane as a whole: controllers on a simulated network.

mod cases;
mod lending;
mod network;
mod plan;
mod seeds;

use crate::kv::rblock::{KvDtype, KvShape};

fn shape(layers: u32) -> KvShape {
    KvShape { layers, kv_heads: 1, head_dim: 8, block_tokens: 4, dtype: KvDtype::Bf16 }
}
