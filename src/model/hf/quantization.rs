//! What `config.json` says of quantised weights (`quantization_config`): FP8 as the
//! tools write it that such checkpoints come from, everything else is refused.
//!
//! | `quant_method` | written by | scales of a weight |
//! |---|---|---|
//! | `fp8` | DeepSeek-V3, Qwen3-*-FP8; transformers (fine-grained FP8) | `weight_scale_inv`, one for 128 × 128 or for all |
//! | `fp8` | AutoFP8 | `weight_scale`, one for all |
//! | `fbgemm_fp8` | transformers with FBGEMM (Llama-3.1-405B-Instruct-FP8) | `weight_scale`, one a row |
//! | `compressed-tensors` | llm-compressor (RedHatAI's) | `weight_scale`, one for all, a row, or 128 × 128 |
//! | `modelopt` | NVIDIA's Model Optimizer | `weight_scale`, one for all, a row, or 128 × 128 |
//!
//! In all of them a value is code times scale (`_inv` too), and what is not
//! quantised lies in the file in its own type, so which layers are left out
//! (`ignore`, `modules_to_not_convert`) is read off the tensors. Activations stay
//! as wide as they are here, whatever the file says of rounding them
//! (`activation_scheme`, `input_activations`, `input_scale`), and so do keys and
//! values (`kv_cache_scheme`, `k_scale`): both only make FP8 of values that are
//! more exact without it.

use serde_json::Value;

use crate::model::error::Result;
use crate::model::fields::{Fields, show};

/// Rows and columns of a block that scales are for.
const BLOCK: u64 = 128;

pub(super) fn check(fields: &Fields<'_>) -> Result<()> {
    let Some(config) = fields.object("quantization_config")? else { return Ok(()) };
    match config.required("quant_method", config.string("quant_method")?)? {
        "fp8" => fp8(&config),
        "fbgemm_fp8" => Ok(()),
        "compressed-tensors" => compressed_tensors(&config),
        "modelopt" => algorithm(&config),
        other => {
            let problem = format!(
                "\"{other}\" is not supported; fp8, fbgemm_fp8, compressed-tensors and modelopt are, with FP8 weights \
                 (GGUF has other quantised weights)"
            );
            Err(config.error("quant_method", problem))
        }
    }
}

/// Checks `hf_quant_config.json`, in which older versions of NVIDIA's Model
/// Optimizer say what newer ones write into `config.json`.
pub fn check_modelopt(file: &Value) -> Result<()> {
    let fields = Fields::new("hf_quant_config.json", file)?;
    match fields.object("quantization")? {
        Some(inner) => algorithm(&inner),
        None => Err(fields.error("quantization", "missing")),
    }
}

fn fp8(config: &Fields<'_>) -> Result<()> {
    if let Some(format) = config.string("fmt")?.filter(|f| !f.contains("e4m3")) {
        return Err(config.error("fmt", format!("\"{format}\" is not supported; only \"e4m3\" is")));
    }
    block(config, "weight_block_size")
}

fn compressed_tensors(config: &Fields<'_>) -> Result<()> {
    let format = |fields: &Fields<'_>| match fields.string("format")? {
        None | Some("float-quantized" | "naive-quantized") => Ok(()),
        Some(other) => Err(fields.error("format", format!("\"{other}\" is not supported; only float-quantized is"))),
    };
    format(config)?;
    // Rotations of weights and activations, and weights that are left out.
    for name in ["transform_config", "sparsity_config"] {
        let inert = match config.object(name)? {
            None => true,
            Some(inner) => inner.iter().next().is_none() || inner.string("format").is_ok_and(|f| f == Some("dense")),
        };
        if !inert {
            return Err(config.error(name, "is not supported: it changes what weights mean"));
        }
    }
    let Some(groups) = config.object("config_groups")? else { return Err(config.error("config_groups", "missing")) };
    for (name, _) in groups.iter() {
        let Some(group) = groups.object(name)? else { continue };
        format(&group)?;
        let Some(weights) = group.object("weights")? else { continue };
        let (kind, bits) = (weights.string("type")?, weights.count("num_bits", 64)?);
        if (kind, bits) != (Some("float"), Some(8)) {
            let problem = format!("{bits:?} bits of type {kind:?} are not supported; 8 of type float are");
            return Err(weights.error("num_bits", problem));
        }
        if weights.bool("symmetric")? == Some(false) {
            return Err(weights.error("symmetric", "false is not supported: FP8 has no zero point here"));
        }
        match weights.string("strategy")? {
            Some("tensor" | "channel") => {}
            Some("block") => block(&weights, "block_structure")?,
            other => {
                let problem = format!("{other:?} is not supported; tensor, channel and block are");
                return Err(weights.error("strategy", problem));
            }
        }
    }
    Ok(())
}

fn algorithm(config: &Fields<'_>) -> Result<()> {
    let name = config.required("quant_algo", config.string("quant_algo")?)?;
    match name.to_ascii_uppercase().as_str() {
        "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "FP8_PB_WO" => Ok(()),
        _ => {
            let problem = format!("\"{name}\" is not supported; FP8, FP8_PER_CHANNEL_PER_TOKEN and FP8_PB_WO are");
            Err(config.error("quant_algo", problem))
        }
    }
}

/// Blocks are 128 × 128, or there are none.
fn block(config: &Fields<'_>, name: &str) -> Result<()> {
    match config.raw(name) {
        None => Ok(()),
        Some(Value::Array(sides)) if sides.len() == 2 && sides.iter().all(|s| s.as_u64() == Some(BLOCK)) => Ok(()),
        Some(other) => Err(config.error(name, format!("{} is not supported; [{BLOCK}, {BLOCK}] is", show(other)))),
    }
}
