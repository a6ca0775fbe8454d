//! The performance model of an instance (paper, section on planning): how long
//! a step takes, by its batch and by the keys it attends to.

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
