//! The creditor's side of the data path: takes KV and plans from debtors,
//! checks them as `attention/creditor.rs` does, answers with partials.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::cost::CostModel;
use super::instance::place;
use super::network::Slot;
use super::toy::{Memory, Partial, mix};
use crate::control::rmanager::{LentPool, LoanRecord};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{BlockIndex, InstanceId, KvRun, LoanId};

/// What travels on a lane.
#[derive(Clone, Debug)]
pub enum LaneMessage {
    /// Debtor → creditor, first: who borrows.
    Hello(InstanceId),
    /// Creditor → debtor: the lane is open.
    Accept,
    /// Debtor → creditor: bytes into a lent block.
    Write {
        /// Which.
        block: BlockIndex,
        /// Its tokens' KV.
        values: Vec<u64>,
    },
    /// Debtor → creditor: what a step attends to.
    Plan(Plan),
    /// Creditor → debtor: the partials of a step, one an entry.
    Answer {
        /// Which step.
        step: u64,
        /// By entry.
        partials: Vec<Partial>,
    },
    /// Debtor → creditor: a block is to come home.
    Fetch {
        /// Names it.
        ticket: u64,
        /// Under which loan it lies, and the loan's epoch.
        loan: (LoanId, u32),
        /// Which block.
        block: BlockIndex,
    },
    /// Creditor → debtor: the block of a ticket, or that it will not come.
    Landed {
        /// Names it.
        ticket: u64,
        /// Its tokens' KV.
        values: Option<Vec<u64>>,
    },
    /// Creditor → debtor: no answer will come.
    StepRefused {
        /// Which step.
        step: u64,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for LaneMessage {
    /// One line that differs where the messages do.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fold = |values: &[u64]| values.iter().fold(0, |all, value| mix(all, *value));
        match self {
            Self::Write { block, values } => write!(f, "write {block} {:x}", fold(values)),
            Self::Landed { ticket, values: Some(values) } => write!(f, "landed {ticket} {:x}", fold(values)),
            Self::Answer { step, partials } => {
                let sums = partials.iter().fold(0, |all, partial| mix(all, partial.before));
                write!(f, "answer {step} {sums:x}")
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// A step's plan.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The debtor's step; rises.
    pub step: u64,
    /// Blocks that are complete now.
    pub placements: Vec<Placed>,
    /// Sequences with keys here.
    pub entries: Vec<Entry>,
}

impl Plan {
    /// Query rows.
    pub fn rows(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.end - entry.start)).sum()
    }
}

/// A block that lies here now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Under which loan.
    pub loan: LoanId,
    /// Which block.
    pub block: BlockIndex,
    /// Position of its first token.
    pub position: u32,
    /// Tokens.
    pub tokens: u32,
}

/// A sequence's rows in a plan.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Position of the first row.
    pub start: u32,
    /// Position after the last.
    pub end: u32,
    /// Loan, epoch, blocks placed under it.
    pub loans: Vec<(LoanId, u32, usize)>,
}

/// Bugs that the checker must find. Only tests plant them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sabotage {
    /// None.
    #[default]
    None,
    /// Blocks are granted and not reserved.
    Reservation,
    /// Queries are answered over loans that have ended, writes let into blocks
    /// that are somebody else's, and a debtor does not hear that its loan lapsed.
    Lease,
    /// A restarted creditor answers for its former life: a debtor goes on with
    /// whoever is at its creditor's address, and neither of them looks at the
    /// loan's epoch.
    Epoch,
    /// Rows are merged without regard to their stamps: an older one takes the
    /// place of a newer one, as the newest.
    Merge,
    /// A debtor whose wait is over merges what its mailbox holds: another
    /// step's partial.
    LatePartial,
}

/// One debtor's lane.
#[derive(Default)]
struct Lane {
    debtor: Option<InstanceId>,
    placed: BTreeMap<LoanId, Vec<KvRun>>,
    /// Last step planned, and what of it is still to be answered.
    step: u64,
    pending: Option<(Plan, Vec<Vec<KvRun>>)>,
}

/// What comes of a message.
#[derive(Debug)]
pub enum Verdict {
    /// Nothing to say.
    Fine,
    /// Send this.
    Reply(LaneMessage),
    /// Call [`Lender::answer`] later.
    Later {
        /// Once the device has had so many nanoseconds for it,
        busy: u64,
        /// and so many have passed on the wire.
        exchanges: u64,
    },
    /// The lane is over.
    Expel(&'static str),
}

/// One instance as creditor.
pub struct Lender {
    slot: Slot,
    book: Arc<LentPool>,
    pool: Arc<KvPool>,
    cost: CostModel,
    sabotage: Sabotage,
    lanes: BTreeMap<u64, Lane>,
    /// Queries answered.
    pub answered: u64,
    /// Plans and queries refused.
    pub refused: u64,
}

impl Lender {
    /// A lender over what `book` says is lent of `pool`.
    pub fn new(slot: Slot, book: Arc<LentPool>, pool: Arc<KvPool>, cost: CostModel, sabotage: Sabotage) -> Self {
        Self { slot, book, pool, cost, sabotage, lanes: BTreeMap::new(), answered: 0, refused: 0 }
    }

    /// A debtor connected.
    pub fn accepted(&mut self, conn: u64) {
        self.lanes.insert(conn, Lane::default());
    }

    /// Is this one of its lanes?
    pub fn has(&self, conn: u64) -> bool {
        self.lanes.contains_key(&conn)
    }

    /// A lane is gone.
    pub fn closed(&mut self, conn: u64) {
        self.lanes.remove(&conn);
    }

    /// A message from a debtor.
    pub fn message(&mut self, memory: &mut Memory, conn: u64, message: LaneMessage) -> Verdict {
        let Some(lane) = self.lanes.get_mut(&conn) else { return Verdict::Fine };
        match (lane.debtor, message) {
            (None, LaneMessage::Hello(debtor)) => {
                lane.debtor = Some(debtor);
                Verdict::Reply(LaneMessage::Accept)
            }
            (Some(debtor), LaneMessage::Write { block, values }) => {
                let loan = self.pool.table().entry(block).and_then(|entry| entry.loan());
                let may = loan.is_some_and(|loan| {
                    self.pool.table().may_write(block, loan) && self.book.loan(loan).is_some_and(|r| r.debtor == debtor)
                });
                if may || matches!(self.sabotage, Sabotage::Lease) {
                    memory.fill(block, &values);
                    Verdict::Fine
                } else {
                    self.refused += 1;
                    Verdict::Expel("a write into a block that is not its")
                }
            }
            (Some(debtor), LaneMessage::Plan(plan)) => self.plan(conn, debtor, plan),
            (Some(debtor), LaneMessage::Fetch { ticket, loan: (loan, epoch), block }) => {
                let checks = Checks { book: &self.book, pool: &self.pool, debtor, sabotage: self.sabotage };
                let fits = checks.in_force(loan, Some(epoch)).is_ok() && self.pool.table().visible(block, loan);
                self.refused += u64::from(!fits);
                Verdict::Reply(LaneMessage::Landed { ticket, values: fits.then(|| memory.block(block)) })
            }
            _ => Verdict::Expel("a message out of place"),
        }
    }

    fn plan(&mut self, conn: u64, debtor: InstanceId, plan: Plan) -> Verdict {
        let Some(lane) = self.lanes.get_mut(&conn) else { return Verdict::Fine };
        let step = plan.step;
        let checks = Checks { book: &self.book, pool: &self.pool, debtor, sabotage: self.sabotage };
        match lane.take(&checks, &plan) {
            Err(reason) => {
                self.refused += 1;
                lane.pending = None;
                Verdict::Reply(LaneMessage::StepRefused { step, reason })
            }
            Ok(_) if plan.entries.is_empty() => Verdict::Fine,
            Ok(runs) => {
                let keys = |runs: &[KvRun]| runs.iter().map(|run| u64::from(run.tokens)).sum();
                let times = plan.entries.iter().zip(&runs);
                let busy: f64 =
                    times.map(|(e, runs)| self.cost.attention_ns((e.end - e.start) as usize, keys(runs))).sum();
                let exchanges = self.cost.exchanges_ns(self.cost.host(self.slot) == self.cost.host(place(debtor)));
                lane.pending = Some((plan, runs));
                Verdict::Later { busy: busy as u64, exchanges: exchanges as u64 }
            }
        }
    }

    /// The attention is done: the partials, unless a loan ended meanwhile, and
    /// the bytes of the answer.
    pub fn answer(&mut self, memory: &Memory, conn: u64) -> Option<(LaneMessage, u64)> {
        let lane = self.lanes.get_mut(&conn)?;
        let (plan, runs) = lane.pending.take()?;
        let checks = Checks { book: &self.book, pool: &self.pool, debtor: lane.debtor?, sabotage: self.sabotage };
        let step = plan.step;
        for (loan, epoch, _) in plan.entries.iter().flat_map(|entry| &entry.loans) {
            if let Err(reason) = checks.in_force(*loan, Some(*epoch)) {
                self.refused += 1;
                return Some((LaneMessage::StepRefused { step, reason }, 64));
            }
        }
        let bytes = 64 + plan.rows() * self.cost.query_bytes;
        let entries = plan.entries.iter().zip(runs);
        let partials = entries.map(|(entry, runs)| memory.attend(runs, entry.start, entry.end)).collect();
        self.answered += 1;
        Some((LaneMessage::Answer { step, partials }, bytes))
    }
}

struct Checks<'a> {
    book: &'a LentPool,
    pool: &'a KvPool,
    debtor: InstanceId,
    sabotage: Sabotage,
}

impl Checks<'_> {
    /// Holds if the loan is this debtor's, in this epoch, and not over.
    fn in_force(&self, loan: LoanId, epoch: Option<u32>) -> Result<Option<Arc<LoanRecord>>, String> {
        let record = self.book.loan(loan);
        if matches!(self.sabotage, Sabotage::Lease | Sabotage::Epoch) {
            return Ok(record);
        }
        let its = record.as_ref().is_some_and(|r| r.debtor == self.debtor);
        let current = epoch.is_none() || record.as_ref().map(|r| r.epoch) == epoch;
        match its && current {
            true => Ok(record),
            false => Err(format!("loan {} is not this debtor's, or is over", loan.0)),
        }
    }
}

impl Lane {
    /// Takes placements in and looks the blocks of each entry up.
    fn take(&mut self, checks: &Checks<'_>, plan: &Plan) -> Result<Vec<Vec<KvRun>>, String> {
        let blind = checks.sabotage == Sabotage::Epoch;
        if plan.step <= self.step {
            return Err(format!("step {} after step {}", plan.step, self.step));
        }
        if checks.sabotage != Sabotage::Lease {
            self.placed.retain(|loan, runs| {
                // A part that was given back is at the end.
                let kept = runs.iter().take_while(|run| checks.pool.table().visible(run.block, *loan)).count();
                runs.truncate(kept);
                checks.book.loan(*loan).is_some()
            });
        }
        for placed in &plan.placements {
            // A loan that is over, as of a request that was cancelled, is no fault.
            if checks.in_force(placed.loan, None).is_err() {
                continue;
            }
            let published = checks.pool.table().publish(placed.block, placed.loan);
            if !blind && checks.sabotage != Sabotage::Lease {
                published.map_err(|error| format!("rBlock {}: {error}", placed.block))?;
            }
            let run = KvRun { block: placed.block, position: placed.position, tokens: placed.tokens };
            self.placed.entry(placed.loan).or_default().push(run);
        }
        let mut runs = Vec::with_capacity(plan.entries.len());
        for entry in &plan.entries {
            let mut of_entry = Vec::new();
            for (loan, epoch, visible) in &entry.loans {
                checks.in_force(*loan, Some(*epoch))?;
                let placed = self.placed.get(loan).map_or(&[][..], Vec::as_slice);
                // Its former life would have had the others.
                let visible = if blind { placed.len().min(*visible) } else { *visible };
                let visible = placed
                    .get(..visible)
                    .ok_or_else(|| format!("{visible} rBlocks asked of loan {}, {} placed", loan.0, placed.len()))?;
                of_entry.extend_from_slice(visible);
            }
            runs.push(of_entry);
        }
        self.step = plan.step;
        Ok(runs)
    }
}
