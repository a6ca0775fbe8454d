//! The scheduler's memory: local blocks, what was promised of them, and moves
//! to creditors between two steps.

use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use super::batch::Spill;
use super::scheduler::{Ask, Scheduler};
use super::sequence::{HeldLoan, Phase, Sequence};
use crate::kv::block_table::Placement;
use crate::kv::entry::Owner;
use crate::kv::prefix::PrefixCache;

/// Fewest local blocks with which a prompt that borrows can make progress: one
/// being filled while one leaves.
pub(super) const MIN_LOCAL_BLOCKS: usize = 2;
/// Smallest loan asked for when a running sequence outgrows the pool.
const GROWTH_BLOCKS: usize = 8;
/// Most rBlocks moved between two steps.
const MAX_MOVES: usize = 8;

impl Scheduler {
    pub(super) fn prefix(&self) -> MutexGuard<'_, PrefixCache> {
        // A panic while it was held leaves at worst blocks that are cached twice
        // or not at all; the rBlock table is the truth.
        self.prefix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn obtainable(&self) -> usize {
        self.obtainable_up_to(usize::MAX)
    }

    /// Local blocks that are free or only cached; `most`, or more, where there
    /// are so many. What is cached is counted one by one.
    pub(super) fn obtainable_up_to(&self, most: usize) -> usize {
        let free = self.pool.table().counts().free as usize;
        free + self.prefix().evictable_up_to(self.pool.table(), most.saturating_sub(free))
    }

    /// Local blocks that admitted sequences were promised and have not taken.
    pub(super) fn promised(&self) -> usize {
        self.admitted.iter().map(Sequence::promised).sum()
    }

    /// Gives `admitted[index]` local blocks for `tokens`, in order, as long as
    /// there are any; how far they reach.
    pub(super) fn extend(&mut self, index: usize, tokens: Range<usize>) -> usize {
        let missing = self.admitted[index].table.absent(tokens.clone());
        if missing == 0 {
            return tokens.end;
        }
        let table = self.pool.table();
        let free = table.counts().free as usize;
        if free < missing {
            self.prefix().evict(table, missing - free);
        }
        let seq = &mut self.admitted[index];
        let size = seq.table.block_tokens() as usize;
        for entry in tokens.start / size..tokens.end.div_ceil(size) {
            if !seq.table.is_absent(entry) {
                continue;
            }
            let Some(block) = table.alloc(Owner::Sequence(seq.id as u32)) else {
                return (entry * size).max(tokens.start);
            };
            if entry < seq.table.len() {
                seq.table.replace(entry, Placement::Local(block));
            } else {
                seq.table.push(Placement::Local(block));
            }
        }
        tokens.end
    }

    pub(super) fn free_blocks(&mut self, seq: &mut Sequence) {
        self.drop_fetches(|fetch| fetch.seq == seq.id);
        for placement in seq.table.drain() {
            if let Placement::Local(block) = placement {
                let released = self.pool.table().release(block);
                debug_assert!(released.is_ok(), "a sequence's blocks are held by it: {released:?}");
            }
        }
        for loan in seq.loans.drain(..).chain(seq.copying.drain(..)) {
            self.repay(loan);
        }
        self.blocked = false;
    }

    /// Gives a loan back that is in order, with its copies.
    pub(super) fn repay(&mut self, mut loan: HeldLoan) {
        let copies = std::mem::take(&mut loan.copies);
        // It can be lent again, to whoever asks first; news of that will come
        // late for a sequence that wants it at once.
        self.lendable += loan.blocks.len() + copies.iter().map(|c| c.blocks.len()).sum::<usize>();
        self.asks.push(Ask::Repay(loan));
        self.asks.extend(copies.into_iter().map(|copy| Ask::Repay(copy.promoted(0))));
    }

    /// rBlocks to move to creditors before the next step, because memory is
    /// short here; asks for loans where there are none to move them to. The
    /// caller moves the bytes, then calls [`moved`](Self::moved).
    pub fn plan_moves(&mut self, spills: &mut Vec<Spill>) {
        spills.clear();
        let next = |s: &Sequence| {
            let next = s.next();
            s.table.absent(next.start..next.start + 1)
        };
        let needed: usize = self.admitted.iter().filter(|s| s.phase == Phase::Running).map(next).sum();
        let low_water = self.admitted.len().max(2) as isize;
        let enough = |blocks: usize| blocks as isize - needed as isize >= low_water;
        // What the prefix cache could give back is counted one by one: only
        // where it matters, and no further.
        if self.admitted.is_empty() || enough(self.pool.table().counts().free as usize) {
            return;
        }
        let obtainable = self.obtainable_up_to(needed + low_water.unsigned_abs());
        if enough(obtainable) {
            return;
        }
        let headroom = obtainable as isize - needed as isize;
        let mut wanted = if headroom < 0 { headroom.unsigned_abs().min(MAX_MOVES) } else { 0 };
        self.order.clear();
        self.order.extend(0..self.admitted.len());
        let admitted = &self.admitted;
        self.order.sort_by_key(|&i| std::cmp::Reverse(admitted[i].table.local()));
        let block_tokens = self.pool.shape().block_tokens as usize;
        let mut ask = None;
        for &index in &self.order {
            let s = &mut self.admitted[index];
            if s.phase != Phase::Running {
                continue;
            }
            let complete = s.computed / block_tokens;
            // From the end: what others share is at the beginning.
            let mut candidates = (0..complete.min(s.table.len())).rev().filter_map(|i| match s.table.blocks()[i] {
                Placement::Local(block) if s.is_complete(i) => Some((i, block)),
                _ => None,
            });
            let mut chosen = Vec::new();
            let room = s.unassigned();
            while wanted > 0 && chosen.len() < room {
                let Some(candidate) = candidates.next() else { break };
                chosen.push(candidate);
                wanted -= 1;
            }
            if ask.is_none() && room == chosen.len() && !s.borrowing && candidates.next().is_some() {
                ask = Some(index);
            }
            spills.extend(chosen.into_iter().filter_map(|(i, local)| s.spill(i, local)).flatten().flatten());
        }
        if let Some(index) = ask
            && self.lendable > 0
        {
            let s = &mut self.admitted[index];
            let most = self.pool.shape().blocks_for(s.limit).saturating_sub(s.table.held()).max(1);
            let blocks = GROWTH_BLOCKS.max(s.table.len() / 8).min(most).max(wanted);
            self.asks.push(s.ask(blocks));
        }
    }

    /// The rBlocks' bytes are with their creditors: from now on they are
    /// attended to there, and their local blocks are free. Takes those out of
    /// `spills` whose loan was lost on the way: their blocks stay here.
    pub fn moved(&mut self, spills: &mut Vec<Spill>) {
        spills.retain(|spill| {
            let Some(s) = self.admitted.iter_mut().find(|s| s.id == spill.seq) else { return false };
            if spill.copy {
                let mut copies = s.loans.iter().flat_map(|l| &l.copies);
                return copies.any(|c| c.creditor == spill.creditor && c.loan == spill.loan);
            }
            let Some(loan) = s.loans.iter_mut().find(|l| l.is(spill.creditor, Some(spill.loan))) else {
                return false;
            };
            loan.placed += 1;
            if let Some(Placement::Local(block)) = s.table.replace(spill.index, spill.placement()) {
                let released = self.pool.table().release(block);
                debug_assert!(released.is_ok(), "a sequence's blocks are held by it: {released:?}");
            }
            s.local_goal = s.local_goal.max(s.table.local());
            true
        });
    }
}
