//! A batch as the debtor takes it: what moves to creditors, and what lies there.

use crate::attention::debtor::{BlockMove, RemotePart};
use crate::attention::wire::{LoanView, Placement, PlanEntry};
use crate::schedule::batch::{BatchItem, Spill};
use crate::schedule::scheduler::Scheduler;

pub(super) fn block_move(spill: &Spill) -> BlockMove {
    BlockMove {
        creditor: spill.creditor,
        local: spill.local.index,
        placement: Placement { loan: spill.loan, block: spill.block, position: spill.position, tokens: spill.tokens },
    }
}

/// The parts of a batch item's KV that lie with creditors, one a creditor.
pub(super) fn remote_parts(scheduler: &Scheduler, item: &BatchItem) -> Vec<RemotePart> {
    let mut parts: Vec<RemotePart> = Vec::new();
    let loans = scheduler.get(item.seq).map_or(&[][..], |s| &s.loans);
    for held in loans.iter().filter(|l| l.placed > 0) {
        let view = LoanView { loan: held.loan, epoch: held.epoch, visible: held.placed as u32 };
        match parts.iter_mut().find(|p| p.creditor == held.creditor) {
            Some(part) => part.entry.loans.push(view),
            None => parts.push(RemotePart {
                creditor: held.creditor,
                rows: item.rows.clone(),
                entry: PlanEntry { rows: item.rows.len() as u32, position: item.position, loans: vec![view] },
            }),
        }
    }
    parts
}
