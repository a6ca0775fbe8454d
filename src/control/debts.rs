//! The debtor's side: which asks are out, which loans are held, for which
//! request. A borrowing is all or nothing: what was granted before it fell
//! short is repaid.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::message::{BlockRange, Renewal};
use crate::kv::rblock::{BlockIndex, InstanceId, LoanId};

/// A loan that this instance holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loan {
    /// Who lent.
    pub creditor: InstanceId,
    /// Its id there.
    pub loan: LoanId,
    /// Epoch of the creditor's pool.
    pub epoch: u32,
    /// The request it is for.
    pub request: u64,
    /// The blocks, ascending.
    pub blocks: Vec<BlockIndex>,
}

/// An ask to be sent to a creditor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Names it.
    pub ticket: u64,
    /// Whom to ask.
    pub creditor: InstanceId,
    /// For which request.
    pub request: u64,
    /// How many blocks.
    pub blocks: u32,
    /// An answer later than this is as good as a refusal.
    pub until: Duration,
}

/// Why a borrowing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BorrowError {
    /// All creditors together cannot lend that much now.
    #[error("{wanted} rBlocks are needed and the cluster can lend {lendable} now")]
    Short {
        /// Blocks asked for.
        wanted: u32,
        /// Blocks that the creditors not yet asked, as far as known, can lend.
        lendable: u32,
    },
    /// The request has a borrowing under way: wait for its end.
    #[error("the request is already borrowing")]
    Busy,
    /// Repaid or cancelled before it was answered.
    #[error("cancelled")]
    Cancelled,
    /// This instance runs no model, so it has nothing to borrow for.
    #[error("this instance runs no model")]
    NoShape,
}

/// What became of a borrowing once an answer was taken in.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Answers are outstanding.
    Waiting,
    /// All is there.
    Done {
        /// For which request.
        request: u64,
        /// Whose blocks sum up to what was asked for.
        loans: Vec<Loan>,
    },
    /// It fell short: repay `repay`.
    Failed {
        /// For which request.
        request: u64,
        /// Why.
        error: BorrowError,
        /// Granted in vain.
        repay: Vec<Loan>,
    },
    /// The answer was to nothing outstanding; a grant among such must be
    /// repaid.
    Unknown,
}

#[derive(Default)]
struct Borrowing {
    wanted: u32,
    granted: Vec<(InstanceId, LoanId)>,
    outstanding: BTreeSet<u64>,
    refused: BTreeSet<InstanceId>,
}

impl Borrowing {
    /// Of `lendable`, those that have not refused.
    fn others(&self, lendable: &BTreeMap<InstanceId, u32>) -> BTreeMap<InstanceId, u32> {
        lendable.iter().filter(|(i, _)| !self.refused.contains(i)).map(|(i, n)| (*i, *n)).collect()
    }
}

/// Everything this instance owes or has asked for.
#[derive(Default)]
pub struct Debts {
    next_ticket: u64,
    tickets: BTreeMap<u64, Ask>,
    borrowings: BTreeMap<u64, Borrowing>,
    loans: BTreeMap<(InstanceId, LoanId), Loan>,
    /// Creditors on this instance's own host.
    pub(super) near: BTreeSet<InstanceId>,
}

impl Debts {
    /// Loans held, by creditor and id.
    pub fn loans(&self) -> impl Iterator<Item = &Loan> {
        self.loans.values()
    }

    /// Blocks borrowed.
    pub fn borrowed(&self) -> u32 {
        self.loans.values().map(|loan| loan.blocks.len() as u32).sum()
    }

    /// Blocks borrowed, by creditor.
    pub fn by_creditor(&self) -> BTreeMap<InstanceId, u32> {
        let mut owed = BTreeMap::new();
        self.loans.values().for_each(|loan| *owed.entry(loan.creditor).or_default() += loan.blocks.len() as u32);
        owed
    }

    /// Whose loans are held.
    pub fn creditors(&self) -> impl Iterator<Item = InstanceId> + '_ {
        let mut last = None;
        self.loans.keys().map(|(creditor, _)| *creditor).filter(move |c| last.replace(*c) != Some(*c))
    }

    /// Is any loan of `creditor` held?
    pub fn owes(&self, creditor: InstanceId) -> bool {
        self.loans.range((creditor, LoanId(0))..).next().is_some_and(|((c, _), _)| *c == creditor)
    }

    /// Loans to renew with `creditor`.
    pub fn renewals(&self, creditor: InstanceId) -> Vec<Renewal> {
        let range = (creditor, LoanId(0))..=(creditor, LoanId(u32::MAX));
        let renewal = |loan: &Loan| Renewal { loan: loan.loan, epoch: loan.epoch, blocks: loan.blocks.len() as u32 };
        self.loans.range(range).map(|(_, loan)| renewal(loan)).collect()
    }

    /// Asks that `creditor` has not answered.
    pub fn outstanding(&self, creditor: InstanceId) -> u32 {
        self.tickets.values().filter(|ask| ask.creditor == creditor).map(|ask| ask.blocks).sum()
    }

    /// An ask that `creditor` has not answered.
    pub fn asked(&self, creditor: InstanceId, ticket: u64) -> Option<&Ask> {
        self.tickets.get(&ticket).filter(|ask| ask.creditor == creditor)
    }

    /// Nothing held and nothing asked for.
    pub fn is_empty(&self) -> bool {
        self.loans.is_empty() && self.tickets.is_empty()
    }

    /// Begins to borrow `wanted` blocks for `request` from `lendable` (who can
    /// lend, how much), but not from those in `avoid`; returns the asks to send,
    /// to be answered by `until`.
    pub fn borrow(
        &mut self,
        until: Duration,
        request: u64,
        wanted: u32,
        lendable: &BTreeMap<InstanceId, u32>,
        avoid: &[InstanceId],
    ) -> Result<Vec<Ask>, BorrowError> {
        if self.borrowings.contains_key(&request) {
            return Err(BorrowError::Busy);
        }
        // Whoever is to be avoided is taken to have refused.
        let borrowing = Borrowing { wanted, refused: avoid.iter().copied().collect(), ..Borrowing::default() };
        let others = borrowing.others(lendable);
        let shares = choose(wanted, &others, &self.near).map_err(|lendable| BorrowError::Short { wanted, lendable })?;
        self.borrowings.insert(request, borrowing);
        Ok(self.ask(until, request, shares))
    }

    /// A creditor granted. [`Progress::Unknown`]: nobody waits for it (any
    /// more), repay it.
    pub fn granted(
        &mut self,
        creditor: InstanceId,
        ticket: u64,
        loan: LoanId,
        epoch: u32,
        ranges: &[BlockRange],
    ) -> Progress {
        let Some(ask) = self.answered(creditor, ticket) else { return Progress::Unknown };
        let mut blocks = Vec::with_capacity(ask.blocks as usize);
        let granted: u64 = ranges.iter().map(|r| u64::from(r.count)).sum();
        let key = (creditor, loan);
        // A grant of something else than was asked for, or of a loan that is
        // already held, is a creditor's error: as good as a refusal.
        if granted != u64::from(ask.blocks) || self.loans.contains_key(&key) {
            return self.refuse(ask.until, ask, &BTreeMap::new()).0;
        }
        ranges.iter().for_each(|r| blocks.extend(r.start..r.start + r.count));
        self.loans.insert(key, Loan { creditor, loan, epoch, request: ask.request, blocks });
        let Some(borrowing) = self.borrowings.get_mut(&ask.request) else { return Progress::Unknown };
        borrowing.granted.push(key);
        if !borrowing.outstanding.is_empty() {
            return Progress::Waiting;
        }
        let granted = self.borrowings.remove(&ask.request).map(|b| b.granted).unwrap_or_default();
        let loans = granted.iter().filter_map(|key| self.loans.get(key).cloned()).collect();
        Progress::Done { request: ask.request, loans }
    }

    /// A creditor refused, or did not answer: the rest is asked of the others
    /// in `lendable`, less those that refused before.
    pub fn refused(
        &mut self,
        until: Duration,
        creditor: InstanceId,
        ticket: u64,
        lendable: &BTreeMap<InstanceId, u32>,
    ) -> (Progress, Vec<Ask>) {
        match self.answered(creditor, ticket) {
            Some(ask) => self.refuse(until, ask, lendable),
            None => (Progress::Unknown, Vec::new()),
        }
    }

    /// Ends a borrowing that is under way; its loans are to be repaid. `None`:
    /// there is none.
    pub fn cancel(&mut self, request: u64) -> Option<Vec<Loan>> {
        let borrowing = self.borrowings.remove(&request)?;
        borrowing.outstanding.iter().for_each(|ticket| {
            self.tickets.remove(ticket);
        });
        Some(borrowing.granted.iter().filter_map(|key| self.loans.remove(key)).collect())
    }

    /// Gives up the loans of `request`, to be repaid.
    pub fn repay_request(&mut self, request: u64) -> Vec<Loan> {
        self.remove_where(|loan| loan.request == request)
    }

    /// Gives up one loan, to be repaid.
    pub fn repay_loan(&mut self, creditor: InstanceId, loan: LoanId) -> Option<Loan> {
        self.loans.remove(&(creditor, loan))
    }

    /// Gives up all but the first `keep` blocks of a loan. False: no such loan,
    /// or nothing to give up.
    pub fn shrink(&mut self, creditor: InstanceId, loan: LoanId, keep: u32) -> bool {
        match self.loans.get_mut(&(creditor, loan)) {
            Some(held) if (1..held.blocks.len()).contains(&(keep as usize)) => {
                held.blocks.truncate(keep as usize);
                true
            }
            _ => false,
        }
    }

    /// The creditor says that this loan is gone.
    pub fn lapsed(&mut self, creditor: InstanceId, loan: LoanId, epoch: u32) -> Option<Loan> {
        let key = (creditor, loan);
        if self.loans.get(&key)?.epoch != epoch {
            return None;
        }
        self.loans.remove(&key)
    }

    /// A creditor is gone: its loans, and the tickets it will not answer.
    pub fn creditor_lost(&mut self, creditor: InstanceId) -> (Vec<Loan>, Vec<u64>) {
        let lost = self.remove_where(|loan| loan.creditor == creditor);
        (lost, self.tickets.values().filter(|ask| ask.creditor == creditor).map(|ask| ask.ticket).collect())
    }

    /// Is this loan held?
    pub fn holds(&self, creditor: InstanceId, loan: LoanId) -> bool {
        self.loans.contains_key(&(creditor, loan))
    }

    /// Was `loan`, which has just been lost, part of a borrowing that is still
    /// under way? The borrowing cannot succeed then: cancel it.
    pub fn was_for_borrowing(&self, loan: &Loan) -> bool {
        let key = (loan.creditor, loan.loan);
        self.borrowings.get(&loan.request).is_some_and(|b| b.granted.contains(&key))
    }

    /// Blocks that the borrowing of `request`, which is under way, is for.
    pub fn wanted(&self, request: u64) -> Option<u32> {
        self.borrowings.get(&request).map(|b| b.wanted)
    }

    /// Asks whose answer is overdue.
    pub fn overdue(&self, now: Duration) -> Vec<Ask> {
        self.tickets.values().filter(|ask| ask.until <= now).copied().collect()
    }

    /// When the next answer will be overdue.
    pub fn next_overdue(&self) -> Option<Duration> {
        self.tickets.values().map(|ask| ask.until).min()
    }

    fn answered(&mut self, creditor: InstanceId, ticket: u64) -> Option<Ask> {
        let ask = *self.tickets.get(&ticket).filter(|ask| ask.creditor == creditor)?;
        self.tickets.remove(&ticket);
        if let Some(borrowing) = self.borrowings.get_mut(&ask.request) {
            borrowing.outstanding.remove(&ticket);
        }
        Some(ask)
    }

    fn refuse(&mut self, until: Duration, ask: Ask, lendable: &BTreeMap<InstanceId, u32>) -> (Progress, Vec<Ask>) {
        let Some(borrowing) = self.borrowings.get_mut(&ask.request) else {
            return (Progress::Unknown, Vec::new());
        };
        borrowing.refused.insert(ask.creditor);
        let others = borrowing.others(lendable);
        match choose(ask.blocks, &others, &self.near) {
            Ok(shares) => (Progress::Waiting, self.ask(until, ask.request, shares)),
            Err(lendable) => {
                let wanted = borrowing.wanted;
                let repay = self.cancel(ask.request).unwrap_or_default();
                let error = BorrowError::Short { wanted, lendable };
                (Progress::Failed { request: ask.request, error, repay }, Vec::new())
            }
        }
    }

    fn ask(&mut self, until: Duration, request: u64, shares: Vec<(InstanceId, u32)>) -> Vec<Ask> {
        let mut asks = Vec::with_capacity(shares.len());
        for (creditor, blocks) in shares {
            self.next_ticket += 1;
            let ask = Ask { ticket: self.next_ticket, creditor, request, blocks, until };
            self.tickets.insert(ask.ticket, ask);
            if let Some(borrowing) = self.borrowings.get_mut(&request) {
                borrowing.outstanding.insert(ask.ticket);
            }
            asks.push(ask);
        }
        asks
    }

    fn remove_where(&mut self, which: impl Fn(&Loan) -> bool) -> Vec<Loan> {
        let keys: Vec<_> = self.loans.iter().filter(|(_, loan)| which(loan)).map(|(key, _)| *key).collect();
        keys.iter().filter_map(|key| self.loans.remove(key)).collect()
    }
}

/// Least rBlocks of a loan's part, where a loan that one creditor could give
/// alone is taken from several. Every row's query goes to each of them, so a
/// part must be worth more attention than its query takes on the wire.
const MIN_PART: u32 = 512;

/// Whom to ask for how much. Those in `near`, on the same host, come first, and
/// a large loan is taken from several of them, from each by what it has free: so
/// they attend to it at the same time, and none is emptied for the others' sake.
/// Of those further off, to whom queries are dear, as few as will do: the freest.
/// `Err`: what all can lend together.
pub fn choose(
    wanted: u32,
    lendable: &BTreeMap<InstanceId, u32>,
    near: &BTreeSet<InstanceId>,
) -> Result<Vec<(InstanceId, u32)>, u32> {
    let mut creditors: Vec<_> = lendable.iter().map(|(i, n)| (*i, *n)).filter(|(_, n)| *n > 0).collect();
    creditors.sort_by_key(|(instance, blocks)| (!near.contains(instance), std::cmp::Reverse(*blocks), *instance));
    let near = creditors.iter().filter(|(instance, _)| near.contains(instance));
    let together: Vec<_> = near.take((wanted / MIN_PART) as usize).map(|(_, blocks)| u64::from(*blocks)).collect();
    let mut free: u64 = together.iter().sum();
    let mut shared = u64::from(wanted).min(free);
    let mut left = wanted;
    let mut shares = Vec::new();
    for (index, (instance, blocks)) in creditors.into_iter().enumerate() {
        let share = match together.get(index) {
            // Never more than it has, as `shared` is never more than `free`.
            Some(its) => {
                let share = (shared * its).div_ceil(free);
                (shared, free) = (shared - share, free - its);
                share as u32
            }
            None => blocks.min(left),
        };
        if share > 0 {
            shares.push((instance, share));
        }
        left -= share;
    }
    if left == 0 { Ok(shares) } else { Err(wanted - left) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_to_be_avoided_is_asked_neither_first_nor_when_another_refuses() {
        let lendable: BTreeMap<_, _> = [(1, 50), (2, 20), (3, 10)].map(|(i, n)| (InstanceId(i), n)).into();
        let (until, mut debts) = (Duration::from_secs(1), Debts::default());
        let asks = debts.borrow(until, 7, 15, &lendable, &[InstanceId(1)]).unwrap();
        assert_eq!(asks.iter().map(|a| (a.creditor.0, a.blocks)).collect::<Vec<_>>(), [(2, 15)]);
        let (progress, asks) = debts.refused(until, InstanceId(2), asks[0].ticket, &lendable);
        let error = BorrowError::Short { wanted: 15, lendable: 10 };
        assert_eq!(progress, Progress::Failed { request: 7, error, repay: Vec::new() });
        assert!(asks.is_empty());
        // None of the borrowing is left: the next one may ask anybody.
        let asks = debts.borrow(until, 7, 15, &lendable, &[]).unwrap();
        assert_eq!(asks[0].creditor, InstanceId(1));
        let short = BorrowError::Short { wanted: 31, lendable: 30 };
        assert_eq!(debts.borrow(until, 8, 31, &lendable, &[InstanceId(1)]), Err(short));
    }

    #[test]
    fn a_large_loan_is_spread_over_those_nearby_and_a_small_one_is_not() {
        let lendable: BTreeMap<_, _> =
            [(1, 9000), (2, 2000), (3, 4000), (4, 8000)].map(|(i, n)| (InstanceId(i), n)).into();
        let near: BTreeSet<_> = [2, 3, 4].map(InstanceId).into();
        let choose = |wanted| choose(wanted, &lendable, &near).map(|s| s.iter().map(|(i, n)| (i.0, *n)).collect());
        assert_eq!(choose(300), Ok(vec![(4, 300)]));
        assert_eq!(choose(7000), Ok(vec![(4, 4000), (3, 2000), (2, 1000)]));
        assert_eq!(choose(14_100), Ok(vec![(4, 8000), (3, 4000), (2, 2000), (1, 100)]));
        assert_eq!(choose(30_000), Err(23_000));
    }
}
