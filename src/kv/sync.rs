//! The atomics of the rBlock table, in one place: the model checkers compile
//! `table.rs` a second time against their own module of this name (see
//! `tests/loom_table.rs` and `tests/shuttle_table.rs`).

pub use std::hint::spin_loop;
pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Parts of the free list.
pub const SHARDS: usize = 8;

/// The calling thread's part of the free list, below [`SHARDS`].
#[inline]
pub fn home() -> usize {
    use std::cell::Cell;

    static THREADS: AtomicU32 = AtomicU32::new(0);
    thread_local! {
        static HOME: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    let mut home = HOME.get();
    if home == usize::MAX {
        home = THREADS.fetch_add(1, Ordering::Relaxed) as usize % SHARDS;
        HOME.set(home);
    }
    home
}
