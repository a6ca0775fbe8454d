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
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one such block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
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
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q4K => "q4_k",
            Self::Q6K => "q6_k",
        })
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
}
