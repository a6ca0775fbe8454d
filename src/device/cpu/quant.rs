//! Weights' bytes to f32, one row at a time: the plain reading of every stored
//! format, which packing is tested against.

use half::{bf16, f16};

use crate::device::tensor::DType;
use crate::e4m3;

/// Reads a row of `out.len()` elements. `bytes` holds exactly that many. Codes of
/// FP8 are not scaled yet.
pub fn dequantize_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), dtype.bytes(out.len()), "{dtype} row of {} elements", out.len());
    match dtype {
        DType::F32 => each::<4>(bytes, out, f32::from_le_bytes),
        DType::F16 => each::<2>(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        DType::Bf16 => each::<2>(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        DType::F8E4m3 => each::<1>(bytes, out, |[code]| e4m3::to_f32(code)),
        DType::Q8_0 => blocks::<34, 32>(bytes, out, q8_0),
        DType::Q4_0 => blocks::<18, 32>(bytes, out, q4_0),
        DType::Q4_1 => blocks::<20, 32>(bytes, out, q4_1),
        DType::Q4K => blocks::<144, 256>(bytes, out, q4_k),
        DType::Q6K => blocks::<210, 256>(bytes, out, q6_k),
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    for (x, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *x = read(*b);
    }
}

fn blocks<const B: usize, const L: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn(&[u8; B], &mut [f32; L])) {
    for (x, b) in out.as_chunks_mut::<L>().0.iter_mut().zip(bytes.as_chunks::<B>().0) {
        read(b, x);
    }
}

/// The f16 at byte `at`.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..]) {
        *x = d * f32::from(q as i8);
    }
}

/// Nibble `i` of 16 bytes: the low ones are elements 0..16, the high ones the rest.
fn nibble(bytes: &[u8], i: usize) -> f32 {
    f32::from(if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * (nibble(&block[2..], i) - 8.0);
    }
}

fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, x) in out.iter_mut().enumerate() {
        *x = d * nibble(&block[4..], i) + m;
    }
}

/// 6-bit scale and minimum of sub-block `j` of 8, out of their 12 bytes.
pub(super) fn q4_k_scale_min(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4)
    }
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for j in 0..8 {
        let (scale, min) = q4_k_scale_min(&block[4..16], j);
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        let bytes = &block[16 + j / 2 * 32..][..32];
        for (x, &b) in out[j * 32..][..32].iter_mut().zip(bytes) {
            let q = if j % 2 == 0 { b & 15 } else { b >> 4 };
            *x = scale * f32::from(q) - min;
        }
    }
}

/// The 6-bit code of element `i` of a Q6_K block.
pub(super) fn q6_k_code(block: &[u8], i: usize) -> u8 {
    // Halves of 128; in each, four runs of 32 share 64 low and 32 high bytes.
    let (half, run, l) = (i / 128, i / 32 % 4, i % 32);
    let low = block[half * 64 + run % 2 * 32 + l];
    let low = if run < 2 { low & 15 } else { low >> 4 };
    low | (block[128 + half * 32 + l] >> (2 * run) & 3) << 4
}

fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (i, x) in out.iter_mut().enumerate() {
        let scale = d * f32::from(block[192 + i / 16] as i8);
        *x = scale * (f32::from(q6_k_code(block, i)) - 32.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let mut out = vec![f32::NAN; bytes.len() / dtype.block_bytes() * dtype.block_len()];
        dequantize_row(dtype, bytes, &mut out);
        out
    }

    fn half(x: f32) -> [u8; 2] {
        f16::from_f32(x).to_le_bytes()
    }

    #[test]
    fn plain_floats() {
        assert_eq!(read(DType::F32, &1.5f32.to_le_bytes()), [1.5]);
        assert_eq!(read(DType::F16, &half(-0.25)), [-0.25]);
        assert_eq!(read(DType::Bf16, &bf16::from_f32(3.0).to_le_bytes()), [3.0]);
    }

    #[test]
    fn blocks_of_32() {
        let codes: Vec<u8> = (0..32).map(|i: i32| (i - 16) as u8).collect();
        let expected: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) * 0.5).collect();
        assert_eq!(read(DType::Q8_0, &[&half(0.5)[..], &codes].concat()), expected);
        // Byte i holds i in its low and 15 − i in its high nibble.
        let nibbles: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let code = |i: usize| if i < 16 { i as f32 } else { 31.0 - i as f32 };
        let expected: Vec<f32> = (0..32).map(|i| (code(i) - 8.0) * 2.0).collect();
        assert_eq!(read(DType::Q4_0, &[&half(2.0)[..], &nibbles].concat()), expected);
        let expected: Vec<f32> = (0..32).map(|i| code(i) * 2.0 - 3.0).collect();
        assert_eq!(read(DType::Q4_1, &[&half(2.0)[..], &half(-3.0), &nibbles].concat()), expected);
    }

    #[test]
    fn q4_k_sub_blocks() {
        // Sub-block j: scale 5j + 1 and minimum 7j + 2 (six bits), packed as GGUF does.
        let (scale, min) = (|j: u8| 5 * j + 1, |j: u8| 7 * j + 2);
        let mut s = [0u8; 12];
        for j in 0..4 {
            s[j as usize] = scale(j) | (scale(j + 4) >> 4) << 6;
            s[j as usize + 4] = min(j) | (min(j + 4) >> 4) << 6;
            s[j as usize + 8] = scale(j + 4) & 15 | (min(j + 4) & 15) << 4;
        }
        let codes: Vec<u8> = (0..256).map(|i: u32| (i * 7 % 16) as u8).collect();
        let mut bytes = [&half(0.5)[..], &half(0.25), &s].concat();
        for pair in codes.chunks(64) {
            bytes.extend((0..32).map(|i| pair[i] | pair[i + 32] << 4));
        }
        let out = read(DType::Q4K, &bytes);
        for (i, &x) in out.iter().enumerate() {
            let j = (i / 32) as u8;
            assert_eq!(x, 0.5 * f32::from(scale(j)) * f32::from(codes[i]) - 0.25 * f32::from(min(j)), "element {i}");
        }
    }

    #[test]
    fn q6_k_sub_blocks() {
        let codes: Vec<u8> = (0..256).map(|i: u32| (i * 11 % 64) as u8).collect();
        let mut block = [0u8; 210];
        for (i, &code) in codes.iter().enumerate() {
            let (half, run, l) = (i / 128, i / 32 % 4, i % 32);
            block[half * 64 + run % 2 * 32 + l] |= (code & 15) << (run / 2 * 4);
            block[128 + half * 32 + l] |= (code >> 4) << (2 * run);
        }
        for j in 0..16 {
            block[192 + j] = (j as i8 * 3 - 20) as u8;
        }
        block[208..].copy_from_slice(&half(0.125));
        for (i, &x) in read(DType::Q6K, &block).iter().enumerate() {
            let scale = 0.125 * (i as f32 / 16.0).floor().mul_add(3.0, -20.0);
            assert_eq!(x, scale * (f32::from(codes[i]) - 32.0), "element {i}");
        }
    }
}
