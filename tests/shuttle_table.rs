//! The rBlock table under shuttle: more threads and longer programs than loom
//! can exhaust, thousands of random and priority-driven schedules. A failing
//! schedule is printed and can be replayed.
//!
//! The table is compiled here a second time, against shuttle's atomics.
#![allow(dead_code)]

#[path = "../src/kv/entry.rs"]
mod entry;
#[path = "../src/kv/rblock.rs"]
mod rblock;
#[path = "../src/kv/table.rs"]
mod table;
mod sync {
    pub use shuttle::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    pub fn spin_loop() {
        shuttle::thread::yield_now();
    }

    pub const SHARDS: usize = 3;

    /// Another stack each time: a thread may free where it never allocates.
    pub fn home() -> usize {
        use shuttle::rand::{Rng, thread_rng};
        thread_rng().gen_range(0..SHARDS)
    }
}

use std::sync::atomic::{AtomicU32, Ordering};

use rblock::LoanId;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::Arc;
use shuttle::thread;
use table::{BlockRef, Owner, RBlockTable};

const BLOCKS: u32 = 7;
const THREADS: u32 = 4;

/// Who uses which block, in plain atomics that shuttle does not schedule.
struct Pool {
    table: RBlockTable,
    user: Vec<AtomicU32>,
}

impl Pool {
    fn take(&self, block: u32, me: u32) {
        assert_eq!(self.user[block as usize].swap(me, Ordering::SeqCst), 0, "block {block} has two owners");
    }

    fn give(&self, block: u32, me: u32) {
        assert_eq!(self.user[block as usize].swap(0, Ordering::SeqCst), me);
    }
}

fn one_thread(pool: &Pool, me: u32) {
    let table = &pool.table;
    let mut held: Vec<BlockRef> = Vec::new();
    let mut loans: Vec<(LoanId, Vec<u32>)> = Vec::new();
    let mut stale: Vec<BlockRef> = Vec::new();
    for step in 0..12 {
        match thread_rng().gen_range(0..8) {
            0 => {
                if let Some(block) = table.alloc(Owner::Sequence(me)) {
                    pool.take(block.index, me);
                    held.push(block);
                }
            }
            1 => {
                let (n, before) = (thread_rng().gen_range(1..4), held.len());
                if table.alloc_many(n, Owner::Sequence(me), &mut held) {
                    held[before..].iter().for_each(|b| pool.take(b.index, me));
                }
                assert!(held.len() == before || held.len() == before + n as usize);
            }
            2 | 3 => {
                if let Some(block) = held.pop() {
                    pool.give(block.index, me);
                    let freed = if step % 2 == 0 { table.release(block) } else { table.release_if_sole(block) };
                    assert_eq!(freed, Ok(true));
                    stale.push(block);
                }
            }
            4 => {
                let loan = LoanId(me * 1000 + step);
                if let Some(blocks) = table.reserve(thread_rng().gen_range(1..4), loan) {
                    blocks.iter().for_each(|b| pool.take(*b, me));
                    blocks.iter().for_each(|b| table.begin_fill(*b, loan).unwrap());
                    table.publish(blocks[0], loan).unwrap();
                    assert!(table.visible(blocks[0], loan) && !table.may_write(blocks[0], loan));
                    loans.push((loan, blocks));
                }
            }
            5 => {
                if let Some((loan, blocks)) = loans.pop() {
                    blocks.iter().for_each(|b| pool.give(*b, me));
                    assert_eq!(table.free_loan(loan, &blocks), Ok(blocks.len() as u32));
                    assert!(table.free_loan(loan, &blocks).is_err(), "freed twice");
                }
            }
            6 => {
                if let Some(block) = held.last() {
                    table.retain(*block).unwrap();
                    assert_eq!(table.release(*block), Ok(false));
                    assert!(table.begin_move(*block).is_ok() && table.retain(*block).is_err());
                    table.abort_move(*block).unwrap();
                }
            }
            _ => {
                for block in &stale {
                    assert!(table.retain(*block).is_err() && table.release(*block).is_err());
                }
            }
        }
    }
    for block in held {
        pool.give(block.index, me);
        table.begin_move(block).unwrap();
        table.end_move(block).unwrap();
    }
    for (loan, blocks) in loans {
        blocks.iter().for_each(|b| pool.give(*b, me));
        assert_eq!(table.free_loan(loan, &blocks), Ok(blocks.len() as u32));
    }
}

fn threads_at_work() {
    let pool = Pool { table: RBlockTable::new(BLOCKS), user: (0..BLOCKS).map(|_| AtomicU32::new(0)).collect() };
    let pool = Arc::new(pool);
    let threads: Vec<_> = (1..=THREADS)
        .map(|me| {
            let pool = pool.clone();
            thread::spawn(move || one_thread(&pool, me))
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let counts = pool.table.check_invariants().unwrap();
    assert_eq!(counts.free, BLOCKS, "every block comes back");
}

/// One block shared by all: each holds and lets go, one evicts whenever it can.
fn sharing() {
    let table = Arc::new(RBlockTable::new(2));
    let block = table.alloc(Owner::PrefixCache).unwrap();
    let frees = Arc::new(AtomicU32::new(0));
    let threads: Vec<_> = (0..THREADS)
        .map(|me| {
            let (table, frees) = (table.clone(), frees.clone());
            thread::spawn(move || {
                for _ in 0..6 {
                    if me == 0 {
                        frees.fetch_add(u32::from(table.release_if_sole(block) == Ok(true)), Ordering::SeqCst);
                    } else if table.retain(block).is_ok() {
                        assert_eq!(table.entry(block.index).unwrap().generation, block.generation);
                        frees.fetch_add(u32::from(table.release(block) == Ok(true)), Ordering::SeqCst);
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let freed = frees.load(Ordering::SeqCst);
    assert!(freed <= 1);
    assert_eq!(table.check_invariants().map(|c| c.free), Ok(1 + freed));
}

#[test]
fn random_schedules() {
    shuttle::check_random(threads_at_work, 2_000);
    shuttle::check_random(sharing, 2_000);
}

#[test]
fn schedules_of_few_preemptions() {
    shuttle::check_pct(threads_at_work, 1_000, 3);
    shuttle::check_pct(sharing, 1_000, 3);
}
