//! One sequence: its tokens, its rBlocks, and the loans that hold some of them.

use std::ops::Range;

use crate::kv::block_table::BlockTable;
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
}

/// What a sequence is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// For room.
    Waiting,
    /// For a creditor's word, before its first token can be computed.
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
    /// Leading tokens whose KV exists.
    pub computed: usize,
    /// Where that KV is.
    pub table: BlockTable,
    /// What it waits for.
    pub phase: Phase,
    /// Its loans, in the order granted.
    pub loans: Vec<HeldLoan>,
    /// A further loan has been asked for.
    pub borrowing: bool,
    /// How many blocks that was for.
    pub asked: usize,
    /// Blocks that go to creditors as soon as they are computed.
    pub remote_goal: Range<usize>,
    /// Blocks it means to hold here once its prompt is computed.
    pub local_goal: usize,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// Name of the last block hashed, and how many blocks were.
    pub(super) hash: BlockHash,
    pub(super) hashed: usize,
}

impl Sequence {
    /// Tokens whose KV is still to be computed; 1 while decoding.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Granted blocks that are not promised yet.
    pub fn unassigned(&self) -> usize {
        self.loans.iter().map(|l| l.blocks.len() - l.assigned).sum()
    }

    /// Promises the next granted block; the loan's index and the block.
    pub(super) fn assign(&mut self) -> Option<(usize, BlockIndex)> {
        let index = self.loans.iter().position(|l| l.assigned < l.blocks.len())?;
        let loan = &mut self.loans[index];
        loan.assigned += 1;
        Some((index, loan.blocks[loan.assigned - 1]))
    }
}
