//! cli.

pub mod model;
