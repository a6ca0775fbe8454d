//! DistKV: an LLM serving engine whose KV cache is one pool across all nodes.
//!
//! See ARCHITECTURE.md for the whole and `kv`, `attention` and `control` for
//! the parts this project exists for.

pub mod attention;
pub mod cli;
pub mod codec;
pub mod control;
pub mod device;
pub mod e4m3;
pub mod engine;
pub mod ingress;
pub mod kv;
pub mod model;
pub mod node;
pub mod schedule;
pub mod server;
pub mod sim;
