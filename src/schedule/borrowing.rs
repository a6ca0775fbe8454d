//! The scheduler's dealings with creditors: what answers to its asks lead to,
//! and copies of what was lent.

use super::scheduler::{Ask, Scheduler};
use super::sequence::{HeldLoan, LoanCopy, Phase, SeqId, Sequence};

impl Scheduler {
    /// The answer to [`Ask::Borrow`]. Loans for a sequence that is gone are
    /// repaid at once.
    pub fn granted(&mut self, seq: SeqId, loans: Vec<HeldLoan>) {
        let Some(index) = self.admitted.iter().position(|s| s.id == seq && s.borrowing) else {
            loans.into_iter().for_each(|loan| self.repay(loan));
            return;
        };
        let s = &mut self.admitted[index];
        if s.copy_asked.is_some() {
            return self.copied(index, loans);
        }
        s.copying.extend(loans);
        self.copy_or_go_on(index);
    }

    /// Nobody lends what was asked for. `reason` is for the client, should it
    /// come to that.
    pub fn refused(&mut self, seq: SeqId, reason: &str) {
        let Some(index) = self.admitted.iter().position(|s| s.id == seq && s.borrowing) else { return };
        if self.admitted[index].copy_asked.is_some() {
            return self.copied(index, Vec::new());
        }
        let alone = self.admitted.len() == 1;
        let available = self.obtainable().saturating_sub(self.promised());
        let pool_blocks = self.pool.blocks() as usize;
        let s = &mut self.admitted[index];
        s.borrowing = false;
        if s.phase != Phase::Borrowing {
            if s.asked > 1 {
                // Nobody has that much; one block is better than none.
                let ask = s.ask(1);
                self.asks.push(ask);
                return;
            }
            // Not asked again until creditors are heard of anew.
            self.lendable = 0;
            let next = s.next();
            if alone && available == 0 && s.table.absent(next.start..next.start + 1) > 0 {
                if s.gaps.is_empty() {
                    let message = format!("out of KV memory at {} tokens: {reason}", s.computed);
                    self.fail(seq, message);
                } else {
                    self.begin_anew(index);
                }
            }
            return;
        }
        // The first ask left a share of the pool to others. If nobody has that
        // much, ask for what we cannot do without.
        let need = self.pool.shape().blocks_for(s.tokens.len() + 1);
        let least = s.wanting(need).saturating_sub(available);
        if least == 0 {
            // Memory has come free meanwhile.
            s.take_promise(need);
            s.phase = Phase::Running;
        } else if least < s.asked {
            s.local_goal = s.local_goal.max(s.table.local()) + available;
            let ask = s.ask(least);
            self.asks.push(ask);
        } else if s.short {
            self.wait_or_begin_anew(index);
        } else if alone && need > self.reach() {
            let message = format!(
                "the prompt needs {need} rBlocks of KV memory; this node has {pool_blocks}, and borrowing failed: {reason}"
            );
            self.fail(seq, message);
        } else {
            self.put_back(index);
            // Others use what it needs. It is tried again when they are heard of.
            (self.blocked, self.refused_alone) = (true, true);
        }
    }

    /// Asks for a copy of the first loan that waits for one, where lent blocks
    /// are to have copies; without such a loan the sequence goes on.
    fn copy_or_go_on(&mut self, index: usize) {
        let s = &mut self.admitted[index];
        match s.copying.first() {
            Some(loan) if self.config.replicas > 1 => {
                s.copy_asked = Some((loan.creditor, loan.loan));
                s.borrowing = true;
                let (blocks, apart_from) = (loan.blocks.len(), vec![loan.creditor]);
                self.asks.push(Ask::Borrow { seq: s.id, blocks, apart_from });
            }
            _ => {
                s.loans.append(&mut s.copying);
                s.borrowing = false;
                s.phase = Phase::Running;
            }
        }
    }

    /// The answer to an ask for a copy; no `copies` where it was refused. What
    /// has no copy is used all the same.
    fn copied(&mut self, index: usize, copies: Vec<HeldLoan>) {
        let s = &mut self.admitted[index];
        let of = s.copy_asked.take();
        let first = s.copying.first_mut();
        // It may be that the loan was lost while its copy was asked for.
        match first.filter(|loan| of == Some((loan.creditor, loan.loan))) {
            Some(loan) => {
                let mut first = 0;
                for HeldLoan { creditor, loan: copy, epoch, blocks, .. } in copies {
                    let len = blocks.len();
                    loan.copies.push(LoanCopy { first, creditor, loan: copy, epoch, blocks });
                    first += len;
                }
                let settled = s.copying.remove(0);
                s.loans.push(settled);
            }
            None => copies.into_iter().for_each(|loan| self.repay(loan)),
        }
        self.copy_or_go_on(index);
    }
}

impl Sequence {
    /// Asks for `blocks` blocks, from anybody.
    pub(super) fn ask(&mut self, blocks: usize) -> Ask {
        (self.borrowing, self.asked) = (true, blocks);
        Ask::Borrow { seq: self.id, blocks, apart_from: Vec::new() }
    }

    /// Local blocks that it was promised and has not taken.
    pub(super) fn promised(&self) -> usize {
        self.local_goal.saturating_sub(self.table.local())
    }

    /// Blocks that it needs to hold `need` and neither has nor was promised, here
    /// or by creditors.
    pub(super) fn wanting(&self, need: usize) -> usize {
        need.saturating_sub(self.table.held() + self.promised() + self.unassigned())
    }

    /// Is promised here what it is still [`wanting`](Self::wanting).
    pub(super) fn take_promise(&mut self, need: usize) {
        self.local_goal = self.local_goal.max(self.table.local()) + self.wanting(need);
    }
}
