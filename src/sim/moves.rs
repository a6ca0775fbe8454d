//! KV of a simulated instance that moves: home and to creditors by plan, to
//! creditors for want of memory, and a prompt's as it is computed.

use std::time::Duration;

use super::instance::Instance;
use super::lender::Placed;
use crate::schedule::batch::Spill;

impl Instance {
    /// Takes blocks in that have come home by plan, and asks for more.
    pub(super) fn bring_home(&mut self, now: Duration) {
        for (ticket, values) in self.debtor.take_landed() {
            let to = self.scheduler.landing(ticket);
            if let (Some(block), Some(values)) = (to, &values) {
                self.memory.fill(block, values);
            }
            self.scheduler.landed(ticket, values.is_some());
        }
        let mut fetches = Vec::new();
        self.scheduler.next_fetches(|creditor| self.debtor.landing_slots(creditor), &mut fetches);
        for fetch in fetches {
            if !self.debtor.fetch(fetch.ticket, fetch.creditor, (fetch.loan, fetch.epoch), fetch.block) {
                self.scheduler.landed(fetch.ticket, false);
            }
        }
        self.asks(now);
    }

    pub(super) fn move_blocks(&mut self, now: Duration) {
        let mut moves = Vec::new();
        self.scheduler.plan_moves(&mut moves);
        if !moves.is_empty() {
            self.write(now, &moves);
            self.settle_losses(now);
            self.scheduler.moved(&mut moves);
            self.place(&moves);
        }
        self.asks(now);
    }

    /// Writes rBlocks to creditors; their layers leave from `since` on.
    pub(super) fn write(&mut self, since: Duration, spills: &[Spill]) {
        self.figures.moves += spills.len() as u64;
        for spill in spills {
            let bytes = self.setup.cost.token_bytes * u64::from(spill.tokens);
            let values = self.memory.block(spill.local.index);
            self.debtor.write(since, spill.creditor, spill.block, values, bytes);
        }
    }

    /// What was written is told of with the next plan.
    pub(super) fn place(&mut self, spills: &[Spill]) {
        for spill in spills {
            let Spill { loan, block, position, tokens, .. } = *spill;
            self.debtor.place(spill.creditor, Placed { loan, block, position, tokens });
        }
    }
}
