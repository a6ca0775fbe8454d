//! Rotary embeddings: from what a configuration says to angles a position.

use std::f64::consts::PI;

use crate::device::Rope;

/// How the trained angles are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    Default,
    /// All angles divided by `factor`.
    Linear {
        /// ≥ 1 in practice, > 0 always.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, those
    /// between blended.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// `original / low` is the shortest wavelength that is divided in full.
        low: f64,
        /// `original / high` is the longest wavelength that is kept.
        high: f64,
        /// Context the model was first trained for.
        original: f64,
    },
    /// YaRN (arXiv 2309.00071): a ramp over the dimensions between the two.
    Yarn {
        /// Divisor of the interpolated dimensions.
        factor: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Rotations over `original` above which a dimension is kept.
        beta_fast: f64,
        /// Rotations over `original` below which it is divided in full.
        beta_slow: f64,
        /// Context the model was first trained for.
        original: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Each angle divided by its own factor (GGUF's `rope_freqs`).
    Factors(Vec<f32>),
}

/// YaRN's factor on cos and sin for a stretch of `factor`.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// Angles of the `head_dim / 2` pairs, computed in f64 and rounded once.
pub fn resolve(theta: f64, head_dim: usize, scaling: &RopeScaling, interleaved: bool) -> Rope {
    let dim = head_dim as f64;
    let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim));
    let mut magnitude = 1.0;
    let inv_freq: Vec<f64> = match scaling {
        RopeScaling::Default => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Factors(factors) => plain.zip(factors).map(|(f, factor)| f / f64::from(*factor)).collect(),
        &RopeScaling::Llama3 { factor, low, high, original } => plain
            .map(|f| {
                let wavelength = 2.0 * PI / f;
                if wavelength < original / high {
                    f
                } else if wavelength > original / low {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            })
            .collect(),
        &RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original, truncate } => {
            magnitude = attention_factor;
            // The dimension that turns `rotations` times over the original context.
            let dimension = |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
            let (mut start, mut end) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (start, end) = (start.floor(), end.ceil());
            }
            let (start, mut end) = (start.max(0.0), end.min(dim - 1.0));
            if start == end {
                end += 0.001;
            }
            plain
                .enumerate()
                .map(|(i, f)| {
                    let ramp = ((i as f64 - start) / (end - start)).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                })
                .collect()
        }
    };
    Rope { inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(), magnitude: magnitude as f32, interleaved }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_a_geometric_series() {
        let rope = resolve(10_000.0, 8, &RopeScaling::Default, false);
        assert_eq!(rope.inv_freq, [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(rope.magnitude, 1.0);
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let plain = resolve(500_000.0, 128, &RopeScaling::Default, false).inv_freq;
        let scaled = resolve(500_000.0, 128, &scaling, false).inv_freq;
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        for (s, p) in scaled.iter().zip(&plain) {
            assert!(*s <= *p && *s >= p / 8.0);
        }
    }

    #[test]
    fn yarn_ramps_from_kept_to_divided() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: yarn_mscale(4.0, 1.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
            original: 32768.0,
            truncate: true,
        };
        let plain = resolve(1e6, 128, &RopeScaling::Default, false).inv_freq;
        let rope = resolve(1e6, 128, &scaling, false);
        assert_eq!(rope.inv_freq[0], plain[0]);
        assert_eq!(rope.inv_freq[63], plain[63] / 4.0);
        assert!((rope.magnitude - 1.138_629_4).abs() < 1e-6);
    }

    #[test]
    fn factors_divide_one_by_one() {
        let rope = resolve(10_000.0, 4, &RopeScaling::Factors(vec![1.0, 2.0]), true);
        assert_eq!(rope.inv_freq, [1.0, 0.005]);
        assert!(rope.interleaved);
    }
}
