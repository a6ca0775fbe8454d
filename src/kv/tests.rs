//! The table and the prefix cache against sequential models, and the table
//! under real threads.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::prefix::{BlockHash, Inserted, PrefixCache};
use super::rblock::LoanId;
use super::table::{BlockRef, Counts, Owner, RBlockTable, State, TableError};

/// What one block should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Held(u32),
    Moving,
    Lent(LoanId, State),
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(u32),
    AllocMany(u32),
    Retain(usize),
    Release(usize),
    ReleaseIfSole(usize),
    BeginMove(usize),
    EndMove(usize),
    AbortMove(usize),
    Reserve(u32, u32),
    BeginFill(u32, u32),
    Publish(u32, u32),
    FreeLoan(u32, Vec<u32>),
}

fn op() -> impl Strategy<Value = Op> {
    let handle = 0usize..40;
    let block = 0u32..14;
    let loan = 0u32..4;
    prop_oneof![
        any::<u32>().prop_map(Op::Alloc),
        (0u32..5).prop_map(Op::AllocMany),
        handle.clone().prop_map(Op::Retain),
        handle.clone().prop_map(Op::Release),
        handle.clone().prop_map(Op::ReleaseIfSole),
        handle.clone().prop_map(Op::BeginMove),
        handle.clone().prop_map(Op::EndMove),
        handle.prop_map(Op::AbortMove),
        (0u32..5, loan.clone()).prop_map(|(n, l)| Op::Reserve(n, l)),
        (block.clone(), loan.clone()).prop_map(|(b, l)| Op::BeginFill(b, l)),
        (block.clone(), loan.clone()).prop_map(|(b, l)| Op::Publish(b, l)),
        (loan, prop::collection::vec(block, 0..6)).prop_map(|(l, b)| Op::FreeLoan(l, b)),
    ]
}

const BLOCKS: u32 = 12;

/// The specification, one line an operation. `handles` keeps every reference
/// ever given out, so most of them are stale.
#[derive(Default)]
struct Model {
    used: BTreeMap<u32, Expected>,
    generation: [u32; BLOCKS as usize],
    handles: Vec<BlockRef>,
}

impl Model {
    fn free(&self) -> u32 {
        BLOCKS - self.used.len() as u32
    }

    fn given(&mut self, block: BlockRef, expected: Expected) {
        assert_eq!(block.generation, self.generation[block.index as usize]);
        assert_eq!(self.used.insert(block.index, expected), None, "given out twice: {block:?}");
        self.handles.push(block);
    }

    fn freed(&mut self, block: u32) {
        self.used.remove(&block);
        self.generation[block as usize] += 1;
    }

    fn held(&self, block: BlockRef) -> Option<Expected> {
        let current = self.generation[block.index as usize] == block.generation;
        self.used.get(&block.index).copied().filter(|_| current)
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts { total: BLOCKS, free: self.free(), ..Counts::default() };
        for expected in self.used.values() {
            match expected {
                Expected::Held(_) | Expected::Moving => counts.held += 1,
                Expected::Lent(_, State::Reserved) => counts.reserved += 1,
                Expected::Lent(..) => counts.lent += 1,
            }
        }
        counts
    }
}

fn apply(table: &RBlockTable, model: &mut Model, op: Op) {
    let handle = |model: &Model, i: usize| model.handles.get(i % model.handles.len().max(1)).copied();
    match op {
        Op::Alloc(sequence) => match table.alloc(Owner::Sequence(sequence)) {
            Some(block) => model.given(block, Expected::Held(1)),
            None => assert_eq!(model.free(), 0),
        },
        Op::AllocMany(n) => {
            let mut out = Vec::new();
            assert_eq!(table.alloc_many(n, Owner::PrefixCache, &mut out), model.free() >= n);
            assert!(out.is_empty() || out.len() == n as usize);
            out.into_iter().for_each(|block| model.given(block, Expected::Held(1)));
        }
        Op::Retain(i) => {
            let Some(block) = handle(model, i) else { return };
            let before = model.held(block);
            assert_eq!(table.retain(block).is_ok(), matches!(before, Some(Expected::Held(_))), "{before:?}");
            if let Some(Expected::Held(refs)) = before {
                model.used.insert(block.index, Expected::Held(refs + 1));
            }
        }
        Op::Release(i) => {
            let Some(block) = handle(model, i) else { return };
            match (model.held(block), table.release(block)) {
                (Some(Expected::Held(1)), Ok(true)) => model.freed(block.index),
                (Some(Expected::Held(refs)), Ok(false)) if refs > 1 => {
                    model.used.insert(block.index, Expected::Held(refs - 1));
                }
                (None | Some(Expected::Lent(..) | Expected::Moving), Err(_)) => {}
                other => panic!("release {block:?}: {other:?}"),
            }
        }
        Op::ReleaseIfSole(i) => {
            let Some(block) = handle(model, i) else { return };
            match (model.held(block), table.release_if_sole(block)) {
                (Some(Expected::Held(1)), Ok(true)) => model.freed(block.index),
                (Some(Expected::Held(refs)), Ok(false)) if refs > 1 => {}
                (None | Some(Expected::Lent(..) | Expected::Moving), Err(_)) => {}
                other => panic!("release_if_sole {block:?}: {other:?}"),
            }
        }
        Op::BeginMove(i) => {
            let Some(block) = handle(model, i) else { return };
            let may = model.held(block) == Some(Expected::Held(1));
            assert_eq!(table.begin_move(block).is_ok(), may);
            if may {
                model.used.insert(block.index, Expected::Moving);
            }
        }
        Op::EndMove(i) => {
            let Some(block) = handle(model, i) else { return };
            let may = model.held(block) == Some(Expected::Moving);
            assert_eq!(table.end_move(block).is_ok(), may);
            if may {
                model.freed(block.index);
            }
        }
        Op::AbortMove(i) => {
            let Some(block) = handle(model, i) else { return };
            let may = model.held(block) == Some(Expected::Moving);
            assert_eq!(table.abort_move(block).is_ok(), may);
            if may {
                model.used.insert(block.index, Expected::Held(1));
            }
        }
        Op::Reserve(n, loan) => match table.reserve(n, LoanId(loan)) {
            Some(blocks) => {
                assert_eq!(blocks.len(), n as usize);
                assert!(blocks.is_sorted());
                for index in blocks {
                    let block = BlockRef { index, generation: model.generation[index as usize] };
                    model.given(block, Expected::Lent(LoanId(loan), State::Reserved));
                }
            }
            None => assert!(model.free() < n),
        },
        Op::BeginFill(block, loan) => {
            let may = model.used.get(&block) == Some(&Expected::Lent(LoanId(loan), State::Reserved));
            assert_eq!(table.begin_fill(block, LoanId(loan)).is_ok(), may);
            if may {
                model.used.insert(block, Expected::Lent(LoanId(loan), State::Filling));
            }
        }
        Op::Publish(block, loan) => {
            let may = model.used.get(&block) == Some(&Expected::Lent(LoanId(loan), State::Filling));
            assert_eq!(table.publish(block, LoanId(loan)).is_ok(), may);
            if may {
                model.used.insert(block, Expected::Lent(LoanId(loan), State::Live));
            }
        }
        Op::FreeLoan(loan, blocks) => {
            let mut all = true;
            for &block in &blocks {
                match model.used.get(&block) {
                    Some(Expected::Lent(l, _)) if l.0 == loan => model.freed(block),
                    _ => all = false,
                }
            }
            match table.free_loan(LoanId(loan), &blocks) {
                Ok(freed) => assert!(all && freed as usize == blocks.len()),
                Err(_) => assert!(!all),
            }
        }
    }
}

proptest! {
    #[test]
    fn the_table_is_its_sequential_model(ops in prop::collection::vec(op(), 1..200)) {
        let table = RBlockTable::new(BLOCKS);
        let mut model = Model::default();
        for op in ops {
            let text = format!("{op:?}");
            apply(&table, &mut model, op);
            prop_assert_eq!(table.check_invariants(), Ok(model.counts()), "after {}", text);
            for block in 0..BLOCKS + 1 {
                for loan in (0..4).map(LoanId) {
                    let state = match model.used.get(&block) {
                        Some(Expected::Lent(l, state)) if *l == loan => Some(*state),
                        _ => None,
                    };
                    prop_assert_eq!(table.may_write(block, loan), matches!(state, Some(State::Reserved | State::Filling)));
                    prop_assert_eq!(table.visible(block, loan), matches!(state, Some(State::Filling | State::Live)));
                }
            }
        }
    }

    #[test]
    fn the_prefix_cache_never_frees_what_others_hold(
        sequences in prop::collection::vec((prop::collection::vec(0u32..2, 0..24), 0usize..4, any::<bool>()), 1..40)
    ) {
        const TOKENS: usize = 4;
        let table = RBlockTable::new(64);
        let mut cache = PrefixCache::new(b"model", TOKENS);
        let mut running: Vec<Vec<BlockRef>> = Vec::new();
        // What each cached block was computed from.
        let mut content: BTreeMap<BlockRef, Vec<u32>> = BTreeMap::new();
        for (tokens, evict, keep) in sequences {
            let (mut blocks, mut name) = cache.lookup(&table, &tokens);
            for (i, block) in blocks.iter().enumerate() {
                prop_assert_eq!(&content[block], &tokens[..(i + 1) * TOKENS]);
            }
            for i in blocks.len()..tokens.len() / TOKENS {
                let Some(block) = table.alloc(Owner::Sequence(0)) else { break };
                let (next, inserted) = cache.insert(&table, name, &tokens[i * TOKENS..(i + 1) * TOKENS], block);
                if inserted == Inserted::New {
                    content.insert(block, tokens[..(i + 1) * TOKENS].to_vec());
                }
                name = next;
                blocks.push(block);
            }
            if keep {
                running.push(blocks);
            } else {
                blocks.into_iter().for_each(|b| { table.release(b).unwrap(); });
            }
            let (before, evictable) = (table.counts().free, cache.evictable(&table));
            let freed = cache.evict(&table, evict);
            prop_assert!(freed <= evictable);
            prop_assert_eq!(table.counts().free, before + freed as u32);
            for block in running.iter().flatten() {
                prop_assert!(table.entry(block.index).is_some_and(|e| e.generation == block.generation && e.refs > 0));
            }
            prop_assert!(table.check_invariants().is_ok());
        }
        running.into_iter().flatten().for_each(|b| { table.release(b).unwrap(); });
        let held = cache.len();
        prop_assert_eq!(cache.evict(&table, usize::MAX), held, "all that nobody else holds goes");
        prop_assert_eq!(table.check_invariants().map(|c| c.free), Ok(64));
    }
}

#[test]
fn names_of_blocks_are_the_same_in_every_process() {
    let hex = |h: BlockHash| h.0.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let root = BlockHash::root(b"model");
    let one = root.then(&(0..16).collect::<Vec<_>>());
    let two = one.then(&(16..32).collect::<Vec<_>>());
    // From another implementation of BLAKE3.
    assert_eq!(hex(root), "705385813d9bb933eeb567809cc38b48");
    assert_eq!(hex(one), "74d1e3ada1cac7b69f319da4a54d25d1");
    assert_eq!(hex(two), "0352ce9d9a1b0af549142fb3b190518e");
    assert_ne!(BlockHash::root(b"other"), root);
    let tokens: Vec<u32> = (0..1000).collect();
    assert_ne!(root.then(&tokens), root.then(&tokens[..999]), "every token counts");
}

#[test]
fn eviction_takes_the_least_recently_used_end_first() {
    let table = RBlockTable::new(8);
    let mut cache = PrefixCache::new(b"model", 1);
    let fill = |cache: &mut PrefixCache, tokens: &[u32]| {
        let (blocks, mut name) = cache.lookup(&table, tokens);
        for token in &tokens[blocks.len()..] {
            let block = table.alloc(Owner::Sequence(0)).unwrap();
            name = cache.insert(&table, name, &[*token], block).0;
            table.release(block).unwrap();
        }
        blocks.into_iter().for_each(|b| {
            table.release(b).unwrap();
        });
    };
    let held = |cache: &mut PrefixCache, tokens: &[u32]| {
        let (blocks, _) = cache.lookup(&table, tokens);
        blocks.iter().for_each(|b| {
            table.release(*b).unwrap();
        });
        blocks.len()
    };
    fill(&mut cache, &[1, 2, 3]);
    fill(&mut cache, &[1, 5]);
    fill(&mut cache, &[9]);
    assert_eq!((cache.len(), cache.evictable(&table)), (5, 5));
    assert_eq!(cache.evict(&table, 2), 2, "3, then 2: the oldest end, then what became one");
    assert_eq!(held(&mut cache, &[1, 2, 3]), 1);
    assert_eq!(held(&mut cache, &[1, 5]), 2);
    assert_eq!(held(&mut cache, &[9]), 1);
    assert_eq!(cache.evict(&table, 9), 3);
    assert!(cache.is_empty());
}

#[test]
fn a_block_with_the_most_holders_refuses_one_more() {
    let table = RBlockTable::new(1);
    let block = table.alloc(Owner::Sequence(1)).unwrap();
    let mut holders = 1;
    while table.retain(block).is_ok() {
        holders += 1;
    }
    assert_eq!(table.retain(block), Err(TableError::TooManyRefs { index: 0 }));
    for left in (0..holders).rev() {
        assert_eq!(table.release(block), Ok(left == 0));
    }
    assert_eq!(table.release(block), Err(TableError::Stale { index: 0, now: 1 }));
    assert_eq!(table.release(BlockRef { index: 1, generation: 0 }), Err(TableError::OutOfRange { index: 1 }));
}

/// Real threads on a table too small for them: nobody is ever given a block
/// that another has, and in the end all are back.
#[test]
fn threads_never_share_a_block_by_accident() {
    use std::sync::atomic::{AtomicU32, Ordering};

    const THREADS: u32 = 4;
    let table = Arc::new(RBlockTable::new(24));
    let holder: Arc<Vec<AtomicU32>> = Arc::new((0..24).map(|_| AtomicU32::new(0)).collect());
    let take = |holder: &[AtomicU32], block: u32, me: u32| {
        assert_eq!(holder[block as usize].swap(me, Ordering::AcqRel), 0, "given out twice");
    };
    let give = |holder: &[AtomicU32], block: u32, me: u32| {
        assert_eq!(holder[block as usize].swap(0, Ordering::AcqRel), me);
    };
    std::thread::scope(|scope| {
        for me in 1..=THREADS {
            let (table, holder) = (table.clone(), holder.clone());
            scope.spawn(move || {
                let mut out = Vec::new();
                for round in 0..20_000u32 {
                    match (round + me) % 3 {
                        0 => {
                            let Some(block) = table.alloc(Owner::Sequence(me)) else { continue };
                            take(&holder, block.index, me);
                            table.retain(block).unwrap();
                            assert_eq!(table.release(block), Ok(false));
                            give(&holder, block.index, me);
                            assert_eq!(table.release(block), Ok(true));
                        }
                        1 => {
                            if table.alloc_many(1 + round % 9, Owner::Sequence(me), &mut out) {
                                out.iter().for_each(|b| take(&holder, b.index, me));
                                for block in out.drain(..) {
                                    give(&holder, block.index, me);
                                    assert_eq!(table.release(block), Ok(true));
                                }
                            }
                        }
                        _ => {
                            let loan = LoanId(me << 24 | round);
                            let Some(blocks) = table.reserve(1 + round % 5, loan) else { continue };
                            blocks.iter().for_each(|b| take(&holder, *b, me));
                            table.begin_fill(blocks[0], loan).unwrap();
                            table.publish(blocks[0], loan).unwrap();
                            blocks.iter().for_each(|b| give(&holder, *b, me));
                            assert_eq!(table.free_loan(loan, &blocks), Ok(blocks.len() as u32));
                        }
                    }
                }
            });
        }
    });
    assert_eq!(table.check_invariants().map(|c| c.free), Ok(24));
}
