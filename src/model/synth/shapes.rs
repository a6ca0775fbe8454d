//! Shapes of known models, and two of our own for benchmarks.

use serde_json::{Value, json};

/// Names that [`shape`] knows.
pub const SHAPES: [&str; 5] = ["bench-125m", "bench-500m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b"];

/// `config.json` of the model called `name`.
pub fn shape(name: &str) -> Option<Value> {
    Some(match name {
        "bench-125m" => llama(json!({
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rope_theta": 500000.0, "tie_word_embeddings": false
        })),
        "bench-500m" => llama(json!({
            "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16,
            "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rope_theta": 500000.0, "tie_word_embeddings": false
        })),
        "llama-3.2-1b" => llama(json!({
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": true,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192
            }
        })),
        "llama-3-8b" => llama(json!({
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": false
        })),
        "qwen2.5-0.5b" => json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": true,
            "use_sliding_window": false, "sliding_window": 32768, "max_window_layers": 21
        }),
        _ => return None,
    })
}

fn llama(mut fields: Value) -> Value {
    let common = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "attention_bias": false, "mlp_bias": false
    });
    if let (Some(fields), Value::Object(common)) = (fields.as_object_mut(), common) {
        fields.extend(common);
    }
    fields
}
