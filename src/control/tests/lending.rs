//! The rManager against a sequential model: nothing lent twice, nothing lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use distkv_fabric::Memory;
use proptest::prelude::*;

use super::shape;
use crate::control::message::{BlockRange, Refusal};
use crate::control::rmanager::{PoolSource, RManager, ranges};
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, LoanId};
use crate::kv::table::{BlockRef, Owner};

const LEASE: Duration = Duration::from_secs(3);

#[derive(Clone, Debug)]
enum Op {
    Reserve { debtor: u64, blocks: u32 },
    Renew { debtor: u64, loan: u32, blocks: u32 },
    Repay { debtor: u64, loan: u32 },
    WrongEpoch { debtor: u64, loan: u32 },
    Gone { debtor: u64 },
    Wait(u64),
    Hold(u32),
    LetGo(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let (debtor, loan) = (0u64..3, 0u32..20);
    prop_oneof![
        3 => (debtor.clone(), 0u32..12).prop_map(|(debtor, blocks)| Op::Reserve { debtor, blocks }),
        2 => (debtor.clone(), loan.clone(), 0u32..40).prop_map(|(debtor, loan, blocks)| Op::Renew { debtor, loan, blocks }),
        2 => (debtor.clone(), loan.clone()).prop_map(|(debtor, loan)| Op::Repay { debtor, loan }),
        1 => (debtor.clone(), loan).prop_map(|(debtor, loan)| Op::WrongEpoch { debtor, loan }),
        1 => debtor.prop_map(|debtor| Op::Gone { debtor }),
        1 => (0u64..4).prop_map(Op::Wait),
        2 => (1u32..6).prop_map(Op::Hold),
        2 => any::<prop::sample::Index>().prop_map(|i| Op::LetGo(i.index(64))),
    ]
}

fn expand(ranges: &[BlockRange]) -> Vec<u32> {
    ranges.iter().flat_map(|r| r.start..r.start + r.count).collect()
}

proptest! {
    #[test]
    fn nothing_is_lent_twice_and_nothing_is_lost(ops in prop::collection::vec(op(), 1..120)) {
        const BLOCKS: u32 = 32;
        const CAP: u32 = 24;
        let pool = Arc::new(KvPool::new(shape(2), BLOCKS).unwrap());
        let source = PoolSource::Pool { pool: pool.clone(), prefix: None };
        let mut manager = RManager::new(source, 0.75, LEASE);
        let shared = manager.lent_pool().clone();
        let mut now = Duration::ZERO;
        // What is lent: loan → (debtor, blocks, until). What is held locally.
        let mut lent: BTreeMap<u32, (u64, Vec<u32>, Duration)> = BTreeMap::new();
        let mut held: Vec<BlockRef> = Vec::new();
        for op in ops {
            match op {
                Op::Reserve { debtor, blocks } => {
                    let out: u32 = lent.values().map(|l| l.1.len() as u32).sum();
                    let free = BLOCKS - out - held.len() as u32;
                    match manager.reserve(now, InstanceId(debtor), 7, blocks, &shape(2)) {
                        Ok(grant) => {
                            prop_assert!(blocks > 0 && blocks <= free && out + blocks <= CAP);
                            let blocks = expand(&grant.blocks);
                            prop_assert!(lent.insert(grant.loan.0, (debtor, blocks, now + LEASE)).is_none());
                        }
                        Err(Refusal::Invalid) => prop_assert_eq!(blocks, 0),
                        Err(Refusal::LendCap) => prop_assert!(out + blocks > CAP),
                        Err(Refusal::NoRoom) => prop_assert!(blocks > free),
                        Err(other) => prop_assert!(false, "{other:?}"),
                    }
                }
                Op::Renew { debtor, loan, blocks } => {
                    let its = lent.get_mut(&loan).filter(|l| l.0 == debtor);
                    prop_assert_eq!(manager.renew(now, InstanceId(debtor), LoanId(loan), 1, blocks), its.is_some());
                    if let Some(its) = its {
                        its.2 = now + LEASE;
                        // A loan shrinks to its beginning; it never grows, and
                        // only a repayment ends it.
                        its.1.truncate(if blocks == 0 { usize::MAX } else { blocks as usize });
                    }
                }
                Op::Repay { debtor, loan } => {
                    let its = lent.get(&loan).is_some_and(|l| l.0 == debtor);
                    prop_assert_eq!(manager.repay(InstanceId(debtor), LoanId(loan), 1), its);
                    if its {
                        lent.remove(&loan);
                    }
                }
                Op::WrongEpoch { debtor, loan } => {
                    prop_assert!(!manager.repay(InstanceId(debtor), LoanId(loan), 2));
                    prop_assert!(!manager.renew(now, InstanceId(debtor), LoanId(loan), 0, 1));
                }
                Op::Gone { debtor } => {
                    let ended = manager.debtor_gone(InstanceId(debtor));
                    let expected = lent.values().filter(|l| l.0 == debtor).count();
                    prop_assert_eq!(ended.len(), expected);
                    lent.retain(|_, l| l.0 != debtor);
                }
                Op::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    let ended: BTreeSet<u32> = manager.expire(now).iter().map(|r| r.loan.0).collect();
                    let over = lent.iter().filter(|(_, l)| l.2 <= now).map(|(id, _)| *id);
                    prop_assert_eq!(ended, over.collect::<BTreeSet<_>>());
                    lent.retain(|_, l| l.2 > now);
                }
                Op::Hold(n) => {
                    let _ = pool.table().alloc_many(n, Owner::Sequence(1), &mut held);
                }
                Op::LetGo(i) => {
                    if !held.is_empty() {
                        let block = held.swap_remove(i % held.len());
                        prop_assert_eq!(pool.table().release(block), Ok(true));
                    }
                }
            }
            let out: u32 = lent.values().map(|l| l.1.len() as u32).sum();
            let mut everybodys: Vec<u32> = lent.values().flat_map(|l| l.1.iter().copied()).collect();
            everybodys.extend(held.iter().map(|b| b.index));
            let count = everybodys.len();
            prop_assert_eq!(everybodys.into_iter().collect::<BTreeSet<_>>().len(), count, "a block has two owners");
            let counts = pool.table().check_invariants().map_err(TestCaseError::fail)?;
            prop_assert_eq!((counts.reserved + counts.lent, counts.held), (out, held.len() as u32));
            prop_assert_eq!((manager.lent(), manager.free()), (out, BLOCKS - count as u32));
            prop_assert_eq!(manager.next_expiry(), lent.values().map(|l| l.2).min());
            for loan in 0..20 {
                let record = shared.loan(LoanId(loan));
                prop_assert_eq!(record.as_ref().map(|r| &r.blocks), lent.get(&loan).map(|l| &l.1));
                for block in 0..BLOCKS {
                    let its = lent.get(&loan).is_some_and(|l| l.1.contains(&block));
                    prop_assert_eq!(pool.table().visible(block, LoanId(loan)), its);
                    prop_assert_eq!(pool.table().may_write(block, LoanId(loan)), its);
                }
            }
        }
    }

    #[test]
    fn ranges_are_the_blocks(blocks in prop::collection::btree_set(0u32..200, 0..100)) {
        let blocks: Vec<u32> = blocks.into_iter().collect();
        let ranges = ranges(&blocks);
        prop_assert_eq!(expand(&ranges), blocks);
        prop_assert!(ranges.windows(2).all(|w| w[0].start + w[0].count < w[1].start));
    }
}

#[test]
fn a_lender_without_a_model_takes_the_shape_of_its_debtor_while_nothing_is_lent() {
    let bytes = shape(2).block_bytes() * 10;
    takes_the_shape_of_its_debtor(PoolSource::Bytes(bytes), bytes);
    // Memory that is there is cut, and cut again.
    let memory = Memory::new(bytes).unwrap();
    let pools = takes_the_shape_of_its_debtor(PoolSource::Memory(memory.clone(), bytes), bytes);
    assert!(pools.iter().all(|pool| pool.memory().as_ptr() == memory.as_ptr()));
}

fn takes_the_shape_of_its_debtor(source: PoolSource, bytes: usize) -> [Arc<KvPool>; 2] {
    let mut manager = RManager::new(source, 1.0, LEASE);
    let shared = manager.lent_pool().clone();
    let (debtor, now) = (InstanceId(1), Duration::ZERO);
    assert!(shared.current().is_none());
    assert_eq!(manager.shapeable_bytes(), bytes as u64);
    let grant = manager.reserve(now, debtor, 1, 10, &shape(2)).unwrap();
    assert_eq!(shared.current().map(|p| (*p.shape(), p.blocks())), Some((shape(2), 10)));
    let first = shared.current().unwrap();
    let version = shared.version();
    assert_eq!(manager.reserve(now, debtor, 1, 1, &shape(4)), Err(Refusal::Shape));
    assert_eq!(manager.shapeable_bytes(), 0);
    assert!(manager.repay(debtor, grant.loan, grant.epoch));
    let again = manager.reserve(now, debtor, 1, 5, &shape(4)).unwrap();
    assert_eq!(shared.current().map(|p| (*p.shape(), p.blocks())), Some((shape(4), 5)));
    assert!(shared.version() > version);
    assert!(again.epoch != grant.epoch && again.loan != grant.loan);
    let huge = crate::kv::rblock::KvShape { layers: 4096, head_dim: 4096, ..shape(1) };
    assert!(manager.repay(debtor, again.loan, again.epoch));
    assert_eq!(manager.reserve(now, debtor, 1, 1, &huge), Err(Refusal::NoRoom));
    [first, shared.current().unwrap()]
}

#[test]
fn what_only_the_prefix_cache_holds_is_given_up_for_a_debtor() {
    let pool = Arc::new(KvPool::new(shape(1), 8).unwrap());
    let prefix = Arc::new(Mutex::new(PrefixCache::new(b"model", 4)));
    let mut name = prefix.lock().unwrap().root();
    let mut running = Vec::new();
    for token in 0..6 {
        let block = pool.table().alloc(Owner::Sequence(1)).unwrap();
        name = prefix.lock().unwrap().insert(pool.table(), name, &[token; 4], block).0;
        if token < 2 {
            running.push(block);
        } else {
            pool.table().release(block).unwrap();
        }
    }
    let source = PoolSource::Pool { pool: pool.clone(), prefix: Some(prefix.clone()) };
    let mut manager = RManager::new(source, 1.0, LEASE);
    assert_eq!(manager.free(), 6, "2 free, 4 held by the cache alone");
    let now = Duration::ZERO;
    assert_eq!(manager.reserve(now, InstanceId(1), 1, 7, &shape(1)), Err(Refusal::NoRoom));
    assert_eq!(prefix.lock().unwrap().len(), 6, "a refusal gives up nothing");
    let grant = manager.reserve(now, InstanceId(1), 1, 5, &shape(1)).unwrap();
    assert_eq!(expand(&grant.blocks).len(), 5);
    assert!(expand(&grant.blocks).iter().all(|b| running.iter().all(|r| r.index != *b)));
    assert!(pool.table().check_invariants().is_ok());
    assert_eq!(manager.reserve(now, InstanceId(1), 1, 1, &shape(2)), Err(Refusal::Shape));
    manager.drain();
    assert_eq!(manager.reserve(now, InstanceId(1), 1, 1, &shape(1)), Err(Refusal::Draining));
    assert_eq!(
        RManager::new(PoolSource::Nothing, 1.0, LEASE).reserve(now, InstanceId(1), 1, 1, &shape(1)),
        Err(Refusal::NotLending)
    );
}
