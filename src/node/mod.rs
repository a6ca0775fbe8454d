//! A node: one process's engine, creditors and control plane, put together.
//!
//! Threads: *engine* (the step loop, with the device's own workers), *fabric*
//! (the one impure loop around the sans-IO controller), and one *creditor* a
//! data transport. They share the rBlock table, the published loans and
//! bounded queues, nothing else.

mod control_loop;
mod datagrams;
pub mod device;
pub mod rank;
mod start;
pub mod transports;

pub use control_loop::ClusterView;
pub use start::{ModelParts, Node, NodeConfig, NodeError, Tuning};
