//! One sequence: its tokens, its rBlocks, and the loans that hold some of them.

use std::ops::Range;

use super::batch::Spill;
use super::gaps::Gaps;
use super::scheduler::Ask;
use crate::kv::block_table::{BlockTable, Placement};
use crate::kv::entry::BlockRef;
use crate::kv::prefix::BlockHash;
use crate::kv::rblock::{BlockIndex, InstanceId, LoanId};

/// Names a sequence within its engine.
pub type SeqId = u64;

/// A loan as granted to this instance for one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldLoan {
    /// Who lent.
    pub creditor: InstanceId,
    /// The loan's name at the creditor.
    pub loan: LoanId,
    /// Its epoch, quoted with every use.
    pub epoch: u32,
    /// Granted blocks, used in this order.
    pub blocks: Vec<BlockIndex>,
    /// How many of them are promised to a local block of the sequence.
    pub assigned: usize,
    /// How many of them hold the sequence's KV (placed; never more than
    /// `assigned`).
    pub placed: usize,
    /// Where the same KV lies a second time, by ascending `first`, without
    /// overlap; blocks that no copy covers lie here only.
    pub copies: Vec<LoanCopy>,
}

/// Blocks of another creditor that hold what a stretch of a loan's blocks holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoanCopy {
    /// The loan's block that `blocks[0]` is the copy of.
    pub first: usize,
    /// Who lent.
    pub creditor: InstanceId,
    /// The loan's name there.
    pub loan: LoanId,
    /// Its epoch.
    pub epoch: u32,
    /// Block `k` is the copy of the loan's block `first + k`.
    pub blocks: Vec<BlockIndex>,
}

impl HeldLoan {
    /// A loan under which nothing lies yet.
    pub fn new(creditor: InstanceId, loan: LoanId, epoch: u32, blocks: Vec<BlockIndex>) -> Self {
        Self { creditor, loan, epoch, blocks, assigned: 0, placed: 0, copies: Vec::new() }
    }

    /// Is it `creditor`'s, and `loan` where one is named?
    pub fn is(&self, creditor: InstanceId, loan: Option<LoanId>) -> bool {
        self.creditor == creditor && loan.is_none_or(|loan| self.loan == loan)
    }

    /// Block `k`'s copy: whose, under which loan, which block.
    pub fn copy_of(&self, k: usize) -> Option<(InstanceId, LoanId, BlockIndex)> {
        let copy = self.copies.iter().find(|c| (c.first..c.first + c.blocks.len()).contains(&k))?;
        Some((copy.creditor, copy.loan, copy.blocks[k - copy.first]))
    }

    /// Keeps only the first `keep` blocks, and of its copies what they are copies
    /// of; asks for the creditors to be told.
    pub(super) fn truncate(&mut self, keep: usize, asks: &mut Vec<Ask>) {
        let Self { creditor, loan, .. } = *self;
        self.blocks.truncate(keep);
        asks.push(Ask::Shrink { creditor, loan, keep });
        for mut copy in std::mem::take(&mut self.copies) {
            let keep = keep.saturating_sub(copy.first).min(copy.blocks.len());
            if keep == 0 {
                asks.push(Ask::Repay(copy.promoted(0)));
                continue;
            }
            if keep < copy.blocks.len() {
                copy.blocks.truncate(keep);
                asks.push(Ask::Shrink { creditor: copy.creditor, loan: copy.loan, keep });
            }
            self.copies.push(copy);
        }
    }

    /// Placed blocks that lie here only.
    pub fn uncopied(&self) -> usize {
        let copied = |c: &LoanCopy| self.placed.saturating_sub(c.first).min(c.blocks.len());
        self.placed - self.copies.iter().map(copied).sum::<usize>()
    }
}

impl LoanCopy {
    /// As a loan of its own, once what it is the copy of is lost. `placed` is
    /// how many of the lost loan's blocks were.
    pub(super) fn promoted(self, placed: usize) -> HeldLoan {
        let placed = placed.saturating_sub(self.first).min(self.blocks.len());
        HeldLoan { assigned: placed, placed, ..HeldLoan::new(self.creditor, self.loan, self.epoch, self.blocks) }
    }
}

/// What a sequence is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// For room.
    Waiting,
    /// For a creditor's word, before its next token can be computed.
    Borrowing,
    /// For nothing: its remaining tokens are computed step by step.
    Running,
}

/// One sequence being generated.
#[derive(Debug)]
pub struct Sequence {
    /// Its name.
    pub id: SeqId,
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Most tokens it may reach, prompt included.
    pub limit: usize,
    /// Wants the logits of every prompt position.
    pub prompt_logits: bool,
    /// Leading tokens whose KV was computed. It exists, but for `gaps`.
    pub computed: usize,
    /// Of the computed tokens those whose KV was lost with a creditor. They are
    /// computed again, in ascending order, before any further token is.
    pub gaps: Gaps,
    /// Where the KV is.
    pub table: BlockTable,
    /// What it waits for.
    pub phase: Phase,
    /// Its loans, in the order granted.
    pub loans: Vec<HeldLoan>,
    /// A further loan has been asked for.
    pub borrowing: bool,
    /// Turns in which it could not go on for want of memory, since it last did.
    pub(super) stuck: u32,
    /// How many blocks that was for.
    pub asked: usize,
    /// It was asked for by plan, not for want of memory.
    pub(super) planned: bool,
    /// Blocks it means to hold here once all its tokens are computed.
    pub local_goal: usize,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// A loss has left it with less room than it needs; see `recovery.rs`.
    pub(super) short: bool,
    /// Granted loans that are not used before their copies are granted too, or
    /// refused. The first is the one asked for.
    pub(super) copying: Vec<HeldLoan>,
    /// What was asked for last is a copy of this loan.
    pub(super) copy_asked: Option<(InstanceId, LoanId)>,
    /// Tokens that the step under way computes; empty between steps, and where
    /// a loss has undone the step for this sequence.
    pub(super) step: Range<usize>,
    /// Tokens below this were computed before a loss made it begin anew.
    pub(super) redo: usize,
    /// Name of the last block hashed, and how many blocks were.
    pub(super) hash: BlockHash,
    pub(super) hashed: usize,
}

impl Sequence {
    /// Tokens whose KV is still to be computed; 1 while decoding.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed + self.gaps.tokens()
    }

    /// The tokens to compute next, as many as are consecutive: the first gap, or
    /// what was never computed. A row attends to what lies before it, which is
    /// why gaps come first and in ascending order.
    pub fn next(&self) -> Range<usize> {
        self.gaps.first().unwrap_or(self.computed..self.tokens.len())
    }

    /// Block `index` is full and holds the KV of each of its tokens.
    pub fn is_complete(&self, index: usize) -> bool {
        let size = self.table.block_tokens() as usize;
        (index + 1) * size <= self.computed && !self.gaps.touch(index * size..(index + 1) * size)
    }

    /// Granted blocks that are not promised yet.
    pub fn unassigned(&self) -> usize {
        self.loans.iter().map(|l| l.blocks.len() - l.assigned).sum()
    }

    /// Promises the next granted block to the sequence's block `index`, which
    /// is `local`; the rBlock's ways out, to the loan and to its copy.
    pub(super) fn spill(&mut self, index: usize, local: BlockRef) -> Option<[Option<Spill>; 2]> {
        self.spill_to(None, index, local)
    }

    /// As [`spill`](Self::spill), to a certain creditor where one is named.
    pub(super) fn spill_to(
        &mut self,
        creditor: Option<InstanceId>,
        index: usize,
        local: BlockRef,
    ) -> Option<[Option<Spill>; 2]> {
        let tokens = self.table.block_tokens();
        let suits =
            |l: &&mut HeldLoan| l.assigned < l.blocks.len() && creditor.is_none_or(|creditor| l.creditor == creditor);
        // The one that is least full: so each creditor holds its share of every
        // stretch of the context, and all attend at once from the first chunk on.
        let fuller =
            |a: &&mut HeldLoan, b: &&mut HeldLoan| (a.assigned * b.blocks.len()).cmp(&(b.assigned * a.blocks.len()));
        let loan = self.loans.iter_mut().filter(suits).min_by(fuller)?;
        let k = loan.assigned;
        loan.assigned += 1;
        let spill = |(creditor, loan, block), copy| Spill {
            seq: self.id,
            index,
            local,
            creditor,
            loan,
            block,
            position: index as u32 * tokens,
            tokens,
            copy,
        };
        let first = spill((loan.creditor, loan.loan, loan.blocks[k]), false);
        Some([Some(first), loan.copy_of(k).map(|place| spill(place, true))])
    }

    /// The step under way is undone for this sequence: nothing of it counts,
    /// neither its rows nor what was on its way to creditors.
    pub(super) fn undo_step(&mut self) {
        self.step = 0..0;
        self.loans.iter_mut().for_each(|loan| loan.assigned = loan.placed);
    }

    /// Tells where each block of the table lies that was in `lost`'s hands;
    /// `Missing` ones become gaps.
    pub(super) fn relocate(&mut self, lost: InstanceId, place: impl Fn(LoanId, BlockIndex) -> Option<Placement>) {
        let size = self.table.block_tokens() as usize;
        for index in 0..self.table.len() {
            let Placement::Remote { creditor, loan, block } = self.table.blocks()[index] else { continue };
            if creditor != lost {
                continue;
            }
            if let Some(placement) = place(loan, block) {
                self.table.replace(index, placement);
                if placement == Placement::Missing {
                    self.gaps.add(index * size..(index + 1) * size);
                }
            }
        }
    }
}
