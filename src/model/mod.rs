//! Models: configuration, weights, tokenizer, chat template, the transformer
//! and the sampler.

pub mod chat;
pub mod config;
pub mod error;
mod fields;
pub mod gguf;
pub mod hf;
pub mod load;
pub mod mapping;
pub mod params;
pub mod rope;
pub mod safetensors;
pub mod sampler;
pub mod synth;
pub mod tokenizer;
pub mod transformer;
pub mod weights;
