//! The lock-free rBlock table: who has which physical block.
//!
//! One 64-bit entry a block ([`Entry`]), changed by compare-and-swap:
//!
//! ```text
//! Free ─ alloc ──→ Held ⇄ Moving ────────────→ Free      local sequences, prefix cache
//! Free ─ reserve → Reserved → Filling → Live → Free      a debtor's loan
//! ```
//!
//! Free blocks are stacks threaded through `next`, each head tagged so that a
//! head seen before a pause is never mistaken for the same head after. There
//! are several, and a thread begins at its own: with one for all, its cache
//! line was most of an allocation's cost (see `benches/RESULTS.md`). No lock,
//! no hash, no allocation; a block's bytes are touched only by whoever the
//! entry names, so nothing needs to be reclaimed later.
//!
//! Two orders carry the proof. *Freeing*: entry to Free (one caller wins) →
//! push → count up. *Allocating*: count down → pop → entry to its new state.
//! So a stack's count never promises a block that is not on it, and taking
//! `n` is all or nothing: whoever got the counts gets the blocks.

pub use super::entry::{BlockRef, Owner, State, TableError};
use super::entry::{Entry, GENERATION_MASK, MAX_REFS};
use super::rblock::{BlockIndex, LoanId};
use super::sync::{AtomicU32, AtomicU64, Ordering, SHARDS, home, spin_loop};

/// End of the free list.
const NIL: u32 = u32::MAX;
/// Blocks taken from the free list at once: bounds what a lost race repeats.
const POP_AT_ONCE: u32 = 64;
/// How often an allocation of several blocks tries to put them together while
/// others, which may also be short, hold what it lacks.
const CLAIM_TRIES: u32 = 16;

/// A cache line of its own (two: the prefetcher pulls them in pairs).
#[repr(align(128))]
struct Line<T>(T);

/// Blocks by what they do. Exact once no call is in progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub total: u32,
    /// Nobody's.
    pub free: u32,
    /// Held by local sequences or the prefix cache.
    pub held: u32,
    /// Granted to debtors, nothing in them yet.
    pub reserved: u32,
    /// Debtors' blocks with something in them.
    pub lent: u32,
}

/// Who has which block. Shared by every thread of a node.
pub struct RBlockTable {
    entries: Box<[AtomicU64]>,
    /// Of a free block: the next on the stack.
    next: Box<[AtomicU32]>,
    shards: Box<[Line<Shard>]>,
    reserved: Line<AtomicU32>,
    lent: AtomicU32,
}

/// One stack of free blocks.
struct Shard {
    /// Tag (high half, counts every change) and index of the top block.
    head: AtomicU64,
    /// Blocks on the stack that nobody has claimed.
    free: AtomicU32,
}

impl RBlockTable {
    /// A table of `blocks` free blocks. Allocated in ascending order at first.
    pub fn new(blocks: u32) -> Self {
        assert!(blocks < NIL, "a pool has at most {} blocks", NIL - 1);
        // Each stack begins with a run of its own, so that threads do not meet
        // in the cache lines of the entries either.
        let run = blocks.div_ceil(SHARDS as u32).max(1);
        let last = |block: u32| block + 1 == blocks || (block + 1).is_multiple_of(run);
        let shard = |shard: u32| {
            let first = (shard * run).min(blocks);
            let free = (blocks - first).min(run);
            let head = if free > 0 { first } else { NIL };
            Line(Shard { head: AtomicU64::new(head.into()), free: AtomicU32::new(free) })
        };
        Self {
            entries: (0..blocks).map(|_| AtomicU64::new(Entry::free(0).pack())).collect(),
            next: (0..blocks).map(|i| AtomicU32::new(if last(i) { NIL } else { i + 1 })).collect(),
            shards: (0..SHARDS as u32).map(shard).collect(),
            reserved: Line(AtomicU32::new(0)),
            lent: AtomicU32::new(0),
        }
    }

    /// Blocks in all.
    pub fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    /// A table of no blocks.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Blocks by what they do.
    pub fn counts(&self) -> Counts {
        let total = self.len();
        let free = self.free();
        let reserved = self.reserved.0.load(Ordering::Relaxed);
        let lent = self.lent.load(Ordering::Relaxed);
        let held = total.saturating_sub(free.wrapping_add(reserved).wrapping_add(lent));
        Counts { total, free, held, reserved, lent }
    }

    /// One block's entry as it is now; `None` outside the pool.
    pub fn entry(&self, block: BlockIndex) -> Option<Entry> {
        Some(Entry::unpack(self.entries.get(block as usize)?.load(Ordering::Acquire)))
    }

    // ---- local sequences and the prefix cache -----------------------------

    /// Takes one block. A loan's block starts Reserved, any other Held with one
    /// ref. `None`: nothing is free.
    pub fn alloc(&self, owner: Owner) -> Option<BlockRef> {
        let first = home();
        let shards = self.shards.iter().cycle().skip(first).take(SHARDS);
        let shard = shards.map(|line| &line.0).find(|shard| shard.claim(1) == 1)?;
        let mut taken = None;
        self.take(shard, 1, owner, &mut |block| taken = Some(block));
        taken
    }

    /// Takes `n` blocks or none; appends them to `out`. False: not that many
    /// are free (or were while others took and gave), and `out` is as it was.
    #[must_use]
    pub fn alloc_many(&self, n: u32, owner: Owner, out: &mut Vec<BlockRef>) -> bool {
        self.take_many(n, owner, |block| out.push(block))
    }

    /// Adds a holder, who must release in turn.
    pub fn retain(&self, block: BlockRef) -> Result<(), TableError> {
        self.change(block, |entry| match entry.state {
            State::Held if entry.refs == MAX_REFS => Err(TableError::TooManyRefs { index: block.index }),
            State::Held => Ok(Entry { refs: entry.refs + 1, ..entry }),
            state => Err(TableError::WrongState { index: block.index, state }),
        })?;
        Ok(())
    }

    /// Gives up one hold; the last one frees the block, which is then told by
    /// `true`.
    pub fn release(&self, block: BlockRef) -> Result<bool, TableError> {
        let before = self.change(block, |entry| match entry.state {
            State::Held if entry.refs > 1 => Ok(Entry { refs: entry.refs - 1, ..entry }),
            State::Held => Ok(Entry::free(entry.generation + 1)),
            state => Err(TableError::WrongState { index: block.index, state }),
        })?;
        Ok(self.freed_if(before.refs == 1, block.index))
    }

    /// Frees the block if the caller's hold is the only one; `false` and no
    /// change otherwise. (Eviction: nobody can begin to share it meanwhile.)
    pub fn release_if_sole(&self, block: BlockRef) -> Result<bool, TableError> {
        let shared = self.change(block, |entry| match entry.state {
            State::Held if entry.refs > 1 => Ok(entry),
            State::Held => Ok(Entry::free(entry.generation + 1)),
            state => Err(TableError::WrongState { index: block.index, state }),
        })?;
        Ok(self.freed_if(shared.refs == 1, block.index))
    }

    /// Held by the caller alone → Moving: the bytes are being written to a
    /// creditor, so nobody may begin to share the block.
    pub fn begin_move(&self, block: BlockRef) -> Result<(), TableError> {
        self.change(block, |entry| match entry.state {
            State::Held if entry.refs == 1 => Ok(Entry { state: State::Moving, ..entry }),
            state => Err(TableError::WrongState { index: block.index, state }),
        })?;
        Ok(())
    }

    /// The bytes have arrived: Moving → Free.
    pub fn end_move(&self, block: BlockRef) -> Result<(), TableError> {
        self.change(block, |entry| match entry.state {
            State::Moving => Ok(Entry::free(entry.generation + 1)),
            state => Err(TableError::WrongState { index: block.index, state }),
        })?;
        self.freed_if(true, block.index);
        Ok(())
    }

    /// The move came to nothing: Moving → Held.
    pub fn abort_move(&self, block: BlockRef) -> Result<(), TableError> {
        self.change(block, |entry| match entry.state {
            State::Moving => Ok(Entry { state: State::Held, ..entry }),
            state => Err(TableError::WrongState { index: block.index, state }),
        })?;
        Ok(())
    }

    // ---- loans --------------------------------------------------------------

    /// Reserves `n` blocks for `loan` or none; ascending. `None`: not that many
    /// are free (or were while others took and gave). The list is the only record of the loan's blocks: keep it.
    pub fn reserve(&self, n: u32, loan: LoanId) -> Option<Vec<BlockIndex>> {
        if n > self.len() {
            return None;
        }
        let mut blocks = Vec::with_capacity(n as usize);
        if !self.take_many(n, Owner::Loan(loan), |block| blocks.push(block.index)) {
            return None;
        }
        blocks.sort_unstable();
        Some(blocks)
    }

    /// Reserved → Filling: the debtor may have written some of it.
    pub fn begin_fill(&self, block: BlockIndex, loan: LoanId) -> Result<(), TableError> {
        self.change_lent(block, loan, |entry| match entry.state {
            State::Reserved => Ok(Entry { state: State::Filling, ..entry }),
            state => Err(TableError::WrongState { index: block, state }),
        })?;
        self.lent.fetch_add(1, Ordering::Relaxed);
        self.reserved.0.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    /// Filling → Live: complete, no more writes. Whoever sees it Live sees
    /// every byte written before.
    pub fn publish(&self, block: BlockIndex, loan: LoanId) -> Result<(), TableError> {
        self.change_lent(block, loan, |entry| match entry.state {
            State::Filling => Ok(Entry { state: State::Live, ..entry }),
            state => Err(TableError::WrongState { index: block, state }),
        })?;
        Ok(())
    }

    /// Frees the loan's `blocks`, whatever state they are in; returns how many.
    /// Blocks that are not the loan's (any more) are left alone and the first
    /// of them is the error, after all others have been freed.
    pub fn free_loan(&self, loan: LoanId, blocks: &[BlockIndex]) -> Result<u32, TableError> {
        let mut freed = 0;
        let mut first_error = None;
        for &block in blocks {
            match self.change_lent(block, loan, |entry| Ok(Entry::free(entry.generation + 1))) {
                Ok(before) => {
                    let count = if before.state == State::Reserved { &self.reserved.0 } else { &self.lent };
                    count.fetch_sub(1, Ordering::Relaxed);
                    self.freed_if(true, block);
                    freed += 1;
                }
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(freed), Err)
    }

    /// May the debtor behind `loan` write this block? One load.
    pub fn may_write(&self, block: BlockIndex, loan: LoanId) -> bool {
        let entry = self.entry(block);
        entry.is_some_and(|e| e.loan() == Some(loan) && matches!(e.state, State::Reserved | State::Filling))
    }

    /// May queries under `loan` attend to this block? One load.
    pub fn visible(&self, block: BlockIndex, loan: LoanId) -> bool {
        let entry = self.entry(block);
        entry.is_some_and(|e| e.loan() == Some(loan) && matches!(e.state, State::Filling | State::Live))
    }

    // ---- entries --------------------------------------------------------------

    /// Changes a local block's entry; returns what it was.
    fn change(
        &self,
        block: BlockRef,
        mut to: impl FnMut(Entry) -> Result<Entry, TableError>,
    ) -> Result<Entry, TableError> {
        self.swap(block.index, |entry| {
            if entry.generation != block.generation & GENERATION_MASK {
                return Err(TableError::Stale { index: block.index, now: entry.generation });
            }
            to(entry)
        })
    }

    /// Changes a lent block's entry; returns what it was.
    fn change_lent(
        &self,
        block: BlockIndex,
        loan: LoanId,
        mut to: impl FnMut(Entry) -> Result<Entry, TableError>,
    ) -> Result<Entry, TableError> {
        self.swap(block, |entry| {
            if entry.loan() != Some(loan) {
                return Err(TableError::WrongOwner { index: block, loan });
            }
            to(entry)
        })
    }

    fn swap(
        &self,
        index: BlockIndex,
        mut to: impl FnMut(Entry) -> Result<Entry, TableError>,
    ) -> Result<Entry, TableError> {
        let word = self.entries.get(index as usize).ok_or(TableError::OutOfRange { index })?;
        let mut now = word.load(Ordering::Acquire);
        loop {
            let before = Entry::unpack(now);
            let after = to(before)?.pack();
            if after == now {
                return Ok(before);
            }
            match word.compare_exchange_weak(now, after, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(before),
                Err(other) => now = other,
            }
        }
    }

    // ---- the free list ----------------------------------------------------------

    fn free(&self) -> u32 {
        self.shards.iter().map(|shard| shard.0.free.load(Ordering::Relaxed)).fold(0, u32::wrapping_add)
    }

    /// Claims `n` blocks, from the thread's own stack first, and takes them; or
    /// takes none.
    fn take_many(&self, n: u32, owner: Owner, mut sink: impl FnMut(BlockRef)) -> bool {
        let first = home();
        for _ in 0..CLAIM_TRIES {
            let mut claims = [0; SHARDS];
            let mut left = n;
            for i in (0..SHARDS).map(|i| (first + i) % SHARDS) {
                claims[i] = self.shards[i].0.claim(left);
                left -= claims[i];
            }
            if left == 0 {
                for (shard, claimed) in self.shards.iter().zip(claims) {
                    self.take(&shard.0, claimed, owner, &mut sink);
                }
                return true;
            }
            for (shard, claimed) in self.shards.iter().zip(claims).filter(|(_, claimed)| *claimed > 0) {
                shard.0.free.fetch_add(claimed, Ordering::Release);
            }
            // Enough in all, but in the hands of others who were short as well:
            // one of us has to be first.
            if self.free() < n {
                return false;
            }
            spin_loop();
        }
        false
    }

    /// Pops `n` blocks claimed of `shard` and gives them to `owner`.
    fn take(&self, shard: &Shard, n: u32, owner: Owner, sink: &mut impl FnMut(BlockRef)) {
        let state = if matches!(owner, Owner::Loan(_)) { State::Reserved } else { State::Held };
        if state == State::Reserved {
            self.reserved.0.fetch_add(n, Ordering::Relaxed);
        }
        let mut left = n;
        while left > 0 {
            let (mut block, taken) = self.pop(shard, left.min(POP_AT_ONCE));
            left -= taken;
            for _ in 0..taken {
                let word = &self.entries[block as usize];
                let before = Entry::unpack(word.load(Ordering::Relaxed));
                debug_assert_eq!(before.state, State::Free);
                let following = self.next[block as usize].load(Ordering::Relaxed);
                // A plain store: a free entry off the stack is nobody else's
                // to change.
                word.store(Entry { state, owner: Some(owner), refs: 1, ..before }.pack(), Ordering::Release);
                sink(BlockRef { index: block, generation: before.generation });
                block = following;
            }
        }
    }

    /// Takes 1 to `most` blocks off a stack, still linked by `next`.
    fn pop(&self, shard: &Shard, most: u32) -> (BlockIndex, u32) {
        let mut head = shard.head.load(Ordering::Acquire);
        loop {
            let first = head as u32;
            if first == NIL {
                // Cannot last: the claim says that blocks are there.
                spin_loop();
                head = shard.head.load(Ordering::Acquire);
                continue;
            }
            // Others may change these links while we walk; then the tag has
            // changed too and the exchange fails.
            let mut taken = 1;
            let mut rest = self.next[first as usize].load(Ordering::Relaxed);
            while taken < most && rest != NIL {
                rest = self.next[rest as usize].load(Ordering::Relaxed);
                taken += 1;
            }
            match shard.head.compare_exchange_weak(head, retag(head, rest), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return (first, taken),
                Err(other) => head = other,
            }
        }
    }

    /// Puts a block that just became Free on the thread's stack and counts it.
    fn freed_if(&self, freed: bool, block: BlockIndex) -> bool {
        if freed {
            let shard = &self.shards[home()].0;
            let mut head = shard.head.load(Ordering::Relaxed);
            loop {
                self.next[block as usize].store(head as u32, Ordering::Relaxed);
                match shard.head.compare_exchange_weak(head, retag(head, block), Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => break,
                    Err(other) => head = other,
                }
            }
            shard.free.fetch_add(1, Ordering::Release);
        }
        freed
    }

    /// A full scan; call it only while no other call is in progress. Says what
    /// is wrong: a block on the free list twice, in no list, or with an entry
    /// that contradicts the counts.
    pub fn check_invariants(&self) -> Result<Counts, String> {
        let mut on_list = vec![false; self.entries.len()];
        let mut listed = 0;
        for (i, shard) in self.shards.iter().enumerate() {
            let before = listed;
            let mut block = shard.0.head.load(Ordering::Acquire) as u32;
            while block != NIL {
                let seen = on_list.get_mut(block as usize).ok_or(format!("free list leads to block {block}"))?;
                if std::mem::replace(seen, true) {
                    return Err(format!("block {block} is on the free list twice"));
                }
                listed += 1;
                block = self.next[block as usize].load(Ordering::Acquire);
            }
            let count = shard.0.free.load(Ordering::Acquire);
            if listed - before != count {
                return Err(format!("stack {i} has {} blocks and counts {count}", listed - before));
            }
        }
        let mut found = Counts { total: self.len(), ..Counts::default() };
        for (index, listed) in on_list.iter().enumerate() {
            let entry = Entry::unpack(self.entries[index].load(Ordering::Acquire));
            match entry.state {
                State::Free => found.free += 1,
                State::Held | State::Moving => found.held += 1,
                State::Reserved => found.reserved += 1,
                State::Filling | State::Live => found.lent += 1,
            }
            if (entry.state == State::Free) != *listed {
                return Err(format!("block {index} is {:?} and on the free list: {listed}", entry.state));
            }
            if entry.state != State::Free && entry.refs == 0 {
                return Err(format!("block {index} is {:?} without a holder", entry.state));
            }
        }
        if listed != found.free || self.counts() != found {
            return Err(format!("the table holds {found:?}, counts {:?}, lists {listed} free", self.counts()));
        }
        Ok(found)
    }
}

impl Shard {
    /// Counts up to `n` blocks down: they are the caller's to pop, or to count
    /// up again.
    fn claim(&self, n: u32) -> u32 {
        let mut free = self.free.load(Ordering::Relaxed);
        loop {
            let claimed = free.min(n);
            if claimed == 0 {
                return 0;
            }
            // Acquire: what was pushed before it was counted is seen by the pop.
            match self.free.compare_exchange_weak(free, free - claimed, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return claimed,
                Err(other) => free = other,
            }
        }
    }
}

/// The next head: one change later, with `block` on top.
const fn retag(head: u64, block: u32) -> u64 {
    ((head >> 32).wrapping_add(1) << 32) | block as u64
}
