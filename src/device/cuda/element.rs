//! The working precision of a CUDA device: activations, weights, and KV unless
//! that is FP8.

use crate::device::{DeviceError, Result};
use crate::kv::rblock::KvDtype;

/// Element type of activations, weights and most KV. The residual stream, sums and
/// logits are f32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Element {
    /// Bytes.
    pub const fn size(self) -> usize {
        2
    }

    /// How kernels for it are named: `<kernel>_bf16`.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// That in which KV of `dtype` is attended to.
    pub fn of_kv(dtype: KvDtype) -> Result<Self> {
        match dtype {
            KvDtype::Bf16 | KvDtype::Fp8 => Ok(Self::Bf16),
            KvDtype::F16 => Ok(Self::F16),
            KvDtype::F32 => {
                Err(DeviceError::Unsupported("CUDA: KV in f32; its kernels read bf16, f16 or fp8 (--kv-dtype)".into()))
            }
        }
    }

    /// The two bytes of a value, rounded to nearest even.
    pub fn narrow(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => half::bf16::from_f32(value).to_bits(),
            Self::F16 => half::f16::from_f32(value).to_bits(),
        }
    }

    /// One value, from its two bytes.
    pub fn widen(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => half::bf16::from_bits(bits).to_f32(),
            Self::F16 => half::f16::from_bits(bits).to_f32(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_computes_in_the_types_of_16_bits() {
        for dtype in [KvDtype::Bf16, KvDtype::Fp8] {
            assert_eq!(Element::of_kv(dtype).unwrap(), Element::Bf16);
        }
        assert_eq!(Element::of_kv(KvDtype::F16).unwrap(), Element::F16);
        let refused = Element::of_kv(KvDtype::F32).unwrap_err().to_string();
        assert!(refused.contains("f32") && refused.contains("bf16, f16 or fp8 (--kv-dtype)"), "{refused}");
    }
}
