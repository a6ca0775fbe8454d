//! `distkv bench`: measurements, each beside a floor from the same run.

pub mod attention;
