//! The rBlock table under loom: the interleavings of two or three threads, in
//! the C11 memory model. A block's bytes are a cell that loom watches: whoever
//! holds the block touches it, so a block with two holders, or one handed over
//! without the memory of its last holder, is found as a data race.
//!
//! Every model runs twice. Once with loads as they are, which may then see
//! old values. Once with every access made a read-modify-write: loom 0.7 looks
//! for a race only with the last access to an atomic, so in "load, then
//! compare-and-swap" a thread's own load hides another's from it and most
//! orders are never tried; among read-modify-writes nothing is hidden.
//!
//! The table is compiled here a second time, against these atomics.
#![allow(dead_code)]

#[path = "../src/kv/entry.rs"]
mod entry;
#[path = "../src/kv/rblock.rs"]
mod rblock;
#[path = "../src/kv/table.rs"]
mod table;
mod sync {
    use std::cell::Cell;

    pub use loom::sync::atomic::{Ordering, fence};

    thread_local! {
        /// Loads and stores are read-modify-writes. (loom runs all threads of a model on
        /// one.)
        pub static STRONG: Cell<bool> = const { Cell::new(false) };
    }

    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            pub struct $name(loom::sync::atomic::$name);

            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(loom::sync::atomic::$name::new(value))
                }

                pub fn load(&self, order: Ordering) -> $value {
                    if STRONG.get() { self.0.fetch_add(0, order) } else { self.0.load(order) }
                }

                pub fn store(&self, value: $value, order: Ordering) {
                    if STRONG.get() {
                        self.0.swap(value, order);
                    } else {
                        self.0.store(value, order);
                    }
                }

                pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_add(value, order)
                }

                pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                    self.0.fetch_sub(value, order)
                }

                pub fn compare_exchange_weak(
                    &self,
                    from: $value,
                    to: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.0.compare_exchange(from, to, success, failure)
                }
            }
        };
    }

    atomic!(AtomicU32, u32);
    atomic!(AtomicU64, u64);

    pub fn spin_loop() {
        loom::thread::yield_now();
    }

    pub const SHARDS: usize = 2;

    loom::thread_local! {
        /// The stack that a model's thread begins at.
        pub static HOME: Cell<usize> = Cell::new(0);
    }

    pub fn home() -> usize {
        HOME.with(Cell::get)
    }
}

use loom::cell::Cell;
use loom::sync::Arc;
use loom::thread;
use rblock::LoanId;
use table::{BlockRef, Owner, RBlockTable, State};

/// A table and its blocks' bytes.
struct Pool {
    table: RBlockTable,
    bytes: Vec<Cell<u32>>,
}

impl Pool {
    fn new(blocks: u32) -> Arc<Self> {
        Arc::new(Self { table: RBlockTable::new(blocks), bytes: (0..blocks).map(|_| Cell::new(0)).collect() })
    }

    /// Uses a block that nobody else may be using.
    fn touch(&self, block: u32, value: u32) {
        self.bytes[block as usize].set(value);
        assert_eq!(self.bytes[block as usize].get(), value);
    }
}

/// Runs `model` in every order that `preemptions` allow, both ways; says how
/// many there were.
fn explore(name: &str, preemptions: Option<usize>, model: impl Fn() + Sync + Send + Copy + 'static) {
    use std::sync::atomic::{AtomicU64, Ordering};
    for strong in [false, true] {
        sync::STRONG.set(strong);
        let runs = std::sync::Arc::new(AtomicU64::new(0));
        let count = runs.clone();
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemptions;
        builder.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
        });
        let runs = runs.load(Ordering::Relaxed);
        println!("{name}, {} accesses: {runs} interleavings", if strong { "strong" } else { "weak" });
        assert!(!strong || runs > 1, "the model has no concurrency");
    }
}

#[test]
fn alloc_and_release_hand_a_block_over_with_its_memory() {
    explore("alloc/release", Some(3), || {
        let pool = Pool::new(2);
        let threads: Vec<_> = (1..=2)
            .map(|me| {
                let pool = pool.clone();
                thread::spawn(move || {
                    for _ in 0..2 {
                        if let Some(block) = pool.table.alloc(Owner::Sequence(me)) {
                            pool.touch(block.index, me);
                            assert_eq!(pool.table.release(block), Ok(true));
                            assert!(pool.table.release(block).is_err(), "freed twice");
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(pool.table.check_invariants().map(|c| c.free), Ok(2));
    });
}

#[test]
fn three_threads_on_one_block_take_turns() {
    explore("one block", Some(3), || {
        let pool = Pool::new(1);
        let work = |me: u32, pool: Arc<Pool>| {
            if let Some(block) = pool.table.alloc(Owner::Sequence(me)) {
                pool.touch(block.index, me);
                assert_eq!(pool.table.release(block), Ok(true));
            }
        };
        let (a, b) = (pool.clone(), pool.clone());
        let threads = [thread::spawn(move || work(1, a)), thread::spawn(move || work(2, b))];
        work(3, pool.clone());
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(pool.table.check_invariants().map(|c| c.free), Ok(1));
    });
}

#[test]
fn a_head_that_comes_back_is_not_the_same_head() {
    explore("aba", Some(3), || {
        let pool = Pool::new(3);
        let other = pool.clone();
        // While we are about to take block 0, the other takes 0 and 1 and puts
        // 0 back on top of 2.
        let thread = thread::spawn(move || {
            let first = other.table.alloc(Owner::Sequence(1)).unwrap();
            let second = other.table.alloc(Owner::Sequence(1)).unwrap();
            other.touch(second.index, 1);
            assert_eq!(other.table.release(first), Ok(true));
        });
        let mine = pool.table.alloc(Owner::Sequence(2)).unwrap();
        pool.touch(mine.index, 2);
        thread.join().unwrap();
        let counts = pool.table.check_invariants().unwrap();
        assert_eq!((counts.free, counts.held), (1, 2));
    });
}

#[test]
fn a_reservation_is_all_or_nothing() {
    explore("reserve", None, || {
        let pool = Pool::new(3);
        let other = pool.clone();
        let reserve = |pool: &Pool, loan: u32| {
            let blocks = pool.table.reserve(2, LoanId(loan))?;
            blocks.iter().for_each(|b| pool.touch(*b, loan));
            Some(blocks)
        };
        let thread = thread::spawn(move || reserve(&other, 1));
        let mine = reserve(&pool, 2);
        let theirs = thread.join().unwrap();
        assert!(mine.is_some() != theirs.is_some(), "three blocks are enough for one of the two");
        let counts = pool.table.check_invariants().unwrap();
        assert_eq!((counts.free, counts.reserved), (1, 2));
    });
}

#[test]
fn a_loan_that_lapses_while_it_is_repaid_is_freed_once() {
    explore("free loan", None, || {
        let pool = Pool::new(2);
        let loan = LoanId(9);
        let blocks = pool.table.reserve(2, loan).unwrap();
        pool.table.begin_fill(blocks[0], loan).unwrap();
        let (other, same) = (pool.clone(), blocks.clone());
        let thread = thread::spawn(move || other.table.free_loan(loan, &same[..1]).is_ok());
        // Somebody waits for the memory meanwhile.
        let (third, taken) = (pool.clone(), 7);
        let waiting = thread::spawn(move || {
            let block = third.table.alloc(Owner::Sequence(taken));
            block.inspect(|block| third.touch(block.index, taken))
        });
        let first = pool.table.free_loan(loan, &blocks[..1]).is_ok();
        assert!(first != thread.join().unwrap(), "exactly one of them frees it");
        let taken = waiting.join().unwrap();
        assert!(!pool.table.may_write(blocks[0], loan) && pool.table.may_write(blocks[1], loan));
        let counts = pool.table.check_invariants().unwrap();
        assert_eq!((counts.free, counts.held), (u32::from(taken.is_none()), u32::from(taken.is_some())));
    });
}

#[test]
fn what_is_live_is_complete() {
    explore("publish", None, || {
        let pool = Pool::new(1);
        let loan = LoanId(1);
        let block = pool.table.reserve(1, loan).unwrap()[0];
        pool.table.begin_fill(block, loan).unwrap();
        let writer = pool.clone();
        let thread = thread::spawn(move || {
            writer.bytes[block as usize].set(42);
            writer.table.publish(block, loan).unwrap();
        });
        let seen = pool.table.entry(block).unwrap();
        if seen.state == State::Live {
            assert_eq!(pool.bytes[block as usize].get(), 42);
            assert!(pool.table.visible(block, loan) && !pool.table.may_write(block, loan));
        }
        assert!(!pool.table.visible(block, LoanId(2)));
        thread.join().unwrap();
    });
}

#[test]
fn eviction_and_reuse_never_both_get_the_block() {
    explore("evict/retain", None, || {
        let pool = Pool::new(1);
        // The cache's own hold.
        let block = pool.table.alloc(Owner::PrefixCache).unwrap();
        pool.touch(block.index, 5);
        let other = pool.clone();
        let evict = thread::spawn(move || {
            let evicted = other.table.release_if_sole(block).unwrap();
            if evicted && let Some(next) = other.table.alloc(Owner::Sequence(1)) {
                other.touch(next.index, 6);
            }
            evicted
        });
        let reused = pool.table.retain(block).is_ok();
        if reused {
            assert_eq!(pool.bytes[0].get(), 5, "what is retained stays as it was");
            assert_eq!(pool.table.release(block), Ok(false), "the cache still holds it or the eviction failed");
        }
        let evicted = evict.join().unwrap();
        assert!(!(reused && evicted) || pool.table.entry(0).unwrap().generation > 0);
        assert!(pool.table.check_invariants().is_ok());
    });
}

#[test]
fn the_last_of_two_holders_frees() {
    explore("release/release", None, || {
        let pool = Pool::new(1);
        let block = pool.table.alloc(Owner::Sequence(1)).unwrap();
        pool.table.retain(block).unwrap();
        let other = pool.clone();
        let thread = thread::spawn(move || {
            let _ = other.bytes[0].get();
            other.table.release(block).unwrap()
        });
        let _ = pool.bytes[0].get();
        let mine = pool.table.release(block).unwrap();
        assert!(mine != thread.join().unwrap(), "exactly one of them is the last");
        let next = pool.table.alloc(Owner::Sequence(2)).unwrap();
        pool.touch(next.index, 2);
        let stale = BlockRef { generation: 0, ..next };
        assert!(pool.table.release(stale).is_err() && pool.table.retain(stale).is_err());
    });
}

#[test]
fn what_was_visible_after_reading_was_the_loans() {
    use loom::sync::atomic::{AtomicU32, Ordering};

    explore("read, then check", None, || {
        let table = Arc::new(RBlockTable::new(1));
        let bytes = Arc::new(AtomicU32::new(0));
        let loan = LoanId(1);
        let block = table.reserve(1, loan).unwrap()[0];
        table.begin_fill(block, loan).unwrap();
        bytes.store(1, Ordering::Relaxed);
        let (other, its) = (table.clone(), bytes.clone());
        // The loan lapses and a local sequence takes the block.
        let thread = thread::spawn(move || {
            other.free_loan(loan, &[block]).unwrap();
            other.alloc(Owner::Sequence(1)).unwrap();
            its.store(2, Ordering::Relaxed);
        });
        let seen = bytes.load(Ordering::Relaxed);
        if table.was_visible(block, loan) {
            assert_eq!(seen, 1, "attended to another's bytes");
        }
        thread.join().unwrap();
    });
}
