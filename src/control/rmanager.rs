//! rManager: one instance's memory as creditor. Reserves before any data
//! moves, first come first served; a refusal moves nothing; never borrows
//! onward (paper, section "rManager").

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use distkv_fabric::Memory;

use super::message::{BlockRange, MAX_RANGES, Refusal};
use super::row::Debt;
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{BlockIndex, InstanceId, KvShape, LoanId};

/// The memory to lend from.
pub enum PoolSource {
    /// The pool of an instance that runs a model.
    Pool {
        /// Shared with the engine.
        pool: Arc<KvPool>,
        /// The engine's prefix cache: what only it holds is given up for a
        /// debtor.
        prefix: Option<Arc<Mutex<PrefixCache>>>,
    },
    /// So many bytes of memory of a lender without a model: cut to the first
    /// debtor's shape, and anew for another shape once nothing is lent. Bytes
    /// that one left are never read by the next: a block is read as far as its
    /// debtor has filled it.
    Memory(Arc<Memory>, usize),
    /// As `Memory`, allocated when it is cut: where no transport and no kernel will
    /// touch it.
    Bytes(usize),
    /// Nothing is lent.
    Nothing,
}

/// One loan as the creditor's threads need it. Immutable.
pub struct LoanRecord {
    /// Its id.
    pub loan: LoanId,
    /// Epoch of the pool it is in.
    pub epoch: u32,
    /// Who borrowed.
    pub debtor: InstanceId,
    /// Its request.
    pub request: u64,
    /// Its blocks, ascending.
    pub blocks: Vec<BlockIndex>,
    /// The pool they are in.
    pub pool: Arc<KvPool>,
}

/// What is lent, for the threads that answer queries over it. Ask once a step,
/// not once a layer: this takes locks, [`RBlockTable::visible`] does not.
///
/// A loan may end while a query over it is being answered. Check `visible`
/// before reading the blocks and [`RBlockTable::was_visible`] after: if that
/// holds, the bytes were the loan's all the time (a loan's id never returns).
///
/// [`RBlockTable::visible`]: crate::kv::table::RBlockTable::visible
/// [`RBlockTable::was_visible`]: crate::kv::table::RBlockTable::was_visible
#[derive(Default)]
pub struct LentPool {
    current: RwLock<Option<Arc<KvPool>>>,
    version: AtomicU64,
    ended: AtomicU64,
    loans: RwLock<BTreeMap<LoanId, Arc<LoanRecord>>>,
}

impl LentPool {
    /// The pool to lend from; `None` until a lender's memory is cut.
    pub fn current(&self) -> Option<Arc<KvPool>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Rises whenever [`current`](Self::current) changes: register the new
    /// memory then.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// A loan that has not ended.
    pub fn loan(&self, loan: LoanId) -> Option<Arc<LoanRecord>> {
        self.loans.read().unwrap_or_else(PoisonError::into_inner).get(&loan).cloned()
    }

    /// Rises whenever a loan, or a part of one, ends.
    pub fn ended(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    fn set_current(&self, pool: Option<Arc<KvPool>>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = pool;
        self.version.fetch_add(1, Ordering::Release);
    }

    fn insert(&self, record: Arc<LoanRecord>) {
        self.loans.write().unwrap_or_else(PoisonError::into_inner).insert(record.loan, record);
    }

    /// A part of a loan has ended.
    fn replace(&self, record: Arc<LoanRecord>) {
        self.insert(record);
        self.ended.fetch_add(1, Ordering::Release);
    }

    fn remove(&self, loan: LoanId) {
        self.loans.write().unwrap_or_else(PoisonError::into_inner).remove(&loan);
        self.ended.fetch_add(1, Ordering::Release);
    }
}

struct Lent {
    record: Arc<LoanRecord>,
    until: Duration,
}

/// A granted loan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its id.
    pub loan: LoanId,
    /// Epoch of the pool.
    pub epoch: u32,
    /// Its blocks.
    pub blocks: Vec<BlockRange>,
}

/// One instance's memory as creditor.
pub struct RManager {
    source: PoolSource,
    lend: f64,
    lease: Duration,
    shared: Arc<LentPool>,
    loans: BTreeMap<LoanId, Lent>,
    lent: u32,
    next_loan: u32,
    epoch: u32,
    draining: bool,
}

impl RManager {
    /// Lends up to the share `lend` (0 ..= 1) of `source`; a loan that is not
    /// renewed for `lease` ends.
    pub fn new(source: PoolSource, lend: f64, lease: Duration) -> Self {
        let shared = Arc::new(LentPool::default());
        if let PoolSource::Pool { pool, .. } = &source {
            shared.set_current(Some(pool.clone()));
        }
        Self {
            source,
            lend: if lend.is_finite() { lend.clamp(0.0, 1.0) } else { 0.0 },
            lease,
            shared,
            loans: BTreeMap::new(),
            lent: 0,
            next_loan: 1,
            epoch: 1,
            draining: false,
        }
    }

    /// For the threads that answer queries.
    pub fn lent_pool(&self) -> &Arc<LentPool> {
        &self.shared
    }

    /// The pool as it is cut now.
    pub fn pool(&self) -> Option<Arc<KvPool>> {
        self.shared.current()
    }

    /// How long a loan lasts without renewal.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Refuses everything new from now on.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Blocks lent.
    pub fn lent(&self) -> u32 {
        self.lent
    }

    /// Most blocks that may be lent of the pool as it is cut now.
    pub fn lend_cap(&self) -> u32 {
        self.pool().map_or(0, |pool| self.share(pool.blocks()))
    }

    /// Blocks that are nobody's, or kept only for prefix reuse.
    pub fn free(&self) -> u32 {
        let Some(pool) = self.pool() else { return 0 };
        let cached = match &self.source {
            PoolSource::Pool { prefix: Some(prefix), .. } => {
                prefix.lock().unwrap_or_else(PoisonError::into_inner).evictable(pool.table()) as u32
            }
            _ => 0,
        };
        (pool.table().counts().free + cached).min(pool.blocks())
    }

    /// Bytes that could be cut to any shape and lent.
    pub fn shapeable_bytes(&self) -> u64 {
        match self.source {
            PoolSource::Bytes(bytes) | PoolSource::Memory(_, bytes) if self.loans.is_empty() => {
                (bytes as f64 * self.lend) as u64
            }
            _ => 0,
        }
    }

    /// Loans, by id.
    pub fn loans(&self) -> impl Iterator<Item = &Arc<LoanRecord>> {
        self.loans.values().map(|lent| &lent.record)
    }

    /// What each debtor owes, by instance.
    pub fn debts(&self) -> Vec<Debt> {
        let mut owed: BTreeMap<InstanceId, u32> = BTreeMap::new();
        self.loans().for_each(|record| *owed.entry(record.debtor).or_default() += record.blocks.len() as u32);
        owed.into_iter().map(|(debtor, blocks)| Debt { debtor, blocks }).collect()
    }

    /// Reserves `blocks` of `shape` for a debtor's request; nothing changes
    /// where it is refused. From here on the blocks may be written and, as far
    /// as the debtor says they are filled, attended to.
    pub fn reserve(
        &mut self,
        now: Duration,
        debtor: InstanceId,
        request: u64,
        blocks: u32,
        shape: &KvShape,
    ) -> Result<Grant, Refusal> {
        if self.draining {
            return Err(Refusal::Draining);
        }
        if blocks == 0 {
            return Err(Refusal::Invalid);
        }
        let pool = self.pool_of(shape)?;
        if self.lent.checked_add(blocks).is_none_or(|lent| lent > self.share(pool.blocks())) {
            return Err(Refusal::LendCap);
        }
        let loan = LoanId(self.next_loan);
        self.next_loan = self.next_loan.checked_add(1).ok_or(Refusal::NotLending)?;
        let reserved = pool.table().reserve(blocks, loan).or_else(|| {
            let PoolSource::Pool { prefix: Some(prefix), .. } = &self.source else { return None };
            let mut prefix = prefix.lock().unwrap_or_else(PoisonError::into_inner);
            let missing = blocks.saturating_sub(pool.table().counts().free) as usize;
            // Prefixes are not given up for a debtor who is refused anyway.
            if prefix.evictable(pool.table()) < missing {
                return None;
            }
            prefix.evict(pool.table(), missing);
            pool.table().reserve(blocks, loan)
        });
        let reserved = reserved.ok_or(Refusal::NoRoom)?;
        let ranges = ranges(&reserved);
        if ranges.len() > MAX_RANGES {
            let freed = pool.table().free_loan(loan, &reserved);
            debug_assert_eq!(freed, Ok(blocks));
            return Err(Refusal::NoRoom);
        }
        for block in &reserved {
            let filling = pool.table().begin_fill(*block, loan);
            debug_assert_eq!(filling, Ok(()));
        }
        let record = LoanRecord { loan, epoch: self.epoch, debtor, request, blocks: reserved, pool };
        let record = Arc::new(record);
        self.lent += blocks;
        self.shared.insert(record.clone());
        self.loans.insert(loan, Lent { record, until: now + self.lease });
        Ok(Grant { loan, epoch: self.epoch, blocks: ranges })
    }

    /// Prolongs a loan, of which the debtor needs the first `blocks` blocks
    /// still: the others are free again. False: the debtor has no such loan (any
    /// more).
    ///
    /// A renewal that is late, from before the debtor gave a part back, names
    /// more blocks than the loan has left and changes none.
    pub fn renew(&mut self, now: Duration, debtor: InstanceId, loan: LoanId, epoch: u32, blocks: u32) -> bool {
        let Some(lent) = self.loans.get_mut(&loan) else { return false };
        if lent.record.debtor != debtor || lent.record.epoch != epoch {
            return false;
        }
        lent.until = now + self.lease;
        let keep = blocks as usize;
        if (1..lent.record.blocks.len()).contains(&keep) {
            let before = lent.record.clone();
            let kept = before.blocks[..keep].to_vec();
            lent.record = Arc::new(LoanRecord { blocks: kept, pool: before.pool.clone(), ..*before });
            // Whoever attends to the loan must see the change before its memory
            // can be another's.
            self.shared.replace(lent.record.clone());
            let freed = before.pool.table().free_loan(loan, &before.blocks[keep..]);
            debug_assert_eq!(freed, Ok((before.blocks.len() - keep) as u32));
            self.lent -= (before.blocks.len() - keep) as u32;
        }
        true
    }

    /// Ends a loan at its debtor's word. False: it has no such loan (any more).
    pub fn repay(&mut self, debtor: InstanceId, loan: LoanId, epoch: u32) -> bool {
        let its = self.loans.get(&loan).is_some_and(|l| l.record.debtor == debtor && l.record.epoch == epoch);
        if its {
            self.end(loan);
        }
        its
    }

    /// Ends the loans whose lease is over, and says which.
    pub fn expire(&mut self, now: Duration) -> Vec<Arc<LoanRecord>> {
        self.end_where(|lent| lent.until <= now)
    }

    /// Prolongs every lease by `gap`, in which this instance was not running and
    /// could hear no renewal.
    pub fn prolong(&mut self, gap: Duration) {
        self.loans.values_mut().for_each(|lent| lent.until += gap);
    }

    /// Ends the loans of a debtor whose process is certainly dead, and says which.
    pub fn debtor_gone(&mut self, debtor: InstanceId) -> Vec<Arc<LoanRecord>> {
        self.end_where(|lent| lent.record.debtor == debtor)
    }

    /// When the next lease is over.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.loans.values().map(|lent| lent.until).min()
    }

    fn share(&self, blocks: u32) -> u32 {
        (f64::from(blocks) * self.lend) as u32
    }

    /// The pool if it has `shape`, cut now if need be.
    fn pool_of(&mut self, shape: &KvShape) -> Result<Arc<KvPool>, Refusal> {
        let current = self.pool();
        if let Some(pool) = current.as_ref().filter(|pool| pool.shape() == shape) {
            return Ok(pool.clone());
        }
        let (memory, bytes) = match &self.source {
            PoolSource::Pool { .. } => return Err(Refusal::Shape),
            PoolSource::Nothing => return Err(Refusal::NotLending),
            _ if !self.loans.is_empty() => return Err(Refusal::Shape),
            PoolSource::Memory(memory, bytes) => (Some(memory.clone()), *bytes),
            PoolSource::Bytes(bytes) => (None, *bytes),
        };
        let block = shape.block_bytes();
        if block == 0 || bytes / block == 0 {
            return Err(Refusal::NoRoom);
        }
        // The old pool's memory goes before the new one's comes.
        self.shared.set_current(None);
        drop(current);
        let blocks = u32::try_from(bytes / block).unwrap_or(u32::MAX - 1);
        let pool = match memory {
            Some(memory) => Arc::new(KvPool::within(*shape, blocks, memory)),
            None => Arc::new(KvPool::new(*shape, blocks).map_err(|_| Refusal::NoRoom)?),
        };
        self.epoch = self.epoch.wrapping_add(1);
        self.shared.set_current(Some(pool.clone()));
        Ok(pool)
    }

    fn end_where(&mut self, over: impl Fn(&Lent) -> bool) -> Vec<Arc<LoanRecord>> {
        let ended: Vec<_> = self.loans.values().filter(|l| over(l)).map(|l| l.record.clone()).collect();
        ended.iter().for_each(|record| self.end(record.loan));
        ended
    }

    fn end(&mut self, loan: LoanId) {
        let Some(lent) = self.loans.remove(&loan) else { return };
        self.shared.remove(loan);
        let blocks = &lent.record.blocks;
        let freed = lent.record.pool.table().free_loan(loan, blocks);
        debug_assert_eq!(freed, Ok(blocks.len() as u32));
        self.lent -= blocks.len() as u32;
    }
}

/// Ascending block indices as ranges.
pub fn ranges(blocks: &[BlockIndex]) -> Vec<BlockRange> {
    let mut ranges: Vec<BlockRange> = Vec::new();
    for &block in blocks {
        match ranges.last_mut() {
            Some(last) if last.start + last.count == block => last.count += 1,
            _ => ranges.push(BlockRange { start: block, count: 1 }),
        }
    }
    ranges
}
