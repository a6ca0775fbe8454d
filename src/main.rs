//! The `distkv` binary.
