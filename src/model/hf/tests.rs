use proptest::prelude::*;
use serde_json::{Map, json};

use super::*;

/// A small config of `kind`, with some fields changed; null takes one away.
fn config(kind: &str, changes: Value) -> Value {
    let mut config = json!({
        "model_type": kind, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "head_dim": 16
    });
    let fields = config.as_object_mut().unwrap();
    for (name, value) in changes.as_object().unwrap() {
        if value == "absent" {
            fields.remove(name);
        } else {
            fields.insert(name.clone(), value.clone());
        }
    }
    config
}

fn read(kind: &str, changes: Value) -> HfConfig {
    parse(&config(kind, changes), None).unwrap()
}

#[test]
fn families_have_their_own_biases_norms_and_defaults() {
    let llama = read("llama", json!({}));
    assert_eq!((llama.model.family, llama.params), (Family::Llama, OptionalParams::default()));
    assert_eq!((llama.model.bos, llama.model.eos), (Some(1), vec![2]));
    assert_eq!(llama.model.norm_eps, 1e-5);
    assert!(llama.model.windows.is_empty() && !llama.model.tied_embeddings);

    let biased = read("llama", json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}));
    assert!(biased.params.qkv_bias && biased.params.o_bias && biased.params.mlp_bias && biased.model.tied_embeddings);

    let qwen2 = read("qwen2", json!({}));
    assert!(qwen2.params.qkv_bias && !qwen2.params.o_bias && !qwen2.params.qk_norm);
    assert_eq!((qwen2.model.bos, qwen2.model.eos), (None, vec![]));

    let qwen3 = read("qwen3", json!({"head_dim": "absent"}));
    assert!(qwen3.params.qk_norm && !qwen3.params.qkv_bias);
    assert_eq!(qwen3.model.attention.head_dim, 128);
}

#[test]
fn heads_may_differ_from_the_width() {
    let shape = read("llama", json!({"head_dim": 24})).model.attention;
    assert_eq!((shape.heads, shape.kv_heads, shape.head_dim, shape.q_width()), (4, 2, 24, 96));
    assert!((shape.scale - 24f32.powf(-0.5)).abs() < 1e-7);
    let shape = read("llama", json!({"head_dim": "absent", "num_key_value_heads": null})).model.attention;
    assert_eq!((shape.kv_heads, shape.head_dim), (4, 16));
}

#[test]
fn windows_slide_where_the_family_says() {
    let windows = |kind, changes| read(kind, changes).model.windows;
    assert_eq!(windows("mistral", json!({})), [Some(4096); 4]);
    assert_eq!(windows("mistral", json!({"sliding_window": null})), []);
    assert_eq!(windows("mistral", json!({"sliding_window": 24})), [Some(24); 4]);
    assert_eq!(windows("qwen2", json!({"sliding_window": 16})), []);
    let on = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 3});
    assert_eq!(windows("qwen2", on), [None, None, None, Some(16)]);
    let all = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 0});
    assert_eq!(windows("qwen2", all), [Some(16); 4]);
    let types = json!({
        "use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    });
    assert_eq!(windows("qwen3", types), [Some(8), None, Some(8), None]);
    assert_eq!(read("mistral", json!({})).model.window(3), Some(4096));
}

#[test]
fn both_spellings_of_rope_scaling_say_the_same() {
    let inner = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let old = read("llama", json!({"rope_theta": 5e5, "rope_scaling": inner}));
    let mut new = inner.clone();
    new["rope_theta"] = json!(5e5);
    let new = read("llama", json!({"rope_parameters": new}));
    assert_eq!(old, new);
    assert_eq!(old.scaling, RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 });
    assert!(!old.model.rope.interleaved);

    let linear = read("llama", json!({"rope_scaling": {"type": "linear", "factor": 2}}));
    assert_eq!(linear.scaling, RopeScaling::Linear { factor: 2.0 });
    let default = read("llama", json!({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}));
    assert_eq!(default.scaling, RopeScaling::Default);
    assert!((default.model.rope.inv_freq[4] - 0.1).abs() < 1e-6);
}

#[test]
fn yarn_knows_its_defaults_and_widens_the_context() {
    let yarn = |changes: Value| {
        let mut inner = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
        inner.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        read("qwen2", json!({"rope_scaling": inner}))
    };
    let plain = yarn(json!({}));
    assert_eq!(plain.model.max_positions, 1024);
    assert!((plain.model.rope.magnitude - 1.138_629_4).abs() < 1e-6);
    assert_eq!(yarn(json!({"attention_factor": 1.5})).model.rope.magnitude, 1.5);
    let mscale = yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.5})).model.rope.magnitude;
    assert!((mscale - 1.138_629_4 / 1.069_314_7).abs() < 1e-6);
    assert_ne!(yarn(json!({"truncate": false})).model.rope, plain.model.rope);
    assert_ne!(yarn(json!({"beta_fast": 4})).model.rope, plain.model.rope);
}

#[test]
fn ends_of_text_come_from_the_generation_config_first() {
    let config = config("llama", json!({"eos_token_id": 5, "bos_token_id": 4}));
    let eos = |generation: Value| parse(&config, Some(&generation)).map(|c| c.model.eos);
    assert_eq!(eos(json!({"eos_token_id": [7, 8]})).unwrap(), [7, 8]);
    assert_eq!(eos(json!({})).unwrap(), [5]);
    let error = eos(json!({"eos_token_id": 320})).unwrap_err().to_string();
    assert!(error.starts_with("generation_config.json: `eos_token_id`"), "{error}");
    assert_eq!(parse(&config, None).unwrap().model.bos, Some(4));
}

#[test]
fn sampling_defaults_are_read() {
    let read = |json| parse_generation(&json);
    let all = read(json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1})).unwrap();
    assert_eq!((all.do_sample, all.temperature, all.top_k), (Some(true), Some(0.6), Some(20)));
    assert_eq!(read(json!({"top_k": -1})).unwrap().top_k, Some(0));
    assert_eq!(read(json!({})).unwrap(), GenerationDefaults::default());
    assert!(read(json!({"temperature": "hot"})).unwrap_err().to_string().contains("`temperature`"));
}

#[test]
fn what_is_not_understood_is_named_with_its_value() {
    let rope = |changes: Value| json!({"rope_scaling": changes});
    for (kind, changes, field, said) in [
        ("gemma2", json!({}), "model_type", "\"gemma2\" is not supported"),
        ("llama", json!({"architectures": ["LlamaForSequenceClassification"]}), "architectures", "is not supported"),
        ("llama", json!({"architectures": ["Qwen2ForCausalLM"]}), "architectures", "does not go with"),
        ("llama", json!({"architectures": "x"}), "architectures", "found \"x\""),
        ("llama", json!({"hidden_act": "gelu"}), "hidden_act", "\"gelu\""),
        ("llama", json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config.quant_method", "gptq"),
        ("llama", json!({"num_local_experts": 8}), "num_local_experts", "8 is not supported"),
        ("llama", json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping", "30.0"),
        ("llama", json!({"embedding_multiplier": 12}), "embedding_multiplier", "12"),
        ("llama", json!({"rope_interleaved": true}), "rope_interleaved", "true"),
        ("llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor", "0.5"),
        ("llama", json!({"sliding_window": 4096}), "sliding_window", "llama"),
        ("llama", rope(json!({"rope_type": "longrope", "factor": 2})), "rope_scaling.rope_type", "\"longrope\""),
        ("llama", rope(json!({"type": "dynamic", "factor": 2})), "rope_scaling.type", "\"dynamic\""),
        ("llama", rope(json!({"type": "linear"})), "rope_scaling.factor", "missing"),
        ("llama", rope(json!({"type": "linear", "factor": 0})), "rope_scaling.factor", "above 0, found 0"),
        (
            "llama",
            rope(json!({"type": "linear", "factor": 2, "mrope_section": [1]})),
            "rope_scaling.mrope_section",
            "[1]",
        ),
        ("llama", rope(json!(["linear"])), "rope_scaling", "expected an object"),
        ("llama", rope(json!({"full_attention": {"rope_theta": 1e4}})), "rope_scaling.full_attention", "no meaning"),
        ("llama", rope(json!({"partial_rotary_factor": 0.25})), "rope_scaling.partial_rotary_factor", "0.25"),
        ("llama", json!({"rope_theta": 0.5}), "rope_theta", "above 1"),
        ("llama", json!({"num_attention_heads": 0}), "num_attention_heads", "found 0"),
        ("llama", json!({"num_key_value_heads": 3}), "num_key_value_heads", "3 does not divide"),
        (
            "llama",
            json!({"num_attention_heads": 6, "head_dim": null}),
            "num_attention_heads",
            "does not divide hidden_size",
        ),
        ("llama", json!({"head_dim": 15}), "head_dim", "15 is not an even number"),
        ("llama", json!({"hidden_size": "64"}), "hidden_size", "found \"64\""),
        ("llama", json!({"hidden_size": -64}), "hidden_size", "found -64"),
        ("llama", json!({"num_hidden_layers": 1e300}), "num_hidden_layers", "found 1e+300"),
        ("llama", json!({"vocab_size": "absent"}), "vocab_size", "missing"),
        ("llama", json!({"rms_norm_eps": 0}), "rms_norm_eps", "found 0"),
        ("llama", json!({"tie_word_embeddings": 1}), "tie_word_embeddings", "found 1"),
        ("llama", json!({"eos_token_id": "2"}), "eos_token_id", "found \"2\""),
        ("llama", json!({"bos_token_id": 320}), "bos_token_id", "320"),
        ("mistral", json!({"attention_bias": true}), "attention_bias", "true"),
        ("mistral", json!({"sliding_window": 0}), "sliding_window", "found 0"),
        ("qwen2", json!({"attention_bias": false}), "attention_bias", "false"),
        ("qwen3", json!({"mlp_bias": true}), "mlp_bias", "true"),
        ("qwen3", json!({"layer_types": ["full_attention"]}), "layer_types", "1 entries for 4 layers"),
        ("qwen3", json!({"layer_types": vec!["chunked_attention"; 4]}), "layer_types", "chunked_attention"),
        ("qwen3", json!({"layer_types": vec!["sliding_attention"; 4]}), "layer_types", "use_sliding_window"),
    ] {
        let error = parse(&config(kind, changes), None).expect_err(field).to_string();
        assert!(error.starts_with(&format!("config.json: `{field}`: ")) && error.contains(said), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    assert!(parse(&json!([]), None).unwrap_err().to_string().contains("not a JSON object"));
}

#[test]
fn fields_that_change_nothing_are_let_pass() {
    read(
        "llama",
        json!({
            "torch_dtype": "bfloat16", "use_cache": true, "attention_dropout": 0.1, "pretraining_tp": 1,
            "transformers_version": "5.0", "unsloth_fixed": true, "num_local_experts": null, "rope_interleaved": false,
            "is_llama_config": true, "transformers.js_config": {"kv_cache_dtype": "float16"}
        }),
    );
}

/// Any JSON, mostly under names that are read.
fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec!["llama", "qwen2", "silu", "yarn", "linear", "llama3", "full_attention"])
            .prop_map(Value::from),
    ];
    let names = prop::sample::select([KNOWN, &["rope_type", "type", "factor", "beta_fast", "truncate"]].concat());
    leaf.prop_recursive(3, 16, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((names.clone(), inner), 0..4).prop_map(|fields| Value::Object(
                fields.into_iter().map(|(n, v)| (n.to_owned(), v)).collect::<Map<_, _>>()
            )),
        ]
    })
}

proptest! {
    #[test]
    fn any_fields_give_a_configuration_or_an_error(
        kind in prop::sample::select(vec!["llama", "mistral", "qwen2", "qwen3"]),
        changes in prop::collection::vec((prop::sample::select(KNOWN.to_vec()), values()), 1..5),
    ) {
        let changes: Map<_, _> = changes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let changed = config(kind, Value::Object(changes));
        if let Ok(read) = parse(&changed, Some(&changed)) {
            let model = &read.model;
            prop_assert_eq!(model.attention.heads % model.attention.kv_heads, 0);
            prop_assert_eq!(model.rope.inv_freq.len(), model.attention.head_dim / 2);
            prop_assert!(model.windows.is_empty() || model.windows.len() == model.layers);
            prop_assert!(model.eos.iter().all(|id| (*id as usize) < model.vocab));
        }
        let _ = parse_generation(&changed);
    }
}

fn quantized(quantization: Value) -> std::result::Result<HfConfig, String> {
    let file = config("llama", json!({"quantization_config": quantization}));
    parse(&file, None).map_err(|e| e.to_string())
}

#[test]
fn fp8_checkpoints_of_every_tool_are_read() {
    let weights = |strategy: &str, structure: Value| {
        json!({
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed", "kv_cache_scheme": null, "sparsity_config": {}, "transform_config": {},
            "config_groups": {"group_0": {
                "targets": ["Linear"], "output_activations": null, "format": null,
                "weights": {
                    "num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true, "dynamic": false,
                    "block_structure": structure
                },
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true}
            }}
        })
    };
    for accepted in [
        json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}),
        json!({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}),
        json!({"quant_method": "fp8", "weight_block_size": null, "modules_to_not_convert": ["model.layers.0.mlp"]}),
        json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}),
        json!({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}),
        json!({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}),
        weights("tensor", Value::Null),
        weights("channel", Value::Null),
        weights("block", json!([128, 128])),
    ] {
        quantized(accepted).unwrap();
    }
    check_modelopt(&json!({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})).unwrap();
}

#[test]
fn other_quantised_checkpoints_are_refused_by_name() {
    let compressed = |changes: Value| {
        let mut config = json!({
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}
            }}
        });
        for (path, value) in changes.as_object().unwrap() {
            *config.pointer_mut("/config_groups/group_0/weights").unwrap().get_mut(path).unwrap() = value.clone();
        }
        config
    };
    for (refused, field, says) in [
        (json!({"quant_method": "gptq", "bits": 4}), "quant_method", "gptq"),
        (json!({"bits": 4}), "quant_method", "missing"),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt", "e5m2"),
        (json!({"quant_method": "fp8", "weight_block_size": [64, 128]}), "weight_block_size", "[64,128]"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}), "quant_algo", "NVFP4"),
        (json!({"quant_method": "modelopt"}), "quant_algo", "missing"),
        (json!({"quant_method": "compressed-tensors"}), "config_groups", "missing"),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}),
            "format",
            "pack-quantized",
        ),
        (
            json!({
                "quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"config_groups": {}}
            }),
            "transform_config",
            "not supported",
        ),
        (compressed(json!({"num_bits": 4})), "num_bits", "4"),
        (compressed(json!({"type": "int"})), "num_bits", "int"),
        (compressed(json!({"symmetric": false})), "symmetric", "zero point"),
        (compressed(json!({"strategy": "group"})), "strategy", "group"),
    ] {
        let error = quantized(refused).unwrap_err();
        assert!(error.contains("quantization_config.") && error.contains(field) && error.contains(says), "{error}");
    }
    let error = check_modelopt(&json!({"quantization": {"quant_algo": "W4A8_AWQ"}})).unwrap_err().to_string();
    assert!(error.contains("hf_quant_config.json: `quantization.quant_algo`") && error.contains("W4A8_AWQ"), "{error}");
    assert!(check_modelopt(&json!({})).is_err());
}
