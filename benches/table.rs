//! The lock-free rBlock table against a mutexed `HashMap` and dashmap 6, eight
//! threads on one pool.
//!
//! `cargo bench --bench table`. The three take turns in short rounds, so that
//! what else the machine does meets all of them alike; a ratio is the median
//! of the rounds' ratios. Each operation takes its block from a list drawn
//! beforehand: no time goes into dice.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use distkv::kv::rblock::LoanId;
use distkv::kv::table::{BlockRef, Owner, RBlockTable};
use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const THREADS: usize = 8;
const BLOCKS: u32 = 16 * 1024;
/// Blocks that are lent throughout: what creditors look up.
const LENT: u32 = 4 * 1024;
const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(150);
const LOAN: LoanId = LoanId(7);

/// What all three can do.
trait Table: Send + Sync {
    const NAME: &'static str;
    fn new() -> Self;
    fn alloc(&self, owner: u32) -> Option<BlockRef>;
    fn retain(&self, block: BlockRef) -> bool;
    fn release(&self, block: BlockRef) -> bool;
    fn visible(&self, block: u32) -> bool;
}

impl Table for RBlockTable {
    const NAME: &'static str = "rBlock table";

    fn new() -> Self {
        let table = RBlockTable::new(BLOCKS);
        for block in table.reserve(LENT, LOAN).expect("the table is empty") {
            table.begin_fill(block, LOAN).expect("it was reserved");
        }
        table
    }

    fn alloc(&self, owner: u32) -> Option<BlockRef> {
        self.alloc(Owner::Sequence(owner))
    }

    fn retain(&self, block: BlockRef) -> bool {
        self.retain(block).is_ok()
    }

    fn release(&self, block: BlockRef) -> bool {
        self.release(block).is_ok()
    }

    fn visible(&self, block: u32) -> bool {
        self.visible(block, LOAN)
    }
}

/// The same facts as the lock-free table's entry; a free block has no entry.
#[derive(Clone, Copy)]
struct Plain {
    generation: u32,
    refs: u32,
    loan: Option<LoanId>,
}

/// Free blocks with their generations.
type FreeList = Vec<(u32, u32)>;

struct Mutexed(Mutex<(HashMap<u32, Plain>, FreeList)>);

impl Table for Mutexed {
    const NAME: &'static str = "Mutex<HashMap>";

    fn new() -> Self {
        let entry = Plain { generation: 0, refs: 1, loan: Some(LOAN) };
        let mut map: HashMap<_, _> = (0..LENT).map(|block| (block, entry)).collect();
        map.reserve(BLOCKS as usize);
        Self(Mutex::new((map, (LENT..BLOCKS).rev().map(|block| (block, 0)).collect())))
    }

    fn alloc(&self, _owner: u32) -> Option<BlockRef> {
        let (map, free) = &mut *self.0.lock().unwrap();
        let (index, generation) = free.pop()?;
        map.insert(index, Plain { generation, refs: 1, loan: None });
        Some(BlockRef { index, generation })
    }

    fn retain(&self, block: BlockRef) -> bool {
        let (map, _) = &mut *self.0.lock().unwrap();
        match map.get_mut(&block.index) {
            Some(entry) if entry.generation == block.generation => {
                entry.refs += 1;
                true
            }
            _ => false,
        }
    }

    fn release(&self, block: BlockRef) -> bool {
        let (map, free) = &mut *self.0.lock().unwrap();
        match map.get_mut(&block.index) {
            Some(entry) if entry.generation == block.generation => {
                entry.refs -= 1;
                if entry.refs == 0 {
                    map.remove(&block.index);
                    free.push((block.index, block.generation + 1));
                }
                true
            }
            _ => false,
        }
    }

    fn visible(&self, block: u32) -> bool {
        self.0.lock().unwrap().0.get(&block).is_some_and(|entry| entry.loan == Some(LOAN))
    }
}

struct Dashed {
    map: DashMap<u32, Plain>,
    free: Mutex<FreeList>,
}

impl Table for Dashed {
    const NAME: &'static str = "dashmap 6";

    fn new() -> Self {
        let map = DashMap::with_capacity(BLOCKS as usize);
        (0..LENT).for_each(|block| {
            map.insert(block, Plain { generation: 0, refs: 1, loan: Some(LOAN) });
        });
        Self { map, free: Mutex::new((LENT..BLOCKS).rev().map(|block| (block, 0)).collect()) }
    }

    fn alloc(&self, _owner: u32) -> Option<BlockRef> {
        let (index, generation) = self.free.lock().unwrap().pop()?;
        self.map.insert(index, Plain { generation, refs: 1, loan: None });
        Some(BlockRef { index, generation })
    }

    fn retain(&self, block: BlockRef) -> bool {
        match self.map.get_mut(&block.index) {
            Some(mut entry) if entry.generation == block.generation => {
                entry.refs += 1;
                true
            }
            _ => false,
        }
    }

    fn release(&self, block: BlockRef) -> bool {
        let last = match self.map.get_mut(&block.index) {
            Some(mut entry) if entry.generation == block.generation => {
                entry.refs -= 1;
                entry.refs == 0
            }
            _ => return false,
        };
        if last {
            self.map.remove(&block.index);
            self.free.lock().unwrap().push((block.index, block.generation + 1));
        }
        true
    }

    fn visible(&self, block: u32) -> bool {
        self.map.get(&block).is_some_and(|entry| entry.loan == Some(LOAN))
    }
}

/// Shares of the operations, in percent; the rest are lookups.
#[derive(Clone, Copy)]
struct Mix {
    name: &'static str,
    /// Alternately allocations and releases.
    alloc_release: u32,
    /// A hold on a held block, given up again: two operations.
    share: u32,
}

const MIXES: [Mix; 3] = [
    // A node at work: the step loop takes and gives blocks, prefixes are
    // shared, creditor threads and write guards look blocks up.
    Mix { name: "mixed: 70% lookup, 20% alloc/release, 10% retain/release", alloc_release: 20, share: 10 },
    Mix { name: "alloc/release only", alloc_release: 100, share: 0 },
    Mix { name: "lookup only", alloc_release: 0, share: 0 },
];

#[derive(Clone, Copy)]
enum Op {
    Alloc,
    Release,
    Share,
    Lookup(u32),
}

fn program(mix: Mix, seed: u64) -> Vec<Op> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut held = 0;
    let draw = |_| match rng.random_range(0..100) {
        n if n < mix.alloc_release && (held == 0 || held < 64 && rng.random_bool(0.5)) => {
            held += 1;
            Op::Alloc
        }
        n if n < mix.alloc_release => {
            held -= 1;
            Op::Release
        }
        n if n < mix.alloc_release + mix.share => Op::Share,
        _ => Op::Lookup(rng.random_range(0..LENT)),
    };
    (0..16 * 1024).map(draw).collect()
}

/// Carries out one operation; returns how many table operations it was.
fn apply<T: Table>(table: &T, op: Op, me: u32, held: &mut Vec<BlockRef>) -> u64 {
    match op {
        Op::Alloc => {
            held.extend(table.alloc(me));
            1
        }
        Op::Release => {
            // Programs repeat, so one may begin with more or less than it ended.
            let Some(block) = held.pop() else { return 0 };
            assert!(table.release(block));
            1
        }
        Op::Share => {
            let Some(block) = held.last() else { return 0 };
            assert!(table.retain(*block) && table.release(*block));
            2
        }
        Op::Lookup(block) => {
            assert!(black_box(table.visible(block)));
            1
        }
    }
}

/// One round: operations a second of all threads together. With `histogram`
/// every operation is timed (and the rate is worth nothing).
fn round<T: Table + 'static>(mix: Mix, histogram: Option<&Mutex<Histogram<u64>>>) -> f64 {
    let table = Arc::new(T::new());
    let start = Barrier::new(THREADS);
    let done: Vec<(u64, Duration)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS as u32)
            .map(|me| {
                let (table, start) = (table.clone(), &start);
                let program = program(mix, me.into());
                scope.spawn(move || {
                    let mut held = Vec::with_capacity(BLOCKS as usize);
                    let mut local = Histogram::<u64>::new(3).expect("3 digits are allowed");
                    let mut ops = 0;
                    start.wait();
                    let begin = Instant::now();
                    while begin.elapsed() < ROUND {
                        for chunk in program.chunks(256).take(4) {
                            for op in chunk {
                                if histogram.is_some() {
                                    let before = Instant::now();
                                    let done = apply(&*table, *op, me, &mut held);
                                    let nanos = before.elapsed().as_nanos() as u64;
                                    nanos.checked_div(done).into_iter().for_each(|n| local.saturating_record(n));
                                } else {
                                    ops += apply(&*table, *op, me, &mut held);
                                }
                            }
                        }
                        held.drain(..).for_each(|block| assert!(table.release(block)));
                    }
                    let took = begin.elapsed();
                    if let Some(all) = histogram {
                        all.lock().unwrap().add(local).expect("same bounds");
                    }
                    (ops, took)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a bench thread panicked")).collect()
    });
    done.iter().map(|(ops, took)| *ops as f64 / took.as_secs_f64()).sum()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn timer_floor() -> u64 {
    let mut histogram = Histogram::<u64>::new(3).expect("3 digits are allowed");
    for _ in 0..100_000 {
        let before = Instant::now();
        histogram.saturating_record(black_box(before.elapsed().as_nanos() as u64));
    }
    histogram.value_at_quantile(0.5)
}

fn main() {
    // `cargo test --benches` asks only whether it runs.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { ROUNDS } else { 1 };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{THREADS} threads on {cores} cores, {BLOCKS} blocks, {rounds} rounds of {ROUND:?} each");
    println!("reading the clock takes {} ns, which is in every latency below", timer_floor());
    for mix in MIXES {
        let mut rates = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            rates[0].push(round::<RBlockTable>(mix, None));
            rates[1].push(round::<Mutexed>(mix, None));
            rates[2].push(round::<Dashed>(mix, None));
        }
        let hists = [(); 3].map(|()| Mutex::new(Histogram::<u64>::new(3).expect("3 digits are allowed")));
        for _ in 0..rounds.div_ceil(3) {
            round::<RBlockTable>(mix, Some(&hists[0]));
            round::<Mutexed>(mix, Some(&hists[1]));
            round::<Dashed>(mix, Some(&hists[2]));
        }
        println!("\n{}", mix.name);
        println!(
            "{:16} {:>10} {:>8} {:>9} {:>9} {:>9} {:>11}",
            "", "Mops/s", "ratio", "p50 ns", "p99 ns", "p99.9 ns", "p99.9/p50"
        );
        let names = [<RBlockTable as Table>::NAME, Mutexed::NAME, Dashed::NAME];
        for (i, name) in names.into_iter().enumerate() {
            let ratio = median(rates[0].iter().zip(&rates[i]).map(|(ours, theirs)| ours / theirs).collect());
            let histogram = hists[i].lock().unwrap();
            let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| histogram.value_at_quantile(q));
            let rate = median(rates[i].clone()) / 1e6;
            let flat = p999 as f64 / p50 as f64;
            println!("{name:16} {rate:>10.1} {ratio:>8.2} {p50:>9} {p99:>9} {p999:>9} {flat:>11.1}");
        }
    }
}
