use proptest::prelude::*;

use super::testing::{Field, Tensor, write};
use super::*;
use crate::device::tensor::DType;
use crate::model::config::Family;
use crate::model::rope::RopeScaling;

fn fields(arch: &'static str) -> Vec<(String, Field<'static>)> {
    let mut fields = vec![("general.architecture".to_owned(), Field::Str(arch))];
    for (name, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        fields.push((format!("{arch}.{name}"), Field::U32(value)));
    }
    fields.push((format!("{arch}.attention.layer_norm_rms_epsilon"), Field::F32(1e-5)));
    fields
}

fn tensors() -> Vec<Tensor<'static>> {
    let f32s = |n: u64| vec![0; n as usize * 4];
    let mut tensors: Vec<Tensor<'static>> =
        vec![("token_embd.weight", vec![32, 10], 8, vec![0; 10 * 34]), ("output_norm.weight", vec![32], 0, f32s(32))];
    for (name, dims, kind, bytes) in [
        ("blk.0.attn_norm.weight", vec![32], 0, f32s(32)),
        ("blk.0.attn_q.weight", vec![32, 32], 2, vec![0; 32 * 18]),
        ("blk.0.attn_k.weight", vec![32, 16], 3, vec![0; 16 * 20]),
        ("blk.0.attn_v.weight", vec![32, 16], 1, vec![0; 16 * 64]),
        ("blk.0.attn_output.weight", vec![32, 32], 30, vec![0; 32 * 64]),
        ("blk.0.ffn_norm.weight", vec![32], 0, f32s(32)),
        ("blk.0.ffn_gate.weight", vec![32, 64], 8, vec![0; 64 * 34]),
        ("blk.0.ffn_up.weight", vec![32, 64], 8, vec![0; 64 * 34]),
        ("blk.0.ffn_down.weight", vec![64, 32], 8, vec![0; 32 * 68]),
    ] {
        tensors.push((name, dims, kind, bytes));
    }
    tensors
}

fn bytes(fields: &[(String, Field<'_>)], tensors: &[Tensor<'_>]) -> Vec<u8> {
    let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    write(&fields, tensors)
}

fn open(bytes: &[u8]) -> Result<GgufConfig> {
    check_file("test.gguf", bytes)
}

fn refused(fields: &[(String, Field<'_>)], tensors: &[Tensor<'_>]) -> String {
    open(&bytes(fields, tensors)).expect_err("refused").to_string()
}

#[test]
fn a_small_model_is_read() {
    let file = bytes(&fields("llama"), &tensors());
    let config = open(&file).unwrap();
    assert_eq!(config.model.family, Family::Llama);
    assert_eq!((config.model.layers, config.model.hidden, config.model.vocab), (1, 32, 10));
    assert_eq!(
        (config.model.attention.heads, config.model.attention.kv_heads, config.model.attention.head_dim),
        (4, 2, 8)
    );
    assert!(config.model.tied_embeddings && config.model.rope.interleaved);
    let parsed = parse("test.gguf", &file).unwrap();
    let k = parsed.tensor("blk.0.attn_k.weight").unwrap();
    assert_eq!((k.dtype(), k.len), (Some(DType::Q4_1), Some(320)));
    assert_eq!(k.start % 32, 0);
}

#[test]
fn qwen_pairs_are_not_interleaved_and_its_biases_and_norms_are_asked_for() {
    let error = refused(&fields("qwen2"), &tensors());
    assert!(error.contains("blk.0.attn_q.bias") && error.contains("missing"), "{error}");
    let error = refused(&fields("qwen3"), &tensors());
    assert!(error.contains("blk.0.attn_q_norm.weight") && error.contains("missing"), "{error}");
    let mut with = tensors();
    with.push(("blk.0.attn_q_norm.weight", vec![8], 0, vec![0; 32]));
    with.push(("blk.0.attn_k_norm.weight", vec![8], 0, vec![0; 32]));
    let config = open(&bytes(&fields("qwen3"), &with)).unwrap();
    assert!(config.params.qk_norm && !config.model.rope.interleaved);
}

#[test]
fn rope_scaling_is_read() {
    let scaled = |extra: &[(&str, Field<'static>)]| {
        let mut fields = fields("llama");
        fields.extend(extra.iter().map(|(name, value)| (format!("llama.rope.{name}"), value.clone())));
        fields
    };
    let linear = scaled(&[("scaling.type", Field::Str("linear")), ("scaling.factor", Field::F32(4.0))]);
    assert_eq!(open(&bytes(&linear, &tensors())).unwrap().scaling, RopeScaling::Linear { factor: 4.0 });
    let yarn = scaled(&[
        ("scaling.type", Field::Str("yarn")),
        ("scaling.factor", Field::F32(4.0)),
        ("scaling.original_context_length", Field::U32(16)),
    ]);
    let rope = open(&bytes(&yarn, &tensors())).unwrap().model.rope;
    assert!((rope.magnitude - 1.138_629_4).abs() < 1e-6);

    let mut factors = tensors();
    let values = [1.0f32, 1.0, 8.0, 8.0];
    factors.push(("rope_freqs.weight", vec![4], 0, values.iter().flat_map(|x| x.to_le_bytes()).collect()));
    let rope = open(&bytes(&fields("llama"), &factors)).unwrap().model.rope;
    assert_eq!(rope.inv_freq, [1.0, 0.1, 0.00125, 0.000125]);
    let error = refused(&linear, &factors);
    assert!(error.contains("rope_freqs"), "{error}");
    let error = refused(&scaled(&[("scaling.type", Field::Str("longrope"))]), &tensors());
    assert!(error.contains("llama.rope.scaling.type") && error.contains("longrope"), "{error}");
}

#[test]
fn wrong_metadata_is_named() {
    let with = |name: &str, value: Field<'static>| {
        let mut fields: Vec<_> = fields("llama").into_iter().filter(|f| f.0 != name).collect();
        fields.push((name.to_owned(), value));
        refused(&fields, &tensors())
    };
    for (name, value, said) in [
        ("general.architecture", Field::Str("gemma"), "gemma"),
        ("llama.attention.head_count", Field::U32(0), "found 0"),
        ("llama.attention.head_count_kv", Field::U32(3), "3 does not divide"),
        ("llama.attention.key_length", Field::U32(7), "even"),
        ("llama.rope.dimension_count", Field::U32(4), "4 differs"),
        ("llama.embedding_length", Field::Str("x"), "found \"x\""),
        ("llama.block_count", Field::U32(u32::MAX), "found 4294967295"),
        ("llama.expert_count", Field::U32(8), "mixtures"),
        ("llama.attention.sliding_window", Field::U32(8), "sliding"),
        ("llama.logit_scale", Field::F32(0.5), "0.5"),
        ("llama.vocab_size", Field::U32(11), "10 rows"),
        ("llama.feed_forward_length", Field::I32s(vec![64, 32]), "differs between layers"),
        ("general.alignment", Field::U32(24), "power of two"),
        ("general.type", Field::Str("adapter"), "not a model"),
        ("split.count", Field::U32(2), "several files"),
    ] {
        let error = with(name, value);
        assert!(error.contains(name) && error.contains(said), "{name}: {error}");
    }
    let missing: Vec<_> = fields("llama").into_iter().filter(|f| f.0 != "llama.block_count").collect();
    let error = refused(&missing, &tensors());
    assert!(error.contains("llama.block_count") && error.contains("missing"), "{error}");
}

#[test]
fn wrong_tensors_are_named() {
    let change = |name: &str, change: &dyn Fn(&mut Tensor<'static>)| {
        let mut tensors = tensors();
        tensors.iter_mut().filter(|t| t.0 == name).for_each(change);
        refused(&fields("llama"), &tensors)
    };
    let error = change("blk.0.attn_q.weight", &|t| t.2 = 6);
    assert!(error.contains("blk.0.attn_q.weight") && error.contains("Q5_0"), "{error}");
    let error = change("blk.0.attn_q.weight", &|t| t.1 = vec![32, 16]);
    assert!(error.contains("blk.0.attn_q.weight") && error.contains("shape [32, 16]"), "{error}");
    let error = change("blk.0.ffn_down.weight", &|t| t.1 = vec![u64::MAX, 2]);
    assert!(error.contains("blk.0.ffn_down.weight") && error.contains("too large"), "{error}");
    let error = change("blk.0.ffn_down.weight", &|t| t.0 = "blk.0.ffn_up.weight");
    assert!(error.contains("blk.0.ffn_up.weight") && error.contains("twice"), "{error}");
    let error = change("blk.0.ffn_norm.weight", &|t| t.0 = "blk.0.ffn_norm.other");
    assert!(error.contains("blk.0.ffn_norm.weight") && error.contains("missing"), "{error}");
    let mut more = tensors();
    more.push(("blk.1.attn_norm.weight", vec![32], 0, vec![0; 128]));
    let error = refused(&fields("llama"), &more);
    assert!(error.contains("blk.1.attn_norm.weight"), "{error}");
}

#[test]
fn every_truncation_is_an_error() {
    let file = bytes(&fields("llama"), &tensors());
    open(&file).unwrap();
    for len in 0..file.len() {
        let error = open(&file[..len]).expect_err("truncated").to_string();
        assert!(error.starts_with("test.gguf: "), "{error}");
    }
}

#[test]
fn counts_are_checked_before_memory_is_taken() {
    for at in [8, 16] {
        let mut file = bytes(&fields("llama"), &tensors());
        file[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = open(&file).unwrap_err().to_string();
        assert!(error.contains("cannot hold"), "{error}");
    }
}

/// A file with nothing but a tokenizer.
fn tokenizer_file(model: &'static str) -> Vec<u8> {
    let tokens = vec!["<unk>", "<s>", "a", "b", "ab", "▁", "▁a", "Ġ", "Ġa", "Ġab", "<0x41>", "é"];
    let fields = [
        ("tokenizer.ggml.model", Field::Str(model)),
        ("tokenizer.ggml.pre", Field::Str("llama-bpe")),
        ("tokenizer.ggml.scores", Field::F32s((0..tokens.len()).map(|i| -(i as f32)).collect())),
        ("tokenizer.ggml.token_type", Field::I32s(vec![2, 3, 1, 1, 1, 1, 1, 1, 1, 1, 6, 4])),
        ("tokenizer.ggml.merges", Field::Strs(vec!["a b", "Ġ a", "Ġa b"])),
        ("tokenizer.ggml.tokens", Field::Strs(tokens)),
        ("tokenizer.ggml.bos_token_id", Field::U32(1)),
    ];
    write(&fields, &[])
}

fn tokenize(bytes: &[u8], text: &str) -> Result<Option<(Vec<u32>, String)>> {
    let parsed = parse("test.gguf", bytes)?;
    let Some(tokenizer) = Tokenizer::from_gguf(&parsed)? else { return Ok(None) };
    let ids = tokenizer.encode(text, true)?;
    let text = tokenizer.decode(&ids, false)?;
    Ok(Some((ids, text)))
}

#[test]
fn both_kinds_of_tokenizer_are_built() {
    let (ids, text) = tokenize(&tokenizer_file("gpt2"), "ab ab").unwrap().unwrap();
    assert_eq!((ids, text.as_str()), (vec![1, 4, 9], "<s>ab ab"));
    let (ids, _) = tokenize(&tokenizer_file("llama"), "aA").unwrap().unwrap();
    assert_eq!(ids, [1, 6, 10]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_tokenizers_never_panic(
        model in prop::sample::select(vec!["gpt2", "llama"]),
        changes in prop::collection::vec((0usize..4096, any::<u8>()), 0..4),
        text in "[ab A<s>é\\n😀0-9]{0,12}",
    ) {
        let mut file = tokenizer_file(model);
        for (at, byte) in changes {
            let at = at % file.len();
            file[at] = byte;
        }
        let _ = tokenize(&file, &text);
    }

    #[test]
    fn damaged_files_never_panic(
        changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..4),
        cut in prop::option::of(0usize..4096),
    ) {
        let file = bytes(&fields("llama"), &tensors());
        let header = file.len() - tensors().iter().map(|t| t.3.len()).sum::<usize>();
        let mut file = file;
        for (at, byte) in changes {
            file[at % header] = byte;
        }
        file.truncate(cut.map_or(file.len(), |cut| cut % file.len()));
        let _ = open(&file);
    }

    #[test]
    fn any_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let _ = open(&bytes);
        let magic = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0";
        bytes.splice(0..0, magic.iter().copied());
        let _ = open(&bytes);
    }
}
