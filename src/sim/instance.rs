//! One simulated instance: a process life with its controller, its pool and a
//! step loop that does what `engine/step_loop.rs` does, on a toy device whose
//! steps take the time that the cost model says.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::control::{Call, Control, Identity, News, slot_of};
use super::cost::CostModel;
use super::debtor::{Debtor, LANE_ASK, LaneCall, LaneState};
use super::lender::{Entry, LaneMessage, Lender, Sabotage, Verdict};
use super::network::{Arrival, Port, Slot};
use super::toy::{self, Memory};
use crate::control::controller::LocalStats;
use crate::control::perf::PerfModel;
use crate::control::rmanager::{PoolSource, RManager};
use crate::control::slack::Slack;
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, KvDtype, KvShape, LoanId};
use crate::schedule::batch::{Batch, BatchItem, Spill};
use crate::schedule::scheduler::{Ask, Scheduler, SchedulerConfig};
use crate::schedule::sequence::{HeldLoan, SeqId};

/// Least wait for a creditor's answer before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often the control plane hears what the sequences hold.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// Where an instance's id has its slot.
const SLOT_BITS: u64 = 0xff;

/// The slot of an instance.
pub fn place(instance: InstanceId) -> Slot {
    (instance.0 & SLOT_BITS) as Slot
}

/// A message on a simulated connection.
#[derive(Clone, Debug)]
pub enum Payload {
    /// Of the control plane: the real bytes.
    Control(Vec<u8>),
    /// Of a lane.
    Lane(LaneMessage),
}

/// What an instance wants of the world.
#[derive(Clone, Debug)]
pub enum Effect {
    /// A connection.
    Dial {
        /// Where to; `None`: an address nobody has.
        to: Option<Slot>,
        /// To what there.
        port: Port,
        /// Names the ask.
        ask: u64,
    },
    /// A message.
    Send {
        /// Over which connection.
        conn: u64,
        /// Bytes it takes on the wire.
        bytes: u64,
        /// When they began to leave, if before now.
        since: Option<Duration>,
        /// What.
        payload: Payload,
    },
    /// A datagram.
    Datagram {
        /// To whom.
        to: Slot,
        /// What.
        bytes: Vec<u8>,
    },
    /// A connection is over.
    Close {
        /// Which.
        conn: u64,
    },
    /// Call [`Instance::woken`] then.
    Wake {
        /// When.
        at: Duration,
        /// With what.
        what: Wake,
    },
    /// A request has its first token.
    Started {
        /// Which.
        request: u64,
    },
    /// A request has its whole answer.
    Finished {
        /// Which.
        request: u64,
        /// Its tokens.
        answer: Vec<u32>,
    },
    /// A request cannot go on here.
    Failed {
        /// Which.
        request: u64,
        /// Why.
        reason: String,
    },
    /// For the log.
    Log(String),
}

/// What an instance is woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// A step's time is over.
    StepEnd(u64),
    /// The wait for a step's answers is over.
    StepDeadline(u64),
    /// Attention for a debtor is done.
    Answer(u64),
    /// Lanes are to be looked at.
    Lanes,
}

/// What an instance is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Its device.
    pub cost: CostModel,
    /// Share of its memory that it lends.
    pub lend: f64,
    /// How long a loan lasts unrenewed.
    pub lease: Duration,
    /// Limits of a step.
    pub schedule: SchedulerConfig,
    /// A planted bug.
    pub sabotage: Sabotage,
}

/// A request here.
struct Running {
    request: u64,
    prompt: Vec<u32>,
    answer: Vec<u32>,
    want: usize,
    started: bool,
}

struct Step {
    number: u64,
    begun: Duration,
    /// When the local part is done.
    local: Duration,
    /// Time of the rows outside attention.
    rows: Duration,
    ending: bool,
}

/// Figures of one life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Steps computed.
    pub steps: u64,
    /// rBlocks moved to creditors.
    pub moves: u64,
}

/// One process life. See the module's page.
pub struct Instance {
    /// Who.
    pub id: InstanceId,
    /// The control plane.
    pub control: Control,
    /// Local KV.
    pub pool: Arc<KvPool>,
    /// Prefix reuse over it.
    pub prefix: Arc<Mutex<PrefixCache>>,
    /// The scheduler.
    pub scheduler: Scheduler,
    /// Figures.
    pub figures: Figures,
    pub(super) setup: Setup,
    pub(super) memory: Memory,
    pub(super) debtor: Debtor,
    lender: Lender,
    running: BTreeMap<SeqId, Running>,
    next_seq: SeqId,
    batch: Batch,
    inbox: Vec<News>,
    opening: Vec<(SeqId, Vec<HeldLoan>)>,
    step: Option<Step>,
    /// Time its device spent on debtors' queries while the last step ran.
    lent_time: Duration,
    /// Until when it is busy with those it has.
    serving: Duration,
    lanes_wake: Option<Duration>,
    report_next: Duration,
    effects: Vec<Effect>,
}

impl Instance {
    /// A life that begins. The first [`tick`](Self::tick) starts it.
    pub fn new(setup: Setup, slot: Slot, life: u64, instances: usize, seed: u64) -> Self {
        // What a block's bytes are nobody looks at: the toy's values are kept
        // apart. So the pool is as small as its shape may be.
        let block_tokens = setup.cost.block_tokens;
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 8, block_tokens, dtype: KvDtype::Bf16 };
        let pool = KvPool::new(shape, setup.cost.blocks);
        let pool = Arc::new(pool.unwrap_or_else(|error| unreachable!("{} small blocks: {error}", setup.cost.blocks)));
        let prefix = Arc::new(Mutex::new(PrefixCache::new(b"toy", block_tokens as usize)));
        let source = PoolSource::Pool { pool: pool.clone(), prefix: Some(prefix.clone()) };
        let rmanager = RManager::new(source, setup.lend, setup.lease);
        let book = rmanager.lent_pool().clone();
        // The slot in the low bits, so that logs can be read.
        let id = InstanceId(toy::mix(seed, 1) << 16 | life << 8 & 0xff00 | slot as u64 & SLOT_BITS);
        let host = setup.cost.host(slot) as u64;
        let identity = Identity { instance: id, slot, host, started: life, instances, shape, sabotage: setup.sabotage };
        Self {
            id,
            control: Control::new(&identity, rmanager, seed),
            scheduler: Scheduler::new(setup.schedule, pool.clone(), prefix.clone()),
            memory: Memory::new(setup.cost.blocks, block_tokens),
            debtor: Debtor::new(id, life, setup.cost.query_bytes, setup.sabotage),
            lender: Lender::new(slot, book, pool.clone(), setup.cost.clone(), setup.sabotage),
            figures: Figures::default(),
            pool,
            prefix,
            setup,
            running: BTreeMap::new(),
            next_seq: 1,
            batch: Batch::default(),
            inbox: Vec::new(),
            opening: Vec::new(),
            step: None,
            lent_time: Duration::ZERO,
            serving: Duration::ZERO,
            lanes_wake: None,
            report_next: Duration::ZERO,
            effects: Vec::new(),
        }
    }

    /// What is to be done since the last call.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Sequences here, by name.
    pub fn sequences(&self) -> impl Iterator<Item = SeqId> + '_ {
        self.running.keys().copied()
    }

    /// Queries answered for debtors; plans refused; partials rejected.
    pub fn exchanges(&self) -> (u64, u64, u64) {
        (self.lender.answered, self.lender.refused, self.debtor.rejected)
    }

    /// Times that a sequence lost KV with a creditor and went on, and the tokens
    /// that this computed again.
    pub fn recovered(&self) -> (u64, u64) {
        (self.scheduler.recoveries(), self.scheduler.recomputed_tokens())
    }

    /// The controller's deadline has come.
    pub fn tick(&mut self, now: Duration) {
        let (running, waiting) = (self.scheduler.running() as u32, self.scheduler.waiting() as u32);
        let wanted = self.scheduler.wanted() as u32;
        let CostModel { fixed_ns, row_ns, key_ns, .. } = self.setup.cost;
        let perf = Some(PerfModel { fixed_ns: fixed_ns as f32, row_ns: row_ns as f32, key_ns: key_ns as f32 });
        let stats = LocalStats { running, waiting, wanted, perf, ..LocalStats::default() };
        self.control.tick(now, stats);
        if now >= self.report_next && running > 0 && self.setup.schedule.move_blocks > 0 {
            self.report_next = now + REPORT_EVERY;
            self.control.plan(now, self.scheduler.holdings(), self.scheduler.queue_needs());
        }
        self.work(now);
    }

    /// A request comes.
    pub fn submit(&mut self, now: Duration, request: u64, prompt: Vec<u32>, want: usize) {
        self.start(Running { request, prompt, answer: Vec::new(), want, started: false });
        self.work(now);
    }

    /// Something comes over the network.
    pub fn arrived(&mut self, now: Duration, arrival: Arrival<Payload>) {
        match arrival {
            Arrival::Connected { conn, ask } if ask & LANE_ASK != 0 => self.debtor.connected(ask, conn),
            Arrival::ConnectFailed { ask } if ask & LANE_ASK != 0 => self.debtor.failed(ask),
            Arrival::Accepted { conn, port: Port::Lane } => self.lender.accepted(conn),
            Arrival::Message { conn, message: Payload::Lane(message) } => self.lane(now, conn, message),
            Arrival::Closed { conn } if self.lender.has(conn) => self.lender.closed(conn),
            Arrival::Closed { conn } if self.debtor.has(conn) => self.debtor.closed(conn),
            Arrival::Message { conn, message: Payload::Control(message) } => {
                self.control.arrived(now, Arrival::Message { conn, message });
            }
            Arrival::Connected { conn, ask } => self.control.arrived(now, Arrival::Connected { conn, ask }),
            Arrival::ConnectFailed { ask } => self.control.arrived(now, Arrival::ConnectFailed { ask }),
            Arrival::Accepted { conn, port } => self.control.arrived(now, Arrival::Accepted { conn, port }),
            Arrival::Closed { conn } => self.control.arrived(now, Arrival::Closed { conn }),
            Arrival::Datagram { from, bytes } => self.control.arrived(now, Arrival::Datagram { from, bytes }),
        }
        self.work(now);
    }

    /// A time that was asked for has come.
    pub fn woken(&mut self, now: Duration, what: Wake) {
        let current = self.step.as_ref().map(|step| step.number);
        match what {
            Wake::StepEnd(step) if current == Some(step) => self.finish_step(now),
            Wake::StepDeadline(step) if current == Some(step) && self.debtor.awaits() => self.debtor.deadline(),
            Wake::Answer(conn) => {
                if let Some((message, bytes)) = self.lender.answer(&self.memory, conn) {
                    self.send(conn, bytes, Payload::Lane(message));
                }
            }
            Wake::Lanes => self.lanes_wake = None,
            Wake::StepEnd(_) | Wake::StepDeadline(_) => {}
        }
        self.work(now);
    }

    fn lane(&mut self, now: Duration, conn: u64, message: LaneMessage) {
        if !self.lender.has(conn) {
            return self.debtor.message(conn, message);
        }
        match self.lender.message(&mut self.memory, conn, message) {
            Verdict::Fine => {}
            Verdict::Reply(message) => {
                let bytes = match &message {
                    LaneMessage::Landed { values: Some(values), .. } => {
                        self.setup.cost.token_bytes * values.len() as u64
                    }
                    _ => 64,
                };
                self.send(conn, bytes, Payload::Lane(message));
            }
            Verdict::Later { busy, exchanges } => {
                let busy = Duration::from_nanos(busy);
                // Debtors are served one after the other; what that takes of a
                // step under way, the next one is charged. An idle device has
                // the time to spare.
                self.serving = self.serving.max(now) + busy;
                if self.step.is_some() {
                    self.lent_time += busy;
                }
                let at = self.serving + Duration::from_nanos(exchanges);
                self.effects.push(Effect::Wake { at, what: Wake::Answer(conn) });
            }
            Verdict::Expel(reason) => {
                self.lender.closed(conn);
                self.effects.push(Effect::Log(format!("closed a debtor's lane: {reason}")));
                self.effects.push(Effect::Close { conn });
            }
        }
    }

    // ---- the step loop ----------------------------------------------------------

    /// Everything that can be done now.
    fn work(&mut self, now: Duration) {
        self.collect();
        self.sabotage_reservation();
        if let Some(step) = self.step.as_mut() {
            if !step.ending && !self.debtor.awaits() {
                step.ending = true;
                let at = step.local.max(now + step.rows);
                let what = Wake::StepEnd(step.number);
                self.effects.push(Effect::Wake { at, what });
            }
        } else {
            self.turn(now);
        }
        self.collect();
    }

    /// Takes what the controller and the lanes want over into effects.
    fn collect(&mut self) {
        for call in self.control.take_calls() {
            self.effects.push(match call {
                Call::Dial { ask, address } => Effect::Dial { to: slot_of(&address), port: Port::Control, ask },
                Call::Send { conn, bytes } => {
                    Effect::Send { conn, bytes: bytes.len() as u64, since: None, payload: Payload::Control(bytes) }
                }
                Call::Datagram { to, bytes } => Effect::Datagram { to, bytes },
                Call::Close { conn } => Effect::Close { conn },
            });
        }
        for call in self.debtor.take_calls() {
            self.effects.push(match call {
                LaneCall::Dial { ask, to } => Effect::Dial { to: Some(to), port: Port::Lane, ask },
                LaneCall::Send { conn, bytes, since, message } => {
                    Effect::Send { conn, bytes, since, payload: Payload::Lane(message) }
                }
                LaneCall::Close { conn } => Effect::Close { conn },
            });
        }
        self.effects.extend(self.control.take_notes().into_iter().map(Effect::Log));
        self.inbox.extend(self.control.take_news());
    }

    fn turn(&mut self, now: Duration) {
        loop {
            self.collect();
            if self.inbox.is_empty() {
                break;
            }
            for news in std::mem::take(&mut self.inbox) {
                self.hear(now, news);
            }
            self.asks(now);
        }
        let wake = self.debtor.poll(now);
        self.settle_losses(now);
        self.settle_grants(now);
        self.bring_home(now);
        self.move_blocks(now);
        let mut batch = std::mem::take(&mut self.batch);
        self.scheduler.next_batch(&mut batch);
        self.batch = batch;
        self.asks(now);
        if let Some(at) = wake.filter(|at| self.lanes_wake.is_none_or(|set| *at < set)) {
            self.lanes_wake = Some(at);
            self.effects.push(Effect::Wake { at, what: Wake::Lanes });
        }
        if !self.batch.is_empty() {
            self.begin_step(now);
        }
    }

    fn hear(&mut self, now: Duration, news: News) {
        // A planted bug: it does not hear of what it lost.
        let deaf = matches!(self.setup.sabotage, Sabotage::Lease | Sabotage::Epoch);
        if deaf && matches!(news, News::LoansLost(_) | News::CreditorLost(_)) {
            return;
        }
        match news {
            News::Granted { request, loans } => {
                for loan in &loans {
                    self.debtor.open(now, loan.creditor, self.control.creditor(loan.creditor));
                }
                self.opening.push((request, loans));
            }
            News::Refused { request, reason } => self.scheduler.refused(request, &reason),
            News::LoansLost(loans) => {
                for (creditor, loan) in loans {
                    self.lose(now, creditor, Some(loan), "the loan ended");
                }
            }
            News::CreditorLost(creditor) => {
                self.debtor.close(creditor);
                self.lose(now, creditor, None, "the creditor is gone");
            }
            News::Slack(Slack { free, spare, cap, hold }) => {
                self.scheduler.set_lendable(free, cap);
                self.scheduler.set_slack(spare, hold);
            }
            News::CreditorLeaves(creditor) => self.scheduler.creditor_leaves(creditor),
            News::Moves(errands) => self.scheduler.direct(errands),
            News::MemoryReturned => self.scheduler.memory_changed(),
        }
    }

    pub(super) fn asks(&mut self, now: Duration) {
        let asks: Vec<_> = self.scheduler.drain_asks().collect();
        for ask in asks {
            match ask {
                Ask::Borrow { seq, blocks, apart_from, only } => {
                    self.control.borrow(now, seq, blocks as u32, &apart_from, only);
                }
                Ask::Shrink { creditor, loan, keep } => self.control.shrink(now, creditor, loan, keep),
                Ask::Repay(loan) => self.control.repay(now, loan.creditor, loan.loan),
                Ask::Fail { seq, message } => {
                    if let Some(running) = self.running.remove(&seq) {
                        self.effects.push(Effect::Failed { request: running.request, reason: message });
                    }
                }
            }
        }
    }

    fn settle_grants(&mut self, now: Duration) {
        for (seq, loans) in std::mem::take(&mut self.opening) {
            let state = |loan: &HeldLoan| self.debtor.state(loan.creditor);
            if loans.iter().any(|loan| state(loan) == LaneState::Absent) {
                loans.iter().for_each(|loan| self.control.repay(now, loan.creditor, loan.loan));
                self.scheduler.refused(seq, "no lane to a creditor");
            } else if loans.iter().all(|loan| state(loan) == LaneState::Open) {
                self.scheduler.granted(seq, loans);
            } else {
                self.opening.push((seq, loans));
            }
        }
        self.asks(now);
    }

    fn send(&mut self, conn: u64, bytes: u64, payload: Payload) {
        self.effects.push(Effect::Send { conn, bytes, since: None, payload });
    }

    fn begin_step(&mut self, now: Duration) {
        let cost = &self.setup.cost;
        let mut local = 0.0;
        for seq in &self.batch.seqs {
            let runs = &self.batch.runs[seq.run as usize..(seq.run + seq.runs) as usize];
            let keys = runs.iter().map(|run| u64::from(run.tokens)).sum();
            local += cost.attention_ns(seq.rows as usize, keys);
        }
        let mut parts = Vec::new();
        let mut away = 0.0;
        for (index, item) in self.batch.items.iter().enumerate() {
            for (creditor, entry) in remote_parts(&self.scheduler, item) {
                let blocks: usize = entry.loans.iter().map(|(_, _, visible)| visible).sum();
                let keys = blocks as u64 * u64::from(cost.block_tokens);
                away += cost.attention_ns(item.rows.len(), keys);
                away += 2.0 * cost.wire_ns(item.rows.len() as u64 * cost.query_bytes);
                parts.push((creditor, index, entry));
            }
        }
        let rows = Duration::from_nanos(cost.rows_ns(self.batch.tokens.len()) as u64);
        // Where debtors were served, the device had less time for this.
        let local = now + rows + Duration::from_nanos(local as u64) + std::mem::take(&mut self.lent_time);
        let number = self.debtor.begin_step(parts);
        let ending = !self.debtor.awaits();
        let (at, what) = if ending {
            (local, Wake::StepEnd(number))
        } else {
            (now + PATIENCE + Duration::from_nanos(away as u64) * 8, Wake::StepDeadline(number))
        };
        self.effects.push(Effect::Wake { at, what });
        self.step = Some(Step { number, begun: now, local, rows, ending });
        self.figures.steps += 1;
    }

    fn finish_step(&mut self, now: Duration) {
        let begun = self.step.take().map_or(now, |step| step.begun);
        self.settle_losses(now);
        let mut batch = std::mem::take(&mut self.batch);
        // What was undone is computed as well: its rubbish must do no harm.
        let mut tokens = BTreeMap::new();
        for (index, item) in batch.items.iter().enumerate() {
            if self.scheduler.get(item.seq).is_some() {
                tokens.insert(item.seq, self.compute(&batch, index, item));
            }
        }
        let here = |spill: &&Spill| self.scheduler.get(spill.seq).is_some();
        let spills: Vec<_> = batch.spills.iter().filter(here).copied().collect();
        self.write(begun, &spills);
        self.settle_losses(now);
        // What a loss has undone leaves the batch here; the rest counts.
        self.scheduler.complete(&mut batch);
        self.place(&batch.spills);
        for item in &batch.items {
            if let Some(token) = tokens.get(&item.seq) {
                self.deliver(item, *token);
            }
        }
        self.batch = batch;
        self.asks(now);
    }

    /// Computes a batch item's rows; the token after the last.
    fn compute(&mut self, batch: &Batch, index: usize, item: &BatchItem) -> u32 {
        let (start, end) = (item.position, item.position + item.rows.len() as u32);
        let seq = &batch.seqs[index];
        let runs = &batch.runs[seq.run as usize..(seq.run + seq.runs) as usize];
        // What this step itself fills is not there yet.
        let before = runs.iter().filter(|run| run.position < start).map(|run| {
            let tokens = run.tokens.min(start - run.position);
            crate::kv::rblock::KvRun { tokens, ..*run }
        });
        let mut whole = self.memory.attend(before, start, end);
        self.debtor.partials(index).for_each(|partial| whole.merge(partial));
        let mut total = whole.before;
        for row in item.rows.clone() {
            let slot = batch.slots[row as usize];
            let value = toy::kv(batch.tokens[row as usize], slot.position, total);
            self.memory.set(slot.block, slot.offset, value);
            total = total.wrapping_add(value);
            // Somebody else's copy of the row's own position: counted twice, as
            // attention would.
            for (_, value) in whole.within.iter().filter(|(position, _)| *position == slot.position) {
                total = total.wrapping_add(*value);
            }
        }
        toy::next(total)
    }

    fn deliver(&mut self, item: &BatchItem, token: u32) {
        let Some(sequence) = self.scheduler.get(item.seq) else { return };
        let end = item.position as usize + item.rows.len();
        let Some(running) = self.running.get_mut(&item.seq) else { return };
        if item.logits.is_empty() || end < sequence.tokens.len() {
            return;
        }
        let request = running.request;
        if !std::mem::replace(&mut running.started, true) {
            self.effects.push(Effect::Started { request });
        }
        running.answer.push(token);
        if running.answer.len() < running.want {
            return self.scheduler.push_token(item.seq, token);
        }
        self.scheduler.remove(item.seq);
        if let Some(running) = self.running.remove(&item.seq) {
            self.effects.push(Effect::Finished { request, answer: running.answer });
        }
    }

    // ---- losses -----------------------------------------------------------------

    pub(super) fn settle_losses(&mut self, now: Duration) {
        for (creditor, reason) in self.debtor.take_lost() {
            self.lose(now, creditor, None, &reason);
        }
        self.asks(now);
    }

    /// What a creditor held is lost, of one loan or all.
    fn lose(&mut self, now: Duration, creditor: InstanceId, loan: Option<LoanId>, reason: &str) {
        for (seq, loans) in std::mem::take(&mut self.opening) {
            if loans.iter().any(|l| l.is(creditor, loan)) {
                loans.iter().for_each(|loan| self.control.repay(now, loan.creditor, loan.loan));
                self.scheduler.refused(seq, "the creditor was lost");
            } else {
                self.opening.push((seq, loans));
            }
        }
        for seq in self.scheduler.lose(creditor, loan) {
            if let Some(running) = self.running.get(&seq) {
                let request = running.request;
                self.effects.push(Effect::Log(format!("request {request} lost {creditor}'s part: {reason}")));
            }
        }
    }

    fn start(&mut self, running: Running) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let limit = running.prompt.len() + running.want;
        let tokens = running.prompt.iter().chain(&running.answer).copied().collect();
        let sequence = self.scheduler.sequence(seq, tokens, limit, false);
        self.scheduler.add(sequence);
        self.running.insert(seq, running);
    }

    /// Frees all that the prefix cache keeps, as at a node's end.
    pub fn forget_prefixes(&mut self) {
        self.prefix.lock().unwrap_or_else(PoisonError::into_inner).clear(self.pool.table());
    }

    // ---- planted bugs -----------------------------------------------------------

    fn sabotage_reservation(&mut self) {
        if self.setup.sabotage == Sabotage::Reservation {
            for record in self.control.controller().rmanager().loans() {
                // Fails for those it did this to before.
                let _ = self.pool.table().free_loan(record.loan, &record.blocks);
            }
        }
    }
}

/// The parts of a batch item's KV that lie with creditors, one a creditor.
fn remote_parts(scheduler: &Scheduler, item: &BatchItem) -> Vec<(InstanceId, Entry)> {
    let mut parts: Vec<(InstanceId, Entry)> = Vec::new();
    let loans = scheduler.get(item.seq).map_or(&[][..], |s| &s.loans);
    let (start, end) = (item.position, item.position + item.rows.len() as u32);
    for held in loans.iter().filter(|loan| loan.placed > 0) {
        let view = (held.loan, held.epoch, held.placed);
        match parts.iter_mut().find(|(creditor, _)| *creditor == held.creditor) {
            Some((_, entry)) => entry.loans.push(view),
            None => parts.push((held.creditor, Entry { start, end, loans: vec![view] })),
        }
    }
    parts
}
