//! Where weights come from: a source names its tensors its own way and answers
//! for the [`Param`]s the transformer asks for.

use crate::device::tensor::RawTensor;

/// A parameter of the transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Param {
    /// Token embedding `[vocab, hidden]`.
    Embedding,
    /// Last RMSNorm `[hidden]`.
    FinalNorm,
    /// Output projection `[vocab, hidden]`; absent where tied.
    LmHead,
    /// One of a layer's.
    Layer(usize, LayerParam),
}

/// A layer's parameters. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum LayerParam {
    AttentionNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    /// RMSNorm of each query head `[head_dim]` (Qwen3).
    QNorm,
    /// RMSNorm of each key head `[head_dim]` (Qwen3).
    KNorm,
    O,
    OBias,
    MlpNorm,
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
}

impl Param {
    /// Whether it is the matrix of a linear layer (which the embedding is not, tied
    /// or not).
    pub fn is_linear(self) -> bool {
        use LayerParam as P;
        match self {
            Self::LmHead => true,
            Self::Embedding | Self::FinalNorm => false,
            Self::Layer(_, param) => matches!(param, P::Q | P::K | P::V | P::O | P::Gate | P::Up | P::Down),
        }
    }
}

/// A set of weights on disk, mapped or streamed.
pub trait WeightSource: Send + Sync {
    /// The parameter's bytes; `None` where the model has no such parameter
    /// (a bias, a tied output projection). Shapes were checked against the
    /// configuration when the source was opened.
    fn get(&self, param: Param) -> Option<RawTensor<'_>>;

    /// The parameter is loaded and will not be read again: its pages may be
    /// dropped, so that loading never holds the weights twice.
    fn release(&self, param: Param);

    /// Bytes of all parameters, without scales.
    fn total_bytes(&self) -> u64;
}
