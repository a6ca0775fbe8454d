//! The model's configuration from GGUF metadata.

use crate::device::{AttentionShape, Rope};
use crate::model::config::{Family, ModelConfig};
use crate::model::error::{ModelError, Result};
use crate::model::gguf::parse::{Gguf, Value};
use crate::model::hf::{MAX_DIM, MAX_HEAD_DIM, MAX_LAYERS};
use crate::model::params::OptionalParams;
use crate::model::rope::{self, RopeScaling};

/// What the metadata (and the presence of some tensors) say.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufConfig {
    /// What the transformer needs.
    pub model: ModelConfig,
    /// Which biases and head norms the file has.
    pub params: OptionalParams,
    /// How the rotary embedding was stretched, for people.
    pub scaling: RopeScaling,
}

/// Fields of an architecture that are read below or change nothing.
const KNOWN: &[&str] = &[
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_count",
    "expert_used_count",
    "tensor_data_layout",
];

/// Texts of control tokens that end a turn in the families' chat formats; a
/// GGUF names only one of them as its end.
const TURN_ENDS: &[&str] = &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"];

/// GGUF's number of a control token.
pub(crate) const TOKEN_CONTROL: u64 = 3;

/// One architecture's metadata.
struct Metadata<'g, 'a> {
    gguf: &'g Gguf<'a>,
    arch: &'a str,
}

impl<'a> Metadata<'_, 'a> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn raw(&self, name: &str) -> Option<Value<'a>> {
        self.gguf.get(&self.key(name))
    }

    fn error(&self, name: &str, problem: impl Into<String>) -> ModelError {
        ModelError::field(self.gguf.file, self.key(name), problem)
    }

    fn count(&self, name: &str, limit: usize) -> Result<Option<usize>> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        // Per-layer values are written as an array; ours must all be alike.
        let one = match value {
            Value::Array(array) => {
                let mut values = array.iter();
                let first = values.next();
                if values.any(|v| Some(v) != first) {
                    return Err(self.error(name, "differs between layers, which is not supported"));
                }
                first.and_then(|v| v.as_u64())
            }
            value => value.as_u64(),
        };
        match one.and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=limit).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.error(name, format!("expected a whole number from 1 to {limit}, found {}", show(value)))),
        }
    }

    fn positive(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
            Some(x) => Ok(Some(x)),
            None => Err(self.error(name, format!("expected a number above 0, found {}", show(value)))),
        }
    }

    fn required<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(name, "missing"))
    }
}

fn show(value: Value<'_>) -> String {
    match value {
        Value::Array(array) => format!("an array of {}", array.len()),
        Value::Str(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
        Value::U64(n) => n.to_string(),
        Value::I64(n) => n.to_string(),
        Value::F64(x) => x.to_string(),
        Value::Bool(b) => b.to_string(),
    }
}

/// Reads the configuration. Architectures llama (which is also how Mistral is
/// exported), qwen2 and qwen3.
pub fn read_config(gguf: &Gguf<'_>) -> Result<GgufConfig> {
    let text = |name: &str| gguf.get(name).and_then(|v| v.as_str());
    let arch = text("general.architecture")
        .ok_or_else(|| ModelError::field(gguf.file, "general.architecture", "missing or not text"))?;
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        other => {
            let problem = format!("\"{other}\" is not supported; llama, qwen2 and qwen3 are");
            return Err(ModelError::field(gguf.file, "general.architecture", problem));
        }
    };
    if let Some(kind) = text("general.type").filter(|kind| *kind != "model") {
        return Err(ModelError::field(gguf.file, "general.type", format!("\"{kind}\" is not a model")));
    }
    if let Some(parts) = gguf.get("split.count").and_then(|v| v.as_u64()).filter(|n| *n > 1) {
        let problem = format!("{parts}: the model is split over several files; merge them (llama-gguf-split --merge)");
        return Err(ModelError::field(gguf.file, "split.count", problem));
    }
    let metadata = Metadata { gguf, arch };
    refuse_unknown(&metadata)?;

    let required = |name: &str, limit| metadata.required(name, metadata.count(name, limit)?);
    let layers = required("block_count", MAX_LAYERS)?;
    let hidden = required("embedding_length", MAX_DIM)?;
    let ffn = required("feed_forward_length", MAX_DIM)?;
    let max_positions = required("context_length", MAX_DIM)?;
    let attention = attention(&metadata, hidden)?;
    let norm_eps = metadata.positive("attention.layer_norm_rms_epsilon")?;
    let norm_eps = metadata.required("attention.layer_norm_rms_epsilon", norm_eps)? as f32;
    let (rope, scaling) = rotary(&metadata, attention.head_dim, max_positions)?;

    let embedding = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| ModelError::tensor(gguf.file, "token_embd.weight", "missing"))?;
    let vocab = embedding.dims.get(1).copied().unwrap_or(1);
    if vocab > MAX_DIM {
        return Err(ModelError::tensor(gguf.file, "token_embd.weight", format!("{vocab} rows are too many")));
    }
    if let Some(n) = metadata.count("vocab_size", MAX_DIM)?.filter(|n| *n != vocab) {
        return Err(metadata.error("vocab_size", format!("{n}, but token_embd.weight has {vocab} rows")));
    }
    let (bos, eos) = (id(gguf, "bos", vocab)?, eos(gguf, vocab)?);
    let present = |name: &str| gguf.tensor(&format!("blk.0.{name}")).is_some();
    Ok(GgufConfig {
        params: OptionalParams {
            qkv_bias: family == Family::Qwen2 || present("attn_q.bias"),
            o_bias: present("attn_output.bias"),
            mlp_bias: present("ffn_gate.bias"),
            qk_norm: family == Family::Qwen3,
        },
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
            tied_embeddings: gguf.tensor("output.weight").is_none(),
            windows: Vec::new(),
            eos,
            bos,
        },
        scaling,
    })
}

fn refuse_unknown(metadata: &Metadata<'_, '_>) -> Result<()> {
    let prefix = metadata.key("");
    for (name, value) in &metadata.gguf.fields {
        if let Some(name) = name.strip_prefix(&prefix)
            && !KNOWN.contains(&name)
            && *value != Value::Bool(false)
        {
            let problem = format!("{} is not supported: it may change what the model computes", show(*value));
            return Err(metadata.error(name, problem));
        }
    }
    if let Some(value) = metadata.raw("expert_count").filter(|v| v.as_u64() != Some(0)) {
        let problem = format!("{}: mixtures of experts are not supported", show(value));
        return Err(metadata.error("expert_count", problem));
    }
    if let Some(value) = metadata.raw("attention.sliding_window").filter(|v| v.as_u64() != Some(0)) {
        let problem = format!("{}: sliding windows are not supported in GGUF", show(value));
        return Err(metadata.error("attention.sliding_window", problem));
    }
    if metadata.raw("attention.causal").is_some_and(|v| v.as_bool() != Some(true)) {
        return Err(metadata.error("attention.causal", "only causal models are supported"));
    }
    Ok(())
}

fn attention(metadata: &Metadata<'_, '_>, hidden: usize) -> Result<AttentionShape> {
    let heads = metadata.required("attention.head_count", metadata.count("attention.head_count", MAX_DIM)?)?;
    let kv_heads = metadata.count("attention.head_count_kv", MAX_DIM)?.unwrap_or(heads);
    if heads % kv_heads != 0 {
        let problem = format!("{kv_heads} does not divide head_count ({heads})");
        return Err(metadata.error("attention.head_count_kv", problem));
    }
    let head_dim = match metadata.count("attention.key_length", MAX_HEAD_DIM)? {
        Some(dim) => dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let problem = format!("{heads} does not divide embedding_length ({hidden}) and there is no key_length");
            return Err(metadata.error("attention.head_count", problem));
        }
    };
    if head_dim % 2 != 0 || head_dim == 0 || head_dim > MAX_HEAD_DIM {
        let problem = format!("{head_dim} is not an even number from 2 to {MAX_HEAD_DIM}");
        return Err(metadata.error("attention.key_length", problem));
    }
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = metadata.count(name, MAX_DIM)?.filter(|n| *n != head_dim) {
            return Err(metadata.error(name, format!("{other} differs from the head's {head_dim}: not supported")));
        }
    }
    if heads.checked_mul(head_dim).is_none_or(|width| width > MAX_DIM) {
        return Err(metadata.error("attention.head_count", format!("{heads} heads of {head_dim} are too wide")));
    }
    Ok(AttentionShape { heads, kv_heads, head_dim, scale: (head_dim as f64).powf(-0.5) as f32 })
}

fn rotary(metadata: &Metadata<'_, '_>, head_dim: usize, max_positions: usize) -> Result<(Rope, RopeScaling)> {
    let theta = metadata.positive("rope.freq_base")?.unwrap_or(10_000.0);
    if theta <= 1.0 {
        return Err(metadata.error("rope.freq_base", format!("expected a number above 1, found {theta}")));
    }
    let kind = match metadata.raw("rope.scaling.type") {
        None => None,
        Some(Value::Str(kind)) => Some(kind),
        Some(other) => return Err(metadata.error("rope.scaling.type", format!("expected text, found {}", show(other)))),
    };
    let factor = metadata.positive("rope.scaling.factor")?.or(metadata.positive("rope.scale_linear")?).unwrap_or(1.0);
    let factors = rope_factors(metadata.gguf, head_dim)?;
    let scaling = match (kind, factors) {
        // A factor without a type means linear.
        (None | Some("none" | "linear"), Some(factors)) if kind == Some("none") || factor == 1.0 => {
            RopeScaling::Factors(factors)
        }
        (_, Some(_)) => {
            let problem = "rope_freqs.weight together with another scaling is not supported";
            return Err(metadata.error("rope.scaling.type", problem));
        }
        (Some("none"), None) => RopeScaling::Default,
        (None | Some("linear"), None) if factor == 1.0 => RopeScaling::Default,
        (None | Some("linear"), None) => RopeScaling::Linear { factor },
        (Some("yarn"), None) => RopeScaling::Yarn {
            factor,
            attention_factor: metadata.positive("rope.scaling.attn_factor")?.unwrap_or(1.0)
                * rope::yarn_mscale(factor, 1.0),
            beta_fast: metadata.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: metadata.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            original: metadata.count("rope.scaling.original_context_length", MAX_DIM)?.unwrap_or(max_positions) as f64,
            truncate: true,
        },
        (Some(other), None) => {
            let problem = format!("\"{other}\" is not supported; none, linear and yarn are");
            return Err(metadata.error("rope.scaling.type", problem));
        }
    };
    // The converter permutes Q and K of llama models for interleaved pairs.
    let interleaved = metadata.arch == "llama";
    Ok((rope::resolve(theta, head_dim, &scaling, interleaved), scaling))
}

/// `rope_freqs.weight`: what Llama 3.1's scaling becomes in a GGUF.
fn rope_factors(gguf: &Gguf<'_>, head_dim: usize) -> Result<Option<Vec<f32>>> {
    let Some(tensor) = gguf.tensor("rope_freqs.weight") else { return Ok(None) };
    let error = |problem: String| ModelError::tensor(gguf.file, "rope_freqs.weight", problem);
    if tensor.kind_name() != "F32" || tensor.dims != [head_dim / 2] {
        let problem = format!("is {} {:?}; [{}] of F32 is expected", tensor.kind_name(), tensor.dims, head_dim / 2);
        return Err(error(problem));
    }
    let bytes = tensor.len.and_then(|len| gguf.bytes().get(tensor.start..tensor.start + len));
    let bytes = bytes.ok_or_else(|| error("lies outside the file".into()))?;
    let factors: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    match factors.iter().find(|f| !f.is_finite() || **f <= 0.0) {
        Some(bad) => Err(error(format!("holds {bad}, which is not a divisor"))),
        None => Ok(Some(factors)),
    }
}

/// `tokenizer.ggml.<name>_token_id`.
pub(crate) fn id(gguf: &Gguf<'_>, name: &str, vocab: usize) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(value) = gguf.get(&key) else { return Ok(None) };
    match value.as_u64().filter(|id| *id < vocab as u64) {
        Some(id) => Ok(Some(id as u32)),
        None => {
            let problem = format!("{} is not in the vocabulary of {vocab}", show(value));
            Err(ModelError::field(gguf.file, key, problem))
        }
    }
}

fn eos(gguf: &Gguf<'_>, vocab: usize) -> Result<Vec<u32>> {
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ends.extend(id(gguf, name, vocab)?);
    }
    let array = |name: &str| gguf.get(name).and_then(|v| v.as_array());
    if let (Some(tokens), Some(kinds)) = (array("tokenizer.ggml.tokens"), array("tokenizer.ggml.token_type"))
        && let Some(tokens) = tokens.strings()
    {
        for (id, (text, kind)) in tokens.zip(kinds.iter()).enumerate().take(vocab) {
            if kind.as_u64() == Some(TOKEN_CONTROL) && TURN_ENDS.contains(&text) {
                ends.push(id as u32);
            }
        }
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}
