//! Models on disk against what other programs make of them.

#[path = "common/golden.rs"]
#[allow(dead_code)]
mod golden;
#[path = "common/smollm2.rs"]
#[allow(dead_code)]
mod smollm2;

use distkv::device::tensor::DType;
use distkv::model::hf;
use distkv::model::load;
use distkv::model::safetensors::tensor_name;
use distkv::model::synth;
use distkv::model::weights::{LayerParam, Param};
use golden::GoldenModel;

#[test]
fn golden_models_have_the_weights_that_numpy_computed() {
    for model in GoldenModel::all() {
        let dir = tempfile::tempdir().unwrap();
        let files = model.open(dir.path(), DType::F32);
        let param = Param::Layer(0, LayerParam::K);
        assert_eq!(tensor_name(param), model.weights.name);
        let tensor = files.weights.get(param).unwrap();
        let first: Vec<f32> = tensor.bytes.as_chunks::<4>().0.iter().take(4).map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(first, model.weights.first, "{}", model.name);
        assert_eq!(model.logits.len(), model.positions.len());
        assert!(model.logits.iter().all(|l| l.len() == files.config.vocab));
        assert!(model.smallest_margin >= 1e-3 && model.prompt.len() == 80 && model.greedy.len() == 64);
        assert_eq!(model.difference(0, &model.logits[0]), 0.0);
    }
}

#[test]
fn golden_models_have_the_rotations_and_windows_of_transformers() {
    for model in GoldenModel::all() {
        let config = hf::parse(&model.config, None).unwrap().model;
        let close = |a: f32, b: f32| (a - b).abs() <= 1e-6 * b.abs();
        assert_eq!(config.rope.inv_freq.len(), model.rope.inv_freq.len());
        for (ours, theirs) in config.rope.inv_freq.iter().zip(&model.rope.inv_freq) {
            assert!(close(*ours, *theirs), "{}: {ours} is not {theirs}", model.name);
        }
        assert!(close(config.rope.magnitude, model.rope.magnitude), "{}", model.name);
        let windows: Vec<Option<u32>> = (0..config.layers).map(|layer| config.window(layer)).collect();
        assert_eq!(windows, model.windows, "{}", model.name);
    }
}

#[test]
fn smollm2_text_becomes_the_tokens_of_llama_cpp_and_text_again() {
    let files = load::open(&smollm2::path()).unwrap();
    let tokenizer = files.tokenizer.as_ref().unwrap();
    let golden = smollm2::golden();
    assert!(golden.tokens.len() >= 18);
    let prompts = golden.greedy.iter().map(|g| (&g.prompt, &g.ids));
    for (text, ids) in golden.tokens.iter().map(|t| (&t.text, &t.ids)).chain(prompts) {
        assert_eq!(&tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), text);
        let mut stream = tokenizer.stream_with_special();
        let mut streamed = String::new();
        for id in ids {
            streamed.extend(stream.push(*id).unwrap());
        }
        assert_eq!(&(streamed + &stream.finish()), text);
    }
}

#[test]
fn smollm2_chats_by_the_template_in_its_file() {
    let files = load::open(&smollm2::path()).unwrap();
    let question = serde_json::json!({"role": "user", "content": "What is 2+2?"});
    let prompt = files.chat().unwrap().render(&[question], None, true).unwrap();
    assert!(smollm2::golden().greedy.iter().any(|g| g.prompt == prompt), "{prompt}");
    assert_eq!(files.config.eos, [0, 2]);
}

/// `VmHWM` or the like of this process, in bytes.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// What a loader does: takes each tensor in, copies it and lets it go. A process
/// of its own under nextest; other tests may be beside it otherwise, which can
/// only make the figure larger.
#[test]
fn loading_never_holds_the_weights_twice() {
    let dir = tempfile::tempdir().unwrap();
    let config = synth::shape("bench-125m").unwrap();
    let bytes = synth::synth_to(dir.path(), &config, 1, DType::Bf16).unwrap().bytes;
    let before = memory("VmRSS");
    let files = load::open(dir.path()).unwrap();
    let mut loaded = Vec::new();
    for (param, _) in files.params.all(&files.config) {
        loaded.push(files.weights.get(param).unwrap().bytes.to_vec());
        files.weights.release(param);
    }
    let peak = memory("VmHWM") - before;
    assert_eq!(loaded.iter().map(|t| t.len() as u64).sum::<u64>(), bytes);
    assert!(peak >= bytes, "nothing was measured");
    println!("peak {:.3} of the weights", peak as f64 / bytes as f64);
    assert!(peak < bytes + bytes * 15 / 100, "peak {peak} for {bytes} bytes of weights");
}
