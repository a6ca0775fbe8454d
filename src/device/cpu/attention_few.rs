//! MicroAttention of a few query vectors a KV head: decode. Bounded by reading
//! keys and values, so they are read once, in the order they lie in memory, for
//! all heads of the group and all rows.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use super::attention::{PAD, Partials};
use super::kv_view::{KvView, load, load_pair, paired, widen, widen_pairs};
use super::simd::{Kernel, Simd, lanes};
use crate::kv::rblock::{KvDtype, KvRun};

/// All query heads of the consecutive rows of one sequence over some runs.
pub(super) struct Few<'a> {
    pub kv: KvView,
    /// First row; rows `q_stride` apart.
    pub q: *const f32,
    pub q_stride: usize,
    pub rows: usize,
    /// Of the first row.
    pub position: u32,
    /// Query heads a KV head.
    pub group: usize,
    /// On scores, in units of ln 2.
    pub scale: f32,
    pub window: Option<u32>,
    pub runs: &'a [KvRun],
    /// [`Few::scratch`] elements.
    pub scratch: *mut f32,
    pub partials: Partials,
    /// Partial of row 0 and head 0; row-major.
    pub first: usize,
}

/// Tokens whose values are added at a time.
const VALUES: usize = 16;
/// Bytes ahead that are asked for: far enough to hide the memory's latency, near
/// enough to find the lines still in the first-level cache.
const AHEAD: usize = 2048;

/// A block, read from its first byte to its last, and where it goes on.
struct Stream {
    /// From this block to the next.
    jump: isize,
    bytes: usize,
}

impl Stream {
    /// Distance from byte `at` of the stream to what is read [`AHEAD`] bytes
    /// later, maybe in the next block.
    #[inline(always)]
    fn ahead(&self, at: usize) -> isize {
        let here = AHEAD as isize;
        if at + AHEAD < self.bytes { here } else { self.jump.wrapping_add(here).wrapping_sub(self.bytes as isize) }
    }
}

impl Few<'_> {
    /// f32 elements of scratch for up to `vectors` query vectors a KV head.
    pub fn scratch(kv_heads: usize, vectors: usize, padded: usize, block_tokens: usize) -> usize {
        let tokens = block_tokens.next_multiple_of(PAD);
        2 * kv_heads * vectors * padded + 2 * kv_heads * vectors + kv_heads * vectors * tokens + PAD * padded + 4 * PAD
    }
}

impl Kernel for Few<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        // The usual type is compiled apart; the others share a copy.
        // SAFETY: the fields are as they say.
        unsafe {
            if self.kv.dtype == KvDtype::Bf16 && self.kv.head_dim.is_multiple_of(2 * S::LANES) && !S::PLAIN {
                self.walk::<S, true>(KvDtype::Bf16);
            } else {
                self.walk::<S, false>(self.kv.dtype);
            }
        }
    }
}

impl Few<'_> {
    /// With `PAIRED` the elements of a head are kept in the order in which pairs
    /// of bf16 widen: each `2 · LANES` of them even ones first.
    #[inline(always)]
    unsafe fn walk<S: Simd, const PAIRED: bool>(&self, dtype: KvDtype) {
        let kv = &self.kv;
        let (d, padded) = (kv.head_dim, kv.head_dim.next_multiple_of(PAD));
        let vectors = self.rows * self.group;
        let all = kv.kv_heads * vectors;
        let tokens = kv.block_tokens.next_multiple_of(PAD);
        // SAFETY: scratch has room for all of these; see `scratch`.
        unsafe {
            let q = self.scratch;
            let acc = q.add(all * padded);
            let stats = acc.add(all * padded);
            // `[padded / LANES][LANES tokens][LANES]`
            let tile = stats.add((2 * all).next_multiple_of(PAD));
            let scores = tile.add(PAD * padded);
            // Query vectors by KV head, scaled; sums empty.
            for head in 0..kv.kv_heads {
                for v in 0..vectors {
                    let from = self.q.add(v / self.group * self.q_stride + (head * self.group + v % self.group) * d);
                    let to = q.add((head * vectors + v) * padded);
                    for i in 0..padded {
                        let x = if i < d { *from.add(i) * self.scale } else { 0.0 };
                        *to.add(if PAIRED { paired::<S>(i) } else { i }) = x;
                    }
                    *stats.add(2 * (head * vectors + v)) = f32::NEG_INFINITY;
                    *stats.add(2 * (head * vectors + v) + 1) = 0.0;
                }
            }
            for i in 0..all * padded {
                *acc.add(i) = 0.0;
            }
            for (index, run) in self.runs.iter().enumerate() {
                let (low, _) = self.visible(run, 0);
                let (_, high) = self.visible(run, self.rows - 1);
                if low >= high {
                    continue;
                }
                let block = kv.block(run);
                let next = self.runs.get(index + 1).map_or(block, |next| kv.block(next));
                let stream =
                    Stream { jump: (next as isize).wrapping_sub(block as isize), bytes: kv.kv_heads * kv.head_bytes };
                let count = run.tokens as usize;
                // All keys, all weights, all values: in the order they lie in
                // memory, and the exponentials of all heads overlap.
                for head in 0..kv.kv_heads {
                    let (q, scores) = (q.add(head * vectors * padded), scores.add(head * vectors * tokens));
                    for first in (0..count).step_by(S::LANES) {
                        let at = head * kv.head_bytes + first * kv.row_bytes();
                        let (keys, ahead) = (block.add(at), stream.ahead(at));
                        let count = (count - first).min(S::LANES);
                        self.score::<S, PAIRED>(dtype, keys, ahead, count, q, tile, scores.add(first), tokens);
                    }
                }
                for head in 0..kv.kv_heads {
                    let (acc, scores) = (acc.add(head * vectors * padded), scores.add(head * vectors * tokens));
                    self.soften::<S>(run, scores, tokens, stats.add(2 * head * vectors), acc);
                }
                for head in 0..kv.kv_heads {
                    let (acc, scores) = (acc.add(head * vectors * padded), scores.add(head * vectors * tokens));
                    for first in (0..count).step_by(VALUES) {
                        let at = (kv.kv_heads + head) * kv.head_bytes + first * kv.row_bytes();
                        let (values, ahead) = (block.add(at), stream.ahead(at));
                        let count = (count - first).min(VALUES);
                        let mut v = 0;
                        while v < vectors {
                            let (acc, weights) = (acc.add(v * padded), scores.add(v * tokens + first));
                            v += match vectors - v {
                                1 => self.add_values::<S, 1, PAIRED>(dtype, values, ahead, count, weights, tokens, acc),
                                2 => self.add_values::<S, 2, PAIRED>(dtype, values, ahead, count, weights, tokens, acc),
                                3 => self.add_values::<S, 3, PAIRED>(dtype, values, ahead, count, weights, tokens, acc),
                                _ => self.add_values::<S, 4, PAIRED>(dtype, values, ahead, count, weights, tokens, acc),
                            };
                        }
                    }
                }
            }
            let heads = kv.kv_heads * self.group;
            for head in 0..kv.kv_heads {
                for v in 0..vectors {
                    let partial = self.first + v / self.group * heads + head * self.group + v % self.group;
                    let from = head * vectors + v;
                    let to = self.partials.o.add(partial * padded);
                    for i in 0..d {
                        *to.add(i) = *acc.add(from * padded + if PAIRED { paired::<S>(i) } else { i });
                    }
                    std::ptr::copy_nonoverlapping(stats.add(2 * from), self.partials.stats.add(2 * partial), 2);
                }
            }
        }
    }

    /// Tokens of a run that row `row` sees.
    #[inline(always)]
    fn visible(&self, run: &KvRun, row: usize) -> (usize, usize) {
        let position = i64::from(self.position) + row as i64;
        let start = i64::from(run.position);
        let low = self.window.map_or(0, |w| (position - i64::from(w) + 1 - start).max(0));
        let high = (position + 1 - start).clamp(0, i64::from(run.tokens));
        (low as usize, high as usize)
    }

    /// Scores of all query vectors of a KV head with up to LANES keys.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn score<S: Simd, const PAIRED: bool>(
        &self,
        dtype: KvDtype,
        keys: *const u8,
        ahead: isize,
        count: usize,
        q: *const f32,
        tile: *mut f32,
        scores: *mut f32,
        tokens: usize,
    ) {
        let (d, padded, row) = (self.kv.head_dim, self.kv.head_dim.next_multiple_of(PAD), self.kv.row_bytes());
        let width = d.next_multiple_of(S::LANES);
        if PAIRED && S::LANES == 8 {
            // Short vectors: few enough query vectors need no tile.
            // SAFETY: as here.
            unsafe {
                match self.rows * self.group {
                    1 => return self.score_in_registers::<S, 1>(keys, ahead, count, q, tile, scores, tokens),
                    2 => return self.score_in_registers::<S, 2>(keys, ahead, count, q, tile, scores, tokens),
                    3 => return self.score_in_registers::<S, 3>(keys, ahead, count, q, tile, scores, tokens),
                    4 => return self.score_in_registers::<S, 4>(keys, ahead, count, q, tile, scores, tokens),
                    _ => {}
                }
            }
        }
        // SAFETY: `count` keys; tile and scores as in `walk`. Rows of the tile
        // beyond `count` hold older keys; their scores are masked.
        unsafe {
            for t in 0..count {
                let key = keys.wrapping_add(t * row);
                let (next, out) = (key.wrapping_offset(ahead), tile.wrapping_add(t * S::LANES));
                if PAIRED {
                    widen_pairs::<S>(key, d, next, out, S::LANES * S::LANES);
                } else {
                    widen::<S>(key, d, dtype, next, out, S::LANES * S::LANES);
                }
            }
            for v in 0..self.rows * self.group {
                let q = q.add(v * padded);
                let mut sums = [S::splat(0.0); 16];
                let mut at = tile.cast_const();
                for i in (0..width).step_by(S::LANES) {
                    let x = S::load(q.wrapping_add(i));
                    for t in 0..S::LANES {
                        sums[t] = S::fma(S::load(at.wrapping_add(t * S::LANES)), x, sums[t]);
                    }
                    at = at.wrapping_add(S::LANES * S::LANES);
                }
                S::store(scores.add(v * tokens), S::sums(&sums));
            }
        }
    }

    /// As `score` of `N` query vectors, of paired bf16: two keys at a time meet
    /// each part of the query vectors, and only sums go through memory.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn score_in_registers<S: Simd, const N: usize>(
        &self,
        keys: *const u8,
        ahead: isize,
        count: usize,
        q: *const f32,
        tile: *mut f32,
        scores: *mut f32,
        tokens: usize,
    ) {
        let (d, padded, row) = (self.kv.head_dim, self.kv.head_dim.next_multiple_of(PAD), self.kv.row_bytes());
        // SAFETY: as in `score`; the tile holds LANES sums of each query vector.
        unsafe {
            for t in (0..count).step_by(2) {
                // An odd last key is its own second.
                let first = keys.wrapping_add(t * row);
                let second = keys.wrapping_add((t + 1).min(count - 1) * row);
                let mut sums = [[S::splat(0.0); N]; 2];
                for i in (0..d).step_by(2 * S::LANES) {
                    S::prefetch(first.wrapping_offset(ahead).wrapping_add(2 * i));
                    S::prefetch(second.wrapping_offset(ahead).wrapping_add(2 * i));
                    let (even0, odd0) = load_pair::<S>(first, i);
                    let (even1, odd1) = load_pair::<S>(second, i);
                    for n in 0..N {
                        let x = S::load(q.wrapping_add(n * padded + i));
                        sums[0][n] = S::fma(even0, x, sums[0][n]);
                        sums[1][n] = S::fma(even1, x, sums[1][n]);
                        let x = S::load(q.wrapping_add(n * padded + i + S::LANES));
                        sums[0][n] = S::fma(odd0, x, sums[0][n]);
                        sums[1][n] = S::fma(odd1, x, sums[1][n]);
                    }
                }
                for n in 0..N {
                    S::store(tile.wrapping_add((n * S::LANES + t) * S::LANES), sums[0][n]);
                    S::store(tile.wrapping_add((n * S::LANES + t + 1) * S::LANES), sums[1][n]);
                }
            }
            for n in 0..N {
                let mut sums = [S::splat(0.0); 16];
                for t in 0..S::LANES {
                    sums[t] = S::load(tile.wrapping_add((n * S::LANES + t) * S::LANES));
                }
                S::store(scores.add(n * tokens), S::sums(&sums));
            }
        }
    }

    /// Scores to weights, relative to the running maxima; scales what was
    /// summed before where a maximum grew.
    #[inline(always)]
    unsafe fn soften<S: Simd>(&self, run: &KvRun, scores: *mut f32, tokens: usize, stats: *mut f32, acc: *mut f32) {
        let padded = self.kv.head_dim.next_multiple_of(PAD);
        let width = (run.tokens as usize).next_multiple_of(S::LANES);
        // SAFETY: as in `walk`.
        unsafe {
            for v in 0..self.rows * self.group {
                let scores = scores.add(v * tokens);
                let (low, high) = self.visible(run, v / self.group);
                for t in 0..low.min(width) {
                    *scores.add(t) = f32::NEG_INFINITY;
                }
                for t in high..width {
                    *scores.add(t) = f32::NEG_INFINITY;
                }
                let mut largest = S::load(scores);
                for t in (S::LANES..width).step_by(S::LANES) {
                    largest = S::max(largest, S::load(scores.add(t)));
                }
                let (old, sum) = (*stats.add(2 * v), *stats.add(2 * v + 1));
                let max = old.max(S::largest(largest));
                // A row that has seen nothing yet: any finite base will do.
                let base = S::splat(max.max(f32::MIN));
                let mut total = S::splat(0.0);
                for t in (0..width).step_by(S::LANES) {
                    let weight = S::exp2(S::sub(S::load(scores.add(t)), base));
                    total = S::add(total, weight);
                    S::store(scores.add(t), weight);
                }
                let mut kept = sum;
                if max > old {
                    let factor = (old - max).exp2();
                    kept *= factor;
                    if sum > 0.0 {
                        for i in (0..padded).step_by(S::LANES) {
                            let at = acc.add(v * padded + i);
                            S::store(at, S::mul(S::load(at), S::splat(factor)));
                        }
                    }
                }
                *stats.add(2 * v) = max;
                *stats.add(2 * v + 1) = kept + S::sum(total);
            }
        }
    }

    /// Adds one block's values, weighted, for `N` query vectors; returns N.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn add_values<S: Simd, const N: usize, const PAIRED: bool>(
        &self,
        dtype: KvDtype,
        values: *const u8,
        ahead: isize,
        count: usize,
        weights: *const f32,
        tokens: usize,
        acc: *mut f32,
    ) -> usize {
        let (d, padded, row) = (self.kv.head_dim, self.kv.head_dim.next_multiple_of(PAD), self.kv.row_bytes());
        // SAFETY: the block's values; weights and sums as in `walk`.
        unsafe {
            let mut i = 0;
            while i + 4 * S::LANES <= d && S::LANES == 16 {
                self.add_columns::<S, N, 4, PAIRED>(dtype, values, ahead, count, weights, tokens, acc, i);
                i += 4 * S::LANES;
            }
            while i + 2 * S::LANES <= d {
                self.add_columns::<S, N, 2, PAIRED>(dtype, values, ahead, count, weights, tokens, acc, i);
                i += 2 * S::LANES;
            }
            while i + S::LANES <= d {
                self.add_columns::<S, N, 1, false>(dtype, values, ahead, count, weights, tokens, acc, i);
                i += S::LANES;
            }
            if i < d {
                // The odd end of a head.
                let mut end = [0.0f32; 16];
                for t in 0..count {
                    let from = values.add(t * row + i * dtype.size());
                    widen::<S>(from, d - i, dtype, from.wrapping_offset(ahead), end.as_mut_ptr(), S::LANES);
                    for n in 0..N {
                        for (j, x) in end.iter().enumerate().take(d - i) {
                            *acc.add(n * padded + i + j) += *weights.add(n * tokens + t) * x;
                        }
                    }
                }
            }
        }
        N
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn add_columns<S: Simd, const N: usize, const C: usize, const PAIRED: bool>(
        &self,
        dtype: KvDtype,
        values: *const u8,
        ahead: isize,
        count: usize,
        weights: *const f32,
        tokens: usize,
        acc: *mut f32,
        i: usize,
    ) {
        let (padded, row) = (self.kv.head_dim.next_multiple_of(PAD), self.kv.row_bytes());
        // SAFETY: as in `add_values`.
        unsafe {
            // Where registers allow two sets of sums hide the latency of adding.
            let sets = if S::LANES == 8 && N * C <= 6 { 2 } else { 1 };
            let mut sums = [[[S::splat(0.0); C]; N]; 2];
            for n in 0..N {
                for c in 0..C {
                    sums[0][n][c] = S::load(acc.add(n * padded + i + c * S::LANES));
                }
            }
            let mut column = values.wrapping_add(i * dtype.size());
            let mut weights: [*const f32; N] = lanes!([weights; N], n => weights.wrapping_add(n * tokens));
            let mut left = count;
            while left > 0 {
                for set in 0..sets {
                    if left == 0 {
                        break;
                    }
                    left -= 1;
                    let next = column.wrapping_offset(ahead);
                    for line in (0..C * S::LANES * dtype.size()).step_by(64) {
                        S::prefetch(next.wrapping_add(line));
                    }
                    let mut x = [S::splat(0.0); C];
                    for c in (0..C).step_by(2) {
                        if PAIRED {
                            (x[c], x[c + 1]) = load_pair::<S>(column, c * S::LANES);
                        } else {
                            x[c] = load::<S>(column, c * S::LANES, dtype);
                            if c + 1 < C {
                                x[c + 1] = load::<S>(column, (c + 1) * S::LANES, dtype);
                            }
                        }
                    }
                    for n in 0..N {
                        let weight = S::splat(*weights[n]);
                        weights[n] = weights[n].wrapping_add(1);
                        for c in 0..C {
                            sums[set][n][c] = S::fma(x[c], weight, sums[set][n][c]);
                        }
                    }
                    column = column.wrapping_add(row);
                }
            }
            if sets == 2 {
                for n in 0..N {
                    for c in 0..C {
                        sums[0][n][c] = S::add(sums[0][n][c], sums[1][n][c]);
                    }
                }
            }
            for n in 0..N {
                for c in 0..C {
                    S::store(acc.add(n * padded + i + c * S::LANES), sums[0][n][c]);
                }
            }
        }
    }
}
