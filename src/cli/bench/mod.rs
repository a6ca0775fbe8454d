//! Benchmarks.

pub mod fabric;
pub mod report;
