//! The controller as debtor: asks creditors, takes their answers in, gives
//! loans back, and tells the engine.

use std::collections::BTreeMap;
use std::time::Duration;

use super::controller::Controller;
use super::debts::{Ask, BorrowError, Loan, Progress};
use super::event::Output;
use super::message::Message;
use super::row::TierRow;
use crate::kv::rblock::{InstanceId, LoanId};

impl Controller {
    /// Corrects the row of a creditor by what it has just answered, until its
    /// next row comes.
    pub(super) fn correct(&mut self, creditor: InstanceId, change: impl FnOnce(&mut TierRow)) {
        let row = self.gossip.ledger_mut().get_mut(creditor);
        if let Some(tier) = row.and_then(|row| row.tiers.first_mut()) {
            change(tier);
        }
    }

    /// Who can lend this instance how much, as far as known.
    fn lendable(&self) -> BTreeMap<InstanceId, u32> {
        let Some(shape) = self.config.shape else { return BTreeMap::new() };
        let lendable = self.announced.keys().filter_map(|instance| {
            let asked = self.debts.outstanding(*instance);
            let row = self.gossip.ledger().get(*instance)?;
            Some((*instance, row.lendable(&shape).saturating_sub(asked)))
        });
        lendable.collect()
    }

    pub(super) fn borrow(
        &mut self,
        now: Duration,
        request: u64,
        blocks: u32,
        avoid: &[InstanceId],
        only: Option<InstanceId>,
    ) {
        if blocks == 0 {
            return self.outputs.push_back(Output::Granted { request, loans: Vec::new() });
        }
        let asks = match self.config.shape {
            None => Err(BorrowError::NoShape),
            Some(_) => {
                let others = self.announced.keys().filter(|creditor| only.is_some_and(|only| only != **creditor));
                let avoid: Vec<_> = avoid.iter().chain(others).copied().collect();
                self.debts.borrow(now + self.config.ask_timeout, request, blocks, &self.lendable(), &avoid)
            }
        };
        match asks {
            Ok(asks) => self.ask(now, &asks),
            Err(reason) => self.outputs.push_back(Output::Refused { request, reason }),
        }
    }

    fn ask(&mut self, now: Duration, asks: &[Ask]) {
        let Some(shape) = self.config.shape else { return };
        for ask in asks {
            let (ticket, request, blocks) = (ask.ticket, ask.request, ask.blocks);
            self.send_to(now, ask.creditor, &Message::TryMoveKvCache { ticket, request, blocks, shape });
        }
    }

    pub(super) fn refused(&mut self, now: Duration, creditor: InstanceId, ticket: u64) {
        let lendable = self.lendable();
        let (progress, asks) = self.debts.refused(now + self.config.ask_timeout, creditor, ticket, &lendable);
        self.ask(now, &asks);
        self.progress(now, progress);
    }

    pub(super) fn progress(&mut self, now: Duration, progress: Progress) {
        match progress {
            Progress::Waiting | Progress::Unknown => {}
            Progress::Done { request, loans } => self.outputs.push_back(Output::Granted { request, loans }),
            Progress::Failed { request, error, repay } => {
                repay.into_iter().for_each(|loan| self.repay(now, loan));
                self.outputs.push_back(Output::Refused { request, reason: error });
            }
        }
    }

    pub(super) fn repay_request(&mut self, now: Duration, request: u64) {
        if let Some(loans) = self.debts.cancel(request) {
            loans.into_iter().for_each(|loan| self.repay(now, loan));
            self.outputs.push_back(Output::Refused { request, reason: BorrowError::Cancelled });
        }
        let loans = self.debts.repay_request(request);
        loans.into_iter().for_each(|loan| self.repay(now, loan));
    }

    /// Tells the creditor of a loan that is no longer held. Should that not
    /// reach it, the lease ends the loan.
    pub(super) fn repay(&mut self, now: Duration, loan: Loan) {
        let blocks = loan.blocks.len() as u32;
        self.correct(loan.creditor, |tier| {
            tier.free = tier.free.saturating_add(blocks).min(tier.total);
            tier.lent = tier.lent.saturating_sub(blocks);
        });
        self.send_to(now, loan.creditor, &Message::Repay { loan: loan.loan, epoch: loan.epoch });
    }

    /// Tells the creditor how much of a loan is needed still. The next heartbeat
    /// says so again.
    pub(super) fn shrink(&mut self, now: Duration, creditor: InstanceId, loan: LoanId, keep: u32) {
        if self.debts.shrink(creditor, loan, keep) {
            // With all the others: its answer counts as a renewal of every loan.
            self.beat(now, creditor);
        }
    }

    /// Loans are gone. Those of a borrowing under way were never told of: the
    /// borrowing fails.
    pub(super) fn lost(&mut self, now: Duration, loans: Vec<Loan>) {
        self.stats.lost += loans.len() as u64;
        let (unfinished, told): (Vec<_>, Vec<_>) = loans.into_iter().partition(|l| self.debts.was_for_borrowing(l));
        for loan in unfinished {
            let request = loan.request;
            let wanted = self.debts.wanted(request).unwrap_or(0);
            if let Some(rest) = self.debts.cancel(request) {
                rest.into_iter().for_each(|loan| self.repay(now, loan));
                let reason = BorrowError::Short { wanted, lendable: 0 };
                self.outputs.push_back(Output::Refused { request, reason });
            }
        }
        if !told.is_empty() {
            self.outputs.push_back(Output::LoansLost { loans: told });
        }
    }
}
