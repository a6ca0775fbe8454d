//! One block's entry in the rBlock table, packed in 64 bits:
//!
//! ```text
//! 63..61  state        60..38  generation
//! held, moving:        37..24  refs          23..0  sequence, low 24 bits
//! reserved … live:     31..0   loan
//! ```
//!
//! A block that is lent has one holder, so its refs need no bits; a block held
//! here needs no loan. The generation counts how often the block was freed.

use super::rblock::{BlockIndex, LoanId};

const STATE_SHIFT: u32 = 61;
const GENERATION_SHIFT: u32 = 38;
/// Generations wrap here.
pub const GENERATION_MASK: u32 = (1 << 23) - 1;
const REFS_SHIFT: u32 = 24;
/// Most holders of one block.
pub const MAX_REFS: u32 = (1 << 14) - 1;
const SEQUENCE_MASK: u32 = (1 << 24) - 1;
/// The sequence number that stands for the prefix cache.
const CACHE: u32 = SEQUENCE_MASK;

/// What a block is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody's; on the free list.
    Free,
    /// Held by local sequences, the prefix cache, or both.
    Held,
    /// Granted to a debtor, nothing in it yet.
    Reserved,
    /// The debtor is writing it.
    Filling,
    /// Lent and complete: read only.
    Live,
    /// Held by one local sequence whose block is on its way to a creditor.
    Moving,
}

/// Who has a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A local sequence. The table keeps the low 24 bits, for people who look
    /// at it; the right to release is the [`BlockRef`].
    Sequence(u32),
    /// The prefix cache alone brought it in.
    PrefixCache,
    /// A debtor, by the loan.
    Loan(LoanId),
}

/// A block as it was when it was allocated. Once the block has been freed this
/// refers to nothing, and every call with it is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockRef {
    /// Physical block.
    pub index: BlockIndex,
    /// How often it had been freed before.
    pub generation: u32,
}

/// A block's entry at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How often the block was freed (23 bits, wrapping).
    pub generation: u32,
    /// What it is doing.
    pub state: State,
    /// Who has it; `None` when free.
    pub owner: Option<Owner>,
    /// Holders: 0 when free, 1 when lent.
    pub refs: u32,
}

impl Entry {
    #[inline]
    pub(super) const fn pack(self) -> u64 {
        let state = match self.state {
            State::Free => 0u64,
            State::Held => 1,
            State::Reserved => 2,
            State::Filling => 3,
            State::Live => 4,
            State::Moving => 5,
        };
        let payload = match self.owner {
            None => 0,
            Some(Owner::Sequence(s)) => (self.refs as u64) << REFS_SHIFT | (s & SEQUENCE_MASK) as u64,
            Some(Owner::PrefixCache) => (self.refs as u64) << REFS_SHIFT | CACHE as u64,
            Some(Owner::Loan(LoanId(loan))) => loan as u64,
        };
        state << STATE_SHIFT | (self.generation as u64) << GENERATION_SHIFT | payload
    }

    #[inline]
    pub(super) const fn unpack(word: u64) -> Self {
        let generation = (word >> GENERATION_SHIFT) as u32 & GENERATION_MASK;
        let state = match word >> STATE_SHIFT {
            0 => State::Free,
            1 => State::Held,
            2 => State::Reserved,
            3 => State::Filling,
            4 => State::Live,
            _ => State::Moving,
        };
        let (owner, refs) = match state {
            State::Free => (None, 0),
            State::Held | State::Moving => {
                let sequence = word as u32 & SEQUENCE_MASK;
                let owner = if sequence == CACHE { Owner::PrefixCache } else { Owner::Sequence(sequence) };
                (Some(owner), (word >> REFS_SHIFT) as u32 & MAX_REFS)
            }
            State::Reserved | State::Filling | State::Live => (Some(Owner::Loan(LoanId(word as u32))), 1),
        };
        Self { generation, state, owner, refs }
    }

    /// The entry of a block freed `generation` times.
    #[inline]
    pub(super) const fn free(generation: u32) -> Self {
        Self { generation: generation & GENERATION_MASK, state: State::Free, owner: None, refs: 0 }
    }

    /// The loan that has the block, if one has.
    #[inline]
    pub const fn loan(&self) -> Option<LoanId> {
        match self.owner {
            Some(Owner::Loan(loan)) => Some(loan),
            _ => None,
        }
    }
}

/// Why the table refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// No such block.
    #[error("block {index} is outside the pool")]
    OutOfRange {
        /// The block asked for.
        index: BlockIndex,
    },
    /// The block was freed since the reference was made.
    #[error("block {index} has moved on to generation {now}")]
    Stale {
        /// The block.
        index: BlockIndex,
        /// Its generation now.
        now: u32,
    },
    /// The block is in no state for this.
    #[error("block {index} is {state:?}")]
    WrongState {
        /// The block.
        index: BlockIndex,
        /// Its state.
        state: State,
    },
    /// The block is another's.
    #[error("block {index} does not belong to loan {}", .loan.0)]
    WrongOwner {
        /// The block.
        index: BlockIndex,
        /// The loan that asked.
        loan: LoanId,
    },
    /// The block has as many holders as can be counted: treat it as not
    /// shareable.
    #[error("block {index} has too many holders")]
    TooManyRefs {
        /// The block.
        index: BlockIndex,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_survives_packing() {
        let generations = [0, 1, GENERATION_MASK];
        for generation in generations {
            let mut entries = vec![Entry::free(generation)];
            for state in [State::Held, State::Moving] {
                for owner in [Owner::Sequence(0), Owner::Sequence(CACHE - 1), Owner::PrefixCache] {
                    for refs in [1, 2, MAX_REFS] {
                        entries.push(Entry { generation, state, owner: Some(owner), refs });
                    }
                }
            }
            for state in [State::Reserved, State::Filling, State::Live] {
                for loan in [0, 1, u32::MAX] {
                    entries.push(Entry { generation, state, owner: Some(Owner::Loan(LoanId(loan))), refs: 1 });
                }
            }
            for entry in entries {
                assert_eq!(Entry::unpack(entry.pack()), entry);
            }
        }
        assert_eq!(Entry::free(GENERATION_MASK + 1), Entry::free(0), "generations wrap");
    }
}
