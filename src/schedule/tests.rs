//! The scheduler driven without a device: steps are taken as computed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::batch::Batch;
use super::scheduler::{Ask, Scheduler, SchedulerConfig};
use super::sequence::{HeldLoan, SeqId};
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, KvDtype, KvShape, LoanId};

const CHUNK: usize = 64;
const LENDER: InstanceId = InstanceId(9);

struct World {
    scheduler: Scheduler,
    pool: Arc<KvPool>,
    prefix: Arc<Mutex<PrefixCache>>,
    batch: Batch,
    /// Blocks a creditor has free, and which loans it gave.
    lendable: usize,
    loans: BTreeMap<LoanId, usize>,
    failed: BTreeMap<SeqId, String>,
    /// Rows of each sequence in the last step.
    rows: BTreeMap<SeqId, usize>,
}

impl World {
    fn new(blocks: u32, lendable: usize) -> Self {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 2, block_tokens: 16, dtype: KvDtype::F32 };
        let pool = Arc::new(KvPool::new(shape, blocks).unwrap());
        let prefix = Arc::new(Mutex::new(PrefixCache::new(b"test", 16)));
        let config = SchedulerConfig {
            max_rows: CHUNK + 8,
            chunk_rows: CHUNK,
            max_logits: 8,
            max_sequences: 8,
            replicas: 1,
            move_blocks: 4,
        };
        let mut scheduler = Scheduler::new(config, pool.clone(), prefix.clone());
        scheduler.set_lendable(lendable, lendable);
        let batch = Batch::default();
        Self {
            scheduler,
            pool,
            prefix,
            batch,
            lendable,
            loans: BTreeMap::new(),
            failed: BTreeMap::new(),
            rows: BTreeMap::new(),
        }
    }

    fn add(&mut self, id: SeqId, prompt: usize, generate: usize) {
        let tokens = (0..prompt as u32).map(|i| i * 31 + id as u32 * 7).collect();
        self.add_tokens(id, tokens, generate);
    }

    fn add_tokens(&mut self, id: SeqId, tokens: Vec<u32>, generate: usize) {
        let limit = tokens.len() + generate;
        let sequence = self.scheduler.sequence(id, tokens, limit, false);
        self.scheduler.add(sequence);
    }

    /// One turn as the engine takes it. Sequences that reach their limit are
    /// removed; which.
    fn step(&mut self) -> Vec<SeqId> {
        let mut moves = Vec::new();
        self.scheduler.plan_moves(&mut moves);
        self.scheduler.moved(&mut moves);
        self.scheduler.next_batch(&mut self.batch);
        self.answer();
        self.rows = self.batch.items.iter().map(|i| (i.seq, i.rows.len())).collect();
        // Every row has a local place of its own.
        let mut places: Vec<_> = self.batch.slots.iter().map(|s| (s.block, s.offset)).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), self.batch.tokens.len());
        self.scheduler.complete(&mut self.batch);
        let mut done = Vec::new();
        for item in &self.batch.items {
            if item.logits.is_empty() {
                continue;
            }
            let sequence = self.scheduler.get(item.seq).unwrap();
            if sequence.tokens.len() + 1 >= sequence.limit {
                self.scheduler.remove(item.seq);
                done.push(item.seq);
            } else {
                self.scheduler.push_token(item.seq, 1000 + item.position);
            }
        }
        self.answer();
        self.pool.table().check_invariants().unwrap();
        done
    }

    /// Lends and takes back as a creditor would.
    fn answer(&mut self) {
        let asks: Vec<_> = self.scheduler.drain_asks().collect();
        for ask in asks {
            match ask {
                Ask::Borrow { seq, blocks, .. } if blocks <= self.lendable => {
                    self.lendable -= blocks;
                    let loan = LoanId(self.loans.len() as u32 + 1);
                    self.loans.insert(loan, blocks);
                    let blocks = (0..blocks as u32).collect();
                    let held = HeldLoan::new(LENDER, loan, 1, blocks);
                    self.scheduler.granted(seq, vec![held]);
                }
                Ask::Borrow { seq, .. } => self.scheduler.refused(seq, "nobody has that much"),
                Ask::Repay(held) => self.lendable += self.loans.insert(held.loan, 0).unwrap(),
                Ask::Shrink { .. } => unreachable!("nothing was planned"),
                Ask::Fail { seq, message } => {
                    self.failed.insert(seq, message);
                }
            }
        }
    }

    fn finish(&mut self, count: usize) {
        let mut done = 0;
        for _ in 0..10_000 {
            done += self.step().len();
            if done + self.failed.len() == count {
                break;
            }
        }
        assert_eq!(done + self.failed.len(), count, "not all sequences came to an end");
        self.prefix.lock().unwrap().clear(self.pool.table());
        assert_eq!(self.pool.table().counts().free, self.pool.blocks(), "blocks were lost");
        assert!(self.loans.values().all(|&held| held == 0), "a loan was not repaid");
    }
}

#[test]
fn a_long_prompt_does_not_starve_a_short_one() {
    let mut world = World::new(512, 0);
    world.add(1, 4000, 4);
    world.step();
    world.add(2, 60, 4);
    // Half of every chunk is the short one's: two steps and it decodes.
    world.step();
    assert_eq!(world.rows, BTreeMap::from([(1, 32), (2, 32)]));
    world.step();
    assert_eq!(world.rows[&2], 28);
    let mut steps = 0;
    while !world.step().contains(&2) {
        assert_eq!(world.rows[&2], 1);
        steps += 1;
    }
    assert!(steps <= 4);
    assert!(world.scheduler.get(1).unwrap().computed < 4000);
    world.finish(1);
}

#[test]
fn decode_goes_on_while_a_prompt_is_computed() {
    let mut world = World::new(512, 0);
    world.add(1, 10, 50);
    world.step();
    world.add(2, 2000, 4);
    for _ in 0..20 {
        world.step();
        assert_eq!(world.rows, BTreeMap::from([(1, 1), (2, CHUNK)]));
    }
    world.finish(2);
}

#[test]
fn the_youngest_gives_way_when_nobody_lends_and_all_finish() {
    let mut world = World::new(12, 0);
    for id in 1..=3 {
        world.add(id, 50, 100);
    }
    world.finish(3);
    assert!(world.failed.is_empty(), "{:?}", world.failed);
    assert!(world.scheduler.preemptions() > 0);
}

#[test]
fn a_prompt_that_does_not_fit_borrows_and_its_beginning_goes_out_as_it_is_computed() {
    let mut world = World::new(16, 100);
    world.add(1, 1000, 20);
    world.step(); // Asks.
    let mut most = 0;
    while world.scheduler.get(1).is_some_and(|s| s.remaining() > 1) {
        world.step();
        most = most.max(world.pool.blocks() - world.pool.table().counts().free);
    }
    let sequence = world.scheduler.get(1).unwrap();
    assert_eq!(sequence.table.len(), 63);
    assert!(sequence.table.remote() >= 63 - 16);
    assert!(most <= 16);
    assert_eq!(sequence.table.creditors(), [(LENDER, sequence.table.remote())]);
    world.finish(1);
    assert!(world.failed.is_empty());
}

#[test]
fn a_sequence_that_outgrows_the_pool_borrows_while_decoding() {
    let mut world = World::new(8, 40);
    world.add(1, 30, 400);
    world.finish(1);
    assert!(world.failed.is_empty(), "{:?}", world.failed);
    assert_eq!(world.scheduler.preemptions(), 0);
}

#[test]
fn a_prompt_that_nobody_can_hold_fails_and_the_next_one_runs() {
    for lendable in [0, 10] {
        let mut world = World::new(16, lendable);
        world.add(1, 2000, 4);
        world.add(2, 100, 4);
        world.finish(2);
        assert!(world.failed[&1].contains("rBlocks"), "{:?}", world.failed);
        assert!(!world.failed.contains_key(&2));
    }
}

#[test]
fn all_that_there_is_can_be_used() {
    // 16 here and 48 lent: 64 blocks of 16 tokens, less the row being computed.
    let mut world = World::new(16, 48);
    world.add(1, 1000, 23);
    world.finish(1);
    assert!(world.failed.is_empty(), "{:?}", world.failed);
}

#[test]
fn the_second_of_two_equal_prompts_computes_only_its_last_block() {
    let mut world = World::new(64, 0);
    let prompt: Vec<u32> = (0..200).collect();
    world.add_tokens(1, prompt.clone(), 20);
    while world.scheduler.get(1).is_none_or(|s| s.remaining() > 1) {
        world.step();
    }
    world.add_tokens(2, prompt, 2);
    world.step();
    assert_eq!(world.rows[&2], 200 - 192);
    assert_eq!(world.scheduler.cached_tokens(), 192);
    world.finish(2);
}

#[test]
fn a_sequence_taken_out_at_any_moment_leaves_nothing_behind() {
    for steps in 0..40 {
        let mut world = World::new(16, 100);
        world.add(1, 600, 20);
        for _ in 0..steps {
            world.step();
        }
        let there = world.scheduler.remove(1).is_some();
        world.answer();
        world.finish(usize::from(!there && !world.failed.is_empty()));
    }
}

/// One that fits waits where all creditors have prompts waiting themselves, and
/// borrows from one that has none.
#[test]
fn a_prompt_waits_rather_than_borrows_where_everybody_has_prompts_waiting() {
    for (spare, loans) in [(0, 0), (100, 1)] {
        let mut world = World::new(32, 100);
        world.scheduler.set_slack(spare, 0);
        world.add(1, 400, 4);
        world.step();
        world.add(2, 400, 4);
        world.step();
        assert_eq!(world.loans.len(), loans, "{spare} spare");
        world.finish(2);
        assert!(world.failed.is_empty() && world.scheduler.preemptions() == 0);
    }
}

/// What is kept for a long prompt elsewhere, short ones leave alone; whoever is
/// idle goes on.
#[test]
fn short_prompts_leave_room_for_a_long_one_elsewhere() {
    let mut world = World::new(64, 100);
    world.scheduler.set_slack(0, 40);
    for id in 1..=3 {
        world.add(id, 400, 4);
    }
    world.step();
    assert_eq!((world.scheduler.running(), world.scheduler.waiting()), (1, 2));
    world.scheduler.set_slack(0, 0);
    world.step();
    assert_eq!(world.scheduler.running(), 2);
    world.finish(3);
}

/// A prompt that nobody has room for now and all together could hold is not
/// failed: it is tried again with the next news.
#[test]
fn a_long_prompt_waits_for_what_others_will_release() {
    let mut world = World::new(16, 10);
    world.scheduler.set_lendable(10, 200);
    world.add(1, 2000, 4);
    world.step();
    assert!(world.failed.is_empty() && world.scheduler.wanted() > 0);
    world.lendable = 200;
    world.scheduler.set_lendable(200, 200);
    world.finish(1);
    assert!(world.failed.is_empty(), "{:?}", world.failed);
}
