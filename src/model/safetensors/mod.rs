//! Weights in Hugging Face's safetensors, one file or sharded.

mod scales;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use crate::device::tensor::{DType, RawTensor};
use crate::model::config::ModelConfig;
use crate::model::error::{ModelError, Result};
use crate::model::mapping::Mapping;
use crate::model::params::{Extent, OptionalParams};
use crate::model::weights::{LayerParam, Param, WeightSource};
use scales::OwnScales;

/// The model's weights in mapped safetensors files.
pub struct SafetensorsWeights {
    files: Vec<Mapping>,
    tensors: Places,
    /// Of those in FP8.
    scales: HashMap<Param, OwnScales>,
    total: u64,
}

/// A tensor's name in Hugging Face's checkpoints.
pub fn tensor_name(param: Param) -> String {
    let (layer, param) = match param {
        Param::Embedding => return "model.embed_tokens.weight".into(),
        Param::FinalNorm => return "model.norm.weight".into(),
        Param::LmHead => return "lm_head.weight".into(),
        Param::Layer(layer, param) => (layer, param),
    };
    let name = match param {
        LayerParam::AttentionNorm => "input_layernorm.weight",
        LayerParam::Q => "self_attn.q_proj.weight",
        LayerParam::K => "self_attn.k_proj.weight",
        LayerParam::V => "self_attn.v_proj.weight",
        LayerParam::QBias => "self_attn.q_proj.bias",
        LayerParam::KBias => "self_attn.k_proj.bias",
        LayerParam::VBias => "self_attn.v_proj.bias",
        LayerParam::QNorm => "self_attn.q_norm.weight",
        LayerParam::KNorm => "self_attn.k_norm.weight",
        LayerParam::O => "self_attn.o_proj.weight",
        LayerParam::OBias => "self_attn.o_proj.bias",
        LayerParam::MlpNorm => "post_attention_layernorm.weight",
        LayerParam::Gate => "mlp.gate_proj.weight",
        LayerParam::Up => "mlp.up_proj.weight",
        LayerParam::Down => "mlp.down_proj.weight",
        LayerParam::GateBias => "mlp.gate_proj.bias",
        LayerParam::UpBias => "mlp.up_proj.bias",
        LayerParam::DownBias => "mlp.down_proj.bias",
    };
    format!("model.layers.{layer}.{name}")
}

/// Each parameter's file and place in it.
type Places = HashMap<Param, (usize, Extent)>;

/// A file's name and bytes.
type File<'a> = (&'a str, &'a [u8]);

/// What the files hold of a model. `total` is the bytes of all parameters, without
/// scales.
struct Assigned {
    tensors: Places,
    scales: HashMap<Param, OwnScales>,
    total: u64,
}

/// One tensor of a file: type, shape and byte range in the file.
struct Found {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

impl SafetensorsWeights {
    /// Opens `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists, in `dir`, and checks every tensor
    /// against the configuration.
    pub fn open(dir: &Path, config: &ModelConfig, params: OptionalParams) -> Result<Self> {
        let mut files = Vec::new();
        let mut found = HashMap::new();
        for path in weight_files(dir)? {
            let mapping = Mapping::open(&path)?;
            list(&mapping, files.len(), &mut found)?;
            files.push(mapping);
        }
        let all: Vec<File<'_>> = files.iter().map(|f| (f.name(), f.bytes())).collect();
        let Assigned { tensors, scales, total } = assign(&all, found, config, params)?;
        Ok(Self { files, tensors, scales, total })
    }
}

impl WeightSource for SafetensorsWeights {
    fn get(&self, param: Param) -> Option<RawTensor<'_>> {
        let (file, extent) = self.tensors.get(&param)?;
        let tensor = extent.of(self.files.get(*file)?)?;
        Some(RawTensor { scales: self.scales.get(&param).map(OwnScales::view), ..tensor })
    }

    fn release(&self, param: Param) {
        if let Some((file, extent)) = self.tensors.get(&param) {
            self.files[*file].release(extent.start, extent.len);
        }
    }

    fn total_bytes(&self) -> u64 {
        self.total
    }
}

/// The files of a checkpoint, without repetition.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    let name = index.display().to_string();
    let text = match std::fs::read(&index) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let problem = "has neither model.safetensors nor model.safetensors.index.json";
            return Err(ModelError::file(&dir.display().to_string(), problem));
        }
        Err(e) => return Err(ModelError::io(&index, e)),
    };
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| ModelError::file(&name, format!("not valid JSON: {e}")))?;
    let map = json.get("weight_map").and_then(|m| m.as_object());
    let map = map.ok_or_else(|| ModelError::field(&name, "weight_map", "missing or not an object"))?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().filter(|s| !s.is_empty() && !s.contains('/') && !s.contains('\\') && *s != "..");
        let Some(shard) = shard else {
            return Err(ModelError::tensor(&name, tensor, "its shard is not a plain file name"));
        };
        shards.insert(shard);
    }
    if shards.is_empty() {
        return Err(ModelError::field(&name, "weight_map", "lists no tensor"));
    }
    Ok(shards.into_iter().map(|shard| dir.join(shard)).collect())
}

/// Reads a file's header.
fn list(mapping: &Mapping, file: usize, found: &mut HashMap<String, Found>) -> Result<()> {
    for (name, tensor) in parse_header(mapping.name(), mapping.bytes())? {
        let twice = found.contains_key(&name);
        if twice {
            return Err(ModelError::tensor(mapping.name(), name, "is in more than one shard"));
        }
        found.insert(name, Found { file, ..tensor });
    }
    Ok(())
}

fn parse_header(file: &str, bytes: &[u8]) -> Result<Vec<(String, Found)>> {
    let parsed = SafeTensors::deserialize(bytes)
        .map_err(|e| ModelError::file(file, format!("truncated or not a safetensors file: {e}")))?;
    let base = bytes.as_ptr() as usize;
    let tensors = parsed.iter().map(|(name, view)| {
        let start = view.data().as_ptr() as usize - base;
        let found = Found { file: 0, dtype: view.dtype(), shape: view.shape().to_vec(), start, len: view.data().len() };
        (name.to_owned(), found)
    });
    Ok(tensors.collect())
}

/// Checks the bytes of one file against a configuration, as opening it does;
/// bytes of all parameters. Any bytes give a result or an error.
pub fn check_file(file: &str, bytes: &[u8], config: &ModelConfig, params: OptionalParams) -> Result<u64> {
    let found = parse_header(file, bytes)?.into_iter().collect();
    Ok(assign(&[(file, bytes)], found, config, params)?.total)
}

/// The model's parameters among what was found in `files`: for each its file and
/// where in it, and the scales of those in FP8.
fn assign(
    files: &[File<'_>],
    mut found: HashMap<String, Found>,
    config: &ModelConfig,
    params: OptionalParams,
) -> Result<Assigned> {
    let mut assigned = Assigned { tensors: HashMap::new(), scales: HashMap::new(), total: 0 };
    for (param, shape) in params.all(config) {
        let name = tensor_name(param);
        let Some(tensor) = found.remove(&name) else {
            let at = files.first().map_or("model.safetensors", |(name, _)| name);
            return Err(ModelError::tensor(at, name, "missing"));
        };
        let extent = check(files[tensor.file].0, &name, &tensor, shape, param.is_linear())?;
        if extent.dtype == DType::F8E4m3 {
            assigned.scales.insert(param, scales::take(files, &mut found, &name, tensor.file, shape)?);
        }
        assigned.total += extent.len as u64;
        assigned.tensors.insert(param, (tensor.file, extent));
    }
    for (name, tensor) in &found {
        refuse_unexpected(files[tensor.file].0, name, config)?;
        scales::refuse_unused(files[tensor.file].0, name, &found)?;
    }
    Ok(assigned)
}

fn check(file: &str, name: &str, tensor: &Found, (rows, cols): (usize, usize), linear: bool) -> Result<Extent> {
    let dtype = match tensor.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::Bf16,
        Dtype::F8_E4M3 if linear => DType::F8E4m3,
        other => {
            let fp8 = if linear { ", and F8_E4M3 with scales" } else { "" };
            let problem = format!("type {other:?} is not supported here; F32, F16 and BF16 are{fp8}");
            return Err(ModelError::tensor(file, name, problem));
        }
    };
    let fits = match *tensor.shape.as_slice() {
        [n] => rows == 1 && n == cols,
        [r, c] => r == rows && c == cols,
        _ => false,
    };
    if !fits {
        let wanted = if rows == 1 { format!("[{cols}]") } else { format!("[{rows}, {cols}]") };
        let problem = format!("shape {:?}, but the configuration asks for {wanted}", tensor.shape);
        return Err(ModelError::tensor(file, name, problem));
    }
    if rows.checked_mul(cols).and_then(|n| dtype.bytes(n)) != Some(tensor.len) {
        return Err(ModelError::tensor(file, name, format!("{} bytes do not hold its shape", tensor.len)));
    }
    Ok(Extent { dtype, rows, cols, start: tensor.start, len: tensor.len })
}

/// A tensor that was not asked for is ignored, unless leaving it out would be
/// another model: a bias, a norm, or a layer too many.
fn refuse_unexpected(file: &str, name: &str, config: &ModelConfig) -> Result<()> {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    if layer.is_some_and(|layer| layer >= config.layers) {
        let problem = format!("the configuration has only {} layers (num_hidden_layers)", config.layers);
        return Err(ModelError::tensor(file, name, problem));
    }
    if name.ends_with(".bias") || name.contains("norm") {
        return Err(ModelError::tensor(file, name, "the configuration says that the model has no such tensor"));
    }
    tracing::debug!(file, tensor = name, "ignored: not a parameter of this model");
    Ok(())
}

#[cfg(test)]
mod tests;
