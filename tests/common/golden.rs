//! The golden models of `tests/golden/models`, made by `scripts/goldens.py`.
//!
//! Use it as `#[path = "common/golden.rs"] mod golden;`.

use std::path::{Path, PathBuf};

use distkv::device::tensor::DType;
use distkv::model::load::{self, ModelFiles};
use distkv::model::synth;
use serde::Deserialize;

/// A small model of random weights, and what transformers computes with it.
#[derive(Debug, Deserialize)]
pub struct GoldenModel {
    /// File name without extension.
    #[serde(skip)]
    pub name: String,
    /// config.json.
    pub config: serde_json::Value,
    /// Of the weights.
    pub seed: u64,
    /// A few of them.
    pub weights: SomeWeights,
    /// The rotary embedding.
    pub rope: GoldenRope,
    /// Sliding window of each layer.
    pub windows: Vec<Option<u32>>,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The ids that follow greedily.
    pub greedy: Vec<u32>,
    /// By how much of the logits' spread the best token led at the least.
    pub smallest_margin: f32,
    /// Positions in `prompt + greedy`.
    pub positions: Vec<usize>,
    /// Next-token logits at each of `positions`, `[vocab]`.
    pub logits: Vec<Vec<f32>>,
}

/// The rotary embedding as transformers computes it.
#[derive(Debug, Deserialize)]
pub struct GoldenRope {
    /// Angle a position of each pair.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin.
    pub magnitude: f32,
}

/// The beginning of one tensor.
#[derive(Debug, Deserialize)]
pub struct SomeWeights {
    /// Hugging Face's name.
    pub name: String,
    /// The first values, row-major.
    pub first: Vec<f32>,
}

impl GoldenModel {
    /// Every golden model, by name.
    pub fn all() -> Vec<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
            .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
            .map(|entry| entry.expect("readable").path())
            .collect();
        paths.sort();
        assert!(paths.len() >= 13, "{} has only {} models", folder.display(), paths.len());
        paths
            .iter()
            .map(|path| {
                let text = std::fs::read(path).expect("readable");
                let mut model: Self =
                    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                model.name = path.file_stem().expect("named").to_string_lossy().into_owned();
                model
            })
            .collect()
    }

    /// Writes the model's files into `dir` and opens them.
    pub fn open(&self, dir: &Path, dtype: DType) -> ModelFiles {
        synth::synth_to(dir, &self.config, self.seed, dtype).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        load::open(dir).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// Largest difference to the golden logits at `positions[i]`, as a share of
    /// their spread (largest less smallest).
    pub fn difference(&self, i: usize, logits: &[f32]) -> f32 {
        let golden = &self.logits[i];
        assert_eq!(golden.len(), logits.len());
        let high = golden.iter().copied().fold(f32::MIN, f32::max);
        let low = golden.iter().copied().fold(f32::MAX, f32::min);
        let worst = golden.iter().zip(logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // NaN must not pass for small.
        if logits.iter().all(|x| x.is_finite()) { worst / (high - low) } else { f32::INFINITY }
    }
}
