//! `config.json` and `generation_config.json` as Hugging Face's transformers
//! writes them (both its fourth and its fifth version's spelling).

mod quantization;

use serde_json::Value;

use crate::device::{AttentionShape, Rope};
use crate::model::config::{Family, ModelConfig};
use crate::model::error::Result;
use crate::model::fields::{Fields, show};
use crate::model::params::OptionalParams;
use crate::model::rope::{self, RopeScaling};

pub use quantization::check_modelopt;

/// Largest layer count that is believed.
pub(crate) const MAX_LAYERS: usize = 4096;
/// Largest width, vocabulary or context that is believed; products of two of
/// them fit u64 with room for a dtype.
pub(crate) const MAX_DIM: usize = 1 << 28;
/// Largest head that is believed.
pub(crate) const MAX_HEAD_DIM: usize = 8192;

/// Sampling defaults that a model's author recommends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sample at all; `false` means greedy.
    pub do_sample: Option<bool>,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Keep the k likeliest.
    pub top_k: Option<u32>,
    /// Keep tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// What `config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    /// What the transformer needs.
    pub model: ModelConfig,
    /// Which biases and head norms the files must have.
    pub params: OptionalParams,
    /// How the rotary embedding was stretched, for people.
    pub scaling: RopeScaling,
}

/// Fields that are read below, or that have no bearing on the mathematics.
const KNOWN: &[&str] = &[
    // read
    "architectures",
    "model_type",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
    "quantization_config",
    // inert at inference
    "pad_token_id",
    "attention_dropout",
    "hidden_dropout",
    "initializer_range",
    "use_cache",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "pretraining_tp",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "is_llama_config",
    "scale_embeddings_init",
];

/// Parts of names that speak of mathematics: a field with one of them that is
/// not known and not off is refused rather than ignored.
const SUSPECT: &[&str] = &[
    "expert",
    "moe",
    "softcap",
    "rope",
    "rotary",
    "alibi",
    "clip_qkv",
    "qk_norm",
    "qk_layernorm",
    "norm_type",
    "multiplier",
    "scaling",
    "scale_",
    "_scale",
    "sliding",
    "window",
    "bias",
    "quant",
    "parallel",
    "mamba",
    "linear_attn",
    "kv_lora",
    "cross_attention",
    "altup",
    "num_kv_shared",
];

/// Reads `config.json` (and the ids that end a text from
/// `generation_config.json`, which wins where it names any).
pub fn parse(config: &Value, generation: Option<&Value>) -> Result<HfConfig> {
    let fields = Fields::new("config.json", config)?;
    let family = family(&fields)?;
    refuse_unknown(&fields)?;

    let act = fields.string("hidden_act")?.unwrap_or("silu");
    if !matches!(act, "silu" | "swish") {
        return Err(fields.error("hidden_act", format!("\"{act}\" is not supported; only \"silu\" is")));
    }
    quantization::check(&fields)?;

    let required = |name: &str, limit| fields.required(name, fields.count(name, limit)?);
    let layers = required("num_hidden_layers", MAX_LAYERS)?;
    let hidden = required("hidden_size", MAX_DIM)?;
    let ffn = required("intermediate_size", MAX_DIM)?;
    let vocab = required("vocab_size", MAX_DIM)?;
    let attention = attention(&fields, family, hidden)?;
    let max_positions = required("max_position_embeddings", MAX_DIM)?;
    let norm_eps = fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32;
    let (rope, scaling) = rotary(&fields, attention.head_dim, max_positions)?;
    let max_positions = match scaling {
        RopeScaling::Yarn { factor, original, .. } => {
            max_positions.max((factor * original).clamp(1.0, MAX_DIM as f64) as usize)
        }
        _ => max_positions,
    };

    Ok(HfConfig {
        params: optional_params(&fields, family)?,
        model: ModelConfig {
            family,
            layers,
            hidden,
            attention,
            ffn,
            vocab,
            norm_eps,
            rope,
            max_positions,
            tied_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            windows: windows(&fields, family, layers)?,
            eos: eos(&fields, generation, family, vocab)?,
            bos: bos(&fields, family, vocab)?,
        },
        scaling,
    })
}

/// Reads `generation_config.json`.
pub fn parse_generation(generation: &Value) -> Result<GenerationDefaults> {
    let fields = Fields::new("generation_config.json", generation)?;
    let number = |name: &str| fields.number(name).map(|x| x.map(|x| x as f32));
    let top_k = match fields.raw("top_k").and_then(Value::as_i64) {
        Some(k) if k <= 0 => Some(0),
        _ => fields.count("top_k", u32::MAX as usize)?.map(|k| k as u32),
    };
    Ok(GenerationDefaults {
        do_sample: fields.bool("do_sample")?,
        temperature: number("temperature")?,
        top_p: number("top_p")?,
        top_k,
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
    })
}

fn family(fields: &Fields<'_>) -> Result<Family> {
    const FAMILIES: [(&str, &str, Family); 4] = [
        ("llama", "LlamaForCausalLM", Family::Llama),
        ("mistral", "MistralForCausalLM", Family::Mistral),
        ("qwen2", "Qwen2ForCausalLM", Family::Qwen2),
        ("qwen3", "Qwen3ForCausalLM", Family::Qwen3),
    ];
    let supported = || FAMILIES.map(|f| f.0).join(", ");
    let architecture = match fields.raw("architectures") {
        None => None,
        Some(Value::Array(list)) if list.len() == 1 && list[0].is_string() => list[0].as_str(),
        Some(other) => {
            let problem = format!("expected a list of one architecture, found {}", show(other));
            return Err(fields.error("architectures", problem));
        }
    };
    let known = architecture.map(|name| {
        FAMILIES.iter().find(|f| f.1 == name).ok_or_else(|| {
            let problem = format!("\"{name}\" is not supported; {} are", FAMILIES.map(|f| f.1).join(", "));
            fields.error("architectures", problem)
        })
    });
    let by_architecture = known.transpose()?;
    match fields.string("model_type")? {
        None => by_architecture.map(|f| f.2).ok_or_else(|| fields.error("model_type", "missing")),
        Some(kind) => {
            let found = FAMILIES.iter().find(|f| f.0 == kind).ok_or_else(|| {
                fields.error("model_type", format!("\"{kind}\" is not supported; {} are", supported()))
            })?;
            match by_architecture {
                Some(other) if other.2 != found.2 => {
                    Err(fields
                        .error("architectures", format!("[\"{}\"] does not go with model_type \"{kind}\"", other.1)))
                }
                _ => Ok(found.2),
            }
        }
    }
}

fn refuse_unknown(fields: &Fields<'_>) -> Result<()> {
    for (name, value) in fields.iter() {
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        if off || KNOWN.contains(&name) {
            continue;
        }
        if SUSPECT.iter().any(|part| name.contains(part)) {
            let problem = format!("{} is not supported: it may change what the model computes", show(value));
            return Err(fields.error(name, problem));
        }
        tracing::debug!(field = name, value = %show(value), "config.json: unknown field ignored");
    }
    Ok(())
}

fn attention(fields: &Fields<'_>, family: Family, hidden: usize) -> Result<AttentionShape> {
    let heads = fields.required("num_attention_heads", fields.count("num_attention_heads", MAX_DIM)?)?;
    let kv_heads = match fields.count("num_key_value_heads", MAX_DIM)? {
        Some(n) => n,
        None if fields.has("num_key_value_heads") => heads,
        // The classes' own defaults.
        None => match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
        },
    };
    if heads % kv_heads != 0 {
        let problem = format!("{kv_heads} does not divide num_attention_heads ({heads})");
        return Err(fields.error("num_key_value_heads", problem));
    }
    let head_dim = match fields.count("head_dim", MAX_HEAD_DIM)? {
        Some(dim) => dim,
        None if family == Family::Qwen3 => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let problem = format!("{heads} does not divide hidden_size ({hidden}) and there is no head_dim");
            return Err(fields.error("num_attention_heads", problem));
        }
    };
    if head_dim == 0 || head_dim > MAX_HEAD_DIM || head_dim % 2 != 0 {
        let problem =
            format!("{head_dim} is not an even number from 2 to {MAX_HEAD_DIM}: rotary embeddings need pairs");
        return Err(fields.error("head_dim", problem));
    }
    if heads.checked_mul(head_dim).is_none_or(|width| width > MAX_DIM) {
        return Err(fields.error("num_attention_heads", format!("{heads} heads of {head_dim} are too wide")));
    }
    Ok(AttentionShape { heads, kv_heads, head_dim, scale: (head_dim as f64).powf(-0.5) as f32 })
}

fn optional_params(fields: &Fields<'_>, family: Family) -> Result<OptionalParams> {
    let attention_bias = fields.bool("attention_bias")?;
    let mlp_bias = fields.bool("mlp_bias")?;
    let unsupported = |name: &str, value: bool| {
        Err(fields.error(name, format!("{value} does not go with this model_type, whose biases are fixed")))
    };
    match (family, attention_bias, mlp_bias) {
        (Family::Mistral, Some(true), _) => return unsupported("attention_bias", true),
        (Family::Qwen2, Some(false), _) => return unsupported("attention_bias", false),
        (Family::Mistral | Family::Qwen2 | Family::Qwen3, _, Some(true)) => return unsupported("mlp_bias", true),
        _ => {}
    }
    let bias = attention_bias.unwrap_or(false);
    Ok(OptionalParams {
        qkv_bias: family == Family::Qwen2 || bias,
        o_bias: family != Family::Qwen2 && bias,
        mlp_bias: mlp_bias.unwrap_or(false),
        qk_norm: family == Family::Qwen3,
    })
}

fn windows(fields: &Fields<'_>, family: Family, layers: usize) -> Result<Vec<Option<u32>>> {
    let window = fields.count("sliding_window", u32::MAX as usize)?.map(|w| w as u32);
    let types = layer_types(fields, layers)?;
    match family {
        Family::Llama => {
            if window.is_some() {
                return Err(fields.error("sliding_window", "not supported for model_type \"llama\""));
            }
            if types.is_some_and(|t| t.contains(&true)) {
                return Err(fields.error("layer_types", "sliding attention does not go with model_type \"llama\""));
            }
            Ok(Vec::new())
        }
        Family::Mistral => {
            // Absent is not null: the class has a window of 4096 by default.
            let window = if fields.has("sliding_window") { window } else { Some(4096) };
            if types.is_some_and(|t| t.iter().any(|sliding| *sliding != window.is_some())) {
                return Err(fields.error("layer_types", "mixed attention does not go with model_type \"mistral\""));
            }
            Ok(window.map_or(Vec::new(), |w| vec![Some(w); layers]))
        }
        Family::Qwen2 | Family::Qwen3 => {
            let on = fields.bool("use_sliding_window")?.unwrap_or(false);
            let window = if fields.has("sliding_window") { window } else { Some(4096) };
            match window.filter(|_| on) {
                None if types.as_ref().is_some_and(|t| t.contains(&true)) => {
                    Err(fields.error("layer_types", "has sliding_attention, but use_sliding_window is not true"))
                }
                None => Ok(Vec::new()),
                Some(window) => Ok(match types {
                    Some(types) => types.into_iter().map(|sliding| sliding.then_some(window)).collect(),
                    None => {
                        let full = match fields.raw("max_window_layers").and_then(Value::as_u64) {
                            Some(0) => 0,
                            _ => fields.count("max_window_layers", MAX_DIM)?.unwrap_or(28),
                        };
                        (0..layers).map(|layer| (layer >= full).then_some(window)).collect()
                    }
                }),
            }
        }
    }
}

/// Whether each layer's attention slides, where `layer_types` says so.
fn layer_types(fields: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>> {
    let list = match fields.raw("layer_types") {
        None => return Ok(None),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(fields.error("layer_types", format!("expected a list, found {}", show(other)))),
    };
    if list.len() != layers {
        return Err(fields.error("layer_types", format!("{} entries for {layers} layers", list.len())));
    }
    let types = list.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(fields.error("layer_types", format!("{} is not supported", show(kind)))),
    });
    types.collect::<Result<_>>().map(Some)
}

fn rotary(fields: &Fields<'_>, head_dim: usize, max_positions: usize) -> Result<(Rope, RopeScaling)> {
    let name = if fields.raw("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let inner = fields.object(name)?;
    let theta = match inner.as_ref().map(|f| f.positive("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => fields.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    if theta <= 1.0 {
        return Err(fields.error("rope_theta", format!("expected a number above 1, found {theta}")));
    }
    for rope in [Some(fields), inner.as_ref()].into_iter().flatten() {
        if let Some(part) = rope.number("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            let problem = format!("{part}: partial rotary embeddings are not supported");
            return Err(rope.error("partial_rotary_factor", problem));
        }
    }
    let scaling = match &inner {
        None => RopeScaling::Default,
        Some(inner) => scaling(fields, inner, max_positions)?,
    };
    Ok((rope::resolve(theta, head_dim, &scaling, false), scaling))
}

fn scaling(fields: &Fields<'_>, inner: &Fields<'_>, max_positions: usize) -> Result<RopeScaling> {
    let kind = match inner.string("rope_type")? {
        Some(kind) => kind,
        None => inner.string("type")?.unwrap_or("default"),
    };
    let used: &[&str] = match kind {
        "default" => &[],
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "beta_fast",
            "beta_slow",
            "truncate",
        ],
        other => {
            let problem = format!("\"{other}\" is not supported; default, linear, llama3 and yarn are");
            return Err(inner.error(if inner.has("rope_type") { "rope_type" } else { "type" }, problem));
        }
    };
    const ALWAYS: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"];
    for (name, value) in inner.iter().filter(|(_, v)| !v.is_null()) {
        if !used.contains(&name) && !ALWAYS.contains(&name) {
            return Err(inner.error(name, format!("{} has no meaning for rope type \"{kind}\"", show(value))));
        }
    }
    let positive = |name: &str| inner.required(name, inner.positive(name)?);
    // The context before stretching: the outer field wins over the inner one.
    let original = || -> Result<f64> {
        let outer = fields.count("original_max_position_embeddings", MAX_DIM)?;
        let inner = inner.count("original_max_position_embeddings", MAX_DIM)?;
        Ok(outer.or(inner).unwrap_or(max_positions) as f64)
    };
    Ok(match kind {
        "linear" => RopeScaling::Linear { factor: positive("factor")? },
        "llama3" => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            if high <= low {
                return Err(inner.error("high_freq_factor", format!("{high} is not above low_freq_factor ({low})")));
            }
            RopeScaling::Llama3 { factor: positive("factor")?, low, high, original: original()? }
        }
        "yarn" => {
            let original = original()?;
            let factor = inner.positive("factor")?.unwrap_or(max_positions as f64 / original);
            let nonzero = |name: &str| inner.number(name).map(|x| x.filter(|x| *x != 0.0));
            let attention_factor = match inner.positive("attention_factor")? {
                Some(given) => given,
                None => match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
                    (Some(mscale), Some(all)) => rope::yarn_mscale(factor, mscale) / rope::yarn_mscale(factor, all),
                    _ => rope::yarn_mscale(factor, 1.0),
                },
            };
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                original,
                truncate: inner.bool("truncate")?.unwrap_or(true),
            }
        }
        _ => RopeScaling::Default,
    })
}

fn eos(fields: &Fields<'_>, generation: Option<&Value>, family: Family, vocab: usize) -> Result<Vec<u32>> {
    let generation = generation.map(|g| Fields::new("generation_config.json", g)).transpose()?;
    for source in [generation.as_ref(), Some(fields)].into_iter().flatten() {
        if let Some(ids) = source.tokens("eos_token_id")? {
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                return Err(source.error("eos_token_id", format!("{id} is not in the vocabulary of {vocab}")));
            }
            return Ok(ids);
        }
    }
    Ok(class_default(fields, "eos_token_id", family, 2, vocab).into_iter().collect())
}

fn bos(fields: &Fields<'_>, family: Family, vocab: usize) -> Result<Option<u32>> {
    match fields.tokens("bos_token_id")?.as_deref() {
        None => Ok(class_default(fields, "bos_token_id", family, 1, vocab)),
        Some(&[id]) if (id as usize) < vocab => Ok(Some(id)),
        Some(ids) => {
            Err(fields.error("bos_token_id", format!("{ids:?} is not one id below the vocabulary of {vocab}")))
        }
    }
}

/// Llama and Mistral configurations that name no id mean 1 and 2.
fn class_default(fields: &Fields<'_>, name: &str, family: Family, id: u32, vocab: usize) -> Option<u32> {
    let has_default = matches!(family, Family::Llama | Family::Mistral);
    (has_default && !fields.has(name) && (id as usize) < vocab).then_some(id)
}

#[cfg(test)]
mod tests;
