//! MicroAttention of many query vectors a KV head: prefill. Bounded by
//! arithmetic. Query vectors are lanes: a panel of 32 of them meets one key
//! element at a time, so scores need no sum across lanes, softmax is
//! element-wise, and the weights are at once the second product's operand.
#![allow(unsafe_code)]
// Closures are compiled without the kernel's instruction set: plain loops.
#![allow(clippy::needless_range_loop)]

use super::attention::Partials;
use super::gemm::micro;
use super::kv_view::{KvView, widen};
use super::simd::{Kernel, PANEL, Simd};
use crate::kv::rblock::KvRun;

/// Query vectors of an item.
pub(super) const LANES: usize = 2 * PANEL;
const PANELS: usize = LANES / PANEL;
/// Tokens that are widened and worked on together.
const TOKENS: usize = 32;

/// Some query vectors of one KV head over some runs.
pub(super) struct Many<'a> {
    pub kv: KvView,
    /// First row; rows `q_stride` apart.
    pub q: *const f32,
    pub q_stride: usize,
    /// KV head.
    pub head: usize,
    /// First query vector: `row · group + head in group`.
    pub lane: usize,
    /// 1 ..= LANES.
    pub lanes: usize,
    /// Of the first row.
    pub position: u32,
    /// Query heads a KV head.
    pub group: usize,
    /// On scores, in units of ln 2.
    pub scale: f32,
    pub window: Option<u32>,
    pub runs: &'a [KvRun],
    /// [`Many::scratch`] elements.
    pub scratch: *mut f32,
    pub partials: Partials,
    /// Partial of row 0 and head 0; row-major.
    pub first: usize,
    /// Query heads.
    pub heads: usize,
}

/// Where the parts of scratch begin.
struct Place {
    /// `[PANELS][padded][PANEL]`.
    q: *mut f32,
    /// `[PANELS][padded][PANEL]`.
    acc: *mut f32,
    /// `[TOKENS][padded]`.
    keys: *mut f32,
    /// `[TOKENS][padded]`.
    values: *mut f32,
    /// `[TOKENS][PANEL]`.
    scores: *mut f32,
    /// Running maxima `[LANES]`.
    max: *mut f32,
    /// Running sums `[LANES]`.
    sum: *mut f32,
    /// Positions of the rows, `[LANES]`.
    rows: *mut u32,
}

impl Many<'_> {
    /// f32 elements of scratch.
    pub fn scratch(padded: usize) -> usize {
        2 * LANES * padded + 2 * TOKENS * padded + TOKENS * PANEL + 3 * LANES
    }

    fn place(&self, padded: usize) -> Place {
        let q = self.scratch;
        let acc = q.wrapping_add(LANES * padded);
        let keys = acc.wrapping_add(LANES * padded);
        let values = keys.wrapping_add(TOKENS * padded);
        let scores = values.wrapping_add(TOKENS * padded);
        let max = scores.wrapping_add(TOKENS * PANEL);
        let sum = max.wrapping_add(LANES);
        Place { q, acc, keys, values, scores, max, sum, rows: sum.wrapping_add(LANES).cast() }
    }
}

impl Kernel for Many<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self) {
        let kv = &self.kv;
        let (d, padded) = (kv.head_dim, kv.head_dim.next_multiple_of(super::attention::PAD));
        let place = self.place(padded);
        let first_row = self.position + (self.lane / self.group) as u32;
        let last_row = self.position + ((self.lane + self.lanes - 1) / self.group) as u32;
        // Positions that some row sees.
        let start = self.window.map_or(0, |w| (first_row + 1).saturating_sub(w));
        // SAFETY: the fields are as they say; scratch has room, see `scratch`.
        unsafe {
            self.begin(&place, padded);
            let mut positions = [0u32; TOKENS];
            let mut count = 0;
            for (index, run) in self.runs.iter().enumerate() {
                let low = start.saturating_sub(run.position).min(run.tokens);
                let high = run.tokens.min((last_row + 1).saturating_sub(run.position));
                let block = kv.block(run);
                let next = self.runs.get(index + 1).map_or(block, |next| kv.block(next));
                let ahead = (next as isize).wrapping_sub(block as isize);
                for token in low..high {
                    let key = block.add(self.head * kv.head_bytes + token as usize * kv.row_bytes());
                    let value = key.add(kv.kv_heads * kv.head_bytes);
                    let (to_key, to_value) = (place.keys.add(count * padded), place.values.add(count * padded));
                    widen::<S>(key, d, kv.dtype, key.wrapping_offset(ahead), to_key, S::LANES);
                    widen::<S>(value, d, kv.dtype, value.wrapping_offset(ahead), to_value, S::LANES);
                    positions[count] = run.position + token;
                    count += 1;
                    if count == TOKENS {
                        self.tokens::<S, V>(&place, padded, &positions, count);
                        count = 0;
                    }
                }
            }
            if count > 0 {
                self.tokens::<S, V>(&place, padded, &positions, count);
            }
            self.end(&place, padded);
        }
    }
}

impl Many<'_> {
    /// Row and query head of a lane.
    #[inline(always)]
    fn row_and_head(&self, lane: usize) -> (usize, usize) {
        let vector = self.lane + lane;
        (vector / self.group, self.head * self.group + vector % self.group)
    }

    #[inline(always)]
    unsafe fn begin(&self, place: &Place, padded: usize) {
        let d = self.kv.head_dim;
        // SAFETY: as in `run`.
        unsafe {
            for i in 0..LANES * padded {
                *place.q.add(i) = 0.0;
                *place.acc.add(i) = 0.0;
            }
            for lane in 0..LANES {
                // Filling lanes repeat the last one; nobody reads them.
                let (row, head) = self.row_and_head(lane.min(self.lanes - 1));
                let from = self.q.add(row * self.q_stride + head * d);
                let to = place.q.add(lane / PANEL * padded * PANEL + lane % PANEL);
                for i in 0..d {
                    *to.add(i * PANEL) = *from.add(i) * self.scale;
                }
                *place.max.add(lane) = f32::NEG_INFINITY;
                *place.sum.add(lane) = 0.0;
                *place.rows.add(lane) = self.position + row as u32;
            }
        }
    }

    /// All lanes over one tile of tokens.
    #[inline(always)]
    unsafe fn tokens<S: Simd, const V: usize>(
        &self,
        place: &Place,
        padded: usize,
        positions: &[u32; TOKENS],
        count: usize,
    ) {
        let d = self.kv.head_dim;
        let mut newest = 0;
        let mut oldest = u32::MAX;
        for &position in &positions[..count] {
            newest = newest.max(position);
            oldest = oldest.min(position);
        }
        for panel in 0..PANELS.min(self.lanes.div_ceil(PANEL)) {
            // SAFETY: as in `run`.
            unsafe {
                let q = place.q.add(panel * padded * PANEL);
                let acc = place.acc.add(panel * padded * PANEL);
                // Scores `[token][lane]`.
                product::<S, V>(place.keys, padded, 1, q, d, count, place.scores, false);
                let rows = place.rows.add(panel * PANEL);
                let (first, last) = (*rows, *rows.add(PANEL - 1));
                let masked = newest > first || self.window.is_some_and(|w| last.saturating_sub(oldest) >= w);
                let span = S::splat_i(self.window.unwrap_or(1 << 31));
                for v in 0..V {
                    let lane = panel * PANEL + v * S::LANES;
                    let scores = place.scores.add(v * S::LANES);
                    if masked {
                        let rows = S::load_i(place.rows.add(lane));
                        for t in 0..count {
                            let at = scores.add(t * PANEL);
                            let position = S::splat_i(positions[t]);
                            let none = S::splat(f32::NEG_INFINITY);
                            S::store(at, S::select_within(position, rows, span, S::load(at), none));
                        }
                    }
                    let old = S::load(place.max.add(lane));
                    let mut max = old;
                    for t in 0..count {
                        max = S::max(max, S::load(scores.add(t * PANEL)));
                    }
                    // A lane that has seen nothing yet: any finite base will do.
                    let base = S::max(max, S::splat(f32::MIN));
                    let factor = S::exp2(S::sub(old, base));
                    let mut sum = S::mul(S::load(place.sum.add(lane)), factor);
                    for t in 0..count {
                        let at = scores.add(t * PANEL);
                        let weight = S::exp2(S::sub(S::load(at), base));
                        sum = S::add(sum, weight);
                        S::store(at, weight);
                    }
                    S::store(place.max.add(lane), max);
                    S::store(place.sum.add(lane), sum);
                    if S::largest(S::sub(max, S::max(old, S::splat(f32::MIN)))) > 0.0 {
                        for i in 0..d {
                            let at = acc.add(i * PANEL + v * S::LANES);
                            S::store(at, S::mul(S::load(at), factor));
                        }
                    }
                }
                // Output `[element][lane]`.
                product::<S, V>(place.values, 1, padded, place.scores, count, d, acc, true);
            }
        }
    }

    #[inline(always)]
    unsafe fn end(&self, place: &Place, padded: usize) {
        // SAFETY: as in `run`; the partials of these lanes are this item's.
        unsafe {
            for lane in 0..self.lanes {
                let (row, head) = self.row_and_head(lane);
                let partial = self.first + row * self.heads + head;
                let from = place.acc.add(lane / PANEL * padded * PANEL + lane % PANEL);
                let to = self.partials.o.add(partial * padded);
                for i in 0..self.kv.head_dim {
                    *to.add(i) = *from.add(i * PANEL);
                }
                *self.partials.stats.add(2 * partial) = *place.max.add(lane);
                *self.partials.stats.add(2 * partial + 1) = *place.sum.add(lane);
            }
        }
    }
}

/// `c[rows][PANEL] (+)= x · w[k][PANEL]`, x's element (row, k) at
/// `row · xr + k · xk`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn product<S: Simd, const V: usize>(
    x: *const f32,
    xr: usize,
    xk: usize,
    w: *const f32,
    k: usize,
    rows: usize,
    c: *mut f32,
    load: bool,
) {
    // SAFETY: the callers' operands; a block of rows is computed whole only
    // where it is, or where what lies beyond is scratch (the last rows of keys
    // and of a padded head), and only `rows` of it are stored.
    unsafe {
        if V == 2 {
            let mut row = 0;
            while rows - row >= 8 {
                micro::<S, 8, 2>(x.add(row * xr), xr, xk, w, k, 8, c.add(row * PANEL), PANEL, load);
                row += 8;
            }
            while row < rows {
                let left = (rows - row).min(4);
                micro::<S, 4, 2>(x.add(row * xr), xr, xk, w, k, left, c.add(row * PANEL), PANEL, load);
                row += left;
            }
        } else {
            for row in (0..rows).step_by(4) {
                for half in 0..V / 2 {
                    let at = half * 2 * S::LANES;
                    let left = (rows - row).min(4);
                    micro::<S, 4, 2>(x.add(row * xr), xr, xk, w.add(at), k, left, c.add(row * PANEL + at), PANEL, load);
                }
            }
        }
    }
}
