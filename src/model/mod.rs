//! Models: configuration, weights, tokenizer, chat template, the transformer
//! and the sampler.

pub mod config;
pub mod sampler;
pub mod transformer;
pub mod weights;
