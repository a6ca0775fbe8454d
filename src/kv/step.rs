//! A step's metadata: which tokens are computed, where their KV goes, and which
//! KV they attend to. Made by the scheduler, taken by the device.

use super::rblock::KvRun;

/// Where a row of the step stands in its sequence, and where its K and V go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowSlot {
    /// Position in the sequence.
    pub position: u32,
    /// Local physical block that takes the row's K and V.
    pub block: u32,
    /// Token index inside the block.
    pub offset: u32,
}

/// Consecutive rows of one sequence and the KV they attend to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttnSeq {
    /// First row in the step (or in the query buffer).
    pub row: u32,
    /// Rows; their positions are consecutive.
    pub rows: u32,
    /// Position of the first row.
    pub position: u32,
    /// First entry in the accompanying list of [`KvRun`]s.
    pub run: u32,
    /// Entries. May be 0: the partial is then empty (o = 0, lse = −∞).
    pub runs: u32,
}

/// Everything that is fixed for one step.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Place of each row; as long as `tokens`.
    pub slots: &'a [RowSlot],
    /// Every row belongs to exactly one entry, in order. The KV runs are the
    /// *local* ones and include the blocks that this step's rows fill.
    pub seqs: &'a [AttnSeq],
    /// The sequences' KV runs.
    pub runs: &'a [KvRun],
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [u32],
}
