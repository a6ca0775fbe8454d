//! Planned moves of running sequences' KV (the gManager's plan, carried out):
//! to a creditor, home, or from one creditor to another by way of home (as many
//! leave for the one as come from the other; which they are does not matter).
//!
//! A few rBlocks a step go, at the [`Pace`]; a sequence never stops for it. What
//! leaves rides on a step as a prompt's blocks do: written while the layers are
//! computed, attended to here until the step is over. What comes home is asked
//! for between two steps and placed between two later ones. A loan is taken
//! back from its end, so that what is left of it is always its beginning, and
//! the creditor is told how much that is.

use super::batch::Batch;
use super::pace::Pace;
use super::scheduler::{Ask, Scheduler};
use super::sequence::{Phase, SeqId, Sequence};
use crate::kv::block_table::Placement;
use crate::kv::entry::{BlockRef, Owner};
use crate::kv::moves::{Errand, Held};
use crate::kv::rblock::{BlockIndex, InstanceId, LoanId};

/// rBlocks that may leave for one creditor before as many have come from another.
const AHEAD: usize = 4;

/// An rBlock on its way home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Names it.
    pub ticket: u64,
    /// Whose it is.
    pub seq: SeqId,
    /// From whom.
    pub creditor: InstanceId,
    /// Under which loan it lies there.
    pub loan: LoanId,
    /// The loan's epoch.
    pub epoch: u32,
    /// Block in the creditor's pool.
    pub block: BlockIndex,
    /// The local block that waits for it.
    pub local: BlockRef,
    /// Its index in the sequence's block table.
    index: usize,
}

/// An errand, and how far it is.
struct Progress {
    errand: Errand,
    asked_for: usize,
    came: usize,
    left: usize,
}

/// What the scheduler knows of planned moves.
pub(super) struct Errands {
    under_way: Vec<Progress>,
    fetches: Vec<Fetch>,
    next_ticket: u64,
    pace: Pace,
    /// rBlocks that planned moves took to creditors, and home.
    sent: u64,
    fetched: u64,
}

impl Errands {
    pub(super) fn new(most_blocks: usize) -> Self {
        let pace = Pace::new(most_blocks);
        Self { under_way: Vec::new(), fetches: Vec::new(), next_ticket: 1, pace, sent: 0, fetched: 0 }
    }

    /// The errand that a fetch was for, if the plan is still that one.
    fn progress(&mut self, fetch: &Fetch, change: impl FnOnce(&mut Progress)) {
        let of = |at: &&mut Progress| at.errand.request == fetch.seq && at.errand.from == Some(fetch.creditor);
        if let Some(at) = self.under_way.iter_mut().find(of) {
            change(at);
        }
    }
}

impl Scheduler {
    /// What each admitted sequence holds.
    pub fn holdings(&self) -> Vec<Held> {
        let held = |s: &Sequence| {
            let complete = s.computed / s.table.block_tokens() as usize;
            let local = if s.settled() { s.table.local().min(complete.saturating_sub(s.table.remote())) } else { 0 };
            let remote = s.table.creditors().iter().filter(|(_, n)| *n > 0).map(|(c, n)| (*c, *n as u32)).collect();
            Held { request: s.id, tokens: s.computed as u32, local: local as u32, remote }
        };
        self.admitted.iter().map(held).collect()
    }

    /// rBlocks that each waiting sequence needs, first come first.
    pub fn queue_needs(&self) -> Vec<u32> {
        self.waiting.iter().map(|s| self.pool.shape().blocks_for(s.tokens.len() + 1) as u32).collect()
    }

    /// The plan is now this one; what is on its way already arrives.
    pub fn direct(&mut self, errands: impl IntoIterator<Item = Errand>) {
        let fetches = &self.errands.fetches;
        let progress = |errand: Errand| {
            let coming = |f: &&Fetch| f.seq == errand.request && Some(f.creditor) == errand.from;
            Progress { errand, asked_for: fetches.iter().filter(coming).count(), came: 0, left: 0 }
        };
        self.errands.under_way = errands.into_iter().filter(|e| e.from != e.to).map(progress).collect();
    }

    /// A creditor leaves: what it holds ready for sequences that decode, and they
    /// do not use, goes back at once. (A prompt under way counts on it still.)
    pub fn creditor_leaves(&mut self, creditor: InstanceId) {
        let mut empty = Vec::new();
        for s in self.admitted.iter_mut().filter(|s| s.settled()) {
            while let Some(at) = s.loans.iter().position(|l| l.creditor == creditor && l.assigned == 0) {
                empty.push(s.loans.remove(at));
            }
            for held in s.loans.iter_mut().filter(|l| l.creditor == creditor && l.assigned < l.blocks.len()) {
                held.truncate(held.assigned, &mut self.asks);
            }
        }
        empty.into_iter().for_each(|loan| self.repay(loan));
    }

    /// rBlocks that planned moves took to creditors and home so far.
    pub fn planned_moves(&self) -> (u64, u64) {
        (self.errands.sent, self.errands.fetched)
    }

    /// A step with planned moves took `took_ns`; without them `expected_ns`.
    pub fn moves_took(&mut self, took_ns: f64, expected_ns: f64) {
        self.errands.pace.observe(took_ns, expected_ns);
    }

    // ---- to creditors -----------------------------------------------------------

    /// Adds rBlocks to `batch` that leave by plan, and asks for loans where there
    /// is none to move them to.
    pub(super) fn send_planned(&mut self, batch: &mut Batch) {
        if self.errands.under_way.is_empty() {
            return;
        }
        let mut budget = self.errands.pace.begin_step();
        let mut asks = Vec::new();
        for at in &mut self.errands.under_way {
            let Errand { request: seq, blocks, from, to: Some(to) } = at.errand else { continue };
            let blocks = blocks as usize;
            let Some(s) = self.admitted.iter_mut().find(|s| s.id == seq) else { continue };
            let rest = blocks.saturating_sub(at.left);
            // On the way from one creditor to another blocks leave before others come:
            // they make the room for them here.
            let due = if from.is_some() { rest.min((at.came + AHEAD).saturating_sub(at.left)) } else { rest };
            let room: usize = s.loans.iter().filter(|l| l.creditor == to).map(|l| l.blocks.len() - l.assigned).sum();
            if room < rest && s.settled() && !s.borrowing {
                s.planned = true;
                (s.borrowing, s.asked) = (true, rest - room);
                let ask = Ask::Borrow { seq, blocks: s.asked, apart_from: Vec::new(), only: Some(to) };
                asks.push(ask);
            }
            if !batch.items.iter().any(|item| item.seq == seq && item.rows.len() == 1 && !item.again) {
                continue;
            }
            let complete = (s.computed / s.table.block_tokens() as usize).min(s.table.len());
            let taken: Vec<usize> = batch.spills.iter().filter(|sp| sp.seq == seq).map(|sp| sp.index).collect();
            let mut n = due.min(room).min(budget);
            // From the end: what others share is at the beginning.
            for index in (0..complete).rev() {
                if n == 0 {
                    break;
                }
                if let Placement::Local(local) = s.table.blocks()[index]
                    && s.is_complete(index)
                    && !taken.contains(&index)
                    && let Some(ways) = s.spill_to(Some(to), index, local)
                {
                    batch.spills.extend(ways.into_iter().flatten());
                    (n, budget) = (n - 1, budget - 1);
                    at.left += 1;
                    self.errands.sent += 1;
                    self.errands.pace.spend(1);
                }
            }
        }
        self.asks.extend(asks);
    }

    /// The loan that a plan asked for was refused: the plan is given up for this
    /// sequence. The next one knows better.
    pub(super) fn plan_refused(&mut self, index: usize) {
        let s = &mut self.admitted[index];
        (s.borrowing, s.planned) = (false, false);
        let seq = s.id;
        self.errands.under_way.retain(|at| at.errand.request != seq || at.errand.to.is_none());
    }

    // ---- home -------------------------------------------------------------------

    /// Chooses rBlocks to be asked for now; `slots` says how many more a creditor
    /// can be asked for. The caller asks, then says how each ended: see
    /// [`landing`](Self::landing).
    pub fn next_fetches(&mut self, mut slots: impl FnMut(InstanceId) -> usize, out: &mut Vec<Fetch>) {
        out.clear();
        if self.errands.under_way.iter().all(|at| at.errand.from.is_none()) {
            return;
        }
        let mut budget = self.errands.pace.left().max(usize::from(self.errands.fetches.is_empty()));
        let low_water = self.admitted.len().max(2);
        // What a sequence that decodes was promised for its prompt is done with.
        let promised: usize = self.admitted.iter().filter(|s| !s.settled()).map(Sequence::promised).sum();
        let kept = promised + low_water;
        let mut room = self.obtainable_up_to(kept + budget).saturating_sub(kept);
        let mut under_way = std::mem::take(&mut self.errands.under_way);
        for at in &mut under_way {
            let Errand { request: seq, blocks, from: Some(creditor), .. } = at.errand else { continue };
            let mut free = slots(creditor).saturating_sub(out.iter().filter(|f| f.creditor == creditor).count());
            while at.asked_for < blocks as usize && budget > 0 && room > 0 && free > 0 {
                let Some(fetch) = self.begin_fetch(seq, creditor) else { break };
                out.push(fetch);
                at.asked_for += 1;
                (budget, room, free) = (budget - 1, room - 1, free - 1);
                self.errands.pace.spend(1);
            }
        }
        self.errands.under_way = under_way;
    }

    /// The last rBlock that `creditor` holds of `seq` and that is not under way.
    fn begin_fetch(&mut self, seq: SeqId, creditor: InstanceId) -> Option<Fetch> {
        let s = self.admitted.iter_mut().find(|s| s.id == seq && s.settled())?;
        let fetches = &self.errands.fetches;
        let under_way = |loan: LoanId| fetches.iter().filter(|f| f.creditor == creditor && f.loan == loan).count();
        let held = s.loans.iter_mut().rev().find(|l| l.creditor == creditor && l.placed > under_way(l.loan))?;
        let index = held.placed - 1 - under_way(held.loan);
        let (loan, epoch, block) = (held.loan, held.epoch, held.blocks[index]);
        // Nothing more goes under a loan that is being emptied.
        if held.blocks.len() > held.placed {
            held.truncate(held.placed, &mut self.asks);
        }
        let at = Placement::Remote { creditor, loan, block };
        let index = s.table.blocks().iter().position(|placement| *placement == at)?;
        let table = self.pool.table();
        if table.counts().free == 0 {
            self.prefix.lock().unwrap_or_else(std::sync::PoisonError::into_inner).evict(table, 1);
        }
        let local = table.alloc(Owner::Sequence(seq as u32))?;
        let ticket = self.errands.next_ticket;
        self.errands.next_ticket += 1;
        let fetch = Fetch { ticket, seq, creditor, loan, epoch, block, local, index };
        self.errands.fetches.push(fetch);
        Some(fetch)
    }

    /// Where the rBlock of a ticket is to be copied to, now that it has come.
    /// `None`: nobody waits for it any more. Then tell
    /// [`landed`](Self::landed).
    pub fn landing(&self, ticket: u64) -> Option<BlockIndex> {
        let fetch = self.errands.fetches.iter().find(|f| f.ticket == ticket)?;
        self.fetch_fits(fetch).then_some(fetch.local.index)
    }

    /// Is it the last of its loan still?
    fn fetch_fits(&self, fetch: &Fetch) -> bool {
        self.get(fetch.seq).is_some_and(|s| {
            let held = s.loans.iter().find(|l| l.is(fetch.creditor, Some(fetch.loan)));
            held.is_some_and(|l| l.placed == l.assigned && l.blocks[..l.placed].last() == Some(&fetch.block))
        })
    }

    /// The rBlock of a ticket lies in its local block: from now on it is attended
    /// to here. Or, not `here`: it will not come.
    pub fn landed(&mut self, ticket: u64, here: bool) {
        let Some(at) = self.errands.fetches.iter().position(|f| f.ticket == ticket) else { return };
        let fits = here && self.fetch_fits(&self.errands.fetches[at]);
        let fetch = self.errands.fetches.remove(at);
        let s = self.admitted.iter_mut().find(|s| s.id == fetch.seq);
        let Some(s) = s.filter(|_| fits) else {
            self.release(fetch.local);
            // Not asked for again before the next plan.
            self.errands.progress(&fetch, |at| at.asked_for = at.errand.blocks as usize);
            return;
        };
        s.table.replace(fetch.index, Placement::Local(fetch.local));
        s.local_goal = s.local_goal.max(s.table.local());
        if let Some(position) = s.loans.iter().position(|l| l.is(fetch.creditor, Some(fetch.loan))) {
            let held = &mut s.loans[position];
            held.placed -= 1;
            held.assigned = held.placed;
            if held.placed == 0 {
                let empty = s.loans.remove(position);
                self.repay(empty);
            } else {
                held.truncate(held.placed, &mut self.asks);
            }
        }
        self.errands.progress(&fetch, |at| at.came += 1);
        self.errands.fetched += 1;
    }

    /// rBlocks on their way home.
    pub fn fetches(&self) -> &[Fetch] {
        &self.errands.fetches
    }

    /// Nobody waits any more for those that `over` says.
    pub(super) fn drop_fetches(&mut self, over: impl Fn(&Fetch) -> bool) {
        let (dropped, kept) = std::mem::take(&mut self.errands.fetches).into_iter().partition(|f| over(f));
        self.errands.fetches = kept;
        let dropped: Vec<Fetch> = dropped;
        dropped.into_iter().for_each(|fetch| self.release(fetch.local));
    }

    fn release(&self, block: BlockRef) {
        let released = self.pool.table().release(block);
        debug_assert!(released.is_ok(), "a block that waits for KV is held: {released:?}");
    }
}

impl Sequence {
    /// Decodes, with all its KV: its blocks may move.
    fn settled(&self) -> bool {
        self.phase == Phase::Running && self.remaining() == 1 && self.gaps.is_empty() && !self.short
    }
}
