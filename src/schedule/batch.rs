//! One step's work, in the form the device takes it.

use std::ops::Range;

use super::sequence::SeqId;
use crate::kv::block_table::Placement;
use crate::kv::rblock::{BlockIndex, InstanceId, KvRun, LoanId};
use crate::kv::step::{AttnSeq, RowSlot, StepInput};
use crate::kv::table::BlockRef;

/// One sequence's rows of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchItem {
    /// The sequence.
    pub seq: SeqId,
    /// Its rows in the step.
    pub rows: Range<u32>,
    /// Position of the first row.
    pub position: u32,
    /// Its rows of logits, as indices into the step's logits: those of the
    /// last rows of `rows`. Empty where the step ends inside the prompt, or
    /// inside a gap.
    pub logits: Range<u32>,
    /// The rows' KV had been computed before and was lost.
    pub again: bool,
}

/// An rBlock that goes to a creditor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spill {
    /// Whose it is.
    pub seq: SeqId,
    /// Its index in the sequence's block table.
    pub index: usize,
    /// The local block.
    pub local: BlockRef,
    /// To whom.
    pub creditor: InstanceId,
    /// Under which loan.
    pub loan: LoanId,
    /// Block in the creditor's pool.
    pub block: BlockIndex,
    /// Position of its first token.
    pub position: u32,
    /// Tokens filled.
    pub tokens: u32,
    /// It goes there to lie a second time: it is not attended to there.
    pub copy: bool,
}

impl Spill {
    /// Where the rBlock lies once the move is done.
    pub fn placement(&self) -> Placement {
        Placement::Remote { creditor: self.creditor, loan: self.loan, block: self.block }
    }
}

/// A step. Reused from step to step, so that building one does not allocate
/// once its vectors have grown.
#[derive(Debug, Default)]
pub struct Batch {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Where each row stands and where its KV goes.
    pub slots: Vec<RowSlot>,
    /// Rows and local KV by sequence.
    pub seqs: Vec<AttnSeq>,
    /// Local KV runs.
    pub runs: Vec<KvRun>,
    /// Rows whose logits are wanted.
    pub logit_rows: Vec<u32>,
    /// Sequences in the order of their rows.
    pub items: Vec<BatchItem>,
    /// rBlocks that this step completes and that go to creditors.
    pub spills: Vec<Spill>,
}

impl Batch {
    pub(super) fn clear(&mut self) {
        self.tokens.clear();
        self.slots.clear();
        self.seqs.clear();
        self.runs.clear();
        self.logit_rows.clear();
        self.items.clear();
        self.spills.clear();
    }

    /// No rows.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// As the device takes it.
    pub fn input(&self) -> StepInput<'_> {
        StepInput {
            tokens: &self.tokens,
            slots: &self.slots,
            seqs: &self.seqs,
            runs: &self.runs,
            logit_rows: &self.logit_rows,
        }
    }
}
