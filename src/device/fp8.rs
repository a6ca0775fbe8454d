//! What holds of FP8 weights on every device.
//!
//! A value is `code · scale`: codes are [`e4m3`](crate::e4m3), scales are those of
//! the whole matrix, of a row, or of a block ([`Scales`](super::tensor::Scales)).
//! Activations stay 16 or 32 bits wide on both devices, so what a file says of how
//! they are to be rounded to FP8 (static or dynamic, scales of its own) is not
//! needed. The CPU device widens weights to bf16 as it packs them; the CUDA device
//! keeps the codes.

use super::tensor::{DType, RawTensor};
use super::{DeviceError, Result};

/// Refuses FP8 without its scales, scales of something else, and codes that are no
/// number.
pub fn check(part: &RawTensor<'_>) -> Result<()> {
    check_scales(part)?;
    // No branch inside a run, so that it goes at the speed of memory.
    let nan = |run: &[u8]| run.iter().fold(false, |found, code| found | (code & 0x7f == 0x7f));
    match part.scales.is_some() && part.bytes.chunks(4096).any(nan) {
        true => Err(DeviceError::Unsupported("an FP8 weight that is not a number".into())),
        false => Ok(()),
    }
}

/// The same without the codes, for who reads them elsewhere.
pub fn check_scales(part: &RawTensor<'_>) -> Result<()> {
    let Some(scales) = part.scales else {
        return match part.dtype {
            DType::F8E4m3 => Err(DeviceError::Unsupported("FP8 weights without scales".into())),
            _ => Ok(()),
        };
    };
    let (rows, cols) = scales.block;
    let count = match rows.min(cols) {
        0 => None,
        _ => Some(part.rows.div_ceil(rows) * part.cols.div_ceil(cols)),
    };
    if part.dtype != DType::F8E4m3 || count != Some(scales.values.len()) {
        return Err(DeviceError::Unsupported(format!(
            "{} scales of {rows} × {cols} for a {} matrix of {} × {}",
            scales.values.len(),
            part.dtype,
            part.rows,
            part.cols
        )));
    }
    if !scales.values.iter().all(|s| s.is_finite() && *s > 0.0) {
        return Err(DeviceError::Unsupported("a scale of FP8 weights that is not a finite number above 0".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tensor::Scales;
    use super::*;

    #[test]
    fn codes_and_scales_must_fit_each_other() {
        let codes = [0u8, 0x38, 0x7e, 0xfe, 0x01, 0x80];
        let check = |dtype, bytes: &[u8], scales: Option<(usize, usize, &[f32])>| {
            let scales = scales.map(|(rows, cols, values)| Scales { block: (rows, cols), values });
            super::check(&RawTensor { dtype, rows: 2, cols: 3, bytes, stored: None, scales }).map_err(|e| e.to_string())
        };
        check(DType::F8E4m3, &codes, Some((2, 3, &[0.5]))).unwrap();
        check(DType::F8E4m3, &codes, Some((1, 3, &[0.5, 2.0]))).unwrap();
        check(DType::F8E4m3, &codes, Some((128, 2, &[0.5, 2.0]))).unwrap();
        check(DType::Q8_0, &codes, None).unwrap();
        assert!(check(DType::F8E4m3, &codes, None).unwrap_err().contains("without scales"));
        for wrong in [(1, 3, &[0.5][..]), (2, 3, &[0.5, 0.5]), (0, 3, &[]), (2, 3, &[])] {
            assert!(check(DType::F8E4m3, &codes, Some(wrong)).unwrap_err().contains("scales of"), "{wrong:?}");
        }
        assert!(check(DType::Bf16, &codes, Some((2, 3, &[1.0]))).is_err());
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(
                check(DType::F8E4m3, &codes, Some((2, 3, &[scale]))).unwrap_err().contains("finite number above 0")
            );
        }
        for nan in [0x7f, 0xff] {
            let codes = [0, 0, 0, 0, 0, nan];
            assert!(check(DType::F8E4m3, &codes, Some((2, 3, &[1.0]))).unwrap_err().contains("not a number"));
        }
    }
}
