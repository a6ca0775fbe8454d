use serde_json::json;

use super::*;
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
