//! Toy attention, by which every token of a simulation is checked exactly.
//!
//! The KV of a token is a hash of the token, its position and the sum of the KV
//! of everything before it; a partial is the sum over some blocks, which like a
//! real one merges in any order; the next token is a hash of the sum over all
//! positions. So one block that is missing, stale, doubled or another's changes
//! every token after it, and KV that was computed without a part of what came
//! before it is wrong itself, as in a model of several layers.

use crate::kv::rblock::KvRun;

/// Tokens are below this.
pub const VOCAB: u32 = 50_000;

/// A hash of two words (the finalizer of SplitMix64, twice).
pub fn mix(a: u64, b: u64) -> u64 {
    let step = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    step(step(a.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// KV of `token` at `position`, `before` being the sum of all KV before it.
pub fn kv(token: u32, position: u32, before: u64) -> u64 {
    mix(u64::from(token) << 32 | u64::from(position), before)
}

/// The token that follows KV of which the sum is `total`.
pub fn next(total: u64) -> u32 {
    (mix(total, 7) % u64::from(VOCAB)) as u32
}

/// What a single instance that nothing disturbs answers to `prompt`.
pub fn reference(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut total = 0u64;
    let mut answer = Vec::with_capacity(count);
    for position in 0.. {
        let token = match prompt.get(position) {
            Some(token) => *token,
            None => {
                answer.push(next(total));
                if answer.len() == count {
                    break;
                }
                answer[position - prompt.len()]
            }
        };
        total = total.wrapping_add(kv(token, position as u32, total));
    }
    answer
}

/// The KV values of a pool, by physical block.
pub struct Memory {
    block_tokens: usize,
    values: Vec<u64>,
    /// Sum of each block's values, so that a full block costs one addition.
    sums: Vec<u64>,
}

impl Memory {
    /// Memory of `blocks` blocks.
    pub fn new(blocks: u32, block_tokens: u32) -> Self {
        let tokens = blocks as usize * block_tokens as usize;
        Self { block_tokens: block_tokens as usize, values: vec![0; tokens], sums: vec![0; blocks as usize] }
    }

    /// Writes one token's KV.
    pub fn set(&mut self, block: u32, offset: u32, value: u64) {
        let slot = &mut self.values[block as usize * self.block_tokens + offset as usize];
        let sum = &mut self.sums[block as usize];
        *sum = sum.wrapping_sub(*slot).wrapping_add(value);
        *slot = value;
    }

    /// A block's values, to be sent.
    pub fn block(&self, block: u32) -> Vec<u64> {
        let start = block as usize * self.block_tokens;
        self.values[start..start + self.block_tokens].to_vec()
    }

    /// Takes a block's values in. Those outside the pool are let fall.
    pub fn fill(&mut self, block: u32, values: &[u64]) {
        if (block as usize) < self.sums.len() {
            for (offset, value) in values.iter().take(self.block_tokens).enumerate() {
                self.set(block, offset as u32, *value);
            }
        }
    }

    /// Attention over `runs` by rows at positions `start..end`.
    pub fn attend(&self, runs: impl IntoIterator<Item = KvRun>, start: u32, end: u32) -> Partial {
        let mut partial = Partial::default();
        for run in runs {
            partial.keys += u64::from(run.tokens);
            if run.position + run.tokens <= start && run.tokens as usize == self.block_tokens {
                partial.before = partial.before.wrapping_add(self.sums[run.block as usize]);
                continue;
            }
            let first = run.block as usize * self.block_tokens;
            for (value, position) in self.values[first..first + run.tokens as usize].iter().zip(run.position..) {
                if position < start {
                    partial.before = partial.before.wrapping_add(*value);
                } else if position < end {
                    partial.within.push((position, *value));
                }
            }
        }
        partial
    }
}

/// A partial over some blocks, for rows at consecutive positions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partial {
    /// Sum over keys before the first row.
    pub before: u64,
    /// Keys at the rows' own positions, which only later rows may see.
    pub within: Vec<(u32, u64)>,
    /// Keys in all.
    pub keys: u64,
}

impl Partial {
    /// Takes another part in.
    pub fn merge(&mut self, other: &Self) {
        self.before = self.before.wrapping_add(other.before);
        self.within.extend_from_slice(&other.within);
        self.keys += other.keys;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_merge_to_the_whole_in_any_order() {
        let prompt: Vec<u32> = (0..37).map(|i| i * 31 % 1000).collect();
        let mut memory = Memory::new(8, 16);
        let place = [5u32, 2, 7];
        let mut total = 0u64;
        for (token, position) in prompt.iter().zip(0u32..) {
            let value = kv(*token, position, total);
            memory.set(place[position as usize / 16], position % 16, value);
            total = total.wrapping_add(value);
        }
        let run = |i: usize, tokens| KvRun { block: place[i], position: i as u32 * 16, tokens };
        let mut whole = memory.attend([run(2, 5)], 37, 38);
        whole.merge(&memory.attend([run(0, 16), run(1, 16)], 37, 38));
        assert_eq!((whole.before, whole.keys), (total, 37));
        assert_eq!(next(whole.before), reference(&prompt, 1)[0]);
        let other = memory.attend([run(0, 16), run(0, 16), run(2, 5)], 37, 38);
        assert_ne!(other.before, total, "a block doubled and one missing is seen");
        let causal = memory.attend([run(1, 16)], 20, 24);
        assert_eq!(causal.within.iter().map(|(p, _)| *p).collect::<Vec<_>>(), [20, 21, 22, 23]);
    }

    #[test]
    fn the_reference_continues_itself() {
        let prompt = [3, 1, 4, 1, 5];
        let answer = reference(&prompt, 10);
        let longer: Vec<u32> = prompt.iter().chain(&answer[..4]).copied().collect();
        assert_eq!(reference(&longer, 6), answer[4..]);
    }
}
