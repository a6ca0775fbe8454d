//! Which parameters a model has and of what shape: what every weight file is
//! checked against when it is opened.

use crate::device::disk::Stored;
use crate::device::tensor::RawTensor;
use crate::model::config::ModelConfig;
use crate::model::mapping::Mapping;
use crate::model::weights::{LayerParam, Param};

/// Parameters that some models have and others do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OptionalParams {
    /// Biases of the Q, K and V projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub o_bias: bool,
    /// Biases of gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm of each Q and K head.
    pub qk_norm: bool,
}

/// Every parameter of a layer, in the order of computation.
pub const LAYER_PARAMS: [LayerParam; 18] = [
    LayerParam::AttentionNorm,
    LayerParam::Q,
    LayerParam::K,
    LayerParam::V,
    LayerParam::QBias,
    LayerParam::KBias,
    LayerParam::VBias,
    LayerParam::QNorm,
    LayerParam::KNorm,
    LayerParam::O,
    LayerParam::OBias,
    LayerParam::MlpNorm,
    LayerParam::Gate,
    LayerParam::Up,
    LayerParam::Down,
    LayerParam::GateBias,
    LayerParam::UpBias,
    LayerParam::DownBias,
];

impl OptionalParams {
    /// `(rows, cols)` of `param`; `None` where the model has no such parameter.
    /// A vector has one row.
    pub fn shape(&self, config: &ModelConfig, param: Param) -> Option<(usize, usize)> {
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (q, kv) = (config.attention.q_width(), config.attention.kv_width());
        let (layer, param) = match param {
            Param::Embedding => return Some((config.vocab, hidden)),
            Param::FinalNorm => return Some((1, hidden)),
            Param::LmHead => return (!config.tied_embeddings).then_some((config.vocab, hidden)),
            Param::Layer(layer, param) => (layer, param),
        };
        if layer >= config.layers {
            return None;
        }
        match param {
            LayerParam::AttentionNorm | LayerParam::MlpNorm => Some((1, hidden)),
            LayerParam::Q => Some((q, hidden)),
            LayerParam::K | LayerParam::V => Some((kv, hidden)),
            LayerParam::QBias => self.qkv_bias.then_some((1, q)),
            LayerParam::KBias | LayerParam::VBias => self.qkv_bias.then_some((1, kv)),
            LayerParam::QNorm | LayerParam::KNorm => self.qk_norm.then_some((1, config.attention.head_dim)),
            LayerParam::O => Some((hidden, q)),
            LayerParam::OBias => self.o_bias.then_some((1, hidden)),
            LayerParam::Gate | LayerParam::Up => Some((ffn, hidden)),
            LayerParam::Down => Some((hidden, ffn)),
            LayerParam::GateBias | LayerParam::UpBias => self.mlp_bias.then_some((1, ffn)),
            LayerParam::DownBias => self.mlp_bias.then_some((1, hidden)),
        }
    }

    /// The model's parameters with their shapes, in the order to load them in:
    /// the largest first, so that a tensor is never held twice, in its file's
    /// pages and in a device's packing, when most of the others are there too.
    pub fn all<'a>(&'a self, config: &'a ModelConfig) -> impl Iterator<Item = (Param, (usize, usize))> + 'a {
        let layers = (0..config.layers).flat_map(|layer| LAYER_PARAMS.into_iter().map(move |p| Param::Layer(layer, p)));
        [Param::Embedding, Param::LmHead, Param::FinalNorm]
            .into_iter()
            .chain(layers)
            .filter_map(|param| Some((param, self.shape(config, param)?)))
    }
}

/// Where a checked tensor's bytes lie inside its file's mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub dtype: crate::device::tensor::DType,
    pub rows: usize,
    pub cols: usize,
    pub start: usize,
    pub len: usize,
}

impl Extent {
    /// The tensor, if `mapping` is the one that the extent was checked for.
    pub fn of<'a>(&self, mapping: &'a Mapping) -> Option<RawTensor<'a>> {
        let bytes = mapping.bytes().get(self.start..self.start.checked_add(self.len)?)?;
        let stored = Some(Stored { file: mapping.file(), offset: self.start as u64 });
        Some(RawTensor { dtype: self.dtype, rows: self.rows, cols: self.cols, bytes, stored, scales: None })
    }
}
