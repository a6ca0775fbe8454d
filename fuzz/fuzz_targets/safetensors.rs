//! A safetensors file of any bytes: opening it gives weights or an error.

#![no_main]

use std::sync::LazyLock;

use distkv::model::hf::{self, HfConfig};
use libfuzzer_sys::fuzz_target;

/// A model small enough for a fuzzer to come upon its tensors.
static CONFIG: LazyLock<HfConfig> = LazyLock::new(|| {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 4,
        "max_position_embeddings": 16, "tie_word_embeddings": true
    });
    hf::parse(&config, None).expect("a valid configuration")
});

fuzz_target!(|bytes: &[u8]| {
    let _ = distkv::model::safetensors::check_file("fuzz", bytes, &CONFIG.model, CONFIG.params);
});
