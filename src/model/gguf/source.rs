//! A GGUF file's tensors as a source of weights.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::device::tensor::RawTensor;
use crate::model::config::ModelConfig;
use crate::model::error::{ModelError, Result};
use crate::model::gguf::parse::{Gguf, Tensor};
use crate::model::mapping::Mapping;
use crate::model::params::{Extent, OptionalParams};
use crate::model::weights::{LayerParam, Param, WeightSource};

/// The model's weights in a mapped GGUF file.
pub struct GgufWeights {
    mapping: Arc<Mapping>,
    tensors: HashMap<Param, Extent>,
    total: u64,
}

/// A tensor's name in GGUF.
fn tensor_name(param: Param) -> String {
    let (layer, param) = match param {
        Param::Embedding => return "token_embd.weight".into(),
        Param::FinalNorm => return "output_norm.weight".into(),
        Param::LmHead => return "output.weight".into(),
        Param::Layer(layer, param) => (layer, param),
    };
    let name = match param {
        LayerParam::AttentionNorm => "attn_norm.weight",
        LayerParam::Q => "attn_q.weight",
        LayerParam::K => "attn_k.weight",
        LayerParam::V => "attn_v.weight",
        LayerParam::QBias => "attn_q.bias",
        LayerParam::KBias => "attn_k.bias",
        LayerParam::VBias => "attn_v.bias",
        LayerParam::QNorm => "attn_q_norm.weight",
        LayerParam::KNorm => "attn_k_norm.weight",
        LayerParam::O => "attn_output.weight",
        LayerParam::OBias => "attn_output.bias",
        LayerParam::MlpNorm => "ffn_norm.weight",
        LayerParam::Gate => "ffn_gate.weight",
        LayerParam::Up => "ffn_up.weight",
        LayerParam::Down => "ffn_down.weight",
        LayerParam::GateBias => "ffn_gate.bias",
        LayerParam::UpBias => "ffn_up.bias",
        LayerParam::DownBias => "ffn_down.bias",
    };
    format!("blk.{layer}.{name}")
}

impl GgufWeights {
    /// Checks every tensor of `gguf`, which was parsed from `mapping`, against
    /// the configuration.
    pub fn new(mapping: Arc<Mapping>, gguf: &Gguf<'_>, config: &ModelConfig, params: OptionalParams) -> Result<Self> {
        let (tensors, total) = check_all(gguf, config, params)?;
        Ok(Self { mapping, tensors, total })
    }
}

impl WeightSource for GgufWeights {
    fn get(&self, param: Param) -> Option<RawTensor<'_>> {
        self.tensors.get(&param)?.of(&self.mapping)
    }

    fn release(&self, param: Param) {
        if let Some(extent) = self.tensors.get(&param) {
            self.mapping.release(extent.start, extent.len);
        }
    }

    fn total_bytes(&self) -> u64 {
        self.total
    }
}

/// Finds and checks every parameter; refuses tensors whose absence from the
/// computation would make another model.
pub(crate) fn check_all(
    gguf: &Gguf<'_>,
    config: &ModelConfig,
    params: OptionalParams,
) -> Result<(HashMap<Param, Extent>, u64)> {
    let mut tensors = HashMap::new();
    let mut total = 0u64;
    let mut used: HashSet<&str> = HashSet::from(["rope_freqs.weight"]);
    for (param, shape) in params.all(config) {
        let name = tensor_name(param);
        let Some(tensor) = gguf.tensor(&name) else {
            return Err(ModelError::tensor(gguf.file, name, "missing"));
        };
        let extent = check(gguf.file, tensor, shape)?;
        total += extent.len as u64;
        used.insert(tensor.name);
        tensors.insert(param, extent);
    }
    for tensor in &gguf.tensors {
        if used.contains(tensor.name) {
            continue;
        }
        let layer = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        if layer.is_some() || tensor.name.ends_with(".bias") || tensor.name.contains("norm") {
            let problem = "the metadata says that the model has no such tensor";
            return Err(ModelError::tensor(gguf.file, tensor.name, problem));
        }
        tracing::debug!(file = gguf.file, tensor = tensor.name, "ignored: not a parameter of this model");
    }
    Ok((tensors, total))
}

fn check(file: &str, tensor: &Tensor<'_>, (rows, cols): (usize, usize)) -> Result<Extent> {
    let (Some(dtype), Some(len)) = (tensor.dtype(), tensor.len) else {
        let problem = format!(
            "type {} is not supported; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K are",
            tensor.kind_name()
        );
        return Err(ModelError::tensor(file, tensor.name, problem));
    };
    let fits = match *tensor.dims.as_slice() {
        [c] => rows == 1 && c == cols,
        [c, r] => r == rows && c == cols,
        _ => false,
    };
    if !fits {
        let wanted = if rows == 1 { format!("[{cols}]") } else { format!("[{cols}, {rows}]") };
        let problem = format!("shape {:?}, but the metadata ask for {wanted} (inner first)", tensor.dims);
        return Err(ModelError::tensor(file, tensor.name, problem));
    }
    Ok(Extent { dtype, rows, cols, start: tensor.start, len })
}
