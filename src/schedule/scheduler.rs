//! The scheduler: decides, step by step, which tokens are computed and where
//! their KV goes.
//!
//! *Decode first*: every running sequence with one token to compute gets its
//! row. What is left of the step, up to the chunk size, is shared evenly among
//! the prompts being computed, shortest first, so that a short prompt is done
//! in a few steps whatever long one runs beside it.
//!
//! *Memory*: a sequence is admitted when its prompt fits, here or, for a part
//! of it, with creditors. The part with creditors is the beginning: its rBlocks
//! are computed into local blocks and leave layer by layer while the step runs,
//! so the same local blocks serve chunk after chunk and in the end hold the
//! prompt's tail. When sequences outgrow the pool while decoding, whole rBlocks
//! of the one that holds most move to a creditor between two steps. Only if
//! nobody lends is the youngest sequence preempted, to be computed again later.
//!
//! *Recovery* (`recovery.rs`): a sequence that loses KV with a creditor computes
//! the lost token ranges again, before anything else, and goes on.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{Batch, BatchItem};
use super::errands::Errands;
use super::gaps::Gaps;
use super::memory::MIN_LOCAL_BLOCKS;
use super::sequence::{HeldLoan, Phase, SeqId, Sequence};
use crate::kv::block_table::{BlockTable, Placement};
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, LoanId};
use crate::kv::step::{AttnSeq, RowSlot};

/// Turns for which a sequence that is alone waits for memory of others before it
/// gives up what it holds.
const PATIENCE: u32 = 200;

/// Limits of a scheduler.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerConfig {
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most prompt rows of a step.
    pub chunk_rows: usize,
    /// Most rows of logits of a step.
    pub max_logits: usize,
    /// Most sequences at once.
    pub max_sequences: usize,
    /// Creditors that each lent block is written to: 1, or 2 so that one may be
    /// lost without anything being computed again.
    pub replicas: usize,
    /// Most rBlocks that planned moves take in one step; 0 for no such moves.
    pub move_blocks: usize,
}

/// What the scheduler wants of the world outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// rBlocks from creditors, answered by [`Scheduler::granted`] or
    /// [`Scheduler::refused`].
    Borrow {
        /// For this sequence.
        seq: SeqId,
        /// How many.
        blocks: usize,
        /// Not from these.
        apart_from: Vec<InstanceId>,
        /// From this one alone, where one is named.
        only: Option<InstanceId>,
    },
    /// Of a loan only its first `keep` blocks are needed still.
    Shrink {
        /// Whose.
        creditor: InstanceId,
        /// Which.
        loan: LoanId,
        /// How many, at least 1.
        keep: usize,
    },
    /// A loan is not needed any more.
    Repay(HeldLoan),
    /// A sequence cannot go on; it is gone from the scheduler.
    Fail {
        /// Which.
        seq: SeqId,
        /// Why, for the client.
        message: String,
    },
}

/// The scheduler. See the module's page.
pub struct Scheduler {
    pub(super) config: SchedulerConfig,
    pub(super) pool: Arc<KvPool>,
    pub(super) prefix: Arc<Mutex<PrefixCache>>,
    pub(super) waiting: VecDeque<Sequence>,
    /// Admitted, in order of admission; phases `Borrowing` and `Running`.
    pub(super) admitted: Vec<Sequence>,
    pub(super) asks: Vec<Ask>,
    pub(super) errands: Errands,
    /// rBlocks that creditors may have for us; 0 stops us from asking.
    pub(super) lendable: usize,
    /// What we were told of that last.
    reported: usize,
    /// rBlocks that creditors lend at most.
    lend_cap: usize,
    /// What was alone here was refused what the cluster could hold: it is tried
    /// again with the next news.
    pub(super) refused_alone: bool,
    /// Of `lendable`, what creditors have that have no prompt waiting.
    spare: usize,
    /// rBlocks to keep free here for another instance's prompt.
    hold: usize,
    /// Admission failed for want of memory; not tried again until some is
    /// released or lent.
    pub(super) blocked: bool,
    pub(super) preemptions: u64,
    pub(super) recoveries: u64,
    recomputed_tokens: u64,
    cached_tokens: u64,
    pub(super) order: Vec<usize>,
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { waiting, admitted, lendable, blocked, .. } = self;
        let mut f = f.debug_struct("Scheduler");
        f.field("waiting", waiting).field("admitted", admitted).field("lendable", lendable);
        f.field("blocked", blocked).finish_non_exhaustive()
    }
}

impl Scheduler {
    /// An idle scheduler over `pool`.
    pub fn new(config: SchedulerConfig, pool: Arc<KvPool>, prefix: Arc<Mutex<PrefixCache>>) -> Self {
        assert!(config.max_sequences <= config.max_logits && config.chunk_rows <= config.max_rows);
        Self {
            config,
            pool,
            prefix,
            waiting: VecDeque::new(),
            admitted: Vec::new(),
            asks: Vec::new(),
            errands: Errands::new(config.move_blocks),
            lendable: 0,
            reported: 0,
            lend_cap: 0,
            refused_alone: false,
            spare: usize::MAX,
            hold: 0,
            blocked: false,
            preemptions: 0,
            recoveries: 0,
            recomputed_tokens: 0,
            cached_tokens: 0,
            order: Vec::new(),
        }
    }

    /// A sequence that has computed nothing yet.
    pub fn sequence(&self, id: SeqId, prompt: Vec<u32>, limit: usize, prompt_logits: bool) -> Sequence {
        let block_tokens = self.pool.shape().block_tokens;
        Sequence {
            id,
            prompt_len: prompt.len(),
            table: BlockTable::new(block_tokens, limit.div_ceil(block_tokens as usize)),
            tokens: prompt,
            limit,
            prompt_logits,
            computed: 0,
            gaps: Gaps::default(),
            phase: Phase::Waiting,
            loans: Vec::new(),
            borrowing: false,
            stuck: 0,
            asked: 0,
            planned: false,
            local_goal: 0,
            cached_tokens: 0,
            short: false,
            copying: Vec::new(),
            copy_asked: None,
            step: 0..0,
            redo: 0,
            hash: self.prefix().root(),
            hashed: 0,
        }
    }

    /// Queues a sequence.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
        self.blocked &= self.waiting.len() > 1;
    }

    /// Takes a sequence out and frees all it has. `None`: it is not here.
    pub fn remove(&mut self, seq: SeqId) -> Option<Sequence> {
        let mut found = match self.admitted.iter().position(|s| s.id == seq) {
            Some(index) => self.admitted.remove(index),
            None => {
                let index = self.waiting.iter().position(|s| s.id == seq)?;
                self.waiting.remove(index)?
            }
        };
        self.free_blocks(&mut found);
        Some(found)
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences admitted.
    pub fn running(&self) -> usize {
        self.admitted.len()
    }

    /// rBlocks that creditors hold for us, copies included.
    pub fn borrowed(&self) -> usize {
        let blocks = |l: &HeldLoan| l.blocks.len() + l.copies.iter().map(|c| c.blocks.len()).sum::<usize>();
        self.admitted.iter().flat_map(|s| s.loans.iter().chain(&s.copying)).map(blocks).sum()
    }

    /// rBlocks that lie with one creditor only, although each is to lie with
    /// two.
    pub fn unreplicated(&self) -> usize {
        if self.config.replicas < 2 {
            return 0;
        }
        self.admitted.iter().flat_map(|s| &s.loans).map(HeldLoan::uncopied).sum()
    }

    /// How often a sequence has lost KV and gone on, so far.
    pub fn recoveries(&self) -> u64 {
        self.recoveries
    }

    /// Tokens computed again so far because their KV was lost.
    pub fn recomputed_tokens(&self) -> u64 {
        self.recomputed_tokens
    }

    /// Sequences preempted so far.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Prompt tokens found in the prefix cache so far.
    pub fn cached_tokens(&self) -> u64 {
        self.cached_tokens
    }

    pub(super) fn fail(&mut self, seq: SeqId, message: String) {
        self.remove(seq);
        self.asks.push(Ask::Fail { seq, message });
    }

    /// An admitted sequence.
    pub fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.admitted.iter().find(|s| s.id == seq)
    }

    /// Everything asked for since the last call.
    pub fn drain_asks(&mut self) -> impl Iterator<Item = Ask> + '_ {
        self.asks.drain(..)
    }

    /// Tells how many rBlocks creditors have free, by our latest knowledge, and
    /// how many they lend at most.
    pub fn set_lendable(&mut self, blocks: usize, cap: usize) {
        if blocks > self.reported || cap != self.lend_cap || std::mem::take(&mut self.refused_alone) {
            self.blocked = false;
        }
        (self.lendable, self.reported, self.lend_cap) = (blocks, blocks, cap);
    }

    /// Tells what others wait for: of the lendable rBlocks `spare` are with
    /// creditors that have no prompt waiting; and `hold` are to be kept free
    /// here, because a prompt elsewhere is too long for its instance and waits
    /// for all of us. Without a word all is spare and none to be kept.
    pub fn set_slack(&mut self, spare: usize, hold: usize) {
        if spare > self.spare || hold < self.hold {
            self.blocked = false;
        }
        (self.spare, self.hold) = (spare, hold);
    }

    /// rBlocks that the first waiting prompt needs of creditors, being too long
    /// for this instance; 0 where it is not.
    pub fn wanted(&self) -> usize {
        let pool = self.pool.blocks() as usize;
        let need = self.waiting.front().map_or(0, |s| self.pool.shape().blocks_for(s.tokens.len() + 1));
        if need > pool { need - (pool - pool / 4) } else { 0 }
    }

    /// rBlocks that this instance and its creditors have at most, whoever uses
    /// them now: what needs more can never run.
    pub(super) fn reach(&self) -> usize {
        self.pool.blocks() as usize + self.lend_cap
    }

    /// Memory may have come free by other hands (a loan repaid to us).
    pub fn memory_changed(&mut self) {
        self.blocked = false;
    }

    // ---- admission ----------------------------------------------------------

    fn admit(&mut self) {
        let mut reuse = true;
        while !self.blocked && self.admitted.len() < self.config.max_sequences {
            let Some(mut s) = self.waiting.pop_front() else { return };
            let need = self.pool.shape().blocks_for(s.tokens.len() + 1);
            if !s.prompt_logits && std::mem::replace(&mut reuse, true) {
                let mut reusable = s.tokens.len() - 1;
                if need > self.pool.blocks() as usize {
                    // Not so much that the rest could not be computed here.
                    let most = (self.pool.blocks() as usize).saturating_sub(MIN_LOCAL_BLOCKS);
                    reusable = reusable.min(most * s.table.block_tokens() as usize);
                }
                let (cached, hash) = self.prefix().lookup(self.pool.table(), &s.tokens[..reusable]);
                s.hashed = cached.len();
                s.hash = hash;
                cached.into_iter().for_each(|block| s.table.push(Placement::Local(block)));
                s.computed = s.table.capacity();
                if s.tokens.len() == s.prompt_len {
                    s.cached_tokens = s.computed;
                }
            }
            let missing = need - s.table.len();
            let promised = self.promised();
            let available = self.obtainable_up_to(missing + self.hold + promised).saturating_sub(promised);
            let pool_blocks = self.pool.blocks() as usize;
            let first = self.admitted.is_empty();
            // What is kept for a long prompt elsewhere is not for those that
            // would fit at any time, or it would never find enough. Whoever is
            // idle goes on all the same.
            let hold = if first { 0 } else { self.hold };
            // Of a borrowed prompt what is kept here carries its chunks as well:
            // with less than a chunk's worth each step computes a few rows only,
            // for as long as the prompt lasts. So rather a little later.
            let chunk = (self.config.chunk_rows / s.table.block_tokens() as usize).max(MIN_LOCAL_BLOCKS);
            let share = available.saturating_sub(pool_blocks / 4).max(chunk.min(available));
            let room =
                available >= if first { MIN_LOCAL_BLOCKS } else { chunk.min(pool_blocks / 4).max(MIN_LOCAL_BLOCKS) };
            // What fits here once others are done waits for that, unless there
            // is a creditor who has no use for the memory: where all have
            // prompts waiting, borrowing lets one in, keeps another out, and
            // adds an exchange to each of its steps.
            let worth = first || need > pool_blocks || missing.saturating_sub(share) <= self.spare;
            if missing + hold <= available {
                s.local_goal = need;
                s.phase = Phase::Running;
            } else if self.lendable > 0 && room && worth && hold == 0 {
                s.local_goal = s.table.len() + share;
                s.phase = Phase::Borrowing;
                self.asks.push(s.ask(missing - share));
            } else {
                let alone = self.admitted.is_empty();
                let cached = !s.table.is_empty();
                self.free_blocks(&mut s);
                self.reset(&mut s);
                if alone && cached {
                    // What it would reuse fills the pool, and nobody will make
                    // room beside it: without, the cache gives way.
                    reuse = false;
                    self.waiting.push_front(s);
                    continue;
                }
                if alone && need > self.reach() {
                    let message = format!(
                        "the prompt needs {need} rBlocks of KV memory; this node has {pool_blocks}, others lend at most {}",
                        self.lend_cap
                    );
                    self.asks.push(Ask::Fail { seq: s.id, message });
                    continue;
                }
                self.waiting.push_front(s);
                self.blocked = true;
                return;
            }
            self.cached_tokens += s.computed as u64;
            self.admitted.push(s);
        }
    }

    // ---- a step -------------------------------------------------------------

    /// Fills `batch` with the next step; leaves it empty where nothing can be
    /// computed now. Preempts if that is for want of memory and nobody was
    /// asked for more. The caller computes the step, tells of creditors that
    /// were lost meanwhile ([`lose`](Self::lose)), then calls
    /// [`complete`](Self::complete).
    pub fn next_batch(&mut self, batch: &mut Batch) {
        loop {
            self.recover();
            self.admit();
            self.fill(batch);
            let stuck = batch.is_empty() && self.admitted.iter().any(|s| s.phase == Phase::Running);
            if !stuck || self.admitted.iter().any(|s| s.borrowing) {
                self.send_planned(batch);
                return;
            }
            if !self.preempt() {
                return;
            }
        }
    }

    /// Nothing that is admitted has room for its next token. False: it waits.
    fn preempt(&mut self) -> bool {
        let Some(index) = self.admitted.iter().rposition(|s| s.phase == Phase::Running) else { return false };
        let alone = self.admitted.len() == 1;
        let reach = self.reach();
        let s = &mut self.admitted[index];
        let need = self.pool.shape().blocks_for(s.computed + 1);
        if !alone {
            tracing::info!(seq = s.id, tokens = s.computed, "preempted for want of KV memory");
            self.put_back(index);
            self.preemptions += 1;
        } else if need > reach && s.gaps.is_empty() {
            let message = format!(
                "out of KV memory at {} tokens: this node has {} rBlocks and others lend at most {}",
                s.computed,
                self.pool.blocks(),
                self.lend_cap
            );
            let seq = s.id;
            self.fail(seq, message);
        } else if s.stuck < PATIENCE && s.gaps.is_empty() {
            // Others use what it needs, and will be done.
            s.stuck += 1;
            return false;
        } else {
            // They may be waiting for what it holds.
            self.begin_anew(index);
            (self.blocked, self.refused_alone) = (true, true);
        }
        true
    }

    fn fill(&mut self, batch: &mut Batch) {
        batch.clear();
        for index in 0..self.admitted.len() {
            let s = &self.admitted[index];
            if s.phase == Phase::Running && s.remaining() == 1 && batch.tokens.len() < self.config.max_rows {
                self.add_rows(batch, index, 1);
            }
        }
        self.order.clear();
        let prefilling = |s: &Sequence| s.phase == Phase::Running && s.remaining() > 1;
        let admitted = &self.admitted;
        self.order.extend((0..admitted.len()).filter(|&i| prefilling(&admitted[i])));
        self.order.sort_by_key(|&i| admitted[i].remaining());
        let mut budget = self.config.chunk_rows.min(self.config.max_rows - batch.tokens.len());
        for position in 0..self.order.len() {
            let (index, left) = (self.order[position], self.order.len() - position);
            let rows = (budget / left).min(self.admitted[index].remaining());
            budget -= self.add_rows(batch, index, rows);
        }
    }

    /// Adds up to `rows` rows of `admitted[index]`, as many as memory and
    /// logits allow; how many.
    fn add_rows(&mut self, batch: &mut Batch, index: usize, rows: usize) -> usize {
        let block_tokens = self.pool.shape().block_tokens as usize;
        let s = &self.admitted[index];
        let (next, again, decoding) = (s.next(), !s.gaps.is_empty(), s.remaining() == 1);
        let start = next.start;
        let mut rows = rows.min(next.len());
        if !decoding {
            if s.prompt_logits && !again {
                rows = rows.min(self.config.max_logits.saturating_sub(batch.logit_rows.len()));
            }
            // Not beyond what was promised, so that the others get theirs.
            let allowed = s.local_goal.saturating_sub(s.table.local()).max(1);
            rows = s.table.reach(start..start + rows, allowed) - start;
            if rows < next.len() {
                // A chunk that is not the last ends with a whole block.
                let aligned = (start + rows) / block_tokens * block_tokens;
                rows = if aligned > start { aligned - start } else { rows };
            }
        }
        let ends = |rows: usize| !again && rows == next.len();
        if rows == 0 || (ends(rows) && batch.logit_rows.len() >= self.config.max_logits) {
            return 0;
        }
        rows = self.extend(index, start..start + rows) - start;
        if rows == 0 {
            return 0;
        }
        let s = &mut self.admitted[index];
        s.local_goal = s.local_goal.max(s.table.local());
        let (row, end) = (batch.tokens.len() as u32, start + rows);
        s.step = start..end;
        batch.tokens.extend_from_slice(&s.tokens[start..end]);
        for position in start..end {
            let Some((Placement::Local(block), offset)) = s.table.slot(position) else {
                unreachable!("blocks are filled here before they go anywhere");
            };
            batch.slots.push(RowSlot { position: position as u32, block: block.index, offset });
        }
        let run = batch.runs.len() as u32;
        batch.runs.extend(s.table.local_runs(end));
        let runs = batch.runs.len() as u32 - run;
        batch.seqs.push(AttnSeq { row, rows: rows as u32, position: start as u32, run, runs });

        let logits_from = batch.logit_rows.len() as u32;
        if again {
            // They were looked at when the tokens were computed first.
        } else if s.prompt_logits && start < s.prompt_len {
            batch.logit_rows.extend(row..row + rows as u32);
        } else if end == s.tokens.len() {
            batch.logit_rows.push(row + rows as u32 - 1);
        }
        let logits = logits_from..batch.logit_rows.len() as u32;
        batch.items.push(BatchItem { seq: s.id, rows: row..row + rows as u32, position: start as u32, logits, again });

        // What was lent goes to what is computed first. While a sequence decodes
        // its blocks stay, until memory is short (`plan_moves`).
        let whole = if decoding { 0..0 } else { start / block_tokens..end / block_tokens };
        for i in whole {
            if let Placement::Local(local) = s.table.blocks()[i]
                && let Some(ways) = s.spill(i, local)
            {
                batch.spills.extend(ways.into_iter().flatten());
            }
        }
        rows
    }

    /// The step was computed and its spills have been written. Takes out of
    /// `batch` the items that a loss has undone, whose rows and logits mean
    /// nothing, and the spills that lead nowhere any more; the others count.
    pub fn complete(&mut self, batch: &mut Batch) {
        batch.items.retain(|item| {
            let found = self.admitted.iter_mut().find(|s| s.id == item.seq);
            let Some(s) = found.filter(|s| !s.step.is_empty()) else { return false };
            let Range { start, end } = std::mem::take(&mut s.step);
            if item.again {
                s.gaps.fill(end - start);
                self.recomputed_tokens += (end - start) as u64;
            } else {
                (s.computed, s.stuck) = (end, 0);
                self.recomputed_tokens += s.redo.min(end).saturating_sub(start) as u64;
            }
            true
        });
        let Batch { items, spills, .. } = batch;
        spills.retain(|spill| items.iter().any(|item| item.seq == spill.seq));
        self.moved(spills);
        for item in &batch.items {
            self.share(item.seq);
        }
    }

    /// Offers a sequence's newly completed local blocks for prefix reuse.
    fn share(&mut self, seq: SeqId) {
        let Some(s) = self.admitted.iter_mut().find(|s| s.id == seq) else { return };
        let block_tokens = s.table.block_tokens() as usize;
        // Blocks computed again were hashed the first time.
        if s.hashed >= s.computed / block_tokens {
            return;
        }
        let mut prefix = self.prefix.lock().unwrap_or_else(PoisonError::into_inner);
        for i in s.hashed..s.computed / block_tokens {
            let tokens = &s.tokens[i * block_tokens..(i + 1) * block_tokens];
            s.hash = match s.table.blocks()[i] {
                Placement::Local(block) => prefix.insert(self.pool.table(), s.hash, tokens, block).0,
                Placement::Remote { .. } | Placement::Missing => s.hash.then(tokens),
            };
            s.hashed = i + 1;
        }
    }

    /// Appends a generated token.
    pub fn push_token(&mut self, seq: SeqId, token: u32) {
        if let Some(s) = self.admitted.iter_mut().find(|s| s.id == seq) {
            s.tokens.push(token);
        }
    }
}
