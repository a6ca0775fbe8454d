//! Random weights in FP8, as the files are that are found.

use half::bf16;
use serde_json::{Value, json};

use super::{Generator, splitmix64};
use crate::e4m3;

/// What has a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// A matrix: f32 `weight_scale`, as AutoFP8 and Model Optimizer write it.
    Tensor,
    /// An output feature: bf16 `weight_scale`, as llm-compressor writes it.
    Channel,
    /// 128 × 128: bf16 `weight_scale_inv`, as in Qwen3-*-FP8.
    Block,
}

impl Scaling {
    /// `quantization_config` of `config.json`.
    pub(super) fn config(self) -> Value {
        match self {
            Self::Tensor => {
                json!({"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]})
            }
            Self::Channel => json!({
                "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
                "ignore": ["lm_head"], "kv_cache_scheme": null,
                "config_groups": {"group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true, "dynamic": false
                    },
                    "input_activations": {
                        "num_bits": 8, "type": "float", "strategy": "token", "symmetric": true, "dynamic": true
                    }
                }}
            }),
            Self::Block => json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
                "modules_to_not_convert": ["lm_head"]
            }),
        }
    }
}

/// A matrix of codes.
#[derive(Clone)]
pub(super) struct Codes {
    generator: Generator,
    scaling: Scaling,
    /// Rows and columns that share a scale.
    block: (usize, usize),
    shape: (usize, usize),
    scales: Vec<f32>,
}

impl Codes {
    pub fn new(generator: Generator, scaling: Scaling, rows: usize, cols: usize) -> Self {
        let block = match scaling {
            Scaling::Tensor => (rows, cols),
            Scaling::Channel => (1, cols),
            Scaling::Block => (128, 128),
        };
        let count = rows.div_ceil(block.0) * cols.div_ceil(block.1);
        let scale = |j| {
            let quarters = (splitmix64(generator.key ^ j) >> 62) as f32;
            let least = generator.amplitude / e4m3::MAX * (1.0 + 0.25 * quarters);
            let near = bf16::from_f32(least);
            if near.to_f32() < least { bf16::from_bits(near.to_bits() + 1).to_f32() } else { near.to_f32() }
        };
        Self { generator, scaling, block, shape: (rows, cols), scales: (0..count as u64).map(scale).collect() }
    }

    /// What follows the weight's name in that of its scales.
    pub fn scales_name(&self) -> &'static str {
        if self.scaling == Scaling::Block { "_scale_inv" } else { "_scale" }
    }

    pub fn scales_shape(&self) -> Vec<usize> {
        let (rows, cols) = self.shape;
        match self.scaling {
            Scaling::Tensor => vec![1],
            Scaling::Channel => vec![rows, 1],
            Scaling::Block => vec![rows.div_ceil(self.block.0), cols.div_ceil(self.block.1)],
        }
    }

    /// The scales' type as safetensors names it, and its bytes.
    pub fn scales_stored(&self) -> (&'static str, usize) {
        if self.scaling == Scaling::Tensor { ("F32", 4) } else { ("BF16", 2) }
    }

    pub fn fill_scales(&self, first: u64, out: &mut [u8]) {
        let size = self.scales_stored().1;
        for (out, scale) in out.chunks_exact_mut(size).zip(&self.scales[first as usize..]) {
            // The first two bytes of a bf16 as f32 are zeros.
            out.copy_from_slice(&scale.to_le_bytes()[4 - size..]);
        }
    }

    pub fn fill(&self, first: u64, out: &mut [u8]) {
        let cols = self.shape.1 as u64;
        let wide = self.shape.1.div_ceil(self.block.1);
        let mut index = first;
        let mut left = out;
        while !left.is_empty() {
            let (row, col) = ((index / cols) as usize, (index % cols) as usize);
            // To the end of the row's part that has one scale.
            let run = (self.block.1 - col % self.block.1).min(self.shape.1 - col).min(left.len());
            let scale = self.scales[row / self.block.0 * wide + col / self.block.1];
            let (now, rest) = left.split_at_mut(run);
            for (code, i) in now.iter_mut().zip(index..) {
                *code = e4m3::from_f32(self.generator.at(i) / scale);
            }
            (left, index) = (rest, index + run as u64);
        }
    }
}
