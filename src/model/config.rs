//! A model's configuration, whatever file it came from, resolved to what the
//! transformer needs. A field that would change the mathematics and is not
//! understood is an error that names it.

use crate::device::{AttentionShape, Rope};
use crate::kv::rblock::{KvDtype, KvShape};

/// Model families that are told apart by their mathematics only where the
/// fields below do not say it already; kept for people and for `inspect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3.x, SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3 (dense).
    Qwen3,
}

/// A decoder-only transformer: pre-norm, RMSNorm, rotary GQA attention, SwiGLU.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Attention heads.
    pub attention: AttentionShape,
    /// Width of the feed-forward.
    pub ffn: usize,
    /// Tokens in the vocabulary (rows of the embedding).
    pub vocab: usize,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f32,
    /// Rotary embedding, scaling resolved.
    pub rope: Rope,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// Sliding window of each layer; `None` attends to everything. Empty: none
    /// in any layer.
    pub windows: Vec<Option<u32>>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// Token that begins a text, where the model has one.
    pub bos: Option<u32>,
}

impl ModelConfig {
    /// Sliding window of `layer`.
    pub fn window(&self, layer: usize) -> Option<u32> {
        self.windows.get(layer).copied().flatten()
    }

    /// Shape of the model's KV.
    pub fn kv_shape(&self, block_tokens: usize, dtype: KvDtype) -> KvShape {
        KvShape {
            layers: self.layers as u32,
            kv_heads: self.attention.kv_heads as u32,
            head_dim: self.attention.head_dim as u32,
            block_tokens: block_tokens as u32,
            dtype,
        }
    }
}
