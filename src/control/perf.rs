//! The performance model of an instance (paper, section on planning): how long
//! a step takes, by its batch and by the keys it attends to; and how an
//! instance learns its own while it runs.

use serde::{Deserialize, Serialize};

/// `T(β, S) = (fixed + row · β) + key · S`: a step of β rows that attend to S
/// keys in all takes T. The first two terms are the paper's W(β) / f(β), which
/// is nearly affine (weights are read once, then each row costs arithmetic);
/// the last is Σ S_r / g(S). Nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerfModel {
    /// Of any step.
    pub fixed_ns: f32,
    /// Of each row.
    pub row_ns: f32,
    /// Of each key attended to by a row (all layers).
    pub key_ns: f32,
}

impl PerfModel {
    /// The same to three digits, so that a row that carries it does not change
    /// with every step.
    pub fn rounded(self) -> Self {
        let round = |ns: f32| {
            let unit = 10f32.powi(ns.max(1e-3).log10().floor() as i32 - 2);
            (ns / unit).round() * unit
        };
        Self { fixed_ns: round(self.fixed_ns), row_ns: round(self.row_ns), key_ns: round(self.key_ns) }
    }

    /// Time of a step of `rows` rows that attend to `keys` keys in all, ns.
    pub fn step_ns(&self, rows: f64, keys: f64) -> f64 {
        f64::from(self.fixed_ns) + f64::from(self.row_ns) * rows + f64::from(self.key_ns) * keys
    }
}

/// What a step weighs after one more: about the last 500 steps count.
const FORGET: f64 = 1.0 - 1.0 / 512.0;
/// Steps before there is a model.
const MIN_STEPS: u64 = 32;
/// A step further from the model than this many times the usual distance is
/// taken to be that far: a pause of the process is no news of the device.
const OUTLIER: f64 = 4.0;
/// Pull towards zero of what the steps do not tell, relative to what they do.
const RIDGE: f64 = 1e-9;

/// Learns a [`PerfModel`] from an instance's steps, one after the other: least
/// squares of the relative error with exponential forgetting, in its
/// information form (the sums, not their inverse), so that steps which are all
/// alike do no harm: what they cannot tell apart is shared out. No coefficient
/// is negative.
///
/// Give it steps of one kind, of one row a sequence: a key costs less where
/// many rows of a prompt read it together.
#[derive(Clone, Debug, Default)]
pub struct Fit {
    /// Σ w x xᵀ, x = (1, rows, keys).
    xx: [[f64; 3]; 3],
    /// Σ w x y.
    xy: [f64; 3],
    /// Σ w y².
    yy: f64,
    /// Usual relative distance of a step from the model.
    spread: f64,
    steps: u64,
    theta: [f64; 3],
}

impl Fit {
    /// Takes in a step of `rows` rows that attended to `keys` keys in all and
    /// took `ns` nanoseconds.
    pub fn step(&mut self, rows: u32, keys: u64, ns: u64) {
        let x = [1.0, f64::from(rows), keys as f64];
        let mut y = (ns as f64).max(1.0);
        let predicted: f64 = self.theta.iter().zip(x).map(|(t, x)| t * x).sum();
        if self.steps >= MIN_STEPS && predicted > 0.0 {
            // Never so narrow that a change for good is not followed: what is
            // clipped widens it.
            let far = OUTLIER * self.spread.max(1e-3);
            let distance = ((y - predicted) / predicted).clamp(-far, far);
            y = predicted * (1.0 + distance);
            self.spread += (distance.abs() - self.spread) / 32.0;
        }
        // The error that counts is relative: a long step is not worth more.
        let weight = 1.0 / (y * y);
        for i in 0..3 {
            for j in 0..3 {
                self.xx[i][j] = self.xx[i][j] * FORGET + weight * x[i] * x[j];
            }
            self.xy[i] = self.xy[i] * FORGET + weight * x[i] * y;
        }
        self.yy = self.yy * FORGET + weight * y * y;
        self.steps += 1;
        self.theta = self.solve();
        if self.steps == MIN_STEPS {
            self.spread = 0.1;
        }
    }

    /// Steps taken in.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The model, once enough steps were seen.
    pub fn model(&self) -> Option<PerfModel> {
        let [fixed, row, key] = self.theta;
        let model = PerfModel { fixed_ns: fixed as f32, row_ns: row as f32, key_ns: key as f32 };
        (self.steps >= MIN_STEPS).then_some(model)
    }

    /// The best coefficients of which none is negative: of three, exactly, by
    /// trying each set of those that are not zero.
    fn solve(&self) -> [f64; 3] {
        let mut best = ([0.0; 3], f64::INFINITY);
        for set in (1usize..8).rev() {
            let Some(theta) = self.solve_set(set) else { continue };
            let mut error = self.yy;
            for i in 0..3 {
                error -= 2.0 * theta[i] * self.xy[i];
                for j in 0..3 {
                    error += theta[i] * self.xx[i][j] * theta[j];
                }
            }
            // The larger set where there is nothing between them.
            if theta.iter().all(|t| *t >= 0.0) && error < best.1 - 1e-12 * self.yy {
                best = (theta, error);
            }
        }
        best.0
    }

    /// Least squares over the coefficients in `set` (bits), the others zero.
    /// `None`: a column has never been other than zero.
    fn solve_set(&self, set: usize) -> Option<[f64; 3]> {
        let used: Vec<usize> = (0..3).filter(|i| set >> i & 1 == 1).collect();
        let scale: Vec<f64> = used.iter().map(|&i| self.xx[i][i].sqrt()).collect();
        if scale.iter().any(|s| !s.is_finite() || *s <= 0.0) {
            return None;
        }
        // Scaled so that the diagonal is 1, then eliminated with pivots.
        let n = used.len();
        let mut a = [[0.0; 4]; 3];
        for i in 0..n {
            for j in 0..n {
                a[i][j] = self.xx[used[i]][used[j]] / (scale[i] * scale[j]);
            }
            a[i][i] += RIDGE;
            a[i][3] = self.xy[used[i]] / scale[i];
        }
        for column in 0..n {
            let pivot = (column..n).max_by(|&i, &j| a[i][column].abs().total_cmp(&a[j][column].abs()))?;
            a.swap(column, pivot);
            if a[column][column].abs() < RIDGE / 2.0 {
                return None;
            }
            for row in 0..n {
                if row != column {
                    let factor = a[row][column] / a[column][column];
                    for k in column..4 {
                        a[row][k] -= factor * a[column][k];
                    }
                }
            }
        }
        let mut theta = [0.0; 3];
        for i in 0..n {
            theta[used[i]] = a[i][3] / a[i][i] / scale[i];
        }
        Some(theta)
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const TRUTH: PerfModel = PerfModel { fixed_ns: 6.0e6, row_ns: 4.0e4, key_ns: 110.0 };

    fn near(got: f32, truth: f32, share: f32) -> bool {
        (got - truth).abs() <= share * truth
    }

    /// A step of `rng`'s choice and its time by `model`, with noise.
    fn step(rng: &mut ChaCha8Rng, model: &PerfModel, noise: f64) -> (u32, u64, u64) {
        let rows = rng.random_range(1..=64);
        let keys = u64::from(rows) * rng.random_range(100..8000);
        let factor = 1.0 + rng.random_range(-noise..=noise);
        (rows, keys, (model.step_ns(f64::from(rows), keys as f64) * factor) as u64)
    }

    #[test]
    fn finds_the_model_behind_noise() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut fit = Fit::default();
        assert_eq!(fit.model(), None);
        for _ in 0..2000 {
            let (rows, keys, ns) = step(&mut rng, &TRUTH, 0.05);
            fit.step(rows, keys, ns);
        }
        let got = fit.model().unwrap();
        assert!(near(got.fixed_ns, TRUTH.fixed_ns, 0.05), "{got:?}");
        assert!(near(got.row_ns, TRUTH.row_ns, 0.3), "{got:?}");
        assert!(near(got.key_ns, TRUTH.key_ns, 0.03), "{got:?}");
    }

    #[test]
    fn steps_that_are_alike_still_give_a_model_that_predicts_them() {
        let mut fit = Fit::default();
        for _ in 0..5000 {
            fit.step(8, 4000, 7_000_000);
        }
        let got = fit.model().unwrap();
        assert!((got.step_ns(8.0, 4000.0) - 7e6).abs() < 7e4, "{got:?}");
        assert!(got.fixed_ns >= 0.0 && got.row_ns >= 0.0 && got.key_ns >= 0.0);
        // No key at all: that column tells nothing.
        let mut fit = Fit::default();
        for rows in 0..500u32 {
            fit.step(rows % 7 + 1, 0, 1_000_000 + u64::from(rows % 7 + 1) * 1000);
        }
        let got = fit.model().unwrap();
        assert!(near(got.fixed_ns, 1e6, 0.01) && got.key_ns == 0.0, "{got:?}");
    }

    #[test]
    fn no_coefficient_is_negative() {
        // Times that fall with the rows: the best line has a negative slope.
        let mut fit = Fit::default();
        for i in 0..400u32 {
            let rows = i % 30 + 1;
            fit.step(rows, u64::from(rows), 2_000_000 - u64::from(rows) * 10_000);
        }
        let got = fit.model().unwrap();
        assert!(got.fixed_ns > 0.0 && got.row_ns >= 0.0 && got.key_ns >= 0.0, "{got:?}");
    }

    #[test]
    fn a_pause_is_no_news_and_a_change_is() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut fit = Fit::default();
        for i in 0..1000 {
            let (rows, keys, ns) = step(&mut rng, &TRUTH, 0.02);
            // Now and then the process stands still for a second.
            fit.step(rows, keys, if i % 100 == 50 { 1_000_000_000 } else { ns });
        }
        let got = fit.model().unwrap();
        let (at, truth) = (got.step_ns(32.0, 64_000.0), TRUTH.step_ns(32.0, 64_000.0));
        assert!((at - truth).abs() < 0.1 * truth, "{got:?}");
        let slower = PerfModel { key_ns: TRUTH.key_ns * 2.0, ..TRUTH };
        for _ in 0..3000 {
            let (rows, keys, ns) = step(&mut rng, &slower, 0.02);
            fit.step(rows, keys, ns);
        }
        assert!(near(fit.model().unwrap().key_ns, slower.key_ns, 0.1), "{:?}", fit.model());
    }
}
