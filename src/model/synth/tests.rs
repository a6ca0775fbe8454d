use serde_json::json;

use super::*;
use crate::device::cpu::reference;
use crate::model::load;

fn tiny() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128,
        "attention_bias": true, "mlp_bias": true
    })
}

#[test]
fn generator_gives_known_numbers() {
    // The same as scripts/goldens.py; splitmix64(0) is its published first output.
    assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
    assert_eq!(fnv1a64("a"), 0xaf63_dc4c_8601_ec8c);
    let generator = Generator::new(7, Param::Layer(0, LayerParam::Q), 32);
    let values: Vec<f32> = (0..100_000).map(|i| generator.at(i)).collect();
    let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / 1e5;
    let variance = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 1e5;
    assert!(mean.abs() < 0.005, "{mean}");
    assert!((variance - 4.0 / 32.0).abs() < 0.002, "{variance}");
}

#[test]
fn what_is_written_opens_and_text_flows_through_it() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let written = synth_to(dir.path(), &tiny(), 1, dtype).unwrap();
        write_tokenizer(dir.path(), 300).unwrap();
        let model = load::open(dir.path()).unwrap();
        assert_eq!(model.weights.total_bytes(), written.bytes);
        assert_eq!(written.parameters * dtype.block_bytes() as u64, written.bytes);
        let q = model.weights.get(Param::Layer(1, LayerParam::Q)).unwrap();
        assert_eq!((q.dtype, q.rows, q.cols), (dtype, 32, 32));
        assert_eq!(model.config.eos, [257, 259]);

        let tokenizer = model.tokenizer.as_ref().unwrap();
        let text = "Ünïcödé 😀\n\0 <|im_end|> end";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids.iter().filter(|id| **id == 259).count(), 1);
        assert!(ids.iter().all(|id| *id < 260));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.vocab_size(), 300);
        assert_eq!(tokenizer.token_text(299), " w299");
        let prompt = model.chat().unwrap().render(&[json!({"role": "user", "content": "hi"})], None, true).unwrap();
        assert_eq!(prompt, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    }
}

#[test]
fn same_seed_same_bytes_other_seed_other_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |seed| {
        synth_to(dir.path(), &tiny(), seed, DType::Bf16).unwrap();
        std::fs::read(dir.path().join("model.safetensors")).unwrap()
    };
    assert_eq!(bytes(1), bytes(1));
    assert_ne!(bytes(1), bytes(2));
}

#[test]
fn every_named_shape_is_a_model() {
    for name in SHAPES {
        let config = hf::parse(&shape(name).unwrap(), None).unwrap();
        assert!(config.model.layers > 0, "{name}");
    }
    assert!(shape("no-such-model").is_none());
}

#[test]
fn a_vocabulary_too_small_for_the_toy_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(write_tokenizer(dir.path(), 100).unwrap_err().to_string().contains("vocab_size"));
}

#[test]
fn fp8_weights_are_near_those_that_they_stand_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny();
    (config["hidden_size"], config["intermediate_size"]) = (json!(160), json!(144));
    synth_to(dir.path(), &config, 5, DType::F32).unwrap();
    let plain = load::open(dir.path()).unwrap();
    for scaling in [Scaling::Tensor, Scaling::Channel, Scaling::Block] {
        let dir = tempfile::tempdir().unwrap();
        let written = synth_fp8_to(dir.path(), &config, 5, scaling).unwrap();
        let model = load::open(dir.path()).unwrap();
        assert_eq!(model.weights.total_bytes(), written.bytes);
        for param in [LayerParam::Q, LayerParam::Gate, LayerParam::Down].map(|p| Param::Layer(1, p)) {
            let (want, got) = (plain.weights.get(param).unwrap(), model.weights.get(param).unwrap());
            let (want, values) = (reference::dequantize(&want), reference::dequantize(&got));
            let largest = want.iter().fold(0f32, |a, b| a.max(b.abs()));
            for (want, got) in want.iter().zip(&values) {
                // Three bits of mantissa, and no exponent below 2^-6 of a 448th.
                let room = want.abs() / 16.0 + largest / 448.0 / 256.0;
                assert!((want - got).abs() <= room, "{param:?} {scaling:?}: {got}, not {want}");
            }
            assert!(got.scales.unwrap().values.len() >= if scaling == Scaling::Tensor { 1 } else { 4 });
        }
        // A configuration that says FP8 is one of plain weights when these are written.
        let text = std::fs::read(dir.path().join("config.json")).unwrap();
        let fp8: Value = serde_json::from_slice(&text).unwrap();
        assert!(fp8["quantization_config"]["quant_method"].is_string());
        synth_to(dir.path(), &fp8, 5, DType::Bf16).unwrap();
        let model = load::open(dir.path()).unwrap();
        assert!(model.weights.get(Param::Layer(0, LayerParam::Q)).unwrap().scales.is_none());
    }
}
