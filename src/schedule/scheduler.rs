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

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::batch::{Batch, BatchItem, Spill};
use super::sequence::{HeldLoan, Phase, SeqId, Sequence};
use crate::kv::block_table::{BlockTable, Placement};
use crate::kv::entry::Owner;
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, LoanId};
use crate::kv::step::{AttnSeq, RowSlot};

/// Fewest local blocks with which a prompt that borrows can make progress: one
/// being filled while one leaves.
const MIN_LOCAL_BLOCKS: usize = 2;
/// Smallest loan asked for when a running sequence outgrows the pool.
const GROWTH_BLOCKS: usize = 8;
/// Most rBlocks moved between two steps.
const MAX_MOVES: usize = 8;

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
    config: SchedulerConfig,
    pool: Arc<KvPool>,
    prefix: Arc<Mutex<PrefixCache>>,
    waiting: VecDeque<Sequence>,
    /// Admitted, in order of admission; phases `Borrowing` and `Running`.
    admitted: Vec<Sequence>,
    asks: Vec<Ask>,
    /// rBlocks that creditors may have for us; 0 stops us from asking.
    lendable: usize,
    /// Admission failed for want of memory; not tried again until some is
    /// released or lent.
    blocked: bool,
    preemptions: u64,
    cached_tokens: u64,
    order: Vec<usize>,
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
            lendable: 0,
            blocked: false,
            preemptions: 0,
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
            phase: Phase::Waiting,
            loans: Vec::new(),
            borrowing: false,
            asked: 0,
            remote_goal: 0..0,
            local_goal: 0,
            cached_tokens: 0,
            hash: self.prefix().root(),
            hashed: 0,
        }
    }

    /// Queues a sequence.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
        self.blocked &= self.waiting.len() > 1;
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences admitted.
    pub fn running(&self) -> usize {
        self.admitted.len()
    }

    /// rBlocks that creditors hold for us.
    pub fn borrowed(&self) -> usize {
        self.admitted.iter().flat_map(|s| &s.loans).map(|l| l.blocks.len()).sum()
    }

    /// Sequences preempted so far.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Prompt tokens found in the prefix cache so far.
    pub fn cached_tokens(&self) -> u64 {
        self.cached_tokens
    }

    /// An admitted sequence.
    pub fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.admitted.iter().find(|s| s.id == seq)
    }

    /// Everything asked for since the last call.
    pub fn drain_asks(&mut self) -> impl Iterator<Item = Ask> + '_ {
        self.asks.drain(..)
    }

    /// Tells how many rBlocks creditors have free, by our latest knowledge.
    pub fn set_lendable(&mut self, blocks: usize) {
        if blocks > self.lendable {
            self.blocked = false;
        }
        self.lendable = blocks;
    }

    /// Memory may have come free by other hands (a loan repaid to us).
    pub fn memory_changed(&mut self) {
        self.blocked = false;
    }

    // ---- memory -------------------------------------------------------------

    fn prefix(&self) -> std::sync::MutexGuard<'_, PrefixCache> {
        // A panic while it was held leaves at worst blocks that are cached twice
        // or not at all; the rBlock table is the truth.
        self.prefix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn obtainable(&self) -> usize {
        self.pool.table().counts().free as usize + self.prefix().evictable(self.pool.table())
    }

    /// Local blocks that admitted sequences were promised and have not taken.
    fn promised(&self) -> usize {
        self.admitted.iter().map(|s| s.local_goal.saturating_sub(s.table.local())).sum()
    }

    /// Gives `admitted[index]` up to `blocks` more local blocks; how many.
    fn extend(&mut self, index: usize, blocks: usize) -> usize {
        let table = self.pool.table();
        let free = table.counts().free as usize;
        if free < blocks {
            self.prefix().evict(table, blocks - free);
        }
        let seq = &mut self.admitted[index];
        for done in 0..blocks {
            match table.alloc(Owner::Sequence(seq.id as u32)) {
                Some(block) => seq.table.push(Placement::Local(block)),
                None => return done,
            }
        }
        blocks
    }

    fn free_blocks(&mut self, seq: &mut Sequence) {
        for placement in seq.table.drain() {
            if let Placement::Local(block) = placement {
                let released = self.pool.table().release(block);
                debug_assert!(released.is_ok(), "a sequence's blocks are held by it: {released:?}");
            }
        }
        self.asks.extend(seq.loans.drain(..).map(Ask::Repay));
        self.blocked = false;
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

    /// Sequences with a loan of `creditor`'s: any, or the one given.
    pub fn using(&self, creditor: InstanceId, loan: Option<LoanId>) -> Vec<SeqId> {
        let uses = |l: &HeldLoan| l.creditor == creditor && loan.is_none_or(|loan| l.loan == loan);
        self.admitted.iter().filter(|s| s.loans.iter().any(uses)).map(|s| s.id).collect()
    }

    // ---- borrowing ----------------------------------------------------------

    /// The answer to [`Ask::Borrow`]. Loans for a sequence that is gone are
    /// repaid at once.
    pub fn granted(&mut self, seq: SeqId, loans: Vec<HeldLoan>) {
        let Some(s) = self.admitted.iter_mut().find(|s| s.id == seq && s.borrowing) else {
            self.asks.extend(loans.into_iter().map(Ask::Repay));
            return;
        };
        s.borrowing = false;
        let blocks: usize = loans.iter().map(|l| l.blocks.len()).sum();
        s.loans.extend(loans);
        if s.phase == Phase::Borrowing {
            s.phase = Phase::Running;
            let cached = s.table.len();
            s.remote_goal = cached..cached + blocks;
        }
    }

    /// Nobody lends what was asked for. `reason` is for the client, should it
    /// come to that.
    pub fn refused(&mut self, seq: SeqId, reason: &str) {
        let alone = self.admitted.len() == 1;
        let available = self.obtainable().saturating_sub(self.promised());
        let pool_blocks = self.pool.blocks() as usize;
        let Some(index) = self.admitted.iter().position(|s| s.id == seq && s.borrowing) else { return };
        let s = &mut self.admitted[index];
        s.borrowing = false;
        if s.phase != Phase::Borrowing {
            if s.asked > 1 {
                // Nobody has that much; one block is better than none.
                s.borrowing = true;
                s.asked = 1;
                self.asks.push(Ask::Borrow { seq, blocks: 1 });
                return;
            }
            // Not asked again until creditors are heard of anew.
            self.lendable = 0;
            if alone && available == 0 && s.table.missing(s.computed + 1) > 0 {
                let message = format!("out of KV memory at {} tokens: {reason}", s.computed);
                self.fail(seq, message);
            }
            return;
        }
        // The first ask left a share of the pool to others. If nobody has that
        // much, ask for what we cannot do without.
        let need = self.pool.shape().blocks_for(s.tokens.len() + 1);
        let before = need - s.table.len() - s.local_goal.saturating_sub(s.table.len());
        let local = s.local_goal + available;
        let least = need.saturating_sub(local);
        if least < before && least > 0 {
            s.local_goal = local;
            s.borrowing = true;
            self.asks.push(Ask::Borrow { seq, blocks: least });
        } else if alone {
            let message = format!(
                "the prompt needs {need} rBlocks of KV memory; this node has {pool_blocks}, and borrowing failed: {reason}"
            );
            self.fail(seq, message);
        } else {
            let mut s = self.admitted.remove(index);
            self.free_blocks(&mut s);
            self.reset(&mut s);
            self.waiting.push_front(s);
            self.blocked = true;
        }
    }

    fn fail(&mut self, seq: SeqId, message: String) {
        self.remove(seq);
        self.asks.push(Ask::Fail { seq, message });
    }

    fn reset(&self, s: &mut Sequence) {
        s.phase = Phase::Waiting;
        s.computed = 0;
        s.borrowing = false;
        s.remote_goal = 0..0;
        s.local_goal = 0;
        s.hashed = 0;
        s.hash = self.prefix().root();
    }

    // ---- admission ----------------------------------------------------------

    fn admit(&mut self) {
        let mut reuse = true;
        while !self.blocked && self.admitted.len() < self.config.max_sequences {
            let Some(mut s) = self.waiting.pop_front() else { return };
            let need = self.pool.shape().blocks_for(s.tokens.len() + 1);
            if !s.prompt_logits && std::mem::replace(&mut reuse, true) {
                let (cached, hash) = self.prefix().lookup(self.pool.table(), &s.tokens[..s.tokens.len() - 1]);
                s.hashed = cached.len();
                s.hash = hash;
                cached.into_iter().for_each(|block| s.table.push(Placement::Local(block)));
                s.computed = s.table.capacity();
                if s.tokens.len() == s.prompt_len {
                    s.cached_tokens = s.computed;
                }
            }
            let missing = need - s.table.len();
            let available = self.obtainable().saturating_sub(self.promised());
            let pool_blocks = self.pool.blocks() as usize;
            if missing <= available {
                s.local_goal = need;
                s.phase = Phase::Running;
            } else if self.lendable > 0 && available >= MIN_LOCAL_BLOCKS {
                let share = available.saturating_sub(pool_blocks / 4).max(MIN_LOCAL_BLOCKS);
                s.local_goal = s.table.len() + share;
                s.phase = Phase::Borrowing;
                s.borrowing = true;
                self.asks.push(Ask::Borrow { seq: s.id, blocks: missing - share });
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
                if alone && self.lendable == 0 && self.pool.table().counts().lent == 0 {
                    let message = format!(
                        "the prompt needs {need} rBlocks of KV memory; this node has {pool_blocks} and nobody lends"
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

    /// rBlocks to move to creditors before the next step, because memory is
    /// short here; asks for loans where there are none to move them to. The
    /// caller moves the bytes, then calls [`moved`](Self::moved).
    pub fn plan_moves(&mut self, spills: &mut Vec<Spill>) {
        spills.clear();
        let needed: usize =
            self.admitted.iter().filter(|s| s.phase == Phase::Running).map(|s| s.table.missing(s.computed + 1)).sum();
        let low_water = self.admitted.len().max(2) as isize;
        let enough = |blocks: usize| blocks as isize - needed as isize >= low_water;
        // What the prefix cache could give back is counted one by one: only
        // where it matters.
        if self.admitted.is_empty() || enough(self.pool.table().counts().free as usize) {
            return;
        }
        let obtainable = self.obtainable();
        if enough(obtainable) {
            return;
        }
        let headroom = obtainable as isize - needed as isize;
        let mut wanted = if headroom < 0 { headroom.unsigned_abs().min(MAX_MOVES) } else { 0 };
        self.order.clear();
        self.order.extend(0..self.admitted.len());
        let admitted = &self.admitted;
        self.order.sort_by_key(|&i| std::cmp::Reverse(admitted[i].table.local()));
        let block_tokens = self.pool.shape().block_tokens as usize;
        let mut ask = None;
        for &index in &self.order {
            let s = &mut self.admitted[index];
            if s.phase != Phase::Running {
                continue;
            }
            let complete = s.computed / block_tokens;
            // From the end: what others share is at the beginning.
            let mut candidates = (0..complete.min(s.table.len())).rev().filter_map(|i| match s.table.blocks()[i] {
                Placement::Local(block) if !s.remote_goal.contains(&i) => Some((i, block)),
                _ => None,
            });
            let mut chosen = Vec::new();
            let room = s.unassigned();
            while wanted > 0 && chosen.len() < room {
                let Some(candidate) = candidates.next() else { break };
                chosen.push(candidate);
                wanted -= 1;
            }
            if ask.is_none() && room == chosen.len() && !s.borrowing && candidates.next().is_some() {
                ask = Some(index);
            }
            spills.extend(chosen.into_iter().filter_map(|(i, local)| spill(s, i, local, block_tokens)));
        }
        if let Some(index) = ask
            && self.lendable > 0
        {
            let s = &mut self.admitted[index];
            let most = self.pool.shape().blocks_for(s.limit).saturating_sub(s.table.len()).max(1);
            let blocks = GROWTH_BLOCKS.max(s.table.len() / 8).min(most).max(wanted);
            s.borrowing = true;
            s.asked = blocks;
            self.asks.push(Ask::Borrow { seq: s.id, blocks });
        }
    }

    /// The rBlocks' bytes are with their creditors: from now on they are
    /// attended to there, and their local blocks are free.
    pub fn moved(&mut self, spills: &[Spill]) {
        for spill in spills {
            let Some(s) = self.admitted.iter_mut().find(|s| s.id == spill.seq) else { continue };
            if let Some(loan) = s.loans.iter_mut().find(|l| l.creditor == spill.creditor && l.loan == spill.loan) {
                loan.placed += 1;
            }
            if let Some(Placement::Local(block)) = s.table.replace(spill.index, spill.placement()) {
                let released = self.pool.table().release(block);
                debug_assert!(released.is_ok(), "a sequence's blocks are held by it: {released:?}");
            }
            s.local_goal = s.local_goal.max(s.table.local());
        }
    }

    /// Fills `batch` with the next step; leaves it empty where nothing can be
    /// computed now. Preempts if that is for want of memory and nobody was
    /// asked for more.
    pub fn next_batch(&mut self, batch: &mut Batch) {
        loop {
            self.admit();
            self.fill(batch);
            let stuck = batch.is_empty() && self.admitted.iter().any(|s| s.phase == Phase::Running);
            if !stuck || self.admitted.iter().any(|s| s.borrowing) {
                return;
            }
            self.preempt();
        }
    }

    fn preempt(&mut self) {
        let Some(index) = self.admitted.iter().rposition(|s| s.phase == Phase::Running) else { return };
        if self.admitted.len() == 1 {
            let s = &self.admitted[index];
            let message = format!(
                "out of KV memory at {} tokens: this node has {} rBlocks and nobody lends more",
                s.computed,
                self.pool.blocks()
            );
            let seq = s.id;
            self.fail(seq, message);
            return;
        }
        let mut s = self.admitted.remove(index);
        tracing::info!(seq = s.id, tokens = s.computed, "preempted for want of KV memory");
        self.free_blocks(&mut s);
        self.reset(&mut s);
        self.waiting.push_front(s);
        // Those that stay come first; what this one freed is theirs.
        self.blocked = true;
        self.preemptions += 1;
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
        let (start, remaining) = (s.computed, s.remaining());
        let mut rows = rows;
        if remaining > 1 {
            if s.prompt_logits {
                rows = rows.min(self.config.max_logits.saturating_sub(batch.logit_rows.len()));
            }
            // Not beyond what was promised, so that the others get theirs.
            let allowed = s.local_goal.saturating_sub(s.table.local()).max(1);
            rows = rows.min((s.table.len() + allowed) * block_tokens - start);
            if rows < remaining {
                // A chunk that is not the last ends with a whole block.
                let aligned = (start + rows) / block_tokens * block_tokens;
                rows = if aligned > start { aligned - start } else { rows };
            }
        }
        if rows == 0 || (rows == remaining && batch.logit_rows.len() >= self.config.max_logits) {
            return 0;
        }
        let missing = s.table.missing(start + rows);
        if missing > 0 {
            self.extend(index, missing);
            rows = rows.min(self.admitted[index].table.capacity() - start);
        }
        if rows == 0 {
            return 0;
        }
        let s = &mut self.admitted[index];
        s.local_goal = s.local_goal.max(s.table.local());
        let (row, end) = (batch.tokens.len() as u32, start + rows);
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
        if s.prompt_logits && start < s.prompt_len {
            batch.logit_rows.extend(row..row + rows as u32);
        } else if end == s.tokens.len() {
            batch.logit_rows.push(row + rows as u32 - 1);
        }
        let logits = logits_from..batch.logit_rows.len() as u32;
        batch.items.push(BatchItem { seq: s.id, rows: row..row + rows as u32, position: start as u32, logits });

        for i in start / block_tokens..end / block_tokens {
            if s.remote_goal.contains(&i)
                && let Placement::Local(local) = s.table.blocks()[i]
            {
                batch.spills.extend(spill(s, i, local, block_tokens));
            }
        }
        rows
    }

    /// The step was computed and its spills have arrived.
    pub fn complete(&mut self, batch: &Batch) {
        for item in &batch.items {
            if let Some(s) = self.admitted.iter_mut().find(|s| s.id == item.seq) {
                s.computed += item.rows.len();
            }
        }
        self.moved(&batch.spills);
        for item in &batch.items {
            self.share(item.seq);
        }
    }

    /// Offers a sequence's newly completed local blocks for prefix reuse.
    fn share(&mut self, seq: SeqId) {
        let Some(s) = self.admitted.iter_mut().find(|s| s.id == seq) else { return };
        let block_tokens = s.table.block_tokens() as usize;
        if s.hashed >= s.computed / block_tokens {
            return;
        }
        let mut prefix = self.prefix.lock().unwrap_or_else(PoisonError::into_inner);
        for i in s.hashed..s.computed / block_tokens {
            let tokens = &s.tokens[i * block_tokens..(i + 1) * block_tokens];
            s.hash = match s.table.blocks()[i] {
                Placement::Local(block) => prefix.insert(self.pool.table(), s.hash, tokens, block).0,
                Placement::Remote { .. } => s.hash.then(tokens),
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

/// Promises the next granted block of the sequence to its block `index`.
fn spill(s: &mut Sequence, index: usize, local: crate::kv::entry::BlockRef, block_tokens: usize) -> Option<Spill> {
    let (loan, block) = s.assign()?;
    let loan = &s.loans[loan];
    Some(Spill {
        seq: s.id,
        index,
        local,
        creditor: loan.creditor,
        loan: loan.loan,
        block,
        position: (index * block_tokens) as u32,
        tokens: block_tokens as u32,
    })
}
