use serde_json::json;

use super::*;
use crate::device::tensor::DType;
use crate::model::gguf::testing::{Field, write};
use crate::model::synth;

fn refused(path: &Path) -> String {
    open(path).err().expect("refused").to_string()
}

#[test]
fn a_directory_is_searched_for_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    assert!(refused(&path.join("nothing")).contains("nothing: "));
    assert!(refused(path).contains("neither a config.json nor a .gguf file"));

    let gguf = write(&[("general.architecture", Field::Str("mamba"))], &[]);
    std::fs::write(path.join("a.gguf"), &gguf).unwrap();
    let error = refused(path);
    assert!(error.contains("a.gguf: `general.architecture`: \"mamba\""), "{error}");
    assert_eq!(error, refused(&path.join("a.gguf")));
    std::fs::write(path.join("b.GGUF"), &gguf).unwrap();
    assert!(refused(path).contains("has 2 .gguf files"));

    std::fs::write(path.join("config.json"), "{\"model_type\": ").unwrap();
    assert!(refused(path).contains("config.json: not valid JSON"));
}

#[test]
fn files_that_are_no_model_are_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, b"").unwrap();
    assert!(refused(&path).contains("the file is empty"));
    std::fs::write(&path, b"PK\x03\x04zip").unwrap();
    assert!(refused(&path).contains("not a GGUF file"));
    std::fs::write(&path, b"GGUF\0\0\0\x03").unwrap();
    assert!(refused(&path).contains("big-endian"));
    std::fs::write(&path, b"GGUF\x01\0\0\0").unwrap();
    assert!(refused(&path).contains("version 1"));
}

#[test]
fn a_model_without_template_says_that_a_chat_needs_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20, "max_position_embeddings": 64
    });
    let path = dir.path().join("tiny");
    synth::synth_to(&path, &config, 1, DType::F32).unwrap();
    std::fs::write(path.join("generation_config.json"), r#"{"temperature": 0.5, "eos_token_id": [3, 4]}"#).unwrap();
    let model = open(&path).unwrap();
    assert!(model.tokenizer.is_none());
    assert!(model.chat().err().unwrap().to_string().contains("tiny has none, and a chat needs one"));
    assert_eq!((model.name.as_str(), model.generation.temperature), ("tiny", Some(0.5)));
    assert_eq!(model.config.eos, [3, 4]);
    assert!(model.params.qk_norm);
}

#[test]
fn the_tokenizer_names_the_end_where_the_configurations_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 260, "max_position_embeddings": 64
    });
    synth::synth_to(dir.path(), &config, 1, DType::F32).unwrap();
    synth::write_tokenizer(dir.path(), 260).unwrap();
    assert_eq!(open(dir.path()).unwrap().config.eos, [257, 259]);
    std::fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    assert_eq!(open(dir.path()).unwrap().config.eos, [257]);
}

#[test]
fn a_gguf_is_opened_with_its_weights() {
    let f32s = |values: usize| vec![0u8; values * 4];
    let fields = [
        ("general.architecture", Field::Str("llama")),
        ("llama.block_count", Field::U32(1)),
        ("llama.context_length", Field::U32(16)),
        ("llama.embedding_length", Field::U32(4)),
        ("llama.feed_forward_length", Field::U32(6)),
        ("llama.attention.head_count", Field::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Field::F32(1e-5)),
    ];
    let tensors = [
        ("token_embd.weight", vec![4, 3]),
        ("output_norm.weight", vec![4]),
        ("blk.0.attn_norm.weight", vec![4]),
        ("blk.0.attn_q.weight", vec![4, 4]),
        ("blk.0.attn_k.weight", vec![4, 4]),
        ("blk.0.attn_v.weight", vec![4, 4]),
        ("blk.0.attn_output.weight", vec![4, 4]),
        ("blk.0.ffn_norm.weight", vec![4]),
        ("blk.0.ffn_gate.weight", vec![4, 6]),
        ("blk.0.ffn_up.weight", vec![4, 6]),
        ("blk.0.ffn_down.weight", vec![6, 4]),
    ]
    .map(|(name, dims): (&str, Vec<u64>)| {
        let bytes = f32s(dims.iter().product::<u64>() as usize);
        (name, dims, 0, bytes)
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.model.gguf");
    std::fs::write(&path, write(&fields, &tensors)).unwrap();
    let model = open(dir.path()).unwrap();
    assert_eq!(model.name, "small.model");
    assert!(model.tokenizer.is_none() && model.chat.is_none());
    let elements: usize = tensors.iter().map(|t| t.3.len()).sum();
    assert_eq!(model.weights.total_bytes(), elements as u64);
    for (param, (rows, cols)) in model.params.all(&model.config) {
        let tensor = model.weights.get(param).unwrap();
        assert_eq!((tensor.rows, tensor.cols, tensor.bytes.len()), (rows, cols, rows * cols * 4));
    }
}
