//! Our logits and tokens against other programs': transformers in f32 on small
//! seeded models of every family and option, llama.cpp on the real model.

#[path = "common/cluster.rs"]
mod cluster;
#[allow(dead_code)] // each test reads its own part
#[path = "common/golden.rs"]
mod golden;
#[allow(dead_code)] // each test reads its own part
#[path = "common/smollm2.rs"]
mod smollm2;

use std::path::Path;

use cluster::{Setup, tokens};
use distkv::device::cpu::{Math, reference};
use distkv::device::tensor::DType;
use distkv::kv::rblock::KvDtype;
use distkv::model::load::{self, ModelFiles};
use distkv::model::safetensors::tensor_name;
use distkv::model::synth::{Scaling, synth_fp8_to};
use distkv::node::transports::FabricChoice;
use golden::GoldenModel;
use half::bf16;

/// Largest difference of logits, as a share of their spread.
const TOLERANCE: f32 = 1e-3;

fn holds(model: &GoldenModel, nodes: &[usize]) {
    let dir = tempfile::tempdir().unwrap();
    let files = model.open(dir.path(), DType::F32);
    let mut setup = Setup::new(FabricChoice::Shm, KvDtype::F32, nodes);
    setup.chunk = 48;
    let cluster = setup.start(&files);
    let found = tokens(cluster.submit(model.prompt.clone(), model.greedy.len(), true));
    assert_eq!(found, model.greedy, "{} on {nodes:?}: greedy tokens", model.name);
    let logits = cluster.logits.lock().unwrap();
    for (i, position) in model.positions.iter().enumerate() {
        // The last golden position follows the last greedy token, whose logits
        // nobody needs.
        let Some((_, row)) = logits.iter().find(|(p, _)| p == position) else {
            assert_eq!(*position, model.prompt.len() + model.greedy.len() - 1);
            continue;
        };
        let apart = model.difference(i, row);
        assert!(apart <= TOLERANCE, "{} on {nodes:?}: position {position} differs by {apart}", model.name);
    }
    drop(logits);
    cluster.assert_all_returned();
    cluster.stop();
}

#[test]
fn every_family_and_option_computes_what_transformers_computes() {
    let models = GoldenModel::all();
    assert!(models.len() >= 10, "goldens are missing");
    for model in &models {
        holds(model, &[256]);
    }
}

#[test]
fn every_family_and_option_does_so_with_most_of_its_kv_elsewhere() {
    for model in &GoldenModel::all() {
        holds(model, &[64, 64, 128]);
    }
}

/// Logits by position and greedy tokens on one node.
fn run(files: &ModelFiles, model: &GoldenModel) -> (Vec<u32>, Vec<(usize, Vec<f32>)>) {
    let mut setup = Setup::new(FabricChoice::Shm, KvDtype::F32, &[256]);
    setup.chunk = 48;
    let cluster = setup.start(files);
    let found = tokens(cluster.submit(model.prompt.clone(), model.greedy.len(), true));
    let logits = cluster.logits.lock().unwrap().clone();
    cluster.stop();
    (found, logits)
}

/// Writes the model in `dir`, as plain f32 of what its weights are once loaded, to
/// another folder, and opens it.
fn as_plain_floats(files: &ModelFiles, dir: &Path, to: &Path) -> ModelFiles {
    let mut tensors = Vec::new();
    for (param, (rows, cols)) in files.params.all(&files.config) {
        let tensor = files.weights.get(param).unwrap();
        let values = reference::dequantize(&tensor);
        // What is FP8 is held as bf16.
        let values = values.iter().map(|v| if tensor.scales.is_some() { bf16::from_f32(*v).to_f32() } else { *v });
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        tensors.push((tensor_name(param), shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(to.join("model.safetensors"), file).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    load::open(to).unwrap()
}

#[test]
fn fp8_models_compute_what_models_of_their_values_do() {
    let models = GoldenModel::all();
    let mut checked = 0;
    for model in models.iter().filter(|m| ["llama-biases", "qwen2", "qwen3"].contains(&m.name.as_str())) {
        for scaling in [Scaling::Tensor, Scaling::Channel, Scaling::Block] {
            let (dir, plain_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            synth_fp8_to(dir.path(), &model.config, model.seed, scaling).unwrap();
            let files = load::open(dir.path()).unwrap();
            let plain = as_plain_floats(&files, dir.path(), plain_dir.path());
            let ((found, logits), (want, plain)) = (run(&files, model), run(&plain, model));
            assert_eq!(found, want, "{} {scaling:?}: greedy tokens", model.name);
            assert_eq!(logits.len(), plain.len());
            for ((position, got), (_, want)) in logits.iter().zip(&plain) {
                let spread = want.iter().fold(0f32, |a, b| a.max(b.abs()));
                let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // Only the order of sums differs.
                assert!(apart <= 1e-4 * spread, "{} {scaling:?}: position {position}: {apart}", model.name);
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 9, "goldens are missing");
}

/// Nodes whose weights differ by a scale alone are not of one model.
#[test]
fn a_scale_is_part_of_what_a_model_is() {
    let models = GoldenModel::all();
    let model = models.iter().find(|m| m.name == "qwen3").expect("a golden");
    let dir = tempfile::tempdir().unwrap();
    synth_fp8_to(dir.path(), &model.config, model.seed, Scaling::Tensor).unwrap();
    let identity = || {
        let cluster = Setup::new(FabricChoice::Shm, KvDtype::F32, &[256]).start(&load::open(dir.path()).unwrap());
        let found = cluster.node.model().expect("it runs a model");
        cluster.stop();
        found
    };
    let before = identity();
    assert_eq!(identity(), before);
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let place = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let scale = tensors.tensor("model.layers.0.mlp.down_proj.weight_scale").unwrap();
        scale.data().as_ptr().addr() - bytes.as_ptr().addr()
    };
    // The lowest bit of the scale's mantissa.
    bytes[place] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_ne!(identity(), before);
}

#[test]
fn smollm2_answers_as_llama_cpp_does_where_rounding_does_not_decide() {
    let files = distkv::model::load::open(&smollm2::path()).unwrap();
    let mut setup = Setup::new(FabricChoice::Shm, KvDtype::F32, &[512]);
    setup.threads = 2;
    let cluster = setup.start(&files);
    let mut exact = 0;
    for greedy in smollm2::golden().greedy {
        let mut found = tokens(cluster.submit(greedy.ids.clone(), greedy.float32.len(), false));
        // What follows the end of the text is nobody's business.
        if let Some(end) = found.iter().position(|t| files.config.eos.contains(t)) {
            found.truncate(end);
        }
        let until_end =
            |ids: &[u32]| -> Vec<u32> { ids.iter().copied().take_while(|t| !files.config.eos.contains(t)).collect() };
        assert_eq!(found, until_end(&greedy.float32), "{:?}", greedy.prompt);
        if greedy.exact {
            assert_eq!(found, until_end(&greedy.llama_cpp), "{:?}", greedy.prompt);
            exact += 1;
        }
    }
    assert!(exact >= 3);
    cluster.stop();
}

#[test]
fn smollm2_with_fast_products_parts_from_float32_only_where_rounding_decides() {
    let files = distkv::model::load::open(&smollm2::path()).unwrap();
    for nodes in [&[512][..], &[64, 64, 64, 64]] {
        let mut setup = Setup::new(FabricChoice::Shm, KvDtype::F32, nodes);
        (setup.threads, setup.math) = (2, Math::Fast);
        let cluster = setup.start(&files);
        let (mut same, mut all) = (0, 0);
        for greedy in smollm2::golden().greedy {
            let found = tokens(cluster.submit(greedy.ids.clone(), greedy.float32.len(), false));
            let (common, end) =
                greedy.common(&found, &files.config.eos).unwrap_or_else(|e| panic!("on {nodes:?}: {e}"));
            same += common;
            all += end;
        }
        assert!(2 * same > all, "on {nodes:?} only {same} tokens of {all} before they part");
        cluster.stop();
    }
}
