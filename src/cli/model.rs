//! `distkv model`: what is in a model's files, and models of random weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::builder::PossibleValue;
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::device::tensor::DType;
use crate::kv::rblock::{DEFAULT_BLOCK_TOKENS, KvDtype};
use crate::model::load::{self, ModelFiles};
use crate::model::rope::RopeScaling;
use crate::model::synth::{self, Scaling};

/// Inspects models and makes random ones.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what a model is: family, shape, weights, tokenizer, chat template,
    /// and what a token of its KV costs.
    #[command(
        after_help = "Examples:\n  distkv model inspect SmolLM2-135M-Instruct.Q4_1.gguf\n  distkv model inspect ./Llama-3.2-1B --json"
    )]
    Inspect {
        /// A Hugging Face directory, a .gguf file, or a directory with one.
        path: PathBuf,
        /// One JSON object instead of text.
        #[arg(long, env = "DISTKV_JSON")]
        json: bool,
    },
    /// Writes a model of random weights: any shape, for benchmarks and tests.
    #[command(
        after_help = "Examples:\n  distkv model synth --shape bench-125m --out /tmp/bench\n  distkv model synth --config config.json --seed 7 --dtype f32 --out /tmp/tiny\n  distkv model synth --shape llama-3-8b --dtype fp8-block --out /tmp/fp8"
    )]
    Synth {
        /// A config.json to fill.
        #[arg(long, conflicts_with = "shape", required_unless_present = "shape")]
        config: Option<PathBuf>,
        /// A known shape instead.
        #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(synth::SHAPES))]
        shape: Option<String>,
        /// Same seed, same weights.
        #[arg(long, env = "DISTKV_SEED", default_value_t = 0)]
        seed: u64,
        /// Element type of the weights.
        #[arg(long, env = "DISTKV_DTYPE", value_enum, default_value_t = Dtype::Bf16)]
        dtype: Dtype,
        /// Directory to write; made where it is missing.
        #[arg(long)]
        out: PathBuf,
        /// Copy the tokenizer of this directory instead of writing a toy one.
        #[arg(long)]
        tokenizer: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
    /// Layers in FP8 with a scale a matrix, the rest bf16.
    Fp8,
    /// FP8 with a scale an output feature.
    Fp8Channel,
    /// FP8 with a scale a block of 128 x 128.
    Fp8Block,
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Inspect { path, json } => {
            let report = inspect(&load::open(&path)?);
            if json {
                println!("{report}");
            } else {
                print_report(&report);
            }
            Ok(())
        }
        Command::Synth { config, shape, seed, dtype, out, tokenizer } => {
            let config = match (config, shape) {
                (Some(path), _) => read_config(&path)?,
                (None, Some(name)) => synth::shape(&name).with_context(|| format!("no shape is called {name}"))?,
                (None, None) => bail!("give --config FILE or --shape NAME"),
            };
            let written = match dtype {
                Dtype::F32 => synth::synth_to(&out, &config, seed, DType::F32),
                Dtype::Bf16 => synth::synth_to(&out, &config, seed, DType::Bf16),
                Dtype::F16 => synth::synth_to(&out, &config, seed, DType::F16),
                Dtype::Fp8 => synth::synth_fp8_to(&out, &config, seed, Scaling::Tensor),
                Dtype::Fp8Channel => synth::synth_fp8_to(&out, &config, seed, Scaling::Channel),
                Dtype::Fp8Block => synth::synth_fp8_to(&out, &config, seed, Scaling::Block),
            }?;
            let dtype = dtype.to_possible_value();
            let dtype = dtype.as_ref().map_or("", PossibleValue::get_name);
            match tokenizer {
                Some(from) => copy_tokenizer(&from, &out)?,
                None => synth::write_tokenizer(&out, config["vocab_size"].as_u64().unwrap_or(0) as usize)?,
            }
            println!(
                "{}: {} parameters, {} of {dtype} in {} file(s), seed {seed}",
                out.display(),
                count(written.parameters),
                bytes(written.bytes),
                written.files
            );
            Ok(())
        }
    }
}

fn read_config(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not valid JSON", path.display()))
}

fn copy_tokenizer(from: &Path, to: &Path) -> anyhow::Result<()> {
    const NAMES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"];
    if !from.join(NAMES[0]).exists() {
        bail!("{} has no tokenizer.json", from.display());
    }
    for name in NAMES {
        let (from, to) = (from.join(name), to.join(name));
        if from.exists() {
            std::fs::copy(&from, &to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
        }
    }
    Ok(())
}

/// What `inspect` says, as one JSON object.
pub fn inspect(model: &ModelFiles) -> Value {
    let config = &model.config;
    let mut types: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut parameters = 0u64;
    for (param, (rows, cols)) in model.params.all(config) {
        if let Some(tensor) = model.weights.get(param) {
            let entry = types.entry(tensor.dtype.to_string()).or_default();
            entry.0 += 1;
            entry.1 += tensor.bytes.len() as u64;
            parameters += rows as u64 * cols as u64;
        }
    }
    let types: serde_json::Map<String, Value> =
        types.into_iter().map(|(name, (tensors, bytes))| (name, json!({"tensors": tensors, "bytes": bytes}))).collect();
    let windows = config.windows.iter().flatten().count();
    let rope = match &model.scaling {
        RopeScaling::Default => "default",
        RopeScaling::Linear { .. } => "linear",
        RopeScaling::Llama3 { .. } => "llama3",
        RopeScaling::Yarn { .. } => "yarn",
        RopeScaling::Factors(_) => "factors",
    };
    json!({
        "name": model.name,
        "family": format!("{:?}", config.family).to_lowercase(),
        "parameters": parameters,
        "weight_bytes": model.weights.total_bytes(),
        "weights": types,
        "layers": config.layers,
        "hidden": config.hidden,
        "heads": config.attention.heads,
        "kv_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "ffn": config.ffn,
        "vocab": config.vocab,
        "max_positions": config.max_positions,
        "tied_embeddings": config.tied_embeddings,
        "qkv_bias": model.params.qkv_bias,
        "o_bias": model.params.o_bias,
        "mlp_bias": model.params.mlp_bias,
        "qk_norm": model.params.qk_norm,
        "rope": rope,
        "sliding_layers": windows,
        "sliding_window": config.windows.iter().flatten().next(),
        "kv_bytes_per_token": config.kv_shape(DEFAULT_BLOCK_TOKENS, KvDtype::Bf16).token_bytes(),
        "tokenizer": model.tokenizer.as_ref().map(|t| t.vocab_size()),
        "chat_template": model.chat.is_some(),
        "bos": config.bos,
        "eos": config.eos,
    })
}

fn print_report(report: &Value) {
    let number = |name: &str| report[name].as_u64().unwrap_or(0);
    let yes = |name: &str| report[name].as_bool() == Some(true);
    let line = |name: &str, text: String| println!("{name:<10} {text}");
    line("name", report["name"].as_str().unwrap_or_default().to_owned());
    line("family", report["family"].as_str().unwrap_or_default().to_owned());
    line("weights", format!("{} parameters, {}", count(number("parameters")), bytes(number("weight_bytes"))));
    for (name, entry) in report["weights"].as_object().into_iter().flatten() {
        let size = bytes(entry["bytes"].as_u64().unwrap_or(0));
        line("", format!("{name}: {} tensors, {size}", entry["tensors"]));
    }
    line("shape", format!("{} layers, hidden {}, ffn {}", report["layers"], report["hidden"], report["ffn"]));
    let heads = format!("{} heads, {} KV heads of {}", report["heads"], report["kv_heads"], report["head_dim"]);
    line("attention", heads);
    let mut options = vec![format!("rope {}", report["rope"].as_str().unwrap_or_default())];
    for (name, text) in [
        ("tied_embeddings", "tied embeddings"),
        ("qkv_bias", "Q, K and V biases"),
        ("o_bias", "output bias"),
        ("mlp_bias", "feed-forward biases"),
        ("qk_norm", "Q and K norms"),
    ] {
        if yes(name) {
            options.push(text.to_owned());
        }
    }
    if number("sliding_layers") > 0 {
        options.push(format!("window {} in {} layers", report["sliding_window"], report["sliding_layers"]));
    }
    line("options", options.join(", "));
    line("context", format!("{} tokens", report["max_positions"]));
    line("KV", format!("{} a token in bf16", bytes(number("kv_bytes_per_token"))));
    let tokens = match report["tokenizer"].as_u64() {
        Some(n) => format!("{n} tokens"),
        None => "none".to_owned(),
    };
    line("tokenizer", format!("{tokens}; the model has {}; ends with {}", report["vocab"], report["eos"]));
    line("chat", if yes("chat_template") { "has a template" } else { "has no template" }.to_owned());
}

fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.1}M", n as f64 / 1e6),
        _ => format!("{:.2}B", n as f64 / 1e9),
    }
}

fn bytes(n: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn command(words: &[&str]) -> anyhow::Result<()> {
        run(Cli::try_parse_from([&["distkv"], words].concat())?.args)
    }

    #[test]
    fn synth_writes_what_inspect_reads() {
        Cli::command().debug_assert();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = json!({
            "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
            "sliding_window": 16
        });
        std::fs::write(at("config.json"), config.to_string()).unwrap();
        command(&["synth", "--config", &at("config.json"), "--dtype", "f16", "--out", &at("a")]).unwrap();
        command(&["inspect", &at("a")]).unwrap();
        let report = inspect(&load::open(Path::new(&at("a"))).unwrap());
        assert_eq!(report["family"], "mistral");
        assert_eq!(report["sliding_layers"], 2);
        assert_eq!(report["kv_bytes_per_token"], 2 * 2 * 2 * 8 * 2);
        assert_eq!(report["weight_bytes"], report["weights"]["f16"]["bytes"]);
        assert_eq!(report["parameters"].as_u64().unwrap() * 2, report["weight_bytes"].as_u64().unwrap());
        assert_eq!((&report["tokenizer"], &report["chat_template"]), (&json!(300), &json!(true)));

        command(&["synth", "--config", &at("config.json"), "--out", &at("b"), "--tokenizer", &at("a")]).unwrap();
        assert_eq!(std::fs::read(at("a/tokenizer.json")).unwrap(), std::fs::read(at("b/tokenizer.json")).unwrap());
    }

    #[test]
    fn wrong_arguments_say_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().display().to_string();
        let said = |words: &[&str]| command(words).unwrap_err().to_string();
        assert!(said(&["synth", "--shape", "gpt-9", "--out", &out]).contains("bench-125m"));
        assert!(said(&["synth", "--out", &out]).contains("--config"));
        assert!(said(&["synth", "--config", "no-such-file", "--out", &out]).contains("no-such-file"));
        assert!(said(&["inspect", "no-such-model"]).contains("no-such-model"));
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!([bytes(10), bytes(1536), bytes(5 << 30)], ["10 B", "1.5 KiB", "5.0 GiB"]);
        assert_eq!([count(999), count(134_515_008), count(8_030_261_248)], ["999", "134.5M", "8.03B"]);
    }
}
