//! Opening a model: a Hugging Face directory, a GGUF file, or a directory with
//! one GGUF file in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::model::chat::ChatTemplate;
use crate::model::config::ModelConfig;
use crate::model::error::{ModelError, Result};
use crate::model::gguf::{self, GgufWeights};
use crate::model::hf::{self, GenerationDefaults};
use crate::model::mapping::Mapping;
use crate::model::params::OptionalParams;
use crate::model::rope::RopeScaling;
use crate::model::safetensors::SafetensorsWeights;
use crate::model::tokenizer::Tokenizer;
use crate::model::weights::WeightSource;

/// Everything that a model's files say.
pub struct ModelFiles {
    /// What the transformer needs.
    pub config: ModelConfig,
    /// Which biases and head norms there are.
    pub params: OptionalParams,
    /// How the rotary embedding was stretched, for people.
    pub scaling: RopeScaling,
    /// The weights, mapped.
    pub weights: Arc<dyn WeightSource>,
    /// The tokenizer, where the model has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, where the model has one.
    pub chat: Option<ChatTemplate>,
    /// The file's or directory's name without extension.
    pub name: String,
    /// What the model's author recommends for sampling.
    pub generation: GenerationDefaults,
}

impl ModelFiles {
    /// The chat template, or an error that says that a chat needs one.
    pub fn chat(&self) -> Result<&ChatTemplate> {
        self.chat.as_ref().ok_or_else(|| {
            let problem = format!("{} has none, and a chat needs one; use plain completions", self.name);
            ModelError::Chat(problem)
        })
    }
}

/// Opens the model at `path`. Reads configuration, headers and tokenizer; the
/// weights themselves are read when they are asked for.
pub fn open(path: &Path) -> Result<ModelFiles> {
    let meta = std::fs::metadata(path).map_err(|e| ModelError::io(path, e))?;
    if !meta.is_dir() {
        return open_gguf(path);
    }
    if path.join("config.json").exists() {
        return open_hf(path);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| ModelError::io(path, e))? {
        let file = entry.map_err(|e| ModelError::io(path, e))?.path();
        if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            files.push(file);
        }
    }
    match files.as_slice() {
        [file] => open_gguf(file),
        [] => Err(ModelError::file(&path.display().to_string(), "has neither a config.json nor a .gguf file")),
        _ => {
            let problem = format!("has {} .gguf files; give the path of one of them", files.len());
            Err(ModelError::file(&path.display().to_string(), problem))
        }
    }
}

fn open_hf(dir: &Path) -> Result<ModelFiles> {
    let config = read_json(&dir.join("config.json"))?
        .ok_or_else(|| ModelError::file(&dir.display().to_string(), "has no config.json"))?;
    let generation = read_json(&dir.join("generation_config.json"))?;
    let mut parsed = hf::parse(&config, generation.as_ref())?;
    if let Some(file) = read_json(&dir.join("hf_quant_config.json"))? {
        hf::check_modelopt(&file)?;
    }
    let tokenizer = Tokenizer::open(dir)?;
    if parsed.model.eos.is_empty() {
        // Neither file names an end: the tokenizer's, if the model can say it.
        let eos = tokenizer.as_ref().and_then(Tokenizer::eos);
        parsed.model.eos.extend(eos.filter(|id| (*id as usize) < parsed.model.vocab));
    }
    let weights = SafetensorsWeights::open(dir, &parsed.model, parsed.params)?;
    Ok(ModelFiles {
        config: parsed.model,
        params: parsed.params,
        scaling: parsed.scaling,
        weights: Arc::new(weights),
        tokenizer,
        chat: ChatTemplate::open(dir)?,
        name: name(dir),
        generation: generation.as_ref().map(hf::parse_generation).transpose()?.unwrap_or_default(),
    })
}

fn open_gguf(path: &Path) -> Result<ModelFiles> {
    let mapping = Arc::new(Mapping::open(path)?);
    let parsed = gguf::parse(mapping.name(), mapping.bytes())?;
    let config = gguf::read_config(&parsed)?;
    let weights = GgufWeights::new(mapping.clone(), &parsed, &config.model, config.params)?;
    let tokenizer = Tokenizer::from_gguf(&parsed)?;
    let template = parsed.get("tokenizer.chat_template").and_then(|v| v.as_str());
    let chat = match (template, &tokenizer) {
        (Some(template), Some(tokenizer)) => Some(ChatTemplate::with_tokenizer(mapping.name(), template, tokenizer)?),
        _ => None,
    };
    // The vocabulary's strings are not read again.
    let header = parsed.tensors.iter().map(|t| t.start).min().unwrap_or(mapping.bytes().len());
    mapping.release(0, header);
    Ok(ModelFiles {
        config: config.model,
        params: config.params,
        scaling: config.scaling,
        weights: Arc::new(weights),
        tokenizer,
        chat,
        name: name(path),
        generation: GenerationDefaults::default(),
    })
}

/// A JSON file; `None` where there is none.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| ModelError::file(&path.display().to_string(), format!("not valid JSON: {e}"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ModelError::io(path, e)),
    }
}

fn name(path: &Path) -> String {
    // A path such as `.` has no name of its own.
    let whole: PathBuf = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if whole.is_dir() { whole.file_name() } else { whole.file_stem() };
    name.map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
