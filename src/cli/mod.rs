//! cli.

pub mod bench;
