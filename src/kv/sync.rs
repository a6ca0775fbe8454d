//! The atomics of the rBlock table, in one place: the model checkers compile
//! `table.rs` a second time against their own module of this name (see
//! `tests/loom_table.rs` and `tests/shuttle_table.rs`).

pub use std::hint::spin_loop;
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
