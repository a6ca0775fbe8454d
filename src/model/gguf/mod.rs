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
