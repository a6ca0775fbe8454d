//! A linear layer's weights on the CPU.

use super::quant::dequantize_row;
use crate::device::tensor::{DType, RawTensor};
use crate::device::{DeviceError, Result};

/// Weights `[outs, cols]`: parts stacked along the output features.
pub struct Matrix {
    parts: Vec<Part>,
    outs: usize,
    cols: usize,
}

struct Part {
    dtype: DType,
    first: usize,
    rows: usize,
    bytes: Vec<u8>,
}

impl Matrix {
    pub(super) fn new(parts: &[RawTensor<'_>]) -> Result<Self> {
        let cols = parts.first().map_or(0, |p| p.cols);
        let mut matrix = Self { parts: Vec::new(), outs: 0, cols };
        for part in parts {
            check(part, cols)?;
            matrix.parts.push(Part {
                dtype: part.dtype,
                first: matrix.outs,
                rows: part.rows,
                bytes: part.bytes.to_vec(),
            });
            matrix.outs += part.rows;
        }
        Ok(matrix)
    }

    /// Output features.
    pub fn outs(&self) -> usize {
        self.outs
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Writes the weights of one output feature, `[cols]`.
    pub fn read_row(&self, out: usize, row: &mut [f32]) {
        for part in &self.parts {
            if (part.first..part.first + part.rows).contains(&out) {
                let bytes = part.bytes.len() / part.rows;
                dequantize_row(part.dtype, &part.bytes[(out - part.first) * bytes..][..bytes], row);
            }
        }
    }
}

/// Refuses a part whose bytes do not fit its shape or its neighbours.
pub(super) fn check(part: &RawTensor<'_>, cols: usize) -> Result<()> {
    if part.cols != cols {
        return Err(DeviceError::Unsupported(format!("stacking matrices of {cols} and {} input features", part.cols)));
    }
    let bytes = part.dtype.bytes(part.cols).and_then(|row| row.checked_mul(part.rows));
    if bytes != Some(part.bytes.len()) || part.rows == 0 || part.cols == 0 {
        return Err(DeviceError::Unsupported(format!(
            "a {} matrix of {} × {} in {} bytes",
            part.dtype,
            part.rows,
            part.cols,
            part.bytes.len()
        )));
    }
    Ok(())
}
