//! Weights as they lie in a file: element type, shape and bytes.

use std::fmt;

use super::disk::Stored;

/// Element or block type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float E4M3 ([`crate::e4m3`]); a value is code times scale, and scales
    /// lie apart ([`Scales`]).
    F8E4m3,
    /// GGUF: 32 signed bytes and one f16 scale.
    Q8_0,
    /// GGUF: 32 4-bit values and one f16 scale.
    Q4_0,
    /// GGUF: 32 4-bit values, an f16 scale and an f16 minimum.
    Q4_1,
    /// GGUF: 256 4-bit values with 6-bit sub-scales and sub-minima.
    Q4K,
    /// GGUF: 256 6-bit values with 8-bit sub-scales.
    Q6K,
}

impl DType {
    /// Elements that are stored together.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4m3 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one such block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bytes of `elements` elements; `None` where they do not fill whole blocks
    /// or the size overflows.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4m3 => "f8_e4m3",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
        })
    }
}

/// Scales of a matrix of FP8: one for each block of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales<'a> {
    /// Rows and columns that share a scale; the last blocks may have fewer. All of
    /// the matrix, a row, or 128 × 128 in files as they are found.
    pub block: (usize, usize),
    /// `[ceil(rows / block.0), ceil(cols / block.1)]`, row-major; finite and above 0.
    pub values: &'a [f32],
}

impl Scales<'_> {
    /// The scales of a row of a matrix of `cols` columns: one for each `block.1`.
    pub fn row(&self, row: usize, cols: usize) -> &[f32] {
        let width = cols.div_ceil(self.block.1);
        &self.values[row / self.block.0 * width..][..width]
    }
}

/// A tensor in a mapped or read file: `[rows, cols]`, row-major, quantisation
/// blocks along `cols`. A vector has one row.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Output features (rows of a weight matrix).
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `rows × dtype.bytes(cols)` bytes, of no particular alignment.
    pub bytes: &'a [u8],
    /// Where the same bytes lie in a file, if they do: for devices that read them
    /// from there rather than through the mapping.
    pub stored: Option<Stored<'a>>,
    /// What the codes are multiplied with: those of FP8 have them, no others.
    pub scales: Option<Scales<'a>>,
}
