//! Recovery: what becomes of sequences whose KV is lost with a creditor.
//!
//! The lost token ranges become gaps, and gaps are computed before anything
//! else, against the KV before them that is left: that of other creditors, and
//! the local one. Room for them is found as for a prompt: here, else with
//! creditors, to whom the blocks go as they are computed. If nobody lends, a
//! sequence waits for what others will release; if that cannot suffice either it
//! begins anew from the queue, with all tokens it has generated so far. Its
//! client sees nothing of any of this but a pause.

use std::collections::BTreeMap;

use super::memory::MIN_LOCAL_BLOCKS;
use super::scheduler::{Ask, Scheduler};
use super::sequence::{Phase, SeqId, Sequence};
use crate::kv::block_table::Placement;
use crate::kv::rblock::{BlockIndex, InstanceId, LoanId};

impl Scheduler {
    /// All that `creditor` lent is gone (or only `loan`), and the KV there with
    /// it. Between [`next_batch`](Self::next_batch) and
    /// [`complete`](Self::complete) this undoes the step of each sequence that
    /// attends to such KV: its layers above the loss were computed without.
    ///
    /// The loans are repaid, in case the creditor is alive and only out of
    /// reach. Returns the sequences that had such loans; each goes on.
    pub fn lose(&mut self, creditor: InstanceId, loan: Option<LoanId>) -> Vec<SeqId> {
        self.drop_fetches(|fetch| fetch.creditor == creditor && loan.is_none_or(|loan| fetch.loan == loan));
        let mut hit = Vec::new();
        for s in &mut self.admitted {
            let asks = self.asks.len();
            if s.lose(creditor, loan, &mut self.asks) {
                self.recoveries += 1;
            }
            if self.asks.len() > asks {
                s.short = true;
                hit.push(s.id);
                tracing::info!(seq = s.id, %creditor, lost = s.gaps.tokens(), "loans were lost");
            }
        }
        hit
    }

    /// Finds room for sequences that lost some.
    pub(super) fn recover(&mut self) {
        let mut index = 0;
        while index < self.admitted.len() {
            let s = &self.admitted[index];
            let before = self.admitted.len();
            if s.short && s.phase == Phase::Running && !s.borrowing {
                self.make_room(index);
            }
            // It may have gone back to the queue.
            index += usize::from(self.admitted.len() == before);
        }
    }

    fn make_room(&mut self, index: usize) {
        let need = self.pool.shape().blocks_for(self.admitted[index].tokens.len() + 1);
        let wanting = self.admitted[index].wanting(need);
        let available = match wanting {
            0 => 0,
            _ => self.obtainable().saturating_sub(self.promised()),
        };
        let s = &mut self.admitted[index];
        if wanting <= available {
            s.take_promise(need);
            s.short = false;
        } else if self.lendable > 0 {
            // Some of what is free here is left to others, but not so much that
            // each step could compute only a few of the lost tokens.
            let chunk = (self.config.chunk_rows / s.table.block_tokens() as usize).max(MIN_LOCAL_BLOCKS);
            let share = available.saturating_sub(self.pool.blocks() as usize / 4).max(chunk.min(available));
            s.local_goal = s.local_goal.max(s.table.local()) + share;
            s.phase = Phase::Borrowing;
            let ask = s.ask(wanting - share);
            self.asks.push(ask);
        } else {
            self.wait_or_begin_anew(index);
        }
    }

    /// Nobody lends what `admitted[index]` lost. It gets the next memory that
    /// others release; if there are no others, or if this node could not hold it
    /// even then, it begins anew.
    pub(super) fn wait_or_begin_anew(&mut self, index: usize) {
        let alone = self.admitted.len() == 1;
        let s = &mut self.admitted[index];
        let need = self.pool.shape().blocks_for(s.tokens.len() + 1);
        let goal = s.local_goal.max(s.table.local()) + s.wanting(need);
        if alone || goal > self.pool.blocks() as usize {
            return self.begin_anew(index);
        }
        s.local_goal = goal;
        s.phase = Phase::Running;
        s.short = false;
    }

    /// Gives up what `admitted[index]` has left and queues it, to be computed
    /// from its first token on. Generated tokens stay.
    pub(super) fn begin_anew(&mut self, index: usize) {
        let s = &mut self.admitted[index];
        tracing::info!(seq = s.id, tokens = s.computed, "begins anew after a loss");
        s.redo = s.redo.max(s.computed);
        self.put_back(index);
    }

    /// Takes `admitted[index]` out and puts it at the head of the queue.
    pub(super) fn put_back(&mut self, index: usize) {
        let mut s = self.admitted.remove(index);
        self.free_blocks(&mut s);
        self.reset(&mut s);
        self.waiting.push_front(s);
        // Those that stay come first; what this one freed is theirs.
        self.blocked = !self.admitted.is_empty();
    }

    /// Computes nothing of `s` any more. Its blocks and loans are given back
    /// already.
    pub(super) fn reset(&self, s: &mut Sequence) {
        s.phase = Phase::Waiting;
        (s.computed, s.stuck) = (0, 0);
        s.gaps.clear();
        (s.borrowing, s.planned) = (false, false);
        s.short = false;
        s.copy_asked = None;
        s.step = 0..0;
        s.local_goal = 0;
        s.hashed = 0;
        s.hash = self.prefix().root();
    }
}

impl Sequence {
    /// See [`Scheduler::lose`]. Asks for each lost loan to be repaid; true if KV
    /// was lost, or the step undone.
    fn lose(&mut self, creditor: InstanceId, loan: Option<LoanId>, asks: &mut Vec<Ask>) -> bool {
        // Copies there: what they are copies of is not touched.
        for held in self.loans.iter_mut().chain(&mut self.copying) {
            let copies = &mut held.copies;
            let is = |c: &super::sequence::LoanCopy| c.creditor == creditor && loan.is_none_or(|l| c.loan == l);
            while let Some(at) = copies.iter().position(is) {
                asks.push(Ask::Repay(copies.remove(at).promoted(0)));
            }
        }
        while let Some(at) = self.copying.iter().position(|l| l.is(creditor, loan)) {
            asks.push(Ask::Repay(self.copying.remove(at)));
        }
        // Lost blocks that hold KV, and where their copies are.
        let mut moved: BTreeMap<(LoanId, BlockIndex), Placement> = BTreeMap::new();
        let mut at = 0;
        while let Some(held) = self.loans.get(at) {
            if !held.is(creditor, loan) {
                at += 1;
                continue;
            }
            let mut held = self.loans.remove(at);
            for k in 0..held.placed {
                let copy = held.copy_of(k);
                let placement = copy.map_or(Placement::Missing, |(creditor, loan, block)| Placement::Remote {
                    creditor,
                    loan,
                    block,
                });
                moved.insert((held.loan, held.blocks[k]), placement);
            }
            // In the lost one's place, so that they are used in the same order.
            for copy in std::mem::take(&mut held.copies) {
                self.loans.insert(at, copy.promoted(held.placed));
                at += 1;
            }
            asks.push(Ask::Repay(held));
        }
        if moved.is_empty() {
            return false;
        }
        self.relocate(creditor, |loan, block| moved.get(&(loan, block)).copied());
        let undone = !self.step.is_empty();
        if undone {
            self.undo_step();
        }
        undone || moved.values().any(|placement| *placement == Placement::Missing)
    }
}
