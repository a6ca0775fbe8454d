//! The `distkv` binary.

fn main() {}
