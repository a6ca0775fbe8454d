//! The lock-free rBlock table: who has which physical block.
//!
//! One 64-bit entry a block ([`Entry`]), changed by compare-and-swap:
//!
//! ```text
//! Free ─ alloc ──→ Held ⇄ Moving ────────────→ Free      local sequences, prefix cache
//! Free ─ reserve → Reserved → Filling → Live → Free      a debtor's loan
//! ```
//!
//! Free blocks are stacks threaded through `links`, each head tagged so that a
//! head seen before a pause is never mistaken for the same head after. There
//! are several, and a thread begins at its own: with one for all, its cache
//! line was most of an allocation's cost (`benches/table.rs`). No lock, no
//! hash, no allocation; a block's bytes are touched only by whoever the entry
//! names, so nothing needs to be reclaimed later.
//!
//! A free block's link also says how many blocks lie from it downwards, so a
//! stack needs no counter beside its head, and an allocation is one
//! compare-and-swap. The order that carries the proof: *freeing* turns the
//! entry Free (one caller wins), then pushes; *allocating* pops, then gives the
//! entry its new state. Between the two the block is that one caller's.

pub use super::entry::{BlockRef, Owner, State, TableError};
use super::entry::{Entry, GENERATION_MASK, MAX_REFS};
use super::rblock::{BlockIndex, LoanId};
use super::sync::{AtomicU32, AtomicU64, Ordering, SHARDS, fence, home, spin_loop};

/// End of the free list.
const NIL: u32 = u32::MAX;
/// Blocks taken from the free list at once: bounds what a lost race repeats.
const POP_AT_ONCE: u32 = 64;
/// How often an allocation of several blocks tries to put them together while
/// others, which may also be short, hold what it lacks.
const TAKE_TRIES: u32 = 16;

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
    /// Of a free block: the blocks from it to the bottom of its stack (high
    /// half) and the block below.
    links: Box<[AtomicU64]>,
    /// Of each stack: a tag (high half) that counts every change, and the block
    /// on top.
    heads: Box<[Line<AtomicU64>]>,
    reserved: Line<AtomicU32>,
    lent: AtomicU32,
}

/// Free blocks off their stacks, linked in order, on their way to an owner.
#[derive(Clone, Copy)]
struct Chain {
    first: BlockIndex,
    last: BlockIndex,
    len: u32,
}

impl RBlockTable {
    /// A table of `blocks` free blocks. Allocated in ascending order at first.
    pub fn new(blocks: u32) -> Self {
        assert!(blocks < NIL, "a pool has at most {} blocks", NIL - 1);
        // Each stack begins with a run of its own, so that threads do not meet
        // in the cache lines of the entries either.
        let run = blocks.div_ceil(SHARDS as u32).max(1);
        let link = |block: u32| {
            let depth = (run - block % run).min(blocks - block);
            pair(depth, if depth > 1 { block + 1 } else { NIL })
        };
        let top = |shard: u32| if shard * run < blocks { shard * run } else { NIL };
        Self {
            entries: (0..blocks).map(|_| AtomicU64::new(Entry::free(0).pack())).collect(),
            links: (0..blocks).map(|block| AtomicU64::new(link(block))).collect(),
            heads: (0..SHARDS as u32).map(|shard| Line(AtomicU64::new(pair(0, top(shard))))).collect(),
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
    #[inline]
    pub fn entry(&self, block: BlockIndex) -> Option<Entry> {
        Some(Entry::unpack(self.entries.get(block as usize)?.load(Ordering::Acquire)))
    }

    // ---- local sequences and the prefix cache -----------------------------

    /// Takes one block. A loan's block starts Reserved, any other Held with one
    /// ref. `None`: nothing is free (or was while others took and gave).
    pub fn alloc(&self, owner: Owner) -> Option<BlockRef> {
        let chain = stacks().find_map(|stack| self.pop(stack, 1))?;
        let mut taken = None;
        self.give(chain, owner, |block| taken = Some(block));
        taken
    }

    /// Takes `n` blocks or none; appends them to `out`. False: not that many
    /// are free (or were while others took and gave), and `out` is as it was.
    #[must_use]
    pub fn alloc_many(&self, n: u32, owner: Owner, out: &mut Vec<BlockRef>) -> bool {
        let chain = self.take(n);
        chain.inspect(|chain| self.give(*chain, owner, |block| out.push(block))).is_some() || n == 0
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
        let mut blocks = Vec::new();
        if n > 0 {
            let chain = self.take(n)?;
            blocks.reserve_exact(n as usize);
            self.give(chain, Owner::Loan(loan), |block| blocks.push(block.index));
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
    #[inline]
    pub fn may_write(&self, block: BlockIndex, loan: LoanId) -> bool {
        let entry = self.entry(block);
        entry.is_some_and(|e| e.loan() == Some(loan) && matches!(e.state, State::Reserved | State::Filling))
    }

    /// May queries under `loan` attend to this block? One load.
    #[inline]
    pub fn visible(&self, block: BlockIndex, loan: LoanId) -> bool {
        let entry = self.entry(block);
        entry.is_some_and(|e| e.loan() == Some(loan) && matches!(e.state, State::Filling | State::Live))
    }

    /// As [`visible`](Self::visible), asked after the block was read: if it
    /// holds, every byte read was the loan's.
    #[inline]
    pub fn was_visible(&self, block: BlockIndex, loan: LoanId) -> bool {
        // Pairs with the fence in `give`: who read a byte of the next owner
        // sees the next owner's entry here.
        fence(Ordering::Acquire);
        self.visible(block, loan)
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

    #[inline]
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
        let tops = self.heads.iter().map(|head| head.0.load(Ordering::Acquire));
        tops.map(|head| self.depth(low(head))).fold(0, u32::wrapping_add)
    }

    /// Blocks from `block` to the bottom of its stack.
    fn depth(&self, block: u32) -> u32 {
        self.links.get(block as usize).map_or(0, |link| high(link.load(Ordering::Relaxed)))
    }

    /// Takes exactly `n` ≥ 1 blocks off the stacks, the thread's own first; or
    /// none.
    fn take(&self, n: u32) -> Option<Chain> {
        for _ in 0..TAKE_TRIES {
            let mut taken: Option<Chain> = None;
            for stack in stacks() {
                while let Some(missing) = n.checked_sub(taken.map_or(0, |c| c.len)).filter(|missing| *missing > 0) {
                    let Some(next) = self.pop(stack, missing.min(POP_AT_ONCE)) else { break };
                    taken = Some(taken.map_or(next, |chain| {
                        self.links[chain.last as usize].store(pair(0, next.first), Ordering::Relaxed);
                        Chain { first: chain.first, last: next.last, len: chain.len + next.len }
                    }));
                }
            }
            let chain = taken?;
            if chain.len == n {
                return Some(chain);
            }
            self.push(chain);
            if self.free() < n {
                return None;
            }
            // Enough in all, but in the hands of others who were short as well:
            // one of us has to be first.
            spin_loop();
        }
        None
    }

    /// Gives the blocks of a chain their owner, in order.
    fn give(&self, chain: Chain, owner: Owner, mut sink: impl FnMut(BlockRef)) {
        let state = if matches!(owner, Owner::Loan(_)) { State::Reserved } else { State::Held };
        if state == State::Reserved {
            self.reserved.0.fetch_add(chain.len, Ordering::Relaxed);
        }
        let mut block = chain.first;
        for _ in 0..chain.len {
            let word = &self.entries[block as usize];
            let before = Entry::unpack(word.load(Ordering::Relaxed));
            debug_assert_eq!(before.state, State::Free);
            let following = low(self.links[block as usize].load(Ordering::Relaxed));
            // A plain store: a free entry off the stacks is nobody else's to
            // change.
            word.store(Entry { state, owner: Some(owner), refs: 1, ..before }.pack(), Ordering::Release);
            sink(BlockRef { index: block, generation: before.generation });
            block = following;
        }
        // The new entries are seen by whoever sees a byte written under them.
        fence(Ordering::Release);
    }

    /// Takes 1 to `most` blocks off a stack, unless it is empty.
    fn pop(&self, stack: usize, most: u32) -> Option<Chain> {
        let top = &self.heads[stack].0;
        let mut head = top.load(Ordering::Acquire);
        loop {
            let first = low(head);
            if first == NIL {
                return None;
            }
            // Others may change these links while we walk; then the tag has
            // changed too and the exchange fails.
            let mut chain = Chain { first, last: first, len: 1 };
            let mut rest = low(self.links[first as usize].load(Ordering::Relaxed));
            while chain.len < most && rest != NIL {
                chain = Chain { last: rest, len: chain.len + 1, ..chain };
                rest = low(self.links[rest as usize].load(Ordering::Relaxed));
            }
            match top.compare_exchange_weak(head, retag(head, rest), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(chain),
                Err(other) => head = other,
            }
        }
    }

    /// Puts free blocks on the thread's own stack.
    fn push(&self, chain: Chain) {
        let top = &self.heads[home()].0;
        let mut head = top.load(Ordering::Acquire);
        loop {
            // As in `pop`: a depth that is out of date makes the exchange fail.
            let mut depth = self.depth(low(head)).wrapping_add(chain.len);
            let mut block = chain.first;
            for _ in 1..chain.len {
                let link = &self.links[block as usize];
                block = low(link.load(Ordering::Relaxed));
                link.store(pair(depth, block), Ordering::Relaxed);
                depth = depth.wrapping_sub(1);
            }
            self.links[block as usize].store(pair(depth, low(head)), Ordering::Relaxed);
            match top.compare_exchange_weak(head, retag(head, chain.first), Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(other) => head = other,
            }
        }
    }

    /// Puts a block that just became Free on a stack; passes `freed` on.
    fn freed_if(&self, freed: bool, block: BlockIndex) -> bool {
        if freed {
            self.push(Chain { first: block, last: block, len: 1 });
        }
        freed
    }

    /// A full scan; call it only while no other call is in progress. Says what
    /// is wrong: a block on the free list twice, in no list, or with an entry
    /// that contradicts the counts.
    pub fn check_invariants(&self) -> Result<Counts, String> {
        let mut on_list = vec![false; self.entries.len()];
        let mut listed = 0;
        for head in &self.heads {
            let mut block = low(head.0.load(Ordering::Acquire));
            let mut depth = self.depth(block);
            while block != NIL {
                let seen = on_list.get_mut(block as usize).ok_or(format!("a free list leads to block {block}"))?;
                if std::mem::replace(seen, true) {
                    return Err(format!("block {block} is on the free lists twice"));
                }
                let link = self.links[block as usize].load(Ordering::Acquire);
                if high(link) != depth {
                    return Err(format!("block {block} is {depth} above the bottom and says {}", high(link)));
                }
                listed += 1;
                depth = depth.wrapping_sub(1);
                block = low(link);
            }
            if depth != 0 {
                return Err(format!("a free list is {depth} shorter than it says"));
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

/// The stacks, the calling thread's own first.
fn stacks() -> impl Iterator<Item = usize> {
    let own = home();
    (own..SHARDS).chain(0..own)
}

const fn pair(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

const fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

const fn low(word: u64) -> u32 {
    word as u32
}

/// The next head: one change later, with `block` on top.
const fn retag(head: u64, block: u32) -> u64 {
    pair(high(head).wrapping_add(1), block)
}
