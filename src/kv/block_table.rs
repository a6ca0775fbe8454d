//! A sequence's rBlocks in token order, wherever they are.

use std::ops::Range;

use super::rblock::{BlockIndex, InstanceId, KvRun, LoanId};
use super::table::BlockRef;

/// Where one rBlock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In this instance's pool.
    Local(BlockRef),
    /// In a creditor's pool.
    Remote {
        /// Who has it.
        creditor: InstanceId,
        /// Under which loan.
        loan: LoanId,
        /// Block in the creditor's pool.
        block: BlockIndex,
    },
    /// Nowhere: its KV was lost and no block waits for it yet.
    Missing,
}

impl Placement {
    /// The creditor, if it is remote.
    pub const fn creditor(&self) -> Option<InstanceId> {
        match self {
            Self::Local(_) | Self::Missing => None,
            Self::Remote { creditor, .. } => Some(*creditor),
        }
    }
}

/// One sequence's rBlocks: entry `i` holds the tokens
/// `[i · block_tokens, (i + 1) · block_tokens)`. Knows nothing of the rBlock
/// table: whoever takes a block out of here releases it there.
#[derive(Clone, Debug)]
pub struct BlockTable {
    block_tokens: u32,
    blocks: Vec<Placement>,
    local: usize,
    missing: usize,
    /// Creditors and how many blocks each has; few, in order of first use.
    creditors: Vec<(InstanceId, usize)>,
}

impl BlockTable {
    /// No blocks yet; room for `capacity` without allocating.
    pub fn new(block_tokens: u32, capacity: usize) -> Self {
        Self { block_tokens, blocks: Vec::with_capacity(capacity), local: 0, missing: 0, creditors: Vec::new() }
    }

    /// Tokens an rBlock.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// All blocks in token order.
    pub fn blocks(&self) -> &[Placement] {
        &self.blocks
    }

    /// Blocks in all.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// No block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * self.block_tokens as usize
    }

    /// Blocks in this instance's pool.
    pub fn local(&self) -> usize {
        self.local
    }

    /// Blocks elsewhere.
    pub fn remote(&self) -> usize {
        self.blocks.len() - self.local - self.missing
    }

    /// Blocks that are somewhere, here or elsewhere.
    pub fn held(&self) -> usize {
        self.blocks.len() - self.missing
    }

    /// Who holds blocks of this sequence, and how many each (never 0).
    pub fn creditors(&self) -> &[(InstanceId, usize)] {
        &self.creditors
    }

    /// Entry `index` has no block: it is missing, or lies beyond the end.
    pub fn is_absent(&self, index: usize) -> bool {
        self.blocks.get(index).is_none_or(|placement| *placement == Placement::Missing)
    }

    /// Blocks to be had, in place of missing ones or at the end, before each of
    /// `tokens` has a place.
    pub fn absent(&self, tokens: Range<usize>) -> usize {
        self.entries(tokens).filter(|&index| self.is_absent(index)).count()
    }

    /// How far into `tokens` one comes with up to `more` further blocks: a
    /// position in `tokens`, or its end.
    pub fn reach(&self, tokens: Range<usize>, more: usize) -> usize {
        let mut absent = self.entries(tokens.clone()).filter(|&index| self.is_absent(index));
        let first_without = absent.nth(more).map(|index| index * self.block_tokens as usize);
        first_without.map_or(tokens.end, |position| position.max(tokens.start))
    }

    /// Entries that hold `tokens`.
    fn entries(&self, tokens: Range<usize>) -> Range<usize> {
        let size = self.block_tokens as usize;
        if tokens.is_empty() { 0..0 } else { tokens.start / size..tokens.end.div_ceil(size) }
    }

    /// Adds the next block.
    pub fn push(&mut self, placement: Placement) {
        self.count(placement, true);
        self.blocks.push(placement);
    }

    /// Moves entry `index` elsewhere; returns where it was, to be released.
    /// `None`: no such entry, and nothing changed.
    pub fn replace(&mut self, index: usize, placement: Placement) -> Option<Placement> {
        let before = std::mem::replace(self.blocks.get_mut(index)?, placement);
        self.count(before, false);
        self.count(placement, true);
        Some(before)
    }

    /// Drops the last block; returns where it was, to be released.
    pub fn pop(&mut self) -> Option<Placement> {
        let last = self.blocks.pop()?;
        self.count(last, false);
        Some(last)
    }

    /// Takes every block out, to be released; keeps the capacity.
    pub fn drain(&mut self) -> impl Iterator<Item = Placement> + '_ {
        (self.local, self.missing) = (0, 0);
        self.creditors.clear();
        self.blocks.drain(..)
    }

    /// Block and offset inside it of the token at `position`; `None` where no
    /// block is there for it yet.
    pub fn slot(&self, position: usize) -> Option<(Placement, u32)> {
        let placement = *self.blocks.get(position / self.block_tokens as usize)?;
        Some((placement, (position % self.block_tokens as usize) as u32))
    }

    /// Runs in this instance's pool of a sequence of `tokens` tokens, in token
    /// order.
    pub fn local_runs(&self, tokens: usize) -> impl Iterator<Item = KvRun> + '_ {
        self.runs(tokens).filter_map(|(placement, run)| match placement {
            Placement::Local(_) => Some(run),
            Placement::Remote { .. } | Placement::Missing => None,
        })
    }

    /// Runs in `creditor`'s pool of a sequence of `tokens` tokens, in token
    /// order, each with its loan.
    pub fn remote_runs(&self, creditor: InstanceId, tokens: usize) -> impl Iterator<Item = (LoanId, KvRun)> + '_ {
        self.runs(tokens).filter_map(move |(placement, run)| match placement {
            Placement::Remote { creditor: c, loan, .. } if c == creditor => Some((loan, run)),
            _ => None,
        })
    }

    /// Every run of a sequence of `tokens` tokens, in token order. Missing
    /// blocks have none.
    pub fn runs(&self, tokens: usize) -> impl Iterator<Item = (Placement, KvRun)> + '_ {
        let size = self.block_tokens as usize;
        let used = tokens.div_ceil(size).min(self.blocks.len());
        self.blocks[..used].iter().enumerate().filter_map(move |(i, placement)| {
            let block = match *placement {
                Placement::Local(block) => block.index,
                Placement::Remote { block, .. } => block,
                Placement::Missing => return None,
            };
            let filled = (tokens - i * size).min(size);
            Some((*placement, KvRun { block, position: (i * size) as u32, tokens: filled as u32 }))
        })
    }

    fn count(&mut self, placement: Placement, added: bool) {
        let creditor = match placement {
            Placement::Remote { creditor, .. } => creditor,
            Placement::Local(_) | Placement::Missing => {
                let of = if placement == Placement::Missing { &mut self.missing } else { &mut self.local };
                *of = if added { *of + 1 } else { *of - 1 };
                return;
            }
        };
        match self.creditors.iter().position(|(c, _)| *c == creditor) {
            Some(i) if added => self.creditors[i].1 += 1,
            Some(i) if self.creditors[i].1 > 1 => self.creditors[i].1 -= 1,
            Some(i) => {
                self.creditors.remove(i);
            }
            None => {
                debug_assert!(added);
                self.creditors.push((creditor, 1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(index: u32) -> Placement {
        Placement::Local(BlockRef { index, generation: 0 })
    }

    fn remote(creditor: u64, block: u32) -> Placement {
        Placement::Remote { creditor: InstanceId(creditor), loan: LoanId(creditor as u32 * 10), block }
    }

    #[test]
    fn runs_cover_the_sequence_wherever_its_blocks_are() {
        let mut table = BlockTable::new(16, 8);
        assert_eq!(table.absent(0..0), 0);
        assert_eq!(table.absent(0..1), 1);
        for placement in [remote(1, 40), remote(2, 7), local(3), remote(1, 41), local(9)] {
            table.push(placement);
        }
        assert_eq!(table.absent(0..80), 0);
        assert_eq!(table.absent(0..81), 1);
        let run = |block, position, tokens| KvRun { block, position, tokens };
        assert_eq!(table.local_runs(70).collect::<Vec<_>>(), [run(3, 32, 16), run(9, 64, 6)]);
        let of_1: Vec<_> = table.remote_runs(InstanceId(1), 70).collect();
        assert_eq!(of_1, [(LoanId(10), run(40, 0, 16)), (LoanId(10), run(41, 48, 16))]);
        assert_eq!(table.remote_runs(InstanceId(3), 70).count(), 0);
        // Blocks beyond the sequence's end are not attended to.
        assert_eq!(table.runs(33).map(|(_, r)| r.tokens).collect::<Vec<_>>(), [16, 16, 1]);
        assert_eq!(table.runs(0).count(), 0);
        assert_eq!(table.slot(47), Some((local(3), 15)));
        assert_eq!(table.slot(80), None);
    }

    #[test]
    fn a_missing_block_has_no_run_and_room_is_counted_in_place() {
        let mut table = BlockTable::new(16, 8);
        for placement in [remote(1, 4), remote(2, 5), local(6), remote(2, 7)] {
            table.push(placement);
        }
        assert_eq!(table.replace(1, Placement::Missing), Some(remote(2, 5)));
        assert_eq!(table.replace(3, Placement::Missing), Some(remote(2, 7)));
        assert_eq!((table.local(), table.remote(), table.held(), table.len()), (1, 1, 2, 4));
        assert_eq!(table.creditors(), [(InstanceId(1), 1)]);
        assert_eq!(table.runs(64).map(|(_, r)| r.position).collect::<Vec<_>>(), [0, 32]);
        assert!(table.is_absent(1) && !table.is_absent(2) && table.is_absent(4));
        assert_eq!((table.absent(16..32), table.absent(0..64), table.absent(20..90)), (1, 2, 4));
        assert_eq!(table.reach(16..64, 0), 16);
        assert_eq!(table.reach(20..64, 0), 20);
        assert_eq!(table.reach(16..64, 1), 48);
        assert_eq!(table.reach(16..64, 2), 64);
        assert_eq!(table.reach(33..200, 3), 96);
        assert_eq!(table.replace(1, local(9)), Some(Placement::Missing));
        assert_eq!((table.local(), table.held()), (2, 3));
        assert_eq!(table.drain().count(), 4);
        assert_eq!((table.held(), table.remote()), (0, 0));
    }

    #[test]
    fn counts_follow_every_switch_of_place() {
        let mut table = BlockTable::new(4, 4);
        table.push(local(0));
        table.push(local(1));
        assert_eq!(table.replace(0, remote(5, 8)), Some(local(0)));
        assert_eq!(table.replace(7, local(2)), None);
        assert_eq!((table.local(), table.remote(), table.creditors()), (1, 1, &[(InstanceId(5), 1)][..]));
        assert_eq!(table.replace(0, local(2)), Some(remote(5, 8)));
        assert!(table.creditors().is_empty());
        table.push(remote(6, 1));
        assert_eq!(table.pop(), Some(remote(6, 1)));
        assert!(table.creditors().is_empty());
        assert_eq!(table.drain().collect::<Vec<_>>(), [local(2), local(1)]);
        assert_eq!((table.local(), table.len()), (0, 0));
    }
}
