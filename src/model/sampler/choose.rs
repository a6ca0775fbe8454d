//! Arithmetic over one row of logits. Everything that decides a token is plain
//! f32/f64 arithmetic in a fixed order (no libm, no fused operations), so the
//! same logits and seed give the same token on every machine.

use std::cell::RefCell;

/// Values scanned at once: what the compiler turns into vector registers.
const LANES: usize = 16;
/// Values summarised by one maximum or sum.
const CHUNK: usize = 64;

/// The largest value; `None` where a value is infinite or not a number, or
/// where there is none.
pub(super) fn finite_max(values: &[f32]) -> Option<f32> {
    let mut max = [f32::NEG_INFINITY; LANES];
    // x·0 is 0 for every finite x and NaN for the rest.
    let mut poison = [0.0f32; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
            poison[lane] += row[lane] * 0.0;
        }
    }
    for &value in rest {
        max[0] = if value > max[0] { value } else { max[0] };
        poison[0] += value * 0.0;
    }
    if poison.iter().any(|p| p.is_nan()) {
        return None;
    }
    max.into_iter().reduce(f32::max).filter(|max| max.is_finite())
}

/// The first index that holds `max`.
pub(super) fn position(values: &[f32], max: f32) -> Option<u32> {
    let mut start = 0;
    for chunk in values.chunks(CHUNK) {
        // A whole chunk is compared without a branch, which vectorises.
        if chunk.iter().fold(false, |found, &v| found | (v == max)) {
            return chunk.iter().position(|&v| v == max).map(|i| (start + i) as u32);
        }
        start += chunk.len();
    }
    None
}

/// eˣ for x ≤ 0, within 2 units in the last place; 0 below e⁻⁸⁷.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer, which then sits in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    // ln 2 in two parts, so that the remainder is exact to f32.
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let poly = 1.987_569_2e-4;
    let poly = poly * r + 1.398_199_9e-3;
    let poly = poly * r + 8.333_452e-3;
    let poly = poly * r + 4.166_579_6e-2;
    let poly = poly * r + 1.666_666_5e-1;
    let poly = poly * r + 0.5;
    let e = poly * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x > -87.0 { e * scale } else { 0.0 }
}

/// Replaces each logit with exp((logit − max) / temperature).
pub(super) fn weights(logits: &mut [f32], max: f32, temperature: f32) {
    let scale = 1.0 / temperature;
    for logit in logits {
        *logit = exp((*logit - max) * scale);
    }
}

/// Sum of non-negative values, in a fixed order.
pub(super) fn sum(values: &[f32]) -> f64 {
    values.chunks(CHUNK).map(chunk_sum).sum()
}

fn chunk_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0.0f32; LANES];
    let (rows, rest) = chunk.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            lanes[lane] += row[lane];
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += value;
    }
    lanes.iter().map(|&l| f64::from(l)).sum()
}

/// ln Σ exp(logit).
pub(super) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut total = 0.0;
    for chunk in logits.chunks(CHUNK) {
        let mut e = [0.0f32; CHUNK];
        for (e, &logit) in e.iter_mut().zip(chunk) {
            *e = exp(logit - max);
        }
        total += chunk_sum(&e);
    }
    f64::from(max) + total.ln()
}

/// Zeroes the weights below `floor`.
pub(super) fn drop_below(weights: &mut [f32], floor: f32) {
    for weight in weights {
        *weight = if *weight < floor { 0.0 } else { *weight };
    }
}

/// Draws an index in proportion to its weight; `unit` is in [0, 1).
pub(super) fn draw(weights: &[f32], unit: f64) -> Option<u32> {
    let mut left = unit * sum(weights);
    let mut last = None;
    let mut start = 0;
    for chunk in weights.chunks(CHUNK) {
        let mass = chunk_sum(chunk);
        if mass > 0.0 {
            for (i, &weight) in chunk.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                last = Some((start + i) as u32);
                // Only the chunk that holds the mark is walked.
                if left >= mass {
                    continue;
                }
                left -= f64::from(weight);
                if left < 0.0 {
                    return last;
                }
            }
            if left >= mass {
                left -= mass;
            } else {
                // Rounding left the mark between this chunk's parts and its
                // sum: it belongs to the chunk's last token.
                return last;
            }
        }
        start += chunk.len();
    }
    last
}

/// A nucleus of at most this many tokens is sorted; a larger one, as of a very
/// flat distribution, is cut out without sorting.
const SORTED_NUCLEUS: usize = 512;

/// Draws among the `top_k` largest weights (0: all) cut to the smallest set
/// with `top_p` of their mass.
pub(super) fn draw_truncated(weights: &mut [f32], top_k: usize, top_p: f32, unit: f64) -> Option<u32> {
    let sorted = with_scratch(|scratch| {
        if top_k > 0 {
            largest(weights, top_k, scratch);
            let target = mass(&scratch.picked) * f64::from(top_p);
            return Ok(draw_sorted(&scratch.picked, target, unit));
        }
        let target = sum(weights) * f64::from(top_p);
        for k in [64, SORTED_NUCLEUS] {
            largest(weights, k, scratch);
            if mass(&scratch.picked) >= target {
                return Ok(draw_sorted(&scratch.picked, target, unit));
            }
        }
        Err(target)
    });
    sorted.unwrap_or_else(|target| {
        cut_nucleus(weights, target);
        draw(weights, unit)
    })
}

fn mass(picked: &[(f32, u32)]) -> f64 {
    picked.iter().map(|&(weight, _)| f64::from(weight)).sum()
}

/// Draws among the first of `picked` that reach `target`.
fn draw_sorted(picked: &[(f32, u32)], target: f64, unit: f64) -> Option<u32> {
    let mut kept = 0.0;
    let reached = picked.iter().position(|&(weight, _)| {
        kept += f64::from(weight);
        kept >= target
    });
    let picked = reached.map_or(picked, |last| &picked[..=last]);
    let mut left = unit * kept;
    let drawn = picked.iter().find(|&&(weight, _)| {
        left -= f64::from(weight);
        left < 0.0
    });
    drawn.or(picked.last()).map(|&(_, token)| token)
}

/// Zeroes all but the largest weights that reach `target` together; of equals
/// the first are kept.
///
/// The smallest weight kept is found digit by digit (non-negative floats sort
/// as their bits do): a pass over the vocabulary a digit, whatever the weights.
fn cut_nucleus(weights: &mut [f32], mut target: f64) {
    const DIGITS: [(u32, u32); 3] = [(20, 11), (9, 11), (0, 9)];
    let mut least = 0u32;
    for (shift, width) in DIGITS {
        let mut mass = [0.0f64; 1 << 11];
        let above = shift + width;
        for &weight in weights.iter() {
            let bits = weight.to_bits();
            if bits >> above == least >> above {
                mass[(bits >> shift) as usize & ((1 << width) - 1)] += f64::from(weight);
            }
        }
        // Where rounding leaves the target out of reach, all are kept.
        let mut digit = 0;
        for (candidate, &mass) in mass.iter().enumerate().rev().filter(|(_, mass)| **mass > 0.0) {
            digit = candidate as u32;
            if mass >= target {
                break;
            }
            target -= mass;
        }
        least |= digit << shift;
    }
    let least = f32::from_bits(least);
    for weight in weights {
        if *weight == least {
            if target <= 0.0 {
                *weight = 0.0;
            }
            target -= f64::from(least);
        } else if *weight < least {
            *weight = 0.0;
        }
    }
}

/// The `k` largest of `values`, largest first, ties by index, into `top`.
pub(super) fn top(values: &[f32], k: usize, top: &mut Vec<(u32, f32)>) {
    with_scratch(|scratch| {
        largest(values, k, scratch);
        top.extend(scratch.picked.iter().map(|&(value, token)| (token, value)));
    });
}

/// Buffers that calls on one thread reuse: one set a thread, not one a request.
#[derive(Default)]
struct Scratch {
    /// Maximum of each [`CHUNK`].
    maxima: Vec<f32>,
    /// (value, index), sorted when a function returns.
    picked: Vec<(f32, u32)>,
}

fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(f)
}

fn descending(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Leaves the `k` largest of `values` in `scratch.picked`, largest first, ties
/// by index.
///
/// The k-th largest of the chunks' maxima is a floor under the k-th largest
/// value, so only values at or above it are candidates: two streaming passes
/// and a sort of few, instead of a sort of the vocabulary.
fn largest(values: &[f32], k: usize, scratch: &mut Scratch) {
    let Scratch { maxima, picked } = scratch;
    picked.clear();
    if k == 0 {
        return;
    }
    maxima.clear();
    maxima.extend(values.chunks(CHUNK).map(chunk_max));
    let floor = if k < maxima.len() {
        *maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let mut start = 0;
    for chunk in values.chunks(CHUNK) {
        if chunk_max(chunk) >= floor {
            let candidates = chunk.iter().enumerate().filter(|(_, v)| **v >= floor);
            picked.extend(candidates.map(|(i, &v)| (v, (start + i) as u32)));
        }
        start += chunk.len();
    }
    if picked.len() > k {
        picked.select_nth_unstable_by(k - 1, descending);
        picked.truncate(k);
    }
    picked.sort_unstable_by(descending);
}

fn chunk_max(chunk: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    let (rows, rest) = chunk.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
        }
    }
    for (max, &value) in max.iter_mut().zip(rest) {
        *max = if value > *max { value } else { *max };
    }
    max.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_is_close_to_libm() {
        for i in 0..=1_740_000 {
            let x = -(i as f32) * 5e-5;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            if x > -87.0 {
                assert!(error < 3e-7, "exp({x}) is off by {error}");
            }
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn a_value_that_is_no_number_is_found_wherever_it_is() {
        for at in [0, 15, 16, 77, 99] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![1.0; 100];
                values[at] = bad;
                assert_eq!(finite_max(&values), None);
            }
        }
        assert_eq!(finite_max(&[]), None);
    }

    proptest! {
        #[test]
        fn largest_is_what_a_sort_gives(
            values in prop::collection::vec((0u8..40).prop_map(f32::from), 1..700),
            k in 0usize..800,
        ) {
            let mut sorted: Vec<(f32, u32)> = values.iter().copied().zip(0..).collect();
            sorted.sort_by(descending);
            sorted.truncate(k);
            let mut got = Vec::new();
            top(&values, k, &mut got);
            prop_assert_eq!(got, sorted.into_iter().map(|(v, i)| (i, v)).collect::<Vec<_>>());
        }

        #[test]
        fn max_and_its_position_are_the_first_largest(values in prop::collection::vec(-1e30f32..1e30, 1..300)) {
            let max = finite_max(&values).unwrap();
            prop_assert_eq!(Some(max), values.iter().copied().reduce(f32::max));
            let at = values.iter().position(|&v| v == max).unwrap();
            prop_assert_eq!(position(&values, max), Some(at as u32));
        }

        #[test]
        fn draw_walks_the_cumulative_weights(
            values in prop::collection::vec((0u8..8).prop_map(f32::from), 1..400),
            unit in 0.0f64..1.0,
        ) {
            // Whole numbers: every sum is exact, so the oracle is too.
            let mark = unit * values.iter().map(|&v| f64::from(v)).sum::<f64>();
            let mut cumulative = 0.0;
            let expected = values.iter().position(|&v| { cumulative += f64::from(v); mark < cumulative });
            prop_assert_eq!(draw(&values, unit), expected.map(|i| i as u32));
        }

        #[test]
        fn truncation_keeps_the_set_that_a_sort_would(
            values in prop::collection::vec((1u16..500).prop_map(f32::from), 1..2000),
            top_k in 0usize..300,
            top_p in 0.05f32..1.0,
            unit in 0.0f64..1.0,
        ) {
            let mut sorted: Vec<(f32, u32)> = values.iter().copied().zip(0..).collect();
            sorted.sort_by(descending);
            if top_k > 0 { sorted.truncate(top_k); }
            let mass: f64 = sorted.iter().map(|v| f64::from(v.0)).sum();
            let mut kept = 0.0;
            let mut count = 0;
            for v in &sorted {
                count += 1;
                kept += f64::from(v.0);
                if kept >= mass * f64::from(top_p) { break; }
            }
            sorted.truncate(count);
            if top_k == 0 && count > SORTED_NUCLEUS {
                sorted.sort_by_key(|v| v.1);
            }
            let mark = unit * kept;
            let mut cumulative = 0.0;
            let expected = sorted.iter().find(|v| { cumulative += f64::from(v.0); mark < cumulative }).unwrap().1;
            prop_assert_eq!(draw_truncated(&mut values.clone(), top_k, top_p, unit), Some(expected));
            if top_k == 0 {
                let mut kept = values.clone();
                cut_nucleus(&mut kept, mass * f64::from(top_p));
                sorted.sort_by_key(|v| v.1);
                let kept: Vec<(f32, u32)> = kept.into_iter().zip(0..).filter(|v| v.0 > 0.0).collect();
                prop_assert_eq!(kept, sorted);
            }
        }
    }
}
