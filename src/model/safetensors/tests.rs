use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::model::hf;
use crate::model::synth::{Scaling, synth_fp8_to, synth_to};

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

const ALL: [Scaling; 3] = [Scaling::Tensor, Scaling::Channel, Scaling::Block];

/// Wide enough for several blocks, and not for whole ones.
fn fp8_config() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 144, "intermediate_size": 272, "num_hidden_layers": 1, "head_dim": 72,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20, "max_position_embeddings": 64
    })
}

fn fp8_model(scaling: Scaling) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    synth_fp8_to(dir.path(), &fp8_config(), 3, scaling).unwrap();
    dir
}

#[test]
fn fp8_weights_come_with_their_scales() {
    for (scaling, block, count) in [(ALL[0], (272, 144), 1), (ALL[1], (1, 144), 272), (ALL[2], (128, 128), 6)] {
        let dir = fp8_model(scaling);
        let weights = open(dir.path(), &fp8_config()).unwrap();
        let gate = weights.get(Param::Layer(0, LayerParam::Gate)).unwrap();
        assert_eq!((gate.dtype, gate.rows, gate.cols, gate.bytes.len()), (DType::F8E4m3, 272, 144, 272 * 144));
        let scales = gate.scales.unwrap();
        assert_eq!((scales.block, scales.values.len()), (block, count), "{scaling:?}");
        crate::device::fp8::check(&gate).unwrap();
        // What is not a linear layer of the model's layers is as it was.
        for param in [Param::Embedding, Param::LmHead, Param::Layer(0, LayerParam::MlpNorm)] {
            let tensor = weights.get(param).unwrap();
            assert!(tensor.dtype == DType::Bf16 && tensor.scales.is_none(), "{param:?}");
        }
    }
}

const GATE: &str = "model.layers.0.mlp.gate_proj.weight";

#[test]
fn every_way_to_write_a_scale_down_is_read() {
    let blocks = |shape: Value| {
        let dir = fp8_model(Scaling::Block);
        edit(&dir.path().join("model.safetensors"), |header| {
            header[&format!("{GATE}_scale_inv")]["shape"] = shape;
        });
        open(dir.path(), &fp8_config()).unwrap().get(Param::Layer(0, LayerParam::Gate)).unwrap().scales.unwrap().block
    };
    assert_eq!(blocks(json!([3, 1, 2, 1])), (128, 128));
    let one = |shape: Value| {
        let dir = fp8_model(Scaling::Tensor);
        edit(&dir.path().join("model.safetensors"), |header| {
            let mut scale = header.remove(&format!("{GATE}_scale")).unwrap();
            scale["shape"] = shape;
            header.insert(format!("{GATE}_scale_inv"), scale);
        });
        open(dir.path(), &fp8_config()).unwrap().get(Param::Layer(0, LayerParam::Gate)).unwrap().scales.unwrap().block
    };
    assert_eq!([one(json!([])), one(json!([1, 1]))], [(272, 144); 2]);
    let dir = fp8_model(Scaling::Channel);
    edit(&dir.path().join("model.safetensors"), |header| header[&format!("{GATE}_scale")]["shape"] = json!([272]));
    open(dir.path(), &fp8_config()).unwrap();
}

#[test]
fn scales_that_do_not_fit_are_named() {
    let said = |scaling: Scaling, change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let dir = fp8_model(scaling);
        edit(&dir.path().join("model.safetensors"), change);
        refused(dir.path(), &fp8_config())
    };
    let rename = |header: &mut serde_json::Map<String, Value>, from: &str, to: &str| {
        let tensor = header.remove(from).unwrap();
        header.insert(to.to_owned(), tensor);
    };
    let (scale, inverse) = (format!("{GATE}_scale"), format!("{GATE}_scale_inv"));
    let error = said(Scaling::Tensor, &|header| rename(header, &scale, "spare"));
    assert!(error.contains(GATE) && error.contains("neither") && error.contains("_scale_inv"), "{error}");
    let error = said(Scaling::Block, &|header| header[&inverse]["shape"] = json!([2, 3]));
    assert!(error.contains(&inverse) && error.contains("[3, 2]"), "{error}");
    let error = said(Scaling::Block, &|header| header[&inverse]["dtype"] = json!("I16"));
    assert!(error.contains(&inverse) && error.contains("I16"), "{error}");
    // A tensor that a tied model has no use for stands for one of that name.
    let spare = |dir: tempfile::TempDir, mut config: Value, name: &str| {
        config["tie_word_embeddings"] = json!(true);
        edit(&dir.path().join("model.safetensors"), |header| rename(header, "lm_head.weight", name));
        refused(dir.path(), &config)
    };
    let beside = |name: &str| spare(fp8_model(Scaling::Block), fp8_config(), name);
    assert!(beside(&scale).contains("second scale of the same weight"));
    for end in ["_zero_point", "_scale_2"] {
        let error = beside(&format!("{GATE}{end}"));
        assert!(error.contains(end) && error.contains("nothing else"), "{error}");
    }
    let error = spare(model(), config(), &scale);
    assert!(error.contains(&scale) && error.contains("not FP8"), "{error}");
    // FP8 where it cannot be.
    let dir = fp8_model(Scaling::Tensor);
    edit(&dir.path().join("model.safetensors"), |header| {
        header["model.embed_tokens.weight"]["dtype"] = json!("F8_E4M3");
        header["model.embed_tokens.weight"]["shape"] = json!([20, 288]);
    });
    let error = refused(dir.path(), &fp8_config());
    assert!(error.contains("embed_tokens") && error.contains("F8_E4M3"), "{error}");
}

/// Writes over the first scale of `GATE`.
fn with_scale(scaling: Scaling, bytes: &[u8]) -> tempfile::TempDir {
    let dir = fp8_model(scaling);
    let path = dir.path().join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    let name = if scaling == Scaling::Block { format!("{GATE}_scale_inv") } else { format!("{GATE}_scale") };
    let at = 8 + len + header[&name]["data_offsets"][0].as_u64().unwrap() as usize;
    file[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(&path, &file).unwrap();
    dir
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn a_scale_is_taken_only_where_it_is_finite_and_above_0(bits: u32, kind in 0usize..3) {
        let scaling = ALL[kind];
        let (value, bytes) = match scaling {
            Scaling::Tensor => (f32::from_bits(bits), bits.to_le_bytes().to_vec()),
            _ => (f32::from_bits(bits & 0xffff_0000), ((bits >> 16) as u16).to_le_bytes().to_vec()),
        };
        let dir = with_scale(scaling, &bytes);
        match open(dir.path(), &fp8_config()) {
            Ok(weights) => {
                let gate = weights.get(Param::Layer(0, LayerParam::Gate)).unwrap();
                prop_assert!(value.is_finite() && value > 0.0 && gate.scales.unwrap().values[0] == value);
            }
            Err(error) => {
                prop_assert!(!(value.is_finite() && value > 0.0));
                prop_assert!(error.to_string().contains("not a finite number above 0"), "{}", error);
            }
        }
    }

    #[test]
    fn damaged_fp8_headers_never_panic(
        kind in 0usize..3,
        changes in prop::collection::vec((0usize..8192, any::<u8>()), 1..4),
    ) {
        let dir = fp8_model(ALL[kind]);
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, byte) in changes {
            bytes[at % header] = byte;
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(weights) = open(dir.path(), &fp8_config()) {
            let gate = weights.get(Param::Layer(0, LayerParam::Gate)).unwrap();
            prop_assert_eq!(gate.scales.is_some(), gate.dtype == DType::F8E4m3);
        }
    }
}

#[test]
fn scales_of_what_is_not_fp8_are_refused() {
    for bad in [0f32, -1.0, f32::NAN, f32::INFINITY] {
        let dir = with_scale(Scaling::Tensor, &bad.to_le_bytes());
        assert!(refused(dir.path(), &fp8_config()).contains("not a finite number above 0"));
    }
    let left = |names: &[&str]| -> HashMap<String, Found> {
        let found = |_| Found { file: 0, dtype: Dtype::F32, shape: vec![1], start: 0, len: 4 };
        names.iter().map(|n| ((*n).to_owned(), found(n))).collect()
    };
    let check =
        |name: &str, left: &HashMap<String, Found>| scales::refuse_unused("f", name, left).map_err(|e| e.to_string());
    assert!(check("a.q_proj.weight_scale", &left(&["a.q_proj.weight_scale"])).unwrap_err().contains("not FP8"));
    assert!(check("a.q_proj.weight_zero_point", &left(&[])).is_err());
    assert!(check("a.q_proj.pre_quant_scale", &left(&[])).unwrap_err().contains("activations"));
    // A spare tensor's, and what only concerns activations, keys and values.
    check("lm_head.weight_scale", &left(&["lm_head.weight", "lm_head.weight_scale"])).unwrap();
    for inert in ["a.q_proj.input_scale", "a.k_proj.k_scale", "a.v_proj.output_scale", "a.q_proj.input_scale_ub"] {
        check(inert, &left(&[])).unwrap();
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
