//! cli.

pub mod status;
