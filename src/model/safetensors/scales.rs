//! Scales of FP8 tensors: beside `name.weight` lies `name.weight_scale` or
//! `name.weight_scale_inv`, of f32, bf16 or f16. Which part of the weight a scale is
//! for is told by the shape: everything (`[]`, `[1]`, `[1, 1]`), a row (`[rows]`,
//! `[rows, 1]`), or 128 × 128 (`[ceil(rows / 128), ceil(cols / 128)]`, also with ones
//! between, as Model Optimizer has it).

use std::collections::HashMap;

use half::{bf16, f16};
use safetensors::Dtype;

use super::{File, Found};
use crate::device::tensor::Scales;
use crate::model::error::{ModelError, Result};

/// Rows and columns of a block.
const BLOCK: usize = 128;

/// Names of scales, after that of the weight.
const SCALES: [&str; 2] = ["_scale", "_scale_inv"];

/// What else stands beside a weight and changes what it means.
const OTHERS: [&str; 5] = ["_zero_point", "_scale_2", "_packed", "_g_idx", "_shape"];

/// The scales of a matrix, checked against its shape.
#[derive(Debug)]
pub(super) struct OwnScales {
    block: (usize, usize),
    values: Vec<f32>,
}

impl OwnScales {
    pub fn view(&self) -> Scales<'_> {
        Scales { block: self.block, values: &self.values }
    }
}

/// Takes the scales of the FP8 weight `name`, which is in file `at`, out of what was
/// found.
pub(super) fn take(
    files: &[File<'_>],
    found: &mut HashMap<String, Found>,
    name: &str,
    at: usize,
    shape: (usize, usize),
) -> Result<OwnScales> {
    for other in OTHERS {
        if let Some(tensor) = found.get(&format!("{name}{other}")) {
            let problem = "is not supported: FP8 weights are code times scale and nothing else";
            return Err(ModelError::tensor(files[tensor.file].0, format!("{name}{other}"), problem));
        }
    }
    let mut scales = SCALES.map(|s| format!("{name}{s}")).into_iter().filter_map(|s| found.remove_entry(&s));
    match (scales.next(), scales.next()) {
        (Some((scale, tensor)), None) => read(files[tensor.file], &scale, &tensor, shape),
        (Some(_), Some((scale, tensor))) => {
            Err(ModelError::tensor(files[tensor.file].0, scale, "is a second scale of the same weight"))
        }
        (None, _) => {
            let problem = format!("type F8_E4M3, but there is neither {name}_scale nor {name}_scale_inv");
            Err(ModelError::tensor(files[at].0, name, problem))
        }
    }
}

/// A scale of a parameter that is not FP8 would make other weights of it.
pub(super) fn refuse_unused(file: &str, name: &str, left: &HashMap<String, Found>) -> Result<()> {
    // Model Optimizer's for activations before they meet the weight.
    if name.ends_with(".pre_quant_scale") {
        return Err(ModelError::tensor(file, name, "is not supported: it scales activations"));
    }
    let weight = SCALES.iter().chain(&OTHERS).find_map(|end| name.strip_suffix(end)).filter(|w| w.ends_with(".weight"));
    match weight {
        // Neither the weight nor its scale is of this model.
        Some(weight) if left.contains_key(weight) => Ok(()),
        Some(_) => Err(ModelError::tensor(file, name, "scales a weight that is not FP8 (F8_E4M3)")),
        None => Ok(()),
    }
}

fn read((file, bytes): File<'_>, name: &str, tensor: &Found, (rows, cols): (usize, usize)) -> Result<OwnScales> {
    let error = |problem: String| ModelError::tensor(file, name, problem);
    let (high, wide) = (rows.div_ceil(BLOCK), cols.div_ceil(BLOCK));
    let block = match *tensor.shape.as_slice() {
        [] | [1] | [1, 1] => (rows, cols),
        [n] | [n, 1] if n == rows => (1, cols),
        [r, c] | [r, 1, c, 1] if (r, c) == (high, wide) => (BLOCK, BLOCK),
        _ => {
            return Err(error(format!(
                "shape {:?}; for a weight of [{rows}, {cols}] it is [1], [{rows}, 1] or [{high}, {wide}]",
                tensor.shape
            )));
        }
    };
    let bytes = bytes.get(tensor.start..tensor.start.saturating_add(tensor.len)).unwrap_or_default();
    let values: Vec<f32> = match tensor.dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(error(format!("type {other:?} is not supported for scales; F32, BF16 and F16 are"))),
    };
    if values.len() != rows.div_ceil(block.0) * cols.div_ceil(block.1) {
        return Err(error(format!("{} values do not fill its shape", values.len())));
    }
    match values.iter().find(|s| !s.is_finite() || **s <= 0.0) {
        Some(scale) => Err(error(format!("{scale} is not a finite number above 0"))),
        None => Ok(OwnScales { block, values }),
    }
}
