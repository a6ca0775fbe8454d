use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::hf;
use crate::model::synth::synth_to;

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20, "max_position_embeddings": 64
    })
}

fn model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    synth_to(dir.path(), &config(), 3, DType::Bf16).unwrap();
    dir
}

fn open(dir: &Path, config: &Value) -> Result<SafetensorsWeights> {
    let config = hf::parse(config, None).unwrap();
    SafetensorsWeights::open(dir, &config.model, config.params)
}

fn refused(dir: &Path, config: &Value) -> String {
    open(dir, config).err().expect("refused").to_string()
}

/// Rewrites the header of a file; the data stay.
fn edit(path: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let bytes = fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    edit(header.as_object_mut().unwrap());
    let text = header.to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[8 + len..]);
    fs::write(path, out).unwrap();
}

#[test]
fn parameters_are_found_with_their_shapes() {
    let dir = model();
    let weights = open(dir.path(), &config()).unwrap();
    let k = weights.get(Param::Layer(0, LayerParam::K)).unwrap();
    assert_eq!((k.dtype, k.rows, k.cols, k.bytes.len()), (DType::Bf16, 8, 16, 256));
    let norm = weights.get(Param::FinalNorm).unwrap();
    assert_eq!((norm.rows, norm.cols), (1, 16));
    assert!(weights.get(Param::Layer(0, LayerParam::QBias)).is_none());
    assert!(weights.get(Param::Layer(1, LayerParam::Q)).is_none());
    let size = fs::metadata(dir.path().join("model.safetensors")).unwrap().len();
    assert!(weights.total_bytes() < size && weights.total_bytes() > size / 2);
}

#[test]
fn released_tensors_can_be_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut large = config();
    large["vocab_size"] = json!(4096);
    synth_to(dir.path(), &large, 3, DType::F32).unwrap();
    let weights = open(dir.path(), &large).unwrap();
    let before = weights.get(Param::Embedding).unwrap().bytes.to_vec();
    weights.release(Param::Embedding);
    assert_eq!(weights.get(Param::Embedding).unwrap().bytes, before);
    weights.release(Param::Layer(9, LayerParam::Q));
}

#[test]
fn what_the_configuration_does_not_fit_is_named() {
    let dir = model();
    let changed = |name: &str, value: Value| {
        let mut config = config();
        config[name] = value;
        refused(dir.path(), &config)
    };
    let error = changed("vocab_size", json!(21));
    assert!(error.contains("model.safetensors: tensor `model.embed_tokens.weight`: shape [20, 16]"), "{error}");
    assert!(error.contains("[21, 16]"), "{error}");
    let error = changed("num_hidden_layers", json!(2));
    assert!(error.contains("`model.layers.1.") && error.contains("missing"), "{error}");
    let error = changed("attention_bias", json!(true));
    assert!(error.contains("self_attn.q_proj.bias") && error.contains("missing"), "{error}");

    // The other way round: the file has what the configuration has not.
    let mut biased = config();
    biased["mlp_bias"] = json!(true);
    synth_to(dir.path(), &biased, 3, DType::Bf16).unwrap();
    let error = refused(dir.path(), &config());
    assert!(error.contains("mlp.") && error.contains("no such tensor"), "{error}");
    let mut deep = config();
    deep["num_hidden_layers"] = json!(2);
    synth_to(dir.path(), &deep, 3, DType::Bf16).unwrap();
    let error = refused(dir.path(), &config());
    assert!(error.contains("`model.layers.1.") && error.contains("only 1 layers"), "{error}");
}

#[test]
fn a_tied_models_spare_projection_is_ignored() {
    let dir = model();
    let mut tied = config();
    tied["tie_word_embeddings"] = json!(true);
    let weights = open(dir.path(), &tied).unwrap();
    assert!(weights.get(Param::LmHead).is_none());
}

#[test]
fn types_that_are_not_floats_are_refused() {
    let dir = model();
    edit(&dir.path().join("model.safetensors"), |header| header["lm_head.weight"]["dtype"] = json!("I16"));
    let error = refused(dir.path(), &config());
    assert!(error.contains("`lm_head.weight`") && error.contains("I16"), "{error}");
}

#[test]
fn shards_are_found_through_the_index() {
    let dir = model();
    let at = |name: &str| dir.path().join(name);
    fs::rename(at("model.safetensors"), at("model-00001-of-00002.safetensors")).unwrap();
    let error = refused(dir.path(), &config());
    assert!(error.contains("neither model.safetensors nor"), "{error}");
    let index =
        |map: Value| fs::write(at("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    index(json!({"lm_head.weight": "model-00001-of-00002.safetensors"}));
    open(dir.path(), &config()).unwrap();
    index(json!({"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}));
    let error = refused(dir.path(), &config());
    assert!(error.contains("model-00002-of-00002.safetensors"), "{error}");
    fs::copy(at("model-00001-of-00002.safetensors"), at("model-00002-of-00002.safetensors")).unwrap();
    let error = refused(dir.path(), &config());
    assert!(error.contains("more than one shard"), "{error}");
    index(json!({"a": "../outside.safetensors"}));
    let error = refused(dir.path(), &config());
    assert!(error.contains("tensor `a`") && error.contains("plain file name"), "{error}");
    fs::write(at("model.safetensors.index.json"), "{").unwrap();
    assert!(refused(dir.path(), &config()).contains("not valid JSON"));
}

#[test]
fn every_truncation_is_an_error_that_names_the_file() {
    let dir = model();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for len in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
        fs::write(&path, &bytes[..len]).unwrap();
        let error = refused(dir.path(), &config());
        assert!(error.contains("model.safetensors: "), "{error}");
    }
}

proptest! {
    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..4)) {
        let dir = model();
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, byte) in changes {
            bytes[at % header] = byte;
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(weights) = open(dir.path(), &config()) {
            prop_assert!(weights.get(Param::Embedding).is_some());
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let config = hf::parse(&config(), None).unwrap();
        prop_assert!(check_file("x", &bytes, &config.model, config.params).is_err());
    }
}
