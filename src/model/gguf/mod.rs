//! GGUF files: a reader that takes any bytes and gives metadata and tensors or
//! an error, and on top of it the model's configuration and weights.

mod config;
mod parse;
mod source;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub(crate) use config::id as token_id;
pub use config::{GgufConfig, read_config};
pub use parse::{Array, Gguf, Tensor, Value, parse};
pub use source::GgufWeights;

use crate::model::error::Result;
use crate::model::tokenizer::Tokenizer;

/// Checks the bytes of a file, as opening it does: metadata, tensors and
/// tokenizer. Any bytes give a result or an error.
pub fn check_file(file: &str, bytes: &[u8]) -> Result<GgufConfig> {
    let parsed = parse(file, bytes)?;
    let config = read_config(&parsed)?;
    source::check_all(&parsed, &config.model, config.params)?;
    Tokenizer::from_gguf(&parsed)?;
    Ok(config)
}
