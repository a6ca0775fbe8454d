//! The 8-bit float E4M3 of the Open Compute Project (OFP8, 2023): sign, four bits
//! of exponent (bias 7), three of mantissa; largest 448, no infinities, and all
//! ones for what is no number.

/// The largest value.
pub const MAX: f32 = 448.0;

/// What makes a value of the exponent and mantissa, put where an f32 has its own:
/// the difference of the biases. Exact, the small ones without a leading one
/// among them.
pub const SCALE: f32 = f32::from_bits((127 + 127 - 7) << 23);

/// The value of a byte.
pub fn to_f32(byte: u8) -> f32 {
    if byte & 0x7f == 0x7f {
        return f32::NAN.copysign(if byte & 0x80 == 0 { 1.0 } else { -1.0 });
    }
    let bits = u32::from(byte & 0x80) << 24 | u32::from(byte & 0x7f) << 20;
    f32::from_bits(bits) * SCALE
}

/// The byte nearest to a value, to even where two are; what is too large becomes
/// the largest ([`MAX`]).
pub fn from_f32(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    if x.is_nan() {
        return sign | 0x7f;
    }
    let x = x.abs().min(MAX);
    // Adding a number whose last bit weighs what the result's last bit will
    // rounds as wanted; below 2^-6 the last bit is always 2^-9.
    let exponent = (x.to_bits() >> 23).max(127 - 6);
    let big = f32::from_bits((exponent + 20) << 23);
    let rounded = (x + big) - big;
    // The inverse of `to_f32`, exact: the product has no more bits.
    sign | ((rounded * SCALE.recip()).to_bits() >> 20) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_back() {
        for byte in 0..=255u8 {
            let value = to_f32(byte);
            assert_eq!(from_f32(value), byte, "{value}");
        }
        assert_eq!([to_f32(0x7e), to_f32(0x08), to_f32(0x01), to_f32(0xb8)], [448.0, 0.015625, 0.001953125, -1.0]);
    }

    #[test]
    fn values_between_go_to_the_nearer_and_to_even() {
        for byte in 0..0x7eu8 {
            let (low, high) = (to_f32(byte), to_f32(byte + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(from_f32(middle), byte + (byte & 1), "{middle}");
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() - 1)), byte);
            assert_eq!(from_f32(-f32::from_bits(middle.to_bits() + 1)), 0x80 | (byte + 1));
        }
        assert_eq!([from_f32(1e9), from_f32(f32::NEG_INFINITY), from_f32(464.0)], [0x7e, 0xfe, 0x7e]);
        assert_eq!([from_f32(1e-30), from_f32(-0.0)], [0, 0x80]);
    }
}
