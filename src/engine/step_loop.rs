//! The step loop: one thread that owns the device, the batch and the lanes to
//! creditors. A turn takes commands in, computes one step, hands tokens out.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use distkv_fabric::Address;
use tokio::sync::mpsc;

use super::doubts::Doubts;
use super::handle::{EngineHandle, EngineStats, Output, Rejected, Request, Submit};
use super::lost::Lost;
use super::remote::{block_move, remote_parts};
use super::requests::{Clients, Computed, LogitTap, Verdict};
use crate::attention::debtor::{BlockMove, Debtor, LaneState, RemotePart};
use crate::attention::exchange::ExchangeStats;
use crate::attention::fetch::Landed;
use crate::control::perf::Fit;
use crate::control::slack::Slack;
use crate::device::nvtx::range;
use crate::device::{Chosen, Device, DeviceError};
use crate::kv::moves::{Errand, Held};
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, LoanId};
use crate::model::transformer::Transformer;
use crate::schedule::batch::{Batch, BatchItem, Spill};
use crate::schedule::errands::Fetch;
use crate::schedule::scheduler::{Ask, Scheduler, SchedulerConfig};
use crate::schedule::sequence::{HeldLoan, SeqId};

/// Commands that may wait for the engine to take them.
const INBOX: usize = 4096;
/// How often the control plane hears what the sequences hold.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// An engine's limits.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Limits of a step.
    pub schedule: SchedulerConfig,
    /// Longest context, prompt and answer together.
    pub max_model_len: usize,
    /// Most requests in the queue.
    pub max_waiting: usize,
}

/// Who gets rBlocks for the engine from elsewhere: the node's control plane.
/// Calls return at once; answers come back as [`Command`]s.
pub trait Treasury: Send {
    /// Asks for `blocks` rBlocks for a sequence, of any creditors but those in
    /// `avoid`, or of `only` one; answered by [`Command::Granted`] or [`Command::Refused`]. One
    /// borrowing of a sequence at a time.
    fn borrow_blocks(&mut self, seq: SeqId, blocks: usize, avoid: &[InstanceId], only: Option<InstanceId>);
    /// Gives a loan back.
    fn repay(&mut self, loan: &HeldLoan);
    /// Gives a loan back but for its first `keep` blocks, of which there is at
    /// least one.
    fn shrink(&mut self, creditor: InstanceId, loan: LoanId, keep: usize);
    /// What the engine's sequences hold, and what those that wait need (rBlocks):
    /// to plan by. Answered by [`Command::Moves`] where there is anything to
    /// move.
    fn report(&mut self, requests: Vec<Held>, queue: Vec<u32>);
    /// The lane to a creditor failed, though the control plane may still hear
    /// of it.
    fn creditor_failed(&mut self, creditor: InstanceId, reason: &str);
}

/// A loan, and where its creditor is reached.
#[derive(Clone, Debug)]
pub struct GrantedLoan {
    /// The loan.
    pub loan: HeldLoan,
    /// Addresses of the creditor's lanes.
    pub addresses: Vec<Address>,
    /// It is on this host.
    pub same_host: bool,
}

/// What reaches the engine from outside.
pub enum Command {
    /// A request.
    Submit {
        /// What is asked.
        request: Request,
        /// Where its tokens go.
        outputs: mpsc::UnboundedSender<Output>,
        /// Set when its client has gone.
        cancelled: Arc<AtomicBool>,
    },
    /// Creditors lent what was asked for.
    Granted {
        /// For this sequence.
        seq: SeqId,
        /// By these loans.
        loans: Vec<GrantedLoan>,
    },
    /// Nobody lends that much.
    Refused {
        /// For this sequence.
        seq: SeqId,
        /// Why, for people.
        reason: String,
    },
    /// A creditor is gone, and what it held with it.
    CreditorLost {
        /// Which.
        creditor: InstanceId,
        /// Why, for people.
        reason: String,
    },
    /// Loans ended without our doing, and what lay under them is gone.
    LoansLost {
        /// Which.
        loans: Vec<(InstanceId, LoanId)>,
    },
    /// What creditors have free, and what others wait for.
    Slack(Slack),
    /// The loans of a creditor are in force until then, at least.
    LeaseUntil {
        /// Whose.
        creditor: InstanceId,
        /// When.
        until: Instant,
    },
    /// A creditor is draining.
    CreditorLeaves(InstanceId),
    /// What should lie elsewhere, in place of what was said before.
    Moves(Vec<Errand>),
    /// Memory that had been lent from this instance's pool came back.
    MemoryReturned,
    /// Finish nothing more; end.
    Stop,
}

/// What the engine shares with its handles.
struct Shared {
    inbox: SyncSender<Command>,
    stats: Mutex<EngineStats>,
    draining: Arc<AtomicBool>,
    max_model_len: usize,
    max_waiting: usize,
    block_tokens: usize,
    /// rBlocks here and, at most, with creditors.
    reach: AtomicUsize,
    /// Requests submitted that the published figures do not count yet.
    queued: AtomicUsize,
    pool: Arc<KvPool>,
    exchange: Arc<ExchangeStats>,
    lost: Lost,
}

impl Submit for Shared {
    fn submit(
        &self,
        request: Request,
        outputs: mpsc::UnboundedSender<Output>,
        cancelled: Arc<AtomicBool>,
    ) -> Result<(), Rejected> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Rejected::Draining);
        }
        let limit = self.max_model_len.min(self.reach.load(Ordering::Relaxed) * self.block_tokens);
        let tokens = request.prompt.len() + request.resume.len() + 1;
        if tokens > limit {
            return Err(Rejected::TooLong { tokens, limit });
        }
        let waiting = self.stats().waiting + self.queued.load(Ordering::Relaxed);
        if waiting >= self.max_waiting {
            return Err(Rejected::Overloaded { waiting });
        }
        self.queued.fetch_add(1, Ordering::Relaxed);
        self.inbox.try_send(Command::Submit { request, outputs, cancelled }).map_err(|_| {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            Rejected::Overloaded { waiting }
        })
    }

    fn stats(&self) -> EngineStats {
        let counts = self.pool.table().counts();
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        stats.queued = self.queued.load(Ordering::Relaxed);
        stats.blocks_total = counts.total as usize;
        stats.blocks_free = counts.free as usize;
        stats.blocks_lent = (counts.lent + counts.reserved) as usize;
        stats.lost = self.lost.reason();
        stats.partials_rejected = self.exchange.rejected();
        stats.reach_tokens = self.reach.load(Ordering::Relaxed) * self.block_tokens;
        stats
    }
}

/// The engine. See the module's page.
pub struct Engine<D: Device> {
    device: D,
    model: Transformer<D>,
    pool: Arc<KvPool>,
    prefix: Arc<Mutex<PrefixCache>>,
    scheduler: Scheduler,
    debtor: Debtor,
    treasury: Box<dyn Treasury>,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    clients: Clients,
    /// Grants whose lanes are still being opened.
    opening: Vec<(SeqId, Vec<HeldLoan>)>,
    /// Of decode steps.
    fit: Fit,
    doubts: Doubts,
    /// When the treasury is told next what the sequences hold.
    report_next: Instant,
    /// Moves are planned at all.
    plans: bool,
    fetches: Vec<Fetch>,
    next_seq: SeqId,
    /// Requests taken since the figures were published.
    taken: usize,
    max_model_len: usize,
    batch: Batch,
    moves: Vec<Spill>,
    logits: Vec<f32>,
    /// What the device chose of the last step, by batch item.
    chosen: Vec<Option<Chosen>>,
    /// The last step's logits were brought to `logits`, to choose here.
    on_host: bool,
    tap: Option<LogitTap>,
    stopped: bool,
}

/// A running engine.
pub struct Running {
    /// For requests.
    pub handle: EngineHandle,
    /// For the node.
    pub commands: SyncSender<Command>,
    /// Set to refuse new requests.
    pub draining: Arc<AtomicBool>,
    /// Says when the device was lost, with which the engine ends.
    pub lost: Lost,
    /// Ends after [`Command::Stop`].
    pub thread: JoinHandle<()>,
}

/// What an engine is made of.
pub struct Parts<D: Device> {
    /// The device.
    pub device: D,
    /// The model, loaded on it.
    pub model: Transformer<D>,
    /// Local KV.
    pub pool: Arc<KvPool>,
    /// Prefix reuse over it.
    pub prefix: Arc<Mutex<PrefixCache>>,
    /// The lanes to creditors.
    pub debtor: Debtor,
    /// The debtor's figures.
    pub exchange: Arc<ExchangeStats>,
    /// The control plane.
    pub treasury: Box<dyn Treasury>,
    /// Sees all logits, where given.
    pub tap: Option<LogitTap>,
}

impl<D: Device + 'static> Engine<D>
where
    D::Matrix: 'static,
    D::Vector: 'static,
    D::Buffer: 'static,
{
    /// Starts the engine's thread. `treasury` is made with the sender of its
    /// own answers.
    pub fn start(
        config: EngineConfig,
        parts: Parts<D>,
        inbox: (SyncSender<Command>, Receiver<Command>),
    ) -> std::io::Result<Running> {
        let (commands, inbox) = inbox;
        let draining = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Shared {
            inbox: commands.clone(),
            stats: Mutex::default(),
            draining: draining.clone(),
            max_model_len: config.max_model_len,
            max_waiting: config.max_waiting,
            block_tokens: parts.pool.shape().block_tokens as usize,
            reach: AtomicUsize::new(parts.pool.blocks() as usize),
            queued: AtomicUsize::new(0),
            pool: parts.pool.clone(),
            exchange: parts.exchange,
            lost: Lost::default(),
        });
        let lost = shared.lost.clone();
        let vocab = parts.model.config().vocab;
        let engine = Self {
            device: parts.device,
            model: parts.model,
            scheduler: Scheduler::new(config.schedule, parts.pool.clone(), parts.prefix.clone()),
            pool: parts.pool,
            prefix: parts.prefix,
            debtor: parts.debtor,
            treasury: parts.treasury,
            inbox,
            shared: shared.clone(),
            clients: Clients::default(),
            opening: Vec::new(),
            fit: Fit::default(),
            doubts: Doubts::default(),
            report_next: Instant::now(),
            plans: config.schedule.move_blocks > 0,
            fetches: Vec::new(),
            next_seq: 1,
            taken: 0,
            max_model_len: config.max_model_len,
            batch: Batch::default(),
            moves: Vec::new(),
            logits: vec![0.0; config.schedule.max_logits * vocab],
            chosen: Vec::new(),
            on_host: true,
            tap: parts.tap,
            stopped: false,
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run())?;
        Ok(Running { handle: EngineHandle::new(shared), commands, draining, lost, thread })
    }

    /// A channel for commands, to give to the treasury and then to `start`.
    pub fn inbox() -> (SyncSender<Command>, Receiver<Command>) {
        sync_channel(INBOX)
    }

    fn run(mut self) {
        while !self.stopped {
            self.take_commands();
            self.report();
            let advanced = self.turn();
            self.publish();
            if !advanced && !self.stopped {
                self.idle();
            }
        }
        self.clients.fail_all("the node was stopped");
        self.prefix.lock().unwrap_or_else(PoisonError::into_inner).clear(self.pool.table());
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            self.command(command);
        }
    }

    /// Nothing can be computed: waits for a command, shortly where a lane is
    /// opening, which only polling notices.
    fn idle(&mut self) {
        let wait = if self.opening.is_empty() { Duration::from_millis(50) } else { Duration::from_micros(200) };
        match self.inbox.recv_timeout(wait) {
            Ok(command) => self.command(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stopped = true,
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit { request, outputs, cancelled } => {
                self.taken += 1;
                let seq = self.next_seq;
                self.next_seq += 1;
                self.clients.add(seq, &request, outputs, cancelled);
                let vocab = self.model.config().vocab;
                if let Some(&bad) = request.prompt.iter().chain(&request.resume).find(|&&t| t as usize >= vocab) {
                    return self.clients.fail(seq, format!("token {bad} is outside the vocabulary of {vocab}"));
                }
                if request.prompt.is_empty() {
                    return self.clients.fail(seq, "the prompt has no token".into());
                }
                if request.resume.len() >= request.max_tokens {
                    let generated = request.resume.len();
                    return self.clients.fail(seq, format!("all {generated} tokens have been generated already"));
                }
                let limit = request.prompt.len().saturating_add(request.max_tokens).min(self.max_model_len);
                let mut sequence = self.scheduler.sequence(seq, request.prompt, limit, request.prompt_logprobs);
                sequence.tokens.extend_from_slice(&request.resume);
                self.scheduler.add(sequence);
            }
            Command::Granted { seq, loans } => {
                self.doubts.granted(seq);
                for granted in &loans {
                    self.debtor.open(granted.loan.creditor, &granted.addresses, granted.same_host);
                }
                self.opening.push((seq, loans.into_iter().map(|g| g.loan).collect()));
            }
            Command::Refused { seq, reason } => {
                tracing::debug!(seq, reason, "a loan was refused");
                match self.doubts.refused(seq) {
                    Some((blocks, avoid)) => self.treasury.borrow_blocks(seq, blocks, &avoid, None),
                    None => self.scheduler.refused(seq, &reason),
                }
            }
            Command::CreditorLost { creditor, reason } => {
                tracing::debug!(%creditor, reason, "a creditor is gone");
                self.debtor.close(creditor);
                self.drop_grants(creditor, None);
                self.scheduler.lose(creditor, None);
            }
            Command::LoansLost { loans } => {
                for (creditor, loan) in loans {
                    self.drop_grants(creditor, Some(loan));
                    self.scheduler.lose(creditor, Some(loan));
                }
            }
            Command::Slack(Slack { free, spare, cap, hold }) => {
                self.shared.reach.store(self.pool.blocks() as usize + cap, Ordering::Relaxed);
                self.scheduler.set_lendable(free, cap);
                self.scheduler.set_slack(spare, hold);
            }
            Command::LeaseUntil { creditor, until } => self.debtor.lease_until(creditor, until),
            Command::CreditorLeaves(creditor) => self.scheduler.creditor_leaves(creditor),
            Command::Moves(errands) => self.scheduler.direct(errands),
            Command::MemoryReturned => self.scheduler.memory_changed(),
            Command::Stop => self.stopped = true,
        }
    }

    /// One step, if there is one to compute.
    fn turn(&mut self) -> bool {
        for seq in self.clients.take_cancelled() {
            self.scheduler.remove(seq);
        }
        self.debtor.poll();
        self.settle_losses();
        self.settle_grants();
        let begun = Instant::now();
        let landed = self.bring_home();
        self.move_blocks();
        self.scheduler.next_batch(&mut self.batch);
        self.handle_asks();
        if self.batch.is_empty() {
            return false;
        }
        self.step(begun, landed);
        self.handle_asks();
        true
    }

    /// Computes the batch. The turn began at `begun`; `landed` rBlocks came home
    /// in it.
    fn step(&mut self, begun: Instant, landed: usize) {
        let computing = Instant::now();
        let _step = range(c"step");
        let streaming: Vec<BlockMove> = self.batch.spills.iter().map(block_move).collect();
        let parts: Vec<RemotePart> =
            self.batch.items.iter().flat_map(|item| remote_parts(&self.scheduler, item)).collect();
        self.debtor.begin_step(parts, streaming.iter().copied());
        let single = self.batch.items.iter().all(|item| item.rows.len() == 1);
        let pass = range(if single { c"decode" } else { c"prefill" });
        let computed = self.model.forward(&mut self.device, &self.pool, &self.batch.input(), &mut self.debtor);
        drop(pass);
        self.debtor.flush(&streaming);
        self.settle_losses();
        if let Err(error) = computed {
            return self.fail_step(&error);
        }
        // What a loss has undone leaves the batch here; the rest counts.
        self.scheduler.complete(&mut self.batch);
        if let Err(error) = self.choose() {
            return self.fail_step(&error);
        }
        self.debtor.place(self.batch.spills.iter().map(block_move));
        self.deliver();
        // Steps of one kind, so that a key costs the same in all of them.
        let decode = !self.batch.items.is_empty() && self.batch.items.iter().all(|item| item.rows.len() == 1);
        if decode {
            let rows = self.batch.items.len() as u32;
            let keys = self.batch.items.iter().map(|item| u64::from(item.position) + 1).sum();
            if self.batch.spills.is_empty() && landed == 0 {
                self.fit.step(rows, keys, computing.elapsed().as_nanos() as u64);
            } else if let Some(model) = self.fit.model() {
                let expected = model.step_ns(f64::from(rows), keys as f64);
                self.scheduler.moves_took(begun.elapsed().as_nanos() as f64, expected);
            }
        }
    }

    fn fail_step(&mut self, error: &DeviceError) {
        if let DeviceError::Lost(_) = error {
            return self.lose_device(&error.to_string());
        }
        tracing::error!(%error, requests = self.batch.items.len(), "a step failed");
        for item in &self.batch.items {
            self.scheduler.remove(item.seq);
            self.clients.fail(item.seq, format!("the step failed: {error}"));
        }
    }

    /// No step will ever be computed again: all requests fail, what was borrowed is
    /// given back, and the engine ends.
    fn lose_device(&mut self, reason: &str) {
        tracing::error!(reason, requests = self.clients.len(), "the engine ends");
        self.shared.draining.store(true, Ordering::Release);
        self.shared.lost.set(reason);
        for seq in self.clients.all() {
            self.scheduler.remove(seq);
            self.clients.fail(seq, format!("{reason}; this node ends: send the request again"));
        }
        self.opening.drain(..).flat_map(|(_, loans)| loans).for_each(|loan| self.treasury.repay(&loan));
        self.handle_asks();
        self.stopped = true;
    }

    /// Has the device choose the step's tokens; or brings the logits here, where
    /// it does not choose or somebody wants to see them.
    fn choose(&mut self) -> Result<(), DeviceError> {
        let _choose = range(c"choose");
        let Self { model, device, scheduler, clients, batch, logits, chosen, tap, .. } = self;
        let vocab = model.config().vocab;
        chosen.clear();
        chosen.resize(batch.items.len(), None);
        self.on_host = true;
        if D::CHOOSES && tap.is_none() && !batch.items.iter().any(|item| clients.wants_logits(item)) {
            let at_end = |item: &BatchItem| {
                let end = item.position as usize + item.rows.len();
                scheduler.get(item.seq).is_some_and(|sequence| end >= sequence.tokens.len())
            };
            let (items, choices) = clients.choices(&batch.items, at_end, vocab);
            let mut picked = Vec::new();
            if model.choose(device, &choices, &mut picked)? {
                items.into_iter().zip(picked).for_each(|(item, token)| chosen[item] = Some(token));
                self.on_host = false;
                return Ok(());
            }
        }
        let rows = batch.logit_rows.len();
        model.logits(device, rows, &mut logits[..rows * vocab])
    }

    fn deliver(&mut self) {
        let vocab = self.model.config().vocab;
        let (mut prompt, mut generated) = (0, 0);
        let mut chosen = self.chosen.drain(..);
        for item in &self.batch.items {
            let chosen = chosen.next().flatten();
            let Some(sequence) = self.scheduler.get(item.seq) else { continue };
            let logits = &mut self.logits[item.logits.start as usize * vocab..item.logits.end as usize * vocab];
            if let Some(tap) = &mut self.tap {
                let end = item.position as usize + item.rows.len();
                let first = end - item.logits.len();
                logits.chunks_exact(vocab).zip(first..).for_each(|(row, position)| tap(item.seq, position, row));
            }
            let end = item.position as usize + item.rows.len();
            if !item.again {
                prompt += end.min(sequence.prompt_len).saturating_sub(item.position as usize);
            }
            let computed = if self.on_host { Computed::Logits(logits) } else { Computed::Chosen(chosen) };
            match self.clients.advance(item, sequence, computed, vocab) {
                Verdict::Continues(None) => {}
                Verdict::Continues(Some(token)) => {
                    generated += 1;
                    self.scheduler.push_token(item.seq, token);
                }
                Verdict::Over => {
                    generated += 1;
                    self.scheduler.remove(item.seq);
                }
            }
        }
        let mut stats = self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.prompt_tokens += prompt as u64;
        stats.generated_tokens += generated;
    }

    /// Moves rBlocks to creditors between two steps, where memory is short.
    fn move_blocks(&mut self) {
        self.scheduler.plan_moves(&mut self.moves);
        if self.moves.is_empty() {
            return;
        }
        let moves: Vec<BlockMove> = self.moves.iter().map(block_move).collect();
        self.debtor.write_blocks(&moves);
        self.debtor.flush(&moves);
        self.settle_losses();
        self.scheduler.moved(&mut self.moves);
        self.debtor.place(self.moves.iter().map(block_move));
    }

    /// Takes rBlocks in that have come home by plan, and asks for more; how many
    /// came.
    fn bring_home(&mut self) -> usize {
        let mut came = 0;
        for landed in self.debtor.take_landed() {
            let (ticket, here) = match landed {
                Landed::Here(ticket) => {
                    let to = self.scheduler.landing(ticket);
                    (ticket, self.debtor.land(ticket, to) && to.is_some())
                }
                Landed::Refused(ticket) => (ticket, false),
            };
            came += usize::from(here);
            self.scheduler.landed(ticket, here);
        }
        let mut fetches = std::mem::take(&mut self.fetches);
        self.scheduler.next_fetches(|creditor| self.debtor.landing_slots(creditor), &mut fetches);
        for fetch in &fetches {
            if !self.debtor.fetch(fetch.ticket, fetch.creditor, fetch.loan, fetch.epoch, fetch.block) {
                self.scheduler.landed(fetch.ticket, false);
            }
        }
        self.fetches = fetches;
        came
    }

    /// Tells what the sequences hold, from time to time, so that moves are
    /// planned before memory runs out.
    fn report(&mut self) {
        let now = Instant::now();
        if now >= self.report_next && self.plans && self.scheduler.running() > 0 {
            self.report_next = now + REPORT_EVERY;
            self.treasury.report(self.scheduler.holdings(), self.scheduler.queue_needs());
        }
    }

    fn handle_asks(&mut self) {
        for ask in self.scheduler.drain_asks() {
            tracing::debug!(?ask, "the scheduler asks");
            match ask {
                Ask::Borrow { seq, blocks, apart_from, only: Some(only) } => {
                    self.treasury.borrow_blocks(seq, blocks, &apart_from, Some(only));
                }
                Ask::Borrow { seq, blocks, apart_from, only: None } => {
                    let avoid = self.doubts.ask(Instant::now(), seq, blocks, apart_from);
                    self.treasury.borrow_blocks(seq, blocks, &avoid, None);
                }
                Ask::Shrink { creditor, loan, keep } => self.treasury.shrink(creditor, loan, keep),
                Ask::Repay(loan) => self.treasury.repay(&loan),
                Ask::Fail { seq, message } => self.clients.fail(seq, message),
            }
        }
    }

    /// Hands on the grants whose lanes are all open.
    fn settle_grants(&mut self) {
        for (seq, loans) in std::mem::take(&mut self.opening) {
            let mut states = loans.iter().map(|l| (l.creditor, self.debtor.state(l.creditor)));
            if let Some((creditor, _)) = states.clone().find(|(_, s)| *s == LaneState::Absent) {
                loans.iter().for_each(|loan| self.treasury.repay(loan));
                self.scheduler.refused(seq, &format!("no lane to creditor {creditor}"));
            } else if states.all(|(_, s)| s == LaneState::Open) {
                self.scheduler.granted(seq, loans);
            } else {
                self.opening.push((seq, loans));
            }
        }
    }

    /// Takes in which creditors the debtor has lost. Their loans count as lost
    /// and are repaid: a creditor may be alive behind a lane that failed.
    fn settle_losses(&mut self) {
        for (creditor, reason) in self.debtor.finish_step() {
            self.treasury.creditor_failed(creditor, &reason);
            self.doubts.lane_failed(Instant::now(), creditor);
            self.scheduler.lose(creditor, None);
        }
    }

    /// Refuses the grants whose lanes are still being opened and that have part
    /// in a creditor's loans, or the one given, which are lost.
    fn drop_grants(&mut self, creditor: InstanceId, loan: Option<LoanId>) {
        for (seq, loans) in std::mem::take(&mut self.opening) {
            if loans.iter().any(|l| l.is(creditor, loan)) {
                loans.iter().for_each(|loan| self.treasury.repay(loan));
                self.scheduler.refused(seq, &format!("creditor {creditor} was lost"));
            } else {
                self.opening.push((seq, loans));
            }
        }
    }

    fn publish(&mut self) {
        let mut stats = self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        // Not before: in between they would be in no figure.
        self.shared.queued.fetch_sub(std::mem::take(&mut self.taken), Ordering::Relaxed);
        stats.running = self.scheduler.running();
        stats.waiting = self.scheduler.waiting();
        stats.wanted = self.scheduler.wanted();
        stats.blocks_borrowed = self.scheduler.borrowed();
        stats.preemptions = self.scheduler.preemptions();
        stats.cached_tokens = self.scheduler.cached_tokens();
        stats.recoveries = self.scheduler.recoveries();
        stats.recomputed_tokens = self.scheduler.recomputed_tokens();
        (stats.blocks_sent, stats.blocks_fetched) = self.scheduler.planned_moves();
        stats.unreplicated_blocks = self.scheduler.unreplicated();
        stats.perf = self.fit.model();
        stats.blocks_cached = self.prefix.lock().unwrap_or_else(PoisonError::into_inner).len();
    }
}
